"""TIP (arXiv 2407.07582): masked columns against a loop, and what the values of missing and hidden cells reach.

Letters: B samples, C columns.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.datamodules.base import BatchDataset
from descant.modules.core.batch import Batch
from descant.modules.fusion.cross_encoder import FusionLayers
from descant.modules.masking.discrete_adapters import TableAdapter
from descant.modules.objectives import match as matching
from descant.modules.objectives.base import TaskObjective
from descant.modules.objectives.classify import Classify
from descant.modules.objectives.columns import MaskedColumns, cell_losses, own_codes
from descant.modules.objectives.contrast import Contrast
from descant.modules.objectives.masked import MaskedTokens
from descant.modules.objectives.match import FLOOR, Match, matching_negatives
from descant.modules.objectives.streams import Streams
from descant.modules.towers import TableTower, Towers
from descant.recipes import MultiTask
from tests._suites import GradientExact, MissingModalities, Ranks, Resume, SampleData, Samples, ShamNeutral
from tests._suites.data import TwoLayerTower
from tests.tolerance import F64, rounding

#: Two numbers, two categories, and a category of which no cell is ever present.
COLUMNS, PAIR, NAN = [0, 3, 0, 2, 2], ["image", "table"], float("nan")


class Tables(Samples):
    """Vectors in place of images, and tables with missing cells."""

    def __init__(self, count: int = 16) -> None:
        super().__init__(count, ("image",))
        self.content = {"image": self.content["image"]}
        g = torch.Generator().manual_seed(2)
        columns = [torch.randint(k, (count,), generator=g) if k else torch.randn(count, generator=g) for k in COLUMNS]
        x_NC = torch.stack([column.double() for column in columns], dim=1)
        missing_NC = torch.rand(count, len(COLUMNS), generator=g) < 0.2
        missing_NC[:, -1] = True
        self.has["table"] = torch.arange(count) % 5 != 3
        self.content["table"] = x_NC.masked_fill(missing_NC | ~self.has["table"][:, None], torch.nan)


class TableData(SampleData):
    def training_set(self) -> BatchDataset:
        return Tables(self.count)


def batch(count: int = 16) -> Batch:
    held, at = Tables(count), np.arange(count)
    rows = held.rows(at, at)
    return Batch(rows.inputs, held.present(at), rows.targets, rng_seed=torch.arange(count) * 7919 + 13)


def multitask(missing: Any = "blocked", **objectives: TaskObjective) -> MultiTask:
    torch.manual_seed(0)
    towers = Towers(image=TwoLayerTower(6), table=TableTower(COLUMNS, 8, 1, 2, missing=missing))
    return MultiTask(towers, objectives, 8, FusionLayers(8, 1, 2), embeds=[PAIR])


def all_three(missing: Any = "blocked") -> MultiTask:
    objectives = {"contrast": Contrast([PAIR]), "match": Match(PAIR), "columns": MaskedColumns(given="image", rate=0.4)}
    return multitask(missing, **objectives)


def view(model: MultiTask, b: Batch, name: str = "columns") -> tuple[Any, Streams]:
    objective: Any = model.objectives[name]
    return objective, Streams(model, b).of(lambda part: name, objective.hides(b))


# the loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_the_loss_of_cells_is_that_of_a_loop(own: bool) -> None:
    g, rows = torch.Generator().manual_seed(0), 20
    first_C, count_C = torch.tensor([0, 3, 5]), torch.tensor([3, 2, 4])
    column_N, row_N, row_M = (torch.randint(n, (40,), generator=g) for n in (3, rows, rows))
    code_N = first_C[column_N] + torch.randint(12, (40,), generator=g) % count_C[column_N]
    s_NK, y_M, x_M = (torch.randn(40, *size, generator=g, dtype=F64) for size in ((9,), (), ()))
    shown_NK = own_codes(s_NK, first_C[column_N], count_C[column_N]) if own else s_NK
    value_B, has_B = cell_losses(shown_NK, code_N, row_N, y_M, x_M, row_M, rows)
    for b in range(rows):
        entropies, squares = [], [float(y_M[m] - x_M[m]) ** 2 for m in range(40) if row_M[m] == b]
        for n in (n for n in range(40) if row_N[n] == b):
            first, count = int(first_C[column_N[n]]), int(count_C[column_N[n]])
            among = s_NK[n, first : first + count] if own else s_NK[n]
            entropies.append(float(among.exp().sum().log() - s_NK[n, code_N[n]]))
        wanted = sum(float(np.mean(half)) for half in (entropies, squares) if half) / 2
        torch.testing.assert_close(value_B[b], torch.tensor(wanted, dtype=F64), **rounding(64, F64))
        assert bool(has_B[b]) == bool(entropies or squares)
    assert int(has_B.sum()) > 0


class TestMaskedColumns(GradientExact, Ranks, Resume, ShamNeutral):
    """In a step, in parts of it, on two ranks and resumed: the loop over samples and cells."""

    def recipe(self) -> MultiTask:
        return self.sham(None)

    def sham(self, mode: Any) -> MultiTask:
        return multitask("fused", columns=MaskedColumns(given="image", rate=0.4, codes="column", sham=mode))

    def calls(self, recipe: Any) -> int:
        return int(recipe.objectives["columns"].sham.calls)

    def batch(self) -> Batch:
        return batch()

    def data(self) -> SampleData:
        return TableData(modalities=tuple(PAIR))

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        objective, values = recipe.objectives["columns"], list[Tensor]()
        hidden_BC = objective.hides(batch).target["table"]
        both_B = batch.present["image"] & batch.present["table"]
        for b in both_B.nonzero().flatten().tolist():
            x_C, hidden_C = batch.inputs["table"][b], hidden_BC[b]
            tokens = recipe.towers["table"](x_C[None].masked_fill(hidden_C, torch.nan))
            image = recipe.towers["image"](batch.inputs["image"][b : b + 1])
            sides = [recipe.fusion.maps[m](t.h_BTD) for m, t in (("image", image), ("table", tokens))]
            h = torch.cat([recipe.fusion.first_D.expand(1, 1, -1), *sides], dim=1)
            for layer in recipe.fusion.layers:
                h = layer(h)
            h = recipe.fusion.norm(h)[0, 3:]  # after its own first token, the image's and the table's
            losses: dict[bool, list[Tensor]] = {True: [], False: []}
            for c in hidden_C.nonzero().flatten().tolist():
                first, count = sum(COLUMNS[:c]), COLUMNS[c]
                logits = objective.categories(h[c])[first : first + count]
                losses[bool(count)].append(
                    F.cross_entropy(logits, x_C[c].long()) if count else (objective.numbers(h[c])[0] - x_C[c]) ** 2
                )
            halves = [torch.stack(half).mean() if half else h.sum() * 0 for half in losses.values()]
            values.append(torch.stack(halves).sum() / 2)
        return {"columns": torch.stack(values).sum() / both_B.sum()}


class TestAbsent(MissingModalities):
    """Of tables without missing cells: nan in a row that is there would be one."""

    def recipe(self) -> MultiTask:
        return all_three("fused")

    def batch(self) -> Batch:
        b = batch()
        cell_BC = b.inputs["table"].isnan() & b.present["table"][:, None]
        b.inputs["table"] = b.inputs["table"].masked_fill(cell_BC, 0.0)
        return b


class TestShamOfMatch(ShamNeutral):
    def recipe(self) -> MultiTask:
        return self.sham(None)

    def sham(self, mode: Any) -> MultiTask:
        return multitask(match=Match(PAIR, sham=mode), contrast=Contrast([PAIR]))

    def calls(self, recipe: Any) -> int:
        return int(recipe.objectives["match"].sham.calls)

    def batch(self) -> Batch:
        return batch()


# what is hidden -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "hidden"), [(0.2, 1), (0.5, 2), (0.7, 4)])
def test_exactly_so_many_columns_are_hidden_and_missing_ones_are_no_targets(rate: float, hidden: int) -> None:
    model, b = multitask(columns=MaskedColumns(rate=rate)), batch(64)
    objective, streams = view(model, b)
    whole = Batch({"table": torch.zeros(64, 5)}, {"table": torch.ones(64, dtype=torch.bool)}, rng_seed=b.rng_seed)
    assert (objective.hides(whole).target["table"].sum(dim=1) == hidden).all()  # of those where nothing is missing
    masks, real_BC = streams.masks, ~b.inputs["table"].isnan()
    assert masks is not None
    assert torch.equal(masks.target["table"], objective.hides(whole).target["table"] & real_BC)
    assert torch.equal(masks.visible["table"], real_BC & ~masks.target["table"])
    other = objective.hides(Batch(b.inputs, b.present, rng_seed=b.rng_seed + 1))
    assert not torch.equal(other.target["table"], masks.target["table"])


@pytest.mark.parametrize("missing", ["blocked", "fused", "attended"])
def test_the_stored_value_of_a_hidden_or_missing_cell_changes_no_bit(missing: str) -> None:
    """Of a token, alone or fused, of what the heads predict, and of any gradient; the targets change, and only they."""
    results = []
    for stored in (None, 1.0):
        model, b = all_three(missing).double(), batch()
        objective, streams = view(model, b)
        hidden_BC = streams.masks.target["table"]  # type: ignore[union-attr]
        if stored is not None:
            b.inputs["table"] = torch.where(hidden_BC, stored, b.inputs["table"])
            _, streams = view(model, b)
        _, score_NK, _, _, y_M, x_M = objective.cells(streams, b)
        (score_NK.sum() + y_M.sum()).backward()
        tokens = streams.tokens("table", streams.masks)
        fused, _ = streams.fuse_own_pairs("image", "table", streams.masks)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append(([tokens.h_BTD, fused.first_ND, fused.a.h_BTD, fused.b.h_BTD, score_NK, y_M, *gradients], x_M))
    assert not torch.equal(results[0][1], results[1][1])
    assert len(results[0][0]) > 30 and all(torch.equal(a, b) for a, b in zip(*(r[0] for r in results), strict=True))


def test_who_attends_to_a_hidden_column() -> None:
    """Nobody; or fusion layers alone, as in the release; or the other columns too, as in BERT."""
    for missing, tower_sees, fusion_sees in (("blocked", 0, 0), ("fused", 0, 1), ("attended", 1, 1)):
        model, b = all_three(missing).double(), batch()
        _, streams = view(model, b)
        row = int((streams.masks.target["table"].any(dim=1) & b.both(*PAIR)).nonzero()[0])  # type: ignore[union-attr]
        column = int(streams.masks.target["table"][row].nonzero()[0])  # type: ignore[union-attr]
        tower: Any = model.towers["table"]
        before = (
            streams.tokens("table", streams.masks).h_BTD[row],
            streams.fuse_own_pairs("image", "table", streams.masks)[0].first_ND,
        )
        with torch.no_grad():
            tower.column_CD[column] += 1.0
        _, again = view(model, b)
        after = (
            again.tokens("table", again.masks).h_BTD[row],
            again.fuse_own_pairs("image", "table", again.masks)[0].first_ND,
        )
        others = [c for c in range(6) if c != 1 + column]
        slot = int(b.both(*PAIR)[:row].sum())
        assert bool((before[0] != after[0])[others].any()) == bool(tower_sees)
        assert bool((before[1] != after[1])[slot].any()) == bool(fusion_sees)


@pytest.mark.parametrize("kept", [[0, 2], [1, 3]])
def test_without_a_hidden_category_or_number_its_half_is_zero(kept: list[int]) -> None:
    model, b = all_three(), batch()
    b.inputs = {m: x.float() for m, x in b.inputs.items()}
    gone = [c for c in range(5) if c not in kept]
    b.inputs["table"][:, gone] = NAN
    term = model(b).terms["columns"]
    model.step({"columns": term}, b).total.backward()
    objective: Any = model.objectives["columns"]
    heads = objective.numbers, objective.categories
    trained, idle = heads if kept[0] == 0 else heads[::-1]
    assert term.value.isfinite().all() and term.valid is not None and 0 < int(term.valid.sum()) < 16
    assert trained.weight.grad.any() and not idle.weight.grad.any()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


# around it ------------------------------------------------------------------------------------------------------------


def test_negatives_are_never_the_own_pair() -> None:
    model, b = all_three().double(), batch()
    match: Any = model.objectives["match"]
    both_B = b.both(*PAIR)
    for seed in range(50):
        b.rng_seed = b.rng_seed + seed
        for row_B in match.negative_rows(Streams(model, b), b, across=False):
            assert (row_B != torch.arange(16)).all() and both_B[row_B[both_B]].all() and (row_B[both_B] >= 0).all()


@pytest.mark.parametrize("floor", [None, FLOOR, 0.2])
def test_negatives_are_drawn_by_the_probabilities_of_a_loop(floor: float | None) -> None:
    g, rows = torch.Generator().manual_seed(0), 9
    s_BG = 8 * torch.randn(rows, rows, generator=g, dtype=F64)
    key_B, valid_B = torch.tensor([0, 1, 2, 3, 4, 5, 0, 7, 8]), torch.arange(rows) != 4
    for u in torch.rand(200, generator=g, dtype=F64).tolist():
        drawn_B = matching_negatives(s_BG, key_B, valid_B, torch.full((rows,), u, dtype=F64), floor=floor)
        for b in range(rows):
            there = [j for j in range(rows) if valid_B[b] and valid_B[j]]
            other = [j for j in there if key_B[j] != key_B[b]]
            whole = sum(math.exp(float(s_BG[b, j])) for j in there)
            weight = {j: math.exp(float(s_BG[b, j])) / whole + (floor or 0.0) for j in other}
            left, wanted = u * sum(weight.values()), -1
            for j in other:  # as torch.multinomial: a point of the line of all weights
                wanted, left = (j if wanted < 0 and left < weight[j] else wanted), left - weight[j]
            assert int(drawn_B[b]) == wanted


def test_the_released_negatives_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(negatives: Any) -> torch.Tensor:
        b, model = batch(), multitask(contrast=Contrast([PAIR]), match=Match(PAIR, negatives)).double()
        match: Any = model.objectives["match"]
        return torch.stack(match.negative_rows(Streams(model, b), b, False))

    for floor, same in ((0.0, "similarity"), (1e9, "random")):
        monkeypatch.setattr(matching, "FLOOR", floor)
        assert torch.equal(rows("floored"), rows(same))
    assert not torch.equal(rows("similarity"), rows("random"))


def test_pairs_are_embedded_by_both_sides_and_the_fused_token() -> None:
    b = batch()
    model, alone = all_three().double(), multitask(contrast=Contrast([PAIR])).double()
    for recipe, width in ((model, 24), (alone, 16)):
        z = recipe.embed(b)
        both_B = b.both(*PAIR)
        assert z["image+table"].shape == (16, width) and not z["image+table"][~both_B].any()
        sides = torch.cat([z["image"], z["table"]], dim=1) / (width / 8) ** 0.5
        torch.testing.assert_close(z["image+table"][both_B, :16], sides[both_B], **rounding(8, F64))
    scores = model.scores(b)
    assert {*scores} == {"accuracy_match", "accuracy_columns", "loss_columns"}
    assert torch.equal(scores["loss_columns"].value, model(b).terms["columns"].value)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    image, classes = Towers(image=TwoLayerTower(6)), dict[str, TaskObjective](c=Classify("label", 3, ["image"]))
    cases: list[tuple[Any, str]] = [
        (lambda: multitask(c=MaskedColumns("image")), "objectives: c: tower image: TwoLayerTower has no columns to"),
        (lambda: multitask(c=MaskedColumns(rate=0.05)), r"rate 0.05 hides 0 of 5 columns; such as 0.5"),
        (lambda: multitask(c=MaskedColumns(rate=0.95)), "rate 0.95 hides 5 of 5 columns"),
        (lambda: multitask(c=MaskedTokens("table", TableAdapter(COLUMNS))), "hide tokens; MaskedColumns hides its col"),
        (lambda: multitask(c=MaskedColumns("tabel")), r"'tabel': .*mean table\?"),
        (lambda: MultiTask(image, classes, embeds=[PAIR]), "embeds: 'table'"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
