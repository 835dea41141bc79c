"""Quantize: linear layers of frozen towers in 4 or 8 bits (bitsandbytes), for QLoRA with Lora after it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import MethodType
from typing import Any, Literal, cast

from torch import Tensor, nn

from descant.modules.adaptation.base import LM, Adapt, ends_with, keep_norms_in_eval, select_towers
from descant.modules.core.loaded import has_loaded_weights

# bitsandbytes logs that it found no faster kernel to download (nothing here downloads any), and at every 8-bit layer
# of every step that it casts the inputs
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class Quantize(Adapt):
    """Store the weights of linear layers in 4 or 8 bits (bitsandbytes, on GPU and CPU) and freeze the tower.

    Put before :class:`Lora`, this is QLoRA (Dettmers 2023). Gradients pass through to earlier layers.

    Args:
        bits: 4 (blocks of 64 weights share a scale) or 8 (one scale per output).
        quant_type: 4-bit code: nf4 for normally distributed weights, or the small float fp4.
        towers: names of the towers to quantize; by default all.
        skip: ends of the names of layers to leave unquantized.

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
        for name, tower in select_towers(recipe, self.towers, LM):
            if any("lora_" in parameter for parameter, _ in tower.named_parameters()):
                raise ValueError(f"adapt: tower {name} has adapters already; put Quantize before Lora")
            linear = [n for n, module in tower.named_modules() if type(module) is nn.Linear]
            skip = {n for end in self.skip for n in ends_with(linear, end, "skip", name)}
            skip |= set(getattr(tower, "bare", ()))
            tower.requires_grad_(False)
            for layer_name in linear:
                if layer_name not in skip:
                    layer = tower.get_submodule(layer_name)
                    tower.set_submodule(layer_name, self._quantize_layer(cast(nn.Linear, layer)))
            keep_norms_in_eval(tower)
            setattr(tower, f"is_loaded_in_{self.bits}bit", True)  # peft checks it before it adapts such layers

    def _quantize_layer(self, layer: nn.Linear) -> nn.Module:
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
        # the first move quantizes, and to 8 bits only from the CPU
        return cast(nn.Module, new.to("cpu").to(device))


def require_trained(recipe: nn.Module) -> None:
    """Raise ValueError for a quantized tower whose weights were never loaded: in 4 or 8 bits nothing trains them."""
    for name, part in recipe.named_modules():
        for bits in (4, 8):
            if getattr(part, f"is_loaded_in_{bits}bit", False) and not has_loaded_weights(part):
                nearest = "PretrainedLM" if name.endswith(LM) else "PretrainedTower"
                raise ValueError(
                    f"model.adapt: Quantize: {name} is a {type(part).__name__} of random weights, which {bits} bits "
                    f"would freeze; nearest: {nearest}, or Begin before Quantize, which loads those of a run"
                )


def bitsandbytes() -> Any:
    """Import bitsandbytes without the kernels that it would download."""
    with no_kernels():
        return import_module("bitsandbytes")


@contextmanager
def no_kernels() -> Iterator[None]:
    """Block imports of the package ``kernels``, through which importing bitsandbytes would download and run code."""
    if "kernels" in sys.modules:
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's mark for a module that may not be imported
    try:
        yield
    finally:
        del sys.modules["kernels"]


def _load_4bit(layer: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Load the saved scales with the 4-bit weight: bitsandbytes saves both and loads the bytes only."""
    bnb = bitsandbytes()
    start = f"{prefix}weight."
    scales = {key.removeprefix(start): state.pop(key) for key in list(state) if key.startswith(start)}
    if scales:
        device = cast(Tensor, layer.weight).device
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            state[f"{prefix}weight"], scales, device=device, module=layer
        )


def _load_8bit(layer: Any, *_: object) -> None:
    """Move the scales back from ``state``, where a forward puts them and bitsandbytes refuses to load them."""
    if layer.weight.SCB is None and layer.state.SCB is not None:
        layer.weight.SCB = layer.state.SCB


def _move_8bit(layer: Any, fn: Any, recurse: bool = True) -> Any:
    """Move the scales with the layer (``.to``, ``.cuda``, ``.cpu`` of any parent); bitsandbytes loses them."""
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    type(layer)._apply(layer, fn, recurse)
    if scale is not None:  # as before the first forward, which fills the state again
        layer.weight.CB, layer.weight.SCB = layer.weight.data, scale.to(layer.weight.device)
        layer.state.CB = layer.state.SCB = None
    return layer
