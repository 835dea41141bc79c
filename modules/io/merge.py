"""Merge adapters and quantized layers into plain layers, so that a tower has the layers that its class builds."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


def plain(module: nn.Module) -> nn.Module:
    """Fold adapters into their layers and 4- or 8-bit weights into floats, in place; ``requires_grad`` stays.

    ``W' = W + (alpha / r) B A``, and for DoRA ``W' = m (W + (alpha / r) B A) / |W + (alpha / r) B A|``, with W the
    dequantized weight if it was quantized. The result is not quantized again: outputs stay the same up to rounding.

    >>> from descant.modules.adaptation.lora import Lora
    >>> from descant.modules.towers import TextTower, Towers
    >>> recipe = nn.Module()
    >>> recipe.towers = Towers(text=TextTower(vocab=9, width=8, depth=1, heads=2, length=4))
    >>> before = list(recipe.state_dict())
    >>> Lora(r=2).apply(recipe)
    >>> len(list(recipe.state_dict())) - len(before), list(plain(recipe).state_dict()) == before
    (8, True)
    """
    inside: tuple[str, ...] = ()
    for name, layer in list(module.named_modules()):  # outermost first: an adapter contains the layer that it adapts
        if not name.startswith(inside) and (_is_adapter(layer) or _is_quantized(layer)):
            module.set_submodule(name, _merge_layer(layer) if _is_adapter(layer) else _linear(layer, _weight(layer)))
            inside += (f"{name}.",)
    for part in module.modules():
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # set by Quantize for peft
            if flag in part.__dict__:
                delattr(part, flag)
        part.__dict__.pop("peft_config", None)
    return module


def has_changed_layers(module: nn.Module) -> bool:
    """Whether any layer is adapted or quantized."""
    return any(_is_adapter(layer) or _is_quantized(layer) for layer in module.modules())


@torch.no_grad()
def _merge_layer(layer: Any) -> nn.Module:
    base = layer.get_base_layer()
    if not _is_quantized(base):
        layer.merge(safe_merge=True)
        return cast(nn.Module, base)
    weight = _weight(base)
    for name in layer.active_adapters:
        variant = layer.lora_variant.get(name)
        weight = variant.merge_safe(layer, name, weight) if variant else weight + layer.get_delta_weight(name)
    return _linear(base, weight)


def _linear(layer: Any, weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().float().contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def _weight(layer: Any) -> torch.Tensor:
    from peft.utils.integrations import dequantize_module_weight

    return cast(torch.Tensor, dequantize_module_weight(layer))


def _is_adapter(layer: nn.Module) -> bool:
    """Whether a layer is a peft adapter, by name, without importing peft."""
    return type(layer).__module__.startswith("peft.") and hasattr(layer, "get_base_layer")


def _is_quantized(layer: nn.Module) -> bool:
    return type(layer).__name__ in ("Linear4bit", "Linear8bitLt") and type(layer).__module__.startswith("bitsandbytes.")
