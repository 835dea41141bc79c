"""State dicts without frozen base weights, which are replaced by their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: The entry of a lean state dict that holds the digests of the omitted tensors, as UTF-8 bytes of JSON.
BASE = "base_weights"


def digest(tensor: Tensor) -> str:
    """Return a tensor's dtype and a 128-bit digest of its shape and bytes.

    >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(torch.zeros(1, 2))
    (True, False)
    >>> digest(torch.zeros(2)).split(":")[0]
    'float32'
    """
    value = hashlib.blake2b(str(tuple(tensor.shape)).encode(), digest_size=16)
    value.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{str(tensor.dtype).removeprefix('torch.')}:{value.hexdigest()}"


def is_of(tensor: Tensor, wanted: str) -> bool:
    """Whether a tensor has this digest after a cast to the digest's dtype, since a trainer may have cast it.

    >>> is_of(torch.ones(2), digest(torch.ones(2).bfloat16())), is_of(torch.ones(2), digest(torch.zeros(2)))
    (True, False)
    """
    return digest(tensor.to(getattr(torch, wanted.split(":")[0]))) == wanted


def base_of(module: nn.Module) -> dict[str, str]:
    """Return name -> digest of all frozen weights and buffers."""
    state = module.state_dict(keep_vars=True)
    return {name: digest(t) for name, t in state.items() if isinstance(t, Tensor) and not t.requires_grad}


def lean(state: Mapping[str, Any], base: Mapping[str, str]) -> dict[str, Any]:
    """Replace those tensors of a state dict that still match the digests in ``base`` by these digests.

    Tensors that changed (running statistics, a momentum teacher) stay in.
    """
    left_out = {name: base[name] for name in base if name in state and digest(state[name]) == base[name]}
    rest = {name: value for name, value in state.items() if name not in left_out}
    note = json.dumps(left_out, sort_keys=True).encode()
    return {**rest, BASE: torch.frombuffer(bytearray(note), dtype=torch.uint8)}


def complete_state(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Complete a lean state dict with the module's base weights. Any other state dict is returned unchanged."""
    if BASE not in state:
        return dict(state)
    base = json.loads(bytes(state[BASE].cpu().tolist()))
    here = module.state_dict()
    for name, wanted in base.items():
        if name not in here:
            raise ValueError(f"the checkpoint leaves out base weights that this model does not have: {name}")
        if not is_of(here[name], wanted):
            raise ValueError(
                f"the checkpoint was trained on other base weights: here {name} differs; give it the same base"
            )
    return {**{name: value for name, value in state.items() if name != BASE}, **{name: here[name] for name in base}}


def find_differences(state: Mapping[str, Any], module: nn.Module) -> set[str]:
    """Return the names in a state dict whose values differ from the module's."""
    here = module.state_dict()
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor) and name in here}
    return {name for name, tensor in tensors.items() if not is_of(here[name], digest(tensor))}
