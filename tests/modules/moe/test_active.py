"""What a token meets of a model with experts: parameters, and FLOPs as torch's own counter has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from descant.callbacks import ExpertUsage, Report
from descant.modules.language import CausalLM
from descant.modules.moe import (
    ExpertLayers,
    HardModality,
    Marks,
    ModalityTopK,
    MoELayer,
    Router,
    TopKRouter,
    TopPRouter,
)
from descant.modules.moe.active import active_parameters
from descant.modules.moe.grouped import GELU, Segments, Weights, expert_mlp
from descant.modules.training_setup.flops import FlopCount

N, D, F, E = 48, 8, 12, 4


@pytest.mark.parametrize(
    "router",
    [TopKRouter(2), TopKRouter(1, "before"), HardModality([3, 1]), TopPRouter(0.6, null_experts=2), TopPRouter(0.9)],
)
def test_flops_of_what_a_token_meets(router: Router) -> None:
    torch.manual_seed(0)
    layer, h_ND = MoELayer(D, F, E, router, shared=1), torch.randn(N, D, requires_grad=True)
    counts = list[int]()
    for counter in (FlopCounterMode(display=False), FlopCount()):
        with counter:
            y_ND, routing = layer(h_ND, Marks(torch.arange(N) % 2))
            forward = counter.get_total_flops() if isinstance(counter, FlopCounterMode) else counter.flops
            y_ND.sum().backward()
        counts += [forward, counter.get_total_flops() if isinstance(counter, FlopCounterMode) else counter.flops]
    assert counts[:2] == counts[2:]
    meets = int(routing.runs(E).sum()) / N
    active = active_parameters(layer, {"": meets})
    assert active is not None and counts[0] == round(2 * N * active)
    assert counts[1] == 3 * counts[0]  # of the input and of the weights in backward, and nothing again
    assert (layer.router.meets is None) == isinstance(router, TopPRouter) and layer.router.meets in (None, meets)


def test_the_grouped_kernel_counts_what_the_loop_does() -> None:
    """Rows behind the last expert, of padding and null experts, are none of either."""
    count_E, flops = torch.tensor([3, 0, 5]), []
    for fused in (False, True):
        x, w_1, w_2 = (torch.randn(*size, requires_grad=True) for size in ((10, 16), (3, 8, 16), (3, 16, 8)))
        segments = Segments(count_E, fused)
        with FlopCount() as count:
            y = expert_mlp(x[segments.rows(torch.arange(10))], Weights([w_1], [w_2]), GELU, segments)
            y[:8].square().sum().backward()
        flops.append(count.flops)
    assert flops == [3 * 2 * 8 * 2 * 16 * 8] * 2


def test_a_run_reports_all_parameters_and_the_active() -> None:
    def reported(router: Router, active: dict[str, float]) -> Report:
        lm, usage, report = CausalLM(20, D, 2, 2, experts=ExpertLayers(E, router, F, every=2)), ExpertUsage(), Report()
        usage.active = active
        trainer: Any = SimpleNamespace(callbacks=[usage], global_step=0, current_epoch=0)
        report.values = report._run(trainer, lm)  # type: ignore[arg-type]  # a network alone
        return report

    known = reported(ModalityTopK([[0, 1], [1, 2]]), {}).values
    expert = 3 * D * F
    assert known["parameters"] - known["parameters_active"] == (E - 2) * expert
    assert "parameters_active" not in reported(TopPRouter(0.9), {}).values
    measured = reported(TopPRouter(0.9), {"layers.1.moe": 1.5})
    assert measured.values["parameters"] - measured.values["parameters_active"] == 2.5 * expert
    assert "0.00247 M parameters, 0.00175 M active a token" in measured.summary()
