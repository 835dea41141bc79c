"""ReSSL: match the teacher's similarities to earlier samples.

Letters: B samples, K queued rows, P width of projections.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from descant.modules.losses.views.base import ViewObjective, Views, learning, require_positive
from descant.modules.losses.views.queue import Queue


def ressl(
    s_BP: Tensor,
    t_BP: Tensor,
    rows_KP: Tensor,
    valid_K: Tensor,
    temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Compute ``-softmax(t_b . rows / tau_t) . log softmax(s_b . rows / tau_s)``, ``[B]``, over a queue's valid rows.

    Source: Zheng 2021, arXiv 2107.09282, and its release.

    >>> rows_KP, valid_K = torch.eye(2), torch.tensor([True, True])
    >>> round(ressl(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), rows_KP, valid_K).item(), 4)
    0.6931
    """
    lowest = torch.finfo(s_BP.dtype).min
    q_BK, log_p_BK = (
        (z_BP @ rows_KP.T / tau).masked_fill(~valid_K, lowest)
        for z_BP, tau in ((t_BP, teacher_temperature), (s_BP, temperature))
    )
    # where() drops invalid rows, whose 0 times -inf would be nan
    return -torch.where(valid_K, q_BK.softmax(dim=1) * log_p_BK.log_softmax(dim=1), 0.0).sum(dim=1)


class ReSSL(ViewObjective):
    """ReSSL: the student matches the teacher's sharper similarities to a queue of earlier samples (:func:`ressl`).

    The student sees the first view, and the teacher the second, which should have the weaker augmentation and is
    queued. Source: Zheng 2021, arXiv 2107.09282, and its release.

    Args:
        hidden, out: widths of the two-layer projector, which has no batch norm.
        temperature, teacher_temperature: temperatures of the student's and teacher's similarities.
        queue: number of queued rows of earlier samples.
        momentum: decay of the teacher.
    """

    unit_length = True
    projector_options = {"norm": False}

    def __init__(
        self,
        hidden: int = 4096,
        out: int = 512,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        queue: int = 131072,
        momentum: float = 0.999,
    ) -> None:
        super().__init__()
        require_positive(self, temperature=temperature, teacher_temperature=teacher_temperature)
        self.hidden, self.out, self.momentum = hidden, out, momentum
        self.temperatures, self.queue = (temperature, teacher_temperature), Queue(queue, out)

    def forward(self, views: Views) -> Tensor:
        queue = cast(Queue, self.queue)
        s_BP, t_BP = self.project(views.h[0], views.valid_B), views.target[1]
        with torch.autocast(s_BP.device.type, enabled=False):
            value_B = ressl(s_BP, t_BP, *queue.rows(), *self.temperatures)
        if learning(self):
            queue.push(t_BP, views.valid_B)
        return value_B
