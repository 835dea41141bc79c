"""What captions training reads, in numbers: how long, how many are cut, how many words, and of which kind."""

from __future__ import annotations

from typing import Any

import lightning as L


class CaptionStatistics(L.Callback):
    """Logs what the data module's ``caption_statistics(epoch)`` says of the captions that an epoch of training reads.

    * ``captions/tokens``: mean length in tokens, before a row is filled up or cut.
    * ``captions/truncated``: share that the codec cuts, whose end is never read.
    * ``captions/coverage``: distinct tokens that are read, over the codec's vocabulary.
    * ``captions/distinct``: distinct captions over captions.
    * ``captions/{source}_share``: share of each kind of caption, as drawn.

    Once an epoch, of the whole epoch (of all ranks, and also where a run stops before its end): what a visit draws is
    known without reading it, so nothing is counted twice after a resume and no rank has to tell another.

    Raises:
        ValueError: at setup, if the data module has no such numbers or no mixer to draw captions.
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = _data(trainer)
        if not hasattr(data, "caption_statistics"):
            raise ValueError(
                f"CaptionStatistics needs caption_statistics() of the data module; {type(data).__name__} has none"
            )
        if data.caption_statistics(0) is None:
            raise ValueError(f"CaptionStatistics: no captions are mixed: {type(data).__name__} has no data.mixer")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        many = trainer.world_size > 1
        for name, value in _data(trainer).caption_statistics(trainer.current_epoch).items():
            # equal on all ranks already: the mean changes nothing
            pl_module.log(f"captions/{name}", value, on_step=False, on_epoch=True, sync_dist=many, batch_size=1)


def _data(trainer: L.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
