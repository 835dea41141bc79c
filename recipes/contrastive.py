"""CLIP-style contrastive pre-training of any number of modalities.

Claim: two (or more) towers that are trained to embed matching inputs close together can name images without having been
trained on labels.

    z_m = normalise(head_m(pool(tower_m(x_m))))          for every modality m that is present
    z_text = normalise(z_text + 0.2 knowledge(triples))  of a scene graph, where asked for (Structure-CLIP)
    loss = sum over pairs (a, b): pair loss(z_a, z_b)    InfoNCE, SigLIP or a hinge, with in-batch negatives
         + the intra-modal term of two views             SLIP, where asked for
         + the term of hard negatives of the data        Structure-CLIP, where asked for; or they are among the
                                                         negatives of the pair loss (SAIL-Embedding)

What differs from CLIP (Radford 2021): any set of pairs is possible, each with its own scale. Samples of equal content
are not each other's negatives. An absent modality is left out exactly, as row and as negative, and costs no compute.
Source: arXiv 2103.00020 (CLIP), 2303.15343 (SigLIP), 2112.12750 (SLIP), 2305.06152 (Structure-CLIP), 2510.12709
(SAIL-Embedding).
Letters: B samples, D width, K triples, W tokens of a triple's element.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from torch import Tensor

from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.core.output import Output
from descant.modules.losses import ContrastiveLoss, InfoNCE
from descant.modules.objectives.base import TaskObjective
from descant.modules.objectives.contrast import Contrast
from descant.modules.objectives.embeddings import require_inputs
from descant.modules.objectives.hard_negatives import Negatives
from descant.modules.objectives.intra import Intra
from descant.modules.tokenizers.text import Tokenizer, require_fit
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.modules.towers.triples import TripleEncoder
from descant.modules.training_setup.trainer import datamodule_of
from descant.recipes.base.objective_space import ObjectiveSpace


class Contrastive(ObjectiveSpace):
    """Contrast every pair of modalities in one embedding space (CLIP, SigLIP, SLIP).

    Args:
        towers: one tower per modality.
        width: width of the shared embedding space.
        pairs: pairs of modalities to contrast, such as [[image, text]]; by default all pairs.
        loss: loss of one pair; every pair gets its own copy (its own scale).
        pool: pools tokens to one vector, copied for each modality; or one pool per modality.
        intra: a term between two views of one modality, or none.
        negatives: how the data's hard negatives of one modality (``text_neg``) enter: as a separate term, in the loss
            of the pair, or not at all.
        knowledge: encoder of scene-graph triples, added to texts and to their hard negatives alike, or none.
    """

    in_batch_negatives = True

    def __init__(
        self,
        towers: Towers,
        width: int = 128,
        pairs: list[list[str]] | None = None,
        loss: ContrastiveLoss | None = None,
        pool: Pool | Pools | None = None,
        intra: Intra | None = None,
        negatives: Negatives | None = None,
        knowledge: TripleEncoder | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(towers, width, pool, **kwargs)
        asked = {"negatives": negatives.pair if negatives else (), "intra": (intra.modality,) if intra else ()}
        for what, unknown in ((what, m) for what, names in asked.items() for m in names if m not in towers):
            raise ValueError(f"{what}: no tower {unknown!r}; the towers are {', '.join(towers)}")
        pair_of, loss = modality_pairs(pairs, tuple(towers)), loss or InfoNCE()
        inside = negatives if negatives is not None and negatives.denominator else None
        if inside is not None:
            inside.require_in_denominator_of(list(pair_of.values()), loss)
        objectives: dict[str, TaskObjective] = {
            name: Contrast([list(pair)], loss, inside if inside and inside.pair == pair else None)
            for name, pair in pair_of.items()
        }
        if intra is not None:
            objectives[f"{intra.modality}-{intra.modality}"] = intra
        if negatives is not None and inside is None:
            objectives[f"{'-'.join(negatives.pair)}/negative"] = negatives
        self.build_objectives(objectives)
        self.knowledge = knowledge

    def setup(self, stage: str) -> None:
        super().setup(stage)
        tokenizer = getattr(datamodule_of(self.trainer), "tokenizer", None)
        if isinstance(tokenizer, Tokenizer) and self.knowledge is not None:
            require_fit(tokenizer, self.knowledge, "knowledge")

    @property
    def embeds_by_head(self) -> bool:
        return self.knowledge is None and super().embeds_by_head

    @property
    def required_inputs(self) -> tuple[str, ...]:
        names = super().required_inputs
        with_negatives = any(name.endswith(NEGATIVE) for name in names)
        triples = ("triples", *(["triples" + NEGATIVE] if with_negatives else ())) if self.knowledge else ()
        return (*names, *triples)

    def latent(self, h_BD: Tensor, modality: str, batch: Batch) -> Tensor:
        z_BD = super().latent(h_BD, modality, batch)
        if self.knowledge is None or modality != "text" or "triples" not in batch.inputs:
            return z_BD
        triples_BK3W = batch.inputs["triples"].masked_fill(~batch.present["text"][:, None, None, None], 0)
        return self.knowledge(z_BD, triples_BK3W)

    def forward(self, batch: Batch) -> Output:
        require_inputs(batch, *self.required_inputs)
        space = self.streams(batch)
        latents = {m: space.latent(m) for m in self.required_modalities}
        views = self.views(space)
        return Output(self.objective_terms(views, batch), latents, pairs=self.match_scorers(views))


def modality_pairs(pairs: list[list[str]] | None, modalities: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Return pairs by name; all pairs if none are given. Raise ValueError for a pair of unknown modalities."""
    if len(modalities) < 2:
        raise ValueError(f"towers: contrast needs two modalities, got {', '.join(modalities) or 'none'}")
    for pair in pairs or []:
        unknown = [m for m in pair if m not in modalities]
        if unknown or not len(set(pair)) == len(pair) == 2:
            fault = f"no tower {unknown[0]!r}" if unknown else "not two modalities"
            raise ValueError(f"pairs: {pair}: {fault}; the towers are {', '.join(modalities)}")
    chosen = [(a, b) for a, b in pairs] if pairs else list(combinations(modalities, 2))
    return {f"{a}-{b}": (a, b) for a, b in chosen}
