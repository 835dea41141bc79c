"""Pictures that are decoded once: small copies in memory that the readers of a machine share. Letters: N rows of a
source, S pixels."""

from __future__ import annotations

import mmap

import numpy as np

from descant.datamodules.fields.images import Reduced

#: Bytes of the copies at most: pictures beyond them are decoded whenever they are read.
MOST = 1 << 31


class ImageCache:
    """Row -> its reduced picture, uint8 ``[S, S, 3]`` with its shape, once some process has decoded it.

    The memory is shared with the processes that are forked after this is made (readers of a loader), and is taken page
    by page as rows are filled. Two that fill one row write the same bytes. Where it is pickled instead, the copy
    begins empty.

    Args:
        rows: N of the source.
        side: S.
        most: bytes; rows beyond them are never kept.

    >>> kept = ImageCache(2, side=1)
    >>> kept.put(1, Reduced(30, 40, np.full((1, 1, 3), 7, dtype=np.uint8)))
    >>> kept.get(0) is None, kept.get(1).width, kept.get(1).x_SS3.tolist()
    (True, 40, [[[7, 7, 7]]])
    """

    def __init__(self, rows: int, side: int, most: int = MOST) -> None:
        self.rows, self.side, self.most = rows, side, most
        self.N = min(rows, most // (3 * side * side))
        # anonymous memory: what is named lies in /dev/shm, which containers make small, and writing beyond it kills
        pixels = mmap.mmap(-1, max(self.N * 3 * side * side, 1))
        shape = mmap.mmap(-1, max(self.N * 8, 1))
        self.x_NSS3 = np.frombuffer(pixels, np.uint8, self.N * 3 * side * side).reshape(self.N, side, side, 3)
        self.shape_N2 = np.frombuffer(shape, np.int32, self.N * 2).reshape(self.N, 2)

    def __reduce__(self) -> tuple[type[ImageCache], tuple[int, int, int]]:
        return ImageCache, (self.rows, self.side, self.most)

    def get(self, row: int) -> Reduced | None:
        """The picture of a row; None where it has not been decoded, or is beyond ``most``."""
        if row >= self.N or not self.shape_N2[row].all():
            return None
        height, width = self.shape_N2[row].tolist()
        return Reduced(height, width, self.x_NSS3[row])

    def put(self, row: int, picture: Reduced) -> None:
        """Keep the picture of a row, unless it is beyond ``most``."""
        if row < self.N:
            self.x_NSS3[row] = picture.x_SS3
            self.shape_N2[row] = picture.height, picture.width  # last: who sees a shape finds its pixels
