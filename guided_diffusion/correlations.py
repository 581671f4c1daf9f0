"""Correlations of changes: which parts of a start change together in its samples.

For one start and M samples of it, sigma_i is the change of token i: for symbols, +1 if it changed and -1 if not; for
patches of images, the size of the change. With averages over the samples of one start,

    C_ij = <sigma_i sigma_j> - <sigma_i><sigma_j>,    chi = sum_ij C_ij / sum_i C_ii.

Source: Sclocchi, Favero, Levi and Wyart, J. Stat. Mech. 084005 (2025), arXiv:2410.13770.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from .errors import UserError

CONVENTIONS = ("all", "half")  # pairs of tokens that chi sums over: see `susceptibility`
FINEST = 32  # side of the largest grid whose distances are all kept apart
AT_ONCE = 2**22  # numbers transformed together
E_FOLD = 1 / np.e


def check_changes(changes: np.ndarray) -> None:
    """Raise UserError unless there are changes (starts, samples, tokens) of two samples per start or more."""
    if changes.ndim != 3 or changes.shape[1] < 2 or not changes.size:
        raise UserError(
            f"changes of shape {changes.shape}: expected (starts, samples, tokens), with 2 samples or more per start"
        )


def covariances(changes: np.ndarray) -> np.ndarray:
    """C_ij of each start, (starts, tokens, tokens), unbiased: divided by M - 1. Raises UserError."""
    check_changes(changes)
    centred = changes - changes.mean(axis=1, keepdims=True)
    return centred.swapaxes(1, 2) @ centred / (changes.shape[1] - 1)


def correlation_function(covariance: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C(r), the mean covariance of pairs of tokens at distance r.

    Args:
        covariance: (starts, tokens, tokens).
        distance: distance of each pair of tokens, (tokens, tokens).

    Returns:
        the distances r that occur, ascending, (R,), and C(r) of each start, (starts, R). C(0) is the mean variance.
    """
    pairs = TablePairs(distance)
    return pairs.distance, np.stack([pairs.mean(c) for c in covariance])


def variances(changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sum_ij C_ij and sum_i C_ii of each start, (starts,) each, without the matrix. Raises UserError."""
    check_changes(changes)
    return changes.sum(axis=2).var(axis=1, ddof=1), changes.var(axis=1, ddof=1).sum(axis=1)


def susceptibility(changes: np.ndarray, convention: str = "all") -> float:
    """chi, the number of tokens that change together: 1 if they are independent, n if all n tokens change as one.

    Args:
        changes: (starts, samples, tokens).
        convention: "all" sums over all pairs i, j; "half", over i <= j, as the authors' notebook does: (1 + chi) / 2.

    Raises UserError for invalid changes, another convention, or if nothing varies.
    """
    return ratio(*variances(changes), convention)


def ratio(all_pairs: np.ndarray, own: np.ndarray, convention: str = "all") -> float:
    """chi, from the sums of each start that `variances` gives."""
    chi = float(chi_of(all_pairs.sum(), own.sum(), convention))
    if np.isnan(chi):
        raise UserError("the susceptibility is undefined: nothing varies among the samples of any start")
    return chi


def chi_of(numerator: np.ndarray, denominator: np.ndarray, convention: str = "all") -> np.ndarray:
    """chi = sum_ij C_ij / sum_i C_ii, NaN if nothing varies; see `susceptibility` for the convention."""
    if convention not in CONVENTIONS:
        raise UserError(f"convention {convention!r}: expected 'all' or 'half'")
    chi = numerator / np.where(denominator > 0, denominator, np.nan)
    return chi if convention == "all" else (1 + chi) / 2


# Pairs of tokens by distance


class Pairs(Protocol):
    """All ordered pairs of n tokens, each token with itself included, grouped by distance.

    `products` is additive over samples, so C(r) can be accumulated sample by sample.

    Attributes:
        distance: distances r, ascending, (R,); the first is 0.
        count: number of pairs at each distance, (R,).
        tokens: n.
    """

    distance: np.ndarray
    count: np.ndarray
    tokens: int

    def products(self, changes: np.ndarray) -> np.ndarray:
        """The sum over samples of products of changes (samples, n), in the form that `mean` takes."""

    def mean(self, products: np.ndarray) -> np.ndarray:
        """The mean product of a pair at each distance, (R,)."""


class TablePairs:
    """Pairs of tokens with any distance; products are a matrix (n, n). See `Pairs`.

    Args:
        distance: distance of each pair of tokens, (n, n).

    Raises UserError if these cannot be distances, or are all 0.
    """

    def __init__(self, distance: np.ndarray):
        distance = np.asarray(distance)
        if distance.ndim != 2 or distance.shape[0] != distance.shape[1] or not distance.size:
            raise UserError(f"distances of shape {distance.shape}: expected (tokens, tokens)")
        if problem := _problem(distance):
            raise UserError(
                f"{problem}; expected the distance of each pair of tokens: finite,\n"
                "0 from a token to itself, the same in both directions, and not 0 for all pairs"
            )
        self.tokens = len(distance)
        self.distance, place = np.unique(distance, return_inverse=True)
        self._place = place.reshape(-1)
        self.count = np.bincount(self._place)

    def products(self, changes: np.ndarray) -> np.ndarray:
        return changes.T @ changes

    def mean(self, products: np.ndarray) -> np.ndarray:
        return np.bincount(self._place, products.reshape(-1), len(self.count)) / self.count


def _problem(distance: np.ndarray) -> str:
    """Why a square matrix is not one of distances; "" if it is one."""
    if distance.dtype.kind not in "iuf":
        return f"distances of type {distance.dtype}"
    distance = distance.astype(np.float64)
    if not np.isfinite(distance).all():
        return "a distance is NaN or infinite"
    if distance.min() < 0:
        return f"a distance is {distance.min():g}"
    if (own := distance.diagonal().max()) != 0:
        return f"the distance of a token to itself is {own:g}"
    if not np.allclose(distance, distance.T):
        i, j = np.unravel_index(np.argmax(abs(distance - distance.T)), distance.shape)
        there, back = distance[i, j], distance[j, i]
        return f"the distance of tokens {i} and {j} is {there:g}, and that of {j} and {i} is {back:g}"
    return "" if distance.any() else "all distances are 0"


class GridPairs:
    """Pairs of tokens on a grid of h x w, at Euclidean distances in units of the grid. See `Pairs`.

    Products are summed over displacements by FFT, padded so that nothing wraps around: there is never a matrix of all
    pairs. They are a power spectrum, (2h, w + 1). On grids of up to 32 x 32 every distance is kept apart; on larger
    ones, distances are in bins one unit wide, and `distance` is their mean over the pairs of a bin.
    """

    def __init__(self, height: int, width: int):
        self.grid, self.tokens = (height, width), height * width
        self._padded = (2 * height, 2 * width)
        rows, columns = (np.r_[0:side, 1 - side : 0] for side in self.grid)
        self._displacements = np.ix_(rows, columns)
        pairs = np.outer(height - abs(rows), width - abs(columns))
        self._place, self.distance, self.count = grouped(rows[:, None] ** 2 + columns**2, pairs, self.grid)

    def products(self, changes: np.ndarray) -> np.ndarray:
        total = np.zeros((self._padded[0], self._padded[1] // 2 + 1))
        size = max(1, AT_ONCE // (4 * self.tokens))
        for first in range(0, len(changes), size):
            of_samples = changes[first : first + size].reshape(-1, *self.grid)
            spectra = np.fft.rfft2(of_samples, s=self._padded, axes=(1, 2))
            total += (spectra.real**2 + spectra.imag**2).sum(axis=0)
        return total

    def mean(self, products: np.ndarray) -> np.ndarray:
        sums = np.fft.irfft2(products, s=self._padded, axes=(0, 1))[self._displacements]
        return np.bincount(self._place, sums.reshape(-1)) / self.count


def grouped(
    squared: np.ndarray, weights: np.ndarray, grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group lengths on a grid: by value on grids of up to 32 x 32, otherwise in bins one unit wide.

    Args:
        squared: squared lengths, integers.
        weights: number of members of each.
        grid: height and width.

    Returns:
        the group of each length (flattened), the mean length of each group, and its number of members.
    """
    if max(grid) <= FINEST:
        lengths, place = np.unique(squared, return_inverse=True)
        return place.reshape(-1), np.sqrt(lengths), np.bincount(place.reshape(-1), weights.reshape(-1)).astype(np.int64)
    length = np.sqrt(squared)
    _, place = np.unique(np.rint(length), return_inverse=True)
    place = place.reshape(-1)
    members = np.bincount(place, weights.reshape(-1))
    return place, np.bincount(place, (weights * length).reshape(-1)) / members, members.astype(np.int64)


def correlation_length(distance: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """The distance at which C(r) first falls to C(0)/e, interpolated linearly between distances.

    Args:
        distance: r, ascending from 0, (R,).
        correlation: C(r), (..., R).

    Returns:
        (...); infinity if C(r) stays above C(0)/e, NaN if nothing varies.
    """
    relative = relative_correlation(correlation)
    below = relative <= E_FOLD
    after = np.maximum(below.argmax(axis=-1), 1)[..., None]  # C(0)/C(0) = 1 is above
    high, low = (np.take_along_axis(relative, at, axis=-1)[..., 0] for at in (after - 1, after))
    start, end = distance[after[..., 0] - 1], distance[after[..., 0]]
    with np.errstate(invalid="ignore", divide="ignore"):
        length = start + (end - start) * (high - E_FOLD) / (high - low)
    return np.where(np.isnan(relative[..., 0]), np.nan, np.where(below.any(axis=-1), length, np.inf))


def relative_correlation(correlation: np.ndarray) -> np.ndarray:
    """C(r)/C(0) of C(r), (..., R); NaN if nothing varies."""
    own = correlation[..., :1]
    return correlation / np.where(own > 0, own, np.nan)


# Errors


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    per_start: np.ndarray,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of means over starts, and its percentile interval over resampled starts (Efron 1979).

    Args:
        statistic: function of means (..., columns) that returns (...) or (..., values).
        per_start: quantities of each start, (starts, columns).
        resamples: number of resamples.
        confidence: probability that the interval contains the true value.
        seed: seed of the resamples.

    Returns:
        the statistic and both ends of its interval. An end is NaN for a single start, or if the statistic is undefined
        (NaN) in the resample at that quantile.
    """
    starts = len(per_start)
    value = np.asarray(statistic(per_start.mean(axis=0)))
    if starts < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    rng, found = np.random.default_rng(seed), []
    size = max(1, AT_ONCE // starts)
    for first in range(0, resamples, size):
        weights = rng.multinomial(starts, np.full(starts, 1 / starts), size=min(size, resamples - first))
        found.append(statistic(weights @ per_start / starts))
    drawn = np.sort(np.concatenate(found), axis=0)  # NaN last
    tail = (1 - confidence) / 2
    low, high = (drawn[min(resamples - 1, round(q * (resamples - 1)))] for q in (tail, 1 - tail))
    return value, low, high


def jackknife(statistic: Callable[..., np.ndarray | float], *per_start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of quantities per start, and its standard error, by leaving out one start at a time.

    Args:
        statistic: function of arrays (starts, ...).
        per_start: these arrays, of two starts or more.

    Returns:
        the statistic of all starts and its standard error. Raises UserError for a single start.
    """
    count = len(per_start[0])
    if count < 2:
        raise UserError(f"an error needs 2 starts or more, found {count}")
    kept = ~np.eye(count, dtype=bool)
    without = np.array([statistic(*(values[others] for values in per_start)) for others in kept])
    error = np.sqrt((count - 1) * without.var(axis=0))
    return np.asarray(statistic(*per_start)), error
