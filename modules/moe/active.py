"""Active parameters: those that one token uses in a network with sparse experts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from descant.modules.moe.layer import MoELayer


def expert_layers(network: nn.Module) -> dict[str, MoELayer]:
    """Return the expert layers of a network by name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, MoELayer)}


def active_parameters(network: nn.Module, measured: Mapping[str, float] | None = None) -> float | None:
    """Count the parameters that a token uses: all, minus the share ``(E - k) / E`` of experts that it does not go to.

    k is the router's number of experts per token if that is fixed, otherwise the layer's mean over tokens in
    ``measured``. The result is None if k is in neither. Routers, shared experts and embeddings count in full. Without
    attention, a forward costs ``2 active_parameters`` FLOPs per token, less for parameters that are looked up or not
    part of a matrix.

    >>> from descant.modules.moe import TopKRouter
    >>> layer = MoELayer(width=8, hidden=16, experts=4, router=TopKRouter(k=2))  # a gate, and 3 matrices an expert
    >>> active_parameters(layer) == 4 * 8 + 2 * 3 * 8 * 16
    True
    """
    total = float(sum(p.numel() for p in network.parameters()))
    for name, layer in expert_layers(network).items():
        E, fixed = layer.router.experts, layer.router.meets
        k = (measured or {}).get(name) if fixed is None else fixed
        if k is None:
            return None
        total -= (E - k) / E * sum(p.numel() for p in layer.experts.parameters())
    return total
