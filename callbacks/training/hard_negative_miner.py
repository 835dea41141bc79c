"""Mine hard negatives of the training set at epoch starts. Letters: Q queries, N targets, D width, K negatives."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.embeddings import Rows, Store, embed
from descant.callbacks.logs.resumable_log import ResumableMetrics
from descant.modules.core.capabilities import has, require
from descant.modules.core.modes import eval_mode
from descant.modules.core.protocols import Embeds, NegativesData
from descant.modules.core.ranks import rank, total_of_ranks, world
from descant.modules.core.rng import global_seed, mix, mix_N
from descant.modules.selection.mining import BLOCK, hard_negatives, number_equal_rows, one_of_each, pair_threshold
from descant.modules.training_setup.trainer import data_now, data_parts, epoch_now, plain_batches


class HardNegativeMiner(ResumableMetrics):
    """Dynamic hard negatives (SAIL-Embedding): each sample's highest-scoring false pairs below the F1 threshold.

    At the first epoch and every ``every`` epochs, under the current weights in eval mode:

        H_a = the k samples b of highest s_ab = z_a.z_b     with other content than a, and s_ab < lambda*
        lambda* = argmax over lambda of F1 of "s >= lambda" over labelled pairs: true where the contents are equal

    The candidates b are one sample of each content, drawn anew each time, so that the k negatives differ in content.
    An unlabelled pair that scores above lambda* is presumed to be true. Each sample of a training batch then has one of
    its negatives, chosen by its draw, as ``inputs["text_neg"]``, for ``model.negatives``. The table of negatives is
    part of the data module's state and equal on all ranks. Source: SAIL-Embedding (arXiv 2510.12709), no code released;
    one of the K negatives per visit, instead of all K, is our reading.

    Logs every epoch ``mining/age`` (epochs since the last mining) and, from that mining, ``mining/threshold``,
    ``mining/f1``, ``mining/score`` (mean of the negatives) and ``mining/found`` (share of the K negatives that were
    found). With a ``label`` it also logs ``mining/false``, the share of negatives that have the label of their sample.

    Args:
        pair: modalities a and b; the negatives are of b.
        k: negatives of each sample.
        every: epochs between two minings.
        threshold: ``f1``; ``random`` (the control) for the score of a random labelled pair; none for the plain top-k.
        pairs: maximum number of labelled pairs for the threshold: random samples a, each with all b.
        label: a target of the data, for ``mining/false``.
        exclude: a target of the data, such as ``family`` of Emoji: samples that share it with a are excluded from the
            negatives of a. This is knowledge of an oracle, which the threshold has to guess.
    """

    once = True

    def __init__(
        self,
        pair: tuple[str, str] = ("image", "text"),
        k: int = 8,
        every: int = 1,
        threshold: Literal["f1", "random"] | None = "f1",
        pairs: int = 4_000_000,
        label: str | None = None,
        exclude: str | None = None,
    ) -> None:
        super().__init__()
        if min(k, every, pairs) < 1:
            raise ValueError(f"HardNegativeMiner: k {k}, every {every}, pairs {pairs}: at least 1 each")
        self.pair, self.k, self.every, self.threshold = (pair[0], pair[1]), k, every, threshold
        self.pairs, self.label, self.exclude = pairs, label, exclude

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require(self, pl_module, Embeds)
        for data in data_parts(trainer) if stage == "fit" else []:
            if not has(data, NegativesData):
                raise ValueError(f"HardNegativeMiner: {type(data).__name__} cannot have mined negatives; Emoji can")
            data.read_mined(self.pair[1])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data, epoch = data_now(trainer), epoch_now(trainer)
        assert has(data, NegativesData)
        version = epoch // self.every
        if data.mined.version < version:
            self.history = self._mine(trainer, pl_module, version)
        self.history["mining/age"] = float(epoch % self.every)
        self.update_metrics(trainer)
        self.resumable_log.write(trainer, self.history)

    def _mine(self, trainer: L.Trainer, pl_module: L.LightningModule, version: int) -> dict[str, float]:
        data: Any = data_now(trainer)
        rows, (a, b) = self._embed_bank(trainer, pl_module), self.pair
        training_N = torch.isin(rows.index, data.training_ids().to(rows.index.device))
        query_Q, target_N = ((rows.present[m] & training_N).nonzero()[:, 0] for m in self.pair)
        draw_R = torch.from_numpy(mix_N(rows.index, "mining", global_seed(), version)).to(rows.index.device)
        target_N = target_N[one_of_each(rows.key[target_N], draw_R[target_N])]
        z_QD, z_ND, key_Q, key_N = rows.z[a][query_Q], rows.z[b][target_N], rows.key[query_Q], rows.key[target_N]
        sample_M = draw_R[query_Q].argsort(stable=True)[: max(1, self.pairs // max(len(target_N), 1))]
        best = pair_threshold(z_QD[sample_M], z_ND, key_Q[sample_M], key_N)
        threshold: float | None = best.value
        if self.threshold is None:
            threshold = None
        elif self.threshold == "random":
            number = mix(global_seed(), "mining/threshold", version)
            query, target = sample_M[number % len(sample_M)], number // len(sample_M) % len(target_N)
            threshold = float(z_QD[query] @ z_ND[target])
        alike_R = rows.key if self.exclude is None else number_equal_rows(rows.key, rows.targets[self.exclude])
        score_QK, index_QK = self._on_all_ranks(z_QD, z_ND, alike_R[query_Q], alike_R[target_N], threshold)
        found_QK = index_QK >= 0
        negative_QK = torch.where(found_QK, rows.index[target_N][index_QK.clamp(min=0)], -1)
        data.renew_mined(rows.index[query_Q].cpu(), negative_QK.cpu(), version)
        mean = {"f1": torch.tensor(best.f1), "score": score_QK[found_QK].mean(), "found": found_QK.double().mean()}
        if self.label is not None:
            label_R = rows.targets[self.label]
            equal_QK = label_R[query_Q][:, None] == label_R[target_N][index_QK.clamp(min=0)]
            mean["false"] = equal_QK[found_QK].double().mean()
        log = {f"mining/{name}": float(value) for name, value in mean.items()}
        return log | ({} if threshold is None else {"mining/threshold": threshold})

    def _embed_bank(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Rows:
        """Embed the bank with the current weights; returns the rows of all ranks by sample id."""
        store = Store().to(pl_module.device)
        with eval_mode(pl_module):
            for batch in plain_batches(trainer, data_now(trainer).bank_dataloader()):
                store.update(embed(trainer, pl_module, batch), batch)
        rows = store.compute()
        for m in self.pair:
            if m not in rows.z:
                raise ValueError(f"HardNegativeMiner: no embedding of {m!r}; the recipe has {', '.join(rows.z)}")
        for name in (self.label, self.exclude):
            if name is not None and name not in rows.targets:
                names = ", ".join(rows.targets) or "none"
                raise ValueError(f"HardNegativeMiner: no target {name!r} in the data; it has {names}")
        return rows

    def _on_all_ranks(
        self, z_QD: Tensor, z_ND: Tensor, alike_Q: Tensor, alike_N: Tensor, threshold: float | None
    ) -> tuple[Tensor, Tensor]:
        """Mine the negatives of all queries; the ranks take blocks of queries in turn."""
        score_QK, index_QK = z_QD.new_zeros(len(z_QD), self.k), alike_Q.new_zeros(len(z_QD), self.k)
        for first in range(rank() * BLOCK[0], len(z_QD), world() * BLOCK[0]):
            rows = slice(first, first + BLOCK[0])
            score_QK[rows], index_QK[rows] = hard_negatives(z_QD[rows], z_ND, alike_Q[rows], alike_N, self.k, threshold)
        return total_of_ranks(score_QK), total_of_ranks(index_QK)
