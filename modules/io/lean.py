"""State dicts without what training left alone: the base weights are told by their digests, not by their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: The entry of a lean state dict that holds the digests of what was left out, as UTF-8 bytes of JSON.
BASE = "base_weights"


def digest(tensor: Tensor) -> str:
    """A tensor's type, and 128 bits of its shape and bytes.

    >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(torch.zeros(1, 2))
    (True, False)
    >>> digest(torch.zeros(2)).split(":")[0]
    'float32'
    """
    found = hashlib.blake2b(str(tuple(tensor.shape)).encode(), digest_size=16)
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{str(tensor.dtype).removeprefix('torch.')}:{found.hexdigest()}"


def is_of(tensor: Tensor, wanted: str) -> bool:
    """Whether a tensor has this digest, once cast to its type: a trainer may have cast what it trained.

    >>> is_of(torch.ones(2), digest(torch.ones(2).bfloat16())), is_of(torch.ones(2), digest(torch.zeros(2)))
    (True, False)
    """
    return digest(tensor.to(getattr(torch, wanted.split(":")[0]))) == wanted


def base_of(module: nn.Module) -> dict[str, str]:
    """Name -> digest of everything in a state dict that takes no gradient: frozen weights, and buffers."""
    state = module.state_dict(keep_vars=True)
    return {name: digest(t) for name, t in state.items() if isinstance(t, Tensor) and not t.requires_grad}


def lean(state: Mapping[str, Any], base: Mapping[str, str]) -> dict[str, Any]:
    """A state dict less what still has the digest that ``base`` names, plus those digests.

    What changed all the same (running statistics, a teacher that follows its student) stays in.
    """
    left_out = {name: base[name] for name in base if name in state and digest(state[name]) == base[name]}
    kept = {name: value for name, value in state.items() if name not in left_out}
    note = json.dumps(left_out, sort_keys=True).encode()
    return {**kept, BASE: torch.frombuffer(bytearray(note), dtype=torch.uint8)}


def completed(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A lean state dict made whole again with the module's own base weights; any other is returned as it is.

    Raises:
        ValueError: naming the first weight that the module has not, or has with other content.
    """
    if BASE not in state:
        return dict(state)
    base = json.loads(bytes(state[BASE].cpu().tolist()))
    own = module.state_dict()
    for name, wanted in base.items():
        if name not in own:
            raise ValueError(f"the checkpoint leaves out base weights that this model has not: {name}")
        if not is_of(own[name], wanted):
            raise ValueError(
                f"the checkpoint was trained on other base weights: here {name} differs; give it the same base"
            )
    return {**{name: value for name, value in state.items() if name != BASE}, **{name: own[name] for name in base}}


def brought(state: Mapping[str, Any], module: nn.Module) -> set[str]:
    """Names in a state dict whose content is not what the module has now."""
    own = module.state_dict()
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor) and name in own}
    return {name for name, tensor in tensors.items() if not is_of(own[name], digest(tensor))}
