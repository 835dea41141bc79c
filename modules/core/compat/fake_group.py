"""A process group of any number of ranks of which only one exists; its collectives return at once.

torch has to keep: the import registers the backend ``fake`` for CPUs, and ``create_fake_group`` is a constructor for
``torch.distributed.Backend.register_backend(..., extended_api=True)``. torch offers it to its own tests only.
"""

from torch.testing._internal.distributed.fake_pg import _create_fake_pg as create_fake_group

__all__ = ["create_fake_group"]
