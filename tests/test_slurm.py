"""The scripts on a real Slurm of two nodes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import as_flags, run_script
from PIL import Image
from slurm import NODES

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
