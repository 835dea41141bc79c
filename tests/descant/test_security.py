"""A configuration is data: it names classes of an allow-list, and nothing else of it is imported or run."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from descant.store import AtomicIO
from descant.trust import ALLOWED, DENIED, allowed
from tests.conftest import TOY, Result

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
    *("lightning.pytorch.cli.instantiate_class", "transformers.pipeline", "descant.cli.run"),
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


@pytest.mark.parametrize("path", OUTSIDE)
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
    assert all(not allowed(f"{part}.anything") for part in DENIED)
    assert allowed("torch.utils.data.Sampler", ["torch.utils.data"]) and not allowed(
        "torch.utils.x", ["torch.utils.data"]
    )
    assert not allowed("torchvision.io.read_file") and not allowed("descantx.Thing")


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
    with pytest.raises(pickle.UnpicklingError):
        toy(command, key, path)
    assert not mark.exists()
