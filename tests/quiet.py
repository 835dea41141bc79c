"""A Trainer that prints and logs nothing, with what a run needs to be resumed exactly: for tests and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from descant.run.store import AtomicIO

#: Options of a Trainer on the CPU that prints, logs and saves nothing by itself, and takes the order from the data.
SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def quiet_trainer(folder: str | Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A silent one with these callbacks, as far as ``options`` do not say otherwise; it writes checkpoints whole."""
    settings = {"plugins": [AtomicIO()], "num_sanity_val_steps": 0, **SILENT, **options}
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings)
