"""Scene-graph encoder of Structure-CLIP: knowledge triples added to a text embedding.

Letters: B samples, K triples of a sample, W tokens of an element, D width of the encoder, E width of the shared space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.towers.base import Tokens
from descant.modules.towers.heads import FirstPool, Projection
from descant.modules.towers.image import Block, key_mask
from descant.modules.towers.text import PAD, BagTower


class TripleEncoder(nn.Module):
    """Structure-CLIP's knowledge-enhanced encoder (Huang 2023, arXiv 2305.06152).

        z'_b = normalise(z_b + strength g_b),   g_b = normalise(W f(e_h + e_r - e_t)_first)

    An element (head, relation, tail) is the mean of its token embeddings. A triple is ``e_h + e_r - e_t`` as in TransE,
    which is not symmetric in head and tail. f is a transformer over the triples, pooled at the first. A sample without
    triples keeps its ``z``.

    Differs from the release: the result is normalised; hard negatives have triples too. Our reading: learned positions
    of triples, pre-norm blocks.

    Args:
        vocab: number of token ids.
        out: E.
        width: D.
        depth: number of blocks.
        heads: number of attention heads.
        triples: maximum K.
        strength: weight of the knowledge; the paper's lambda is 0.2.
        std: standard deviation of the elements' initial embeddings.

    Shapes: ``z_BE``, token ids int64 ``x_BK3W`` (id 0 is padding; a triple without tokens is absent) ``-> z'_BE``.

    >>> encoder, z_BE = TripleEncoder(vocab=9, out=4, width=8, depth=1, heads=2), F.normalize(torch.ones(2, 4), dim=1)
    >>> x_BK3W = torch.tensor([[[[5], [6], [7]]], [[[0], [0], [0]]]])
    >>> (encoder(z_BE, x_BK3W) == z_BE).all(dim=1).tolist()
    [False, True]
    """

    pad = PAD

    def __init__(
        self,
        vocab: int,
        out: int = 128,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        triples: int = 6,
        strength: float = 0.2,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.vocabulary, self.strength = vocab, strength
        self.elements = BagTower(vocab, width)
        nn.init.normal_(self.elements.embedding.weight, std=std)
        self.places_KD = nn.Parameter(torch.randn(triples, width) * (std / 2))
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.pool, self.head = FirstPool(), Projection(width, out)

    def knowledge(self, x_BK3W: Tensor) -> Tensor:
        """Compute ``g_BE`` of unit length; zeros for a sample without triples."""
        B, K = x_BK3W.shape[:2]
        if len(self.places_KD) < K:
            raise ValueError(f"triples {len(self.places_KD)}: the data has {K} a sample; raise it to {K}")
        real_BK = (x_BK3W != PAD).flatten(2).any(dim=2)
        element_BK3D = self.elements(x_BK3W.flatten(0, 2)).h_BTD.view(B, K, 3, -1)
        head_BKD, relation_BKD, tail_BKD = element_BK3D.unbind(dim=2)
        h_BKD = head_BKD + relation_BKD - tail_BKD + self.places_KD[:K]
        keys_B11K = key_mask(real_BK)
        for layer in self.layers:
            h_BKD = layer(h_BKD, keys_B11K)
        g_BE = F.normalize(promote(self.head(self.pool(Tokens(h_BKD, real_BK)))), dim=-1)
        return g_BE.masked_fill(~real_BK.any(dim=1, keepdim=True), 0.0)

    def forward(self, z_BE: Tensor, x_BK3W: Tensor) -> Tensor:
        any_B1 = (x_BK3W != PAD).flatten(1).any(dim=1, keepdim=True)
        sum_BE = F.normalize(z_BE + self.strength * self.knowledge(x_BK3W), dim=-1)
        return torch.where(any_B1, sum_BE, z_BE)
