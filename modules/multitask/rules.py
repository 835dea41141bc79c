"""How the terms of a loss are mixed: rules that read gradients, and rules that read values.

    loss = sum_k mix_k term_k,        mix = rule(G, values) * (what the recipe mixes by)

Rules are told the same numbers on every rank, and answer alike; what they remember is in the checkpoint.
Letters: B Gram matrices (1 of parameters, samples of a feature), K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from descant.modules.multitask import solvers as harmony

#: Values below it are taken for it, where they divide.
LEAST = 1e-12
#: Of two gradients whose cosine is nearer to -1 nothing but rounding is left.
OPPOSITE = 1e-10


class Rule:
    """What mixes terms. ``mix`` answers by what is remembered; ``learn`` remembers, once an optimizer step.

    ``mix(gram_BKK, value_K, draw)`` gives float64 ``[B, K]``, about 1 where terms do not disagree, of:

        gram_BKK: float64 dot products of the gradients of the terms; empty for a rule that does not read them.
        value_K: the terms' values, of all ranks; of a feature, ones.
        draw: a number that is another one each step and the same on every rank: for whatever is drawn.
    """

    #: Whether it looks at the gradients.
    reads_gradients = True
    #: Whether each sample of a feature may have a mix of its own.
    per_sample = False
    #: Whether a mix hangs on those before it.
    remembers = False

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}  # sums, since it last learned

    def mix(self, gram_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        raise NotImplementedError

    def learn(self, total: Callable[[Tensor], Tensor]) -> None:
        """``total`` adds up what ranks saw, where that differs."""
        self.seen = {}

    def see(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.seen[name] = self.seen[name] + value if name in self.seen else value

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: value.clone() for name, value in state.items()}


class SolverRule(Rule):
    """A rule that correlations and lengths of the gradients decide alone: nothing is drawn or remembered."""

    def mix(self, gram_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        return harmony.harmonized(gram_BKK, lambda c_BKK, d_BK, live_K: self.solve(c_BKK, d_BK))

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        """As a :data:`descant.modules.multitask.solvers.Solver`."""
        raise NotImplementedError


def orders(terms: int, draw: int) -> list[list[int]]:
    """For each term the others, in an order that is drawn.

    >>> orders(3, 0) == orders(3, 0), [sorted(order) for order in orders(3, 0)]
    (True, [[1, 2], [0, 2], [0, 1]])
    """
    generator = torch.Generator().manual_seed(draw)
    return [[j for j in torch.randperm(terms, generator=generator).tolist() if j != i] for i in range(terms)]


# of gradients ---------------------------------------------------------------------------------------------------------


class PCGrad(Rule):
    """Each gradient loses its part against every other one that it conflicts with, one after another, in a drawn order.

    See :func:`descant.modules.multitask.solvers.pcgrad`. Source: Yu 2020, arXiv 2001.06782.

    >>> conflict = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    >>> PCGrad().mix(conflict[None], torch.ones(2), 0).tolist()  # g_a + g_b / 2, and g_b + g_a / 2
    [[1.5, 1.5]]
    """

    per_sample = True

    def mix(self, gram_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        order = orders(gram_BKK.shape[-1], draw)
        return harmony.harmonized(gram_BKK, lambda c, d, live: harmony.pcgrad(c, d, _among(order, live)))


class CMGH(SolverRule):
    """As PCGrad, and against the other gradients as they came: nothing is drawn, and no order matters.

    See :func:`descant.modules.multitask.solvers.realigned`. Source: Wu 2022, arXiv 2211.02077 (CMGH), for two terms.

    >>> conflict = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    >>> CMGH().mix(conflict[None], torch.ones(2), 0).tolist()
    [[1.25, 2.0]]
    """

    per_sample = True

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return harmony.cmgh(c_BKK, d_BK)


class GradVac(Rule):
    """Each gradient is turned until its cosine with another one is their usual one, in turn, in a drawn order.

    ``phi_ij <- (1 - beta) phi_ij + beta cos_ij``, from 0 on, of the cosines met on the way; of a feature, their mean
    over the samples. See :func:`descant.modules.multitask.solvers.towards`. Source: Wang 2021, arXiv 2010.05874.

    Args:
        beta: how fast the usual cosine follows.
    """

    per_sample = True

    remembers = True

    def __init__(self, beta: float = 0.01) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta {beta:g}: between 0 and 1")
        self.beta = beta

    def mix(self, gram_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        k = gram_BKK.shape[-1]
        aim_KK = self.state.get("phi", torch.zeros(k, k, dtype=torch.float64)).to(gram_BKK.device)
        met_KK, rows_KK, order = torch.zeros_like(aim_KK), torch.zeros_like(aim_KK), orders(k, draw)

        def solve(c: Tensor, d: Tensor, live: Tensor) -> Tensor:
            at = live.nonzero()[:, 0]
            a_BK, cos_BKK = harmony.gradvac(c, d, aim_KK[at[:, None], at], _among(order, live))
            met_KK[at[:, None], at] += cos_BKK.sum(dim=0)
            rows_KK[at[:, None], at] += len(c)
            return a_BK

        mix_BK = harmony.harmonized(gram_BKK, solve)
        self.see(met=met_KK, rows=rows_KK)
        return mix_BK

    def learn(self, total: Callable[[Tensor], Tensor]) -> None:
        if self.seen:
            met_KK, rows_KK = total(torch.stack([self.seen["met"], self.seen["rows"]])).unbind()
            aim_KK = self.state.get("phi", torch.zeros_like(met_KK)).to(met_KK)
            new_KK = (1 - self.beta) * aim_KK + self.beta * met_KK / rows_KK.clamp(min=1)
            self.state["phi"] = torch.where(rows_KK > 0, new_KK, aim_KK)
        super().learn(total)


class CAGrad(SolverRule):
    """The step near the mean that is best for the term that gains least.

    See :func:`descant.modules.multitask.solvers.cagrad`. Source: Liu 2021, arXiv 2110.14048.

    Args:
        radius: how near, in lengths of the mean gradient (the paper's c); 0 is the plain sum.
    """

    per_sample = True

    def __init__(self, radius: float = 0.5) -> None:
        super().__init__()
        if radius < 0:
            raise ValueError(f"radius {radius:g}: not below 0")
        self.radius = radius

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return harmony.cagrad(c_BKK, d_BK, self.radius) if self.radius else d_BK


class MGDA(SolverRule):
    """The shortest vector of the convex hull of the gradients: no term gets worse, and the least gradient rules.

    See :func:`descant.modules.multitask.solvers.min_norm`. Source: Sener 2018, arXiv 1810.04650.
    """

    per_sample = True

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return harmony.min_norm(c_BKK, d_BK)


class UPGrad(SolverRule):
    """The sum of what each gradient is, once it conflicts with no other.

    See :func:`descant.modules.multitask.solvers.upgrad`. Source: Quinton 2024, arXiv 2406.16232.
    """

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return harmony.upgrad(c_BKK, d_BK)


class NashMTL(SolverRule):
    """The bargain in which each term gains alike, in proportion to its own gradient's length.

    See :func:`descant.modules.multitask.solvers.nash_mtl`. Source: Navon 2022, arXiv 2202.01017.
    """

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return harmony.nash_mtl(c_BKK, d_BK)


class IMTLG(SolverRule):
    """A step that goes as far along each gradient as along every other.

    See :func:`descant.modules.multitask.solvers.imtl_g`. Source: Liu 2021, Towards Impartial Multi-task Learning.
    """

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return harmony.imtl_g(c_BKK, d_BK)


class AlignedMTL(SolverRule):
    """All principal directions of the gradients made as short as the shortest of them.

    See :func:`descant.modules.multitask.solvers.aligned_mtl`. Source: Senushkin 2023, arXiv 2305.19000.
    """

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        return harmony.aligned_mtl(c_BKK, d_BK)


class MMPareto(SolverRule):
    """Two terms that conflict take the shortest step that is good for both, made as long as their sum would be:

        h = g_a + g_b where <g_a, g_b> >= 0, else 2 (w g_a + (1 - w) g_b) of the least length, then times
        max(1, |g_a + g_b| / |h|);        and either way times gamma

    Of gradients that point exactly against each other h is what rounding left: there the step is zero. Meant for the
    joint and the own loss of one modality, tower by tower (HarmonizeTowers). Source: Wei 2024, arXiv 2405.17730
    (MMPareto).

    >>> conflict = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    >>> mix = MMPareto(gamma=1).mix(conflict[None], torch.ones(2), 0)[0]  # (4/7, 10/7), and sqrt 7/4 times as long
    >>> [round(k, 4) for k in mix.tolist()]
    [0.7559, 1.8898]
    """

    def __init__(self, gamma: float = 1.5) -> None:
        super().__init__()
        if not gamma > 0:
            raise ValueError(f"MMPareto: gamma {gamma:g}: above 0, such as 1.5")
        self.gamma = gamma

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        if d_BK.shape[1] > 2:
            raise ValueError(f"MMPareto: {d_BK.shape[1]} terms; it is for two, a joint loss and a modality's own")
        if d_BK.shape[1] < 2:
            return self.gamma * d_BK  # one of them is zero
        cos_B1 = c_BKK[:, 0, 1:]
        h_BK = harmony.min_norm(c_BKK, d_BK)
        length = [torch.einsum("bk,bkl,bl->b", a_BK, c_BKK, a_BK).clamp(min=0).sqrt()[:, None] for a_BK in (h_BK, d_BK)]
        longer_B1 = (length[1] / length[0].clamp(min=torch.finfo(d_BK.dtype).tiny)).clamp(min=1)
        h_BK = torch.where(1 + cos_B1 < OPPOSITE, 0.0, h_BK * longer_B1)
        return self.gamma * torch.where(cos_B1 < 0, h_BK, d_BK)


def _among(order: list[list[int]], live: Tensor) -> list[list[int]]:
    """The orders of those that are live, by their places among them."""
    place = {k: n for n, k in enumerate(live.nonzero()[:, 0].tolist())}
    return [[place[j] for j in order[i] if j in place] for i in place]


class GradNorm(Rule):
    """Weights that bring the terms' gradients to lengths by how much each still has to learn (Chen 2018, 1711.02257).

        aim_k = mean_j(w_j |g_j|) r_k^alpha,        r_k = (L_k / L_k(0)) / mean_j(L_j / L_j(0))
        w_k  <- w_k - lr d/dw_k sum_k |w_k |g_k| - aim_k| / mean_j(w_j |g_j|),     then all of them summed to K

    Divided by the mean length, which the paper does not, so that ``lr`` means the same at every scale (our reading).

    Args:
        alpha: how strongly terms that learn slowly are preferred; 0 makes all gradients equally long.
        lr: of the weights.
    """

    remembers = True

    def __init__(self, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        if lr < 0:
            raise ValueError(f"lr {lr:g}: not below 0")
        self.alpha, self.lr = alpha, lr

    def mix(self, gram_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        value_K = value_K.double()
        w_K = self.state.get("weight", torch.ones_like(value_K)).to(value_K)
        first_K = self.state.setdefault("first", value_K.clone()).to(value_K)
        norm_K = gram_BKK[0].diagonal().clamp(min=0).sqrt()
        ratio_K = value_K / torch.where(first_K.abs() < LEAST, LEAST, first_K)
        ratio_K = (ratio_K / ratio_K.mean().clamp(min=LEAST)).clamp(min=LEAST)
        mean = (w_K * norm_K).mean()
        slope_K = norm_K * (w_K * norm_K - mean * ratio_K**self.alpha).sign() / mean.clamp(min=LEAST)
        self.see(slope=torch.where(mean > 0, slope_K, 0.0), count=torch.ones(()))
        return w_K[None]

    def learn(self, total: Callable[[Tensor], Tensor]) -> None:
        if self.seen:
            slope_K = self.seen["slope"] / self.seen["count"]
            w_K = self.state.get("weight", torch.ones_like(slope_K)).to(slope_K)  # of a checkpoint it is on the CPU
            w_K = (w_K - self.lr * slope_K).clamp(min=LEAST)
            self.state["weight"] = w_K * len(w_K) / w_K.sum()
        super().learn(total)


# of values ------------------------------------------------------------------------------------------------------------


class UncertaintyWeighting(Rule):
    """Each term by a noise of its own that is learned: ``sum_k exp(-s_k) L_k + s_k`` (Kendall 2018, 1705.07115).

        s_k <- s_k - lr (1 - exp(-s_k) L_k),        mix_k = exp(-s_k),       from s = 0 on

    So a term's share goes to the inverse of its value. The mix is that of before the step, as in one optimizer.

    Args:
        lr: of s.
    """

    reads_gradients = False

    remembers = True

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        if lr < 0:
            raise ValueError(f"lr {lr:g}: not below 0")
        self.lr = lr

    def mix(self, gram_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        s_K = self.state.get("log_variance", torch.zeros_like(value_K, dtype=torch.float64)).to(value_K.device)
        self.see(value=value_K.double(), count=torch.ones(()))
        return torch.exp(-s_K)[None]

    def learn(self, total: Callable[[Tensor], Tensor]) -> None:
        if self.seen:
            value_K = self.seen["value"] / self.seen["count"]
            s_K = self.state.get("log_variance", torch.zeros_like(value_K)).to(value_K)
            self.state["log_variance"] = s_K - self.lr * (1 - torch.exp(-s_K) * value_K)
        super().learn(total)


class DWA(Rule):
    """Terms that fall slowly weigh more: dynamic weight averaging (Liu 2019, 1803.10704).

        mix_k = K exp(w_k / T) / sum_j exp(w_j / T),        w_k = L_k(t - 1) / L_k(t - 2)

    where L(t) is the mean over a window of steps (the paper's epoch); 1 in the first two of them.

    Args:
        window: steps.
        temperature: T; a large one makes all alike.
    """

    reads_gradients = False

    remembers = True

    def __init__(self, window: int = 100, temperature: float = 2.0) -> None:
        super().__init__()
        if window < 1 or temperature <= 0:
            raise ValueError(f"window {window}, temperature {temperature:g}: at least 1, and above 0")
        self.window, self.temperature = window, temperature

    def mix(self, gram_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        self.see(value=value_K.double(), count=torch.ones(()))
        if "before" not in self.state:
            return torch.ones_like(value_K, dtype=torch.float64)[None]
        last_K, before_K = (self.state[name].to(value_K.device) for name in ("last", "before"))
        fall_K = last_K / torch.where(before_K.abs() < LEAST, LEAST, before_K)
        return len(value_K) * torch.softmax(fall_K / self.temperature, dim=0)[None]

    def learn(self, total: Callable[[Tensor], Tensor]) -> None:
        if self.seen:
            value_K, zero = self.seen["value"] / self.seen["count"], torch.zeros((), dtype=torch.float64)
            self.state["sum"] = self.state.get("sum", zero).to(value_K) + value_K
            self.state["steps"] = self.state.get("steps", zero) + 1
            if self.state["steps"] == self.window:
                if "last" in self.state:
                    self.state["before"] = self.state["last"]
                self.state["last"] = self.state.pop("sum") / self.state.pop("steps")
        super().learn(total)
