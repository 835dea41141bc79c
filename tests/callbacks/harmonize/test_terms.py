"""Harmonizers under Lightning's automatic optimization, against explicit loops over samples in double precision.

Letters: K terms, N samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.distributed.tensor import DTensor

from descant.callbacks.harmonize.terms import Harmonize
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.rng import mix
from descant.modules.multitask import (
    CMGH,
    DWA,
    FAMO,
    IMTLG,
    IMTLL,
    MGDA,
    MIMO,
    RLW,
    STCH,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    ExcessMTL,
    FairGrad,
    GradDrop,
    GradNorm,
    GradVac,
    MoDo,
    NashMTL,
    PCGrad,
    Rule,
    SDMGrad,
    UncertaintyWeighting,
    UPGrad,
)
from descant.modules.multitask.mix import gramian
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Compile, Shard
from descant.run.sharded import Sharded
from tests.ranks import run_ranks
from tests.step_toy import MIX, QUIET, KeepGradients, N, ToyData, ToyRecipe, content, largest_gap
from tests.tolerance import F32, F64, ulps

RULES: dict[str, Callable[[], Rule]] = {
    "pcgrad": PCGrad,
    "realign": CMGH,
    "gradvac": lambda: GradVac(beta=0.5),
    "cagrad": CAGrad,
    "mgda": MGDA,
    "upgrad": UPGrad,
    "nash": NashMTL,
    "imtlg": IMTLG,
    "aligned": AlignedMTL,
    "gradnorm": lambda: GradNorm(lr=0.1),
    "uncertainty": lambda: UncertaintyWeighting(lr=0.1),
    "dwa": lambda: DWA(window=1),
    "fairgrad": FairGrad,
    "config": ConFIG,
    "dualproj": DualProj,
    "sdmgrad": lambda: SDMGrad(lr=0.5),  # of the default 10, w magnifies rounding
    "famo": lambda: FAMO(lr=0.5),
    "mimo": lambda: MIMO(weight=2.0, mu=0.5),
    "stch": lambda: STCH(mu=0.5, warmup=0, window=1),
    "rlw": RLW,
    "imtll": lambda: IMTLL(lr=0.1),
    "excess": lambda: ExcessMTL(lr=0.5),
    "modo": lambda: MoDo(lr=0.02),
    "sdmgrad_across": lambda: SDMGrad(lr=0.5, across_batches=True),
}
#: Of rules that compare micro-batches: one batch on one rank is refused.
ACROSS = [name for name, make in RULES.items() if make().across_batches]
STEPS = 3


class Watching(KeepGradients):
    """Gradients and weights of every step, and which samples each of its micro-batches had."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor], list[list[int]]]] = []
        self._rows: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._rows.append([int(i) for i in batch.index if int(i) >= 0])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        weights = {
            name.replace("_orig_mod.", ""): (p.full_tensor() if isinstance(p, DTensor) else p).detach().double().clone()
            for name, p in pl_module.named_parameters()
        }
        self.steps.append((self.gradients, weights, self._rows))
        self.gradients, self._rows = {}, []


def fitted(
    rule: Rule,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float64,
    devices: int = 1,
    strategy: Any = None,
    parts: dict[str, Any] | None = None,
    **options: Any,
) -> Watching:
    watch, recipe = Watching(), ToyRecipe(harmonize=False, **(parts or {}))
    trainer = L.Trainer(
        devices=devices,
        strategy=strategy or ("ddp" if devices > 1 else "auto"),
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        callbacks=[Harmonize(rule, **options), watch],
        **QUIET,
    )
    trainer.fit(recipe.double() if dtype == torch.float64 else recipe.float(), datamodule=ToyData(dtype))
    return watch


def of_terms(weights: dict[str, Tensor], rows: Sequence[int]) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Term -> gradients of what some samples add to it, one by one, and its value: over all samples that have it."""
    recipe, data = ToyRecipe(harmonize=False).double(), content(torch.float64)
    recipe.load_state_dict(weights)
    parameters = dict(recipe.named_parameters())
    grads = {k: {name: torch.zeros_like(p) for name, p in parameters.items()} for k in MIX}
    values = dict.fromkeys(MIX, 0.0)
    for i in rows:
        z_D = recipe.towers["trunk"](data["x"][i : i + 1]).h_BTD[0, 0]
        for k, y in (("a", data["y"][i]), ("b", -data["y"][i])):
            if not data[k][i]:
                continue
            loss = ((recipe.heads[k](z_D) - y) ** 2).sum() * data["weight"][i] / data[k].sum()
            values[k] += float(loss.detach())
            found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, g in zip(parameters, found, strict=True):
                grads[k][name] += 0 if g is None else g
    return grads, values


def plain_sum(grads: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: MIX["a"] * grads["a"][name] + MIX["b"] * grads["b"][name] for name in grads["a"]}


def flat(grads: dict[str, dict[str, Tensor]]) -> Tensor:
    """``[K, P]``."""
    return torch.stack([torch.cat([g.flatten() for g in grads[k].values()]) for k in MIX])


def explicit(rule: Rule, watched: list[list[Any]], accumulate: int, window: str) -> list[dict[str, Tensor]]:
    """The gradients of every step from formulas; ``watched``: of each rank, its steps."""
    wanted = []
    for n, steps in enumerate(zip(*watched, strict=True)):
        weights = steps[0][1]
        micros = [[step[2][m] for step in steps] for m in range(accumulate)]  # of each the rows of each rank
        if window == "step" and rule.reads_gradients:  # one of values mixes each micro-batch by its own
            micros = [[rows for ranks in micros for rows in ranks]]
        total = {name: torch.zeros_like(w) for name, w in weights.items()}
        base_K = torch.tensor(list(MIX.values()), dtype=torch.float64)
        for parts in micros:
            grads, values = of_terms(weights, [i for rows in parts for i in rows])
            if rule.across_batches:
                each = [flat(of_terms(weights, rows)[0]) * len(micros) * len(parts) for rows in parts]
                pairs = [(a_KP, b_KP) for m, a_KP in enumerate(each) for n, b_KP in enumerate(each) if m != n]
            else:
                (h_KP,) = rule.precondition([flat(grads) * len(micros)])
                pairs = [(h_KP, h_KP)]
            gramian = torch.stack([a_KP @ b_KP.T for a_KP, b_KP in pairs]).mean(dim=0) * base_K[:, None] * base_K
            value = torch.tensor([values[k] for k in MIX], dtype=torch.float64) * len(micros)
            mixed = rule.weights(gramian[None], value, mix(0, "harmony", n))[0]
            for name in total:
                total[name] += sum(m * MIX[k] * grads[k][name] for m, k in zip(mixed, MIX, strict=True))
        rule.learn(lambda seen: seen)
        wanted.append(total)
    return wanted


def gaps(rule: str, accumulate: int, window: str, watched: list[list[Any]]) -> list[float]:
    wanted = explicit(RULES[rule](), watched, accumulate, window)
    return [largest_gap(found[0], want) for found, want in zip(watched[0], wanted, strict=True)]


@pytest.mark.parametrize("rule", RULES)
def test_a_step_equals_the_loop(rule: str) -> None:
    for dtype, exact in ((F32, ulps(64, F32)), (F64, ulps(4096, F64))):
        for accumulate, window in (
            ((2, "step"), (3, "step")) if rule in ACROSS else ((1, "micro"), (2, "micro"), (2, "step"))
        ):
            watch = fitted(RULES[rule](), accumulate, dtype, window=window)
            assert len(watch.steps) == STEPS and sorted(i for rows in watch.steps[0][2] for i in rows) == list(range(N))
            assert max(gaps(rule, accumulate, window, [watch.steps])) < exact, (dtype, accumulate, window)


def _on_a_rank(rank: int) -> dict[str, Any]:
    cases = [(rule, 1, "micro") for rule in RULES] + [
        ("cagrad", 2, "step"),
        ("pcgrad", 2, "micro"),
        ("dwa", 2, "step"),
        *((rule, 2, window) for rule in (*ACROSS, "excess") for window in ("micro", "step")),
    ]
    return {
        f"{rule} {accumulate} {window}": fitted(RULES[rule](), accumulate, devices=2, window=window).steps
        for rule, accumulate, window in cases
    }


@pytest.mark.ddp
def test_two_ranks_equal_the_loop_and_each_other() -> None:
    first, second = run_ranks(2, _on_a_rank)
    for case in first:
        rule, accumulate, window = case.split()
        assert max(gaps(rule, int(accumulate), window, [first[case], second[case]])) < ulps(4096, F64), case
        for (one, _, _), (two, _, _) in zip(first[case], second[case], strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one), case


def _sharded(rank: int) -> dict[str, Any]:
    found = {}
    for rule, accumulate, window in SHARDED:
        # as two replicas, whose parameters have a mesh of two dimensions, or as one group of two
        shard = Shard(reshard_after_forward=False, replicate=2 if rule in ("nash", "cagrad") else 1)
        parts = {"shard": shard, "checkpointing": Checkpointing()}
        case = (RULES[rule](), accumulate, torch.float32, 2, Sharded("gloo"), parts)
        found[f"{rule} {accumulate} {window}"] = fitted(*case, window=window).steps
    return found


SHARDED = (("pcgrad", 1, "micro"), ("nash", 2, "micro"), ("cagrad", 2, "step"), ("uncertainty", 2, "micro"))


@pytest.mark.slow
@pytest.mark.ddp
def test_parameters_that_are_split_over_ranks_equal_the_loop() -> None:
    first, second = run_ranks(2, _sharded)
    for rule, accumulate, window in SHARDED:
        case = f"{rule} {accumulate} {window}"
        assert max(gaps(rule, accumulate, window, [first[case], second[case]])) < ulps(64, F32), case


def _freed(rank: int) -> str:
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    with pytest.raises(ValueError) as refused:
        fitted(PCGrad(), 1, torch.float32, 2, strategy, {"shard": Shard()})
    return str(refused.value)


@pytest.mark.slow
@pytest.mark.ddp
def test_parameters_that_are_freed_after_forward_are_refused() -> None:
    for message in run_ranks(2, _freed):
        assert "is freed between forward and backward" in message and "reshard_after_forward false" in message


@pytest.mark.slow
def test_compiled_towers_equal_the_loop() -> None:
    watch = fitted(PCGrad(), 2, torch.float32, parts={"compile": Compile()})
    steps = [({n.replace("_orig_mod.", ""): g for n, g in grads.items()}, w, rows) for grads, w, rows in watch.steps]
    # compiled kernels: 840 ulps of float32, where a conflict of gradients is what is left of them
    assert max(gaps("pcgrad", 2, "micro", [steps])) < 1e-4


def test_what_is_planted_is_mixed_as_the_formula_says() -> None:
    """Two terms pull one weight apart, and one of them another weight: cos = -1/sqrt 2, found by hand."""

    class Planted(ToyRecipe):
        def forward(self, batch: Any) -> Any:
            w: Any = self.heads["a"].bias
            rows = torch.ones(len(batch), dtype=w.dtype)
            return Output({"a": Term(w[0] * rows), "b": Term((w[1] - w[0]) * rows)})

        def shared_parameters(self) -> Any:
            return [self.heads["a"].bias]

    def step(rule: Rule | None, **options: Any) -> Tensor:
        keep, recipe = KeepBias(), Planted(harmonize=False).double()
        recipe.requires_grad_(False)
        recipe.heads["a"].bias.requires_grad_()
        recipe.step.mix = {}
        callbacks: list[Any] = [keep] if rule is None else [Harmonize(rule, **options), keep]
        trainer = L.Trainer(max_steps=1, callbacks=callbacks, **QUIET)
        trainer.fit(recipe, datamodule=ToyData(torch.float64))
        return keep.grad

    assert step(None).tolist() == [0.0, 1.0]
    # g_a = (1, 0), g_b = (-1, 1): g_a loses half of g_b, and g_b all of g_a
    assert step(PCGrad()).tolist() == pytest.approx([0.5, 1.5], abs=ulps(64, F64))
    # its control: 2 g_a + 3/2 g_b the other way round
    assert step(PCGrad(), sham="permute").tolist() == pytest.approx([-0.5, 2.0], abs=ulps(64, F64))
    assert step(CMGH()).tolist() == pytest.approx([0.5, 1.5], abs=ulps(64, F64))
    # the nearest point to 0 of the segment, (1/5, 2/5), times 2
    assert step(MGDA()).tolist() == pytest.approx([0.4, 0.8], abs=ulps(64, F64))
    assert step(UPGrad()).tolist() == pytest.approx([0.5, 1.5], abs=ulps(64, F64))
    root = 2**0.5
    # as far along (1, 0) as along (-1, 1) / sqrt 2, from a mix that sums to 2
    one = 2 * (root + 1) / (2 * root + 3)
    assert step(IMTLG()).tolist() == pytest.approx([2 - 2 * one, one], abs=ulps(64, F64))
    # a (a - b) = 1 and b (2 b - a) = 1
    a = (1 - 1 / root) ** -0.5
    # found step by step, until a step of Newton changes nothing
    assert step(NashMTL()).tolist() == pytest.approx([a - a / root, a / root], abs=ulps(4096, F64))
    # within half of |g_0| = 1/2 of g_0 = (0, 1/2), where both gain alike: d_0 = d_1 - d_0 = t on the circle; times 2
    t = (1 + (1 - 5 * (1 / 4 - 1 / 16)) ** 0.5) / 5
    assert step(CAGrad(0.5)).tolist() == pytest.approx([2 * t, 4 * t], abs=ulps(64, F64))


class KeepBias(L.Callback):
    grad: Tensor

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.grad = pl_module.heads["a"].bias.grad.clone()


def test_the_mix_changes_nothing_where_terms_agree_and_something_where_they_do_not() -> None:
    """The toy's terms conflict: no rule gives its plain sum, so the loops above cannot agree by doing nothing."""
    plain = fitted(CAGrad(radius=0)).steps[0][0]
    grads, _ = of_terms(fitted(CAGrad(radius=0)).steps[0][1], range(N))
    total = plain_sum(grads)
    assert largest_gap(plain, total) < ulps(4096, F64)
    for name, rule in RULES.items():
        if name == "dualproj":  # the sum itself, where that conflicts with neither term, as here
            continue
        first = (fitted(rule(), 2, window="step") if name in ACROSS else fitted(rule())).steps
        # these begin with the plain sum, or near it
        late = name in ("gradnorm", "uncertainty", "imtll", "dwa", "gradvac", "excess", "modo")
        assert largest_gap(first[-1 if late else 0][0], fitted(CAGrad(0)).steps[-1 if late else 0][0]) > 1e-3, name


class Counts(PCGrad):
    calls = 0

    def weights(self, *args: Any) -> Tensor:
        self.calls += 1
        return super().weights(*args)


def test_between_looks_the_mix_stays() -> None:
    rule = Counts()
    fitted(rule, every=2)
    assert rule.calls == 2  # of steps 0 and 2
    rule = Counts()
    fitted(rule, accumulate=2, window="step")
    assert rule.calls == STEPS


def test_what_a_rule_remembers_is_in_the_checkpoint() -> None:
    for make in RULES.values():
        harmonize = Harmonize(make(), window="step")
        L.Trainer(max_steps=2, callbacks=[harmonize], accumulate_grad_batches=2, **QUIET).fit(
            ToyRecipe(harmonize=False).double(), datamodule=ToyData(torch.float64)
        )
        again = Harmonize(make())
        again.load_state_dict(copy.deepcopy(harmonize.state_dict()))
        gramian = torch.tensor([[[2.0, -1.0], [-1.0, 3.0]]], dtype=torch.float64)
        value = torch.tensor([0.7, 1.3], dtype=torch.float64)
        assert torch.equal(again.rule.weights(gramian, value, 5), harmonize.rule.weights(gramian, value, 5))
        assert again.mix_K is not None and harmonize.mix_K is not None
        assert torch.equal(again.mix_K, harmonize.mix_K) and again.names == ("a", "b")


def test_a_gradient_that_is_not_finite_leaves_the_plain_sum_and_is_counted() -> None:
    class Broken(ToyRecipe):
        def forward(self, batch: Any) -> Any:
            output = super().forward(batch)
            if self.global_step == 1:
                output.terms["a"].value.register_hook(lambda g: g * torch.nan if self.hooks.probing else g)
            return output

    watch, harmonize = Watching(), Harmonize(PCGrad())
    trainer = L.Trainer(max_steps=STEPS, callbacks=[harmonize, watch], **QUIET)
    trainer.fit(Broken(harmonize=False).double(), datamodule=ToyData(torch.float64))
    assert harmonize.fallbacks == 1
    found, weights, rows = watch.steps[1]
    grads, _ = of_terms(weights, rows[0])
    assert largest_gap(found, plain_sum(grads)) < ulps(4096, F64)


class OneTerm(ToyRecipe):
    def forward(self, batch: Any) -> Any:
        return Output({"a": super().forward(batch).terms["a"]})


class OtherTerms(ToyRecipe):
    def forward(self, batch: Any) -> Any:
        terms = super().forward(batch).terms
        return Output(terms if self.global_step == 0 else {"a": terms["a"], "c": terms["b"]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Harmonize(PCGrad(), every=0), "every 0: 1 is the least"),
        (lambda: Harmonize(DWA(), every=2), "every 2: DWA uses no gradients; leave it out"),
        (lambda: Harmonize(GradDrop()), "GradDrop is a rule for HarmonizeFeatures; here such as PCGrad"),
        (lambda: CAGrad(-1), "radius -1: not below 0"),
        (lambda: GradVac(2), "beta 2: between 0 and 1"),
        (lambda: DWA(0), "window 0"),
        (
            lambda: fitted(MoDo()),
            "MoDo compares the micro-batches of a step, and has one: window step with trainer.acc",
        ),
        (lambda: fitted(SDMGrad(across_batches=True), 2), "SDMGrad compares the micro-batches of a step, and has one"),
        (lambda: fit(OneTerm(harmonize=False)), "one term, a: there is nothing to harmonize it with"),
        (lambda: fit(OtherTerms(harmonize=False)), "terms a, c, before a, b: always the same ones"),
        (lambda: fit(ToyRecipe(harmonize=True)), "a rule acts at the features already"),
        (lambda: fit(BoringModel()), "needs the protocol HasObjective .*; BoringModel lacks it"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def fit(recipe: Any) -> None:
    callbacks: list[L.Callback] = [Harmonize(PCGrad())]
    L.Trainer(max_steps=2, callbacks=callbacks, **QUIET).fit(recipe, datamodule=ToyData(torch.float32))


def test_the_cosines_of_a_run_are_drawn_and_resumed(tmp_path: Path) -> None:
    harmonize, logger = Harmonize(PCGrad()), TensorBoardLogger(tmp_path, name="", version="")
    options = {**QUIET, "logger": logger}
    trainer = L.Trainer(max_steps=STEPS, callbacks=[harmonize], log_every_n_steps=1, **options)
    trainer.fit(ToyRecipe(harmonize=False).double(), datamodule=ToyData(torch.float64))
    steps, cos_SQ = harmonize.track.points()
    assert steps == list(range(STEPS)) and cos_SQ.shape == (STEPS, 1)
    # as found by hand, of the first step
    grads, _ = of_terms({n: p.detach() for n, p in ToyRecipe(harmonize=False).double().named_parameters()}, range(N))
    a, b = (torch.cat([g.flatten() for g in grads[k].values()]) for k in MIX)
    assert cos_SQ[0, 0] == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)), abs=ulps(64, F64))
    metrics = trainer.callback_metrics
    assert float(metrics["harmony/cos/a~b"]) == pytest.approx(cos_SQ[-1, 0], abs=ulps(4, F32))
    assert float(metrics["harmony/conflict"]) == pytest.approx(float((cos_SQ < 0).mean()), abs=ulps(4, F32))
    assert (tmp_path / "pictures" / f"harmony-{STEPS}.png").is_file()
    again = Harmonize(PCGrad())
    again.load_state_dict(harmonize.state_dict())
    assert again.track.points()[0] == steps and again.looks == STEPS


def test_scalars_count_too() -> None:
    assert gramian([torch.tensor([1.0, -2.0]), torch.tensor([[3.0], [1.0]])]).tolist() == [[10.0, 1.0], [1.0, 5.0]]


def test_a_step_that_was_left_in_its_middle_is_in_no_other() -> None:
    """A rollback begins the same fit anew, with the same callback."""
    rule = Harmonize(PCGrad())
    rule._sums = [torch.full((2,), torch.nan)]
    rule.on_train_start(None, None)  # type: ignore[arg-type]
    assert rule._sums == []
