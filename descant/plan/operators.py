"""Classes of aten operators with similar cost on one machine; a calibration measures each class."""

from __future__ import annotations

from functools import cache

from descant.plan.trace import Operation

#: Classes whose time depends on their FLOPs; the time of all others depends on their bytes.
BY_FLOPS = ("product", "batched", "attention", "attention_backward", "convolution", "convolution_backward")
#: Class -> prefixes of operator names; the longest matching prefix decides.
CLASSES: dict[str, tuple[str, ...]] = {
    "product": ("mm", "addmm", "addmv", "mv", "linear", "_grouped_mm", "dot"),
    "batched": ("bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "_flash_attention_forward", "_efficient_attention_forward"),
    "attention_backward": (
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention_backward",
        "_scaled_dot_product_fused_attention_overrideable_backward",
    ),
    "convolution": ("convolution", "cudnn_convolution", "mkldnn_convolution"),
    "convolution_backward": ("convolution_backward",),
    "normalisation": (
        "native_layer_norm", "native_batch_norm", "cudnn_batch_norm", "_fused_rms_norm", "native_group_norm",
    ),
    "normalisation_backward": (
        "native_layer_norm_backward",
        "native_batch_norm_backward",
        "cudnn_batch_norm_backward",
        "_fused_rms_norm_backward",
        "native_group_norm_backward",
    ),
    "transcendental": (
        "gelu", "silu", "exp", "log", "tanh", "sigmoid", "pow", "erf", "sin", "cos", "softplus", "_softmax",
        "logsumexp", "acos", "log_sigmoid",
    ),
    "softmax": ("_softmax", "_safe_softmax", "_log_softmax"),
    "random": ("bernoulli", "normal", "uniform", "native_dropout", "rand", "exponential"),
    "reduction": (
        "sum", "mean", "amax", "amin", "max", "min", "norm", "linalg_vector_norm", "_foreach_norm", "var", "std",
        "cumsum", "argmax", "any", "all", "sort", "topk", "nll_loss", "avg_pool2d", "max_pool2d",
        "_adaptive_avg_pool2d",
    ),
    "copy": (
        "clone", "copy_", "_to_copy", "cat", "stack", "constant_pad_nd", "repeat", "_reshape_copy",
        "split_with_sizes_copy",
    ),
    "gather": ("index", "gather", "embedding", "_embedding_bag", "nonzero", "masked_select", "select_scatter", "take"),
    "scatter": (
        "index_add", "index_copy", "index_put", "_index_put", "_unsafe_index_put", "scatter", "masked_scatter",
        "embedding_dense_backward", "_embedding_bag_backward", "_embedding_bag_dense_backward",
    ),
    "optimizer": ("_fused_adam", "_fused_sgd", "_fused_adagrad"),
}  # fmt: skip
_STARTS = sorted(((start, kind) for kind, starts in CLASSES.items() for start in starts), key=lambda s: -len(s[0]))


@cache
def operator_class(name: str) -> str:
    """Return the class of an aten operator; an operator in no list is elementwise.

    >>> [operator_class(name) for name in ("addmm", "native_layer_norm_backward", "add", "all")]
    ['product', 'normalisation_backward', 'elementwise', 'reduction']
    """
    for start, kind in _STARTS:
        if name == start or (name.startswith(start) and (len(start) > 4 or name[len(start)] == "_")):
            return kind
    return "elementwise"


def size_of(operation: Operation) -> tuple[str, int]:
    """Return the class of an operation and the size that determines its time.

    The size is FLOPs for products and bytes in and out otherwise. For operators that take rows from a table, only the
    bytes of those rows count. A product without counted FLOPs is treated as elementwise.

    >>> size_of(Operation("mm", "forward", 60, 84, 40, "float32"))
    ('product', 60)
    >>> size_of(Operation("add", "forward", 0, 80, 40, "float32"))
    ('elementwise', 120)
    """
    kind = operator_class(operation.name)
    if kind == "gather":
        return kind, 2 * operation.written
    if kind not in BY_FLOPS:
        return kind, operation.read + operation.written
    return (kind, operation.flops) if operation.flops else ("elementwise", operation.read + operation.written)


def curve_keys(kind: str, dtype: str) -> tuple[str, ...]:
    """Return the keys under which the curve of a class and dtype is looked up, the nearest first.

    >>> curve_keys("product", "float16")
    ('product/float16', 'product/float32', 'elementwise/float32')
    """
    return f"{kind}/{dtype}", f"{kind}/float32", "elementwise/float32"
