from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from descant.modules.transforms.image import Augment, Crop, Pixels, reduce_rgba
from tests.tolerance import F32, conditioned, rounding, statistical, ulps

#: Places on a grid of up to 16 pixels are read between neighbours that are up to 2 apart.
PLACES = conditioned(2, F32, terms=16)
STILL: dict[str, Any] = dict(
    rotate=0, scale=1, stretch=1, shear=0, shift=0, colour=0, brightness=0, contrast=0, grey=0, background=0
)


def image(size: int = 8, channels: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, channels, size, size), generator=generator, dtype=torch.uint8)


DRAW = torch.tensor([11, 12, 13])


def test_without_strength_training_sees_what_evaluation_sees() -> None:
    x = image()
    torch.testing.assert_close(Augment(8, **STILL)(x, DRAW), Pixels(8)(x, DRAW), rtol=0, atol=PLACES)


def test_pixels_are_over_white_and_normalised() -> None:
    x = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)  # transparent black
    assert Pixels(4)(x, DRAW[:1]).unique().tolist() == [1.0]
    x[:, 3] = 255
    assert Pixels(4)(x, DRAW[:1]).unique().tolist() == [-1.0]


def test_an_image_depends_on_its_own_key_alone() -> None:
    augment, x = Augment(8, texture=0.5, erase=0.3), image()
    whole = augment(x, DRAW)
    torch.testing.assert_close(augment(x[1:2], DRAW[1:2]), whole[1:2], rtol=0, atol=PLACES)
    assert torch.equal(augment(x, DRAW), whole)
    assert not torch.allclose(augment(x[:1], DRAW[1:2]), whole[:1])


def test_two_streams_are_two_views() -> None:
    augment, x = Augment(8), image()
    assert not torch.allclose(augment(x, DRAW), augment.stream_copy("image@2")(x, DRAW))


def test_the_affine_map_is_what_torchvision_computes() -> None:
    """A pure rotation by the drawn angle equals v2.functional.rotate."""
    augment = Augment(16, **{**STILL, "rotate": 30.0})
    x = image(16, channels=3)[:1]
    a_23 = augment.affine(DRAW[:1], torch.device("cpu"))[0]
    degrees = math.degrees(math.atan2(float(a_23[1, 0]), float(a_23[0, 0])))
    assert 0.5 < abs(degrees) <= 30
    wanted = v2.functional.rotate(x.float() / 255, degrees, interpolation=v2.InterpolationMode.BILINEAR)
    # places and sines of angles, each to 16 ulps, between neighbours that are 2 apart: 16 px * 64 ulps
    torch.testing.assert_close(augment(x, DRAW[:1]), wanted * 2 - 1, rtol=0, atol=1e-3)


def test_grey_images_have_equal_channels_and_greys_keep_their_hue() -> None:
    x = image(8, channels=3)
    grey = Augment(8, **{**STILL, "grey": 1.0})(x, DRAW)
    torch.testing.assert_close(grey[:, 0], grey[:, 2], **rounding(8, F32))
    neutral = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    mixed = Augment(8, **{**STILL, "colour": 1.0})(neutral, DRAW)
    torch.testing.assert_close(mixed[:, 0], mixed[:, 1], **rounding(8, F32))


def test_shares_of_the_random_choices() -> None:
    x = image(8, channels=3)[:1].expand(400, -1, -1, -1)
    draws = torch.arange(400) * 7919
    plain = Augment(8, **STILL)(x, draws)
    for name in ("mirror", "grey", "invert"):
        changed = (Augment(8, **{**STILL, name: 0.25})(x, draws) - plain).abs().amax((1, 2, 3)) > 1e-3
        assert float(changed.float().mean()) == pytest.approx(0.25, abs=statistical(0.433, 400)), name


def test_reducing_weighs_colours_by_opacity() -> None:
    x = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    x[0, 0], x[0, 3, 0, 0] = 200, 255  # red everywhere, opaque in one pixel of four
    x[0, 1, 1, 1] = 250  # green where nothing is seen
    out = reduce_rgba(x, 1)[0, :, 0, 0].tolist()
    assert out == [200, 0, 0, 64]


def test_factors_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Augment(8, scale=0.5)


IMAGENET: dict[str, Any] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_normalised_as_torchvision_does(memory: torch.memory_format) -> None:
    x = image(8, channels=3).contiguous(memory_format=memory)
    wanted = v2.functional.normalize(x.float() / 255, list(IMAGENET["mean"]), list(IMAGENET["std"]))
    torch.testing.assert_close(Pixels(8, **IMAGENET)(x, DRAW), wanted, rtol=0, atol=ulps(16, F32))


def test_training_and_evaluation_share_the_normalisation() -> None:
    x = image()
    ours, wanted = Augment(8, **STILL, **IMAGENET)(x, DRAW), Pixels(8, **IMAGENET)(x, DRAW)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=5 * PLACES)  # divided by deviations down to 0.22


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_pixels_leave_the_batch_as_it_is(memory: torch.memory_format) -> None:
    x = image(8, channels=3).contiguous(memory_format=memory)
    before, floats = x.clone(), x.float()
    out = Pixels(8, **IMAGENET)(x, DRAW)
    assert torch.equal(x, before) and out.is_contiguous(memory_format=memory)
    torch.testing.assert_close(Pixels(8, **IMAGENET)(floats, DRAW), out, rtol=0, atol=ulps(16, F32))
    assert torch.equal(floats, before.float())


@pytest.mark.parametrize("part", [Pixels, Augment])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mean": (0.5,)}, "mean .0.5.: three numbers"),
        ({"std": (0.2, 0.0, 0.2)}, "std .*must be above 0"),
        ({"mean": (123.7, 116.3, 103.5)}, "mean .*0..1"),
    ],
)
def test_a_wrong_normalisation_is_refused(part: Any, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        part(8, **wrong)


# crops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "ratio"), [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.6, 0.9), (0.4, 0.9))])
def test_crops_are_distributed_as_torchvisions(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    torch.manual_seed(0)
    side = 4096  # fine enough that its whole pixels do not matter
    blank = torch.zeros(1, 1, 1).expand(1, side, side)
    drawn = [v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(8, scale, ratio), [blank]) for _ in range(3000)]
    high, wide, top, left = (torch.tensor([box[k] for box in drawn]) for k in ("height", "width", "top", "left"))
    theirs = torch.stack([wide / side, high / side, (2 * left + wide) / side - 1, (2 * top + high) / side - 1])
    box_B23 = Crop(8, scale, ratio, flip=0.5).boxes(torch.arange(3000) * 7919, torch.device("cpu"))
    ours = torch.stack([box_B23[:, 0, 0].abs(), box_B23[:, 1, 1], box_B23[:, 0, 2], box_B23[:, 1, 2]])
    for a, b in [(ours, theirs), (ours.square(), theirs.square()), (ours[:1] * ours[1:2], theirs[:1] * theirs[1:2])]:
        error = ((a.var(1) + b.var(1)) / 3000).sqrt() + 1e-6
        assert ((a.mean(1) - b.mean(1)).abs() < 4.5 * error).all()
    assert abs(float((box_B23[:, 0, 0] < 0).float().mean()) - 0.5) < 0.04
    assert (ours[0] + ours[2].abs() <= 1 + ulps(8, F32)).all() and (
        ours[1] + ours[3].abs() <= 1 + ulps(8, F32)
    ).all(), "inside"


def test_a_crop_shows_its_box() -> None:
    """On ramps to the right and down, pixels say where they come from."""
    level = torch.arange(64, dtype=torch.uint8) * 4
    ramps = torch.stack([level.expand(64, 64), level[:, None].expand(64, 64)]).expand(200, 2, 64, 64)
    crop, draw_B = Crop(16, scale=(0.2, 0.5), flip=0.5), torch.arange(200)
    box_B23 = crop.boxes(draw_B, torch.device("cpu"))
    centre_S = (torch.arange(16) + 0.5) / 8 - 1
    x_BS = box_B23[:, 0, :1] * centre_S + box_B23[:, 0, 2:]
    y_BS = box_B23[:, 1, 1:2] * centre_S + box_B23[:, 1, 2:]
    wanted = [((place * 32 + 31.5) * 4 / 127.5 - 1) for place in (x_BS, y_BS)]  # the middle of pixel 0 is at -63/64
    seen = crop(ramps, draw_B)
    assert seen.shape == (200, 2, 16, 16) and seen.dtype == torch.float32
    inner = slice(3, -3)  # at the rim the ramp ends
    # a 32nd of a grey level, where a step of the ramp is 0.03
    torch.testing.assert_close(seen[:, 0, 5, inner], wanted[0][:, inner], rtol=0, atol=0.01)
    torch.testing.assert_close(seen[:, 1, inner, 5], wanted[1][:, inner], rtol=0, atol=0.01)  # as above


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_the_whole_image_equals_evaluation_for_any_channels(channels: int) -> None:
    x = image(12, channels)
    still = Crop(12, scale=(1, 1), ratio=(1, 1), flip=0)
    torch.testing.assert_close(still(x, DRAW), x.float() / 127.5 - 1, rtol=0, atol=PLACES)
    mirrored = Crop(12, scale=(1, 1), ratio=(1, 1), flip=1)
    torch.testing.assert_close(mirrored(x, DRAW), (x.float() / 127.5 - 1).flip(3), rtol=0, atol=PLACES)


def test_a_crop_depends_on_its_own_key_alone() -> None:
    crop, x = Crop(12), image(12, 1)
    whole = crop(x, DRAW)
    assert torch.equal(crop(x, DRAW), whole)
    torch.testing.assert_close(crop(x[1:2], DRAW[1:2]), whole[1:2], rtol=0, atol=PLACES)
    assert not torch.allclose(crop(x[:1], DRAW[1:2]), whole[:1])
    assert whole.min() >= -1 and whole.max() <= 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 0}, "size 0"),
        ({"scale": (0.0, 1.0)}, "scale 0, 1"),
        ({"scale": (0.5, 1.2)}, "scale 0.5, 1.2"),
        ({"ratio": (2.0, 1.0)}, "ratio 2, 1"),
        ({"flip": 1.5}, "flip 1.5 is not a probability"),
    ],
)
def test_invalid_crops_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        Crop(**({"size": 8} | options))
