"""Style of every figure: one set of matplotlib settings, colour-blind-safe colours, sizes in pixels.

matplotlib is imported inside functions, since most runs draw nothing; pyplot and its global state are never used.
"""

from __future__ import annotations

import functools
import textwrap
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

DPI = 72  # so that a point, the unit of font sizes and line widths, is a pixel
FONT = "DejaVu Sans"  # comes with matplotlib, so a figure is the same on every machine
SMALL, TEXT, TITLE = 12, 14, 18  # pixels
INK, FAINT, GRID, PAPER = "#222222", "#6e6e6e", "#dddddd", "#ffffff"
#: Okabe and Ito's colours, which differ for readers with any kind of colour blindness.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILLION, YELLOW = "#56B4E9", "#D55E00", "#F0E442"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)

RC: dict[str, Any] = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.facecolor": PAPER,
    "font.family": FONT,
    "font.size": TEXT,
    "text.color": INK,
    "text.parse_math": False,  # captions may hold dollar signs
    "axes.titlesize": TEXT,
    "axes.titlelocation": "left",
    "axes.labelsize": SMALL,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def with_style(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorate a drawing function to run under :data:`RC`, whatever settings the process has."""

    @functools.wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib.style

        with matplotlib.style.context(["default", RC]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+")  # a letter that the font lacks is an empty box
            return draw(*args, **kwargs)

    return run


def figure(width: float, height: float) -> Figure:
    """Create an empty figure of this size in pixels, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=((width + 0.01) / DPI, (height + 0.01) / DPI), dpi=DPI)  # sizes are truncated to whole pixels
    FigureCanvasAgg(made)
    return made


def page(image_HW3: np.ndarray) -> tuple[Figure, Axes]:
    """Create a figure that shows an image pixel by pixel, and axes in pixels from the upper left corner to write on it.

    >>> made, axes = page(np.full((20, 30, 3), 7, dtype=np.uint8))
    >>> image_HW3 = pixels(made)
    >>> image_HW3.shape, int(image_HW3.max())
    ((20, 30, 3), 7)
    """
    from matplotlib.transforms import IdentityTransform

    height, width = image_HW3.shape[:2]
    made = figure(width, height)
    rgba_HW4 = np.dstack([image_HW3, np.full((height, width), 255, dtype=np.uint8)])[::-1]
    background: Any = made.figimage(image_HW3, zorder=-1)
    # its pixels are final: resampling them would take most of the time of a figure
    background.make_image = lambda *_, **__: (rgba_HW4, 0, 0, IdentityTransform())
    axes = made.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return made, axes


@with_style
def pixels(made: Figure) -> np.ndarray:
    """Draw the figure into uint8 ``[H, W, 3]``, and empty it.

    The parts of a figure refer to each other. Python would keep their pixels, 10 MB per figure, until its next full
    garbage collection, which comes after a hundred figures if a model's objects are in memory.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    made.canvas.draw()
    image_HW3 = np.asarray(made.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    for background in list(made.images):
        background.remove()  # clear() leaves each background in a reference cycle with the list of all
    made.clear()
    FigureCanvasAgg(made)
    return image_HW3


def resize_image(image_HW3: np.ndarray, side: int, smooth: bool = False) -> np.ndarray:
    """Resize to uint8 ``[side, side, 3]``; images of at most 32 pixels show their pixels, others are smooth."""
    nearest = max(image_HW3.shape) <= 32 and not smooth
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image_HW3).resize((side, side), how))


def rgb(colour: str) -> tuple[int, int, int]:
    """Return the three bytes of ``#rrggbb``.

    >>> rgb(VERMILLION)
    (213, 94, 0)
    """
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


@functools.lru_cache(4096)
def text_width(text: str, size: int) -> float:
    """Return the pixels that a line of text takes at most."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(FONT))
    font.set_size(size, DPI)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")
        font.set_text(text, 0.0)
    return float(font.get_width_height()[0]) / 64


def wrap(text: str, size: int, width: float, lines: int) -> list[str]:
    """Wrap ``text`` in at most ``lines`` lines of ``width`` pixels, with an ellipsis where it is cut.

    >>> wrap("a rather long caption", 12, 90, 2), wrap("a rather long caption", 12, 70, 1)
    (['a rather long', 'caption'], ['a rather...'])
    """
    for columns in range(max(int(3 * width / size), 4), 3, -1):
        wrapped = textwrap.wrap(text, columns) or [text]
        if all(text_width(line, size) <= width for line in wrapped[:lines]):
            break
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: max(columns - 3, 1)].rstrip() + "..."]
    return wrapped
