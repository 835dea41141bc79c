"""Gradient harmonization by any rule instead of ``loss.backward()``, in a plain loop or a plain LightningModule.

Letters: K terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor

from descant.modules.core.compat.fsdp import sharded_modules
from descant.modules.core.host import read_together, to_device
from descant.modules.core.ranks import mean_of_ranks, total_of_ranks, world
from descant.modules.core.rng import global_seed, mix
from descant.modules.multitask.base import Rule
from descant.modules.multitask.mix import (
    combine_gradients,
    gramian,
    gramians,
    mix_gradients,
    mix_of,
    stack_gradients,
    term_gradients,
)

#: Name of the graph node of a leaf tensor.
_LEAF = "torch::autograd::AccumulateGrad"


def harmonize(
    losses: Mapping[str, Tensor] | Sequence[Tensor],
    parameters: nn.Module | Iterable[nn.Parameter],
    rule: Rule,
    loss: Tensor | None = None,
) -> Tensor:
    """Harmonize gradients instead of calling ``loss.backward()``: adds to ``.grad`` as that does, and frees the graph.

        shared parameters:  grad += c sum_k weight_k g_k,  weights = rule(G, L), G_kl = <g_k, g_l>, g_k = dL_k / dshared
        all others:         grad += c sum_k dL_k / dtheta

    A rule of values weighs the losses themselves, so that all parameters get ``c sum_k weight_k dL_k``. ``c`` is the
    factor in ``loss = c sum_k L_k`` (from GradScaler or accumulation), else 1; rules see the losses without it.
    Gradients and values are averaged over ranks before the rule sees them, with or without DDP. If one of them is not
    finite, the call uses the plain sum, and ``rule.loop.fallbacks`` counts it. The rule's state then stays as it was,
    as in a step that a scaler skips.

    Calls whose gradients add up are one optimizer step, from which the rule learns once; a step ends when anything else
    writes to ``.grad`` (clearing, clipping, unscaling). ``rule.state_dict()`` has all that resuming needs.

    Cost: K backward passes and K gradients of the shared parameters, which are reduced over ranks; one pass for a rule
    of values. A compiled model that has run another backward before needs
    ``torch._functorch.config.donated_buffer = False``, as for every second pass.

    Args:
        losses: scalars, at least two; weights are part of them.
        parameters: those that the losses share, such as a trunk's, the same on all ranks; frozen ones are skipped.
        rule: one of ``descant.modules.multitask``; it holds its own state.
        loss: the tensor on which ``backward()`` would be called, if that is not the plain sum:
            ``scaler.scale(sum(losses))``, or the argument of ``LightningModule.backward``.

    Returns:
        ``weight_K``, float64 on the CPU; ones for a rule of whole gradients.

    >>> from descant import MGDA
    >>> w = nn.Parameter(torch.zeros(2))
    >>> [round(x, 6) for x in harmonize([w[0], w[1] - w[0]], [w], MGDA()).tolist()]  # gradients (1, 0) and (-1, 1)
    [1.2, 0.8]
    >>> [round(x, 6) for x in w.grad.tolist()]  # twice the shortest vector between them
    [0.4, 0.8]
    """
    names, terms = _names_and_losses(losses)
    given = list(dict.fromkeys(parameters.parameters() if isinstance(parameters, nn.Module) else parameters))
    leaves = _leaves(terms)
    shared = _select_shared(rule, given, leaves)
    value_K, c = _read(names, terms, loss)
    draw = _begin(rule, names, given)
    state = dict(rule.state)
    if rule.reads_gradients:
        weight_K = _by_gradients(rule, [c * term for term in terms], value_K, c, shared, leaves, draw)
    else:
        weight_K = mix_of(rule, torch.zeros(0), value_K, draw)
        scaled_K = to_device((torch.ones_like(value_K) if weight_K is None else weight_K) * c, terms[0].device)
        torch.autograd.backward(terms, [w.to(t).reshape(t.shape) for w, t in zip(scaled_K, terms, strict=True)])
    rule.loop.fallbacks += weight_K is None
    learns = not rule.remembers or _finite({**leaves, **dict.fromkeys(given)})
    if not learns:
        rule.state = state
    _end(rule, given, learns)
    return torch.ones_like(value_K) if weight_K is None else weight_K


def _by_gradients(
    rule: Rule,
    terms: Sequence[Tensor],
    value_K: Tensor,
    c: float,
    shared: Sequence[Tensor],
    leaves: Mapping[Tensor, None],
    draw: int,
) -> Tensor | None:
    """Write the gradients and return the mix, None if something is not finite; ``terms`` already include ``c``."""
    mine = set(shared)
    others = [p for p in leaves if p not in mine]
    inputs = [*shared, *others]
    of_leaf = dict(zip(inputs, zip(*_passes(terms, inputs), strict=True), strict=True))
    grads = [stack_gradients(of_leaf.pop(p), p) for p in shared]  # pop, to not keep them twice in memory
    grads = [g.div_(c) for g in grads] if c != 1 else grads
    own_KK = mean_of_ranks(gramian(grads)) if rule.across_batches else torch.zeros(0)
    grads = [mean_of_ranks(g) for g in grads]
    gramian_KK, of_rule_KK = read_together(*gramians(rule, grads, own_KK, world()))
    finite = bool(gramian_KK.isfinite().all() & value_K.isfinite().all())
    weight_K: Tensor | None
    if rule.whole_gradients and finite:
        weight_K, new_grads = torch.ones_like(value_K), combine_gradients(rule, grads, draw)
    else:
        weight_K = mix_of(rule, of_rule_KK, value_K, draw) if finite else None
        new_grads = [mix_gradients(torch.ones_like(value_K) if weight_K is None else weight_K, g) for g in grads]
    new = dict(zip(shared, [g.mul_(c) for g in new_grads] if c != 1 else new_grads, strict=True))
    for p in others:
        if some := [g for g in of_leaf[p] if g is not None]:
            new[p] = torch.stack(some).sum(dim=0)
    # run backward from the leaves themselves: DDP reduces them as usual, and hooks on .grad see the mix
    torch.autograd.backward(list(new), list(new.values()))
    return weight_K


def _passes(terms: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[tuple[Tensor | None, ...]]:
    try:
        return term_gradients(terms, inputs, retain_graph=False)
    except RuntimeError as error:
        if "donated_buffer" not in str(error):
            raise
        raise ValueError(
            "harmonize: this model was compiled for a single backward, of an earlier step; set "
            "torch._functorch.config.donated_buffer = False before it is compiled"
        ) from None


# arguments -----------------------------------------------------------------------------------------------------------


def _names_and_losses(losses: Mapping[str, Tensor] | Sequence[Tensor]) -> tuple[tuple[str, ...], list[Tensor]]:
    by_name = losses if isinstance(losses, Mapping) else {str(k): term for k, term in enumerate(losses)}
    for name, term in by_name.items():
        if term.numel() != 1:
            raise ValueError(f"harmonize: term {name} has shape {tuple(term.shape)}; one number, such as its mean()")
        if not term.requires_grad:
            raise ValueError(f"harmonize: term {name} has no gradient: it is detached, or of frozen parameters alone")
    if len(by_name) < 2:
        only = f"one term, {next(iter(by_name))}" if by_name else "no term"
        raise ValueError(f"harmonize: {only}: there is nothing to harmonize it with; loss.backward()")
    return tuple(by_name), list(by_name.values())


def _leaves(terms: Sequence[Tensor]) -> dict[Tensor, None]:
    """Find the leaf tensors that the terms reach."""
    leaves: dict[Tensor, None] = {}
    seen = set()
    todo = [get_gradient_edge(term).node for term in terms]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == _LEAF:
            leaves[node.variable] = None  # type: ignore[attr-defined]
        todo += [before for before, _ in node.next_functions if before is not None]
    return leaves


def _select_shared(rule: Rule, given: Sequence[Tensor], leaves: Mapping[Tensor, None]) -> list[Tensor]:
    """Select the parameters that some term reaches. Raise ValueError if the rule cannot work with them."""
    split = any(isinstance(p, DTensor) for p in given)
    if rule.reads_gradients and (split or not leaves.keys().isdisjoint(_find_gathered())):
        raise ValueError(
            f"harmonize: {type(rule).__name__} needs whole gradients, and FSDP2 frees parameters and splits gradients; "
            "use DDP, the callback Harmonize with reshard_after_forward=False, or a rule of values such as FAMO"
        )
    if rule.across_batches and world() < 2:
        raise ValueError(
            f"harmonize: {type(rule).__name__} compares micro-batches, and a call has one: 2 ranks, or the callback "
            "Harmonize with window step"
        )
    shared = [p for p in given if p in leaves]
    if not shared and not split:
        why = "" if given else "none is given (a generator, such as trunk.parameters(), is empty the second time)"
        raise ValueError(f"harmonize: parameters: {why or 'no term reaches one of them; give those that terms share'}")
    return shared


def _find_gathered() -> set[Tensor]:
    """Find the parameters that FSDP2 has gathered for a step.

    They look like any other parameters, but their gradients are only reduced if a whole backward passes their module.
    """
    return {p for module in sharded_modules() for p in module.parameters()}


def _read(names: Sequence[str], terms: Sequence[Tensor], loss: Tensor | None) -> tuple[Tensor, float]:
    """Return ``value_K`` over all ranks, and ``c``, with a single read from an accelerator."""
    own_K = torch.stack([term.detach().double().reshape(()) for term in terms])
    if loss is None:
        (value_K,) = read_together(mean_of_ranks(own_K))
        return value_K, 1.0
    factors = torch.autograd.grad(loss, terms, retain_graph=True, allow_unused=True)
    for name, factor in zip(names, factors, strict=True):
        if factor is None:
            raise ValueError(f"harmonize: term {name} is not in the loss, which is to be the sum of these very tensors")
    c_K = torch.stack([factor.double().reshape(()) for factor in factors if factor is not None])
    own_K, value_K, c_K, total = read_together(own_K, mean_of_ranks(own_K.clone()), c_K, loss.detach().double())
    c = float(c_K[0])
    if bool((c_K != c).any()) or c == 0:
        weights = ", ".join(f"{x:g}" for x in c_K)
        raise ValueError(f"harmonize: the loss weighs its terms by {weights}: put weights into the losses themselves")
    off = float(total - c * own_K.sum()) / abs(c)
    eps = max(torch.finfo(x.dtype).eps for x in (*terms, loss))
    if math.isfinite(off) and abs(off) > 8 * len(own_K) * eps * float(own_K.abs().sum()):
        raise ValueError("harmonize: the loss has more in it than its terms; give all that is to be differentiated")
    return value_K, c


# steps of a rule -----------------------------------------------------------------------------------------------------


def _begin(rule: Rule, names: tuple[str, ...], given: Sequence[Tensor]) -> int:
    """Return the random seed of the optimizer step, which continues if the last call's gradients are unchanged."""
    loop = rule.loop
    if rule.remembers and loop.names not in ((), names):
        raise ValueError(
            f"harmonize: terms {', '.join(names)}, before {', '.join(loop.names)}: {type(rule).__name__} remembers "
            "what it has seen, so always the same ones"
        )
    if loop.mark is not None and loop.mark == _mark(given, loop.mark[0]):
        rule.state, rule.sums = dict(loop.state), dict(loop.sums)
    else:
        loop.steps, rule.sums = loop.steps + 1, {}
    loop.names = names
    return mix(global_seed(), "harmony", loop.steps - 1)


def _end(rule: Rule, given: Sequence[Tensor], learns: bool) -> None:
    """Learn as if this call were the last one of its step; if it is not, the next call undoes it."""
    loop = rule.loop
    loop.state, loop.sums = dict(rule.state), dict(rule.sums)
    loop.mark = next((_mark(given, n) for n, p in enumerate(given) if p.grad is not None), None)
    if learns:
        rule.learn(lambda seen: seen)  # sums are over all ranks already


def _mark(given: Sequence[Tensor], n: int) -> tuple[int, int, int] | None:
    grad = given[n].grad if n < len(given) else None
    return None if grad is None else (n, id(grad), grad._version)


def _finite(parameters: Iterable[Tensor]) -> bool:
    """Whether all gradients are finite, on all ranks."""
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    if not grads:
        return True
    norm = nn.utils.get_total_norm(grads)  # the 2-norm, three times as fast as the maximum
    return not bool(total_of_ranks((~norm.isfinite()).double()))
