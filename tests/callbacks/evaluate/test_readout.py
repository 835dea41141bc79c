"""The readout of toy towers whose features are inputs, turned: r, controls, the twin and what resuming keeps of it.

Letters: N stimuli, P features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from descant.callbacks import Readout, Retrieval
from descant.callbacks.evaluate.readout import weights
from descant.modules.core.batch import Batch
from descant.modules.evaluation.readout import ModelContrast, Products, RidgeReadout
from tests.callbacks.evaluate.test_embeddings import Data, Recipe, evaluate, trainer
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps


class Featured(Recipe):
    """Features are inputs times a matrix, which training changes; the embedding is another thing."""

    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(4))
        self.register_buffer("batches", torch.tensor(0))

    def present_features(self, batch: Batch, modality: str) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        # with a gain of 0 the features are a nonlinear mess of the inputs, with 1 they are the inputs
        x_BD = batch.inputs[modality].float()
        h_BD = torch.lerp(torch.sin(40 * x_BD), x_BD, self.gain)
        return torch.where(batch.present[modality][:, None], h_BD, torch.zeros_like(h_BD))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches += 1
        return (self.gain - 1).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def stimuli(n: int = 220, seed: int = 0, absent: float = 0.0) -> Batch:
    """Targets that are linear in the picture, of picture and text together, and in nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = {m: torch.randn(n, 4, generator=generator) for m in ("image", "text")}
    noise = torch.randn(n, 3, generator=generator)
    targets = {
        "linear": x["image"][:, :3] + 0.3 * noise,
        "one": x["image"][:, 0] + 0.3 * noise[:, 0],
        "meet": x["image"][:, :3] * x["text"][:, :3] + 0.3 * noise,
        "noise": noise,
        "group": torch.arange(n) % 3,
    }
    targets["one"][::5] = torch.nan
    present = {m: torch.rand(n, generator=generator) >= absent for m in x}
    present["image"] |= ~present["text"]
    index = torch.randperm(1000, generator=generator)[:n]
    return Batch(x, present, targets, index=index, content_id=index)


def trained() -> Featured:
    recipe = Featured()
    nn.init.ones_(recipe.gain)
    return recipe


def read(*readouts: L.Callback, stage: str = "test", recipe: L.LightningModule | None = None, **sets: Batch) -> Any:
    return evaluate(Data(sets or {"val": stimuli()}), *readouts, recipe=recipe or trained(), stage=stage)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_features_of_present_rows_are_sorted_by_sample_id(stage: str) -> None:
    whole = stimuli(absent=0.3)
    values = read(Readout(["linear", "one"]), stage=stage, val=whole)
    order = whole.index.argsort()
    order = order[whole.present["image"][order]]
    assert sorted(values) == ["val/readout_linear", "val/readout_one"]
    for target in ("linear", "one"):
        wanted = RidgeReadout()(whole.inputs["image"][order], whole.targets[target][order])
        assert values[f"val/readout_{target}"] == pytest.approx(float(wanted.r.mean()), abs=ulps(64, F32))
    assert values["val/readout_linear"] > 0.9


def test_other_modalities_have_keys_of_their_own_and_sets_can_be_chosen() -> None:
    values = read(
        Readout(["linear"], modality="text", against="image", sets=["two"]), one=stimuli(), two=stimuli(seed=1)
    )
    assert list(values) == ["two/readout_linear_text"]
    assert abs(values["two/readout_linear_text"]) < 0.3


def test_shuffled_rows_have_no_r() -> None:
    plain, control = (read(Readout(["linear"], shuffle=s), val=stimuli(n=990)) for s in (False, True))
    assert plain["val/readout_linear"] > 0.9
    assert abs(control["val/readout_linear"]) < 0.08
    rows = stimuli(n=50)
    readout = Readout(["linear"], shuffle=True)
    from descant.callbacks.evaluate.embeddings import Rows

    store = Rows({"image": torch.arange(50.0)[:, None]}, rows.present, rows.content_id, rows.index, rows.targets)
    moved = readout._x(store, "image", torch.arange(50))[:, 0]
    assert sorted(moved.tolist()) == list(range(50)) and not (moved == torch.arange(50)).any()


def contrasted(**options: Any) -> Readout:
    return Readout(["linear", "meet", "noise"], contrast=ModelContrast(resamples=200), components=4, **options)


def test_contrasts_equal_those_of_the_module() -> None:
    whole = stimuli(n=600)
    values = read(contrasted(), val=whole)
    assert values["val/readout_meet_integration"] == 1 and values["val/readout_meet_integration_concat"] == 0
    assert values["val/readout_linear_integration"] == values["val/readout_noise_integration"] == 0
    order = whole.index.argsort()
    x = {m: x_NP[order] for m, x_NP in whole.inputs.items()}
    ridge, y = RidgeReadout(), whole.targets["noise"][order]
    models = [ridge(x["image"], y), ridge(x["text"], y), ridge(torch.cat([x["image"], x["text"]], 1), y)]
    fused = ridge(Products(x["image"], x["text"], 4), y)
    wanted = ModelContrast(resamples=200).integration(fused, *models).double().mean()
    assert values["val/readout_noise_integration"] == float(wanted)
    assert not any("random" in key for key in values)  # nothing was trained: there is no twin
    assert sorted(read(contrasted(), stage="validate")) == [f"val/readout_{t}" for t in ("linear", "meet", "noise")]


def fit(readout: Readout, folder: Path, steps: int, resume: Path | None = None) -> tuple[Featured, L.Trainer, Path]:
    recipe, run = Featured(), trainer(readout, max_steps=steps, max_epochs=-1, default_root_dir=folder)
    run.fit(recipe, datamodule=Data({"val": stimuli(n=600)}), ckpt_path=None if resume is None else str(resume))
    path = folder / f"{steps}.ckpt"
    run.save_checkpoint(path)
    return recipe, run, path


def test_the_twin_is_the_network_before_training_also_after_a_restart(tmp_path: Path) -> None:
    _, _, path = fit(contrasted(), tmp_path, steps=2)
    readout = contrasted()
    recipe, run, _ = fit(readout, tmp_path, steps=20, resume=path)
    assert readout._twin is not None and readout._twin["gain"].tolist() == [0.0] * 4
    assert float(recipe.gain.detach().min()) > 0.99
    run.test(recipe, datamodule=Data({"val": stimuli(n=600)}), verbose=False)
    values = {key: float(value) for key, value in run.callback_metrics.items()}
    assert values["val/readout_linear_beats_random"] == 1 and values["val/readout_noise_beats_random"] == 0
    assert values["val/readout_linear"] > 0.9 > values["val/readout_linear_random"] + 0.5
    untrained = read(Readout(["linear"]), recipe=Featured(), val=stimuli(n=600))
    assert values["val/readout_linear_random"] == pytest.approx(untrained["val/readout_linear"], abs=ulps(84, F32))
    assert int(recipe.batches) == 20  # the network has its own weights and buffers again


def test_a_network_against_itself_is_no_better() -> None:
    readout, recipe = contrasted(), trained()
    readout._twin = {name: value.clone() for name, value in recipe.state_dict().items()}
    values = read(readout, recipe=recipe)
    assert values["val/readout_linear_random"] == values["val/readout_linear"]
    assert values["val/readout_linear_beats_random"] == 0


def test_weights_are_restored_after_an_error() -> None:
    recipe = trained()
    with pytest.raises(RuntimeError, match="fault"), weights(recipe, Featured().state_dict()):
        assert recipe.gain.detach().tolist() == [0.0] * 4
        raise RuntimeError("fault")
    assert recipe.gain.detach().tolist() == [1.0] * 4


def test_without_a_contrast_nothing_is_stored(tmp_path: Path) -> None:
    readout = Readout(["linear"])
    fit(readout, tmp_path, steps=1)
    assert readout.state_dict() == {}


def test_nan_features_give_nan_and_targets_without_values_are_skipped() -> None:
    whole = stimuli()
    whole.targets["linear"][:] = torch.nan
    assert list(read(Readout(["linear", "noise"]), val=whole)) == ["val/readout_noise"]
    whole = stimuli()
    whole.inputs["image"][7] = torch.nan
    assert read(Readout(["linear"]), val=whole)["val/readout_linear"] != pytest.approx(0, abs=9)


def test_other_evaluators_are_not_affected() -> None:
    def recall(*evaluators: L.Callback) -> dict[str, float]:
        return {key: value for key, value in read(*evaluators).items() if "readout" not in key}

    assert recall(Retrieval()) == recall(Readout(["linear"]), Retrieval()) == recall(Retrieval(), Readout(["linear"]))


def on_a_rank(rank: int) -> dict[str, float]:
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    return evaluate(Data({"val": stimuli(n=200)}), contrasted(), recipe=trained(), stage="test", **options)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_one() -> None:
    wanted = read(contrasted(), val=stimuli(n=200))
    for values in run_ranks(2, on_a_rank):
        assert values == pytest.approx(wanted, rel=ulps(8, F32))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"targets": []}, "Readout: targets: none given"),
        ({"targets": ["one"], "against": "image"}, "Readout: 'image' against itself"),
        ({"targets": ["two"]}, "Readout: no target 'two' in 'val'; it has group, linear, meet, noise, one"),
        ({"targets": ["group"]}, "Readout: target 'group' holds classes, not numbers; use LinearProbe for those"),
        ({"targets": ["one"], "modality": "audio"}, "Readout: no features of 'audio'; the data has image, text"),
        ({"targets": ["one"], "sets": ["vendor"]}, "Readout: sets: no set 'vendor'; the data has val"),
    ],
)
def test_wrong_arguments_are_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        read(Readout(**options))


def test_a_recipe_without_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Readout needs the protocol Features \(.*\); Recipe lacks it$"):
        read(Readout(["one"]), recipe=Recipe())
