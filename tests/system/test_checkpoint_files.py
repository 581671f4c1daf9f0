"""Real-world weight files: wrapped, among other entries, old, in other formats, or without weights."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
from collections import OrderedDict
from pathlib import Path

from guided_diffusion.checkpoints import DIFFUSION_MODEL, build
from guided_diffusion.classifier.networks import open_classifier
from guided_diffusion.errors import UserError
from guided_diffusion.images.io import UnreadableImage, read_image

import pytest
import torch
import torchvision
from conftest import SMALL_MODEL, as_flags, load_script, run_python
from reference import fill_weights
from test_checkpoints import DEFAULTS, LOADERS, NETWORKS, SMALL
from torch import nn
from torch.optim.swa_utils import AveragedModel

WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
    "average": AveragedModel,
    "own": lambda model: nn.ModuleDict({"model": nn.ModuleDict({"backbone": model})}),
}


def flags_of(network):
    return {**DEFAULTS[network], **SMALL[network]}


@pytest.fixture(scope="module")
def models():
    """A network of each kind, with weights."""
    return {network: fill_weights(build(network, flags_of(network))) for network in SMALL}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    theirs, ours = found.state_dict(), expected.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], w) for name, w in ours.items())


# Diffusion models, upsamplers and classifiers of noisy images


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_a_wrapper_s_prefix_is_taken_off(network, wrapper, models, tmp_path):
    path = str(tmp_path / "wrapped.pt")
    torch.save(WRAPPERS[wrapper](models[network]).state_dict(), path)
    assert_same(LOADERS[network](path, flags_of(network)), models[network])
    flag = "classifier_depth" if network.kind.startswith("a classifier") else "num_res_blocks"
    with pytest.raises(UserError, match=rf"Change your flags to: --{flag} 1$"):  # prefixes do not matter
        LOADERS[network](path, {**flags_of(network), flag: 2})


@pytest.mark.parametrize("key", ["state_dict", "model", "ema", "model_state_dict", "params_ema"])
@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_the_only_state_dict_of_the_network_is_found_in_a_file_with_other_things(
    network, key, models, tmp_path, capsys
):
    path, model = str(tmp_path / "training.pt"), models[network]
    optimizer = torch.optim.AdamW(model.parameters())
    more = {
        "epoch": 7,
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-4),
        "loss": torch.zeros(3),
    }
    torch.save({key: nn.DataParallel(model).state_dict(), **more}, path)
    capsys.readouterr()
    assert_same(LOADERS[network](path, flags_of(network)), model)
    told = f"{path} has the entries {key}, epoch, optimizer, args, loss: using {key}"
    assert told in capsys.readouterr().err
    # Neither the state dict of another network nor flags that do not fit make it ambiguous.
    torch.save({"teacher": {"layer.weight": torch.zeros(3)}, key: model.state_dict()}, path)
    assert_same(LOADERS[network](path, flags_of(network)), model)
    flag = "classifier_depth" if network.kind.startswith("a classifier") else "num_res_blocks"
    with pytest.raises(UserError, match=rf"Change your flags to: --{flag} 1$"):
        LOADERS[network](path, {**flags_of(network), flag: 2})


@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_several_state_dicts_that_fit_are_listed_and_the_advice_works(network, models, tmp_path):
    path, model = tmp_path / "training.pt", models[network]
    ema = {name: 2 * w for name, w in model.state_dict().items()}
    torch.save({"step": 3, "model": model.state_dict(), "ema": ema}, path)
    with pytest.raises(UserError) as caught:
        LOADERS[network](str(path), flags_of(network))
    first, second = str(caught.value).splitlines()
    assert first == (
        f"{network.path_flag} {path} has the entries step, model, ema, and several are state dicts of this network: "
        "model, ema."
    )
    advice = second.removeprefix("Save one of them to its own file: ")
    exec(advice, {"torch": torch, "FILE": path, "NEW_FILE": tmp_path / "alone.pt"})
    assert_same(LOADERS[network](str(tmp_path / "alone.pt"), flags_of(network)), model)
    # Of two sizes, only one fits.
    flag = "classifier_width" if network.kind.startswith("a classifier") else "num_channels"
    wider = {**flags_of(network), flag: 128}
    torch.save({"model": build(network, wider).state_dict(), "ema": model.state_dict()}, path)
    assert_same(LOADERS[network](str(path), flags_of(network)), model)


@pytest.mark.filterwarnings("ignore:.*nested")
@pytest.mark.parametrize("network", SMALL, ids=NETWORKS)
def test_what_is_in_a_file_without_the_network_is_listed(network, tmp_path):
    path, flag = str(tmp_path / "other.pt"), network.path_flag
    resnet = torchvision.models.resnet18().state_dict()
    for saved, message in (
        (
            {"model": resnet, "epoch": 1},
            rf"^{flag} {path} contains 122 weights of another network \(the first is 'conv1",
        ),
        (
            {"a": resnet, "b": resnet},
            rf"^{flag} {path} has the entries a, b, and none is a state dict of this network$",
        ),
        (
            {"epoch": 1, "list": [1]},
            rf"^{flag} {path} contains entries other than tensors \('epoch': int, 'list': list\)",
        ),
        ({0: torch.zeros(1)}, rf"^{flag} {path} contains unnamed tensors; expected a dict of tensors"),
        (torch.zeros(2), rf"^{flag} {path} contains a Tensor; expected a dict of tensors"),
        (torch.nested.nested_tensor([torch.zeros(2)]), rf"^{flag} {path} contains a Tensor; expected a dict"),
        ({"ema": {"a": torch.nested.nested_tensor([torch.zeros(2)])}, "epoch": 1}, "tensor of kind nested, float32, a"),
        ([torch.zeros(1)], rf"^{flag} {path} contains a list; expected a dict of tensors"),
        ({}, rf"^{flag} {path} contains an empty dict; expected a dict of tensors"),
        ({"n_averaged": torch.tensor(3)}, rf"^{flag} {path} contains 0 weights of another network"),
    ):
        torch.save(saved, path)
        with pytest.raises(UserError, match=message):
            LOADERS[network](path, flags_of(network))


def test_the_scripts_take_such_files(models, tmp_path):
    (diffusion, _, classifier) = SMALL
    weights, noisy = tmp_path / "training.pt", tmp_path / "classifier.pt"
    torch.save({"ema": nn.DataParallel(models[diffusion]).state_dict(), "step": 3}, weights)
    torch.save({"state_dict": torch.compile(models[classifier]).state_dict(), "epoch": 3}, noisy)
    flags = [*as_flags({**SMALL_MODEL, "image_size": 64, "attention_resolutions": "32"}), "--timestep_respacing", "2"]
    flags += ["--num_samples", "1", "--num_threads", "1", "--model_path", str(weights)]
    assert load_script("scripts/image_sample.py").main([*flags, "--output", str(tmp_path / "a")]) == 0
    guided = ["--classifier_path", str(noisy), "--classifier_width", "64", "--classifier_depth", "1"]
    assert load_script("scripts/classifier_sample.py").main([*flags, *guided, "--output", str(tmp_path / "b")]) == 0


# Classifiers of torchvision and the user


class OldPickle:
    """Pickle module for torch.save, to write files like those of PyTorch 0.3."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            if isinstance(value, torch.Tensor):
                storage = value._typed_storage()
                return torch._utils._rebuild_tensor, (storage, value.storage_offset(), value.size(), value.stride())
            return NotImplemented

    dump, dumps = staticmethod(pickle.dump), staticmethod(pickle.dumps)


def as_in_2017(state: dict) -> OrderedDict:
    """A state dict from before batch normalisation counted batches and modules had versions."""
    return OrderedDict((name, w) for name, w in state.items() if "num_batches_tracked" not in name)


def save_as_in_2017(state: dict, path: Path) -> None:
    torch.save(as_in_2017(state), path, pickle_module=OldPickle, _use_new_zipfile_serialization=False)
    assert b"_rebuild_tensor\n" in path.read_bytes()


def make(name: str, **options) -> nn.Module:
    torch.manual_seed(1)
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "transform_input": True, **options}
    return torchvision.models.get_model(name, **options).eval()


def assert_loaded(name: str, path: Path, model: nn.Module, layers=()) -> nn.Module:
    side = 299 if name == "inception_v3" else 224 if name.startswith("vit") else 96
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = open_classifier(name, str(path), layers).model
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    return found


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "googlenet", "inception_v3"])
def test_files_of_the_first_years(name, tmp_path):
    model, path = make(name), tmp_path / f"{name}.pth"
    state = model.state_dict()
    if name == "densenet121":
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): w for key, w in state.items()}
    save_as_in_2017(state, path)
    head = "classifier.1" if name == "mobilenet_v2" else "classifier" if name == "densenet121" else "fc"
    assert_loaded(name, path, model, [head])


def test_counts_of_batches_in_another_shape(tmp_path):
    """Before PyTorch 0.4, a number was a tensor of one entry."""
    model = make("resnet18")
    state = {name: w.reshape(1) if w.ndim == 0 else w for name, w in model.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    assert_loaded("resnet18", tmp_path / "x.pth", model)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_where_and_how_a_tensor_is_stored_does_not_matter(suffix, tmp_path):
    """The last digits of a matrix product may depend on both."""
    model = make("resnet18")
    path = tmp_path / f"x.{suffix}"
    if suffix == "pth":  # parts of larger tensors, channels last
        state = {
            name: torch.cat([w.flatten()[:1], w.flatten()])[1:].view(w.shape) for name, w in model.state_dict().items()
        }
        torch.save({n: w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for n, w in state.items()}, path)
    else:  # starts at a multiple of 8 bytes
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    found = assert_loaded("resnet18", path, model)
    for w in found.state_dict().values():
        assert w.is_contiguous() and w.data_ptr() % 64 == 0


@pytest.mark.filterwarnings("ignore:.*(sparse csr|quantize|nested)")
@pytest.mark.parametrize(
    ("kind", "convert"),
    {
        "sparse_coo, float32": torch.Tensor.to_sparse,
        "sparse_csr, float32": torch.Tensor.to_sparse_csr,
        "strided, qint8": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
        "strided, complex64": lambda w: w * 1j,
        "meta": lambda w: w.to("meta"),
        "nested, float32": lambda w: torch.nested.nested_tensor(list(w)),
    }.items(),
)
def test_tensors_that_are_not_dense_and_real(kind, convert, models, tmp_path):
    weights = models[DIFFUSION_MODEL].state_dict()
    torch.save({**weights, "time_embed.0.weight": convert(weights["time_embed.0.weight"])}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=f"tensor of kind {kind}, time_embed.0.weight; expected dense, real"):
        LOADERS[DIFFUSION_MODEL](str(tmp_path / "odd.pt"), flags_of(DIFFUSION_MODEL))


def test_a_vision_transformer_with_the_names_of_its_first_version(tmp_path):
    model = make("vit_b_32")
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    old = OrderedDict()
    for name, w in model.state_dict().items():
        for new, before in names.items():
            name = name.replace(new, before)
        old[name] = w
    torch.save(old, tmp_path / "x.pth")
    assert_loaded("vit_b_32", tmp_path / "x.pth", model, ["heads"])


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_may_be_absent(name, tmp_path):
    with_heads = make(name)
    without = make(name, aux_logits=False)
    without.load_state_dict({k: w for k, w in with_heads.state_dict().items() if k in without.state_dict()})
    for file, model in (("with.pth", with_heads), ("without.pth", without)):
        torch.save(model.state_dict(), tmp_path / file)
        found = assert_loaded(name, tmp_path / file, model, ["fc"])
        assert found.state_dict().keys() == model.state_dict().keys()
    cut = {k: w for k, w in with_heads.state_dict().items() if not k.startswith("fc.")}
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"2 of \d+ weights are missing, such as fc\.weight$"):
        open_classifier(name, str(tmp_path / "cut.pth"))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_classifiers(wrapper, tmp_path):
    model, path = make("resnet18", num_classes=7), tmp_path / "x.pth"
    torch.save(WRAPPERS[wrapper](model).state_dict(), path)
    assert_loaded("resnet18", path, model)
    # As torchvision's own training script saves them, and as Lightning does.
    more = {"epoch": 3, "optimizer": torch.optim.SGD(model.parameters(), 0.1).state_dict(), "lr_scheduler": {}}
    torch.save({"model": WRAPPERS[wrapper](model).state_dict(), **more, "args": argparse.Namespace(lr=0.1)}, path)
    assert_loaded("resnet18", path, model)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_version_of_a_wrapped_network_is_kept(wrapper, tmp_path):
    model, path = make("mnasnet0_5"), tmp_path / "x.pth"  # which requires its version
    torch.save(WRAPPERS[wrapper](model).state_dict(), path)
    assert_loaded("mnasnet0_5", path, model, ["classifier"])
    torch.save(dict(model.state_dict()), path)
    with pytest.raises(UserError, match=r"does not fit --classifier_name mnasnet0_5: version"):
        open_classifier("mnasnet0_5", str(path))


OWN = """
from torchvision.models import resnet18

def ours():
    return resnet18(num_classes=3), lambda image: __import__("torch").from_numpy(image).permute(2, 0, 1) / 255
"""


def test_one_s_own_network(tmp_path, monkeypatch):
    (tmp_path / "own_resnet.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    model, path = make("resnet18", num_classes=3), tmp_path / "x.pth"
    torch.save({"state_dict": nn.DataParallel(model).state_dict(), "epoch": 3}, path)
    assert_loaded("own_resnet:ours", path, model)
    save_as_in_2017(model.state_dict(), path)
    assert_loaded("own_resnet:ours", path, model)
    torch.save({"a": model.state_dict(), "b": model.state_dict()}, path)
    with pytest.raises(
        UserError, match=r"x.pth has the entries a, b, and several are state dicts of this network: a, b"
    ):
        open_classifier("own_resnet:ours", str(path))
    torch.save({**model.state_dict(), "fc.weight": torch.zeros(4, 512)}, path)
    with pytest.raises(UserError, match=r"own_resnet:ours: fc.weight has shape \[4, 512\], expected \[3, 512\]"):
        open_classifier("own_resnet:ours", str(path))


# Other formats


def test_a_git_lfs_pointer(tmp_path):
    pointer = tmp_path / "model.pt"
    pointer.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2211383297\n")
    for load, flag in (
        *((lambda n=network: LOADERS[n](str(pointer), flags_of(n)), network.path_flag) for network in SMALL),
        (lambda: open_classifier("resnet18", str(pointer)), "--classifier_path"),
    ):
        with pytest.raises(
            UserError, match=rf"^{flag} \S+ \(\d+ bytes\) is a Git LFS pointer, .* git lfs pull"
        ) as caught:
            load()
        assert len(str(caught.value).splitlines()) == 1


def test_other_files_that_are_git_lfs_pointers(tmp_path):
    pointer = tmp_path / "x.png"
    pointer.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2211383297\n")
    with pytest.raises(UnreadableImage, match=r"x.png' cannot be read: it is a Git LFS pointer, .* git lfs pull$"):
        read_image(str(pointer), 16)
    pointer.rename(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"^--base_samples \S+ is a Git LFS pointer, not the file itself: .* lfs pull$"):
        load_script("scripts/super_res_sample.py").SmallImages(str(tmp_path / "x.npz"), 16, False)


@pytest.fixture
def safetensors(models, tmp_path):
    """Files in the format, by network."""
    package = pytest.importorskip("safetensors.torch", reason="the extra safetensors is not installed")
    paths = {network: tmp_path / f"{i}.safetensors" for i, network in enumerate(SMALL)}
    for network, path in paths.items():
        package.save_file(models[network].state_dict(), path, metadata={"format": "pt"})
    return paths


def test_safetensors(safetensors, models, tmp_path):
    from safetensors.torch import save_file

    for network, path in safetensors.items():
        assert_same(LOADERS[network](str(path), flags_of(network)), models[network])
        named_otherwise = shutil.copy(path, tmp_path / "model.pt")
        assert_same(LOADERS[network](str(named_otherwise), flags_of(network)), models[network])
        save_file(nn.DataParallel(models[network]).state_dict(), path)
        assert_same(LOADERS[network](str(path), flags_of(network)), models[network])
        for size in (100, os.path.getsize(path) - 1):
            named_otherwise.write_bytes(path.read_bytes()[:size])
            with pytest.raises(UserError, match=r"is a truncated or corrupted safetensors file: ") as caught:
                LOADERS[network](str(named_otherwise), flags_of(network))
            assert len(str(caught.value).splitlines()) == 1
    model = make("resnet18")
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    assert_loaded("resnet18", tmp_path / "resnet.safetensors", model)


def test_safetensors_without_the_package(tmp_path):
    """The message names the extra. The file is written by hand, since the package may be missing here too."""
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    program = (
        "import sys; sys.modules['safetensors'] = None\n"
        "from guided_diffusion.command_line.stopping import run\n"
        "from guided_diffusion.classifier.networks import open_classifier\n"
        f"run(lambda: open_classifier('resnet18', {str(path)!r}))"
    )
    done = run_python("-c", program)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --classifier_path {path} (66 bytes) is a safetensors file, which requires the extra safetensors: "
        'pip install -e ".[safetensors]"\n'
    )
