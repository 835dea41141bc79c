"""Statistics of training captions: length, truncation, vocabulary coverage, sources."""

from __future__ import annotations

import lightning as L


class CaptionStatistics(L.Callback):
    """Logs the data module's ``caption_statistics(epoch)`` for the captions of a training epoch:

    * ``captions/tokens``: mean length in tokens, before padding or truncation.
    * ``captions/truncated``: share that the tokenizer truncates.
    * ``captions/coverage``: distinct tokens over the tokenizer's vocabulary.
    * ``captions/distinct``: distinct captions over captions.
    * ``captions/{source}_share``: share of each source of captions, as sampled.

    It logs once per epoch, over the whole epoch and all ranks, even if a run stops before its end. The sampled captions
    are computed in advance, so a resume counts nothing twice.
    """

    once = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "caption_statistics"):
            raise ValueError(
                f"CaptionStatistics needs caption_statistics() of the data module; {type(data).__name__} has none"
            )
        if data.caption_statistics(0) is None:
            raise ValueError(f"CaptionStatistics: no captions are mixed: {type(data).__name__} has no data.mixer")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        many = trainer.world_size > 1
        data = trainer.datamodule  # type: ignore[attr-defined]
        for name, value in data.caption_statistics(trainer.current_epoch).items():
            # equal on all ranks already: the mean changes nothing
            pl_module.log(f"captions/{name}", value, on_step=False, on_epoch=True, sync_dist=many, batch_size=1)
