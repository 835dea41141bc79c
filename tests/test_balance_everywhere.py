"""Every balancer with each kind of harmonizer and with missing modalities: two steps, or one line at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

#: Balancer -> what it adds to callbacks, and what it logs in two steps (some have nothing to say yet).
BALANCERS: dict[str, tuple[str, str | None]] = {
    "ogm": ("{class_path: Balance, init_args: {pacing: {class_path: OGM}}}", "balance/factor/image"),
    "ogm-ge": ("{class_path: Balance, init_args: {pacing: {class_path: OGM}, noise: true}}", "balance/factor/image"),
    "agm": ("{class_path: Balance, init_args: {pacing: {class_path: AGM}}}", "balance/factor/image"),
    "pmr": ("{class_path: Prototypes, init_args: {every: 1}}", "balance/score/image"),
    "opm": ("{class_path: DropAhead}", "balance/dropped/image"),
    "blend": ("{class_path: Blend}", None),
    "mmpareto": ("{class_path: HarmonizeTowers, init_args: {rule: {class_path: Pareto}}}", "harmony/mix/image/fused"),
}
HARMONIZERS: dict[str, str] = {
    "parameters": "{class_path: Harmonize, init_args: {rule: {class_path: PCGrad}}}",
    "features": "{class_path: HarmonizeFeatures, init_args: {rule: {class_path: Realign}}}",
}
GAME = "[{class_path: GreedyGame}, {class_path: LabelContrast}, {class_path: Bottleneck}]"
#: Balancers that are harmonizers themselves.
ALONE = {"mmpareto"}


def two_steps(cli: Any, callbacks: list[str], base: str = "fusion/emoji", *more: str, game: bool = False) -> Any:
    text = "trainer:\n  callbacks+:\n" + "".join(f"    - {callback}\n" for callback in callbacks)
    if game:
        text += f"model:\n  init_args:\n    regularizers: {GAME}\n"
    Path("balance.yaml").write_text(text)
    configs = [part for name in (base, "balance.yaml", "on/tiny") for part in ("--config", name)]
    return cli("fit", *configs, "--name", "x", "--test", "false", "--trainer.limit_val_batches", "0", *more)


def ran(result: Any, *logged: str | None) -> None:
    assert result.rc == 0, result.err
    metrics = json.loads(Path("runs/x/metrics.json").read_text())
    assert metrics["steps"] == 2 and all(name in metrics for name in logged if name is not None)
    assert all(value == value for value in metrics.values() if isinstance(value, float))


def cases() -> list[Any]:
    quick = {("agm", "parameters"), ("mmpareto", "features")}
    return [
        pytest.param(b, h, marks=[] if (b, h) in quick else [pytest.mark.slow], id=f"{b}-{h}")
        for b in BALANCERS
        for h in (None, *HARMONIZERS)
    ]


@pytest.mark.parametrize(("balancer", "harmonizer"), cases())
def test_with_a_harmonizer(balancer: str, harmonizer: str | None, cli: Any) -> None:
    says, logged = BALANCERS[balancer]
    result = two_steps(cli, [*([HARMONIZERS[harmonizer]] if harmonizer else []), says])
    if balancer in ALONE and harmonizer is not None:
        assert result.rc == 2 and "is there already; one of the two" in result.refusal, result.err
        return
    ran(result, logged, "harmony/conflict" if harmonizer else None)


@pytest.mark.parametrize("harmonizer", [pytest.param(h, marks=pytest.mark.slow) for h in (None, *HARMONIZERS)])
def test_a_game_with_a_harmonizer_and_all_the_rest(harmonizer: str | None, cli: Any) -> None:
    together = [BALANCERS[name][0] for name in ("ogm-ge", "pmr", "opm", "blend")]
    result = two_steps(cli, [*([HARMONIZERS[harmonizer]] if harmonizer else []), *together], game=True)
    ran(result, "train/game", "train/contrast", "train/bottleneck", "balance/factor/image", "train/prototype-image")


@pytest.mark.slow
def test_with_missing_modalities(cli: Any) -> None:
    """Trained on, all of a fused recipe is balanced; frozen, there is nothing of a tower to hold back."""
    before = [part for c in ("fusion/emoji", "with/mid-fusion", "on/tiny") for part in ("--config", c)]
    assert cli("fit", *before, "--name", "whole").rc == 0
    result = two_steps(cli, [BALANCERS["ogm"][0]], "missing/emoji")
    assert result.rc == 2 and "is trained, so nothing of it can be held back" in result.refusal, result.err
    free = ["--model.init_args.frozen", "false", "--model.init_args.bank", "null"]
    for name in ("ogm", "pmr", "opm", "mmpareto"):
        result = two_steps(cli, [BALANCERS[name][0]], "missing/emoji", *free)
        assert result.rc == 0, result.err


@pytest.mark.parametrize(
    ("overlay", "says"),
    [
        ("with/harmonize", "Harmonize: one term, .*: there is nothing to harmonize it with"),
        ("with/realign", "HarmonizeFeatures needs the protocol Forks .*; Alternating lacks it"),
        ("with/mmpareto", "HarmonizeTowers needs the protocols Contends and Forks; Alternating lacks one"),
        ("with/balance", "Balance needs the protocol Contends .*; Alternating lacks it"),
    ],
)
def test_turns_leave_nothing_to_harmonize_or_to_balance(overlay: str, says: str, cli: Any) -> None:
    configs = [part for c in ("fusion/emoji", "with/turns", overlay, "on/tiny") for part in ("--config", c)]
    result = cli("fit", *configs, "--name", "x", "--test", "false", "--trainer.limit_val_batches", "0")
    assert result.rc == 2 and re.search(says, result.refusal), result.err


@pytest.mark.slow
def test_turns_attacks_and_contributions_with_missing_modalities(cli: Any) -> None:
    data = ["--data.init_args.drop", "{text: 0.5, image: 0.3}"]
    seen = ["{class_path: Contributions}", "{class_path: Attacks, init_args: {steps: 2, validate: true}}"]
    turns = [part for c in ("fusion/emoji", "with/turns", "on/tiny") for part in ("--config", c)]
    callbacks = [part for callback in seen for part in ("--trainer.callbacks+", callback)]
    result = cli("fit", *turns, *callbacks, *data, "--name", "x")
    ran(result, "vendor/attacked/image", "vendor/attacked_worst", "vendor/alone/text")
    whole = [part for c in ("fusion/emoji", "with/mid-fusion", "on/tiny") for part in ("--config", c)]
    assert cli("fit", *whole, *data, "--name", "whole").rc == 0
    configs = [part for c in ("missing/emoji", "on/tiny") for part in ("--config", c)]
    found = cli("fit", *configs, *callbacks, "--name", "x")
    ran(found, "vendor/attacked/text", "vendor/absent_worst", "vendor/alone/image")
