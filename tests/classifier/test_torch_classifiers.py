"""Classifiers of torchvision: their layers, the axis of the channels, their preprocessing and their files."""

import argparse
import os
import re
import sys
from types import SimpleNamespace

from guided_diffusion.changes.tokens import load_tokens
from guided_diffusion.classifier.layers import find_layers
from guided_diffusion.classifier.preprocessing import as_preset
from guided_diffusion.errors import UserError
from guided_diffusion.torch_classifiers import open_classifier

import numpy as np
import pytest
import torch
import torchvision
from conftest import PHOTOGRAPHS
from PIL import Image
from torch import nn
from torchvision.transforms import functional

PAPER = ["features.0"]
for stage, blocks in ((1, 3), (3, 3), (5, 27), (7, 3)):
    PAPER += [f"features.{stage}.{block}" for block in range(blocks)] + [f"features.{stage + 1}"]
PAPER[-1] = "classifier"

# The smallest of each family: some of its layers, their channels and the axis of these, and the number of layers.
FAMILIES = {
    "convnext_tiny": (23, {"features.0": (96, 1), "features.7.2": (768, 1), "classifier": (1000, 1)}),
    "resnet18": (10, {"conv1": (64, 1), "layer1.0": (64, 1), "layer4.1": (512, 1), "fc": (1000, 1)}),
    "wide_resnet50_2": (18, {"conv1": (64, 1), "layer1.2": (256, 1), "layer4.2": (2048, 1), "fc": (1000, 1)}),
    "regnet_y_400mf": (18, {"stem": (32, 1), "trunk_output.block4.block4-5": (440, 1), "fc": (1000, 1)}),
    "vit_b_32": (14, {"conv_proj": (768, 1), "encoder.layers.encoder_layer_11": (768, -1), "heads": (1000, 1)}),
    "swin_v2_t": (17, {"features.0": (96, -1), "features.2": (192, -1), "features.7.1": (768, -1), "head": (1000, 1)}),
    "efficientnet_b0": (19, {"features.0": (32, 1), "features.7.0": (320, 1), "classifier": (1000, 1)}),
    "googlenet": (13, {"conv1": (64, 1), "inception5b": (1024, 1), "fc": (1000, 1)}),  # no blocks of a known kind
}


def test_the_paper_s_layers():
    base = open_classifier("convnext_base", "untrained")
    assert [layer.name for layer in base.layers] == PAPER and len(PAPER) == 41
    assert [layer.name for layer in base.layers if layer.is_logits] == ["classifier"]
    assert {layer.channel_axis for layer in base.layers} == {1}
    assert [layer.channels for layer in base.layers][::10] == [128, 512, 512, 512, 1000]
    assert not base.model.training and {w.dtype for w in base.model.parameters()} == {torch.float32}
    assert not any(w.requires_grad for w in base.model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    classifier = open_classifier(name, "untrained")
    number, some = FAMILIES[name]
    found = {layer.name: (layer.channels, layer.channel_axis) for layer in classifier.layers}
    assert len(found) == number and some.items() <= found.items()
    assert next(iter(found)) == next(iter(some)) and list(found)[-1] == list(some)[-1]
    assert [layer.name for layer in classifier.layers if layer.is_logits] == [list(found)[-1]]
    picture = np.asarray(Image.open(next(PHOTOGRAPHS.glob("*/*.JPEG"))).resize((256, 256)))
    with torch.inference_mode():
        assert classifier.model(classifier.preprocess(picture)[None]).shape == (1, 1000)


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone():
    state = torch.random.get_rng_state()
    assert open_classifier("resnet18", "untrained").digest == open_classifier("resnet18", "untrained").digest
    assert torch.equal(state, torch.random.get_rng_state())


def test_layers_by_name_and_pattern_come_in_the_order_of_the_network():
    def names(*patterns, of="resnet18"):
        return [layer.name for layer in open_classifier(of, "untrained", patterns).layers]

    assert names("fc", "layer2.?", "layer1.0.conv2") == ["layer1.0.conv2", "layer2.0", "layer2.1", "fc"]
    assert names("layer[12]") == ["layer1", "layer2"]
    axes = open_classifier("swin_v2_t", "untrained", ["norm", "permute", "features.1.0.mlp.0", "avgpool"]).layers
    assert {layer.name: layer.channel_axis for layer in axes} == {
        "features.1.0.mlp.0": -1,
        "norm": -1,
        "permute": 1,
        "avgpool": 1,
    }
    inner = open_classifier("convnext_tiny", "untrained", ["features.1.0.block.[0-5]", "classifier.2"]).layers
    assert [layer.channel_axis for layer in inner] == [1, -1, -1, -1, -1, -1, 1] and inner[-1].is_logits


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("resnet18", "layer5", r"^--layers: layer5 matches no layer of the classifier; did you mean layer4"),
        (
            "resnet18",
            "zzz*",
            r"its modules are conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4, avgpool, fc$",
        ),
        ("resnet18", "layer1.0.relu", r"layer1.0.relu cannot be watched: the network calls it 2 times per image"),
        ("googlenet", "aux1", r"aux1 cannot be watched: the network calls it 0 times"),
        ("vit_b_32", "encoder.layers.encoder_layer_0.self_attention", r"its output is not a tensor with a row per im"),
        ("swin_v2_t", "features.1.0.attn.cpb_mlp.0", r"its output is not a tensor with a row per image"),
    ],
)
def test_layers_that_cannot_be_watched(name, pattern, message):
    with pytest.raises(UserError, match=message):
        open_classifier(name, "untrained", [pattern])


class Changed(nn.Module):
    """A network whose output is changed after its last layer."""

    def __init__(self, change):
        super().__init__()
        self.layers, self.change = nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), change

    def forward(self, x):
        return self.change(self.layers(x[..., :4, :4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"logits": x}, "classifier_name: the classifier's output is not a tensor; expected logits"),
        (lambda x: (x, x), "classifier_name: the classifier's output is not a tensor; expected logits"),
        (lambda x: x[:, :, None], r"classifier_name: the classifier's output is of shape \(2, 5, 1\) for two images;"),
        (lambda x: x.sum(0), r"classifier_name: the classifier's output is of shape \(5,\) for two images;"),
        (lambda x: x.log_softmax(1), "layers: no layer's output is the classifier's output, so name the layers"),
    ],
)
def test_outputs_that_are_no_logits_of_a_layer(change, message):
    with pytest.raises(UserError, match=f"^--{message}"):
        find_layers(Changed(change), 8)
    if message.startswith("layers"):
        ((layer,), classes) = find_layers(Changed(change), 8, ["layers.1"])
        assert (layer.name, layer.is_logits, classes) == ("layers.1", False, 5)


@pytest.mark.parametrize(
    ("name", "patterns", "number", "some", "told"),
    [
        ("resnet18", ["layer4.*"], 13, "layer4.0.bn1", r"2 layers .*\(layer4.0.relu: the network calls it 2 times per"),
        (
            "swin_t",
            ["features.7.*", "head"],
            21,
            "features.7.1.attn",
            "6 layers .*features.7.0.attn.qkv: the network cal",
        ),
        (
            "vit_b_32",
            ["encoder.layers.*"],
            120,
            "encoder.layers.encoder_layer_11",
            "24 layers .*self_attention: its outp",
        ),
    ],
)
def test_a_pattern_leaves_out_what_cannot_be_watched(name, patterns, number, some, told, capsys):
    layers = [layer.name for layer in open_classifier(name, "untrained", patterns).layers]
    assert len(layers) == number and some in layers
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"--layers: skipped {told}", line) and len(line) < 300


def test_a_pattern_of_which_nothing_can_be_watched_is_refused():
    with pytest.raises(
        UserError, match=r"^--layers: none of the 6 layers matching aux1\.\* can be watched: aux1.conv "
    ):
        open_classifier("googlenet", "untrained", ["fc", "aux1.*"])
    with pytest.raises(UserError, match=r"^--layers: layer4.0.relu cannot be watched: the network calls it 2 times"):
        open_classifier("resnet18", "untrained", ["layer4.*", "layer4.0.relu"])  # a name is meant


def test_names():
    with pytest.raises(UserError, match=r"^--classifier_name 'ConvNext_bse' is .*; did you mean convnext_base"):
        open_classifier("ConvNext_bse", "untrained")


def test_preprocessing_is_the_preset_of_the_weights(photographs):
    image = np.asarray(Image.open(photographs / "n07920052/n07920052_2.JPEG").resize((256, 256)))
    got = open_classifier("convnext_tiny", "untrained").preprocess(image)
    assert got.dtype == torch.float32 and got.shape == (3, 224, 224)
    preset = torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1.transforms()
    assert torch.equal(got, preset(Image.fromarray(image)))
    # Step by step: the shorter side to 236 with Pillow, the middle, the mean and deviation of ImageNet's colours.
    middle = Image.fromarray(image).resize((236, 236), Image.Resampling.BILINEAR).crop((6, 6, 230, 230))
    by_hand = (np.asarray(middle) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(got.permute(1, 2, 0), by_hand, atol=1e-5)


def test_presets_in_two_steps():
    """The pixels that are uploaded are bytes; batches of them give what torchvision's preset gives, to the last bit."""
    image = np.random.default_rng(0).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    image[:64, :4] = np.arange(256, dtype=np.uint8).reshape(64, 4, 1)
    names = ("convnext_base", "inception_v3", "maxvit_t", "vgg16", "vit_h_14")
    for weights in (entry for name in names for entry in torchvision.models.get_model_weights(name)):
        preset = weights.transforms()
        preprocess, expected = as_preset(preset), preset(Image.fromarray(image))
        pixels = preprocess.on_cpu(image)
        assert pixels.dtype == torch.uint8 and pixels.shape == expected.shape
        assert torch.equal(preprocess.on_device(torch.stack([pixels, pixels])), torch.stack([expected, expected]))
        assert torch.equal(preprocess(image), expected)


OWN = """
import torch
from torch import nn

def small():
    network = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(), nn.Linear(8 * 64, 5))
    return network, lambda image: torch.from_numpy(image).permute(2, 0, 1) / 255

def network_alone():
    return nn.Identity()
"""


def test_one_s_own(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    one, other = (open_classifier("own_networks:small", path, image_size=16) for path in ("", "untrained"))
    assert (one.name, one.num_classes, one.digest) == ("small", 5, other.digest)
    assert [(layer.name, layer.channels, layer.is_logits) for layer in one.layers] == [("0", 8, False), ("2", 5, True)]
    image = np.full((16, 16, 3), 51, np.uint8)
    assert torch.equal(one.preprocess(image), torch.full((3, 16, 16), 0.2))
    torch.save({key: w + 1 for key, w in one.model.state_dict().items()}, tmp_path / "own.pth")
    loaded = open_classifier("own_networks:small", str(tmp_path / "own.pth"), ["2"], 16)
    assert torch.equal(loaded.model[2].bias, one.model[2].bias + 1)
    for name, path, message in (
        ("own_networks:smal", "", r"'own_networks:smal' cannot be found: .* attribute .smal.\.\nExpected"),
        ("no_networks:small", "", r"cannot be found: No module named 'no_networks'"),
        (":small", "", r"':small' cannot be found: "),
        ("own_networks:network_alone", "", r"returned Identity; expected \(network, preprocess\)"),
        ("own_networks:small", "nowhere.pth", r"--classifier_path nowhere.pth cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            open_classifier(name, path, image_size=16)


def planes(image):
    return torch.from_numpy(image).permute(2, 0, 1) / 255


def fails(*_):
    raise RuntimeError("no such thing\nand more")


class Fails(nn.Flatten):
    forward = fails


NETWORK = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(), nn.Linear(8 * 64, 5))
PRESET = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
RETURNED = "the preprocess of {} returned "
BROKEN = {
    "numpy": (lambda: (NETWORK, lambda image: image.transpose(2, 0, 1) / 255), f"{RETURNED}ndarray;"),
    "channels last": (
        lambda: (NETWORK, lambda image: torch.from_numpy(image) / 255),
        f"{RETURNED}a tensor [16, 16, 3] of float32;",
    ),
    "float64": (lambda: (NETWORK, lambda image: planes(image).double()), f"{RETURNED}a tensor [3, 16, 16] of float64;"),
    "a batch": (lambda: (NETWORK, lambda image: planes(image)[None]), f"{RETURNED}a tensor [1, 3, 16, 16] of float32;"),
    "not square": (lambda: (NETWORK, lambda image: planes(image[1:])), f"{RETURNED}a tensor [3, 15, 16] of float32;"),
    "a preset": (lambda: (NETWORK, PRESET), "the preprocess of {} failed with TypeError: "),
    "preprocess fails": (lambda: (NETWORK, fails), "the preprocess of {} failed with RuntimeError: no such thing ("),
    "grey": (
        lambda: (nn.Sequential(nn.Conv2d(1, 8, 2, 2), nn.Flatten(), nn.Linear(512, 5)), planes),
        "the network of {}, for an input [1, 3, 16, 16], failed with RuntimeError: ",
    ),
    "bytes": (
        lambda: (NETWORK, lambda image: torch.from_numpy(image).permute(2, 0, 1)),
        "the network of {}, for an input [1, 3, 16, 16], failed with RuntimeError: ",
    ),
    "forward fails": (lambda: (Fails(), planes), "failed with RuntimeError: no such thing (test_torch_classifiers.py,"),
    "function fails": (fails, "{} failed with RuntimeError: no such thing (test_torch_classifiers.py, line "),
    "arguments": (lambda size: (NETWORK, planes), "{} failed with TypeError: "),
}


@pytest.mark.parametrize("mistake", BROKEN)
@pytest.mark.parametrize("flag", ["--classifier_name", "--tokens"])
def test_mistakes_in_one_s_own(flag, mistake, monkeypatch):
    create, message = BROKEN[mistake]
    if flag == "--tokens" and message.startswith(f"{RETURNED}a tensor"):  # which its network might take
        message = "the network of {}, for an input ["
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(create=create))
    flags = argparse.Namespace(tokens="own:create", classifier_path="", image_size=16)
    with pytest.raises(UserError) as caught:
        open_classifier("own:create", image_size=16) if flag == "--classifier_name" else load_tokens(flags)
    assert message.format(f"{flag} own:create") in str(caught.value) and str(caught.value).count("\n") <= 1


def test_a_module_of_one_s_own_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "own_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'own_broken:create' cannot be found: division by zero"):
        open_classifier("own_broken:create")


# Files


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A ResNet-18 with random weights, and the file of its state dict."""
    model = torchvision.models.resnet18().eval()
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save(model.state_dict(), path)
    return model, str(path)


def test_a_local_file(resnet, tmp_path):
    model, path = resnet
    classifier = open_classifier("resnet18", path)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(classifier.model(x), model(x))
    assert classifier.digest != open_classifier("resnet18", "untrained").digest
    # Float16 on disk; and a head for other classes.
    half = {name: w.half() if w.is_floating_point() else w for name, w in model.state_dict().items()}
    half |= {"fc.weight": half["fc.weight"][:10].clone(), "fc.bias": half["fc.bias"][:10].clone()}
    torch.save(half, tmp_path / "ten.pth")
    ten = open_classifier("resnet18", str(tmp_path / "ten.pth"))
    assert ten.layers[-1].channels == 10 and {w.dtype for w in ten.model.parameters()} == {torch.float32}
    assert torch.equal(ten.model.fc.weight, half["fc.weight"].float())


def test_files_of_networks_that_were_saved_in_a_way_of_their_own(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 96, 96)
    for name, options in (("densenet121", {}), ("mnasnet0_5", {}), ("googlenet", {"transform_input": True})):
        model = torchvision.models.get_model(
            name, **options, **({"init_weights": False} if name == "googlenet" else {})
        ).eval()
        state = model.state_dict()
        if name == "densenet121":  # as in the published files
            state = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): w for key, w in state.items()}
        torch.save(state, tmp_path / f"{name}.pth")
        with torch.no_grad():
            assert torch.equal(open_classifier(name, str(tmp_path / f"{name}.pth")).model(x), model(x)), name


def test_torchvision_s_names_of_files_tell_which_preset(resnet, tmp_path):
    state = torchvision.models.resnet50().state_dict()
    image = np.zeros((256, 256, 3), np.uint8)
    image[::2] = 255
    weights = torchvision.models.ResNet50_Weights
    for preset, name in ((weights.IMAGENET1K_V1, os.path.basename(weights.IMAGENET1K_V1.url)), (weights.DEFAULT, "x")):
        torch.save(state, tmp_path / name)
        got = open_classifier("resnet50", str(tmp_path / name), ["fc"]).preprocess(image)
        assert torch.equal(got, preset.transforms()(Image.fromarray(image)))
        side = {256: "V1", 232: "V2"}[preset.transforms().resize_size[0]]
        assert side == preset.name[-2:] and functional.get_dimensions(got) == [3, 224, 224]


def test_files_that_do_not_fit(resnet, tmp_path):
    _, path = resnet
    with pytest.raises(
        UserError,
        match=r"^--classifier_path \S+ does not fit --classifier_name resnet50: \d+ of \d+ weights are missing",
    ):
        open_classifier("resnet50", path)
    wide = tmp_path / "wide.pth"
    torch.save(torchvision.models.wide_resnet50_2().state_dict(), wide)
    with pytest.raises(UserError, match=r"resnet50: layer1.0.conv1.weight has shape \[128, 64, 1, 1\], expected \[64,"):
        open_classifier("resnet50", str(wide))
    with pytest.raises(UserError, match=r"^--classifier_path \S*missing.pth cannot be read: No such file"):
        open_classifier("resnet18", str(tmp_path / "missing.pth"))
    cut = tmp_path / "cut.pth"
    cut.write_bytes(wide.read_bytes()[:100000])
    with pytest.raises(UserError, match=r"^--classifier_path \S*cut.pth .* is truncated"):
        open_classifier("wide_resnet50_2", str(cut))


def test_without_a_network_the_message_says_which_file_to_fetch_and_where_to_put_it(resnet, tmp_path, monkeypatch):
    model, _ = resnet
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(UserError) as caught:
        open_classifier("resnet18")
    folder = tmp_path / "hub" / "checkpoints"
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith("the weights of resnet18 cannot be downloaded: <urlopen error")
    assert lines[0].endswith("Download https://download.pytorch.org/models/resnet18-f37072fd.pth")
    assert f"put the file into {folder} or give its path with --classifier_path" in lines[1]
    assert list(folder.iterdir()) == []
    # Put there as told, it is taken.
    torch.save(model.state_dict(), folder / "resnet18-f37072fd.pth")
    assert torch.equal(open_classifier("resnet18").model.fc.weight, model.fc.weight)
