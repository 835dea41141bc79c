"""Seeded mistakes: each is one line with the file, the key and the nearest valid key, and exit code 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from torch import nn

from tests.conftest import TOY, Result
from tests.rotation import quick

Cli = Callable[..., Result]

#: (what to replace in toy.yaml, by what, what the line says). Every replacement makes one mistake.
MISTAKES = [
    ("model:", "modle:", "toy.yaml:2: modle: no such key; nearest: model"),
    ("data:", "dta:", "toy.yaml:8: dta: no such key; nearest: data"),
    ("trainer:", "trainor:", "toy.yaml:11: trainor: no such key; nearest: trainer"),
    ("max_epochs", "max_epoch", "toy.yaml:13: trainer.max_epoch: no such key; nearest: max_epochs"),
    (
        "log_every_n_steps",
        "log_every",
        "toy.yaml:14: trainer.log_every: no such key; nearest: log_every_n_steps",
    ),
    (
        "  init_args:\n    image",
        "  init_arg:\n    image",
        "toy.yaml:4: model.init_arg: not beside class_path",
    ),
    ("    image:", "    imagee:", "toy.yaml:5: model.imagee: ToyRecipe has no such key; nearest: image"),
    ("    text:", "    txt:", "toy.yaml:6: model.txt: ToyRecipe has no such key; nearest: text"),
    ("depth: 2", "depht: 2", "toy.yaml:5: model.image.depht: ToyTower has no such key; nearest: depth"),
    ("{width: 8}", "{widht: 8}", "toy.yaml:6: model.text.widht: ToyTower has no such key; nearest: width"),
    ("lr: 0.01", "lrr: 0.01", "toy.yaml:7: model.optimizer.lrr: AdamW has no such key; nearest: lr"),
    (
        "optimizer:",
        "optimiser:",
        "toy.yaml:7: model.optimiser: ToyRecipe has no such key; nearest: optimizer",
    ),
    ("torch.optim.AdamW", "AdmaW", "toy.yaml:7: model.optimizer: no class AdmaW of kind Optimizer; nearest: AdamW"),
    (
        "torch.optim.AdamW",
        "torch.optim.AdmaW",
        "toy.yaml:7: model.optimizer: there is no torch.optim.AdmaW; nearest: AdamW",
    ),
    ("torch.optim.AdamW", "torch.nn.Linear", "toy.yaml:7: model.optimizer: torch.nn.Linear is not of kind Optimizer"),
    (
        "toys.ToyRecipe",
        "toys.ToyRecpe",
        "toy.yaml:3: model: there is no tests.toys.ToyRecpe; nearest: ToyRecipe",
    ),
    ("toys.ToyData", "toys.ToyDat", "toy.yaml:9: data: there is no tests.toys.ToyDat; nearest: ToyData"),
    (
        "toys.ToyData",
        "toys.ToyRecipe",
        "toy.yaml:9: data: tests.toys.ToyRecipe is not of kind LightningDataModule",
    ),
    (
        "batch_size: 8",
        "batchsize: 8",
        "toy.yaml:10: data.batchsize: ToyData has no such key; nearest: batch_size",
    ),
    (
        "batch_size: 8",
        "batch_size: eight",
        "toy.yaml:10: data.batch_size: expected a whole number, got 'eight'",
    ),
    ("batch_size: 8", "batch_size: 8.5", "toy.yaml:10: data.batch_size: expected a whole number, got 8.5"),
    ("batch_size: 8", "tiny: 3", "toy.yaml:10: data.tiny: expected true or false, got 3"),
    ("lr: 0.01", "lr: fast", "toy.yaml:7: model.optimizer.lr: expected a number"),
    ("max_epochs: 2", "max_epochs: two", "toy.yaml:13: trainer.max_epochs: expected a whole number or null"),
    (
        "max_epochs: 2",
        "gradient_clip_val: [1]",
        # typing keeps the order of the union that was made first
        "toy.yaml:13: trainer.gradient_clip_val: expected a ",
    ),
    ("max_epochs: 2", "max_epochs: 2\n  max_epochs: 3", "toy.yaml:14: max_epochs: given twice"),
    ("max_epochs: 2", "max_epochs: [2", "toy.yaml:14: not valid YAML"),
    ("batch_size: 8", "batch_size: 1", "batch_size 1: at least 2"),
    ("width: 8, depth", "width: 0, depth", "width 0: at least 1"),
    ("batch_size: 8", "folder: /nope", "no such file: /nope"),
    ("lr: 0.01", "lr: -1", "Invalid learning rate: -1.0"),
    (
        "    image: {",
        "    mix: {a: b}\n    image: {",
        "toy.yaml:5: model.mix: expected a mapping of names to numbers",
    ),
    (
        "max_epochs: 2",
        "callbacks+: [{class_path: EarlyStoping}]",
        "no class EarlyStoping of kind Callback; nearest: EarlyStopping",
    ),
    (
        "max_epochs: 2",
        "callbacks+: [{class_path: EarlyStopping}]",
        "trainer.callbacks.monitor: EarlyStopping needs it",
    ),
    ("max_epochs: 2", "logger: {class_path: TensorBoardLoger}", "no class TensorBoardLoger of kind Logger"),
    ("max_epochs: 2", "trust: [os]", "toy.yaml:13: trainer.trust: no such key"),
    ("data:", "trust: [os]\ndata:", "toy.yaml:8: trust: a configuration cannot trust itself"),
    (
        "{class_path: tests.toys.ToyTower, init_args: {width: 8}}",
        "3",
        "toy.yaml:6: model.text: expected a class of kind ToyTower or null, got 3",
    ),
    ("{class_path: tests.toys.ToyTower, init_args: {width: 8}}", "nope.yaml", "toy.yaml:6: no such file: "),
    (
        "    image: {class_path: tests.toys.ToyTower, init_args: {width: 8, depth: 2}}\n",
        "",
        "toy.yaml:3: model.image: ToyRecipe needs it",
    ),
]


@pytest.mark.parametrize(("old", "new", "line"), MISTAKES, ids=[f"{n:02d}" for n in range(len(MISTAKES))])
def test_a_mistake_in_a_file(toy: Cli, workplace: Path, old: str, new: str, line: str) -> None:
    assert TOY.count(old) >= 1
    (workplace / "toy.yaml").write_text(TOY.replace(old, new, 1))
    assert line in toy("check").refusal


OPTIONS = [
    ("--model.learning_rat", "3", "ToyRecipe has no such key"),
    ("--model.scal", "3", "nearest: scale"),
    ("--trainer.max_step", "3", "nearest: max_steps"),
    ("--seed_everythin", "1", "nearest: seed_everything"),
    ("--model.optimizer.weight_deca", "0", "nearest: weight_decay"),
    ("--model.image.widt", "3", "nearest: width"),
    ("--model.init_args.image.init_args.widt", "3", "nearest: width"),
    ("--model.image.width", "x", "expected a whole number, got 'x'"),
    ("--trainer.max_steps", "x", "expected a whole number"),
    ("--trainer.callbacks+", "EarlyStoping", "nearest: EarlyStopping"),
    ("--model.optimizer", "SDG", "nearest: SGD"),
    ("--model.schedule", "WarmupCosin", "nearest: WarmupCosine"),
    ("--model", "Contrastiv", "nearest: Contrastive"),
    ("--optimizer", "SGD", "use --model.optimizer"),
    ("--optimizer.lr", "1", "use --model.optimizer.lr"),
    ("--lr_scheduler", "StepLR", "use --model.schedule"),
    ("--ckpt_path", "x", "resumes by --resume"),
    ("--weights_only", "false", "always loaded as plain tensors"),
    ("--config", "on/tin", "nearest: on/tiny"),
    ("--confg", "on/tiny", "nearest: config"),
    ("--trst", "x", "nearest: trust"),
    ("--resume", "atuo", "no such checkpoint; never, auto or a path"),
    ("--test", "maybe", "expected true or false"),
    ("--trust", "a-b", "not the name of a module"),
]


@pytest.mark.parametrize(("key", "value", "line"), OPTIONS, ids=[option[0] for option in OPTIONS])
def test_a_mistake_in_an_option(toy: Cli, key: str, value: str, line: str) -> None:
    assert line in toy("fit", key, value).refusal


def test_a_part_inside_a_part_is_left_out_by_an_option(cli: Cli) -> None:
    line = cli("check", "--config", "contrastive/emoji", "--model.towers.init_args.text", "null").refusal
    assert "towers: contrast needs two modalities, got image" in line


#: Keys of which the last letter is left out; argparse would take each for its prefix.
KEYS = [
    *("seed_everything", "name", "resume", "test", "trainer.max_epochs", "trainer.precision"),
    *(
        "trainer.accelerator",
        "trainer.devices",
        "trainer.gradient_clip_val",
        "trainer.strategy",
        "trainer.num_nodes",
    ),
    *(
        "trainer.val_check_interval",
        "trainer.enable_progress_bar",
        "model.scale",
        "model.explode",
        "model.compile",
    ),
    *("model.checkpointing", "data.batch_size", "data.batches", "data.tiny", "data.folder"),
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_no_abbreviations(toy: Cli, command: str, key: str) -> None:
    result = toy(command, f"--{key[:-1]}", "1")
    assert f"--{key[:-1]}: " in result.refusal and "no such key" in result.refusal


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_parser_itself_takes_no_abbreviations(cli: Cli, command: str) -> None:
    """The early check could hide it: ask the parser."""
    from descant.cli.arguments import Request
    from descant.cli.errors import Refusal
    from descant.cli.main import DescantCLI

    class Probe(DescantCLI):
        def parse_arguments(self, parser: object, args: object) -> None:
            parsers = self._subcommand_parsers
            assert set(parsers) == {command}
            for sub in parsers.values():
                assert sub.allow_abbrev is False
                with pytest.raises(Refusal, match=r"unrecognized|not accepted|required"):
                    sub.parse_args(["--seed_everythin", "1"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Probe(Request(command))


def test_faults_of_the_program_keep_their_traceback(toy: Cli) -> None:
    with pytest.raises(TypeError, match="a fault of the program"):
        toy("fit", "--model.explode", "type")


#: Values where a class or keys are wanted, each laid over contrastive/emoji: the line names the place.
NO_CLASS = {
    "data: {class_path: Mixture, init_args: {batch_size: 8, parts: {a: 3}}}": "data.parts.a: expected ",
    "model: {init_args: {adapt: [3]}}": "model.adapt: expected ",
    "model: {init_args: {towers: 3}}": "model.towers: expected ",
    "model: {class_path: Contrastive, init_args: null}": "model: init_args are keys, got None",
    "model: null": "no model: --config NAME chooses",
    "trainer: {callbacks: 3}": "trainer.callbacks: expected ",
    "trainer: {callbacks+: 3}": "trainer.callbacks: expected ",
    "trainer: {callbacks: [null]}": "trainer.callbacks: expected ",
    "trainer: {logger: [3]}": "trainer.logger: expected ",
    "model: {class_path: Contrastive, dict_kwargs: {foo: 1}}": "foo",
}


#: What only the whole shows.
NOWHERE = ("model: null", "model: {class_path: Contrastive, dict_kwargs: {foo: 1}}")


@pytest.mark.parametrize("text", NO_CLASS)
def test_what_is_no_class_is_reported_with_its_place(cli: Cli, workplace: Path, text: str) -> None:
    (workplace / "over.yaml").write_text(text)
    line = cli("check", "--config=contrastive/emoji", "--config=over.yaml").refusal
    assert NO_CLASS[text] in line and (line.startswith("over.yaml:1: ") or text in NOWHERE), line


@pytest.mark.slow
def test_what_is_put_in_place_of_a_class_needs_nothing_of_that_class(cli: Cli, workplace: Path) -> None:
    (workplace / "own.yaml").write_text(
        "data: {class_path: UserData, init_args: {batch_size: 8, stream: {class_path: Stream}}}"
    )
    (workplace / "taught.yaml").write_text("model: {init_args: {distill: {class_path: Distill}}}")
    base = ("check", "--config=contrastive/emoji", "--config=on/tiny")
    assert cli(*base, "--config=own.yaml", "--data", "emoji", "--data.size=32").rc == 0
    assert cli(*base, "--config=taught.yaml", "--config=claims/dcd:baseline").rc == 0
    assert "Distill needs it" in cli(*base, "--config=taught.yaml").refusal


# classes of the user's that are called as some of the suite's -----------------------------------------------------

#: A module with such classes, and with one of a name of its own.
MINE = '''
from lightning import Callback
from descant.modules.towers import Tower

class VectorTower(Tower):
    """As one of the suite's."""

class Throughput(Callback):
    """As one of the suite's."""

class Counter(Callback):
    """As none."""
'''
OURS = {"VectorTower": "descant.modules.towers.VectorTower", "Throughput": "descant.callbacks.Throughput"}
TOWER_A = (
    "{model: {init_args: {towers: {init_args: {others: {a: {class_path: VectorTower, init_args: {inputs: 16}}}}}}}}"
)
COUNTED = "trainer: {callbacks+: [{class_path: mine.Counter}]}\n"


@pytest.fixture
def mine(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of that module, which is not loaded yet."""
    (workplace / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(workplace))
    yield workplace
    module = sys.modules.pop("mine", None)
    for name in OURS if module is not None else ():
        getattr(module, name).__bases__ = (nn.Module,)  # whatever still holds it, no later test finds it


def printed(cli: Cli, *args: str) -> str:
    """What a configuration resolves to; callbacks of a class are merged when they are built, later."""
    result = cli("fit", *args, "--print_config")
    assert result.rc == 0, result.err
    config = yaml.safe_load(result.out)
    towers = config["model"]["init_args"]["towers"]["init_args"]["others"]
    assert {tower["class_path"] for tower in towers.values()} == {OURS["VectorTower"]}
    assert [c["class_path"] for c in config["trainer"]["callbacks"]].count(OURS["Throughput"]) >= 1
    return result.out


@pytest.mark.parametrize("config", ["fusion/information", "papers/mcr", "with/evaluate/throughput"])
def test_files_that_ship_mean_the_classes_of_the_suite(cli: Cli, mine: Path, config: str) -> None:
    """By itself, by ``extends``, and by a list that an overlay adds to."""
    args = (
        ["--config", "fusion/information", "--config", config] if config.startswith("with/") else ["--config", config]
    )
    before = printed(cli, *args)
    importlib.import_module("mine")
    assert printed(cli, *args) == before


def test_files_that_ship_do_so_where_a_later_file_loads_a_class_of_the_name(cli: Cli, mine: Path) -> None:
    (mine / "mine.yaml").write_text(f"extends: papers/mcr\n{COUNTED}")
    args = ("--config", "mine.yaml", "--trust", "mine")
    assert "mine" not in sys.modules
    assert "mine.Counter" in printed(cli, *args)
    assert "mine" in sys.modules
    result = cli("fit", *args, "--config", "on/tiny", "--name", "x")
    assert result.rc == 0, result.err


def test_a_file_of_the_user_gives_the_full_path_of_one_of_two_classes(cli: Cli, mine: Path) -> None:
    (mine / "mine.yaml").write_text(f"extends: fusion/information\n{COUNTED}")
    (mine / "short.yaml").write_text(TOWER_A)
    args = ("--config", "fusion/information", "--config", "short.yaml", "--trust", "mine")
    both = (
        "VectorTower is the name of descant.modules.towers.VectorTower and mine.VectorTower: give the full path of one"
    )
    printed(cli, *args)  # one class is loaded
    for _ in range(2):  # the second is loaded after this file was read, then before
        line = cli("fit", *args, "--config", "mine.yaml", "--print_config").refusal
        assert line == f"short.yaml:1: model.towers.others.a: {both}"
    option = ("--trainer.callbacks+", "Throughput")
    assert "--trainer.callbacks+: Throughput is the name of" in cli("check", *args[:2], *option).refusal
    (mine / "short.yaml").write_text(TOWER_A.replace("VectorTower", OURS["VectorTower"]))
    printed(cli, *args, "--config", "mine.yaml")


def test_two_added_items_are_two(cli: Cli) -> None:
    added = ("--trainer.callbacks+", "KNN", "--trainer.callbacks+", "Retrieval")
    line = cli("check", "--config=contrastive/emoji", *added).refusal
    assert "KNN needs it" in line and "target" in line


@pytest.mark.parametrize("words", [("--config", "~nobodyx/x.yaml"), ("--config", "x" * 300)])
def test_a_file_that_cannot_be(cli: Cli, words: tuple[str, ...]) -> None:
    assert "no such file" in cli("check", *words).refusal


@pytest.mark.parametrize("words", [("--name", "._"), ("--model.width", "0x_")])
def test_what_looks_like_a_number_and_is_none(cli: Cli, words: tuple[str, ...]) -> None:
    done = cli("check", "--config=contrastive/emoji", "--config=on/tiny", *words)
    assert done.rc == (2 if "width" in words[0] else 0), done.err


def test_modules_that_cannot_be_trusted(cli: Cli) -> None:
    assert cli("check", "--config=contrastive/emoji", "--trust=jsonargparse").refusal.startswith(
        "--trust jsonargparse: "
    )


@pytest.mark.parametrize("command", quick(["check", "fit"], 2))
def test_what_the_first_batch_does_not_fit_is_named(cli: Cli, command: str) -> None:
    words = ("--config=contrastive/emoji", "--config=on/tiny", "--model.towers.image.channels=1")
    done = cli(command, *words)
    (line,) = (line for line in done.err.splitlines() if "warning" not in line)
    assert done.rc == 2 and line.startswith(
        "descant: model.towers.image.stem.0 (Conv2d): the first batch does not fit: "
    )
    assert "expected input[" in line and "3 channels" in line and not list(Path("runs").glob("*/0*/checkpoints/*"))
    with pytest.raises(RuntimeError, match="3 channels"):
        cli(command, *words, "--debug")


@pytest.mark.parametrize("kind", ["value", "nan"])
def test_our_parts_refuse_in_one_line_while_training(toy: Cli, kind: str) -> None:
    assert "descant: " in toy("fit", "--model.explode", kind).err.splitlines()[-1]


def test_no_experiment(cli: Cli) -> None:
    assert cli("fit").refusal == "no model: --config NAME chooses an experiment (descant list)"


def test_stray_words_and_missing_values(toy: Cli) -> None:
    assert "an experiment is --config contrastive" in toy("fit", "contrastive").refusal
    assert toy("fit", "--trainer.max_steps").refusal == "--trainer.max_steps: its value is missing"


def test_interrupted(toy: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.toys import ToyRecipe

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ToyRecipe, "forward", interrupt)
    import signal

    handler = signal.getsignal(signal.SIGINT)
    try:
        assert toy("fit").rc == 130
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("how", ["file", "option"])
def test_an_inherited_objective_is_removed_by_naming_those_that_stay(cli: Cli, workplace: Path, how: str) -> None:
    def printed(objectives: str) -> Result:
        Path("mine.yaml").write_text(f"extends: multitask/emoji-table\nmodel: {{objectives: {objectives}}}\n")
        base = ("--config", "multitask/emoji-table", "--model.objectives", objectives)
        return cli("fit", *(("--config", "mine.yaml") if how == "file" else base), "--print_config")

    made = yaml.safe_load(printed("{contrast: {}, columns: {rate: 0.3}}").out)["model"]["init_args"]["objectives"]
    assert list(made) == ["contrast", "columns"] and made["contrast"]["init_args"]["pairs"] == [["image", "table"]]
    assert made["columns"]["init_args"]["rate"] == 0.3 and made["columns"]["init_args"]["given"] == "image"
    line = "null does not remove match; nearest: name all that stay, each as {}, under objectives"
    assert line in printed("{match: null}").refusal
