"""Masks: visible, target and counted tokens, and refusals. Letters: B samples, T tokens, M modalities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from descant.modules.masking.budget import TokenBudget
from descant.modules.masking.corruptions import Corruption, Grid, UniformMask
from descant.modules.masking.structured import BlockMask, SpanMask, TubeMask
from tests.tolerance import statistical

GRIDS: dict[str, Grid] = {"image": (6, 6), "depth": (6, 6), "text": (24,)}
B = 300


def real_of(grids: dict[str, Grid], rows: int = B) -> dict[str, Tensor]:
    return {m: torch.ones(rows, math.prod(grid), dtype=torch.bool) for m, grid in grids.items()}


def draws(rows: int = B, first: int = 0) -> Tensor:
    return torch.arange(first, first + rows) * 7919


ALL: dict[str, tuple[Callable[[], Corruption], dict[str, Grid]]] = {
    "uniform": (lambda: UniformMask(0.75), GRIDS),
    "joint": (lambda: UniformMask(0.75, joint=True), GRIDS),
    "budget": (lambda: TokenBudget(20), GRIDS),
    "subset": (lambda: TokenBudget(20, alpha=0.5, subset_first=True), GRIDS),
    "targets": (lambda: TokenBudget(20, targets=10), GRIDS),
    "block": (lambda: BlockMask(0.5), {"image": (6, 6), "video": (2, 4, 4)}),
    "tube": (lambda: TubeMask(0.5), {"video": (3, 4, 4)}),
    "span": (lambda: SpanMask(0.4), {"text": (24,)}),
}
names = pytest.mark.parametrize("name", ALL)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[m], b[m]) for m in a)


@names
def test_visible_and_target_are_disjoint_and_without_padding(name: str) -> None:
    make, grids = ALL[name]
    real = real_of(grids)
    for mask_BT in real.values():
        mask_BT[: B // 2, mask_BT.shape[1] // 2 :] = False
        mask_BT[0] = False  # a sample without the modality
    masks = make()(real, grids, draws())
    for m, real_BT in real.items():
        assert not (masks.visible[m] & masks.target[m]).any()
        assert not ((masks.visible[m] | masks.target[m]) & ~real_BT).any()
        assert not (masks.loss[m] & ~masks.target[m]).any()
        if name != "targets":
            assert torch.equal(masks.visible[m] | masks.target[m], real_BT)


@names
def test_a_mask_is_a_function_of_the_samples_own_key(name: str) -> None:
    make, grids = ALL[name]
    whole = make()(real_of(grids), grids, draws())
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))[:50]
    some = make()(real_of(grids, 50), grids, draws()[order])
    assert same({m: mask[order] for m, mask in whole.visible.items()}, some.visible)
    assert same({m: mask[order] for m, mask in whole.loss.items()}, some.loss)
    other = make()(real_of(grids), grids, draws(first=10_000))
    assert not same(whole.visible, other.visible)


@names
def test_every_token_is_masked_about_as_often(name: str) -> None:
    make, grids = ALL[name]
    masks = make()(real_of(grids, 4000), grids, draws(4000))
    for m, visible_BT in masks.visible.items():
        share_T = visible_BT.double().mean(dim=0)
        assert float(share_T.min()) > 0.02 and float(share_T.max()) < 0.98
        edges = name in ("block", "span", "each") and m != "depth"  # fewer rectangles and runs cover an edge
        assert float(share_T.max() - share_T.min()) < (0.6 if edges else 0.06), m


def test_the_share_of_each_modality_or_of_all_together_is_exact() -> None:
    masks = UniformMask(0.75)(real_of(GRIDS), GRIDS, draws())
    assert {m: mask.sum(dim=1).unique().tolist() for m, mask in masks.visible.items()} == {
        "image": [9],
        "depth": [9],
        "text": [6],
    }
    joint = UniformMask(0.75, joint=True)(real_of(GRIDS), GRIDS, draws())
    assert sum(mask.sum(dim=1) for mask in joint.visible.values()).unique().tolist() == [24]  # type: ignore[union-attr]
    per_image = joint.visible["image"].sum(dim=1)
    # 24 of 96 without replacement, 36 of them here: variance 4.26
    assert len(per_image.unique()) > 3 and float(per_image.double().mean()) == pytest.approx(
        9, abs=statistical(2.065, B, errors=2.5)
    )


def test_of_two_tokens_one_is_masked_and_a_single_one_is_visible() -> None:
    real = {"text": torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])}
    masks = UniformMask(0.75)(real, {"text": (4,)}, draws(3))
    assert masks.visible["text"].sum(dim=1).tolist() == [1, 1, 0]
    assert masks.loss["text"].sum(dim=1).tolist() == [1, 0, 0]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_a_budget_is_kept_exactly_and_its_shares_are_those_of_the_dirichlet_distribution(alpha: float) -> None:
    grids: dict[str, Grid] = {m: (14, 14) for m in ("image", "depth", "map")}
    masks = TokenBudget(98, alpha)(real_of(grids, 4000), grids, draws(4000))
    count_BM = torch.stack([mask.sum(dim=1) for mask in masks.visible.values()], dim=1)
    assert (count_BM.sum(dim=1) == 98).all()
    share_BM = count_BM.double() / 98
    # of a symmetric Dirichlet of M: mean 1 / M, variance (M - 1) / (M^2 (M alpha + 1))
    assert share_BM.mean(dim=0).tolist() == pytest.approx(
        [1 / 3] * 3, abs=statistical((2 / (9 * (3 * alpha + 1))) ** 0.5, 4000)
    )
    # 4000 draws know a variance to 3%; and shares are whole tokens of 98
    assert share_BM.var(dim=0).tolist() == pytest.approx([2 / (9 * (3 * alpha + 1))] * 3, rel=0.1)
    assert count_BM.unique(dim=0).shape[0] > 700  # drawn for each sample, not once a batch


def test_a_subset_is_sampled_first() -> None:
    masks = TokenBudget(20, subset_first=True)(real_of(GRIDS, 3000), GRIDS, draws(3000))
    there_BM = torch.stack([mask.any(dim=1) for mask in masks.visible.values()], dim=1)
    kinds = (there_BM.long() * torch.tensor([1, 2, 4])).sum(dim=1).bincount(minlength=8).double() / 3000
    assert kinds[0] == 0
    # each of the seven sets is as likely; a small share may round to no token
    assert min(kinds[1].item(), kinds[2].item(), kinds[4].item()) > 0.13


def test_incomplete_samples_have_a_proportional_budget() -> None:
    grids: dict[str, Grid] = {m: (4, 4) for m in ("image", "depth")}
    real = real_of(grids, 4)
    real["depth"][:2] = False
    masks = TokenBudget(16)(real, grids, draws(4))
    assert sum(mask.sum(dim=1) for mask in masks.visible.values()).tolist() == [8, 8, 16, 16]  # type: ignore[union-attr]


def test_an_output_budget_limits_what_counts() -> None:
    masks = TokenBudget(20, targets=10)(real_of(GRIDS), GRIDS, draws())
    assert (sum(mask.sum(dim=1) for mask in masks.loss.values()) == 10).all()  # type: ignore[union-attr]
    few = TokenBudget(90, targets=10)(real_of(GRIDS), GRIDS, draws())  # only six are masked
    assert (sum(mask.sum(dim=1) for mask in few.loss.values()) == 6).all()  # type: ignore[union-attr]


def test_blocks_and_spans_mask_neighbours() -> None:
    """The chance that a hidden token's neighbour is hidden too, beside that of tokens hidden one by one."""
    grid: dict[str, Grid] = {"image": (12, 12)}

    def together(corruption: Corruption) -> float:
        hidden = corruption(real_of(grid), grid, draws()).target["image"].view(B, 12, 12).double()
        return float((hidden[:, 1:] * hidden[:, :-1]).sum() / hidden[:, 1:].sum())

    # so many hidden tokens have a neighbour
    assert together(UniformMask(0.4)) == pytest.approx(0.4, abs=statistical(0.49, 15_000))
    assert together(BlockMask(0.4)) > 0.75
    line: dict[str, Grid] = {"text": (60,)}
    hidden = SpanMask(0.3, mean=4)(real_of(line), line, draws()).target["text"]
    assert hidden.sum(dim=1).unique().tolist() == [18]
    runs_B = (hidden[:, 1:] & ~hidden[:, :-1]).sum(dim=1) + hidden[:, 0]
    # runs of four that touch make longer ones, and the last one is cut
    assert 3.5 < float(18 / runs_B.double().mean()) < 6


def test_a_tube_masks_the_same_patches_in_every_step() -> None:
    grid: dict[str, Grid] = {"video": (3, 4, 4)}
    visible = TubeMask(0.75)(real_of(grid), grid, draws()).visible["video"].view(B, 3, 16)
    assert (visible == visible[:, :1]).all() and visible.sum(dim=2).unique().tolist() == [4]


@pytest.mark.parametrize(
    ("make", "grids", "message"),
    [
        (lambda: UniformMask(1.0), GRIDS, "ratio 1: a share of the tokens, above 0 and below 1; such as 0.75"),
        (
            lambda: UniformMask(0.9),
            {"image": (2, 2)},
            "ratio 0.9 of 4 tokens of image leaves no token visible; the near",
        ),
        (lambda: UniformMask(0.05), {"image": (2, 2)}, "leaves no token masked; the nearest that does not is 0.25"),
        (lambda: UniformMask(0.5), {"image": (1,)}, "ratio 0.5 of 1 tokens of image .* smaller patches make more"),
        (lambda: TokenBudget(96), GRIDS, "visible 96 of 96 tokens leaves no token masked; at most 95"),
        (lambda: TokenBudget(0), GRIDS, "visible 0: a number of tokens, at least 1"),
        (lambda: TokenBudget(9, alpha=0), GRIDS, "alpha 0: must be above 0"),
        (lambda: BlockMask(), {"text": (9,)}, "BlockMask: text has 1 axis, and rectangles need 2; use SpanMask"),
        (lambda: BlockMask(least=0.5, most=0.4), GRIDS, "least 0.5, most 0.4"),
        (lambda: TubeMask(), {"text": (9,)}, "TubeMask: text has 1 axis"),
        (lambda: SpanMask(mean=0.5), GRIDS, "mean 0.5"),
    ],
)
def test_invalid_arguments_are_refused(make: Callable[[], Corruption], grids: dict[str, Grid], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().check(grids)
