"""Cross-modal retrieval. Letters: N rows of an evaluation set, Q queries, G gallery rows."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.embeddings import PairEvaluator, Rows, Values, letters, scalar
from descant.modules.evaluation.items import Items, mean_of, per_group
from descant.modules.evaluation.metrics import recall_by_chance, retrieval_ranks


class Retrieval(PairEvaluator):
    """Cross-modal retrieval on each evaluation set: recall at k and the median rank, in both directions.

        hit@k_q = [fewer than k wrong gallery rows score as high as the best correct one]

    The gallery is all rows with the second modality; a query is a row with the first one that has a match there (equal
    key). The score is the dot product; ties and nan count as misses. Keys: ``{set}/i2t_r1``, ``{set}/t2i_r10``,
    ``{set}/i2t_medr`` (1 is best).

    If some rows share a key (equal captions) and others do not, the former are easier: ``{set}/distinct/i2t_r1``
    averages the queries of each distinct key first, then the keys. ``{set}/chance/i2t_r1`` is the expected value of a
    random order of the gallery.

    Args:
        at: the k of recall at k.

    >>> Retrieval(pairs=[["image", "image"]])
    Traceback (most recent call last):
    ValueError: Retrieval: pairs: ['image', 'image'] is not two modalities
    """

    def __init__(self, pairs: list[list[str]] | None = None, at: list[int] | None = None) -> None:
        super().__init__(pairs)
        self.at = at or [1, 5, 10]
        if min(self.at) < 1:
            raise ValueError(f"{type(self).__name__}: at: {min(self.at)} is no number of gallery rows; 1 is the least")

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        values: dict[str, Tensor | Items] = {}
        for name, rows in sets.items():
            letter = letters(rows.z)
            for pair in self._pairs(rows):
                for a, b in (pair, pair[::-1]):
                    for key, value in self.score(rows, a, b).items():
                        group, _, metric = key.rpartition("/")
                        where = f"{name}/{group}" if group else name
                        values[f"{where}/{letter[a]}2{letter[b]}_{metric}"] = value
        return values

    def score(self, rows: Rows, a: str, b: str) -> Values:
        """Compute the metrics of one direction; none if no query has a match."""
        query, gallery = rows.where(a), rows.where(b)
        key_Q, key_G = rows.key[query], rows.key[gallery]
        rank_Q = retrieval_ranks(rows.z[a][query], key_Q, rows.z[b][gallery], key_G)
        key_Q, rank_Q = key_Q[rank_Q >= 0], rank_Q[rank_Q >= 0]
        if len(rank_Q) == 0:
            return {}
        # rank G, which nan gets, is a miss for any k
        hit = {f"r{k}": (rank_Q < min(k, len(gallery))).double() for k in self.at}
        values: dict[str, Tensor | Items] = {name: Items(hit_Q, key_Q) for name, hit_Q in hit.items()}
        values["medr"] = rank_Q.double().quantile(0.5) + 1
        key_K, rows_K = key_G.unique(return_counts=True)
        matches_Q = rows_K[torch.searchsorted(key_K, key_Q)]
        queries_K = key_Q.unique(return_counts=True)[1]
        if queries_K.min() < queries_K.max():
            values |= {f"distinct/{name}": per_group(hit_Q, key_Q, key_Q) for name, hit_Q in hit.items()}
        return values | {f"chance/r{k}": recall_by_chance(matches_Q, len(gallery), k).mean() for k in self.at}


class EmergentRetrieval(Retrieval):
    """Mean recall at k over sets whose pairs were never trained, such as names in languages without sketches.

        emergent/{a}2{b}_r{k} = mean over sets of hit@k       emergent/..._apart: queries far from the training data

    A name spelled as in a trained language is retrieved without any alignment, so ``_apart`` counts only queries whose
    ``target`` (such as the edit distance to the English name) is at least ``least``, in the whole gallery.

    Args:
        sets: sets of the test over which the mean is taken.
        pairs: such as [[sketch, text]].
        target: a target of the data, the distance of a row from the training data; None leaves ``_apart`` out.
        least: the least distance of ``_apart``.

    >>> EmergentRetrieval(sets=[], pairs=[["sketch", "text"]])
    Traceback (most recent call last):
    ValueError: EmergentRetrieval: sets: none given; such as [de, fr]
    """

    def __init__(
        self,
        sets: list[str],
        pairs: list[list[str]],
        at: list[int] | None = None,
        target: str | None = "distance",
        least: int = 3,
    ) -> None:
        super().__init__(pairs, at)
        if not sets:
            raise ValueError("EmergentRetrieval: sets: none given; such as [de, fr]")
        self.sets, self.target, self.least = sets, target, least

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        wanted = self.sets or []
        if not set(wanted) & set(sets):  # a validation of other sets
            return {}
        for name in wanted:
            if name not in sets:
                raise ValueError(f"EmergentRetrieval: sets: no {name!r} in the data, only {', '.join(sets)}")
        chosen = {name: sets[name] for name in wanted}
        values = self._mean(super().evaluate(trainer, pl_module, chosen), "")
        if self.target is not None:
            for name, rows in chosen.items():
                self.require_target(self.target, rows.targets, f"set {name}")
            apart = {f"{name}/{key}": x for name, rows in chosen.items() for key, x in self._apart(rows).items()}
            values = {**values, **self._mean(apart, "_apart")}
        return values

    def _apart(self, rows: Rows) -> Values:
        """Compute the metrics of the far queries; near rows stay in the gallery."""
        assert self.pairs is not None and self.target is not None
        far_N, letter = rows.targets[self.target] >= self.least, letters(rows.z)
        values: dict[str, Tensor | Items] = {}
        for pair in self.pairs:
            for a, b in (pair, pair[::-1]):
                far = Rows(rows.z, {**rows.present, a: rows.present[a] & far_N}, rows.key, rows.index, rows.targets)
                for key, value in self.score(far, a, b).items():
                    if "/" not in key:
                        values[f"{letter[a]}2{letter[b]}_{key}"] = value
        return values

    @staticmethod
    def _mean(values: Values, end: str) -> Values:
        """Average ``{set}/{key}`` over sets, as ``emergent/{key}``."""
        by_key: dict[str, list[Tensor | Items]] = {}
        for name, value in values.items():
            by_key.setdefault(name.partition("/")[2], []).append(value)
        means: dict[str, Tensor | Items] = {}
        for key, each in by_key.items():
            items = [value for value in each if isinstance(value, Items)]
            mean = torch.stack([scalar(value).double() for value in each]).mean()
            means[f"emergent/{key}{end}"] = mean_of(items) if len(items) == len(each) else mean
        return means
