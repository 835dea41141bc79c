"""Leaves of nested containers, and maps over them.

torch has to keep: tuples, lists, named tuples and dicts are containers, and dicts keep their order. Everything else is
a leaf. ``torch.utils._pytree`` has no public counterpart.
"""

from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["tree_leaves", "tree_map"]
