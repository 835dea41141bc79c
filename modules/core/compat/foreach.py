"""Kernels that work on lists of tensors, with one launch for many tensors.

torch has to keep: each gives the bits of a loop over the tensors, in place where its name ends with an underscore. The
public way, ``foreach=True`` and ``fused=True`` of optimizers, only serves optimizers.
"""

from torch import _foreach_copy_ as foreach_copy_
from torch import _foreach_lerp_ as foreach_lerp_
from torch import _foreach_mul_ as foreach_mul_
from torch import _foreach_norm as foreach_norm
from torch import _fused_adamw_ as fused_adamw_

__all__ = ["foreach_copy_", "foreach_lerp_", "foreach_mul_", "foreach_norm", "fused_adamw_"]
