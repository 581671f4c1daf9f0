"""Changes of exact posterior samples, measured as those of images are, against the theory."""

import sys
from types import SimpleNamespace

from guided_diffusion.changes.results import changes_file
from guided_diffusion.changes.statistics import changes_at, measure_chi, measure_correlation
from guided_diffusion.correlations import TablePairs
from random_hierarchy_model import mean_field
from random_hierarchy_model.belief_propagation import infer
from random_hierarchy_model.leaf_noise import epsilon_log_likelihoods

import numpy as np
import pytest
import torch
from conftest import as_flags, load_script
from PIL import Image
from test_random_hierarchy_model import grammar
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

V, M, S, DEPTH = 32, 8, 2, 7
REFERENCE = {0.7: 4.62, 0.8: 2.52}  # chi of 24 data with 64 exact samples each, by e


def posterior_samples(epsilon, seed, samples=64):
    """Leaves of a datum of a grammar of its own, (n,), and exact posterior samples of it, (samples, n)."""
    g = grammar(V, S, DEPTH, M, seed)
    leaves = torch.from_numpy(g.sample(1, seed)[0])
    generator = torch.Generator().manual_seed(seed)
    drawn, *_ = infer(g, epsilon_log_likelihoods(leaves, epsilon, V)).samples(generator, samples)
    return leaves[0].numpy(), drawn[0].numpy()


def tree_distance():
    """r = s^h - 1, h being the level of the lowest common ancestor of two leaves."""
    return float(S) ** grammar(V, S, DEPTH, M).ancestor_levels() - 1


@pytest.mark.parametrize("epsilon", REFERENCE)
def test_changes_of_exact_samples_are_those_of_the_theory(epsilon):
    pairs = [posterior_samples(epsilon, seed) for seed in range(24)]
    changes = np.stack([np.where(samples == leaves, -1.0, 1.0) for leaves, samples in pairs])
    found = changes_at(7, 10, changes, TablePairs(tree_distance()))
    assert found.distance.tolist() == [0, 1, 3, 7, 15, 31, 63, 127]
    chi = measure_chi(found)
    error = (chi.high - chi.low) / 4  # of a 95% interval
    expected = mean_field.susceptibility(epsilon, V, M, S, DEPTH)
    assert abs(chi.value - REFERENCE[epsilon]) < 3 * 2**0.5 * error  # both have errors
    assert abs(chi.value - expected) < max(3 * error, 0.05 * expected)
    correlation = measure_correlation(found)
    theory = np.array(mean_field.correlations(epsilon, V, M, S, DEPTH))
    difference = correlation.value - theory / theory[0]
    assert np.all(np.abs(difference) <= np.maximum(0.75 * (correlation.high - correlation.low), 0.02))  # 3 errors


class Leaves(nn.Module):
    """The leaves in images of one pixel each, one-hot: (B, n, v)."""

    def forward(self, x):
        return nn.functional.one_hot(x.flatten(1)[:, : S**DEPTH], V).float()


def test_the_script_reads_the_leaves_of_images(tmp_path, monkeypatch, in_this_process):
    """128 leaves as the first pixels of an image of 12 x 12, red = 8 times the symbol."""
    script = load_script("scripts/change_correlations.py")
    pairs = [posterior_samples(0.7, seed, samples=6) for seed in range(4)]
    write_images(tmp_path, pairs)
    read = lambda image: torch.from_numpy(image[:, :, 0] // 8).long()  # noqa: E731
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(leaves=lambda: (Leaves(), read, tree_distance())))
    folders = {"starting_data_dir": tmp_path / "starts", "data_dir": tmp_path / "out", "output": tmp_path / "results"}
    about = {"time_series": 7, "timestep_respacing": 10, "image_size": 12, "num_threads": 1, "num_workers": 0}
    assert script.main(as_flags({**folders, **about, "tokens": "own:leaves"})) == 0
    with np.load(changes_file(str(tmp_path / "results"), "leaves", 7, 10)) as file:
        found = dict(file)
    changes = np.stack([np.where(samples == leaves, 0.0, (2 / V) ** 0.5) for leaves, samples in pairs])
    expected = changes_at(7, 10, changes, TablePairs(tree_distance()))
    assert found["correlation"] == pytest.approx(expected.correlation, rel=1e-5, abs=1e-9)
    assert found["chi_numerator"] == pytest.approx(expected.chi_numerator, rel=1e-5)


def write_images(folder, pairs):
    """Starting images and their samples of k = 7 of N = 10, one pixel per leaf."""
    for number, (leaves, samples) in enumerate(pairs):
        names = [
            f"out/t_7_10_images/{number:03d}_t0700{'' if j == 0 else f'_s{j + 1:03d}'}.png" for j in range(len(samples))
        ]
        for name, symbols in zip([f"starts/{number:03d}.png", *names], [leaves, *samples], strict=True):
            image = np.zeros((144, 3), np.uint8)
            image[: S**DEPTH, 0] = 8 * symbols
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.reshape(12, 12, 3)).save(folder / name)
