"""Python processes that have imported PyTorch already: `start` instead of `subprocess.Popen`.

Most processes of these tests need more time to import PyTorch and torchvision than for their own work. A server imports
such packages once, and nothing else: no module of this repository, no threads, no CUDA. Each process is forked from the
server. It takes over the caller's streams, folder, environment and arguments, leads a session of its own, and runs the
script (or the code after -c) at the top level of the interpreter. So this repository is imported anew each time, and
exceptions, exit statuses, signals, threads and `atexit` are Python's own. It can be killed like any other process.
tests/test_fork_server.py compares such processes with those that Python starts itself.

What differs: the packages are already in memory, hashes of strings are the same in all of them, and /proc/PID/cmdline
and environ are the server's. Tests about starting and importing do without it. If the environment differs from the
server's in more than `FREE` variables, `start` executes Python.

Launchers (mpiexec, torchrun, srun) are executed, and so are the processes that they start if a test sends signals or is
about launching. In other tests, mpiexec and torchrun start `rank_command`, a process that has its work done by one of
the server, passes signals on to it and ends as it does.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

# Variables that no package reads when it is imported: their names begin with these. PYTHONPATH is seen to by `become`.
FREE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "PMI", "OMPI_", "OPENAI_", "GUIDED_DIFFUSION_")
FREE += ("COLUMNS", "LINES", "PYTEST_", "TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_", "PYTHONPATH", "no_proxy")
SHARED = "PYTEST_FORK_SERVER"  # variable: address of the server that the workers of pytest-xdist share
AVAILABLE = hasattr(os, "pidfd_open") and hasattr(socket, "SOCK_SEQPACKET")  # Linux


class Forked:
    """A process that the server forked. It offers what the tests use of `subprocess.Popen`.

    Unlike with `Popen`, the process is killed when the object is deleted. Raises RuntimeError if the server is gone.
    """

    def __init__(self, address: str, args: Sequence[str], cwd: str, env: Mapping[str, str], text: bool, streams: list):
        self.args = args
        self.returncode: int | None = None
        ours: list[IO[Any] | None] = []
        theirs, opened = [], []
        for number, stream in enumerate(streams):
            mine = None
            if stream == subprocess.PIPE:
                reading, writing = os.pipe()
                fd, mine = (writing, reading) if number else (reading, writing)
                mine = open(mine, ("r" if number else "w") + ("" if text else "b"))  # noqa: SIM115
                opened.append(fd)
            elif stream == subprocess.DEVNULL:
                fd = os.open(os.devnull, os.O_RDWR)
                opened.append(fd)
            elif stream == subprocess.STDOUT:
                fd = theirs[1]
            else:
                fd = number if stream is None else stream if isinstance(stream, int) else stream.fileno()
            theirs.append(fd)
            ours.append(mine)
        self.stdin, self.stdout, self.stderr = ours
        self._connection, self.pid = request_process(address, args[1:], cwd, env, theirs)
        for fd in opened:
            os.close(fd)

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(timeout=0)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = receive(self._connection)
        return self.returncode

    def communicate(self, input: str | bytes | None = None, timeout: float | None = None) -> tuple:
        """As `subprocess.Popen.communicate`, but it cannot be called again after a timeout."""
        outputs: dict[IO[Any], str | bytes] = {}
        readers = [
            threading.Thread(target=lambda stream=stream: outputs.update({stream: stream.read()}), daemon=True)
            for stream in (self.stdout, self.stderr)
            if stream and not stream.closed
        ]
        for reader in readers:
            reader.start()
        if self.stdin:
            with suppress(BrokenPipeError):
                if input:
                    self.stdin.write(input)
                self.stdin.close()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout)
        for stream in outputs:
            stream.close()
        return outputs.get(self.stdout), outputs.get(self.stderr)

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_) -> None:
        for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
            stream.close()
        self.wait()


def request_process(
    address: str, words: Sequence[str], cwd: str, env: Mapping[str, str], streams: Sequence[int]
) -> tuple[socket.socket, int]:
    """Have the server at `address` run `python WORDS` with these standard streams, on the cores of this process.

    Returns a connection, which later receives the status, and the id of the process. The server kills the process if
    the connection is closed before.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    cores = sorted(os.sched_getaffinity(0))
    request = {"words": words, "cwd": str(cwd), "env": dict(env), "cores": cores}
    socket.send_fds(connection, [json.dumps(request).encode()], streams)
    return connection, receive(connection)


def receive(connection: socket.socket) -> int:
    """A number from the server. Raises RuntimeError if the server is gone."""
    number = connection.recv(100)
    if not number:
        raise RuntimeError("the fork server has ended, see its output")
    return int(number)


class _Server:
    """A server that ends with this pytest process; or the one that pytest-xdist's workers share, if it lives."""

    def __init__(self, env: Mapping[str, str]):
        self.address = os.environ.get(SHARED, "")
        if self.lives():
            self._env = json.loads(Path(self.address).with_name("environment.json").read_text())
        else:
            self._start({name: value for name, value in env.items() if name != "PYTHONPATH"})

    def _start(self, env: Mapping[str, str]) -> None:
        self._env = env
        self._folder = tempfile.TemporaryDirectory()
        self.address = os.path.join(self._folder.name, "requests")
        Path(self._folder.name, "environment.json").write_text(json.dumps(self._env))
        requests = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        requests.bind(self.address)
        requests.listen()
        self._open, theirs = os.pipe()[::-1]  # closed when this process ends
        options = {"env": self._env, "pass_fds": [theirs, requests.fileno()], "start_new_session": True}
        options |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        command = [sys.executable, __file__, "serve", str(requests.fileno()), str(theirs)]
        self._process = subprocess.Popen(command, **options)
        os.close(theirs)
        requests.close()

    def lives(self) -> bool:
        """Whether it still runs. If not, one process could not be started, and its test failed."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            return connection.connect_ex(self.address) == 0

    def suits(self, env: Mapping[str, str]) -> bool:
        names = {name for name, _ in self._env.items() ^ env.items()}
        return all(name.startswith(FREE) for name in names)


_server: _Server | None = None


def share_server() -> None:
    """Start a server that the workers of pytest-xdist share, if they are started by this process afterwards."""
    global _server
    if AVAILABLE:
        _server = _Server(os.environ)
        os.environ[SHARED] = _server.address


def start(
    args: Sequence[str], *, cwd=None, env: Mapping[str, str] | None = None, text: bool = True, **options
) -> Forked | subprocess.Popen:
    """Start a command as the leader of a new session; options as those of `subprocess.Popen`.

    `[sys.executable, SCRIPT, ...]`, `[sys.executable, "-c", CODE, ...]` and `[sys.executable, "-m", MODULE, ...]` are
    forked from the server if possible.
    """
    env = os.environ if env is None else env
    args = [str(word) for word in args]
    if args[0] == sys.executable and set(options) <= {"stdin", "stdout", "stderr"} and (server := _server_for(env)):
        streams = [options.get(name) for name in ("stdin", "stdout", "stderr")]
        return Forked(server.address, args, cwd or os.getcwd(), env, text, streams)
    return subprocess.Popen(args, cwd=cwd, env=env, text=text, start_new_session=True, **options)


def rank_command(env: Mapping[str, str]) -> list[str]:
    """Words with which mpiexec or torchrun, with the environment `env`, start forked processes; [] if they cannot."""
    server = _server_for(env)
    return [sys.executable, "-E", "-S", __file__, "rank", server.address] if server else []


def _server_for(env: Mapping[str, str]) -> _Server | None:
    """The server, if processes with the environment `env` can be forked from it."""
    global _server
    if not AVAILABLE:
        return None
    if _server is None or not _server.lives():
        _server = _Server(env)
    return _server if _server.suits(env) else None


# The server itself, and what is forked from it.


def import_packages() -> None:
    """Import what the scripts import, apart from the modules of this repository."""
    path = sys.path.copy()  # which setuptools extends
    import blobfile  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.nn.parallel
    import torchvision  # noqa: F401
    import tqdm  # noqa: F401

    sys.path[:] = path
    if len(os.listdir("/proc/self/task")) > 1 or torch.cuda.is_initialized():
        raise RuntimeError("an import has started threads or CUDA: processes cannot be forked")


def serve(requests: socket.socket, parent: int) -> dict[str, Any]:
    """Fork a process per request. It tells the caller its id, and the server tells its status when it has ended.

    If a caller is gone before, the server kills the process. The server ends when the pipe `parent` is closed.

    Returns the request, in the forked processes only.
    """
    running: dict[int, tuple[int, socket.socket]] = {}  # by the file descriptor that tells that the process has ended
    callers: dict[int, int] = {}  # file descriptor of the connection -> process
    poll = select.poll()
    poll.register(parent, select.POLLHUP)
    poll.register(requests, select.POLLIN)
    while True:
        fd, _ = poll.poll()[0]  # one at a time: each changes which of them exist
        if fd == parent:
            os._exit(0)
        if fd in callers:
            poll.unregister(fd)
            os.kill(callers.pop(fd), signal.SIGKILL)
            continue
        if fd in running:
            pid, caller = running.pop(fd)
            poll.unregister(fd)
            os.close(fd)
            _tell(caller, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            if callers.pop(caller.fileno(), None):
                poll.unregister(caller)
            caller.close()
            continue
        caller, _ = requests.accept()
        request, streams, _, _ = socket.recv_fds(caller, 1 << 20, 3)
        if not request:  # killed before it could ask
            caller.close()
            continue
        pid = os.fork()
        if pid == 0:
            os.setsid()
            _tell(caller, os.getpid())
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            for end in (requests, caller, *(caller for _, caller in running.values())):
                end.close()
            os.closerange(3, 1 << 20)
            return json.loads(request)
        for stream in streams:
            os.close(stream)
        process = os.pidfd_open(pid)
        running[process] = pid, caller
        callers[caller.fileno()] = pid
        poll.register(process, select.POLLIN)
        poll.register(caller, select.POLLHUP)


def _tell(reply: socket.socket, number: int) -> None:
    with suppress(OSError):  # the caller no longer asks
        reply.send(str(number).encode())


def become(words: list[str], cwd: str, env: dict[str, str], cores: list[int]) -> None:
    """Make this process look to the script as if `python WORDS` had been executed on these cores."""
    import numpy

    os.chdir(cwd)
    os.sched_setaffinity(0, cores)
    os.environ.clear()
    os.environ.update(env)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    first = {"-c": "", "-m": os.getcwd()}.get(words[0], os.path.dirname(os.path.abspath(words[0])))
    others = [os.path.abspath(path) for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [first, *others]
    numpy.random.seed()  # noqa: NPY002 (Python's own generator is seeded anew after a fork)


def run(words: list[str]) -> None:
    """Run the script, or the code after -c, as the main module, and note in `status` with what Python will end."""
    global status
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(words[1], vars(main))
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except Exception:
        status = 1
        raise


def skip_destruction() -> None:
    """End the process once everything else has ended. Python would now destroy its modules, for half a second.

    MPI is finalized as mpi4py does it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status is not None:
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi and mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.Finalize()
        os._exit(status & 0xFF)


status: int | None = None  # of the process; None: another exception, such as KeyboardInterrupt, ends it


def run_as_rank(address: str, words: list[str]) -> None:
    """In a process of a launcher: have the server at `address` run `python WORDS`, and end as that does."""
    passed_on = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    connection, pid = request_process(address, words, os.getcwd(), os.environ, [0, 1, 2])
    for signum in passed_on:
        signal.signal(signum, lambda signum, _: os.kill(pid, signum))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    status = receive(connection)
    if status < 0:
        if -status in passed_on:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        run_as_rank(sys.argv[2], sys.argv[3:])
    atexit.register(skip_destruction)  # the first one to be registered is the last one to be called
    import_packages()
    gc.freeze()
    request = serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
    become(**request)
    run(request["words"])
