"""The values that ``self.log`` collects in an epoch.

Lightning has to keep: the results of a loop map a key to a ``ResultMetric``. It has ``meta``, ``value``,
``cumulated_batch_size`` (for means), ``has_reset``, ``_forward_cache`` (the last value) and ``_update_count``. ``meta``
is a ``Metadata``, and its ``sync`` a ``Sync``. No checkpoint of Lightning holds them, and no public way reads them.
"""

from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata as Metadata
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric as ResultMetric
from lightning.pytorch.trainer.connectors.logger_connector.result import _Sync as Sync

__all__ = ["Metadata", "ResultMetric", "Sync"]
