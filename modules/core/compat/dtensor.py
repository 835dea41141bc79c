"""The box of a distributed tensor that a rank holds.

torch has to keep: ``local_shape_and_offset(shape, mesh, placements)`` returns the shape and the offset of this rank's
part, as ``distribute_tensor`` splits it. In public, only a finished DTensor knows its shape, and none its offset.
"""

from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as local_shape_and_offset

__all__ = ["local_shape_and_offset"]
