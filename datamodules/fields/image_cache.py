"""A cache of decoded images, reduced in size, in memory that the workers of a machine share.

Letters: N rows of a source, S pixels.
"""

from __future__ import annotations

import mmap

import numpy as np

from descant.datamodules.fields.images import Reduced

#: The most bytes of a cache: further images are decoded whenever they are read.
MOST = 1 << 31


class ImageCache:
    """Row -> its reduced image, uint8 ``[S, S, 3]`` with the original shape, once some process has decoded it.

    Processes that are forked later (workers of a loader) share the memory, which is allocated page by page as rows are
    filled. Two processes that fill one row write the same bytes. A pickled copy begins empty.

    Args:
        rows: N of the source.
        side: S.
        most: the most bytes; rows beyond them are not cached.

    >>> cache = ImageCache(2, side=1)
    >>> cache.put(1, Reduced(30, 40, np.full((1, 1, 3), 7, dtype=np.uint8)))
    >>> cache.get(0) is None, cache.get(1).width, cache.get(1).x_SS3.tolist()
    (True, 40, [[[7, 7, 7]]])
    """

    def __init__(self, rows: int, side: int, most: int = MOST) -> None:
        self.rows, self.side, self.most = rows, side, most
        self.N = min(rows, most // (3 * side * side))
        # anonymous memory: /dev/shm is small in containers, and writing beyond it kills the process
        pixels = mmap.mmap(-1, max(self.N * 3 * side * side, 1))
        shape = mmap.mmap(-1, max(self.N * 8, 1))
        self.x_NSS3 = np.frombuffer(pixels, np.uint8, self.N * 3 * side * side).reshape(self.N, side, side, 3)
        self.shape_N2 = np.frombuffer(shape, np.int32, self.N * 2).reshape(self.N, 2)

    def __reduce__(self) -> tuple[type[ImageCache], tuple[int, int, int]]:
        return ImageCache, (self.rows, self.side, self.most)

    def get(self, row: int) -> Reduced | None:
        """Return the image of a row; None if it has not been decoded, or is beyond ``most``."""
        if row >= self.N or not self.shape_N2[row].all():
            return None
        height, width = self.shape_N2[row].tolist()
        return Reduced(height, width, self.x_NSS3[row])

    def put(self, row: int, image: Reduced) -> None:
        """Cache the image of a row, unless it is beyond ``most``."""
        if row < self.N:
            self.x_NSS3[row] = image.x_SS3
            self.shape_N2[row] = image.height, image.width  # last: a row with a shape has its pixels
