"""The model card of an export: what the model is, how to use it, and the run's own numbers. It holds no guess."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from descant import __version__
from descant.callbacks.run.report import blocks, read_json, write_json
from descant.modules.io.saved import WEIGHTS, Saved, account, read_checkpoint
from descant.modules.tokenizers.text import Tokenizer
from descant.recipes.base.recipe import Recipe

CARD, METRICS, NOTICE = "README.md", "metrics.json", "DATA-NOTICE.md"
#: What a run's metrics.json says of its course, not of its model.
_COURSE = ("steps", "epochs", "samples", "seconds", "train_seconds", "samples_per_second")
_PACKAGES = ("torch", "lightning", "timm", "transformers", "peft", "bitsandbytes")


@dataclass
class About:
    """What is known of an export.

    Attributes:
        name: of its folder. found: what it was made from. recipe: the model. parts: what prepares its inputs.
        adapted: whether adapters or quantised layers are still in it. left: modalities whose preparation it lacks.
        step: of the weights. averaged: whether they are an average over training. metrics: of these weights.
        later: of the run's last weights, where these are others.
    """

    name: str
    found: Saved
    recipe: Recipe
    parts: Mapping[str, Sequence[Any]]
    adapted: bool
    left: Sequence[str]
    step: int | None
    averaged: bool
    metrics: dict[str, float]
    later: dict[str, float]

    @classmethod
    def of(
        cls,
        found: Saved,
        name: str,
        recipe: Recipe,
        parts: Mapping[str, Sequence[Any]],
        adapted: bool,
        left: Sequence[str],
    ) -> About:
        kept = read_json(found.folder / METRICS)
        if found.exported:
            step, averaged = kept.get("step"), bool(kept.get("averaged"))
            return cls(name, found, recipe, parts, adapted, left, step, averaged, _numbers(kept), {})
        checkpoint = read_checkpoint(found)
        step, averaged = checkpoint.get("global_step"), "averaging_state" in checkpoint
        metrics, later = _numbers(kept), dict[str, float]()
        if step is not None and step != kept.get("steps"):
            metrics, last = _at(found.folder / "metrics.csv", step), metrics
            later = {key: value for key, value in last.items() if metrics.get(key) != value}
        return cls(name, found, recipe, parts, adapted, left, step, averaged, metrics, later)


def write(about: About, data: Any, folder: Path, digest: str) -> None:
    """``README.md`` and ``metrics.json``; ``digest`` is SHA-256 of the weights."""
    write_json(folder / METRICS, {**about.metrics, "step": about.step, "averaged": about.averaged})
    sections = [
        f"{_what(about)}\n\n{_made(about, digest)}",
        ("Use", _use(about, folder)),
        ("Numbers", _measured(about)),
        ("Training", _training(about, data)),
        ("Licences", _kept(about, "Licences") if about.found.exported else _licences(data, folder)),
        ("Limits", _limits(about, data)),
    ]
    head, *rest = sections
    text = "\n\n".join([str(head), *(f"## {title}\n\n{body}" for title, body in rest)])
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


# sections -----------------------------------------------------------------------------------------------------------


def _what(about: About) -> str:
    towers = ", ".join(f"{name} ({_kind(tower)}, {_size(tower):,})" for name, tower in about.recipe.towers.items())
    run = "/".join(about.found.folder.resolve().parts[-2:])
    source = f"the export {about.found.folder.name}" if about.found.exported else f"run {run}"
    step = f", step {about.step:,}" if about.step is not None else ""
    average = " The weights are their moving average over training." if about.averaged else ""
    return (
        f"# {about.name}\n\n{type(about.recipe).__name__} of {_size(about.recipe):,} parameters; towers: {towers}. "
        f"Made by Descant {__version__} from {source}{step}.{average}"
    )


def _made(about: About, digest: str) -> str:
    """Which bytes these are, of which bytes they were made, and of which step their numbers are."""
    source = about.found.weights
    told = account(about.found).get("sha256")
    of = f"SHA-256 `{told}`" if told else "which no manifest confirmed"
    step = f"; step {about.step:,}, of which the numbers below are" if about.step is not None and about.metrics else ""
    return f"`{WEIGHTS}` has SHA-256 `{digest}`. It was made of `{source.parent.name}/{source.name}`, {of}{step}."


def _use(about: About, folder: Path) -> str:
    lines = ["```python", "import descant", "", f'model = descant.Embedder("{about.name}")']
    if _ready(about, "text"):
        lines.append('z_ND = model.texts(["a red apple", "the sun"])  # unit length: z @ z.T are cosines')
    if _ready(about, "image"):
        lines.append("# model.images([...]): PIL images, files or uint8 tensors")
    lines += [f'recipe = descant.load("{about.name}")  # recipe.embed(batch), recipe.towers', "```", ""]
    name = next(iter(about.recipe.towers))
    lines += [
        "A tower of it in another run:",
        "",
        f"```yaml\n{name}: {{class_path: SavedTower, init_args: {{path: {about.name}, tower: {name}}}}}\n```",
    ]
    for place in sorted(folder.glob("towers/*")):
        lines += [
            "",
            f"`towers/{place.name}` is in the form of transformers (without the pool and head that come after it):",
            "",
            "```python",
            f'transformers.AutoModel.from_pretrained("{about.name}/towers/{place.name}")',
            "```",
        ]
    return "\n".join(lines)


def _measured(about: About) -> str:
    parts = []
    if about.metrics:
        parts.append(f"Of these weights (step {about.step:,}):\n\n{_tables(about.metrics)}")
    if about.later:
        parts.append(
            "Of the run's last weights, which are not these (the run measured its test sets once, at its end):\n\n"
            + _tables(about.later)
        )
    return "\n\n".join(parts) or "The run measured nothing."


def _training(about: About, data: Any) -> str:
    folder, config = about.found.folder, about.found.config
    if about.found.exported:
        return _kept(about, "Training")
    kept, versions = read_json(folder / METRICS), read_json(folder / "versions.json")
    model, trainer = (config.get("model") or {}).get("init_args") or {}, config.get("trainer") or {}
    values = (config.get("data") or {}).get("init_args") or {}
    rows = {
        "data": _short((config.get("data") or {}).get("class_path")),
        "batch": values.get("batch_size"),
        "steps, epochs, samples": _joined(kept.get(key) for key in ("steps", "epochs", "samples")),
        "seconds": kept.get("seconds"),
        "parameters, trained": _joined(kept.get(key) for key in ("parameters", "parameters_trainable")),
        "loss": _spec(model.get("loss")),
        "optimizer": _spec(model.get("optimizer")),
        "schedule": _spec(model.get("schedule")),
        "adapters": _joined(_spec(part) for part in model.get("adapt") or []),
        "precision": trainer.get("precision"),
        "seed": config.get("seed_everything"),
        "revision": _joined([versions.get("revision"), "with uncommitted changes" if versions.get("dirty") else None]),
        "packages": _joined(f"{p} {v}" for p, v in (versions.get("packages") or {}).items() if v and p in _PACKAGES),
        "python, devices": _joined([versions.get("python"), *(versions.get("gpus") or ["CPU"])]) if versions else None,
    }
    told = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *told])


def _licences(data: Any, folder: Path) -> str:
    lines = []
    licence = getattr(data, "licence", None)
    if isinstance(licence, str):
        lines.append(f"Of the training data: {licence}.")
    if (folder / NOTICE).is_file():
        lines.append(f"The sources of the training data and their licences stand in [{NOTICE}]({NOTICE}).")
    if not lines:
        lines.append("Of the training data: not known to Descant; whoever passes the weights on has to say.")
    lines.append("Weights that training began from keep their own licence. The code of Descant is Apache-2.0.")
    return " ".join(lines)


def _limits(about: About, data: Any) -> str:
    lines = ["It knows what its training data shows, and was measured on the sets above only: nothing else was tried."]
    languages = getattr(data, "languages", None)
    if languages:
        lines.append(
            f"Its texts were of {'the language' if len(languages) == 1 else 'the languages'} {_joined(languages)}."
        )
    codec = next(iter(about.parts.get("text", [])), None)
    if isinstance(codec, Tokenizer):
        lines.append(f"Of a text it reads {codec.length} tokens; longer ones are cut.")
    size = getattr(about.parts.get("image", [None])[-1], "size", None)
    if size is not None:
        lines.append(f"Pictures are brought to {size} by {size} pixels.")
    precision = (about.found.config.get("trainer") or {}).get("precision")
    if precision not in (None, "32-true", "32", 32):
        lines.append(
            f"The run was measured in {precision}; loaded, the model computes in float32, which differs slightly."
        )
    if about.adapted:
        lines.append(
            "Adapters or quantised layers are still in it: loading needs peft or bitsandbytes (--merge folds them)."
        )
    if about.left:
        lines.append(f"How {_joined(about.left)} is prepared is not in here.")
    return "\n".join(f"- {line}" for line in lines)


def _kept(about: About, title: str) -> str:
    """A section of the card of the export that this one was made from."""
    file = about.found.folder / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0].strip() or "Not known: the card is missing."


# pieces -------------------------------------------------------------------------------------------------------------


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of sets, less those of training."""
    wanted = {k: v for k, v in values.items() if "/" in k and k.split("/")[0] not in ("train", "speed")}
    return {k: float(v) for k, v in wanted.items() if isinstance(v, int | float)}


def _at(file: Path, step: int) -> dict[str, float]:
    """What a run's CSV holds of its validation after ``step`` steps."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        # a step's row carries the number of the step that was just made, counted from 0
        rows = [row for row in csv.DictReader(lines) if row.get("step") == str(step - 1)]
    found = {key: value for row in rows for key, value in row.items() if value}
    return _numbers({key: float(value) for key, value in found.items() if "/" in key and math.isfinite(float(value))})


def _tables(metrics: Mapping[str, float]) -> str:
    tables = []
    for columns, rows in blocks(metrics):
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        tables.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(tables)


def _ready(about: About, modality: str) -> bool:
    return modality in about.recipe.towers and modality in about.parts and modality not in about.left


def _kind(module: nn.Module) -> str:
    inner = getattr(module, "tower", None)
    return f"{type(module).__name__} of {_kind(inner)}" if isinstance(inner, nn.Module) else type(module).__name__


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _short(path: object) -> str | None:
    return str(path).rpartition(".")[2] if path else None


def _spec(node: Any) -> str | None:
    """``AdamW(lr 0.003, weight_decay 0.1)``: plain values only."""
    if not isinstance(node, Mapping):
        return None
    values = {k: v for k, v in (node.get("init_args") or {}).items() if isinstance(v, int | float | list) and v != []}
    told = ", ".join(f"{key} {json.dumps(value)}" for key, value in values.items() if value is not False)
    return f"{_short(node.get('class_path'))}({told})"


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in values if v is not None)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
