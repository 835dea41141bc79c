"""MSES and MSLR in real fits: learning rates by modality, against an explicit loop in double precision, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks.balance.mses import MSES
from descant.callbacks.balance.mslr import MSLR
from descant.callbacks.balance.tower_rates import TowerRates
from descant.recipes import Fusion
from tests.callbacks.balance.test_balance import fit, model, one, whole
from tests.callbacks.balance.test_g_blending import AdvantageOutput, held_out
from tests.ranks import run_ranks
from tests.recipes.test_fusion import WIDTHS, gradients, recipe
from tests.step_toy import QUIET, largest_gap
from tests.tolerance import F64, ulps

EPOCHS, LR = 6, 0.5
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR / 10, weight_decay=0.1),
}
#: Callback -> it, and the factors of each step by an explicit loop over (losses, accuracies) of the validations so far.
RULES: dict[str, tuple[Callable[[], TowerRates], Callable[[list[Any]], list[float]]]] = {
    "mses": (lambda: MSES(patience=1, smoothing=0.25), lambda seen: stopped(seen, 1, 0.25)),
    "mses-sham": (lambda: MSES(1, 0.25, sham="permute"), lambda seen: stopped([s[::-1] for s in seen], 1, 0.25)),
    "keep": (lambda: MSLR({"image": 0.3}), lambda seen: [0.3, 1.0]),
    "smooth": (lambda: MSLR({"image": 0.25, "text": 4.0}, smooth=0.5), lambda seen: [0.5, 2.0]),
    "dynamic": (lambda: MSLR({"text": 0.5}, window=2), lambda seen: dynamic(seen, [1.0, 0.5])),
    "dynamic-sham": (
        lambda: MSLR({"text": 0.5}, window=2, sham="permute"),
        lambda seen: dynamic([s[::-1] for s in seen], [0.5, 1.0]),
    ),
}


def stopped(seen: list[list[Any]], patience: int, smoothing: float) -> list[float]:
    """Each modality by itself, as the loop of the public code: the epoch of its least loss, and how long ago it was."""
    rates = []
    for m in range(len(seen[0])):
        rate, least, at = 1.0, float("inf"), 0
        for epoch, scores in enumerate(seen):
            loss = scores[m][0] if epoch == 0 else smoothing * seen[epoch - 1][m][0] + (1 - smoothing) * scores[m][0]
            if loss < least:
                least, at = loss, epoch
            rate = 0.0 if epoch - at > patience else rate
        rates.append(rate)
    return rates


def dynamic(seen: list[list[tuple[float, float]]], own: list[float], window: int = 2) -> list[float]:
    if len(seen) <= window:
        return own
    before = [sum(s[m][1] for s in seen[-window - 1 : -1]) / window for m in range(2)]
    return [r * (seen[-1][m][1] / before[m] if before[m] else 1.0) for m, r in enumerate(own)]


def validated(at: Fusion) -> list[tuple[float, float]]:
    """Loss and accuracy of each modality alone, a sample at a time."""
    scores = []
    for m in WIDTHS:
        values = []
        for b in held_out():
            logits_BC = at.own[m](at.latents(b)[m])
            for n in (b.present[m] & (b.targets["kind"] >= 0)).nonzero().flatten().tolist():
                y = int(b.targets["kind"][n])
                loss = float(-logits_BC[n].log_softmax(dim=0)[y])
                values.append((loss, float(logits_BC[n].argmax() == y)))
        scores.append((sum(v[0] for v in values) / len(values), sum(v[1] for v in values) / len(values)))
    return scores


class Weights(L.Callback):
    """After each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.steps.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_epoch_start(trainer, pl_module)


def fitted(
    callback: TowerRates,
    optimizer: str = "sgd",
    world: int = 1,
    accumulate: int = 1,
    epochs: int = EPOCHS,
    ckpt: Path | None = None,
    save: Path | None = None,
) -> list[dict[str, Tensor]]:
    """Weights before each epoch of one step, and at the end; a validation after each, and one before, of sanity."""
    weights = Weights()
    options = {name: value for name, value in QUIET.items() if name != "limit_val_batches"}
    strategy = "ddp" if world > 1 else "auto"
    trainer = L.Trainer(
        max_epochs=epochs,
        devices=world,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=1,
        callbacks=[weights, callback],
        **options,
    )
    at = recipe(classes=2, optimizer=OPTIMIZERS[optimizer]).double()
    trainer.fit(at, datamodule=AdvantageOutput(batch_size=24, whole=False), ckpt_path=ckpt, weights_only=False)
    if save is not None:
        trainer.save_checkpoint(save)
    return weights.steps


def gap(steps: list[dict[str, Tensor]], rule: str, optimizer: str = "sgd") -> tuple[float, list[list[float]]]:
    """The largest to an explicit loop with one optimizer a modality, and one of the rest; and the factors."""
    at, largest = model(), 0.0
    seen: list[list[tuple[float, float]]] = []
    rates: list[list[float]] = []
    at.load_state_dict(steps[0], strict=False)
    of = {m: list(at.of_modality(m)) for m in WIDTHS}
    rest = [p for p in at.parameters() if not any(p is q for some in of.values() for q in some)]
    make = OPTIMIZERS[optimizer]
    # without decay of biases and norms, as the recipe's groups have it
    parts = [
        [{"params": [p for p in some if p.ndim >= 2]}, {"params": [p for p in some if p.ndim < 2], "weight_decay": 0.0}]
        for some in (*of.values(), rest)
    ]
    optimizers = [make(part) for part in parts]
    base = optimizers[0].param_groups[0]["lr"]
    for wanted in steps[1:]:
        rates.append(RULES[rule][1](seen) if seen or not rule.startswith("mses") else [1.0, 1.0])
        gradients(at, whole())
        for one_of, rate in zip(optimizers, [*rates[-1], 1.0], strict=True):
            for group in one_of.param_groups:
                group["lr"] = base * rate
            one_of.step()
        found = {name: p.detach() for name, p in at.named_parameters()}
        largest = max(largest, largest_gap(found, wanted))
        with torch.no_grad():
            seen.append(validated(at))
    return largest, rates


@pytest.mark.parametrize("rule", RULES)
def test_each_step_equals_the_loop(rule: str) -> None:
    for optimizer, accumulate in (("sgd", 1), ("adamw", 4)):
        largest, rates = gap(fitted(RULES[rule][0](), optimizer, accumulate=accumulate), rule, optimizer)
        # six steps of networks of some hundred sums, whose gradients go through Adam's quotient
        assert largest < ulps(2**20, F64), optimizer
        assert any(rate != 1.0 for rate in rates[-1]) or rule == "dynamic", optimizer
    if rule.startswith("mses"):
        assert rates[0] == [1.0, 1.0] and 0.0 in rates[-1]


@pytest.mark.parametrize("case", range(200))
def test_stopping_of_many_modalities_with_any_losses(case: int) -> None:
    """Two to eight; some losses are huge, tiny, all equal or zero."""
    draws = torch.Generator().manual_seed(case)
    M, patience, smoothing = 2 + case % 7, 1 + case % 3, (0.0, 0.6, 0.9)[case % 3]
    loss_TM = torch.rand(12, M, generator=draws, dtype=F64) * 10.0 ** torch.randint(-8, 9, (M,), generator=draws)
    loss_TM[:, 0] = loss_TM[:, 0] if case % 5 else 0.0
    rule, seen = MSES(patience, smoothing), []
    for loss_M in loss_TM:
        seen.append([(v,) for v in loss_M.tolist()])
        assert rule.rates(loss_M, torch.zeros(M)) == stopped(seen, patience, smoothing)


def on_a_rank(rank: int) -> list[list[dict[str, Tensor]]]:
    return [fitted(RULES[rule][0](), world=2, accumulate=2) for rule in ("mses", "dynamic")]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_the_loop_and_each_other() -> None:
    for rule, one_of, two in zip(("mses", "dynamic"), *run_ranks(2, on_a_rank), strict=True):
        assert all(largest_gap(a, b) == 0 for a, b in zip(one_of, two, strict=True))
        assert gap(one_of, rule)[0] < ulps(2**20, F64)


@pytest.mark.parametrize("rule", ["mses", "dynamic"])
def test_it_goes_on_where_it_was_to_the_bit(rule: str, tmp_path: Path) -> None:
    make = RULES[rule][0]
    whole_way = fitted(make(), "adamw")
    fitted(make(), "adamw", epochs=3, save=tmp_path / "x.ckpt")
    again = fitted(make(), "adamw", ckpt=tmp_path / "x.ckpt")
    assert largest_gap(again[-1], whole_way[-1]) == 0


def test_a_stopped_tower_keeps_its_bits_and_the_rest_learns() -> None:
    steps = fitted(MSLR({"image": 0.0}), "adamw")
    for name, p in steps[-1].items():
        own = name.split(".")[0] in ("towers", "pools", "heads") and name.split(".")[1] == "image"
        assert torch.equal(p, steps[0][name]) == own, name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MSES(patience=0), "patience 0: 1 is the least"),
        (lambda: MSES(smoothing=1.0), "smoothing 1: at least 0 and below 1"),
        (lambda: MSLR({"image": -1.0}), "rates of image -1"),
        (lambda: MSLR(smooth=2.0), "smooth 2: from 0"),
        (lambda: MSLR(window=-1), "window -1"),
        (lambda: fit(model(), MSLR({"sound": 1.0})), "rates of 'sound': no such modality, only image, text"),
        (lambda: fit(one(), MSES()), "one modality, image"),
        (lambda: fit(model(), MSES(), MSLR()), "MSES cannot be combined with MSLR"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
