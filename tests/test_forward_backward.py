"""Noised images, noise streams, units of work, and names."""

from __future__ import annotations

from dataclasses import replace

from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import (
    NoiseStreams,
    SampleFolder,
    check_times,
    cut_units,
    default_output,
    from_pixels,
    in_order_of_starts,
    noise_seed,
    noised_image,
    parse_sample,
    to_pixels,
    unfinished_turns,
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
    folder = SampleFolder("out", 5, 10, 1000, "png")
    everything = cut_units(images, 3, 5)
    assert [len(unit.images) for unit in everything] == [3, 3, 1]
    assert [image for unit in everything for image in unit.images] == images
    present = {f"{i}_t0500.png" for i in (0, 1, 2, 3, 6)}
    some = [unfinished_turns(unit, folder, 1, present).turns for unit in everything]
    assert [len(turns) for turns in some] == [0, 1, 0]
    assert (some[1][0].images, some[1][0].todo) == (everything[1].images, {1, 2})


@pytest.mark.parametrize("size", [1, 3, 4, 7, 16])
def test_more_trajectories_leave_the_units_as_they_are(size):
    """Rows of trajectories 2, 3, ... in this order, in full batches; what is beyond the last one is not to do."""
    images = [LabelledImage(f"{i}.png", None, "") for i in range(7)]
    one, three, eight = (cut_units(images, size, 5, m) for m in (1, 3, 8))
    assert three[: len(one)] == one and eight[: len(one)] == one
    for fewer, more in zip(three, eight, strict=False):
        assert replace(fewer, todo=more.todo) == more
        assert fewer.todo <= more.todo
    for units, m in ((three, 3), (eight, 8)):
        rows = [(u.trajectories[row], u.images[row].path) for u in units for row in range(len(u.images))]
        to_do = [(u.trajectories[row], u.images[row].path) for u in units for row in sorted(u.todo)]
        assert to_do == [(j, image.path) for j in range(1, m + 1) for image in images]
        assert rows[: len(to_do)] == to_do
        assert {len(unit.images) for unit in units[len(one) :]} == {size}


def test_turns_start_from_the_samples_of_the_last_one():
    images = [LabelledImage(f"{i}.png", None, "") for i in range(3)]
    folder = SampleFolder("out", 5, 10, 1000, "png")
    unit = cut_units(images, 2, 5, 2)[2]
    assert [(image.path, j) for image, j in zip(unit.images, unit.trajectories, strict=True)] == [
        ("0.png", 2),
        ("1.png", 2),
    ]
    chain = unfinished_turns(unit, folder, 3, {"0_t0500_s002.png", "1_t0500_s002_u02.png"})
    first, second, third = chain.turns
    assert [sorted(turn.todo) for turn in chain.turns] == [[1], [0], [0, 1]]
    assert first.starts == ("0.png", "1.png") and second.starts == first.samples and third.starts == second.samples
    assert third.samples == ("0_t0500_s002_u03.png", "1_t0500_s002_u03.png")
    assert chain.files == {"images": ["0.png", "1.png"]} and chain.steps == 15
    later = ["t_5_10_images/0_t0500_s002.png", "t_5_10_images/1_t0500_s002.png"]
    assert chain.at(second).files == {"samples": later}


def test_each_trajectory_has_its_own_noise_and_may_share_that_of_the_way_forward():
    images = [LabelledImage(f"{i}.png", None, "") for i in range(2)]
    first, *_, last = cut_units(images, 2, 5, 3)
    today = NoiseStreams(0, ["0.png", "1.png"], 5, "cpu").randn((2, 50))
    assert torch.equal(first.noise(0, "cpu").randn((2, 50)), today)
    assert last.trajectories == (3, 3) and not torch.isin(last.noise(0, "cpu").randn((2, 50)), today).any()
    assert torch.equal(last.forward_noise(0, "cpu").randn((2, 50)), today)


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
    assert folder.sample("n01/a.JPEG", trajectory=2) == "n01/a_t0500_s002.JPEG"
    assert folder.sample("a.JPEG", turn=2) == "a_t0500_u02.JPEG"
    assert folder.sample("a.JPEG", trajectory=1234, turn=100) == "a_t0500_s1234_u100.JPEG"
    assert SampleFolder("x", 1, 3, 1000, "png").sample("a.jpg") == "a_t0333.png"
    assert default_output("datasets/ILSVRC2012/validation/") == "results/diffused_ILSVRC2012_validation"
    assert default_output("gs://bucket/images") == "results/diffused_bucket_images"


@pytest.mark.parametrize("start", ["a", "n01/a_t0500", "a_s002", "a_u02_t0500_s002", "a\nb"])
@pytest.mark.parametrize(("trajectory", "turn"), [(1, 1), (2, 1), (1, 2), (1234, 100)])
def test_names_can_be_read_back(start, trajectory, turn):
    name = SampleFolder("x", 125, 250, 1000, "png").sample(f"{start}.JPEG", trajectory, turn)
    assert parse_sample(name.removesuffix(".png")) == (start, "t0500", trajectory, turn)
    assert parse_sample(start.replace("_t0500", "")) is None


def test_samples_as_starts_are_in_the_order_of_their_own_starts():
    def images(*paths):
        return [LabelledImage(path, int(path.partition("/")[0]), "") for path in paths]

    starts = images("0/1.png", "0/10.png", "0/2.png", "1/0.png")
    samples = images(*(SampleFolder("x", 1, 2, 1000, "png").sample(image.path) for image in starts))
    by_name = sorted(samples, key=lambda image: (image.label, image.path))
    assert by_name != samples
    assert in_order_of_starts(by_name, "out/t_1_2_images/") == samples
    assert in_order_of_starts(by_name, "out/mine") == by_name
