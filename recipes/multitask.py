"""Several objectives over one network: contrast, matching, masked tokens and classes of shared streams, by YAML.

Claim: objectives that read the same tokens train in one forward of each tower, whoever asks for them.

    tokens_m = tower_m(x_m),  z_m = normalise(head_m(pool_m(tokens_m))),  fused_ab = blocks([c, tokens_a, tokens_b])
    loss = sum over objectives o: terms_o(streams)          each stream made once a step; named o, or o/part

An objective may hide tokens in the streams that it reads; two that hide the same tokens share them. What no objective
reads costs nothing: its tower does not run, and its parameters are frozen, so that no gradient is waited for on any
rank. Harmonizers of features meet at z; tokens are shared too, and harmonizers of parameters see both.
Source: the combination of objectives as in ALBEF (arXiv 2107.07651) and TIP (2407.07582).
Letters: B samples, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such
from descant.modules.core.objective import Term
from descant.modules.core.output import Output, Scorer
from descant.modules.fusion.cross_encoder import FusionLayers
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.streams import Streams, differently_hidden
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.modules.training_setup.trainer import datamodule_of
from descant.recipes.base.shared_space import SharedSpace


class MultiTask(SharedSpace):
    """Any objectives over shared towers and fusion layers, each computed over shared streams (ALBEF, TIP, mPLUG-2).

    Args:
        towers: one tower a modality.
        objectives: name -> objective; names of terms, and of coefficients in ``mix``, begin with it.
        width: of the shared embedding space.
        fusion: layers over the tokens of two modalities, for objectives that ask for them.
        pool: tokens to one vector, a copy for each modality; or one a modality.

    Raises:
        ValueError: without an objective, or for one with a modality that has no tower or a stream that nobody makes; in
            training, for data without a modality that some objective reads.
    """

    def __init__(
        self,
        towers: Towers,
        objectives: dict[str, TaskObjective],
        width: int = 128,
        fusion: FusionLayers | None = None,
        pool: Pool | Pools | None = None,
        **kwargs: Any,
    ) -> None:
        if not objectives:
            raise ValueError("objectives: none given; such as {contrast: {class_path: Contrast, init_args: ...}}")
        self.in_batch_negatives = any(objective.in_batch_negatives for objective in objectives.values())
        super().__init__(towers, width, pool, **kwargs)
        facts = Facts(dict(towers.items()), width, None if fusion is None else fusion.width)  # type: ignore[arg-type]
        for name, objective in objectives.items():
            try:
                objective.build(facts)
            except ValueError as error:
                raise ValueError(f"objectives: {name}: {error}") from None
        self.objectives = nn.ModuleDict(objectives)
        hidden = [m for m in towers if any(m in objective.hidden for objective in objectives.values())]
        self.mask_tokens = nn.ParameterDict({m: nn.Parameter(torch.randn(towers.width(m)) * 0.02) for m in hidden})
        fused = {m for objective in objectives.values() for pair in objective.fuses for m in pair}
        self.fusion = None if fusion is None else fusion.build({m: towers.width(m) for m in towers if m in fused})
        unused = [(part, m) for part in (self.pools, self.heads) for m in towers if not self.forks[m]]
        for part, m in [*unused, *((self.towers, m) for m in towers if m not in self.reads)]:
            part[m].requires_grad_(False)
        if self.fusion is not None and not fused:
            self.fusion.requires_grad_(False)
        self._reported = False

    def _each(self) -> Iterator[tuple[str, TaskObjective]]:
        for name, objective in self.objectives.items():
            assert isinstance(objective, TaskObjective)
            yield name, objective

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for name, objective in self._each():
            try:
                objective.require_data(datamodule_of(self.trainer))
            except ValueError as error:
                raise ValueError(f"objectives: {name}: {error}") from None

    @property
    def reads(self) -> tuple[str, ...]:
        """The modalities that some objective needs; others are embedded where they are judged."""
        return tuple(m for m in self.towers if any(m in objective.reads for _, objective in self._each()))

    @property
    def forks(self) -> Mapping[str, tuple[str, ...]]:
        """Modality -> the terms that share its embedding."""
        parts = [(_named(name, part), ms) for name, o in self._each() for part, ms in o.latents.items()]
        return {m: tuple(term for term, ms in parts if m in ms) for m in self.towers}

    @property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """Pairs of modalities that objectives score, by the name of the term."""
        return {_named(name, part): pair for name, o in self._each() for part, pair in o.scored().items()}

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """All but the objectives' own layers."""
        own = {p for p in self.objectives.parameters()}
        return (p for p in self.parameters() if p.requires_grad and p not in own)

    def forward(self, batch: Batch) -> Output:
        for m in (m for m in self.reads if m not in batch.inputs):
            raise ValueError(f"the data has no modality {m!r}: {no_such(m, batch.inputs)}")
        streams = Streams(self, batch)
        views = self._views(streams)
        terms, pairs = dict[str, Term](), dict[str, Scorer]()
        for name, objective in self._each():
            terms |= {_named(name, part): term for part, term in objective(views[name], batch).items()}
            pairs |= {_named(name, part): scorer for part, scorer in objective.scorers(views[name]).items()}
        return Output(terms, latents={m: streams.latent(m) for m in self.forks if self.forks[m]}, pairs=pairs)

    def _views(self, streams: Streams) -> dict[str, Streams]:
        """The streams as each objective sees them, with the tokens that it hides."""
        masks = {name: objective.hides(streams.batch) for name, objective in self._each()}
        if self.training and not self._reported:
            self._reported = True
            for line in differently_hidden({name: each for name, each in masks.items() if each is not None}):
                rank_zero_info(f"objectives: {line}")
        return {name: streams.of(partial(_named, name), masks[name]) for name in masks}

    # evaluation -------------------------------------------------------------------------------------------------------

    def scorers(self, batch: Batch) -> dict[str, Scorer]:
        views = self._views(Streams(self, batch))
        return {_named(n, part): s for n, o in self._each() for part, s in o.scorers(views[n]).items()}

    def scores(self, batch: Batch) -> dict[str, Term]:
        """Scores of each objective, such as ``accuracy_match``."""
        return self._scores(Streams(self, batch))

    def _scores(self, streams: Streams) -> dict[str, Term]:
        views = self._views(streams)
        each = {name: objective.scores(views[name], streams.batch) for name, objective in self._each()}
        return {f"{key}_{name}": term for name, scores in each.items() for key, term in scores.items()}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Embeddings and scores, from one run of the towers."""
        streams = Streams(self, batch)
        z: dict[str, Tensor] = {m: streams.latent(m) for m in self.towers if m in batch.inputs}
        return {"z": z, "scores": self._scores(streams) if all(m in batch.inputs for m in self.reads) else {}}


def _named(objective: str, part: str) -> str:
    return f"{objective}/{part}" if part else objective
