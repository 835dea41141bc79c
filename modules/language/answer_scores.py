"""Scores in [0, 1] of generated answers: exact match, edit distance, or likelihood under a teacher.

Letters: B samples, M tokens of a generated answer, A tokens of the reference answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchmetrics.functional.text import edit_distance

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import AnswersQuestions
from descant.modules.tokenizers.text import EOS, PAD


@dataclass(frozen=True)
class Answers:
    """Generated answers of a batch, their references, and the teacher network.

    ``answer_ids_BM``: int64, zeros after the end. ``right_BA``: the references, without an end.
    """

    batch: Batch
    answer_ids_BM: Tensor
    right_BA: Tensor
    teacher: nn.Module

    def rows(self) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of each answer and of its reference, without end and padding."""
        pairs = zip(self.answer_ids_BM.tolist(), self.right_BA.tolist(), strict=True)
        return [(tokens_before_end(answer), tokens_before_end(reference)) for answer, reference in pairs]


def tokens_before_end(tokens: Sequence[int]) -> list[int]:
    """Return the tokens before the first end or padding.

    >>> tokens_before_end([7, 8, EOS, 9])
    [7, 8]
    """
    end = next((i for i, token in enumerate(tokens) if token in (EOS, PAD)), len(tokens))
    return list(tokens[:end])


class AnswerScorer(nn.Module):
    """Base of answer scores: ``scorer(answers) -> score_B``, float32 in [0, 1]."""

    def forward(self, answers: Answers) -> Tensor:
        raise NotImplementedError


class ExactMatchScorer(AnswerScorer):
    """Exact match: 1 if all tokens equal the reference's, otherwise 0."""

    def forward(self, answers: Answers) -> Tensor:
        return torch.tensor([float(answer == reference) for answer, reference in answers.rows()])


class EditDistanceScorer(AnswerScorer):
    """Levenshtein similarity of token sequences: ``1 - edits / max(M, A)``."""

    def forward(self, answers: Answers) -> Tensor:
        pairs = answers.rows()
        texts = ([_text(pair[side]) for pair in pairs] for side in (0, 1))
        length_B = torch.tensor([max(len(answer), len(reference), 1) for answer, reference in pairs])
        return (1 - edit_distance(*texts, reduction="none").double() / length_B).float()


class LikelihoodScorer(AnswerScorer):
    """Teacher likelihood ``exp(mean over tokens of log p(token | image, question))``, end included, no reference."""

    def forward(self, answers: Answers) -> Tensor:
        if not has(answers.teacher, AnswersQuestions):
            raise ValueError(
                f"LikelihoodScorer: {type(answers.teacher).__name__} scores no answers; VisionLanguage does"
            )
        return answers.teacher.likelihood(answers.batch, answers.answer_ids_BM).float().cpu()


def _text(tokens: Sequence[int]) -> str:
    """Write token ids as characters, which torchmetrics compares; surrogates, which are not text, are skipped."""
    return "".join(chr(token if token < 0xD800 else token + 0x800) for token in tokens)


def answered_with(batch: Batch, answer_ids_BM: Tensor, answer_token: int) -> Batch:
    """Replace the answers of a batch to its questions; the loss mask covers all their tokens, and the end.

    ``answer_ids_BM``: int64, read up to an end or padding; a missing end is added.
    """
    text_BT = batch.inputs["text"]
    rows = []
    for ids, answer in zip(text_BT.tolist(), answer_ids_BM.tolist(), strict=True):
        if answer_token in ids:
            rows.append((ids[: ids.index(answer_token) + 1], [*tokens_before_end(answer), EOS]))
        else:
            rows.append((ids, []))
    T = max(max((len(question) + len(answer) for question, answer in rows), default=0), 1)
    text, loss_mask = torch.full((len(rows), T), PAD), torch.zeros(len(rows), T, dtype=torch.bool)
    for b, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        text[b, :end] = torch.tensor(question + answer)
        loss_mask[b, len(question) : end] = True
    new = {"text": text.to(text_BT), "loss_mask": loss_mask.to(text_BT.device)}
    return replace(batch, inputs={**batch.inputs, **new})
