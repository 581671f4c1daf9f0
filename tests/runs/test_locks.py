"""Locks with a heartbeat: real processes that are killed, suspended, or on other computers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

from guided_diffusion import logger
from guided_diffusion.errors import UserError
from guided_diffusion.runs import locks
from guided_diffusion.runs.locks import Locks
from guided_diffusion.system.other_scripts import environment

import pytest
from fork_server import start

HOLDER = """
    import sys, time
    from guided_diffusion.runs.locks import Locks
    with Locks({sys.argv[1]: "the output"}):
        print("held", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path):
    return str(tmp_path / "out" / "unit.lock")


def hold(lock, **changes):
    """A process that holds the lock; a child of this one, so that it is a zombie until it is awaited."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), lock]
    process = subprocess.Popen(command, env=environment(**changes), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def leave(lock, **changes):
    """A lock as a run on another computer leaves it."""
    os.makedirs(os.path.dirname(lock), exist_ok=True)
    owner = {"token": "0123", "host": "gpu-b", "machine": "another", "pid": 7, "pid_started": "5", "slurm_job": ""}
    with open(lock, "w") as f:
        json.dump({**owner, "since": "2026-11-25T12:00:00+00:00", **changes}, f)


def take(lock, **options):
    with Locks({lock: "the output"}, **options) as held:
        held.check()


def test_a_lock_excludes_others_until_it_is_released(lock):
    with Locks({lock: "the output"}) as held:
        held.check()
        words = rf"the output is in use by another run: process {os.getpid()} on .*, since 20.*\n.*another --output"
        with pytest.raises(UserError, match=words):
            take(lock)
    assert os.listdir(os.path.dirname(lock)) == []
    take(lock)


def test_an_exception_releases_all_locks(lock, tmp_path):
    other = str(tmp_path / "other.lock")
    with Locks({other: "the other output"}), pytest.raises(UserError, match="the other output is in use"):
        Locks({lock: "the output", other: "the other output"}).__enter__()
    assert not os.path.exists(lock) and not os.path.exists(other)


def test_a_killed_owner_on_this_computer_is_replaced_at_once(lock, monkeypatch):
    monkeypatch.setattr(locks, "EXPIRY", 1000)
    process = hold(lock)
    with pytest.raises(UserError, match=f"process {process.pid} on "):
        take(lock)
    os.kill(process.pid, signal.SIGSTOP)  # suspended, but there
    with pytest.raises(UserError, match="in use"):
        take(lock)
    process.kill()
    deadline = time.monotonic() + 300
    while os.path.exists(f"/proc/{process.pid}") and "Z" not in open(f"/proc/{process.pid}/stat").read():  # noqa: SIM115
        assert time.monotonic() < deadline
    take(lock)  # before its parent has taken note: a zombie
    process.wait()
    assert os.listdir(os.path.dirname(lock)) == []


def test_a_process_number_that_is_used_again(lock):
    leave(lock, machine=locks._machine(), pid=os.getpid(), pid_started="1")
    take(lock)


def test_a_requeued_job_takes_over_at_once(lock, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    leave(lock, slurm_job="12", slurm_restarts=0)
    with pytest.raises(UserError, match=r"process 7 on gpu-b \(Slurm job 12\)"), Locks({lock: "it"}, wait=0.1):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    take(lock)
    leave(lock, slurm_job="13", slurm_restarts=0)
    with pytest.raises(UserError, match="in use"), Locks({lock: "it"}, wait=0.1):
        pass


def test_without_a_heartbeat_another_computer_s_lock_expires(lock, monkeypatch, capsys):
    monkeypatch.setattr(locks, "EXPIRY", 0.5)
    leave(lock)
    started = time.monotonic()
    take(lock)
    assert time.monotonic() - started >= 0.5
    assert "the output is in use by another run: process 7 on gpu-b" in capsys.readouterr().err


def test_a_heartbeat_keeps_another_computer_s_lock(lock, monkeypatch):
    leave(lock)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on gpu-b"):
            take(lock)
    finally:
        ended.set()
        thread.join()


def test_clocks_need_not_agree(lock, monkeypatch):
    """Only the file server's clock counts; that of this computer may be anything."""
    monkeypatch.setattr(locks, "EXPIRY", 60)
    leave(lock)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with pytest.raises(UserError, match="in use"), Locks({lock: "it"}, wait=0.1):
        pass
    hour_ago = os.stat(lock).st_mtime - 3600
    os.utime(lock, (hour_ago, hour_ago))
    take(lock)


def test_the_heartbeat_renews_the_lock(lock, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    with Locks({lock: "the output"}):
        os.utime(lock, (0, 0))
        deadline = time.monotonic() + 300
        while os.stat(lock).st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_damaged_lock_expires(lock, monkeypatch):
    os.makedirs(os.path.dirname(lock))
    open(lock, "w").close()
    with pytest.raises(UserError, match="in use by another run: another process"), Locks({lock: "it"}, wait=0.1):
        pass
    monkeypatch.setattr(locks, "EXPIRY", 0.2)
    take(lock)


def test_a_lock_that_was_taken_over_is_noticed(lock):
    with Locks({lock: "the output"}) as held:
        leave(lock)
        with pytest.raises(UserError, match="the output was taken over by another run"):
            held.check()
    assert os.path.exists(lock)  # the other's


def test_output_that_was_removed_is_noticed(lock):
    with Locks({lock: "the output"}) as held:
        os.unlink(lock)
        with pytest.raises(UserError, match=r"unit.lock has disappeared: was the output removed or moved"):
            held.check()


def test_one_of_many_takes_over(lock):
    """Processes that find the same orphan at the same time: one gets it, the others are told."""
    leave(lock, machine=locks._machine(), pid=2**22 + 1)
    code = textwrap.dedent(HOLDER).replace("time.sleep(600)", "sys.stdin.read()")
    pipe = subprocess.PIPE
    options = {"env": environment(), "stdin": pipe, "stdout": pipe, "stderr": pipe}
    processes = [start([sys.executable, "-c", code, lock], **options) for _ in range(6)]
    deadline = time.monotonic() + 300
    while sum(process.poll() is None for process in processes) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    outputs = [process.communicate(timeout=300) for process in processes]  # closes stdin: the holder ends
    assert [out for out, _ in outputs if out] == ["held\n"]
    assert sum("the output is in use" in err for _, err in outputs) == 5


def test_waiting_for_a_lock(lock):
    started, order = threading.Event(), []

    def first():
        with Locks({lock: "it"}):
            started.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    with Locks({lock: "it"}, wait=60):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_other_locks_of_the_same_output(lock, tmp_path):
    with Locks({lock: "it"}, about="settings") as held:
        for name in ("unit.1-of-3.lock", "unit.2-of-3.lock", "unit.x.lock"):
            leave(str(tmp_path / "out" / name))
        leave(str(tmp_path / "out" / "unit.3-of-3.lock"), machine=locks._machine(), pid=2**22 + 1)
        for found in (held.other_shards(), held.conflicting_shards()):
            assert sorted(map(os.path.basename, found)) == ["unit.1-of-3.lock", "unit.2-of-3.lock"]
        leave(str(tmp_path / "out" / "unit.1-of-3.lock"), about=held._about)
        assert list(map(os.path.basename, held.conflicting_shards())) == ["unit.2-of-3.lock"]


def test_remote_storage_has_no_locks(capsys):
    logger.warn_once.cache_clear()
    for _ in range(2):
        with Locks({"gs://bucket/unit.lock": "gs://bucket/unit"}) as held:
            held.check()
    assert capsys.readouterr().err.count("gs://bucket/unit is on remote storage, which has no locks") == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/unit.lock: .*another --output"):
        take(str(tmp_path / "file" / "unit.lock"))
