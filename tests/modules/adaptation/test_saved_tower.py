"""A tower of another run. Runs are written by hand here: a configuration and a checkpoint."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from descant.modules.adaptation.base import Adapt
from descant.modules.adaptation.freeze import Freeze
from descant.modules.adaptation.lora import Lora
from descant.modules.adaptation.quantize import Quantize
from descant.modules.adaptation.saved_tower import SavedTower
from descant.modules.io import saved
from descant.modules.io.lean import base_of, lean
from descant.modules.towers import ConvTower, Frozen, TextTower, Tower, Towers
from descant.modules.towers.cached import Cached

TEXT = dict(vocab=20, width=64, depth=1, heads=2, length=6)
X_TEXT = torch.tensor([[1, 5, 9, 2, 0, 0], [1, 7, 2, 0, 0, 0]])
X_IMAGE = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
TOWERS = {
    "image": {"class_path": "descant.modules.towers.ConvTower", "init_args": {"widths": [8, 16]}},
    "text": {"class_path": "descant.modules.towers.TextTower", "init_args": TEXT},
}


def write_run(folder: Path, adapt: list[dict[str, Any]] | None = None, name: str = "last", **more: Any) -> Any:
    """A run folder as ``fit`` leaves it, and the model in eval mode that its checkpoint is of."""
    recipe = nn.Module()
    torch.manual_seed(7)
    recipe.towers = Towers(image=ConvTower(widths=[8, 16]), text=TextTower(**TEXT))  # type: ignore[arg-type]
    recipe.head = nn.Linear(3, 2)
    for part in adapt or []:
        saved.build(Adapt, part, folder).apply(recipe)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in recipe.parameters():  # as if trained: LoRA begins with B = 0
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    towers = {"class_path": "descant.modules.towers.Towers", "init_args": TOWERS}
    model = {"class_path": "descant.recipes.Contrastive", "init_args": {"towers": towers, "adapt": adapt}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    torch.save({"state_dict": recipe.state_dict(), "global_step": 3, **more}, folder / f"checkpoints/{name}.ckpt")
    return recipe.eval()


def part(cls: type, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": arguments}


def out(tower: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return tower.eval()(x).h_BTD


@pytest.mark.parametrize("name,x", [("image", X_IMAGE), ("text", X_TEXT)])
@pytest.mark.parametrize("inside", ["", "checkpoints/last.ckpt"])
def test_the_tower_is_the_one_that_was_trained(tmp_path: Path, name: str, x: Tensor, inside: str) -> None:
    recipe = write_run(tmp_path / "001")
    tower, theirs = SavedTower(tmp_path / "001" / inside, name), recipe.towers[name]
    assert torch.equal(out(tower, x), out(theirs, x))
    assert (tower.width, tower.vocabulary, tower.pad) == (theirs.width, theirs.vocabulary, theirs.pad)
    assert len(tower.blocks()) == len(theirs.blocks()) and all(p.requires_grad for p in tower.parameters())
    assert list(tower.state_dict()) == [f"tower.{key}" for key in theirs.state_dict()]


def test_building_leaves_the_random_generator_as_it_was(tmp_path: Path) -> None:
    write_run(tmp_path)
    torch.manual_seed(0)
    wanted = torch.randn(3)
    torch.manual_seed(0)
    SavedTower(tmp_path, "text")
    assert torch.equal(torch.randn(3), wanted)


@pytest.mark.parametrize(
    "adapt,tolerance",
    [  # 25 ulps of float32: weights are merged, and sums are over 16 to 64 numbers in a layer or two; or 84
        ([part(Lora, r=2, towers=["text"])], 3e-6),
        ([part(Lora, r=2, dora=True, towers=["text"])], 3e-6),
        ([part(Quantize, bits=4, towers=["text"])], 1e-5),
        ([part(Quantize, bits=8, towers=["text"])], 5e-2),  # its products are of 8-bit activations too
        ([part(Quantize, bits=4, towers=["text"]), part(Lora, r=2, towers=["text"])], 1e-5),
        ([part(Quantize, bits=4, towers=["text"]), part(Lora, r=2, dora=True, towers=["text"])], 1e-5),
        ([part(Freeze, towers=["text"])], 0.0),
    ],
    ids=["lora", "dora", "4bit", "8bit", "qlora", "qdora", "freeze"],
)
def test_adapted_towers_come_as_plain_ones(tmp_path: Path, adapt: list[dict[str, Any]], tolerance: float) -> None:
    recipe = write_run(tmp_path, adapt)
    tower, theirs = SavedTower(tmp_path, "text"), recipe.towers["text"]
    assert type(tower.tower) is TextTower and all(p.requires_grad for p in tower.parameters())
    assert [k for k in tower.tower.state_dict()] == list(TextTower(**TEXT).state_dict())  # type: ignore[arg-type]
    scale = float(out(theirs, X_TEXT).abs().max())
    assert (out(tower, X_TEXT) - out(theirs, X_TEXT)).abs().max() <= tolerance * scale
    # and the adapters are in it: the untouched base is another function
    base = copy.deepcopy(tower.tower)
    if "r" in adapt[-1]["init_args"]:
        state = {k.replace("base_layer.", ""): v for k, v in theirs.state_dict().items()}
        if len(adapt) == 1:
            base.load_state_dict({k: state[k] for k in base.state_dict()})
            assert (out(base, X_TEXT) - out(theirs, X_TEXT)).abs().max() > 1e-3


@pytest.mark.parametrize("other", [part(Lora, r=2, towers=["text"]), part(Freeze, towers=["text"])])
def test_adapters_of_another_tower_are_ignored(tmp_path: Path, other: dict[str, Any]) -> None:
    recipe = write_run(tmp_path, [other])
    assert torch.equal(out(SavedTower(tmp_path, "image"), X_IMAGE), out(recipe.towers["image"], X_IMAGE))


def test_lean_checkpoints_are_completed_from_the_base(tmp_path: Path) -> None:
    adapt = [part(Lora, r=2, towers=["text"])]
    recipe = write_run(tmp_path, adapt)
    # a configuration of random weights has no base to come back to: this one draws the same again
    file = tmp_path / "checkpoints/last.ckpt"
    base = base_of(recipe)
    torch.save({"state_dict": lean(recipe.state_dict(), base)}, file)
    with pytest.raises(ValueError, match="other base weights"):
        SavedTower(tmp_path, "text")
    full = {k: v for k, v in base.items() if not k.startswith("towers.text.")}
    torch.save({"state_dict": lean(recipe.state_dict(), full)}, file)  # of the other parts only
    # 84 ulps: a layer or two of sums over some 32
    assert torch.allclose(out(SavedTower(tmp_path, "text"), X_TEXT), out(recipe.towers["text"], X_TEXT), atol=1e-5)


@pytest.mark.parametrize("change", [Freeze(["text"]), Freeze(["text"], 99), Lora(r=2), Quantize(towers=["text"])])
def test_it_can_be_frozen_adapted_and_cached(tmp_path: Path, change: Adapt) -> None:
    write_run(tmp_path, [part(Lora, r=2, towers=["text"])])
    recipe = nn.Module()
    recipe.towers = Towers(text=SavedTower(tmp_path, "text"))
    before = out(recipe.towers["text"], X_TEXT)
    change.apply(recipe)
    after = out(recipe.towers["text"], X_TEXT)
    if isinstance(change, Freeze):
        assert not any(p.requires_grad for p in recipe.parameters())
    if not isinstance(change, Quantize) and not isinstance(recipe.towers["text"], Cached):
        assert torch.equal(after, before)
    assert torch.isfinite(after).all()


def test_frozen_and_nested(tmp_path: Path) -> None:
    recipe = write_run(tmp_path / "a")
    frozen = Frozen(SavedTower(tmp_path / "a", "text"))
    assert torch.equal(out(frozen, X_TEXT), out(recipe.towers["text"], X_TEXT))
    # a run whose own tower was one of another run
    outer = nn.Module()
    outer.towers = Towers(text=SavedTower(tmp_path / "a", "text"))
    (tmp_path / "b/checkpoints").mkdir(parents=True)
    inner = {
        "class_path": "descant.modules.adaptation.saved_tower.SavedTower",
        "init_args": {"path": str(tmp_path / "a"), "tower": "text"},
    }
    towers = {"class_path": "descant.modules.towers.Towers", "init_args": {"text": inner}}
    model = {"class_path": "descant.recipes.Contrastive", "init_args": {"towers": towers}}
    (tmp_path / "b/config.yaml").write_text(yaml.safe_dump({"model": model}))
    torch.save({"state_dict": outer.state_dict()}, tmp_path / "b/checkpoints/last.ckpt")
    assert torch.equal(out(SavedTower(tmp_path / "b", "text"), X_TEXT), out(frozen, X_TEXT))


def test_best_last_and_a_name(tmp_path: Path) -> None:
    monitor = {"monitor": "val/r1", "best_model_path": "/elsewhere/checkpoints/best-1.ckpt"}
    best = write_run(tmp_path, name="best-1")
    last = write_run(tmp_path, name="last", callbacks={"ModelCheckpoint": monitor})
    for which, recipe in (("best", best), ("last", last), ("last.ckpt", last), ("best-1.ckpt", best)):
        assert torch.equal(out(SavedTower(tmp_path, "text", which), X_TEXT), out(recipe.towers["text"], X_TEXT))
    with pytest.raises(ValueError, match=r"frist: no such checkpoint of .*; best, last or best-1.ckpt, last.ckpt"):
        SavedTower(tmp_path, "text", "frist")


class Touched(Tower):
    """Not of Descant: naming it must be refused before it is built."""

    built = False

    def __init__(self) -> None:
        super().__init__()
        Touched.built = True


def test_bad_requests_are_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "demo/001")
    with pytest.raises(ValueError, match=r"tower 'imgae' of .*: no such name; did you mean image"):
        SavedTower(tmp_path / "demo/001", "imgae")
    with pytest.raises(ValueError, match=r"demo/002: no such run, checkpoint or export; nearest: .*demo/001"):
        SavedTower(tmp_path / "demo/002", "image")
    stray = tmp_path / "stray.ckpt"
    stray.write_bytes((tmp_path / "demo/001/checkpoints/last.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"stray.ckpt: no config.yaml in .*weights without a configuration"):
        SavedTower(stray, "image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_bytes((tmp_path / "demo/001/config.yaml").read_bytes())
    with pytest.raises(ValueError, match=r"empty: neither model.safetensors nor a checkpoint in it"):
        SavedTower(tmp_path / "empty", "image")


def _edit(folder: Path, before: str, after: str) -> None:
    file = folder / "config.yaml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def test_weights_of_another_model_name_the_first_difference(tmp_path: Path) -> None:
    write_run(tmp_path)
    _edit(tmp_path, "width: 64", "width: 32")
    with pytest.raises(
        ValueError, match=r"not the weights of this TextTower: positions_TD is \[6, 64\] in the file and \[6, 32\] in"
    ):
        SavedTower(tmp_path, "text")
    _edit(tmp_path, "width: 32", "width: 64")
    _edit(tmp_path, "depth: 1", "depth: 2")
    with pytest.raises(ValueError, match=r"layers.1.norm_1.weight \[64\] is not in the file \(and \d+ more differ\)"):
        SavedTower(tmp_path, "text")


@pytest.mark.parametrize(
    "name,line",
    [
        ("os.system", "class_path os.system is not allowed in a saved configuration"),
        (f"{__name__}.Touched", "is not allowed in a saved configuration"),
        (
            "descant.modules.towers.heads.Projection",
            "descant.modules.towers.heads.Projection does not correspond to a subclass of Tower",
        ),
        ("descant.modules.towers.TextTowr", "descant.modules.towers.TextTowr"),
    ],
)
def test_only_towers_of_descant_are_built(tmp_path: Path, name: str, line: str) -> None:
    write_run(tmp_path)
    _edit(tmp_path, "descant.modules.towers.TextTower", name)
    with pytest.raises(ValueError, match=line) as caught:
        SavedTower(tmp_path, "text")
    assert "\n" not in str(caught.value) and not Touched.built
    assert out(SavedTower(tmp_path, "image"), X_IMAGE).shape[0] == 2  # what is not asked for is not looked at


def test_a_loading_policy_applies_to_the_inner_tower(tmp_path: Path) -> None:
    write_run(tmp_path)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not for you")

    with saved.policy(refuse), pytest.raises(ValueError, match=re.escape("TextTower is not for you")):
        SavedTower(tmp_path, "text")
    SavedTower(tmp_path, "text")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    torch.save({"state_dict": Payload()}, tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt: cannot be read") as caught:
        SavedTower(tmp_path, "text", "last")
    assert "\n" not in str(caught.value) and not (tmp_path / "touched").exists()
