"""Draw SVG figures of claims: the seeds of each arm of one claim, and the gains of all claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from descant.claims.claim import BEFORE, Claim
from descant.claims.effect import Effect, Interval
from descant.claims.judge import Runs, column
from descant.report import figures

_COLOURS = {"baseline": figures.FAINT, "method": figures.BLUE, "sham": figures.VERMILLION}
#: Gains are drawn between these limits, in margins; larger ones end at the edge.
_SHOWN = (-8.0, 16.0)


def svg(claim: Claim, runs: Runs) -> str:
    """Draw a claim's metric as SVG: a column per arm, a point per seed, a bar at the mean, a line through each seed.

    The figure has 640 x 300 pixels, and is taller if long names of arms are rotated. Arms without the metric are left
    out.
    """
    name = claim.metric.name
    arms = [a for a in runs if a != BEFORE and all(name in m for m in runs[a].values())]
    seeds = sorted(runs[arms[0]])
    values = [column(claim, runs, arm, name, seeds) for arm in arms]
    longest = max(map(len, arms))
    rotated = 6.2 * longest > 560 / len(arms)  # names would overlap
    tooltips = {}
    bottom = 40 + round(3.6 * longest) * rotated
    with figures.style():
        made = figures.figure(640, 260 + bottom)
        axes = made.add_axes((60 / 640, bottom / (260 + bottom), 560 / 640, 230 / (260 + bottom)))
        axes.set_xlim(-0.5, len(arms) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set_title(f"{name}, {'more' if claim.metric.higher else 'less'} is better", loc="left", fontsize=12)
        axes.set_title("points are seeds, bars are means", loc="right", fontsize=11, color=figures.FAINT)
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if rotated else {"fontsize": 12}
        axes.set_xticks(range(len(arms)), arms, color=figures.INK, **turned)
        for of_seed in zip(*values, strict=True):
            axes.plot(range(len(arms)), of_seed, color="#c4ccd8", linewidth=1, zorder=1)
        for n, arm in enumerate(arms):
            colour = _COLOURS.get(arm, figures.GREEN)
            half = min(0.4, 25 * len(arms) / 640)
            axes.hlines(math.fsum(values[n]) / len(seeds), n - half, n + half, color=colour, linewidth=2)
            for seed, value in zip(seeds, values[n], strict=True):
                gid = f"{n}-{seed}"
                axes.plot([n], [value], "o", color=colour, alpha=0.75, markersize=7, markeredgewidth=0, gid=gid)
                tooltips[gid] = {"title": f"{arm}, seed {seed}: {value:.4g}"}
        return figures.to_svg(made, tooltips)


def overview(families: Mapping[str, Sequence[tuple[str, Effect]]]) -> str:
    """Draw all claims by family as SVG: gains over baseline and over placebo, in margins, with their intervals.

    The axis is linear up to 1 margin and logarithmic beyond; the band marks gains that count as no effect.
    """
    rows: list[tuple[str, Effect | None]] = []
    for family, claims in families.items():
        rows += [(family, None), *claims]
    height = 70 + 19 * len(rows)
    colours = {"over baseline": figures.BLUE, "over placebo": figures.ORANGE}
    tooltips = {}
    with figures.style():
        made = figures.figure(760, height)
        axes = made.add_axes((170 / 760, 40 / height, 450 / 760, (height - 70) / height))
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlim(*_SHOWN)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.axvspan(-1, 1, color=figures.GRID, alpha=0.5, linewidth=0)
        axes.axvline(0, color=figures.FAINT, linewidth=1)
        ticks = (-8, -4, -2, -1, 0, 1, 2, 4, 8, 16)
        axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("gain in margins (the smallest gain that counts), 95 % interval")
        axes.set_yticks(range(len(rows)), ["" if of is None else name for name, of in rows], color=figures.INK)
        for n, (name, of) in enumerate(rows):
            if of is None:
                axes.text(-0.36, n, name, transform=axes.get_yaxis_transform(), weight="bold", va="center")
                continue
            where = axes.get_yaxis_transform()
            axes.text(1.02, n, of.word, transform=where, va="center", color=figures.INK, clip_on=False)
            for shift, (label, interval) in zip((-0.16, 0.16), _both(of).items(), strict=True):
                ends = interval.mean, interval.low, interval.high
                x, low, high = (min(max(value / of.margin, _SHOWN[0]), _SHOWN[1]) for value in ends)
                axes.plot([low, high], [n + shift] * 2, color=colours[label], linewidth=2, alpha=0.6)
                gid = f"{n}-{label.split()[-1]}"
                valid = of.placebo_valid or label == "over baseline"
                face = colours[label] if valid else "white"
                axes.plot([x], [n + shift], "o", color=colours[label], markerfacecolor=face, markersize=6, gid=gid)
                tooltips[gid] = {"title": f"{name}, {label}: {interval}" + ("" if valid else ", placebo not neutral")}
        for label, colour in colours.items():
            axes.plot([], [], "o-", color=colour, markersize=6, label=label)
        axes.plot([], [], "o-", color=colours["over placebo"], markerfacecolor="white", label="placebo not neutral")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.1)
        return figures.to_svg(made, tooltips)


def _both(of: Effect) -> dict[str, Interval]:
    return {"over baseline": of.over_baseline, "over placebo": of.over_placebo}
