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

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output, Scorer
from descant.modules.losses import ContrastiveLoss, InfoNCE, Intra
from descant.modules.losses.hard_negatives import Negatives
from descant.modules.tokenizers.text import Tokenizer, require_fit
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.modules.towers.triples import TripleEncoder
from descant.modules.training_setup.trainer import datamodule_of
from descant.recipes.base.pairs import modality_pairs, pair_scorers
from descant.recipes.base.shared_space import SharedSpace


class Contrastive(SharedSpace):
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
        self.pairs = modality_pairs(pairs, tuple(towers))
        self.losses = nn.ModuleDict({name: copy.deepcopy(loss or InfoNCE()) for name in self.pairs})
        self.intra, self.negatives, self.knowledge = intra, negatives, knowledge
        asked = {"negatives": negatives.pair if negatives else (), "intra": (intra.modality,) if intra else ()}
        for what, unknown in ((what, m) for what, names in asked.items() for m in names if m not in towers):
            raise ValueError(f"{what}: no tower {unknown!r}; the towers are {', '.join(towers)}")
        if negatives is not None and negatives.denominator:
            if negatives.name not in self.pairs:
                raise ValueError(f"negatives: no pair {negatives.name}; the pairs are {', '.join(self.pairs)}")
            if not isinstance(self.losses[negatives.name], InfoNCE):
                kind = type(self.losses[negatives.name]).__name__
                raise ValueError(f"negatives: denominator: {kind} has none; InfoNCE has")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        tokenizer = getattr(datamodule_of(self.trainer), "tokenizer", None)
        if isinstance(tokenizer, Tokenizer) and self.knowledge is not None:
            require_fit(tokenizer, self.knowledge, "knowledge")

    def together(self, h: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        z = super().together(h, batch)
        if self.knowledge is not None and "text" in z and "triples" in batch.inputs:
            triples_BK3W = batch.inputs["triples"].masked_fill(~batch.present["text"][:, None, None, None], 0)
            z["text"] = self.knowledge(z["text"], triples_BK3W)
        return z

    @property
    def forks(self) -> Mapping[str, tuple[str, ...]]:
        """Return the names of the terms that share each modality's embedding."""
        pairs = self.pairs if self.negatives is None else {**self.pairs, self.negatives.name: self.negatives.pair}
        return {m: tuple(name for name, pair in pairs.items() if m in pair) for m in self.towers}

    @property
    def met(self) -> tuple[str, ...]:
        """Return the modalities that some term needs; others are embedded only in evaluation."""
        needed = {m for pair in self.pairs.values() for m in pair} | {self.intra.modality if self.intra else ""}
        return tuple(m for m in self.towers if m in needed or (self.negatives and m in self.negatives.pair))

    @property
    def reads(self) -> tuple[str, ...]:
        """Return the names of the inputs that the terms need."""
        own = (*self.met, *(("triples",) if self.knowledge is not None else ()))
        if self.negatives is None:
            return own
        return (*own, *(m + NEGATIVE for m in own if m in (self.negatives.pair[1], "triples")))

    def scorers(self, batch: Batch) -> dict[str, Scorer]:
        return pair_scorers(self.pairs, self.losses, self.embed(batch))

    def forward(self, batch: Batch) -> Output:
        missing = [m for m in self.reads if m not in batch.inputs]
        if missing:
            raise ValueError(f"the data has no modality {missing[0]!r}, only {', '.join(batch.inputs)}")
        h = {m: self.present_features(batch, m) for m in self.met}
        z = self.together(h, batch)
        copies = {m: self.hooks.fork(z_BD, self.forks[m]) for m, z_BD in z.items()}
        terms, extra = {}, dict[str, tuple[Tensor, Tensor]]()
        if self.negatives is not None:
            z_neg_BD = self.embed(batch.negatives())[self.negatives.pair[1]]  # same towers, own triples
            has_B = batch.both(*self.negatives.given)
            if self.negatives.denominator:
                extra[self.negatives.name] = self.negatives.sham(z_neg_BD, batch.rng_seed, has_B), has_B
        for name, (a, b) in self.pairs.items():
            valid_B, (a_BD, b_BD) = batch.both(a, b), (copies[a][name], copies[b][name])
            value_B = self.losses[name](a_BD, b_BD, batch.content_id, valid_B, *extra.get(name, ()))
            terms[name] = Term(value_B, valid=valid_B, given=(a, b))
        if self.intra is not None:
            m = self.intra.modality
            if f"{m}@2" not in batch.inputs:
                raise ValueError(f"the intra-modal term needs a second view of {m!r}: data.views {{{m}: 2}}")
            h_2_BD = self.present_features(batch, m, view="@2")
            value_B = self.intra(h[m], h_2_BD, batch.content_id, batch.rng_seed, batch.present[m])
            terms[f"{m}-{m}"] = Term(value_B, valid=batch.present[m], given=(m,))
        if self.negatives is not None and not self.negatives.denominator:
            name, (a, b) = self.negatives.name, self.negatives.pair
            value_B = self.negatives(copies[a][name], copies[b][name], z_neg_BD, batch.rng_seed, has_B)
            terms[name] = Term(value_B, valid=has_B, given=self.negatives.given)
        return Output(terms, latents=z, pairs=pair_scorers(self.pairs, self.losses, z))
