"""FLOPs of training, estimated from a few counted micro-batches: ``train_flops`` in metrics.json.

Letters: B rows of a micro-batch, G of the whole optimizer step, F features.
"""

from __future__ import annotations

import zlib
from typing import Any

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.callback_order import Ordered
from descant.modules.core.batch import Batch, count_rows
from descant.modules.core.host import has_host_copy, host_copy
from descant.modules.training_setup.flops import Features, FlopCount, FlopTotal


def image_shapes(batch: Any) -> str:
    """Write the shapes ``[C, H, W]`` of the images in ``batch.inputs``, in which the cost of a step is not affine.

    >>> from types import SimpleNamespace
    >>> image_shapes(SimpleNamespace(inputs={"image": torch.zeros(2, 3, 8, 8), "text": torch.zeros(2, 5)}))
    'image 3x8x8'
    """
    inputs = getattr(batch, "inputs", None) or {}
    shapes = {name: x.shape[1:] for name, x in inputs.items() if isinstance(x, Tensor) and x.dim() >= 4}
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def features(batch: Any, whole: bool = False) -> Features:
    """Count elements of the present rows by modality; ``whole``: at the mean presence of the whole optimizer step.

    For a batch of another class it counts rows. Nothing is read from a device.

    >>> batch = Batch({"text": torch.zeros(4, 5)}, {"text": torch.tensor([True, False, True, True])})
    >>> features(batch), features(torch.zeros(3, 2))
    ((15.0,), (3.0,))
    """
    if not isinstance(batch, Batch):
        return (float(count_rows(batch)),)
    present = batch.step if whole else batch.present
    return tuple(_elements(x, present.get(name)) for name, x in batch.inputs.items())


def _elements(x_B: Tensor, mask_G: Tensor | None) -> float:
    if mask_G is None or not has_host_copy(mask_G):
        return float(x_B.numel())
    return x_B.numel() * int(host_copy(mask_G).sum()) / len(mask_G)


class TrainFlops(Ordered):
    """Counts the FLOPs of training: forward and backward passes as they are computed, on all ranks.

    * ``train_flops``: of the run so far; a resumed run includes its earlier parts.
    * ``active_flops``: mean per optimizer step, ``train_flops / steps``.

    Absent samples cost what is computed for them, usually nothing. Frozen parts cost no weight gradients. What
    callbacks compute for a backward pass (gradient probes) and recomputed activations count too. Evaluation, rollouts
    and the optimizer do not. A few micro-batches are counted by torch's formulas (:class:`FlopCount`). All others are
    estimated from these (:class:`FlopTotal`), by stage, trained parameters and shapes of images. Each rank knows which
    samples the others have, so nothing is communicated. Counted micro-batches of a compiled model run uncompiled, since
    a compiler that meets a counter stops compiling the model.
    """

    once = True
    #: The cost of a step depends on the size of its images and on the stage.
    after = ("ProgressiveResizing", "Stages")

    def __init__(self) -> None:
        self.total = FlopTotal()
        self._complete = True
        self._part = ""  # which parameters train
        self._kind, self._own, self._mean = "", Features(), Features()
        self._count: FlopCount | None = None
        self._counted: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total.state_dict(), "complete": self._complete}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total.load_state_dict(state_dict["total"])
        self._complete = bool(state_dict["complete"])

    @property
    def last(self) -> float:
        """FLOPs of the last micro-batch on this rank."""
        return self.total.cost(self._kind, self._own)

    def metrics(self, steps: int) -> dict[str, float]:
        """Return the metrics after ``steps`` optimizer steps; none if the run resumed from steps it did not count."""
        if not self._complete or not steps:
            return {}
        flops = round(self.total.total)
        return {"train_flops": flops, "active_flops": flops / steps}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step and not self.total.total:
            self._complete = False
        self.on_train_epoch_start(trainer, pl_module)  # not called in a run that is resumed inside an epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trains = bytes(p.requires_grad for p in pl_module.parameters())
        self._part = f"{getattr(pl_module, 'stage', '')} {zlib.crc32(trains):08x}"

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._kind = f"{self._part} {','.join(getattr(batch, 'inputs', ()))} {image_shapes(batch)}"
        self._own, self._mean = features(batch), features(batch, whole=True)
        if self.total.wants(self._kind, self._own):
            torch.compiler.set_stance("force_eager")
            self._count = FlopCount()
            self._count.__enter__()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.automatic_optimization:  # a manual step may call backward several times
            self._stop_counting()

    def _stop_counting(self) -> None:
        if self._count is not None:
            self._count.__exit__(None, None, None)
            torch.compiler.set_stance("default")
            self._counted, self._count = self._count.flops, None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._stop_counting()
        self.total.add(self._kind, self._own, self._counted, self._mean, trainer.world_size)
        self._counted = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop_counting()
