"""Answers, counted by hand: with the own picture, another's and none; and a table of them. Letters: N rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from descant.callbacks import Answering
from descant.callbacks.plots.answers import AnswerRow, answer_table
from descant.callbacks.plots.style import pixels
from descant.datamodules.tasks.questions import KINDS, Questions
from descant.modules.core.batch import Batch
from descant.modules.core.sham import Sham
from descant.modules.language import Sampling
from tests.callbacks.policy.test_rounds import chat
from tests.recipes.test_missing import PatternData, build, fusion
from tests.tolerance import F32, ulps

N = 40


class Looks(L.LightningModule):
    """Says what is right where the picture it is shown is the one that the problem has, or where a key says so."""

    def generate(self, batch: Batch, new: int = 16) -> Tensor:
        right = batch.targets["answer"][:, :new].clone()
        # sums of 192 or so float32 numbers, told apart by their content
        own_B = (batch.inputs["image"].flatten(1).sum(dim=1) - batch.targets["sum"]).abs() < 1e-3
        own_B &= batch.present["image"]
        right[~own_B & (batch.content_id % 4 != 0)] = 9
        return right

    def validation_step(self, batch: Batch, *_: Any) -> dict[str, Any]:
        return {}

    def test_step(self, batch: Batch, *_: Any) -> dict[str, Any]:
        return {}


class Some(Questions):
    """Forty problems, and what their picture adds up to."""

    def __init__(self) -> None:
        super().__init__(tiny=True, batch_size=16, eval_batch_size=16, size=24, length=64)

    def evaluation_sets(self, stage: str) -> dict[str, Any]:
        sets = super().evaluation_sets(stage)
        name, rows = next(iter(sets.items()))
        rows.problems = rows.problems.where(np.linspace(0, len(rows) - 1, N).astype(int))  # type: ignore[attr-defined]
        return {name: rows}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        batch.targets["sum"] = batch.inputs["image"].flatten(1).sum(dim=1)
        return batch


def evaluated(folder: Path, part: Answering, net: Any = None, data: Any = None) -> dict[str, float]:
    options: dict[str, Any] = dict(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer = L.Trainer(default_root_dir=folder, callbacks=[part], enable_model_summary=False, **options)
    trainer.validate(net or Looks(), datamodule=data or Some(), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_accuracies_by_hand(tmp_path: Path) -> None:
    values = evaluated(tmp_path, Answering(by="kind"))
    data, kinds, known = Some(), [], []
    same = total = 0
    for raw in data.val_dataloader()[0]:
        batch = data.on_after_batch_transfer(raw, 0)
        here = batch.present["text"]
        other = Sham.permute(batch.inputs["image"], batch.rng_seed, batch.present["image"])
        with torch.no_grad():
            said = Looks().generate(replace(batch, inputs={**batch.inputs, "image": other}))
        same += int((said == batch.targets["answer"]).all(dim=1)[here].sum())
        known += (batch.content_id % 4 == 0)[here].tolist()
        kinds += batch.targets["kind"][here].tolist()
        total += int(here.sum())
    assert total == N and values["val/answered"] == 1.0
    assert values["val/answered_blind"] == pytest.approx(sum(known) / N, rel=ulps(4, F32))
    assert (
        values["val/answered_other"] == pytest.approx(same / N, rel=ulps(4, F32)) and values["val/answered_other"] < 0.6
    )
    assert all(values[f"val/answered/{KINDS[k]}"] == 1.0 for k in set(kinds))


def test_a_limit_and_no_controls(tmp_path: Path) -> None:
    values = evaluated(tmp_path, Answering(controls=False, table=0, limit=10))
    assert set(values) == {"val/answered"} and not (tmp_path / "pictures").exists()


def test_a_chat_recipe_is_evaluated_in_test_and_its_table_is_saved(tmp_path: Path) -> None:
    trainer = L.Trainer(
        default_root_dir=tmp_path, callbacks=[Answering(new=3, table=5)], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.test(chat(), datamodule=Some(), verbose=False)
    assert set(trainer.callback_metrics) >= {f"problems/answered{x}" for x in ("", "_other", "_blind")}
    image = Image.open(tmp_path / "pictures/problems-answers-0.png")
    one = pixels(answer_table([AnswerRow(None, "which?", "a", "b", True)] * 5, "x"))
    assert image.size == one.shape[1::-1] and len(np.unique(np.asarray(image))) > 50


def test_sampled_answers_have_the_expected_reward(tmp_path: Path) -> None:
    class TeacherConfidence(Looks):
        def generate(self, batch: Batch, new: int = 16, sampling: Sampling | None = None) -> Tensor:
            right = super().generate(batch, new)
            if sampling is not None:
                right[batch.content_id % 4 == 0] = round(9 * sampling.temperature)
            return right

    values = evaluated(
        tmp_path, Answering(controls=False, table=0, sampling=Sampling(temperature=1.0)), TeacherConfidence()
    )
    share = sum(int((raw.content_id % 4 != 0)[raw.present["text"]].sum()) for raw in Some().val_dataloader()[0]) / N
    assert values["val/answered"] == 1.0 and values["val/answered_drawn"] == pytest.approx(share, rel=ulps(4, F32))
    net = chat()
    alike = evaluated(tmp_path, Answering(new=3, controls=False, table=0, sampling=Sampling(temperature=0)), net)
    assert alike["val/answered_drawn"] == alike["val/answered"]


def test_correct_answers_are_green_in_the_table() -> None:
    def green(good: bool) -> int:
        """The greenest pixel of what was said, above its red."""
        table = answer_table([AnswerRow(torch.ones(3, 4, 4), "how many?", "3", "eight", good)], "x")
        image = pixels(table).astype(int)[:, -190:]
        return int((image[..., 1] - image[..., 0]).max() + (image[..., 1] - image[..., 0]).min())

    assert green(True) > 60 and green(False) < -60


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Answering(new=0), "new 0 and table 8: 1 and 0 are the least"),
        (lambda: evaluated(tmp_path, Answering(by="kidn")), "by 'kidn': no such name; did you mean kind"),
        (
            lambda: evaluated(tmp_path, Answering(), build(fusion("LateFusion", "image"))),
            "the protocol Generates .*; Fusion lacks it, VisionLanguage has it",
        ),
        (lambda: evaluated(tmp_path, Answering(), None, PatternData()), "such as Questions; PatternData has none"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
