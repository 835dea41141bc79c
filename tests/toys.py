"""A toy recipe and toy data: linear towers on random tensors, for tests of everything around a method.

On the command line they need ``--trust tests.toys``. Letters: B samples, D width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.rng import mix
from descant.recipes.base.recipe import Recipe

FEATURES = 4


class ToyTower(nn.Module):
    """``[B, 4] -> [B, width]``.

    Args:
        width: of the output.
        depth: layers.
        bias: whether layers have one.
    """

    def __init__(self, width: int = 4, depth: int = 1, bias: bool = True) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width {width}: at least 1")
        sizes = [FEATURES, *[width] * depth]
        self.layers = nn.Sequential(*(nn.Linear(a, b, bias) for a, b in pairwise(sizes)))

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.layers(x_BD)


class ToyRecipe(Recipe):
    """Two linear towers that should agree.

    Args:
        image: the tower of one modality.
        text: the tower of the other.
        scale: of the loss.
        explode: raise this kind of error in a training step: "value", "type" or "nan".
    """

    def __init__(
        self,
        image: ToyTower,
        text: ToyTower | None = None,
        scale: float = 1.0,
        explode: str | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]  # the base's own typed arguments
        self.towers = nn.ModuleDict({"image": image, "text": text or ToyTower()})
        self.scale, self.explode = scale, explode

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return {name: tower(batch.inputs[name]) for name, tower in self.towers.items()}

    def forward(self, batch: Batch) -> Output:
        if self.explode == "value":
            raise ValueError("the data has no modality 'sound'")
        if self.explode == "type":
            raise TypeError("a fault of the program")
        z = self.embed(batch)
        value_B = self.scale * (z["image"] - z["text"]).square().mean(1)
        if self.explode == "nan":
            value_B = value_B * float("nan")
        return Output({"image-text": Term(value_B, valid=batch.both("image", "text"))})

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        z = self.embed(batch)
        if self.trainer.predicting:
            return {"z": z}
        stage = "test" if self.trainer.testing else "val"
        self.log(f"{stage}/gap", (z["image"] - z["text"]).square().mean(), batch_size=len(batch))
        return {"z": z}


class ToyData(L.LightningDataModule):
    """Random tensors.

    Args:
        batch_size: rows of a step.
        batches: steps of an epoch.
        folder: a folder that must exist, or none.
        tiny: fewer of them.
    """

    def __init__(self, batch_size: int = 8, batches: int = 4, folder: str | None = None, tiny: bool = False) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"batch_size {batch_size}: at least 2")
        self.batch_size, self.batches, self.folder = batch_size, 2 if tiny else batches, folder

    def setup(self, stage: str) -> None:
        if self.folder is not None:
            with open(self.folder, encoding="utf-8"):
                pass

    def _batch(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(mix(0, "toy", number) % 2**31)
        x_BD = torch.randn(self.batch_size, FEATURES, generator=generator)
        present_B = torch.ones(self.batch_size, dtype=torch.bool)
        index_B = number * self.batch_size + torch.arange(self.batch_size)
        whole = Batch({"image": x_BD, "text": x_BD.flip(1)}, {"image": present_B, "text": present_B}, index=index_B)
        trainer: Any = self.trainer  # ranks share the rows of a batch, so that any number of them trains on the same
        return whole if trainer is None else whole.select(slice(trainer.global_rank, None, trainer.world_size))

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader([self._batch(n) for n in range(self.batches)], batch_size=None)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Spoil(L.Callback):
    """Makes the gradients of one step not finite.

    Args:
        step: which.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self.step:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(float("nan"))
