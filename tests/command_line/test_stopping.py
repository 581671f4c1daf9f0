"""Stop signals: once, twice in quick succession as from Slurm, and a second Ctrl-C a second later."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import environment, run_python
from fork_server import start

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1

# A script that takes time to end: it waits for a line from the test.
SCRIPT = """
import sys
from guided_diffusion import dist_util
from guided_diffusion.command_line import stopping
from guided_diffusion.command_line.stopping import Stopped, StopRequest, run, when_stopped

def say(words):
    print(words, flush=True)

def plain():
    try:
        say("ready")
        while True:
            sys.stdin.readline()
    finally:
        say("ending")
        while sys.stdin.readline() != "end\\n":
            pass
        say("tidy")

def looping():
    when_stopped(lambda: "step 3 is saved")
    with StopRequest() as request:
        say("ready")
        while not request.signum:
            sys.stdin.readline()
        say("ending")
        while sys.stdin.readline() != "end\\n":
            pass
        say("tidy")
        raise Stopped(request.signum)

def wait_while_failing(error):
    say("ready")
    while sys.stdin.readline() != "end\\n":
        pass

def losing():
    dist_util.lost_peer_behind = wait_while_failing
    raise RuntimeError("a broken connection")

def failing():
    dist_util.leave_after_bug = wait_while_failing
    raise RuntimeError("a bug")

stopping.INSISTENCE = float(sys.argv[2])
run({function.__name__: function for function in (plain, looping, losing, failing)}[sys.argv[1]])
"""


class Script:
    """The script above in a process of its own."""

    def __init__(self, kind, insistence):
        command = [sys.executable, "-c", SCRIPT, kind, str(insistence)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = start(command, env=environment(), **pipes)
        # A test that fails does not wait for ever.
        self.alarm = threading.Timer(300, self.process.kill)
        self.alarm.start()
        self.expect("ready")

    def expect(self, words):
        assert self.process.stdout.readline() == f"{words}\n"

    def send(self, *signals):
        """Each signal, with a line after it: the script has taken note of the signal when it reads on."""
        for signum in signals:
            self.process.send_signal(signum)
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def end(self):
        """Let the script end by itself. Returns its status and what it says on stderr."""
        self.process.stdin.write("end\n")
        self.process.stdin.flush()
        return self.rest()

    def rest(self):
        said, words = self.process.communicate()
        self.alarm.cancel()
        return self.process.returncode, said, words


FAILING = """
import blobfile
from guided_diffusion.command_line.stopping import run
from guided_diffusion.errors import named_write_errors

def main():
    with named_write_errors({path!r}) if {path!r} else __import__("contextlib").nullcontext():
        raise blobfile.Error("no such bucket")

run(main)
"""


@pytest.mark.parametrize("path", ["", "gs://b/out.npz"])
def test_an_error_of_remote_storage_is_one_of_the_system(path):
    done = run_python("-c", FAILING.format(path=path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    named = "error: cannot write gs://b/out.npz: no such bucket. Choose another --output,"
    assert done.stderr.startswith(named if path else "error: no such bucket")


@pytest.mark.parametrize("kind", ["plain", "looping"])
@pytest.mark.parametrize("signals", [(TERM,), (TERM, TERM), (USR1, USR1, TERM), (INT, INT), (INT, TERM), (TERM, INT)])
def test_further_signals_do_not_disturb_a_tidy_end(kind, signals):
    script = Script(kind, insistence=1000)
    script.send(signals[0])
    script.expect("ending")
    script.send(*signals[1:], *signals[1:])
    status, said, words = script.end()
    assert status == 128 + signals[0] and said == "tidy\n"
    name = signals[0].name
    complete = "all files written so far are complete. Rerun the same command to resume"
    resume = {"looping": "step 3 is saved", "plain": complete}[kind]
    assert words == f"stopped by {name}: {resume}\n"


@pytest.mark.parametrize("kind", ["plain", "looping"])
def test_ctrl_c_again_after_a_while_ends_at_once(kind):
    script = Script(kind, insistence=0)  # any second one is late enough
    script.send(INT)
    script.expect("ending")
    script.send(TERM, USR1)  # do not count
    script.send(INT)
    status, said, words = script.rest()
    assert status == 128 + INT and said == "" and words.startswith("stopped by SIGINT: ")


def test_one_ctrl_c_after_another_signal_does_not_insist():
    script = Script("looping", insistence=0)
    script.send(TERM)
    script.expect("ending")
    os.kill(script.process.pid, TERM)
    assert script.end()[0] == 128 + TERM


def test_a_signal_while_a_rank_learns_which_other_is_lost():
    """From the launcher, which ends the others when one has died."""
    script = Script("losing", insistence=1000)
    script.send(TERM)
    complete = "all files written so far are complete. Rerun the same command to resume"
    assert script.rest() == (128 + TERM, "", f"stopped by SIGTERM: {complete}\n")


def test_a_signal_while_the_others_are_told_of_a_bug_does_not_hide_it():
    script = Script("failing", insistence=1000)
    script.send(TERM)
    status, _, words = script.end()
    assert status == 1 and words.endswith("RuntimeError: a bug\n") and words.count("Traceback") == 1
