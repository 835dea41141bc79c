"""Encoders of timm."""

from __future__ import annotations

from torch import Tensor, nn

from descant.modules.core.errors import one_line
from descant.modules.io.owners import content
from descant.modules.io.pretrained import Place
from descant.modules.towers.base import Tokens
from descant.modules.towers.encoders.base import Encoder, Output, one_token, weights_of
from descant.modules.towers.timm import TimmTower


class _TimmEncoder(Encoder):
    """timm model without its classifier; its embedding is the model's pooled output, as with ``num_classes=0``."""

    def __init__(self, place: Place, output: Output, weights: bool) -> None:
        super().__init__()
        config = content(place, "config.json")
        name, options = str(config["architecture"]), dict(config.get("model_args") or {})
        options.pop("num_classes", None)
        file = weights_of(place, "model.safetensors", "pytorch_model.bin") if weights else None
        try:
            tower = TimmTower(name, weights=file, options=options)
        except (ValueError, AttributeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{place.label}: {one_line(error)}") from None
        self.kind, self.tower, self.embeds = name, tower, output == "embedding"
        self.width = int(getattr(tower.model, "head_hidden_size", tower.width)) if self.embeds else tower.width
        if self.embeds:
            tower.requires_grad_(True)

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        return one_token(self.tower.model(x)) if self.embeds else self.tower(x)

    def blocks(self) -> list[nn.Module]:
        return self.tower.blocks()
