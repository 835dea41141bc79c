"""Evaluation over all subsets of the modalities: how much of a score remains if some are missing.

Letters: B rows of a batch, N rows of a set or bank, Q evaluated rows, D width, C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from descant.callbacks.evaluate.embeddings import Rows, Store, Values, embed
from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.callbacks.plots.output import save_figure
from descant.callbacks.plots.subsets import heat_map
from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.core.capabilities import has
from descant.modules.core.errors import no_such, require_value
from descant.modules.core.protocols import Embeds, Scores
from descant.modules.evaluation.items import Items, mean_of
from descant.modules.evaluation.metrics import knn_scores, wide
from descant.modules.evaluation.subsets import Subset, fuse_embeddings, subset_name, subsets_of

Scored = dict[Subset, Items]  # the values of a score of the rows of a set


class ModalitySubsetEval(ForwardEvaluator):
    """Evaluation over all ``2^M - 1`` subsets of the modalities (missing-modality robustness).

        {set}/{score}/{S} = mean of the score over the rows of the set, given the modalities in S and no other

    for S such as ``image+text``, and over the subsets ``{set}/{score}_mean``, ``_worst`` and ``_full`` (all
    modalities). Scores are those of the recipe's ``scores(batch)`` on a batch with nothing but S; lower is better for
    names that begin with ``loss``. With a ``target``, a recipe that embeds also has ``knn_{target}``, the accuracy of
    k-NN in the data module's bank (:class:`KNN`) with

        z_S = normalise(sum over m in S of z_m)              bank rows: over all modalities that they have

    Each modality is embedded once, independent of the others; a recipe with ``joint_embedding = True`` embeds each
    subset, and an embedding named ``image+text`` replaces the sum.

    Only rows with all modalities count, so that subsets are compared on the same rows. With ``complete: false``, all
    rows with all of S count. The model need not have been trained on any subset. A heat map of each score, with the
    worst subset of each set in words, goes to every TensorBoard logger as ``subsets/{stage}-{score}`` and to
    ``{run folder}/pictures/``.

    Args:
        target: the data's target that k-NN predicts; required for a recipe without scores.
        modalities: modalities of the subsets; all that both recipe and data have if not given.
        subsets: number of subsets: all modalities, each alone if they fit, others sampled. All if not given.
        sets, limit, every, validate: see :class:`ForwardEvaluator`.
        complete: count only rows that have all modalities.
        k: neighbours that vote.
        temperature: temperature of their weights.

    >>> ModalitySubsetEval(subsets=0)
    Traceback (most recent call last):
    ValueError: ModalitySubsetEval: subsets 0; 1 is the least
    """

    once = True
    identity = ("target", "modalities", "complete")

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
        require_value(temperature > 0, f"ModalitySubsetEval: temperature {temperature} is not positive")
        if modalities is not None and not modalities:
            raise ValueError("ModalitySubsetEval: modalities: none given; such as [image, text]")
        self.target, self.modalities, self.subsets, self.complete = target, modalities, subsets, complete
        self.k, self.temperature = k, temperature
        self._scored = self._embedded = self._joint = False
        self._full: Subset = ()  # all modalities
        self._subsets: list[Subset] = []
        self._warned: set[str] = set()

    @property
    def reads_rows(self) -> bool:
        return self._embedded and not self._joint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        recipe = type(pl_module).__name__
        self._scored, embeds = has(pl_module, Scores), has(pl_module, Embeds)
        if not self._scored and not embeds:
            raise ValueError(
                "ModalitySubsetEval needs the protocol Scores (scores(batch)) or Embeds (embed(batch)); "
                f"{recipe} lacks both"
            )
        if not self._scored and self.target is None:
            raise ValueError(
                f"ModalitySubsetEval: target: none given, and {recipe} has no scores(batch) of its own; "
                "give the target that k-NN predicts, such as group"
            )
        self._embedded = embeds and self.target is not None
        self._joint = bool(getattr(pl_module, "joint_embedding", False))
        if self._embedded:
            self._require(trainer, "bank_dataloader")
        known = _recipe_modalities(pl_module)
        for m in self.modalities or []:
            if known is not None and m not in known:
                raise ValueError(f"ModalitySubsetEval: modalities {m!r}: {no_such(m, known)}")
        self._full = ()

    def _forget(self) -> None:
        super()._forget()
        self._columns: list[tuple[str, Subset]] = []  # (score, subset)
        self._evaluated: list[str] = []  # sets of this evaluation
        self._targets: set[str] = set()  # of all their batches
        self._values: dict[str, Store] = {}  # set -> a column for each score and subset
        self._z: dict[str, Store] = {}  # set -> a joint embedding for each subset

    # one batch ----------------------------------------------------------------------------------------------------

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        if not self._full:
            self._full = self._modalities(pl_module, batch)
            self._subsets = subsets_of(self._full, self.subsets)
        if name not in self._evaluated:
            self._evaluated.append(name)
        self._targets |= set(batch.targets)
        keep_B = keep_B & self._rows_to_count({m: _present(batch, m) for m in self._full})
        parts = {s: keep_B & torch.stack([_present(batch, m) for m in s]).all(0) for s in self._subsets}
        if self._scored:
            self._score(trainer, pl_module, batch, parts, name)
        if self._embedded and self._joint:
            z = {
                subset_name(s): fuse_embeddings(embed(trainer, pl_module, _only(batch, s, rows_B)), s)
                for s, rows_B in parts.items()
            }
            rows = {subset_name(s): rows_B for s, rows_B in parts.items()}
            store = self._z.setdefault(name, Store().to(pl_module.device))
            store.update(z, Batch({}, rows, self._labels(batch), batch.index, batch.content_id))

    def _rows_to_count(self, present: Mapping[str, Tensor]) -> Tensor:
        """Return bool: the rows that have all modalities, or any if ``complete`` is false."""
        present_MN = torch.stack([present[m] for m in self._full])
        return present_MN.all(0) if self.complete else present_MN.any(0)

    def _score(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, parts: Mapping[Subset, Tensor], name: str
    ) -> None:
        assert has(pl_module, Scores)
        value: dict[tuple[str, Subset], Tensor] = {}
        valid: dict[tuple[str, Subset], Tensor] = {}
        for subset, rows_B in parts.items():
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                terms = pl_module.scores(_only(batch, subset, rows_B))
            for score, term in terms.items():
                value[score, subset] = term.value.detach()[:, None]
                valid[score, subset] = rows_B if term.valid is None else rows_B & term.valid
        self._columns = self._columns or list(value)
        new = [score for score, subset in value if (score, subset) not in self._columns]
        if new:
            raise ValueError(
                f"ModalitySubsetEval: scores(batch) of {type(pl_module).__name__} names {new[0]!r}, which an earlier "
                "batch had not; return all of them for every batch, with `valid` false where there is no number"
            )
        if not value:
            return
        zero = torch.zeros(len(batch), 1, device=batch.device)
        nowhere = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
        columns = {str(i): value.get(column, zero) for i, column in enumerate(self._columns)}
        present = {str(i): valid.get(column, nowhere) for i, column in enumerate(self._columns)}
        store = self._values.setdefault(name, Store().to(pl_module.device))
        store.update(columns, Batch({}, present, {}, batch.index, batch.content_id))

    def _modalities(self, pl_module: L.LightningModule, batch: Batch) -> Subset:
        data = [m for m in batch.present if not m.endswith(NEGATIVE)]
        recipe = _recipe_modalities(pl_module)
        known = data if recipe is None else [m for m in recipe if m in data]
        for m in self.modalities or []:
            if m not in known:
                raise ValueError(f"ModalitySubsetEval: modalities {m!r}: {no_such(m, known)}")
        chosen = tuple(dict.fromkeys(self.modalities or known))
        if not chosen:
            raise ValueError("ModalitySubsetEval: recipe and data have no modality in common")
        return chosen

    def _labels(self, batch: Batch) -> dict[str, Tensor]:
        assert self.target is not None
        if self.target not in batch.targets:
            # another set may have the target: these rows have no label
            return {self.target: torch.full_like(batch.index, -1)}
        return {self.target: batch.targets[self.target]}

    # all batches --------------------------------------------------------------------------------------------------

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Values:
        means: dict[str, dict[str, Scored]] = {}  # score -> set -> subset
        for name, store in self._values.items():
            rows = store.compute()
            for i, (score, subset) in enumerate(self._columns):
                at_Q = rows.where(str(i))
                value_Q = rows.z[str(i)][at_Q, 0]
                if len(value_Q):
                    items = Items(value_Q.to(wide(value_Q.device)), rows.key[at_Q])
                    means.setdefault(score, {}).setdefault(name, {})[subset] = items
        if self._embedded:
            knn = self._neighbours(trainer, pl_module)
            if knn:
                means[f"knn_{self.target}"] = knn
        self._warn({name for sets in means.values() for name in sets})
        values: dict[str, Tensor | Items] = {}
        for score, sets in means.items():
            for name, by_subset in sets.items():
                mean_S = torch.stack([items.mean() for items in by_subset.values()])
                values |= {f"{name}/{score}/{subset_name(s)}": items for s, items in by_subset.items()}
                values[f"{name}/{score}_mean"] = mean_of(list(by_subset.values()))
                values[f"{name}/{score}_worst"] = mean_S.amax() if _less(score) else mean_S.amin()
                if self._full in by_subset:
                    values[f"{name}/{score}_full"] = by_subset[self._full]
            if trainer.is_global_zero and not trainer.sanity_checking:
                self._draw(trainer, score, sets)
        return values

    def _neighbours(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Scored]:
        assert self.target is not None
        if self._evaluated:
            self.require_target(self.target, self._targets)
        queries: dict[str, dict[Subset, tuple[Tensor, Tensor, Tensor]]] = {}  # set -> subset -> z_QD, label_Q, key_Q
        if self._joint:
            for name, store in self._z.items():
                rows = store.compute()
                queries[name] = {s: rows.labelled_rows(subset_name(s), self.target) for s in self._subsets}
        else:
            lead = self._lead(trainer)
            for number, store in lead._stores.items():
                name = lead._set_name(trainer, number)
                rows = store.compute()
                if name in self._evaluated and self.target in rows.targets:
                    keep_N = self._within_limit(trainer, rows.index, name)
                    queries[name] = {s: self._subset_rows(rows, keep_N, s) for s in self._subsets}
        labels = [label_Q for by_subset in queries.values() for _, label_Q, _ in by_subset.values() if len(label_Q)]
        if not labels:
            return {}
        z_bank_ND, label_N = self._bank_rows(trainer, pl_module)
        if len(label_N) == 0:
            return {}
        classes = int(max(label.max() for label in (*labels, label_N))) + 1
        means: dict[str, Scored] = {}
        for name, by_subset in queries.items():
            for subset, (z_QD, label_Q, key_Q) in by_subset.items():
                if len(label_Q):
                    score_QC = knn_scores(z_QD, z_bank_ND, label_N, classes, self.k, self.temperature)
                    hit_Q = (score_QC.argmax(1) == label_Q).to(wide(label_Q.device))
                    means.setdefault(name, {})[subset] = Items(hit_Q, key_Q)
        return means

    def _subset_rows(self, rows: Rows, keep_N: Tensor, subset: Subset) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``z_QD, label_Q, key_Q`` of the rows that count."""
        assert self.target is not None
        label_N = rows.targets[self.target]
        for at_N in (self._rows_to_count(rows.present), label_N >= 0, *(rows.present[m] for m in subset)):
            keep_N = keep_N & at_N
        at_Q = keep_N.nonzero().squeeze(1)
        return fuse_embeddings({m: rows.z[m][at_Q] for m in subset}, subset), label_N[at_Q], rows.key[at_Q]

    def _bank_rows(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[Tensor, Tensor]:
        assert self.target is not None
        if self._joint:
            store = Store().to(pl_module.device)
            for batch in self._lead(trainer)._bank_batches(trainer):
                some_B = torch.stack([_present(batch, m) for m in self._full]).any(0)
                z = embed(trainer, pl_module, _only(batch, self._full, some_B))
                rows = Batch({}, {"bank": some_B}, self._labels(batch), batch.index, batch.content_id)
                store.update({"bank": fuse_embeddings(z, self._full)}, rows)
            return store.compute().labelled_rows("bank", self.target)[:2]
        bank = self.bank(trainer, pl_module)
        self.require_target(self.target, bank.targets, "the bank")
        some_N = torch.stack([bank.present[m] for m in self._full]).any(0)
        at_N = (some_N & (bank.targets[self.target] >= 0)).nonzero().squeeze(1)
        return fuse_embeddings({m: bank.z[m][at_N] for m in self._full}, self._full), bank.targets[self.target][at_N]

    def _warn(self, scored: set[str]) -> None:
        for name in [s for s in self._evaluated if s not in scored and s not in self._warned]:
            self._warned.add(name)
            which = f"{'all' if self.complete else 'any'} of {', '.join(self._full)}"
            hint = "; complete: false takes rows that have some of them" if self.complete else ""
            rank_zero_warn(f"ModalitySubsetEval: no row of {name} that has a score has {which}{hint}")

    def _draw(self, trainer: L.Trainer, score: str, sets: Mapping[str, Scored]) -> None:
        stage = "test" if trainer.testing else "val"
        cells = {name: {s: float(items.mean()) for s, items in by_subset.items()} for name, by_subset in sets.items()}
        rows = {name: max(len(items.id_N) for items in by_subset.values()) for name, by_subset in sets.items()}
        title = f"{stage}: {score} by modalities present, step {trainer.global_step}"
        figure = heat_map(title, self._full, self._subsets, cells, rows, less=_less(score))
        tag = f"{stage}-{score}".replace("/", "-")
        save_figure(trainer, figure, f"subsets-{tag}", f"subsets/{tag}")


def _only(batch: Batch, subset: Subset, rows_B: Tensor) -> Batch:
    """Restrict a batch to these modalities in these rows; all else is absent, like padding."""
    batch = batch.only(*subset)
    return replace(batch, present={m: mask_B & rows_B for m, mask_B in batch.present.items()})


def _recipe_modalities(pl_module: L.LightningModule) -> tuple[str, ...] | None:
    """Return the modalities of a recipe that lists them; None if only the data has a list."""
    names = (getattr(pl_module, attribute, None) for attribute in ("modalities", "adapters", "towers"))
    return next((tuple(listed) for listed in names if listed is not None), None)


def _present(batch: Batch, modality: str) -> Tensor:
    absent = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
    return batch.present.get(modality, absent)


def _less(score: str) -> bool:
    return score.startswith("loss")
