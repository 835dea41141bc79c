"""Properties that contrastive losses share; each loss's test picks its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tolerance import F64, rounding

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def embeddings(
    rows: int = 6, width: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = (torch.randn(rows, width, generator=generator, dtype=dtype) for _ in range(2))
    a, b = (F.normalize(z, dim=-1).requires_grad_() for z in pair)
    return a, b


def everyone(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.bool)


def assert_one_value_a_sample(loss: Loss) -> None:
    a, b = embeddings()
    value_B = loss(a, b, torch.arange(6), everyone(6))
    assert value_B.shape == (6,)
    assert torch.isfinite(value_B).all()


def assert_order_of_rows_is_free(loss: Loss) -> None:
    a, b = embeddings()
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    value_B = loss(a, b, torch.arange(6), everyone(6))
    # sums over width 5 and 6 rows, times a scale of about 10
    torch.testing.assert_close(
        loss(a[order], b[order], torch.arange(6), everyone(6)), value_B[order], **rounding(64, F64)
    )


def assert_absent_rows_are_as_if_never_there(loss: Loss) -> None:
    """Values and gradients equal those of the batch without the absent rows, which get no gradient at all."""
    a, b = embeddings()
    valid = torch.tensor([True, True, False, True, False, True])
    value_B = loss(a, b, torch.arange(6), valid)
    small_a, small_b = a[valid].detach().requires_grad_(), b[valid].detach().requires_grad_()
    small_B = loss(small_a, small_b, torch.arange(6)[valid], everyone(4))
    # as above; a smaller batch may go through another kernel
    torch.testing.assert_close(value_B[valid], small_B, **rounding(64, F64))
    grad_a, grad_b = torch.autograd.grad(torch.where(valid, value_B, 0.0).sum(), (a, b))
    want_a, want_b = torch.autograd.grad(small_B.sum(), (small_a, small_b))
    torch.testing.assert_close(grad_a[valid], want_a, **rounding(64, F64))
    torch.testing.assert_close(grad_b[valid], want_b, **rounding(64, F64))
    assert not grad_a[~valid].any()
    assert not grad_b[~valid].any()


def assert_equal_keys_are_no_negatives(loss: Loss) -> None:
    """Row 0's value does not depend on row 3, which carries the same content; with another key it does."""
    a, b = embeddings()
    key = torch.tensor([0, 1, 2, 0, 4, 5])
    moved_a, moved_b = a.detach().clone(), b.detach().clone()
    moved_a[3], moved_b[3] = -a[3].detach(), -b[3].detach()
    same = loss(a, b, key, everyone(6))[0], loss(moved_a, moved_b, key, everyone(6))[0]
    torch.testing.assert_close(*same, **rounding(64, F64))  # row 3 drops out of sums, whose kernel may differ
    other = (
        loss(a, b, torch.arange(6), everyone(6))[0],
        loss(moved_a, moved_b, torch.arange(6), everyone(6))[0],
    )
    assert abs(float(other[0] - other[1])) > 1e-6


def assert_alignment_lowers_it(loss: Loss) -> None:
    a, b = embeddings(rows=4, width=8)
    assert float(loss(a, a, torch.arange(4), everyone(4)).sum()) < float(loss(a, b, torch.arange(4), everyone(4)).sum())


def assert_all_absent_is_finite(loss: Loss) -> None:
    a, b = embeddings()
    valid = torch.zeros(6, dtype=torch.bool)
    value = torch.where(valid, loss(a, b, torch.arange(6), valid), 0.0).sum()
    for grad in torch.autograd.grad(value, (a, b)):
        assert torch.isfinite(grad).all()
        assert not grad.any()
