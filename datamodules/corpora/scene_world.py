"""Composed scenes: layouts on a grid, drawings on a canvas, and captions that state what is where.

Letters: B samples of a batch, C concepts, K objects of a scene, R = K - 1 clauses of a caption, L layouts, S pixels of
a side, T tokens, V elements of triples, W tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.corpora.emoji_pack import VENDORS, Pack
from descant.modules.core.rng import mix_N
from descant.modules.tokenizers.text import Tokenizer

#: Concepts with one-word names and distinct drawings. The emoji pack's split by concept holds none of them out.
CONCEPTS = (
    *("fox", "cat", "elephant", "panda", "lion", "zebra", "giraffe", "frog", "whale", "octopus", "turtle", "butterfly"),
    *("flamingo", "snail", "cactus", "mushroom", "tulip", "sunflower", "pizza", "egg", "avocado", "tomato", "grapes"),
    *("banana", "pineapple", "strawberry", "doughnut", "bicycle", "bus", "tractor", "rocket", "helicopter", "anchor"),
    *("umbrella", "balloon", "violin", "drum", "scissors", "pencil", "bell", "ladder", "magnet", "dress", "laptop"),
    *("skull", "robot", "snowman", "volcano"),
)
#: Relation -> the steps (rows down, columns right) from head to tail for which it holds.
STEPS = {
    "left of": ((0, 1),),
    "right of": ((0, -1),),
    "above": ((1, 0),),
    "below": ((-1, 0),),
    "next to": ((0, 1), (0, -1)),
}
#: Relations that still hold when their two objects are exchanged: their captions have no negative.
SYMMETRIC = {name for name, steps in STEPS.items() if {(-r, -c) for r, c in steps} == set(steps)}
SIZES = ("small", "large")
TRIPLES, ELEMENT = 6, 5  # triples per sample, and tokens per element of a triple, as in Structure-CLIP
CACHED = 1 << 16  # the most sentences whose tokens are cached


@dataclass
class Graph:
    """The captions of B scenes: R clauses "head relation tail", and the sizes of the first one's two objects.

    ``head_BR``, ``tail_BR``: concepts. ``relation_BR``: numbers of relations. ``large_B2``: 1 large, 0 small, -1 not
    stated.
    """

    head_BR: np.ndarray
    relation_BR: np.ndarray
    tail_BR: np.ndarray
    large_B2: np.ndarray

    def swap_objects(self, sizes_B: np.ndarray) -> Graph:
        """Exchange the two objects of the first clause, or where ``sizes_B`` their two sizes."""
        head_BR, tail_BR = self.head_BR.copy(), self.tail_BR.copy()
        objects_B = ~sizes_B
        head_BR[objects_B, 0], tail_BR[objects_B, 0] = self.tail_BR[objects_B, 0], self.head_BR[objects_B, 0]
        large_B2 = np.where(sizes_B[:, None], self.large_B2[:, ::-1], self.large_B2)
        return replace(self, head_BR=head_BR, tail_BR=tail_BR, large_B2=large_B2)

    def rows(self) -> list[list[int]]:
        """List all numbers of each caption, one list per scene."""
        columns = (self.head_BR, self.relation_BR, self.tail_BR, self.large_B2)
        return np.concatenate(columns, axis=1).tolist()


@dataclass
class Scene:
    """B scenes: concept, vendor, cell, size and place of each of K objects, and the caption.

    ``concept_BK``, ``vendor_BK``, ``cell_BK`` (row by row), ``large_BK``; ``pixels_BK`` per side, ``top_BK`` and
    ``left_BK`` on the canvas. ``sizes_B``: whether the negative exchanges the sizes, not the objects.
    """

    concept_BK: np.ndarray
    vendor_BK: np.ndarray
    cell_BK: np.ndarray
    large_BK: np.ndarray
    pixels_BK: np.ndarray
    top_BK: np.ndarray
    left_BK: np.ndarray
    graph: Graph
    sizes_B: np.ndarray


class World:
    """Layouts, canvases, sentences and triples of scenes.

    Args:
        pack: only the concepts' drawings, in the order of ``names``.
        names: names of the concepts. relations: relations in the captions.
        tokenizer: tokenizer of the captions.
        size: S. grid: cells per side. objects: K.
        sizes: whether objects are large or small, and captions state it.
    """

    def __init__(
        self,
        pack: Pack,
        names: Sequence[str],
        relations: Sequence[str],
        tokenizer: Tokenizer,
        size: int,
        grid: int,
        objects: int,
        sizes: bool,
    ) -> None:
        self.pack, self.names, self.relations, self.tokenizer = pack, tuple(names), tuple(relations), tokenizer
        self.size, self.grid, self.cell, self.objects, self.sizes = size, grid, size // grid, objects, sizes
        # sign of the step in rows and in columns -> which relations hold
        signs = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)]
        self.holds_9R = np.array([[sign in STEPS[name] for name in relations] for sign in signs])
        self._layouts()
        self.symmetric_R = np.array([name in SYMMETRIC for name in relations])
        self._packed: dict[tuple[int, int], np.ndarray] = {}
        self._tokens: dict[tuple[int, ...], list[int]] = {}
        # elements of triples: none, concepts, relations, "is", sizes
        words = [*names, *relations, "is", *SIZES]
        self.element_VW = np.full((1 + len(words), ELEMENT), tokenizer.pad, dtype=np.int64)
        for number, word in enumerate(words):
            ids = tokenizer.ids(word)[:ELEMENT]
            self.element_VW[1 + number, : len(ids)] = ids

    def _layouts(self) -> None:
        """List the L ways to put K objects into cells such that some relation holds from each to the next.

        They are sorted by the relation of the first two; a layout for which several hold is listed for each of them.
        """
        cells = range(self.grid**2)
        holds_ccR = self.holds_9R[self.step(np.arange(self.grid**2)[:, None], np.arange(self.grid**2))]
        paths = [[cell] for cell in cells]
        for _ in range(1, self.objects):
            paths = [[*p, c] for p in paths for c in cells if c not in p and holds_ccR[p[-1], c].any()]
        by_relation = [[p for p in paths if holds_ccR[p[0], p[1], r]] for r in range(len(self.relations))]
        for name, layouts in zip(self.relations, by_relation, strict=True):
            if not layouts:
                room = f"{self.objects} objects on a grid of {self.grid} x {self.grid}"
                raise ValueError(f"{room} with {name!r}: no layout; a grid of {self.grid + 1} has more room")
        self.layout_LK = np.array([path for layouts in by_relation for path in layouts])
        self.layouts_R = np.array([len(layouts) for layouts in by_relation])
        self.layout_R = self.layouts_R.cumsum() - self.layouts_R

    def step(self, cell_B: np.ndarray, other_B: np.ndarray) -> np.ndarray:
        """Return the direction from one cell to another, as a row number of ``holds_9R``."""
        row_B, column_B = (np.sign(b - a) for a, b in zip(self.place(cell_B), self.place(other_B), strict=True))
        return 3 * (row_B + 1) + column_B + 1

    def place(self, cell_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return row and column of a cell."""
        return cell_B // self.grid, cell_B % self.grid

    # pixels --------------------------------------------------------------------------------------------------------

    def pixels(self, large: int) -> tuple[int, int]:
        """Return the least and the most pixels per side of a drawing; ``large`` is -1 if there are no sizes."""
        low, high = {-1: (0.75, 1.0), 0: (0.45, 0.6), 1: (0.85, 1.0)}[large]
        return round(low * self.cell), round(high * self.cell)

    def pack_pixels(self, vendor: int, pixels: int) -> np.ndarray:
        """Return int32 ``[C, pixels^2]``: drawings of one vendor at one size, a pixel's four bytes as one number."""
        if (vendor, pixels) not in self._packed:
            x_CHW4 = self.pack.downsample(VENDORS[vendor], pixels).permute(0, 2, 3, 1).contiguous().numpy()
            self._packed[vendor, pixels] = x_CHW4.view(np.int32).reshape(len(x_CHW4), -1)
        return self._packed[vendor, pixels]

    def canvas(self, scene: Scene) -> Tensor:
        """Draw scenes, uint8 RGBA ``[B, 4, S, S]``, transparent around the objects, which are in different cells."""
        B, S = len(scene.concept_BK), self.size
        canvas_BSS = np.zeros((B, S, S), dtype=np.int32)
        start_BK = np.arange(B)[:, None] * S * S + scene.top_BK * S + scene.left_BK
        group_BK = scene.vendor_BK * (S + 1) + scene.pixels_BK  # drawings of one vendor and size are written at once
        for group in np.unique(group_BK):
            here_BK = group_BK == group
            vendor, pixels = divmod(int(group), S + 1)
            patch = (np.arange(pixels)[:, None] * S + np.arange(pixels)).ravel()
            canvas_BSS.reshape(-1)[start_BK[here_BK][:, None] + patch] = self.pack_pixels(vendor, pixels)[
                scene.concept_BK[here_BK]
            ]
        return torch.from_numpy(canvas_BSS.view(np.uint8).reshape(B, S, S, 4)).permute(0, 3, 1, 2).contiguous()

    # words ---------------------------------------------------------------------------------------------------------

    def sentence(self, row: Sequence[int]) -> str:
        """Write one row of :meth:`Graph.rows` in words."""
        R = self.objects - 1
        head, relation, tail, large = row[:R], row[R : 2 * R], row[2 * R : 3 * R], row[3 * R :]
        sizes = [f"{SIZES[size]} " if size >= 0 else "" for size in large]
        clauses = []
        for r in range(R):
            a, b = sizes if r == 0 else ("", "")
            clauses.append(
                f"the {a}{self.names[head[r]]} is {self.relations[relation[r]]} the {b}{self.names[tail[r]]}"
            )
        return " and ".join(clauses)

    def tokens(self, graph: Graph) -> Tensor:
        """Return token ids, int64 ``[B, T]``; each sentence is encoded once."""
        rows = []
        for row in map(tuple, graph.rows()):
            if len(self._tokens) >= CACHED:  # long chains hardly ever repeat
                self._tokens.clear()
            if row not in self._tokens:
                self._tokens[row] = self.tokenizer.row([self.tokenizer.ids(self.sentence(row))])
            rows.append(self._tokens[row])
        return torch.from_numpy(np.array(rows, dtype=np.int64))

    def triples(self, graph: Graph, exchanged: bool = False) -> Tensor:
        """Return token ids ``[B, 6, 3, W]``: (head, relation, tail) of each clause, then (object, is, size)."""
        B, R = graph.head_BR.shape
        C = len(self.names)
        number_BK3 = np.zeros((B, TRIPLES, 3), dtype=np.int64)
        number_BK3[:, :R] = np.stack([1 + graph.head_BR, 1 + C + graph.relation_BR, 1 + graph.tail_BR], axis=2)
        if self.sizes:
            objects_B2 = np.stack([graph.head_BR[:, 0], graph.tail_BR[:, 0]], axis=1)
            verb = 1 + C + len(self.relations)
            sizes_B23 = np.stack([1 + objects_B2, np.full_like(objects_B2, verb), verb + 1 + graph.large_B2], axis=2)
            number_BK3[:, R : R + 2] = sizes_B23
        if exchanged:
            number_BK3 = number_BK3[:, :, ::-1]
        return torch.from_numpy(self.element_VW[number_BK3])

    def key(self, graph: Graph) -> Tensor:
        """Return content keys, int64 ``[B]``, equal for equal meanings: "a is right of b" and "b is left of a"."""
        backward_R = np.array([name in ("right of", "below") for name in self.relations])
        upright_R = np.array([STEPS[name][0][0] != 0 for name in self.relations])
        turn_BR, axis_BR = backward_R[graph.relation_BR], upright_R[graph.relation_BR].astype(np.int64)
        first_BR, second_BR = (
            np.where(turn_BR, b, a) for a, b in ((graph.head_BR, graph.tail_BR), (graph.tail_BR, graph.head_BR))
        )
        if self.symmetric_R.any():  # "left of" implies "next to": neither is the other's negative
            low_BR, high_BR = np.minimum(first_BR, second_BR), np.maximum(first_BR, second_BR)
            first_BR, second_BR = (np.where(axis_BR == 0, a, b) for a, b in ((low_BR, first_BR), (high_BR, second_BR)))
        C = len(self.names)
        clause_BR = np.sort((axis_BR * C + first_BR) * C + second_BR, axis=1)
        objects_B2 = np.stack([graph.head_BR[:, 0], graph.tail_BR[:, 0]], axis=1)
        size_B2 = np.sort(np.where(graph.large_B2 < 0, 0, objects_B2 * 2 + graph.large_B2), axis=1)
        columns = np.concatenate([clause_BR, size_B2], axis=1).astype(np.uint64)
        return torch.from_numpy(mix_N(columns[:, 0], *columns.T[1:]))
