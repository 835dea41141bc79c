"""Mined negatives in training batches: what they are, resume, ranks. Letters: N samples, K negatives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from descant.callbacks import HardNegativeMiner, Resume
from descant.datamodules.base import BatchDataset, DataModule, NumberedDataset, Rows
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.sampling.resumable_sampler import Slot, Window
from descant.modules.core.batch import Batch
from descant.modules.core.rng import global_seed, mix_N, uniform_N
from descant.modules.objectives.hard_negatives import Negatives
from descant.modules.selection.mining import hard_negatives, one_of_each, pair_threshold
from descant.modules.towers import Towers
from descant.recipes import Contrastive
from tests.callbacks.checkpoints.test_resume import Act, NumberData, equal, fit, point, state
from tests.ranks import run_ranks
from tests.recipes.test_big_batch import Curve
from tests.step_toy import QUIET

N, STEPS = 44, 6  # samples, and steps of an epoch of batches of 8


class PairSet(NumberedDataset):
    """Two samples of each content; one in eleven has no text. ``noise``: of the draw, in training."""

    modalities = ("image", "text")

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__(0, {"image": 0.1} if noise else None)
        self.id_N, self.noise = 3 * np.arange(N)[::-1] + 1, noise

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return super().present(index_N) | {"text": torch.from_numpy(index_N % 11 != 0)}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        number_B, key_B = torch.from_numpy(index_B), torch.from_numpy(index_B // 2)
        phase_B3 = key_B[:, None] * torch.tensor([0.7, 1.3, 2.9]) + 0.1 * number_B[:, None]
        noise_B1 = self.noise * uniform_N(draw_B, "noise")[:, None]
        inputs = {"image": phase_B3.sin() + noise_B1, "text": phase_B3.cos() + noise_B1}
        return Rows(inputs, {"group": key_B % 4}, key_B)


class PairData(DataModule):
    modalities = ("image", "text")

    def training_set(self) -> BatchDataset:
        return PairSet(noise=0.1)

    def bank_set(self) -> BatchDataset:
        return PairSet()

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": PairSet()}


class Augmented(PairData):
    """Images are mirrored on the device in training."""

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return replace(batch, inputs=batch.inputs | {"image": -batch.inputs["image"]}) if self.training else batch


class Counted(HardNegativeMiner):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mined: list[int] = []

    def _mine(self, trainer: L.Trainer, pl_module: L.LightningModule, version: int) -> dict[str, float]:
        self.mined.append(version)
        return super()._mine(trainer, pl_module, version)


class Watching(L.Callback):
    def __init__(self) -> None:
        self.batches, self.ages, self.tables = list[Batch](), list[float](), list[Tensor]()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, i: int) -> None:
        self.batches.append(batch)
        if i == 0:
            self.ages.append(float(trainer.callback_metrics["mining/age"]))
            self.tables.append(trainer.datamodule.mined.negative_NK)  # type: ignore[attr-defined]


def recipe(rate: float = 1e-2) -> Contrastive:
    torch.manual_seed(0)
    return Contrastive(
        Towers(image=Curve(3), text=Curve(3)),
        width=8,
        negatives=Negatives(denominator=True),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=rate),
    )


def data(**options: Any) -> PairData:
    return PairData(batch_size=8, eval_batch_size=16, **options)


@pytest.mark.parametrize("threshold", ["f1", None])
def test_batches_have_negatives_of_the_table(tmp_path: Path, threshold: Literal["f1"] | None) -> None:
    watch, pairs, net = Watching(), data(num_workers=2), recipe(rate=0.0)
    miner = HardNegativeMiner(k=3, every=2, threshold=threshold, label="group")
    trainer, _ = fit(tmp_path, miner, watch, net=net, data=pairs, max_epochs=2)
    slots = [Slot(0, n, True) for n in range(N)]
    bank = PairSet()[Window(slots, slots)]
    with torch.no_grad():
        z = net.eval().embed(bank)
    both = bank.present["text"].nonzero()[:, 0]
    draw_N = torch.from_numpy(mix_N(bank.index[both], "mining", global_seed(), 0))
    both = both[one_of_each(bank.content_id[both], draw_N)]
    z_ND, key_N, id_N = z["text"][both], bank.content_id[both], bank.index[both]
    best = pair_threshold(z["image"], z_ND, bank.content_id, key_N)
    value = best.value if threshold else None
    wanted = hard_negatives(z["image"], z_ND, bank.content_id, key_N, 3, value)
    order_N = bank.index.argsort()
    assert torch.equal(pairs.mined.id_N, bank.index[order_N])  # type: ignore[union-attr]
    table_NK = torch.where(wanted.index_QK >= 0, id_N[wanted.index_QK], -1)[order_N]
    assert torch.equal(pairs.mined.negative_NK, table_NK)  # type: ignore[union-attr]
    logged = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("mining/")}
    # 1e-6: a float32 metric
    assert logged["mining/f1"] == pytest.approx(best.f1) and 0 <= logged["mining/false"] < 0.6
    assert ("mining/threshold" in logged) == bool(threshold)
    assert set(watch.batches[0].inputs) == {"image", "text", "text_neg"}
    drawn, has = set[int](), 0
    for batch in watch.batches:
        has += int(batch.present["text_neg"].sum())
        assert torch.equal(batch.step["text_neg"], batch.present["text_neg"])
        for n in batch.present["text_neg"].nonzero().flatten().tolist():
            row_K = table_NK[(int(batch.index[n]) - 1) // 3].tolist()
            read = {m: _text(m, batch.rng_seed[[n]].numpy()) for m in row_K if m >= 0}
            (negative,) = [m for m, text in read.items() if torch.equal(text, batch.inputs["text_neg"][n])]
            drawn.add(row_K.index(negative))
    assert has == 2 * int((table_NK >= 0).any(dim=1).sum()) > 0
    assert drawn == set(range(int((table_NK >= 0).sum(dim=1).max()))) > {0}


def _text(id: int, draw_B: np.ndarray) -> Tensor:
    """What training reads of a sample with another one's draw."""
    return PairSet(0.1).rows(np.array([N - 1 - (id - 1) // 3]), draw_B).inputs["text"][0]


def test_they_are_mined_again_every_few_epochs_and_the_age_is_logged(tmp_path: Path) -> None:
    watch, miner = Watching(), Counted(every=2)
    fit(tmp_path, miner, watch, net=recipe(0.5), data=data(), max_epochs=5)
    assert watch.ages == [0, 1, 0, 1, 0] and miner.mined == [0, 1, 2]
    same = [torch.equal(a, b) for a, b in zip(watch.tables, watch.tables[1:], strict=False)]
    assert same == [True, False, True, False]


def test_they_are_mined_from_images_that_are_not_augmented(tmp_path: Path) -> None:
    tables = []
    for n, pairs in enumerate((data(), Augmented(batch_size=8, eval_batch_size=16))):
        watch = Watching()
        fit(tmp_path / str(n), HardNegativeMiner(k=3), watch, net=recipe(rate=0.0), data=pairs, max_epochs=1)
        tables.append(watch.tables[0])
    assert torch.equal(*tables)


def test_the_control_has_a_threshold_of_no_meaning(tmp_path: Path) -> None:
    found = []
    for threshold in ("f1", "random"):
        miner = HardNegativeMiner(threshold=threshold)
        fit(tmp_path, miner, net=recipe(0.0), data=data(), max_epochs=3)
        found.append((miner.history["mining/threshold"], miner.history["mining/f1"]))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_samples_that_share_an_excluded_target_are_no_negatives(tmp_path: Path) -> None:
    pairs, miner = data(), HardNegativeMiner(k=20, threshold=None, label="group", exclude="group")
    fit(tmp_path, miner, net=recipe(0.0), data=pairs, max_epochs=1)
    assert pairs.mined is not None and miner.history["mining/false"] == 0
    group = {int(i): number // 2 % 4 for number, i in enumerate(PairSet().id_N)}
    found = [
        (group[a], group[b])
        for a, row in zip(pairs.mined.id_N.tolist(), pairs.mined.negative_NK.tolist(), strict=True)
        for b in row
        if b >= 0
    ]
    # 22 contents in 4 groups: each sample has the 16 or 17 of the other groups
    assert all(a != b for a, b in found) and len(found) >= 16 * len(pairs.mined.id_N)


@pytest.mark.parametrize("step", [2, 6, 12, 13])
def test_resume_is_bit_identical_and_mines_nothing_twice(tmp_path: Path, step: int) -> None:
    """Six steps an epoch, two epochs a table: after 12 steps it is mined again."""
    whole, rest, options = Act(), Act(), dict[str, Any](max_epochs=4)
    first, second, one, two = Counted(every=2), Counted(every=2), data(), data()
    _, model = fit(tmp_path / "a", Resume(every=1, keep=99), first, whole, net=recipe(), data=one, **options)
    path = point(tmp_path / "a", step)
    _, again = fit(tmp_path / "b", Resume(every=1), second, rest, net=recipe(), data=two, path=path, **options)
    assert equal(state(model), state(again)) and rest.losses == whole.losses[step:]
    assert first.mined == [0, 1] and second.mined == ([1] if step < 12 else [])
    assert first.history == second.history
    assert one.mined is not None and two.mined is not None
    assert torch.equal(one.mined.negative_NK, two.mined.negative_NK) and one.mined.version == two.mined.version == 1


@pytest.mark.ddp
def test_two_ranks_mine_what_one_does() -> None:
    one = _mined(0, 1)
    for found in run_ranks(2, _mined, 2):
        assert torch.equal(found[0], one[0])
        # float32 scores, whose sums have another order on two ranks
        torch.testing.assert_close(found[1], one[1])


def _mined(rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
    pairs, net, strategy = data(), recipe(), "ddp" if world > 1 else "auto"
    miner = HardNegativeMiner(k=4)
    L.Trainer(max_epochs=2, devices=world, strategy=strategy, callbacks=[miner], **QUIET).fit(net, datamodule=pairs)
    assert pairs.mined is not None
    return pairs.mined.negative_NK, state(net)


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    for make, says in (
        (lambda: HardNegativeMiner(k=0), "k 0, every 1, pairs 4000000: at least 1 each"),
        (lambda: _fitted(tmp_path, HardNegativeMiner(), Mixture({"a": data(), "b": data()})), "samples of MixtureSet"),
        (lambda: _fitted(tmp_path, HardNegativeMiner(("image", "audio")), data()), "no embedding of 'audio'"),
        (lambda: _fitted(tmp_path, HardNegativeMiner(label="colour"), data()), "no target 'colour'.*it has group"),
        (lambda: _fitted(tmp_path, HardNegativeMiner(exclude="family"), data()), "no target 'family'"),
        (lambda: fit(tmp_path, HardNegativeMiner(), data=NumberData()), "needs the protocol Embeds"),
    ):
        with pytest.raises(ValueError, match=says):
            make()


def _fitted(folder: Path, miner: HardNegativeMiner, pairs: DataModule) -> Any:
    return fit(folder, miner, net=recipe(), data=pairs, max_epochs=1)
