"""Seconds of operations, messages and steps, from a trace (trace.py) and the hardware (hardware.py).

Letters: n ranks of a group, L of them on a node, M nodes, S bytes, B bandwidth of a link, a its latency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from descant.plan.hardware import Hardware, Link
from descant.plan.operators import curve_keys, size_of
from descant.plan.trace import PHASES, Collective, Operation, Trace

#: What can bound a step.
BOUNDS = ("compute", "memory", "launches", "links")


def time_of(operation: Operation, hardware: Hardware) -> float:
    """Return the seconds of one operation alone on its card.

    From a data sheet, they are the largest of three times: ``FLOPs / (peak of the dtype x share)``,
    ``bytes / (bandwidth x share)``, and the least time of a kernel. FLOPs are those that the kernel does
    (``Operation.done``); the share is that of products or of fused attention. On calibrated hardware, they are the
    measured time of its class at its size plus the overhead of its phase.

    Source: Williams, Waterman and Patterson 2009, "Roofline".

    >>> from descant.plan.hardware import load
    >>> h100 = load("h100")
    >>> big = Operation("mm", "forward", 2 * 8192**3, 2 * 2 * 8192**2, 2 * 8192**2, "bfloat16")
    >>> f"{time_of(big, h100) * 1e3:.3f} ms"  # 2 x 8192^3 / (989.4e12 x 0.8)
    '1.389 ms'
    >>> f"{time_of(Operation('add', 'forward', 0, 8, 4, 'float32'), h100) * 1e6:.1f} us"
    '2.5 us'
    """
    return _find_bound(operation, hardware)[0]


def _find_bound(operation: Operation, hardware: Hardware) -> tuple[float, str, float]:
    """Return seconds, which of :data:`BOUNDS` limits them, and the share of them that memory alone would take."""
    kind, size = size_of(operation)
    card, measured = hardware.card, hardware.calibration
    share = card.attention_share if kind.startswith("attention") else card.product_share
    compute = operation.flops / card.flop_rate(operation.dtype, share)
    memory = (operation.read + operation.written) / (card.bandwidth * card.bandwidth_share)
    if measured is None:
        seconds, name = max((compute * operation.done, "compute"), (memory, "memory"), (card.kernel, "launches"))
        return seconds, name, min(1.0, memory / seconds)
    curves, phase = measured.curves, operation.phase
    curve = next((curves[key] for key in curve_keys(kind, operation.dtype) if key in curves), None)
    kernel = max(compute, memory) if curve is None else curve(size)
    overhead = measured.overhead.get(phase, card.launch)
    least = overhead + (curve.seconds[0] if curve is not None else 0.0)
    name = "launches" if kernel < least else "compute" if operation.flops else "memory"
    seconds = kernel + overhead
    return seconds, name, min(1.0, memory / seconds) if seconds else 0.0


def time_of_collective(collective: Collective, hardware: Hardware, computed: float = 0.0) -> float:
    """Return the seconds of one message of a group of ``n`` ranks.

    A ring over one link takes, for all_reduce ``2 (n-1) (S/(n B) + a)``; for all_gather, reduce_scatter and all_to_all
    ``(n-1) (S/(n B) + a)``; for broadcast ``S/B + (n-1) a``; for send and recv ``S/B + a``.

    A group with L > 1 ranks on each of M > 1 nodes works in levels; each rank has its own network card. all_reduce is a
    reduce_scatter of S within the node, an all_reduce of S/L between nodes, and an all_gather of S within. all_gather
    is one of S/L between nodes and one of S within; reduce_scatter is the same. all_to_all sends ``S (L-1)/n`` within
    and ``S (n-L)/n`` between; broadcast sends S over both. An all_reduce between nodes takes ``2 log2 M`` latencies, as
    in double trees.

    If a group of this size was measured, its measured time is used, after ``computed`` seconds of computation since the
    previous message.

    Source: NCCL's tests, doc/PERFORMANCE.md (bus bandwidth); Thakur 2005 (rings); Sanders 2009 (double trees, as in
    NCCL since 2.4).

    >>> from descant.plan.hardware import load
    >>> h100 = load("h100")
    >>> f"{time_of_collective(Collective('all_reduce', 'backward', 1 << 30, 8), h100) * 1e3:.2f} ms"
    '5.25 ms'
    >>> f"{time_of_collective(Collective('all_gather', 'forward', 1 << 30, 16), h100) * 1e3:.2f} ms"
    '4.12 ms'
    """
    n, name, size = collective.ranks, collective.name, float(collective.bytes)
    if n <= 1:
        return 0.0
    inside = min(n, max(1, hardware.node // max(1, collective.stride)))
    nodes = -(-n // inside)
    within, between = hardware.within, hardware.between
    if nodes == 1:
        return _ring(name, size, n, within, computed)
    if inside == 1:
        return _ring(name, size, n, between, computed, trees=True)
    if name == "all_to_all":
        return (
            size * (inside - 1) / n / within.rate
            + (inside - 1) * within.latency
            + size * (n - inside) / n / between.rate
            + (n - inside) * between.latency
        )
    if name == "all_reduce":
        scattered = _ring("reduce_scatter", size, inside, within, computed)
        middle = _ring(name, size / inside, nodes, between, trees=True)
        return scattered + middle + _ring("all_gather", size, inside, within)
    if name == "reduce_scatter":
        return _ring(name, size, inside, within, computed) + _ring(name, size / inside, nodes, between)
    if name in ("all_gather", "broadcast"):
        part = size / inside if name == "all_gather" else size
        return _ring(name, part, nodes, between, computed) + _ring(name, size, inside, within)
    return _ring(name, size, n, between, computed)


def _ring(name: str, size: float, n: int, link: Link, computed: float = 0.0, trees: bool = False) -> float:
    """Return the seconds of a group on one link; later levels of a message directly follow its first level."""
    known = link.measured_seconds(f"{name}/{n}", size, computed)
    if known is not None:
        return known
    if name in ("send", "recv"):
        return size / link.rate + link.latency
    if name == "broadcast":
        return size / link.rate + (n - 1) * link.latency
    times = 2 if name == "all_reduce" else 1
    steps = min(n - 1, math.ceil(math.log2(n))) if trees and name == "all_reduce" else n - 1
    return times * (size * (n - 1) / n / link.rate + steps * link.latency)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of a rank.

    Attributes:
        forward, backward, optimizer: computation by phase, including the wait for the host that launches it.
        host: seconds outside operations, of the trainer and of memory from the system.
        communication: of all messages. exposed: the part of it that the rank waits for.
        parts: seconds by :data:`BOUNDS`; they add up to the total without ``host``.
    """

    forward: float
    backward: float
    optimizer: float
    host: float
    communication: float
    exposed: float
    parts: dict[str, float]

    @property
    def compute(self) -> float:
        return self.forward + self.backward + self.optimizer

    @property
    def total(self) -> float:
        return self.compute + self.host + self.exposed

    @property
    def bottleneck(self) -> str:
        """Return which of :data:`BOUNDS` takes most of the step."""
        return max(BOUNDS, key=lambda name: self.parts[name])


def step_time(trace: Trace, hardware: Hardware, processes: int = 1) -> StepTime:
    """Return the seconds of a step: computation, and the messages that it does not hide.

    Launches: the host of an accelerator runs ahead of it and needs ``launch`` seconds per operation. So computation
    takes ``max(sum of kernels, operations x launch)``; the excess of the host is spread over the phases by their
    operations. On a calibrated machine, each operation takes its own overhead.

    Overlap: messages sent while the rank computes (``overlapped``) hide behind the computation of their own phase, as
    long as it lasts. The hardware's ``overlap`` scales this (0 if the cores that compute also send). The rank waits for
    the rest and for all other messages, with m the overlapped messages of a phase:

        exposed = sum of the others + sum over phases of m - overlap min(m, compute)

    Args:
        processes: ranks of this node that share its cores; 1 for accelerators.

    >>> from descant.plan.hardware import load
    >>> from descant.plan.trace import Memory
    >>> product = Operation("mm", "backward", 2 * 8192**3, 2 * 2 * 8192**2, 2 * 8192**2, "bfloat16")
    >>> sends = [Collective("all_reduce", "backward", 1 << 30, 8, overlapped=True)]
    >>> time = step_time(Trace(1, Memory(0, 0, 0, 0, 0), [product] * 3, sends), load("h100"))
    >>> f"{time.backward * 1e3:.2f} {time.communication * 1e3:.2f} {time.exposed * 1e3:.2f} ms", time.bottleneck
    ('4.17 5.25 1.08 ms', 'compute')
    """
    slowdown = hardware.slowdown(processes)
    computed, parts = dict.fromkeys(PHASES, 0.0), dict.fromkeys(BOUNDS, 0.0)
    launched, done = dict.fromkeys(PHASES, 0.0), [0.0]  # seconds of a rank alone, up to each operation
    for operation in trace.operations:
        alone, bound, memory = _find_bound(operation, hardware)
        streams = hardware.slowdown(processes, operation.read + operation.written)
        seconds = alone * (slowdown + memory * (streams - slowdown))
        computed[operation.phase] += seconds
        launched[operation.phase] += hardware.card.launch * slowdown
        parts[bound] += seconds
        done.append(done[-1] + alone)
    late = sum(launched.values()) - sum(computed.values())
    if late > 0 and hardware.calibration is None:
        parts["launches"] += late
        for phase in PHASES:
            computed[phase] += late * launched[phase] / sum(launched.values())
    host, measured, held = 0.0, hardware.calibration, trace.memory.activations
    if measured is not None:
        host = slowdown * (measured.step + measured.fresh * max(0.0, held - measured.kept))
    waited, beside = 0.0, dict.fromkeys(PHASES, 0.0)
    # the first message follows the last one of the previous step
    begun = done[trace.collectives[-1].after] - done[-1] - host / slowdown if trace.collectives else 0.0
    for message in trace.collectives:
        seconds = time_of_collective(message, hardware, done[message.after] - begun)
        begun = done[message.after]
        if message.overlapped:
            beside[message.phase] += seconds
        else:
            waited += seconds
    hidden = sum(hardware.overlap * min(beside[phase], computed[phase]) for phase in PHASES)
    communication = waited + sum(beside.values())
    parts["links"] = communication - hidden
    forward, backward, optimizer = (computed[phase] for phase in PHASES)
    return StepTime(forward, backward, optimizer, host, communication, communication - hidden, parts)
