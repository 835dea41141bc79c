"""Two token budgets per sample, for inputs and for targets (4M).

Letters: B samples, T tokens, M modalities, K draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.errors import no_such, require_value
from descant.modules.core.host import host_copy
from descant.modules.core.objects import require_objects
from descant.modules.core.rng import mix_N, uniform_N
from descant.modules.masking.corruptions import Corruption, Grid, Masks, noise, ranks
from descant.modules.masking.spans import cost, lengths, target_run, target_window


def allot_budget(share_BM: Tensor, more_BKM: Tensor, tokens: Tensor | int, most_BM: Tensor) -> Tensor:
    """Divide a budget among modalities, int64 ``[B, M]``: ``n = min(floor(share tokens) + extra, most)`` (4M).

    Each token that the floor leaves over goes to the largest share of one more draw. A row of zeros gets nothing.

    Args:
        share_BM: float64, shares that sum to 1, or zeros.
        more_BKM: float64, K further draws of shares; M of them are enough.
        tokens: the budget, one for all samples or one per sample, ``[B, 1]``.
        most_BM: int64, number of tokens that a sample has.

    Source: apple/ml-4m, ``UnifiedMasking.input_token_budget``.

    >>> share_BM, more_BKM = torch.tensor([[0.65, 0.35]]), torch.tensor([[[0.2, 0.8]]])
    >>> allot_budget(share_BM.double(), more_BKM.double(), 10, torch.tensor([[5, 9]])).tolist()
    [[5, 4]]
    """
    count_BM = (share_BM * tokens).floor().long()
    left_B1 = (tokens - count_BM.sum(dim=1, keepdim=True)) * (share_BM.sum(dim=1, keepdim=True) > 0)
    extra_BKM = F.one_hot(more_BKM.argmax(dim=2), share_BM.shape[1])
    used_BK = torch.arange(more_BKM.shape[1]) < left_B1
    return (count_BM + (extra_BKM * used_BK[..., None]).sum(dim=1)).minimum(most_BM)


def refill_budget(count_BM: Tensor, tokens: Tensor | int, most_BM: Tensor) -> Tensor:
    """Give tokens that a budget lost at ``most`` to modalities with tokens left, in proportion to the tokens left.

    Returns the new counts, int64 ``[B, M]``.

    >>> refill_budget(torch.tensor([[5, 4, 0]]), 12, torch.tensor([[5, 9, 1]])).tolist()
    [[5, 7, 0]]
    """
    spare_BM = most_BM - count_BM
    total_B1 = spare_BM.sum(dim=1, keepdim=True)
    lost_B1 = (tokens - count_BM.sum(dim=1, keepdim=True)).minimum(total_B1)
    exact_BM = spare_BM.double() * lost_B1 / total_B1.clamp(min=1)
    whole_BM = exact_BM.floor().long()
    rest_B1 = lost_B1 - whole_BM.sum(dim=1, keepdim=True)
    return count_BM + whole_BM + (ranks(exact_BM - whole_BM, descending=True) < rest_B1)


class DirichletPair:
    """Component of the mixture of :class:`TwoBudgets`: one Dirichlet distribution for inputs, and one for targets.

    Args:
        inputs: modality -> alpha; other modalities are not inputs.
        targets: modality -> alpha; other modalities are not targets.
        weight: weight of the component.
        visible: its input budget, if it differs from that of TwoBudgets.
    """

    def __init__(
        self, inputs: dict[str, float], targets: dict[str, float], weight: float = 1.0, visible: int | None = None
    ) -> None:
        for name, alphas in (("inputs", inputs), ("targets", targets)):
            if not alphas or min(alphas.values()) <= 0:
                raise ValueError(f"DirichletPair: {name} {alphas}: an alpha above 0 for one modality at least")
        require_value(weight > 0, f"DirichletPair: weight {weight:g}: must be above 0")
        if visible is not None and visible < 1:
            raise ValueError(f"DirichletPair: visible {visible}: a number of tokens, at least 1")
        self.inputs, self.targets, self.weight, self.visible = dict(inputs), dict(targets), weight, visible

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.weight)


class TwoBudgets(Corruption):
    """Two Dirichlet token budgets per sample, for inputs and for targets, which are disjoint (4M, arXiv 2312.06647).

        c_b ~ weights,   s_b ~ Dirichlet(alpha_in of c_b),   r_b ~ Dirichlet(alpha_out of c_b),   independently
        n_bm = min(s_bm visible, tokens of m),   k_bm = min(r_bm targets, tokens of m - n_bm)        inputs, targets

    Random n_bm tokens of m are visible, and random k_bm others are targets; :func:`allot_budget` rounds. Alphas of
    modalities that a sample lacks count as 0. In a sequence, random tokens are kept with a probability drawn from
    [0, 1). It is lowered by a tenth until the kept tokens fit n_bm, with one sentinel per hidden span. The hidden spans
    are targets as far as they fit k_bm, with their sentinels and the final one; k_bm is at most the cost of all these
    (:func:`descant.modules.masking.spans.target_run`).

    Args:
        visible, targets: the budgets, in tokens.
        mixture: components, one of which is drawn for each sample. 4M's ``rgb2all`` has alpha 1000 for pixels as
            inputs, ``all2all`` 0.5 for all modalities.
        sequences: modalities whose spans are hidden: those with a SequenceAdapter.
        refill: whether tokens that the minimum cuts off go to modalities of the component with tokens left. By default
            they are lost, as in the release (a run of its ``all2all`` had 113.5 of 128 inputs on average).
        cut: what a budget cuts in a sequence. ``tokens``: the tokens, each with the sentinels that it needs, as in the
            stored claims. ``targets``: the targets including sentinels, as in the release. Then the next sentinel is
            predicted as well if the budget ends there, and the targets may end before the final sentinel
            (:func:`descant.modules.masking.spans.target_window`).

    >>> real = {m: torch.ones(3, 16, dtype=torch.bool) for m in ("image", "depth")}
    >>> both = DirichletPair({"image": 0.5, "depth": 0.5}, {"depth": 1.0})
    >>> masks = TwoBudgets(8, 6, [both])(real, {"image": (4, 4), "depth": (4, 4)}, torch.arange(3))
    >>> [masks.visible[m].sum(dim=1).tolist() for m in real], masks.target["depth"].sum(dim=1).tolist()
    ([[0, 8, 3], [8, 0, 5]], [6, 6, 6])
    """

    def __init__(
        self,
        visible: int,
        targets: int,
        mixture: list[DirichletPair],
        sequences: list[str] | None = None,
        refill: bool = False,
        cut: Literal["tokens", "targets"] = "tokens",
    ) -> None:
        for name, tokens in (("visible", visible), ("targets", targets)):
            require_value(tokens >= 1, f"TwoBudgets: {name} {tokens}: a number of tokens, at least 1")
        require_value(mixture, "TwoBudgets: mixture: one DirichletPair at least")
        for pair in mixture:
            require_objects(self, mixture=(pair, DirichletPair))
        self.budget, self.targets, self.mixture = visible, targets, list(mixture)
        self.sequences, self.refill, self.cut = list(sequences or []), refill, cut

    def __call__(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
        device = draw_B.device
        real, draw_B = {m: host_copy(mask_BT) for m, mask_BT in real.items()}, host_copy(draw_B)
        most_BM = torch.stack([mask_BT.sum(dim=1) for mask_BT in real.values()], dim=1)
        weight_C = torch.tensor([pair.weight for pair in self.mixture], dtype=torch.float64)
        bound_C = (weight_C / weight_C.sum()).cumsum(0)[:-1]
        component_B = (uniform_N(draw_B, "budget/component")[:, None] >= bound_C).sum(dim=1)
        alphas = [[[side.get(m, 0.0) for m in real] for side in (p.inputs, p.targets)] for p in self.mixture]
        alpha_2BM = torch.tensor(alphas, dtype=torch.float64)[component_B].transpose(0, 1) * (most_BM > 0)
        visible_B1 = torch.tensor([pair.visible or self.budget for pair in self.mixture])[component_B, None]
        input_BM = self._counts(alpha_2BM[0], visible_B1, most_BM, draw_B, "inputs")
        visible, target, windows = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        left_BM = most_BM - input_BM
        for k, (m, real_BT) in enumerate(real.items()):
            if m in self.sequences:  # targets are hidden tokens and their sentinels
                visible[m] = choose_inputs(real_BT, input_BM[:, k], draw_B, f"mask/{m}")
                left_BM[:, k] = cost(real_BT & ~visible[m]).sum(dim=1)
        target_BM = self._counts(alpha_2BM[1], self.targets, left_BM, draw_B, "targets")
        for k, (m, real_BT) in enumerate(real.items()):
            if m in self.sequences:
                hidden_BT, u_B = real_BT & ~visible[m], uniform_N(draw_B, f"mask/{m}/span")
                if self.cut == "tokens":
                    target[m] = target_run(hidden_BT, target_BM[:, k], u_B)
                else:
                    target[m], windows[m] = target_window(hidden_BT, target_BM[:, k], u_B)
                continue
            u_BT = noise(draw_B, f"mask/{m}", real_BT.shape[1])
            rank_BT = ranks(u_BT.masked_fill(~real_BT, -1.0), descending=True)
            n_B1, k_B1 = input_BM[:, k, None], target_BM[:, k, None]
            visible[m], target[m] = rank_BT < n_B1, (rank_BT >= n_B1) & (rank_BT < n_B1 + k_B1)
        visible, target, windows = ({m: x.to(device) for m, x in part.items()} for part in (visible, target, windows))
        return Masks(visible, target, target | windows)

    def predicts(self, modality: str) -> bool:
        return any(modality in pair.targets for pair in self.mixture)

    def _counts(self, alpha_BM: Tensor, tokens: Tensor | int, most_BM: Tensor, draw_B: Tensor, side: str) -> Tensor:
        share_BKM = dirichlet(alpha_BM, alpha_BM.shape[1] + 1, mix_N(draw_B, f"budget/{side}"))
        count_BM = allot_budget(share_BKM[:, 0], share_BKM[:, 1:], tokens, most_BM)
        return refill_budget(count_BM, tokens, most_BM * (alpha_BM > 0)) if self.refill else count_BM

    def check(self, grids: Mapping[str, Grid]) -> None:
        size = {m: math.prod(grid) for m, grid in grids.items()}
        for m in self.sequences:
            if m not in size:
                raise ValueError(f"TwoBudgets: sequence {m!r}: {no_such(m, size)}")
        for pair in self.mixture:
            visible = pair.visible or self.budget
            for name, side, tokens in (("visible", pair.inputs, visible), ("targets", pair.targets, self.targets)):
                for m in side:
                    if m not in size:
                        raise ValueError(f"TwoBudgets: modality {m!r}: {no_such(m, size)}")
                _require(name, tokens, side, size)
            both = dict.fromkeys([*pair.inputs, *pair.targets])
            _require("visible + targets", visible + self.targets, both, size)


def _require(name: str, tokens: int, modalities: Mapping[str, object], size: Mapping[str, int]) -> None:
    there = sum(size[m] for m in modalities)
    if tokens > there:
        raise ValueError(f"TwoBudgets: {name} {tokens}: {', '.join(modalities)} have {there} tokens; at most {there}")


def choose_inputs(real_BT: Tensor, budget_B: Tensor, draw_B: Tensor, purpose: str) -> Tensor:
    """Choose a sequence's input tokens, bool ``[B, T]``: at most ``budget_B``, with the sentinels of hidden spans.

    >>> real_BT = torch.ones(2, 6, dtype=torch.bool)
    >>> kept_BT = choose_inputs(real_BT, torch.tensor([3, 0]), torch.arange(2), "x")
    >>> kept_BT.int().tolist(), lengths(kept_BT, ~kept_BT)[0].item()
    ([[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], 2)
    """
    kept_BT, chance_B = torch.zeros_like(real_BT), uniform_N(draw_B, f"{purpose}/keep")
    row_R = (budget_B > 0).nonzero().squeeze(1)
    for attempt in range(200):  # by then a token is kept with a probability below 1e-9
        if len(row_R) == 0:
            break
        u_RT = noise(draw_B[row_R], f"{purpose}/keep/{attempt}", real_BT.shape[1])
        try_RT = real_BT[row_R] & (u_RT < chance_B[row_R, None] * 0.9**attempt)
        fits_R = lengths(try_RT, real_BT[row_R] & ~try_RT) <= budget_B[row_R]
        kept_BT[row_R[fits_R]] = try_RT[fits_R]
        row_R = row_R[~fits_R]
    return kept_BT


def dirichlet(alpha_BM: Tensor, draws: int, key_B: np.ndarray) -> Tensor:
    """Draw K times from each row's Dirichlet distribution over its alphas above 0, float64 ``[B, K, M]``.

    A row without such alphas is zero.

    >>> dirichlet(torch.tensor([[1000.0, 0.0], [0.0, 0.0]]), 1, np.arange(2)).tolist()
    [[[1.0, 0.0]], [[0.0, 0.0]]]
    """
    share_BKM = np.zeros((len(alpha_BM), draws, alpha_BM.shape[1]))
    for share_KM, key, alpha_M in zip(share_BKM, key_B.tolist(), alpha_BM.numpy(), strict=True):
        chosen = np.flatnonzero(alpha_M)
        if len(chosen) == 1:
            share_KM[:, chosen] = 1.0  # every draw is 1; a generator per sample is costly
        elif len(chosen):
            share_KM[:, chosen] = np.random.Generator(np.random.Philox(key)).dirichlet(alpha_M[chosen], draws)
    return torch.from_numpy(share_BKM)
