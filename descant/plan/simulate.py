"""Simulate one training step of the real recipe as one of many ranks would take it, on tensors without data.

Recipe, parts, optimizer and FSDP2 are the real ones, and so are their kernels, messages and tensors. Nothing is
computed, and nothing is sent. DDP's reducer needs data, so its messages are derived from its rules. Callbacks do not
run.

Letters: B rows of a micro-batch on a rank, W ranks.
"""

from __future__ import annotations

import copy
import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from descant.cli.errors import fail
from descant.modules.core.batch import Batch, some
from descant.modules.core.compat.fake import DataDependentOutputException, DynamicOutputShapeException
from descant.modules.core.compat.pytree import tree_leaves
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.part import nested
from descant.modules.training_setup.optim import make_optimizer
from descant.modules.training_setup.sync_batch_norm import synchronize
from descant.plan.costs import nbytes
from descant.plan.fake_device import NAME, Simulated, on_device, patching_torch, register
from descant.plan.layout import Layout, Precision
from descant.plan.record import Recorder
from descant.plan.trace import Collective, Memory, Operation, Trace

#: Bytes of DDP's first bucket and of later ones, as in torch.
BUCKETS = (1 << 20, 25 << 20)
#: Folders that are skipped in the search for the code that reads a value.
_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)


class Simulation:
    """A copy of a recipe in one layout, whose step can be traced at several batch sizes.

    Use it inside :func:`descant.plan.fake_device.ranks` with the layout's ``world`` if that is above 1.

    Args:
        recipe: in training, configured but not sharded, on any device (meta if it would not fit).
        batch: some real samples on the CPU, which a planned batch repeats.
        gloo: whether ranks are on CPUs, with messages sent by gloo.
    """

    def __init__(self, recipe: Any, batch: Batch, layout: Layout, gloo: bool = False) -> None:
        self.recipe, self.batch, self.layout = recipe, batch, layout
        self.precision = Precision.of(recipe.trainer.precision)
        self.simulated, self.record = Simulated(), Recorder(copies=gloo)
        with self._context(recipe.trainer):
            self._build(recipe)
        self._warm = False

    def _build(self, recipe: Any) -> None:
        self.twin = _twin(recipe, self.layout, self.precision)
        self.optimizer = make_optimizer(recipe.optimization.optimizer, self.twin)
        for group in self.optimizer.param_groups:
            if group.get("foreach") is None and not group.get("fused"):  # torch decides by the device's name
                group["foreach"] = not self.record.copies

    @contextmanager
    def _context(self, trainer: Any) -> Iterator[None]:
        kept, trainer.log_every_n_steps = trainer.log_every_n_steps, 0
        try:
            with self.simulated, patching_torch(cpu=self.record.copies), self.record:
                yield
        finally:
            trainer.log_every_n_steps = kept

    def step(self, rows: int) -> Trace:
        """Trace a step with ``rows`` samples in each micro-batch of this rank, once the optimizer has its states."""
        with self._context(self.twin.trainer), _refused_reads(type(self.twin).__name__):
            tokens = self._take_step(rows) if self._warm else self._first(rows)
            self._warm = True
        twin, record, layout = self.twin, self.record, self.layout
        held = {id(x): x for state in self.optimizer.state.values() for x in tree_leaves(state)}
        states = sum(nbytes(_local(x)) for x in held.values() if on_device(_local(x)))
        weights = sum(nbytes(_local(x)) for x in (*twin.parameters(), *twin.buffers()))
        gradients = sum(nbytes(_local(p.grad)) for p in twin.parameters() if p.grad is not None)
        reduced = layout.strategy == "ddp" and layout.world > 1
        backward = sum(one.phase != "optimizer" for one in record.operations)
        messages = list(_reducing(twin, layout, backward)) if reduced else []
        operations = [*record.operations[:backward], *_bucket_copies(messages), *record.operations[backward:]]
        collectives = sorted(record.collectives + messages, key=lambda message: message.after)
        beside = record.peak - weights - states - gradients
        memory = Memory(weights, states, gradients, gradients if reduced else 0, beside, record.largest)
        return Trace(rows * layout.micro, memory, operations, collectives, tokens)

    def _first(self, rows: int) -> int:
        """Take a step after creating what a run's first step creates: gradients and optimizer states.

        They come from zero gradients. If the recipe reads values in its first step, or parameters take no part in a
        step, they come from a real step.
        """
        if (tokens := self._after_zeros(rows)) is not None:
            return tokens
        del self.twin, self.optimizer  # a copy that stopped in the middle of a forward pass cannot be used again
        gc.collect()  # modules are in reference cycles, and their tensors would be counted
        self._build(self.recipe)
        self.simulated.once = True
        self._take_step(min(rows, len(self.batch)))
        self.simulated.once = False
        return self._take_step(rows)

    def _after_zeros(self, rows: int) -> int | None:
        """Return the tokens of a step that follows one with zero gradients, or None if that does not work."""
        trained = [p for p in self.twin.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        try:
            tokens = self._take_step(rows)
        except DataDependentOutputException:
            return None
        return tokens if all(p.grad is not None for p in trained) else None

    def _take_step(self, rows: int) -> int:
        """Take one optimizer step and return its tokens."""
        made = [
            _repeat_rows(self.batch, rows, self.layout)._each(_cast_inputs(self.precision))
            for _ in range(self.layout.micro)
        ]
        there = [batch.to(register()) for batch in made]
        self.record.again()
        _step(self.twin, self.optimizer, there, self.precision, self.record)
        return sum(map(_tokens, made))


@contextmanager
def _refused_reads(recipe: str) -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if not f.filename.startswith((_TORCH, _HERE))), frames[-1])
        fail(
            f"plan: {recipe}: {place.name} ({Path(place.filename).name}:{place.lineno}) reads a value "
            f"of the accelerator ({error.func}), of which a plan has none: use its host copy (modules/core/host.py)"
        )


def _twin(recipe: Any, layout: Layout, precision: Precision) -> Any:
    memo = {id(recipe.hooks): GradientHooks(), id(recipe.step.objective): None, id(recipe._trainer): recipe._trainer}
    twin = copy.deepcopy(recipe, memo)
    for one in nested(twin).values():
        one.trainer = recipe.trainer
    twin.step.world, twin.step.accumulate = layout.world, layout.micro
    if layout.chunks > 1:
        twin.step.chunks = layout.chunks
    if layout.world > 1:
        synchronize(twin)
    _to_device(twin, precision.whole)
    if layout.checkpointing is not None:
        layout.checkpointing.apply(twin)
    for part in twin.modules() if layout.exchange is not None else ():
        if hasattr(part, "exchange"):
            part.exchange = layout.exchange
    sharding = layout.sharding
    if sharding is not None:
        twin._device_mesh = init_device_mesh(NAME, (layout.world,), mesh_dim_names=("data_parallel",))
        twin.sharding = sharding
        sharding.apply(twin)
    return twin.train(recipe.training)


def _to_device(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace parameters and buffers by tensors of the same shape on the device; shared ones stay shared."""
    made: dict[int, Tensor] = {}

    def like(x: Tensor) -> Tensor:
        kind = dtype if dtype is not None and x.is_floating_point() else x.dtype
        return torch.empty_like(x, device=register(), dtype=kind)

    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(like(parameter), parameter.requires_grad)
            part._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in list(part.named_buffers(recurse=False, remove_duplicate=False)):
            part._buffers[name] = made.setdefault(id(buffer), like(buffer))


def _repeat_rows(batch: Batch, rows: int, layout: Layout) -> Batch:
    real_N = some(*batch.present.values()).nonzero()[:, 0]  # skip padding rows
    part = batch.select(real_N[torch.arange(rows) % len(real_N)])
    times = layout.world * layout.micro
    return replace(part, step={name: mask_B.repeat(times) for name, mask_B in part.present.items()})


def _cast_inputs(precision: Precision) -> Any:
    def change(x: Tensor) -> Tensor:
        return x.to(precision.whole) if precision.whole is not None and x.is_floating_point() else x

    return change


def _step(twin: Any, optimizer: Any, batches: list[Batch], precision: Precision, record: Recorder) -> None:
    for n, batch in enumerate(batches):
        last = n + 1 == len(batches)
        with nullcontext() if last or twin.sharding is None else twin.sharding.accumulating(twin):
            record.phase = "forward"
            with precision.context():
                loss = twin.training_step(batch, n)
            if n == 0:
                optimizer.zero_grad()  # as Lightning does, between forward and backward
            record.phase = "backward"
            (loss / len(batches)).backward()
            del loss
            twin.output = twin.step.objective = None
    record.phase = "optimizer"
    clip = twin.trainer.gradient_clip_val
    if clip:
        nn.utils.clip_grad_norm_([p for p in twin.parameters() if p.grad is not None], clip)
    optimizer.step()


def _reducing(twin: nn.Module, layout: Layout, backward: int) -> Iterator[Collective]:
    """Yield DDP's messages: buffers from the first rank before a forward, then gradients in buckets, last ones first.

    ``backward``: number of operations of a step up to the end of its backward, where all buckets are placed.
    """
    buffers: dict[torch.dtype, int] = {}
    for buffer in twin.buffers():
        buffers[buffer.dtype] = buffers.get(buffer.dtype, 0) + nbytes(buffer)
    for size in buffers.values():
        yield Collective("broadcast", "forward", size, layout.world)
    limit, held = BUCKETS[0], 0
    for parameter in reversed([p for p in twin.parameters() if p.requires_grad]):
        held += nbytes(parameter)
        if held >= limit:
            yield Collective("all_reduce", "backward", held, layout.world, overlapped=True, after=backward)
            limit, held = BUCKETS[1], 0
    if held:
        yield Collective("all_reduce", "backward", held, layout.world, overlapped=True, after=backward)


def _bucket_copies(reduced: list[Collective]) -> Iterator[Operation]:
    """Yield DDP's work on each bucket: copy gradients in, divided by the ranks, and back after the reduction.

    Each is one kernel: those of single gradients are launched from C++, where several take the time of one from Python.
    """
    for bucket in (message for message in reduced if message.name == "all_reduce"):
        for name in ("mul", "copy_"):
            yield Operation(name, "backward", 0, bucket.bytes, bucket.bytes, "float32")


def _local(x: Any) -> Any:
    return x._local_tensor if isinstance(x, DTensor) else x


def _tokens(batch: Batch) -> int:
    """Count the tokens, padding included, of inputs that are sequences of codes; masks do not count."""
    codes = [x for x in batch.inputs.values() if x.ndim == 2 and not x.is_floating_point() and x.dtype != torch.bool]
    return sum(x.numel() for x in codes)
