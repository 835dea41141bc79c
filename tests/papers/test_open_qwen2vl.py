"""Open-Qwen2VL (arXiv 2504.00595): packed documents, the leak of a row without a document mask, and a grid that grows.

Letters: B samples, T text tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks import PackingStatistics, Resume, Stages
from descant.datamodules.combined.stages import StageData, StagedData
from descant.datamodules.tasks.descriptions import Descriptions
from descant.datamodules.tasks.questions import Questions
from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM
from descant.modules.language.projectors import PooledGrid
from descant.recipes import Stage, Staged, VisionLanguage
from tests._suites import GradientExact, MissingModalities, Ranks
from tests.callbacks.checkpoints.test_resume import equal, fit, point, state
from tests.recipes import test_vision_language as chat
from tests.small import small_chat
from tests.tolerance import F64, rounding

#: What a loss of packed documents may differ by from the loss of each alone: in float64, and of a training run.
EXACT, TRAINED = 1e-10, 1e-4
#: Longest dialogue of the tests, tokens an image on both grids, and steps of a stage.
LENGTH, LOW, HIGH, STEPS = 48, 1, 9, 3
SEEN: dict[str, Any] = {"size": 24, "length": LENGTH, "tiny": True}


# packing ------------------------------------------------------------------------------------------------------------


class TestPacked(GradientExact, MissingModalities, Ranks):
    """Terms and gradients of packed rows are those of each document in a pass of its own."""

    def recipe(self) -> VisionLanguage:
        return chat.recipe(row=24)

    def batch(self) -> Batch:
        return chat.batch(16)

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        answered_B = batch.present["text"]
        value_B = torch.stack([chat.alone(recipe, batch, b)[0] for b in answered_B.nonzero().flatten().tolist()])
        return {"answer": value_B.sum() / answered_B.sum()}


def losses(document_mask: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Of each of 16 documents in packed rows of 64 tokens, and in a pass of its own."""
    made, batch = chat.recipe(), chat.batch(16)
    made = made.float() if dtype is torch.float32 else made
    batch.inputs["image"] = batch.inputs["image"].to(dtype)
    made.document_mask = document_mask
    (term,) = made.terms(batch).values()
    assert made.packing.rows < made.packing.documents / 3
    at = batch.present["text"].nonzero().flatten().tolist()
    return term.value[at], torch.stack([chat.alone(made, batch, b)[0] for b in at])


def test_with_the_document_mask_a_packed_loss_is_the_unpacked_one() -> None:
    for dtype, most in ((torch.float64, EXACT), (torch.float32, TRAINED)):
        packed, alone = losses(True, dtype)
        assert float((packed - alone).detach().abs().max()) < most


def test_without_it_documents_attend_to_those_before_them() -> None:
    packed, alone = losses(False)
    off = (packed - alone).detach().abs()
    assert float(off.max()) > 100 * TRAINED
    rows = sum(float(value) < EXACT for value in off)
    assert 1 <= rows < len(off) / 3, "the first of each row has nothing before it"


def test_without_the_mask_a_row_is_one_sequence() -> None:
    """The row of all documents, in the order of packing, through the model as one text."""
    made = chat.recipe()
    made.document_mask = False
    batch = chat.batch(16)
    made.row = int(made.sequence(batch)[1].real_BS.sum())
    made.lm = CausalLM(20, 12, 2, 2, length=made.row).double()
    h_BSW, row = made.sequence(batch)
    order = row.real_BS.sum(dim=1).argsort(descending=True, stable=True)
    whole = made.lm(torch.cat([h_BSW[b][row.real_BS[b]] for b in order.tolist()])[None])[0]
    before_NW, _, sample_N = made.hidden_before_answers(batch)
    first_B = torch.zeros(len(batch), dtype=torch.long)
    first_B[order] = row.real_BS.sum(dim=1)[order].cumsum(dim=0) - row.real_BS.sum(dim=1)[order]
    _, at_N = row.loss_mask_BS.nonzero(as_tuple=True)
    torch.testing.assert_close(before_NW, whole[first_B[sample_N] + at_N - 1], **rounding(4096, F64))


def test_evaluation_is_of_documents_alone() -> None:
    made, batch = chat.recipe(), chat.batch(16)
    wanted = made.eval().scores(batch)["loss"].value
    made.document_mask = False
    assert torch.equal(made.scores(batch)["loss"].value, wanted) and not made.packing.rows


def test_rows_without_a_mask_are_refused_where_they_cannot_be() -> None:
    message = r"^document_mask false: a row of 65 is one sequence; lm\.length 64 is the most$"
    with pytest.raises(ValueError, match=message):
        VisionLanguage(**chat.sees(CausalLM(20, 12, 1, 2, length=64)), row=65, document_mask=False)


# from a low grid to a high one --------------------------------------------------------------------------------------


def model(high: Any = 3, row: int | None = None) -> Staged:
    torch.manual_seed(0)
    return Staged(
        VisionLanguage(**small_chat(), row=row),
        {"captions": Stage(), "answers": Stage(set={"projector.side": high})},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    )


def data() -> StagedData:
    stages = {"captions": Descriptions(batch_size=16, **SEEN), "answers": Questions(batch_size=16, **SEEN)}
    return StagedData({name: StageData(part, 1, STEPS) for name, part in stages.items()})


class Tokens(L.Callback):
    """Tokens of each step that are not of the text: an image has one in the text, in whose place its own stand."""

    def __init__(self) -> None:
        self.of_images: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, i: int) -> None:
        text = int((batch.inputs["text"] > 0)[batch.present["text"]].sum())
        images = int((batch.present["text"] & batch.present["image"]).sum())
        self.of_images.append((float(trainer.callback_metrics["packing/tokens_per_step"]) - text) / images + 1)


def run(folder: Path, *more: L.Callback, net: Staged | None = None, **options: Any) -> Staged:
    quiet: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 0, "log_every_n_steps": 1} | options
    _, made = fit(folder, Stages(), PackingStatistics(), *more, net=net or model(), data=data(), **quiet)
    assert isinstance(made, Staged)
    return made


def test_a_stage_has_more_tokens_an_image_and_resumes_to_the_bit(tmp_path: Path) -> None:
    tokens = Tokens()
    whole = run(tmp_path / "whole", tokens)
    assert tokens.of_images == [LOW] * STEPS + [HIGH] * STEPS
    assert isinstance(whole.inner.projector, PooledGrid) and whole.inner.projector.side == 3
    for cut in (STEPS - 1, STEPS + 1):
        folder = tmp_path / f"cut-{cut}"
        run(folder, Resume(every=1, keep=9), max_steps=cut)
        tokens = Tokens()
        again = run(folder, Resume(every=1, keep=9), tokens, path=point(folder, cut))
        assert equal(state(again), state(whole))
        assert tokens.of_images == ([LOW] * STEPS + [HIGH] * STEPS)[cut:]


def test_a_row_too_short_for_the_grid_of_a_stage_is_refused_before_the_first_step(tmp_path: Path) -> None:
    tokens = Tokens()
    with pytest.raises(ValueError) as refused:
        run(tmp_path, tokens, net=model(row=LENGTH + HIGH - 2))
    assert str(refused.value) == (
        "stages.answers: row 55: documents of Questions have up to 56 tokens, an image of 9 tokens among them; the "
        "least row is 56, or data of length 47"
    )
    assert not tokens.of_images
    run(tmp_path, net=model(row=LENGTH + HIGH - 1))


@pytest.mark.parametrize("side", [0, 1.5, "four"])
def test_a_side_that_is_no_number_of_cells_is_refused_before_the_first_step(tmp_path: Path, side: Any) -> None:
    with pytest.raises(ValueError, match=f"^stages.answers: side {side}: at least 1, a whole number$"):
        run(tmp_path, net=model(high=side))
