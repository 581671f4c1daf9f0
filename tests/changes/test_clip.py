"""CLIP's patches: the right activation for the weights, in all published layouts of files.

The expected features are computed here from the weights alone. Tests of the full-size network need open_clip, which is
not among the packages for tests, since it is large; the others replace it by a small network with the same names.
"""

import argparse
import importlib.util
import sys
import warnings
from collections import OrderedDict
from types import ModuleType

from guided_diffusion.changes.clip import LAST_BLOCK, open_clip_visual
from guided_diffusion.changes.tokens import load_tokens
from guided_diffusion.errors import UserError

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms

pytestmark = pytest.mark.usefixtures("one_thread")

needs_open_clip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason='open_clip is not installed (pip install -e ".[clip]")'
)
TAGS = {"openai": True, "laion2b_s34b_b79k": False}  # whether they need QuickGELU
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NUMBERS = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, activation):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        fc = nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(zip(("c_fc", "gelu", "c_proj"), fc, strict=True)))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Visual(nn.Module):
    """A small image network with the names of CLIP's."""

    def __init__(self, activation, width=64, size=64, patch=16):
        super().__init__()
        self.image_size = (size, size)
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(Block(width, 1, activation) for _ in range(12)))

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer.resblocks(self.ln_pre(x))[:, 0])


def small_clip(name, pretrained=None):
    if pretrained is not None:
        raise OSError("the network is unreachable")
    model = nn.Module()
    model.visual = Visual(QuickGELU if name.endswith("-quickgelu") else nn.GELU)
    model.logit_scale = nn.Parameter(torch.ones(()))
    return model


@pytest.fixture
def small_open_clip(monkeypatch):
    """A stand-in for open_clip, with a small network."""
    module = ModuleType("open_clip")
    module.create_model = small_clip
    module.get_pretrained_cfg = lambda name, tag: (
        {"mean": MEAN, "std": STD, "interpolation": "bicubic", "quick_gelu": TAGS[tag]} if tag in TAGS else {}
    )
    module.list_pretrained_tags_by_model = lambda name: list(TAGS)
    module.image_transform = lambda size, is_train, mean, std, interpolation: transforms.Compose(
        [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    monkeypatch.setitem(sys.modules, "open_clip", module)


def random_state(model):
    """Weights of a size at which the activation matters."""
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    return {
        name: w + torch.randn(w.shape, generator=generator) / max(1, w[0].numel() if w.ndim > 1 else 1) ** 0.5
        for name, w in state.items()
    }


def openai_file(path, state):
    """OpenAI's own layout: a TorchScript program in half precision, with three numbers among its weights."""

    class Holder(nn.Module):
        def forward(self, x):
            return x

    state = {**state, **NUMBERS}
    root = Holder()
    for name, w in state.items():
        *parents, last = name.split(".")
        parent = root
        for part in parents:
            if part not in dict(parent.named_children()):
                parent.add_module(part, Holder())
            parent = getattr(parent, part)
        parent.register_buffer(last, w.half() if w.is_floating_point() else w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(root, torch.zeros(1)), path)


def patches(state, x, quick, heads):
    """The last block's output for the patches, from the weights alone: (B, patches, width)."""
    state = {name.removeprefix("visual."): w.float() for name, w in state.items() if name.startswith("visual.")}
    functional, width = nn.functional, len(state["class_embedding"])
    patch = state["conv1.weight"].shape[-1]
    x = functional.unfold(x, patch, stride=patch).mT @ state["conv1.weight"].flatten(1).T
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], 1) + state["positional_embedding"]
    norm = lambda x, name: functional.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    x = norm(x, "ln_pre")
    for i in range(12):
        block = {k.removeprefix(f"transformer.resblocks.{i}."): w for k, w in state.items()}
        y = norm(x, f"transformer.resblocks.{i}.ln_1")
        q, k, v = (
            part.unflatten(2, (heads, -1)).transpose(1, 2)
            for part in functional.linear(y, block["attn.in_proj_weight"], block["attn.in_proj_bias"]).chunk(3, dim=2)
        )
        attended = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + functional.linear(attended, block["attn.out_proj.weight"], block["attn.out_proj.bias"])
        y = functional.linear(
            norm(x, f"transformer.resblocks.{i}.ln_2"), block["mlp.c_fc.weight"], block["mlp.c_fc.bias"]
        )
        y = y * torch.sigmoid(1.702 * y) if quick else functional.gelu(y)
        x = x + functional.linear(y, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    return x[:, 1:]


def flags(path, weights="", size=80):
    return argparse.Namespace(tokens="clip", classifier_path=str(path), clip_weights=weights, image_size=size)


def check_features(path, weights, state, quick, heads, shape):
    """The tokens of a file have the features of its weights with this activation, and not with the other."""
    tokens = load_tokens(flags(path, weights))
    assert tokens.shape == shape
    images = np.random.default_rng(0).integers(0, 256, (2, 80, 80, 3), dtype=np.uint8)
    with torch.inference_mode():
        x = torch.stack([tokens.preprocess(image) for image in images])
        found = tokens.features(x).flatten(1, 2)
        expected, wrong = (patches(state, x, kind, heads) for kind in (quick, not quick))
    scale = expected.std()
    assert (found - expected).abs().max() < 1e-4 * scale
    assert (found - wrong).abs().max() > 1e-2 * scale
    return tokens


def check_all_layouts(create, folder, heads, shape):
    """Files of OpenAI's and of open_clip's layouts, with the activation that each needs."""
    state = random_state(create("ViT-B-32-quickgelu"))
    halved = {name: w.half().float() for name, w in state.items()}
    torch.save(state, folder / "plain.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": w for n, w in state.items()}}, folder / "trained.pt")
    torch.save({**{name: w.half() for name, w in state.items()}, **NUMBERS}, folder / "numbers.pt")
    openai_file(folder / "ViT-B-32.pt", state)
    digests = {}
    for file, weights, of_file, quick in (
        ("ViT-B-32.pt", "", halved, True),
        ("ViT-B-32.pt", "openai", halved, True),
        ("numbers.pt", "", halved, True),
        ("plain.pt", "openai", state, True),
        ("plain.pt", "laion2b_s34b_b79k", state, False),
        ("trained.pt", "laion2b_s34b_b79k", state, False),
    ):
        tokens = check_features(folder / file, weights, of_file, quick, heads, shape)
        digests[file, weights] = tokens.digest
    assert (
        digests["plain.pt", "openai"]
        != digests["plain.pt", "laion2b_s34b_b79k"]
        == digests["trained.pt", "laion2b_s34b_b79k"]
    )
    assert digests["ViT-B-32.pt", ""] == digests["numbers.pt", ""]


def test_the_activation_of_the_weights(small_open_clip, tmp_path):
    torch.manual_seed(0)
    check_all_layouts(small_clip, tmp_path, heads=1, shape=(4, 4))


@needs_open_clip
def test_the_activation_of_the_weights_in_the_full_network(tmp_path):
    import open_clip

    check_all_layouts(lambda name: open_clip.create_model(name, pretrained=None), tmp_path, heads=12, shape=(7, 7))


@needs_open_clip
def test_open_clip_knows_which_weights_need_which_activation():
    import open_clip

    for tag, quick in TAGS.items():
        assert bool(open_clip.get_pretrained_cfg("ViT-B-32", tag).get("quick_gelu")) is quick
    model, _, activation = open_clip_visual(path="untrained")
    assert activation == "QuickGELU" and type(model.transformer.resblocks[11].mlp.gelu).__name__ == "QuickGELU"
    assert type(open_clip_visual("laion2b_s34b_b79k", "untrained")[0].get_submodule(LAST_BLOCK).mlp.gelu) is nn.GELU


def test_a_file_that_does_not_say_which_activation_it_needs(small_open_clip, tmp_path):
    state = small_clip("ViT-B-32").state_dict()
    torch.save(state, tmp_path / "plain.pt")
    with pytest.raises(UserError, match="does not say how it was trained") as error:
        load_tokens(flags(tmp_path / "plain.pt"))
    assert "--clip_weights" in str(error.value)
    torch.save({**state, **NUMBERS}, tmp_path / "openai.pt")
    with pytest.raises(UserError, match="is OpenAI's own file, but --clip_weights is laion2b_s34b_b79k"):
        load_tokens(flags(tmp_path / "openai.pt", "laion2b_s34b_b79k"))


def test_mistakes(small_open_clip, tmp_path, monkeypatch):
    torch.save({"visual.conv1.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("nothing")
    for path, weights, message in (
        (tmp_path / "other.pt", "openai", r"other.pt is not CLIP ViT-B-32 \(--tokens clip\)"),
        (tmp_path / "text.pt", "openai", "--classifier_path .*text.pt"),
        (tmp_path / "none.pt", "", "--classifier_path .*none.pt cannot be read"),
        ("", "nonsense", "--clip_weights 'nonsense' is not known to open_clip for ViT-B-32; it knows openai, laion2b"),
        ("", "", "the weights openai of CLIP cannot be downloaded: the network is unreachable"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_tokens(flags(path, weights))
        assert str(error.value).count("\n") <= 1
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"--tokens clip needs open_clip .*pip install -e \".\[clip\]\""):
        load_tokens(flags(""))
