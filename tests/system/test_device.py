"""Where to compute: a GPU that PyTorch cannot use is never silently replaced by the CPU."""

from __future__ import annotations

import os

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError
from guided_diffusion.runs.settings import settings_of
from guided_diffusion.system import device
from guided_diffusion.system.device import check_device

import pytest
import torch
from conftest import as_flags, environment, load_script, start_script

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver."


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """PyTorch for CUDA on a machine whose driver is too old; no sign of a GPU yet."""

    def init():
        raise RuntimeError(TOO_OLD)

    for name in ("CUDA_VISIBLE_DEVICES", *device.SLURM_GPUS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "_gpu_files", list)
    monkeypatch.setattr(dist_util, "_device", "auto")


@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.setattr(device, "_gpu_files", lambda: ["/dev/nvidia0"])


def test_without_a_gpu_the_cpu_computes():
    check_device("auto")
    assert dist_util.use_device("auto").type == "cpu"


def test_a_gpu_that_pytorch_cannot_use_stops_the_run(with_gpu):
    with pytest.raises(UserError) as caught:
        check_device("auto")
    message = str(caught.value)
    assert "has a GPU (/dev/nvidia0)" in message
    assert TOO_OLD.rstrip(".") in message
    assert "https://download.pytorch.org/whl/" in message and "--device cpu" in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("name", device.SLURM_GPUS)
def test_gpus_that_slurm_has_allotted(monkeypatch, name):
    monkeypatch.setenv(name, "1" if name == "SLURM_GPUS_ON_NODE" else "0")  # GPU number 0 is a GPU
    with pytest.raises(UserError, match=rf"has a GPU \({name}=\d\)"):
        check_device("auto")


def test_a_job_without_gpus(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    monkeypatch.setenv("SLURM_JOB_GPUS", "")
    check_device("auto")


@pytest.mark.parametrize("hidden", ["", "-1", " ", "-1,0", "NoDevFiles"])
def test_a_gpu_that_is_hidden_on_purpose(monkeypatch, with_gpu, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    check_device("auto")


def test_the_cpu_when_it_is_asked_for(monkeypatch, with_gpu):
    assert dist_util.use_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert dist_util.dev().type == "cpu"  # also where there is a GPU
    assert dist_util.use_device("auto") == torch.device("cuda", 0)


def test_a_gpu_that_is_asked_for_and_not_there():
    with pytest.raises(UserError, match=r"--device cuda: PyTorch .* finds no GPU on ") as caught:
        check_device("cuda")
    assert TOO_OLD.rstrip(".") in str(caught.value)


def test_a_build_for_cpus_is_warned_of(monkeypatch, with_gpu):
    warnings = []
    monkeypatch.setattr(device.logger, "warn", warnings.append)
    monkeypatch.setattr(torch.version, "cuda", None)
    check_device("auto")
    (warning,) = warnings
    assert "has a GPU (/dev/nvidia0), but PyTorch" in warning and "a CPU build" in warning
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")  # somebody has asked for it
    with pytest.raises(UserError):
        check_device("auto")


def test_device_files(tmp_path, monkeypatch):
    monkeypatch.undo()
    files = [tmp_path / "nvidia0", tmp_path / "nvidia1"]
    for file in files:
        file.touch()
    monkeypatch.setattr(
        device.glob, "glob", lambda pattern: [str(file) for file in files] if "nvidia" in pattern else []
    )
    assert device._gpu_files() == [str(file) for file in files]
    open_file = os.open

    def refused(path, flags):
        if path == str(files[0]):
            raise PermissionError(device.errno.EPERM, "Operation not permitted")  # as by a job's device cgroup
        return open_file(path, flags)

    monkeypatch.setattr(device.os, "open", refused)
    assert device._gpu_files() == [str(files[1])]


# In every script

SCRIPTS = {
    "forward_backward_dataset_sample.py": {"data_dir": "x", "model_path": "x", "step_reverse": 1},
    "classifier_statistics.py": {"data_dir": "x"},
    "evaluate_classifier.py": {"starting_data_dir": "x", "time_series": 1},
    "scripts/image_nll.py": {"data_dir": "x", "model_path": "x"},
    "scripts/image_sample.py": {"model_path": "x"},
    "scripts/classifier_sample.py": {"model_path": "x", "classifier_path": "x"},
    "scripts/super_res_sample.py": {"model_path": "x", "base_samples": "x"},
    "scripts/image_train.py": {"data_dir": "x"},
    "scripts/classifier_train.py": {"data_dir": "x"},
    "scripts/super_res_train.py": {"data_dir": "x"},
    "scripts/demo_unet_train.py": {},
    "scripts/demo_classifier_train.py": {},
}


class Reached(Exception):
    """The script has come to its set-up."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flag_of_every_script_that_computes(monkeypatch, script):
    def setup_dist(choice):
        raise Reached(choice)

    monkeypatch.setattr(dist_util, "setup_dist", setup_dist)
    for choice in ("cpu", "cuda"):
        with pytest.raises(Reached, match=choice):
            load_script(script).main([*as_flags(SCRIPTS[script]), "--device", choice])


def test_the_demo_hands_the_flag_on(monkeypatch):
    demo = load_script("scripts/demo.py")
    monkeypatch.setattr(demo, "write_images", lambda *args: [])
    monkeypatch.setattr(demo, "run_script", lambda script, flags, launch: flags_of.update({script: flags}))
    flags_of: dict[str, list[str]] = {}
    args = demo.create_argparser().parse_args(["--device", "cpu"])
    demo.run_scripts(args, dict.fromkeys(("images", "samples", "classifier", "figures"), "x"), 1, [])
    for script, flags in flags_of.items():
        assert ("--device cpu" in " ".join(flags)) == (script != "scripts/plot_figures.py"), script
    assert len(flags_of) == 4


def test_the_flag_decides_nothing_of_a_result():
    args = load_script("scripts/image_sample.py").create_argparser().parse_args(["--device", "cpu"])
    assert "--device" not in settings_of(args, model_path="digest")


@pytest.mark.parametrize(
    ("script", "flags"), [("scripts/image_sample.py", {"model_path": "missing.pt"}), ("scripts/demo.py", {})]
)
def test_a_script_stops_before_it_reads_or_writes_anything(tmp_path, script, flags):
    flags = as_flags({**flags, "output": tmp_path / "out"})
    process = start_script(*flags, script=script, env=environment(SLURM_JOB_GPUS="0", CUDA_VISIBLE_DEVICES="99"))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "has a GPU (SLURM_JOB_GPUS=0), but PyTorch" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "out").exists()
