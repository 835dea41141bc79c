"""GradDrop against a loop over coordinates, and in a fit at a shared feature."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from descant.callbacks import HarmonizeFeatures
from descant.modules.multitask.graddrop import GradDrop, graddrop
from descant.recipes import Contrastive
from tests._suites import SampleData, towers


def test_it_is_the_loop_over_coordinates() -> None:
    g = torch.Generator().manual_seed(0)
    g_KBD, u_D = torch.randn(3, 5, 4, generator=g, dtype=torch.float64), torch.rand(4, generator=g, dtype=torch.float64)
    found = graddrop(g_KBD, u_D, leak=0.25)
    for b in range(5):
        for d in range(4):
            x = g_KBD[:, b, d].tolist()
            purity = (1 + sum(x) / sum(map(abs, x))) / 2
            kept = [v if (v > 0) == (purity > float(u_D[d])) else 0.25 * v for v in x]
            assert float(found[b, d]) == pytest.approx(sum(kept), abs=1e-15)  # three terms


def test_a_leak_of_one_is_the_plain_sum_in_a_fit() -> None:
    def fitted(*callbacks: L.Callback) -> torch.Tensor:
        recipe = Contrastive(towers(), width=4).double()
        quiet: dict[str, Any] = {
            "enable_checkpointing": False,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
        }
        trainer = L.Trainer(max_steps=3, accelerator="cpu", callbacks=list(callbacks), precision="64-true", **quiet)
        trainer.fit(recipe, datamodule=SampleData())
        return torch.cat([p.detach().flatten() for p in recipe.parameters()])

    plain, whole, dropped = fitted(), fitted(HarmonizeFeatures(GradDrop(1.0))), fitted(HarmonizeFeatures(GradDrop()))
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-13)  # sums of copies in another order
    assert not torch.allclose(dropped, plain, atol=1e-6)
