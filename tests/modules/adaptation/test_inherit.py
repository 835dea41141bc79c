"""Inherit: inherited towers are bit-identical and frozen; the sham carries no meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from descant.modules.adaptation.inherit import Begin, Inherit, permute_rows
from descant.modules.core.batch import Batch
from descant.modules.towers import BagTower, ConvTower, Towers
from descant.modules.towers.heads import FlattenPool, Pools
from descant.recipes import Contrastive, Staged
from descant.recipes.base.stage import Stage

IMAGE, SKETCH = torch.linspace(-1, 1, 3 * 3 * 16 * 16).view(3, 3, 16, 16), torch.linspace(0, 1, 768).view(3, 1, 16, 16)
TEXT = torch.tensor([[1, 9, 10, 2, 0], [1, 12, 2, 0, 0], [1, 17, 18, 19, 2]])


def recipe(seed: int, width: int = 8, **options: Any) -> Contrastive:
    """Image, text, and a sketch that is new."""
    torch.manual_seed(seed)
    towers = Towers(
        image=ConvTower(widths=[8, 16]), text=BagTower(vocab=20, width=8), sketch=ConvTower(widths=[8, 16], channels=1)
    )
    return Contrastive(towers, width=width, pool=Pools(image=FlattenPool(tokens=16, width=16)), **options)


def batch() -> Batch:
    inputs = {"image": IMAGE, "text": TEXT, "sketch": SKETCH}
    return Batch(dict(inputs), {m: torch.ones(3, dtype=torch.bool) for m in inputs})


def embedded(model: Contrastive) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.eval().embed(batch())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as ``fit`` leaves it, whose batch norms have seen something."""
    model = recipe(7)
    model.train().embed(batch())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": "descant.recipes.Contrastive"}}))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "checkpoints/last.ckpt")
    return tmp_path


def test_inherited_modalities_embed_as_in_the_run(run: Path) -> None:
    old = embedded(recipe_of(run))
    new = recipe(8, adapt=[Inherit(run, ["image"]), Inherit(run, ["text"])])
    assert not torch.equal(embedded(new)["image"], old["image"])
    new.configure_model()
    found = embedded(new)
    for m in ("image", "text"):
        assert torch.equal(found[m], old[m]), m
    assert not torch.allclose(found["sketch"], old["sketch"])


def recipe_of(run: Path) -> Contrastive:
    model = recipe(0)
    model.load_state_dict(torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    return model


def test_training_changes_the_new_one_only(run: Path) -> None:
    model = recipe(8, pairs=[["sketch", "text"]], adapt=[Inherit(run, ["image", "text"])])
    model.configure_model()
    before = embedded(model)
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"sketch", "sketch-text"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model.step(model.terms(batch()), batch()).total.backward()
        optimizer.step()
    after = embedded(model)
    assert torch.equal(after["image"], before["image"]) and torch.equal(after["text"], before["text"])
    assert not torch.allclose(after["sketch"], before["sketch"])


def test_a_modality_that_no_term_needs_is_not_computed_in_training(run: Path) -> None:
    model = recipe(8, pairs=[["sketch", "text"]])
    seen: list[str] = []
    for m, tower in model.towers.items():
        tower.register_forward_hook(lambda *_, m=m: seen.append(m))
    b = batch()
    model.terms(b)
    assert sorted(seen) == ["sketch", "text"] and model.required_modalities == ("text", "sketch")
    del b.inputs["image"], b.present["image"]
    assert set(model.terms(b)) == {"sketch-text"}
    model.embed(batch())
    assert "image" in seen


def test_unfrozen_parts_start_from_the_run_and_train(run: Path) -> None:
    model = recipe(8, adapt=[Inherit(run, ["text"], frozen=False)])
    model.configure_model()
    assert torch.equal(embedded(model)["text"], embedded(recipe_of(run))["text"])
    assert all(p.requires_grad for name, p in model.named_parameters() if ".text." in name)


def test_a_recipe_in_stages_inherits_pools_and_heads_too(run: Path) -> None:
    inner = recipe(8)
    Inherit(run, ["text"], frozen=False).apply(Staged(inner, {"only": Stage()}))
    assert torch.equal(embedded(inner)["text"], embedded(recipe_of(run))["text"])


def test_the_sham_has_the_same_numbers_in_other_rows(run: Path) -> None:
    old, model = recipe_of(run), recipe(8, adapt=[Inherit(run, ["text"], sham="permute")])
    model.configure_model()
    ours, theirs = (nn.Module.state_dict(m.towers["text"]) for m in (model, old))
    (weight,) = ours.values()
    (other,) = theirs.values()
    assert not torch.equal(weight, other)
    assert torch.equal(weight.sort(0).values, other.sort(0).values)
    assert {tuple(row) for row in weight.tolist()} == {tuple(row) for row in other.tolist()}
    # always the same, so that a run that is resumed goes on with what it had
    assert torch.equal(permute_rows(other, "a"), permute_rows(other, "a"))
    assert not torch.equal(permute_rows(other, "a"), permute_rows(other, "b"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modalities": ["txt"]}, "did you mean text"),
        ({"modalities": ["text"], "checkpoint": "none.ckpt"}, "none.ckpt: no such checkpoint of .*last.ckpt"),
        ({"path": "nowhere", "modalities": ["text"]}, "nowhere: no such run, checkpoint or export"),
    ],
)
def test_bad_requests_are_one_line(run: Path, options: dict[str, Any], says: str) -> None:
    model = recipe(8, adapt=[Inherit(**({"path": run} | options))])
    with pytest.raises(ValueError, match=says):
        model.configure_model()


def test_parts_of_other_shapes_are_named(run: Path) -> None:
    model = recipe(8, width=4, adapt=[Inherit(run, ["text"])])
    with pytest.raises(ValueError, match=r"not the weights of this Projection: .*\[8, 8\] in the file and \[4, 8\]"):
        model.configure_model()


def test_begin_loads_all_weights(run: Path) -> None:
    model = recipe(8, adapt=[Begin(run, "last")])
    model.configure_model()
    wanted = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(x, wanted[name]) for name, x in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_weights_of_other_parts_are_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        recipe(8, width=4, adapt=[Begin(run, "last")]).configure_model()
