"""Scores over all subsets of the modalities, of recipes whose score for each subset is known beforehand.

Letters: B rows of a batch, N of a set, D width.
"""

from __future__ import annotations

import hashlib
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from descant.callbacks import KNN, ModalitySubsetEval, Report, Retrieval
from descant.callbacks.plots.style import VERMILLION, pixels, rgb
from descant.callbacks.plots.subsets import heat_map
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.evaluation.metrics import knn_scores
from descant.modules.towers import PatchTower, TextTower, Towers
from descant.recipes import Contrastive
from tests.callbacks.evaluate.test_embeddings import Data, Recipe, evaluate, make, trainer
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps

SUM = ulps(840, F32)  # means of up to 100, as sums of float32 over the rows of batches
MODALITIES = ("image", "text", "audio")
WORTH = {"image": 1.0, "text": 10.0, "audio": 100.0}
SUBSETS = [s for size in (1, 2, 3) for s in combinations(MODALITIES, size)]


class Worth(L.LightningModule):
    """``part``: the mean of what each modality is worth times its input; ``loss``: minus that. It embeds nothing.

    It raises where it is shown a row that lacks some of the batch's modalities, and counts its calls.
    """

    modalities = MODALITIES

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, ...]] = []
        self.turn = nn.Parameter(torch.zeros(()))

    def scores(self, batch: Batch) -> dict[str, Term]:
        assert not self.training and not torch.is_grad_enabled()
        there = [m for m in MODALITIES if bool(batch.present[m].any())]
        some_B = torch.stack([batch.present[m] for m in MODALITIES]).any(0)
        assert all(torch.equal(batch.present[m], some_B) for m in there)
        self.calls.append(tuple(there))
        value_B = torch.zeros(len(batch))
        for m in MODALITIES:
            value_B = value_B + torch.where(batch.present[m], batch.inputs[m][:, 0], 0.0) * WORTH[m]
        # what is not valid may hold anything
        valid_B = some_B & (batch.inputs["image"][:, 1] > -1)
        value_B = value_B.masked_fill(~valid_B, torch.nan)
        return {"part": Term(value_B, valid=valid_B), "loss": Term(-value_B, valid=valid_B)}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        return None

    test_step = validation_step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 0 * self.turn

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def three(n: int = 29, seed: int = 0, absent: float = 0.25) -> Batch:
    batch = make(n, seed, absent=0.0)
    generator = torch.Generator().manual_seed(seed + 100)
    batch.inputs["audio"] = torch.randn(n, 4, generator=generator)
    batch.present = {m: torch.rand(n, generator=generator) >= absent for m in MODALITIES}
    batch.present["image"] |= ~batch.present["text"] & ~batch.present["audio"]
    batch.step = dict(batch.present)
    return batch


def by_hand(whole: Batch, subset: tuple[str, ...], complete: bool = True) -> float:
    found = []
    for i in range(len(whole)):
        needed = MODALITIES if complete else subset
        if all(whole.present[m][i] for m in needed) and whole.inputs["image"][i, 1] > -1:
            found.append(sum(WORTH[m] * float(whole.inputs[m][i, 0]) for m in subset))
    return sum(found) / len(found)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a run without a folder go to where it was started."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_scores_of_subsets_equal_loops_over_rows(stage: str, complete: bool, tmp_path: Path) -> None:
    data = Data({"one": three(), "two": three(40, seed=1)})
    evaluator = ModalitySubsetEval(complete=complete)
    values = evaluate(data, evaluator, stage=stage, recipe=Worth(), default_root_dir=tmp_path)
    for name, whole in data.sets.items():
        wanted = {s: by_hand(whole, s, complete) for s in SUBSETS}
        for subset, number in wanted.items():
            assert values[f"{name}/part/{'+'.join(subset)}"] == pytest.approx(number, abs=SUM)
            assert values[f"{name}/loss/{'+'.join(subset)}"] == pytest.approx(-number, abs=SUM)
        assert values[f"{name}/part_mean"] == pytest.approx(sum(wanted.values()) / 7, abs=SUM)
        assert values[f"{name}/part_worst"] == pytest.approx(min(wanted.values()), abs=SUM)
        assert values[f"{name}/loss_worst"] == pytest.approx(-min(wanted.values()), abs=SUM)  # less is better
        assert values[f"{name}/part_full"] == pytest.approx(wanted[MODALITIES], abs=SUM)
    assert len(values) == 2 * 2 * (7 + 3)


def test_there_are_as_many_forwards_as_subsets_and_batches(tmp_path: Path) -> None:
    recipe = Worth()
    evaluate(Data({"one": three()}, size=5), ModalitySubsetEval(), recipe=recipe, default_root_dir=tmp_path)
    assert len(recipe.calls) == 7 * 6  # 29 rows in batches of 5 (and padding)
    chosen = Worth()
    evaluator = ModalitySubsetEval(modalities=["audio", "text"])
    values = evaluate(Data({"one": three()}, size=40), evaluator, recipe=chosen, default_root_dir=tmp_path)
    assert chosen.calls == [("audio",), ("text",), ("text", "audio")]
    assert {key for key in values if "part/" in key} == {"one/part/audio", "one/part/text", "one/part/audio+text"}


def test_only_chosen_sets_and_a_limit_by_ids(tmp_path: Path) -> None:
    whole = {"one": three(400, absent=0.0), "two": three(20)}
    whole["one"].index = torch.arange(400) * 7
    runs = [
        evaluate(
            Data(whole, size=size),
            ModalitySubsetEval(sets=["one"], limit=100),
            recipe=Worth(),
            default_root_dir=tmp_path,
        )
        for size in (7, 150)
    ]
    assert runs[0] == pytest.approx(runs[1], abs=SUM)
    assert {key.split("/")[0] for key in runs[0]} == {"one"}
    assert abs(runs[0]["one/part/audio"] - by_hand(whole["one"], ("audio",))) > 1e-3  # not all of them
    with pytest.raises(ValueError, match=r"sets 'tow': no such name; did you mean two\? \(known: one, two\)"):
        evaluate(Data(whole), ModalitySubsetEval(sets=["tow"]), stage="test", recipe=Worth(), default_root_dir=tmp_path)


def test_a_set_without_complete_rows_is_skipped_with_a_warning(tmp_path: Path) -> None:
    whole = three()
    whole.present["audio"] = ~whole.present["image"]
    with pytest.warns(
        UserWarning, match="no row of one that has a score has all of image, text, audio; complete: false takes"
    ):
        assert evaluate(Data({"one": whole}), ModalitySubsetEval(), recipe=Worth(), default_root_dir=tmp_path) == {}
    values = evaluate(
        Data({"one": whole}), ModalitySubsetEval(complete=False), recipe=Worth(), default_root_dir=tmp_path
    )
    assert "one/part/image+audio" not in values and "one/part_full" not in values
    assert values["one/part/audio"] == pytest.approx(by_hand(whole, ("audio",), complete=False), abs=SUM)


def on_a_rank(rank: int | None, folder: Path) -> dict[str, float]:
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    data = Data({"one": three(), "two": three(40, seed=1)}, size=6)
    return evaluate(
        data, ModalitySubsetEval(limit=30), recipe=Worth(), default_root_dir=folder, **({} if rank is None else options)
    )


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    alone = on_a_rank(None, tmp_path)
    assert len(alone) == 40
    for values in run_ranks(2, on_a_rank, tmp_path):
        assert values == alone  # the same rows in the same order: the same bits


# by neighbours --------------------------------------------------------------------------------------------------


def neighbours(whole: Batch, bank: Batch, subset: tuple[str, ...], complete: bool = True) -> float:
    """k-NN of what is fused, a row at a time."""
    both = ("image", "text")
    z, z_bank = ({m: F.normalize(b.inputs[m], dim=-1) for m in both} for b in (whole, bank))
    rows = [i for i in range(len(bank)) if bank.present["image"][i] or bank.present["text"][i]]
    z_ND = torch.stack([F.normalize(sum(z_bank[m][i] for m in both if bank.present[m][i]), dim=0) for i in rows])  # type: ignore[arg-type]
    right = []
    for i in range(len(whole)):
        if all(whole.present[m][i] for m in (both if complete else subset)):
            z_D = F.normalize(sum(z[m][i] for m in subset), dim=0)  # type: ignore[arg-type]
            score_C = knn_scores(z_D[None], z_ND, bank.targets["group"][rows], 3, 5, 0.2)[0]
            right.append(int(score_C.argmax()) == int(whole.targets["group"][i]))
    return sum(right) / len(right)


def labelled() -> Data:
    data = Data({"val": make(60, signal=1.5), "more": make(50, seed=5, signal=1.5)}, bank=make(80, seed=3, signal=1.5))
    for batch in (*data.sets.values(), data.bank):
        batch.inputs["text"][:, :3] += 0.7 * F.one_hot(batch.targets["group"], 3)
    return data


@pytest.mark.parametrize("complete", [True, False])
def test_fused_neighbours_equal_loops_over_rows_without_a_further_forward(complete: bool, tmp_path: Path) -> None:
    data, recipe = labelled(), Recipe()
    evaluator = ModalitySubsetEval("group", k=5, temperature=0.2, complete=complete)
    values = evaluate(data, evaluator, recipe=recipe, default_root_dir=tmp_path)
    for name, whole in data.sets.items():
        for subset in (("image",), ("text",), ("image", "text")):
            wanted = neighbours(whole, data.bank, subset, complete)
            assert values[f"{name}/knn_group/{'+'.join(subset)}"] == pytest.approx(wanted, abs=ulps(8, F32))
    assert len({round(v, 6) for v in values.values()}) > 4  # the numbers can tell subsets and sets apart
    sizes = (60 + 2 * 12, 50 + 2 * 10, 80 + 2 * 16)
    assert recipe.embedded == sum(sizes)  # each set once, and the bank once
    beside = Recipe()
    others = evaluate(data, evaluator, KNN("group"), Retrieval(), recipe=beside, default_root_dir=tmp_path)
    assert {key: others[key] for key in values} == values and beside.embedded == sum(sizes)
    ahead = evaluate(data, Retrieval(), evaluator, recipe=Recipe(), default_root_dir=tmp_path)
    assert {key: ahead[key] for key in values} == values


class Joint(Recipe):
    """One embedding of all that is there: the product of what each modality says, so it is no sum of parts."""

    joint_embedding = True

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        self.embedded += len(batch)
        z_BD = torch.ones(len(batch), 4)
        for m, x_BD in batch.inputs.items():
            z_BD = torch.where(batch.present[m][:, None], z_BD * x_BD.sigmoid(), z_BD)
        some_B = torch.stack(list(batch.present.values())).any(0)
        return {"joint": torch.where(some_B[:, None], F.normalize(z_BD, dim=-1), torch.zeros_like(z_BD))}


def test_joint_embeddings_are_computed_for_each_subset(tmp_path: Path) -> None:
    data, recipe = labelled(), Joint()
    evaluator = ModalitySubsetEval("group", k=5, temperature=0.2)
    values = evaluate(data, evaluator, recipe=recipe, default_root_dir=tmp_path)
    rows = data.bank.present["image"] | data.bank.present["text"]
    bank_ND = Joint().embed(data.bank)["joint"][rows]
    for name, whole in data.sets.items():
        full = whole.both("image", "text")
        for subset in (("image",), ("text",), ("image", "text")):
            z_QD = Joint().embed(whole.only(*subset))["joint"][full]
            score_QC = knn_scores(z_QD, bank_ND, data.bank.targets["group"][rows], 3, 5, 0.2)
            wanted = (score_QC.argmax(1) == whole.targets["group"][full]).double().mean()
            assert values[f"{name}/knn_group/{'+'.join(subset)}"] == pytest.approx(float(wanted), abs=ulps(8, F32))


class Named(Recipe):
    """Each modality alone, and both together under a name of their own, where a row has both."""

    joint_embedding = True

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        z = super().embed(batch)
        both_BD = Joint().embed(batch)["joint"]
        return z | {"image+text": both_BD * batch.both("image", "text")[:, None]}


def test_an_embedding_that_is_named_after_a_subset_is_that_subset(tmp_path: Path) -> None:
    data = labelled()
    evaluator = ModalitySubsetEval("group", k=5, temperature=0.2)
    values = evaluate(data, evaluator, recipe=Named(), default_root_dir=tmp_path)
    z_bank, bank = Named().eval(), data.bank
    rows = bank.present["image"] | bank.present["text"]
    with torch.no_grad():
        z = z_bank.embed(bank)
        named = bank.both("image", "text")[:, None]
        bank_ND = F.normalize(torch.where(named, z["image+text"], z["image"] + z["text"]), dim=-1)[rows]
        for name, whole in data.sets.items():
            full, z = whole.both("image", "text"), z_bank.embed(whole)
            for subset in ("image", "text", "image+text"):
                score_QC = knn_scores(z[subset][full], bank_ND, bank.targets["group"][rows], 3, 5, 0.2)
                wanted = (score_QC.argmax(1) == whole.targets["group"][full]).double().mean()
                assert values[f"{name}/knn_group/{subset}"] == pytest.approx(float(wanted), abs=ulps(8, F32))


def test_other_evaluators_run_in_evaluations_that_it_skips(tmp_path: Path) -> None:
    data = labelled()
    evaluator = ModalitySubsetEval("group", k=3, every=9)
    run = trainer(evaluator, KNN("group", k=3), max_epochs=2, num_sanity_val_steps=0, default_root_dir=tmp_path)
    seen: list[set[str]] = []

    class Spy(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append({key for key in trainer.callback_metrics if key.startswith("val/")})

    run.callbacks.append(Spy())  # type: ignore[attr-defined]
    run.fit(Recipe(), datamodule=data)
    assert all("val/knn_group_top1" in keys for keys in seen) and len(seen) == 2
    quiet = trainer(ModalitySubsetEval("group", validate=False), KNN("group"), max_epochs=1, default_root_dir=tmp_path)
    quiet.fit(Recipe(), datamodule=data)
    assert "val/knn_group_top1" in quiet.callback_metrics and "val/knn_group_full" not in quiet.callback_metrics


# compute --------------------------------------------------------------------------------------------------------


def test_an_absent_modality_costs_one_row() -> None:
    torch.manual_seed(0)
    towers = Towers(
        image=PatchTower(size=16, patch=4, width=32, depth=2, heads=2),
        text=TextTower(vocab=64, width=32, depth=2, heads=2, length=8),
    )
    model = Contrastive(towers, width=16).eval()
    n = 32
    inputs = {"image": torch.randn(n, 3, 16, 16), "text": torch.randint(1, 64, (n, 8))}
    batch = Batch(inputs, dict.fromkeys(inputs, torch.ones(n, dtype=torch.bool)))

    def flops(part: Batch) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as count:
            model.embed(part)
        return count.get_total_flops()

    full, image, text = (flops(part) for part in (batch, batch.only("image"), batch.only("text")))
    one = flops(batch.select(slice(0, 1)))
    heads = n * 2 * 2 * 32 * 16  # projections of all rows, of zeros where a modality is absent
    # each subset runs its own tower on all rows, and the other one on a single row
    assert full < image + text + heads <= full + one + 2 * heads
    assert text < 0.4 * full and image < 0.7 * full


# in a run -------------------------------------------------------------------------------------------------------


def test_in_a_fit_it_logs_a_curve_a_subset_and_draws_a_heat_map(tmp_path: Path) -> None:
    data = Data({"one": three(), "two": three(40, seed=1)})
    evaluator = ModalitySubsetEval(every=2)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    # the toy data's hook changes its batches, so each epoch needs its own
    run = trainer(
        evaluator, Report(), logger=logger, max_epochs=4, log_every_n_steps=1, reload_dataloaders_every_n_epochs=1
    )
    run.fit(Worth(), datamodule=data)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("one/part/image+audio")] == [1, 5, 7]  # evaluations 1, 3 and the last
    assert events.Tags()["images"] == ["subsets/val-part", "subsets/val-loss"]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"subsets-val-{score}-{step}.png" for score in ("part", "loss") for step in (2, 6, 8)
    }
    values = json.loads((tmp_path / "metrics.json").read_text())
    assert {"one/part_worst", "one/part_mean", "one/part_full", "two/loss/text"} <= set(values)
    assert evaluator.evaluations == 4
    spared = Worth()
    quiet = trainer(ModalitySubsetEval(validate=False), max_epochs=1, num_sanity_val_steps=0)
    quiet.fit(spared, datamodule=data)
    assert not spared.calls
    quiet.test(spared, datamodule=data, verbose=False)
    assert spared.calls


def test_the_heat_map_frames_the_worst_subsets() -> None:
    subsets: list[tuple[str, ...]] = [("a",), ("b",), ("a", "b")]
    cells: dict[str, dict[tuple[str, ...], float]]
    cells = {"val": {("a",): 0.25, ("b",): 0.75, ("a", "b"): 0.9}, "test": {("a",): 0.5, ("b",): 0.1}}
    for less in (False, True):
        image = pixels(heat_map("score", ["a", "b"], subsets, cells, {"val": 9, "test": 1200}, less=less))
        framed_YX = (image == np.array(rgb(VERMILLION))).all(-1)
        body = len(image) - 12 - 28 * 3
        framed = [int(framed_YX[body + 28 * j : body + 28 * (j + 1)].sum()) for j in range(3)]
        assert (framed[0] > 0) and (framed[1] > 0) != less and (framed[2] > 0) == less  # val a, test b; or b's 0.9
        assert not framed_YX[:body].any()


def test_refusals_in_one_line(tmp_path: Path) -> None:
    class Mute(L.LightningModule):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            return None

    class Fickle(Worth):
        def scores(self, batch: Batch) -> dict[str, Term]:
            self.calls.append(())
            return {f"score{len(self.calls)}": Term(torch.zeros(len(batch)))}

    data = Data({"one": three()}, bank=three())
    faults: list[tuple[L.LightningModule, ModalitySubsetEval, str]] = [
        (Mute(), ModalitySubsetEval(), r"needs the protocol Scores .* or Embeds .*; Mute lacks both$"),
        (Recipe(), ModalitySubsetEval(), r"target: none given, and Recipe has no scores\(batch\) of its own"),
        (Recipe(), ModalitySubsetEval("colour"), r"no target 'colour' in the data; it has group$"),
        (
            Worth(),
            ModalitySubsetEval(modalities=["adio"]),
            r"modalities 'adio': no such name; did you mean audio\? \(known: image, text, audio\)$",
        ),
        (Fickle(), ModalitySubsetEval(), r"scores\(batch\) of Fickle names 'score8', which an earlier batch had not"),
    ]
    for recipe, evaluator, line in faults:
        with pytest.raises(ValueError, match=line) as error:
            evaluate(data, evaluator, recipe=recipe, default_root_dir=tmp_path)
        assert "\n" not in str(error.value)
    for options, line in (
        ({"subsets": 0}, "subsets 0; 1 is the least"),
        ({"limit": 0}, "limit 0 is no number of samples"),
        ({"every": 0}, "every 0 is no number of evaluations"),
        ({"temperature": 0.0}, "temperature 0.0 is not positive"),
        ({"modalities": []}, "modalities: none given"),
    ):
        with pytest.raises(ValueError, match=line):
            ModalitySubsetEval(**options)


def test_nothing_of_the_recipe_changes(tmp_path: Path) -> None:
    recipe = Recipe()
    before = hashlib.sha256(recipe.turn.detach().numpy().tobytes()).hexdigest()
    evaluate(labelled(), ModalitySubsetEval("group"), recipe=recipe, default_root_dir=tmp_path)
    assert hashlib.sha256(recipe.turn.detach().numpy().tobytes()).hexdigest() == before and recipe.turn.grad is None
    assert Image.open(next((tmp_path / "pictures").glob("*.png"))).mode == "RGB"
