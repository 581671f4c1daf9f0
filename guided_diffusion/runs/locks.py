"""One run per unit of output: lock files with a heartbeat, on any file system that several computers share.

A lock is a small file beside the output. It is created with a hard link, which is atomic on NFS too, and its
modification time is renewed every few seconds. Ages are compared on the file server's clock, so the computers' clocks
need not agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from .. import dist_util, logger
from ..errors import UserError, named_write_errors
from ..system.files import SCRATCH, is_remote
from .records import now

HEARTBEAT = 15.0  # seconds between two renewals
EXPIRY = 180.0  # seconds without a renewal after which a lock is taken over
SETTLE = 0.2  # seconds after a takeover in which another process may have taken over too


class Locks:
    """Exclusive use of units of output, from the start of a `with` block to its end.

    Args:
        units: path of each lock file -> what it protects, for messages.
        wait: seconds to wait for a unit that another run is using.
        about: what this process does with the units, such as its settings, for other shards to compare: JSON values.

    A lock that a previous run left behind is taken over: at once if that run's process no longer exists on this
    computer or if Slurm has requeued its job, else after three minutes without a heartbeat. Remote storage has no
    locks; a warning says so.

    Raises:
        UserError: another run is using a unit, or the folder cannot be written.
    """

    def __init__(self, units: Mapping[str, str], wait: float = 0.0, about: Any = None):
        self._units = {path: what for path, what in units.items() if not is_remote(path)}
        self._remote = next((what for path, what in units.items() if is_remote(path)), None)
        self._wait = wait
        self._about = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self._mine: dict[str, str] = {}  # path -> token
        self._lost = ""
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Locks:
        if self._remote and not self._wait:
            logger.warn_once(
                f"{self._remote} is on remote storage, which has no locks: make sure that no other run uses it"
            )
        deadline = time.monotonic() + self._wait
        try:
            for path, what in sorted(self._units.items()):  # in one order: runs do not wait for each other in a circle
                self._mine[path] = _acquire(path, what, self._about, deadline if self._wait else None)
        except BaseException:
            self.__exit__()
            raise
        if self._mine:
            self._heart = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
            self._heart.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        if self._heart:
            self._heart.join()
        for path, token in self._mine.items():
            if _token(path) == token:
                os.unlink(path)
        self._mine = {}

    def check(self) -> None:
        """Raise UserError if a lock was lost: this process was suspended for minutes, or its output was removed."""
        for path, token in self._mine.items():
            self._lost = self._lost or _loss(path, token, self._units[path])
        if self._lost:
            raise UserError(self._lost)

    def others(self) -> list[str]:
        """Locks of other shards of the same units whose owners may be alive."""
        return [other for path in self._mine for other in _other_shards(path)]

    def rivals(self) -> list[str]:
        """Those of `others` whose owners do something else with the units than this process."""
        return [path for path in self.others() if (_owner(path) or {}).get("about") != self._about]

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            for path, token in self._mine.items():
                try:
                    self._lost = self._lost or _loss(path, token, self._units[path])
                    if not self._lost:
                        os.utime(path)
                except OSError:
                    pass  # a file server that does not answer now may answer at the next beat


@contextmanager
def hold(units: Mapping[str, str], wait: float = 0.0, about: Any = None) -> Iterator[Locks]:
    """`Locks` that rank 0 holds for all ranks, which must all call this. Raises UserError on all of them."""
    with ExitStack() as stack:
        locks = Locks(units, wait, about)
        dist_util.on_main(lambda: stack.enter_context(locks) and None)
        yield locks


def _acquire(path: str, what: str, about: str, deadline: float | None) -> str:
    """Create a lock file, or take over one whose owner is gone. Returns its token.

    With a `deadline` (of time.monotonic), wait until then for an owner that is alive. Raises UserError.
    """
    folder, name = os.path.split(path)
    folder = folder or "."
    token, prefix = secrets.token_hex(8), f".{name}."
    draft = os.path.join(folder, f"{prefix}{token}{SCRATCH}")
    with named_write_errors(path):
        os.makedirs(folder, exist_ok=True)
        with open(draft, "w") as f:
            json.dump({"token": token, **_identity(), "about": about, "since": now()}, f)
        try:
            while not _link(draft, path):
                try:
                    free = _wait_until_free(path, draft, what, deadline is None)
                except UserError:
                    if deadline is None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
                    continue
                if free:
                    os.replace(draft, path)
                    time.sleep(SETTLE)
                    if _token(path) != token:
                        raise UserError(_in_use(what, _owner(path)))
                    break
        finally:
            for other in os.listdir(folder):  # this draft, and those of processes that were killed with one
                if other.startswith(prefix) and other.endswith(SCRATCH):
                    other = os.path.join(folder, other)
                    if other == draft or _is_gone(_owner(other)):
                        with suppress(FileNotFoundError):
                            os.unlink(other)
        return token


def _link(draft: str, path: str) -> bool:
    """Give the draft its final name; False if there is such a file."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    return True


def _wait_until_free(path: str, draft: str, what: str, patient: bool) -> bool:
    """Whether the owner of a lock is gone; False if the lock has disappeared. Raises UserError if the owner is alive.

    An owner on another computer is alive if its heartbeat arrives, and gone after `EXPIRY` seconds without one. Unless
    `patient`, an owner whose last heartbeat is younger counts as alive.
    """
    owner, last = _owner(path), None
    while True:
        beat, current = _modified(path), _owner(path)
        if beat is None:
            return False
        if current != owner or _is_alive(owner):
            raise UserError(_in_use(what, current))
        if _is_gone(owner):
            return True
        os.utime(draft)  # asks the file server what time it is
        if _modified(draft) - beat > EXPIRY:
            return True
        if not patient or (last is not None and beat != last):
            raise UserError(_in_use(what, owner))
        if last is None:
            logger.info(f"{_in_use(what, owner).splitlines()[0]} Waiting for a sign of life from it")
        last = beat
        time.sleep(min(1.0, HEARTBEAT / 4))


def _in_use(what: str, owner: Mapping[str, Any] | None) -> str:
    who = "another process"
    if owner:
        job = f" (Slurm job {owner['slurm_job']})" if owner.get("slurm_job") else ""
        who = f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"
    return f"{what} is in use by another run: {who}.\nWait until that run ends, or choose another --output"


def _loss(path: str, token: str, what: str) -> str:
    """Why a lock is no longer this process's; "" if it is."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return f"{path} has disappeared: was {what} removed or moved during the run? Start the run again"
    if _token(path) not in (token, None):
        return f"{what} was taken over by another run, since this one gave no sign of life for {EXPIRY:.0f} seconds"
    return ""


def _other_shards(path: str) -> list[str]:
    """The locks beside this process's lock that are of the same unit, and whose owners may be alive."""
    os.utime(path)
    now = _modified(path)
    folder, name = os.path.split(path)
    unit = re.sub(r"(\.\d+-of-\d+)?\.lock$", "", name)
    names = (other for other in os.listdir(folder or ".") if other != name)
    found = [os.path.join(folder, n) for n in names if re.fullmatch(rf"{re.escape(unit)}(\.\d+-of-\d+)?\.lock", n)]
    beats = {other: _modified(other) for other in found if not _is_gone(_owner(other))}
    return [other for other, beat in beats.items() if beat is not None and now - beat < EXPIRY]


# Who owns a lock


def _identity() -> dict[str, Any]:
    """What tells later whether this process is still there."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "pid_started": _started(os.getpid()),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _machine() -> str:
    """Names the running system in which a process number has one meaning: a boot and a namespace of processes."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()  # macOS


def _started(pid: int) -> str:
    """When a process was started, in the system's own units: process numbers are used again. "" if not known."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _is_alive(owner: Mapping[str, Any] | None) -> bool:
    """Whether the owner of a lock certainly exists, on this computer."""
    if not owner or owner.get("machine") != _machine():
        return False
    pid, started = owner.get("pid"), owner.get("pid_started")
    if started:
        return _started(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_gone(owner: Mapping[str, Any] | None) -> bool:
    """Whether the owner of a lock certainly exists no more."""
    if not owner:
        return False
    if owner.get("machine") == _machine():
        return not _is_alive(owner)
    mine = _identity()
    return bool(
        mine["slurm_job"]
        and owner.get("slurm_job") == mine["slurm_job"]
        and owner.get("slurm_restarts", 0) < mine["slurm_restarts"]
    )


def _owner(path: str) -> dict[str, Any] | None:
    """The content of a lock file; None if it cannot be read, such as while it is being created."""
    try:
        with open(path) as f:
            owner = json.load(f)
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _token(path: str) -> str | None:
    return (_owner(path) or {}).get("token")


def _modified(path: str) -> float | None:
    """Modification time of a file, which is opened first: NFS then asks the server. None if there is no such file."""
    try:
        with open(path) as f:
            return os.fstat(f.fileno()).st_mtime
    except OSError:
        return None
