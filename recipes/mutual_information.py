"""One stage for self-supervised, weakly supervised and supervised pre-training: predict each target's representation.

Claim: one stage with all targets serves every probe as well as several stages with one kind of target each.

    x = patches of crop(a), those of crop(b) where a is hidden         two images in every input
    h = tower(x),   z = normalise(head(pool(h)))
    same:           decoder(h where a, hidden places of a's crop)      -> teacher(crop(a)) there
    view:           decoder(h where b, places of b's other crop)       -> teacher(other crop of b)
    text, classes:  z -> texts and classes of a and b                  shares of the target: m and 1 - m, as of patches

Places count from the top left of the visible crop and may lie outside it. The teacher is the average of the tower.
Source: M3I (Su 2022, arXiv 2211.09807); no code is released. Our reading: m weights the targets, patches are mixed as
in MixMIM, the decoder does not attend to the other image, and targets are normalised as in data2vec (2202.03555).
Letters: B samples, C classes, Q places, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch, append_axes
from descant.modules.core.dtype import promote
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.sham import take_rows
from descant.modules.distill.distill import Distill
from descant.modules.fusion.classifiers import class_labels
from descant.modules.fusion.cross_encoder import FusionLayers
from descant.modules.losses.information import Boltzmann, Likelihood, mixed_pairs, one_hot, softmax_loss
from descant.modules.masking.patch_mix import MixedImages, PatchMix
from descant.modules.masking.view_decoder import ViewDecoder
from descant.modules.objectives.streams import Streams
from descant.modules.towers import Tokens, Towers
from descant.modules.towers.heads import Projection
from descant.modules.transforms.crops import CropBox
from descant.recipes.base.distillation import TowerAverage, own_teacher
from descant.recipes.base.shared_space import SharedSpace


class MutualInformation(SharedSpace):
    """Pre-train an image tower on views, texts and classes in one stage, by mutual information (M3I).

    Args:
        towers: ``image``, whose tokens are a grid of patches, and ``text`` if its term is given.
        patch_mix: mixes two images into one input; its patches are the tower's tokens.
        decoder: decoder of image targets.
        same, view: likelihood of features of the same view, and of another view (``data.views {image: 2}``).
        text: likelihood of the text among those of the batch.
        target, classes: name of a target in the data and its number C of classes to predict, if any.
        scale: smallest and largest area of crops.
        momentum: momentum of the teacher.
    """

    in_batch_negatives = True  # patch_mix mixes samples of the batch, whatever the terms

    def __init__(
        self,
        towers: Towers,
        patch_mix: PatchMix,
        decoder: ViewDecoder,
        same: Likelihood | None = None,
        view: Likelihood | None = None,
        text: Boltzmann | None = None,
        target: str = "group",
        classes: int | None = None,
        width: int = 64,
        scale: tuple[float, float] = (0.4, 1.0),
        momentum: float = 0.99,
        **kwargs: Any,
    ) -> None:
        if not (same or view or text or classes):
            raise ValueError("no term: give some of same, view, text and classes")
        if text is not None and "text" not in towers:
            raise ValueError("text: no tower of that name")
        distill = own_teacher("MutualInformation", TowerAverage("image", momentum), kwargs)
        super().__init__(towers, width, **kwargs, distill=distill)
        self.patch_mix, self.same, self.view, self.text, self.scale = patch_mix, same, view, text, scale
        self.decoder = decoder.build(towers.width("image"), patch_mix.patches) if same or view else None
        self.target = target
        self.label_head = Projection(towers.width("image"), classes) if classes else None
        # parts that no term reads are not trained, so that no rank waits for their gradients
        for m in (m for m in towers if m != "image" and (m != "text" or text is None)):
            nn.ModuleList(part[m] for part in (self.towers, self.pools, self.heads)).requires_grad_(False)
        self.heads["image"].requires_grad_(text is not None)
        self.pools["image"].requires_grad_(text is not None or bool(classes))
        self.fusion: FusionLayers | None = None  # Streams reads it and the next two
        self.mask_tokens, self.forks = nn.ParameterDict(), dict[str, tuple[str, ...]]()

    def forward(self, batch: Batch) -> Output:
        valid_B, draw_B, x = batch.present["image"], batch.rng_seed, self._images(batch, "image")
        crop = CropBox.draw(draw_B, "crop/1", self.scale, x)
        seen = crop.of(x, x.shape[-1])
        mixed = self.patch_mix(seen, draw_B, valid_B)
        streams, terms = (
            Streams(self, replace(batch, inputs={**batch.inputs, "image": mixed.x_BCHH})),
            dict[str, Term](),
        )
        tokens, h_BTD = streams.tokens("image"), streams.tokens("image").h_BTD
        if h_BTD.shape[1] != self.patch_mix.patches**2:
            raise ValueError(f"patch_mix: {self.patch_mix.patches} patches a side, and {h_BTD.shape[1]} tokens")
        if self.same is not None and self.decoder is not None:
            of_T = crop.places(crop, self.patch_mix.patches), self._teacher_target(seen)
            place_BQ2, target_BQD = (x.gather(1, mixed.hidden_BQ[..., None].expand(-1, -1, x.shape[2])) for x in of_T)
            value_B = self.same(promote(self.decoder(Tokens(h_BTD, mixed.first_BT), place_BQ2)), target_BQD)
            terms["same"] = Term(value_B, valid=valid_B, given=("image",))
        if self.view is not None and self.decoder is not None:
            other_x = self._images(batch, "image@2")
            other = CropBox.draw(draw_B, "crop/2", self.scale, other_x)
            place_BT2 = other.places(crop, self.patch_mix.patches)
            x_2, place_BT2 = (take_rows(x_B, mixed.source_B) for x_B in (other.of(other_x, x.shape[-1]), place_BT2))
            value_B = self.view(
                promote(self.decoder(Tokens(h_BTD, ~mixed.first_BT), place_BT2)), self._teacher_target(x_2)
            )
            terms["view"] = Term(value_B, valid=valid_B, given=("image",))
        if self.text is not None:
            z_BD, t_BD = streams.latent("image") * self.text.scale(), streams.latent("text")
            paired_B = batch.both("image", "text")
            value_B = mixed_pairs(z_BD, t_BD, batch.content_id, paired_B, mixed.source_B, mixed.share)
            terms["text"] = Term(value_B, valid=paired_B, given=("image", "text"))
        if self.label_head is not None:
            terms["classes"] = self._classes(self.pools["image"](tokens), batch, mixed)
        return Output(terms)

    def _images(self, batch: Batch, name: str) -> Tensor:
        """Return the images, with zeros for absent samples, whose stored values may be nan and spoil gradients."""
        if name not in batch.inputs:
            raise ValueError(f"the data has no {name!r}" + (": data.views {image: 2}" if "@" in name else ""))
        x = batch.inputs[name]
        return torch.where(append_axes(batch.present["image"], x), x, torch.zeros_like(x))

    @torch.no_grad()
    def _teacher_target(self, x: Tensor) -> Tensor:
        cast(Distill, self.active_distillation).prepare(self)
        h_BTD = promote(cast(Distill, self.active_distillation).network.get_submodule("towers.image")(x).h_BTD)
        return F.layer_norm(h_BTD, h_BTD.shape[-1:])

    def _classes(self, h_BD: Tensor, batch: Batch, mixed: MixedImages) -> Term:
        """Compute the class term of both images; an image without a label adds zero."""
        logit_BC = promote(cast(Projection, self.label_head)(h_BD))
        label_B = class_labels(batch.targets, self.target, logit_BC.shape[1])
        both = (mixed.share, label_B), (1 - mixed.share, take_rows(label_B, mixed.source_B))
        share_BC = sum(m * one_hot(y_B, logit_BC.shape[1], logit_BC.dtype) for m, y_B in both)
        return Term(softmax_loss(logit_BC, cast(Tensor, share_BC)), valid=batch.present["image"], given=("image",))
