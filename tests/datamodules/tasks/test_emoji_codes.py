"""EmojiCodes from a file, what it refuses, ``descant data encode``, and stages that read the codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from descant.datamodules.combined.stages import StageData, StagedData
from descant.datamodules.tasks.emoji_codes import CodeDocument
from tests.conftest import Result
from tests.papers.test_mio import data, shared, tokenizers
from tests.tolerance import F32, ulps

STAGES = ("align", "interleave", "speak", "tune")
ORDERS = (["text", "image"], ["image", "text"], ["audio", "text"])


def test_codes_of_a_file_train_as_those_that_are_made_and_other_tokenizers_are_refused(tmp_path: Path) -> None:
    file, module = tmp_path / "codes.parquet", shared()
    module.table.write(file)
    again = data(codes=str(file), tokenizers=None)
    batches = [next(iter(each.train_dataloader())) for each in (data(), again)]
    assert all(torch.equal(batches[0].inputs[name], batches[1].inputs[name]) for name in ("text", "loss_mask"))
    assert json.loads(pq.read_schema(file).metadata[b"descant"])["formats"]["image"]["codes"] == 16
    assert "codes" in again.state_dict()["corpora"]
    fitted = tokenizers()
    fitted["image"].fit(torch.rand(8, 3, 16, 16))
    kept = pq.read_table(file)
    bad = pa.array([[99, 0, 0, 0]] * len(kept), kept.schema.field("codes.image").type)
    pq.write_table(kept.set_column(4, kept.schema.field("codes.image"), bad), tmp_path / "wrong.parquet")
    pq.write_table(kept.drop_columns(["name"]), tmp_path / "nameless.parquet")
    (tmp_path / "text.parquet").write_text("no")
    bad_codes = data(codes=str(tmp_path / "wrong.parquet"), tokenizers=None)
    for make, line in (
        (lambda: module.table.write(file), "it is there already"),
        (lambda: data(codes=str(file), tokenizers=fitted).table, "image of tokenizer .* is given; encode again"),
        (lambda: data(codes=str(file), tokenizers=tokenizers(codes=12)).table, "image of tokenizer"),
        (lambda: data(codes=str(file), size=32, tokenizers=None).table, "of size 16, and the data have 32"),
        (lambda: next(iter(bad_codes.train_dataloader())), r"image \[0, 1\]: id 366 is outside every range"),
        (
            lambda: data(codes=str(tmp_path / "nameless.parquet"), tokenizers=None),
            "nameless.parquet: no table of codes",
        ),
        (lambda: data(codes=str(tmp_path / "text.parquet"), tokenizers=None), "no table of codes"),
        (lambda: data(codes="none.parquet"), "none.parquet: no such file"),
        (lambda: data(tokenizers=None), "tokenizers: none, and no codes"),
        (lambda: data(tokenizers={"video": tokenizers()["image"]}), "tokenizers: 'video'"),
        (lambda: data(documents=[CodeDocument(["text", "video"])]), "documents: 'video'"),
        (lambda: data(documents=[CodeDocument(["text", "image"], weight=0)]), "documents: all have weight 0"),
        (lambda: CodeDocument(["text", "text"]), "order: text, text: at least two"),
        (lambda: module.table.rows("tests"), "no rows of tests"),
    ):
        with pytest.raises(ValueError, match=line):
            make()


def test_a_sham_of_stages_has_their_data_in_reverse_and_their_lengths() -> None:
    parts = [StageData(data(documents=[CodeDocument(order)]), steps=n) for n, order in enumerate(ORDERS, 1)]
    stages = dict(zip("abc", parts, strict=True))
    sham = StagedData(stages, sham="permute")
    assert [stage.data for stage in sham.stages.values()] == [stage.data for stage in reversed(parts)]
    assert [stage.steps for stage in sham.stages.values()] == [1, 2, 3] and sham.evaluated is parts[-1].data
    assert [stage.data for stage in StagedData(stages).stages.values()] == [stage.data for stage in parts]


def quick(name: str, **options: Any) -> tuple[str, ...]:
    """The experiment with few steps, and options of the data of all stages."""
    stage = {"init_args": {"steps": 2, "data": {"init_args": {"held_out": 4, **options}}}}
    Path(name).write_text(json.dumps({"data": {"init_args": {"stages": dict.fromkeys(STAGES, stage)}}}))
    return "--config", "staged/emoji-codes", "--config", name, "--data.tiny", "true"


@pytest.mark.slow
def test_a_command_writes_codes_and_stages_that_read_them_have_a_matrix_of_forgetting(
    cli: Callable[..., Result],
) -> None:
    few = {m: {"init_args": {"codes": codes, "samples": 40}} for m, codes in (("image", 16), ("audio", 8))}
    encode = ("data", "encode", *quick("small.yaml", tokenizers=few), "--out", "codes.parquet")
    result = cli(*encode)
    assert result.rc == 0 and "16 codes in 1 layers of 16" in result.out, result.err
    assert pq.read_table("codes.parquet").column_names == ["index", "key", "set", "name", "codes.image", "codes.audio"]
    assert cli(*encode).refusal.startswith("--out codes.parquet: it is there already")
    none = cli("data", "encode", "--config", "contrastive/emoji", "--data.tiny", "true", "--out", "other.parquet")
    assert none.refusal.startswith("--config contrastive/emoji: Emoji has no codes")
    result = cli("fit", *quick("file.yaml", codes="codes.parquet", tokenizers=None), "--test", "false")
    assert result.rc == 0, result.err
    found = json.loads(next(Path("runs").rglob("metrics.json")).read_text())
    losses = [found[f"val_audio_from_text/after_{stage}"] for stage in STAGES]
    # the same numbers in float64, printed in float32
    assert found["val_audio_from_text/forgetting"] == pytest.approx(losses[-1] - min(losses[:-1]), abs=ulps(8, F32))
    assert losses[-1] == found["val_audio_from_text/loss"]
