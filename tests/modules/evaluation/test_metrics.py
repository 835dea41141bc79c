"""Each measure against a loop that cannot be wrong, and at its two ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from descant.modules.evaluation.metrics import (
    alignment,
    average_precision,
    balanced_accuracy,
    chance_average_precision,
    effective_rank,
    fit_logistic,
    knn_scores,
    matched_rows,
    modality_gap,
    retrieval_ranks,
    ridge_weights,
    uniformity,
)
from tests.tolerance import F32, F64, conditioned, ulps


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("cells", [1, 200, 1 << 24])
def test_ranks_equal_a_double_loop_whatever_the_chunk(cells):
    generator = torch.Generator().manual_seed(0)
    # few distinct values: many exact ties
    z_q = torch.randint(-1, 2, (40, 3), generator=generator).float()
    z_g = torch.randint(-1, 2, (60, 3), generator=generator).float()
    key_q, key_g = (torch.randint(20, (40,), generator=generator), torch.randint(15, (60,), generator=generator))
    expected = []
    for q in range(40):
        right = [float(z_q[q] @ z_g[g]) for g in range(60) if key_g[g] == key_q[q]]
        wrong = [float(z_q[q] @ z_g[g]) for g in range(60) if key_g[g] != key_q[q]]
        expected.append(sum(s >= max(right) for s in wrong) if right else -1)
    assert retrieval_ranks(z_q, key_q, z_g, key_g, cells).tolist() == expected
    assert -1 in expected and max(expected) > 10


def average_precision_by_hand(z_q, label_q, z_g, label_g, id_q=None, id_g=None):
    """Two loops over rows: of each right row, how many stand before it, wrong ones of the same score among them."""
    found = []
    for q in range(len(z_q)):
        gallery = [g for g in range(len(z_g)) if id_q is None or id_q[q] != id_g[g]]
        score = {g: float(z_q[q] @ z_g[g]) for g in gallery}
        right = sorted((g for g in gallery if label_g[g] == label_q[q]), key=lambda g: -score[g])
        wrong = [g for g in gallery if label_g[g] != label_q[q]]
        parts = []
        for number, g in enumerate(right, start=1):
            before = sum(score[w] >= score[g] for w in wrong)
            parts.append(number / (number + before))
        if right:
            found.append(sum(parts) / len(parts))
    return sum(found) / len(found)


@pytest.mark.parametrize("cells", [1, 200, 1 << 24])
@pytest.mark.parametrize("own", [False, True])
def test_average_precision_equals_a_double_loop_whatever_the_chunk(cells, own):
    generator = torch.Generator().manual_seed(0)
    z_q, z_g = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (40, 60))  # many exact ties
    label_q, label_g = (torch.randint(k, (n,), generator=generator) for k, n in ((20, 40), (15, 60)))
    id_q, id_g = (torch.arange(40), torch.arange(60)) if own else (None, None)
    wanted = average_precision_by_hand(z_q, label_q, z_g, label_g, id_q, id_g)
    value = average_precision(z_q, label_q, z_g, label_g, id_q, id_g, cells).nanmean()
    assert float(value) == pytest.approx(wanted, abs=ulps(64, F64))
    for offset in (10.0, -10.0):  # right rows of negative scores count as well: only the order matters
        shifted = [torch.cat([z, torch.full((len(z), 1), c)], dim=1) for z, c in ((z_q, 1.0), (z_g, offset))]
        value = average_precision(shifted[0], label_q, shifted[1], label_g, id_q, id_g, cells).nanmean()
        assert float(value) == pytest.approx(wanted, abs=ulps(64, F64))


def test_average_precision_of_random_embeddings_is_its_chance():
    label_q, label_g = torch.arange(600) % 7, torch.arange(90) % 9
    chance = float(chance_average_precision(label_q, label_g))
    values = [
        float(average_precision(unit(600, 16, seed=s), label_q, unit(90, 16, seed=100 + s), label_g).nanmean())
        for s in range(10)
    ]
    # ten draws of 90 images: a standard error of about 0.001
    assert sum(values) / 10 == pytest.approx(chance, abs=0.005)
    assert chance > 10 / 90 + 0.02  # more than the share of right rows
    # with a query's own row left out, among unequal classes
    label, ids = (torch.arange(300) ** 2) % 17, torch.arange(300)
    chance = float(chance_average_precision(label, label, ids, ids, cells=500))
    z = unit(300, 64)
    # 300 queries: a standard error of about 0.002
    assert float(average_precision(z, label, z, label, ids, ids).nanmean()) == pytest.approx(chance, abs=0.01)
    assert float(average_precision(z, label, z, label).nanmean()) > chance + 0.02  # each finds itself first


def test_average_precision_at_its_ends():
    label = torch.tensor([0, 0, 1, 1])
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert float(average_precision(z, label, z, label).nanmean()) == 1.0
    constant = torch.ones(4, 2)  # two wrong rows stand before both right ones
    assert float(average_precision(constant, label, constant, label).nanmean()) == pytest.approx(
        (1 / 3 + 2 / 4) / 2, rel=ulps(4, F64)
    )
    broken = z.clone()
    broken[3] = torch.nan
    assert float(average_precision(broken[2:3], label[2:3], broken, label).nanmean()) == pytest.approx(
        (1 + 2 / 4) / 2, rel=ulps(4, F64)
    )
    assert float(average_precision(z[:1], label[:1], broken, label).nanmean()) == pytest.approx(
        (1 / 2 + 2 / 3) / 2, rel=ulps(4, F64)
    )
    none = average_precision(z, label + 9, z, label).nanmean(), chance_average_precision(label + 9, label)
    empty = (
        average_precision(z[:0], label[:0], z, label).nanmean(),
        average_precision(z, label, z[:0], label[:0]).nanmean(),
    )
    assert all(math.isnan(float(value)) for value in (*none, *empty))


def test_a_collapsed_or_broken_model_retrieves_nothing():
    key = torch.arange(10)
    constant = torch.ones(10, 4)
    assert retrieval_ranks(constant, key, constant, key).tolist() == [9] * 10  # nine ties, all of them against
    broken = unit(10, 4)
    broken[3] = torch.nan
    ranks = retrieval_ranks(broken, key, broken, key)
    assert ranks[3] == 10  # its own score is nan
    assert (ranks[key != 3] == 1).all()  # everyone else meets one wrong nan
    # nan among the right rows hides none of the others
    z_g = torch.tensor([[torch.nan, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert retrieval_ranks(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), z_g, torch.tensor([0, 0, 1])).tolist() == [0]


def test_ranks_without_queries_or_gallery():
    none, one = torch.zeros(0, 2), torch.ones(1, 2)
    no_key, key = torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    assert retrieval_ranks(none, no_key, one, key).shape == (0,)
    assert retrieval_ranks(one, key, none, no_key).tolist() == [-1]


@pytest.mark.parametrize("cells", [1, 1 << 24])
def test_knn_equals_a_loop(cells):
    z, bank = unit(15, 6, seed=1), unit(50, 6, seed=2)
    label = torch.randint(4, (50,), generator=torch.Generator().manual_seed(3))
    scores = knn_scores(z, bank, label, classes=4, k=7, temperature=0.1, cells=cells)
    for q in range(15):
        near = sorted(range(50), key=lambda n: -float(z[q] @ bank[n]))[:7]
        votes = [0.0] * 4
        for n in near:
            votes[int(label[n])] += math.exp(float(z[q] @ bank[n]) / 0.1)
        share = torch.tensor(votes) / sum(votes)
        torch.testing.assert_close(
            scores[q] / scores[q].sum(), share, rtol=conditioned(10, F32, terms=16), atol=ulps(4, F32)
        )


def test_knn_takes_the_whole_of_a_small_bank_and_survives_a_tiny_temperature():
    scores = knn_scores(unit(5, 3), unit(2, 3, seed=1), torch.tensor([0, 1]), classes=2, k=20, temperature=1e-4)
    assert scores.isfinite().all() and (scores.amax(1) == 1).all()


def test_the_probe_separates_separable_classes_alone():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(300) % 3
    x = 4 * F.one_hot(label, 3).double() + torch.rand(300, 3, generator=generator).double()
    w, b = fit_logistic(x, label, classes=3)
    assert ((x @ w.T + b).argmax(1) == label).all()
    # a stationary point of the penalised loss, so nothing was stopped half way
    w, b = w.requires_grad_(), b.requires_grad_()
    loss = F.cross_entropy(x @ w.T + b, label) + 1e-3 / 2 * w.square().sum()
    grad_w, grad_b = torch.autograd.grad(loss, [w, b])
    assert max(grad_w.abs().max(), grad_b.abs().max()) < 1e-5  # the fit stops where the largest slope is 1e-6


def test_the_probe_equals_sklearn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    x, label = torch.randn(200, 5, generator=generator).double(), torch.arange(200) % 3
    x[:, 0] += label
    w, b = fit_logistic(x, label, classes=3, l2=0.01)
    # sklearn's objective is C * sum(loss) + ||W||^2 / 2
    model = linear_model.LogisticRegression(C=1 / (0.01 * 200), tol=1e-10, max_iter=1000).fit(x.numpy(), label.numpy())
    expected = torch.from_numpy(model.predict_proba(x.numpy()))
    # what both stop at, over the least curvature, l2 = 0.01
    torch.testing.assert_close((x @ w.T + b).softmax(1), expected, rtol=0, atol=1e-4)


def test_the_probe_fits_where_no_gradients_are_recorded():
    with torch.inference_mode():
        x, label = unit(20, 3), torch.arange(20) % 2
        w, _ = fit_logistic(x, label, classes=2)
    assert w.abs().sum() > 0


def test_balanced_accuracy_is_the_mean_recall_of_occurring_classes():
    label = torch.tensor([0] * 90 + [2] * 10)
    assert balanced_accuracy(torch.zeros(100, dtype=torch.long), label, classes=4) == 0.5
    predicted = label.clone()
    predicted[:45] = 1  # a class that never occurs takes no share
    assert balanced_accuracy(predicted, label, classes=4) == 0.75


def test_matched_rows_equal_a_loop():
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.rand(50, generator=generator) < p for p in (0.6, 0.3))
    key = torch.randint(20, (50,), generator=generator)
    expected = []
    for i in range(50):
        partner = i if b[i] else next((j for j in range(50) if b[j] and key[j] == key[i]), None)
        if a[i] and partner is not None:
            expected.append((i, partner))
    rows_a, rows_b = matched_rows(a, b, key)
    assert list(zip(rows_a.tolist(), rows_b.tolist(), strict=True)) == expected
    assert 0 < len(expected) < int(a.sum())


def test_rank_is_that_of_the_line_the_plane_and_the_whole_space():
    assert abs(float(effective_rank(torch.eye(16).repeat(3, 1))) - 16) < ulps(4096, F64)
    line = torch.randn(500, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 64)
    assert abs(float(effective_rank(line)) - 1) < ulps(8, F32)  # float32 rows of one direction: no noise counts as rank
    assert abs(float(effective_rank(torch.eye(4)[:2])) - 2) < ulps(4096, F64)  # fewer rows than dimensions
    z = unit(300, 8)
    s = torch.linalg.svdvals(z.double())
    assert abs(float(effective_rank(z)) - float(torch.special.entr(s / s.sum()).sum().exp())) < ulps(4096, F64)
    assert effective_rank(torch.zeros(3, 2)) == 0 and effective_rank(torch.full((3, 2), torch.nan)).isnan()


def test_gap_alignment_and_uniformity():
    z = unit(20, 8)
    assert modality_gap(z, z) == 0 and alignment(z, z) == 0
    assert abs(float(modality_gap(z, z + 3)) - 3 * 8**0.5) < ulps(64, F32)
    assert abs(float(alignment(z, -z)) - 4) < ulps(32, F32)  # opposite ends of the sphere
    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    expected = math.log(sum(math.exp(-2 * float((z[i] - z[j]).square().sum())) for i, j in pairs) / len(pairs))
    for cells in (1, 50, 1 << 24):
        assert abs(float(uniformity(z, cells=cells)) - expected) < ulps(64, F32)
    assert uniformity(z[:1]).isnan()


def test_ridge_weights_shrink_and_leave_constants_alone() -> None:
    g = torch.Generator().manual_seed(0)
    x_NP = torch.randn(50, 3, generator=g, dtype=torch.float64)
    x_NP[:, 1] = 4.0
    y_N1 = 2 * x_NP[:, :1] + 1
    z = torch.cat([torch.ones(50, 1), x_NP, y_N1], 1)
    w = ridge_weights(z.T @ z, 3, 0.0)
    # Gram matrices of 50 rows with a constant column, which a ridge of nothing alone keeps from 0
    torch.testing.assert_close(
        w.flatten(), torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64), rtol=0, atol=conditioned(1e7, F64)
    )
    assert 0 < float(ridge_weights(z.T @ z, 3, 10.0)[1]) < 1
    assert bool(ridge_weights(z.T @ z * torch.nan, 3, 0.0).isnan().all())
