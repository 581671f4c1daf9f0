"""The statistics behind the figures, against known laws and independent numbers."""

from __future__ import annotations

from statistics import NormalDist

from guided_diffusion.classifier.results import class_ranks
from guided_diffusion.classifier.retention import (
    fit_transition,
    fraction_interval,
    mean,
    median,
    mode,
    wilson_interval,
)

import numpy as np
import pytest
from conftest import run_python


@pytest.mark.parametrize(
    ("draw", "truth", "bias"),
    [
        (lambda rng, n: rng.normal(0.6, 0.1, n), 0.6, 0.003),
        (lambda rng, n: rng.beta(8, 3, n), 7 / 9, 0.015),  # (a - 1) / (a + b - 2)
        (lambda rng, n: np.where(rng.random(n) < 0.7, rng.normal(0.2, 0.05, n), rng.normal(0.9, 0.05, n)), 0.2, 0.005),
    ],
)
def test_mode_of_known_densities(draw, truth, bias):
    rng = np.random.default_rng(1)
    found = [mode(draw(rng, 1000), seed) for seed in range(60)]
    values = np.array([estimate.value for estimate in found])
    assert abs(values.mean() - truth) < bias + 3 * values.std() / np.sqrt(60)
    half = np.mean([(estimate.high - estimate.low) / 2 for estimate in found])
    assert 0.7 < half / values.std() < 1.4  # the interval is one standard error either way


def test_the_mode_is_neither_mean_nor_largest_value():
    values = np.random.default_rng(0).gamma(2, 1, 20000)  # mode 1, median 1.68, mean 2
    # The kernel smears a skewed density towards its tail.
    assert mode(values).value == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("values", [[0.3], [1.0] * 50, [0.0, *[0.5] * 8, 1.0]])
def test_mode_of_equal_values(values):
    found = mode(np.array(values))
    assert found.low == found.value == found.high == np.median(values)


def test_several_samples_of_one_image_have_no_error():
    values = np.random.default_rng(0).normal(size=(1, 6))
    for statistic in (mode, mean, median):
        found = statistic(values)
        assert values.min() < found.low == found.value == found.high < values.max()


def test_mean_and_median():
    values = np.array([1.0, 2.0, 3.0, 10.0])
    found = mean(values)
    assert (found.value, found.high - found.value) == pytest.approx((4, np.sqrt(50 / 3) / 2))
    rng = np.random.default_rng(0)
    found = [median(rng.normal(0, 1, 400)) for _ in range(400)]
    assert np.mean([estimate.low <= 0 <= estimate.high for estimate in found]) == pytest.approx(0.68, abs=0.07)


@pytest.mark.parametrize("count", [0, 1, 7, 10])
def test_wilson_interval(count):
    """Its ends are the p for which the count is 1.96 binomial standard deviations away."""
    z = NormalDist().inv_cdf(0.975)
    low, high = wilson_interval(count, 10)
    roots = np.roots([10**2 + 10 * z**2, -2 * 10 * count - 10 * z**2, count**2])
    assert (low, high) == pytest.approx(sorted(roots), abs=1e-9)
    if count == 7:
        assert (low, high) == pytest.approx((0.3968, 0.8922), abs=1e-4)  # as in tables


def test_classes():
    logits = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3]])
    assert class_ranks(logits, np.array([1, 1])).tolist() == [1, 2]
    # Equal logits are in the order of the classes, as argmax has it: a network that is blind is not always right.
    assert class_ranks(np.zeros((4, 4)), np.arange(4)).tolist() == [0, 1, 2, 3]


def fates(rng, times, alike, centre=0.55, width=0.05, n=400):
    """Whether images keep their class, at each time anew or, if `alike`, until each image's own threshold."""
    probability = 1 / (1 + np.exp((times - centre) / width))
    return rng.random((1 if alike else len(times), n)) < probability[:, None]


@pytest.mark.parametrize("alike", [False, True])
def test_transition_and_its_uncertainty(alike):
    rng, times = np.random.default_rng(0), np.arange(1, 11) / 10
    found = [fit_transition(times, fates(rng, times, alike), seed) for seed in range(60)]
    centres = np.array([transition.time for transition in found])
    assert abs(centres.mean() - 0.55) < 3 * centres.std() / np.sqrt(60) + 0.0005
    assert np.mean([transition.low <= 0.55 <= transition.high for transition in found]) >= 0.85  # 95% are expected
    assert 0.7 < np.mean([transition.error for transition in found]) / centres.std() < 1.4
    assert np.mean([transition.width for transition in found]) == pytest.approx(0.05, rel=0.1)
    assert all(transition.resolved for transition in found)


def test_transition_with_ends_other_than_0_and_1():
    rng, times = np.random.default_rng(0), np.arange(1, 11) / 10
    kept = fates(rng, times, False, n=20000)
    kept = np.where(rng.random(kept.shape) < 0.2, rng.random(kept.shape) < 0.25, kept)  # from 0.85 to 0.05
    found = fit_transition(times, kept)
    assert (found.time, found.upper, found.lower) == pytest.approx((0.55, 0.85, 0.05), abs=0.01)


def test_a_fall_between_two_times_is_not_claimed_to_be_known_better():
    times = np.array([0.2, 0.4, 0.6, 0.8, 1.0])
    found = fit_transition(times, np.repeat(times[:, None] < 0.5, 400, axis=1))
    assert (found.resolved, found.times_on_fall) == (False, 0)
    assert found.low <= 0.4 and found.high >= 0.6 and found.error >= 0.199 / np.sqrt(12)


@pytest.mark.parametrize(("centre", "on_fall", "span"), [(0.52, 1, (0.4, 0.6)), (0.55, 0, (0.5, 0.6))])
def test_a_fall_that_at_most_one_time_lies_on(centre, on_fall, span):
    """One time does not tell the width of the fall, and so not where it is either."""
    times = np.array([0.1, 0.4, 0.5, 0.6, 0.9])
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = fit_transition(times, fates(rng, times, False, centre, 0.01, 200))
        assert (found.times_on_fall, found.resolved) == (on_fall, False)
        assert found.low <= span[0] < centre < span[1] <= found.high
        assert found.high - found.low <= span[1] - span[0] + 0.05 and found.error >= 0.0999 / np.sqrt(12)


def test_no_transition():
    rng, times = np.random.default_rng(0), np.array([0.2, 0.5, 0.8])
    assert fit_transition(times, rng.random((3, 100)) < 0.5) is None
    assert fit_transition(times[:2], fates(rng, times[:2], False)) is None


def test_class_ranks_need_no_scipy():
    """classifier_statistics.py counts with them, and scipy is only in the extra "figures"."""
    code = "import sys; sys.modules['scipy'] = None; from guided_diffusion.classifier.retention import mean"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_an_interval_of_dependent_samples_contains_the_truth():
    """300 data sets of 60 images, whose own probabilities differ widely, with 8 samples each: nominally 95%."""
    rng = np.random.default_rng(0)
    own = rng.beta(0.3, 0.3, size=(300, 60))
    kept = rng.random((300, 60, 8)) < own[..., None]
    fractions = kept.mean(axis=2)
    covered, naive = (
        np.mean([low <= 0.5 <= high for low, high in intervals])
        for intervals in (
            [fraction_interval(f, 8) for f in fractions],
            [wilson_interval(f.sum() * 8, 480) for f in fractions],
        )
    )
    assert 0.92 <= covered <= 0.98 and naive < 0.8


@pytest.mark.parametrize("count", [0, 3, 10])
def test_an_interval_of_one_sample_each_or_of_copies_is_that_of_independent_trials(count):
    kept = np.arange(10) < count
    assert fraction_interval(kept) == wilson_interval(count, 10) == fraction_interval(kept.astype(float), 1)
    low, high = fraction_interval(kept.astype(float), 8)  # all samples of an image agree
    assert (low, high) == pytest.approx(wilson_interval(count, 10), abs=1e-12)


def test_errors_of_dependent_samples_are_those_of_images():
    """200 data sets of 50 images, whose values differ by more than their 6 samples do."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 50, 1)) + 0.3 * rng.normal(size=(200, 50, 6))
    for statistic in (mean, median):
        found = [statistic(v) for v in values]
        inside = np.mean([e.low <= 0 <= e.high for e in found])
        assert 0.58 <= inside <= 0.78
    widths = [(mode(v).high - mode(v).low) / (mode(v.ravel()).high - mode(v.ravel()).low) for v in values[:10]]
    assert np.mean(widths) > 1.3
