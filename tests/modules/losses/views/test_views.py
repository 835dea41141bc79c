"""Objectives over views as pure functions: each against lightly's own, and against its sum written out in float64.

Letters: B samples, P width of projections, K prototypes or rows of a queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.losses.barlow_twins import barlow_twins
from descant.modules.losses.contrastive import ntxent, one_way
from descant.modules.losses.views import DINO, Queue, SwAV, Views
from descant.modules.losses.views.byol import byol
from descant.modules.losses.views.dino import dino
from descant.modules.losses.views.nnclr import nearest
from descant.modules.losses.views.ressl import ressl
from descant.modules.losses.views.swav import sinkhorn_codes, swav
from descant.modules.losses.views.vicreg import vicreg
from descant.modules.selection.transport import sinkhorn
from descant.modules.transforms.crops import LocalCrops
from tests.tolerance import F64, ulps

B, P, K = 7, 4, 5
#: Sums over samples, widths and prototypes, of numbers up to 25.
EXACT = ulps(2**14, F64)
#: Bar of the issue, for what lightly computes with its own roundings and parts in float32.
LIGHTLY = 1e-6


def draws(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=F64) for _ in range(count)]


X, Y, Z, W = draws(4, B, P)
U, V, N_1, N_2 = (F.normalize(x, dim=1) for x in (X, Y, Z, W))
ROWS = torch.arange(B), torch.ones(B, dtype=torch.bool)
BANK = F.normalize(draws(1, K, P, seed=1)[0], dim=1)
SCORES = draws(3, B, K, seed=2)
CENTRE = draws(1, K, seed=3)[0]
HELD = torch.ones(K, dtype=torch.bool)


def log_softmax(x: list[float], at: int) -> float:
    return x[at] - math.log(sum(math.exp(v) for v in x))


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def softmax(x: list[float]) -> list[float]:
    return [math.exp(log_softmax(x, k)) for k in range(len(x))]


def cross_entropy(q: list[float], x: list[float]) -> float:
    return -sum(q[k] * log_softmax(x, k) for k in range(len(x)))


# written out ----------------------------------------------------------------------------------------------------------


def loop_ntxent(u: Tensor, v: Tensor, scale: float) -> float:
    total = 0.0
    for a, b in ((u, v), (v, u)):
        for i in range(B):
            others = [scale * dot(a[i], a[g]) for g in range(B) if g != i]
            total -= log_softmax(
                [scale * dot(a[i], b[i]), *(scale * dot(a[i], b[g]) for g in range(B) if g != i), *others], 0
            )
    return total / (2 * B)


def loop_one_way(a: Tensor, b: Tensor, scale: float) -> float:
    return -sum(log_softmax([scale * dot(a[i], b[g]) for g in range(B)], i) for i in range(B)) / B


def loop_vicreg(paper: bool) -> float:
    s = sum((float(X[i, p]) - float(Y[i, p])) ** 2 for i in range(B) for p in range(P)) / B
    v = c = 0.0
    for x in (X, Y):
        mean = [sum(float(x[i, p]) for i in range(B)) / B for p in range(P)]
        cov = [
            [sum((float(x[i, p]) - mean[p]) * (float(x[i, q]) - mean[q]) for i in range(B)) / (B - 1) for q in range(P)]
            for p in range(P)
        ]
        v += sum(max(0.0, 1 - math.sqrt(cov[p][p] + 1e-4)) for p in range(P)) / P
        c += sum(cov[p][q] ** 2 for p in range(P) for q in range(P) if p != q) / P
    return 25 * s + 25 * v + c if paper else 25 * s / P + 25 * v / 2 + c


def loop_barlow(epsilon: float) -> float:
    def columns(x: Tensor) -> list[list[float]]:
        made = []
        for p in range(P):
            mean = sum(float(x[i, p]) for i in range(B)) / B
            var = sum((float(x[i, p]) - mean) ** 2 for i in range(B)) / B
            made.append([(float(x[i, p]) - mean) / math.sqrt(var + epsilon) for i in range(B)])
        return made

    a, b, total = columns(X), columns(Y), 0.0
    for p in range(P):
        for q in range(P):
            c = sum(a[p][i] * b[q][i] for i in range(B)) / B
            total += (1 - c) ** 2 if p == q else 0.0051 * c**2
    return total


def loop_dino(students: int) -> float:
    total, pairs = 0.0, 0
    for t in range(2):
        for s in range(students):
            if s == t:
                continue
            pairs += 1
            for i in range(B):
                q = softmax([(float(SCORES[t][i, k]) - float(CENTRE[k])) / 0.04 for k in range(K)])
                total += cross_entropy(q, [float(x) / 0.1 for x in SCORES[s][i]])
    return total / (pairs * B)


def loop_codes(score: Tensor) -> list[list[float]]:
    q = [[math.exp(float(score[i, k]) / 0.5) for k in range(K)] for i in range(len(score))]
    for _ in range(3):
        mass = [sum(row[k] for row in q) for k in range(K)]
        q = [[row[k] / mass[k] for k in range(K)] for row in q]
        q = [[x / sum(row) for x in row] for row in q]
    return q


def loop_swav(views: int) -> float:
    total = 0.0
    for i in range(2):
        codes = loop_codes(SCORES[i])
        for v in range(views):
            if v != i:
                total += sum(cross_entropy(codes[b], [float(x) / 0.1 for x in SCORES[v][b]]) for b in range(B)) / B
    return total / (2 * (views - 1))


def loop_ressl() -> float:
    return (
        sum(
            cross_entropy(softmax([dot(V[i], row) / 0.04 for row in BANK]), [dot(U[i], row) / 0.1 for row in BANK])
            for i in range(B)
        )
        / B
    )


def codes(views: int) -> Tensor:
    return swav(SCORES[:views], [sinkhorn_codes(score, epsilon=0.5) for score in SCORES[:2]])


def cosines() -> float:
    return sum(dot(U[i], N_2[i]) + dot(V[i], N_1[i]) for i in range(B)) / B


FORMS: dict[str, tuple[Callable[[], Tensor], Callable[[], float]]] = {
    "SimCLR": (lambda: ntxent(U, V, *ROWS, 2.0), lambda: loop_ntxent(U, V, 2.0)),
    "BYOL": (lambda: byol(X, Y, Z, W), lambda: 4 - 2 * cosines()),
    "BYOL lightly": (lambda: byol(X, Y, Z, W, mean_cosine=True), lambda: -cosines() / 2),
    "MoCo v3": (lambda: one_way(U, N_2, *ROWS, 5.0), lambda: loop_one_way(U, N_2, 5.0)),
    "VICReg": (lambda: vicreg(X, Y), lambda: loop_vicreg(paper=False)),
    "VICReg paper": (lambda: vicreg(X, Y, paper_scale=True), lambda: loop_vicreg(paper=True)),
    "Barlow Twins": (lambda: barlow_twins(X, Y, 0.0051, epsilon=1e-5), lambda: loop_barlow(1e-5)),
    "Barlow Twins paper": (lambda: barlow_twins(X, Y, 0.0051), lambda: loop_barlow(0.0)),
    "DINO": (lambda: dino(SCORES[:2], SCORES[:2], CENTRE), lambda: loop_dino(2)),
    "DINO crops": (lambda: dino(SCORES, SCORES[:2], CENTRE), lambda: loop_dino(3)),
    "SwAV": (lambda: codes(2), lambda: loop_swav(2)),
    "SwAV crops": (lambda: codes(3), lambda: loop_swav(3)),
    "ReSSL": (lambda: ressl(U, V, BANK, HELD), loop_ressl),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_loss_is_its_sum_written_out(name: str) -> None:
    ours, loop = FORMS[name]
    assert float(ours().mean()) == pytest.approx(loop(), rel=EXACT)


def of_lightly(name: str) -> Tensor:
    from lightly import loss

    if name == "SimCLR":
        return loss.NTXentLoss(temperature=0.5)(X, Y)
    if name == "BYOL lightly":
        return (loss.NegativeCosineSimilarity()(X, W) + loss.NegativeCosineSimilarity()(Y, Z)) / 2
    if name == "MoCo v3":  # a memory bank of the other keys, for each query
        made = loss.NTXentLoss(temperature=0.2, memory_bank_size=(B - 1, P))
        rows = []
        for i in range(B):
            made.memory_bank.bank = torch.cat([N_2[:i], N_2[i + 1 :]])
            rows.append(made(U[i : i + 1], N_2[i : i + 1]))
        return torch.stack(rows).mean()
    if name == "VICReg":
        return loss.VICRegLoss()(X, Y)
    if name == "Barlow Twins":
        return loss.BarlowTwinsLoss(lambda_param=0.0051)(X, Y)
    if name.startswith("DINO"):
        made = loss.DINOLoss(output_dim=K)
        made.center = CENTRE[None, None]
        return made(SCORES[:2], SCORES[: 3 if "crops" in name else 2])
    return loss.SwaVLoss(sinkhorn_epsilon=0.5)(SCORES[:2], SCORES[2:3] if "crops" in name else [])


@pytest.mark.parametrize(
    "name", ["SimCLR", "BYOL lightly", "MoCo v3", "VICReg", "Barlow Twins", "DINO", "DINO crops", "SwAV", "SwAV crops"]
)
def test_each_loss_is_lightlys(name: str) -> None:
    pytest.importorskip("lightly")
    # lightly has float32 temperatures
    assert float(FORMS[name][0]().mean()) == pytest.approx(float(of_lightly(name)), rel=LIGHTLY)


def test_nnclr_has_the_positive_and_the_negatives_of_lightly() -> None:
    pytest.importorskip("lightly")
    from lightly.loss import NTXentLoss
    from lightly.models.modules import NNMemoryBankModule

    bank = NNMemoryBankModule(size=(K, P))
    bank.bank = BANK
    n_1 = nearest(U, BANK, HELD)
    assert torch.equal(n_1, bank(X, update=False))
    # lightly has float32 temperatures
    assert float(ntxent(n_1, V, *ROWS, 10.0).mean()) == pytest.approx(float(NTXentLoss(0.1)(n_1, Y)), rel=LIGHTLY)


# their parts ----------------------------------------------------------------------------------------------------------


def test_many_rounds_are_the_plan_of_optimal_transport() -> None:
    score = SCORES[0]
    plan = sinkhorn(-score, epsilon=0.5, tolerance=1e-12)
    # both stop within 1e-12 of the marginals
    torch.testing.assert_close(sinkhorn_codes(score, epsilon=0.5, rounds=500) / B, plan, rtol=1e-9, atol=1e-9)


def test_absent_rows_take_no_mass() -> None:
    valid = torch.arange(B) < 4
    found = sinkhorn_codes(SCORES[0], valid)[:4]
    torch.testing.assert_close(found, sinkhorn_codes(SCORES[0][:4]), rtol=EXACT, atol=EXACT)


def test_a_queue_replaces_its_oldest_rows_and_is_saved() -> None:
    queue = Queue(6, 1, empty=True)
    for step in range(4):
        queue.push(torch.full((3, 1), float(step)), torch.tensor([True, step != 2, True]))
    assert queue.rows_KP.flatten().tolist() == [2.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    assert queue.valid_K.tolist() == [True, False, True, True, True, True] and bool(queue.full)
    again = Queue(6, 1)
    again.load_state_dict(queue.state_dict())
    again.push(torch.full((3, 1), 4.0), torch.ones(3, dtype=torch.bool))
    assert again.rows_KP.flatten().tolist() == [4.0, 4.0, 4.0, 3.0, 3.0, 3.0]


def test_a_swav_queue_balances_codes_once_it_is_full() -> None:
    torch.manual_seed(0)
    objective = SwAV(8, P, K, queue=2 * B).build(P).double().train()
    held: list[list[Tensor]] = [[], []]
    for pair in ((Z, W), (W, Z), (X, Y)):
        scores = [F.linear(objective.project(x, ROWS[1]), F.normalize(objective.prototypes.weight)) for x in pair]
        full = len(held[0]) == 2
        made = [sinkhorn_codes(torch.cat([s, *(h if full else [])]))[:B] for s, h in zip(scores, held, strict=True)]
        plain = swav(scores, [sinkhorn_codes(s) for s in scores])
        wanted = swav(scores, made)
        torch.testing.assert_close(objective(Views(pair, *ROWS)), wanted, rtol=EXACT, atol=EXACT)
        for of_view, score in zip(held, scores, strict=True):
            of_view.append(score)
    assert float((wanted - plain).detach().abs().max()) > 0.01  # a full queue has an effect; a bar, not a bound


def test_the_centre_moves_after_the_loss_and_in_training_alone() -> None:
    torch.manual_seed(0)
    objective = DINO(8, 4, K).build(P).double()
    views = Views([X, Y], torch.arange(B), torch.arange(B) < 5, SCORES[:2])
    first = objective.train()(views)
    wanted = 0.1 * torch.stack([s[:5] for s in SCORES[:2]]).mean(dim=(0, 1))
    torch.testing.assert_close(objective.centre_K, wanted, rtol=EXACT, atol=EXACT)
    with torch.no_grad():
        assert not torch.equal(objective(views), first)
    objective.eval()(views)
    torch.testing.assert_close(objective.centre_K, wanted, rtol=EXACT, atol=EXACT)


def test_a_local_crop_is_the_square_that_its_key_draws() -> None:
    x = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))[None].repeat(50, 1, 1, 1)
    key = torch.arange(50)
    crops = LocalCrops(number=2, size=8, scale=(0.25, 0.25))
    first, second = crops([x, x], key)
    assert not torch.equal(first, second) and torch.equal(first[7:9], crops([x[7:9]] * 2, key[7:9])[0])
    steps = first[:, 0].diff(dim=1), first[:, 1].diff(dim=2)  # half of 32 pixels by 8: two apart, in both directions
    assert all(torch.allclose(step, torch.tensor(2.0), atol=1e-4) for step in steps)  # of coordinates up to 32
    assert float(first.min()) >= 0 and float(first.max()) <= 31


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dino(SCORES[:1], SCORES[:1], CENTRE), r"DINO: 1 view\(s\).*at least 2"),
        (lambda: Queue(10, P).push(X, ROWS[1]), "queue 10: a multiple of the 7 rows of a step, such as 7"),
        (lambda: Queue(0, P), "queue 0: at least 1 row"),
        (lambda: DINO(temperature=0.0, prototypes=2), "DINO: temperature 0: must be above 0"),
        (lambda: SwAV(epsilon=0.0), "SwAV: epsilon 0: must be above 0"),
        (lambda: LocalCrops(scale=(0.5, 0.1)), "LocalCrops: scale"),
        (lambda: LocalCrops(number=0), "LocalCrops: number 0"),
    ],
)
def test_bad_input(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
