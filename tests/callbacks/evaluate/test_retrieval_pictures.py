"""Figures show what was retrieved, and TensorBoard reads the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from google.protobuf import text_format  # type: ignore[import-untyped]
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from descant.callbacks.evaluate.embeddings import Rows
from descant.callbacks.evaluate.projector import Projector
from descant.callbacks.evaluate.retrieval_pictures import RetrievalPictures
from descant.callbacks.plots.images import CAPTIONS, Cell, sheet
from descant.callbacks.plots.style import GREEN, VERMILLION, pixels, rgb
from descant.modules.core.batch import Batch


class Recipe(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return dict(batch.inputs)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return {"z": self.embed(batch)}

    test_step = validation_step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 0 * self.w

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    """Six samples, each its own direction; texts are turned by ``shift`` samples, so the first is wrong."""

    def __init__(self, shift: int = 0, pictured: bool = True) -> None:
        super().__init__()
        self.shift, self.pictured = shift, pictured

    def evaluation_sets(self, stage: str) -> dict[str, None]:
        return {"val": None}

    def val_dataloader(self) -> Any:
        z_ND = torch.eye(6)
        inputs = {"image": z_ND, "text": z_ND.roll(self.shift, 0)}
        present = dict.fromkeys(inputs, torch.ones(6, dtype=torch.bool))
        batches: Any = [Batch(inputs, present, index=torch.arange(6) * 10)]
        return DataLoader(batches, batch_size=None)

    test_dataloader = val_dataloader

    def train_dataloader(self) -> Any:
        data: Any = torch.zeros(2, 1)
        return DataLoader(data)

    def describe(self, index: int) -> str:
        return f"sample\tnumber {index}\n"

    def picture(self, index: int) -> Tensor | None:
        return torch.full((3, 64, 64), 4 * index, dtype=torch.uint8) if self.pictured else None


def run(tmp_path: Path, callback: L.Callback, data: Data, stage: str = "validate", **options: Any) -> L.Trainer:
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path, name="", version="tb")]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        logger=loggers,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    kwargs = {} if stage == "fit" else {"verbose": False}
    getattr(trainer, stage)(Recipe(), datamodule=data, **kwargs)
    return trainer


def framed(image: Image.Image, colour: str) -> int:
    return int((np.asarray(image) == np.array(rgb(colour))).all(-1).sum())


def pictures(tmp_path: Path) -> dict[str, Image.Image]:
    return {path.name: Image.open(path) for path in sorted(tmp_path.rglob("pictures/*.png"))}


@pytest.mark.parametrize("pictured", [True, False])
def test_correct_candidates_are_green_and_wrong_ones_vermillion(tmp_path: Path, pictured: bool) -> None:
    for shift in (0, 1):
        run(tmp_path / str(shift), RetrievalPictures(queries=4, top=1), Data(shift, pictured))
    correct, wrong = pictures(tmp_path / "0"), pictures(tmp_path / "1")
    assert list(correct) == list(wrong) == ["val-i2t-0.png", "val-t2i-0.png"]
    for name in correct:
        side = 128 + 8  # a frame of 4 pixels around each tile, four queries with one candidate each
        frame = 4 * (side**2 - 128**2)
        assert (framed(correct[name], GREEN), framed(correct[name], VERMILLION)) == (frame, 0)
        assert (framed(wrong[name], GREEN), framed(wrong[name], VERMILLION)) == (0, frame)
        assert correct[name].size == wrong[name].size and correct[name].mode == "RGB"


def test_each_row_shows_its_query_and_candidates_and_tensorboard_gets_both_directions(tmp_path: Path) -> None:
    run(tmp_path, RetrievalPictures(queries=3, top=5), Data(), stage="test")
    one = pictures(tmp_path)["val-i2t-0.png"]
    assert framed(one, VERMILLION) == 4 * framed(one, GREEN) > 0
    # a grey level a sample: the best candidate of each query is the sample itself
    image = np.asarray(one)
    assert set(np.unique(image[..., 0])) >= {0, 4 * 20, 4 * 50}
    for row, index in enumerate((0, 20, 50)):
        y = 63 + 68 + row * ((one.height - 63) // 3)
        assert image[y, 12 + 68, 0] == image[y, 12 + 136 + 12 + 24 + 68, 0] == 4 * index
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["pictures/val-i2t", "pictures/val-t2i"]
    (logged,) = events.Images("pictures/val-i2t")
    assert (logged.width, logged.height) == one.size


def test_nothing_is_drawn_in_the_sanity_check(tmp_path: Path) -> None:
    run(tmp_path, RetrievalPictures(), Data(), stage="fit", num_sanity_val_steps=1, log_every_n_steps=1)
    assert list(pictures(tmp_path)) == ["val-i2t-2.png", "val-t2i-2.png"]


def test_equal_captions_are_queried_and_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    z_ND = torch.eye(6)[[0, 0, 0, 1, 2, 3]]  # the first three have one caption
    key = torch.tensor([5, 5, 5, 6, 7, 8])
    rows = Rows({"image": z_ND, "text": z_ND}, dict.fromkeys(("image", "text"), key > 0), key, torch.arange(6), {})
    shown: list[int] = []

    def cell(data: Any, index: int, *_: Any) -> Cell:
        shown.append(index)
        return Cell(None, "", GREEN)

    monkeypatch.setitem(RetrievalPictures.draw.__globals__, "_cell", cell)
    trainer = run(tmp_path, L.Callback(), Data())
    RetrievalPictures(queries=4, top=3).draw(rows, "image", "text", trainer, "title")
    lines = [shown[n : n + 4] for n in range(0, len(shown), 4)]
    assert [line[0] for line in lines] == [0, 3, 4, 5]  # a query a key
    assert all(len({int(key[n]) for n in line[1:]}) == 3 for line in lines), lines  # three keys retrieved
    shown.clear()  # images of one key are all shown
    RetrievalPictures(queries=1, top=3).draw(rows, "text", "image", trainer, "title")
    assert shown == [0, 0, 1, 2]


def test_tensorboard_gets_three_queries_with_readable_captions(tmp_path: Path) -> None:
    run(tmp_path, RetrievalPictures(queries=6, top=5), Data(), stage="test")
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0})
    events.Reload()
    (logged,) = events.Images("pictures/val-i2t")
    whole = pictures(tmp_path)["val-i2t-0.png"]
    assert logged.width == whole.width and logged.height < 0.6 * whole.height
    scale = min(335 / logged.width, 215 / logged.height)  # into a card of TensorBoard's first page
    assert scale * CAPTIONS[0] > 8

    (caption,) = [
        text for text in sheet([[Cell(None, "apple", GREEN)]], "", "").axes[0].texts if text.get_text() == "apple"
    ]
    assert caption.get_fontsize() == CAPTIONS[0]


def test_captions_of_any_length_and_script_fit(tmp_path: Path) -> None:
    class Wordy(Data):
        def describe(self, index: int) -> str:
            return "supercalifragilisticexpialidocious " * 9 if index else "пёс и кот"

    run(tmp_path, RetrievalPictures(), Wordy(pictured=False))
    assert len(pictures(tmp_path)) == 2


def test_faults_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not two modalities"):
        RetrievalPictures(pair=["image"])
    with pytest.raises(ValueError, match="no embedding of 'sound'; the recipe has image, text"):
        run(tmp_path, RetrievalPictures(pair=["image", "sound"]), Data())
    with pytest.raises(ValueError, match="at least one row"):
        sheet([], "title", "note")


def test_captions_of_any_length_stay_in_their_cells() -> None:
    image = np.full((8, 8, 3), 255, dtype=np.uint8)
    for text in ("supercalifragilisticexpialidocious " * 9, "W" * 60, "a b c d e f g", "costs $5 or $6"):
        for cell in (Cell(image, text, "#ffffff"), Cell(None, text, "#ffffff")):
            drawn = pixels(sheet([[Cell(image, "", "#ffffff"), cell]], "", ""))[63:]
            columns = (drawn.min(axis=(0, 2)) < 200).nonzero()[0]
            assert columns.min() >= 12 + 136 + 12 + 24 and columns.max() < 12 + 136 + 12 + 24 + 136, text


def test_samples_without_images_have_their_captions_in_the_projector(tmp_path: Path) -> None:
    run(tmp_path, Projector(size=48), Data(pictured=False), stage="test")
    (entry,) = config(tmp_path / "tb").embeddings
    with Image.open(tmp_path / "tb" / entry.sprite.image_path) as sprite:
        tile = np.asarray(sprite)[:48, :48]
    assert tile.min() < 100 and (tile == 255).mean() > 0.5


def config(folder: Path) -> ProjectorConfig:
    return text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_tensorboard_reads_the_projector_files(tmp_path: Path, stage: str) -> None:
    run(tmp_path, Projector(size=16), Data(), stage=stage, log_every_n_steps=1)
    folder = tmp_path / "tb"
    (entry,) = config(folder).embeddings
    vectors = np.loadtxt(folder / entry.tensor_path)
    assert vectors.shape == (12, 6) and np.array_equal(vectors[:6], np.eye(6))
    header, *lines = (folder / entry.metadata_path).read_text().splitlines()
    assert header.split("\t") == ["sample", "modality", "key"] and len(lines) == 12
    assert lines[1].split("\t") == ["sample number 10", "image", "10"]
    with Image.open(folder / entry.sprite.image_path) as sprite:
        assert sprite.size == (4 * 16, 4 * 16)  # twelve tiles in a square
        assert sprite.getpixel((16 + 8, 8)) == (40, 40, 40)
    assert list(entry.sprite.single_image_dim) == [16, 16]


def test_the_projector_appends_to_the_entries_of_an_earlier_process(tmp_path: Path) -> None:
    run(tmp_path, Projector(limit=5), Data(), stage="fit", log_every_n_steps=1)
    run(tmp_path, Projector(limit=5), Data(), stage="test")
    entries = {entry.tensor_name: entry for entry in config(tmp_path / "tb").embeddings}
    assert sorted(entries) == ["val:00000", "val:00002"]  # the test's step and the fit's
    for entry in entries.values():
        assert np.loadtxt(tmp_path / "tb" / entry.tensor_path).shape == (4, 6)  # every third of twelve points


def test_a_resumed_fit_writes_the_embeddings_of_before(tmp_path: Path) -> None:
    class Saved(Projector):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            torch.save(self.state_dict(), tmp_path / "state.ckpt")

    class Resumed(Projector):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))

    run(tmp_path / "whole", Saved(limit=5), Data(), stage="fit", log_every_n_steps=1)
    run(tmp_path / "resumed", Resumed(limit=5), Data(), stage="fit", log_every_n_steps=1, limit_val_batches=0)
    whole, resumed = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.tsv")}
        for name in ("whole", "resumed")
    )
    assert whole == resumed and len(whole) == 2
