"""Initial weights for visual experts of a language model that was trained on text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from descant.modules.adaptation.base import LM, innermost
from descant.modules.adaptation.inherit import Begin
from descant.modules.adaptation.stage_changes import Boundary, StageChange
from descant.modules.language.model import CausalLM
from descant.modules.moe.modality_linear import text_weight


def language_model(owner: str, recipe: nn.Module) -> CausalLM:
    """Return the recipe's language model; ValueError if it has none with visual experts."""
    recipe = innermost(recipe)
    lm = getattr(recipe, LM, None)
    if getattr(lm, "visual", None) is None:
        raise ValueError(f"{owner}: {type(recipe).__name__} has no visual experts; set lm.visual, as to VisualExperts")
    return cast(CausalLM, lm)


class CopyToVisualExperts(StageChange):
    """Copy the text weights to visual experts at the beginning of a stage: ``W^1 <- W^0`` (Mono-InternVL).

    This is for a run whose earlier stages trained the language model on text. Give this stage and those after it a
    ``train`` without the model's other weights, such as ``experts|towers|projector``: outputs for text then stay the
    same to the bit. Source: Luo 2024, arXiv 2410.08202.

    >>> from descant.modules.moe import VisualExperts
    >>> recipe = nn.Module()
    >>> recipe.lm = CausalLM(vocab=9, width=8, depth=1, heads=2, visual=VisualExperts())
    >>> _ = recipe.lm.layers[0].down.weight.data.fill_(2)
    >>> CopyToVisualExperts().apply(recipe, Boundary("captions", {}, seed=0))
    >>> recipe.lm.layers[0].down.experts[0].unique().tolist()
    [2.0]
    """

    def require(self, recipe: nn.Module) -> None:
        language_model(type(self).__name__, recipe)

    def apply(self, recipe: nn.Module, boundary: Boundary) -> None:
        language_model(type(self).__name__, recipe).copy_to_experts()


class BeginText(Begin):
    """Start from a run of a language model on text; visual experts are copies of its weights.

    Other parts that the run lacks, such as the tower and projector of images, stay as initialised. Use it for ``load``
    of a stage or in ``adapt``. Without visual experts in the recipe, it adds only the ability to see.

    Args:
        path, checkpoint: as in Begin.
    """

    def fresh(self, recipe: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        lacks = {name: x for name, x in recipe.state_dict().items() if name not in state}
        experts = {name: state[of] for name in lacks if (of := text_weight(name)) in state}
        return {name: x for name, x in lacks.items() if not name.startswith(f"{LM}.")} | experts
