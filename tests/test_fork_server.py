"""Processes of the fork server behave like those that Python starts itself, and so do those that launchers start."""

import json
import os
import pty
import signal
import subprocess
import sys

import fork_server
import pytest
from conftest import environment

PIPE = subprocess.PIPE

SCRIPT = """
import json, os, random, signal, sys
import numpy
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "folder": os.getcwd(), "name": __name__,
    "environment": sorted(os.environ.items()),
    "main": sorted(vars(sys.modules["__main__"]).keys() & {"json", "__name__"}), "leader": os.getsid(0) == os.getpid(),
    "open": sorted(os.listdir("/proc/self/fd")), "flags": str(sys.flags), "line_buffering": sys.stdout.line_buffering,
    "handlers": [str(signal.getsignal(signum)).split(" at ")[0] for signum in sorted(signal.valid_signals())],
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "threads": os.listdir("/proc/self/task") == [str(os.getpid())],
    "encodings": [sys.stdin.encoding, sys.stdout.encoding, sys.stderr.encoding, sys.getfilesystemencoding()],
    "repository": [name for name in sys.modules if name.startswith(("guided_diffusion", "conftest"))],
    "read": sys.stdin.read(),
}))
"""

ENDINGS = {
    "status": "import sys; sys.exit(3)",
    "large status": "import sys; sys.exit(256 + 4)",
    "no status": "import sys; sys.exit()",
    "words": "import sys; sys.exit('words')",
    "exception": "import os; print('unflushed', end=''); os.stat('/nowhere')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "aborted": "import os; os.abort()",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT); signal.pause()",
    "left": "import os; print('unflushed', end=''); os._exit(5)",
    "thread": "import threading as t; t.Thread(target=lambda: (t.main_thread().join(), print('thread'))).start()",
    "atexit": "import atexit; atexit.register(print, 1); atexit.register(print, 2); print(3, end='')",
    "exception at the end": "import atexit; atexit.register(lambda: 1 / 0)",
    "full disk": "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('lost')",
    "not Python": "print(",
}


def start_rank(command, **options):
    """Start a command as a launcher does whose processes are forked."""
    rank = fork_server.rank_command(options["env"])
    assert rank
    return subprocess.Popen([*rank, *command[1:]], text=True, start_new_session=True, **options)


def results(words, stdin="", **options):
    """What a process of the server, one of a launcher and one of Python's own print, and their status."""
    command = [sys.executable, *map(str, words)]
    options = {"env": environment(), "stdin": PIPE, "stdout": PIPE, "stderr": PIPE, **options}
    forked = fork_server.start(command, **options)
    own = subprocess.Popen(command, text=True, start_new_session=True, **options)
    assert type(forked) is fork_server.Forked
    processes = forked, start_rank(command, **options), own
    return [(*process.communicate(stdin), process.returncode) for process in processes]


@pytest.mark.parametrize("how", ["script", "-c", "-m"])
def test_what_a_process_finds(how, tmp_path):
    script = tmp_path / "folder" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    words = {"script": [script], "-c": ["-c", SCRIPT], "-m": ["-m", "folder.script"]}[how]
    forked, rank, own = results(
        [*words, "a b", "-c"], "line\n", cwd=tmp_path, env=environment(RANK="3", OPENAI_LOGDIR="/x")
    )
    assert json.loads(forked[0]) == json.loads(rank[0]) == json.loads(own[0])
    assert forked[1:] == rank[1:] == own[1:] == ("", 0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_how_a_process_ends(ending):
    *others, own = results(["-c", ENDINGS[ending]])
    for out, err, status in others:
        assert (out, status) == (own[0], own[2])
        assert err.splitlines()[-1:] == own[1].splitlines()[-1:]  # a traceback has more lines


def test_numpy_is_not_seeded_alike():
    code = "import numpy, random; print(numpy.random.rand(), random.random())"
    assert len({word for _ in range(2) for out, _, _ in results(["-c", code])[:2] for word in out.split()}) == 8


WAITING = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: print("one", flush=True))
print(os.getpid(), sorted(os.sched_getaffinity(0)), flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("last", [signal.SIGTERM, signal.SIGKILL])
def test_signals_to_the_process_of_a_launcher(last):
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", WAITING]
    options = {"env": environment(), "stdout": PIPE, "preexec_fn": lambda: os.sched_setaffinity(0, {core})}
    with start_rank(command, **options) as rank:
        pid, cores = rank.stdout.readline().split(maxsplit=1)
        assert int(pid) != rank.pid and json.loads(cores) == [core]
        rank.send_signal(signal.SIGUSR1)
        assert rank.stdout.readline() == "one\n"
        rank.send_signal(last)
        assert rank.wait(timeout=60) == -last
        assert rank.stdout.read() == ""  # nobody holds the pipe any more


def test_a_process_is_killed_and_awaited_like_any_other():
    process = fork_server.start(
        [sys.executable, "-c", "import sys; print('ready', flush=True); sys.stdin.read()"],
        env=environment(),
        stdin=PIPE,
        stdout=PIPE,
    )
    with process:
        assert process.stdout.readline() == "ready\n" and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == process.poll() == process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_terminal():
    code = "import sys; print(sys.stdout.isatty(), sys.stdout.line_buffering); sys.stdin.read()"
    ours, theirs = pty.openpty()
    process = fork_server.start([sys.executable, "-c", code], env=environment(), stdin=PIPE, stdout=theirs)
    os.close(theirs)
    with open(ours) as terminal:
        assert terminal.readline() == "True True\n"  # before the process ends, without a flush
        process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    "options", [{"env": environment(OMP_NUM_THREADS="2")}, {"env": {}}, {"preexec_fn": os.getpid}, {"umask": 0o77}]
)
def test_python_itself_is_executed_where_the_difference_may_matter(options):
    process = fork_server.start([sys.executable, "-c", ""], **options)
    assert type(process) is subprocess.Popen and process.wait() == 0
