"""Final metrics of a run: ``metrics.json`` in its folder, and a table at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from descant.callbacks.callback_order import callbacks_of
from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator
from descant.callbacks.evaluate.expert_usage import ExpertUsage
from descant.callbacks.logs.train_flops import TrainFlops
from descant.callbacks.plots.output import run_folder
from descant.modules.core.batch import count_rows
from descant.modules.core.errors import say
from descant.modules.core.metric_names import CHANCE, order
from descant.modules.core.sham import Sham
from descant.modules.evaluation.items import FILE, save_items
from descant.modules.io import files, jsonl
from descant.modules.moe.active import active_parameters, expert_layers
from descant.modules.training_setup.optim import Share

WIDTH = 100
#: Infix of a metric that is measured in another way -> suffix of its row in the table.
VARIANTS = {"distinct": "per distinct caption", CHANCE: "by chance"}


class Report(L.Callback):
    """Writes ``metrics.json``, one flat object, at every validation and at the end of fit and test; prints a table.

    It holds the newest value of every logged metric under its own name (null if not finite), and values of the run:

    * ``steps``, ``epochs``: optimizer steps and finished epochs.
    * ``seconds``: wall time of the fit; ``train_seconds``: without evaluation and setup.
    * ``samples``: training rows of all ranks; ``samples_per_second = samples / train_seconds``.
    * ``train_flops``, ``active_flops``: from the callback TrainFlops, if the run has it.
    * ``parameters``, ``parameters_trainable``: of the recipe, shared weights counted once.
    * ``parameters_active``: parameters that a token uses, in a model with sparse experts. If their number depends on
      the token, it is the average that ExpertUsage measured in the last evaluation.
    * ``sham/calls``: signals requested per step from parts that have a sham, equal for the method and the sham.

    With several optimizers (OptimizerGroup), ``optimizers.json`` lists the tensors of each, and a line at the start
    reports their number.

    A test also writes ``items.safetensors``, by which claims are judged. It has the sum and the weight of every test
    item for each metric that is a mean over items (:mod:`descant.modules.evaluation.items`).

    A resumed run continues its seconds and samples. A test adds its metrics to the file of the fit. Rank 0 replaces the
    file atomically, in the folder of the first logger that has one, else in the Trainer's ``default_root_dir``.

    The table at the end of a command has the metrics of that command: one row per set, one column per metric.
    """

    once = True

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}
        self._shown: dict[str, float] = {}
        self._samples = 0
        self._seconds = self._train_seconds = 0.0  # of finished parts of the run
        self._fit_began: float | None = None
        self._train_began: float | None = None
        self._folder = Path()
        self._shams: list[Sham] = []
        self._fitted: tuple[L.Trainer, L.LightningModule] | None = None
        self._data_shams: list[Sham] = []
        self._calls = self._counted = 0  # in earlier parts of the run; the shams' count when this part began
        self._done = 0  # calls of the data's shams when the last batch ended: the next batch is loaded before it starts

    def state_dict(self) -> dict[str, Any]:
        seconds = {"seconds": self.seconds, "train_seconds": self.train_seconds}
        return {"samples": self._samples, "calls": self.calls - self._ahead, **seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._samples, self._calls = int(state_dict["samples"]), int(state_dict.get("calls", 0))
        self._shams, self._counted, self._fitted = [], 0, None  # later counts are undone
        self._seconds, self._train_seconds = float(state_dict["seconds"]), float(state_dict["train_seconds"])

    @property
    def seconds(self) -> float:
        return self._seconds + (time.monotonic() - self._fit_began if self._fit_began is not None else 0.0)

    @property
    def train_seconds(self) -> float:
        running = time.monotonic() - self._train_began if self._train_began is not None else 0.0
        return self._train_seconds + running

    @property
    def calls(self) -> int:
        """Number of requests for the signals of shams; a stage may have added shams."""
        if self._fitted is not None:
            self._shams += [sham for sham in shams(*self._fitted) if not any(sham is known for known in self._shams)]
        return self._calls + sum(sham.calls for sham in self._shams) - self._counted

    @property
    def _ahead(self) -> int:
        """Calls for a batch that has not started, which a resumed run repeats."""
        return sum(sham.calls for sham in self._data_shams) - self._done

    def _count_shams(self) -> None:
        self._done = sum(sham.calls for sham in self._data_shams)

    def _pause(self) -> None:
        self._train_seconds, self._train_began = self.train_seconds, None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fit_began = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._train_began = time.monotonic()
        self._calls, self._shams = self.calls, list(shams(trainer, pl_module))
        self._fitted = trainer, pl_module
        self._data_shams = list(getattr(trainer.datamodule, "shams", ()))  # type: ignore[attr-defined]
        if (shares := _shares(trainer)) and trainer.is_global_zero:
            say(f"optimizers: {'; '.join(map(str, shares))}")
        self._counted = sum(sham.calls for sham in self._shams)
        self._count_shams()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += count_rows(batch) * trainer.world_size
        self._count_shams()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._count_shams()
        self._write(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self._train_began = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds, self._fit_began = self.seconds, None
        self._write(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)
        evaluators = callbacks_of(trainer, EmbeddingEvaluator)
        items = {metric: of for evaluator in evaluators for metric, of in evaluator.items.items()}
        if items and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_items(self._folder / FILE, items)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._pause()
        self._seconds, self._fit_began = self.seconds, None

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # on every rank: an epoch's metrics are reduced over ranks when they are first read
        metrics = trainer.callback_metrics
        if not trainer.is_global_zero:
            return
        values = {name: float(value) for name, value in metrics.items() if _is_number(value)}
        if trainer.state.fn == TrainerFn.FITTING:
            values |= self._run(trainer, pl_module)
        self.values.update(values)
        self._folder = run_folder(trainer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self._folder / "metrics.json"
        write_json(path, read_json(path) | self.values)
        shares = _shares(trainer) if trainer.state.fn == TrainerFn.FITTING else []
        if shares:
            tensors = [{"class": share.optimizer, "tensors": share.sizes} for share in shares]
            files.write_json(self._folder / "optimizers.json", {"optimizers": tensors})

    def _run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        parameters = list(pl_module.parameters())
        seconds = self.train_seconds
        requested = self.calls
        calls = {"sham/calls": requested / trainer.global_step} if self._shams and trainer.global_step else {}
        flops = [callback.metrics(trainer.global_step) for callback in callbacks_of(trainer, TrainFlops)]
        experts = {}
        if expert_layers(pl_module):
            usages = callbacks_of(trainer, ExpertUsage)
            active = active_parameters(pl_module, usages[-1].active if usages else None)
            experts = {} if active is None else {"parameters_active": round(active)}
        return {
            **experts,
            **calls,
            **(flops[-1] if flops else {}),
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "seconds": round(self.seconds, 3),
            "train_seconds": round(seconds, 3),
            "samples": self._samples,
            "samples_per_second": round(self._samples / seconds, 3) if seconds > 0 else 0.0,
            "parameters": sum(p.numel() for p in parameters),
            "parameters_trainable": sum(p.numel() for p in parameters if p.requires_grad),
        }

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage in ("fit", "validate", "test"):
            self.show()

    def show(self) -> None:
        """Print the metrics that are new since the last table, if any."""
        new = {name: value for name, value in self.values.items() if self._shown.get(name) != value}
        if not new:
            return
        self._shown = dict(self.values)
        print(self.table(new), flush=True)

    def table(self, values: Mapping[str, float] | None = None) -> str:
        """Format the table as plain text of at most 100 columns, then a line of steps, time, speed and run folder."""
        values = self.values if values is None else values
        lines = []
        for columns, rows in blocks(values):
            widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
            for row in (columns, *rows):
                cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
                lines.append("  ".join(cells).rstrip())
            lines.append("")
        return "\n".join([*lines, self.summary(values)])

    def summary(self, values: Mapping[str, float] | None = None) -> str:
        """Write one line: steps, seconds, samples per second (of a fit), parameters with experts, the run folder."""
        values = self.values if values is None else values
        parts = []
        if "steps" in values:
            parts = [
                f"{values['steps']:,.0f} steps",
                f"{values.get('seconds', math.nan):,.1f} s",
                f"{values.get('samples_per_second', math.nan):,.0f} samples/s",
            ]
        if "parameters_active" in values:
            every, active = (f"{values[f'parameters{x}'] / 1e6:,.3g} M" for x in ("", "_active"))
            parts.append(f"{every} parameters, {active} active a token")
        return "  ".join([*parts, str(self._folder)])


def _shares(trainer: L.Trainer) -> list[Share]:
    """List the share of parameters of each optimizer if there are several; empty for a single one."""
    return [share for optimizer in trainer.optimizers for share in getattr(optimizer, "shares", [])]


def shams(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[Sham]:
    """Yield every sham (control) of recipe, data and callbacks."""
    yield from (part for part in pl_module.modules() if isinstance(part, Sham))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield from (part for part in vars(callback).values() if isinstance(part, Sham))
    yield from getattr(trainer.datamodule, "shams", ())  # type: ignore[attr-defined]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if it has none. Raises OSError if it cannot be read, such as a pipe."""
    try:
        with files.open_regular(path) as stream:
            content = jsonl.loads(stream.read())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically; non-finite numbers become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in sorted(values.items())}
    files.write_json(path, clean)


def blocks(values: Mapping[str, float], width: int = WIDTH) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Arrange metrics ``set/metric`` in tables with one row per set; sets that share a metric are in one table.

    Speed, counts of the run and single layers of experts are left out. Training comes last. A table wider than
    ``width`` continues below.

    >>> for columns, rows in blocks({"vendor/r1": 0.25, "concept/r1": 0.5, "train/loss": 2.0}):
    ...     print(columns, rows)
    ['', 'r1'] [['vendor', '0.25'], ['concept', '0.5']]
    ['', 'loss'] [['train', '2']]
    """
    sets: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        name, slash, metric = key.partition("/")
        variant = next((word for word in VARIANTS if metric.startswith(f"{word}/")), None)
        if variant is not None:  # a row of its own, below that of its set
            name, metric = f"{name}, {VARIANTS[variant]}", metric.removeprefix(f"{variant}/")
        of_layer = metric.startswith("experts/") and metric.count("/") > 1
        if slash and name not in ("speed", "sham") and not of_layer:
            sets.setdefault(name, {})[metric] = value
    for names in _group_sets(sets):
        metrics = _sort_metrics(list(dict.fromkeys(m for name in names for m in sets[name])))
        cells = {m: [_number(sets[name].get(m)) for name in names] for m in metrics}
        first = max(map(len, names))
        columns: list[str] = []
        used = first
        for metric in metrics:
            wide = 2 + max(len(metric), *map(len, cells[metric]))
            if columns and used + wide > width:
                yield ["", *columns], _rows(names, columns, cells)
                columns, used = [], first
            columns.append(metric)
            used += wide
        yield ["", *columns], _rows(names, columns, cells)


def _sort_metrics(metrics: list[str]) -> list[str]:
    """Sort recall before ranks, each direction at its first metric's place; all other metrics stay in place.

    >>> _sort_metrics(["loss", "i2t_medr", "i2t_r10", "i2t_r5", "gap"])
    ['loss', 'i2t_r5', 'i2t_r10', 'i2t_medr', 'gap']
    """
    first: dict[str, int] = {}
    for n, metric in enumerate(metrics):
        first.setdefault(order(metric)[1], n)
    return sorted(metrics, key=lambda metric: (first[order(metric)[1]], order(metric)))


def _rows(names: list[str], columns: list[str], cells: Mapping[str, list[str]]) -> list[list[str]]:
    """Return the rows of a block without empty ones, such as the row of chance if the block only has a gap."""
    rows = [[name, *(cells[m][k] for m in columns)] for k, name in enumerate(names)]
    return [row for row in rows if {*row[1:]} != {"-"}]


def _group_sets(sets: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Group the sets; any two that share a metric are in one group."""
    groups: list[tuple[list[str], set[str]]] = []
    for name, metrics in sets.items():
        names, union = [name], set(metrics)
        for group in [g for g in groups if g[1] & union]:
            groups.remove(group)
            names, union = [*group[0], *names], union | group[1]
        groups.append((names, union))
    # evaluation first
    return sorted((names for names, _ in groups), key=lambda names: "train" in names)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)
