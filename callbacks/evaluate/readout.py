"""Linear readout of frozen tower features, compared with an untrained twin and with both modalities fused.

Letters: B rows of a batch, N rows of a set, P features, S columns of a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, Rows, Store
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.errors import require_value
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import Features
from descant.modules.core.rng import mix_N
from descant.modules.evaluation.readout import ModelContrast, Products, Reading, RidgeReadout

TRAINED, RANDOM = "trained", "random"


class Readout(EmbeddingEvaluator):
    """Ridge regression of targets on the pooled features of a frozen tower (Subramaniam et al. 2024, arXiv 2406.14481).

        {set}/readout_{target} = mean over the target's columns of  mean over contiguous folds of Pearson r

    With a ``contrast``, tests also log r of the twin, and shares of the target's columns that are significant:

    ``{set}/readout_{target}_random``, ``_beats_random``: r of the twin, the same network with its weights before
        training, and where the trained one predicts better.
    ``{set}/readout_{target}_integration``: where both modalities fused, concatenated with products of their principal
        components, predict better than either alone *and* than the concatenation.
    ``{set}/readout_{target}_integration_concat``: where the concatenation predicts better than either alone.

    ``_{modality}`` follows the name of the target if the modality is not image. Rows are sorted by sample id, so a
    corpus ordered by class or time is cut into contiguous blocks. Sets without such a target and targets with too few
    values are skipped. The twin's weights are part of the checkpoint.

    Args:
        targets: float targets of the data, ``[N]`` or ``[N, S]``; nan is a missing value.
        modality: modality whose features predict.
        against: the other modality of integration.
        sets: names of evaluation sets; all of them if not given.
        ridge: the readout.
        contrast: the significance test, or none for r alone.
        components: principal components of each modality in products.
        shuffle: a sham: the features are permuted among rows.

    >>> Readout(targets=[])
    Traceback (most recent call last):
    ValueError: Readout: targets: none given; such as [visual]
    """

    def __init__(
        self,
        targets: list[str],
        modality: str = "image",
        against: str = "text",
        sets: list[str] | None = None,
        ridge: RidgeReadout | None = None,
        contrast: ModelContrast | None = None,
        components: int = 16,
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        require_objects(self, ridge=(ridge, RidgeReadout), contrast=(contrast, ModelContrast))
        require_value(targets, "Readout: targets: none given; such as [visual]")
        require_value(modality != against, f"Readout: {modality!r} against itself; such as modality image against text")
        self.targets, self.modality, self.against, self.sets = targets, modality, against, sets
        self.ridge, self.contrast, self.components = ridge or RidgeReadout(), contrast, components
        self.shuffle = shuffle
        self._twin: dict[str, Tensor] | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(targets=self.targets, modality=self.modality, shuffle=self.shuffle)

    # the twin ------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.contrast is None or self._twin is not None:  # a resumed run has the twin of its start
            return
        state = pl_module.state_dict()
        if any(isinstance(value, DTensor) for value in state.values()):
            raise ValueError("Readout: contrast: the twin needs whole parameters, and these are sharded over ranks")
        self._twin = {name: value.detach().cpu().clone() for name, value in state.items()}

    def state_dict(self) -> dict[str, Any]:
        return {} if self._twin is None else {"twin": self._twin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._twin = state_dict.get("twin")

    # collecting ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not has(pl_module, Features):
            raise ValueError(
                "Readout needs the protocol Features (present_features(batch, modality)); "
                f"{type(pl_module).__name__} lacks it"
            )

    def _forget(self) -> None:
        super()._forget()
        self._features: dict[tuple[int, str], Store] = {}

    def _collect(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, dataloader_idx: int
    ) -> None:
        super()._collect(trainer, pl_module, outputs, batch, dataloader_idx)
        if self.sets is not None and self._lead(trainer)._set_name(trainer, dataloader_idx) not in self.sets:
            return
        contrasted = self.contrast is not None and trainer.testing
        networks = {TRAINED: (self.modality, self.against) if contrasted else (self.modality,)}
        if contrasted and self._twin is not None:
            networks[RANDOM] = (self.modality,)
        for network, modalities in networks.items():
            with weights(pl_module, self._twin if network == RANDOM else None):
                h = {m: _features(trainer, pl_module, batch, m) for m in modalities if m in batch.inputs}
            if self.modality not in h:
                raise ValueError(f"Readout: no features of {self.modality!r}; the data has {', '.join(batch.present)}")
            self._features.setdefault((dataloader_idx, network), Store().to(pl_module.device)).update(h, batch)

    # evaluating ----------------------------------------------------------------------------------------------------

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        unknown = [name for name in self.sets or [] if name not in sets]
        if unknown and trainer.testing:
            raise ValueError(f"Readout: sets: no set {unknown[0]!r}; the data has {', '.join(sets)}")
        values: dict[str, Tensor] = {}
        for number, name in enumerate(sets):
            if (number, TRAINED) not in self._features:
                continue
            networks = {network: store.compute() for (n, network), store in self._features.items() if n == number}
            known = [target for target in self.targets if target in networks[TRAINED].targets]
            if not known:
                self.require_target(self.targets[0], networks[TRAINED].targets, repr(name))
            for target in known:
                suffix = "" if self.modality == "image" else f"_{self.modality}"
                key = f"{name}/readout_{target}{suffix}"
                values |= {key + end: value for end, value in self._read(networks, target).items()}
        return values

    def _read(self, networks: Mapping[str, Rows], target: str) -> dict[str, Tensor]:
        rows = networks[TRAINED]
        y = rows.targets[target]
        if not y.is_floating_point():
            raise ValueError(f"Readout: target {target!r} holds classes, not numbers; use LinearProbe for those")
        here = rows.where(self.modality)
        trained = self.ridge(self._x(rows, self.modality, here), y[here])
        values = _mean("", trained)
        if self.contrast is None or not values:
            return values
        if RANDOM in networks:
            twin = self.ridge(self._x(networks[RANDOM], self.modality, here), y[here])
            values |= _mean("_random", twin)
            values["_beats_random"] = self.contrast.beats(trained, twin).double().mean()
        if self.against in rows.z:
            both = (rows.present[self.modality] & rows.present[self.against]).nonzero().squeeze(1)
            x_a_NP, x_b_NP = (self._x(rows, m, both) for m in (self.modality, self.against))
            a, b, concat, fused = (
                self.ridge(x, y[both])
                for x in (x_a_NP, x_b_NP, torch.cat([x_a_NP, x_b_NP], 1), Products(x_a_NP, x_b_NP, self.components))
            )
            if bool((a.fold >= 0).any()):
                values["_integration"] = self.contrast.integration(fused, a, b, concat).double().mean()
                values["_integration_concat"] = self.contrast.integration(concat, a, b).double().mean()
        return values

    def _x(self, rows: Rows, modality: str, here: Tensor) -> Tensor:
        x_NP = rows.z[modality][here]
        if self.shuffle:  # a cycle in a random order of the samples, so each gets another's
            order_N = torch.from_numpy(mix_N(rows.index[here], "readout/shuffle")).to(here.device).argsort(stable=True)
            x_NP = x_NP.clone().index_copy_(0, order_N, x_NP[order_N.roll(-1)])
        return x_NP


# helpers -----------------------------------------------------------------------------------------------------------


@contextmanager
def weights(module: nn.Module, state: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Give a module other weights within the block, and restore its own afterwards; None changes nothing."""
    if state is None:
        yield
        return
    before = {name: value.detach().clone() for name, value in module.state_dict().items()}
    try:
        module.load_state_dict(dict(state))
        yield
    finally:
        module.load_state_dict(before)


def _features(trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, modality: str) -> Tensor:
    assert has(pl_module, Features)
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        return pl_module.present_features(batch, modality)


def _mean(end: str, reading: Reading) -> dict[str, Tensor]:
    """Average r over the columns that have one; nan if features are not finite, {} for a target without values."""
    if not bool((reading.fold >= 0).any()):
        return {}
    broken = bool(reading.predicted[reading.fold >= 0].isnan().any())
    mean = reading.r.mean() if broken else reading.r.nanmean()
    return {end: mean} if broken or not bool(mean.isnan()) else {}
