"""Rotary positions of three axes: time, height and width (M-RoPE; the 3-D RoPE of Uni-MoE-2.0-Omni).

A token of text has the same position on all three axes, and therefore the factors of plain RoPE. Each frequency of a
head reads the position on one axis. The positions of other tokens come from their grids.

Letters: B rows, T tokens, F frequencies of a head (half its width), N frames or units of time, I tokens of a grid, R
runs of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Time, height, width.
AXES = 3


def axis_factors(position_BT3: Tensor, axis_F: Tensor, frequency_F: Tensor, table_PF: Tensor | None = None) -> Tensor:
    """Compute rotary factors of positions on several axes, complex ``[B, T, F]``.

        factor_btf = exp(i position_bt,axis(f) frequency_f)

    If a token's positions are equal, these are RoPE's factors. A score ``q . k`` depends only on differences of
    positions, axis by axis.

    Args:
        position_BT3: whole or fractional; float64 gives complex128.
        table_PF: RoPE's factors of positions 0, 1, ...; those of whole positions are read from it, bit-identically.

    >>> position_BT3 = torch.tensor([[[4.0, 4.0, 4.0], [1.0, 2.0, 3.0]]])
    >>> axis_factors(position_BT3, torch.tensor([0, 1, 2, 0]), torch.tensor([0.5, 0.5, 0.5, 0.25])).angle().tolist()
    [[[2.0, 2.0, 2.0, 1.0], [0.5, 1.0, 1.5, 0.25]]]
    """
    position_BTF = position_BT3[..., axis_F]
    if table_PF is not None:
        return table_PF[position_BTF, torch.arange(len(axis_F), device=axis_F.device)]
    angle_BTF = position_BTF * frequency_F
    return torch.polar(torch.ones_like(angle_BTF), angle_BTF)


class AxisRoPE:
    """M-RoPE: each frequency of a head turns with one of three axes, in three sections; the highest turn with time.

        axis(f) = 0 for f < t, 1 for f < t + h, 2 else,        t + h + w = F

    Source: Qwen2-VL (Wang 2024, arXiv 2409.12191), sections of 16, 24 and 24 at F = 64; likewise Uni-MoE-2.0-Omni (Li
    2025, arXiv 2511.12609, its released code).

    Args:
        split: numbers t, h and w of frequencies for time, height and width; by default, shares as in the source.

    >>> AxisRoPE().axes(8).tolist()
    [0, 0, 1, 1, 1, 2, 2, 2]
    """

    #: Share of the frequencies for height, and also for width.
    share = 3 / 8

    def __init__(self, split: Sequence[int] | None = None) -> None:
        if split is not None and (len(split) != AXES or min(split) < 1):
            raise ValueError(f"split {list(split)}: of time, height and width, each at least 1; such as [2, 3, 3]")
        self.split = None if split is None else tuple(split)

    def shares(self, frequencies: int) -> tuple[int, ...]:
        """Return the default split."""
        side = int(self.share * frequencies)
        return frequencies - 2 * side, side, side

    def axes(self, frequencies: int) -> Tensor:
        """Return the axis of each frequency, int64 ``[F]``."""
        split = self.split or self.shares(frequencies)
        if sum(split) != frequencies or min(split) < 1:
            raise ValueError(f"split {list(split)}: a head has {frequencies} frequencies, and each axis takes some")
        return self.layout(split)

    def layout(self, split: tuple[int, ...]) -> Tensor:
        return torch.arange(AXES).repeat_interleave(torch.tensor(split))


class InterleavedAxisRoPE(AxisRoPE):
    """M-RoPE with interleaved axes: each has high and low frequencies, and the remaining ones at the end are time's.

        axis(f) = 1 if f mod 3 = 1 and f < 3 h,  2 if f mod 3 = 2 and f < 3 w,  else 0

    Source: Qwen3-VL (Bai 2025, arXiv 2511.21631; as in transformers), 24, 20 and 20 at F = 64.

    Args:
        split: as in AxisRoPE.

    >>> InterleavedAxisRoPE([4, 2, 2]).axes(8).tolist()
    [0, 1, 2, 0, 1, 2, 0, 0]
    """

    share = 5 / 16

    def layout(self, split: tuple[int, ...]) -> Tensor:
        axis_F = torch.zeros(sum(split), dtype=torch.long)
        for axis in (1, 2):
            axis_F[axis : AXES * split[axis] : AXES] = axis
        if axis_F.bincount(minlength=AXES).tolist() != list(split):
            such = list(self.shares(len(axis_F)))
            raise ValueError(f"split {list(split)}: height or width has fewer turns; such as {such}")
        return axis_F


def grid_offsets(time_N: Tensor, height: int, width: int, tile: int | None = None) -> Tensor:
    """Compute offsets of an image's or video's tokens from its beginning, ``[I, 3]`` with I = N height width.

        offset_n,y,x = (time_n, y, x)

    Args:
        time_N: time of each frame, from 0 on: ``[0]`` for an image. A rate converts seconds s to positions: ``trunc(25
            s)`` in Qwen2.5-Omni, ``round(2 s)`` in the release of Uni-MoE-2.0-Omni and ``theta s`` in its paper.
        height, width: of the grid, in tokens.
        tile: tokens are ordered tile by tile of this side (Uni-MoE-2's crops) instead of row by row.

    >>> grid_offsets(torch.tensor([0, 2]), 1, 2).tolist()
    [[0, 0, 0], [0, 0, 1], [2, 0, 0], [2, 0, 1]]
    >>> grid_offsets(torch.tensor([0]), 2, 4, tile=2)[:4, 1:].tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    y_HW, x_HW = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place_HW2 = torch.stack([y_HW, x_HW], dim=2).to(time_N)
    if tile is not None:
        if tile < 1 or height % tile or width % tile:
            raise ValueError(f"tile {tile}: does not divide a grid of {height} x {width}")
        place_HW2 = place_HW2.unflatten(1, (-1, tile)).unflatten(0, (-1, tile)).transpose(1, 2)
    place_I2 = place_HW2.reshape(-1, 2)
    time_I = time_N.repeat_interleave(len(place_I2))
    return torch.cat([time_I[:, None], place_I2.repeat(len(time_N), 1)], dim=1)


def sound_offsets(time_N: Tensor, tokens: int) -> Tensor:
    """Compute offsets of audio tokens, ``[N tokens, 3]``: tokens of a time unit share its position on all axes.

    Uni-MoE-2.0-Omni has 20 tokens per unit of 3 seconds. Its release advances by 3 per unit, its paper by ``3 theta``,
    with the ``theta`` of video (2 in the release). Qwen2.5-Omni has one token per unit of 40 ms.

    >>> sound_offsets(torch.tensor([0, 3]), tokens=2).tolist()
    [[0, 0, 0], [0, 0, 0], [3, 3, 3], [3, 3, 3]]
    """
    return time_N.repeat_interleave(tokens)[:, None].expand(-1, AXES)


def axis_positions(offset_BT3: Tensor, span_BT: Tensor, segment_BT: Tensor | None = None) -> Tensor:
    """Compute positions of text and of the grids in it, ``[B, T + 1, 3]``, including that after the last token.

        text:    position_t = 1 + max over axes of the positions before it,  on all axes
        a grid:  position_t = (1 + max before its first token) + offset_t

    Source: ``get_rope_index`` of Qwen2-VL, Qwen2.5-Omni and Uni-MoE-2.0-Omni.

    Args:
        offset_BT3: offsets of grid tokens, integers or floats of at least 0; those of other tokens are ignored.
        span_BT: int64, the number of a token's grid in its row; 0 for text. Tokens of a grid are adjacent.
        segment_BT: documents of a packed row, each counted from 0; one per row by default.

    >>> span_BT = torch.tensor([[0, 1, 1, 1, 1, 0, 0]])
    >>> offset_BT3 = torch.zeros(1, 7, 3, dtype=torch.long)
    >>> offset_BT3[0, 1:5] = grid_offsets(torch.tensor([0]), 2, 2)
    >>> axis_positions(offset_BT3, span_BT)[0].T.tolist()
    [[0, 1, 1, 1, 1, 3, 4, 5], [0, 1, 1, 2, 2, 3, 4, 5], [0, 1, 2, 1, 2, 3, 4, 5]]
    """
    text_BT = span_BT == 0
    offset_BT3 = offset_BT3.masked_fill(text_BT[..., None], 0)
    first_BT = torch.zeros_like(text_BT) if segment_BT is None else _changes(segment_BT)
    run_BT = (text_BT | first_BT | _changes(span_BT)).cumsum(dim=1)  # each text token is a run by itself
    run_BT = run_BT - run_BT[:, :1]
    step_BT = offset_BT3.amax(dim=2) + 1
    step_BR = torch.zeros_like(step_BT).scatter_reduce(1, run_BT, step_BT, "amax")
    after_BT = step_BR.cumsum(dim=1).gather(1, run_BT)
    start_BT = after_BT - step_BR.gather(1, run_BT)
    origin_BT = torch.where(first_BT, start_BT, 0).cummax(dim=1).values
    position_BT3 = (start_BT - origin_BT)[..., None] + offset_BT3
    last_B1 = (after_BT - origin_BT)[:, -1:]
    return torch.cat([position_BT3, last_B1[..., None].expand(-1, -1, AXES)], dim=1)


def _changes(x_BT: Tensor) -> Tensor:
    """Whether an entry differs from the one before, bool ``[B, T]``."""
    return torch.nn.functional.pad(x_BT[:, 1:] != x_BT[:, :-1], (1, 0))
