"""Mixture of depths: a layer takes the tokens that its router scores highest, and the others skip it (MoMa).

Letters: B rows, T tokens, K slots of a row, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.errors import require_value
from descant.modules.core.host import derive, host_copy, to_device
from descant.modules.core.objective import Term
from descant.modules.moe.balance import mean_term, over_ranks, sum_and_count
from descant.modules.moe.capacity import share_of
from descant.modules.moe.expert_choice import CausalAux
from descant.modules.moe.routing import UNMARKED, Marks, Routing, logits


def best_of_documents(score_BT: Tensor, document_BT: Tensor, share: float) -> Tensor:
    """Select the ``ceil(share N)`` highest scores of each document's N tokens, bool ``[B, T]``; ties by order.

    Document 0 is padding, and none of it is selected. A document's selection is the same alone and packed with others.
    ``share_of`` defines the ceiling.

    >>> score_BT, document_BT = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2, 1.0]]), torch.tensor([[1, 1, 1, 2, 2, 0]])
    >>> best_of_documents(score_BT, document_BT, 0.5).int().tolist()
    [[0, 1, 1, 1, 0, 0]]
    """
    T = score_BT.shape[1]
    order_BT = score_BT.argsort(dim=1, descending=True, stable=True)
    order_BT = order_BT.gather(1, document_BT.gather(1, order_BT).argsort(dim=1, stable=True))
    sorted_BT, place_T = document_BT.gather(1, order_BT), torch.arange(T, device=score_BT.device)
    other_BT = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    first_BT, last_BT = F.pad(other_BT, (1, 0), value=True), F.pad(other_BT, (0, 1), value=True)
    begin_BT = torch.where(first_BT, place_T, 0).cummax(dim=1).values
    end_BT = torch.where(last_BT, place_T + 1, T).flip(1).cummin(dim=1).values.flip(1)
    take_BT = share_of(end_BT - begin_BT, share)
    return torch.zeros_like(last_BT).scatter(1, order_BT, (place_T - begin_BT < take_BT) & (sorted_BT > 0))


def slots(chosen_BT: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the places of each row's chosen tokens, in order, int64 ``[B, K]``; and bool, whether a slot has one.

    >>> [x.tolist() for x in slots(torch.tensor([[True, False, True], [False, True, False]]), 2)]
    [[[0, 2], [1, 0]], [[True, True], [True, False]]]
    """
    index_BK = (~chosen_BT).byte().argsort(dim=1, stable=True)[:, :most]
    return index_BK, chosen_BT.gather(1, index_BK)


def some_pass(
    branch: Callable[[Tensor], Tensor], h_BTD: Tensor, weight_BT: Tensor, index_BK: Tensor, used_BK: Tensor
) -> Tensor:
    """Apply ``branch`` to only some tokens of each row (mixture of depths); all others stay bit-identical.

        h'_t = h_t + a_t (branch(h)_t - h_t)    for the tokens taken,  h_t else

    Args:
        branch: ``[B, K, D]`` to the same shape, a layer with its own residual.
        weight_BT: a. index_BK: the tokens. used_BK: bool; a slot that is not used changes nothing.

    >>> h_BTD, half_BT = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.full((1, 3), 0.5)
    >>> ends_BK, used_BK = torch.tensor([[0, 2]]), torch.tensor([[True, True]])
    >>> some_pass(lambda x: 10 * x, h_BTD, half_BT, ends_BK, used_BK).flatten().tolist()
    [5.5, 2.0, 16.5]
    """
    to_BKD = index_BK[..., None].expand(-1, -1, h_BTD.shape[2])
    x_BKD, a_BK = h_BTD.gather(1, to_BKD), weight_BT.gather(1, index_BK)
    y_BKD = x_BKD + a_BK[..., None] * (branch(x_BKD) - x_BKD)
    return h_BTD.scatter(1, to_BKD, torch.where(used_BK[..., None], y_BKD, x_BKD).to(h_BTD.dtype))


class DepthRouting(Routing):
    """Tokens that a layer took: a routing ``[B T, 1]`` whose only expert is the layer."""


class MixtureOfDepths:
    """Mixture of depths: which layers of a language model take only a share of the tokens, and which share.

        s = w . h,   the layer takes the top ceil(c N) of a document's N tokens,   h' = h + sigmoid(s) (layer(h) - h)

    The taken tokens attend to one another, at their positions. Which ones are taken depends on later tokens. So with
    ``auxiliary``, evaluation and generation decide token by token, by a router that learned to predict the choice
    (binary cross-entropy, whose gradient reaches nothing else). They take each token that is more probably taken than
    not, whatever their number.

    Source: Raposo 2024 (arXiv 2404.02258), c = 1/8, every second layer, and the score itself as the weight; MoMa (Lin
    2024, arXiv 2407.21770), c = 1/4, every second layer from the first, and a sigmoid. MoMa takes the top tokens of a
    batch, Raposo those of a sequence; here it is a document, so that packing and ranks change nothing.

    Args:
        capacity: c.
        every, first: layers ``first``, ``first + every``, ... (counted from 0) take a share.
        linear: the weight is the score (Raposo), not its sigmoid.
        auxiliary: the causal router; without it, evaluation chooses as training does, and generation is refused.

    >>> depths = MixtureOfDepths(every=2)
    >>> [depths.at(i) for i in range(4)]
    [True, False, True, False]
    """

    def __init__(
        self,
        capacity: float = 0.25,
        every: int = 2,
        first: int = 0,
        linear: bool = False,
        auxiliary: CausalAux | None = None,
    ) -> None:
        require_value(0 < capacity <= 1, f"capacity {capacity:g}: a share of the tokens, above 0 and at most 1")
        require_value(every >= 1 and first >= 0, f"every {every}, first {first}: at least 1, and at least 0")
        self.capacity, self.every, self.first, self.linear, self.auxiliary = capacity, every, first, linear, auxiliary

    def at(self, layer: int) -> bool:
        """Whether a layer, counted from 0, takes only a share of the tokens."""
        return layer >= self.first and (layer - self.first) % self.every == 0

    def wrap(self, layers: Sequence[nn.Module], width: int) -> list[nn.Module]:
        """Wrap some layers of a model in a :class:`DepthLayer`."""
        if self.first >= len(layers):
            raise ValueError(f"depths.first {self.first}: of {len(layers)} layers the last is {len(layers) - 1}")
        return [DepthLayer(layer, width, self) if self.at(i) else layer for i, layer in enumerate(layers)]


class DepthLayer(nn.Module):
    """Layer of :class:`MixtureOfDepths`: it takes some tokens of each row, which its own router chooses."""

    def __init__(self, layer: nn.Module, width: int, depths: MixtureOfDepths) -> None:
        super().__init__()
        self.layer, self.capacity, self.linear = layer, depths.capacity, depths.linear
        self.gate_1D = nn.Parameter(torch.randn(1, width) * 0.02)
        self.auxiliary = None if depths.auxiliary is None else deepcopy(depths.auxiliary).build(width, 1)
        self.by_choice = False  # whether evaluation takes tokens as training does

    @property
    def causal(self) -> bool:
        return self.auxiliary is not None and not self.training and not self.by_choice

    def choose(self, h_BTD: Tensor, document_BT: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return weights ``[B, T]``, the taken tokens (bool), and the auxiliary router's loss of each one, or None."""
        score_BT = logits(h_BTD, self.gate_1D)[..., 0]
        weight_BT = score_BT if self.linear else score_BT.sigmoid()
        guess_BT = None if self.auxiliary is None else self.auxiliary(h_BTD)[..., 0]
        if guess_BT is not None and self.causal:
            return weight_BT, (document_BT > 0) & (guess_BT > 0), None
        chosen_BT = best_of_documents(score_BT.detach(), document_BT, self.capacity)
        if guess_BT is None:
            return weight_BT, chosen_BT, None
        loss_BT = F.binary_cross_entropy_with_logits(guess_BT, chosen_BT.to(guess_BT.dtype), reduction="none")
        return weight_BT, chosen_BT, loss_BT

    def forward(
        self,
        h_BTD: Tensor,
        rope: Tensor,
        mask: Tensor | None,
        marks: Marks = UNMARKED,
        document_BT: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None, DepthRouting]:
        """Apply the layer to its tokens; also return their routing of experts, and which tokens they are.

        ``document_BT``: 1, 2, ... in a row, 0 for padding; by default one document per row, of its valid tokens.
        """
        B, T, _ = h_BTD.shape
        if document_BT is None and marks.valid is not None:
            document_BT = derive(Tensor.long, marks.valid)
        elif document_BT is None:
            document_BT = to_device(torch.ones(B, T, dtype=torch.long), h_BTD.device)
        weight_BT, chosen_BT, loss_BT = self.choose(h_BTD, document_BT)
        # the number of taken tokens depends only on the documents, not on scores, so the host knows it
        number_BT = (
            chosen_BT if self.causal else best_of_documents(torch.zeros(B, T), host_copy(document_BT), self.capacity)
        )
        most = max(int(host_copy(number_BT.sum(dim=1)).max()), 1)
        index_BK, used_BK = slots(chosen_BT, most)
        some = marks.map(lambda x_BT, at_BK: x_BT.gather(1, at_BK), index_BK)._replace(valid=used_BK)
        rope = rope.gather(2, index_BK[:, None, :, None].expand(-1, -1, -1, rope.shape[3]))
        if mask is not None:
            mask_BTT = mask[:, 0].expand(B, T, T)
            rows_BKT = mask_BTT.gather(1, index_BK[..., None].expand(-1, -1, T))
            mask_BKK = rows_BKT.gather(2, index_BK[:, None].expand(-1, most, -1)) & used_BK[:, None]
            mask = (mask_BKK | torch.eye(most, dtype=torch.bool, device=mask.device))[:, None]
        routings: list[Routing | None] = []

        def branch(x_BKD: Tensor) -> Tensor:
            y_BKD, routing = self.layer(x_BKD, rope, mask, some)
            routings.append(routing)
            return y_BKD

        h_BTD = some_pass(branch, h_BTD, weight_BT, index_BK, used_BK)
        index_N1 = torch.zeros_like(chosen_BT, dtype=torch.long).view(-1, 1)
        weight_N1, used_N1 = weight_BT.reshape(-1, 1), chosen_BT.reshape(-1, 1)
        loss_N = None if loss_BT is None else loss_BT.flatten()
        routing = DepthRouting(index_N1, weight_N1, used_N1, marks.map(torch.flatten), causal=loss_N)
        return h_BTD, routings[0], routing


def depth_terms(routings: Sequence[DepthRouting]) -> dict[str, Term]:
    """Return ``depths/causal``: the auxiliary routers' mean loss over a micro-batch's tokens (all ranks) and layers."""
    sums = [sum_and_count(routing.causal, routing) for routing in routings if routing.causal is not None]
    if not sums:
        return {}
    layers = over_ranks({"causal": sums})["causal"]
    return {"depths/causal": mean_term([total / count.clamp(min=1) for total, count in layers])}
