"""Attacks against closed forms, and certificates that no attack breaks. Letters: B samples, D width, C classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.evaluation.attacks import Nudge, certified_radius, find_attacks, slopes, steepest
from descant.modules.fusion.classifiers import FusionHead, OrthogonalFusion
from descant.modules.towers import BagTower, TextTower, Tokens, Tower, Towers
from descant.recipes import Fusion
from tests.tolerance import F64, rounding, ulps

WIDTHS = {"image": 12, "audio": 9}


class Straight(Tower):
    """A linear tower, or a bent one."""

    def __init__(self, width_in: int, width: int = 8, bent: bool = False) -> None:
        super().__init__()
        self.width, self.bent = width, bent
        self.linear = nn.Linear(width_in, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        h_BD = self.linear(x.masked_fill(~x.isfinite(), 0.0))
        return Tokens((h_BD.tanh() if self.bent else h_BD)[:, None], torch.ones(len(x), 1, dtype=torch.bool))


def recipe(fusion: FusionHead | None = None, bent: bool = False, classes: int = 5) -> Fusion:
    torch.manual_seed(0)
    towers = Towers(others={m: Straight(width, bent=bent) for m, width in WIDTHS.items()})
    made = Fusion(towers, "kind", classes, width=8, fusion=fusion or OrthogonalFusion())
    if not bent:
        for m in WIDTHS:
            made.heads[m].norm = nn.Identity()  # linear from end to end
    with torch.no_grad():
        for p in made.fusion.parameters():
            if p.shape == (classes,):
                p.add_(torch.randn(classes) / 2)
    return made.double().eval()


def batch(rows: int = 64, whole: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = {m: 2 * torch.randn(rows, width, generator=generator).double() for m, width in WIDTHS.items()}
    present = {m: torch.ones(rows, dtype=torch.bool) for m in WIDTHS}
    if not whole:
        present["image"][::5], present["audio"][1::5] = False, False
    return Batch(x, present, {"kind": torch.randint(5, (rows,), generator=generator)})


def decided(made: Fusion, b: Batch) -> Tensor:
    with torch.no_grad():
        return made.fuse(made.latents(b), b.present)


# attacks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", WIDTHS)
def test_an_attack_on_a_linear_decision_equals_its_formula(m: str) -> None:
    """Two classes of linear towers: another wins within |h_0 - h_1| / |d (h_0 - h_1) / d x|, and no sooner."""
    made, b = recipe(classes=2), batch()
    logits = decided(made, b)
    y = logits.argmax(dim=1)
    x = b.inputs[m][:1].clone().requires_grad_()
    other = {k: v[:1] for k, v in b.inputs.items()} | {m: x}
    out = made.fuse(made.latents(Batch(other, {k: v[:1] for k, v in b.present.items()})))[0]
    (g,) = torch.autograd.grad(out[0] - out[1], x)
    far_B = (logits[:, 0] - logits[:, 1]).abs() / g.norm()
    assert not find_attacks(Nudge(made, b, [m]), far_B * 0.999, y).any()
    assert find_attacks(Nudge(made, b, [m]), far_B * 1.001, y).all()


def test_only_the_attacked_input_moves_and_only_within_the_radius() -> None:
    made, b = recipe(bent=True), batch()
    nudge = Nudge(made, b, ["audio"])
    seen: list[dict[str, Tensor]] = []
    own = made.latents

    def latents(batch: Batch, *modalities: str) -> dict[str, Tensor]:
        seen.append({m: x.detach().clone() for m, x in batch.inputs.items()})
        return own(batch, *modalities)

    made.latents = latents  # type: ignore[method-assign]
    radius_B = torch.linspace(0.1, 3, len(b)).double()
    find_attacks(nudge, radius_B, decided(made, b).argmax(dim=1), steps=5, restarts=3)
    moved = [(x["audio"] - b.inputs["audio"]).norm(dim=1) for x in seen]
    assert all(torch.equal(x["image"], b.inputs["image"]) for x in seen)
    assert all((far_B <= radius_B * (1 + ulps(16, F64))).all() for far_B in moved)
    assert (moved[5] > 0.999 * radius_B).any() and moved[0].max() == 0


def test_random_starts_depend_on_the_sample_alone() -> None:
    made, b = recipe(bent=True), batch()
    y = decided(made, b).argmax(dim=1)
    radius_B = torch.full((64,), 1.5).double()
    values = find_attacks(Nudge(made, b, ["image"]), radius_B, y, steps=3, restarts=4)
    rows = torch.tensor([5, 40, 2])
    part = find_attacks(Nudge(made, b.select(rows), ["image"]), radius_B[rows], y[rows], steps=3, restarts=4)
    assert torch.equal(part, values[rows])
    assert values.sum() >= find_attacks(Nudge(made, b, ["image"]), radius_B, y, steps=3).sum()


def test_numbers_that_are_not_finite_are_not_perturbed() -> None:
    made, b = recipe(), batch(4)
    b.inputs["audio"][:, 5:] = -torch.inf
    nudge = Nudge(made, b, ["audio"])
    x = b.inputs["audio"][:, :5]
    torch.testing.assert_close(nudge.size_B(), (x - x.mean(dim=1, keepdim=True)).norm(dim=1), **rounding(16, F64))
    delta = nudge.zero().requires_grad_()
    (g,) = torch.autograd.grad(nudge(delta)["audio"].sum(), delta)
    assert g[:, :5].any() and not g[:, 5:].any()


@pytest.mark.parametrize("bag", [False, True])
def test_tokens_are_attacked_at_their_embeddings(bag: bool) -> None:
    torch.manual_seed(0)
    text: Tower = BagTower(50, 8) if bag else TextTower(vocab=50, width=8, depth=1, heads=2, length=6)
    towers = Towers(image=Straight(12), text=text)
    made = Fusion(towers, "kind", 2, width=8).double().eval()
    ids = torch.randint(1, 50, (16, 6), generator=torch.Generator().manual_seed(2))
    ids[3, 2:] = 0
    present = {"image": torch.ones(16, dtype=torch.bool), "text": torch.arange(16) % 4 != 1}
    b = Batch({"image": batch(16).inputs["image"], "text": ids}, present, {"kind": torch.zeros(16).long()})
    nudge = Nudge(made, b, ["text"])
    plain = made.latents(b)
    for m, z in nudge(nudge.zero()).items():
        torch.testing.assert_close(z, plain[m], **rounding(64, F64))
    delta = nudge.zero().requires_grad_()
    (g,) = torch.autograd.grad(nudge(delta)["text"].square().sum(), delta)
    assert g[present["text"]].any(dim=1).all() and not g[~present["text"]].any()
    y = decided(made, b).argmax(dim=1)
    wrong = find_attacks(nudge, torch.full((16,), 30.0).double(), y, steps=30)
    assert wrong[present["text"]].all() and not wrong[~present["text"]].any()
    assert torch.equal(decided(made, b).argmax(dim=1), y), "no hook is left behind"


def test_inputs_without_gradients_are_one_line() -> None:
    made, b = recipe(), batch(4)
    with pytest.raises(ValueError, match=r"^no modality 'text' to attack, only image, audio$"):
        Nudge(made, b, ["text"])
    b.inputs["audio"] = torch.ones(4, 9, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^audio: Straight takes ids and has no embedding"):
        Nudge(made, b, ["audio"])
    b = batch(4)
    for p in made.parameters():
        p.requires_grad_(False)
    own: Any = made.towers["audio"].forward

    def blind(*args: Any, **kwargs: Any) -> Tokens:
        with torch.no_grad():
            return own(*args, **kwargs)

    made.towers["audio"].forward = blind
    with pytest.raises(ValueError, match=r"^audio: a tower without a gradient"):
        find_attacks(Nudge(made, b, ["audio"]), torch.ones(4).double(), torch.zeros(4).long())


# certificates ------------------------------------------------------------------------------------------------------


def radii(made: Fusion, b: Batch, y: Tensor, share: float = 1.0) -> Tensor:
    fusion: Any = made.fusion
    most = steepest(made, [batch(3)], rows=1)  # of a linear tower any sample has all there is to know
    slope = {m: share * most[i] for i, m in enumerate(WIDTHS)}
    with torch.no_grad():
        return certified_radius(decided(made, b), fusion.weights, slope, b.present, y)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_no_attack_within_the_certified_radius_changes_a_decision_of_linear_towers(whole: bool) -> None:
    """1,000 samples, 100 steps from each of 5 starts, all modalities moving together."""
    made, b = recipe(), batch(1000, whole)
    y = decided(made, b).argmax(dim=1)
    radius_B = radii(made, b, y)
    assert (radius_B > 0).all()
    nudge = Nudge(made, b, list(WIDTHS))
    assert not find_attacks(nudge, radius_B, y, steps=100, restarts=5).any()
    # and it is no empty promise: not much farther out decisions do change, and half the slopes would be broken
    assert find_attacks(nudge, 2 * radius_B, y, steps=20).double().mean() > 0.9
    assert find_attacks(nudge, radii(made, b, y, share=0.5), y, steps=20).any()


def test_radius_by_hand_and_slopes_of_linear_towers_are_exact() -> None:
    made, b = recipe(), batch(6, whole=False)
    fusion: Any = made.fusion
    label_B, logits = b.targets["kind"], decided(made, b)
    slope = {}
    for m in WIDTHS:
        tower: Any = made.towers[m]
        head: Any = made.heads[m]
        x = b.inputs[m][:1]
        jacobian = torch.autograd.functional.jacobian(
            lambda x, m=m, tower=tower, head=head: fusion.maps[m](head(made.pools[m](tower(x))))[0], x
        )
        slope[m] = jacobian.flatten(1).norm(dim=1).detach()
        values = slopes(Nudge(made, b, [m]), m)
        here = b.present[m]
        # three linear maps after one another, of widths up to 12
        torch.testing.assert_close(values[here], slope[m].expand(6, 5)[here], **rounding(256, F64))
    radius = certified_radius(logits, fusion.weights, slope, b.present, label_B)
    for n in range(6):
        y, each = int(label_B[n]), []
        for k in set(range(5)) - {y}:
            terms = [
                float(fusion.weights[m][y] * slope[m][y] + fusion.weights[m][k] * slope[m][k]) ** 2
                for m in WIDTHS
                if b.present[m][n]
            ]
            each.append(float(logits[n, y] - logits[n, k]) / sum(terms) ** 0.5)
        assert float(radius[n]) == pytest.approx(min(each), rel=ulps(64, F64))
