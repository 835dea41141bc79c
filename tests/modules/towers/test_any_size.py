"""Images of any size: PatchTower on squares, timm's NaFlexVit on others, and no sample depends on another.

Letters: B samples, H and W pixels, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.export.formats.timm_vit import patch_tower_to_timm
from descant.modules.towers import AnySizeTower, PatchTower
from descant.modules.towers.any_size import resampling
from descant.modules.towers.image import sincos
from tests.modules.towers._asserts import check_every_gradient, loss_of, stir
from tests.tolerance import F32, F64, rounding, ulps

#: Rows and columns of patches of 4 pixels.
GRIDS = ((2, 5), (4, 4), (1, 3), (5, 2), (2, 5))


def batch(grids: tuple[tuple[int, int], ...] = GRIDS, dtype: torch.dtype = F64) -> Tensor:
    """Random images at the top left, and padding."""
    generator = torch.Generator().manual_seed(1)
    high, wide = (4 * max(sides) for sides in zip(*grids, strict=True))
    x_BCHW = torch.full((len(grids), 3, high, wide), -torch.inf, dtype=dtype)
    for row, (r, s) in enumerate(grids):
        x_BCHW[row, :, : 4 * r, : 4 * s] = torch.randn(3, 4 * r, 4 * s, generator=generator, dtype=dtype)
    return x_BCHW


def tower(positions: Any = "learned", dtype: torch.dtype = F64) -> AnySizeTower:
    torch.manual_seed(0)
    made = AnySizeTower(16, 4, 8, 2, 2, positions=positions).to(dtype)
    stir(made)
    return made


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_on_squares_of_its_size_it_is_a_patch_tower_with_the_same_parameters(positions: Any) -> None:
    ours = tower(positions)
    square = PatchTower(16, 4, 8, 2, 2, positions=positions).to(F64)
    square.load_state_dict(ours.state_dict())
    x_BCHW = batch(((4, 4),) * 3)
    (h_BTD, mask_BT), expected = ours(x_BCHW), square(x_BCHW)
    assert torch.equal(mask_BT, expected.mask_BT)
    torch.testing.assert_close(h_BTD, expected.h_BTD, **rounding(300, F64))  # sums of 48 pixels, 8 and 32 channels
    loss_of(ours(x_BCHW)).backward()
    loss_of(square(x_BCHW)).backward()
    for (name, p), q in zip(square.named_parameters(), dict(ours.named_parameters()).values(), strict=False):
        torch.testing.assert_close(dict(ours.named_parameters())[name].grad, p.grad, **rounding(3000, F64))
        assert q.grad is not None


def test_a_tower_of_one_seed_begins_as_a_patch_tower() -> None:
    torch.manual_seed(0)
    ours = AnySizeTower(16, 4, 8, 2, 2).state_dict()
    torch.manual_seed(0)
    square = PatchTower(16, 4, 8, 2, 2).state_dict()
    assert all(torch.equal(ours[name], x) for name, x in square.items()) and ours.keys() == square.keys()


def test_learned_positions_are_resampled_to_the_grid_of_each_image() -> None:
    ours = tower()
    assert ours.positions_TD is not None
    grid_B2 = torch.tensor(GRIDS)
    at_N = torch.cat([torch.cartesian_prod(torch.tensor([b]), *map(torch.arange, g)) for b, g in enumerate(GRIDS)])
    table_1DGG = ours.positions_TD.T.unflatten(1, (4, 4))[None]
    expected = [
        F.interpolate(table_1DGG, grid, mode="bilinear", align_corners=False, antialias=True)[0].flatten(1).T
        for grid in GRIDS
    ]
    torch.testing.assert_close(ours._positions(grid_B2, at_N), torch.cat(expected), **rounding(32, F64))
    square = torch.tensor([[4, 4]])
    same = ours._positions(square, torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)))
    assert torch.equal(same, ours.positions_TD), "as they are on the learned grid"


def test_resampling_is_an_average_and_the_identity_on_the_learned_grid() -> None:
    assert torch.equal(resampling(7, 7), torch.eye(7, dtype=F64))
    for places in (1, 3, 20):
        torch.testing.assert_close(resampling(places, 7).sum(dim=1), torch.ones(places, dtype=F64), **rounding(7, F64))


def test_fixed_positions_are_those_of_row_and_column() -> None:
    at_N = torch.tensor([[0, 0, 0], [0, 1, 4]])
    made = tower("sincos", F32)._positions(torch.tensor([[2, 5]]), at_N)
    assert torch.equal(made, sincos((2, 5), 8)[[0, 9]])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    ours, x_BCHW = tower(), batch()
    h_BTD, mask_BT = ours(x_BCHW)
    assert mask_BT.sum(dim=1).tolist() == [r * s for r, s in GRIDS] and h_BTD.shape[1] == 16
    assert torch.equal(h_BTD[~mask_BT], torch.zeros_like(h_BTD[~mask_BT]))
    for row, (r, s) in enumerate(GRIDS):
        alone = ours(x_BCHW[row : row + 1, :, : 4 * r, : 4 * s])
        torch.testing.assert_close(alone.h_BTD[0], h_BTD[row, : r * s], **rounding(300, F64))
    other = x_BCHW.clone()
    other[0, :, :8, :20] += 1.0
    assert torch.equal(ours(other).h_BTD[1:], h_BTD[1:])


def test_no_token_of_padding_is_computed() -> None:
    ours, seen = tower(), list[int]()
    ours.layers[0].mlp.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))  # type: ignore[union-attr]
    ours(batch())
    assert seen == [sum(r * s for r, s in GRIDS)]


def test_every_parameter_has_a_gradient_of_all_images() -> None:
    check_every_gradient(tower(dtype=F32), batch(dtype=F32))
    ours, x_BCHW = tower(), batch()
    loss_of(ours(x_BCHW)).backward()
    whole = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
    ours.zero_grad()
    padded = F.pad(x_BCHW, (0, 8, 0, 4), value=-torch.inf)  # more of nothing changes nothing
    loss_of(ours(padded)).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(ours.parameters(), whole, strict=True) if p.grad is not None)


def test_it_is_timms_naflexvit_with_the_same_weights() -> None:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    ours = tower().eval()
    square = PatchTower(16, 4, 8, 2, 2).to(F64)
    square.load_state_dict(ours.state_dict())
    state = patch_tower_to_timm(square)
    weight_DCPP = state.pop("patch_embed.proj.weight")
    named = {name.replace("patch_embed.", "embeds."): x for name, x in state.items() if name != "pos_embed"}
    named["embeds.proj.weight"] = weight_DCPP.permute(0, 2, 3, 1).flatten(1)  # pixels, then channels
    named["embeds.pos_embed"] = state["pos_embed"].view(1, 4, 4, 8)
    sizes = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "pos_embed_grid_size": (4, 4)}
    owner = NaFlexVit(NaFlexVitCfg(**sizes, pos_embed_interp_mode="bilinear", global_pool=""), num_classes=0)
    owner.double().load_state_dict(named)
    owner.eval()
    x_BCHW = batch()
    patch_BTP, place_BT2 = torch.zeros(5, 16, 48, dtype=F64), torch.zeros(5, 16, 2, dtype=torch.long)
    mask_BT = torch.arange(16) < torch.tensor([[r * s] for r, s in GRIDS])
    for row, (r, s) in enumerate(GRIDS):
        x_CHW = x_BCHW[row, :, : 4 * r, : 4 * s].unflatten(2, (s, 4)).unflatten(1, (r, 4))
        patch_BTP[row, : r * s] = x_CHW.permute(1, 3, 2, 4, 0).reshape(r * s, -1)
        place_BT2[row, : r * s] = torch.cartesian_prod(torch.arange(r), torch.arange(s))
    theirs = owner.forward_features(patch_BTP, patch_coord=place_BT2, patch_valid=mask_BT)
    theirs = theirs["patches"] if isinstance(theirs, dict) else theirs
    # timm resamples positions in float32
    torch.testing.assert_close(ours(x_BCHW).h_BTD[mask_BT], theirs[mask_BT], rtol=0, atol=ulps(8, F32))


@pytest.mark.parametrize(
    ("x", "line"),
    [
        (torch.zeros(1, 3, 8, 6), r"image \(3, 8, 6\): this tower takes 3 channels and sides that are multiples of 4"),
        (torch.zeros(1, 1, 8, 8), r"image \(1, 8, 8\): this tower takes 3 channels"),
        (torch.zeros(1, 3, 8, 8).index_fill(2, torch.arange(4), -torch.inf), "image in row 0 .* padding is below"),
    ],
)
def test_what_is_no_image_of_whole_patches_is_refused(x: Tensor, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        tower(dtype=F32)(x)
