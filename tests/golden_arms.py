"""Golden runs of claims: three steps of every arm of every claim and comparison, the same to the bit in two versions.

``python -m tests.golden_arms [--against REVISION] [--renew] [CLAIM ...]`` trains them in a checkout of the revision
(once a machine: what it gave is kept in ``build/golden-arms``) and here, and compares. A stored result is valid for the
digests of its arms, which hash what their configurations compose to. Where names in them changed and no number did,
``--renew`` writes today's digests into the stored results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from descant.claims import comparison, spec, store
from descant.modules.io.files import write_json
from tests.golden import BASE, TOP, checking_out, difference, read_run, record_of

RESULTS = TOP / "experiments/claims/results"
#: Run in a tree: trains the arms of the claims, forked from one process, and prints a line of JSON a claim. It is text,
#: since it uses the names of that tree; where they change, NOW is the text for this one.
BEFORE = """
import json, os, sys
from pathlib import Path
from descant.__main__ import main
from descant.claims import comparison, spec
from descant.claims.run import Place, command, predicting
import descant.cli.main, descant.callbacks, descant.datamodules, descant.recipes

root, wanted = Path(sys.argv[1]), sys.argv[2:]

def run(words, log):
    if (child := os.fork()) == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        try:
            code = main(words)
        except BaseException as error:
            code, _ = 1, os.write(2, repr(error).encode())
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

of = {name: spec.load(name) for name in spec.names()}
for name in comparison.names():
    of |= {f"{setting.name}.{name}": setting for setting in comparison.load(name).settings}
for name in wanted or of:
    if (claim := of.get(name)) is None:
        continue
    digests, seeds, done = claim.digests, claim.seeds["full"][:1], []
    if claim.is_tuned:
        claim = claim.settled({arm: 0 for arm, given in claim.arms.items() if given.settings})
    place = Place(claim, "full", root)
    for arm, seed in place.every(tuple(claim.arms), seeds):
        log, runs = root / f"{name}-{arm}.log", place.of(arm, seed)
        short = ["--trainer.max_steps=3", "--trainer.limit_val_batches=0", "--data.num_workers=0"]
        words = [word.replace("--test=true", "--test=false") for word in command(place, arm, seed)]
        code = 0 if runs.exists() else run([*words, "--config=on/tiny", *short], log)
        if not code and (words := predicting(place, arm, seed)):
            code = run(words, log)
        done.append([arm, digests.get(arm, ""), code, str(runs), str(log)])
    print(json.dumps([name, done]), flush=True)
"""
NOW = BEFORE


def train(tree: Path, names: Sequence[str], file: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Train the arms of the claims in a tree, and add their losses and weights to ``known`` and its file."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", NOW if tree == TOP else BEFORE, folder, *names]
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                name, done = json.loads(line)
                known[name] = {}
                for arm, digest, code, run, log in done:
                    if code:
                        found = {"failed": Path(log).read_text(errors="replace")[-600:]}
                    else:
                        found = read_run(max(Path(run).glob("[0-9]*")))
                    known[name][arm] = {"digest": digest, **found}
                write_json(file, known)
        if process.returncode:
            raise RuntimeError(f"{tree}: the arms were not all trained")
    return known


def compare(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe how an arm differs between two trees; empty if its losses and weights are the same."""
    if "failed" in now or "failed" in before:
        last = now.get("failed", before.get("failed", "")).strip().splitlines()[-1:]
        both = "failed" in now and "failed" in before
        return f"failed in {'both' if both else 'this one' if 'failed' in now else 'the other'}: {''.join(last)}"
    return difference(before, now)


def renew(file: Path, renewed: dict[str, str]) -> bool:
    """Write today's digests into a stored result or registration. Returns whether one of them changed."""
    content = json.loads(file.read_text(encoding="utf-8"))
    digests = {key: renewed.get(value, value) for key, value in content.get("digests", {}).items()}
    looks = {
        " ".join(renewed.get(part, part) for part in look.split()): at for look, at in content.get("looks", {}).items()
    }
    new = content | ({"digests": digests} if "digests" in content else {}) | ({"looks": looks} if looks else {})
    if new == content:
        return False
    if "checksum" in new:
        new["checksum"] = store.checksum(new)
    write_json(file, new)
    return True


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden_arms", description=__doc__)
    parser.add_argument("names", nargs="*", help="claims, or CLAIM.COMPARISON; all of them where not given")
    parser.add_argument("--against", default=BASE, help="a revision of this repository")
    parser.add_argument("--renew", action="store_true", help="write today's digests into results of equal arms")
    given = parser.parse_args(words)
    sha, file = record_of(given.against, "golden-arms")
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    wanted = given.names or [
        *spec.names(),
        *(f"{of.name}.{name}" for name in comparison.names() for of in comparison.load(name).settings),
    ]
    if missing := [name for name in wanted if name not in known]:
        with checking_out(sha) as tree:
            known = train(tree, missing, file, known)
    here = file.with_name("here.json")
    here.unlink(missing_ok=True)
    now, wrong, renewed = train(TOP, wanted, here, {}), 0, dict[str, dict[str, str]]()
    for name, arms in now.items():
        for arm, found in arms.items():
            before = known.get(name, {}).get(arm, {"failed": "no such arm"})
            off = compare(before, found)
            wrong += bool(off)
            if off:
                print(f"{name}: {arm}: {off}", flush=True)
            elif before["digest"] != found["digest"]:
                renewed.setdefault(name.split(".")[0], {})[before["digest"]] = found["digest"]
        print(f"{name}: {len(arms)} arms", flush=True)
    if given.renew:
        files = [file for name, of in renewed.items() for file in RESULTS.glob(f"{name}.*json") if renew(file, of)]
        print(f"{len(files)} results have new digests")
    print(f"{wrong} arms differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
