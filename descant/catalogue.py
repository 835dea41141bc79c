"""The YAML that ships with Descant: found by name from any folder, listed with its first line."""

from __future__ import annotations

from pathlib import Path

from descant.errors import Refusal, hint
from descant.modules.checkpoints import followed

ROOT = Path(__file__).resolve().parent / "experiments"
BASE = ROOT / "base.yaml"
#: Folders of pieces that complete an experiment; everything else is an experiment.
OVERLAYS = ("data", "on", "with")


def shipped() -> dict[str, Path]:
    """Name -> file of all that ships, such as ``contrastive/emoji`` or ``on/tiny``."""
    files = sorted(ROOT.rglob("*.yaml"))
    return {file.relative_to(ROOT).with_suffix("").as_posix(): file for file in files if file != BASE}


def experiments() -> dict[str, Path]:
    """Name -> file of what can be run by itself."""
    return {name: file for name, file in shipped().items() if name.split("/")[0] not in (*OVERLAYS, "claims")}


def overlays() -> dict[str, Path]:
    """Name -> file of what is laid over an experiment."""
    return {name: file for name, file in shipped().items() if name.split("/")[0] in OVERLAYS}


def run_name(file: Path) -> str:
    """How runs of a file are called: ``family-name`` where it ships, since names of files are not unique there.

    >>> run_name(ROOT / "masked/emoji.yaml"), run_name(Path("mine.yaml"))
    ('masked-emoji', 'mine')
    """
    if file.resolve().is_relative_to(ROOT.resolve()):
        return "-".join(file.resolve().relative_to(ROOT.resolve()).with_suffix("").parts)
    return file.stem


def header(file: Path) -> str:
    """The first line of a YAML's leading comment, without its mark."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def find(name: str) -> Path:
    """The file that ``--config NAME`` means: an existing file first, else what ships under that name.

    Raises:
        Refusal: if there is neither.
    """
    try:
        file = followed(Path(name).expanduser())
        if file.is_file():
            return file.resolve()
    except (OSError, RuntimeError):  # longer than any name may be, or the home of nobody
        pass
    known = shipped()
    plain = name.removesuffix(".yaml").removeprefix("experiments/")
    if plain in known:
        return known[plain]
    # a bare name is enough where only one experiment carries it
    same = [full for full in experiments() if full.split("/")[-1] == plain]
    if len(same) == 1:
        return known[same[0]]
    raise Refusal(f"--config {name}: no such file, and nothing of that name ships{hint(plain, known)}")


def shipped_data(name: str | None) -> Path | None:
    """The file of a data set that ships, for ``--data shards`` or ``--data data/shards``; None where none is meant."""
    plain = f"data/{(name or '').removesuffix('.yaml').removeprefix('data/')}"
    return None if Path(name or "").is_file() else shipped().get(plain)
