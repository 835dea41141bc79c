"""The benchmark of self-supervised encoders: shares of labels, out-of-distribution detection, and their callbacks.

Letters: N rows of a set or bank, M rows out of distribution, Q rows to score, C classes, D width.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from descant.callbacks import LinearProbe, OutOfDistribution
from descant.modules.core.batch import Batch
from descant.modules.core.rng import uniform_N
from descant.modules.evaluation.metrics import fit_logistic
from descant.modules.evaluation.out_of_distribution import Mahalanobis, NearestNeighbours, auroc_shares
from descant.modules.evaluation.shares import share_rows, stratified_order
from tests.callbacks.evaluate.test_embeddings import Data, Recipe, evaluate, make, trainer
from tests.ranks import run_ranks
from tests.tolerance import F32, F64, ulps

COUNTS = (40, 13, 13, 5, 1)


def labels(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels of five classes of unequal size, in any order, and a draw of each row."""
    g = torch.Generator().manual_seed(seed)
    label_N = torch.cat([torch.full((n,), 10 * c) for c, n in enumerate(COUNTS)])
    return label_N[torch.randperm(len(label_N), generator=g)], torch.rand(len(label_N), generator=g)


# shares of labels ----------------------------------------------------------------------------------------------------


def webster(n: int) -> list[int]:
    """Seats of each class by highest averages N_c / (2 s + 1), after one each; the first class of equal ones."""
    seats = [1] * len(COUNTS)
    while sum(seats) < n:
        seats[max(range(len(COUNTS)), key=lambda c: (Fraction(COUNTS[c], 2 * seats[c] + 1), -c))] += 1
    return seats


def test_every_beginning_of_the_order_is_an_apportionment_by_webster() -> None:
    label_N, draw_N = labels()
    order_N = stratified_order(label_N, draw_N)
    assert sorted(order_N.tolist()) == list(range(len(label_N)))
    for n in range(len(COUNTS), len(label_N) + 1):
        assert (label_N[order_N[:n]] // 10).bincount(minlength=len(COUNTS)).tolist() == webster(n)
    for c in range(len(COUNTS)):  # the draws order the rows of a class
        draws = draw_N[order_N[label_N[order_N] == 10 * c]]
        assert draws.tolist() == sorted(draws.tolist())


def test_shares_are_nested_hold_every_class_and_depend_on_draws_alone() -> None:
    label_N, draw_N = labels()
    rows = {share: set(share_rows(label_N, draw_N, share).tolist()) for share in (0.01, 0.1, 0.3, 1.0)}
    assert rows[0.01] < rows[0.1] < rows[0.3] < rows[1.0]
    assert [len(of) for of in rows.values()] == [5, 7, 22, 72]  # one of each class where 1 % is fewer
    turn_N = torch.randperm(len(label_N), generator=torch.Generator().manual_seed(9))
    assert {int(turn_N[i]) for i in share_rows(label_N[turn_N], draw_N[turn_N], 0.3)} == rows[0.3]
    assert set(share_rows(label_N, labels(1)[1], 0.3).tolist()) != rows[0.3]


def test_the_probe_of_a_share_is_fitted_on_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, whole = (make(n=n, seed=seed, signal=1.0, absent=0.0) for n, seed in ((90, 3), (60, 0)))
    data, probe = Data({"val": whole}, bank=bank), LinearProbe("group", shares=[0.1, 0.3, 1.0])
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    values = evaluate(data, probe)
    x_ND = F.normalize(bank.inputs["image"], dim=1).double()
    std_D, mean_D = torch.std_mean(x_ND, dim=0, correction=0)
    x_QD = (F.normalize(whole.inputs["image"], dim=1).double() - mean_D) / std_D
    for share, end in ((0.1, "@0.1"), (0.3, "@0.3"), (1.0, "")):
        rows = share_rows(bank.targets["group"], uniform_N(bank.index, "probe/shares", 3), share)
        w_CD, b_C = fit_logistic(((x_ND - mean_D) / std_D)[rows], bank.targets["group"][rows], 3)
        correct = (x_QD @ w_CD.T + b_C).argmax(1) == whole.targets["group"]
        assert values[f"val/probe_group_top1{end}"] == pytest.approx(float(correct.double().mean()), abs=ulps(8, F32))
    assert values["val/probe_group_top1"] == evaluate(data, LinearProbe("group"))["val/probe_group_top1"]
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    again = evaluate(data, probe)  # another seed draws other labels
    assert again["val/probe_group_top1@0.1"] != values["val/probe_group_top1@0.1"]
    assert again["val/probe_group_top1"] == values["val/probe_group_top1"]


# out of distribution -------------------------------------------------------------------------------------------------


def test_scores_and_auroc_equal_explicit_loops() -> None:
    g = torch.Generator().manual_seed(0)
    bank_ND = (
        torch.randn(30, 4, generator=g, dtype=torch.float64) @ torch.diag(torch.tensor([1.0, 2.0, 0.5, 0.0])).double()
    )
    z_QD = torch.randn(7, 4, generator=g, dtype=torch.float64)
    sigma_DD = torch.stack([torch.outer(z - bank_ND.mean(0), z - bank_ND.mean(0)) for z in bank_ND]).mean(0)
    inverse_DD = torch.linalg.inv(sigma_DD + 1e-3 * sigma_DD.trace() / 4 * torch.eye(4, dtype=torch.float64))
    by_hand = torch.stack([(z - bank_ND.mean(0)) @ inverse_DD @ (z - bank_ND.mean(0)) for z in z_QD])
    torch.testing.assert_close(Mahalanobis()(z_QD, bank_ND), by_hand, rtol=ulps(1 << 14, F64), atol=0)
    for k in (1, 3, 99):
        near = [sorted(float((F.normalize(z, dim=0) - F.normalize(b, dim=0)).norm()) for b in bank_ND) for z in z_QD]
        wanted = torch.tensor([row[min(k, 30) - 1] for row in near], dtype=torch.float64)
        torch.testing.assert_close(NearestNeighbours(k)(z_QD, bank_ND), wanted, rtol=0, atol=ulps(1 << 12, F64))
    score_N, score_M = (torch.randint(5, (n,), generator=g).double() for n in (40, 25))
    loop = [sum((m > n) + 0.5 * (m == n) for m in score_M.tolist()) / 25 for n in score_N.tolist()]
    assert auroc_shares(score_N, score_M).tolist() == pytest.approx(loop, abs=ulps(4, F64))
    both, truth = torch.cat([score_N, score_M]), torch.cat([torch.zeros(40), torch.ones(25)]).long()
    area = binary_auroc((both - both.min()) / 10, truth)
    assert float(auroc_shares(score_N, score_M).mean()) == pytest.approx(float(area), abs=ulps(16, F32))


def test_a_broken_or_collapsed_encoder_has_no_auroc() -> None:
    z_ND = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert Mahalanobis()(z_ND, torch.ones(9, 4)).isnan().all()
    assert Mahalanobis()(z_ND, z_ND.masked_fill(z_ND > 1, torch.nan)).isnan().all()
    assert auroc_shares(torch.tensor([0.0, torch.nan]), torch.ones(3)).isnan().all()


class Other(Data):
    """Toy data, whose sets are read by themselves."""

    def evaluation_loader(self, whole: Batch) -> Any:
        return self.loader(whole)


def far(whole: Batch) -> Batch:
    """The same rows, with images all in one direction that no other image has."""
    x = -whole.inputs["image"].abs()
    return Batch(
        {**whole.inputs, "image": x}, whole.present, whole.targets, index=whole.index, content_id=whole.content_id
    )


def ood(rank: int | None = None) -> dict[str, float]:
    bank = make(n=50, seed=5)
    bank.inputs["image"].abs_()
    one, two = make(n=30), make(n=21, seed=2)
    for whole in (one, two):
        whole.inputs["image"].abs_()
    # a set of the same name, and for the one without such a name the first
    others: dict[str, L.LightningDataModule] = {
        "same": Other({"one": one}),
        "away": Other({"first": far(two), "one": far(one)}),
    }
    options: dict[str, Any] = (
        {} if rank is None else {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    )
    evaluator = OutOfDistribution(others, [Mahalanobis(), NearestNeighbours(3)])
    return evaluate(Data({"one": one, "two": two}, bank=bank), evaluator, stage="test", **options)


def test_other_data_are_separated_by_their_distance_from_the_bank() -> None:
    values = ood()
    assert set(values) == {
        f"{s}/ood_{o}_{d}" for s in ("one", "two") for o in ("same", "away") for d in ("mahalanobis", "knn")
    }
    for detector in ("mahalanobis", "knn"):
        assert values[f"one/ood_same_{detector}"] == pytest.approx(0.5, abs=ulps(64, F32))  # every score has its equal
        assert values[f"two/ood_same_{detector}"] != 0.5
        assert values[f"one/ood_away_{detector}"] == values[f"two/ood_away_{detector}"] == 1


@pytest.mark.ddp
def test_two_ranks_find_what_one_finds() -> None:
    alone = ood()
    for values in run_ranks(2, ood):
        assert values == pytest.approx(alone, abs=ulps(16, F32))


class Means(Recipe):
    """Embeds an image by its mean colour."""

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return {"image": batch.inputs["image"].float().mean(dim=(2, 3))}


def pictures(channels: int, size: int, n: int = 8) -> Batch:
    x = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(channels))
    x[:, 0] += 1  # red, or a lighter grey
    return Batch(
        {"image": x}, {"image": torch.ones(n, dtype=torch.bool)}, index=torch.arange(n), content_id=torch.arange(n)
    )


def test_grey_images_get_the_channels_of_the_run_and_another_size_is_refused() -> None:
    data = Data({"val": pictures(3, 4)}, bank=pictures(3, 4, n=20))
    grey = OutOfDistribution({"grey": Other({"test": pictures(1, 4)})})
    assert evaluate(data, grey, stage="test", recipe=Means())["val/ood_grey_knn"] == 1
    large = OutOfDistribution({"large": Other({"test": pictures(3, 6)})})
    with pytest.raises(ValueError, match=r"image of large is \[3, 6, 6\], and the run's \[3, 4, 4\]"):
        evaluate(data, large, stage="test", recipe=Means())


def test_it_runs_in_tests_alone_unless_asked() -> None:
    data = Data({"val": make()}, bank=make(seed=1))
    for validate in (False, True):
        run = trainer(OutOfDistribution({"other": Other({"val": make(seed=2)})}, validate=validate))
        run.fit(Recipe(), datamodule=data)
        assert ("val/ood_other_knn" in run.callback_metrics) is validate


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (lambda: OutOfDistribution({}), "others: none given; such as"),
        (
            lambda: OutOfDistribution({"a": Data({})}, [NearestNeighbours(1), NearestNeighbours(2)]),
            "two are called 'knn'",
        ),
        (lambda: NearestNeighbours(0), "k 0 is no number of neighbours; 1 is the least"),
        (lambda: Mahalanobis(0.0), "shrink 0 is not positive"),
        (lambda: LinearProbe("group", shares=[]), "shares: 0 is not above 0 and at most 1, such as 0.1"),
        (lambda: LinearProbe("group", shares=[1.5]), "shares: 1.5 is not above 0 and at most 1, such as 0.1"),
        (
            lambda: ood_of(OutOfDistribution({"a": Data({"val": make()})})),
            r"others: a: Data has no evaluation_loader\(\)",
        ),
        (lambda: ood_of(OutOfDistribution({"a": Other({"val": make()})}, sets=["x"])), "no set 'x'; the data has val"),
        (lambda: ood_of(OutOfDistribution({"a": Other({"val": pictures(1, 4)})}, modality="text")), "a has no 'text'"),
    ],
)
def test_bad_input_is_one_line(made: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        made()
    assert "\n" not in str(error.value)


def ood_of(callback: OutOfDistribution) -> dict[str, float]:
    return evaluate(Data({"val": make()}, bank=make(seed=1)), callback, stage="test")
