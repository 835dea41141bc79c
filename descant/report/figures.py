"""SVG figures of reports and claims: shared matplotlib style, colour-blind safe colours, deterministic output.

matplotlib takes half a second to import, so only functions that draw import it. ``descant.callbacks.plots.style`` gives
the figures of a fit the same look; it cannot be used here, since its package imports torch.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#222222", "#6e6e6e", "#dddddd"
#: Okabe and Ito's colours, which differ for readers with any kind of colour blindness.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY = "#E69F00", "#56B4E9"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "var(--ink)")  # CSS colours of the lines of a page

_DPI = 72  # so that points, the unit of matplotlib, are pixels of the SVG
_RC = {
    "figure.dpi": _DPI,
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollar signs
    "axes.facecolor": "none",
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "path.simplify": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "descant",
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@contextmanager
def style() -> Iterator[None]:
    """Apply the settings for creating a figure within the context, whatever the process has set for itself."""
    import matplotlib.style

    with matplotlib.style.context(["default", _RC]):
        yield


def figure(width: float, height: float, **options: Any) -> Figure:
    """Create an empty figure of ``width`` times ``height`` pixels, without pyplot and its global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _DPI, height / _DPI), **options)


def to_svg(made: Figure, marks: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Convert a figure to one deterministic ``<svg>`` element that a page with a strict content policy may hold.

    Styles become attributes, since the policy forbids ``style=""`` and a page's CSS overrides attributes. Ids and
    clipping are removed, and coordinates have two decimals.

    Args:
        marks: ``gid`` of an artist -> attributes of its element; ``title`` becomes a tooltip.

    >>> with style():
    ...     made = figure(30, 20)
    ...     line = made.add_axes((0, 0, 1, 1)).plot([0, 1], [0, 1], gid="curve")
    ...     text = to_svg(made, {"curve": {"class": "mean", "title": "a < b"}})
    >>> 'class="mean"' in text, "<title>a &lt; b</title>" in text, "style=" in text
    (True, True, False)
    """
    out = io.BytesIO()
    with style():
        made.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(out.getvalue())
    used = {one.get(f"{{{_XLINK}}}href", "")[1:] for one in root.iter(f"{{{_SVG}}}use")}
    for parent in reversed(list(root.iter())):  # inner ones first: groups that they leave empty go too
        for child in list(parent):
            tag = child.tag.removeprefix(f"{{{_SVG}}}")
            if tag in ("style", "clipPath") or (tag in ("g", "defs") and not len(child)):
                parent.remove(child)
    for element in root.iter():
        element.text, element.tail = (element.text or "").strip(), "\n" if element.tag == f"{{{_SVG}}}g" else None
        _style_to_attributes(element.attrib)
        name = element.get("id", "")
        if name not in used:
            element.attrib.pop("id", None)
        path = element.find(f"{{{_SVG}}}path")
        for key, value in (marks or {}).get(name, {}).items():
            if key == "title":
                ElementTree.SubElement(element if path is None else path, f"{{{_SVG}}}title").text = value
            else:
                (element if path is None else path).set(key, value)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("font-family", "sans-serif")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _style_to_attributes(attributes: dict[str, str]) -> None:
    attributes.pop("clip-path", None)
    for rule in filter(None, attributes.pop("style", "").split(";")):
        key, value = (part.strip() for part in rule.split(":", 1))
        if key == "font":  # the shorthand of matplotlib before 3.11, which is not an attribute
            attributes["font-size"] = re.findall(r"[\d.]+px", value)[0]
        elif key != "font-family":
            attributes[key] = value
    for key in {"d", "x", "y", "transform"} & attributes.keys():
        rounded = re.sub(
            r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), attributes[key]
        )
        attributes[key] = re.sub(r"\s*([A-Za-z])\s+", r"\1", rounded).strip() if key == "d" else rounded
