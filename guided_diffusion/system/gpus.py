"""Which GPU each rank of a node uses."""

import ctypes
from typing import NamedTuple

from ..errors import UserError

_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED


class View(NamedTuple):
    """What a rank knows about GPUs before CUDA is initialized.

    Attributes:
        host: host name.
        local_rank: number of the rank on its node.
        visible: value of CUDA_VISIBLE_DEVICES; None if it is not set.
        count: number of visible GPUs.
        can_hide: whether CUDA would still notice a change of CUDA_VISIBLE_DEVICES.
    """

    host: str
    local_rank: int
    visible: str | None
    count: int
    can_hide: bool


def cuda_is_initialized() -> bool:
    """Whether CUDA is initialized in this process, for instance by an MPI library; True if this cannot be found out."""
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    except (AttributeError, OSError):
        return True
    return status != _NOT_INITIALIZED


def only_own(rank: int, views: list[View]) -> str | None:
    """Value of CUDA_VISIBLE_DEVICES that hides all GPUs but a rank's own; None if ranks must share their views.

    Every rank then computes on its device 0, so that all compile the same code. This is decided for all ranks
    together: each node must have enough GPUs, with the same numbers for all of its ranks.
    """
    for view in views:
        node = [other for other in views if other.host == view.host]
        same_numbers = all(other.visible == view.visible for other in node)
        local_ranks = sorted(other.local_rank for other in node)
        if not (view.can_hide and same_numbers and view.count >= len(node) and local_ranks == list(range(len(node)))):
            return None
    mine = views[rank]
    names = [str(i) for i in range(mine.count)] if mine.visible is None else mine.visible.split(",")
    return names[mine.local_rank].strip()


def gpu_of(rank: int, ranks: list[tuple[str, int, int, str | None]]) -> int | None:
    """Index of a rank's GPU, from each rank's (host, local rank, number of visible GPUs, identity of the first).

    None if there are no GPUs. Raises UserError if a node has more ranks than GPUs.
    """
    if not any(visible for _, _, visible, _ in ranks):
        return None
    firsts = {first for _, _, _, first in ranks if first}
    if len(firsts) == len(ranks):
        return 0
    for host, local_rank, visible, _ in ranks:
        if local_rank >= visible:
            here = sum(other == host for other, *_ in ranks)
            raise UserError(
                f"{here} rank(s) on node {host}, but {visible} GPU(s) visible there (CUDA_VISIBLE_DEVICES).\n"
                "Start at most one rank per GPU (mpiexec -n, torchrun --nproc_per_node, srun --ntasks-per-node)."
            )
    return ranks[rank][1]
