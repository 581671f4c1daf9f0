"""Statistics for the figures: how much of an image, and of its class, survives noising and denoising.

Errors of modes and transitions are from the bootstrap over images: Efron, Annals of Statistics 7, 1 (1979). Several
samples of one image are not independent, so images are resampled, each with all its samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    from scipy import optimize, stats
except ModuleNotFoundError:  # optional (extra "figures"); the scripts say so
    optimize = stats = None

RESAMPLES = 400  # bootstrap resamples for the transition; half as many for a mode
BATCH = 200_000  # values resampled together: few enough for the cache
NORMAL_QUARTILES = 1.349  # interquartile range of the standard normal distribution
FEWEST_TIMES = 3  # to fit a transition
FEWEST_FOR_TOP = 5  # to fit the curve's upper end as well
AT_BOUND = 1e-3  # a fitted fraction this close to 0 or 1 counts as fixed


@dataclass(frozen=True)
class Estimate:
    """A statistic over images and its 68% confidence interval (plus or minus one standard error)."""

    value: float
    low: float
    high: float


def mode(values: np.ndarray, seed: int = 0) -> Estimate:
    """The maximum of the values' density, estimated with a Gaussian kernel.

    The kernel width is optimal for the slope of a normal density: (4/5)^(1/7) s n^(-1/7) (Wand and Jones, "Kernel
    smoothing", 1995), where s is the smaller of the standard deviation and the interquartile range / 1.349. The
    interval has the middle 68% of the modes of resampled values, with the same kernel width. It does not include the
    bias from smoothing: the mode of a skewed density moves towards the longer tail by a few tenths of the width. If the
    middle half of the values are equal, that value is the mode. For a single image the interval is the mode alone, as
    for `mean` and `median`.

    Args:
        values: (n,) or, with M samples of each image, (n, M) finite values, n >= 1.
        seed: seed of the bootstrap.
    """
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75])
    scale = min(np.std(values), (third - first) / NORMAL_QUARTILES)
    if scale == 0:
        return Estimate(float(median), float(median), float(median))
    extent = np.ptp(values)
    width = (4 / 5) ** (1 / 7) * scale * values.size ** (-1 / 7)
    spacing = max(width / 8, extent / 4096)
    margin = 4 * max(width, spacing)  # empty bins at both ends, as the Fourier transform is periodic
    start, num_bins = values.min() - margin, int(np.ceil((extent + 2 * margin) / spacing)) + 1
    bins = np.rint((values - start) / spacing).astype(np.int64)

    def peaks(images: np.ndarray, axis: int = -1) -> np.ndarray:
        resampled = bins[images].reshape(len(images), -1)
        return start + spacing * _peaks(_histograms(resampled, num_bins), width / spacing)

    value = float(peaks(np.arange(len(bins))[None])[0])
    if len(bins) == 1:  # nothing to resample
        return Estimate(value, value, value)
    batch = max(1, BATCH // values.size)
    interval = _bootstrap(np.arange(len(bins)), peaks, RESAMPLES // 2, 0.68, seed, batch).confidence_interval
    return Estimate(value, float(min(interval.low, value)), float(max(interval.high, value)))


def _histograms(bins: np.ndarray, num_bins: int) -> np.ndarray:
    """Counts (R, num_bins) of bin numbers (R, n), row by row."""
    flat = bins + num_bins * np.arange(len(bins))[:, None]
    return np.bincount(flat.ravel(), minlength=len(bins) * num_bins).reshape(-1, num_bins)


def _peaks(counts: np.ndarray, width: float) -> np.ndarray:
    """Maxima (R,) of histograms (R, bins) smoothed by a Gaussian of this width; both in units of bins."""
    bins = counts.shape[1]
    kernel = np.exp(-0.5 * (2 * np.pi * width * np.fft.rfftfreq(bins)) ** 2)
    density = np.fft.irfft(np.fft.rfft(counts, axis=1) * kernel, n=bins, axis=1)
    top = np.clip(density.argmax(axis=1), 1, bins - 2)
    before, at, after = (density[np.arange(len(top)), top + step] for step in (-1, 0, 1))
    return top + 0.5 * (before - after) / (before - 2 * at + after)  # vertex of the parabola through three points


def _bootstrap(values: np.ndarray, statistic: Any, resamples: int, confidence: float, seed: int, batch: int = 0) -> Any:
    """The percentile bootstrap of `statistic(values, axis)` over values (n,), in batches of resamples."""
    return stats.bootstrap(
        (values,),
        statistic,
        n_resamples=resamples,
        batch=batch or max(1, BATCH // len(values)),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )


def mean(values: np.ndarray) -> Estimate:
    """The mean of values (n,) or (n, M), see `mode`, and its standard error."""
    of_images = values.reshape(len(values), -1).mean(axis=1)
    value = float(np.mean(of_images))
    error = float(np.std(of_images, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return Estimate(value, value - error, value + error)


def median(values: np.ndarray) -> Estimate:
    """The median of values (n,) or (n, M), see `mode`; its interval is for any distribution.

    It is between the quantiles 1/2 ± s, where s is the standard error of the fraction of values below the median:
    1 / (2 sqrt(n)) for one value of each image. Woodruff, J. Am. Stat. Assoc. 47, 635 (1952).
    """
    n, middle = len(values), np.median(values)
    spread = 0.5 if values.size == n else np.std((values < middle).mean(axis=1))
    step = min(0.5, spread / np.sqrt(n))
    low, value, high = np.quantile(values, [0.5 - step, 0.5, 0.5 + step])
    return Estimate(float(value), float(low), float(high))


STATISTICS = {"max": mode, "mean": mean, "median": median}  # keys: values of plot_figures.py --statistic


def wilson_interval(count: float, total: float) -> tuple[float, float]:
    """The 95% confidence interval of a probability, given `count` successes in `total` trials: Wilson (1927).

    The numbers need not be whole, see `fraction_interval`.
    """
    p, z = count / total, stats.norm.ppf(0.975)
    scale = 2 * (total + z**2)
    centre, width = (2 * total * p + z**2) / scale, z / scale * np.sqrt(4 * total * p * (1 - p) + z**2)
    return 0.0 if count == 0 else float(centre - width), 1.0 if count == total else float(centre + width)


def fraction_interval(fractions: np.ndarray, num_samples: int = 1) -> tuple[float, float]:
    """The 95% confidence interval of the mean of fractions.

    Wilson's interval for the number of independent trials whose mean would have the same variance: Korn and Graubard,
    Survey Methodology 24, 193 (1998). It is between the number of images and that of samples.

    Args:
        fractions: (n,), for each image, the fraction of its samples that have some property.
        num_samples: samples of each image. For 1, this is `wilson_interval`.
    """
    n, p = len(fractions), float(np.mean(fractions))
    trials = float(n)
    if num_samples > 1 and n > 1:
        variance = np.var(fractions, ddof=1) / n
        trials = np.clip(p * (1 - p) / variance, n, n * num_samples) if variance > 0 else trials
    return wilson_interval(p * trials if num_samples > 1 else fractions.sum(), trials)


@dataclass(frozen=True)
class Transition:
    """The logistic curve of class retention, lower + (upper - lower) / (1 + exp((k/N - c) / w)), steepest at c.

    Attributes:
        time: c, in units of k/N.
        error: standard error of c.
        low, high: 95% confidence interval of c.
        width: w, in units of k/N; the curve falls from 73% to 27% of its height between c - w and c + w.
        upper, lower: fraction of images that keep their class long before and long after the transition.
        resolved: False if fewer than two times lie on the fall, or it is steep for the distance between times; the
            interval then spans from the last time before the fall to the first one after it.
        times_on_fall: number of times whose fraction is between the ends by more than its error.
    """

    time: float
    error: float
    low: float
    high: float
    width: float
    upper: float
    lower: float
    resolved: bool
    times_on_fall: int


def fit_transition(times: np.ndarray, kept: np.ndarray, seed: int = 0, num_samples: int = 1) -> Transition | None:
    """Fit a logistic curve to the fraction of images that keep their class.

    The fit is by least squares, weighted by the binomial errors of the fractions. Both ends of the curve are within
    0..1. With fewer than 5 times the upper end is 1, since the sample at k = 0 is the starting image. Errors are from
    resampling images with all of their times, because the outcomes at neighbouring times are correlated; the fit is
    linearised, so that only a mean is resampled.

    Args:
        times: (T,) k/N, increasing.
        kept: (T, n) whether each image kept its class, or the fraction of its samples that did.
        seed: seed of the bootstrap.
        num_samples: samples of each image.

    Returns:
        the transition, or None if there are fewer than 3 times, or if the 95% confidence intervals of the first and
        last fractions overlap.
    """
    num_times, n = kept.shape
    counts = kept.sum(axis=1)
    first, last = (fraction_interval(kept[t], num_samples) for t in (0, -1))
    if num_times < FEWEST_TIMES or last[1] >= first[0]:
        return None
    guess = (counts + 1) / (n + 2)  # not 0 or 1, so that errors are positive
    errors = np.sqrt(guess * (1 - guess) / n)
    centre, width, lower, upper = _fit_logistic(times, counts / n, errors)

    shifts = _centre_shifts(times, errors, centre, width, lower, upper) @ (kept - counts[:, None] / n)  # (n,)
    shift = _bootstrap(shifts, np.mean, RESAMPLES, 0.95, seed)
    error, (low, high) = shift.standard_error, np.clip(np.add(centre, shift.confidence_interval), 0, 1)
    before, after, on_fall = _around_fall(times, kept, centre, lower, upper, num_samples)
    next_time = np.clip(np.searchsorted(times, centre), 1, num_times - 1)
    resolved = bool(on_fall >= 2 and width > (times[next_time] - times[next_time - 1]) / 8)
    if not resolved:
        low, high = min(low, before), max(high, after)
        error = max(error, (after - before) / np.sqrt(12))  # of a uniform distribution between these times
    numbers = (centre, error, min(low, centre), max(high, centre), width, upper, lower)
    return Transition(*map(float, numbers), resolved, on_fall)


def _around_fall(
    times: np.ndarray, kept: np.ndarray, centre: float, lower: float, upper: float, num_samples: int
) -> tuple[float, float, int]:
    """The last time before the fall and the first one after it (0 and 1 if there is none), and the number between.

    From the centre outwards, a time lies on the fall until its fraction agrees with the end of the curve: further out,
    one that does not is chance. It agrees if their 95% intervals overlap; that of the end is the first time's or the
    last one's, which determine it, unless these lie on the fall themselves.
    """
    intervals = [fraction_interval(of_time, num_samples) for of_time in kept]
    upper = intervals[0][0] if intervals[0][1] >= upper else upper
    lower = intervals[-1][1] if intervals[-1][0] <= lower else lower
    first_after = int(np.searchsorted(times, centre))
    before = [t for t in range(first_after) if intervals[t][1] >= upper]
    after = [t for t in range(first_after, len(times)) if intervals[t][0] <= lower]
    last, first = max(before, default=-1), min(after, default=len(times))
    return (times[last] if before else 0.0), (times[first] if after else 1.0), first - last - 1


def _logistic(times: np.ndarray, centre: float, width: float, lower: float, upper: float = 1.0) -> np.ndarray:
    """lower + (upper - lower) / (1 + exp((times - centre) / width)), without overflow."""
    return lower + (upper - lower) * (0.5 - 0.5 * np.tanh(0.5 * (times - centre) / width))


def _logistic_slopes(times: np.ndarray, centre: float, width: float, lower: float, upper: float = 1.0) -> np.ndarray:
    """Derivatives (T, 4) of `_logistic` with respect to centre, width, lower and upper."""
    falling = _logistic(times, centre, width, 0)
    by_centre = (upper - lower) * falling * (1 - falling) / width
    return np.stack([by_centre, by_centre * (times - centre) / width, 1 - falling, falling], axis=1)


def _fit_logistic(times: np.ndarray, fractions: np.ndarray, errors: np.ndarray) -> tuple[float, float, float, float]:
    """Centre, width, lower and upper end of the logistic curve through fractions (T,) with these standard errors."""
    free = 4 if len(times) >= FEWEST_FOR_TOP else 3  # parameters: all, or all but the upper end
    half = (fractions[0] + fractions[-1]) / 2
    after = np.argmax(fractions < half)
    start = [(times[after - 1] + times[after]) / 2, 0.05, fractions[-1], fractions[0]]
    low, high = [0, np.diff(times).min() / 20, 0, 0], [1, 1.1, 1, 1]
    fitted, _ = optimize.curve_fit(
        _logistic,
        times,
        fractions,
        p0=np.clip(start, low, high)[:free],
        sigma=errors,
        absolute_sigma=True,
        bounds=(low[:free], high[:free]),
        jac=lambda *at: _logistic_slopes(*at)[:, :free],
        ftol=1e-7,
        xtol=1e-7,
        max_nfev=100_000,  # slow if three times do not determine the width of a steep fall
    )
    return (*fitted.tolist(), 1.0)[:4]


def _centre_shifts(
    times: np.ndarray, errors: np.ndarray, centre: float, width: float, lower: float, upper: float
) -> np.ndarray:
    """Derivatives (T,) of the fitted centre with respect to the fractions, from the linearised fit."""
    free = [True, True, AT_BOUND < lower < 1 - AT_BOUND, AT_BOUND < upper < 1 - AT_BOUND]
    slopes = _logistic_slopes(times, centre, width, lower, upper) * [width, width, 1, 1]  # of order 1
    # rcond drops parameters that the times do not determine, such as the centre of a step within a gap.
    return width * np.linalg.pinv(slopes[:, free] / errors[:, None], rcond=1e-3)[0] / errors
