"""transformers: a vision-language model as LlavaForConditionalGeneration, with its processor and chat template.

LLaVA embeds an image as ``linear_2(gelu(linear_1(tower(image))))``, one token of the language model for each token of
the tower. Source: transformers' models/llava.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from descant.export.formats.base import ImageSteps, ModelFormat, Parts, tokenizer_of, unfrozen
from descant.export.formats.fast_tokenizers import ANSWER, IMAGE, chat_template, fast, require_question
from descant.export.formats.llama import require_causal
from descant.export.formats.siglip import patches_as_siglip
from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM
from descant.modules.language.llama_format import llama_config, to_llama
from descant.modules.language.positions import VisualSteps
from descant.modules.language.projectors import EachToken
from descant.modules.tokenizers.text import BOS, EOS, PAD, SPECIAL
from descant.modules.towers import PatchTower, TransformersTower
from descant.recipes import VisionLanguage
from descant.recipes.base.recipe import Recipe


@dataclass(frozen=True)
class Vision:
    """A tower as LLaVA's: its configuration, its weights, and the number of its tokens that belong to no patch."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    extra: int

    @classmethod
    def of(cls, tower: nn.Module) -> Vision:
        """Convert a tower. Raises ValueError for a tower of another architecture."""
        tower = unfrozen(tower)
        if type(tower) is PatchTower:
            half = patches_as_siglip(tower)
            return cls({**half.config, "tie_last_hidden_states": True}, half.state, extra=0)
        kind = getattr(tower, "kind", None) or type(tower).__name__
        if not isinstance(tower, TransformersTower) or kind not in ("clip_vision_model", "siglip_vision_model"):
            raise ValueError(
                f"towers.image: {kind}; LLaVA has a PatchTower, or a TransformersTower of model_type "
                "clip_vision_model or siglip_vision_model"
            )
        config = tower.model.config.to_dict()
        # hidden_states[-1] precedes the last norm in both: SigLIP's is part of our tower, CLIP's serves only its pooled
        # token
        config["tie_last_hidden_states"] = kind == "siglip_vision_model"
        return cls(config, dict(tower.model.state_dict()), extra=int(kind == "clip_vision_model"))

    @property
    def tokens(self) -> int:
        """Return the number of tokens of an image."""
        return (self.config["image_size"] // self.config["patch_size"]) ** 2 + self.extra


@dataclass(frozen=True)
class Llava:
    """The parts of a recipe that is a LLaVA."""

    recipe: VisionLanguage
    lm: CausalLM
    vision: Vision
    image_token: int

    @classmethod
    def of(cls, recipe: Recipe) -> Llava:
        """Take the parts from a recipe. Raises ValueError with the part that no LLaVA has."""
        if type(recipe) is not VisionLanguage or recipe.image_token is None:
            raise ValueError(f"{type(recipe).__name__}: LLaVA is a VisionLanguage of images and texts")
        require_causal(recipe)
        projector, steps = recipe.projector, recipe.visual
        if type(projector) is not EachToken:
            raise ValueError(f"projector: {type(projector).__name__}; LLaVA's is EachToken, with norm: false")
        if projector.norm:
            raise ValueError(
                "projector.mlp.0: LayerNorm; LLaVA's projector has none, and one with weights is no part of the linear "
                "layer behind it: train with {class_path: EachToken, init_args: {norm: false}}"
            )
        if type(steps) is not VisualSteps or steps.step != 1:
            raise ValueError(f"visual: {type(steps).__name__}; LLaVA counts the tokens of an image like words")
        return cls(recipe, recipe.lm, Vision.of(recipe.towers["image"]), recipe.image_token)

    def config(self) -> Any:
        """Return transformers' LlavaConfig."""
        from transformers import AutoConfig, LlavaConfig

        text, vision = llama_config(self.lm), dict(self.vision.config)
        ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
        return LlavaConfig(
            vision_config=AutoConfig.for_model(vision.pop("model_type"), **vision),
            text_config=AutoConfig.for_model(**text, **ids),
            image_token_index=self.image_token,
            image_seq_length=self.vision.tokens,
            projector_hidden_act="gelu",
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            multimodal_projector_bias=True,
            tie_word_embeddings=text["tie_word_embeddings"],
            dtype="float32",
            **ids,
        )

    def state(self) -> dict[str, Tensor]:
        """Return the weights under the names of LlavaForConditionalGeneration."""
        first, _, second = list(self.recipe.projector.mlp)[1:]  # type: ignore[arg-type]
        text = to_llama(self.lm)
        return {
            **{f"model.vision_tower.{name}": x for name, x in self.vision.state.items()},
            **first.state_dict(prefix="model.multi_modal_projector.linear_1."),
            **second.state_dict(prefix="model.multi_modal_projector.linear_2."),
            **{f"model.language_model.{k.removeprefix('model.')}": x for k, x in text.items() if k != "lm_head.weight"},
            "lm_head.weight": text["lm_head.weight"],
        }

    def probe(self) -> Batch:
        """Return two images, each in the middle of a random text."""
        config = self.vision.config
        x_BCHW = torch.randn(2, config.get("num_channels", 3), config["image_size"], config["image_size"])
        words = max(min(self.lm.length - self.vision.tokens, 16), 2)
        ids_BT = torch.randint(SPECIAL, min(self.recipe.marks.values()), (2, words))
        ids_BT[:, 0], ids_BT[:, 1] = BOS, self.image_token
        there_B = torch.ones(2, dtype=torch.bool)
        inputs = {"image": x_BCHW, "text": ids_BT, "loss_mask": torch.zeros_like(ids_BT, dtype=torch.bool)}
        return Batch(inputs, {"image": there_B, "text": there_B})


class LlavaFormat(ModelFormat):
    """config.json, model.safetensors, generation_config.json, and the processor: images, tokenizer, chat template."""

    def write(self, recipe: Recipe, parts: Parts, folder: Path) -> None:
        from transformers import GenerationConfig, LlavaForConditionalGeneration

        seeing = Llava.of(recipe)
        model: Any = LlavaForConditionalGeneration(seeing.config())
        model.load_state_dict(seeing.state())
        ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
        model.generation_config = GenerationConfig(do_sample=False, **ids)
        model.save_pretrained(folder)
        _write_processor(seeing, parts, folder)

    def outputs(self, recipe: Recipe, folder: Path) -> tuple[Tensor, Tensor]:
        from transformers import LlavaForConditionalGeneration

        seeing = Llava.of(recipe)
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder, trust_remote_code=False)
        batch = seeing.probe()
        _, h_BSW, row = seeing.recipe.read(batch)
        theirs = model.eval()(input_ids=row.ids_BS, pixel_values=batch.inputs["image"]).logits
        return seeing.lm.logits(h_BSW), theirs

    def usage(self, folder: str) -> str:
        asked = '[{"type": "image"}, {"type": "text", "text": "What is it?"}]'
        return (
            "from PIL import Image\n"
            "from transformers import AutoProcessor, LlavaForConditionalGeneration\n\n"
            f'model = LlavaForConditionalGeneration.from_pretrained("{folder}")\n'
            f'processor = AutoProcessor.from_pretrained("{folder}")\n'
            f'text = processor.apply_chat_template([{{"role": "user", "content": {asked}}}])\n'
            'inputs = processor(images=Image.open("image.png").convert("RGB"), text=text, add_special_tokens=False, '
            'return_tensors="pt")\n'
            "model.generate(**inputs, max_new_tokens=16)"
        )


def _write_processor(seeing: Llava, parts: Parts, folder: Path) -> None:
    """Write the processor if the preprocessing of texts and images is known; without images, only the tokenizer."""
    from transformers import LlavaProcessor

    tokenizer, recipe = tokenizer_of(parts), seeing.recipe
    if tokenizer is None:
        return
    marks = {seeing.image_token: IMAGE, recipe.answer_token: ANSWER}
    whole = fast(tokenizer, seeing.lm.vocabulary, seeing.lm.length, marks)
    template = chat_template(tokenizer, whole)
    whole.chat_template = template
    require_question(tokenizer, whole, seeing.image_token, recipe.answer_token)
    steps = ImageSteps.of(parts)
    if steps is None:
        whole.save_pretrained(folder)
        return
    LlavaProcessor(
        image_processor=steps.processor(),
        tokenizer=whole,
        patch_size=seeing.vision.config["patch_size"],
        vision_feature_select_strategy="full",
        num_additional_image_tokens=seeing.vision.extra,
        image_token=IMAGE,
        chat_template=template,
    ).save_pretrained(folder)
