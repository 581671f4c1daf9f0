"""How the ranks find each other.

Rank 0 opens the key-value store of torch.distributed, and a desk: a small server at a place that the other ranks can
work out, which tells the store's port to ranks of the same run and to nobody else. Two runs on one node may work out
the same place; the second one's rank 0 then finds the port taken and opens its desk on the next.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import json
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from ..errors import UserError
from .launchers import World, expand_node_list, number_from
from .waiting import in_background, seconds_from

FIRST_PORT, LAST_PORT = 15000, 29999  # below those that systems hand out by themselves
NUM_PORTS = 16  # that are tried, one after the other
ANSWER_TIMEOUT = 3  # seconds for a host to accept a connection, and for the desk to answer
MPI_TIMEOUT = 60  # seconds to find a desk of which MPI has told that it is open
HEAD_START = 2  # seconds in which only the first host is asked: rank 0 is nearly always there

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where the ranks meet.

    Attributes:
        hosts, ports: where rank 0 may be, in the order in which to look.
        identity: what all ranks of this run know, and no other run.
        has_store: the store itself is there, opened by torchrun, and no desk.
        prefix: of the run's keys in the store.
    """

    hosts: Sequence[str]
    ports: Sequence[int]
    identity: str
    has_store: bool = False
    prefix: str = "run"

    def __str__(self) -> str:
        ports = f"port {self.ports[0]}" if len(self.ports) == 1 else f"ports {self.ports[0]} to {self.ports[-1]}"
        others = f", ... ({len(self.hosts)} hosts)" if len(self.hosts) > 4 else ""
        return f"{ports} of {', '.join(self.hosts[:4])}{others}"


@dataclass(frozen=True)
class Meeting:
    """What a rank knows once all have met.

    Attributes:
        hosts: host name of every rank.
        connect: makes a new connection to the store.
        interface: network interface by which this rank reaches the others; None if it is not known.
        open_store: rank 0's store, which lasts as long as this does.
    """

    hosts: list[str]
    connect: Callable[[], dist.Store]
    interface: str | None
    open_store: dist.Store | None = None


def meet(world: World) -> Meeting:
    """Wait until all ranks have found rank 0, for at most 15 minutes (GUIDED_DIFFUSION_MEETING_TIMEOUT, in seconds).

    Signals are handled meanwhile. Raises UserError, which names the ranks that are missing or who cannot be reached.
    """
    seconds = seconds_from("GUIDED_DIFFUSION_MEETING_TIMEOUT", 900)
    place = _place(world) if world.mpi_comm is None else None
    store = listener = None
    if world.rank == 0 and not (place and place.has_store):
        store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=seconds), wait_for_workers=False)
        listener = _listen(place.ports if place else [0], local=world.one_node)
    if place is None:
        told = None
        if listener is not None:
            hosts = ["127.0.0.1"] if world.one_node else _own_addresses()
            told = Place(hosts, [listener.getsockname()[1]], secrets.token_hex(16))
        place = world.mpi_comm.bcast(told)
        seconds = min(seconds, MPI_TIMEOUT)
    if listener is not None:
        threading.Thread(target=_answer_all, args=(listener, place.identity, store.port), daemon=True).start()
    try:
        return in_background(_meet, world, place, store, seconds, seconds=seconds + 30)
    except TimeoutError:  # inside PyTorch
        raise UserError(f"{_name(world)} did not meet the others within {seconds:g} s, at {place}") from None
    finally:
        if listener is not None:
            listener.close()


def _meet(world: World, place: Place, open_store: dist.Store | None, seconds: float) -> Meeting:
    deadline = time.monotonic() + seconds
    if open_store is not None:
        address = own = "127.0.0.1"
        port = open_store.port
    else:
        address, own, port = _find_rank_0(world, place, deadline, seconds)

    def connect() -> dist.Store:
        store = dist.TCPStore(address, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)
        return dist.PrefixStore(place.prefix, store)

    here = {"host": socket.gethostname(), "own": own, "store": address}
    ranks = _wait_for_all(connect(), world, here, deadline, seconds)
    # A rank beside the store reached it by an address that means nothing elsewhere: use the one that others came by.
    elsewhere = [rank["store"] for rank in ranks if not _is_loopback(rank["store"])]
    if _is_loopback(own) and elsewhere:
        own = elsewhere[0]
    return Meeting([rank["host"] for rank in ranks], connect, interface_of(own), open_store)


# The place


def _place(world: World) -> Place:
    """Where ranks meet that do without MPI."""
    ports = [number_from("MASTER_PORT")] if "MASTER_PORT" in os.environ else None
    if world.launcher == "torchrun":
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        run = f"torchrun {os.environ.get('TORCHELASTIC_RUN_ID')} attempt {attempt} ranks {world.size}"
        has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Place([os.environ["MASTER_ADDR"]], ports or [], run, has_store, f"run/{attempt}/{world.size}")
    job, step = number_from("SLURM_JOB_ID"), number_from("SLURM_STEP_ID")
    names = ["SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]
    if "SLURM_HET_SIZE" not in os.environ:  # each component of a heterogeneous step has an srun port of its own
        names.append("SLURM_SRUN_COMM_PORT")
    run = f"ranks {world.size} " + " ".join(f"{name}={os.environ.get(name)}" for name in names)
    hosts = ["127.0.0.1"] if world.one_node else expand_node_list(os.environ["SLURM_STEP_NODELIST"])
    if "MASTER_ADDR" in os.environ:
        hosts = [os.environ["MASTER_ADDR"]]
    count = LAST_PORT - FIRST_PORT + 1
    return Place(hosts, ports or [FIRST_PORT + (31 * job + step + i) % count for i in range(NUM_PORTS)], run)


def _own_addresses() -> list[str]:
    """By which others may reach this node: its name, then the address that it sends from."""
    addresses = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: this asks the routing table
            addresses.append(probe.getsockname()[0])
        except OSError:
            pass  # a cluster without a way out
    return addresses


# Rank 0's desk


def _listen(ports: Sequence[int], local: bool) -> socket.socket:
    """Open the first of the ports that is free: on the node's loopback interface if `local`, else on all interfaces."""
    for port in ports:
        try:
            if local:
                return socket.create_server(("127.0.0.1", port), backlog=1024)
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            except (OSError, ValueError) as error:
                if getattr(error, "errno", None) == errno.EADDRINUSE:
                    raise
                return socket.create_server(("", port), backlog=1024)  # no IPv6 here
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    taken = f"port {ports[0]} is" if len(ports) == 1 else f"the ports {ports[0]} to {ports[-1]} are all"
    raise UserError(
        f"the ranks cannot meet: {taken} taken on {socket.gethostname()}. Set MASTER_PORT to a free port, for all ranks"
    )


def _answer_all(listener: socket.socket, identity: str, port: int) -> None:
    """Tell the store's port to everybody who knows this run's identity, until the listener is closed."""
    digest = _digest(identity)

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(ANSWER_TIMEOUT)
            try:
                if connection.makefile("rb").readline(100).strip() == digest:
                    connection.sendall(digest + b" %d\n" % port)
            except OSError:
                pass  # whoever it was has left

    listener.settimeout(0.5)  # closing it does not wake a thread that waits for connections
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        except OSError:
            return
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def _digest(identity: str) -> bytes:
    return hashlib.sha256(identity.encode()).hexdigest().encode()


# The other ranks look for it


def _find_rank_0(world: World, place: Place, deadline: float, seconds: float) -> tuple[str, str, int]:
    """Ask at every host and port, again and again. Returns (address of the store, own address, port of the store)."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    found = threading.Event()
    problems: dict[str, str] = {}

    def look(hosts: Sequence[str]) -> None:
        pause = 0.1
        while not found.is_set():
            for host in hosts:
                for port in place.ports:
                    try:
                        return answers.put(_ask(host, port, place))
                    except OSError as error:
                        problems[host] = error.strerror or str(error) or type(error).__name__
            found.wait(pause)
            pause = min(2 * pause, 2)
        return None

    threads = 64  # at most; few jobs have more hosts
    groups = [place.hosts[:1], *(place.hosts[1 + i :: threads] for i in range(min(threads, len(place.hosts) - 1)))]
    try:
        for number, hosts in enumerate(groups):
            threading.Thread(target=look, args=(hosts,), daemon=True).start()
            if number == 0:
                try:
                    return answers.get(timeout=min(HEAD_START, max(0, deadline - time.monotonic())))
                except queue.Empty:
                    continue
        return answers.get(timeout=max(0, deadline - time.monotonic()))
    except queue.Empty:
        what = "torchrun's store" if place.has_store else "rank 0"
        why = "; ".join(f"{host}: {problem}" for host, problem in list(problems.items())[:4]) or "no answer"
        raise UserError(
            f"{_name(world)} did not find {what} within {seconds:g} s, at {place} ({why}).\n"
            "Do host names resolve to the right addresses, and may nodes open connections to each other?"
        ) from None
    finally:
        found.set()


def _ask(host: str, port: int, place: Place) -> tuple[str, str, int]:
    """As `_find_rank_0`, at one place. Raises OSError."""
    with socket.create_connection((host, port), timeout=ANSWER_TIMEOUT) as connection:
        address, own = connection.getpeername()[0], connection.getsockname()[0]
        if place.has_store:
            return address, own, port
        digest = _digest(place.identity)
        connection.sendall(digest + b"\n")
        words = connection.makefile("rb").readline(100).split()
    if len(words) != 2 or words[0] != digest:
        raise OSError("another program answers")
    store_port = int(words[1])
    try:
        socket.create_connection((address, store_port), timeout=ANSWER_TIMEOUT).close()
    except OSError as error:
        raise OSError(f"it answers on port {port}, but not on port {store_port}: {error.strerror or error}") from error
    return address, own, store_port


def _wait_for_all(
    store: dist.Store, world: World, here: dict[str, str], deadline: float, seconds: float
) -> list[dict[str, str]]:
    """What every rank tells of itself, by rank. Raises UserError, on all ranks, if one does not come."""
    store.set(f"here/{world.rank}", json.dumps(here))
    if world.rank == 0:
        missing = set(range(world.size))
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not store.check([f"here/{rank}"])}
            time.sleep(0.02)
        told: dict = {"missing": sorted(missing)}
        if not missing:
            told["ranks"] = [json.loads(store.get(f"here/{rank}")) for rank in range(world.size)]
        store.set("world", json.dumps(told))
    else:
        pause = 0.005
        while not store.check(["world"]) and time.monotonic() < deadline + 10:  # rank 0 started its clock later
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        told = json.loads(store.get("world")) if store.check(["world"]) else {"missing": [0]}
    if missing := told["missing"]:
        if world.rank == 0:
            time.sleep(1)  # the others read why, while the store is there
        which = f"rank(s) {', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}"
        error = UserError(
            f"{which} of {world.size} did not come within {seconds:g} s ({world.launcher}; rank 0 is on "
            f"{socket.gethostname() if world.rank == 0 else here['store']}): see their output, and those nodes"
        )
        error.on_all_ranks = True
        raise error
    return told["ranks"]


def _name(world: World) -> str:
    return f"rank {world.rank} of {world.size} on {socket.gethostname()} ({world.launcher})"


# Network interfaces


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this address; None if there is none, or this system does not tell."""
    names = [name for _, name in socket.if_nameindex()]
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.is_loopback:
        return next((name for name in ("lo", "lo0") if name in names), None)
    if wanted.version == 6:
        for line in _lines("/proc/net/if_inet6"):
            number, *_, name = line.split()
            if ipaddress.IPv6Address(int(number, 16)) == wanted:
                return name
        return None
    return next((name for name in names if _ipv4_address(name) == str(wanted)), None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _ipv4_address(interface: str) -> str | None:
    """The address of an interface on Linux."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(s, 0x8915, request)[20:24])  # SIOCGIFADDR
    except (ImportError, OSError):
        return None
