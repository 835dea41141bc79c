"""DINO: self-distillation from a centred and sharpened teacher, with local crops.

Letters: B samples, G samples on all ranks, D width, K prototypes, S and T views of student and teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.ranks import total_of_ranks
from descant.modules.losses.views.base import ViewObjective, Views, learning, present_rows, require_positive, unit


def dino(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    centre_K: Tensor,
    temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Compute ``[B]``, the cross-entropy of student views against the teacher's other views, averaged over pairs.

        value_b = mean_{t != s} -softmax((y_t - centre) / tau_t) . log softmax(x_s / tau_s)

    Source: Caron 2021, arXiv 2104.14294.

    Args:
        student, teacher: logits ``[B, K]`` per view; the teacher's views are the first of the student's.

    >>> x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, 0.0]])
    >>> round(dino([x, x], [y, y], torch.zeros(2)).item(), 4)  # log 2: the student is undecided
    0.6931
    """
    if len(teacher) < 1 or len(student) < 2:
        raise ValueError(f"DINO: {len(student)} view(s): a student needs a view that its teacher's is not; at least 2")
    log_p = [(x_BK / temperature).log_softmax(dim=1) for x_BK in student]
    total_B, pairs = torch.zeros_like(student[0][:, 0]), 0
    for t, y_BK in enumerate(teacher):
        q_BK = ((y_BK - centre_K) / teacher_temperature).softmax(dim=1)
        others = [log_p_BK for s, log_p_BK in enumerate(log_p) if s != t]
        total_B = total_B - (q_BK * torch.stack(others).sum(dim=0)).sum(dim=1)
        pairs += len(others)
    return total_B / pairs


class DINOHead(nn.Module):
    """DINO head ``x = V l2(MLP(h))``: three layers with GELU; bottleneck output and prototypes have unit length."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for part in self.mlp:
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, h_BD: Tensor) -> Tensor:
        return F.linear(unit(self.mlp(h_BD)), unit(self.prototypes.weight))


class DINO(ViewObjective):
    """DINO: the student classifies a view as its centred teacher classifies another view (:func:`dino`).

    The centre is a moving average of the teacher's logits over the samples of all ranks. It is updated after the loss
    of each step and saved with the run. Source: Caron 2021, arXiv 2104.14294. The release warms up the teacher's
    temperature, raises its decay to 1 and freezes the prototypes in the first epoch; this class does none of these.

    Args:
        hidden, bottleneck: widths of the three-layer head. prototypes: K.
        temperature, teacher_temperature: temperatures of the student's and teacher's softmax.
        centre_momentum: decay of the moving average.
        momentum: decay of the teacher.
    """

    multi_crop = True
    centre_K: Tensor

    def __init__(
        self,
        hidden: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 65536,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        centre_momentum: float = 0.9,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        require_positive(self, temperature=temperature, teacher_temperature=teacher_temperature)
        self.hidden, self.bottleneck, self.prototypes, self.momentum = hidden, bottleneck, prototypes, momentum
        self.temperatures, self.centre_momentum = (temperature, teacher_temperature), centre_momentum
        self.register_buffer("centre_K", torch.zeros(prototypes))

    def build(self, width: int) -> Self:
        self.head = DINOHead(width, self.hidden, self.bottleneck, self.prototypes)
        return self

    def project(self, h_BD: Tensor, valid_B: Tensor) -> Tensor:
        return present_rows(self.head, h_BD, valid_B)

    def forward(self, views: Views) -> Tensor:
        student = [self.project(h_BD, views.valid_B) for h_BD in views.h]
        with torch.autocast(student[0].device.type, enabled=False):
            value_B = dino(student, views.target, promote(self.centre_K), *self.temperatures)
        if learning(self):
            self._move_centre(views)
        return value_B

    @torch.no_grad()
    def _move_centre(self, views: Views) -> None:
        """Update ``centre = m centre + (1 - m) mean over samples and views of the teacher's logits``."""
        mean_BK, centre_K = torch.stack([*views.target]).mean(dim=0), promote(self.centre_K)
        valid_B = views.valid_B.to(mean_BK.dtype)
        # one exchange sums both logits and counts
        total = total_of_ranks(torch.cat([(mean_BK * valid_B[:, None]).sum(dim=0), valid_B.sum()[None]]))
        moved_K = centre_K.lerp(total[:-1] / total[-1].clamp(min=1), 1 - self.centre_momentum)
        self.centre_K.copy_(torch.where(total[-1] > 0, moved_K, centre_K))
