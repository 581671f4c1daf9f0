"""Statistics of changes, accumulated sample by sample: C(r), chi, the correlation length and power spectra.

Source: Sclocchi, Favero, Levi and Wyart, J. Stat. Mech. 084005 (2025), arXiv:2410.13770; see `correlations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..correlations import (
    Pairs,
    bootstrap,
    check_changes,
    chi_of,
    correlation_length,
    grouped,
    relative_correlation,
)
from ..errors import UserError


class StartStatistics(NamedTuple):
    """Statistics of one start; unbiased, NaN with fewer than two samples.

    Attributes:
        samples: M, number of samples.
        chi_numerator: sum_ij C_ij over all pairs of tokens.
        chi_denominator: sum_i C_ii.
        correlation: C(r), (R,).
        change_map: mean change of each token, (n,).
    """

    samples: int
    chi_numerator: float
    chi_denominator: float
    correlation: np.ndarray
    change_map: np.ndarray


class ChangeSums:
    """Sums over the samples of one start, from which its statistics follow; memory does not grow with the samples.

    The first sample is subtracted from all, so that precision is not lost if the mean change is large compared with its
    fluctuations, and a start that always changes in the same way has exactly no fluctuations.

    Args:
        pairs: pairs of tokens.
    """

    def __init__(self, pairs: Pairs):
        self._pairs = pairs
        self.samples = 0
        self._shift = np.zeros(pairs.tokens)
        self._sum = np.zeros(pairs.tokens)
        self._squares = 0.0  # over samples and tokens
        self._squared_totals = 0.0  # over samples, of the sum over tokens
        self._products: np.ndarray | float = 0.0

    def add(self, changes: np.ndarray) -> None:
        """Add the changes of more samples, (samples, n)."""
        changes = np.asarray(changes, np.float64)
        if changes.ndim != 2 or changes.shape[1] != self._pairs.tokens:
            raise UserError(f"changes of shape {changes.shape}: expected (samples, {self._pairs.tokens})")
        if not len(changes):
            return
        if self.samples == 0:
            self._shift = changes[0].copy()
        shifted = changes - self._shift
        self.samples += len(changes)
        self._sum += shifted.sum(axis=0)
        self._squares += float(np.square(shifted).sum())
        self._squared_totals += float(np.square(shifted.sum(axis=1)).sum())
        self._products = self._products + self._pairs.products(shifted)

    def statistics(self) -> StartStatistics:
        """The statistics of all samples so far."""
        m, pairs = self.samples, self._pairs
        if m < 2:
            undefined = np.full(len(pairs.distance), np.nan)
            return StartStatistics(m, np.nan, np.nan, undefined, np.full(pairs.tokens, np.nan))
        own = self._squares - np.square(self._sum).sum() / m
        all_pairs = self._squared_totals - self._sum.sum() ** 2 / m
        products = self._products - pairs.products(self._sum[None]) / m
        numerator, denominator = (max(0.0, float(squares)) / (m - 1) for squares in (all_pairs, own))
        correlation = pairs.mean(products) / (m - 1)
        return StartStatistics(m, numerator, denominator, correlation, self._shift + self._sum / m)


class Spectrum:
    """Radial power spectra of features on a grid.

    The power of a mode k is |sum_x f(x) exp(-2 pi i k.x)|^2 / n, averaged over channels, so that its mean over modes is
    the mean square. Wave numbers are cycles per longer side of the grid. They are grouped like distances: each its own
    up to 32 x 32 tokens, else in bins one wide.

    Attributes:
        wavenumber: mean |k| of each group, (K,).
        modes: number of modes in each group, (K,).
    """

    def __init__(self, height: int, width: int):
        rows, columns = (np.fft.fftfreq(n) * max(height, width) for n in (height, width))
        squared = np.round(rows[:, None] ** 2 + columns**2, 9)
        self._place, self.wavenumber, self.modes = grouped(squared, np.ones_like(squared), (height, width))
        self._grid = height, width

    def power(self, features: Tensor) -> np.ndarray:
        """The spectra (B, K), float64, of features (B, h, w, channels)."""
        transformed = torch.fft.fft2(features.double(), dim=(1, 2))
        power = transformed.abs().square_().mean(-1).flatten(1).cpu().numpy() / np.prod(self._grid)
        sums = np.stack([np.bincount(self._place, row, len(self.modes)) for row in power])
        return sums / self.modes


@dataclass(frozen=True)
class TimeChanges:
    """The changes of all starts at one time, as in changes_NAME-t_K_N.npz. S starts.

    Attributes:
        step_reverse, num_steps: k and N.
        distance: r, (R,).
        samples: M of each start, (S,).
        chi_numerator: sum_ij C_ij of each start, (S,).
        chi_denominator: sum_i C_ii of each start, (S,).
        correlation: C(r) of each start, (S, R).
        change: mean change of each start, (S,).
        change_map: mean change of each token of a start, (S, h, w) or (S, n); on larger grids than 32 x 32, the means
            of blocks of tokens.
        wavenumber, spectrum_start, spectrum_change: |k| (K,) and power spectra (S, K), if computed.
    """

    step_reverse: int
    num_steps: int
    distance: np.ndarray
    samples: np.ndarray
    chi_numerator: np.ndarray
    chi_denominator: np.ndarray
    correlation: np.ndarray
    change: np.ndarray
    change_map: np.ndarray
    wavenumber: np.ndarray | None = None
    spectrum_start: np.ndarray | None = None
    spectrum_change: np.ndarray | None = None

    @property
    def time(self) -> float:
        """k/N."""
        return self.step_reverse / self.num_steps


def changes_at(step_reverse: int, num_steps: int, changes: np.ndarray, pairs: Pairs) -> TimeChanges:
    """The statistics of changes (starts, samples, tokens) that are in memory. Raises UserError for invalid ones."""
    check_changes(changes)
    found = []
    for of_start in changes:
        sums = ChangeSums(pairs)
        sums.add(of_start)
        found.append(sums.statistics())
    columns = {name: np.array([getattr(one, name) for one in found]) for name in StartStatistics._fields}
    change = columns["change_map"].mean(axis=1)
    return TimeChanges(step_reverse, num_steps, pairs.distance, **columns, change=change)


class Measured(NamedTuple):
    """A statistic and its interval; undefined numbers are NaN or infinite."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def measure_chi(time: TimeChanges, convention: str = "all", **resampling: Any) -> Measured:
    """chi, the ratio of the means of numerator and denominator over starts; arguments of `bootstrap` may follow.

    `convention` "all" sums over all pairs i, j; "half", over i <= j, as the authors' notebook does: (1 + chi) / 2.
    """
    sums = np.stack([time.chi_numerator, time.chi_denominator], axis=1)
    return Measured(*bootstrap(lambda means: chi_of(means[..., 0], means[..., 1], convention), sums, **resampling))


def measure_correlation(time: TimeChanges, **resampling: Any) -> Measured:
    """C(r)/C(0), (R,)."""
    return Measured(*bootstrap(relative_correlation, time.correlation, **resampling))


def measure_length(time: TimeChanges, **resampling: Any) -> Measured:
    """The distance at which C(r) falls to C(0)/e; infinite if it is longer than all distances."""
    return Measured(*bootstrap(lambda means: correlation_length(time.distance, means), time.correlation, **resampling))


def measure_change(time: TimeChanges, **resampling: Any) -> Measured:
    """The mean change of a token."""
    return Measured(*bootstrap(lambda means: means[..., 0], time.change[:, None], **resampling))


def summary(times: Sequence[TimeChanges], convention: str = "all") -> list[dict[str, Any]]:
    """A CSV row per time: mean change, chi and the correlation length, with 95% intervals; "" for undefined numbers."""
    rows = []
    for time in times:
        row = {"k": time.step_reverse, "N": time.num_steps, "k/N": time.time}
        row |= {"starts": len(time.samples), "samples": int(time.samples.sum()), "convention": convention}
        measured = {
            "change": measure_change(time),
            "chi": measure_chi(time, convention),
            "correlation_length": measure_length(time),
        }
        rows.append(row | {column: value for name, m in measured.items() for column, value in columns_of(name, m)})
    return rows


def columns_of(name: str, measured: Measured) -> list[tuple[str, float | str]]:
    """The columns NAME, NAME_low and NAME_high of a number; "" for undefined ones."""
    ends = zip(("", "_low", "_high"), measured, strict=True)
    return [(name + end, float(value) if np.isfinite(value) else "") for end, value in ends]
