"""A frozen network that knows which modalities it has: tiny parameters for each set of available ones.

Letters: B samples of a batch, R rows that run in a layer, M modalities, S sets, C channels of a layer's output and I of
its input, r rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from descant.modules.core.errors import no_such as nearest
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.ranks import gather, world
from descant.modules.core.rng import uniform_N
from descant.modules.core.rows import rows
from descant.modules.core.sham import Sham

#: In place of the number of a set: of a sample that has everything, that has nothing, and whose set has no number.
WHOLE, NOTHING, UNKNOWN = -1, -2, -3

#: Parts of a recipe that hold one part a modality, which runs for samples that have it, and for no others.
OWN = ("towers.", "pools.", "adapters.")


class Sets:
    """Sets of modalities, numbered, and which of them each sample has.

    Args:
        modalities: all that a recipe has a tower for, at most 16.
        sets: some of their subsets, none empty; a set of all modalities has no number. All subsets where not given.

    Raises:
        ValueError: for an unknown modality, an empty set, or a set that is said twice.

    >>> sets = Sets(["image", "text"])
    >>> sets.names
    ['image', 'text']
    >>> has = {"image": torch.tensor([True, False, True]), "text": torch.tensor([False, True, True])}
    >>> sets.of(has).tolist()
    [0, 1, -1]
    """

    def __init__(self, modalities: Sequence[str], sets: Sequence[Sequence[str]] | None = None) -> None:
        self.modalities = tuple(modalities)
        if len(self.modalities) > 16:
            raise ValueError(f"{len(self.modalities)} modalities have too many sets to be numbered; at most 16")
        subsets = [s for size in range(1, len(self.modalities)) for s in combinations(self.modalities, size)]
        chosen = subsets if sets is None else [self._checked(s) for s in sets]
        self.sets = [s for s in chosen if s != self.modalities]
        #: One a set, such as ``image+text``: in the order of the modalities.
        self.names = ["+".join(s) for s in self.sets]
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"sets: {twice} stands there twice")
        number = torch.full((2 ** len(self.modalities),), UNKNOWN)
        number[0], number[-1] = NOTHING, WHOLE
        for k, s in enumerate(self.sets):
            number[sum(2**i for i, m in enumerate(self.modalities) if m in s)] = k
        self._number = number

    def _checked(self, names: Sequence[str]) -> tuple[str, ...]:
        unknown = [m for m in names if m not in self.modalities]
        if unknown:
            raise ValueError(f"sets: {unknown[0]!r}: {nearest(unknown[0], self.modalities)}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sets: {list(names)} is no set of modalities, such as [{self.modalities[0]}]")
        return tuple(m for m in self.modalities if m in names)

    def __len__(self) -> int:
        return len(self.sets)

    def of(self, present: Mapping[str, Tensor]) -> Tensor:
        """Int64 ``[B]`` on the CPU: each sample's set, or a number below 0. A modality not in ``present`` is absent."""
        there = [present[m] for m in self.modalities if m in present]
        if not there:
            raise ValueError(f"present: none of {', '.join(self.modalities)} in it")
        code_B = torch.zeros(len(there[0]), dtype=torch.long)
        for i, m in enumerate(self.modalities):
            if m in present:
                code_B += host_copy(present[m]).long() * 2**i
        return self._number[code_B]

    def known(self, present: Mapping[str, Tensor], what: str) -> Tensor:
        """:meth:`of`, where no set may be unknown.

        Raises:
            ValueError: naming the first such set, and the nearest that has a number.
        """
        set_B = self.of(present)
        if bool((set_B == UNKNOWN).any()):
            raise ValueError(self.refusal(present, set_B, what))
        return set_B

    def refusal(self, present: Mapping[str, Tensor], set_B: Tensor, what: str) -> str:
        """One line on the first sample whose set has no number."""
        row = int((set_B == UNKNOWN).int().argmax())
        has = tuple(m for m in self.modalities if m in present and bool(host_copy(present[m])[row]))

        def likeness(s: Sequence[str]) -> float:
            return len(set(s) & set(has)) / len(set(s) | set(has))

        near = max(self.names, key=lambda name: likeness(name.split("+"))) if self.sets else "none"
        return f"{what} has nothing for samples with {'+'.join(has)} only; the nearest that it has is {near}"


class AvailableSets:
    """Which modalities are left of the samples that a frozen network is adapted on.

        set_b = one of the sets that lie in what sample b has, with odds by weight        (of its draw key alone)

    A sample that has no whole set keeps what it has. With ``per: batch`` all samples of a micro-batch over all ranks
    draw the same set, as in the paper; who lacks a part of that keeps what it has.

    Args:
        sets: such as [[image], [text]]; all that are neither empty nor everything where not given.
        weights: one a set, alike where not given.
        per: ``sample`` or ``batch``: who draws.

    Raises:
        ValueError: for weights that are not one positive number a set, or no set at all.

    >>> keep = AvailableSets([["text"]])
    >>> here = torch.tensor([True, True])
    >>> left = keep.left({"image": here, "text": torch.tensor([True, False])}, torch.arange(2), ["image", "text"])
    >>> left["image"].tolist(), left["text"].tolist()
    ([False, True], [True, False])
    """

    def __init__(
        self,
        sets: list[list[str]] | None = None,
        weights: list[float] | None = None,
        per: Literal["sample", "batch"] = "sample",
    ) -> None:
        if sets is not None and not sets:
            raise ValueError("sets: none given; such as [[image], [text]]")
        if weights is not None and (sets is None or len(weights) != len(sets) or min(weights) <= 0):
            raise ValueError(f"weights {weights}: one positive number for each of the sets, which have to be named")
        self.sets, self.weights, self.per = sets, weights, per

    def of(self, modalities: Sequence[str]) -> list[tuple[str, ...]]:
        """The sets that are drawn, of a recipe with these modalities."""
        if self.sets is None:
            return Sets(modalities).sets
        whole = [tuple(modalities)] if any(set(s) == set(modalities) for s in self.sets) else []
        return [*Sets(modalities, self.sets).sets, *whole]

    def left(self, present: Mapping[str, Tensor], draw_B: Tensor, modalities: Sequence[str]) -> dict[str, Tensor]:
        """Modality -> bool ``[B]``: ``present``, less what the draw leaves out; other names stay as they are."""
        weights = self.weights or [1.0] * len(self.of(modalities))
        drawn = [tuple(m for m in modalities if m in s) for s in (self.sets or self.of(modalities))]
        member_SM = torch.tensor([[m in s for m in modalities] for s in drawn])
        nowhere_B, keys_B = torch.zeros(len(draw_B), dtype=torch.bool), host_copy(draw_B)
        there_BM = torch.stack([host_copy(present[m]) if m in present else nowhere_B for m in modalities], dim=1)
        fits_BS = ~(member_SM & ~there_BM[:, None]).any(dim=2)
        odds_BS = torch.tensor(weights, dtype=torch.float64).expand(len(draw_B), -1)
        if self.per == "batch":
            keys_B = (keys_B if world() == 1 else gather(draw_B).cpu()).min().expand(len(draw_B))
        else:
            odds_BS = odds_BS * fits_BS
        edge_BS = odds_BS.cumsum(dim=1)
        u_B = uniform_N(keys_B, "available").double() * edge_BS[:, -1]
        set_B = (edge_BS <= u_B[:, None]).sum(dim=1).clamp(max=len(drawn) - 1)
        kept_BM = there_BM & (member_SM[set_B] | ~fits_BS.gather(1, set_B[:, None]))
        kept = dict(zip(modalities, kept_BM.unbind(dim=1), strict=True))
        return {m: to_device(kept[m], draw_B.device) if m in kept else x_B for m, x_B in present.items()}


# forms --------------------------------------------------------------------------------------------------------------


class Modulated(nn.Module):
    """What one set of modalities does to the output of one layer. ``several`` does it for rows of several sets.

    ``forward(x, h)`` takes what went into the layer and what came out; None in a list of several leaves h as it is.
    """

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def several(parts: Sequence[Modulated | None], part_R: Tensor, x: Tensor, h: Tensor) -> Tensor:
        """Row r is changed by ``parts[part_R[r]]``."""
        raise NotImplementedError


class Modulation:
    """A form of modulation: ``of(layer)`` makes its parameters for one set, or None for a layer it leaves alone."""

    def of(self, layer: nn.Module) -> Modulated | None:
        raise NotImplementedError


class ScaleShift(Modulation):
    """``h' = gamma * h + beta`` for each channel of a layer's output; gamma 1 and beta 0 at the start.

    After linear layers, convolutions and norms (as SSF does, Lian 2022, arXiv 2210.08823; for "each layer" of the paper
    our reading), and after embeddings where a bank names them: 2 C parameters each.

    >>> ScaleShift().of(nn.Linear(3, 4))(torch.zeros(2, 3), torch.ones(2, 4)).tolist() == torch.ones(2, 4).tolist()
    True
    """

    def of(self, layer: nn.Module) -> Modulated | None:
        width = _width(layer)
        return None if width is None else _ScaleShift(width, _axis(layer))


class _ScaleShift(Modulated):
    def __init__(self, width: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.gamma_C, self.beta_C = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        shape = [1] * h.ndim
        shape[self.axis] = -1
        return h * self.gamma_C.to(h.dtype).view(shape) + self.beta_C.to(h.dtype).view(shape)

    @staticmethod
    def several(parts: Sequence[Modulated | None], part_R: Tensor, x: Tensor, h: Tensor) -> Tensor:
        some = cast("list[_ScaleShift | None]", list(parts))
        one = next(part for part in some if part is not None)
        ones, zeros = torch.ones_like(one.gamma_C), torch.zeros_like(one.beta_C)
        gamma_SC = torch.stack([ones if part is None else part.gamma_C for part in some])
        beta_SC = torch.stack([zeros if part is None else part.beta_C for part in some])
        shape = [len(part_R), *[1] * (h.ndim - 1)]
        shape[one.axis] = -1
        gamma, beta = (table_SC.to(h.dtype)[part_R].view(shape) for table_SC in (gamma_SC, beta_SC))
        return h * gamma + beta


class LowRank(Modulation):
    """``h' = W x + B A x`` for linear layers and convolutions; B is zero at the start.

    Of a convolution, A has the kernel, stride and padding of the layer and B is 1 x 1, as in LoRA (Hu 2022): our
    reading. Norms, and convolutions in groups or with other than zeros around them, are left alone.

    Args:
        r: rank.

    Raises:
        ValueError: if ``r`` is below 1.

    >>> sum(p.numel() for p in LowRank(r=2).of(nn.Conv2d(3, 4, 5)).parameters())  # 2 * 3 * 25 + 4 * 2
    158
    """

    def __init__(self, r: int = 1) -> None:
        if r < 1:
            raise ValueError(f"r {r}: a rank is at least 1")
        self.r = r

    def of(self, layer: nn.Module) -> Modulated | None:
        if isinstance(layer, nn.Linear):
            return _LowRank(layer.in_features, layer.out_features, self.r)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1 and layer.padding_mode == "zeros":
            return _LowRankConv(layer, self.r)
        return None


class _LowRank(Modulated):
    def __init__(self, width_in: int, width: int, r: int) -> None:
        super().__init__()
        self.a_rI = nn.Parameter(torch.empty(r, width_in))
        self.b_Cr = nn.Parameter(torch.zeros(width, r))
        nn.init.kaiming_uniform_(self.a_rI, a=5**0.5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h + F.linear(F.linear(x, self.a_rI.to(x.dtype)), self.b_Cr.to(x.dtype)).to(h.dtype)

    @staticmethod
    def several(parts: Sequence[Modulated | None], part_R: Tensor, x: Tensor, h: Tensor) -> Tensor:
        some = cast("list[_LowRank | None]", list(parts))
        one = next(part for part in some if part is not None)
        zeros_rI, zeros_Cr = torch.zeros_like(one.a_rI), torch.zeros_like(one.b_Cr)
        a_SrI = torch.stack([zeros_rI if part is None else part.a_rI for part in some]).to(x.dtype)
        b_SCr = torch.stack([zeros_Cr if part is None else part.b_Cr for part in some]).to(x.dtype)
        x_RTI = x.reshape(len(x), -1, x.shape[-1])
        low_RTr = torch.bmm(x_RTI, a_SrI[part_R].transpose(1, 2))
        return h + torch.bmm(low_RTr, b_SCr[part_R].transpose(1, 2)).reshape(h.shape).to(h.dtype)


class _LowRankConv(Modulated):
    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, r: int) -> None:
        super().__init__()
        self.convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
        self.how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.a_rI = nn.Parameter(torch.empty(r, layer.in_channels, *layer.kernel_size))
        self.b_Cr = nn.Parameter(torch.zeros(layer.out_channels, r))
        nn.init.kaiming_uniform_(self.a_rI, a=5**0.5)

    def low(self, x: Tensor, a_rI: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.convolve)(x, a_rI.to(x.dtype), **self.how))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        low_Rr = self.low(x, self.a_rI)
        return h + torch.einsum("nr...,cr->nc...", low_Rr, self.b_Cr.to(low_Rr.dtype)).to(h.dtype)

    @staticmethod
    def several(parts: Sequence[Modulated | None], part_R: Tensor, x: Tensor, h: Tensor) -> Tensor:
        some = cast("list[_LowRankConv | None]", list(parts))
        one = next(part for part in some if part is not None)
        real = [part for part in some if part is not None]
        # all sets' channels from one convolution, and of each row those of its own
        low = one.low(x, torch.cat([part.a_rI for part in real]))
        low_RSr = low.unflatten(1, (len(real), -1))
        number = to_device(torch.tensor([0 if part is None else real.index(part) for part in some]), part_R.device)
        low_Rr = low_RSr[torch.arange(len(part_R), device=part_R.device), number[part_R]]
        zeros_Cr = torch.zeros_like(one.b_Cr)
        b_SCr = torch.stack([zeros_Cr if part is None else part.b_Cr for part in some]).to(low.dtype)
        return h + torch.einsum("nr...,ncr->nc...", low_Rr, b_SCr[part_R]).to(h.dtype)


_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
#: Where a width stands, one or another.
_WIDTHS = ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim")


def _width(layer: nn.Module) -> int | None:
    """Channels of what a layer gives; None of one that is no such layer."""
    if not isinstance(layer, (nn.Linear, *_CONVS, *_NORMS, *_EMBEDDINGS)):
        return None
    found = next((getattr(layer, name) for name in _WIDTHS if hasattr(layer, name)), None)
    return int(cast(Any, layer).normalized_shape[-1] if found is None else found)


def _axis(layer: nn.Module) -> int:
    """Where the channels lie: images, volumes and waves have them first, and so have norms of them, by their names."""
    return 1 if isinstance(layer, nn.GroupNorm) or type(layer).__name__[-2:] in ("1d", "2d", "3d") else -1


# the bank -----------------------------------------------------------------------------------------------------------


class _Route:
    """The sets of the samples that run now."""

    def __init__(self, set_B: Tensor, device: torch.device) -> None:
        self.set_B, self.device = set_B, device
        self._seen: dict[int, tuple[Tensor | None, Tensor, list[int]]] = {}

    def here(self) -> tuple[Tensor, list[int]]:
        """The number of each row's set among those that occur, on the device, and which these are."""
        row_R = rows()
        if id(row_R) not in self._seen:
            set_R = self.set_B if row_R is None else self.set_B[host_copy(row_R)]
            found_S, number_R = set_R.unique(return_inverse=True)
            number_R = to_device(number_R, self.device)
            self._seen[id(row_R)] = row_R, number_R, found_S.tolist()  # with the rows: ids come again
        return self._seen[id(row_R)][1:]


class ModulationBank(nn.Module):
    """Parameters for each set of available modalities, after each layer of a frozen network (Reza 2023).

        h' = f_S(h), with S what the sample of this row has; f is the identity where it has everything

    A row goes by the sample that it is of (:mod:`descant.modules.core.rows`), so samples of several sets may share a
    batch; where all rows have one set, its parameters are used as they are. Layers are hooked: no name in the
    network changes, and a network whose samples have everything computes what it always did, to the bit. Layers of a
    modality's tower, pool and adapter have nothing for sets without it, since they do not run then.

    The paper puts adaptable layers after each layer of encoders and fusion, one set of parameters a combination; which
    kinds of layers, which subsets, and rows of several sets in one batch are our reading. Source: arXiv 2310.03986.

    Args:
        form: ScaleShift or LowRank; ScaleShift where not given.
        layers: ends of names of layers such as [qkv, mlp.2], what they lie in such as [towers.image], or their kinds
            such as [LayerNorm]; every linear layer, convolution and norm where not given.
        sets: that have parameters; those that the recipe trains where not given.
        unknown: of samples with any other set: ``refuse`` them, or take the network as it is (``frozen``).
        sham: ``permute`` hands every sample, in evaluation, what was learned for the next set of the bank.

    Raises:
        ValueError: in ``attach``, for a layer that is nowhere or a set that is none; in ``route``, for samples whose
            set has no parameters; in forward, for rows that are no samples.

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
        """Makes the parameters and hooks the layers of ``network``; returns itself. Once, before weights are loaded.

        Args:
            network: whose ``towers.MODALITY``, ``pools.MODALITY`` and ``adapters.MODALITY`` are of that one alone.
            modalities: in their order.
            drawn: the sets that samples are left with in training; all subsets where not given.
        """
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
                owner = name.split(".")[1] if name.startswith(OWN) else None
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
        """That every layer which has parameters is still there and asks for them.

        Raises:
            ValueError: for one that was replaced since :meth:`attach`, as by 4 bits or synchronized batch norms.
        """
        for name in self._hooked:
            try:
                layer = network.get_submodule(name)
            except AttributeError:
                layer = nn.Identity()
            layer = cast(nn.Module, getattr(layer, "base_layer", layer))  # of adapters, which call it
            if not any(isinstance(h, partial) and h.func == self._modulate for h in layer._forward_hooks.values()):
                raise ValueError(
                    f"bank: layer {name} was replaced after it was given parameters, which it never asks for"
                )

    def _layers(self, network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Names and layers, in the network's order; those inside adapters are left alone."""
        able = [(n, m) for n, m in network.named_modules() if _width(m) is not None and "lora_" not in n]
        # multi-head attention of torch reads the weights of its last layer and never runs it
        able = [(n, m) for n, m in able if not isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)]
        if self.layers is None:
            yield from ((name, layer) for name, layer in able if not isinstance(layer, _EMBEDDINGS))
            return
        for end in self.layers:
            if not any(_matches(end, name, layer) for name, layer in able):
                known = sorted({name.split(".")[-1] for name, _ in able} | {type(layer).__name__ for _, layer in able})
                raise ValueError(f"layers: {end!r}: {nearest(end, known)}")
        yield from ((n, m) for n, m in able if any(_matches(end, n, m) for end in self.layers))

    def of(self, set_name: str, layer: str) -> Modulated:
        """The parameters of one set, such as ``image+text``, for one layer."""
        return cast(Modulated, cast(nn.ModuleDict, self.parts[set_name])[_key(layer)])

    def count(self) -> dict[str, int]:
        """Set -> its number of parameters."""
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.parts.items()}

    def share(self, network: nn.Module) -> float:
        """Parameters of all sets together over those of the network: norms, heads and everything counted in both."""
        own = {id(p) for p in self.parameters()}
        return sum(self.count().values()) / sum(p.numel() for p in network.parameters() if id(p) not in own)

    @contextmanager
    def route(self, present: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, what runs in the network are samples that have these modalities (bool ``[B]`` each)."""
        set_B = self.sets.of(present)
        if bool((set_B == UNKNOWN).any()):
            refusal = self.sets.refusal(present, set_B, "the bank")
            if self.unknown == "refuse":
                raise ValueError(f"{refusal}; unknown: frozen takes the network as it is")
            if not self._warned:
                warnings.warn(f"{refusal}; they see the network as it is", stacklevel=3)
                self._warned = True
        # padding goes with a sample, so that it does not make one set two
        real_B = set_B != NOTHING
        set_B = torch.where(real_B, set_B, set_B[real_B][0] if bool(real_B.any()) else WHOLE).clamp(min=WHOLE)
        self.sham.calls += 1
        if self.sham.mode == "permute" and not self.training:
            set_B = torch.where(set_B == WHOLE, set_B, (set_B + 1) % len(self.sets))
        before = self._route
        self._route = _Route(set_B, next(iter(present.values())).device)
        try:
            yield
        finally:
            self._route = before

    def _modulate(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], h: Tensor
    ) -> Tensor | None:
        if self._route is None:
            return None
        number_R, found = self._route.here()
        key = _key(name)
        tables = [cast(nn.ModuleDict, self.parts[self.sets.names[k]]) if k >= 0 else nn.ModuleDict() for k in found]
        parts = [cast(Modulated, table[key]) if key in table else None for table in tables]
        if all(part is None for part in parts):
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if len(parts) == 1:
            return cast(Modulated, parts[0])(x, h)
        if len(h) != len(number_R):
            raise ValueError(f"{name} has {len(h)} rows for {len(number_R)} samples: whose? name `layers` without it")
        return type(next(part for part in parts if part is not None)).several(parts, number_R, x, h)


def _key(name: str) -> str:
    return name.replace(".", "/")  # names of modules hold no dots


def _matches(end: str, name: str, layer: nn.Module) -> bool:
    return f".{name}.".startswith(f".{end}.") or name.endswith(f".{end}") or type(layer).__name__ == end


def touch_parameters(value: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """``value``, whose backward reaches all of these parameters: with zeros, beside whatever else does.

    So a set that occurs on one rank only has a gradient on all, and an optimizer does the same whoever has the sample.

    >>> x, idle = torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(3))
    >>> reached(x.sum(), [idle]).backward()
    >>> idle.grad.tolist()
    [0.0, 0.0, 0.0]
    """
    trained = [p for p in parameters if p.requires_grad]
    return cast(Tensor, _Reached.apply(value, *trained)) if trained else value


class _Reached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters  # not saved: who writes them meanwhile does no harm here
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *(torch.zeros_like(p) for p in ctx.parameters)
