"""Harmony at the features and the curriculum, against explicit loops over samples in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from descant.callbacks.harmonize.features import AUDITED, HarmonizeFeatures
from descant.callbacks.harmonize.terms import Harmonize
from descant.modules.core.rng import mix
from descant.modules.multitask import CMGH, MGDA, CAGrad, GradVac, NashMTL, PCGrad, Rule
from descant.modules.objectives.curriculum import Curriculum
from tests.ranks import run_ranks
from tests.step_toy import MIX, QUIET, KeepGradients, N, ToyData, ToyRecipe, content, explicit, largest_gap
from tests.tolerance import F32, F64, ulps

RULES: dict[str, Callable[[], Rule]] = {
    "realign": CMGH,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "cagrad": CAGrad,
    "mgda": MGDA,
}


class Forked(ToyRecipe):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(harmonize=False, **kwargs)

    @property
    def forks(self) -> dict[str, tuple[str, ...]]:
        return {"x": ("a", "b")}


def samples() -> tuple[ToyRecipe, list[Tensor], list[Tensor], list[list[list[Tensor]]], Tensor]:
    """Features, the terms' gradients at them and at the heads, a sample at a time; their cosines ``[N]``."""
    data, recipe = content(torch.float64), ToyRecipe(harmonize=False).double()
    has = torch.stack([data["a"], data["b"]], dim=1)
    z_N, g_NK, heads = [], [], []
    for i in range(N):
        z_D = recipe.towers["trunk"](data["x"][i : i + 1]).h_BTD[0, 0]
        leaf, of_terms, of_heads = z_D.detach().requires_grad_(), [], []
        for k, (name, y) in enumerate((("a", data["y"][i]), ("b", -data["y"][i]))):
            loss = ((recipe.heads[name](leaf) - y) ** 2).sum() * data["weight"][i] / has[:, k].sum() * MIX[name]
            g, *of_head = torch.autograd.grad(loss * has[i, k], [leaf, *recipe.heads[name].parameters()])
            of_terms.append(g)
            of_heads.append(of_head)
        z_N.append(z_D)
        g_NK.append(torch.stack(of_terms))
        heads.append(of_heads)
    cos_N = torch.stack([torch.nn.functional.cosine_similarity(g[0], g[1], dim=0) for g in g_NK])
    return recipe, z_N, g_NK, heads, cos_N


def loop(rule: Rule | None, threshold: float | None = None, only: tuple[str, ...] = ("a", "b")) -> dict[str, Tensor]:
    """Gradients of one whole step, a sample at a time."""
    data, (recipe, z_N, g_NK, heads, cos_N) = content(torch.float64), samples()
    parameters = dict(recipe.named_parameters())
    has = torch.stack([data["a"], data["b"]], dim=1)
    keep_NK = torch.ones(N, 2, dtype=torch.float64)
    if threshold is not None:
        kept_N = ~has.all(dim=1) | (cos_N > threshold)
        for k, name in enumerate(("a", "b")):
            if name in only:
                keep_NK[:, k] = kept_N.double() * has[:, k].sum() / (kept_N & has[:, k]).sum()
    grads = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(N):
        g_KD = g_NK[i] * keep_NK[i, :, None]
        mix_K = torch.ones(2, dtype=torch.float64)
        if rule is not None:
            mix_K = rule.weights((g_KD @ g_KD.T)[None], torch.ones(2), mix(0, "harmony", 0, "a", "b"))[0]
        trunk = [name for name in parameters if name.startswith("towers")]
        for name, g in zip(
            trunk, torch.autograd.grad(z_N[i], [parameters[n] for n in trunk], mix_K @ g_KD), strict=True
        ):
            grads[name] += g
        for k, term in enumerate(("a", "b")):
            for part, g in zip(("weight", "bias"), heads[i][k], strict=True):
                grads[f"heads.{term}.{part}"] += g * keep_NK[i, k]
    return grads


def fitted(
    callback: L.Callback, dtype: torch.dtype = torch.float64, accumulate: int = 1, devices: int = 1
) -> KeepGradients:
    keep, recipe = KeepGradients(), Forked()
    trainer = L.Trainer(
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=1,
        accumulate_grad_batches=accumulate,
        callbacks=[callback, keep],
        **QUIET,
    )
    trainer.fit(recipe.double() if dtype == torch.float64 else recipe.float(), datamodule=ToyData(dtype))
    return keep


@pytest.mark.parametrize("rule", RULES)
def test_each_sample_has_a_mix_of_its_own(rule: str) -> None:
    wanted = loop(RULES[rule]())
    assert largest_gap(wanted, loop(None)) > 1e-2
    for dtype, exact in ((F32, ulps(64, F32)), (F64, ulps(4096, F64))):
        for accumulate in (1, 2):
            found = fitted(HarmonizeFeatures(RULES[rule]()), dtype, accumulate).gradients
            assert largest_gap(found, wanted) < exact, (dtype, accumulate)


def test_two_terms_are_realigned_as_the_toy_projects_them() -> None:
    assert largest_gap(loop(CMGH()), explicit(True)) < ulps(4096, F64)
    assert largest_gap(loop(None), explicit(False)) < ulps(4096, F64)


@pytest.mark.parametrize("only", [None, ["a"]])
@pytest.mark.parametrize("rule", [None, "realign"])
def test_a_curriculum_drops_who_conflicts_and_divides_by_who_is_left(rule: str | None, only: list[str] | None) -> None:
    curriculum = Curriculum(start=-0.2, end=-0.2, warmup=0, only=only)
    callback = HarmonizeFeatures(RULES[rule]() if rule else None, curriculum)
    wanted = loop(RULES[rule]() if rule else None, -0.2, tuple(only or ("a", "b")))
    assert largest_gap(wanted, loop(RULES[rule]() if rule else None)) > 1e-2
    assert largest_gap(fitted(callback).gradients, wanted) < ulps(4096, F64)
    assert callback.fallbacks == 0


def test_all_count_before_the_warmup_is_over_and_where_too_few_would() -> None:
    plain = loop(None)
    early = HarmonizeFeatures(None, Curriculum(start=0.9, end=0.9, warmup=0.5))
    assert largest_gap(fitted(early).gradients, plain) < ulps(4096, F64) and early.fallbacks == 0
    strict = HarmonizeFeatures(None, Curriculum(start=0.9999, end=0.9999, warmup=0, floor=0.5))
    assert largest_gap(fitted(strict).gradients, plain) < ulps(4096, F64) and strict.fallbacks == 1


def test_its_control_drops_as_many_and_others() -> None:
    def kept(sham: Any) -> tuple[Tensor, Any]:
        curriculum = Curriculum(start=-0.2, end=-0.2, warmup=0, sham=sham)
        seen: list[Tensor] = []
        inner = curriculum.select_samples
        curriculum.select_samples = lambda *a: seen.append(inner(*a)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
        callback = HarmonizeFeatures(None, curriculum)
        fitted(callback)
        return seen[0], callback.sham

    (method, one), (control, two) = kept(None), kept("permute")
    assert int(method.sum()) == int(control.sum()) < N and not torch.equal(method, control)
    assert one.calls == two.calls == 1


class Noise(L.Callback):
    """Says of some samples that they are noise."""

    ODD = torch.tensor([n % 3 == 1 for n in range(N)])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch.targets["odd"] = self.ODD[batch.index]


class Logged(L.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def audited(steps: int = 1, devices: int = 1, sham: Any = None) -> tuple[HarmonizeFeatures, list[dict[str, float]]]:
    callback = HarmonizeFeatures(None, Curriculum(start=-1, end=-1, warmup=0, sham=sham), audit="odd")
    logged, strategy = Logged(), "ddp" if devices > 1 else "auto"
    options: dict[str, Any] = {**QUIET, "log_every_n_steps": 1}
    trainer = L.Trainer(
        devices=devices, strategy=strategy, max_steps=steps, callbacks=[Noise(), callback, logged], **options
    )
    trainer.fit(Forked().double(), datamodule=ToyData(torch.float64))
    return callback, logged.steps


def auc(cos_N: Tensor) -> float:
    """How often a sample of noise conflicts more than one that is none, over those with both terms."""
    both = (content(torch.float64)["a"] & content(torch.float64)["b"]).tolist()
    noise = [float(c) for c, odd, has in zip(cos_N, Noise.ODD, both, strict=True) if odd and has]
    clean = [float(c) for c, odd, has in zip(cos_N, Noise.ODD, both, strict=True) if not odd and has]
    wins = [(a < b) + 0.5 * (a == b) for a in noise for b in clean]
    assert noise and clean
    return sum(wins) / len(wins)


def test_an_audit_says_how_well_the_conflict_tells_noise() -> None:
    cos_N = samples()[-1]
    _, (first,) = audited()
    assert first["harmony/auc"] == pytest.approx(auc(cos_N), abs=ulps(4, F32))
    assert 0 < auc(cos_N) < 1


def test_its_control_is_audited_by_what_it_goes_by() -> None:
    callback, (first,) = audited(sham="permute")
    assert callback.sham is not None and callback.sham.calls == 1
    assert first["harmony/auc"] != pytest.approx(auc(samples()[-1]), abs=1e-6)


def test_the_audit_of_the_tenth_stays_and_outlives_a_restart() -> None:
    callback, steps = audited(20)
    tenths = [step.get("harmony/auc_tenth") for step in steps]
    assert tenths[:2] == [None, None] and tenths[2:] == [pytest.approx(steps[2]["harmony/auc"], rel=ulps(4, F32))] * 18
    again = HarmonizeFeatures(CMGH(), audit="odd")
    again.load_state_dict({**callback.state_dict(), "rule": again.state_dict()["rule"]})
    assert again.state_dict()["auc_tenth"] == pytest.approx(tenths[-1], rel=ulps(4, F32))


def test_an_audit_pools_the_last_logged_steps_also_after_a_restart() -> None:
    callback, steps = audited(20)
    pooled = callback.state_dict()["audited"]
    assert len(pooled) == AUDITED and pooled[-1].shape == pooled[0].shape == (2, len(pooled[0].T))
    conflict_G, noise_G = torch.cat(pooled, dim=1)
    wins_NC = (conflict_G[noise_G > 0][:, None] - conflict_G[noise_G == 0]).sign() / 2 + 0.5
    assert steps[-1]["harmony/auc"] == pytest.approx(float(wins_NC.mean()), abs=ulps(4, F32))
    again = HarmonizeFeatures(CMGH(), audit="odd")
    again.load_state_dict({**callback.state_dict(), "rule": again.state_dict()["rule"]})
    assert all(map(torch.equal, again.state_dict()["audited"], pooled))


def _on_a_rank(rank: int) -> tuple[dict[str, dict[str, Tensor]], float]:
    curriculum = Curriculum(start=-0.2, end=-0.2, warmup=0)
    gradients = {
        **{name: fitted(HarmonizeFeatures(rule()), devices=2).gradients for name, rule in RULES.items()},
        "kept": fitted(HarmonizeFeatures(CMGH(), curriculum), devices=2).gradients,
    }
    return gradients, audited(devices=2)[1][0]["harmony/auc"]


@pytest.mark.ddp
def test_two_ranks_equal_the_loop() -> None:
    for found, found_auc in run_ranks(2, _on_a_rank):
        for name, rule in RULES.items():
            assert largest_gap(found[name], loop(rule())) < ulps(4096, F64), name
        assert largest_gap(found["kept"], loop(CMGH(), -0.2)) < ulps(4096, F64)
        assert found_auc == pytest.approx(auc(samples()[-1]), abs=ulps(4, F32))


class Unforked(ToyRecipe):
    forks = {"x": ("a",)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HarmonizeFeatures(), "a rule, a curriculum or both"),
        (lambda: HarmonizeFeatures(NashMTL()), "NashMTL is a rule for Harmonize, at the parameters"),
        (lambda: Curriculum(warmup=0.6, until=0.5), "warmup 0.6, until 0.5"),
        (lambda: Curriculum(floor=2), "floor 2"),
        (lambda: fit(Forked(), HarmonizeFeatures(CMGH(), feature="y")), "feature 'y': no such name"),
        (lambda: fit(Forked(), HarmonizeFeatures(None, Curriculum(only=["c"]))), "only 'c': no such name"),
        (lambda: fit(Unforked(harmonize=False), HarmonizeFeatures(CMGH())), "no feature of this Unforked is shared"),
        (lambda: fit(Forked(), HarmonizeFeatures(CMGH()), Harmonize(PCGrad())), "cannot be combined with"),
        (lambda: fit(Forked(), Harmonize(PCGrad()), HarmonizeFeatures(CMGH())), "cannot be combined with"),
        (
            lambda: fit(BoringModel(), HarmonizeFeatures(CMGH())),
            "ForksFeatures .*; BoringModel lacks it, Contrastive, MultiTask and Fusion have it",
        ),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def fit(recipe: Any, *callbacks: L.Callback) -> None:
    L.Trainer(max_steps=1, callbacks=list(callbacks), **QUIET).fit(recipe, datamodule=ToyData(torch.float32))
