"""EMA: closed form, one update a step, evaluated, saved, resumed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from descant.callbacks.training.ema import EMA
from descant.modules.adaptation.grow import Grow
from descant.modules.towers import ConvTower, Towers
from tests.tolerance import F32, rounding, ulps

BATCHES, B = 4, 8


class Toy(L.LightningModule):
    """BatchNorm and Linear under SGD, a frozen tower, a queue and a mask of -inf; keeps every step."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.tied = self.head
        self.register_buffer("mask", torch.full((2,), -torch.inf))
        self.register_buffer("queue", torch.zeros(2))
        self.history: list[dict[str, Tensor]] = []
        self.judged: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.frozen(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.queue.add_(1)
        return (self(batch[0]) - batch[1]).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.history.append({k: v.clone() for k, v in self.state_dict().items()})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", (self(batch[0]) - batch[1]).square().mean(), batch_size=len(batch[0]))

    def on_validation_epoch_end(self) -> None:
        self.judged.append({k: v.clone() for k, v in self.state_dict().items()})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", (self(batch[0]) - batch[1]).square().mean(), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def loader() -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * B, 3, generator=g)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=B)


def trainer(tmp_path: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    options: dict[str, Any] = {
        "max_epochs": 3,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    } | kwargs
    return L.Trainer(
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def closed_form(ema: EMA, weights: list[Tensor]) -> Tensor:
    """Each step's weights times the product of the decays that followed it."""
    decay = [min(ema.decay, (1 + n) / (10 + n)) if ema.warmup else ema.decay for n in range(len(weights))]
    total = torch.zeros_like(weights[0])
    for k, w in enumerate(weights):
        total += (1.0 if k == 0 else 1 - decay[k]) * math.prod(decay[k + 1 :]) * w
    return total


AVERAGED = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "head.weight", "head.bias"]


@pytest.mark.parametrize("warmup", [True, False])
def test_closed_form(tmp_path: Path, warmup: bool) -> None:
    toy, ema = Toy(), EMA(decay=0.6, warmup=warmup)
    trainer(tmp_path, ema, max_steps=10, max_epochs=-1, limit_val_batches=0).fit(toy, loader())
    assert ema.updates == 10 and set(ema._average) == set(AVERAGED)
    final = toy.state_dict()
    for name in AVERAGED:
        expected = closed_form(ema, [h[name] for h in toy.history])
        torch.testing.assert_close(ema._average[name], expected, **rounding(16, F32))
        assert torch.equal(final[name], ema._average[name])  # the module keeps the average, for the test
        assert not torch.equal(final[name], toy.history[-1][name])
    assert final["norm.num_batches_tracked"] == 10 and final["queue"].tolist() == [10, 10]
    assert final["mask"].isinf().all()


def test_once_an_optimizer_step(tmp_path: Path) -> None:
    toy, ema = Toy(), EMA(decay=0.5, warmup=False)
    trainer(tmp_path, ema, accumulate_grad_batches=2, limit_val_batches=0).fit(toy, loader())
    assert ema.updates == 6
    expected = closed_form(ema, [h["head.weight"] for h in toy.history[1::2]])
    torch.testing.assert_close(ema._average["head.weight"], expected, **rounding(16, F32))


def test_judges_the_average(tmp_path: Path) -> None:
    toy, ema = Toy(), EMA(decay=0.9)
    run = trainer(tmp_path, ema)
    run.fit(toy, loader(), loader())
    raw = Toy()
    run_raw = trainer(tmp_path, max_epochs=3)
    run_raw.fit(raw, loader(), loader())
    # training itself never sees the average
    assert all(torch.equal(a["head.weight"], b["head.weight"]) for a, b in zip(toy.history, raw.history, strict=True))
    assert abs(run.callback_metrics["val/loss"] - run_raw.callback_metrics["val/loss"]) > 1e-3
    expected = closed_form(ema, [h["norm.running_var"] for h in toy.history])
    torch.testing.assert_close(toy.judged[-1]["norm.running_var"], expected, **rounding(16, F32))
    judged = float(run.callback_metrics["val/loss"])
    [tested] = run.test(toy, loader(), verbose=False)
    assert tested["test/loss"] == pytest.approx(judged, abs=ulps(8, F32))
    assert torch.equal(toy.state_dict()["head.weight"], ema._average["head.weight"])


def test_nothing_before_the_first_update(tmp_path: Path) -> None:
    toy, ema = Toy(), EMA(decay=0.9, start=6)
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    trainer(tmp_path, ema, saves).fit(toy, loader(), loader())
    # after the sanity check: epochs of 4, 8 and 12 steps
    first, second = (torch.load(tmp_path / f"step={n}.ckpt", weights_only=True) for n in (4, 8))
    assert torch.equal(toy.judged[1]["head.weight"], toy.history[3]["head.weight"])
    assert "current_model_state" not in first and "averaging_state" not in first
    assert torch.equal(first["state_dict"]["head.weight"], toy.history[3]["head.weight"])
    assert second["averaging_state"]["updates"] == 2
    expected = closed_form(ema, [h["head.weight"] for h in toy.history[6:8]])
    torch.testing.assert_close(second["state_dict"]["head.weight"], expected, **rounding(16, F32))


def test_checkpoint_holds_both_and_validates_alike(tmp_path: Path) -> None:
    toy, ema = Toy(), EMA(decay=0.9)
    saves = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")
    run = trainer(tmp_path, ema, saves)
    run.fit(toy, loader(), loader())
    content = torch.load(saves.best_model_path, weights_only=True)
    step = content["global_step"]
    torch.testing.assert_close(
        content["current_model_state"]["head.weight"], toy.history[step - 1]["head.weight"], rtol=0, atol=0
    )
    average = closed_form(ema, [h["head.weight"] for h in toy.history[:step]])
    for key in ("head.weight", "tied.weight"):  # a tied weight is average under both its keys
        torch.testing.assert_close(content["state_dict"][key], average, **rounding(16, F32))
    fresh = Toy()
    [value] = trainer(tmp_path, EMA()).validate(fresh, loader(), ckpt_path=saves.best_model_path, verbose=False)
    assert value["val/loss"] == pytest.approx(float(saves.best_model_score or 0), abs=ulps(8, F32))


def test_saved_after_the_fit(tmp_path: Path) -> None:
    toy, ema = Toy(), EMA(decay=0.9)
    run = trainer(tmp_path, ema, limit_val_batches=0)
    run.fit(toy, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(content["state_dict"]["head.weight"], ema._average["head.weight"])
    assert torch.equal(content["current_model_state"]["head.weight"], toy.history[-1]["head.weight"])


@pytest.mark.parametrize("stop", [1, 2])
def test_resume_is_bitwise(tmp_path: Path, stop: int) -> None:
    whole, ema_whole = Toy(), EMA(decay=0.9)
    trainer(tmp_path, ema_whole).fit(whole, loader(), loader())
    saves = ModelCheckpoint(tmp_path, filename="part")
    trainer(tmp_path, EMA(decay=0.9), saves, max_epochs=stop).fit(Toy(), loader(), loader())
    part, ema_part = Toy(), EMA(decay=0.9)
    trainer(tmp_path, ema_part).fit(part, loader(), loader(), ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    assert ema_part.updates == ema_whole.updates == 12
    for name in AVERAGED:
        assert torch.equal(whole.history[-1][name], part.history[-1][name])
        assert torch.equal(ema_whole._average[name], ema_part._average[name])
        assert torch.equal(whole.judged[-1][name], part.judged[-1][name])


def test_a_second_fit_continues_from_the_raw_weights(tmp_path: Path) -> None:
    toy, ema = Toy(), EMA(decay=0.9)
    run = trainer(tmp_path, ema, limit_val_batches=0, max_epochs=1)
    run.fit(toy, loader())
    run.fit_loop.max_epochs = 2
    seen: list[Tensor] = []
    toy.on_train_start = lambda: seen.append(toy.head.weight.detach().clone())  # type: ignore[method-assign]
    run.fit(toy, loader())
    assert torch.equal(seen[0], toy.history[3]["head.weight"])
    assert ema.updates == 8


def test_interrupted_validation_leaves_the_raw_weights(tmp_path: Path) -> None:
    toy, ema = Toy(), EMA(decay=0.9)
    saves = tmp_path / "broken.ckpt"

    class Break(L.Callback):
        def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if not trainer.sanity_checking:
                trainer.save_checkpoint(saves)
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, ema, Break()).fit(toy, loader(), loader())
    content = torch.load(saves, weights_only=True)
    assert torch.equal(toy.head.weight, toy.history[-1]["head.weight"])
    assert torch.equal(content["current_model_state"]["head.weight"], toy.history[-1]["head.weight"])
    assert torch.equal(content["state_dict"]["head.weight"], ema._average["head.weight"])


def test_an_error_in_a_test_after_a_fit_is_raised_unchanged(tmp_path: Path) -> None:
    toy, ema = Toy(), EMA(decay=0.9)
    run = trainer(tmp_path, ema, max_epochs=1)
    run.fit(toy, loader())

    def broken(batch: Any, batch_idx: int) -> None:
        raise RuntimeError("broken")

    toy.test_step = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        run.test(toy, loader())
    assert torch.equal(toy.head.weight, ema._average["head.weight"])


def test_half_precision_weights_have_a_float32_average() -> None:
    class Half(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))

    module, ema = Half(), EMA(decay=0.999, warmup=False)
    ema._bind(module)
    ema.update()
    module.w.data.fill_(2)
    for _ in range(100):
        ema.update()
    # a bfloat16 average would stand still: 1 + 0.001 rounds to 1
    assert float(ema._average["w"].mean()) == pytest.approx(2 - 0.999**100, abs=ulps(200, F32))
    ema._show_average()
    assert module.w.dtype == torch.bfloat16
    ema._show_raw()
    assert (module.w == 2).all()


def test_unfrozen_parameters_join_the_average() -> None:
    toy, ema = Toy(), EMA(decay=0.5, warmup=False)
    ema._bind(toy)
    ema.update()
    toy.frozen.requires_grad_(True)
    ema._bind(toy)
    ema.update()
    assert torch.equal(ema._average["frozen.weight"], toy.frozen.weight)
    assert ema.updates == 2


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decay 1\.5"):
        EMA(decay=1.5)
    saves = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ValueError, match="save_weights_only"):
        trainer(tmp_path, EMA(), saves).fit(Toy(), loader())


class Growing(L.LightningModule):
    """A conv tower with batch norms, and a copy of it that does not train, as a teacher is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers = Towers(image=ConvTower([8], stem=4))
        self.copy = nn.ModuleDict({"towers": copy.deepcopy(self.towers)}).requires_grad_(False)

    def change(self) -> None:
        with torch.no_grad():
            for name, x in self.state_dict().items():
                if x.is_floating_point() and not name.startswith("copy."):
                    x.mul_(1.1).add_(0.1)


@pytest.mark.parametrize("beta", [1.0, 0.9])
def test_the_average_grows_with_the_towers(beta: float) -> None:
    module, ema, x_BCHW = Growing().eval(), EMA(decay=0.5, warmup=False), torch.linspace(0, 1, 1536).view(2, 3, 16, 16)
    for _ in range(2):
        ema._bind(module)
        module.change()
        ema.update()
    names, before = set(ema._average), copy.deepcopy(module)
    before.load_state_dict(ema._average, strict=False)
    growths = Grow(depth=1, mlp_ratio=2.0, beta=beta).grow(module, seed=3)
    growths["towers.image"].apply(module.get_submodule("copy.towers.image"))
    ema.grow(module, growths)
    assert names < set(ema._average) == set(ema._live)
    assert not any(name.startswith("copy.") and "running" not in name for name in ema._average)
    assert {id(x) for x in ema._live.values()} <= {id(x) for x in [*module.parameters(), *module.buffers()]}
    assert all(a.shape == ema._live[name].shape for name, a in ema._average.items())
    key, kept = "towers.image.layers.1.norm_1.weight", ema._average["towers.image.layers.1.norm_1.weight"].clone()
    ema._show_average()
    Grow(depth=1, mlp_ratio=2.0, beta=beta).grow(before, seed=3)  # the average, grown as a model
    torch.testing.assert_close(module.towers["image"](x_BCHW), before.towers["image"](x_BCHW))
    ema._show_raw()
    module.change()
    ema.update()
    torch.testing.assert_close(ema._average[key], (kept + module.get_parameter(key)) / 2, **rounding(4, F32))
