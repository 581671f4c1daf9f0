"""One kill per launcher of those that kill_many.py makes by the dozen."""

import random

import pytest
from kill_many import Training


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpiexec"])
def test_a_kill_loses_nothing(launcher, tmp_path, request):
    slurm = request.getfixturevalue("slurm") if launcher == "srun" else None
    training = Training(launcher, tmp_path, random.Random(0), slurm)  # a seed that kills during training
    training.kill()
    assert training.counts["in the loop"] == 1 and training.newest()
    training.finish()
