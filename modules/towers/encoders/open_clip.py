"""Encoders of open_clip. Letters: B samples, T tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from descant.modules.core.errors import closest, one_line
from descant.modules.io.owners import OPEN_CLIP, content, require_open_clip
from descant.modules.io.pretrained import Place
from descant.modules.towers.base import Tokens
from descant.modules.towers.encoders.base import Encoder, Output, Part, one_token, require_part, weights_of
from descant.modules.towers.timm import load_exactly, read_weights


class _OpenClipEncoder(Encoder):
    """Image or text tower of an open_clip CLIP model, with its projection."""

    def __init__(self, place: Place, part: Part | None, output: Output, weights: bool) -> None:
        super().__init__()
        require_open_clip(place)
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
        from open_clip.model import convert_to_custom_text_state_dict as custom

        self.kind = "open_clip"
        require_part(place, "open_clip", part)
        if output == "tokens":
            raise ValueError(f"{place.label}: of open_clip's models embeddings are read; output: embedding")
        config = content(place, OPEN_CLIP).get("model_cfg")
        if not isinstance(config, dict) or "multimodal_cfg" in config:
            raise ValueError(f"{place.label}: model_cfg of {OPEN_CLIP} is of no CLIP of two towers, which are read")
        side, build, cfg = (
            ("vision_cfg", _build_vision_tower, CLIPVisionCfg)
            if part == "image"
            else ("text_cfg", _build_text_tower, CLIPTextCfg)
        )
        settings = dict(config.get(side) or {})
        _require_here(place, side, settings)
        settings |= {"output_tokens": False} | ({"timm_model_pretrained": False} if part == "image" else {})
        try:
            self.width = int(config["embed_dim"])
            known = cfg(**settings)
            self.model = build(self.width, known, bool(config.get("quick_gelu", False)))
        except (TypeError, KeyError, ValueError, AssertionError, RuntimeError) as error:
            raise ValueError(f"{place.label}: {side} of {OPEN_CLIP}: {one_line(error, 200)}") from None
        if weights:
            file = weights_of(place, "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
            state = read_weights(file)
            if "positional_embedding" in state:
                state = custom(state)
            prefix = "visual." if part == "image" else "text."
            mine = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            load_exactly(self.model, mine, file, f"{side} of {OPEN_CLIP}")
        self.reads = "image" if part == "image" else "text"
        if part == "text":
            self.vocabulary, self.most = int(known.vocab_size), int(known.context_length)
            self.learn_ids(place, int(known.pad_id))
            self.exactly = known.pool_type == "last" or bool(known.no_causal_mask)
            self.end = {"argmax": self.vocabulary - 1, "eos": int(known.eos_id)}.get(known.pool_type)

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        return one_token(self.model(x))


def _require_here(place: Place, side: str, settings: dict[str, Any]) -> None:
    """Refuse parts that open_clip would download from a hub by name."""
    import timm

    if settings.get("hf_model_name"):
        raise ValueError(f"{place.label}: {side}.hf_model_name {settings['hf_model_name']}: a model of a hub, not read")
    name = settings.get("timm_model_name")
    if name and not timm.is_model(str(name).split(".")[0]):
        near = ", ".join(closest(str(name), timm.list_models())) or "none"
        raise ValueError(
            f"{place.label}: {side}.timm_model_name {name}: timm has no such model; the nearest are {near}"
        )
