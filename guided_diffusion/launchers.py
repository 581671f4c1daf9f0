"""Who started this process, which of how many it is, and how they find each other."""

import os
import re
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .errors import UserError, first_line

MEETING_TIMEOUT = timedelta(minutes=15)  # for all ranks to appear

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPIEXEC = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")  # set by mpiexec, never by srun


@dataclass(frozen=True)
class World:
    """This process's place among all: what the launcher says, and its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "one process"
    one_node: bool = True
    mpi_comm: Any = None
    num_local_ranks: int = 1
    gpu: int | None = None


# Who we are


def _number(variable: str) -> int:
    value = os.environ.get(variable)
    if value is None or not value.strip().isdigit():
        raise UserError(f"the launcher's {variable} should be a whole number, but is {value!r}")
    return int(value)


def find_world() -> World:
    """This process's place, by the rules in the docstring of `setup_dist`."""
    sizes = {name: _number(name) for name in (*_MPIEXEC, "PMI_SIZE") if name in os.environ}
    by_mpiexec = not sizes.keys().isdisjoint(_MPIEXEC)
    step = {}
    if "SLURM_STEP_ID" in os.environ and not by_mpiexec:  # mpiexec uses srun to start its daemons, one task per node
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
        step = {tasks: _number(tasks)}
    if all(name in os.environ for name in _TORCHRUN):
        return _torchrun_world(sizes | step)
    if step and len({*sizes.values(), *step.values()}) == 1:  # PMI_SIZE, where there is one, is srun's own
        world = _slurm_world(step[tasks])
    else:
        world = _mpi_world(sizes)
    if "WORLD_SIZE" in os.environ and _number("WORLD_SIZE") > world.size:
        missing = ", ".join(name for name in _TORCHRUN if name not in os.environ)
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but {world.launcher} makes {world.size} "
            f"rank(s), and torchrun's {missing} are not set.\nStart with torchrun, or unset WORLD_SIZE."
        )
    return world


def _torchrun_world(sizes: dict[str, int]) -> World:
    size = _number("WORLD_SIZE")
    # torchrun itself may be started once per node, by mpiexec or srun: then it, not its ranks, is what these count.
    name = "GROUP_WORLD_SIZE" if "GROUP_WORLD_SIZE" in os.environ else "WORLD_SIZE"
    starts = _number(name)
    for other, count in sizes.items():
        if other != "MPI_LOCALNRANKS" and count not in (1, starts):
            raise UserError(
                f"two launchers disagree: torchrun's environment says {size} rank(s) in all ({name}={starts}), another "
                f"launcher's says {count} ({other}={count}).\nUse one launcher: torchrun or mpiexec or srun."
            )
    local_size = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else 0
    return World(_number("RANK"), size, _number("LOCAL_RANK"), "torchrun", one_node=local_size == size)


def _slurm_world(size: int) -> World:
    if size == 1:
        return World(launcher="srun")
    one_node = re.search(r"[,\[]", os.environ.get("SLURM_STEP_NODELIST", "")) is None
    return World(_number("SLURM_PROCID"), size, _number("SLURM_LOCALID"), "srun", one_node)


def _mpi_world(sizes: dict[str, int]) -> World:
    """MPI's world, after comparing it with what the launcher's variables say; one process where there is no MPI."""
    if not sizes and "PMIX_RANK" in os.environ:
        sizes = {"PMIX_RANK": _number("PMIX_RANK") + 1}  # a launcher that tells ranks, but not how many there are
    name, expected = max(sizes.items(), key=lambda item: item[1], default=("", 1))
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, the MPI library is not
        if expected > 1:
            raise UserError(
                f"an MPI launcher started {expected} ranks ({name}={os.environ[name]}), but mpi4py cannot be imported "
                f"({first_line(error)}).\nInstall mpi4py for that MPI, or use: torchrun --nproc_per_node {expected}"
            ) from error
        return World()
    comm = MPI.COMM_WORLD
    if expected > comm.size:
        raise UserError(
            f"the MPI launcher says {expected} ranks ({name}={os.environ[name]}), mpi4py's MPI says {comm.size} "
            f"({MPI.Get_library_version().split(',')[0].strip()}): the launcher belongs to another MPI library.\n"
            'Use the mpiexec of mpi4py\'s MPI (python -c "import mpi4py; print(mpi4py.get_config())" tells which), or '
            f"torchrun --nproc_per_node {expected}"
        )
    if comm.size == 1:
        return World()
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    return World(comm.rank, comm.size, local.rank, "mpiexec", local.size == comm.size, comm)


# How the ranks meet


def meet(world: World) -> dist.Store:
    """The key-value store through which the ranks find each other."""
    if world.size == 1:
        return dist.HashStore()
    if world.launcher == "torchrun":
        return next(iter(rendezvous("env://", world.rank, world.size, timeout=MEETING_TIMEOUT)))[0]
    if world.mpi_comm is not None:
        return _meet_by_mpi(world)
    host = "127.0.0.1" if world.one_node else _first_host(os.environ["SLURM_STEP_NODELIST"])
    # Below the ports that systems hand out by themselves; the same for all tasks of a step, another for the next step.
    port = 15000 + (_number("SLURM_JOB_ID") * 31 + _number("SLURM_STEP_ID")) % 15000
    host, port = os.environ.get("MASTER_ADDR", host), _number("MASTER_PORT") if "MASTER_PORT" in os.environ else port
    return dist.TCPStore(host, port, world.size, world.rank == 0, MEETING_TIMEOUT)


def _meet_by_mpi(world: World) -> dist.Store:
    """Rank 0 listens on a port that the system chooses, and tells by MPI where."""
    comm = world.mpi_comm
    store = address = None
    if world.rank == 0:
        address = "127.0.0.1"
        store = dist.TCPStore(address, 0, world.size, True, MEETING_TIMEOUT, wait_for_workers=False)
    addresses = ["127.0.0.1"] if world.one_node else _own_addresses()
    addresses, port = comm.bcast((addresses, store and store.port))
    if store is None:
        address = next((a for a in addresses if _answers(a, port)), None)
    if None in comm.allgather(address):
        raise UserError(f"not every node can reach rank 0 at any of {', '.join(addresses)} (port {port})")
    return store or dist.TCPStore(address, port, world.size, False, MEETING_TIMEOUT)


def _first_host(node_list: str) -> str:
    """First of the hosts in Slurm's short form: "gpu[03-05,9],login1" -> "gpu03"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", node_list).split(",")[0]


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


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=10).close()
    except OSError:
        return False
    return True
