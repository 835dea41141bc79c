"""Notebooks as pages of the site: Markdown, with outputs where the notebook was run, and pictures as files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor


class Page(NamedTuple):
    """A notebook's title, a line on its outputs, the Markdown below, and its pictures by file name."""

    title: str
    note: str
    text: str
    pictures: dict[str, bytes]


def page(file: Path, run: Path) -> Page:
    """The page of a notebook whose outputs are stripped.

    ``run``: the folder in which ``make tutorials`` leaves it with its outputs. They are shown only where its cells are
    those of ``file``, so that no output is of other code.
    """
    notebook = nbformat.read(file, as_version=4)
    note = f"[The notebook]({file.name}); `make tutorials` computes its outputs, which are not shown here."
    if (run / file.name).is_file():
        executed = nbformat.read(run / file.name, as_version=4)
        if _sources(executed) == _sources(notebook):
            notebook, note = executed, f"[The notebook]({file.name}), with the outputs of a run."
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])
    text, resources = exporter.from_notebook_node(notebook, {"unique_key": file.stem})
    # cells of commands, and of files that are written
    text = re.sub(r"^```bash\n%%bash\n", "```bash\n", text, flags=re.MULTILINE)
    text = re.sub(r"^```python\n%%writefile (\S+)\n", r'```python title="\1"\n', text, flags=re.MULTILINE)
    heading, _, rest = text.partition("\n")
    pictures = {name: content for name, content in resources["outputs"].items() if f"]({name})" in rest}
    return Page(heading.removeprefix("# "), note, rest, pictures)


def _sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]
