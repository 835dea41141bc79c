"""What modalities bring, by hand from the logits of a row at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from descant.callbacks.evaluate.contributions import Contributions
from descant.callbacks.plots.style import CYCLE, rgb
from descant.datamodules.base import BatchDataset
from descant.modules.core.sham import partners
from tests.callbacks.balance.test_balance import model, one
from tests.callbacks.balance.test_g_blending import AdvantageOutput
from tests.ranks import run_ranks
from tests.recipes.test_fusion import FUSIONS, WIDTHS, Signs
from tests.step_toy import QUIET
from tests.tolerance import F32, ulps

LOGGED = ulps(8, F32)  # numbers up to 1, as differences of logged ones, which are float32
OPTIONS = {name: value for name, value in QUIET.items() if name != "limit_val_batches"}


class Data(AdvantageOutput):
    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Signs(16, seed=1, whole=False), "blind": Blind()}


class Blind(Signs):
    """Nobody has both."""

    def __init__(self) -> None:
        super().__init__(8, seed=2)
        self.has["text"][:] = False


def evaluated(kind: str = "late", batch_size: int = 24, world: int = 1, **options: Any) -> dict[str, float]:
    strategy = "ddp" if world > 1 else "auto"
    trainer = L.Trainer(devices=world, strategy=strategy, callbacks=[Contributions(**options)], **OPTIONS)
    data = Data(batch_size=batch_size, eval_batch_size=batch_size, whole=False)
    (values, *_) = trainer.validate(model(kind), datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()} | dict(values)


@pytest.mark.parametrize("kind", FUSIONS)
def test_numbers_by_hand(kind: str) -> None:
    values = evaluated(kind, circles=2)
    data, at = Signs(16, seed=1, whole=False), model(kind).eval()
    rows = [n for n in range(16) if data.has["image"][n] and data.has["text"][n] and data.label[n] >= 0]
    assert 0 < len(rows) < 16

    def z_of(m: str, n: int) -> Tensor:
        return at.heads[m](at.pools[m](at.towers[m](data.x[m][n : n + 1].double())))

    def right(n: int, there: tuple[str, ...], **other: int) -> bool:
        z = {m: z_of(m, other.get(m, n)) for m in WIDTHS}
        logits = at.fuse(z, {m: torch.tensor([m in there]) for m in WIDTHS})
        return int(logits.argmax()) == int(data.label[n])

    def accuracy(*there: str, **other: dict[int, int]) -> float:
        return sum(right(n, there, **{m: of[n] for m, of in other.items()}) for n in rows) / len(rows)

    both = accuracy("image", "text")
    assert values["val/joint"] == pytest.approx(both, abs=LOGGED)
    total = 0.0
    for m, other in (("image", "text"), ("text", "image")):
        own = sum(int(at.own[m](z_of(m, n)).argmax()) == int(data.label[n]) for n in rows) / len(rows)
        assert values[f"val/alone/{m}"] == pytest.approx(own, abs=LOGGED)
        shapley = ((accuracy(m) - accuracy()) + (both - accuracy(other))) / 2
        assert values[f"val/shapley/{m}"] == pytest.approx(shapley, abs=LOGGED)
        total += values[f"val/shapley/{m}"]
        assert values[f"val/utilization/{m}"] == pytest.approx((both - accuracy(other)) / both, abs=LOGGED)
        lost = 0.0
        for s in range(2):
            index = torch.tensor(rows)
            source = partners(index, torch.ones(len(rows), dtype=torch.bool), "importance", m, s)
            lost += (both - accuracy("image", "text", **{m: dict(zip(rows, index[source].tolist(), strict=True))})) / 2
        assert values[f"val/importance/{m}"] == pytest.approx(lost, abs=LOGGED)
    assert total == pytest.approx(both - accuracy(), abs=LOGGED)
    assert not any(name.startswith("blind/") for name in values), "no row has both"


def on_a_rank(rank: int) -> dict[str, float]:
    return evaluated("mid", batch_size=4, world=2)


@pytest.mark.slow
@pytest.mark.ddp
def test_results_depend_on_neither_batches_nor_ranks() -> None:
    wanted = evaluated("mid")
    assert evaluated("mid", batch_size=3) == pytest.approx(wanted, abs=LOGGED)
    for values in run_ranks(2, on_a_rank):
        assert values == pytest.approx(wanted, abs=LOGGED)


def fit(recipe: Any) -> None:
    L.Trainer(callbacks=[Contributions()], **OPTIONS).validate(recipe, datamodule=Data(24, whole=False), verbose=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Contributions(circles=0), "circles 0: 1 is the least"),
        (
            lambda: fit(BoringModel()),
            "the protocol Classifies .*; BoringModel lacks it, Fusion has it",
        ),
        (lambda: fit(one()), "Contributions: Fusion has one modality"),
    ],
)
def test_wrong_arguments_are_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_accuracies_are_plotted_over_the_steps_of_a_fit_and_saved(tmp_path: Path) -> None:
    seen = Contributions()
    trainer = L.Trainer(
        max_epochs=3,
        default_root_dir=tmp_path,
        logger=TensorBoardLogger(tmp_path),
        callbacks=[seen],
        num_sanity_val_steps=1,
        **{name: value for name, value in OPTIONS.items() if name != "logger"},
    )
    trainer.fit(model(), datamodule=Data(24, whole=False))
    steps, values_SK = seen.tracks["val"].points()
    assert steps == [1, 2, 3] and values_SK.shape == (3, 3), "not of the sanity check"
    last = {name: float(value) for name, value in trainer.callback_metrics.items()}
    wanted = [last["val/alone/image"], last["val/alone/text"], last["val/joint"]]
    assert values_SK[-1].tolist() == pytest.approx(wanted, rel=ulps(4, F32))
    folder = Path(str(trainer.log_dir)) / "pictures"
    colours = {tuple(pixel) for pixel in np.asarray(Image.open(folder / "accuracy-3.png")).reshape(-1, 3)}
    assert len(colours & set(map(rgb, CYCLE))) >= 2, "a curve of each modality"
    again = Contributions()
    again.load_state_dict(seen.state_dict())
    assert again.tracks["val"].points()[0] == steps
