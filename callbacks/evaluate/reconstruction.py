"""Cross-modal reconstruction: R2 and PSNR of a whole modality against baselines and a sham, and image grids.

Letters: B rows of a batch, N rows of a set or bank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.embeddings import Rows, Store
from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.callbacks.plots.images import sample_line
from descant.callbacks.plots.output import save_figure
from descant.callbacks.plots.reconstruction import gallery
from descant.callbacks.plots.series import series_gallery
from descant.modules.core.batch import NEGATIVE, Batch, append_axes
from descant.modules.core.capabilities import has
from descant.modules.core.errors import no_such, require_value
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import ReconstructionOutput, Reconstructs, SeriesAxes, SeriesData
from descant.modules.core.rng import mix_N
from descant.modules.evaluation.inversion import rows_of_other_keys
from descant.modules.evaluation.metrics import wide
from descant.modules.evaluation.reconstruction import NullFit, Nulls, deciles, row_means
from descant.modules.masking.corruptions import Corruption, Hide
from descant.modules.training_setup.trainer import datamodule_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_modalities(callback: L.Callback, batch: Batch, modalities: Iterable[str]) -> None:
    """Raise ValueError naming the callback and the first modality that the data lacks; negatives are not modalities."""
    for m in modalities:
        if m not in batch.present or m.endswith(NEGATIVE):
            raise ValueError(f"{type(callback).__name__}: modality {m!r}: {no_such(m, batch.present)}")


class Inputs:
    """The inputs of some modalities of a set, gathered over ranks and sorted by sample id.

    Args:
        modalities: modalities whose inputs are stored.
        device: device of the stored inputs.
    """

    def __init__(self, modalities: Sequence[str], device: torch.device) -> None:
        self.modalities, self.store = tuple(modalities), Store().to(device)
        self.others: dict[str, Tensor] = {}  # a row of zeros for each input that is not stored
        self.absent: tuple[str, ...] = ()

    def add(self, batch: Batch, keep_B: Tensor) -> None:
        """Add the rows of ``keep_B`` that have one of the modalities."""
        nothing = {m: torch.zeros(len(batch), 1, device=batch.device) for m in self.modalities}
        present = {m: batch.present[m] & keep_B for m in self.modalities}
        inputs = {m: batch.inputs[m] for m in self.modalities}
        self.store.update(nothing, Batch({}, present, inputs, batch.index, batch.content_id))
        self.others = {m: torch.zeros_like(x[:1]) for m, x in batch.inputs.items() if m not in self.modalities}
        self.absent = tuple(m for m in batch.present if m not in self.modalities)

    def batch(self, rows: Rows, at: Mapping[str, Tensor], real_B: Tensor, ids_B: Tensor) -> Batch:
        """Build a batch with inputs from given rows; all other modalities are absent.

        Args:
            rows: ``store.compute()``.
            at: modality -> the rows of its inputs, int64 ``[B]``.
            real_B: False for padding.
            ids_B: rows whose id and key the samples get.
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


def with_others(trainer: L.Trainer, rows: Rows, at_N: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's even share of some rows, ``batch`` at a time, and for each row one of other content.

    Returns:
        ``real_B``, False for padding, which makes the shares of all ranks equally long; the rows, and the others.
    """
    world, rank = trainer.world_size, trainer.global_rank
    other_N = at_N[rows_of_other_keys(rows.key[at_N])]
    place_R = torch.arange(rank, world * -(-len(at_N) // world), world, device=at_N.device)
    for place_B in place_R.split(batch):
        at_B, other_B = (x_N[place_B.clamp(max=len(at_N) - 1)] for x_N in (at_N, other_N))
        yield place_B < len(at_N), at_B, other_B


class Reconstruction(ForwardEvaluator):
    """R2 and PSNR of a whole modality, reconstructed from others, against baselines without a model and a sham.

        r2   = 1 - sum (x - x')^2 / sum (x - mean)^2      over all rows and numbers of a set, mean: the bank's, by place
        psnr = 10 log10(span^2 / mean (x - x')^2)         span: the largest less the smallest number in the bank

    x' is the reconstruction of a row that has the ``given`` modalities alone (:class:`Hide`). The bank's mean has an r2
    of exactly 0. The key ``r2_{target}_from_{given}``, such as ``r2_image_from_edges``, also has these endings:

    ``_shuffled``: the sham, with the given modalities of another sample of other content. A recipe that sees the hidden
        input does well on this too.
    ``_null``: the best of the bank's mean and, for each given modality, the mean target of the bank's rows whose mean
        is in the same decile.
    ``_ridge``: a linear map from the given patch to the patch in the same place, of all modalities with the target's
        extent; categories as one-hot. Fitted on the bank in float64:
        W = argmin mean ||y - W x - b||^2 + l2 mean var(x) ||W||^2.
    ``_gain``: r2 minus the better one of ``_null`` and ``_shuffled``.

    ``psnr_{target}_from_{given}`` also has ``_ridge``, and for volumes ``_over_mean``: dB above each volume's own mean.
    Numbers of a target that are not finite are padding and do not count.

    All rows with the target and all given modalities count; each rank holds the inputs of the sets in memory. Results
    depend on neither batches nor ranks: rows are sorted by id and go through the recipe ``batch`` at a time.

    Args:
        targets: the modalities to reconstruct, one at a time.
        given: the modalities to reconstruct from.
        sets, limit, every, validate: see :class:`ForwardEvaluator`.
        patch: side of the patches of ridge regression.
        l2: strength of its penalty, as a share of the mean variance of its features.
        batch: samples reconstructed at once.

    >>> Reconstruction(targets=["image"], given=["image"])
    Traceback (most recent call last):
    ValueError: Reconstruction: 'image' from itself; such as targets [image] given [edges]
    """

    needs = (Reconstructs,)
    needs_of_data = ("bank_dataloader",)
    identity = ("targets", "given", "sets")

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
            require_value(modalities, f"Reconstruction: {name}: none given; such as targets [image] given [edges]")
        for m in targets:
            require_value(m not in given, f"Reconstruction: {m!r} from itself; such as targets [image] given [edges]")
        for name, count in (("patch", patch), ("batch", batch)):
            require_value(count >= 1, f"Reconstruction: {name} {count}; 1 is the least")
        require_value(l2 >= 0, f"Reconstruction: l2 {l2} is negative")
        self.targets, self.given = targets, given
        self.patch, self.l2, self.batch = patch, l2, batch
        self._nulls: dict[str, Nulls] = {}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._nulls = {}

    def _forget(self) -> None:
        super()._forget()
        self._sets: dict[str, Inputs] = {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        needed = list(dict.fromkeys([*self.targets, *self.given]))
        require_modalities(self, batch, needed)
        for m in self.targets:
            if not batch.inputs[m].is_floating_point():
                raise ValueError(f"Reconstruction: {m!r} holds categories, and a mean square error needs numbers")
        inputs = self._sets.setdefault(name, Inputs(needed, pl_module.device))
        inputs.add(batch, keep_B & batch.both(*self.given))

    # all batches --------------------------------------------------------------------------------------------------

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        nulls = self._nulls or (self._fit(trainer, pl_module) if self._sets else {})
        if not trainer.sanity_checking:  # the sanity check reads a part of the bank
            self._nulls = nulls
        values: dict[str, Tensor] = {}
        for name, inputs in self._sets.items():
            rows = inputs.store.compute()
            for target, null in nulls.items():
                at_N = torch.stack([rows.present[m] for m in (target, *self.given)]).all(0).nonzero().squeeze(1)
                if len(at_N):
                    error = self._errors(trainer, pl_module, inputs, rows, target, at_N, null)
                    several = int(rows.key[at_N].unique().numel()) > 1  # otherwise no row has other content
                    end = f"{target}_from_{'+'.join(self.given)}"
                    scores = null.scores(error, sham=several)
                    values |= {f"{name}/{key.format(end)}": value for key, value in scores.items()}
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
        """Sum the square errors of each predictor over all rows, which are divided evenly among the ranks."""
        sums: dict[str, Tensor] = {}
        for real_B, at_B, other_B in with_others(trainer, rows, at_N, self.batch):
            x_B = rows.targets[target][at_B].to(wide(at_N.device))
            predictions = null.predictions({m: rows.targets[m][at_B] for m in self.given}, x_B)
            for name, given_B in (("model", at_B), ("shuffled", other_B)):
                batch = inputs.batch(rows, {target: at_B, **dict.fromkeys(self.given, given_B)}, real_B, at_B)
                rebuilt = reconstruct(trainer, pl_module, batch, Hide([target]))
                predictions[name] = self._check_prediction(rebuilt, batch.inputs[target], target, real_B, pl_module)
            counts_B = x_B.isfinite() & append_axes(real_B, x_B)
            # where, not a product: 0 * inf would be nan
            error = {k: torch.where(counts_B, (x_B - x).square(), 0.0).sum() for k, x in predictions.items()}
            error["count"] = counts_B.sum().to(x_B)
            sums = {name: value + sums.get(name, torch.zeros_like(value)) for name, value in error.items()}
        return dict(zip(sums, _reduce(trainer, torch.stack(list(sums.values()))).unbind(), strict=True))

    @staticmethod
    def _check_prediction(
        rebuilt: Mapping[str, ReconstructionOutput], x_B: Tensor, target: str, real_B: Tensor, recipe: object
    ) -> Tensor:
        """Return the prediction, if all of the target was hidden and the truth is the input."""
        name = type(recipe).__name__
        if target not in rebuilt:
            raise ValueError(f"Reconstruction: targets {target!r}, of {name}: {no_such(target, rebuilt)}")
        output = _as_input(rebuilt[target], x_B)
        if output is None:
            shapes = [tuple(x.shape[1:]) for x in (rebuilt[target].prediction, x_B)]
            what = f"{name} predicts {shapes[0]} for {target!r}"
            raise ValueError(f"Reconstruction: {what}; a prediction has the input's shape {shapes[1]}")
        if bool((output.visible.flatten(1).any(1) & real_B).any()):
            raise ValueError(f"Reconstruction: {name} leaves some of {target!r} visible; all of it has to be hidden")
        finite_B = x_B.isfinite() & append_axes(real_B, x_B)
        if not torch.allclose(output.truth[finite_B].to(x_B), x_B[finite_B], rtol=1e-3, atol=1e-4):
            raise ValueError(f"Reconstruction: {name} returns a truth of {target!r} other than its input; same units?")
        return output.prediction.to(wide(x_B.device))

    def _fit(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Nulls]:
        """Fit the baselines of each target in two passes over the bank: deciles first, then all else."""
        needed, lead = list(dict.fromkeys([*self.targets, *self.given])), self._lead(trainer)
        store, largest = Store().to(pl_module.device), dict[str, Tensor]()
        for batch in lead._bank_batches(trainer):
            for m in needed:
                if m not in batch.present:
                    raise ValueError(f"Reconstruction: modality {m!r}, in the bank: {no_such(m, batch.present)}")
            mean = {m: row_means(batch.inputs[m])[:, None] for m in needed}
            store.update(mean, Batch({}, {m: batch.present[m] for m in needed}, {}, batch.index, batch.content_id))
            for m in self.given:
                if not batch.inputs[m].is_floating_point():
                    most = torch.cat([batch.inputs[m][batch.present[m]].flatten(), batch.index.new_zeros(1)]).max()
                    largest[m] = most.maximum(largest.get(m, most))
        rows = store.compute()
        classes = {m: int(_reduce(trainer, most, "max")) + 1 for m, most in largest.items()}
        fits = {}
        for target in self.targets:
            has_N = torch.stack([rows.present[m] for m in (target, *self.given)]).all(0)
            if bool(has_N.any()):
                means = {m: rows.z[m][has_N, 0] for m in self.given if m not in classes}
                fits[target] = NullFit({m: deciles(mean_N) for m, mean_N in means.items()}, classes, self.patch)
        for batch in lead._bank_batches(trainer):
            for target, fit in fits.items():
                has_B = batch.both(target, *self.given)
                fit.add(batch.inputs[target][has_B], {m: batch.inputs[m][has_B] for m in self.given})
        return {target: fit.fit(partial(_reduce, trainer), self.l2) for target, fit in fits.items()}


class ReconstructionPictures(ForwardEvaluator):
    """Image grids of reconstructions: visible input, prediction and truth, of the same samples in each evaluation.

    Each set has one figure with a row per sample. Each modality has three columns: the input with its hidden part grey,
    the prediction in place of the hidden part, and the truth. Images ``[B, 1 or 3 (or more), H, W]`` are shown from -1
    to 1. The middle slice of volumes ``[B, C, D, H, W]`` and spectrograms ``[B, F, T]`` (low bins at the bottom) are
    shown from the least to the largest number of the truth. Category maps (int64 ``[B, H, W]``) have fixed colours.
    Other shapes are left out. Figures go to every TensorBoard logger as ``pictures/{set}-reconstruction`` and to
    ``{run folder}/pictures/``. Time series ``[B, W, T]`` of data with :class:`SeriesData` are line plots in the data's
    units, in a separate figure, ``pictures/{set}-reconstruction-series``. The sanity check draws nothing.

    Args:
        count: samples of a set, selected by their ids.
        modalities: modalities to show; all that the recipe reconstructs if not given.
        corruption: what is hidden, such as Hide; the recipe's own if not given.
        name: part of the figures' names, by which several such callbacks differ.
        sets, every, validate: see :class:`ForwardEvaluator`.

    >>> ReconstructionPictures(count=0)
    Traceback (most recent call last):
    ValueError: ReconstructionPictures: count 0; 1 is the least
    """

    needs = (Reconstructs,)
    identity = ("name", "sets")

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
        require_value(count >= 1, f"ReconstructionPictures: count {count}; 1 is the least")
        self.count, self.modalities, self.corruption, self.name = count, modalities, corruption, name

    def _forget(self) -> None:
        super()._forget()
        self._first: dict[str, Batch] = {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        require_modalities(self, batch, self.modalities or [])
        # only the samples that may be drawn are stored
        new, earlier = _inputs(batch), self._first.get(name)
        self._first[name] = self._select(new if earlier is None else _join_batches(earlier, new))

    def _select(self, batch: Batch) -> Batch:
        """Select ``count`` rows: those with the most modalities first, then by a hash of the id."""
        shown = [m for m in self.modalities or batch.present if not m.endswith(NEGATIVE)]
        has_B = torch.stack([batch.present[m] for m in shown]).sum(0)
        rank_B = torch.from_numpy(mix_N(batch.index, "pictures")).to(batch.device).argsort(stable=True)
        rank_B = rank_B[has_B[rank_B].argsort(stable=True, descending=True)]
        return batch.select(rank_B[: self.count])

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        for name, first in self._first.items():
            inputs = Inputs([m for m in first.inputs if m in first.present], pl_module.device)
            inputs.add(first, torch.ones_like(first.index, dtype=torch.bool))
            rows = inputs.store.compute()
            if len(rows) == 0:
                continue
            at = torch.arange(len(rows), device=rows.index.device)
            real = torch.ones_like(at, dtype=torch.bool)
            batch = self._select(inputs.batch(rows, dict.fromkeys(inputs.modalities, at), real, at))
            names = [sample_line(trainer.datamodule, i) for i in batch.index.tolist()]  # type: ignore[attr-defined]
            # on all ranks, since a recipe may use collectives
            figures = self.draw(trainer, pl_module, batch, names, f"{name}: {self.name}, step {trainer.global_step}")
            for end, figure in figures.items():
                if figure is not None:
                    tag = f"{name}-{self.name}{end}"
                    save_figure(trainer, figure, tag, f"pictures/{tag}")
        return {}

    def draw(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, names: list[str], title: str
    ) -> dict[str, Figure | None]:
        """Draw a set on the first rank, outside the sanity check: the end of a name -> the figure, None if empty."""
        rebuilt = reconstruct(trainer, pl_module, batch, self.corruption)
        for m in self.modalities or []:
            if m not in rebuilt:
                raise ValueError(f"ReconstructionPictures: modality {m!r}: {no_such(m, rebuilt)}")
        if trainer.sanity_checking or not trainer.is_global_zero:
            return {}
        shown = {m: _as_input(rebuilt[m], batch.inputs[m]) or rebuilt[m] for m in self.modalities or rebuilt}
        units = {m: self._series_axes(trainer, batch, m) for m in shown}
        series = {m: shown.pop(m) for m, axes in units.items() if any(axes) and shown[m].truth.ndim == 3}
        images = gallery(shown, batch.present, names, title)
        return {"": images, "-series": series_gallery(series, units, names, title)}

    @staticmethod
    def _series_axes(trainer: L.Trainer, batch: Batch, modality: str) -> list[SeriesAxes | None]:
        """Return the axes of a time series in each sample; None if the sample lacks it, or it is not a series."""
        data = datamodule_of(trainer)
        if not isinstance(data, SeriesData):
            return [None] * len(batch)
        samples = zip(batch.index.tolist(), batch.present[modality].tolist(), strict=True)
        return [data.series_axes(index, modality) if present else None for index, present in samples]


def reconstruct(
    trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, corruption: Corruption | None
) -> dict[str, ReconstructionOutput]:
    """Call the recipe's ``reconstruct(batch, corruption)`` as in a validation: no gradients, the run's precision."""
    assert has(pl_module, Reconstructs)
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        return pl_module.reconstruct(batch, corruption)


def _reduce(trainer: L.Trainer, value: Tensor, how: str = "sum") -> Tensor:
    """Reduce a value by ``sum`` or ``max`` over ranks."""
    return value if trainer.world_size == 1 else trainer.strategy.reduce(value.clone(), reduce_op=how)


def _as_input(rebuilt: ReconstructionOutput, x_B: Tensor) -> ReconstructionOutput | None:
    """Reshape to the shape of the input if only an axis of one channel differs, else return None."""
    if rebuilt.prediction[0].numel() != x_B[0].numel():
        return None
    return ReconstructionOutput(*(t.expand_as(rebuilt.prediction).reshape(x_B.shape) for t in rebuilt))


def _inputs(batch: Batch) -> Batch:
    """Return a batch with its modalities' inputs and nothing else."""
    modalities = [m for m in batch.present if m in batch.inputs and not m.endswith(NEGATIVE)]
    return Batch(dict(batch.inputs), {m: batch.present[m] for m in modalities}, {}, batch.index, batch.content_id)


def _join_batches(a: Batch, b: Batch) -> Batch:
    inputs, present = (
        {m: torch.cat([x, second[m]]) for m, x in first.items()}
        for first, second in ((a.inputs, b.inputs), (a.present, b.present))
    )
    return Batch(inputs, present, {}, torch.cat([a.index, b.index]), torch.cat([a.content_id, b.content_id]))
