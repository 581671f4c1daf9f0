"""Noised images, noise streams, units of work, and names."""

from __future__ import annotations

from guided_diffusion.dist_util import share_of
from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import (
    NoiseStreams,
    SampleFolder,
    check_times,
    cut_units,
    default_output,
    from_pixels,
    noise_seed,
    noised_image,
    to_pixels,
)
from guided_diffusion.images.folder import LabelledImage
from guided_diffusion.script_util import create_gaussian_diffusion

import numpy as np
import pytest
import torch
from reference import seeded


def test_noised_image_has_the_signal_of_k_steps():
    """k single noising steps, written out one by one in float64, leave the same signal and noise."""
    diffusion = create_gaussian_diffusion(timestep_respacing="20")
    x_start, noise = seeded((2, 3, 4, 4), 1), seeded((2, 3, 4, 4), 2)
    signal, variance = 1.0, 0.0
    for k in range(1, 20):
        signal *= np.sqrt(1 - diffusion.betas[k - 1])
        variance = variance * (1 - diffusion.betas[k - 1]) + diffusion.betas[k - 1]
        expected = signal * x_start.double() + np.sqrt(variance) * noise.double()
        assert torch.allclose(noised_image(diffusion, x_start, k, noise).double(), expected, atol=1e-6)
    assert torch.equal(noised_image(diffusion, x_start, 0, noise), x_start)
    assert torch.equal(noised_image(diffusion, x_start, 20, noise), noise)


def test_a_stream_does_not_depend_on_its_neighbours():
    names = ["a/1.JPEG", "a/2.JPEG", "b/1.JPEG"]
    together = NoiseStreams(0, names, 5, "cpu")
    first, second = (together.randn((3, 3, 8, 8)) for _ in range(2))
    alone = NoiseStreams(0, names[1:2], 5, "cpu")
    assert torch.equal(alone.randn((1, 3, 8, 8))[0], first[1])
    assert torch.equal(alone.randn((1, 3, 8, 8))[0], second[1])
    with pytest.raises(ValueError, match="3 noise streams"):
        together.randn((2, 3, 8, 8))


def test_streams_are_independent_standard_normal():
    names = [f"{i}.png" for i in range(400)]
    draws = [NoiseStreams(seed, names, k, "cpu").randn((400, 1000)) for seed, k in ((0, 5), (0, 6), (1, 5))]
    for draw in draws:
        assert abs(draw.mean()) < 5 / np.sqrt(4e5)
        assert abs(draw.var() - 1) < 5 * np.sqrt(2 / 4e5)
        correlation = torch.corrcoef(draw).fill_diagonal_(0)
        assert correlation.abs().max() < 6 / np.sqrt(1000)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs((draws[a] * draws[b]).mean()) < 5 / np.sqrt(4e5)


def test_seeds_take_any_file_name():
    seeds = {noise_seed(seed, name, k) for seed in (0, 1) for name in ("a", "ä", "\udcff", "a/0") for k in (0, 1, 10)}
    assert len(seeds) == 24
    assert noise_seed(0, "a", 1) == noise_seed(0, "a", 1)


def test_units_keep_their_composition():
    images = [LabelledImage(f"{i}.png", None, "") for i in range(7)]
    everything = cut_units(images, 3, 5)
    assert [len(unit.images) for unit in everything] == [3, 3, 1]
    assert [image for unit in everything for image in unit.images] == images
    some = cut_units(images, 3, 5, done={"0.png", "1.png", "2.png", "3.png", "6.png"})
    assert [unit.images for unit in some] == [unit.images for unit in everything]
    assert [unit.todo for unit in some] == [set(), {"4.png", "5.png"}, set()]
    shares = [share_of(everything, rank, 2) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 1]
    assert sorted(unit.images[0].path for share in shares for unit in share) == ["0.png", "3.png", "6.png"]


def test_pixels_survive_the_way_there_and_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = from_pixels(pixels)
    assert images.shape == (1, 3, 16, 16)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert (to_pixels(images) == pixels).all()
    assert (to_pixels(torch.tensor([-1.5, 1.5, 0.0]).view(1, 3, 1, 1)) == [0, 255, 128]).all()
    with pytest.raises(UserError, match="use_fp16"):
        to_pixels(torch.tensor([float("nan"), 0, 0]).view(1, 3, 1, 1))


@pytest.mark.parametrize("bad", [-1, 21])
def test_times_out_of_range(bad):
    assert check_times([3, 0, 20, 3], 20) == [3, 0, 20]
    with pytest.raises(UserError, match=f"--step_reverse {bad} .* 0 to 20"):
        check_times([3, bad], 20)


def test_names():
    folder = SampleFolder("results/x", 125, 250, 1000)
    assert folder.path == "results/x/t_125_250_images"
    assert folder.record == "results/x/t_125_250_run.json"
    assert folder.sample("n01/a.b.JPEG") == "n01/a.b_t0500.JPEG"
    assert SampleFolder("x", 1, 3, 1000, "png").sample("a.jpg") == "a_t0333.png"
    assert default_output("datasets/ILSVRC2012/validation/") == "results/diffused_ILSVRC2012_validation"
    assert default_output("gs://bucket/images") == "results/diffused_bucket_images"
