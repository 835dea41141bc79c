"""Hardware of a plan: what ships is whole and plausible, what a user writes is read or refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from descant.cli.errors import Refusal
from descant.plan.hardware import CACHED, Calibration, Hardware, load, names, to_yaml
from descant.plan.quantities import Curve, quantity
from tests.tolerance import F64, ulps

SHIPPED = (
    *("a100-40gb", "a100-80gb", "b200", "cpu", "h100", "h200", "l4", "l40s", "mi300x", "rtx3090", "rtx4090", "v100"),
)


def test_all_cards_ship() -> None:
    assert tuple(names()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_whole_and_plausible(name: str) -> None:
    hardware = load(name)
    card = hardware.card
    assert card.peak["float32"] <= card.peak["float16"]
    assert 8e9 <= card.memory < 300e9 and 4e10 <= card.bandwidth < 1e13
    assert hardware.within.rate >= hardware.between.rate and hardware.within.latency <= hardware.between.latency
    assert hardware.slowdown(1) == 1.0 and hardware.calibration is None
    if name != "cpu":
        assert hardware.overlap == 1.0 and hardware.slowdown(8) == 1.0


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "cpu"])
def test_every_number_of_a_data_sheet_is_dense_and_has_its_source(name: str) -> None:
    text = (Path(load.__code__.co_filename).parent / "hardware" / f"{name}.yaml").read_text()
    assert "source:" in text and "dense, without sparsity" in text
    assert text.count("#") >= 8


def test_a_file_of_ones_own_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: h100\nnode: 4\n")
    own = tmp_path / "own.yaml"
    own.write_text(
        "extends: base.yaml\nbetween: {bandwidth: 100 Gb/s}\ncard: {memory: 96 GB, peak: {bfloat16: 900 TFLOP/s}}\n"
    )
    found, theirs = load(own), load("h100")
    assert found.node == 4 and found.between.bandwidth == 12.5e9 and found.card.memory == 96e9
    assert found.card.peak == theirs.card.peak | {"bfloat16": 900e12}
    assert found.between.latency == theirs.between.latency and found.within == theirs.within


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    curves = {"product/float32": Curve((1e3, 1e6), (1.5e-6, 2e-4))}
    calibration = Calibration("a machine", curves, {"forward": 1e-5, "optimizer": 0.0}, 3e-4)
    cpu = load("cpu")
    near, apart = ({"all_reduce/2": Curve((4096.0, 65536.0), (least, 3e-4))} for least in (1e-4, 2e-4))
    link = replace(cpu.within, curves=near, apart=apart, seconds=1e-3)
    shared, streams = {1: 1.0, 4: 2.5}, {1: 1.0, 4: 3.5}
    measured = replace(cpu, calibration=calibration, within=link, overlap=0.0, contention=shared, streams=streams)
    file = tmp_path / "here.yaml"
    file.write_text(to_yaml(measured))
    assert load(file) == measured


BAD = {
    "gb: 3\n": "gb: no such name",
    "card: {memroy: 80 GB}\n": "card.memroy: no such name; did you mean memory?",
    "card: {memory: 80 Gb}\n": "card.memory: '80 Gb': no unit of bytes; nearest: GB",
    "card: {memory: many}\n": "card.memory: 'many': a number above 0, such as 80 GB",
    "card: {memory: -1}\n": "card.memory: -1: a number above 0",
    "card: {memory: [1]}\n": "card.memory: [1]: a number, such as 80 GB",
    "card: {product_share: 1.5}\n": "card.product_share: 1.5: a share of at most 1",
    "card: {peak: {float16: 900 TFLOPS}}\n": "card.peak.float16: '900 TFLOPS': no unit of arithmetic; nearest: TFLOP/s",
    "card: 5\n": "card: keys and values",
    "between: {latency: 5 minutes}\n": "between.latency: '5 minutes': no unit of time",
    "node: 0\n": "node: 0: a number of ranks, at least 1",
    "contention: {two: 2}\n": "contention: how many times longer",
    "streams: {2: fast}\n": "streams.2: 'fast': a number above 0",
    "overlap: 2\n": "overlap: 2: a share of at most 1",
    "within: {curves: {all_reduce/2: [[2, 1], [1, 1]]}}\n": "within.curves.all_reduce/2: pairs of size and seconds",
    "calibration: {curves: {}}\n": "calibration.machine is missing",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_is_one_line_with_file_and_key(text: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("extends: h100\n" + text)
    with pytest.raises(Refusal) as refused:
        load(file)
    line = str(refused.value)
    assert line.startswith(f"{file}: {BAD[text]}") and "\n" not in line


def test_a_missing_key_an_unknown_name_and_no_file(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("card: {name: x}\nwithin: {}\nbetween: {}\nnode: 1\nstore: 1\n")
    with pytest.raises(Refusal, match=r"own\.yaml: card\.source is missing"):
        load(file)
    with pytest.raises(Refusal, match=r"hardware 'h1000': no such name; did you mean h100\? \(known: a100-40gb, "):
        load("h1000")
    with pytest.raises(Refusal, match=r"no such file, and none of those that ship"):
        load(tmp_path / "none.yaml")
    file.write_text("extends: own.yaml\n")
    with pytest.raises(Refusal, match=r"extends: 'own\.yaml': in a circle"):
        load(file)
    file.write_text("card: {[\n")
    with pytest.raises(Refusal, match=r"own\.yaml: "):
        load(file)
    file.write_text("- 1\n")
    with pytest.raises(Refusal, match=r"own\.yaml: keys and values, such as card"):
        load(file)


def test_units() -> None:
    assert quantity("1 GiB", "bytes") == 2**30 and quantity("8 Gb/s", "bandwidth") == quantity("1 GB/s", "bandwidth")
    assert quantity(5, "time") == 5.0 and quantity("0 us", "time") == 0.0 and quantity("1e3", "bytes") == 1000.0


def test_a_curve_passes_its_points_and_goes_on_in_proportion() -> None:
    curve = Curve((10.0, 1000.0), (1.0, 9.0))
    assert (curve(10), curve(5), curve(2000)) == (1.0, 1.0, 18.0)
    assert curve(100) == pytest.approx(3.0, rel=ulps(8, F64))
    for sizes in ((), (2.0, 1.0)):
        with pytest.raises(ValueError, match="size"):
            Curve(sizes, (1.0,) * len(sizes))


def test_slowdown_rises_between_and_beyond_what_was_measured() -> None:
    cpu: Hardware = replace(load("cpu"), contention={1: 1.0, 2: 1.5, 4: 3.0})
    assert [cpu.slowdown(n) for n in (1, 2, 3, 4, 8)] == [1.0, 1.5, 2.25, 3.0, 6.0]
    assert cpu.slowdown(2, 1e12) == 1.5  # of passes over memory nothing is known
    measured = replace(cpu, streams={1: 1.0, 2: 2.5})
    assert [measured.slowdown(2, x * CACHED) for x in (0.5, 1, 2, 4, 8)] == [1.5, 1.5, 2.0, 2.5, 2.5]
    assert measured.slowdown(1, 1e12) == 1.0
