"""The statistics behind the figures: what is left of an image, and of its class, after the way forward and back.

Pure numpy. Errors of a mode or of the transition come from the bootstrap over images: Efron, "Bootstrap methods:
another look at the jackknife", Annals of Statistics 7 (1979).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 400  # of the images, for the errors of the transition; half as many for every mode
NORMAL_QUARTILES = 1.349  # distance between the quartiles of a standard normal distribution
FEWEST_TIMES = 3  # that a transition is fitted to
FEWEST_FOR_TOP = 5  # times from which on the curve's upper end is fitted as well


@dataclass(frozen=True)
class Estimate:
    """A statistic over images, and the ends of its 68% confidence interval (one standard error either way)."""

    value: float
    low: float
    high: float


def mode(values: np.ndarray, seed: int = 0) -> Estimate:
    """Where the distribution that the values were drawn from has its maximum.

    The density is estimated with Gaussian kernels, whose width is the one that is best for the slope of a normal
    density, since a mode is a zero of the slope: (4/5)^(1/7) s n^(-1/7) (Wand and Jones, "Kernel smoothing", 1995),
    with s the lesser of the standard deviation and the quartiles' distance / 1.349. The interval holds the middle 68%
    of the modes of resampled values, found with the same width. Not in it is what the smoothing does to a skewed
    density: its mode moves towards the longer tail, by a few tenths of the width. Where the middle half of the values
    are all equal, they are the mode.

    Args:
        values: (n,) with n >= 1; all finite.
        seed: of the resampling.
    """
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75])
    scale = min(np.std(values), (third - first) / NORMAL_QUARTILES)
    if scale == 0:
        return Estimate(float(median), float(median), float(median))
    n, extent = len(values), np.ptp(values)
    width = (4 / 5) ** (1 / 7) * scale * n ** (-1 / 7)
    spacing = max(width / 8, extent / 4096)
    margin = 4 * max(width, spacing)  # so that the two ends of the grid, which the Fourier transform joins, are empty
    start, bins = values.min() - margin, int(np.ceil((extent + 2 * margin) / spacing)) + 1
    counts = np.bincount(np.rint((values - start) / spacing).astype(np.int64), minlength=bins)
    resampled = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES // 2)
    peaks = start + spacing * _peaks(np.vstack([counts, resampled]), width / spacing)
    low, high = np.quantile(peaks[1:], [0.16, 0.84])
    return Estimate(float(peaks[0]), float(min(low, peaks[0])), float(max(high, peaks[0])))


def _peaks(counts: np.ndarray, width: float) -> np.ndarray:
    """Places (R,), in bins, of the maxima of histograms (R, bins) smoothed by a Gaussian of this width in bins."""
    bins = counts.shape[1]
    kernel = np.exp(-0.5 * (2 * np.pi * width * np.fft.rfftfreq(bins)) ** 2)
    density = np.fft.irfft(np.fft.rfft(counts, axis=1) * kernel, n=bins, axis=1)
    top = np.clip(density.argmax(axis=1), 1, bins - 2)
    before, at, after = (density[np.arange(len(top)), top + step] for step in (-1, 0, 1))
    return top + 0.5 * (before - after) / (before - 2 * at + after)  # of the parabola through three points


def mean(values: np.ndarray) -> Estimate:
    """The mean of values (n,), with its standard error."""
    value = float(np.mean(values))
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return Estimate(value, value - error, value + error)


def median(values: np.ndarray) -> Estimate:
    """The median of values (n,); the interval lies between the quantiles (1 +- 1/sqrt(n)) / 2, whatever their law."""
    step = min(0.5, 0.5 / np.sqrt(len(values)))
    low, value, high = np.quantile(values, [0.5 - step, 0.5, 0.5 + step])
    return Estimate(float(value), float(low), float(high))


STATISTICS = {"max": mode, "mean": mean, "median": median}  # by the names of plot_figures.py --statistic


def wilson_interval(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The confidence interval of a probability of which `count` of `total` trials came true: Wilson (1927).

    z = 1.96 gives 95%. Defined, and of a length above 0, for no and for all trials too.
    """
    p, z2 = count / total, z * z / total
    middle = (p + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def same_class(logits_start: np.ndarray, logits_sample: np.ndarray) -> np.ndarray:
    """Whether the predicted class of each sample is that of its starting image: bool (n,) from (n, classes)."""
    return logits_start.argmax(axis=1) == logits_sample.argmax(axis=1)


def class_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The place of the true class in the order of the logits, from 0: (n,). Of equal ones the first counts more.

    Args:
        logits: (n, classes).
        labels: (n,), each 0..classes-1.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    equal_before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])  # as argmax has it
    return ((logits > own) | equal_before).sum(axis=1)


def in_top(logits: np.ndarray, labels: np.ndarray, top: int) -> np.ndarray:
    """Whether the true class is among the `top` most probable: bool (n,). Arguments as those of `class_ranks`."""
    return class_ranks(logits, labels) < top


@dataclass(frozen=True)
class Transition:
    """Where class retention falls fastest: the middle c of a fitted logistic curve.

    The curve is lower + (upper - lower) / (1 + exp((k/N - c) / w)).

    Attributes:
        time: c, in units of k/N.
        error: its standard error.
        low, high: the ends of its 95% confidence interval.
        width: w, in units of k/N; the curve falls from 73% to 27% of its height between c - w and c + w.
        upper, lower: the fraction of images that keep their class long before and long after.
        resolved: False where the fall is so steep that it lies between two times: the interval then spans both.
    """

    time: float
    error: float
    low: float
    high: float
    width: float
    upper: float
    lower: float
    resolved: bool

    def curve(self, times: np.ndarray) -> np.ndarray:
        """The fitted fraction at `times`, in units of k/N."""
        return self.lower + (self.upper - self.lower) * _falling(times, self.time, self.width)

    def as_dict(self) -> dict[str, Any]:
        """The attributes, for a JSON file."""
        return asdict(self)


def fit_transition(times: np.ndarray, kept: np.ndarray, seed: int = 0) -> Transition | None:
    """Fit a logistic curve to the fraction of images that keep their class.

    By weighted least squares; the weights are those of binomial counts. The two ends of the curve are kept within
    0..1; with fewer than 5 times the upper one is 1, since at k = 0 the sample is the starting image. Errors come from
    resampled images, each with all of its times, since an image's fates at neighbouring times are alike.

    Args:
        times: (T,) k/N, increasing.
        kept: (T, n) whether each image kept its class.
        seed: of the resampling.

    Returns:
        the transition; None with fewer than 3 times, or where the fraction does not fall from the first time to the
        last beyond its 95% confidence intervals.
    """
    num_times, n = kept.shape
    counts = kept.sum(axis=1)
    if num_times < FEWEST_TIMES or wilson_interval(counts[-1], n)[1] >= wilson_interval(counts[0], n)[0]:
        return None
    resampled = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # (R, n)
    fractions = np.vstack([counts, resampled @ kept.T.astype(np.float64)]) / n  # (1 + R, T)
    guess = (counts + 1) / (n + 2)  # never 0 or 1, so that no weight is infinite
    centres, widths, upper, lower = _fit_logistic(times, fractions, n / (guess * (1 - guess)))

    centre, width, error = centres[0], widths[0], np.std(centres[1:], ddof=1)
    low, high = np.quantile(centres[1:], [0.025, 0.975])
    after = np.clip(np.searchsorted(times, centre), 1, num_times - 1)
    gap = times[after] - times[after - 1]
    resolved = bool(width > gap / 8)
    if not resolved:
        low, high = min(low, times[after - 1]), max(high, times[after])
        error = max(error, gap / np.sqrt(12))  # of a place that may be anywhere in the gap
    facts = [float(x) for x in (centre, error, min(low, centre), max(high, centre), width, upper[0], lower[0])]
    return Transition(*facts, resolved)


def _falling(times: np.ndarray, centre: np.ndarray | float, width: np.ndarray | float) -> np.ndarray:
    """1 / (1 + exp((times - centre) / width)), without overflow."""
    return 0.5 - 0.5 * np.tanh(0.5 * (times - centre) / width)


def _fit_logistic(times: np.ndarray, fractions: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Least squares for many curves at once: centres, widths, upper and lower ends, each (R,).

    A grid of centres and widths, then ever finer grids of 5 x 5 about the best; the ends, in which the curve is
    linear, are solved for exactly.

    Args:
        times: (T,).
        fractions: (R, T).
        weights: (T,), inverse variances of the fractions.
    """
    narrowest = np.diff(times).min() / 20
    steps = np.array([0.025, 0.25])  # of the centre, and of the logarithm of the width
    grid = np.stack(np.meshgrid(np.arange(0, 1.001, 0.025), np.arange(np.log(narrowest), 0.1, 0.25)), axis=-1)
    points = grid.reshape(1, -1, 2)  # (1 or R, points, centre and log width)
    around = np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3)), axis=-1).reshape(1, -1, 2) / 2
    for _ in range(12):
        misfit, upper, lower = _best_ends(times, fractions, weights, points)
        best = misfit.argmin(axis=1)
        rows = np.arange(len(best))
        found = np.broadcast_to(points, (len(best), *points.shape[1:]))[rows, best]
        points = found[:, None] + steps * around
        points = np.clip(points, [0, np.log(narrowest)], [1, 0.1])
        steps = steps / 2
    return found[:, 0], np.exp(found[:, 1]), upper[rows, best], lower[rows, best]


def _best_ends(
    times: np.ndarray, fractions: np.ndarray, weights: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best ends, within 0..1, of curves with given centres and widths: sum of squares, upper, lower, each (R, P).

    Least squares in two unknowns within a square: the free solution where it is inside, else the best on the rim.

    Args:
        points: (1 or R, P, 2), centre and logarithm of the width.
    """
    first = _falling(times, points[..., :1], np.exp(points[..., 1:]))  # (1 or R, P, T): what multiplies the upper end
    last = 1 - first
    uu, ul, ll = first**2 @ weights, (first * last) @ weights, last**2 @ weights
    weighted = (weights * fractions)[:, :, None]  # (R, T, 1)
    uy, ly = (first @ weighted)[..., 0], (last @ weighted)[..., 0]  # (R, P)
    with np.errstate(divide="ignore", invalid="ignore"):
        candidates = [(np.ones_like(uy), np.clip((ly - ul) / ll, 0, 1))]
        if len(times) >= FEWEST_FOR_TOP:
            determinant = uu * ll - ul**2
            free = ((uy * ll - ly * ul) / determinant, (ly * uu - uy * ul) / determinant)
            inside = (free[0] >= 0) & (free[0] <= 1) & (free[1] >= 0) & (free[1] <= 1)
            candidates += [tuple(np.where(inside, end, np.nan) for end in free)]
            candidates += [(np.clip((uy - ul * end) / uu, 0, 1), np.full_like(uy, end)) for end in (0, 1)]
            candidates += [(np.zeros_like(uy), np.clip(ly / ll, 0, 1))]
    square = (fractions**2 @ weights)[:, None]
    misfits = [square - 2 * (u * uy + v * ly) + u * u * uu + 2 * u * v * ul + v * v * ll for u, v in candidates]
    misfits = np.where(np.isnan(misfits), np.inf, misfits)
    best = misfits.argmin(axis=0)[None]
    upper, lower = (np.take_along_axis(np.stack(ends), best, axis=0)[0] for ends in zip(*candidates, strict=True))
    return np.take_along_axis(misfits, best, axis=0)[0], upper, lower
