"""``descant export``: a run's model as one self-contained folder of weights, configuration and model card."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from descant.cli.errors import Refusal, disk_fault, fail, hint, one_line, printable
from descant.cli.options import Options
from descant.modules.core.errors import warn

if TYPE_CHECKING:
    from descant.modules.io.saved import Node, Saved
    from descant.recipes.base.recipe import Recipe
    from descant.report.card import About

_HELP = """\
descant export: a run's weights, configuration and model card in one folder

usage: descant export RUN --out DIR [--ckpt best|last|PATH] [--towers image,text] [--merge]
       descant export RUN --to onnx|open_clip|timm|transformers --out DIR [--ckpt best|last|PATH]

  descant export demo/001 --out demo-model

Writes model.safetensors (the EMA average, if the run has one), config.yaml, preprocess.yaml, metrics.json,
README.md (the model card, with code to copy) and, for a transformers tower, a folder towers/NAME that
transformers loads. The folder needs no other file of this machine. It is loaded back and compared, weight by
weight, before it gets its name; an existing folder is never changed.

--to writes what another package loads, without Descant: timm the encoder of a masked model, a TimmTower or a
PatchTower; transformers a language model of the Llama or Mixtral family, one that sees as LLaVA does, a CLIP
or a SigLIP; open_clip a CLIP; each with its tokenizer; onnx a graph of each modality of a contrastive run.
Adapters are folded in. The folder is loaded back by that package, and its outputs compared with the run's
(1e-5 in float32; onnx 1e-4).

Options:
  RUN                   a run such as demo/001, a checkpoint in one, or an export
  --out DIR             the folder to write
  --ckpt best|last|PATH the weights of a run (best: by its ModelCheckpoint's monitor; else last)
  --to FORMAT           onnx, open_clip, timm or transformers, in place of Descant's own folder
  --towers A,B          only these towers and their heads
  --merge               fold adapters into their layers, and quantized weights back into floats
  --runs DIR            where run folders live (runs)
  --trust MODULE        allow class paths of another package

Then, in Python: descant.Embedder("DIR").texts(["a red apple"]), or descant.load("DIR") for the recipe itself;
in YAML: {class_path: SavedTower, init_args: {path: DIR, tower: image}}."""


def main(args: Sequence[str]) -> int:
    """Export a run, and print what was written."""
    if not args or "--help" in args or "-h" in args:
        print(_HELP)
        return 0
    request = _read(args)
    if request.out.exists():
        fail(f"--out {request.out}: it exists, and an export never overwrites")
    try:
        lines = _export(request)
    except Exception as error:
        line = disk_fault(error, request.out.absolute().parent)
        line = line or (one_line(error) if isinstance(error, ValueError | OSError | ImportError) else None)
        if line is None or request.debug:
            raise
        raise Refusal(line) from error
    print("\n".join(lines))
    return 0


def _read(args: Sequence[str]) -> argparse.Namespace:
    parser = Options(prog="descant export", add_help=False)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ckpt", default="best")
    parser.add_argument("--to", default=None)
    parser.add_argument("--towers", default="")
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--trust", action="append", default=[])
    request, unknown = parser.parse_known_args(list(args))
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        fail(f"export {unknown[0]}: no such option{hint(unknown[0], options)}")
    for key, value in (("RUN", request.run), ("--out DIR", request.out)):
        if value is None:
            fail(f"export: {key} is missing: descant export demo/001 --out demo-model")
    if request.to is not None and request.towers:
        fail(f"--towers {request.towers}: --to {request.to} writes what the format holds; leave one of both out")
    return request


def _export(request: argparse.Namespace) -> list[str]:
    """Export under a temporary name until it is complete."""
    from descant.cli.quiet import quieten
    from descant.export import loading
    from descant.modules.io import saved
    from descant.run import runs

    quieten()
    out: Path = request.out
    path = runs.model_path(request.runs, request.run)
    if not path.exists():
        path = runs.existing(request.runs, request.run)
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir()
    try:
        with loading.trusting(request.trust):
            source = saved.find(path, request.ckpt)
            lines = _write(source, request, scratch) if request.to is None else _write_format(source, request, scratch)
        _as_other_files(scratch)
        os.rename(scratch, out)  # fails over a folder that is not empty
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [line.replace("EXPORT", str(out)) for line in lines]


def _as_other_files(folder: Path) -> None:
    """Set the user's default permissions: safetensors writes files that only the user may read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _write(source: Saved, request: argparse.Namespace, folder: Path) -> list[str]:
    import torch
    from safetensors.torch import save_file

    from descant.callbacks.logs.report import read_json, write_json
    from descant.export import loading
    from descant.modules.io import merge, saved
    from descant.recipes.base.rebuild import build, rebuild
    from descant.report import card
    from descant.run import portable
    from descant.run.folder import CLASSES

    keep = [name.strip() for name in request.towers.split(",") if name.strip()]
    selected, recipe = source, rebuild(source)
    if keep:
        selected = source._replace(config={**source.config, "model": portable.only(source.model, keep)})
        recipe = _drop_towers(recipe, build(selected), portable.towers_to_drop(source.model, keep), source.weights)
    prepared, parts = _preprocessing(source)
    model = portable.portable_config(selected.model, recipe, folder, next(iter(parts.get("text", [])), None))
    changed = merge.has_changed_layers(recipe)
    if request.merge:
        merge.plain(recipe)
        model = portable.without_adapters(model)
    given = (
        saved.read_yaml(source.folder / loading.PREPROCESS, source.folder)
        if source.exported
        else source.config.get("data", {})
    )
    parts = {modality: part for modality, part in parts.items() if modality in recipe.towers}
    nodes, left = portable.preprocess(parts, given, folder)
    state = recipe.state_dict()
    save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / saved.WEIGHTS)
    _yaml(folder / saved.CONFIG, "A model that Descant trained: descant.load(FOLDER)", {"model": model})
    _yaml(folder / loading.PREPROCESS, "How raw data becomes what the towers read", nodes)
    about = card.About(source, request.out.name, recipe, parts, changed and not request.merge, left)
    _copy_notice(source, prepared, folder)
    if names := read_json(source.folder / CLASSES):
        write_json(folder / CLASSES, names)
    digest = _confirm(folder, about)
    card.write(about, prepared, folder, {saved.WEIGHTS: digest})
    again = loading.load(folder, trust=request.trust).state_dict()
    differing = [k for k, v in state.items() if k not in again or not torch.equal(again[k].cpu(), v.cpu())]
    if differing or len(again) != len(state):
        raise ValueError(f"{request.run}: the export does not load back: {(differing or list(again))[0]} differs")
    files = _files(folder)
    size = sum(file.stat().st_size for file in files)
    return [
        f"EXPORT  {len(state):,} tensors, {size / 1e6:,.1f} MB, loaded back and equal",
        *_file_lines(files, folder),
    ]


def _write_format(source: Saved, request: argparse.Namespace, folder: Path) -> list[str]:
    """Write the folder of another package, with the model card, the run's numbers and the licence of its data."""
    from descant.export import formats
    from descant.export.captions import captions_of
    from descant.modules.io import merge
    from descant.modules.io.files import sha256_of
    from descant.recipes.base.rebuild import rebuild
    from descant.report import card

    formats.require(request.to)
    recipe = rebuild(source)
    merge.plain(recipe)
    chosen = formats.of(request.to, recipe)
    prepared, parts = _preprocessing(source)
    chosen.write(recipe, parts, folder)
    difference = chosen.require_near(recipe, folder)
    if chosen.cleans:
        texts = captions_of(prepared)
        _warn_of_texts(request.to, chosen.list_cleaned_texts(parts, folder, texts), len(texts))
    _copy_notice(source, prepared, folder)
    about = card.About(source, request.out.name, recipe, parts, False, [], chosen.usage(request.out.name))
    card.write(about, prepared, folder, {file.name: sha256_of(file) for file in chosen.weights(folder)})
    return [
        f"EXPORT  for {request.to}, loaded back by it: outputs differ by {difference:.1g} at most",
        *_file_lines(_files(folder), folder),
    ]


def _warn_of_texts(name: str, changed: Sequence[tuple[str, str]], of: int) -> None:
    """Warn in one line if the package cleans captions of the run's data, so its tokenizer gives other ids."""
    if changed:
        shortest = min(changed, key=lambda pair: len(pair[0]))
        here, there = (printable(text if len(text) <= 60 else f"{text[:57]}...") for text in shortest)
        warn(
            f"--to {name}: {len(changed):,} of {of:,} captions have other ids there, where texts are cleaned first: "
            f"{here!r} becomes {there!r}; train on cleaned captions (ftfy.fix_text), or give it token ids"
        )


def _preprocessing(source: Saved) -> tuple[Any, dict[str, list[Any]]]:
    """Return the data module, if the run's data is here, and the preprocessing of each modality."""
    from descant.datamodules.prepared import parts
    from descant.export import loading

    prepared = None if source.exported else loading.datamodule(source)
    return prepared, parts(prepared) if prepared is not None else loading.preprocess(source)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _file_lines(files: Sequence[Path], folder: Path) -> list[str]:
    return [f"  {file.relative_to(folder).as_posix()}" for file in files]


def _copy_notice(source: Saved, prepared: object, folder: Path) -> None:
    """Copy the notice of the data, from its folder or from the export that this one is made from."""
    from descant.report import card

    notices = [Path(str(place)) / "NOTICE.md" for place in [getattr(prepared, "folder", None)] if place is not None]
    for notice in [*notices, source.folder / card.NOTICE]:
        if notice.is_file():
            shutil.copyfile(notice, folder / card.NOTICE)


def _confirm(folder: Path, about: About) -> str:
    """Write the manifest of the export, and return the SHA-256 of its weights."""
    from descant.modules.io import manifest, saved
    from descant.modules.io.files import sha256_of

    weights = folder / saved.WEIGHTS
    built = [
        file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix not in (".safetensors", ".md")
    ]
    files = {file.relative_to(folder).as_posix(): sha256_of(file) for file in built}
    return manifest.confirm(weights, {"step": about.step, saved.FILES: files})


def _drop_towers(whole: Recipe, part: Recipe, dropped: Sequence[str], place: Path) -> Recipe:
    """Return ``part`` with the weights of ``whole``, except those of dropped towers."""
    from descant.modules.adaptation.grow import restructure, structure
    from descant.modules.io import saved

    restructure(part, structure(whole))
    names, state = part.state_dict(), whole.state_dict()
    state = {k: v for k, v in state.items() if k in names or not any(name in _words(k) for name in dropped)}
    saved.load_exactly(part, state, place)
    return part


def _words(key: str) -> list[str]:
    """Split a key into names: ``objectives.image-audio.losses.0`` has image and audio."""
    return [word for part in key.split(".") for word in part.split("-")]


def _yaml(file: Path, title: str, content: Node | dict[str, Any]) -> None:
    import yaml

    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    file.write_text(f"# {title}.\n{text}", encoding="utf-8")
