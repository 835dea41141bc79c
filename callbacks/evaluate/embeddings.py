"""Base of the evaluations of embeddings, which read what ``validation_step`` and ``test_step`` return.

Letters: B rows of a batch, N of a set or bank, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, islice
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from descant.callbacks.callback_order import callbacks_of
from descant.modules.core.batch import Batch, parts
from descant.modules.core.capabilities import has, require
from descant.modules.core.protocols import Embeds
from descant.modules.evaluation.items import Items
from descant.modules.training_setup.trainer import bank_batches

#: Metrics by name: a scalar, or the values of test items whose mean it is.
Values = Mapping[str, Tensor | Items]
LETTER = {"image": "i", "text": "t", "audio": "a"}


class Rows:
    """The embeddings of an evaluation set: all ranks' rows, sorted by sample id, without padding.

    ``z[modality]`` ``[N, D]``, ``present[modality]`` bool ``[N]``, ``key`` and ``index`` int64 ``[N]``,
    ``targets[name]`` ``[N, ...]``; an embedding of several modalities (``image+sketch``) is present where all of them
    are. Not a dataclass, since torchmetrics looks into those and squeezes tensors of one element.
    """

    def __init__(
        self, z: dict[str, Tensor], present: dict[str, Tensor], key: Tensor, index: Tensor, targets: dict[str, Tensor]
    ) -> None:
        self.z, self.present, self.key, self.index, self.targets = z, present, key, index, targets

    def __len__(self) -> int:
        return len(self.key)

    def where(self, modality: str) -> Tensor:
        """Return the row numbers, ascending, where ``modality`` is present."""
        return self.present[modality].nonzero().squeeze(1)

    def labelled_rows(self, modality: str, target: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``z_ND``, ``label_N`` and ``key_N`` of the rows that have both; a label below 0 is none."""
        rows = (self.present[modality] & (self.targets[target] >= 0)).nonzero().squeeze(1)
        return self.z[modality][rows], self.targets[target][rows], self.key[rows]


class Store(Metric):
    """Collects embeddings batch by batch; ``compute()`` gathers those of all ranks into :class:`Rows`.

    >>> batch = Batch({}, {"image": torch.tensor([True, False])}, index=torch.tensor([7, 3]))
    >>> store = Store()
    >>> store.update({"image": torch.ones(2, 4)}, batch)  # the second row is padding
    >>> rows = store.compute()
    >>> rows.index.tolist(), rows.z["image"].shape
    ([7], torch.Size([1, 4]))
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.modalities: tuple[str, ...] = ()
        self.names: tuple[str, ...] = ()

    def update(self, z: Mapping[str, Tensor], batch: Batch) -> None:
        """Add the rows of a batch and their embeddings ``z[modality]`` ``[B, D]``."""
        if not self.modalities:
            self.modalities = tuple(m for m in z if set(parts(m)) <= set(batch.present))
            self.names = tuple(batch.targets)
            for state in self._states():
                self.add_state(state, default=[], dist_reduce_fx="cat")
        keep = torch.stack(list(batch.present.values())).any(0)
        values = [z[m].detach().float()[keep] for m in self.modalities]
        values += [batch.has_all(m)[keep] for m in self.modalities]
        values += [batch.targets[name][keep] for name in self.names]
        for state, value in zip(self._states(), [*values, batch.content_id[keep], batch.index[keep]], strict=True):
            getattr(self, state).append(value)

    def compute(self) -> Rows:
        values: list[Tensor] = [dim_zero_cat(getattr(self, state)) for state in self._states()]
        order = values[-1].argsort(stable=True)  # by sample id, so no result depends on the number of ranks
        *values, key, index = (value[order] for value in values)
        m = len(self.modalities)
        return Rows(
            z=dict(zip(self.modalities, values[:m], strict=True)),
            present=dict(zip(self.modalities, values[m : 2 * m], strict=True)),
            key=key,
            index=index,
            targets=dict(zip(self.names, values[2 * m :], strict=True)),
        )

    def _states(self) -> list[str]:
        # numbered, since names of modalities and targets ("image@2") need not be identifiers
        numbered = [f"{kind}_{i}" for kind in ("z", "present") for i in range(len(self.modalities))]
        return [*numbered, *(f"target_{i}" for i in range(len(self.names))), "key", "index"]


class EmbeddingEvaluator(Callback):
    """Base of the callbacks that evaluate embeddings. The first one of a trainer collects for all of them.

    A subclass implements ``evaluate``. It is called once per evaluation on every rank with all rows of each set,
    without gradients and with the recipe in eval mode. The sanity check calls it too, so that a wrong configuration
    fails before training.

    Args:
        sets: names of evaluation sets; all of them if not given.
        validate: run in the validations of a fit too, not only in ``validate`` and ``test``.
    """

    #: Protocols of the recipe, and methods or attributes of the data module, without which it cannot run.
    needs: ClassVar[tuple[type, ...]] = (Embeds,)
    needs_of_data: ClassVar[tuple[str, ...]] = ()
    #: Arguments by which a checkpoint distinguishes several callbacks of the class.
    identity: ClassVar[tuple[str, ...]] = ()

    def __init__(self, sets: list[str] | None = None, validate: bool = True) -> None:
        self.sets, self.validate = sets, validate
        self._active = False  # whether it runs in the current evaluation
        self._names: dict[str, list[str]] = {}
        self._bank_loader: Any = None
        #: Metrics of the last test that are means over test items.
        self.items: dict[str, Items] = {}
        self._forget()

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        """Compute ``{set}/{key}`` -> scalar, or the values of test items whose mean it is, from the sets by name."""
        raise NotImplementedError

    # for subclasses -----------------------------------------------------------------------------------------

    def bank(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Rows:
        """Embed the data module's bank with the current weights, once per evaluation for all evaluators."""
        lead = self._lead(trainer)
        if lead._bank is None:
            store = Store().to(pl_module.device)
            for batch in lead._bank_batches(trainer):
                store.update(embed(trainer, pl_module, batch), batch)
            lead._bank = store.compute()
        return lead._bank

    def _bank_batches(self, trainer: L.Trainer) -> Iterator[Batch]:
        run: Any = trainer
        self._bank_loader = self._bank_loader or run.datamodule.bank_dataloader()
        yield from islice(bank_batches(run, self._bank_loader), limit_of(run))

    def _lead(self, trainer: L.Trainer) -> EmbeddingEvaluator:
        return callbacks_of(trainer, EmbeddingEvaluator)[0]

    def _require(self, trainer: L.Trainer, method: str) -> None:
        """Raise ValueError if the data module lacks ``method``."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, method):
            name = type(self).__name__
            raise ValueError(f"{name} needs {method}() of the data module; {type(data).__name__} has none")

    def require_embedding(self, rows: Rows, modality: str) -> None:
        """Raise ValueError if the recipe does not embed ``modality``."""
        if modality not in rows.z:
            name = type(self).__name__
            raise ValueError(f"{name}: no embedding of {modality!r}; the recipe has {', '.join(rows.z)}")

    def require_target(self, target: str, targets: Iterable[str], where: str = "the data") -> None:
        """Raise ValueError if ``target`` is not among ``targets``."""
        known = sorted(set(targets))
        if target not in known:
            name = type(self).__name__
            raise ValueError(f"{name}: no target {target!r} in {where}; it has {', '.join(known) or 'none'}")

    # the hooks ----------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        if not self.identity:
            return super().state_key
        return self._generate_state_key(**{name: getattr(self, name) for name in self.identity})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require(self, pl_module, *self.needs)
        for method in self.needs_of_data:
            self._require(trainer, method)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._forget()
        self._names, self._bank_loader, self.items = {}, None, {}

    def _forget(self) -> None:
        """Set what an evaluation collects to nothing: at construction, and around each evaluation."""
        self._stores: dict[int, Store] = {}
        self._bank: Rows | None = None

    def _collect(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, dataloader_idx: int
    ) -> None:
        if self._lead(trainer) is not self:
            return
        if not isinstance(outputs, Mapping) or "z" not in outputs:
            step = "test_step" if trainer.testing else "validation_step"
            raise ValueError(
                f"{type(self).__name__} reads the embeddings that {step} returns as {{'z': ...}}; "
                f"{type(pl_module).__name__} returned {type(outputs).__name__}"
            )
        if dataloader_idx not in self._stores:
            self._stores[dataloader_idx] = Store().to(pl_module.device)
        self._stores[dataloader_idx].update(outputs["z"], batch)

    def _set_name(self, trainer: L.Trainer, dataloader_idx: int) -> str:
        stage = "test" if trainer.testing else "validate"
        if stage not in self._names:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self._names[stage] = list(data.evaluation_sets(stage)) if hasattr(data, "evaluation_sets") else []
        names = self._names[stage]
        return names[dataloader_idx] if names else f"{'test' if trainer.testing else 'val'}{dataloader_idx}"

    def _due(self, trainer: L.Trainer) -> bool:
        """Whether the callback runs in the evaluation that begins."""
        return self.validate or trainer.state.fn != TrainerFn.FITTING

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        lead = self._lead(trainer)
        # compute() gathers over ranks once and caches, so all evaluators get the same tensors
        sets = {lead._set_name(trainer, i): store.compute() for i, store in lead._stores.items()}
        if sets and self._active:
            self._log(trainer, pl_module, self.evaluate(trainer, pl_module, sets))

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, values: Values) -> None:
        many = trainer.world_size > 1
        for key, value in values.items():
            if isinstance(value, Items):
                self.items[key] = value
            # equal on all ranks already, up to the rounding of kernels, which the mean evens out
            pl_module.log(key, scalar(value).float(), add_dataloader_idx=False, sync_dist=many, batch_size=1)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()
        self._active, self.items = self._due(trainer), {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, pl_module, outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()  # all evaluators are done: training gets the memory back
        if not trainer.testing:  # the items of a test are written when it ends
            self.items = {}

    on_test_epoch_start, on_test_batch_end = on_validation_epoch_start, on_validation_batch_end
    on_test_epoch_end, on_test_end = on_validation_epoch_end, on_validation_end


class ScheduledEvaluator(EmbeddingEvaluator):
    """Base of the evaluations that run in every ``every``-th evaluation of a fit, from the first on.

    They also run in the evaluations of its last epoch or step, and always in ``validate`` and ``test``. The count is
    part of the checkpoint.

    Args:
        every: run in one of every ``every`` evaluations of a fit.
        sets, validate: see :class:`EmbeddingEvaluator`.
    """

    def __init__(self, sets: list[str] | None = None, every: int = 1, validate: bool = True) -> None:
        super().__init__(sets, validate)
        if every < 1:
            raise ValueError(f"{type(self).__name__}: every {every} is no number of evaluations; 1 is the least")
        self.every, self.evaluations = every, 0

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.evaluations = int(state_dict["evaluations"])

    def _due(self, trainer: L.Trainer) -> bool:
        due = super()._due(trainer)
        if not due or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return due
        self.evaluations += 1
        last_step = -1 < trainer.max_steps <= trainer.global_step
        last_epoch = trainer.max_epochs is not None and -1 < trainer.max_epochs <= trainer.current_epoch + 1
        return (self.evaluations - 1) % self.every == 0 or last_step or last_epoch


class PairEvaluator(EmbeddingEvaluator):
    """Base of the evaluations of pairs of modalities.

    Args:
        pairs: such as [[image, text]]; all pairs if not given.
    """

    def __init__(self, pairs: list[list[str]] | None = None) -> None:
        super().__init__()
        for pair in pairs or []:
            if len(pair) != 2 or pair[0] == pair[1]:
                raise ValueError(f"{type(self).__name__}: pairs: {pair} is not two modalities")
        self.pairs = [(a, b) for a, b in pairs] if pairs else None

    def _pairs(self, rows: Rows) -> list[tuple[str, str]]:
        for m in {m for pair in self.pairs or [] for m in pair}:
            self.require_embedding(rows, m)
        return self.pairs or list(combinations(rows.z, 2))


def limit_of(trainer: Any) -> int | None:
    """Return the batches to read from a loader outside the evaluation sets; None (all) but in sanity and dry runs."""
    limit: float | None = trainer.num_sanity_val_steps if trainer.sanity_checking else None
    limit = int(trainer.fast_dev_run) or limit
    return None if limit is None or limit == float("inf") else int(limit)


def scalar(value: Tensor | Items) -> Tensor:
    """Return a metric as it is logged."""
    return value.mean() if isinstance(value, Items) else value


def embed(trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor]:
    """Call the recipe's ``embed(batch)`` as in a validation step: without gradients, in the run's precision."""
    assert has(pl_module, Embeds)
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        return pl_module.embed(batch)


def letters(modalities: Mapping[str, object]) -> dict[str, str]:
    """Shorten modalities for metric names: i, t, a, else the shortest unique prefix of at least two letters.

    >>> letters(dict.fromkeys(["image", "text", "table", "video", "volume"]))
    {'image': 'i', 'text': 't', 'table': 'ta', 'video': 'vi', 'volume': 'vo'}
    """
    short = {}
    for m in modalities:
        others = [other for other in modalities if other != m and other not in LETTER]
        sizes = range(2, len(m) + 1)
        size = next((n for n in sizes if not any(o.startswith(m[:n]) for o in others)), len(m))
        short[m] = LETTER.get(m, m[:size])
    return short
