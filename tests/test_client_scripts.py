"""Scripts that other people have written for guided-diffusion and for the released experiment, in miniature.

Every test uses the original's names as such scripts do, and nothing of ours besides.
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import os

from guided_diffusion import dist_util
from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, _extract_into_tensor
from guided_diffusion.image_datasets import (
    ImageDataset,
    _list_image_files_recursively,
    _list_images_per_classes,
    _list_starting_images,
    load_data,
)
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.respace import SpacedDiffusion, _WrappedModel, space_timesteps
from guided_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from guided_diffusion.torch_classifiers import load_classifier

import numpy as np
import pytest
import torch
import torch as th
import torchvision
from conftest import SMALL_MODEL, load_script
from PIL import Image
from reference import seeded

SMALL = {"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "8", "num_heads": 1}
SHAPE = (2, 3, 8, 8)


def diffusion_of(kind=SpacedDiffusion, **options):
    """10 of 100 steps, as a client builds them for a subclass of its own."""
    more = {"use_timesteps": space_timesteps(100, "10")} if issubclass(kind, SpacedDiffusion) else {}
    return kind(
        betas=gd.get_named_beta_schedule("linear", 100),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=options.pop("model_var_type", gd.ModelVarType.FIXED_LARGE),
        loss_type=gd.LossType.MSE,
        **more,
        **options,
    )


def eps_model(x, t, **kwargs):
    return th.sin(3 * x + t.view(-1, 1, 1, 1) / 100)


# Factories and flags


FACTORIES = [
    (create_model_and_diffusion, model_and_diffusion_defaults),
    (sr_create_model_and_diffusion, sr_model_and_diffusion_defaults),
    (create_classifier_and_diffusion, classifier_and_diffusion_defaults),
]


@pytest.mark.parametrize(("create", "defaults"), FACTORIES)
def test_flags_are_chosen_by_the_parameters_of_a_factory(create, defaults):
    names = inspect.getfullargspec(create).args
    more = {"channel_mult", "classifier_channel_mult"}
    assert names and set(names) | more == set(defaults()) | more
    kwargs = {"num_channels": 32, "classifier_width": 64, "num_res_blocks": 1, "classifier_depth": 1, "num_heads": 1}
    kwargs = {**defaults(), **{name: value for name, value in kwargs.items() if name in names}}
    with torch.device("meta"):
        model, diffusion = create(*(kwargs[name] for name in names))
        named, _ = create(**kwargs)
    assert [w.shape for w in model.parameters()] == [w.shape for w in named.parameters()]
    assert diffusion.num_timesteps == 1000
    with pytest.raises(TypeError, match="num_chanels"):
        create(**kwargs, num_chanels=64)
    with pytest.raises(TypeError, match="learn_sigma"):
        create(**{name: value for name, value in kwargs.items() if name != "learn_sigma"})


def test_flags_of_a_client_are_what_its_defaults_say():
    defaults = {"seed": 0, "num_samples": "", "image_size": None, "batch_size": "4", "lr": 0.1, "fast": False}
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, defaults)
    assert args_to_dict(parser.parse_args([]), defaults) == defaults
    words = ["--seed", "-1", "--num_samples", "all", "--image_size", "64x32", "--lr", "1", "--fast", "yes"]
    expected = {"seed": -1, "num_samples": "all", "image_size": "64x32", "batch_size": "4", "lr": 1.0, "fast": True}
    assert args_to_dict(parser.parse_args(words), defaults) == expected


# Time steps of a spaced diffusion


@pytest.mark.parametrize("rescale", [False, True])
def test_loops_outside_scale_timesteps_for_the_wrapped_model(rescale):
    diffusion, seen = diffusion_of(rescale_timesteps=rescale), []
    x, t = seeded(SHAPE, 0), th.tensor([3, 9])
    model = diffusion._wrap_model(lambda x, ts, **kwargs: seen.append((ts, kwargs)) or x)
    model(x, diffusion._scale_timesteps(t), y=1)
    original = th.tensor(diffusion.timestep_map)[t]
    ((times, kwargs),) = seen
    assert kwargs == {"y": 1} and th.equal(times, original * 10.0 if rescale else original)
    assert th.equal(diffusion._scale_timesteps(t), t)
    assert diffusion._wrap_model(model) is model
    by_hand = _WrappedModel(lambda x, ts: ts, diffusion.timestep_map, rescale, diffusion.original_num_steps)
    assert th.equal(by_hand(x, t), times)

    plain = diffusion_of(GaussianDiffusion, rescale_timesteps=rescale)
    assert th.equal(plain._scale_timesteps(t), t * 10.0 if rescale else t)


@pytest.mark.parametrize("kind", [GaussianDiffusion, SpacedDiffusion])
def test_a_subclass_scales_timesteps_in_its_own_way(kind):
    class Early(kind):
        def _scale_timesteps(self, t):
            return t.clamp(max=1)

    seen = []

    def model(x, ts):
        seen.append(ts.tolist())
        return th.zeros_like(x)

    diffusion, t = diffusion_of(Early), th.tensor([1, 5])
    x = th.zeros(SHAPE)
    out = diffusion.p_mean_variance(model, x, t)
    diffusion.training_losses(model, x, t)
    diffusion.condition_mean(model, out, x, t)
    diffusion.condition_score(model, out, x, t)
    assert seen == [[11, 11] if kind is SpacedDiffusion else [1, 1]] * 4


# Overrides


def test_overrides_of_every_method_of_a_loop_are_called():
    """Each knows only the original's arguments, some as **kw."""
    calls = []

    class Steered(SpacedDiffusion):
        def p_mean_variance(self, model, x, t, **kw):
            calls.append("p_mean_variance")
            assert set(kw) <= {"clip_denoised", "denoised_fn", "model_kwargs"}
            return super().p_mean_variance(model, x, t, **kw)

        def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
            calls.append("p_sample")
            return super().p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        def ddim_sample(
            self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0
        ):
            calls.append("ddim_sample")
            return super().ddim_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)

        def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
            calls.append("condition_mean")
            return super().condition_mean(cond_fn, p_mean_var, x, t, model_kwargs=model_kwargs)

        def p_sample_loop_progressive(self, model, shape, **kw):
            calls.append("p_sample_loop_progressive")
            assert "generator" not in kw
            yield from super().p_sample_loop_progressive(model, shape, **kw)

        def ddim_sample_loop_progressive(self, model, shape, **kw):
            calls.append("ddim_sample_loop_progressive")
            assert "generator" not in kw
            yield from super().ddim_sample_loop_progressive(model, shape, **kw)

    diffusion, plain = diffusion_of(Steered), diffusion_of()
    guide = {"cond_fn": lambda x, t: -x}
    for loop, options in (("p_sample_loop", guide), ("ddim_sample_loop", {"eta": 0.5})):
        samples = []
        for d in (diffusion, plain):
            th.manual_seed(0)
            samples.append(getattr(d, loop)(eps_model, SHAPE, **options))
        assert th.equal(*samples)
    diffusion.calc_bpd_loop(eps_model, th.zeros(SHAPE))
    diffusion.ddim_reverse_sample(eps_model, th.zeros(SHAPE), th.tensor([1, 2]))
    counts = {name: calls.count(name) for name in set(calls)}
    assert counts == {
        "p_mean_variance": 31,
        "p_sample": 10,
        "ddim_sample": 10,
        "condition_mean": 10,
        "p_sample_loop_progressive": 1,
        "ddim_sample_loop_progressive": 1,
    }


def test_a_mixin_receives_the_wrapped_model():
    """Its mean is in the line of inheritance behind the spaced diffusion, as in cooperative subclasses."""

    class Half(GaussianDiffusion):
        def p_mean_variance(self, model, x, t, **kw):
            self.seen = model(x, self._scale_timesteps(t))
            return super().p_mean_variance(model, x, t, **kw)

    class SpacedHalf(SpacedDiffusion, Half):
        pass

    diffusion = diffusion_of(SpacedHalf)
    t = th.tensor([2, 9])
    diffusion.p_sample(lambda x, ts: x * 0 + ts.view(-1, 1, 1, 1), th.zeros(SHAPE), t)
    assert diffusion.seen[:, 0, 0, 0].tolist() == [diffusion.timestep_map[2], diffusion.timestep_map[9]]


def test_losses_of_a_subclass_use_the_bound_and_the_schedule():
    class Weighted(SpacedDiffusion):
        def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
            model = self._wrap_model(model)
            noise = th.randn_like(x_start) if noise is None else noise
            x_t = self.q_sample(x_start, t, noise=noise)
            output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
            bound = self._vb_terms_bpd(lambda *args, r=output: r, x_start, x_t, t, clip_denoised=False)
            weight = _extract_into_tensor(self.betas, t, x_start.shape)
            assert weight.shape == x_start.shape and weight.dtype == th.float32
            return {"loss": bound["output"] + (weight * (noise - output) ** 2).mean(dim=(1, 2, 3))}

    diffusion, plain = diffusion_of(Weighted), diffusion_of()
    x, t, noise = seeded(SHAPE, 0).clamp(-1, 1), th.tensor([0, 7]), seeded(SHAPE, 1)
    mse = plain.training_losses(eps_model, x, t, noise=noise)["mse"]
    plain.loss_type = gd.LossType.KL
    bound = plain.training_losses(eps_model, x, t, noise=noise)["loss"]
    beta = th.tensor(plain.betas)[t].float()
    th.testing.assert_close(diffusion.training_losses(eps_model, x, t, noise=noise)["loss"], bound + beta * mse)


class Wider(SpacedDiffusion):
    """Adds 1 to the log-variance; its helpers accept keywords only."""

    def p_mean_variance(self, model, x, t, **kw):
        out = super().p_mean_variance(model, x, t, **kw)
        return {**out, "log_variance": out["log_variance"] + 1}

    def q_posterior_mean_variance(self, *, x_start, x_t, t):
        return super().q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)

    def _predict_xstart_from_xprev(self, *, x_t, t, xprev):
        return super()._predict_xstart_from_xprev(x_t=x_t, t=t, xprev=xprev)


def two_outputs(x, t, **kwargs):
    return th.cat([eps_model(x, t), 0.1 * x], dim=1)


@pytest.mark.parametrize("mean", gd.ModelMeanType)
@pytest.mark.parametrize("loss", gd.LossType)
def test_losses_and_likelihoods_use_an_overridden_step(mean, loss):
    x, t, noise = seeded(SHAPE, 0).clamp(-1, 1), th.tensor([0, 7]), seeded(SHAPE, 1)
    bounds = []
    for kind in (Wider, SpacedDiffusion):
        diffusion = diffusion_of(kind, model_var_type=gd.ModelVarType.LEARNED_RANGE)
        diffusion.loss_type, diffusion.model_mean_type = loss, mean
        terms = diffusion.training_losses(two_outputs, x, t, noise=noise)
        bounds.append(terms.get("vb", terms["loss"]))
        scale = {"RESCALED_KL": diffusion.num_timesteps, "RESCALED_MSE": diffusion.num_timesteps / 1000}
        x_t = diffusion.q_sample(x, t, noise=noise)
        own = diffusion._vb_terms_bpd(two_outputs, x, x_t, t, clip_denoised=False)["output"]
        th.testing.assert_close(bounds[-1], own * scale.get(loss.name, 1))
    assert not th.isclose(*bounds).any()


def test_an_overridden_bound_is_used():
    class Nothing(SpacedDiffusion):
        def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
            return {**super()._vb_terms_bpd(model, x_start, x_t, t, clip_denoised), "output": th.zeros(len(t))}

    diffusion, x = diffusion_of(Nothing), th.zeros(SHAPE)
    assert diffusion.calc_bpd_loop(eps_model, x)["vb"].sum() == 0
    diffusion.loss_type = gd.LossType.KL
    assert diffusion.training_losses(eps_model, x, th.tensor([0, 7]))["loss"].tolist() == [0, 0]


def test_attributes_of_a_subclass():
    """Arrays of any type, and names that a client may choose."""

    class Named(SpacedDiffusion):
        def __init__(self, **options):
            super().__init__(**options)
            self.names = np.array(["cat", "dog"])
            self.backwards = np.arange(10)[::-1]
            self.log_betas = np.log(self.betas) + 5
            self.extrapolation = "none"
            self._schedule = [1, 2, 3]

        def _denoise(self, x):
            return x / 0

    th.manual_seed(0)
    found = diffusion_of(Named).p_sample_loop(eps_model, SHAPE)
    th.manual_seed(0)
    assert th.equal(found, diffusion_of().p_sample_loop(eps_model, SHAPE))


def test_a_diffusion_with_a_constructor_of_its_own():
    """It sets the original's attributes itself, as an object unpickled from another version has them."""
    diffusion, plain = object.__new__(SpacedDiffusion), diffusion_of()
    vars(diffusion).update({name: value for name, value in vars(plain).items() if name[0] != "_"})
    x, t = seeded(SHAPE, 0), th.tensor([3, 7])
    assert th.equal(diffusion.q_sample(x, t, noise=x), plain.q_sample(x, t, noise=x))
    assert th.equal(diffusion.p_mean_variance(eps_model, x, t)["mean"], plain.p_mean_variance(eps_model, x, t)["mean"])


def test_timesteps_to_keep(capsys):
    """Floats and numbers that do not exist, as NumPy's ranges have them."""
    options = {"betas": gd.get_named_beta_schedule("linear", 100), "model_mean_type": gd.ModelMeanType.EPSILON}
    options |= {"model_var_type": gd.ModelVarType.FIXED_LARGE, "loss_type": gd.LossType.MSE}
    for steps in (np.linspace(0, 99, 10), range(0, 101, 11), np.arange(0, 100, 11)):
        diffusion = SpacedDiffusion(use_timesteps=set(steps), **options)
        assert diffusion.timestep_map == list(range(0, 100, 11)) and diffusion.use_timesteps == set(steps)
        assert all(type(t) is int for t in diffusion.timestep_map)
    assert capsys.readouterr().err == ""
    assert SpacedDiffusion(use_timesteps=[0, 50, 100, 120], **options).timestep_map == [0, 50]
    assert "use_timesteps: ignoring 100..120; expected some of 0..99" in capsys.readouterr().err


def test_unknown_kinds_are_not_taken_for_others():
    x, t = th.zeros(SHAPE), th.tensor([3, 7])
    for name in ("model_mean_type", "model_var_type", "loss_type"):
        diffusion = diffusion_of()
        setattr(diffusion, name, "other")
        method = diffusion.p_mean_variance if name == "model_var_type" else diffusion.training_losses
        with pytest.raises(NotImplementedError, match="other"):
            method(eps_model, x, t)


def test_shapes_that_the_original_accepts():
    diffusion, x = diffusion_of(), seeded(SHAPE, 0)
    t = th.tensor([3, 7])
    of_pixels = t[:, None, None, None].expand(2, 1, 8, 8)
    assert th.equal(diffusion.q_sample(x, of_pixels, noise=x), diffusion.q_sample(x, t, noise=x))
    assert _extract_into_tensor(diffusion.betas, of_pixels, x.shape).shape == x.shape
    assert diffusion.p_sample_loop(eps_model, SHAPE, noise=seeded((2, 3, 16, 16), 0)).shape == (2, 3, 16, 16)
    th.manual_seed(0)
    of_images = diffusion.ddim_sample(eps_model, x, t, eta=th.full((2, 1, 1, 1), 0.3))["sample"]
    th.manual_seed(0)
    th.testing.assert_close(diffusion.ddim_sample(eps_model, x, t, eta=0.3)["sample"], of_images)


def test_a_model_that_is_no_module_has_a_device():
    class Duck:
        def parameters(self):
            return iter([th.zeros(1, device="meta")])

        def __call__(self, x, t):
            assert x.device.type == "meta"
            return x

    assert diffusion_of().p_sample_loop(Duck(), SHAPE).device.type == "meta"


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("variance", ["FIXED_LARGE", "FIXED_SMALL", "LEARNED_RANGE"])
def test_tables_may_be_patched_after_their_first_use(variance, in_place):
    """The patched diffusion is used before, and the other is not: they agree."""
    used, fresh = (diffusion_of(model_var_type=gd.ModelVarType[variance]) for _ in range(2))
    x, t = seeded(SHAPE, 0), th.tensor([3, 7])

    def model(x, ts):
        eps = th.sin(x + ts.view(-1, 1, 1, 1))
        return th.cat([eps, eps], dim=1) if variance == "LEARNED_RANGE" else eps

    names = ("betas", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_variance")
    names += ("alphas_cumprod_prev", "sqrt_recip_alphas_cumprod")
    results = [used.p_mean_variance(model, x, t)]
    steps = [used.ddim_sample(model, x, t)["sample"]]
    for diffusion in (used, fresh):
        for name in names:
            patched = getattr(diffusion, name) * 0.9
            if in_place:
                getattr(diffusion, name)[:] = patched
            else:
                setattr(diffusion, name, patched)
        diffusion.timestep_map = [i + 1 for i in diffusion.timestep_map]
        results.append(diffusion.p_mean_variance(model, x, t))
        steps.append(diffusion.ddim_sample(model, x, t)["sample"])
    before, after, expected = results
    for key in before:
        assert th.equal(after[key], expected[key])
    assert not th.isclose(before["mean"], after["mean"]).all()
    assert not th.isclose(before["log_variance"], after["log_variance"]).any()
    assert th.equal(steps[1], steps[2]) and not th.isclose(steps[0], steps[1]).all()


# Seeds


def test_numpy_s_seed_governs_the_time_steps():
    sampler = create_named_schedule_sampler("uniform", diffusion_of())
    np.random.seed(3)  # noqa: NPY002, as scripts do
    expected = np.random.choice(10, size=(16,), p=np.full(10, 0.1))  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    steps, weights = sampler.sample(16, "cpu")
    assert steps.tolist() == expected.tolist() and (weights == 1).all()


def test_noise_is_drawn_before_a_guide_that_draws():
    """As a guide that cuts out random parts of the image does."""
    diffusion, x, t = diffusion_of(), seeded(SHAPE, 0), th.tensor([3, 7])
    th.manual_seed(0)
    found = diffusion.p_sample(eps_model, x, t, cond_fn=lambda x, t: th.randn_like(x))["sample"]
    th.manual_seed(0)
    noise, gradient = th.randn(SHAPE), th.randn(SHAPE)
    out = diffusion.p_mean_variance(eps_model, x, t)
    mean = out["mean"] + out["variance"] * gradient
    th.testing.assert_close(found, mean + th.exp(0.5 * out["log_variance"]) * noise)


def test_a_loop_draws_when_its_first_step_is_taken():
    diffusion = diffusion_of()
    th.manual_seed(0)
    expected = next(diffusion.p_sample_loop_progressive(eps_model, SHAPE))["sample"]
    steps = diffusion.p_sample_loop_progressive(eps_model, SHAPE)
    th.manual_seed(0)
    assert th.equal(next(steps)["sample"], expected)


def test_ddim_draws_as_often_as_ddpm():
    """A seeded script that samples twice has the same second batch: eta = 0 draws too, though it uses nothing."""
    diffusion = diffusion_of()
    th.manual_seed(0)
    diffusion.ddim_sample_loop(eps_model, SHAPE)
    after = th.randn(3)
    th.manual_seed(0)
    for _ in range(11):  # the start, and one per step
        th.randn(SHAPE)
    assert th.equal(after, th.randn(3))


# Images


@pytest.fixture
def folder(tmp_path):
    """Images whose classes and folders disagree, in two folders whose names sort otherwise as parts of paths."""
    greys = {"x/b_0.png": 10, "x-y/a_0.png": 20, "x/a_1.png": 30, "y/a_0.png": 40, "y/c_2.png": 50}
    for name, grey in greys.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 16), (grey,) * 3).save(tmp_path / name)
    return str(tmp_path)


def greys_of(batch):
    return ((batch[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


IN_ORDER = ["x/a_1.png", "x/b_0.png", "x-y/a_0.png", "y/a_0.png", "y/c_2.png"]
GREYS, LABELS = [30, 10, 20, 40, 50], [0, 1, 0, 0, 2]


def test_classes_are_prefixes_of_base_names(folder):
    data = load_data(
        data_dir=folder, batch_size=5, image_size=8, class_cond=True, deterministic=True, random_flip=False
    )
    batch, extra = next(data)
    assert greys_of(batch) == GREYS and set(extra) == {"y"} and extra["y"].tolist() == LABELS
    paths = _list_image_files_recursively(folder)
    assert paths == [os.path.join(folder, name) for name in IN_ORDER]
    names = [os.path.basename(path).split("_")[0] for path in paths]
    dataset = ImageDataset(8, paths, classes=[sorted(set(names)).index(name) for name in names], random_flip=False)
    assert [int(dataset[i][1]["y"]) for i in range(5)] == LABELS
    assert [greys_of(th.from_numpy(dataset[i][0])[None])[0] for i in range(5)] == GREYS


def test_data_sets_are_joined_and_loaders_are_closed(folder):
    paths = _list_image_files_recursively(folder)
    first, second = ImageDataset(8, paths[:2], random_flip=False), ImageDataset(8, paths[2:], random_flip=False)
    assert isinstance(first, torch.utils.data.Dataset)
    assert [greys_of(th.from_numpy((first + second)[i][0])[None])[0] for i in range(5)] == GREYS
    for more in ({}, {"drop_last": False}):
        data = load_data(data_dir=folder, batch_size=2, image_size=8, num_workers=1, **more)
        next(data)
        workers = multiprocessing.active_children()
        assert workers
        data.close()
        for worker in workers:
            worker.join(60)
        assert list(data) == [] and not multiprocessing.active_children()


def test_load_data_of_the_released_experiment(folder):
    chosen = _list_image_files_recursively(folder)[1:4]
    options = {"data_dir": folder, "batch_size": 2, "image_size": 8, "deterministic": True, "random_flip": False}
    data = load_data(**options, list_images=chosen, drop_last=False, class_cond=True, preprocess_fn=lambda x: x + 2)
    for _ in range(2):  # epochs
        for greys, names, labels in (([10, 20], ["b_0.png", "a_0.png"], [1, 0]), ([40], ["a_0.png"], [0])):
            batch, extra = next(data)
            assert greys_of(batch - 2) == greys
            assert extra["img_name"] == names and extra["y"].tolist() == labels
    dropping = load_data(**options, list_images=chosen, drop_last=True)
    assert [greys_of(next(dropping)[0]) for _ in range(2)] == [[10, 20]] * 2


def test_images_per_class_and_starting_images_are_listed(photographs, tmp_path):
    root = str(photographs)
    chosen = _list_images_per_classes(root, num_per_class=1, num_classes=3)
    names = ["n02123045/n02123045_1.JPEG", "n04008634/n04008634_1.JPEG", "n04485082/n04485082_1.jpg"]
    assert chosen == [os.path.join(root, name) for name in names]
    samples = [f"{tmp_path}/t_5_10_images/{os.path.splitext(name)[0]}_t0500.JPEG" for name in reversed(names)]
    assert _list_starting_images(root, samples) == chosen[::-1]
    flat = [os.path.join(str(tmp_path), os.path.basename(sample)) for sample in samples]
    assert _list_starting_images(root, flat) == chosen[::-1]
    with pytest.raises(ValueError, match=r"nothing_t0500.png' has no starting image"):
        _list_starting_images(root, [f"{tmp_path}/nothing_t0500.png"])


# The classifier


def test_load_classifier_gives_a_network_its_preprocessing_and_its_layers():
    assert inspect.signature(load_classifier).parameters["classifier_name"].default == "convnext_base"
    net, preprocess, names = load_classifier(classifier_name="resnet18", classifier_path="untrained")
    images = seeded((2, 3, 256, 256), 0).clamp(-1, 1)
    x = preprocess(images)
    preset = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    assert th.equal(x, preset((images + 1) / 2)) and th.equal(preprocess(images[0]), x[0])
    assert net(x).shape == (2, 1000) and not net.training
    modules = dict(net.named_modules())
    assert names[0] == "conv1" and names[-1] == "fc" and set(names) <= set(modules)


# The released experiment


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder, with a file of ConvNeXt Base whose weights are random."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder.parent))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = torchvision.models.convnext_base().state_dict()
    torch.save(weights, folder / "convnext_base-6075fbad.pth")


def test_the_released_experiment(photographs, small_checkpoint, hub, tmp_path):
    """Starting images, taken to a time and back, saved, and compared with their samples layer by layer."""
    N, step_reverse, size = 10, 3, 32
    flags = {**model_and_diffusion_defaults(), **SMALL_MODEL, "timestep_respacing": str(N)}
    model, diffusion = create_model_and_diffusion(**flags)
    model.load_state_dict(dist_util.load_state_dict(str(small_checkpoint), map_location="cpu"))
    model.to(dist_util.dev()).eval()

    listed = _list_images_per_classes(str(photographs), num_per_class=1, num_classes=3)
    options = {"batch_size": 2, "deterministic": True, "random_flip": False, "drop_last": False, "class_cond": True}
    data = load_data(data_dir=str(photographs), image_size=size, list_images=listed, **options)
    output = tmp_path / "t_3_10_images"
    output.mkdir()
    starts = []
    for _ in range(2):
        batch, extra = next(data)
        starts.append(batch)
        batch = batch.to(dist_util.dev())
        t = th.full((len(batch),), step_reverse - 1, device=dist_util.dev())
        noised = diffusion.q_sample(batch, t)
        sample = diffusion.p_sample_loop_forw_back(model, batch.shape, step_reverse, noise=noised, clip_denoised=True)
        assert sample.shape == batch.shape and th.isfinite(sample).all()
        pixels = ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        for image, name in zip(pixels, extra["img_name"], strict=True):
            Image.fromarray(image).save(output / f"{os.path.splitext(name)[0]}_t0300.JPEG")

    net, preprocess, names = load_classifier("convnext_base")
    assert len(names) == 41
    activations = {}

    def keep(name):
        return lambda module, args, out: activations.setdefault(name, []).append(out.flatten(1).cpu())

    hooks = [module.register_forward_hook(keep(name)) for name, module in net.named_modules() if name in names]
    samples = _list_image_files_recursively(str(output))
    pairs = _list_starting_images(str(photographs), samples)
    assert pairs == sorted(listed)
    folders = {str(photographs): pairs, str(output): samples}
    for data_dir, paths in folders.items():
        data = load_data(data_dir=data_dir, image_size=size, list_images=paths, preprocess_fn=preprocess, **options)
        with th.no_grad():
            for _ in range(2):
                logits = net(next(data)[0].to(dist_util.dev()))
                assert logits.shape[1] == 1000
    for hook in hooks:
        hook.remove()
    assert activations.keys() == set(names)
    for batches in activations.values():
        of_starts, of_samples = th.cat(batches[:2]), th.cat(batches[2:])
        cosine = th.cosine_similarity(of_starts, of_samples)
        assert cosine.shape == (3,) and (cosine <= 1 + 1e-5).all()


def test_the_loop_step_by_step_has_the_released_name():
    diffusion, x = diffusion_of(), seeded(SHAPE, 0)
    steps = list(diffusion.p_sample_loop_progressive_forw_back(eps_model, SHAPE, 4, noise=x))
    assert len(steps) == 4 and set(steps[0]) == {"sample", "pred_xstart"}


def test_the_released_script_takes_ten_classes():
    parser = load_script("forward_backward_dataset_sample.py").create_argparser()
    words = ["--data_dir", "x", "--model_path", "x", "--step_reverse", "1"]
    assert parser.parse_args(words).num_classes == 10
