"""Preference pairs from stored rollouts: a correct and a wrong answer of the model to each question.

Letters: N questions, G answers to each, B samples of a batch, M tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.tasks.rollout_buffer import RolledDialogues, StoredRollouts
from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such
from descant.modules.core.rng import uniform_NK
from descant.modules.tokenizers.text import PAD


def correct_and_wrong(correct_NG: np.ndarray, u_NG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return one correct answer and one other, int64 ``[N]`` each, those of the least draw; -1 if there is none.

    >>> correct_NG = np.array([[True, False, True], [False, False, False]])
    >>> [x_N.tolist() for x_N in correct_and_wrong(correct_NG, np.array([[0.9, 0.5, 0.1], [0.3, 0.2, 0.4]]))]
    [[2, -1], [1, 1]]
    """
    some = (correct_NG, ~correct_NG)
    first_N, second_N = (np.where(x.any(axis=1), np.where(x, u_NG, 2.0).argmin(axis=1), -1) for x in some)
    return first_N, second_N


class RolloutPairSet(BatchDataset):
    """A pair for each stored question, drawn anew at each visit; a question without a wrong answer is absent."""

    def __init__(self, data: RolloutPairs) -> None:
        super().__init__(data.source.seed)
        self.data = data

    def __len__(self) -> int:
        return self.data.source.items * (self.data.source.keep or 0)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        stored, at_N = self.data.rollouts, index_N % len(self.data.rollouts.problems)
        wrong_N = torch.from_numpy(~self.data.correct_NG[at_N].all(axis=1))
        present = self.data.source.asked_set(stored.problems).present(at_N)
        return {modality: here_N & wrong_N for modality, here_N in present.items()}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        data, source, stored = self.data, self.data.source, self.data.rollouts
        at_B = index_B % len(stored.problems)
        rows = source.asked_set(stored.problems).rows(at_B, draw_B)
        prompts, references = [], []
        for ids, mask in zip(rows.inputs["text"].tolist(), rows.inputs["loss_mask"].tolist(), strict=True):
            prompts.append(ids[: ids.index(source.answer_token) + 1])
            references.append([i for i, learned in zip(ids, mask, strict=True) if learned][:-1])
        names = [f"pair/{g}" for g in range(source.group)]
        good_B, bad_B = correct_and_wrong(data.correct_NG[at_B], uniform_NK(draw_B, names).numpy())
        row_B = at_B * source.group + good_B.clip(min=0)
        text_BT, loss_mask_BT = source.sampled_rows(prompts, *stored.answers(row_B))
        own_B = torch.from_numpy(good_B >= 0)[:, None]
        for_BT, for_mask_BT = source.dialogue_rows(prompts, references)  # used if no answer of the model is correct
        rows.inputs["text"] = torch.where(own_B, text_BT, for_BT)
        rows.inputs["loss_mask"] = torch.where(own_B, loss_mask_BT, for_mask_BT)
        wrong = source.sampled_rows(prompts, *stored.answers(at_B * source.group + bad_B.clip(min=0)))
        rows.inputs |= dict(zip(("text_neg", "loss_mask_neg"), wrong, strict=True))
        return rows


class RolloutPairs(DataModule):
    """Pairs from the rollouts that an earlier stage kept, for DPO (GSPO, then DPO, as in Uni-MoE-2.0-Omni).

    Chosen is a correct answer of the model, or that of the data if the model has none. Rejected is one of the model's
    wrong answers; a question that it always answered correctly has no pair. The answers are drawn at each visit. The
    images are those of the rollout. Use it only in a StagedData, which evaluates by another stage.

    Source: Li 2025 (arXiv 2511.12609), where a stronger model writes missing answers, and a judge reads the reasoning
    of correct ones; our reading, no code of this was released.

    Args:
        of: the stage with the rollouts; its data keeps some.
        kwargs: arguments of every data module.
    """

    def __init__(self, of: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.num_workers or self.drop:
            raise ValueError("num_workers, drop: workers would not see new rollouts, and pairs have all modalities")
        self.of = of
        self._source: list[RolledDialogues] = []
        self._judged: tuple[StoredRollouts, np.ndarray] | None = None

    def link(self, name: str, stages: Mapping[str, DataModule]) -> None:
        """Find the rollouts; ``name``: name of this stage, ``stages``: the data of all stages."""
        earlier = list(stages)[: list(stages).index(name)]
        source = stages.get(self.of)
        if self.of not in earlier:
            raise ValueError(f"stage {name!r}: of {self.of!r}: {no_such(self.of, earlier)}")
        if not isinstance(source, RolledDialogues) or source.keep is None:
            raise ValueError(f"stage {name!r}: of {self.of!r}: its data keeps no rollouts; set its keep, such as 8")
        self._source = [source]

    @property
    def source(self) -> RolledDialogues:
        if not self._source:
            raise ValueError("RolloutPairs: its rollouts are those of another stage; use it in StagedData")
        return self._source[0]

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.source.modalities

    @property
    def length(self) -> int:
        return self.source.length

    @property
    def images(self) -> int:
        return self.source.images

    @property
    def rollouts(self) -> StoredRollouts:
        if self.source.stored is None:
            raise ValueError(f"RolloutPairs: stage {self.of!r} has no rollouts yet")
        return self.source.stored

    @property
    def correct_NG(self) -> np.ndarray:
        """Return which answers are correct, among those that ended."""
        if self._judged is None or self._judged[0] is not self.rollouts:
            self._judged = self.rollouts, self._judge()
        return self._judged[1]

    def _judge(self) -> np.ndarray:
        source, stored = self.source, self.rollouts
        zero_N = np.zeros(len(stored.problems), dtype=np.int64)
        answers = source.asked_set(stored.problems).rows(np.arange(len(zero_N)), zero_N).targets["answer"].tolist()
        references = [[i for i in ids if i != PAD] for ids in answers]
        ids_R, length_R, ended_R = stored.answers(np.arange(len(zero_N) * source.group))
        right = [
            bool(ended) and source.is_right(ids[: length - 1].tolist(), references[r // source.group])
            for r, (ids, length, ended) in enumerate(zip(ids_R, length_R, ended_R, strict=True))
        ]
        return np.array(right).reshape(-1, source.group)

    def training_set(self) -> BatchDataset:
        return RolloutPairSet(self)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return self.source.evaluation_sets(stage)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.source.on_after_batch_transfer(batch, dataloader_idx)
