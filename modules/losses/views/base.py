"""Shared parts of objectives over two or more views of one modality. SimCLR, BYOL, DINO and others have a file each.

    h_v = pool(tower(view v))     z_v = projector(h_v)     p_v = predictor(z_v)     t_v = z_v of the teacher's weights

Letters: B samples on this rank, R of them present, D width of features, P width of projections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.host import host_copy
from descant.modules.core.ranks import world
from descant.modules.core.rows import RunningRows
from descant.modules.losses.views.queue import Queue


@dataclass
class Views:
    """Views of B samples of one modality.

    Attributes:
        h: features ``[B, D]`` per view; the first two views are whole images, further ones are local crops.
        key_B: int64; samples with the same key have equal content and are not each other's negatives.
        valid_B: bool; marks present samples.
        target: the teacher's projections ``[B, P]`` of the first two views; empty without a teacher.
    """

    h: Sequence[Tensor]
    key_B: Tensor
    valid_B: Tensor
    target: Sequence[Tensor] = ()


class ViewObjective(nn.Module):
    """Base of objectives over views: ``objective(views)`` is one value per sample, ``[B]``, or one per batch, ``[1]``.

    ``build(width)`` makes the heads, once the width of the features is known. A loss per batch (``whole``) is computed
    from the rows of all ranks and cannot be split into values per sample.
    """

    #: Whether the loss is one number per batch, not one per sample.
    whole: ClassVar[bool] = False
    #: Whether it takes more than two views.
    multi_crop: ClassVar[bool] = False
    #: Whether projections have length 1.
    unit_length: ClassVar[bool] = False
    #: Arguments of the projector, an :class:`MLPHead`, besides its widths.
    projector_options: ClassVar[Mapping[str, Any]] = {}
    #: Decay of the teacher, a moving average of the student's weights; None without a teacher.
    momentum: float | None = None
    projector: nn.Module
    hidden: int
    out: int

    def __init__(self) -> None:
        super().__init__()
        #: Queue of earlier projections, if the method has one.
        self.queue: Queue | None = None

    def build(self, width: int) -> Self:
        self.projector = MLPHead(width, self.hidden, self.out, **self.projector_options)
        return self

    def require_samples(self, samples: float, modality: str) -> None:
        """Raise ValueError if the queue is longer than the training data."""
        if self.queue is not None and self.queue.length > samples:
            raise ValueError(
                f"objective: a queue of {self.queue.length} rows is longer than the data, {samples:.0f} samples of "
                f"{modality}: samples would meet their own earlier views"
            )

    def project(self, h_BD: Tensor, valid_B: Tensor) -> Tensor:
        """Project features ``[B, D] -> [B, P]``, for a student as for its teacher."""
        z_BP = present_rows(self.projector, h_BD, valid_B)
        return unit(z_BP) if self.unit_length else z_BP

    def forward(self, views: Views) -> Tensor:
        raise NotImplementedError


class MLPHead(nn.Module):
    """Projector or predictor: ``z = W_n relu(norm(... relu(norm(W_1 h))))``, with batch norms as in the releases.

    Args:
        width_in: D. hidden: width of the hidden layers. out: P.
        layers: number of linear maps.
        norm: whether hidden layers have batch norms; without them all layers have a bias, as in ReSSL.
        last_norm: whether a batch norm without scale and bias follows at the end, as in MoCo v3.

    >>> sum(p.numel() for p in MLPHead(8, 16, 4).parameters())
    224
    """

    def __init__(
        self, width_in: int, hidden: int, out: int, layers: int = 2, norm: bool = True, last_norm: bool = False
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in pairwise([width_in, *[hidden] * (layers - 1)]):
            parts += [nn.Linear(a, b, bias=not norm), nn.BatchNorm1d(b) if norm else nn.Identity(), nn.ReLU()]
        parts.append(nn.Linear(hidden if layers > 1 else width_in, out, bias=not norm))
        self.layers = nn.Sequential(*parts, *([nn.BatchNorm1d(out, affine=False)] if last_norm else []))

    def forward(self, h_BD: Tensor) -> Tensor:
        return self.layers(h_BD)


def present_rows(head: nn.Module, h_BD: Tensor, valid_B: Tensor) -> Tensor:
    """Compute ``head(h)`` of the valid rows only, so that batch norms ignore absent rows; zeros elsewhere.

    >>> norm, h_BD = nn.BatchNorm1d(1), torch.tensor([[1.0], [3.0], [99.0]])
    >>> present_rows(norm, h_BD, torch.tensor([True, True, False])).flatten().round().tolist()
    [-1.0, 1.0, 0.0]
    """
    if host_copy(valid_B).all():
        return head(h_BD)
    rows = RunningRows(valid_B, h_BD.device, least=1 if world() > 1 else 2)  # on one process, batch norm needs two rows
    with rows.running(head):
        return rows.put(head(rows.take(h_BD)))


def require_positive(objective: ViewObjective, **values: float) -> None:
    """Raise ValueError for the first value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{type(objective).__name__}: {name} {value:g}: must be above 0")


def unit(z_BP: Tensor) -> Tensor:
    """Normalize rows to length 1, in float32 or finer."""
    return F.normalize(promote(z_BP), dim=-1)


def learning(objective: nn.Module) -> bool:
    """Whether this forward pass belongs to training, so that queues and centres are updated."""
    return objective.training and torch.is_grad_enabled()
