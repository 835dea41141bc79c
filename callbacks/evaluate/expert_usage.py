"""Use of sparse experts on evaluation sets: load, entropy, the kinds and tasks of their tokens, and a heat map.

Letters: B rows of a batch, E experts, L layers, M kinds of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.callbacks.plots.experts import expert_maps
from descant.callbacks.plots.output import save_figure
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import Scores
from descant.modules.core.ranks import gather_objects
from descant.modules.moe import MoELayer, Routing
from descant.modules.moe.active import expert_layers
from descant.modules.moe.watch import Use, entropy, mutual_information


class ExpertUsage(ForwardEvaluator):
    """Logs how the tokens of each evaluation set use the experts of a model, while its scores are computed:

    * ``entropy``: of the load of the real experts, in nats; log E at even use. ``most``: share of the most used one.
    * ``active``: real experts per token. ``null``: share of the choices that are null experts.
    * ``mi_kind``, ``mi_task``: mutual information in nats of a choice's expert with the token's kind (modality) and
      with its task (source), null experts included.
    * ``dropped``: share of the choices beyond capacity, in the training steps since the last evaluation or resume;
      nothing is dropped in evaluation.

    ``{set}/experts/{metric}`` is the mean over layers, ``{set}/experts/{layer}/{metric}`` is that of each layer, and
    ``{set}/experts/{layer}/load/{expert}`` is a share of the choices of real experts. A figure shows layers, experts
    and kinds: ``pictures/{set}-experts-{step}.png`` in the run's folder, its report page, and TensorBoard.

    Tokens of all ranks are counted once each, in integers: results depend on neither batches nor ranks, unless routers
    do. Training steps read nothing from the device.

    Args:
        sets, limit, every, validate: see :class:`ForwardEvaluator`.
    """

    once = True
    needs = (Scores,)
    #: Layer -> real experts per token, over all sets of the last evaluation.
    active: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._layers = expert_layers(pl_module)
        if not self._layers:
            raise ValueError(
                f"ExpertUsage: {type(pl_module).__name__} has no experts; a Trunk or CausalLM has, with experts: "
                "ExpertLayers"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._layers = {}

    def _forget(self) -> None:
        super()._forget()
        self._uses: dict[str, dict[str, Use]] = {}  # set -> layer -> counts of this rank

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        assert has(pl_module, Scores)
        keep_B = keep_B & torch.stack(list(batch.present.values())).any(dim=0)
        some = bool(keep_B.any())
        if not bool(keep_B.all()):  # at least one row, so that ranks that share parameters run the same number of times
            batch = batch.select(keep_B.nonzero()[:, 0] if some else slice(0, 1))
        uses = self._uses.setdefault(name, {})
        hooks = [layer.register_forward_hook(partial(_count, uses, key, some)) for key, layer in self._layers.items()]
        torch.compiler.set_stance("force_eager")  # compiled code may not call hooks
        try:
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                pl_module.scores(batch)
        finally:
            torch.compiler.set_stance("default")
            for hook in hooks:
                hook.remove()

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        routers = {name: layer.router for name, layer in self._layers.items()}
        counts = {name: router.dropped.cpu() for name, router in routers.items() if router.dropped is not None}
        drops = sum_by_key(gather_objects(counts))
        for router in routers.values():
            router.dropped = None
        values, whole = (
            dict[str, Tensor](),
            {name: sum_by_key(gather_objects(uses)) for name, uses in self._uses.items()},
        )
        experts = {name: layer.router.experts for name, layer in self._layers.items()}
        self.active = {layer: use.active(experts[layer]) for layer, use in sum_by_key(list(whole.values())).items()}
        for name, uses in whole.items():
            names = dict(zip(uses, short(list(uses)), strict=True))
            each = {layer: self._measures(layer, use, drops.get(layer)) for layer, use in uses.items()}
            for metric in dict.fromkeys(metric for of in each.values() for metric in of):
                found = [of[metric] for of in each.values() if metric in of]
                values[f"{name}/experts/{metric}"] = torch.tensor(found, dtype=torch.float64).mean()
            for layer, of in each.items():
                real = uses[layer].kind_ME[:, : experts[layer]].sum(dim=0).double()
                of |= {f"load/{e}": float(x) for e, x in enumerate(real / real.sum().clamp(min=1))}
                values |= {f"{name}/experts/{names[layer]}/{metric}": torch.tensor(x) for metric, x in of.items()}
            if uses and trainer.is_global_zero and not trainer.sanity_checking:
                self._draw(trainer, pl_module, name, uses, list(names.values()))
        return values

    def _measures(self, layer: str, use: Use, drops: Tensor | None) -> dict[str, float]:
        E = self._layers[layer].router.experts
        real_E = use.kind_ME[:, :E].sum(dim=0)
        values = {
            "entropy": float(entropy(real_E)),
            "most": float(real_E.max() / real_E.sum().clamp(min=1)),
            "active": use.active(E),
            "null": use.null(E),
            "mi_kind": float(mutual_information(use.kind_ME)),
            "mi_task": float(mutual_information(use.task_ME)),
        }
        return values if drops is None else values | {"dropped": int(drops[0]) / max(int(drops[1]), 1)}

    def _draw(
        self, trainer: L.Trainer, pl_module: L.LightningModule, name: str, uses: Mapping[str, Use], names: list[str]
    ) -> None:
        kinds, most = max(len(use.kind_ME) for use in uses.values()), max(use.kind_ME.shape[1] for use in uses.values())
        real = max(self._layers[layer].router.experts for layer in uses)
        share_MLE = np.full((kinds, len(uses), most), np.nan)
        for row, use in enumerate(uses.values()):
            count_ME = use.kind_ME.double().numpy()
            with np.errstate(invalid="ignore"):
                share_MLE[: len(count_ME), row, : count_ME.shape[1]] = count_ME / count_ME.sum(axis=1, keepdims=True)
        known = getattr(getattr(pl_module, "inner", pl_module), "token_kinds", ())
        titles = [known[m] if m < len(known) else f"kind {m}" for m in range(kinds)]
        experts = [str(e) if e < real else "null" for e in range(most)]
        title = f"{name}: experts, step {trainer.global_step}"
        figure = expert_maps(title, names, experts, dict(zip(titles, share_MLE, strict=True)))
        save_figure(trainer, figure, f"{name}-experts", f"pictures/{name}-experts")


def _count(
    uses: dict[str, Use], key: str, counted: bool, layer: MoELayer, _: Any, output: tuple[Tensor, Routing]
) -> None:
    if counted:
        use = Use.of(output[1], layer.router.experts, layer.router.null_experts)
        uses[key] = uses[key] + use if key in uses else use


def sum_by_key(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the values by key, in the order in which keys first occur.

    >>> sum_by_key([{"a": 1}, {"b": 2, "a": 3}])
    {'a': 4, 'b': 2}
    """
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: reduce(add, (part[key] for part in parts if key in part)) for key in keys}


def short(names: list[str]) -> list[str]:
    """Shorten layers to their numbers if these are distinct, else to whole names without dots.

    >>> short(["lm.layers.1.moe", "lm.layers.3.moe"]), short(["a.layers.1.moe", "b.layers.1.moe"])
    (['1', '3'], ['a-layers-1', 'b-layers-1'])
    """
    numbers = [next((part for part in reversed(name.split(".")) if part.isdigit()), name) for name in names]
    return (
        numbers if len(set(numbers)) == len(names) else [name.removesuffix(".moe").replace(".", "-") for name in names]
    )
