"""Base, checks and preparation of a recipe that is adapted to missing modalities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from descant.modules.core.batch import NEGATIVE, Batch, some
from descant.modules.core.objective import Term
from descant.modules.core.ranks import gather
from descant.modules.io.saved import Saved
from descant.modules.missing_modalities.imputation import Imputation, Imputer
from descant.modules.missing_modalities.modulation import ModulationBank
from descant.modules.towers import Frozen, Towers
from descant.recipes.base.recipe import Recipe
from descant.recipes.base.shared_space import SharedSpace
from descant.recipes.base.wrapper import Wrapper


class AdaptedRecipe(Wrapper):
    """Base of recipes for samples that lack modalities; methods use the parameters for each sample's modalities."""

    bank: ModulationBank | None
    fill: Imputer | None
    size: int

    @contextmanager
    def routing(self, batch: Batch) -> Iterator[Batch]:
        """Route each sample, within the context, to the parameters for its modalities; yield the inner batch."""
        with ExitStack() as stack:
            if self.bank is not None:
                stack.enter_context(self.bank.route(batch.present))
            if self.fill is None:
                yield batch
                return
            space = cast(SharedSpace, self.inner)
            space.imputation = Imputation(self.fill, batch.present)
            stack.callback(setattr, space, "imputation", None)
            yield replace(batch, present=self._all(batch.present), step=self._all(batch.step))

    def _all(self, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        any_B = some(*(present[m] for m in self.modalities if m in present))
        return {m: any_B if m in self.modalities else mask for m, mask in present.items()}

    # evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        with self.routing(batch) as routed:
            outputs = self.inner.validation_step(routed, batch_idx, dataloader_idx)
        return {**outputs, "z": self._zero_absent(outputs["z"], batch)} if "z" in outputs else outputs

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        with self.routing(batch) as routed:
            outputs = self.inner.predict_step(routed, batch_idx, dataloader_idx)
        present = {**batch.present, **{m: batch.has_all(m) for m in outputs["z"]}}
        return {**outputs, "present": present, "z": self._zero_absent(outputs["z"], batch)}

    def on_validation_epoch_end(self) -> None:
        """Log ``trainable/share``: trained parameters over all that the recipe had, including norms and heads."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        self.log("trainable/share", trained / self.size)

    def of_batch(self, name: str, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        with self.routing(batch) as routed:
            result = getattr(self.inner, name)(routed, *args, **kwargs)
        return self._zero_absent(result, batch) if name == "embed" else result

    def of_latents(self, name: str, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Any:
        with ExitStack() as stack:
            if self.bank is not None and present is not None:  # without ``present``, all modalities are present
                stack.enter_context(self.bank.route(present))
            return getattr(self.inner, name)(z, present)

    def _zero_absent(self, z: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Set embeddings of absent samples to zero, even if features were imputed for them."""
        if self.fill is None:
            return dict(z)
        return {m: torch.where(batch.has_all(m)[:, None], x, torch.zeros_like(x)) for m, x in z.items()}


def require_adaptable(found: Saved, inner: Recipe, bank: ModulationBank | None, options: Mapping[str, Any]) -> None:
    """Raise ValueError for a recipe without towers, a wrapper, or options that a bank does not allow."""
    again = [name for name in ("checkpointing", "compile") if options.get(name) is not None]
    again += ["chunks"] if int(options.get("chunks", 1)) > 1 else []
    if bank is not None and again:
        raise ValueError(f"{again[0]}: layers run outside the routing of a bank then; leave it out")
    if not len(getattr(inner, "towers", ())):
        raise ValueError(f"{found.folder}: {type(inner).__name__} has no towers, so no modality that may be absent")
    if isinstance(inner, Wrapper):
        adapts = found.model["init_args"]["path"]
        raise ValueError(f"{found.folder}: it is adapted already; give the run that it adapts, {adapts}")


def unfreeze_inside(inner: Recipe) -> list[nn.Module]:
    """Freeze all parameters of a recipe, but unwrap ``Frozen`` towers so that gradients pass; return its modules."""
    for m, tower in inner.towers.items():
        while isinstance(tower, Frozen):  # it blocks gradients, so nothing inside could be adapted
            inner.towers[m] = tower = tower.tower
    inner.requires_grad_(False)
    return list(inner.modules())


def build_imputer(fill: Imputer, inner: Recipe, modalities: Sequence[str], sets: Sequence[Sequence[str]]) -> None:
    """Build ``fill`` for the towers' widths. Raise ValueError for a recipe without one feature vector per modality."""
    if not isinstance(inner, SharedSpace):
        raise ValueError(f"fill: {type(inner).__name__} has no one vector a modality to put something for")
    fill.build({m: cast(Towers, inner.towers).width(m) for m in modalities}, sets)


def require_towers_of(recipe: Any, stage: str) -> None:
    """Raise ValueError for gradient accumulation, or a modality of the data that has no tower."""
    accumulate = recipe.trainer.accumulate_grad_batches
    if stage == "fit" and accumulate > 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches {accumulate}: what is left of the other micro-batches is not known; "
            "1 and a smaller data.batch_size"
        )
    data = getattr(recipe.trainer.datamodule, "modalities", ())
    extra = [m for m in data if m not in recipe.modalities and not m.endswith(NEGATIVE)]
    if extra:
        raise ValueError(f"{recipe.path}: no tower for {extra[0]!r} of the data, only {', '.join(recipe.modalities)}")


def require_learning(recipe: Any, terms: Mapping[str, Term]) -> None:
    """Raise ValueError if some set of available modalities, or the whole step, would train nothing."""
    name = type(recipe.inner).__name__
    needs = [{m for m in term.given if m in recipe.modalities} for term in terms.values()]
    for s in recipe.available.of(recipe.modalities) if recipe.fill is None and all(needs) else ():
        if not any(need <= set(s) for need in needs):
            raise ValueError(
                f"available: no term of {name} has a valid row where only {'+'.join(s)} is there, so nothing is "
                "learned for it; name other sets"
            )
    if not sum(int(gather(term.count()[None]).sum()) for term in terms.values()):
        raise ValueError(f"no term of {name} has a valid row: nothing would be learned")
