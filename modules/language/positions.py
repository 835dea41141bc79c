"""Positions of image tokens in their rows: variable steps (V2PE), or three axes (M-RoPE).

Letters: B samples, S tokens of a sample, I tokens of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from descant.modules.core.host import host_copy, to_device
from descant.modules.core.rng import uniform_N
from descant.modules.language.axis_rope import axis_positions, grid_offsets
from descant.modules.language.interleave import Interleaved


class VisualSteps:
    """V2PE: an image token advances the position by ``step`` (at most 1), a text token by 1.

        position of token t = sum over tokens s before it of  (step if s is of an image, else 1)

    Many images, video frames or slices of a volume then stay within the positions that the model was trained on. A step
    of 1 gives the plain model. Source: InternVL-2.5's V2PE (Ge 2024, arXiv 2412.09616), as inherited by Fleming-VL
    (arXiv 2511.00916); our reading.

    Args:
        step: step of an image token, above 0 and at most 1.
        drawn: in training, each sample's step is drawn from these instead, so that any of them can be used later.

    >>> ids_BS = torch.tensor([[1, 9, 9, 9, 9, 5, 6]])
    >>> VisualSteps(0.25).positions(ids_BS, 9, torch.tensor([0.25])).tolist()
    [[0.0, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0]]
    """

    def __init__(self, step: float = 1.0, drawn: Sequence[float] = ()) -> None:
        for value in (step, *drawn):
            if not 0 < value <= 1:
                raise ValueError(f"VisualSteps: {value:g}: above 0, at most 1; such as 0.25")
        self.step, self.drawn = step, tuple(drawn)

    def positions(self, ids_BS: Tensor, image_token: int, step_B: Tensor) -> Tensor:
        """Compute positions, float32 ``[B, S + 1]``, including that after the last token."""
        host_BS = host_copy(ids_BS)
        step_BS = torch.where(host_BS == image_token, host_copy(step_B)[:, None], 1.0)
        return to_device(torch.nn.functional.pad(step_BS.double().cumsum(dim=1), (1, 0)).float(), ids_BS.device)

    def __call__(self, row: Interleaved, image_token: int, draw_B: Tensor, training: bool) -> Interleaved:
        if training and self.drawn:
            u_B = uniform_N(draw_B, "visual/step")
            step_B = torch.tensor(self.drawn)[(u_B * len(self.drawn)).long()]
        elif self.step == 1:
            return row
        else:
            step_B = torch.full((len(draw_B),), self.step)
        return row._replace(position_BS=self.positions(row.ids_BS, image_token, step_B))


class VisualAxes(VisualSteps):
    """M-RoPE: image tokens have the image's time and their row and column; text continues at their greatest + 1.

        position = 1 + the greatest before the image + (t, y, x)

    The language model's ``positions`` must then be on three axes. Source: as in axis_positions.

    Args:
        columns: columns of an image's tokens; a square by default.
        tile: an image's tokens are ordered tile by tile of this side instead of row by row.
        frame: adjacent images are frames of a video, this many positions apart: seconds times a rate. By default each
            is a separate image with one time.

    >>> ids_BS = torch.tensor([[1, 9, 9, 9, 9, 9, 9, 9, 9, 5]])
    >>> VisualAxes(frame=0.5).grids(ids_BS, 9, tokens=4)[0].T.tolist()[0]
    [0.0, 1.0, 1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5, 3.0, 4.0]
    """

    def __init__(self, columns: int | None = None, tile: int | None = None, frame: float | None = None) -> None:
        super().__init__()
        if columns is not None and columns < 1:
            raise ValueError(f"columns {columns}: at least 1; an image's tokens are a square where not given")
        if frame is not None and not frame > 0:
            raise ValueError(f"frame {frame:g}: above 0, such as 1; images by themselves where not given")
        self.columns, self.tile, self.frame = columns, tile, frame

    def grids(self, ids_BS: Tensor, image_token: int, tokens: int) -> Tensor:
        """Compute positions ``[B, S + 1, 3]`` of rows whose images have ``tokens`` each, and that after the last token.

        They are float32 with ``frame``, otherwise int64.
        """
        columns = self.columns or math.isqrt(tokens)
        if tokens % columns or (self.columns is None and columns**2 != tokens):
            raise ValueError(f"columns {columns}: images of {tokens} tokens are no grid of such rows; set columns")
        host_BS = host_copy(ids_BS)
        image_BS = host_BS == image_token
        before_BS = image_BS.cumsum(dim=1) - image_BS.int()  # number of earlier image tokens in the row
        if self.frame is None:
            at_BS, span_BS = before_BS % tokens, before_BS // tokens + 1
        else:
            first_BS = image_BS & ~torch.nn.functional.pad(image_BS[:, :-1], (1, 0))
            at_BS = before_BS - torch.where(first_BS, before_BS, 0).cummax(dim=1).values
            span_BS = first_BS.cumsum(dim=1)
        still = torch.zeros(1, dtype=torch.float64)
        offset_BS3 = grid_offsets(still, tokens // columns, columns, self.tile)[at_BS % tokens]
        offset_BS3[..., 0] = at_BS // tokens * (self.frame or 0)
        position_BS3 = axis_positions(offset_BS3, span_BS * image_BS)
        return to_device(position_BS3.long() if self.frame is None else position_BS3.float(), ids_BS.device)

    def __call__(self, row: Interleaved, image_token: int, draw_B: Tensor, training: bool) -> Interleaved:
        if row.kept_PI is not None:
            raise ValueError("VisualAxes: images of different numbers of tokens have no common grid; use VisualSteps")
        tokens = row.at_PI.shape[1]
        return row if tokens == 0 else row._replace(position_BS=self.grids(row.ids_BS, image_token, tokens))
