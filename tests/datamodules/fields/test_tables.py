"""Tables with missing cells: codes of training, hidden columns, CSV and parquet beside images, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.emoji_table import COLUMNS, NUMBERS
from descant.datamodules.fields.fields import Fields, ImageField, LabelField
from descant.datamodules.fields.tables import TableField
from descant.datamodules.sampling.resumable_sampler import Order
from descant.datamodules.sources.folder import Folder
from descant.datamodules.sources.joined import Joined
from descant.datamodules.user.user_data import UserData
from descant.modules.transforms.table import ColumnMissing, random_columns
from tests.conftest import Result
from tests.files import jpeg
from tests.tolerance import F32, statistical, ulps

NAN = float("nan")
AGES = [float(i) if i % 5 else NAN for i in range(40)]
CITIES = [("ulm", "bonn", "kiel")[i % 3] if i % 7 else "" for i in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))


def rows(**columns: list[Any]) -> dict[str, list[Any]]:
    """Forty samples by file: 0 to 27 of training, 28 to 39 of validation."""
    own: dict[str, list[Any]] = {"file": [f"{i:03}.jpg" for i in range(40)], "split": ["train"] * 28 + ["val"] * 12}
    own |= {"age": ["" if age != age else f"{age:g}" for age in AGES], "city": CITIES}
    return own | {"ill": ["yes" if i % 2 else "no" for i in range(40)]} | columns


def folder(root: Path, content: dict[str, list[Any]], name: str = "data.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for file in content["file"][:40]:
        (root / file).write_bytes(jpeg("red", (12, 12)))
    table = pa.table({key: pa.array(values) for key, values in content.items()})
    pq.write_table(table, root / name) if name.endswith("parquet") else pyarrow.csv.write_csv(table, root / name)
    return root


def data_of(
    path: Path, columns: tuple[str, ...] = ("age", "city"), table: Path | None = None, **options: Any
) -> UserData:
    field = TableField(list(columns), **options)
    image = ImageField(size=8, field="file" if table is None else "image")
    fields = Fields(image, labels={"ill": LabelField("ill")}, table=field)
    more: dict[str, Any] = {} if table is None else {"table": str(table)}
    return UserData(path=str(path), fields=fields, batch_size=8, num_workers=0, **more)


def cells(data: UserData, split: str = "train") -> Tensor:
    source, row_N = data.splits[split]
    return data.readers[source].cells["table"].x_NC[row_N]


def test_numbers_and_categories_are_those_of_training(tmp_path: Path) -> None:
    data = data_of(folder(tmp_path / "d", rows()))
    x_NC, age_N = cells(data), np.array(AGES)
    train = age_N[:28][~np.isnan(age_N[:28])]
    expected = torch.tensor((age_N - train.mean()) / train.std())
    for split, part in (("train", slice(28)), ("val", slice(28, 40))):
        z_N = cells(data, split)[:, 0].double()
        torch.testing.assert_close(z_N, expected[part], rtol=0, atol=ulps(4, F32), equal_nan=True)
    codes = [{"bonn": 0.0, "kiel": 1.0, "ulm": 2.0}.get(city, NAN) for city in CITIES]
    torch.testing.assert_close(x_NC[:, 1], torch.tensor(codes[:28]), rtol=0, atol=0, equal_nan=True)
    assert data.table_columns == {"table": [0, 3]} and data.modalities == ("image", "table")
    batch = next(iter(data.train_dataloader()))
    at_B = batch.index[batch.present["image"]]
    assert torch.equal(batch.inputs["table"][batch.present["image"]].isnan(), x_NC[at_B].isnan())
    assert (
        batch.present["table"].tolist() == (~batch.inputs["table"].isnan().all(dim=1) & batch.present["image"]).tolist()
    )


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.parquet"])
def test_a_table_that_pyarrow_joins_equals_one_that_names_the_images(tmp_path: Path, name: str) -> None:
    """Rows in another order, one without its image, one image without a row; labels and splits come from it too."""
    content = rows()
    plain = data_of(folder(tmp_path / "plain", content))
    order = [*reversed(range(39)), 3]
    other = {key: [values[i] for i in order] for key, values in content.items()}
    other["file"][-1] = "nobody.jpg"
    beside = folder(tmp_path / "beside", content, "old.csv")
    (beside / "old.csv").unlink()
    table = pa.table(other)
    if name.endswith("parquet"):
        pq.write_table(table, beside / name)
    else:
        pyarrow.csv.write_csv(table, beside / name, pyarrow.csv.WriteOptions(delimiter="\t" if "tsv" in name else ","))
    (beside / "nobody.jpg").unlink(missing_ok=True)
    joined = data_of(beside, table=beside / name)
    source = joined.sources["train"]
    assert isinstance(source, Joined) and source.unmatched == 1 and len(source) == 40
    # the sample without a row is in no split, so of training, as the last one there
    for split, part in (("train", slice(28)), ("val", slice(11))):
        both = [cells(data, split)[part].nan_to_num(99) for data in (joined, plain)]
        assert torch.equal(*both)
    assert bool(cells(joined)[28].isnan().all()) and len(cells(joined)) == 29
    assert joined.state_dict()["codes"] == plain.state_dict()["codes"]
    assert source.read(1, ["city", "image"]).keys() == {"city", "image"} and source.read(0, ["city"]) == {}
    assert source.origin("city") == str(beside / name) and "train table" in joined.known_corpora


def test_codes_of_a_checkpoint_serve_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = data_of(folder(tmp_path / "d", rows())).state_dict()
    new = folder(tmp_path / "n", rows(age=["7"] * 40, city=["kiel", "mainz", "NA", "?"] * 10))
    other = data_of(new)
    other.load_state_dict(state)
    x_NC = cells(other, "val")
    assert bool((x_NC[:, 0] == x_NC[0, 0]).all()) and x_NC[:4, 1].nan_to_num(-1).tolist() == [1.0, -1.0, -1.0, -1.0]
    err = capsys.readouterr().err
    line = "column city: 10 cells have categories that training lacks, such as 'mainz': they count as missing"
    assert err.count(line) == 1 and other.table_columns == {"table": [0, 3]}
    assert cells(other, "val") is not x_NC and "mainz" not in capsys.readouterr().err


BAD: list[tuple[dict[str, list[Any]], dict[str, Any], str]] = [
    ({"age": ["4"] * 28 + ["5"] * 12}, {}, r"column age: one value \(4.0\) in training: leave it out of columns"),
    ({"city": ["ulm"] * 40}, {}, r"column city: one value \('ulm'\) in training: leave it out of columns"),
    ({"city": [""] * 40}, {}, r"column city: no value in training: leave it out of columns"),
    ({"city": [f"c{i}" for i in range(40)]}, {"most": 20}, r"column city: 28 categories, more than 20: leave it out"),
    (
        {"age": [*map(str, range(39)), "old"]},
        {},
        r"column age: 'old' of 039.jpg is text where numbers were: correct it, or name age in the table's categ",
    ),
    ({}, {"columns": ("age", "citty")}, r"no column 'citty'; nearest: city; an empty column of this name is read as"),
]


@pytest.mark.parametrize(("columns", "options", "line"), BAD)
def test_bad_columns_name_file_and_column(
    tmp_path: Path, columns: dict[str, list[Any]], options: dict[str, Any], line: str
) -> None:
    path = folder(tmp_path / "d", rows(**columns))
    with pytest.raises(ValueError, match=rf"^{path / 'data.csv'}: {line}") as error:
        _ = data_of(path, **options).codes
    assert "\n" not in str(error.value)


def test_bad_tables_are_one_line(tmp_path: Path) -> None:
    def refused(content: dict[str, list[Any]], line: str, key: str | None = None) -> None:
        table = tmp_path / "t.csv"
        pyarrow.csv.write_csv(pa.table(content), table)
        with pytest.raises(ValueError, match=rf"^{table}: {line}"):
            Joined(source, table, key)

    source = Folder(folder(tmp_path / "d", rows()))
    refused({"file": ["000.jpg", "000.jpg"], "x": [1, 2]}, "column file: 2 rows of '000.jpg'; keep one")
    refused(
        {"file": ["a.jpg", "b.jpg"]}, "column file: no row names a sample: it has 'a.jpg', and a sample is named '000"
    )
    refused({"x": [1, 2]}, r"no column holds names of files \(such as a.jpg\), among x; name one as key")
    refused({"file": ["000.jpg"]}, "no column 'fil'; nearest: file", "fil")
    (tmp_path / "t.csv").write_text("file,x\n000.jpg,1\n001.jpg\n")
    with pytest.raises(ValueError, match=r"t.csv: not a readable table \(CSV parse error: .*Expected 2 colu"):
        Joined(source, tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"no such table; nearest: t.csv"):
        Joined(source, tmp_path / "tt.csv")


def test_later_rows_of_another_type_and_line_breaks_in_cells(tmp_path: Path) -> None:
    """A CSV is read by the types of its first block of a megabyte, and anew where these do not hold."""
    source, n = Folder(folder(tmp_path / "d", rows())), 60_000
    lines = [f'{k:03}.jpg,{k if k < n - 1 else 2.5},"{"word " * 3}{k % 2}"' for k in range(n)]
    lines[39] = '039.jpg,3,"two\nlines"'
    (tmp_path / "t.csv").write_text("\n".join(["file,x,text", *lines]))
    joined = Joined(source, tmp_path / "t.csv")
    assert joined.values("x").type == pa.float64() and joined.texts("text")[39] == "two\nlines"
    assert joined.texts("x")[:3] == ["0", "1", "2"]


# hidden columns ------------------------------------------------------------------------------------------------------


def test_exactly_the_rate_of_the_columns_is_hidden() -> None:
    key_N = np.arange(4000)
    for columns, rate in ((10, 0.6), (21, 0.3), (5, 0.5), (7, 0.0), (3, 1.0)):
        x_NC = ColumnMissing(rate)(torch.zeros(len(key_N), columns), key_N, training=True)
        assert bool((x_NC.isnan().sum(dim=1) == round(rate * columns)).all())
    hidden_NC = random_columns(key_N, 10, 6, "hide")
    # the count of a column is binomial of 4000 draws with the probability 0.6
    assert bool(((hidden_NC.double().mean(0) - 0.6).abs() < statistical(0.24**0.5, 4000)).all())
    pairs = (hidden_NC[:, 0] & hidden_NC[:, 1]).double().mean()
    assert abs(float(pairs) - 6 * 5 / 90) < statistical(0.5, 4000)
    assert torch.equal(random_columns(key_N[5:9], 10, 6, "hide"), hidden_NC[5:9])  # a function of the key alone


def test_training_evaluation_and_whole_columns() -> None:
    x_BC, key_B, missing = torch.zeros(6, 10), np.arange(6), ColumnMissing(0.3, evaluation=0.8)
    assert missing(x_BC, key_B, training=True).isnan().sum(dim=1).tolist() == [3] * 6
    assert missing(x_BC, key_B, training=False).isnan().sum(dim=1).tolist() == [8] * 6
    whole = ColumnMissing(0.4, whole=True)
    hidden = [whole(x_BC, keys, training).isnan() for keys in (key_B, key_B + 99) for training in (True, False)]
    assert all(torch.equal(h, hidden[0]) and torch.equal(h, h[:1].expand(6, 10)) for h in hidden)
    with pytest.raises(ValueError, match=r"rate 1.5: a share of the columns, from 0 to 1"):
        ColumnMissing(1.5)


def test_ranks_and_a_resumed_run_hide_the_same_cells(tmp_path: Path) -> None:
    data = data_of(folder(tmp_path / "d", rows()), missing=ColumnMissing(0.5)).training_set()

    def seen(epoch: int, **cut: Any) -> dict[int, list[float]]:
        batches = [data[window] for window in Order(len(data), 8, 0, epoch=epoch, **cut)]
        real = [(b, k) for b in batches for k in range(len(b)) if b.present["image"][k]]
        return {int(b.index[k]): b.inputs["table"][k].nan_to_num(99).tolist() for b, k in real}

    whole = seen(1)
    assert seen(1, world=2, rank=0) | seen(1, world=2, rank=1) == whole and len(whole) == 28
    later = seen(1, first=2)
    assert later.items() <= whole.items() and 0 < len(later) < 28
    assert seen(2) != whole and seen(1) == whole


# the emoji's table ---------------------------------------------------------------------------------------------------


def test_the_emoji_table_has_holes_and_standardised_numbers() -> None:
    data = Emoji(tiny=True, table=True, paired=True, batch_size=8, size=16)
    training = data.training_set()
    x_NC = torch.stack([data.cells[int(v)][c] for c, v in zip(training.concept_N, training.vendor_N, strict=True)])
    count_C = (~x_NC.isnan()).sum(dim=0)
    mean_C = x_NC.double().nan_to_num(0.0).sum(dim=0) / count_C
    square_C = x_NC.double().square().nan_to_num(0.0).sum(dim=0) / count_C
    numbers = slice(len(NUMBERS))
    torch.testing.assert_close(mean_C[numbers], torch.zeros(17, dtype=torch.float64), rtol=0, atol=ulps(64, F32))
    torch.testing.assert_close(square_C[numbers], torch.ones(17, dtype=torch.float64), rtol=0, atol=ulps(64, F32))
    for c, categories in enumerate(COLUMNS):
        codes = x_NC[:, c][~x_NC[:, c].isnan()]
        assert not categories or (bool((codes == codes.long()).all()) and codes.min() >= 0 and codes.max() < categories)
    share = float(x_NC.isnan().double().mean())
    assert 0.02 < share < 0.15 and data.table_columns == {"table": COLUMNS}
    sets = data.evaluation_sets("test")
    both = sets["both"][next(iter(Order(len(sets["both"]), 8, 0, shuffle=False)))]
    assert both.inputs["table"].shape[1] == 21 and torch.equal(both.present["table"], both.present["image"])


def test_emoji_cells_are_hidden_in_training_and_in_every_set() -> None:
    data = Emoji(tiny=True, table=True, missing=ColumnMissing(1.0, evaluation=0.6), paired=True, batch_size=8, size=16)
    one = next(iter(data.train_dataloader()))
    assert bool(one.inputs["table"].isnan().all())
    for loader in data.test_dataloader():
        batch = next(iter(loader))
        assert bool((batch.inputs["table"].isnan().sum(dim=1) >= 13).all())
        assert bool((~batch.inputs["table"].isnan()).any())


# a run ---------------------------------------------------------------------------------------------------------------


def test_a_run_predicts_a_new_file_by_its_own_codes(cli: Callable[..., Result], workplace: Path) -> None:
    """The means of training come from the checkpoint; a number of categories that does not fit is one line."""
    folder(workplace / "d", rows())
    folder(workplace / "new", rows(age=["7"] * 40, city=["kiel"] * 20 + ["mainz"] * 20, split=["test"] * 40))
    (workplace / "own.yaml").write_text(
        """
model:
  class_path: Fusion
  init_args:
    target: ill
    classes: 2
    width: 8
    towers:
      class_path: Towers
      init_args:
        image: {class_path: ConvTower, init_args: {widths: [8], stem: 4}}
        table: {class_path: TableTower, init_args: {columns: [0, 3], width: 8, depth: 1, heads: 2}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: UserData
  init_args:
    path: d
    batch_size: 8
    num_workers: 0
    fields:
      class_path: Fields
      init_args:
        image: {class_path: ImageField, init_args: {size: 8, field: file}}
        table: {class_path: TableField, init_args: {columns: [age, city]}}
        labels: {ill: {class_path: LabelField, init_args: {field: ill}}}
trainer: {accelerator: cpu, devices: 1, max_steps: 2, max_epochs: -1, precision: 32-true}
"""
    )
    wrong = cli("fit", "--config", "own.yaml", "--name", "t", "--model.towers.table.columns", "[0,0]")
    assert "model.towers: table: columns [0, 0]: the data's table has [0, 3]" in wrong.err
    done = cli("fit", "--config", "own.yaml", "--name", "t")
    assert done.rc == 0, done.err
    run = sorted(path.name for path in (workplace / "runs/t").iterdir() if path.is_dir() and path.name.isdigit())[-1]
    result = cli("predict", "--run", f"t/{run}", "--data.path", "d", "--data.test", "Folder", "--data.test.root", "new")
    assert result.rc == 0 and "such as 'mainz'" in result.err, result.err
    (file,) = (workplace / f"runs/t/{run}/predict-001").glob("*.parquet")
    z_ND = np.stack(pq.read_table(file)["z_table"].to_pylist())
    assert len(z_ND) == 40 and len(np.unique(z_ND.round(4), axis=0)) == 2  # kiel, and a missing city
    assert cli("predict", "--run", f"t/{run}", "--data.path", "new").rc == 0
    (file,) = (workplace / f"runs/t/{run}/predict-002").glob("*.parquet")
    np.testing.assert_array_equal(np.stack(pq.read_table(file)["z_table"].to_pylist()), z_ND)


def test_a_sample_has_two_tables(tmp_path: Path) -> None:
    place = folder(tmp_path / "d", rows(), "data.csv")
    ages = TableField(["age"])
    fields = Fields(ImageField(size=8, field="file"), table=TableField(["city"]), others={"ages": ages})
    data = UserData(path=str(place), fields=fields, batch_size=8, num_workers=0)
    assert data.modalities == ("image", "table", "ages") and data.table_columns == {"table": [3], "ages": [0]}
    one = data_of(place, columns=("age",))
    assert torch.equal(
        data.readers["train"].cells["ages"].x_NC.nan_to_num(9), one.readers["train"].cells["table"].x_NC.nan_to_num(9)
    )
    batch = next(iter(data.train_dataloader()))
    for m in ("table", "ages"):
        here_B = ~batch.inputs[m].isnan().all(dim=1) & batch.present["image"]
        assert torch.equal(batch.present[m], here_B) and batch.inputs[m].shape == (8, 1)
    state, other = data.state_dict(), UserData(path=str(place), fields=fields, batch_size=8, num_workers=0)
    other.load_state_dict(state)
    assert {name: str(code) for name, code in other.codes.items()} and list(other.codes) == ["city", "age"]
    with pytest.raises(ValueError, match="column age is in two tables; name it in one of them"):
        Fields(table=TableField(["city", "age"]), others={"ages": ages})
