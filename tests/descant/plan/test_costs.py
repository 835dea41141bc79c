"""Which kernels a step launches, and what they do, as CUDA and processors have them. Letters: B rows, T positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from descant.cli.errors import Refusal
from descant.modules.language import CausalLM, log_probabilities
from descant.modules.losses.blockwise import sigmoid_sums
from descant.modules.losses.exchange import Ring
from descant.modules.towers.image import PatchTower
from descant.modules.training_setup.activation_checkpointing import blocks_of, recompute
from descant.plan.fake_device import Simulated, patching_torch, register
from descant.plan.record import Recorder
from descant.plan.trace import Memory, Operation, Trace
from tests.ranks import run_ranks

B, HEADS, KEYS, T, WIDTH = 2, 4, 2, 16, 8


def recorded(step: Callable[[torch.device], Tensor], cpu: bool = False) -> list[Operation]:
    """Operations of a function of the device, and of its backward."""
    record = Recorder(copies=cpu)
    with Simulated(), patching_torch(cpu), record:
        out = step(register())
        record.phase = "backward"
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return record.operations


def names(operations: list[Operation], phase: str) -> list[str]:
    return [one.name for one in operations if one.phase == phase]


def gated(device: torch.device) -> Tensor:
    norm = nn.RMSNorm(WIDTH, device=device)
    return F.silu(norm(torch.empty(B, WIDTH, device=device)))


def attended(device: torch.device) -> Tensor:
    q = torch.empty(B, HEADS, T, WIDTH, device=device, requires_grad=True)
    k, v = (torch.empty(B, KEYS, T, WIDTH, device=device) for _ in range(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def without_kernels(device: torch.device) -> Tensor:
    x = torch.empty(4, 4, device=device)
    return torch.ops.aten._unsafe_view(torch.empty_like(x) + x.new_empty(4, 4), [16])


def in_place(device: torch.device) -> Tensor:
    return torch.empty(2, 5, device=device).addmm_(torch.empty(2, 3, device=device), torch.empty(3, 5, device=device))


def in_parts(device: torch.device) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return attended(device)


def every(rank: int) -> dict[str, list[Operation]]:
    made = {step.__name__: recorded(step) for step in (gated, attended, without_kernels, in_place, in_parts, siglip)}
    models = {model.__name__: recorded(model) for model in (llama, vit)}
    again = {f"{model.__name__} again": recorded(partial(model, again=True)) for model in (llama, vit)}
    return made | models | again | {"gated on a processor": recorded(gated, cpu=True)}


VOCAB, HIDDEN, DEPTH, PATCH, SIZE = 48, 24, 3, 4, 16
D = HEADS * WIDTH  # of a model


def built(model: nn.Module, device: torch.device, again: bool) -> nn.Module:
    """Move a model's shapes to the device; ``again``: backward computes each block again."""
    for block in blocks_of(model) if again else ():
        recompute(block, preserve_rng=False)
    return model.to_empty(device=device)


def llama(device: torch.device, again: bool = False) -> Tensor:
    """Log-probabilities of all tokens but the first of each row."""
    model: Any = built(CausalLM(VOCAB, D, DEPTH, HEADS, key_heads=KEYS, hidden=HIDDEN, length=T), device, again)
    id_BT = torch.zeros(B, T, dtype=torch.int64, device=device)
    h_ND = model(model.embed(id_BT))[:, :-1].flatten(0, 1)
    return log_probabilities(h_ND, model.head.weight, id_BT[:, 1:].flatten())


def vit(device: torch.device, again: bool = False) -> Tensor:
    model = built(PatchTower(SIZE, PATCH, D, DEPTH, HEADS), device, again)
    return model(torch.empty(B, 3, SIZE, SIZE, device=device)).h_BTD


def siglip(device: torch.device) -> Tensor:
    """Products of B rows with B others, in blocks of one row, which backward computes again."""
    a_BD, b_BD = (torch.empty(B, D, device=device, requires_grad=True) for _ in range(2))
    one, key_B = torch.ones((), device=device), torch.empty(B, dtype=torch.int64, device=device)
    return sigmoid_sums(a_BD, b_BD, one, one, key_B, torch.empty(B, dtype=torch.bool, device=device), Ring(rows=1))


@cache
def operations() -> dict[str, list[Operation]]:
    """In a process of its own: a device that is registered is there for all that runs in it."""
    found: dict[str, list[Operation]] = run_ranks(1, every)[0]
    return found


#: Products of one forward pass, by hand: 2 FLOPs for each number that a weight multiplies, and for each pair of tokens
#: 2 WIDTH of the attention's weights and as many of its values, in every head. A Llama's layer has q, k, v, o and three
#: matrices of the MLP; a ViT's q, k, v, o and two of four times the width.
PAIRS = 2 * 2 * B * T * T * D * DEPTH
LLAMA = 2 * B * T * (2 * D * D + 2 * D * KEYS * WIDTH + 3 * D * HIDDEN) * DEPTH + PAIRS
HEAD = 2 * B * (T - 1) * D * VOCAB
VIT = 2 * B * T * (4 * D * D + 2 * 4 * D * D) * DEPTH + PAIRS
PATCHES = 2 * B * T * 3 * PATCH**2 * D


def flops_of(name: str) -> tuple[int, int]:
    """FLOPs that the model has, and those that are done."""
    trace = Trace(B, Memory(0, 0, 0, 0, 0), operations()[name])
    return trace.model_flops, trace.flops


@pytest.mark.parametrize("name", ["llama", "llama again"])
def test_the_flops_of_a_llama_are_three_forward_passes(name: str) -> None:
    """Backward is two forward passes; the repeated logits and weights of the attention are not the model's."""
    model, done = flops_of(name)
    assert model == 3 * (LLAMA + HEAD)
    repeated = PAIRS // 2 + HEAD
    if name == "llama":
        assert done == model + repeated
    else:
        assert model + repeated + LLAMA // 2 < done <= model + repeated + LLAMA


@pytest.mark.parametrize("name", ["vit", "vit again"])
def test_the_flops_of_a_vit_are_three_forward_passes(name: str) -> None:
    """Images ask for no gradient, so that the patches are two."""
    model, done = flops_of(name)
    assert model == 3 * VIT + 2 * PATCHES
    if name == "vit":
        assert done == model + PAIRS // 2
    else:
        assert model + PAIRS // 2 + VIT // 2 < done <= model + PAIRS // 2 + VIT


def test_logits_in_blocks_repeat_one_product_of_four() -> None:
    product = 2 * B * B * D
    assert flops_of("siglip") == (3 * product, 4 * product)


def convolved(device: torch.device, last: bool = False) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(1, 2, 4, 4, device=device, memory_format=layout)
    once = F.conv2d(x, torch.empty(2, 2, 1, 1, device=device))  # has the layout of its input
    return F.conv2d(once, torch.empty(3, 2, 3, 3, device=device))


def convolved_last(device: torch.device) -> Tensor:
    return convolved(device, last=True)


def normalizer(device: torch.device) -> Tensor:
    return torch.empty(B, 64, device=device).logsumexp(dim=1)


def peaks(rank: int) -> dict[str, list[int]]:
    """Bytes on an accelerator and on a processor."""
    found: dict[str, list[int]] = {}
    for step in (convolved, convolved_last, normalizer):
        for copies in (False, True):
            with Simulated(), patching_torch(copies), Recorder(copies) as record:
                step(register())
                found.setdefault(step.__name__, []).append(record.peak)
    return found


def test_operators_that_copy_an_argument_hold_it_twice() -> None:
    """Convolutions of a processor their weight; logsumexp what it exponentiates, before it adds up."""
    (found,) = run_ranks(1, peaks)
    weight = 4 * 3 * 2 * 3 * 3
    assert found["convolved"][1] - found["convolved"][0] == weight
    assert found["convolved_last"][1] - found["convolved_last"][0] == 2 * weight
    assert found["normalizer"] == [4 * (2 * B * 64 + B)] * 2


def late(rank: int) -> str:
    torch.ones(1, requires_grad=True).sum().backward()
    with pytest.raises(Refusal) as refused:
        Simulated()
    return str(refused.value)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="its device has a queue, which the plan's is given")
def test_a_process_that_trained_before_is_refused() -> None:
    assert run_ranks(1, late) == ["plan: this process computed gradients before: plan in a process of its own"]


def test_single_kernels_of_cuda() -> None:
    on_cuda, on_cpu = operations()["gated"], operations()["gated on a processor"]
    assert names(on_cuda, "forward")[-2:] == ["_fused_rms_norm", "silu"]
    assert names(on_cuda, "backward") == ["silu_backward", "_fused_rms_norm_backward"]
    assert {"pow", "mean", "rsqrt"} <= set(names(on_cpu, "forward")) and "silu_backward" in names(on_cpu, "backward")


def test_what_launches_nothing_is_no_operation() -> None:
    assert names(operations()["without_kernels"], "forward") == ["add"]


def test_a_product_in_place_is_counted() -> None:
    assert [one.flops for one in operations()["in_place"]] == [2 * 2 * 3 * 5]


def test_causal_attention_does_what_is_not_masked() -> None:
    """Two products of T x T weights forward and five backward, of every head of the queries; keys are not copied."""
    forward, backward = [one for one in operations()["attended"] if "scaled_dot_product" in one.name]
    pairs = B * HEADS * T * T
    assert (forward.flops, backward.flops) == (2 * 2 * pairs * WIDTH, 2 * 5 * pairs * WIDTH)
    assert (forward.repeated, backward.repeated) == (0.0, 0.2)  # backward makes the weights again
    assert forward.done == backward.done == (T + 1) / (2 * T)
    assert forward.read == 4 * B * (HEADS + 2 * KEYS) * T * WIDTH


def test_attention_of_parts_writes_its_weights() -> None:
    found = operations()["in_parts"]
    assert {"bmm"} < set(names(found, "forward")) and not any("scaled_dot" in one.name for one in found)
    assert max(one.written for one in found) >= 4 * B * HEADS * T * T
