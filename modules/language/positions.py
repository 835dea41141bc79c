"""Variable position steps of image tokens (V2PE). Letters: B samples, S tokens of a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from descant.modules.core.host import host_copy, to_device
from descant.modules.core.rng import uniform_N
from descant.modules.language.interleave import Interleaved


class VisualSteps:
    """V2PE: an image token advances the position by ``step`` at most 1, a text token by 1.

        position of token t = sum over tokens s before it of  (step if s is of an image, else 1)

    Many images, video frames or slices of a volume then stay within the positions that the model was trained on. With 1
    it is the plain model. Source: InternVL-2.5's V2PE (Ge 2024, arXiv 2412.09616), as inherited by Fleming-VL (arXiv
    2511.00916); our reading.

    Args:
        step: of an image token, above 0 and at most 1.
        drawn: in training, a step for each sample is sampled from these instead, so that all can be used later.

    Raises:
        ValueError: for a step outside of that.

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
        """Positions, float32 ``[B, S + 1]``, including that after the last token."""
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
