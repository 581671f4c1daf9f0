r"""The random hierarchy model: belief propagation against all derivations, and the diffusion loop against it.

Exact samples of the posterior of x_0 given x_k are the exact answer to "noise by k steps, then reverse time". So the
loop with the exact denoiser must give, at every k, as many classes and symbols of every level as they do: that checks
schedule, respacing, indices and sampler together, on data with a hierarchy.
"""

import hashlib
import itertools
import math

from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import from_pixels, noised_image, to_pixels
from guided_diffusion.images.io import read_image
from guided_diffusion.runs.pipeline import encode
from guided_diffusion.script_util import create_gaussian_diffusion
from random_hierarchy_model import ExactDenoiser, Grammar, TreeImages, image_posterior, posterior_mean, read_symbols
from random_hierarchy_model.belief_propagation import infer, log_likelihoods
from random_hierarchy_model.demo import GRAMMAR_FLAGS
from random_hierarchy_model.grammar import random_words
from random_hierarchy_model.training import images_from_flags

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


def grammar(v, s, depth, m, seed=0):
    return Grammar(num_symbols=v, branching=s, depth=depth, num_synonyms=m, seed=seed)


SMALL = [grammar(2, 2, 2, 2), grammar(3, 2, 3, 2), grammar(3, 2, 2, 3), grammar(2, 3, 2, 4), grammar(4, 4, 2, 2)]
SMALL += [grammar(5, 3, 1, 7), grammar(3, 2, 3, 1), grammar(1, 4, 2, 1), grammar(2, 1, 3, 1), grammar(6, 2, 2, 6)]


def all_derivations(g):
    """Every derivation of a grammar, once: the symbols of each level, level 0 first, as the nodes of the tree say."""

    def below(symbol, level):  # lists of the symbols of every level, level 0 first
        if level == 0:
            return [[[symbol]]]
        found = []
        for produced in g.rules[level - 1][symbol]:
            for parts in itertools.product(*(below(int(child), level - 1) for child in produced)):
                joined = [[symbol for part in parts for symbol in part[lower]] for lower in range(level)]
                found.append([*joined, [symbol]])
        return found

    every = [d for a in range(g.num_symbols) for d in below(a, g.depth)]
    return [np.array([d[level] for d in every]) for level in range(g.depth + 1)]


def enumerated(g, log_psi):
    """Log-evidence (B,), probabilities of all derivations (B, D), and marginals of every level, from the definition."""
    symbols = all_derivations(g)
    log_prior = -math.log(g.num_symbols) - sum(g.num_nodes(i) for i in range(1, g.depth + 1)) * math.log(g.num_synonyms)
    joint = log_prior + sum(log_psi[:, i, symbols[0][:, i]] for i in range(g.num_leaves))  # (B, D)
    log_evidence = np.logaddexp.reduce(joint, axis=1)
    probabilities = np.exp(joint - log_evidence[:, None])
    one_hot = [np.eye(g.num_symbols)[s] for s in symbols]  # (D, nodes, v)
    return log_evidence, probabilities, [np.einsum("bd,dna->bna", probabilities, h) for h in one_hot]


# The grammar


@pytest.mark.parametrize("g", [*SMALL, grammar(8, 4, 3, 8), grammar(32, 4, 2, 32)], ids=str)
def test_tuples_are_distinct(g):
    assert len(g.rules) == g.depth
    for tuples in g.rules:
        assert tuples.shape == (g.num_symbols, g.num_synonyms, g.branching)
        assert tuples.min() >= 0 and tuples.max() < g.num_symbols
        assert len({tuple(t) for t in tuples.reshape(-1, g.branching).tolist()}) == g.num_symbols * g.num_synonyms


def test_rules_are_uniform_and_of_their_seed():
    """Over many seeds, every tuple is as often that of every symbol; levels and seeds are independent."""
    counts = np.zeros((3, 9))  # which of the 9 pairs are the three symbols' own
    agree = 0
    for seed in range(3000):
        first, second = grammar(3, 2, 2, 1, seed).rules
        counts[np.arange(3), first[:, 0] @ [3, 1]] += 1
        agree += np.array_equal(first, second)
    assert ((counts - 3000 / 9) ** 2 / (3000 / 9)).sum() < 16 + 4.5 * math.sqrt(2 * 16)  # 3 * 9 cells, 11 constraints
    assert agree < 3000 / 504 + 4 * math.sqrt(3000 / 504)  # of 9 * 8 * 7 choices
    assert np.array_equal(grammar(8, 4, 3, 4, 5).rules[2], grammar(8, 4, 3, 4, 5).rules[2])
    assert not np.array_equal(grammar(8, 4, 3, 4, 5).rules[2], grammar(8, 4, 3, 4, 6).rules[2])


def test_derivations_follow_the_rules_uniformly():
    g, n = grammar(4, 3, 2, 5), 20000
    symbols = g.sample(n, seed=1)
    assert [s.shape for s in symbols] == [(n, 9), (n, 3), (n, 1)]
    for level in (1, 2):
        parents = symbols[level].reshape(-1)
        children = symbols[level - 1].reshape(len(parents), 3)
        is_rule = (g.rules[level - 1][parents] == children[:, None]).all(axis=2)  # (n nodes, m)
        assert (is_rule.sum(axis=1) == 1).all()
        expected = len(parents) / g.num_synonyms
        assert ((is_rule.sum(axis=0) - expected) ** 2 / expected).sum() < 4 + 4.5 * math.sqrt(8)
    expected = n / 4
    assert ((np.bincount(symbols[2][:, 0]) - expected) ** 2 / expected).sum() < 3 + 4.5 * math.sqrt(6)
    # Siblings choose their tuples independently of each other: 5 by 5 cells of number pairs.
    first, second = (
        np.argmax((g.rules[0][symbols[1][:, i]] == symbols[0][:, None, 3 * i : 3 * i + 3]).all(2), 1) for i in (0, 1)
    )
    pairs = np.bincount(5 * first + second, minlength=25)
    assert ((pairs - n / 25) ** 2 / (n / 25)).sum() < 24 + 4.5 * math.sqrt(48)


def test_a_derivation_depends_on_its_number_and_the_seed_alone():
    g = grammar(8, 4, 3, 8)
    every = g.sample(13, seed=3)
    for a, b in zip(every, g.sample(10, seed=3, start=3), strict=True):
        assert np.array_equal(a[3:], b)
    assert not np.array_equal(every[0], g.sample(13, seed=4)[0])
    assert len({row.tobytes() for row in g.sample(2000, seed=3)[0]}) == 2000
    classes = np.arange(13) % 8
    assert np.array_equal(g.sample(13, seed=3, classes=classes)[3][:, 0], classes)


def test_what_weights_were_trained_on_stays_what_it_is():
    """The demo's rules, patches and derivations, and the words that they are drawn from, by their digests."""
    assert random_words(7, 1, 2, 3).tolist() == random_words(7, 1, 0, 11)[8:].tolist()
    images = images_from_flags(GRAMMAR_FLAGS)
    parts = [*images.grammar.rules, images.palette.numpy(), images.grammar.sample(50, seed=1)[0]]
    assert [hashlib.sha256(part.tobytes()).hexdigest()[:8] for part in parts] == DEMO_DIGESTS


DEMO_DIGESTS = ["8433b578", "7bb81dd2", "1bfc76bc", "b163439c", "4f670fd5"]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"num_synonyms": 5}, "2 symbols have 2^2 = 4 tuples, too few for 5 each; expected at most 2"),
        ({"depth": 0}, "expected 1 or more"),
        ({"num_symbols": 4096, "branching": 4}, "expected at most"),
        ({"seed": -1}, "seed -1: expected a whole number from 0"),
    ],
)
def test_impossible_grammars_are_refused(numbers, words):
    with pytest.raises(UserError, match=words.replace("^", r"\^")):
        Grammar(**{"num_symbols": 2, "branching": 2, "depth": 2, "num_synonyms": 2, **numbers})


# Belief propagation against all derivations


@pytest.mark.parametrize("g", SMALL, ids=str)
def test_belief_propagation_is_enumeration(g):
    """With likelihoods that say nothing, something, nearly all, and far more than floating point can hold."""
    rng = np.random.default_rng(0)
    scales = np.array([0.0, 1e-9, 1.0, 3.0, 30.0, 1e3, 1e6]).repeat(5)
    log_psi = scales[:, None, None] * rng.normal(size=(len(scales), g.num_leaves, g.num_symbols))
    posterior = infer(g, torch.from_numpy(log_psi))
    log_evidence, _, marginals = enumerated(g, log_psi)
    np.testing.assert_allclose(posterior.log_evidence.numpy(), log_evidence, rtol=1e-14, atol=1e-10)
    found = posterior.marginals()
    assert [p.shape[1] for p in found] == [g.num_nodes(level) for level in range(g.depth + 1)]
    for level, (p, expected) in enumerate(zip(found, marginals, strict=True)):
        tolerance = np.where(scales < 1e6, 1e-10, 1e-7)[:, None, None]  # 1e6 has no more than 10 digits after the point
        assert (np.abs(p.numpy() - expected) < tolerance).all(), f"level {level}"
        torch.testing.assert_close(p.sum(dim=2), torch.ones_like(p[..., 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("abar", [0.0, 1e-12, 0.01, 0.3, 0.9, 1 - 1e-4])
def test_the_posterior_of_images_is_enumeration(abar):
    """From the pixels on, for images of the grammar and for others, at any noise."""
    images = TreeImages(grammar(4, 4, 2, 2, seed=1), patch_size=2)
    g = images.grammar
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:3] = math.sqrt(abar) * images.render(g.sample(3, seed=2)[0]) + math.sqrt(1 - abar) * x[:3]
    clean = images.render(all_derivations(g)[0]).double()  # (D, 3, 8, 8)
    squared = ((x[:, None] - math.sqrt(abar) * clean) ** 2).sum(dim=(2, 3, 4))  # (6, D)
    log_density = -squared / (2 * (1 - abar)) - 192 / 2 * math.log(2 * math.pi * (1 - abar))
    log_evidence = log_density.logsumexp(dim=1) - math.log(len(clean))
    posterior = image_posterior(images, x, abar)
    torch.testing.assert_close(posterior.log_evidence, log_evidence, rtol=1e-13, atol=1e-10)
    weights = log_density.softmax(dim=1)  # (6, D)
    mean = torch.einsum("bd,dchw->bchw", weights, clean)
    torch.testing.assert_close(posterior_mean(images, x, abar), mean, rtol=0, atol=1e-10)
    _, _, marginals = enumerated(g, log_likelihoods(images, x, abar).numpy())
    for p, expected in zip(posterior.marginals(), marginals, strict=True):
        np.testing.assert_allclose(p.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("g", [grammar(3, 2, 3, 2), grammar(2, 3, 2, 4), grammar(4, 4, 2, 2)], ids=str)
def test_posterior_samples_have_the_enumerated_frequencies(g):
    """A chi-square test over all derivations, as wholes."""
    rng, n = np.random.default_rng(1), 40000
    log_psi = 1.5 * rng.normal(size=(3, g.num_leaves, g.num_symbols))
    _, probabilities, _ = enumerated(g, log_psi)
    drawn = infer(g, torch.from_numpy(log_psi).repeat_interleave(n, dim=0)).sample(torch.Generator().manual_seed(2))
    whole = [np.concatenate(levels, axis=1) for levels in (all_derivations(g), drawn)]
    number = {row.tobytes(): i for i, row in enumerate(whole[0])}
    numbers = np.array([number[row.tobytes()] for row in whole[1]]).reshape(3, n)  # KeyError: not a derivation
    for p, found in zip(probabilities, numbers, strict=True):
        observed, expected = np.bincount(found, minlength=len(p)), n * p
        rare = expected < 10
        observed, expected = (np.append(a[~rare], a[rare].sum()) for a in (observed, expected))
        cells = expected > 0
        degrees = cells.sum() - 1
        statistic = ((observed - expected)[cells] ** 2 / expected[cells]).sum()
        assert statistic < degrees + 4.5 * math.sqrt(2 * degrees)


def test_one_generator_one_sample():
    posterior = infer(SMALL[1], torch.zeros(50, 8, 3, dtype=torch.float64))
    first, again, other = (posterior.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_noise_levels_out_of_range_are_refused():
    images = TreeImages(grammar(8, 4, 3, 4), patch_size=2)
    for abar in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"expected numbers in \[0, 1\)"):
            image_posterior(images, torch.zeros(1, 3, 16, 16), abar)
    with pytest.raises(UserError, match="8x8 patches of 2x2 pixels"):
        image_posterior(images, torch.zeros(1, 3, 32, 32), 0.5)


# The denoiser


def test_the_denoiser_is_the_score_of_the_mixture():
    """eps = -sqrt(1 - abar) grad log p(x), the gradient taken by differences, pixel by pixel."""
    images = TreeImages(grammar(3, 4, 2, 2, seed=4), patch_size=1)
    abar = create_gaussian_diffusion(steps=1000).alphas_cumprod
    clean = images.render(all_derivations(images.grammar)[0]).double().flatten(1)  # (D, 48)

    def log_density(x, a):  # (n, 48) -> (n,)
        return (-torch.cdist(x, math.sqrt(a) * clean).square() / (2 * (1 - a))).logsumexp(dim=1)

    t = torch.tensor([100, 300, 500, 999])
    x = torch.randn(4, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x = torch.from_numpy(abar[t] ** 0.5)[:, None] * clean[:4] + torch.from_numpy((1 - abar[t]) ** 0.5)[:, None] * x
    eps = ExactDenoiser(images, abar)(x.view(4, 3, 4, 4), t, y=None)
    h = 1e-4 * torch.eye(48, dtype=torch.float64)
    for row, step, found in zip(x, t.tolist(), eps.flatten(1), strict=True):
        slope = (log_density(row + h, abar[step]) - log_density(row - h, abar[step])) / 2e-4
        torch.testing.assert_close(found, -math.sqrt(1 - abar[step]) * slope, rtol=0, atol=1e-6)
    single = ExactDenoiser(images, abar)(x.view(4, 3, 4, 4).float(), t)
    assert single.dtype == torch.float32 and (single - eps).abs().max() < 1e-4


# Images


def test_children_are_quadrants():
    """At every level: top left, top right, bottom left, bottom right."""
    images = TreeImages(grammar(64, 4, 3, 1), patch_size=2)
    picture = images.render(np.arange(64)[None])  # every leaf another symbol
    by_row = images.palette.view(64, 3, 2, 2)
    for leaf in range(64):
        top, left = 0, 0
        for quadrant, side in zip((leaf // 16, leaf // 4 % 4, leaf % 4), (8, 4, 2), strict=True):
            top, left = top + side * (quadrant // 2), left + side * (quadrant % 2)
        assert torch.equal(picture[0, :, top : top + 2, left : left + 2], by_row[leaf])


@pytest.mark.parametrize("p", [1, 2, 4, 5])
def test_patches_are_distinct_and_random(p):
    images = TreeImages(grammar(8, 4, 2, 8, seed=1), p)
    assert images.palette.shape == (8, 3 * p**2) and images.image_size == 4 * p
    assert set(images.palette.unique().tolist()) == {-1.0, 1.0}
    assert len(images.palette.unique(dim=0)) == 8
    many = torch.stack([TreeImages(grammar(8, 4, 1, 1, seed), p).palette for seed in range(300)])
    assert many.mean(dim=(0, 1)).abs().max() < 4.5 / math.sqrt(2400)
    images.patches(images.render(images.grammar.sample(3, 0)[0]))


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_images_are_read_from_files(p, kind, tmp_path):
    """Written and read as the main script does it; PNG to the bit, JPEG to the symbol."""
    images = TreeImages(grammar(8, 4, 3, 8), p)
    symbols = images.grammar.sample(16, seed=1)
    pictures = images.render(symbols[0])
    back = []
    for i, pixels in enumerate(to_pixels(pictures)):
        path = tmp_path / f"{i}.{kind}"
        path.write_bytes(encode(pixels, kind, 95))
        back.append(read_image(str(path), images.image_size))
    read = from_pixels(np.stack(back))
    if kind == "png":
        assert torch.equal(read, pictures)
    for found, true in zip(read_symbols(images, read), symbols, strict=True):
        assert np.array_equal(found, true)
    assert np.array_equal(images.read_leaves(read), symbols[0])


def test_images_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="4 quadrants: found a grammar of branching 2"):
        TreeImages(SMALL[0], 2)
    with pytest.raises(UserError, match="8 patches of 1x1 pixels, too few for 9 symbols"):
        TreeImages(grammar(9, 4, 2, 2), 1)
    with pytest.raises(UserError, match="patches of 0 pixels"):
        TreeImages(grammar(8, 4, 2, 2), 0)


def test_what_is_not_of_the_grammar_is_read_all_the_same():
    """With one wrong patch it is no image of the grammar. Its class can still be seen, and its leaves as they are."""
    images = TreeImages(grammar(8, 4, 3, 4, seed=2), patch_size=2)
    g = images.grammar
    symbols = [torch.from_numpy(s) for s in g.sample(64, seed=2)]
    wrong = symbols[0].clone()
    wrong[torch.arange(64), torch.arange(64)] = (wrong[torch.arange(64), torch.arange(64)] + 1) % g.num_symbols
    possible = {tuple(t) for t in g.rules[0].reshape(-1, 4).tolist()}
    changed = torch.arange(64) // 4
    tuples = wrong.view(64, 16, 4)[torch.arange(64), changed].tolist()
    assert sum(tuple(t) not in possible for t in tuples) > 40
    found = read_symbols(images, images.render(wrong))
    assert torch.equal(found[0], wrong)
    assert torch.equal(found[3], symbols[3])
    others = torch.ones(64, 16, dtype=torch.bool)
    others[torch.arange(64), changed] = False
    assert torch.equal(found[1][others], symbols[1][others])


# The diffusion loop against the posterior

ABAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))  # the linear schedule of 1000 steps
SPACED = [round(i * 999 / 249) for i in range(250)]  # 250 of them
COSINE = create_gaussian_diffusion(steps=1000, noise_schedule="cosine").alphas_cumprod
IMAGES = TreeImages(grammar(8, 4, 3, 4, seed=2), patch_size=2)  # steep where it loses the class, k = 125


class Told:
    """The exact denoiser, given the timestep `shift` places later in the list of kept timesteps."""

    def __init__(self, shift, abar=ABAR):
        self.exact, self.shift = ExactDenoiser(IMAGES, abar, torch.float32), shift

    def __call__(self, x, t):
        return self.exact(x, torch.full_like(t, SPACED[SPACED.index(int(t[0])) + self.shift]))


def deviations(k, num_images, model=None, start_shift=0, loop_shift=0, diffusion=None):
    """How far the loop is from the exact answers at the same noise, in standard errors of the difference.

    What is compared is the fraction of symbols retained, level by level, leaves first, and the overlap of sample and
    noised image, x_k . x_0, which tells how much of the noise is taken for the image.

    Returns two arrays (L + 2,): the difference to exact samples of the posterior, which given x_k are independent of
    the loop's; and that to the mean under the posterior, without error of its own.
    """
    diffusion = diffusion or spaced()
    classes = np.arange(num_images) % 8
    true = [torch.from_numpy(s) for s in IMAGES.grammar.sample(num_images, seed=3, classes=classes)]
    x_start = IMAGES.render(true[0])
    generator = torch.Generator().manual_seed(k)
    noise = torch.randn(x_start.shape, generator=generator)

    abar = ABAR[SPACED[k - 1]]
    x_k = math.sqrt(abar) * x_start + math.sqrt(1 - abar) * noise  # by the definition, not by the library
    posterior = image_posterior(IMAGES, x_k, abar)

    def measured(symbols, picture):
        retained = [(found == s).double().mean(dim=1) for found, s in zip(symbols, true, strict=True)]
        return torch.stack([*retained, (x_k * picture).mean(dim=(1, 2, 3)).double()])  # (L + 2, n)

    drawn = posterior.sample(generator)
    exact = measured(drawn, IMAGES.render(drawn[0]))
    retained = [p.gather(2, s[..., None]).mean(dim=(1, 2)) for p, s in zip(posterior.marginals(), true, strict=True)]
    mean = torch.stack([*retained, (x_k * posterior_mean(IMAGES, x_k, abar)).mean(dim=(1, 2, 3))])

    start = noised_image(diffusion, x_start, k + start_shift, noise)
    model = model or Told(0)
    sample = diffusion.p_sample_loop_forw_back(model, start.shape, k + loop_shift, noise=start, generator=generator)
    of_loop = measured(read_symbols(IMAGES, sample), sample)
    differences = torch.stack([of_loop - exact, of_loop - mean])  # (2, L + 2, n)
    return (differences.mean(dim=2) / differences.std(dim=2) * num_images**0.5).nan_to_num(0).numpy()


def spaced(noise_schedule="linear"):
    return create_gaussian_diffusion(
        steps=1000, timestep_respacing="250", sigma_small=True, noise_schedule=noise_schedule
    )


@pytest.mark.parametrize("k", [75, 100, 112, 125, 150])
def test_the_loop_samples_the_posterior(k):
    """Within three standard errors in the class and in the symbols of every level.

    With many more images than the 400 one sees that 250 steps are not infinitely many: near k = 100 the loop retains
    0.004 more of the leaves than the posterior does.
    """
    z, _ = deviations(k, num_images=400)
    assert (np.abs(z[:-1]) < 3).all(), z


MISTAKES = {  # where they are made, on how many images, and what they are
    "told the next time": (75, 100, {"model": Told(1)}),
    "one step too noisy": (125, 1500, {"start_shift": 1}),
    "one step too clean": (125, 700, {"start_shift": -1}),
    "one step less": (125, 1500, {"loop_shift": -1}),
    "told another schedule": (125, 100, {"model": Told(0, COSINE)}),
    "another schedule": (125, 100, {"diffusion": spaced("cosine")}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_seen(mistake):
    """Of a single step, or of the schedule, the model's or the loop's."""
    k, num_images, change = MISTAKES[mistake]
    _, z = deviations(k, num_images, **change)
    assert np.abs(z).max() > 4, z
