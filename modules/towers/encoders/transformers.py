"""Encoders of transformers, including the towers of CLIP and SigLIP. Letters: B samples, T tokens, D width."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn

from descant.modules.core.errors import closest
from descant.modules.io.owners import SENTENCE, content
from descant.modules.io.pretrained import Place, object_of, read
from descant.modules.towers.base import Tokens
from descant.modules.towers.encoders.base import Encoder, Output, Part, one_token, require_part
from descant.modules.towers.image import all_real
from descant.modules.towers.transformers import from_place, width_of

#: Supported models with an image and a text tower -> whether linear maps project the towers' pooled outputs.
PAIRS = {"clip": True, "siglip": False, "siglip2": False}


class _TransformersEncoder(Encoder):
    """Encoder of transformers, or one tower of a CLIP or SigLIP; its embedding is the model's pooled output."""

    def __init__(self, place: Place, part: Part | None, output: Output, weights: bool) -> None:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

        super().__init__()
        kind = self.kind = str(content(place, "config.json").get("model_type"))
        if kind not in CONFIG_MAPPING:
            near = ", ".join(closest(kind, CONFIG_MAPPING.keys())) or "clip, siglip, dinov2"
            raise ValueError(f"{place.label}: transformers has no model_type {kind!r}; the nearest are {near}")
        config = read(place, AutoConfig)
        if kind not in PAIRS and hasattr(config, "vision_config"):
            raise ValueError(f"{place.label}: {kind}: of models of images and texts {' and '.join(PAIRS)} are read")
        embeds = output == "embedding"
        model: Any = from_place(place, pooler=embeds) if weights else AutoModel.from_config(config)
        self.projection: nn.Module = nn.Identity()
        if kind in PAIRS:
            require_part(place, kind, part)
            model, whole = getattr(model, f"{'vision' if part == 'image' else 'text'}_model"), model
            if PAIRS[kind] and embeds:
                self.projection = getattr(whole, f"{'visual' if part == 'image' else 'text'}_projection")
        elif model.config.is_encoder_decoder:
            model = model.get_encoder()
        inputs = {"pixel_values": "image", "input_ids": "text"}
        # in some releases, one tower of a pair has another name for its input
        reads = part if kind in PAIRS else inputs.get(model.main_input_name)
        if reads is None:
            raise ValueError(f"{place.label}: {kind} reads {model.main_input_name}, neither images nor texts")
        self.reads = reads  # type: ignore[assignment]
        if self.reads == "text":
            self._texts(place, model, embeds)
        # no key-value cache: nothing is generated
        self.options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
        self.model, self.embeds, self.width = model, embeds, width_of(model.config)
        if embeds and self.reads == "text" and kind.startswith("siglip"):
            self.width = int(model.config.projection_size)
        if isinstance(self.projection, nn.Linear):
            self.width = self.projection.out_features
        self._leave_unused()

    def _texts(self, place: Place, model: Any, embeds: bool) -> None:
        config = model.config
        if embeds and self.kind not in PAIRS:
            raise ValueError(
                f"{place.label}: {self.kind} has no embedding of texts of its own: output tokens and a pool, or a "
                f"folder of sentence-transformers ({SENTENCE})"
            )
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        self.most = getattr(config, "max_position_embeddings", None)
        self.learn_ids(place, int(getattr(config, "pad_token_id", None) or 0))
        if self.kind.startswith("siglip"):
            # it pools the last position and attends to padding, unless its tokenizer returns a mask
            tokenizer = object_of(place.folder / "tokenizer_config.json")
            self.sees_padding = "attention_mask" not in tokenizer.get("model_input_names", ())
            self.exactly = embeds
        elif self.kind == "clip" and embeds:
            # 2 in old configurations means the highest id of the text
            self.end = self.vocabulary - 1 if config.eos_token_id == 2 else int(config.eos_token_id)

    def _leave_unused(self) -> None:
        """Freeze or drop parts that the output does not use, so that they cost no gradient and no memory."""
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if name.endswith("mask_token"):
                parameter.requires_grad_(False)
        if self.embeds:
            return
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        if getattr(model, "head", None) is not None:  # SigLIP's
            model.head, model.use_head = nn.Identity(), False
        if self.kind.startswith("clip") and self.reads == "image":
            model.post_layernorm.requires_grad_(False)  # it normalises only the pooled token

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        if self.reads == "image":
            output = self.images(x)
        else:
            seen_BT = None if self.sees_padding or mask_BT is None else mask_BT.long()
            output = self.model(x, attention_mask=seen_BT, return_dict=True, **self.options)
        if self.embeds:
            if output.pooler_output is None:
                raise ValueError(f"{self.kind}: it pools nothing; output tokens")
            return one_token(self.projection(output.pooler_output))
        h_BTD = output.last_hidden_state
        if h_BTD.ndim == 4:  # the feature map of a conv net
            h_BTD = h_BTD.flatten(2).transpose(1, 2)
        return Tokens(h_BTD, all_real(h_BTD) if mask_BT is None else mask_BT)

    def images(self, x_BCSS: Tensor) -> Any:
        """Run the model on normalised pixels and return its own output."""
        return self.model(pixel_values=x_BCSS, return_dict=True)
