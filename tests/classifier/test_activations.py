"""Moments and similarities of activations, against computations that keep everything, in NumPy's float64."""

from contextlib import ExitStack

from guided_diffusion import logger
from guided_diffusion.classifier.activations import (
    ActivationMoments,
    Moments,
    Normalization,
    Similarities,
    load_normalization,
)
from guided_diffusion.classifier.networks import open_classifier
from guided_diffusion.errors import ResultError, UserError

import numpy as np
import pytest
import torch
from torch import nn

# Moments


def moments_of(batches):
    moments = Moments()
    for batch in batches:
        moments.update(batch)
    return moments


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("size", [1, 7, 32, 1000])
def test_moments_do_not_depend_on_how_the_stream_is_cut(offset, size):
    rng = np.random.default_rng(0)
    x = offset + rng.standard_normal((1000, 5)) * [1, 0.1, 10, 3, 0]
    batches = torch.from_numpy(x).split(size)
    half = len(batches) // 2
    merged, other = Moments(), moments_of(batches[:half])
    merged.merge(Moments())  # of a process without images
    merged.merge(moments_of(batches[half:]))
    merged.merge(Moments.from_state(other.state()))
    merged.merge(Moments())
    for moments in (moments_of(batches), merged, Moments.from_state(merged.state())):
        assert moments.count == 1000
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-13, atol=1e-14)
        # np.var is exact to rounding of x itself: 1e6 * 2e-16 beside a deviation of 0.1 at the least.
        np.testing.assert_allclose(moments.variance, x.var(0), rtol=1e-10, atol=1e-18)
        np.testing.assert_allclose(moments.second_moment, (x**2).mean(0), rtol=1e-12, atol=1e-14)


def test_no_cancellation_in_float32_streams_with_a_large_mean():
    x = 1e6 + torch.randn(20000, 2, generator=torch.Generator().manual_seed(0))
    expected = x.numpy().astype(np.float64)
    moments = moments_of(x.split(7))
    np.testing.assert_allclose(moments.variance, expected.var(0), rtol=1e-10)
    np.testing.assert_allclose(moments.variance, 1, rtol=0.05)


# Against everything kept


def kept_activations(classifier, x):
    """Layer -> all its activations, float64 of shape (images, positions, channels)."""
    kept = {}
    for layer in classifier.layers:

        def keep(_module, _args, output, layer=layer):
            output = output.movedim(layer.channel_axis, -1)
            kept[layer.name] = output.reshape(len(output), -1, output.shape[-1]).double().numpy()

        classifier.model.get_submodule(layer.name).register_forward_hook(keep)
    with torch.inference_mode():
        classifier.model(x)
    for layer in classifier.layers:
        classifier.model.get_submodule(layer.name)._forward_hooks.clear()
    return kept


def images(number, size, seed=0):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pairs(starts, times, size):
    """Starting images, and what more and more noise makes of them, in the order that `Similarities` takes."""
    x = images(starts, size)
    return torch.cat([x, *(x + 0.3 * 4**t * images(starts, size, 1 + t) for t in range(times))])


def directly(kept, layers, statistics, kind, times):
    """cosine, L2 and L2_normalized, each (times, B, layers), by their definitions."""
    results = []
    for layer in layers:
        a = kept[layer.name]
        if kind != "none":
            axes = None if layer.is_logits else (0, 1)
            mean, variance, second = (
                m(statistics[layer.name], axes) for m in (np.mean, np.var, lambda v, axis: np.mean(v**2, axis))
            )
            scale = np.sqrt(variance if kind == "std" else second)
            a = (a - mean) / np.where(scale == 0, 1, scale)
        a = a.reshape(1 + times, -1, a[0].size)
        a, b = a[0], a[1:]
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        distance = np.linalg.norm(a - b, axis=-1)
        results.append([(a * b).sum(-1) / norms, distance, distance / np.sqrt(norms)])
    return np.moveaxis(np.array(results), 0, -1)


def write_statistics(path, classifier, batches, **changes):
    with torch.inference_mode(), ActivationMoments(classifier) as watch:
        for batch in batches:
            classifier.model(batch)
    arrays = {
        f"{moment}/{name}": values
        for name, moments in watch.moments.items()
        for moment, values in moments.as_arrays().items()
    }
    np.savez(path, **{**arrays, **changes})
    return arrays


def check_against_everything_kept(classifier, tmp_path, size, number, kinds=("std", "rms", "none")):
    batches = images(number, size, 9).split(7)
    arrays = write_statistics(tmp_path / "s.npz", classifier, batches)
    kept_batches = [kept_activations(classifier, batch) for batch in batches]  # networks round otherwise in others
    statistics = {name: np.concatenate([kept[name] for kept in kept_batches]) for name in kept_batches[0]}
    for layer in classifier.layers:
        values = statistics[layer.name].reshape(-1, 1 if layer.is_logits else layer.channels)
        assert arrays[f"count/{layer.name}"] == len(values)
        scale = values.std(0).max()
        np.testing.assert_allclose(arrays[f"mean/{layer.name}"], values.mean(0), rtol=1e-6, atol=1e-6 * scale)
        np.testing.assert_allclose(arrays[f"variance/{layer.name}"], values.var(0), rtol=1e-6, atol=1e-12 * scale**2)
        np.testing.assert_allclose(arrays[f"second_moment/{layer.name}"], (values**2).mean(0), rtol=1e-6)
    times, x = 3, pairs(4, 3, size)
    kept = kept_activations(classifier, x)
    with torch.inference_mode(), ExitStack() as stack:
        watches = {}
        for kind in kinds:
            normalization = load_normalization(str(tmp_path / "s.npz"), classifier, kind)
            watches[kind] = stack.enter_context(Similarities(classifier, normalization, times))
        output = classifier.model(x)
    for kind, watch in watches.items():
        expected = directly(kept, classifier.layers, statistics, kind, times)
        assert watch.latest().cosine.shape == (times, 4, len(classifier.layers))
        assert watch.latest().cosine.dtype == np.float64
        np.testing.assert_allclose(watch.latest().cosine, expected[0], atol=1e-5)
        np.testing.assert_allclose(watch.latest().L2, expected[1], rtol=1e-5)
        np.testing.assert_allclose(watch.latest().L2_normalized, expected[2], rtol=1e-5)
        assert np.ptp(expected[0]) > 0.02  # there is something to compare
        np.testing.assert_array_equal(watch.latest().logits, output.reshape(1 + times, 4, -1))


@pytest.mark.parametrize(
    ("name", "size"), [("convnext_tiny", 64), ("swin_v2_t", 64), ("resnet18", 64), ("vit_b_32", 224)]
)
def test_statistics_and_similarities(name, size, tmp_path):
    classifier = open_classifier(name, "untrained")
    if name == "vit_b_32":  # whose last layer begins with zeros: logits that are 0 have no similarity
        classifier.model.heads.head.reset_parameters()
    check_against_everything_kept(classifier, tmp_path, size, 9)


def test_statistics_and_similarities_of_convnext_base(tmp_path):
    check_against_everything_kept(open_classifier("convnext_base", "untrained"), tmp_path, 64, 24, ["std"])


# The axis of the channels


def with_known_means(name, layer):
    """A classifier whose layer has channel means -1, 0, 1, ... with no variance: weights 0, and these as bias."""
    classifier = open_classifier(name, "untrained", [layer])
    module = classifier.model.get_submodule(layer)
    last = [inner for inner in module.modules() if getattr(inner, "bias", None) is not None][-1]
    last.weight.zero_()
    last.bias.copy_(torch.arange(len(last.bias)) - 1.0)
    return classifier


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("convnext_tiny", "features.0"),
        ("convnext_tiny", "features.2"),
        ("regnet_y_400mf", "stem"),
        ("swin_v2_t", "features.0"),
        ("swin_v2_t", "features.2"),
        ("vit_b_32", "conv_proj"),
        ("vit_b_32", "encoder.ln"),
    ],
)
def test_channels_have_the_means_that_they_were_given(name, layer):
    classifier = with_known_means(name, layer)
    with torch.inference_mode(), ActivationMoments(classifier) as watch:
        classifier.model(images(2, 224 if "vit" in name else 64))
    expected = np.arange(classifier.layers[0].channels) - 1.0
    if name == "regnet_y_400mf":
        expected = expected.clip(0)  # its stem ends with a rectifier
    np.testing.assert_allclose(watch.moments[layer].mean, expected, atol=1e-12)
    np.testing.assert_allclose(watch.moments[layer].variance, 0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "layer", "last"),
    [
        ("convnext_tiny", "features.3.1", "block.5"),
        ("swin_t", "features.3.1", "mlp.3"),
        ("swin_v2_t", "features.3.1", "norm2"),
        ("vit_b_32", "encoder.layers.encoder_layer_3", "mlp.3"),
        ("resnet18", "layer2.1", "bn2"),
    ],
)
def test_a_shift_of_a_block_s_channels_shifts_their_means(name, layer, last):
    """The bias of what comes last in a block's residual branch is added to its output, channel by channel."""
    x = images(2, 224 if "vit" in name else 64)
    classifier = open_classifier(name, "untrained", [layer])
    block, found = classifier.model.get_submodule(layer), []
    bias, scale = block.get_submodule(last).bias, getattr(block, "layer_scale", torch.ones(1)).flatten()
    if name == "resnet18":
        bias.add_(1000)  # beyond the reach of the rectifier that ends the block
    shift = torch.arange(len(bias)) - 100.0
    for added in (0, shift / scale):
        bias.add_(added)
        with torch.inference_mode(), ActivationMoments(classifier) as watch:
            classifier.model(x)
        found.append(watch.moments[layer].mean)
    np.testing.assert_allclose(found[1] - found[0], shift, atol=1e-3)


def test_logits_have_one_mean_over_images_and_classes():
    classifier = open_classifier("resnet18", "untrained", ["fc"])
    with torch.inference_mode(), ActivationMoments(classifier) as watch:
        logits = torch.cat([classifier.model(x) for x in images(5, 64).split(2)]).double()
    moments = watch.moments["fc"]
    assert moments.count == 5000 and moments.mean.shape == (1,)
    np.testing.assert_allclose(
        [*moments.mean, *moments.variance], [logits.mean(), logits.var(correction=0)], rtol=1e-10
    )


# What is out of the ordinary


def small(**weights):
    """ResNet-18, its stem and its logits alone."""
    return open_classifier("resnet18", "untrained", ["conv1", "fc"])


def test_dead_channels_are_divided_by_1_and_counted(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logger, "warn", warnings.append)
    classifier = open_classifier("convnext_tiny", "untrained", ["features.0.0", "features.1.0"])
    conv = classifier.model.get_submodule("features.0.0")
    conv.weight[:2] = 0
    conv.bias[:2] = torch.tensor([0.0, 1234.567])
    arrays = write_statistics(tmp_path / "s.npz", classifier, images(8, 64, 9).split(3))
    std = load_normalization(str(tmp_path / "s.npz"), classifier, "std")
    assert list(std.scale["features.0.0"][:2]) == [1, 1] and (std.scale["features.0.0"] < 1.5).all()
    assert len(warnings) == 1 and "2 channels are constant" in warnings[0] and str(tmp_path / "s.npz") in warnings[0]
    rms = load_normalization(str(tmp_path / "s.npz"), classifier, "rms")
    np.testing.assert_allclose(rms.scale["features.0.0"][:2], [1, 1234.567], rtol=1e-6)
    np.testing.assert_array_equal(rms.mean["features.0.0"], arrays["mean/features.0.0"])
    with torch.inference_mode(), Similarities(classifier, std, 1) as watch:
        classifier.model(pairs(2, 1, 64))
    assert np.isfinite(watch.latest().cosine).all()


class Echo(nn.Module):
    """A network that puts its input out, and then the means of its channels as logits."""

    def __init__(self):
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x):
        return self.same(x).mean((2, 3))


def echo(mean, scale):
    """A classifier that watches its own input, and its normalization."""
    from guided_diffusion.classifier.layers import WatchedLayer
    from guided_diffusion.classifier.networks import Classifier

    layers = (WatchedLayer("same", 1, False, 3),)
    given = {"mean": {"same": np.full(3, mean)}, "scale": {"same": np.full(3, scale)}}
    return Classifier("echo", Echo(), layers, None, 3, ""), Normalization(**given)


def test_a_mean_that_is_large_beside_the_scale_is_subtracted_exactly():
    x = 100 + 1e-3 * images(4, 16)
    mean = 100.0000123456789
    with torch.inference_mode(), Similarities(*echo(mean, 1e-3), 1) as watch:
        watch.classifier.model(x)
    a, b = ((x.double().numpy() - mean) / 1e-3).reshape(2, 2, -1)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(watch.latest().cosine[0, :, 0], (a * b).sum(-1) / norms, atol=1e-6)
    np.testing.assert_allclose(watch.latest().L2[0, :, 0], np.linalg.norm(a - b, axis=-1), rtol=1e-6)


def test_equal_images_similar_ones_and_nothing():
    start = images(3, 16)
    start[2] = 0
    similar = start + 1e-4 * images(3, 16, 1)
    classifier, normalization = echo(0.0, 1.0)
    with torch.inference_mode(), Similarities(classifier, normalization, 2) as watch:
        classifier.model(torch.cat([start, start, similar]))
        np.testing.assert_allclose(watch.latest().cosine[0, :2, 0], 1, atol=1e-12)
        assert (watch.latest().L2[0] == 0).all() and (watch.latest().L2_normalized[0, :2] == 0).all()
        distance = np.linalg.norm((similar.double() - start.double()).reshape(3, -1), axis=-1)
        np.testing.assert_allclose(watch.latest().L2[1, :, 0], distance, rtol=1e-6)
        assert np.isnan(watch.latest().cosine[:, 2]).all() and np.isnan(watch.latest().L2_normalized[:, 2]).all()
        classifier.model(torch.cat([start[:1]] * 3))  # a last batch with fewer
    assert watch.latest().cosine.shape == (2, 1, 1) and watch.latest().logits.shape == (3, 1, 3)
    assert not classifier.model.same._forward_hooks and not classifier.model._forward_hooks


def test_rows_that_only_keep_a_place_may_be_undefined():
    """They change nothing for the images, and NaN in an image is still an error."""
    x = pairs(3, 2, 16)
    classifier, normalization = echo(0.0, 1.0)
    with torch.inference_mode(), Similarities(classifier, normalization, 2) as watch:
        classifier.model(x)
        expected = watch.latest()
        x[[1, 5]] = torch.tensor([np.nan, np.inf])[:, None, None, None]  # a start, and a sample of the third
        classifier.model(x)
    images = np.ones(9, bool)
    images[[1, 5]] = False
    found = watch.latest(images)
    fine = np.array([[True, False, False], [True, False, True]])
    for values, others in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(values[fine], others[fine])
    for rows in (np.arange(9) != 1, np.arange(9) != 5, None):
        with pytest.raises(ResultError, match="the classifier gave NaN or infinity"):
            watch.latest(rows)


def test_in_half_precision_the_measuring_is_not():
    classifier = open_classifier("convnext_tiny", "untrained", ["features.0", "features.1.0", "classifier"])
    x = pairs(3, 2, 64)
    kept = {}
    watch, moments = Similarities(classifier, Normalization(), 2), ActivationMoments(classifier)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), watch, moments:
        module = classifier.model.get_submodule("classifier")
        hook = module.register_forward_hook(lambda _m, _a, output: kept.update(logits=output))
        classifier.model(x)
        hook.remove()
    logits = kept["logits"]
    assert logits.dtype == torch.bfloat16 and watch.latest().logits.dtype == np.float32
    a, b = logits.double().reshape(3, 3, -1)[:1], logits.double().reshape(3, 3, -1)[1:]
    np.testing.assert_allclose(watch.latest().cosine[..., -1], torch.cosine_similarity(a, b, dim=-1), atol=1e-6)
    np.testing.assert_allclose(moments.moments["classifier"].variance, logits.double().var(correction=0), rtol=1e-10)


def test_statistics_that_do_not_fit(tmp_path):
    classifier = small()
    path = tmp_path / "s.npz"
    arrays = write_statistics(path, classifier, [images(2, 64)])

    def refused(message, kind="std", **options):
        with pytest.raises(UserError, match=message):
            load_normalization(str(path), options.get("of", classifier), kind)

    assert load_normalization(str(path), classifier, "std").scale["fc"].shape == (1,)
    refused("^--normalization is 'st'; expected std, rms, none$", "st")
    refused(
        r"s.npz has no mean/layer1.0: it is of other layers or of another classifier.\nRun classifier_statistics",
        of=open_classifier("resnet18", "untrained", ["conv1", "layer1.0"]),
    )
    np.savez(path, **{**arrays, "mean/conv1": np.zeros(96)})
    refused(r"s.npz is of another classifier: mean/conv1 has shape \[96\], expected \[64\].\n")
    np.savez(path, **{**arrays, "variance/conv1": np.full(64, np.nan)})
    refused(r"variance/conv1 contains NaN or infinity.\nRemove the file. Run classifier_statistics")
    path.write_bytes(path.read_bytes()[:500])
    refused(r"s.npz are damaged: .*\nRemove the file. Run classifier_statistics")
    path.unlink()
    refused(r"^the statistics \S*s.npz do not exist.\nRun classifier_statistics.py for resnet18")
    assert load_normalization(str(path), classifier, "none") == Normalization()
