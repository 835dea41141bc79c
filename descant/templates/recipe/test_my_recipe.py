"""Test the terms of MyRecipe in numbers, and that it learns. Letters: B samples, D width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.evaluation.metrics import retrieval_ranks
from descant.modules.losses import InfoNCE
from descant.modules.towers import Tokens, Tower, Towers
from descant.templates.recipe.my_recipe import MyRecipe, align

WIDTHS = {"image": 8, "text": 6}


class Line(Tower):
    """Linear tower, ``[B, width_in] -> [B, 1, width]``."""

    def __init__(self, width_in: int, width: int = 16) -> None:
        super().__init__()
        self.width, self.linear = width, nn.Linear(width_in, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        return Tokens(self.linear(x)[:, None], torch.ones(len(x), 1, dtype=torch.bool))


def recipe(focus: float = 1.0) -> MyRecipe:
    torch.manual_seed(0)
    return MyRecipe(Towers(image=Line(8), text=Line(6)), width=8, focus=focus)


def pairs(rows: int, seed: int = 0) -> Batch:
    """Make two linear views of one hidden code."""
    g, views = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    code_B4 = torch.randn(rows, 4, generator=g)
    inputs = {m: code_B4 @ torch.randn(4, width, generator=views) for m, width in WIDTHS.items()}
    return Batch(inputs, {m: torch.ones(rows, dtype=torch.bool) for m in inputs})


def gradients(model: MyRecipe, batch: Batch) -> dict[str, Tensor]:
    model.step(model.terms(batch), batch).total.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def test_align_by_hand() -> None:
    """Check squared distances 0, 2, 4 for equal, orthogonal and opposite vectors; the weight takes no gradient."""
    z_a_BD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    z_b_BD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]])
    for focus, wanted in ((0.0, [1.0, 1.0, 1.0]), (1.0, [0.0, 0.5, 1.0]), (3.0, [0.0, 0.125, 1.0])):
        value_B, weight_B = align(z_a_BD, z_b_BD, focus)
        torch.testing.assert_close(value_B, torch.tensor([0.0, 2.0, 4.0]))
        torch.testing.assert_close(weight_B, torch.tensor(wanted))
        (gradient_BD,) = torch.autograd.grad((value_B * weight_B).sum(), z_a_BD)
        torch.testing.assert_close(gradient_BD, weight_B[:, None] * 2 * (z_a_BD - z_b_BD).detach())


def test_the_loss_is_the_formula() -> None:
    model, batch = recipe(focus=2.0), pairs(6)
    z = model.embed(batch)
    torch.testing.assert_close(z["image"].norm(dim=1), torch.ones(6))
    squared_B = torch.stack([((z["image"][b] - z["text"][b]) ** 2).sum() for b in range(6)])
    contrast_B = InfoNCE()(z["image"], z["text"], batch.content_id, torch.ones(6, dtype=torch.bool))
    objective = model.step(model.terms(batch), batch)
    torch.testing.assert_close(objective.terms["contrast"], contrast_B.mean())
    torch.testing.assert_close(objective.terms["align"], ((squared_B / 4) ** 2 * squared_B).mean())
    torch.testing.assert_close(objective.total, objective.terms["contrast"] + objective.terms["align"])


def test_absent_samples_contribute_exactly_zero() -> None:
    here_B = torch.tensor([True, True, False, True, False, True])
    batch, small = pairs(6), pairs(6).select(here_B)
    batch.present["text"] = here_B
    batch.inputs["text"][~here_B] = torch.nan
    batch.step, small.step = dict(batch.present), dict(small.present)
    wanted = gradients(recipe(), small)
    for name, gradient in gradients(recipe(), batch).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_one_weight_changes_one_samples_gradient() -> None:
    model, batch = recipe(), pairs(6)
    x_BD = batch.inputs["image"].requires_grad_()

    def gradient(weight_B: Tensor) -> Tensor:
        term = replace(model.terms(batch)["align"], weight=weight_B)
        return torch.autograd.grad(model.step({"align": term}, batch).total, x_BD)[0]

    plain_BD, weighted_BD = gradient(torch.ones(6)), gradient(torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0, 1.0]))
    others = torch.arange(6) != 2
    torch.testing.assert_close(weighted_BD[2], 3 * plain_BD[2])
    assert plain_BD[2].any()
    assert torch.equal(weighted_BD[others], plain_BD[others])


def test_it_learns_what_was_held_out() -> None:
    model, train, held = recipe(), pairs(128), pairs(64, seed=1)

    def recall() -> float:
        z, rows_B = model.embed(held), torch.arange(len(held))
        return float((retrieval_ranks(z["image"], rows_B, z["text"], rows_B) == 0).float().mean())

    before, optimizer = recall(), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.step(model.terms(train), train).total.backward()
        optimizer.step()
    assert before < 0.15
    assert recall() > 0.6


def test_wrong_input_is_one_line() -> None:
    with pytest.raises(ValueError, match="towers: no tower for 'text'; it takes image and text"):
        MyRecipe(Towers(image=Line(8)))
    with pytest.raises(ValueError, match="focus -1: at least 0"):
        recipe(focus=-1)
    batch = pairs(4)
    del batch.inputs["text"]
    with pytest.raises(ValueError, match="the data has no modality 'text', only image"):
        recipe().terms(batch)
