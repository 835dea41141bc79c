"""Model card of an export: what the model is, how to load it, its metrics, training, licences and limits."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from descant import __version__
from descant.callbacks.logs.report import blocks, read_json, write_json
from descant.modules.io.saved import Saved, account, read_checkpoint
from descant.modules.tokenizers.text import Tokenizer
from descant.recipes.base.recipe import Recipe
from descant.report.page import render

CARD, METRICS, NOTICE = "README.md", "metrics.json", "DATA-NOTICE.md"
_PACKAGES = ("torch", "lightning", "timm", "transformers", "peft", "bitsandbytes")


@dataclass
class About:
    """Facts that the card states about an export.

    Attributes:
        source: the run or export it is made from. name: name of its folder. recipe: the model.
        parts: modality -> its preprocessing. adapted: whether it has adapters or quantised layers.
        left: modalities whose preprocessing is not included. usage: Python that loads an export for another package.
        step: training step of the weights.
        averaged: whether the weights are an average over training. metrics: metrics of these weights.
        later: metrics of the run's last weights, if those are not the exported ones.
    """

    source: Saved
    name: str
    recipe: Recipe
    parts: Mapping[str, Sequence[Any]]
    adapted: bool
    left: Sequence[str]
    usage: str | None = None
    step: int | None = field(init=False)
    averaged: bool = field(init=False)
    metrics: dict[str, float] = field(init=False)
    later: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        run = read_json(self.source.folder / METRICS)
        self.metrics = _numbers(run)
        if self.source.exported:
            self.step, self.averaged = run.get("step"), bool(run.get("averaged"))
            return
        checkpoint = read_checkpoint(self.source)
        self.step, self.averaged = checkpoint.get("global_step"), "averaging_state" in checkpoint
        if self.step is not None and self.step != run.get("steps"):
            last, self.metrics = self.metrics, _metrics_at(self.source.folder / "metrics.csv", self.step)
            self.later = {key: value for key, value in last.items() if self.metrics.get(key) != value}


def write(about: About, data: Any, folder: Path, digests: Mapping[str, str]) -> None:
    """Write ``README.md`` and ``metrics.json``; ``digests``: file of exported weights -> its SHA-256."""
    write_json(folder / METRICS, {**about.metrics, "step": about.step, "averaged": about.averaged})
    run, towers = about.source, about.recipe.towers
    place = f"the export {run.folder.name}" if run.exported else f"run {'/'.join(run.folder.resolve().parts[-2:])}"
    text = render(
        "card.md",
        about=about,
        recipe=type(about.recipe).__name__,
        size=_size(about.recipe),
        towers=", ".join(f"{name} ({_kind(tower)}, {_size(tower):,})" for name, tower in towers.items()) or "none",
        version=__version__,
        metrics=_tables(about.metrics),
        later=_tables(about.later),
        origin=place,
        digests=digests,
        source=f"{run.weights.parent.name}/{run.weights.name}",
        source_digest=account(run).get("sha256"),
        ready=[name for name in towers if name in about.parts and name not in about.left],
        tower=next(iter(towers), None),
        folders=sorted(path.name for path in folder.glob("towers/*")),
        training=_copy_section(about, "Training") if run.exported else _training(about),
        licences=_copy_section(about, "Licences") if run.exported else _licences(data, folder),
        limits=_limits(about, data),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


# sections -----------------------------------------------------------------------------------------------------------


def _training(about: About) -> dict[str, str]:
    """Return the rows of the table: data, budget, loss, optimizer, versions; unknown values are left out."""
    folder, config = about.source.folder, about.source.config
    run, versions = read_json(folder / METRICS), read_json(folder / "versions.json")
    model, trainer = (config.get("model") or {}).get("init_args") or {}, config.get("trainer") or {}
    data = config.get("data") or {}
    packages = (versions.get("packages") or {}).items()
    rows = {
        "data": _short(data.get("class_path")),
        "batch": (data.get("init_args") or {}).get("batch_size"),
        "steps, epochs, samples": _join_values(run.get(key) for key in ("steps", "epochs", "samples")),
        "seconds": run.get("seconds"),
        "parameters, trained": _join_values(run.get(key) for key in ("parameters", "parameters_trainable")),
        "parameters that a token meets": run.get("parameters_active"),
        **{key: _spec(model.get(key)) for key in ("loss", "optimizer", "schedule")},
        "adapters": _join_values(_spec(part) for part in model.get("adapt") or []),
        "precision": trainer.get("precision"),
        "seed": config.get("seed_everything"),
        "revision": _join_values(
            [versions.get("revision"), "with uncommitted changes" if versions.get("dirty") else None]
        ),
        "packages": _join_values(f"{name} {version}" for name, version in packages if version and name in _PACKAGES),
        "python, devices": _join_values([versions.get("python"), *(versions.get("gpus") or ["CPU"])])
        if versions
        else None,
    }
    return {key: _cell(value) for key, value in rows.items() if value not in (None, "")}


def _licences(data: Any, folder: Path) -> list[str]:
    lines = []
    licence = getattr(data, "licence", None)
    if isinstance(licence, str):
        lines.append(f"Training data: {licence}.")
    if (folder / NOTICE).is_file():
        lines.append(f"Sources and licences of the training data are listed in [{NOTICE}]({NOTICE}).")
    if not lines:
        lines.append("Training data: its licence is not known to Descant; state it before passing the weights on.")
    lines.append("Weights that training started from keep their own licence. The code of Descant is Apache-2.0.")
    return lines


def _limits(about: About, data: Any) -> list[str]:
    lines = ["The model knows what its training data shows, and was evaluated on the sets above only."]
    languages = getattr(data, "languages", None)
    if languages:
        lines.append(f"Languages of its training texts: {_join_values(languages)}.")
    tokenizer = next(iter(about.parts.get("text", [])), None)
    if isinstance(tokenizer, Tokenizer):
        lines.append(f"Texts are cut after {tokenizer.length} tokens.")
    size = getattr(about.parts.get("image", [None])[-1], "size", None)
    if size is not None:
        lines.append(f"Images are resized to {size} by {size} pixels.")
    precision = (about.source.config.get("trainer") or {}).get("precision")
    if precision not in (None, "32-true", "32", 32):
        lines.append(f"It was evaluated in {precision}; a loaded model computes in float32, which differs slightly.")
    if about.adapted:
        lines.append("It has adapters or quantised layers: loading needs peft or bitsandbytes (--merge folds them).")
    if about.left:
        lines.append(f"The preprocessing of {_join_values(about.left)} is not included.")
    return lines


def _copy_section(about: About, title: str) -> str:
    """Copy a section from the card of the export that this one is made from."""
    file = about.source.folder / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0].strip() or "Not known: the card is missing."


# pieces -------------------------------------------------------------------------------------------------------------


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Select the evaluation metrics: ``set/name`` -> value."""
    metrics = {k: v for k, v in values.items() if "/" in k and k.split("/")[0] not in ("train", "speed")}
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}


def _metrics_at(file: Path, step: int) -> dict[str, float]:
    """Read the validation metrics after ``step`` steps from a run's CSV."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        # a row has the number of the step that was just made, counted from 0
        rows = [row for row in csv.DictReader(lines) if row.get("step") == str(step - 1)]
    values = {key: float(value) for row in rows for key, value in row.items() if value and "/" in key}
    return _numbers({key: value for key, value in values.items() if math.isfinite(value)})


def _tables(metrics: Mapping[str, float]) -> str:
    tables = []
    for columns, rows in blocks(metrics):
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        tables.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(tables)


def _kind(module: nn.Module) -> str:
    inner = getattr(module, "tower", None)
    return f"{type(module).__name__} of {_kind(inner)}" if isinstance(inner, nn.Module) else type(module).__name__


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _short(path: object) -> str | None:
    return str(path).rpartition(".")[2] if path else None


def _spec(node: Any) -> str | None:
    """Format a configured class as ``AdamW(lr 0.003, weight_decay 0.1)``, with its numbers and lists."""
    if not isinstance(node, Mapping):
        return None
    values = {k: v for k, v in (node.get("init_args") or {}).items() if isinstance(v, int | float | list) and v != []}
    arguments = ", ".join(f"{key} {json.dumps(value)}" for key, value in values.items() if value is not False)
    return f"{_short(node.get('class_path'))}({arguments})"


def _join_values(values: Iterable[Any]) -> str:
    return ", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in values if v is not None)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
