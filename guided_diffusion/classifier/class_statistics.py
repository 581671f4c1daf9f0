"""Statistics of the classes of several samples of each image.

Classes are those that the classifier predicts, from n images with M samples of each.
"""

from __future__ import annotations

import numpy as np


def class_counts(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each image's samples have each class that they have.

    Args:
        classes: (n, M) class indices.

    Returns:
        images: (p,) numbers of images, for each of the p pairs of an image and a class that occur.
        counts: (p,) samples.
    """
    num_classes = classes.max() + 1
    pairs, counts = np.unique(np.arange(len(classes))[:, None] * num_classes + classes, return_counts=True)
    return pairs // num_classes, counts


def agreement(classes: np.ndarray) -> np.ndarray:
    """For each image, the fraction of the M (M - 1) / 2 pairs of its samples that have the same class: (n,).

    This is unbiased for the probability that two samples do. `classes` is (n, M), M > 1.
    """
    n, m = classes.shape
    images, counts = class_counts(classes)
    return np.bincount(images, counts * (counts - 1), n) / (m * (m - 1))


def agreement_between_images(classes: np.ndarray) -> float:
    """The fraction of the pairs of samples of two different images that have the same class; NaN for a single image.

    `classes` is (n, M).
    """
    n, m = classes.shape
    if n == 1:
        return float("nan")
    total = np.bincount(classes.ravel()).astype(np.float64)
    within = class_counts(classes)[1].astype(np.float64)
    return float((np.square(total).sum() - np.square(within).sum()) / (n * (n - 1) * m**2))


def class_entropy(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entropy of the class of each image's samples, in nats: (n,), (n,).

    The first estimate is that of the fractions f_c, -sum f_c log f_c, which is too low by about (K - 1) / 2M for K
    classes. The second adds this, with the number of classes that occur: Miller, "Note on the bias of information
    estimates" (1955). It is still too low if M is not much larger than the number of likely classes, and cannot exceed
    `largest_entropy`. `classes` is (n, M).
    """
    n, m = classes.shape
    images, counts = class_counts(classes)
    fractions = counts / m
    plain = np.maximum(np.bincount(images, -fractions * np.log(fractions), n), 0)  # not -0.0
    return plain, plain + (np.bincount(images, minlength=n) - 1) / (2 * m)


def largest_entropy(num_samples: int, num_classes: int) -> float:
    """The corrected `class_entropy` of M samples that are as spread over the classes as they can be."""
    occurring = min(num_samples, num_classes)
    fractions = np.bincount(np.arange(num_samples) % occurring) / num_samples
    return float(-(fractions * np.log(fractions)).sum() + (occurring - 1) / (2 * num_samples))
