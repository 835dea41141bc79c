"""Notebooks that keep their outputs: run them where they stand, and turn them into pages of the site.

``python docs/notebook.py FILE...`` runs notebooks and stores their outputs in them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from PIL import Image

#: Key of a notebook's metadata: the digest of the code that made its outputs.
DIGEST = "code_sha256"


class Page(NamedTuple):
    """A notebook's title, the Markdown below it, and its pictures by file name."""

    title: str
    text: str
    pictures: dict[str, bytes]


def code_digest(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code cells: outputs of other code are stale."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def with_few_colours(png: str) -> str:
    """A PNG in base64 with 64 colours: a third of the bytes, and figures look the same."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(64)
    picture.save(smaller := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def execute(file: Path) -> None:
    """Run a notebook in an empty folder and write it back with its outputs, without what differs between two runs."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, startup_timeout=300, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "text" in output:  # a path without the temporary folder that it begins with
                output.text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[^/\s]+/", "", output.text)
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = with_few_colours(output.data["image/png"])
            if "metadata" in output:
                output.metadata = {}
            if "execution_count" in output:
                output.execution_count = None
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    CoalesceStreamsPreprocessor().preprocess(notebook, {})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, DIGEST: code_digest(notebook)}
    nbformat.write(notebook, file)


def page(file: Path) -> Page:
    """The page of a notebook with the outputs that it stores."""
    text, resources = MarkdownExporter().from_notebook_node(
        nbformat.read(file, as_version=4), {"unique_key": file.stem}
    )
    # cells of commands, and of files that are written
    text = re.sub(r"^```bash\n%%bash\n", "```bash\n", text, flags=re.MULTILINE)
    text = re.sub(r"^```python\n%%writefile (\S+)\n", r'```python title="\1"\n', text, flags=re.MULTILINE)
    heading, _, rest = text.partition("\n")
    pictures = {name: content for name, content in resources["outputs"].items() if f"]({name})" in rest}
    return Page(heading.removeprefix("# "), rest, pictures)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name)
        execute(Path(name))
