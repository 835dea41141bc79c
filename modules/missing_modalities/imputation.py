"""Imputation of missing modalities: features instead of those that a sample lacks.

Letters: B samples of a batch, D width of the features, S sets of available modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from descant.modules.core.host import derive, to_device
from descant.modules.core.ranks import world
from descant.modules.missing_modalities.available_sets import Sets


class Imputer(nn.Module):
    """Base of imputers: ``imputer(h_BD, modality, has, lacks_B) -> h_BD`` replaces only the rows of ``lacks_B``.

    Without an imputer, a recipe masks absent modalities; with one, it counts every modality as present, with these
    features. ``has``: modality -> bool ``[B]``, the modalities that samples really have. ``build`` is called before.
    """

    def build(self, widths: Mapping[str, int], sets: Sequence[Sequence[str]]) -> Imputer:
        """Prepare for modality -> D of its features, and for the trained sets of available modalities; return self."""
        return self

    def forward(self, h_BD: Tensor, modality: str, has: Mapping[str, Tensor], lacks_B: Tensor) -> Tensor:
        raise NotImplementedError


class ZeroImputer(Imputer):
    """Zero features: ``h_b = 0`` if sample b lacks the modality.

    >>> here_B = torch.tensor([True, False])
    >>> ZeroImputer()(torch.ones(2, 1), "text", {"text": here_B}, ~here_B).tolist()
    [[1.0], [0.0]]
    """

    def forward(self, h_BD: Tensor, modality: str, has: Mapping[str, Tensor], lacks_B: Tensor) -> Tensor:
        return h_BD.masked_fill(lacks_B[:, None], 0.0)


class MeanImputer(Imputer):
    """Mean features: ``h_b = mean over all rows of the modality in training so far``, on all ranks; zeros at first.

    Sums are float64 and updated in train mode, in each step before the mean is used. If the features are trained as
    well, the mean is over all of their past values.

    >>> imputer, here_B = MeanImputer().build({"text": 1}, []), torch.tensor([True, True, False])
    >>> imputer(torch.tensor([[1.0], [3.0], [0.0]]), "text", {"text": here_B}, ~here_B).tolist()
    [[1.0], [3.0], [2.0]]
    """

    def build(self, widths: Mapping[str, int], sets: Sequence[Sequence[str]]) -> Imputer:
        for m, width in widths.items():
            # the last entry counts the rows
            self.register_buffer(f"sum_{m}", torch.zeros(width + 1, dtype=torch.float64))
        return self

    def forward(self, h_BD: Tensor, modality: str, has: Mapping[str, Tensor], lacks_B: Tensor) -> Tensor:
        if not h_BD.is_floating_point():
            raise ValueError(
                f"MeanImputer: {modality} has ids ({h_BD.dtype}), which have no mean; nearest: ZeroImputer"
            )
        sum_D1 = cast(Tensor, getattr(self, f"sum_{modality}"))
        if self.training:
            self._count(h_BD.detach(), has[modality], sum_D1)
        mean_D = (sum_D1[:-1] / sum_D1[-1].clamp(min=1)).to(h_BD.dtype)
        return torch.where(lacks_B[:, None], mean_D, h_BD)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the sums to a device but keep float64: in half precision they would soon stop growing."""
        sums = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)
        for name, x in sums.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = x.to(moved.device)
        return self

    @staticmethod
    @torch.no_grad()
    def _count(h_BD: Tensor, has_B: Tensor, sum_D1: Tensor) -> None:
        rows_D = h_BD.double().masked_fill(~has_B[:, None], 0.0).sum(dim=0)
        here_D1 = torch.cat([rows_D, has_B.sum().double()[None]])
        if world() > 1:
            dist.all_reduce(here_D1)
        sum_D1 += here_D1


class PromptImputer(Imputer):
    """Learned features: ``h_b = p_{S, m}`` for each set S of available modalities and each m that it lacks, from zeros.

    They follow missing-aware prompts (Lee 2023, arXiv 2303.03369), which are tokens of one transformer; using them as
    features of a modality, for any fusion, is our reading.

    >>> imputer = PromptImputer().build({"image": 2, "text": 3}, [["image"], ["text"]])
    >>> {name: list(p.shape) for name, p in imputer.named_parameters()}
    {'prompts.image.text': [3], 'prompts.text.image': [2]}
    """

    def build(self, widths: Mapping[str, int], sets: Sequence[Sequence[str]]) -> Imputer:
        self.sets = Sets(list(widths), sets)
        self.prompts = nn.ModuleDict()
        for name, members in zip(self.sets.names, self.sets.sets, strict=True):
            lacking = {m: nn.Parameter(torch.zeros(width)) for m, width in widths.items() if m not in members}
            self.prompts[name] = nn.ParameterDict(lacking)
        return self

    def forward(self, h_BD: Tensor, modality: str, has: Mapping[str, Tensor], lacks_B: Tensor) -> Tensor:
        set_B = self.sets.require_set(has, "the imputer")
        nothing_D = torch.zeros(h_BD.shape[1], device=h_BD.device)
        prompts = [cast(nn.ParameterDict, p) for p in self.prompts.values()]
        rows = [p.get(modality, nothing_D) for p in prompts]
        # the last row is for samples that have everything
        prompt_SD = torch.stack([*rows, nothing_D]).to(h_BD.dtype)
        return torch.where(lacks_B[:, None], prompt_SD[to_device(set_B, h_BD.device)], h_BD)


class Imputation(NamedTuple):
    """Imputer, and the modalities that the samples of a batch really have, ``has``: modality -> bool ``[B]``."""

    imputer: Imputer
    has: Mapping[str, Tensor]

    def rows_to_encode(self, modality: str, present_B: Tensor) -> Tensor:
        """Return bool ``[B]``: the rows for which a tower runs, among those that a recipe counts as present.

        >>> has = {"text": torch.tensor([True, False])}
        >>> Imputation(ZeroImputer(), has).rows_to_encode("text", torch.tensor([True, True])).tolist()
        [True, False]
        """
        return derive(torch.logical_and, present_B, self.has[modality])

    def impute(self, h_BD: Tensor, modality: str, present_B: Tensor) -> Tensor:
        """Return features of all rows that a recipe counts as present, imputed if the sample lacks the modality."""
        return cast(Tensor, self.imputer(h_BD, modality, self.has, present_B & ~self.has[modality]))
