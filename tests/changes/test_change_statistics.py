"""C(r), chi, lengths, spectra and their errors, against direct sums and closed forms."""

import itertools

from guided_diffusion.changes.measure import block_means
from guided_diffusion.changes.statistics import (
    ChangeSums,
    Measured,
    Spectrum,
    changes_at,
    measure_change,
    measure_chi,
    measure_correlation,
    measure_length,
    summary,
)
from guided_diffusion.correlations import (
    GridPairs,
    TablePairs,
    bootstrap,
    correlation_function,
    correlation_length,
    covariances,
    susceptibility,
)
from guided_diffusion.errors import UserError

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


def squared_distances(height, width):
    y, x = np.divmod(np.arange(height * width), width)
    return (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2


def correlated(starts, samples, height, width, seed=0):
    """Changes with a mean that is large compared with their fluctuations, correlated at all distances."""
    rng = np.random.default_rng(seed)
    n = height * width
    return 50 + rng.normal(size=(starts, samples, n)) @ (np.eye(n) + rng.normal(size=(n, n)) / n**0.5)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (3, 7)])
@pytest.mark.parametrize("cuts", [[20], [1, 19], [7, 7, 6]])
def test_sums_by_fft_are_those_over_all_pairs(height, width, cuts):
    changes = correlated(2, 20, height, width)
    distance, expected = correlation_function(covariances(changes), squared_distances(height, width))
    for of_start, c in zip(changes, expected, strict=True):
        sums = ChangeSums(GridPairs(height, width))
        for some in np.split(of_start, np.cumsum(cuts)[:-1]):
            sums.add(some)
        found = sums.statistics()
        assert np.abs(found.correlation - c).max() < 1e-10
        matrix = np.cov(of_start.T)
        assert found.chi_numerator == pytest.approx(matrix.sum(), abs=1e-10)
        assert found.chi_denominator == pytest.approx(np.trace(matrix), abs=1e-10)
        assert found.change_map == pytest.approx(of_start.mean(axis=0), abs=1e-12)
    pairs = GridPairs(height, width)
    assert pairs.distance == pytest.approx(np.sqrt(distance), abs=1e-15)
    assert pairs.count.tolist() == [(squared_distances(height, width) == r).sum() for r in distance]


def test_distances_are_exact_up_to_32_tokens_then_in_bins_one_wide():
    assert len(GridPairs(32, 32).distance) == len({a * a + b * b for a, b in itertools.product(range(32), repeat=2)})
    pairs, squared = GridPairs(5, 33), squared_distances(5, 33)
    bins = np.rint(np.sqrt(squared))
    expected = correlation_function(np.sqrt(squared)[None], bins)[1][0]
    assert len(pairs.distance) == 33 and pairs.distance == pytest.approx(expected, abs=1e-12)
    assert pairs.distance[0] == 0 and pairs.count[0] == 5 * 33 and pairs.count.sum() == (5 * 33) ** 2
    changes = correlated(2, 6, 5, 33)
    found = changes_at(1, 2, changes, pairs).correlation
    assert found == pytest.approx(correlation_function(covariances(changes), bins)[1], abs=1e-10)


def test_a_table_of_distances():
    changes, distance = correlated(3, 9, 4, 2), np.abs(np.subtract.outer(range(8), range(8))) // 2
    found = changes_at(1, 2, changes, TablePairs(distance))
    assert found.correlation == pytest.approx(correlation_function(covariances(changes), distance)[1], abs=1e-10)
    assert measure_chi(found).value == pytest.approx(susceptibility(changes))
    assert measure_chi(found, "half").value == pytest.approx(susceptibility(changes, "half"))
    with pytest.raises(UserError, match=r"distances of shape \(3, 2\)"):
        TablePairs(np.zeros((3, 2)))
    with pytest.raises(UserError, match=r"changes of shape \(2, 7\): expected \(samples, 8\)"):
        ChangeSums(TablePairs(distance)).add(np.zeros((2, 7)))


def changed(distance, **entries):
    distance = distance.astype(float)
    for places, value in entries.items():
        distance[tuple(map(int, places[1:]))] = value
    return distance


LINE = np.abs(np.subtract.outer(range(4), range(4)))


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        (changed(LINE, _01=np.nan), "a distance is NaN or infinite"),
        (changed(LINE, _01=np.inf, _10=np.inf), "a distance is NaN or infinite"),
        (-LINE, "a distance is -3"),
        (LINE + 1, "the distance of a token to itself is 1"),
        (np.ones((4, 4)), "the distance of a token to itself is 1"),
        (changed(LINE, _01=7), "the distance of tokens 0 and 1 is 7, and that of 1 and 0 is 1"),
        (LINE.astype(np.uint8) + np.eye(4, k=1, dtype=np.uint8), "the distance of tokens 0 and 1 is 2"),
        (0 * LINE, "all distances are 0"),
        (np.zeros((1, 1)), "all distances are 0"),
        (LINE.astype(str), "distances of type <U"),
        (LINE > 0, "distances of type bool"),
    ],
)
def test_a_table_of_what_cannot_be_distances(distance, message):
    with pytest.raises(UserError, match=f"^{message}.*; expected the distance") as error:
        TablePairs(distance)
    assert str(error.value).count("\n") == 1


def test_two_tokens():
    found = changes_at(1, 2, correlated(3, 9, 2, 1), TablePairs([[0, 3], [3, 0]]))
    assert found.distance.tolist() == [0, 3] and np.isfinite(measure_chi(found).value)
    assert measure_length(found).value > 0


def test_a_start_that_never_changes_counts_with_zeros_and_has_no_chi_of_its_own():
    changes = correlated(3, 5, 4, 4)
    changes[1] = 0.1
    found = changes_at(10, 20, changes, GridPairs(4, 4))
    assert found.chi_numerator[1] == found.chi_denominator[1] == 0 and not found.correlation[1].any()
    assert measure_chi(found).value == pytest.approx(susceptibility(changes))
    (row,) = summary([changes_at(10, 20, changes[[1, 1]], GridPairs(4, 4))])
    for column in ("chi", "correlation_length"):
        assert row[column] == row[f"{column}_low"] == row[f"{column}_high"] == ""
    assert row["change"] == pytest.approx(0.1) and row["k/N"] == 0.5 and row["samples"] == 10
    assert np.isnan(measure_correlation(changes_at(10, 20, changes[[1, 1]], GridPairs(4, 4))).value).all()


def test_one_sample_says_nothing():
    sums = ChangeSums(GridPairs(2, 2))
    sums.add(np.ones((1, 4)))
    assert np.isnan(sums.statistics().chi_numerator) and np.isnan(sums.statistics().correlation).all()


def test_one_start_has_no_error():
    (row,) = summary([changes_at(1, 2, correlated(1, 5, 3, 3), GridPairs(3, 3))])
    assert row["chi"] > 0 and row["chi_low"] == row["chi_high"] == ""


def test_correlation_length_is_that_of_the_first_fall_to_one_part_in_e():
    r = np.array([0.0, 1, 2, 4])
    c = np.array([[2, 2, 2, 2], [1, 0, 0, 0], [1, 0.9, 0.1, 0.8], [0, 0, 0, 0]])
    expected = [np.inf, 1 - 1 / np.e, 1 + (0.9 - 1 / np.e) / 0.8, np.nan]
    np.testing.assert_allclose(correlation_length(r, c), expected)
    fine = np.linspace(0, 20, 2001)
    assert correlation_length(fine, np.exp(-fine / 3)) == pytest.approx(3, abs=1e-3)


def test_block_means_of_large_maps():
    maps = np.random.default_rng(0).normal(size=(2, 3, 70, 31))
    found = block_means(maps)
    assert found.shape == (2, 3, 24, 31)  # blocks of 3 x 1, the last of 1 x 1
    assert found[1, 2, 4, 5] == pytest.approx(maps[1, 2, 12:15, 5].mean())
    assert found[1, 2, 23, 5] == pytest.approx(maps[1, 2, 69, 5])
    assert block_means(maps[..., 0]).shape == (2, 3, 70)


# Errors


def test_95_percent_intervals_contain_the_true_value():
    """100 starts of 8 samples each, tokens on a line: C(r) = s^2 exp(-r/3), with a strength s that varies by start."""
    n, starts, samples = 8, 100, 8
    r = np.abs(np.subtract.outer(range(n), range(n)))
    decay = np.exp(-r / 3)
    factor, pairs, covered = np.linalg.cholesky(decay), TablePairs(r), np.zeros(4, int)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        strength = rng.lognormal(0, 0.3, (starts, 1, 1))
        time = changes_at(1, 2, strength * (2 + rng.normal(size=(starts, samples, n)) @ factor.T), pairs)
        resampling = {"resamples": 400, "seed": seed}
        at_2 = [ends[2] for ends in measure_correlation(time, **resampling)]
        measured = [
            (measure_chi(time, **resampling), decay.sum() / n),
            (Measured(*at_2), np.exp(-2 / 3)),
            (measure_length(time, **resampling), 3),
            (measure_change(time, **resampling), 2 * np.exp(0.3**2 / 2)),
        ]
        covered += [bool(m.low <= true <= m.high) for m, true in measured]
    assert np.all((covered >= 88) & (covered <= 99)), covered


def test_resamples_do_not_depend_on_how_many_are_drawn_together(monkeypatch):
    per_start = np.random.default_rng(0).lognormal(size=(50, 2))
    ratio = lambda means: means[..., 0] / means[..., 1]  # noqa: E731
    whole = bootstrap(ratio, per_start)
    monkeypatch.setattr("guided_diffusion.correlations.AT_ONCE", 50 * 7)
    assert [float(end) for end in bootstrap(ratio, per_start)] == [float(end) for end in whole]
    error = np.sqrt(np.var(per_start[:, 0] / per_start[:, 0].mean() - per_start[:, 1] / per_start[:, 1].mean()) / 50)
    assert (whole[2] - whole[1]) / (2 * 1.96) == pytest.approx(whole[0] * error, rel=0.15)


# Spectra, and the control without hierarchy


def test_spectra_are_mean_squares_by_wave_number():
    features = torch.randn(3, 6, 6, 2, generator=torch.Generator().manual_seed(0))
    spectrum = Spectrum(6, 6)
    power = spectrum.power(features)
    assert (power * spectrum.modes).sum(1) / 36 == pytest.approx(features.square().mean((1, 2, 3)).numpy())
    assert spectrum.modes.sum() == 36 and spectrum.wavenumber[:3] == pytest.approx([0, 1, 2**0.5])
    wave = torch.cos(2 * torch.pi * 2 * torch.arange(6) / 6).expand(1, 6, 6)[..., None]
    (of_wave,) = spectrum.power(wave)
    assert spectrum.wavenumber[of_wave > 1e-9] == pytest.approx([2])
    assert len(Spectrum(64, 64).wavenumber) == 46 and len(Spectrum(8, 4).wavenumber) > 4


SIGNALS = [0.99, 0.8, 0.5, 0.1, 0.001]  # abar, from early to late


@pytest.fixture(scope="module")
def gaussian_field():
    """Exact samples of a Gaussian random field with power spectrum |k|^-2: by abar, the changes and their spectra."""
    side, starts, samples = 16, 150, 12
    rng = np.random.default_rng(0)
    k = np.fft.fftfreq(side) * side
    k2 = k[:, None] ** 2 + k**2
    sigma2 = 1 / np.where(k2 > 0, k2, np.inf)

    def noise(*shape):
        """White noise by mode, of variance 1, of a real field."""
        return np.fft.fft2(rng.normal(size=(*shape, side, side)), norm="ortho")

    start = noise(starts, 1) * sigma2**0.5
    found = {}
    for abar in SIGNALS:
        noised = abar**0.5 * start + (1 - abar) ** 0.5 * noise(starts, samples)
        total = abar * sigma2 + 1 - abar
        sample = abar**0.5 * sigma2 / total * noised + (sigma2 * (1 - abar) / total) ** 0.5 * noise(starts, samples)
        change = np.fft.ifft2(sample - start, norm="ortho").real
        expected = 2 * sigma2 * (1 - abar) / total
        found[abar] = change, expected
    return found


def test_changes_of_a_gaussian_field_agree_mode_by_mode(gaussian_field):
    spectrum = Spectrum(16, 16)
    for abar, (change, expected) in gaussian_field.items():
        theory = spectrum.power(torch.zeros(1, 16, 16, 1))[0]
        np.add.at(theory, spectrum._place, expected.ravel())
        theory /= spectrum.modes
        power = np.stack([spectrum.power(torch.from_numpy(c)[..., None]).mean(0) for c in change])  # (starts, K)
        assert power[:, 0].max() < 1e-20  # the field has no mean
        z = (power.mean(0) - theory)[1:] / (power.std(0, ddof=1) / len(power) ** 0.5)[1:]
        assert np.abs(z).max() < 4.5 and 0.7 < np.sqrt(np.mean(z**2)) < 1.4, (abar, z)


def test_chi_of_a_gaussian_field_has_no_peak_in_the_middle(gaussian_field):
    times = [
        changes_at(1, 2, np.abs(change).reshape(*change.shape[:2], -1), GridPairs(16, 16))
        for change, _ in gaussian_field.values()
    ]
    chi, length = [measure_chi(time) for time in times], [measure_length(time) for time in times]
    for measured in (chi, length):
        for before, after in itertools.pairwise(measured):
            assert after.high > before.low
    assert chi[-1].low > 3 * chi[0].high and length[-1].low > 1.3 * length[0].high
    assert chi[-1].high > max(measured.value for measured in chi)
