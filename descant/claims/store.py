"""Store results of claims as JSON, atomically and with a checksum. A result of another design is never overwritten."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from descant.claims.claim import ABLATIONS, ARMS, BUDGETS, TUNE, Claim
from descant.claims.digest import RULE
from descant.claims.items import read_gains
from descant.claims.judge import Judgement, Runs, judge
from descant.cli.errors import fail, one_line
from descant.cli.untrusted import json_of
from descant.modules.io.files import write_json

#: Largest size of a result, in bytes.
_MOST = 20_000_000
#: Version of the rules of a result; results of earlier versions are read, but count as exploratory.
VERSION = 3
_PACKAGES = ("descant", "torch", "lightning", "timm", "transformers")


def path(folder: Path, name: str, budget: str) -> Path:
    return folder / (f"{name}.json" if budget == "full" else f"{name}.{budget}.json")


def read(folder: Path, name: str, budget: str) -> dict[str, Any] | None:
    """Read the stored result of a claim at a budget; None if there is none."""
    file = path(folder, name, budget)
    try:
        stored = json_of(file, most=_MOST)
        content: dict[str, Any] = dict(stored)
        content["runs"] = {arm: {int(s): _metrics(m) for s, m in of.items()} for arm, of in content["runs"].items()}
        if not isinstance(content["seconds"], int | float):
            raise ValueError("no seconds")
        if not isinstance(content["machine"].get("cores") or 1, int) or not isinstance(content.get("needed", 0), int):
            raise ValueError("a number that is none")
        content["digests"] = dict(content.get("digests") or {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, OverflowError, KeyError, AttributeError, TypeError):
        fail(f"{file}: no result of a claim; move it away, and run the claim again")
    if "checksum" in stored and stored["checksum"] != checksum(stored):
        fail(f"{file}: edited by hand: its checksum is another; restore it from the history")
    return content


def checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a result, for any order of its keys."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def of_design(folder: Path, claim: Claim, budget: str, judging: Sequence[str] = (RULE, *ARMS)) -> dict[str, Any] | None:
    """Read the stored result of a claim in its current design; None if there is none, or its design is another.

    Arms that have changed or no longer exist are left out. The design is another if the rule or an arm in ``judging``
    has changed.
    """
    stored = read(folder, claim.name, budget)
    if stored is None or not is_of_design(stored, claim, judging):
        return None
    same = {arm for arm in stored["runs"] if stored["digests"].get(arm) == claim.digests.get(arm)}
    return stored | {"runs": {arm: of for arm, of in stored["runs"].items() if arm in same}}


def read_tuned(folder: Path, claim: Claim, budget: str = TUNE) -> dict[str, Any] | None:
    """Read the stored runs that chose the settings of a claim's arms; None if there are none for these settings."""
    if not claim.is_tuned:
        return None
    candidates = claim.candidates()
    return of_design(folder, candidates, budget, tuple(candidates.arms))


def is_of_design(stored: Mapping[str, Any], claim: Claim, judging: Sequence[str] = (RULE, *ARMS)) -> bool:
    """Whether a result has the rule of the claim, and its baseline, method and placebo."""
    return all(stored["digests"].get(key) == claim.digests.get(key) for key in judging)


def _metrics(content: Any) -> dict[str, float]:
    if not all(isinstance(value, int | float) for value in content.values()):
        raise ValueError("a metric that is no number")
    return dict(content)


def require_free(folder: Path, claim: Claim, budget: str, judging: Sequence[str] = (RULE, *ARMS)) -> None:
    """Check that no result of another design would be overwritten."""
    stored = read(folder, claim.name, budget)
    if stored is not None and not is_of_design(stored, claim, judging):
        fail(
            f"{path(folder, claim.name, budget)}: of another design of the claim; --redesign sets it aside, "
            "and its row stays"
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
        seconds: their wall time. precisions: those of the runs. outcome: their result (``effect``, ``ended``, ...).
    """
    content = {
        "claim": claim.name,
        "version": VERSION,
        "seed": claim.seed,
        # includes arms without runs, since a claim may end before they run
        "digests": {key: claim.digests[key] for key in dict.fromkeys((RULE, *ARMS, *runs)) if key in claim.digests},
        "budget": budget,
        "seconds": round(seconds, 1),
        **(outcome or {}),
        "machine": machine(),
        "precision": list(precisions),
        "versions": versions(),
        "runs": {arm: {str(seed): dict(m) for seed, m in sorted(of.items())} for arm, of in runs.items()},
    }
    plain = json.loads(json.dumps(content))
    write_json(path(folder, claim.name, budget), {**plain, "checksum": checksum(plain)})


def outcome_of(judgement: Judgement) -> dict[str, Any]:
    """Return word and gains of a full result, for readers that do not judge it themselves."""
    effect = judgement.effect
    numbers: dict[str, Any] = {"gain": effect.over_baseline.to_json(), "placebo": effect.placebo.mean}
    if judgement.items is not None:
        numbers["items"] = judgement.items.to_json()
    return {"effect": effect.word, **numbers}


def supersede(folder: Path, claim: Claim) -> None:
    """Set the results of the claim's earlier design aside, where its row stays; once per claim.

    If that was done and no result of the new design is stored yet, an interrupted command continues.
    """
    result, aside = path(folder, claim.name, "full"), path(folder, claim.name, "superseded")
    stored = read(folder, claim.name, "full")
    if stored is None and aside.exists():
        return
    registered = registration_of(folder, claim.name)
    earlier = registered if stored is None else stored  # perhaps only the pilot has run
    if "digests" not in earlier or is_of_design(earlier, claim):
        fail(f"--redesign: claims {claim.name}: no result of an earlier design is stored")
    if aside.exists():
        fail(f"--redesign: claims {claim.name}: it was redesigned before ({aside.name}), and a claim is once")
    if "opened" in registered:
        fail(f"--redesign: claims {claim.name}: it opened the lock-box, which a claim does once: its row is final")
    if stored is not None:
        os.replace(result, aside)
    looks = registered.get("looks", {})
    for budget in (*BUDGETS, TUNE, ABLATIONS):
        path(folder, claim.name, budget).unlink(missing_ok=True)
    write_registered(folder, claim, {"looks": looks})  # looks at gains of an earlier design count too


def judge_stored(folder: Path, claim: Claim, stored: Mapping[str, Any]) -> Judgement | None:
    """Judge the stored runs of a claim. None if the claim ended before its effect was measured."""
    if not stored["runs"]:
        return None
    pilot = of_design(folder, claim, "pilot")
    return judge(claim, stored["runs"], read_gains(stored), None if pilot is None else pilot["runs"])


def registration_of(folder: Path, name: str) -> dict[str, Any]:
    """Read the registration of a claim; empty if it was not registered."""
    return registration_in(path(folder, name, "registered"))


def registration_in(file: Path) -> dict[str, Any]:
    """Read a registration from a file; empty if the file does not exist."""
    try:
        content = json_of(file, most=_MOST)
        return dict(content) | {key: dict(content[key]) for key in ("code", "digests", "looks") if key in content}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{file}: no registration of a claim; move it away to register the claim again")


def read_registered(folder: Path, claim: Claim) -> dict[str, Any] | None:
    """Read the registration of a claim in its current design, or None if it is not registered."""
    content = registration_of(folder, claim.name)
    if "digests" not in content:
        return None
    if other := [key for key in (RULE, *ARMS) if content["digests"].get(key) != claim.digests.get(key)]:
        file, what = path(folder, claim.name, "registered"), " and ".join(other)
        fail(f"{file}: registered with another {what}; --redesign registers the claim again")
    return content


def openings(folder: Path) -> int:
    """Count the claims that have opened the lock-box."""
    return sum("opened" in json_of(file, most=_MOST) for file in folder.glob("*.registered.json"))


def write_registered(folder: Path, claim: Claim, content: Mapping[str, Any]) -> None:
    write_registration(path(folder, claim.name, "registered"), content)


def write_registration(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(content))


def machine() -> dict[str, Any]:
    """Return the name of the processor and the number of its cores."""
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
