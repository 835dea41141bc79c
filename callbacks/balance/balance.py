"""Per-modality gradient modulation (OGM-GE, AGM, ...): scale each tower's gradients by its modality's score.

Letters: B samples, C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from descant.callbacks.callback_order import Ordered
from descant.modules.balance.base import Pacing
from descant.modules.balance.regularizer import FusionContext, Regularizer
from descant.modules.core.capabilities import has, require
from descant.modules.core.host import read_together, to_device
from descant.modules.core.objective import Term
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import MultimodalClassifier
from descant.modules.core.ranks import total_of_ranks
from descant.modules.core.rng import global_seed, mix
from descant.modules.core.sham import Sham
from descant.modules.training_setup.trainer import log_interval, share_of_run


def modality_scores(pl_module: MultimodalClassifier, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum the scores of each modality's samples in the last forward, and count the samples: float64 ``[2, M]``.

    The signature of ``score`` is ``score(share_BC, label_B) -> [B]``.
    """
    assert pl_module.output is not None and pl_module.output.fusion is not None
    (z, present, label_B), sums = pl_module.output.fusion, []
    with torch.no_grad():
        shares = pl_module.shares({m: z_BD.detach() for m, z_BD in z.items()}, present)
        for m in pl_module.modalities:
            valid_B = present[m] & (label_B >= 0)
            score_B = score(shares[m], label_B.clamp(min=0)).double()
            sums.append(torch.stack([torch.where(valid_B, score_B, 0.0).sum(), valid_B.sum().double()]))
    return torch.stack(sums, dim=1)


def require_multimodal(callback: L.Callback, pl_module: L.LightningModule) -> tuple[str, ...]:
    """Return the modalities of a multimodal classifier. Raises ValueError for another module, or one modality."""
    require(callback, pl_module, MultimodalClassifier)
    return require_several(callback, pl_module)


def require_several(callback: L.Callback, pl_module: Any) -> tuple[str, ...]:
    """Return the modalities of a recipe. Raises ValueError if it has only one."""
    name, modalities = type(pl_module).__name__, tuple(pl_module.modalities)
    if len(modalities) < 2:
        raise ValueError(
            f"{type(callback).__name__}: {name} has one modality, {modalities[0]}: there is nothing to balance"
        )
    return modalities


class TermsCallback(L.Callback):
    """Base of the callbacks that add ``terms`` to those of a recipe's regularizers while it trains."""

    def terms(self, context: FusionContext, training: bool) -> dict[str, Term]:
        raise NotImplementedError

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_multimodal(self, pl_module)
        assert has(pl_module, MultimodalClassifier)
        if stage == "fit":
            pl_module.regularizers.append(_CallbackTerms(self))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if has(pl_module, MultimodalClassifier):
            for n in reversed(range(len(pl_module.regularizers))):
                if type(getattr(pl_module.regularizers[n], "callback", None)) is type(self):
                    del pl_module.regularizers[n]


class _CallbackTerms(Regularizer):
    def __init__(self, callback: TermsCallback) -> None:
        super().__init__()
        self.callback = callback

    def forward(self, context: FusionContext) -> dict[str, Term]:
        return self.callback.terms(context, self.training)


class Balance(Ordered):
    """Gradient modulation: scale the gradients of each modality's own parameters, once an optimizer step.

        g_m <- factor_m g_m,    factor = pacing(s),    s_m = mean over the step's samples of score(share_m, label)

    share_m is the modality's share of the logits, by Shapley values. The logits of no modality are divided equally, so
    that the shares add up to the logits. The mean is over all ranks and micro-batches. The accumulated gradients are
    scaled, and then clipped. If a modality has no labelled sample in a step, or a score is not finite, nothing is
    scaled, and the step counts as a fallback.

    It logs ``balance/score/{modality}``, ``balance/factor/{modality}`` and ``balance/fallbacks``.

    Args:
        pacing: the rule that computes factors from scores.
        noise: add normal noise to each matrix's gradient, with its standard deviation (OGM-GE), equal on all ranks.
        until: share of the run after which nothing is scaled.
        sham: ``permute`` for the control: each modality gets the factor of the one before it.
    """

    once = True
    #: Harmonize sets the gradients, which would undo the scaling.
    after = ("Harmonize",)

    def __init__(
        self, pacing: Pacing, noise: bool = False, until: float = 1.0, sham: Literal["permute"] | None = None
    ) -> None:
        super().__init__()
        require_objects(self, pacing=(pacing, Pacing))
        if not 0 < until <= 1:
            raise ValueError(f"Balance: until {until:g}: a share of the run, above 0 and at most 1")
        self.pacing, self.noise, self.until, self.sham = pacing, noise, until, Sham(sham)
        self.fallbacks = 0
        self._modalities: tuple[str, ...] = ()
        self._sums_2M: Tensor | None = None  # of the micro-batches of this step so far: scores, and samples

    def state_dict(self) -> dict[str, Any]:
        return {"fallbacks": self.fallbacks, "pacing": self.pacing.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fallbacks = int(state_dict["fallbacks"])
        self.pacing.load_state_dict(state_dict["pacing"])

    # the hooks -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums_2M = None  # drop an incomplete step, such as after a loss that was not finite

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._modalities = require_multimodal(self, pl_module)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert has(pl_module, MultimodalClassifier)
        modality_of: dict[nn.Parameter, str] = {}
        for m in self._modalities:
            trained = [p for p in pl_module.of_modality(m) if p.requires_grad]
            if not trained:
                raise ValueError(f"Balance: nothing of {m} is trained, so its gradients cannot be scaled")
            for p in trained:
                if (other := modality_of.setdefault(p, m)) != m:
                    raise ValueError(f"Balance: {m} and {other} share parameters, which cannot have two factors")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert has(pl_module, MultimodalClassifier)
        if share_of_run(trainer) >= self.until:
            return
        sums_2M = modality_scores(pl_module, self.pacing.score)
        self._sums_2M = sums_2M if self._sums_2M is None else self._sums_2M + sums_2M

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert has(pl_module, MultimodalClassifier)
        if self._sums_2M is None:  # the share ``until`` of the run is over
            return
        (read_2M,) = read_together(total_of_ranks(self._sums_2M))  # once a step
        (sum_M, count_M), self._sums_2M = read_2M, None
        score_M = sum_M / count_M
        if not score_M.isfinite().all():
            self.fallbacks += 1
            return
        factor_M = self.sham.handed_on(self.pacing.pace(score_M))
        for m, factor in zip(self._modalities, factor_M.tolist(), strict=True):
            for n, p in enumerate(pl_module.of_modality(m)):
                if p.grad is not None:
                    self._scale(p.grad, factor, mix(global_seed(), "balance", trainer.global_step, m, n))
        if (trainer.global_step + 1) % log_interval(trainer) == 0:
            values = {f"balance/score/{m}": s for m, s in zip(self._modalities, score_M, strict=True)}
            values |= {f"balance/factor/{m}": k for m, k in zip(self._modalities, factor_M, strict=True)}
            values["balance/fallbacks"] = torch.tensor(float(self.fallbacks))
            pl_module.log_dict({name: value.float() for name, value in values.items()}, batch_size=1)

    def _scale(self, grad: Tensor, factor: float, draw: int) -> None:
        if not self.noise or grad.ndim < 2 or grad.numel() < 2:
            grad.mul_(factor)
            return
        if isinstance(grad, DTensor):
            raise ValueError("Balance: noise of sharded parameters would differ from that of whole ones; noise false")
        # sampled on the CPU, so that it is the same on every device
        generator = torch.Generator().manual_seed(draw)
        noise = to_device(torch.randn(grad.shape, generator=generator, dtype=torch.float32), grad.device).to(grad.dtype)
        deviation = grad.std()
        grad.mul_(factor).add_(noise * deviation)
