"""Statistics of the classes of several samples, from distributions whose values are known."""

from __future__ import annotations

from guided_diffusion.classifier.class_statistics import (
    agreement,
    agreement_between_images,
    class_entropy,
    largest_entropy,
)

import numpy as np
import pytest


def test_by_hand():
    classes = np.array([[0, 0, 0, 0], [0, 1, 2, 7], [7, 7, 0, 0]])
    assert agreement(classes) == pytest.approx([1, 0, 2 / 6])
    plain, corrected = class_entropy(classes)
    assert plain == pytest.approx([0, np.log(4), np.log(2)])
    assert corrected == pytest.approx([0, np.log(4) + 3 / 8, np.log(2) + 1 / 8])
    pairs = [a == b for i in range(3) for j in range(i) for a in classes[i] for b in classes[j]]
    assert agreement_between_images(classes) == pytest.approx(np.mean(pairs))
    assert np.isnan(agreement_between_images(classes[:1]))


def test_expected_values():
    """Samples of known probabilities: agreement is unbiased, and the correction removes most of the entropy's bias."""
    rng = np.random.default_rng(0)
    p = np.array([0.4, 0.3, 0.2, 0.1])
    classes = rng.choice(4, size=(20_000, 32), p=p)
    for m in (2, 32):
        of_pairs = agreement(classes[:, :m])
        assert abs(of_pairs.mean() - (p**2).sum()) < 4 * of_pairs.std() / np.sqrt(20_000)
    assert agreement_between_images(classes) == pytest.approx((p**2).sum(), abs=0.005)
    entropy = -(p * np.log(p)).sum()
    for m, most in ((8, 0.4), (32, 0.1)):
        plain, corrected = (estimate.mean() for estimate in class_entropy(classes[:, :m]))
        bias = entropy - plain
        assert bias == pytest.approx(3 / (2 * m), rel=0.2)
        assert abs(corrected - entropy) < most * bias


@pytest.mark.parametrize(("samples", "classes"), [(1, 10), (4, 10), (10, 10), (16, 4)])
def test_the_largest_entropy(samples, classes):
    rng = np.random.default_rng(0)
    found = class_entropy(rng.integers(classes, size=(500, samples)))[1].max()
    assert found <= largest_entropy(samples, classes) + 1e-12
    even = class_entropy(np.arange(samples)[None] % classes)[1]
    assert largest_entropy(samples, classes) == pytest.approx(even[0])
