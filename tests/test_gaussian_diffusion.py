"""Schedules, steps, loops and losses agree with the reference numbers and with each other."""

import inspect
import math
from functools import partial

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.errors import UserError
from guided_diffusion.losses import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.training.sample_grid import SampleGrid

import numpy as np
import pytest
import torch
from reference import HERE, golden, relative_error, seeded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GOLDEN = sorted(path.stem for path in (HERE / "golden").glob("diffusion_*.npz"))
SCHEDULES = {
    "timestep_map",
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}
LOST_DIGITS = {"ddim_reverse": 5e-5}  # where the reference subtracts nearly equal float32 numbers
SHAPE = (2, 3, 4, 4)
LOOPS = list(gd.SAMPLERS.values())


def sine_model(learn_sigma):
    """The model used for the reference numbers."""

    def model(x, t):
        t = t.float().view(-1, 1, 1, 1)
        eps = torch.sin(3 * x + t / 100)
        return torch.cat([eps, torch.cos(x + t / 50)], dim=1) if learn_sigma else eps

    return model


def diffusion_of(steps="10", **kwargs):
    return create_gaussian_diffusion(steps=1000, timestep_respacing=steps, **kwargs)


def seed(number=0):
    return torch.Generator().manual_seed(number)


# Against the reference


def test_there_are_reference_numbers():
    assert len(GOLDEN) == 4


@pytest.mark.parametrize("name", GOLDEN)
def test_schedule_equals_the_reference(name):
    ref = golden(name)
    diffusion = create_gaussian_diffusion(**ref.meta.kwargs)
    assert diffusion.num_timesteps == ref.meta.num_timesteps
    assert diffusion.original_num_steps == ref.meta.kwargs["steps"]
    assert list(diffusion.timestep_map) == ref.timestep_map.tolist()
    for schedule in SCHEDULES - {"timestep_map"}:
        ours = getattr(diffusion, schedule)
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, getattr(ref, schedule), rtol=1e-12, atol=1e-12, err_msg=schedule)


@pytest.mark.parametrize("name", GOLDEN)
def test_numbers_equal_the_reference(name):
    ref = golden(name)
    diffusion = create_gaussian_diffusion(**ref.meta.kwargs)
    model = sine_model(ref.meta.kwargs["learn_sigma"])
    x_start = seeded(ref.meta.x_shape, ref.meta.seed).clamp(-1, 1)
    x_t = seeded(ref.meta.x_shape, ref.meta.seed + 1)
    noise = seeded(ref.meta.x_shape, ref.meta.seed + 2)
    t = torch.from_numpy(ref.t)

    ours = {
        "q_sample": diffusion.q_sample(x_start, t, noise=noise),
        "ddim_eta0": diffusion.ddim_sample(model, x_t, t)["sample"],
        "ddim_reverse": diffusion.ddim_reverse_sample(model, x_t, t)["sample"],
        "prior_bpd": diffusion._prior_bpd(x_start),
    }
    for clip in (True, False):
        for key, value in diffusion.p_mean_variance(model, x_t, t, clip_denoised=clip).items():
            ours[f"p_{key}_clip{clip:d}"] = value
    for key, value in diffusion.training_losses(model, x_start, t, noise=noise).items():
        ours[f"loss_{key}"] = value

    assert ours.keys() == vars(ref).keys() - SCHEDULES - {"meta", "t"}
    for key, value in ours.items():
        expected = getattr(ref, key)
        assert value.shape == expected.shape, key
        for i in range(len(t)):  # separately, since timesteps differ by orders of magnitude
            if np.any(expected[i]):
                assert relative_error(value[i], expected[i]) < LOST_DIGITS.get(key, 1e-6), (key, i)
            else:
                assert not value[i].any(), (key, i)


# Schedules


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_identities(schedule):
    betas = gd.get_named_beta_schedule(schedule, 100)
    d = gd.GaussianDiffusion(
        betas=betas,
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
    )
    assert np.all(np.diff(d.alphas_cumprod) < 0)
    np.testing.assert_allclose(d.sqrt_alphas_cumprod**2 + d.sqrt_one_minus_alphas_cumprod**2, 1, rtol=1e-14)
    np.testing.assert_allclose(np.exp(d.log_one_minus_alphas_cumprod), 1 - d.alphas_cumprod, rtol=1e-12)
    np.testing.assert_allclose(d.sqrt_recip_alphas_cumprod**2 - d.sqrt_recipm1_alphas_cumprod**2, 1, rtol=1e-9)
    np.testing.assert_array_equal(d.alphas_cumprod_prev[1:], d.alphas_cumprod[:-1])
    np.testing.assert_array_equal(d.alphas_cumprod_next[:-1], d.alphas_cumprod[1:])
    assert d.alphas_cumprod_prev[0] == 1 and d.alphas_cumprod_next[-1] == 0 and d.posterior_variance[0] == 0
    # Averaged over q(x_t | x_0), q(x_{t-1} | x_t, x_0) is q(x_{t-1} | x_0).
    mean = d.posterior_mean_coef1 + d.posterior_mean_coef2 * d.sqrt_alphas_cumprod
    variance = d.posterior_variance + d.posterior_mean_coef2**2 * (1 - d.alphas_cumprod)
    np.testing.assert_allclose(mean, np.sqrt(d.alphas_cumprod_prev), rtol=1e-12)
    np.testing.assert_allclose(variance, 1 - d.alphas_cumprod_prev, rtol=1e-11)


def test_named_schedules():
    np.testing.assert_allclose(gd.get_named_beta_schedule("linear", 1000)[[0, -1]], [1e-4, 2e-2])
    cosine = gd.get_named_beta_schedule("cosine", 1000)
    assert cosine.max() == cosine[-1] == 0.999
    expected = (math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    np.testing.assert_allclose(np.cumprod(1 - cosine)[499], expected)
    np.testing.assert_allclose(gd.betas_for_alpha_bar(4, lambda time: 1 - time / 2), [1 / 8, 1 / 7, 1 / 6, 1 / 5])


def test_respaced_signal_is_that_of_the_original_steps():
    full = diffusion_of("")
    spaced = diffusion_of("10,15,20")
    np.testing.assert_allclose(spaced.alphas_cumprod, full.alphas_cumprod[spaced.timestep_map], rtol=1e-12)
    assert full.timestep_map == list(range(1000))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (5, {0, 25, 50, 74, 99}),
        ("5", {0, 25, 50, 74, 99}),
        ([5], {0, 25, 50, 74, 99}),
        ("1", {0}),
        ("2,1", {0, 49, 50}),
        ([1, 2, 3], {0, 34, 66, 67, 83, 99}),
        ("ddim4", {0, 25, 50, 75}),
        ("ddim34", set(range(0, 100, 3))),
        ("100", set(range(100))),
        ("ddim100", set(range(100))),
    ],
)
def test_space_timesteps(spec, expected):
    assert space_timesteps(100, spec) == expected


@pytest.mark.parametrize(
    "spec",
    ["ddim", "ddim7.5", "ddim37", "ddim101", "ten", "", "10,,5", "2.5", [2.5], "0", "-3", "101", "60,40", [], None],
)
def test_bad_respacing_names_the_flag(spec):
    with pytest.raises(UserError, match="--timestep_respacing"):
        space_timesteps(100, spec)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_single_step_predicts_the_clean_image(learn_sigma):
    diffusion = diffusion_of("1", learn_sigma=learn_sigma)
    model, x = sine_model(learn_sigma), seeded(SHAPE, 0)
    sample = diffusion.p_sample_loop(model, SHAPE, noise=x, generator=seed())
    expected = diffusion.p_mean_variance(model, x, torch.zeros(2, dtype=torch.long))["pred_xstart"]
    torch.testing.assert_close(sample, expected)


# Timesteps


@pytest.mark.parametrize(("rescale", "expected"), [(False, [0, 125, 249]), (True, [0, 500, 996])])
def test_the_model_receives_original_timesteps(rescale, expected):
    """In sampling, training and both kinds of guidance."""
    diffusion = create_gaussian_diffusion(steps=250, timestep_respacing="3", rescale_timesteps=rescale)
    assert diffusion.timestep_map == [0, 124, 249] or diffusion.timestep_map == [0, 125, 249]
    expected[1] = diffusion.timestep_map[1] * (4 if rescale else 1)
    seen = []

    def model(x, t, **kwargs):
        seen.append((t.tolist(), kwargs))
        return torch.zeros_like(x)

    t, x, kwargs = torch.arange(3), torch.zeros(3, 3, 4, 4), {"y": torch.arange(3)}
    diffusion.p_mean_variance(model, x, t, model_kwargs=kwargs)
    diffusion.training_losses(model, x, t, model_kwargs=kwargs)
    diffusion.p_sample(model, x, t, cond_fn=model, model_kwargs=kwargs)
    diffusion.ddim_sample(model, x, t, cond_fn=model, model_kwargs=kwargs)
    diffusion.sde_dpmsolver_sample(model, x, t, cond_fn=model, model_kwargs=kwargs)
    diffusion.ddim_reverse_sample(model, x, t, model_kwargs=kwargs)
    assert seen == [(expected, kwargs)] * 9


def test_a_plain_diffusion_rescales_its_own_steps():
    diffusion = gd.GaussianDiffusion(
        betas=np.full(20, 0.1),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
        rescale_timesteps=True,
    )
    seen = []
    diffusion.p_mean_variance(lambda x, t: seen.append(t) or x, torch.zeros(SHAPE), torch.tensor([3, 19]))
    torch.testing.assert_close(seen[0], torch.tensor([150.0, 950.0]))


# Steps


@pytest.mark.parametrize("var_type", list(gd.ModelVarType))
def test_the_three_predictions_are_one(var_type):
    """Predicting the noise, the clean image or the previous image is equivalent."""
    x_start, x, t = seeded(SHAPE, 1).clamp(-1, 1), seeded(SHAPE, 2), torch.tensor([1, 8])
    results = []
    for mean_type in gd.ModelMeanType:
        d = SpacedDiffusion(
            use_timesteps=range(0, 1000, 100),
            betas=gd.get_named_beta_schedule("linear", 1000),
            model_mean_type=mean_type,
            model_var_type=var_type,
            loss_type=gd.LossType.MSE,
        )
        said = {
            gd.ModelMeanType.EPSILON: d._predict_eps_from_xstart(x, t, x_start),
            gd.ModelMeanType.START_X: x_start,
            gd.ModelMeanType.PREVIOUS_X: d.q_posterior_mean_variance(x_start, x, t)[0],
        }[mean_type]
        learned = var_type in (gd.ModelVarType.LEARNED, gd.ModelVarType.LEARNED_RANGE)
        output = torch.cat([said, torch.full_like(said, -1.0)], dim=1) if learned else said
        results.append(d.p_mean_variance(lambda x, t, output=output: output, x, t))
    for other in results[1:]:
        for key in results[0]:
            torch.testing.assert_close(other[key], results[0][key], rtol=1e-4, atol=1e-5)
    small = d.q_posterior_mean_variance(x_start, x, t)[2]
    expected = {
        gd.ModelVarType.LEARNED: torch.full(SHAPE, -1.0),
        gd.ModelVarType.FIXED_LARGE: torch.from_numpy(np.log(d.betas)).float()[t].view(-1, 1, 1, 1).expand(SHAPE),
    }.get(var_type, small)
    torch.testing.assert_close(results[0]["log_variance"], expected)
    torch.testing.assert_close(results[0]["variance"], expected.exp())


def test_learned_range_runs_from_small_to_beta():
    diffusion, x, t = diffusion_of(learn_sigma=True), torch.zeros(SHAPE), torch.tensor([4, 7])

    def variance(value):
        output = torch.cat([x, torch.full_like(x, value)], dim=1)
        return diffusion.p_mean_variance(lambda x, t: output, x, t)["variance"][:, 0, 0, 0].double().numpy()

    np.testing.assert_allclose(variance(-1), diffusion.posterior_variance[t], rtol=1e-5)
    np.testing.assert_allclose(variance(1), diffusion.betas[t], rtol=1e-5)
    np.testing.assert_allclose(variance(0), np.sqrt(diffusion.posterior_variance * diffusion.betas)[t], rtol=1e-5)


def test_denoised_fn_comes_before_clipping():
    diffusion, x, t = diffusion_of(predict_xstart=True), torch.full(SHAPE, 0.75), torch.tensor([1, 5])

    def pred_xstart(**options):
        return diffusion.p_mean_variance(lambda x, t: x, x, t, **options)["pred_xstart"]

    assert (pred_xstart(denoised_fn=lambda x: 4 * x) == 1).all()
    assert (pred_xstart(denoised_fn=lambda x: 4 * x, clip_denoised=False) == 3).all()
    assert (pred_xstart(denoised_fn=lambda x: x / 2) == 0.375).all()


def test_no_noise_at_index_zero_only():
    diffusion, x, t = diffusion_of(), seeded(SHAPE, 1), torch.tensor([0, 1])
    with_noise = partial(diffusion.ddim_sample, eta=1.0)
    for step in (diffusion.p_sample, with_noise, diffusion.sde_dpmsolver_sample):
        one, other = (step(sine_model(False), x, t, generator=seed(s))["sample"] for s in (1, 2))
        assert torch.equal(one[0], other[0])
        assert not torch.isclose(one[1], other[1]).any()


def test_ddim_with_eta_one_is_ddpm_with_small_variance():
    diffusion, x, t = diffusion_of(sigma_small=True), seeded(SHAPE, 1), torch.tensor([0, 6])
    ddpm = diffusion.p_sample(sine_model(False), x, t, generator=seed())["sample"]
    ddim = diffusion.ddim_sample(sine_model(False), x, t, eta=1.0, generator=seed())["sample"]
    torch.testing.assert_close(ddim, ddpm, rtol=1e-4, atol=1e-5)


def multistep_by_hand(abar, i, x, start, before, noise):
    """x_{i-1} of SDE-DPM-Solver++(2M), as in the paper's appendix, in float64.

    `before` is the prediction at i + 1, None at first order. Steps that grow extrapolate like equal ones.
    """
    if i == 0:
        return start
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    level = np.log(alpha / sigma)
    h = level[i - 1] - level[i]
    decay = sigma[i - 1] / sigma[i] * np.exp(-h)
    weight = alpha[i - 1] * (1 - np.exp(-2 * h))
    x = decay * x + weight * start + sigma[i - 1] * np.sqrt(1 - np.exp(-2 * h)) * noise
    if before is not None:
        ratio = (level[i] - level[i + 1]) / h
        x = x + weight / 2 * (start - before) / max(1, ratio)
    return x


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("steps", ["10", "50", ""])
def test_a_multistep_step_is_the_equation(steps, learn_sigma):
    """At first and second order, at all indices at once."""
    diffusion = diffusion_of(steps, learn_sigma=learn_sigma)
    n = diffusion.num_timesteps
    t, shape = torch.arange(n - 1), (n - 1, 3, 2, 2)
    x, before, noise = (seeded(shape, i) for i in range(3))
    for previous in (None, before):
        out = diffusion.sde_dpmsolver_sample(
            sine_model(learn_sigma), x, t, previous_xstart=previous, generator=Draws(noise)
        )
        start = diffusion.p_mean_variance(sine_model(learn_sigma), x, t)["pred_xstart"]
        assert torch.equal(out["pred_xstart"], start)
        rows = [None if a is None else a.double().numpy() for a in (x, start, previous, noise)]
        for i in range(n - 1):
            here = [None if a is None else a[i] for a in rows]
            expected = multistep_by_hand(diffusion.alphas_cumprod, i, *here)
            np.testing.assert_allclose(out["sample"][i].double().numpy(), expected, rtol=1e-5, atol=1e-5)


class Draws:
    """A generator of given numbers."""

    def __init__(self, noise):
        self.noise = noise

    def randn(self, shape, device=None, dtype=None):
        assert tuple(shape) == tuple(self.noise.shape)
        return self.noise


def test_a_first_order_step_is_ddpm_with_small_variance():
    diffusion, x, t = diffusion_of(sigma_small=True), seeded(SHAPE, 1), torch.tensor([0, 9])
    ddpm, first = (
        step(sine_model(False), x, t, generator=seed())["sample"]
        for step in (diffusion.p_sample, diffusion.sde_dpmsolver_sample)
    )
    torch.testing.assert_close(first, ddpm)


def test_extrapolation_is_a_line_in_the_logarithm_of_signal_over_noise():
    """If steps are equal, half of the last difference; at neither end, and not in chains of one or two steps."""
    level = np.linspace(4, -4, 9)
    diffusion = gd.GaussianDiffusion(
        betas=gd.betas_from_alphas_cumprod(1 / (1 + np.exp(-2 * level))),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
    )
    np.testing.assert_allclose(gd.extrapolation(diffusion), [0, *[0.5] * 7, 0])
    for steps in ("1", "2"):
        assert gd.extrapolation(diffusion_of(steps)).tolist() == [0] * int(steps)


def test_ddim_noise_keeps_its_digits_in_float32():
    """At index 1 of a respaced chain, 1 - abar[0] is a difference of nearly equal numbers."""
    diffusion, t = diffusion_of("10", predict_xstart=True), torch.tensor([1])
    x = torch.ones(1, 1, 1, 1)
    step = diffusion.ddim_sample(lambda x, t: torch.zeros_like(x), x, t, eta=1.0, generator=Impulses({}))["sample"]
    assert step.item() == pytest.approx(diffusion.posterior_mean_coef2[1], rel=1e-4)


def test_ddim_reverse_undoes_ddim():
    diffusion, x, t = diffusion_of("50"), seeded(SHAPE, 3), torch.tensor([20, 30])
    eps = seeded(SHAPE, 4)
    back = diffusion.ddim_sample(lambda x, t: eps, x, t, clip_denoised=False)["sample"]
    forth = diffusion.ddim_reverse_sample(lambda x, t: eps, back, t - 1, clip_denoised=False)["sample"]
    torch.testing.assert_close(forth, x, rtol=1e-5, atol=1e-5)


# Guidance


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_guidance_moves_the_mean_by_variance_times_gradient(learn_sigma):
    diffusion, x, t = diffusion_of(learn_sigma=learn_sigma), seeded(SHAPE, 1), torch.tensor([2, 9])
    gradient = seeded(SHAPE, 5)
    model = sine_model(learn_sigma)
    out = diffusion.p_mean_variance(model, x, t)
    moved = diffusion.condition_mean(lambda x, t: gradient, out, x, t)
    assert torch.equal(moved, out["mean"] + out["variance"] * gradient)
    plain = diffusion.p_sample(model, x, t, generator=seed())["sample"]
    guided = diffusion.p_sample(model, x, t, cond_fn=lambda x, t: gradient, generator=seed())["sample"]
    torch.testing.assert_close(guided - plain, out["variance"] * gradient, rtol=1e-4, atol=1e-5)


def test_guidance_moves_the_score_by_the_gradient():
    diffusion, x, t = diffusion_of(), seeded(SHAPE, 1), torch.tensor([2, 9])
    gradient = seeded(SHAPE, 5)
    before = diffusion.p_mean_variance(sine_model(False), x, t)
    after = diffusion.condition_score(lambda x, t: gradient, before, x, t)
    noise_scale = torch.from_numpy(diffusion.sqrt_one_minus_alphas_cumprod).float()[t].view(-1, 1, 1, 1)
    score = [-diffusion._predict_eps_from_xstart(x, t, out["pred_xstart"]) / noise_scale for out in (before, after)]
    torch.testing.assert_close(score[1] - score[0], gradient, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after["mean"], diffusion.q_posterior_mean_variance(after["pred_xstart"], x, t)[0])
    assert torch.equal(after["variance"], before["variance"])
    for step in (diffusion.ddim_sample, diffusion.sde_dpmsolver_sample):
        guided = step(sine_model(False), x, t, cond_fn=lambda x, t: gradient)
        torch.testing.assert_close(guided["pred_xstart"], after["pred_xstart"])


@pytest.mark.parametrize("loop", LOOPS)
def test_guidance_by_a_gradient_inside_a_loop(loop):
    """A guide that differentiates, as the published one does, and pulls the samples towards 1."""

    def guide(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(-0.2 * ((x - 1) ** 2).sum(), x)[0]

    sample = getattr(diffusion_of("25"), f"{loop}_loop")
    plain, guided = (sample(sine_model(False), SHAPE, cond_fn=g, generator=seed()) for g in (None, guide))
    assert (guided - 1).square().mean() < 0.9 * (plain - 1).square().mean()
    assert not guided.requires_grad


# Loops


@pytest.mark.parametrize("loop", LOOPS)
def test_full_loop_is_forward_backward_with_all_steps(loop):
    diffusion, x = diffusion_of(learn_sigma=True), seeded(SHAPE, 7)
    options = {"eta": 0.5} if loop == "ddim_sample" else {}
    full = getattr(diffusion, f"{loop}_loop")(sine_model(True), SHAPE, noise=x, generator=seed(), **options)
    partial = getattr(diffusion, f"{loop}_loop_forw_back")
    assert torch.equal(full, partial(sine_model(True), SHAPE, 10, noise=x, generator=seed(), **options))
    assert not torch.equal(full, partial(sine_model(True), SHAPE, 9, noise=x, generator=seed(), **options))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("k", [None, 0, 1, 6, 10])
def test_progressive_loop_yields_every_step_of_the_plain_one(loop, k):
    diffusion, model, x = diffusion_of(), sine_model(False), seeded(SHAPE, 7)
    suffix, args = ("", ()) if k is None else ("_forw_back", (k,))
    plain = getattr(diffusion, f"{loop}_loop{suffix}")(model, SHAPE, *args, noise=x, generator=seed())
    steps = list(getattr(diffusion, f"{loop}_loop{suffix}_progressive")(model, SHAPE, *args, noise=x, generator=seed()))
    assert len(steps) == (10 if k is None else k)
    assert torch.equal(plain, steps[-1]["sample"] if steps else x)
    generator, memory = seed(), {}
    for i, out in enumerate(steps):
        t = torch.full((2,), len(steps) - 1 - i)
        expected = getattr(diffusion, loop)(model, x, t, generator=generator, **memory)
        assert out.keys() == {"sample", "pred_xstart"}
        assert all(torch.equal(out[key], expected[key]) for key in out)
        x = out["sample"]
        if loop == "sde_dpmsolver_sample":
            memory = {"previous_xstart": out["pred_xstart"]}


@pytest.mark.parametrize("suffix", ["", "_progressive", "_forw_back", "_forw_back_progressive"])
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_take_their_options_by_position_too(loop, suffix):
    method = getattr(diffusion_of(), f"{loop}_loop{suffix}")
    options = {"model": sine_model(False), "shape": SHAPE, "step_reverse": 4, "noise": seeded(SHAPE, 7)}
    options |= {"clip_denoised": False, "denoised_fn": torch.tanh, "cond_fn": lambda x, t: -x, "model_kwargs": {}}
    options |= {"device": "cpu", "progress": False, "eta": 0.5, "generator": None}
    names = list(inspect.signature(method).parameters)
    assert names == [n for n in options if (n != "step_reverse" or "forw" in suffix) and (n != "eta" or "ddim" in loop)]
    results = []
    for positional in (len(names) - 1, 2):
        options["generator"] = seed()
        values = [options[name] for name in names]
        out = method(*values[:positional], **dict(list(zip(names, values, strict=True))[positional:]))
        results.append(out if isinstance(out, torch.Tensor) else list(out)[-1]["sample"])
    assert torch.equal(*results)
    with pytest.raises(TypeError, match="num_steps"):
        method(*values, num_steps=4)


@pytest.mark.parametrize("loop", LOOPS)
def test_no_steps_back_give_the_image_itself(loop):
    x = seeded(SHAPE, 7)
    assert getattr(diffusion_of(), f"{loop}_loop_forw_back")(sine_model(False), SHAPE, 0, noise=x) is x


@pytest.mark.parametrize("options", [*({"loop": loop} for loop in LOOPS), {"loop": "ddim_sample", "eta": 1.0}])
def test_all_randomness_comes_from_the_generator(options):
    options = dict(options)
    loop = getattr(diffusion_of(), options.pop("loop") + "_loop")
    state = torch.get_rng_state()
    one, same, other = (loop(sine_model(False), SHAPE, generator=seed(s), **options) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.isclose(one, other).all()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    torch.testing.assert_close(loop(sine_model(False), SHAPE, **options), one)  # the global generator by default


class Impulses:
    """A generator of zeros, except for the given draws."""

    def __init__(self, draws):
        self.draws, self.count = draws, 0

    def randn(self, shape, device=None, dtype=None):
        self.count += 1
        return torch.full(tuple(shape), self.draws.get(self.count - 1, 0.0), device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("loop", "eta", "draws"),
    [("p_sample", None, 6), ("ddim_sample", 1.0, 6), ("ddim_sample", 0.0, 0), ("sde_dpmsolver_sample", None, 6)],
)
def test_draws_per_loop(loop, eta, draws):
    """One draw per step, one for the start unless given, and none for deterministic steps."""
    options = {} if eta is None else {"eta": eta}
    loop = getattr(diffusion_of(), f"{loop}_loop_forw_back")
    for noise, extra in ((torch.zeros(SHAPE), 0), (None, 1)):
        generator = Impulses({})
        loop(sine_model(False), SHAPE, 6, noise=noise, generator=generator, **options)
        assert generator.count == draws + extra


def test_the_sample_grid_leaves_the_random_numbers_of_training_alone(tmp_path):
    grid = SampleGrid(diffusion_of(steps="3"), SHAPE, str(tmp_path), 0, torch.device("cpu"))
    state = torch.get_rng_state()
    grid(sine_model(False), 1)
    assert (tmp_path / "samples_000001.png").exists()
    assert torch.equal(state, torch.get_rng_state())


class OffDevice(TorchDispatchMode):
    """Records operations on tensors that are not on the device, while `active`.

    A copy from the host is one of them. What makes the host wait for the device (a number or a mask read back) is not
    possible on the meta device, which has no numbers, and raises; on a GPU it raises by `set_sync_debug_mode`.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.active, self.seen = torch.device(device), False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.active:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            if any(tensor.device.type != self.device.type for tensor in tensors):
                self.seen.append(func.name())
        return out


def operations_off_device(device, run_loop, whole):
    """Names of operations off the device in all of `run_loop`, or between the first and last calls of the model.

    `run_loop(model)` is a loop of 10 steps with `learn_sigma`.
    """
    calls = 0

    def model(x, t):
        nonlocal calls
        calls += 1
        recorder.active = whole or calls < 10
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if calls < 10 else "default")
        return sine_model(True)(x, t)

    with OffDevice(device) as recorder:
        recorder.active = whole
        try:
            run_loop(model)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert calls == 10
    return recorder.seen


DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("respaced", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [*({"loop": loop} for loop in LOOPS), {"loop": "ddim_sample", "eta": 1.0}])
def test_loops_neither_copy_nor_wait(device, respaced, options):
    options = {"device": device, "progress": True, "denoised_fn": torch.tanh, "cond_fn": lambda x, t: -x, **options}
    if respaced:
        diffusion = diffusion_of(learn_sigma=True, rescale_timesteps=True)
    else:
        diffusion = gd.GaussianDiffusion(
            betas=np.full(10, 0.1),
            model_mean_type=gd.ModelMeanType.EPSILON,
            model_var_type=gd.ModelVarType.LEARNED_RANGE,
            loss_type=gd.LossType.MSE,
        )
    loop = getattr(diffusion, options.pop("loop") + "_loop")
    assert operations_off_device(device, lambda model: loop(model, SHAPE, **options), whole=False) == []
    assert operations_off_device(device, lambda model: loop(model, SHAPE, **options), whole=True) == []


@pytest.mark.parametrize("device", DEVICES)
def test_the_check_sees_copies_and_waits(device):
    loop = diffusion_of(learn_sigma=True).p_sample_loop

    def seen(denoised_fn):
        return operations_off_device(
            device, lambda model: loop(model, SHAPE, device=device, denoised_fn=denoised_fn), whole=False
        )

    for wait in (lambda x: x * x.max().item(), lambda x: x if x.max() > 3 else -x, lambda x: x[x > 0].sum() + x):
        with pytest.raises(RuntimeError):
            seen(wait)
    if device == "meta":
        assert seen(lambda x: x * torch.tensor([2.0]).to(x.device))
        assert seen(lambda x: x * torch.as_tensor(np.ones(1)).to(x.device))


def test_tables_serve_training_after_inference_mode():
    diffusion, model = diffusion_of(learn_sigma=True), torch.nn.Conv2d(3, 6, 1)
    with torch.inference_mode():
        diffusion.p_sample_loop(lambda x, t: model(x), SHAPE)
    diffusion.training_losses(lambda x, t: model(x), torch.zeros(SHAPE), torch.tensor([0, 5]))["loss"].sum().backward()
    assert model.weight.grad.any()


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_keep_no_graph_and_leave_the_gradient_mode_alone(loop):
    model = torch.nn.Conv2d(3, 3, 1)
    steps = getattr(diffusion_of(), f"{loop}_loop_progressive")(lambda x, t: model(x), SHAPE)
    for out in steps:
        assert not out["sample"].requires_grad
        assert torch.is_grad_enabled()


def test_loops_work_where_the_model_is():
    model = torch.nn.Conv2d(3, 3, 1, device="meta")
    sample = diffusion_of().p_sample_loop_forw_back(StepBlind(model), SHAPE, 3, noise=torch.zeros(SHAPE))
    assert sample.device.type == "meta"


class StepBlind(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x)


@pytest.mark.parametrize("loop", LOOPS)
def test_progress_bar(loop, capsys):
    for progress in (False, True):
        getattr(diffusion_of(), f"{loop}_loop_forw_back")(sine_model(False), SHAPE, 7, progress=progress)
        assert ("7/7" in capsys.readouterr().err) == progress


# Losses


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_loss_types_differ_by_their_scales(learn_sigma):
    x_start, noise, t = seeded(SHAPE, 1).clamp(-1, 1), seeded(SHAPE, 2), torch.tensor([0, 24])
    terms = {}
    for loss_type in gd.LossType:
        diffusion = diffusion_of("25", learn_sigma=learn_sigma)
        diffusion.loss_type = loss_type
        terms[loss_type.name] = diffusion.training_losses(sine_model(learn_sigma), x_start, t, noise=noise)
    mse, rescaled, kl, rescaled_kl = (terms[name] for name in ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL"))
    assert kl.keys() == rescaled_kl.keys() == {"loss"}
    assert mse.keys() == rescaled.keys() == ({"loss", "mse", "vb"} if learn_sigma else {"loss", "mse"})
    torch.testing.assert_close(rescaled_kl["loss"], 25 * kl["loss"])
    torch.testing.assert_close(rescaled["mse"], mse["mse"])
    for terms in (mse, rescaled):
        torch.testing.assert_close(terms["loss"], terms["mse"] + terms.get("vb", 0))
    if learn_sigma:
        torch.testing.assert_close(mse["vb"], kl["loss"])
        torch.testing.assert_close(rescaled["vb"], 25 / 1000 * mse["vb"])


def test_the_bound_trains_the_variance_alone():
    diffusion, output = diffusion_of(learn_sigma=True), seeded((2, 6, 4, 4), 3).requires_grad_()
    terms = diffusion.training_losses(lambda x, t: output, torch.zeros(SHAPE), torch.tensor([0, 5]))
    (by_vb,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    (by_mse,) = torch.autograd.grad(terms["mse"].sum(), output)
    assert not by_vb[:, :3].any() and by_vb[:, 3:].all()
    assert by_mse[:, :3].all() and not by_mse[:, 3:].any()


@pytest.mark.parametrize("mean_type", list(gd.ModelMeanType))
def test_a_perfect_prediction_has_no_squared_error(mean_type):
    x_start, noise, t = seeded(SHAPE, 1).clamp(-1, 1), seeded(SHAPE, 2), torch.tensor([1, 7])
    diffusion = diffusion_of()
    diffusion.model_mean_type = mean_type
    x_t = diffusion.q_sample(x_start, t, noise=noise)
    target = {
        gd.ModelMeanType.EPSILON: noise,
        gd.ModelMeanType.START_X: x_start,
        gd.ModelMeanType.PREVIOUS_X: diffusion.q_posterior_mean_variance(x_start, x_t, t)[0],
    }[mean_type]
    assert not diffusion.training_losses(lambda x, t: target, x_start, t, noise=noise)["mse"].any()
    assert diffusion.training_losses(lambda x, t: target + 1, x_start, t, noise=noise)["mse"].all()


def test_normal_kl_is_the_divergence_of_gaussians():
    mean1, mean2, logvar1, logvar2 = seeded((4, 100), 1).double()
    p, q = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((mean1, logvar1), (mean2, logvar2)))
    torch.testing.assert_close(normal_kl(mean1, logvar1, mean2, logvar2), torch.distributions.kl_divergence(p, q))
    standard = torch.distributions.Normal(torch.zeros(100).double(), 1.0)
    torch.testing.assert_close(normal_kl(mean1, logvar1, 0.0, 0.0), torch.distributions.kl_divergence(p, standard))
    torch.testing.assert_close(normal_kl(0.0, 0.0, mean2, logvar2), torch.distributions.kl_divergence(standard, q))


def test_discretized_likelihood_is_a_distribution_over_8_bit_values():
    values = (torch.arange(256.0).double() / 127.5 - 1)[:, None]
    means, log_scales = torch.tensor([[-1.2, -0.5, 0.0, 0.3, 1.1]]).double(), torch.tensor([[-1.0, -3, -4.5, -6, -2]])
    probabilities = discretized_gaussian_log_likelihood(values, means=means, log_scales=log_scales.double()).exp()
    torch.testing.assert_close(probabilities.sum(0), torch.ones(5).double())
    inside = values[1:-1]
    normal = torch.distributions.Normal(means, log_scales.double().exp())
    exact = normal.cdf(inside + 1 / 255) - normal.cdf(inside - 1 / 255)
    torch.testing.assert_close(probabilities[1:-1], exact, atol=5e-4, rtol=0)


def test_approximate_cdf():
    x = torch.linspace(-6, 6, 1001).double()
    error = approx_standard_normal_cdf(x) - torch.special.ndtr(x)
    assert 1e-4 < error.abs().max() < 3e-4


def test_bits_per_dimension():
    """If the model predicts the clean image exactly, the bound is that of the prior and the pixels."""
    diffusion = diffusion_of(sigma_small=True, predict_xstart=True)
    x_start = ((seeded(SHAPE, 1).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    seen = []
    out = diffusion.calc_bpd_loop(lambda x, t: seen.append(t[0].item()) or x_start, x_start, generator=seed())
    assert seen == diffusion.timestep_map[::-1]
    assert {key: tuple(value.shape) for key, value in out.items()} == {
        "total_bpd": (2,),
        "prior_bpd": (2,),
        "vb": (2, 10),
        "xstart_mse": (2, 10),
        "mse": (2, 10),
    }
    assert not out["xstart_mse"].any() and (out["mse"] < 1e-6).all()
    assert not out["vb"][:, :-1].any() and (out["vb"][:, -1] > 0).all()
    torch.testing.assert_close(out["total_bpd"], out["vb"][:, -1] + out["prior_bpd"])


def test_bits_per_dimension_are_the_losses_of_each_time_step():
    diffusion = diffusion_of(learn_sigma=True, use_kl=True)
    x_start = seeded(SHAPE, 1).clamp(-1, 1)
    out = diffusion.calc_bpd_loop(sine_model(True), x_start, clip_denoised=False, generator=seed())
    generator = seed()
    for column, t in enumerate(range(9, -1, -1)):
        noise = torch.randn(SHAPE, generator=generator)
        terms = diffusion.training_losses(sine_model(True), x_start, torch.full((2,), t), noise=noise)
        torch.testing.assert_close(out["vb"][:, column], terms["loss"] / 10)
    prior = diffusion._prior_bpd(x_start)
    torch.testing.assert_close(out["total_bpd"], out["vb"].sum(1) + prior)
    again = diffusion.calc_bpd_loop(sine_model(True), x_start, clip_denoised=False, generator=seed())
    assert torch.equal(out["total_bpd"], again["total_bpd"])


# Bad input


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("k", [-1, 11, 2.5, 3.0, "half", None, float("nan")])
def test_bad_step_reverse(loop, k):
    for suffix in ("", "_progressive"):
        with pytest.raises(UserError, match=r"--step_reverse .*0 to 10"):
            getattr(diffusion_of(), f"{loop}_loop_forw_back{suffix}")(sine_model(False), SHAPE, k)


def test_whole_numbers_of_any_kind_are_steps():
    diffusion, x = diffusion_of(), seeded(SHAPE, 7)
    one, other = (diffusion.ddim_sample_loop_forw_back(sine_model(False), SHAPE, k, noise=x) for k in (3, np.int64(3)))
    assert torch.equal(one, other)


def test_bad_arguments_of_loops_and_steps():
    diffusion, x, t = diffusion_of(), torch.zeros(SHAPE), torch.tensor([1, 2])
    with pytest.raises(UserError, match=r"\(1, 3, 4, 4\).*\(2, 3, 4, 4\)"):
        diffusion.p_sample_loop(sine_model(False), SHAPE, noise=x[:1])
    with pytest.raises(UserError, match=r"\(2, 6, 4, 4\).*\(2, 3, 4, 4\).*--learn_sigma False"):
        diffusion.p_sample(sine_model(True), x, t)
    with pytest.raises(UserError, match=r"\(2, 3, 4, 4\).*\(2, 6, 4, 4\).*--learn_sigma True"):
        diffusion_of(learn_sigma=True).training_losses(sine_model(False), x, t)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="eta"):
            diffusion.ddim_sample(sine_model(False), x, t, eta=eta)
    with pytest.raises(UserError, match="eta"):
        diffusion.ddim_reverse_sample(sine_model(False), x, t, eta=0.5)
    with pytest.raises(UserError, match="sampler dpm: expected ddpm, ddim, sde-dpmsolver"):
        diffusion.loop_of("dpm")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"noise_schedule": "sigmoid"}, "--noise_schedule sigmoid.*linear or cosine"),
        ({"steps": 10}, "--diffusion_steps 10.*21"),
        ({"steps": 0}, "--diffusion_steps 0"),
        ({"timestep_respacing": "2000"}, "--timestep_respacing 2000.*1000"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UserError, match=message):
        create_gaussian_diffusion(**{"steps": 1000, **flags})


@pytest.mark.parametrize("betas", [[], [[0.1, 0.2]], [0.1, 0.0], [0.1, 1.5], [0.1, math.nan]])
def test_bad_betas(betas):
    with pytest.raises(UserError, match="betas"):
        gd.GaussianDiffusion(
            betas=betas,
            model_mean_type=gd.ModelMeanType.EPSILON,
            model_var_type=gd.ModelVarType.FIXED_SMALL,
            loss_type=gd.LossType.MSE,
        )


@pytest.mark.parametrize("steps", [[], [10, 11], [-1]])
def test_bad_timesteps_to_keep(steps):
    with pytest.raises(UserError, match=r"none of 0\.\.9"):
        SpacedDiffusion(use_timesteps=steps, betas=np.full(10, 0.1))
