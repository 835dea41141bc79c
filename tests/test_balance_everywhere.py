"""Every balancer with each kind of harmonizer and with missing modalities: two steps, or one line at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.built import Built, Store
from tests.conftest import Result
from tests.rotation import turn

#: Balancer -> what it adds to callbacks, and what it logs in two steps (some have nothing to say yet).
BALANCERS: dict[str, tuple[str, str | None]] = {
    "ogm": ("{class_path: Balance, init_args: {pacing: {class_path: OGM}}}", "balance/factor/image"),
    "ogm-ge": ("{class_path: Balance, init_args: {pacing: {class_path: OGM}, noise: true}}", "balance/factor/image"),
    "agm": ("{class_path: Balance, init_args: {pacing: {class_path: AGM}}}", "balance/factor/image"),
    "pmr": ("{class_path: PMR, init_args: {every: 1}}", "balance/score/image"),
    "opm": ("{class_path: OPM}", "balance/dropped/image"),
    "amco": ("{class_path: AMCo}", "balance/dependence/image"),
    "mses": ("{class_path: MSES}", None),
    "mslr": ("{class_path: MSLR, init_args: {rates: {image: 1.3}}}", "balance/rate/image"),
    "resampling": ("{class_path: SampleResampling, init_args: {warmup: 0}}", "balance/contribution/image"),
    "relearning": ("{class_path: Relearning, init_args: {every: 1}}", "balance/gap/image"),
    "blend": ("{class_path: GradientBlending}", None),
    "mmpareto": ("{class_path: HarmonizeTowers, init_args: {rule: {class_path: MMPareto}}}", "harmony/mix/image/fused"),
}
HARMONIZERS: dict[str, str] = {
    "parameters": "{class_path: Harmonize, init_args: {rule: {class_path: PCGrad}}}",
    "features": "{class_path: HarmonizeFeatures, init_args: {rule: {class_path: CMGH}}}",
}
GAME = "[{class_path: GreedyGame}, {class_path: LabelContrast}, {class_path: Bottleneck}]"
#: Balancers that are harmonizers themselves.
ALONE = {"mmpareto"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp)


def two_steps(cli: Any, store: Store, callbacks: list[str], game: bool = False) -> tuple[Result, dict[str, Any]]:
    """Of fusion/emoji, which is parsed and built once with all callbacks; of each fit only these are left."""
    options = ["--data.batch_size", "16", *(["--model.init_args.regularizers", GAME] if game else [])]

    def build() -> Built:
        all_of_them = {**HARMONIZERS, **{name: says for name, (says, _) in BALANCERS.items()}}
        return Built(cli, ["fusion/emoji"], all_of_them, *options)

    return store("game" if game else "fusion", build).fit(cli, *callbacks)


def two_steps_of_missing(cli: Any, balancer: str, *more: str) -> Any:
    Path("balance.yaml").write_text(f"trainer:\n  callbacks+:\n    - {BALANCERS[balancer][0]}\n")
    configs = [part for name in ("missing/emoji", "balance.yaml", "on/tiny") for part in ("--config", name)]
    return cli("fit", *configs, "--name", "x", "--test", "false", "--trainer.limit_val_batches", "0", *more)


def ran(result: Any, *logged: str | None) -> None:
    held(result, json.loads(Path("runs/x/metrics.json").read_text()), *logged)


def held(result: Any, metrics: dict[str, Any], *logged: str | None) -> None:
    assert result.rc == 0, result.err
    assert metrics["steps"] == 2 and all(name in metrics for name in logged if name is not None)
    assert all(value == value for value in metrics.values() if isinstance(value, float))


def cases() -> list[Any]:
    """Two in `make test`, a quarter of the others in `make slow`."""
    quick = [("agm", "parameters"), ("mmpareto", "features")]
    rest = [case for case in turn([(b, h) for b in BALANCERS for h in (None, *HARMONIZERS)], 4) if case not in quick]
    return [
        *(pytest.param(*case, id="-".join(case)) for case in quick),
        *(pytest.param(b, h, marks=pytest.mark.slow, id=f"{b}-{h}") for b, h in rest),
    ]


@pytest.mark.parametrize(("balancer", "harmonizer"), cases())
def test_with_a_harmonizer(balancer: str, harmonizer: str | None, cli: Any, store: Store) -> None:
    _, logged = BALANCERS[balancer]
    result, metrics = two_steps(cli, store, [*([harmonizer] if harmonizer else []), balancer])
    if balancer in ALONE and harmonizer is not None:
        assert result.rc == 2 and "cannot be combined with" in result.refusal, result.err
        return
    held(result, metrics, logged)
    assert ("harmony/conflict" in metrics) == (harmonizer is not None) or balancer in ALONE


@pytest.mark.parametrize("harmonizer", [pytest.param(h, marks=pytest.mark.slow) for h in (None, *HARMONIZERS)])
def test_a_game_with_a_harmonizer_and_all_the_rest(harmonizer: str | None, cli: Any, store: Store) -> None:
    together = ["ogm-ge", "pmr", "opm", "blend"]
    result, metrics = two_steps(cli, store, [*([harmonizer] if harmonizer else []), *together], game=True)
    held(
        result,
        metrics,
        "train/game",
        "train/contrast",
        "train/bottleneck",
        "balance/factor/image",
        "train/prototype-image",
    )


@pytest.mark.slow
def test_with_missing_modalities(cli: Any) -> None:
    """Trained on, all of a fused recipe is balanced; frozen, there is nothing of a tower to hold back."""
    before = [part for c in ("fusion/emoji", "with/train/mid-fusion", "on/tiny") for part in ("--config", c)]
    assert cli("fit", *before, "--name", "whole").rc == 0
    result = two_steps_of_missing(cli, "ogm")
    assert result.rc == 2 and "is trained, so its gradients cannot be scaled" in result.refusal, result.err
    free = ["--model.init_args.frozen", "false", "--model.init_args.bank", "null"]
    for name in ("ogm", "pmr", "opm", "mmpareto"):
        result = two_steps_of_missing(cli, name, *free)
        assert result.rc == 0, result.err


@pytest.mark.parametrize(
    ("overlay", "says"),
    [
        ("with/harmonize/pcgrad", "Harmonize: one term, .*: there is nothing to harmonize it with"),
        ("with/harmonize/cmgh", "HarmonizeFeatures needs the protocol ForksFeatures .*; Alternating lacks it"),
        (
            "with/balance/mmpareto",
            "HarmonizeTowers needs the protocol MultimodalClassifier .*; Alternating lacks it",
        ),
        ("with/balance/ogm", "Balance needs the protocol MultimodalClassifier .*; Alternating lacks it"),
    ],
)
def test_turns_leave_nothing_to_harmonize_or_to_balance(overlay: str, says: str, cli: Any) -> None:
    configs = [part for c in ("fusion/emoji", "with/balance/mla", overlay, "on/tiny") for part in ("--config", c)]
    result = cli("fit", *configs, "--name", "x", "--test", "false", "--trainer.limit_val_batches", "0")
    assert result.rc == 2 and re.search(says, result.refusal), result.err


@pytest.mark.slow
def test_turns_attacks_and_contributions_with_missing_modalities(cli: Any) -> None:
    data = ["--data.init_args.drop", "{text: 0.5, image: 0.3}"]
    seen = ["{class_path: Contributions}", "{class_path: Attacks, init_args: {steps: 2, validate: true}}"]
    turns = [part for c in ("fusion/emoji", "with/balance/mla", "on/tiny") for part in ("--config", c)]
    callbacks = [part for callback in seen for part in ("--trainer.callbacks+", callback)]
    result = cli("fit", *turns, *callbacks, *data, "--name", "x")
    ran(result, "vendor/attacked/image", "vendor/attacked_worst", "vendor/alone/text")
    whole = [part for c in ("fusion/emoji", "with/train/mid-fusion", "on/tiny") for part in ("--config", c)]
    assert cli("fit", *whole, *data, "--name", "whole").rc == 0
    configs = [part for c in ("missing/emoji", "on/tiny") for part in ("--config", c)]
    found = cli("fit", *configs, *callbacks, "--name", "x")
    ran(found, "vendor/attacked/text", "vendor/absent_worst", "vendor/alone/image")
