"""The corpora: they know files, and hand out :class:`descant.modules.batch.Batch`."""
