"""Fields of any name: arrays of npy files and parquet lists, and videos by a decoder that is put in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from descant.datamodules.fields import videos
from descant.datamodules.fields.arrays import ArrayField
from descant.datamodules.fields.fields import Field, Fields
from descant.datamodules.fields.tables import TableField
from descant.datamodules.fields.videos import ENDED, VideoField
from descant.datamodules.sources.arrays import array_bytes, array_of
from descant.datamodules.sources.ledger import Ledger
from descant.datamodules.user.user_data import UserData
from tests.datamodules.batches import whole


class Counting:
    """A video as its number of frames in text; each pixel of frame f is f."""

    def __init__(self, data: bytes) -> None:
        if not data.startswith(b"frames "):
            raise RuntimeError("moov atom\n not found")
        self.frames = int(data.removeprefix(b"frames "))

    def __len__(self) -> int:
        return self.frames

    def at(self, index_F: Sequence[int]) -> Tensor:
        return torch.tensor(list(index_F), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 12, 16)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideoField, "decoder", Counting)


def test_arrays_of_npy_files_and_their_faults() -> None:
    field = ArrayField(width=3, rows=4)
    long = np.arange(30.0).reshape(10, 3)
    bad = [array_bytes([[1.0, 2.0]]), array_bytes([1.0]), array_bytes([[0.0, 0.0, float("inf")]]), b"\x93NUMPY?"]
    short = array_bytes(long[:2])
    x_BTW, errors = field.decode([short, array_bytes(long), None, *bad, short[:-4]], None)
    assert x_BTW.dtype == torch.float32 and x_BTW.shape == (8, 4, 3)
    assert torch.equal(x_BTW[0, :2], torch.arange(6.0).view(2, 3)) and x_BTW[0, 2:].isnan().all()
    assert torch.equal(x_BTW[1, :, 0], torch.tensor([0.0, 9.0, 18.0, 27.0]))
    assert errors[:3] == [None] * 3 and x_BTW[2:].isnan().all()
    assert errors[3:] == [
        "an array [1, 2]: [rows, 3] is wanted",
        "an array [1]: [rows, 3] is wanted",
        "numbers that are not finite",
        "no .npy array",
        "an array of float32 [2, 3] in 20 bytes: whole numbers are wanted",
    ]
    with pytest.raises(ValueError, match=r"no \.npy array|whole numbers"):
        array_of(array_bytes([1.0]).replace(b"<f4", b"|O8"))  # pickled objects
    for order in ("C", "F"):
        assert np.array_equal(array_of(array_bytes(np.asarray(long, order=order))), long)


def test_features_and_points_of_parquet_lists(tmp_path: Path) -> None:
    rows = {
        "caption": [f"number {n}" for n in range(8)],
        "features": [[float(n), 0.5] if n else None for n in range(8)],
        "points": [[[float(k), 0.0, 1.0] for k in range(n + 1)] for n in range(8)],
    }
    kinds = {"features": pa.list_(pa.float32()), "points": pa.list_(pa.list_(pa.float64()))}
    pq.write_table(pa.table({k: pa.array(x, kinds.get(k)) for k, x in rows.items()}), tmp_path / "train.parquet")
    others: dict[str, Field | TableField] = {
        "features": ArrayField(2, field="features"),
        "points": ArrayField(3, rows=4, field="points"),
    }
    data = UserData(path=str(tmp_path / "train.parquet"), fields=Fields(others=others), holdout=0, batch_size=8)
    assert data.modalities == ("features", "points")
    batch = whole(data.training_set())
    assert batch.present["features"].tolist() == [False] + [True] * 7 and batch.present["points"].all()
    assert torch.equal(batch.inputs["features"][1:, 0], torch.arange(1.0, 8))
    assert (~batch.inputs["points"].isnan().any(2)).sum(1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4]


def test_videos_of_a_folder_are_read_by_the_decoder(decoder: None, tmp_path: Path) -> None:
    for name, content in {"a": b"frames 10", "b": b"frames 2", "c": b"frames 0", "d": b"text", "e": b""}.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        (tmp_path / f"{name}.txt").write_text(name)
    fields = Fields(others={"video": VideoField(frames=4, size=8)})
    data = UserData(path=str(tmp_path), fields=fields, holdout=0.0, batch_size=2, num_workers=0)
    data.__dict__["ledger"] = Ledger(tmp_path / "run")
    video = whole(data.bank_set())
    assert video.inputs["video"].dtype == torch.int16 and video.inputs["video"].shape == (5, 4, 3, 8, 8)
    assert video.inputs["video"][:, :, 0, 0, 0].tolist()[:2] == [[0, 3, 6, 9], [0, 1, ENDED, ENDED]]
    assert video.present["video"].tolist() == [True, True, False, False, False]
    assert [(loss["sample"], loss["why"]) for loss in data.ledger.read_lines()] == [
        ("c.mp4", "video: a video without a frame"),
        ("d.mp4", "video: no video: moov atom not found"),
        ("e.mp4", "video: an empty file"),
    ]
    ready = data.on_after_batch_transfer(video, 0).inputs["video"]
    assert [round(255 * x / 2) for x in (ready[1, :2, 0, 0, 0] + 1).tolist()] == [0, 1]
    assert ready[1, 2:].isneginf().all() and ready[0].isfinite().all()


def test_frames_of_arrays_and_what_is_no_video(decoder: None) -> None:
    frames = np.arange(3)[:, None, None, None] * np.ones((3, 3, 6, 4))
    x_BF3SS, errors = VideoField(frames=3, size=4).decode([array_bytes(frames), array_bytes(frames[:, :1])], None)
    assert x_BF3SS[0, :, 0, 0, 0].tolist() == [0, 1, 2] and errors[0] is None
    assert errors[1] == "no video: an array [3, 1, 6, 4], and frames are [frames, 3, height, width]"
    with pytest.raises(ValueError, match="frames 0: 1 is the least"):
        VideoField(frames=0)
    with pytest.raises(ValueError, match="width 0: 1 is the least"):
        ArrayField(width=0)


def test_without_torchcodec_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchcodec", None)
    with pytest.raises(ValueError, match=r"videos need torchcodec and FFmpeg.*: pip install 'descant\[video\]'"):
        VideoField()
    assert videos.TorchCodec is VideoField.decoder


def test_tiny_data_and_names(decoder: None) -> None:
    others: dict[str, Field | TableField] = {
        "video": VideoField("mp4", frames=3, size=8),
        "points": ArrayField(3, rows=5, field="xyz"),
    }
    others["features"] = ArrayField(4, field="npy")
    batch = next(iter(UserData(tiny=True, fields=Fields(others=others), batch_size=4).train_dataloader()))
    assert {m: tuple(x.shape[1:]) for m, x in batch.inputs.items()} == {
        "video": (3, 3, 8, 8),
        "points": (5, 3),
        "features": (4,),
    }
    with pytest.raises(ValueError, match="others: table is the name of a TableField"):
        Fields(others={"table": ArrayField(3)})
