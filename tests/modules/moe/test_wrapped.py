"""Networks with experts, sharded, compiled, recomputed or cut into chunks: numbers of a plain one, or one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from descant.modules.language import CausalLM
from descant.modules.masking.adapters import Adapters
from descant.modules.masking.discrete_adapters import TableAdapter
from descant.modules.moe import Capacity, ExpertLayers, Router, Routing, TopKRouter, TopPRouter, expert_terms
from descant.modules.towers.vit import Trunk
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Compile
from descant.recipes import Masked
from tests.callbacks.evaluate.test_embeddings import make
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps

V, T, B = 11, 6, 4


def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    experts = ExpertLayers(4, TopKRouter(2), hidden=8, every=2, shared=1, z=0.01)
    some: dict[str, Any] = {"lm": CausalLM(V, 8, 2, 2, hidden=16, length=16, experts=experts)}
    return some | {"trunk": Trunk(8, 2, 2, experts=ExpertLayers(4, TopPRouter(0.6, null_experts=1), hidden=8, z=0.01))}


class Loss(nn.Module):
    """Of some of four samples; auxiliary terms are of those of all ranks."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: slice) -> Tensor:
        generator, routings, network = torch.Generator().manual_seed(1), list[Routing](), self.network
        ids_BT, x_BTD = torch.randint(1, V, (B, T), generator=generator), torch.randn(B, T, 8, generator=generator)
        if isinstance(network, CausalLM):
            h_BTD = network(network.embed(ids_BT[rows]), routings=routings)
        else:
            h_BTD = network(x_BTD[rows], None, None, routings).h_BTD
        terms = expert_terms(network.experts, routings)
        total: Tensor = h_BTD.square().mean() + torch.stack([term.value.sum() for term in terms.values()]).sum()
        return total


def sharded(rank: int, world: int) -> list[dict[str, Tensor]]:
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = []
    for network in networks().values():
        for block in network.layers:
            fully_shard(block)
        whole: Any = fully_shard(Loss(network))
        whole(slice(rank * B // world, (rank + 1) * B // world)).backward()
        found.append({name: p.grad.full_tensor() for name, p in whole.named_parameters()})
    dist.destroy_process_group()
    return found


@pytest.mark.ddp
def test_experts_under_fsdp_have_the_gradients_of_one_process() -> None:
    ranks = run_ranks(2, sharded, 2)
    for n, network in enumerate(networks().values()):
        whole = Loss(network)
        whole(slice(None)).backward()
        for found in ranks:
            for name, p in whole.named_parameters():
                torch.testing.assert_close(found[n][name], p.grad, rtol=1e-5, atol=1e-5, msg=name)  # as asked


def recipe(router: Router | None = None, **options: Any) -> Masked:
    torch.manual_seed(0)
    experts = ExpertLayers(
        4, router or TopKRouter(2, bias_rate=0.01), hidden=8, every=2, z=0.01, capacity=Capacity(1.0)
    )
    adapters = Adapters(others={"image": TableAdapter([0] * 4), "text": TableAdapter([0] * 4)})
    return Masked(adapters, Trunk(16, 2, 2, experts=experts), **options)


def trained(made: Any) -> tuple[dict[str, float], dict[str, Tensor], Any]:
    """Terms, gradients and the router of a step."""
    output = made.train()(make())
    terms = output.terms | output.aux
    torch.stack([term.value.sum() for term in terms.values()]).sum().backward()
    gradients = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    values = {name: float(term.value.detach().sum()) for name, term in terms.items()}
    return values, gradients, made.towers["encoder"].layers[1].moe.router


def same(other: Any, plain: Any) -> None:
    (values, gradients, router), (wanted, expected, known) = trained(other), trained(plain)
    assert values == pytest.approx(wanted, rel=ulps(256, F32)) and "experts/z" in values
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)  # sums in another order
    assert torch.equal(router.pending, known.pending) and torch.equal(router.dropped, known.dropped)


def test_recomputed_blocks_count_and_weigh_once() -> None:
    made = recipe()
    Checkpointing().apply(made)
    same(made, recipe())


@pytest.mark.slow
def test_a_traced_trunk_has_the_same_terms_and_gradients() -> None:
    """As ``Compile`` traces it, in graphs between the reads of counts; its kernels would take minutes."""
    made = recipe()
    made.towers["encoder"].compile(backend="aot_eager")
    same(made, recipe())


def test_one_line_for_what_experts_do_not_go_with() -> None:
    with pytest.raises(ValueError, match="compile: fullgraph: tower encoder has experts, whose counts the host reads"):
        Compile(fullgraph=True).apply(recipe())
    with pytest.raises(ValueError, match="chunks 2: no term of Masked contrasts samples of a batch"):
        recipe(chunks=2)
