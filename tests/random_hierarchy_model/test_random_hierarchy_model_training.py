"""Training on images of a grammar: the stream of images, the exact target, and the script as people run it."""

from guided_diffusion import dist_util, logger
from guided_diffusion.classifier.networks import open_classifier
from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import to_pixels
from guided_diffusion.runs.pipeline import encode
from guided_diffusion.script_util import create_gaussian_diffusion, model_and_diffusion_defaults, model_from_flags
from guided_diffusion.system.files import write_whole
from random_hierarchy_model import ExactDenoiser, Grammar, TreeImages
from random_hierarchy_model import training as training_module
from random_hierarchy_model.belief_propagation import read_posterior
from random_hierarchy_model.classifier import enlarge, small_convnext
from random_hierarchy_model.classifier_training import ReadingLoop
from random_hierarchy_model.demo import CLASSIFIER, GRAMMAR_FLAGS, MODEL_FLAGS
from random_hierarchy_model.denoiser import posterior_mean
from random_hierarchy_model.training import ExactTargetLoop, ImageStream, images_from_flags

import pytest
import torch
from conftest import as_flags, load_script
from torch import nn

IMAGES = TreeImages(Grammar(8, 4, 2, 4, seed=1), patch_size=2)  # 8x8 pixels
SMALL = {
    **{"num_symbols": 8, "num_synonyms": 4, "depth": 2, "patch_size": 2, "grammar_seed": 1},
    **{"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1", "attention_resolutions": ""},
    **{"diffusion_steps": 100, "num_threads": 1, "batch_size": 4, "ema_rate": "0.9", "log_interval": 2},
    **{"lr_anneal_steps": 6, "sample_grid": 0},
}


@pytest.fixture(autouse=True)
def _tidy(monkeypatch):
    """Scripts run in the tests' own process, which stays what it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(dist_util, "setup_dist", lambda _: None)
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    yield
    torch.set_num_threads(threads)
    logger.reset()


# The stream of images


def test_the_stream_is_a_function_of_seed_and_position():
    stream = ImageStream(IMAGES, 4, seed=3)
    batches = [next(stream) for _ in range(3)]
    assert stream.position == 12 and all(extra == {} for _, extra in batches)
    images = torch.cat([batch for batch, _ in batches])
    assert images.shape == (12, 3, 8, 8) and images.dtype == torch.float32
    assert torch.equal(images, IMAGES.render(IMAGES.grammar.sample(12, 3)[0]))
    assert len(images.unique(dim=0)) == 12
    stream.seek(4)
    assert torch.equal(next(stream)[0], batches[1][0]) and stream.position == 8
    assert not torch.equal(next(ImageStream(IMAGES, 4, seed=4))[0], batches[0][0])
    others = {
        ImageStream(images, 4, seed).digest for images in (IMAGES, TreeImages(IMAGES.grammar, 1)) for seed in (3, 4)
    }
    assert len(others) == 4


def test_processes_share_the_stream_out(monkeypatch):
    """Two processes with half of the batch each see what one sees with all of it."""
    whole = ImageStream(IMAGES, 8, seed=3)
    expected = torch.stack([next(whole)[0] for _ in range(3)])  # (3, 8, ...)
    monkeypatch.setattr(training_module, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(training_module, "get_rank", lambda rank=rank: rank)
        half = ImageStream(IMAGES, 4, seed=3)
        assert torch.equal(torch.stack([next(half)[0] for _ in range(3)]), expected[:, 4 * rank : 4 * rank + 4])
        assert half.position == whole.position


# The loss


class Wrong(nn.Module):
    """A model that is not right: a convolution of x_t."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


def a_loop(tmp_path, diffusion, model=None):
    return ExactTargetLoop(
        **{"images": IMAGES, "model": model or Wrong(), "diffusion": diffusion, "data": ImageStream(IMAGES, 4, 0)},
        **{"batch_size": 4, "microbatch": -1, "lr": 1e-3, "ema_rate": "", "log_interval": 1, "save_interval": 1},
        output=str(tmp_path),
    )


@pytest.mark.parametrize("predict_xstart", [True, False])
def test_the_exact_target_takes_away_a_constant(predict_xstart, tmp_path):
    """At every time the usual loss is on average the loss here, plus what the best model's usual loss is."""
    diffusion = create_gaussian_diffusion(steps=1000, predict_xstart=predict_xstart)
    loop = a_loop(tmp_path, diffusion)
    exact = ExactDenoiser(IMAGES, diffusion.alphas_cumprod)

    def best(x, t):
        return posterior_mean(IMAGES, x, exact.alphas_cumprod[t]).float() if predict_xstart else exact(x, t)

    n = 4000
    x = IMAGES.render(IMAGES.grammar.sample(n, 5)[0])
    generator = torch.Generator().manual_seed(6)
    for step in (50, 300, 450, 800):
        t, noise = torch.full((n,), step), torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            here = loop.compute_losses(x, t, noise, {})["loss"]
            usual, least = (diffusion.training_losses(model, x, t, noise=noise)["mse"] for model in (loop.model, best))
        difference = (usual - least - here).double()
        assert abs(difference.mean()) < 4 * difference.std() / n**0.5 + 1e-6, step
        loop.ddp_model = best
        assert loop.compute_losses(x, t, noise, {})["loss"].max() < 1e-8
        loop.ddp_model = loop.model


class WithVariance(Wrong):
    """Also predicts a variance."""

    def forward(self, x, t):
        return torch.cat([self.conv(x), self.conv(-x)], dim=1)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_learned_variance_has_the_usual_loss(rescale, tmp_path):
    options = {"timestep_respacing": "100", "predict_xstart": True}
    learned = create_gaussian_diffusion(learn_sigma=True, rescale_learned_sigmas=rescale, **options)
    loop = a_loop(tmp_path, learned, WithVariance())
    x, t = IMAGES.render(IMAGES.grammar.sample(8, 5)[0]), torch.arange(0, 80, 10)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    here = loop.compute_losses(x, t, noise, {})
    usual = learned.training_losses(loop.model, x, t, noise=noise)
    assert torch.equal(here["vb"], usual["vb"])
    fixed = a_loop(tmp_path, create_gaussian_diffusion(**options), Wrong()).compute_losses(x, t, noise, {})
    assert torch.equal(here["mse"], fixed["loss"])
    assert torch.allclose(here["loss"], here["mse"] + here["vb"], rtol=1e-4)


def test_what_has_no_exact_target_is_refused(tmp_path):
    with pytest.raises(UserError, match="--use_kl True"):
        a_loop(tmp_path, create_gaussian_diffusion(steps=1000, use_kl=True))


# The classifier's training


def a_reading_loop(tmp_path, images, model=None):
    return ReadingLoop(
        **{"images": images, "model": model or small_convnext()[0], "data": ImageStream(images, 256, 0)},
        **{"diffusion": create_gaussian_diffusion(), "batch_size": 256, "microbatch": -1, "lr": 1e-3, "ema_rate": ""},
        **{"log_interval": 1, "save_interval": 1, "output": str(tmp_path)},
    )


def test_a_part_of_the_leaves_is_replaced(tmp_path):
    images = images_from_flags(GRAMMAR_FLAGS)
    loop = a_reading_loop(tmp_path, images)
    leaves = torch.from_numpy(images.grammar.sample(256, 1)[0])
    x, v = images.render(leaves), images.grammar.num_symbols
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    wrong = torch.linspace(0, 0.5, 256)
    replaced = images.read_leaves(loop.replace_leaves(x, wrong, noise))
    assert torch.equal(replaced[0], leaves[0])
    changed, other = (replaced != leaves).double().mean(dim=1), 1 - 1 / v  # 1 in v is replaced by itself
    num_leaves = images.grammar.num_leaves
    assert ((changed - wrong * other).abs() < 5 * (0.25 / num_leaves) ** 0.5).all()
    assert changed.mean() == pytest.approx(0.25 * other, abs=0.01)
    counts = replaced[replaced != leaves].bincount(minlength=v)
    assert (counts > 0.8 * counts.sum() / v).all()


def test_the_classifier_s_target_is_exact_inference(tmp_path):
    """Images of the grammar have one class; the loss is 0 for a network that says what inference says."""
    images = images_from_flags(GRAMMAR_FLAGS)
    symbols = images.grammar.sample(256, 1)
    x = images.render(symbols[0])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    root = read_posterior(images, x).root
    assert (root.argmax(dim=1).numpy() == symbols[-1][:, 0]).all() and root.max(dim=1).values.min() > 0.999

    factor = enlarge(x).shape[-1] // images.image_size

    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, enlarged):
            x = enlarged[..., ::factor, ::factor]
            return read_posterior(images, x).root.log().clamp(min=-1e4) + self.unused

    t = torch.arange(256) * 3
    terms = a_reading_loop(tmp_path, images, Exact()).compute_losses(x, t, noise, {})
    assert terms["loss"].abs().max() < 1e-5 and terms["agrees"].min() == 1
    other = a_reading_loop(tmp_path, images).compute_losses(x, t, noise, {})
    assert other["loss"].mean() > 1


def test_the_classifier_s_training_goes_on(tmp_path):
    main = load_script("scripts/demo_classifier_train.py").main
    flags = {"batch_size": 4, "num_threads": 1, "lr_anneal_steps": 4, "log_interval": 2, "save_interval": 2}
    for folder, stops in (("whole", [4]), ("parts", [2, 4])):
        for iterations in stops:
            assert main(as_flags({**flags, "iterations": iterations, "output": tmp_path / folder})) == 0
    whole, parts = (
        torch.load(tmp_path / kind / "ema_0.999_000004.pt", weights_only=True) for kind in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    images = images_from_flags(GRAMMAR_FLAGS)
    own = open_classifier(CLASSIFIER, str(tmp_path / "whole/ema_0.999_000004.pt"), image_size=images.image_size)
    assert own.num_classes == images.grammar.num_symbols and [layer.name for layer in own.layers][-1] == "classifier"


# The script


def train(output, **changes):
    main = load_script("scripts/demo_unet_train.py").main
    return main(as_flags({**SMALL, "output": output, **changes}))


def test_a_run_goes_on_where_it_was(tmp_path):
    """Ended after three steps and started again, it makes the same bytes; the log has every line once."""
    assert train(tmp_path / "whole", save_interval=6) == 0
    assert train(tmp_path / "parts", save_interval=6, iterations=3) == 0
    assert train(tmp_path / "parts", save_interval=6) == 0
    for name in ("model000006.pt", "ema_0.9_000006.pt"):
        whole, parts = (torch.load(tmp_path / kind / name, weights_only=True) for kind in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    lines = [(tmp_path / kind / "progress.csv").read_text() for kind in ("whole", "parts")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 4
    with pytest.raises(UserError, match="--grammar_seed"):
        train(tmp_path / "whole", grammar_seed=2)
    with pytest.raises(UserError, match="--seed"):
        train(tmp_path / "whole", seed=2)


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="--image_size 16: --depth 2 and --patch_size 2 make images of 8"):
        train(tmp_path, image_size=16)
    with pytest.raises(UserError, match="too few for 1000 each"):
        train(tmp_path, num_synonyms=1000)
    with pytest.raises(
        UserError, match=r"^--class_cond True: the images are generated without labels, expected False$"
    ):
        train(tmp_path / "none", class_cond=True)
    assert not list(tmp_path.glob("*.pt")) and not (tmp_path / "none").exists()


def test_the_main_script_takes_the_weights(tmp_path):
    """And images of the grammar, written as files."""
    assert train(tmp_path / "run", predict_xstart=True) == 0
    for i, pixels in enumerate(to_pixels(IMAGES.render(IMAGES.grammar.sample(4, 1)[0]))):
        write_whole(f"{tmp_path}/images/{i}.png", encode(pixels, "png", 0))
    names = ("image_size", "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "diffusion_steps")
    flags = {name: SMALL[name] for name in names} | {"predict_xstart": True, "step_reverse": 3, "num_threads": 1}
    flags |= {"timestep_respacing": 10, "model_path": tmp_path / "run" / "ema_0.9_000006.pt"}
    main = load_script("forward_backward_dataset_sample.py").main
    assert main(as_flags({**flags, "data_dir": tmp_path / "images", "output": tmp_path / "samples"})) == 0
    assert len(list((tmp_path / "samples" / "t_3_10_images").iterdir())) == 4


def test_the_demo_s_network_is_small():
    """So that, as float16, it can live in the repository."""
    model = model_from_flags({**model_and_diffusion_defaults(), **MODEL_FLAGS})
    assert sum(parameter.numel() for parameter in model.parameters()) * 2 < 10e6
