"""The control of the demo: trained on captions of other concepts, it must know nothing.

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
from descant.modules.io.checkpoints import LATEST, followed

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
    """Recall at each k of the queries that have a right gallery row, as the callback Retrieval counts it."""
    rank_Q = retrieval_ranks(z_q_QD, key_Q, z_g_GD, key_G)
    rank_Q = rank_Q[rank_Q >= 0]
    return [float((rank_Q < k).double().mean()) for k in at]


def chance(
    z_q_QD: Tensor, key_Q: Tensor, z_g_GD: Tensor, key_G: Tensor, at: tuple[int, ...], permutations: int = 1000
) -> list[tuple[float, float]]:
    """The 99 % band of recall at each k when names are dealt out at random: P permutations of the gallery's keys.

    Embeddings stay, so a crowded space or a popular name (a hub) is in the band, which a binomial would miss.
    """
    generator = torch.Generator().manual_seed(0)
    value_PK = [
        recalls(z_q_QD, key_Q, z_g_GD, key_G[torch.randperm(len(key_G), generator=generator)], at)
        for _ in range(permutations)
    ]
    low_K, high_K = np.percentile(np.array(value_PK), [0.5, 99.5], axis=0)
    return [(float(low), float(high)) for low, high in zip(low_K, high_K, strict=True)]


def train() -> Path:
    """`make demo` with shuffled captions; returns the run's folder."""
    code = main(
        [
            *("fit", "--config", "contrastive/emoji", "--name", "control", "--test", "true"),
            *("--data.init_args.shuffle_captions", "true"),
            *("--trust", "benchmarks", "--trainer.callbacks+=benchmarks.control.KeepEmbeddings"),
        ]
    )
    if code != 0:
        raise RuntimeError(f"the control run ended with exit code {code}")
    return followed(Path("runs") / "control" / LATEST).resolve()


def control() -> Iterator[Row]:
    """The demo trained with captions shuffled across concepts, tested with the true names, against chance.

    ``vendor/i2t`` recall at 10 and at 1 must lie in the 99 % band of 1,000 random assignments of the same names to
    the same embeddings. Above it, evaluation leaks; below it, too, something is not as it seems. Five minutes.
    """
    with threads(cores()):
        folder = train()
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        yield from judged(torch.load(folder / FILE, weights_only=True)["vendor"], metrics)


def judged(vendor: dict[str, Any], metrics: dict[str, Any], permutations: int = 1000) -> Iterator[Row]:
    """The rows of the benchmark, from the test set "vendor" as embedded and the metrics of its run."""
    image_N, text_N, key_N = vendor["present"]["image"], vendor["present"]["text"], vendor["key"]
    sides = (vendor["z"]["image"][image_N], key_N[image_N], vendor["z"]["text"][text_N], key_N[text_N])
    names, at = ("contrastive/shuffled_control", "contrastive/shuffled_control_r1"), (10, 1)
    bands = chance(*sides, at, permutations)
    for name, k, value, band in zip(names, at, recalls(*sides, at), bands, strict=True):
        reported = float(metrics[f"vendor/i2t_r{k}"])
        if not math.isclose(value, reported, abs_tol=1e-6):
            raise RuntimeError(f"vendor/i2t_r{k} is {reported} in metrics.json and {value} here")
        yield Row.within(name, value, band)
