"""What packing statistics log: padding, documents a row and tokens, by windows of steps, on resume too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from descant.callbacks import PackingStatistics, Resume
from descant.datamodules.tasks.questions import Questions
from descant.modules.core.batch import Batch
from descant.modules.language.packing import places
from descant.recipes import VisionLanguage
from tests.callbacks.checkpoints.test_resume import Net, fit, point
from tests.small import small_chat
from tests.tolerance import F32, ulps

EVERY, ROW = 2, 96


class Logged(L.Callback):
    """What was logged at each step, and rows, documents, tokens and cells of its batch by a plan of its own."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.plans: dict[int, list[int]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Batch, i: int) -> None:
        # one token an image, in place of its token in the text
        absent_B = ((batch.inputs["text"] == module.image_token).sum(dim=1) > 0) & ~batch.present["image"]
        length_B = ((batch.inputs["text"] > 0).sum(dim=1) - absent_B.long())[batch.present["text"]]
        plan = places(length_B.tolist(), ROW)
        self.plans[trainer.global_step] = [plan.rows, len(length_B), int(length_B.sum()), plan.rows * plan.width]
        metrics = trainer.callback_metrics
        self.values[trainer.global_step] = {k: float(v) for k, v in metrics.items() if k.startswith("packing/")}


def run(folder: Path, steps: int, *more: L.Callback, **options: Any) -> Logged:
    logged = Logged()
    net: Any = VisionLanguage(**small_chat())
    data: Any = Questions(batch_size=16, size=24, length=48, tiny=True)
    quiet: dict[str, Any] = {"max_steps": steps, "limit_val_batches": 1, "log_every_n_steps": EVERY}
    fit(folder, PackingStatistics(), logged, *more, net=net, data=data, **quiet, **options)
    return logged


def test_statistics_are_those_of_the_plans_of_a_window(tmp_path: Path) -> None:
    logged = run(tmp_path, 4, val_check_interval=1)
    assert logged.values[1] == {}
    for step in (2, 4):
        rows, documents, tokens, cells = (
            a + b for a, b in zip(logged.plans[step - 1], logged.plans[step], strict=True)
        )
        values = logged.values[step]
        assert values["packing/padding"] == pytest.approx(1 - tokens / cells, abs=ulps(1, F32))
        assert values["packing/documents_per_row"] == pytest.approx(documents / rows, rel=ulps(1, F32))
        assert values["packing/tokens_per_step"] == tokens / EVERY
        assert values["packing/tokens_per_second"] > 0
    assert logged.values[3] == logged.values[2]


def test_a_window_that_was_cut_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 3, Resume(every=1, keep=9))
    again = run(tmp_path / "cut", 4, Resume(every=1, keep=9), path=point(tmp_path / "cut", 3))
    wanted, found = ({k: v for k, v in of.values[4].items() if "second" not in k} for of in (whole, again))
    assert len(wanted) == 3 and found == wanted


def test_a_recipe_that_packs_nothing_is_refused(tmp_path: Path) -> None:
    message = r"^PackingStatistics needs the protocol PacksDocuments \(packing\); Net lacks it, VisionLanguage has it$"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, PackingStatistics(), net=Net())
