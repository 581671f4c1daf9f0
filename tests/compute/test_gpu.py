"""Whole scripts on a GPU, compiled: pytest -m gpu."""

import signal
import time

import pytest
import torch
from conftest import SMALL_MODEL, as_flags, run_script, save_checkpoint, start_script

pytestmark = pytest.mark.gpu

NETWORK = {
    **SMALL_MODEL,
    "image_size": 64,
    "num_channels": 64,  # wide enough for channels-last memory
    "attention_resolutions": "32",
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "use_fp16": True,
}
TRAINING = {**NETWORK, "batch_size": 4, "lr": 1e-4, "save_interval": 100, "log_interval": 2, "num_workers": 0}


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory):
    """The runs share compiled kernels, so that each network is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        patch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
        yield


@pytest.fixture(scope="module")
def sampling(tmp_path_factory, photographs):
    """Flags of forward_backward_dataset_sample.py: 7 images at two times, in batches of 2."""
    path = save_checkpoint(tmp_path_factory.mktemp("models") / "wide.pt", NETWORK)
    flags = NETWORK | {"model_path": path, "data_dir": photographs, "num_classes": 4, "num_per_class": 2}
    flags |= {"batch_size": 2, "timestep_respacing": 250, "compile": True}
    return [*as_flags(flags), "--step_reverse", "30", "240"]


def samples(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("t_*_images/*/*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sampling):
    folder = tmp_path_factory.mktemp("whole")
    run = run_script(*sampling, "--output", folder)
    assert run.returncode == 0, run.stderr
    assert "compiling the network" in run.stderr
    assert len(samples(folder)) == 14
    return samples(folder)


def test_a_compiled_run_that_is_stopped_and_resumed_gives_the_same_bytes(tmp_path, sampling, whole):
    process = start_script(*sampling, "--output", tmp_path)
    while process.poll() is None and not samples(tmp_path):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert 0 < len(samples(tmp_path)) < 14
    run = run_script(*sampling, "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    assert samples(tmp_path) == whole


def test_more_ranks_than_gpus_are_an_error(tmp_path, sampling):
    ranks = torch.cuda.device_count() + 1
    run = run_script(*sampling, "--output", tmp_path / "out", kind="torchrun", processes=ranks)
    assert run.returncode != 0
    assert f"{ranks} rank(s) on node" in run.stderr and f"but {ranks - 1} GPU(s) visible" in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mpiexec", "torchrun"])
def test_several_gpus_give_the_same_bytes(tmp_path, sampling, whole, kind):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    run = run_script(*sampling, "--output", tmp_path, kind=kind, processes=2)
    assert run.returncode == 0, run.stderr
    assert samples(tmp_path) == whole


@pytest.mark.parametrize("half_precision", ["float16", "bfloat16"])
def test_compiled_training_resumes_from_its_checkpoint(tmp_path, photographs, half_precision):
    flags = TRAINING | {"half_precision": half_precision, "data_dir": photographs, "output": tmp_path, "compile": True}
    for step in (4, 8):
        run = run_script(*as_flags(flags | {"iterations": step}), script="scripts/image_train.py")
        assert run.returncode == 0, run.stderr
        assert "compiling the network" in run.stderr
        weights = torch.load(tmp_path / f"model00000{step}.pt", weights_only=True)
        assert all(w.isfinite().all() and w.is_contiguous() for w in weights.values())
