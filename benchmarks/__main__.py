"""``python -m benchmarks NAME [--json FILE] [--threads N]``: one benchmark, a group of them, or all."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import Row
from descant.cli.errors import WRONG, hint

#: Name -> module and function; the part before the slash names a group of benchmarks.
BENCHMARKS = {
    "contrastive/step": "benchmarks.contrastive:step",
    "contrastive/bf16": "benchmarks.contrastive:bf16",
    "contrastive/bf16_retrieval": "benchmarks.precision:retrieval",
    "contrastive/gradcache": "benchmarks.contrastive:gradcache",
    "contrastive/overhead": "benchmarks.contrastive:overhead",
    "contrastive/checkpointing": "benchmarks.contrastive:checkpointing",
    "contrastive/augment": "benchmarks.contrastive:augment",
    "contrastive/demo": "benchmarks.contrastive:demo",
    "any_size/tokens": "benchmarks.any_size:tokens",
    "any_size/step": "benchmarks.any_size:step",
    "masked/step": "benchmarks.masked:step",
    "masked/ideal": "benchmarks.masked:ideal",
    "masked/absent": "benchmarks.masked:absent",
    "masked/fashion": "benchmarks.masked:fashion",
    "harmonize": "benchmarks.harmonize:overhead",
    "balance": "benchmarks.balance:overhead",
    "generate/decode": "benchmarks.generate:decode",
    "generate/memory": "benchmarks.generate:memory",
    "generate/packing": "benchmarks.generate:packing",
    "distill/ranking": "benchmarks.distill:ranking",
    "reinforce": "benchmarks.reinforce:step",
    "data/decode": "benchmarks.data:decode",
    "data/shards": "benchmarks.data:shards",
    "data/workers": "benchmarks.data:workers",
    "data/saved": "benchmarks.data:saved_dataset",
    "data/streams": "benchmarks.object_stores:streams",
    "data/table": "benchmarks.tables:first_batch",
    "resume/saving": "benchmarks.resume:saving",
    "resume/parts": "benchmarks.resume:parts",
    "resume/signals": "benchmarks.resume:signals",
    "resume/first_batch": "benchmarks.resume:first_batch",
    "memory/validations": "benchmarks.memory:validations",
    "watch": "benchmarks.watch:overhead",
    "start": "benchmarks.start:start",
    "threads": "benchmarks.threads:busy",
    "series": "benchmarks.series:rocket",
    "control": "benchmarks.control:control",
    "claims": "benchmarks.claims:claims",
    "front": "benchmarks.front:front",
    "stamps": "benchmarks.stamps:stamps",
    "selection": "benchmarks.selection:selection",
    "stages": "benchmarks.stages:stages",
    "tokenizer": "benchmarks.tokenizer:tokenizer",
    "ssl": "benchmarks.ssl:step",
    "mining": "benchmarks.mining:mining",
    "multitask": "benchmarks.multitask:joint_pass",
    "moe": "benchmarks.moe:moe",
    "tokens/step": "benchmarks.tokens:step",
    "tokens/decode": "benchmarks.tokens:decode",
    "tokens/compute": "benchmarks.tokens:compute",
    "plan/counts": "benchmarks.plan:counts",
    "plan/times": "benchmarks.plan:times",
    "plan/published": "benchmarks.published:published_rates",
    "ranks/batch": "benchmarks.ranks:batch",
    "packing/plan": "benchmarks.packing:plan",
    "packing/emoji": "benchmarks.packing:emoji",
    "packing/speed": "benchmarks.packing:speed",
    "packing/grids": "benchmarks.packing:grids",
}


def select(name: str) -> list[str]:
    """List the benchmarks that match a name; empty if the name is unknown.

    >>> select("control"), len(select("all")) == len(BENCHMARKS), select("contrastiv")
    (['control'], True, [])
    """
    return [known for known in BENCHMARKS if name in ("all", known, known.partition("/")[0])]


def load(name: str) -> Callable[[], Iterator[Row]]:
    module, _, function = BENCHMARKS[name].partition(":")
    benchmark: Callable[[], Iterator[Row]] = getattr(importlib.import_module(module), function)
    return benchmark


def main(args: Sequence[str] | None = None) -> int:
    """Run, print the table row by row, and return 0, 1 if a bar is missed, or 2 for a wrong request."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("name", metavar="NAME", help=f"all, {', '.join(groups())} or one of {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there, as a list")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (1)")
    options = parser.parse_args(args)
    chosen = select(options.name)
    if not chosen:
        known = ["all", *groups(), *BENCHMARKS]
        print(f"benchmarks: {options.name}: no such benchmark{hint(options.name, known)}", file=sys.stderr)
        return WRONG
    if options.threads < 1:
        print(f"benchmarks: --threads {options.threads}: at least 1", file=sys.stderr)
        return WRONG
    from benchmarks.timing import machine, threads  # torch takes seconds to import: only for a valid request

    rows: list[Row] = []
    with threads(options.threads):
        print(machine(), flush=True)
        for name in chosen:
            for row in load(name)():
                print(row.line(), flush=True)
                rows.append(row)
    if options.json is not None:
        text = json.dumps([row.as_json() for row in rows], indent=2, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(row.ok for row in rows) else 1


def groups() -> list[str]:
    return list(dict.fromkeys(name.partition("/")[0] for name in BENCHMARKS))


if __name__ == "__main__":
    sys.exit(main())
