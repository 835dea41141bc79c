from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.moving_emoji import MovingEmoji
from descant.datamodules.fields.fields import Fields, ImageField, TextField
from descant.datamodules.sampling.mixture_sampler import MixedOrder, Shares, temper_shares
from descant.datamodules.sources.stream import Stream
from descant.datamodules.user.user_data import UserData
from descant.modules.core.batch import Batch
from descant.modules.core.rng import uniform_N
from descant.modules.tokenizers.text import NgramTokenizer, Tokenizer
from descant.modules.transforms.image import Augment
from tests.files import shapes
from tests.tolerance import F32, statistical, ulps


class ToySet(BatchDataset):
    """Sample i reads as i in all of its modalities; a tenth of the texts are absent."""

    def __init__(self, owner: Toy, n: int) -> None:
        super().__init__(owner.seed, owner.drop)
        self.owner, self.n = owner, n

    def __len__(self) -> int:
        return self.n

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        there = torch.from_numpy(index_N % 10 != 9)
        return {m: there if m == "text" else torch.ones(len(index_N), dtype=torch.bool) for m in self.owner.modalities}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        i_B = torch.from_numpy(index_B)
        shapes = self.owner.shapes
        inputs = {m: i_B.to(kind).view(-1, *[1] * len(s)).repeat(1, *s) for m, (s, kind) in shapes.items()}
        targets = {"label": i_B % 3} if self.owner.classes else {}
        return Rows(inputs, targets, i_B // 2)


class Toy(DataModule):
    """``n`` samples; its transform makes floats and adds ``plus`` and a draw to the image."""

    def __init__(
        self,
        n: int,
        plus: float = 0.0,
        shapes: dict[str, tuple[list[int], torch.dtype]] | None = None,
        classes: list[str] | None = None,
        tokenizer: Tokenizer | None = None,
        keys: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.shapes = shapes or {"image": ([3, 2, 2], torch.uint8), "text": ([4], torch.int64)}
        self.n, self.plus, self.classes, self._tokenizer, self._keys = n, plus, classes, tokenizer, keys
        super().__init__(**kwargs)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(m for m in self.shapes if "@" not in m)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @property
    def keys(self) -> str | None:
        return self._keys

    def training_set(self) -> ToySet:
        return ToySet(self, self.n)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val" if stage == "validate" else "test": ToySet(self, 5)}

    def bank_set(self) -> ToySet:
        return ToySet(self, self.n)

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        if self.classes is None:
            raise ValueError(f"no target {target!r}")
        return torch.zeros(3, 1, 4, dtype=torch.long), self.classes

    def describe(self, index: int) -> str:
        return f"{self.plus:g}/{index}"

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if "image" in batch.inputs:
            shift_B = uniform_N(batch.rng_seed, "shift")
            image = batch.inputs["image"][:, :3].float() + self.plus + shift_B.view(-1, 1, 1, 1)
            batch.inputs["image"] = image
        return batch


def order(sizes: list[int], weights: list[str | int], samples: int, batch_size: int, **cut: Any) -> MixedOrder:
    names = [f"p{k}" for k in range(len(sizes))]
    return MixedOrder(sizes, names, [Fraction(w) for w in weights], samples, batch_size, seed=3, **cut)


def part_of(sizes: list[int], sample: int) -> int:
    return int(np.searchsorted(np.cumsum(sizes), sample, side="right"))


def epochs(made: MixedOrder, n: int) -> list[list[Any]]:
    found = []
    for e in range(n):
        made.set_epoch(e)
        found.append([[slot for slot in window.step if slot.real] for window in made])
    return found


# shares --------------------------------------------------------------------------------------------------------


def test_shares_are_near_their_weights_monotone_and_sum_to_n() -> None:
    rng = random.Random(0)
    for trial in range(80):
        k = rng.randint(1, 12)
        weights = [rng.choice([rng.randint(1, 9), rng.randint(1, 2000)]) for _ in range(k)]
        whole = sum(weights)
        shares = Shares([Fraction(w, 7) for w in weights])
        at = [rng.randint(0, 10**6) for _ in range(40)] + list(range(trial, trial + 200))
        values = {n: shares.at(n) for n in sorted(at)}
        for n, counts in values.items():
            assert sum(counts) == n
            off = max(abs(c * whole - n * w) for c, w in zip(counts, weights, strict=True)) / whole
            assert off < (1.5 if k <= 5 else 1.7)
            assert all(abs(c - round(n * w / whole)) <= 1 for c, w in zip(counts, weights, strict=True))
        for a, b in pairwise(values):
            assert all(low <= high for low, high in zip(values[a], values[b], strict=True))
        assert shares.at(7 * whole) == [7 * w for w in weights]


# the order -----------------------------------------------------------------------------------------------------


def test_by_size_an_epoch_sees_every_sample_once() -> None:
    sizes = [5, 23, 11]
    for epoch in epochs(order(sizes, sizes, sum(sizes), 8), 3):  # type: ignore[arg-type]
        assert Counter(slot.sample for step in epoch for slot in step) == Counter(range(39))


def test_a_part_of_three_times_its_size_has_each_sample_three_times() -> None:
    sizes = [100, 700]
    made = order(sizes, [3, 5], 800, 32)
    for number, epoch in enumerate(epochs(made, 2)):
        seen = Counter(slot.sample for step in epoch for slot in step)
        assert {seen[i] for i in range(100)} == {3}
        assert sum(seen[i] for i in range(100, 800)) == 500
        # three visits are three draws
        visits = {(slot.epoch, slot.sample) for step in epoch for slot in step}
        assert len(visits) == 800
        assert {turn for turn, sample in visits if sample < 100} == {3 * number, 3 * number + 1, 3 * number + 2}


def test_every_step_follows_the_weights_and_no_sample_is_twice_in_a_pass() -> None:
    sizes, weights = [40, 31, 300], [Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)]
    made = MixedOrder(sizes, ["a", "b", "c"], weights, 160, 16, seed=0)
    given, walks = [0, 0, 0], [Counter[tuple[int, int]]() for _ in sizes]
    for e, epoch in enumerate(epochs(made, 6)):
        for b, step in enumerate(epoch):
            for slot in step:
                part = part_of(sizes, slot.sample)
                given[part] += 1
                walks[part][slot.epoch, slot.sample] += 1
            n = (e * 10 + b + 1) * 16
            assert all(abs(g - round(n * w)) <= 1 for g, w in zip(given, weights, strict=True))
    for size, walk in zip(sizes, walks, strict=True):
        assert set(walk.values()) == {1}
        whole, rest = divmod(len(walk), size)
        turns = Counter(turn for turn, _ in walk)
        assert turns == Counter({**dict.fromkeys(range(whole), size), **({whole: rest} if rest else {})})


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_the_global_order_does_not_depend_on_the_cut(world: int, accumulate: int, homogeneous: bool) -> None:
    sizes = [13, 40]
    whole = [w.step for w in order(sizes, [1, 1], 60, 8, homogeneous=homogeneous, epoch=2)]
    cut = {"homogeneous": homogeneous, "epoch": 2, "world": world, "accumulate": accumulate}
    ranks = [list(order(sizes, [1, 1], 60, 8, rank=r, **cut)) for r in range(world)]
    for batch, step in enumerate(whole):
        micro = range(batch * accumulate, (batch + 1) * accumulate)
        assert all(windows[m].step == step for windows in ranks for m in micro)
        assert Counter(s for windows in ranks for m in micro for s in windows[m].slots) == Counter(step)


def test_an_order_from_the_middle_equals_the_rest() -> None:
    whole = list(order([13, 40], ["0.7", "0.3"], 60, 8, epoch=3))
    made = order([13, 40], ["0.7", "0.3"], 60, 8, epoch=3, first=5)
    assert list(made) == whole[5:]
    made.set_epoch(4)
    assert list(made) == list(order([13, 40], ["0.7", "0.3"], 60, 8, epoch=4))
    assert list(made) != whole


def test_the_order_of_a_part_is_independent_of_the_others() -> None:
    alone = MixedOrder([30], ["a"], [Fraction(1)], 30, 10, seed=0)
    beside = MixedOrder([7, 30], ["b", "a"], [Fraction(7), Fraction(30)], 37, 10, seed=0)
    mine = [slot.sample for window in alone for slot in window.step if slot.real]
    theirs = [slot.sample - 7 for window in beside for slot in window.step if slot.real and slot.sample >= 7]
    assert mine == theirs


@pytest.mark.parametrize(
    ("alpha", "times", "wanted"), [(1.0, None, [400, 40]), (0.0, None, [220, 220]), (0.5, 2.0, [360, 80])]
)
def test_shares_by_temperature(alpha: float, times: float | None, wanted: list[int]) -> None:
    """Seen from the batches of one epoch of as many samples as there are: 40 of 440 are small."""
    data = Mixture({"large": Toy(400), "small": Toy(40)}, alpha=alpha, times=times, batch_size=20)
    source = torch.cat([batch.source for batch in data.train_dataloader()])
    found = torch.bincount(source, minlength=2).tolist()
    assert all(abs(n - w) <= 2 for n, w in zip(found, wanted, strict=True)), found


def test_shares_by_temperature_keep_to_their_bounds() -> None:
    for sizes in ([5000, 700, 350, 180], [10, 10], [1000, 1]):
        for alpha in (0.0, 0.3, 0.5, 1.0):
            plain = [size**alpha / sum(n**alpha for n in sizes) for size in sizes]
            assert [float(x) for x in temper_shares(sizes, alpha)] == pytest.approx(plain, abs=ulps(8, F32))
            capped = [float(x) for x in temper_shares(sizes, alpha, 4.0)]
            # shares are set aside part by part until all keep to their bounds
            assert sum(capped) == pytest.approx(1, abs=ulps(64, F32))
            assert all(x <= 4 * size / sum(sizes) + ulps(16, F32) for x, size in zip(capped, sizes, strict=True))


def test_homogeneous_steps_are_of_one_part_and_follow_the_weights() -> None:
    sizes = [20, 50]
    made = order(sizes, [1, 3], 160, 8, homogeneous=True)
    given = [0, 0]
    walks: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
    for e, epoch in enumerate(epochs(made, 3)):
        assert len(epoch) == 20
        for b, step in enumerate(epoch):
            parts = {part_of(sizes, slot.sample) for slot in step}
            assert len(parts) == 1
            assert len({slot.epoch for slot in step}) == 1  # never the end of a pass and the beginning of the next
            part = parts.pop()
            given[part] += 1
            walks[part].update((slot.epoch, slot.sample) for slot in step)
            n = e * 20 + b + 1
            assert all(abs(g - n * w / 4) < 1 for g, w in zip(given, (1, 3), strict=True))
    assert given == [15, 45]
    for size, walk in zip(sizes, walks, strict=True):
        assert set(walk.values()) == {1}
        turns = Counter(turn for turn, _ in walk)
        assert all(turns[turn] == size for turn in range(max(turns)))


# batches -------------------------------------------------------------------------------------------------------


AUDIO = {"audio": ([6], torch.int16), "text": ([4], torch.int64)}


def two(**kwargs: Any) -> Mixture:
    """Image-text with labels, and audio-text."""
    drawn, spoken = Toy(40, 100.0, classes=["x", "y", "z"]), Toy(20, 200.0, shapes=AUDIO)
    return Mixture({"drawn": drawn, "spoken": spoken}, **{"batch_size": 12, **kwargs})


def batches(data: Mixture) -> list[Batch]:
    return list(data.train_dataloader())


def test_missing_modalities_are_absent_and_have_the_shape_of_the_others() -> None:
    data = two()
    for batch in batches(data):
        drawn = batch.source == 0
        assert set(batch.inputs) == {"image", "text", "audio"} == set(batch.present)
        assert batch.inputs["image"].shape[1:] == (3, 2, 2) and batch.inputs["image"].dtype == torch.uint8
        assert batch.inputs["audio"].shape[1:] == (6,) and batch.inputs["audio"].dtype == torch.int16
        assert not batch.present["image"][~drawn].any() and not batch.inputs["image"][~drawn].any()
        assert not batch.present["audio"][drawn].any() and not batch.inputs["audio"][drawn].any()
        assert (batch.targets["label"][~drawn] == -1).all() and (batch.targets["label"][drawn] >= 0).all()
        assert int(batch.count("text")) == int(batch.present["text"].sum())
        assert int(batch.count("image", "audio")) == 0
        own = batch.inputs["text"][:, 0]  # a sample reads as its number, so rows are where they belong
        assert torch.equal(batch.present["text"], own % 10 != 9)
        assert torch.equal(batch.inputs["image"][drawn][:, 0, 0, 0].long(), own[drawn])


def test_step_counts_are_the_whole_steps_on_every_cut() -> None:
    for homogeneous in (False, True):
        data = two(batches="homogeneous" if homogeneous else "mixed")
        rows = data.training_set()
        whole = [rows[w] for w in data.order(rows)]
        for rank in range(2):
            for batch, window in zip(whole, data.order(rows, rank=rank, world=2), strict=True):
                mine = rows[window]
                for m in ("image", "text", "audio"):
                    assert torch.equal(mine.step[m], batch.step[m])
                    assert int(batch.present[m].sum()) == int(mine.step[m].sum())


def test_workers_change_nothing() -> None:
    one, other = two(), two(num_workers=2)
    assert other.workers == 2
    for a, b in zip(batches(one), batches(other), strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.rng_seed, b.rng_seed) and torch.equal(a.source, b.source)
        assert all(torch.equal(a.inputs[m], b.inputs[m]) for m in a.inputs)


def test_ids_and_keys_of_parts_are_disjoint_and_ids_name_the_part() -> None:
    parts: dict[str, DataModule] = {"a": Toy(30, 1.0), "b": Toy(30, 2.0)}
    data = Mixture(parts, batch_size=10)
    ids: dict[int, set[int]] = {0: set(), 1: set()}
    keys: dict[int, set[int]] = {0: set(), 1: set()}
    for batch in batches(data):
        for source, index, key, value in zip(
            batch.source.tolist(),
            batch.index.tolist(),
            batch.content_id.tolist(),
            batch.inputs["text"][:, 0],
            strict=True,
        ):
            ids[source].add(index)
            keys[source].add(key)
            assert data.describe(index) == f"{source + 1}/{int(value)}"
    assert len(ids[0]) == len(ids[1]) == 30 and not ids[0] & ids[1]
    assert len(keys[0]) == len(keys[1]) == 15 and not keys[0] & keys[1]
    rows = data.training_set()
    assert set(rows.identity(np.arange(60)).tolist()) == ids[0] | ids[1]
    assert all(data.sample_name(i) == str(i & (1 << 48) - 1) for i in ids[1])
    held = data.evaluation_sets("test")
    assert list(held) == ["a-test", "b-test"]
    loader = data.evaluation_loader(held["b-test"])
    assert {data.describe(i) for batch in loader for i in batch.index.tolist()} == {f"2/{i}" for i in range(5)}


def test_parts_that_number_the_same_content_share_keys() -> None:
    parts: dict[str, DataModule] = {"a": Toy(6, keys="captions"), "b": Toy(6, keys="captions"), "c": Toy(6)}
    batch = batches(Mixture(parts, batch_size=18))[0]
    keys = [set(batch.content_id[batch.source == k].tolist()) for k in range(3)]
    assert keys[0] == keys[1] and not keys[0] & keys[2]


def test_equal_samples_of_two_parts_have_different_seeds() -> None:
    batch = batches(Mixture({"a": Toy(20), "b": Toy(20)}, batch_size=40))[0]
    assert len(set(batch.rng_seed.tolist())) == 40


@pytest.mark.parametrize("kind", ["mixed", "homogeneous"])
def test_transforms_apply_to_the_rows_of_their_part(kind: Any) -> None:
    data = two(batches=kind)
    for batch in batches(data):
        assert batch.inputs["image"].dtype == torch.uint8  # until here
        number, source, draw = batch.inputs["text"][:, 0].float(), batch.source.clone(), batch.rng_seed.clone()
        after = data.on_after_batch_transfer(batch, 0)
        assert after.inputs["image"].dtype == torch.float32 and after.inputs["image"].shape[1:] == (3, 2, 2)
        expected = torch.where(source == 0, number + 100 + uniform_N(draw, "shift"), torch.zeros(()))
        torch.testing.assert_close(after.inputs["image"][:, 1, 1, 0], expected, rtol=0, atol=200 * ulps(2, F32))
        assert after.inputs["audio"].dtype == torch.int16
        assert torch.equal(after.source, source)


def test_images_with_and_without_alpha_mix() -> None:
    rgba = {"image": ([4, 2, 2], torch.uint8), "text": ([4], torch.int64)}
    data = Mixture({"rgb": Toy(10, 100.0), "rgba": Toy(10, 200.0, shapes=rgba)}, batch_size=20)
    batch = batches(data)[0]
    assert batch.inputs["image"].shape == (20, 4, 2, 2)
    number, plus = batch.inputs["text"][:, 0], 100.0 * (1 + batch.source)
    image = data.on_after_batch_transfer(batch, 0).inputs["image"]
    assert image.shape == (20, 3, 2, 2)
    torch.testing.assert_close(image[:, 0, 0, 0].floor(), number + plus, rtol=0, atol=0)


def test_drop_works_in_a_part_and_in_the_mixture() -> None:
    shares = []
    for a, whole in ((0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
        parts: dict[str, DataModule] = {"a": Toy(2000, drop={"image": a}), "b": Toy(2000)}
        found = batches(Mixture(parts, batch_size=4000, drop={"image": whole}))[0]
        shares.append([float(found.present["image"][found.source == k].float().mean()) for k in (0, 1)])
    # of 4000 samples in two parts
    assert np.allclose(shares, [[0.5, 1], [0.5, 0.5], [0.25, 0.5]], rtol=0, atol=statistical(0.5, 2000))


def test_evaluation_sets_have_all_modalities_and_one_part() -> None:
    data = two(weights={"drawn": 1, "spoken": 0})
    assert all((batch.source == 0).all() for batch in batches(data))
    sets = data.evaluation_sets("validate")
    batch = next(iter(data.evaluation_loader(sets["spoken-val"])))
    assert set(batch.inputs) == {"image", "text", "audio"}
    assert (batch.source == 1).all() and not batch.present["image"].any() and batch.present["audio"].all()
    after = data.on_after_batch_transfer(batch, 0)
    assert after.inputs["image"].shape == (5, 3, 2, 2) and after.inputs["image"].dtype == torch.float32


def test_bank_and_prompts_are_the_chosen_parts() -> None:
    parts: dict[str, DataModule] = {"spoken": Toy(9, shapes=AUDIO), "drawn": Toy(7, classes=["x", "y", "z"])}
    data = Mixture(parts, bank="drawn")
    assert data.prompts("label")[1] == ["x", "y", "z"]
    assert len(data.bank_set()) == 7
    assert all((batch.source == 1).all() for batch in data.bank_dataloader())


def test_tiny_and_hooks_reach_the_parts() -> None:
    called: list[str] = []

    class ResumableLog(Toy):
        def prepare_data(self) -> None:
            called.append("prepare")

        def setup(self, stage: str) -> None:
            called.append(stage)

    part = ResumableLog(8)
    parts: dict[str, DataModule] = {"a": part}
    data = Mixture(parts, tiny=True, batch_size=4)
    assert part.tiny
    data.prepare_data()
    data.setup("fit")
    assert called == ["prepare", "fit"]
    trainer: Any = object()
    data.trainer = trainer
    assert part.trainer is trainer


def test_real_parts_with_other_vendors_and_augmentation() -> None:
    tokenizer = NgramTokenizer(length=24)
    parts: dict[str, DataModule] = {
        "noto": Emoji(tiny=True, vendors=["noto"], text=tokenizer),
        "twemoji": Emoji(tiny=True, vendors=["twemoji"], text=tokenizer, views={"image": 1}),
    }
    data = Mixture(parts, batch_size=64)
    batch = batches(data)[0]
    named = [data.describe(i) for i in batch.index.tolist()]
    own = [
        list(parts.values())[s].describe(i & (1 << 48) - 1)
        for s, i in zip(batch.source, batch.index.tolist(), strict=True)
    ]
    assert named == own
    after = data.on_after_batch_transfer(batch, 0)
    assert after.inputs["image"].shape == (64, 3, 32, 32) and float(after.inputs["image"].std()) > 0.1


@pytest.mark.parametrize(
    ("second", "calls"), [({}, 1), ({"augment": Augment(32, rotate=5.0)}, 2), ({"sketch": True}, 2)]
)
def test_parts_of_equal_transforms_are_transformed_at_once(
    second: dict[str, Any], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataModule, "training", True)
    tokenizer, used = NgramTokenizer(length=24), list[int]()
    parts: dict[str, DataModule] = {
        "noto": Emoji(tiny=True, vendors=["noto"], text=tokenizer),
        "twemoji": Emoji(tiny=True, vendors=["twemoji"], text=tokenizer, **second),
    }
    data = Mixture(parts, batch_size=64)
    loader = data.train_dataloader()
    forward = Augment.forward

    def counted(*args: Any) -> Tensor:
        used.append(1)
        return forward(*args)

    monkeypatch.setattr(Augment, "forward", counted)
    at_once = data.on_after_batch_transfer(next(iter(loader)), 0)
    assert len(used) == calls
    monkeypatch.setattr(data, "_together", {True: {}})
    apart = data.on_after_batch_transfer(next(iter(loader)), 0)
    assert len(used) == calls + 2 and at_once.inputs.keys() == apart.inputs.keys()
    for name, x in apart.inputs.items():
        # the same arithmetic for each row; a library may add in another order in a batch of another size
        torch.testing.assert_close(at_once.inputs[name], x, rtol=0, atol=1e-5)


class Shifted(Emoji):
    """A user's own: what its transforms depend on is not known."""


def test_transforms_that_are_not_known_are_equal_to_none() -> None:
    assert Emoji(tiny=True).transform_key == Emoji(tiny=True, groups=["symbols"]).transform_key is not None
    assert Shifted(tiny=True).transform_key is None
    augment = Augment(32)
    augment.scale_C = nn.Parameter(torch.ones(3))
    assert Emoji(tiny=True, augment=augment).transform_key is None


# refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": 0, "b": 0}, "weights: all of a, b are 0, so there is nothing to train on"),
        ({"a": 1, "b": -1}, "weights: b -1 is no share of the samples"),
        ({"a": 1, "b": float("nan")}, "weights: b nan is no share of the samples"),
        ({"a": 1, "c": 1}, "weights: no part 'c'; the parts are a, b"),
        ({"a": 1}, "weights: part 'b' has none; 0 trains on none of it"),
    ],
)
def test_bad_weights_raise_one_line(weights: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Mixture({"a": Toy(4), "b": Toy(4)}, weights)


def test_without_repeat_a_part_that_is_too_small_is_an_error() -> None:
    parts: dict[str, DataModule] = {"a": Toy(10), "b": Toy(90)}
    data = Mixture(parts, {"a": 1, "b": 1}, repeat=False, batch_size=10)
    with pytest.raises(
        ValueError, match="part 'a' is too small: an epoch needs 50 samples of it and there are 10; lower"
    ):
        data.train_dataloader()
    assert len(Mixture(parts, {"a": 1, "b": 1}, samples=20, repeat=False, batch_size=10).train_dataloader()) == 2
    assert len(Mixture(parts, repeat=False, batch_size=10).train_dataloader()) == 10
    alone = Mixture(parts, {"a": 1, "b": 1}, repeat=False, batch_size=10, batches="homogeneous")
    with pytest.raises(ValueError, match="an epoch needs 5 batches of it and there are 1"):
        alone.train_dataloader()


def shaped(**shapes: tuple[list[int], torch.dtype]) -> Toy:
    return Toy(8, shapes=shapes)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            shaped(image=([3, 4, 4], torch.uint8), text=([4], torch.int64)),
            r"image: a sample is \[3, 2, 2\] float32 in part 'a' and \[3, 4, 4\] float32 in part 'b'; make them equal",
        ),
        (shaped(text=([9], torch.int64)), r"text: a sample is \[4\] int64 in part 'a' and \[9\] int64 in part 'b'"),
        (shaped(text=([4], torch.int32)), r"text: a sample is \[4\] int64 in part 'a' and \[4\] int32 in part 'b'"),
        (
            shaped(**{"image": ([3, 2, 2], torch.uint8), "image@2": ([3, 2, 2], torch.uint8)}),
            "part 'b' has image@2 and part 'a' has not: set views of both",
        ),
        (
            Toy(8, tokenizer=NgramTokenizer(n=4)),
            "parts 'a' and 'b' have different token ids of one text; give them one tokenizer",
        ),
        (Toy(8, classes=["x", "z", "y"]), "target 'label': parts 'a' and 'b' have different classes; give both"),
    ],
)
def test_incompatible_parts_raise_one_line(other: Toy, says: str) -> None:
    data = Mixture({"a": Toy(8, tokenizer=NgramTokenizer(n=3), classes=["x", "y", "z"]), "b": other}, batch_size=4)
    with pytest.raises(ValueError, match=says):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"parts": {}}, "parts: a mixture needs at least one"),
        ({"parts": {"a/b": Toy(4)}}, "parts: 'a/b': letters, digits and _ only"),
        ({"parts": {"a": Toy(4)}, "bank": "b"}, "bank: no part 'b'; the parts are a"),
        ({"parts": {"a": Toy(4)}, "samples": 3}, "samples 3 of an epoch are less than one batch of 256"),
        ({"parts": {"a": Toy(4)}, "drop": {"sound": 0.5}}, "drop: no modality 'sound'"),
        ({"parts": {"a": Toy(4)}, "alpha": 2.0}, "alpha 2: from 0, all parts alike, to 1, by their sizes"),
        ({"parts": {"a": Toy(4)}, "alpha": 0.5, "weights": {"a": 1}}, "weights and alpha: each sets the shares"),
        ({"parts": {"a": Toy(4)}, "alpha": 0.5, "times": 1.0}, "times 1: more than 1, and with an alpha; such as 4"),
        ({"parts": {"a": Toy(4)}, "times": 4.0}, "times 4: more than 1, and with an alpha; such as 4"),
    ],
)
def test_bad_options_raise_one_line(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Mixture(**kwargs)


def test_streams_and_empty_parts_are_refused() -> None:
    streamed = UserData(stream=Stream("shards-{000..003}.tar", samples=100))
    with pytest.raises(ValueError, match="part 'b' is a stream, and a mixture reads by position"):
        Mixture({"a": Toy(4), "b": streamed}).training_set()
    with pytest.raises(ValueError, match="part 'b' has no training sample; weight 0 leaves it out"):
        Mixture({"a": Toy(4), "b": Toy(0)}, batch_size=2).train_dataloader()


def test_ids_beyond_48_bits_are_an_error() -> None:
    class Wide(ToySet):
        def identity(self, index_B: np.ndarray) -> np.ndarray:
            return index_B + (1 << 60)

    class Hashed(Toy):
        def training_set(self) -> ToySet:
            return Wide(self, self.n)

    with pytest.raises(ValueError, match="ids beyond"):
        batches(Mixture({"a": Hashed(4)}, batch_size=2))


def test_the_bank_of_a_part_without_an_evaluation_set(tmp_path: Any) -> None:
    parts: dict[str, DataModule] = {
        name: UserData(path=str(shapes(tmp_path / name, 12)), fields=small(), holdout=held)
        for name, held in HELD.items()
    }
    made = Mixture(parts, batch_size=4)
    assert list(made.evaluation_sets("validate")) == ["b-val"]
    batch = made.on_after_batch_transfer(next(iter(made.bank_dataloader())), 0)
    assert len(batch) and set(batch.inputs) == {"image", "text"}


HELD = {"a": 0.0, "b": 0.3}


def small() -> Fields:
    return Fields(image=ImageField(size=8), text=TextField())


def test_parts_have_some_modalities_in_training_and_evaluation() -> None:
    data = two(only={"drawn": ["image"]})
    for batch in batches(data):
        drawn = batch.source == 0
        assert batch.present["image"].any() and not batch.present["text"][drawn].any()
        assert int(batch.count("text")) == int(batch.present["text"].sum())
        assert batch.present["text"][~drawn].any() and batch.present["audio"][~drawn].any()
    rows = data.evaluation_sets("validate")
    for name, has in (("drawn", {"image"}), ("spoken", {"audio", "text"})):
        (part,) = (x for key, x in rows.items() if key.startswith(name))
        assert {m for m, mask_N in part.present(np.arange(len(part))).items() if mask_N.any()} == has
    for wrong, line in (
        ({"b": ["image"]}, "only: no part 'b'; the parts are drawn, spoken"),
        ({"drawn": ["audio"]}, "only: drawn: no modality 'audio'; it has"),
        ({"drawn": []}, "only: drawn: no modality 'none'; it has"),
    ):
        with pytest.raises(ValueError, match=line):
            two(only=wrong)


def test_parts_that_have_others_inside_become_tiny_with_the_mixture() -> None:
    parts: dict[str, DataModule] = {"clips": MovingEmoji(size=24, frames=2), "drawings": Emoji(size=32, paired=True)}
    assert batches(Mixture(parts, batch_size=8, tiny=True))[0].present["video"].any()  # of equal classes
