"""Gradient harmonization tower by tower (MMPareto, ...): a modality's own loss against the joint one.

Letters: K terms, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.callback_order import Ordered
from descant.callbacks.harmonize.terms import gradients
from descant.modules.core.capabilities import has, require
from descant.modules.core.host import read_together, to_device
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import ForksFeatures, MultimodalClassifier
from descant.modules.core.ranks import mean_of_ranks
from descant.modules.core.rng import global_seed, mix
from descant.modules.multitask import Rule
from descant.modules.multitask.mix import gramian
from descant.modules.training_setup.trainer import log_interval


class HarmonizeTowers(Ordered):
    """Gradient harmonization at each tower: mix the terms that share its latents by a rule of their gradients there.

        dL/dz_m = sum_k mix_mk dterm_k/dz_m,    mix_m = rule(G_m),    G_mkl = <g_k, g_l>,  g_k = d term_k / d theta_m

    The sum is over the terms that the recipe forks there (for a classifier, the joint loss and the modality's own), of
    all ranks, in each micro-batch. Heads and fusion, after the latents, are unchanged. If G is not finite, a tower uses
    the plain sum, which counts as a fallback.

    It logs ``harmony/mix/{modality}/{term}``, ``harmony/cos/{modality}`` (for two terms) and ``harmony/fallbacks``.

    Args:
        rule: computes the mix from gradients; it has no state.
        every: compute the gradients in one of every ``every`` optimizer steps; the mix stays in between.
    """

    once = True
    excludes = ("Harmonize", "HarmonizeFeatures")

    def __init__(self, rule: Rule, every: int = 1) -> None:
        super().__init__()
        require_objects(self, rule=(rule, Rule))
        name = type(rule).__name__
        if every < 1:
            raise ValueError(f"HarmonizeTowers: every {every}: 1 is the least")
        if rule.whole_gradients or not rule.reads_gradients or rule.remembers:
            other = "HarmonizeFeatures" if rule.whole_gradients else "Harmonize"
            raise ValueError(f"HarmonizeTowers: {name} is a rule for {other}; here such as MMPareto, PCGrad or MGDA")
        self.rule, self.every, self.fallbacks = rule, every, 0
        self._met: Mapping[str, tuple[str, ...]] = {}
        self.mix: dict[str, Tensor] = {}  # modality -> [K]

    def state_dict(self) -> dict[str, Any]:
        return {"fallbacks": self.fallbacks, "mix": {m: mix_K.clone() for m, mix_K in self.mix.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fallbacks, self.mix = int(state_dict["fallbacks"]), dict(state_dict["mix"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        name = type(pl_module).__name__
        require(self, pl_module, MultimodalClassifier, ForksFeatures)
        assert has(pl_module, ForksFeatures)
        self._met = {m: names for m, names in pl_module.forks.items() if len(names) > 1}
        if not self._met:
            raise ValueError(f"HarmonizeTowers: no two terms of {name} meet at a modality; such as model.unimodal true")
        pl_module.hooks.rule = self._apply_mix if stage == "fit" else None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if has(pl_module, ForksFeatures):
            pl_module.hooks.rule = None

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert has(pl_module, MultimodalClassifier)
        objective = pl_module.step.objective
        assert objective is not None
        if trainer.global_step % self.every and self.mix:
            return
        base = dict(zip(objective.terms, objective.mix.detach().double(), strict=True))
        gramians = []
        for m, names in self._met.items():
            grads = gradients(pl_module, [p for p in pl_module.of_modality(m) if p.requires_grad], names)
            base_K = torch.stack([base[name] for name in names])
            gramians.append(gramian([mean_of_ranks(g) for g in grads]) * base_K[:, None] * base_K)
        # rules run on the CPU: an accelerator is read only once
        for (m, names), gramian_KK in zip(self._met.items(), read_together(*gramians), strict=True):
            base_K = torch.ones(len(names), dtype=gramian_KK.dtype)
            self.mix[m] = torch.ones_like(base_K)
            if gramian_KK.isfinite().all():
                draw = mix(global_seed(), "harmony", trainer.global_step, m)
                self.mix[m] = self.rule.weights(gramian_KK[None], torch.ones_like(base_K), draw)[0]
            else:
                self.fallbacks += 1
            if (trainer.global_step + 1) % log_interval(trainer) == 0:
                self._log(pl_module, m, names, gramian_KK)

    def _apply_mix(self, g_KBD: Tensor, names: tuple[str, ...]) -> Tensor:
        modality = next((m for m, of in self._met.items() if of == names), None)
        if modality not in self.mix:
            return g_KBD.sum(dim=0)
        mix_K = to_device(self.mix[modality].to(g_KBD.dtype), g_KBD.device)
        return torch.einsum("k,kbd->bd", mix_K, g_KBD)

    def _log(self, pl_module: L.LightningModule, m: str, names: tuple[str, ...], gramian_KK: Tensor) -> None:
        values = {f"harmony/mix/{m}/{name}": k for name, k in zip(names, self.mix[m], strict=True)}
        values["harmony/fallbacks"] = torch.tensor(float(self.fallbacks))
        if len(names) == 2:
            norm = (gramian_KK[0, 0] * gramian_KK[1, 1]).sqrt()
            values[f"harmony/cos/{m}"] = torch.where(norm > 0, gramian_KK[0, 1] / norm, 0.0)
        pl_module.log_dict({name: value.float() for name, value in values.items()}, batch_size=1)
