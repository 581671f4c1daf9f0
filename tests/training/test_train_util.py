"""The training loop: against closed forms, against plain loops, stopped and resumed."""

import csv
import hashlib
import math
import os
import resource
import shutil
import signal
from pathlib import Path

from guided_diffusion import logger, resample
from guided_diffusion.command_line import stopping
from guided_diffusion.command_line.stopping import Stopped
from guided_diffusion.errors import ResultError, UserError, WriteError
from guided_diffusion.forward_backward import NoiseStreams
from guided_diffusion.fp16_util import MixedPrecisionTrainer, half_precision_dtype
from guided_diffusion.nn import timestep_embedding
from guided_diffusion.script_util import create_gaussian_diffusion, model_defaults, model_from_flags
from guided_diffusion.train_util import LossMeter, TrainLoop, find_resume_checkpoint, parse_rates
from guided_diffusion.training.start import choose_start, describe_newest

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL
from reference import fill_weights, relative_error
from torch import nn

TINY = {**model_defaults(), **SMALL_MODEL, "image_size": 8, "channel_mult": "1", "attention_resolutions": ""}


@pytest.fixture(autouse=True)
def _tidy():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are too small for more
    yield
    torch.set_num_threads(threads)
    logger.reset()


def tiny_model(**flags):
    torch.manual_seed(0)
    return model_from_flags({**TINY, **flags})


class Images:
    """A stream of random images that can be sought, as `load_data` gives."""

    def __init__(self, batch_size=8):
        self.batch_size, self.position = batch_size, 0

    def seek(self, position):
        self.position = position

    def __iter__(self):
        return self

    def __next__(self):
        images = [torch.Generator().manual_seed(self.position + i) for i in range(self.batch_size)]
        self.position += self.batch_size
        return torch.stack([torch.rand(3, 8, 8, generator=g) * 2 - 1 for g in images]), {}


def make_loop(folder, *, learn_sigma=True, model=None, data=None, diffusion=None, **options):
    logger.configure(folder, ("csv", "json"))
    options = {"batch_size": 8, "microbatch": -1, "lr": 1e-3, "ema_rate": "0.9", **options}
    return TrainLoop(
        model=model or tiny_model(learn_sigma=learn_sigma),
        diffusion=diffusion or create_gaussian_diffusion(steps=100, learn_sigma=learn_sigma),
        data=data or Images(options["batch_size"]),
        log_interval=options.pop("log_interval", 1),
        save_interval=options.pop("save_interval", 1000),
        output=str(folder),
        **options,
    )


def read_csv(folder):
    with open(Path(folder) / "progress.csv", newline="") as f:
        return list(csv.DictReader(f))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Against closed forms: Gaussian images with a given spectrum

SIDE = 4
WAVES = np.fft.fftfreq(SIDE) * SIDE
SPECTRUM = 1 / (1 + WAVES[:, None] ** 2 + WAVES[None, :] ** 2)
SPECTRUM /= SPECTRUM.mean()  # variance of each Fourier mode; that of a pixel is 1


def filtered(x, gain):
    """x (B, 3, 4, 4) with every Fourier mode multiplied by its gain, (4, 4) or (B, 1, 4, 4), in float64."""
    return torch.fft.ifft2(torch.fft.fft2(x.double()) * torch.as_tensor(gain)).real


class GaussianImages(Images):
    def __next__(self):
        generator = torch.Generator().manual_seed(self.position)
        self.position += self.batch_size
        z = torch.randn(self.batch_size, 3, SIDE, SIDE, generator=generator)
        return filtered(z, np.sqrt(SPECTRUM)).float(), {}


class BestModel:
    """E[eps | x_t] for those images, and the variance that the bound likes best: what a model can learn at most."""

    def __init__(self, diffusion):
        self.diffusion, self.learn_sigma = diffusion, diffusion.model_var_type.name == "LEARNED_RANGE"
        abar = diffusion.alphas_cumprod
        signal, noise = abar[:, None, None] * SPECTRUM, (1 - abar)[:, None, None]
        self.gain = np.sqrt(noise) / (signal + noise)  # (T, 4, 4)
        self.mse = (signal / (signal + noise)).mean((1, 2))  # (T,) of the noise
        self.x_start_variance = (SPECTRUM * noise / (signal + noise)).mean((1, 2))  # (T,) of x_0 given x_t, a pixel's

    def variance(self):
        """(T,): E |x_{t-1} - mean|^2 of a pixel, the variance at which the divergence from the posterior is least."""
        d = self.diffusion
        return d.posterior_variance + d.posterior_mean_coef1**2 * self.x_start_variance

    def bound(self):
        """(T,) bits per dimension, for t > 0: KL of q(x_{t-1} | x_t, x_0) from that Gaussian is half a log-ratio."""
        with np.errstate(divide="ignore"):
            return 0.5 * np.log2(self.variance() / self.diffusion.posterior_variance)

    def __call__(self, x, t):
        eps = filtered(x, self.gain[t.numpy()][:, None]).float()
        if not self.learn_sigma:
            return eps
        d = self.diffusion
        low, high = d.posterior_log_variance_clipped, np.log(d.betas)
        fraction = (np.log(self.variance()) - low) / (high - low + 1e-12)
        values = torch.tensor(2 * fraction[t.numpy()] - 1).float().view(-1, 1, 1, 1)
        return torch.cat([eps, values.expand_as(eps)], dim=1)


class LinearModel(nn.Module):
    """One gain per Fourier mode, and one variance, that depend on the time: the best model is of this kind, nearly."""

    def __init__(self, learn_sigma):
        super().__init__()
        self.learn_sigma = learn_sigma
        self.net = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, SIDE * SIDE + 1))

    def forward(self, x, t):
        gain, value = self.net(timestep_embedding(t, 64)).split([SIDE * SIDE, 1], dim=1)
        eps = torch.fft.ifft2(torch.fft.fft2(x) * gain.view(-1, 1, SIDE, SIDE)).real
        return torch.cat([eps, value.view(-1, 1, 1, 1).expand_as(eps)], dim=1) if self.learn_sigma else eps


def train_on_gaussian_images(folder, learn_sigma, steps, **options):
    diffusion = create_gaussian_diffusion(steps=1000, learn_sigma=learn_sigma)
    loop = make_loop(
        folder,
        learn_sigma=learn_sigma,
        diffusion=diffusion,
        data=GaussianImages(options["batch_size"]),
        lr_anneal_steps=steps,
        ema_rate="0.99",
        log_interval=100,
        save_interval=steps,
        **options,
    )
    loop.run_loop()
    loop.model.eval()
    return diffusion, loop


def losses_of_trained_and_best(diffusion, loop):
    """Their losses, (T / 2,) each, on the same images, times and noise; checked against the closed forms."""
    best = BestModel(diffusion)
    t = torch.arange(0, 1000, 2)
    data = GaussianImages(len(t))
    data.seek(10**6)
    x, noise = next(data)[0], torch.randn(len(t), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    trained = diffusion.training_losses(loop._averaged_model, x, t, noise=noise)
    optimum = diffusion.training_losses(best, x, t, noise=noise)
    assert float(optimum["mse"].mean()) == pytest.approx(best.mse[::2].mean(), rel=0.02)
    if best.learn_sigma:
        assert float(optimum["vb"][1:].mean()) == pytest.approx(best.bound()[2::2].mean(), rel=0.05)
    return trained, optimum


both_variances = pytest.mark.parametrize("learn_sigma", [False, True], ids=["fixed variance", "learned variance"])


@both_variances
def test_the_loss_of_a_network_falls_to_the_closed_form_optimum(tmp_path, learn_sigma):
    diffusion, loop = train_on_gaussian_images(tmp_path, learn_sigma, 500, lr=4e-3, batch_size=48)
    logged = [float(line["mse"]) for line in read_csv(tmp_path)]
    assert logged[0] > 1.25 * BestModel(diffusion).mse.mean()
    assert logged[-1] == pytest.approx(BestModel(diffusion).mse.mean(), rel=0.1)  # of 4800 images
    trained, optimum = losses_of_trained_and_best(diffusion, loop)
    assert 1 <= float(trained["mse"].mean() / optimum["mse"].mean()) < 1.06
    if learn_sigma:
        assert float(trained["vb"][1:].mean() / optimum["vb"][1:].mean()) < 1.08


@both_variances
def test_samples_of_a_trained_model_have_the_moments_of_the_data(tmp_path, learn_sigma):
    options = {"lr": 3e-3, "batch_size": 128, "model": LinearModel(learn_sigma)}
    diffusion, loop = train_on_gaussian_images(tmp_path, learn_sigma, 1000, **options)
    trained, optimum = losses_of_trained_and_best(diffusion, loop)
    assert 1 <= float(trained["mse"].mean() / optimum["mse"].mean()) < 1.002
    if learn_sigma:
        assert float(trained["vb"][1:].mean() / optimum["vb"][1:].mean()) < 1.003

    n = 1024
    few = create_gaussian_diffusion(steps=1000, learn_sigma=learn_sigma, timestep_respacing="250")
    options = {"clip_denoised": False, "device": "cpu", "generator": torch.Generator().manual_seed(2)}
    samples = few.p_sample_loop(loop._averaged_model, (n, 3, SIDE, SIDE), **options)
    assert samples.mean(0).abs().max() < 5 * n**-0.5
    power = (torch.fft.fft2(samples.double(), norm="ortho").abs() ** 2).mean((0, 1)).numpy()
    assert np.abs(power / SPECTRUM - 1).max() < 5 * (2 / (3 * n)) ** 0.5  # 0.13; of a complex mode even less
    assert np.abs((power / SPECTRUM).mean() - 1) < 0.02  # of all modes together
    # Modes, which differ at the scale of their spectrum, are not correlated: so the whole covariance is the data's.
    some = [1, 2, 4, 5, 6]  # no two of them are conjugates
    modes = torch.fft.fft2(samples.double(), norm="ortho").flatten(2)[:, :, some]
    scaled = modes / torch.as_tensor(np.sqrt(SPECTRUM).ravel()[some])
    covariance = torch.einsum("nci,ncj->ij", scaled, scaled.conj()) / (3 * n) - torch.eye(5)
    assert covariance.abs().max() < 5 * (3 * n) ** -0.5


# What a step does


def test_a_step_is_that_of_a_plain_loop(tmp_path):
    """Three steps, written out: the losses of the rows' noise, AdamW with a falling rate, two moving averages."""
    mine, model = (fill_weights(tiny_model(learn_sigma=True)) for _ in range(2))
    loop = make_loop(tmp_path, model=mine, lr=1e-2, lr_anneal_steps=4, ema_rate="0.5,0.9", weight_decay=0.1, seed=3)
    data = Images(8)
    weights = list(model.parameters())
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    averages = {rate: [w.detach().clone() for w in weights] for rate in (0.5, 0.9)}
    diffusion = create_gaussian_diffusion(steps=100, learn_sigma=True)
    for step in range(3):
        batch, _ = next(data)
        loop.run_step(batch, {})
        loop.step -= 1
        t, noise = loop.draw_timesteps(3)[0], NoiseStreams(3, [f"row {i}" for i in range(8)], step, "cpu")
        loop.step += 1
        losses = diffusion.training_losses(model, batch, t, noise=noise.randn(batch.shape))
        gradients = torch.autograd.grad(losses["loss"].mean(), weights)
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            rate = 1e-2 * (1 - step / 4)
            first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.999 * second[i] + 0.001 * g**2
            mean, square = first[i] / (1 - 0.9 ** (step + 1)), second[i] / (1 - 0.999 ** (step + 1))
            w.data -= rate * (0.1 * w.data + mean / (square.sqrt() + 1e-8))
            for decay, average in averages.items():
                average[i] = decay * average[i] + (1 - decay) * w.data
    # By what the networks answer, since AdamW makes much of the rounding of gradients that ought to be zero, such as
    # those of a bias before a normalisation.
    question = (batch, torch.arange(8))
    answers = [loop.model(*question), *(_with_weights(loop.model, params, question) for params in loop.ema_params)]
    expected = [model(*question), *(_with_weights(model, average, question) for average in averages.values())]
    for answer, right in zip(answers, expected, strict=True):
        assert relative_error(answer, right) < 1e-3
    assert relative_error(expected[0], expected[1]) > 0.05 < relative_error(expected[1], expected[2])


def _with_weights(model, params, inputs):
    names = [name for name, _ in model.named_parameters()]
    return torch.func.functional_call(model, dict(zip(names, params, strict=True)), inputs)


def test_a_step_leaves_the_caller_s_random_numbers_alone(tmp_path):
    loop = make_loop(tmp_path, model=tiny_model(learn_sigma=True, dropout=0.1), seed=3)
    batch = next(Images(8))
    torch.manual_seed(5)
    loop.run_step(*batch)
    assert torch.initial_seed() == 5
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_the_seed_is_torch_s_unless_it_is_given(tmp_path):
    def loop_with(torch_seed, folder, **options):
        model = tiny_model(learn_sigma=True)
        torch.manual_seed(torch_seed)
        return make_loop(tmp_path / folder, model=model, **options)

    first, second = loop_with(5, "a", iterations=2), loop_with(2**64 - 1, "b")
    assert (first.seed, second.seed) == (5, 2**64 - 1) and loop_with(5, "c", seed=0).seed == 0
    assert not torch.equal(first.draw_noise((8, 3), first.seed), second.draw_noise((8, 3), second.seed))
    assert not torch.equal(first.draw_timesteps(first.seed)[0], second.draw_timesteps(second.seed)[0])
    first.run_loop()
    second.run_step(*next(Images(8)))
    second.save()
    assert loop_with(6, "a", iterations=3).seed == 5 and loop_with(6, "b").seed == 2**64 - 1  # resumed
    assert loop_with(6, "a", iterations=3, seed=5).seed == 5
    with pytest.raises(UserError, match="--seed was 5 and is now 6"):
        loop_with(5, "a", seed=6)
    assert loop_with(6, "d", resume_checkpoint=str(tmp_path / "a/model000002.pt")).seed == 6


def test_a_frozen_table_of_integers_is_left_alone(tmp_path):
    model = tiny_model(learn_sigma=True)
    model.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    make_loop(tmp_path, model=model, iterations=1).run_loop()
    for kind in ("model", "ema_0.9_"):
        assert torch.load(tmp_path / f"{kind}000001.pt")["table"].tolist() == [0, 1, 2]
    loop = make_loop(tmp_path, model=model, iterations=2)
    loop.run_loop()
    assert loop.step == 2


def test_microbatches_give_the_gradient_of_the_batch(tmp_path):
    whole, parts = make_loop(tmp_path / "a"), make_loop(tmp_path / "b", microbatch=3)
    batch, cond = next(Images(8))
    losses, others = (loop.forward_backward(batch, cond)[0] for loop in (whole, parts))
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert losses.keys() == others.keys() == {"loss", "mse", "vb"}
    for name, value in losses.items():
        assert torch.allclose(value, others[name], rtol=1e-5)


def test_the_log_has_the_losses_by_quartile(tmp_path):
    meter = LossMeter(torch.device("cpu"))
    meter.add({"loss": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([0, 24, 99]), 100)
    meter.add({"loss": torch.tensor([6.0, 8.0])}, torch.tensor([25, 99]), 100)
    meter.add_number("grad_norm", torch.tensor(2.0))
    overflow = torch.tensor(False)  # of float16: no step was taken, so nothing counts
    meter.add({"loss": torch.tensor([math.nan, 1.0])}, torch.tensor([0, 1]), 100, taken=overflow)
    meter.add_number("grad_norm", torch.tensor(math.inf), taken=overflow)
    assert meter.means() == {
        "loss": 4.0,
        "loss_q0": 1.5,
        "loss_q1": 6.0,
        "loss_q3": 5.5,
        "grad_norm": 2.0,
    }
    assert meter.means() == {}
    terms = {"loss": torch.tensor([1.0, 2.0, 6.0]), "acc@1": torch.tensor([1.0, 1.0, 0.0])}
    meter.add(terms, torch.tensor([0, 24, 99]), 100, weights=torch.tensor([2.0, 0.5, 1.5]))
    expected = {"loss": 3.0, "loss_q0": 1.2, "loss_q3": 6.0, "acc@1": 0.625, "acc@1_q0": 1.0, "acc@1_q3": 0.0}
    assert meter.means() == pytest.approx(expected)

    make_loop(tmp_path, batch_size=4, iterations=7, log_interval=2).run_loop()
    lines = read_csv(tmp_path)
    assert [(line["step"], line["samples"]) for line in lines] == [("2", "8"), ("4", "16"), ("6", "24")]
    assert {"loss", "mse", "vb", "grad_norm", "param_norm"} <= lines[0].keys()


def test_the_schedule_sampler_s_weights_keep_the_loss_unbiased(tmp_path, monkeypatch):
    diffusion = create_gaussian_diffusion(steps=100, learn_sigma=True)
    sampler = resample.create_named_schedule_sampler("loss-second-moment", diffusion)
    loop = make_loop(tmp_path, diffusion=diffusion, schedule_sampler=sampler)
    sampler.update_with_all_losses(list(range(100)) * 10, [1.0 + t for t in range(100)] * 10)
    t, weights = loop.draw_timesteps(0)
    p = sampler.weights() / sampler.weights().sum()
    assert weights.numpy() == pytest.approx(1 / (100 * p[t.numpy()]), rel=1e-5)
    monkeypatch.setattr(loop, "compute_losses", lambda x, t, *_: {"loss": loop.model(x, t).mean((1, 2, 3)) * 0 + 3})
    loop.run_step(*next(Images(8)))
    assert not np.array_equal(sampler.weights() / sampler.weights().sum(), p)  # it has learned from the losses
    means = loop.meter.means()
    assert {name: value for name, value in means.items() if "norm" not in name} == pytest.approx(
        {"loss": 3.0, **{f"loss_q{q}": 3.0 for q in (4 * t // 100).tolist()}}
    )


def test_half_precision_trains_weights_in_float32(tmp_path):
    if half_precision_dtype("cpu") == torch.float32:
        pytest.skip("this CPU has no half precision")
    loop, reference = make_loop(tmp_path / "a", use_fp16=True), make_loop(tmp_path / "b")
    seen = {}
    for name in ("input_blocks.0.0", "out"):
        loop.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.dtype})
        )
    batch, cond = next(Images(8))
    for each in (loop, reference):
        each.run_step(batch, cond)
    assert seen == {"input_blocks.0.0": torch.bfloat16, "out": torch.float32}
    assert {p.dtype for p in loop.model.parameters()} == {torch.float32}
    assert loop.meter.means()["loss"] == pytest.approx(reference.meter.means()["loss"], rel=2e-2)


def test_float16_leaves_out_a_step_that_overflows():
    """The loss scale, which needs no GPU to be tested: 1e38 overflows when it is scaled, 1 does not."""
    weight = torch.nn.Linear(1, 1, bias=False)
    trainer = MixedPrecisionTrainer(model=weight, use_fp16=False, fp16_scale_growth=0.5)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    opt = torch.optim.AdamW(trainer.master_params, lr=0.1, fused=False)
    before = weight.weight.item()
    trainer.backward(weight(torch.tensor([[1e38]])).sum())
    grad_norm, _ = trainer.step(opt)
    assert not math.isfinite(grad_norm) and weight.weight.item() == before and trainer.scaler.get_scale() == 2.0**9
    trainer.zero_grad()
    trainer.backward(weight(torch.tensor([[1.0]])).sum())
    grad_norm, _ = trainer.step(opt)
    assert grad_norm == pytest.approx(1.0) and weight.weight.item() < before


# Stopping and going on


@pytest.mark.parametrize("schedule_sampler", ["uniform", "loss-second-moment"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, schedule_sampler, capfd):
    def train(folder, iterations, **options):
        # With 4 steps the sampler has soon seen ten losses of each, and draws by them.
        respacing = "" if schedule_sampler == "uniform" else "4"
        diffusion = create_gaussian_diffusion(steps=100, learn_sigma=True, timestep_respacing=respacing)
        options["schedule_sampler"] = resample.create_named_schedule_sampler(schedule_sampler, diffusion)
        model = tiny_model(learn_sigma=True, dropout=0.1)
        loop = make_loop(
            folder, diffusion=diffusion, model=model, iterations=iterations, log_interval=4, save_interval=5, **options
        )
        loop.run_loop()
        return loop

    whole = train(tmp_path / "whole", 12)
    train(tmp_path / "parts", 7)
    resumed = train(tmp_path / "parts", 12)
    assert "model000007.pt, after 7 steps" in capfd.readouterr().err
    assert same(whole.model.parameters(), resumed.model.parameters())
    assert same(whole.ema_params[0], resumed.ema_params[0])
    assert (tmp_path / "whole/progress.csv").read_bytes() == (tmp_path / "parts/progress.csv").read_bytes()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    checkpoints = {f"{kind}{step:06d}.pt" for kind in ("model", "opt", "ema_0.9_") for step in (5, 10, 12)}
    assert names == checkpoints | {"progress.csv", "progress.json"}
    state = torch.load(tmp_path / "whole/model000012.pt", weights_only=True)
    assert same(state.values(), whole.model.state_dict().values())


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert find_resume_checkpoint(str(tmp_path / "missing")) is None
    make_loop(tmp_path, iterations=4, save_interval=1).run_loop()
    assert find_resume_checkpoint(str(tmp_path), [0.9]) == str(tmp_path / "model000004.pt")
    os.truncate(tmp_path / "opt000004.pt", 3000)
    assert find_resume_checkpoint(str(tmp_path), [0.9]) == str(tmp_path / "model000003.pt")
    (tmp_path / "ema_0.9_000003.pt").unlink()
    assert find_resume_checkpoint(str(tmp_path), [0.9]) == str(tmp_path / "model000002.pt")
    (tmp_path / "model000002.pt").unlink()
    assert find_resume_checkpoint(str(tmp_path), [0.9]) == str(tmp_path / "model000001.pt")
    assert find_resume_checkpoint(str(tmp_path), [0.9, 0.5]) is None


def contents(folder):
    """Digest of every file, by name."""
    files = (path for path in Path(folder).iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    make_loop(folder, iterations=4, save_interval=2, ema_rate="0.9,0.5", settings={"--lr": 1, "--seed": 2}).run_loop()
    return folder


def resume(folder, **options):
    return make_loop(folder, **{"ema_rate": "0.9,0.5", "settings": {"--lr": 1, "--seed": 2}, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"settings": {"--lr": 3, "--seed": 4}}, r"settings: --lr was 1 and is now 3; --seed was 2 and is now 4\.\n"),
        (
            {"ema_rate": "0.9"},
            r"--ema_rate was 0\.9,0\.5 and is now 0\.9\.\n.*--resume_checkpoint .*model000004\.pt\)$",
        ),
        ({"ema_rate": "0.9,0.5,0.1", "iterations": 3}, r"--ema_rate was 0\.9,0\.5 and is now 0\.9,0\.5,0\.1\.\n"),
        ({"ema_rate": ""}, r"--ema_rate was 0\.9,0\.5 and is now empty\.\n"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(trained, options, words):
    before = contents(trained)
    with pytest.raises(UserError, match=words):
        resume(trained, **options)
    assert contents(trained) == before


def test_settings_that_one_of_the_two_does_not_know_do_not_differ(trained, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "run")
    options = {"settings": {"--lr": 1, "--colour": "red"}, "ema_rate": "0.5,0.9", "iterations": 6}
    loop = resume(tmp_path / "run", **options)
    assert "does not record --colour: assumed to be unchanged" in capfd.readouterr().err
    loop.run_loop()
    with pytest.raises(UserError, match="--colour was red and is now blue"):
        resume(tmp_path / "run", **{**options, "settings": {"--lr": 1, "--colour": "blue"}})


def test_checkpoints_of_an_earlier_version(trained, tmp_path):
    """Their record knows the averages by the flag alone, as it was given."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    state = torch.load(folder / "opt000004.pt")
    del state["training"]["ema_rates"], state["training"]["begun_from"]
    state["training"]["settings"] |= {"--ema_rate": "0.90, 0.5", "--gone": 1}
    torch.save(state, folder / "opt000004.pt")
    settings = {"--lr": 1, "--seed": 2, "--ema_rate": "0.9,0.5"}
    resume(folder, settings=settings, iterations=5).run_loop()
    assert torch.load(folder / "opt000005.pt")["training"]["ema_rates"] == [0.9, 0.5]
    with pytest.raises(UserError, match=r"settings: --ema_rate was 0\.9,0\.5 and is now 0\.9\.\n"):
        resume(folder, settings={**settings, "--ema_rate": "0.9"}, ema_rate="0.9")


def test_a_run_with_nothing_left_to_do(trained, capfd):
    before = contents(trained)
    for iterations in (3, 4):
        resume(trained, iterations=iterations).run_loop()
        assert capfd.readouterr().err == "already at step 4: nothing left to do\n"
    assert contents(trained) == before


def test_a_callback_that_a_kill_prevented_is_called_when_resuming(trained, tmp_path):
    """Also if nothing is left to do; with the averaged weights, and a network that samples."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    weights = torch.load(folder / "ema_0.9_000004.pt")
    x, t = torch.ones(1, 3, 8, 8), torch.tensor([7])
    calls = []

    def note(model, step):
        calls.append((step, loop.model.training, torch.equal(model(x, t), _with_weights(loop.model, average, (x, t)))))

    average = [weights[name] for name, _ in tiny_model(learn_sigma=True).named_parameters()]
    for iterations, later in ((4, []), (5, [(5, False, False)])):
        calls.clear()
        loop = resume(folder, iterations=iterations, on_save=note, on_resume=note)
        loop.run_loop()
        assert calls == [(4, False, True), *later]


@pytest.mark.parametrize(
    ("remove", "words"),
    [
        (
            "opt000004.pt",
            r"opt000004\.pt is missing\.\n.*model000004\.pt with another --output, or move .* model000002",
        ),
        ("ema_0.5_000004.pt", r"ema_0\.5_000004\.pt is missing\.\n.*or move .* model000002\.pt$"),
        ("*2.pt opt000004.pt", r"opt000004\.pt is missing\.\n.*model000004\.pt with another --output$"),
        (
            "model*",
            r"without a model\*\.pt, .*: ema_0\.5_000002\.pt, .*opt000002\.pt, .*opt000004\.pt\.\nMove them away",
        ),
        ("model* opt* *2.pt", r"without a model\*\.pt, .*: ema_0\.5_000004\.pt, ema_0\.9_000004\.pt\.\nMove them away"),
    ],
)
def test_a_folder_with_an_incomplete_checkpoint_is_not_begun_again(trained, tmp_path, remove, words):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    for pattern in remove.split():
        for path in folder.glob(pattern):
            path.unlink()
    before = contents(folder)
    for options in ({}, {"ema_rate": "0.9", "settings": {}}, {"ema_rate": ""}):
        with pytest.raises(UserError, match=words):
            resume(folder, **options)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["model000004.pt", "opt000004.pt", "ema_0.9_000004.pt"])
def test_a_folder_with_a_truncated_checkpoint_is_not_begun_again(trained, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    os.truncate(folder / name, 3000)
    with pytest.raises(UserError, match=rf"{name} is incomplete\.\n.*or move the files of step 4 away .*model000002"):
        resume(folder)
    for path in folder.glob("*4.pt"):  # what the message says
        path.rename(tmp_path / path.name)
    resumed = resume(folder, iterations=4)
    assert resumed.step == 2
    resumed.run_loop()
    if name != "model000004.pt":
        assert contents(folder)["model000004.pt"] == contents(tmp_path)["model000004.pt"]


def test_what_a_kill_left_of_a_checkpoint_is_kept(trained, tmp_path):
    """A run that is killed between two of the renamings leaves an average, or an optimizer's state too."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "model000004.pt").unlink()
    (folder / "opt000004.pt").write_bytes(b"of a run that took another course")
    before = contents(folder)
    resume(folder, iterations=4).run_loop()
    after = contents(folder)
    for name in ("opt000004", "ema_0.9_000004", "ema_0.5_000004"):
        assert after[f"{name}.1.pt"] == before[f"{name}.pt"]
        assert after[f"{name}.pt"] == contents(trained)[f"{name}.pt"]
    kept = [name for name in before if "000002" in name]
    assert len(kept) == 4 and all(after[name] == before[name] for name in kept)
    assert resume(folder).step == 4


def test_a_checkpoint_is_never_replaced(tmp_path):
    loop = make_loop(tmp_path, iterations=9)
    loop.run_step(*next(Images(8)))
    (tmp_path / "model000001.pt").write_bytes(b"of another run")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"model000001\.pt was not there .*: another run is writing to"):
        loop.save()
    assert contents(tmp_path) == before
    (tmp_path / "model000001.pt").unlink()
    loop.save()
    saved = contents(tmp_path)
    loop.save()  # again, at the same step
    assert contents(tmp_path) == saved and len(saved) == 3


def test_the_files_of_a_checkpoint_appear_together(tmp_path, monkeypatch):
    """And the model's last: where it is, a run can be resumed."""
    seen = []
    replace = os.replace

    def watched(source, target):
        assert not seen or len(list(tmp_path.glob(".*.part"))) == 3 - len(seen)  # all are written before the first
        replace(source, target)
        seen.append(Path(target).name)

    monkeypatch.setattr(os, "replace", watched)
    loop = make_loop(tmp_path)
    loop.run_step(*next(Images(8)))
    loop.save()
    assert seen == ["ema_0.9_000001.pt", "opt000001.pt", "model000001.pt"]


def start_of(named, output, rates=(0.9,)):
    start = choose_start(str(named), str(output), {}, rates)
    return start and (start.path, start.resumed)


def test_which_checkpoint_is_started_from(tmp_path, monkeypatch):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    monkeypatch.chdir(tmp_path)
    make_loop(theirs, iterations=4, save_interval=2).run_loop()
    named = str(theirs / "model000002.pt")
    assert start_of("", ours) is None
    assert start_of(named, ours) == (named, False)

    options = {"resume_checkpoint": named, "save_interval": 1}
    begun = make_loop(ours, iterations=4, **options)
    assert begun.step == 2
    begun.run_loop()
    newest = str(ours / "model000004.pt")
    (tmp_path / "link").symlink_to(ours)
    (tmp_path / "copied.pt").write_bytes(Path(named).read_bytes())
    (tmp_path / "latest.pt").symlink_to(newest)
    same_run = [newest, "ours/model000004.pt", "./ours/model000004.pt", "link/model000004.pt", "latest.pt"]
    same_run += [named, "theirs/model000002.pt", "copied.pt", ""]
    for path in same_run:
        assert start_of(path, ours) == (newest, True), path
        assert start_of(path, "./link") == ("./link/model000004.pt", True), path
    for path in ("ours/model000003.pt", str(ours / "model000003.pt"), "link/model000003.pt"):
        with pytest.raises(UserError, match=r"later checkpoints, up to .*model000004\.pt.*\n.*--output"):
            start_of(path, ours)
    with pytest.raises(UserError, match=r"4\.pt: .*ours has checkpoints of a run that did not start from it, up to"):
        start_of(theirs / "model000004.pt", ours)
    with pytest.raises(UserError, match="did not start from it"):  # begun from scratch
        start_of(newest, theirs)
    for path in ("theirs/model000009.pt", "ours/model000009.pt", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            start_of(path, ours)

    resumed = make_loop(ours, iterations=5, **options)
    assert (resumed.step, resumed.origin["path"]) == (4, named)
    resumed.run_loop()
    (theirs / "model000002.pt").write_bytes((theirs / "model000004.pt").read_bytes())  # another one of the same name
    with pytest.raises(UserError, match="did not start from it"):
        start_of(named, ours)


def test_the_words_for_a_run_that_was_stopped(trained, tmp_path):
    nothing = f"there is no complete checkpoint in {tmp_path}"
    assert describe_newest(str(tmp_path)) == f"{nothing} yet. Rerun the same command to start again"
    (tmp_path / "opt000004.pt").touch()
    assert describe_newest(str(tmp_path)) == nothing
    newest = trained / "model000004.pt"
    words = f"step 4 is saved in {newest}. Rerun the same command"
    assert describe_newest(str(trained)) == describe_newest(str(trained), "x/model000002.pt") == f"{words} to resume"
    named = str(trained / "model000002.pt")
    assert describe_newest(str(trained), named) == f"{words} without --resume_checkpoint to resume"


def test_the_log_of_a_run_without_a_checkpoint_is_set_aside(tmp_path, capfd):
    def logged(name):
        return [line.split(",")[0] for line in (tmp_path / name).read_text().splitlines()]

    for lr in (1e-3, 1e-4):
        loop = make_loop(tmp_path, lr=lr)
        for _ in range(2):  # killed before the first checkpoint
            loop.run_step(*next(Images(8)))
            loop.log()
    both = {f"progress{number}.{kind}" for number in ("", ".1") for kind in ("csv", "json")}
    assert {path.name for path in tmp_path.iterdir()} == both
    assert logged("progress.csv") == logged("progress.1.csv") == ["step", "1", "2"]
    said = f"the log in {tmp_path} belongs to an earlier run: renamed to progress.1.csv, progress.1.json"
    assert said in capfd.readouterr().err
    make_loop(tmp_path, iterations=3).run_loop()
    assert logged("progress.csv") == ["step", "1", "2", "3"] and logged("progress.2.csv") == ["step", "1", "2"]
    make_loop(tmp_path, iterations=4).run_loop()  # which is resumed
    assert logged("progress.csv") == ["step", "1", "2", "3", "4"] and not (tmp_path / "progress.3.csv").exists()


def test_weights_alone_can_be_begun_with(tmp_path, capfd):
    """A published model has no optimizer's state and no averages beside it."""
    torch.save(tiny_model(learn_sigma=True).state_dict(), tmp_path / "published.pt")
    loop = make_loop(tmp_path / "new", resume_checkpoint=str(tmp_path / "published.pt"))
    assert loop.step == 0 and same(loop.ema_params[0], loop.model.parameters())
    assert "the optimizer starts afresh" in capfd.readouterr().err
    wrapped = {f"module.{name}": w for name, w in torch.load(tmp_path / "published.pt").items()}
    torch.save({"ema": wrapped, "epoch": 3}, tmp_path / "wrapped.pt")
    again = make_loop(tmp_path / "other", resume_checkpoint=str(tmp_path / "wrapped.pt"))
    assert same(again.model.parameters(), loop.model.parameters())
    with pytest.raises(UserError, match=r"does not fit your flags: out\.2\.weight has shape \[6, .*, expected \[3, "):
        make_loop(tmp_path / "new", learn_sigma=False, resume_checkpoint=str(tmp_path / "published.pt"))


class Interrupting(Images):
    """A stream that sends the process a signal, once, when it is asked for the third batch."""

    def __init__(self, signum):
        super().__init__()
        self.signum = signum

    def __next__(self):
        if self.position == 16 and self.signum:
            os.kill(os.getpid(), self.signum)
            self.signum = 0
        return super().__next__()


def test_a_signal_is_answered_between_steps_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_in_run", True)
    with pytest.raises(Stopped) as stopped:
        make_loop(tmp_path, data=Interrupting(signal.SIGTERM)).run_loop()
    assert stopped.value.signum == 15
    assert find_resume_checkpoint(str(tmp_path), [0.9]) == str(tmp_path / "model000003.pt")


@pytest.fixture
def handler():
    """Install a handler of a signal until the end of the test."""
    before = {}

    def install(signum, function):
        before[signum] = signal.signal(signum, function)

    yield install
    for signum, function in before.items():
        signal.signal(signum, function)


def test_another_program_gets_the_signal_after_a_checkpoint(tmp_path, handler, capfd):
    """Not one of our scripts: it has handlers of its own, or Python's."""
    with pytest.raises(KeyboardInterrupt) as interrupt:
        make_loop(tmp_path / "int", data=Interrupting(signal.SIGINT)).run_loop()
    assert interrupt.value.__context__ is None
    saved = tmp_path / "int/model000003.pt"
    assert f"SIGINT: step 3 is saved in {saved}. Rerun the same command to resume\n" in capfd.readouterr().err

    def leave(signum, frame):
        raise SystemExit(7)

    handler(signal.SIGTERM, leave)
    with pytest.raises(SystemExit, match="7"):
        make_loop(tmp_path / "term", data=Interrupting(signal.SIGTERM)).run_loop()
    assert (tmp_path / "term/model000003.pt").exists()


def test_training_goes_on_if_the_program_does_not_stop(tmp_path, handler):
    noted = []
    handler(signal.SIGUSR1, lambda signum, frame: noted.append((signum, sorted(tmp_path.glob("model*.pt")))))
    make_loop(tmp_path, data=Interrupting(signal.SIGUSR1), iterations=5).run_loop()
    assert noted == [(signal.SIGUSR1, [tmp_path / "model000003.pt"])] and (tmp_path / "model000005.pt").exists()

    handler(signal.SIGINT, signal.SIG_IGN)  # as under nohup in some shells
    make_loop(tmp_path / "ignored", data=Interrupting(signal.SIGINT), iterations=4).run_loop()
    assert [path.name for path in (tmp_path / "ignored").glob("model*.pt")] == ["model000004.pt"]


def spoil_weight(loop):
    next(loop.model.parameters()).data[0] = math.nan


def spoil_average(loop):
    loop.ema_params[0][-1].data[0] = math.inf


def spoil_optimizer(loop):
    """As a gradient of 1e20 does: its square is infinite, and the weight never moves again."""
    loop.opt.state[loop.mp_trainer.master_params[0]]["exp_avg_sq"].view(-1)[0] = math.inf


def spoil_loss(loop):
    """In a step between two lines of the log, which has no other trace."""
    loop.meter.add({"loss": torch.tensor([math.nan])}, torch.tensor([3]), 100)


def spoil_norm(loop):
    loop.meter.add_number("grad_norm", torch.tensor(math.inf))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_weight, "(a weight|mse) is (NaN|nan)"),
        (spoil_average, r"a weight of the moving average of decay 0\.9 is NaN"),
        (spoil_optimizer, "a number of the optimizer is NaN or infinite"),
        (spoil_loss, "loss is nan"),
        (spoil_norm, "grad_norm is inf"),
    ],
)
def test_a_state_that_is_not_finite_is_neither_saved_nor_logged(tmp_path, spoil, words):
    loop = make_loop(tmp_path, iterations=9, save_interval=1, log_interval=100)
    loop.run_step(*next(Images(8)))
    loop.save()
    before = contents(tmp_path)
    spoil(loop)
    with pytest.raises(ResultError, match=rf"^training has diverged: at step 2 {words}.*--lr[^\n]*$"):
        loop.run_loop()
    assert contents(tmp_path) == before
    assert ResultError.status == 1 and UserError.status == 2

    loop = make_loop(tmp_path, iterations=9, save_interval=100)
    spoil(loop)
    if spoil not in (spoil_average, spoil_optimizer):  # which have no trace in the log
        with pytest.raises(ResultError, match="at step 2"):
            loop.run_loop()
        assert not (tmp_path / "progress.csv").exists()


def test_steps_that_float16_skips_are_counted_and_their_losses_are_not(tmp_path, monkeypatch):
    """By a real loss scale, here on a CPU; the second and the third step overflow."""
    loop, plain = make_loop(tmp_path / "a", log_interval=100), make_loop(tmp_path / "b", log_interval=100)
    loop.mp_trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    compute, factors = loop.compute_losses, iter([1, math.nan, math.inf])

    def overflowing(*args):
        factor = next(factors, math.nan)
        return {name: value * factor for name, value in compute(*args).items()}

    monkeypatch.setattr(loop, "compute_losses", overflowing)
    batch = next(Images(8))
    for _ in range(3):
        loop.run_step(*batch)
    plain.run_step(*batch)
    assert same(loop.model.parameters(), plain.model.parameters())
    loop.save()
    assert loop.meter.means_of(torch.load(tmp_path / "a/opt000003.pt")["training"]["meter"])["skipped_steps"] == 2
    line, expected = loop.log(), plain.log()
    assert (line.pop("step"), line.pop("samples"), line.pop("skipped_steps"), line.pop("lg_loss_scale")) == (
        3,
        24,
        2,
        1,
    )
    for values in (line, expected):
        values.pop("param_norm")
    assert (expected.pop("step"), expected.pop("samples")) == (1, 8)
    assert line.keys() == expected.keys() and "grad_norm" in line
    assert line == pytest.approx(expected, rel=1e-5)

    loop.run_step(*batch)
    line = loop.log()
    assert line["skipped_steps"] == 1 and "loss" not in line and "grad_norm" not in line
    loop.run_step(*batch)  # its scale falls below 1
    with pytest.raises(ResultError, match=r"every step since the last line overflowed, although the loss scale is 0"):
        loop.log()


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    loop = make_loop(tmp_path, iterations=9, save_interval=1)
    loop.run_step(*next(Images(8)))
    loop.save()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as it does on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "opt000001.pt").stat().st_size // 2, hard))
    try:
        message = r"^cannot write .*opt000002.pt: File too large \(--output\)\..*\n.*rerun"
        with pytest.raises(WriteError, match=message):  # exit status 1
            loop.run_loop()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert find_resume_checkpoint(str(tmp_path), [0.9]) == str(tmp_path / "model000001.pt")
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("rates", ["", "0.9", "0.9999,0.99", 0.5])
def test_ema_rates(rates):
    assert ",".join(map(str, parse_rates(rates))) == str(rates)


@pytest.mark.parametrize("rates", ["1.5", "a", "0.9;0.5", "-1"])
def test_wrong_ema_rates(rates):
    with pytest.raises(UserError, match="--ema_rate"):
        parse_rates(rates)
