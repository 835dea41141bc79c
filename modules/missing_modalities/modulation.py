"""Modulation bank: a frozen network with few parameters for each set of available modalities (arXiv 2310.03986).

Letters: B samples of a batch, R rows that run in a layer, M modalities, S sets, C channels of a layer's output and I of
its input, r rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from descant.modules.core.errors import no_such
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.rows import RowTracker, share_rows
from descant.modules.core.sham import Sham
from descant.modules.missing_modalities.available_sets import NOTHING, UNKNOWN, WHOLE, Sets
from descant.modules.missing_modalities.modulation_forms import (
    EMBEDDINGS,
    Modulated,
    Modulation,
    ScaleShift,
    layer_width,
)

#: Parts of a recipe that belong to one modality and run only for samples that have it.
BY_MODALITY = ("towers.", "pools.", "adapters.")


class _Route:
    """Sets of the samples that run now."""

    def __init__(self, set_B: Tensor, device: torch.device, tracker: RowTracker) -> None:
        self.set_B, self.device, self.tracker = set_B, device, tracker
        self._seen: dict[int, tuple[Tensor | None, Tensor, list[int]]] = {}

    def here(self) -> tuple[Tensor, list[int]]:
        """Return each row's place in the list of sets that occur, on the device, and that list."""
        row_R = self.tracker.current
        if id(row_R) not in self._seen:
            set_R = self.set_B if row_R is None else self.set_B[host_copy(row_R)]
            set_S, number_R = set_R.unique(return_inverse=True)
            number_R = to_device(number_R, self.device)
            self._seen[id(row_R)] = row_R, number_R, set_S.tolist()  # keeps the rows, because Python reuses ids
        return self._seen[id(row_R)][1:]


class ModulationBank(nn.Module):
    """Parameters for each set of available modalities, after each layer of a frozen network (Reza 2023).

        h' = f_S(h), with S the modalities of this row's sample; f is the identity if it has all of them

    Each row uses the set of its sample (:mod:`descant.modules.core.rows`), so samples of several sets may share a
    batch. If all rows have one set, its parameters are used directly. The bank hooks layers: no name in the network
    changes, and outputs for samples with all modalities are bit-identical. Layers of a modality's tower, pool and
    adapter have no parameters for sets without that modality, because they do not run then.

    The paper puts adaptable layers after each layer of encoders and fusion, one set of parameters per combination. The
    types of layers, the subsets, and rows of several sets in one batch are our reading. Source: arXiv 2310.03986.

    Args:
        form: ScaleShift or LowRank; by default ScaleShift.
        layers: ends of names of layers such as [qkv, mlp.2], names of parts such as [towers.image], or types such as
            [LayerNorm]; by default every linear layer, convolution and norm.
        sets: sets that have parameters; by default those that the recipe trains.
        unknown: for samples with any other set: ``refuse`` them, or use the network as it is (``frozen``).
        sham: ``permute`` gives every sample, in evaluation, the parameters of the next set of the bank.

    >>> net = nn.ModuleDict({"head": nn.Linear(3, 2)})
    >>> bank = ModulationBank(ScaleShift()).attach(net, ["image", "text"])
    >>> bank.count()
    {'image': 4, 'text': 4}
    >>> x_BI, has = torch.ones(2, 3), {"image": torch.tensor([True, True]), "text": torch.tensor([True, False])}
    >>> _ = nn.init.constant_(bank.of("image", "head").beta_C, 5.0)
    >>> with bank.route(has):
    ...     (net["head"](x_BI) - net["head"].forward(x_BI)).round().tolist()
    [[0.0, 0.0], [5.0, 5.0]]
    """

    def __init__(
        self,
        form: Modulation | None = None,
        layers: list[str] | None = None,
        sets: list[list[str]] | None = None,
        unknown: Literal["refuse", "frozen"] = "refuse",
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        self.form, self.layers, self.chosen = form or ScaleShift(), layers, sets
        self.unknown, self.sham = unknown, Sham(sham)
        self.parts = nn.ModuleDict()
        self._hooked: list[str] = []
        self.sets = Sets(())
        self._route: _Route | None = None
        self._warned = False

    def attach(
        self, network: nn.Module, modalities: Sequence[str], drawn: Sequence[Sequence[str]] | None = None
    ) -> ModulationBank:
        """Create the parameters and hook the layers of ``network``, once, before weights are loaded; return self.

        Args:
            network: its ``towers.MODALITY``, ``pools.MODALITY`` and ``adapters.MODALITY`` belong to one modality each.
            modalities: all modalities, in their order.
            drawn: the sets that samples are left with in training; by default all subsets.
        """
        self._tracker = share_rows(network)
        self.sets = Sets(modalities, drawn if self.chosen is None else self.chosen)
        trained = self.sets if drawn is None else Sets(modalities, drawn)
        if not len(self.sets):
            raise ValueError("sets: none but everything, which needs no parameters")
        without = [name for name in trained.names if name not in self.sets.names]
        idle = [name for name in self.sets.names if name not in trained.names]
        if without and self.unknown == "refuse":
            raise ValueError(f"bank: samples are left with {without[0]}, which is not in its sets")
        if idle:
            raise ValueError(f"bank: nothing would be learned for {idle[0]}, which no sample is left with")
        for set_name, members in zip(self.sets.names, self.sets.sets, strict=True):
            parts = nn.ModuleDict()
            for name, layer in self._layers(network):
                owner = name.split(".")[1] if name.startswith(BY_MODALITY) else None
                part = self.form.of(layer) if owner not in self.sets.modalities or owner in members else None
                if part is not None:
                    parts[_key(name)] = part
            self.parts[set_name] = parts
        if not any(True for _ in self.parameters()):
            raise ValueError(f"{type(self.form).__name__} fits none of the layers {self.layers or 'of this network'}")
        for name, layer in self._layers(network):
            if any(_key(name) in cast(nn.ModuleDict, parts) for parts in self.parts.values()):
                layer.register_forward_hook(partial(self._modulate, name), with_kwargs=True)
                self._hooked.append(name)
        return self

    def require_hooked(self, network: nn.Module) -> None:
        """Raise ValueError for a layer that was replaced since :meth:`attach`, as by quantization or SyncBatchNorm."""
        for name in self._hooked:
            try:
                layer = network.get_submodule(name)
            except AttributeError:
                layer = nn.Identity()
            layer = cast(nn.Module, getattr(layer, "base_layer", layer))  # adapters call their base layer
            if not any(isinstance(h, partial) and h.func == self._modulate for h in layer._forward_hooks.values()):
                raise ValueError(f"bank: layer {name} was replaced after it was given parameters, which are never used")

    def _layers(self, network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield names and layers, in the network's order, without those inside adapters."""
        able = [(n, m) for n, m in network.named_modules() if layer_width(m) is not None and "lora_" not in n]
        # torch's multi-head attention reads the weights of its last layer and never runs it
        able = [(n, m) for n, m in able if not isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)]
        if self.layers is None:
            yield from ((name, layer) for name, layer in able if not isinstance(layer, EMBEDDINGS))
            return
        for end in self.layers:
            if not any(_matches(end, name, layer) for name, layer in able):
                known = sorted({name.split(".")[-1] for name, _ in able} | {type(layer).__name__ for _, layer in able})
                raise ValueError(f"layers: {end!r}: {no_such(end, known)}")
        yield from ((n, m) for n, m in able if any(_matches(end, n, m) for end in self.layers))

    def of(self, set_name: str, layer: str) -> Modulated:
        """Return the parameters of one set, such as ``image+text``, for one layer."""
        return cast(Modulated, cast(nn.ModuleDict, self.parts[set_name])[_key(layer)])

    def count(self) -> dict[str, int]:
        """Return set -> its number of parameters."""
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.parts.items()}

    def share(self, network: nn.Module) -> float:
        """Return the parameter count of all sets over that of the network; both include norms, heads and all else."""
        bank = {id(p) for p in self.parameters()}
        return sum(self.count().values()) / sum(p.numel() for p in network.parameters() if id(p) not in bank)

    @contextmanager
    def route(self, present: Mapping[str, Tensor]) -> Iterator[None]:
        """Set, within the block, the modalities (bool ``[B]`` each) of the samples that run in the network."""
        set_B = self.sets.of(present)
        if bool((set_B == UNKNOWN).any()):
            refusal = self.sets.refusal(present, set_B, "the bank")
            if self.unknown == "refuse":
                raise ValueError(f"{refusal}; unknown: frozen takes the network as it is")
            if not self._warned:
                warnings.warn(f"{refusal}; they see the network as it is", stacklevel=3)
                self._warned = True
        # padding takes the set of a sample, so that it does not add a second set
        real_B = set_B != NOTHING
        set_B = torch.where(real_B, set_B, set_B[real_B][0] if bool(real_B.any()) else WHOLE).clamp(min=WHOLE)
        self.sham.calls += 1
        if self.sham.mode == "permute" and not self.training:
            set_B = torch.where(set_B == WHOLE, set_B, (set_B + 1) % len(self.sets))
        before = self._route
        self._route = _Route(set_B, next(iter(present.values())).device, self._tracker)
        try:
            yield
        finally:
            self._route = before

    def _modulate(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], h: Tensor
    ) -> Tensor | None:
        if self._route is None:
            return None
        number_R, sets_here = self._route.here()
        key = _key(name)
        tables = [cast(nn.ModuleDict, self.parts[self.sets.names[k]]) if k >= 0 else nn.ModuleDict() for k in sets_here]
        parts = [cast(Modulated, table[key]) if key in table else None for table in tables]
        if all(part is None for part in parts):
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if len(parts) == 1:
            return cast(Modulated, parts[0])(x, h)
        if len(h) != len(number_R):
            raise ValueError(f"{name} has {len(h)} rows for {len(number_R)} samples; name `layers` without it")
        return type(next(part for part in parts if part is not None)).several(parts, number_R, x, h)


def _key(name: str) -> str:
    return name.replace(".", "/")  # module names may not contain dots


def _matches(end: str, name: str, layer: nn.Module) -> bool:
    return f".{name}.".startswith(f".{end}.") or name.endswith(f".{end}") or type(layer).__name__ == end


def touch_parameters(value: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return ``value``, whose backward adds zeros to the gradients of all of these parameters.

    So a set that occurs only on one rank has a gradient on all ranks, which DDP and optimizers need.

    >>> x, idle = torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(3))
    >>> touch_parameters(x.sum(), [idle]).backward()
    >>> idle.grad.tolist()
    [0.0, 0.0, 0.0]
    """
    trained = [p for p in parameters if p.requires_grad]
    return cast(Tensor, _Reached.apply(value, *trained)) if trained else value


class _Reached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters  # not saved for backward: they may be written in between
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *(torch.zeros_like(p) for p in ctx.parameters)
