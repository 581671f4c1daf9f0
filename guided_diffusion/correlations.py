"""Correlations of changes: which parts of a start change together in its samples.

For one start and M samples of it, sigma_i is the change of token i: +1 or -1 for symbols that have changed or not, a
size for patches of images. With averages over the samples of one start, then over starts,

    C_ij = <sigma_i sigma_j> - <sigma_i><sigma_j>,    chi = sum_ij C_ij / sum_i C_ii.

Source: Sclocchi, Favero, Levi and Wyart, J. Stat. Mech. 084005 (2025), arXiv:2410.13770.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import UserError


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
        distance: of each pair of tokens, (tokens, tokens).

    Returns:
        the distances r that occur, ascending, (R,), and C(r) of each start, (starts, R). C(0) is the mean variance.
    """
    distances, place = np.unique(distance, return_inverse=True)
    place = place.reshape(-1)
    pairs = np.bincount(place)
    sums = np.stack([np.bincount(place, c.reshape(-1), len(distances)) for c in covariance])
    return distances, sums / pairs


def variances(changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sum_ij C_ij and sum_i C_ii of each start, (starts,) each, without the matrix. Raises UserError."""
    check_changes(changes)
    return changes.sum(axis=2).var(axis=1, ddof=1), changes.var(axis=1, ddof=1).sum(axis=1)


def susceptibility(changes: np.ndarray, convention: str = "all") -> float:
    """chi, the number of tokens that change together: 1 if they are independent, their number if they all do as one.

    Args:
        changes: (starts, samples, tokens).
        convention: "all" sums over all pairs i, j; "half", over i <= j, as the authors' notebook does: (1 + chi) / 2.

    Raises UserError for invalid changes, another convention, or if nothing varies.
    """
    return ratio(*variances(changes), convention)


def ratio(all_pairs: np.ndarray, own: np.ndarray, convention: str = "all") -> float:
    """chi, from the sums of each start that `variances` gives."""
    if convention not in ("all", "half"):
        raise UserError(f"convention {convention!r}: expected 'all' or 'half'")
    if own.sum() == 0:
        raise UserError("the susceptibility is undefined: nothing varies among the samples of any start")
    chi = float(all_pairs.sum() / own.sum())
    return chi if convention == "all" else (1 + chi) / 2


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
