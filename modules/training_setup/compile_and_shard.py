"""Compile and Shard (FSDP2) of a recipe before training, after ``adapt`` and activation checkpointing.

Each is a typed object from YAML with one method, ``apply(recipe)``, which changes the recipe in place.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from descant.modules.adaptation.base import chosen
from descant.modules.core.errors import no_such
from descant.modules.moe.active import expert_layers
from descant.modules.training_setup.activation_checkpointing import blocks_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Methods that Lightning and callbacks call on a recipe, which gather and free the root's parameters.
_ENTRY_POINTS = (
    *("training_step", "validation_step", "test_step", "predict_step"),
    *("generate", "roll_out", "reference", "likelihood"),
)


class Compile:
    """``torch.compile`` of each tower's forward, in place: parameter names do not change.

    Args:
        mode: of ``torch.compile``; None is torch's default.
        dynamic: one graph for all shapes (True), one for each (False), or torch's own choice (None).
        fullgraph: refuse to fall back to Python inside a tower.

    Raises:
        ValueError: in ``apply``, for a full graph of a tower with experts.
    """

    def __init__(
        self,
        mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
    ) -> None:
        self.mode, self.dynamic, self.fullgraph = mode, dynamic, fullgraph

    def apply(self, recipe: nn.Module) -> None:
        for name, tower in chosen(recipe, None):
            if self.fullgraph and expert_layers(tower):
                raise ValueError(
                    f"compile: fullgraph: tower {name} has experts, whose counts the host reads between two graphs; "
                    "leave it false"
                )
            tower.compile(mode=self.mode, dynamic=self.dynamic, fullgraph=self.fullgraph)


class Shard:
    """FSDP2: split parameters, gradients and optimizer states over ranks; each block is a unit, the rest is another.

    Parameters outside the blocks (embeddings, norms, heads, losses) are gathered once for a whole step, so that any
    method of a tower may use them. Needs ``trainer.strategy: ModelParallelStrategy``, on GPUs or CPUs. A parameter
    without dimensions becomes one of shape [1], which can be split; quantized weights stay whole.

    Args:
        reshard_after_forward: free a block's parameters between forward and backward; False is faster and takes more
            memory.
        dtype: of parameters in compute, with gradients reduced in float32; None leaves both to the trainer.

    Raises:
        ValueError: if ``dtype`` is unknown; in ``apply``, if there is no device mesh.
    """

    def __init__(
        self, reshard_after_forward: bool = True, dtype: Literal["float32", "bfloat16", "float16"] | None = None
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: {no_such(dtype, DTYPES)}")
        self.reshard_after_forward, self.dtype = reshard_after_forward, dtype

    def apply(self, recipe: nn.Module) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        mesh = getattr(recipe, "device_mesh", None)
        if mesh is None:
            raise ValueError("shard: no device mesh; set trainer.strategy to ModelParallelStrategy")
        policy = MixedPrecisionPolicy()
        if self.dtype is not None:
            policy = MixedPrecisionPolicy(param_dtype=DTYPES[self.dtype], reduce_dtype=torch.float32)
        for module in list(recipe.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 0:
                    row = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                    setattr(module, name, row)
                    module.register_load_state_dict_pre_hook(_load_scalars)
                elif not parameter.is_contiguous():
                    parameter.data = parameter.data.contiguous()
        whole = {p for p in recipe.parameters() if not p.is_floating_point()}
        common = {"mesh": mesh["data_parallel"], "mp_policy": policy, "ignored_params": whole}
        for _, tower in chosen(recipe, None):
            for block in blocks_of(tower):
                fully_shard(block, reshard_after_forward=self.reshard_after_forward, **common)
        fully_shard(recipe, reshard_after_forward=False, **common)
        for method in _ENTRY_POINTS:
            if hasattr(recipe, method):
                register_fsdp_forward_method(recipe, method)


def _load_scalars(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Reshape scalars of an unsharded run's checkpoint to [1], as they are here."""
    for name, parameter in module.named_parameters(recurse=False):
        saved = state.get(prefix + name)
        if isinstance(saved, Tensor) and saved.ndim == 0 and parameter.shape == (1,):
            state[prefix + name] = saved.reshape(1)
