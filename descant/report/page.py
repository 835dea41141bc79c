"""HTML pages from the jinja2 templates in ``descant/templates/html``: self-contained, with a strict content policy.

A page loads nothing, and its Content-Security-Policy allows only the script and style in it, by their hashes. jinja2
escapes text from runs (names, metrics, settings); only templates, SVG charts and rendered parts are markup.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from descant.report import compare, figures
from descant.report.curves import colour

if TYPE_CHECKING:
    from jinja2 import Environment
_FOLDER = Path(__file__).resolve().parents[1] / "templates" / "html"


def render(template: str, **values: Any) -> str:
    """Fill in a template with ``values``."""
    return _environment().get_template(template).render(palette=figures.CYCLE, **values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=lambda name: not (name or "").endswith(".md"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"sha256": _sha256, "colour": colour, "counted": compare.count_text}
    made.filters |= {"number": compare.number, "difference": compare.difference}
    return made


def _sha256(text: str) -> str:
    """Return the source by which a Content-Security-Policy allows an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
