"""Conversion of the weights of dense layers to those of sparse experts, and back.

Letters: E experts, F hidden units of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from descant.modules.adaptation.growth import Growth, growable
from descant.modules.core.objects import describe_object
from descant.modules.core.rng import mix
from descant.modules.io.build import build
from descant.modules.moe import ExpertLayers
from descant.modules.moe.layer import Experts

#: Parameters of experts -> those of a dense layer, and the axis of its hidden units.
PARTS: dict[str, tuple[str, int | None]] = {
    "gate_up": ("gate_up.weight", 0),  # two numbers per unit
    "down": ("down.weight", 1),
    "inward": ("mlp.0.weight", 0),
    "inward_bias": ("mlp.0.bias", 0),
    "outward": ("mlp.2.weight", 1),
    "outward_bias": ("mlp.2.bias", None),
}
EXPERTS = "moe.experts."
State = Mapping[str, Tensor]


def interleave_expert_units(x_E: Tensor, turn_EF: Tensor, axis: int | None) -> Tensor:
    """Take hidden unit f of expert e from expert ``turn[e, f]``, in a parameter ``[E, ...]`` with units on an axis.

    >>> interleave_expert_units(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 1], [1, 0]]), axis=0).tolist()
    [[1.0, 4.0], [3.0, 2.0]]
    """
    if axis is None:
        return x_E
    unit = x_E.movedim(axis + 1, -1).unflatten(-1, (-1, turn_EF.shape[1]))
    turn = turn_EF.view(len(turn_EF), *[1] * (unit.ndim - 2), -1)
    return unit.take_along_dim(turn, dim=0).flatten(-2).movedim(-1, axis + 1)


@dataclass(frozen=True)
class _Converted(Growth):
    """Growth to the same tower with other experts, or without experts."""

    def changed_attributes(self) -> dict[str, Any]:
        return {name: vars(self.fresh)[name] for name in ("experts", "routes") if name in vars(self.fresh)}


@dataclass(frozen=True)
class _ToExperts(_Converted):
    """Growth to experts with the weights of the tower's dense layers, or those of other towers; gates are fresh."""

    sources: Sequence[State] = ()
    noise: float | None = None
    deal: bool = False
    seed: int = 0

    def __call__(self, values: State) -> dict[str, Tensor]:
        like = next((x for x in values.values() if x.is_floating_point()), torch.zeros(()))
        after = {}
        for name, fresh in self.fresh.state_dict().items():
            place, _, part = name.partition(EXPERTS)
            kind, _, number = part.partition(".")
            if name in values:
                after[name] = values[name].detach()
            elif part and place + PARTS[kind][0] in values:
                x_E = self._experts(values, place, kind)
                after[name] = x_E[int(number)] if number else x_E.reshape(fresh.shape)
            elif not part and ".moe." in name:
                after[name] = fresh.to(like.device, like.dtype if fresh.is_floating_point() else None)
        return after

    def _experts(self, values: State, place: str, kind: str) -> Tensor:
        (dense, axis), module = PARTS[kind], cast(Experts, self.fresh.get_submodule(place + EXPERTS[:-1]))
        own = values[place + dense].detach()
        x_E = torch.stack([source[place + dense].to(own) for source in self.sources] or [own] * module.experts)
        draw = torch.Generator()
        if self.deal:
            u_EF = torch.rand(module.experts, module.hidden, generator=draw.manual_seed(mix(self.seed, place)))
            x_E = interleave_expert_units(x_E, u_EF.argsort(dim=0).to(x_E.device), axis)
        if self.noise is not None and x_E.ndim > 2:
            n_E = torch.randn(x_E.shape, generator=draw.manual_seed(mix(self.seed, place, kind)))
            x_E = x_E + self.noise * own.std() * n_E.to(own)
        return x_E


@dataclass(frozen=True)
class _ToDense(_Converted):
    """Growth to dense layers with the weights of one expert, or with the mean over experts."""

    experts: int = 1
    expert: int | None = None

    def __call__(self, values: State) -> dict[str, Tensor]:
        after = {}
        for name, fresh in self.fresh.state_dict().items():
            kind = next((kind for kind, (dense, _) in PARTS.items() if name.endswith(f".{dense}")), None)
            place = f"{name.removesuffix(PARTS[kind][0])}{EXPERTS}{kind}" if kind else name
            if name in values:
                after[name] = values[name].detach()
            elif place in values or f"{place}.0" in values:
                each = [values[place]] if place in values else [values[f"{place}.{e}"] for e in range(self.experts)]
                x_E = torch.stack(each).detach().view(self.experts, *fresh.shape)
                after[name] = x_E.double().mean(dim=0).to(x_E) if self.expert is None else x_E[self.expert]
        return after


def plan_conversion(tower: nn.Module, experts: ExpertLayers | None, **options: Any) -> Growth:
    """Plan the change of a tower to experts, or to none, with new gates from torch's generator."""
    base, arguments = growable(tower), cast(dict[str, Any], getattr(tower, "arguments", {}))
    if base is None or "experts" not in arguments:
        raise ValueError(f"{type(tower).__name__} has no layers that may be experts; Trunk and CausalLM have")
    fresh = base(**{**arguments, **({"weights": None} if "weights" in arguments else {}), "experts": experts})
    change: Growth
    if experts is not None:
        change, dense, sparse = _ToExperts(fresh, 0, **options), tower, fresh
    else:
        change, dense, sparse = _ToDense(fresh, 0, **{"experts": arguments["experts"].experts} | options), fresh, tower
    few, many, ends = dense.state_dict(), sparse.state_dict(), tuple(f".{name}" for name, _ in PARTS.values())
    for name in few.keys() ^ many.keys():
        if not (name.endswith(ends) if name in few else ".moe." in name):
            raise ValueError(f"{name}: not of a {base.__name__} as it is built; adapt its layers afterwards")
    for place, module in sparse.named_modules():
        if isinstance(module, Experts) and place.endswith(EXPERTS[:-1]):
            first = place.removesuffix(EXPERTS[:-1])
            width = next(few[n].shape[1] for n in (f"{first}down.weight", f"{first}mlp.2.weight") if n in few)
            if width != module.hidden:
                raise ValueError(f"experts.hidden {module.hidden}: the dense layers have {width}; leave it out")
    return change


def with_experts(tower: nn.Module, wanted: Mapping[str, Any] | None) -> None:
    """Give a tower the experts that were :func:`describe_object`, or none, with any weights."""
    now = getattr(tower, "experts", None)
    if (None if now is None else describe_object(now)) != wanted:
        experts = None if wanted is None else build(ExpertLayers, dict(wanted), Path("checkpoint"))
        for goal in dict.fromkeys((None, experts)):
            if getattr(tower, "experts", None) is not goal:
                plan_conversion(tower, goal).apply(tower)
