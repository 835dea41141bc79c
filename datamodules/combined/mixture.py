"""Mixtures of corpora: each step has samples of all parts by weight, or each batch is from one part.

Letters: B samples of a batch, R of them of one part.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, CompositeDataModule, DataModule
from descant.datamodules.changes import Corpus
from descant.datamodules.combined.mixture_set import BITS, Layout, MixtureSet, Spec, joint, row_index
from descant.datamodules.combined.source_balance import TransportBalance
from descant.datamodules.sampling.mixture_sampler import MixedOrder, require_temperature, temper_shares
from descant.datamodules.sampling.resumable_sampler import BlockShuffle, Slot, Window
from descant.modules.core.batch import Batch
from descant.modules.core.errors import require_value
from descant.modules.core.protocols import SeriesAxes, SeriesData
from descant.modules.core.rng import mix
from descant.modules.tokenizers.text import Tokenizer

#: Parts that share a text tower must have equal token ids for this text.
_PROBE = "Two red foxes, 10 o'clock"


class Mixture(CompositeDataModule):
    """Several data modules as one, in mixed batches or in batches of one part each.

        samples of a part after n steps = n * batch_size * weight / sum of weights, to the nearest one or two

    in any window of training, over epochs, ranks and workers: shares are exact, not random. Each pass over a part has
    all its samples once, in a new order. ``batch.source`` is a row's part; each part's transforms are applied to its
    rows. A modality that a part lacks is absent in its rows. Evaluation sets are named ``part-set``.

    Args:
        parts: name -> a data module; its batch sizes, workers and ``tiny`` are the mixture's.
        weights: name -> share of the samples (with homogeneous batches: of the batches). By default a part's share is
            its size, so that an epoch has every sample of all parts once. 0: the part is only evaluated.
        alpha: instead of weights, shares proportional to size ** alpha (temperature sampling): 1 is by size, 0 equal
            shares (our reading of Fleming-VL, arXiv 2511.00916, and of multilingual training).
        times: with alpha, the most times that a small part is seen while the mixture takes as many samples as all parts
            have.
        samples: samples per epoch; by default the sum over the parts with a weight.
        batches: mixed, or homogeneous: each step's samples from one part.
        repeat: whether a part may start again within an epoch; if not, a part that is too small is an error.
        balance: instead of weights, those computed from the distance of each part to a reference part.
        only: part -> the modalities that its rows have, also in evaluation, for tasks that use some modalities of a
            corpus, such as {names: [text], drawings: [image]}; all by default.
        bank: the part for k-NN, probes and prompts; the first by default.
        num_workers: processes that read ahead; by default the largest number among the parts.
        kwargs: arguments of every data module; ``drop`` adds to that of the parts, and ``tiny`` is passed on to them.
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
        balance: TransportBalance | None = None,
        bank: str | None = None,
        num_workers: int | None = None,
        only: dict[str, list[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        require_value(parts, "parts: a mixture needs at least one")
        for name in parts:
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"parts: {name!r}: letters, digits and _ only, since names of metrics begin with it")
        self.parts = dict(parts)
        super().__init__(num_workers=num_workers or 0, **kwargs)
        if self.selected is not None or self.selection is not None:
            key = "selection" if self.selected is None else "selected"
            raise ValueError(f"{key}: ids are of a part's samples: parts.{next(iter(parts), 'NAME')}.{key}")
        self._workers = num_workers
        self.weights = _weights(weights, list(parts))
        given = {"weights": weights, "alpha": alpha, "balance": balance}
        if sum(value is not None for value in given.values()) > 1:
            both = " and ".join(name for name, value in given.items() if value is not None)
            raise ValueError(f"{both}: each sets the shares of the parts; give one of them")
        require_temperature(alpha, times, "parts")
        self.alpha, self.times, self.balance = alpha, times, balance
        self.samples, self.batches, self.repeat = samples, batches, repeat
        self.only = _only(only or {}, self.parts)
        self.bank = bank or next(iter(parts))
        require_value(self.bank in parts, f"bank: no part {self.bank!r}; the parts are {', '.join(parts)}")
        if samples is not None and samples < self.batch_size:
            raise ValueError(f"samples {samples} of an epoch are less than one batch of {self.batch_size}")
        # training (True) and evaluation: layout of each part as read, and of all after the transforms
        self._layouts: dict[bool, dict[str, Layout]] = {}
        self._together: dict[bool, dict[int, int]] = {}  # number of a part -> the first with equal transforms
        self._evaluated: dict[str, BatchDataset] = {}
        self._after: dict[bool, dict[str, Spec]] = {}
        for name, part in self.parts.items():
            if getattr(part, "of_any_size", False):
                raise ValueError(f"parts.{name}: fields.image: parts of a mixture have images of one size: ImageField")
            part.tiny = part.tiny or self.tiny
            for m in part.modalities:
                remaining = (1 - part.drop.get(m, 0)) * (1 - self.drop.get(m, 0))
                if remaining < 1:
                    part.drop = {**part.drop, m: 1 - remaining}

    @property
    def inner(self) -> list[DataModule]:
        return list(self.parts.values())

    @property
    def workers(self) -> int:
        return max(part.workers for part in self.parts.values()) if self._workers is None else self._workers

    @property
    def tokenizer(self) -> Tokenizer | None:
        return next((part.tokenizer for part in self.parts.values() if part.tokenizer is not None), None)

    # the hooks of the parts ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self.balance is None or self.shares is None:
            return super().state_dict()
        return {**super().state_dict(), "shares": {name: str(share) for name, share in self.shares.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.balance is not None and "shares" in state_dict:  # of the run's beginning, whatever the table is now
            self.shares = {name: Fraction(share) for name, share in state_dict["shares"].items()}

    def corpora(self) -> dict[str, Corpus]:
        return {f"{name}.{k}": corpus for name, part in self.parts.items() for k, corpus in part.known_corpora.items()}

    # the sets --------------------------------------------------------------------------------------------------

    def training_set(self) -> MixtureSet:
        sets = {}
        for name in self._training_parts:
            data = self.parts[name].selected_set()
            if not data.by_position:
                raise ValueError(
                    f"part {name!r} is a stream, and a mixture reads by position: use shards on disk, "
                    "or train on the stream alone"
                )
            sets[name] = data
        self._check(sets, training=True)
        return self._mix_sets(sets, training=True)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        sets = {name: part.evaluation_sets(stage) for name, part in self.parts.items()}
        self._evaluated = {name: next(iter(inner.values())) for name, inner in sets.items() if inner}
        self._check(self._evaluated, training=False)
        return {
            f"{name}-{set_name}": self._mix_sets({name: data}, training=False)
            for name, inner in sets.items()
            for set_name, data in inner.items()
        }

    def bank_set(self) -> MixtureSet:
        data = self.parts[self.bank].bank_set()
        if self.bank not in self._layouts.get(False, {}):  # it may have no evaluation set
            self._check({**self._evaluated, self.bank: data}, training=False)
        return self._mix_sets({self.bank: data}, training=False)

    def plain_set(self) -> MixtureSet:
        sets = {name: part.plain_set() for name, part in self.parts.items()}  # also of parts that are not trained on
        self._check(sets, training=False)
        return self._mix_sets(sets, training=False)

    @cached_property
    def shares(self) -> dict[str, Fraction] | None:
        """Return the share of each part; None if its size decides."""
        return self.weights if self.balance is None else _weights(self.balance.weights(list(self.parts)), [*self.parts])

    @property
    def _training_parts(self) -> list[str]:
        return [name for name in self.parts if self.shares is None or self.shares[name] > 0]

    def _mix_sets(self, sets: Mapping[str, BatchDataset], training: bool) -> MixtureSet:
        number = {name: k for k, name in enumerate(self.parts)}
        for name, data in sets.items():
            # samples of equal number in two parts must be augmented differently
            data.seed = mix(self.seed, "part", name)
            if hasattr(data, "numbered"):  # a dialogue's key has more bits than an id here
                data.numbered = True
        keys = {number[name]: self.parts[name].keys or f"part/{name}" for name in sets}
        members = {number[name]: data for name, data in sets.items()}
        only = {number[name]: modalities for name, modalities in self.only.items() if name in sets}
        return MixtureSet(members, keys, self._layouts[training], self.seed, only)

    def _check(self, sets: Mapping[str, BatchDataset], training: bool) -> None:
        """Read one sample of each part. Raise ValueError for parts that do not fit together."""
        one = [Slot(0, 0, True)]
        batches = {name: data[Window(one, one)] for name, data in sets.items() if len(data)}
        self._layouts[training] = {name: Layout.of(batch) for name, batch in batches.items()}
        self._together[training] = self._equal_transforms(self._layouts[training])
        # the input of towers: after the parts' own transforms
        after = {name: Layout.of(self.parts[name].on_after_batch_transfer(b, 0)) for name, b in batches.items()}
        self._after[training] = joint(after, "inputs", equal=True)
        joint(after, "targets", equal=True)
        for name, layout in after.items():
            for view in (view for view in layout.inputs if "@" in view):
                for other, that in after.items():
                    if view not in that.inputs and view.partition("@")[0] in that.inputs:
                        raise ValueError(f"part {name!r} has {view} and part {other!r} has not: set views of both")
        _same_tokens({name: self.parts[name] for name in sets})
        _same_classes({name: self.parts[name] for name in sets}, after)

    def _equal_transforms(self, layouts: Mapping[str, Layout]) -> dict[int, int]:
        """Map each part's number to that of the first part with equal transforms and layout.

        The rows of such parts are transformed together. Each call has a fixed cost, which a stream of many tasks would
        pay once per task and step.
        """
        numbers, first = {name: k for k, name in enumerate(self.parts)}, list[tuple[str, str, Layout]]()
        together = {}
        for name, layout in layouts.items():
            key = self.parts[name].transform_key
            found = next((known for known, k, one in first if key == k and layout == one), name)
            if found == name and key is not None:
                first.append((name, key, layout))
            together[numbers[name]] = numbers[found]
        return together

    def order(self, data: BatchDataset, **cut: int) -> MixedOrder:
        names, size = self._training_parts, self.batch_size
        assert isinstance(data, MixtureSet)
        sizes = [len(member) for member in data.members.values()]
        for name, rows in zip(names, sizes, strict=True):
            if rows == 0:
                raise ValueError(f"part {name!r} has no training sample; weight 0 leaves it out")
        homogeneous = self.batches == "homogeneous"
        natural = [-(-rows // size) for rows in sizes] if homogeneous else sizes
        weights = [Fraction(n) for n in natural] if self.shares is None else [self.shares[name] for name in names]
        if self.alpha is not None:
            weights = temper_shares(natural, self.alpha, self.times)
        samples = self.samples or (sum(natural) * size if homogeneous else sum(sizes))
        if not self.repeat:
            needed, what = (-(-samples // size), "batches") if homogeneous else (samples, "samples")
            _enough(names, natural, weights, needed, what)
        blocked = {}
        for part, (name, member) in enumerate(zip(names, data.members.values(), strict=True)):
            order = self.parts[name].order(member)
            if isinstance(order, BlockShuffle):
                seed = mix(self.seed, "order", name)
                blocked[part] = BlockShuffle(order.block_N.numpy(), order.together, order.batch_size, seed)
        return MixedOrder(sizes, names, weights, samples, size, self.seed, homogeneous, blocked, **cut)

    # what evaluation reads -------------------------------------------------------------------------------------

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        return self.parts[self.bank].prompts(target)

    @property
    def warms(self) -> bool:
        return any(part.warms for part in self.parts.values())

    def sample_name(self, index: int) -> str:
        part, local = self._part(index)
        return part.sample_name(local)

    def describe(self, index: int) -> str:
        part, local = self._part(index)
        return part.describe(local)

    def picture(self, index: int) -> Tensor | None:
        part, local = self._part(index)
        return part.picture(local)

    def series_axes(self, index: int, modality: str) -> SeriesAxes | None:
        part, local = self._part(index)
        return part.series_axes(local, modality) if isinstance(part, SeriesData) else None

    def _part(self, index: int) -> tuple[DataModule, int]:
        return list(self.parts.values())[index >> BITS], index & (1 << BITS) - 1

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        training = self.training if self.training in self._after else not self.training
        names, together = list(self.parts), self._together[training]
        rows: dict[int, list[int]] = {}
        for row, number in enumerate(batch.source.tolist()):
            rows.setdefault(together.get(number, number), []).append(row)
        inputs: dict[str, Tensor] = {}
        for number, row_list in rows.items():
            rows_R = row_index(row_list)
            part = batch if len(rows) == 1 else batch.select(rows_R)
            layout = self._layouts[training][names[number]]
            part = dataclasses.replace(part, inputs=_cut_inputs(part.inputs, layout))
            part = self.parts[names[number]].on_after_batch_transfer(part, dataloader_idx)
            if len(rows) == 1:
                inputs = dict(part.inputs)
                break
            for name, x in part.inputs.items():
                if name not in inputs:
                    inputs[name] = x.new_zeros(len(batch), *x.shape[1:])
                inputs[name][rows_R] = x.to(inputs[name].dtype)
        for name, (shape, dtype) in self._after[training].items():
            if name not in inputs:
                inputs[name] = torch.zeros(len(batch), *shape, dtype=dtype, device=batch.device)
        batch.inputs = inputs
        return batch


# checks and helpers --------------------------------------------------------------------------------------------


def _weights(given: Mapping[str, float] | None, parts: Sequence[str]) -> dict[str, Fraction] | None:
    """Convert weights to exact fractions of the decimal numbers: 0.1 is one tenth."""
    if given is None:
        return None
    for name, weight in given.items():
        if name not in parts:
            raise ValueError(f"weights: no part {name!r}; the parts are {', '.join(parts)}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights: {name} {weight} is no share of the samples; it is 0 (not trained on) or more")
    for name in parts:
        if name not in given:
            raise ValueError(f"weights: part {name!r} has none; 0 trains on none of it")
    if not any(given.values()):
        raise ValueError(f"weights: all of {', '.join(parts)} are 0, so there is nothing to train on")
    return {name: Fraction(str(given[name])) for name in parts}


def _only(given: Mapping[str, list[str]], parts: Mapping[str, DataModule]) -> dict[str, list[str]]:
    for name, modalities in given.items():
        if name not in parts:
            raise ValueError(f"only: no part {name!r}; the parts are {', '.join(parts)}")
        for m in modalities or ["none"]:
            if m not in parts[name].modalities:
                raise ValueError(f"only: {name}: no modality {m!r}; it has {', '.join(parts[name].modalities)}")
    return {name: list(modalities) for name, modalities in given.items()}


def _enough(names: Sequence[str], sizes: Sequence[int], weights: Sequence[Fraction], needed: int, what: str) -> None:
    whole = sum(weights)
    for name, size, weight in zip(names, sizes, weights, strict=True):
        share = math.ceil(needed * weight / whole)
        if share > size:
            raise ValueError(
                f"part {name!r} is too small: an epoch needs {share:,} {what} of it and there are {size:,}; "
                "lower its weight or samples, or set repeat: true"
            )


def _same_tokens(parts: Mapping[str, DataModule]) -> None:
    """Raise ValueError for parts with different tokenizers: one text tower would get two meanings of an id."""
    first: tuple[str, list[int]] | None = None
    for name, part in parts.items():
        tokenizer = part.tokenizer
        if tokenizer is None:
            continue
        ids = tokenizer.ids(_PROBE)
        if first is not None and ids != first[1]:
            raise ValueError(
                f"text: parts {first[0]!r} and {name!r} have different token ids of one text; give them one tokenizer"
            )
        first = first or (name, ids)


def _same_classes(parts: Mapping[str, DataModule], layouts: Mapping[str, Layout]) -> None:
    """Raise ValueError for parts that number classes differently; parts without class names are not compared."""
    for target in dict.fromkeys(target for layout in layouts.values() for target in layout.targets):
        names = [name for name, layout in layouts.items() if target in layout.targets]
        if len(names) == 1:
            continue
        named = {name: classes for name in names if (classes := parts[name].class_names(target)) is not None}
        first = next(iter(named), "")
        for name, classes in named.items():
            if classes != named[first]:
                raise ValueError(
                    f"target {target!r}: parts {first!r} and {name!r} have different classes; give both the same list"
                )


def _cut_inputs(inputs: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Cut the inputs of a part to its shapes."""
    return {
        name: inputs[name][(slice(None), *(slice(0, size) for size in shape))]
        for name, (shape, _) in layout.inputs.items()
    }
