"""This process's place among all processes, from the environment that launchers set."""

import os
import warnings
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..errors import UserError, first_line

# Rank variables of all launchers. One launcher may start another, such as torchrun: then rank 0 is first in both.
_RANKS = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID", "RANK")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPIEXEC = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")  # set by mpiexec, never by srun


@dataclass(frozen=True)
class World:
    """This process's rank, launcher and GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "one process"
    one_node: bool = True
    mpi_comm: Any = None
    num_local_ranks: int = 1
    gpu: int | None = None


def int_from(variable: str) -> int:
    """Integer in an environment variable of the launcher. Raises UserError if there is none."""
    value = os.environ.get(variable)
    if value is None or not value.strip().isdigit():
        raise UserError(f"the launcher's {variable} should be a whole number, but is {value!r}")
    return int(value)


def is_first() -> bool:
    """Whether this is the first process according to all launchers; for use before the ranks have met."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def find_world() -> World:
    """This process's place, by the rules in the docstring of `setup_dist`. Raises UserError if it is ambiguous."""
    sizes = {name: int_from(name) for name in (*_MPIEXEC, "PMI_SIZE") if name in os.environ}
    step = {}
    # Open MPI's mpiexec starts its daemons with srun, one task per node.
    if "SLURM_STEP_ID" in os.environ and sizes.keys().isdisjoint(_MPIEXEC):
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
        step = {tasks: int_from(tasks)}
    if all(name in os.environ for name in _TORCHRUN):
        return _torchrun_world(sizes | step)
    if step and len({*sizes.values(), *step.values()}) == 1:  # PMI_SIZE, if set, is srun's own
        world = _slurm_world(step[tasks])
    else:
        world = _mpi_world(sizes)
    if "WORLD_SIZE" in os.environ and int_from("WORLD_SIZE") > world.size:
        missing = ", ".join(name for name in _TORCHRUN if name not in os.environ)
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but {world.launcher} starts {world.size} "
            f"rank(s), and torchrun's {missing} are not set.\nStart with torchrun, or unset WORLD_SIZE."
        )
    return world


def _torchrun_world(sizes: dict[str, int]) -> World:
    size = int_from("WORLD_SIZE")
    # mpiexec or srun may start one torchrun per node; their size is then the number of torchruns.
    name = "GROUP_WORLD_SIZE" if "GROUP_WORLD_SIZE" in os.environ else "WORLD_SIZE"
    starts = int_from(name)
    for other, count in sizes.items():
        if other != "MPI_LOCALNRANKS" and count not in (1, starts):
            raise UserError(
                f"two launchers disagree: torchrun's environment has {size} rank(s) in total ({name}={starts}), "
                f"another launcher's has {count} ({other}={count}).\nUse one launcher: torchrun or mpiexec or srun."
            )
    one_node = "LOCAL_WORLD_SIZE" in os.environ and int_from("LOCAL_WORLD_SIZE") == size
    return World(int_from("RANK"), size, int_from("LOCAL_RANK"), "torchrun", one_node)


def _slurm_world(size: int) -> World:
    if size == 1:
        return World(launcher="srun")
    one_node = len(expand_node_list(os.environ.get("SLURM_STEP_NODELIST", ""))) < 2
    return World(int_from("SLURM_PROCID"), size, int_from("SLURM_LOCALID"), "srun", one_node)


def expand_node_list(text: str) -> list[str]:
    """The hosts in a Slurm node list: "r[1-2]n[08-09],x" -> r1n08, r1n09, r2n08, r2n09, x."""
    return [host for name in _split(text) if name for host in _expand(name)]


def _expand(name: str) -> list[str]:
    """The hosts that one item of a node list stands for; brackets contain numbers, ranges, or further items."""
    start = name.find("[")
    if start < 0:
        return [name]
    depth = list(accumulate((c == "[") - (c == "]") for c in name[start:]))  # bracket depth after each character
    if 0 not in depth:
        raise UserError(f"SLURM_STEP_NODELIST has unbalanced brackets: {name}")
    end = start + depth.index(0)
    numbers: list[str] = []
    for item in _split(name[start + 1 : end]):
        first, dash, last = item.partition("-")
        if dash and first.isdigit() and last.isdigit():  # keep leading zeros
            numbers += [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        else:
            numbers += _expand(item)
    return [name[:start] + number + rest for number in numbers for rest in _expand(name[end + 1 :])]


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _mpi_world(sizes: dict[str, int]) -> World:
    """MPI's world, checked against the launcher's variables; one process without MPI."""
    if not sizes and "PMIX_RANK" in os.environ:
        sizes = {"PMIX_RANK": int_from("PMIX_RANK") + 1}  # a launcher that sets ranks, but no size
    name, expected = max(sizes.items(), key=lambda item: item[1], default=("", 1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # about another MPI's launcher, which is checked below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        if expected > 1:
            raise UserError(
                f"an MPI launcher started {expected} ranks ({name}={os.environ[name]}), but mpi4py cannot be imported "
                f"({first_line(error)}).\nInstall mpi4py for that MPI, or use: torchrun --nproc_per_node {expected}"
            ) from error
        return World()
    comm = MPI.COMM_WORLD
    if expected > comm.size:
        library = first_line(MPI.Get_library_version()).split(",")[0].strip()
        raise UserError(
            f"the MPI launcher started {expected} ranks ({name}={os.environ[name]}), but mpi4py's MPI counts "
            f"{comm.size}: the launcher belongs to another MPI library.\nUse the mpiexec of mpi4py's library "
            f"({library}), or torchrun --nproc_per_node {expected}"
        )
    if comm.size == 1:
        return World()
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    return World(comm.rank, comm.size, local.rank, "mpiexec", local.size == comm.size, comm)
