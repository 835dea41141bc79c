"""What a model finds, to look at: retrieval as pictures, and the embedding projector.

Letters: N rows of an evaluation set, G gallery rows, D width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from google.protobuf import text_format  # type: ignore[import-untyped]
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageDraw, ImageFont
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor

from descant.callbacks.evaluate.embeddings import Judge, Rows, letters
from descant.modules.engine.trainer import logged_step

INK, FAINT, PAPER = (34, 34, 34), (110, 110, 110), (255, 255, 255)
GREEN, RED, GREY, BLUE = (0, 140, 70), (213, 60, 40), (190, 190, 190), (40, 100, 200)
TILE, FRAME, GAP, TEXT, TITLE = 128, 4, 12, 15, 19  # pixels
#: TensorBoard shows a picture in 335 x 215 pixels, until it is clicked: this many queries, and captions in letters as
#: large as their words allow, are read there (30 pixels of a sheet are 9 of TensorBoard).
SHOWN, CAPTIONS, ROOM, HEAD = 3, (30, 26, 22, 18), 72, 34
SPRITE = 8192  # the projector draws no sprite sheet that is wider


@runtime_checkable
class Pictured(Protocol):
    """A data module that shows samples: ``describe`` a line, ``picture`` uint8 ``[3, H, W]`` or None."""

    def describe(self, index: int) -> str: ...

    def picture(self, index: int) -> Tensor | None: ...


class RetrievalPictures(Judge):
    """Queries and the best they find, right ones framed green and wrong ones red, after each evaluation.

    One picture a set and direction (``i2t``, ``t2i``): to ``{run folder}/pictures/{set}-i2t-{step}.png``, and with
    three queries at most, which can be read there, to every TensorBoard logger as ``pictures/{set}-i2t``. The
    queries are spread evenly over the set by sample id, so they are the same in every evaluation; no two of them share
    a key, and so no caption. Of texts found that share a key, which say the same, the best is shown. Nothing is drawn
    in the sanity check.

    Args:
        queries: rows of a picture in the run's folder.
        top: candidates of each query.
        pair: the two modalities.

    Raises:
        ValueError: a pair that is not two modalities, queries or top below 1; at evaluation, an unknown
            modality.

    >>> RetrievalPictures(top=0)
    Traceback (most recent call last):
    ValueError: RetrievalPictures: queries 8 and top 0: 1 is the least
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

    def __init__(self, queries: int = 8, top: int = 5, pair: list[str] | None = None) -> None:
        super().__init__()
        self.queries, self.top, self.pair = queries, top, pair or ["image", "text"]
        if min(queries, top) < 1:
            raise ValueError(f"RetrievalPictures: queries {queries} and top {top}: 1 is the least")
        if len(self.pair) != 2 or self.pair[0] == self.pair[1]:
            raise ValueError(f"RetrievalPictures: pair: {self.pair} is not two modalities")

    def judge(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        folder = run_folder(trainer)  # asks all ranks, so it stands before the ways part
        for name, rows in sets.items():
            for m in self.pair:
                if m not in rows.z:
                    known = ", ".join(rows.z)
                    raise ValueError(f"RetrievalPictures: no embedding of {m!r}; the recipe has {known}")
            if trainer.sanity_checking or not trainer.is_global_zero:
                continue
            for a, b in (self.pair, self.pair[::-1]):
                title = f"{name}: {a} to {b}, step {trainer.global_step}"
                image = self.draw(rows, a, b, trainer, title)
                if image is None:
                    continue
                small = self.draw(rows, a, b, trainer, title, SHOWN) if self.queries > SHOWN else image
                letter = letters(rows.z)
                tag = f"{name}-{letter[a]}2{letter[b]}"
                keep_picture(trainer, folder, image, tag, f"pictures/{tag}", small)
        return {}

    def draw(
        self, rows: Rows, a: str, b: str, trainer: L.Trainer, title: str, queries: int | None = None
    ) -> Image.Image | None:
        """The picture of one direction; None where no query has a right row in the gallery."""
        gallery_G = rows.where(b)
        query = rows.where(a)
        query = query[torch.isin(rows.key[query], rows.key[gallery_G])]
        query = query[first_of_each(rows.key[query])]
        if len(query) == 0:
            return None
        spread = torch.linspace(0, len(query) - 1, min(queries or self.queries, len(query)), device=query.device)
        query = query[spread.round().long()]
        score = rows.z[a][query] @ rows.z[b][gallery_G].T
        order = score.nan_to_num(-2.0).argsort(dim=1, descending=True, stable=True)
        if b == "text":  # what is said twice is shown once
            found = [line[first_of_each(rows.key[gallery_G[line]])] for line in order]
        else:
            found = list(order)
        best = torch.stack([gallery_G[line[: self.top]] for line in found])
        right = rows.key[best] == rows.key[query][:, None]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        lines = []
        for q, candidates, hits in zip(query.tolist(), best.tolist(), right.tolist(), strict=True):
            cells = [_cell(data, int(rows.index[q]), GREY, a != "text")]
            for n, hit in zip(candidates, hits, strict=True):
                cells.append(_cell(data, int(rows.index[n]), GREEN if hit else RED, True))
            lines.append(cells)
        first = right[:, 0].double().mean()
        return sheet(lines, title, f"first is right: {first:.0%} of {len(query)} shown")


class Projector(Judge):
    """The embeddings of the last evaluation in TensorBoard's projector: at the end of a fit, and of a test.

    One entry a set holds all modalities in their common space, labelled by sample, modality and key, each
    point drawn as the sample's picture, with a blue frame where it is the text that was embedded.

    Args:
        limit: points of one set, evenly spread by sample id.
        size: pixels of a point's picture.

    Raises:
        ValueError: limit or size below 2, or a sheet of pictures wider than the projector draws.

    >>> Projector(limit=40000)
    Traceback (most recent call last):
    ValueError: Projector: 40000 pictures of 48 pixels make a sheet of 9600; the projector draws up to 8192
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

    def __init__(self, limit: int = 2000, size: int = 48) -> None:
        super().__init__()
        self.limit, self.size = limit, size
        if min(limit, size) < 2:
            raise ValueError(f"Projector: limit {limit} and size {size}: 2 is the least")
        wide = int(np.ceil(limit**0.5)) * size
        if wide > SPRITE:
            raise ValueError(
                f"Projector: {limit} pictures of {size} pixels make a sheet of {wide}; "
                f"the projector draws up to {SPRITE}"
            )
        self._points: dict[str, tuple[Tensor, list[tuple[int, str, int]]]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if trainer.loggers and not writers(trainer):  # without any, Sanity says so
            rank_zero_warn("Projector: none of the loggers is a TensorBoardLogger, so nothing will be written")

    def judge(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return {}
        for name, rows in sets.items():
            points = [(n, m) for m in rows.z for n in rows.where(m).tolist()]
            points = points[:: -(-len(points) // self.limit)] if points else []
            if points:
                z_ND = torch.stack([rows.z[m][n] for n, m in points]).cpu()
                self._points[name] = z_ND, [(int(rows.index[n]), m, int(rows.key[n])) for n, m in points]
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What was embedded last is written at the end of a fit, which a resumed run may reach without another look."""
        return {name: {"z": z_ND, "labels": labels} for name, (z_ND, labels) in self._points.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._points = {
            name: (kept["z"], [(int(index), str(m), int(key)) for index, m, key in kept["labels"]])
            for name, kept in state_dict.items()
        }

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        points, self._points = self._points, {}
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for writer in writers(trainer) if trainer.is_global_zero else []:
            config = Path(writer.log_dir) / "projector_config.pbtxt"
            earlier = config.read_text() if config.exists() else ""
            for name, (z_ND, labels) in points.items():
                marks = [[_line(data, index), m, str(key)] for index, m, key in labels]
                tiles = [self._tile(data, index, m) for index, m, _ in labels]
                writer.add_embedding(
                    z_ND,
                    metadata=marks,
                    metadata_header=["sample", "modality", "key"],
                    label_img=torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255,
                    tag=name,
                    global_step=trainer.global_step,
                )
            if earlier and points:
                _keep(config, earlier)

    def _tile(self, data: Any, index: int, modality: str) -> np.ndarray:
        image = _picture(data, index) or _label(_line(data, index), TILE)
        tile = Image.new("RGB", (self.size, self.size), PAPER)
        tile.paste(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        if modality == "text":
            ImageDraw.Draw(tile).rectangle((0, 0, self.size - 1, self.size - 1), outline=BLUE, width=3)
        return np.asarray(tile)


def writers(trainer: L.Trainer) -> list[Any]:
    """The SummaryWriters of the TensorBoard loggers."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def run_folder(trainer: L.Trainer) -> Path:
    """Where the run's files go; to be called on every rank, since ranks agree on it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def keep_picture(
    trainer: L.Trainer, folder: Path, image: Image.Image, name: str, tag: str, small: Image.Image | None = None
) -> None:
    """In the run's folder as ``pictures/{name}-{step}.png``, and under a tag in every TensorBoard logger.

    ``small``: what TensorBoard gets instead.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    image.save(folder / "pictures" / f"{name}-{trainer.global_step}.png")
    for writer in writers(trainer):
        writer.add_image(tag, np.asarray(small or image), logged_step(trainer), dataformats="HWC")


def _keep(config: Path, earlier: str) -> None:
    """Entries of an earlier process of this run: a SummaryWriter knows its own, and overwrites the list."""
    merged, now = ProjectorConfig(), ProjectorConfig()
    text_format.Parse(earlier, merged)
    text_format.Parse(config.read_text(), now)
    ours = {entry.tensor_name for entry in now.embeddings}
    kept = [entry for entry in merged.embeddings if entry.tensor_name not in ours]
    now.embeddings.extend(kept)
    config.write_text(text_format.MessageToString(now))


def first_of_each(key_N: Tensor) -> Tensor:
    """Positions of the first row of each key, ascending.

    >>> first_of_each(torch.tensor([7, 3, 7, 3, 5])).tolist()
    [0, 1, 4]
    """
    seen: dict[int, int] = {}
    for n, key in enumerate(key_N.tolist()):
        seen.setdefault(key, n)
    return torch.tensor(list(seen.values()), dtype=torch.long, device=key_N.device)


# drawing -------------------------------------------------------------------------------------------------


def sheet(lines: Sequence[Sequence[Image.Image]], title: str, note: str) -> Image.Image:
    """Rows of cells under a header line; the first cell of a row, the query, stands a little apart.

    Raises:
        ValueError: without a row.

    >>> cells = [[Image.new("RGB", (100, 80))] * 3] * 2
    >>> sheet(cells, "title", "note").size
    (372, 247)
    """
    if not lines:
        raise ValueError("a sheet needs at least one row")
    columns, (w, h) = max(len(cells) for cells in lines), lines[0][0].size
    top, split = 2 * GAP + HEAD + 5, 2 * GAP
    size = (columns * (w + GAP) + GAP + split, top + len(lines) * (h + GAP))
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, INK, _font(HEAD, title))
    room = size[0] - 3 * GAP - draw.textlength(title, _font(HEAD, title))
    if draw.textlength(note, _font(CAPTIONS[1], note)) < room:
        draw.text((size[0] - GAP, GAP + HEAD - 2), note, FAINT, _font(CAPTIONS[1], note), anchor="rs")
    draw.line((GAP, top - 7, size[0] - GAP, top - 7), GREY)
    for i, cells in enumerate(lines):
        for j, cell in enumerate(cells):
            image.paste(cell, (GAP + j * (w + GAP) + (split if j else 0), top + i * (h + GAP)))
    return image


def _cell(data: Any, index: int, colour: tuple[int, int, int], pictured: bool) -> Image.Image:
    """A framed picture over its caption; the caption in large letters where there is no picture to show."""
    text = _line(data, index)
    picture = _picture(data, index) if pictured else None
    width, height = TILE + 2 * FRAME, TILE + 2 * FRAME + 3 + ROOM
    cell = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(cell)
    draw.rectangle((0, 0, width - 1, TILE + 2 * FRAME - 1), outline=colour, width=FRAME)
    shown = picture.resize((TILE, TILE), _filter(picture)) if picture else _largest(text, TILE, TILE, middle=True)
    cell.paste(shown, (FRAME, FRAME))
    if picture:
        cell.paste(_largest(text, width, ROOM), (0, TILE + 2 * FRAME + 3))
    return cell


def _largest(text: str, width: int, height: int, middle: bool = False) -> Image.Image:
    """A text in the largest of the captions' letters in which it fits and no word is broken; else in the smallest."""
    for size in CAPTIONS:
        most = height // (size + 2)
        if size > CAPTIONS[-1] and _font(size, text).getlength(text) > width * most:
            continue  # it cannot fit, and wrapping a long text takes milliseconds
        lines = _wrapped(text, size, width - 2, most)
        if " ".join(lines) == text:
            break
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    top = (height - len(lines) * (size + 2)) / 2 if middle else 0
    for i, line in enumerate(lines):
        draw.text((width / 2, top + i * (size + 2)), line, INK, _font(size, line), anchor="ma")
    return image


def _label(text: str, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), PAPER)
    lines = _wrapped(text, TEXT + 2, size - 8, 5)
    draw, step = ImageDraw.Draw(image), TEXT + 5
    for i, line in enumerate(lines):
        y = size / 2 + (i - (len(lines) - 1) / 2) * step
        draw.text((size / 2, y), line, INK, _font(TEXT + 2, line), anchor="mm")
    return image


def _wrapped(text: str, size: int, width: int, most: int) -> list[str]:
    """``text`` in at most ``most`` lines of ``width`` pixels; an ellipsis where it had to be cut."""
    font = _font(size, text)
    for columns in range(40, 3, -1):
        lines = textwrap.wrap(text, columns) or [text]
        if all(font.getlength(line) <= width for line in lines[:most]):
            break
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: max(columns - 2, 1)].rstrip() + "..."]
    return lines


def _font(size: int, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, the same on every machine; DejaVu, where installed, for letters it lacks."""
    # beyond Latin letters (to 0x24F) and dashes, quotes and the ellipsis (0x2010 to 0x2026)
    if any(ord(c) > 0x24F and not 0x2010 <= ord(c) <= 0x2026 for c in text):
        try:
            return ImageFont.truetype("DejaVuSans.ttf", size)
        except OSError:
            pass
    return ImageFont.load_default(size)


def _filter(image: Image.Image) -> Image.Resampling:
    # tiny pictures show their pixels, others stay smooth
    return Image.Resampling.NEAREST if max(image.size) <= TILE // 4 else Image.Resampling.BICUBIC


def _picture(data: Any, index: int) -> Image.Image | None:
    pixels = data.picture(index) if isinstance(data, Pictured) else None
    return None if pixels is None else Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def _line(data: Any, index: int) -> str:
    text = data.describe(index) if hasattr(data, "describe") else str(index)
    return " ".join(text.split()) or str(index)  # the projector's tables know no tabs and no empty cells
