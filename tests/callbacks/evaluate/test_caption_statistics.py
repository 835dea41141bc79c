"""The statistics of captions reach the loggers as the data module gives them, and data without any is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from descant.callbacks import CaptionStatistics
from descant.datamodules.corpora.captions import AltText, CaptionMixer, SyntheticCaption
from descant.datamodules.corpora.emoji import Emoji
from descant.modules.tokenizers.text import NgramTokenizer
from descant.modules.towers import BagTower, ConvTower, Towers
from descant.recipes import Contrastive
from tests.callbacks.evaluate.test_embeddings import Data, make
from tests.rotation import quick
from tests.tolerance import F32, ulps


def recipe() -> Contrastive:
    return Contrastive(Towers(image=ConvTower(widths=[8, 8], stem=4), text=BagTower(vocab=512, width=8)), width=8)


def fit(data: Any, folder: Path, callback: L.Callback) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=2,
        default_root_dir=folder,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recipe(), datamodule=data)
    return trainer


def emoji(mixer: CaptionMixer | None) -> Emoji:
    return Emoji(batch_size=64, tiny=True, text=NgramTokenizer(buckets=512, length=24), mixer=mixer)


class Watched(CaptionStatistics):
    """Keeps what is logged at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("captions/")})


def test_every_epoch_is_logged_with_its_own_numbers(tmp_path: Path) -> None:
    data = emoji(CaptionMixer({"alt": AltText(), "looks": SyntheticCaption("dense")}, {"alt": 0.3, "looks": 0.7}))
    watched = Watched()
    fit(data, tmp_path, watched)
    trainer_of_one = [data.caption_statistics(epoch) for epoch in (0, 1)]
    for seen, said in zip(watched.seen, trainer_of_one, strict=True):
        assert said is not None
        assert seen == pytest.approx({f"captions/{name}": value for name, value in said.items()}, rel=ulps(4, F32))
    assert watched.seen[0]["captions/alt_share"] != watched.seen[1]["captions/alt_share"]
    assert watched.seen[0]["captions/truncated"] > 0.5  # 24 tokens hold no dense caption


def test_data_without_a_mixer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CaptionStatistics: no captions are mixed: Emoji has no data\.mixer"):
        fit(emoji(None), tmp_path, CaptionStatistics())
    with pytest.raises(ValueError, match=r"CaptionStatistics needs caption_statistics\(\) of the data module; Data"):
        fit(Data({"val": make()}), tmp_path, CaptionStatistics())


@pytest.mark.parametrize(
    ("overlay", "alt"), quick([(None, 0.0), ("papers/revisit-captions", 0.5), ("claims/revisit-captions:alt", 1.0)], 3)
)
def test_overlays_set_the_shares_that_they_say(overlay: str | None, alt: float, cli: Any) -> None:
    names = ["contrastive/emoji-captions", *([overlay] if overlay else []), "on/tiny"]
    result = cli("fit", *(part for name in names for part in ("--config", name)), "--name", "x")
    assert result.rc == 0, result.err
    metrics = json.loads(Path("runs/x/metrics.json").read_text())
    assert metrics["captions/alt_share"] == pytest.approx(alt, abs=0.12 if 0 < alt < 1 else 0)
    assert metrics["sham/calls"] >= 1
