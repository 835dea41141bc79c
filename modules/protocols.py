"""All that callbacks know of a recipe. A recipe that lacks one is named in one line at setup.

Letters: B samples, T tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from descant.modules.batch import Batch
from descant.modules.step import Step


@runtime_checkable
class HasObjective(Protocol):
    """Its terms are mixed by a :class:`Step`, and harmonizers may ask for the parameters that the terms share."""

    step: Step

    def shared_parameters(self) -> Iterable[nn.Parameter]: ...


@runtime_checkable
class HasTowers(Protocol):
    """One module a modality, by name."""

    @property
    def towers(self) -> Mapping[str, nn.Module]: ...


@runtime_checkable
class Forks(Protocol):
    """Shares features between terms through :meth:`Step.fork`; ``forks`` names who meets where."""

    step: Step

    @property
    def forks(self) -> Mapping[str, tuple[str, ...]]: ...


@runtime_checkable
class Embeds(Protocol):
    """``embed(batch)``: modality -> unit-length ``z_BD``; rows of absent samples are zero."""

    def embed(self, batch: Batch) -> dict[str, Tensor]: ...


@runtime_checkable
class Inverts(Protocol):
    """``encoded(h_BTD, mask_BT, modality)``: unit-length ``z_BD`` of what a tower's ``embed`` gives, or of what is put
    in its place: all that comes after the token embeddings."""

    @property
    def towers(self) -> nn.ModuleDict: ...

    def encoded(self, h_BTD: Tensor, mask_BT: Tensor, modality: str) -> Tensor: ...


@runtime_checkable
class Encodes(Protocol):
    """A tower in two parts: ``embed(x) -> h_BTD``, token embeddings with their positions, and ``encode``, the rest."""

    def embed(self, x: Tensor, /) -> Tensor: ...

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class Scaled(Protocol):
    """A loss whose similarities are multiplied by ``scale() = exp(log_scale)``, kept within a bound in training."""

    log_scale: nn.Parameter

    def scale(self) -> Tensor: ...


@runtime_checkable
class Features(Protocol):
    """``present_features(batch, modality)``: pooled features of a tower ``h_BD``; rows of absent samples are zero."""

    def present_features(self, batch: Batch, modality: str, /) -> Tensor: ...


@runtime_checkable
class Fuses(Protocol):
    """``fuse(z)``: embeddings by modality -> ``logits_BC``."""

    def fuse(self, z: dict[str, Tensor]) -> Tensor: ...


@runtime_checkable
class Unimodal(Protocol):
    """``unimodal(z)``: embeddings by modality -> each modality's own ``logits_BC``."""

    def unimodal(self, z: dict[str, Tensor]) -> dict[str, Tensor]: ...


@runtime_checkable
class Generates(Protocol):
    """``generate(batch)``: int64 token ids ``[B, T]``."""

    def generate(self, batch: Batch) -> Tensor: ...
