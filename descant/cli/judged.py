"""Choose the data on which a run is evaluated, and refuse data that are prepared in another way than its own."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from descant.cli.arguments import Request
from descant.cli.errors import say
from descant.datamodules.prepared import OtherData, require_alike
from descant.datamodules.user.user_data import UserData
from descant.export import loading
from descant.modules.io import saved
from descant.modules.io.plain import load_values
from descant.run import runs


def judged_data(
    request: Request, built: L.LightningDataModule, trainer: L.Trainer, checkpoint: str | None
) -> L.LightningDataModule:
    """Return the data module of ``validate``, ``test`` or ``predict --run``: of ``--data.path``, or as it was built.

    Columns of a table are read with the codes of the ``checkpoint``. Callbacks that are fitted on training samples are
    left out if there are no such samples.
    """
    if request.judged is None:
        if any(key.partition(".")[0] == "data" for key, _ in request.typed_options):
            folder = runs.existing(Path(request.option("runs") or "runs"), str(request.option("run")))
            trained = loading.datamodule(saved.find(folder, "last"))
            if trained is not None:
                require_alike(built, trained)
        return built
    fits = [one for one in trainer.callbacks if "bank_dataloader" in getattr(one, "needs_of_data", ())]  # type: ignore[attr-defined]
    if fits:
        names = ", ".join(sorted({type(one).__name__ for one in fits}))
        say(f"left out, since it is fitted on training samples: {names}")
        trainer.callbacks = [one for one in trainer.callbacks if one not in fits]  # type: ignore[attr-defined]
    if isinstance(built, UserData) and built.tables and checkpoint is not None:
        built.load_codes(load_values(Path(checkpoint)).get(type(built).__qualname__, {}))
    return OtherData(request.judged[0], built, request.judged[1])
