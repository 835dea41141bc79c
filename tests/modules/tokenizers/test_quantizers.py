"""Quantizers against explicit loops in double precision: nearest codes, moving codebooks, dead codes, scalar levels.

Letters: N tokens, L layers, K codes, C width of a code, R candidates.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.tokenizers.quantizers import (
    FSQ,
    NEVER,
    RVQ,
    VQ,
    Quantized,
    Seen,
    fsq,
    residual_vq,
    update_averages,
)
from tests.tolerance import F64, rounding

N, L, K, C = 40, 2, 6, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_nearest_codes_of_what_is_left_equal_a_loop_and_gradients_pass_straight() -> None:
    z_NC, code_LKC, weight_NC = drawn(N, C).requires_grad_(), drawn(L, K, C, seed=1), drawn(N, C, seed=2)
    found, wanted_NC = residual_vq(z_NC, code_LKC), weight_NC.clone()
    assert found.commit_N is not None
    for n in range(N):
        left, total, commit = z_NC[n].tolist(), [0.0] * C, 0.0
        for layer, code_KC in enumerate(code_LKC.tolist()):
            assert found.left_NLC[n, layer].tolist() == close(left)
            k = min(range(K), key=lambda k: sum((a - b) ** 2 for a, b in zip(left, code_KC[k], strict=True)))
            assert int(found.id_NL[n, layer]) == k
            left = [a - b for a, b in zip(left, code_KC[k], strict=True)]
            total = [a + b for a, b in zip(total, code_KC[k], strict=True)]
            commit += sum(a**2 for a in left) / C
            wanted_NC[n] += 2 / C * torch.tensor(left, dtype=F64)
        assert found.z_NC[n].tolist() == close(total)
        assert float(found.commit_N[n].detach()) == close(commit)
    ((found.z_NC * weight_NC).sum() + found.commit_N.sum()).backward()
    torch.testing.assert_close(z_NC.grad, wanted_NC, **rounding(64, F64))


def close(wanted: Any) -> Any:
    return pytest.approx(wanted, rel=1e-13, abs=1e-13)  # sums of a few numbers of about 1


def of(found: Quantized, real_N: Tensor, key_N: Tensor) -> Seen:
    return Seen.of(found, real_N, key_N, K, K)


def step(seed: int = 3) -> tuple[Quantized, Tensor, Tensor]:
    """Quantised tokens of few codes, some of them padding, and a draw for each."""
    found = residual_vq(drawn(N, C, seed=seed), torch.cat([drawn(L, 2, C), 9 + drawn(L, K - 2, C)], dim=1))
    order_N = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return found, torch.arange(N) % 5 > 0, order_N * 7919


@pytest.mark.parametrize("dead", [None, 0.9])
def test_codebooks_move_and_dead_codes_begin_anew_as_in_a_loop(dead: float | None) -> None:
    (found, real_N, key_N), decay = step(), 0.9
    count_LK, sum_LKC = drawn(L, K, seed=4).abs(), drawn(L, K, C, seed=5)
    new_count_LK, new_sum_LKC = update_averages(count_LK, sum_LKC, of(found, real_N, key_N), decay, dead)
    replaced, order = 0, [int(n) for n in key_N.argsort() if real_N[n]]
    for layer in range(L):
        use = [float(count_LK[layer, k]) * decay for k in range(K)]
        vectors = [sum_LKC[layer, k] * decay for k in range(K)]
        for n in range(N):
            if real_N[n]:
                k = int(found.id_NL[n, layer])
                use[k], vectors[k] = use[k] + (1 - decay), vectors[k] + (1 - decay) * found.left_NLC[n, layer]
        even, waiting = sum(use) / K, iter(order)
        for k in range(K):
            if dead is not None and use[k] < dead * even:
                use[k], vectors[k], replaced = even, even * found.left_NLC[next(waiting), layer], replaced + 1
        torch.testing.assert_close(new_count_LK[layer], torch.tensor(use, dtype=F64), **rounding(N, F64))
        torch.testing.assert_close(new_sum_LKC[layer], torch.stack(vectors), **rounding(N, F64))
    assert (replaced > 1) == (dead is not None)
    nothing = of(found, torch.zeros(N, dtype=torch.bool), key_N)
    assert torch.equal(update_averages(count_LK, sum_LKC, nothing, decay, None)[1], sum_LKC)


def test_parts_of_a_step_are_seen_as_the_whole_and_no_more_codes_are_replaced_than_there_are_tokens() -> None:
    found, real_N, key_N = step()
    parts = [of(Quantized(*(x[p::2] for x in found)), real_N[p::2], key_N[p::2]) for p in (0, 1)]  # type: ignore[index]
    whole, both = of(found, real_N, key_N), parts[0].with_(parts[1])
    assert torch.equal(whole.key_R, both.key_R) and torch.equal(whole.z_RLC, both.z_RLC)
    torch.testing.assert_close(whole[:2], both[:2], **rounding(N, F64))
    few = of(found, torch.arange(N) < 2, key_N)
    assert few.key_R.tolist().count(NEVER) == K - 2
    count_LK, sum_LKC = update_averages(torch.zeros(L, K, dtype=F64), torch.zeros(L, K, C, dtype=F64), few, 0.9, 0.1)
    assert ((count_LK > 0).sum(dim=1) <= 4).all() and (count_LK > 0).any(dim=1).all() and sum_LKC.isfinite().all()


def test_each_layer_leaves_less() -> None:
    torch.manual_seed(0)
    quantizer = RVQ(codes=16, layers=4, width=C, decay=0.8).build(C, C).double()
    z_NC = drawn(400, C)
    for k in range(30):
        key_N = torch.randperm(len(z_NC), generator=torch.Generator().manual_seed(k))
        quantizer.observe(quantizer.quantize(z_NC), torch.ones(len(z_NC), dtype=torch.bool), key_N)
    found = quantizer.quantize(z_NC)
    errors = found.left_NLC.square().sum(dim=2).mean(dim=0).tolist()
    errors.append(float((found.z_NC - z_NC).square().sum(dim=1).mean()))
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors))
    assert torch.equal(quantizer.vectors(found.id_NL), found.z_NC)


def test_scalar_levels_equal_a_loop_and_ids_are_a_bijection() -> None:
    levels = [8, 5, 2, 3]
    quantizer, z_NC = FSQ(levels).build(4, 4).double(), 3 * drawn(N, 4)
    found_NC, id_N = fsq(z_NC, torch.tensor(levels))
    for n in range(N):
        number, base = 0, 1
        for c, size in enumerate(levels):
            half, offset = (size - 1) * 0.999 / 2, 0.5 if size % 2 == 0 else 0.0
            q = round(half * math.tanh(float(z_NC[n, c]) + math.tan(offset / half)) - offset)
            assert float(found_NC[n, c]) == q / (size // 2)  # of integers: no rounding
            number, base = number + (q + size // 2) * base, base * size
        assert int(id_N[n]) == number
    every_K = torch.arange(math.prod(levels))
    vector_KC = quantizer.vectors(every_K[:, None])
    assert len(vector_KC.unique(dim=0)) == len(every_K) == quantizer.codes
    half_C, even_C = (torch.tensor(levels) - 1) * 0.999 / 2, (torch.tensor(levels) % 2 == 0) / 2
    inside_KC = ((vector_KC * (torch.tensor(levels) // 2) + even_C) / half_C).clamp(-1 + 1e-9, 1 - 1e-9)
    assert torch.equal(fsq(inside_KC.atanh() - (even_C / half_C).tan(), torch.tensor(levels))[1], every_K)


def test_codes_stay_in_single_precision_and_a_step_that_is_not_finite_leaves_no_nan() -> None:
    quantizer = VQ(codes=4, width=C).build(C, C).to(torch.bfloat16)
    assert quantizer.code_LKC.dtype == quantizer.count_LK.dtype == torch.float32
    quantizer = VQ(codes=4, width=C).build(C, C)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(torch.tensor([[torch.nan, 0.0, 1.0], [1.0, 2.0, 3.0]]))
    assert found.z_NC.dtype == torch.float32
    quantizer.observe(found, torch.ones(2, dtype=torch.bool), torch.arange(2))
    assert all(x.isfinite().all() for x in quantizer.buffers()) and float(quantizer.count_LK.sum()) > 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="codes 1: at least 2"):
        VQ(codes=1)
    with pytest.raises(ValueError, match=r"levels \[8, 1\]: one coordinate or more, of at least 2 levels each"):
        FSQ([8, 1])
