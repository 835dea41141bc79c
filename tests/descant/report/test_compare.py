"""``descant compare``: how runs are grouped and named, and the statistics of each row."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from descant.report import compare
from descant.report.compare import lower_is_better
from descant.report.statistics import compare_pairs
from descant.run.groups import group, load
from tests.conftest import Result
from tests.tolerance import F64, ulps

Cli = Callable[..., Result]
BASE: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "precision": "32-true",
        "callbacks": [
            {"class_path": "descant.callbacks.logs.report.Report"},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "RUN/checkpoints", "monitor": "val/r1", "mode": "max"},
            },
        ],
    },
    "model": {
        "class_path": "descant.recipes.Contrastive",
        "init_args": {
            "loss": {"class_path": "descant.modules.losses.InfoNCE", "init_args": {"temperature": 0.07}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "weight_decay": 0.1}},
            "chunks": None,
        },
    },
    "data": {"class_path": "descant.datamodules.corpora.emoji.Emoji", "init_args": {"batch_size": 8, "num_workers": 0}},
    "name": "a",
}
METRICS: dict[str, Any] = {"val/r1": 0.5, "val/loss": 1.0, "seconds": 10.0, "steps": 100}


def make(run: str, seed: int | None = 0, metrics: dict[str, Any] | None = None, **changed: Any) -> Path:
    """A run folder under ``runs``; ``changed``: dotted keys (``__`` for a dot, without init_args) -> values."""
    config = json.loads(json.dumps(BASE))
    config["name"] = run.split("/")[0]
    if seed is None:
        del config["seed_everything"]
    else:
        config["seed_everything"] = seed
    for key, value in changed.items():
        *path, last = key.split("__")
        node = config
        for part in path:
            node = node.get("init_args", node)[part]
        node.get("init_args", node)[last] = value
    folder = Path("runs") / run
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.json").write_text(json.dumps(METRICS | {"val/r1": 0.5 + (seed or 0) / 16} | (metrics or {})))
    return folder


@pytest.fixture
def two(workplace: Path) -> None:
    """``a`` with seeds 0, 1, 2, and ``b`` with another learning rate and seeds 1, 2, 3."""
    for n in range(3):
        make(f"a/00{n + 1}", n, {"val/r1": [0.5, 0.5, 0.25][n], "val/loss": 1.0})
        make(f"b/00{n + 1}", n + 1, {"val/r1": [0.75, 0.25, 1.0][n], "val/loss": 0.5}, model__optimizer__lr=0.01)


def groups(*words: str) -> list[Any]:
    return group(load("compare", words, Path("runs")))


# groups -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"data__num_workers": 4},
        {"trainer__accelerator": "gpu"},
        {"trainer__callbacks": BASE["trainer"]["callbacks"][1:]},
        {"trainer__callbacks": [*BASE["trainer"]["callbacks"], {"class_path": "descant.callbacks.RetrievalPictures"}]},
        {"model__chunks": None},
    ],
    ids=str,
)
def test_settings_without_effect_on_training_do_not_split_a_group(workplace: Path, changed: dict[str, Any]) -> None:
    make("a/001", 0)
    make("other/001", 1, **changed)
    (one,) = groups("a", "other")
    assert one.seeds == [0, 1] and one.name == "a"


@pytest.mark.parametrize(
    "changed, names",
    [
        ({"model__optimizer__lr": 0.01}, ["lr=0.001", "lr=0.01"]),
        ({"model__loss": {"class_path": "x.SigLIP", "init_args": {"bias": -10}}}, ["InfoNCE", "SigLIP"]),
        ({"model__chunks": 4}, ["no chunks", "chunks=4"]),
        ({"trainer__precision": "bf16-mixed"}, ["precision=32-true", "precision=bf16-mixed"]),
        ({"data__batch_size": 16, "model__chunks": 2}, ["batch_size=8 no chunks", "batch_size=16 chunks=2"]),
        ({"trainer__callbacks": [{"class_path": "descant.callbacks.EMA"}]}, ["no EMA", "EMA"]),
    ],
    ids=str,
)
def test_a_group_is_named_by_its_distinguishing_settings(
    workplace: Path, changed: dict[str, Any], names: list[str]
) -> None:
    make("a/001")
    make("b/001", **changed)
    assert [one.name for one in groups("a", "b")] == names


def test_groups_of_one_class_are_distinguished_by_its_arguments(workplace: Path) -> None:
    make("a/001")
    make("b/001", model__loss={"class_path": "x.SigLIP", "init_args": {"bias": -10}})
    make("c/001", model__loss__temperature=0.5)
    assert [one.name for one in groups("a", "b", "c")] == [
        "InfoNCE temperature=0.07",
        "SigLIP",
        "InfoNCE temperature=0.5",
    ]


def test_a_name_has_three_settings_and_counts_the_others(workplace: Path) -> None:
    more: Any = {f"data__k{n}": 1 for n in range(5)}
    make("a/001", **more)
    more_b: Any = dict.fromkeys(more, 2)
    make("a/002", **more_b)
    assert [one.name for one in groups("a")] == ["k0=1 k1=1 k2=1 +2", "k0=2 k1=2 k2=2 +2"]
    make("a/003", **more | {"data__k4": 3, "data__k0": 1})
    assert [one.name for one in groups("a")][2] == "k0=1 k1=1 k2=1 k3=1 k4=3"


def test_more_than_three_settings_are_named_by_the_runs(workplace: Path) -> None:
    more: Any = {f"data__k{n}": 1 for n in range(4)}
    twos: Any = dict.fromkeys(more, 2)
    threes: Any = dict.fromkeys(more, 3)
    make("a/001", **more)
    make("b/001", **twos)
    assert [one.name for one in groups("a", "b")] == ["a", "b"]
    make("b/002", **threes)  # two rows of one name
    assert [one.name for one in groups("a", "b")][1] == "k0=2 k1=2 k2=2 +1"


def test_losses_of_different_recipes_are_not_ranked(workplace: Path) -> None:
    make("a/001")
    make("b/001", model__loss={"class_path": "x.SigLIP"})
    make("c/001", model__chunks=4)
    (a, b, c) = groups("a", "b", "c")
    for metric, wanted in (("train/loss", False), ("val/loss", False), ("val/i2t_r1", True)):
        assert compare._same_meaning(metric, a, b) is wanted and compare._same_meaning(metric, a, c)


def test_a_name_has_at_most_six_settings_and_then_the_run(workplace: Path) -> None:
    more: Any = {f"data__k{n}": 1 for n in range(9)}
    make("a/001", **more)
    twos: Any = dict.fromkeys(more, 2)
    make("a/002", **twos)
    make("a/003", **more | {"data__k8": 3})
    ones = " ".join(f"k{n}=1" for n in range(6))
    assert [one.name for one in groups("a")] == [
        f"{ones} +3 (a/001)",
        " ".join(f"k{n}=2" for n in range(6)) + " +3",
        f"{ones} +3 (a/003)",
    ]


def test_the_order_of_a_list_is_a_setting(workplace: Path) -> None:
    flip, crop = {"class_path": "x.Flip"}, {"class_path": "x.Crop"}
    make("a/001", data__augment=[flip, crop])
    make("b/001", data__augment=[crop, flip])
    assert [one.name for one in groups("a", "b")] == ["augment=Flip, Crop", "augment=Crop, Flip"]


def test_the_later_of_two_runs_with_one_seed_counts(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("a/001", metrics={"val/r1": 0.0})
    make("a/002", metrics={"val/r1": 1.0})
    (one,) = groups("a")
    assert [run.name for run in one.runs.values()] == ["a/002"]
    assert capsys.readouterr().err.strip().endswith("a/002 and not a/001 counts")


def test_different_lengths_of_runs_are_reported(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("a/001", 0, {"steps": 1000})
    make("a/002", 1, {"steps": 400})
    groups("a")
    assert "a/001 and its other seeds have 400 to 1,000 steps" in capsys.readouterr().err


# runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, names",
    [
        (["a"], ["a/001", "a/002", "a/003"]),
        (["a/002"], ["a/002"]),
        (["runs/a/002"], ["a/002"]),
        (["runs/b"], ["b/001", "b/002", "b/003"]),
        (["a/00[13]"], ["a/001", "a/003"]),
        (["runs/*/001"], ["a/001", "b/001"]),
        (["?"], ["a/001", "a/002", "a/003", "b/001", "b/002", "b/003"]),
        (["a/latest", "a/003", "a"], ["a/003", "a/001", "a/002"]),
    ],
    ids=str,
)
def test_runs_by_folder_name_and_pattern(two: None, words: list[str], names: list[str]) -> None:
    Path("runs/a/latest").symlink_to("003")
    assert [run.name for run in load("compare", words, Path("runs"))] == names
    Path("runs/a/latest").unlink()
    Path("runs/a/latest").write_text("003\n")
    assert [run.name for run in load("compare", words, Path("runs"))] == names


@pytest.mark.parametrize("word", ["runs/sweeps/*", "runs/sweeps", "runs/sweeps/toy-1a", "sweeps/toy-1a", "sweeps"])
def test_runs_of_a_sweep_or_of_all_sweeps(two: None, word: str) -> None:
    names = [f"lr={lr},seed={seed}/001" for lr in ("0.1", "0.2") for seed in (0, 1)]
    for n, name in enumerate(names):
        make(f"sweeps/toy-1a/{name}", n % 2)
    Path("runs/sweeps/toy-1a/again").symlink_to("lr=0.1,seed=0")
    Path("runs/sweeps/toy-1a/lr=0.1,seed=0.log").touch()
    assert [run.name for run in load("compare", [word], Path("runs"))] == names


def test_runs_that_another_folder_holds(cli: Cli, two: None, tmp_path: Path) -> None:
    Path("runs").rename("elsewhere")
    assert cli("compare", "a", "b", "--runs", "elsewhere").rc == 0
    assert cli("compare", tmp_path / "elsewhere/a", "elsewhere/b/001").rc == 0


# statistics -----------------------------------------------------------------------------------------------------------


def test_differences_are_over_shared_seeds(cli: Cli, two: None) -> None:
    table = json.loads(cli("compare", "a", "b", "--metrics", "val/r1,val/loss", "--format", "json").out)
    first, second = table["groups"]
    assert (table["baseline"], table["lower_is_better"]) == ("lr=0.001", ["val/loss"])
    assert first["runs"] == ["a/001", "a/002", "a/003"] and first["seeds"] == [0, 1, 2]
    assert first["metrics"]["val/r1"] == {
        "mean": pytest.approx(1.25 / 3, rel=ulps(4, F64))
    }  # the baseline, and no difference
    assert second["settings"] == {"model.optimizer.lr": 0.01} and second["seconds"] == 10.0
    by_hand = compare_pairs([0.75, 0.25], [0.5, 0.25])  # seeds 1 and 2
    assert second["metrics"]["val/r1"] == {
        "mean": pytest.approx(2 / 3, rel=ulps(4, F64)),
        "difference": by_hand.mean,
        "low": by_hand.low,
        "high": by_hand.high,
        "better": 1,
        "equal": 1,
        "shared": 2,
    }
    loss = second["metrics"]["val/loss"]
    assert (loss["difference"], loss["better"], loss["shared"]) == (-0.5, 2, 2)  # lower is better


def test_markdown_has_a_row_a_group(cli: Cli, two: None) -> None:
    result = cli("compare", "a", "b", "--metrics", "val/r1")
    lines = result.out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["configuration", "seeds", "val/r1", "difference [95 %]; better", "seconds"]
    assert cells[2] == ["lr=0.001", "3", "0.4167", "baseline", "10.0"]
    assert cells[3] == ["lr=0.01", "3", "0.6667", "+0.125 [-1.46, +1.71]; 1 of 2", "10.0"]
    assert len({len(line) for line in lines}) == 1 and result.err == ""


def test_csv_has_the_statistics_of_json(cli: Cli, two: None) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("compare", "a", "b", "--format", "csv").out)))
    assert [(row["configuration"], row["baseline"], row["seeds"]) for row in rows] == [
        ("lr=0.001", "1", "3"),
        ("lr=0.01", "0", "3"),
    ]
    assert rows[0]["val/r1:difference"] == ""
    assert float(rows[1]["val/r1:difference"]) == 0.125 and rows[1]["val/r1:shared"] == "2"
    assert rows[1]["runs"] == "b/001 b/002 b/003"


def test_no_csv_cell_is_a_formula(cli: Cli, two: None) -> None:
    Path("runs/a").rename("runs/=1+1")
    text = cli("compare", "=1+1", "b", "--format", "csv").out
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert any(cell.startswith("'=1+1/001") for cell in cells), text
    assert not any(cell.startswith(("=", "+", "@")) for cell in cells)


def test_the_baseline_is_a_row_by_its_name_or_by_a_run_in_it(cli: Cli, two: None) -> None:
    for name in ("lr=0.01", "b", "b/002"):
        table = json.loads(cli("compare", "a", "b", "--baseline", name, "--format", "json").out)
        assert table["baseline"] == "lr=0.01"
        assert table["groups"][0]["metrics"]["val/r1"]["difference"] == -0.125


def test_metrics_are_monitored_ones_or_names_or_patterns(cli: Cli, workplace: Path) -> None:
    more = {"far/r1": 0.1, "far/r5": 0.3, "train/loss": 2.0, "train/term": 2.0, "note": "x", "val/broken": None}
    make("a/001", metrics=more)

    def shown(*args: str) -> list[str]:
        (row,) = json.loads(cli("compare", "a", "--format", "json", *args).out)["groups"]
        return list(row["metrics"])

    assert shown() == ["far/r1", "val/r1"]
    assert cli("compare", "a").err.splitlines() == ["descant: 6 more metrics: --metrics '*', or their names"]
    assert shown("--metrics", "val/loss,far/*") == ["val/loss", "far/r1", "far/r5"]
    assert shown("--metrics", "*")[-3:] == ["train/term", "seconds", "steps"]
    assert "val/broken" not in shown("--metrics", "*")


def test_a_checkpoint_mode_gives_the_direction(cli: Cli, workplace: Path) -> None:
    watch = {"class_path": "x.ModelCheckpoint", "init_args": {"monitor": "val/score", "mode": "min"}}
    make("a/001", metrics={"val/score": 1.0}, trainer__callbacks=[watch])
    table = json.loads(cli("compare", "a", "--metrics", "*", "--format", "json").out)
    assert table["lower_is_better"] == ["val/loss", "val/score", "seconds"]


def test_a_metric_that_one_group_lacks_is_a_dash(cli: Cli, two: None) -> None:
    make("c/001", 0, {"only/r1": 0.5}, data__batch_size=4)
    lines = cli("compare", "a", "c", "--metrics", "only/r1").out.splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["-", "0.5"]


def mixed() -> None:
    """Thirty runs of three recipes, some stopped, each recipe with different metrics and settings."""
    for n in range(30):
        recipe = ("Contrastive", "Fusion", "Masked")[n % 3]
        family = recipe.lower()
        model = {"class_path": f"descant.recipes.{recipe}", "init_args": {"depth": n}}
        data: dict[str, Any] = {f"setting_{k}": f"a-value-of-{n}-that-is-long" for k in range(20)}
        metrics: dict[str, Any] = {"train/loss": 2.0 + n, "steps": 1000 if n % 5 else 400, "vendor/i2t_r1": 0.5}
        metrics |= {f"{family}/only_{k}": 0.5 for k in range(3)} | {"val/r1": 0.5, "val/medr": 9.0}
        more: Any = {f"data__{key}": value for key, value in data.items()}
        make(f"{family}-of-a-long-name/{n + 1:03d}", 0, metrics, trainer__max_steps=1000, model=model, **more)


def test_thirty_mixed_runs_fit_120_columns(cli: Cli, workplace: Path) -> None:
    mixed()
    result = cli("compare", "*")
    assert result.rc == 0, result.err
    lines = result.out.splitlines()
    assert max(map(len, [*lines, *result.err.splitlines()])) <= 120
    for table in result.out.split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        if rows[0][0] == "configuration":
            means = [column for column in zip(*rows, strict=True) if "difference" not in column[0]]
            assert all(set(column[2:]) != {"-"} and "-" not in column[2:] for column in means), table
    legend = result.out.split("\n\n")[-1]  # of every run six settings at most
    entries = legend.replace("\n    ", " ").splitlines()
    assert len(entries) == 30 and len({entry.partition(": ")[0] for entry in entries}) == 30
    assert all(entry.count("=") <= 5 and re.search(r" \+\d+$", entry) for entry in entries), entries  # and a class
    assert "descant: 21 settings differ, a row names at most 6: descant report" in result.err
    assert "stopped before the last step: " in result.err and ", and 5 others" in result.err


def test_a_metric_of_some_runs_only_is_shown_on_request(cli: Cli, workplace: Path) -> None:
    make("a/001", 0, {"far/r1": 0.5})
    make("b/001", 0, data__batch_size=4)
    (head, _, *rows) = cli("compare", "a", "b").out.splitlines()
    assert "val/r1" in head and "far/r1" not in head and len(rows) == 2
    assert "far/r1" in cli("compare", "a", "b", "--metrics", "*r1").out


def test_stopped_runs_are_marked(cli: Cli, workplace: Path) -> None:
    for n, steps in enumerate((1000, 400)):
        make(f"a/00{n + 1}", n, {"steps": steps}, trainer__max_steps=1000)
        make(f"b/00{n + 1}", n, {"steps": 7, "epochs": 2}, trainer__max_epochs=2, model__chunks=2)
    result = cli("compare", "a", "b")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.out.splitlines()]
    assert (cells[2][1], cells[3][1]) == ("2, 1 stopped", "2")
    assert "descant: stopped before the last step: a/002 (400 of 1,000 steps)" in result.err.splitlines()
    rows = json.loads(cli("compare", "a", "b", "--format", "json").out)["groups"]
    assert [row["stopped"] for row in rows] == [{"a/002": "400 of 1,000 steps"}, {}]


def test_recall_comes_before_ranks_and_chance_is_a_row(cli: Cli, workplace: Path) -> None:
    chance = {"val/chance/i2t_r1": 0.125, "val/chance/i2t_r10": 0.75}
    scores = {"val/i2t_r1": 0.5, "val/i2t_r10": 0.875, "val/i2t_medr": 2.0, "val/distinct/i2t_r1": 0.25}
    make("a/001", 0, chance | scores)
    make("b/001", 0, chance | scores | {"val/chance/i2t_r1": 0.25}, data__batch_size=4)
    lines = cli("compare", "a", "b", "--metrics", "val/i2t_*").out.splitlines()
    heads = [cell.strip() for line in lines if line.startswith("| conf") for cell in line.split("|") if "val/" in cell]
    assert heads == ["val/i2t_r1", "val/i2t_r10", "val/i2t_medr (lower is better)"]
    cells = [cell.strip() for line in lines if line.startswith("| by chance") for cell in line.split("|") if cell]
    assert [cell for cell in cells if cell not in ("by chance", "-")] == ["0.125 to 0.25", "0.75"]
    shown = json.loads(cli("compare", "a", "b", "--format", "json").out)["groups"][0]["metrics"]
    assert not any("chance" in name for name in shown)


def test_runs_of_a_real_fit(toy: Cli, cli: Cli) -> None:
    for seed, depth in ((0, 1), (1, 1), (0, 2), (1, 2)):
        args = ("--seed_everything", str(seed), "--model.image.depth", str(depth), "--trainer.max_epochs", "1")
        assert toy("fit", "--name", f"d{depth}", *args).rc == 0
    result = cli("compare", "d1", "d2", "--metrics", "train/loss", "--format", "json")
    rows = json.loads(result.out)["groups"]
    assert [(row["name"], row["seeds"]) for row in rows] == [("depth=1", [0, 1]), ("depth=2", [0, 1])]
    assert rows[1]["metrics"]["train/loss"]["shared"] == 2 and rows[1]["seconds"] > 0


def test_torch_is_not_imported(two: None) -> None:
    code = (
        "import sys; from descant.__main__ import main; assert main(['compare', 'a', 'b']) == 0;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, line",
    [
        ([], "compare: no run given: descant compare NAME, or NAME/001 NAME/002 ..."),
        (["aa/001"], "compare aa/001: no such run under runs; nearest: a/001"),
        (["zz"], "compare zz: no such run under runs; known: a, a/001, a/002, a/003, b, b/001, b/002, b/003"),
        (["a/04*"], "compare a/04*: no such run under runs; nearest: a/003"),
        (["a", "--metrics", "val/r2"], "compare: --metrics val/r2: no run has it; nearest: val/r1"),
        (["a", "--metrics", "r9*"], "compare: --metrics r9*: no run has it; known: seconds, steps, val/loss, val/r1"),
        (
            ["a", "b", "--baseline", "lr=0.1"],
            "compare: --baseline lr=0.1: no such row or run among those compared; nearest: lr=0.01",
        ),
        (["a", "--format", "markdwn"], "compare: --format markdwn: no such format; nearest: markdown"),
        (["a", "--metric", "x"], "compare: --metric: no such option; nearest: --metrics"),
    ],
    ids=str,
)  # fmt: skip
def test_one_line_and_the_nearest_choice(cli: Cli, two: None, args: list[str], line: str) -> None:
    result = cli("compare", *(args or ["--runs", "runs"]))
    assert result.refusal == line and result.out == ""


def test_a_baseline_of_several_rows_is_refused(cli: Cli, two: None) -> None:
    make("a/004", 0, data__batch_size=4)
    line = cli("compare", "a", "b", "--baseline", "a").refusal
    assert line == (
        "compare: --baseline a: its runs are in 2 rows; choose one of batch_size=8 lr=0.001, batch_size=4 lr=0.001"
    )


def test_groups_without_a_common_seed_are_refused(cli: Cli, two: None) -> None:
    line = cli("compare", "a/001", "b/003", "b/002", "a/003", "--baseline", "b", "--metrics", "val/r1").out
    assert "1 of 1" not in line  # a/003 and b/002 share seed 2
    line = cli("compare", "a/001", "b/002").refusal
    assert line == (
        "compare: lr=0.01 (seeds 2) and the baseline lr=0.001 (seeds 0) have no seed in common;"
        " train one with a seed of the other: --seed_everything N"
    )
    make("c/001", 0, data__batch_size=4)
    make("c/002", 2, data__batch_size=4)
    assert cli("compare", "a/001", "b/002", "c").refusal.endswith("; nearest: --baseline 'batch_size=4 lr=0.001'")


def test_runs_without_a_seed_are_never_paired(cli: Cli, workplace: Path) -> None:
    make("a/001", None)
    make("b/001", None, data__batch_size=4)
    assert "(seeds not set)" in cli("compare", "a", "b").refusal


def test_a_run_without_metrics_is_refused_or_left_out(cli: Cli, two: None) -> None:
    (Path("runs/a/002") / "metrics.json").unlink()
    line = "compare a/002: no metrics.json: nothing was evaluated yet; nearest: a/00"
    assert cli("compare", "a/002").refusal.startswith(line)
    result = cli("compare", "a", "--metrics", "val/r1")
    assert result.rc == 0 and result.err == "descant: skipped, as nothing was evaluated yet: a/002\n"
    for run in ("a/001", "a/003"):
        (Path("runs") / run / "metrics.json").unlink()
    assert cli("compare", "a").refusal == "compare a: none of these runs has a metrics.json: nothing was evaluated yet"


def bomb(first: str, last: str) -> str:
    """A few lines of YAML that expand to 8 ** 12 values, and one more line."""
    lines = [f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]" for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)]
    return "\n".join([f"a: &a {first}", *lines, last])


@pytest.mark.parametrize(
    "file, text, word",
    [
        ("config.yaml", "a: [1, 2", "config.yaml cannot be read"),
        ("config.yaml", bomb("[1]", ""), "more than 20,000 settings"),
        ("config.yaml", bomb("{}", ""), "more than 20,000 settings"),
        ("config.yaml", bomb("!!pairs [x: 1]", ""), "more than 20,000 settings"),
        ("config.yaml", bomb("[1]", "class_path: *m"), "more than 20,000 settings"),
        ("config.yaml", "[" * 5000, "config.yaml cannot be read"),
        ("config.yaml", "a: !!python/object/apply:os.system [ls]", "config.yaml cannot be read"),
        ("metrics.json", "{", "metrics.json cannot be read"),
        ("metrics.json", "[" * 100_000, "metrics.json cannot be read"),
        ("metrics.json", " " * 1_000_001, "larger than 1 MB"),
        ("metrics.json", b"\xff\xfe", "metrics.json cannot be read"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_an_unreadable_run_folder_is_one_line(cli: Cli, two: None, file: str, text: str | bytes, word: str) -> None:
    path = Path("runs/a/001") / file
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = cli("compare", "a").refusal
    assert line.startswith("compare a/001: ") and word in line


def test_no_control_characters_of_a_run_reach_the_terminal(cli: Cli, workplace: Path) -> None:
    make("a/001", metrics={"x\x1b[2J\n|r1": 0.5, "\ud800/r1": 0.5})
    make("b/001", data__batch_size="8\x1b[0m|")
    out = cli("compare", "a", "b", "--metrics", "*").out
    assert "\x1b" not in out and all(len(part.splitlines()) == 4 for part in out.strip().split("\n\n"))
    assert "x?[2J?\\|r1" in out and "?/r1" in out and "batch_size=8?[0m\\|" in out


def test_a_loss_of_some_modalities_is_a_loss() -> None:
    assert lower_is_better("val/loss/image+text", {}) and lower_is_better("problems/gap/answered", {})
    assert not lower_is_better("val/accuracy/image+text", {})
