"""PretrainedTower: the embeddings of open_clip, transformers, timm and sentence-transformers, from their folders."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from descant.datamodules.fields.fields import ImageField
from descant.modules.core.batch import Batch
from descant.modules.tokenizers.text import ByteTokenizer, PretrainedTokenizer, require_fit
from descant.modules.towers import Frozen, PretrainedTower, Towers
from descant.modules.towers.heads import FirstPool, Pools
from descant.modules.transforms.image import Pixels
from descant.recipes import Contrastive
from descant.recipes.base.shared_space import SharedSpace
from tests.modules.towers import _asserts, folders
from tests.modules.towers.folders import LENGTH, MEAN, SIDE, STD

#: What an embedding may differ by from its owner's, of numbers of size 1: two roundings of pixels through two layers.
NEAR = 1e-5
X = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
VIT: dict[str, Any] = {"patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
CONV: dict[str, Any] = {"channels": [8, 8, 8, 16], "stem_width": 8}
BIG = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
TEXTS = ["red apple", "a green car a", "car"]


def normal(x_BCHW: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    """Pixels in -1..1 as an owner reads them."""
    mean_3, std_3 = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (x_BCHW * 0.5 + 0.5 - mean_3) / std_3


def ids_of(folder: Path) -> Tensor:
    return PretrainedTokenizer(folder=folder, length=LENGTH)(TEXTS)


def open_clip_of(folder: Path) -> Any:
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval()


def timm_of(folder: Path) -> Any:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()


def of_sentence(folder: Path, made: Any, modes: tuple[str, ...] = ("mean",)) -> Tensor:
    """Transformer, pooling, dense layer and normalisation, each written out."""
    model, linear = made
    x_BT = ids_of(folder)
    mask_BT = (x_BT != 0).long()
    h_BTD = model(x_BT, attention_mask=mask_BT).last_hidden_state
    texts = [h_TD[: int(mask_T.sum())] for h_TD, mask_T in zip(h_BTD, mask_BT, strict=True)]
    h_BD = torch.stack([torch.cat([POOLS[mode](h_TD) for mode in modes]) for h_TD in texts])
    return F.normalize(linear(h_BD).tanh(), dim=1)


#: Ways to pool the tokens ``[T, D]`` of one text.
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h_TD: h_TD.mean(0),
    "cls": lambda h_TD: h_TD[0],
    "max": lambda h_TD: h_TD.amax(0),
    "lasttoken": lambda h_TD: h_TD[-1],
    "mean_sqrt_len_tokens": lambda h_TD: h_TD.sum(0) / len(h_TD) ** 0.5,
    "weightedmean": lambda h_TD: sum((k + 1) * h_D for k, h_D in enumerate(h_TD)) / sum(range(1, len(h_TD) + 1)),
}


#: Name -> part, what makes the folder, and what its owner computes of pixels or ids.
OWNERS: dict[str, tuple[Any, Callable[[Path], Any], Callable[[Path, Any], Tensor]]] = {
    "clip": ("image", folders.clip, lambda at, m: m.get_image_features(normal(X)).pooler_output),
    "clip-text": ("text", folders.clip, lambda at, m: m.get_text_features(ids_of(at)).pooler_output),
    "clip-old": (
        "text",
        lambda at: folders.clip(at, eos=2),
        lambda at, m: m.get_text_features(ids_of(at)).pooler_output,
    ),
    "siglip": ("image", folders.siglip, lambda at, m: m.get_image_features(X).pooler_output),
    "siglip-text": ("text", folders.siglip, lambda at, m: m.get_text_features(ids_of(at)).pooler_output),
    "siglip-masked": (
        "text",
        lambda at: folders.siglip(at, ("input_ids", "attention_mask")),
        lambda at, m: m.get_text_features(ids_of(at), (ids_of(at) != 0).long()).pooler_output,
    ),
    "dinov2": (None, folders.dino, lambda at, m: m(normal(X)).pooler_output),
    "dinov3": ("image", lambda at: folders.dino(at, 3), lambda at, m: m(normal(X)).pooler_output),
    "timm": (None, lambda at: folders.timm(at, img_size=SIDE, **VIT), lambda at, m: timm_of(at)(normal(X))),
    "timm-conv": (None, lambda at: folders.timm(at, "resnet10t", **CONV), lambda at, m: timm_of(at)(normal(BIG))),
    "open_clip": ("image", folders.open_clip, lambda at, m: open_clip_of(at).encode_image(normal(X))),
    "open_clip-text": ("text", folders.open_clip, lambda at, m: open_clip_of(at).encode_text(ids_of(at))),
    "open_clip-custom": (
        "text",
        lambda at: folders.open_clip(at, True, pool_type="last", no_causal_mask=True),
        lambda at, m: open_clip_of(at).encode_text(ids_of(at)),
    ),
    "sentence": (None, folders.sentence, of_sentence),
}


def input_of(name: str, tower: PretrainedTower) -> Tensor:
    if tower.reads == "text":
        return ids_of(tower.folder)
    return BIG if name == "timm-conv" else X


@pytest.mark.parametrize("name", OWNERS)
def test_an_embedding_is_its_owners(name: str, tmp_path: Path) -> None:
    part, make, own = OWNERS[name]
    made = make(tmp_path)
    tower = PretrainedTower(tmp_path, part)
    assert all(module.training for module in tower.modules())
    tower.eval()
    x = input_of(name, tower)
    with torch.no_grad():
        z_BD, h_B1D = own(tmp_path, made), tower(x).h_BTD
    assert h_B1D.shape == (3, 1, tower.width) and z_BD.std() > 0.01
    torch.testing.assert_close(h_B1D[:, 0], z_BD, rtol=0, atol=NEAR)
    _asserts.check_tokens(tower, x, 1)
    _asserts.check_rows_independent(tower, x)
    _asserts.check_every_gradient(without_dropout(tower), x if tower.reads == "image" else every_id(tower, x))
    _asserts.check_keys_unchanged(tower)
    assert Frozen(tower).projected and not any(name.endswith("311") for name in tower.state_dict())


def without_dropout(tower: PretrainedTower) -> PretrainedTower:
    for module in tower.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return tower


def every_id(tower: PretrainedTower, x: Tensor) -> Tensor:
    """Texts of all positions that the tower has."""
    most = tower.encoder.most or LENGTH
    return torch.cat([x[:, :1], torch.full((3, most - 2), 5), torch.full((3, 1), folders.VOCABULARY - 1)], dim=1)


@pytest.mark.parametrize("name", ["clip", "clip-text", "siglip", "siglip-text", "dinov2", "timm", "sentence"])
def test_tokens_are_what_is_pooled(name: str, tmp_path: Path) -> None:
    part, make, _ = OWNERS[name]
    made = make(tmp_path)
    tower = PretrainedTower(tmp_path, part, output="tokens").eval()
    x = input_of(name, tower)
    h_BTD, mask_BT = tower(x)
    real_BT = x != 0 if tower.reads == "text" else torch.ones(h_BTD.shape[:2], dtype=torch.bool)
    if name == "clip-text":
        assert tower.pad == folders.VOCABULARY - 1  # the end itself, which is no padding
        real_BT = torch.arange(LENGTH) <= (x == tower.pad).int().argmax(dim=1)[:, None]
    assert torch.equal(mask_BT, real_BT) and not tower.projected
    model = {"clip": "vision_model", "siglip": "vision_model", "clip-text": "text_model", "siglip-text": "text_model"}
    owner = getattr(made, model[name]) if name in model else made[0] if name == "sentence" else made
    pixels = X if name == "siglip" else normal(X)
    with torch.no_grad():
        if name == "timm":
            theirs = owner.forward_features(pixels)
        elif tower.reads == "image":
            theirs = owner(pixels).last_hidden_state
        else:
            theirs = owner(x, attention_mask=None if name.startswith("siglip") else real_BT.long()).last_hidden_state
    torch.testing.assert_close(h_BTD[mask_BT], theirs[mask_BT], rtol=0, atol=NEAR)
    _asserts.check_every_gradient(without_dropout(tower), x if tower.reads == "image" else every_id(tower, x))


@pytest.mark.parametrize("modes", [("cls",), ("max",), ("lasttoken", "mean"), ("weightedmean", "mean_sqrt_len_tokens")])
def test_sentences_are_pooled_in_each_way(modes: tuple[str, ...], tmp_path: Path) -> None:
    made = folders.sentence(tmp_path, list(modes) if len(modes) > 1 else modes[0])
    with torch.no_grad():
        z_BD = PretrainedTower(tmp_path).eval()(ids_of(tmp_path)).h_BTD[:, 0]
        torch.testing.assert_close(z_BD, of_sentence(tmp_path, made, modes), rtol=0, atol=NEAR)


def test_earlier_folders_of_sentences_are_read(tmp_path: Path) -> None:
    made = folders.sentence(tmp_path, dense=False, normalize=False)
    flags = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(flags))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 6, "do_lower_case": false}')
    kinds = [("", "models.Transformer"), ("1_Pooling", "models.Pooling")]
    steps = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    tower = PretrainedTower(tmp_path).eval()
    assert tower.encoder.rest[0].modes == ("cls",)  # type: ignore[union-attr, index]
    x_BT = PretrainedTokenizer(folder=tmp_path, length=6)(TEXTS)
    with torch.no_grad():
        z_BD = made[0](x_BT, attention_mask=(x_BT != 0).long()).last_hidden_state[:, 0]
        torch.testing.assert_close(tower(x_BT).h_BTD[:, 0], z_BD, rtol=0, atol=NEAR)
    with pytest.raises(ValueError, match="it reads 6 ids, not 8: set the tokenizer's length to 6"):
        tower(ids_of(tmp_path))


# what comes before: images and texts --------------------------------------------------------------------------------


def test_images_and_texts_are_prepared_as_the_owner_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor

    model = folders.clip(tmp_path, pad="<pad>")
    field = ImageField(size=SIDE, filter="bicubic")
    colours_BHWC = torch.randint(256, (2, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    for side in (SIDE, 40):
        images = [Image.fromarray(x.numpy()).resize((side, side)) for x in colours_BHWC]
        x_BCHW, errors = field.decode([encoded(image) for image in images], None)
        ours_BCHW = field.pixels(x_BCHW, torch.zeros(2, dtype=torch.long))
        theirs_BCHW = processor(images, return_tensors="pt")["pixel_values"]
        tower = PretrainedTower(tmp_path, "image").eval()
        assert errors == [None, None]
        with torch.no_grad():
            z_BD, own_BD = tower(ours_BCHW).h_BTD[:, 0], model.get_image_features(theirs_BCHW).pooler_output
        # resized images are rounded to 1 / 255 by each: of pixels over a deviation of 0.2, one step is 0.02
        torch.testing.assert_close(normal(ours_BCHW), theirs_BCHW, rtol=0, atol=NEAR if side == SIDE else 0.021)
        torch.testing.assert_close(z_BD, own_BD, rtol=0, atol=NEAR if side == SIDE else 0.1)
    theirs = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding="max_length", return_tensors="pt")
    assert torch.equal(ids_of(tmp_path), theirs.input_ids)


def encoded(image: Image.Image) -> bytes:
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


def test_data_that_prepares_images_otherwise_is_refused_or_named(tmp_path: Path, capsys: Any) -> None:
    folders.clip(tmp_path)
    image, text = PretrainedTower(tmp_path, "image"), PretrainedTower(tmp_path, "text")
    fields = SimpleNamespace(fields={"image": ImageField(size=SIDE, mean=MEAN, std=STD)})
    for data, name, tower, line in [
        (fields, "image", image, r"mean \[0.4, 0.5, 0.6\], std .* towers.image applies its own, \[0.4, 0.5, 0.6\]"),
        (SimpleNamespace(pixels=Pixels(32)), "image", Frozen(image), "images of 32 pixels, and towers.image reads 16"),
        (SimpleNamespace(parts={"a": SimpleNamespace(pixels=Pixels(8))}), "image", image, "images of 8 pixels"),
        (None, "image", text, "towers.image: folder .* reads text"),
        (None, "text", image, "towers.text: folder .* reads image"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            tower.require_data(name, data, "fit")
        assert "\n" not in str(caught.value)
    capsys.readouterr()
    image.require_data("image", SimpleNamespace(fields={"image": ImageField(size=SIDE)}), "fit")
    assert "bicubic (squash), and the data's are resized by bicubic (crop)" in capsys.readouterr().err
    image.require_data("image", SimpleNamespace(pixels=Pixels(SIDE)), "fit")
    assert "resized by bilinear (squash)" in capsys.readouterr().err


def test_a_tokenizer_without_the_ids_is_refused(tmp_path: Path) -> None:
    folders.clip(tmp_path / "clip")
    folders.sentence(tmp_path / "bert")
    tower = PretrainedTower(tmp_path / "clip", "text")
    require_fit(PretrainedTokenizer(folder=tmp_path / "clip", length=LENGTH), tower)
    with pytest.raises(ValueError, match="ByteTokenizer has 264 ids, and tower text embeds 9; the tokenizer of a pret"):
        require_fit(ByteTokenizer(), tower)
    with pytest.raises(ValueError, match="PretrainedTokenizer pads with 0, tower text with 8"):
        require_fit(PretrainedTokenizer(folder=tmp_path / "bert"), tower)
    other = PretrainedTokenizer(folder=tmp_path / "clip", length=LENGTH)
    other.end = ()
    with pytest.raises(ValueError, match="ends texts with no id, and tower text embeds a text at id 8"):
        require_fit(other, tower)


# in a recipe --------------------------------------------------------------------------------------------------------


def recipe_of(folder: Path, **options: Any) -> Contrastive:
    towers = Towers(image=PretrainedTower(folder, "image"), text=PretrainedTower(folder, "text"))
    return Contrastive(towers, **{"width": 12, **options})


def batch_of(folder: Path) -> Batch:
    there_B = torch.ones(3, dtype=torch.bool)
    return Batch({"image": X, "text": ids_of(folder)}, {"image": there_B, "text": there_B})


def test_a_recipe_begins_with_the_owners_embeddings(tmp_path: Path) -> None:
    model = folders.clip(tmp_path)
    recipe = recipe_of(tmp_path, pool=FirstPool(), norm=True).eval()
    assert not [name for name, _ in recipe.named_parameters() if name.startswith(("pools", "heads"))]
    batch = batch_of(tmp_path)
    with torch.no_grad():
        z, owner = recipe.embed(batch), model(input_ids=batch.inputs["text"], pixel_values=normal(X))
    torch.testing.assert_close(z["image"], owner.image_embeds, rtol=0, atol=NEAR)
    torch.testing.assert_close(z["text"], owner.text_embeds, rtol=0, atol=NEAR)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"width": 16}, "width 16: towers.image gives embeddings of 12: width 12, or output tokens of it"),
        ({"norm": {"audio": True}}, "norm: 'audio': no such name"),
    ]
    for options, line in cases:
        with pytest.raises(ValueError, match=line):
            recipe_of(tmp_path, **options)
    tokens = Towers(image=PretrainedTower(tmp_path, "image", output="tokens"))
    made = SharedSpace(tokens, width=5, pool=Pools(image=FirstPool()))
    assert made.heads["image"](torch.zeros(2, 24)).shape == (2, 5)


def test_what_left_comes_back(tmp_path: Path) -> None:
    """Folders that ``descant export --to`` writes have the embeddings of the recipe."""
    from descant.export.formats.base import NEAR as APART
    from descant.export.formats.clip import ClipFormat, OpenClipFormat
    from tests.descant.export.test_formats import PARTS, clip

    recipe, tokenizer = clip(), PARTS["text"][0]
    for name, made in (("transformers", ClipFormat()), ("open_clip", OpenClipFormat())):
        (tmp_path / name).mkdir()
        made.write(recipe, PARTS, tmp_path / name)
        towers = Towers(**{m: PretrainedTower(tmp_path / name, m) for m in ("image", "text")})  # type: ignore[arg-type]
        back = Contrastive(towers, width=16).eval()
        own = PretrainedTokenizer(folder=tmp_path / name, length=24)
        raw_BCHW, draw_B = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
        there_B = torch.ones(2, dtype=torch.bool)
        for steps, ids, model in ((PARTS["image"][0], tokenizer, recipe), (Pixels(32), own, back)):
            inputs = {"image": steps(raw_BCHW, draw_B), "text": ids(["a red apple", "naïve"])}
            with torch.no_grad():
                z = model.embed(Batch(inputs, {"image": there_B, "text": there_B}))
            if model is recipe:
                left = z
        for m in ("image", "text"):
            torch.testing.assert_close(z[m], left[m], rtol=0, atol=APART)


def test_random_weights_of_a_folder_need_none(tmp_path: Path) -> None:
    for name, (part, make, _) in OWNERS.items():
        if name in ("clip", "siglip-text", "dinov2", "timm", "open_clip-text", "sentence"):
            make(tmp_path / name)
            whole = PretrainedTower(tmp_path / name, part)
            for file in (*(tmp_path / name).rglob("*.safetensors"), *(tmp_path / name).rglob("*.bin")):
                file.unlink()
            with pytest.raises(ValueError, match=r"no weights in it|cannot be read"):
                PretrainedTower(tmp_path / name, part)
            before = torch.get_rng_state()
            empty = PretrainedTower(tmp_path / name, part, weights=False)
            assert torch.equal(torch.get_rng_state(), before)
            empty.load_state_dict(whole.state_dict())
            x = input_of(name, whole)
            assert torch.equal(empty.eval()(x).h_BTD, whole.eval()(x).h_BTD)


# refusals -----------------------------------------------------------------------------------------------------------


def test_refusals_are_one_line(tmp_path: Path) -> None:
    folders.clip(tmp_path / "clip")
    folders.dino(tmp_path / "dino")
    folders.timm(tmp_path / "timm", img_size=SIDE, **VIT)
    folders.open_clip(tmp_path / "oc")
    model, _ = folders.sentence(tmp_path / "st")
    model.save_pretrained(tmp_path / "bert")

    def changed(name: str, file: str = "config.json", **values: Any) -> Path:
        """A copy of a folder with other values in one of its files."""
        copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / name, copy)
        if not values:
            return copy
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**content, **values} if isinstance(content, dict) else values["steps"]))
        return copy

    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    bare = changed("dino")
    (bare / "preprocessor_config.json").unlink()
    torn = changed("clip")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:200])
    pickled = changed("oc")
    (pickled / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, pickled / "open_clip_pytorch_model.bin")
    index = changed("clip")
    weights = {"weight_map": {"text_projection.weight": "../../elsewhere.safetensors"}}
    (index / "model.safetensors.index.json").write_text(json.dumps(weights))
    adapter = changed("dino")
    (adapter / "adapter_config.json").write_text("{}")
    wrong = changed("timm")
    save_file({"cls_token": torch.zeros(1)}, wrong / "model.safetensors")
    steps = json.loads((tmp_path / "st/modules.json").read_text())
    oc = json.loads((tmp_path / "oc/open_clip_config.json").read_text())["model_cfg"]
    cut = changed("clip", "preprocessor_config.json", size={"height": 16, "width": 24}, do_center_crop=False)

    def model_cfg(**sides: Any) -> Path:
        return changed("oc", "open_clip_config.json", model_cfg={**oc, **sides})

    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "none", {}, "none: no such folder$"),
        (Path("google/siglip2-base"), {}, "no such folder; of a hub: hub:google/siglip2-base, with --trust hub"),
        (Path("hub:google/siglip2-base"), {}, "folder hub:google/siglip2-base: of a hub; --trust hub lets it be"),
        (tmp_path / "empty", {}, "no config.json or open_clip_config.json or modules.json in it"),
        (tmp_path / "other", {}, "has neither a model_type .transformers. nor an architecture .timm."),
        (changed("dino", model_type="dinov22"), {}, "no model_type 'dinov22'; the nearest are dinov"),
        (changed("timm", architecture="vit_tiny_patch16_22"), {}, "timm has no such model; the nearest are vit_tiny"),
        (changed("timm", architecture="hf-hub:timm/resnet18"), {}, "timm has no such model"),
        (changed("timm", model_args={"pretrained": True}), {}, "options pretrained: it loads files or downloads"),
        (changed("clip", auto_map={"AutoModel": "code.Model"}, model_type="own"), {}, "no model_type 'own'"),
        (tmp_path / "clip", {}, "part: image or text; clip has both"),
        (tmp_path / "oc", {}, "part: image or text; open_clip has both"),
        (tmp_path / "dino", {"part": "text"}, "part text: dinov2 reads image alone"),
        (tmp_path / "st", {"part": "image"}, "part image: bert reads text alone"),
        (tmp_path / "bert", {}, "bert has no embedding of texts of its own: output tokens and a pool, or"),
        (tmp_path / "oc", {"part": "image", "output": "tokens"}, "of open_clip's models embeddings are read"),
        (bare, {}, "no preprocessor_config.json in it: give size, mean and std"),
        (
            tmp_path / "dino",
            {"mean": (0.1, 0.2, 0.3)},
            r"mean \[0.1, 0.2, 0.3\], and its folder has \[0.4, 0.5, 0.6\]",
        ),
        (cut, {"part": "image"}, r"its images are \[16, 24\] pixels; squares are read"),
        (torn, {"part": "image"}, "cannot be read"),
        (pickled, {"part": "image"}, "open_clip_pytorch_model.bin: cannot be read .*may run code"),
        (index, {"part": "image"}, "'../../elsewhere.safetensors' leads out of the folder"),
        (adapter, {}, "an adapter .adapter_config.json., whose model may be elsewhere"),
        (wrong, {}, "keys missing, 0 unexpected, 1 of another shape"),
        (
            model_cfg(text_cfg={"hf_model_name": "org/bert"}),
            {"part": "text"},
            "hf_model_name org/bert: a model of a hub",
        ),
        (
            model_cfg(vision_cfg={"timm_model_name": "hf-hub:a/b"}),
            {"part": "image"},
            "timm_model_name hf-hub:a/b: timm has",
        ),
        (model_cfg(vision_cfg={"layerss": 2}), {"part": "image"}, "vision_cfg of open_clip_config.json: .*layerss"),
        (model_cfg(multimodal_cfg={}), {"part": "image"}, "is of no CLIP of two towers"),
        (
            changed("st", "modules.json", steps=[{**steps[0], "type": "models.WeightedLayers"}]),
            {},
            "'WeightedLayers': no su",
        ),
        (
            changed("st", "modules.json", steps=[steps[0], {**steps[1], "path": "../st/1_Pooling"}]),
            {},
            "leads out of the",
        ),
        (
            changed("st", "1_Pooling/config.json", pooling_mode="men"),
            {},
            "pooling_mode 'men': no such name; did you mean mean",
        ),
        (
            changed("st", "2_Dense/config.json", activation_function="a.Tan"),
            {},
            "'Tan': no such name; did you mean Tanh",
        ),
        (changed("st", "2_Dense/config.json", use_residual=True), {}, "a dense layer with a residual"),
    ]
    for folder, options, line in cases:
        with pytest.raises(ValueError, match=line) as caught:
            PretrainedTower(folder, **options)
        assert "\n" not in str(caught.value)
    made = PretrainedTower(bare, size=SIDE, mean=MEAN, std=STD)
    assert made.input is not None and made.input.mean == MEAN


#: Folder -> the sizes that it takes (of 12, 16, 20, 24, 64), and its part.
TAKEN: dict[str, tuple[Callable[[Path], Any], str | None, set[int]]] = {
    "clip": (folders.clip, "image", {16}),
    "siglip": (folders.siglip, "image", {16}),
    "dinov2": (folders.dino, None, {16, 24, 64}),
    "dinov3": (lambda at: folders.dino(at, 3), None, {16, 24, 64}),
    "timm": (lambda at: folders.timm(at, img_size=SIDE, **VIT), None, {16}),
    "timm-conv": (lambda at: folders.timm(at, "resnet10t", **CONV), None, {12, 16, 20, 24, 64}),
    "open_clip": (folders.open_clip, "image", {16}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_size_that_the_model_does_not_take_is_refused_at_construction(name: str, tmp_path: Path) -> None:
    make, part, taken = TAKEN[name]
    make(tmp_path)
    for size in (0, 12, 16, 20, 24, 64):
        if size in taken:
            x = torch.zeros(2, 3, size, size)
            assert PretrainedTower(tmp_path, part, size=size)(x).h_BTD.isfinite().all()  # type: ignore[arg-type]
            continue
        with pytest.raises(ValueError, match=rf"size {size}: .* reads (images of 16|multiples of)") as caught:
            PretrainedTower(tmp_path, part, size=size)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_options_of_no_such_name_or_of_the_other_part_are_refused(tmp_path: Path) -> None:
    folders.clip(tmp_path / "clip")
    folders.dino(tmp_path / "bare")
    (tmp_path / "bare/preprocessor_config.json").unlink()
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("clip", {"part": "audio"}, r"part 'audio': no such name \(known: image, text\)"),
        ("clip", {"part": "imgae"}, "part 'imgae': no such name; did you mean image"),
        ("clip", {"part": "image", "output": "pooled"}, r"output 'pooled': no such name \(known: embedding, tokens\)"),
        ("clip", {"part": "text", "size": 16}, "size, mean, std: of images, and clip reads text here"),
        ("clip", {"part": "image", "mean": (0.4, 0.5)}, "mean .* and its folder has .*; leave it out"),
        ("bare", {"size": 16, "mean": (0.4, 0.5), "std": STD}, "three numbers each, std above 0"),
        ("bare", {"size": 16, "mean": MEAN, "std": (0.0, 1.0, 1.0)}, "three numbers each, std above 0"),
        ("bare", {"size": 20, "mean": MEAN, "std": STD}, "size 20: dinov2 reads multiples of 8; the nearest is 16"),
    ]
    for folder, options, line in cases:
        with pytest.raises(ValueError, match=line) as caught:
            PretrainedTower(tmp_path / folder, **options)
        assert "\n" not in str(caught.value)


def test_inputs_of_another_kind_are_refused(tmp_path: Path) -> None:
    folders.siglip(tmp_path)
    image, text = PretrainedTower(tmp_path, "image"), PretrainedTower(tmp_path, "text")
    ids_BT = ids_of(tmp_path)
    for tower, x, line in [
        (image, ids_BT, r"it reads images, float \[B, 3, S, S\], not int64 \[3, 8\]"),
        (image, BIG, r"it reads images of 16 pixels, not float32 \[3, 3, 32, 32\]: set the data's size"),
        (text, X, r"it reads ids of texts, int \[B, T\], not float32"),
        (
            text,
            ids_BT[:, :6],
            "it reads texts of exactly 8 ids, padding included, not 6: set the tokenizer's length to 8",
        ),
        (text, ids_BT + 9, "token id 17: siglip has 9 of them; its own tokenizer is PretrainedTokenizer"),
    ]:
        with pytest.raises(ValueError, match=line):
            tower(x)
    with pytest.raises(ValueError, match="siglip has no input tokens to mask"):
        image(X, torch.ones(3, 4, dtype=torch.bool))


def test_prompts_of_an_owner_are_named(tmp_path: Path, capsys: Any) -> None:
    folders.sentence(tmp_path)
    config = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(config))
    PretrainedTower(tmp_path)
    assert "its owner puts 'query: ' before each text" in capsys.readouterr().err
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(ValueError, match="do_lower_case: its texts are lowered before its tokenizer"):
        PretrainedTower(tmp_path)
