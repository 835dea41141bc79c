"""Meshes of FSDP2 and hybrid shards (HSDP), the units that are sharded, and what they keep while gradients accumulate.

Letters: R replicas, S ranks of a shard group, W = R S ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map

from descant.modules.missing_modalities.modulation import touch_parameters
from descant.modules.moe.active import expert_layers


def mesh_shape(
    world: int, replicate: int | None = None, shard: int | Literal["node"] | None = None, node: int | None = None
) -> tuple[int, int]:
    """``(R, S)`` with R S = W: so many replicas of shard groups of so many ranks.

    Args:
        world: W.
        replicate: R; by default what ``shard`` leaves.
        shard: S, or ``node`` for the ranks of one node; by default what ``replicate`` leaves.
        node: ranks of one node; by default all.

    Raises:
        ValueError: with the nearest that does, where R S is not W.

    >>> mesh_shape(8), mesh_shape(8, replicate=2), mesh_shape(16, shard="node", node=8)
    ((1, 8), (2, 4), (2, 8))
    >>> mesh_shape(4, replicate=3, shard=2)
    Traceback (most recent call last):
    ValueError: shard: replicate 3 x shard 2 are 6 ranks, and there are 4; nearest: replicate 2, shard 2
    """
    ranks = (node or world) if shard == "node" else shard
    if replicate is None:
        replicate = 1 if ranks is None else max(round(world / ranks), 1)
        asked = f"shard {ranks} does not divide the {world} ranks"
    else:
        asked = f"replicate {replicate} does not divide the {world} ranks"
        if ranks is not None:
            asked = f"replicate {replicate} x shard {ranks} are {replicate * ranks} ranks, and there are {world}"
    ranks = max(round(world / replicate), 1) if ranks is None else ranks
    if replicate * ranks == world:
        return replicate, ranks
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    near = min(divisors, key=lambda n: (abs(n - ranks) + abs(world // n - replicate), -n))
    raise ValueError(f"shard: {asked}; nearest: replicate {world // near}, shard {near}")


def data_mesh(whole: DeviceMesh, replicate: int, shard: int) -> DeviceMesh:
    """``[S]`` of all ranks, or ``[R, S]`` of ranks of which S neighbours share one copy. Collective."""
    if replicate == 1:
        return whole
    return init_device_mesh(whole.device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def units(recipe: nn.Module) -> list[nn.Module]:
    """Blocks of all towers and language models in a module, inner ones first: each is gathered and freed as one."""
    found: dict[nn.Module, None] = {}
    for part in reversed(list(recipe.modules())):
        if inspect.ismethod(blocks := getattr(part, "blocks", None)):
            found |= dict.fromkeys(block for block in blocks() if isinstance(block, nn.Module))
    order = {module: place for place, module in enumerate(recipe.modules())}
    return sorted(found, key=lambda block: -order[block])


def require_shardable(recipe: nn.Module) -> None:
    """Raises ValueError for experts that are split over ranks already, which data parallelism would mix."""
    for name, layer in expert_layers(recipe).items():
        if layer.group is not None:
            raise ValueError(
                f"shard: the experts of {name} are split over ranks (parallelize), and would be averaged with those of "
                "other ranks; one of the two"
            )


def gathering(module: nn.Module, method: Callable[..., Any], freed: bool) -> Callable[..., Any]:
    """A method that reads weights of blocks past their forward, such as a decoder: they are gathered while it runs.

    ``freed``: whether a block's forward frees them otherwise.
    """

    @wraps(method)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        blocks = [part for part in module.modules() if isinstance(part, FSDPModule) and part is not module]
        for block in blocks:
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()
        try:
            return method(*args, **kwargs)
        finally:
            for block in blocks:
                block.set_reshard_after_forward(freed, recurse=False)
                block.reshard()

    return gathered


def reach_outputs(blocks: Iterable[nn.Module]) -> None:
    """Let backward pass through all of these blocks on each rank, also where none of its samples needs that.

    Where samples choose which parameters they meet, a frozen block has gradients to pass on some ranks only. FSDP2
    gathers in backward what passed some, and the others would be waited for. Before ``fully_shard``.
    """
    for block in blocks:
        block.register_forward_hook(_reached)


def _reached(block: nn.Module, args: Any, output: Any) -> Any:
    if not torch.is_grad_enabled():
        return output
    anchor = torch.zeros((), requires_grad=True)

    def reached(x: Any) -> Any:
        passes = isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad
        return touch_parameters(x, [cast(nn.Parameter, anchor)]) if passes else x

    return tree_map(reached, output)


@contextmanager
def accumulating(module: nn.Module, whole: bool, kept: bool) -> Iterator[None]:
    """Context: a backward pass that no optimizer step follows.

    Args:
        module: the root, after ``fully_shard``.
        whole: leave gradients whole on each rank, without communication; False: a rank keeps the part that is its own,
            and replicas do not exchange theirs.
        kept: whether blocks are kept gathered between forward and backward: they are, then, until the next forward.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    part = cast(FSDPModule, module)
    part.set_requires_gradient_sync(not whole)
    part.set_requires_all_reduce(False)
    part.set_reshard_after_backward(False, recurse=kept)
    try:
        yield
    finally:
        part.set_requires_gradient_sync(True)  # and all-reduces
        part.set_reshard_after_backward(True)
