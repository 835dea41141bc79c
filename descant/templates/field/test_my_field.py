"""Test what MyField reads and refuses, and a user's table from its file to a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from descant.datamodules.fields.fields import Fields, LabelField
from descant.datamodules.user.user_data import UserData
from descant.templates.field.my_field import MyField


def test_numbers_come_first_and_gaps_after_them() -> None:
    x, errors = MyField(steps=4).decode(["1 -2e1", b"3"], None)
    assert x.dtype == torch.float32 and x.shape == (2, 1, 4) and errors == [None, None]
    assert x[0, 0, :2].tolist() == [1.0, -20.0] and bool(x[0, 0, 2:].isnan().all())
    assert x[1, 0, 0] == 3.0


@pytest.mark.parametrize(
    ("text", "why"), [("1 two", "'two' is no number"), ("1 2 3", "3 numbers: 1 to 2 are wanted"), (" ", "0 numbers")]
)
def test_a_cell_that_cannot_be_read_is_padding_and_a_reason(text: str, why: str) -> None:
    x, errors = MyField(steps=2).decode(["1", text], None)
    assert bool(x[1].isnan().all()) and errors[0] is None and why in (errors[1] or "")


def test_training_and_evaluation_read_the_same(tmp_path: Path) -> None:
    rows = "".join(f"{k} {k + 1},{'ab'[k % 2]}\n" for k in range(12))
    (tmp_path / "rows.csv").write_text(f"numbers,kind\n{rows}")
    own = MyField(steps=2, field="numbers")
    fields = Fields(others={"numbers": own}, labels={"kind": LabelField("kind")})
    data = UserData(num_workers=0, path=str(tmp_path), fields=fields, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    here_B = batch.present["numbers"]  # a step may end with padding rows
    assert batch.inputs["numbers"].shape == (4, 1, 2) and int(here_B.sum()) >= 2
    first_B = batch.inputs["numbers"][:, 0, 0].long()
    assert torch.equal(first_B[here_B] % 2, batch.targets["kind"][here_B])


def test_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="steps 0: 1 is the least"):
        MyField(steps=0)
