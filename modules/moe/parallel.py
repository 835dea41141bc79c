"""Expert parallelism: splits a layer's experts over ranks, sends tokens to them and takes the results back.

Letters: R ranks of a group, E experts, C = E / R experts of each rank, M rows of this rank's tokens, P rows that it
computes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from descant.modules.core.dtensor import gather_parts
from descant.modules.core.host import to_device
from descant.modules.moe.active import expert_layers
from descant.modules.moe.grouped import Segments, fusible
from descant.modules.moe.layer import Experts


class _Exchange(torch.autograd.Function):
    """Exchange of rows in a group: ``give[r]`` to rank r, ``take[r]`` from it; gradients return times a factor."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, give: Sequence[int], take: Sequence[int], factor: float, group: Any) -> Tensor:
        ctx.give, ctx.take, ctx.factor, ctx.group = list(give), list(take), factor, group
        x_PD = x_MD.new_empty(sum(take), x_MD.shape[1])
        dist.all_to_all_single(x_PD, x_MD.contiguous(), ctx.take, ctx.give, group=group)
        return x_PD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_MD = grad_PD.new_empty(sum(ctx.give), grad_PD.shape[1])
        dist.all_to_all_single(grad_MD, grad_PD.contiguous(), ctx.give, ctx.take, group=ctx.group)
        return grad_MD.mul_(ctx.factor), None, None, None, None


def by_expert(count_RC: Tensor) -> Tensor:
    """Return int64 ``[P]``: the order that sorts rows by expert, if they lie rank by rank and, within it, by expert.

    >>> by_expert(torch.tensor([[1, 2], [2, 0]])).tolist()
    [0, 3, 4, 1, 2]
    """
    R, C = count_RC.shape
    return torch.arange(C).repeat(R).repeat_interleave(count_RC.flatten()).argsort(stable=True)


class ExpertGroup:
    """Ranks that share the experts of a layer: rank r has experts ``r C, ..., (r + 1) C - 1``.

    Every rank of the group must call it equally often, with or without rows. A call makes two exchanges of rows and one
    of counts, which the host reads. An expert's gradient is that of the mean loss over the group's ranks, as for all
    other parameters under data parallelism.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def __call__(self, experts: Experts, x_MD: Tensor, counts: Sequence[int]) -> Tensor:
        """Compute ``[M, D] -> [M, D]`` for rows sorted by expert; ``counts`` has the rows of each of the E experts."""
        R = self.size
        given_RC = torch.tensor(counts, device=x_MD.device).view(R, -1)
        taken_RC = torch.empty_like(given_RC)
        dist.all_to_all_single(taken_RC, given_RC, group=self.group)
        count_RC = taken_RC.cpu()
        give, take = torch.tensor(counts).view(R, -1).sum(dim=1).tolist(), count_RC.sum(dim=1).tolist()
        order_P = by_expert(count_RC)
        place_P = to_device(order_P.argsort(), x_MD.device)
        segments = Segments(to_device(count_RC.sum(dim=0), x_MD.device), fusible(x_MD, x_MD.dtype))
        x_PD = _Exchange.apply(x_MD, give, take, float(R), self.group)
        y_PD = experts(x_PD.index_select(0, to_device(order_P, x_MD.device)), segments)
        y_MD: Tensor = _Exchange.apply(y_PD.index_select(0, place_P), take, give, 1 / R, self.group)
        return y_MD

    def __deepcopy__(self, memo: Any) -> ExpertGroup:
        return self  # a process group belongs to its process and is not copied


def parallelize(network: nn.Module, group: Any = None) -> None:
    """Split the experts of all layers over the ranks of a group, in place, before the optimizer is created.

    All ranks must have the same weights before; each has its own slice of the experts afterwards.

        dist.init_process_group("gloo")
        parallelize(network)                                                # over all ranks
        parallelize(network, init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "expert"))["expert"].get_group())

    Routers, shared experts and all other parameters stay whole on every rank. Capacity applies to a rank's own tokens,
    as under data parallelism. DDP ignores the slices. Clipping by norm and checkpoints see only their rank's slice;
    :func:`whole_experts` gathers all of them. Source: GShard (Lepikhin 2020, arXiv 2006.16668).
    """
    ranks, names = ExpertGroup(group), list[str]()
    require_divided(network, ranks.size, "parallelize")
    for name, layer in expert_layers(network).items():
        E, R = layer.router.experts, ranks.size
        for part, parameter in list(layer.experts.named_parameters(recurse=False)):
            own = parameter.detach().chunk(R)[ranks.rank].clone()
            setattr(layer.experts, part, nn.Parameter(own, parameter.requires_grad))
            names.append(f"{name}.experts.{part}".lstrip("."))
        layer.experts.experts, layer.group = E // R, ranks
    ignored = getattr(network, "_ddp_params_and_buffers_to_ignore", [])
    network._ddp_params_and_buffers_to_ignore = [*ignored, *names]  # type: ignore[assignment]  # as DDP reads it


def require_divided(network: nn.Module, ranks: int, place: str, others: Sequence[int] = ()) -> None:
    """Raise ValueError, naming the first layer whose experts this number of ranks cannot share.

    Args:
        network: a network with expert layers.
        ranks: the number of ranks that share each layer's experts.
        place: the beginning of the message.
        others: numbers of ranks that the message may propose instead, including 1; all if empty.
    """
    for name, layer in expert_layers(network).items():
        E = layer.router.experts
        if layer.experts.separate:
            raise ValueError(f"{place}: {name or 'layer'}: experts of {type(layer.router).__name__} are not split")
        if E % ranks:
            best = max(n for n in others or range(1, ranks) if n < ranks and E % n == 0)
            raise ValueError(f"{place}: {name or 'layer'}: {ranks} ranks do not divide {E} experts; {best} do")


def whole_experts(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's state with the experts of all ranks, as in a single process, on every rank. Collective."""
    state = {name: gather_parts(x) for name, x in network.state_dict().items()}
    for name, layer in expert_layers(network).items():
        ranks = layer.group
        for part, own in layer.experts.named_parameters(recurse=False):
            if not isinstance(ranks, ExpertGroup) or isinstance(own, DTensor):  # split by Shard: gathered above
                continue
            slices = [torch.empty_like(own) for _ in range(ranks.size)]
            dist.all_gather(slices, own.detach().contiguous(), group=ranks.group)
            state[f"{name}.experts.{part}".lstrip(".")] = torch.cat(slices)
    return state
