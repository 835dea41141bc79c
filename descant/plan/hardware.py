"""Cards, links and nodes as data, read from YAML: those that ship, by name, and a user's own file.

Units are those of data sheets: bytes in powers of ten (80 GB), bandwidth a second and direction (3.35 TB/s, or 400 Gb/s in
bits), arithmetic (989 TFLOP/s, dense), times (5 us); a number without a unit is of bytes, FLOP and seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from descant.cli.errors import fail
from descant.modules.core.errors import hint, no_such, one_line

#: The files that ship.
FOLDER = Path(__file__).parent / "hardware"
_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
UNITS: dict[str, dict[str, float]] = {
    "bytes": {f"{p}B": size for p, size in _PREFIX.items()} | {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "bandwidth": {
        **{f"{p}B/s": size for p, size in _PREFIX.items()},
        **{f"{p}b/s": size / 8 for p, size in _PREFIX.items()},
    },
    "arithmetic": {f"{p}FLOP/s": size for p, size in _PREFIX.items()},
    "time": _TIMES,
    "share": {"": 1.0, "%": 0.01},
    "part": {"": 1.0, "%": 0.01},
    "number": {"": 1.0},
}


def quantity(value: Any, kind: str) -> float:
    """A number with or without a unit of its kind, in bytes, bytes a second, FLOP a second, seconds or parts of one.

    >>> quantity("80 GB", "bytes"), quantity("400 Gb/s", "bandwidth"), quantity("5 us", "time"), quantity("60 %", "share")
    (80000000000.0, 50000000000.0, 5e-06, 0.6)

    Raises:
        ValueError: for what is no number above 0 (a time or a part may be 0), has no unit of the kind, or is a share above 1.
    """
    units = UNITS[kind]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r}: a number{_with(kind)}")
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*", str(value))
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    least = 0.0 if kind in ("time", "part") else math.ulp(0.0)
    if match is None or not least <= number < math.inf:
        raise ValueError(f"{value!r}: a number above 0{_with(kind)}")
    if match[2] and match[2] not in units:
        raise ValueError(f"{value!r}: no unit of {kind}{hint(match[2], [u for u in units if u], most=20)}")
    number = rounded(number * (units[match[2]] if match[2] else 1.0), 12)
    if kind in ("share", "part") and number > 1:
        raise ValueError(f"{value!r}: a share of at most 1")
    return number


def _with(kind: str) -> str:
    examples = {"bytes": "80 GB", "bandwidth": "400 Gb/s", "arithmetic": "312 TFLOP/s", "time": "5 us", "share": "60 %"}
    return f", such as {examples[kind]}" if kind in examples else ""


def _of(kind: str, **more: Any) -> Any:
    return field(metadata={"kind": kind}, **more)


@dataclass(frozen=True)
class Curve:
    """Measured seconds by size (FLOPs of products, bytes of all else): log-log between points, in proportion beyond
    the last one, and never less than at the first.

    >>> curve = Curve((1e3, 1e5), (1e-6, 1e-4))
    >>> f"{curve(1e4):.1e} {curve(1e6):.1e} {curve(1.0):.1e}"
    '1.0e-05 1.0e-03 1.0e-06'
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.seconds):
            raise ValueError(f"{len(self.sizes)} sizes and {len(self.seconds)} times: as many of both, and some")
        if any(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError("sizes in rising order")

    def __call__(self, size: float) -> float:
        if size <= self.sizes[0]:
            return self.seconds[0]
        if size >= self.sizes[-1]:
            return self.seconds[-1] * size / self.sizes[-1]
        high = next(n for n, known in enumerate(self.sizes) if known > size)
        (x0, x1), (y0, y1) = self.sizes[high - 1 : high + 1], self.seconds[high - 1 : high + 1]
        share = math.log(size / x0) / math.log(x1 / x0)
        return math.exp(math.log(y0) + share * math.log(y1 / y0))


@dataclass(frozen=True)
class Card:
    """One accelerator, or one processor.

    Attributes:
        name: as in its data sheet. source: where the numbers are from.
        memory: bytes. bandwidth: of memory, bytes/s. peak: dense FLOP/s of products, by dtype.
        launch: seconds that an operation takes at least, whatever its size.
        product_share, bandwidth_share: what large products reach of ``peak``, and what streams reach of ``bandwidth``.
    """

    name: str
    source: str
    memory: float = _of("bytes")
    bandwidth: float = _of("bandwidth")
    peak: dict[str, float] = _of("arithmetic")
    launch: float = _of("time")
    product_share: float = _of("share")
    bandwidth_share: float = _of("share")

    def flop_rate(self, dtype: str) -> float:
        """FLOP/s that large products of a dtype reach; of one without a peak of its own, as of float32."""
        return self.product_share * self.peak.get(dtype, self.peak["float32"])


@dataclass(frozen=True)
class Link:
    """From one rank to the next: ``bandwidth`` in bytes/s a rank and direction, ``latency`` in seconds a message.

    ``share`` is what large messages reach of the bandwidth. ``curves``, where measured: seconds of a collective of so many ranks by its bytes, such as ``all_reduce/2``.
    """

    bandwidth: float = _of("bandwidth")
    latency: float = _of("time")
    share: float = _of("share", default=1.0)
    curves: dict[str, Curve] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Bytes/s that large messages reach."""
        return self.bandwidth * self.share


@dataclass(frozen=True)
class Calibration:
    """What was measured on a machine, in place of the data sheet.

    Attributes:
        machine: processor, threads and torch.
        curves: seconds of an operation by its size, by class and dtype, such as ``product/float32``.
        overhead: seconds of an operation beside its kernel (modules, dispatch, autograd), by phase.
        factor: of kernels that are no products inside a step, against the same ones on their own, by phase.
        step: seconds of a step without operations (trainer, hooks, optimizer).
    """

    machine: str
    curves: dict[str, Curve] = field(default_factory=dict)
    overhead: dict[str, float] = _of("time", default_factory=dict)
    factor: dict[str, float] = _of("number", default_factory=dict)
    step: float = _of("time", default=0.0)


@dataclass(frozen=True)
class Hardware:
    """A card, and the machine around it.

    Attributes:
        within, between: the link between two ranks of a node, and of two nodes.
        node: ranks of a node. store: bytes/s that a node writes to where checkpoints lie.
        contention: how many times longer computation takes with so many processes on the cores of a node, by their
            number; 1 for accelerators.
        overlap: share of a message beside the computation that costs the rank nothing; 0 where its cores send it.
        calibration: what was measured, if it was.
    """

    card: Card
    within: Link
    between: Link
    node: int = _of("count")
    store: float = _of("bandwidth")
    contention: dict[int, float] = field(default_factory=lambda: {1: 1.0})
    overlap: float = 1.0
    calibration: Calibration | None = None

    def slowdown(self, processes: int) -> float:
        """Of ``processes`` on the cores of a node: between measured numbers in proportion, beyond the last one too.

        >>> from dataclasses import replace
        >>> cpu = replace(load("cpu"), contention={1: 1.0, 2: 1.1, 4: 2.2})
        >>> cpu.slowdown(1), round(cpu.slowdown(3), 3), round(cpu.slowdown(8), 3)
        (1.0, 1.65, 4.4)
        """
        known = sorted(self.contention)
        if not known or processes <= known[0]:
            return self.contention.get(processes, 1.0)
        if processes >= known[-1]:
            return self.contention[known[-1]] * (1 if len(known) == 1 else processes / known[-1])
        high = next(n for n in known if n >= processes)
        low = max(n for n in known if n < processes)
        share = (processes - low) / (high - low)
        return self.contention[low] + share * (self.contention[high] - self.contention[low])


# reading ------------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Of the hardware that ships, in alphabetical order.

    >>> "h100" in names(), "cpu" in names()
    (True, True)
    """
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load(name_or_file: str | Path) -> Hardware:
    """Hardware that ships, by its name, or of a YAML file of one's own, which may begin with ``extends: h100``.

    >>> card = load("h100").card
    >>> card.memory, card.peak["bfloat16"]
    (80000000000.0, 989400000000000.0)

    Raises:
        Refusal: one line for a name that does not ship, a file that cannot be read, a key or a unit that is none.
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
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"{text}: {one_line(error, 200)}")
    if not isinstance(content, dict):
        fail(f"{text}: keys and values, such as {', '.join(_keys(Hardware))}")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str) or base in above or base == text:
        fail(f"{text}: extends: {base!r}: the name of hardware that ships, or another file")
    if base not in names() and not Path(base).is_absolute():
        beside = file.parent / base
        base = str(beside) if beside.is_file() else base
    return _merged(_content(base, (*above, text)), content)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        inner = both.get(key)
        both[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
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
    """A dataclass of texts, quantities, and quantities by name."""
    needed = [f.name for f in fields(part) if f.default is MISSING and f.default_factory is MISSING]
    content = _require(content, _keys(part), needed, place, file)
    made: dict[str, Any] = {}
    for one in fields(part):
        if one.name not in content:
            continue
        value, where, kind = content[one.name], f"{place}.{one.name}", one.metadata.get("kind")
        if kind is None:
            made[one.name] = _curves(value, where, file) if one.name == "curves" else str(value)
        elif str(one.type).startswith("dict"):
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


def _hardware(content: dict[str, Any], file: str) -> Hardware:
    _require(content, _keys(Hardware), ["card", "within", "between", "node", "store"], "", file)
    card = _part(Card, content["card"], "card", file)
    if "float32" not in card.peak:
        fail(f"{file}: card.peak.float32 is missing")
    node = content["node"]
    if not isinstance(node, int) or isinstance(node, bool) or node < 1:
        fail(f"{file}: node: {node!r}: a number of ranks, at least 1")
    contention = content.get("contention", {1: 1.0})
    if not isinstance(contention, dict) or not all(isinstance(n, int) and n > 0 for n in contention):
        fail(f"{file}: contention: how many times longer by the number of processes, such as {{1: 1, 2: 1.1}}")
    measured = content.get("calibration")
    return Hardware(
        card,
        _part(Link, content["within"], "within", file),
        _part(Link, content["between"], "between", file),
        node,
        _quantity(content["store"], "bandwidth", "store", file),
        {n: _quantity(times, "number", f"contention.{n}", file) for n, times in contention.items()},
        _quantity(content.get("overlap", 1.0), "part", "overlap", file),
        None if measured is None else _part(Calibration, measured, "calibration", file),
    )


# writing ------------------------------------------------------------------------------------------------------------


def to_yaml(hardware: Hardware) -> str:
    """The content of a file from which :func:`load` reads the same hardware, to six digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, Curve):
            return [[rounded(x), rounded(y)] for x, y in zip(value.sizes, value.seconds, strict=True)]
        if hasattr(value, "__dataclass_fields__"):
            items = ((f.name, getattr(value, f.name)) for f in fields(value))
            return {name: plain(inner) for name, inner in items if inner is not None and inner != {}}
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return rounded(value) if isinstance(value, float) else value

    return yaml.safe_dump(plain(hardware), sort_keys=False, default_flow_style=None, width=120)


def rounded(number: float, digits: int = 6) -> float:
    """To so many digits.

    >>> rounded(0.123456789), rounded(5 * 1e-6, 12)
    (0.123457, 5e-06)
    """
    return float(f"{number:.{digits}g}")

