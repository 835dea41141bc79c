"""``descant.harmonize`` in plain loops and plain LightningModules, against explicit loops in double precision.

Letters: B samples, K terms, P numbers of the trunk.
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from descant import harmonize
from descant.modules.core.rng import global_seed, mix
from descant.modules.multitask import (
    CMGH,
    DWA,
    FAMO,
    GradDrop,
    GradNorm,
    MoDo,
    NashMTL,
    PCGrad,
    Rule,
    UncertaintyWeighting,
)
from descant.modules.multitask.mix import mix_of
from tests.callbacks.harmonize.test_terms import ACROSS
from tests.callbacks.harmonize.test_terms import RULES as TERM_RULES
from tests.ranks import run_ranks
from tests.step_toy import QUIET
from tests.tolerance import F32, F64, rounding, ulps

ALL: dict[str, Callable[[], Rule]] = {**TERM_RULES, "graddrop": lambda: GradDrop(leak=0.2)}
#: Those that a single rank has: others compare the gradients of ranks.
RULES = {name: make for name, make in ALL.items() if name not in ACROSS}
#: A rule of each way: stateless and of random order, with a state of gradients and of values, of values, of whole ones.
EACH = ("pcgrad", "gradvac", "gradnorm", "excess", "famo", "uncertainty", "graddrop")
B, STEPS = 8, 4
Losses = dict[str, Tensor]


class Trunk(nn.Module):  # torch.compile leaves a bare nn.Sequential as it is
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.layers(x_BD)


class TwoHeads(nn.Module):
    """A trunk, and two heads that disagree."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 2)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)

    def losses(self, x_BD: Tensor, y_BC: Tensor) -> Losses:
        z_BD = self.trunk(x_BD)
        return {"a": F.mse_loss(self.a(z_BD), y_BC), "b": 2.0 * F.mse_loss(self.b(z_BD), -y_BC)}


def total(losses: Losses) -> Tensor:
    return torch.stack([*losses.values()]).sum()


def content(dtype: torch.dtype = F64) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(STEPS * B, d, generator=generator, dtype=torch.float64).to(dtype) for d in (6, 2))
    return TensorDataset(x, y)


def batches(rows: int = B, dtype: torch.dtype = F64) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = content(dtype).tensors
    yield from zip(x.split(rows), y.split(rows), strict=True)


def of_terms(model: TwoHeads, x: Tensor, y: Tensor) -> tuple[dict[str, list[Tensor]], Tensor, Tensor]:
    """Name -> gradient of each term, ``value_K``, and the gradients of the trunk ``[K, P]``."""
    named = dict(model.named_parameters())
    grads: dict[str, list[Tensor]] = {name: [] for name in named}
    values = []
    for k in ("a", "b"):
        value = model.losses(x, y)[k]
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        for g, (name, p) in zip(found, named.items(), strict=True):
            grads[name].append(torch.zeros_like(p) if g is None else g)
        values.append(value.detach())
    trunk = [torch.stack(g).flatten(1) for name, g in grads.items() if name.startswith("trunk")]
    return grads, torch.stack(values), torch.cat(trunk, dim=1)


def explicit(rule: Rule, accumulate: int = 1, clip: float | None = None) -> list[dict[str, Tensor]]:
    """Weights after each step of SGD, from the formulas: a forward of its own for each term, no graph that is shared.

    Of a rule across batches those are the halves of a batch, as two ranks have them.
    """
    model, after = TwoHeads().double(), []
    named, micros = dict(model.named_parameters()), list(batches(B // accumulate))
    for n in range(STEPS):
        summed = {name: torch.zeros_like(p) for name, p in named.items()}
        for x, y in micros[n * accumulate : (n + 1) * accumulate]:
            grads, value_K, flat_KP = of_terms(model, x, y)
            draw, mix_K = mix(global_seed(), "harmony", n), torch.ones(2, dtype=F64)
            mixed_P = rule.combine(flat_KP[:, None], draw)[0] if rule.whole_gradients else torch.zeros(0)
            if not rule.whole_gradients:
                h_KP = torch.cat([*rule.precondition([flat_KP])], dim=1) if rule.reads_gradients else flat_KP
                gramian_KK = h_KP @ h_KP.T
                if rule.across_batches:
                    one_KP, two_KP = (of_terms(model, x[half::2], y[half::2])[2] for half in (0, 1))
                    gramian_KK = (one_KP @ two_KP.T + two_KP @ one_KP.T) / 2
                mix_K = rule.weights(gramian_KK[None] if rule.reads_gradients else torch.zeros(0), value_K, draw)[0]
                mixed_P = mix_K @ flat_KP
            parts = iter(mixed_P.split([p.numel() for p in model.trunk.parameters()]))
            weights = [1.0, 1.0] if rule.reads_gradients else mix_K.tolist()
            for name, p in named.items():
                plain = weights[0] * grads[name][0] + weights[1] * grads[name][1]
                summed[name] += (next(parts).view_as(p) if name.startswith("trunk") else plain) / accumulate
        rule.learn(lambda seen: seen)
        norm = torch.cat([g.flatten() for g in summed.values()]).norm()
        with torch.no_grad():
            for name, p in named.items():
                p.sub_(0.1 * summed[name] * (1.0 if clip is None else min(1.0, clip / float(norm + 1e-6))))
        after.append({name: p.detach().clone() for name, p in named.items()})
    return after


def largest_gap(model: nn.Module, wanted: dict[str, Tensor]) -> float:
    """Largest difference of weights, relative to the largest weight."""
    found = {name.replace("_orig_mod.", "").removeprefix("model."): p for name, p in model.named_parameters()}
    size = max(float(w.abs().max()) for w in wanted.values())
    return max(float((found[n].detach().double() - w).abs().max()) for n, w in wanted.items()) / size


def loop(rule: Rule, accumulate: int = 1, clip: float | None = None, **scaling: Any) -> nn.Module:
    """A plain loop, as a user writes it."""
    model = TwoHeads().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for n, (x, y) in enumerate(batches(B // accumulate), start=1):
        losses = model.losses(x, y)
        harmonize(losses, model.trunk.parameters(), rule, total(losses) / accumulate)
        if n % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad(**scaling)
    return model


@pytest.mark.parametrize("rule", RULES)
def test_a_plain_loop_equals_the_explicit_one(rule: str) -> None:
    # 20 sums over 30 numbers, whose errors 4 steps add up; solvers stop at 1e-13
    close = 1e-10
    assert largest_gap(loop(RULES[rule]()), explicit(RULES[rule]())[-1]) < close
    for zeros in (True, False):  # gradients that are set to None, or to zero, begin another step
        found = loop(RULES[rule](), 2, clip=0.5, set_to_none=zeros)
        assert largest_gap(found, explicit(RULES[rule](), 2, clip=0.5)[-1]) < close


class Plain(L.LightningModule):
    """A LightningModule that knows nothing of Descant but three lines."""

    def __init__(self, rule: Rule, dtype: torch.dtype = F64, compiled: bool = False) -> None:
        super().__init__()
        self.model, self.rule = TwoHeads().to(dtype), rule  # 1
        if compiled:
            self.model.trunk.compile()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.losses = self.model.losses(*batch)  # 2
        return total(self.losses)

    def backward(self, loss: Tensor) -> None:
        harmonize(self.losses, self.model.trunk.parameters(), self.rule, loss)  # 3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(module: Plain, rows: int = B, **options: Any) -> nn.Module:
    data = content(next(module.parameters()).dtype)
    own: Any = DistributedSampler(data, 2, int(os.environ["RANK"]), shuffle=False) if "strategy" in options else None
    L.Trainer(max_epochs=1, **QUIET, **options).fit(module, DataLoader(data, rows, sampler=own))
    return module


@pytest.mark.parametrize("rule", EACH)
def test_a_plain_module_equals_the_explicit_loop(rule: str) -> None:
    for accumulate in (1, 2):
        options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
        found = fitted(Plain(RULES[rule]()), B // accumulate, **options)
        assert largest_gap(found, explicit(RULES[rule](), accumulate, clip=0.5)[-1]) < 1e-10  # as above


def _on_a_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rule in ALL:
        module = Plain(ALL[rule]())
        fitted(module, B // 2, strategy="ddp", devices=2)
        found[f"{rule} 1"] = (module.state_dict(), module.rule.state_dict())
    for rule in EACH:
        module = Plain(RULES[rule]())
        fitted(module, B // 4, strategy="ddp", devices=2, accumulate_grad_batches=2)
        found[f"{rule} 2"] = (module.state_dict(), module.rule.state_dict())
    return found


@pytest.mark.ddp
def test_two_ranks_equal_the_explicit_loop_and_each_other() -> None:
    first, second = run_ranks(2, _on_a_rank)
    for case, (weights, state) in first.items():
        rule, accumulate = case.split()
        module = Plain(ALL[rule]())
        module.load_state_dict(weights)
        assert largest_gap(module, explicit(ALL[rule](), int(accumulate))[-1]) < 1e-10, case  # as above
        other, other_state = second[case]
        assert all(torch.equal(other[name], x) for name, x in weights.items()), case
        assert state.keys() == other_state.keys() and all(torch.equal(other_state[n], x) for n, x in state.items())


# precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*EACH, "nash"])
def test_a_scaler_changes_nothing(rule: str) -> None:
    """Nash-MTL's mix is not scale-free: it has to see the gradients as they are without the scaler."""
    model, made = TwoHeads().double(), RULES[rule]()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for n, (x, y) in enumerate(batches(B // 2), start=1):
        losses = model.losses(x, y)
        harmonize(losses, model.trunk.parameters(), made, scaler.scale(total(losses) / 2))
        if n % 2 == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert largest_gap(model, explicit(RULES[rule](), 2, clip=0.5)[-1]) < 1e-10  # as above


@pytest.mark.parametrize("rule", EACH)
def test_a_step_that_overflows_is_skipped_and_leaves_the_rule_as_it_was(rule: str) -> None:
    model, made = TwoHeads().float(), RULES[rule]()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    for n, (x, y) in enumerate(batches(dtype=F32)):
        if n == 2:
            scaler.update(3e38)  # of float32: the gradients overflow
        weights, before = copy.deepcopy(model.state_dict()), copy.deepcopy(made.state)
        losses = model.losses(x, y)
        harmonize(losses, model.trunk.parameters(), made, scaler.scale(total(losses)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
        assert same == (n == 2)
        if made.remembers:
            unchanged = before.keys() == made.state.keys() and all(
                torch.equal(before[k], x) for k, x in made.state.items()
            )
            assert unchanged == (n == 2)
        scaler.update(2.0)
    assert made.loop.fallbacks == made.reads_gradients  # of values, only the scaler knows
    assert made.loop.steps == STEPS


@pytest.mark.parametrize("rule", ["gradnorm", "gradvac", "famo"])
def test_a_head_that_overflows_alone_leaves_the_rule_as_it_was_to_the_end_of_the_step(rule: str) -> None:
    model, made = TwoHeads().double(), RULES[rule]()
    hook = model.a.weight.register_hook(lambda g: g * torch.inf)
    for n, (x, y) in enumerate(batches(B // 2)):
        if n == 1:
            hook.remove()  # .grad stays infinite
        if n == 2:
            model.zero_grad()
        harmonize(model.losses(x, y), model.trunk, made)
        assert bool(made.state) == (n > 1), n
    assert made.loop.steps == 2 and made.loop.fallbacks == 0


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16-mixed"), (torch.float16, "16-mixed")])
def test_half_precision_under_lightning_is_near_the_explicit_loop(dtype: torch.dtype, precision: Any) -> None:
    for rule in EACH:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if dtype == torch.float16 else None
        found = fitted(Plain(RULES[rule](), F32), plugins=[MixedPrecision(precision, "cpu", scaler)])
        # four steps through layers whose inputs and outputs have 8 bits, or 11
        assert largest_gap(found, explicit(RULES[rule]())[-1]) < (2e-2 if dtype == torch.bfloat16 else 2e-3), rule


@pytest.mark.parametrize("rule", EACH)
def test_a_term_that_is_not_finite_leaves_the_plain_sum_and_is_counted(rule: str) -> None:
    for spoil in (lambda z: z.sum() * torch.nan, lambda z: (z.sum() * 0).sqrt()):  # its value, or its gradient alone
        made, model, twin = RULES[rule](), TwoHeads().double(), TwoHeads().double()
        for n, (x, y) in enumerate(batches()):
            state = copy.deepcopy(made.state)
            for which in (model, twin):
                which.zero_grad()
                losses = which.losses(x, y)
                if n == 2:
                    losses["a"] = losses["a"] + spoil(which.trunk(x))
                if which is model:
                    mix_K = harmonize(losses, model.trunk, made)
                else:
                    total(losses).backward()
            if n == 2:
                by_values = not made.reads_gradients and not torch.isnan(losses["a"])
                assert by_values or mix_K.tolist() == [1.0, 1.0]
                assert all(torch.equal(state[k], x) for k, x in made.state.items())
                wanted = {name: p.grad for name, p in twin.named_parameters()}
                for name, p in model.named_parameters():
                    if not by_values:
                        torch.testing.assert_close(p.grad, wanted[name], **rounding(64, F64), equal_nan=True, msg=name)
                assert made.loop.fallbacks == (not by_values)


# saved, compiled, sharded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_is_saved_and_loaded_goes_on_to_the_bit(rule: str) -> None:
    def trained(resumes: bool) -> tuple[nn.Module, Rule]:
        model, made = TwoHeads().double(), RULES[rule]()
        for n, (x, y) in enumerate(batches()):
            if n == 2 and resumes:
                state = copy.deepcopy(made.state_dict())
                made = RULES[rule]()
                made.load_state_dict(state)
            model.zero_grad()
            harmonize(model.losses(x, y), model.trunk, made)
            torch.optim.SGD(model.parameters(), 0.1).step()
        return model, made

    (whole, one), (resumed, two) = trained(False), trained(True)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert one.loop.steps == two.loop.steps == STEPS and one.state.keys() == two.state.keys()
    assert all(torch.equal(one.state[name], x) for name, x in two.state.items())


@pytest.mark.slow
def test_a_compiled_module_equals_the_explicit_loop_or_names_its_setting() -> None:
    import torch._functorch.config as functorch

    module = Plain(PCGrad(), compiled=True)
    x, y = next(batches())
    total(module.model.losses(x, y)).backward()  # its graph is for one backward from here on
    with pytest.raises(ValueError, match="donated_buffer = False before it is compiled"):
        harmonize(module.model.losses(x, y), module.model.trunk, PCGrad())
    torch._dynamo.reset()
    for rule in EACH:
        found = fitted(Plain(RULES[rule](), compiled=True), B // 2, accumulate_grad_batches=2)
        # compiled kernels round in another order, and a conflict of gradients is what is left of them
        assert largest_gap(found, explicit(RULES[rule](), 2)[-1]) < 1e-9, rule
    torch._dynamo.reset()
    with functorch.patch(donated_buffer=False):  # monkeypatch would leave the setting without a value
        model = Plain(PCGrad(), compiled=True).model
        total(model.losses(x, y)).backward()
        harmonize(model.losses(x, y), model.trunk, PCGrad())
    torch._dynamo.reset()


def _sharded(rank: int) -> tuple[list[str], list[dict[str, Tensor]]]:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    refused, weights = [], []
    for make, freed in itertools.product((PCGrad, lambda: FAMO(lr=0.5)), (True, False)):
        model, rule = TwoHeads().double(), make()
        for part in (model.trunk, model):
            fully_shard(part, reshard_after_forward=freed)
        register_fsdp_forward_method(model, "losses")
        split, optimizer = list(model.trunk.parameters()), torch.optim.SGD(model.parameters(), 0.1)
        try:
            for x, y in batches():
                losses = model.losses(x[rank::2], y[rank::2])
                harmonize(losses, split if freed else model.trunk, rule)
                optimizer.step()
                optimizer.zero_grad()
        except ValueError as error:
            refused.append(str(error))
        else:
            weights.append({name: p.full_tensor().detach() for name, p in model.named_parameters()})  # type: ignore[attr-defined]
    torch.distributed.destroy_process_group()
    return refused, weights


@pytest.mark.ddp
def test_sharded_parameters_are_for_rules_of_values() -> None:
    wanted = explicit(FAMO(lr=0.5))[-1]
    for refused, weights in run_ranks(2, _sharded):
        assert len(refused) == 2 and all("PCGrad needs whole gradients" in message for message in refused)
        assert len(weights) == 2
        for found in weights:
            assert max(float((found[name] - w).abs().max()) for name, w in wanted.items()) < ulps(4096, F64)


# what cannot be ------------------------------------------------------------------------------------------------------


def call(change: Callable[[Losses, TwoHeads], Any] = lambda losses, model: None, rule: Rule | None = None) -> None:
    """``change`` returns other arguments than these losses, this trunk and no loss."""
    model = TwoHeads().double()
    losses = model.losses(*next(batches()))
    given = change(losses, model) or {}
    harmonize(**{"losses": losses, "parameters": model.trunk, "rule": rule or PCGrad(), **given})


def twice_with_other_terms(rule: Rule) -> None:
    call(rule=rule)
    call(lambda losses, model: {"losses": {"a": losses["a"], "c": losses["b"]}}, rule)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: call(lambda x, m: {"losses": [x["a"]]}), r"one term, 0: .* loss.backward\(\)$"),
        (lambda: call(lambda x, m: {"losses": {}}), "no term"),
        (lambda: call(lambda x, m: {"losses": [x["a"], x["b"].detach()]}), "term 1 has no gradient: it is detached"),
        (lambda: call(lambda x, m: {"losses": [x["a"], x["b"].expand(3)]}), r"term 1 has shape \(3,\); one number"),
        (lambda: call(lambda x, m: {"parameters": nn.Linear(2, 2)}), "no term reaches one of them"),
        (lambda: call(lambda x, m: {"parameters": iter(())}), "none is given .a generator"),
        (lambda: call(lambda x, m: {"loss": x["a"] * 2}), "term b is not in the loss"),
        (lambda: call(lambda x, m: {"loss": x["a"] + x["b"] / 2}), "weighs its terms by 1, 0.5: put weights into"),
        (lambda: call(lambda x, m: {"loss": x["a"] + x["b"] + m.a.weight.norm()}), "has more in it than its terms"),
        (lambda: call(rule=MoDo()), "MoDo compares micro-batches, and a call has one: 2 ranks, or the callback"),
        (lambda: twice_with_other_terms(DWA()), "terms a, c, before a, b: DWA remembers"),
        (lambda: mix_of(DWA(), torch.eye(2), None, 0), "DWA mixes by the values of the terms, and there are gradients"),
        (lambda: mix_of(GradNorm(), torch.eye(2), None, 0), "GradNorm mixes by the values"),
        (lambda: mix_of(CMGH(), torch.zeros(0), torch.ones(2), 0), "CMGH mixes by gradients, and there are values"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_a_parameter_that_no_term_reaches_has_no_gradient_and_a_frozen_one_neither() -> None:
    model, idle = TwoHeads().double(), nn.Parameter(torch.ones(3))
    model.trunk.layers[0].bias.requires_grad_(False)
    harmonize(model.losses(*next(batches())), [idle, *model.trunk.parameters()], UncertaintyWeighting())
    harmonize(model.losses(*next(batches())), [idle, *model.trunk.parameters()], NashMTL())
    assert (
        idle.grad is None and model.trunk.layers[0].bias.grad is None and model.trunk.layers[0].weight.grad is not None
    )
    twice_with_other_terms(PCGrad())  # it remembers nothing


def test_importing_the_package_imports_nothing_for_it() -> None:
    code = "import sys, descant; assert 'harmonize' in dir(descant); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
