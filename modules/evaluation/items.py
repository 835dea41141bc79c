"""Values of a metric by test item, whose weighted mean is the metric. Letters: N rows of a set, K distinct items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from descant.modules.io.files import write_bytes

#: File of a run with the items of its test, and the parts of each metric in it.
FILE = "items.safetensors"
PARTS = ("sum", "weight", "id")


@dataclass(frozen=True)
class Items:
    """Metric as the mean of one value per row: ``sum_n w_n value_n / sum_n w_n``.

    Attributes:
        value_N: float ``[N]``. id_N: int64 ``[N]``, the content of a row: rows with the same id are one item, such as
            drawings of one concept, and a bootstrap draws them together. weight_N: float ``[N]``; by default ones.

    >>> items = Items(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([7, 7, 3]))
    >>> round(float(items.mean()), 4), items.by_id()["sum"].tolist()
    (0.6667, [1.0, 1.0])
    """

    value_N: Tensor
    id_N: Tensor
    weight_N: Tensor | None = None

    def mean(self) -> Tensor:
        """Return the metric, in the dtype of its values."""
        if self.weight_N is None:
            return self.value_N.mean()
        return (self.weight_N * self.value_N).sum() / self.weight_N.sum()

    def by_id(self) -> dict[str, Tensor]:
        """Sum by id, on the CPU: ``id`` int64 ``[K]`` ascending; ``sum`` of ``w value`` and ``weight`` in float64."""
        id_N, value_N = self.id_N.cpu(), self.value_N.detach().cpu().double()
        weight_N = torch.ones_like(value_N) if self.weight_N is None else self.weight_N.cpu().double()
        id_K, at_N = id_N.unique(return_inverse=True)
        zero_K = torch.zeros(len(id_K), dtype=torch.float64)
        return {
            "sum": zero_K.index_add(0, at_N, weight_N * value_N),
            "weight": zero_K.index_add(0, at_N, weight_N),
            "id": id_K,
        }


def mean_of(parts: list[Items]) -> Items:
    """Return the mean of several metrics as one metric: ``1/P sum_p mean_p``, such as over sets or over groups.

    >>> a, b = (Items(torch.tensor(v), torch.arange(len(v))) for v in ([1.0, 0.0], [1.0]))
    >>> float(mean_of([a, b]).mean())
    0.75
    """
    weights = [torch.ones_like(p.value_N) if p.weight_N is None else p.weight_N for p in parts]
    return Items(
        torch.cat([p.value_N for p in parts]),
        torch.cat([p.id_N for p in parts]),
        torch.cat([w / w.sum() for w in weights]),
    )


def per_group(value_N: Tensor, group_N: Tensor, id_N: Tensor) -> Items:
    """Return the macro average as one metric: the mean over groups of each group's mean.

    >>> float(per_group(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([7, 7, 9]), torch.arange(3)).mean())
    0.5
    """
    _, at_N, rows_K = group_N.unique(return_inverse=True, return_counts=True)
    return Items(value_N, id_N, 1 / rows_K.to(value_N.dtype)[at_N])


class ItemStore(Metric):
    """Store of values and ids, collected batch by batch; ``items()`` gathers those of all ranks.

    >>> store = ItemStore()
    >>> store.update(torch.tensor([1.0]), torch.tensor([5]))
    >>> store.items().id_N
    tensor([5])
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("value", "id"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, value_B: Tensor, id_B: Tensor) -> None:
        states: Any = self
        states.value.append(value_B.detach())
        states.id.append(id_B)

    def compute(self) -> tuple[Tensor, Tensor]:
        states: Any = self
        return dim_zero_cat(states.value), dim_zero_cat(states.id)

    def items(self) -> Items:
        value_N, id_N = self.compute()
        return Items(value_N.reshape(-1), id_N.reshape(-1))  # torchmetrics squeezes tensors of one element


def save_items(file: Path, items: Mapping[str, Items]) -> None:
    """Replace a file with the items of all metrics, atomically."""
    parts = {f"{metric}#{part}": x for metric, of in sorted(items.items()) for part, x in of.by_id().items()}
    write_bytes(file, save(parts))
