"""Read TensorBoard event files of runs, and their images in the size that a report page needs."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from descant.cli.errors import one_line, say
from descant.cli.errors import printable as clean
from descant.cli.untrusted import open_below
from descant.modules.core.metric_names import OVERVIEW as OVERVIEW
from descant.run.groups import Group, Run

#: Maximum number of steps shown per tag, and of bytes of a record.
_STEPS, _MOST_BYTES = 4, 100_000_000
#: Widths in pixels and JPEG qualities, best first; captions are readable down to the last.
_SIZES = ((960, 80), (720, 75), (480, 65))
#: Bytes of the HTML around an image.
_FRAME = 600


@dataclass(frozen=True)
class Picture:
    """An image for a page: ``number`` of its group, ``age`` 0 for the newest of its tag and run, ``uri`` its data."""

    tag: str
    number: int
    run: Run
    step: int
    age: int
    size: tuple[int, int]
    uri: str
    shrunk: bool


def read(folder: Path) -> Iterator[tuple[int, Any]]:
    """Yield step and value (a ``Summary.Value``) of all events of a folder, in the order of writing.

    TensorBoard's EventAccumulator keeps a random sample of images, not the newest. Without TensorFlow, it computes
    checksums in Python, at 10 MB/s. A truncated file is read to its last whole record, because its run may still be
    writing.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    files = [path for path in folder.glob("events.out.tfevents.*") if not path.is_dir()]
    for file in sorted(files, key=_by_number):
        try:
            stream = open_below(file, folder)
        except (OSError, ValueError) as error:
            say(f"skipped, as it cannot be read: {file}: {one_line(error)}")
            continue
        with stream:
            while len(head := stream.read(12)) == 12:  # a record: length, checksum, data, checksum
                length = int.from_bytes(head[:8], "little")
                data = stream.read(length + 4) if length <= _MOST_BYTES else b""
                if len(data) != length + 4:
                    break
                try:
                    event = Event.FromString(data[:-4])
                except DecodeError:
                    break
                yield from ((event.step, value) for value in event.summary.value)


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Return a sort key with numbers by value: the tenth file that a process writes in one second follows the ninth."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def pictures(groups: Sequence[Group], budget: int) -> tuple[list[Picture], list[str]]:
    """Collect the images of runs within ``budget`` bytes of a page, and lines about those that are left out.

    The newest image of each tag comes first: from one run per group, then from the other seeds. Older images follow.
    Images that do not fit are left out, the oldest first. Images are shrunk until one of each tag and group fits.
    """
    order = sorted(
        ((rank, number, run) for number, one in enumerate(groups) for rank, run in enumerate(one.runs.values())),
        key=lambda item: item[:2],
    )
    images: list[Picture] = []
    waiting: list[tuple[int, str, int, Run, int, bytes]] = []
    lines: list[str] = []
    share, room, left, broken = 0, budget, 0, 0

    def add(age: int, tag: str, number: int, run: Run, step: int, data: bytes) -> None:
        nonlocal room, left, broken
        made = None if left else _uri(data, min(share, room) - _FRAME)
        if left or (made is not None and len(made[1]) + _FRAME > room):
            left += 1  # and all later ones
        elif made is None:
            broken += 1
        else:
            room -= len(made[1]) + _FRAME
            images.append(Picture(tag, number, run, step, age, *made))

    for done, (_, number, run) in enumerate(order):
        if left:  # the page is full
            lines.append(f"Images of {len(order) - done} more runs are left out: the page would be too large.")
            break
        tags = _newest(run.folder)
        share = share or (budget // (len(tags) * len(groups)) if tags else 0)
        for tag, ((step, data), *older) in tags:
            add(0, tag, number, run, step, data)
            waiting += [(age, tag, number, run, step, data) for age, (step, data) in enumerate(older, 1)]
    for item in sorted(waiting, key=lambda item: item[0]):
        add(*item)
    if left:
        lines.append(f"{left} images are left out, the oldest first: the page would be too large.")
    if broken:
        lines.append(f"{broken} images could not be decoded.")
    if any(picture.shrunk for picture in images):
        lines.append("Images are smaller here than in the runs' folders.")
    return images, lines


def _newest(folder: Path) -> list[tuple[str, list[tuple[int, bytes]]]]:
    """Return each tag of a run by name, with its newest images, newest first."""
    by_tag: dict[str, dict[int, bytes]] = {}
    for step, value in read(folder):
        if value.HasField("image"):
            steps = by_tag.setdefault(clean(value.tag)[:200], {})
            steps[step] = value.image.encoded_image_string
            if len(steps) > _STEPS:
                del steps[min(steps)]
    return [(tag, sorted(steps.items(), reverse=True)) for tag, steps in sorted(by_tag.items())]


def _uri(data: bytes, most: int) -> tuple[tuple[int, int], str, bool] | None:
    """Return size, data URI and whether the image was shrunk; None for data that is not an image.

    The size is the largest of a few within ``most`` bytes, else the smallest. The image is always re-encoded, so that
    only pixels get into a page.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "GIF", "WEBP")).convert("RGB")
        for width, quality in _SIZES:
            small = image.copy()
            small.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
            kind, coded = "jpeg", _encode_image(small, format="JPEG", quality=quality, optimize=True)
            if len(data) <= len(coded) and len(png := _encode_image(image, format="PNG", optimize=True)) <= len(coded):
                small, kind, coded = image, "png", png  # few colours, such as a matrix: smaller and exact
            uri = f"data:image/{kind};base64,{base64.b64encode(coded).decode()}"
            if len(uri) <= most:
                break
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    return small.size, uri, small.size != image.size


def _encode_image(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()
