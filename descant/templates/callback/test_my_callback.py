"""Test MyCallback: its numbers, unchanged training, its errors. Letters: B samples, M towers."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from descant.templates.callback.my_callback import MyCallback


class Pair(L.LightningModule):
    """``loss = mean_b (3 a_b x_image + 4 b_b x_text)`` with two scalars: gradients (3, 4) if x is 1.

    ``idle`` is a third tower, on which the loss does not depend.
    """

    def __init__(self) -> None:
        super().__init__()
        linear = {m: nn.Linear(1, 1, bias=False) for m in ("image", "text", "idle")}
        self.towers = nn.ModuleDict(linear)

    def training_step(self, x_B1: Tensor, batch_idx: int) -> Tensor:
        return (3 * self.towers["image"](x_B1) + 4 * self.towers["text"](x_B1)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Bare(Pair):
    """The same model without the protocol."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.towers
        del self.towers


def fit(model: L.LightningModule, *callbacks: L.Callback, every: int = 1, accumulate: int = 1) -> L.Trainer:
    rows: DataLoader[Tensor] = DataLoader([torch.ones(1)] * 8, batch_size=2)  # type: ignore[arg-type]  # a list works
    trainer = L.Trainer(
        max_steps=2,
        log_every_n_steps=every,
        accelerator="cpu",
        callbacks=list(callbacks),
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, rows)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_shares_by_hand(accumulate: int) -> None:
    """Check shares 3/7, 4/7 and 0 for gradients 3 and 4 and no gradient."""
    logged = fit(Pair(), MyCallback(), accumulate=accumulate).logged_metrics
    shares = {name: float(value) for name, value in logged.items()}
    assert shares == pytest.approx({"share/image": 3 / 7, "share/text": 4 / 7, "share/idle": 0.0})


@pytest.mark.parametrize("every", [1, 2, 3])
def test_it_measures_at_logging_steps_only(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[int] = []
    monkeypatch.setattr(Pair, "log_dict", lambda self, *args, **options: logged.append(self.global_step + 1))
    fit(Pair(), MyCallback(), every=every)
    assert logged == [step for step in (1, 2) if step % every == 0]


def test_the_prefix_names_them() -> None:
    assert set(fit(Pair(), MyCallback("g")).logged_metrics) == {"g/image", "g/text", "g/idle"}


def test_training_does_not_see_it() -> None:
    weights = []
    for callbacks in ([], [MyCallback()]):
        torch.manual_seed(0)
        model = Pair()
        fit(model, *callbacks)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_recipe_without_towers_is_refused_in_one_line() -> None:
    line = r"MyCallback needs the protocol HasTowers \(towers\); Bare lacks it"
    with pytest.raises(ValueError, match=line):
        fit(Bare(), MyCallback())
