r"""image_nll.py against closed forms: its terms, their sum, and the entropy of the images.

A model whose predicted image is mu + G(x_t - sqrt(abar) mu), with a filter G, errs by d + w: d = (1 - sqrt(abar) G)
(x_0 - mu) is known for a given image, and w is Gaussian noise of variance (1 - abar) |G|^2 in every mode of the Fourier
transform. So the mean of every term of the bound, over the noise, has a closed form; here in float64, from the signal
levels abar and Bayes' rule. Two models are of this kind: a fresh U-Net, whose output is 0, predicts x_t / sqrt(abar);
and the best denoiser of Gaussian images with a given spectrum, for which the bound is all but tight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

from guided_diffusion import checkpoints
from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import NoiseStreams
from guided_diffusion.script_util import model_defaults, model_from_flags

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, as_flags, load_script, run_script
from PIL import Image
from torch import nn

ABAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))  # the linear schedule of 1000 steps
LN2 = math.log(2)
SIDE = 32
NAMES = ["vb_terms.npz", "mse_terms.npz", "xstart_mse_terms.npz"]
NAMES += ["image_nll.npz", "image_nll.json", "image_nll_inputs.json"]


pytestmark = pytest.mark.usefixtures("in_this_process")


def run_main(*flags):
    return load_script("scripts/image_nll.py").main([*map(str, flags), "--num_threads", "1"])


def results(folder):
    """The arrays of every file of results: vb, mse, xstart_mse, names, total_bpd, prior_bpd."""
    arrays = {}
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(folder / f"{name}_terms.npz", allow_pickle=False) as z:
            assert z.files == ["arr_0"]
            arrays[name] = z["arr_0"]
    with np.load(folder / "image_nll.npz", allow_pickle=False) as z:
        return arrays | {name: z[name] for name in z.files}


def save_images(folder, pixels):
    """8-bit images (n, H, W, 3) as files; returns what the model is shown of them, (n, 3, H, W) in [-1, 1]."""
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return pixels.transpose(0, 3, 1, 2) / 127.5 - 1


# The closed form


class Schedule:
    """The steps that `num_steps` evenly spaced of the 1000 make, as arrays (N,), from index 0 on."""

    def __init__(self, num_steps):
        self.times = [round(i * 999 / (num_steps - 1)) for i in range(num_steps)]
        self.abar = ABAR[self.times]
        before = np.append(1.0, self.abar[:-1])
        ratio = self.abar / before  # x_i = sqrt(ratio) x_{i-1} + sqrt(1 - ratio) z
        self.beta = 1 - ratio
        # q(x_{i-1} | x_i, x_0): the precisions of its two sources add up. At index 0 nothing is left to draw.
        small = 1 / (1 / (1 - before[1:]) + ratio[1:] / (1 - ratio[1:]))
        self.small = np.append(small[0], small)  # a model is told the next one's variance there
        self.weight_of_start = np.append(1.0, small * np.sqrt(before[1:]) / (1 - before[1:]))

    def variance(self, learned):
        """That of the model's steps: fixed, or between small and beta as the model's `learned`, in [-1, 1], says."""
        if learned is None:
            return np.append(self.small[0], self.beta[1:])
        fraction = (np.broadcast_to(learned, self.beta.shape) + 1) / 2
        return self.beta**fraction * self.small ** (1 - fraction)


@dataclass
class Expected:
    """What the bound should be, in bits per dimension, mean and standard deviation over the noise; arrays (N,)."""

    vb: np.ndarray
    deviation: np.ndarray
    prior: np.ndarray  # (images,)

    def total(self):
        return self.vb.sum() + self.prior.mean(), math.sqrt((self.deviation**2).sum())


def expected_bound(x_start, schedule, mean, gain, learned=None):
    """The bound for images (n, 3, H, W) and the filter `gain(abar)`: (H, W) in Fourier space, or a number."""
    variance, vb, deviation = schedule.variance(learned), [], []
    count = x_start.size
    for i, abar in enumerate(schedule.abar):
        g = np.broadcast_to(gain(abar), (SIDE, SIDE))
        known = np.fft.fft2(x_start - mean) * (1 - np.sqrt(abar) * g)
        power = np.abs(known) ** 2 / SIDE**2  # of the known part of the error, in every mode
        noise = np.broadcast_to((1 - abar) * g**2, known.shape)  # variance of the other part
        if i == 0:
            value, spread = likelihood_term(x_start, np.fft.ifft2(known).real, math.sqrt(noise.mean()), variance[0])
        else:
            # KL of two Gaussians; the square of a Gaussian of mean m and variance v has the variance 2 v^2 + 4 m^2 v.
            scale = schedule.weight_of_start[i] ** 2 / variance[i]
            ratio = schedule.small[i] / variance[i]
            value = 0.5 * (ratio - 1 - math.log(ratio) + scale * (power + noise).mean())
            spread = 0.5 * scale * math.sqrt((2 * noise**2 + 4 * power * noise).sum()) / count
        vb.append(value / LN2)
        deviation.append(spread / LN2)
    left = schedule.abar[-1]
    prior = 0.5 * (left * (x_start**2).mean((1, 2, 3)) - left - math.log1p(-left)) / LN2
    return Expected(np.array(vb), np.array(deviation), prior)


def tanh_cdf(x):
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def likelihood_nats(x_start, error, variance):
    """-log p(x_0 | x_1) of every pixel, where the mean is x_0 - error: of the 256 values that a pixel can have."""
    above, below = ((error + half) / math.sqrt(variance) for half in (1 / 255, -1 / 255))
    upper = np.where(x_start > 0.999, 1.0, tanh_cdf(above))  # 255 stands for all above it, 0 for all below
    lower = np.where(x_start < -0.999, 0.0, tanh_cdf(below))
    return -np.log(np.maximum(upper - lower, 1e-12))


def likelihood_term(x_start, known, noise, variance):
    """Mean and deviation, in nats per pixel, of -log p(x_0 | x_1): by Gauss-Hermite quadrature over the noise."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    x = x_start.ravel()[:, None]
    nats = likelihood_nats(x, known.ravel()[:, None] + noise * nodes, variance)
    mean = nats @ weights / weights.sum()
    square = nats**2 @ weights / weights.sum()
    return mean.mean(), math.sqrt((square - mean**2).sum()) / x_start.size


def check(measured, expected):
    """Within 5 standard errors, term by term; and the same numbers, image by image."""
    np.testing.assert_array_less(
        np.abs(measured["vb"][::-1] - expected.vb), 5 * expected.deviation + 1e-5 * (1 + np.abs(expected.vb))
    )
    np.testing.assert_allclose(measured["prior_bpd"], expected.prior, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        measured["total_bpd"].mean(), measured["vb"].sum() + measured["prior_bpd"].mean(), rtol=1e-5
    )
    total, deviation = expected.total()
    assert abs(measured["total_bpd"].mean() - total) < 5 * deviation + 1e-5 * total


# A fresh network


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_terms_of_a_fresh_network(learn_sigma, tmp_path, capsys):
    """A real checkpoint, as training starts: it predicts no noise, and a variance halfway between its bounds."""
    settings = {**SMALL_MODEL, "learn_sigma": learn_sigma}
    torch.save(model_from_flags({**model_defaults(), **settings}).state_dict(), tmp_path / "fresh.pt")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    pixels[rng.random(pixels.shape) < 0.3] = 255
    pixels[rng.random(pixels.shape) < 0.2] = 0
    x_start = save_images(tmp_path / "images", pixels)
    flags = [*as_flags(settings), "--model_path", tmp_path / "fresh.pt", "--data_dir", tmp_path / "images"]
    flags += ["--timestep_respacing", 10, "--batch_size", 2, "--clip_denoised", "False", "--output", tmp_path / "out"]
    assert run_main(*flags) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)
    measured, schedule = results(tmp_path / "out"), Schedule(10)
    assert measured["names"].tolist() == [f"{i:03d}.png" for i in range(5)]
    learned = 0.0 if learn_sigma else None
    check(measured, expected_bound(x_start, schedule, 0.0, lambda abar: 1 / math.sqrt(abar), learned))

    # Given what the noise was on the average, nothing else is left to chance.
    mse = measured["mse"][::-1]  # of a prediction of 0: the mean square of the noise
    assert np.abs(mse - 1).max() < 5 * math.sqrt(2 / x_start.size)
    np.testing.assert_allclose(measured["xstart_mse"][::-1], mse * (1 / schedule.abar - 1), rtol=1e-5)
    variance = schedule.variance(learned)
    ratio = schedule.small / variance
    squared = schedule.weight_of_start**2 * (1 / schedule.abar - 1) * mse
    vb = 0.5 * (ratio - 1 - np.log(ratio) + squared / variance) / LN2
    np.testing.assert_allclose(measured["vb"][::-1][1:], vb[1:], rtol=1e-5)
    streams = NoiseStreams(0, measured["names"].tolist(), 0, "cpu")
    noise = [streams.randn(x_start.shape) for _ in range(10)][-1].double().numpy()  # the last one is that of index 0
    nats = likelihood_nats(x_start, -noise * math.sqrt(1 / schedule.abar[0] - 1), variance[0])
    np.testing.assert_allclose(measured["vb"][-1], nats.mean() / LN2, rtol=1e-5)
    said = capsys.readouterr().err
    total = measured["total_bpd"].astype(float)
    assert f"{total.mean():.4f} +- {total.std(ddof=1) / math.sqrt(5):.4f} (standard error) bits per dimension" in said


# The best model of Gaussian images

MEAN, DEVIATION = -0.1, 0.2  # of the pixels; so that none of them is cut off at 0 or 255


def spectrum(correlated):
    """Variance of every mode, (H, W): white, or falling off with the frequency; DEVIATION**2 on the average."""
    frequency = np.fft.fftfreq(SIDE, 1 / SIDE)
    falling = 1 / (1 + (frequency[:, None] ** 2 + frequency**2) / 16) if correlated else np.ones((SIDE, SIDE))
    return falling / falling.mean() * DEVIATION**2


def gaussian_pixels(variances, count):
    white = np.random.default_rng(1).standard_normal((count, 3, SIDE, SIDE))
    images = MEAN + np.fft.ifft2(np.fft.fft2(white) * np.sqrt(variances)).real
    pixels = np.rint((images + 1) * 127.5)
    assert pixels.min() > 0 and pixels.max() < 255
    return pixels.astype(np.uint8).transpose(0, 2, 3, 1)


def best_gain(variances):
    """E[x_0 | x_t] = MEAN + gain (x_t - sqrt(abar) MEAN)."""
    return lambda abar: np.sqrt(abar) * variances / (abar * variances + 1 - abar)


def true_variance(variances, schedule):
    """Variance of a pixel of x_{i-1} given x_i, for the data; (N,). At index 0 it is that of x_0."""
    of_start = [((1 - abar) * variances / (abar * variances + 1 - abar)).mean() for abar in schedule.abar]
    return np.append(0.0, schedule.small[1:]) + schedule.weight_of_start**2 * of_start


def best_learned(variances, schedule):
    """What a model should say of the variance, on the scale from -1, small, to 1, beta; (N,)."""
    steps = np.log(true_variance(variances, schedule) / schedule.small) / np.log(schedule.beta / schedule.small)
    return 2 * steps - 1


class BestModel(nn.Module):
    """E[noise | x_t], given the original timesteps; and the optimal variance if it is `learned`."""

    def __init__(self, variances, schedule, learned):
        super().__init__()
        self.variances = torch.from_numpy(variances)
        self.learned = None if learned is None else dict(zip(schedule.times, learned, strict=True))

    def convert_to_fp32(self):
        pass

    def forward(self, x, t):
        abar = torch.from_numpy(ABAR[t.numpy()]).view(-1, 1, 1, 1)
        gain = (1 - abar).sqrt() / (abar * self.variances + 1 - abar)
        eps = torch.fft.ifft2(gain * torch.fft.fft2(x.double() - abar.sqrt() * MEAN)).real
        if self.learned is None:
            return eps.float()
        value = torch.full_like(eps, self.learned[int(t[0])])
        return torch.cat([eps, value], dim=1).float()


def step_losses(variances, schedule, learned):
    """Bits per dimension that the steps lose: each has one variance for all modes, where that of the data is another.

    Of two Gaussians of the same mean, v in the place of V costs (V/v - 1 - ln(V/v)) / 2 nats.
    """
    lost = 0.0
    for i, (abar, variance) in enumerate(zip(schedule.abar, schedule.variance(learned), strict=True)):
        of_start = (1 - abar) * variances / (abar * variances + 1 - abar)
        true = (schedule.small[i] if i else 0.0) + schedule.weight_of_start[i] ** 2 * of_start  # (H, W)
        lost += 0.5 * (true / variance - 1 - np.log(true / variance)).mean() / LN2
    return lost


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("correlated", [False, True], ids=["white", "correlated"])
def test_bits_of_gaussian_images(correlated, learned, monkeypatch, tmp_path):
    variances, schedule = spectrum(correlated), Schedule(20)
    x_start = save_images(tmp_path / "images", gaussian_pixels(variances, 12))
    values = best_learned(variances, schedule) if learned else None
    model = BestModel(variances, schedule, values)
    monkeypatch.setattr(checkpoints, "load_model", lambda path, flags, seed: model)
    flags = ["--image_size", SIDE, "--timestep_respacing", 20, "--learn_sigma", learned, "--clip_denoised", "False"]
    flags += ["--data_dir", tmp_path / "images", "--batch_size", 5, "--output", tmp_path / "out", "--seed", 4]
    assert run_main(*flags) == 0
    check(results(tmp_path / "out"), expected_bound(x_start, schedule, MEAN, best_gain(variances), values))


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("correlated", [False, True], ids=["white", "correlated"])
def test_what_the_closed_form_has_beyond_the_entropy(correlated, learned):
    """The sum with which the test above compares is the entropy of the 8-bit images, and what the steps lose.

    Nothing is lost by white images with learned variances: within 0.001 bits, which the rounding to 8 bits costs, the
    sum is the entropy, for any number of steps. Correlated images lose, with one variance for all modes, 0.067 bits in
    20 steps, and less in more steps, as 1 / N; fixed variances lose 0.46 and 0.61 bits in 20 steps.
    """
    variances = spectrum(correlated)
    x_start = gaussian_pixels(variances, 12).transpose(0, 3, 1, 2) / 127.5 - 1
    entropy = 0.5 * np.log2(2 * math.pi * math.e * variances).mean() - math.log2(2 / 255)
    # These images, drawn at random, have a little more or less of it: their squares are not quite the variances.
    power = (np.abs(np.fft.fft2(x_start - MEAN)) ** 2 / SIDE**2).mean((0, 1))
    of_these = entropy + 0.5 * (power / variances - 1).mean() / LN2
    assert abs(of_these - entropy) < 5 * math.sqrt(0.5 / x_start.size) / LN2
    lost = []
    for num_steps in (20, 40, 80):
        schedule = Schedule(num_steps)
        values = best_learned(variances, schedule) if learned else None
        total, _ = expected_bound(x_start, schedule, MEAN, best_gain(variances), values).total()
        lost.append(step_losses(variances, schedule, values))
        assert abs(total - of_these - lost[-1]) < 0.001 + 0.02 * lost[-1]
    if learned and not correlated:
        assert max(lost) < 1e-12
    else:
        np.testing.assert_allclose(
            lost[0], {(0, 0): 0.463, (1, 0): 0.614, (1, 1): 0.067}[correlated, learned], rtol=0.01
        )
        assert 0.4 < lost[1] / lost[0] < 0.6 and 0.4 < lost[2] / lost[1] < 0.6


# Restarts, images that cannot be read, mistakes


@pytest.fixture
def stub(monkeypatch):
    """A model that predicts half of what it is shown; it notes what it is given, and fails when it is told to."""
    seen = SimpleNamespace(calls=[], fail_after=None)

    class Stub(nn.Module):
        def forward(self, x, t, y=None):
            if len(seen.calls) == seen.fail_after:
                raise torch.OutOfMemoryError
            seen.calls.append(None if y is None else y.tolist())
            return x / 2

        def convert_to_fp32(self):
            pass

    monkeypatch.setattr(checkpoints, "load_model", lambda path, flags, seed: Stub())
    return seen


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(2)
    save_images(tmp_path / "images", rng.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8))
    return tmp_path / "images"


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


def test_a_restart_does_only_what_is_missing(stub, images, tmp_path, capsys):
    flags = ["--image_size", 8, "--timestep_respacing", 3, "--batch_size", 2, "--num_samples", 6, "--data_dir", images]
    assert run_main(*flags, "--output", tmp_path / "whole") == 0
    assert len(stub.calls) == 9
    reference = bytes_of(tmp_path / "whole")
    assert results(tmp_path / "whole")["names"].tolist() == [f"{i:03d}.png" for i in range(6)]

    stub.fail_after = 9 + 5
    with pytest.raises(UserError, match="a batch of 2 images: lower --batch_size"):
        run_main(*flags, "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["image_nll_parts"]
    with pytest.raises(UserError, match="--seed was 0 and is now 1"):
        run_main(*flags, "--output", tmp_path / "out", "--seed", 1)
    stub.calls.clear()
    stub.fail_after = None
    assert run_main(*flags, "--output", tmp_path / "out") == 0
    assert len(stub.calls) == 6
    assert bytes_of(tmp_path / "out") == reference
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)
    capsys.readouterr()
    assert run_main(*flags, "--output", tmp_path / "out") == 0
    assert len(stub.calls) == 6
    said = capsys.readouterr().err
    assert "exists already" in said and "bits per dimension" in said
    with pytest.raises(UserError, match="--num_samples was 6 and is now 5"):
        run_main(*flags, "--output", tmp_path / "out", "--num_samples", 5)


def test_noise_belongs_to_the_image(stub, images, tmp_path):
    """In other batches, and among fewer images: the same bits, to rounding."""
    flags = ["--image_size", 8, "--timestep_respacing", 3, "--data_dir", images]
    run_main(*flags, "--batch_size", 3, "--output", tmp_path / "a")
    run_main(*flags, "--batch_size", 2, "--num_samples", 5, "--output", tmp_path / "b")
    run_main(*flags, "--batch_size", 3, "--seed", 1, "--output", tmp_path / "c")
    a, b, c = (results(tmp_path / run)["total_bpd"] for run in "abc")
    assert (len(a), len(b), len(c)) == (7, 5, 7)
    np.testing.assert_allclose(a[:5], b, rtol=1e-5)
    assert np.abs(a - c).min() > 1e-4


def test_an_unreadable_image_costs_only_itself(stub, images, tmp_path, capsys):
    flags = ["--image_size", 8, "--timestep_respacing", 3, "--batch_size", 3, "--data_dir", images]
    assert run_main(*flags, "--output", tmp_path / "whole") == 0
    reference, whole = bytes_of(tmp_path / "whole"), (images / "004.png").read_bytes()
    (images / "004.png").write_bytes(whole[:50])
    capsys.readouterr()
    assert run_main(*flags, "--output", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "004.png" in said and "1 of 7 images could not be read" in said
    measured, all_of_them = results(tmp_path / "out"), results(tmp_path / "whole")
    left = [0, 1, 2, 3, 5, 6]
    assert measured["names"].tolist() == [f"{i:03d}.png" for i in left]
    assert (measured["total_bpd"] == all_of_them["total_bpd"][left]).all()
    total = measured["vb"].sum() + measured["prior_bpd"].mean()
    np.testing.assert_allclose(total, measured["total_bpd"].mean(), rtol=1e-5)
    stub.calls.clear()
    assert run_main(*flags, "--output", tmp_path / "out") == 1
    assert "004.png" in capsys.readouterr().err
    (images / "004.png").write_bytes(whole)
    assert run_main(*flags, "--output", tmp_path / "out") == 0
    assert len(stub.calls) == 3 + 3  # its batch, each time
    assert bytes_of(tmp_path / "out") == reference
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)


def test_same_files_from_two_processes(small_checkpoint, images, tmp_path):
    """Of which one meets an image that cannot be read; and what is said is said once."""
    (images / "004.png").write_bytes(b"")
    flags = [*as_flags(SMALL_MODEL), "--model_path", small_checkpoint, "--timestep_respacing", 2, "--batch_size", 2]
    flags += ["--data_dir", images, "--num_threads", 1]
    assert run_main(*flags, "--output", tmp_path / "one") == 1
    options = {"script": "scripts/image_nll.py", "kind": "mpiexec", "processes": 2}
    two = run_script(*flags, "--output", tmp_path / "two", **options)
    assert two.returncode == 1, two.stderr
    assert "Traceback" not in two.stderr
    for words in ("004.png", "1 of 7 images could not be read", "bits per dimension"):
        assert two.stderr.count(words) == 1, two.stderr
    assert len(bytes_of(tmp_path / "one")) == 4
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


def test_labels_reach_a_class_conditional_model(stub, images, tmp_path):
    flags = ["--image_size", 8, "--timestep_respacing", 3, "--batch_size", 7, "--data_dir", images]
    flags += ["--class_cond", "True", "--output", tmp_path / "out"]
    with pytest.raises(UserError, match="the model needs the classes"):
        run_main(*flags)
    for i, name in enumerate("abcabca"):
        (images / f"{i:03d}.png").rename(images / f"{name}_{i}.png")
    run_main(*flags)
    assert stub.calls == [[0, 0, 0, 1, 1, 2, 2]] * 3
    stub.calls.clear()
    (tmp_path / "classes.json").write_text('{"order": "text", "classes": {"1": "a", "4": "b", "2": "c"}}')
    recorded = [*flags, "--model_path", tmp_path / "model.pt", "--output", tmp_path / "recorded"]
    run_main(*recorded)
    assert stub.calls == [[1, 1, 1, 4, 4, 2, 2]] * 3
    with pytest.raises(UserError, match="--class_order text contradicts"):
        run_main(*recorded, "--class_order", "text")
    (images / "c_2.png").rename(images / "d_2.png")
    with pytest.raises(UserError, match=r"not among the model's 3: d\."):
        run_main(*recorded)


def test_plain_mistakes_get_plain_words(small_checkpoint, images, tmp_path, capsys):
    output = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "text.pt").write_text("nothing\n" * 50)
    flags = [*as_flags(SMALL_MODEL), "--model_path", small_checkpoint, "--timestep_respacing", 2, "--data_dir", images]
    mistakes = [
        (["--data_dir", ""], ["--data_dir"]),
        (["--data_dir", tmp_path / "nowhere"], ["--data_dir", "nowhere"]),
        (["--data_dir", tmp_path / "empty"], ["--data_dir", "no files"]),
        (["--model_path", ""], ["--model_path"]),
        (["--model_path", tmp_path / "text.pt"], ["text.pt", "was not written by torch.save"]),
        (["--num_channels", 64], ["--num_channels 32"]),
        (["--timestep_respacing", 0], ["--timestep_respacing"]),
        (["--class_cond", "True", "--labels_file", tmp_path / "labels.txt"], ["--labels_file", "cat"]),
    ]
    for change, words in mistakes:
        with pytest.raises(UserError) as caught:
            run_main(*flags, *change, "--output", output)
        message = str(caught.value)
        assert len(message.splitlines()) <= 2 and all(word in message for word in words), message
        assert not output.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write.*Not a directory.*--output"):
        run_main(*flags, "--output", tmp_path / "file" / "out")
    capsys.readouterr()
    with pytest.raises(UserError, match="none of the images could be read") as caught:
        run_main(*flags, "--data_dir", tmp_path / "broken", "--output", output)
    assert caught.value.status == 1
    assert "cannot be read: it is not one of JPEG" in capsys.readouterr().err
    assert not list(output.glob("*.npz"))
    for change in (["--batch_size", "0"], ["--num_workers", "-1"], ["--clip_denoised", "maybe"]):
        with pytest.raises(SystemExit):
            run_main(*flags, *change, "--output", output)
