"""Function-preserving growth of towers: residual blocks without output, wider MLPs, inheritance with momentum.

Letters: N, M the axes of a tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from descant.modules.language.model import CausalLM
from descant.modules.towers.audio import LogMelTower
from descant.modules.towers.image import ConvTower, PatchTower
from descant.modules.towers.text import TextTower
from descant.modules.towers.vit import Trunk


def pad_into(x_NM: Tensor, into_NM: Tensor, stacked: int = 1) -> Tensor:
    """Return ``into`` with ``x`` in the first entries of each axis, in each of ``stacked`` parts of the first axis.

    >>> pad_into(torch.ones(2, 1), torch.zeros(4, 2), stacked=2).tolist()
    [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """
    if stacked > 1:
        parts = zip(x_NM.chunk(stacked), into_NM.chunk(stacked), strict=True)
        return torch.cat([pad_into(x, into) for x, into in parts])
    grown_NM = into_NM.clone()
    grown_NM[tuple(slice(size) for size in x_NM.shape)] = x_NM
    return grown_NM


def inherit(inherited: Tensor, fresh: Tensor, beta: float) -> Tensor:
    """Inherit a parameter with momentum (PIM): ``beta inherited + (1 - beta) fresh``; at ``beta`` 1 to the bit.

    Source: GrowCLIP (Deng 2023, arXiv 2308.11331); our reading, as no code was released.

    >>> inherit(torch.tensor([1.0]), torch.tensor([3.0]), beta=0.75)
    tensor([1.5000])
    """
    return torch.lerp(fresh, inherited, beta)


@dataclass(frozen=True)
class _Transformer:
    """Growth rule of pre-norm transformers: arguments of their class, and parameters that preserve the function.

    ``last``: parameters that are zero in a block without output. ``reads``: the weight that reads the hidden units,
    zero for new ones. ``stacked``: parameters that hold several matrices over the hidden units, one below the other.
    """

    sizes: tuple[str, str] = ("depth", "mlp_ratio")
    last: tuple[str, ...] = ("out.", "mlp.2.")
    reads: str = "mlp.2.weight"
    stacked: Mapping[str, int] = field(default_factory=dict)

    def deeper(self, arguments: Mapping[str, Any], blocks: int) -> dict[str, Any]:
        return {"depth": arguments["depth"] + blocks}

    def wider(self, arguments: Mapping[str, Any], ratio: float) -> dict[str, Any]:
        return {"mlp_ratio": ratio}


class _Llama(_Transformer):
    def wider(self, arguments: Mapping[str, Any], ratio: float) -> dict[str, Any]:
        return {"hidden": int(arguments["width"] * ratio)}


class _ResNet(_Transformer):
    def deeper(self, arguments: Mapping[str, Any], blocks: int) -> dict[str, Any]:
        if arguments["activation"] != "relu":
            raise ValueError(f"activation {arguments['activation']}: applied again it changes values; relu does not")
        each = arguments["blocks"]
        depths = [each] * len(arguments["widths"]) if isinstance(each, int) else each
        return {"blocks": [*depths[:-1], depths[-1] + blocks]}

    def wider(self, arguments: Mapping[str, Any], ratio: float) -> dict[str, Any]:
        if arguments["norm"] != "batch":
            raise ValueError(f"norm {arguments['norm']}: its groups change with the hidden channels; use norm batch")
        return {"expand": ratio}


_KINDS: dict[type[nn.Module], _Transformer] = {
    **dict.fromkeys((PatchTower, TextTower, Trunk), _Transformer()),
    LogMelTower: _Transformer(last=("mlp.2.",)),
    CausalLM: _Llama(("depth", "hidden"), ("out.", "down."), "down.weight", {"gate_up.weight": 2}),
    ConvTower: _ResNet(("blocks", "expand"), ("norm_2.",), "conv_2.weight"),
}


def growable(module: nn.Module) -> type[nn.Module] | None:
    """Return the class by which a module grows, its own or one that it derives from; None if it cannot grow."""
    return next((base for base in type(module).__mro__ if base in _KINDS), None)


def sizes(module: nn.Module, depth: int | None = None, mlp_ratio: float | None = None) -> dict[str, Any]:
    """Return the arguments that growth changes: as they are, or for ``depth`` more blocks and a wider MLP.

    >>> tower = PatchTower(size=8, patch=4, width=8, depth=1, heads=2)
    >>> sizes(tower), sizes(tower, depth=2)
    ({'depth': 1, 'mlp_ratio': 4.0}, {'depth': 3, 'mlp_ratio': 4.0})
    """
    base, arguments = growable(module), cast(dict[str, Any], getattr(module, "arguments", {}))
    if base is None:
        names = ", ".join(cls.__name__ for cls in _KINDS)
        raise ValueError(f"{type(module).__name__} cannot grow; {names} can")
    if arguments.get("experts") is not None and (depth, mlp_ratio) != (None, None):
        raise ValueError(f"{type(module).__name__} with sparse experts cannot grow; grow it before it has some")
    kind = _KINDS[base]
    now = {name: arguments[name] for name in kind.sizes}
    now |= {} if depth is None else kind.deeper(arguments, depth)
    return now | ({} if mlp_ratio is None else kind.wider(arguments, mlp_ratio))


@dataclass(frozen=True)
class Growth:
    """Growth of one tower: ``growth(values)`` maps values of its parameters to those of the larger tower.

        theta' = beta inherit(theta) + (1 - beta) fresh

    ``inherit`` pads with blocks without output and with hidden units that nothing reads; their other weights are fresh.
    So at ``beta`` 1 the function is unchanged. The map is affine, so that an average of weights grows as the weights
    do. Running statistics are inherited whole.

    Attributes:
        fresh: a tower of the same class with the larger arguments, at its initialisation.
        blocks: number of blocks before the growth.
        beta: share that is inherited.
    """

    fresh: nn.Module
    blocks: int
    beta: float = 1.0

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kind = _KINDS[type(self.fresh)]
        learned = {name for name, _ in self.fresh.named_parameters(remove_duplicate=False)}
        like = next((x for x in values.values() if x.is_floating_point()), torch.zeros(()))
        grown = {}
        for name, fresh in self.fresh.state_dict().items():
            fresh = fresh.to(like.device, like.dtype if fresh.is_floating_point() else None)
            part = name.split(".", 2)[-1]
            if self.adds(name):
                old = torch.zeros_like(fresh) if part.startswith(kind.last) else fresh
            elif name in values:
                into = torch.zeros_like(fresh) if part == kind.reads else fresh
                old = pad_into(values[name].detach(), into, kind.stacked.get(part, 1))
            else:
                continue
            grown[name] = inherit(old, fresh, self.beta) if name in learned else old
        return grown

    def adds(self, name: str) -> bool:
        """Whether a parameter or buffer belongs to a new block."""
        return name.startswith("layers.") and int(name.split(".")[1]) >= self.blocks

    def apply(self, tower: nn.Module) -> None:
        """Grow a tower in place: its blocks are new objects, all other parameters stay the same objects."""
        grown, values, old = cast(Any, tower), self(tower.state_dict()), cast(nn.ModuleList, tower.layers)
        like = next(p for p in tower.parameters() if p.is_floating_point())
        layers = copy.deepcopy(cast(nn.ModuleList, self.fresh.layers)).to(like.device, like.dtype)
        layers.requires_grad_(any(p.requires_grad for p in tower.parameters()))
        for i, block in enumerate(layers if len(old) else ()):
            others = dict(old[min(i, len(old) - 1)].named_modules())
            for name, module in block.named_modules():
                other = others.get(name, module)
                if hasattr(other, "_recomputed"):
                    other._recomputed(module)
                elif isinstance(other, type(module)) and other._modules.keys() == module._modules.keys():
                    module.__class__ = type(other)  # synchronized norms
        learned = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
        for name, parameter in layers.named_parameters():
            parameter.requires_grad_(learned.get(name, parameter.requires_grad))
        grown.layers = layers.train(tower.training)
        tower.load_state_dict(values)
        for name, value in self.changed_attributes().items():
            if name in grown.arguments:
                grown.arguments[name] = value
            if name in vars(tower):
                setattr(tower, name, value)

    def changed_attributes(self) -> dict[str, Any]:
        """Return the arguments and attributes of the tower that differ afterwards."""
        return sizes(self.fresh)


def growth_of(tower: nn.Module, to: Mapping[str, Any], beta: float = 1.0) -> Growth:
    """Plan the growth of a tower to other :func:`sizes`, with new values from torch's generator."""
    base = cast(type[nn.Module], growable(tower))
    arguments = {**cast(dict[str, Any], tower.arguments), **to}
    if "weights" in arguments:  # a file of the smaller tower
        arguments["weights"] = None
    if arguments.get("visual") is not None:
        raise ValueError(f"{base.__name__} with visual experts cannot grow")
    growth = Growth(base(**arguments), len(cast(nn.ModuleList, tower.layers)), beta)
    goal = {name: x.shape for name, x in growth.fresh.state_dict().items()}
    now = {name: x.shape for name, x in tower.state_dict().items()}
    if other := now.keys() ^ {name for name in goal if not growth.adds(name)}:
        raise ValueError(f"{min(other)}: not of both {base.__name__} now and of {to}; adapted layers cannot grow")
    for name, shape in now.items():
        if less := next(((a, b) for a, b in zip(shape, goal[name], strict=True) if b < a), None):
            raise ValueError(f"{name}: hidden width {less[1]} is smaller than now, {less[0]}")
    return growth
