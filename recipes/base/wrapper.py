"""Recipes that wrap another recipe: what the inner one can do, the wrapper can do.

Whether a wrapper has a capability is asked by :func:`descant.modules.core.capabilities.has`, which looks at ``inner``.
Letters: B samples, D width, C classes, N tokens, R answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Decisions, Output, Scorer
from descant.modules.core.protocols import ReconstructionOutput
from descant.modules.core.rows import share_rows
from descant.recipes.base.recipe import Recipe


class Wrapper(Recipe):
    """A recipe around ``inner``, with its step, hooks and capabilities.

    A subclass changes ``of_batch`` or ``of_latents``, which all methods that take a batch or latents go through.

    Args:
        inner: the recipe.
    """

    #: Members that a wrapper has if the recipe inside has them.
    DELEGATED: frozenset[str]
    inner: Recipe

    def __init__(self, inner: Recipe, **kwargs: Any) -> None:
        self.in_batch_negatives = inner.in_batch_negatives
        super().__init__(**kwargs)
        self.inner, inner._outer = inner, [self]
        if hasattr(inner, "towers"):
            self.__dict__["towers"] = inner.towers  # past nn.Module: they are submodules of the inner recipe alone
        inner.step, inner.hooks, self.row_tracker = self.step, self.hooks, share_rows(inner)

    def of_batch(self, name: str, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """``inner.name(batch, ...)``."""
        return getattr(self.inner, name)(batch, *args, **kwargs)

    def of_latents(self, name: str, z: dict[str, Tensor], present: Mapping[str, Tensor] | None) -> Any:
        """``inner.name(z, present)``."""
        return getattr(self.inner, name)(z, present)

    def forward(self, batch: Batch) -> Output:
        return self.inner.forward(batch)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.inner.setup(stage)

    # of a batch ---------------------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        embeddings: dict[str, Tensor] = self.of_batch("embed", batch)
        return embeddings

    def scores(self, batch: Batch, *args: Any) -> dict[str, Term]:
        scores: dict[str, Term] = self.of_batch("scores", batch, *args)
        return scores

    def latents(self, batch: Batch, *modalities: str) -> dict[str, Tensor]:
        latents: dict[str, Tensor] = self.of_batch("latents", batch, *modalities)
        return latents

    def present_features(self, batch: Batch, modality: str, view: str = "") -> Tensor:
        features: Tensor = self.of_batch("present_features", batch, modality, view)
        return features

    def reconstruct(self, batch: Batch, *args: Any, **kwargs: Any) -> dict[str, ReconstructionOutput]:
        outputs: dict[str, ReconstructionOutput] = self.of_batch("reconstruct", batch, *args, **kwargs)
        return outputs

    def generate(self, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        ids: Tensor = self.of_batch("generate", batch, *args, **kwargs)
        return ids

    def likelihood(self, batch: Batch, answer_ids_BM: Tensor) -> Tensor:
        likelihood_B: Tensor = self.of_batch("likelihood", batch, answer_ids_BM)
        return likelihood_B

    def decide(self, batch: Batch) -> Decisions:
        decisions: Decisions = self.of_batch("decide", batch)
        return decisions

    def scorers(self, batch: Batch) -> Mapping[str, Scorer]:
        scorers: Mapping[str, Scorer] = self.of_batch("scorers", batch)
        return scorers

    def answered(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        hidden: tuple[Tensor, Tensor, Tensor] = self.of_batch("answered", batch)
        return hidden

    def token_experts(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        experts: tuple[Tensor, Tensor, Tensor] = self.of_batch("token_experts", batch)
        return experts

    def roll_out(self, batch: Batch, group: int, seed_R: Tensor) -> Any:
        return self.of_batch("roll_out", batch, group, seed_R)

    def reference(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        log_N: tuple[Tensor, Tensor, Tensor] = self.of_batch("reference", batch)
        return log_N

    def labels(self, batch: Batch) -> Tensor:
        return self._inner.labels(batch)

    # of latents ---------------------------------------------------------------------------------------------------

    def fuse(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Tensor:
        logits_BC: Tensor = self.of_latents("fuse", z, present)
        return logits_BC

    def unimodal(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        logits: dict[str, Tensor] = self.of_latents("unimodal", z, present)
        return logits

    def shares(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        shares: dict[str, Tensor] = self.of_latents("shares", z, present)
        return shares

    def encoded(self, h_BTD: Tensor, mask_BT: Tensor, modality: str) -> Tensor:
        return self._inner.encoded(h_BTD, mask_BT, modality)

    # attributes ---------------------------------------------------------------------------------------------------

    @property
    def _inner(self) -> Any:
        return self.inner

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(getattr(self.inner, "modalities", self.towers))

    @property
    def forks(self) -> Mapping[str, tuple[str, ...]]:
        return self._inner.forks

    @property
    def pairs(self) -> Any:
        return self._inner.pairs

    @property
    def losses(self) -> nn.ModuleDict:
        return self._inner.losses

    @property
    def width(self) -> int:
        return self._inner.width

    @property
    def choices(self) -> int:
        return self._inner.choices

    @property
    def new(self) -> int:
        return self._inner.new

    @property
    def packing(self) -> Any:
        return self._inner.packing

    @property
    def needs_reference(self) -> bool:
        return self._inner.needs_reference

    @property
    def joint_embedding(self) -> bool:
        return bool(getattr(self.inner, "joint_embedding", False))

    @property
    def lm(self) -> nn.Module | None:
        return getattr(self.inner, "lm", None)

    @property
    def regularizers(self) -> nn.ModuleList:
        return self._inner.regularizers

    @property
    def modality_mask(self) -> Callable[[Batch], Mapping[str, Tensor]] | None:
        return self._inner.modality_mask

    @modality_mask.setter
    def modality_mask(self, mask: Callable[[Batch], Mapping[str, Tensor]] | None) -> None:
        self._inner.modality_mask = mask

    def of_modality(self, modality: str) -> Iterable[nn.Parameter]:
        return self._inner.of_modality(modality)


Wrapper.DELEGATED = frozenset(vars(Wrapper)) - {"__init__", "forward", "setup", "of_batch", "of_latents"}
