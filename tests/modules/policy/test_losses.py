"""Policy losses against explicit loops in double precision. Letters: N tokens, B answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.core.objective import Term
from descant.modules.policy import (
    CISPO,
    KL,
    AnswerRatio,
    Clipped,
    Counts,
    DPOLoss,
    LocalTokenMean,
    PolicyBatch,
    PolicyLoss,
    SequenceMean,
    SequenceSum,
    TokenMean,
)
from tests.tolerance import F64, quotient, rounding, ulps

CLOSE = ulps(256, F64)  # means of at most 33 terms, whose exponentials of ratios carry roundings of logarithms up to 3
ZERO = torch.zeros((), dtype=torch.float64)
LENGTHS = (4, 1, 0, 6, 3, 5)
LIVE = (True, True, True, False, True, True)


def drawn(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, live: tuple[bool, ...] = LIVE) -> PolicyBatch:
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    log_N = -torch.rand(n, generator=g, dtype=torch.float64) * 3
    moved = torch.randn(n, generator=g, dtype=torch.float64) * 0.4
    reference_N = log_N + torch.randn(n, generator=g, dtype=torch.float64) * 0.5
    sample_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    advantage_B = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    return PolicyBatch(
        log_N.requires_grad_(), log_N.detach() - moved, sample_N, advantage_B, torch.tensor(live), reference_N
    )


def whole(term: Term) -> Tensor:
    """What the base makes of a term in a step of one micro-batch on one rank."""
    norm = term.count().clamp(min=1) if isinstance(term.norm, str) else term.norm
    return term.sum() / norm


def counts(d: PolicyBatch) -> Counts:
    return Counts.of(d.length_B, d.valid_B)


# explicit loops -----------------------------------------------------------------------------------------------------


def tokens_of(d: PolicyBatch, b: int) -> list[int]:
    return [n for n in range(len(d.log_N)) if int(d.sample_N[n]) == b]


def ratios(d: PolicyBatch, whole_answers: bool) -> dict[int, Tensor]:
    found = {}
    for b in range(len(d.valid_B)):
        own = tokens_of(d, b)
        for n in own:
            if whole_answers:
                found[n] = torch.exp(sum((d.log_N[k] - d.old_N[k] for k in own), ZERO) / len(own))
            else:
                found[n] = torch.exp(d.log_N[n] - d.old_N[n])
    return found


def clipped(
    d: PolicyBatch, low: float, high: float, sequence: bool, cap: float | None, dual: float | None
) -> list[Tensor]:
    w, values = ratios(d, sequence), []
    for n in range(len(d.log_N)):
        a, r = float(d.advantage_B[d.sample_N[n]]), w[n]
        bounded = r if 1 - low <= r.item() <= 1 + high else r.new_tensor(min(max(r.item(), 1 - low), 1 + high))
        free = r if cap is None or r.item() <= cap else r.new_tensor(cap)
        one, two = free * a, bounded * a
        value = -(one if one.item() <= two.item() else two)
        if dual is not None and a < 0 and value.item() > -dual * a:
            value = r.new_tensor(-dual * a)
        values.append(value)
    return values


def cispo(d: PolicyBatch, high: float) -> list[Tensor]:
    w = ratios(d, False)
    return [-min(w[n].item(), high) * float(d.advantage_B[d.sample_N[n]]) * d.log_N[n] for n in range(len(d.log_N))]


def kl(d: PolicyBatch, beta: float, corrected: bool) -> list[Tensor]:
    assert d.reference_N is not None
    values = []
    for n in range(len(d.log_N)):
        off = d.reference_N[n] - d.log_N[n]
        value = beta * (torch.exp(off) - off - 1)
        values.append(value * torch.exp(d.log_N[n] - d.old_N[n]) if corrected else value)
    return values


def aggregated(values: list[Tensor], d: PolicyBatch, how: str, length: int = 8) -> Tensor:
    live = [b for b in range(len(d.valid_B)) if bool(d.valid_B[b]) and tokens_of(d, b)]
    sums = {b: sum((values[n] for n in tokens_of(d, b)), ZERO) for b in live}
    if how == "sequence-mean":
        return sum((sums[b] / len(tokens_of(d, b)) for b in live), ZERO) / len(live)
    if how == "sequence-sum":
        return sum(sums.values(), ZERO) / (len(live) * length)
    return sum(sums.values(), ZERO) / sum(len(tokens_of(d, b)) for b in live)


AGGREGATIONS: dict[str, Callable[[], Any]] = {
    "sequence-mean": SequenceMean,
    "sequence-sum": lambda: SequenceSum(8),
    "token-mean": TokenMean,
    "local": LocalTokenMean,
}
SURROGATES: dict[str, tuple[Any, Callable[[PolicyBatch], list[Tensor]]]] = {
    "ppo": (Clipped(), lambda d: clipped(d, 0.2, 0.2, False, None, None)),
    "clip-higher": (Clipped(0.1, 0.28), lambda d: clipped(d, 0.1, 0.28, False, None, None)),
    "two-sided": (Clipped(cap=1.3), lambda d: clipped(d, 0.2, 0.2, False, 1.3, None)),
    "dual": (Clipped(dual=1.2), lambda d: clipped(d, 0.2, 0.2, False, None, 1.2)),
    "gspo": (Clipped(0.05, 0.1, AnswerRatio()), lambda d: clipped(d, 0.05, 0.1, True, None, None)),
    "cispo": (CISPO(1.2), lambda d: cispo(d, 1.2)),
}


def gradient(value: Tensor, d: PolicyBatch) -> Tensor:
    return torch.autograd.grad(value, d.log_N, retain_graph=True)[0]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_value_and_gradient_of_an_explicit_loop(surrogate: str, aggregation: str) -> None:
    made, by_hand = SURROGATES[surrogate]
    for seed in range(6):
        d = drawn(seed)
        terms, seen = PolicyLoss(made, AGGREGATIONS[aggregation]())(d, counts(d))
        value, wanted = whole(terms["policy"]), aggregated(by_hand(d), d, aggregation)
        torch.testing.assert_close(value, wanted, rtol=0, atol=CLOSE)
        torch.testing.assert_close(gradient(value, d), gradient(wanted, d), rtol=0, atol=CLOSE)
        assert set(terms) == {"policy"} and all(x_N.shape == d.log_N.shape for x_N in seen.values())


@pytest.mark.parametrize("corrected", [False, True])
def test_kl_is_a_term_of_its_own(corrected: bool) -> None:
    d = drawn(3)
    terms, seen = PolicyLoss(None, TokenMean(), KL(0.04, corrected))(d, counts(d))
    value, wanted = whole(terms["kl"]), aggregated(kl(d, 0.04, corrected), d, "token-mean")
    torch.testing.assert_close(value, wanted, rtol=0, atol=CLOSE)
    torch.testing.assert_close(gradient(value, d), gradient(wanted, d), rtol=0, atol=CLOSE)
    assert (seen["kl"] >= 0).all()


def test_on_policy_the_correction_is_in_the_gradient_alone() -> None:
    d = drawn(4)
    d = d._replace(old_N=d.log_N.detach())
    plain, corrected = (KL(1.0, flag)(d).sum() for flag in (False, True))
    torch.testing.assert_close(plain, corrected, **rounding(19, F64))
    assert (gradient(plain, d) - gradient(corrected, d)).abs().max() > 0.01


def test_the_gradient_of_an_answers_ratio_by_finite_differences() -> None:
    d = drawn(5)
    loss = PolicyLoss(Clipped(0.5, 0.5, AnswerRatio()), SequenceMean())

    def at(log_N: Tensor) -> float:
        return float(whole(loss(d._replace(log_N=log_N), counts(d))[0]["policy"]).detach())

    found = gradient(whole(loss(d, counts(d))[0]["policy"]), d)
    for n in range(len(d.log_N)):
        step_N = torch.zeros_like(d.log_N).index_fill(0, torch.tensor([n]), 1e-6)
        slope = (at(d.log_N.detach() + step_N) - at(d.log_N.detach() - step_N)) / 2e-6
        # at a step of 1e-6, below the best: rounding is divided by it
        assert slope == pytest.approx(float(found[n]), abs=quotient(F64, scale=1e3))


def test_clipped_tokens_are_logged() -> None:
    log_N = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64).log()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    d = PolicyBatch(log_N, torch.zeros(5, dtype=torch.float64), torch.arange(5), signs, torch.ones(5, dtype=torch.bool))
    seen = Clipped()(d)[1]
    assert seen["clipped_high"].tolist() == [1, 0, 0, 0, 0] and seen["clipped_low"].tolist() == [0, 0, 0, 1, 0]
    assert CISPO(1.2)(d)[1]["clipped_high"].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(("aggregation", "same"), [(name, name != "local") for name in AGGREGATIONS])
def test_micro_batches_have_the_gradient_of_the_whole_step(aggregation: str, same: bool) -> None:
    """Micro-batches of unequal lengths; the base divides a local norm by how many there are."""
    lengths = (4, 1, 0, 6, 3, 5, 12, 2)
    d = drawn(7, lengths, (True,) * 6 + (False, True))
    loss = PolicyLoss(None, AGGREGATIONS[aggregation]())
    wanted = gradient(whole(loss(d, counts(d))[0]["policy"]), d)
    found, parts = torch.zeros_like(wanted), ([0, 1], [2], [3, 4, 5, 6], [7])
    for part in parts:
        at_N = torch.isin(d.sample_N, torch.tensor(part))
        number = {b: k for k, b in enumerate(part)}
        cut = PolicyBatch(
            d.log_N[at_N],
            d.old_N[at_N],
            torch.tensor([number[int(b)] for b in d.sample_N[at_N]], dtype=torch.long),
            d.advantage_B[part],
            d.valid_B[part],
        )
        term = loss(cut, counts(d))[0]["policy"]
        norm = term.count().clamp(min=1) * len(parts) if isinstance(term.norm, str) else term.norm
        found += gradient(term.sum() / norm, d)
    # a token's gradient is one term, over sums of at most 33; another norm would move it by a factor
    assert torch.allclose(found, wanted, rtol=ulps(64, F64), atol=0) == same


def test_answers_that_do_not_count_add_exactly_nothing() -> None:
    for make in AGGREGATIONS.values():
        d = drawn(8)
        assert (gradient(whole(PolicyLoss(None, make())(d, counts(d))[0]["policy"]), d)[~d.valid_N] == 0).all()
        none = d._replace(valid_B=torch.zeros_like(d.valid_B))
        assert float(whole(PolicyLoss(None, make())(none, counts(none))[0]["policy"])) == 0


def test_far_off_policy_nothing_overflows() -> None:
    d = drawn(9)
    d = d._replace(old_N=d.log_N.detach() - 900, log_N=d.log_N)
    for surrogate in (Clipped(), Clipped(ratio=AnswerRatio()), CISPO()):
        assert PolicyLoss(surrogate)(d, counts(d))[0]["policy"].value.isfinite().all()


def test_dpo_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    l_4B = -torch.rand(4, 5, generator=g, dtype=torch.float64) * 20
    length_B2 = torch.tensor([[3, 5], [1, 1], [8, 2], [4, 4], [2, 9]])
    for lengths in (None, length_B2):
        found = DPOLoss(0.3)(l_4B[0], l_4B[1], l_4B[2], l_4B[3], lengths)
        for b in range(5):
            a, c = (1, 1) if lengths is None else lengths[b].tolist()
            gain = float(l_4B[0, b] - l_4B[2, b]) / a - float(l_4B[1, b] - l_4B[3, b]) / c
            assert float(found[b]) == pytest.approx(math.log1p(math.exp(-0.3 * gain)), rel=ulps(16, F64))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Clipped(low=1.5), "low 1.5"),
        (lambda: Clipped(cap=1.1), "cap 1.1: above 1 . high, which is 1.2"),
        (lambda: Clipped(dual=0.5), "dual 0.5"),
        (lambda: CISPO(0.0), "high 0"),
        (lambda: KL(0.0), "beta 0: above 0"),
        (lambda: SequenceSum(0), "length 0"),
        (lambda: DPOLoss(0.0), "beta 0"),
        (lambda: KL(0.1)(drawn()._replace(reference_N=None)), "of a reference"),
    ],
)
def test_invalid_arguments_are_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
