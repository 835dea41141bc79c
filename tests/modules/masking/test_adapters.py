"""Adapters of masked models. Letters: B samples, T tokens, N of all samples, P raw numbers of a token, D, E widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.masking.adapters import (
    L1,
    MSE,
    Adapter,
    Adapters,
    PatchAdapter,
)
from descant.modules.masking.discrete_adapters import CategoryAdapter, TableAdapter, TokenAdapter
from tests.tolerance import F32, rounding

MAKE: dict[str, tuple[Callable[[], Adapter], Callable[[], Tensor]]] = {
    "image": (lambda: PatchAdapter([8, 12], [4, 3]), lambda: torch.randn(3, 3, 8, 12)),
    "volume": (lambda: PatchAdapter([4, 4, 6], [2, 4, 3], channels=2), lambda: torch.randn(3, 2, 4, 4, 6)),
    "sound": (lambda: PatchAdapter([8, 6], [8, 2], channels=1, padded=True), lambda: torch.randn(3, 1, 8, 6)),
    "map": (lambda: CategoryAdapter(5, [8, 8], 4), lambda: torch.randint(0, 5, (3, 8, 8))),
    "text": (lambda: TokenAdapter(11, 6), lambda: torch.randint(1, 11, (3, 6))),
    "codes": (lambda: TokenAdapter(11, 6, pad=None), lambda: torch.randint(0, 11, (3, 6))),
    "table": (
        lambda: TableAdapter([0, 4, 0, 2]),
        lambda: torch.stack([torch.tensor([0.3 * k, k, -1.0, k % 2]) for k in range(3)]),
    ),
}
kinds = pytest.mark.parametrize("kind", MAKE)


def made(kind: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    adapter, x = MAKE[kind][0](), MAKE[kind][1]()
    adapter.build(16, 8)
    return adapter, x


@kinds
def test_patching_is_invertible(kind: str) -> None:
    adapter, x = made(kind)
    x_BTP, real_BT = adapter.raw(x)
    assert x_BTP.shape[:2] == real_BT.shape == (3, adapter.tokens) and real_BT.all()
    assert torch.equal(adapter.to_input_shape(x_BTP), x)


def test_patches_equal_those_of_a_convolution() -> None:
    adapter, x = made("image")
    conv = torch.nn.Conv2d(3, 16, (4, 3), stride=(4, 3))
    weights = conv.state_dict()
    adapter.inward.load_state_dict({"weight": weights["weight"].flatten(1), "bias": weights["bias"]})
    torch.testing.assert_close(
        adapter.inward(adapter.raw(x)[0]), conv(x).flatten(2).transpose(1, 2), **rounding(3 * 12, F32)
    )


@kinds
def test_every_parameter_has_a_gradient_and_empty_input_no_loss(kind: str) -> None:
    adapter, x = made(kind)
    x_BTP, _ = adapter.raw(x)
    place_N = torch.arange(adapter.tokens).repeat(3)
    x_NP, h_NE = x_BTP.flatten(0, 1), torch.randn(3 * adapter.tokens, 8)
    h_ND = adapter.embed(x_NP, place_N)
    losses = adapter.losses(h_NE, x_NP, place_N)
    assert list(losses) == [""] and losses[""].shape == place_N.shape and losses[""].dtype == torch.float32
    (h_ND.square().sum() + losses[""].sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    adapter.zero_grad()
    none = adapter.embed(x_NP[:0], place_N[:0]).sum() + adapter.losses(h_NE[:0], x_NP[:0], place_N[:0])[""].sum()
    none.backward()  # a rank whose batch has nothing of it reaches the same parameters
    assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())
    assert adapter.predict(h_NE, place_N).shape == x_NP.shape


@kinds
def test_the_same_content_elsewhere_is_another_token(kind: str) -> None:
    adapter, x = made(kind)
    x_1P = adapter.raw(x)[0][0, :1]
    here, there = (adapter.embed(x_1P, torch.tensor([t])) for t in (0, adapter.tokens - 1))
    assert (here - there).abs().max() > 1e-3


def test_co_located_patches_of_two_modalities_share_their_place() -> None:
    a, b = made("image")[0], made("image")[0]
    assert torch.equal(a.place_TD, b.place_TD)


def test_losses_are_the_formulas() -> None:
    y_NP, x_NP = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    each = torch.stack([((y - x) ** 2).mean() for y, x in zip(y_NP.float(), x_NP.float(), strict=True)])
    torch.testing.assert_close(MSE()(y_NP, x_NP), each, **rounding(12, F32))
    normed = (x_NP.float() - x_NP.float().mean(1, keepdim=True)) / (x_NP.float().var(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(
        L1(norm=True)(y_NP, x_NP), (y_NP.float() - normed).abs().mean(1), **rounding(2 * 12, F32)
    )
    assert (
        MSE(norm=True)(torch.zeros(1, 4), torch.full((1, 4), 7.0)).item() == 0
    )  # an even patch is no division by zero


def test_two_losses_of_a_modality_have_names_and_heads_of_their_own() -> None:
    adapter = PatchAdapter([8, 8], 4, losses=[MSE(norm=True), L1()])
    adapter.build(16, 8)
    x_NP = torch.randn(4, 48)
    assert list(adapter.losses(torch.randn(4, 8), x_NP, torch.arange(4))) == ["mse-norm", "l1"]
    assert not adapter.relative and torch.equal(
        adapter.predict(h := torch.randn(4, 8), torch.arange(4)), adapter.outward[1](h)
    )


def test_padded_frames_are_not_real() -> None:
    adapter, x = made("sound")
    x[1, :, :, 3:] = -torch.inf
    x_BTP, real_BT = adapter.raw(x)
    assert real_BT.tolist() == [[True] * 3, [True, False, False], [True] * 3]
    assert x_BTP.isfinite().all() and (x_BTP[1, 1:] == 0).all()


def test_decibels_are_standardised_and_an_axis_of_channels_is_not_needed() -> None:
    adapter = PatchAdapter([8, 6], [8, 2], channels=1, mean=-50, spread=20)
    x_BTP, _ = adapter.raw(torch.full((1, 8, 6), -30.0))
    assert (x_BTP == 1).all()


def test_unknown_pixels_add_no_loss() -> None:
    adapter, x = made("map")
    x[0, :, :2] = -1
    x_NP = adapter.raw(x)[0].flatten(0, 1)
    h_NE, place_N = torch.randn(len(x_NP), 8), torch.arange(4).repeat(3)
    score_NPC = adapter.outward(h_NE).view(len(x_NP), 16, 5)
    for n in range(4):
        known = x_NP[n] >= 0
        expected = F.cross_entropy(score_NPC[n][known], x_NP[n][known])
        torch.testing.assert_close(adapter.losses(h_NE, x_NP, place_N)[""][n], expected, **rounding(16, F32))
    all_unknown = torch.full((1, 16), -1)
    assert adapter.losses(h_NE[:1], all_unknown, place_N[:1])[""].item() == 0


def test_without_padding_every_id_is_real_and_the_output_layer_scores_each() -> None:
    adapter = made("codes")[0]
    assert adapter.raw(torch.zeros(2, 6, dtype=torch.long))[1].all() and adapter.output_size == 11
    assert made("map")[0].output_size == 16 * 5 and made("image")[0].output_size == made("image")[0].numbers


def test_a_column_is_scored_by_its_own_outputs() -> None:
    adapter, x = made("table")
    x_NP, place_N = adapter.raw(x)[0].flatten(0, 1), torch.arange(4).repeat(3)
    h_NE = torch.randn(12, 8)
    y_NC = adapter.outward(h_NE)  # columns 0 | 1..4 | 5 | 6..7
    loss_N = adapter.losses(h_NE, x_NP, place_N)[""]
    torch.testing.assert_close(loss_N[4], (y_NC[4, 0] - x_NP[4, 0]) ** 2, **rounding(4, F32))
    torch.testing.assert_close(loss_N[5], F.cross_entropy(y_NC[5:6, 1:5], x_NP[5].long()), **rounding(4, F32))
    torch.testing.assert_close(loss_N[7], F.cross_entropy(y_NC[7:8, 6:8], x_NP[7].long()), **rounding(4, F32))
    predicted = adapter.predict(h_NE, place_N)[:, 0]
    assert predicted[5] == y_NC[5, 1:5].argmax() and predicted[6] == y_NC[6, 5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchAdapter([8, 8], 3), "patch 3 does not divide size 8; the nearest that does is 2"),
        (lambda: PatchAdapter([4, 4, 4], 8), "size 4 is smaller than a patch of 8; at most 4"),
        (lambda: PatchAdapter([8, 8], [4]), r"patch \[4\]: one number an axis of size \[8, 8\], or one for all"),
        (lambda: PatchAdapter([8, 8], 4, losses=[MSE(), MSE()]), "losses: mse, mse: one of each"),
        (lambda: PatchAdapter([8, 8], 4, spread=0), "spread 0: must be above 0"),
        (
            lambda: PatchAdapter([8, 8], 4).raw(torch.zeros(1, 3, 9, 8)),
            r"input \(3, 9, 8\): this adapter takes \(3, 8, 8\)",
        ),
        (lambda: CategoryAdapter(1, [8, 8], 4), "classes 1: at least 2"),
        (lambda: TokenAdapter(9, 1), "vocab 9, length 1"),
        (lambda: TokenAdapter(9, 4).raw(torch.ones(1, 5, dtype=torch.long)), "input of 5 tokens: this adapter takes 4"),
        (lambda: TableAdapter([0, 1]), r"columns \[0, 1\]: at least two"),
        (lambda: Adapters(), "adapters: none given"),
    ],
)
def test_invalid_arguments_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
