"""How good is an answer? Scores in [0, 1] of what was said, beside what is right, or by what a network thinks of it.

Letters: B samples, M tokens said, A tokens of the right answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import AnswersQuestions
from descant.modules.tokenizers.text import EOS, PAD


@dataclass(frozen=True)
class Answers:
    """Of a batch: ``answer_ids_BM``, int64, to its end and zeros behind it; ``right_BA`` likewise, without an end; and
    the network that teaches, for those who ask it."""

    batch: Batch
    answer_ids_BM: Tensor
    right_BA: Tensor
    teacher: nn.Module

    def rows(self) -> list[tuple[list[int], list[int]]]:
        """Tokens said and right, without ends and padding."""
        both = zip(self.answer_ids_BM.tolist(), self.right_BA.tolist(), strict=True)
        return [(spoken(said), spoken(right)) for said, right in both]


def spoken(tokens: Sequence[int]) -> list[int]:
    """Tokens before the first end or padding.

    >>> spoken([7, 8, EOS, 9])
    [7, 8]
    """
    end = next((i for i, token in enumerate(tokens) if token in (EOS, PAD)), len(tokens))
    return list(tokens[:end])


class AnswerScorer(nn.Module):
    """``judge(answers)`` -> float32 scores ``[B]`` in [0, 1]."""

    def forward(self, answers: Answers) -> Tensor:
        raise NotImplementedError


class ExactMatchScorer(AnswerScorer):
    """1 where every token is right and nothing else was said, else 0."""

    def forward(self, answers: Answers) -> Tensor:
        return torch.tensor([float(said == right) for said, right in answers.rows()])


class EditDistanceScorer(AnswerScorer):
    """``1 - edits / max(M, A)``: the fewest tokens put in, taken out or exchanged that make right of what was said."""

    def forward(self, answers: Answers) -> Tensor:
        return torch.tensor([1 - edits(a, b) / max(len(a), len(b), 1) for a, b in answers.rows()])


class LikelihoodScorer(AnswerScorer):
    """``exp(mean over tokens of log p(token | picture, question))`` in the teacher's eyes, the end included.

    Nobody looks at what is right.
    """

    def forward(self, answers: Answers) -> Tensor:
        if not has(answers.teacher, AnswersQuestions):
            raise ValueError(
                f"LikelihoodScorer: {type(answers.teacher).__name__} has no answer likelihoods; VisionLanguage has"
            )
        return answers.teacher.likelihood(answers.batch, answers.answer_ids_BM).float().cpu()


def edits(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein's distance.

    >>> edits([1, 2, 3], [2, 3, 4]), edits([], [1])
    (2, 1)
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def answered_with(batch: Batch, answer_ids_BM: Tensor, answer_token: int) -> Batch:
    """The batch with other answers to the same questions, all of whose tokens, and an end, are to be learned.

    ``answer_ids_BM``: int64, to its end or padding; an answer without one gets one.
    """
    text_BT = batch.inputs["text"]
    rows = []
    for ids, said in zip(text_BT.tolist(), answer_ids_BM.tolist(), strict=True):
        asked = ids[: ids.index(answer_token) + 1] if answer_token in ids else ids
        rows.append((asked, [*spoken(said), EOS] if answer_token in ids else []))
    T = max(max((len(asked) + len(back) for asked, back in rows), default=0), 1)
    text, learned = torch.full((len(rows), T), PAD), torch.zeros(len(rows), T, dtype=torch.bool)
    for b, (asked, back) in enumerate(rows):
        text[b, : len(asked) + len(back)] = torch.tensor(asked + back)
        learned[b, len(asked) : len(asked) + len(back)] = True
    new = {"text": text.to(text_BT), "loss_mask": learned.to(text_BT.device)}
    return replace(batch, inputs={**batch.inputs, **new})
