"""Weights that nothing has trained: Quantize is refused, Lora and Freeze are reported; loaded ones are neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from descant.callbacks.health.sanity import _check_random_towers
from descant.modules.adaptation.base import Adapt
from descant.modules.adaptation.freeze import Freeze
from descant.modules.adaptation.lora import Lora
from descant.modules.adaptation.quantize import Quantize
from descant.modules.core.loaded import has_loaded_weights
from descant.modules.language import CausalLM
from descant.modules.towers import Frozen, TextTower, TimmTower, Towers, TransformersTower
from descant.recipes import Contrastive
from tests.conftest import Result
from tests.quiet import quiet_trainer

BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 9,
}


def recipe_of(*adapt: Adapt) -> Contrastive:
    """The image is a second text: what is adapted is one tower of two."""
    torch.manual_seed(0)
    towers = Towers(image=text(), text=text())
    return Contrastive(towers, width=4, adapt=list(adapt), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))


def text() -> TextTower:
    return TextTower(vocab=9, width=64, depth=1, heads=2, length=4)


def begin(recipe: Contrastive, folder: Path) -> None:
    """To the optimizer, as a fit begins; no data is needed so far."""
    trainer = quiet_trainer(folder, devices=1, max_steps=1)
    recipe.trainer = trainer
    recipe.configure_model()
    recipe.configure_optimizers()


@pytest.mark.parametrize("bits", [4, 8])
def test_random_weights_are_not_quantized_for_training(tmp_path: Path, bits: Any) -> None:
    line = (
        f"Quantize: towers.text is a TextTower of random weights, which {bits} bits would freeze; nearest: Pretrained"
    )
    with pytest.raises(ValueError, match=line):
        begin(recipe_of(Quantize(bits, towers=["text"]), Lora(r=2, towers=["text"])), tmp_path)


@pytest.mark.parametrize("part", ["tower", "recipe", "resumed"])
def test_loaded_weights_are(tmp_path: Path, part: str) -> None:
    recipe = recipe_of(Quantize(4, towers=["text"]), Lora(r=2, towers=["text"]))
    if part == "tower":
        recipe.towers["text"].load_state_dict(text().state_dict())
    if part == "recipe":
        recipe.load_state_dict(recipe_of().state_dict())
    if part == "resumed":
        recipe.configure_model()
        recipe.load_state_dict(recipe.state_dict())
    begin(recipe, tmp_path)
    assert _check_random_towers(recipe) == []


@pytest.mark.parametrize("adapt", [Lora(r=2, towers=["text"]), Freeze(["text"]), Freeze(["text"], capacity=9)])
def test_towers_that_stay_random_are_reported(adapt: Adapt) -> None:
    recipe, loaded = recipe_of(adapt), recipe_of(adapt)
    loaded.towers["text"].load_state_dict(text().state_dict())
    for one in (recipe, loaded):
        one.configure_model()
    (line,) = _check_random_towers(recipe)
    assert line.startswith("tower text is frozen with random weights")
    assert (
        _check_random_towers(loaded)
        == _check_random_towers(recipe_of())
        == _check_random_towers(L.LightningModule())
        == []
    )


def test_which_parts_were_loaded(tmp_path: Path) -> None:
    lm = CausalLM(9, 16, 1, 1, length=4)
    assert not has_loaded_weights(lm) and not has_loaded_weights(TransformersTower(config=dict(BERT)))
    lm.load_state_dict(lm.state_dict())
    TransformersTower(config=dict(BERT)).model.save_pretrained(tmp_path / "bert")
    torch.save(TimmTower("resnet10t").model.state_dict(), tmp_path / "resnet.pt")
    timm = TimmTower("resnet10t", weights=tmp_path / "resnet.pt")
    parts = [lm, TransformersTower(folder=tmp_path / "bert"), timm, Frozen(timm)]
    assert all(map(has_loaded_weights, parts)) and not has_loaded_weights(TimmTower("resnet10t"))


def test_qlora_of_a_language_model_from_scratch_is_one_line(cli: Callable[..., Result], workplace: Path) -> None:
    words = ("--config", "chat/emoji", "--config", "with/adapt/qlora-lm", "--trainer.max_steps", "1")
    result = cli("fit", *words, "--data.tiny", "true")
    assert result.refusal.startswith("model.adapt: Quantize: lm is a CausalLM of random weights, which 4 bits would")
    assert result.refusal.endswith("nearest: PretrainedLM, or Begin before Quantize, which loads those of a run")
    assert not list(workplace.glob("runs/*/*"))
