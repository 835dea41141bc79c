"""NNCLR: the positive is the nearest neighbour in a queue. Letters: B samples, K queue rows, P projection width."""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor

from descant.modules.losses.contrastive import ntxent, one_way
from descant.modules.losses.views.base import (
    MLPHead,
    ViewObjective,
    Views,
    learning,
    present_rows,
    require_positive,
    unit,
)
from descant.modules.losses.views.queue import Queue


def nearest(z_BP: Tensor, rows_KP: Tensor, valid_K: Tensor) -> Tensor:
    """Return ``[B, P]``, for each row the valid queue row with the largest cosine; both have unit length.

    >>> rows_KP, valid_K = torch.eye(2), torch.tensor([True, True])
    >>> nearest(torch.tensor([[0.6, 0.8]]), rows_KP, valid_K).tolist()
    [[0.0, 1.0]]
    """
    cosine_BK = (z_BP.detach() @ rows_KP.T).masked_fill(~valid_K, torch.finfo(z_BP.dtype).min)
    return rows_KP[cosine_BK.argmax(dim=1)]


class NNCLR(ViewObjective):
    """NNCLR: InfoNCE between a view's nearest neighbour among earlier samples and the prediction from the other view.

        value_b = (one_way(n_1, p_2) + one_way(n_2, p_1)) / 2,      n = nearest(z, queue),  p = predictor(z)

    Source: Dwibedi 2021, arXiv 2104.14548, no code released; as in its pseudo-code, the first view is queued. With
    ``same_side`` the loss is lightly's form, :func:`ntxent` of n and p, which also has negatives from the same side.

    Args:
        hidden, out: widths of the three-layer projector. predictor_hidden: hidden width of the two-layer predictor.
        temperature: temperature of the cosines.
        queue: number of queued rows of earlier samples.
        same_side: whether to use lightly's form.
    """

    def __init__(
        self,
        hidden: int = 2048,
        out: int = 256,
        predictor_hidden: int = 4096,
        temperature: float = 0.1,
        queue: int = 98304,
        same_side: bool = False,
    ) -> None:
        super().__init__()
        require_positive(self, temperature=temperature)
        self.hidden, self.out, self.predictor_hidden, self.temperature = hidden, out, predictor_hidden, temperature
        self.loss = ntxent if same_side else one_way
        self.queue = Queue(queue, out)

    def build(self, width: int) -> Self:
        self.projector = MLPHead(width, self.hidden, self.out, layers=3, last_norm=True)
        self.predictor = MLPHead(self.out, self.predictor_hidden, self.out)
        return self

    def forward(self, views: Views) -> Tensor:
        queue = cast(Queue, self.queue)
        z, rows = [self.project(h_BD, views.valid_B) for h_BD in views.h], (views.key_B, views.valid_B)
        p_1_BP, p_2_BP = (unit(present_rows(self.predictor, z_BP, views.valid_B)) for z_BP in z)
        held = queue.rows()
        with torch.autocast(p_1_BP.device.type, enabled=False):
            n_1_BP, n_2_BP = (nearest(unit(z_BP), *held) for z_BP in z)
        if learning(self):
            queue.push(unit(z[0]), views.valid_B)
        scale = 1 / self.temperature
        return (self.loss(n_1_BP, p_2_BP, *rows, scale) + self.loss(n_2_BP, p_1_BP, *rows, scale)) / 2
