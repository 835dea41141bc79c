"""Scores of evaluation sets with some sparse experts silent, which measures what each expert contributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import Scores
from descant.modules.moe import MoELayer, Routing


class WithoutExperts(ForwardEvaluator):
    """Logs every score of a recipe on each evaluation set with some experts silent in all layers that have them:

        y = sum over the chosen experts i outside of S of w_i FFN_i(h)        as ``{set}/{score}_without_{name}``

    The weights of the others are unchanged, so that only the contribution of these experts is lost. The scores of a set
    that uses none of them are bit-identical. Source: the disabled skills of SkillNet (arXiv 2205.06126), as read here.

    Args:
        experts: name -> numbers of the experts that are silent together, such as {sound: [3]}.
        sets, limit, every, validate: see :class:`ForwardEvaluator`.
    """

    once = True
    needs = (Scores,)

    def __init__(
        self,
        experts: dict[str, list[int]],
        sets: list[str] | None = None,
        limit: int | None = None,
        every: int = 1,
        validate: bool = True,
    ) -> None:
        super().__init__(sets, limit, every, validate)
        for name, numbers in experts.items() or [("experts", [])]:
            if not numbers or min(numbers) < 0:
                raise ValueError(f"WithoutExperts: experts: {name}: {numbers}: numbers from 0 on, such as [0, 1]")
        self.experts = dict(experts)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        most = max((layer.router.experts for layer in _layers(pl_module)), default=0)
        for name, number in ((name, max(numbers)) for name, numbers in self.experts.items()):
            if number >= most and stage != "fit":  # a later stage of training may add experts
                raise ValueError(f"WithoutExperts: experts: {name}: no expert {number}; the model has {most} a layer")

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        assert has(pl_module, Scores)
        for group, numbers in self.experts.items():
            with torch.no_grad(), trainer.precision_plugin.val_step_context(), silent(_layers(pl_module), numbers):
                scores: Mapping[str, Any] = pl_module.scores(batch)
            for score, term in scores.items():
                valid = keep_B if term.valid is None else term.valid & keep_B
                self._means.add(f"{name}/{score}_without_{group}", replace(term, valid=valid))


@contextmanager
def silent(layers: Sequence[MoELayer], experts: Sequence[int]) -> Iterator[None]:
    """Silence some experts of these layers within the block: their weights are zero.

    >>> from descant.modules.moe import HardModality, Marks
    >>> layer = MoELayer(width=4, hidden=4, experts=2, router=HardModality([0, 1]))
    >>> with silent([layer], [1]):
    ...     y_ND = layer(torch.ones(2, 4), Marks(torch.tensor([0, 1])))[0]
    >>> y_ND.any(dim=1).tolist()
    [True, False]
    """
    hooks = [layer.router.register_forward_hook(partial(_silence_experts, experts)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _silence_experts(experts: Sequence[int], router: nn.Module, inputs: Any, routing: Routing) -> Routing:
    weight_NK = routing.weight
    for e in experts:
        weight_NK = weight_NK.masked_fill(routing.expert == e, 0.0)
    return routing._replace(weight=weight_NK)


def _layers(module: nn.Module) -> list[MoELayer]:
    return [part for part in module.modules() if isinstance(part, MoELayer)]
