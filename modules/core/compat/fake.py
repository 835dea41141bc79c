"""Tensors with shapes, types and strides, but without storage, on any device.

torch has to keep: operators in a ``FakeTensorMode`` return ``FakeTensor``, and ``from_tensor`` converts a real tensor.
An operator whose result depends on values raises one of the two errors. Public tensors on ``meta`` lose the device.
"""

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

__all__ = ["DataDependentOutputException", "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode"]
