"""The control of the demo: trained on captions of other concepts, it must score at chance.

Letters: Q queries, G gallery rows, P permutations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from benchmarks import Row
from benchmarks.timing import cores, threads
from descant.__main__ import main
from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator
from descant.callbacks.evaluate.embeddings import Rows as Embedded
from descant.modules.evaluation.metrics import retrieval_ranks
from descant.modules.io.checkpoints import LATEST, follow_latest

FILE = "embeddings.pt"


class KeepEmbeddings(EmbeddingEvaluator):
    """Writes the embeddings of the test sets to ``embeddings.pt`` in the run's folder; measures nothing itself."""

    def evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Embedded]
    ) -> dict[str, Tensor]:
        if trainer.testing and trainer.is_global_zero:
            content = {
                name: {"z": dict(rows.z), "present": dict(rows.present), "key": rows.key} for name, rows in sets.items()
            }
            torch.save(content, Path(trainer.default_root_dir) / FILE)
        return {}


def recalls(z_q_QD: Tensor, key_Q: Tensor, z_g_GD: Tensor, key_G: Tensor, at: tuple[int, ...]) -> list[float]:
    """Compute recall at each k of the queries that have a right gallery row, as the callback Retrieval does."""
    rank_Q = retrieval_ranks(z_q_QD, key_Q, z_g_GD, key_G)
    rank_Q = rank_Q[rank_Q >= 0]
    return [float((rank_Q < k).double().mean()) for k in at]


def chance(
    z_q_QD: Tensor, key_Q: Tensor, z_g_GD: Tensor, key_G: Tensor, at: tuple[int, ...], permutations: int = 1000
) -> list[tuple[float, float]]:
    """Return the 99 % band of recall at each k under random names, from P permutations of the gallery's keys.

    Embeddings are not permuted, so the band includes the effects of a crowded space or a popular name (a hub), which a
    binomial would miss.
    """
    generator = torch.Generator().manual_seed(0)
    value_PK = [
        recalls(z_q_QD, key_Q, z_g_GD, key_G[torch.randperm(len(key_G), generator=generator)], at)
        for _ in range(permutations)
    ]
    low_K, high_K = np.percentile(np.array(value_PK), [0.5, 99.5], axis=0)
    return [(float(low), float(high)) for low, high in zip(low_K, high_K, strict=True)]


def train() -> Path:
    """Run `make demo` with shuffled captions, and return the run's folder."""
    code = main(
        [
            *("fit", "--config", "contrastive/emoji", "--name", "control", "--test", "true"),
            *("--data.init_args.shuffle_captions", "true"),
            *("--trust", "benchmarks", "--trainer.callbacks+=benchmarks.control.KeepEmbeddings"),
        ]
    )
    if code != 0:
        raise RuntimeError(f"the control run ended with exit code {code}")
    return follow_latest(Path("runs") / "control" / LATEST).resolve()


def control() -> Iterator[Row]:
    """Compare the demo, trained with captions shuffled across concepts and tested with the true names, with chance.

    ``vendor/i2t`` recall at 10 and at 1 must lie in the 99 % band of 1,000 random assignments of the same names to the
    same embeddings. A value above it means that evaluation leaks; a value below it is an error too. Takes five minutes.
    """
    with threads(cores()):
        folder = train()
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        yield from compare_with_vendor(torch.load(folder / FILE, weights_only=True)["vendor"], metrics)


def compare_with_vendor(vendor: dict[str, Any], metrics: dict[str, Any], permutations: int = 1000) -> Iterator[Row]:
    """Yield the rows of the benchmark, from the embeddings of the test set "vendor" and the metrics of its run."""
    image_N, text_N, key_N = vendor["present"]["image"], vendor["present"]["text"], vendor["key"]
    sides = (vendor["z"]["image"][image_N], key_N[image_N], vendor["z"]["text"][text_N], key_N[text_N])
    names, at = ("contrastive/shuffled_control", "contrastive/shuffled_control_r1"), (10, 1)
    bands = chance(*sides, at, permutations)
    for name, k, value, band in zip(names, at, recalls(*sides, at), bands, strict=True):
        reported = float(metrics[f"vendor/i2t_r{k}"])
        if not math.isclose(value, reported, abs_tol=1e-6):
            raise RuntimeError(f"vendor/i2t_r{k} is {reported} in metrics.json and {value} here")
        yield Row.within(name, value, band)
