"""Adversarial attacks (PGD) on some of a sample's modalities, and certified radii (CRMT).

Letters: B samples, N numbers of all perturbed inputs, C classes, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.core.ranks import world
from descant.modules.core.rng import normal_NK, uniform_N
from descant.modules.core.rows import RowTracker, share_rows


class Nudge:
    """Perturbation of a batch: ``z = nudge(delta_BN)`` are latents of inputs moved by delta, differentiable by delta.

    It perturbs a modality's inputs if they are floats, or else the embeddings of its tokens. Numbers that are not
    finite are padding and do not change. Inference tensors, which have no autograd, are copied.

    Args:
        recipe: a recipe with towers and latents.
        batch: a batch of the recipe.
        modalities: the modalities to perturb.
        rows: modality -> bool ``[B]``, the samples to perturb; by default all.
    """

    def __init__(
        self, recipe: Any, batch: Batch, modalities: Sequence[str], rows: Mapping[str, Tensor] | None = None
    ) -> None:
        self.recipe, self.rows = recipe, rows or {}
        self.clean: dict[str, Tensor] = {}
        with torch.inference_mode(False):
            copies = {name: _with_autograd(x) for name, x in batch.inputs.items()}
            self.batch = replace(batch, inputs=copies, present={m: _with_autograd(x) for m, x in batch.present.items()})
            for m in modalities:
                if m not in recipe.towers or m not in copies:
                    raise ValueError(f"no modality {m!r} to attack, only {', '.join(recipe.towers)}")
                self.clean[m] = copies[m] if copies[m].is_floating_point() else self._embeddings(m)
        self.sizes = [math.prod(x.shape[1:]) for x in self.clean.values()]

    def zero(self) -> Tensor:
        """Return a ``delta_BN`` of zeros."""
        return torch.zeros(len(self.batch), sum(self.sizes), device=self.batch.device, dtype=self._dtype())

    def _dtype(self) -> torch.dtype:
        return next(iter(self.clean.values())).dtype

    def size_B(self) -> Tensor:
        """Compute ``|x_b - mean x_b|``, the distance of the inputs to perturb from constant ones."""
        return torch.stack([size_B.square() for size_B in self.sizes_B().values()]).sum(dim=0).sqrt()

    def sizes_B(self) -> dict[str, Tensor]:
        """Compute :meth:`size_B` for each modality alone."""
        sizes = {}
        for m, x in self.clean.items():
            x_BN = x.flatten(1)
            real_BN = x_BN.isfinite()
            mean_B1 = torch.where(real_BN, x_BN, 0.0).sum(1, keepdim=True) / real_BN.sum(1, keepdim=True).clamp(min=1)
            sizes[m] = torch.where(real_BN, x_BN - mean_B1, 0.0).norm(dim=1)
        return sizes

    def perturb(self, delta_BN: Tensor) -> dict[str, Tensor]:
        """Return modality -> perturbed inputs, for modalities whose inputs are floats."""
        each = ((m, x, delta) for m, x, delta in self._each(delta_BN) if self.batch.inputs[m].is_floating_point())
        return {m: torch.where(x.isfinite(), x + delta, x) for m, x, delta in each}

    def _each(self, delta_BN: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        for (m, x), delta in zip(self.clean.items(), delta_BN.split(self.sizes, dim=1), strict=True):
            if m in self.rows:
                delta = torch.where(self.rows[m][:, None], delta, 0.0)
            yield m, x, delta.view_as(x)

    def __call__(self, delta_BN: Tensor) -> dict[str, Tensor]:
        inputs = self.batch.inputs | self.perturb(delta_BN)
        with ExitStack() as stack:
            for m, _, delta in self._each(delta_BN):
                if not inputs[m].is_floating_point():
                    stack.enter_context(_perturbing(_embedding(self.recipe, m), delta, share_rows(self.recipe)))
            return self.recipe.latents(replace(self.batch, inputs=inputs))

    def gradient(self, value: Tensor, delta_BN: Tensor) -> Tensor:
        """Compute ``d value / d delta``. Raise ValueError without one, as for a tower that runs without gradients."""
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, delta_BN, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(f"{', '.join(self.clean)}: a tower without a gradient to its input")
        return gradient

    def _embeddings(self, m: str) -> Tensor:
        outputs: list[Tensor] = []
        tracker = share_rows(self.recipe)

        def record(module: nn.Module, args: Any, out: Tensor) -> None:
            some, at = out.detach(), tracker.current
            whole = some.new_zeros(len(self.batch), *some.shape[1:])
            outputs.append(some if at is None else whole.index_put((at,), some))

        handle = _embedding(self.recipe, m).register_forward_hook(record)
        try:
            with torch.no_grad():
                self.recipe.latents(self.batch)
        finally:
            handle.remove()
        return outputs[0].clone()


def _with_autograd(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x


def _embedding(recipe: Any, m: str) -> nn.Module:
    embedding = next((x for x in recipe.towers[m].modules() if isinstance(x, nn.Embedding | nn.EmbeddingBag)), None)
    if embedding is None:
        name = type(recipe.towers[m]).__name__
        raise ValueError(f"{m}: {name} takes ids and has no embedding to perturb")
    return embedding


@contextmanager
def _perturbing(embedding: nn.Module, delta: Tensor, tracker: RowTracker) -> Iterator[None]:
    def add(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        at = tracker.current
        return out + (delta if at is None else delta[at]).to(out)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def find_attacks(
    nudge: Nudge, radius_B: Tensor, label_B: Tensor, steps: int = 20, restarts: int = 1, step: float = 2.5
) -> Tensor:
    """Return bool ``[B]``: whether projected gradient ascent (PGD) finds a misclassified input within a radius.

        delta <- project(delta + step radius / steps  g / |g|),   g = d cross_entropy(fuse(z(delta)), label) / d delta

    onto ``|delta_b| <= radius_b``, from zero and, in further restarts, from random points; all points on the way count.
    This is a lower bound of the worst case. Source: Madry 2018, arXiv 1706.06083, in the l2 norm.
    """
    recipe, draw_B = nudge.recipe, nudge.batch.rng_seed
    wrong_B = torch.zeros_like(label_B, dtype=torch.bool)
    radius_B1 = radius_B[:, None]
    with torch.inference_mode(False), torch.enable_grad():
        label_B = label_B.clone()
        for restart in range(restarts):
            delta_BN = nudge.zero()
            if restart:
                delta_BN = _within(draw_B, restart, delta_BN, radius_B1)
            for _ in range(steps):
                logits_BC, delta_BN = _ascend(nudge, delta_BN, radius_B1, label_B, step / steps)
                wrong_B = wrong_B | (logits_BC.argmax(dim=1) != label_B)
            with torch.no_grad():
                wrong_B = wrong_B | (recipe.fuse(nudge(delta_BN), nudge.batch.present).argmax(dim=1) != label_B)
    return wrong_B


def worst(nudge: Nudge, radius_B: Tensor, label_B: Tensor, steps: int = 5, step: float = 2.5) -> Tensor:
    """Return ``delta_BN`` at the end of the ascent of :func:`find_attacks` from zero."""
    with torch.inference_mode(False), torch.enable_grad():
        delta_BN = nudge.zero()
        for _ in range(steps):
            _, delta_BN = _ascend(nudge, delta_BN, radius_B[:, None], label_B, step / steps)
    return delta_BN


def _ascend(nudge: Nudge, delta_BN: Tensor, radius_B1: Tensor, label_B: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the logits at delta, and delta after a step of this share of the radius."""
    delta_BN.requires_grad_()
    logits_BC = nudge.recipe.fuse(nudge(delta_BN), nudge.batch.present)
    g_BN = nudge.gradient(F.cross_entropy(logits_BC, label_B, reduction="sum"), delta_BN)
    with torch.no_grad():
        g_BN = g_BN / g_BN.norm(dim=1, keepdim=True).clamp(min=torch.finfo(g_BN.dtype).tiny)
        moved_BN = delta_BN + share * radius_B1 * g_BN
        far_B1 = moved_BN.norm(dim=1, keepdim=True)
        return logits_BC, moved_BN * (radius_B1 / far_B1.clamp(min=torch.finfo(g_BN.dtype).tiny)).clamp(max=1.0)


def _within(draw_B: Tensor, restart: int, like_BN: Tensor, radius_B1: Tensor) -> Tensor:
    """Draw a random point in the ball for each sample, uniform in volume."""
    x_BN = normal_NK(draw_B, like_BN.shape[1], f"attack/{restart}", like_BN.device).to(like_BN)
    far_B1 = uniform_N(draw_B, f"attack/far/{restart}")[:, None].to(like_BN) ** (1 / like_BN.shape[1])
    return x_BN / x_BN.norm(dim=1, keepdim=True) * far_B1 * radius_B1


# certificates ------------------------------------------------------------------------------------------------------


def slopes(nudge: Nudge, m: str) -> Tensor:
    """Compute ``tau_BC = |d s_bmk / d x_bm|``, gradient norms of a modality's logits with respect to its input.

    The logits are those of a fusion with margins (:class:`descant.modules.fusion.classifiers.OrthogonalFusion`), before
    its weights. Towers must be in eval mode, in which samples are independent. Each class costs a backward pass.
    """
    fusion: Any = nudge.recipe.fusion
    with torch.inference_mode(False), torch.enable_grad():
        delta_BN = nudge.zero().requires_grad_()
        s_BC = fusion.alone(nudge(delta_BN), nudge.batch.present)[m]
        each = [nudge.gradient(s_BC[:, k].sum(), delta_BN).norm(dim=1) for k in range(s_BC.shape[1])]
    return torch.stack(each, dim=1)


def steepest(recipe: Any, batches: Iterable[Batch], rows: int) -> Tensor:
    """Compute ``tau_MC``, the largest :func:`slopes` over at least ``rows`` rows of these batches, on all ranks."""
    most_MC = torch.zeros(len(recipe.modalities), recipe.classes, device=recipe.device, dtype=recipe.dtype)
    seen = 0
    for batch in batches:
        for i, m in enumerate(recipe.modalities):
            here_BC = torch.where(batch.present[m][:, None], slopes(Nudge(recipe, batch, [m]), m), 0.0)
            most_MC[i] = torch.maximum(most_MC[i], here_BC.amax(dim=0))
        seen += len(batch) * world()
        if seen >= rows:
            break
    if world() > 1:
        dist.all_reduce(most_MC, op=dist.ReduceOp.MAX)
    return most_MC


def certified_radius(
    logits_BC: Tensor,
    weights: Mapping[str, Tensor],
    slope: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    label_B: Tensor,
) -> Tensor:
    """Compute the certified radius (CRMT) ``[B]``: how far a sample's inputs may move before another class can win.

        radius_b = min over k != y of  (h_by - h_bk) / sqrt( sum_m (a_my tau_my + a_mk tau_mk)^2 )

    h: logits of an OrthogonalFusion, a: its weights ``[C]`` per modality, tau: the largest slope of each class ``[C]``;
    the sum is over the modalities that a sample has. All inputs of a sample move together. The radius is negative if
    another class already wins. It is proved for slopes that hold everywhere (of linear towers), and an estimate for
    slopes of some samples. Source: Yang 2024, arXiv 2402.06244, which takes only the runner-up, although another class
    may be nearer.

    >>> one, here = {"image": torch.ones(2)}, {"image": torch.tensor([True])}
    >>> certified_radius(torch.tensor([[3.0, 1.0]]), one, one, here, torch.tensor([0])).item()
    1.0
    """
    at_B1 = label_B.clamp(min=0)[:, None]
    margin_BC = logits_BC.gather(1, at_B1) - logits_BC
    square_BC = torch.zeros_like(margin_BC)
    for m, a_C in weights.items():
        reach_C = a_C * slope[m].to(a_C)
        both_BC = reach_C[at_B1] + reach_C
        square_BC = square_BC + torch.where(present[m][:, None], both_BC, 0.0).square()
    radius_BC = margin_BC / square_BC.clamp(min=torch.finfo(margin_BC.dtype).tiny).sqrt()
    return radius_BC.scatter(1, at_B1, torch.inf).amin(dim=1)
