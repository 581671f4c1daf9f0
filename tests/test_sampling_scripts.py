r"""The sampling scripts: what they write, for any number of processes; guidance against exact mathematics.

A Gaussian x_0 ~ N(0, s^2), pixel by pixel, has a best noise prediction that is linear in x_t, and the classifier here
a gradient that does not depend on x. So guidance moves every sample by an amount that a recursion in float64 gives,
from the signal levels abar and Bayes' rule alone.
"""

from __future__ import annotations

import json
import os
import signal
import time
from types import SimpleNamespace

from guided_diffusion import checkpoints
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import SAMPLERS
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_gaussian_diffusion,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from guided_diffusion.unet import EncoderUNetModel

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, as_flags, load_script, run_script, save_checkpoint, start_script
from PIL import Image
from reference import fill_weights
from torch import nn
from tqdm import tqdm

SCRIPTS = ("image_sample", "classifier_sample", "super_res_sample")


def script(name):
    """A module of scripts/."""
    return load_script(f"scripts/{name}.py")


pytestmark = pytest.mark.usefixtures("in_this_process")


def run_main(name, *flags):
    assert script(name).main([*map(str, flags), "--num_threads", "1"]) == 0


def load(path):
    """The arrays of a file of samples."""
    with np.load(path, allow_pickle=False) as z:
        return {name: z[name] for name in z.files}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Stub(nn.Module):
    """In the place of a network: `function` is its forward pass."""

    def __init__(self, function):
        super().__init__()
        self.forward = function

    def convert_to_fp32(self):
        pass


def use(monkeypatch, loader, function):
    monkeypatch.setattr(checkpoints, loader, lambda path, flags, seed=0: Stub(function))


# The file of samples


@pytest.fixture(scope="module")
def conditional_model(tmp_path_factory):
    """Flags of a small class-conditional model, with its checkpoint."""
    model = {**SMALL_MODEL, "class_cond": True}
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("models") / "conditional.pt", model)
    return [*as_flags(model), "--model_path", checkpoint, "--timestep_respacing", 5, "--num_threads", 1]


def test_same_file_from_one_process_from_two_and_after_a_kill(conditional_model, tmp_path):
    """And the samples are numbered, of the published layout, with a picture and a record beside them."""
    flags = [*conditional_model, "--num_samples", 11, "--batch_size", 2]
    name = "samples_11x32x32x3"
    run_main("image_sample", *flags, "--output", tmp_path / "one")
    assert names(tmp_path / "one") == [f"{name}.json", f"{name}.npz", f"{name}.png"]
    reference = (tmp_path / "one" / f"{name}.npz").read_bytes()
    arrays = load(tmp_path / "one" / f"{name}.npz")
    assert arrays.keys() == {"arr_0", "arr_1"}
    assert arrays["arr_0"].shape == (11, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].shape == (11,) and arrays["arr_1"].dtype == np.int64
    assert len(np.unique(arrays["arr_0"], axis=0)) == 11
    picture = Image.open(tmp_path / "one" / f"{name}.png")
    assert picture.size == (4 * 66 + 2, 3 * 66 + 2)  # magnified twice
    assert (np.asarray(picture)[2:66:2, 68:132:2] == arrays["arr_0"][1]).all()
    record = json.loads((tmp_path / "one" / f"{name}.json").read_text())
    assert record["settings"]["class_cond"] is True
    assert record["last_run"]["samples_made"] == record["samples"] == 11

    two = run_script(
        *flags, "--output", tmp_path / "two", script="scripts/image_sample.py", kind="mpiexec", processes=2
    )
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("11 to make") == 1  # one process speaks
    assert (tmp_path / "two" / f"{name}.npz").read_bytes() == reference

    killed = start_script(*flags, "--output", tmp_path / "killed", script="scripts/image_sample.py")
    parts = tmp_path / "killed" / f"{name}_parts"
    while killed.poll() is None and not list(parts.glob("0*.npz")):
        time.sleep(0.001)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    there = {path: path.stat().st_mtime_ns for path in parts.glob("0*.npz")}
    assert 0 < len(there) < 6 and not (tmp_path / "killed" / f"{name}.npz").exists()
    run_main("image_sample", *flags, "--output", tmp_path / "killed")
    assert (tmp_path / "killed" / f"{name}.npz").read_bytes() == reference
    assert names(tmp_path / "killed") == names(tmp_path / "one")
    record = json.loads((tmp_path / "killed" / f"{name}.json").read_text())
    assert record["last_run"]["samples_made"] == 11 - sum(1 if "000005" in p.name else 2 for p in there)


@pytest.mark.parametrize("sampler", ["ddim", "sde-dpmsolver++"])
def test_samples_depend_on_seed_and_number_alone(sampler, monkeypatch, tmp_path):
    """In other batches, and among more: the same. The stub computes row by row, and so to the byte."""
    use(monkeypatch, "load_model", lambda x, t: x)
    flags = ["--image_size", 4, "--timestep_respacing", 4, "--sampler", sampler, "--model_path", "x"]
    run_main("image_sample", *flags, "--num_samples", 10, "--batch_size", 4, "--output", tmp_path)
    run_main("image_sample", *flags, "--num_samples", 7, "--batch_size", 3, "--output", tmp_path)
    run_main("image_sample", *flags, "--num_samples", 5, "--seed", 1, "--output", tmp_path)
    many, few, others = (load(tmp_path / f"samples_{n}x4x4x3.npz") for n in (10, 7, 5))
    assert many.keys() == {"arr_0"}
    assert (many["arr_0"][:7] == few["arr_0"]).all()
    assert (many["arr_0"][:5] != others["arr_0"]).mean() > 0.5


def test_classes_reach_the_model_and_the_file(monkeypatch, tmp_path):
    """The model's image is as bright as its class; DDPM ends with the image that the model sees."""
    level = lambda y: y.view(-1, 1, 1, 1) / 999 * 2 - 1  # noqa: E731
    use(monkeypatch, "load_model", lambda x, t, y: level(y).expand_as(x))
    flags = ["--image_size", 2, "--timestep_respacing", 3, "--predict_xstart", "True", "--class_cond", "True"]
    run_main("image_sample", *flags, "--num_samples", 300, "--batch_size", 64, "--output", tmp_path)
    arrays = load(tmp_path / "samples_300x2x2x3.npz")
    expected = np.rint(arrays["arr_1"] / 999 * 255)
    assert (arrays["arr_0"] == expected[:, None, None, None]).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("clip_denoised", "level"), [(True, 1.0), (False, 3.0)])
def test_clipping(sampler, clip_denoised, level):
    """The last step gives the image that the model sees, cut to the range of pixels if asked for."""
    from guided_diffusion.sampling import denoise

    diffusion = create_gaussian_diffusion(steps=1000, timestep_respacing="3", predict_xstart=True)
    args = SimpleNamespace(seed=0, sampler=sampler, clip_denoised=clip_denoised)
    with tqdm(disable=True) as bar:
        samples = denoise(lambda x, t: torch.full_like(x, 3.0), diffusion, range(2), 4, args, bar, {})
    torch.testing.assert_close(samples, torch.full((2, 3, 4, 4), level))


def test_classes_are_uniform_and_belong_to_the_number():
    from guided_diffusion.sampling import draw_classes

    classes = draw_classes(0, 20000)
    counts = np.bincount(classes, minlength=1000)
    assert len(counts) == 1000 and counts.min() > 0
    # Chi-squared with 999 degrees of freedom: its mean is 999, its deviation 45.
    assert abs(((counts - 20) ** 2 / 20).sum() - 999) < 5 * 45
    assert (draw_classes(0, 5) == classes[:5]).all()
    assert (draw_classes(1, 20000) == classes).mean() < 0.01


def test_a_finished_file_is_left_as_it_is(monkeypatch, tmp_path, capsys):
    use(monkeypatch, "load_model", lambda x, t: x)
    flags = ["--image_size", 4, "--timestep_respacing", 2, "--num_samples", 3, "--model_path", "x"]
    monkeypatch.chdir(tmp_path)
    run_main("image_sample", *flags)
    folder = tmp_path / "results" / "image_sample"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 3
    (folder / "samples_3x4x4x3_parts").mkdir()  # as a kill at the last moment leaves it
    capsys.readouterr()
    run_main("image_sample", *flags)
    assert "exists already" in capsys.readouterr().err
    for change, words in (
        (["--seed", 1], "--seed was 0 and is now 1"),
        (["--use_ddim", "True"], "--sampler was ddpm and is now ddim"),
        (["--batch_size", 2], "--batch_size was 16 and is now 2"),
    ):
        with pytest.raises(UserError, match=words):
            run_main("image_sample", *flags, *change)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    preview, result = folder / "samples_3x4x4x3.png", folder / "samples_3x4x4x3.npz"
    picture, whole = preview.read_bytes(), result.read_bytes()
    preview.unlink()
    run_main("image_sample", *flags)
    assert preview.read_bytes() == picture and result.stat().st_mtime_ns == before[result]
    result.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"samples_3x4x4x3\.npz is damaged: its end is missing\.\nMove it away"):
        run_main("image_sample", *flags)
    result.unlink()
    run_main("image_sample", *flags)
    assert result.read_bytes() == whole
    (folder / "samples_3x4x4x3.json").unlink()
    with pytest.raises(UserError, match="another --output"):
        run_main("image_sample", *flags)


def test_begun_with_other_settings(monkeypatch, tmp_path):
    """The model fails in the second batch; the first one is kept, and not mixed with others."""
    seen = []

    def model(x, t):
        if len(seen) == 2:
            raise torch.OutOfMemoryError
        seen.append(len(x))
        return x

    use(monkeypatch, "load_model", model)
    flags = ["--image_size", 4, "--timestep_respacing", 2, "--num_samples", 3, "--batch_size", 2, "--output", tmp_path]
    with pytest.raises(UserError, match="is too small for a batch of 1 images: lower --batch_size"):
        run_main("image_sample", *flags)
    assert names(tmp_path) == ["samples_3x4x4x3_parts"]
    with pytest.raises(UserError, match="--batch_size was 2 and is now 1"):
        run_main("image_sample", *flags, "--batch_size", 1)
    use(monkeypatch, "load_model", lambda x, t: seen.append(len(x)) or x)
    run_main("image_sample", *flags)
    assert seen == [2, 2, 1, 1]
    assert load(tmp_path / "samples_3x4x4x3.npz")["arr_0"].shape == (3, 4, 4, 3)


def test_the_grid_is_nearly_square_with_white_gaps():
    from guided_diffusion.sampling import image_grid

    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 4, 3), np.uint8)
    grid = image_grid(images, side=3, pad=1)
    assert grid.shape == (2 * 4 + 1, 3 * 5 + 1, 3) and grid.dtype == np.uint8
    for i in range(5):
        top, left = 1 + 4 * (i // 3), 1 + 5 * (i % 3)
        assert (grid[top : top + 3, left : left + 4] == i).all()
        grid[top : top + 3, left : left + 4] = 255
    assert (grid == 255).all()
    assert image_grid(images[:1], side=3).shape == (3, 4, 3)
    assert image_grid(np.zeros((64, 2, 2, 3), np.uint8), side=2).shape == (34, 34, 3)
    magnified = image_grid(images, side=11)  # three times: 9 pixels high
    assert magnified.shape == (2 * 11 + 2, 3 * 14 + 2, 3) and (magnified[2:11, 16:28] == 1).all()


def test_a_file_in_pieces_is_the_file_that_numpy_writes(tmp_path):
    from guided_diffusion.sampling import write_npz

    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 3), dtype=np.uint8)
    write_npz(str(tmp_path / "a.npz"), pixels.shape, iter([pixels[:2], pixels[2:4], pixels[4:]]), np.arange(5))
    np.savez(tmp_path / "b.npz", pixels, np.arange(5))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


# Guidance

ABAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))  # the linear schedule of 1000 steps
STEPS = 50
LEVELS = ABAR[[round(i * 999 / (STEPS - 1)) for i in range(STEPS)]]
S2 = 0.02  # variance of the data
PATTERN = 0.2 * np.cos(np.arange(3 * 8 * 8)).reshape(3, 8, 8)  # of the classifier's gradient


def slope(abar):
    """Best noise prediction: eps = slope * x_t."""
    return np.sqrt(1 - abar) / (abar * S2 + 1 - abar)


def best_model(x, t):
    return torch.from_numpy(slope(ABAR[t.numpy()])).to(x.dtype).view(-1, 1, 1, 1) * x


def classifier(x, t):
    """Logits of classes 0..999, linear in x, and of one class more that takes all of the probability but e^-9000.

    So the gradient of log p(y | x) is that of the logit y, (y + 1) / 1000 * PATTERN, wherever guidance leads x.
    """
    projection = (x * torch.from_numpy(PATTERN).to(x.dtype)).sum((1, 2, 3))
    logits = projection[:, None] * torch.arange(1, 1001) / 1000
    return torch.cat([logits, torch.full((len(x), 1), 1e4)], dim=1)


def exact_shift(sampler, labels, scale):
    """What guidance adds to samples, (B, 3, 8, 8), in float64: every step passes it on and adds its own."""
    gradient = scale * (labels[:, None, None, None] + 1) / 1000 * PATTERN
    shift, before_start = np.zeros_like(gradient), None
    lam = np.log(LEVELS / (1 - LEVELS)) / 2
    for i in reversed(range(STEPS)):
        abar, before = LEVELS[i], LEVELS[i - 1] if i else 1.0
        r = abar / before  # x_i = sqrt(r) x_{i-1} + sqrt(1 - r) z
        eps = slope(abar) * shift
        if sampler != "ddpm":
            eps = eps - np.sqrt(1 - abar) * gradient  # of the guided score
        start = (shift - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
        if sampler == "ddim":
            shift = np.sqrt(before) * start + np.sqrt(1 - before) * eps
        elif sampler == "sde-dpmsolver++":
            line = start  # half a step ahead
            if before_start is not None and i:
                ratio = (lam[i - 1] - lam[i]) / (lam[i] - lam[i + 1])
                line = start + min(1, ratio) / 2 * (start - before_start)
            left = (1 - before) * np.sqrt(r) / (1 - abar)
            shift, before_start = left * shift + np.sqrt(before) * (1 - r) / (1 - abar) * line, start
        elif i:
            small = 1 / (1 / (1 - before) + r / (1 - r))  # q(x_{i-1} | x_i, x_0): the precisions add up
            shift = small * (np.sqrt(before) / (1 - before) * start + np.sqrt(r) / (1 - r) * shift)
            shift = shift + (1 - r) * gradient  # the mean moves by variance * gradient; the variance is beta
        else:  # the variance of the last step is that of the posterior before it
            ratio = LEVELS[1] / LEVELS[0]
            shift = start + gradient / (1 / (1 - LEVELS[0]) + ratio / (1 - ratio))
    return shift


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_moves_samples_by_the_known_amount(sampler):
    from guided_diffusion.sampling import class_gradient, denoise

    diffusion = create_gaussian_diffusion(steps=1000, timestep_respacing=str(STEPS))
    args = SimpleNamespace(seed=3, sampler=sampler, clip_denoised=False)
    labels = np.array([0, 499, 999])

    def samples(cond_fn):
        model, conditions = (lambda x, t, y: best_model(x, t)), {"y": torch.from_numpy(labels)}
        with tqdm(disable=True) as bar:
            return denoise(model, diffusion, range(3), 8, args, bar, conditions, cond_fn).double().numpy()

    unguided = samples(None)
    for scale in (0.0, 1.0, 4.0, -2.0):
        expected = exact_shift(sampler, labels, scale)
        assert scale == 0 or np.abs(expected).max() > 100 * 1e-4
        moved = samples(class_gradient(classifier, scale)) - unguided
        np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("sampler", "scale"), [("ddpm", 12), ("ddim", 2), ("sde-dpmsolver++", 3)])
def test_the_script_guides_by_the_known_amount(sampler, scale, monkeypatch, tmp_path):
    """Against image_sample.py with the same seed, to the rounding of two pixels."""
    use(monkeypatch, "load_model", best_model)
    use(monkeypatch, "load_noisy_classifier", classifier)
    flags = ["--image_size", 8, "--timestep_respacing", STEPS, "--sampler", sampler, "--clip_denoised", "False"]
    flags += ["--num_samples", 20, "--batch_size", 8, "--seed", 2]
    run_main("image_sample", *flags, "--output", tmp_path / "unguided")
    run_main("classifier_sample", *flags, "--classifier_scale", scale, "--output", tmp_path / "guided")
    unguided, guided = (load(tmp_path / run / "samples_20x8x8x3.npz") for run in ("unguided", "guided"))
    assert unguided.keys() == {"arr_0"} and guided.keys() == {"arr_0", "arr_1"}
    expected = exact_shift(sampler, guided["arr_1"], scale).transpose(0, 2, 3, 1) * 127.5
    assert np.abs(expected).max() > 5
    for arrays in (unguided, guided):
        assert arrays["arr_0"].min() > 0 and arrays["arr_0"].max() < 255  # nothing is cut off
    moved = guided["arr_0"].astype(float) - unguided["arr_0"]
    assert np.abs(moved - expected).max() < 1.02
    assert np.abs((moved - expected).mean()) < 5 * np.sqrt(1 / 6 / moved.size)  # rounding is even-handed


def test_a_guided_model_is_given_classes_only_if_it_wants_them(monkeypatch, tmp_path):
    given = []
    use(monkeypatch, "load_model", lambda x, t, *y: given.append(y) or x)
    use(monkeypatch, "load_noisy_classifier", classifier)
    flags = ["--image_size", 8, "--timestep_respacing", 2, "--num_samples", 2, "--output", tmp_path]
    run_main("classifier_sample", *flags)
    assert given == [(), ()]
    run_main("classifier_sample", *flags, "--class_cond", "True", "--output", tmp_path / "conditional")
    labels = load(tmp_path / "conditional" / "samples_2x8x8x3.npz")["arr_1"]
    assert [y[0].tolist() for y in given[2:]] == [labels.tolist()] * 2


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial_v2"])
def test_guidance_is_the_gradient_of_a_real_classifier(pool, monkeypatch):
    """Against central differences in float64, along random directions; each image has its own class."""
    from guided_diffusion.sampling import class_gradient

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the network's float32 is to be float64
    monkeypatch.setattr(torch, "float32", torch.float64)
    network = EncoderUNetModel(16, 3, 32, 10, 1, (2,), channel_mult=(1, 2), num_head_channels=16, pool=pool)
    network = fill_weights(network).double()
    network.dtype = torch.float64
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn((2, 2, 3, 16, 16), generator=generator, dtype=torch.float64)
    t, y = torch.tensor([10, 700]), torch.tensor([3, 8])

    def log_p(x):
        logits = network(x, t)
        return (logits[[0, 1], y] - logits.exp().sum(1).log()).detach()

    step = 1e-4
    slopes = (log_p(x + step * direction) - log_p(x - step * direction)) / (2 * step)
    with torch.no_grad():
        gradient = class_gradient(network, 2.5)(x, t, y)
    assert not gradient.requires_grad
    assert slopes.abs().min() > 1e-4
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), 2.5 * slopes, rtol=1e-5, atol=0)


# Upsampling


@pytest.fixture
def small_images(tmp_path):
    """Five small images with classes, and the file that holds them."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    labels = np.array([7, 0, 999, 3, 3])
    path = tmp_path / "small.npz"
    np.savez_compressed(path, images, labels, other=np.zeros(3))
    return SimpleNamespace(path=path, images=images, labels=labels)


def test_every_sample_enlarges_its_small_image(small_images, monkeypatch, tmp_path, capsys):
    """The stub's image is the small one with every pixel doubled; its samples go round the five images."""
    given = []

    def upsampler(x, t, low_res, y):
        given.append(y)
        assert low_res.shape == (len(x), 3, 4, 4)
        return low_res.repeat_interleave(2, 2).repeat_interleave(2, 3)

    use(monkeypatch, "load_upsampler", upsampler)
    flags = ["--large_size", 8, "--small_size", 4, "--timestep_respacing", 2, "--predict_xstart", "True"]
    flags += ["--class_cond", "True", "--base_samples", small_images.path, "--num_samples", 12, "--batch_size", 5]
    run_main("super_res_sample", *flags, "--output", tmp_path / "out")
    assert "5 images in" in capsys.readouterr().err
    arrays = load(tmp_path / "out" / "samples_12x8x8x3.npz")
    around = np.arange(12) % 5
    assert (arrays["arr_0"] == small_images.images[around].repeat(2, 1).repeat(2, 2)).all()
    assert (arrays["arr_1"] == small_images.labels[around]).all()
    assert (torch.cat(given[::2]).numpy() == small_images.labels[around]).all()


def test_an_upsampler_is_given_classes_that_it_knows(small_images, monkeypatch, tmp_path):
    """By their indices; and by their names, where the record of the small images has them."""
    use(monkeypatch, "load_upsampler", lambda x, t, low_res, y: torch.zeros_like(x))
    flags = [
        "--large_size",
        8,
        "--small_size",
        4,
        "--timestep_respacing",
        2,
        "--num_samples",
        2,
        "--class_cond",
        "True",
    ]
    flags += ["--base_samples", small_images.path, "--model_path", tmp_path / "model.pt", "--output", tmp_path / "out"]
    classes = {"0": "cat", "3": "dog", "7": "owl"}
    (tmp_path / "classes.json").write_text(json.dumps({"order": "text", "classes": classes}))
    with pytest.raises(
        UserError, match=r"has images of class 999, unknown to the upsampler\.\n.* 0: cat, 3: dog, 7: owl"
    ):
        run_main("super_res_sample", *flags)
    classes["999"] = "yak"
    (tmp_path / "classes.json").write_text(json.dumps({"order": "text", "classes": classes}))
    names = {"0": "cat", "3": "hen", "7": "owl", "999": "yak"}
    small_images.path.with_suffix(".json").write_text(json.dumps({"classes": names}))
    with pytest.raises(UserError, match="has images of class 3 hen, unknown to the upsampler"):
        run_main("super_res_sample", *flags)
    small_images.path.with_suffix(".json").write_text("[]")
    run_main("super_res_sample", *flags)
    record = json.loads((tmp_path / "out/samples_2x8x8x3.json").read_text())
    assert record["classes"] == {"0": "cat", "7": "owl"}


def test_classes_guide_as_recorded(monkeypatch, tmp_path):
    """Of the classifier where the model has none; of both where both do, if they agree."""
    use(monkeypatch, "load_noisy_classifier", lambda x, t: x.flatten(1))
    flags = ["--image_size", 4, "--timestep_respacing", 2, "--num_samples", 20, "--batch_size", 20]
    flags += ["--model_path", tmp_path / "m/model.pt", "--classifier_path", tmp_path / "c/model.pt"]
    for folder, names in (("m", {"0": "cat", "5": "dog"}), ("c", {"0": "cat", "6": "dog"})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "classes.json").write_text(json.dumps({"order": "text", "classes": names}))
    use(monkeypatch, "load_model", lambda x, t, y=None: x)
    run_main("classifier_sample", *flags, "--output", tmp_path / "one")
    assert {*load(tmp_path / "one/samples_20x4x4x3.npz")["arr_1"].tolist()} == {0, 6}
    conditional = [*flags, "--class_cond", "True", "--output", tmp_path / "two"]
    with pytest.raises(UserError, match="model and classifier were trained with different classes"):
        run_main("classifier_sample", *conditional)
    (tmp_path / "c/classes.json").write_bytes((tmp_path / "m/classes.json").read_bytes())
    run_main("classifier_sample", *conditional, "--classes", "dog")
    assert {*load(tmp_path / "two/samples_20x4x4x3.npz")["arr_1"].tolist()} == {5}


def test_an_upsampler_end_to_end(small_images, tmp_path):
    """What image_sample.py writes is what super_res_sample.py reads; a real upsampler, from its checkpoint."""
    flags = {**sr_model_and_diffusion_defaults(), "large_size": 64, "small_size": 4}
    flags |= {"num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "", "timestep_respacing": "2"}
    model, _ = sr_create_model_and_diffusion(**flags)
    torch.save(fill_weights(model).state_dict(), tmp_path / "up.pt")
    flags = [*as_flags(flags), "--model_path", tmp_path / "up.pt", "--num_samples", 2]
    seen = []
    for i, change in enumerate((small_images.images, small_images.images ^ np.uint8(255))):
        np.savez(tmp_path / f"{i}.npz", change)
        run_main("super_res_sample", *flags, "--base_samples", tmp_path / f"{i}.npz", "--output", tmp_path / f"out{i}")
        seen.append(load(tmp_path / f"out{i}" / "samples_2x64x64x3.npz"))
    assert seen[0].keys() == {"arr_0"} and seen[0]["arr_0"].shape == (2, 64, 64, 3)
    assert (seen[0]["arr_0"] != seen[1]["arr_0"]).mean() > 0.1  # the small images matter
    with pytest.raises(UserError, match=r"--base_samples\) was"):
        run_main("super_res_sample", *flags, "--base_samples", tmp_path / "1.npz", "--output", tmp_path / "out0")


# Mistakes


def expect_plain_words(words, name, flags, output):
    with pytest.raises(UserError) as caught:
        run_main(name, *flags, "--output", output)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2, message
    for word in words:
        assert word in message, message
    assert not output.exists()


def damaged(path, place: int) -> bytes:
    """The content of a file with one byte changed."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    return bytes(data)


def test_small_images_that_cannot_be_read_to_the_end(tmp_path):
    path = tmp_path / "small.npz"
    images = np.random.default_rng(0).integers(0, 16, (400, 16, 16, 3), dtype=np.uint8)
    np.savez_compressed(path, arr_0=images)
    data = bytearray(path.read_bytes())
    data[50_000:-200] = np.random.default_rng(1).bytes(len(data) - 50_200)
    path.write_bytes(data)
    small = script("super_res_sample").SmallImages(str(path), 16, False)
    assert (small.read(range(3)) == images[:3]).all()
    with pytest.raises(UserError, match=r"^--base_samples .*small\.npz is .* damaged: "):
        small.read(range(399, 400))


def test_small_images_that_are_none(monkeypatch, small_images, tmp_path):
    use(monkeypatch, "load_upsampler", lambda *_: pytest.fail("the mistake is to be found before"))
    images, labels = small_images.images, small_images.labels
    files = {
        "none.npz": None,
        "text.npz": b"nothing\n" * 10,
        "half.npz": small_images.path.read_bytes()[:300],
        "other.npz": {"images": images},
        "unlabelled.npz": {"arr_0": images},
        "size.npz": {"arr_0": images[:, :2], "arr_1": labels},
        "real.npz": {"arr_0": images / 255, "arr_1": labels},
        "flat.npz": {"arr_0": images[0], "arr_1": labels},
        "empty.npz": {"arr_0": images[:0], "arr_1": labels[:0]},
        "object.npz": {"arr_0": np.array([print] * 5, dtype=object), "arr_1": labels},
        "fortran.npz": {"arr_0": np.asfortranarray(images), "arr_1": labels},
        "short.npz": {"arr_0": images, "arr_1": labels[:3]},
        "fractions.npz": {"arr_0": images, "arr_1": labels / 2},
        "classes.npz": {"arr_0": images, "arr_1": labels + 1},
        "pickled.npz": {"arr_0": images, "arr_1": labels.astype(object)},
        "damaged.npz": damaged(small_images.path, 300),
        "damaged_labels.npz": damaged(small_images.path, small_images.path.read_bytes().index(b"arr_1.npy") + 100),
    }
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            np.savez(tmp_path / name, **content)
    np.savez(tmp_path / "late.npz", arr_0=np.concatenate([images] * 200), arr_1=np.concatenate([labels] * 200))
    (tmp_path / "damaged_late.npz").write_bytes(damaged(tmp_path / "late.npz", 40_000))
    np.save(tmp_path / "single.npy", images)
    mistakes = {
        "": ["--base_samples FILE.npz"],
        "none.npz": ["No such file"],
        "text.npz": ["not an .npz file"],
        "half.npz": ["not an .npz file"],
        "single.npy": ["not an .npz file"],
        "other.npz": ["has images", "arr_0"],
        "unlabelled.npz": ["has arr_0", "arr_1", "--class_cond"],
        "size.npz": ["(5, 2, 4, 3)", "(n, 4, 4, 3)", "--small_size"],
        "real.npz": ["float64", "uint8"],
        "flat.npz": ["(4, 4, 3)"],
        "empty.npz": ["(0, 4, 4, 3)"],
        "object.npz": ["object", "uint8"],
        "fortran.npz": ["Fortran"],
        "short.npz": ["arr_1", "(3,)", "5 images"],
        "fractions.npz": ["arr_1", "float64", "integer"],
        "classes.npz": ["arr_1", "1 to 1000", "0..999"],
        "pickled.npz": ["does not contain plain arrays"],
        "damaged.npz": ["--base_samples", "damaged: Bad CRC-32 for file 'arr_0.npy'"],
        "damaged_late.npz": ["--base_samples", "damaged: arr_0.npy has a wrong checksum"],
        "damaged_labels.npz": ["--base_samples", "damaged: Bad CRC-32 for file 'arr_1.npy'"],
    }
    flags = ["--small_size", 4, "--large_size", 64, "--class_cond", "True", "--model_path", "untrained"]
    for name, words in mistakes.items():
        path = tmp_path / name if name else ""
        expect_plain_words(words, "super_res_sample", [*flags, "--base_samples", path], tmp_path / "out")


def test_plain_mistakes_get_plain_words(small_checkpoint, small_images, tmp_path):
    output = tmp_path / "out"
    settings = {**classifier_defaults(), "classifier_width": 32, "classifier_depth": 1}
    settings["classifier_attention_resolutions"] = "32"
    torch.save(create_classifier(**settings).state_dict(), tmp_path / "classifier.pt")
    (tmp_path / "text.pt").write_text("nothing\n" * 50)
    (tmp_path / "file").write_text("")
    model = [*as_flags(SMALL_MODEL), "--model_path", small_checkpoint, "--timestep_respacing", 2]
    of_model = [
        ([], ["--model_path", ""], ["--model_path"]),
        ([], ["--model_path", tmp_path / "none.pt"], ["--model_path", "none.pt"]),
        ([], ["--model_path", tmp_path / "text.pt"], ["text.pt", "was not written by torch.save"]),
        ([], ["--model_path", tmp_path / "classifier.pt"], ["a classifier of noisy images"]),
        ([], ["--num_channels", 64], ["--num_channels 32"]),
        ([], ["--noise_schedule", "sigmoid"], ["--noise_schedule", "cosine"]),
        ([], ["--timestep_respacing", 2000], ["--timestep_respacing", "2000"]),
        ([], ["--output", tmp_path / "file" / "out"], ["cannot write", "Not a directory", "--output"]),
    ]
    untrained = ["--model_path", "untrained", "--timestep_respacing", 2, "--num_channels", 32]
    guided = [*untrained, "--classifier_path", tmp_path / "classifier.pt", *as_flags(settings)]
    of_classifier = [
        (guided, ["--classifier_path", ""], ["--classifier_path"]),
        (guided, ["--classifier_path", small_checkpoint], ["--classifier_path", "diffusion model"]),
        (guided, ["--classifier_width", 64], ["--classifier_width 32"]),
    ]
    enlarging = [*untrained, "--small_size", 4, "--large_size", 64, "--base_samples", small_images.path]
    of_upsampler = [
        (enlarging, ["--model_path", small_checkpoint], ["--model_path", "diffusion model", "upsampler"]),
        (enlarging, ["--small_size", 64], ["--small_size", "(n, 64, 64, 3)"]),
    ]
    for name, mistakes in zip(SCRIPTS, (of_model, of_classifier, of_upsampler), strict=True):
        for flags, change, words in mistakes:
            if "--output" in change:
                with pytest.raises(UserError, match=r"cannot write.*Not a directory.*--output"):
                    run_main(name, *model, *change)
            else:
                expect_plain_words(words, name, [*(flags or model), *change], output)


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_that_cannot_be_read(name, capsys):
    for flags, words in (
        (["--batch_size", "0"], "--batch_size"),
        (["--num_samples", "ten"], "--num_samples"),
        (["--clip_denoised", "maybe"], "True or False"),
        (["--seed", "18446744073709551616"], "--seed: expected a whole number from 0 to 18446744073709551615"),
        (["--output", "s3://bucket/out"], "--output: expected a local folder, gs://, az:// or https://"),
    ):
        with pytest.raises(SystemExit) as caught:
            script(name).main(flags)
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert words in message and len(message.splitlines()) == 1


def test_a_misspelt_flag_is_answered_at_once(tmp_path):
    done = run_script("--num_sampels", 3, script="scripts/image_sample.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: there is no flag --num_sampels: did you mean --num_samples? See --help.\n"
    assert names(tmp_path) == []
