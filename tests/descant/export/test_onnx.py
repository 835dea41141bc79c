"""``descant export --to onnx``: graphs of a contrastive run.

CI has not the packages (122 MB): what needs them is skipped there. The first half of an export, torch's, is tried.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import descant
from descant.export.formats import base
from descant.export.formats import onnx_graphs as graphs
from descant.modules.core.batch import Batch
from descant.modules.losses import SigLIP
from descant.modules.tokenizers.text import ByteTokenizer, NgramTokenizer, WordTokenizer
from descant.modules.towers import BagTower, ConvTower, PatchTower, TextTower, Tokens, Tower, Towers, TransformersTower
from descant.modules.towers.heads import AttentionPool, FirstPool, LastPool, MaxPool, Pools
from descant.modules.transforms.image import Pixels
from descant.recipes import Contrastive
from tests.conftest import Result

Cli = Callable[..., Result]
PARTS: dict[str, list[Any]] = {"text": [ByteTokenizer(12)], "image": [Pixels(16, mean=(0.4, 0.5, 0.6))]}
#: The runtime and the exporter are one extra.
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="no onnx: descant[onnx]")
SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def recipe(image: Tower | None = None, text: Tower | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    text = text or TextTower(264, 8, 1, 2, 12, causal=True)
    settings: dict[str, Any] = {"pool": Pools(text=LastPool()), "loss": SigLIP(), **options}
    return Contrastive(Towers(image=image or PatchTower(16, 4, 8, 1, 2), text=text), 6, **settings).eval()


class Rooted(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, h_BTD: Tensor) -> Tensor:
        if self.kind == "branch":
            return h_BTD if float(h_BTD.sum()) > 0 else -h_BTD
        if self.kind == "len":
            return h_BTD + torch.zeros(len(h_BTD), 1, 1)
        return torch.special.bessel_j0(h_BTD)


class Odd(ConvTower):
    """With a layer that no graph holds."""

    def __init__(self, kind: str) -> None:
        super().__init__([8])
        self.odd = Rooted(kind)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        return super().forward(x, mask)._replace(h_BTD=self.odd(super().forward(x, mask).h_BTD))


TOWERS: dict[str, Callable[[], Any]] = {
    "patches": recipe,
    "conv and bag": lambda: recipe(ConvTower([8]), BagTower(264, 8)),
    "first and attention": lambda: recipe(
        TransformersTower(config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **SIZES}),
        pool=Pools(image=FirstPool(), text=AttentionPool(8, 2)),
    ),
    "bert": lambda: recipe(
        text=TransformersTower(config={"model_type": "bert", "vocab_size": 264, **SIZES}),
        pool=MaxPool(),
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_program_takes_any_number_of_inputs(name: str) -> None:
    model = TOWERS[name]()
    for modality in ("image", "text"):
        graph = graphs.describe_graph(PARTS, modality)
        program = graphs.program_of(graphs.ModalityGraph(model, modality), modality, graphs.example(graph, 2))
        for rows in (1, 5):
            x = graphs.example(graph, rows)
            with torch.no_grad():
                z_ND = model.embed(Batch({modality: x}, {modality: torch.ones(rows, dtype=torch.bool)}))[modality]
                torch.testing.assert_close(program.module()(x), z_ND, rtol=0, atol=base.NEAR)


def test_the_layer_that_is_not_exported_is_named() -> None:
    x_BCHW = graphs.example(graphs.describe_graph(PARTS, "image"), 2)
    for kind, line in [
        ("branch", r"towers\.image\.odd: Rooted cannot be exported: it branches on a value of its inputs"),
        ("len", r"towers\.image: Odd cannot be exported: it is made for one number of inputs"),
    ]:
        with pytest.raises(ValueError, match=line):
            graphs.program_of(graphs.ModalityGraph(recipe(Odd(kind)), "image"), "image", x_BCHW)


@needs_onnx
@pytest.mark.slow
def test_the_operator_that_onnx_has_not_is_named(tmp_path: Path) -> None:
    line = r"towers\.image\.odd: Rooted cannot be exported: ONNX has no operator prims\.bessel_j0"
    with pytest.raises(ValueError, match=line):
        graphs.OnnxFormat().write(recipe(Odd("bessel")), PARTS, tmp_path)


def test_what_a_folder_cannot_hold_is_named(tmp_path: Path) -> None:
    made = graphs.OnnxFormat()
    for parts, line in [
        ({"text": PARTS["text"]}, "image: its preprocessing is not known"),
        ({"image": PARTS["image"]}, "text: its tokenizer is not known"),
        ({**PARTS, "text": [WordTokenizer(["fox"], 12)]}, "text: WordTokenizer has no form in transformers"),
    ]:
        with pytest.raises(ValueError, match=line):
            made.write(recipe(), parts, tmp_path)
    sounds = Contrastive(Towers(image=ConvTower([8]), text=TextTower(264, 8, 1, 2, 12), audio=ConvTower([8])), 6)
    with pytest.raises(ValueError, match=r"towers\.audio: --to onnx holds image and text; export --towers image,text"):
        made.write(sounds, PARTS, tmp_path)
    other: Any = nn.Module()
    with pytest.raises(ValueError, match="Module: --to onnx holds towers, pools and heads of one shared space"):
        made.write(other, PARTS, tmp_path)
    assert not list(tmp_path.glob("*.onnx"))


def test_hashed_ngrams_are_a_function_of_the_card() -> None:
    tokenizer, made = NgramTokenizer(n=4, buckets=512, length=12), graphs.OnnxFormat()
    assert graphs.describe_graph({"text": [tokenizer]}, "text")["preprocessing"]["tokenizer"] is None
    made.tokenizer = tokenizer
    code = made.usage("out").partition("input_ids = ")[0].replace("import numpy as np, onnxruntime\n", "")
    space: dict[str, Any] = {}
    exec(code, space)
    for text in ("a red apple", "Sun, naïve 7!", "one two three four five six seven"):
        assert space["ids"](text) == tokenizer([text])[0].tolist()


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from descant.cli.errors import Refusal
    from descant.export import formats

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "onnx" else find(name, *at))
    with pytest.raises(Refusal, match=r"--to onnx: onnx.*: pip install 'descant\[onnx\]'"):
        formats.of("onnx", recipe())


@needs_onnx
@pytest.mark.slow
def test_outputs_that_differ_are_refused_and_large_weights_stand_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "INSIDE", 1000)
    model, made = recipe(), graphs.OnnxFormat()
    made.write(model, PARTS, tmp_path)
    assert made.require_near(model, tmp_path) < made.near
    names = [file.name for file in made.weights(tmp_path)]
    assert names == ["image.onnx", "image.onnx.data", "text.onnx", "text.onnx.data"]
    assert not any(str(Path.cwd()).encode() in file.read_bytes() for file in made.weights(tmp_path))
    described = json.loads((tmp_path / graphs.DESCRIPTION).read_text())
    assert described["similarity"]["image-text"]["bias"] == -10 and described["opset"] == graphs.OPSET
    with torch.no_grad():
        model.heads["text"].layers[-1].weight[0].mul_(2)
    with pytest.raises(ValueError, match="its outputs differ by"):
        made.require_near(model, tmp_path)


@needs_onnx
@pytest.mark.slow
def test_a_run_embeds_in_onnxruntime_as_here(cli: Cli) -> None:
    import onnx
    import onnxruntime
    import tokenizers

    image = "{class_path: PatchTower, init_args: {size: 24, patch: 8, width: 32, depth: 1, heads: 2}}"
    text = "{class_path: TextTower, init_args: {vocab: 8192, width: 32, depth: 1, heads: 2, length: 24}}"
    options = ("--model.towers.image", image, "--model.towers.text", text, "--data.text", "null", "--data.size", "24")
    done = cli("fit", "--config", "contrastive/emoji", *options, "--config", "on/tiny", "--name", "small")
    assert done.rc == 0, done.err
    done = cli("export", "small/001", "--to", "onnx", "--out", "out")
    assert done.rc == 0 and "for onnx, loaded back by it" in done.out and not done.err, done.err
    ours = descant.Embedder("runs/small/001")
    texts = ["a red apple", "Sun", "two naïve foxes"]
    tokenizer = tokenizers.Tokenizer.from_file("out/tokenizer.json")
    input_ids = np.array([row.ids for row in tokenizer.encode_batch(texts)])
    (z_ND,) = onnxruntime.InferenceSession("out/text.onnx").run(["text_embeds"], {"input_ids": input_ids})
    near = graphs.OnnxFormat.near
    torch.testing.assert_close(torch.from_numpy(z_ND), ours.texts(texts), rtol=0, atol=near)
    steps = json.loads(Path("out/preprocessing.json").read_text())["graphs"]["image"]["preprocessing"]
    x_NHWC = np.random.default_rng(0).integers(256, size=(4, 24, 24, 3), dtype=np.uint8)
    pixels = ((x_NHWC / 255 - steps["mean"]) / steps["std"]).transpose(0, 3, 1, 2).astype(np.float32)
    (z_ND,) = onnxruntime.InferenceSession("out/image.onnx").run(["image_embeds"], {"pixel_values": pixels})
    pictures = [Image.fromarray(x_HWC) for x_HWC in x_NHWC]
    torch.testing.assert_close(torch.from_numpy(z_ND), ours.images(pictures), rtol=0, atol=near)
    np.testing.assert_allclose(np.linalg.norm(z_ND, axis=1), 1, atol=near)
    assert onnx.load("out/image.onnx").opset_import[0].version == graphs.OPSET
    card = Path("out/README.md").read_text()
    assert "`image.onnx` has SHA-256" in card and "`text.onnx` has" in card and "They were made from" in card
    assert Path("out/DATA-NOTICE.md").is_file()
