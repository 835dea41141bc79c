"""Sampling of words and of whole blocks of codes. Letters: R rows, S rows still computed, N tokens of one, V ids."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from descant.modules.core.errors import no_such
from descant.modules.language.generate import Sampling
from descant.modules.tokenizers.unified import TEXT, UnifiedVocabulary


@dataclass(frozen=True, kw_only=True)
class BlockSampling(Sampling):
    """Sampling of answers that always parse: words, and whole blocks of codes.

        p(token | before) = softmax(logits / temperature) of the ids that may follow, 0 of others

    :meth:`UnifiedVocabulary.allowed_ids` decides which ids may follow; prompts end outside of blocks. Log-probabilities
    are those of the model, over all ids, as in :class:`Sampling`.

    Args:
        vocabulary: of text and codes. only: modalities of an answer; all if not given.

    >>> from descant.modules.tokenizers.unified import CodeFormat
    >>> BlockSampling(vocabulary=UnifiedVocabulary(264, {"image": CodeFormat((2,), 8)}), only=("images",))
    Traceback (most recent call last):
    ValueError: only: 'images': no such name; did you mean image? (known: text, image)
    """

    vocabulary: UnifiedVocabulary
    only: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [TEXT, *self.vocabulary.formats]
        wrong = next((m for m in self.only or () if m not in known), None)
        if wrong is not None:
            raise ValueError(f"only: {wrong!r}: {no_such(wrong, known)}")
        if self.only is not None and not self.only:
            raise ValueError(f"only: none; of {', '.join(known)}")

    def allowed_ids(self, token_RN: Tensor, row_S: Tensor, place: int) -> Tensor:
        left = token_RN.shape[1] - place
        allowed_SV = self.vocabulary.allowed_ids(token_RN[row_S, :place], left, self.only)
        if not allowed_SV.any(dim=1).all():
            formats = self.vocabulary.formats
            needs = ", ".join(f"{m} {formats[m].length + 2 if m in formats else 1}" for m in self.only or formats)
            raise ValueError(f"token {place}: no id fits into the {left} that are left; tokens of a part: {needs}")
        return allowed_SV
