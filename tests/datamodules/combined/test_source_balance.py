"""Shares of a mixture by the distance of its parts from a reference. Letters: N rows, D width."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from descant.callbacks import MixtureShares
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.combined.mixture_set import BITS
from descant.datamodules.combined.source_balance import TransportBalance
from descant.modules.selection.transport import source_weights
from descant.report.predictions import TRAIN, _choose_sets
from tests.datamodules.combined.test_mixture import Toy
from tests.step_toy import QUIET

PARTS = ["task", "near", "far"]


def table(folder: Path, parts: int = 3, rows: int = 40) -> str:
    """Embeddings of six kinds of samples, whose texts agree with their images but for those of the third part."""
    generator = torch.Generator().manual_seed(0)
    columns: dict[str, list[Any]] = {"index": [], "z_image": [], "z_text": []}
    for part in range(parts):
        kind_N = torch.arange(rows) % 6
        image_ND, text_ND = (torch.eye(6)[kind_N] + 0.05 * torch.randn(rows, 6, generator=generator) for _ in range(2))
        columns["index"] += [(part << BITS) + n for n in range(rows)]
        columns["z_image"] += image_ND.tolist()
        columns["z_text"] += (text_ND if part < 2 else text_ND.roll(1, dims=0)).tolist()
    types = {"index": pa.int64(), "z_image": pa.list_(pa.float32(), 6), "z_text": pa.list_(pa.float32(), 6)}
    pq.write_table(
        pa.table({name: pa.array(columns[name], kind) for name, kind in types.items()}), folder / "t.parquet"
    )
    return str(folder / "t.parquet")


def mixture(balance: TransportBalance, **options: Any) -> Mixture:
    return Mixture({name: Toy(40) for name in PARTS}, balance=balance, batch_size=8, eval_batch_size=8, **options)


def test_weights_are_those_of_the_sums_of_embeddings(tmp_path: Path) -> None:
    file = table(tmp_path)
    rows = pq.read_table(file)
    z = [torch.tensor(rows[f"z_{m}"].to_pylist(), dtype=torch.float64) for m in ("image", "text")]
    z_ND = sum((F.normalize(x, dim=1) for x in z), torch.zeros(120, 6, dtype=torch.float64))
    wanted = source_weights(z_ND[:40], [z_ND[40:80], z_ND[80:]], temperature=0.05)
    measured = TransportBalance(file, "task").measure_weights(PARTS)
    assert torch.equal(measured.weight_S, wanted.weight_S)
    weights = TransportBalance(file, "task").weights(PARTS)
    assert weights["task"] == 0 and weights["near"] > 2 * weights["far"] > 0
    product = TransportBalance(file, "task", features=["image*text"]).weights(PARTS)
    assert product["near"] > weights["near"], "products see best whether image and text agree"


def test_the_control_sees_no_difference_between_sources(tmp_path: Path) -> None:
    weights = TransportBalance(table(tmp_path), "task", sham="permute").weights(PARTS)
    assert abs(weights["near"] - weights["far"]) < 0.4 and weights["task"] == 0  # 40 rows each; without it 0.99
    assert weights == TransportBalance(table(tmp_path), "task", sham="permute").weights(PARTS)


def test_shares_of_training_are_exact_and_those_of_the_beginning(tmp_path: Path) -> None:
    data = mixture(TransportBalance(table(tmp_path), "task"), samples=800)
    source_N = np.concatenate([batch.source.numpy() for batch in data.train_dataloader()])
    counts, shares = Counter(source_N.tolist()), data.shares
    assert shares is not None and counts[0] == 0 and len(source_N) == 800
    whole = sum(shares.values())
    for number, name in enumerate(PARTS):
        assert abs(counts[number] - 800 * shares[name] / whole) <= 2  # to the nearest one or two

    state = data.state_dict()
    table(tmp_path, rows=22)  # another one under the same name
    again = mixture(TransportBalance(str(tmp_path / "t.parquet"), "task"), samples=800)
    assert again.shares != shares
    resumed = mixture(TransportBalance(str(tmp_path / "t.parquet"), "task"), samples=800)
    resumed.load_state_dict(state)
    assert resumed.shares == shares and all(isinstance(share, Fraction) for share in resumed.shares.values())


def test_predictions_of_a_mixture_are_of_all_its_parts() -> None:
    data = Mixture({name: Toy(40) for name in PARTS}, batch_size=8, eval_batch_size=8)
    chosen = _choose_sets(data, [TRAIN])[TRAIN]
    part_N = chosen.identity(np.arange(len(chosen))) >> BITS
    assert Counter(part_N.tolist()) == {0: 40, 1: 40, 2: 40}
    assert len(data.bank_set()) == 40, "that of probes is of one part"


class Quiet(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_shares_are_metrics_of_the_run(tmp_path: Path) -> None:
    data = mixture(TransportBalance(table(tmp_path), "task"), samples=80)
    trainer = L.Trainer(max_steps=2, callbacks=[MixtureShares()], **QUIET)
    trainer.fit(Quiet(), datamodule=data)
    logged = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("mixture/")}
    assert set(logged) == {"mixture/entropy", *(f"mixture/share/{name}" for name in PARTS)}
    p = [logged["mixture/share/near"], logged["mixture/share/far"]]
    entropy = -sum(x * np.log2(x) for x in p)
    assert logged["mixture/share/task"] == 0 and abs(sum(p) - 1) < 1e-6  # float32 metrics
    assert abs(logged["mixture/entropy"] - entropy) < 1e-6  # float32 metrics


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    file = table(tmp_path, parts=2)
    for make, line in (
        (lambda: TransportBalance(file, "task", temperature=0), "temperature 0: must be above 0"),
        (
            lambda: TransportBalance(file, "tusk").weights(PARTS),
            "reference tusk: one of several parts; .*did you mean task",
        ),
        (lambda: TransportBalance(file, "task").weights(PARTS), "no row of the part 'far'; predict with all parts"),
        (lambda: mixture(TransportBalance(file, "task"), alpha=1.0), "alpha and balance: each sets the shares"),
        (
            lambda: L.Trainer(callbacks=[MixtureShares()], **QUIET).fit(Quiet(), datamodule=Toy(8, batch_size=8)),
            "Toy is no mixture",
        ),
    ):
        with pytest.raises(ValueError, match=line):
            make()
