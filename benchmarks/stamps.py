"""Pictures, captions and speech trained together: retrieval in each of the six directions on unseen stamps.

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
#: Experiment -> prefix of its test sets' names: stamps alone, and in batches shared with emoji.
EXPERIMENTS = {"stamps": "", "mixture": "stamps-"}
LETTER = {"i": "image", "t": "text", "a": "audio"}
#: Direction -> its description.
WAYS = {
    "i2t": "picture to caption",
    "t2i": "caption to picture",
    "i2a": "picture to speech",
    "a2i": "speech to picture",
    "t2a": "caption to speech",
    "a2t": "speech to caption",
}
KNN = "knn_category_top1"
KEEP = ("--trust", "benchmarks", "--trainer.callbacks+=benchmarks.control.KeepEmbeddings")


def run(command: str, experiment: str, name: str, seed: int) -> tuple[dict[str, Any], Path]:
    """Return the metrics of one run on its test sets, and the folder with its embeddings."""
    options = ("--name", name, "--seed_everything", str(seed), *KEEP)
    code = main([command, "--config", f"contrastive/{experiment}", *options])
    if code != 0:
        raise RuntimeError(f"{name} ended with exit code {code}")
    metrics = Path("runs") / name / "metrics.json"  # a link to the metrics of the newest run
    if command == "test":
        newest = max((Path("runs") / name).glob("test-*/metrics.json"))
        return json.loads(newest.read_text(encoding="utf-8")), newest.parent
    return json.loads(metrics.read_text(encoding="utf-8")), metrics.resolve().parent


def chances(embedded: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the 99 % band of recall at 10 in each direction for randomly assigned answers."""
    bands = {}
    for way in WAYS:
        a, b = (embedded["present"][LETTER[letter]] for letter in way.split("2"))
        z_a, z_b = (embedded["z"][LETTER[letter]] for letter in way.split("2"))
        bands[way] = chance(z_a[a], embedded["key"][a], z_b[b], embedded["key"][b], (10,), permutations=300)[0]
    return bands


def stamps() -> Iterator[Row]:
    """Train three seeds of ``contrastive/stamps`` and ``contrastive/mixture``; test on held-out families of stamps.

    The comparisons are chance, and the same picture tower untrained. Writes the figure ``runs/stamps.png``. Takes forty
    minutes.
    """
    with threads(cores()):
        untrained = [run("test", "stamps", f"stamps-{seed}-untrained", seed)[0] for seed in SEEDS]
        found = {name: [run("fit", name, f"{name}-{seed}", seed) for seed in SEEDS] for name in EXPERIMENTS}
        bands = chances(torch.load(found["stamps"][0][1] / FILE, weights_only=True)["stamps"])
    trained = {
        name: [{key.removeprefix(EXPERIMENTS[name]): value for key, value in metrics.items()} for metrics, _ in runs]
        for name, runs in found.items()
    }
    picture(trained, bands, Path("runs") / "stamps.png")
    for name, metrics in trained.items():
        yield from stamp_rows(name, metrics, untrained, bands)


def stamp_rows(
    experiment: str,
    trained: list[dict[str, Any]],
    untrained: list[dict[str, Any]],
    bands: Mapping[str, tuple[float, float]],
) -> Iterator[Row]:
    """Yield the rows of an experiment, from the metrics of S trained and untrained runs and the bands of chance."""
    gain = _mean(trained, f"stamps/{KNN}") - _mean(untrained, f"stamps/{KNN}")
    yield Row.informs(f"{experiment}/knn_category_untrained", _mean(untrained, f"stamps/{KNN}"))
    yield Row.at_least(f"{experiment}/knn_category_gain", gain, 0.1)
    for way in ("i2a", "a2i"):
        middle = sum(bands[way]) / 2
        yield Row.at_least(f"{experiment}/{way}_r10_over_chance", _mean(trained, f"stamps/{way}_r10") / middle, 3.0)
    for name in ("stamps", "both"):
        for way in WAYS:
            yield Row.informs(f"{experiment}/{name}_{way}_r10", _mean(trained, f"{name}/{way}_r10"))


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return sum(float(metrics[key]) for metrics in runs) / len(runs)


def picture(trained: Mapping[str, list[dict[str, Any]]], bands: Mapping[str, tuple[float, float]], file: Path) -> None:
    """Plot one row per direction: a point per seed, and chance as a grey band."""
    from matplotlib.figure import Figure  # imported only here: it takes a second

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    series = (
        ("mixture", "stamps", "o", "#1f5fa8", "in batches with emoji; speech in a language heard in training (fr)"),
        ("stamps", "stamps", "s", "#79a9d9", "stamps alone; the same"),
        ("mixture", "both", "D", "#c8502a", "in batches with emoji; speech in a language never heard (es)"),
    )
    for row, way in enumerate(WAYS):
        low, high = bands[way]
        label = "chance (99 %)" if row == 0 else None
        axes.fill_between([low, high], row - 0.36, row + 0.36, color="0.87", label=label, linewidth=0)
        for k, (experiment, name, mark, colour, told) in enumerate(series):
            if name == "both" and "a" not in way:
                continue  # without speech it has no language
            value_S = [float(metrics[f"{name}/{way}_r10"]) for metrics in trained[experiment]]
            label = told if way == "i2a" else None
            axes.scatter(value_S, [row + 0.2 * (k - 1)] * len(value_S), marker=mark, s=26, color=colour, label=label)
    axes.set_yticks(range(len(WAYS)), list(WAYS.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, 0.5)
    axes.set_xlabel("share of held-out stamps whose right answer is among the first ten")
    axes.grid(axis="x", color="0.93")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.legend(loc="outside upper left", ncols=1, frameon=False, fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=140)
