"""Insufficient memory gives a clear message wherever it occurs; tensors that are too large cause a warning."""

from __future__ import annotations

from guided_diffusion.checkpoints import load_model, load_noisy_classifier, load_upsampler
from guided_diffusion.compute import memory
from guided_diffusion.compute.memory import explain_out_of_memory, largest_tensor, to_device
from guided_diffusion.errors import UserError, is_out_of_memory
from guided_diffusion.script_util import (
    classifier_defaults,
    model_defaults,
    model_from_flags,
    sr_model_and_diffusion_defaults,
)

import numpy as np
import pytest
import torch
from conftest import MAIN_SCRIPT, SMALL_MODEL, as_flags, load_script, run_python, run_script
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

GPU_ERRORS = [
    torch.OutOfMemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nCUDA kernel errors might be"),
]


@pytest.mark.parametrize("error", GPU_ERRORS, ids=str)
def test_what_libraries_say_of_a_gpu_s_memory_is_recognised(error, monkeypatch):
    assert is_out_of_memory(error)
    message = r"^the GPU's memory is too small for a batch of 7 images: lower --batch_size, or free"
    with pytest.raises(UserError, match=message), explain_out_of_memory(7):
        raise error
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * 2**30)
    message = r"\(80.0 GiB: 1.0 GiB free, 9.0 GiB used by this process\) is too small for a batch"
    with pytest.raises(UserError, match=message), explain_out_of_memory(7):
        raise error


@pytest.mark.parametrize("allocate", [lambda: torch.empty(10**14), lambda: np.empty(10**15)], ids=["torch", "numpy"])
def test_this_machine_s_memory(allocate):
    message = r"^this machine's memory is too small for a batch of 7 images: lower --sample_grid$"
    with pytest.raises(UserError, match=message), explain_out_of_memory(7, flag="--sample_grid"):
        allocate()


def test_other_errors_stay_what_they_are():
    for error in (
        RuntimeError("CUDA error: device-side assert"),
        OSError("out of memory"),
        ValueError("out of memory"),
    ):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)), explain_out_of_memory(7):
            raise error


def test_a_network_that_does_not_fit(monkeypatch):
    model = nn.Linear(2**20, 3, bias=False)

    def full(device):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(model, "to", full)
    with pytest.raises(UserError) as caught:
        to_device(model)
    assert str(caught.value).splitlines() == [
        "the GPU's memory is too small for the network (0.01 GiB).",
        "Free the GPU if other processes use it, or use another one",
    ]


def test_a_script_ends_in_plain_words_wherever_it_was(tmp_path):
    """An error from outside of what scripts guard, in a process."""
    failing = "from guided_diffusion.command_line.stopping import run\ndef main():\n    {}\nrun(main)"
    for line, begins in (
        ("raise RuntimeError('CUDA error: out of memory')", "error: the GPU's memory is too small: CUDA error: ou"),
        ("raise MemoryError", "error: this machine's memory is too small: MemoryError."),
    ):
        done = run_python("-c", failing.format(line))
        assert done.returncode == 2
        lines = done.stderr.splitlines()
        assert len(lines) == 2 and lines[0].startswith(begins) and "--batch_size" in lines[1]
    flags = ["--data_dir", tmp_path, "--num_channels", 32 * 10**5, "--image_size", 32, "--channel_mult", "1,1"]
    (tmp_path / "a").mkdir()
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a/1.png")
    done = run_script(*flags, "--output", tmp_path / "out", script="scripts/image_train.py")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: this machine's memory is too small for the network"


# Tensors that are too large


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]
        # Weights, and what becomes of them alone, do not grow with the batch.
        if any(isinstance(x, Tensor) and not isinstance(x, nn.Parameter) for x in args):
            self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("network", ["unet", "half", "conditional", "upsampler", "classifier"])
def test_the_largest_tensor_is_that_of_a_real_forward_pass(network):
    flags = {**SMALL_MODEL, "attention_resolutions": "", "use_checkpoint": True}
    conditions = {}
    if network == "upsampler":
        model = load_upsampler(
            "untrained", {**sr_model_and_diffusion_defaults(), **flags, "large_size": 64, "small_size": 16}
        )
        conditions["low_res"] = torch.zeros(1, 3, 16, 16)
    elif network == "classifier":
        of_it = {"image_size": 64, "classifier_width": 64, "classifier_depth": 1, "classifier_resblock_updown": False}
        model = load_noisy_classifier("untrained", {**classifier_defaults(), **of_it})
    else:
        model = load_model(
            "untrained",
            {**model_defaults(), **flags, "class_cond": network == "conditional", "use_fp16": network == "half"},
        )
        conditions |= {"y": torch.zeros(1, dtype=torch.long)} if network == "conditional" else {}
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with torch.no_grad(), Largest() as real:
        model(torch.zeros(1, 3, model.image_size, model.image_size), torch.zeros(1, dtype=torch.long), **conditions)
    assert largest_tensor(model) == real.elements
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_64_images_of_256_pixels_are_one_too_many(capsys):
    flags = {**model_defaults(), "image_size": 256, "num_channels": 256, "attention_resolutions": "32,16,8"}
    with torch.device("meta"):
        model = model_from_flags({**flags, "num_head_channels": 64, "resblock_updown": True, "learn_sigma": True})
    model.to_empty(device="cpu")  # takes no memory as long as nothing is written
    assert largest_tensor(model) == 512 * 256 * 256
    memory.warn_of_large_tensors(model, 63, "--batch_size")
    assert capsys.readouterr().err == ""
    memory.warn_of_large_tensors(model, 64, "--batch_size")
    assert capsys.readouterr().err == (
        "warning: --batch_size 64: a tensor of the network has 2,147,483,648 elements, more than the 2,147,483,647 "
        "that some GPU kernels can address. Use --batch_size 63 or less\n"
    )


def test_every_script_warns(photographs, small_checkpoint, tmp_path, capsys, monkeypatch):
    """With a bound as low as these networks; the batch that counts is the one that there really is."""
    model = [*as_flags(SMALL_MODEL), "--timestep_respacing", "2", "--num_threads", 1]
    trained, data = ["--model_path", small_checkpoint], ["--data_dir", photographs]
    training = ["--batch_size", 4, "--iterations", 1, "--sample_grid", 0, "--num_workers", 0, *data]
    classifier = ["--classifier_path", "untrained", "--classifier_channel_mult", "1", "--classifier_depth", 1]
    per_image = largest_tensor(load_model(str(small_checkpoint), {**model_defaults(), **SMALL_MODEL}))
    monkeypatch.setattr(memory, "LARGEST", 2 * per_image)
    for script, flags, warned in (
        (MAIN_SCRIPT, [*model, *trained, *data, "--step_reverse", 1, "--batch_size", 9], "--batch_size 7"),
        ("scripts/image_nll.py", [*model, *trained, *data, "--batch_size", 9], "--batch_size 7"),
        ("scripts/image_sample.py", [*model, *trained, "--num_samples", 3], "--batch_size 3"),
        ("scripts/image_sample.py", [*model, *trained, "--num_samples", 2, "--output", tmp_path / "two"], ""),
        ("scripts/classifier_sample.py", [*model, *trained, *classifier, "--num_samples", 3], "--batch_size 3"),
        ("scripts/image_train.py", [*model, *training], "--batch_size 4"),
        (
            "scripts/image_train.py",
            [*model, *training, "--microbatch", 3, "--output", tmp_path / "3"],
            "--microbatch 3",
        ),
        ("scripts/image_train.py", [*model, *training, "--microbatch", 2, "--output", tmp_path / "2"], ""),
    ):
        if "--output" not in flags:
            flags += ["--output", tmp_path / script.replace("/", "_")]
        capsys.readouterr()
        load_script(script).main([str(flag) for flag in flags])
        told = [line for line in capsys.readouterr().err.splitlines() if "a tensor of the network" in line]
        assert bool(told) == bool(warned), (script, told)
        if told:
            assert told[0].startswith(f"warning: {warned}: ") and told[0].endswith(f"Use {warned.split()[0]} 2 or less")
