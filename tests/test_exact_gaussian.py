r"""The forward-backward loop against exact mathematics: off-by-one errors fail here.

For Gaussian data x_0 ~ N(mu, s^2), pixel by pixel, the best noise prediction is linear in x_t. With it each denoising
step is an affine map of the image plus Gaussian noise, so that the sample \hat x_0(k) is Gaussian given x_0, and a
recursion in float64 gives its mean and variance. The recursion here uses nothing of the library: only the signal levels
abar, and Bayes' rule for what they mean. Four kinds of pixels, one per channel, stand for easy and for hard data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guided_diffusion.forward_backward import noised_image
from guided_diffusion.script_util import create_gaussian_diffusion

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


ABAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))  # the linear schedule of 1000 steps

MU = np.array([0.5, -0.3, 0.1, 2.0])  # mean of the data
S2 = np.array([1e-4, 0.25, 1.0, 16.0])  # variance of the data
X_START = np.array([0.51, 0.4, -1.5, -3.0])  # the starting image

LEARNED = 0.4  # output of the model for the variance, from -1 (small) to 1 (large)


@dataclass(frozen=True)
class Sampler:
    """A sampler: DDPM with a `variance`, DDIM with `eta`, which is None for the others, or the multistep solver."""

    variance: str = "small"
    eta: float | None = None
    multistep: bool = False

    def __str__(self):
        if self.multistep:
            return "sde-dpmsolver++"
        return f"ddpm-{self.variance}" if self.eta is None else f"ddim-{self.eta}"

    def diffusion(self, num_steps):
        flags = {"learn_sigma": self.variance == "learned", "sigma_small": self.variance == "small"}
        return create_gaussian_diffusion(steps=1000, timestep_respacing=str(num_steps), **flags)

    def sample(self, diffusion, x_k, k, generator):
        """Run the loop under test."""
        if self.multistep:
            loop, options = diffusion.sde_dpmsolver_sample_loop_forw_back, {}
        elif self.eta is None:
            loop, options = diffusion.p_sample_loop_forw_back, {}
        else:
            loop, options = diffusion.ddim_sample_loop_forw_back, {"eta": self.eta}
        options.update(noise=x_k, clip_denoised=False, generator=generator)
        return loop(self.best_model, tuple(x_k.shape), k, **options)

    def best_model(self, x, t):
        """E[eps | x_t], given the original timesteps, and the values for the variance if learned."""
        abar = ABAR[t.numpy()].reshape(-1, 1, 1, 1)
        mu, s2 = MU.reshape(1, -1, 1, 1), S2.reshape(1, -1, 1, 1)
        gain = np.sqrt(1 - abar) / (abar * s2 + 1 - abar)
        gain, offset = (torch.from_numpy(a).to(x.dtype) for a in (gain, -gain * np.sqrt(abar) * mu))
        eps = gain * x + offset
        return torch.cat([eps, torch.full_like(eps, LEARNED)], dim=1) if self.variance == "learned" else eps


SAMPLERS = [Sampler("small"), Sampler("large"), Sampler("learned"), *(Sampler(eta=eta) for eta in (0.0, 0.5, 1.0))]
SAMPLERS.append(Sampler(multistep=True))
LENGTHS = [10, 25]
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=str)


@dataclass(frozen=True)
class Affine:
    r"""\hat x_0 = offset + gain * x_k + sum_j noise[j] * z_j, with z_j standard normal; numbers per channel (4,)."""

    offset: np.ndarray
    gain: np.ndarray
    noise: np.ndarray  # (draws, 4)

    def then(self, offset, gain, noise):
        """offset + gain * this + noise * z, with a new z."""
        draws = np.vstack([gain * self.noise, noise * np.ones((1, 4))])
        return Affine(offset + gain * self.offset, gain * self.gain, draws)

    def plus(self, factor, one, other):
        """This + factor * (one - other), where `other` had fewer draws."""
        later = np.zeros((len(one.noise) - len(other.noise), 4))
        return Affine(
            self.offset + factor * (one.offset - other.offset),
            self.gain + factor * (one.gain - other.gain),
            self.noise + factor * (one.noise - np.vstack([other.noise, later])),
        )

    def law(self, signal, noise):
        """Mean and standard deviation, as (2, 4), for x_k = signal * x_0 + noise * eps."""
        variance = (self.gain * noise) ** 2 + (self.noise**2).sum(0)
        return np.stack([self.offset + self.gain * signal * X_START, np.sqrt(variance)])


# The exact answer


@dataclass(frozen=True)
class Mutation:
    """A possible mistake, as a change to the recursion, and the affected k in 0..n."""

    name: str
    ks: Callable[[int], range]
    start_shift: int = 0  # x_k is drawn with abar[k - 1 + start_shift]
    indices: Callable[[int], Sequence[int]] = lambda k: range(k - 1, -1, -1)
    noise_at_zero: bool = False
    told_shift: int = 0  # the model receives the timestep of another index
    ahead: float = 0.5  # steps by which the multistep solver extrapolates
    for_multistep: bool = False

    def __str__(self):
        return self.name.replace(" ", "-")


NONE = Mutation("none", lambda n: range(n + 1))
MUTATIONS = [
    Mutation("x_k one step too noisy", lambda n: range(1, n), start_shift=1),
    Mutation("x_k one step too clean", lambda n: range(1, n), start_shift=-1),
    Mutation("loop starts at k", lambda n: range(n), indices=lambda k: range(k, -1, -1)),
    Mutation("loop starts at k minus 2", lambda n: range(1, n + 1), indices=lambda k: range(k - 2, -1, -1)),
    Mutation("loop stops at 1", lambda n: range(1, n + 1), indices=lambda k: range(k - 1, 0, -1)),
    Mutation(
        "a step skipped", lambda n: range(1, n + 1), indices=lambda k: [*range(k - 1, k // 2, -1), *range(k // 2)[::-1]]
    ),
    Mutation(
        "a step repeated",
        lambda n: range(1, n + 1),
        indices=lambda k: [*range(k - 1, k // 2 - 1, -1), *range(k // 2 + 1)[::-1]],
    ),
    Mutation("noise at index 0", lambda n: range(1, n + 1), noise_at_zero=True),
    Mutation("model told the next time", lambda n: range(1, n), told_shift=1),
    Mutation("first order only", lambda n: range(3, n + 1), ahead=0.0, for_multistep=True),
    Mutation("a whole step ahead", lambda n: range(3, n + 1), ahead=1.0, for_multistep=True),
]


def signal_levels(num_steps):
    """abar at `num_steps` evenly spaced steps, from the first to the last of 1000."""
    return ABAR[[round(i * 999 / (num_steps - 1)) for i in range(num_steps)]]


def exact_start(abar, k, shift=0):
    """Factors (signal, noise) of x_k = signal * x_0 + noise * eps."""
    if k == len(abar):
        return 0.0, 1.0  # pure noise
    level = 1.0 if k + shift == 0 else abar[k - 1 + shift]
    return np.sqrt(level), np.sqrt(1 - level)


def predictions(abar, i, mutation):
    """Predicted noise and clean image, each as (offset, gain) of x_i."""
    a, told = abar[i], abar[i + mutation.told_shift]
    slope = np.sqrt(1 - told) / (told * S2 + 1 - told)
    eps = np.array([-slope * np.sqrt(told) * MU, slope])
    return eps, (np.array([np.zeros(4), np.ones(4)]) - np.sqrt(1 - a) * eps) / np.sqrt(a)


def exact_step(sampler, abar, i, mutation):
    """One denoising step, x_{i-1} = offset + gain * x_i + noise * z, from the definition of abar and Bayes' rule."""
    a, a_prev = abar[i], abar[i - 1] if i > 0 else 1.0
    r = a / a_prev  # x_i = sqrt(r) x_{i-1} + sqrt(1 - r) z
    eps, start = predictions(abar, i, mutation)
    if i == 0:
        # x_{-1} is the clean image, without noise. A mistaken draw would have the variance of the next step.
        offset, gain = start
        noise = exact_step(sampler, abar, 1, NONE)[2] if mutation.noise_at_zero else 0.0
        return offset, gain, noise
    # q(x_{i-1} | x_i, x_0): the precisions of its two sources add up.
    small = 1 / (1 / (1 - a_prev) + r / (1 - r))
    if sampler.eta is not None:
        variance = sampler.eta**2 * small
        offset, gain = np.sqrt(a_prev) * start + np.sqrt(1 - a_prev - variance) * eps
    else:
        fraction = {"small": 0.0, "large": 1.0, "learned": (LEARNED + 1) / 2}[sampler.variance]
        variance = (1 - r) ** fraction * small ** (1 - fraction)
        offset, gain = small * np.sqrt(a_prev) / (1 - a_prev) * start
        gain = gain + small * np.sqrt(r) / (1 - r)
    return offset, gain, np.sqrt(variance)


def exact_loop(sampler, abar, k, mutation=NONE):
    """All steps from x_k."""
    total, before = Affine(np.zeros(4), np.ones(4), np.zeros((0, 4))), None
    for i in mutation.indices(k):
        offset, gain, noise = exact_step(sampler, abar, i, mutation)
        start = total.then(*predictions(abar, i, mutation)[1], 0.0)
        total = total.then(offset, gain, noise)
        if sampler.multistep:
            if before is not None and i > 0:
                total = total.plus(exact_extrapolation(abar, i, mutation), start, before)
            before = start
    return total


def exact_extrapolation(abar, i, mutation):
    """Factor of x_0(i) - x_0(i + 1) in x_{i-1}.

    SDE-DPM-Solver++(2M) integrates 2 exp(-2 (l' - l)) x_0 over l = log(signal / noise) up to its next value l'. It
    reads x_0 in the middle of the step, from a line in l, or from that of equal steps if this step is longer.
    """
    here, there, earlier = (np.log(np.sqrt(abar[j] / (1 - abar[j]))) for j in (i, i - 1, i + 1))
    weight = np.sqrt(abar[i - 1]) * (1 - np.exp(-2 * (there - here)))
    return weight * mutation.ahead * min(1, (there - here) / (here - earlier))


# The loop, measured


class OneImpulsePerRow:
    """Noise that is 0, except for draw j of row 2 + j, which is 1."""

    def __init__(self):
        self.draw = 0

    def randn(self, shape, device=None, dtype=None):
        noise = torch.zeros(tuple(shape), device=device, dtype=dtype)
        noise[2 + self.draw] = 1
        self.draw += 1
        return noise


def measured_loop(sampler, diffusion, k):
    """The linear response of the loop, without sampling error: to x_k = 1 and to each draw."""
    x_k = torch.zeros(2 + k, 4, 1, 1)
    x_k[1] = 1
    out = sampler.sample(diffusion, x_k, k, OneImpulsePerRow()).double().numpy()[:, :, 0, 0]
    return Affine(out[0], out[1] - out[0], out[2:] - out[0])


def measured_start(diffusion, k):
    """Factors (signal, noise) of x_k."""
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    return noised_image(diffusion, one, k, zero).item(), noised_image(diffusion, zero, k, one).item()


TOLERANCE = 1e-5  # float32, numbers of order 1


@pytest.mark.parametrize("num_steps", LENGTHS)
@each_sampler
def test_the_loop_is_the_exact_affine_map(sampler, num_steps):
    """Offset, gain and response to each draw, for all k."""
    diffusion, abar = sampler.diffusion(num_steps), signal_levels(num_steps)
    for k in range(num_steps + 1):
        np.testing.assert_allclose(measured_start(diffusion, k), exact_start(abar, k), atol=1e-6, err_msg=f"k = {k}")
        measured, exact = measured_loop(sampler, diffusion, k), exact_loop(sampler, abar, k)
        for part in ("offset", "gain", "noise"):
            np.testing.assert_allclose(
                getattr(measured, part), getattr(exact, part), rtol=0, atol=TOLERANCE, err_msg=f"{part}, k = {k}"
            )


@pytest.mark.parametrize(
    ("sampler", "mutation"),
    # DDIM adds no noise at index 0.
    [
        (s, m)
        for s in SAMPLERS
        for m in MUTATIONS
        if s.eta is None or not m.noise_at_zero
        if s.multistep >= m.for_multistep
    ],
    ids=str,
)
def test_every_mistake_would_be_seen(sampler, mutation):
    """Each mistake changes the mean or standard deviation of the result by far more than the tolerance."""
    num_steps = 10
    diffusion, abar = sampler.diffusion(num_steps), signal_levels(num_steps)
    for k in mutation.ks(num_steps):
        law = measured_loop(sampler, diffusion, k).law(*measured_start(diffusion, k))
        mistaken = exact_loop(sampler, abar, k, mutation).law(*exact_start(abar, k, mutation.start_shift))
        right = exact_loop(sampler, abar, k).law(*exact_start(abar, k))
        assert np.abs(law - right).max() < 4 * TOLERANCE
        assert np.abs(law - mistaken).max() > 100 * TOLERANCE, f"k = {k}"


@pytest.mark.parametrize("num_steps", LENGTHS)
@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s.eta != 0.5], ids=str)
def test_samples_have_the_exact_mean_and_variance(sampler, num_steps):
    """With real noise, mean and standard deviation agree within 5 standard errors."""
    diffusion, abar = sampler.diffusion(num_steps), signal_levels(num_steps)
    generator = torch.Generator().manual_seed(num_steps)
    pixels = 2_000_000 // num_steps  # of each kind
    x_start = torch.from_numpy(X_START).float().view(1, 4, 1, 1).expand(50, 4, 50, pixels // 2500)
    for k in range(num_steps + 1):
        x_k = noised_image(diffusion, x_start, k, torch.randn(x_start.shape, generator=generator))
        sample = sampler.sample(diffusion, x_k, k, generator).double()
        mean, deviation = exact_loop(sampler, abar, k).law(*exact_start(abar, k))
        mean_error = sample.mean((0, 2, 3)).numpy() - mean
        variance_error = sample.var((0, 2, 3)).numpy() - deviation**2
        assert np.all(np.abs(mean_error) < 5 * deviation / pixels**0.5 + TOLERANCE), f"k = {k}"
        assert np.all(np.abs(variance_error) < 5 * deviation**2 * (2 / pixels) ** 0.5 + TOLERANCE), f"k = {k}"


@pytest.mark.parametrize("k", [200, 500, 800, 1000])
@pytest.mark.parametrize("sampler", SAMPLERS[:3], ids=str)
def test_many_small_steps_draw_from_the_posterior(sampler, k):
    r"""With all 1000 steps, \hat x_0(k) is a draw from p(x_0 | x_k), which is known in closed form.

    They agree to 1% of its standard deviation, the discretisation error. (Data with s = 0.01 would need more steps.)
    """
    diffusion, kinds = sampler.diffusion(1000), slice(1, 4)
    mean, deviation = measured_loop(sampler, diffusion, k).law(*measured_start(diffusion, k))
    signal, noise = exact_start(ABAR, k)
    weight = signal * S2 / (signal**2 * S2 + noise**2)  # E[x_0 | x_k] = mu + weight (x_k - signal mu)
    exact_mean = MU + weight * signal * (X_START - MU)
    exact_deviation = np.sqrt(S2 * (1 - weight * signal) + (weight * noise) ** 2)
    np.testing.assert_array_less(np.abs(mean - exact_mean)[kinds], 0.01 * exact_deviation[kinds])
    np.testing.assert_allclose(deviation[kinds], exact_deviation[kinds], rtol=0.01)


def variance_error(sampler, num_steps):
    """Relative error of the variance of samples from the middle of the chain, for data of variance 0.25, 1 and 16."""
    diffusion, abar, k = sampler.diffusion(num_steps), signal_levels(num_steps), num_steps // 2
    _, deviation = measured_loop(sampler, diffusion, k).law(*measured_start(diffusion, k))
    signal, noise = exact_start(abar, k)
    weight = signal * S2 / (signal**2 * S2 + noise**2)
    exact = S2 * (1 - weight * signal) + (weight * noise) ** 2
    return (deviation**2 / exact - 1)[1:]


@pytest.mark.parametrize(("sampler", "order", "most"), [(SAMPLERS[0], 1, 0.06), (SAMPLERS[-1], 2, 0.002)], ids=str)
def test_order_of_convergence(sampler, order, most):
    """Twice as many steps halve the error of the variance at first order, and at least quarter it at second order."""
    few, many = (variance_error(sampler, n) for n in (125, 250))
    assert np.all(np.abs(many) < most)
    measured = np.log2(few / many)
    assert np.all(measured > order - 0.2) and (order == 2 or np.all(measured < order + 0.2))


def test_few_steps_of_second_order_keep_the_variance_of_the_data():
    """50 steps of the solver are better than 250 of DDPM, also for data of small variance, the details of an image.

    The data are drawn from the distribution that the denoiser is exact for, so the samples should be, too.
    """
    errors = {}
    for sampler, num_steps in ((SAMPLERS[0], 250), (SAMPLERS[-1], 50)):
        abar, k = signal_levels(num_steps), num_steps // 2
        loop, (signal, noise) = exact_loop(sampler, abar, k), exact_start(abar, k)
        variance = loop.gain**2 * (signal**2 * S2 + noise**2) + (loop.noise**2).sum(0)
        errors[str(sampler)] = np.abs(variance / S2 - 1)
    assert np.all(errors["sde-dpmsolver++"][1:] < np.minimum(0.03, errors["ddpm-small"][1:]))
