"""Judges of embeddings: they read what ``validation_step`` and ``test_step`` return, and embed nothing again.

Letters: B rows of a batch, N of a set or bank, Q queries, D width, C classes, P prompts a class, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.utilities import dim_zero_cat

from descant.modules.core.batch import Batch, parts
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import Embeds
from descant.modules.engine.trainer import bank_batches
from descant.modules.evaluation.metrics import (
    alignment,
    balanced_accuracy,
    effective_rank,
    fit_logistic,
    knn_scores,
    matched_rows,
    mean_per_group,
    modality_gap,
    recall_by_chance,
    retrieval_ranks,
    uniformity,
    wide,
)

LETTER = {"image": "i", "text": "t", "audio": "a"}
ROWS = 512  # prompts embedded at once


class Rows:
    """An evaluation set as embedded: all ranks' rows by sample id, without padding.

    ``z[modality]`` ``[N, D]``, ``present[modality]`` bool ``[N]``, ``key`` and ``index`` int64 ``[N]``,
    ``targets[name]`` ``[N, ...]``; an embedding of several modalities (``image+sketch``) is
    present where all of them are. A plain class on purpose: torchmetrics looks into dataclasses and squeezes tensors
    of one element.
    """

    def __init__(
        self,
        z: dict[str, Tensor],
        present: dict[str, Tensor],
        key: Tensor,
        index: Tensor,
        targets: dict[str, Tensor],
    ) -> None:
        self.z, self.present, self.key, self.index, self.targets = z, present, key, index, targets

    def __len__(self) -> int:
        return len(self.key)

    def where(self, modality: str) -> Tensor:
        """Row numbers, ascending, where ``modality`` is present."""
        return self.present[modality].nonzero().squeeze(1)

    def labelled(self, modality: str, target: str) -> tuple[Tensor, Tensor]:
        """``z_ND`` and ``label_N`` of the rows that have both; a label below 0 is no label."""
        rows = (self.present[modality] & (self.targets[target] >= 0)).nonzero().squeeze(1)
        return self.z[modality][rows], self.targets[target][rows]


class Store(Metric):
    """Collects embeddings batch by batch; ``compute()`` gathers all ranks' into :class:`Rows`.

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
        """Rows of one batch: ``z[modality]`` ``[B, D]`` and the batch that they come from."""
        if not self.modalities:
            self.modalities = tuple(m for m in z if set(parts(m)) <= set(batch.present))
            self.names = tuple(batch.targets)
            for state in self._states():
                self.add_state(state, default=[], dist_reduce_fx="cat")
        keep = torch.stack(list(batch.present.values())).any(0)
        values = [z[m].detach().float()[keep] for m in self.modalities]
        values += [batch.there(m)[keep] for m in self.modalities]
        values += [batch.targets[name][keep] for name in self.names]
        for state, value in zip(self._states(), [*values, batch.key[keep], batch.index[keep]], strict=True):
            getattr(self, state).append(value)

    def compute(self) -> Rows:
        values: list[Tensor] = [dim_zero_cat(getattr(self, state)) for state in self._states()]
        order = values[-1].argsort(stable=True)  # by sample id: nothing downstream sees how many ranks there were
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
        numbered = [f"z_{i}" for i in range(len(self.modalities))]
        numbered += [f"present_{i}" for i in range(len(self.modalities))]
        numbered += [f"target_{i}" for i in range(len(self.names))]
        return [*numbered, "key", "index"]


class Judge(Callback):
    """Base of the callbacks that judge embeddings. The first judge of a trainer collects for all of them.

    A subclass implements ``judge``, called once an evaluation, on every rank, with the whole of each set,
    without gradients and with the recipe in eval mode; in the sanity check as well, so that a wrong
    configuration fails before training.

    Raises:
        ValueError: at setup, if the recipe lacks the protocol Embeds.
    """

    def __init__(self) -> None:
        self._stores: dict[int, Store] = {}
        self._names: dict[str, list[str]] = {}
        self._bank: Rows | None = None
        self._bank_loader: Any = None

    def judge(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        """``{set}/{key}`` -> scalar, for the sets by name."""
        raise NotImplementedError

    # what subclasses may ask ------------------------------------------------------------------------------

    def bank(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Rows:
        """The data module's bank, embedded with the present weights: once an evaluation, for all judges."""
        lead = self._lead(trainer)
        if lead._bank is None:
            store = Store().to(pl_module.device)
            for batch in lead._bank_batches(trainer):
                store.update(embed(trainer, pl_module, batch), batch)
            lead._bank = store.compute()
        return lead._bank

    def _bank_batches(self, trainer: L.Trainer) -> Iterator[Batch]:
        run, data = _any(trainer), _data(trainer)
        limit: float | None = trainer.num_sanity_val_steps if trainer.sanity_checking else None
        limit = int(run.fast_dev_run) or limit
        limit = None if limit is None or limit == float("inf") else int(limit)
        self._bank_loader = self._bank_loader or data.bank_dataloader()
        yield from islice(bank_batches(run, self._bank_loader), limit)

    def _lead(self, trainer: L.Trainer) -> Judge:
        return next(c for c in _any(trainer).callbacks if isinstance(c, Judge))

    def _require(self, trainer: L.Trainer, method: str) -> None:
        data = _data(trainer)
        if not hasattr(data, method):
            raise ValueError(f"{type(self).__name__} needs {method}() of the data module; {_name(data)} has none")

    # the hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not has(pl_module, Embeds):
            raise ValueError(
                f"{type(self).__name__} needs the protocol Embeds (embed(batch)); {_name(pl_module)} lacks it"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._forget()
        self._names, self._bank_loader = {}, None

    def _forget(self) -> None:
        self._stores, self._bank = {}, None

    def _collect(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        dataloader_idx: int,
    ) -> None:
        if self._lead(trainer) is not self:
            return
        if not isinstance(outputs, Mapping) or "z" not in outputs:
            step = "test_step" if trainer.testing else "validation_step"
            raise ValueError(
                f"{type(self).__name__} reads the embeddings that {step} returns as {{'z': ...}}; "
                f"{_name(pl_module)} returned {type(outputs).__name__}"
            )
        if dataloader_idx not in self._stores:
            self._stores[dataloader_idx] = Store().to(pl_module.device)
        self._stores[dataloader_idx].update(outputs["z"], batch)

    def _set_name(self, trainer: L.Trainer, dataloader_idx: int) -> str:
        stage = "test" if trainer.testing else "validate"
        if stage not in self._names:
            data = _data(trainer)
            self._names[stage] = list(data.evaluation_sets(stage)) if hasattr(data, "evaluation_sets") else []
        names = self._names[stage]
        return names[dataloader_idx] if names else f"{'test' if trainer.testing else 'val'}{dataloader_idx}"

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        lead = self._lead(trainer)
        # compute() gathers over ranks once and remembers, so every further judge gets the same tensors
        sets = {lead._set_name(trainer, i): store.compute() for i, store in lead._stores.items()}
        if not sets:
            return
        for key, value in self.judge(trainer, pl_module, sets).items():
            # equal on all ranks already; the mean only irons out what kernels round differently
            many = trainer.world_size > 1
            pl_module.log(key, value.float(), add_dataloader_idx=False, sync_dist=many, batch_size=1)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()

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

    def on_test_batch_end(
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

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()  # every judge has judged: training gets the memory back

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()


class Retrieval(Judge):
    """Cross-modal retrieval: recall at k and the median rank, both ways, on each evaluation set.

        hit@k_q = [fewer than k wrong gallery rows score as high as the best right one]

    The gallery is all rows with the second modality, a query a row with the first for which it holds a right
    row (equal key); the score is the dot product; ties and nan count as misses. Keys: ``{set}/i2t_r1``,
    ``{set}/t2i_r10``, ``{set}/i2t_medr`` (1 is best).

    Where some rows share a key (captions that say the same) and others do not, it is easier to be right about these:
    ``{set}/distinct/i2t_r1`` is the mean over distinct keys of the mean of their queries. ``{set}/chance/i2t_r1`` is
    what a random order of the gallery comes to, whatever shares a key.

    Args:
        pairs: which modalities meet, such as [[image, text]]; all of them where not given.
        at: the k of recall at k.

    Raises:
        ValueError: a pair that is not two modalities, a k below 1; at evaluation, an unknown modality.

    >>> Retrieval(pairs=[["image", "image"]])
    Traceback (most recent call last):
    ValueError: Retrieval: pairs: ['image', 'image'] is not two modalities
    """

    def __init__(self, pairs: list[list[str]] | None = None, at: list[int] | None = None) -> None:
        super().__init__()
        self.pairs, self.at = _checked(self, pairs), at or [1, 5, 10]
        if min(self.at) < 1:
            raise ValueError(f"Retrieval: at: {min(self.at)} is no number of gallery rows; 1 is the least")

    def judge(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, rows in sets.items():
            letter = letters(rows.z)
            for pair in _pairs(self, self.pairs, rows):
                for a, b in (pair, pair[::-1]):
                    for key, value in self.score(rows, a, b).items():
                        kind, _, metric = key.rpartition("/")
                        where = f"{name}/{kind}" if kind else name
                        values[f"{where}/{letter[a]}2{letter[b]}_{metric}"] = value
        return values

    def score(self, rows: Rows, a: str, b: str) -> dict[str, Tensor]:
        """The numbers of one direction; none where no query has a right row."""
        query, gallery = rows.where(a), rows.where(b)
        key_Q, key_G = rows.key[query], rows.key[gallery]
        rank_Q = retrieval_ranks(rows.z[a][query], key_Q, rows.z[b][gallery], key_G)
        key_Q, rank_Q = key_Q[rank_Q >= 0], rank_Q[rank_Q >= 0]
        if len(rank_Q) == 0:
            return {}
        # rank G is the miss of nan, whatever k is
        hit = {f"r{k}": (rank_Q < min(k, len(gallery))).double() for k in self.at}
        values = {name: hit_Q.mean() for name, hit_Q in hit.items()}
        values["medr"] = rank_Q.double().quantile(0.5) + 1
        known_K, right_K = key_G.unique(return_counts=True)
        right_Q = right_K[torch.searchsorted(known_K, key_Q)]
        asked_K = key_Q.unique(return_counts=True)[1]
        if asked_K.min() < asked_K.max():
            values |= {f"distinct/{name}": mean_per_group(hit_Q, key_Q) for name, hit_Q in hit.items()}
        return values | {f"chance/r{k}": recall_by_chance(right_Q, len(gallery), k).mean() for k in self.at}


class ZeroShot(Judge):
    """Zero-shot classification: a class is the mean embedding of its prompts.

        w_c = normalise(mean over p of z_text(prompt_cp)),   prediction = argmax over c of z . w_c

    The data module's ``prompts(target)`` gives the prompts, embedded once an evaluation. Keys:
    ``{set}/zeroshot_{target}_top1``, ``_top5`` (with more than five classes) and ``_balanced``, the mean
    recall of the classes that occur.

    Args:
        target: which of the data's targets holds the class.
        modality: what is classified.
        prompts: the modality of the prompts.

    Raises:
        ValueError: at setup, if the data module has no prompts for it; at evaluation, an unknown modality.

    >>> ZeroShot("group").target
    'group'
    """

    def __init__(self, target: str, modality: str = "image", prompts: str = "text") -> None:
        super().__init__()
        self.target, self.modality, self.prompts = target, modality, prompts

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._require(trainer, "prompts")
        self._ids_CPT: Tensor = _data(trainer).prompts(self.target)[0]

    def classifier(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        """``w_CD``: one unit-length row a class."""
        ids_CPT = self._ids_CPT.to(pl_module.device)
        embedded = []
        for ids_BT in ids_CPT.flatten(0, 1).split(ROWS):
            present = {self.prompts: torch.ones(len(ids_BT), dtype=torch.bool, device=ids_BT.device)}
            batch = Batch(inputs={self.prompts: ids_BT}, present=present)
            embedded.append(embed(trainer, pl_module, batch)[self.prompts].float())
        z_CPD = torch.cat(embedded).reshape(*ids_CPT.shape[:2], -1)
        return F.normalize(z_CPD.mean(1), dim=-1)

    def judge(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        w_CD = self.classifier(trainer, pl_module)
        for name, (z_ND, label_N) in _labelled(self, sets, self.modality, self.target).items():
            for key, value in _accuracies(z_ND @ w_CD.T, label_N).items():
                values[f"{name}/{_key('zeroshot', self.target, self.modality)}_{key}"] = value
        return values


class Banked(Judge):
    """Base of the judges that are fitted on the data module's bank: training samples as evaluation sees them.

    Takes part in every ``every``-th evaluation of a fit, from the first on, in those of its last epoch or
    step, and in ``validate`` and ``test`` always. The count is part of the checkpoint.
    """

    def __init__(self, target: str, modality: str, every: int) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"{type(self).__name__}: every {every} is no number of evaluations; 1 is the least")
        self.target, self.modality, self.every = target, modality, every
        self.evaluations = 0

    @property
    def state_key(self) -> str:
        return self._generate_state_key(target=self.target, modality=self.modality)

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.evaluations = int(state_dict["evaluations"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._require(trainer, "bank_dataloader")

    def _due(self, trainer: L.Trainer) -> bool:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return True
        self.evaluations += 1
        last_step = -1 < trainer.max_steps <= trainer.global_step
        last_epoch = trainer.max_epochs is not None and -1 < trainer.max_epochs <= trainer.current_epoch + 1
        return (self.evaluations - 1) % self.every == 0 or last_step or last_epoch

    def judge(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        labelled = _labelled(self, sets, self.modality, self.target)
        if not self._due(trainer):
            return {}
        bank = self.bank(trainer, pl_module)
        z_bank_ND, label_N = _labelled(self, {"bank": bank}, self.modality, self.target)["bank"]
        if len(label_N) == 0:
            return {}
        classes = int(max(label.max() for _, label in [(z_bank_ND, label_N), *labelled.values()])) + 1
        return {
            f"{name}/{key}_top1": value
            for name, value in self.score(z_bank_ND, label_N, labelled, classes).items()
            for key in [_key(type(self).kind, self.target, self.modality)]
        }

    kind: str

    def score(
        self, z_ND: Tensor, label_N: Tensor, sets: dict[str, tuple[Tensor, Tensor]], classes: int
    ) -> dict[str, Tensor]:
        """Accuracy by set, from the bank's ``z_ND`` and ``label_N``."""
        raise NotImplementedError


class KNN(Banked):
    """Weighted k-nearest-neighbour accuracy of embeddings against the bank (the protocol of DINO).

        prediction = argmax over c of  sum over the k nearest n with label_n = c of exp(z . z_n / temperature)

    Key: ``{set}/knn_{target}_top1``, with ``_{modality}`` after the target where that is not image.

    Args:
        target: which of the data's targets holds the class.
        k: neighbours that vote.
        temperature: of their weights.
        modality: whose embeddings are classified.
        every: evaluations from one to the next that it takes part in.

    Raises:
        ValueError: k or every below 1, a temperature that is not positive; at setup, a data module without a
            bank; at evaluation, an unknown target or modality.

    >>> KNN("group", k=0)
    Traceback (most recent call last):
    ValueError: KNN: k 0 is no number of neighbours; 1 is the least
    """

    kind = "knn"

    def __init__(
        self, target: str, k: int = 20, temperature: float = 0.07, modality: str = "image", every: int = 1
    ) -> None:
        super().__init__(target, modality, every)
        if k < 1:
            raise ValueError(f"KNN: k {k} is no number of neighbours; 1 is the least")
        if temperature <= 0:
            raise ValueError(f"KNN: temperature {temperature} is not positive")
        self.k, self.temperature = k, temperature

    @property
    def state_key(self) -> str:
        return self._generate_state_key(target=self.target, modality=self.modality, k=self.k)

    def score(
        self, z_ND: Tensor, label_N: Tensor, sets: dict[str, tuple[Tensor, Tensor]], classes: int
    ) -> dict[str, Tensor]:
        values = {}
        for name, (z_QD, label_Q) in sets.items():
            score_QC = knn_scores(z_QD, z_ND, label_N, classes, self.k, self.temperature)
            values[name] = _top1(score_QC, label_Q)
        return values


class LinearProbe(Banked):
    """Accuracy of multinomial logistic regression, fitted on the bank's embeddings.

        W, b = argmin  mean_n cross_entropy(W x_n + b, label_n) + l2 / 2 * ||W||^2,   x = (z - mean) / std

    Fitted by L-BFGS in float64, on features standardised by the bank. Key: ``{set}/probe_{target}_top1``,
    with ``_{modality}`` after the target where that is not image.

    Args:
        target: which of the data's targets holds the class.
        modality: whose embeddings are classified.
        l2: strength of the penalty on the weights.
        every: evaluations from one to the next that it takes part in.

    Raises:
        ValueError: every below 1, a negative l2; at setup, a data module without a bank; at evaluation, an
            unknown target or modality.

    >>> LinearProbe("group", l2=-1.0)
    Traceback (most recent call last):
    ValueError: LinearProbe: l2 -1.0 is negative
    """

    kind = "probe"

    def __init__(self, target: str, modality: str = "image", l2: float = 1e-3, every: int = 1) -> None:
        super().__init__(target, modality, every)
        if l2 < 0:
            raise ValueError(f"LinearProbe: l2 {l2} is negative")
        self.l2 = l2

    @property
    def state_key(self) -> str:
        return self._generate_state_key(target=self.target, modality=self.modality, l2=self.l2)

    def score(
        self, z_ND: Tensor, label_N: Tensor, sets: dict[str, tuple[Tensor, Tensor]], classes: int
    ) -> dict[str, Tensor]:
        x_ND = z_ND.to(wide(z_ND.device))
        std_D, mean_D = torch.std_mean(x_ND, dim=0, correction=0)
        std_D = std_D.where(std_D > 0, torch.ones_like(std_D))  # a constant feature says nothing: it becomes 0
        w_CD, b_C = fit_logistic((x_ND - mean_D) / std_D, label_N, classes, self.l2)
        return {
            name: _top1((z_QD.to(x_ND) - mean_D) / std_D @ w_CD.T + b_C, label_Q)
            for name, (z_QD, label_Q) in sets.items()
        }


class Geometry(Judge):
    """How the embeddings of the modalities lie: gap, effective rank, alignment, uniformity.

        gap_{a}_{b}   = || mean z_a - mean z_b ||        over positive pairs
        align_{a}_{b} = mean || z_a - z_b ||^2           over positive pairs
        rank_{m}      = exp(entropy of the normalised singular values of z_m)
        uniform_{m}   = log mean over pairs of exp(-2 || z_m - z_m' ||^2)

    A positive pair is a row that has both modalities, or else two rows of equal key.

    Args:
        pairs: which modalities meet, such as [[image, text]]; all of them where not given.
        limit: rows, evenly spread over the set, that uniformity looks at (its cost is their square).

    Raises:
        ValueError: a pair that is not two modalities, a limit below 2; at evaluation, an unknown modality.

    >>> Geometry(limit=1)
    Traceback (most recent call last):
    ValueError: Geometry: limit 1 makes no pair; 2 is the least
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

    def __init__(self, pairs: list[list[str]] | None = None, limit: int = 4096) -> None:
        super().__init__()
        self.pairs, self.limit = _checked(self, pairs), limit
        if limit < 2:
            raise ValueError(f"Geometry: limit {limit} makes no pair; 2 is the least")

    def judge(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, rows in sets.items():
            for a, b in _pairs(self, self.pairs, rows):
                rows_a, rows_b = matched_rows(rows.present[a], rows.present[b], rows.key)
                if len(rows_a):
                    z_a_ND, z_b_ND = rows.z[a][rows_a], rows.z[b][rows_b]
                    values[f"{name}/gap_{a}_{b}"] = modality_gap(z_a_ND, z_b_ND)
                    values[f"{name}/align_{a}_{b}"] = alignment(z_a_ND, z_b_ND)
            for m in rows.z:
                z_ND = rows.z[m][rows.where(m)]
                if len(z_ND) > 1:
                    values[f"{name}/rank_{m}"] = effective_rank(z_ND)
                    values[f"{name}/uniform_{m}"] = uniformity(z_ND[:: -(-len(z_ND) // self.limit)])
        return values


# what they share ------------------------------------------------------------------------------------------


def embed(trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor]:
    """The recipe's ``embed(batch)`` as a validation step runs it: no gradients, the run's precision."""
    assert has(pl_module, Embeds)
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        return pl_module.embed(batch)


def letters(modalities: Mapping[str, object]) -> dict[str, str]:
    """Short names of modalities for keys: i, t, a, else the first letters (two at least) that tell it apart.

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


def _any(trainer: L.Trainer) -> Any:
    return trainer  # Lightning sets many attributes where a type checker does not look


def _data(trainer: L.Trainer) -> Any:
    return _any(trainer).datamodule


def _name(thing: object) -> str:
    return type(thing).__name__


def _key(kind: str, target: str, modality: str) -> str:
    return f"{kind}_{target}" if modality == "image" else f"{kind}_{target}_{modality}"


def _checked(judge: Judge, pairs: list[list[str]] | None) -> list[tuple[str, str]] | None:
    for pair in pairs or []:
        if len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"{_name(judge)}: pairs: {pair} is not two modalities")
    return [(a, b) for a, b in pairs] if pairs else None


def _pairs(judge: Judge, pairs: list[tuple[str, str]] | None, rows: Rows) -> list[tuple[str, str]]:
    for m in {m for pair in pairs or [] for m in pair}:
        _known(judge, m, rows)
    return pairs or list(combinations(rows.z, 2))


def _known(judge: Judge, modality: str, rows: Rows) -> None:
    if modality not in rows.z:
        raise ValueError(f"{_name(judge)}: no embedding of {modality!r}; the recipe has {', '.join(rows.z)}")


def _labelled(judge: Judge, sets: dict[str, Rows], modality: str, target: str) -> dict[str, tuple[Tensor, Tensor]]:
    """``z_ND, label_N`` by set, less the sets (but not the bank) without such a target or a labelled row."""
    for rows in sets.values():
        _known(judge, modality, rows)
    if not any(target in rows.targets for rows in sets.values()):
        known = sorted({name for rows in sets.values() for name in rows.targets})
        raise ValueError(f"{_name(judge)}: no target {target!r} in the data; it has {', '.join(known) or 'none'}")
    labelled = {name: r.labelled(modality, target) for name, r in sets.items() if target in r.targets}
    return {name: pair for name, pair in labelled.items() if len(pair[1]) or name == "bank"}


def _top1(score_NC: Tensor, label_N: Tensor) -> Tensor:
    return (score_NC.argmax(dim=1) == label_N).float().mean()


def _accuracies(score_NC: Tensor, label_N: Tensor) -> dict[str, Tensor]:
    classes = score_NC.shape[1]
    values = {"top1": _top1(score_NC, label_N)}
    if classes > 5:
        values["top5"] = multiclass_accuracy(score_NC, label_N, classes, average="micro", top_k=5)
    return {**values, "balanced": balanced_accuracy(score_NC.argmax(1), label_N, classes)}
