"""What each rank runs in some tests: `python dist_worker.py TASK[,TASK...] FOLDER [ARGUMENT...]`, results as JSON."""

import json
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

from guided_diffusion import dist_util, logger
from guided_diffusion.command_line.stopping import run
from guided_diffusion.errors import UserError
from guided_diffusion.training.compiled import CompiledForTraining

import torch
from torch.nn.parallel import DistributedDataParallel


def tell(folder):
    """Everything that ranks tell each other, as seen from this one."""
    rank = dist_util.get_rank()
    dist_util.barrier()
    params = [torch.full((3, 2), rank + 1.0), torch.full((), rank, dtype=torch.int64), torch.empty(0)]
    params += [torch.full((1001,), rank + 0.5, dtype=torch.bfloat16), torch.nn.Parameter(torch.full((7,), rank + 2.0))]
    dist_util.sync_params(params, chunk_size=100)
    try:
        dist_util.on_main(open, folder / "missing")
    except OSError as error:
        missing = [type(error).__name__, error.filename == str(folder / "missing"), dist_util.should_report(error)]
    initialized = torch.distributed.is_initialized()
    return {
        "torch": (torch.distributed.get_rank(), torch.distributed.get_world_size()) if initialized else None,
        "place": (rank, dist_util.get_world_size(), dist_util._world.local_rank, dist_util._world.num_local_ranks),
        "is_main": dist_util.is_main(),
        "device": str(dist_util.dev()),
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gloo_interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "broadcast": dist_util.broadcast_object({"from": rank}),
        "gather": dist_util.gather_objects(rank * 10),
        "first_on_each_node": dist_util.first_on_each_node(cache, folder / f"of_{socket.gethostname()}"),
        "on_main": dist_util.on_main(lambda: f"by {dist_util.get_rank()}"),
        "params": [p.double().mean().item() if p.numel() else 0 for p in params],
        "missing": missing,
        "mpi_imported": "mpi4py.MPI" in sys.modules,
    }


def cache(path):
    """What is in a cache on disk, which the first rank of a node fills slowly."""
    if dist_util._world.local_rank == 0:
        time.sleep(0.1)
        path.write_text("compiled")
    return path.read_text()


def load(folder, chunk_size, *paths):
    """For each path, a summary of the checkpoint that all ranks load, or the error."""
    summaries = []
    for path in paths:
        try:
            state = dist_util.load_weights(path, chunk_size=int(chunk_size))
        except UserError as error:
            summaries.append(str(error))
        else:
            summaries.append(
                {name: (str(w.dtype), list(w.shape), w.double().sum().item()) for name, w in state.items()}
            )
    return summaries


def load_anything(folder, *paths):
    """For each path, what all ranks load, by `repr`, or the error."""
    loaded = []
    for path in paths:
        try:
            loaded.append(repr(dist_util.load_state_dict(path, map_location="cpu")))
        except UserError as error:
            loaded.append(str(error))
    return loaded


def fail_together(folder):
    """Rank 0 finds a mistake; the message is said once."""

    def find_mistake():
        raise UserError("no such flag: --speed")

    dist_util.on_main(find_mistake)


def fail_on_last(folder):
    """The last rank finds a mistake in what every rank looks at."""

    def look():
        if dist_util.get_rank() == dist_util.get_world_size() - 1:
            raise UserError("the node has no such file")
        return "fine"

    try:
        return dist_util.on_every_rank(look)
    except UserError as error:
        return str(error)


def fail_alone(folder):
    """Rank 1 dies of a bug while the others wait for it."""
    if dist_util.get_rank() == 1:
        raise RuntimeError("a bug")
    dist_util.barrier()


def speak(folder):
    """Every rank says and records something."""
    logger.configure(dir=folder / "log")
    logger.info("information of", dist_util.get_rank())
    logger.warn("warning of", dist_util.get_rank())
    logger.error("error of", dist_util.get_rank())
    logger.logkv("rank", dist_util.get_rank())
    return logger.dumpkvs()


def run_of(folder):
    """Whose ranks have come together."""
    return dist_util.gather_objects(f"job {os.environ['SLURM_JOB_ID']} step {os.environ['SLURM_STEP_ID']}")


def die_first(folder):
    """Rank 1 of a first attempt is killed."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist_util.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def where(folder):
    """The host of every rank."""
    return dist_util.gather_objects(socket.gethostname())


def until_told(folder):
    """Ranks 0 and 1 work alone, as in a denoising loop, until the file `go` is there; the others wait for them."""
    (folder / f"working{dist_util.get_rank()}").touch()
    while dist_util.get_rank() < 2 and not (folder / "go").exists():
        time.sleep(0.05)
        dist_util.check_peers()
    dist_util.barrier()


def train(folder):
    """Take steps with torch.distributed's own collectives, without end."""
    model = DistributedDataParallel(torch.nn.Linear(10, 10))
    while True:
        model(torch.ones(2, 10)).sum().backward()
        (folder / f"working{dist_util.get_rank()}").touch()


def draw_slowly(folder):
    """Train, with pictures that take rank 0 longer than the others may wait in a collective of torch.distributed."""
    from guided_diffusion.script_util import create_gaussian_diffusion
    from guided_diffusion.train_util import TrainLoop

    class Network(torch.nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    logger.configure(folder / "log", ["csv"])
    loop = TrainLoop(
        model=Network(3, 3, 1),
        diffusion=create_gaussian_diffusion(steps=100),
        data=iter([(torch.zeros(1, 3, 4, 4), {})] * 2),
        batch_size=1,
        microbatch=-1,
        lr=1e-3,
        ema_rate="",
        log_interval=1,
        save_interval=1,
        iterations=2,
        on_save=lambda model, step: time.sleep(3 if step == 1 else 0),
    )
    loop.run_loop()
    return loop.step


def compile_for_training(folder):
    """When this rank compiled a network for training: from when to when. First, one with a hook on rank 0 alone."""
    network, times = torch.nn.Linear(1, 1), []

    def compiled(x):  # takes a while, as a compiler does
        times.append(time.time())
        time.sleep(0.2)
        times.append(time.time())
        return network(x)

    hooked = torch.nn.Linear(1, 1)
    hook = hooked.register_forward_hook(lambda *_: None) if dist_util.is_main() else None
    wrapped = CompiledForTraining(hooked, {2})
    wrapped._compiled = hooked
    wrapped(torch.ones(2, 1))
    assert wrapped._ready == (set() if hook else {2})
    if hook:  # it compiles when it can, and waits for nobody
        hook.remove()
        wrapped(torch.ones(2, 1))
        assert wrapped._ready == {2}

    wrapped = CompiledForTraining(network, {2})
    wrapped._compiled = compiled
    wrapped(torch.ones(2, 1))
    return times[:2]


TASKS = (compile_for_training, tell, load, load_anything, fail_together, fail_on_last, fail_alone, speak)
TASKS += (die_first, run_of, where, until_told, train, draw_slowly)
TASKS = {f.__name__: f for f in TASKS}


def main():
    tasks, folder, *arguments = sys.argv[1:]
    folder = Path(folder)
    if "other_nodes" in tasks:  # as if MPI's ranks were not on one node
        find_world = dist_util.find_world
        dist_util.find_world = lambda: replace(find_world(), one_node=False)
    if "four_gpus" in tasks:  # as if the node had four, until ranks use them
        torch.cuda.device_count, torch.cuda.is_available = lambda: 4, lambda: False
        dist_util.cuda_is_initialized = lambda: "too_late" in tasks
    dist_util.setup_dist()
    dist_util.setup_dist()
    results = {name: TASKS[name](folder, *arguments) for name in tasks.split(",") if name in TASKS}
    (folder / f"rank{dist_util.get_rank()}.json").write_text(json.dumps(results))
    dist_util.barrier()


if __name__ == "__main__":
    run(main)
