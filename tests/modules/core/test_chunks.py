"""GradCache: one chunk's activations at a time, with the gradients of the whole batch."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from descant.modules.core.chunks import compute_in_chunks, looks_at_the_batch
from descant.modules.losses import InfoNCE
from descant.modules.training_setup.activation_checkpointing import recompute as recompute_block
from tests.tolerance import F32, rounding, ulps

B, D, LAYERS, CHUNKS = 16, 6, 3, 4


class Watched(nn.Module):
    """A tanh layer that knows how many elements of its outputs are alive."""

    alive = peak = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x_BD: Tensor) -> Tensor:
        h_BD = torch.tanh(self.linear(x_BD))
        Watched.alive += h_BD.numel()
        Watched.peak = max(Watched.peak, Watched.alive)
        weakref.finalize(h_BD.untyped_storage(), self.died, h_BD.numel())  # lives as long as autograd keeps it
        return h_BD

    @staticmethod
    def died(elements: int) -> None:
        Watched.alive -= elements


def towers(*extra: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    a, b = (nn.Sequential(*(Watched() for _ in range(LAYERS)), *extra) for _ in range(2))
    return a, b


def loss_of(z_a_BD: Tensor, z_b_BD: Tensor) -> Tensor:
    unit = (nn.functional.normalize(z_BD, dim=-1) for z_BD in (z_a_BD, z_b_BD))
    return InfoNCE(temperature=0.5)(*unit, torch.arange(B), torch.ones(B, dtype=torch.bool)).mean()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, D, generator=generator), torch.randn(B, D, generator=generator)


def gradients(a: nn.Module, b: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for module in (a, b) for p in module.parameters() if p.grad is not None]


def peak(chunks: int) -> tuple[int, int, list[Tensor]]:
    """Elements alive after the forward and at most at any time, and the gradients."""
    a, b = towers()
    Watched.alive = Watched.peak = 0
    x, y = inputs()
    loss = loss_of(compute_in_chunks(a, x, chunks, a), compute_in_chunks(b, y, chunks, b))
    kept = Watched.alive
    loss.backward()
    assert Watched.alive == 0
    return kept, Watched.peak, gradients(a, b)


def test_one_chunk_is_alive_at_a_time() -> None:
    kept, most, wanted = peak(1)
    assert kept == most == 2 * LAYERS * B * D
    kept, most, found = peak(CHUNKS)
    # kept are at most the features themselves; in backward one chunk of one tower comes beside them
    assert kept <= 2 * B * D
    assert most <= 2 * B * D + LAYERS * B // CHUNKS * D
    assert len(found) == len(wanted) == 4 * LAYERS
    for grad, want in zip(found, wanted, strict=True):
        # gradients of 0.1 at most: sums over rows, through the layers
        torch.testing.assert_close(grad, want, rtol=0, atol=0.1 * ulps(B * LAYERS, F32))


@pytest.mark.parametrize("blocks", [False, True], ids=["plain", "checkpointed"])
def test_random_draws_are_those_of_the_first_pass(blocks: bool) -> None:
    """Dropout: the same gradients as chunk after chunk with all activations kept."""
    found = []
    for recompute in (True, False):
        a, b = towers(nn.Dropout(0.5))
        if blocks and recompute:
            for layer in (*a, *b):
                recompute_block(layer, preserve_rng=True)
        x, y = inputs()
        torch.manual_seed(7)
        if recompute:
            z_a, z_b = compute_in_chunks(a, x, CHUNKS, a), compute_in_chunks(b, y, CHUNKS, b)
        else:
            z_a, z_b = (torch.cat([m(part) for part in v.tensor_split(CHUNKS)]) for m, v in ((a, x), (b, y)))
        torch.manual_seed(8)  # what is drawn between the passes does not matter
        loss_of(z_a, z_b).backward()
        found.append(gradients(a, b))
    assert any(grad.any() for grad in found[0])
    for grad, want in zip(*found, strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=0.2 * ulps(B * LAYERS, F32))  # gradients of 0.2 at most


def test_several_backward_passes() -> None:
    """As a harmonizer does it: each term alone, then all."""
    a, _ = towers()
    x, _ = inputs()
    z_BD = compute_in_chunks(a, x, CHUNKS, a)
    terms, parameters = [z_BD.square().sum(), z_BD.sin().sum()], list(a.parameters())
    apart = [torch.autograd.grad(term, parameters, retain_graph=True) for term in terms]
    together = torch.autograd.grad(sum(terms, torch.zeros(())), parameters)
    for first, second, both in zip(*apart, together, strict=True):
        torch.testing.assert_close(first + second, both, **rounding(B * LAYERS, F32))


def test_gradients_of_chunks_add_up_in_single_precision() -> None:
    """Under bfloat16 autocast 64 chunks are no worse than one: their weights' gradients never meet in bfloat16."""
    torch.manual_seed(0)
    layer, x_BD = nn.Linear(32, 32, bias=False), torch.randn(256, 32)
    target_BD = torch.randn(256, 32)

    def gradient(chunks: int, bf16: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z_BD = compute_in_chunks(layer, x_BD, chunks, layer)
        (grad,) = torch.autograd.grad((z_BD.float() - target_BD).square().mean(), layer.weight)
        return grad

    exact = gradient(1, False)
    one, many = (float((gradient(chunks, True) - exact).norm()) for chunks in (1, 64))
    assert one > 0
    assert many < 1.5 * one


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_count_a_chunk_once(momentum: float | None) -> None:
    torch.manual_seed(0)
    norm, x_BD = nn.BatchNorm1d(D, momentum=momentum), inputs()[0]
    compute_in_chunks(norm, x_BD, CHUNKS, norm).square().sum().backward()
    counted = nn.BatchNorm1d(D, momentum=momentum)
    for part in x_BD.tensor_split(CHUNKS):
        counted(part)
    assert int(norm.num_batches_tracked) == CHUNKS  # type: ignore[arg-type]
    torch.testing.assert_close(norm.running_mean, counted.running_mean, **rounding(B, F32))
    torch.testing.assert_close(norm.running_var, counted.running_var, **rounding(B, F32))


def test_what_looks_at_the_batch() -> None:
    net = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
    assert looks_at_the_batch(net)
    assert not looks_at_the_batch(net.eval())
    assert not looks_at_the_batch(nn.Sequential(nn.LayerNorm(D), nn.GroupNorm(2, D)))


def test_without_gradients_the_batch_is_whole() -> None:
    seen: list[int] = []
    net = nn.Linear(D, D)
    net.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    x, _ = inputs()
    with torch.no_grad():
        compute_in_chunks(net, x, CHUNKS, net)
    assert seen == [B]
