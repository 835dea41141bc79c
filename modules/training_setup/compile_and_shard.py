"""Compile and Shard (FSDP2, HSDP), applied to a recipe before training, after ``adapt`` and activation checkpointing.

Each is a typed object from YAML with one method, ``apply(recipe)``, which changes the recipe in place.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from descant.modules.adaptation.base import select_towers
from descant.modules.core.dtensor import clip_by_norm
from descant.modules.core.errors import no_such
from descant.modules.core.part import RecipePart
from descant.modules.moe.active import expert_layers
from descant.modules.training_setup import sharding
from descant.modules.training_setup.activation_checkpointing import blocks_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Attribute of a module: names of its parameters without dimensions, which have one dimension while sharded.
SCALARS = "sharded_scalars"
#: Methods that Lightning and callbacks call on a recipe; each gathers and frees the root's parameters.
_ENTRY_POINTS = (
    *("training_step", "validation_step", "test_step", "predict_step"),
    *("generate", "roll_out", "reference", "likelihood"),
)
#: Methods that decode: they read weights of a language model's blocks without calling the blocks' forward.
_DECODERS = ("generate", "roll_out")
#: Methods that callbacks call between steps, on each rank, and that recipes call within a step.
_READERS = ("scores",)


class Compile(RecipePart):
    """``torch.compile`` of each tower's forward, or of each of its blocks, in place: parameter names do not change.

    Blocks of one kind share their graphs, so a deep tower compiles in the time of one block. Between blocks, FSDP2
    gathers and frees parameters, which no graph can contain. torch leaves a block of one of its own classes,
    such as ``nn.Sequential``, uncompiled.

    Args:
        mode: of ``torch.compile``; None is torch's default.
        dynamic: one graph for all shapes (True), one for each (False), or torch's own choice (None).
        fullgraph: refuse to fall back to Python inside a tower, or block.
        blocks: compile block by block (True), a tower at once (False), or by blocks if the recipe is sharded (None).
            A tower without blocks is compiled at once.
    """

    def __init__(
        self,
        mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
        blocks: bool | None = None,
    ) -> None:
        self.mode, self.dynamic, self.fullgraph, self.blocks = mode, dynamic, fullgraph, blocks

    def apply(self, recipe: nn.Module) -> None:
        by_block = getattr(recipe, "sharding", None) is not None if self.blocks is None else self.blocks
        for name, tower in select_towers(recipe, None):
            if self.fullgraph and expert_layers(tower):
                raise ValueError(
                    f"compile: fullgraph: tower {name} has experts, whose counts the host reads between two graphs; "
                    "leave it false"
                )
            for part in (by_block and blocks_of(tower)) or [tower]:
                part.compile(mode=self.mode, dynamic=self.dynamic, fullgraph=self.fullgraph)


class Shard(RecipePart):
    """FSDP2: split parameters, gradients and optimizer states over ranks; each block is a unit, the rest is another.

    Hybrid (HSDP) with ``replicate`` or ``shard``: the W ranks are R replicas of groups of S neighbours, W = R S. A
    group holds one copy of the model. Parameters are gathered within a group; gradients are summed within it and then
    over the replicas:

        bytes of a gather ~ (S - 1) / S P,    of a gradient ~ (S - 1) / S P + 2 (R - 1) / R P / S

    of P bytes. With ``shard: node``, only 1 / S of the gradients are exchanged between nodes.

    With ``expert_ranks``, X neighbours share the E experts of each layer. Each rank has E / X whole experts, to which
    tokens are sent (:class:`ExpertGroup`). Each rank's experts are split over the ranks that have the same ones, within
    a shard group if X divides S. All else is split as without it. Generation needs whole experts.

    Parameters outside the blocks of towers and language models (embeddings, norms, heads, losses) are gathered once for
    a whole step, so that any method of a tower may use them. Needs ``trainer.strategy: Sharded``, on GPUs or CPUs. A
    parameter without dimensions gets the shape [1], which can be split; quantized weights stay whole.

    Args:
        reshard_after_forward: free a block's parameters between forward and backward; False is faster and takes more
            memory.
        dtype: of parameters in compute, with gradients reduced in float32; None leaves both to the trainer.
        replicate: R; by default W / S if ``shard`` is given, otherwise 1.
        shard: S, or ``node`` for the ranks of each node; by default W / R.
        accumulated: ``whole``: gradients of micro-batches that share a step stay whole on each rank and are exchanged
            once, as under DDP (P more in memory). ``split``: they are split after each micro-batch, and replicas
            exchange them once.
        expert_ranks: X; if None, each rank has parts of all experts.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        replicate: int | None = None,
        shard: int | Literal["node"] | None = None,
        accumulated: Literal["whole", "split"] = "whole",
        expert_ranks: int | None = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: {no_such(dtype, DTYPES)}")
        for name, number in (("replicate", replicate), ("shard", shard), ("expert_ranks", expert_ranks)):
            if isinstance(number, int) and number < 1:
                raise ValueError(f"{name} {number}: at least 1")
        self.reshard_after_forward, self.dtype = reshard_after_forward, dtype
        self.replicate, self.shard, self.accumulated = replicate, shard, accumulated
        self.expert_ranks = expert_ranks

    def shape(self, world: int, node: int | None = None) -> tuple[int, int]:
        """Return ``(R, S)`` for W ranks, with ``node`` ranks on each node: see :func:`mesh_shape`."""
        return sharding.mesh_shape(world, self.replicate, self.shard, node)

    def apply(self, recipe: nn.Module) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        whole_mesh = getattr(recipe, "device_mesh", None)
        if whole_mesh is None:
            raise ValueError("shard: no device mesh; set trainer.strategy to Sharded (on/fsdp)")
        sharding.require_shardable(recipe)
        trainer: Any = getattr(recipe, "_trainer", None)
        over_all = whole_mesh["data_parallel"]
        shape = self.shape(over_all.size(), getattr(trainer, "num_devices", None))
        if self.expert_ranks is not None:
            experts = sharding.expert_shape(*shape, self.expert_ranks)
            sharding.require_experts(recipe, self.expert_ranks, sharding.expert_numbers(*shape))
        mesh = sharding.data_mesh(over_all, *shape)
        policy = MixedPrecisionPolicy()
        if self.dtype is not None:
            policy = MixedPrecisionPolicy(param_dtype=DTYPES[self.dtype], reduce_dtype=torch.float32)
        for module in list(recipe.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 0:
                    row = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                    setattr(module, name, row)
                    setattr(module, SCALARS, (*getattr(module, SCALARS, ()), name))
                    module.register_load_state_dict_pre_hook(_load_scalars)
                elif not parameter.is_contiguous():
                    parameter.data = parameter.data.contiguous()
        whole = {p for p in recipe.parameters() if not p.is_floating_point()}
        if self.expert_ranks is not None:
            axes = sharding.expert_mesh(over_all, *experts)
            sharding.split_experts(recipe, axes, mp_policy=policy, reshard_after_forward=self.reshard_after_forward)
            vars(recipe)["configure_gradient_clipping"] = partial(_clip_over_meshes, recipe)
        common: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": whole}
        for block in sharding.units(recipe):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **common)
        fully_shard(recipe, reshard_after_forward=False, **common)
        for method in _ENTRY_POINTS:
            if hasattr(recipe, method):
                if method in _DECODERS:
                    plain = getattr(recipe, method)
                    setattr(recipe, method, sharding.gathering(recipe, plain, self.reshard_after_forward))
                register_fsdp_forward_method(recipe, method)
        for method in _READERS:
            if inspect.ismethod(within := getattr(recipe, method, None)):
                register_fsdp_forward_method(recipe, method)
                setattr(recipe, method, sharding.anywhere(recipe, within, getattr(recipe, method)))

    def accumulating(self, recipe: nn.Module) -> AbstractContextManager[None]:
        """Return the context for a micro-batch that no optimizer step follows: see :func:`accumulating`."""
        return sharding.accumulating(recipe, self.accumulated == "whole", kept=not self.reshard_after_forward)


def _clip_over_meshes(
    recipe: Any, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
) -> None:
    """Clip gradients as Lightning does; by the norm over two meshes, which torch cannot compute."""
    if gradient_clip_val and gradient_clip_algorithm != "value":
        clip_by_norm((p for group in optimizer.param_groups for p in group["params"]), float(gradient_clip_val))
    else:
        recipe.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


def _load_scalars(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Reshape scalars of an unsharded run's checkpoint to [1], their shape here."""
    for name, parameter in module.named_parameters(recurse=False):
        saved = state.get(prefix + name)
        if isinstance(saved, Tensor) and saved.ndim == 0 and parameter.shape == (1,):
            state[prefix + name] = saved.reshape(1)
