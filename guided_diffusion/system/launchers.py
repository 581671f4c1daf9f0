"""Who started this process, and which of how many it is."""

import os
import warnings
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line

# The ranks that launchers tell. A torchrun may be started by another of them: then it takes both to be the first.
_RANKS = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID", "RANK")
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


def number_from(variable: str) -> int:
    """A whole number that the launcher left in the environment. Raises UserError if it is not there."""
    value = os.environ.get(variable)
    if value is None or not value.strip().isdigit():
        raise UserError(f"the launcher's {variable} should be a whole number, but is {value!r}")
    return int(value)


def find_world() -> World:
    """This process's place, by the rules in the docstring of `setup_dist`.

    Raises UserError if it is in doubt, for the first process to report.
    """
    try:
        return _find_world()
    except UserError as error:
        error.on_all_ranks = True
        raise


def is_first() -> bool:
    """Whether this is the first process by all that launchers say, before the ranks have met."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def _find_world() -> World:
    sizes = {name: number_from(name) for name in (*_MPIEXEC, "PMI_SIZE") if name in os.environ}
    by_mpiexec = not sizes.keys().isdisjoint(_MPIEXEC)
    step = {}
    if "SLURM_STEP_ID" in os.environ and not by_mpiexec:  # mpiexec uses srun to start its daemons, one task per node
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
        step = {tasks: number_from(tasks)}
    if all(name in os.environ for name in _TORCHRUN):
        return _torchrun_world(sizes | step)
    if step and len({*sizes.values(), *step.values()}) == 1:  # PMI_SIZE, where there is one, is srun's own
        world = _slurm_world(step[tasks])
    else:
        world = _mpi_world(sizes)
    if "WORLD_SIZE" in os.environ and number_from("WORLD_SIZE") > world.size:
        missing = ", ".join(name for name in _TORCHRUN if name not in os.environ)
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but {world.launcher} makes {world.size} "
            f"rank(s), and torchrun's {missing} are not set.\nStart with torchrun, or unset WORLD_SIZE."
        )
    return world


def _loaded_from(library: str) -> str:
    """Where this process has loaded a library from, as " in FOLDER", if Linux tells."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ""
    paths = (line[line.index("/") :] for line in lines if f"/{library}." in line)
    return next((f" in {os.path.dirname(path)}" for path in paths), "")


def _torchrun_world(sizes: dict[str, int]) -> World:
    size = number_from("WORLD_SIZE")
    # torchrun itself may be started once per node, by mpiexec or srun: then it, not its ranks, is what these count.
    name = "GROUP_WORLD_SIZE" if "GROUP_WORLD_SIZE" in os.environ else "WORLD_SIZE"
    starts = number_from(name)
    for other, count in sizes.items():
        if other != "MPI_LOCALNRANKS" and count not in (1, starts):
            raise UserError(
                f"two launchers disagree: torchrun's environment says {size} rank(s) in all ({name}={starts}), another "
                f"launcher's says {count} ({other}={count}).\nUse one launcher: torchrun or mpiexec or srun."
            )
    local_size = number_from("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else 0
    return World(number_from("RANK"), size, number_from("LOCAL_RANK"), "torchrun", one_node=local_size == size)


def _slurm_world(size: int) -> World:
    if size == 1:
        return World(launcher="srun")
    one_node = len(expand_node_list(os.environ.get("SLURM_STEP_NODELIST", ""))) < 2
    return World(number_from("SLURM_PROCID"), size, number_from("SLURM_LOCALID"), "srun", one_node)


def expand_node_list(text: str) -> list[str]:
    """The hosts of a node list in Slurm's short form: "r[1-2]n[08-09],x" -> r1n08, r1n09, r2n08, r2n09, x."""
    return [host for name in _split(text) if name for host in _expand(name)]


def _expand(name: str) -> list[str]:
    """The hosts that one name of a node list stands for; its brackets hold numbers, ranges, or further such names."""
    start = name.find("[")
    if start < 0:
        return [name]
    depth = list(accumulate((c == "[") - (c == "]") for c in name[start:]))  # of brackets, after each character
    if 0 not in depth:
        raise UserError(f"SLURM_STEP_NODELIST has brackets that do not match: {name}")
    end = start + depth.index(0)
    numbers: list[str] = []
    for item in _split(name[start + 1 : end]):
        first, dash, last = item.partition("-")
        if dash and first.isdigit() and last.isdigit():  # leading zeros are part of the names
            numbers += [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        else:
            numbers += _expand(item)
    return [name[:start] + number + rest for number in numbers for rest in _expand(name[end + 1 :])]


def _split(text: str) -> list[str]:
    """`text` at the commas that are outside all brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _mpi_world(sizes: dict[str, int]) -> World:
    """MPI's world, after comparing it with what the launcher's variables say; one process where there is no MPI."""
    if not sizes and "PMIX_RANK" in os.environ:
        sizes = {"PMIX_RANK": number_from("PMIX_RANK") + 1}  # a launcher that tells ranks, but not how many there are
    name, expected = max(sizes.items(), key=lambda item: item[1], default=("", 1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of another MPI's launcher: it is looked at below
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
            f"the MPI launcher says {expected} ranks ({name}={os.environ[name]}), mpi4py's MPI says {comm.size}: the "
            f"launcher belongs to another MPI library.\nUse the mpiexec of the one that mpi4py loads, "
            f"{first_line(MPI.Get_library_version()).split(',')[0].strip()}{_loaded_from('libmpi')}, or "
            f"torchrun --nproc_per_node {expected}"
        )
    if comm.size == 1:
        return World()
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    return World(comm.rank, comm.size, local.rank, "mpiexec", local.size == comm.size, comm)
