"""Digits: pictures against an explicit distance, noise, ids of the sets, voices, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from descant.datamodules.corpora.digits import LINES, NAMES, Digits, DigitsSet, draw_digits
from descant.modules.core.rng import normal_NK, uniform_N, uniform_NK
from tests.datamodules.batches import shuffled
from tests.tolerance import statistical


def data(**options: Any) -> Digits:
    return Digits(**{"batch_size": 32, "tiny": True, **options})


def rows(held: Any) -> DigitsSet:
    assert isinstance(held, DigitsSet)
    return held


def explicit(digit: int, key: int, size: int) -> np.ndarray:
    """A digit pixel by pixel in float64, without noise."""
    draw_1 = np.array([key])
    purposes = [f"digits/{what}" for what in ("turn", "slant", "wide", "high", "x", "y")]
    turn, slant, wide, high, x, y = (uniform_NK(draw_1, purposes).double()[0] * 2 - 1).tolist()
    width = 0.12 + 0.04 * (float(uniform_N(draw_1, "digits/width")) * 2 - 1)
    segments = []
    for k, line in enumerate(LINES[digit]):
        shift_P2 = normal_NK(draw_1, 2 * len(line), f"digits/point/{k}")[0].view(-1, 2).double().numpy()
        points = []
        for (across, down), shift_2 in zip(line, shift_P2, strict=True):
            across, down = across + 0.05 * shift_2[0], down + 0.05 * shift_2[1]
            across, down = (across + 0.3 * slant * down) * (0.85 + 0.15 * wide), down * (0.85 + 0.15 * high)
            angle = np.deg2rad(15) * turn
            points.append(np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [across, down])
        points = [point + 0.15 * np.array([x, y]) for point in points]
        segments += list(pairwise(points))
    image_HH = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            pixel = np.array([(column + 0.5) * 2 / size - 1, (row + 0.5) * 2 / size - 1])
            least = 9.0
            for begin, end in segments:
                share = np.clip((pixel - begin) @ (end - begin) / max(((end - begin) ** 2).sum(), 1e-9), 0, 1)
                least = min(least, float(np.linalg.norm(pixel - begin - share * (end - begin))))
            image_HH[row, column] = np.clip((width - least) * size / 2 + 0.5, 0, 1)
    return image_HH


@pytest.mark.parametrize("digit", range(10))
def test_a_picture_is_its_lines_pixel_by_pixel(digit: int) -> None:
    x_1HH = draw_digits(torch.tensor([digit]), np.array([40 + digit]), 12, 0.0)[0]
    # float32 against float64, of pixels that are a distance times 6
    np.testing.assert_allclose(x_1HH[0].numpy(), explicit(digit, 40 + digit, 12), rtol=0, atol=2e-5)


def test_a_picture_is_the_same_among_others() -> None:
    digit_N, draw_N = torch.tensor([3, 8, 3, 1]), np.array([5, 6, 7, 8])
    together = draw_digits(digit_N, draw_N, 20, 0.4)
    for n in range(4):
        assert torch.equal(draw_digits(digit_N[n : n + 1], draw_N[n : n + 1], 20, 0.4)[0], together[n])


def test_the_noise_is_the_one_that_was_chosen() -> None:
    digit_N, draw_N = torch.arange(10).repeat(20), np.arange(200)
    noise = draw_digits(digit_N, draw_N, 28, 0.7) - draw_digits(digit_N, draw_N, 28, 0.0)
    assert abs(float(noise.std()) - 0.7) < statistical(0.7 / np.sqrt(2), noise.numel())
    assert not torch.equal(noise[0], noise[1])


def test_sets_share_no_id_and_all_digits_are_in_them() -> None:
    open_, sealed = data(), data(sealed=True)
    sets = [rows(open_.training_set())]
    sets += [rows(of.evaluation_sets(stage)[name]) for of in (open_, sealed) for stage, name in
             (("validate", "val"), ("test", "test"))]  # fmt: skip
    every = np.concatenate([held.id_N for held in sets])
    assert len(np.unique(every)) == len(every) == 256 + 4 * 64
    assert len(sets[0].digit_N.unique()) == 10 and all(len(held.digit_N.unique()) >= 9 for held in sets)
    assert np.array_equal(rows(sealed.bank_set()).id_N, sets[0].id_N)


def test_the_same_digit_is_drawn_and_spoken() -> None:
    held = data(batch_size=64)
    batch = shuffled(held.training_set(), 64, seed=0)
    for n in range(64):
        digit, index = int(batch.targets["digit"][n]), int(batch.index[n])
        assert held.describe(index) == NAMES[digit]
        clip = held.spoken_names.spoken
        wave_S = batch.inputs["audio"][n, : int(batch.inputs["audio_length"][n])].numpy()
        clips = [clip.wave[first : first + len(wave_S)] for first, _ in clip.clips[:, digit]]
        assert any(np.array_equal(wave_S, one) for one in clips)
    assert held.on_after_batch_transfer(batch, 0).inputs["audio"].ndim == 3
    assert held.picture(int(batch.index[0])).shape == (3, 28, 28)


def test_a_clip_is_spoken_anew_at_each_visit_and_alike_in_evaluation() -> None:
    training, test = data().training_set(), data().evaluation_sets("test")["test"]
    for held, same in ((training, False), (test, True)):
        first, again = (rows(held).rows(np.arange(64), np.arange(64) + 100 * visit).inputs["audio"] for visit in (0, 1))
        assert torch.equal(first, again) == same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -0.1}, "noise -0.1: 0 or more, such as 0.5; ink is 1"),
        ({"size": 0}, "size 0: 1 is the least"),
        ({"samples": 0}, "samples 0: 1 is the least"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        data(**options)
