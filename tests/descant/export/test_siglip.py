"""A run of SigLIP's architecture as transformers' SiglipModel, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from descant.export import formats
from descant.export.formats import base, clip, siglip
from descant.modules.losses import InfoNCE, SigLIP
from descant.modules.tokenizers.text import ByteTokenizer, PretrainedTokenizer
from descant.modules.towers import ConvTower, PatchTower, PretrainedTower, TextTower, Towers, TransformersTower
from descant.modules.towers.base import Frozen, Tower
from descant.modules.towers.heads import AttentionPool, LastPool, MAPPool, MeanPool, Pools
from descant.modules.transforms.image import Pixels
from descant.recipes import Contrastive
from tests.conftest import Result
from tests.descant.export import test_judged
from tests.modules.towers import folders

LENGTH, TEXTS = 12, ["a red fox", "naïve", "the sun beyond the row"]
PARTS: dict[str, list[Any]] = {"text": [ByteTokenizer(LENGTH)], "image": [Pixels(32, mean=(0.4, 0.5, 0.6))]}
VISION: dict[str, Any] = {**folders.SIZES, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}


def recipe_of(image: Tower | None = None, pool: Any = None, text: Tower | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    image = PatchTower(32, 8, 16, 2, 2, mlp_ratio=3.0) if image is None else image
    text = TextTower(264, 24, 2, 2, LENGTH, attend_padding=True) if text is None else text
    pools = Pools(image=MAPPool(16, 2, mlp_ratio=3.0) if pool is None else pool, text=options.pop("last", LastPool()))
    settings: dict[str, Any] = {"norm": {"text": False}, "project": {"image": False}, "loss": SigLIP()} | options
    return folders.stirred(Contrastive(Towers(image=image, text=text), 16, pool=pools, **settings))


TOWERS: dict[str, Callable[[], tuple[Tower, Any]]] = {
    "patches": lambda: (Frozen(PatchTower(32, 8, 16, 2, 2)), MAPPool(16, 2)),
    "transformers": lambda: (TransformersTower(config=dict(VISION)), MAPPool(16, 2, 2.0, eps=1e-6, tanh=True)),
}


@pytest.mark.parametrize("name", TOWERS)
def test_embeddings_and_logits_are_those_of_the_run(name: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor, SiglipModel

    recipe = recipe_of(*TOWERS[name]())
    made = formats.of("transformers", recipe)
    made.write(recipe, PARTS, tmp_path)
    assert type(made) is siglip.SiglipFormat and made.require_near(recipe, tmp_path) < base.NEAR
    pixels_BCHW = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    x_BCHW = PARTS["image"][0](pixels_BCHW, torch.zeros(2, dtype=torch.long))
    with torch.no_grad():
        *z, logits = siglip.Siglip.of(recipe).ours(x_BCHW, PARTS["text"][0](TEXTS))
        pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels_BCHW]
        processor: Any = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False)
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        inputs = processor(text=TEXTS[:2], images=pictures, **options)
        assert set(inputs) == {"input_ids", "pixel_values"}  # a mask would hide the padding
        output = SiglipModel.from_pretrained(tmp_path, trust_remote_code=False)(**inputs)
    torch.testing.assert_close(output.image_embeds, z[0], rtol=0, atol=base.NEAR)
    torch.testing.assert_close(output.text_embeds, z[1][:2], rtol=0, atol=base.NEAR)
    scale = float(recipe.losses["image-text"].scale().detach())
    torch.testing.assert_close(output.logits_per_image, logits[:, :2], rtol=0, atol=scale * base.NEAR)
    with torch.no_grad():
        recipe.losses["image-text"].bias.add_(1.0)
    with pytest.raises(ValueError, match="its outputs differ"):
        made.require_near(recipe, tmp_path)


def test_the_export_is_a_tower_here(tmp_path: Path) -> None:
    recipe = recipe_of()
    siglip.SiglipFormat().write(recipe, PARTS, tmp_path)
    x = {"image": torch.randn(2, 3, 32, 32), "text": PretrainedTokenizer(tmp_path, length=LENGTH)(TEXTS)}
    assert torch.equal(x["text"][:2], PARTS["text"][0](TEXTS[:2]))
    for part in ("image", "text"):
        tower = PretrainedTower(tmp_path, part=part).eval()
        given = x[part]
        if part == "image":  # of the data's mean and deviation; the tower applies them to pixels in -1..1
            given = x[part] * torch.tensor(PARTS["image"][0].std)[:, None, None]
            given = 2 * (given + torch.tensor(PARTS["image"][0].mean)[:, None, None]) - 1
        with torch.no_grad():
            ours_BD = recipe.heads[part](recipe.features(x[part], part))
            torch.testing.assert_close(tower(given).h_BTD[:, 0], ours_BD, rtol=0, atol=base.NEAR)


def test_a_siglip_that_came_in_goes_out(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, SiglipModel

    theirs = folders.siglip(tmp_path / "in")
    towers = [PretrainedTower(tmp_path / "in", part=part) for part in ("image", "text")]
    tokenizer = PretrainedTokenizer(tmp_path / "in", length=folders.LENGTH)
    recipe = Contrastive(Towers(image=towers[0], text=Frozen(towers[1])), 16, loss=SigLIP(bias=-9.0)).eval()
    made = formats.of("transformers", recipe)
    made.write(recipe, {"text": [tokenizer], "image": [Pixels(folders.SIDE)]}, tmp_path / "out")
    assert made.require_near(recipe, tmp_path / "out") < base.NEAR
    again = SiglipModel.from_pretrained(tmp_path / "out").state_dict()
    state = {name: x for name, x in theirs.state_dict().items() if not name.startswith("logit_")}
    assert all(torch.equal(again[name], x) for name, x in state.items()) and float(again["logit_bias"]) == -9.0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == [0.5] * 3 and processor.size["height"] == folders.SIDE
    assert PretrainedTokenizer(tmp_path / "out", length=folders.LENGTH)(["red car"]).equal(tokenizer(["red car"]))


NOT: dict[str, tuple[dict[str, Any], str]] = {
    "tower": ({"image": ConvTower([16])}, r"towers\.image: ConvTower; a SigLIP has a PatchTower, or a Transf"),
    "pool": ({"pool": AttentionPool(16, 2)}, "pool of image: AttentionPool; a SigLIP has MAPPool"),
    "heads": ({"pool": MAPPool(16, 4, 3.0)}, "pool of image: heads: MAPPool has 4, and its tower 2"),
    "epsilon": ({"pool": MAPPool(16, 2, 3.0, eps=1e-6)}, "pool of image: eps: MAPPool has 1e-06, and its tower 1e-05"),
    "tanh": ({"pool": MAPPool(16, 2, 3.0, tanh=True)}, "pool of image: tanh: MAPPool has tanh, and its tower none"),
    "head": ({"project": True}, r"heads\.image: Projection; a SigLIP has none: project: \{image: false\}"),
    "text": ({"text": TextTower(264, 24, 1, 2, LENGTH)}, r"towers\.text: TextTower; .* attend_padding: true"),
    "last": ({"last": MeanPool()}, "pool of text: MeanPool; a SigLIP has LastPool"),
    "norm": ({"norm": True}, r"heads\.text: a SigLIP has one linear map of texts: norm: \{text: false\}"),
}


@pytest.mark.parametrize("name", NOT)
def test_what_a_siglip_has_not_is_named(name: str, tmp_path: Path) -> None:
    options, message = NOT[name]
    with pytest.raises(ValueError, match=message):
        siglip.SiglipFormat().write(recipe_of(**options), PARTS, tmp_path)


def test_another_loss_is_named(tmp_path: Path) -> None:
    recipe = recipe_of(*TOWERS["transformers"](), loss=InfoNCE())
    with pytest.raises(ValueError, match=r"towers\.image: siglip_vision_model; .* SigLIP's loss, not InfoNCE"):
        clip.ClipFormat().write(recipe, PARTS, tmp_path)
    with pytest.raises(ValueError, match="loss: InfoNCE; a SigLIP is trained by SigLIP, a scale and a bias"):
        siglip.SiglipFormat().write(recipe, PARTS, tmp_path)
    with pytest.raises(ValueError, match=r"width 8: towers\.image has 16 and no projection: width 16, or project it"):
        Contrastive(Towers(image=PatchTower(32, 8, 16, 1, 2)), 8, project=False)
    with pytest.raises(ValueError, match="project: 'audio': no such name"):
        Contrastive(Towers(image=PatchTower(32, 8, 16, 1, 2)), 8, project={"audio": False})


@pytest.mark.slow
def test_a_run_leaves_as_siglip(cli: Callable[..., Result]) -> None:
    from transformers import SiglipModel

    image = {"class_path": "PatchTower", "init_args": {"size": 16, "patch": 8, "width": 24, "depth": 1, "heads": 2}}
    text = {"vocab": 264, "width": 24, "depth": 1, "heads": 2, "length": 24, "attend_padding": True}
    pools = {"image": {"class_path": "MAPPool", "init_args": {"width": 24, "heads": 2}}, "text": "LastPool"}
    run = json.loads(json.dumps(test_judged.RUN))
    run["model"]["init_args"] |= {
        "loss": {"class_path": "SigLIP"},
        "project": {"image": False},
        "pool": {"class_path": "Pools", "init_args": pools},
        "towers": {
            "class_path": "Towers",
            "init_args": {"image": image, "text": {"class_path": "TextTower", "init_args": text}},
        },
    }
    run["trainer"] |= {"max_steps": 3, "callbacks+": []}
    Path("siglip.yaml").write_text(json.dumps(run))
    for split, rows in (("train", 64), ("test", 8)):
        test_judged.shard(Path(f"pairs/{split}"), rows, seed=len(split))
    done = cli("fit", "--config", "siglip.yaml", "--name", "sig")
    assert done.rc == 0, done.err
    done = cli("export", "sig/001", "--to", "transformers", "--out", "out")
    assert done.rc == 0 and "for transformers, loaded back by it" in done.out, done.err
    assert "SiglipModel.from_pretrained" in Path("out/README.md").read_text()
    assert SiglipModel.from_pretrained("out", trust_remote_code=False).config.text_config.max_position_embeddings == 24
