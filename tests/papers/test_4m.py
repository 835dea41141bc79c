"""4M (arXiv 2312.06647): losses, spans of texts and the decoder against loops. Letters: B samples, T tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.masking import reductions
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.masking.any_to_any import AnyToAnyDecoder
from descant.modules.masking.corruptions import corrupt_on_host
from descant.modules.masking.decoders import At, Encoded
from descant.modules.masking.discrete_adapters import CategoryAdapter, TokenAdapter
from descant.modules.masking.sequence_adapter import SequenceAdapter
from descant.modules.masking.spans import starts, target_run, target_window, with_sentinels
from descant.modules.masking.two_budgets import DirichletPair, TwoBudgets
from descant.modules.towers.vit import Trunk
from descant.recipes import Masked
from tests._suites import MissingModalities, Ranks
from tests.tolerance import F32, F64, rounding, ulps

NAMES = ("image", "palette", "codes", "text")
RGB2ALL = DirichletPair({"image": 1000.0}, {"palette": 0.5, "codes": 0.5, "text": 0.5})
ALL2ALL = DirichletPair(dict.fromkeys(NAMES, 0.5), {"palette": 0.5, "codes": 0.5, "text": 0.5})


def recipe(**options: Any) -> Masked:
    torch.manual_seed(0)
    adapters = Adapters(
        image=PatchAdapter([8, 8], 2),
        palette=CategoryAdapter(3, [8, 8], 2, embedding=4),
        text=SequenceAdapter(9, 8),
        others={"codes": TokenAdapter(7, 9, pad=None)},
    )
    options.setdefault("corruption", TwoBudgets(8, 6, [RGB2ALL, ALL2ALL], sequences=["text"]))
    return Masked(adapters, Trunk(24, 2, 3), options.pop("decoder", None) or AnyToAnyDecoder(12, 2, 2), **options)


def batch(rows: int = 16) -> Batch:
    """Some rows lack a modality, the last one all; absent rows hold ids out of range."""
    g = torch.Generator().manual_seed(0)
    inputs = {
        "image": torch.randn(rows, 3, 8, 8, generator=g, dtype=F64),
        "palette": torch.randint(0, 3, (rows, 8, 8), generator=g),
        "codes": torch.randint(0, 7, (rows, 9), generator=g),
        "text": torch.randint(1, 9, (rows, 8), generator=g) * (torch.arange(8) < torch.arange(rows)[:, None] % 7 + 2),
    }
    present = {m: torch.arange(rows) % (4 + k) != k for k, m in enumerate(inputs)}
    for m, x in inputs.items():
        present[m][-1] = False
        x[~present[m]] = torch.nan if x.is_floating_point() else 99
    return Batch(inputs, present, index=torch.arange(rows), rng_seed=torch.arange(rows) * 7919 + 13)


class TestFourM(MissingModalities, Ranks):
    def recipe(self) -> Masked:  # losses of palettes are float32
        pair = DirichletPair(dict.fromkeys(NAMES, 0.5), {"codes": 0.5, "text": 0.5})
        return recipe(corruption=TwoBudgets(8, 6, [pair], ["text"]), reduction=reductions.MeanOfModalities())

    def batch(self) -> Batch:
        return batch()


# losses ---------------------------------------------------------------------------------------------------------------


def by_loops(kind: str, loss: dict[str, list[list[float]]], sizes: dict[str, int]) -> float:
    """Of the losses of every target token, by modality and sample."""
    samples = [{m: rows[b] for m, rows in loss.items() if rows[b]} for b in range(15)]  # the last has no modality
    if kind == "MeanOfModalities":
        return sum(np.mean([np.mean(x) for x in s.values()]) for s in samples if s) / 15
    if kind == "MeanOfTokens":
        return sum(np.mean(np.concatenate([*s.values()])) for s in samples if s) / 15
    every = {m: np.concatenate([np.array(row) for row in rows]) for m, rows in loss.items()}
    if kind == "ReleasedModalities":
        return sum(x.mean() if len(x) else 0.0 for x in every.values()) / len(every)
    numbers = {m: len(x) * sizes[m] for m, x in every.items()}
    return sum(x.mean() * numbers[m] for m, x in every.items() if len(x)) / sum(numbers.values())


@pytest.mark.parametrize("kind", ["MeanOfModalities", "MeanOfTokens", "ReleasedModalities", "ReleasedTokens"])
def test_a_reduction_is_that_of_the_loop(kind: str) -> None:
    model, b = recipe(reduction=getattr(reductions, kind)()).double(), batch()
    terms = model.terms(b)
    raw, real = model.raw(b)
    tokens = model.arrange(raw, real, model.corruption(real, model.grids, b.rng_seed))
    count = {m.removeprefix("mask/"): tokens[m.removeprefix("mask/")].loss_BT.sum(1) for m in terms}
    loss = {
        m: [[float(terms[f"mask/{m}"].value[k].detach())] * int(n) for k, n in enumerate(n_B)]
        for m, n_B in count.items()
    }
    total = model.step(terms, b).total.item()
    wanted = by_loops(kind, loss, {"palette": 12, "codes": 7, "text": 14})
    # losses of palettes are float32
    assert total == pytest.approx(wanted, rel=ulps(16, F32)) and wanted > 0
    assert all(term.value.shape == (16,) for term in terms.values())
    assert hasattr(model.reduction, "by_rank") == kind.startswith("Released")


# texts ----------------------------------------------------------------------------------------------------------------


def released_spans(text: list[int], hidden: list[bool], first: int) -> tuple[list[int], list[int]]:
    """Span masking as released: inputs and targets with sentinels."""
    inputs, targets, count = list[int](), list[int](), 0
    for t, token in enumerate(text):
        if hidden[t]:
            if t == 0 or not hidden[t - 1]:
                inputs.append(first + count)
                targets.append(first + count)
                count += 1
            targets.append(token)
        else:
            inputs.append(token)
    return inputs, [*targets, first + count]


def test_spans_with_sentinels_are_those_of_the_released_loop() -> None:
    g = torch.Generator().manual_seed(0)
    x_BT = torch.randint(1, 90, (300, 9), generator=g)
    real_BT = torch.arange(9) < torch.randint(1, 9, (300, 1), generator=g)
    seen_BT = real_BT & (torch.rand(300, 9, generator=g) < torch.rand(300, 1, generator=g))
    spans = with_sentinels(x_BT, real_BT, seen_BT, real_BT & ~seen_BT, real_BT, first=90)
    for b in range(300):
        n = int(real_BT[b].sum())
        inputs, targets = released_spans(x_BT[b, :n].tolist(), (~seen_BT[b, :n]).tolist(), 90)
        assert spans.input_BS[b][spans.visible_BS[b]].tolist() == (inputs if seen_BT[b].any() else [])
        if not seen_BT[b, :n].all():
            assert spans.given_BS[b][spans.target_BS[b]].tolist() == targets[:-1]
            assert spans.wanted_BS[b][spans.target_BS[b]].tolist() == targets[1:]
        else:
            assert not spans.target_BS[b].any()
    assert torch.equal(spans.loss_BS, spans.target_BS)


def test_targets_of_a_text_are_cut_to_their_budget_from_a_random_span_on() -> None:
    g = torch.Generator().manual_seed(1)
    hidden_BT, u_B = torch.rand(500, 12, generator=g) < 0.6, torch.rand(500, generator=g)
    for budget in (0, 1, 3, 5, 9, 20):
        run_BT = target_run(hidden_BT, torch.full((500,), budget), u_B)
        for b in range(500):
            begins = starts(hidden_BT[b : b + 1])[0].nonzero().flatten().tolist()
            cost = [int(hidden_BT[b, t]) + (t in begins) for t in range(12)]
            if begins:
                cost[int(hidden_BT[b].nonzero().max())] += 1  # the sentinel at the end
            chosen = begins[int(u_B[b] * len(begins))] if begins else 0
            fit = [t for t in begins if sum(cost[t:]) <= budget]
            begin = 0 if sum(cost) <= budget else chosen if sum(cost[chosen:]) >= budget else fit[0]
            wanted = [bool(hidden_BT[b, t]) and t >= begin and sum(cost[begin : t + 1]) <= budget for t in range(12)]
            assert run_BT[b].tolist() == wanted


def released_window(targets: list[int], budget: int, sentinels: list[int], u: float) -> list[int]:
    """Of a sequence of targets what the release keeps: from a random sentinel on, as many as the budget."""
    if len(targets) <= budget:
        return targets
    begins = [n for n, token in enumerate(targets) if token in sentinels]
    begin = begins[int(u * max(1, len(begins) - 1))]
    if len(targets) - begin >= budget:
        return targets[begin : begin + budget]
    return targets[next(n for n in begins if len(targets) - n <= budget) :]


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4, 5, 8, 20])
def test_a_window_of_the_targets_is_that_of_the_released_loop(budget: int) -> None:
    g, rows = torch.Generator().manual_seed(2), 200
    x_BT, u_B = torch.randint(1, 90, (rows, 10), generator=g), torch.rand(rows, generator=g, dtype=F64)
    real_BT = torch.arange(10) < torch.randint(1, 10, (rows, 1), generator=g)
    seen_BT = real_BT & (torch.rand(rows, 10, generator=g) < torch.rand(rows, 1, generator=g))
    target_BT, loss_BT = target_window(real_BT & ~seen_BT, torch.full((rows,), budget), u_B)
    spans = with_sentinels(x_BT, real_BT, seen_BT, target_BT, loss_BT, first=90)
    ends = 0
    for b in range(rows):
        n = int(real_BT[b].sum())
        _, targets = released_spans(x_BT[b, :n].tolist(), (~seen_BT[b, :n]).tolist(), 90)
        kept = released_window(targets, budget, list(range(90, 100)), float(u_B[b]))
        assert spans.given_BS[b][spans.target_BS[b]].tolist() == kept[:-1]
        assert spans.wanted_BS[b][spans.target_BS[b]].tolist() == kept[1:]
        ends += len(kept) < len(targets) and len(kept) > 1 and kept[-1] >= 90
    assert torch.equal(spans.loss_BS, spans.target_BS) and (ends > 0) == (2 < budget < 20)


def test_the_released_cut_is_chosen_by_name() -> None:
    b = batch()
    tokens = {}
    for cut in ("tokens", "targets"):
        model = recipe(corruption=TwoBudgets(8, 6, [ALL2ALL], ["text"], cut=cut)).double()
        raw, real = model.raw(b)
        tokens[cut] = model.arrange(raw, real, corrupt_on_host(model.corruption, real, model.grids, b.rng_seed))["text"]
        assert model.step(model.terms(b), b).total.isfinite()
    counts = {cut: part.loss_BT.sum(dim=1) for cut, part in tokens.items()}
    assert (counts["targets"] >= counts["tokens"]).all() and (counts["targets"] > counts["tokens"]).any()
    assert int(counts["targets"].max()) <= 5 and not counts["targets"][-1].any(), "a sentinel is given, not predicted"


def test_a_later_target_changes_no_earlier_prediction_and_another_modality_none() -> None:
    model: Any = recipe().eval()
    at = At.of(torch.arange(9).expand(2, 9) < 6)
    other = At.of(torch.ones(2, 9, dtype=torch.bool))
    encoded = Encoded(
        {"text": torch.randn(0, 24)}, {"text": At.of(torch.zeros(2, 9, dtype=torch.bool))}, torch.randn(2, 24)
    )

    def predicted(change: int | None, targets: dict[str, At]) -> dict[str, Tensor]:
        ids_BT = torch.arange(12).view(2, 6) % 9
        if change is not None:
            ids_BT[:, change] = 10
        encoded.given = {"text": model.adapters["text"].embed_previous(ids_BT.view(-1, 1))}
        return model.decoder(encoded, targets)

    with torch.no_grad():
        plain = predicted(None, {"text": at, "codes": other})
        for t in range(6):
            changed = predicted(t, {"text": at, "codes": other})
            gap_T = (changed["text"] - plain["text"]).view(2, 6, -1).abs().amax(dim=(0, 2))
            assert torch.equal(gap_T > 0, torch.arange(6) >= t) and torch.equal(changed["codes"], plain["codes"])
        alone = predicted(None, {"text": at})["text"]
    torch.testing.assert_close(alone, plain["text"], **rounding(64, F32))


def test_padding_of_a_batch_changes_no_sample() -> None:
    model, b = recipe().double().eval(), batch()
    terms = model.terms(b)
    for k in range(0, 15, 4):
        for name, term in model.terms(b.select(torch.tensor([k]))).items():
            torch.testing.assert_close(term.value[0], terms[name].value[k], **rounding(256, F64))
