"""Lock files with a heartbeat: one run per output, on any file system that several computers share.

A lock is a small file next to the output. It is created with a hard link, which is atomic on NFS too, and its
modification time is renewed every few seconds. Ages are measured with the file server's clock only.
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
SETTLE = 0.2  # seconds after a takeover during which another process may have taken over too


class Locks:
    """Exclusive use of outputs within a `with` block.

    Args:
        outputs: path of each lock file -> name of the output, for messages.
        wait: seconds to wait for an output that another run is using.
        about: settings of the work, as a JSON value; shards with different ones conflict.

    A lock left by a previous run is taken over: immediately if its process no longer exists on this computer or its
    Slurm job was requeued, else after three minutes without a heartbeat. Remote storage has no locks; a warning is
    logged.

    Raises UserError if another run is using an output, or the folder cannot be written to.
    """

    def __init__(self, outputs: Mapping[str, str], wait: float = 0.0, about: Any = None):
        self._outputs = {path: output for path, output in outputs.items() if not is_remote(path)}
        self._remote = next((output for path, output in outputs.items() if is_remote(path)), None)
        self._wait = wait
        self._about = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self._tokens: dict[str, str] = {}  # by path
        self._lost = ""
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Locks:
        if self._remote and not self._wait:
            logger.warn_once(
                f"{self._remote} is on remote storage, which has no locks: make sure that no other run uses it"
            )
        deadline = time.monotonic() + self._wait if self._wait else None
        try:
            for path, output in sorted(self._outputs.items()):  # sorted, to avoid deadlocks
                self._tokens[path] = _acquire(path, output, self._about, deadline)
        except BaseException:
            self.__exit__()
            raise
        if self._tokens:
            self._heart = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
            self._heart.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        if self._heart:
            self._heart.join()
        for path, token in self._tokens.items():
            if _token(path) == token:
                os.unlink(path)
        self._tokens = {}

    def check(self) -> None:
        """Raise UserError if a lock was lost: this process was suspended for minutes, or its output was removed."""
        for path, token in self._tokens.items():
            self._lost = self._lost or _loss(path, token, self._outputs[path])
        if self._lost:
            raise UserError(self._lost)

    def other_shards(self) -> list[str]:
        """Locks of other shards of the same outputs whose owners may be alive."""
        return [other for path in self._tokens for other in _other_shards(path)]

    def conflicting_shards(self) -> list[str]:
        """Those of `other_shards` whose `about` differs from this process's."""
        return [path for path in self.other_shards() if (_owner(path) or {}).get("about") != self._about]

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            for path, token in self._tokens.items():
                with suppress(OSError):  # the file server may answer again at the next beat
                    self._lost = self._lost or _loss(path, token, self._outputs[path])
                    if not self._lost:
                        os.utime(path)


@contextmanager
def locked_by_main(outputs: Mapping[str, str], about: Any = None) -> Iterator[Locks]:
    """`Locks` that rank 0 holds for all ranks. All ranks must call this, and all raise its UserError."""
    with ExitStack() as stack:
        locks = Locks(outputs, about=about)
        dist_util.on_main(lambda: stack.enter_context(locks) and None)
        yield locks


def _acquire(path: str, output: str, about: str, deadline: float | None) -> str:
    """Create a lock file, or take over one whose owner is gone. Returns its token.

    With a `deadline` (of time.monotonic), wait until then for a live owner. Raises UserError.
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
                    expired = _is_expired(path, draft, output, patient=deadline is None)
                except UserError:
                    if deadline is None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
                    continue
                if expired:
                    os.replace(draft, path)
                    time.sleep(SETTLE)
                    if _token(path) != token:
                        raise UserError(_in_use(output, _owner(path)))
                    break
        finally:
            for other in os.listdir(folder):  # this draft, and those of killed processes
                if other.startswith(prefix) and other.endswith(SCRATCH):
                    other = os.path.join(folder, other)
                    if other == draft or _is_gone(_owner(other)):
                        with suppress(FileNotFoundError):
                            os.unlink(other)
        return token


def _link(draft: str, path: str) -> bool:
    """Give the draft its final name; False if that exists."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    return True


def _is_expired(path: str, draft: str, output: str, patient: bool) -> bool:
    """Whether the owner of a lock is gone; False if the lock has disappeared. Raises UserError if the owner is alive.

    An owner on another computer is alive if its heartbeat arrives, and gone after `EXPIRY` seconds without one. Unless
    `patient`, it counts as alive until then.
    """
    owner, last = _owner(path), None
    while True:
        beat, current = _modified(path), _owner(path)
        if beat is None:
            return False
        if current != owner or _is_alive(owner):
            raise UserError(_in_use(output, current))
        if _is_gone(owner):
            return True
        os.utime(draft)  # sets the file server's current time
        if _modified(draft) - beat > EXPIRY:
            return True
        if not patient or (last is not None and beat != last):
            raise UserError(_in_use(output, owner))
        if last is None:
            logger.info(f"{_in_use(output, owner).splitlines()[0]} Waiting for its heartbeat")
        last = beat
        time.sleep(min(1.0, HEARTBEAT / 4))


def _in_use(output: str, owner: Mapping[str, Any] | None) -> str:
    who = "another process"
    if owner:
        job = f" (Slurm job {owner['slurm_job']})" if owner.get("slurm_job") else ""
        who = f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"
    return f"{output} is in use by another run: {who}.\nWait until that run ends, or choose another --output"


def _loss(path: str, token: str, output: str) -> str:
    """Why a lock no longer belongs to this process; "" if it does."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return f"{path} has disappeared: was {output} removed or moved during the run? Rerun the same command"
    if _token(path) not in (token, None):
        return f"{output} was taken over by another run because this one did not respond for {EXPIRY:.0f} seconds"
    return ""


def _other_shards(path: str) -> list[str]:
    """Locks of other shards of the same output whose owners may be alive."""
    os.utime(path)
    now = _modified(path)
    folder, name = os.path.split(path)
    suffix = r"(\.\d+-of-\d+)?\.lock$"
    pattern = re.escape(re.sub(suffix, "", name)) + suffix
    names = [other for other in os.listdir(folder or ".") if other != name and re.match(pattern, other)]
    others = [os.path.join(folder, other) for other in names]
    beats = {other: _modified(other) for other in others if not _is_gone(_owner(other))}
    return [other for other, beat in beats.items() if beat is not None and now - beat < EXPIRY]


# Owners of locks


def _identity() -> dict[str, Any]:
    """Properties that tell later whether this process still exists."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "pid_started": _started(os.getpid()),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _machine() -> str:
    """Scope in which process IDs are unique: a boot of a computer and a PID namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()  # macOS


def _started(pid: int) -> str:
    """Start time of a process, in kernel ticks, since process IDs are reused. "" if unknown."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # zombies have ended


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
    """Whether the owner of a lock certainly no longer exists."""
    if not owner:
        return False
    if owner.get("machine") == _machine():
        return not _is_alive(owner)
    mine = _identity()
    same_job = mine["slurm_job"] and owner.get("slurm_job") == mine["slurm_job"]
    return bool(same_job) and owner.get("slurm_restarts", 0) < mine["slurm_restarts"]


def _owner(path: str) -> dict[str, Any] | None:
    """Content of a lock file; None if it cannot be read, for example during its creation."""
    try:
        with open(path) as f:
            owner = json.load(f)
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _token(path: str) -> str | None:
    return (_owner(path) or {}).get("token")


def _modified(path: str) -> float | None:
    """Modification time of a file; None if it does not exist. Opening it makes NFS ask the server."""
    try:
        with open(path) as f:
            return os.fstat(f.fileno()).st_mtime
    except OSError:
        return None
