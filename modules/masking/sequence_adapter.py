"""Adapter of masked models for texts that are predicted in order. Letters as in ``adapters.py``."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import derive, host_copy, with_host_copy
from descant.modules.masking.adapters import Arranged
from descant.modules.masking.discrete_adapters import TokenAdapter
from descant.modules.masking.spans import Spans, with_sentinels


class SequenceAdapter(TokenAdapter):
    """Adapter for a text's token ids, int64 ``[B, T]``, whose hidden spans are predicted in order.

    The encoder receives visible tokens and one sentinel per hidden span. The decoder receives the sentinel of each span
    and its tokens, and predicts the next one each time (:func:`descant.modules.masking.spans.with_sentinels`). The ids
    of sentinels follow the vocabulary. The model needs a decoder for ordered targets, such as AnyToAnyDecoder.
    Source: T5; 4M (arXiv 2312.06647).

    Args:
        vocab: C. length: T.
        pad: id of the padding, at the end of a text.

    >>> adapter = SequenceAdapter(vocab=9, length=4)
    >>> adapter.vocabulary, adapter.output_size, adapter.grid
    (9, 12, (5,))
    """

    ordered = True

    def __init__(self, vocab: int, length: int, pad: int = 0) -> None:
        super().__init__(vocab, length, pad)
        self.grid, self.length = (length + 1,), length
        self.sentinels = (length + 1) // 2 + 1

    @property
    def output_size(self) -> int:
        return self.vocab + self.sentinels

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.table = nn.Embedding(self.output_size, width)
        nn.init.normal_(self.table.weight, std=0.02)
        if out:
            self.outward, self.follows = nn.Linear(out, self.output_size), nn.Embedding(self.output_size, out)
            nn.init.normal_(self.follows.weight, std=0.02)

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != self.length:
            raise ValueError(f"input of {x.shape[1]} tokens: this adapter takes {self.length}")
        x_BT = derive(lambda ids_BT: F.pad(ids_BT, (0, 1), value=self.pad), x)
        return x_BT[..., None], derive(lambda ids_BT: ids_BT != self.pad, x_BT)

    def arrange(
        self, x_BTP: Tensor, real_BT: Tensor, visible_BT: Tensor, target_BT: Tensor, loss_BT: Tensor
    ) -> Arranged:
        masks = (real_BT, visible_BT, target_BT, loss_BT)
        spans = with_sentinels(x_BTP.squeeze(2), *masks, first=self.vocab)

        def on_host() -> Spans:  # the used slots determine shapes
            real_BT, visible_BT, target_BT, loss_BT = (host_copy(mask_BT) for mask_BT in masks)
            return with_sentinels(real_BT.long(), real_BT, visible_BT, target_BT, loss_BT, self.vocab)

        visible_BS = with_host_copy(spans.visible_BS, lambda: on_host().visible_BS)
        target_BS = with_host_copy(spans.target_BS, lambda: on_host().target_BS)
        input_BSP, given_BSP, wanted_BSP = (x[..., None] for x in (spans.input_BS, spans.given_BS, spans.wanted_BS))
        return Arranged(input_BSP, visible_BS, wanted_BSP, target_BS, spans.loss_BS, given_BSP)

    def to_input_shape(self, x_BTP: Tensor) -> Tensor:
        return x_BTP.squeeze(2)[:, : self.length]

    def embed_previous(self, x_NP: Tensor) -> Tensor:
        """Embed tokens for the decoder, ``[N, E]``."""
        return self.follows(x_NP.squeeze(1))
