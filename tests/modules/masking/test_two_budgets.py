"""Two Dirichlet budgets of inputs and targets: distribution, limits, refusals. Letters: B samples, M modalities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from descant.modules.masking.decoders import JointDecoder
from descant.modules.masking.two_budgets import DirichletPair, TwoBudgets, allot_budget, refill_budget
from tests.papers.test_4m import ALL2ALL, RGB2ALL, batch, recipe
from tests.tolerance import statistical


def test_an_allotment_is_that_of_the_released_loop() -> None:
    rng = np.random.default_rng(0)
    share_BKM, most_BM = rng.dirichlet([0.5] * 4, (200, 5)), rng.integers(0, 40, (200, 4))
    share, most = torch.from_numpy(share_BKM), torch.from_numpy(most_BM)
    found = allot_budget(share[:, 0], share[:, 1:], 64, most)
    for b in range(200):
        count_M = np.floor(share_BKM[b, 0] * 64).astype(int)
        left = 64 - count_M.sum()
        count_M += np.bincount(share_BKM[b, 1 : 1 + left].argmax(1), minlength=4)
        assert found[b].tolist() == np.minimum(count_M, most_BM[b]).tolist()
    full = refill_budget(found, 64, most)
    assert torch.equal(full.sum(1), most.sum(1).clamp(max=64)) and not ((full < found) | (full > most)).any()
    assert not allot_budget(share[:1, 0] * 0, share[:1, 1:] * 0, 64, most[:1]).any()


def test_the_clipped_dirichlet_has_its_mean_and_variance_and_refilling_loses_nothing() -> None:
    B, tokens, most = 8000, 40, 30
    real = {m: torch.arange(60).expand(B, 60) < (most if m == "image" else 60) for m in ("image", "depth")}
    both, grids = {"image": 0.5, "depth": 0.5}, dict.fromkeys(real, (60,))
    masks = TwoBudgets(tokens, 8, [DirichletPair(both, both)])(real, grids, torch.arange(B))
    # s of two halves is sin^2(pi u / 2); the token that the two floors leave over goes to either
    floor = np.floor(np.sin(np.pi / 2 * (np.arange(100_000) + 0.5) / 100_000) ** 2 * tokens)
    clipped = np.stack([np.minimum(floor, most), np.minimum(floor + 1, most)])
    count_B = masks.visible["image"].sum(1).double()
    assert abs(count_B.mean().item() - clipped.mean()) < statistical(clipped.std(), B)
    spread = ((clipped - clipped.mean()) ** 2).std()
    assert abs(count_B.var().item() - clipped.var()) < statistical(spread, B)
    assert (count_B + masks.visible["depth"].sum(1)).mean() < tokens - 1
    refill = TwoBudgets(tokens, 8, [DirichletPair(both, both)], refill=True)(real, grids, torch.arange(B))
    assert (torch.stack([mask.sum(1) for mask in refill.visible.values()]).sum(0) == tokens).all()


@pytest.mark.parametrize("refill", [False, True])
def test_budgets_are_disjoint_and_absent_modalities_get_nothing(refill: bool) -> None:
    model, b = recipe().double(), batch(400)
    _, real = model.raw(b)
    corruption = TwoBudgets(8, 6, [RGB2ALL, ALL2ALL], sequences=["text"], refill=refill)
    masks = corruption(real, model.grids, b.rng_seed)
    for m, real_BT in real.items():
        assert (
            not (masks.visible[m] & masks.target[m]).any()
            and not ((masks.visible[m] | masks.target[m]) & ~real_BT).any()
        )
    assert not masks.target["image"].any() and list(model.terms(b)) == ["mask/palette", "mask/text", "mask/codes"]
    tokens = model.arrange({m: x for m, x in model.raw(b)[0].items()}, real, masks)
    for part, budget in (("visible_BT", 8), ("target_BT", 6)):  # sentinels count
        assert sum(getattr(t, part).sum(1) for t in tokens.values()).max() <= budget
    full_B = torch.stack([*b.present.values()]).all(0)
    only_B = masks.visible["image"].sum(1)[full_B] == 8
    assert abs(only_B.double().mean().item() - 0.5) < statistical(0.5, int(full_B.sum())) + 0.1  # all2all may too
    shuffled = corruption({m: x.flip(0) for m, x in real.items()}, model.grids, b.rng_seed.flip(0))
    assert all(torch.equal(shuffled.target[m].flip(0), masks.target[m]) for m in real)


def test_a_text_of_which_nothing_is_seen_is_often_a_target_whole_and_with_its_end() -> None:
    """A budget of its tokens alone would never be enough: sentinels count."""
    length_B = torch.randint(3, 9, (600,), generator=torch.Generator().manual_seed(0))
    real = {"image": torch.ones(600, 4, dtype=torch.bool), "text": torch.arange(12) < length_B[:, None]}
    pair, grids = DirichletPair({"image": 1.0}, {"text": 1.0}), {"image": (4,), "text": (12,)}
    for budget, whole in ((10, 1.0), (8, None), (4, 0.0)):
        masks = TwoBudgets(4, budget, [pair], sequences=["text"])(real, grids, torch.arange(600))
        share = (masks.target["text"].sum(1) == length_B).double().mean().item()
        assert share == ((length_B + 2 <= budget).double().mean().item() if whole is None else whole)


def test_a_component_may_have_a_budget_of_inputs_of_its_own() -> None:
    real = {m: torch.ones(300, n, dtype=torch.bool) for m, n in (("image", 4), ("codes", 40))}
    pairs = [DirichletPair({"image": 1.0}, {"codes": 1.0}, visible=4), DirichletPair({"codes": 1.0}, {"codes": 1.0})]
    masks = TwoBudgets(16, 8, pairs)(real, {"image": (4,), "codes": (40,)}, torch.arange(300))
    counts = {(int(i), int(c)) for i, c in zip(*(masks.visible[m].sum(1) for m in real), strict=True)}
    assert counts == {(4, 0), (0, 16)} and (masks.target["codes"].sum(1) == 8).all()
    with pytest.raises(ValueError, match="visible 16: image have 4 tokens"):
        TwoBudgets(16, 8, [DirichletPair({"image": 1.0}, {"codes": 1.0})]).check({"image": (4,), "codes": (40,)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoBudgets(8, 0, [ALL2ALL]), "targets 0: a number of tokens, at least 1"),
        (lambda: TwoBudgets(8, 8, []), "mixture: one DirichletPair at least"),
        (lambda: DirichletPair({"image": 0.0}, {"text": 1.0}), "inputs .* an alpha above 0"),
        (lambda: DirichletPair({"image": 1.0}, {"text": 1.0}, 0), "weight 0: must be above 0"),
        (lambda: recipe(corruption=TwoBudgets(17, 6, [RGB2ALL])), "visible 17: image have 16 tokens; at most 16"),
        (lambda: DirichletPair({"image": 1.0}, {"text": 1.0}, visible=0), "visible 0: a number of tokens, at least 1"),
        (lambda: recipe(corruption=TwoBudgets(9, 60, [ALL2ALL])), "targets 60: palette, codes, text have 34 tokens"),
        (
            lambda: recipe(corruption=TwoBudgets(2, 2, [DirichletPair({"imgae": 1.0}, {"text": 1.0})])),
            "modality 'imgae': no such name; did you mean image?",
        ),
        (lambda: recipe(corruption=TwoBudgets(2, 2, [ALL2ALL], sequences=["txt"])), "sequence 'txt': no such name"),
        (lambda: recipe(decoder=JointDecoder(12, 1, 2)), "decoder JointDecoder: text is predicted in order"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
