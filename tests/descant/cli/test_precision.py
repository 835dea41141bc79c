"""`trainer.precision: auto`: what it becomes on which machine, what a run keeps, and what is refused or warned of."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from descant.cli import precision
from descant.cli.errors import Refusal
from tests.conftest import Result

Toy = Callable[..., Result]


def machine(monkeypatch: pytest.MonkeyPatch, unit: str | None, slower: float = 11.4) -> None:
    """A CPU that multiplies bfloat16 by ``unit``, or emulates it so many times slower."""
    monkeypatch.setattr(precision, "cpu_bfloat16", lambda: unit)
    monkeypatch.setattr(precision, "slowdown", lambda: slower)


def capabilities(monkeypatch: pytest.MonkeyPatch, level: str, avx512: bool, amx: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": avx512, "amx_tile": amx})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


def chosen(folder: str = "runs/toy/001") -> object:
    return yaml.safe_load(Path(folder, "config.yaml").read_text())["trainer"]["precision"]


@pytest.mark.parametrize(
    ("level", "avx512", "amx", "unit"),
    [
        ("AVX512", True, False, "AVX512-BF16"),
        ("AVX512", True, True, "AMX"),
        ("AVX512", False, False, None),
        ("AVX2", True, True, None),  # kernels below AVX-512, whatever the processor has
        ("DEFAULT", False, False, None),
    ],
)
def test_a_cpu_computes_bfloat16_where_torch_does(
    level: str, avx512: bool, amx: bool, unit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities(monkeypatch, level, avx512, amx)
    assert precision.cpu_bfloat16() == unit
    assert precision.choose("cpu")[0] == ("bf16-mixed" if unit else "32-true")


@pytest.mark.slow
def test_a_real_process_below_avx512_takes_float32() -> None:
    code = "from descant.cli import precision; print(precision.choose('cpu')[0])"
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "32-true"


def test_gpus_take_bfloat16_where_it_is_not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert precision.choose("cuda")[0] == precision.choose("gpu")[0] == ("bf16-mixed" if native else "32-true")
    assert precision.choose("mps")[0] == "32-true"


def test_auto_is_resolved_reported_and_saved(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, None)
    result = toy("fit", "--trainer.max_steps=1", "--trainer.precision=auto")
    assert result.rc == 0 and result.err.count("precision 32-true: this CPU would have to emulate bfloat16") == 1
    assert chosen() == "32-true" and "emulates" not in result.err


def test_a_resumed_run_keeps_its_precision_and_warns_where_it_is_emulated(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, "AVX512-BF16")
    assert toy("fit", "--trainer.max_steps=1", "--trainer.precision=auto").rc == 0
    assert chosen() == "bf16-mixed"
    machine(monkeypatch, None)
    again = ("--trainer.max_steps=2", "--trainer.precision=auto", "--resume=auto", "--changed=allow")
    result = toy("fit", *again)
    assert result.rc == 0 and chosen() == "bf16-mixed", result.err
    assert "precision bf16-mixed: that of the run which is resumed" in result.err
    assert "a matrix product takes 11 times as long as in float32" in result.err
    assert "precision: " not in result.err.replace("trainer.precision bf16-mixed: ", ""), "no setting differs"
    # another precision by name is a changed setting, like any other
    refused = toy("fit", "--trainer.max_steps=2", "--trainer.precision=32-true", "--resume=auto")
    assert refused.rc == 2 and "trainer.precision: bf16-mixed in the run, 32-true here" in refused.err


@pytest.mark.parametrize(("unit", "warned"), [(None, 1), ("AMX", 0)])
def test_emulated_bfloat16_by_name_is_one_line_before_the_first_step(
    unit: str | None, warned: int, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, unit)
    result = toy("fit", "--trainer.max_steps=1", "--trainer.precision=bf16-mixed")
    assert result.rc == 0 and result.err.count("this CPU emulates bfloat16") == warned
    assert chosen() == "bf16-mixed"


def test_the_other_ranks_take_what_rank_0_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from descant.run import runs

    decided = runs.Run(tmp_path, fresh=True, precision="32-true")
    assert runs.agree(tmp_path, lambda: decided) is decided
    monkeypatch.setenv("RANK", "1")
    assert runs.agree(tmp_path, lambda: pytest.fail("rank 0 decides")).precision == "32-true"
    runs.forget()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--trainer.precision=bf15-mixed",), "got 'bf15-mixed'; nearest: bf16-mixed"),
        (
            ("--trainer.precision=auto", "--trainer.accelerator=xpu"),
            "trainer.precision: auto knows cpu, cuda and mps, not xpu; name one, such as 32-true",
        ),
        (
            ("--trainer.precision=auto", "--trainer.strategy=single_xla"),
            "trainer.precision: auto, but trainer.strategy single_xla sets the precision itself",
        ),
        (
            ("--trainer.precision=auto", "--trainer.plugins=DoublePrecision"),
            "trainer.precision: auto, but trainer.plugins DoublePrecision sets the precision itself",
        ),
        (("--trainer.accelerator=cuda",), "`CUDAAccelerator` can not run on your system"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: tuple[str, ...], line: str, toy: Toy) -> None:
    if torch.cuda.is_available() and options[-1].endswith("cuda"):
        pytest.skip("this machine has it")
    result = toy("fit", *options)
    said = [line for line in result.err.splitlines() if not line.startswith("descant: precision")]
    assert result.rc == 2 and len(said) == 1 and line in said[0], result.err
    assert not list(Path("runs").glob("toy/*")), "a refused run leaves nothing"


def test_a_plugin_or_strategy_that_sets_the_precision_is_found() -> None:
    inside = Namespace(class_path="FSDPStrategy", init_args={"precision_plugin": object()})
    options = Namespace(strategy=inside)
    options.get = lambda key: {"precision": "auto", "strategy": inside}.get(key)
    with pytest.raises(Refusal, match=r"trainer\.strategy FSDPStrategy\.precision_plugin sets"):
        precision.resolve(options, None, print)
