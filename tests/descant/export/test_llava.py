"""``descant export --to transformers`` of a model that sees: LlavaForConditionalGeneration, with its processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import descant
from descant.datamodules.corpora.emoji_pack import PACK
from descant.export import loading
from descant.export.formats import base
from descant.export.formats.llava import LlavaFormat
from descant.modules.core.batch import Batch
from descant.modules.io import saved
from descant.modules.language import CausalLM
from descant.modules.language.positions import VisualSteps
from descant.modules.language.projectors import EachToken, PooledGrid
from descant.modules.moe import ExpertLayers, TopKRouter
from descant.modules.tokenizers.text import BPETokenizer, ByteTokenizer, Tokenizer
from descant.modules.towers import ConvTower, PatchTower, Tower, Towers, TransformersTower
from descant.modules.towers.base import Frozen
from descant.modules.transforms.image import Pixels
from descant.recipes import VisionLanguage
from tests.conftest import Result

Cli = Callable[..., Result]
SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOWERS: dict[str, Callable[[], Tower]] = {
    "patch": lambda: PatchTower(16, 8, 32, 2, 2),
    "clip": lambda: Frozen(TransformersTower(config={"model_type": "clip_vision_model", **SIZES})),
    "siglip": lambda: TransformersTower(config={"model_type": "siglip_vision_model", **SIZES}),
}
PIXELS = Pixels(16, mean=(0.4, 0.5, 0.6), std=(0.25, 0.25, 0.5))


def seeing(tower: str = "patch", tokenizer: Tokenizer | None = None, lm: Any = None, **options: Any) -> Any:
    image = (tokenizer or ByteTokenizer()).vocabulary
    torch.manual_seed(0)
    settings: dict[str, Any] = {"towers": Towers(image=TOWERS[tower]()), "projector": EachToken(norm=False), **options}
    model = CausalLM(image + 2, 32, 2, 2, length=64, **(lm or {}))
    recipe = VisionLanguage(lm=model, image_token=image, answer_token=image + 1, **settings).eval()
    with torch.no_grad():
        for parameter in recipe.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return recipe


EXPERTS = {"experts": ExpertLayers(4, TopKRouter(2), hidden=16), "tie": False}


@pytest.mark.parametrize(
    ("tower", "tokenizer", "lm"),
    [
        ("patch", ByteTokenizer(40), {"tie": False}),
        ("clip", BPETokenizer(PACK / "tokenizer.json", 40), {}),
        ("siglip", ByteTokenizer(40), EXPERTS),
    ],
    ids=["patch-llama", "clip-byte-pairs", "siglip-mixtral"],
)
def test_it_answers_there_as_here(tower: str, tokenizer: Tokenizer, lm: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    recipe, made = seeing(tower, tokenizer, lm), LlavaFormat()
    made.write(recipe, {"text": [tokenizer], "image": [PIXELS]}, tmp_path)
    assert made.require_near(recipe, tmp_path) < base.NEAR
    model: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path, trust_remote_code=False).eval()
    processor: Any = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False)
    pixels_BCHW = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    x_BCHW = PIXELS(pixels_BCHW, torch.zeros(2, dtype=torch.long))
    said = []
    for b, question in enumerate(("which?", "How many of them")):
        ids_BT = torch.tensor([tokenizer.question(question, recipe.image_token, recipe.answer_token)])
        inputs = {"image": x_BCHW[b : b + 1], "text": ids_BT, "loss_mask": torch.zeros_like(ids_BT, dtype=torch.bool)}
        one_B = torch.ones(1, dtype=torch.bool)
        (ours_M,) = recipe.generate(Batch(inputs, {"image": one_B, "text": one_B}), new=8).tolist()
        picture = Image.fromarray(pixels_BCHW[b].permute(1, 2, 0).numpy())
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        asked = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        torch.testing.assert_close(asked["pixel_values"], inputs["image"], rtol=0, atol=base.NEAR)
        theirs_M = model.generate(**asked, max_new_tokens=8)[0, asked["input_ids"].shape[1] :].tolist()
        assert theirs_M == ours_M[: len(theirs_M)] and not any(ours_M[len(theirs_M) :])  # padding behind <eos> here
        said.append(theirs_M)
    assert said[0] != said[1]
    with torch.no_grad():
        recipe.projector.mlp[1].weight[0].add_(0.5)
    with pytest.raises(ValueError, match="loaded back, its outputs differ by"):
        made.require_near(recipe, tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "norm": ({"projector": EachToken()}, r"projector\.mlp\.0: LayerNorm; LLaVA's projector has none"),
    "grid": ({"projector": PooledGrid(1)}, "projector: PooledGrid; LLaVA's is EachToken"),
    "tower": ({"towers": Towers(image=ConvTower([8]))}, r"towers\.image: ConvTower; LLaVA has a PatchTower"),
    "steps": ({"visual": VisualSteps(0.5)}, "visual: VisualSteps; LLaVA counts the tokens of an image like words"),
    "prefix": ({"prefix_sight": True}, "prefix_sight: a prefix read in both directions"),
    "lm": ({"lm": {"experts": ExpertLayers(4, TopKRouter(2), shared=1)}}, r"lm\.experts\.shared: Mixtral has none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llava_has_not_is_named(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        LlavaFormat().write(seeing(**options), {}, tmp_path)


def test_marks_have_ids_behind_those_of_texts(tmp_path: Path) -> None:
    recipe = seeing()
    recipe.image_token = 263  # the last byte
    with pytest.raises(ValueError, match="text: <image> has id 263, and ByteTokenizer has a token of that id"):
        LlavaFormat().write(recipe, {"text": [ByteTokenizer()]}, tmp_path)


@pytest.mark.slow
def test_a_run_of_questions_about_pictures_leaves_as_llava(cli: Cli) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    tower = "{class_path: PatchTower, init_args: {size: 48, patch: 12, width: 32, depth: 1, heads: 2}}"
    options = ("--model.towers.image", tower, "--model.projector", "{class_path: EachToken, init_args: {norm: false}}")
    done = cli("fit", "--config", "chat/emoji", *options, "--config", "on/tiny", "--name", "small")
    assert done.rc == 0, done.err
    done = cli("export", "small/001", "--to", "transformers", "--out", "out")
    assert done.rc == 0 and "for transformers, loaded back by it" in done.out, done.err
    model: Any = LlavaForConditionalGeneration.from_pretrained("out", trust_remote_code=False)
    processor: Any = AutoProcessor.from_pretrained("out", trust_remote_code=False)
    recipe: Any = descant.load("runs/small/001")
    with loading.trusting(()):
        data: Any = loading.datamodule(saved.find(Path("runs/small/001")))
    data.prepare_data()
    data.setup("validate")
    batch = next(iter(data.val_dataloader()[0]))
    batch.inputs["image"] = data.pixels(batch.inputs["image"], batch.rng_seed)
    ours_BM = recipe.generate(batch, new=6)
    for b in range(3):
        ids = batch.inputs["text"][b].tolist()
        question = ids[: ids.index(recipe.answer_token) + 1]
        at = question.index(recipe.image_token)
        row = [*question[:at], *[recipe.image_token] * model.config.image_seq_length, *question[at + 1 :]]
        seen = {"input_ids": torch.tensor([row]), "pixel_values": batch.inputs["image"][b : b + 1]}
        theirs = model.generate(**seen, max_new_tokens=6)[0, len(row) :].tolist()
        assert theirs == ours_BM[b].tolist()[: len(theirs)]
        text = processor.tokenizer.decode(question[at + 1 : -1])
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        assert processor.tokenizer(processor.apply_chat_template(asked), add_special_tokens=False).input_ids == question
    card = Path("out/README.md").read_text()
    assert "AutoProcessor.from_pretrained" in card and Path("out/DATA-NOTICE.md").is_file()
