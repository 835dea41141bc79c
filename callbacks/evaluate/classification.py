"""Classification from embeddings: zero-shot, k nearest neighbours, linear probe.

Letters: N rows of a set or bank, Q queries, D width, C classes, P prompts per class, B, T prompts and their tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, Rows, ScheduledEvaluator, Values, embed
from descant.modules.core.batch import Batch
from descant.modules.core.errors import require_value
from descant.modules.core.host import to_device
from descant.modules.core.rng import global_seed, uniform_N
from descant.modules.evaluation.items import Items
from descant.modules.evaluation.metrics import balanced_accuracy, fit_logistic, knn_scores, wide
from descant.modules.evaluation.shares import share_rows

PROMPTS = 512  # embedded at once
#: Set -> ``z_ND, label_N, key_N`` of its labelled rows.
Labelled = dict[str, tuple[Tensor, Tensor, Tensor]]
#: (set, end of the key) -> accuracy of its rows.
Accuracies = dict[tuple[str, str], Items]


class _Labelled(EmbeddingEvaluator):
    """Base of the evaluations that predict a class, the data's ``target``, from embeddings of ``modality``.

    Args:
        target: the data's target that holds the class.
        modality: the modality whose embeddings are classified.
    """

    kind: str

    def __init__(self, target: str, modality: str, **schedule: Any) -> None:
        super().__init__(**schedule)
        self.target, self.modality = target, modality

    def _key(self, name: str, metric: str) -> str:
        modality = "" if self.modality == "image" else f"_{self.modality}"
        return f"{name}/{self.kind}_{self.target}{modality}_{metric}"

    def _labelled_sets(self, sets: dict[str, Rows]) -> Labelled:
        """Return ``z_ND, label_N, key_N`` by set, without sets (except the bank) that lack the target or its labels."""
        for rows in sets.values():
            self.require_embedding(rows, self.modality)
        self.require_target(self.target, (name for rows in sets.values() for name in rows.targets))
        labelled = {
            name: rows.labelled_rows(self.modality, self.target)
            for name, rows in sets.items()
            if self.target in rows.targets
        }
        return {name: rows for name, rows in labelled.items() if len(rows[1]) or name == "bank"}


class ZeroShot(_Labelled):
    """Zero-shot classification by prompts: the weight of a class is the mean embedding of its prompts.

        w_c = normalise(mean over p of z_text(prompt_cp)),   prediction = argmax over c of z . w_c

    The data module's ``prompts(target)`` gives the prompts, which are embedded once per evaluation. Keys:
    ``{set}/zeroshot_{target}_top1``, ``_top5`` (with more than five classes) and ``_balanced``, the mean recall of the
    classes that occur. ``_{modality}`` follows the target if the modality is not image.

    Args:
        prompts: the modality of the prompts.

    >>> ZeroShot("group").target
    'group'
    """

    kind = "zeroshot"
    needs_of_data = ("prompts",)

    def __init__(self, target: str, modality: str = "image", prompts: str = "text") -> None:
        super().__init__(target, modality)
        self.prompts = prompts

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._ids_CPT: Tensor = trainer.datamodule.prompts(self.target)[0]  # type: ignore[attr-defined]

    def classifier(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        """Compute ``w_CD``: one unit-length row per class."""
        ids_CPT = self._ids_CPT.to(pl_module.device)
        embedded = []
        for ids_BT in ids_CPT.flatten(0, 1).split(PROMPTS):
            present = {self.prompts: torch.ones(len(ids_BT), dtype=torch.bool, device=ids_BT.device)}
            batch = Batch(inputs={self.prompts: ids_BT}, present=present)
            embedded.append(embed(trainer, pl_module, batch)[self.prompts].float())
        z_CPD = torch.cat(embedded).reshape(*ids_CPT.shape[:2], -1)
        return F.normalize(z_CPD.mean(1), dim=-1)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        values: dict[str, Tensor | Items] = {}
        w_CD = self.classifier(trainer, pl_module)
        for name, (z_ND, label_N, key_N) in self._labelled_sets(sets).items():
            score_NC, classes = z_ND @ w_CD.T, len(w_CD)
            values[self._key(name, "top1")] = _top1(score_NC, label_N, key_N)
            if classes > 5:
                top5 = multiclass_accuracy(score_NC, label_N, classes, average="micro", top_k=5)
                values[self._key(name, "top5")] = top5
            values[self._key(name, "balanced")] = balanced_accuracy(score_NC.argmax(1), label_N, classes)
        return values


class Banked(_Labelled, ScheduledEvaluator):
    """Base of the classifiers fitted on the data module's bank: training samples, preprocessed as in evaluation."""

    needs_of_data = ("bank_dataloader",)
    identity: ClassVar[tuple[str, ...]] = ("target", "modality")

    def score(self, z_ND: Tensor, label_N: Tensor, index_N: Tensor, sets: Labelled, classes: int) -> Accuracies:
        """Compute the accuracy by set, from the bank's ``z_ND``, ``label_N`` and ids of samples."""
        raise NotImplementedError

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        labelled = self._labelled_sets(sets)
        bank = self.bank(trainer, pl_module)
        z_bank_ND, label_N, _ = self._labelled_sets({"bank": bank})["bank"]
        if len(label_N) == 0:
            return {}
        index_N = bank.index[bank.present[self.modality] & (bank.targets[self.target] >= 0)]
        classes = int(max(label.max() for label in (label_N, *(label for _, label, _ in labelled.values())))) + 1
        values = self.score(z_bank_ND, label_N, index_N, labelled, classes)
        return {self._key(name, "top1") + end: value for (name, end), value in values.items()}


class KNN(Banked):
    """Weighted k-nearest-neighbour accuracy of embeddings against the bank (the protocol of DINO).

        prediction = argmax over c of  sum over the k nearest n with label_n = c of exp(z . z_n / temperature)

    Key: ``{set}/knn_{target}_top1``, with ``_{modality}`` after the target if the modality is not image.

    Args:
        k: neighbours that vote.
        temperature: temperature of their weights.

    >>> KNN("group", k=0)
    Traceback (most recent call last):
    ValueError: KNN: k 0 is no number of neighbours; 1 is the least
    """

    kind = "knn"
    identity = ("target", "modality", "k")

    def __init__(
        self, target: str, k: int = 20, temperature: float = 0.07, modality: str = "image", every: int = 1
    ) -> None:
        super().__init__(target, modality, every=every)
        require_value(k >= 1, f"KNN: k {k} is no number of neighbours; 1 is the least")
        require_value(temperature > 0, f"KNN: temperature {temperature} is not positive")
        self.k, self.temperature = k, temperature

    def score(self, z_ND: Tensor, label_N: Tensor, index_N: Tensor, sets: Labelled, classes: int) -> Accuracies:
        return {
            (name, ""): _top1(knn_scores(z_QD, z_ND, label_N, classes, self.k, self.temperature), label_Q, key_Q)
            for name, (z_QD, label_Q, key_Q) in sets.items()
        }


class LinearProbe(Banked):
    """Linear probing: accuracy of multinomial logistic regression, fitted on the bank's embeddings.

        W, b = argmin  mean_n cross_entropy(W x_n + b, label_n) + l2 / 2 * ||W||^2,   x = (z - mean) / std

    It is fitted by L-BFGS in float64, on features standardised by the bank. Key: ``{set}/probe_{target}_top1``,
    with ``_{modality}`` after the target if the modality is not image.

    With ``shares`` below 1 it is also fitted on that share of the bank's labels, ``..._top1@0.1``. The labels are
    stratified by class, with at least one of each, nested, and drawn by the run's seed and the ids of the samples.
    Features are standardised by the whole bank, which needs no label. Source: the shares of SimCLR (Chen 2020, arXiv
    2002.05709).

    Args:
        l2: strength of the penalty on the weights.
        shares: shares of the labels; all labels if not given.

    >>> LinearProbe("group", shares=[0.1, 10])
    Traceback (most recent call last):
    ValueError: LinearProbe: shares: 10 is not above 0 and at most 1, such as 0.1
    """

    kind = "probe"
    identity = ("target", "modality", "l2")

    def __init__(
        self,
        target: str,
        modality: str = "image",
        l2: float = 1e-3,
        every: int = 1,
        shares: list[float] | None = None,
    ) -> None:
        super().__init__(target, modality, every=every)
        require_value(l2 >= 0, f"LinearProbe: l2 {l2} is negative")
        self.l2, self.shares = l2, [1.0] if shares is None else shares
        for share in self.shares or [0.0]:
            require_value(0 < share <= 1, f"LinearProbe: shares: {share:g} is not above 0 and at most 1, such as 0.1")

    def score(self, z_ND: Tensor, label_N: Tensor, index_N: Tensor, sets: Labelled, classes: int) -> Accuracies:
        x_ND = z_ND.to(wide(z_ND.device))
        std_D, mean_D = torch.std_mean(x_ND, dim=0, correction=0)
        std_D = std_D.where(std_D > 0, torch.ones_like(std_D))  # a constant feature becomes 0
        x_ND = (x_ND - mean_D) / std_D
        draw_N = to_device(uniform_N(index_N, "probe/shares", global_seed()), x_ND.device)
        standard = {name: (z_QD.to(x_ND) - mean_D) / std_D for name, (z_QD, _, _) in sets.items()}
        scores = {}
        for share in self.shares:
            rows_R, end = share_rows(label_N, draw_N, share), "" if share == 1 else f"@{share:g}"
            w_CD, b_C = fit_logistic(x_ND[rows_R], label_N[rows_R], classes, self.l2)
            for name, (_, label_Q, key_Q) in sets.items():
                scores[name, end] = _top1(standard[name] @ w_CD.T + b_C, label_Q, key_Q)
        return scores


def _top1(score_NC: Tensor, label_N: Tensor, key_N: Tensor) -> Items:
    return Items((score_NC.argmax(dim=1) == label_N).float(), key_N)
