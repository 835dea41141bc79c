"""Cards, links and nodes as data, read from YAML: files that ship, by name, or a user's own file.

Units are those of data sheets: bytes in powers of ten (80 GB), bandwidth per second and direction (3.35 TB/s, or
400 Gb/s in bits), arithmetic (989 TFLOP/s, dense), times (5 us). Numbers without a unit are bytes, FLOP or seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import yaml

from descant.cli.errors import fail
from descant.cli.untrusted import yaml_of
from descant.modules.core.errors import no_such, one_line
from descant.plan.quantities import Curve, quantity, round_to_digits

#: The files that ship.
FOLDER = Path(__file__).parent / "hardware"
#: Bytes that an operation moves: up to CACHED the caches hold them; from STREAMED on, not with several processes.
CACHED, STREAMED = 8 << 20, 32 << 20


@dataclass(frozen=True)
class Card:
    """One accelerator, or one processor.

    Attributes:
        name: as in its data sheet. source: where the numbers come from.
        memory: bytes. bandwidth: of memory, in bytes/s. peak: dense FLOP/s of products, by dtype.
        launch: seconds of the host per operation, while the accelerator computes earlier operations.
        product_share, bandwidth_share: share of ``peak`` that large products reach, and of ``bandwidth`` that streams
            reach.
        attention_share: share of ``peak`` that fused attention reaches: on an A100 at most 0.73 forward and 0.63
            backward, and 0.5 or more (FlashAttention-2, Dao 2023, arXiv 2307.08691).
        kernel: least seconds of a kernel, whatever its size: an estimate near the 2.9 us that one of 500,000 numbers
            takes on a V100 (Gray 2019, "Getting Started with CUDA Graphs", NVIDIA).
    """

    name: str
    source: str
    memory: Annotated[float, "bytes"]
    bandwidth: Annotated[float, "bandwidth"]
    peak: Annotated[dict[str, float], "arithmetic"]
    launch: Annotated[float, "time"]
    product_share: Annotated[float, "share"]
    bandwidth_share: Annotated[float, "share"]
    attention_share: Annotated[float, "share"] = 0.6
    kernel: Annotated[float, "time"] = 2.5e-6

    def flop_rate(self, dtype: str, share: float | None = None) -> float:
        """Return FLOP/s at a share of the peak, by default that of large products.

        A dtype without its own peak uses the peak of float32.
        """
        return (self.product_share if share is None else share) * self.peak.get(dtype, self.peak["float32"])


@dataclass(frozen=True)
class Link:
    """A link between ranks: ``bandwidth`` in bytes/s per rank and direction, ``latency`` in seconds per message.

    ``share`` is the part of the bandwidth that large messages reach. ``curves``, if measured, give the seconds of a
    collective by its bytes, right after another message; the key ``all_reduce/2`` is for two ranks. ``apart`` gives the
    same after ``seconds`` of computation, in which ranks drift apart and their caches lose data.
    """

    bandwidth: Annotated[float, "bandwidth"]
    latency: Annotated[float, "time"]
    share: Annotated[float, "share"] = 1.0
    curves: dict[str, Curve] = field(default_factory=dict)
    apart: dict[str, Curve] = field(default_factory=dict)
    seconds: Annotated[float, "time"] = 0.0

    def measured_seconds(self, key: str, size: float, computed: float) -> float | None:
        """Return the seconds of a message after ``computed`` seconds of computation, or None if it was not measured.

        They are interpolated linearly between both curves, and never exceed the second one.

        >>> near, apart = ({"all_reduce/2": Curve((8.0,), (seconds,))} for seconds in (1.0, 3.0))
        >>> link = Link(1e9, 1e-4, 1.0, near, apart, seconds=0.5)
        >>> [link.measured_seconds("all_reduce/2", 8, seconds) for seconds in (0, 0.25, 9)]
        [1.0, 2.0, 3.0]
        >>> link.measured_seconds("send/2", 8, 0)
        """
        if key not in self.curves:
            return None
        near = self.curves[key](size)
        if key not in self.apart or not self.seconds:
            return near
        return near + (self.apart[key](size) - near) * min(1.0, computed / self.seconds)

    @property
    def rate(self) -> float:
        """Return the bytes/s that large messages reach."""
        return self.bandwidth * self.share


@dataclass(frozen=True)
class Calibration:
    """Measurements on a machine, which replace the data sheet.

    Attributes:
        machine: processor, threads and torch.
        curves: seconds of an operation by its size, by class and dtype, such as ``product/float32``.
        overhead: seconds of an operation beside its kernel (modules, dispatch, autograd), by phase.
        step: seconds of a step without operations (trainer, hooks, optimizer).
        fresh: seconds per byte that the system provides and clears anew in each step. It applies to activations beyond
            ``kept`` bytes, the most that glibc's allocator keeps (mallopt(3), twice the largest M_MMAP_THRESHOLD).
    """

    machine: str
    curves: dict[str, Curve] = field(default_factory=dict)
    overhead: Annotated[dict[str, float], "time"] = field(default_factory=dict)
    step: Annotated[float, "time"] = 0.0
    fresh: Annotated[float, "time"] = 0.0
    kept: Annotated[float, "bytes"] = 67e6


@dataclass(frozen=True)
class Hardware:
    """A card, and the machine around it.

    Attributes:
        within, between: the link between two ranks of a node, and between two nodes.
        node: ranks of a node. store: bytes/s with which a node writes checkpoints.
        contention: factor by which computation slows down, by the number of processes on the cores of a node; 1 for
            accelerators. streams: the same for passes over more memory than caches hold, if measured.
        overlap: share of an overlapped message that costs the rank nothing; 0 if its cores send the message.
        calibration: the measurements, if there are any.
    """

    card: Card
    within: Link
    between: Link
    node: int
    store: float
    contention: dict[int, float] = field(default_factory=lambda: {1: 1.0})
    streams: dict[int, float] = field(default_factory=dict)
    overlap: float = 1.0
    calibration: Calibration | None = None

    def slowdown(self, processes: int, moved: float = 0.0) -> float:
        """Return the slowdown of an operation that moves ``moved`` bytes, with ``processes`` on the cores of a node.

        Between measured numbers of processes it is interpolated linearly; beyond the last one it grows in proportion.
        Between :data:`CACHED` and :data:`STREAMED` bytes it is interpolated by the logarithm.

        >>> from dataclasses import replace
        >>> cpu = replace(load("cpu"), contention={1: 1.0, 2: 1.1, 4: 2.2}, streams={1: 1.0, 2: 1.7, 4: 3.0})
        >>> cpu.slowdown(1), round(cpu.slowdown(3), 3), round(cpu.slowdown(8), 3)
        (1.0, 1.65, 4.4)
        >>> [round(cpu.slowdown(2, megabytes * 2**20), 3) for megabytes in (1, 8, 16, 64)]
        [1.1, 1.1, 1.4, 1.7]
        """
        cached = _among(self.contention, processes)
        share = math.log(max(1.0, moved / CACHED)) / math.log(STREAMED / CACHED)
        return cached + min(1.0, share) * (_among(self.streams or self.contention, processes) - cached)


def _among(known: dict[int, float], processes: int) -> float:
    numbers = sorted(known)
    if not numbers or processes <= numbers[0]:
        return known.get(processes, 1.0)
    if processes >= numbers[-1]:
        return known[numbers[-1]] * (1 if len(numbers) == 1 else processes / numbers[-1])
    high = next(n for n in numbers if n >= processes)
    low = max(n for n in numbers if n < processes)
    return known[low] + (processes - low) / (high - low) * (known[high] - known[low])


# reading ------------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """List the names of the hardware that ships, in alphabetical order.

    >>> "h100" in names(), "cpu" in names()
    (True, True)
    """
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load(name_or_file: str | Path) -> Hardware:
    """Load hardware by its shipped name, or from a YAML file, which may begin with ``extends: h100``.

    >>> card = load("h100").card
    >>> card.memory, card.peak["bfloat16"]
    (80000000000.0, 989400000000000.0)
    """
    return _hardware(_content(name_or_file, ()), str(name_or_file))


def _content(name_or_file: str | Path, above: tuple[str, ...]) -> dict[str, Any]:
    text = str(name_or_file)
    shipped = FOLDER / f"{text}.yaml"
    file = shipped if re.fullmatch(r"[\w.-]+", text) and shipped.is_file() else Path(text)
    if not file.is_file():
        if file.suffix not in (".yaml", ".yml") and "/" not in text:
            fail(f"hardware {text!r}: {no_such(text, names())}; or a YAML file")
        fail(f"hardware {text!r}: no such file, and none of those that ship ({', '.join(names())})")
    try:
        content = yaml_of(file)
    except (OSError, ValueError) as error:
        fail(f"{text}: {one_line(error, 200)}")
    if not isinstance(content, dict):
        fail(f"{text}: keys and values, such as {', '.join(_keys(Hardware))}")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        fail(f"{text}: extends: {base!r}: the name of hardware that ships, or another file")
    if str(file.resolve()) in above:
        fail(f"{text}: extends: {base!r}: in a circle")
    if base not in names() and not Path(base).is_absolute():
        beside = file.parent / base
        base = str(beside) if beside.is_file() else base
    return _merge(_content(base, (*above, str(file.resolve()))), content)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        inner = both.get(key)
        both[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def _keys(part: type) -> list[str]:
    return [f.name for f in fields(part)]


def _require(content: Any, known: list[str], needed: list[str], place: str, file: str) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        fail(f"{file}: {place or 'content'}: keys and values, such as {', '.join(known)}")
    for key in content:
        if key not in known:
            fail(f"{file}: {place}{'.' if place else ''}{key}: {no_such(str(key), known)}")
    for key in needed:
        if key not in content:
            fail(f"{file}: {place}{'.' if place else ''}{key} is missing")
    return content


def _part(part: Any, content: Any, place: str, file: str) -> Any:
    """Read a dataclass of texts, quantities, and quantities by name."""
    needed = [f.name for f in fields(part) if f.default is MISSING and f.default_factory is MISSING]
    content = _require(content, _keys(part), needed, place, file)
    made: dict[str, Any] = {}
    hints = get_type_hints(part, include_extras=True)
    for one in fields(part):
        if one.name not in content:
            continue
        value, where = content[one.name], f"{place}.{one.name}"
        kind = next(iter(getattr(hints[one.name], "__metadata__", ())), None)
        if kind is None:
            made[one.name] = _curves(value, where, file) if one.name in ("curves", "apart") else str(value)
        elif get_origin(hints[one.name].__origin__) is dict:
            inner = _require(value, list(map(str, value)) if isinstance(value, dict) else [], [], where, file)
            made[one.name] = {str(k): _quantity(v, kind, f"{where}.{k}", file) for k, v in inner.items()}
        else:
            made[one.name] = _quantity(value, kind, where, file)
    return part(**made)


def _quantity(value: Any, kind: str, place: str, file: str) -> float:
    try:
        return quantity(value, kind)
    except ValueError as error:
        fail(f"{file}: {place}: {error}")


def _curves(content: Any, place: str, file: str) -> dict[str, Curve]:
    curves = {}
    for name, points in _require(content, list(content) if isinstance(content, dict) else [], [], place, file).items():
        try:
            curves[str(name)] = Curve(*zip(*(map(float, point) for point in points), strict=True))
        except (TypeError, ValueError) as error:
            fail(f"{file}: {place}.{name}: pairs of size and seconds, rising: {one_line(error)}")
    return curves


def _times(key: str, content: Any, file: str) -> dict[int, float]:
    if not isinstance(content, dict) or not all(isinstance(n, int) and n > 0 for n in content):
        fail(f"{file}: {key}: how many times longer by the number of processes, such as {{1: 1, 2: 1.1}}")
    return {n: _quantity(times, "number", f"{key}.{n}", file) for n, times in content.items()}


def _hardware(content: dict[str, Any], file: str) -> Hardware:
    _require(content, _keys(Hardware), ["card", "within", "between", "node", "store"], "", file)
    card = _part(Card, content["card"], "card", file)
    if "float32" not in card.peak:
        fail(f"{file}: card.peak.float32 is missing")
    node = content["node"]
    if not isinstance(node, int) or isinstance(node, bool) or node < 1:
        fail(f"{file}: node: {node!r}: a number of ranks, at least 1")
    measured = content.get("calibration")
    return Hardware(
        card,
        _part(Link, content["within"], "within", file),
        _part(Link, content["between"], "between", file),
        node,
        _quantity(content["store"], "bandwidth", "store", file),
        _times("contention", content.get("contention", {1: 1.0}), file),
        _times("streams", content.get("streams", {}), file),
        _quantity(content.get("overlap", 1.0), "part", "overlap", file),
        None if measured is None else _part(Calibration, measured, "calibration", file),
    )


# writing ------------------------------------------------------------------------------------------------------------


def to_yaml(hardware: Hardware) -> str:
    """Write the YAML text from which :func:`load` reads the same hardware, to six digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, Curve):
            return [[round_to_digits(x), round_to_digits(y)] for x, y in zip(value.sizes, value.seconds, strict=True)]
        if hasattr(value, "__dataclass_fields__"):
            items = ((f.name, getattr(value, f.name)) for f in fields(value))
            return {name: plain(inner) for name, inner in items if inner is not None and inner != {}}
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return round_to_digits(value) if isinstance(value, float) else value

    return yaml.safe_dump(plain(hardware), sort_keys=False, default_flow_style=None, width=120)
