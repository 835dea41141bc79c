"""The frame of a page that stands alone: its looks, its few lines of script, and a policy that forbids all else."""

from __future__ import annotations

import base64
import hashlib
from html import escape

#: Eight colours that differ in hue and in lightness, for light and for dark paper.
_LIGHT = ("#2563c9", "#d9571e", "#12856b", "#a13bb0", "#a97a00", "#cf2e5b", "#0d87a5", "#5f6672")
_DARK = ("#74a5ff", "#ff9257", "#43c7a4", "#d98be6", "#e0b43c", "#ff7fa0", "#53c6e2", "#a9b1bd")

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2129;--faint:#5f6672;--line:#e3e6eb;--soft:#f5f6f8;LIGHT}
@media(prefers-color-scheme:dark){:root{--paper:#14171c;--ink:#e6e9ee;--faint:#9aa3b0;--line:#2b313a;--soft:#1c2027;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:28px 24px 60px;background:var(--paper);color:var(--ink);
font:14px/1.45 system-ui,sans-serif}
h1{font-size:24px;margin:0}h2{font-size:17px;margin:36px 0 10px}h3{font-size:14px;margin:20px 0 8px}
p,.note{color:var(--faint);margin:4px 0 12px}.wide{overflow-x:auto;margin-bottom:16px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px 5px 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{color:var(--faint);font-weight:500;vertical-align:bottom}
th:first-child,td:first-child,.runs td:nth-child(2),.runs th:nth-child(2),.left td,.left th{text-align:left}
.left td{white-space:normal;overflow-wrap:anywhere}
.left td{vertical-align:top}td small{color:var(--faint)}td b{font-weight:650}
#legend{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:4px;padding:8px 0;background:var(--paper);
max-height:30vh;overflow:auto}
#legend button{font:inherit;color:inherit;background:var(--soft);border:1px solid var(--line);border-radius:14px;
padding:3px 12px 3px 8px;cursor:pointer}
#legend button.off{opacity:.4}
.key{display:inline-block;width:22px;height:10px;margin-right:7px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:14px}
figure{margin:0}.chart{border:1px solid var(--line);border-radius:8px;padding:10px 10px 4px}
figcaption{font-weight:500;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto}svg path{fill:none}
.grid,.axis{stroke:var(--line)}.axis{stroke:var(--faint);stroke-opacity:.6}
.tick{fill:var(--faint);font-size:11px}.mid{text-anchor:middle}.end{text-anchor:end}
.mean{stroke-width:2;stroke-linejoin:round}.seed{stroke-width:1;stroke-opacity:.38}
.mean,.seed,.key path{stroke:currentColor}.key path{stroke-width:3}
.d1{stroke-dasharray:7 3}.d2{stroke-dasharray:3 3}.d3{stroke-dasharray:9 3 2 3}
.off path,path.off{display:none}.cursor{stroke:var(--faint);stroke-dasharray:2 2;visibility:hidden}
#tip{position:fixed;z-index:2;pointer-events:none;background:var(--paper);border:1px solid var(--line);
border-radius:6px;box-shadow:0 3px 14px #0003;padding:6px 10px;font-size:12px;white-space:nowrap;
font-variant-numeric:tabular-nums}
#tip span{display:inline-block;min-width:64px;font-weight:600}
.pictures{display:flex;flex-wrap:wrap;gap:14px}.pictures figure{width:386px}
.pictures img{width:100%;height:auto;display:block;border-radius:4px;cursor:zoom-in}
.pictures figcaption{font-weight:400;font-size:12px;color:var(--faint);margin-bottom:4px}
.pictures .large{width:100%}.pictures .large img{width:auto;max-width:100%;cursor:zoom-out}
summary{cursor:pointer;color:var(--faint);margin:10px 0}
pre{background:var(--soft);border-radius:8px;padding:12px;overflow:auto;max-height:520px;font-size:12px}
COLOURS"""

#: Values below the pointer, groups that are shown or not, and pictures that grow. What it writes is text, never markup.
_SCRIPT = """
const tip = document.getElementById("tip"), keys = [...document.querySelectorAll("#legend button")];
const number = v => Math.abs(v) >= 1e6 || (v && Math.abs(v) < 1e-3) ? v.toExponential(3) : String(+v.toPrecision(4));
for (const key of keys) key.onclick = () => {
  const off = key.classList.toggle("off");
  for (const path of document.querySelectorAll(`svg [data-g="${key.dataset.g}"]`)) path.classList.toggle("off", off);
};
for (const svg of document.querySelectorAll(".chart svg")) {
  const [x0, kx, y0, ky] = ["x0", "kx", "y0", "ky"].map(name => +svg.dataset[name]);
  const cursor = svg.querySelector(".cursor"), [left, bottom] = [LEFT, BOTTOM];
  const lines = [...svg.querySelectorAll(".mean")].map(path => ({path, key: keys[path.dataset.g],
    points: path.getAttribute("d").slice(1).split("L").map(pair => pair.split(",").map(Number))}));
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), scale = WIDTH / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const shown = lines.filter(({path}) => !path.classList.contains("off")).map(({key, points}) => ({key,
      at: points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)}));
    if (!shown.length) return;
    const near = shown.reduce((a, b) => Math.abs(b.at[0] - x) < Math.abs(a.at[0] - x) ? b : a).at[0];
    cursor.setAttribute("transform", `translate(${near})`);
    cursor.style.visibility = "visible";
    tip.replaceChildren(`step ${Math.round((near - left) / kx + x0).toLocaleString("en")}`);
    const rows = shown.filter(({at}) => Math.abs(at[0] - near) <= 6)
      .sort((a, b) => Math.abs(a.at[1] - y) - Math.abs(b.at[1] - y)).slice(0, 12).sort((a, b) => a.at[1] - b.at[1]);
    for (const {key, at} of rows) {
      const row = document.createElement("div"), value = document.createElement("span");
      value.textContent = number((bottom - at[1]) / ky + y0);
      row.append(key.querySelector("svg").cloneNode(true), value, key.textContent);
      tip.append(row);
    }
    tip.hidden = false;
    const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
    tip.style.left = `${Math.max(0, right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16)}px`;
    tip.style.top = `${Math.max(0, Math.min(event.clientY + 12, innerHeight - tip.offsetHeight))}px`;
  };
  svg.onpointerleave = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
}
for (const image of document.querySelectorAll(".pictures img"))
  image.onclick = () => image.closest("figure").classList.toggle("large");
"""


def page(title: str, body: str, width: int, left: int, bottom: int) -> str:
    """A whole page. Its policy lets it load nothing, and run and apply nothing but the script and style that are here.

    Args:
        title: plain text. body: HTML, in which all text is escaped.
        width, left, bottom: of a chart, and where its axes stand in it.
    """
    script = _SCRIPT.replace("LEFT", str(left)).replace("BOTTOM", str(bottom)).replace("WIDTH", str(width))
    colours = "".join(f".c{n}{{color:var(--c{n})}}" for n in range(len(_LIGHT)))
    light, dark = (";".join(f"--c{n}:{colour}" for n, colour in enumerate(some)) for some in (_LIGHT, _DARK))
    style = _STYLE.replace("LIGHT", light).replace("DARK", dark).replace("COLOURS", colours)
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="generator" content="descant">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>\n{body}\n"
        f'<div id="tip" hidden></div>\n<script>{script}</script>\n</body></html>\n'
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
