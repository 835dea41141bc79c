"""Differences between the configuration of a run and the one with which it is resumed or evaluated."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from descant.cli.document import load, path_to_show
from descant.cli.errors import fail, printable, say
from descant.cli.trust import within

#: Settings of hardware, logging and evaluation, which do not change training. (Damage of data changes its own digest.)
FREE = (
    *("name", *(f"data.init_args.{key}" for key in ("num_workers", "eval_batch_size", "damaged", "outside"))),
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "logger", "plugins")),
    *(f"trainer.{key}" for key in ("default_root_dir", "profiler", "log_every_n_steps", "enable_progress_bar")),
    *(f"model.init_args.shard.init_args.{key}" for key in ("reshard_after_forward", "replicate", "shard")),
    *(f"model.init_args.shard.{key}" for key in ("class_path", "init_args.accumulated", "init_args.expert_ranks")),
    *("trainer.enable_model_summary", "trainer.detect_anomaly", "trainer.limit_test_batches"),
)
#: Settings of when and where resume points are saved.
_FREE_CALLBACKS = tuple(f"Resume.{key}" for key in ("every", "keep", "folder", "minutes"))
#: With fewer differing settings, one line each; otherwise one line per part of the configuration.
_MOST = 4
#: Maximum number of settings and callbacks named in the line of a part, and of characters of a value.
_NAMED, _LETTERS = 4, 60
#: Settings of a model that only training reads.
_TRAINING = tuple(f"model.init_args.{key}" for key in ("optimizer", "schedule", "compile", "chunks"))
_CALLBACKS = "trainer.callbacks"
_PARTS = ("data", "model", "trainer")


def require_unchanged(checkpoint: Path, config: str, allowed: bool) -> None:
    """Refuse to resume with settings other than the run's own, unless ``allowed``; report them in at most five lines.

    Each line ends with the option that restores the run's own setting.
    """
    file = checkpoint.parent.parent / "config.yaml"
    if not file.is_file():
        return  # a resume point outside a run: Resume compares data, seed and recipe
    then, now = load(file).plain, yaml.safe_load(config)
    before, here = _class(then), _class(now)
    if before != here and not allowed:
        fail(f"--resume: {path_to_show(file.parent)} trains {before}, and this is {here}: --name starts a new run")
    saved, given = _without_callbacks(then), _without_callbacks(now)
    settings = list(changes(then | {"trainer": saved[0]}, now | {"trainer": given[0]}))
    callbacks = _of_callbacks(saved[1], given[1])
    restore = f"the run's own: --config {path_to_show(file)}"
    for line in _settings(settings, restore):
        say(line)
    if callbacks:
        say(f"{_CALLBACKS}: {_several(callbacks)}; {restore}")
    count = len(settings) + len(callbacks)
    if count and not allowed:
        fail(f"--resume: {count} setting(s) differ from the run's own; --changed allow continues with them")


def of_another(checkpoint: Path, source: Path | None, config: str) -> str | None:
    """Return a warning if a checkpoint is from another run or model than the one that is evaluated; else None.

    Weights of the same shapes load, whatever model they were trained in.

    Args:
        source: the run whose configuration is evaluated; None if that is another file.
        config: the configuration, as YAML.
    """
    folder = checkpoint.resolve().parent.parent
    if not (folder / "config.yaml").is_file() or (source is not None and source.resolve() == folder):
        return None
    then, now = load(folder / "config.yaml").plain, yaml.safe_load(config)
    differing = [
        f"{key.replace('.init_args', '')} {_short(before)} there, {_short(here)} here"
        for key, before, here in changes({"model": then.get("model")}, {"model": now.get("model")})
        if not key.startswith(_TRAINING)
    ]
    if source is None and not differing:
        return None
    here = f"the configuration of {path_to_show(source)}" if source is not None else "this configuration"
    differs = f": {_several(differing)}" if differing else ", which trained the same model"
    return f"the checkpoint is of {path_to_show(folder)}, and is evaluated with {here}{differs}"


def _class(config: object) -> str:
    """Return the short class name of the recipe; empty if there is none."""
    model = config.get("model") if isinstance(config, dict) else None
    return _short_class(model.get("class_path", "")) if isinstance(model, dict) else ""


def _settings(differing: Sequence[tuple[str, object, object]], restore: str) -> Iterator[str]:
    """Yield lines for settings: one per setting or, if they are many, one per part of the configuration."""
    if len(differing) <= _MOST - 1:
        for key, then, now in differing:
            plain = key.replace(".init_args", "")
            option = f"the run's own: --{plain} {_short(then)}" if _is_one_word(then) else restore
            yield f"{plain}: {_short(then)} in the run, {_short(now)} here; {option}"
        return
    parts: dict[str, list[str]] = {}
    for key, then, now in differing:
        root, _, rest = key.replace(".init_args", "").partition(".")
        part = root if root in _PARTS else "trainer"
        parts.setdefault(part, []).append(f"{rest if root in _PARTS else root} {_short(then)} -> {_short(now)}")
    for part, lines in parts.items():
        yield f"{part}: {len(lines)} differ (in the run -> here): {_several(lines)}; {restore}"


def _without_callbacks(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    given = config.get("trainer")
    trainer = dict(given) if isinstance(given, dict) else {}
    callbacks = trainer.pop("callbacks", None) or []
    return trainer, callbacks if isinstance(callbacks, list) else [callbacks]


def _of_callbacks(then: Sequence[Any], now: Sequence[Any]) -> list[str]:
    """List differences between two lists of callbacks: missing ones, then arguments, then order.

    >>> _of_callbacks([{"class_path": "a.KNN", "init_args": {"k": 1}}, "EMA"], [{"class_path": "KNN"}])
    ['without EMA here', 'KNN.k 1 -> not set']
    """
    first, second = ({k: v for k, v in _by_class(these).items() if k != "Watch"} for these in (then, now))
    lines = [f"without {name} here" for name in first if name not in second]
    lines += [f"{name} only here" for name in second if name not in first]
    for name in (name for name in first if name in second):
        args = changes({name: first[name]}, {name: second[name]})
        lines += [f"{key} {_short(old)} -> {_short(new)}" for key, old, new in args if key not in _FREE_CALLBACKS]
    return lines or (["in another order"] if list(first) != list(second) else [])


def _by_class(callbacks: Sequence[Any]) -> dict[str, Any]:
    """Return short class name -> arguments; a second callback of a class is ``NAME#2``."""
    arguments: dict[str, Any] = {}
    for item in callbacks:
        spec = item if isinstance(item, dict) else {"class_path": item}
        base = _short_class(spec.get("class_path"))
        names = (base, *(f"{base}#{number}" for number in range(2, len(callbacks) + 1)))
        arguments[next(name for name in names if name not in arguments)] = spec.get("init_args") or {}
    return arguments


def _several(parts: Sequence[str]) -> str:
    return ", ".join(parts[:_NAMED]) + (f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else "")


def _is_one_word(value: object) -> bool:
    """Whether a value can be typed as one word."""
    return isinstance(value, bool | int | float) or (
        isinstance(value, str) and shlex.quote(value) == value != "not set"
    )


def _short(value: object) -> str:
    text = printable(str(value).lower() if isinstance(value, bool) else value)
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 3]}..."


def changes(then: object, now: object) -> Iterator[tuple[str, object, object]]:
    """Yield dotted key, old value and new value of all settings that differ, except FREE ones.

    >>> list(changes({"data": {"size": 32}, "name": "a"}, {"data": {"size": 64}, "name": "b"}))
    [('data.size', 32, 64)]
    """
    a, b = dict(_flat(then)), dict(_flat(now))
    for key in dict.fromkeys([*a, *b]):
        before, here = (_short_class(flat.get(key)) if key.endswith("class_path") else flat.get(key) for flat in (a, b))
        if before != here and not within(key, FREE):
            yield key, a.get(key, "not set"), b.get(key, "not set")


def _short_class(path: object) -> str:
    """Return the class name of an import path, since classes may have moved after the run."""
    return str(path).rpartition(".")[2]


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value by its path; null counts as missing."""
    items: list[tuple[Any, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    elif value is not None:
        yield path, value
    for key, inner in items:
        yield from _flat(inner, f"{path}.{key}" if path else str(key))
