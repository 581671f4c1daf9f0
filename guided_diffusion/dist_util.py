"""Processes: which rank is this, which GPU is its own, what the ranks tell each other, and checkpoints for all of them.

Everything here works in one process too, with or without `setup_dist()`; then nothing is sent anywhere.
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

from .errors import LostPeer, UserError, first_line, say
from .system.checkpoint_files import read_checkpoint, read_file, read_remote, read_saved
from .system.device import check_device
from .system.files import is_remote
from .system.launchers import World, find_world, is_first
from .system.peers import Peers
from .system.rendezvous import Meeting, meet
from .system.waiting import in_background, seconds_from

CHUNK_SIZE = 2**28  # bytes per broadcast
SPEAKING_TIME = 2  # seconds that the first process has for its words if the ranks have not met

_world = World()
_peers: Peers | None = None
_device = "auto"
_store: Any = None  # of rank 0, which lasts as long as this does
Item = TypeVar("Item")


def setup_dist(device: str = "auto") -> None:
    """Find this process's rank, join the others in `torch.distributed`, and choose its GPU. A second call only chooses.

    The ranks come from the first of these that applies:

    1. `torchrun` (or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT).
    2. A Slurm step (`srun`), by its SLURM_ variables, unless an `mpiexec` inside the step started this process. srun's
       PMI variables describe the same ranks, so MPI is not asked; a library built without Slurm support would abort.
       A batch script is no step: it is one process.
    3. MPI, by mpi4py: whenever an `mpiexec` left its variables, and also when no launcher left any, since it may be one
       not known here. The library's start takes about a second.
    4. One process: mpi4py or its MPI library is missing, or MPI counts one rank.

    The GPU of a rank is the one of its local rank (its number on its node); or its first, if every rank is shown
    another GPU as its first (as with Slurm's --gpus-per-task). CPU tensors travel by Gloo, CUDA tensors by NCCL.

    The ranks must have met after 15 minutes (GUIDED_DIFFUSION_MEETING_TIMEOUT, in seconds), and collectives of
    torch.distributed end after 30 (GUIDED_DIFFUSION_COLLECTIVE_TIMEOUT). `barrier`, `broadcast_object`,
    `gather_objects` and what is built on them wait as long as all ranks are alive. Signals are handled meanwhile.

    Args:
        device: "cpu", "cuda", or "auto": the GPU if there is one.

    Raises UserError where launchers disagree (one that counts more ranks than MPI belongs to another MPI library: every
    rank would do all of the work), where the ranks do not meet, where a node has more ranks than GPUs, and where there
    is a GPU that PyTorch cannot use, unless `device` is "cpu".
    """
    global _world
    if not dist.is_initialized():
        _world = find_world()
        _join(_world, device)
        atexit.register(cleanup)  # closes the connections, so that no rank waits for one that failed alone
    on_every_rank(use_device, device)
    _world = _with_gpu(_world)


def _join(world: World, device: str) -> None:
    """Meet the other ranks, watch over them from now on, and set up torch.distributed."""
    global _peers, _store
    timeout = timedelta(seconds=seconds_from("GUIDED_DIFFUSION_COLLECTIVE_TIMEOUT", 1800))
    backend = "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"
    try:
        if world.size == 1:
            loopback = next(iter({"lo", "lo0"} & {name for _, name in socket.if_nameindex()}), None)
            with _gloo_uses(loopback):
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            return
        meeting = meet(world)
        _store = meeting.open_store
        _peers = Peers(world.rank, meeting.hosts, meeting.connect, _end_stuck)
        with _gloo_uses(meeting.interface):
            _connect_all(backend, world, meeting, timeout)
    except RuntimeError as error:
        if isinstance(error, LostPeer):
            raise
        if world.size > 1:
            raise UserError(f"the {world.size} ranks of {world.launcher} did not meet: {first_line(error)}") from error
        # One process without even a loopback interface: it has nobody to talk to.


def _connect_all(backend: str, world: World, meeting: Meeting, timeout: timedelta) -> None:
    """Set up torch.distributed: every rank opens a connection to every other."""
    seconds = seconds_from("GUIDED_DIFFUSION_MEETING_TIMEOUT", 900)

    def connect() -> None:
        store = dist.PrefixStore("torch", meeting.connect())
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)

    try:
        in_background(connect, seconds=seconds, check=check_peers)
    except LostPeer:
        raise
    except (TimeoutError, RuntimeError) as error:
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "the one of its host name")
        why = f"no answer within {seconds:g} s" if isinstance(error, TimeoutError) else first_line(error)
        raise UserError(
            f"rank {world.rank} on {socket.gethostname()} found the other ranks, but cannot open connections to all of "
            f"them ({why}).\nIts network interface is {interface} "
            "(GLOO_SOCKET_IFNAME sets another); may nodes open connections to each other?"
        ) from error


@contextmanager
def _gloo_uses(interface: str | None) -> Iterator[None]:
    """Have Gloo open its connections on a network interface, unless the user has chosen one.

    By itself it takes the address of the host's name, which may not resolve, or resolve to where nobody listens. NCCL
    finds interfaces by itself, and prefers the fast ones. Processes that are started later must not inherit the choice.
    """
    chosen = interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ
    if chosen:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        yield
    finally:
        if chosen:
            del os.environ["GLOO_SOCKET_IFNAME"]


def cleanup() -> None:
    """Leave `torch.distributed`. Done at exit in any case. Rank 0 waits for the others, which tell each other by it."""
    global _peers
    if _peers is not None:
        _peers.leave()
        _peers = None
    if dist.is_initialized():
        # Gloo's thread needs Python's lock to drop the tensor of the last collective. `destroy_process_group` waits for
        # that thread and holds the lock: let it finish first, or both may wait for ever.
        time.sleep(0.1 if dist.get_world_size() > 1 else 0)
        dist.destroy_process_group()


# The device


def use_device(choice: str) -> torch.device:
    """Choose where this process computes: "auto", "cpu" or "cuda". Returns `dev()`. Raises as `device.check_device`."""
    global _device
    check_device(choice)
    _device = choice
    return dev()


def dev() -> torch.device:
    """The device of this rank: its own GPU where there is one (and --device cpu was not given), else the CPU."""
    if _device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if _world.gpu is None else _world.gpu)


def get_rank() -> int:
    """Number of this process, 0 .. world size - 1."""
    return dist.get_rank() if dist.is_initialized() else _world.rank


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share_of(items: Sequence[Item], rank: int | None = None, processes: int | None = None) -> Sequence[Item]:
    """The items that this process works on, or process `rank` of `processes`: number rank, rank + processes, ..."""
    rank = get_rank() if rank is None else rank
    return items[rank :: processes or get_world_size()]


def get_local_rank() -> int:
    """Number of this process among those of its node."""
    return _world.local_rank


def num_local_ranks() -> int:
    """Number of processes on this node."""
    return _world.num_local_ranks


def cores_per_rank() -> int:
    """Number of CPU cores that this process may use, shared with the ranks of its node that may use the same ones."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return max(1, (os.cpu_count() or 1) // num_local_ranks())
    mine = (socket.gethostname(), frozenset(os.sched_getaffinity(0)))
    return max(1, len(mine[1]) // gather_objects(mine).count(mine))


def is_main() -> bool:
    """Whether this is rank 0."""
    return get_rank() == 0


# What the ranks tell each other


def barrier() -> None:
    """Wait until every rank is here. Raises LostPeer if one is gone."""
    gather_objects(None)


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank. It must pickle. Raises LostPeer if a rank is gone."""
    if get_world_size() == 1:
        return value
    if _peers is not None:
        return _peers.broadcast(value)
    box = [value]  # torch.distributed was set up by somebody else
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: Any) -> list:
    """The `value` of every rank, in the order of ranks, on every rank. They must pickle. Raises LostPeer likewise."""
    if get_world_size() == 1:
        return [value]
    if _peers is not None:
        return _peers.gather(value)
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_peers() -> None:
    """Raise LostPeer if another rank is gone: for loops that do not communicate. Costs next to nothing."""
    if _peers is not None:
        _peers.check()


def on_main(function: Callable, *args: Any) -> Any:
    """Call `function(*args)` on rank 0; every rank returns its result, or raises its UserError or OSError."""
    if get_world_size() == 1:
        return function(*args)
    result = error = None
    if is_main():
        result, error = _attempt(function, *args)
    result, error = broadcast_object((result, error))
    _raise_together(error)
    return result


def on_every_rank(function: Callable, *args: Any) -> Any:
    """Call `function(*args)` on every rank; where a rank raises a UserError or OSError, all raise the first such."""
    if get_world_size() == 1:
        return function(*args)
    result, error = _attempt(function, *args)
    for rank, found in enumerate(gather_objects(error)):
        # Rank 0 prints it, whose node may have nothing wrong.
        _raise_together(UserError(f"rank {rank}: {found}") if rank and isinstance(found, UserError) else found)
    return result


def should_report(error: BaseException) -> bool:
    """Whether this rank should print `error`: rank 0 speaks for all where all raised it together."""
    if isinstance(error, LostPeer):
        return _peers is None or _peers.reporter() == get_rank()
    if not getattr(error, "on_all_ranks", False):
        return True
    return is_main() if dist.is_initialized() or _peers is not None else _world.rank == 0 and is_first()


def explain(error: BaseException) -> LostPeer | None:
    """The lost peer behind an error, such as PyTorch's of a broken connection. None if it has another reason."""
    if isinstance(error, LostPeer):
        return error
    if _peers is None or not isinstance(error, RuntimeError):
        return None
    return _peers.explain() if re.search("gloo|nccl|c10d|connection|socket", str(error), re.IGNORECASE) else None


def end(error: BaseException, words: str) -> None:
    """Print `words` to say how this process ends, once for all ranks, and tell the other ranks.

    A rank that does not speak waits for the one that does: a launcher may end all processes as soon as one ends. After
    some seconds, it speaks nevertheless.
    """
    global _peers
    speaks = should_report(error)
    if speaks:
        say(words)
    if _peers is None:
        time.sleep(0 if speaks else SPEAKING_TIME)
        return
    lost = isinstance(error, LostPeer)
    reporter = None if speaks else _peers.reporter() if lost else 0
    if signum := getattr(error, "signum", 0):
        others_ended = _peers.leave("failed", f"was stopped by {signal.Signals(signum).name}", reporter)
    elif lost or getattr(error, "on_all_ranks", False):
        others_ended = _peers.leave("followed", str(error) if lost else "", reporter)
    else:
        others_ended = _peers.leave("failed", f"ended: {first_line(error)}")
    if lost and not speaks and not others_ended:
        say(words)
    _peers = None


def leave_alone(error: BaseException) -> None:
    """Tell the other ranks that this one ends because of an error in the program, which it prints itself."""
    global _peers
    if _peers is not None:
        _peers.leave("failed", f"ended: {type(error).__name__}: {first_line(error)}")
        _peers = None


def _end_stuck(error: LostPeer) -> NoReturn:
    """End this process while its main thread waits inside PyTorch for a rank that is gone."""
    if should_report(error):
        say(f"error: {error}")
    os._exit(LostPeer.status)


def sync_params(params: Iterable[torch.Tensor], chunk_size: int = CHUNK_SIZE) -> None:
    """Give every rank rank 0's values of `params`, in place, at most `chunk_size` bytes per message."""
    if get_world_size() == 1:
        return
    with torch.no_grad():
        for bucket in _buckets(params, chunk_size):
            flat = torch.cat([p.reshape(-1) for p in bucket]) if len(bucket) > 1 else bucket[0].reshape(-1)
            for chunk in flat.view(torch.uint8).split(chunk_size):  # bytes: not every backend knows every dtype
                dist.broadcast(chunk, src=0)
            if not is_main():
                for p, values in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    p.copy_(values.view_as(p))


# Checkpoints


def load_state_dict(path: str | os.PathLike, **kwargs: Any) -> Any:
    """What torch.save wrote to `path`: a state dict, an optimizer's state, or anything else of tensors and containers.

    A local file is read by whoever calls. A remote one (gs://, az://, https://, ...) is read by rank 0 and sent to the
    others: all ranks must call this. `kwargs` go to torch.load; by default `map_location` is the CPU and `weights_only`
    True. Raises UserError if the file is missing or damaged, or would run code.
    """
    # Read, not mapped: the caller may write to the same file.
    kwargs = {"map_location": "cpu", "weights_only": True, "mmap": False, **kwargs}
    if not is_remote(os.fspath(path)) or get_world_size() == 1:
        return read_saved(path, "the checkpoint", **kwargs)
    data = torch.empty(0, dtype=torch.uint8)

    def read() -> int:
        nonlocal data
        if content := read_remote(path, "the checkpoint"):
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return len(data)

    size = on_main(read)
    if not is_main():
        data = torch.empty(size, dtype=torch.uint8)
    sync_params([data])
    return read_file(io.BytesIO(data.numpy().tobytes()), path, "the checkpoint", **kwargs)


def load_weights(
    path: str | os.PathLike,
    *,
    flag: str = "--model_path",
    chunk_size: int = CHUNK_SIZE,
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, torch.Tensor]:
    """A network's state dict, saved in `path`, on the CPU. All ranks must call this.

    A local file is memory-mapped by each rank (if it is in torch.save's zip format), so that it is in memory once per
    node. A remote one (gs://, az://, https://, ...) is read by rank 0 and sent to the others. Nothing but tensors and
    plain containers is unpickled. Raises UserError, on all ranks, where the file is missing, no complete checkpoint, or
    holds anything but a dict of tensors; `flag` is the flag that the message names. `expected` are names and shapes of
    the network's state dict, by which that is found: see `read_checkpoint`.
    """
    kwargs = {"map_location": "cpu", "weights_only": True}
    if not is_remote(os.fspath(path)):
        state = on_every_rank(read_checkpoint, path, flag, kwargs, expected)
    else:
        state = {}

        def read() -> dict:
            state.update(read_checkpoint(path, flag, kwargs, expected))
            return {name: (w.shape, w.dtype) for name, w in state.items()}

        layout = on_main(read)
        if not is_main():
            state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        sync_params(state.values(), chunk_size)
    return state


def _with_gpu(world: World) -> World:
    """`world` with its GPU, and with the number of ranks on its node."""
    visible = torch.cuda.device_count() if _device != "cpu" and torch.cuda.is_available() else 0
    first = None
    if visible:  # the UUID, since a container or cgroup may number each rank's own GPU 0
        first = f"{torch.cuda.get_device_properties(0).uuid} {os.environ.get('CUDA_VISIBLE_DEVICES')}"
    ranks = gather_objects((socket.gethostname(), world.local_rank, visible, first))
    try:
        gpu = _gpu_of(world.rank, ranks)
    except UserError as error:
        _raise_together(error)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    return replace(world, gpu=gpu, num_local_ranks=sum(host == socket.gethostname() for host, *_ in ranks))


def _gpu_of(rank: int, ranks: list[tuple[str, int, int, str | None]]) -> int | None:
    """Index of a rank's GPU, from every rank's (host, local rank, number of GPUs visible, identity of the first)."""
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


# Failing together


def _attempt(function: Callable, *args: Any) -> tuple[Any, Exception | None]:
    """Result and error of a call; the error is one that pickles."""
    try:
        return function(*args), None
    except UserError as error:
        return None, error
    except OSError as error:  # subclasses may not unpickle; from errno Python makes the right one again
        plain = OSError(str(error)) if error.errno is None else OSError(error.errno, error.strerror, error.filename)
        return None, plain.with_traceback(error.__traceback__)


def _raise_together(error: Exception | None) -> None:
    if error is not None:
        error.on_all_ranks = True
        raise error


def _buckets(tensors: Iterable[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype and device, gathered until they hold `size` bytes."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        held = sum(t.nbytes for t in bucket)
        if bucket and (held >= size or (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
