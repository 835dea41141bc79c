"""Behaviour of expert routers in evaluation: choices by later tokens, and experts by how certain a prediction is.

Letters: B rows of a batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import RoutesTokens, Scores
from descant.modules.core.ranks import gather_objects
from descant.modules.language.depths import DepthLayer
from descant.modules.moe import ExpertChoice


@contextmanager
def by_choice(network: nn.Module) -> Iterator[list[nn.Module]]:
    """Let routers with a causal auxiliary decide as in training within the block: by later tokens too. Yields them."""
    routers = [part for part in network.modules() if isinstance(part, ExpertChoice | DepthLayer) and part.auxiliary]
    for router in routers:
        router.by_choice = True
    try:
        yield list[nn.Module](routers)
    finally:
        for router in routers:
            router.by_choice = False


class CausalGap(ForwardEvaluator):
    """Cost of causal routers: every score once more, with experts that choose their tokens as in training (MoMa).

    ``{set}/{score}_by_choice`` is the mean over the set, in addition to the ``{set}/{score}`` of :class:`Accuracy`. It
    reads later tokens, so it is not a likelihood, and no model can generate with it. Without causal routers both are
    equal.

    Args:
        sets, limit, every, validate: see :class:`ForwardEvaluator`.
    """

    once = True
    needs = (Scores,)

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        assert has(pl_module, Scores)
        with by_choice(pl_module), torch.no_grad(), trainer.precision_plugin.val_step_context():
            scores = pl_module.scores(batch)
        for score, term in scores.items():
            valid_B = keep_B if term.valid is None else term.valid & keep_B
            self._means.add(f"{name}/{score}_by_choice", replace(term, valid=valid_B))


def by_entropy(entropy_N: Tensor, experts_N: Tensor, share: float = 0.25) -> tuple[Tensor, Tensor]:
    """Average the experts of the ``ceil(share N)`` tokens of least entropy, and of the same number of greatest.

    >>> least, most = by_entropy(torch.tensor([0.1, 2.0, 0.5, 3.0]), torch.tensor([1.0, 2.0, 1.0, 3.0]))
    >>> least.item(), most.item()
    (1.0, 3.0)
    """
    number = max(-int(-share * len(entropy_N) // 1), 1)
    experts_N = experts_N[entropy_N.argsort(stable=True)].double()
    return experts_N[:number].mean(), experts_N[-number:].mean()


class ExpertsByEntropy(ForwardEvaluator):
    """Whether a router gives more experts to tokens before uncertain ones: dynamic capacity (Uni-MoE-2.0-Omni).

    ``{set}/experts``: real experts per token, averaged over layers, without null and shared ones. It covers the tokens
    that precede a scored token, on all ranks. ``{set}/experts_certain``, ``{set}/experts_uncertain``: the same for the
    quarter of these tokens after which the model's prediction has the least entropy, and the most.

    Args:
        sets, limit, every, validate: see :class:`ForwardEvaluator`.
    """

    once = True
    needs = (RoutesTokens,)

    def _forget(self) -> None:
        super()._forget()
        self._tokens: dict[str, list[Tensor]] = {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        assert has(pl_module, RoutesTokens)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            entropy_N, experts_N, sample_N = pl_module.token_experts(batch)
        tokens_N2 = torch.stack([entropy_N.float(), experts_N.float()], dim=1)
        self._tokens.setdefault(name, []).append(tokens_N2[keep_B[sample_N]].cpu())

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        values = dict[str, Tensor]()
        for name, parts in self._tokens.items():
            of_ranks: list[Any] = gather_objects(torch.cat(parts))
            entropy_N, experts_N = torch.cat(of_ranks).unbind(dim=1)
            if len(entropy_N):
                least, most = by_entropy(entropy_N, experts_N)
                values[f"{name}/experts"] = experts_N.double().mean()
                values |= {f"{name}/experts_certain": least, f"{name}/experts_uncertain": most}
        return values
