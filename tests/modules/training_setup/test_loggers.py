"""TensorBoard events: every metric under its own name, main metrics also in the overview."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.io_wrapper import GetLogdirSubdirectories

from descant.modules.training_setup.loggers import TensorBoard
from descant.report.curves import scalars
from descant.run.runs import point


def test_the_loss_and_what_is_monitored_are_shown_first(tmp_path: Path) -> None:
    logger = TensorBoard(str(tmp_path))
    logger.monitor([ModelCheckpoint(monitor="val/i2t_r1", mode="max"), ModelCheckpoint()])
    logger.log_metrics({"train/loss": 2.0, "apart/i2t_r1": 0.5}, 3)
    logger.log_metrics({"val/i2t_r1": 0.25}, 4)
    logger.save()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    own = ["apart/i2t_r1", "train/loss", "val/i2t_r1"]
    assert sorted(events.Tags()["scalars"]) == ["_overview/train/loss", "_overview/val/i2t_r1", *own]
    for name in own[1:]:
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (e.step, e.value) for e in events.Scalars(f"_overview/{name}")
        ]
    assert list(scalars(tmp_path)) == own  # the report has no metric twice


@pytest.mark.parametrize("linked", [False, True])
def test_tensorboard_finds_each_run_once(tmp_path: Path, linked: bool) -> None:
    """Also where an earlier version left a link, as soon as another run begins."""
    for number in ("001", "002"):
        folder = tmp_path / "demo" / number
        logger = TensorBoard(str(folder))
        logger.log_metrics({"train/loss": 2.0}, 1)
        logger.save()
        if linked and number == "001":
            (tmp_path / "demo/latest").symlink_to("001")
        else:
            point(folder)
    found = sorted(Path(path).relative_to(tmp_path).as_posix() for path in GetLogdirSubdirectories(str(tmp_path)))
    assert found == ["demo/001", "demo/002"]
    assert (tmp_path / "demo/latest").read_text() == "002\n" and not (tmp_path / "demo/latest").is_symlink()
