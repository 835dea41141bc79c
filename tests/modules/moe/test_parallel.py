"""Experts split over ranks against one process: outputs, gradients of experts, router and tokens; what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from descant.modules.moe import Capacity, Marks, MoELayer, StaticSkill, TopKRouter, TopPRouter
from descant.modules.moe.parallel import parallelize, whole_experts
from tests.ranks import run_ranks

pytestmark = pytest.mark.ddp
N, D, E = 20, 6, 4
#: What is asked for; sums of at most 80 rows in float64 differ by far less.
CLOSE: Any = {"rtol": 1e-6, "atol": 1e-6}
CASES: dict[str, Any] = {
    "dropless": lambda: MoELayer(D, 8, E, TopKRouter(2), shared=1),
    "capacity": lambda: MoELayer(D, 8, E, TopKRouter(2), capacity=Capacity(0.7), form="gelu"),
    "null": lambda: MoELayer(D, 8, E, TopPRouter(0.5, null_experts=1)),
}


def layer(name: str) -> MoELayer:
    torch.manual_seed(0)
    made: Any = CASES[name]().double()
    for p in made.parameters():
        p.data.normal_()
    return made


class Network(nn.Module):
    def __init__(self, moe: MoELayer) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, h_ND: Tensor, marks: Marks) -> Tensor:
        y_ND: Tensor = self.moe(h_ND, marks)[0]
        return y_ND


def tokens(rank: int) -> tuple[Tensor, Marks]:
    """Of the last of four ranks all are padding."""
    h_ND = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    return h_ND.requires_grad_(), Marks(valid=(torch.arange(N) % 5 > 0) & (rank < 3))


def loss(y_ND: Tensor, rank: int) -> Tensor:
    return (y_ND * torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(99 + rank))).sum()


def split(rank: int, world: int) -> list[Any]:
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results = list[Any]()
    for name in CASES:
        network = Network(layer(name))
        parallelize(network)
        assert network.moe.experts.experts == E // world
        model, (h_ND, marks) = DistributedDataParallel(network), tokens(rank)
        y_ND = model(h_ND, marks)
        loss(y_ND, rank).backward()
        gradients = {n: p.grad for n, p in network.named_parameters()}
        results.append((y_ND.detach(), h_ND.grad, gradients, whole_experts(network)))
    dist.destroy_process_group()
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_split_experts_are_those_of_one_process(world: int) -> None:
    ranks = run_ranks(world, split, world)
    for case, name in enumerate(CASES):
        whole: Any = Network(layer(name))
        batches: Any = [tokens(r) for r in range(world)]
        outputs = [whole(*batch) for batch in batches]
        torch.stack([loss(y, r) for r, y in enumerate(outputs)]).mean().backward()
        for r, results in enumerate(ranks):
            y_ND, grad_ND, gradients, state = results[case]
            torch.testing.assert_close(y_ND, outputs[r], **CLOSE)
            torch.testing.assert_close(grad_ND, world * batches[r][0].grad, **CLOSE)  # of its own loss, not the mean
            for n, p in whole.named_parameters():
                wanted = p.grad.chunk(world)[r] if ".experts." in n else p.grad
                torch.testing.assert_close(gradients[n], wanted, **CLOSE, msg=f"{name} {n}")
            assert all(torch.equal(state[n], x) for n, x in whole.state_dict().items())


def on_a_mesh(rank: int) -> Tensor:
    dist.init_process_group("gloo", rank=rank, world_size=4)
    mesh, made = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert")), layer("dropless")
    parallelize(made, mesh["expert"].get_group())
    twin = copy.deepcopy(made)
    with pytest.raises(ValueError, match="parallelize: layer: experts of StaticSkill are not split"):
        parallelize(MoELayer(D, 8, E, StaticSkill([[0, 1], [2]])))
    with pytest.raises(ValueError, match="parallelize: layer: 4 ranks do not divide 6 experts; 3 do"):
        parallelize(MoELayer(D, 8, 6, TopKRouter(2)))
    y_ND = twin(*tokens(rank))[0].detach()
    dist.destroy_process_group()
    return y_ND


def test_an_axis_of_a_mesh_and_what_is_refused() -> None:
    for r, y_ND in enumerate(run_ranks(4, on_a_mesh)):
        torch.testing.assert_close(y_ND, layer("dropless")(*tokens(r))[0].detach(), **CLOSE)
