"""Experts on one token a row, as generation computes them, against the layer: padded, sorted, few and many rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from descant.modules.language import decode_layers
from descant.modules.language.decode_layers import FEW, DecodeExperts
from descant.modules.moe import CausalAux, ExpertChoice, HardModality, Marks, MoELayer, Router, TopKRouter, TopPRouter
from tests.tolerance import F32, rounding

ROUTERS: dict[str, Callable[[], Router]] = {
    "after": lambda: TopKRouter(2),
    "before": lambda: TopKRouter(1, "before"),
    "biased": lambda: TopKRouter(2, bias_rate=0.1),
    "null": lambda: TopPRouter(0.6, null_experts=2),
    "one": lambda: HardModality([2, 2]),
    "none": lambda: ExpertChoice(auxiliary=CausalAux(4)),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("rows", [1, 9, FEW + 1])
def test_rows_are_those_of_the_layer(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = MoELayer(16, 24, 4, ROUTERS[name]()).eval()
    if name == "biased":
        layer.router.bias_E.copy_(torch.tensor([0.0, 0.5, 0.0, -0.5]))  # type: ignore[operator]
    for p in layer.parameters():
        p.data.mul_(10)
    h_SD, x_SD = torch.randn(rows, 16), torch.randn(rows, 16)
    marks = Marks(kind=torch.arange(rows) % 2)
    with torch.no_grad():
        wanted = h_SD + layer(x_SD, marks)[0]
        decode = DecodeExperts(layer)
        torch.testing.assert_close(decode(h_SD, x_SD, marks), wanted, **rounding(256, F32))
        monkeypatch.setattr(decode_layers, "PADDED", 0)  # each expert's rows alone
        torch.testing.assert_close(decode(h_SD, x_SD, marks), wanted, **rounding(256, F32))
        double = DecodeExperts(layer.double())(h_SD.double(), x_SD.double(), marks)
    torch.testing.assert_close(double.float(), wanted, **rounding(256, F32))
