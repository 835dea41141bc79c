"""FLOPs of training: a counter of operators, and the cost of training steps.

Letters: B rows, N and M sides of a matrix product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from descant.modules.core.batch import Batch
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.ranks import total_of_ranks

#: Fused attention on the CPU, which torch's table of FLOP formulas lacks.
_ATTENTION_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlopCount(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention inside it.

    A product ``[B, N] x [N, M]`` counts ``2 B N M``, by torch's formulas (``torch.utils.flop_counter``). Unlike
    FlopCounterMode it decomposes no operator and hooks no module, so results stay bit-identical. Kernels without a
    formula (custom, Triton, bitsandbytes) count nothing.

    >>> with FlopCount() as count:
    ...     _ = torch.zeros(5, 3) @ torch.zeros(3, 2)
    >>> count.flops
    60
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        if packet is _ATTENTION_CPU:
            count: Any = sdpa_flop_count
            self.flops += count(*(x.shape for x in args[:3]))
        elif packet is _ATTENTION_CPU_BACKWARD:
            count = sdpa_backward_flop_count
            self.flops += count(*(x.shape for x in args[:4]))
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=out))
        return out


def count_flops(recipe: Any, batches: Iterable[Batch], prepare: Callable[[Any], None]) -> int:
    """FLOPs of forward and backward passes over micro-batches, those of all ranks together. Collective.

    They run on a copy of the recipe, after ``prepare(copy)``: weights, buffers and random generators stay as they are.
    The copy has no gradient hooks, so what a harmonizer adds is not counted.

    Args:
        recipe: in training, with ``hooks`` and ``objective_of(batch)``.
        batches: this rank's micro-batches, on its device.
        prepare: such as going on to a stage.

    Raises:
        ValueError: for a model that is split over ranks.
    """
    if recipe.sharded:
        raise ValueError(
            "flops: no copy to count on is made of a model split over ranks (shard); give steps or samples"
        )
    twin = copy.deepcopy(recipe, {id(recipe.hooks): GradientHooks()})
    twin.trainer = recipe.trainer
    prepare(twin)
    flops, device = 0, recipe.device
    for batch in batches:
        random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with random, recipe.trainer.precision_plugin.train_step_context(), FlopCount() as count:
            twin.objective_of(batch).total.backward()
        flops += count.flops
    return int(total_of_ranks(torch.tensor(flops, device=device)))
