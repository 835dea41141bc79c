"""Time series: gaps and lengths are masks, fields read stretches, the corpus is standardised by its training part."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from descant.datamodules.corpora.series import Series
from descant.datamodules.fields.fields import Fields, TextField
from descant.datamodules.fields.series import SeriesField
from descant.datamodules.prepare.package import sha256_of
from descant.datamodules.prepare.series import parse
from descant.datamodules.sources.arrays import array_bytes
from descant.modules.towers import SeriesTower
from descant.modules.towers.image import sincos
from descant.modules.transforms.series import SeriesAugment
from tests.conftest import Result
from tests.tolerance import F64, rounding

CLOSE = rounding(64, F64)  # a block over at most 16 tokens of 8 numbers
every = pytest.mark.parametrize("options", [{}, {"mix": "none"}, {"scale": True}, {"mix": "none", "scale": True}])


def tower(**options: Any) -> SeriesTower:
    torch.manual_seed(0)
    return SeriesTower(**{"channels": 2, "patch": 4, "width": 8, "depth": 1, "heads": 2, **options}).double().eval()


def series(steps: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(3, 2, steps, generator=torch.Generator().manual_seed(seed)).double()


@every
def test_padding_and_gaps_are_masks(options: dict[str, Any]) -> None:
    model, x_BWT = tower(**options), series()
    short = model(x_BWT)
    long = model(torch.cat([x_BWT, torch.full((3, 2, 30), torch.nan).double()], dim=2))
    at = long.mask_BT[0].nonzero()[:, 0]
    assert len(at) == short.mask_BT.shape[1] and not long.h_BTD[~long.mask_BT].any()
    torch.testing.assert_close(long.h_BTD[:, at], short.h_BTD, **CLOSE)
    masked = model(x_BWT, torch.arange(10).expand(3, -1) < 4)
    only = model(x_BWT[:, :, :4])
    torch.testing.assert_close(masked.h_BTD[masked.mask_BT], only.h_BTD[only.mask_BT], **CLOSE)
    gone = x_BWT.clone()
    gone[:, :, 4:8] = torch.nan
    assert model(gone).mask_BT.sum() == short.mask_BT.sum() * 2 / 3  # one of three patches, in each channel
    gone[0] = torch.nan
    assert model(gone).h_BTD.isfinite().all() and not model(gone).mask_BT[0].any()


def test_a_patch_reads_its_numbers_whether_they_are_there_and_its_place() -> None:
    model, x_BWT = tower(depth=0, mean=1.0, spread=2.0), series(8)
    x_BWT[0, 1, 5] = torch.nan
    real = x_BWT.isfinite()
    value = torch.where(real, (x_BWT - 1) / 2, 0.0)
    read = [torch.cat([torch.cat([value[0, w, 4:8], real[0, w, 4:8]]) for w in (0, 1)])]
    by_hand = model.norm(model.inward(torch.stack(read)) + sincos([2], 8)[1].double())
    torch.testing.assert_close(model(x_BWT).h_BTD[0, 1], by_hand[0], **CLOSE)
    torch.testing.assert_close(model.encode(model.embed(x_BWT)), model(x_BWT).h_BTD, **CLOSE)


def test_scaled_series_differ_in_their_statistics_alone() -> None:
    model = tower(scale=True)
    x_BWT = series(8)
    a_BTF, b_BTF = (model.patches(x)[0].view(3, 2, 2, 10) for x in (x_BWT, x_BWT * 7 + 3))
    torch.testing.assert_close(a_BTF[..., :8], b_BTF[..., :8], **CLOSE)
    std_BW = x_BWT.std(dim=2, correction=0)
    torch.testing.assert_close(b_BTF[:, 0, :, 9], (7 * std_BW).log(), **CLOSE)
    assert model(torch.ones(1, 2, 8).double()).h_BTD.isfinite().all()  # a constant channel


def test_bad_series_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"series \(3, 10\): this tower takes 2 channels, then steps"):
        tower()(torch.zeros(1, 3, 10))
    with pytest.raises(ValueError, match="patch 0: at least 1 of each"):
        tower(patch=0)
    field = SeriesField(channels=2, steps=4)
    raw = [array_bytes(np.full(shape, value)) for shape, value in (((5, 3), 0), ((2, 5), 0), ((5, 2), np.nan))]
    raw += [array_bytes(np.full((5, 2), np.inf)), b"no array"]
    assert field.decode(raw, None)[1] == [
        "an array [5, 3]: [steps, 2] is wanted",
        "an array [2, 5]: [steps, 2] is wanted; turn it: [5, 2]",
        "no number, only gaps",
        "infinite numbers; nan is a gap",
        "no .npy array",
    ]


def test_a_field_takes_a_random_stretch_in_training_and_the_beginning_in_evaluation() -> None:
    field, long = SeriesField(channels=1, steps=4), array_bytes(np.arange(20.0))
    x_BWT, errors = field.decode([long] * 50, np.arange(50))
    assert errors == [None] * 50 and x_BWT.shape == (50, 1, 4)
    first_B = x_BWT[:, 0, 0]
    assert torch.equal(x_BWT[:, 0], first_B[:, None] + torch.arange(4)) and {0.0, 16.0} <= {*first_B.tolist()}
    assert field.decode([long], None)[0].tolist() == [[[0.0, 1.0, 2.0, 3.0]]]
    assert Fields(text=TextField(), others={"pulse": field}).of["pulse"] is field


def test_augmented_series_hang_on_their_key_alone() -> None:
    augment, x_BWT = SeriesAugment(0.1, 0.1, 0.5), torch.ones(4, 2, 40)
    whole, part = augment(x_BWT, torch.arange(4)), augment(x_BWT[2:], torch.tensor([2, 3]))
    torch.testing.assert_close(whole[2:], part, equal_nan=True, atol=0, rtol=0)  # the same numbers
    gaps_B = whole.isnan()[:, 0].sum(dim=1)
    assert torch.equal(whole.isnan()[:, 0], whole.isnan()[:, 1]) and 0 < int(gaps_B.max()) <= 20


# the corpus -----------------------------------------------------------------------------------------------------------


def wheel(path: Path, lines: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for part in ("TRAIN", "TEST"):
            archive.writestr(f"aeon/datasets/data/BasicMotions/BasicMotions_{part}.ts", "\n".join(lines))
    return path


def test_the_corpus_is_standardised_by_its_training_series_and_split_without_overlap(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    channels = [[",".join(map(str, 5 + 3 * random.normal(size=9).round(3))) for _ in range(6)] for _ in range(12)]
    lines = ["@problemName x", "@data", *(":".join([*row, "ab"[n % 2]]) for n, row in enumerate(channels))]
    file = wheel(tmp_path / "a.whl", lines)
    data = Series(
        "BasicMotions",
        {"acceleration": [0, 1, 2], "rotation": [5]},
        wheel=str(file),
        accept=[sha256_of(file)],
        cache=str(tmp_path / "cache"),
    )
    data.prepare_data()
    assert data.inputs["acceleration"].shape == (24, 3, 9) and data.classes == {"label": ["a", "b"]}
    flat_W = data.inputs["acceleration"][:12].transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat_W.mean(dim=1), torch.zeros(3), atol=1e-6, rtol=0)  # of float32
    torch.testing.assert_close(flat_W.std(dim=1, correction=0), torch.ones(3), atol=1e-5, rtol=0)  # of float32
    ids = [set(id_N.tolist()) for id_N in data.splits.values()]
    assert set.union(*ids) == {*range(24)} and sum(map(len, ids)) == 24 and ids[2] == {*range(12, 24)}


def test_bad_corpora_are_named() -> None:
    with pytest.raises(ValueError, match=r"dataset: .*BasicMotion.*; did you mean BasicMotions\?|BasicMotions"):
        Series("BasicMotion")
    with pytest.raises(ValueError, match=r"groups: a \[6\]: BasicMotions has channels 0 to 5"):
        Series("BasicMotions", {"a": [6]})
    with pytest.raises(ValueError, match=r"a.ts:3: no series of numbers, with channels of one length"):
        parse("@data\n1,2:3,4:up\n1,2:3:up", "a.ts")
    with pytest.raises(ValueError, match=r"a.ts:3: 1 channels, where the first series has another number"):
        parse("@data\n1,2:3,4:up\n1,2:up", "a.ts")
    with pytest.raises(ValueError, match=r"a.ts: no series behind a line @data"):
        parse("1,2:3,4:up", "a.ts")


# from files -----------------------------------------------------------------------------------------------------------

OWN = """# Series of a sensor and captions.
model:
  class_path: Contrastive
  init_args:
    width: 8
    towers:
      class_path: Towers
      init_args:
        text: {class_path: BagTower, init_args: {vocab: 8192, width: 8}}
        others: {pulse: {class_path: SeriesTower, init_args: {channels: 2, patch: 5, width: 8, depth: 1, heads: 2}}}
data:
  class_path: UserData
  init_args:
    path: own
    batch_size: 8
    fields:
      class_path: Fields
      init_args:
        text: {class_path: TextField}
        others: {pulse: {class_path: SeriesField, init_args: {field: file, channels: 2, steps: 20}}}
        labels: {rate: {class_path: NumberField, init_args: {field: rate}}}
trainer:
  max_steps: 2
  max_epochs: -1
  accelerator: cpu
  precision: 32-true
  callbacks+: [{class_path: NumberProbe, init_args: {target: rate, modality: pulse}}]
"""


def test_from_npy_files_and_a_csv_to_parquet(cli: Callable[..., Result], workplace: Path) -> None:
    """Series of several lengths, one with a gap; arrays that lie the other way are refused with what to do."""
    (workplace / "own.yaml").write_text(OWN)
    (workplace / "own").mkdir()
    random, rows = np.random.default_rng(0), ["file,caption,rate,split"]
    for n in range(24):
        x_TW = random.normal(size=(int(random.integers(5, 40)), 2)).astype(np.float32)
        x_TW[2, 1] = np.nan
        np.save(workplace / f"own/{n}.npy", x_TW)
        rows.append(f"{n}.npy,wave {n},{n}.5,{'val' if n % 3 == 0 else 'train'}")
    (workplace / "own/table.csv").write_text("\n".join(rows))
    done = cli("fit", "--config", "own.yaml", "--name", "s")
    assert done.rc == 0, done.err
    done = cli("predict", "--run", "s/001", "--data.path", "own")
    assert done.rc == 0 and "left out, since it is fitted on training samples: NumberProbe" in done.err
    (file,) = (workplace / "runs/s/001/predict-001").glob("*.parquet")
    assert len(pq.read_table(file).column("z_pulse").drop_null()) == 24
    for n in range(24):
        np.save(workplace / f"own/{n}.npy", np.load(workplace / f"own/{n}.npy").T)
    refused = cli("fit", "--config", "own.yaml").refusal
    assert refused.startswith("own/") and "[steps, 2] is wanted; turn it: [" in refused
