"""Expert choice: each expert takes its share of the tokens, and causal routers predict its choice (MoMa).

Letters: N tokens, D width, E experts, K slots of a token, M kinds of tokens, F hidden width.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.host import to_device
from descant.modules.core.rng import uniform_NK
from descant.modules.moe.capacity import share_of
from descant.modules.moe.modality_routing import Tables, pad_rows, require_experts, require_rows
from descant.modules.moe.routing import Marks, Routing, TokenSham, logits

#: Shares are stored as whole numbers of billionths, because changing a module's precision leaves integers unchanged.
BILLION = 10**9


def expert_choice(score_NE: Tensor, member_NE: Tensor, share_E: Tensor) -> Tensor:
    """Choose the ``ceil(share_e N_e)`` highest scores of each expert's N_e members: bool ``[N, E]``; ties by order.

    ``member_NE``: bool, the tokens that an expert may take; ``share_of`` computes the ceiling. Source:
    Zhou 2022 (arXiv 2202.09368); by groups MoMa (2407.21770).

    >>> score_NE = torch.tensor([[0.1], [0.9], [0.5], [0.8]])
    >>> member_NE = torch.tensor([[True], [False], [True], [True]])
    >>> expert_choice(score_NE, member_NE, torch.tensor([1 / 3])).flatten().tolist()
    [False, False, False, True]
    """
    order_NE = score_NE.masked_fill(~member_NE, -torch.inf).argsort(dim=0, descending=True, stable=True)
    rank_N1 = torch.arange(len(score_NE), device=score_NE.device)[:, None]
    rank_NE = torch.empty_like(order_NE).scatter_(0, order_NE, rank_N1.expand(order_NE.shape))
    take_E = share_of(member_NE.sum(dim=0), share_E.double())
    return member_NE & (rank_NE < take_E)


def gumbel_sigmoid(logit_NE: Tensor, u_NE: Tensor) -> Tensor:
    """Compute noisy scores ``sigmoid(s + G' - G'')`` with two Gumbel draws, whose difference is logistic:

        G' - G'' = log u - log(1 - u),   u uniform in (0, 1)

    Source: MoMa (Lin 2024, arXiv 2407.21770). That the choice and the weights use the same noise is our reading; no
    code was released.

    >>> gumbel_sigmoid(torch.zeros(1, 3), torch.tensor([[0.25, 0.5, 0.75]])).numpy().round(6).tolist()
    [[0.25, 0.5, 0.75]]
    """
    return (logit_NE + (u_NE.log() - (-u_NE).log1p())).sigmoid()


class CausalAux(nn.Module):
    """Auxiliary causal router ``u = W_2 silu(W_1 sg(h))``: u > 0 predicts that the expert choice takes a token.

    Its loss is the binary cross-entropy against the actual choice. ``sg`` stops the gradient, so that this loss reaches
    no other parameter. Source: MoMa (arXiv 2407.21770); widths and activation are our reading, as no code was released.

    Args:
        hidden: F.

    >>> CausalAux(hidden=4).build(width=8, experts=2)(torch.randn(3, 8)).shape
    torch.Size([3, 2])
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden {hidden}: at least 1")
        self.hidden = hidden

    def build(self, width: int, experts: int) -> Self:
        self.inward_FD = nn.Parameter(torch.randn(self.hidden, width) * width**-0.5)
        self.outward_EF = nn.Parameter(torch.randn(experts, self.hidden) * 0.02)
        return self

    def forward(self, h_ND: Tensor) -> Tensor:
        return logits(F.silu(logits(h_ND.detach(), self.inward_FD)), self.outward_EF)


class ExpertChoice(Tables):
    """Router in which each expert takes the ceil(c N) best of its kinds' N valid tokens; weights are sigmoids (MoMa).

        a = sigmoid(W h),   expert e takes the top ceil(c_e N) of a_e,   y = sum over the e that took h of a_e FFN_e(h)

    A token that no expert takes passes through the residual only. Loads are even by construction, and a token's route
    depends on later tokens. With ``auxiliary``, a router outside training decides token by token (:class:`CausalAux`).

    Args:
        groups: a row of experts for each kind of token; by default one row of all experts.
        capacity: c; by default 1 over a kind's number of experts, so that a token gets one expert on average.
        auxiliary: the causal router, trained by its own term.
        gumbel: add noise to the scores in training (:func:`gumbel_sigmoid`), unless the gate is frozen.
        sham: ``permute`` for the control: each token gets the kind of another token of its batch.

    >>> router = ExpertChoice().build(width=8, experts=4)
    >>> router(torch.randn(12, 8)).used.sum(dim=0).tolist()
    [3, 3, 3, 3]
    """

    #: Whether evaluation lets experts choose as in training, so by later tokens as well, even with a causal router.
    by_choice = False
    by_rank = "experts choose among the tokens of a rank's micro-batch"

    def __init__(
        self,
        groups: list[list[int]] | None = None,
        capacity: float | None = None,
        auxiliary: CausalAux | None = None,
        gumbel: bool = False,
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        if groups is not None:
            require_rows("groups", groups, "a kind of token")
        if capacity is not None and not 0 < capacity <= 1:
            raise ValueError(f"capacity {capacity:g}: a share of the tokens, above 0 and at most 1")
        self.groups, self.capacity, self.auxiliary, self.gumbel = groups, capacity, auxiliary, gumbel
        self.sham, self.permuted = sham, TokenSham(sham)

    @property
    def causal(self) -> bool:
        return self.auxiliary is not None and not self.training and not self.by_choice

    def build(self, width: int, experts: int, shared: int = 0) -> Self:
        groups = [list(range(experts))] if self.groups is None else self.groups
        require_experts("groups", groups, experts)
        of_E = [next((len(row) for row in groups if e in row), experts) for e in range(experts)]
        share_E = torch.tensor([round((self.capacity or 1 / n) * BILLION) for n in of_E])
        index_MK, real_MK = pad_rows(groups)
        member_ME = torch.tensor([[e in row for e in range(experts)] for row in groups])
        self.keep(index_MK=index_MK, real_MK=real_MK, member_ME=member_ME, share_1E=share_E[None])
        self.gate_ED = self._gate(experts, width)
        if self.auxiliary is not None:
            self.auxiliary.build(width, experts)
        return super().build(width, experts, shared)

    def route(self, h_ND: Tensor, marks: Marks) -> Routing:
        first_N = torch.zeros(len(h_ND), dtype=torch.long, device=h_ND.device)
        kind_N = first_N if self.groups is None else self.permuted(marks.need("kind", self), marks, self)
        index_NK, real_NK, member_NE = (self.rows(name, kind_N) for name in ("index_MK", "real_MK", "member_ME"))
        if marks.valid is not None:
            member_NE = member_NE & marks.valid[:, None]
        score_NE, guess_NE, loss_N = self.scores(h_ND, marks), None, None
        if self.auxiliary is not None:
            guess_NE = self.auxiliary(h_ND)
        if guess_NE is not None and self.causal:
            chosen_NE = member_NE & (guess_NE > 0)
        else:
            chosen_NE = expert_choice(score_NE.detach(), member_NE, self.get_buffer("share_1E")[0].double() / BILLION)
        if guess_NE is not None and self.training:
            loss_NE = F.binary_cross_entropy_with_logits(guess_NE, chosen_NE.to(guess_NE.dtype), reduction="none")
            loss_N = (loss_NE * member_NE).sum(dim=1) / member_NE.sum(dim=1).clamp(min=1)
        used_NK = chosen_NE.gather(1, index_NK) & real_NK
        return Routing(index_NK, promote(score_NE).gather(1, index_NK), used_NK, marks, causal=loss_N)

    def scores(self, h_ND: Tensor, marks: Marks) -> Tensor:
        """Compute ``a``, ``[N, E]``, with noise in training if ``gumbel`` is set."""
        logit_NE = logits(h_ND, self.gate_ED)
        if not (self.gumbel and self.training and self.gate_ED.requires_grad):
            return logit_NE.sigmoid()
        names = [f"gumbel/{self.layer}/{e}" for e in range(self.experts)]
        u_NE = uniform_NK(marks.need("key", self), names).double() + 2.0**-25  # from 24 bits: never 0 or 1
        return gumbel_sigmoid(logit_NE, to_device(u_NE, h_ND.device)).to(logit_NE.dtype)
