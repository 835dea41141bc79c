"""LeanCheckpoint: content, size, refusals, bit-identical resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from descant.callbacks.checkpoints.lean_checkpoint import LeanCheckpoint
from descant.callbacks.training.ema import CURRENT_MODEL_STATE, EMA
from descant.modules.adaptation.base import Adapt
from descant.modules.adaptation.freeze import Freeze
from descant.modules.adaptation.lora import Lora
from descant.modules.adaptation.quantize import Quantize
from descant.modules.core.batch import Batch
from descant.modules.io.lean import BASE, base_of, complete_state, lean
from descant.modules.towers import ConvTower, Frozen, TextTower, Towers
from descant.recipes.contrastive import Contrastive
from tests.tolerance import F32, ulps

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(1, 200, (8, 6), generator=torch.Generator().manual_seed(1))

ADAPT: dict[str, list[Adapt]] = {
    "lora": [Lora(r=2, towers=["text"])],
    "dora": [Lora(r=2, towers=["text"], dora=True)],
    "qlora": [Quantize(4, towers=["text"]), Lora(r=2, towers=["text"])],
    "qlora8": [Quantize(8, towers=["text"]), Lora(r=2, towers=["text"])],
    "lit": [Freeze(towers=["text"])],
    "cached": [Freeze(towers=["text"], capacity=100)],
}


def recipe_of(adapt: str = "lora", seed: int = 0) -> Contrastive:
    torch.manual_seed(seed)
    # most of its weights are the base's, as in a pretrained tower
    towers = Towers(image=ConvTower(widths=[8, 16]), text=TextTower(vocab=200, width=64, depth=2, heads=2, length=6))
    towers["text"].load_state_dict(towers["text"].state_dict())
    torch.manual_seed(7)
    return Contrastive(towers, width=16, adapt=ADAPT[adapt], optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def fit(
    recipe: Contrastive, folder: Path, steps: int, *callbacks: Callback, resume: Path | None = None, **options: Any
) -> tuple[list[float], Path]:
    """The losses of the steps and the last checkpoint."""
    torch.manual_seed(3)  # of the adapters
    losses = Losses()
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_last=True)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[losses, *callbacks, saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        limit_val_batches=0,
        **options,
    )
    rows = torch.ones(8, dtype=torch.bool)
    data: Any = DataLoader([Batch({"image": IMAGES, "text": TEXT}, {"image": rows, "text": rows})] * 2, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(recipe, data, ckpt_path=resume, weights_only=True)
    return losses.seen, folder / "last.ckpt"


def read(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("adapt", ADAPT)
def test_it_holds_trained_weights_and_resumes(adapt: str, tmp_path: Path) -> None:
    whole, full = fit(recipe_of(adapt), tmp_path / "full", 4)
    recipe = recipe_of(adapt)
    first, file = fit(recipe, tmp_path / "lean", 2, LeanCheckpoint())
    state = read(file)["state_dict"]
    base = set(json.loads(bytes(state.pop(BASE).tolist())))
    assert base | state.keys() == read(full)["state_dict"].keys() and not base & state.keys()
    # the image tower with its running statistics, heads, the scale; of the text tower only adapters
    text = {name for name in state if name.startswith("towers.text")}
    assert all("lora_" in name for name in text) and bool(text) == ("lora" in adapt or adapt == "dora")
    assert all(name in state for name in recipe.state_dict() if not name.startswith("towers.text"))
    rest, _ = fit(recipe_of(adapt), tmp_path / "more", 4, LeanCheckpoint(), resume=file)
    assert first + rest == pytest.approx(whole, abs=ulps(8, F32)) and len(rest) == 2
    assert len(set(whole)) == 4


def test_file_size(tmp_path: Path) -> None:
    _, full = fit(recipe_of(), tmp_path / "full", 2)
    recipe = recipe_of()
    _, file = fit(recipe, tmp_path / "lean", 2, LeanCheckpoint())
    frozen = sum(p.numel() * p.element_size() for p in recipe.parameters() if not p.requires_grad)
    saved = full.stat().st_size - file.stat().st_size
    assert frozen > 300_000 and saved == pytest.approx(frozen, rel=0.05)  # names and norms are saved, too
    assert file.stat().st_size < 0.5 * full.stat().st_size


def test_base_bytes_stay_and_adapters_move(tmp_path: Path) -> None:
    recipe = recipe_of("qlora")
    recipe.configure_model()
    before = {name: value.clone() for name, value in recipe.state_dict().items() if name.startswith("towers.text")}
    _, file = fit(recipe, tmp_path, 3, LeanCheckpoint())
    again = recipe_of("qlora")
    again.configure_model()
    after = complete_state(read(file)["state_dict"], again)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_another_base_is_refused_and_the_same_loads_strictly(tmp_path: Path) -> None:
    _, file = fit(recipe_of(), tmp_path, 2, LeanCheckpoint())
    with pytest.raises(ValueError, match=r"other base weights: here towers\.text\.\S+ differs") as caught:
        fit(recipe_of(seed=1), tmp_path / "other", 3, LeanCheckpoint(), resume=file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"base weights that this model does not have: towers\.text"):
        fit(recipe_of("lit"), tmp_path / "other", 3, LeanCheckpoint(), resume=file)
    state = read(file)["state_dict"]
    recipe = recipe_of()
    recipe.configure_model()
    name = next(name for name in state if "lora_A" in name)
    whole = complete_state({key: value for key, value in state.items() if key != name}, recipe)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        recipe.load_state_dict(whole)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        recipe.load_state_dict({**complete_state(state, recipe), "more": torch.zeros(1)})


def test_full_checkpoints_load_and_their_other_base_is_kept_whole(tmp_path: Path) -> None:
    """What is loaded is not what the configuration builds, so it must be in the next checkpoint."""
    _, full = fit(recipe_of(seed=1), tmp_path / "full", 2)
    _, file = fit(recipe_of(seed=0), tmp_path / "lean", 4, LeanCheckpoint(), resume=full)
    state, expected = read(file)["state_dict"], read(full)["state_dict"]
    name = "towers.text.layers.0.qkv.base_layer.weight"
    assert torch.equal(state[name], expected[name])
    losses, _ = fit(recipe_of(seed=0), tmp_path / "more", 6, LeanCheckpoint(), resume=file)
    straight, _ = fit(recipe_of(seed=1), tmp_path / "straight", 6)
    assert losses == pytest.approx(straight[4:], abs=ulps(8, F32))


class Teacher(Contrastive):
    """Takes no gradient and changes all the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(5))

    def on_train_batch_end(self, *_: Any) -> None:
        self.teacher.weight.mul_(0.9)
        assert isinstance(self.queue, Tensor)
        self.queue.add_(1)


def test_what_changes_without_a_gradient_is_saved(tmp_path: Path) -> None:
    recipe = Teacher(Towers(image=ConvTower(widths=[8]), text=Frozen(TextTower(200, 16, 1, 2, 6))), width=8)
    _, file = fit(recipe, tmp_path, 3, LeanCheckpoint())
    state = read(file)["state_dict"]
    assert state["queue"].tolist() == [3.0] * 5 and "teacher.weight" in state and "teacher.bias" not in state
    assert not any(name.startswith("towers.text") for name in state)


@pytest.mark.parametrize("last", [False, True], ids=["before EMA", "after EMA"])
def test_it_composes_with_ema(last: bool, tmp_path: Path) -> None:
    def pair() -> list[Callback]:
        both: list[Callback] = [LeanCheckpoint(), EMA(decay=0.5)]
        return both[::-1] if last else both

    whole, _ = fit(recipe_of(), tmp_path / "whole", 6, EMA(decay=0.5))
    first, file = fit(recipe_of(), tmp_path / "lean", 4, *pair())
    content = read(file)
    for key in ("state_dict", CURRENT_MODEL_STATE):
        assert not any(name.endswith("base_layer.weight") for name in content[key])
    adapter = next(name for name in content["state_dict"] if "lora_A" in name)
    assert not torch.equal(content["state_dict"][adapter], content[CURRENT_MODEL_STATE][adapter])
    rest, after = fit(recipe_of(), tmp_path / "more", 6, *pair(), resume=file)
    assert first + rest == pytest.approx(whole, abs=ulps(8, F32))
    averaged = read(after)["state_dict"][adapter]
    assert torch.equal(averaged, read(tmp_path / "whole" / "last.ckpt")["state_dict"][adapter])


def test_statistics_that_stand_still_are_left_out_and_averaged_all_the_same(tmp_path: Path) -> None:
    def frozen() -> Contrastive:
        torch.manual_seed(0)
        recipe = recipe_of()
        recipe.parts = [Freeze(towers=["image"])]  # a tower with batch norms
        return recipe

    whole, _ = fit(frozen(), tmp_path / "whole", 6, EMA(decay=0.5))
    first, file = fit(frozen(), tmp_path / "lean", 4, LeanCheckpoint(), EMA(decay=0.5))
    assert not any("running_mean" in name for name in read(file)["state_dict"])
    rest, _ = fit(frozen(), tmp_path / "more", 6, LeanCheckpoint(), EMA(decay=0.5), resume=file)
    assert first + rest == pytest.approx(whole, abs=ulps(8, F32))


def test_an_8_bit_optimizer_resumes(tmp_path: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    def small() -> Contrastive:
        recipe = recipe_of()
        recipe.optimization.optimizer = lambda p: AdamW8bit(p, lr=0.01, min_8bit_size=64)
        return recipe

    whole, _ = fit(small(), tmp_path / "whole", 6)
    first, file = fit(small(), tmp_path / "lean", 3, LeanCheckpoint())
    states = list(read(file)["optimizer_states"][0]["state"].values())
    inner = [value for state in states for value in state.values() if isinstance(value, dict)]  # as it hides them
    kinds = {state["state1"].dtype for state in (*states, *inner) if "state1" in state}
    assert kinds == {torch.uint8, torch.float32}  # the smallest stay as they are
    rest, _ = fit(small(), tmp_path / "more", 6, LeanCheckpoint(), resume=file)
    assert first + rest == pytest.approx(whole, abs=ulps(8, F32))
    straight, _ = fit(recipe_of(), tmp_path / "straight", 6)
    # 8 bits are a state to 1%
    assert whole[-1] < 0.9 * whole[0] and whole != straight and whole == pytest.approx(straight, rel=0.05)


def test_weights_that_the_trainer_casts_are_left_out_too(tmp_path: Path) -> None:
    _, file = fit(recipe_of("lit"), tmp_path, 2, LeanCheckpoint(), precision="bf16-true")
    state = read(file)["state_dict"]
    assert not any(name.startswith("towers.text") for name in state)
    assert state["heads.text.layers.0.weight"].dtype == torch.bfloat16
    _, after = fit(recipe_of("lit"), tmp_path / "more", 4, LeanCheckpoint(), resume=file, precision="bf16-true")
    assert read(after)["state_dict"].keys() == state.keys()
    built = recipe_of("lit")
    built.configure_model()
    built.load_state_dict(complete_state(state, built))  # and in float32 again, as an export does


def test_a_lean_state_is_completed() -> None:
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    base = base_of(module)
    state = lean(module.state_dict(), base)
    assert set(state) == {"1.weight", "1.bias", BASE}
    whole = complete_state(state, module)
    assert all(torch.equal(whole[name], value) for name, value in module.state_dict().items())
    assert complete_state(module.state_dict(), module).keys() == module.state_dict().keys()


# the command line -------------------------------------------------------------------------------------------

EXPERIMENT: dict[str, Any] = {
    "model": {
        "class_path": "Contrastive",
        "init_args": {
            "width": 16,
            "towers": {
                "class_path": "Towers",
                "init_args": {
                    "image": {"class_path": "ConvTower", "init_args": {"widths": [8, 16], "stem": 4, "norm": "group"}},
                    "text": {"class_path": "TransformersTower", "init_args": {"folder": "bert", "dropout": 0.0}},
                },
            },
            "adapt": [
                {"class_path": "Quantize", "init_args": {"bits": 4, "towers": ["text"]}},
                {"class_path": "Lora", "init_args": {"r": 2, "towers": ["text"]}},
            ],
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
    },
    "data": {
        "class_path": "Emoji",
        "init_args": {
            "tiny": True,
            "batch_size": 128,
            "text": {"class_path": "PretrainedTokenizer", "init_args": {"folder": "bert", "length": 24}},
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "callbacks+": [{"class_path": "LeanCheckpoint"}],
    },
}


def losses_of(run: str) -> dict[int, float]:
    """Step -> loss, from the run's own file."""
    import csv

    with Path("runs", run, "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")}


@pytest.mark.slow
def test_a_lean_run_resumes_by_the_command_line(cli: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    from descant.datamodules.corpora.emoji_pack import PACK
    from descant.modules.towers import TransformersTower

    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    bert = {"model_type": "bert", "vocab_size": 8192, "hidden_size": 64, "num_hidden_layers": 1}
    for k, folder in enumerate(("bert", "other")):
        torch.manual_seed(k)
        TransformersTower(config={**bert, "num_attention_heads": 2}).model.save_pretrained(folder)  # type: ignore[dict-item]
        PreTrainedTokenizerFast(tokenizer_file=str(PACK / "tokenizer.json"), **names).save_pretrained(folder)
    Path("e.yaml").write_text(yaml.safe_dump(EXPERIMENT))

    def run(*arguments: str, command: str = "fit") -> Any:
        return cli(command, "--config", "e.yaml", *arguments)

    assert run("--name", "whole").rc == 0
    assert run("--name", "parts", "--trainer.max_epochs", "1").rc == 0
    (file,) = Path("runs/parts/001/resume").glob("*.ckpt")
    size = file.stat().st_size
    assert size < 0.3 * 8192 * 64 * 4 and not any("embeddings" in name for name in read(file)["state_dict"])
    resumed = run("--name", "parts", "--run", "parts/001", "--resume", "auto", "--changed", "allow")
    assert resumed.rc == 0, resumed.err
    whole, parts = losses_of("whole/001"), losses_of("parts/001")
    assert len(whole) >= 4 and parts == pytest.approx(whole, abs=ulps(8, F32))
    tested = cli("test", "--run", "parts/001", "--ckpt_path", "last")
    assert tested.rc == 0, tested.err
    other = ("--model.towers.init_args.text.init_args.folder", "other")
    refused = run("--name", "x", "--resume", str(file), "--changed", "allow", *other).err.splitlines()[-1]
    assert "other base weights: here towers.text.model." in refused
