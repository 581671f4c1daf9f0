"""Distributed processes: ranks, their GPUs, messages between them, and loading checkpoints on all of them.

Everything works in a single process too, with or without `setup_dist()`; then nothing is communicated.
"""

import atexit
import io
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from .errors import LostPeer, UserError, first_line, print_to_stderr
from .system.checkpoint_files import read_checkpoint, read_file, read_remote, read_saved
from .system.device import check_device
from .system.files import is_remote
from .system.gpus import View, cuda_is_initialized, gpu_of, only_own
from .system.launchers import World, find_world, is_first
from .system.peers import Peers
from .system.rendezvous import Meeting, meet
from .system.waiting import in_background, seconds_from

CHUNK_SIZE = 2**28  # bytes per broadcast
REPORT_TIME = 2  # seconds for rank 0 to print an error if the ranks have not met

_world = World()
_peers: Peers | None = None
_device = "auto"
_store: Any = None  # rank 0's store, kept open until the process exits
Item = TypeVar("Item")


def setup_dist(device: str = "auto") -> None:
    """Find this process's rank, initialize `torch.distributed`, and choose a GPU. A second call only chooses the GPU.

    The ranks come from the first of these that applies:

    1. `torchrun`, or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
    2. The SLURM_ variables of a step (`srun`), unless an `mpiexec` inside the step started this process. MPI is not
       loaded, since a library built without Slurm support would abort. A batch script is one process, not a step.
    3. MPI, through mpi4py: if `mpiexec` left its variables, or if no known launcher did. Loading it takes a second.
    4. One process: mpi4py or its MPI library is missing, or MPI counts one rank.

    A rank's GPU is the one of its local rank; the others are hidden from it (CUDA_VISIBLE_DEVICES), unless CUDA is
    already initialized. If every rank sees a different first GPU (as with Slurm's --gpus-per-task), each uses its
    first. CPU tensors use Gloo, CUDA tensors NCCL. `device` is "cpu", "cuda", or "auto" (a GPU if there is one).

    Ranks must meet within 15 minutes (GUIDED_DIFFUSION_MEETING_TIMEOUT, in seconds). Collectives of torch.distributed
    time out after 30 minutes (GUIDED_DIFFUSION_COLLECTIVE_TIMEOUT). `barrier`, `broadcast_object`, `gather_objects` and
    functions built on them wait as long as all ranks are alive. Signals are handled in the meantime.

    Raises UserError if launchers disagree (every rank would do all of the work), if ranks do not meet, if a node has
    more ranks than GPUs, or if PyTorch cannot use the GPU and `device` is not "cpu".
    """
    global _world
    if not dist.is_initialized():
        try:
            _world = find_world()
        except UserError as error:
            raise_together(error)
        _join(_world, device)
        atexit.register(cleanup)  # closes connections, so that no rank waits for one that failed alone
    on_every_rank(use_device, device)
    _world = _with_gpu(_world)


def _join(world: World, device: str) -> None:
    """Meet the other ranks, start monitoring them, and initialize torch.distributed."""
    global _peers, _store
    timeout = timedelta(seconds=seconds_from("GUIDED_DIFFUSION_COLLECTIVE_TIMEOUT", 1800))
    try:
        if world.size == 1:
            loopback = next(iter({"lo", "lo0"} & {name for _, name in socket.if_nameindex()}), None)
            with _gloo_interface(loopback):
                store = dist.HashStore()
                dist.init_process_group(_backend(device), store=store, rank=0, world_size=1, timeout=timeout)
            return
        meeting = meet(world)
        _store = meeting.open_store
        _peers = Peers(world.rank, meeting.hosts, meeting.connect, _exit_stuck)
        if device != "cpu":
            _hide_other_gpus(_peers, world)
        with _gloo_interface(meeting.interface):
            _init_process_group(_backend(device), world, meeting, timeout)
    except LostPeer:
        raise
    except RuntimeError as error:
        if world.size > 1:
            raise UserError(f"the {world.size} ranks of {world.launcher} did not meet: {first_line(error)}") from error
        # A single process needs no network, not even a loopback interface.


def _backend(device: str) -> str:
    """Backends of torch.distributed. Initializes CUDA."""
    return "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"


def _init_process_group(backend: str, world: World, meeting: Meeting, timeout: timedelta) -> None:
    """Initialize torch.distributed, which connects every rank to every other."""
    seconds = seconds_from("GUIDED_DIFFUSION_MEETING_TIMEOUT", 900)

    def connect() -> None:
        store = dist.PrefixStore("torch", meeting.connect())
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)

    try:
        in_background(connect, seconds=seconds, check=check_peers)
    except LostPeer:
        raise
    except (TimeoutError, RuntimeError) as error:
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "that of its host name")
        why = f"no answer within {seconds:g} s" if isinstance(error, TimeoutError) else first_line(error)
        raise UserError(
            f"rank {world.rank} on {socket.gethostname()} found the other ranks, but cannot connect to all of them "
            f"({why}).\nIts network interface is {interface} (change it with GLOO_SOCKET_IFNAME). Can nodes connect "
            "to each other?"
        ) from error


@contextmanager
def _gloo_interface(interface: str | None) -> Iterator[None]:
    """Have Gloo use a network interface, unless the user has set one. Child processes do not inherit the setting.

    By default, Gloo uses the address of the host name, which may not resolve or may be wrong. NCCL finds fast
    interfaces by itself.
    """
    change = interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ
    if change:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        yield
    finally:
        if change:
            del os.environ["GLOO_SOCKET_IFNAME"]


def cleanup() -> None:
    """Leave `torch.distributed`; called at exit. Rank 0 waits for the others, since its process serves the store."""
    global _peers
    if _peers is not None:
        _peers.leave()
        _peers = None
    if dist.is_initialized():
        # Gloo's thread needs the GIL to free the last collective's tensor, and `destroy_process_group` waits for that
        # thread while holding the GIL. Without a pause, both may deadlock.
        time.sleep(0.1 if dist.get_world_size() > 1 else 0)
        dist.destroy_process_group()


# Device and ranks


def use_device(choice: str) -> torch.device:
    """Choose the device of this process: "auto", "cpu" or "cuda". Returns `dev()`; raises as `check_device` does."""
    global _device
    check_device(choice)
    _device = choice
    return dev()


def dev() -> torch.device:
    """Device of this rank: its GPU if there is one (and --device is not cpu), else the CPU."""
    if _device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if _world.gpu is None else _world.gpu)


def get_rank() -> int:
    """Rank of this process, 0 .. world size - 1."""
    return dist.get_rank() if dist.is_initialized() else _world.rank


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cores_per_rank() -> int:
    """Number of CPU cores per process, after dividing those that several ranks of a node share."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return max(1, (os.cpu_count() or 1) // _world.num_local_ranks)
    mine = (socket.gethostname(), frozenset(os.sched_getaffinity(0)))
    return max(1, len(mine[1]) // gather_objects(mine).count(mine))


def is_main() -> bool:
    """Whether this is rank 0."""
    return get_rank() == 0


# Messages between ranks


def barrier() -> None:
    """Wait for all ranks. Raises LostPeer if one is gone."""
    gather_objects(None)


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` (pickled), on every rank. Raises LostPeer if a rank is gone."""
    if get_world_size() == 1:
        return value
    if _peers is not None:
        return _peers.broadcast(value)
    box = [value]  # the caller initialized torch.distributed
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: Any, meanwhile: Callable[[], None] | None = None) -> list:
    """The `value` (pickled) of every rank, in order, on every rank. Raises LostPeer if a rank is gone.

    Rank 0 calls `meanwhile` every second while it waits.
    """
    if get_world_size() == 1:
        return [value]
    if _peers is not None:
        return _peers.gather(value, meanwhile)
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def claimed(items: Sequence[Item]) -> Iterator[Item]:
    """Yield the items that this rank takes, in order: each time, the next one that no rank has taken yet.

    All ranks must call this, with the same items.
    """
    if _peers is None:  # a single process; or the caller initialized torch.distributed, and shares are fixed
        return iter(items[get_rank() :: get_world_size()])
    return _taken(items, _peers.start_counter())


def _taken(items: Sequence[Item], take: Callable[[], int]) -> Iterator[Item]:
    while (number := take()) < len(items):
        yield items[number]


def note_work(amount: int) -> int:
    """Note work that this rank has done on the items that it `claimed` last.

    On rank 0, returns how much the others have done since the last call, as far as it knows; elsewhere 0.
    """
    return 0 if _peers is None else _peers.note_work(amount)


def check_peers() -> None:
    """Raise LostPeer if another rank is gone. Cheap: for loops that do not communicate."""
    if _peers is not None:
        _peers.check()


def on_main(function: Callable, *args: Any) -> Any:
    """Call `function(*args)` on rank 0; every rank returns its result, or raises its UserError or OSError."""
    if get_world_size() == 1:
        return function(*args)
    result, error = broadcast_object(_result_or_error(function, *args) if is_main() else None)
    if error is not None:
        raise_together(error)
    return result


def on_every_rank(function: Callable, *args: Any) -> Any:
    """Call `function(*args)` on every rank. If any rank raises a UserError or OSError, all raise the first one."""
    if get_world_size() == 1:
        return function(*args)
    result, error = _result_or_error(function, *args)
    for rank, first in enumerate(gather_objects(error)):
        if first is not None:  # rank 0 prints it, so it must name the rank
            raise_together(UserError(f"rank {rank}: {first}") if rank and isinstance(first, UserError) else first)
    return result


def first_on_each_node(function: Callable, *args: Any) -> Any:
    """`on_every_rank`, but one rank of each node goes first: the others find what it leaves in caches on disk."""
    goes_first = _world.local_rank == 0
    result = on_every_rank(lambda: function(*args) if goes_first else None)
    later = on_every_rank(lambda: None if goes_first else function(*args))
    return result if goes_first else later


def _result_or_error(function: Callable, *args: Any) -> tuple[Any, Exception | None]:
    """Result of a call, and its UserError or OSError in a form that can be pickled."""
    try:
        return function(*args), None
    except UserError as error:
        return None, error
    except OSError as error:  # subclasses may not unpickle; Python recreates the right one from errno
        plain = OSError(str(error)) if error.errno is None else OSError(error.errno, error.strerror, error.filename)
        return None, plain.with_traceback(error.__traceback__)


def raise_together(error: Exception) -> NoReturn:
    """Raise an error that all ranks raise, so that only rank 0 prints it."""
    error.on_all_ranks = True
    raise error


def sync_params(params: Iterable[torch.Tensor], chunk_size: int = CHUNK_SIZE) -> None:
    """Copy rank 0's `params` to every rank, in place, with at most `chunk_size` bytes per message."""
    if get_world_size() == 1:
        return
    with torch.no_grad():
        for p in params:
            values = p.contiguous()
            for chunk in values.view(-1).view(torch.uint8).split(chunk_size):  # bytes: Gloo lacks some dtypes
                dist.broadcast(chunk, src=0)
            if values is not p:
                p.copy_(values)


# Errors and exit


def should_report(error: BaseException) -> bool:
    """Whether this rank prints `error`: rank 0 does for all if all raised it."""
    if isinstance(error, LostPeer):
        return _peers is None or _peers.reporter() == get_rank()
    if not getattr(error, "on_all_ranks", False):
        return True
    return is_main() if dist.is_initialized() or _peers is not None else _world.rank == 0 and is_first()


def lost_peer_behind(error: BaseException) -> LostPeer | None:
    """The lost peer that caused an error, such as PyTorch's for a broken connection; None if there is none."""
    if isinstance(error, LostPeer):
        return error
    if _peers is None or not isinstance(error, RuntimeError):
        return None
    is_connection = re.search("gloo|nccl|c10d|connection|socket", str(error), re.IGNORECASE)
    return _peers.wait_for_lost_peer() if is_connection else None


def report_and_leave(error: BaseException, message: str) -> None:
    """Print why this process exits, once for all ranks, and notify the other ranks.

    A silent rank waits for the one that prints, since a launcher may kill all processes once one exits. After some
    seconds it prints the message itself.
    """
    global _peers
    reports = should_report(error)
    if reports:
        print_to_stderr(message)
    if _peers is None:
        time.sleep(0 if reports else REPORT_TIME)
        return
    lost = isinstance(error, LostPeer)
    reporter = None if reports else _peers.reporter() if lost else 0
    if signum := getattr(error, "signum", 0):
        others_left = _peers.leave("failed", f"was stopped by {signal.Signals(signum).name}", reporter)
    elif lost or getattr(error, "on_all_ranks", False):
        others_left = _peers.leave("followed", str(error) if lost else "", reporter)
    else:
        others_left = _peers.leave("failed", f"failed: {first_line(error)}")
    if lost and not reports and not others_left:
        print_to_stderr(message)
    _peers = None


def leave_after_bug(error: BaseException) -> None:
    """Notify the other ranks of an exception that this rank raises with a traceback."""
    global _peers
    if _peers is not None:
        _peers.leave("failed", f"failed: {type(error).__name__}: {first_line(error)}")
        _peers = None


def _exit_stuck(error: LostPeer) -> NoReturn:
    """Exit while the main thread waits inside PyTorch for a lost rank."""
    if should_report(error):
        print_to_stderr(f"error: {error}")
    os._exit(LostPeer.status)


# Checkpoints


def load_state_dict(path: str | os.PathLike, **kwargs: Any) -> Any:
    """Load a file of torch.save: a state dict, an optimizer's state, or any tensors and containers.

    A local file is read by each rank that calls this. A remote one (gs://, az://, https://, ...) is read by rank 0 and
    sent to the others, so all ranks must call this. `kwargs` go to torch.load; by default, `map_location` is
    the CPU and `weights_only` True. Raises UserError if the file is missing or corrupted, or would run code.
    """
    # Not memory-mapped: the caller may overwrite the file.
    kwargs = {"map_location": "cpu", "weights_only": True, "mmap": False, **kwargs}
    if not is_remote(os.fspath(path)) or get_world_size() == 1:
        return read_saved(path, "the checkpoint", **kwargs)
    content = bytearray()

    def read() -> int:
        content.extend(read_remote(path, "the checkpoint"))
        return len(content)

    if size := on_main(read):
        content = content or bytearray(size)
        sync_params([torch.frombuffer(content, dtype=torch.uint8)])
    return read_file(io.BytesIO(content), path, "the checkpoint", **kwargs)


def load_weights(
    path: str | os.PathLike,
    *,
    flag: str = "--model_path",
    chunk_size: int = CHUNK_SIZE,
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, torch.Tensor]:
    """Load a network's state dict on the CPU. All ranks must call this.

    A local file is memory-mapped by each rank (if it is in torch.save's zip format), so a node stores it once. A remote
    one (gs://, az://, https://, ...) is read by rank 0 and sent to the others. Only tensors and plain containers are
    unpickled.

    Args:
        path: checkpoint file.
        flag: flag that names the file, for messages.
        chunk_size: bytes per broadcast.
        expected: names and shapes of the network's state dict, to find it in the file: see `read_checkpoint`.

    Raises UserError on all ranks if the file is missing or corrupted, or is not a dict of tensors.
    """
    kwargs = {"map_location": "cpu", "weights_only": True}
    if not is_remote(os.fspath(path)):
        return on_every_rank(read_checkpoint, path, flag, kwargs, expected)
    state = {}

    def read() -> dict:
        state.update(read_checkpoint(path, flag, kwargs, expected))
        return {name: (w.shape, w.dtype) for name, w in state.items()}

    layout = on_main(read)
    if not is_main():
        state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
    sync_params(state.values(), chunk_size)
    return state


# GPUs


def _hide_other_gpus(peers: Peers, world: World) -> None:
    """Make this rank's GPU its only one, if all ranks can, so that all compile the same code."""
    variable = "CUDA_VISIBLE_DEVICES"
    count = torch.cuda.device_count()  # initializes CUDA only if NVML does not work
    view = View(socket.gethostname(), world.local_rank, os.environ.get(variable), count, not cuda_is_initialized())
    own = only_own(world.rank, peers.gather(view))
    if own is not None:
        os.environ[variable] = own


def _with_gpu(world: World) -> World:
    """`world` with this rank's GPU and the number of ranks on its node."""
    visible = torch.cuda.device_count() if _device != "cpu" and torch.cuda.is_available() else 0
    first = None
    if visible:  # by UUID, since a container or cgroup may number each rank's own GPU 0
        first = f"{torch.cuda.get_device_properties(0).uuid} {os.environ.get('CUDA_VISIBLE_DEVICES')}"
    ranks = gather_objects((socket.gethostname(), world.local_rank, visible, first))
    try:
        gpu = gpu_of(world.rank, ranks)
    except UserError as error:
        raise_together(error)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    return replace(world, gpu=gpu, num_local_ranks=sum(host == socket.gethostname() for host, *_ in ranks))
