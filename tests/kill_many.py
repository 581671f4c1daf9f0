"""Kill a training many times at random moments, resume it each time, and check that nothing was lost.

  python tests/kill_many.py --kills 50

Each kill is two signals in quick succession, while worker processes read images. Launchers take turns:

  python     one process: SIGTERM
  srun       two tasks on two nodes of a Slurm of our own (see slurm.py): scancel; SIGUSR1 to srun, which passes it on;
             or SIGTERM to every process of the job, as at a time limit
  torchrun   two processes: SIGTERM to torchrun
  mpiexec    two processes: SIGUSR1 to mpiexec, which passes it on
  rough      SIGTERM to mpiexec, which kills its processes half a second later: the checkpoint before must be whole

After each kill: no process is left; the run has said what it saved, and that is there; each checkpoint is complete and
loads; no file of an earlier checkpoint has changed. In the end the run has the checkpoints and the log of one that
nobody disturbed: the same bytes for one process, equal numbers for several.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from guided_diffusion.system.other_scripts import REPOSITORY, as_flags, environment

import numpy as np
import torch
from conftest import launcher
from fork_server import rank_command
from PIL import Image
from slurm import Slurm, missing, until

LAUNCHERS = ("python", "srun", "torchrun", "mpiexec", "rough")
SCRIPT = str(REPOSITORY / "scripts" / "image_train.py")
TOKEN = "KILL_MANY"  # a variable by which the processes of a run are found
FLAGS = {
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": 8,
    "num_heads": 1,
    "num_threads": 1,
    "num_workers": 2,
    "sample_grid": 0,
    "lr": 1e-3,
    "ema_rate": "0.9,0.99",
    "log_interval": 1,
    "save_interval": 5,
    "batch_size": 2,
}
PATIENCE = 180  # seconds in which anything that is waited for must happen
PAUSES = (0.0, 0.004, 0.05, 0.1)  # seconds between the two signals


def check(condition: object, words: str) -> None:
    """Raise AssertionError, also under python -O."""
    if not condition:
        raise AssertionError(words)


def write_images(folder: Path) -> Path:
    """Twelve small pictures of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@dataclass
class Training:
    """One run, which is killed and resumed, under one launcher.

    Attributes:
        launcher: one of `LAUNCHERS`.
        folder: of everything that is written.
        rng: chooses moments and ways.
        slurm: the cluster, for srun.
        counts: what became of the kills.
    """

    launcher: str
    folder: Path
    rng: random.Random
    slurm: Slurm | None = None
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = write_images(self.folder / "images")
        self.output = self.folder / "killed"
        self.token = secrets.token_hex(8)
        self.digests: dict[str, str] = {}  # of every file of a checkpoint that was ever seen
        self.starts = 0

    # Starting and ending

    def start(self, output: Path, iterations: int = 0, forked: bool = False) -> tuple[subprocess.Popen, Path]:
        """Start or resume a run. Returns the launcher's process, and the file with what it says.

        If `forked`, mpiexec or torchrun start its processes, which are forked, see fork_server.py.
        """
        self.starts += 1
        said = self.folder / f"said-{self.starts:03d}.txt"
        flags = as_flags({**FLAGS, "data_dir": self.data, "output": output, "iterations": iterations})
        variables = {TOKEN: self.token, "OMP_NUM_THREADS": "1"}
        if self.launcher == "srun" and not forked:
            # As a job of its own, for scancel; the name is that of the token.
            options = ["-N2", "-n2", f"--job-name={self.token}"]
            command = [*options, sys.executable, SCRIPT, *flags]
            return self.slurm.srun(*command, output=said, cwd=self.folder, env=variables), said
        kind = "mpiexec" if self.launcher in ("rough", "srun") else self.launcher
        env = environment(**variables)
        rank = rank_command(environment()) if forked else ()  # the token must not reach the server
        command = [*launcher(kind, 2, rank), SCRIPT, *flags]
        with open(said, "w") as file:
            streams = {"stdout": file, "stderr": file}
            process = subprocess.Popen(command, env=env, cwd=self.folder, start_new_session=True, **streams)
        return process, said

    def processes(self) -> list[int]:
        """All processes of the run, those of the launcher and those that read images among them."""
        wanted = f"{TOKEN}={self.token}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or is another user's
        return found

    def send(self, process: subprocess.Popen) -> str:
        """Send the two signals. Returns in which way."""
        signum = signal.SIGUSR1 if self.launcher == "mpiexec" else signal.SIGTERM

        def way() -> None:
            process.send_signal(signum)

        name = f"{signum.name} to the launcher"
        if self.launcher == "srun":  # a SIGTERM would have srun kill the tasks at once
            name = self.rng.choice(["SIGUSR1 to srun", "scancel", "SIGTERM to every process"])
            ways = {
                "SIGUSR1 to srun": lambda: process.send_signal(signal.SIGUSR1),
                "scancel": lambda: self.slurm.on("head", "scancel", f"--name={self.token}", check=False),
                "SIGTERM to every process": self._signal_tasks,
            }
            way = ways[name]
        way()
        time.sleep(self.rng.choice(PAUSES))
        way()
        return name

    def _signal_tasks(self) -> None:
        for pid in self.processes():
            try:
                if b"srun" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                    os.kill(pid, signal.SIGTERM)
            except OSError:
                continue  # it has ended

    # A kill

    def kill(self) -> None:
        """Start or resume the run, kill it at a random moment, and check what is there."""
        before = self.newest()
        process, said = self.start(self.output)
        began = time.monotonic()
        early = self.rng.random() < 0.25
        if early:  # perhaps before the first step
            time.sleep(self.rng.uniform(0, 4))
        else:
            lines = self.lines()
            until(lambda: self.lines() != lines or process.poll() is not None, "a step", PATIENCE)
            time.sleep(self.rng.uniform(0, 1.5))
        check(process.poll() is None, f"it ended by itself: {said.read_text()}")
        moment = time.monotonic() - began
        way = self.send(process)
        process.wait(PATIENCE)
        until(lambda: not self.processes(), f"the end of {self.processes()}", 30)
        self.check_files(before, said.read_text(), process.returncode)
        after = self.newest()
        self.counts["early" if early else "in the loop"] += 1
        self.counts["saved" if after != before else "nothing new to save"] += 1
        times = f"after {moment:.1f} s, status {process.returncode}"
        print(f"{self.launcher}: {way} {times}, {before} -> {after}", flush=True)

    def check_files(self, before: int | None, said: str, status: int) -> None:
        """Check the folder and what was said after a kill that found the checkpoint `before`."""
        check(status != 0, f"a run that was killed ended with status 0: {said}")
        check("Traceback (most recent call last)" not in without_torchrun(said), said)
        newest = self.newest()
        if self.launcher != "rough":  # which leaves no time to say anything
            claims = re.findall(r"stopped by SIG\w+: (.*)", said)
            saved = [re.match(r"step (\d+) is saved in (.*?)\. Rerun", claim) for claim in claims]
            steps = {int(match[1]) for match in saved if match}
            if steps:
                check(steps == {newest}, f"said {steps}, newest is {newest}")
            elif newest != before:
                raise AssertionError(f"step {newest} is saved, and nobody says so: {said}")
        check(newest == before or before is None or newest > before, f"{before} -> {newest}")
        for path in self.output.glob("model*.pt"):
            step = path.stem.removeprefix("model")
            names = [f"opt{step}.pt", *(f"ema_{rate}_{step}.pt" for rate in FLAGS["ema_rate"].split(","))]
            check(all((self.output / name).exists() for name in names), f"{path.name} without one of {names}")
        digests = {}
        for path in sorted(self.output.glob("*.pt")):
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            if path.name not in self.digests:
                torch.load(path, weights_only=True)
        changed = [name for name, digest in self.digests.items() if digests.get(name) != digest]
        check(not changed, f"changed or gone: {changed}")
        self.digests = digests

    def newest(self) -> int | None:
        """The newest step of which there is a model."""
        return max((int(path.stem.removeprefix("model")) for path in self.output.glob("model*.pt")), default=None)

    def lines(self) -> int:
        """The last step in the log."""
        try:
            return len((self.output / "progress.json").read_text().splitlines())
        except OSError:
            return 0

    # The end

    def finish(self) -> None:
        """Let the run reach its end, and compare it with one that nobody disturbed."""
        last = (self.newest() or 0) + 3
        undisturbed = self.folder / "undisturbed"
        for output in (self.output, undisturbed):
            process, said = self.start(output, last, forked=output == undisturbed)
            check(process.wait(PATIENCE) == 0, said.read_text())
        until(lambda: not self.processes(), "the end", 30)
        for name, digest in self.digests.items():
            check(hashlib.sha256((self.output / name).read_bytes()).hexdigest() == digest, f"{name} has changed")
        compared = 0
        for path in sorted(undisturbed.glob("[em]*.pt")):
            same = path.read_bytes() == (self.output / path.name).read_bytes()
            if not same and self.launcher != "python":
                ours, theirs = (torch.load(folder / path.name) for folder in (self.output, undisturbed))
                same = all(torch.equal(ours[name], theirs[name]) for name in theirs)
            check(same, f"{path.name} is another one than that of the run which nobody disturbed")
            compared += 1
        logs = [list(csv.reader((folder / "progress.csv").open())) for folder in (self.output, undisturbed)]
        check(logs[0] == logs[1], "progress.csv is another one")
        leftovers = [p.name for p in self.output.iterdir() if p.name.endswith(".part") or p.name == "training.lock"]
        check(not leftovers, f"left: {leftovers}")
        told = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        print(f"{self.launcher}: {told}; {compared} files as without a kill, {last} steps", flush=True)


def without_torchrun(said: str) -> str:
    """What was said, without torchrun's own traceback of the signal that it was sent."""
    return re.sub(r"(?ms)^Traceback \(most recent call last\):\n(?:(?!^Traceback).)*?SignalException:.*?$", "", said)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills, of all launchers (default: 50)")
    parser.add_argument("--launcher", nargs="+", choices=LAUNCHERS, default=LAUNCHERS, help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--folder", help="where to work; kept (default: a temporary folder, kept if a check fails)")
    return parser


def main() -> None:
    """Kill trainings as the flags say."""
    args = create_argparser().parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="kill-many-")).absolute()
    launchers = list(args.launcher)
    slurm = None
    if "srun" in launchers:
        if reason := missing():
            print(f"srun is left out: {reason}")
            launchers.remove("srun")
        else:
            slurm = Slurm()
            slurm.start()
    try:
        trainings = [Training(name, folder / name, random.Random(f"{args.seed} {name}"), slurm) for name in launchers]
        for i in range(args.kills):
            trainings[i % len(trainings)].kill()
        for training in trainings:
            training.finish()
    finally:
        if slurm:
            slurm.stop()
    print(f"{args.kills} kills, nothing lost; the files are in {folder}")


if __name__ == "__main__":
    main()
