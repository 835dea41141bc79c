"""Store results of claims as JSON: written atomically, never over another configuration's, with all versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from descant.claims.claim import ABLATIONS, BUDGETS, TUNE, Claim
from descant.claims.items import of_stored
from descant.claims.judge import Judgement, Runs, judge
from descant.cli.errors import fail, one_line
from descant.cli.untrusted import json_of
from descant.modules.io.files import write_json

#: Largest size of a result, in bytes.
_MOST = 20_000_000
#: The stage from which on the method runs, and that of a claim without stages.
EFFECT_STAGE = 3
_PACKAGES = ("descant", "torch", "lightning", "timm", "transformers")


def path(folder: Path, name: str, budget: str) -> Path:
    return folder / (f"{name}.json" if budget == "full" else f"{name}.{budget}.json")


def read(folder: Path, name: str, budget: str) -> dict[str, Any] | None:
    """The stored result of a claim at a budget, or None.

    Raises:
        Refusal: if the file cannot be read.
    """
    file = path(folder, name, budget)
    try:
        content: dict[str, Any] = json_of(file, most=_MOST)
        content["runs"] = {arm: {int(s): _metrics(m) for s, m in of.items()} for arm, of in content["runs"].items()}
        if not isinstance(content["digest"], str) or not isinstance(content["seconds"], int | float):
            raise ValueError("no digest or seconds")
        if not isinstance(content["machine"].get("cores") or 1, int) or not all(
            isinstance(content.get(key, 0), int | float) for key in ("stage", "margin", "headroom")
        ):
            raise ValueError("a number that is none")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, OverflowError, KeyError, AttributeError, TypeError):
        fail(f"{file}: no result of a claim; move it away, and run the claim again")
    return content


def of_design(folder: Path, claim: Claim, budget: str) -> dict[str, Any] | None:
    """The stored result of a claim as it is now; None where there is none, or one of another configuration."""
    stored = read(folder, claim.name, budget)
    return None if stored is None or stored["digest"] != claim.digest else stored


def _metrics(content: Any) -> dict[str, float]:
    if not all(isinstance(value, int | float) for value in content.values()):
        raise ValueError("a metric that is no number")
    return dict(content)


def require_free(folder: Path, claim: Claim, budget: str) -> None:
    """Check that no result of another configuration would be overwritten.

    Raises:
        Refusal: if one would, or nothing can be written there.
    """
    stored = read(folder, claim.name, budget)
    if stored is not None and stored["digest"] != claim.digest:
        fail(
            f"{path(folder, claim.name, budget)}: of configuration {stored['digest']}, and the claim is now "
            f"{claim.digest}; move the file away to run the claim again"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--results {folder}: results cannot be written there: {one_line(error)}")
    if not os.access(folder, os.W_OK):
        fail(f"{folder}: no permission to write results there; --results FOLDER")


def write(
    folder: Path,
    claim: Claim,
    budget: str,
    runs: Runs,
    seconds: float,
    precisions: Sequence[str] = (),
    outcome: Mapping[str, Any] | None = None,
) -> None:
    """Store all runs of a claim.

    Args:
        seconds: their wall time. precisions: those of the runs. outcome: what they came to (``verdict``, ``effect``,
            ...); default: judged, where they are full.
    """
    if outcome is None:
        outcome = outcome_of(judge(claim, runs)) if budget == "full" else {}
    content = {
        "claim": claim.name,
        "seed": claim.seed,
        "digest": claim.digest,
        "budget": budget,
        "seconds": round(seconds, 1),
        **outcome,
        "machine": machine(),
        "precision": list(precisions),
        "versions": versions(),
        "runs": {arm: {str(seed): dict(m) for seed, m in sorted(of.items())} for arm, of in runs.items()},
    }
    write_json(path(folder, claim.name, budget), content)


def outcome_of(judgement: Judgement) -> dict[str, Any]:
    """Verdict, word and gains of a full result, for readers that do not judge it themselves."""
    effect = judgement.effect
    numbers: dict[str, Any] = {"gain": effect.over_baseline.stored(), "placebo": effect.placebo.mean}
    if judgement.items is not None:
        numbers["items"] = judgement.items.stored()
    return {"verdict": judgement.verdict, "effect": effect.word, **numbers}


def supersede(folder: Path, claim: Claim) -> None:
    """Set the results of the claim's earlier design aside, where its row stays; once a claim.

    Where that was done and no result of the new design is there yet, the command was interrupted and goes on.

    Raises:
        Refusal: where there is no result of an earlier design, or one was set aside before.
    """
    result, aside = path(folder, claim.name, "full"), path(folder, claim.name, "superseded")
    stored = read(folder, claim.name, "full")
    if stored is None and aside.exists():
        return
    if stored is None or stored["digest"] == claim.digest:
        fail(f"--redesign: claims {claim.name}: no result of an earlier design is stored")
    if aside.exists():
        fail(f"--redesign: claims {claim.name}: it was redesigned before ({aside.name}), and a claim is once")
    if "opened" in stored.get("registered", {}):
        fail(f"--redesign: claims {claim.name}: it opened the lock-box, which a claim does once: its row is final")
    os.replace(result, aside)
    for budget in (*BUDGETS, TUNE, ABLATIONS, "registered"):
        path(folder, claim.name, budget).unlink(missing_ok=True)


def judged(claim: Claim, stored: Mapping[str, Any]) -> Judgement | None:
    """The judgement of a full result as it was stored; None where the claim stopped before its effect was measured."""
    if stored.get("stage", EFFECT_STAGE) < EFFECT_STAGE:
        return None
    if claim.staged:
        claim = claim.with_margin(stored["margin"])
    return judge(claim, stored["runs"], stored.get("futile", False), of_stored(stored))


def read_registered(folder: Path, claim: Claim) -> dict[str, Any] | None:
    """What a claim was when it was registered, or None.

    Raises:
        Refusal: if another configuration of it was registered.
    """
    file = path(folder, claim.name, "registered")
    try:
        content: dict[str, Any] = json_of(file, most=_MOST)
        digest, code = content["digest"], dict(content["code"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{file}: no registration of a claim; move it away to register the claim again")
    if digest != claim.digest:
        fail(f"{file}: registered as {digest}, and the claim is now {claim.digest}; move it away to register it again")
    return content | {"code": code}


def openings(folder: Path) -> int:
    """How many claims have opened the lock-box."""
    return sum("opened" in json_of(file, most=_MOST) for file in folder.glob("*.registered.json"))


def write_registered(folder: Path, claim: Claim, content: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path(folder, claim.name, "registered"), dict(content))


def machine() -> dict[str, object]:
    """Name of the processor and number of its cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"processor": name, "cores": os.cpu_count()}


def versions() -> Mapping[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
