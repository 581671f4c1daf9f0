"""Figures of the theory, each drawn from the rows of its CSV: exact inference as points with standard errors, the mean
field as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from guided_diffusion.classifier.figures import (
    BLUE,
    CHANCE,
    COLUMN,
    PAGE,
    TIME_LABEL,
    VERMILION,
    Rows,
    add_shades_bar,
    columns,
    early_to_late,
    new_figure,
    shades,
    two_sided,
)

import numpy as np

from . import mean_field
from .grammar import Grammar
from .theory_tables import MAPS, PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "epsilon": r"noise $\epsilon$",
    "time": TIME_LABEL,
    "gaussian": TIME_LABEL + ", one-hot leaves",
    "masked": "masked fraction of leaves",
    "masking": "masked fraction of leaves",
}
POINTS: dict[str, Any] = {"linestyle": "none", "elinewidth": 0.6, "capsize": 1.2}
CRITICAL: dict[str, Any] = {"color": "0.45", "linestyle": "--", "linewidth": 0.8}
SQUARES: dict[str, Any] = {"marker": "s", "markersize": 3, "markerfacecolor": "none"}
EXACT: tuple[str, dict[str, Any]] = ("exact", {"marker": "o", "linestyle": "none"})  # labels and looks, for `legend`
MEAN_FIELD: tuple[str, dict[str, Any]] = ("mean field", {"linewidth": 0.8})
AT_CRITICAL = (r"$\epsilon^*$", CRITICAL)
BY_CLASS = ("$1/v$", CHANCE)  # chance for the class; below, symbols are not equally frequent


def values(rows: Rows, name: str) -> list[Any]:
    """The different values of a column, in their order."""
    return list(dict.fromkeys(row[name] for row in rows))


def legend(axes: Axes, looks: Sequence[tuple[str, dict[str, Any]]], **options: Any) -> None:
    """A legend of looks, (label, properties of a line) each, whatever is drawn."""
    handles = [axes.plot([], [], **{"color": "0.2", **look, "label": label})[0] for label, look in looks]
    axes.legend(handles=handles, **options)


def name(v: int, m: int, s: int, depth: int | None = None) -> str:
    """The numbers of a grammar, as in the paper."""
    return f"$v={v}$, $m={m}$, $s={s}$" + (f", $L={depth}$" if depth else "")


def title(grammar: Grammar) -> str:
    """The numbers of the grammar and its depth."""
    return name(grammar.num_symbols, grammar.num_synonyms, grammar.branching, grammar.depth)


# Levels


def levels(rows: Rows, grammar: Grammar) -> Figure:
    """The marginal of the true symbol at each level, against noise."""
    noise = next(name for name in ("epsilon", "time", "masked") if name in rows[0])
    has_loop = "loop" in rows[0]
    figure, (panels,) = new_figure(PAGE if has_loop else COLUMN * 1.25, 2.7, columns=2 if has_loop else 1)
    joined = {} if noise == "epsilon" else {"linestyle": "-", "linewidth": 0.6}  # there is no mean field to compare to
    for level, colour in enumerate(shades(grammar.depth + 1)):
        x, exact, error = columns(rows, noise, "exact", "exact_error", level=level)
        look = {**POINTS, "marker": "o", "markersize": 2, "color": colour, **joined}
        panels[0].errorbar(x, exact, error, zorder=3, **look)
        if has_loop:
            loop_exact, loop, loop_error = columns(rows, "loop_exact", "loop", "loop_error", level=level)
            panels[1].plot(x, loop_exact, color=colour, linewidth=0.6)
            panels[1].errorbar(x, loop, loop_error, zorder=4, color=colour, **POINTS, **SQUARES)
    for axes in panels:
        axes.axhline(1 / grammar.num_symbols, zorder=1, **CHANCE)
        axes.set(xlabel=LABELS[noise], ylim=(-0.03, 1.03))
    panels[0].set_ylabel("probability of the true symbol")
    if noise == "epsilon":
        mean_field_levels(panels[0], grammar, x)
    else:
        legend(panels[0], [(EXACT[0], {"marker": "o", "markersize": 2, **joined}), BY_CLASS])
    if has_loop:
        panels[0].set_title("exact posterior", fontsize=8)
        panels[1].set_title("samples of the loop with the exact denoiser", fontsize=8)
        looks = [(EXACT[0], {"linewidth": 0.6}), ("loop", {**SQUARES, "linestyle": "none"})]
        legend(panels[1], looks)
    between = [str(level) if grammar.depth <= 12 or level % 5 == 0 else "" for level in range(1, grammar.depth)]
    add_shades_bar(figure, panels, ["leaves", *between, "class"], "level")
    figure.suptitle(title(grammar), fontsize=8)
    return figure


def mean_field_levels(axes: Axes, grammar: Grammar, x: np.ndarray) -> None:
    """Add the mean field's marginals and e*."""
    numbers = grammar.num_symbols, grammar.num_synonyms, grammar.branching
    fine = np.union1d(np.linspace(x.min(), x.max(), 400), x)  # the class may fall within one step near 1
    found = np.array([mean_field.marginals(e, *numbers, grammar.depth) for e in fine])  # (e, L + 1)
    for level, colour in enumerate(shades(grammar.depth + 1)):
        axes.plot(fine, found[:, level], color=colour, linewidth=0.8, zorder=2)
    looks = [EXACT, MEAN_FIELD]
    critical = mean_field.critical_noise(*numbers)
    if critical is not None:
        axes.axvline(critical, zorder=1, **CRITICAL)
        looks.append(AT_CRITICAL)
    legend(axes, [*looks, BY_CLASS])


# The map

STARTS = ((0.45, BLUE), (0.22, VERMILION))  # beliefs on both sides of p*
FIXED: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "black", "markersize": 4.5}


def cobweb(rows: Rows, grammar: Grammar) -> Figure:
    """F(p) with its fixed points, and the orbits of two beliefs, in a panel for each m."""
    v, s, _ = MAPS
    synonyms = values(rows, "m")
    figure, (panels,) = new_figure(PAGE * 0.72, 2.8, columns=len(synonyms))
    for m, axes in zip(synonyms, panels, strict=True):
        p, mapped = columns(rows, "p", "F", m=m)
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.6)
        axes.plot(p, mapped, color="black", linewidth=1.2)
        for start, colour in STARTS:
            axes.plot(*orbit(start, v, m, s), color=colour, linewidth=0.7)
            axes.plot(start, 0, marker="^", color=colour, markersize=4, clip_on=False)
        middle = mean_field.critical_belief(v, m, s)
        ends = ((1 / v, mean_field.slope_at_chance(v, m, s)), (1.0, mean_field.slope_at_one(v, m, s)))
        for point, slope in (*ends, *([] if middle is None else [(middle, 2.0)])):
            face = "black" if slope < 1 else "white"
            axes.plot(point, point, **FIXED, markerfacecolor=face, zorder=4, clip_on=False)
        if middle is not None:
            axes.annotate("$p^*$", (middle, middle), (4, -9), textcoords="offset points", fontsize=8)
        sf = mean_field.slope_at_one(v, m, s)
        kind = "$sf < 1$: weak noise dies out" if sf < 1 else "$sf > 1$: weak noise grows"
        axes.set_title(f"{name(v, m, s)}\n{kind}", fontsize=8)
        axes.set(xlabel="belief $p$ in the children", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panels[0].set_ylabel("belief $F(p)$ in the parent")
    looks = [
        ("$F(p)$", {"color": "black", "linewidth": 1.2}),
        ("attracting fixed point", {**FIXED, "markerfacecolor": "black"}),
        ("repelling fixed point", {**FIXED, "markerfacecolor": "white"}),
    ]
    orbits = [(f"orbit from $p={p}$", {"color": c, "marker": "^", "linewidth": 0.7}) for p, c in STARTS]
    legend(panels[0], orbits, loc="upper left", bbox_to_anchor=(0, 1.02))
    legend(panels[-1], looks, loc="upper left", bbox_to_anchor=(0, 1.02))
    return figure


def orbit(p: float, v: int, m: int, s: int, steps: int = 40) -> tuple[list[float], list[float]]:
    """The corners of the cobweb that starts at p."""
    x, y = [p], [0.0]
    for _ in range(steps):
        following = mean_field.upward(p, v, m, s)
        x, y, p = [*x, p, following], [*y, following, following], following
    return x, y


# The class


def phase_diagram(rows: Rows, grammar: Grammar) -> Figure:
    """Belief in the class in the plane (sf, e), exact and mean field, with the line e*(sf)."""
    v, s = rows[0]["v"], rows[0]["s"]
    sf, epsilon = np.array(values(rows, "sf")), np.array(values(rows, "epsilon"))
    figure, (panels,) = new_figure(PAGE * 0.85, 2.7, columns=2)
    line = [(mean_field.slope_at_one(v, m, s), mean_field.critical_noise(v, m, s)) for m in range(2, v)]
    line = [*((x, e) for x, e in line if e is not None), (1.0, 0.0)]
    for axes, column in zip(panels, ("exact", "mean_field"), strict=True):
        belief = columns(rows, column)[0].reshape(len(sf), len(epsilon))
        mesh = axes.pcolormesh(
            sf, epsilon, belief.T, vmin=0, vmax=1, cmap=early_to_late(), shading="nearest", rasterized=True
        )
        for colour, width in (("black", 2.2), ("white", 1.2)):  # a white line with black edges
            axes.plot(*zip(*line, strict=True), color=colour, linewidth=width)
        axes.axvline(1, color="white", linewidth=0.8, linestyle=":")
        axes.set(ylim=(epsilon.min() - 0.025, 1.025))
        axes.set_title(f"{column.replace('_', ' ')}, $v={v}$, $s={s}$, $L={PHASES[2]}$", fontsize=8)
        here = line[len(line) // 2]
        axes.annotate(r"$\epsilon^*(sf)$", here, (5, 5), textcoords="offset points", color="white", fontsize=8)
    panels[0].set_ylabel(LABELS["epsilon"])
    figure.supxlabel("factor by which weak noise grows from level to level, $sf = F'(1)$", fontsize=8)
    bar = figure.colorbar(mesh, ax=panels, pad=0.02, aspect=25)
    bar.set_label("probability of the true class")
    bar.outline.set_linewidth(0.6)
    return figure


def depth(rows: Rows, grammar: Grammar) -> Figure:
    """The class against noise for trees of several depths: a panel for each process and grammar."""
    processes, grammars = values(rows, "process"), list(dict.fromkeys((row["v"], row["m"], row["s"]) for row in rows))
    figure, panels = new_figure(PAGE * 0.85, 4.4, columns=len(grammars), rows=len(processes))
    for process, line in zip(processes, panels, strict=True):
        for (v, m, s), axes in zip(grammars, line, strict=True):
            own = [row for row in rows if (row["process"], row["v"], row["m"], row["s"]) == (process, v, m, s)]
            depths = values(own, "depth")
            for level, colour in zip(depths, shades(len(depths)), strict=True):
                x, exact, error = columns(own, "noise", "exact", "exact_error", depth=level)
                joined = {"linestyle": "-", "linewidth": 0.6} if process != "epsilon" else {}
                look = {**POINTS, "marker": "o", "markersize": 2.5, "color": colour, **joined}
                axes.errorbar(x, exact, error, **look)
                if process == "epsilon":
                    fine = np.linspace(x.min(), x.max(), 400)
                    belief = [mean_field.marginals(e, v, m, s, level)[-1] for e in fine]
                    axes.plot(fine, belief, color=colour, linewidth=0.8)
            critical = mean_field.critical_noise(v, m, s) if process == "epsilon" else None
            if critical is not None:
                axes.axvline(critical, zorder=1, **CRITICAL)
            axes.axhline(1 / v, zorder=1, **CHANCE)
            axes.set(xlabel=LABELS[process], ylim=(-0.03, 1.03))
            axes.locator_params(axis="x", nbins=6)
            if process == processes[0]:
                kind = "no transition: moves with depth" if critical is None else "transition: sharpens in place"
                axes.set_title(f"{name(v, m, s)}\n{kind}", fontsize=8)
                colours = zip(depths, shades(len(depths)), strict=True)
                looks = [(f"$L={level}$", {"marker": "o", "linestyle": "none", "color": c}) for level, c in colours]
                looks += [MEAN_FIELD, *([] if critical is None else [AT_CRITICAL])]
                legend(axes, looks, loc="lower left", bbox_to_anchor=(0, 0.12))
    for axes in panels[:, 0]:
        axes.set_ylabel("probability of the true class")
    return figure


# Changes


def correlations(rows: Rows, grammar: Grammar) -> Figure:
    """C(r)/C(0) against r for several e, and, where there is a transition, its collapse with xi = |e - e*|^(-nu)."""
    numbers = grammar.num_symbols, grammar.num_synonyms, grammar.branching
    critical = mean_field.critical_noise(*numbers)
    collapses = critical is not None and grammar.depth > 1  # with one level there is one distance
    figure, (panels,) = new_figure(PAGE if collapses else COLUMN * 1.3, 2.8, columns=2 if collapses else 1)
    shown = [e for e in values(rows, "epsilon") if e < 1][::2]
    coloured = list(zip(shown, colours_of(shown, critical), strict=True))
    for epsilon, colour in coloured:
        r, exact, error, theory = columns(rows, "r", "exact", "exact_error", "mean_field", epsilon=epsilon)
        clear = resolved(r, error, theory)
        look = {**POINTS, "marker": "o", "markersize": 2.5, "color": colour}
        panels[0].errorbar(r[clear], exact[clear], error[clear], **look)
        panels[0].plot(r[1:], theory[1:], color=colour, linewidth=0.8)
    panels[0].set(xscale="log", yscale="log", xlabel="distance $r$", ylabel="$C(r) / C(0)$", ylim=(1e-4, 1.2))
    ticks = values(rows, "r")[1 :: 1 + (grammar.depth > 6)]
    panels[0].set_xticks(ticks, [str(r) for r in ticks])
    panels[0].tick_params(which="minor", bottom=False, labelbottom=False)
    looks = [(f"{epsilon:g}", {"color": colour, "linewidth": 1.5}) for epsilon, colour in coloured]
    options = {"title": LABELS["epsilon"], "title_fontsize": 7, "loc": "upper left", "bbox_to_anchor": (1, 1)}
    legend(panels[0], [*looks, *([] if collapses else [EXACT, MEAN_FIELD])], **options)
    if collapses:
        collapse(panels[1], rows, critical, mean_field.correlation_exponent(*numbers))
    figure.suptitle(title(grammar), fontsize=8)
    return figure


def colours_of(noises: Sequence[float], critical: float | None) -> list[Any]:
    """A colour for each noise level: blue below e* and orange above, darker nearer to it; else from dark to light."""
    if critical is None:
        return shades(len(noises))
    below = sum(e < critical for e in noises)
    return two_sided(below, len(noises) - below)


def resolved(r: np.ndarray, error: np.ndarray, theory: np.ndarray) -> np.ndarray:
    """Which points have a standard error below half of what is expected; on a logarithmic axis, others mislead."""
    return (r > 0) & (error < theory / 2)


def collapse(axes: Axes, rows: Rows, critical: float, nu: float) -> None:
    """r^(2 - 2/nu) C(r)/C(0) against r/xi: at e* correlations fall as that power of r, and xi cuts them off elsewhere.

    Influence along an edge of the tree is F'(p*)/s per level at e*, up or down; so C falls by its square per level.
    """
    seen = []  # r / xi of what is above the lower limit
    for sign, colour in ((-1, BLUE), (1, VERMILION)):
        for epsilon in values(rows, "epsilon"):
            if not 0.02 < sign * (epsilon - critical) < 0.1:
                continue
            r, exact, error, theory = columns(rows, "r", "exact", "exact_error", "mean_field", epsilon=epsilon)
            scaled, power = r * abs(epsilon - critical) ** nu, r ** (2 - 2 / nu)
            clear = resolved(r, error, theory)
            look = {**POINTS, "marker": "o", "markersize": 2.5, "color": colour}
            axes.errorbar(scaled[clear], (power * exact)[clear], (power * error)[clear], **look)
            axes.plot(scaled[1:], (power * theory)[1:], color=colour, linewidth=0.6)
            seen += scaled[1:][(power * theory)[1:] > 1e-2].tolist()
    label = rf"$r / \xi$ with $\xi = |\epsilon - \epsilon^*|^{{-\nu}}$, $\nu = {nu:.3g}$"
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=r"$r^{\,2 - 2/\nu}\, C(r) / C(0)$", ylim=(1e-2, 2))
    axes.tick_params(which="minor", labelbottom=False)
    if seen:
        axes.set_xlim(min(seen) / 2, 2 * max(seen))
    sides = [(r"$\epsilon < \epsilon^*$", {"color": BLUE}), (r"$\epsilon > \epsilon^*$", {"color": VERMILION})]
    legend(axes, [*((side, {"linewidth": 1.5, **look}) for side, look in sides), EXACT, MEAN_FIELD], loc="lower left")


def susceptibility(rows: Rows, grammar: Grammar) -> Figure:
    """chi against e, and against the masked fraction."""
    numbers = grammar.num_symbols, grammar.num_synonyms, grammar.branching
    processes = values(rows, "process")
    figure, (panels,) = new_figure(PAGE * 0.8, 2.7, columns=len(processes))
    handles = {}
    for process, axes in zip(processes, panels, strict=True):
        x, exact, error = columns(rows, "noise", "exact", "exact_error", process=process)
        joined = {"linestyle": "-", "linewidth": 0.6} if process != "epsilon" else {}
        look = {**POINTS, "marker": "o", "markersize": 3, "color": BLUE, **joined}
        bars = axes.errorbar(x, exact, error, label="exact", **look)
        handles.setdefault("exact", bars)
        if process == "epsilon":
            fine = np.union1d(np.linspace(x.min(), x.max(), 300), x)
            chi = [mean_field.susceptibility(e, *numbers, grammar.depth) for e in fine]
            handles["mean field"] = axes.plot(fine, chi, color="black", linewidth=0.8, label="mean field")[0]
            critical = mean_field.critical_noise(*numbers)
            if critical is not None:
                handles["critical"] = axes.axvline(critical, zorder=1, label=AT_CRITICAL[0], **CRITICAL)
        handles["one"] = axes.axhline(1, zorder=1, **CHANCE | {"label": "independent changes"})
        margin = 0.05 * (x.max() - x.min())
        axes.set(xlabel=LABELS[process], ylim=(0, 1.05 * axes.get_ylim()[1]))
        axes.set_xlim(x.min() - margin, x.max() + margin)  # also of noises at which chi is undefined
    panels[0].set_ylabel(r"susceptibility $\chi$")
    options = {"title": title(grammar), "title_fontsize": 8, "loc": "outside upper center"}
    figure.legend(handles=list(handles.values()), ncols=len(handles), **options)
    return figure


# Steps


def steps(rows: Rows, grammar: Grammar) -> Figure:
    """What N steps keep, minus exact: a panel for each sampler, and for the class and the leaves of each grammar."""
    grammars = list(dict.fromkeys((row["v"], row["m"], row["s"], row["depth"]) for row in rows))
    lines = [(*about, level, words) for about in grammars for level, words in ((about[-1], "class"), (0, "leaves"))]
    samplers, times = values(rows, "sampler"), values(rows, "time")
    figure, panels = new_figure(PAGE, 1.7 * len(lines), columns=len(samplers), rows=len(lines))
    for (v, m, s, top, level, words), line in zip(lines, panels, strict=True):
        for sampler, axes in zip(samplers, line, strict=True):
            axes.sharey(line[0])
            for i, (time, colour) in enumerate(zip(times, shades(len(times)), strict=True)):
                chosen = {"sampler": sampler, "v": v, "m": m, "depth": top, "level": level, "time": time}
                n, difference, error = columns(rows, "steps", "difference", "difference_error", **chosen)
                beside = n * 1.05 ** (i - (len(times) - 1) / 2)
                look = {**POINTS, "linestyle": "-", "linewidth": 0.7, "marker": "o", "color": colour}
                axes.errorbar(beside, difference, error, label=f"k/N = {time:g}", **look)
            axes.axhline(0, zorder=1, color="0.45", linewidth=0.8)
            axes.set(xscale="log", xlim=(10, 300))
            axes.set_xticks(values(rows, "steps"), [str(n) for n in values(rows, "steps")], minor=False)
            axes.minorticks_off()
        line[0].set_ylabel(f"{words} kept: loop $-$ exact")
        corner = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
        line[-1].annotate(name(v, m, s, top), (1, 1), (-4, -4), fontsize=7, **corner)
    for sampler, axes in zip(samplers, panels[0], strict=True):
        axes.set_title(sampler, fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("steps N of the whole chain")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(times))
    return figure
