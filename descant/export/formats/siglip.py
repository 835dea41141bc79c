"""SigLIP: towers with its architecture, written as transformers' SiglipModel.

Images are pooled by attention followed by an MLP, without a projection. Texts are pooled at the last position of their
row, which may be padding, and projected. Source: transformers' models/siglip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.export.formats.base import ImageSteps, ModelFormat, Parts, tokenizer_of, unfrozen
from descant.export.formats.fast_tokenizers import fast
from descant.modules.losses import SigLIP
from descant.modules.tokenizers.text import EOS, PAD, PretrainedTokenizer, Tokenizer
from descant.modules.towers import PatchTower, PretrainedTower, TextTower, TransformersTower
from descant.modules.towers.heads import LastPool, MAPPool, Projection
from descant.recipes.base.objective_space import ObjectiveSpace
from descant.recipes.base.recipe import Recipe

_ACTIVATIONS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}


@dataclass(frozen=True)
class Half:
    """The configuration and weights of one of the two models inside SiglipModel."""

    config: dict[str, Any]
    state: dict[str, Tensor]


def blocks_as_siglip(layers: nn.ModuleList) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert our transformer blocks to SigLIP's, which compute the same."""
    first: Any = layers[0]
    config = {
        "intermediate_size": first.mlp[0].out_features,
        "num_hidden_layers": len(layers),
        "num_attention_heads": first.heads,
        "hidden_act": "gelu",
        "layer_norm_eps": first.norm_1.eps,
    }
    names = {"norm_1": "layer_norm1", "norm_2": "layer_norm2", "out": "self_attn.out_proj"}
    names |= {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    state: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        at = f"encoder.layers.{i}"
        for ours, theirs in names.items():
            state |= layer.get_submodule(ours).state_dict(prefix=f"{at}.{theirs}.")
        for kind, x in cast(nn.Linear, layer.qkv).state_dict().items():
            state |= {f"{at}.self_attn.{p}_proj.{kind}": part for p, part in zip("qkv", x.chunk(3), strict=True)}
    return config, state


def patches_as_siglip(tower: PatchTower) -> Half:
    """Convert a PatchTower to a SiglipVisionModel without its pooling head."""
    config, state = blocks_as_siglip(tower.layers)
    config |= {
        "model_type": "siglip_vision_model",
        "image_size": tower.shape[1],
        "num_channels": tower.shape[0],
        "patch_size": tower.patches.kernel_size[0],
        "hidden_size": tower.width,
        "vision_use_head": False,
    }
    state["embeddings.position_embedding.weight"] = tower.positions_TD.detach()
    state |= tower.patches.state_dict(prefix="embeddings.patch_embedding.")
    state |= tower.norm.state_dict(prefix="post_layernorm.")
    return Half(config, state)


def _vision(tower: nn.Module, pool: nn.Module) -> Half:
    """Convert the image half; raise ValueError for a tower or a pool of another architecture."""
    if isinstance(tower, PretrainedTower) and tower.encoder.kind == "siglip" and tower.projected:
        return _from_pretrained(tower)
    kind = getattr(tower, "kind", None) or type(tower).__name__
    if type(tower) is PatchTower:
        half = patches_as_siglip(tower)
    elif isinstance(tower, TransformersTower) and kind == "siglip_vision_model":
        inner = {name.removeprefix("vision_model."): x for name, x in tower.model.state_dict().items()}
        inner = {name: x for name, x in inner.items() if not name.startswith("head.")}
        half = Half(tower.model.config.to_dict(), inner)
    else:
        raise ValueError(
            f"towers.image: {kind}; a SigLIP has a PatchTower, or a TransformersTower of model_type siglip_vision_model"
        )
    if type(pool) is not MAPPool:
        raise ValueError(f"pool of image: {type(pool).__name__}; a SigLIP has MAPPool, with its tower's heads")
    there = {
        "heads": (pool.heads, half.config["num_attention_heads"]),
        "mlp_ratio": (pool.mlp[0].out_features, half.config["intermediate_size"]),
        "eps": (pool.norm.eps, half.config["layer_norm_eps"]),
        "tanh": (cast(nn.GELU, pool.mlp[1]).approximate, _ACTIVATIONS.get(half.config["hidden_act"])),
    }
    for name, (own, of_tower) in there.items():
        if own != of_tower:
            raise ValueError(f"pool of image: {name}: MAPPool has {own}, and its tower {of_tower}; a SigLIP has one")
    weight_3DD, bias_3D = (torch.cat([getattr(pool.q, x), getattr(pool.kv, x)]) for x in ("weight", "bias"))
    state = {"head.probe": pool.probe_1D[None]}
    state |= {"head.attention.in_proj_weight": weight_3DD, "head.attention.in_proj_bias": bias_3D}
    parts = {"attention.out_proj": pool.out, "layernorm": pool.norm, "mlp.fc1": pool.mlp[0], "mlp.fc2": pool.mlp[2]}
    for name, part in parts.items():
        state |= part.state_dict(prefix=f"head.{name}.")
    return Half({**half.config, "vision_use_head": True}, {**half.state, **state})


def _text(tower: nn.Module, pool: nn.Module, head: nn.Module) -> Half:
    """Convert the text half; raise ValueError for a tower, a pool or a head of another architecture."""
    if isinstance(tower, PretrainedTower) and tower.encoder.kind == "siglip" and tower.projected:
        return _from_pretrained(tower)
    if type(tower) is not TextTower or tower.causal or not tower.attend_padding:
        raise ValueError(
            f"towers.text: {getattr(tower, 'kind', None) or type(tower).__name__}; a SigLIP has a TextTower with "
            "attend_padding: true, and not causal"
        )
    if type(pool) is not LastPool:
        raise ValueError(f"pool of text: {type(pool).__name__}; a SigLIP has LastPool")
    if not isinstance(head, Projection) or len(head.layers) > 1 or not isinstance(head.norm, nn.Identity):
        raise ValueError("heads.text: a SigLIP has one linear map of texts: norm: {text: false}")
    linear = cast(nn.Linear, head.layers[0])
    config, state = blocks_as_siglip(tower.layers)
    config |= {"hidden_size": tower.width, "vocab_size": tower.vocabulary, "max_position_embeddings": tower.length}
    config |= {"projection_size": linear.out_features, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
    state["embeddings.position_embedding.weight"] = tower.positions_TD.detach()
    state |= tower.embedding.state_dict(prefix="embeddings.token_embedding.")
    state |= tower.norm.state_dict(prefix="final_layer_norm.")
    state |= {"head.weight": linear.weight, "head.bias": linear.weight.new_zeros(linear.out_features)}
    return Half(config, state)


def _from_pretrained(tower: PretrainedTower) -> Half:
    model: Any = tower.encoder.model
    sides = ("vision_model.", "text_model.")
    state = {name.removeprefix(sides[0]).removeprefix(sides[1]): x for name, x in model.state_dict().items()}
    return Half(model.config.to_dict(), state)


@dataclass(frozen=True)
class Siglip:
    """The parts of a recipe that is a SigLIP."""

    recipe: ObjectiveSpace
    image: Half
    text: Half
    loss: SigLIP

    @classmethod
    def of(cls, recipe: Recipe) -> Siglip:
        """Take the parts from a recipe. Raises ValueError with the part that no SigLIP has."""
        if not isinstance(recipe, ObjectiveSpace) or not recipe.embeds_by_head or len(recipe.losses) != 1:
            raise ValueError(f"{type(recipe).__name__}: a SigLIP is a Contrastive of images and texts, and no more")
        if set(recipe.towers) != {"image", "text"}:
            raise ValueError(f"towers: {', '.join(recipe.towers)}; a SigLIP has image and text")
        loss = next(iter(recipe.losses.values()))
        if type(loss) is not SigLIP:
            raise ValueError(f"loss: {type(loss).__name__}; a SigLIP is trained by SigLIP, a scale and a bias")
        towers = {name: unfrozen(recipe.towers[name]) for name in ("image", "text")}
        image = _vision(towers["image"], recipe.pools["image"])
        if not isinstance(recipe.heads["image"], nn.Identity):
            raise ValueError("heads.image: Projection; a SigLIP has none: project: {image: false}")
        return cls(recipe, image, _text(towers["text"], recipe.pools["text"], recipe.heads["text"]), loss)

    def config(self) -> Any:
        """Return transformers' SiglipConfig."""
        from transformers import SiglipConfig

        return SiglipConfig(text_config=self.text.config, vision_config=self.image.config)

    def state(self) -> dict[str, Tensor]:
        """Return the weights under the names of SiglipModel."""
        state = {"logit_scale": self.loss.log_scale[None], "logit_bias": self.loss.bias[None]}
        for side, half in (("vision_model", self.image), ("text_model", self.text)):
            state |= {f"{side}.{name}": x for name, x in half.state.items()}
        return {name: x.detach() for name, x in state.items() if not name.endswith("position_ids")}

    @property
    def length(self) -> int:
        """Return the number of positions of the longest text."""
        return int(self.text.config["max_position_embeddings"])

    @property
    def vocabulary(self) -> int:
        """Return the number of ids that the text tower reads."""
        return int(self.text.config["vocab_size"])

    def theirs(self, x_BCHW: Tensor) -> Tensor:
        """Convert the recipe's pixels to SiglipModel's pixels; a pretrained tower normalises pixels itself."""
        tower = unfrozen(self.recipe.towers["image"])
        return x_BCHW * tower.scale_311 + tower.shift_311 if isinstance(tower, PretrainedTower) else x_BCHW

    def ours(self, x_BCHW: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings of images and texts, and the logits of each image with each text."""
        image_BD, text_BD = (
            F.normalize(self.recipe.heads[m](self.recipe.features(x, m)), dim=1)
            for m, x in (("image", x_BCHW), ("text", ids_BT))
        )
        return image_BD, text_BD, self.loss.log_scale.exp() * image_BD @ text_BD.T + self.loss.bias


class SiglipFormat(ModelFormat):
    """SiglipModel of transformers, with its tokenizer and image processor."""

    def write(self, recipe: Recipe, parts: Parts, folder: Path) -> None:
        from transformers import SiglipModel

        siglip = Siglip.of(recipe)
        model = SiglipModel(siglip.config())
        model.load_state_dict(siglip.state())
        model.save_pretrained(folder)
        _write_processor(siglip, parts, folder)

    def outputs(self, recipe: Recipe, folder: Path) -> tuple[Tensor, Tensor]:
        from transformers import SiglipModel

        model = SiglipModel.from_pretrained(folder, trust_remote_code=False).eval()
        siglip = Siglip.of(recipe)
        vision, length = siglip.image.config, siglip.length
        x_BCHW = torch.randn(2, vision["num_channels"], vision["image_size"], vision["image_size"])
        ids_BT = torch.randint(siglip.vocabulary, (2, length))
        ids_BT[1, length // 2 :] = siglip.text.config["pad_token_id"] or 0
        output = model(input_ids=ids_BT, pixel_values=siglip.theirs(x_BCHW))
        image_BD, text_BD, logits_BB = siglip.ours(x_BCHW, ids_BT)
        size = float(siglip.loss.log_scale.exp() + siglip.loss.bias.abs())  # scales logits to the size of embeddings
        their = (output.image_embeds, output.text_embeds, output.logits_per_image / size)
        own = (image_BD, text_BD, logits_BB / size)
        return torch.cat([x.flatten() for x in own]), torch.cat([x.flatten() for x in their])

    def usage(self, folder: str) -> str:
        return (
            "from transformers import AutoProcessor, SiglipModel\n\n"
            f'model, processor = SiglipModel.from_pretrained("{folder}"), AutoProcessor.from_pretrained("{folder}")\n'
            'inputs = processor(text=["a red apple"], images=image, padding="max_length", truncation=True, '
            'return_tensors="pt")'
        )


def _write_processor(siglip: Siglip, parts: Parts, folder: Path) -> None:
    """Write the files of the processor, or only those of the tokenizer or of the images if the other is unknown."""
    from transformers import SiglipProcessor

    tokenizer, steps = tokenizer_of(parts), ImageSteps.of(parts)
    tower = unfrozen(siglip.recipe.towers["image"])
    if steps is not None and isinstance(tower, PretrainedTower) and tower.input is not None:
        steps = replace(steps, mean=tower.input.mean, std=tower.input.std)
    whole = None if tokenizer is None else _fast_tokenizer(tokenizer, siglip)
    if whole is not None and steps is not None:
        SiglipProcessor(image_processor=steps.processor(), tokenizer=whole).save_pretrained(folder)
    elif whole is not None:
        whole.save_pretrained(folder)
    elif steps is not None:
        steps.processor().save_pretrained(folder)


def _fast_tokenizer(tokenizer: Tokenizer, siglip: Siglip) -> Any:
    """Return the fast tokenizer; it outputs no mask, since padding is attended to."""
    pretrained = isinstance(tokenizer, PretrainedTokenizer)
    whole = fast(tokenizer, siglip.vocabulary, tokenizer.length, eos=None if pretrained else EOS)
    whole.model_max_length, whole.padding_side = tokenizer.length, "right"
    whole.model_input_names = whole.init_kwargs["model_input_names"] = ["input_ids"]  # init_kwargs are saved
    return whole
