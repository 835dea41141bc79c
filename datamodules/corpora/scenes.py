"""Scenes: a few emoji on a canvas, what is where among them, and captions of which only the order of words says so.

"The fox is left of the apple": the same words say the opposite once two of them change places, and that caption is the
sample's hard negative. Held out of training: a fifth of the pairs of concepts, and the vendor Fluent. A tenth of the
pairs, as Twemoji draws them, is for choosing settings: no test set has any of them. Letters: B samples of a batch, N of
a set, C concepts, P pairs of concepts, K objects of a scene, R = K - 1 clauses of a caption, L layouts, S pixels of a
side, T tokens, V elements of triples, W tokens of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.corpora.emoji import DEVELOPMENT_VENDOR, PACK, VENDORS, Pack
from descant.datamodules.names import require_known
from descant.datamodules.order import Slot
from descant.datamodules.sources.ledger import Ledger
from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.core.rng import mix_N, salt, uniform_NK
from descant.modules.tokenizers.text import Tokenizer, WordTokenizer
from descant.modules.transforms.image import Augment, Pixels, over_white

#: Named in one word, drawn unlike each other, and none of them held out where the emoji pack is split by concept.
CONCEPTS = (
    *("fox", "cat", "elephant", "panda", "lion", "zebra", "giraffe", "frog", "whale", "octopus", "turtle", "butterfly"),
    *("flamingo", "snail", "cactus", "mushroom", "tulip", "sunflower", "pizza", "egg", "avocado", "tomato", "grapes"),
    *("banana", "pineapple", "strawberry", "doughnut", "bicycle", "bus", "tractor", "rocket", "helicopter", "anchor"),
    *("umbrella", "balloon", "violin", "drum", "scissors", "pencil", "bell", "ladder", "magnet", "dress", "laptop"),
    *("skull", "robot", "snowman", "volcano"),
)
#: Relation -> the steps (rows down, columns right) from its head to its tail for which it holds.
STEPS = {
    "left of": ((0, 1),),
    "right of": ((0, -1),),
    "above": ((1, 0),),
    "below": ((-1, 0),),
    "next to": ((0, 1), (0, -1)),
}
#: Relations that still hold when their two objects change places: no caption of theirs has a negative.
SYMMETRIC = {name for name, steps in STEPS.items() if {(-r, -c) for r, c in steps} == set(steps)}
SIZES = ("small", "large")
TRIPLES, ELEMENT = 6, 5  # of a sample, and tokens of a triple's element: as the knowledge encoder of Structure-CLIP
REMEMBERED = 1 << 16  # sentences whose tokens are kept
HELD_OUT_VENDOR = "fluent"
#: Where the splits of the pairs of concepts end.
SPLITS = {"test": 0.2, "val": 0.3, "train": 1.0}
#: Set -> the split of its pairs, the vendor that draws (None: those of training), and the splits of the pairs that
#: further objects of a scene may make.
SETS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "train": ("train", None, ("train",)),
    "val": ("val", DEVELOPMENT_VENDOR, ("train", "val")),
    "vendor": ("train", HELD_OUT_VENDOR, ("train",)),
    "pairs": ("test", None, ("train", "test")),
    "both": ("test", HELD_OUT_VENDOR, ("train", "test")),
}


@dataclass
class Graph:
    """What is said of B scenes: R clauses "head relation tail", and the sizes of the first one's two objects.

    ``head_BR``, ``tail_BR``: concepts. ``relation_BR``: numbers of the told relations. ``large_B2``: 1 large, 0 small,
    -1 not told.
    """

    head_BR: np.ndarray
    relation_BR: np.ndarray
    tail_BR: np.ndarray
    large_B2: np.ndarray

    def swapped(self, sizes_B: np.ndarray) -> Graph:
        """With the two objects of the first clause exchanged, or their two sizes where ``sizes_B`` says so."""
        head_BR, tail_BR = self.head_BR.copy(), self.tail_BR.copy()
        objects_B = ~sizes_B
        head_BR[objects_B, 0], tail_BR[objects_B, 0] = self.tail_BR[objects_B, 0], self.head_BR[objects_B, 0]
        large_B2 = np.where(sizes_B[:, None], self.large_B2[:, ::-1], self.large_B2)
        return replace(self, head_BR=head_BR, tail_BR=tail_BR, large_B2=large_B2)

    def rows(self) -> list[list[int]]:
        """Everything that is said, one list a scene."""
        columns = (self.head_BR, self.relation_BR, self.tail_BR, self.large_B2)
        return np.concatenate(columns, axis=1).tolist()


@dataclass
class Scene:
    """What B scenes show: for each of K objects its concept, vendor, cell, size and place; and what is said of them.

    ``concept_BK``, ``vendor_BK``, ``cell_BK`` (row by row), ``large_BK``; ``pixels_BK`` of a side, ``top_BK`` and
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
    """What scenes are made of: drawings, places and words.

    Args:
        pack: of the concepts' drawings only, in the order of ``names``.
        names: of the concepts. relations: that are told.
        codec: of the captions.
        size: S. grid: cells of a side. objects: K.
        sizes: whether objects are large or small, and captions say so.

    Raises:
        ValueError: if the grid has no room for a layout with every relation.
    """

    def __init__(
        self,
        pack: Pack,
        names: Sequence[str],
        relations: Sequence[str],
        codec: Tokenizer,
        size: int,
        grid: int,
        objects: int,
        sizes: bool,
    ) -> None:
        self.pack, self.names, self.relations, self.codec = pack, tuple(names), tuple(relations), codec
        self.size, self.grid, self.cell, self.objects, self.sizes = size, grid, size // grid, objects, sizes
        # a sign of the step in rows and one in columns -> which relations hold
        signs = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)]
        self.holds_9R = np.array([[sign in STEPS[name] for name in relations] for sign in signs])
        self._layouts()
        self.symmetric_R = np.array([name in SYMMETRIC for name in relations])
        self._packed: dict[tuple[int, int], np.ndarray] = {}
        self._tokens: dict[tuple[int, ...], list[int]] = {}
        # elements of triples: none, concepts, relations, "is", sizes
        words = [*names, *relations, "is", *SIZES]
        self.element_VW = np.full((1 + len(words), ELEMENT), codec.pad, dtype=np.int64)
        for number, word in enumerate(words):
            ids = codec.ids(word)[:ELEMENT]
            self.element_VW[1 + number, : len(ids)] = ids

    def _layouts(self) -> None:
        """The L ways to put K objects into cells, each in line with the one before it so that some relation holds.

        Sorted by the relation of the first two; one for which several hold is there for each of them.
        """
        cells = range(self.grid**2)
        holds_ccR = self.holds_9R[self.step(np.arange(self.grid**2)[:, None], np.arange(self.grid**2))]
        paths = [[cell] for cell in cells]
        for _ in range(1, self.objects):
            paths = [[*p, c] for p in paths for c in cells if c not in p and holds_ccR[p[-1], c].any()]
        found = [[p for p in paths if holds_ccR[p[0], p[1], r]] for r in range(len(self.relations))]
        for name, layouts in zip(self.relations, found, strict=True):
            if not layouts:
                room = f"{self.objects} objects on a grid of {self.grid} x {self.grid}"
                raise ValueError(f"{room} with {name!r}: no layout; a grid of {self.grid + 1} has more room")
        self.layout_LK = np.array([path for layouts in found for path in layouts])
        self.layouts_R = np.array([len(layouts) for layouts in found])
        self.layout_R = self.layouts_R.cumsum() - self.layouts_R

    def step(self, cell_B: np.ndarray, other_B: np.ndarray) -> np.ndarray:
        """The direction from one cell to another, as a row number of ``holds_9R``."""
        row_B, column_B = (np.sign(b - a) for a, b in zip(self.place(cell_B), self.place(other_B), strict=True))
        return 3 * (row_B + 1) + column_B + 1

    def place(self, cell_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of a cell."""
        return cell_B // self.grid, cell_B % self.grid

    # pixels --------------------------------------------------------------------------------------------------------

    def pixels(self, large: int) -> tuple[int, int]:
        """The least and the most pixels of a side of a drawing; ``large`` is -1 where there are no sizes."""
        low, high = {-1: (0.75, 1.0), 0: (0.45, 0.6), 1: (0.85, 1.0)}[large]
        return round(low * self.cell), round(high * self.cell)

    def packed(self, vendor: int, pixels: int) -> np.ndarray:
        """int32 ``[C, pixels^2]``: drawings of one vendor at one size, the four bytes of a pixel in one number."""
        if (vendor, pixels) not in self._packed:
            x_CHW4 = self.pack.reduced(VENDORS[vendor], pixels).permute(0, 2, 3, 1).contiguous().numpy()
            self._packed[vendor, pixels] = x_CHW4.view(np.int32).reshape(len(x_CHW4), -1)
        return self._packed[vendor, pixels]

    def canvas(self, scene: Scene) -> Tensor:
        """uint8 RGBA ``[B, 4, S, S]``, transparent where nothing is. Objects have cells of their own: none overlap."""
        B, S = len(scene.concept_BK), self.size
        canvas_BSS = np.zeros((B, S, S), dtype=np.int32)
        start_BK = np.arange(B)[:, None] * S * S + scene.top_BK * S + scene.left_BK
        kind_BK = scene.vendor_BK * (S + 1) + scene.pixels_BK  # all of one vendor and size are written at once
        for kind in np.unique(kind_BK):
            here_BK = kind_BK == kind
            vendor, pixels = divmod(int(kind), S + 1)
            patch = (np.arange(pixels)[:, None] * S + np.arange(pixels)).ravel()
            canvas_BSS.reshape(-1)[start_BK[here_BK][:, None] + patch] = self.packed(vendor, pixels)[
                scene.concept_BK[here_BK]
            ]
        return torch.from_numpy(canvas_BSS.view(np.uint8).reshape(B, S, S, 4)).permute(0, 3, 1, 2).contiguous()

    # words ---------------------------------------------------------------------------------------------------------

    def sentence(self, said: Sequence[int]) -> str:
        """One row of :meth:`Graph.rows` in words."""
        R = self.objects - 1
        head, relation, tail, large = said[:R], said[R : 2 * R], said[2 * R : 3 * R], said[3 * R :]
        about = [f"{SIZES[size]} " if size >= 0 else "" for size in large]
        clauses = []
        for r in range(R):
            a, b = about if r == 0 else ("", "")
            told = self.relations[relation[r]]
            clauses.append(f"the {a}{self.names[head[r]]} is {told} the {b}{self.names[tail[r]]}")
        return " and ".join(clauses)

    def tokens(self, graph: Graph) -> Tensor:
        """int64 ``[B, T]``; each sentence is encoded once."""
        rows = []
        for said in map(tuple, graph.rows()):
            if len(self._tokens) >= REMEMBERED:  # long chains are nearly all new
                self._tokens.clear()
            if said not in self._tokens:
                self._tokens[said] = self.codec.row([self.codec.ids(self.sentence(said))])
            rows.append(self._tokens[said])
        return torch.from_numpy(np.array(rows, dtype=np.int64))

    def triples(self, graph: Graph, exchanged: bool = False) -> Tensor:
        """Token ids ``[B, 6, 3, W]``: (head, relation, tail) of each clause, then (object, is, size)."""
        B, R = graph.head_BR.shape
        C = len(self.names)
        number_BK3 = np.zeros((B, TRIPLES, 3), dtype=np.int64)
        number_BK3[:, :R] = np.stack([1 + graph.head_BR, 1 + C + graph.relation_BR, 1 + graph.tail_BR], axis=2)
        if self.sizes:
            objects_B2 = np.stack([graph.head_BR[:, 0], graph.tail_BR[:, 0]], axis=1)
            verb = 1 + C + len(self.relations)
            about_B23 = np.stack([1 + objects_B2, np.full_like(objects_B2, verb), verb + 1 + graph.large_B2], axis=2)
            number_BK3[:, R : R + 2] = about_B23
        if exchanged:
            number_BK3 = number_BK3[:, :, ::-1]
        return torch.from_numpy(self.element_VW[number_BK3])

    def key(self, graph: Graph) -> Tensor:
        """int64 ``[B]``: equal for what means the same: "a is right of b" and "b is left of a"."""
        backward_R = np.array([name in ("right of", "below") for name in self.relations])
        upright_R = np.array([STEPS[name][0][0] != 0 for name in self.relations])
        turn_BR, axis_BR = backward_R[graph.relation_BR], upright_R[graph.relation_BR].astype(np.int64)
        first_BR, second_BR = (
            np.where(turn_BR, b, a) for a, b in ((graph.head_BR, graph.tail_BR), (graph.tail_BR, graph.head_BR))
        )
        if self.symmetric_R.any():  # "next to" is true of "left of" as well: neither is the other's negative
            low_BR, high_BR = np.minimum(first_BR, second_BR), np.maximum(first_BR, second_BR)
            first_BR, second_BR = (np.where(axis_BR == 0, a, b) for a, b in ((low_BR, first_BR), (high_BR, second_BR)))
        C = len(self.names)
        clause_BR = np.sort((axis_BR * C + first_BR) * C + second_BR, axis=1)
        objects_B2 = np.stack([graph.head_BR[:, 0], graph.tail_BR[:, 0]], axis=1)
        size_B2 = np.sort(np.where(graph.large_B2 < 0, 0, objects_B2 * 2 + graph.large_B2), axis=1)
        columns = np.concatenate([clause_BR, size_B2], axis=1).astype(np.uint64)
        return torch.from_numpy(mix_N(columns[:, 0], *columns.T[1:]))


class SceneSet(BatchDataset):
    """One row for each thing that can be said of a pair: which object is what of the other.

    Everything else about a scene (places, sizes, vendors, further objects) is drawn: from the visit's key in training,
    from the scene's own id in evaluation, which shows the same scenes in every run.

    Args:
        world: of all sets.
        fact_N3: first concept, told relation, second concept.
        id_N: stable ids of the rows.
        vendors: numbers of those that draw.
        together_CC: bool, which concepts may meet in a scene of this set.
        seed, drop: as in BatchDataset.
        random: drawn anew at each visit.
        exchanged: heads and tails of the triples are exchanged: a control of what the knowledge is good for.
    """

    def __init__(
        self,
        world: World,
        fact_N3: np.ndarray,
        id_N: np.ndarray,
        vendors: Sequence[int],
        together_CC: np.ndarray,
        seed: int,
        random: bool = False,
        exchanged: bool = False,
        drop: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(seed, drop)
        self.world, self.fact_N3, self.id_N, self.vendors = world, fact_N3, id_N, np.array(vendors)
        self.together_CC, self.random, self.exchanged = together_CC, random, exchanged

    def __len__(self) -> int:
        return len(self.fact_N3)

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return self.id_N[index_B]

    def draws(self, slots: Sequence[Slot]) -> np.ndarray:
        if self.random:
            return super().draws(slots)
        return mix_N(self.id_N[[slot.sample for slot in slots]], "scene")

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        everything = torch.ones(len(index_N), dtype=torch.bool)
        symmetric_N = torch.from_numpy(self.world.symmetric_R[self.fact_N3[index_N, 1]])
        return {"image": everything, "text": everything.clone(), "text" + NEGATIVE: ~symmetric_N}

    def scene(self, index_B: np.ndarray, draw_B: np.ndarray) -> Scene:
        """What is shown and said."""
        world, K = self.world, self.world.objects

        def u_BK(what: str) -> np.ndarray:
            return uniform_NK(draw_B, [f"scene/{what}{k}" for k in range(K)]).numpy().astype(np.float64)

        first_B, relation_B, second_B = self.fact_N3[index_B].T
        concept_BK = self._concepts(np.stack([first_B, second_B], axis=1), u_BK("concept"))
        vendor_BK = self.vendors[_floor(u_BK("vendor"), len(self.vendors))]
        # of the layouts in which the first two stand so; then what holds between the others
        layout_B = world.layout_R[relation_B] + _floor(u_BK("layout")[:, 0], world.layouts_R[relation_B])
        cell_BK = world.layout_LK[layout_B]
        relation_BR = _pick(world.holds_9R[world.step(cell_BK[:, :-1], cell_BK[:, 1:])], u_BK("relation")[:, 1:])
        relation_BR[:, 0] = relation_B

        large_BK = (u_BK("large") < 0.5).astype(np.int64) if world.sizes else np.full_like(cell_BK, -1)
        low_BK, high_BK = np.array([world.pixels(large) for large in (0, 1, -1)])[large_BK].transpose(2, 0, 1)
        pixels_BK = low_BK + _floor(u_BK("pixels"), high_BK - low_BK + 1)
        row_BK, column_BK = world.place(cell_BK)
        top_BK = row_BK * world.cell + _floor(u_BK("top"), world.cell - pixels_BK + 1)
        left_BK = column_BK * world.cell + _floor(u_BK("left"), world.cell - pixels_BK + 1)

        graph = Graph(concept_BK[:, :-1], relation_BR, concept_BK[:, 1:], large_BK[:, :2])
        differ_B = large_BK[:, 0] != large_BK[:, 1]  # equal sizes exchanged would say the same
        sizes_B = (u_BK("swap")[:, 0] < 0.5) & differ_B
        return Scene(concept_BK, vendor_BK, cell_BK, large_BK, pixels_BK, top_BK, left_BK, graph, sizes_B)

    def _concepts(self, pair_B2: np.ndarray, u_BK: np.ndarray) -> np.ndarray:
        """The pair, and for each further object one of the concepts that may stand with all before it."""
        chosen = [pair_B2[:, 0], pair_B2[:, 1]]
        for k in range(2, self.world.objects):
            free_BC = np.logical_and.reduce([self.together_CC[c_B] for c_B in chosen])
            if not free_BC.any(axis=1).all():
                raise ValueError(f"objects {self.world.objects}: some {k} concepts share no other; fewer objects do")
            chosen.append(_pick(free_BC, u_BK[:, k]))
        return np.stack(chosen, axis=1)

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        world, scene = self.world, self.scene(index_B, draw_B)
        negative = scene.graph.swapped(scene.sizes_B)
        inputs = {"image": world.canvas(scene)}
        for end, graph in (("", scene.graph), (NEGATIVE, negative)):
            inputs["text" + end] = world.tokens(graph)
            inputs["triples" + end] = world.triples(graph, self.exchanged)
        relation_B = np.where(scene.sizes_B, len(world.relations), scene.graph.relation_BR[:, 0])
        targets = {"relation": relation_B, "concept": scene.concept_BK, "cell": scene.cell_BK, "large": scene.large_BK}
        return Rows(inputs, {name: torch.from_numpy(x) for name, x in targets.items()}, world.key(scene.graph))


def _floor(u_B: np.ndarray, count_B: np.ndarray | int) -> np.ndarray:
    """A whole number from 0 to below ``count_B``, each equally likely."""
    return (u_B * count_B).astype(np.int64)


def _pick(free_BC: np.ndarray, u_B: np.ndarray) -> np.ndarray:
    """One of the places that are True in the last axis, each equally likely."""
    reach_BC = free_BC.cumsum(axis=-1)
    return (reach_BC > _floor(u_B, reach_BC[..., -1])[..., None]).argmax(axis=-1)


class Scenes(DataModule):
    """Composed scenes as image-text pairs, each with a hard negative of its caption and the triples of both.

    Inputs: ``image``; ``text`` and ``text_neg``; ``triples`` and ``triples_neg``, token ids ``[B, 6, 3, 5]``. Targets:
    ``relation``, what the negative exchanges (a told relation's number; the one after the last where it is the sizes),
    and the scene itself: ``concept``, ``cell`` and ``large`` of each object. A negative has the same words, and is
    false of the scene; a caption of a symmetric relation has none.

    Evaluation sets: "validate" has ``val`` (a tenth of the pairs, as Twemoji draws them: nothing else has either);
    "test" has ``vendor`` (Fluent's drawings of training pairs), ``pairs`` (held-out pairs, training vendors) and
    ``both``. A concept is never held out: what is new is who meets whom.

    Args:
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        num_workers: processes that read ahead; everything is in memory, so 0 is best.
        drop: modality -> probability that a training sample is made absent.
        tiny: a dozen concepts and a few scenes, for tests and for `check`.
        size: S, pixels of the canvas, which the grid divides.
        grid: cells of a side.
        objects: K of a scene; each is in line with the one before it, and the caption says how.
        concepts: English names of the emoji pack; 48 words where not given.
        relations: that captions tell.
        sizes: objects are large or small, and the caption says so of the first two.
        vendors: whose drawings are trained on.
        text: how captions become token ids; a number a word where not given.
        scenes: of an evaluation set.
        exchanged: also a test set ``exchanged``, the scenes of ``both`` with heads and tails of all triples exchanged:
            who goes by the triples does worse there.
        augment: training's view of a scene, on the device.
        folder: of the pack.

    Raises:
        ValueError: for an unknown concept, relation or vendor, vendors that are held out, sizes that do not fit, and an
            augmentation under which captions are no longer true.

    >>> batch = next(iter(Scenes(tiny=True, batch_size=8).train_dataloader()))
    >>> batch.inputs["image"].shape, batch.inputs["triples_neg"].shape, sorted(batch.present)
    (torch.Size([8, 4, 48, 48]), torch.Size([8, 6, 3, 5]), ['image', 'text', 'text_neg'])
    """

    def __init__(
        self,
        batch_size: int = 96,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        drop: dict[str, float] | None = None,
        tiny: bool = False,
        size: int = 48,
        grid: int = 2,
        objects: int = 2,
        concepts: list[str] | None = None,
        relations: list[str] | None = None,
        sizes: bool = False,
        vendors: list[str] | None = None,
        text: Tokenizer | None = None,
        scenes: int = 600,
        exchanged: bool = False,
        augment: Augment | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, drop, tiny)
        self.size, self.grid, self.objects, self.sizes = size, grid, objects, sizes
        self.concepts = concepts or list(CONCEPTS[:: 4 if tiny else 1])
        self.relations = relations or ["left of", "right of", "above", "below"]
        trained = [v for v in VENDORS if v not in (DEVELOPMENT_VENDOR, HELD_OUT_VENDOR)]
        self.vendors = vendors or trained
        self.text, self.scenes, self.exchanged = text, 48 if tiny else scenes, exchanged
        self.augment = augment or gentle(size)
        self.pixels, self.folder = Pixels(size), Path(folder) if folder else PACK
        require_known("relations", self.relations, tuple(STEPS))
        require_known("vendors", self.vendors, trained)
        if size % grid or not 8 <= size // grid <= 64:
            near = grid * min(max(round(size / grid), 8), 64)
            raise ValueError(f"grid {grid} cuts size {size} into no cells of 8 to 64 pixels; size {near} does")
        if not 2 <= objects <= grid**2 or objects - 1 + 2 * sizes > TRIPLES:
            most = min(grid**2, TRIPLES + 1 - 2 * sizes)
            raise ValueError(f"objects {objects}: 2 to {most} have room on the grid and in {TRIPLES} triples")
        if self.augment.size != size:
            raise ValueError(f"augment.size {self.augment.size} is not the data's size {size}")
        if self.augment.mirror > 0 or self.augment.rotate > 30:
            raise ValueError(
                f"augment.mirror {self.augment.mirror} and rotate {self.augment.rotate:g}: left and right have to "
                "stay; mirror 0 and rotate of at most 30 leave them"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "text", "text" + NEGATIVE)

    # concepts, words and splits --------------------------------------------------------------------------------------

    @cached_property
    def world(self) -> World:
        run = Path(self.trainer.default_root_dir) if self.trainer is not None else None
        pack = Pack(self.folder, Ledger(run))
        place = {row["names"]["en"]: i for i, row in reversed(list(enumerate(pack.rows)))}
        require_known("concepts", self.concepts, sorted(place))
        pack.keep([place[name] for name in self.concepts])
        for vendor in VENDORS:
            for name, good in zip(self.concepts, pack.drawings(vendor)[1], strict=True):
                if not good:
                    raise ValueError(f"concepts: {vendor}'s drawing of {name!r} cannot be read; leave it out")
        return World(pack, self.concepts, self.relations, self.codec, self.size, self.grid, self.objects, self.sizes)

    @cached_property
    def codec(self) -> Tokenizer:
        if self.text is not None:
            return self.text
        texts = ["the", "is", "and", *SIZES, *self.relations, *self.concepts]
        words = dict.fromkeys(word for text in texts for word in text.split())
        # <bos>, <eos>, nine words a clause at most, and "and" between
        return WordTokenizer(list(words), length=2 + 9 * (self.objects - 1) + self.objects - 2 + 2 * self.sizes)

    @property
    def classes(self) -> dict[str, list[str]]:
        return {"relation": [*self.relations, *(["sizes"] if self.sizes else [])]}

    @cached_property
    def pair_P2(self) -> np.ndarray:
        """All unordered pairs of concepts."""
        return np.stack(np.triu_indices(len(self.concepts), k=1), axis=1)

    @cached_property
    def split_P(self) -> np.ndarray:
        """The split of every pair: exact shares of an order that a hash of both names gives."""
        names = [sorted((self.concepts[a], self.concepts[b])) for a, b in self.pair_P2]
        order_P = np.argsort([salt(f"scenes/{a}/{b}") for a, b in names])
        splits, start = np.empty(len(names), dtype="<U5"), 0
        for split, end in SPLITS.items():
            stop = round(end * len(names))
            splits[order_P[start:stop]], start = split, stop
        return splits

    def together(self, *splits: str) -> np.ndarray:
        """Bool ``[C, C]``: the pairs of some splits."""
        together_CC = np.zeros((len(self.concepts), len(self.concepts)), dtype=bool)
        a_P, b_P = self.pair_P2[np.isin(self.split_P, splits)].T
        together_CC[a_P, b_P] = together_CC[b_P, a_P] = True
        return together_CC

    def facts(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """``[N, 3]`` of a set: first concept, relation, second; and the ids: pair, order and relation, then the set."""
        pairs = np.flatnonzero(self.split_P == SETS[name][0])
        facts = np.meshgrid(pairs, np.arange(len(self.relations)), np.arange(2), indexing="ij")
        pair_N, relation_N, turn_N = (x.ravel() for x in facts)
        first_N, second_N = self.pair_P2[pair_N, turn_N], self.pair_P2[pair_N, 1 - turn_N]
        id_N = ((pair_N * len(self.relations) + relation_N) * 2 + turn_N) * len(SETS) + list(SETS).index(name)
        return np.stack([first_N, relation_N, second_N], axis=1), id_N

    def _set(self, name: str, scenes: int | None = None, random: bool = False, exchanged: bool = False) -> SceneSet:
        fact_N3, id_N = self.facts(name)
        if scenes is not None:
            chosen = np.sort(np.argsort(mix_N(id_N, "scenes/chosen"))[:scenes])
            fact_N3, id_N = fact_N3[chosen], id_N[chosen]
        _, vendor, beside = SETS[name]
        return SceneSet(
            self.world,
            fact_N3,
            id_N,
            [VENDORS.index(v) for v in ([vendor] if vendor else self.vendors)],
            self.together(*beside),
            self.seed,
            random=random,
            exchanged=exchanged,
            drop=self.drop if random else None,
        )

    def training_set(self) -> SceneSet:
        return self._set("train", random=True)

    def bank_set(self) -> SceneSet:
        return self._set("train")

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        if stage == "validate":
            return {"val": self._set("val", self.scenes)}
        sets: dict[str, BatchDataset] = {name: self._set(name, self.scenes) for name in ("vendor", "pairs", "both")}
        if self.exchanged:
            sets["exchanged"] = self._set("both", self.scenes, exchanged=True)
        return sets

    # what evaluation asks --------------------------------------------------------------------------------------------

    def _one(self, index: int) -> Scene:
        """The scene of an id, as evaluation sees it."""
        rows = self._set(list(SETS)[index % len(SETS)])
        (row,) = np.flatnonzero(rows.id_N == index)
        return rows.scene(np.array([row]), mix_N(np.array([index]), "scene"))

    def describe(self, index: int) -> str:
        return self.world.sentence(self._one(index).graph.rows()[0])

    def picture(self, index: int) -> Tensor:
        image = self.world.canvas(self._one(index))
        return (over_white(image.float() / 255)[0] * 255).round().to(torch.uint8)

    # pixels on the device --------------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        view = self.augment if self.trainer is not None and self.trainer.training else self.pixels
        batch.inputs["image"] = view(batch.inputs["image"], batch.draw)
        return batch


def gentle(size: int) -> Augment:
    """Training's view where none is given: it leaves what is where.

    No random background: on the validation set, two hundred steps with one taught a conv tower nothing of scenes.
    """
    return Augment(
        size,
        rotate=5.0,
        scale=1.05,
        stretch=1.05,
        shear=2.0,
        shift=0.02,
        colour=0.15,
        brightness=0.1,
        contrast=0.15,
        grey=0.0,
        background=0.0,
    )
