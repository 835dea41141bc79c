"""Image-text matching as one of several objectives, with negatives drawn by similarity.

Letters: B samples, G samples on all ranks, V samples with both modalities, N pairs, D width.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch, select_rows
from descant.modules.core.dtype import promote
from descant.modules.core.errors import no_such
from descant.modules.core.host import to_device
from descant.modules.core.objective import Term
from descant.modules.core.output import Scorer
from descant.modules.core.ranks import first_row, gather
from descant.modules.core.rng import mix_N, uniform_N
from descant.modules.core.sham import Sham
from descant.modules.evaluation.metrics import wide
from descant.modules.objectives.base import Facts, TaskObjective, scatter_rows
from descant.modules.objectives.streams import Streams

#: Probability that TIP's release adds to each negative.
FLOOR = 1e-4


def matching_negatives(
    s_BG: Tensor,
    key_B: Tensor,
    valid_B: Tensor,
    u_B: Tensor,
    key_G: Tensor | None = None,
    valid_G: Tensor | None = None,
    kind_B: Tensor | None = None,
    kind_G: Tensor | None = None,
    floor: float | None = None,
) -> Tensor:
    """Draw a negative of each row by similarity, int64 ``[B]``; -1 for rows without an allowed negative.

        P(g | b) = exp(s_bg) / sum over allowed g' of exp(s_bg'),     allowed: present, other content than b, its kind

    With ``floor``, the softmax runs over all present columns, including own content, and the floor is added to each
    probability. The draw inverts the cumulative distribution: it takes the first g at which this exceeds ``u_b``. It is
    computed in float64 if the device supports it.

    Args:
        s_BG: similarities of rows to columns, divided by the temperature.
        key_B, key_G: content ids; those of the rows also serve for the columns by default.
        valid_B, valid_G: bool, marks present samples; default as for ``key``.
        kind_B, kind_G: a class that negatives share with their sample; default as for ``key``. Without both, all
            samples have the same class.
        u_B: draws in [0, 1).
        floor: such as 1e-4 in TIP's release (siyi-wind/TIP, ``cal_image_tabular_matching_loss``).

    >>> s_BG, key_B = torch.zeros(3, 3), torch.tensor([5, 6, 5])
    >>> valid_B, u_B = torch.ones(3, dtype=torch.bool), torch.tensor([0.9, 0.6, 0.1])
    >>> matching_negatives(s_BG, key_B, valid_B, u_B).tolist()
    [1, 2, 1]
    """
    key_G, valid_G = key_B if key_G is None else key_G, valid_B if valid_G is None else valid_G
    allowed_BG = (key_B[:, None] != key_G) & valid_B[:, None] & valid_G
    if kind_B is not None:
        allowed_BG &= kind_B[:, None] == (kind_B if kind_G is None else kind_G)
    # a row without negatives is uniform here, and -1 below; with minus infinity it would be nan
    dtype = wide(s_BG.device)
    among_BG = allowed_BG if floor is None else valid_B[:, None] & valid_G
    s_BG = s_BG.to(dtype).masked_fill(~among_BG, torch.finfo(dtype).min)
    share_BG = (s_BG.softmax(dim=1) + (floor or 0.0)).masked_fill(~allowed_BG, 0.0)
    total_BG = share_BG.cumsum(dim=1)
    above_BG = (total_BG > u_B.to(dtype)[:, None] * total_BG[:, -1:]) & allowed_BG
    return torch.where(allowed_BG.any(dim=1), above_BG.int().argmax(dim=1), -1)


class Match(TaskObjective):
    """Image-text matching (ALBEF) of fused pairs: a sample's own pair against one negative for each side.

        s_ij = w . first(a_i, b_j),    n_b, n'_b drawn with P ~ exp(z_b . z_g / temperature), never of b's content
        binary: value_b = (softplus(-s_bb) + softplus(s_bn) + softplus(s_n'b)) / 3
        list:   value_b = (softplus(s_bn - s_bb) + softplus(s_n'b - s_bb)) / 2          as Matching's, of two each

    A side without a negative adds zero. In training, negatives come from all ranks (their tokens are gathered with
    gradients), in evaluation from the own rank. The embeddings for the similarities are detached; another objective has
    to train them. Source: Li 2021 (arXiv 2107.07651). Its release draws among the samples of one rank, allows repeated
    content as a negative, and uses the learned temperature of its contrastive loss. Its head has two logits; here their
    difference is one score.

    Args:
        pair: two modalities, such as [image, text].
        negatives: ``similarity`` draws by similarity (ALBEF). ``floored`` does, with 1e-4 added to each probability, as
            in TIP's release. ``random`` draws uniformly.
        temperature: temperature of the similarities.
        form: form of the loss.
        sham: ``permute`` treats a random one of a sample's three pairs as its own, so that the labels carry no
            information.
        within: a target that negatives share with their sample, such as a class, which makes them hard negatives.
    """

    in_batch_negatives = True

    def __init__(
        self,
        pair: list[str],
        negatives: Literal["similarity", "floored", "random"] = "similarity",
        temperature: float = 0.07,
        form: Literal["binary", "list"] = "binary",
        sham: Literal["permute"] | None = None,
        within: str | None = None,
    ) -> None:
        super().__init__()
        if not len(set(pair)) == len(pair) == 2:
            raise ValueError(f"pair: {pair}: not two modalities")
        if not temperature > 0:
            raise ValueError(f"temperature {temperature:g}: must be above 0")
        self.pair, self.negatives, self.temperature, self.form = (pair[0], pair[1]), negatives, temperature, form
        self.sham = Sham(sham)
        self.within = within

    def build(self, facts: Facts) -> Self:
        self.score = nn.Linear(facts.fused_width(*self.pair), 1)
        self.reads, self.fuses = self.pair, (self.pair,)
        return self

    def negative_rows(self, streams: Streams, batch: Batch, across: bool) -> tuple[Tensor, Tensor]:
        """Choose negatives, int64 ``[B]`` each: the row of b for a sample's a, and of a for its b; -1 for none."""
        gather_rows = gather if across else lambda x: x
        (a, b), valid_B = self.pair, batch.both(*self.pair)
        kind_B = torch.zeros_like(batch.content_id) if self.within is None else self.kinds(batch)
        every_G = gather_rows(torch.stack([batch.content_id, valid_B.long(), batch.rng_seed, kind_B], dim=1))
        key_G, valid_G, seed_G, kind_G = every_G.unbind(dim=1)
        # columns in the order of their random keys: a sample's negative does not depend on how the batch is divided
        order_G = seed_G.argsort(stable=True)
        columns = key_G[order_G], valid_G[order_G].bool()
        rows = []
        for mine, other in ((a, b), (b, a)):
            dtype = wide(batch.device)
            s_BG = valid_B.new_zeros(len(batch), len(key_G), dtype=dtype)
            if self.negatives != "random":
                z_BD, z_GD = (streams.latent(m).detach().to(dtype) for m in (mine, other))
                s_BG = z_BD @ gather_rows(z_GD)[order_G].T / self.temperature
            u_B = to_device(uniform_N(batch.rng_seed, f"match/{other}"), batch.device)
            floor = FLOOR if self.negatives == "floored" else None
            at_B = matching_negatives(s_BG, batch.content_id, valid_B, u_B, *columns, kind_B, kind_G[order_G], floor)
            rows.append(torch.where(at_B >= 0, order_G[at_B.clamp(min=0)], -1))
        return rows[0], rows[1]

    def kinds(self, batch: Batch) -> Tensor:
        if self.within not in batch.targets:
            raise ValueError(f"within: {no_such(str(self.within), batch.targets)}")
        return batch.targets[self.within]

    def score_pairs(self, streams: Streams, batch: Batch, across: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score own pairs, ``s_V``, and negatives of both sides, ``s_2V``; also return ``has_2V`` and rows ``[V]``."""
        fused, row_V = streams.fuse_own_pairs(*self.pair)
        negative_b_B, negative_a_B = self.negative_rows(streams, batch, across)
        own_V, V = row_V + (first_row(len(batch)) if across else 0), len(row_V)
        sample_2V = select_rows(row_V, to_device(torch.arange(V).repeat(2), batch.device))
        negative_2V = torch.cat([negative_b_B[row_V], negative_a_B[row_V]])
        at_2V = negative_2V.clamp(min=0)
        row_2V, column_2V = torch.cat([own_V, at_2V[V:]]), torch.cat([at_2V[:V], own_V])
        with streams.rows(row_V):
            s_V = promote(self.score(fused.first_ND))[:, 0]
        return s_V, self.scored_pairs(streams, row_2V, column_2V, sample_2V, across), negative_2V >= 0, row_V

    def scored_pairs(
        self, streams: Streams, row_N: Tensor, column_N: Tensor, sample_N: Tensor, across: bool = False
    ) -> Tensor:
        """Score pairs, ``s_N``; arguments as for :meth:`Streams.first`."""
        h_ND = streams.first(*self.pair, row_N, column_N, sample_N, across)
        with streams.rows(sample_N):
            return promote(self.score(h_ND))[:, 0]

    def forward(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        s_V, s_2V, has_2V, row_V = self.score_pairs(streams, batch, across=self.training)
        s_V, s_2V, has_2V = self._roles(s_V, s_2V, has_2V, select_rows(batch.rng_seed, row_V))
        binary = self.form == "binary"
        loss_2V = F.softplus(s_2V if binary else s_2V - s_V.repeat(2))
        loss_V = torch.where(has_2V, loss_2V, 0.0).view(2, -1).sum(dim=0)
        loss_V = (F.softplus(-s_V) + loss_V) / 3 if binary else loss_V / 2
        value_B = scatter_rows(loss_V, row_V, len(batch))
        return {"": Term(value_B, valid=batch.both(*self.pair), given=self.pair)}

    def _roles(self, s_V: Tensor, s_2V: Tensor, has_2V: Tensor, draw_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores of own pairs and negatives, and a mask of existing ones; the sham permutes their roles."""
        draw_3V = torch.stack([torch.from_numpy(mix_N(draw_V, "match/role", k)) for k in range(3)], dim=1)
        has_3V = torch.cat([torch.ones_like(has_2V[: len(s_V)]), has_2V])
        s_3V, has_3V = (
            self.sham.within_groups(x_3V.view(3, -1).T.flatten(), draw_3V.flatten(), 3).view(-1, 3).T.flatten()
            for x_3V in (torch.cat([s_V, s_2V]), has_3V)
        )
        return s_3V[: len(s_V)], s_3V[len(s_V) :], has_3V[len(s_V) :]

    def scores(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        """Compute ``accuracy``: share of a sample's negatives that score below its own pair; ties count half."""
        s_V, s_2V, has_2V, row_V = self.score_pairs(streams, batch, across=False)
        better_2V = torch.where(s_V.repeat(2) > s_2V, 1.0, torch.where(s_V.repeat(2) == s_2V, 0.5, 0.0))
        count_V = has_2V.view(2, -1).sum(dim=0)
        value_V = torch.where(has_2V, better_2V, 0.0).view(2, -1).sum(dim=0) / count_V.clamp(min=1)
        value_B, count_B = (scatter_rows(x_V, row_V, len(batch)) for x_V in (value_V, count_V))
        return {"accuracy": Term(value_B, valid=batch.both(*self.pair) & (count_B > 0))}

    def scorers(self, streams: Streams) -> dict[str, Scorer]:
        return {"": lambda row_N, column_N: self.scored_pairs(streams, row_N, column_N, row_N)}

    def modalities_by_part(self) -> dict[str, tuple[str, str]]:
        return {"": self.pair}
