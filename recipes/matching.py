"""Image-text matching: a cross-encoder that scores pairs of two modalities.

Claim: a cross-encoder ranks better than a dual encoder, at the cost of a forward pass for every pair.

    s_ij = cross(tower_a(x_i), tower_b(x_j))                 tokens of both in one transformer, and a number
    loss = mean over b of (CE(s_b., own) + CE(s_.b, own)) / 2        over its own and `negatives` others, both ways

The samples that have both modalities form a random circle, and a sample's others are the next ones on it. So each
scored pair serves both the list of its image and the list of its text. The rankings train dual encoders (DCD).
Source: image-text matching as in ALBEF (Li 2021, arXiv 2107.07651), with lists instead of single pairs.
Letters: B samples, V of them with both modalities, K entries of a list, N pairs, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.dtype import promote
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.objective import Term, held_out_losses
from descant.modules.core.output import Output, Scorer
from descant.modules.core.rng import mix_N
from descant.modules.core.rows import RunningRows
from descant.modules.fusion.cross_encoder import CrossEncoder
from descant.modules.towers import Tokens, Towers
from descant.recipes.base.recipe import Recipe


class Matching(Recipe):
    """Cross-encoder of two modalities (image-text matching).

    Args:
        towers: two towers.
        cross: cross-encoder over the tokens of both.
        negatives: K - 1, the number of others in a list; fewer if fewer samples have both modalities.
    """

    in_batch_negatives = True
    #: Warning at the start of a run on several ranks; pairs across ranks would need all tokens of all ranks.
    by_rank = "pairs a sample with others of its rank"

    def __init__(self, towers: Towers, cross: CrossEncoder, negatives: int = 7, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if len(towers) != 2:
            raise ValueError(f"towers: {', '.join(towers)}: a match is of two modalities")
        if self.step.chunks > 1:
            raise ValueError(f"chunks {self.step.chunks}: pairs of all samples are scored at once; only 1")
        if negatives < 1:
            raise ValueError(f"negatives {negatives}: 1 is the least")
        self.towers, self.modalities, self.negatives = towers, tuple(towers), negatives
        a, b = towers
        self.pair, self.name = (a, b), f"{a}-{b}"
        self.pairs = {self.name: self.pair}
        self.cross = cross.build(towers.width(a), towers.width(b))

    # who fits whom ------------------------------------------------------------------------------------------------

    def tokens(self, batch: Batch, modality: str) -> Tokens:
        """Compute the tokens of all rows; the mask marks those of absent samples as not real."""
        x, tower = batch.inputs[modality], self.towers[modality]
        rows = RunningRows(batch.present[modality], x.device)
        with rows.running(tower, self.row_tracker):
            h_RTD, mask_RT = tower(rows.take(x))
        return Tokens(rows.put(h_RTD), rows.put(mask_RT))

    def scorers(self, batch: Batch) -> dict[str, Scorer]:
        a, b = (self.tokens(batch, m) for m in self.pair)
        return {self.name: lambda row_N, column_N: self.cross(a, b, row_N, column_N)}

    def lists(self, batch: Batch, pairs: dict[str, Scorer]) -> tuple[Tensor, Tensor]:
        """Score image ``circle_V[v]`` with the text k places on, its own first: return ``s_VK`` and ``circle_V``."""
        scorer = pairs[self.name]
        here_V = host_copy(batch.both(*self.pair)).nonzero()[:, 0]
        turn_V = torch.from_numpy(mix_N(host_copy(batch.rng_seed)[here_V], "match"))
        circle_V = to_device(here_V[turn_V.argsort(stable=True)], batch.device)
        V = len(circle_V)
        K = min(self.negatives + 1, V)
        place_K = torch.arange(K, device=circle_V.device)
        column_VK = circle_V[(torch.arange(V, device=circle_V.device)[:, None] + place_K) % max(V, 1)]
        row_VK = circle_V[:, None].expand(V, K)
        s_VK = promote(scorer(row_VK.flatten(), column_VK.flatten())).view(V, K)
        same_VK = (batch.content_id[row_VK] == batch.content_id[column_VK]) & (place_K > 0)
        return s_VK.masked_fill(same_VK, -torch.inf), circle_V

    # training -----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        pairs = self.scorers(batch)
        return Output({self.name: self._term(*self.lists(batch, pairs), batch)}, pairs=pairs)

    def _term(self, s_VK: Tensor, circle_V: Tensor, batch: Batch) -> Term:
        """Compute the loss over the lists of each image and of each text."""
        V, K = s_VK.shape
        place_K = torch.arange(K, device=s_VK.device)
        row_VK = (torch.arange(V, device=s_VK.device)[:, None] - place_K) % max(V, 1)
        of_text_VK = s_VK[row_VK, place_K.expand(V, K)]
        log_VK = s_VK.log_softmax(dim=1) + of_text_VK.log_softmax(dim=1)
        loss_V = -log_VK[:, 0] / 2 if K else s_VK.sum(dim=1)
        value_B = s_VK.new_zeros(len(batch)).index_put((circle_V,), loss_V)
        return Term(value_B, valid=batch.both(*self.pair), given=self.pair)

    # evaluation ---------------------------------------------------------------------------------------------------

    def scores(self, batch: Batch) -> dict[str, Term]:
        """Return ``loss`` and ``accuracy``: whether an image's own text scores best in its list; a tie counts half."""
        s_VK, circle_V = self.lists(batch, self.scorers(batch))
        above_V = (s_VK[:, 1:] > s_VK[:, :1]).any(dim=1)
        equal_V = (s_VK[:, 1:] == s_VK[:, :1]).any(dim=1)
        right_V = torch.where(above_V, 0.0, torch.where(equal_V, 0.5, 1.0))
        value_B = right_V.new_zeros(len(batch)).index_put((circle_V,), right_V)
        accuracy = Term(value_B, valid=batch.both(*self.pair))
        return {"accuracy": accuracy, **held_out_losses({self.name: self._term(s_VK, circle_V, batch)})}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return {"scores": self.scores(batch)}
