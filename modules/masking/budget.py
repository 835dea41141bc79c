"""Token budgets over modalities, as in MultiMAE and 4M.

Letters: B samples, T tokens of a modality, M modalities, U tokens of all modalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from descant.modules.core.rng import mix_N
from descant.modules.masking.corruptions import Corruption, Grid, Masks, last, noise, ranks, split_by_modality


class TokenBudget(Corruption):
    """Dirichlet token budget (MultiMAE, arXiv 2204.01678): a fixed number of visible tokens, randomly divided among
    modalities.

        share_b ~ Dirichlet(alpha, ..., alpha),   n_bm = round(share_bm * visible),   any n_bm tokens of m

    If rounding or short modalities change the sum, random tokens are added or dropped. So every complete sample has
    ``visible`` visible tokens, and an incomplete sample has the same share of its tokens.

    Args:
        visible: number of visible tokens of a complete sample.
        alpha: parameter of the Dirichlet distribution: small for one visible modality per sample, large for equal
            shares.
        subset_first: whether to sample a non-empty set of modalities first, and then the shares among them.
        targets: maximum number of targets, sampled from the masked tokens (4M, arXiv 2312.06647); by default all.

    >>> real = {m: torch.ones(3, 16, dtype=torch.bool) for m in ("image", "depth")}
    >>> masks = TokenBudget(visible=8)(real, {"image": (4, 4), "depth": (4, 4)}, torch.arange(3))
    >>> [masks.visible[m].sum(dim=1).tolist() for m in real]
    [[4, 5, 1], [4, 3, 7]]
    """

    def __init__(
        self, visible: int, alpha: float = 1.0, subset_first: bool = False, targets: int | None = None
    ) -> None:
        if visible < 1 or (targets is not None and targets < 1):
            what = f"visible {visible}" if visible < 1 else f"targets {targets}"
            raise ValueError(f"{what}: a number of tokens, at least 1")
        if alpha <= 0:
            raise ValueError(f"alpha {alpha:g}: must be above 0; 1 is uniform over shares")
        self.budget, self.alpha, self.subset_first, self.targets = visible, alpha, subset_first, targets

    def __call__(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
        masks = super().__call__(real, grids, draw_B)
        if self.targets is not None:
            target_BU = torch.cat(list(masks.target.values()), dim=1)
            order_BU = torch.cat([noise(draw_B, f"target/{m}", math.prod(grids[m])) for m in real], dim=1)
            counted_BU = last(order_BU.to(target_BU.device), target_BU, target_BU.sum(dim=1).clamp(max=self.targets))
            masks.target = masks.loss = split_by_modality(counted_BU, real)
        return masks

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        count_BM = torch.stack([mask_BT.sum(dim=1) for mask_BT in real.values()], dim=1).cpu()
        whole = sum(math.prod(grids[m]) for m in real)
        total_B = count_BM.sum(dim=1)
        visible_B = (self.budget / whole * total_B).round().long()
        visible_B = torch.where(total_B > 1, visible_B.clamp(min=1).minimum(total_B - 1), total_B)
        wanted_BM = (self.shares(count_BM > 0, draw_B) * visible_B[:, None]).round()
        order = []
        for (m, mask_BT), wanted_B in zip(real.items(), wanted_BM.unbind(dim=1), strict=True):
            u_BT = noise(draw_B, f"mask/{m}", math.prod(grids[m])).to(mask_BT.device)
            rank_BT = ranks(u_BT.masked_fill(~mask_BT, -1.0), descending=True)
            # wanted tokens have the highest values and stay visible; others do only if too few are wanted
            order.append(u_BT + (rank_BT < wanted_B.to(mask_BT.device)[:, None]))
        real_BU = torch.cat(list(real.values()), dim=1)
        # fresh noise: which tokens of an overfull sample are dropped must not depend on their rank in a modality
        order_BU = torch.cat(order, dim=1).floor() + noise(draw_B, "mask/all", real_BU.shape[1]).to(real_BU.device)
        return split_by_modality(last(order_BU, real_BU, visible_B.to(real_BU.device)), real)

    def shares(self, present_BM: Tensor, draw_B: Tensor) -> Tensor:
        """Draw float ``[B, M]``: shares of the modalities that a sample has, which sum to 1 (or are all 0)."""
        rows = []
        for key, present_M in zip(mix_N(draw_B, "mask/shares").tolist(), present_BM.numpy(), strict=True):
            generator = np.random.Generator(np.random.Philox(key))
            chosen = np.flatnonzero(present_M)
            if self.subset_first and len(chosen) > 1:
                subset = int(generator.integers(1, 2 ** len(chosen)))
                chosen = chosen[[bool(subset >> k & 1) for k in range(len(chosen))]]
            share_M = np.zeros(len(present_M))
            if len(chosen):
                share_M[chosen] = generator.dirichlet([self.alpha] * len(chosen))
            rows.append(share_M)
        return torch.from_numpy(np.stack(rows))

    def check(self, grids: Mapping[str, Grid]) -> None:
        tokens = sum(math.prod(grid) for grid in grids.values())
        if self.budget >= tokens:
            raise ValueError(f"visible {self.budget} of {tokens} tokens leaves no token masked; at most {tokens - 1}")
