"""Several corpora as one: every step takes from each what its weight says, and each is walked in its own order.

Letters: B samples of a batch, R of them of one part.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule
from descant.datamodules.changes import Corpus
from descant.datamodules.order import BlockShuffle, Order, Slot, Window
from descant.datamodules.shuffle import Permutation
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix, mix_N
from descant.modules.tokenizers.text import Tokenizer

#: A sample's id in a mixture is ``number of its part << _BITS | its id there``.
_BITS = 48
#: What two parts must turn into the same token ids if they are to share a text tower.
_PROBE = "Two red foxes, 10 o'clock"


class Shares:
    """How many of the first ``n`` of a sequence belong to each part: whole numbers, a function of ``n`` alone.

    The parts are the leaves of a Huffman tree of the weights, and each node hands its ``n`` to its two children:

        left(n) = floor(n * w_left / (w_left + w_right) + 1/2),    right(n) = n - left(n)

    So the shares add up to ``n``, none of them falls as ``n`` grows, and any ``n`` costs the same: a resumed run has
    nothing to replay. A share is off ``n * weight`` by less than 1.5 for up to five parts, and by less than 1.7
    (half the sum of the reciprocal Fibonacci numbers) for any number of them.

    Args:
        weights: at least one, all positive; only their ratios count, and these are exact.

    >>> shares = Shares([Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)])
    >>> shares.at(4), shares.at(10), shares.at(20)
    ([2, 1, 1], [5, 3, 2], [10, 6, 4])
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        whole = math.lcm(*(weight.denominator for weight in weights))
        self.parts = len(weights)
        # (weight, number): a leaf's number is its part's; inner nodes are numbered on, so a child stands before
        heap = [(int(weight * whole), number) for number, weight in enumerate(weights)]
        heapq.heapify(heap)
        nodes: list[tuple[int, int, int, int, int]] = []
        while len(heap) > 1:
            (low, right), (high, left) = heapq.heappop(heap), heapq.heappop(heap)
            node = self.parts + len(nodes)
            nodes.append((node, left, right, high, low + high))
            heapq.heappush(heap, (low + high, node))
        self.nodes = nodes[::-1]  # from the root down

    def at(self, n: int) -> list[int]:
        """The share of each part in the first ``n``."""
        count = [0] * (2 * self.parts - 1)
        count[-1] = n
        for node, left, right, part, whole in self.nodes:
            count[left] = (2 * count[node] * part + whole) // (2 * whole)
            count[right] = count[node] - count[left]
        return count[: self.parts]


class MixedOrder(Order):
    """The order of a mixture: a pure function of (seed, epoch, position), as :class:`Order` is of one corpus.

    Each part walks permutations of its own, one a pass; ``Shares`` says how far each has walked at any position, over
    epochs: an epoch goes on where the one before it ended. A slot's ``sample`` counts through all parts, and its
    ``epoch`` is the pass of its part, so (epoch, sample) is one visit, and what is random about it is drawn anew.

    Args:
        sizes: samples of each part.
        names: of the parts; a part's permutations depend on its name, not on its neighbours.
        weights: of the parts, all positive.
        samples: of an epoch; of homogeneous batches, rounded up to whole batches.
        homogeneous: each batch from one part. The weights then count batches, and a pass is cut into batches of nearly
            equal size, as Order cuts an epoch, so a batch never holds the end of a pass and the beginning of the next.
        blocked: part -> the order of its passes, where it is read a block at a time.
        batch_size, seed, cut: as of Order.

    >>> order = MixedOrder([2, 6], ["a", "b"], [Fraction(1), Fraction(3)], samples=8, batch_size=4, seed=0)
    >>> [sorted(slot.sample for slot in window.step) for window in order]
    [[1, 2, 3, 5], [0, 4, 6, 7]]
    """

    def __init__(
        self,
        sizes: Sequence[int],
        names: Sequence[str],
        weights: Sequence[Fraction],
        samples: int,
        batch_size: int,
        seed: int,
        homogeneous: bool = False,
        blocked: Mapping[int, BlockShuffle] | None = None,
        **cut: int,
    ) -> None:
        super().__init__(samples, batch_size, seed, **cut)  # type: ignore[arg-type]  # cut holds no shuffle
        self.sizes, self.names, self.homogeneous = sizes, names, homogeneous
        self.shares = Shares(weights)
        self.offsets = [sum(sizes[:part]) for part in range(len(sizes))]
        self.blocked = blocked or {}
        self._walks: dict[int, tuple[int, Permutation | Tensor]] = {}

    @property
    def facts(self) -> dict[str, int | bool | str]:
        found = super().facts
        if self.blocked:
            found["order"] = f"{found['order']}, {', '.join(self.names[part] for part in self.blocked)} by blocks"
        return found

    def __iter__(self) -> Iterator[Window]:
        epoch, real = self.epoch, self._one_part if self.homogeneous else self._all_parts
        for position in range(self.first, len(self)):
            batch, micro = divmod(position, self.accumulate)
            yield self.window(real(epoch, batch), micro)

    def _all_parts(self, epoch: int, batch: int) -> list[Slot]:
        """The samples of a global batch, part by part."""
        bounds = (epoch * self.n + self.n * b // self.global_batches for b in (batch, batch + 1))
        walked, goal = map(self.shares.at, bounds)
        return [s for part, (a, b) in enumerate(zip(walked, goal, strict=True)) for s in self._walk(part, a, b)]

    def _one_part(self, epoch: int, batch: int) -> list[Slot]:
        number = epoch * self.global_batches + batch
        walked, goal = self.shares.at(number), self.shares.at(number + 1)
        part = next(part for part in range(len(goal)) if goal[part] > walked[part])
        size, batches = self.sizes[part], -(-self.sizes[part] // self.batch_size)
        turn, piece = divmod(walked[part], batches)
        low, high = (turn * size + size * k // batches for k in (piece, piece + 1))
        return self._walk(part, low, high)

    def _walk(self, part: int, low: int, high: int) -> list[Slot]:
        """Steps ``low`` to ``high`` of a part's walk through its permutations."""
        size, slots = self.sizes[part], []
        while low < high:
            turn, start = divmod(low, size)
            stop = min(size, start + high - low)
            samples = self._permutation(part, turn)[start:stop] + self.offsets[part]
            slots += [Slot(turn, sample, True) for sample in samples.tolist()]
            low += stop - start
        return slots

    def _permutation(self, part: int, turn: int) -> Permutation | Tensor:
        if self._walks.get(part, (-1,))[0] != turn:
            if part in self.blocked:
                self._walks[part] = turn, self.blocked[part].permutation(turn)
            else:
                seed = mix(self.seed, "order", self.names[part], turn)
                self._walks[part] = turn, Permutation(self.sizes[part], seed)
        return self._walks[part][1]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Name -> shape and dtype of one sample, of a part's inputs and of its targets, and which modalities it has."""

    inputs: dict[str, tuple[torch.Size, torch.dtype]]
    targets: dict[str, tuple[torch.Size, torch.dtype]]
    modalities: tuple[str, ...]

    @staticmethod
    def of(batch: Batch) -> Layout:
        inputs, targets = ({k: (x.shape[1:], x.dtype) for k, x in d.items()} for d in (batch.inputs, batch.targets))
        return Layout(inputs, targets, batch.modalities)


class MixtureSet(BatchDataset):
    """Some parts' data sets as one; sample i counts through them in their order.

    What a part lacks is absent in its rows: zeros in the inputs, -1 (nan) in the targets. Inputs that are transformed
    on the device later may differ in shape here; they stand in the corner of a tensor that is large enough for all.

    Args:
        members: number of a part -> its data set.
        keys: number of a part -> salt of its content keys; equal salts share keys.
        layouts: of all parts that the batch speaks for, by name.
        seed: of the mixture.
    """

    def __init__(
        self,
        members: Mapping[int, BatchDataset],
        keys: Mapping[int, str],
        layouts: Mapping[str, Layout],
        seed: int,
    ) -> None:
        super().__init__(seed)
        self.members, self.keys = dict(members), dict(keys)
        self.inputs, self.targets = _joint(layouts, "inputs"), _joint(layouts, "targets")
        self.modalities = tuple(dict.fromkeys(m for layout in layouts.values() for m in layout.modalities))
        sizes = [len(data) for data in self.members.values()]
        self.first = dict(zip(self.members, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self.size = sum(sizes)

    def __len__(self) -> int:
        return self.size

    def _by_part(self, index_N: np.ndarray) -> Iterator[tuple[int, BatchDataset, np.ndarray, np.ndarray]]:
        """Number of a part, its data set, which rows are its own, and their indices there."""
        for number, data in self.members.items():
            local_N = index_N - self.first[number]
            mine_R = np.flatnonzero((local_N >= 0) & (local_N < len(data)))
            yield number, data, mine_R, local_N[mine_R]

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        present = {m: torch.zeros(len(index_N), dtype=torch.bool) for m in self.modalities}
        for _, data, mine_R, local_R in self._by_part(index_N):
            for m, mask_R in data.present(local_R).items():
                present[m][torch.from_numpy(mine_R)] = mask_R
        return present

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        found_B = np.zeros(len(index_B), dtype=np.int64)
        for number, data, mine_R, local_R in self._by_part(index_B):
            if len(mine_R):
                found_B[mine_R] = self._ids(torch.from_numpy(data.identity(local_R)), number).numpy()
        return found_B

    def _mine(self, slots: Sequence[Slot], number: int) -> tuple[list[int], list[Slot]]:
        """The rows of one part, and its own slots."""
        low = self.first[number]
        high = low + len(self.members[number])
        mine = [(row, slot) for row, slot in enumerate(slots) if low <= slot.sample < high]
        return [row for row, _ in mine], [Slot(slot.epoch, slot.sample - low, slot.real) for _, slot in mine]

    def __getitem__(self, window: Window) -> Batch:
        size, whole = len(window.slots), len(window.step)
        batch = Batch(
            inputs={name: torch.zeros(size, *shape, dtype=kind) for name, (shape, kind) in self.inputs.items()},
            present={m: torch.zeros(size, dtype=torch.bool) for m in self.modalities},
            targets={
                name: torch.full((size, *shape), -1 if not kind.is_floating_point else math.nan, dtype=kind)
                for name, (shape, kind) in self.targets.items()
            },
            index=torch.zeros(size, dtype=torch.long),
            key=torch.zeros(size, dtype=torch.long),
            draw=torch.zeros(size, dtype=torch.long),
            step={m: torch.zeros(whole, dtype=torch.bool) for m in self.modalities},
        )
        for number, data in self.members.items():
            whole_R, step = self._mine(window.step, number)
            rows, slots = self._mine(window.slots, number)
            if slots:
                part = data[Window(slots, step)]
                part.index, part.key = self._ids(part.index, number), self._keys(part.key, number)
                part.source = torch.full_like(part.index, number)
                counts = part.step
                _place(batch, part, rows)
            else:
                counts = data.presence(step, data.draws(step)) if step else {}
            for m, mask_R in counts.items():
                batch.step[m][whole_R] = mask_R
        return batch

    def _ids(self, index_R: Tensor, number: int) -> Tensor:
        if len(index_R) and not 0 <= int(index_R.min()) <= int(index_R.max()) < 1 << _BITS:
            raise ValueError(f"part {number} of the mixture has sample ids beyond 0..2**{_BITS}")
        return index_R + (number << _BITS)

    def _keys(self, key_R: Tensor, number: int) -> Tensor:
        return torch.from_numpy(mix_N(key_R, self.keys[number]))


class Mixture(DataModule):
    """Several data modules as one: batches that hold all of them, or one at a time.

        samples of a part after n steps = n * batch_size * weight / sum of weights, to the nearest one or two

    in any window of training, over epochs, ranks and workers: nothing is drawn by lot. A part is seen whole, in a new
    order each pass, before it starts again. ``batch.source`` tells a row's part; each part's own transforms are
    applied to its own rows. A modality that a part lacks is absent there. Evaluation sets are called ``part-set``.

    Args:
        parts: name -> a data module; its sizes of batches, workers and ``tiny`` are the mixture's.
        weights: name -> share of the samples (of homogeneous batches: of the batches). By default a part's share
            is its size, so that an epoch sees every sample of all parts once. 0: the part is evaluated only.
        alpha: in place of weights, shares go as size ** alpha (temperature sampling): 1 is by size, 0 gives all parts
            as much, 0.5 lies between (our reading of Fleming-VL, arXiv 2511.00916, and of multilingual training).
        times: with alpha, how often a small part is seen at most while as many samples go by as all have.
        samples: of an epoch; by default as many as the parts with a weight have together.
        batches: mixed, or homogeneous: each step's samples from one part.
        repeat: whether a part may start again within an epoch; if not, a part that is too small is refused.
        bank: the part that k-NN, probes and prompts are taken from; the first where not given.
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        num_workers: processes that read ahead; by default the most that a part asks for.
        drop: modality -> probability that a training sample is made absent, in all parts, beside their own.
        tiny: passed on to the parts.

    Raises:
        ValueError: for weights that make no sense, at once; for parts that disagree about a modality's shape, its
            token ids or a target's classes, when the data is first read.
    """

    def __init__(
        self,
        parts: dict[str, DataModule],
        weights: dict[str, float] | None = None,
        alpha: float | None = None,
        times: float | None = None,
        samples: int | None = None,
        batches: Literal["mixed", "homogeneous"] = "mixed",
        repeat: bool = True,
        bank: str | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int | None = None,
        drop: dict[str, float] | None = None,
        tiny: bool = False,
    ) -> None:
        if not parts:
            raise ValueError("parts: a mixture needs at least one")
        for name in parts:
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"parts: {name!r}: letters, digits and _ only, since it begins names of metrics")
        self.parts = dict(parts)
        super().__init__(batch_size, eval_batch_size, num_workers or 0, drop, tiny)
        self._workers = num_workers
        self.weights = _weights(weights, list(parts))
        if alpha is not None and weights is not None:
            raise ValueError("alpha: weights say already what each part's share is; give one of the two")
        require_temperature(alpha, times, "parts")
        self.alpha, self.times = alpha, times
        self.samples, self.batches, self.repeat = samples, batches, repeat
        self.bank = bank or next(iter(parts))
        if self.bank not in parts:
            raise ValueError(f"bank: no part {self.bank!r}; the parts are {', '.join(parts)}")
        if samples is not None and samples < batch_size:
            raise ValueError(f"samples {samples} of an epoch are less than one batch of {batch_size}")
        # of training's batches (True) and evaluation's: each part's as it is read, and what towers see of all
        self._layouts: dict[bool, dict[str, Layout]] = {}
        self._evaluated: dict[str, BatchDataset] = {}
        self._seen: dict[bool, dict[str, tuple[torch.Size, torch.dtype]]] = {}
        for part in self.parts.values():
            part.tiny = part.tiny or tiny
            for m in part.modalities:
                kept = (1 - part.drop.get(m, 0)) * (1 - self.drop.get(m, 0))
                if kept < 1:
                    part.drop = {**part.drop, m: 1 - kept}

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m for part in self.parts.values() for m in part.modalities))

    @property
    def workers(self) -> int:
        return max(part.workers for part in self.parts.values()) if self._workers is None else self._workers

    @property
    def codec(self) -> Tokenizer | None:
        return next((part.codec for part in self.parts.values() if part.codec is not None), None)

    # the hooks that parts have ---------------------------------------------------------------------------------

    @property
    def trainer(self) -> L.Trainer | None:
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        self._trainer = trainer
        for part in self.parts.values():
            part.trainer = trainer

    def prepare_data(self) -> None:
        for part in self.parts.values():
            part.prepare_data()

    def corpora(self) -> dict[str, Corpus]:
        return {f"{name}.{k}": corpus for name, part in self.parts.items() for k, corpus in part.known_corpora.items()}

    def setup(self, stage: str) -> None:
        for part in self.parts.values():
            part.setup(stage)

    def teardown(self, stage: str) -> None:
        for part in self.parts.values():
            part.teardown(stage)

    # the sets --------------------------------------------------------------------------------------------------

    def training_set(self) -> MixtureSet:
        sets = {}
        for name in self._trained:
            data = self.parts[name].training_set()
            if not data.by_position:
                raise ValueError(
                    f"part {name!r} is a stream, and a mixture reads by position: give it shards on disk, "
                    "or train on the stream alone"
                )
            sets[name] = data
        self._check(sets, training=True)
        return self._mixed(sets, training=True)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        sets = {name: part.evaluation_sets(stage) for name, part in self.parts.items()}
        self._evaluated = {name: next(iter(found.values())) for name, found in sets.items() if found}
        self._check(self._evaluated, training=False)
        return {
            f"{name}-{inner}": self._mixed({name: data}, training=False)
            for name, found in sets.items()
            for inner, data in found.items()
        }

    def bank_set(self) -> MixtureSet:
        data = self.parts[self.bank].bank_set()
        if self.bank not in self._layouts.get(False, {}):  # it may have nothing to be evaluated on
            self._check({**self._evaluated, self.bank: data}, training=False)
        return self._mixed({self.bank: data}, training=False)

    @property
    def _trained(self) -> list[str]:
        return [name for name in self.parts if self.weights is None or self.weights[name] > 0]

    def _mixed(self, sets: Mapping[str, BatchDataset], training: bool) -> MixtureSet:
        number = {name: k for k, name in enumerate(self.parts)}
        for name, data in sets.items():
            # two parts' samples of one number must not be augmented alike
            data.seed = mix(self.seed, "part", name)
        keys = {number[name]: self.parts[name].keys or f"part/{name}" for name in sets}
        members = {number[name]: data for name, data in sets.items()}
        return MixtureSet(members, keys, self._layouts[training], self.seed)

    def _check(self, sets: Mapping[str, BatchDataset], training: bool) -> None:
        """Read one sample of each part, and refuse parts that do not go together."""
        one = [Slot(0, 0, True)]
        batches = {name: data[Window(one, one)] for name, data in sets.items() if len(data)}
        self._layouts[training] = {name: Layout.of(batch) for name, batch in batches.items()}
        # what towers see: after the parts' own transforms
        after = {name: Layout.of(self.parts[name].on_after_batch_transfer(b, 0)) for name, b in batches.items()}
        for kind in ("inputs", "targets"):
            _agree(after, kind)
        for name, layout in after.items():
            for view in (view for view in layout.inputs if "@" in view):
                for other, theirs in after.items():
                    if view not in theirs.inputs and view.partition("@")[0] in theirs.inputs:
                        raise ValueError(f"part {name!r} has {view} and part {other!r} has not: give both the views")
        self._seen[training] = _joint(after, "inputs")
        _same_tokens({name: self.parts[name] for name in sets})
        _same_classes({name: self.parts[name] for name in sets}, after)

    def order(self, data: BatchDataset, **cut: int) -> MixedOrder:
        names, size = self._trained, self.batch_size
        assert isinstance(data, MixtureSet)
        sizes = [len(member) for member in data.members.values()]
        for name, rows in zip(names, sizes, strict=True):
            if rows == 0:
                raise ValueError(f"part {name!r} has no training sample; weight 0 leaves it out")
        alone = self.batches == "homogeneous"
        natural = [-(-rows // size) for rows in sizes] if alone else sizes
        weights = [Fraction(n) for n in natural] if self.weights is None else [self.weights[name] for name in names]
        if self.alpha is not None:
            weights = tempered(natural, self.alpha, self.times)
        samples = self.samples or (sum(natural) * size if alone else sum(sizes))
        if not self.repeat:
            asked, what = (-(-samples // size), "batches") if alone else (samples, "samples")
            _enough(names, natural, weights, asked, what)
        blocked = {}
        for part, (name, member) in enumerate(zip(names, data.members.values(), strict=True)):
            own = self.parts[name].order(member)
            if isinstance(own, BlockShuffle):
                seed = mix(self.seed, "order", name)
                blocked[part] = BlockShuffle(own.block_N.numpy(), own.together, own.batch_size, seed)
        return MixedOrder(sizes, names, weights, samples, size, self.seed, alone, blocked, **cut)

    # what evaluation asks --------------------------------------------------------------------------------------

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        return self.parts[self.bank].prompts(target)

    @property
    def warms(self) -> bool:
        return any(part.warms for part in self.parts.values())

    def sample_name(self, index: int) -> str:
        part, own = self._part(index)
        return part.sample_name(own)

    def describe(self, index: int) -> str:
        part, own = self._part(index)
        return part.describe(own)

    def picture(self, index: int) -> Tensor | None:
        part, own = self._part(index)
        return part.picture(own)

    def _part(self, index: int) -> tuple[DataModule, int]:
        return list(self.parts.values())[index >> _BITS], index & (1 << _BITS) - 1

    # each part's own transforms, on the device -----------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        training = self.trainer is not None and self.trainer.training
        training = training if training in self._seen else not training
        names = list(self.parts)
        seen, device = self._seen[training], batch.device
        rows: dict[int, list[int]] = {}
        for row, number in enumerate(batch.source.tolist()):
            rows.setdefault(number, []).append(row)
        inputs: dict[str, Tensor] = {}
        for number, mine in rows.items():
            rows_R = _span(mine)
            part = batch if len(rows) == 1 else batch.select(rows_R)
            layout = self._layouts[training][names[number]]
            part = dataclasses.replace(part, inputs=_cut(part.inputs, layout))
            part = self.parts[names[number]].on_after_batch_transfer(part, dataloader_idx)
            if len(rows) == 1:
                inputs = dict(part.inputs)
                break
            for name, x in part.inputs.items():
                if name not in inputs:
                    inputs[name] = x.new_zeros(len(batch), *x.shape[1:])
                inputs[name][rows_R] = x.to(inputs[name].dtype)
        for name, (shape, kind) in seen.items():
            if name not in inputs:
                inputs[name] = torch.zeros(len(batch), *shape, dtype=kind, device=device)
        batch.inputs = inputs
        return batch


# what it is made of --------------------------------------------------------------------------------------------


def _weights(given: Mapping[str, float] | None, parts: Sequence[str]) -> dict[str, Fraction] | None:
    """As the user wrote them: 0.1 is one tenth."""
    if given is None:
        return None
    for name, weight in given.items():
        if name not in parts:
            raise ValueError(f"weights: no part {name!r}; the parts are {', '.join(parts)}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights: {name} {weight} is no share of the samples; 0 leaves a part out of training")
    for name in parts:
        if name not in given:
            raise ValueError(f"weights: part {name!r} has none; 0 leaves it out of training")
    if not any(given.values()):
        raise ValueError(f"weights: all of {', '.join(parts)} are 0, so there is nothing to train on")
    return {name: Fraction(str(given[name])) for name in parts}


def require_temperature(alpha: float | None, times: float | None, what: str) -> None:
    """Raises ValueError for numbers that :func:`tempered` makes nothing of; ``what`` is drawn by them."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha:g}: from 0, all {what} alike, to 1, by their sizes; such as 0.5")
    if times is not None and (alpha is None or not times > 1):
        raise ValueError(f"times {times:g}: more than 1, and with an alpha; such as 4")


def tempered(sizes: Sequence[int], alpha: float, times: float | None = None) -> list[Fraction]:
    """Shares that go as ``size ** alpha``, none of them more than ``times`` its share by size; what that leaves goes to
    the others.

    >>> [float(share) for share in tempered([900, 100], alpha=0.5)], [float(x) for x in tempered([900, 100], 0.5, 2.0)]
    ([0.75, 0.25], [0.8, 0.2])
    """
    whole, wish = sum(sizes), [size**alpha for size in sizes]
    most = [math.inf if times is None else times * size / whole for size in sizes]
    capped: dict[int, float] = {}
    while True:
        left = (1 - sum(capped.values())) / sum(w for k, w in enumerate(wish) if k not in capped)
        over = [k for k, w in enumerate(wish) if k not in capped and w * left > most[k]]
        if not over:
            return [Fraction(round(1e6 * capped.get(k, w * left)) or 1, 10**6) for k, w in enumerate(wish)]
        capped |= {k: most[k] for k in over}


def _enough(names: Sequence[str], have: Sequence[int], weights: Sequence[Fraction], asked: int, what: str) -> None:
    whole = sum(weights)
    for name, there, weight in zip(names, have, weights, strict=True):
        share = math.ceil(asked * weight / whole)
        if share > there:
            raise ValueError(
                f"part {name!r} runs dry: an epoch asks {share:,} {what} of it and there are {there:,}; "
                "lower its weight or samples, or say repeat: true"
            )


def _joint(layouts: Mapping[str, Layout], kind: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> a shape that is large enough for all parts, and the dtype; ValueError where parts differ too much."""
    joint: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for part, layout in layouts.items():
        for name, (shape, dtype) in getattr(layout, kind).items():
            first, known = joint.setdefault(name, (shape, dtype))
            if len(first) != len(shape) or known != dtype:
                raise _differ(name, layouts, kind, part)
            joint[name] = torch.Size(map(max, first, shape)), dtype
    return joint


def _agree(layouts: Mapping[str, Layout], kind: str) -> None:
    first: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for part, layout in layouts.items():
        for name, found in getattr(layout, kind).items():
            if first.setdefault(name, found) != found:
                raise _differ(name, layouts, kind, part)


def _differ(name: str, layouts: Mapping[str, Layout], kind: str, part: str) -> ValueError:
    told = {k: getattr(layout, kind)[name] for k, layout in layouts.items() if name in getattr(layout, kind)}
    other = next(iter(told))
    (shape, dtype), (first, known) = told[part], told[other]
    left = f"{list(first)} {str(known).removeprefix('torch.')}"
    right = f"{list(shape)} {str(dtype).removeprefix('torch.')}"
    return ValueError(f"{name}: a sample is {left} in part {other!r} and {right} in part {part!r}; make them equal")


def _same_tokens(parts: Mapping[str, DataModule]) -> None:
    """Two parts that tokenize differently would teach one text tower two meanings of the same ids."""
    first: tuple[str, list[int]] | None = None
    for name, part in parts.items():
        codec = part.codec
        if codec is None:
            continue
        ids = codec.ids(_PROBE)
        if first is not None and ids != first[1]:
            raise ValueError(
                f"text: parts {first[0]!r} and {name!r} make other token ids of the same text; give them one codec"
            )
        first = first or (name, ids)


def _same_classes(parts: Mapping[str, DataModule], layouts: Mapping[str, Layout]) -> None:
    """A label means one class, whichever part it comes from; parts that name no classes are taken at their word."""
    for target in dict.fromkeys(target for layout in layouts.values() for target in layout.targets):
        names = [name for name, layout in layouts.items() if target in layout.targets]
        if len(names) == 1:
            continue
        named = {name: classes for name in names if (classes := _classes(parts[name], target)) is not None}
        first = next(iter(named), "")
        for name, classes in named.items():
            if classes != named[first]:
                raise ValueError(
                    f"target {target!r}: parts {first!r} and {name!r} number other classes; give both the same list"
                )


def _classes(part: DataModule, target: str) -> list[str] | None:
    try:
        return part.prompts(target)[1]
    except (NotImplementedError, ValueError):
        return None


def _span(rows: list[int]) -> slice | Tensor:
    """Rows as a slice where they stand together, as those of a part mostly do: that is a view, or one copy."""
    low, high = rows[0], rows[-1] + 1
    return slice(low, high) if high - low == len(rows) else torch.tensor(rows)


def _place(whole: Batch, part: Batch, rows: list[int]) -> None:
    """Write a part's rows into the batch."""
    every, rows_R = len(rows) == len(whole), _span(rows)
    for name, x in part.inputs.items():
        if every and x.shape == whole.inputs[name].shape:
            whole.inputs[name] = x  # all rows are this part's: nothing to copy
        else:
            corner: tuple[Any, ...] = (rows_R, *(slice(0, size) for size in x.shape[1:]))
            whole.inputs[name][corner] = x
    for name, x in part.targets.items():
        whole.targets[name][rows_R] = x
    for m, mask_R in part.present.items():
        whole.present[m][rows_R] = mask_R
    for name in ("index", "key", "source", "draw"):
        getattr(whole, name)[rows_R] = getattr(part, name)


def _cut(inputs: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A part's own inputs in its own shapes."""
    return {
        name: inputs[name][(slice(None), *(slice(0, size) for size in shape))]
        for name, (shape, _) in layout.inputs.items()
    }
