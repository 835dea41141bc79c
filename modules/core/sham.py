"""Sham control of a method: the same code, with its signal permuted over the samples.

Letters: B samples on this rank, G samples on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch, select_rows
from descant.modules.core.host import everyone, host_copy, to_device
from descant.modules.core.ranks import first_row, gather, world
from descant.modules.core.rng import mix_N


def partners(draw_B: Tensor, valid_B: Tensor, *purpose: int | str) -> Tensor:
    """Return the source row of each row, int64 ``[B]``: a random cycle through valid rows; others map to themselves.

    A pure function of the samples' random keys: the order of the rows does not matter.
    """
    turn_B = torch.from_numpy(mix_N(draw_B, *purpose))
    rows_V = host_copy(valid_B).nonzero()[:, 0]
    circle_V = rows_V[turn_B[rows_V].argsort(stable=True)]
    source_B = torch.arange(len(valid_B))
    source_B[circle_V] = circle_V.roll(-1)
    return to_device(source_B, valid_B.device)


def sources(draw_B: Tensor, valid_B: Tensor, *purpose: int | str) -> Tensor:
    """Return :func:`partners` over all ranks: int64 ``[B]``, this rank's source rows, numbered over all ranks."""
    if world() == 1:
        return partners(draw_B, valid_B, *purpose)
    draw_G, valid_G = gather(torch.stack([draw_B, valid_B.to(draw_B.dtype)], dim=1)).unbind(dim=1)
    first = first_row(len(draw_B))
    return partners(draw_G, valid_G.to(valid_B.device), *purpose)[first : first + len(draw_B)]


def take_rows(x_B: Tensor, source_B: Tensor) -> Tensor:
    """Take rows of all ranks by their number: ``x[source_b]``, with gradients."""
    return select_rows(x_B, source_B) if world() == 1 else gather(x_B)[source_B]


class Sham(nn.Module):
    """The signal of a method, ``x_b``, or, in the mode ``permute``, that of other samples, ``x_pi(b)``.

    A part that scores, weights or selects samples passes its signal through a Sham and takes ``sham: permute`` from
    YAML. Its control then differs only in which sample gets which signal. Both count their ``calls``, so that a test
    can check that both ran the same code equally often.

    Args:
        mode: ``permute``, or None for the method itself.

    Shapes: ``x_B [B, ...]``, ``draw_B`` int64, ``valid_B`` bool ``-> [B, ...]``, of the same dtype; gradients go to the
    rows that the values came from.

    >>> x_B, draw_B = torch.tensor([1.0, 2.0, 3.0]), torch.arange(3)
    >>> method, control = Sham(), Sham("permute")
    >>> method(x_B, draw_B).tolist(), control(x_B, draw_B).tolist(), method.calls, control.calls
    ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0], 1, 1)
    """

    def __init__(self, mode: Literal["permute"] | None = None) -> None:
        super().__init__()
        self.mode, self.calls = mode, 0

    def forward(self, x_B: Tensor, draw_B: Tensor, valid_B: Tensor | None = None) -> Tensor:
        self.calls += 1
        return x_B if self.mode is None else self.permute(x_B, draw_B, valid_B)

    def handed_on(self, x_K: Tensor) -> Tensor:
        """Permute terms or modalities instead of samples: each takes the signal of the one before it.

        >>> Sham("permute").handed_on(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [3.0, 1.0, 2.0]
        """
        self.calls += 1
        return x_K if self.mode is None else x_K.roll(1, dims=0)

    def everywhere(self, x_N: Tensor, draw_N: Tensor) -> Tensor:
        """Permute a signal that is replicated on all ranks, identically on every rank: each row takes the next one's.

        >>> Sham("permute").everywhere(torch.tensor([1.0, 2.0, 3.0]), torch.arange(3)).tolist()
        [3.0, 1.0, 2.0]
        """
        self.calls += 1
        all_N = everyone(len(draw_N), draw_N.device)
        return x_N if self.mode is None else x_N[partners(draw_N, all_N, "sham").to(x_N.device)]

    def within_groups(self, x_R: Tensor, draw_R: Tensor, size: int) -> Tensor:
        """Permute rows at random within each group of ``size`` adjacent rows, identically on all ranks.

        All orders are equally likely, so a signal whose mean in a group is 0 has mean 0 for each row. A cycle, in which
        no row keeps its own signal, would have the mean ``-x_r / (size - 1)``.

        >>> Sham("permute").within_groups(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.arange(4), 2).tolist()
        [2.0, 1.0, 4.0, 3.0]
        """
        self.calls += 1
        if self.mode is None:
            return x_R
        turn_GS = torch.from_numpy(mix_N(draw_R, "sham")).view(-1, size)
        first_G1 = torch.arange(0, len(draw_R), size)[:, None]
        return x_R[(first_G1 + turn_GS.argsort(dim=1, stable=True)).flatten().to(x_R.device)]

    def permute_modalities(self, batch: Batch, modalities: Sequence[str]) -> Batch:
        """Permute these modalities of every sample together; without a mode, return the batch unchanged."""
        inputs, present = (
            {m: self(x, batch.rng_seed) if m in modalities else x for m, x in tensors.items()}
            for tensors in (batch.inputs, batch.present)
        )
        return replace(batch, inputs=inputs, present=present)

    @staticmethod
    def permute(x_B: Tensor, draw_B: Tensor, valid_B: Tensor | None = None) -> Tensor:
        """Return ``x_pi(b)``: in the order of ``mix(draw, "sham")`` over all ranks, each row takes the next value.

        The permutation is one cycle, so no row keeps its own value (unless it is alone). It is a pure function of the
        samples' random keys: neither the order of the rows nor their ranks matter. Invalid rows stay.
        """
        valid_B = everyone(len(draw_B), draw_B.device) if valid_B is None else valid_B
        return take_rows(x_B, sources(draw_B, valid_B, "sham"))
