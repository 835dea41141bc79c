"""GradCache: features of a large batch, with the activations of only one chunk in memory at a time.

Letters: B samples, C chunks, R rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from descant.modules.core.batch_norm import recompute_contexts
from descant.modules.core.compat.layers import BatchNorm
from descant.modules.core.host import has_host_copy, host_copy, with_host_copy


def compute_in_chunks(function: Callable[[Tensor], Tensor], x_B: Tensor, chunks: int, module: nn.Module) -> Tensor:
    """Compute ``cat_c(function(x_c))`` over C chunks of rows; backward recomputes each chunk (Gao 2021, GradCache).

    Gradients equal those of ``function(x_B)`` if its rows do not interact. The paper has three passes: features without
    activations, the loss of all features, and each chunk again with its features' gradient. Here they are one ordinary
    backward, in which autograd frees a chunk before it computes the next. So DDP hooks fire once, and clipping, scalers
    and gradient probes work unchanged. The second pass repeats the same random draws. Without gradients, the batch is
    not split. Source: arXiv 2101.06983.

    Args:
        function: maps rows to rows.
        x_B: at least C rows.
        chunks: C; the sizes of the chunks differ by at most one row.
        module: the module that ``function`` runs; its batch norms count each chunk once.

    >>> layer, x_BD = nn.Linear(2, 1, bias=False), torch.arange(6.0).view(3, 2)
    >>> compute_in_chunks(layer, x_BD, 2, layer).sum().backward()
    >>> layer.weight.grad.tolist()
    [[6.0, 9.0]]
    """
    if chunks == 1 or not torch.is_grad_enabled():
        return function(x_B)

    parts, contexts = [], partial(recompute_contexts, module)
    for c, x_R in enumerate(x_B.tensor_split(chunks)):
        if has_host_copy(x_B):
            x_R = with_host_copy(x_R, partial(_piece, x_B, chunks, c))
        # if autocast cached one cast weight for all chunks, their gradients would be summed in half precision
        torch.clear_autocast_cache()
        parts.append(checkpoint(function, x_R, use_reentrant=False, context_fn=contexts))
    torch.clear_autocast_cache()
    return torch.cat(parts)


def _piece(x_B: Tensor, chunks: int, c: int) -> Tensor:
    return host_copy(x_B).tensor_split(chunks)[c]


def require_useful_chunks(chunks: int, recipe: Any) -> None:
    """Raise ValueError for less than one chunk, or for several if accumulation gives the same for less compute."""
    if chunks < 1:
        raise ValueError(f"chunks {chunks}: at least 1")
    if chunks > 1 and not recipe.in_batch_negatives:
        raise ValueError(
            f"chunks {chunks}: no term of {type(recipe).__name__} contrasts samples of a batch, and "
            f"trainer.accumulate_grad_batches {chunks} equals the big batch for less compute; use that"
        )


def looks_at_the_batch(module: nn.Module) -> bool:
    """Whether rows interact inside a module, that is, whether it has a batch norm in train mode."""
    return any(isinstance(part, BatchNorm) and part.training for part in module.modules())


def nearest_divisor(rows: int, chunks: int) -> int:
    """Return the divisor of ``rows`` that is nearest to ``chunks``; of two, the larger, which takes less memory.

    >>> nearest_divisor(64, 3), nearest_divisor(64, 6), nearest_divisor(7, 9)
    (4, 8, 7)
    """
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    return min(divisors, key=lambda n: (abs(n - chunks), -n))
