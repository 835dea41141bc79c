"""Line plots of reconstructed time series: units, limits, gaps and padding. Letters: B samples, W channels, T steps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from descant.callbacks import ReconstructionPictures
from descant.callbacks.plots.series import HIGH, WIDE, series_gallery
from descant.callbacks.plots.style import pixels
from descant.data.views import line_plot
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.combined.stages import StageData, StagedData
from descant.datamodules.corpora.series import Series
from descant.datamodules.fields.fields import Fields
from descant.datamodules.fields.series import SeriesField
from descant.datamodules.user.user_data import UserData
from descant.modules.core.batch import Batch
from descant.modules.core.protocols import ReconstructionOutput, SeriesAxes, SeriesData
from descant.modules.masking.corruptions import Corruption
from tests.callbacks.evaluate.test_embeddings import trainer
from tests.tolerance import F32, ulps


class SecondHalf(L.LightningModule):
    """Hides the steps of the second half; predicts 0 there, also in gaps and after the end."""

    def reconstruct(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, ReconstructionOutput]:
        found = {}
        for m, x_BWT in batch.inputs.items():
            seen_BWT = (torch.arange(x_BWT.shape[2]) < x_BWT.shape[2] // 2).expand_as(x_BWT)
            found[m] = ReconstructionOutput(x_BWT, seen_BWT, torch.where(seen_BWT, x_BWT, 0.0))
        return found

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        return None


def draw(data: L.LightningDataModule, batch: Batch) -> Figure:
    plugin = SimpleNamespace(val_step_context=nullcontext)
    loop: Any = SimpleNamespace(datamodule=data, precision_plugin=plugin, sanity_checking=False, is_global_zero=True)
    names = [str(index) for index in batch.index.tolist()]
    figures = ReconstructionPictures().draw(loop, SecondHalf(), batch, names, "title")
    assert figures[""] is None and figures["-series"] is not None
    return figures["-series"]


def lines(axes: Any) -> dict[str, np.ndarray]:
    """What is drawn as ``truth``, ``seen`` and ``rebuilt``, each ``[2, T]``: places and numbers."""
    return dict(zip(("truth", "seen", "rebuilt"), (np.array(line.get_data()) for line in axes.lines[::2]), strict=True))


def test_series_are_drawn_in_the_units_that_they_had_before_standardisation() -> None:
    data = Series("BasicMotions", {"a": [0, 1, 2], "b": [5]}, tiny=True)
    batch: Batch = next(iter(data.bank_dataloader()))
    batch = batch.select(torch.arange(3))
    made = draw(data, batch)
    assert [axes.get_title("left") for axes in made.axes[::3]] == ["channel 0", "channel 1", "channel 2", "channel 5"]
    series = [data.parts[0][index] for index in batch.index.tolist()]
    longest = max(map(len, series))
    assert min(map(len, series)) < longest
    for column, w in enumerate((0, 1, 2, 5)):
        numbers = np.concatenate([x_TW[:, w] for x_TW in series])
        margin = 0.1 * (numbers.max() - numbers.min())
        for x_TW, axes in zip(series, made.axes[3 * column : 3 * column + 3], strict=True):
            assert axes.get_xlim() == (-0.5, longest - 0.5)
            expected = numbers.min() - margin, numbers.max() + margin
            assert axes.get_ylim() == pytest.approx(expected, abs=ulps(8, F32))
            drawn, end = lines(axes), len(x_TW)
            assert np.allclose(drawn["truth"][1, :end], x_TW[:, w], rtol=0, atol=ulps(8, F32))
            assert np.isnan(drawn["truth"][1, end:]).all() and np.isnan(drawn["rebuilt"][1, end:]).all()  # padding
            seen, mean = drawn["seen"][1], data.scale[0][w]
            assert np.isfinite(seen[: min(50, end)]).all() and np.isnan(seen[50:]).all()
            assert np.allclose(drawn["rebuilt"][1, 50:end], mean, rtol=0, atol=ulps(8, F32))
            assert np.isnan(drawn["rebuilt"][1, :50]).all()
    assert made.axes[2].get_xlabel() == "step" and made.axes[0].get_xlabel() == ""


@pytest.fixture
def user(tmp_path: Path) -> UserData:
    """Four series of two channels beside a column of times, one row in 0.5 seconds; some rows are missing."""
    rows = ["file"]
    for n in range(4):
        t_R = np.delete(np.arange(12), [3, 8])[: 10 - n] * 0.5
        np.save(tmp_path / f"{n}.npy", np.stack([1000 + t_R, 20 + t_R, 300 - n + t_R], axis=1))
        rows.append(f"{n}.npy")
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    field = SeriesField(channels=2, steps=16, field="file", time=0, period=0.5)
    return UserData(path=str(tmp_path), fields=Fields(others={"pulse": field}), holdout=0, batch_size=4)


def test_series_of_a_user_have_their_own_times_and_gaps(user: UserData) -> None:
    batch = next(iter(user.bank_dataloader()))
    batch.present["pulse"][1] = False
    made = draw(user, batch)
    assert len(made.axes) == 8 and isinstance(user, SeriesData)
    assert [made.axes[k].get_title("left") for k in (0, 4)] == ["column 1", "column 2"]
    assert made.axes[3].get_xlabel() == "time from the start" and made.axes[0].get_xlim() == (-0.25, 5.75)
    assert [text.get_text() for text in made.axes[1].texts] == ["absent"] and not made.axes[1].lines
    drawn = lines(made.axes[0])
    assert drawn["truth"][0].tolist() == [0.5 * t for t in range(16)]
    gaps = [3, 8, 12, 13, 14, 15]
    assert np.flatnonzero(np.isnan(drawn["truth"][1])).tolist() == gaps
    assert drawn["truth"][1, 4] == 22 and made.axes[0].get_ylim() == pytest.approx((19.45, 26.05), abs=ulps(8, F32))
    # the prediction, 0, is below the axes, and lies on their edge
    rebuilt = drawn["rebuilt"][1]
    assert np.flatnonzero(np.isfinite(rebuilt)).tolist() == [9, 10, 11] and rebuilt[9] == made.axes[0].get_ylim()[0]
    assert [t.get_text() for t in made.legends[0].texts][2] == "reconstruction (on an edge: beyond it)"


def test_gaps_and_padding_have_no_colour_and_a_number_between_gaps_is_a_dot() -> None:
    x_BWT = torch.full((1, 1, 9), torch.nan)
    x_BWT[..., [1, 5, 6]] = torch.tensor([1.0, 2.0, 3.0])  # padding from step 7
    seen_BWT = torch.arange(9).expand_as(x_BWT) < 4
    output = ReconstructionOutput(x_BWT, seen_BWT, torch.where(seen_BWT, x_BWT, 2.5))
    made = series_gallery({"pulse": output}, {"pulse": [SeriesAxes(["volts"])]}, ["a"], "title")
    assert made is not None
    place = made.axes[0].get_position()
    assert made.axes[0].get_xlim() == (-0.5, 6.5)
    image = pixels(made)
    left, top = round(place.x0 * image.shape[1]), round((1 - place.y1) * image.shape[0])
    panel = image[top : top + HIGH - 2, left : left + WIDE].astype(int)
    steps = [step[:, 3:-3] for step in np.array_split(panel, 7, axis=1)]  # without the pixels beside another step
    colours = [bool((step.max(axis=2) - step.min(axis=2) > 60).any()) for step in steps]
    shades = [bool((step == 221).all(axis=2).any()) for step in steps]
    assert np.flatnonzero(colours).tolist() == [1, 5, 6] and np.flatnonzero(shades).tolist() == [5, 6]


def test_mixtures_and_staged_data_have_the_units_of_their_parts() -> None:
    one, two = Series("ArrowHead", tiny=True), Series("ArrowHead", tiny=True, holdout=0.5)
    both = Mixture({"one": one, "two": two}, bank="one")
    staged = StagedData({"only": StageData(two, epochs=1)})
    assert both.series_axes(3, "series") == staged.series_axes(3, "series") == one.series_axes(3, "series")
    assert one.series_axes(3, "image") is None and both.series_axes(3, "image") is None


def test_the_figure_is_an_image_of_the_run_and_of_its_logger(tmp_path: Path) -> None:
    data = Series("JapaneseVowels", tiny=True)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(ReconstructionPictures(count=2), logger=logger).test(SecondHalf(), datamodule=data)
    assert [f.name for f in (tmp_path / "pictures").iterdir()] == ["test-reconstruction-series-0.png"]
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["pictures/test-reconstruction-series"]


def test_lines_of_data_look_have_the_same_gaps() -> None:
    image = line_plot(np.array([[0.0, 5.0], [1.0, np.nan], [np.nan, np.nan], [0.0, np.nan], [1.0, 5.0]]), 100)
    assert image is not None
    column_XC = (np.asarray(image) != 255).any(axis=2).any(axis=0)
    assert column_XC[5:20].all() and not column_XC[30:70].any() and column_XC[80:95].all()
    assert line_plot(np.zeros((2, 2, 2))) is None and line_plot(np.full(3, np.nan)) is None
