"""Meshes of FSDP2 and hybrid shards (HSDP), the units that are sharded, and how they accumulate gradients.

Letters: R replicas, S ranks of a shard group, W = R S ranks, X ranks that share the experts of a layer.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as Split

try:
    from torch.distributed.fsdp import DataParallelMeshDims
except ImportError:  # of torch before 2.13
    DataParallelMeshDims = None  # type: ignore[assignment,misc]

from descant.modules.core.compat.pytree import tree_map
from descant.modules.missing_modalities.modulation import touch_parameters
from descant.modules.moe.active import expert_layers
from descant.modules.moe.parallel import parallelize, require_divided

_MADE = itertools.count()


def mesh_shape(
    world: int, replicate: int | None = None, shard: int | Literal["node"] | None = None, node: int | None = None
) -> tuple[int, int]:
    """Return ``(R, S)`` with R S = W: the number of replicas, and of ranks in a shard group.

    Args:
        world: W.
        replicate: R; by default W / S if ``shard`` is given, otherwise 1.
        shard: S, or ``node`` for the ranks of one node; by default W / R.
        node: ranks of one node; by default all.

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
    """Return the mesh ``[S]`` of all ranks, or ``[R, S]``, in which S neighbours share one copy. Collective."""
    if replicate == 1:
        return whole
    return init_device_mesh(whole.device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def expert_shape(replicate: int, shard: int, experts: int) -> tuple[int, int, int]:
    """Return ``(copies, X, ranks of a part)`` for the experts of R replicas of S ranks; their product is W.

    A copy of all experts takes X neighbours times the ranks that share the parts of one rank's experts. It lies in one
    shard group if X divides S, otherwise in X / S groups.

    >>> expert_shape(1, 8, 2), expert_shape(2, 4, 2), expert_shape(2, 4, 8)
    ((1, 2, 4), (2, 2, 2), (1, 8, 1))
    >>> expert_shape(1, 4, 3)
    Traceback (most recent call last):
    ValueError: shard: expert_ranks 3 do not fit the 4 ranks of a copy of the rest; nearest: 2
    """
    fits = expert_numbers(replicate, shard)
    if experts not in fits:
        near = min(fits, key=lambda n: (abs(n - experts), n))
        raise ValueError(
            f"shard: expert_ranks {experts} do not fit the {shard} ranks of a copy of the rest; nearest: {near}"
        )
    parts = shard // experts if shard % experts == 0 else 1
    return replicate * shard // (experts * parts), experts, parts


def expert_numbers(replicate: int, shard: int) -> list[int]:
    """List the X that fit R replicas of S ranks, ascending: divisors of S, and multiples of S that divide W.

    >>> expert_numbers(1, 6), expert_numbers(4, 2)
    ([1, 2, 3, 6], [1, 2, 4, 8])
    """
    world = replicate * shard
    return [n for n in range(1, world + 1) if shard % n == 0 or (n % shard == 0 and world % n == 0)]


def expert_mesh(whole: DeviceMesh, copies: int, experts: int, parts: int) -> DeviceMesh:
    """Return the mesh ``[X, parts]`` of all ranks, or ``[copies, X, parts]``; X neighbours share experts. Collective.

    The axis of experts is before that of parts, so that a rank has one box of a whole tensor: FSDP2 splits a rank's
    experts, and placements are read from the first axis to the last. The axes are not flattened: torch 2.13 gathers
    over flattened axes in the order of ranks, which differs from the mesh's order.
    """
    ranks = whole.mesh.reshape(copies, parts, experts).transpose(1, 2).contiguous()
    # a unique number: torch caches placements by equal meshes, and FSDP2 needs this very mesh, also in a second fit
    names: tuple[str, ...] = ("replicate", "expert", f"shard_{next(_MADE)}")
    if copies == 1:
        ranks, names = ranks[0], names[1:]
    return DeviceMesh(whole.device_type, ranks, mesh_dim_names=names)


def require_experts(recipe: nn.Module, ranks: int, fits: Sequence[int] = ()) -> None:
    """Raise ValueError if so many ranks cannot share the recipe's experts, or if it has none.

    ``fits``: the numbers that the message may suggest (:func:`expert_numbers`); all if empty.
    """
    if not expert_layers(recipe):
        raise ValueError(f"shard: expert_ranks {ranks}: {type(recipe).__name__} has no layer of experts; leave it out")
    require_divided(recipe, ranks, f"shard: expert_ranks {ranks}", fits)
    if DataParallelMeshDims is None:
        raise ValueError(f"shard: expert_ranks {ranks}: torch {torch.__version__} has no dp_mesh_dims; 2.13 has")


def split_experts(recipe: nn.Module, mesh: DeviceMesh, **how: Any) -> None:
    """Split the experts of all layers over a mesh's axis ``expert``, and each rank's experts by FSDP2.

    The gradient of an expert, with the loss L_r of rank r, W = (groups) X ranks:

        each group: 1 / X sum over its ranks of dL_r (:class:`ExpertGroup`),    FSDP2: the mean over groups
        = 1 / W sum over all ranks of dL_r,    as of any other parameter

    So no factor has to be set. FSDP2 needs one where the exchange sums (``set_gradient_divide_factor``, as in
    torchtitan; Megatron-LM #5956). Parameters are DTensors on all axes, so a checkpoint has whole experts.
    """
    # silence torch's warning, at each gather of whole experts, that the axes are not flattened: see expert_mesh
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    parallelize(recipe, mesh["expert"].get_group())
    names = mesh.mesh_dim_names or ()
    placements: list[Placement] = [Split(0) if name == "expert" else Replicate() for name in names]
    dims = DataParallelMeshDims(shard=names[-1], replicate="replicate" if "replicate" in names else None)
    for layer in expert_layers(recipe).values():
        for part, own in list(layer.experts.named_parameters(recurse=False)):
            split = DTensor.from_local(own.detach(), mesh, placements, run_check=False)
            setattr(layer.experts, part, nn.Parameter(split, own.requires_grad))
        fully_shard(layer.experts, mesh=mesh, dp_mesh_dims=dims, **how)


def units(recipe: nn.Module) -> list[nn.Module]:
    """List the blocks of all towers and language models, inner ones first: each is gathered and freed as one unit."""
    found: dict[nn.Module, None] = {}
    for part in reversed(list(recipe.modules())):
        if inspect.ismethod(blocks := getattr(part, "blocks", None)):
            found |= dict.fromkeys(block for block in blocks() if isinstance(block, nn.Module))
    order = {module: place for place, module in enumerate(recipe.modules())}
    return sorted(found, key=lambda block: -order[block])


def require_shardable(recipe: nn.Module) -> None:
    """Raise ValueError for experts that are split over ranks already, because data parallelism would mix them."""
    for name, layer in expert_layers(recipe).items():
        if layer.group is not None:
            raise ValueError(
                f"shard: the experts of {name} are split over ranks (parallelize), and would be averaged with those of "
                "other ranks; shard.expert_ranks splits them"
            )


def gathering(module: nn.Module, method: Callable[..., Any], freed: bool) -> Callable[..., Any]:
    """Wrap a method that reads blocks' weights without their forward, such as a decoder: gather them while it runs.

    ``freed``: whether a block's forward normally frees them.
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


def anywhere(root: nn.Module, within: Callable[..., Any], outside: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that calls ``within`` while FSDP2 has gathered the root's parameters, otherwise ``outside``."""

    @wraps(within)
    def called(*args: Any, **kwargs: Any) -> Any:
        freed = all(isinstance(p, DTensor) for p in root.parameters() if p.is_floating_point())
        return (outside if freed else within)(*args, **kwargs)

    return called


def reach_outputs(blocks: Iterable[nn.Module]) -> None:
    """Let backward pass through all of these blocks on each rank, even if none of its samples needs that.

    If samples choose their parameters, a frozen block has gradients to pass on some ranks only. In backward, only those
    ranks would gather it by FSDP2, and they would wait for the others. Call this before ``fully_shard``.
    """
    for block in blocks:
        block.register_forward_hook(_reach)


def _reach(block: nn.Module, args: Any, output: Any) -> Any:
    if not torch.is_grad_enabled():
        return output
    anchor = torch.zeros((), requires_grad=True)

    def reached(x: Any) -> Any:
        passes = isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad
        return touch_parameters(x, [cast(nn.Parameter, anchor)]) if passes else x

    return tree_map(reached, output)


@contextmanager
def accumulating(module: nn.Module, whole: bool, kept: bool) -> Iterator[None]:
    """Prepare FSDP2, within the block, for a backward pass that no optimizer step follows.

    Args:
        module: the root, after ``fully_shard``.
        whole: leave gradients whole on each rank, without communication; False: each rank keeps its own part only, and
            replicas do not exchange theirs.
        kept: whether blocks stay gathered between forward and backward; if so, they stay until the next forward.
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
        part.set_requires_gradient_sync(True)  # this enables all-reduces, too
        part.set_reshard_after_backward(True)
