"""FLOPs of training: a counter of operators, the cost of training steps, and the total of a run.

Letters: B rows, N and M sides of a matrix product; for a total, K counted micro-batches, F features.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from descant.modules.core.batch import Batch
from descant.modules.core.compat.dispatch import TorchDispatchMode
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.ranks import total_of_ranks
from descant.modules.core.recomputation import is_recomputing

#: Fused attention on the CPU, which torch's table of FLOP formulas lacks.
_ATTENTION_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
#: The grouped product of sparse experts, which the table lacks too.
_GROUPED = torch.ops.aten._grouped_mm
#: One in so many micro-batches is always counted; a prime, so that a callback's work every 10 steps is counted too.
EVERY = 199


class FlopCount(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention inside it.

    A product ``[B, N] x [N, M]`` counts ``2 B N M``, by torch's formulas (``torch.utils.flop_counter``). Unlike
    FlopCounterMode it decomposes no operator and hooks no module, so results stay bit-identical. Kernels without a
    formula (custom, Triton, bitsandbytes) count nothing.

    ``model_flops`` leaves out the FLOPs that backward repeats (:func:`repeated_share`), as MFU does.

    >>> with FlopCount() as count:
    ...     _ = torch.zeros(5, 3) @ torch.zeros(3, 2)
    >>> count.flops, count.model_flops
    (60, 60)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.model_flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        before = self.flops
        if packet is _ATTENTION_CPU:
            count: Any = sdpa_flop_count
            self.flops += count(*(x.shape for x in args[:3]))
        elif packet is _ATTENTION_CPU_BACKWARD:
            count = sdpa_backward_flop_count
            self.flops += count(*(x.shape for x in args[:4]))
        elif packet is _GROUPED:
            self.flops += grouped_flops(*args, **kwargs)
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=out))
        if self.flops > before:
            self.model_flops += round((self.flops - before) * (1 - repeated_share(func)))
        return out


def repeated_share(func: Any) -> float:
    """Return the share of an operator's FLOPs that repeats the forward pass.

    It is 1 while backward recomputes a block or logits. It is 1/5 in the backward of fused attention, where one of five
    products recomputes the attention weights. Otherwise it is 0.

    >>> repeated_share(torch.ops.aten.mm.default)
    0.0
    >>> repeated_share(torch.ops.aten._scaled_dot_product_flash_attention_backward.default)
    0.2
    """
    if is_recomputing():
        return 1.0
    name = func._schema.name
    return 0.2 if "_attention" in name and name.endswith("_backward") else 0.0


def grouped_flops(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> int:
    """Count ``2 I O`` for each row of a group: for rows by matrices ``[M, I] [G, I, O]``, for gradients
    ``[I, M] [M, O]``, or for batches. Rows after the last group (null experts, padding) count nothing. Reads ``offs``.

    >>> grouped_flops(torch.zeros(9, 4), torch.zeros(2, 4, 3), torch.tensor([2, 5])) == 5 * 2 * 4 * 3
    True
    """
    if offs is None:
        return 2 * a.numel() * b.shape[-1]
    sides = (len(a), b.shape[1]) if a.ndim == b.ndim else b.shape[1:] if a.ndim == 2 else a.shape[1:]
    return 2 * int(offs[-1]) * sides[0] * sides[1]


def count_flops(recipe: Any, batches: Iterable[Batch], prepare: Callable[[Any], None]) -> int:
    """Count the FLOPs of forward and backward passes over micro-batches, over all ranks together. Collective.

    The passes run on a copy of the recipe, after ``prepare(copy)``: weights, buffers and random generators stay as they
    are. The copy has no gradient hooks, so the work of a harmonizer is not counted.

    Args:
        recipe: in training, with ``hooks`` and ``objective_of(batch)``.
        batches: this rank's micro-batches, on its device.
        prepare: changes the copy, such as by going on to a stage.
    """
    twin, flops = twin_of(recipe, prepare), 0
    for batch in batches:
        with trying(recipe), FlopCount() as count:
            twin.objective_of(batch).total.backward()
        flops += count.flops
    return int(total_of_ranks(torch.tensor(flops, device=recipe.device)))


def twin_of(recipe: Any, prepare: Callable[[Any], None]) -> Any:
    """Copy a recipe in training, without gradient hooks, to try steps on the copy."""
    if recipe.sharding is not None:
        raise ValueError(
            "flops: no copy to count on is made of a model split over ranks (shard); give steps or samples"
        )
    # without the loss of the last step, whose graph cannot be copied
    twin = copy.deepcopy(recipe, {id(recipe.hooks): GradientHooks(), id(recipe.step.objective): None})
    twin.trainer = recipe.trainer
    prepare(twin)
    return twin


@contextmanager
def trying(recipe: Any) -> Iterator[None]:
    """Run steps in the precision of the run, and leave the random generators as they are."""
    device = recipe.device
    random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with random, recipe.trainer.precision_plugin.train_step_context():
        yield


#: Features on which the cost of a micro-batch depends: the amount of data of each modality.
Features = tuple[float, ...]


@dataclass
class _Kind:
    """Micro-batches of one kind: counted costs by features, how many have these features, and sums of the others'."""

    counted: dict[Features, list[int]] = field(default_factory=dict)
    alike: dict[Features, int] = field(default_factory=dict)
    others: int = 0
    sums: list[float] = field(default_factory=list)
    seen: int = 0

    def wants(self, x_F: Features) -> bool:
        known = self.counted.get(x_F, [])
        open_ = len(known) < 2 or len(set(known)) > 1
        return self.seen % EVERY == EVERY - 1 or (open_ and sum(map(len, self.counted.values())) < len(x_F) + 2)

    def cost(self, x_F: Features) -> float:
        if x_F in self.counted:
            return fmean(self.counted[x_F])
        x_KF = np.array([x for x, costs in self.counted.items() for _ in costs])
        y_K = np.array([float(cost) for costs in self.counted.values() for cost in costs])
        mean_F, scale_F = x_KF.mean(axis=0), np.maximum(np.abs(x_KF).max(axis=0), 1e-9)
        slope_F = np.linalg.lstsq((x_KF - mean_F) / scale_F, y_K - y_K.mean(), rcond=1e-9)[0]
        return max(float(y_K.mean() + (np.array(x_F) - mean_F) / scale_F @ slope_F), 0.0)

    @property
    def total(self) -> float:
        alike = sum(n * fmean(self.counted[x]) for x, n in self.alike.items())
        return alike + (self.others * self.cost(tuple(x / self.others for x in self.sums)) if self.others else 0.0)


class FlopTotal:
    """Total FLOPs of all micro-batches of a run, of which only a few are counted.

    Counting takes about half as long as a step. If samples lack modalities at random, almost every micro-batch has
    different numbers of rows. Only present rows are computed, so the cost is nearly affine in ``x_F``, the number of
    elements in present rows by modality,

        y(x) = mean(y) + slope . (x - mean(x)),     by least squares (of least norm) over the counted ones,

    and the total of all uncounted ones is their number times the cost of their mean ``x``: two sums, which a checkpoint
    holds exactly. Losses over all pairs are quadratic, but masked, so their cost is constant. Features that were
    counted have the mean of their counts. Of each kind, the first ``F + 2`` micro-batches are counted (two if their
    costs are the same), then one in :data:`EVERY`. This takes 0.3 % of the time and finds costs that features do not
    show.

    >>> total = FlopTotal()
    >>> for rows in (4, 2, 3, 7):
    ...     total.add("any", (rows,), 10 + 5 * rows if total.wants("any", (rows,)) else None)
    >>> round(total.total, 6), total.wants("any", (9,)), total.wants("other", (9,))
    (120.0, False, True)
    """

    def __init__(self) -> None:
        self._kinds: defaultdict[str, _Kind] = defaultdict(_Kind)

    @property
    def total(self) -> float:
        return sum(kind.total for kind in self._kinds.values())

    def wants(self, kind: str, x_F: Features) -> bool:
        """Whether a micro-batch with these features should be counted."""
        return self._kinds[kind].wants(x_F)

    def cost(self, kind: str, x_F: Features) -> float:
        """Estimate the FLOPs of a micro-batch; at least one of its kind must have been counted."""
        return self._kinds[kind].cost(x_F)

    def add(self, kind: str, x_F: Features, flops: int | None, mean_F: Features | None = None, ranks: int = 1) -> None:
        """Add one micro-batch on each of ``ranks`` ranks.

        Args:
            kind: what else the cost depends on. x_F: this rank's features; ``flops`` is their count, or None.
            mean_F: mean features over all ranks and all micro-batches of the step; by default ``x_F``.
        """
        of, mean_F = self._kinds[kind], x_F if mean_F is None else mean_F
        of.seen += 1
        if flops is not None:
            of.counted.setdefault(x_F, []).append(flops)
        if mean_F in of.counted:
            of.alike[mean_F] = of.alike.get(mean_F, 0) + ranks
        else:
            of.others += ranks
            of.sums = [a + ranks * b for a, b in zip(of.sums or [0.0] * len(mean_F), mean_F, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {name: asdict(kind) for name, kind in self._kinds.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kinds = defaultdict(_Kind, {name: _Kind(**kind) for name, kind in state_dict.items()})
