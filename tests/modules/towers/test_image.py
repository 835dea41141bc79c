"""PatchTower and ConvTower."""

from __future__ import annotations

import pytest
import torch

from descant.modules.towers import ConvTower, PatchTower
from tests.modules.towers import _asserts
from tests.tolerance import F32, rounding, ulps

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def patches(**options):
    return PatchTower(**{"size": 16, "patch": 4, "width": 16, "depth": 2, "heads": 2, **options})


TOWERS = {
    "patches": (patches, 16),
    "patches-sincos": (lambda: patches(positions="sincos"), 16),
    "conv": (lambda: ConvTower(widths=[8, 16], blocks=[1, 2], stem=2), 16),
    "conv-group": (lambda: ConvTower(widths=[8, 16], stem=4, norm="group", activation="gelu", expand=0.5), 4),
}


@pytest.fixture(params=TOWERS)
def case(request):
    make, T = TOWERS[request.param]
    torch.manual_seed(0)
    return make(), T


def test_shapes(case):
    _asserts.check_tokens(case[0], X, case[1])


def test_properties(case):
    tower, _ = case
    _asserts.check_rows_independent(tower, X)
    _asserts.check_deterministic(tower, X)
    _asserts.check_every_gradient(tower, X)
    _asserts.check_frozen(tower, X)
    _asserts.check_keys_unchanged(tower)


def test_checkpointing_halves_activations_and_keeps_gradients(case):
    _asserts.check_checkpointing(case[0], X)


def test_blocks_are_listed():
    assert len(patches(depth=3).blocks()) == 3
    assert len(ConvTower(widths=[8, 8, 8], blocks=[1, 2, 1]).blocks()) == 4


def test_conv_takes_any_size_and_one_pixel_maps():
    tower = ConvTower(widths=[8, 8, 8], stem=2).eval()
    assert [tower(torch.zeros(1, 3, *hw)).h_BTD.shape[1] for hw in ((16, 16), (15, 9), (2, 2))] == [4, 2, 1]


def test_conv_map_is_channels_last_throughout():
    seen = []
    tower = ConvTower(widths=[8, 16])
    for layer in tower.blocks():
        layer.register_forward_hook(
            lambda _, inputs, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    tower(X)
    assert seen and all(seen)


def test_masked_patches_are_not_attended_to():
    tower = patches().eval()
    mask_BT = torch.ones(4, 16, dtype=torch.bool)
    mask_BT[:, 8:] = False
    changed = X.clone()
    changed[:, :, 8:] = 7.0  # the lower half of the image is the last eight patches
    torch.testing.assert_close(
        tower(X, mask_BT).h_BTD[:, :8], tower(changed, mask_BT).h_BTD[:, :8], **rounding(64, F32)
    )


def test_a_subset_of_patches_equals_hiding_the_others():
    tower = patches().eval()
    mask_BT = torch.arange(16).expand(4, 16) < 6
    few = tower.encode(tower.embed(X)[:, :6])
    torch.testing.assert_close(few, tower(X, mask_BT).h_BTD[:, :6], rtol=0, atol=ulps(64, F32))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: patches(patch=5), "patch 5 does not divide size 16; the nearest that does is 4"),
        (lambda: patches(heads=3), "heads 3 does not divide width 16; the nearest that does is 2"),
        (lambda: ConvTower(widths=[8, 8], blocks=[1]), "blocks .* one for each of the 2 widths"),
        (lambda: patches()(torch.zeros(1, 3, 8, 8)), "image .3, 8, 8.: this tower takes .3, 16, 16."),
    ],
)
def test_refusals_are_one_line(make, line):
    with pytest.raises(ValueError, match=line) as caught:
        make()
    assert "\n" not in str(caught.value)
