"""What is left of a recipe where modalities are missing: every evaluation set, over all subsets of the modalities.

Letters: B rows of a batch, N rows of a set or bank, Q rows that are judged, D width, C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from descant.callbacks.evaluate.embeddings import Judge, Rows, Store, embed
from descant.callbacks.plots.images import (
    FAINT,
    GAP,
    GREY,
    INK,
    PAPER,
    RED,
    TEXT,
    TITLE,
    _font,
    keep_picture,
    run_folder,
)
from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.core.errors import no_such as nearest
from descant.modules.core.protocols import Embeds, Scores
from descant.modules.core.rng import mix, uniform_N
from descant.modules.evaluation.metrics import knn_scores, wide

MOST = 10  # modalities whose 1023 subsets are all tried without being asked
RAMP = ((240, 246, 252), (107, 174, 214), (8, 48, 107))  # of a heat map: from the worst to the best
CELL, DOT = 28, 7  # pixels


class ForwardEvaluator(Judge):
    """Base of the judges that run the recipe on evaluation batches themselves, whatever protocol it has.

    A subclass implements ``run``, called with every batch of a chosen set, and ``results``, called once an evaluation
    on every rank. It takes part in the sanity check, in every ``every``-th evaluation of a fit from the first on (with
    ``validate``), in those of its last epoch or step, and in ``validate`` and ``test`` always. The count is part of the
    checkpoint.

    Args:
        sets: the evaluation sets that it looks at; all of them where not given.
        limit: about so many samples of a set, chosen by their ids; all of them where not given.
        every: evaluations from one to the next that it takes part in.
        validate: take part in the validations of a fit too, and not in ``validate`` and ``test`` alone.
    """

    def __init__(
        self, sets: list[str] | None = None, limit: int | None = None, every: int = 1, validate: bool = True
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if limit is not None and limit < 1:
            raise ValueError(f"{name}: limit {limit} is no number of samples; 1 is the least")
        if every < 1:
            raise ValueError(f"{name}: every {every} is no number of evaluations; 1 is the least")
        self.sets, self.limit, self.every, self.validate = sets, limit, every, validate
        self.evaluations = 0
        self._taking = False
        self._shares: dict[str, dict[str, float]] = {}  # stage -> set -> share of its samples

    # what a subclass brings ---------------------------------------------------------------------------------------

    @property
    def reads_rows(self) -> bool:
        """Whether it asks for the embeddings that the validation step returns."""
        return False

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        """One batch of the set ``name``; ``keep_B``: the rows within the limit."""
        raise NotImplementedError

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """``{set}/{key}`` -> scalar, of all that ``run`` was given; on every rank the same."""
        raise NotImplementedError

    # the hooks ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.evaluations = int(state_dict["evaluations"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # not the base's: a recipe that embeds nothing can be judged all the same
        if self.limit is not None:
            self._require(trainer, "evaluation_sets")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._shares = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._taking = self._due(trainer)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_epoch_start(trainer, pl_module)
        self._taking = True

    def _due(self, trainer: L.Trainer) -> bool:
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        if trainer.sanity_checking or not self.validate:
            return self.validate
        self.evaluations += 1
        last_step = -1 < trainer.max_steps <= trainer.global_step
        last_epoch = trainer.max_epochs is not None and -1 < trainer.max_epochs <= trainer.current_epoch + 1
        return (self.evaluations - 1) % self.every == 0 or last_step or last_epoch

    def _collect(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, dataloader_idx: int
    ) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        judges = [c for c in callbacks if isinstance(c, Judge)]
        if any(not isinstance(c, ForwardEvaluator) or (c.reads_rows and c._taking) for c in judges):
            super()._collect(trainer, pl_module, outputs, batch, dataloader_idx)
        name = self._lead(trainer)._set_name(trainer, dataloader_idx)
        if self._taking and (self.sets is None or name in self.sets):
            self.run(trainer, pl_module, batch, self._kept(trainer, batch.index, name), name)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._taking:
            return
        if trainer.testing:  # a fit's validation may lack what its test has
            names = self._lead(trainer)._names.get("test", [])
            for name in self.sets or []:
                if names and name not in names:
                    raise ValueError(f"{type(self).__name__}: sets {name!r}: {nearest(name, names)}")
        for key, value in self.results(trainer, pl_module).items():
            # equal on all ranks already; the mean only irons out what kernels round differently
            many = trainer.world_size > 1
            pl_module.log(key, value.float(), add_dataloader_idx=False, sync_dist=many, batch_size=1)

    def _kept(self, trainer: L.Trainer, index_N: Tensor, name: str) -> Tensor:
        """Bool ``[N]``: within the limit, by a hash of the ids: the same samples whatever the batches and ranks."""
        if self.limit is None:
            return torch.ones_like(index_N, dtype=torch.bool)
        stage = "test" if trainer.testing else "validate"
        if stage not in self._shares:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self._shares[stage] = {s: self.limit / max(len(x), 1) for s, x in data.evaluation_sets(stage).items()}
        return (uniform_N(index_N, "evaluation/limit") < self._shares[stage][name]).to(index_N.device)


class ModalitySubsetEval(ForwardEvaluator):
    """Evaluation over all ``2^M - 1`` subsets of the modalities: what a recipe can do with some of them alone.

        {set}/{score}/{S} = mean of the score over the rows of the set, given the modalities in S and no other

    for S such as ``image+text``, and over the subsets ``{set}/{score}_mean``, ``_worst`` and ``_full`` (all
    modalities). The scores are those of the recipe's ``scores(batch)``, computed on a batch that has nothing but S; of
    names that begin with ``loss`` less is better. Where a ``target`` is given and the recipe embeds, there is also
    ``knn_{target}``: how often k neighbours in the data module's bank name the class (:class:`KNN`), by

        z_S = normalise(sum over m in S of z_m)              bank rows: over all modalities that they have

    A recipe's z_m is the same whatever else is there, and embedded once; one that says ``joint_embedding = True``
    embeds each subset by itself, and of an embedding named ``image+text`` takes that in place of the sum.

    So that subsets are compared on the same rows, only those count that have all modalities, unless ``complete`` is
    false: then all that have all of S. No subset needs to have been seen in training. A heat map of each score goes to
    every TensorBoard logger as ``subsets/{stage}-{score}`` and to ``{run folder}/pictures/``; its text names the worst
    subset of each set.

    Args:
        target: which of the data's targets holds the class of k-NN; needed where a recipe has no scores.
        modalities: that subsets are made of; all that recipe and data have where not given.
        subsets: so many of them: all modalities, each alone if they fit, others by a fixed draw. All where not given.
        sets: the evaluation sets; all of them where not given.
        limit: about so many samples of a set, chosen by their ids; all of them where not given.
        every: evaluations from one to the next that it takes part in.
        validate: take part in the validations of a fit too, and not in ``validate`` and ``test`` alone.
        complete: count only rows that have all modalities.
        k: neighbours that vote.
        temperature: of their weights.

    Raises:
        ValueError: for a count below 1; at setup, for a recipe that has neither protocol, Scores or Embeds, or no
            scores where no target is given, or for an unknown modality; at evaluation, for an unknown target or set.

    >>> ModalitySubsetEval(subsets=0)
    Traceback (most recent call last):
    ValueError: ModalitySubsetEval: subsets 0; 1 is the least
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

    def __init__(
        self,
        target: str | None = None,
        modalities: list[str] | None = None,
        subsets: int | None = None,
        sets: list[str] | None = None,
        limit: int | None = None,
        every: int = 1,
        validate: bool = True,
        complete: bool = True,
        k: int = 20,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(sets, limit, every, validate)
        for name, count in (("subsets", subsets), ("k", k)):
            if count is not None and count < 1:
                raise ValueError(f"ModalitySubsetEval: {name} {count}; 1 is the least")
        if temperature <= 0:
            raise ValueError(f"ModalitySubsetEval: temperature {temperature} is not positive")
        if modalities is not None and not modalities:
            raise ValueError("ModalitySubsetEval: modalities: none given; such as [image, text]")
        self.target, self.modalities, self.subsets, self.complete = target, modalities, subsets, complete
        self.k, self.temperature = k, temperature
        self._scored = self._embedded = self._joint = False
        self._of: tuple[str, ...] = ()
        self._subsets: list[tuple[str, ...]] = []
        self._columns: list[tuple[str, tuple[str, ...]]] = []  # (score, subset)
        self._names_judged: list[str] = []  # sets of this evaluation
        self._targets: set[str] = set()  # of all their batches
        self._values: dict[str, Store] = {}  # set -> a column a score and subset
        self._z: dict[str, Store] = {}  # set -> joint embeddings, one a subset
        self._warned: set[str] = set()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(target=self.target, modalities=self.modalities, complete=self.complete)

    @property
    def reads_rows(self) -> bool:
        return self._embedded and not self._joint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        recipe = type(pl_module).__name__
        self._scored, embeds = isinstance(pl_module, Scores), isinstance(pl_module, Embeds)
        if not self._scored and not embeds:
            raise ValueError(
                "ModalitySubsetEval needs the protocol Scores (scores(batch)) or Embeds (embed(batch)); "
                f"{recipe} lacks both"
            )
        if not self._scored and self.target is None:
            raise ValueError(
                f"ModalitySubsetEval: target: none given, and {recipe} has no scores(batch) of its own; "
                "give the target whose classes neighbours name, such as group"
            )
        self._embedded = embeds and self.target is not None
        self._joint = bool(getattr(pl_module, "joint_embedding", False))
        if self._embedded:
            self._require(trainer, "bank_dataloader")
        known = _of_recipe(pl_module)
        for m in self.modalities or []:
            if known is not None and m not in known:
                raise ValueError(f"ModalitySubsetEval: modalities {m!r}: {nearest(m, known)}")
        self._of = ()

    def _forget(self) -> None:
        super()._forget()
        self._values, self._z, self._columns, self._names_judged, self._targets = {}, {}, [], [], set()

    # a batch ------------------------------------------------------------------------------------------------------

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        if not self._of:
            self._of = self._modalities(pl_module, batch)
            self._subsets = subsets_of(self._of, self.subsets)
        if name not in self._names_judged:
            self._names_judged.append(name)
        self._targets |= set(batch.targets)
        keep_B = keep_B & self._counted({m: _present(batch, m) for m in self._of})
        parts = {subset: keep_B & _all(batch, subset) for subset in self._subsets}
        if self._scored:
            self._score(trainer, pl_module, batch, parts, name)
        if self._embedded and self._joint:
            z = {
                _name(subset): _fused(embed(trainer, pl_module, _given(batch, subset, rows_B)), subset)
                for subset, rows_B in parts.items()
            }
            rows = {_name(subset): rows_B for subset, rows_B in parts.items()}
            store = self._z.setdefault(name, Store().to(pl_module.device))
            store.update(z, Batch({}, rows, self._labels(batch), batch.index, batch.key))

    def _counted(self, present: Mapping[str, Tensor]) -> Tensor:
        """Bool: the rows that have all modalities, or some where that is enough."""
        present_MN = torch.stack([present[m] for m in self._of])
        return present_MN.all(0) if self.complete else present_MN.any(0)

    def _score(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Batch,
        parts: Mapping[tuple[str, ...], Tensor],
        name: str,
    ) -> None:
        assert isinstance(pl_module, Scores)
        value: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        valid: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        for subset, rows_B in parts.items():
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                terms = pl_module.scores(_given(batch, subset, rows_B))
            for score, term in terms.items():
                value[score, subset] = term.value.detach()[:, None]
                valid[score, subset] = rows_B if term.valid is None else rows_B & term.valid
        self._columns = self._columns or list(value)
        new = [score for score, subset in value if (score, subset) not in self._columns]
        if new:
            raise ValueError(
                f"ModalitySubsetEval: scores(batch) of {type(pl_module).__name__} names {new[0]!r}, which an earlier "
                "batch had not; it names all of them for every batch, with `valid` false where there is no number"
            )
        if not value:
            return
        zero = torch.zeros(len(batch), 1, device=batch.device)
        nowhere = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
        columns = {str(i): value.get(column, zero) for i, column in enumerate(self._columns)}
        present = {str(i): valid.get(column, nowhere) for i, column in enumerate(self._columns)}
        store = self._values.setdefault(name, Store().to(pl_module.device))
        store.update(columns, Batch({}, present, {}, batch.index, batch.key))

    def _modalities(self, pl_module: L.LightningModule, batch: Batch) -> tuple[str, ...]:
        there = [m for m in batch.present if not m.endswith(NEGATIVE)]
        recipe = _of_recipe(pl_module)
        known = there if recipe is None else [m for m in recipe if m in there]
        for m in self.modalities or []:
            if m not in known:
                raise ValueError(f"ModalitySubsetEval: modalities {m!r}: {nearest(m, known)}")
        chosen = tuple(dict.fromkeys(self.modalities or known))
        if not chosen:
            raise ValueError("ModalitySubsetEval: recipe and data have no modality in common")
        return chosen

    def _labels(self, batch: Batch) -> dict[str, Tensor]:
        assert self.target is not None
        if self.target not in batch.targets:
            # a set may lack what others have: its rows have no label
            return {self.target: torch.full_like(batch.index, -1)}
        return {self.target: batch.targets[self.target]}

    # the whole ----------------------------------------------------------------------------------------------------

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        folder = run_folder(trainer)  # asks all ranks, so it stands before the ways part
        found: dict[str, dict[str, dict[tuple[str, ...], tuple[Tensor, int]]]] = {}  # score -> set -> subset
        for name, store in self._values.items():
            rows = store.compute()
            for i, (score, subset) in enumerate(self._columns):
                value_Q = rows.z[str(i)][rows.where(str(i)), 0]
                if len(value_Q):
                    mean = value_Q.to(wide(value_Q.device)).mean()
                    found.setdefault(score, {}).setdefault(name, {})[subset] = mean, len(value_Q)
        if self._embedded:
            knn = self._neighbours(trainer, pl_module)
            if knn:
                found[f"knn_{self.target}"] = knn
        self._warn(trainer, {name for sets in found.values() for name in sets})
        values: dict[str, Tensor] = {}
        for score, sets in found.items():
            for name, by in sets.items():
                all_S = torch.stack([mean for mean, _ in by.values()])
                values |= {f"{name}/{score}/{_name(subset)}": mean for subset, (mean, _) in by.items()}
                values[f"{name}/{score}_mean"] = all_S.mean()
                values[f"{name}/{score}_worst"] = all_S.amax() if _less(score) else all_S.amin()
                if self._of in by:
                    values[f"{name}/{score}_full"] = by[self._of][0]
            if trainer.is_global_zero and not trainer.sanity_checking:
                self._draw(trainer, folder, score, sets)
        return values

    def _neighbours(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, dict[tuple[str, ...], tuple[Tensor, int]]]:
        assert self.target is not None
        if self._names_judged and self.target not in self._targets:
            known = ", ".join(sorted(self._targets)) or "none"
            raise ValueError(f"ModalitySubsetEval: no target {self.target!r} in the data; it has {known}")
        judged: dict[str, dict[tuple[str, ...], tuple[Tensor, Tensor]]] = {}
        if self._joint:
            for name, store in self._z.items():
                rows = store.compute()
                judged[name] = {s: rows.labelled(_name(s), self.target) for s in self._subsets}
        else:
            lead = self._lead(trainer)
            for number, store in lead._stores.items():
                name = lead._set_name(trainer, number)
                rows = store.compute()
                if name in self._names_judged and self.target in rows.targets:
                    keep_N = self._kept(trainer, rows.index, name)
                    judged[name] = {s: self._subset_rows(rows, keep_N, s) for s in self._subsets}
        labels = [label_Q for by in judged.values() for _, label_Q in by.values() if len(label_Q)]
        if not labels:
            return {}
        z_bank_ND, label_N = self._bank_rows(trainer, pl_module)
        if len(label_N) == 0:
            return {}
        classes = int(max(label.max() for label in (*labels, label_N))) + 1
        found: dict[str, dict[tuple[str, ...], tuple[Tensor, int]]] = {}
        for name, by in judged.items():
            for subset, (z_QD, label_Q) in by.items():
                if len(label_Q):
                    score_QC = knn_scores(z_QD, z_bank_ND, label_N, classes, self.k, self.temperature)
                    right = (score_QC.argmax(1) == label_Q).to(wide(label_Q.device)).mean()
                    found.setdefault(name, {})[subset] = right, len(label_Q)
        return found

    def _subset_rows(self, rows: Rows, keep_N: Tensor, subset: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """``z_QD`` and labels of the rows that count."""
        assert self.target is not None
        label_N = rows.targets[self.target]
        for at_N in (self._counted(rows.present), label_N >= 0, *(rows.present[m] for m in subset)):
            keep_N = keep_N & at_N
        at_Q = keep_N.nonzero().squeeze(1)
        return _fused({m: rows.z[m][at_Q] for m in subset}, subset), label_N[at_Q]

    def _bank_rows(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[Tensor, Tensor]:
        assert self.target is not None
        if self._joint:
            store = Store().to(pl_module.device)
            for batch in self._lead(trainer)._bank_batches(trainer):
                some_B = torch.stack([_present(batch, m) for m in self._of]).any(0)
                z = embed(trainer, pl_module, _given(batch, self._of, some_B))
                own = Batch({}, {"bank": some_B}, self._labels(batch), batch.index, batch.key)
                store.update({"bank": _fused(z, self._of)}, own)
            return store.compute().labelled("bank", self.target)
        bank = self.bank(trainer, pl_module)
        if self.target not in bank.targets:
            known = ", ".join(sorted(bank.targets)) or "none"
            raise ValueError(f"ModalitySubsetEval: no target {self.target!r} in the bank; it has {known}")
        some_N = torch.stack([bank.present[m] for m in self._of]).any(0)
        at_N = (some_N & (bank.targets[self.target] >= 0)).nonzero().squeeze(1)
        return _fused({m: bank.z[m][at_N] for m in self._of}, self._of), bank.targets[self.target][at_N]

    def _warn(self, trainer: L.Trainer, judged: set[str]) -> None:
        for name in [s for s in self._names_judged if s not in judged and s not in self._warned]:
            self._warned.add(name)
            which = f"all of {', '.join(self._of)}" if self.complete else f"any of {', '.join(self._of)}"
            hint = "; complete: false takes rows that have some of them" if self.complete else ""
            rank_zero_warn(f"ModalitySubsetEval: no row of {name} that has a score has {which}{hint}")

    def _draw(
        self,
        trainer: L.Trainer,
        folder: Any,
        score: str,
        sets: Mapping[str, Mapping[tuple[str, ...], tuple[Tensor, int]]],
    ) -> None:
        stage = "test" if trainer.testing else "val"
        cells = {name: {s: float(mean) for s, (mean, _) in by.items()} for name, by in sets.items()}
        rows = {name: max(count for _, count in by.values()) for name, by in sets.items()}
        title = f"{stage}: {score} by what is there, step {trainer.global_step}"
        image = heat_map(title, self._of, self._subsets, cells, rows, less=_less(score))
        tag = f"{stage}-{score}".replace("/", "-")
        keep_picture(trainer, folder, image, f"subsets-{tag}", f"subsets/{tag}")


# what it is made of -----------------------------------------------------------------------------------------------


def subsets_of(modalities: Sequence[str], count: int | None = None) -> list[tuple[str, ...]]:
    """Subsets that are not empty, small ones first: all ``2^M - 1``, or ``count`` of them by a fixed draw.

    A draw has the full set, and each modality alone where ``count`` has room for them.

    Raises:
        ValueError: for all subsets of more than 10 modalities.

    >>> subsets_of(["a", "b"]), len(subsets_of("abcdef", 9))
    ([('a',), ('b',), ('a', 'b')], 9)
    """
    m, every = len(modalities), 2 ** len(modalities) - 1
    if count is None and m > MOST:
        raise ValueError(
            f"ModalitySubsetEval: {m} modalities have {every} subsets; give `subsets`, such as 64 of them, or fewer "
            "`modalities`"
        )
    if count is None or count >= every:
        return [s for size in range(1, m + 1) for s in combinations(modalities, size)]
    chosen = {every, *((1 << i for i in range(m)) if count > m else ())}
    draw = 0
    while len(chosen) < count:
        chosen.add(mix(draw, "subsets", m) % every + 1)
        draw += 1
    places = [tuple(i for i in range(m) if code >> i & 1) for code in chosen]
    return [tuple(modalities[i] for i in place) for place in sorted(places, key=lambda p: (len(p), p))]


def _given(batch: Batch, subset: tuple[str, ...], rows_B: Tensor) -> Batch:
    """The batch with nothing but these modalities in these rows; the others are absent everywhere, as padding is."""
    batch = batch.only(*subset)
    return replace(batch, present={m: mask_B & rows_B for m, mask_B in batch.present.items()})


def _fused(z: Mapping[str, Tensor], subset: tuple[str, ...]) -> Tensor:
    """``normalise(sum over m in S of z_m)``, or where a row has an embedding of all of S by name (image+text), that.

    What is named otherwise altogether is taken for the joint embedding of whatever is there.
    """
    own = [z[m].float() for m in subset if m in z]
    sum_ND = torch.stack(own or [z_ND.float() for z_ND in z.values()]).sum(0)
    for name, z_ND in z.items():
        if set(name.split("+")) == set(subset):
            sum_ND = torch.where((z_ND != 0).any(1, keepdim=True), z_ND.float(), sum_ND)
    return F.normalize(sum_ND, dim=-1)


def _of_recipe(pl_module: L.LightningModule) -> tuple[str, ...] | None:
    """The modalities that a recipe names, in the attribute that has them by name; None where only the data knows."""
    names = (getattr(pl_module, attribute, None) for attribute in ("modalities", "adapters", "towers"))
    return next((tuple(found) for found in names if found is not None), None)


def _present(batch: Batch, modality: str) -> Tensor:
    known = batch.present.get(modality)
    return torch.zeros(len(batch), dtype=torch.bool, device=batch.device) if known is None else known


def _all(batch: Batch, subset: tuple[str, ...]) -> Tensor:
    return torch.stack([_present(batch, m) for m in subset]).all(0)


def _name(subset: tuple[str, ...]) -> str:
    return "+".join(subset)


def _less(score: str) -> bool:
    return score.startswith("loss")


# drawing ----------------------------------------------------------------------------------------------------------


def heat_map(
    title: str,
    modalities: Sequence[str],
    subsets: Sequence[tuple[str, ...]],
    cells: Mapping[str, Mapping[tuple[str, ...], float]],
    rows: Mapping[str, int],
    less: bool = False,
) -> Image.Image:
    """A row a subset, with a dot under each modality that is there; a column a set, its worst cell framed.

    Args:
        title: the first line.
        modalities: in the order of their dots.
        subsets: from top to bottom.
        cells: set -> subset -> number.
        rows: set -> how many samples it is a mean of.
        less: whether less is better.

    >>> one = {"val": {("a",): 0.25, ("a", "b"): 0.5}}
    >>> heat_map("title", ["a", "b"], list(one["val"]), one, {"val": 9}).mode
    'RGB'
    """
    heads = {name: (name, f"{count:,} rows") for name, count in rows.items()}
    dots = [max(34, _length(m, TEXT) + 14) for m in modalities]
    widths = {name: max(92, *(_length(line, TEXT) + 18 for line in heads[name])) for name in cells}
    worst = {name: _worst(by, less) for name, by in cells.items()}
    said = "; ".join(f"{name} {_name(s)} {_number(cells[name][s])}" for name, s in worst.items())
    grid = sum(dots) + GAP + sum(widths.values())
    width = 2 * GAP + max(grid, _length(title, TITLE), 320)
    lines = [*_filled(f"worst: {said}", width - 2 * GAP), "framed: the worst of its set; darker is better"]
    top = GAP + TITLE + 10 + len(lines) * (TEXT + 5) + 10
    body = top + 2 * (TEXT + 4) + 8
    image = Image.new("RGB", (width, body + CELL * len(subsets) + GAP), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, INK, _font(TITLE, title))
    for i, line in enumerate(lines):
        draw.text(
            (GAP, GAP + TITLE + 10 + i * (TEXT + 5)), line, INK if line != lines[-1] else FAINT, _font(TEXT, line)
        )
    left = GAP
    for m, room in zip(modalities, dots, strict=True):
        draw.text((left + room // 2, top + TEXT + 4), m, INK, _font(TEXT, m), anchor="ma")
        for j, subset in enumerate(subsets):
            x, y = left + room // 2, body + j * CELL + CELL // 2
            box = (x - DOT, y - DOT, x + DOT, y + DOT)
            draw.ellipse(box, INK if m in subset else PAPER, INK if m in subset else GREY)
        left += room
    left += GAP
    best, least = _range([v for by in cells.values() for v in by.values()], less)
    for name, by in cells.items():
        room = widths[name]
        for k, line in enumerate(heads[name]):
            place = (left + room // 2, top + k * (TEXT + 4))
            draw.text(place, line, INK if k == 0 else FAINT, _font(TEXT, line), anchor="ma")
        for j, subset in enumerate(subsets):
            if subset not in by:
                continue
            value, y = by[subset], body + j * CELL
            share = (value - least) / (best - least) if best != least else 0.5
            colour = _shade(share) if value == value else GREY
            framed = {"outline": RED, "width": 3} if subset == worst[name] else {"outline": PAPER, "width": 1}
            draw.rectangle((left, y, left + room - 1, y + CELL - 1), colour, **framed)  # type: ignore[arg-type]
            ink = PAPER if sum(colour) < 380 else INK
            number = _number(value)
            draw.text((left + room // 2, y + CELL // 2), number, ink, _font(TEXT, number), anchor="mm")
        left += room
    return image


def _worst(by: Mapping[tuple[str, ...], float], less: bool) -> tuple[str, ...]:
    """The first of the worst; what is no number is worse than any."""
    return min(by, key=lambda s: (by[s] == by[s], -by[s] if less else by[s]))


def _range(values: Sequence[float], less: bool) -> tuple[float, float]:
    """The best and the worst of what is finite."""
    finite = [v for v in values if abs(v) < float("inf")] or [0.0]
    return (min(finite), max(finite)) if less else (max(finite), min(finite))


def _shade(share: float) -> tuple[int, int, int]:
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    first = min(int(place), len(RAMP) - 2)
    r, g, b = (round(x + (y - x) * (place - first)) for x, y in zip(RAMP[first], RAMP[first + 1], strict=True))
    return r, g, b


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _length(text: str, size: int) -> int:
    return int(_font(size, text).getlength(text)) + 1


def _filled(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _length(longer, TEXT) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
