"""A class that a user may choose where others of its kind can stand is in a YAML, on a page or in an example."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from descant.cli import dump

TOP = Path(__file__).resolve().parents[3]
#: Kinds of which nearly every class is, so that they are no choice.
GENERAL = {"Module", "Callback", "LightningModule"}
#: Classes that another class makes, so that no user names them.
MADE = {
    *("Fused", "OtherData", "HubDataset", "Joined", "Synthetic", "Taken"),
    *("BoostedSum", "SharedHead", "SoftVoting", "ProjectionAverage", "TowerAverage"),
}


def written() -> set[str]:
    """Return all words of experiments, pages and Python examples."""
    kinds = ["*.yaml", "*.md", "*.ipynb", "docs/*.py", "benchmarks/*.py", "descant/templates/*.py"]
    listed = subprocess.run(["git", "ls-files", *kinds], cwd=TOP, capture_output=True, text=True, check=True)
    files = [TOP / name for name in listed.stdout.split() if not name.startswith(("tests/", "experiments/claims/res"))]
    return {word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}


def last(path: str) -> str:
    return path.rpartition(".")[2]


def test_every_choice_is_shown_to_users() -> None:
    dump.write()  # in a process of its own, which has no classes of other tests
    schema = json.loads(dump.place().read_bytes())
    bases = {base for entry in schema["classes"].values() for base in entry["lineage"][1:]}
    hidden, words = set(), written()
    for path, entry in schema["classes"].items():
        names = {path, entry["lineage"][0]}
        kinds = {last(kind) for kind, of in schema["kinds"].items() if path in of["paths"] and kind not in names}
        if path.startswith("descant.") and kinds - GENERAL and not names & bases and not entry["abstract"]:
            hidden |= {last(path)} - words
    assert hidden == MADE, f"show in docs/mechanisms/choices.md, or make private: {sorted(hidden - MADE)}"
