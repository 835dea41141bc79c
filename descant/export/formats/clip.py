"""CLIP: towers with CLIP's architecture, written as transformers' CLIPModel or as a folder of open_clip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.export.formats.base import ImageSteps, ModelFormat, Parts, tokenizer_of, unfrozen
from descant.export.formats.fast_tokenizers import fast
from descant.modules.io.saved import WEIGHTS
from descant.modules.losses import InfoNCE
from descant.modules.tokenizers.text import BOS, EOS, SPECIAL, Tokenizer
from descant.modules.towers import TransformersTower
from descant.modules.towers.heads import FirstPool, LastPool, Projection
from descant.recipes.base.objective_space import ObjectiveSpace
from descant.recipes.base.recipe import Recipe


@dataclass(frozen=True)
class Clip:
    """The parts of a recipe that is a CLIP.

    A text ends with the id ``eos``. For the sake of older models, transformers reads id 2, our default, as "the largest
    id of the text". So an export then ends texts with a new id after the last one here, with the same embedding.
    """

    recipe: ObjectiveSpace
    image: TransformersTower
    text: TransformersTower
    eos: int
    scale: Tensor
    heads: Any

    @property
    def vocabulary(self) -> int:
        """Return the number of ids that the text tower reads here."""
        return cast(int, self.text.vocabulary)

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Tokenizer | None = None) -> Clip:
        """Take the parts from a recipe. Raises ValueError with the part that no CLIP has."""
        if not isinstance(recipe, ObjectiveSpace) or not recipe.embeds_by_head or len(recipe.losses) != 1:
            raise ValueError(f"{type(recipe).__name__}: a CLIP is a Contrastive of images and texts, and no more")
        kinds = {"image": "clip_vision_model", "text": "clip_text_model"}
        if set(recipe.towers) != set(kinds):
            raise ValueError(f"towers: {', '.join(recipe.towers)}; a CLIP has image and text")
        towers = {name: unfrozen(recipe.towers[name]) for name in kinds}
        if getattr(towers["image"], "kind", None) == "siglip_vision_model":
            found = type(next(iter(recipe.losses.values()))).__name__
            raise ValueError(f"towers.image: siglip_vision_model; a SigLIP is trained by SigLIP's loss, not {found}")
        for name, kind in kinds.items():
            tower = towers[name]
            if not isinstance(tower, TransformersTower) or tower.kind != kind:
                made = getattr(tower, "kind", None) or type(tower).__name__
                raise ValueError(f"towers.{name}: {made}; a CLIP has a TransformersTower of model_type {kind}")
        for name, pool in (("image", FirstPool), ("text", LastPool)):
            if type(recipe.pools[name]) is not pool:
                found = type(recipe.pools[name]).__name__
                raise ValueError(f"pool of {name}: {found}; a CLIP has {pool.__name__}")
            head = cast(Projection, recipe.heads[name])
            if isinstance(head.norm, nn.LayerNorm) != (name == "image") or len(head.layers) > 1:
                raise ValueError(f"heads.{name}: a CLIP has a LayerNorm before one linear map for images alone (norm)")
        loss = next(iter(recipe.losses.values()))
        if not isinstance(loss, InfoNCE):
            raise ValueError(f"loss: {type(loss).__name__}; a CLIP is trained by InfoNCE, which has a scale alone")
        image, text = (cast(TransformersTower, towers[name]) for name in kinds)
        end = EOS if tokenizer is None else tokenizer.end[-1]
        eos = cast(int, text.vocabulary) if end == EOS else end
        return cls(recipe, image, text, eos, loss.log_scale, recipe.heads)

    @property
    def moved(self) -> bool:
        """Whether an export ends texts with another id than here."""
        return self.eos == self.vocabulary

    def state(self) -> dict[str, Tensor]:
        """Return the weights under the names of transformers' CLIPModel."""
        heads = self.heads
        state = {
            "logit_scale": self.scale,
            "visual_projection.weight": heads["image"].layers[-1].weight,
            "text_projection.weight": heads["text"].layers[-1].weight,
        }
        for side, tower in (("vision_model", self.image), ("text_model", self.text)):
            inner = tower.model.state_dict().items()
            state |= {f"{side}.{name.removeprefix('model.').removeprefix(f'{side}.')}": x for name, x in inner}
        for kind in ("weight", "bias"):
            state[f"vision_model.post_layernorm.{kind}"] = getattr(heads["image"].norm, kind)
        if self.moved:
            name = "text_model.embeddings.token_embedding.weight"
            state[name] = torch.cat([state[name], state[name][EOS : EOS + 1]])
        return {name: x.detach() for name, x in state.items() if not name.endswith("position_ids")}

    def config(self) -> Any:
        """Return transformers' CLIPConfig."""
        from transformers import CLIPConfig

        text, image = self.text.model.config.to_dict(), self.image.model.config.to_dict()
        text |= {"vocab_size": self.vocabulary + self.moved, "eos_token_id": self.eos}
        text |= {"bos_token_id": text["bos_token_id"] if not self.moved else BOS, "pad_token_id": self.text.pad}
        return CLIPConfig(text_config=text, vision_config=image, projection_dim=self.recipe.width)

    def probe(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return random pixels, and ids of texts of two lengths, as the recipe and as an export reads them."""
        side = self.image.model.config.image_size
        length = int(self.text.model.config.max_position_embeddings)
        ids_BT = torch.randint(SPECIAL, self.vocabulary, (2, length))
        ids_BT[:, 0], ids_BT[0, -1], ids_BT[1, length // 2 :] = BOS, EOS, self.text.pad
        ids_BT[1, length // 2] = EOS
        if not self.moved:
            ids_BT = torch.where(ids_BT == EOS, self.eos, ids_BT)
        return torch.randn(2, 3, side, side), ids_BT, torch.where(ids_BT == EOS, self.eos, ids_BT)

    def ours(self, x_BCHW: Tensor, ids_BT: Tensor) -> Tensor:
        h = {"image": self.recipe.features(x_BCHW, "image"), "text": self.recipe.features(ids_BT, "text")}
        return torch.cat([F.normalize(self.heads[m](h_BD), dim=1) for m, h_BD in h.items()])


class ClipFormat(ModelFormat):
    """CLIPModel of transformers, with its tokenizer and image processor."""

    def write(self, recipe: Recipe, parts: Parts, folder: Path) -> None:
        from transformers import CLIPModel

        tokenizer = tokenizer_of(parts)
        clip = Clip.of(recipe, tokenizer)
        model = CLIPModel(clip.config())
        model.load_state_dict(clip.state())
        model.save_pretrained(folder)
        _write_tokenizer(clip, tokenizer, folder)
        if (steps := ImageSteps.of(parts)) is not None:
            steps.processor().save_pretrained(folder)

    def outputs(self, recipe: Recipe, folder: Path) -> tuple[Tensor, Tensor]:
        from transformers import CLIPModel

        model = CLIPModel.from_pretrained(folder).eval()
        clip = Clip.of(recipe)
        clip = replace(clip, eos=model.config.text_config.eos_token_id)
        x_BCHW, ids_BT, their_BT = clip.probe()
        mask_BT = (their_BT != clip.text.pad).long()
        output = model(input_ids=their_BT, pixel_values=x_BCHW, attention_mask=mask_BT)
        return clip.ours(x_BCHW, ids_BT), torch.cat([output.image_embeds, output.text_embeds])

    def usage(self, folder: str) -> str:
        return (
            "from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel\n\n"
            f'model, tokenizer = CLIPModel.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")\n'
            f'processor = CLIPImageProcessor.from_pretrained("{folder}")'
        )


class OpenClipFormat(ModelFormat):
    """open_clip_config.json and weights of open_clip's own CLIP."""

    cleans = True

    def write(self, recipe: Recipe, parts: Parts, folder: Path) -> None:
        from safetensors.torch import save_file

        tokenizer = tokenizer_of(parts)
        clip = Clip.of(recipe, tokenizer)
        preprocess: dict[str, Any] = {"resize_mode": "squash", "interpolation": "bilinear"}
        if (steps := ImageSteps.of(parts)) is not None:
            preprocess = {"resize_mode": "shortest" if steps.square else "squash", "interpolation": steps.filter}
            preprocess |= {"size": steps.size, "mean": list(steps.mean), "std": list(steps.std)}
        content = {"model_cfg": open_clip_config(clip), "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        state = {name: x.contiguous().clone() for name, x in to_open_clip(clip.state()).items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        _write_tokenizer(clip, tokenizer, folder)

    def outputs(self, recipe: Recipe, folder: Path) -> tuple[Tensor, Tensor]:
        import open_clip

        model, *_ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        clip = Clip.of(recipe)
        clip = replace(clip, eos=config["model_cfg"]["text_cfg"]["eos_id"])
        x_BCHW, ids_BT, their_BT = clip.probe()
        model.eval()
        theirs = [model.encode_image(x_BCHW, normalize=True), model.encode_text(their_BT, normalize=True)]
        return clip.ours(x_BCHW, ids_BT), torch.cat(theirs)

    def list_cleaned_texts(self, parts: Parts, folder: Path, texts: Sequence[str]) -> list[tuple[str, str]]:
        import open_clip

        if (tokenizer := tokenizer_of(parts)) is None:
            return []
        clean = open_clip.get_tokenizer(f"local-dir:{folder}").clean_fn  # ftfy, HTML's entities, spaces
        pairs = ((text, clean(text)) for text in texts if text.strip())
        return [pair for pair in pairs if pair[0] != pair[1] and _row(tokenizer, pair[0]) != _row(tokenizer, pair[1])]

    def usage(self, folder: str) -> str:
        return (
            "import open_clip\n\n"
            f'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")\n'
            f'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")'
        )


def open_clip_config(clip: Clip) -> dict[str, Any]:
    """Return ``model_cfg`` of open_clip; raise ValueError for a setting that open_clip lacks."""
    image, text = clip.image.model.config, clip.text.model.config
    acts = {side.hidden_act for side in (image, text)}
    if not (acts <= {"gelu"} or acts <= {"quick_gelu"}):
        raise ValueError(
            f"hidden_act: {' and '.join(sorted(acts))}; open_clip has gelu, or quick_gelu, for both towers"
        )
    for name, side in (("image", image), ("text", text)):
        if side.layer_norm_eps != 1e-5:
            raise ValueError(f"towers.{name}: layer_norm_eps {side.layer_norm_eps:g}; open_clip has 1e-05")
    sides = [
        {
            "width": side.hidden_size,
            "layers": side.num_hidden_layers,
            "mlp_ratio": side.intermediate_size / side.hidden_size,
        }
        for side in (image, text)
    ]
    return {
        "embed_dim": clip.recipe.width,
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            **sides[0],
            "head_width": image.hidden_size // image.num_attention_heads,
            "image_size": image.image_size,
            "patch_size": image.patch_size,
        },
        "text_cfg": {
            **sides[1],
            "heads": text.num_attention_heads,
            "context_length": text.max_position_embeddings,
            "vocab_size": clip.vocabulary + clip.moved,
            "pool_type": "eos",
            "eos_id": clip.eos,
            "pad_id": clip.text.pad,
            "hf_tokenizer_name": ".",  # the folder itself
        },
    }


#: Prefixes of names in transformers' CLIPModel -> prefixes in open_clip's CLIP.
_PLACES = {
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
}
_INSIDE = {
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of transformers' CLIPModel under the names of open_clip's CLIP."""
    out = {"logit_scale": state["logit_scale"]}
    out["visual.proj"], out["text_projection"] = state["visual_projection.weight"].T, state["text_projection.weight"].T
    for name, x in state.items():
        place = next((place for place in _PLACES if name.startswith(place)), None)
        if place is None or ".k_proj." in name or ".v_proj." in name:
            continue
        named = _PLACES[place] + name.removeprefix(place)
        if ".q_proj." in name:  # one matrix for all three
            named = named.replace(".self_attn.q_proj.", ".attn.in_proj_")
            x = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        for old, new in _INSIDE.items():
            named = named.replace(old, new)
        out[named] = x
    return out


def _row(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.row([tokenizer.ids(text)]) if text else []


def _write_tokenizer(clip: Clip, tokenizer: Tokenizer | None, folder: Path) -> None:
    if tokenizer is not None:
        length = int(clip.text.model.config.max_position_embeddings)
        fast(tokenizer, clip.vocabulary, length, eos=clip.eos).save_pretrained(folder)
