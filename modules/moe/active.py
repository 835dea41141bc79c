"""Parameters that a token meets in a network with sparse experts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from descant.modules.moe.layer import MoELayer


def expert_layers(network: nn.Module) -> dict[str, MoELayer]:
    """The layers of experts of a network, by their names."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, MoELayer)}


def active_parameters(network: nn.Module, measured: Mapping[str, float] | None = None) -> float | None:
    """Parameters that a token meets: all, less those of the experts that it does not go to, ``(E - k) / E`` of them.

    k is the router's number where that is fixed, and else that of ``measured``, layer by layer, on average over tokens;
    None where it is in neither. Routers, shared experts and embeddings count in full. A forward costs a token
    ``2 active_parameters`` FLOPs, without attention, and less what of them is looked up or not of matrices.

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
