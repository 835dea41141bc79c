"""Muon for convolutions as well: torch's own optimizer, with filters as matrices, and its control, ``normalize``.

Letters: A rows (outputs) and B columns (inputs times the filter's size) of a parameter as a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Muon


class ConvMuon(Muon):
    """torch.optim.Muon, which takes 2-D parameters, for convolutions too: a filter becomes a matrix ``[A, B]``.

        m <- momentum m + (1 - momentum) g;   u = (1 - momentum) g + momentum m   (Nesterov; else m)
        w <- (1 - lr decay) w - lr s U V^T,   where u = U S V^T

    Five Newton-Schulz steps in bfloat16 approximate ``U V^T``, with singular values around 1. ``s`` is
    ``sqrt(max(1, A / B))`` (original), or ``0.2 sqrt(max(A, B))`` (match_rms_adamw), which gives an update the root
    mean square of AdamW's, so that one learning rate and decay serve both.

    Source: Jordan 2024 (kellerjordan.github.io/posts/muon) and its release, which flattens filters; Moonlight (Liu
    2025, arXiv 2502.16982) for decay and match_rms_adamw.

    Our reading: ``s`` of a filter is that of its matrix; the release takes the filter's height and width, so that s is
    1. Steps of two-dimensional parameters are bit-identical to torch's. If parameters are split over ranks (FSDP2), the
    matrices are multiplied across ranks.

    Args:
        params: parameters of at least two dimensions, or groups of them, in torch's usual layout (contiguous).
        lr: learning rate. weight_decay: decoupled, times ``lr``.
        momentum: of the average of gradients. nesterov: step by the gradient and its average, not by the average alone.
        ns_steps: Newton-Schulz steps.
        adjust_lr_fn: ``s``, original by default.
        sham: ``normalize`` for the control: each matrix moves as far as in the method (the same root mean square), but
            along its momentum itself, at the same computational cost.

    >>> weight = torch.nn.Parameter(torch.zeros(2, 1, 2, 1))
    >>> weight.grad = torch.tensor([[[[3.0], [0.0]]], [[[0.0], [1.0]]]])
    >>> ConvMuon([weight], lr=1.0).step()
    >>> (weight.detach().flatten(1) < -0.6).tolist()  # both singular values are near 1 now, not 3 and 1
    [[True, False], [False, True]]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        sham: Literal["normalize"] | None = None,
    ) -> None:
        if not 0 < ns_steps < 100 or not 0 <= momentum < 1:
            raise ValueError(f"ns_steps {ns_steps} lies in 1..99 and momentum {momentum} in 0..1, without 1")
        groups = list(params)
        groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        named = [[p if isinstance(p, tuple) else (None, p) for p in group["params"]] for group in groups]
        for name, parameter in (pair for pairs in named for pair in pairs):
            if parameter.ndim < 2 or not parameter.is_contiguous():
                what = "a matrix or a filter, and in torch's usual (contiguous) layout"
                raise ValueError(f"ConvMuon: {name or 'a parameter'} of shape {list(parameter.shape)}: only {what}")
        as_matrices: list[dict[str, Any]] = [
            {**group, "params": [_matrix(p.detach()) for _, p in pairs]}
            for group, pairs in zip(groups, named, strict=True)
        ]
        for group, pairs in zip(as_matrices, named, strict=True):
            if all(name is not None for name, _ in pairs):
                group["params"] = [(name, p) for (name, _), p in zip(pairs, group["params"], strict=True)]
        # torch's checks see matrices; below, the parameters themselves replace them
        super().__init__(
            as_matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        for group, pairs in zip(self.param_groups, named, strict=True):
            group["params"] = [p for _, p in pairs]
        self._before: dict[Tensor, Tensor] = {}
        if sham == "normalize":  # as hooks: a callback's own hooks may replace the groups between these two
            self.register_step_pre_hook(lambda *_: self._keep())
            self.register_step_post_hook(lambda *_: self._normalize())

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        for p in group["params"]:
            if p.grad is not None and "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)  # a gradient may have another layout than p
        complex_: bool = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        for tensors in (params_with_grad, muon_momentum_bufs):  # views: the step writes to the originals through them
            tensors[:] = [_matrix(tensor) for tensor in tensors]
        grads[:] = [grad.reshape(len(grad), -1) if grad.ndim > 2 else grad for grad in grads]
        return complex_

    @torch.no_grad()
    def _keep(self) -> None:
        stepped = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        self._before = {p: p.clone() for p in stepped}

    @torch.no_grad()
    def _normalize(self) -> None:
        """Replace the move of each parameter by one of equal size along its momentum."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p in self._before):
                average = self.state[p]["momentum_buffer"]
                along = p.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
                kept = self._before[p] * (1 - group["lr"] * group["weight_decay"])
                p.copy_(kept - along * ((p - kept).norm() / along.norm().clamp(min=group["eps"])))
        self._before = {}


def _matrix(tensor: Tensor) -> Tensor:
    """Return the tensor, or a view of it, as ``[A, B]``."""
    return tensor.view(len(tensor), -1) if tensor.ndim > 2 else tensor
