"""Silence Lightning's informational messages; real warnings stay."""

from __future__ import annotations

import logging
import warnings

#: Warnings about settings that Descant chose on purpose.
_CHATTER = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed from.*",  # an evaluation writes to its own folder
    ".*LightningCLI's args parameter.*",
    ".*The `srun` command is available.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*No device id is provided via.*",
    ".*ended before the epoch ended and your dataloader is.*",  # Resume warns if it is true
    ".*in eval mode at the start of training.*",  # frozen towers, which stay so
    ".*callbacks used to create the checkpoint need to be provided.*",  # judged_data leaves some out, in one line
)


def quieten() -> None:
    """Silence informational messages of Lightning and the warnings listed above, in this process."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _CHATTER:
        warnings.filterwarnings("ignore", message=message)
