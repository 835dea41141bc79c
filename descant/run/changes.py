"""What differs between the configuration of a run and the one that it is to be resumed with."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from descant.cli.document import load, shown
from descant.cli.errors import fail, printable, say

#: Where a run is made and how it is watched: none of these changes what is learned. (What damaged data has lost is told
#: by the digests of the data itself.)
FREE = (
    *("name", *(f"data.init_args.{key}" for key in ("num_workers", "eval_batch_size", "damaged", "outside"))),
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "logger", "plugins")),
    *(f"trainer.{key}" for key in ("default_root_dir", "profiler", "log_every_n_steps", "enable_progress_bar")),
    *("trainer.enable_model_summary", "trainer.detect_anomaly", "trainer.limit_test_batches"),
)
#: And when and where resume points are saved.
_FREE_CALLBACKS = tuple(f"Resume.{key}" for key in ("every", "keep", "folder", "minutes"))
#: Settings that are told one a line; of more, a line a part.
_MOST = 4
#: Settings and callbacks that are named in the line of a part, and letters of a value.
_NAMED, _LETTERS = 4, 60
#: Of a model, what only its training asks about.
_TRAINING = (
    "model.init_args.optimizer",
    "model.init_args.schedule",
    "model.init_args.compile",
    "model.init_args.chunks",
)
_CALLBACKS = "trainer.callbacks"
_PARTS = ("data", "model", "trainer")


def require_unchanged(checkpoint: Path, config: str, allowed: bool) -> None:
    """Refuse a resume with other settings than the run's own, unless that is ``allowed``; told in five lines at most.

    Each line ends with the words that bring the run's own settings back.

    Raises:
        Refusal: for the first time that a setting differs and nobody said that it may.
    """
    file = checkpoint.parent.parent / "config.yaml"
    if not file.is_file():
        return  # a resume point by itself: it tells of data, seed and recipe
    then, now = load(file).plain, yaml.safe_load(config)
    before, here = _class(then), _class(now)
    if before != here and not allowed:
        fail(f"--resume: {shown(file.parent)} trains {before}, and this is {here}: --name gives it a run of its own")
    ours, theirs = _without_callbacks(then), _without_callbacks(now)
    found = list(changes(then | {"trainer": ours[0]}, now | {"trainer": theirs[0]}))
    of_callbacks = _of_callbacks(ours[1], theirs[1])
    own = f"the run's own: --config {shown(file)}"
    for line in _settings(found, own):
        say(line)
    if of_callbacks:
        say(f"{_CALLBACKS}: {_several(of_callbacks)}; {own}")
    count = len(found) + len(of_callbacks)
    if count and not allowed:
        fail(f"--resume: {count} setting(s) differ from the run's own; --changed allow goes on with them")


def of_another(checkpoint: Path, source: Path | None, config: str) -> str | None:
    """What to say where a checkpoint is not of the run, or not of the model, that is evaluated; None where it is.

    Weights of the same shapes load whatever they were trained as, and the numbers look like those of the run.

    Args:
        source: the run whose configuration is evaluated; None where that is another file.
        config: the configuration, as YAML.
    """
    own = checkpoint.resolve().parent.parent
    if not (own / "config.yaml").is_file() or (source is not None and source.resolve() == own):
        return None
    then, now = load(own / "config.yaml").plain, yaml.safe_load(config)
    found = [
        f"{key.replace('.init_args', '')} {_short(before)} there, {_short(here)} here"
        for key, before, here in changes({"model": then.get("model")}, {"model": now.get("model")})
        if not key.startswith(_TRAINING)
    ]
    if source is None and not found:
        return None
    here = f"the configuration of {shown(source)}" if source is not None else "this configuration"
    differs = f": {_several(found)}" if found else ", which trained the same model"
    return f"the checkpoint is of {shown(own)}, and is evaluated under {here}{differs}"


def _class(config: object) -> str:
    """The short name of the recipe; nothing where there is none."""
    model = config.get("model") if isinstance(config, dict) else None
    return str(model.get("class_path", "")).rpartition(".")[2] if isinstance(model, dict) else ""


def _settings(found: Sequence[tuple[str, object, object]], own: str) -> Iterator[str]:
    """Lines for settings: one a line, or one a part of the configuration where they are many."""
    if len(found) <= _MOST - 1:
        for key, then, now in found:
            plain = key.replace(".init_args", "")
            own_value = f"; the run's own: --{plain} {_short(then)}" if _typed(then) else f"; {own}"
            yield f"{plain}: {_short(then)} in the run, {_short(now)} here{own_value}"
        return
    parts: dict[str, list[str]] = {}
    for key, then, now in found:
        root, _, rest = key.replace(".init_args", "").partition(".")
        part = root if root in _PARTS else "trainer"
        parts.setdefault(part, []).append(f"{rest if root in _PARTS else root} {_short(then)} -> {_short(now)}")
    for part, told in parts.items():
        yield f"{part}: {len(told)} differ (in the run -> here): {_several(told)}; {own}"


def _without_callbacks(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    given = config.get("trainer")
    trainer = dict(given) if isinstance(given, dict) else {}
    found = trainer.pop("callbacks", None) or []
    return trainer, found if isinstance(found, list) else [found]


def _of_callbacks(then: Sequence[Any], now: Sequence[Any]) -> list[str]:
    """What differs in a list of callbacks, whatever their places: which are not in both, then arguments, then order.

    >>> _of_callbacks([{"class_path": "a.KNN", "init_args": {"k": 1}}, "EMA"], [{"class_path": "KNN"}])
    ['without EMA here', 'KNN.k 1 -> not set']
    """
    first, second = _by_class(then), _by_class(now)
    found = [f"without {name} here" for name in first if name not in second]
    found += [f"{name} only here" for name in second if name not in first]
    for name in (name for name in first if name in second):
        args = changes({name: first[name]}, {name: second[name]})
        found += [f"{key} {_short(old)} -> {_short(new)}" for key, old, new in args if key not in _FREE_CALLBACKS]
    if not found and list(first) != list(second):
        found = ["in another order"]
    return found


def _by_class(callbacks: Sequence[Any]) -> dict[str, Any]:
    """Short class name -> arguments; a second one of a class is ``NAME#2``."""
    found: dict[str, Any] = {}
    for item in callbacks:
        spec = item if isinstance(item, dict) else {"class_path": item}
        name = base = str(spec.get("class_path")).rpartition(".")[2]
        count = 1
        while name in found:
            count += 1
            name = f"{base}#{count}"
        found[name] = spec.get("init_args") or {}
    return found


def _several(told: Sequence[str]) -> str:
    return ", ".join(told[:_NAMED]) + (f" and {len(told) - _NAMED} more" if len(told) > _NAMED else "")


def _typed(value: object) -> bool:
    """Whether a value can be typed as one word."""
    return isinstance(value, bool | int | float) or (
        isinstance(value, str) and shlex.quote(value) == value != "not set"
    )


def _short(value: object) -> str:
    text = printable(str(value).lower() if isinstance(value, bool) else value)
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 3]}..."


def changes(then: object, now: object) -> Iterator[tuple[str, object, object]]:
    """Dotted key, value before and value now, of all that differs and matters.

    >>> list(changes({"data": {"size": 32}, "name": "a"}, {"data": {"size": 64}, "name": "b"}))
    [('data.size', 32, 64)]
    """
    a, b = dict(_flat(then)), dict(_flat(now))
    for key in dict.fromkeys([*a, *b]):
        before, here = (_short_class(flat.get(key)) if key.endswith("class_path") else flat.get(key) for flat in (a, b))
        if before != here and not any(key == free or key.startswith(f"{free}.") for free in FREE):
            yield key, a.get(key, "not set"), b.get(key, "not set")


def _short_class(path: object) -> str:
    """The class name of an import path: classes may have moved since the run."""
    return str(path).rpartition(".")[2]


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every value by its path; what is null is as good as not there."""
    items: list[tuple[Any, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    elif value is not None:
        yield path, value
    for key, inner in items:
        yield from _flat(inner, f"{path}.{key}" if path else str(key))
