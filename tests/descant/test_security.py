"""A configuration is data: it names classes of an allow-list, and nothing else of it is imported or run."""

from __future__ import annotations

import itertools
import resource
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from descant.cli.errors import Refusal
from descant.cli.trust import ALLOWED, DENIED, is_allowed
from descant.modules.io import saved
from descant.run.processes import Task, run_beside
from descant.run.sharded import Sharded
from descant.run.store import AtomicIO
from tests.conftest import TOY, Result
from tests.rotation import quick

Cli = Callable[..., Result]
TOWER = "{class_path: tests.toys.ToyTower, init_args: {width: 8}}"

OUTSIDE = [
    *(
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "pickle.load",
        "pathlib.Path",
        "runpy.run_path",
        "sentinel.Tower",
    ),
    *(
        "torch.hub.load",
        "torch.load",
        "torch.serialization.load",
        "torch.jit.load",
        "torch.package.PackageImporter",
    ),
    *("torch.utils.cpp_extension.load", "torch.ops.load_library", "torch.multiprocessing.spawn"),
    *("lightning.pytorch.cli.instantiate_class", "transformers.pipeline", "descant.cli.main.run"),
    *("transformers.dynamic_module_utils.get_class_from_dynamic_module", "jsonargparse.set_parsing_settings"),
]


@pytest.fixture
def sentinel(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that writes a file when it is imported."""
    mark = workplace / "imported"
    (workplace / "sentinel.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nimport torch\nclass Tower(torch.nn.Module):\n    pass\n"
        "def run(*args, **kwargs):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(workplace))
    sys.modules.pop("sentinel", None)
    return mark


@pytest.mark.parametrize("path", quick(OUTSIDE, 3))
@pytest.mark.parametrize("place", ["tower", "optimizer", "callback", "model", "loose"])
def test_a_class_outside_the_list_is_neither_built_nor_imported(
    toy: Cli, workplace: Path, sentinel: Path, path: str, place: str
) -> None:
    spec = f"{{class_path: {path}, init_args: {{command: touch {sentinel}}}}}"
    text = {
        "tower": TOY.replace(TOWER, spec),
        "optimizer": TOY.replace("torch.optim.AdamW", path),
        "callback": TOY.replace("max_epochs: 2", f"callbacks+: [{spec}]"),
        "model": TOY.replace("tests.toys.ToyRecipe", path),
        "loose": TOY.replace("max_epochs: 2", f"plugins: [{{anything: {spec}}}]"),
    }[place]
    assert text != TOY
    (workplace / "toy.yaml").write_text(text)
    line = toy("check").refusal
    assert f"class_path {path} is " in line and "--trust " in line and line.startswith("toy.yaml:")
    assert not sentinel.exists() and "sentinel" not in sys.modules


@pytest.mark.parametrize("key", ["--model", "--model.text", "--model.text.class_path", "--trainer.callbacks+"])
def test_nor_from_the_command_line(toy: Cli, sentinel: Path, key: str) -> None:
    assert "outside the allow-list" in toy("check", key, "sentinel.Tower").refusal
    assert not sentinel.exists()


def test_nor_from_a_sub_file(toy: Cli, workplace: Path, sentinel: Path) -> None:
    (workplace / "sub.yaml").write_text("class_path: sentinel.Tower\n")
    (workplace / "toy.yaml").write_text(TOY.replace(TOWER, "sub.yaml"))
    assert toy("check").refusal.startswith("sub.yaml:1: class_path sentinel.Tower")
    assert not sentinel.exists()


def test_nor_in_a_value_of_any_type(toy: Cli, workplace: Path, sentinel: Path) -> None:
    """Where no class is expected the parser's own list is the wall."""
    (workplace / "toy.yaml").write_text(TOY.replace("lr: 0.01", "lr: 0.01, foreach: sentinel.run"))
    assert toy("check").rc == 2
    (workplace / "toy.yaml").write_text(TOY.replace("torch.optim.AdamW", "sentinel.run"))
    assert toy("check").rc == 2
    assert not sentinel.exists()


def test_trust_lasts_for_one_call(cli: Cli) -> None:
    assert cli("check", "--config", "toy.yaml", "--trust", "tests.toys").rc == 0
    line = cli("check", "--config", "toy.yaml").refusal
    assert line == (
        f"toy.yaml:3: class_path tests.toys.ToyRecipe is outside the allow-list ({', '.join(ALLOWED)}): "
        "--trust tests if you trust it"
    )
    assert "outside" in cli("check", "--config", "toy.yaml", "--trust", "tests.toy").refusal


def test_denied_parts_of_allowed_packages_can_be_named_alone() -> None:
    assert all(not is_allowed(f"{part}.anything") for part in DENIED)
    assert is_allowed("torch.utils.data.Sampler", ["torch.utils.data"]) and not is_allowed(
        "torch.utils.x", ["torch.utils.data"]
    )
    assert not is_allowed("torchvision.io.read_file") and not is_allowed("descantx.Thing")


class _Bomb:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.mark, "w")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_runs_no_code(toy: Cli, workplace: Path, command: str) -> None:
    mark, path = workplace / "ran", workplace / "bad.ckpt"
    content = {"state_dict": {}, "bomb": _Bomb(str(mark)), "descant": {"safe": True}}
    AtomicIO().save_checkpoint(content, path)  # with a manifest: it is no wall against who can write one
    key = "--resume" if command == "fit" else "--ckpt_path"
    line = toy(command, key, path).refusal
    assert "bad.ckpt: it holds" in line and "may run code, and is not read" in line
    assert not mark.exists()


def test_nor_do_weights_of_any_other_kind(workplace: Path) -> None:
    """What recipes, towers and teachers read: a run's checkpoint, the newest of which is asked what was best."""
    from descant.modules.io.saved import Saved, find, read_weights
    from descant.modules.towers.timm import read_weights as of_tower

    mark, run = workplace / "ran", workplace / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("model: {class_path: descant.recipes.VisionLanguage}\n")
    bad = run / "checkpoints" / "bad.ckpt"
    torch.save({"state_dict": {}, "bomb": _Bomb(str(mark))}, bad)
    for read in (lambda: find(run), lambda: read_weights(Saved(run, bad, {})), lambda: of_tower(bad)):
        with pytest.raises(ValueError, match=r"bad.ckpt.*it holds .*open, which may run code, and is not read"):
            read()
    assert not mark.exists()


@pytest.mark.parametrize("hop", ["_instantiator", "_class_path", "class_path"])
def test_a_checkpoint_names_no_class_to_build(toy: Cli, workplace: Path, sentinel: Path, hop: str) -> None:
    """Lightning builds what the hyper-parameters of a checkpoint name; here they are not read."""
    assert toy("fit", "--trainer.max_epochs", "1").rc == 0
    (last,) = (workplace / "runs/toy/001/checkpoints").glob("*.ckpt")
    content = torch.load(last, weights_only=True)
    content["hyper_parameters"] = {hop: "sentinel.run", "init_args": {"command": "x"}}
    content["datamodule_hyper_parameters"] = {hop: "sentinel.Tower"}
    AtomicIO().save_checkpoint(content, workplace / "hop.ckpt")
    assert toy("test", "--ckpt_path", "hop.ckpt").rc == 0
    assert not sentinel.exists() and "sentinel" not in sys.modules


#: What a file may not set by itself -> the word of --trust that allows it. Each is laid over toy.yaml.
GUARDED = {
    "trainer: {default_root_dir: /tmp/elsewhere}": "writes",
    "trainer: {default_root_dir: ../elsewhere}": "writes",
    "trainer: {callbacks+: {class_path: ModelCheckpoint, init_args: {dirpath: /etc}}}": "writes",
    "trainer: {callbacks+: {class_path: ModelCheckpoint, init_args: {dirpath: RUN/../../..}}}": "writes",
    "trainer: {callbacks+: {class_path: ModelCheckpoint, init_args: {dirpath: here}}}": "writes",
    "trainer: {callbacks+: {class_path: ModelCheckpoint, init_args: {filename: ../../x}}}": "writes",
    "trainer: {callbacks+: {class_path: ModelCheckpoint, init_args: {filename: '{step:/>6}'}}}": "writes",
    "trainer: {callbacks+: {class_path: ModelCheckpoint, init_args: {filename: '{step:c}'}}}": "writes",
    "trainer: {callbacks+: {class_path: ModelCheckpoint, init_args: {filename: '{step!r:/>6}'}}}": "writes",
    "run: ../../elsewhere": "writes",
    "run: /tmp/elsewhere": "writes",
    "trainer: {callbacks+: {class_path: Resume, init_args: {folder: /tmp/elsewhere}}}": "writes",
    "trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: ~/elsewhere}}}": "writes",
    "trainer: {logger: {class_path: TensorBoardLogger, init_args: {save_dir: RUN, name: ../../x}}}": "writes",
    "trainer: {logger: {class_path: TensorBoardLogger, init_args: {save_dir: RUN, version: /etc}}}": "writes",
    "name: ../../elsewhere": "writes",
    "runs: /tmp/elsewhere": "writes",
    "data: {class_path: Fashion, init_args: {batch_size: 8, cache: /tmp/elsewhere}}": "writes",
    "data: {class_path: Fashion, init_args: {batch_size: 8, deb: x.deb, accept: [aa]}}": "packages",
    "data: {class_path: Fashion, init_args: {batch_size: 8, deb: x.deb, accept+: [aa]}}": "packages",
    "trainer.default_root_dir: /tmp/elsewhere": "writes",
    "trainer: {callbacks+: {class_path: Resume, dict_kwargs: {folder: /tmp/elsewhere}}}": "writes",
    "trainer: {callbacks+: {class_path: SpikeDetection, init_args: {exclude_batches_path: /tmp/x.json}}}": "writes",
    "model: {init_args: {text: {class_path: descant.modules.towers.cached.Cached, init_args: {folder: /x}}}}": "writes",
    "trainer: {profiler: prof}": "writes",
    'name: "x\\ntouch imported #"': "writes",
    "data: {class_path: UserData, init_args: {batch_size: 8, stream: {class_path: Stream, init_args: "
    "{urls: 'pipe:touch imported', samples: 8, allow_pipes: true}}}}": "shell",
}


@pytest.mark.parametrize("text", GUARDED)
def test_a_file_may_not_write_elsewhere_nor_run_commands(toy: Cli, workplace: Path, text: str) -> None:
    (workplace / "over.yaml").write_text(text)
    (workplace / "prof").write_text("class_path: SimpleProfiler\ninit_args: {dirpath: /tmp/elsewhere}\n")
    before = sorted(workplace.rglob("*"))
    line = toy("check", "--config", "over.yaml").refusal
    where = "prof:2: " if "prof" in text.split() or "profiler" in text else "over.yaml:1: "
    assert line.startswith(where) and f"--trust {GUARDED[text]} lets a configuration " in line
    assert sorted(workplace.rglob("*")) == before


def test_nor_by_a_sub_file_for_a_class_that_only_the_parser_resolves(toy: Cli, workplace: Path) -> None:
    (workplace / "sub.yaml").write_text("class_path: tests.toys.Unwritten\ninit_args: {dirpath: /tmp/elsewhere}\n")
    (workplace / "over.yaml").write_text("trainer: {callbacks+: sub.yaml}")
    line = toy("check", "--config", "over.yaml").refusal
    assert line.startswith("sub.yaml:2: ") and "--trust writes lets a configuration " in line


def test_nor_by_a_key_of_a_class_that_another_file_names(cli: Cli, workplace: Path) -> None:
    tower = "{class_path: Cached, init_args: {tower: {class_path: BagTower, init_args: {vocab: 9, width: 4}}}}"
    text = "model: {init_args: {towers: {init_args: {text: SPEC}}}}"
    (workplace / "one.yaml").write_text(text.replace("SPEC", tower))
    for two in ("{init_args: {folder: /x}}", "{folder: /x}"):
        (workplace / "two.yaml").write_text(text.replace("SPEC", two))
        line = cli("check", *(f"--config={name}" for name in ("contrastive/emoji", "one.yaml", "two.yaml"))).refusal
        assert line.startswith("two.yaml:1: ") and "--trust writes lets a configuration " in line


def test_nor_is_a_file_the_command_line_whatever_its_name(toy: Cli, workplace: Path) -> None:
    (workplace / "--minus.yaml").write_text("trainer: {default_root_dir: /tmp/elsewhere}")
    assert "--trust writes" in toy("check", "--config", "./--minus.yaml").refusal


@pytest.mark.parametrize("path", ["descant.load", "descant.export.loading.load", "timm.create_model"])
def test_a_function_is_not_called(cli: Cli, workplace: Path, sentinel: Path, path: str) -> None:
    """descant.load would read another configuration, and trust whom it is told to."""
    (workplace / "other").mkdir()
    (workplace / "other" / "config.yaml").write_text("model: {class_path: sentinel.Tower}")
    (workplace / "x.yaml").write_text(f"model: {{class_path: {path}, init_args: {{path: other, trust: [sentinel]}}}}")
    line = cli("check", "--config", "contrastive/emoji", "--config", "x.yaml").refusal
    assert line.startswith("x.yaml:1: ") and path in line and not sentinel.exists()


def test_nor_by_the_configuration_of_an_export(workplace: Path) -> None:
    node = {"class_path": "timm.create_model", "init_args": {"model_name": "resnet18"}}
    with (
        saved.policy(lambda name: None),
        pytest.raises(ValueError, match=r"config.yaml: class_path timm.create_model: not a class"),
    ):
        saved.build(torch.nn.Module, node, workplace / "config.yaml")


def test_a_folder_is_no_checkpoint(toy: Cli, workplace: Path) -> None:
    assert toy("fit", "--name", "a").rc == 0
    (workplace / "shards").mkdir()
    (workplace / "shards" / ".metadata").write_bytes(b"")
    line = toy("test", "--run", "a/001", "--ckpt_path", "shards").refusal
    assert line == "--ckpt_path shards: a folder; a checkpoint is one file"
    with pytest.raises(ValueError, match="shards: a folder; a checkpoint is one file"):
        Sharded("gloo").load_checkpoint(workplace / "shards")


def test_what_lies_in_a_folder_is_not_imported_there(workplace: Path) -> None:
    """Processes that are begun look for modules where they are installed."""
    (workplace / "json.py").write_text("open('imported', 'w').close()")
    run_beside([Task("version", ("--version",), workplace / "log")], 1, lambda *_: None)
    assert not (workplace / "imported").exists()


@pytest.mark.parametrize("name", ["x\ntouch imported #", 'x" touch'])
def test_a_name_is_no_line_of_a_script(toy: Cli, workplace: Path, name: str) -> None:
    done = toy_submit(toy, name)
    assert done.rc == 2 and len(done.err.splitlines()) == 1 and "printable characters" in done.err


def toy_submit(toy: Cli, name: str) -> Result:
    from descant.slurm.submit import main

    try:
        main(
            ["--time", "60", "--dry-run", "--", "fit", "--config", "toy.yaml", "--trust", "tests.toys", "--name", name]
        )
    except Refusal as refusal:
        return Result(2, "", f"descant: {refusal}\n")
    return Result(0, "", "")


def test_a_run_of_too_many_values_is_not_read(workplace: Path) -> None:
    (workplace / "config.yaml").write_text("model: {class_path: x}\n" + BOMB)
    with pytest.raises(ValueError, match="more than 100,000 values, aliases included"):
        saved.find(workplace)
    (workplace / "config.yaml").write_text("model: &m {class_path: x, again: *m}")
    with pytest.raises(ValueError, match=r"more than 100,000 values|nested too deeply"):
        saved.find(workplace)


def test_trust_and_options_may(toy: Cli, workplace: Path) -> None:
    (workplace / "over.yaml").write_text("trainer: {default_root_dir: elsewhere}")
    assert toy("check", "--config", "over.yaml", "--trust", "writes").rc == 0
    assert toy("check", "--trainer.default_root_dir", "elsewhere").rc == 0
    assert "--trust writes" in toy("check", "--config", "over.yaml", "--trust", "shell").refusal
    assert not is_allowed("writes.anything", ["writes"]), "a word is no module"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (BOMB, "bad.yaml: more than 100,000 values, aliases included"),
        ("[" * 5000, "bad.yaml:1: not valid YAML: exceeded maximum nesting depth"),
        ("model: &m {again: *m}", "bad.yaml: nested too deeply, or within itself"),
        (
            "model: !!python/object/apply:os.system [touch imported]",
            "bad.yaml:1: !!python/object/apply:os.system: objects are not read from YAML",
        ),
        ("model: !!python/name:os.system", "bad.yaml:1: !!python/name:os.system: objects"),
        ("model: !!binary |\n  !!!", "bad.yaml:"),
        ("name: 0x_", "bad.yaml: not valid YAML: "),
        ("name: !!int abc", "bad.yaml: not valid YAML: "),
        ("{[a]: 1}", "bad.yaml:1: a key is a word"),
    ],
)
def test_yaml_that_is_no_configuration(toy: Cli, workplace: Path, text: str, line: str) -> None:
    (workplace / "bad.yaml").write_text(text)
    before = sorted(workplace.rglob("*"))
    assert toy("check", "--config", "bad.yaml").refusal.startswith(line)
    assert sorted(workplace.rglob("*")) == before


# data ---------------------------------------------------------------------------------------------------------------


def _png(width: int, height: int) -> bytes:
    """A picture whose few bytes announce what they like."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9)) + chunk(b"IEND", b"")


GIF = b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"
WEBP = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff" * 6
WAV = b"RIFF" + struct.pack("<I8sIHHIIHH4sI", 2**31, b"WAVEfmt ", 16, 1, 2, 192_000, 768_000, 4, 16, b"data", 2**31)


@pytest.mark.parametrize("data", [_png(50_000, 50_000), _png(2**31 - 1, 2**31 - 1), GIF, WEBP])
def test_a_picture_that_claims_too_much_is_a_fault_of_its_sample(data: bytes) -> None:
    from descant.datamodules.fields.fields import ImageField

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, (error,) = ImageField(size=32).decode([data], None)
    assert error is not None and "more than the limit of 89,478,485" in error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB: what it claims is gigabytes


def test_a_sound_is_as_long_as_its_bytes() -> None:
    from descant.datamodules.fields.fields import AudioField

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x_BS, (error,) = AudioField(rate=16_000, seconds=1.0).decode([WAV + bytes(1000)], None)
    assert error is None and x_BS.shape[1] == 16_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_weights_that_claim_too_much(tmp_path: Path) -> None:
    from descant.modules.io.saved import Saved, read_weights

    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read .*[Hh]eader ?[Tt]oo ?[Ll]arge"):
        read_weights(Saved(tmp_path, file, {}))
