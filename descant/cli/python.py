"""``descant.fit``: train a recipe built in Python with the defaults and the run folder of ``descant fit``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from descant.callbacks.checkpoints.resume import Stopped
from descant.cli.arguments import Request
from descant.cli.errors import Refusal, hint, say
from descant.cli.main import DescantCLI, release
from descant.cli.quiet import quieten
from descant.export.loading import trusting
from descant.recipes.base.recipe import Recipe
from descant.run import elastic

_OPTIONS = tuple(inspect.signature(L.Trainer.__init__).parameters)[1:]
_HEADER = "# Trained in Python by descant.fit: descant.load(FOLDER, into=RECIPE) reads its weights\n"


class _ObjectsCLI(DescantCLI):
    """The fit command for a recipe, a data module, callbacks and trainer options that are already objects."""

    def __init__(
        self,
        request: Request,
        recipe: Recipe,
        data: L.LightningDataModule,
        callbacks: Sequence[L.Callback],
        objects: dict[str, Any],
    ) -> None:
        self.parts, self.callbacks, self.objects = {"model": recipe, "data": data}, list(callbacks), objects
        super().__init__(request)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    @property
    def name(self) -> str:
        return str(self.options.get("name") or "-".join(type(part).__name__.lower() for part in self.parts.values()))

    def _config_text(self) -> str:
        content = yaml.safe_load(super()._config_text())
        content |= {key: _describe_part(part) for key, part in self.parts.items()}
        content["trainer"]["callbacks"] += [_describe_part(callback) for callback in self.callbacks]
        content["trainer"] |= {key: _describe_part(part) for key, part in self.objects.items()}
        return _HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.model, self.datamodule = self.parts["model"], self.parts["data"]

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        config = config | self.objects
        config["callbacks"] = [*(config.get("callbacks") or []), *self.callbacks]
        return super()._instantiate_trainer(config, callbacks)


def fit(
    recipe: Recipe,
    data: L.LightningDataModule,
    callbacks: Sequence[L.Callback] = (),
    *,
    name: str | None = None,
    runs: str = "runs",
    resume: str = "never",
    changed: str = "refuse",
    seed: int = 0,
    **trainer: Any,
) -> L.Trainer:
    """Train a recipe on a data module, with the defaults of ``experiments/base.yaml``; return the Trainer.

    The run folder (``trainer.default_root_dir``) holds the same files as that of ``descant fit``: TensorBoard and CSV
    logs, checkpoints, resume points. ``config.yaml`` names only the classes; the code that built the objects is not
    recorded.

    Args:
        recipe: a recipe with its weights as built. Call ``lightning.seed_everything(0, workers=True)`` before building
            it to get those of ``descant fit``.
        callbacks: callbacks in addition to those of ``base.yaml``; one of a class that makes sense only once replaces
            the one there.
        name: name of the run; default: ``RECIPE-DATA``. runs: folder of all runs.
        resume: never, auto or a resume point, as ``--resume``. changed: allow to resume with other settings.
        seed: seed of order, augmentation and dropout.
        trainer: options of Lightning's Trainer, plain or objects, such as ``max_steps=100`` or ``logger=...``.
    """
    for label, part, kind in (("recipe", recipe, Recipe), ("data", data, L.LightningDataModule)):
        if not isinstance(part, kind):
            raise ValueError(f"fit: {label} is {repr(part)[:60]}, and an object of kind {kind.__name__} is wanted")
    for option in trainer:
        if option not in _OPTIONS:
            raise ValueError(f"fit: {option}: Trainer has no such option{hint(option, _OPTIONS, most=0)}")
    objects = {key: value for key, value in trainer.items() if not _is_plain(value)}
    settings = {"seed_everything": seed, "name": name, "runs": runs, "resume": resume, "changed": changed}
    settings |= {f"trainer.{key}": value for key, value in trainer.items() if key not in objects}
    request = Request("fit", options=[(key, _text(value)) for key, value in settings.items() if value is not None])
    quieten()
    elastic.own_store()
    cli = _ObjectsCLI.__new__(_ObjectsCLI)
    try:
        with trusting(()):
            cli.__init__(request, recipe, data, callbacks, objects)  # type: ignore[misc]  # cleared if half built
        ended = cli.ranks.join() if cli.ranks is not None else None
        if ended is not None:
            raise RuntimeError(ended.line or f"a rank ended with code {ended.code}")
    except Refusal as refusal:
        raise ValueError(str(refusal)) from None
    except Stopped as stop:
        say(f'{stop}; fit(..., resume="auto") goes on there')
    finally:
        release(cli)
    return cli.trainer


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _describe_part(part: object) -> dict[str, str] | list[dict[str, str]]:
    if isinstance(part, list | tuple):
        return [{"class_path": _path(item)} for item in part]
    return {"class_path": _path(part)}


def _path(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"
