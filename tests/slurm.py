"""A real Slurm on this machine: a head node and two compute nodes, gpu-a and gpu-b, each with its own name and address.

Each node is a set of Linux namespaces (network, host name, mounts; processes too on the compute nodes). The network
between them lives in the head's namespace. So nothing is visible outside, two clusters do not collide, and everything
disappears with the processes. Needs root and Debian's slurm-wlm, munge, iproute2 and nftables.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from guided_diffusion.system.other_scripts import environment

PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "ip", "nft", "unshare", "nsenter", "setpriv")
HEAD, NODES = "head", ("gpu-a", "gpu-b")
ADDRESSES = {HEAD: "10.77.0.1", "gpu-a": "10.77.0.11", "gpu-b": "10.77.0.12"}
HOSTS = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
CPUS = 8  # per compute node, whatever this machine has
GPUS = 4  # that Slurm may allot per compute node; there is nothing behind them
KILL_WAIT = 30  # seconds between SIGTERM and SIGKILL at a time limit and in scancel, as is usual
LAUNCHERS = ("SLURM", "SBATCH", "SRUN", "OMPI_COMM", "OMPI_MCA", "PMI")  # how their variables begin
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TIMEOUT = 120  # seconds in which anything that a test waits for must happen

# A node runs this until it is killed. It collects the processes whose parents are gone, as an init does.
NODE = """\
hostname "$1"
mount --bind "$2" /etc/hosts
ip link set lo up
exec "$3" -c '
import os, time
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.1)
'
"""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={head}({address})
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
KillWait={kill_wait}
OverTimeLimit=0
ReturnToService=2
JobRequeue=1
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=2-0 State=UP
"""

T = TypeVar("T")


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    return f"Slurm is not installed: no {', '.join(absent)}" if absent else ""


def until(condition: Callable[[], T], what: str, timeout: float = TIMEOUT) -> T:
    """Call `condition` until its value is true, and return that. Raises AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.1)
    return value


class Slurm:
    """The cluster, from `start()` to `stop()`.

    Attributes:
        folder: configuration, state and logs; removed by `stop`.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: it is part of a socket's name
        self._processes: list[subprocess.Popen] = []
        self._init: dict[str, int] = {}  # process id of each node's first process, by node

    # Start and end

    def start(self) -> None:
        """Start everything. Raises RuntimeError, with the logs, if it does not come up."""
        try:
            self._start_nodes()
            self._start_slurm()
            until(lambda: self._command("sinfo -h -t idle -o %D").stdout.split() == ["2"], "two idle nodes", 60)
        except BaseException as error:
            logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))
            self.stop()
            raise RuntimeError(f"Slurm did not start: {error}\n{logs}") from error

    def stop(self) -> None:
        """End every process of the cluster, jobs included, and remove its files."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_nodes(self) -> None:
        for node in (HEAD, *NODES):
            hosts = self.folder / f"hosts-{node}"
            hosts.write_text(HOSTS)
            namespaces = ["--net", "--uts", "--mount"]
            if node != HEAD:
                namespaces += ["--pid", "--fork", "--kill-child", "--mount-proc"]
            started = self._spawn(["unshare", *namespaces, "sh", "-c", NODE, "sh", node, str(hosts), sys.executable])
            first = partial(_child_of, started.pid) if node != HEAD else lambda pid=started.pid: pid
            self._init[node] = until(first, f"the first process of {node}", 10)
            until(partial(self._is_up, node), f"{node} to be up", 10)
        self._ip(HEAD, f"link add bridge type bridge; addr add {ADDRESSES[HEAD]}/24 dev bridge; link set bridge up")
        for node in NODES:
            self._ip(HEAD, f"link add {node} type veth peer name eth0 netns {self._init[node]}")
            self._ip(HEAD, f"link set {node} master bridge up")
            self._ip(node, f"addr add {ADDRESSES[node]}/24 dev eth0; link set eth0 up")

    def _is_up(self, node: str) -> bool:
        """Whether a node has come as far as its last command before it only waits."""
        links = self.on(node, "sh", "-c", "hostname; ip -brief link show up", check=False).stdout
        return links.startswith(f"{node}\n") and "LOOPBACK" in links

    def _start_slurm(self) -> None:
        for name in ("state", "munge", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755)
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={ADDRESSES[node]} CPUs={CPUS} Sockets=1 CoresPerSocket={CPUS} RealMemory=9000 "
            f"Gres=gpu:{GPUS}"
            for node in NODES
        )
        described = {"head": HEAD, "address": ADDRESSES[HEAD], "kill_wait": KILL_WAIT, "nodes": nodes}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, **described))
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        (self.folder / "cgroup.conf").write_text(f"CgroupMountpoint={self.folder}\nCgroupAutomount=no\n")
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        munged = ["munged", "--foreground", "--force", *(f"--{k}={munge}/{v}" for k, v in options.items())]
        self._spawn(munged)
        until(lambda: (munge / "socket").exists(), "munge", 10)
        self._spawn([*self._enter(HEAD), "slurmctld", "-D", "-f", f"{self.folder}/slurm.conf"])
        for node in NODES:
            self.on(node, "slurmd", "-f", f"{self.folder}/slurm.conf", "-N", node)

    def _spawn(
        self, command: Sequence[str], output: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """Start a process that ends with the cluster. The kernel kills it if the tests are killed."""
        with open(output or self.folder / "output.log", "a") as file:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=env or self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _ip(self, node: str, commands: str) -> None:
        for command in commands.split(";"):
            self.on(node, "ip", *command.split())

    def _enter(self, node: str) -> list[str]:
        processes = [] if node == HEAD else ["--pid"]
        return ["nsenter", "-t", str(self._init[node]), "--net", "--uts", "--mount", *processes, f"--wd={os.getcwd()}"]

    # For tests

    def environment(self, **changes: str) -> dict[str, str]:
        """Variables for commands of Slurm, and thus of the jobs: this process's, without any of a launcher."""
        own = {name: value for name, value in environment().items() if not name.startswith(LAUNCHERS)}
        path = f"{own.get('PATH', '')}:{SYSTEM_PATH}"
        return {**own, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf"), **changes}

    def on(self, node: str, *command: str, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Run a command inside a node and wait for it; its output is text."""
        options = {"capture_output": True, "text": True, "timeout": TIMEOUT, "env": self.environment(), **options}
        done = subprocess.run([*self._enter(node), *map(str, command)], check=False, **options)
        assert done.returncode == 0 or not check, f"{shlex.join(map(str, command))}: {done.stderr}"
        return done

    def command(self, line: str) -> str:
        """What a command of Slurm (squeue, scontrol, scancel, ...) prints on the head node."""
        done = self._command(line)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout.strip()

    def _command(self, line: str) -> subprocess.CompletedProcess:
        return self.on(HEAD, *shlex.split(line), check=False)

    def srun(self, *words: str, output: Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Start `srun WORDS` on the head node; the file `output` has all that it prints. Signals reach srun itself."""
        command = [*self._enter(HEAD)[:-1], f"--wd={cwd}", "srun", *map(str, words)]
        return self._spawn(command, output, self.environment(**(env or {})))

    def sbatch(self, script: str, *options: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Submit a batch script, given as text. Returns the job's id; its output is CWD/slurm-ID.out."""
        file = cwd / f"job-{time.monotonic_ns()}.sh"
        file.write_text(f"#!/bin/bash\n{script}")
        done = self.on(
            HEAD, "sbatch", "--parsable", f"--chdir={cwd}", *options, str(file), env=self.environment(**(env or {}))
        )
        return done.stdout.strip().split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, ExitCode, Restarts, ... Of an array, name one task: "12_3"."""
        told = self.command(f"scontrol -o show job {job}")
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def wait_for(self, job: str, *states: str, timeout: float = TIMEOUT) -> dict[str, str]:
        """Wait until a job is in one of these states; any that ends it by default. Returns what `job` does."""
        states = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

        def arrived() -> dict[str, str] | None:
            told = self.job(job)
            return told if told["JobState"] in states else None

        return until(arrived, f"job {job} to be {' or '.join(states)}", timeout)

    def restart_requeued(self, job: str) -> None:
        """Let a requeued job start soon, and for an hour. Slurm would wait for two minutes; it needs another second."""
        self.wait_for(job, "PENDING")
        self.command(f"scontrol update jobid={job} StartTime=now+2 TimeLimit=60")

    def let_time_run_out(self, job: str, left: int = 1) -> None:
        """Move the end of a running job to `left` seconds from now.

        Slurm looks at time limits every 30 s. Meanwhile the scripts of the job leave the cores to other tests.
        """
        for node in NODES:
            for pid in self.processes(node, r"\.py\b"):
                os.setpriority(os.PRIO_PROCESS, pid, 10)
        self.command(f"scontrol update jobid={job} EndTime=now+{left}")

    def processes(self, node: str, pattern: str) -> dict[int, str]:
        """The processes of a node whose command line matches: process id, as this test sees it -> command line."""
        namespace = os.readlink(f"/proc/{self._init[node]}/ns/pid")
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if os.readlink(entry / "ns" / "pid") == namespace and re.search(pattern, line):
                    found[int(entry.name)] = line
            except OSError:  # it ended meanwhile
                continue
        return found

    def kill(self, node: str, pattern: str, signum: int = signal.SIGKILL) -> None:
        """Send a signal to all processes of a node whose command line matches; there must be one."""
        found = self.processes(node, pattern)
        assert found, f"no process on {node} matches {pattern}"
        for pid in found:
            os.kill(pid, signum)

    def set_hosts(self, node: str, text: str = HOSTS) -> None:
        """Replace a node's /etc/hosts; by default with the one that it began with."""
        (self.folder / f"hosts-{node}").write_text(text)


def _child_of(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None
