"""Scenes: a few emoji on a canvas, with captions whose meaning depends on the order of words.

"The fox is left of the apple" with the two nouns exchanged has the same words but is false: it is the sample's hard
negative. Training holds out a fifth of the pairs of concepts, and the vendor Fluent. A tenth of the pairs, drawn by
Twemoji, is for choosing settings: no test set has any of them. Letters: B samples of a batch, N of a set, C concepts, P
pairs of concepts, K objects of a scene, R = K - 1 clauses of a caption, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, NumberedDataset, Rows
from descant.datamodules.corpora.base import ImageViews, flatten_alpha, run_ledger
from descant.datamodules.corpora.emoji_pack import DEVELOPMENT_VENDOR, PACK, SEALED_VENDOR, VENDORS, Pack
from descant.datamodules.corpora.scene_world import CONCEPTS, SIZES, STEPS, TRIPLES, Graph, Scene, World
from descant.datamodules.names import require_known
from descant.datamodules.sampling.resumable_sampler import Slot
from descant.modules.core.batch import NEGATIVE
from descant.modules.core.rng import mix_N, salt, uniform_NK
from descant.modules.tokenizers.text import Tokenizer, WordTokenizer
from descant.modules.transforms.image import Augment

HELD_OUT_VENDOR = "fluent"
#: Where each split of the pairs of concepts ends.
SPLITS = {"test": 0.2, "val": 0.3, "train": 1.0}
#: Set -> the split of its pairs, the vendor (None: those of training), and the splits whose pairs further objects of a
#: scene may form.
SETS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "train": ("train", None, ("train",)),
    "val": ("val", DEVELOPMENT_VENDOR, ("train", "val")),
    "vendor": ("train", HELD_OUT_VENDOR, ("train",)),
    "pairs": ("test", None, ("train", "test")),
    "both": ("test", HELD_OUT_VENDOR, ("train", "test")),
}
#: Sets whose scenes the lock-box replaces.
TESTS = ("vendor", "pairs", "both")


class SceneSet(NumberedDataset):
    """One row for each relation between the concepts of a pair, in both orders.

    Everything else about a scene (places, sizes, vendors, further objects) is sampled. The seed of the visit decides in
    training, the id of the scene in evaluation, so every run evaluates the same scenes.

    Args:
        data: module with the world and its splits.
        name: one of ``SETS``.
        scenes: number of scenes, chosen by a hash of their ids; all by default.
        random: whether this is a training set, sampled anew at each visit.
        exchanged: exchange heads and tails of the triples: a control of the benefit of triples.
    """

    def __init__(
        self, data: Scenes, name: str, scenes: int | None = None, random: bool = False, exchanged: bool = False
    ) -> None:
        super().__init__(data.seed, data.drop if random else None)
        self.world, self.random, self.exchanged = data.world, random, exchanged
        self.fact_N3, self.id_N = data.facts(name)
        sealed = data.sealed and name in TESTS
        self.stream = "scene/sealed" if sealed else "scene"
        if scenes is not None:
            order = np.argsort(mix_N(self.id_N, "scenes/chosen"))
            # the lock-box takes the other end: it has no scene of the open test set, if there are enough
            chosen = np.sort(order[-scenes:] if sealed else order[:scenes])
            self.fact_N3, self.id_N = self.fact_N3[chosen], self.id_N[chosen]
        _, vendor, beside = SETS[name]
        self.vendors = np.array([VENDORS.index(v) for v in ([vendor] if vendor else data.vendors)])
        drawn_C = data.drawn_concepts(vendor)
        self.together_CC = data.pairs_of(*beside) & drawn_C & drawn_C[:, None]  # which concepts may be in one scene

    def draws(self, slots: Sequence[Slot]) -> np.ndarray:
        if self.random:
            return super().draws(slots)
        return mix_N(self.id_N[[slot.sample for slot in slots]], self.stream)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        all_N = torch.ones(len(index_N), dtype=torch.bool)
        symmetric_N = torch.from_numpy(self.world.symmetric_R[self.fact_N3[index_N, 1]])
        return {"image": all_N, "text": all_N.clone(), "text" + NEGATIVE: ~symmetric_N}

    def scene(self, index_B: np.ndarray, draw_B: np.ndarray) -> Scene:
        """Sample objects and captions of some rows."""
        world, K = self.world, self.world.objects

        def u_BK(what: str) -> np.ndarray:
            return uniform_NK(draw_B, [f"scene/{what}{k}" for k in range(K)]).numpy().astype(np.float64)

        first_B, relation_B, second_B = self.fact_N3[index_B].T
        concept_BK = self._concepts(np.stack([first_B, second_B], axis=1), u_BK("concept"))
        vendor_BK = self.vendors[_floor(u_BK("vendor"), len(self.vendors))]
        # a layout with the relation of the first two; then a relation that holds from each other object to the next
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
        differ_B = large_BK[:, 0] != large_BK[:, 1]  # exchanging equal sizes would give the same caption
        sizes_B = (u_BK("swap")[:, 0] < 0.5) & differ_B
        return Scene(concept_BK, vendor_BK, cell_BK, large_BK, pixels_BK, top_BK, left_BK, graph, sizes_B)

    def _concepts(self, pair_B2: np.ndarray, u_BK: np.ndarray) -> np.ndarray:
        """Return the pair, and for each further object a concept that may be with all before it."""
        chosen = [pair_B2[:, 0], pair_B2[:, 1]]
        for k in range(2, self.world.objects):
            free_BC = np.logical_and.reduce([self.together_CC[c_B] for c_B in chosen])
            if not free_BC.any(axis=1).all():
                raise ValueError(f"objects {self.world.objects}: some {k} concepts share no other; fewer objects do")
            chosen.append(_pick(free_BC, u_BK[:, k]))
        return np.stack(chosen, axis=1)

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        world, scene = self.world, self.scene(index_B, draw_B)
        negative = scene.graph.swap_objects(scene.sizes_B)
        inputs = {"image": world.canvas(scene)}
        for end, graph in (("", scene.graph), (NEGATIVE, negative)):
            inputs["text" + end] = world.tokens(graph)
            inputs["triples" + end] = world.triples(graph, self.exchanged)
        relation_B = np.where(scene.sizes_B, len(world.relations), scene.graph.relation_BR[:, 0])
        targets = {"relation": relation_B, "concept": scene.concept_BK, "cell": scene.cell_BK, "large": scene.large_BK}
        return Rows(inputs, {name: torch.from_numpy(x) for name, x in targets.items()}, world.key(scene.graph))


def _floor(u_B: np.ndarray, count_B: np.ndarray | int) -> np.ndarray:
    """Return a uniform whole number below ``count_B``, from a uniform number in 0..1."""
    return (u_B * count_B).astype(np.int64)


def _pick(free_BC: np.ndarray, u_B: np.ndarray) -> np.ndarray:
    """Choose uniformly among the places that are True in the last axis."""
    reach_BC = free_BC.cumsum(axis=-1)
    return (reach_BC > _floor(u_B, reach_BC[..., -1])[..., None]).argmax(axis=-1)


class Scenes(ImageViews):
    """Composed scenes as image-text pairs, each with a hard negative of its caption and the triples of both.

    Inputs: ``image``; ``text`` and ``text_neg``; ``triples`` and ``triples_neg``, token ids ``[B, 6, 3, 5]``. Targets:
    ``relation``, what the negative exchanges (a relation's number; the one after the last for sizes), and ``concept``,
    ``cell`` and ``large`` of each object. A negative has the same words but is false for the scene; a caption with a
    symmetric relation has no negative.

    Evaluation sets: "validate" has ``val`` (a tenth of the pairs, drawn by Twemoji; no other set has either); "test"
    has ``vendor`` (Fluent's drawings of training pairs), ``pairs`` (held-out pairs, training vendors) and ``both``.
    No concept is held out, only combinations.

    Args:
        batch_size: rows of one whole optimizer step.
        size: S, pixels of the canvas, which the grid divides.
        grid: cells per side.
        objects: K, objects of a scene; the caption states the relation from each to the next.
        concepts: English names of the emoji pack; 48 one-word names by default.
        relations: relations in the captions.
        sizes: whether objects are large or small; the caption states it for the first two.
        vendors: vendors of the training images.
        text: the tokenizer; one id per word by default.
        scenes: number of scenes in an evaluation set.
        exchanged: add a test set ``exchanged``, the scenes of ``both`` with heads and tails of all triples exchanged: a
            control on which a model that uses the triples is worse.
        augment: augmentation of training images, on the device.
        folder: folder of the pack.
        sealed: test on the lock-box instead of the test set: on EmojiOne's drawings instead of Fluent's, for pairs of
            which EmojiOne draws both concepts, and on other scenes of the held-out pairs. The held-out pairs, training
            and validation are unchanged. Only a claim at its effect stage reads it (``lockbox`` of the claim).
        kwargs: arguments of every data module.

    >>> batch = next(iter(Scenes(tiny=True, batch_size=8).train_dataloader()))
    >>> batch.inputs["image"].shape, batch.inputs["triples_neg"].shape, sorted(batch.present)
    (torch.Size([8, 4, 48, 48]), torch.Size([8, 6, 3, 5]), ['image', 'text', 'text_neg'])
    """

    def __init__(
        self,
        batch_size: int = 96,
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
        sealed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        self.grid, self.objects, self.sizes, self.sealed = grid, objects, sizes, sealed
        self.concepts = concepts or list(CONCEPTS[:: 4 if self.tiny else 1])
        self.relations = relations or ["left of", "right of", "above", "below"]
        trained = [v for v in VENDORS if v not in (DEVELOPMENT_VENDOR, HELD_OUT_VENDOR)]
        self.vendors = vendors or trained
        self.text, self.scenes, self.exchanged = text, 48 if self.tiny else scenes, exchanged
        self.folder = Path(folder) if folder else PACK
        require_known("relations", self.relations, tuple(STEPS))
        require_known("vendors", self.vendors, trained)
        if size % grid or not 8 <= size // grid <= 64:
            near = grid * min(max(round(size / grid), 8), 64)
            raise ValueError(f"grid {grid} cuts size {size} into no cells of 8 to 64 pixels; size {near} does")
        if not 2 <= objects <= grid**2 or objects - 1 + 2 * sizes > TRIPLES:
            most = min(grid**2, TRIPLES + 1 - 2 * sizes)
            raise ValueError(f"objects {objects}: 2 to {most} have room on the grid and in {TRIPLES} triples")
        self.set_views(size, augment or gentle(size))
        if self.augment.mirror > 0 or self.augment.rotate > 30:
            raise ValueError(
                f"augment.mirror {self.augment.mirror} and rotate {self.augment.rotate:g}: captions say left "
                "and right; mirror 0 and rotate of at most 30 keep them true"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "text", "text" + NEGATIVE)

    # concepts, words and splits --------------------------------------------------------------------------------------

    @cached_property
    def world(self) -> World:
        pack = Pack(self.folder, run_ledger(self.trainer))
        place = {row["names"]["en"]: i for i, row in reversed(list(enumerate(pack.rows)))}
        require_known("concepts", self.concepts, sorted(place))
        pack.keep([place[name] for name in self.concepts])
        if self.sealed:
            pack.unseal_vendor()
        for vendor in VENDORS:
            for name, row, good in zip(self.concepts, pack.rows, pack.drawings(vendor)[1], strict=True):
                if not good and not (self.sealed and row[vendor] is None):
                    raise ValueError(f"concepts: {vendor}'s drawing of {name!r} cannot be read; leave it out")
        return World(
            pack, self.concepts, self.relations, self.tokenizer, self.size, self.grid, self.objects, self.sizes
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self.text is not None:
            return self.text
        texts = ["the", "is", "and", *SIZES, *self.relations, *self.concepts]
        words = dict.fromkeys(word for text in texts for word in text.split())
        # <bos>, <eos>, at most nine words per clause, and "and" between
        return WordTokenizer(list(words), length=2 + 9 * (self.objects - 1) + self.objects - 2 + 2 * self.sizes)

    @property
    def classes(self) -> dict[str, list[str]]:
        return {"relation": [*self.relations, *(["sizes"] if self.sizes else [])]}

    @cached_property
    def pair_P2(self) -> np.ndarray:
        """Return all unordered pairs of concepts."""
        return np.stack(np.triu_indices(len(self.concepts), k=1), axis=1)

    @cached_property
    def split_P(self) -> np.ndarray:
        """Return the split of every pair: exact shares of the order by a hash of both names."""
        names = [sorted((self.concepts[a], self.concepts[b])) for a, b in self.pair_P2]
        order_P = np.argsort([salt(f"scenes/{a}/{b}") for a, b in names])
        splits, start = np.empty(len(names), dtype="<U5"), 0
        for split, end in SPLITS.items():
            stop = round(end * len(names))
            splits[order_P[start:stop]], start = split, stop
        return splits

    def drawn_concepts(self, vendor: str | None) -> np.ndarray:
        """Return bool ``[C]``: the concepts that a vendor draws; all, except for the lock-box's vendor."""
        return self.world.pack.drawings(vendor)[1] if vendor else np.ones(len(self.concepts), dtype=bool)

    def pairs_of(self, *splits: str) -> np.ndarray:
        """Return bool ``[C, C]``: the pairs of some splits."""
        together_CC = np.zeros((len(self.concepts), len(self.concepts)), dtype=bool)
        a_P, b_P = self.pair_P2[np.isin(self.split_P, splits)].T
        together_CC[a_P, b_P] = together_CC[b_P, a_P] = True
        return together_CC

    def facts(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ``[N, 3]`` of a set (first concept, relation, second), and ids of pair, relation, order and set."""
        split, vendor, _ = SETS[name]
        pairs = np.flatnonzero((self.split_P == split) & self.drawn_concepts(vendor)[self.pair_P2].all(axis=1))
        if not len(pairs) and self.sealed:
            raise ValueError(f"sealed: {SEALED_VENDOR} draws both concepts of no {split} pair; more concepts have some")
        facts = np.meshgrid(pairs, np.arange(len(self.relations)), np.arange(2), indexing="ij")
        pair_N, relation_N, turn_N = (x.ravel() for x in facts)
        first_N, second_N = self.pair_P2[pair_N, turn_N], self.pair_P2[pair_N, 1 - turn_N]
        id_N = ((pair_N * len(self.relations) + relation_N) * 2 + turn_N) * len(SETS) + list(SETS).index(name)
        return np.stack([first_N, relation_N, second_N], axis=1), id_N

    def training_set(self) -> SceneSet:
        return SceneSet(self, "train", random=True)

    def bank_set(self) -> SceneSet:
        return SceneSet(self, "train")

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        if stage == "validate":
            return {"val": SceneSet(self, "val", self.scenes)}
        sets: dict[str, BatchDataset] = {
            name: SceneSet(self, name, self.scenes) for name in ("vendor", "pairs", "both")
        }
        if self.exchanged:
            sets["exchanged"] = SceneSet(self, "both", self.scenes, exchanged=True)
        return sets

    # what evaluation reads -------------------------------------------------------------------------------------------

    def _evaluation_scene(self, index: int) -> Scene:
        """Return the scene of an id, as in evaluation."""
        rows = SceneSet(self, list(SETS)[index % len(SETS)])
        (row,) = np.flatnonzero(rows.id_N == index)
        return rows.scene(np.array([row]), rows.draws([Slot(0, int(row), True)]))

    def describe(self, index: int) -> str:
        return self.world.sentence(self._evaluation_scene(index).graph.rows()[0])

    def picture(self, index: int) -> Tensor:
        return flatten_alpha(self.world.canvas(self._evaluation_scene(index))[0])


def gentle(size: int) -> Augment:
    """Return the default augmentation: relations between places stay true.

    It has no random background: with one, a conv tower learned nothing on the validation set in two hundred steps.
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
