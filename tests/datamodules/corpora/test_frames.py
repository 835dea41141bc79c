"""Stills, stacks and clips. Letters: B samples, F frames, S pixels of a side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from descant.callbacks import Rollouts
from descant.datamodules.corpora.frames import (
    PLACES,
    WAYS,
    Clips,
    FrameRollouts,
    Frames,
    FrameSet,
    Slices,
    Source,
    Stacks,
    Stills,
)
from descant.datamodules.corpora.volumes import Volumes
from descant.datamodules.sampling.resumable_sampler import Slot, Window
from descant.modules.core.batch import Batch
from descant.modules.language.positions import VisualSteps
from descant.modules.policy.rewards import Answer, Rewards, Verifier
from descant.recipes import GRPO, VisionLanguage
from tests.callbacks.checkpoints.test_resume import fit
from tests.small import small_chat
from tests.tolerance import F32, ulps


def frames(**options: Any) -> Frames:
    return Frames(**(dict[str, Any](tiny=True, batch_size=12, size=24, length=64) | options))


def every(data: Frames, held: Any, n: int = 24) -> Batch:
    slots = [Slot(0, i * (len(held) // n), True) for i in range(n)]
    batch: Batch = held[Window(slots, slots)]
    return batch


def said(data: Frames, batch: Batch) -> list[str]:
    return [data.spell([t for t in row if t]) for row in batch.targets["answer"].tolist()]


def test_a_sample_has_its_frames_and_zeros_after_them() -> None:
    data = frames()
    batch = every(data, data.training_set())
    named_B = torch.eq(batch.inputs["text"], data.image_token or 0).sum(dim=1)
    wanted = {"still": 1, "stack": 4, "clip": 8}
    assert named_B.tolist() == [wanted[data.every[k]] for k in batch.targets["kind"].tolist()]
    assert batch.inputs["image"].shape[1] == 8 and len(set(named_B.tolist())) == 3
    for x_F, n in zip(batch.inputs["image"], named_B.tolist(), strict=True):
        assert all(x.any() for x in x_F[:n]) and not x_F[n:].any()


def test_the_answer_is_the_odd_slice() -> None:
    """Seen from the pictures alone: all vendors' drawings of one concept, but for one."""
    data = frames(kinds=["stack"])
    held = data.training_set()
    batch = every(data, held)
    assert set(said(data, batch)) <= set(PLACES[:4])
    for b, word in enumerate(said(data, batch)):
        own = int(batch.targets["concept"][b])
        shown = [
            any(torch.equal(x, data.drawing(v, own)) for v in held.vendors.tolist()) for x in batch.inputs["image"][b]
        ]
        assert shown == [place != word for place in PLACES[:4]]
    assert len(set(said(data, batch))) == 4


def test_one_question_for_all_sources() -> None:
    """Of a stack all of whose slices show one thing, and of what moves; the right one stands among those offered."""
    asked: dict[str, Source] = {"still": Stills("group"), "stack": Stacks(about="group"), "clip": Clips(about="name")}
    data = frames(sources=asked)
    held = data.training_set()
    batch = every(data, held)
    questions = [data.spell([t for t in row if t]) for row in batch.inputs["text"].tolist()]
    for question, word, kind in zip(questions, said(data, batch), batch.targets["kind"].tolist(), strict=True):
        assert ("which is it" if kind == 2 else "what kind is it") in question and word in question
    for b in (batch.targets["kind"] == 1).nonzero().flatten().tolist():
        own = int(batch.targets["concept"][b])
        drawings = [data.drawing(v, own) for v in held.vendors.tolist()]
        assert all(any(torch.equal(x, drawing) for drawing in drawings) for x in batch.inputs["image"][b][:4])


def test_all_slices_but_one_are_of_one_place_in_the_region_of_their_split() -> None:
    volumes = Volumes(tiny=True, size=24)
    data = frames(sources={"brain": Slices(volumes)})
    data.prepare_data()
    t1 = volumes.fields["t1"][0]
    sets: dict[str, Any] = {"train": data.training_set(), "val": data.evaluation_sets("validate")["brain-val"]}
    sets |= {"test": data.evaluation_sets("test")["brain-concept"]}
    for region, held in sets.items():
        levels: dict[bytes, set[tuple[int, int, int]]] = {}  # the head is symmetric: some places look alike
        for x, y, z in _places(volumes, region):
            levels.setdefault(t1[x : x + 24, y : y + 24, z].tobytes(), set()).add((x, y, z))
        batch, alike = every(data, held, 24), list[bool]()
        for x_F, word in zip(batch.inputs["image"][:, :4], said(data, batch), strict=True):
            starts = [
                {(x, y, z - f * 23 // 3) for x, y, z in levels[s[0].numpy().tobytes()]} for f, s in enumerate(x_F)
            ]
            odd = starts.pop(PLACES.index(word))
            own = set.intersection(*starts)
            assert own
            alike.append(bool(own & odd))
        assert sum(alike) <= 2, f"{region}: hardly any two look alike"
    with pytest.raises(ValueError, match=r"volumes\.size 16 is not the frames' size 24"):
        frames(sources={"brain": Slices(Volumes(tiny=True, size=16))}).prepare_data()


def test_ranks_that_prepare_nothing_have_the_same_slices() -> None:
    shown = []
    for prepares in (True, False):
        data = frames(sources={"brain": Slices(Volumes(size=24))})  # which are told of ``tiny`` by the data alone
        if prepares:
            data.prepare_data()
        shown.append(every(data, data.training_set(), 8).inputs["image"])
    assert shown[0].any() and torch.equal(*shown)


def _places(volumes: Volumes, region: str) -> list[list[int]]:
    """Where slices of a region's crops may lie."""
    starts = [volumes._place(int(p)) for p in volumes.places[region]]
    return [[x, y, z + f * 23 // 3] for x, y, z in starts for f in range(4)]


def middle(x_4SS: Tensor) -> np.ndarray:
    """Row and column of what is solid."""
    return np.array([float(at.double().mean()) for at in (x_4SS[3] > 0).nonzero(as_tuple=True)])


def test_the_answer_is_the_direction_of_motion() -> None:
    data = frames(kinds=["clip"])
    batch = every(data, data.training_set())
    for x_F, word in zip(batch.inputs["image"], said(data, batch), strict=True):
        path = np.array([middle(x) for x in x_F])
        moved = np.diff(path, axis=0)
        assert (np.sign(moved.sum(axis=0)).astype(int) == WAYS[word]).all()
        # pixels: middles are of whole ones
        assert np.abs(path[-1] - path[0]).max() == pytest.approx(12, abs=0.5), "through the whole of the room"
    assert len(set(said(data, batch))) == 4


def test_questions_depend_on_the_problem_and_images_on_the_visit() -> None:
    data = frames(kinds=["stack", "clip"])
    held, slots = data.training_set(), [Slot(epoch, 3, True) for epoch in range(8)]
    batch = held[Window(slots, slots)]
    assert len(set(said(data, batch))) == 1 and len(batch.content_id.unique()) == 1
    assert len({x.numpy().tobytes() for x in batch.inputs["image"]}) > 2
    fixed = data.evaluation_sets("test")["stack-vendor"]
    a, b = (fixed[Window([Slot(e, 0, True)], [Slot(e, 0, True)])].inputs["image"] for e in (0, 5))
    assert torch.equal(a, b)


def test_sets_are_of_one_source_and_share_no_problem_with_training() -> None:
    data = frames()
    known = set(data.training_set().problems.key_N.tolist())
    sets = data.evaluation_sets("validate") | data.evaluation_sets("test")
    assert sorted(sets) == sorted(
        f"{k}-{s}" for k in ("still", "stack", "clip") for s in ("val", "problems", "vendor", "concept")
    )
    for name, held in sets.items():
        assert isinstance(held, FrameSet) and not known & set(held.problems.key_N.tolist())
        assert {data.every[k] for k in held.problems.kind_N} == {name.split("-")[0]}
        assert bool(data.unseen_C[held.problems.concept_N].all()) == name.endswith("concept")


def test_every_frame_of_the_lock_box_is_drawn_by_its_vendor() -> None:
    data, sealed = frames(), frames(sealed=True)
    assert {row["hexcode"] for row in data.pack.rows} != {row["hexcode"] for row in sealed.pack.rows}
    trained = sealed.training_set().problems.concept_N
    for kind, frame in (("still", 1), ("stack", 4), ("clip", 8)):
        held = sealed.evaluation_sets("test")
        vendor, concept = held[f"{kind}-vendor"], held[f"{kind}-concept"]
        assert isinstance(vendor, FrameSet) and isinstance(concept, FrameSet)
        assert sealed.unseen_C[concept.problems.concept_N].all()
        assert not set(trained) & set(concept.problems.concept_N)
        drawn_C = sealed.pack.drawings("fluent")[1]
        assert drawn_C[vendor.problems.concept_N].all() and drawn_C[vendor.pool].all() and not drawn_C.all()
        # the odd slice, another concept, is no empty one
        assert every(sealed, vendor).inputs["image"][:, :frame].flatten(2).any(dim=2).all()


def test_the_bank_has_frames_of_all_sources() -> None:
    data = frames()
    bank = every(data, data.bank_set())
    assert bank.inputs["image"].ndim == 5 and len(bank.targets["kind"].unique()) > 1


def test_small_sources_have_their_share() -> None:
    sizes = {"still": 300, "stack": 48, "clip": 12}
    for alpha, times, wanted in ((None, None, [300, 48, 12]), (0.0, None, [120] * 3), (0.5, 2.0, [240, 96, 24])):
        data = frames(train=sizes, alpha=alpha, times=times)
        order = data.order(data.training_set())
        kinds = data.training_set().problems.kind_N
        seen = [kinds[slot.sample] for window in order for slot in window.slots if slot.real]
        assert np.abs(np.bincount(seen, minlength=3) - wanted).max() <= 2, alpha
    assert len({p for p in data.training_set().problems.key_N}) == 360


def test_the_sham_has_equal_repeats_of_all_sources() -> None:
    found = {}
    for sham in (None, "permute"):
        data = frames(train={"still": 300, "stack": 48, "clip": 12}, alpha=0.0, sham=sham)
        held = data.training_set()
        seen = [slot.sample for window in data.order(held) for slot in window.slots if slot.real]
        times = np.bincount(np.bincount(seen, minlength=360))
        found[sham] = (times.tolist(), np.bincount(held.problems.kind_N[seen], minlength=3) / len(seen))
    assert found[None][0] == found["permute"][0], "as often as each other"
    assert np.abs(found[None][1] - 1 / 3).max() < 0.01 and abs(found["permute"][1][0] - 300 / 360) < 0.1


def test_rollouts_have_shares_and_resume() -> None:
    data = FrameRollouts(
        items=12,
        group=2,
        train={"still": 60, "stack": 30, "clip": 6},
        alpha=0.0,
        tiny=True,
        batch_size=12,
        size=24,
        length=64,
    )
    asked = [data.fresh(0), data.fresh(1)]
    assert all(np.bincount(p.kind_N).tolist() == [4, 4, 4] for p in asked)
    stills = np.concatenate([p.key_N[p.kind_N == 0] for p in asked])
    assert len(set(stills)) == 8, "other ones, until all were asked"


def asking(**options: Any) -> FrameRollouts:
    given = dict[str, Any](group=2, tiny=True, batch_size=12, size=24, length=64, alpha=0.0) | options
    return FrameRollouts(**given)


def test_every_problem_is_in_some_rollout() -> None:
    data = asking(items=48, train={"still": 64, "stack": 64, "clip": 64})
    asked = np.concatenate([data.fresh(round).key_N for round in range(40)])
    assert len(set(asked)) == 192, "not the same few, where sizes and shares have factors in common"


def test_a_small_source_repeats_within_a_rollout() -> None:
    data = asking(items=48, train={"still": 64, "stack": 64, "clip": 10})
    (clips,) = (p.key_N[p.kind_N == data.every.index("clip")] for p in [data.fresh(0)])
    assert len(clips) == 16 and len(set(clips)) == 10


def test_the_sham_of_rollouts_has_equal_repeats_of_all_sources() -> None:
    sizes = {"still": 300, "stack": 48, "clip": 12}
    method, sham = (asking(items=36, train=sizes, sham=how) for how in (None, "permute"))
    shares = [np.bincount(np.concatenate([d.fresh(r).kind_N for r in range(30)]), minlength=3) for d in (method, sham)]
    assert np.abs(shares[0] / shares[0].sum() - 1 / 3).max() < 0.01
    assert abs(shares[1][0] / shares[1].sum() - 300 / 360) < 0.1


class Long(Verifier):
    def __call__(self, answer: Answer) -> float | None:
        return float(len(answer.text))


def test_answers_are_trained_at_their_positions_in_the_rollout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = VisionLanguage(
        **small_chat(),
        objective=GRPO(),
        visual=VisualSteps(0.5),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        new=2,
    )
    data = FrameRollouts(items=6, group=4, alpha=0.0, tiny=True, batch_size=24, size=24, length=64)
    trainer, _ = fit(
        tmp_path, Rollouts(Rewards({"long": Long()})), net=net, data=data, max_epochs=2, limit_val_batches=0
    )
    assert float(trainer.callback_metrics["policy/moved"]) < ulps(8, F32)
    assert float(trainer.callback_metrics["rollouts/flat"]) < 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Stacks(2), "Stacks: frames 2: from 3 to 8"),
        (lambda: Clips(1), "Clips: frames 1: from 2 to 64"),
        (lambda: frames(train={"stil": 3}), "train: 'stil' is not one of still, stack, clip"),
        (lambda: frames(train={"still": 0}), "train: still 0: at least 1; leave a source out by kinds"),
        (lambda: frames(alpha=3.0), "alpha 3: from 0, all sources alike, to 1"),
        (lambda: frames(times=4.0), "times 4: more than 1, and with an alpha; such as 4"),
        (lambda: frames(sources={"one": Stills()}, kinds=["still"]), "kinds"),
        (
            lambda: frames(sources={"brain": Slices(Volumes(tiny=True, size=24))}, sealed=True),
            "sealed: no lock-box has the brain that brain shows; leave it out by kinds",
        ),
    ],
)
def test_mistakes_raise_one_line(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
