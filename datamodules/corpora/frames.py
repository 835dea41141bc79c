"""Frames: questions about stills, stacks of slices and clips, each frame an image token of the dialogue.

No single frame answers a question about a stack or a clip. Letters: B samples of a batch, F frames, N problems,
S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset
from descant.datamodules.corpora.emoji_pack import DEVELOPMENT_VENDOR, VENDORS
from descant.datamodules.corpora.volumes import Volumes
from descant.datamodules.names import require_known
from descant.datamodules.sampling.mixture_sampler import MixedOrder, Shares, require_temperature, temper_shares
from descant.datamodules.sampling.resumable_sampler import Order
from descant.datamodules.selection.selected import split_selection
from descant.datamodules.tasks.dialogues import SPLITS, in_split
from descant.datamodules.tasks.questions import Problems, Questions, QuestionSet
from descant.datamodules.tasks.rollout_buffer import RolledDialogues
from descant.modules.core.batch import Batch
from descant.modules.core.errors import require_value
from descant.modules.core.host import derive
from descant.modules.core.rng import mix_N, uniform_N

PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


class Source:
    """A source of frames: ``asks`` returns a question and its answer, ``shows`` uint8 RGBA ``[F, 4, S, S]``.

    The question is a function of the problem's key; ``visit`` is sampled anew at each visit of training.
    """

    frames: int = 1
    #: Replaces the source's own question: the concept's ``name``, or its ``group``.
    about: Literal["name", "group"] | None = None

    def prepare(self) -> None:
        """Fetch files, on one rank of a machine. Attributes set here are missing on other ranks."""

    def join(self, data: Frames) -> None:
        """Take options from the data module, in every process that reads frames."""

    def asks(self, data: Frames, concept: int, others: np.ndarray, key: int) -> tuple[str, str]:
        if self.about is None:
            return self.question(key)
        return Questions.wording(data, self.about, concept, 0, others, 0, key)

    def question(self, key: int) -> tuple[str, str]:
        raise NotImplementedError

    def shows(
        self, data: Frames, concept: int, others: np.ndarray, vendors: Sequence[int], key: int, visit: int
    ) -> Tensor:
        raise NotImplementedError


class Stills(Source):
    """One drawing, and a choice of four names or groups.

    Args:
        about: the question: the concept's ``name``, or its ``group``.
    """

    def __init__(self, about: Literal["name", "group"] = "name") -> None:
        self.about = about

    def shows(
        self, data: Frames, concept: int, others: np.ndarray, vendors: Sequence[int], key: int, visit: int
    ) -> Tensor:
        return data.drawing(_vendor_of_frame(vendors, visit, 0), concept)[None]


class Stacks(Source):
    """Slices of one concept by different vendors, except for one slice of another concept: which one?

    Args:
        frames: slices, 3 to 8.
        about: replaces that question as in Stills; then all slices show one concept.
    """

    def __init__(self, frames: int = 4, about: Literal["name", "group"] | None = None) -> None:
        require_value(3 <= frames <= len(PLACES), f"Stacks: frames {frames}: from 3 to {len(PLACES)}")
        self.frames, self.about = frames, about

    #: The question.
    text = "which slice is another thing?"

    def _odd(self, key: int) -> int:
        return int(_uniform(key, "frames/odd") * self.frames)

    def question(self, key: int) -> tuple[str, str]:
        return self.text, PLACES[self._odd(key)]

    def shows(
        self, data: Frames, concept: int, others: np.ndarray, vendors: Sequence[int], key: int, visit: int
    ) -> Tensor:
        odd = self._odd(key) if self.about is None else -1
        shown = [int(others[0]) if f == odd else concept for f in range(self.frames)]
        return torch.stack([data.drawing(_vendor_of_frame(vendors, visit, f), one) for f, one in enumerate(shown)])


class Slices(Stacks):
    """Axial slices of a real volume in order, except for one from another place: which one?

    Problems of a split are about the same region of the brain, so test problems show no training voxels.

    Args:
        volumes: source of crops, which have the size of the frames.
        frames: slices, 3 to 8.
    """

    text = "which slice is of another place?"

    def __init__(self, volumes: Volumes, frames: int = 4) -> None:
        super().__init__(frames)
        self.volumes = volumes

    def join(self, data: Frames) -> None:
        self.volumes.tiny = self.volumes.tiny or data.tiny
        if self.volumes.size != data.size:
            raise ValueError(f"volumes.size {self.volumes.size} is not the frames' size {data.size}")

    def prepare(self) -> None:
        self.volumes.prepare_data()

    def shows(
        self, data: Frames, concept: int, others: np.ndarray, vendors: Sequence[int], key: int, visit: int
    ) -> Tensor:
        region = next(name for name in SPLITS if in_split(np.array([key]), name))
        place_P = self.volumes.places["test" if data.unseen_C[concept] else region]
        crop_FSS, odd = self._crop(place_P, visit, "place"), self._odd(key)
        # take the most different of four candidates: at the rim of the head, slices are alike
        others_SS = [self._crop(place_P, visit, f"other{attempt}")[odd] for attempt in range(4)]
        crop_FSS[odd] = max(others_SS, key=lambda x_SS: float(np.abs(x_SS.astype(int) - crop_FSS[odd]).mean()))
        x = torch.full((self.frames, 4, data.size, data.size), 255, dtype=torch.uint8)
        x[:, :3] = torch.from_numpy(crop_FSS)[:, None]
        return x

    def _crop(self, place_P: np.ndarray, visit: int, what: str) -> np.ndarray:
        """Return uint8 ``[F, S, S]``: the slices of a random crop."""
        S = self.volumes.size
        a, b, c = self.volumes._place(int(place_P[int(_uniform(visit, f"frames/{what}") * len(place_P))]))
        levels = [c + f * (S - 1) // (self.frames - 1) for f in range(self.frames)]
        return np.stack([self.volumes.fields["t1"][0, a : a + S, b : b + S, level] for level in levels])


class Clips(Source):
    """A drawing of half the size that moves: which way?

    Args:
        frames: 2 to 64; more are slower.
        about: replaces that question as in Stills.
    """

    def __init__(self, frames: int = 8, about: Literal["name", "group"] | None = None) -> None:
        require_value(2 <= frames <= 64, f"Clips: frames {frames}: from 2 to 64")
        self.frames, self.about = frames, about

    def question(self, key: int) -> tuple[str, str]:
        return "which way does it move?", list(WAYS)[int(_uniform(key, "frames/way") * len(WAYS))]

    def shows(
        self, data: Frames, concept: int, others: np.ndarray, vendors: Sequence[int], key: int, visit: int
    ) -> Tensor:
        half, room = data.size // 2, data.size - data.size // 2
        drawing = data.drawing(_vendor_of_frame(vendors, visit, 0), concept, half)
        way = WAYS[self.question(key)[1]]
        aside = round(_uniform(visit, "frames/aside") * room)
        canvas = torch.zeros(self.frames, 4, data.size, data.size, dtype=torch.uint8)
        for f in range(self.frames):
            gone = round(f / (self.frames - 1) * room)
            top, left = (aside if step == 0 else gone if step > 0 else room - gone for step in way)
            canvas[f, :, top : top + half, left : left + half] = drawing
        return canvas


def _uniform(key: int, purpose: str) -> float:
    return float(uniform_N(np.array([key]), purpose)[0])


def _vendor_of_frame(vendors: Sequence[int], visit: int, frame: int) -> int:
    """Return the vendor of a frame."""
    return int(vendors[int(_uniform(visit, f"frames/vendor{frame}") * len(vendors))])


class FrameSet(QuestionSet):
    """Problems as frames and dialogues: ``<bos> <image> ... <image> question <answer> answer <eos>``."""

    data: Frames

    def __init__(self, data: Frames, *args: Any, **kwargs: Any) -> None:
        super().__init__(data, *args, **kwargs)
        data.join()

    def front(self, of: Any, question: str) -> list[int]:
        ids, frames = self.data.prompt_ids(question), self.data.sources[of[0]].frames
        at = ids.index(self.data.tokenizer.vocabulary)
        return [*ids[:at], *ids[at : at + 1] * frames, *ids[at + 1 :]]

    def _canvas(
        self, p: Problems, vendor_B: np.ndarray, other_B: np.ndarray, count_B: np.ndarray, visit_B: np.ndarray
    ) -> Tensor:
        """Draw frames, uint8 RGBA ``[B, F, 4, S, S]``, empty after the last frame."""
        data, other_B3 = self.data, self._others(p)
        x = torch.zeros(len(p), data.most, 4, data.size, data.size, dtype=torch.uint8)
        for b, (kind, concept, key, visit) in enumerate(zip(p.kind_N, p.concept_N, p.key_N, visit_B, strict=True)):
            source = data.sources[data.every[kind]]
            shown = source.shows(data, int(concept), other_B3[b], self.vendors.tolist(), int(key), int(visit))
            x[b, : len(shown)] = shown
        return x


class Frames(Questions):
    """Questions about emoji in stills, stacks and clips, with unequal numbers of problems.

    Evaluation sets are those of Questions, for each source: ``still-val``; ``still-problems``, ``still-vendor``,
    ``still-concept``, and so on. The callback WorstGroup reports the worst source.

    Args:
        sources: name -> source of frames; Stills, Stacks and Clips by default.
        train: name -> number of its training problems; all by default.
        alpha: a source's share of training is proportional to its problems ** alpha; to their number by default.
        times: with alpha, the most times that problems of a small source are seen while the others' are seen once.
        sham: ``permute`` for the control of alpha: it permutes which problems are the frequent ones.
        kwargs: arguments of Questions, whose kinds are the sources here.

    >>> data = Frames(tiny=True, batch_size=8, length=64)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch.inputs["image"].shape, sorted(set((batch.inputs["text"] == data.image_token).sum(dim=1).tolist()))
    (torch.Size([8, 8, 4, 48, 48]), [1, 4, 8])
    """

    def __init__(
        self,
        sources: dict[str, Source] | None = None,
        train: dict[str, int] | None = None,
        alpha: float | None = None,
        times: float | None = None,
        sham: Literal["permute"] | None = None,
        **kwargs: Any,
    ) -> None:
        self.sources = dict(sources or {"still": Stills(), "stack": Stacks(), "clip": Clips()})
        self.every = tuple(self.sources)
        super().__init__(**kwargs)
        require_known("train", list(train or {}), self.every)
        for name, most in (train or {}).items():
            require_value(most >= 1, f"train: {name} {most}: at least 1; leave a source out by kinds")
        require_temperature(alpha, times, "sources")
        self.train, self.alpha, self.times, self.sham = train or {}, alpha, times, sham
        for kind in self.kinds:
            if self.sealed and isinstance(self.sources[kind], Slices):
                raise ValueError(f"sealed: no lock-box has the brain that {kind} shows; leave it out by kinds")
        self.most = max(self.sources[kind].frames for kind in self.kinds)

    @property
    def images(self) -> int:
        return self.most

    def prepare_data(self) -> None:
        super().prepare_data()
        self.join()
        for kind in self.kinds:
            self.sources[kind].prepare()

    def join(self) -> None:
        """Hand the options of this data module to all sources, on every rank."""
        for kind in self.kinds:
            self.sources[kind].join(self)

    def wording(
        self, kind: str, concept: int, vendor: int, others: np.ndarray, count: int, key: int
    ) -> tuple[str, str]:
        return self.sources[kind].asks(self, concept, others, key)

    def training_set(self) -> QuestionSet:
        data = self._set("train", False, self.vendors, of=FrameSet, random=True)
        p, selected = data.problems, []
        for kind in self.kinds:  # source after source, as the order counts them
            rows_N = np.flatnonzero(p.kind_N == self.every.index(kind))
            order_N = mix_N(p.key_N[rows_N], "frames/train").argsort(kind="stable")
            selected.append(rows_N[order_N][: self.train.get(kind, len(rows_N))])
        selected_N = np.concatenate(selected)
        if self.sham == "permute":
            selected_N = selected_N[mix_N(p.key_N[selected_N], "frames/sham").argsort(kind="stable")]
        data.problems = p.where(selected_N)
        return data

    def bank_set(self) -> QuestionSet:
        return self._set("train", False, self.vendors, of=FrameSet)

    def sizes(self, problems: Problems) -> list[int]:
        return [int((problems.kind_N == self.every.index(kind)).sum()) for kind in self.kinds]

    def order(self, data: BatchDataset, **cut: int) -> Order:
        whole, index_S = split_selection(data)
        if self.alpha is None or not isinstance(whole, FrameSet):
            return super().order(data, **cut)
        sizes = self.sizes(whole.problems.where(index_S))
        if 0 in sizes:
            raise ValueError(f"{self.kinds[sizes.index(0)]}: no training sample; leave it out of kinds")
        weights = temper_shares(sizes, self.alpha, self.times)
        return MixedOrder(sizes, self.kinds, weights, sum(sizes), self.batch_size, self.seed, False, None, **cut)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        sets: dict[str, BatchDataset] = {}
        for kind in self.kinds:
            asks: dict[str, Any] = {"of": FrameSet, "kinds": [kind]}
            if stage == "validate":
                sets[f"{kind}-val"] = self._set("val", False, [DEVELOPMENT_VENDOR], **asks)
            else:
                sets[f"{kind}-problems"] = self._set("test", False, self.vendors, **asks)
                sets[f"{kind}-vendor"] = self._set("test", False, [VENDORS[3]], **asks)
                sets[f"{kind}-concept"] = self._set(None, True, self.vendors, **asks)
        return sets

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment all frames of a sample alike."""
        B, F = batch.inputs["image"].shape[:2]
        batch.inputs["image"], draw_B = batch.inputs["image"].flatten(0, 1), batch.rng_seed
        batch.rng_seed = derive(lambda x_B: x_B.repeat_interleave(F), draw_B)
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        batch.inputs["image"], batch.rng_seed = batch.inputs["image"].unflatten(0, (B, F)), draw_B
        return batch


class FrameRollouts(RolledDialogues, Frames):
    """Rollouts of questions about frames: the model's own answers, with the source shares of Frames.

    An epoch is one pass over the answers; arguments and errors are those of RolledDialogues and Frames.
    """

    def asked_set(self, problems: Problems) -> FrameSet:
        numbers = [VENDORS.index(v) for v in self.vendors]
        return FrameSet(self, problems, numbers, np.flatnonzero(~self.unseen_C))

    def fresh(self, round: int, again: int = 0) -> Problems:
        if self.alpha is None:
            return cast(Problems, super().fresh(round, again))
        problems: Problems = self.training_problems.problems
        sizes = self.sizes(problems)
        shares = Shares(temper_shares(sizes, self.alpha, self.times))
        tries = round * 64 + again  # at most 64 tries a round
        low, high = shares.at(tries * self.items), shares.at((tries + 1) * self.items)
        taken = []
        for size, first, start, stop in zip(sizes, np.cumsum([0, *sizes]), low, high, strict=False):
            rows = np.arange(first, first + size)  # by position, which the sham permutes
            for number in range(start // size, -(-stop // size)):  # passes over the source, each in another order
                order = mix_N(problems.key_N[rows], "pool", self.seed, number).argsort(kind="stable")
                taken.append(rows[order[max(start - number * size, 0) : stop - number * size]])
        return problems.where(np.concatenate(taken))
