"""Features at positions: pixels, layers of classifiers, and networks of one's own."""

import argparse
import sys
from types import SimpleNamespace

from guided_diffusion.changes.tokens import load_tokens
from guided_diffusion.classifier.networks import open_classifier
from guided_diffusion.errors import UserError

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import Permute

pytestmark = pytest.mark.usefixtures("one_thread")


def flags(**changes) -> argparse.Namespace:
    known = {"tokens": "pixels", "classifier_name": "resnet18", "classifier_path": "untrained", "clip_weights": ""}
    return argparse.Namespace(**{**known, "image_size": 32, **changes})


def two_images(size=32):
    return list(np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8))


def features_and_changes(tokens, images):
    with torch.inference_mode():
        features = tokens.features(torch.stack([tokens.preprocess(image) for image in images]))
        return features, tokens.changes(features[1:] - features[:1])


def test_pixels_change_by_the_norm_of_rgb():
    images = two_images()
    tokens = load_tokens(flags())
    _, changes = features_and_changes(tokens, images)
    a, b = (image / 127.5 - 1 for image in images)
    assert tokens.shape == (32, 32)
    assert changes.numpy().reshape(32, 32) == pytest.approx(np.sqrt(((a - b) ** 2).sum(-1)), abs=1e-6)


class SmallNetwork(nn.Module):
    """A classifier with maps, one of which has channels last, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.block1, self.block2 = (nn.Conv2d(n, 8, 3, stride=2, padding=1) for n in (3, 8, 8))
        self.relu, self.last, self.pool, self.fc = (
            nn.ReLU(),
            Permute([0, 2, 3, 1]),
            nn.AdaptiveAvgPool2d(1),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        x = self.relu(self.block2(self.relu(self.block1(self.stem(x)))))
        return self.fc(self.pool(self.last(x).permute(0, 3, 1, 2)).flatten(1))


@pytest.fixture
def small_network(monkeypatch) -> dict:
    """Flags of this classifier."""
    monkeypatch.setitem(sys.modules, "small", SimpleNamespace(create=lambda: (SmallNetwork(), planes)))
    return {"classifier_name": "small:create", "classifier_path": ""}


def planes(image):
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def test_positions_of_a_feature_map(small_network):
    images = two_images()
    tokens = load_tokens(flags(tokens="block1", **small_network))
    with torch.inference_mode():
        x = tokens.model.block1(tokens.model.stem(torch.stack([planes(image) for image in images])))
    features, changes = features_and_changes(tokens, images)
    assert tokens.name == "create-block1" and tokens.shape == (8, 8)
    assert torch.allclose(features, x.permute(0, 2, 3, 1))
    expected = (x[1] - x[0]).square().sum(0).sqrt() / 8**0.5
    assert torch.allclose(changes.reshape(8, 8), expected, rtol=1e-5)


def test_an_output_that_the_next_layer_overwrites(monkeypatch):
    network = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 256, 5))
    monkeypatch.setitem(sys.modules, "small", SimpleNamespace(create=lambda: (network, planes)))
    images = two_images()
    tokens = load_tokens(flags(tokens="0", classifier_name="small:create", classifier_path=""))
    features, _ = features_and_changes(tokens, images)
    with torch.inference_mode():
        expected = network[0](torch.stack([planes(image) for image in images]))
    others = [load_tokens(flags(tokens=name, classifier_name="small:create", classifier_path="")) for name in "01"]
    assert [other.overwritten for other in others] == [True, False] and tokens.overwritten
    assert expected.min() < 0 and torch.equal(features, expected.permute(0, 2, 3, 1))


def test_maps_with_channels_last(small_network):
    first, last = (load_tokens(flags(tokens=name, **small_network)) for name in ("block2", "last"))
    assert (first.channel_axis, last.channel_axis) == (1, -1)
    features = [features_and_changes(tokens, two_images())[0] for tokens in (first, last)]
    assert torch.equal(features[0].relu(), features[1])


def test_a_transformer_s_class_token_is_left_out(monkeypatch):
    vit = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=5
    )
    monkeypatch.setitem(sys.modules, "small", SimpleNamespace(create=lambda: (vit, planes)))
    layer = "encoder.layers.encoder_layer_1"
    tokens = load_tokens(flags(tokens=layer, classifier_name="small:create", classifier_path=""))
    assert tokens.shape == (4, 4)
    kept = []
    vit.encoder.layers[1].register_forward_hook(lambda _module, _args, output: kept.append(output))
    features, _ = features_and_changes(tokens, two_images())
    assert kept[0].shape == (2, 17, 16)
    assert torch.equal(features, kept[0][:, 1:].reshape(2, 4, 4, 16))


class Rows(nn.Module):
    """Of images (B, 3, H, W): rows as tokens, (B, H, 3 W)."""

    def forward(self, x):
        return x.permute(0, 2, 1, 3).flatten(2)


def own(monkeypatch, *found, path=""):
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(create=lambda: found if len(found) > 1 else found[0]))
    return load_tokens(flags(tokens="own:create", classifier_path=str(path)))


def test_tokens_of_one_s_own_with_distances(monkeypatch):
    distances = np.abs(np.subtract.outer(range(32), range(32))).astype(float)
    tokens = own(monkeypatch, Rows(), planes, distances)
    images = two_images()
    features, changes = features_and_changes(tokens, images)
    assert tokens.name == "create" and tokens.shape == (32,) and features.shape == (2, 32, 96)
    a, b = (image / 255 for image in images)
    assert changes.numpy()[0] == pytest.approx(np.sqrt(((a - b) ** 2).sum((1, 2)) / 96), rel=1e-5)
    assert tokens.pairs().distance.tolist() == list(range(32))
    other = own(monkeypatch, Rows(), planes, 2 * distances)
    assert other.digest != tokens.digest


def test_weights_of_one_s_own_network(monkeypatch, tmp_path):
    saved, fresh = (nn.Conv2d(3, 4, 2, 2) for _ in range(2))
    torch.save(saved.state_dict(), tmp_path / "own.pt")
    tokens = own(monkeypatch, fresh, planes, path=tmp_path / "own.pt")
    assert tokens.shape == (16, 16) and torch.equal(fresh.weight, saved.weight)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"--classifier_path .*other.pt does not fit --tokens own:create"):
        own(monkeypatch, fresh, planes, path=tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "fc"}, r"the layer fc has no positions: its output is \[1, 5\]"),
        ({"tokens": "pool"}, "the layer pool has one position only"),
        ({"tokens": "block9"}, "--tokens: block9 matches no layer of the classifier; did you mean block"),
        ({"tokens": "pixel"}, "--tokens: pixel matches no layer of the classifier; did you mean pixels?"),
        ({"tokens": "block*"}, "--tokens block[*] matches 2 layers, block1, block2; expected one"),
        ({"tokens": "relu"}, "--tokens: relu cannot be watched: the network calls it 2 times"),
        ({"tokens": "nowhere:create"}, "--tokens 'nowhere:create' cannot be found: No module named 'nowhere'"),
    ],
)
def test_mistakes(changes, message, small_network):
    with pytest.raises(UserError, match=message) as error:
        load_tokens(flags(**small_network, **changes))
    assert str(error.value).count("\n") <= 1


@pytest.mark.parametrize("name", ["convnext_base", "inception_v3", "vit_b_16", "swin_v2_t", "densenet121"])
def test_a_misspelt_value_is_told_before_weights_are_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("guided_diffusion.classifier.networks._cached_file", None)
    with pytest.raises(UserError, match=r"^--tokens: pixel matches no layer of the classifier; did you mean pixels\?"):
        load_tokens(flags(tokens="pixel", classifier_name=name, classifier_path=""))
    with pytest.raises(UserError, match=r"^--layers: pixel matches no layer of the classifier; its modules are "):
        open_classifier(name, "", ["pixel"])


def test_mistakes_in_networks_of_one_s_own(monkeypatch):
    with pytest.raises(UserError, match="--tokens own:create returned Rows; expected"):
        own(monkeypatch, Rows())
    with pytest.raises(UserError, match="has 32 tokens: expected a square grid"):
        own(monkeypatch, Rows(), planes)
    with pytest.raises(UserError, match=r"has 32 tokens, and a table of distances of shape \(3, 3\)"):
        own(monkeypatch, Rows(), planes, np.zeros((3, 3)))
    with pytest.raises(UserError, match=r"^the network of --tokens create: the distance of a token to itself is 1;"):
        own(monkeypatch, Rows(), planes, np.ones((32, 32)))
    tokens = own(monkeypatch, nn.Identity(), planes)
    with pytest.raises(UserError, match=r"has a grid of \(16, 16\), expected \(32, 32\)"):
        tokens.features(torch.zeros(1, 3, 16, 16))
