"""Operators of every class at several sizes, for a calibration to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.compat.foreach import fused_adamw_
from descant.plan.operators import BY_FLOPS

#: Bytes of the larger side of kernels measured by bytes; the smallest shows the fixed cost of an operator.
BYTES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
#: Rows, inputs and outputs of products, including the small and thin ones of small models.
PRODUCTS = (
    (16, 16, 16), (64, 64, 64), (32, 128, 128), (512, 64, 64), (128, 256, 256), (2048, 64, 192),
    (2048, 128, 128), (2048, 256, 256), (4096, 128, 512), (4096, 512, 512),
)  # fmt: skip
#: Batch, rows, inner and columns of batched products.
BATCHED = ((4, 8, 8, 8), (64, 16, 16, 16), (128, 32, 16, 32), (512, 64, 16, 64), (512, 64, 64, 64))
#: Rows, heads, positions and features of a head.
ATTENTION = ((1, 2, 8, 16), (16, 4, 16, 16), (32, 4, 32, 32), (64, 4, 64, 16), (32, 4, 128, 32), (64, 4, 128, 32))
#: Rows, channels in, channels out, side of the image, side of the kernel.
CONVOLUTIONS = (
    (2, 8, 8, 4, 3), (32, 32, 64, 4, 1), (32, 96, 192, 2, 1), (32, 32, 32, 8, 3), (32, 96, 96, 4, 3),
    (32, 192, 192, 2, 3), (32, 64, 128, 4, 3), (128, 48, 96, 4, 1), (128, 96, 192, 2, 1), (128, 48, 48, 8, 3),
    (128, 96, 96, 4, 3), (128, 192, 192, 2, 3), (128, 64, 128, 8, 3), (64, 64, 64, 16, 3),
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One operator at one size, in the FLOPs or bytes of its class: ``make`` returns new arguments for ``call``.

    ``fresh``: for an operator with weights, the positions of the arguments that the previous operator of a step has
    just made. The other arguments come from main memory: since their last use, the step has evicted them from the
    caches.
    """

    kind: str
    dtype: torch.dtype
    size: float
    nbytes: int
    make: Callable[[], tuple[Any, ...]]
    call: Callable[..., Any]
    fresh: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        return f"{self.kind}/{str(self.dtype).removeprefix('torch.')}"


def kernels(dtype: torch.dtype, device: torch.device, most: float = float("inf")) -> Iterator[Kernel]:
    """Yield all kernels that are measured for a dtype, up to a size (FLOPs / 100 or bytes)."""
    for kernel in (*_by_flops(dtype, device), *_by_bytes(dtype, device)):
        if kernel.size / (100 if kernel.kind in BY_FLOPS else 1) <= most:
            yield kernel


def _random(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _by_flops(dtype: torch.dtype, device: torch.device) -> Iterator[Kernel]:
    width = dtype.itemsize

    def new(*shapes: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
        return lambda: tuple(_random(dtype, device, *shape) for shape in shapes)

    for n, k, m in PRODUCTS:
        nbytes = width * (n * k + k * m + n * m)
        yield Kernel("product", dtype, 2 * n * k * m, nbytes, new((n, k), (k, m)), torch.mm, (0,))
        yield Kernel("product", dtype, 2 * n * k * m, nbytes, new((m,), (n, k), (m, k)), _linear, (1,))
        yield Kernel("product", dtype, 2 * n * k * m, nbytes, new((n, k), (n, m)), lambda x, g: g.t().mm(x), (1,))
    for b, n, k, m in BATCHED:
        nbytes = width * b * (n * k + k * m + n * m)
        yield Kernel("batched", dtype, 2 * b * n * k * m, nbytes, new((b, n, k), (b, k, m)), torch.bmm)
    for b, h, s, d in ATTENTION:
        shape, flops = (b, h, s, d), 4 * b * h * s * s * d
        nbytes = 4 * width * b * h * s * d
        yield Kernel("attention", dtype, flops, nbytes, new(shape, shape, shape), F.scaled_dot_product_attention)
        if device.type == "cpu":
            make = _attention_inputs(dtype, shape)
            yield Kernel("attention_backward", dtype, 5 * flops // 2, 2 * nbytes, make, _attention_backward)
    for b, i, o, s, k in CONVOLUTIONS:
        flops = 2 * b * i * o * s * s * k * k
        nbytes = width * (b * (i + o) * s * s + i * o * k * k)

        def images(b: int = b, i: int = i, o: int = o, s: int = s, k: int = k) -> tuple[Tensor, Tensor, Tensor]:
            x, w = _random(dtype, device, b, i, s, s), _random(dtype, device, o, i, k, k)
            g = _random(dtype, device, b, o, s, s)
            return tuple(t.to(memory_format=torch.channels_last) for t in (x, w, g))  # type: ignore[return-value]

        yield Kernel("convolution", dtype, flops, nbytes, images, _convolution, (0,))
        yield Kernel("convolution_backward", dtype, 2 * flops, 2 * nbytes, images, _convolution_backward, (2,))


def _linear(bias: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.addmm(bias, x, w.t())


def _attention_inputs(dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        q, k, v, g = (_random(dtype, torch.device("cpu"), *shape) for _ in range(4))
        forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = forward(q, k, v)
        return g, q, k, v, out, sums

    return make


def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor) -> Any:
    backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(g, q, k, v, out, sums, 0.0, False)


def _convolution(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=w.shape[-1] // 2)


def _convolution_backward(x: Tensor, w: Tensor, g: Tensor) -> Any:
    pad, aten = w.shape[-1] // 2, torch.ops.aten
    backward: Any = aten.convolution_backward
    return backward(g, x, w, [0], [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [True, True, False])


def _by_bytes(dtype: torch.dtype, device: torch.device) -> Iterator[Kernel]:
    d = 64
    aten: Any = torch.ops.aten
    for nbytes in BYTES:
        b = max(1, nbytes // (d * dtype.itemsize))
        size = b * d * dtype.itemsize

        def new(count: int, b: int = b) -> Callable[[], tuple[Tensor, ...]]:
            return lambda: tuple(_random(dtype, device, b, d) for _ in range(count))

        def rows(b: int = b) -> tuple[Tensor, Tensor]:
            return _random(dtype, device, b, d), torch.randperm(b, device=device)

        def onto(b: int = b) -> tuple[Any, ...]:
            x, index = rows(b)
            return torch.zeros_like(x), 0, index, x

        def normed(b: int = b) -> tuple[Any, ...]:
            x, g, w = _random(dtype, device, b, d), _random(dtype, device, b, d), torch.ones(d, device=device).to(dtype)
            return g, x, [d], *torch.native_layer_norm(x, [d], w, w, 1e-5)[1:], w, w, [True] * 3

        yield Kernel("elementwise", dtype, 3 * size, 3 * size, new(2), torch.add)
        yield Kernel("elementwise", dtype, 2 * size, 2 * size, new(1), lambda x: x * 2.0)
        yield Kernel("transcendental", dtype, 2 * size, 2 * size, new(1), F.gelu)
        yield Kernel("transcendental", dtype, 2 * size, 2 * size, new(1), torch.exp)
        yield Kernel("softmax", dtype, 2 * size, 2 * size, new(1), lambda x: x.log_softmax(-1))
        yield Kernel("softmax", dtype, 2 * size, 2 * size, new(1), _short_softmax)
        yield Kernel("random", dtype, 2 * size, 2 * size, new(1), lambda x: torch.empty_like(x).bernoulli_(0.5))
        yield Kernel("normalisation", dtype, 2 * size, 2 * size, new(1), _layer_norm)
        yield Kernel("normalisation_backward", dtype, 3 * size, 3 * size, normed, aten.native_layer_norm_backward)
        yield Kernel("reduction", dtype, size, size, new(1), lambda x: x.sum(0))
        yield Kernel("reduction", dtype, size, size, new(1), lambda x: x.sum(-1))
        yield Kernel("copy", dtype, 2 * size, 2 * size, new(1), torch.clone)
        yield Kernel("copy", dtype, 2 * size, 2 * size, new(1), _transpose_heads)
        yield Kernel("gather", dtype, 2 * size, 2 * size, rows, lambda x, index: x.index_select(0, index))
        yield Kernel("scatter", dtype, 3 * size + 8 * b, 3 * size, onto, torch.Tensor.index_add_)
        if dtype == torch.float32:
            yield Kernel("optimizer", dtype, 7 * size, 4 * size, _states(b, d, device), _adamw)


def _layer_norm(x: Tensor) -> Any:
    return torch.native_layer_norm(x, [x.shape[-1]], x[0], x[0], 1e-5)


def _transpose_heads(x: Tensor) -> Tensor:
    return x.view(-1, 4, 16).transpose(0, 1).contiguous()


def _short_softmax(x: Tensor) -> Tensor:
    softmax: Any = torch.ops.aten._safe_softmax
    return softmax(x.view(-1, 16), -1)


def _states(b: int, d: int, device: torch.device) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        return *([torch.rand(b, d, device=device)] for _ in range(4)), [torch.ones((), device=device)]

    return make


def _adamw(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], steps: list[Tensor]) -> None:
    options: Any = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False}
    fused_adamw_(p, g, m, v, [], steps, maximize=False, **options)
