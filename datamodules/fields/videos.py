"""Field of video files. Letters: B samples, F frames, S pixels of a side, H and W pixels of a frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from descant.datamodules.fields.columns import Column, kinds, named_column
from descant.datamodules.fields.fields import Decoded, Field, Row, fill_rows
from descant.datamodules.sources.arrays import ARRAY, array_of
from descant.datamodules.sources.base import VIDEO_ENDINGS, Source
from descant.modules.core.host import derive
from descant.modules.transforms.image import Pixels

#: The most decoded bytes of the frames of one video.
LIMIT = 1 << 28
#: A pixel of a frame after the end of a video.
ENDED = -1


class OpenVideo(Protocol):
    """An open video: its number of frames, and some of them as uint8 ``[F, 3, H, W]``.

    A decoder makes one from a file's bytes, and raises ValueError or RuntimeError if they are no video.
    """

    def __len__(self) -> int: ...

    def at(self, index_F: Sequence[int]) -> Tensor: ...


class TorchCodec:
    """A video as torchcodec decodes it, on one thread."""

    def __init__(self, data: bytes) -> None:
        from torchcodec.decoders import VideoDecoder

        self.decoder = VideoDecoder(data, num_ffmpeg_threads=1)

    def __len__(self) -> int:
        return int(self.decoder.metadata.num_frames or 0)

    def at(self, index_F: Sequence[int]) -> Tensor:
        frames: Tensor = self.decoder.get_frames_at(list(index_F)).data
        return frames


class ArrayFrames:
    """Frames in a ``.npy`` file, ``[F, 3, H, W]`` of 0 to 255."""

    def __init__(self, data: bytes) -> None:
        array = array_of(data)
        if array.ndim != 4 or array.shape[1] != 3:
            raise ValueError(f"an array {list(array.shape)}, and frames are [frames, 3, height, width]")
        self.x_F3HW = torch.from_numpy(array.astype(np.uint8))

    def __len__(self) -> int:
        return len(self.x_F3HW)

    def at(self, index_F: Sequence[int]) -> Tensor:
        return self.x_F3HW[list(index_F)]


class VideoField(Field):
    """Video files -> int16 ``[B, F, 3, S, S]``: the central squares of evenly spaced frames; -1 after the last.

    Reads files of any format of FFmpeg, and frames in ``.npy`` files, ``[frames, 3, height, width]`` of 0 to 255. From
    a video of fewer than F frames it takes all. Training and evaluation take the same frames. On the device, they
    become float pixels in -1..1, and frames after the last ``-inf``, which a VideoTower takes for padding.

    Args:
        field: name of the field; several as ``mp4;webm``. The only field with videos by default.
        frames: F.
        size: S, pixels out.
    """

    kind, usual = "video", VIDEO_ENDINGS
    #: Opens the bytes of a file.
    decoder: Callable[[bytes], OpenVideo] = TorchCodec

    def __init__(self, field: str | None = None, frames: int = 8, size: int = 112) -> None:
        for name, value in (("frames", frames), ("size", size)):
            if value < 1:
                raise ValueError(f"{name} {value}: 1 is the least")
        self.field, self.frames, self.size, self.pixels = field, frames, size, Pixels(size)
        if self.decoder is TorchCodec:
            require_torchcodec()

    def column(self, source: Source) -> Column:
        frames = self.field is None and self.kind not in kinds(source).values()
        return named_column(source, self.field, "array" if frames else self.kind)

    def decode(self, raw_B: Sequence[Row], draw_B: np.ndarray | None) -> Decoded:
        shape = (len(raw_B), self.frames, 3, self.size, self.size)
        return fill_rows(torch.full(shape, ENDED, dtype=torch.int16), raw_B, self._row)

    def _row(self, row: int, data: bytes) -> Tensor:
        try:
            return self._read(data)
        except (ValueError, RuntimeError) as error:  # a decoder's message may have several lines
            raise ValueError(" ".join(str(error).split())[:200]) from None

    def _read(self, data: bytes) -> Tensor:
        if not data:
            raise ValueError("an empty file")
        try:
            video = ArrayFrames(data) if data.startswith(ARRAY) else self.decoder(data)
            many = len(video)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"no video: {error}") from None
        if many < 1:
            raise ValueError("a video without a frame")
        places = np.linspace(0, many - 1, min(self.frames, many)).round().astype(int).tolist()
        first_13HW = video.at(places[:1])
        if first_13HW.numel() * len(places) > LIMIT:
            raise ValueError(f"frames of {first_13HW.numel():,} bytes: {len(places)} are more than {LIMIT:,}")
        x_F3HW = torch.cat([first_13HW, video.at(places[1:])]) if len(places) > 1 else first_13HW
        x_F3HW = v2.functional.center_crop(x_F3HW, [min(x_F3HW.shape[-2:])] * 2)
        return v2.functional.resize(x_F3HW, [self.size, self.size], antialias=True).to(torch.int16)

    def view(self, x_BF3SS: Tensor, draw_B: Tensor) -> Tensor:
        """Return float pixels on the device, ``-inf`` in frames after the last."""
        key_N = derive(lambda key_B: key_B.repeat_interleave(x_BF3SS.shape[1]), draw_B)
        pixels = self.pixels(x_BF3SS.flatten(0, 1).clamp(min=0), key_N).view(x_BF3SS.shape)
        return pixels.masked_fill(x_BF3SS == ENDED, -torch.inf)


def require_torchcodec() -> None:
    """Raise ValueError, in one line, if torchcodec cannot be imported."""
    try:
        import torchcodec  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({str(error).strip().splitlines()[0][:100]})"
        raise ValueError(f"videos need torchcodec and FFmpeg{why}: pip install 'descant[video]'") from None
