"""The rows of each figure of the theory: what is measured, on which grammars, at which noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from guided_diffusion import logger
from guided_diffusion.classifier.figures import Rows

import numpy as np

from . import mean_field, theory
from .grammar import Grammar

TIMES = (0.04, 0.06, 0.08, 0.09, 0.10, 0.11, 0.12, 0.13, 0.14, 0.16, 0.18, 0.20)  # k/N of one-hot leaves, v = 32
LOST = 0.12  # when the class is lost there, as `times` measures it
SCAN = tuple(round(0.02 + 0.04 * i, 2) for i in range(25))
LOOP_STEPS = 250
MASKED = (0.05, 0.10, 0.15, 0.20, 0.225, 0.25, 0.275, 0.30, 0.325, 0.35, 0.40, 0.50, 0.60, 0.80)
FIXED_POINTS = [(32, 8, 2), (16, 4, 2), (32, 16, 2), (32, 17, 2), (8, 8, 4), (8, 6, 4), (6, 5, 4), (4, 5, 4), (8, 2, 4)]
MAPS = (32, 2, (8, 20))  # v, s, and an m below and above sf = 1
PHASES = (32, 2, 8, range(2, 25))  # v, s, L and m
# Figure depth: v, m, s, the depths, and where the class is lost: e, and k/N of one-hot leaves
NEAR_CRITICAL = (0.5, 0.6, 0.65, 0.7, 0.72, 0.74, 0.76, 0.8, 0.85, 0.9, 1.0)
TRANSITION = (32, 8, 2, (4, 6, 8, 10), NEAR_CRITICAL, TIMES)
LATE = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7)
NEAR_ONE = (0.8, 0.85, 0.88, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 1.0)
DRIFT = (8, 2, 4, (2, 3, 4, 5, 6), NEAR_ONE, LATE)
IMAGES = ((8, 2, 4, 1), (8, 6, 3, 2))  # figure steps: v, m, L and the side of a patch; s = 4
STEPS = {"ddpm": (250, 100, 50, 25, 12), "ddim": (50, 25, 12), "sde-dpmsolver++": (100, 50, 25, 12)}  # N by sampler
CHAIN, REVERSALS = 250, (100, 125, 138, 150)  # times k of a chain
IMAGES_AT_ONCE = 50


@dataclass
class Work:
    """Measures parts of the data in several threads.

    Attributes:
        pool: threads.
        seed: seed of the data and of all noise.
        num_grammars, num_data, num_samples, num_images: how much is measured; see the flags of theory_figures.py.
        figure: name of the current figure, for the progress bar.
    """

    pool: Executor
    seed: int
    num_grammars: int
    num_data: int
    num_samples: int
    num_images: int
    figure: str = ""
    _changes: dict[Any, np.ndarray] = field(default_factory=dict)

    def measure(self, function: Callable[..., np.ndarray], calls: Iterable[tuple[Any, ...]]) -> list[np.ndarray]:
        """What a function of `theory` returns for each call's arguments, the same for any number of threads."""
        calls = list(calls)
        found = []
        with logger.progress_bar(len(calls), self.figure, "part") as bar:
            for result in self.pool.map(lambda arguments: function(*arguments), calls):
                found.append(result)
                bar.update()
        return found

    def parts(self, grammar: Grammar, share: int = 1) -> list[theory.Part]:
        """A part for each of `num_grammars` / `share` grammars: this one, and those with the seeds that follow."""
        count = max(self.num_grammars // share, min(2, self.num_grammars))
        v, s, depth, m = grammar.num_symbols, grammar.branching, grammar.depth, grammar.num_synonyms
        grammars = (Grammar(v, s, depth, m, grammar.seed + i) for i in range(count))
        return [theory.Part(g, i * self.num_data, self.num_data, self.seed) for i, g in enumerate(grammars)]

    def changes(self, grammar: Grammar, process: str, noises: Sequence[float], share: int) -> np.ndarray:
        """`theory.variances_by_level` of each part, measured once: (grammars, data, noises, L + 1)."""
        key = (grammar, process, noises, share)
        if key not in self._changes:
            calls = [(part, process, noises, self.num_samples) for part in self.parts(grammar, share)]
            self._changes[key] = np.stack(self.measure(theory.variances_by_level, calls))
        return self._changes[key]


def numbers(grammar: Grammar) -> tuple[int, int, int]:
    """v, m and s, the arguments of `mean_field`."""
    return grammar.num_symbols, grammar.num_synonyms, grammar.branching


def epsilons(grammar: Grammar) -> tuple[float, ...]:
    """Noise levels up to 1 in steps of 0.1; with a transition, from e* - 0.35, in steps of 0.02 within 0.1 of e*.

    Without one, the last step is halved until the mean field has lost most of the class, which may be near 1.
    """
    critical = mean_field.critical_noise(*numbers(grammar))
    tenths = [round(0.1 * i, 1) for i in range(1, 11)]
    if critical is not None:
        near = [round(0.02 * (round(critical / 0.02) + i), 2) for i in range(-5, 6)]
        return tuple(sorted(e for e in {*near, *tenths} if max(0.02, critical - 0.35) <= e <= 1))
    near = [tenths[-2]]
    quarter = (1 + 3 / grammar.num_symbols) / 4
    while mean_field.marginals(near[-1], *numbers(grammar), grammar.depth)[-1] > quarter:
        near.append((1 + near[-1]) / 2)
    return tuple(sorted({*tenths, *near}))


def times(work: Work, grammar: Grammar) -> tuple[float, ...]:
    """Times k/N at which one-hot leaves lose the class: `TIMES`, scaled by the mean time that it survives.

    The scale is a multiple of 0.2, so that it hardly depends on the data.
    """
    found = work.measure(theory.marginals, [(part, "gaussian", SCAN) for part in work.parts(grammar, 4)])
    chance = 1 / grammar.num_symbols
    survives = (np.stack(found)[..., -1].mean() - chance) / (1 - chance)
    scale = max(1, round(5 * survives / LOST)) / 5
    return tuple(round(scale * time, 3) for time in TIMES if scale * time <= 1)


def named(grammar: Grammar) -> dict[str, Any]:
    """The columns that name a grammar."""
    return {**dict(zip("vms", numbers(grammar), strict=True)), "depth": grammar.depth}


# Levels


def levels_epsilon(work: Work, grammar: Grammar) -> Rows:
    """The marginal of the true symbol by level against e, exact and mean field."""
    noises = epsilons(grammar)
    theoretical = [mean_field.marginals(e, *numbers(grammar), grammar.depth) for e in noises]
    rows = levels(work, grammar, "epsilon", "epsilon", noises)
    return [{**row, "mean_field": p} for row, p in zip(rows, np.ravel(theoretical).tolist(), strict=True)]


def levels_gaussian(work: Work, grammar: Grammar) -> Rows:
    """The same against k/N, for Gaussian noise on one-hot leaves, and what the loop with the exact denoiser keeps.

    `loop_exact` is the exact posterior of the loop's data, and `loop_error` the standard error of the difference. Where
    all outcomes are equal, it is that of a single outcome per datum with the exact probability, instead of 0.
    """
    noises = times(work, grammar)
    rows = levels(work, grammar, "gaussian", "time", noises)
    parts = work.parts(grammar, 4)
    found = np.stack(work.measure(theory.gaussian_loop, [(part, noises, LOOP_STEPS) for part in parts]))
    exact = np.stack(work.measure(theory.marginals, [(part, "gaussian", noises) for part in parts]))
    (expected, _), (kept, _), (_, errors) = map(theory.mean_and_error, (exact, found, found - exact))
    single = np.sqrt(np.maximum(0, expected * (1 - expected)) / (len(parts) * work.num_data))
    errors = np.where(np.ptp(found, axis=(0, 1)) == 0, single, errors)
    columns = {"loop_exact": expected, "loop": kept, "loop_error": errors}  # (times, L + 1) each
    return [row | {name: float(c.flat[i]) for name, c in columns.items()} for i, row in enumerate(rows)]


def levels_masking(work: Work, grammar: Grammar) -> Rows:
    """The same against the masked fraction of leaves."""
    return levels(work, grammar, "masking", "masked", MASKED)


def levels(work: Work, grammar: Grammar, process: str, column: str, noises: Sequence[float]) -> Rows:
    """A row for each noise and each level."""
    found = work.measure(theory.marginals, [(part, process, noises) for part in work.parts(grammar)])
    exact, error = theory.mean_and_error(np.stack(found))
    return [
        {
            **named(grammar),
            column: noise,
            "level": level,
            "exact": float(exact[i, level]),
            "exact_error": float(error[i, level]),
        }
        for (i, noise), level in product(enumerate(noises), range(grammar.depth + 1))
    ]


# Mean field alone


def cobweb(work: Work, grammar: Grammar) -> Rows:
    """F(p), below and above sf = 1."""
    v, s, synonyms = MAPS
    points = np.linspace(0, 1, 201).tolist()
    return [{"m": m, "p": p, "F": mean_field.upward(p, v, m, s)} for m, p in product(synonyms, points)]


def fixed_points() -> Rows:
    """What the mean field says of some grammars; None where undefined."""
    rows = []
    for v, m, s in FIXED_POINTS:
        p = mean_field.critical_belief(v, m, s)
        rows.append(
            {
                "v": v,
                "m": m,
                "s": s,
                "slope_at_one": mean_field.slope_at_one(v, m, s),
                "slope_at_chance": mean_field.slope_at_chance(v, m, s),
                "p_star": p,
                "epsilon_star": mean_field.critical_noise(v, m, s),
                "slope_at_p_star": None if p is None else mean_field.slope(p, v, m, s),
                "nu": mean_field.correlation_exponent(v, m, s),
            }
        )
    return rows


# The class


def phase_diagram(work: Work, grammar: Grammar) -> Rows:
    """Belief in the class in the plane (sf, e), exact and mean field."""
    v, s, depth, synonyms = PHASES
    noises = tuple(round(0.05 * i, 2) for i in range(1, 21))
    calls = [(p, "epsilon", noises) for m in synonyms for p in work.parts(Grammar(v, s, depth, m, grammar.seed), 5)]
    found = np.stack(work.measure(theory.marginals, calls))[..., -1]  # (m grammars, data, e)
    rows = []
    for m, beliefs in zip(synonyms, np.split(found, len(synonyms)), strict=True):
        about = {"v": v, "s": s, "m": m, "sf": mean_field.slope_at_one(v, m, s)}
        exact, error = theory.mean_and_error(beliefs)
        for i, epsilon in enumerate(noises):
            row = {**about, "epsilon": epsilon, "exact": float(exact[i]), "exact_error": float(error[i])}
            rows.append({**row, "mean_field": mean_field.marginals(epsilon, v, m, s, depth)[-1]})
    return rows


def depth(work: Work, grammar: Grammar) -> Rows:
    """The class against noise in trees of several depths, for a grammar with a transition and for one without."""
    rows = []
    for process in ("epsilon", "gaussian"):
        for v, m, s, depths, of_epsilon, of_time in (TRANSITION, DRIFT):
            noises = of_epsilon if process == "epsilon" else of_time
            grammars = [Grammar(v, s, levels, m, grammar.seed) for levels in depths]
            calls = [(part, process, noises) for g in grammars for part in work.parts(g)]
            found = np.stack([kept[..., -1] for kept in work.measure(theory.marginals, calls)])
            for levels, kept in zip(depths, np.split(found, len(depths)), strict=True):
                exact, error = theory.mean_and_error(kept)
                about = {"process": process, "v": v, "m": m, "s": s, "depth": levels}
                rows += [
                    {**about, "noise": noise, "exact": float(exact[i]), "exact_error": float(error[i])}
                    for i, noise in enumerate(noises)
                ]
    return rows


# Changes


def correlations(work: Work, grammar: Grammar) -> Rows:
    """C(r)/C(0) for each e and each level h of the common ancestor, r = s^h - 1."""
    noises = epsilons(grammar)
    variances = work.changes(grammar, "epsilon", noises, 1)
    rows = []
    for i, epsilon in enumerate(noises):
        exact, error = theory.correlation_by_level(variances[:, :, i], grammar.branching)
        theoretical = mean_field.correlations(epsilon, *numbers(grammar), grammar.depth)
        rows += [
            {
                **named(grammar),
                "epsilon": epsilon,
                "level_of_ancestor": h,
                "r": grammar.branching**h - 1,
                "exact": defined(exact[h]),
                "exact_error": defined(error[h]),
                "mean_field": theoretical[h] / theoretical[0],
            }
            for h in range(grammar.depth + 1)
        ]
    return rows


def susceptibility(work: Work, grammar: Grammar) -> Rows:
    """chi for each e and each masked fraction."""
    rows = []
    for process, noises, share in (("epsilon", epsilons(grammar), 1), ("masking", MASKED, 4)):
        exact, error = theory.susceptibility(work.changes(grammar, process, noises, share))
        for i, noise in enumerate(noises):
            chi = None
            if process == "epsilon":
                chi = mean_field.susceptibility(noise, *numbers(grammar), grammar.depth)
            found = {"exact": defined(exact[i]), "exact_error": defined(error[i]), "mean_field": chi}
            rows.append({"process": process, **named(grammar), "noise": noise, **found})
    return rows


def defined(value: float) -> float | None:
    """The number, or None for NaN: what correlates changes is undefined where nothing changes."""
    return None if np.isnan(value) else float(value)


# Steps


def steps(work: Work, grammar: Grammar) -> Rows:
    """What N steps of each sampler keep of the class and the leaves, minus exact, always from the same x_k."""
    rows = []
    for v, m, levels, patch in IMAGES:
        parts = image_parts(work, Grammar(v, 4, levels, m, grammar.seed))
        chains = [(sampler, count, k) for sampler, counts in STEPS.items() for count, k in product(counts, REVERSALS)]
        calls = [(part, patch, k, CHAIN, count, sampler) for sampler, count, k in chains for part in parts]
        found = np.split(np.concatenate(work.measure(theory.image_loop, calls)), len(chains))  # (images, 2, L + 1) each
        for (sampler, count, k), kept in zip(chains, found, strict=True):
            differences, errors = theory.mean_and_error((kept[:, 0] - kept[:, 1])[None])
            loop, exact = kept.mean(axis=0).tolist()
            about = {"sampler": sampler, "v": v, "m": m, "s": 4, "depth": levels, "steps": count, "time": k / CHAIN}
            rows += [
                {
                    **about,
                    "level": level,
                    "loop": loop[level],
                    "exact": exact[level],
                    "difference": float(differences[level]),
                    "difference_error": float(errors[level]),
                }
                for level in (0, levels)
            ]
    return rows


def image_parts(work: Work, grammar: Grammar) -> list[theory.Part]:
    """The images of one grammar, a few in each part."""
    starts = range(0, work.num_images, IMAGES_AT_ONCE)
    return [theory.Part(grammar, i, min(IMAGES_AT_ONCE, work.num_images - i), work.seed) for i in starts]
