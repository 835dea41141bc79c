"""Pictures, captions and speech trained together: what each of the six directions finds on stamps never seen.

Letters: S seeds, Q queries, G gallery rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import Row
from benchmarks.control import FILE, chance
from benchmarks.timing import cores, threads
from descant.__main__ import main

SEEDS = (0, 1, 2)
LETTER = {"i": "image", "t": "text", "a": "audio"}
#: Which way -> how a person says it.
WAYS = {
    "i2t": "picture to caption",
    "t2i": "caption to picture",
    "i2a": "picture to speech",
    "a2i": "speech to picture",
    "t2a": "caption to speech",
    "a2t": "speech to caption",
}
KNN = "stamps/knn_category_top1"
KEEP = ("--trust", "benchmarks", "--trainer.callbacks+=benchmarks.control.KeepEmbeddings")


def run(command: str, name: str, seed: int) -> tuple[dict[str, Any], Path]:
    """The metrics of one run of ``contrastive/stamps`` on its test sets, and the folder with its embeddings."""
    code = main([command, "--config", "contrastive/stamps", "--name", name, "--seed_everything", str(seed), *KEEP])
    if code != 0:
        raise RuntimeError(f"{name} ended with exit code {code}")
    metrics = Path("runs") / name / "metrics.json"  # a link to that of the newest run
    if command == "test":
        newest = max((Path("runs") / name).glob("test-*/metrics.json"))
        return json.loads(newest.read_text(encoding="utf-8")), newest.parent
    return json.loads(metrics.read_text(encoding="utf-8")), metrics.resolve().parent


def chances(embedded: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The 99 % band of recall at 10 each way when the right answers are dealt out at random."""
    bands = {}
    for way in WAYS:
        a, b = (embedded["present"][LETTER[letter]] for letter in way.split("2"))
        z_a, z_b = (embedded["z"][LETTER[letter]] for letter in way.split("2"))
        bands[way] = chance(z_a[a], embedded["key"][a], z_b[b], embedded["key"][b], (10,), permutations=300)[0]
    return bands


def stamps() -> Iterator[Row]:
    """Three seeds of ``contrastive/stamps`` on held-out families, against chance and the same tower untrained.

    Writes the figure ``runs/stamps.png``. A quarter of an hour.
    """
    with threads(cores()):
        found = [run("fit", f"stamps-{seed}", seed) for seed in SEEDS]
        untrained = [run("test", f"stamps-{seed}-untrained", seed)[0] for seed in SEEDS]
        bands = chances(torch.load(found[0][1] / FILE, weights_only=True)["stamps"])
    trained = [metrics for metrics, _ in found]
    picture(trained, bands, Path("runs") / "stamps.png")
    yield from judged(trained, untrained, bands)


def judged(
    trained: list[dict[str, Any]], untrained: list[dict[str, Any]], bands: Mapping[str, tuple[float, float]]
) -> Iterator[Row]:
    """The rows, from S trained and untrained runs' metrics and the bands of chance."""
    gain = _mean(trained, KNN) - _mean(untrained, KNN)
    yield Row.informs("stamps/knn_category_untrained", _mean(untrained, KNN))
    yield Row.at_least("stamps/knn_category_gain", gain, 0.1)
    for way in ("i2a", "a2i"):
        middle = sum(bands[way]) / 2
        yield Row.at_least(f"stamps/{way}_r10_over_chance", _mean(trained, f"stamps/{way}_r10") / middle, 3.0)
    for name in ("stamps", "language", "both"):
        for way in WAYS:
            yield Row.informs(f"stamps/{name}_{way}_r10", _mean(trained, f"{name}/{way}_r10"))


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return sum(float(metrics[key]) for metrics in runs) / len(runs)


def picture(trained: list[dict[str, Any]], bands: Mapping[str, tuple[float, float]], file: Path) -> None:
    """One row a direction: every seed a point, chance a grey band."""
    from matplotlib.figure import Figure  # takes a second, and only here

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for row, way in enumerate(WAYS):
        low, high = bands[way]
        axes.fill_between(
            [low, high], row - 0.32, row + 0.32, color="0.85", label="chance (99 %)" if row == 0 else None
        )
        for name, mark, colour, told in (
            ("stamps", "o", "#1f5fa8", "held-out stamps, a language heard in training (fr)"),
            ("both", "D", "#c8502a", "held-out stamps, a language never heard (es)"),
        ):
            value_S = [float(metrics[f"{name}/{way}_r10"]) for metrics in trained]
            shift = -0.12 if name == "stamps" else 0.12
            label = told if row == 0 else None
            axes.scatter(value_S, [row + shift] * len(value_S), marker=mark, s=26, color=colour, alpha=0.8, label=label)
    axes.set_yticks(range(len(WAYS)), list(WAYS.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("right answer among the first ten")
    axes.grid(axis="x", color="0.93")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.legend(loc="outside upper left", ncols=1, frameon=False, fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=140)
