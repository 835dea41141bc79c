"""FLOPs and bytes of one operator, from the shapes of its arguments."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from descant.modules.training_setup.flops import grouped_flops

#: Operators that make a tensor, or another view of one, without launching a kernel.
WITHOUT_KERNEL = (
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "_unsafe_view",
    "lift_fresh", "resize_", "set_",
)  # fmt: skip


@cache
def is_view(func: Any) -> bool:
    """Whether an operator returns only views of its arguments."""
    returns = [r.alias_info for r in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


@cache
def writes(func: Any) -> tuple[tuple[int, str], ...]:
    """Return positions and names of the arguments that an operator changes.

    Gradients of fused optimizers are left out: they change only if they are scaled.
    """
    fused = func._schema.name.startswith("aten::_fused_")
    changed = [(n, a.name) for n, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    return tuple((n, name) for n, name in changed if not (fused and name == "grads"))


def nbytes(x: Any) -> int:
    """Return the bytes of a tensor, or 0 for anything else."""
    return x.numel() * x.element_size() if isinstance(x, Tensor) else 0


def kernel_bytes(x: Tensor) -> int:
    """Return the bytes that a kernel moves for a tensor; it reads expanded rows once."""
    return min(nbytes(x), x.untyped_storage().nbytes())


def flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Count the FLOPs of products, convolutions and attention (without skipping masked pairs); others count 0."""
    packet, name = func._overloadpacket, func._schema.name.partition("::")[2]
    aten: Any = torch.ops.aten
    if name in _ATTENTION:  # several query heads may share one key head
        (*rows, _, Q, E), (*_, K, _) = (args[_ATTENTION[name] + n].shape for n in range(2))
        products = 2 if _ATTENTION[name] == 0 else 5  # backward recomputes the attention weights
        return int(2 * products * math.prod(rows) * args[_ATTENTION[name]].shape[-3] * Q * K * E)
    if packet is aten._grouped_mm:  # as if every row belonged to a group
        return grouped_flops(args[0], args[1]) if args[0].ndim != 2 else 2 * args[0].numel() * args[1].shape[-1]
    if packet not in flop_registry and name.endswith("_"):  # in-place operators have the formula of their base operator
        packet = getattr(aten, name.removesuffix("_"), packet)
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


#: Fused attention -> index of its queries among its arguments; dropout and the causal flag come last.
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 0,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 1,
}


def unmasked_share(func: Any, args: Any) -> float:
    """Return (T + 1) / 2T for causal attention over T positions, the share of unmasked pairs; otherwise 1."""
    first = _ATTENTION.get(func._schema.name.partition("::")[2])
    causal = {0: 4, 1: 7}
    if first is None or len(args) <= causal[first] or not args[causal[first]]:
        return 1.0
    length = int(args[first].shape[-2])
    return (length + 1) / (2 * length)
