"""Audio on the device: waveforms to log-mel features, resampling, noise, and SpecAugment-style augmentation, by batch.

A feature of ``-inf`` is padding (past a sample's end, or an absent sample); silence is the finite floor. Letters: B
samples, S samples of a waveform, F mel filters, K bins of a spectrum, T frames, N waveforms.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.errors import require_value
from descant.modules.core.host import (
    derive,
    has_host_copy,
    host_copy,
    known_finite,
    to_device,
    with_finite,
    with_host_copy,
)
from descant.modules.core.rng import normal_NK, uniform_NK

#: Divisor of int16, so that full scale is 1.
FULL_SCALE = 32768.0
#: Numbers of a spectrum computed at once on a CPU, so that they fit its cache.
CELLS = 1 << 19


def mel(hertz: Tensor) -> Tensor:
    """Convert hertz to mel on Slaney's scale: ``3 f / 200`` up to 1000 Hz, above ``15 + 27 log(f / 1000) / log(6.4)``.

    The scale is linear at low frequencies, so with windows of 25 ms no filter falls between two bins, as some do on the
    HTK scale. Source: Slaney 1998, Auditory Toolbox (as in librosa and Whisper).

    >>> mel(torch.tensor([500.0, 1000.0, 6400.0])).tolist()
    [7.5, 15.0, 42.0]
    """
    return torch.where(hertz < 1000, 3 * hertz / 200, 15 + 27 * (hertz.clamp(min=1000) / 1000).log() / math.log(6.4))


def hertz(mels: Tensor) -> Tensor:
    """Convert mel to hertz, the inverse of :func:`mel`.

    >>> hertz(torch.tensor([7.5, 42.0])).round().tolist()
    [500.0, 6400.0]
    """
    return torch.where(mels < 15, 200 * mels / 3, 1000 * ((mels.clamp(min=15) - 15) * math.log(6.4) / 27).exp())


def mel_filters(mels: int, fft: int, rate: int, low: float, high: float) -> Tensor:
    """Compute the mel filter bank ``w_FK``: triangles of height 1 over ``fft / 2 + 1`` bins, evenly spaced in mel.

    >>> mel_filters(mels=4, fft=64, rate=16000, low=0.0, high=8000.0).shape
    torch.Size([4, 33])
    """
    ends = mel(torch.tensor([low, high], dtype=torch.float64))
    corner = hertz(torch.linspace(float(ends[0]), float(ends[1]), mels + 2, dtype=torch.float64))
    left_F1, top_F1, right_F1 = (corner[k : mels + k, None] for k in range(3))
    bin_K = torch.arange(fft // 2 + 1, dtype=torch.float64) * rate / fft
    w_FK = torch.minimum((bin_K - left_F1) / (top_F1 - left_F1), (right_F1 - bin_K) / (right_F1 - top_F1)).clamp(min=0)
    empty = (w_FK.sum(dim=1) == 0).nonzero()
    if len(empty):
        place = f"filter {int(empty[0])} at {float(top_F1[empty[0, 0], 0]):.0f} Hz"
        raise ValueError(f"mels {mels}: {place} lies between two bins; use fewer mels or an fft above {fft}")
    return w_FK.float()


def resample(x_NS: Tensor, before: int, after: int) -> Tensor:
    """Resample waveforms by truncating (or zero-padding) their spectrum: ``S -> ceil(S after / before)``.

    Nothing aliases above the new Nyquist frequency, and nothing changes below it. Ends are padded with silence, since a
    spectrum is periodic. Use it for whole recordings, not for pieces.

    >>> t = torch.arange(441) / 44100
    >>> x_NS = resample(torch.sin(2 * torch.pi * 1000 * t)[None], 44100, 16000)
    >>> x_NS.shape, bool((x_NS[0] - torch.sin(2 * torch.pi * 1000 * torch.arange(160) / 16000)).abs().max() < 1e-4)
    (torch.Size([1, 160]), True)
    """
    if before == after:
        return x_NS
    step = math.gcd(before, after)
    up, down = after // step, before // step
    S = x_NS.shape[1]
    blocks = -(-S // down)
    spectrum = torch.fft.rfft(x_NS, n=blocks * down)
    x = torch.fft.irfft(spectrum[:, : blocks * min(up, down) // 2 + 1], n=blocks * up) * (up / down)
    return x[:, : -(-S * up // down)]


def quantize_to_int16(x: Tensor) -> Tensor:
    """Convert floats in -1..1 to int16, rounded and clipped.

    >>> quantize_to_int16(torch.tensor([0.5, -1.0, 2.0])).tolist()
    [16384, -32768, 32767]
    """
    return (x * FULL_SCALE).round().clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16)


class LogMel(nn.Module):
    """Log-mel spectrogram in decibels, ``10 log10(max(sum_k w_fk |X_tk|^2, floor))``: waveforms ``[B, S] -> [B, F,
    T]``.

    ``X`` is the short-time spectrum under a Hann window, scaled so that the power of a full-scale sine sums to 1 over
    all bins. So a wide filter has 0 dB, and a filter narrower than the window's main lobe up to 3 dB less. Frame t
    covers the samples from ``t hop`` on; ``T = ceil(S / hop)``. A sample of length L has ``ceil(L / hop)`` frames,
    whatever the padding, and later frames are ``-inf``.

    Args:
        rate: samples per second.
        mels: F.
        window: samples of a frame (25 ms at 16 kHz).
        hop: samples between frames.
        low, high: hertz at the ends of the filter bank; ``high`` is half the rate by default.
        floor: decibels of silence.

    >>> t = torch.arange(1600) / 16000
    >>> x_BFT = LogMel(mels=40)(torch.sin(2 * torch.pi * 1000 * t)[None], torch.tensor([800]))
    >>> x_BFT.shape, x_BFT.isfinite().all(dim=1).sum().item(), round(x_BFT[0, :, 1].max().item())
    (torch.Size([1, 40, 10]), 5, -2)
    """

    def __init__(
        self,
        rate: int = 16000,
        mels: int = 64,
        window: int = 400,
        hop: int = 160,
        low: float = 0.0,
        high: float | None = None,
        floor: float = -80.0,
    ) -> None:
        super().__init__()
        high = rate / 2 if high is None else high
        if not 0 <= low < high <= rate / 2:
            raise ValueError(f"low {low:g} and high {high:g}: 0 <= low < high <= {rate / 2:g} Hz, half the rate")
        require_value(0 < hop <= window, f"hop {hop}: at least 1, at most window {window}, or frames would leave gaps")
        self.rate, self.mels, self.window, self.hop, self.floor = rate, mels, window, hop, floor
        self.low, self.high = low, high
        self.fft = 1 << (window - 1).bit_length()
        hann = torch.hann_window(window)
        self.register_buffer("hann", 2 * hann / (self.fft * hann.square().sum()).sqrt(), persistent=False)
        self.register_buffer("filters_FK", mel_filters(mels, self.fft, rate, low, high), persistent=False)

    def frames(self, samples: int) -> int:
        """Return T for S samples."""
        return -(-samples // self.hop)

    def forward(self, x_BS: Tensor, length_B: Tensor | None = None) -> Tensor:
        """Compute features. ``x_BS``: int16, or float in -1..1. ``length_B``: real samples of each; all by default."""
        B, S = x_BS.shape
        length_B = torch.full((B,), S, device=x_BS.device) if length_B is None else length_B
        T = self.frames(S)
        rows = max(1, B if x_BS.is_cuda else CELLS // (T * self.fft // 2))
        x_BFT = torch.cat([self._decibels(*part) for part in zip(x_BS.split(rows), length_B.split(rows), strict=True)])
        return self.mark_padding(x_BFT, length_B)

    def mark_padding(self, x_BFT: Tensor, length_B: Tensor) -> Tensor:
        """Set frames after each sample's length, in samples of the waveform, to ``-inf``, in place."""
        real_BT = derive(partial(self._real, x_BFT.shape[2]), length_B)
        x_BFT = x_BFT.masked_fill_(~real_BT[:, None], -torch.inf)
        # real frames are finite: their decibels have a floor
        return with_finite(x_BFT, lambda: host_copy(real_BT)[:, None]) if has_host_copy(real_BT) else x_BFT

    def _real(self, frames: int, length_B: Tensor) -> Tensor:
        return torch.arange(frames, device=length_B.device) * self.hop < length_B[:, None]

    def _decibels(self, x_BS: Tensor, length_B: Tensor) -> Tensor:
        S = x_BS.shape[1]
        x = x_BS.float() if x_BS.is_floating_point() else x_BS / FULL_SCALE
        x = x.masked_fill(torch.arange(S, device=x.device) >= length_B[:, None], 0.0)
        # torch.stft centres the window in its fft samples: with this padding frame t begins at sample t * hop
        before = (self.fft - self.window) // 2
        x = F.pad(x, (before, (self.frames(S) - 1) * self.hop + self.fft - before - S))
        hann, filters_FK = self.get_buffer("hann"), self.get_buffer("filters_FK")
        spectrum = torch.stft(x, self.fft, self.hop, self.window, hann, center=False, return_complex=True)
        power_BKT = spectrum.real.square() + spectrum.imag.square()
        return (filters_FK @ power_BKT).clamp_(min=10 ** (self.floor / 10)).log10_().mul_(10)


def noisy(x_BS: Tensor, length_B: Tensor, snr: float, draw_B: Tensor) -> Tensor:
    """Add white noise at a signal-to-noise ratio: float ``[B, S]``, on a scale of -1..1.

        x'_s = x_s + sigma n_s,   sigma^2 = mean over its real samples of x^2 / 10^(snr / 10)

    The noise is a function of the sample's key; padding and silent clips get none.

    Args:
        x_BS: int16, or float. length_B: real samples of each. snr: decibels. draw_B: keys.

    >>> t = torch.arange(16000) / 16000
    >>> x_BS = torch.sin(2 * torch.pi * 440 * t)[None]
    >>> n_BS = noisy(x_BS, torch.tensor([8000]), 10.0, torch.tensor([3])) - x_BS
    >>> round(10 * float((0.5 / n_BS[:, :8000].square().mean()).log10()), 1), bool(n_BS[:, 8000:].any())
    (10.0, False)
    """
    x = x_BS if x_BS.is_floating_point() else x_BS / FULL_SCALE
    real_BS = torch.arange(x.shape[1], device=x.device) < length_B[:, None]
    power_B = torch.where(real_BS, x, 0.0).square().sum(dim=1) / length_B.clamp(min=1)
    sigma_B = (power_B * 10 ** (-snr / 10)).sqrt()
    return x + torch.where(real_BS, sigma_B[:, None] * normal_NK(draw_B, x.shape[1], "audio/noise", x.device), 0.0)


class AudioAugment(nn.Module):
    """Audio augmentation of log-mel features: random tempo, pitch, shift, gain and SpecAugment masks, ``[B, F, T] ->
    [B, F, T]``.

    ``x'(f, t) = x(f + pitch, tempo (t - shift)) + gain``, then bands of filters and of frames are set to the sample's
    mean (SpecAugment, Park 2019, arXiv 1904.08779). Each is sampled uniformly from the sample's key. If no change is
    configured, x is returned as it is.

    Args:
        tempo: log-uniform factor between 1/tempo and tempo.
        pitch: at most this many filters up or down.
        shift: at most this many frames later (padded in front) or earlier (cut).
        gain: at most this many decibels up or down.
        masks: number of bands of each kind. filters, frames: their maximum widths.
        floor: decibels of silence, as in LogMel.
        stream: name of the random stream; two views of one sample use two streams.

    >>> x_BFT = torch.zeros(1, 4, 6); x_BFT[:, :, 4:] = -torch.inf
    >>> quiet = AudioAugment(tempo=1.0, pitch=0.0, shift=0, gain=6.0, masks=0)
    >>> y_BFT = quiet(x_BFT, torch.tensor([7]))
    >>> y_BFT[0, 0].isfinite().tolist(), bool(0 < y_BFT[0, 0, 0].abs() < 6)
    ([True, True, True, True, False, False], True)
    """

    def __init__(
        self,
        tempo: float = 1.15,
        pitch: float = 2.0,
        shift: int = 8,
        gain: float = 6.0,
        masks: int = 1,
        filters: int = 10,
        frames: int = 12,
        floor: float = -80.0,
        stream: str = "audio",
    ) -> None:
        super().__init__()
        require_value(tempo >= 1, f"tempo {tempo}: a factor of at least 1")
        self.tempo, self.pitch, self.shift, self.gain = tempo, pitch, shift, gain
        self.masks, self.filters, self.frames, self.floor, self.stream = masks, filters, frames, floor, stream

    def forward(self, x_BFT: Tensor, draw_B: Tensor) -> Tensor:
        if self.tempo == 1 and not any((self.pitch, self.shift, self.gain, self.masks)):
            return x_BFT
        device, (_, filters, T) = x_BFT.device, x_BFT.shape
        purposes = ["tempo", "pitch", "shift", "gain"]
        purposes += [f"{kind}{k}/{w}" for kind in "ft" for k in range(self.masks) for w in ("width", "start")]
        u_BK = to_device(uniform_NK(draw_B, [f"augment/{self.stream}/{w}" for w in purposes]), device)
        tempo_B, shift_B = self._tempo_and_shift(u_BK)
        pitch_B, gain_B = u_BK[:, 1] * 2 - 1, u_BK[:, 3] * 2 - 1
        real_BT, known = x_BFT[:, 0] > -torch.inf, known_finite(x_BFT)
        real_BT = real_BT if known is None else with_host_copy(real_BT, lambda: known()[:, 0])
        moved_BT = self._find_moved_frames(real_BT, u_BK)
        x = x_BFT.masked_fill(~real_BT[:, None], self.floor)
        x = F.grid_sample(
            x[:, None], self._grid(tempo_B, shift_B, pitch_B, x), padding_mode="border", align_corners=False
        )
        x = (x[:, 0] + self.gain * gain_B[:, None, None]).clamp_(min=self.floor)
        x.masked_fill_(~moved_BT[:, None], 0.0)
        mean_B11 = x.sum(dim=(1, 2), keepdim=True) / (moved_BT.sum(dim=1).clamp(min=1) * filters)[:, None, None]
        bands = u_BK[:, 4:].view(len(x), 2, self.masks, 2)
        hidden_BF, hidden_BT = _bands(bands[:, 0], filters, self.filters), _bands(bands[:, 1], T, self.frames)
        x = torch.where(hidden_BF[:, :, None] | hidden_BT[:, None], mean_B11, x)
        x = x.masked_fill_(~moved_BT[:, None], -torch.inf)
        return with_finite(x, lambda: host_copy(moved_BT)[:, None]) if has_host_copy(moved_BT) else x

    def _tempo_and_shift(self, u_BK: Tensor) -> tuple[Tensor, Tensor]:
        tempo_B, _, shift_B, _ = (u_BK[:, :4] * 2 - 1).unbind(dim=1)
        return (tempo_B * math.log(self.tempo)).exp(), (shift_B * (self.shift + 0.5)).round()

    def _find_moved_frames(self, real_BT: Tensor, u_BK: Tensor) -> Tensor:
        """Find the real frames after shift and tempo.

        It runs on the CPU if real frames are known there, so that exponentials are bit-identical.
        """
        device, known = real_BT.device, has_host_copy(real_BT)
        real_BT, u_BK = (host_copy(real_BT), host_copy(u_BK)) if known else (real_BT, u_BK)
        (tempo_B, shift_B), T = self._tempo_and_shift(u_BK), real_BT.shape[1]
        t_BT = tempo_B[:, None] * (torch.arange(T, device=real_BT.device) - shift_B[:, None])
        moved_BT = real_BT.gather(1, t_BT.round().long().clamp(0, T - 1)) & (t_BT > -0.5) & (t_BT < T - 0.5)
        return to_device(moved_BT, device)

    def _grid(self, tempo_B: Tensor, shift_B: Tensor, pitch_B: Tensor, x_BFT: Tensor) -> Tensor:
        """Make the sampling grid ``[B, F, T, 2]``: the place of each output in ``x``, in grid_sample's -1..1."""
        B, filters, T = x_BFT.shape
        zero, one = torch.zeros_like(tempo_B), torch.ones_like(tempo_B)
        row_t = torch.stack([tempo_B, zero, (tempo_B - 1) * (1 - 1 / T) - 2 * tempo_B * shift_B / T], dim=-1)
        row_f = torch.stack([zero, one, 2 * self.pitch * pitch_B / filters], dim=-1)
        return F.affine_grid(torch.stack([row_t, row_f], dim=1), [B, 1, filters, T], align_corners=False)


def _bands(u_BM2: Tensor, size: int, widest: int) -> Tensor:
    """Draw M bands per sample, of random width up to ``widest`` at random places: bool ``[B, size]``."""
    width_BM1 = (u_BM2[..., :1] * (min(widest, size) + 1)).floor()
    start_BM1 = (u_BM2[..., 1:] * (size - width_BM1 + 1)).floor()
    place = torch.arange(size, device=u_BM2.device)
    return ((place >= start_BM1) & (place < start_BM1 + width_BM1)).any(dim=1)
