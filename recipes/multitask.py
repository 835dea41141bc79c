"""Several objectives over one network: contrast, matching, masked tokens and classes on shared streams, by YAML.

Claim: objectives that read the same tokens train with one forward pass of each tower.

    tokens_m = tower_m(x_m),  z_m = normalise(head_m(pool_m(tokens_m))),  fused_ab = blocks([c, tokens_a, tokens_b])
    loss = sum over objectives o: terms_o(streams)          each stream made once a step; named o, or o/part
    with universal layers universal(tower_m(x_m)) in place of tower_m(x_m), for all objectives or those of the graph

Objectives that hide the same tokens share these streams too. A modality that no objective reads costs nothing: its
tower does not run and is frozen, so that no rank waits for its gradients. Feature-level harmonizers see z;
parameter-level harmonizers see all shared parameters.
Source: the combination of objectives as in ALBEF (arXiv 2107.07651) and TIP (2407.07582), modules by objective as in
mPLUG-2 (2302.00402).
Letters: B samples, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.output import Output
from descant.modules.core.protocols import ReconstructionOutput
from descant.modules.fusion.cross_encoder import FusionLayers
from descant.modules.fusion.universal import UniversalLayers
from descant.modules.objectives.base import TaskObjective, describe_mask_conflicts
from descant.modules.objectives.embeddings import require_inputs
from descant.modules.objectives.graph import Part, compose_graph
from descant.modules.objectives.streams import Streams
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.recipes.base.stream_space import StreamSpace, teacher_of


class MultiTask(StreamSpace):
    """Any objectives over shared towers and fusion layers, each computed over shared streams (ALBEF, TIP, mPLUG-2).

    Args:
        towers: one tower per modality.
        objectives: name -> objective; names of its terms, and of coefficients in ``mix``, begin with this name.
        width: width of the shared embedding space.
        fusion: layers over the tokens of two modalities, for objectives that need them.
        pool: pools tokens to one vector, copied for each modality; or one pool per modality.
        universal: layers that modalities share, between towers and everything else.
        graph: objective -> the modules above its towers, such as {words: [fusion], kind: [universal]}; an objective
            that is not named uses all that it can.
    """

    def __init__(
        self,
        towers: Towers,
        objectives: dict[str, TaskObjective],
        width: int = 128,
        fusion: FusionLayers | None = None,
        pool: Pool | Pools | None = None,
        universal: UniversalLayers | None = None,
        graph: dict[str, list[Part]] | None = None,
        **kwargs: Any,
    ) -> None:
        if not objectives:
            raise ValueError("objectives: none given; such as {contrast: {class_path: Contrast, init_args: ...}}")
        self.in_batch_negatives = any(objective.in_batch_negatives for objective in objectives.values())
        kwargs.update(teacher_of(objectives, kwargs))
        super().__init__(towers, width, pool, **kwargs)
        self.build_objectives(objectives, None if fusion is None else fusion.width)
        self.graph = compose_graph(graph, objectives, universal)
        shared = [m for m in towers if any(m in objectives[name].reads for name in self.graph.behind)]
        self.universal = universal and universal.build({m: towers.width(m) for m in shared})
        hidden = [m for m in towers if any(m in objective.mask_token_modalities for objective in objectives.values())]
        self.mask_tokens = nn.ParameterDict({m: nn.Parameter(torch.randn(towers.width(m)) * 0.02) for m in hidden})
        fused = {m for objective in objectives.values() for pair in objective.fuses for m in pair}
        self.fusion = None if fusion is None else fusion.build({m: towers.width(m) for m in towers if m in fused})
        pools = {m for objective in objectives.values() for m in objective.pools}
        unused = [("heads", m) for m in towers if not self.forks[m]]
        unused += [("pools", m) for m in towers if not self.forks[m] and m not in pools]
        for part, m in [*unused, *(("towers", m) for m in towers if m not in self.required_modalities)]:
            self.get_submodule(f"{part}.{m}").requires_grad_(False)
        if self.fusion is not None and not fused:
            self.fusion.requires_grad_(False)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for line in describe_mask_conflicts(self.tasks) if stage == "fit" else ():
            rank_zero_info(f"objectives: {line}")

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Return all trained parameters except the objectives' own layers."""
        own = set(self.objectives.parameters())
        return (p for p in self.parameters() if p.requires_grad and p not in own)

    def forward(self, batch: Batch) -> Output:
        require_inputs(batch, *self.required_inputs)
        streams = self.streams(batch)
        views = self.views(streams)
        terms, pairs = self.objective_terms(views, batch), self.match_scorers(views)
        latents = {m: streams.latent(m) for m in self.forks if self.forks[m]}
        return Output(terms, latents, logits=self._logits(views), pairs=pairs, aux=self._expert_terms(streams))

    def reconstruct(self, batch: Batch, corruption: Any = None) -> dict[str, ReconstructionOutput]:
        """Rebuild inputs by the objectives that can, whatever ``corruption`` is. Raise ValueError if none can."""
        views = self.views(Streams(self, batch))
        rebuilt = {m: x for name, task in self.tasks.items() for m, x in task.reconstruct(views[name], batch).items()}
        if not rebuilt:
            raise ValueError("objectives: none rebuilds its input; QuantizedTokens does")
        return rebuilt

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return embeddings and scores, from one forward pass of the towers."""
        streams, whole = Streams(self, batch), set(self.required_modalities) <= batch.inputs.keys()
        return {"z": self.embeddings(streams), "scores": self.scores(batch, streams) if whole else {}}
