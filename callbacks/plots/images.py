"""Retrieval results as images, and TensorBoard's embedding projector.

Letters: N rows of an evaluation set, G gallery rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from google.protobuf import text_format  # type: ignore[import-untyped]
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor

from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, Rows, letters
from descant.callbacks.plots.output import save_figure, writers
from descant.callbacks.plots.style import (
    BLUE,
    FAINT,
    GREEN,
    GRID,
    INK,
    SMALL,
    VERMILLION,
    page,
    pixels,
    resized,
    rgb,
    styled,
    text_width,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE, FRAME, GAP = 128, 4, 12  # pixels
#: TensorBoard shows an image in 335 x 215 pixels until it is clicked. This many queries, and captions in the largest of
#: these sizes that fits, are readable there (30 pixels of a sheet are 9 of TensorBoard).
SHOWN, CAPTIONS, ROOM, HEAD = 3, (28, 23, 18, 14), 72, 30
SPRITE = 8192  # the projector shows no sprite sheet that is wider


@runtime_checkable
class Pictured(Protocol):
    """A data module that shows samples: ``describe`` a line, ``picture`` uint8 ``[3, H, W]`` or None."""

    def describe(self, index: int) -> str: ...

    def picture(self, index: int) -> Tensor | None: ...


class RetrievalPictures(EmbeddingEvaluator):
    """Image grids of queries and their best candidates: correct ones framed green, wrong ones orange-red.

    One figure a set and direction (``i2t``, ``t2i``) after each evaluation: to
    ``{run folder}/pictures/{set}-i2t-{step}.png``, and with at most three queries, which are readable there, to every
    TensorBoard logger as ``pictures/{set}-i2t``. Queries are evenly spaced over the set by sample id, hence the same in
    every evaluation, and no two share a key. Of retrieved texts that share a key only the best is shown. The sanity
    check draws nothing.

    Args:
        queries: rows of the figure in the run's folder.
        top: candidates per query.
        pair: the two modalities.

    Raises:
        ValueError: a pair that is not two modalities, queries or top below 1; at evaluation, an unknown modality.

    >>> RetrievalPictures(top=0)
    Traceback (most recent call last):
    ValueError: RetrievalPictures: queries 8 and top 0: 1 is the least
    """

    once = True

    def __init__(self, queries: int = 8, top: int = 5, pair: list[str] | None = None) -> None:
        super().__init__()
        self.queries, self.top, self.pair = queries, top, pair or ["image", "text"]
        if min(queries, top) < 1:
            raise ValueError(f"RetrievalPictures: queries {queries} and top {top}: 1 is the least")
        if len(self.pair) != 2 or self.pair[0] == self.pair[1]:
            raise ValueError(f"RetrievalPictures: pair: {self.pair} is not two modalities")

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        for name, rows in sets.items():
            for m in self.pair:
                self.require_embedding(rows, m)
            if trainer.sanity_checking or not trainer.is_global_zero:
                continue
            for a, b in (self.pair, self.pair[::-1]):
                title = f"{name}: {a} to {b}, step {trainer.global_step}"
                figure = self.draw(rows, a, b, trainer, title)
                if figure is None:
                    continue
                small = self.draw(rows, a, b, trainer, title, SHOWN) if self.queries > SHOWN else None
                letter = letters(rows.z)
                tag = f"{name}-{letter[a]}2{letter[b]}"
                save_figure(trainer, figure, tag, f"pictures/{tag}", small)
        return {}

    def draw(
        self, rows: Rows, a: str, b: str, trainer: L.Trainer, title: str, queries: int | None = None
    ) -> Figure | None:
        """The figure of one direction; None where no query has a match in the gallery."""
        gallery_G = rows.where(b)
        query = rows.where(a)
        query = query[torch.isin(rows.key[query], rows.key[gallery_G])]
        query = query[first_of_each(rows.key[query])]
        if len(query) == 0:
            return None
        spread = torch.linspace(0, len(query) - 1, min(queries or self.queries, len(query)), device=query.device)
        query = query[spread.round().long()]
        score = rows.z[a][query] @ rows.z[b][gallery_G].T
        ranked = list(score.nan_to_num(-2.0).argsort(dim=1, descending=True, stable=True))
        if b == "text":  # equal texts are shown once
            ranked = [line[first_of_each(rows.key[gallery_G[line]])] for line in ranked]
        best = torch.stack([gallery_G[line[: self.top]] for line in ranked])
        correct = rows.key[best] == rows.key[query][:, None]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        cells = []
        for q, candidates, hits in zip(query.tolist(), best.tolist(), correct.tolist(), strict=True):
            cells.append([_cell(data, int(rows.index[q]), GRID, a != "text")])
            for n, hit in zip(candidates, hits, strict=True):
                cells[-1].append(_cell(data, int(rows.index[n]), GREEN if hit else VERMILLION, True))
        first = correct[:, 0].double().mean()
        return sheet(cells, title, f"first is correct: {first:.0%} of {len(query)} shown")


class Projector(EmbeddingEvaluator):
    """The embeddings of the last evaluation in TensorBoard's projector, written at the end of a fit and of a test.

    One entry a set holds all modalities in their common space, labelled by sample, modality and key. Each point is
    shown as the sample's image, with a blue frame where the embedded one is the text.

    Args:
        limit: points of one set, evenly spaced by sample id.
        size: pixels of a point's image.

    Raises:
        ValueError: limit or size below 2, or a sheet of images wider than the projector shows.

    >>> Projector(limit=40000)
    Traceback (most recent call last):
    ValueError: Projector: 40000 images of 48 pixels make a sheet of 9600; the projector shows up to 8192
    """

    once = True

    def __init__(self, limit: int = 2000, size: int = 48) -> None:
        super().__init__()
        self.limit, self.size = limit, size
        if min(limit, size) < 2:
            raise ValueError(f"Projector: limit {limit} and size {size}: 2 is the least")
        wide = int(np.ceil(limit**0.5)) * size
        if wide > SPRITE:
            raise ValueError(
                f"Projector: {limit} images of {size} pixels make a sheet of {wide}; the projector shows up to {SPRITE}"
            )
        self._points: dict[str, tuple[Tensor, list[tuple[int, str, int]]]] = {}  # set -> z_ND; index, modality, key

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if trainer.loggers and not writers(trainer):  # without any logger, Sanity reports it
            rank_zero_warn("Projector: none of the loggers is a TensorBoardLogger, so nothing will be written")

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
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
        """The last embeddings: a resumed run may reach the end of the fit without another evaluation."""
        return {name: {"z": z_ND, "labels": labels} for name, (z_ND, labels) in self._points.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._points = {
            name: (saved["z"], [(int(index), str(m), int(key)) for index, m, key in saved["labels"]])
            for name, saved in state_dict.items()
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
                writer.add_embedding(
                    z_ND,
                    metadata=[[_line(data, index), m, str(key)] for index, m, key in labels],
                    metadata_header=["sample", "modality", "key"],
                    label_img=torch.from_numpy(self._sprites(data, labels)).permute(0, 3, 1, 2).float() / 255,
                    tag=name,
                    global_step=trainer.global_step,
                )
            if earlier and points:
                _merge(config, earlier)

    def _sprites(self, data: Any, labels: Sequence[tuple[int, str, int]]) -> np.ndarray:
        """uint8 ``[N, size, size, 3]``."""
        lines = [_line(data, index) for index, _, _ in labels]
        images = [_picture(data, index, self.size) for index, _, _ in labels]
        texts = list(dict.fromkeys(line for line, image in zip(lines, images, strict=True) if image is None))
        written = dict(zip(texts, text_tiles(texts, self.size), strict=True))
        sprites = np.stack([written[line] if x is None else x for line, x in zip(lines, images, strict=True)])
        framed_N = np.array([m == "text" for _, m, _ in labels])
        frame_SS1 = np.ones((self.size, self.size, 1), dtype=bool)
        frame_SS1[3:-3, 3:-3] = False
        return np.where(framed_N[:, None, None, None] & frame_SS1, np.array(rgb(BLUE), dtype=np.uint8), sprites)


def _merge(config: Path, earlier: str) -> None:
    """Adds the entries that an earlier process of this run wrote: a SummaryWriter overwrites the list with its own."""
    merged, now = ProjectorConfig(), ProjectorConfig()
    text_format.Parse(earlier, merged)
    text_format.Parse(config.read_text(), now)
    names = {entry.tensor_name for entry in now.embeddings}
    now.embeddings.extend(entry for entry in merged.embeddings if entry.tensor_name not in names)
    config.write_text(text_format.MessageToString(now))


def first_of_each(key_N: Tensor) -> Tensor:
    """Positions of the first row of each key, ascending.

    >>> first_of_each(torch.tensor([7, 3, 7, 3, 5])).tolist()
    [0, 1, 4]
    """
    first: dict[int, int] = {}
    for n, key in enumerate(key_N.tolist()):
        first.setdefault(key, n)
    return torch.tensor(list(first.values()), dtype=torch.long, device=key_N.device)


# drawing -------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A tile of a sheet: an image ``[H, W, 3]`` over its caption, or the caption alone."""

    image: np.ndarray | None
    caption: str
    frame: str  # colour


@styled
def sheet(rows: Sequence[Sequence[Cell]], title: str, note: str) -> Figure:
    """Rows of cells under a header line; the first cell of a row, the query, stands a little apart.

    Raises:
        ValueError: without a row.

    >>> pixels(sheet([[Cell(None, "a caption", GREEN)] * 3] * 2, "title", "note")).shape
    (509, 480, 3)
    """
    if not rows:
        raise ValueError("a sheet needs at least one row")
    side = TILE + 2 * FRAME
    columns, top, split = max(len(cells) for cells in rows), 2 * GAP + HEAD + 9, 2 * GAP
    height, width = top + len(rows) * (side + 3 + ROOM + GAP), columns * (side + GAP) + GAP + split
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    places = [
        (GAP + j * (side + GAP) + (split if j else 0), top + i * (side + 3 + ROOM + GAP), cell)
        for i, cells in enumerate(rows)
        for j, cell in enumerate(cells)
    ]
    for x, y, cell in places:
        canvas[y : y + side, x : x + side] = rgb(cell.frame)
        tile = 255 if cell.image is None else resized(cell.image, TILE)
        canvas[y + FRAME : y + FRAME + TILE, x + FRAME : x + FRAME + TILE] = tile
    figure, axes = page(canvas)
    for x, y, cell in places:
        if cell.image is None:
            _caption(axes, cell.caption, x + side / 2, y + side / 2, TILE, TILE, "center")
        else:
            _caption(axes, cell.caption, x + side / 2, y + side + 3, side, ROOM, "top")
    axes.text(GAP, GAP, title, fontsize=HEAD, va="top")
    if text_width(note, CAPTIONS[-1]) < width - 3 * GAP - text_width(title, HEAD):
        axes.text(width - GAP, GAP + HEAD, note, fontsize=CAPTIONS[-1], color=FAINT, ha="right", va="bottom")
    axes.plot([GAP, width - GAP], [top - 7, top - 7], color=GRID, linewidth=1)
    return figure


def _caption(axes: Any, text: str, x: float, y: float, width: float, height: float, va: str) -> None:
    """A text in the largest size of captions at which it fits and no word is broken; else in the smallest."""
    for size in CAPTIONS:
        most = int(height // (1.2 * size))
        if size > CAPTIONS[-1] and text_width(text, size) > width * most:
            continue  # it cannot fit, and wrapping a long text takes milliseconds
        lines = wrap(text, size, width - 2, most)
        if " ".join(lines) == text:
            break
    axes.text(x, y, "\n".join(lines), fontsize=size, color=INK, ha="center", va=va, linespacing=1.0)


@styled
def text_tiles(texts: Sequence[str], size: int) -> np.ndarray:
    """Each text in a tile of its own: uint8 ``[N, size, size, 3]``.

    >>> text_tiles(["a", "b", "c"], 48).shape
    (3, 48, 48, 3)
    """
    columns = max(int(np.ceil(len(texts) ** 0.5)), 1)
    rows = -(-len(texts) // columns)
    if not texts:
        return np.zeros((0, size, size, 3), dtype=np.uint8)
    figure, axes = page(np.full((rows * size, columns * size, 3), 255, dtype=np.uint8))
    for k, text in enumerate(texts):
        lines = wrap(text, SMALL, size - 4, max(size // (SMALL + 2), 1))
        place = (k % columns + 0.5) * size, (k // columns + 0.5) * size
        axes.text(*place, "\n".join(lines), fontsize=SMALL, ha="center", va="center", linespacing=1.0)
    sheets = pixels(figure).reshape(rows, size, columns, size, 3)
    return sheets.swapaxes(1, 2).reshape(-1, size, size, 3)[: len(texts)]


def _cell(data: Any, index: int, frame: str, pictured: bool) -> Cell:
    return Cell(_picture(data, index) if pictured else None, _line(data, index), frame)


def _picture(data: Any, index: int, size: int | None = None) -> np.ndarray | None:
    """uint8 ``[H, W, 3]``, or ``[size, size, 3]``; None if the data module has none."""
    image = data.picture(index) if isinstance(data, Pictured) else None
    if image is None:
        return None
    image_HW3 = image.permute(1, 2, 0).contiguous().cpu().numpy()
    return image_HW3 if size is None else resized(image_HW3, size, smooth=True)


def _line(data: Any, index: int) -> str:
    text = data.describe(index) if hasattr(data, "describe") else str(index)
    return " ".join(text.split()) or str(index)  # the projector's tables have no tabs and no empty cells
