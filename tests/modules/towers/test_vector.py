"""Tower of float vectors: values, independent rows, and one error line each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from descant.modules.towers import VectorTower
from tests.modules.towers import _asserts
from tests.tolerance import F32, F64, rounding


def tower(depth: int = 2) -> VectorTower:
    torch.manual_seed(0)
    return VectorTower(inputs=6, width=8, depth=depth)


def test_it_is_an_mlp_of_one_token_a_sample() -> None:
    x, mlp = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), tower()
    h, linears = x, [part for part in mlp.modules() if isinstance(part, nn.Linear)]
    for linear in linears:
        h = (h @ linear.weight.T + linear.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x).h_BTD[:, 0], h, **rounding(32, F32))
    assert mlp.width == 8 and len(mlp.blocks()) == 2
    _asserts.check_tokens(mlp, x, 1)
    _asserts.check_rows_independent(mlp, x)
    _asserts.check_deterministic(mlp, x)
    _asserts.check_frozen(mlp, x)


def test_without_relu_it_is_linear() -> None:
    flat = VectorTower(inputs=6, width=8, depth=2, relu=False).double()
    x, y = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)).double()
    h = [flat(z).h_BTD for z in (x, y, x + y, torch.zeros_like(x))]
    torch.testing.assert_close(h[0] + h[1], h[2] + h[3], **rounding(32, F64))


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(ValueError, match="depth 0: at least 1 layer"):
        tower(depth=0)
    with pytest.raises(ValueError, match=r"inputs 6: these vectors have the shape \(5,\)"):
        tower()(torch.zeros(2, 5))
