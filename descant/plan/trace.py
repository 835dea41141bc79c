"""Work of a training step on a rank: kernels, collectives and memory, without times, which depend on the hardware."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

#: Phases, in the order of a step.
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Operation:
    """One kernel.

    Attributes:
        name: operator of aten, such as ``mm``. phase: one of :data:`PHASES`.
        flops: of products, convolutions and attention; 0 for others.
        read, written: bytes of input and output tensors; an operator that only returns views is no operation.
        dtype: the type it computes in, such as ``bfloat16``.
        done: share of ``flops`` that the kernel does. Causal attention skips masked pairs, but ``flops`` counts them,
            as MFU does (Chowdhery 2022, PaLM, appendix B).
        repeated: share of ``flops`` that repeats the forward pass. The kernel belongs to a block or logits that
            backward recomputes, or it is the backward of fused attention, which recomputes the attention weights.
    """

    name: str
    phase: str
    flops: int
    read: int
    written: int
    dtype: str
    done: float = 1.0
    repeated: float = 0.0


@dataclass(frozen=True)
class Collective:
    """One message between ranks.

    Attributes:
        name: all_gather, reduce_scatter, all_reduce, all_to_all, broadcast, send or recv. phase: as of an operation.
        bytes: those of the larger of its two sides on a rank: the gathered, reduced or sent data.
        ranks: of its group. stride: from one rank of the group to the next; at ``gpus_per_node`` or more, each is on
            another node.
        overlapped: whether the rank computes meanwhile, as with parameters and gradients; otherwise it waits.
        after: number of operations of the step that precede it.
    """

    name: str
    phase: str
    bytes: int
    ranks: int
    stride: int = 1
    overlapped: bool = False
    after: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: those that stay from step to step, and the peak.

    ``peak`` is the maximum at any moment. ``activations`` is the part of it that is not weights, optimizer states,
    gradients or buckets, so the parts add up to the peak. ``largest`` is the largest single tensor made in a step.
    """

    weights: int
    optimizer: int
    gradients: int
    buckets: int
    activations: int
    largest: int = 0

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.buckets + self.activations


@dataclass
class Trace:
    """One optimizer step of a rank, with ``rows`` samples (and ``tokens``) over all of its micro-batches.

    Operations and collectives are in the order of the step.
    """

    rows: int
    memory: Memory
    operations: list[Operation] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    tokens: int = 0

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)

    @property
    def model_flops(self) -> int:
        """Return the FLOPs of the forward pass and of its gradients, without those that backward repeats.

        >>> again = Operation("mm", "backward", 8, 0, 0, "float32", repeated=1.0)
        >>> Trace(1, Memory(0, 0, 0, 0, 0), [Operation("mm", "forward", 8, 0, 0, "float32"), again]).model_flops
        8
        """
        return sum(round(operation.flops * (1 - operation.repeated)) for operation in self.operations)

    def bytes_by_collective(self) -> Counter[str]:
        """Count bytes by kind of collective.

        >>> trace = Trace(1, Memory(0, 0, 0, 0, 0), [], [Collective("all_reduce", "backward", 8, 2)] * 2)
        >>> trace.bytes_by_collective()
        Counter({'all_reduce': 16})
        """
        counts: Counter[str] = Counter()
        for one in self.collectives:
            counts[one.name] += one.bytes
        return counts
