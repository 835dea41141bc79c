"""Modality inversion: pseudo-tokens of one modality, optimized to match an embedding of another.

Letters: B samples, T tokens, V pseudo-tokens, D width, K marks (in ``rows_of_other_keys``: keys), N rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.capabilities import has
from descant.modules.core.errors import require_value
from descant.modules.core.modes import eval_mode
from descant.modules.core.protocols import Encodes, Inverts
from descant.modules.core.rng import mix_N, uniform_N
from descant.modules.tokenizers.text import Tokenizer

MARK = 50  # steps between two recorded losses


class Frame(NamedTuple):
    """Embeddings ``h_TD`` around the pseudo-tokens; the places ``place_V`` hold only position embeddings."""

    h_TD: Tensor
    place_V: Tensor

    def fill(self, v_BVD: Tensor) -> Tensor:
        """Return ``h_BTD``, the frame filled with each sample's pseudo-tokens.

        >>> frame = Frame(torch.tensor([[1.0], [10.0], [2.0]]), torch.tensor([1]))
        >>> frame.fill(torch.tensor([[[3.0]], [[4.0]]])).squeeze(2).tolist()
        [[1.0, 13.0, 2.0], [1.0, 14.0, 2.0]]
        """
        h_BTD = self.h_TD.expand(len(v_BVD), -1, -1)
        return h_BTD.index_add(1, self.place_V, v_BVD.to(h_BTD.dtype))


class Inverted(NamedTuple):
    """Result of an inversion.

    ``z_BD``: unit-length embeddings of the pseudo-tokens ``v_BVD``; ``cos_B``: their cosines with the targets;
    ``loss_KB``: 1 - cos before the first step, after every 50th and after the last.
    """

    z_BD: Tensor
    v_BVD: Tensor
    cos_B: Tensor
    loss_KB: Tensor

    def monotone(self) -> Tensor:
        """Return the share of marks with a lower mean loss than the mark before; 1 for a loss that only falls."""
        mean_K = self.loss_KB.mean(dim=1)
        return (mean_K[1:] < mean_K[:-1]).float().mean()


class ModalityInversion:
    """Optimizes pseudo-tokens until their embedding matches a target of another modality (Mistretta 2025).

        v_b = argmin over v of  1 - cos(f(frame with v), z_b)

    AdamW starts from N(0, std^2) with frozen encoders: f's parameters get no gradient and do not change, nor do their
    flags and modes. A sample's result does not depend on the batch and its order: each starts from a function of its
    key, and Adam is elementwise. Weight decay bounds the norm of v, on which the loss does not depend if a layer norm
    follows. OTI is this through a text tower (150 steps), OVI through a patch tower (1000).

    Args:
        steps, lr, weight_decay: settings of the optimizer.
        tokens: V.
        std: standard deviation of the initial pseudo-tokens.
        batch: samples inverted at once.

    Source: arXiv 2502.04263.

    >>> ModalityInversion(steps=0)
    Traceback (most recent call last):
    ValueError: ModalityInversion: steps 0; 1 is the least
    """

    def __init__(
        self,
        steps: int = 150,
        lr: float = 2e-2,
        weight_decay: float = 0.01,
        tokens: int = 1,
        std: float = 0.02,
        batch: int = 64,
    ) -> None:
        self.steps, self.lr, self.weight_decay = steps, lr, weight_decay
        self.tokens, self.std, self.batch = tokens, std, batch
        for name, count in (("steps", steps), ("tokens", tokens), ("batch", batch)):
            require_value(count >= 1, f"ModalityInversion: {name} {count}; 1 is the least")
        require_value(lr > 0, f"ModalityInversion: lr {lr} is not positive; such as 0.02")
        for name, value in (("weight_decay", weight_decay), ("std", std)):
            require_value(value >= 0, f"ModalityInversion: {name} {value} is negative; 0 is the least")

    def __call__(self, model: Inverts, modality: str, frame: Frame, target_BD: Tensor, key_B: Tensor) -> Inverted:
        """Optimize pseudo-tokens of ``modality`` for unit-length ``target_BD``; ``key_B`` int64 seeds each sample.

        It also runs under ``no_grad`` and ``inference_mode``.
        """
        if len(target_BD) == 0:
            raise ValueError("ModalityInversion: no target to invert")
        with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
            # tensors made under inference mode take no part in autograd; their clones do
            frame = Frame(*(part.detach().clone() for part in frame))
            parts = [
                self._invert(model, modality, frame, z_BD.clone(), keys_B)
                for z_BD, keys_B in zip(target_BD.detach().split(self.batch), key_B.split(self.batch), strict=True)
            ]
        z, v, cos, loss = zip(*parts, strict=True)
        return Inverted(torch.cat(z), torch.cat(v), torch.cat(cos), torch.cat(loss, dim=1))

    def _invert(self, model: Inverts, modality: str, frame: Frame, target_BD: Tensor, key_B: Tensor) -> Inverted:
        kind = torch.promote_types(frame.h_TD.dtype, torch.float32)
        target_BD = F.normalize(target_BD.to(kind), dim=-1)
        shape = (len(key_B), len(frame.place_V), frame.h_TD.shape[1])
        v_BVD = (self.std * normal(key_B, shape[1] * shape[2]).view(shape)).to(target_BD).requires_grad_()
        mask_BT = torch.ones(len(key_B), len(frame.h_TD), dtype=torch.bool, device=v_BVD.device)
        optimizer = torch.optim.AdamW([v_BVD], lr=self.lr, weight_decay=self.weight_decay)
        marks = []
        for step in range(self.steps + 1):
            z_BD = model.encode_embeddings(frame.fill(v_BVD), mask_BT, modality).to(kind)
            loss_B = 1 - (z_BD * target_BD).sum(dim=1)
            if step % MARK == 0 or step == self.steps:
                marks.append(loss_B.detach())
            if step < self.steps:
                # only for the tokens: no encoder parameter gets a gradient, whatever its flag
                (v_BVD.grad,) = torch.autograd.grad(loss_B.sum(), v_BVD)
                optimizer.step()
        return Inverted(z_BD.detach(), v_BVD.detach(), 1 - loss_B.detach(), torch.stack(marks))


def text_frame(model: Inverts, modality: str, tokenizer: Tokenizer, template: str, tokens: int) -> Frame:
    """Tokenize a template such as ``a picture of {}``, with ``tokens`` places for pseudo-tokens at the braces."""
    tower, (before, after) = tower_of(model, modality), split_template(template)
    left, right = [*tokenizer.begin, *tokenizer.encode(before)], [*tokenizer.encode(after), *tokenizer.end]
    length = len(left) + tokens + len(right)
    if length > tokenizer.length:
        raise ValueError(
            f"template {template!r}: {length} tokens with its place; this tokenizer has rows of {tokenizer.length}"
        )
    with torch.no_grad():
        positions_TD = _positions(tower)[:length]
        place_V = torch.arange(len(left), len(left) + tokens, device=positions_TD.device)
        ids_T = torch.tensor([*left, *[tokenizer.pad] * tokens, *right], device=positions_TD.device)
        assert has(tower, Encodes)
        h_TD = tower.embed(ids_T[None])[0].detach().clone()
        h_TD[place_V] = positions_TD[place_V].to(h_TD.dtype)
    return Frame(h_TD, place_V)


def patch_frame(model: Inverts, modality: str, tokens: int) -> Frame:
    """Build a frame with pseudo-tokens instead of an image's patches, at the positions of the first patches.

    This is our reading: the paper has a class token as well, but our tower has none and averages over pseudo-tokens.
    """
    positions_TD = _positions(tower_of(model, modality))
    if tokens > len(positions_TD):
        raise ValueError(f"tokens {tokens}: tower {modality} has places for {len(positions_TD)} patches")
    h_TD = positions_TD[:tokens].detach().clone()
    return Frame(h_TD, torch.arange(tokens, device=h_TD.device))


def tower_of(model: Inverts, modality: str) -> nn.Module:
    """Return the tower of inversion. Raise ValueError if it has no token embeddings."""
    if modality not in model.towers:
        raise ValueError(f"no tower {modality!r}; the towers are {', '.join(model.towers)}")
    tower = model.towers[modality]
    if not has(tower, Encodes) or not hasattr(tower, "positions_TD"):
        raise ValueError(
            f"tower {modality}: inversion needs embed, positions_TD and encode, which {type(tower).__name__} lacks; "
            "TextTower and PatchTower have them"
        )
    return tower


def split_template(template: str) -> tuple[str, str]:
    """Return the texts before and after the one place of a template.

    >>> split_template("{}, emoji")
    ('', ', emoji')
    """
    parts = template.split("{}")
    if len(parts) != 2:
        raise ValueError(f"template {template!r} has {len(parts) - 1} places {{}}; one is needed: 'a picture of {{}}'")
    return parts[0].strip(), parts[1].rstrip()


def rows_of_other_keys(key_N: Tensor) -> Tensor:
    """Return row numbers ``[N]`` for a sham: for each row, the first row of the next key in a random cycle of the keys.

    This is a pure function of the keys and of their first rows. A single key is followed by itself.

    >>> key_N = torch.tensor([5, 5, 8, 9])
    >>> bool((key_N[rows_of_other_keys(key_N)] != key_N).all()), rows_of_other_keys(torch.tensor([3, 3])).tolist()
    (True, [0, 0])
    """
    key_K, k_N = key_N.unique(return_inverse=True)
    first_K = torch.full_like(key_K, len(key_N)).scatter_reduce(
        0, k_N, torch.arange(len(key_N), device=key_N.device), reduce="amin"
    )
    order_K = torch.from_numpy(mix_N(key_K, "sham")).to(key_N.device).argsort(stable=True)
    next_K = torch.empty_like(order_K)
    next_K[order_K] = order_K.roll(-1)
    return first_K[next_K[k_N]]


def normal(key_B: Tensor, count: int) -> Tensor:
    """Draw ``[B, count]`` from N(0, 1), each a pure function of its sample's key (Box and Muller 1958), on the CPU.

    >>> wide_BN = normal(torch.arange(100), 100)
    >>> torch.equal(wide_BN[7:8], normal(torch.tensor([7]), 100)), round(wide_BN.std().item(), 1)
    (True, 1.0)
    """
    key_B1, place_N = key_B.cpu().numpy()[:, None], np.arange(count, dtype=np.uint64)
    u_BN, turn_BN = (uniform_N(key_B1, f"inversion/{part}", place_N).double() for part in ("radius", "turn"))
    return ((-2 * (1 - u_BN).log()).sqrt() * (2 * math.pi * turn_BN).cos()).float()


def _positions(tower: nn.Module) -> Tensor:
    positions_TD = tower.positions_TD
    assert isinstance(positions_TD, Tensor)
    return positions_TD
