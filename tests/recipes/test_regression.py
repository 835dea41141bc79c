"""Numbers to predict: losses by hand, the unit of the data, what is absent, errors, probes, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from descant.callbacks.balance.balance import Balance
from descant.datamodules.fields.fields import Fields, ImageField, LabelField, NumberField
from descant.datamodules.user.user_data import UserData
from descant.modules.balance.ogm import OGM
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import ForksFeatures, MultimodalClassifier, PredictsNumbers, Scores
from descant.modules.evaluation.numbers import number_errors
from descant.modules.losses.numbers import AbsoluteError, GaussianLikelihood, Huber, NumberLoss, SquaredError
from descant.modules.towers import Towers
from descant.recipes import Regression
from tests.conftest import Result
from tests.recipes.test_fusion import WIDTHS, Line
from tests.tolerance import F64, rounding

Cli = Callable[..., Result]
CLOSE = rounding(64, F64)  # a tower, a fusion and a loss: some sums over 8 to 16 numbers
LOSSES: dict[str, tuple[NumberLoss, Callable[..., torch.Tensor]]] = {
    "squared": (SquaredError(), lambda f, t: F.mse_loss(f[:, 0], t, reduction="none")),
    "absolute": (AbsoluteError(), lambda f, t: F.l1_loss(f[:, 0], t, reduction="none")),
    "huber": (Huber(0.5), lambda f, t: F.huber_loss(f[:, 0], t, reduction="none", delta=0.5)),
    "gaussian": (
        GaussianLikelihood(),
        lambda f, t: F.gaussian_nll_loss(f[:, 0], t, f[:, 1].exp(), reduction="none"),
    ),
}


def batch(rows: int = 8, unit: float = 1.0) -> Batch:
    """Float64 samples with some modalities and numbers absent; the last one is padding."""
    g = torch.Generator().manual_seed(1)
    inputs = {m: torch.randn(rows, width, generator=g).double() for m, width in WIDTHS.items()}
    present = {m: torch.rand(rows, generator=g) < 0.7 for m in WIDTHS}
    for mask_B in present.values():
        mask_B[-1] = False
    y_B = unit * (40 + 10 * torch.randn(rows, generator=g).double())
    y_B[1] = torch.nan
    return Batch(inputs, present, {"age": y_B}, step=present)


def recipe(loss: NumberLoss, unit: float = 1.0, **options: Any) -> Regression:
    torch.manual_seed(0)
    towers = Towers(others={m: Line(width) for m, width in WIDTHS.items()})
    model = Regression(towers, "age", loss, width=16, unimodal=True, **options).double()
    model.number.set(40 * unit, 10 * unit)
    return model


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_that_of_torch_on_the_scale_of_training(kind: str) -> None:
    loss, reference = LOSSES[kind]
    model, data = recipe(loss), batch()
    terms = model(data).terms
    assert list(terms) == ["fused", *WIDTHS]
    z = model.latents(data)
    each = {"fused": model.fuse(z, data.present), **model.unimodal(z, data.present)}
    here = {"fused": model.some(data.present), **data.present}
    t_B = (data.targets["age"] - 40) / 10
    for name, term in terms.items():
        valid_B = here[name] & t_B.isfinite()
        assert term.valid is not None and torch.equal(term.valid, valid_B)
        torch.testing.assert_close(term.value[valid_B], reference(each[name], t_B)[valid_B], **CLOSE)
        assert int(term.norm) == int(here[name].sum())  # with or without a number
    sum(term.sum() for term in terms.values()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_unit_changes_predictions_and_neither_loss_nor_gradient() -> None:
    metres, feet = (recipe(SquaredError(), unit)(batch(unit=unit)).terms["fused"] for unit in (1.0, 3.28))
    torch.testing.assert_close(metres.value[metres.valid], feet.value[feet.valid], **CLOSE)
    a, b = (recipe(SquaredError(), unit).numbers(batch())["age"] for unit in (1.0, 3.28))
    torch.testing.assert_close(a * 3.28, b, equal_nan=True, **CLOSE)
    none_B = ~recipe(SquaredError()).some(batch().present)
    assert torch.equal(a.isnan(), none_B) and none_B[-1]


def test_a_likelihood_has_the_variance_of_its_samples() -> None:
    raw_1K = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    t_B = torch.tensor([-3.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([raw_1K], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = GaussianLikelihood()(raw_1K.expand(4, 2), t_B).mean()
        value.backward()
        return value

    optimizer.step(closure)
    wanted = torch.stack([t_B.mean(), t_B.var(correction=0).log()])
    torch.testing.assert_close(raw_1K.detach()[0], wanted, atol=1e-5, rtol=1e-5)  # of the optimizer


def test_errors_are_those_of_the_definition_and_rows_without_a_number_do_not_count() -> None:
    g = torch.Generator().manual_seed(0)
    f_N, y_N = torch.randn(2, 50, generator=g).double()
    y_N[::7], f_N[3] = torch.nan, torch.nan
    both = (f_N.isfinite() & y_N.isfinite()).numpy()
    f, y = f_N.numpy()[both], y_N.numpy()[both]
    errors: Any = number_errors(f_N, y_N, torch.arange(50))
    assert float(errors["rmse"]) == pytest.approx(np.sqrt(np.mean((f - y) ** 2)), rel=CLOSE["rtol"])
    assert float(errors["mae"].mean()) == pytest.approx(np.mean(np.abs(f - y)), rel=CLOSE["rtol"])
    assert float(errors["r2"]) == pytest.approx(
        1 - np.sum((f - y) ** 2) / np.sum((y - y.mean()) ** 2), rel=CLOSE["rtol"]
    )
    assert number_errors(f_N, torch.full_like(y_N, torch.nan), torch.arange(50)) == {}


def test_it_has_no_classes_and_callbacks_of_classifiers_refuse_it() -> None:
    model = recipe(SquaredError())
    assert all(has(model, protocol) for protocol in (ForksFeatures, PredictsNumbers, Scores))
    assert not has(model, MultimodalClassifier)
    with pytest.raises(ValueError, match=r"Balance needs the protocol .*Regression lacks it, Fusion has it"):
        Balance(OGM()).setup(None, model, "fit")  # type: ignore[arg-type]


# from files -----------------------------------------------------------------------------------------------------------

OWN = """# How bright a picture is, in lux, from the picture; and its kind.
model:
  class_path: {recipe}
  init_args:
    width: 8
    towers:
      class_path: Towers
      init_args: {{image: {{class_path: ConvTower, init_args: {{widths: [8, 8], blocks: 1}}}}}}
    {rest}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.02}}}}
data:
  class_path: UserData
  init_args:
    path: one
    batch_size: 16
    fields:
      class_path: Fields
      init_args:
        image: {{class_path: ImageField, init_args: {{size: 8}}}}
        labels:
          lux: {{class_path: NumberField, init_args: {{field: lux}}}}
          kind: {{class_path: LabelField, init_args: {{field: kind}}}}
trainer:
  max_steps: 60
  max_epochs: -1
  accelerator: cpu
  precision: 32-true
  check_val_every_n_epoch: 5
  callbacks+: [{{class_path: NumberErrors}}, {{class_path: NumberProbe, init_args: {{target: lux}}}}]
"""
OBJECTIVES = """objectives:
      bright: {class_path: Regress, init_args: {target: lux, modalities: [image], loss: {class_path: Huber}}}
      kind: {class_path: Classify, init_args: {target: kind, classes: 2, modalities: [image]}}"""


def pictures(path: Path, count: int = 64, **changed: str) -> Path:
    """Grey pictures, how bright they are in lux (a row in eight has no number) and which half they are of."""
    path.mkdir()
    random = np.random.default_rng(0)
    with (path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "lux", "kind", "split"])
        for n in range(count):
            level = int(random.integers(20, 236))
            noise = random.integers(-8, 9, (8, 8, 3)) + level
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path / f"{n:02}.png")
            lux = "" if n % 8 == 3 else changed.get("lux", f"{1000 + 50 * level}")
            writer.writerow([f"{n:02}.png", lux, "dark" if level < 128 else "light", "val" if n % 4 == 0 else "train"])
    return path


@pytest.mark.parametrize("kind", ["Regression", "MultiTask"])
def test_from_a_table_to_numbers_in_their_own_unit(cli: Cli, workplace: Path, kind: str) -> None:
    """Trained, resumed, judged on other data and predicted; the scale of training stays with the weights."""
    (workplace / "own.yaml").write_text(
        OWN.format(recipe=kind, rest="target: lux" if kind == "Regression" else OBJECTIVES)
    )
    pictures(workplace / "one")
    assert cli("fit", "--config", "own.yaml", "--name", "r").rc == 0
    run = workplace / "runs/r/001"
    values = json.loads((run / "metrics.json").read_text())
    assert values["val/r2_lux"] > 0.5 and values["val/probe_r2_lux"] > 0.5  # one by one: brightness is in every pixel
    assert values["val/mae_lux"] <= values["val/rmse_lux"] < 3100  # lux; half their range is 5,400
    pictures(workplace / "two", count=24)
    assert cli("predict", "--run", "r/001", "--data.path", "two").rc == 0
    (file,) = (run / "predict-001").glob("embeddings-*.parquet")
    rows = pq.read_table(file).to_pylist()
    assert len(rows) == 24
    known = [(row["lux"], row["lux_predicted"]) for row in rows if row["lux"] is not None and not np.isnan(row["lux"])]
    assert len(known) == 21
    assert cli("test", "--run", "r/001", "--data.path", "two").rc == 0
    judged = json.loads((max(run.glob("test-*")) / "metrics.json").read_text())
    assert judged["test/mae_lux"] == pytest.approx(np.mean([abs(a - b) for a, b in known]), rel=1e-5)  # of float32
    if kind == "MultiTask":
        assert {row["kind_class"] for row in rows} <= {"dark", "light"}


def test_a_target_that_is_no_number_or_no_class_is_refused_with_the_place(
    cli: Cli, workplace: Path, tmp_path: Path
) -> None:
    (workplace / "own.yaml").write_text(OWN.format(recipe="Regression", rest="target: lux"))
    folder = pictures(workplace / "one", lux="dim")
    words = ("fit", "--config", "own.yaml")
    assert "one/00.png: lux: 'dim' is no number; a LabelField reads class names" in cli(*words).refusal
    assert "target: 'kind' is no number of this data" in cli(*words, "--model.target", "kind").refusal

    def labelled(folder: Path, field: LabelField | NumberField) -> UserData:
        fields = Fields(ImageField(size=8), labels={"lux": field})
        return UserData(path=str(folder), fields=fields, batch_size=4)

    with pytest.raises(ValueError, match=r"lux: all 40 training samples have 5: nothing to predict"):
        labelled(pictures(tmp_path / "same", lux="5"), NumberField("lux")).number_scale("lux")
    (folder / "table.csv").unlink()
    with (folder / "table.csv").open("w") as file:
        file.write("file,lux\n" + "".join(f"{n:02}.png,{n}.5\n" for n in range(64)))
    with pytest.raises(ValueError, match=r"lux: 64 different numbers, such as 0.5: a NumberField reads them"):
        labelled(folder, LabelField("lux")).training_set()
