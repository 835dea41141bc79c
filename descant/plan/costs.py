"""FLOPs and bytes of one operator, from the shapes of what it is given."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from descant.modules.training_setup.flops import grouped_flops

#: Operators that make a tensor, or another view of one, and launch nothing.
WITHOUT_KERNEL = (
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "_unsafe_view",
    "lift_fresh", "resize_", "set_",
)  # fmt: skip


@cache
def is_view(func: Any) -> bool:
    """Whether an operator gives only views of its arguments."""
    returns = [r.alias_info for r in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


@cache
def writes(func: Any) -> tuple[int, ...]:
    """Places of the arguments that an operator changes."""
    arguments = enumerate(func._schema.arguments)
    return tuple(n for n, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def nbytes(x: Any) -> int:
    """Of a tensor; 0 of anything else."""
    return x.numel() * x.element_size() if isinstance(x, Tensor) else 0


def moved(x: Tensor) -> int:
    """Bytes that a kernel moves for a tensor: rows that are expanded are read once."""
    return min(nbytes(x), x.untyped_storage().nbytes())


def flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Of products, convolutions and attention, which is counted in full; 0 of others."""
    packet, name = func._overloadpacket, func._schema.name.partition("::")[2]
    aten: Any = torch.ops.aten
    if name in _ATTENTION:  # heads of queries, of which several may share keys
        (*rows, _, Q, E), (*_, K, _) = (args[_ATTENTION[name] + n].shape for n in range(2))
        products = 2 if _ATTENTION[name] == 0 else 5  # backward makes the weights again
        return int(2 * products * math.prod(rows) * args[_ATTENTION[name]].shape[-3] * Q * K * E)
    if packet is aten._grouped_mm:  # as if every row were of a group
        return grouped_flops(args[0], args[1]) if args[0].ndim != 2 else 2 * args[0].numel() * args[1].shape[-1]
    if packet not in flop_registry and name.endswith("_"):  # in place
        packet = getattr(aten, name.removesuffix("_"), packet)
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


#: Fused attention -> where its queries are among its arguments; dropout and whether it is causal come last.
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 0,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 1,
}


def done(func: Any, args: Any) -> float:
    """Of causal attention over T positions (T + 1) / 2T, the pairs that are not masked; of all others 1."""
    first = _ATTENTION.get(func._schema.name.partition("::")[2])
    causal = {0: 4, 1: 7}
    if first is None or len(args) <= causal[first] or not args[causal[first]]:
        return 1.0
    length = int(args[first].shape[-2])
    return (length + 1) / (2 * length)
