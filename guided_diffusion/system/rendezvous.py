"""How the ranks find each other.

Rank 0 opens the key-value store of torch.distributed on any free port, and a small port server at an address that the
other ranks can derive from the environment. The server tells the store's port to ranks of the same run only. If two
runs on one node derive the same port, the second one takes the next.
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

import torch.distributed as dist

from ..errors import UserError
from .launchers import World, expand_node_list, int_from
from .waiting import in_background, seconds_from

FIRST_PORT, LAST_PORT = 15000, 29999  # below the ephemeral ports
NUM_PORTS = 16  # ports to try
ANSWER_TIMEOUT = 3  # seconds for a host to accept a connection, and for the port server to answer
MPI_TIMEOUT = 60  # seconds to find the port server if MPI has announced it
HEAD_START = 2  # seconds before hosts other than the first are asked: rank 0 is nearly always on the first


@dataclass(frozen=True)
class Place:
    """Where the ranks meet.

    Attributes:
        hosts, ports: candidates for rank 0's address, in the order to try.
        identity: text that only ranks of this run know.
        has_store: whether torchrun's store is at this address, instead of a port server.
        prefix: prefix of the run's keys in the store.
    """

    hosts: Sequence[str]
    ports: Sequence[int]
    identity: str
    has_store: bool = False
    prefix: str = "run"

    def __str__(self) -> str:
        ports = f"port {self.ports[0]}" if len(self.ports) == 1 else f"ports {self.ports[0]} to {self.ports[-1]}"
        more = f", ... ({len(self.hosts)} hosts)" if len(self.hosts) > 4 else ""
        return f"{ports} of {', '.join(self.hosts[:4])}{more}"


@dataclass(frozen=True)
class Meeting:
    """What a rank knows once all ranks have met.

    Attributes:
        hosts: host name of every rank.
        connect: function that makes a new connection to the store.
        interface: network interface through which this rank reaches the others; None if unknown.
        open_store: rank 0's store, which closes when this object is deleted.
    """

    hosts: list[str]
    connect: Callable[[], dist.Store]
    interface: str | None
    open_store: dist.Store | None = None


def meet(world: World) -> Meeting:
    """Wait until all ranks have found rank 0, for at most 15 minutes (GUIDED_DIFFUSION_MEETING_TIMEOUT, in seconds).

    Signals are handled in the meantime. Raises UserError that names missing ranks or unreachable hosts.
    """
    seconds = seconds_from("GUIDED_DIFFUSION_MEETING_TIMEOUT", 900)
    place = _place(world) if world.mpi_comm is None else None
    store = server = None
    if world.rank == 0 and not (place and place.has_store):
        store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=seconds), wait_for_workers=False)
        server = _listen(place.ports if place else [0], local=world.one_node)
    if place is None:
        announced = None
        if server is not None:
            hosts = ["127.0.0.1"] if world.one_node else _own_addresses()
            announced = Place(hosts, [server.getsockname()[1]], secrets.token_hex(16))
        place = world.mpi_comm.bcast(announced)
        seconds = min(seconds, MPI_TIMEOUT)
    if server is not None:
        threading.Thread(target=_serve_port, args=(server, place.identity, store.port), daemon=True).start()
    try:
        return in_background(_meet, world, place, store, seconds, seconds=seconds + 30)
    except TimeoutError:  # inside PyTorch
        raise UserError(f"{_name(world)} did not meet the others within {seconds:g} s, at {place}") from None
    finally:
        if server is not None:
            server.close()


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
    # Ranks on the store's node reach it through the loopback interface; other nodes need the address they used.
    elsewhere = [rank["store"] for rank in ranks if not _is_loopback(rank["store"])]
    if _is_loopback(own) and elsewhere:
        own = elsewhere[0]
    return Meeting([rank["host"] for rank in ranks], connect, interface_of(own), open_store)


def _place(world: World) -> Place:
    """Meeting place of ranks started without MPI."""
    ports = [int_from("MASTER_PORT")] if "MASTER_PORT" in os.environ else None
    if world.launcher == "torchrun":
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        run = f"torchrun {os.environ.get('TORCHELASTIC_RUN_ID')} attempt {attempt} ranks {world.size}"
        has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Place([os.environ["MASTER_ADDR"]], ports or [], run, has_store, f"run/{attempt}/{world.size}")
    job, step = int_from("SLURM_JOB_ID"), int_from("SLURM_STEP_ID")
    names = ["SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"]
    if "SLURM_HET_SIZE" not in os.environ:  # components of a heterogeneous step have different srun ports
        names.append("SLURM_SRUN_COMM_PORT")
    run = f"ranks {world.size} " + " ".join(f"{name}={os.environ.get(name)}" for name in names)
    hosts = ["127.0.0.1"] if world.one_node else expand_node_list(os.environ["SLURM_STEP_NODELIST"])
    if "MASTER_ADDR" in os.environ:
        hosts = [os.environ["MASTER_ADDR"]]
    count = LAST_PORT - FIRST_PORT + 1
    return Place(hosts, ports or [FIRST_PORT + (31 * job + step + i) % count for i in range(NUM_PORTS)], run)


def _own_addresses() -> list[str]:
    """Addresses of this node for other nodes: its host name, then the source address of outgoing packets."""
    addresses = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, only queries the routing table
            addresses.append(probe.getsockname()[0])
        except OSError:
            pass  # no route out of the cluster
    return addresses


# Rank 0's port server


def _listen(ports: Sequence[int], local: bool) -> socket.socket:
    """Listen on the first free port, on the loopback interface if `local`, else on all interfaces."""
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
    taken = f"port {ports[0]} is" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]} are all"
    raise UserError(
        f"the ranks cannot meet: {taken} taken on {socket.gethostname()}. Set MASTER_PORT to a free port on all ranks"
    )


def _serve_port(server: socket.socket, identity: str, port: int) -> None:
    """Send the store's port to every client that knows this run's identity, until the server is closed."""
    digest = _digest(identity)

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(ANSWER_TIMEOUT)
            try:
                if connection.makefile("rb").readline(100).strip() == digest:
                    connection.sendall(digest + b" %d\n" % port)
            except OSError:
                pass  # the client is gone

    server.settimeout(0.5)  # closing does not wake a thread that waits in accept()
    while True:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        except OSError:
            return
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def _digest(identity: str) -> bytes:
    return hashlib.sha256(identity.encode()).hexdigest().encode()


# The other ranks


def _find_rank_0(world: World, place: Place, deadline: float, seconds: float) -> tuple[str, str, int]:
    """Try every host and port until one answers. Returns (address of the store, own address, port of the store)."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    done = threading.Event()
    problems: dict[str, str] = {}

    def search(hosts: Sequence[str], pause: float) -> None:
        while not done.wait(pause):
            for host in hosts:
                for port in place.ports:
                    try:
                        answers.put(_ask(host, port, place))
                        return
                    except OSError as error:
                        problems[host] = error.strerror or str(error) or type(error).__name__
            pause = min(2 * pause + 0.1, 2)

    threads = 64  # at most; few jobs have more hosts
    groups = [place.hosts[:1], *(place.hosts[1 + i :: threads] for i in range(min(threads, len(place.hosts) - 1)))]
    for number, hosts in enumerate(groups):
        threading.Thread(target=search, args=(hosts, HEAD_START if number else 0), daemon=True).start()
    try:
        return answers.get(timeout=max(0, deadline - time.monotonic()))
    except queue.Empty:
        target = "torchrun's store" if place.has_store else "rank 0"
        why = "; ".join(f"{host}: {problem}" for host, problem in list(problems.items())[:4]) or "no answer"
        raise UserError(
            f"{_name(world)} did not find {target} within {seconds:g} s, at {place} ({why}).\n"
            "Do host names resolve to the right addresses, and can nodes connect to each other?"
        ) from None
    finally:
        done.set()


def _ask(host: str, port: int, place: Place) -> tuple[str, str, int]:
    """As `_find_rank_0`, at one host and port. Raises OSError."""
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
    """Each rank's `here`, by rank. Raises UserError on all ranks if one is missing."""
    store.set(f"here/{world.rank}", json.dumps(here))
    if world.rank == 0:
        missing = set(range(world.size))
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not store.check([f"here/{rank}"])}
            time.sleep(0.02)
        answer: dict = {"missing": sorted(missing)}
        if not missing:
            answer["ranks"] = [json.loads(store.get(f"here/{rank}")) for rank in range(world.size)]
        store.set("world", json.dumps(answer))
    else:
        pause = 0.005
        while not store.check(["world"]) and time.monotonic() < deadline + 10:  # rank 0's clock may have started later
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        answer = json.loads(store.get("world")) if store.check(["world"]) else {"missing": [0]}
    if missing := answer["missing"]:
        if world.rank == 0:
            time.sleep(1)  # keep the store open while the others read the answer
        which = f"rank(s) {', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}"
        error = UserError(
            f"{which} of {world.size} did not arrive within {seconds:g} s ({world.launcher}; rank 0 is on "
            f"{socket.gethostname() if world.rank == 0 else here['store']}): see their output, and those nodes"
        )
        error.on_all_ranks = True
        raise error
    return answer["ranks"]


def _name(world: World) -> str:
    return f"rank {world.rank} of {world.size} on {socket.gethostname()} ({world.launcher})"


# Network interfaces


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """Name of the network interface with this address; None if there is none, or if the system cannot tell."""
    names = [name for _, name in socket.if_nameindex()]
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.is_loopback:
        return next((name for name in ("lo", "lo0") if name in names), None)
    if wanted.version == 4:
        return next((name for name in names if _ipv4_address(name) == str(wanted)), None)
    table = Path("/proc/net/if_inet6")
    rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    return next((name for number, *_, name in rows if ipaddress.IPv6Address(int(number, 16)) == wanted), None)


def _ipv4_address(interface: str) -> str | None:
    """Address of an interface, on Linux."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(s, 0x8915, request)[20:24])  # SIOCGIFADDR
    except (ImportError, OSError):
        return None
