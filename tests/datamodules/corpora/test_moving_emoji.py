"""Moving emoji: frames show what targets and captions state, digits are legible at full size only, splits are Emoji's.

Letters: B clips, F frames, S pixels of a side.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.moving_emoji import MOTIONS, ClipSet, MovingEmoji, corners, motions, plates, render
from descant.datamodules.sampling.resumable_sampler import Order
from descant.modules.core.batch import Batch
from descant.modules.transforms.image import Augment
from tests.datamodules.batches import shuffled, whole
from tests.tolerance import statistical

NAMES = list(MOTIONS)


@cache
def data() -> MovingEmoji:
    return MovingEmoji(batch_size=16)


@cache
def clips(many: int = 270) -> Batch:
    return shuffled(data().training_set(), many)


def seen(x_BF4SS: Tensor) -> tuple[Tensor, Tensor]:
    """Measured on frames: centre of opacity ``[B, F, 2]`` (right, down) and opaque pixels ``[B, F]``."""
    alpha = x_BF4SS[:, :, 3].double() / 255
    at_S = torch.arange(alpha.shape[-1], dtype=torch.float64) + 0.5
    total = alpha.sum((2, 3))
    return torch.stack([(alpha.sum(2) @ at_S) / total, (alpha.sum(3) @ at_S) / total], -1), total


def found(gray_NSS: Tensor, plate_KHW: Tensor) -> tuple[Tensor, Tensor]:
    """Template matching: ``[N]`` least squared difference to any plate at any place, and the number of that plate."""
    high, wide = plate_KHW.shape[1:]
    patch_NPL = F.unfold(gray_NSS[:, None].double(), (high, wide)).transpose(1, 2)
    score_NPK = torch.cdist(patch_NPL, plate_KHW.flatten(1).double()[None]).square()
    best = score_NPK.amin(1)
    return best.amin(1), best.argmin(1)


def over_grey(x_BF4SS: Tensor) -> Tensor:
    """Brightness over the plates' mean grey, ``[B F, S, S]``."""
    x = x_BF4SS.double()
    return (x[:, :, :3].mean(2) * x[:, :, 3] / 255 + 128 * (1 - x[:, :, 3] / 255)).flatten(0, 1)


def test_frames_show_the_motion() -> None:
    """By centre and area of what is opaque, and for turns by where the plate is from the centre."""
    batch = clips()
    middle, area = seen(batch.inputs["video"])
    size, motion = data().size, batch.targets["motion"]
    way, ratio = (middle[:, -1] - middle[:, 0]) / size, area[:, -1] / area[:, 0]
    down, right = corners(motions(batch.rng_seed.numpy(), data().frames), size)
    arm = torch.stack([right + 2.5, down + 3.5], -1) - middle
    angle = torch.atan2(arm[..., 1], arm[..., 0])
    turned = (angle[:, 1:] - angle[:, :-1] + torch.pi).remainder(2 * torch.pi) - torch.pi
    turn, long = turned.sum(1).rad2deg(), arm.norm(dim=-1).amin(1) > 3  # pixels; shorter arms have no direction
    assert set(motion.tolist()) == set(range(len(NAMES)))
    for b, (right_sign, down_sign, size_sign, turn_sign) in enumerate(MOTIONS[NAMES[m]] for m in motion.tolist()):
        for k, sign in enumerate((right_sign, down_sign)):
            assert 0.24 < sign * float(way[b, k]) < 0.41 if sign else abs(float(way[b, k])) < 0.2, NAMES[motion[b]]
        assert float(ratio[b]) ** size_sign > 1.35 if size_sign else 0.8 < float(ratio[b]) < 1.25
        if turn_sign and long[b]:
            assert 60 < turn_sign * float(turn[b]) < 165
        if motion[b] == 0:
            assert torch.equal(batch.inputs["video"][b], batch.inputs["video"][b, :1].expand(data().frames, -1, -1, -1))
    assert int((long & (motion >= 7)).sum()) > 20


def test_a_drawing_stays_inside_and_a_clip_backwards_is_of_the_opposite_motion() -> None:
    clip = motions(np.arange(20_000), 5)
    half = clip.side_BF[..., None] / 2 * torch.where(clip.motion_B >= 7, 2**0.5, 1.0)[:, None, None]
    assert (clip.middle_BF2 - half > -1e-6).all() and (clip.middle_BF2 + half < 1 + 1e-6).all()  # float32 in 0..1
    share = torch.bincount(clip.motion_B, minlength=9) / len(clip.motion_B)
    assert (share - 1 / 9).abs().max() < statistical(0.32, len(clip.motion_B), 5)
    for a, b in (
        ("moving left", "moving right"),
        ("growing", "shrinking"),
        ("turning clockwise", "turning anticlockwise"),
    ):
        there, back = (clip.motion_B == NAMES.index(m) for m in (a, b))
        for x in (clip.middle_BF2[..., 0], clip.side_BF, clip.angle_BF):
            # each frame's mean over clips: 0.2 is the widest standard deviation (of the last: 0.3 radians)
            torch.testing.assert_close(
                x[there].flip(1).mean(0), x[back].mean(0), atol=4 * 0.3 * (2 / 2000) ** 0.5, rtol=0
            )


def test_digits_are_legible_at_full_size_and_not_at_a_quarter() -> None:
    batch, digit = clips(), clips().targets["digit"].repeat_interleave(data().frames)
    frames_NSS = over_grey(batch.inputs["video"])
    distance, number = found(frames_NSS, plates())
    assert (distance == 0).all() and torch.equal(number, digit)
    assert plates().double().mean((1, 2)).sub(128).abs().max() < 0.5  # rounding of greys: no digit is darker
    # reduced to a quarter, and told the place: each digit there alone, as it looks then, less its mean
    reduced_N1SS = frames_NSS.view(-1, data().frames, 48, 48)[:, :1]
    corner_BF2 = torch.stack(corners(motions(batch.rng_seed.numpy(), data().frames), data().size), -1)
    correct = []
    for x_1SS, (top, left), wanted in zip(reduced_N1SS, corner_BF2[:, 0].tolist(), batch.targets["digit"], strict=True):
        alone = torch.full((11, 1, 48, 48), 128.0, dtype=torch.float64)
        alone[:10, 0, top : top + 7, left : left + 5], alone[10] = plates().double(), x_1SS
        looks = F.interpolate(F.avg_pool2d(alone, 4), scale_factor=4, mode="bilinear")
        looks = looks[:, 0, top : top + 7, left : left + 5].flatten(1)
        looks = looks - looks.mean(1, keepdim=True)
        correct.append(int((looks[:10] - looks[10]).square().sum(1).argmin()) == wanted)
    assert np.mean(correct) < 0.4  # measured 0.31; by chance 0.1


def test_a_clip_is_a_function_of_seed_epoch_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = data().training_set()
    small, large = (shuffled(rows, n) for n in (16, 64))
    place = {int(i): n for n, i in enumerate(large.index)}
    shared = [(n, place[int(i)]) for n, i in enumerate(small.index) if int(i) in place]
    assert len(shared) == 16
    for n, m in shared:
        for some, others in ((small.inputs, large.inputs), (small.targets, large.targets)):
            assert all(torch.equal(x[n], others[name][m]) for name, x in some.items())
    window = next(iter(Order(len(rows), 16, seed=0)))
    later = rows[window._replace(slots=[slot._replace(epoch=1) for slot in window.slots])]
    assert torch.equal(later.index, small.index) and not torch.equal(later.targets["motion"], small.targets["motion"])
    tests = whole(data().evaluation_sets("test")["both"], 32), whole(data().bank_set(), 32)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    again = MovingEmoji(batch_size=16)
    for a, b in zip(
        tests, (whole(again.evaluation_sets("test")["both"], 32), whole(again.bank_set(), 32)), strict=True
    ):
        assert torch.equal(a.inputs["video"], b.inputs["video"]) and torch.equal(a.inputs["text"], b.inputs["text"])
    assert not torch.equal(shuffled(again.training_set(), 16).targets["motion"], small.targets["motion"])


def test_a_resumed_epoch_goes_on_at_its_next_clip() -> None:
    def videos(first: int) -> list[Tensor]:
        run = MovingEmoji(tiny=True, batch_size=64, size=24, frames=4)
        run.position = (1, first)
        return [batch.inputs["video"] for batch in run.train_dataloader()]

    all_of_them, rest = videos(0), videos(2)
    assert len(rest) == len(all_of_them) - 2 > 1
    assert all(torch.equal(a, b) for a, b in zip(all_of_them[2:], rest, strict=True))


def test_captions_state_name_and_motion_and_fit() -> None:
    batch = clips()
    for ids, concept, motion in zip(
        batch.inputs["text"].tolist(), batch.targets["identity"].tolist(), batch.targets["motion"].tolist(), strict=True
    ):
        text = data().tokenizer.decode([i for i in ids if i not in (0, 1, 2)]).replace(" ,", ",").lower()
        name = data().emoji.pack.names[concept].lower()
        if 2 in ids[:-1]:  # not cut
            assert NAMES[motion] in text and name.split()[0][:3] in text
    both = whole(data().evaluation_sets("test")["both"], 20)
    for index, motion in zip(both.index.tolist(), both.targets["motion"].tolist(), strict=True):
        assert data().describe(index) == f"{data().emoji.pack.names[index // 4]}, {NAMES[motion]}"
        assert data().picture(index).shape == (3, 48, 48)
    assert torch.equal(both.content_id % 9, both.targets["motion"])
    assert data().prompts("motion")[1] == NAMES == data().class_names("motion")


def test_splits_are_those_of_emoji() -> None:
    plain = Emoji(batch_size=16, paired=True)
    for stage in ("validate", "test"):
        ours, theirs = data().evaluation_sets(stage), plain.evaluation_sets(stage)
        assert list(ours) == list(theirs)
        for name, rows in ours.items():
            assert isinstance(rows, ClipSet) and np.array_equal(rows.id_N, theirs[name].id_N)  # type: ignore[attr-defined]
    assert np.array_equal(data().training_set().id_N, plain.training_set().id_N)
    sealed = MovingEmoji(batch_size=16, sealed=True).emoji
    assert sealed.sealed and not MovingEmoji(batch_size=16, development=True).emoji.sealed


def test_on_the_device_all_frames_look_alike_and_the_middle_one_is_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    some = MovingEmoji(tiny=True, batch_size=8, size=24, frames=5, image=True)
    assert some.modalities == ("video", "text", "image")
    for training in (False, True):
        monkeypatch.setattr(MovingEmoji, "training", training)
        batch = some.on_after_batch_transfer(shuffled(some.training_set(), 64), 0)
        video, still = batch.inputs["video"], batch.targets["motion"] == 0
        assert video.shape == (64, 5, 3, 24, 24) and video.dtype == torch.float32
        assert torch.equal(video[still], video[still][:, :1].expand(-1, 5, -1, -1, -1)) and still.any()
        assert torch.equal(batch.inputs["image"], video[:, 2])
        assert set(batch.present) == {"video", "text", "image"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"frames": 1}, "frames 1: a motion needs at least 2"),
        ({"size": 16}, "size 16: the digit needs frames of at least 24 pixels"),
        ({"augment": Augment(48, mirror=0.5)}, "captions say left and right"),
        ({"vendors": ["notto"]}, "vendors: 'notto' is not one of"),
        ({"drop": {"image": 0.5}}, "drop: no modality 'image'; this data has video, text"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        MovingEmoji(**options)


def test_a_turn_is_clockwise_as_one_sees_it() -> None:
    """A drawing whose right half is opaque: turned by 90 degrees clockwise, its lower half is."""
    x = torch.zeros(1, 4, 16, 16, dtype=torch.uint8)
    x[:, :, :, 8:] = 255
    clip = motions(np.array([0]), 2)._replace(
        middle_BF2=torch.full((1, 2, 2), 0.5),
        side_BF=torch.full((1, 2), 1.0),
        angle_BF=torch.tensor([[0, torch.pi / 2]]),
    )
    middle, _ = seen(render(x, clip, 48))
    assert middle[0, 0, 0] > 30 and abs(middle[0, 0, 1] - 24) < 2 and middle[0, 1, 1] > 30
