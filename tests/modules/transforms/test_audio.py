"""Log-mel features and their augmentation, against numbers from elsewhere and laws they must obey."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from descant.modules.transforms.audio import AudioAugment, LogMel, hertz, mel, mel_filters, resample
from tests.tolerance import F32, F64, conditioned, rounding, ulps

#: Decibels are 4.34 times a relative error, of 9 stages of a transform; a filter may hold 1/1000 of a frame's power.
DECIBELS = conditioned(4.34 * 1000**0.5, F32, terms=9)
#: Places on a grid of 40 frames are read between neighbours that are up to 80 dB apart.
PLACES = conditioned(80, F32, terms=40)


def sine(frequency: float, samples: int = 16000, rate: int = 16000, loud: float = 1.0) -> torch.Tensor:
    return loud * torch.sin(2 * torch.pi * frequency * torch.arange(samples, dtype=torch.float64) / rate)


def test_the_scale_is_slaneys():
    # 3 f / 200 below 1 kHz; above, 27 steps for each factor of 6.4
    assert mel(torch.tensor([0.0, 200.0, 1000.0])).tolist() == pytest.approx([0.0, 3.0, 15.0], rel=ulps(4, F32))
    assert float(mel(torch.tensor(4000.0))) == pytest.approx(15 + 27 * math.log(4, 6.4), rel=ulps(4, F32))
    f = torch.tensor([0.0, 30.0, 999.0, 1000.0, 1001.0, 8000.0])
    torch.testing.assert_close(hertz(mel(f)), f, **rounding(16, F32))  # exp of a logarithm of up to 2.1


@pytest.mark.parametrize(
    ("mels", "fft", "rate", "low", "high"), [(64, 512, 16000, 0, 8000), (40, 1024, 22050, 50, 9000)]
)
def test_filters_equal_those_of_another_implementation(mels, fft, rate, low, high):
    w_KF = mel_filter_bank(fft // 2 + 1, mels, float(low), float(high), rate, norm=None, mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(mels, fft, rate, low, high).T.numpy(), w_KF, rtol=0, atol=ulps(4, F32))


def test_a_tone_lands_in_its_filter_and_a_full_one_reads_zero():
    net = LogMel()
    corners = hertz(torch.linspace(0, float(mel(torch.tensor(8000.0))), 66))
    for k in (10, 20, 40, 60):
        x_FT = net(sine(float(corners[k + 1]))[None].float())[0, :, 2:-2]
        assert (x_FT.argmax(dim=0) == k).all()
        assert -3 < float(x_FT[k].mean()) < 0
    wide = LogMel(mels=2)(sine(float(hertz(mel(torch.tensor(8000.0)) / 3)))[None].float())
    assert float(wide[0, 0, 5]) == pytest.approx(0, abs=0.4)  # dB: it lies between two places of the spectrum


def test_ten_times_the_amplitude_is_twenty_decibels():
    net, noise = LogMel(), torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(noise) - net(noise / 10), torch.full((1, 64, 25), 20.0), rtol=0, atol=DECIBELS)


def test_one_frame_equals_its_definition():
    net = LogMel(mels=20, window=400, hop=160)
    x = np.random.default_rng(0).normal(size=1600)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs(np.fft.rfft(x[320:720] * 2 * hann / np.sqrt(512 * (hann**2).sum()), 512)) ** 2
    w_KF = mel_filter_bank(257, 20, 0.0, 8000.0, 16000, norm=None, mel_scale="slaney")
    x_BFT = net(torch.from_numpy(x)[None].float())
    np.testing.assert_allclose(x_BFT[0, :, 2].numpy(), 10 * np.log10(power @ w_KF), rtol=0, atol=DECIBELS)


def test_int16_equals_float():
    x = sine(440, 3200, loud=0.5)[None]
    a, b = LogMel()((x * 32768).round().short()), LogMel()(x.float())
    loud = b > -60  # what lies below is the rounding itself
    assert loud.any()
    # dB: rounding to 16 bits is -110 in a filter, so 50 below the least here: 0.3% of the amplitude
    torch.testing.assert_close(a[loud], b[loud], atol=0.05, rtol=0)


def test_frames_past_the_end_are_padding_and_silence_is_the_floor():
    x = torch.zeros(3, 1000)
    x_BFT = LogMel()(x, torch.tensor([1000, 161, 0]))
    assert x_BFT.shape == (3, 64, 7)
    assert (x_BFT > -torch.inf).all(dim=1).sum(dim=1).tolist() == [7, 2, 0]
    assert (x_BFT[0] == -80).all() and (x_BFT[2] == -torch.inf).all()


def test_padding_does_not_matter():
    net, length = LogMel(), 2345
    x = torch.randn(1, length)
    alone = net(x)
    padded = net(torch.cat([x, torch.randn(1, 5000)], dim=1), torch.tensor([length]))
    assert alone.shape[2] == 15 and (padded[:, :, 15:] == -torch.inf).all()
    torch.testing.assert_close(padded[:, :, :15], alone, rtol=0, atol=DECIBELS)


def test_rows_are_independent_however_many():
    net = LogMel()
    x, length = torch.randn(70, 4000), torch.arange(70) * 50
    whole = net(x, length)
    assert len(whole) == 70
    torch.testing.assert_close(net(x[66:67], length[66:67]), whole[66:67], rtol=0, atol=DECIBELS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mels": 256}, r"mels 256: filter \d+ at \d+ Hz lies between two bins; use fewer mels"),
        ({"low": 9000.0}, "low 9000 and high 8000"),
        ({"high": 9000.0}, "<= 8000 Hz, half the rate"),
        ({"hop": 401}, "hop 401: at least 1, at most window 400, or frames"),
    ],
)
def test_invalid_filter_banks_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        LogMel(**options)


# resampling ------------------------------------------------------------------------------------------------------


def level(x: torch.Tensor) -> float:
    return 10 * math.log10(float(x.square().mean()) + 1e-30)


@pytest.mark.parametrize("before", [44100, 48000, 22050, 22254])
def test_resampling_does_not_alias(before):
    inside, outside = (resample(sine(f, before // 2, before)[None], before, 16000)[0] for f in (1000.0, 10000.0))
    assert len(inside) == 8000
    middle = slice(400, -400)  # both ends begin and stop at once, which no band-limited signal does
    error = level((inside - sine(1000.0, 8000))[middle]) - level(sine(1000.0, 8000))
    assert error < -60, f"{error:.1f} dB"
    alias = level(outside[middle]) - level(sine(10000.0, before // 2, before))
    assert alias < -60, f"{alias:.1f} dB"


def test_resampling_up_and_back_gives_the_same():
    x = torch.randn(2, 1600, dtype=torch.float64).cumsum(dim=1) * torch.hann_window(1600, dtype=torch.float64)
    there = resample(x, 8000, 16000)
    assert there.shape == (2, 3200)
    # sounds of up to 54 through two transforms of 12 stages
    torch.testing.assert_close(resample(there, 16000, 8000), x, rtol=0, atol=conditioned(54, F64, terms=24))
    assert resample(x, 8000, 8000) is x


# augmentation ----------------------------------------------------------------------------------------------------

STILL: dict[str, Any] = {"tempo": 1.0, "pitch": 0.0, "shift": 0, "gain": 0.0, "masks": 0}


def features(*frames: int, T: int = 40) -> torch.Tensor:
    x_BFT = torch.randn(len(frames), 16, T, generator=torch.Generator().manual_seed(1)) * 10 - 40
    return x_BFT.masked_fill((torch.arange(T) >= torch.tensor(frames)[:, None])[:, None], -torch.inf)


def test_without_strength_nothing_changes():
    x = features(40, 13, 0)
    torch.testing.assert_close(AudioAugment(**STILL)(x, torch.arange(3)), x, rtol=0, atol=PLACES)


def test_a_sample_is_a_function_of_its_key_alone():
    x, draw_B = features(40, 13, 25, 7), torch.tensor([3, 5, 9, 11])
    net = AudioAugment()
    whole = net(x, draw_B)
    torch.testing.assert_close(net(x[2:3], draw_B[2:3]), whole[2:3], rtol=0, atol=PLACES)
    assert torch.equal(net(x, draw_B), whole)
    assert not torch.equal(net(x[:1].expand(2, -1, -1), draw_B[:2])[0], whole[1])
    assert not torch.equal(AudioAugment(stream="audio@2")(x, draw_B), whole)


def test_gain_moves_all_filters_by_the_same():
    x = features(40).expand(200, -1, -1)
    moved = (AudioAugment(**{**STILL, "gain": 6.0})(x, torch.arange(200)) - x).flatten(1)
    assert (moved.amax(1) - moved.amin(1)).max() < 2 * PLACES
    assert moved[:, 0].abs().max() <= 6 and moved[:, 0].min() < -4 and moved[:, 0].max() > 4


def test_shift_moves_frames_and_pads():
    x = features(20).expand(200, -1, -1)
    out = AudioAugment(**{**STILL, "shift": 3})(x, torch.arange(200))
    seen = set()
    for row in out:
        real = (row[0] > -torch.inf).nonzero().squeeze(1)
        first, last = int(real[0]), int(real[-1])
        shift = last - 19
        seen.add(shift)
        assert first == max(shift, 0) and len(real) == last - first + 1
        torch.testing.assert_close(row[:, first : last + 1], x[0, :, first - shift : 20], rtol=0, atol=PLACES)
    assert seen == {-3, -2, -1, 0, 1, 2, 3}


def test_tempo_stretches_time():
    x = features(20)
    ramp = torch.arange(40.0).expand(1, 16, 40) - 40
    x = torch.where(x > -torch.inf, ramp, x).expand(100, -1, -1)
    out = AudioAugment(**{**STILL, "tempo": 1.5})(x, torch.arange(100))
    for row in out:
        real = int((row[0] > -torch.inf).sum())
        slope = float(row[0, 5] - row[0, 2]) / 3  # a ramp of one a frame becomes one of tempo
        assert 1 / 1.5 - 1e-3 <= slope <= 1.5 + 1e-3  # float32 places of a ramp of one a frame
        assert real == pytest.approx(20 / slope, abs=1.5)  # frames: half a one at each end, and rounding to whole ones
    assert len({int((row[0] > -torch.inf).sum()) for row in out}) > 8


def test_pitch_moves_filters():
    x = torch.full((300, 16, 4), -80.0)
    x[:, 8] = 0.0
    out = AudioAugment(**{**STILL, "pitch": 2.0})(x, torch.arange(300))
    assert {int(k) for k in out[:, :, 0].argmax(dim=1)} == {6, 7, 8, 9, 10}
    assert (out.amax(dim=1) <= 0).all() and (out >= -80).all()


def test_masks_are_bands_of_the_mean():
    x = features(40).expand(300, -1, -1)
    out = AudioAugment(**{**STILL, "masks": 1, "filters": 4, "frames": 6})(x, torch.arange(300))
    changed = (out - x).abs() > 1e-3
    rows, columns = changed.float().mean(dim=2) > 0.9, changed.float().mean(dim=1) > 0.9
    assert set(rows.sum(dim=1).tolist()) == {0, 1, 2, 3, 4}
    assert set(columns.sum(dim=1).tolist()) == {0, 1, 2, 3, 4, 5, 6}
    # 640 terms of one sign, added in blocks: four times the square root
    torch.testing.assert_close(out[changed], x[0].mean().expand(int(changed.sum())), rtol=ulps(100, F32), atol=0)


def test_padding_stays_padding():
    out = AudioAugment()(features(0, 0), torch.arange(2))
    assert (out == -torch.inf).all()
    assert not AudioAugment()(features(*[5] * 50), torch.arange(50)).isnan().any()
