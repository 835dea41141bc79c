"""Adaptation of a trained recipe to samples that lack modalities.

Claim: a frozen network with tiny parameters for each set of available modalities wins back much of what it loses when
modalities are absent, and is untouched where all are there.

    S_b  = a set of modalities, drawn for sample b among those that it has
    h'   = f_S(h)                  after each layer, with the parameters of S_b (ModulationBank), or a fill of features
    loss = the recipe's own, on the batch of which all but S_b was left out

Baselines take the same place: another ``fill`` (zeros, means, prompts), ``adapt: [Lora]`` in place of a bank, and with
``frozen: false`` all of the network is trained on. With learning rate 0 a bank is the network that nobody adapted.

What differs from the paper: rows of several sets share a batch (one for all: ``available.per: batch``). A loss is
divided by the rows of this batch on all ranks, since only they are known to be left, so micro-batches are refused.
Source: Reza 2023 (arXiv 2310.03986).
Letters: B samples, D width, N rows of a term, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from descant.modules.adaptation.imputation import Imputer, imputing
from descant.modules.adaptation.modulation import AvailableSets, ModulationBank, touch_parameters
from descant.modules.core.batch import NEGATIVE, Batch, some
from descant.modules.core.objective import Term
from descant.modules.core.ranks import gather, world
from descant.modules.io import saved
from descant.modules.towers import Frozen, Towers
from descant.recipes.base.rebuild import rebuild
from descant.recipes.base.recipe import Recipe
from descant.recipes.base.shared_space import SharedSpace

#: Methods that are this recipe's where they are the inner one's: those that take a batch, and those that take latents.
OF_BATCHES = ("embed", "scores", "latents", "present_features", "reconstruct", "generate")
OF_LATENTS = ("fuse", "unimodal", "shares")


class MissingModality(Recipe):
    """Adapt a trained recipe to missing modalities.

    The run at ``path`` is read whenever this recipe is built anew (resumed, validated, loaded). What the inner recipe
    can do (embed, score, fuse ...) this one can, with the parameters of what each sample has.

    Args:
        path: a run folder, a checkpoint in one, or an export, of any recipe with towers.
        checkpoint: of a run folder: best, last or a file in it.
        bank: parameters for each set of available modalities, or none.
        fill: features in place of absent modalities, which the recipe then takes for present; its own masks without.
        available: which modalities are left of training samples; any set, as often, where not given.
        frozen: keep all of the recipe, running statistics included, as it was.

    Raises:
        ValueError: if there is no such run, a set is drawn that the bank lacks, or a bank meets what computes a second
            time without knowing of it; at setup, for micro-batches or data that the recipe has no tower for; in the
            first step, if the recipe learns nothing from some set.
    """

    def __init__(
        self,
        path: Path | str,
        checkpoint: str = "best",
        bank: ModulationBank | None = None,
        fill: Imputer | None = None,
        available: AvailableSets | None = None,
        frozen: bool = True,
        **kwargs: object,
    ) -> None:
        again = [name for name in ("checkpointing", "compile") if kwargs.get(name) is not None]
        again += ["chunks"] if cast(int, kwargs.get("chunks", 1)) > 1 else []
        if bank is not None and again:
            raise ValueError(f"{again[0]}: layers run outside the routing of a bank then; leave it out")
        found = saved.find(path, checkpoint)
        inner = rebuild(found)
        if not len(getattr(inner, "towers", ())):
            raise ValueError(f"{found.folder}: {type(inner).__name__} has no towers, so no modality that may be absent")
        if isinstance(inner, MissingModality):
            adapts = found.model["init_args"]["path"]
            raise ValueError(f"{found.folder}: it is adapted already; give the run that it adapts, {adapts}")
        self.in_batch_negatives = inner.in_batch_negatives
        super().__init__(**kwargs)  # type: ignore[arg-type]  # the base's own typed arguments
        self.inner, self.path, self.frozen = inner, path, frozen
        self.size = sum(p.numel() for p in inner.parameters())
        self.modalities = tuple(cast("tuple[str, ...]", getattr(inner, "modalities", inner.towers)))
        self.available, self.bank, self.fill = available or AvailableSets(), bank, fill
        drawn = self.available.of(self.modalities)
        self._kept: list[nn.Module] = []
        if frozen:
            for m, tower in inner.towers.items():
                while isinstance(tower, Frozen):  # without gradients nothing inside could be adapted
                    inner.towers[m] = tower = tower.tower
            inner.requires_grad_(False)
            self._kept = list(inner.modules())
        if bank is not None:
            bank.attach(inner, self.modalities, drawn)
        if fill is not None:
            if not isinstance(inner, SharedSpace):
                raise ValueError(f"fill: {type(inner).__name__} has no one vector a modality to put something for")
            fill.build({m: cast(Towers, inner.towers).width(m) for m in self.modalities}, drawn)
        inner.step = self.step
        # a protocol is claimed where the inner recipe has it, so what there is stands on the object, not on its class
        for names, method in ((OF_BATCHES, self._of_batch), (OF_LATENTS, self._of_latents)):
            for name in names:
                if hasattr(inner, name):
                    setattr(self, name, partial(method, name))
        for name in ("forks", "joint_embedding", "of_modality", "labels"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))
        self._learns = False
        self.train()

    @property
    def towers(self) -> nn.ModuleDict:  # type: ignore[override]  # the inner ones, for whoever adapts towers
        return self.inner.towers

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.bank is not None:  # adapters and the strategy have had their turn
            self.bank.require_hooked(self.inner)

    def train(self, mode: bool = True) -> MissingModality:
        super().train(mode)
        for module in self._kept:  # and not what adapters add to them
            module.training = False
        return self

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.inner.setup(stage)
        accumulate = self.trainer.accumulate_grad_batches
        if stage == "fit" and accumulate > 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches {accumulate}: what is left of the other micro-batches is not known; "
                "1 and a smaller data.batch_size"
            )
        data = getattr(self.trainer.datamodule, "modalities", ())  # type: ignore[attr-defined]
        extra = [m for m in data if m not in self.modalities and not m.endswith(NEGATIVE)]
        if extra:
            raise ValueError(f"{self.path}: no tower for {extra[0]!r} of the data, only {', '.join(self.modalities)}")

    # what is there, and what stands in for it ------------------------------------------------------------------

    def left(self, batch: Batch) -> Batch:
        """The samples with what a draw leaves of them."""
        present = self.available.left(batch.present, batch.draw, self.modalities)
        step = present if world() == 1 else {m: gather(mask_B) for m, mask_B in present.items()}
        return replace(batch, present=present, step=dict(step))

    @contextmanager
    def routed(self, batch: Batch) -> Iterator[Batch]:
        """Inside, layers know what these samples have; gives the batch as the inner recipe is to take it."""
        with ExitStack() as stack:
            if self.bank is not None:
                stack.enter_context(self.bank.route(batch.present))
            if self.fill is not None:
                stack.enter_context(imputing(self.fill, batch.present))
                batch = replace(batch, present=self._all(batch.present), step=self._all(batch.step))
            yield batch

    def _all(self, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        any_B = some(*(present[m] for m in self.modalities if m in present))
        return {m: any_B if m in self.modalities else mask for m, mask in present.items()}

    # training --------------------------------------------------------------------------------------------------

    def terms(self, batch: Batch) -> dict[str, Term]:
        with self.routed(self.left(batch)) as there:
            terms = self.inner.terms(there)
        if not self._learns:
            self._require(terms)
            self._learns = True
        extra = [p for part in (self.bank, self.fill) if part is not None for p in part.parameters()]
        first, term = next(iter(terms.items()))
        return {**terms, first: replace(term, value=touch_parameters(term.value, extra))}

    def _require(self, terms: Mapping[str, Term]) -> None:
        """One line if some set would train nothing."""
        needs = [{m for m in term.given if m in self.modalities} for term in terms.values()]
        for s in self.available.of(self.modalities) if self.fill is None and all(needs) else ():
            if not any(need <= set(s) for need in needs):
                raise ValueError(
                    f"available: no term of {type(self.inner).__name__} has a valid row where only {'+'.join(s)} is "
                    "there, so nothing is learned for it; name other sets"
                )
        rows = sum(int(gather(term.count()[None]).sum()) for term in terms.values())
        if not rows:
            raise ValueError(f"no term of {type(self.inner).__name__} has a valid row: nothing would be learned")

    # evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        with self.routed(batch) as there:
            outputs = self.inner.validation_step(there, batch_idx, dataloader_idx)
        return {**outputs, "z": self._masked(outputs["z"], batch)} if "z" in outputs else outputs

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        with self.routed(batch) as there:
            outputs = self.inner.predict_step(there, batch_idx, dataloader_idx)
        present = {**batch.present, **{m: batch.there(m) for m in outputs["z"]}}
        return {**outputs, "present": present, "z": self._masked(outputs["z"], batch)}

    def on_validation_epoch_end(self) -> None:
        """``trainable/share``: trained parameters over all that the recipe had, norms and heads counted."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        self.log("trainable/share", trained / self.size)

    def _masked(self, z: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Embeddings of absent samples are zero, whatever stood in for them."""
        if self.fill is None:
            return dict(z)
        return {m: torch.where(batch.there(m)[:, None], x, torch.zeros_like(x)) for m, x in z.items()}

    def _of_batch(self, name: str, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        with self.routed(batch) as there:
            found = getattr(self.inner, name)(there, *args, **kwargs)
        return self._masked(found, batch) if name == "embed" else found

    def _of_latents(self, name: str, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Any:
        with ExitStack() as stack:
            if self.bank is not None and present is not None:  # without it all are there, and nothing is changed
                stack.enter_context(self.bank.route(present))
            return getattr(self.inner, name)(z, present)
