"""Callbacks on a plain LightningModule, which knows nothing of recipes: what works, and what it takes.

Letters: B samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from descant import EMA, Batch, Harmonize, ModalitySubsetEval, Objective, PCGrad, Resume, Step, Term, harmonize
from tests.step_toy import QUIET, KeepGradients
from tests.tolerance import F32, F64, ulps

ROWS, B = 32, 8
Data = TensorDataset


def content() -> Data:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 6, generator=g, dtype=torch.float64)
    return Data(x, torch.randint(3, (ROWS,), generator=g), torch.randint(4, (ROWS,), generator=g))


class Classifier(L.LightningModule):
    """Two heads on a trunk, as anybody writes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1))
        self.kind, self.color = nn.Linear(8, 3), nn.Linear(8, 4)
        self.double()

    def losses(self, batch: list[Tensor]) -> dict[str, Tensor]:
        x, kind_B, color_B = batch
        z = self.trunk(x)
        return {"kind": F.cross_entropy(self.kind(z), kind_B), "color": F.cross_entropy(self.color(z), color_B)}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.stack([*self.losses(batch).values()]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def fit(module: L.LightningModule, *callbacks: L.Callback, path: Path | None = None, **options: Any) -> L.Trainer:
    shuffled: Any = DistributedSampler(content(), 1, 0)  # by (seed, epoch)
    trainer = L.Trainer(callbacks=[*callbacks], **{**QUIET, "max_epochs": 3, **options})
    trainer.fit(module, DataLoader(content(), B, sampler=shuffled), ckpt_path=path)
    return trainer


class Weights(L.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def test_ema_averages_the_weights_of_every_step() -> None:
    module, weights = Classifier(), Weights()
    fit(module, weights, EMA(decay=0.6, warmup=False))
    for name, p in module.named_parameters():
        wanted = weights.steps[0][name]
        for step in weights.steps[1:]:
            wanted = 0.6 * wanted + 0.4 * step[name]
        assert torch.allclose(p, wanted, rtol=ulps(64, F64), atol=ulps(64, F64)), name
        assert not torch.equal(p, weights.steps[-1][name])  # after the fit the module holds the average


def test_resume_at_the_end_of_an_epoch_is_bit_identical_with_all_state(tmp_path: Path) -> None:
    class Harmonized(Classifier):
        """With a rule that remembers, whose state is in the checkpoint."""

        def __init__(self) -> None:
            super().__init__()
            from descant import GradVac

            self.rule = GradVac(beta=0.5)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.terms = self.losses(batch)
            return torch.stack([*self.terms.values()]).sum()

        def backward(self, loss: Tensor) -> None:
            harmonize(self.terms, self.trunk, self.rule, loss)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["rule"] = self.rule.state_dict()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.rule.load_state_dict(checkpoint["rule"])

    def parts() -> list[L.Callback]:
        return [Resume(every=ROWS // B, folder=str(tmp_path)), EMA(0.6)]

    whole, resumed = Harmonized(), Harmonized()
    fit(whole, *parts())
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    fit(Harmonized(), *parts(), max_epochs=1)
    fit(resumed, *parts(), path=tmp_path / f"step-{ROWS // B:07d}.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(whole.rule.state["phi"], resumed.rule.state["phi"]) and resumed.rule.loop.steps == 3 * ROWS // B


def test_resume_names_what_is_not_exact(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    resume = Resume(every=3, folder=str(tmp_path))
    L.Trainer(max_steps=3, callbacks=[resume], **QUIET).fit(Classifier(), DataLoader(content(), B, shuffle=True))
    assert "shuffle=True has another order after a resume; sampler=Distrib" in capfd.readouterr().err
    fit(Classifier(), Resume(every=3, folder=str(tmp_path)), path=tmp_path / "step-0000003.ckpt", max_steps=4)
    told = capfd.readouterr().err
    assert "a loader without a data module cannot start within an epoch" in told and "shuffle" not in told


class Observed(Classifier):
    """What ``Harmonize``, the callback, wants of a module: a step with an objective, and the shared parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def shared_parameters(self) -> Any:
        return self.trunk.parameters()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.step.objective = Objective(self.losses(batch))
        return self.step.objective.total


def test_the_callback_and_the_function_give_the_trunk_the_same_gradient() -> None:
    class ByFunction(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.terms = self.losses(batch)
            return torch.stack([*self.terms.values()]).sum()

        def backward(self, loss: Tensor) -> None:
            harmonize(self.terms, self.trunk, PCGrad(), loss)

    by_callback, by_function, callback = KeepGradients(), KeepGradients(), Harmonize(PCGrad())
    for module, callbacks in ((Observed(), [callback, by_callback]), (ByFunction(), [by_function])):
        torch.manual_seed(1)  # of dropout
        fit(module, *callbacks, max_steps=1)
    assert callback.conflicts == 1
    for name, g in by_function.gradients.items():
        same = torch.allclose(g, by_callback.gradients[name], rtol=ulps(256, F64), atol=ulps(256, F64))
        assert same == name.startswith("trunk"), name  # heads: plain by the function, mixed by the callback


class TwoModalities(L.LightningModule):
    """A classifier of pictures and sounds: ``scores`` is all that the evaluation over subsets wants."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"image": nn.Linear(6, 3), "sound": nn.Linear(5, 3)})

    def logits(self, batch: Batch) -> Tensor:
        return sum(batch.present[m][:, None] * head(batch.inputs[m]) for m, head in self.heads.items())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch.targets["kind"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def scores(self, batch: Batch) -> dict[str, Term]:
        return {"accuracy": Term((self.logits(batch).argmax(dim=1) == batch.targets["kind"]).float())}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def test_subsets_of_modalities_are_evaluated_by_scores_alone(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, sound, kind = torch.randn(ROWS, 6, generator=g), torch.randn(ROWS, 5, generator=g), torch.randint(3, (ROWS,))

    def batch(rows: list[int]) -> Batch:
        i = torch.tensor(rows)
        present = {"image": torch.ones(len(i), dtype=torch.bool), "sound": i % 4 > 0}
        return Batch({"image": x[i], "sound": sound[i]}, present, {"kind": kind[i]}, index=i)

    loader: Any = DataLoader(range(ROWS), B, collate_fn=batch)  # type: ignore[arg-type]
    module = TwoModalities()
    options = {**QUIET, "limit_val_batches": None, "default_root_dir": tmp_path}
    trainer = L.Trainer(max_epochs=1, callbacks=[ModalitySubsetEval()], **options)
    trainer.fit(module, loader, loader)
    both = torch.arange(ROWS) % 4 > 0
    logits = {"image": module.heads["image"](x), "sound": module.heads["sound"](sound)}
    logits["image+sound"] = logits["image"] + logits["sound"]
    for subset, logits_BC in logits.items():
        wanted = (logits_BC.argmax(dim=1) == kind)[both].float().mean()
        assert float(trainer.callback_metrics[f"val0/accuracy/{subset}"]) == pytest.approx(
            float(wanted), abs=ulps(ROWS, F32)
        )


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Harmonize(PCGrad()), r"HasObjective \(shared_parameters, step\); Classifier lacks it"),
        (ModalitySubsetEval(), r"Scores \(scores\(batch\)\) or Embeds .*; Classifier lacks both"),
    ],
)
def test_what_a_module_lacks_is_one_line(callback: L.Callback, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Classifier(), callback)
