"""How Lightning's Trainer reads ``accelerator`` and ``precision``.

Lightning has to keep: ``PrecisionInput`` is the type of the Trainer's ``precision``, from which the command line lists
the choices. ``choose_auto_accelerator()`` returns what ``accelerator: auto`` becomes, such as ``cpu``. In public, only
a built Trainer knows it, and it needs the precision first.
"""

from lightning.fabric.connector import _PRECISION_INPUT as PrecisionInput  # type: ignore[attr-defined]
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

__all__ = ["PrecisionInput", "choose_auto_accelerator"]

choose_auto_accelerator = _AcceleratorConnector._choose_auto_accelerator
