"""Encoders of models that take images as patches in their own layout: SigLIP 2 NaFlex, and Qwen-VL's vision tower.

Images are squares of one size here. Letters: B samples, C channels, S side, T tokens, D width, p side of a patch, g
patches per side, m patches per side that are merged into one token.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from descant.modules.core.errors import one_line
from descant.modules.io.owners import content
from descant.modules.io.pretrained import Place, inside, json_of, read
from descant.modules.towers.base import Tokens
from descant.modules.towers.encoders.base import Encoder, Output, Part, weights_of
from descant.modules.towers.encoders.transformers import _TransformersEncoder
from descant.modules.towers.image import all_real
from descant.modules.towers.timm import load_exactly

#: model_type -> its module in transformers and the class of its vision tower.
QWEN = {
    "qwen2_vl": ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel"),
}
QWEN |= {f"{kind}_vision": made for kind, made in QWEN.items()}


class _NaFlexEncoder(_TransformersEncoder):
    """SigLIP 2 that reads images as patches with a mask and a shape (``Siglip2VisionModel``), or its text tower.

    Each patch is flattened row by row, colours last, as in the owner's processor.
    """

    def __init__(self, place: Place, part: Part | None, output: Output, weights: bool) -> None:
        super().__init__(place, part, output, weights)
        self.multiple = int(self.model.config.patch_size) if self.reads == "image" else 1

    def images(self, x_BCSS: Tensor) -> Any:
        B, C, S, _ = x_BCSS.shape
        p = self.multiple
        g = S // p
        x = x_BCSS.view(B, C, g, p, g, p).permute(0, 2, 4, 3, 5, 1).reshape(B, g * g, p * p * C)
        shape_B2 = torch.full((B, 2), g, device=x.device)
        real_BT = torch.ones(B, g * g, dtype=torch.long, device=x.device)
        return self.model(pixel_values=x, pixel_attention_mask=real_BT, spatial_shapes=shape_B2, return_dict=True)


class _QwenEncoder(Encoder):
    """Vision tower of Qwen2-VL or Qwen2.5-VL: its merged tokens ``[B, T, D]``, which their language model reads.

    ``T = (S / p / m)^2``, row by row of the image. From a folder of the whole model, only the tensors of the vision
    tower are read. A patch holds the image twice (``temporal_patch_size``), as in the owner's processor.
    """

    def __init__(self, place: Place, kind: str, output: Output, weights: bool) -> None:
        from importlib import import_module

        from transformers import AutoConfig

        super().__init__()
        self.kind = kind
        if output == "embedding":
            raise ValueError(f"{place.label}: {kind} has no embedding of an image; output: tokens, and a pool")
        if kind.endswith("_vision"):
            options = {key: value for key, value in content(place, "config.json").items() if key != "model_type"}
            config: Any = AutoConfig.for_model(kind, **options)
        else:
            config = read(place, AutoConfig).vision_config
        at, name = QWEN[kind]
        made: Any = getattr(import_module(f"transformers.models.{at}.modeling_{at}"), name)
        try:
            self.model = made._from_config(config)
        except Exception as error:  # models raise any type of error
            raise ValueError(f"{place.label}: {kind} cannot be built ({one_line(error, 200)})") from None
        if weights:
            _load_vision(self.model, place, kind.endswith("_vision"))
        self.width = int(getattr(config, "out_hidden_size", config.hidden_size))
        self.patch, self.merged = int(config.patch_size), int(config.spatial_merge_size)
        self.frames, self.multiple = int(config.temporal_patch_size), int(config.patch_size * config.spatial_merge_size)

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        B, C, S, _ = x.shape
        p, m = self.patch, self.merged
        g = S // p
        x = x.view(B, C, g // m, m, p, g // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
        x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, self.frames, -1, -1).reshape(B * g * g, -1)
        shape_B3 = torch.tensor([[1, g, g]], device=x.device).expand(B, 3)
        h_BTD = self.model(x, grid_thw=shape_B3, return_dict=True).pooler_output.view(B, (g // m) ** 2, self.width)
        return Tokens(h_BTD, all_real(h_BTD))


def _load_vision(model: Any, place: Place, alone: bool) -> None:
    """Load the weights of a vision tower. ``alone``: the folder holds only this tower, not the whole model."""
    index = json_of(place.folder / "model.safetensors.index.json")
    names = sorted({str(name) for name in index["weight_map"].values()}) if isinstance(index, dict) else []
    files = [inside(place, name) for name in names] or [weights_of(place, "model.safetensors")]
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                keys = list(opened.keys())
                whole = any("visual." in key for key in keys) or any(
                    key.startswith(("model.", "lm_head")) for key in keys
                )
                for key in keys:
                    before, found, name = key.partition("visual.")
                    if found and before in ("", "model."):
                        state[name] = opened.get_tensor(key).float()
                    elif not whole:
                        state[key] = opened.get_tensor(key).float()
        except Exception as error:  # safetensors raises its own types of error
            raise ValueError(f"{file}: cannot be read ({one_line(error, 200)})") from None
    load_exactly(model, state, files[0], "a vision tower")
