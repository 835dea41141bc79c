"""Keys by which emoji are look-alikes: equal codes or names, without gender, colour, size, state and direction."""

from __future__ import annotations

import re

PERSONS = {"1F468", "1F469", "1F9D1"}  # man, woman, person
HAIR = {"1F9B0", "1F9B1", "1F9B2", "1F9B3"}
GENDER_OR_SIDE = {"2640", "2642", "27A1"}  # woman, man, facing right

# Series whose members differ in a detail that a training concept would give away. `.` stands for CLDR's
# typographic apostrophe.
SERIES = (
    (r".*(o.clock|-thirty)", "clock"),
    (r".*\bmoon\b.*", "moon"),
    (r"keycap.*", "keycap"),
    (r".* button \(blood type\)", "blood type"),
    (r"(santa|mrs\.|mx) claus", "claus"),
    (r"prince|princess", "person with crown"),
    (r"(fe)?male sign", "gender sign"),
    (r"heart suit", "heart"),
    (r"busts? in silhouette", "bust"),
    (r"(?:two-hump|spouting|empty) (.*)", r"\1"),
    (r"(camera|nest) with .*", r"\1"),
    (r"(.*) showing .*", r"\1"),
)
SAME_WORD = (
    (r"\b(wo)?m[ae]n\b|\bpeople\b", "person"),
    (r"\bboy\b|\bgirl\b", "child"),
    (r"\bolder\b", "old"),
    (r"\blight blue\b", "blue"),
)
VARIANT_WORD = re.compile(
    "red|orange|yellow|green|blue|purple|brown|black|grey|white|pink|hollow"
    "|small|medium|large|low|high|fast|manual|motorized"
    "|open|closed|raised|lowered|done|not|off|round|face"
    "|up|down|left|right|upwards|downwards|leftwards|rightwards|front|facing|oncoming|next|last|1st|2nd|3rd"
)


def bare(hexcode: str) -> str:
    """Return a code without the variation selector, which sources place differently."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def code_key(hexcode: str) -> str:
    """Return the base of a joined sequence: polar bear joins bear, a runner of any gender joins the runner."""
    silent = {"200D"} | GENDER_OR_SIDE | HAIR
    parts = [part for part in bare(hexcode).split("-") if part not in silent]
    if not parts:  # the gender signs themselves
        return bare(hexcode)
    if parts[0] in PERSONS:  # the part joined to a person is the meaning (a rocket: astronaut), so it stays
        return "-".join(["1F9D1", *parts[1:]])
    return parts[0] if "200D" in hexcode else "-".join(parts)


def name_key(name: str) -> str:
    """Return the English name without gender, colour, size, state and direction."""
    text = name.casefold()
    for pattern, label in SERIES:
        text = re.sub(f"^{pattern}$", label, text)
    for pattern, label in SAME_WORD:
        text = re.sub(pattern, label, text)
    words = re.findall(r"[^\s\-,:]+", text)
    return " ".join(word for word in words if not VARIANT_WORD.fullmatch(word)) or text
