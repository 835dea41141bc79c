"""How well a recipe rebuilds what it does not see: numbers beside their controls, and pictures.

Letters: B rows of a batch, N rows of a set or bank, C channels, H, W pixels, D depth, F, T bins and frames, K bins of a
null, P, Q numbers of a given and of a target patch, L patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from descant.callbacks.evaluate.embeddings import Rows, Store
from descant.callbacks.evaluate.inversion import another
from descant.callbacks.evaluate.subsets import ForwardEvaluator
from descant.callbacks.plots.images import (
    FAINT,
    GAP,
    INK,
    PAPER,
    TEXT,
    TITLE,
    _font,
    _wrapped,
    keep_picture,
    run_folder,
)
from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.core.errors import no_such as nearest
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import ReconstructionOutput, Reconstructs
from descant.modules.core.rng import mix, mix_N
from descant.modules.evaluation.metrics import psnr, ridge_weights, wide
from descant.modules.masking.corruptions import Corruption, Hide

BINS = 10  # of the mean of what is given
TILE, HIDDEN = 96, (150, 150, 150)
#: Of categories: distinct, dark and light in turn; what comes after them has a colour of its number's own.
PALETTE = (
    *((27, 27, 30), (230, 75, 60), (60, 140, 220), (250, 200, 60), (70, 170, 90), (245, 240, 230)),
    *((150, 85, 170), (240, 140, 40), (110, 75, 50), (250, 170, 190), (40, 180, 180), (120, 120, 120)),
)
COLUMNS = ("seen", "predicted", "truth")


class Inputs:
    """Rows of a set as they came: inputs of some modalities, gathered over ranks and sorted by sample id.

    Args:
        modalities: whose inputs are kept.
        device: where.
    """

    def __init__(self, modalities: Sequence[str], device: torch.device) -> None:
        self.modalities, self.store = tuple(modalities), Store().to(device)
        self.others: dict[str, Tensor] = {}  # one row of zeros for each input that is not kept
        self.absent: tuple[str, ...] = ()

    def add(self, batch: Batch, keep_B: Tensor) -> None:
        """The rows that ``keep_B`` says and that have one of the modalities."""
        nothing = {m: torch.zeros(len(batch), 1, device=batch.device) for m in self.modalities}
        present = {m: batch.present[m] & keep_B for m in self.modalities}
        inputs = {m: batch.inputs[m] for m in self.modalities}
        self.store.update(nothing, Batch({}, present, inputs, batch.index, batch.key))
        kept = set(self.modalities)
        self.others = {m: torch.zeros_like(x[:1]) for m, x in batch.inputs.items() if m not in kept}
        self.absent = tuple(m for m in batch.present if m not in kept)

    def batch(self, rows: Rows, at: Mapping[str, Tensor], real_B: Tensor, ids_B: Tensor) -> Batch:
        """Modality -> the rows that its inputs are taken from; all other modalities are absent.

        Args:
            rows: what the store came to. at: int64 ``[B]`` a modality. real_B: False for a row that keeps the shape.
            ids_B: rows whose id and key these samples have.
        """
        inputs = {m: rows.targets[m][at_B] for m, at_B in at.items()}
        for m in self.modalities:
            if m not in inputs:
                inputs[m] = torch.zeros_like(rows.targets[m][ids_B])
        inputs |= {m: x.to(real_B.device).expand(len(real_B), *x.shape[1:]).clone() for m, x in self.others.items()}
        nowhere = torch.zeros_like(real_B)
        present = {m: rows.present[m][at[m]] & real_B if m in at else nowhere for m in self.modalities}
        present |= dict.fromkeys(self.absent, nowhere)
        return Batch(inputs, present, {}, rows.index[ids_B], rows.key[ids_B])


class Reconstruction(ForwardEvaluator):
    """How well a whole modality is rebuilt from others, beside what needs no model and what a sham can do.

        r2   = 1 - sum (x - x')^2 / sum (x - mean)^2      over all rows and numbers of a set, mean: the bank's, by place
        psnr = 10 log10(span^2 / mean (x - x')^2)         span: the largest less the smallest number in the bank

    x' is what the recipe makes of a row that has the ``given`` modalities alone (:class:`Hide`), so the bank's mean has
    an r2 of exactly 0. Keys, with ``r2_{target}_from_{given}`` such as ``r2_image_from_edges`` before them:

    ``_shuffled``: x' made from what is given of another sample, never one of equal content. A recipe that looks at
        what is hidden is found out here: it does well on this too.
    ``_null``: the best of the bank's mean and, for each given modality, the mean target of the bank's rows whose mean
        is in the same decile.
    ``_ridge``: a linear map from the patch of what is given to the patch in the same place, of all those with the
        target's extent; categories as one-hot. Fitted on the bank in float64:
        W = argmin mean ||y - W x - b||^2 + l2 mean var(x) ||W||^2.
    ``_gain``: r2 less the better one of ``_null`` and ``_shuffled``.

    Numbers of a target that are not finite are padding and do not count.

    ``psnr_{target}_from_{given}`` also has ``_ridge``, and for volumes ``_over_mean``: dB above each volume's own mean.

    All rows count that have the target and all that is given; inputs of the sets are held in memory on each rank.
    Neither batches nor ranks change a number: rows are sorted by id and go through the recipe ``batch`` at a time.

    Args:
        targets: the modalities that are rebuilt, each by itself.
        given: from what.
        sets: the evaluation sets; all of them where not given.
        limit: about so many samples of a set, chosen by their ids; all of them where not given.
        patch: side of the patches of ridge regression.
        l2: strength of its penalty, as a share of the mean variance of what it reads.
        batch: samples rebuilt at once.
        every: evaluations from one to the next that it takes part in.
        validate: take part in the validations of a fit too, and not in ``validate`` and ``test`` alone.

    Raises:
        ValueError: for nothing to rebuild or to rebuild it from, a target that is given, a count below 1 or a negative
            l2; at setup, for a recipe that lacks the protocol Reconstructs, or a data module without a bank; at
            evaluation, for an unknown modality or set, a target of categories, a patch that does not divide it, and for
            a recipe that shows itself what is to be hidden, or whose truth is not the input.

    >>> Reconstruction(targets=["image"], given=["image"])
    Traceback (most recent call last):
    ValueError: Reconstruction: 'image' from itself; such as targets [image] given [edges]
    """

    def __init__(
        self,
        targets: list[str],
        given: list[str],
        sets: list[str] | None = None,
        limit: int | None = None,
        patch: int = 8,
        l2: float = 1e-3,
        batch: int = 64,
        every: int = 1,
        validate: bool = True,
    ) -> None:
        super().__init__(sets, limit, every, validate)
        for name, modalities in (("targets", targets), ("given", given)):
            if not modalities:
                raise ValueError(f"Reconstruction: {name}: none given; such as targets [image] given [edges]")
        for m in targets:
            if m in given:
                raise ValueError(f"Reconstruction: {m!r} from itself; such as targets [image] given [edges]")
        for name, count in (("patch", patch), ("batch", batch)):
            if count < 1:
                raise ValueError(f"Reconstruction: {name} {count}; 1 is the least")
        if l2 < 0:
            raise ValueError(f"Reconstruction: l2 {l2} is negative")
        self.targets, self.given = targets, given
        self.patch, self.l2, self.batch = patch, l2, batch
        self._sets: dict[str, Inputs] = {}
        self._nulls: dict[str, Nulls] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(targets=self.targets, given=self.given, sets=self.sets)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        _require_reconstructs(self, pl_module)
        self._require(trainer, "bank_dataloader")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._nulls = {}

    def _forget(self) -> None:
        super()._forget()
        self._sets = {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        needed = list(dict.fromkeys([*self.targets, *self.given]))
        for m in needed:
            if m not in batch.present or m.endswith(NEGATIVE):
                raise ValueError(f"Reconstruction: modality {m!r}: {nearest(m, batch.present)}")
        for m in self.targets:
            if not batch.inputs[m].is_floating_point():
                raise ValueError(f"Reconstruction: {m!r} holds categories, and a mean square error needs numbers")
        inputs = self._sets.setdefault(name, Inputs(needed, pl_module.device))
        inputs.add(batch, keep_B & batch.both(*self.given))

    # the whole ----------------------------------------------------------------------------------------------------

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        nulls = self._nulls or (self._fit(trainer, pl_module) if self._sets else {})
        if not trainer.sanity_checking:  # which sees a part of the bank
            self._nulls = nulls
        values: dict[str, Tensor] = {}
        for name, inputs in self._sets.items():
            rows = inputs.store.compute()
            for target, null in nulls.items():
                at_N = torch.stack([rows.present[m] for m in (target, *self.given)]).all(0).nonzero().squeeze(1)
                if len(at_N):
                    error = self._errors(trainer, pl_module, inputs, rows, target, at_N, null)
                    many = int(rows.key[at_N].unique().numel()) > 1  # or there is no other content to be given
                    found = _judged(error, null, many)
                    end = f"{target}_from_{'+'.join(self.given)}"
                    values |= {f"{name}/{key.format(end)}": value for key, value in found.items()}
        return values

    def _errors(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        inputs: Inputs,
        rows: Rows,
        target: str,
        at_N: Tensor,
        null: Nulls,
    ) -> dict[str, Tensor]:
        """Predictor -> sum of its square errors over all rows. Each rank takes a share, in as many forwards."""
        world, rank = trainer.world_size, trainer.global_rank
        other_N = at_N[another(rows.key[at_N])]
        place_R = torch.arange(rank, world * -(-len(at_N) // world), world, device=at_N.device)
        sums: dict[str, Tensor] = {}
        for place_B in place_R.split(self.batch):
            real_B = place_B < len(at_N)
            at_B, other_B = (x_N[place_B.clamp(max=len(at_N) - 1)] for x_N in (at_N, other_N))
            x_B = rows.targets[target][at_B].to(wide(at_N.device))
            given = {m: rows.targets[m][at_B] for m in self.given}
            ask = (trainer, pl_module, inputs, rows, target, at_B)
            made = {"model": self._rebuilt(*ask, at_B, real_B), "shuffled": self._rebuilt(*ask, other_B, real_B)}
            made |= null.predictions(given, x_B)
            counts_B = x_B.isfinite() & real_B.reshape(-1, *[1] * (x_B.ndim - 1))
            # where, not a product: 0 * inf would be nan
            error = {k: torch.where(counts_B, (x_B - x).square(), 0.0).sum() for k, x in made.items()}
            error["count"] = counts_B.sum().to(x_B)
            sums = {name: value + sums.get(name, torch.zeros_like(value)) for name, value in error.items()}
        return dict(zip(sums, _over_ranks(trainer, torch.stack(list(sums.values()))).unbind(), strict=True))

    def _rebuilt(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        inputs: Inputs,
        rows: Rows,
        target: str,
        at_B: Tensor,
        given_B: Tensor,
        real_B: Tensor,
    ) -> Tensor:
        """What the recipe makes of the targets of some rows, from what is given of the same rows or of others."""
        batch = inputs.batch(rows, {target: at_B, **dict.fromkeys(self.given, given_B)}, real_B, at_B)
        rebuilt = reconstruct(trainer, pl_module, batch, Hide([target]))
        name = type(pl_module).__name__
        if target not in rebuilt:
            raise ValueError(f"Reconstruction: targets {target!r}, of {name}: {nearest(target, rebuilt)}")
        x_B = batch.inputs[target]
        found = _as_input(rebuilt[target], x_B)
        if found is None:
            shape = tuple(rebuilt[target].prediction.shape[1:])
            raise ValueError(
                f"Reconstruction: {name} makes {shape} of {target!r}; a prediction has the input's shape "
                f"{tuple(x_B.shape[1:])}"
            )
        if bool((found.visible.flatten(1).any(1) & real_B).any()):
            raise ValueError(f"Reconstruction: {name} shows itself {target!r}, all of which is to be hidden")
        finite_B = x_B.isfinite() & real_B.reshape(-1, *[1] * (x_B.ndim - 1))
        if not torch.allclose(found.truth[finite_B].to(x_B), x_B[finite_B], rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"Reconstruction: the truth of {target!r} that {name} gives is not its input; in what units?"
            )
        return found.prediction.to(wide(x_B.device))

    def _fit(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Nulls]:
        """Target -> what is fitted on the bank, in two passes over its inputs: deciles first, then all else."""
        needed, lead = list(dict.fromkeys([*self.targets, *self.given])), self._lead(trainer)
        store, largest = Store().to(pl_module.device), dict[str, Tensor]()
        for batch in lead._bank_batches(trainer):
            for m in needed:
                if m not in batch.present:
                    raise ValueError(f"Reconstruction: modality {m!r}, in the bank: {nearest(m, batch.present)}")
            mean = {m: _mean(batch.inputs[m])[:, None] for m in needed}
            store.update(mean, Batch({}, {m: batch.present[m] for m in needed}, {}, batch.index, batch.key))
            for m in self.given:
                if not batch.inputs[m].is_floating_point():
                    most = torch.cat([batch.inputs[m][batch.present[m]].flatten(), batch.index.new_zeros(1)]).max()
                    largest[m] = most.maximum(largest.get(m, most))
        rows = store.compute()
        classes = {m: int(_over_ranks(trainer, most, "max")) + 1 for m, most in largest.items()}
        fits = {}
        for target in self.targets:
            has_N = torch.stack([rows.present[m] for m in (target, *self.given)]).all(0)
            if bool(has_N.any()):
                means = {m: rows.z[m][has_N, 0] for m in self.given if m not in classes}
                fits[target] = _Fit({m: _deciles(mean_N) for m, mean_N in means.items()}, classes, self.patch)
        for batch in lead._bank_batches(trainer):
            for target, fit in fits.items():
                has_B = batch.both(target, *self.given)
                fit.add(batch.inputs[target][has_B], {m: batch.inputs[m][has_B] for m in self.given})
        return {target: fit.done(trainer, self.l2) for target, fit in fits.items()}


def _judged(error: Mapping[str, Tensor], null: Nulls, many: bool) -> dict[str, Tensor]:
    """Key, with a place for what is made from what -> value."""
    mse = {name: e / error["count"] for name, e in error.items()}
    r2 = {name: 1 - e / error["mean"] for name, e in error.items()}
    best = torch.stack([r2[name] for name in ("mean", *(f"bins {m}" for m in null.bins))]).amax()
    values = {"r2_{}": r2["model"], "r2_{}_null": best, "psnr_{}": psnr(mse["model"], null.span)}
    if many:
        values["r2_{}_shuffled"] = r2["shuffled"]
        values["r2_{}_gain"] = r2["model"] - best.maximum(r2["shuffled"])
    if null.ridge is not None:
        values["r2_{}_ridge"], values["psnr_{}_ridge"] = r2["ridge"], psnr(mse["ridge"], null.span)
    if null.mean.ndim == 4:
        values["psnr_{}_over_mean"] = 10 * (mse["own mean"] / mse["model"]).log10()
    return values


class Nulls(NamedTuple):
    """What needs no model, fitted on the bank: predictions of a target from what is given.

    ``mean``: the mean target ``[...]``. ``bins``: given -> edges ``[K - 1]`` of its mean and the mean target of each
    bin ``[K, ...]``. ``ridge``: weights ``[1 + P, Q]`` from patches to the patch in the same place, or none. ``span``:
    the largest less the smallest number of a target. ``classes``: of given categories. ``patch``: its side.
    """

    mean: Tensor
    bins: dict[str, tuple[Tensor, Tensor]]
    ridge: Tensor | None
    span: Tensor
    classes: dict[str, int]
    patch: int

    def predictions(self, given: Mapping[str, Tensor], x_B: Tensor) -> dict[str, Tensor]:
        """Predictor -> ``[B, ...]``, or what broadcasts to it."""
        own_B = _mean(x_B).to(x_B).reshape(-1, *[1] * (x_B.ndim - 1))
        made = {"mean": self.mean, "own mean": own_B}
        for m, (edge, mean_K) in self.bins.items():
            made[f"bins {m}"] = mean_K[torch.bucketize(_mean(given[m]), edge)]
        if self.ridge is not None:
            both = _patches(given, x_B, self.classes, self.patch)
            assert both is not None
            given_LP = both[0].nan_to_num(0.0, 0.0, 0.0)
            made["ridge"] = _whole(self.ridge[0] + given_LP @ self.ridge[1:], x_B, self.patch)
        return made


class _Fit:
    """Sums over the bank of which the null predictors of one target are made.

    Args:
        edges: given -> edges of the bins of its mean. classes: of given categories. patch: side.
    """

    def __init__(self, edges: dict[str, Tensor], classes: dict[str, int], patch: int) -> None:
        self.edges, self.classes, self.patch = edges, classes, patch
        self.sums: dict[str, Tensor] = {}
        self.bounds: Tensor | None = None
        self.numbers = 0  # Q

    def add(self, x_B: Tensor, given: Mapping[str, Tensor]) -> None:
        """Rows that have the target and all that is given; none of them is fine."""
        x_B = x_B.to(wide(x_B.device))
        real_B = x_B.isfinite()
        x_0_B, n_B = torch.where(real_B, x_B, 0.0), real_B.to(x_B)
        self._sum("x", x_0_B.sum(0))
        self._sum("n", n_B.sum(0))
        for m, edge in self.edges.items():
            bin_B = torch.bucketize(_mean(given[m]), edge)
            zero_K = x_B.new_zeros(BINS, *x_B.shape[1:])
            self._sum(f"x {m}", zero_K.index_add(0, bin_B, x_0_B))
            self._sum(f"n {m}", zero_K.index_add(0, bin_B, n_B))
        infinite_1 = x_B.new_full((1,), -torch.inf)
        bounds = torch.stack([torch.cat([s[real_B], infinite_1]).amax() for s in (x_B, -x_B)])
        self.bounds = bounds if self.bounds is None else bounds.maximum(self.bounds)
        both = _patches(given, x_B, self.classes, self.patch)
        if both is not None:
            self.numbers = both[1].shape[1]
            all_LR = torch.cat([torch.ones_like(both[0][:, :1]), *both], dim=1)
            all_LR = all_LR[all_LR.isfinite().all(1)]
            self._sum("moments", all_LR.T @ all_LR)

    def done(self, trainer: L.Trainer, l2: float) -> Nulls:
        sums = {name: _over_ranks(trainer, value) for name, value in self.sums.items()}
        mean, bins = sums["x"] / sums["n"].clamp(min=1), {}
        for m, edge in self.edges.items():
            n_K = sums[f"n {m}"]
            bins[m] = edge, torch.where(n_K > 0, sums[f"x {m}"] / n_K.clamp(min=1), mean)
        moments = sums.get("moments")
        ridge = None if moments is None else ridge_weights(moments, len(moments) - 1 - self.numbers, l2)
        assert self.bounds is not None
        span = _over_ranks(trainer, self.bounds, "max").sum()
        return Nulls(mean, bins, ridge, span, self.classes, self.patch)

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = value + self.sums[name] if name in self.sums else value


class ReconstructionPictures(ForwardEvaluator):
    """What a recipe is shown, what it makes of it, and what was there: a picture a set, of the same samples each time.

    A row a sample, and for each modality three columns: the input with its hidden part grey, the prediction beside what
    was seen, and the truth. Images ``[B, 1 or 3 (or more), H, W]`` are drawn from -1 to 1,
    volumes ``[B, C, D, H, W]`` by their middle slice and spectrograms ``[B, F, T]`` with low bins below, both from the
    least to the largest number of the truth, and category maps (int64 ``[B, H, W]``) by fixed colours; what has no such
    shape is left out. To every TensorBoard logger as ``pictures/{set}-reconstruction`` and to ``{run
    folder}/pictures/``. Nothing is drawn in the sanity check.

    Args:
        every: evaluations from one to the next that are drawn.
        count: samples of a set, chosen by their ids.
        modalities: that are drawn; all that the recipe rebuilds where not given.
        sets: the evaluation sets; all of them where not given.
        corruption: what is hidden, such as Hide; the recipe's own where not given.
        validate: draw in the validations of a fit too, and not in ``validate`` and ``test`` alone.
        name: of the pictures, where there are several such callbacks.

    Raises:
        ValueError: for a count below 1; at setup, if the recipe lacks the protocol Reconstructs; at evaluation, for an
            unknown modality or set.

    >>> ReconstructionPictures(count=0)
    Traceback (most recent call last):
    ValueError: ReconstructionPictures: count 0; 1 is the least
    """

    def __init__(
        self,
        every: int = 1,
        count: int = 8,
        modalities: list[str] | None = None,
        sets: list[str] | None = None,
        corruption: Corruption | None = None,
        validate: bool = True,
        name: str = "reconstruction",
    ) -> None:
        super().__init__(sets, None, every, validate)
        require_objects(self, corruption=(corruption, Corruption))
        if count < 1:
            raise ValueError(f"ReconstructionPictures: count {count}; 1 is the least")
        self.count, self.modalities, self.corruption, self.name = count, modalities, corruption, name
        self._first: dict[str, Batch] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name, sets=self.sets)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        _require_reconstructs(self, pl_module)

    def _forget(self) -> None:
        super()._forget()
        self._first = {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        for m in self.modalities or []:
            if m not in batch.present:
                raise ValueError(f"ReconstructionPictures: modality {m!r}: {nearest(m, batch.present)}")
        # no more than may be drawn is held
        own = _inputs(batch)
        seen = self._first.get(name)
        self._first[name] = self._chosen(own if seen is None else _joined(seen, own))

    def _chosen(self, batch: Batch) -> Batch:
        """The first ``count`` rows: the most modalities first, then by a hash of the id."""
        shown = [m for m in self.modalities or batch.present if not m.endswith(NEGATIVE)]
        has_B = torch.stack([batch.present[m] for m in shown]).sum(0)
        rank_B = torch.from_numpy(mix_N(batch.index, "pictures")).to(batch.device).argsort(stable=True)
        rank_B = rank_B[has_B[rank_B].argsort(stable=True, descending=True)]
        return batch.select(rank_B[: self.count])

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        folder = run_folder(trainer)  # asks all ranks, so it stands before the ways part
        for name, first in self._first.items():
            inputs = Inputs([m for m in first.inputs if m in first.present], pl_module.device)
            inputs.add(first, torch.ones_like(first.index, dtype=torch.bool))
            rows = inputs.store.compute()
            if len(rows) == 0:
                continue
            at = torch.arange(len(rows), device=rows.index.device)
            real = torch.ones_like(at, dtype=torch.bool)
            batch = self._chosen(inputs.batch(rows, dict.fromkeys(inputs.modalities, at), real, at))
            # on all ranks, since a recipe may ask them all
            rebuilt = reconstruct(trainer, pl_module, batch, self.corruption)
            for m in self.modalities or []:
                if m not in rebuilt:
                    raise ValueError(f"ReconstructionPictures: modality {m!r}: {nearest(m, rebuilt)}")
            if trainer.sanity_checking or not trainer.is_global_zero:
                continue
            shown = {m: _as_input(rebuilt[m], batch.inputs[m]) or rebuilt[m] for m in self.modalities or rebuilt}
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            names = [str(int(i)) for i in batch.index]
            if hasattr(data, "describe"):
                names = [" ".join(str(data.describe(int(i))).split()) for i in batch.index]
            image = gallery(shown, batch.present, names, f"{name}: {self.name}, step {trainer.global_step}")
            if image is None:
                continue
            tag = f"{name}-{self.name}"
            keep_picture(trainer, folder, image, tag, f"pictures/{tag}")
        return {}


# what they share --------------------------------------------------------------------------------------------------


def reconstruct(
    trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, corruption: Corruption | None
) -> dict[str, ReconstructionOutput]:
    """A recipe's ``reconstruct(batch, corruption)`` as a validation step runs it: no gradients, its precision."""
    assert isinstance(pl_module, Reconstructs)
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        return pl_module.reconstruct(batch, corruption)


def _require_reconstructs(callback: ForwardEvaluator, pl_module: L.LightningModule) -> None:
    if not isinstance(pl_module, Reconstructs):
        raise ValueError(
            f"{type(callback).__name__} needs the protocol Reconstructs (reconstruct(batch, corruption)); "
            f"{type(pl_module).__name__} lacks it"
        )


def _over_ranks(trainer: L.Trainer, value: Tensor, how: str = "sum") -> Tensor:
    return value if trainer.world_size == 1 else trainer.strategy.reduce(value.clone(), reduce_op=how)


def _as_input(rebuilt: ReconstructionOutput, x_B: Tensor) -> ReconstructionOutput | None:
    """In the shape of the input, where an axis of one channel is all that differs; None where more does."""
    if rebuilt.prediction[0].numel() != x_B[0].numel():
        return None
    return ReconstructionOutput(*(t.expand_as(rebuilt.prediction).reshape(x_B.shape) for t in rebuilt))


def _mean(x: Tensor) -> Tensor:
    """Float32 ``[B]``: the mean of what is finite of each row, 0 of nothing."""
    x = x.flatten(1).to(wide(x.device))
    real = x.isfinite()
    return (torch.where(real, x, 0.0).sum(1) / real.sum(1).clamp(min=1)).float()


def _deciles(mean_N: Tensor) -> Tensor:
    return mean_N.quantile(torch.arange(1, BINS, device=mean_N.device) / BINS)


def _space(x_B: Tensor) -> tuple[int, ...]:
    """The extents of a target: of ``[B, F, T]`` both axes, of ``[B, C, ...]`` those after the channels."""
    return tuple(x_B.shape[1:] if x_B.ndim == 3 else x_B.shape[2:])


def _channels(x: Tensor, space: tuple[int, ...], classes: int | None) -> Tensor | None:
    """``[B, C, ...]`` with the given extents, categories as one-hot; None of what has other extents."""
    if x.shape[1:] == space:
        x = x.unsqueeze(1)
    if x.shape[2:] != space:
        return None
    if x.is_floating_point():
        return x
    if classes is None or x.shape[1] != 1:
        return None
    known = (x >= 0) & (x < classes)  # a category that the bank has not is none
    return (F.one_hot(x.clamp(0, classes - 1), classes) * known[..., None]).squeeze(1).movedim(-1, 1)


def _patches(
    given: Mapping[str, Tensor], x_B: Tensor, classes: Mapping[str, int], patch: int
) -> tuple[Tensor, Tensor] | None:
    """``[L, P]`` and ``[L, Q]``: patches of what is given and has the target's extents, and of the target; or None."""
    space = _space(x_B)
    parts = [_channels(x, space, classes.get(m)) for m, x in given.items()]
    aligned = [part.to(x_B) for part in parts if part is not None]
    if not space or not aligned:
        return None
    wrong = [side for side in space if side % patch]
    if wrong:
        near = next(p for p in range(patch, 0, -1) if all(side % p == 0 for side in space))
        raise ValueError(f"Reconstruction: patch {patch} does not divide {wrong[0]}; {near} does")
    return _cut(torch.cat(aligned, dim=1), patch), _cut(x_B.reshape(len(x_B), -1, *space), patch)


def _cut(x_BC: Tensor, patch: int) -> Tensor:
    """``[B, C, ...] -> [L, C patch^d]``, L = B times the patches of a sample."""
    space = x_BC.shape[2:]
    sides = itertools.chain.from_iterable((side // patch, patch) for side in space)
    x = x_BC.reshape(*x_BC.shape[:2], *sides)
    d = len(space)
    x = x.permute(0, *range(2, 2 + 2 * d, 2), 1, *range(3, 3 + 2 * d, 2))
    return x.reshape(len(x_BC) * (space.numel() // patch**d), x_BC.shape[1] * patch**d)


def _whole(y_LQ: Tensor, x_B: Tensor, patch: int) -> Tensor:
    """The way back, into the shape of ``x_B``."""
    space = _space(x_B)
    d, grid = len(space), [side // patch for side in space]
    y = y_LQ.reshape(len(x_B), *grid, y_LQ.shape[1] // patch**d, *[patch] * d)
    y = y.permute(0, 1 + d, *itertools.chain.from_iterable((1 + i, 2 + d + i) for i in range(d)))
    return y.reshape(x_B.shape)


def _inputs(batch: Batch) -> Batch:
    """A batch with its modalities' inputs and nothing else."""
    own = [m for m in batch.present if m in batch.inputs and not m.endswith(NEGATIVE)]
    return Batch(dict(batch.inputs), {m: batch.present[m] for m in own}, {}, batch.index, batch.key)


def _joined(a: Batch, b: Batch) -> Batch:
    inputs, present = (
        {m: torch.cat([x, second[m]]) for m, x in first.items()}
        for first, second in ((a.inputs, b.inputs), (a.present, b.present))
    )
    return Batch(inputs, present, {}, torch.cat([a.index, b.index]), torch.cat([a.key, b.key]))


# drawing ----------------------------------------------------------------------------------------------------------


def gallery(
    rebuilt: Mapping[str, ReconstructionOutput], present: Mapping[str, Tensor], names: Sequence[str], title: str
) -> Image.Image | None:
    """A row a sample under its name, three tiles a modality: seen, predicted, truth; None of nothing to draw.

    Args:
        rebuilt: modality -> what was made of all samples.
        present: modality -> bool ``[B]``: a sample without it has empty tiles.
        names: of the samples.
        title: the first line.

    >>> x_B = torch.zeros(2, 3, 8, 8)
    >>> shown = {"image": ReconstructionOutput(x_B, x_B > 1, x_B)}
    >>> image = gallery(shown, {"image": torch.tensor([True, False])}, "ab", "title")
    >>> image.size
    (426, 293)
    """
    shown = [m for m, r in rebuilt.items() if len(r.truth) and _plane(r.truth[0], r.truth[0]) is not None]
    if not shown:
        return None
    label, group = 96, len(COLUMNS) * (TILE + 4) + GAP
    top = 2 * GAP + TITLE + 2 * (TEXT + 4)
    image = Image.new("RGB", (GAP + label + len(shown) * group + GAP // 2, top + len(names) * (TILE + 4) + GAP), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, INK, _font(TITLE, title))
    for j, m in enumerate(shown):
        left = GAP + label + j * group
        draw.text((left, top - 2 * (TEXT + 4)), m, INK, _font(TEXT, m))
        for k, column in enumerate(COLUMNS):
            place = (left + k * (TILE + 4) + TILE // 2, top - TEXT - 5)
            draw.text(place, column, FAINT, _font(TEXT, column), anchor="ma")
    for i, name in enumerate(names):
        y = top + i * (TILE + 4)
        for line, text in enumerate(_wrapped(name, TEXT, label - 8, 4)):
            draw.text((GAP, y + line * (TEXT + 3)), text, INK, _font(TEXT, text))
        for j, m in enumerate(shown):
            left = GAP + label + j * group
            if not bool(present[m][i]):
                wide = len(COLUMNS) * (TILE + 4)
                draw.rectangle((left, y, left + wide - 5, y + TILE - 1), outline=HIDDEN)
                draw.text((left + wide // 2, y + TILE // 2), "absent", FAINT, _font(TEXT, "absent"), anchor="mm")
                continue
            for k, tile in enumerate(_tiles(ReconstructionOutput(*(t[i].cpu() for t in rebuilt[m])))):
                image.paste(tile, (left + k * (TILE + 4), y))
    return image


def _tiles(one: ReconstructionOutput) -> list[Image.Image]:
    """What was seen of one sample, what was predicted beside it, and the truth."""
    kind = one.truth
    truth, visible, prediction = (_plane(t, kind) for t in (one.truth, one.visible, one.prediction.to(kind.dtype)))
    assert truth is not None and visible is not None and prediction is not None
    low, high = _scale(kind)
    seen, predicted, whole = (_pixels(x, low, high) for x in (truth, torch.where(visible, truth, prediction), truth))
    seen_HW1 = visible.reshape(-1, *visible.shape[-2:]).all(0).numpy()[..., None]
    seen = np.where(seen_HW1, seen, np.array(HIDDEN, dtype=np.uint8))
    return [_tile(Image.fromarray(x)) for x in (seen, predicted, whole)]


def _plane(x: Tensor, kind: Tensor) -> Tensor | None:
    """What is drawn of one sample: ``[C, H, W]`` of numbers or ``[H, W]`` of categories; None where it is no picture.

    ``kind`` is the input itself: its dtype says which.
    """
    if not kind.is_floating_point():
        return {2: x, 3: x[len(x) // 2]}.get(x.ndim) if x.ndim else None
    if x.ndim == 2:
        return x.flip(0)[None]  # low bins below
    if x.ndim == 4:
        return x[:, x.shape[1] // 2]
    return x if x.ndim == 3 else None


def _scale(kind: Tensor) -> tuple[float, float]:
    """The numbers that are black and white: -1 and 1 of an image, else the least and the largest."""
    finite = kind[kind.isfinite()].float() if kind.is_floating_point() else kind.new_zeros(0).float()
    if len(finite) == 0 or (kind.ndim == 3 and float(finite.abs().max()) <= 1.001):
        return -1.0, 1.0
    return float(finite.min()), float(finite.max())


def _pixels(x: Tensor, low: float, high: float) -> np.ndarray:
    """uint8 ``[H, W, 3]``."""
    if not x.is_floating_point():
        colours = np.array([_colour(c) for c in range(max(int(x.max()), 0) + 1)] + [PAPER], dtype=np.uint8)
        return colours[x.clamp(min=-1).numpy()]  # below 0 is no category: as paper
    x = ((x.float().nan_to_num(low, high, low) - low) / max(high - low, 1e-12)).clamp(0, 1)
    x = x[:3] if len(x) >= 3 else x.mean(0, keepdim=True).expand(3, -1, -1)
    return (x * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _colour(category: int) -> tuple[int, int, int]:
    if category < len(PALETTE):
        return PALETTE[category]
    code = mix(category, "colour")
    return code & 255, code >> 8 & 255, code >> 16 & 255


def _tile(image: Image.Image) -> Image.Image:
    """As large as fits, in the middle; small pictures show their pixels."""
    share = TILE / max(image.size)
    size = max(round(image.width * share), 1), max(round(image.height * share), 1)
    way = Image.Resampling.NEAREST if share >= 1 else Image.Resampling.BOX
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    tile.paste(image.resize(size, way), ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile
