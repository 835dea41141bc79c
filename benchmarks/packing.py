"""Savings of packing: padding by first-fit-decreasing and by simpler methods, seconds of a plan, and tokens a second.

Letters: B documents, K images of one, T text tokens, N tokens, W width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import Row
from benchmarks.timing import ratio
from descant.callbacks.plots.style import BLUE, VERMILLION, figure, with_style
from descant.datamodules.corpora.emoji_pack import VENDORS
from descant.datamodules.tasks.descriptions import Descriptions
from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM, first_fit_decreasing, places
from descant.modules.language.projectors import PooledGrid
from descant.modules.tokenizers.text import BOS, EOS, PAD
from descant.modules.towers import ConvTower, Towers
from descant.modules.transforms.image import over_white
from descant.recipes import VisionLanguage

T = TypeVar("T")
#: Documents, and tokens of a row, of the plan; bars of its seconds and padding; bar of tokens a second over batch-max.
DOCUMENTS, ROW, SECONDS, PADDING, SPEED = 1_000_000, 4096, 20.0, 0.03, 1.8
#: Side of the grid of image tokens, and most images of a document, as in the paper; sides in the figure.
SIDE, IMAGES, SIDES = 4, 9, (1, 2, 3, 4)
#: Documents of a batch whose padding is counted, and tokens of its rows.
BATCH, SHORT = 128, 512
#: The same for a timed step. Attention with a mask computes all pairs of a row: rows of 512 gain 1.7.
TIMED, TIMED_ROW = 32, 256
#: Largest difference between the losses of packed and padded rows.
SAME = 1e-4


def plan() -> Iterator[Row]:
    """Plan a million documents of log-normal lengths, median 240 tokens, cut at a row of 4,096."""
    g = torch.Generator().manual_seed(0)
    length_N = (5.5 + torch.randn(DOCUMENTS, generator=g)).exp().long().clamp(8, ROW)
    lengths = length_N.tolist()
    began = time.perf_counter()
    rows = first_fit_decreasing(lengths, ROW)
    yield Row.at_most("packing/seconds", time.perf_counter() - began, SECONDS)
    yield Row.at_most("packing/padding", _padding(lengths, len(rows) * ROW), PADDING)
    yield Row.informs("packing/padding_next_fit", _padding(lengths, next_fit(lengths, ROW) * ROW))
    yield Row.informs("packing/padding_batch_max", _padding(lengths, batch_max(lengths)))


def emoji() -> Iterator[Row]:
    """Count the padding of training batches, packed as a step packs them.

    The batches are of descriptions (an image and a caption each), and of documents with all emoji of a keyword, 1 to 9
    images.
    """
    data = Descriptions(size=48, length=64)
    captions = [
        int(n) for batch in data.train_dataloader() for n in (batch.inputs["text"] != PAD).sum(dim=1) + SIDE**2 - 1
    ]
    texts = [len(ids) + (SIDE**2 - 1) * len(concepts) for ids, concepts in documents(data)]
    for name, lengths in (("descriptions", captions), ("keywords", texts)):
        plans = [places(chunk, SHORT) for chunk in chunks(lengths, BATCH)]
        cells = sum(each.rows * each.width for each in plans)
        yield Row.at_most(f"packing/{name}/padding", _padding(lengths, cells), PADDING)
        yield Row.informs(f"packing/{name}/padding_next_fit", _padding(lengths, next_fit(lengths, SHORT) * SHORT))
        yield Row.informs(f"packing/{name}/padding_batch_max", _padding(lengths, batch_max(lengths)))


def speed(pairs: int = 30, warmup: int = 1, steps: int = 2, width: int = 128, depth: int = 3) -> Iterator[Row]:
    """Time forward and backward of training steps on documents of keywords: packed rows over padded ones.

    A padded row holds one document, at the length of the longest one. The tower, the projector and the head do the same
    work in both.
    """
    data = Descriptions(size=48, length=64)
    batches = [batch_of(data, chunk) for chunk in list(chunks(documents(data), TIMED))[:steps]]
    packed, padded = models(data, width, depth)
    for batch in batches:
        losses = [float(model.objective_of(batch).total.detach()) for model in (packed, padded)]
        assert abs(losses[0] - losses[1]) < SAME, losses
    queues = {model: cycle(batches) for model in (packed, padded)}

    def step(model: VisionLanguage) -> None:
        model.zero_grad()
        model.objective_of(next(queues[model])).total.backward()

    value, low, high = ratio(lambda: step(packed), lambda: step(padded), pairs, warmup)
    yield Row.at_least("packing/tokens_per_second_ratio", value, SPEED, (low, high))
    yield Row.informs("packing/tokens_per_second_padding", packed.packing.padding)


def grids(repeats: int = 7, steps: int = 2, width: int = 128, depth: int = 3) -> Iterator[Row]:
    """Measure tokens a second of forward and backward with 1 to 16 tokens per image, in packed rows and in padded ones.

    The figures are medians of alternating passes. Writes the figure ``runs/packing.png``.
    """
    data = Descriptions(size=48, length=64)
    some = list(chunks(documents(data), TIMED))[:steps]
    batches = [batch_of(data, chunk) for chunk in some]
    rates: dict[tuple[str, int], list[float]] = {}
    for repeat, side in product(range(repeats + 1), SIDES):
        tokens = sum(len(ids) + (side**2 - 1) * len(concepts) for chunk in some for ids, concepts in chunk)
        for name, model in zip(("packed", "padded"), models(data, width, depth, side), strict=True):
            began = time.perf_counter()
            for batch in batches:
                model.objective_of(batch).total.backward()
            if repeat:  # the first pass fills caches
                rates.setdefault((name, side**2), []).append(tokens / (time.perf_counter() - began))
    median = {key: statistics.median(values) for key, values in rates.items()}
    picture(median, Path("runs") / "packing.png")
    for number in (side**2 for side in SIDES):
        faster = median["packed", number] / median["padded", number]
        yield Row.informs(f"packing/tokens_per_second_ratio_{number}", faster)


@with_style
def picture(rates: Mapping[tuple[str, int], float], file: Path) -> None:
    """Plot tokens a second by tokens per image, a line for packed rows and one for padded ones."""
    made = figure(720, 320)
    axes = made.subplots()
    for name, label, colour in (("packed", "packed rows", BLUE), ("padded", "a document a row", VERMILLION)):
        points = sorted((number, rate) for (of, number), rate in rates.items() if of == name)
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
    axes.set_xticks([side**2 for side in SIDES])
    axes.set(xlabel="tokens an image", ylabel="tokens a second", ylim=(0, None))
    axes.grid(axis="y")
    axes.legend()
    made.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(file)


class Padded(VisionLanguage):
    """One document per row, padded to the longest one of the batch."""

    def hidden_before_answers(self, batch: Batch, routings: object = None) -> tuple[Tensor, Tensor, Tensor]:
        h_BSW, row = self.sequence(batch)
        longest = int(row.real_BS.sum(dim=1).max())
        h_BSW = self.lm(h_BSW[:, :longest])
        sample_N, at_N = row.loss_mask_BS.nonzero(as_tuple=True)
        return h_BSW[sample_N, at_N - 1], row.ids_BS[sample_N, at_N], sample_N


def models(data: Descriptions, width: int, depth: int, side: int = SIDE) -> tuple[VisionLanguage, Padded]:
    """Build the same parts in a model that packs and in one that pads."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "towers": Towers(image=ConvTower([16, 32, 64], stem=4)),
        "lm": CausalLM(data.answer_token + 1, width, depth, 4, length=TIMED_ROW),
        "image_token": data.image_token,
        "answer_token": data.answer_token,
    }
    packed, padded = VisionLanguage(**parts, projector=PooledGrid(side)), Padded(**parts, projector=PooledGrid(side))
    padded.projector = packed.projector
    return packed, padded


def documents(data: Descriptions) -> list[tuple[list[int], list[int]]]:
    """Return token ids and concepts of a document for each keyword: ``<image> name`` for each emoji that has it."""
    concepts: dict[str, list[int]] = {}
    for c, row in enumerate(data.pack.rows):
        for word in row["keywords"]["en"] or []:
            concepts.setdefault(word, []).append(c)
    found = []
    for word, of in concepts.items():
        if len(of) <= IMAGES:
            names = [[data.image_token or 0, *data.ids(data.pack.rows[c]["names"]["en"])] for c in of]
            found.append(([BOS, *data.ids(word), *(i for name in names for i in name), EOS], of))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def batch_of(data: Descriptions, chunk: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Make a batch of documents; all tokens of their text are learned."""
    size = data.size
    text_BT = torch.full((len(chunk), max(len(ids) for ids, _ in chunk)), PAD)
    x_BKCHW = torch.zeros(len(chunk), IMAGES, 3, size, size)
    for b, (ids, concepts) in enumerate(chunk):
        text_BT[b, : len(ids)] = torch.tensor(ids)
        drawn = torch.stack([data.drawing(VENDORS.index(data.vendors[0]), c) for c in concepts])
        x_BKCHW[b, : len(concepts)] = over_white(drawn.float() / 255) * 2 - 1
    learned_BT = (text_BT != PAD) & (text_BT != data.image_token)
    learned_BT[:, 0] = False
    present = {name: torch.ones(len(chunk), dtype=torch.bool) for name in ("image", "text")}
    return Batch({"image": x_BKCHW, "text": text_BT, "loss_mask": learned_BT}, present)


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def next_fit(lengths: Sequence[int], size: int) -> int:
    """Count rows if a document that does not fit the last row begins another.

    >>> next_fit([4, 8, 1, 4, 2, 1], size=10)
    3
    """
    rows, room = 0, 0
    for n in lengths:
        if n > room:
            rows, room = rows + 1, size
        room -= n
    return rows


def batch_max(lengths: Sequence[int], batch: int = BATCH) -> int:
    """Count the cells of rows that hold one document and are as long as the longest of its batch.

    >>> batch_max([1, 3, 2, 2], batch=2)
    10
    """
    return sum(len(chunk) * max(chunk) for chunk in chunks(lengths, batch))


def _padding(lengths: Sequence[int], cells: int) -> float:
    return 1 - sum(lengths) / cells
