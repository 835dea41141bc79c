"""What happens to a recipe before training, in this order: adapt, checkpoint, compile, shard.

Each part is a typed object from YAML with one method, ``apply(recipe)``, which changes the recipe in place.
All of them look at ``recipe.towers`` (name -> tower) and ``blocks()`` of each; Shard at all of a recipe.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from descant.modules.core.errors import no_such as nearest
from descant.modules.towers.base import Frozen, Tower
from descant.modules.towers.cached import Cached
from descant.modules.towers.heads import Pool

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# bitsandbytes tells at length that it found no faster kernel to download (nothing here downloads any), and at every
# 8-bit layer of every step that it casts what it multiplies
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class Adapt:
    """A change to a recipe before training. ``apply`` is called once, before optimizers exist."""

    def apply(self, recipe: nn.Module) -> None:
        raise NotImplementedError


#: A recipe's language model, which is adapted, quantised, frozen and recomputed as towers are, by this name.
LM = "lm"


class Lora(Adapt):
    """Low-rank adapters (Hu 2021): ``W x + (alpha / r) B A x`` with B = 0 at the start.

    So nothing changes at first. The tower itself is frozen, running statistics of its batch norms included:
    only A and B train.

    Args:
        r: rank.
        alpha: scale of the update is alpha / r.
        targets: ends of the names of layers to adapt, such as [qkv, mlp.0]; or one regular expression that a
            whole name matches; or all-linear.
        dropout: on the adapter's input.
        dora: learn the norm of each output's weights apart from their direction (Liu 2024).
        towers: names of towers to adapt; all that are not frozen where not given.

    Raises:
        ValueError: in ``apply``, if a tower is unknown or Frozen, or a target is in none of its layers.

    >>> from descant.modules.towers import TextTower, Towers
    >>> recipe = nn.Module()
    >>> recipe.towers = Towers(text=TextTower(vocab=9, width=8, depth=1, heads=2, length=4))
    >>> Lora(r=2, targets=["qkv"]).apply(recipe)
    >>> sum(p.numel() for p in recipe.parameters() if p.requires_grad)
    64
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16.0,
        targets: list[str] | str = "all-linear",
        dropout: float = 0.0,
        dora: bool = False,
        towers: list[str] | None = None,
    ) -> None:
        if r < 1:
            raise ValueError(f"r {r}: the rank of an adapter is at least 1")
        self.r, self.alpha, self.targets, self.dropout, self.dora = r, alpha, targets, dropout, dora
        self.towers = towers

    def apply(self, recipe: nn.Module) -> None:
        with no_kernels():  # it imports bitsandbytes
            from peft import LoraConfig, inject_adapter_in_model

        for name, tower in chosen(recipe, self.towers, LM):
            if isinstance(tower, Frozen):
                raise ValueError(f"towers {name}: it is Frozen, adapters would not train; LoRA freezes by itself")
            layers = _targets(tower, self.targets)
            config = LoraConfig(
                r=self.r,
                lora_alpha=cast(int, self.alpha),
                # one expression of whole names: peft would take "0" for every layer whose name ends in ".0"
                target_modules="|".join(re.escape(layer) for layer in layers),
                lora_dropout=self.dropout,
                use_dora=self.dora,
            )
            inject_adapter_in_model(config, tower)
            for parameter_name, parameter in tower.named_parameters():
                parameter.requires_grad_("lora_" in parameter_name)
            _stay_eval(tower)


class Freeze(Adapt):
    """Locked-image tuning (LiT; Zhai 2022, arXiv 2111.07991): train around some towers, not in them.

    With ``capacity`` each input row of them is computed and pooled once and then looked up (``towers.Cached``): right
    where rows come back, as captions do; of no use where every row is augmented.

    Args:
        towers: names of the towers to freeze.
        capacity: rows to remember of each, in ``4 D`` bytes a row; 0 computes every time.
        folder: where remembered rows are kept across runs; None keeps them in memory only.

    Raises:
        ValueError: in ``apply``, if a tower is unknown, or its pool has weights and would see one token.

    >>> from descant.modules.towers import TextTower, Towers
    >>> recipe = nn.Module()
    >>> recipe.towers = Towers(text=TextTower(vocab=9, width=8, depth=1, heads=2, length=4))
    >>> Freeze(towers=["text"], capacity=99).apply(recipe)
    >>> type(recipe.towers["text"]).__name__, sum(p.numel() for p in recipe.parameters() if p.requires_grad)
    ('Cached', 0)
    """

    def __init__(self, towers: list[str], capacity: int = 0, folder: Path | None = None) -> None:
        if capacity < 0:
            raise ValueError(f"capacity {capacity}: a number of rows; 0 remembers none")
        self.towers, self.capacity, self.folder = towers, capacity, folder

    def apply(self, recipe: nn.Module) -> None:
        for name, tower in chosen(recipe, self.towers, LM):
            if name == LM:
                tower.requires_grad_(False)
                continue
            frozen: Frozen = tower if isinstance(tower, Frozen) else Frozen(tower)
            if self.capacity and not isinstance(tower, Cached):
                pools = cast(nn.ModuleDict, getattr(recipe, "pools", nn.ModuleDict()))
                pool = cast(Pool, copy.deepcopy(pools[name])) if name in pools else None
                if pool is not None and any(True for _ in pool.parameters()):
                    raise ValueError(
                        f"capacity: {type(pool).__name__} of {name} has weights and would see one remembered token; "
                        "use MeanPool, or capacity 0"
                    )
                frozen = Cached(frozen, pool, self.capacity, folder=self.folder)
            cast(nn.ModuleDict, recipe.towers)[name] = frozen


class Quantize(Adapt):
    """Store the weights of linear layers in 4 or 8 bits (bitsandbytes, on GPU and CPU) and freeze the tower.

    Put it before :class:`Lora` for QLoRA (Dettmers 2023). Gradients pass through to what lies before.

    Args:
        bits: 4 (blocks of 64 weights share a scale) or 8 (a scale for each output).
        quant_type: code of the 4 bits: nf4 suits weights that look normal, fp4 is a small float.
        towers: names of towers to quantise; all where not given.
        skip: ends of the names of layers to leave as they are.

    Raises:
        ValueError: if ``bits`` is neither 4 nor 8; in ``apply``, if a tower or a name in ``skip`` is unknown,
            or adapters are there already.

    >>> from descant.modules.towers import TextTower, Towers
    >>> recipe = nn.Module()
    >>> recipe.towers = Towers(text=TextTower(vocab=9, width=64, depth=1, heads=2, length=4))
    >>> Quantize(bits=4).apply(recipe)
    >>> recipe.towers["text"].layers[0].qkv.weight.numel()  # two weights a byte
    6144
    """

    def __init__(
        self,
        bits: Literal[4, 8] = 4,
        quant_type: Literal["nf4", "fp4"] = "nf4",
        towers: list[str] | None = None,
        skip: list[str] | None = None,
    ) -> None:
        if bits not in (4, 8):
            raise ValueError(f"bits {bits}: 4 or 8; the nearest is {min((4, 8), key=lambda b: abs(b - bits))}")
        self.bits, self.quant_type, self.towers, self.skip = bits, quant_type, towers, skip or []

    def apply(self, recipe: nn.Module) -> None:
        for name, tower in chosen(recipe, self.towers, LM):
            if any("lora_" in parameter for parameter, _ in tower.named_parameters()):
                raise ValueError(f"adapt: tower {name} has adapters already; put Quantize before Lora")
            linear = [n for n, module in tower.named_modules() if type(module) is nn.Linear]
            skip = {n for end in self.skip for n in ends_with(linear, end, "skip", name)}
            skip |= set(getattr(tower, "bare", ()))
            tower.requires_grad_(False)
            for layer_name in linear:
                if layer_name not in skip:
                    layer = tower.get_submodule(layer_name)
                    tower.set_submodule(layer_name, self._quantized(cast(nn.Linear, layer)))
            _stay_eval(tower)
            # what peft asks for before it adapts such layers
            setattr(tower, f"is_loaded_in_{self.bits}bit", True)

    def _quantized(self, layer: nn.Linear) -> nn.Module:
        bnb = bitsandbytes()
        shape = (layer.in_features, layer.out_features)
        bias, device = layer.bias is not None, layer.weight.device
        if self.bits == 4:
            new = bnb.nn.Linear4bit(*shape, bias=bias, quant_type=self.quant_type, device="meta")
            new.weight = bnb.nn.Params4bit(
                layer.weight.detach().cpu(), requires_grad=False, quant_type=self.quant_type, module=new
            )
            # repacking at the first eval forward saves CPU time but changes what later training steps compute
            new.support_avx512bf16_for_cpu = False
            new.register_load_state_dict_pre_hook(_load_4bit)
        else:
            new = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, device="meta")
            new.weight = bnb.nn.Int8Params(layer.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
            new.register_load_state_dict_pre_hook(_load_8bit)
            new._apply = MethodType(_move_8bit, new)
        new.bias = layer.bias
        new.train(layer.training)
        # the first move quantises, and to 8 bits only from the CPU
        return cast(nn.Module, new.to("cpu").to(device))


def bitsandbytes() -> Any:
    """The library, imported without what it would download."""
    with no_kernels():
        return import_module("bitsandbytes")


@contextmanager
def no_kernels() -> Iterator[None]:
    """Where the package ``kernels`` is installed, importing bitsandbytes downloads code and runs it; not in here."""
    if "kernels" in sys.modules:
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's own sign for: may not be imported
    try:
        yield
    finally:
        del sys.modules["kernels"]


def _load_4bit(layer: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """A saved 4-bit weight is its bytes and its scales; bitsandbytes saves both and loads the bytes only."""
    bnb = bitsandbytes()
    start = f"{prefix}weight."
    scales = {key.removeprefix(start): state.pop(key) for key in list(state) if key.startswith(start)}
    if scales:
        device = cast(Tensor, layer.weight).device
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            state[f"{prefix}weight"], scales, device=device, module=layer
        )


def _load_8bit(layer: Any, *_: object) -> None:
    """After a forward the scales lie in ``state``, where bitsandbytes refuses to load them."""
    if layer.weight.SCB is None and layer.state.SCB is not None:
        layer.weight.SCB = layer.state.SCB


def _move_8bit(layer: Any, fn: Any, recurse: bool = True) -> Any:
    """A move (``.to``, ``.cuda``, ``.cpu`` of any parent) takes the scales along; bitsandbytes loses them."""
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    type(layer)._apply(layer, fn, recurse)
    if scale is not None:  # as before the first forward, which fills the state again
        layer.weight.CB, layer.weight.SCB = layer.weight.data, scale.to(layer.weight.device)
        layer.state.CB = layer.state.SCB = None
    return layer


class Checkpointing:
    """Recompute what is inside every block of every tower in backward instead of keeping it (Chen 2016).

    Gradients are the same, about a third more compute, and only the inputs of the blocks are kept.
    Non-reentrant, so gradient probes, forks and sharding work as they do without. Names of parameters do not
    change.

    Args:
        preserve_rng: draw the same dropout masks again; may be off where nothing is random.
        towers: names of towers to recompute; all that have blocks where not given.

    Raises:
        ValueError: in ``apply``, if a named tower has no blocks, or none has.
    """

    def __init__(self, preserve_rng: bool = True, towers: list[str] | None = None) -> None:
        self.preserve_rng, self.towers = preserve_rng, towers

    def apply(self, recipe: nn.Module) -> None:
        blocks = {name: _blocks(tower) for name, tower in chosen(recipe, self.towers, LM)}
        without = [name for name, found in blocks.items() if not found]
        if without and (self.towers or len(without) == len(blocks)):
            raise ValueError(f"checkpointing: tower {without[0]} has no blocks to recompute")
        for found in blocks.values():
            for block in found:
                _recompute(block, self.preserve_rng)


def _recompute(block: nn.Module, preserve_rng: bool) -> None:
    """Give this one block a subclass of its class whose forward is checkpointed: no wrapper, so no new names.

    A subclass and not a closure on the instance: a deep copy (an EMA, a teacher) must call its own forward.
    """
    plain = type(block)
    if hasattr(plain, "_recomputed"):
        return
    # a second forward in train mode would count every batch twice in running statistics
    norms = any(isinstance(module, _BatchNorm) for module in block.modules())

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain.forward(self, *args, **kwargs)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), FrozenBatchNormStats(self)

        options: dict[str, Any] = {"context_fn": contexts} if norms and not torch.compiler.is_compiling() else {}
        return checkpoint(
            plain.forward,
            self,
            *args,
            use_reentrant=False,
            preserve_rng_state=preserve_rng,
            **options,
            **kwargs,
        )

    block.__class__ = type(f"Recomputed{plain.__name__}", (plain,), {"forward": forward, "_recomputed": True})


class FrozenBatchNormStats(AbstractContextManager[None]):
    """Batch norms of a module compute as in training but leave their running statistics alone.

    May be entered again after it was left: a probe goes backward more than once, each time through a second pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.saved: list[tuple[_BatchNorm, float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        for norm in norms:
            count = norm.num_batches_tracked
            self.saved.append((norm, norm.momentum, None if count is None else count.clone()))
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count in self.saved:
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
        self.saved.clear()


class Compile:
    """``torch.compile`` of each tower's forward, in place: names of parameters do not change.

    Args:
        mode: what to spend compile time on; None is torch's default.
        dynamic: one graph for all shapes (True), one for each (False), or torch's own choice (None).
        fullgraph: refuse to fall back to Python inside a tower.
    """

    def __init__(
        self,
        mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
    ) -> None:
        self.mode, self.dynamic, self.fullgraph = mode, dynamic, fullgraph

    def apply(self, recipe: nn.Module) -> None:
        for _, tower in chosen(recipe, None):
            tower.compile(mode=self.mode, dynamic=self.dynamic, fullgraph=self.fullgraph)


class Shard:
    """Split parameters, gradients and optimizer states over ranks (FSDP2): each block, then the rest as one.

    What lies outside the blocks (embeddings, norms, heads, losses) is gathered once for a whole step, so that
    any method of a tower may use it. Needs ``trainer.strategy: ModelParallelStrategy``, on GPUs or CPUs. A
    parameter without dimensions becomes one of shape [1], which can be split; quantised weights stay whole.

    Args:
        reshard_after_forward: free a block's parameters between forward and backward; False is faster and
            takes more memory.
        dtype: of parameters in compute, with gradients reduced in float32; None leaves both to the trainer.

    Raises:
        ValueError: if ``dtype`` is unknown; in ``apply``, if there is no device mesh.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: {nearest(dtype, DTYPES)}")
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
            for block in _blocks(tower):
                fully_shard(block, reshard_after_forward=self.reshard_after_forward, **common)
        fully_shard(recipe, reshard_after_forward=False, **common)
        # Lightning and callbacks call these, not forward; the root gathers and frees around them
        for method in (*_STEPS, *_ANSWERS):
            if hasattr(recipe, method):
                register_fsdp_forward_method(recipe, method)


_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_ANSWERS = ("generate", "roll_out", "reference", "likelihood")


def _load_scalars(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """A file of an unsharded run holds scalars where this run has shape [1]."""
    for name, parameter in module.named_parameters(recurse=False):
        saved = state.get(prefix + name)
        if isinstance(saved, Tensor) and saved.ndim == 0 and parameter.shape == (1,):
            state[prefix + name] = saved.reshape(1)


# choosing by name ------------------------------------------------------------------------------------------


def chosen(recipe: nn.Module, names: list[str] | None, *also: str) -> list[tuple[str, Tower]]:
    """The towers of a recipe by name, all where ``names`` is None; and ``also`` other parts that it may have, such as
    its language model, ``lm``. ValueError names the nearest."""
    towers = dict(cast(nn.ModuleDict, getattr(recipe, "towers", nn.ModuleDict())))
    towers |= {name: part for name in also if isinstance(part := getattr(recipe, name, None), nn.Module)}
    for name in names or []:
        if name not in towers:
            raise ValueError(f"towers {name!r}: {nearest(name, towers)}")
    return [(name, cast(Tower, towers[name])) for name in (towers if names is None else names)]


def ends_with(names: list[str], end: str, argument: str, tower: str) -> list[str]:
    """The dotted names that are ``end`` or end in ``.end``; ValueError names the nearest if none."""
    found = [name for name in names if name == end or name.endswith(f".{end}")]
    if not found:
        leaves = dict.fromkeys(re.sub(r"^(.*\.)?([A-Za-z_]\w*)", r"\2", name) for name in names)
        raise ValueError(f"{argument} {end!r}: tower {tower}: {nearest(end, leaves)}")
    return found


def _blocks(part: nn.Module) -> list[nn.Module]:
    """Of a tower or language model; what has no such list has none."""
    found = getattr(part, "blocks", None)
    return found() if callable(found) else []


def _targets(tower: nn.Module, targets: list[str] | str) -> list[str]:
    kinds = nn.Linear if targets == "all-linear" else (nn.Linear, nn.Conv2d, nn.Embedding)
    bare = getattr(tower, "bare", ())
    names = [name for name, module in tower.named_modules() if isinstance(module, kinds) and name not in bare]
    kind = type(tower).__name__
    if targets == "all-linear":
        if not names:
            raise ValueError(f"targets 'all-linear': {kind} has no linear layer; name convolutions instead")
        return names
    if isinstance(targets, str):
        found = [name for name in names if re.fullmatch(targets, name)]
        if not found:
            raise ValueError(f"targets {targets!r} matches no layer of {kind}; one is {names[0]!r}")
        return found
    return list(dict.fromkeys(name for end in targets for name in ends_with(names, end, "targets", kind)))


def _stay_eval(tower: nn.Module) -> None:
    """Batch norms of a frozen tower keep their running statistics, whatever ``train()`` is called."""
    for module in tower.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            # a bound method: it follows the module into a deep copy
            module.train = MethodType(_eval, module)  # type: ignore[method-assign]


def _eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)
