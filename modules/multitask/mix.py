"""Compute the mix of loss terms from their gradients: the Gram matrix, the rule, and the check for finite values.

Letters: K terms, P entries of a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from descant.modules.core.host import to_device
from descant.modules.multitask.base import Rule


def term_gradients(
    terms: Sequence[Tensor], inputs: Sequence[Tensor], retain_graph: bool = True
) -> list[tuple[Tensor | None, ...]]:
    """Compute each term's gradient for each input, by K backward passes; None if the term does not depend on the input.

    Without ``retain_graph`` the last pass frees the graph.

    >>> x = torch.ones((), requires_grad=True)
    >>> [float(g) for (g,) in term_gradients([2 * x, 3 * x], [x]) if g is not None]
    [2.0, 3.0]
    """
    last = len(terms) - 1
    return [
        torch.autograd.grad(term, inputs, retain_graph=retain_graph or k < last, allow_unused=True)
        for k, term in enumerate(terms)
    ]


def stack_gradients(of_terms: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Stack the terms' gradients of one parameter, ``[K, ...]``, with zeros for a term that has none."""
    return torch.stack([torch.zeros_like(like) if g is None else g for g in of_terms])


def gramian(grads: Sequence[Tensor]) -> Tensor:
    """Compute ``sum_p <g_kp, g_lp>``, float64 ``[K, K]``, from ``[K, ...]`` for each parameter.

    >>> gramian([torch.tensor([1.0, -2.0]), torch.tensor([[3.0], [1.0]])]).tolist()
    [[10.0, 1.0], [1.0, 5.0]]
    """
    total_KK = torch.zeros(len(grads[0]), len(grads[0]), dtype=torch.float64, device=grads[0].device)
    for g in grads:
        g_KP = g.reshape(len(g), -1).double()  # a scalar parameter has no axis
        total_KK += g_KP @ g_KP.T
    return total_KK


def gramians(rule: Rule, grads: Sequence[Tensor], own_KK: Tensor, batches: int) -> tuple[Tensor, Tensor]:
    """Compute the Gram matrix of mean gradients over ``batches``, and the one that the rule reads. Across batches it is

        (M G - own) / (M - 1) = mean_{m != n} <g_mk, g_nl>,     own = mean_m <g_mk, g_ml>

    >>> from descant.modules.multitask import PCGrad
    >>> [x.tolist() for x in gramians(PCGrad(), [torch.tensor([1.0, -2.0])], torch.zeros(0), 1)]
    [[[1.0, -2.0], [-2.0, 4.0]], [[1.0, -2.0], [-2.0, 4.0]]]
    """
    gramian_KK, scaled = gramian(grads), rule.precondition(grads)
    if rule.across_batches:
        return gramian_KK, (batches * gramian_KK - own_KK) / (batches - 1)
    return gramian_KK, gramian_KK if scaled is grads else gramian(scaled)


def mix_of(rule: Rule, gramian_KK: Tensor, value_K: Tensor | None, draw: int) -> Tensor | None:
    """Compute the rule's coefficients, float64 ``[K]``; None if a gradient or a value is not finite.

    ``gramian_KK``: empty for a rule that reads no gradients. ``value_K``: values over all ranks; None if only gradients
    are known, which is enough for most rules of gradients.

    >>> from descant.modules.multitask import PCGrad
    >>> conflict = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    >>> mix_of(PCGrad(), conflict, None, 0)
    tensor([1.5000, 1.5000], dtype=torch.float64)
    """
    name = type(rule).__name__
    if value_K is None and (rule.reads_values or not rule.reads_gradients):
        raise ValueError(f"{name} mixes by the values of the terms, and there are gradients alone; such as PCGrad does")
    if rule.reads_gradients and not gramian_KK.numel():
        raise ValueError(f"{name} mixes by gradients, and there are values alone; such as FAMO does")
    if value_K is None:
        value_K = torch.ones(len(gramian_KK), dtype=torch.float64)
    if not bool(gramian_KK.isfinite().all() & value_K.isfinite().all()):
        return None
    return rule.weights(gramian_KK[None] if rule.reads_gradients else gramian_KK, value_K, draw)[0]


def mix_gradients(weight_K: Tensor, g: Tensor) -> Tensor:
    """Compute ``sum_k weight_k g_k`` for g of shape ``[K, ...]``.

    >>> mix_gradients(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.5, 1.0]])).tolist()
    [2.0, 2.0]
    """
    total: Tensor = torch.tensordot(to_device(weight_K, g.device).to(g), g, dims=1)
    return total


def combine_gradients(rule: Rule, grads: Sequence[Tensor], draw: int) -> list[Tensor]:
    """Compute the step of a rule of whole gradients for each parameter, from ``[K, ...]``; they form one feature.

    >>> from descant.modules.multitask import GradDrop
    >>> grads = [torch.tensor([1.0, -2.0]), torch.tensor([[3.0], [1.0]])]
    >>> [g.tolist() for g in combine_gradients(GradDrop(leak=1.0), grads, 0)]
    [-1.0, [4.0]]
    """
    flat_K1P = torch.cat([g.reshape(len(g), 1, -1) for g in grads], dim=2)
    parts = rule.combine(flat_K1P, draw)[0].split([g[0].numel() for g in grads])
    return [part.view(g.shape[1:]) for part, g in zip(parts, grads, strict=True)]
