"""Mean field against the reference numbers, and noise on leaves against all derivations."""

import itertools
import math

from guided_diffusion.correlations import (
    correlation_function,
    covariances,
    jackknife,
    ratio,
    susceptibility,
    variances,
)
from guided_diffusion.errors import UserError
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.script_util import create_gaussian_diffusion
from random_hierarchy_model import Grammar, mean_field
from random_hierarchy_model.belief_propagation import infer
from random_hierarchy_model.leaf_noise import (
    OneHotDenoiser,
    epsilon_log_likelihoods,
    gaussian_log_likelihoods,
    masking_log_likelihoods,
    one_hot,
)

import numpy as np
import pytest
import torch
from test_random_hierarchy_model import enumerated, grammar

pytestmark = pytest.mark.usefixtures("one_thread")

# v, m, s: slope at one, p*, e*, slope at p*, nu
FIXED_POINTS = [
    (32, 8, 2, 0.4848, 0.2917, 0.7312, 1.4422, 1.893),
    (16, 4, 2, 0.4706, 0.2500, 0.8000, 1.3600, 2.254),
    (32, 16, 2, 0.9697, 0.9375, 0.0645, 1.0302, 23.31),
    (8, 8, 4, 0.0547, 0.2085, 0.9046, None, None),
]


@pytest.mark.parametrize(("v", "m", "s", "at_one", "p_star", "e_star", "at_p_star", "nu"), FIXED_POINTS)
def test_fixed_points(v, m, s, at_one, p_star, e_star, at_p_star, nu):
    p = mean_field.critical_belief(v, m, s)
    assert mean_field.upward(p, v, m, s) == pytest.approx(p, abs=1e-12)
    assert mean_field.slope_at_one(v, m, s) == pytest.approx(at_one, abs=1e-4)
    assert p == pytest.approx(p_star, abs=1e-4)
    assert mean_field.critical_noise(v, m, s) == pytest.approx(e_star, abs=1e-4)
    if nu:
        assert mean_field.slope(p, v, m, s) == pytest.approx(at_p_star, abs=1e-4)
        assert mean_field.correlation_exponent(v, m, s) == pytest.approx(nu, rel=3e-4)


@pytest.mark.parametrize(("v", "m", "s"), [(32, 17, 2), (8, 2, 4)])
def test_grammars_without_a_transition(v, m, s):
    """Above sf = 1, and where faint evidence grows: the embedded example, whose slope at chance is 1.75."""
    assert mean_field.critical_belief(v, m, s) is mean_field.critical_noise(v, m, s) is None
    assert mean_field.correlation_exponent(v, m, s) is None
    assert max(mean_field.slope_at_one(v, m, s), mean_field.slope_at_chance(v, m, s)) > 1


@pytest.mark.parametrize(("v", "m", "s"), [(32, 8, 2), (8, 2, 4), (5, 3, 3)])
def test_slopes_are_those_of_the_map(v, m, s):
    for p, expected in (
        (1.0, mean_field.slope_at_one(v, m, s)),
        (1 / v, mean_field.slope_at_chance(v, m, s)),
        (0.6, mean_field.slope(0.6, v, m, s)),
    ):
        h = 1e-6
        measured = (mean_field.upward(p + h, v, m, s) - mean_field.upward(p - h, v, m, s)) / (2 * h)
        assert measured == pytest.approx(expected, rel=1e-6)
        assert mean_field.slope(p, v, m, s) == pytest.approx(expected, rel=1e-12)


def test_marginals_of_the_reference():
    at_07 = [0.871, 0.879, 0.884, 0.883, 0.870, 0.840, 0.779, 0.664]
    at_08 = [0.442, 0.357, 0.267, 0.181, 0.112, 0.066, 0.044, 0.034]
    assert mean_field.marginals(0.7, 32, 8, 2, 7) == pytest.approx(at_07, abs=5e-4)
    assert mean_field.marginals(0.8, 32, 8, 2, 7) == pytest.approx(at_08, abs=5e-4)


def test_susceptibility_of_the_reference():
    for epsilon, chi in zip((0.6, 0.7, 0.74, 0.8, 0.9), (2.19, 4.63, 5.51, 2.52, 1.46), strict=True):
        assert mean_field.susceptibility(epsilon, 32, 8, 2, 7) == pytest.approx(chi, abs=5e-3)
    chi, epsilon = max((mean_field.susceptibility(e / 100, 32, 8, 2, 9), e) for e in range(50, 100))
    assert (epsilon, chi) == (73, pytest.approx(7.95, abs=5e-3))


@pytest.mark.parametrize(
    ("v", "m", "s", "depth", "expected"),  # chi by e, from the formulas in 60 digits
    [
        (32, 1, 2, 10, {1e-6: 1.000001, 0.1: 1.1045, 0.2: 1.2127, 0.3: 1.3269, 0.5: 1.5939, 0.7: 2.0242, 0.8: 2.4570}),
        (8, 1, 4, 5, {0.1: 1.2651}),
        (8, 1, 8, 3, {0.1: 1.6125, 0.5: 4.0635}),
        (32, 8, 2, 10, {1e-6: 1.000001, 0.05: 1.0550}),
    ],
)
def test_susceptibility_where_almost_nothing_changes(v, m, s, depth, expected):
    """There all covariances are differences of almost equal numbers."""
    for epsilon, chi in expected.items():
        assert mean_field.susceptibility(epsilon, v, m, s, depth) == pytest.approx(chi, abs=6e-5)


def test_mean_field_without_noise():
    for m in (1, 8):
        assert mean_field.marginals(0.0, 32, m, 2, 3) == [1, 1, 1, 1]
        assert mean_field.correlations(0.0, 32, m, 2, 3) == [0, 0, 0, 0]
        assert math.isnan(mean_field.susceptibility(0.0, 32, m, 2, 3))


@pytest.mark.parametrize("epsilon", [0.6, 0.7, 0.74, 0.8, 0.9])
def test_susceptibility_of_exact_samples(epsilon):
    """48 data of a grammar each, 64 posterior samples per datum; within 5% of mean field."""
    changes = np.stack([changes_of(grammar(32, 2, 7, 8, seed), epsilon, 64) for seed in range(48)])
    chi, error = jackknife(ratio, *variances(changes))
    assert abs(chi - mean_field.susceptibility(epsilon, 32, 8, 2, 7)) < max(0.05 * chi, 3 * error)


def changes_of(g: Grammar, epsilon: float, samples: int) -> np.ndarray:
    """Which leaves of one datum change in samples of the posterior: +1 or -1, (samples, leaves)."""
    leaves = torch.from_numpy(g.sample(1, g.seed)[0]).expand(samples, -1)
    drawn = infer(g, epsilon_log_likelihoods(leaves, epsilon, g.num_symbols)).sample(
        torch.Generator().manual_seed(g.seed)
    )
    return torch.where(drawn[0] == leaves, -1.0, 1.0).numpy()


@pytest.mark.parametrize("g", [grammar(3, 2, 3, 2), grammar(3, 3, 2, 3), grammar(4, 2, 2, 4)], ids=str)
@pytest.mark.parametrize("process", ["epsilon", "gaussian", "masking"])
def test_noise_on_leaves_is_enumeration(g, process):
    v, n = g.num_symbols, g.num_leaves
    leaves = torch.from_numpy(g.sample(6, 1)[0])
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.one_hot(leaves, v).double()
    if process == "epsilon":
        seen, psi = epsilon_log_likelihoods(leaves, 0.7, v), 0.3 * true + 0.7 / v
    elif process == "masking":
        masked = torch.rand(leaves.shape, generator=generator) < 0.5
        seen, psi = masking_log_likelihoods(leaves, masked, v), torch.where(masked[..., None], 1.0, true)
    else:
        abar, eps = 0.3, torch.randn(6, v, n, generator=generator, dtype=torch.float64)
        x = math.sqrt(abar) * one_hot(leaves, v) + math.sqrt(1 - abar) * eps
        seen = gaussian_log_likelihoods(x, abar)
        codewords = torch.eye(v, dtype=torch.float64)  # the density itself, up to a constant of x
        distance = (x.mT[:, :, None] - math.sqrt(abar) * codewords).square().sum(-1)  # (B, n, v)
        psi = (-(distance - distance.amin(2, keepdim=True)) / (2 * (1 - abar))).exp()
    found = infer(g, seen).marginals()
    with np.errstate(divide="ignore"):
        expected = enumerated(g, psi.log().clamp(min=-1e300).numpy())[2]
    for level, marginal in enumerate(found):
        assert marginal.numpy() == pytest.approx(expected[level], abs=1e-10)


def test_noise_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"epsilon = 1.5: expected a number from 0 to 1"):
        epsilon_log_likelihoods(torch.zeros(1, 4, dtype=torch.int64), 1.5, 3)
    with pytest.raises(UserError, match=r"abar: expected numbers in \[0, 1\)"):
        gaussian_log_likelihoods(torch.zeros(1, 3, 4), 1.0)
    for numbers, words in (((1, 1, 2), "expected v >= 2"), ((8, 2, 1), "s >= 2"), ((4, 5, 2), "too few for m = 5")):
        with pytest.raises(UserError, match=words):
            mean_field.check_parameters(*numbers)


def spaced(steps: int) -> SpacedDiffusion:
    """The linear schedule, respaced, for a model that predicts x_0; DDPM with the posterior variance."""
    return create_gaussian_diffusion(sigma_small=True, predict_xstart=True, timestep_respacing=str(steps))


def test_the_loop_on_one_hot_leaves_samples_the_posterior():
    """Paired: fraction kept in samples minus its posterior probability, for the class and the leaves."""
    g, count, steps, k = grammar(16, 2, 4, 4), 200, 250, 30
    diffusion, original = spaced(steps), spaced(1000)
    true = [torch.from_numpy(level) for level in g.sample(count, 0)]
    generator = torch.Generator().manual_seed(0)
    x_start = one_hot(true[0], g.num_symbols)
    t = torch.full((count,), k - 1)
    x = diffusion.q_sample(x_start, t, torch.randn(x_start.shape, generator=generator))
    exact = infer(g, gaussian_log_likelihoods(x, float(diffusion.alphas_cumprod[k - 1]))).marginals()
    model = OneHotDenoiser(g, original.alphas_cumprod)
    back = diffusion.p_sample_loop_forw_back(
        model, tuple(x.shape), k, noise=x, clip_denoised=False, generator=generator
    )
    read = infer(g, gaussian_log_likelihoods(back, 0.8)).marginals()
    for level, tolerance in ((0, 0.02), (g.depth, 0.04)):
        kept = (read[level].argmax(2) == true[level]).double().mean(1)
        expected = exact[level].take_along_dim(true[level][..., None], 2).squeeze(2).mean(1)
        assert 0.2 < expected.mean() < 0.98  # else there is nothing to see
        difference = kept - expected
        assert abs(difference.mean()) < tolerance + 3 * difference.std() / count**0.5


# Correlations of changes


def test_correlations_of_independent_and_of_identical_tokens():
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], size=(40, 200, 1))
    together = np.repeat(signs, 8, axis=2)
    assert susceptibility(together) == pytest.approx(8) and susceptibility(together, "half") == pytest.approx(4.5)
    apart = rng.choice([-1.0, 1.0], size=(40, 200, 8))
    chi, error = jackknife(ratio, *variances(apart))
    assert abs(chi - 1) < 3 * error < 0.1


def test_correlations_are_sums_over_pairs():
    rng = np.random.default_rng(1)
    g = grammar(3, 2, 3, 2)
    changes = rng.normal(size=(5, 7, 8)) @ rng.normal(size=(8, 8))
    levels = g.ancestor_levels()
    for i, j in itertools.product(range(8), repeat=2):
        assert levels[i, j] == (i ^ j).bit_length()  # for s = 2
    r, c = correlation_function(covariances(changes), levels)
    assert r.tolist() == [0, 1, 2, 3] and c.shape == (5, 4)
    expected = [np.cov(start.T) for start in changes]
    for level in range(4):
        assert c[:, level] == pytest.approx(np.array([m[levels == level].mean() for m in expected]))
    chi = sum(m.sum() for m in expected) / sum(np.trace(m) for m in expected)
    assert susceptibility(changes) == pytest.approx(chi)
    assert 1 + (c.mean(0)[1:] * [1, 2, 4]).sum() / c.mean(0)[0] == pytest.approx(chi)


def test_jackknife_is_the_standard_error_of_a_mean():
    values = np.random.default_rng(2).normal(size=50)
    mean, error = jackknife(np.mean, values)
    assert mean == pytest.approx(values.mean()) and error == pytest.approx(values.std(ddof=1) / 50**0.5)


def test_changes_that_say_nothing_are_refused():
    with pytest.raises(UserError, match=r"shape \(3, 1, 4\): expected \(starts, samples, tokens\), with 2 samples"):
        covariances(np.zeros((3, 1, 4)))
    with pytest.raises(UserError, match="nothing varies"):
        susceptibility(np.ones((3, 2, 4)))
    with pytest.raises(UserError, match="convention 'quarter'"):
        susceptibility(np.zeros((3, 2, 4)), "quarter")
    with pytest.raises(UserError, match="2 starts or more, found 1"):
        jackknife(np.mean, np.zeros(1))
