"""PretrainedTower of models whose images are rows of patches: SigLIP 2 of any size, and Qwen-VL's vision towers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from descant.modules.tokenizers.text import PretrainedTokenizer
from descant.modules.towers import PretrainedTower
from tests.modules.towers import folders

NEAR = 1e-5
QWEN = ("qwen2_vl", "qwen2_5_vl")


def naflex(folder: Path, alone: bool = False) -> Any:
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model, Siglip2VisionModel

    image = {**folders.SIZES, "patch_size": 4, "num_patches": 9}
    text = {**folders.SIZES, "vocab_size": folders.VOCABULARY, "max_position_embeddings": folders.LENGTH}
    config = Siglip2Config(text_config={**text, "pad_token_id": 0, "projection_size": 16}, vision_config=image)
    model = folders.stirred(Siglip2VisionModel(config.vision_config) if alone else Siglip2Model(config))
    model.save_pretrained(folder)
    folders.tokenizer(folder, inputs=("input_ids",))
    processor = Siglip2ImageProcessor(patch_size=4, max_num_patches=16, image_mean=folders.MEAN, image_std=folders.STD)
    processor.save_pretrained(folder)
    return model if alone else model.vision_model


def qwen(folder: Path, kind: str, alone: bool = False) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 16}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 16, "hidden_size": 24, "mlp_ratio": 2}
    else:
        vision |= {"intermediate_size": 32, "out_hidden_size": 24, "window_size": 16, "fullatt_block_indexes": [1]}
    text: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 31}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    whole: Any = folders.stirred(AutoModelForImageTextToText.from_config(config))
    (whole.model.visual if alone else whole).save_pretrained(folder)
    sizes = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    mean_std = {"image_mean": folders.MEAN, "image_std": folders.STD}
    Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=sizes, **mean_std).save_pretrained(folder)
    return whole.model.visual


def pixels(side: int) -> Tensor:
    return torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def inputs_of(folder: Path, pixels_BCSS: Tensor) -> Any:
    """What the owner's own processor makes of the images."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)(list(pixels_BCSS), return_tensors="pt")


def ours(tower: nn.Module, pixels_BCSS: Tensor) -> Tensor:
    with torch.no_grad():
        return tower.eval()(pixels_BCSS / 127.5 - 1).h_BTD


@pytest.mark.parametrize("alone", [False, True])
def test_a_square_of_naflex_is_embedded_as_by_its_owner(alone: bool, tmp_path: Path) -> None:
    model = naflex(tmp_path, alone)
    tower = PretrainedTower(tmp_path, part=None if alone else "image")
    assert tower.input is not None and tower.input.size == 16  # 16 patches of 4 pixels
    with torch.no_grad():
        output = model(**inputs_of(tmp_path, pixels(16)))
    torch.testing.assert_close(ours(tower, pixels(16))[:, 0], output.pooler_output, rtol=0, atol=NEAR)
    tokens = PretrainedTower(tmp_path, part=None if alone else "image", output="tokens")
    torch.testing.assert_close(ours(tokens, pixels(16)), output.last_hidden_state, rtol=0, atol=NEAR)
    assert not any("head" in name for name, _ in tokens.named_parameters())
    # of another grid, whose positions the owner interpolates
    small = PretrainedTower(tmp_path, part=None if alone else "image", size=8)
    with torch.no_grad():
        given = inputs_of(tmp_path, torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
        shape = torch.tensor([[2, 2], [2, 2]])
        mean, std = (torch.tensor(x)[:, None, None] for x in (folders.MEAN, folders.STD))
        rows = ((pixels(8) / 255 - mean) / std).view(2, 3, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 4, 48)
        given = {"pixel_values": rows, "pixel_attention_mask": torch.ones(2, 4), "spatial_shapes": shape}
        theirs_BD = model(**given).pooler_output
    torch.testing.assert_close(ours(small, pixels(8))[:, 0], theirs_BD, rtol=0, atol=NEAR)


def test_its_texts_are_those_of_siglip(tmp_path: Path) -> None:
    naflex(tmp_path)
    from transformers import Siglip2Model

    ids_BT = PretrainedTokenizer(tmp_path, length=folders.LENGTH)(["a red apple", "green car"])
    with torch.no_grad():
        theirs_BD = Siglip2Model.from_pretrained(tmp_path).eval().get_text_features(ids_BT).pooler_output
        ours_BD = PretrainedTower(tmp_path, part="text").eval()(ids_BT).h_BTD[:, 0]
    torch.testing.assert_close(ours_BD, theirs_BD, rtol=0, atol=NEAR)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", QWEN)
def test_the_merged_tokens_of_qwen_are_those_of_its_owner(kind: str, alone: bool, tmp_path: Path) -> None:
    model = qwen(tmp_path, kind, alone)
    tower = PretrainedTower(tmp_path, output="tokens", size=32)
    given = inputs_of(tmp_path, pixels(32))
    assert given["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    with torch.no_grad():
        theirs = model(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
    h_BTD = ours(tower, pixels(32))
    assert h_BTD.shape == (2, 16, 24) and tower.width == 24
    torch.testing.assert_close(h_BTD.flatten(0, 1), theirs, rtol=0, atol=NEAR)
    names = [name.removeprefix("model.") for name in tower.encoder.state_dict()]
    assert names and not any(name.startswith(("text", "language", "lm_head")) for name in names)
    other = PretrainedTower(tmp_path, output="tokens", size=32, weights=False)
    assert other.state_dict().keys() == tower.state_dict().keys()
    assert float((ours(other, pixels(32)) - h_BTD).abs().max()) > NEAR


@pytest.mark.parametrize("make", [naflex, lambda folder: qwen(folder, "qwen2_5_vl")], ids=["naflex", "qwen"])
def test_every_weight_learns(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path)
    part: Any = "image" if make is naflex else None
    tower = PretrainedTower(tmp_path, part=part, output="embedding" if part else "tokens", size=16)
    h_BTD = tower(pixels(16) / 127.5 - 1).h_BTD
    (h_BTD * torch.randn(h_BTD.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    assert len(tower.blocks()) == 2


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    qwen(tmp_path / "qwen", "qwen2_vl")
    naflex(tmp_path / "naflex")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("qwen", {}, "qwen2_vl has no embedding of an image; output: tokens, and a pool"),
        ("qwen", {"output": "tokens"}, "its images have no one size: give size, pixels of a side"),
        ("qwen", {"output": "tokens", "size": 30}, "size 30: qwen2_vl reads multiples of 8; the nearest is 32"),
        ("qwen", {"output": "tokens", "size": 32, "part": "text"}, "part text: qwen2_vl reads image alone"),
        ("naflex", {}, "part: image or text; siglip2 has both"),
        ("naflex", {"part": "image", "size": 10}, "size 10: siglip2 reads multiples of 4; the nearest is 8"),
    ]
    for name, options, line in cases:
        with pytest.raises(ValueError, match=line):
            PretrainedTower(tmp_path / name, **options)
    config = json.loads((tmp_path / "qwen/config.json").read_text())
    config["vision_config"]["depth"] = 3
    (tmp_path / "qwen/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a vision tower"):
        PretrainedTower(tmp_path / "qwen", output="tokens", size=32)
    config["model_type"] = "qwen3_vl"
    (tmp_path / "qwen/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"qwen3_vl: of models of images and texts .* are read"):
        PretrainedTower(tmp_path / "qwen", output="tokens", size=32)
