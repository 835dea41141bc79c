"""Sixty mistakes with data of sensors and tables: `descant check` names the place and what to do, before any step."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Result, captured, settings_kept
from tests.rotation import quick

COUNT = 24
COMMON = """\
trainer:
  accelerator: cpu
  max_steps: 20
  max_epochs: -1
  check_val_every_n_epoch: 2
  log_every_n_steps: 5
"""
#: A classifier of series, a regression of a table, and pairs of series and texts.
EXPERIMENTS = {
    "classes.yaml": """\
model:
  class_path: Fusion
  init_args:
    target: kind
    classes: 3
    width: 16
    towers:
      class_path: Towers
      init_args:
        others:
          motion: {class_path: SeriesTower, init_args: {channels: 3, patch: 5, width: 16, depth: 1, heads: 2}}
data:
  class_path: UserData
  init_args:
    path: good
    batch_size: 8
    num_workers: 0
    split: split
    fields:
      class_path: Fields
      init_args:
        others:
          motion: {class_path: SeriesField, init_args: {channels: 3, steps: 24, field: motion}}
        labels:
          kind: {class_path: LabelField, init_args: {field: kind}}
"""
    + COMMON
    + """\
  callbacks+:
    - class_path: Accuracy
    - {class_path: LinearProbe, init_args: {target: kind, modality: motion}}
""",
    "number.yaml": """\
model:
  class_path: Regression
  init_args:
    target: age
    width: 16
    towers:
      class_path: Towers
      init_args:
        table: {class_path: TableTower, init_args: {columns: [0, 3], width: 16, depth: 1, heads: 2}}
data:
  class_path: UserData
  init_args:
    path: rows
    batch_size: 8
    num_workers: 0
    split: split
    fields:
      class_path: Fields
      init_args:
        table: {class_path: TableField, init_args: {columns: [height, city]}}
        labels:
          age: {class_path: NumberField, init_args: {field: age}}
"""
    + COMMON
    + """\
  callbacks+:
    - class_path: NumberErrors
    - {class_path: NumberProbe, init_args: {target: age, modality: table}}
""",
    "pairs.yaml": """\
model:
  class_path: Contrastive
  init_args:
    width: 16
    towers:
      class_path: Towers
      init_args:
        text: {class_path: TextTower, init_args: {vocab: 264, width: 16, depth: 1, heads: 2, length: 16}}
        others:
          motion: {class_path: SeriesTower, init_args: {channels: 3, patch: 5, width: 16, depth: 1, heads: 2}}
    loss: {class_path: InfoNCE}
data:
  class_path: UserData
  init_args:
    path: good
    batch_size: 8
    num_workers: 0
    split: split
    fields:
      class_path: Fields
      init_args:
        text:
          class_path: TextField
          init_args: {captions: words, tokenizer: {class_path: ByteTokenizer, init_args: {length: 16}}}
        others:
          motion: {class_path: SeriesField, init_args: {channels: 3, steps: 24, field: motion}}
"""
    + COMMON
    + """\
  callbacks+:
    - {class_path: Retrieval, init_args: {pairs: [[motion, text]]}}
""",
}
MOTION, TABLE = "data.fields.others.motion.init_args", "data.fields.table"
Rows = list[dict[str, str]]


def rows_of() -> Rows:
    """24 recordings of three kinds of motion: 16 to train on, 4 to validate, 4 to test."""
    return [
        {
            "motion": f"m{k}.npy",
            "other": f"o{k}.npy",
            "words": f"motion {k}",
            "kind": ("walk", "run", "rest")[k % 3],
            "age": f"{20 + k}.5",
            "height": f"{150 + k}",
            "city": ("Bonn", "Jena")[k % 2],
            "split": "train" if k < 16 else "val" if k < 20 else "test",
        }
        for k in range(COUNT)
    ]


def array(k: int, steps: int = 20, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(k).standard_normal((steps + k % 5, channels)).astype(np.float32)


def write_rows(folder: Path, rows: Rows, name: str = "rows.csv") -> None:
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_good(folder: Path, table_alone: bool = False) -> None:
    folder.mkdir()
    rows = rows_of()
    if table_alone:
        rows = [{name: text for name, text in row.items() if name not in ("motion", "other")} for row in rows]
    for k in range(0 if table_alone else COUNT):
        np.save(folder / f"m{k}.npy", array(k))
        np.save(folder / f"o{k}.npy", np.zeros(4, dtype=np.float32))
    write_rows(folder, rows)


Change = Callable[[Path], None]


def cells(**to: Callable[[int, str], str] | str) -> Change:
    """Change columns of the table: ``name=function of row number and text``, or one text for all rows."""

    def change(folder: Path) -> None:
        rows = rows_of() if (folder / "m0.npy").exists() else list(csv.DictReader((folder / "rows.csv").open()))
        for name, new in to.items():
            for k, row in enumerate(rows):
                row[name] = new if isinstance(new, str) else new(k, row.get(name, ""))
        write_rows(folder, rows)

    return change


def saved(make: Callable[[int], np.ndarray], which: slice | range = range(COUNT), name: str = "m") -> Change:
    """Write arrays anew, of all samples or of some."""

    def change(folder: Path) -> None:
        for k in range(COUNT) if isinstance(which, slice) else which:
            np.save(folder / f"{name}{k}.npy", make(k), allow_pickle=True)

    return change


def raw(data: bytes, which: range = range(COUNT)) -> Change:
    def change(folder: Path) -> None:
        for k in which:
            (folder / f"m{k}.npy").write_bytes(data)

    return change


def removed(which: range) -> Change:
    def change(folder: Path) -> None:
        for k in which:
            (folder / f"m{k}.npy").unlink()

    return change


def lines(edit: Callable[[list[str]], list[str]]) -> Change:
    def change(folder: Path) -> None:
        table = folder / "rows.csv"
        table.write_text("\n".join(edit(table.read_text().splitlines())) + "\n")

    return change


@dataclass(frozen=True)
class Case:
    """A change of the good folder, options of ``check``, and what the answer has to contain."""

    kind: str
    experiment: str
    line: str
    change: Change | None = None
    words: tuple[str, ...] = ()
    goes_on: bool = False


def timed(k: int) -> np.ndarray:
    """Three channels behind a column of times, which run backwards in the third recording."""
    x = np.concatenate([np.arange(20.0)[:, None] / 10, array(k)[:20]], axis=1)
    if k == 2:
        x[7, 0] = 0.1
    return x


def with_value(value: float, row: int | slice = 3) -> Callable[[int], np.ndarray]:
    def make(k: int) -> np.ndarray:
        x = array(k)
        x[row] = value
        return x

    return make


TIMES = (f"--{MOTION}.time=0", f"--{MOTION}.period=0.1")
_OTHER = "--data.fields.others.other"
OTHER = (f"{_OTHER}.class_path=ArrayField", f"{_OTHER}.init_args.width=4", f"{_OTHER}.init_args.field=other")
CASES = [
    # arrays
    Case(
        "array",
        "classes",
        "m5.npy: motion: an array [20, 4]: [steps, 3] is wanted",
        saved(lambda k: array(k, channels=4), range(5, 6)),
        goes_on=True,
    ),
    Case(
        "array",
        "classes",
        "m0.npy: motion: an array [20, 4]: [steps, 3] is wanted; so are all",
        saved(lambda k: array(k, channels=4)),
    ),
    Case("array", "classes", "is wanted; turn it: [20, 3]", saved(lambda k: array(k).T)),
    Case("array", "classes", "an array [20]: [steps, 3] is wanted", saved(lambda k: array(k)[:, 0])),
    Case("array", "classes", "an array [1, 20, 3]", saved(lambda k: array(k)[None])),
    Case(
        "array",
        "classes",
        "m5.npy: motion: infinite numbers; nan is a gap",
        saved(with_value(np.inf), range(5, 6)),
        goes_on=True,
    ),
    Case("array", "classes", "no number, only gaps", saved(with_value(np.nan, slice(None)))),
    Case("array", "classes", "m5.npy: motion: no .npy array", raw(b"", range(5, 6)), goes_on=True),
    Case("array", "classes", "no .npy array", raw(b"no array at all")),
    Case("array", "classes", "an array of object", saved(lambda k: np.array([{}, 1], dtype=object))),
    Case("array", "classes", "an array of <U3", saved(lambda k: np.array([["a", "b", "abc"]] * 20))),
    Case("array", "classes", "an array of complex64", saved(lambda k: array(k).astype(np.complex64))),
    Case("array", "classes", "an array [0, 3]", saved(lambda k: array(k)[:0])),
    Case("array", "classes", "no .npy array", raw(pickle.dumps([1, 2]))),
    Case("array", "classes", "m5.npy: motion: no such file", removed(range(5, 6)), goes_on=True),
    Case("array", "classes", "there is no m0.npy", removed(range(COUNT))),
    # several arrays of a sample: the file at fault
    Case(
        "other",
        "classes",
        "o3.npy: other: numbers that are not finite",
        saved(lambda k: np.full(4, np.nan), range(3, 4), "o"),
        OTHER,
        True,
    ),
    Case(
        "other",
        "classes",
        "o0.npy: other: an array [5]: [4] is wanted; so are all",
        saved(lambda k: np.zeros(5), name="o"),
        OTHER,
    ),
    Case(
        "other",
        "classes",
        "o3.npy: other: an array [0]: [4] is wanted",
        saved(lambda k: np.zeros(0), range(3, 4), "o"),
        OTHER,
        True,
    ),
    Case("other", "classes", "the data has other, and no tower reads it", None, OTHER, True),
    # times
    Case(
        "times",
        "classes",
        "m2.npy: motion: column 0 of times: row 7 is earlier (0.1) than the one before",
        saved(timed),
        TIMES,
        True,
    ),
    Case(
        "times",
        "classes",
        "column 0 of times: row 3 is no time",
        saved(lambda k: np.insert(array(k), 0, np.where(np.arange(len(array(k))) == 3, np.nan, 1.0), axis=1)),
        TIMES,
    ),
    Case("times", "classes", "an array [20, 3]: [steps, 4] is wanted", None, TIMES),
    Case("times", "classes", "time, period: the column of times, and the time between two steps", None, TIMES[:1]),
    Case("times", "classes", "time, period: the column of times, and the time between two steps", None, TIMES[1:]),
    Case("times", "classes", "time 7, period 0.1: a column from 0 to 3", None, (f"--{MOTION}.time=7", TIMES[1])),
    Case("times", "classes", "period", None, (TIMES[0], f"--{MOTION}.period=-1")),
    Case(
        "times",
        "classes",
        "steps of 1e-09: more than 4,194,304; raise period",
        saved(lambda k: timed(k + 3)),
        (TIMES[0], f"--{MOTION}.period=1e-9"),
    ),
    # sizes of the field and of the tower
    Case(
        "size", "classes", "this tower takes 4 channels", None, ("--model.towers.others.motion.init_args.channels=4",)
    ),
    Case("size", "classes", "an array [20, 3]: [steps, 5] is wanted", None, (f"--{MOTION}.channels=5",)),
    Case("size", "classes", "SeriesField: steps 0: 1 is the least", None, (f"--{MOTION}.steps=0",)),
    Case("size", "classes", "patch: at least 1, got 0", None, ("--model.towers.others.motion.init_args.patch=0",)),
    Case("size", "classes", "heads 3 does not divide", None, ("--model.towers.others.motion.init_args.heads=3",)),
    Case(
        "size",
        "pairs",
        "model.towers.text.length 16: rows of ByteTokenizer have 32 tokens",
        None,
        ("--data.fields.text.tokenizer.init_args.length=32",),
    ),
    # columns
    Case("column", "classes", "no column 'motoin'; nearest: motion", None, (f"--{MOTION}.field=motoin",)),
    Case("column", "classes", "kind", None, ("--data.fields.labels.kind.init_args.field=knid",)),
    Case(
        "column",
        "classes",
        "good/m3.npy: kind: 'walk ing' is no class",
        cells(kind=lambda k, text: "walk ing" if k == 3 else text),
        ("--data.fields.labels.kind.init_args.classes=[walk,run,rest]",),
    ),
    Case("column", "classes", "several array fields (motion, other): name one", None, (f"--{MOTION}.field=null",)),
    Case(
        "column",
        "classes",
        "'spare' is no split; it is train, val or test",
        cells(split=lambda k, text: "spare" if k == 9 else text),
    ),
    Case("column", "classes", "no column 'splits'", None, ("--data.split=splits",)),
    Case(
        "column",
        "classes",
        "line 4 has 9 cells, the header 8",
        lines(lambda of: [line + ",x" if n == 3 else line for n, line in enumerate(of)]),
    ),
    Case("column", "pairs", "no column 'word'; nearest: words", None, ("--data.fields.text.captions=word",)),
    # targets
    Case(
        "target",
        "classes",
        "a NumberField reads them to predict a number",
        cells(kind=lambda k, _: f"{k}.25"),
        ("--model.classes=24",),
    ),
    Case(
        "target",
        "classes",
        "no target 'sort' in the data; it has kind",
        None,
        ("--trainer.callbacks.target=sort",),
    ),
    Case(
        "target",
        "classes",
        "no embedding of 'sound'; the recipe has motion",
        None,
        ("--trainer.callbacks.modality=sound",),
    ),
    Case(
        "target",
        "classes",
        "1 classes of kind are in test and not in train, such as 'jump' (4 samples)",
        cells(kind=lambda k, text: "jump" if k >= 20 else text),
        ("--model.classes=4",),
        True,
    ),
    Case("target", "classes", "classes", None, ("--model.classes=2",)),
    Case("target", "classes", "target", None, ("--model.target=knid",)),
    Case(
        "target",
        "number",
        "rows.csv#3: age: 'old' is no number; a LabelField reads class names",
        cells(age=lambda k, text: "old" if k == 3 else text),
    ),
    Case("target", "number", "all 16 training samples have 4", cells(age="4")),
    Case("target", "number", "no training sample has one: nothing to predict", cells(age="")),
    Case("target", "number", "target: 'weight' is no number of this data", None, ("--model.target=weight",)),
    Case(
        "target",
        "number",
        "target: 'age' is no number of this data; in its fields",
        cells(age=lambda k, _: f"{k % 2}"),
        ("--data.fields.labels.age.class_path=LabelField", "--data.fields.labels.age.init_args.field=age"),
    ),
    # tables
    Case("table", "number", "no column 'hight'; nearest: height", None, (f"--{TABLE}.columns=[hight,city]",)),
    Case("table", "number", "column city: one value ('Bonn') in training: leave it out of columns", cells(city="Bonn")),
    Case("table", "number", "columns [0, 3]: the data's table has [0]", None, (f"--{TABLE}.columns=[height]",)),
    Case("table", "number", "column height", cells(height=lambda k, text: "tall" if k == 3 else text)),
    Case("table", "number", "columns: city is given twice", None, (f"--{TABLE}.columns=[city,city]",)),
    Case("table", "number", "categories: 'town' is not one of columns", None, (f"--{TABLE}.categories=[town]",)),
    Case(
        "table",
        "number",
        "column height is in two tables; name it in one of them",
        None,
        ("--data.fields.others={more: {class_path: TableField, init_args: {columns: [height]}}}",),
    ),
    # sets and what watches them
    Case("set", "classes", "set        validate: none", cells(split="train"), ("--data.holdout=0",), True),
    Case("set", "classes", "no sample is left for training", cells(split="test")),
    Case(
        "set",
        "classes",
        "ModelCheckpoint: monitor 'val/acuracy': no such name; did you mean val/accuracy?",
        None,
        ("--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {monitor: val/acuracy, mode: max}}",),
    ),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name, text in EXPERIMENTS.items():
        (tmp_path / name).write_text(text)
    write_good(tmp_path / "good")
    write_good(tmp_path / "rows", table_alone=True)
    with settings_kept():
        yield tmp_path


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_good_folders_pass(place: Path, experiment: str) -> None:
    result = captured("check", "--config", experiment)
    assert result.rc == 0 and "warning" not in result.err and "unread  " not in result.out, result


@pytest.mark.parametrize("case", quick(CASES, 4, ids=[f"{n}-{case.kind}" for n, case in enumerate(CASES)]))
def test_check_names_the_mistake(place: Path, case: Case) -> None:
    if case.change is not None:
        case.change(place / ("rows" if case.experiment == "number" else "good"))
    before = sorted(place.rglob("*"))
    result: Result = captured("check", "--config", f"{case.experiment}.yaml", *case.words)
    assert case.line in result.err + result.out, result
    assert "Traceback" not in result.err and len(result.err.splitlines()) <= 5, result.err
    assert result.rc == (0 if case.goes_on else 2), result
    assert sorted(place.rglob("*")) == before


def test_the_table_has_sixty_mistakes() -> None:
    assert len(CASES) >= 61 and len({(case.line, case.words, case.experiment, case.change) for case in CASES}) == len(
        CASES
    )
