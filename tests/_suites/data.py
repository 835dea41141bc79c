"""Small float64 samples of three modalities with holes, and towers for them. Letters: B samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.modules.core.batch import Batch
from descant.modules.towers import Tokens, Tower, Towers

#: Numbers of one sample by modality.
MODALITIES = {"image": 6, "text": 5, "audio": 4}
CLASSES = 3


class TwoLayerTower(Tower):
    """Two layers without dropout, whose rows do not meet."""

    def __init__(self, width_in: int, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(width_in, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        return Tokens(self.layers(x)[:, None], torch.ones(len(x), 1, dtype=torch.bool, device=x.device))


def towers(*modalities: str) -> Towers:
    """One small tower a modality, with the same weights in every process."""
    torch.manual_seed(0)
    return Towers(others={m: TwoLayerTower(MODALITIES[m]) for m in modalities or MODALITIES})


class Samples(BatchDataset):
    """``count`` samples; by ``holes`` some lack modalities, and absent rows hold nan."""

    def __init__(self, count: int = 16, modalities: tuple[str, ...] = tuple(MODALITIES), holes: bool = True) -> None:
        super().__init__(0)
        g = torch.Generator().manual_seed(1)
        self.label_N = torch.randint(0, CLASSES, (count,), generator=g)
        self.content = {m: torch.randn(count, MODALITIES[m], generator=g, dtype=torch.float64) for m in MODALITIES}
        at_N = torch.arange(count)
        lacks = {"image": at_N % 7 == 2, "text": at_N % 5 == 3, "audio": at_N % 4 == 1}
        self.has = {m: ~lacks[m] | (not holes) for m in modalities}
        self.content = {m: self.content[m].masked_fill(~self.has[m][:, None], torch.nan) for m in modalities}

    def __len__(self) -> int:
        return len(self.label_N)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {m: has_N[torch.from_numpy(index_N)] for m, has_N in self.has.items()}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        at_B = torch.from_numpy(index_B)
        return Rows({m: x[at_B] for m, x in self.content.items()}, {"label": self.label_N[at_B]}, at_B)


def samples(count: int = 16, *modalities: str, holes: bool = True) -> Batch:
    """One batch of :class:`Samples`."""
    held, at = Samples(count, modalities or tuple(MODALITIES), holes), np.arange(count)
    rows = held.rows(at, at)
    return Batch(rows.inputs, held.present(at), rows.targets, rng_seed=torch.arange(count) * 7919 + 13)


class SampleData(DataModule):
    """Samples as training and validation data."""

    def __init__(self, count: int = 24, batch_size: int = 8, modalities: tuple[str, ...] = tuple(MODALITIES)) -> None:
        super().__init__(batch_size)
        self.count, self.names = count, modalities

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.names

    def training_set(self) -> BatchDataset:
        return Samples(self.count, self.names)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Samples(self.count, self.names)}
