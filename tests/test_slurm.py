"""The scripts on a real Slurm of two nodes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import as_flags, run_script
from PIL import Image
from slurm import NODES, TIMEOUT, until

from guided_diffusion.other_scripts import REPOSITORY

# A run of the main script that takes seconds: a tiny network with random weights.
TINY = {
    "model_path": "untrained",
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": 8,
    "num_heads": 1,
    "num_threads": 1,
    "num_workers": 0,
    "timestep_respacing": 10,
    "step_reverse": 5,
    "batch_size": 1,
    "image_format": "png",
}
MAIN_SCRIPT = str(REPOSITORY / "forward_backward_dataset_sample.py")
TWO_BY_TWO = ("-N2", "--ntasks-per-node=2")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of six small images of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for name in ("cat/1", "cat/2", "cat/3", "dog/1", "dog/2", "dog/3"):
        path = folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


def samples(folder: Path) -> dict[str, bytes]:
    """The images below a folder: name -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_the_nodes_are_two(slurm, tmp_path):
    step = slurm.srun("-N2", "sh", "-c", "hostname; ps -e", output=tmp_path / "out", cwd=tmp_path)
    assert step.wait(60) == 0
    said = (tmp_path / "out").read_text()
    assert all(node in said for node in NODES)
    assert "slurmctld" not in said  # a node sees its own processes only


def test_four_tasks_on_two_nodes_write_what_one_process_writes(slurm, tmp_path, pictures):
    one = run_script(*as_flags({**TINY, "data_dir": pictures, "output": "one"}), cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    flags = as_flags({**TINY, "data_dir": pictures, "output": "four"})
    step = slurm.srun(*TWO_BY_TWO, sys.executable, MAIN_SCRIPT, *flags, output=tmp_path / "out", cwd=tmp_path)
    said = (tmp_path / "out").read_text()
    assert step.wait(120) == 0, said
    assert len(samples(tmp_path / "one")) == 6
    assert samples(tmp_path / "four") == samples(tmp_path / "one")


# Training, which has processes that read images, too

TRAINING_SCRIPT = str(REPOSITORY / "scripts" / "image_train.py")
OF_NETWORK = ("image_size", "num_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads")
TRAINING = {
    **{name: TINY[name] for name in (*OF_NETWORK, "num_threads")},
    **{"lr": 1e-3, "batch_size": 2, "num_workers": 2, "sample_grid": 0, "log_interval": 1, "save_interval": 1000},
}


def training_flags(pictures: Path, output: Path, **changes) -> list[str]:
    return as_flags({**TRAINING, "data_dir": pictures, "output": output, **changes})


def wait_for_a_step(output: Path, above: int = 0) -> None:
    until(lambda: (output / "progress.csv").exists() and steps_logged(output)[-1] > above, "a step of the training")


def steps_logged(output: Path) -> list[int]:
    lines = (output / "progress.csv").read_text().splitlines()[1:]
    return [int(line.split(",")[0]) for line in lines] or [0]


def saved_step(output: Path) -> int:
    """The step of the only checkpoint, which is complete."""
    (model,) = output.glob("model*.pt")
    step = int(model.stem.removeprefix("model"))
    assert (output / f"opt{step:06d}.pt").exists() and len(list(output.glob("ema*.pt"))) == 1
    return step


def assert_nothing_runs(slurm) -> None:
    """No process of a training is left on a node; those that read images are its children."""
    until(lambda: not any(slurm.processes(node, "image_train") for node in NODES), "the end of all processes")


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_scancel_saves_a_checkpoint_though_workers_read_images(slurm, tmp_path, pictures, launcher):
    """Slurm sends SIGTERM to every process of the step, as it does at a time limit."""
    output = tmp_path / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-N1", "-n1", *words] if launcher == "torchrun" else ["-N2", "-n2", sys.executable]
    flags = training_flags(pictures, output)
    step = slurm.srun("--job-name=train", *command, TRAINING_SCRIPT, *flags, output=tmp_path / "out", cwd=tmp_path)
    wait_for_a_step(output)
    slurm.command("scancel --name=train")
    step.wait(TIMEOUT)
    said = (tmp_path / "out").read_text()
    saved = saved_step(output)
    assert f"stopped by SIGTERM: step {saved} is saved in {output}/model{saved:06d}.pt" in said, said
    assert "DataLoader worker" not in said
    assert_nothing_runs(slurm)


def test_the_time_limit_saves_a_checkpoint(slurm, tmp_path, pictures):
    output = tmp_path / "run"
    flags = shlex.join(training_flags(pictures, output))
    job = slurm.sbatch(f"srun {sys.executable} {TRAINING_SCRIPT} {flags}\n", "-N2", "-n2", "--time=10", cwd=tmp_path)
    wait_for_a_step(output)
    slurm.let_time_run_out(job)
    slurm.wait_for(job, "TIMEOUT")
    saved = saved_step(output)
    said = (tmp_path / f"slurm-{job}.out").read_text()
    assert f"stopped by SIGTERM: step {saved} is saved in" in said and "Traceback" not in said, said
    assert_nothing_runs(slurm)


def test_a_requeued_training_goes_on(slurm, tmp_path, pictures):
    """And it ends with what a training has that was never disturbed; two tasks each."""
    output, last = tmp_path / "run", tmp_path / "last"
    script = f"""
last=$(cat {last} 2>/dev/null || echo 0)
srun {sys.executable} {TRAINING_SCRIPT} {shlex.join(training_flags(pictures, output))} --iterations $last
"""
    job = slurm.sbatch(script, "-N2", "-n2", "--requeue", cwd=tmp_path)
    wait_for_a_step(output)
    slurm.command(f"scontrol requeue {job}")
    slurm.wait_for(job, "PENDING")
    saved = saved_step(output)
    last.write_text(str(saved + 2))
    slurm.restart_requeued(job)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", (tmp_path / f"slurm-{job}.out").read_text()
    assert "resuming from" in (tmp_path / f"slurm-{job}.out").read_text()
    assert {path.name for path in output.glob("progress*")} == {"progress.csv", "progress.json"}

    flags = training_flags(pictures, tmp_path / "undisturbed", iterations=saved + 2)
    command = ["-N2", "-n2", sys.executable, TRAINING_SCRIPT, *flags]
    assert slurm.srun(*command, output=tmp_path / "out", cwd=tmp_path).wait(TIMEOUT) == 0
    for name in (f"model{saved + 2:06d}.pt", "progress.csv"):
        assert (output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
