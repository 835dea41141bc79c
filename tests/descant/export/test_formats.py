"""``descant export --to``: folders that other packages load, with the outputs of the run."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import descant
from descant.datamodules.corpora.emoji_pack import PACK
from descant.datamodules.fields.images import Images
from descant.export import loading
from descant.export.formats import base, llama, timm_vit
from descant.export.formats import clip as clips
from descant.modules.core.batch import Batch
from descant.modules.fusion.cross_encoder import FusionLayers
from descant.modules.io import saved
from descant.modules.language import CausalLM
from descant.modules.language.axis_rope import AxisRoPE
from descant.modules.language.llama_format import llama_config, to_llama
from descant.modules.losses import SigLIP
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.moe import ExpertLayers, HardModality, TopKRouter, VisualExperts
from descant.modules.objectives.contrast import Contrast
from descant.modules.objectives.intra import Intra
from descant.modules.tokenizers.text import BOS, EOS, BPETokenizer, ByteTokenizer, WordTokenizer
from descant.modules.towers import ConvTower, PatchTower, TextTower, TimmTower, Towers, TransformersTower
from descant.modules.towers.base import Frozen
from descant.modules.towers.heads import FirstPool, LastPool, Pools
from descant.modules.towers.vit import EPS, Trunk
from descant.modules.transforms.image import Pixels
from descant.recipes import Contrastive, Masked, MultiTask, VisionLanguage
from tests.conftest import Result

Cli = Callable[..., Result]


def trained(cli: Cli, *options: str) -> Path:
    done = cli("fit", *options, "--config", "on/tiny", "--name", "small")
    assert done.rc == 0, done.err
    return Path("runs/small/001")


def datamodule() -> Any:
    with loading.trusting(()):
        return loading.datamodule(saved.find(Path("runs/small/001")))


def validation() -> Batch:
    """The first batch of the run's validation."""
    data = datamodule()
    data.prepare_data()
    data.setup("validate")
    return next(iter(data.val_dataloader()[0]))


@pytest.mark.slow
def test_a_language_model_answers_in_transformers_as_here(cli: Cli) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained(cli, "--config", "chat/arithmetic", "--trainer.max_steps", "30")
    done = cli("export", "small/001", "--to", "transformers", "--out", "out")
    assert done.rc == 0 and "for transformers, loaded back by it" in done.out, done.err
    recipe: Any = descant.load("runs/small/001")
    model: Any = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=False)
    tokenizer: Any = AutoTokenizer.from_pretrained("out", trust_remote_code=False)
    assert type(model).__name__ == "LlamaForCausalLM"
    data, batch = datamodule(), validation()
    ours_BM = recipe.generate(batch, new=8)
    answer = recipe.answer_token
    for row in range(4):
        ids = batch.inputs["text"][row].tolist()
        question = ids[: ids.index(answer) + 1]
        text = data.tokenizer.decode(question)
        assert tokenizer(f"{text}<answer>").input_ids == question
        theirs = model.generate(torch.tensor([question]), max_new_tokens=8)[0, len(question) :].tolist()
        ours = ours_BM[row].tolist()
        assert theirs[: len(ours)] == ours[: len(theirs)] and len(theirs) > 0
    card = Path("out/README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in card and "descant.load" not in card


@pytest.mark.slow
def test_the_encoder_of_a_masked_run_is_a_folder_for_timm(cli: Cli) -> None:
    import timm

    trained(cli, "--config", "masked/emoji")
    done = cli("export", "small/001", "--to", "timm", "--out", "out")
    assert done.rc == 0 and "for timm, loaded back by it" in done.out, done.err
    model: Any = timm.create_model("local-dir:out", pretrained=True)
    trunk = descant.load("runs/small/001").towers["encoder"]
    assert torch.equal(model.norm.weight, cast(Any, trunk).norm.weight)
    config = json.loads(Path("out/config.json").read_text())["pretrained_cfg"]
    assert "tag" not in config and "license" not in config and config["mean"] == [0.5, 0.5, 0.5]
    assert Path("out/metrics.json").is_file() and "timm.create_model" in Path("out/README.md").read_text()


def test_a_vit_of_timm_embeds_as_the_masked_model(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    adapters = Adapters(image=PatchAdapter([16, 16], 4), sketch=PatchAdapter([16, 16], 4, channels=1))
    recipe: Any = Masked(adapters, Trunk(24, 2, 3)).eval()
    with torch.no_grad():
        for parameter in recipe.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    timm_vit.TimmFormat().write(recipe, {}, tmp_path)
    model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x_BCHW, there_B = torch.randn(3, 3, 16, 16), torch.ones(3, dtype=torch.bool)
    batch = Batch({"image": x_BCHW, "sketch": x_BCHW[:, :1]}, {"image": there_B, "sketch": ~there_B})
    with torch.no_grad():
        mean_BD = F.normalize(model.forward_features(x_BCHW)[:, 1:].mean(dim=1), dim=1)
        torch.testing.assert_close(recipe.embed(batch)["image"], mean_BD, rtol=0, atol=base.NEAR)


def test_a_tower_of_timm_is_itself(tmp_path: Path) -> None:
    import timm

    options: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    tower = TimmTower("vit_tiny_patch16_224", size=32, options=options)
    recipe: Any = SimpleNamespace(towers={"image": tower.eval()})
    made = timm_vit.TimmFormat()
    made.write(recipe, {"image": [Pixels(32, std=(0.25, 0.25, 0.25))]}, tmp_path)
    assert made.require_near(recipe, tmp_path) == 0
    model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert model.pretrained_cfg["std"] == (0.25, 0.25, 0.25) or model.pretrained_cfg["std"] == [0.25, 0.25, 0.25]


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_a_patch_tower_is_a_vit_of_timm(positions: Any, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    tower = PatchTower(16, 4, 24, 2, 3, mlp_ratio=2.0, channels=1, positions=positions).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(0.05).add_(0.02 * torch.randn_like(parameter))  # small: the epsilon of a norm is felt
    x_BCHW, made = 0.1 * torch.randn(3, 1, 16, 16), timm_vit.TimmFormat()
    recipe: Any = SimpleNamespace(towers={"image": Frozen(tower), "text": TextTower(31, 8, 1, 2, 8)})
    made.write(recipe, {}, tmp_path)
    assert made.require_near(recipe, tmp_path) < base.NEAR
    model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        ours_BD, theirs_BD = tower(x_BCHW).h_BTD.mean(dim=1), model(x_BCHW)
        torch.testing.assert_close(theirs_BD, ours_BD, rtol=0, atol=base.NEAR)
        for layer in tower.modules():
            if isinstance(layer, torch.nn.LayerNorm):
                layer.eps = EPS
        # with timm's epsilon the same weights would compute something else; fixed positions are too large to feel it
        difference = float((tower(x_BCHW).h_BTD.mean(dim=1) - theirs_BD).abs().max())
        assert difference > 10 * base.NEAR or positions == "sincos"


LMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped": {"key_heads": 1, "tie": False, "hidden": 24},
    "mixtral": {"experts": ExpertLayers(4, TopKRouter(2), hidden=16), "tie": False},
}


@pytest.mark.parametrize("name", LMS)
def test_weights_go_there_and_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = VisionLanguage(lm=CausalLM(266, 16, 2, 2, length=32, **LMS[name]), answer_token=265).eval()
    made = llama.LlamaFormat()
    made.write(recipe, {"text": [ByteTokenizer()]}, tmp_path)
    assert made.require_near(recipe, tmp_path) < base.NEAR
    again = CausalLM(266, 16, 2, 2, length=32, **LMS[name])
    again.load_llama(to_llama(recipe.lm))
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), recipe.lm.parameters(), strict=True))
    with torch.no_grad():
        recipe.lm.norm.weight.add_(0.1)
    with pytest.raises(ValueError, match="loaded back, its outputs differ by"):
        made.require_near(recipe, tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "axes": ({"positions": AxisRoPE()}, "positions of three axes"),
    "visual": ({"visual": VisualExperts()}, "visual experts"),
    "router": (
        {"experts": ExpertLayers(2, HardModality([0, 1]), balance=None)},
        "router: HardModality; Mixtral routes by",
    ),
    "shared": ({"experts": ExpertLayers(4, TopKRouter(2), shared=1)}, "experts.shared: Mixtral has none"),
    "some": ({"experts": ExpertLayers(4, TopKRouter(2), every=2)}, "every 2: all of Mixtral's layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_family_has_not_is_named(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        llama_config(CausalLM(31, 16, 2, 2, **arguments))


def test_bytes_are_bytes_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    recipe = VisionLanguage(lm=CausalLM(270, 16, 1, 2, length=32), answer_token=265).eval()
    llama.LlamaFormat().write(recipe, {"text": [ByteTokenizer()]}, tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    ours = ByteTokenizer()
    for text in ("7+5", "naïve  <b>", "日本 \n\t é", "".join(map(chr, range(32, 400)))):
        assert theirs(text).input_ids == [BOS, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == text
    assert theirs("a<answer>").input_ids[-1] == 265 and theirs.eos_token_id == EOS


def test_a_tokenizer_without_a_form_there_is_named(tmp_path: Path) -> None:
    recipe = VisionLanguage(lm=CausalLM(31, 16, 1, 2), answer_token=30).eval()
    with pytest.raises(ValueError, match="WordTokenizer has no form in transformers"):
        llama.LlamaFormat().write(recipe, {"text": [WordTokenizer(["fox"])]}, tmp_path)


def test_byte_pairs_begin_with_bos_and_have_the_mark_of_an_answer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = BPETokenizer(PACK / "tokenizer.json", 24)
    answer = ours.vocabulary + 1
    recipe = VisionLanguage(lm=CausalLM(answer + 1, 16, 1, 2, length=32), answer_token=answer).eval()
    llama.LlamaFormat().write(recipe, {"text": [ours]}, tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    asked: Any = [{"role": "user", "content": "How many Foxes?"}]
    question = ours.question("How many Foxes?", None, answer)
    assert theirs("How many Foxes?<answer>").input_ids == question
    assert theirs.apply_chat_template(asked, return_dict=False) == question
    answered = [*asked, {"role": "assistant", "content": "two"}]
    assert theirs.apply_chat_template(answered, return_dict=False) == [*question, *ours.encode("two"), EOS]
    with pytest.raises(Exception, match="one question of the user, and its answer"):
        theirs.apply_chat_template([*answered, *asked])
    recipe.prefix_sight = True
    with pytest.raises(ValueError, match="prefix_sight: a prefix read in both directions is in no causal model"):
        llama.LlamaFormat().write(recipe, {"text": [ours]}, tmp_path / "not")


@pytest.mark.slow
def test_a_format_that_cannot_hold_a_model_leaves_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(cli, "--config", "staged/code-experts", "--data.init_args.stages.learn.init_args.steps", "2")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "open_clip" else find(name, *at))
    for options, line in [
        (("--to", "open_clip"), "pip install 'descant[exchange]'"),
        (("--to", "transformers"), "lm.experts.router: ExpertChoice; Mixtral routes by TopKRouter"),
        (("--to", "timm"), "timm holds one TimmTower or PatchTower, or the encoder of a masked model"),
        (("--to", "tim"), "--to tim: no such format; nearest: timm"),
        (("--to", "timm", "--towers", "image"), "--to timm writes what the format holds"),
    ]:
        assert line in cli("export", "small/001", *options, "--out", "out").refusal
        assert not Path("out").exists() and not list(Path().glob(".out*"))


# CLIP ---------------------------------------------------------------------------------------------------------------


def clip(act: str = "gelu", vocabulary: int = 264, **options: Any) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    image = {**sizes, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "hidden_act": act}
    text = {**sizes, "model_type": "clip_text_model", "vocab_size": vocabulary, "max_position_embeddings": 24}
    text |= {"hidden_act": act, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    towers = Towers(image=TransformersTower(config=image), text=TransformersTower(config=text))
    settings: dict[str, Any] = {"pool": Pools(image=FirstPool(), text=LastPool()), "norm": {"text": False}} | options
    recipe = Contrastive(towers, 16, **settings).eval()
    with torch.no_grad():
        for parameter in recipe.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return recipe


PARTS: dict[str, list[Any]] = {
    "text": [ByteTokenizer(24)],
    "image": [Pixels(32, mean=(0.4, 0.5, 0.6), std=(0.25, 0.25, 0.5))],
}
CLIPS: dict[str, type[base.ModelFormat]] = {"transformers": clips.ClipFormat, "open_clip": clips.OpenClipFormat}


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_embeds_there_as_here(name: str, act: str, tmp_path: Path) -> None:
    recipe, made = clip(act), CLIPS[name]()
    made.write(recipe, PARTS, tmp_path)
    assert made.require_near(recipe, tmp_path) < base.NEAR
    with torch.no_grad():
        recipe.heads["text"].layers[-1].weight[0].add_(0.5)
    with pytest.raises(ValueError, match="its outputs differ"):
        made.require_near(recipe, tmp_path)


def test_several_objectives_with_one_contrast_are_a_clip_too(tmp_path: Path) -> None:
    """CLIP has no place for other objectives' layers: they stay behind. Fusion layers would change what is embedded."""
    one, made = clip(), clips.ClipFormat()
    objectives = {"contrast": Contrast([["image", "text"]]), "views": Intra(32, out=4, hidden=8)}
    pool = Pools(image=FirstPool(), text=LastPool())
    recipe: Any = MultiTask(one.towers, objectives, 16, pool=pool, norm={"text": False}).eval()
    made.write(recipe, PARTS, tmp_path)
    assert made.require_near(recipe, tmp_path) < base.NEAR
    recipe.fusion = FusionLayers(32)
    with pytest.raises(ValueError, match="MultiTask: a CLIP is a Contrastive of images and texts, and no more"):
        made.write(recipe, PARTS, tmp_path)


def test_texts_and_pictures_have_the_similarities_of_the_recipe(tmp_path: Path) -> None:
    import open_clip
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    recipe, texts = clip(), ["a red apple", "naïve", "the sun"]
    for name, made in CLIPS.items():
        (tmp_path / name).mkdir()
        made().write(recipe, PARTS, tmp_path / name)
    pixels_BCHW = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels_BCHW]
    x_BCHW = PARTS["image"][0](pixels_BCHW, torch.zeros(2, dtype=torch.long))
    ours = {"image": recipe.features(x_BCHW, "image"), "text": recipe.features(PARTS["text"][0](texts), "text")}
    z = {m: F.normalize(recipe.heads[m](h_BD), dim=1) for m, h_BD in ours.items()}
    logits = recipe.losses["image-text"].log_scale.exp() * z["image"] @ z["text"].T

    model = CLIPModel.from_pretrained(tmp_path / "transformers")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "transformers")
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    processed = CLIPImageProcessor.from_pretrained(tmp_path / "transformers")(pictures, return_tensors="pt")
    theirs = model(**inputs, **processed).logits_per_image
    scaled = 1e-4  # of logits: ten times what embeddings may differ by, as the scale is 14
    torch.testing.assert_close(theirs, logits, rtol=0, atol=scaled)

    place = f"local-dir:{tmp_path / 'open_clip'}"
    other, _, preprocess = open_clip.create_model_and_transforms(place)
    x_BCHW = torch.stack([preprocess(picture) for picture in pictures])
    zs = other.eval()(x_BCHW, open_clip.get_tokenizer(place)(texts))
    torch.testing.assert_close(zs[2] * zs[0] @ zs[1].T, logits, rtol=0, atol=scaled)


NO_CLIP: dict[str, tuple[dict[str, Any], str]] = {
    "pool": ({"pool": FirstPool()}, "pool of text: FirstPool; a CLIP has LastPool"),
    "head": ({"norm": True}, "heads.text: a CLIP has a LayerNorm before one linear map for images alone"),
    "loss": ({"loss": SigLIP()}, "loss: SigLIP; a CLIP is trained by InfoNCE"),
}


@pytest.mark.parametrize("name", NO_CLIP)
def test_what_a_clip_has_not_is_named(name: str, tmp_path: Path) -> None:
    options, message = NO_CLIP[name]
    with pytest.raises(ValueError, match=message):
        clips.OpenClipFormat().write(clip(**options), PARTS, tmp_path)


def test_towers_of_another_architecture_are_named(tmp_path: Path) -> None:
    towers = Towers(image=ConvTower([8]), text=TextTower(264, 16, 1, 2, 24))
    with pytest.raises(ValueError, match=r"towers\.image: ConvTower; a CLIP has a TransformersTower"):
        clips.ClipFormat().write(Contrastive(towers, 16), PARTS, tmp_path)
    mixed = clip()
    mixed.towers["text"].model.config.hidden_act = "quick_gelu"
    with pytest.raises(ValueError, match="hidden_act: gelu and quick_gelu; open_clip has"):
        clips.OpenClipFormat().write(mixed, PARTS, tmp_path)
    with pytest.raises(ValueError, match="norm: 'audio': no such name"):
        Contrastive(towers, 16, norm={"audio": False})


def test_pictures_are_cropped_there_as_here(tmp_path: Path) -> None:
    """Where files are read, evaluation takes the central square; packages round pixels after each pass of resizing."""
    import open_clip
    import timm
    from transformers import CLIPImageProcessor

    data = np.kron(np.random.default_rng(0).integers(256, size=(9, 15, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    picture, parts = Image.fromarray(data), {**PARTS, "image": [Images(32), PARTS["image"][0]]}
    with io.BytesIO() as file:
        picture.save(file, "PNG")
        x_BCHW, _ = parts["image"][0]([file.getvalue()])
    ours_BCHW = parts["image"][1](x_BCHW, torch.zeros(1, dtype=torch.long))
    for name, made in CLIPS.items():
        (tmp_path / name).mkdir()
        made().write(clip(), parts, tmp_path / name)
    options: Any = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    recipe: Any = SimpleNamespace(towers={"image": TimmTower("vit_tiny_patch16_224", size=32, options=options)})
    timm_vit.TimmFormat().write(recipe, parts, tmp_path / "timm")
    vit = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "transformers")
    views: list[Callable[[Image.Image], Any]] = [
        open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")[2],
        lambda image: processor(image, return_tensors="pt")["pixel_values"][0],
        timm.data.create_transform(**timm.data.resolve_model_data_config(vit), is_training=False),
    ]
    levels = 4 / 255 / 0.25  # four steps of a colour, of deviation 0.25 at least
    for view in views:
        assert float((view(picture) - ours_BCHW[0]).abs().max()) < levels
    squashed_BCHW = PARTS["image"][0](torch.from_numpy(data.transpose(2, 0, 1))[None], torch.zeros(1, dtype=torch.long))
    assert float((squashed_BCHW - ours_BCHW).abs().max()) > 10 * levels
