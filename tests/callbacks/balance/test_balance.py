"""Balancers in real fits, against explicit loops over samples in double precision, and on planted imbalances.

Letters: M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from descant.callbacks.balance.balance import Balance
from descant.modules.balance.agm import AGM
from descant.modules.balance.base import Pacing
from descant.modules.balance.ogm import OGM
from descant.modules.balance.random_pacing import RandomPacing
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix
from descant.recipes import Fusion
from tests.ranks import run_ranks
from tests.recipes.test_fusion import FUSIONS, WIDTHS, SignData, Signs, double, gradients, recipe
from tests.step_toy import QUIET, largest_gap
from tests.tolerance import F64, rounding, statistical, ulps

STEPS = 3
PACINGS: dict[str, Callable[[], Pacing]] = {
    "ogm": lambda: OGM(alpha=0.5),
    "agm": lambda: AGM(alpha=2.0),
    "agm-behind": lambda: AGM(alpha=2.0, slow="behind"),
}


class Watching(L.Callback):
    """Weights and gradients just before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = list(pl_module.named_parameters())
        weights = {name: p.detach().clone() for name, p in named}
        self.steps.append((weights, {name: p.grad.clone() for name, p in named}))


def model(kind: str = "late", **options: Any) -> Fusion:
    return recipe(kind, classes=2, optimizer=lambda params: torch.optim.SGD(params, lr=0.3), **options).double()


Steps = list[tuple[dict[str, Tensor], dict[str, Tensor]]]


def fitted(
    callback: L.Callback | None,
    kind: str = "late",
    accumulate: int = 1,
    world: int = 1,
    steps: int = STEPS,
    watch: Watching | None = None,
    data: SignData | None = None,
    **options: Any,
) -> Steps:
    """Steps of the same 20 samples each; some lack a modality or a label."""
    watch = watch or Watching()
    trainer = L.Trainer(
        max_steps=steps,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        accumulate_grad_batches=accumulate,
        callbacks=[watch] if callback is None else [callback, watch],
        **QUIET,
    )
    trainer.fit(model(kind, **options), datamodule=data or SignData(batch_size=24, whole=False))
    return watch.steps


def whole() -> Batch:
    data = Signs(rows=20, whole=False)
    return double(Batch(dict(data.x), dict(data.has), {"kind": data.label}))


def said(recipe: Fusion, b: Batch, n: int, *there: str) -> Tensor:
    """The logits of sample n, were these modalities all that it has."""
    z = {m: z_BD[n : n + 1] for m, z_BD in recipe.latents(b).items()}
    return recipe.fuse(z, {m: torch.tensor([m in there and bool(b.present[m][n])]) for m in WIDTHS})[0]


def scores(recipe: Fusion, b: Batch, rule: str) -> list[float]:
    """Of both modalities, a sample at a time: by Shapley for two, (f(a, b) - f(b) + f(a)) / 2."""
    found, names = [], list(WIDTHS)
    for m, other in ((names[0], names[1]), (names[1], names[0])):
        each = []
        for n in range(len(b)):
            y = int(b.targets["kind"][n])
            if not b.present[m][n] or y < 0:
                continue
            share_C = (said(recipe, b, n, m, other) - said(recipe, b, n, other) + said(recipe, b, n, m)) / 2
            p = float(torch.exp(share_C[y]) / torch.exp(share_C).sum())
            each.append(p if rule == "ogm" else -math.log(p))
        found.append(math.fsum(each) / len(each))
    return found


def authors_factors(history: list[list[float]], alpha: float, cap: float, sign: int) -> list[list[float]]:
    """The loop of the release: ratios of this step's losses and of their means so far, which follow afterwards."""
    M, mean, found = len(history[0]), [0.0] * len(history[0]), []
    for n, s in enumerate(history, start=1):
        factors = []
        for m in range(M):
            r, tau = (math.exp(sign * M / (M - 1) * (sum(x) / M - x[m])) for x in (s, mean))
            factors.append(math.exp(alpha * min(tau - r, cap)))
        found.append(factors)
        mean = [mean[m] * (n - 1) / n + s[m] / n for m in range(M)]
    return found


def factors(rule: str, history: list[list[float]]) -> list[float]:
    """Of the last step, by the formulas."""
    a, b = history[-1]
    if rule == "ogm":
        return [1 - math.tanh(0.5 * rho) if rho > 1 else 1.0 for rho in (a / b, b / a)]
    return authors_factors(history, 2.0, 7.0, -1 if rule == "agm-behind" else 1)[-1]


def gap(rule: str, steps: Steps, kind: str = "late") -> tuple[float, list[list[float]]]:
    """The largest between what was found and what the formulas give, and the factors of each step."""
    b, history, paced, largest = whole(), [], [], 0.0
    for weights, found in steps:
        at = model(kind)
        at.load_state_dict(weights, strict=False)
        history.append(scores(at, b, rule))
        paced.append(factors(rule, history))
        wanted = gradients(at, b)
        for m, factor in zip(WIDTHS, paced[-1], strict=True):
            for name in wanted:
                if name.split(".")[0] in ("towers", "pools", "heads") and name.split(".")[1] == m:
                    wanted[name] = wanted[name] * factor
        largest = max(largest, largest_gap(found, wanted))
    return largest, paced


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize("rule", PACINGS)
def test_each_step_equals_the_loop(rule: str, kind: str) -> None:
    for accumulate in (1, 4):
        largest, paced = gap(rule, fitted(Balance(PACINGS[rule]()), kind, accumulate), kind)
        assert largest < ulps(4096, F64), accumulate
        assert max(abs(k - 1) for k in paced[-1]) > 1e-4, "it changed something"


def on_a_rank(rank: int) -> list[tuple[str, Steps]]:
    found = [(rule, fitted(Balance(make()), accumulate=n, world=2)) for rule, make in PACINGS.items() for n in (1, 4)]
    return [*found, ("noise", fitted(Balance(OGM(), noise=True), accumulate=2, world=2))]


@pytest.mark.ddp
def test_two_ranks_equal_the_loop_and_draw_the_same_noise() -> None:
    first, second = run_ranks(2, on_a_rank)
    noise = fitted(Balance(OGM(), noise=True), accumulate=4)
    for (rule, one), (_, two) in zip(first, second, strict=True):
        for (_, a), (_, b) in zip(one, two, strict=True):
            assert largest_gap(a, b) == 0
        if rule == "noise":
            for (_, a), (_, b) in zip(one, noise, strict=True):
                assert largest_gap(a, b) < ulps(4096, F64)
        else:
            assert gap(rule, one)[0] < ulps(4096, F64)


def test_noise_is_of_the_gradient_s_own_size_and_of_matrices_alone() -> None:
    plain, noisy = fitted(Balance(OGM(alpha=0)))[0][1], fitted(Balance(OGM(alpha=0), noise=True))[0][1]
    added = {name: noisy[name] - g for name, g in plain.items()}
    touched = {name for name, x in added.items() if x.any()}
    assert touched == {f"{part}.{m}.{leaf}" for m in WIDTHS for part, leaf in (("towers", "linear.weight"),)} | {
        name for name in plain if name.startswith("heads") and plain[name].ndim > 1
    }
    for n, (name, _) in enumerate((name, p) for name, p in plain.items() if name.startswith("towers.image")):
        if plain[name].ndim > 1:
            generator = torch.Generator().manual_seed(mix(0, "balance", 0, "image", n))
            wanted = torch.randn(plain[name].shape, generator=generator).double() * plain[name].std()
            assert torch.allclose(added[name], wanted, **rounding(64, F64))


def planted(gains: tuple[float, float], callback: L.Callback | None) -> dict[str, Tensor]:
    """Gradients at towers, of a model whose fusion listens to the modalities this much."""

    class Plant(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            data = Signs(rows=20, whole=False)
            with torch.no_grad():
                for m, gain in zip(WIDTHS, gains, strict=True):
                    # the latents of the class that is asked for, made large: this modality knows
                    z_BD = pl_module.latents(whole())[m]
                    direction_D = torch.linalg.pinv(z_BD) @ (2.0 * data.label.double().clamp(min=0) - 1)
                    pl_module.fusion.maps[m].weight.copy_(torch.stack([-direction_D, direction_D]) * gain)

    watch = Watching()
    callbacks: list[L.Callback] = [Plant(), watch] if callback is None else [Plant(), callback, watch]
    L.Trainer(max_steps=1, callbacks=callbacks, **QUIET).fit(model(), datamodule=SignData(24, whole=False))
    at = model()
    at.load_state_dict(watch.steps[0][0], strict=False)
    planted.scores = scores(at, whole(), "ogm")  # type: ignore[attr-defined]
    return watch.steps[0][1]


def test_a_planted_imbalance_is_scaled_by_what_the_formula_gives() -> None:
    for gains, ahead in (((3.0, 0.1), "image"), ((0.1, 3.0), "text")):
        plain, paced = planted(gains, None), planted(gains, Balance(OGM(alpha=0.3)))
        image, text = planted.scores  # type: ignore[attr-defined]
        rho = image / text if ahead == "image" else text / image
        assert rho > 1.2
        for m in WIDTHS:
            name = f"towers.{m}.linear.weight"
            factor = 1 - math.tanh(0.3 * rho) if m == ahead else 1.0
            assert float(paced[name].norm() / plain[name].norm()) == pytest.approx(factor, abs=ulps(256, F64))
        assert torch.equal(paced["fusion.maps.image.weight"], plain["fusion.maps.image.weight"])
        # its control holds back the other one
        sham = planted(gains, Balance(OGM(alpha=0.3), sham="permute"))
        for m in WIDTHS:
            name = f"towers.{m}.linear.weight"
            factor = 1 - math.tanh(0.3 * rho) if m != ahead else 1.0
            assert float(sham[name].norm() / plain[name].norm()) == pytest.approx(factor, abs=ulps(256, F64))


def test_the_placebo_slows_each_modality_as_often_whatever_the_scores() -> None:
    rule, score_M = RandomPacing(factor=0.25), torch.tensor([0.9, 0.1, 0.5])
    factor_NM = torch.stack([rule.pace(score_M) for _ in range(3000)])
    assert factor_NM.sort(dim=1).values.unique(dim=0).tolist() == [[0.25, 1.0, 1.0]]
    share_M = (factor_NM < 1).double().mean(dim=0)
    assert torch.allclose(share_M, torch.full_like(share_M, 1 / 3), rtol=0, atol=statistical(2**0.5 / 3, 3000))
    again = RandomPacing(factor=0.25)
    again.load_state_dict({"steps": torch.tensor(2990)})
    assert torch.equal(torch.stack([again.pace(score_M.flip(0)) for _ in range(10)]), factor_NM[2990:])


def test_rules_say_nothing_where_modalities_are_even_or_it_is_off() -> None:
    even_M = torch.tensor([0.4, 0.4, 0.4], dtype=torch.float64)
    assert OGM().pace(even_M).tolist() == [1.0] * 3 and AGM().pace(even_M).tolist() == [1.0] * 3
    score_M = torch.tensor([0.9, 0.3, 0.3], dtype=torch.float64)
    assert OGM(alpha=0).pace(score_M).tolist() == [1.0] * 3 == AGM(alpha=0).pace(score_M).tolist()
    assert OGM(alpha=0.3).pace(score_M).tolist() == pytest.approx([1 - math.tanh(0.9), 1.0, 1.0], rel=ulps(8, F64))
    assert OGM().pace(torch.tensor([0.5, 0.0])).tolist() == [0.0, 1.0], "ahead by any measure"
    assert OGM().pace(torch.tensor([0.0, 0.0])).tolist() == [1.0, 1.0]
    off, plain = fitted(Balance(OGM(alpha=0))), fitted(None)
    assert [largest_gap(a[1], b[1]) for a, b in zip(off, plain, strict=True)] == [0] * STEPS


def test_after_its_share_of_the_run_all_learn_as_they_would() -> None:
    at, paced = model(), []
    for weights, found in fitted(Balance(OGM(alpha=0.5), until=0.5)):
        at.load_state_dict(weights, strict=False)
        paced.append(largest_gap(found, gradients(at, whole())) > 1e-3)
    assert paced == [True, True, False]


def test_agm_goes_on_where_it_was() -> None:
    history = torch.rand(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole_way, first, second = AGM(), AGM(), AGM()
    wanted = [whole_way.pace(score_M).tolist() for score_M in history]
    found = [first.pace(score_M).tolist() for score_M in history[:3]]
    second.load_state_dict(first.state_dict())
    assert found + [second.pace(score_M).tolist() for score_M in history[3:]] == wanted
    assert wanted[1] != AGM().pace(history[1]).tolist()


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize(("slow", "sign"), [("ahead", 1), ("behind", -1)])
def test_agm_is_the_loop_of_its_authors_and_of_the_other_sign(modalities: int, slow: Any, sign: int) -> None:
    history = 2 * torch.rand(50, modalities, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule, wanted = AGM(alpha=0.7, cap=0.5, slow=slow), authors_factors(history.tolist(), 0.7, 0.5, sign)
    for score_M, factors in zip(history, wanted, strict=True):
        assert rule.pace(score_M).tolist() == pytest.approx(factors, rel=ulps(512, F64))
    assert max(max(factors) for factors in wanted) == pytest.approx(math.exp(0.35))  # the cap is met


@pytest.mark.parametrize(
    ("steps", "last", "exponents"),
    [(1, (0.5, 1.5), (1 - math.e, 1 - 1 / math.e)), (1000, (0.5, 2.5), (1 - math.e**2, 1 - 1 / math.e**2))],
)
def test_agm_slows_who_is_ahead_after_even_steps(steps: int, last: Any, exponents: Any) -> None:
    """0.179 and 1.882; 0.0017 and 2.37."""
    ahead, behind = AGM(), AGM(slow="behind")
    for rule in (ahead, behind):
        for _ in range(steps):
            assert rule.pace(torch.ones(2)).tolist() == [1.0, 1.0]
    found = ahead.pace(torch.tensor(last)).tolist()
    assert found == pytest.approx([math.exp(x) for x in exponents], rel=ulps(64, F64)) and found[0] < 0.18
    assert behind.pace(torch.tensor(last)).tolist() == pytest.approx(found[::-1], rel=ulps(64, F64))


def test_a_step_without_a_labelled_sample_of_a_modality_is_left_as_it_is_and_counted() -> None:
    class Blind(SignData):
        def training_set(self) -> Signs:
            data = super().training_set()
            data.has["image"][:] = False
            return data

    found = []
    for callback in (None, Balance(AGM())):
        watch = Watching()
        callbacks: list[L.Callback] = [watch] if callback is None else [callback, watch]
        L.Trainer(max_steps=2, callbacks=callbacks, **QUIET).fit(model(), datamodule=Blind(24, whole=False))
        found.append(watch)
        if callback is not None:
            assert callback.fallbacks == 2 and not callback.pacing.state
    for a, b in zip(found[0].steps, found[1].steps, strict=True):
        assert largest_gap(a[1], b[1]) == 0


class Alone(Fusion):
    modalities = ("image",)


def fit(recipe: Any, *callbacks: L.Callback) -> None:
    L.Trainer(max_steps=1, callbacks=list(callbacks), **QUIET).fit(recipe, datamodule=SignData(24, whole=False))


def one() -> Fusion:
    lone = model()
    lone.modalities = ("image",)
    return lone


def frozen() -> Fusion:
    half = model()
    half.towers["text"].requires_grad_(False)
    half.pools["text"].requires_grad_(False)
    half.heads["text"].requires_grad_(False)
    return half


def tied() -> Fusion:
    both = model()
    both.heads["text"] = both.heads["image"]
    return both


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Balance(OGM(), until=0), "until 0: a share of the run"),
        (lambda: OGM(alpha=-1), "alpha -1"),
        (lambda: AGM(alpha=-1), "alpha -1"),
        (lambda: RandomPacing(factor=2), "factor 2: from 0 to 1"),
        (lambda: fit(BoringModel(), Balance(OGM())), "the protocol MultimodalClassifier .*; BoringModel lacks it"),
        (lambda: fit(one(), Balance(OGM())), "one modality, image: there is nothing to balance"),
        (lambda: fit(frozen(), Balance(OGM())), "nothing of text is trained"),
        (lambda: fit(tied(), Balance(OGM())), "text and image share parameters"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
