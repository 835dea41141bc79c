"""Tiny models with random weights, saved to folders by the packages that own them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIDE, LENGTH, WORDS = 16, 8, ("red", "green", "apple", "car", "a")
MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.2, 0.3)


def stirred(model: Any) -> Any:
    """With every parameter moved off its first value, in eval mode."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokenizer(folder: Path, pad: str = "<pad>", inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> None:
    """Words between <bos> and <eos>, the highest id; ``inputs``: of a model."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<bos>", *WORDS, "<eos>"]
    made = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ends = [("<bos>", 2), ("<eos>", len(words) - 1)]
    made.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=ends)
    named = {"pad_token": pad, "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=LENGTH, model_input_names=list(inputs), **named
    ).save_pretrained(folder)


VOCABULARY = len(WORDS) + 4


def clip(folder: Path, pad: str = "<eos>", eos: int = VOCABULARY - 1) -> Any:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    text = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "eos_token_id": eos}
    text |= {"bos_token_id": 2, "pad_token_id": 0}
    image = {**SIZES, "hidden_size": 24, "image_size": SIDE, "patch_size": 8}
    model = stirred(CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=12)))
    model.save_pretrained(folder)
    tokenizer(folder, pad)
    square: Any = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size=square, crop_size=square, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(
        folder
    )
    return model


def siglip(folder: Path, inputs: tuple[str, ...] = ("input_ids",)) -> Any:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    text = {
        **SIZES,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
        "projection_size": 16,
    }
    image = {**SIZES, "image_size": SIDE, "patch_size": 8}
    model = stirred(SiglipModel(SiglipConfig(text_config=text, vision_config=image)))
    model.save_pretrained(folder)
    tokenizer(folder, "<pad>", inputs)
    size: Any = {"height": SIDE, "width": SIDE}
    SiglipImageProcessor(size=size, resample=2).save_pretrained(folder)
    return model


def dino(folder: Path, version: int = 2) -> Any:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

    sizes: Any = {**SIZES, "image_size": SIDE, "patch_size": 8}
    if version == 2:
        del sizes["intermediate_size"]
        model: Any = Dinov2Model(Dinov2Config(**sizes))
    else:
        model = DINOv3ViTModel(DINOv3ViTConfig(**sizes, num_register_tokens=2))
    stirred(model).save_pretrained(folder)
    size: Any = {"shortest_edge": SIDE + 4}
    crop: Any = {"height": SIDE, "width": SIDE}
    BitImageProcessor(size=size, crop_size=crop, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)
    return model


def timm(folder: Path, name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    import timm
    from timm.models import save_for_hf

    options = options or {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2}
    model = stirred(timm.create_model(name, num_classes=7, **options))
    side = options.get("img_size", 32)
    data = {"input_size": (3, side, side), "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 1.0}
    save_for_hf(model, str(folder), safe_serialization=True, model_args=options, data_config=data)
    return model


def open_clip(folder: Path, custom: bool = False, **text: Any) -> Any:
    from open_clip.model import CLIP, CustomTextCLIP

    vision = {"layers": 2, "width": 24, "head_width": 12, "patch_size": 8, "image_size": SIDE}
    words: Any = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2, **text}
    config: Any = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": words}
    model = stirred((CustomTextCLIP if custom else CLIP)(**config))
    folder.mkdir(exist_ok=True)
    content = {"model_cfg": {**config, "custom_text": custom}}
    content["preprocess_cfg"] = {
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "size": SIDE,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file({key: x.contiguous() for key, x in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    tokenizer(folder, "<pad>")
    return model


def sentence(folder: Path, pooling: Any = "mean", dense: bool = True, normalize: bool = True) -> tuple[Any, Any]:
    """The transformer and the dense layer of a folder as sentence-transformers 6.2 writes it."""
    from transformers import BertConfig, BertModel

    model = stirred(BertModel(BertConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=LENGTH + 4)))
    model.save_pretrained(folder)
    tokenizer(folder)
    modules = [
        ("", "base.modules.transformer.Transformer"),
        ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
    ]
    modes = (pooling,) if isinstance(pooling, str) else pooling
    linear = stirred(nn.Linear(16 * len(modes), 6))
    _write(
        folder / "1_Pooling/config.json", {"embedding_dimension": 16, "pooling_mode": pooling, "include_prompt": True}
    )
    if dense:
        modules.append(("2_Dense", "base.modules.dense.Dense"))
        config = {"in_features": 16 * len(modes), "out_features": 6, "bias": True}
        _write(folder / "2_Dense/config.json", {**config, "activation_function": "torch.nn.modules.activation.Tanh"})
        state = {f"linear.{key}": x.detach() for key, x in linear.state_dict().items()}
        save_file(state, folder / "2_Dense/model.safetensors")
    if normalize:
        modules.append(("3_Normalize", "base.modules.normalize.Normalize"))
    steps = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", steps)
    return model, linear


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
