"""The scripts on a real Slurm of two nodes, see slurm.py."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from guided_diffusion.system.other_scripts import REPOSITORY, find_mpiexec

import numpy as np
import pytest
from conftest import TESTS, as_flags, run_script, save_checkpoint
from PIL import Image
from slurm import ADDRESSES, HOSTS, NODES, TIMEOUT, Slurm, until

# A tiny network, and a run of the main script with it that takes seconds.
NETWORK = {
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "num_heads": 1,
}
TINY = {
    **NETWORK,
    "model_path": "untrained",
    "num_threads": 1,
    "num_workers": 0,
    "timestep_respacing": 40,
    "step_reverse": 39,
    "batch_size": 1,
    "image_format": "png",
}
MAIN_SCRIPT = str(REPOSITORY / "forward_backward_dataset_sample.py")
WORKER = str(TESTS / "dist_worker.py")
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


@pytest.fixture(scope="module")
def samples_of_one_process(tmp_path_factory, pictures) -> dict[str, bytes]:
    """What a single process makes of the pictures."""
    folder = tmp_path_factory.mktemp("alone")
    alone = run_script(*as_flags({**TINY, "data_dir": pictures, "output": "out"}), cwd=folder)
    assert alone.returncode == 0, alone.stderr
    return samples(folder / "out")


def samples(folder: Path) -> dict[str, bytes]:
    """The images below a folder: name -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


class Step:
    """A step of Python processes on the cluster; what they print is in FOLDER/out."""

    def __init__(self, slurm: Slurm, folder: Path, *words: str, options: tuple[str, ...] = ("-N2",), **env: str):
        folder.mkdir(exist_ok=True)
        self.output = folder / "out"
        self.srun = slurm.srun(*options, sys.executable, *map(str, words), output=self.output, cwd=folder, env=env)

    def said(self) -> str:
        return self.output.read_text()

    def end(self, status: int = 0) -> str:
        """Wait for the end, with this status of srun: the greatest of its tasks'. Returns what was said."""
        try:
            assert self.srun.wait(120) == status, self.said()
        except subprocess.TimeoutExpired:
            pytest.fail(f"the step does not end:\n{self.said()}")
        return self.said()


def told(folder: Path, task: str) -> list:
    """What a task of dist_worker.py found, by rank."""
    return [json.loads(path.read_text())[task] for path in sorted(folder.glob("rank*.json"))]


@pytest.fixture
def packets_dropped(slurm):
    """Call it with a node and what it is not to receive, in the words of nft; until the end of the test."""
    changed = []

    def drop(node: str, packets: str) -> None:
        changed.append(node)
        rules = f"table inet test {{\n chain input {{\n type filter hook input priority 0;\n {packets} drop\n }}\n }}\n"
        slurm.on(node, "nft", "-f", "-", input=rules)

    yield drop
    for node in changed:
        slurm.on(node, "nft", "flush", "ruleset")


def test_the_nodes_are_two(slurm, tmp_path):
    step = slurm.srun("-N2", "sh", "-c", "hostname; ps -e", output=tmp_path / "out", cwd=tmp_path)
    assert step.wait(60) == 0
    said = (tmp_path / "out").read_text()
    assert all(node in said for node in NODES)
    assert "slurmctld" not in said  # a node sees its own processes only


# How ranks meet


def test_four_tasks_on_two_nodes_write_what_one_process_writes(slurm, tmp_path, pictures, samples_of_one_process):
    flags = as_flags({**TINY, "data_dir": pictures, "output": "results"})
    said = Step(slurm, tmp_path, MAIN_SCRIPT, *flags, options=TWO_BY_TWO).end()
    assert "4 process(es)" in said
    assert "[W" not in said  # a warning of PyTorch's, such as of names that are not in DNS
    assert samples(tmp_path / "results") == samples_of_one_process
    assert len(samples_of_one_process) == 6


def test_rank_0_on_another_than_the_first_host(slurm, tmp_path):
    (tmp_path / "hosts").write_text("gpu-b\ngpu-a\n")
    arbitrary = ("-N2", "-n2", "--distribution=arbitrary")
    Step(slurm, tmp_path, WORKER, "tell,where", tmp_path, options=arbitrary, SLURM_HOSTFILE=f"{tmp_path}/hosts").end()
    assert told(tmp_path, "where") == [["gpu-b", "gpu-a"]] * 2


def test_heterogeneous_step(slurm, tmp_path):
    """Its components have different ports of srun."""
    worker = (sys.executable, WORKER, "where", str(tmp_path))
    Step(slurm, tmp_path, *worker[1:], ":", "-n1", *worker, options=("-n1", "--nodelist=gpu-b")).end()
    assert told(tmp_path, "where") == [["gpu-b", "gpu-a"]] * 2


LAUNCHERS = {
    "srun": f"srun {sys.executable}",
    "mpiexec": f"{find_mpiexec()} -n 2 --map-by node {sys.executable}",
    "torchrun": f"srun {sys.executable} -m torch.distributed.run --nnodes 2 --rdzv_backend c10d "
    "--rdzv_endpoint $(scontrol show hostnames $SLURM_JOB_NODELIST | head -1):29400",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nodes_whose_own_names_are_loopback_addresses(slurm, tmp_path, launcher):
    """As Debian's installer leaves them: others cannot use the address that a node finds for itself."""
    if launcher == "mpiexec" and find_mpiexec() is None:
        pytest.skip("there is no mpiexec")
    try:
        for node in NODES:
            slurm.set_hosts(node, HOSTS.replace(ADDRESSES[node], "127.0.1.1"))
        job = slurm.sbatch(f"{LAUNCHERS[launcher]} {WORKER} tell,where {tmp_path}", "-N2", "-n2", cwd=tmp_path)
        assert slurm.wait_for(job)["JobState"] == "COMPLETED", (tmp_path / f"slurm-{job}.out").read_text()
    finally:
        for node in NODES:
            slurm.set_hosts(node)
    assert told(tmp_path, "where") == [list(NODES)] * 2
    assert [result["params"] for result in told(tmp_path, "tell")] == [[1.0, 0.0, 0, 0.5, 2.0]] * 2


def test_two_jobs_that_choose_the_same_port(slurm, tmp_path):
    """Step 31 of a job, and step 0 of the next, while the first waits for one of its ranks."""
    late = 'if [ "$SLURM_PROCID" = 1 ]; then until [ -e "$0/go" ]; do sleep 0.1; done; fi; exec "$@"'
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    steps = "for i in $(seq 31); do srun -n1 -N1 true; done\n"
    steps += f"srun -N2 sh -c '{late}' {first} {sys.executable} {WORKER} run_of {first}\n"
    job = slurm.sbatch(steps, "-N2", cwd=first)
    until(lambda: slurm.processes("gpu-a", WORKER), "rank 0 of the first job")
    until(lambda: listening(slurm, "gpu-a"), "rank 0 of the first job to listen")
    Step(slurm, second, WORKER, "run_of", second).end()
    (first / "go").touch()
    assert slurm.wait_for(job)["JobState"] == "COMPLETED"
    assert told(first, "run_of") == [[f"job {job} step 31"] * 2] * 2
    assert told(second, "run_of") == [[f"job {int(job) + 1} step 0"] * 2] * 2


def listening(slurm: Slurm, node: str) -> bool:
    """Whether a process on the node listens on a port that a job may choose."""
    lines = slurm.on(node, "cat", "/proc/net/tcp", "/proc/net/tcp6").stdout.splitlines()
    ports = {int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.split()[3:4] == ["0A"]}
    return any(15000 <= port < 30000 for port in ports)


def test_dropped_packets_end_with_a_line_of_each_rank(slurm, tmp_path, packets_dropped):
    packets_dropped("gpu-b", f"ip saddr {ADDRESSES['gpu-a']}")
    said = Step(slurm, tmp_path, WORKER, "tell", tmp_path, GUIDED_DIFFUSION_MEETING_TIMEOUT="4").end(2)
    assert "rank(s) 1 of 2 did not arrive within 4 s (srun; rank 0 is on gpu-a)" in said
    assert "rank 1 of 2 on gpu-b (srun) did not find rank 0 within 4 s" in said
    assert "gpu-a: timed out" in said
    assert "Traceback" not in said


def test_a_signal_ends_ranks_between_which_packets_are_dropped(slurm, tmp_path, packets_dropped):
    packets_dropped("gpu-b", f"ip saddr {ADDRESSES['gpu-a']}")
    step = Step(slurm, tmp_path, WORKER, "tell", tmp_path)
    until(lambda: listening(slurm, "gpu-a"), "rank 0 to listen")
    until(lambda: "SYN" in slurm.on("gpu-b", "ss", "-tn").stdout, "rank 1 to look for rank 0")
    for node in NODES:
        slurm.kill(node, WORKER, signal.SIGUSR1)
    step.end(128 + signal.SIGUSR1)


def test_gpus_that_slurm_allots_and_pytorch_cannot_use(slurm, tmp_path):
    step = Step(
        slurm, tmp_path, MAIN_SCRIPT, *as_flags({**TINY, "data_dir": "x"}), options=("-N2", "--gpus-per-node=2")
    )
    said = step.end(2)
    assert said.count("has a GPU (SLURM_GPUS_ON_NODE=2), but PyTorch") == 1


# Ranks that are gone


def test_a_rank_that_is_killed_ends_the_others_and_the_run_is_resumed(
    slurm, tmp_path, pictures, samples_of_one_process
):
    command = (MAIN_SCRIPT, *as_flags({**TINY, "data_dir": pictures, "output": "results"}))
    step = Step(slurm, tmp_path, *command, options=TWO_BY_TWO, GUIDED_DIFFUSION_PEER_TIMEOUT="3")
    until(lambda: "samples to make" in step.said(), "the run to begin")
    slurm.kill("gpu-b", MAIN_SCRIPT)  # ranks 2 and 3
    said = step.end(137)
    # Ranks 2 and 3 died together: either may miss its heartbeat first.
    assert re.search("error: rank [23] on gpu-b died or cannot be reached; see its output", said)
    assert said.count("error: rank") == 1
    assert "Traceback" not in said
    assert said.count("Exited with exit code 3") >= 1
    Step(slurm, tmp_path, *command).end()  # two ranks: the results do not depend on their number
    assert samples(tmp_path / "results") == samples_of_one_process


def test_a_network_that_fails_ends_the_ranks_on_both_sides(slurm, tmp_path, packets_dropped):
    step = Step(slurm, tmp_path, WORKER, "until_told", tmp_path, GUIDED_DIFFUSION_PEER_TIMEOUT="2")
    until(lambda: len(list(tmp_path.glob("working*"))) == 2, "the ranks to work")
    packets_dropped("gpu-b", f"ip saddr {ADDRESSES['gpu-a']}")
    said = step.end(3)
    assert "error: rank 1 on gpu-b stopped" in said  # rank 0 may learn that rank 1 gave up: one direction still works
    assert "error: rank 0 on gpu-a died or cannot be reached" in said
    assert "Traceback" not in said


# Training, which has processes that read images, too

TRAINING_SCRIPT = str(REPOSITORY / "scripts" / "image_train.py")
TRAINING = {
    **NETWORK,
    "num_threads": 1,
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
    done = run_script(*flags, script=TRAINING_SCRIPT, kind="mpiexec", processes=2)
    assert done.returncode == 0, done.stderr
    for name in (f"model{saved + 2:06d}.pt", "progress.csv"):
        assert (output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


# The job files of scripts/README.md


@pytest.fixture
def repository(tmp_path, pictures) -> Path:
    """A folder with what the job files expect of a clone of this repository."""
    for name in ("scripts", "forward_backward_dataset_sample.py", "guided_diffusion"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for name in ("datasets/flowers", "datasets/ILSVRC2012/validation"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(pictures)
    activate = tmp_path / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    (tmp_path / "models").mkdir()
    save_checkpoint(tmp_path / "models/256x256_diffusion_uncond.pt", {**NETWORK, "class_cond": False})
    return tmp_path


def job_file(section: str, flags: dict) -> str:
    """The job file of a section, for a tiny network, with one task per node, since this machine has few cores."""
    text = (REPOSITORY / "scripts/README.md").read_text().partition(f"\n{section}\n")[2]
    lines = text.partition("```bash\n#!/bin/bash\n")[2].partition("```")[0].splitlines()
    flags = shlex.join(as_flags({**NETWORK, "num_threads": 1, "device": "cpu", **flags}))
    changes = {"MODEL_FLAGS=": f"MODEL_FLAGS=({flags})", "#SBATCH --ntasks-per-node": "#SBATCH --ntasks-per-node=1"}
    for start, line in changes.items():
        lines = [line if old.startswith(start) else old for old in lines]
    return "\n".join(lines) + "\n"


def test_job_file_of_a_single_run(slurm, repository):
    job = slurm.sbatch(job_file("## Slurm", {"image_format": "png"}), cwd=repository)
    ended = slurm.wait_for(job)
    said = (repository / f"slurm-{job}.out").read_text()
    assert ended["JobState"] == "COMPLETED", said
    assert "2 process(es)" in said
    assert len(samples(repository / "results")) == 6


def test_job_file_that_is_resumed_after_its_time_limit(slurm, repository):
    output = repository / "results/flowers"

    def steps() -> int:
        """Number of steps of the newest line of the log; 0 before the first."""
        log = output / "progress.json"
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    flags = {"log_interval": 1, "sample_grid": 0, "num_workers": 0, "batch_size": 2}
    job = slurm.sbatch(job_file("### Before the time limit", flags), cwd=repository)
    until(steps, "a step of training")
    slurm.let_time_run_out(job, 200)
    slurm.wait_for(job, "PENDING")
    before = steps()
    assert (output / f"model{before:06d}.pt").exists()
    slurm.restart_requeued(job)
    until(lambda: steps() > before, "training to be resumed")
    assert slurm.job(job)["Restarts"] == "1"
    slurm.command(f"scancel {job}")
    assert slurm.wait_for(job)["JobState"] == "CANCELLED"  # and not in the queue again
    assert len((output / "progress.json").read_text().splitlines()) == steps() > before  # each step once
    assert (output / f"model{steps():06d}.pt").exists()


def test_job_file_of_an_array(slurm, repository):
    """Three jobs share the images; one of them is stopped and requeued, and does not disturb the others."""
    flags = {"batch_size": 1, "image_format": "png", "timestep_respacing": 50, "num_workers": 0}
    script = job_file("### Arrays", flags)
    for eight, three in (("--array=0-7", "--array=0-2"), ("--num_shards 8", "--num_shards 3"), ("75 125", "40")):
        assert eight in script
        script = script.replace(eight, three)
    array = slurm.sbatch(script, cwd=repository)
    jobs = [f"{array}_{number}" for number in range(3)]
    until(lambda: "shard 2 of 3" in output_of(repository, jobs[2]), "the last job to begin")
    slurm.command(f"scancel --signal=USR1 {jobs[2]}")
    slurm.restart_requeued(jobs[2])
    for job in jobs:
        assert slurm.wait_for(job)["JobState"] == "COMPLETED", output_of(repository, job)
    assert [slurm.job(job)["Restarts"] for job in jobs] == ["0", "0", "1"]

    results = repository / "results/diffused_ILSVRC2012_validation"
    records = [json.loads(path.read_text()) for path in results.glob("t_*_run.json")]
    assert len(records) == 3 and all(record["finished"] for record in records)
    alone = as_flags({**NETWORK, "num_threads": 1, **flags, "step_reverse": "25 50 40"})
    model = "models/256x256_diffusion_uncond.pt"
    images = "datasets/ILSVRC2012/validation"
    told = run_script(*alone, "--data_dir", images, "--model_path", model, "--output", "alone", cwd=repository)
    assert told.returncode == 0, told.stderr
    assert samples(results) == samples(repository / "alone")


def output_of(folder: Path, job: str) -> str:
    """What a job of an array has printed so far."""
    path = folder / f"slurm-{job}.out"
    return path.read_text() if path.exists() else ""
