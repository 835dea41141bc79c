"""Where figures go: the run's folder, and loggers that show images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from descant.callbacks.plots.style import pixels
from descant.modules.training_setup.boards import boards
from descant.modules.training_setup.trainer import logged_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def writers(trainer: L.Trainer) -> list[Any]:
    """Return the SummaryWriters of the TensorBoard loggers."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def run_folder(trainer: L.Trainer) -> Path:
    """Return the folder of the first logger that has one, else the Trainer's ``default_root_dir``."""
    # not trainer.log_dir: it is a collective, and None if the first logger has no folder
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return Path(next((f for f in folders if isinstance(f, str | Path)), trainer.default_root_dir))


def save_figure(trainer: L.Trainer, figure: Figure, name: str, tag: str, small: Figure | None = None) -> None:
    """Write ``pictures/{name}-{step}.png`` in the run's folder, and show it under ``tag`` on loggers that can.

    ``small``: the figure that these loggers get instead.
    """
    image, folder = pixels(figure), run_folder(trainer) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{name}-{trainer.global_step}.png")
    if shown := boards(trainer.loggers):
        image = image if small is None or small is figure else pixels(small)
        for board in shown:
            board.show_image(tag, image, logged_step(trainer))
