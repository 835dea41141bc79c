"""Robustness of whole sets, by hand from one row at a time. Letters: B samples, M modalities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from descant.callbacks import Attacks
from descant.datamodules.base import BatchDataset
from descant.modules.core.batch import Batch
from descant.modules.evaluation.attacks import Nudge, certified_radius, find_attacks, steepest
from descant.modules.fusion.classifiers import OrthogonalFusion
from descant.recipes import Fusion
from tests.callbacks.balance.test_balance import one
from tests.callbacks.balance.test_g_blending import AdvantageOutput
from tests.callbacks.evaluate.test_contributions import OPTIONS, Blind
from tests.ranks import run_ranks
from tests.recipes.test_fusion import WIDTHS, Signs, double, recipe
from tests.tolerance import F32, ulps

CERTIFY = 0.02


def model() -> Fusion:
    made = recipe(classes=2, unimodal=False)
    made.fusion = OrthogonalFusion().build(dict.fromkeys(WIDTHS, 8), 2)
    return made.double()


class Data(AdvantageOutput):
    def bank_set(self) -> BatchDataset:
        return Signs(20, whole=False)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Signs(40, seed=1, whole=False), "blind": Blind()}


def evaluated(batch_size: int = 24, world: int = 1, **options: Any) -> dict[str, float]:
    strategy = "ddp" if world > 1 else "auto"
    trainer = L.Trainer(devices=world, strategy=strategy, callbacks=[Attacks(validate=True, **options)], **OPTIONS)
    data = Data(batch_size=batch_size, eval_batch_size=batch_size, whole=False)
    trainer.validate(model(), datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_numbers_by_hand() -> None:
    found = evaluated(radius={"image": 0.4, "text": 0.2}, steps=5, certify=CERTIFY)
    data, at = Signs(40, seed=1, whole=False), model().eval()
    b = double(Batch(dict(data.x), dict(data.has), {"kind": data.label}))
    rows = [n for n in range(40) if data.has["image"][n] and data.has["text"][n] and data.label[n] >= 0]
    bank = Signs(20, whole=False)
    slope_MC = steepest(at, [double(Batch(dict(bank.x), dict(bank.has), {"kind": bank.label}))], 20)
    seen: dict[str, list[float]] = {}
    for n in rows:
        row = b.select(torch.tensor([n]))
        y = row.targets["kind"]
        right = bool(at.fuse(at.latents(row), row.present).argmax(dim=1) == y)
        each: dict[str, float] = {"unharmed": right}
        for m, radius in (("image", 0.4), ("text", 0.2)):
            x = row.inputs[m]
            each[f"attacked/{m}"] = not find_attacks(
                Nudge(at, row, [m]), radius * (x - x.mean()).norm()[None], y, steps=5
            )
            other = row.only("text" if m == "image" else "image")
            each[f"absent/{m}"] = bool(at.fuse(at.latents(other), other.present).argmax(dim=1) == y)
        for kind in ("attacked", "absent"):
            each[f"{kind}_worst"] = each[f"{kind}/image"] and each[f"{kind}/text"]
        fusion: Any = at.fusion
        slope = dict(zip(WIDTHS, slope_MC, strict=True))
        far = float(certified_radius(at.fuse(at.latents(row)), fusion.weights, slope, row.present, y))
        each |= {"certified/radius": max(far, 0.0), "certified/share": far >= CERTIFY}
        for name, value in each.items():
            seen.setdefault(name, []).append(float(value))
    wanted = {f"val/{name}": sum(values) / len(rows) for name, values in seen.items()}
    assert found == pytest.approx(wanted, rel=ulps(64, F32)), "and of a set in which nobody has all, nothing"
    assert 0 < wanted["val/attacked_worst"] < wanted["val/unharmed"] < 1 and 0 < wanted["val/certified/share"] < 1
    assert wanted["val/attacked_worst"] <= min(wanted["val/attacked/image"], wanted["val/attacked/text"])


def test_results_depend_on_neither_batches_nor_ranks() -> None:
    whole = evaluated(40, steps=4, restarts=2, radius=0.3)
    assert evaluated(6, steps=4, restarts=2, radius=0.3) == pytest.approx(whole, rel=ulps(8, F32))


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_as_one() -> None:
    whole = evaluated(40, steps=4, restarts=2, certify=CERTIFY)
    for found in run_ranks(2, _on_rank):
        assert found == pytest.approx(whole, rel=ulps(8, F32))


def _on_rank(rank: int) -> dict[str, float]:
    return evaluated(8, world=2, steps=4, restarts=2, certify=CERTIFY)


def test_accuracy_falls_with_the_radius() -> None:
    worst = [evaluated(radius=r, steps=10)["val/attacked_worst"] for r in (1e-6, 0.2, 3.0)]
    assert worst[0] > worst[1] > worst[2] == 0


def fit(made: Any, **options: Any) -> None:
    trainer = L.Trainer(callbacks=[Attacks(**options)], **OPTIONS)
    trainer.validate(made, datamodule=Data(24, whole=False), verbose=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attacks(steps=0), "steps 0: 1 is the least"),
        (lambda: Attacks(radius=0.0), r"a radius of 0: above 0, such as 0\.3"),
        (lambda: Attacks(certify=-1), "a radius of -1: above 0"),
        (lambda: fit(BoringModel()), "Attacks needs the protocol Classifies .* BoringModel lacks it, Fusion has it"),
        (lambda: fit(model(), radius={"sound": 0.1}), "radius 'sound': "),
        (lambda: fit(recipe(), certify=0.1), "Fusion has no OrthogonalFusion"),
    ],
    ids=["steps", "radius", "certify", "protocols", "modality", "fusion"],
)
def test_wrong_arguments_are_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_one_modality_is_attacked_and_never_missing() -> None:
    trainer = L.Trainer(callbacks=[Attacks(steps=2, validate=True)], **OPTIONS)
    trainer.validate(one(), datamodule=Data(24, whole=False), verbose=False)
    assert any(name.startswith("val/attacked/") for name in trainer.callback_metrics)
    assert not any("absent" in name for name in trainer.callback_metrics)
