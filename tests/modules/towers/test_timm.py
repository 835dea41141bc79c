"""TimmTower: tokens, maps and channels-last maps; names, options and weights."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from descant.modules.towers import Frozen, TimmTower
from descant.modules.towers.timm import Option
from tests.modules.towers import _asserts

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VIT: dict[str, Option] = {"depth": 2, "embed_dim": 16, "num_heads": 2}
SMALL = {
    "vit": lambda: TimmTower("vit_tiny_patch16_224", size=32, options=VIT),
    "resnet": lambda: TimmTower("resnet10t", options={"channels": [8, 8, 8, 16], "stem_width": 8}),
    "swin": lambda: TimmTower(
        "swin_tiny_patch4_window7_224",
        size=32,
        options={"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    ),
    "convnext": lambda: TimmTower("convnext_atto", options={"dims": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}),
}
TOKENS = {"vit": 5, "resnet": 1, "swin": 16, "convnext": 1}
BLOCKS = {"vit": 2, "resnet": 4, "swin": 2, "convnext": 4}


@pytest.fixture(params=SMALL)
def kind(request):
    torch.manual_seed(0)
    return request.param


def test_properties(kind):
    tower = SMALL[kind]()
    assert len(tower.blocks()) == BLOCKS[kind]
    _asserts.check_tokens(tower, X, TOKENS[kind])
    _asserts.check_rows_independent(tower, X)
    _asserts.check_deterministic(tower, X)
    _asserts.check_every_gradient(tower, X)
    _asserts.check_frozen(tower, X)
    _asserts.check_keys_unchanged(tower)


def test_checkpointing_keeps_gradients_and_statistics(kind):
    # a thin stem at full size outweighs such thin blocks
    _asserts.check_checkpointing(SMALL[kind](), X, most=0.6 if kind == "vit" else 0.9)


def test_a_frozen_net_inside_a_training_one_keeps_norms_and_dropout_in_eval():
    tower = Frozen(TimmTower("resnet10t", options={"channels": [8, 8, 8, 16], "stem_width": 8, "drop_path_rate": 0.5}))
    torch.nn.Sequential(tower).train()
    statistics = [buffer.clone() for buffer in tower.buffers()]
    first, second = tower(X), tower(X)
    assert torch.equal(first.h_BTD, second.h_BTD)
    assert all(torch.equal(a, b) for a, b in zip(tower.buffers(), statistics, strict=True))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_are_read_and_a_classifier_left_out(tmp_path, suffix):
    donor = SMALL["vit"]()
    state = {**donor.model.state_dict(), "head.weight": torch.zeros(10, 16), "head.bias": torch.zeros(10)}
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    tower = TimmTower("vit_tiny_patch16_224", weights=path, size=32, options=VIT)
    assert torch.equal(tower.eval()(X).h_BTD, donor.eval()(X).h_BTD)


def test_refusals_are_one_line(tmp_path):
    donor = SMALL["vit"]().model.state_dict()
    del donor["norm.weight"]
    donor["extra"] = torch.zeros(1)
    donor["pos_embed"] = torch.zeros(1, 9, 16)
    save_file(donor, tmp_path / "wrong.safetensors")
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "objects.pt")

    def build(weights=None, name="vit_tiny_patch16_224", options=VIT):
        return TimmTower(name, weights=weights and tmp_path / weights, size=32, options=options)

    for make, line in [
        (lambda: build(name="vit_tiny_patch16_22"), "no such model; the nearest are vit_tiny_patch16_"),
        (lambda: build(name="hf-hub:timm/resnet18"), "timm has no such model"),
        (
            lambda: build("wrong.safetensors"),
            "1 keys missing, 1 unexpected, 1 of another shape, such as extra",
        ),
        (lambda: build("wrong.safetensor"), "no such file; did you mean .*wrong.safetensors"),
        (lambda: build("objects.pt"), "cannot be read"),
        (lambda: build(options={"deptj": 2}), "options of vit_tiny_patch16_224: .*deptj"),
        (lambda: build()(X, torch.ones(3, 5, dtype=torch.bool)), "no input tokens to mask"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_importing_towers_imports_no_library_of_models():
    code = "import sys, descant.modules.towers as t; print({'timm', 'transformers', 'peft'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
