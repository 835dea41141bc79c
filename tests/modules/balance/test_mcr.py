"""Games by finite differences, contrast and bottleneck by hand, and what is not there adds nothing.

Letters: B samples, S permutations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from descant.modules.balance.crmt import UnimodalMargin
from descant.modules.balance.mcr import (
    Bottleneck,
    CollaborativeGame,
    CrossModalSupCon,
    Game,
    GreedyGame,
    IndependentGame,
    LabelContrast,
    js_divergence,
)
from descant.modules.balance.regularizer import FusionContext, Regularizer
from descant.modules.core.batch import Batch
from descant.modules.core.output import FusionInputs
from descant.modules.core.sham import partners
from descant.modules.fusion.classifiers import OrthogonalFusion
from descant.modules.towers import Towers
from descant.recipes import Fusion
from tests.ranks import run_ranks
from tests.recipes.test_fusion import FUSIONS, WIDTHS, Line, batch, double, gradients, recipe
from tests.tolerance import F32, F64, quotient, rounding, ulps

GAMES: dict[str, type[Game]] = {
    "independent": IndependentGame,
    "collaborative": CollaborativeGame,
    "greedy": GreedyGame,
}
every = pytest.mark.parametrize("kind", FUSIONS)
#: modality -> (how much of E_1, of E_2) moves with its latents where others' stand in, and with the logits as they are
STAKES = {
    "independent": {"image": (-1, 0), "text": (0, -1), "logits": (-1, -1)},
    "collaborative": {"image": (-1, -1), "text": (-1, -1), "logits": (-1, -1)},
    "greedy": {"image": (-1, 1), "text": (1, -1), "logits": (0, 0)},
}


def asked(kind: str, b: Batch, z: dict[str, Tensor] | None = None) -> FusionContext:
    model = recipe(kind).double()
    z = model.latents(b) if z is None else z
    inputs, logits_BC = FusionInputs(z, b.present, b.targets["kind"]), model.fuse(dict(z), b.present)
    return FusionContext(inputs, b.present, logits_BC, model.fuse, model.fusion, b, model.rows(b))


def full() -> Batch:
    b = double(batch(seed=3))
    b.present = {m: torch.ones(len(b), dtype=torch.bool) for m in WIDTHS}
    b.step = dict(b.present)
    b.inputs = {m: torch.randn(len(b), w, dtype=torch.float64) for m, w in WIDTHS.items()}
    b.rng_seed = torch.arange(len(b)) + 40
    return b


def by_hand(p: list[float], q: list[float]) -> float:
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    kl = [sum(a * math.log(a / b) for a, b in zip(x, m, strict=True)) for x in (p, q)]
    return sum(kl) / 2


@every
@pytest.mark.parametrize("name", GAMES)
def test_gradients_at_both_latents_are_those_of_finite_differences(name: str, kind: str) -> None:
    """Of the release's form; of ours they are equal."""
    torch.manual_seed(0)
    b, S = full(), 3
    model = recipe(kind).double()
    z = {m: z_BD.detach().requires_grad_() for m, z_BD in model.latents(b).items()}
    term = GAMES[name](weight=0.7, permutations=S)(asked(kind, b, z))["game"]
    found = dict(zip(z, torch.autograd.grad(term.sum(), list(z.values())), strict=True))
    ours = GAMES[name](weight=0.7, permutations=S, detach="latents")(asked(kind, b, z))["game"]
    for m, g in zip(z, torch.autograd.grad(ours.sum(), list(z.values())), strict=True):
        torch.testing.assert_close(g, found[m], **rounding(64, F64))
    names = list(WIDTHS)

    def energy(i: str, moved: dict[str, Tensor], still: dict[str, Tensor]) -> float:
        """E_i, sample by sample: z_i of ``moved`` handed on, against the logits of ``still``."""
        total = 0.0
        with torch.no_grad():
            f = model.fuse(dict(still), b.present).softmax(dim=1).tolist()
            for s in range(S):
                source = partners(b.rng_seed, b.present[i], "game", i, s).tolist()
                for n in range(len(b)):
                    z_n = {m: moved[m][[source[n] if m == i else n]] for m in names}
                    there = {m: torch.tensor([True]) for m in names}
                    total += by_hand(model.fuse(z_n, there).softmax(dim=1)[0].tolist(), f[n]) / S
        return total

    still = {m: z_BD.detach() for m, z_BD in z.items()}
    step = 1e-5
    for m, z_BD in still.items():
        for n, d in ((0, 0), (3, 5), (6, 2)):
            slopes = {}
            for what in ("moved", "still"):
                values = []
                for sign in (1, -1):
                    other = {**still, m: z_BD.clone()}
                    other[m][n, d] += sign * step
                    pair = (other, still) if what == "moved" else (still, other)
                    values.append([energy(i, *pair) for i in names])
                slopes[what] = [(up - down) / (2 * step) for up, down in zip(*values, strict=True)]
            stakes = STAKES[name]
            wanted = sum(k * e for k, e in zip(stakes[m], slopes["moved"], strict=True))
            wanted += sum(k * e for k, e in zip(stakes["logits"], slopes["still"], strict=True))
            assert float(found[m][n, d]) == pytest.approx(0.7 * wanted, abs=quotient(F64, scale=10))
    assert all(g.abs().max() > 1e-4 for g in found.values())


@pytest.mark.parametrize("detach", ["projections", "latents"])
@pytest.mark.parametrize("name", GAMES)
def test_gradients_at_the_fusion_are_those_of_a_loop_of_each_form(name: str, detach: Any) -> None:
    """Of the release, whose ``W z`` of others is detached, and of ours, whose z is: there the greedy game's cancel."""
    b = full()
    question = asked("late", b, {m: z_BD.detach() for m, z_BD in recipe("late").double().latents(b).items()})
    fusion: Any = question.fusion
    W, z = {m: fusion.maps[m].weight for m in WIDTHS}, question.inputs.z
    parameters = [*W.values(), fusion.bias_C]
    found = torch.autograd.grad(GAMES[name](0.7, 2, detach)(question)["game"].sum(), parameters, retain_graph=True)
    rows, total = range(len(b)), torch.zeros((), dtype=torch.float64)
    q_BC = (fusion.bias_C + z["image"] @ W["image"].T + z["text"] @ W["text"].T).softmax(dim=1)
    for a in WIDTHS:
        for i in WIDTHS:
            stake = -1 if a == i else {"greedy": 1}.get(name, 0)
            for s in range(2) if stake else ():
                source = partners(b.rng_seed, b.present[i], "game", i, s).tolist()
                for n in rows:
                    h = {m: W[m] @ z[m][source[n] if m == i else n] for m in WIDTHS}
                    other = next(m for m in WIDTHS if m != a)
                    if detach == "projections" and name != "collaborative":
                        h[other] = h[other].detach()
                    p, q = (fusion.bias_C + h["image"] + h["text"]).softmax(dim=0), q_BC[n]
                    m = (p + q) / 2
                    total = total + stake * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 4
    for g, wanted in zip(found, torch.autograd.grad(0.7 * total, parameters), strict=True):
        torch.testing.assert_close(g, wanted, rtol=0, atol=ulps(256, F64))
    moved = max(float(g.abs().max()) for g in found[:2])
    assert moved < ulps(16, F64) if (name, detach) == ("greedy", "latents") else moved > 1e-3


@every
def test_the_greedy_game_is_always_worth_nothing_and_pulls_all_the_same(kind: str) -> None:
    b = full()
    term = GreedyGame()(asked(kind, b))["game"]
    assert float(term.value.abs().max()) < ulps(64, F64)
    worth = IndependentGame()(asked(kind, b))["game"].value
    assert bool((worth < -1e-4).any()) and torch.allclose(
        worth, CollaborativeGame()(asked(kind, b))["game"].value, **rounding(64, F64)
    )


@pytest.mark.parametrize("name", GAMES)
def test_absent_rows_are_no_partners_and_add_nothing(name: str) -> None:
    b = double(batch())
    b.rng_seed = torch.arange(len(b)) + 7
    here = torch.tensor([0, 3, 4, 5, 6])  # of those that have both
    term = GAMES[name](permutations=4)(asked("mid", b))["game"]
    small = b.select(here)
    small.step = dict(small.present)
    alone = GAMES[name](permutations=4)(asked("mid", small))["game"]
    assert term.valid is not None and term.valid.nonzero().flatten().tolist() == here.tolist()
    assert torch.allclose(term.value[here], alone.value, **rounding(64, F64)) and not term.value[[1, 2, 7]].any()
    model = recipe("mid", regularizers=[GAMES[name]()]).double()
    assert all(g.isfinite().all() for g in gradients(model, b).values())


def test_partners_are_others_and_hang_on_keys_alone() -> None:
    draw_B, valid_B = torch.arange(9) + 100, torch.arange(9) != 4
    source_B = partners(draw_B, valid_B, "game", "image", 0)
    assert source_B[4] == 4 and sorted(source_B.tolist()) == list(range(9))
    assert not (source_B == torch.arange(9))[valid_B].any()
    turned = partners(draw_B.flip(0), valid_B.flip(0), "game", "image", 0)
    assert torch.equal(draw_B.flip(0)[turned].flip(0), draw_B[source_B])
    assert not torch.equal(source_B, partners(draw_B, valid_B, "game", "image", 1))
    assert partners(draw_B, torch.arange(9) == 2, "game").tolist() == list(range(9)), "a row alone keeps its own"


def pairwise(z: Mapping[str, Tensor], y: list[int], temperature: float) -> tuple[float, list[float]]:
    """MCR's contrast, by loops over all latents with a label: its value, and the sum of each sample's pairs."""
    names = [(m, n) for m in z for n in range(len(y)) if y[n] >= 0 and bool(z[m][n].any())]
    u = {(m, n): (z[m][n] / z[m][n].norm()).tolist() for m, n in names}
    each, pairs = [0.0] * len(y), 0
    for a in names:
        e = {g: math.exp(sum(p * q for p, q in zip(u[a], u[g], strict=True)) / temperature) for g in names}
        others = sum(e[g] for g in names if y[g[1]] != y[a[1]])
        for p in names:
            if p != a and y[p[1]] == y[a[1]]:
                each[a[1]] -= math.log(e[p] / (e[p] + others))
                pairs += 1
    return sum(each) / pairs, [x / pairs for x in each]


def test_label_contrast_by_hand() -> None:
    b = double(batch())
    question = asked("late", b)
    term = LabelContrast(weight=0.5, temperature=0.2)(question)["contrast"]
    y = b.targets["kind"].tolist()
    here = [n for n in range(len(b)) if y[n] >= 0 and (b.present["image"][n] or b.present["text"][n])]
    _, each = pairwise(question.inputs.z, y, 0.2)
    wanted = [0.5 * len(here) * x for x in each]
    assert term.value.tolist() == pytest.approx(wanted, abs=ulps(256, F64))
    assert term.valid is not None and term.valid.nonzero().flatten().tolist() == here


def test_label_contrast_of_whole_samples_is_the_mean_over_pairs_and_not_that_across_modalities() -> None:
    b = full()
    b.targets["kind"] = torch.arange(len(b)) % 3
    question = asked("late", b)
    for temperature in (0.1, 0.5):
        wanted, _ = pairwise(question.inputs.z, b.targets["kind"].tolist(), temperature)
        both = [part(temperature=temperature)(question)["contrast"] for part in (LabelContrast, CrossModalSupCon)]
        found, ours = (float((term.sum() / cast(Tensor, term.norm)).detach()) for term in both)
        assert found == pytest.approx(wanted, rel=ulps(256, F64)) and abs(found - ours) > 0.05
    b.targets["kind"] = torch.zeros(len(b), dtype=torch.long)  # no negatives: nothing to contrast
    assert not LabelContrast()(asked("late", b))["contrast"].value.any()


def test_contrast_across_modalities_by_hand() -> None:
    b = double(batch())
    question = asked("late", b)
    term = CrossModalSupCon(weight=0.5, temperature=0.2)(question)["contrast"]
    z, y = question.inputs.z, b.targets["kind"].tolist()
    u = {m: (z[m] / z[m].norm(dim=1, keepdim=True)).tolist() for m in WIDTHS}
    both = [n for n in range(len(b)) if b.present["image"][n] and b.present["text"][n] and y[n] >= 0]
    for n in range(len(b)):
        wanted = 0.0
        for one, other in (("image", "text"), ("text", "image")) if n in both else ():
            e = {k: math.exp(sum(p * q for p, q in zip(u[one][n], u[other][k], strict=True)) / 0.2) for k in both}
            same = [k for k in both if y[k] == y[n]]
            wanted -= sum(math.log(e[k] / sum(e.values())) for k in same) / len(same) / 2
        assert float(term.value[n]) == pytest.approx(0.5 * wanted, abs=ulps(64, F64))
    assert term.valid is not None and term.valid.nonzero().flatten().tolist() == both


def contrast_of_rows(rank: int, rows: int = 4) -> Tensor:
    torch.manual_seed(0)
    b = full().select(torch.arange(rank * rows, (rank + 1) * rows))
    b.step = dict(b.present)
    if rows == 4:
        dist.init_process_group("gloo")
    value_B = LabelContrast()(asked("late", b))["contrast"].value.detach()
    if rows == 4:
        dist.destroy_process_group()
    return value_B


@pytest.mark.slow
@pytest.mark.ddp
def test_label_contrast_is_the_same_on_two_ranks() -> None:
    found_B, wanted_B = torch.cat(run_ranks(2, contrast_of_rows)), contrast_of_rows(0, 8)
    torch.testing.assert_close(found_B, wanted_B, **rounding(256, F64))


def test_bottleneck_by_hand_moves_latents_and_not_the_decision() -> None:
    torch.manual_seed(0)
    b = double(batch())
    model: Any = recipe("late", regularizers=[Bottleneck(hidden=5)]).double()
    terms = model.terms(b)
    part = model.regularizers[0]
    z = model.latents(b)
    f = model.fuse(z, b.present)
    guess = f @ part.g[0].weight.T
    guess = guess.clamp(min=0) @ part.g[2].weight.T
    for n in range(len(b)):
        off = [
            float(z[m][n, d] - guess[n, k * 8 + d]) ** 2
            for k, m in enumerate(WIDTHS)
            for d in range(8)
            if b.present[m][n]
        ]
        assert float(terms["bottleneck"].value[n]) == pytest.approx(sum(off) / max(len(off), 1), abs=ulps(64, F64))
    model.zero_grad()
    torch.autograd.backward(terms["bottleneck"].sum())
    assert model.fusion.maps["image"].weight.grad is None and part.g[0].weight.grad.any()
    assert model.towers["image"].linear.weight.grad.any()


def test_margin_by_hand() -> None:
    b = double(batch())
    model: Any = orthogonal(regularizers=[UnimodalMargin(weight=2.0)])
    term, z, y = model.terms(b)["margin"], model.latents(b), b.targets["kind"].tolist()
    for n in range(len(b)):
        total = 1e-5
        for m in WIDTHS:
            s = (model.fusion.maps[m].weight @ z[m][n]).tolist()
            total += sum(math.exp(s[k] - s[y[n]]) for k in range(4) if k != y[n]) if b.present[m][n] else 0
        if y[n] >= 0:
            assert float(term.value[n]) == pytest.approx(2 * math.log(total), abs=ulps(256, F64))  # logits of up to 23
    assert term.valid is not None and term.valid.nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6]
    found = gradients(model, b)
    assert all(g.isfinite().all() for g in found.values())


def orthogonal(**options: Any) -> Fusion:
    torch.manual_seed(0)
    towers = Towers(others={m: Line(width) for m, width in WIDTHS.items()})
    return Fusion(towers, "kind", 4, width=8, fusion=OrthogonalFusion(), **options).double()


def test_what_modalities_say_of_classes_is_orthogonal_and_stays_so() -> None:
    model: Any = orthogonal(regularizers=[UnimodalMargin()])
    b = double(batch())
    before: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        for m in WIDTHS:
            v_CD = model.fusion.maps[m].weight
            # what it starts from was made orthogonal in float32
            assert torch.allclose(v_CD @ v_CD.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=ulps(8, F32))
            assert step == 0 or not torch.allclose(v_CD, before[m])
            before[m] = v_CD.detach().clone()
        gradients(model, b)
        optimizer.step()
    shares = model.fusion.parts(model.latents(b), b.present)
    total = model.fusion.bias_C + shares["image"] + shares["text"]
    torch.testing.assert_close(total, model.fuse(model.latents(b), b.present), **rounding(64, F64))
    assert all((w.exp() > 0).all() for w in model.fusion.log_weights.values())


@every
def test_terms_join_the_recipe_s_own(kind: str) -> None:
    parts: list[Regularizer] = [GreedyGame(), LabelContrast(), Bottleneck()]
    model, b = recipe(kind, regularizers=parts).double(), full()
    assert list(model.terms(b)) == ["fused", "image", "text", "game", "contrast", "bottleneck"]
    plain, all_of = gradients(recipe(kind).double(), b), gradients(model, b)
    for m in WIDTHS:
        assert not torch.allclose(plain[f"towers.{m}.linear.weight"], all_of[f"towers.{m}.linear.weight"])
    assert model.in_batch_negatives and not recipe(kind, regularizers=[GreedyGame()]).in_batch_negatives


def test_divergence_is_symmetric_bounded_and_zero_for_equals() -> None:
    a, b = torch.randn(2, 9, 4, dtype=torch.float64).unbind()
    assert torch.allclose(js_divergence(a, b), js_divergence(b, a), **rounding(16, F64)) and float(
        js_divergence(a, a + 3.0).max()
    ) < ulps(64, F64)
    assert float(js_divergence(1e4 * a, -1e4 * a).max()) <= math.log(2) + ulps(4, F64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GreedyGame(permutations=0), "permutations 0: 1 is the least"),
        (lambda: LabelContrast(temperature=0), "temperature 0: above 0"),
        (lambda: OrthogonalFusion(weight=0), "weight 0: above 0"),
        (
            lambda: OrthogonalFusion().build({"image": 3, "text": 8}, 4),
            "classes 4: OrthogonalFusion needs a width of as many; image has 3",
        ),
        (
            lambda: recipe("mid", regularizers=[UnimodalMargin()]).terms(batch()),
            "OrthogonalFusion has margins; MidFusion",
        ),
    ],
)
def test_bad_input_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
