"""Autocast for a device without kernels in torch, with the operator lists that CUDA uses.

Source: torch, aten/src/ATen/autocast_mode.h (AT_FORALL_LOWER_PRECISION_FP, _FP32, _FP32_SET_OPT_DTYPE, _PROMOTE).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from descant.modules.core.compat.dispatch import skipping_kernels
from descant.modules.core.compat.pytree import tree_leaves, tree_map

aten: Any = torch.ops.aten
KEY = "AutocastPrivateUse1"


def _names(text: str) -> list[str]:
    return text.split()


#: Operators computed in the lower precision.
LOW = _names(
    """
    _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution prelu
    addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
    scaled_dot_product_attention _thnn_fused_lstm_cell _thnn_fused_gru_cell
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    """
)
#: Operators computed in float32.
HIGH = _names(
    """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm
    native_layer_norm group_norm frobenius_norm nuclear_norm cosine_similarity poisson_nll_loss cosine_embedding_loss
    nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
    multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist
    pdist cdist renorm logsumexp upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
    prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum
    """
)
#: Operators of HIGH with a ``dtype`` argument: autocast sets it to float32 unless the caller gave one.
TYPED = {"prod", "softmax", "log_softmax", "cumprod", "cumsum", "linalg_vector_norm", "linalg_matrix_norm", "sum"}
#: Operators computed in the widest type among their arguments.
WIDEST = _names(
    """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sample index_put tensordot scatter_add cat stack
    """
)
BANNED = ("binary_cross_entropy",)


def _below(device: str, func: Any, args: Any, kwargs: Any) -> Any:
    with skipping_kernels(KEY):
        return func(*args, **kwargs)


def _castable(value: Any, device: str) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == device
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


def _kernel(func: Any, name: str, device: str) -> Callable[..., Any]:
    place = next((n for n, a in enumerate(func._schema.arguments) if a.name == "dtype"), None)
    typed = name in TYPED and place is not None

    def cast(args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
        def to(value: Any) -> Any:
            return value.to(dtype) if _castable(value, device) else value

        return _below(device, func, tree_map(to, args), tree_map(to, kwargs))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if name in BANNED:
            raise RuntimeError(f"{name} is unsafe to autocast: take it of logits")
        if name in LOW:
            return cast(args, kwargs, torch.get_autocast_dtype(device))
        if typed:
            first = args[0]
            given = args[place] if place is not None and place < len(args) else kwargs.get("dtype")
            if _castable(first, device) and first.dtype != torch.float32 and given is None:
                args, kwargs = args[:place], {**kwargs, "dtype": torch.float32}
            return _below(device, func, args, kwargs)
        if name in HIGH:
            return cast(args, kwargs, torch.float32)
        floats = [x for x in tree_leaves((args, kwargs)) if _castable(x, device)]
        wide = any(x.dtype == torch.float32 for x in floats)
        return cast(args, kwargs, torch.float32) if wide else _below(device, func, args, kwargs)

    return kernel


def register(device: str) -> list[torch.library.Library]:
    """Make ``torch.autocast(device)`` cast what it casts on CUDA, as long as the returned libraries are alive."""
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, KEY)
    library = torch.library.Library("aten", "IMPL")
    for name in dict.fromkeys([*LOW, *HIGH, *WIDEST, *BANNED]):
        packet = getattr(aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            func = getattr(packet, overload)
            if "out" not in overload and not any(r.alias_info for r in func._schema.returns):
                library.impl(func.name().partition("::")[2], _kernel(func, name, device), KEY)
    return [rest, library]
