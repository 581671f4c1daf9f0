"""What several tests use: a small checkpoint, real photographs of all kinds, and ways to launch a script."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# The networks here are so small that threads would only wait for each other, and several tests run at a time, which use
# the cores: kernels are compiled without a pool of processes. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# The CPU's flags tell its vector instructions; PyTorch would compile a test of each in every process, for 8 seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# PyTorch asks for the name of every address that it connects to. Many processes do at a time, and if the name server
# drops a query, each would wait for 5 seconds before it asks again, longer than some ranks here wait for each other.
os.environ.setdefault("RES_OPTIONS", "timeout:1")

from guided_diffusion import dist_util
from guided_diffusion.script_util import model_defaults, model_from_flags
from guided_diffusion.system.other_scripts import REPOSITORY, environment
from guided_diffusion.system.other_scripts import as_flags as as_flags
from guided_diffusion.system.other_scripts import load_script as load_script

import pytest
import torch
import torchvision
from fork_server import Forked, rank_command, share_server, start
from PIL import Image
from reference import fill_weights
from slurm import Slurm, missing

# Hundreds of processes import the project. They share its bytecode, even if this variable forbids writing it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

TESTS = Path(__file__).parent
PHOTOGRAPHS = TESTS / "photographs"

# A network of the published architecture, small enough for many forward passes.
SMALL_MODEL = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "16",
    "num_head_channels": 16,
    "learn_sigma": True,
    "resblock_updown": True,
    "class_cond": False,
}


# The files that take longest come first, so that none of them runs alone at the end. Those whose tests mostly wait, for
# Slurm and for other processes, are (W); between them are others that use the cores. Paths are relative to this folder.
LONGEST = [
    "system/test_slurm.py",  # W
    "compute/test_performance.py",
    "test_forward_backward_dataset_sample.py",
    "training/test_training_scripts.py",  # W
    "training/test_train_util.py",
    "test_dist_util.py",  # W
    "random_hierarchy_model/test_demo.py",
    "training/test_kill_many.py",  # W
    "classifier/test_classifier_scripts.py",
    "random_hierarchy_model/test_theory_figures.py",
    "random_hierarchy_model/test_random_hierarchy_model.py",
    "system/test_installation.py",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            reason = "PyTorch finds no GPU" if on_gpu(config) else "only run by pytest -m gpu"
            item.add_marker(pytest.mark.skip(reason))
    order = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def save_checkpoint(path: Path, settings: dict) -> Path:
    """Save a checkpoint in the published layout, of the U-Net that the flags describe, with the reference weights."""
    known = {**model_defaults(), "learn_sigma": False, **settings}
    model = fill_weights(model_from_flags(known))
    torch.save(model.state_dict(), path)
    return path


def on_gpu(config: pytest.Config) -> bool:
    """Whether this is `pytest -m gpu`, the only way to use a GPU: the other tests are about numbers of a CPU."""
    return config.getoption("markexpr") == "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, and handle signals as in the foreground: nohup, and a shell that runs the tests in the background,
    ignore these."""
    config.addinivalue_line("markers", "gpu: needs a GPU, and is skipped unless pytest -m gpu runs it")
    if not on_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_DFL)
    if getattr(config.option, "numprocesses", None):
        share_server()


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not look through it again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_environment():
    """What a test or PyTorch's compiler adds to the environment must not reach the processes of other tests."""
    before = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    yield
    for name in [name for name in os.environ if name not in before and not name.startswith("PYTEST_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def one_thread():
    """The tensors are small: threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_this_process(monkeypatch):
    """Scripts run in the tests' own process, which stays what it was."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(dist_util, "setup_dist", lambda _: None)
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def resnet18(tmp_path_factory) -> dict:
    """Flags of a torchvision classifier with random weights."""
    path = tmp_path_factory.mktemp("classifier") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    names = {"classifier_name": "resnet18", "classifier_path": path}
    return {**names, "image_size": 32, "num_threads": 1, "num_workers": 0}


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint that fits `SMALL_MODEL`."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "small.pt", SMALL_MODEL)


@pytest.fixture(scope="session")
def slurm():
    """A running Slurm of two nodes, see slurm.py."""
    if reason := missing():
        pytest.skip(reason)
    cluster = Slurm()
    cluster.start()
    yield cluster
    cluster.stop()


def lay_out_photographs(folder: Path) -> Path:
    """Real photographs, in the kinds and sizes that people have, laid out as ImageNet: a folder per class."""
    cat, rocket, tripod, coffee = (Image.open(path) for path in sorted(PHOTOGRAPHS.glob("*/*.JPEG")))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: to be turned by 90 degrees
    alpha = coffee.convert("RGBA")
    alpha.putalpha(coffee.convert("L"))
    kinds = {
        "n02123045/n02123045_1.JPEG": (cat, {"quality": 90}),
        "n02123045/n02123045_2.JPEG": (cat.resize((500, 375)).convert("L"), {"quality": 90}),
        "n04008634/n04008634_1.JPEG": (rocket.rotate(90, expand=True), {"quality": 90, "exif": turned}),
        "n04008634/n04008634_2.JPEG": (rocket.resize((300, 420)).convert("CMYK"), {"quality": 90}),
        "n04485082/n04485082_1.jpg": (tripod.resize((40, 90)), {"quality": 90}),
        "n07920052/n07920052_1.png": (alpha.resize((257, 256)), {}),
        "n07920052/n07920052_2.JPEG": (coffee, {"quality": 50}),
    }
    for name, (image, options) in kinds.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """The folder that `lay_out_photographs` makes; not to be changed."""
    return lay_out_photographs(tmp_path_factory.mktemp("datasets") / "ILSVRC2012" / "validation")


def launcher(kind: str, processes: int, rank: Sequence[str] = ()) -> list[str]:
    """The words of a command line before the script's name; `rank` starts the launcher's processes, if not Python."""
    if kind == "mpiexec":
        mpiexec = str(Path(sys.executable).with_name("mpiexec"))
        return [mpiexec, "--oversubscribe", "-n", str(processes), *(rank or [sys.executable])]
    if kind == "torchrun":
        options = ["--standalone", "--nproc_per_node", str(processes)]
        return [sys.executable, "-m", "torch.distributed.run", *options, *(["--no-python", *rank] if rank else [])]
    return [sys.executable]


MAIN_SCRIPT = "forward_backward_dataset_sample.py"


def start_script(
    *flags: str,
    script: str = MAIN_SCRIPT,
    kind: str = "python",
    processes: int = 1,
    forked: bool = False,
    **options,
) -> subprocess.Popen | Forked:
    """Start a script, named by its path in the repository, in a process group of its own; its output is text.

    One process is forked from a server that has imported PyTorch, see fork_server.py; the processes of mpiexec and
    torchrun only if `forked`.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **options}
    rank = rank_command(options["env"]) if forked else ()
    command = [*launcher(kind, processes, rank), str(REPOSITORY / script), *map(str, flags)]
    return start(command, **options)


def run_python(*words: str, **options) -> subprocess.CompletedProcess:
    """Run `python WORDS` to its end, forked as in `start_script`; its output is text."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **options}
    return completed(start([sys.executable, *words], **options))


def run_script(*flags: str, **options) -> subprocess.CompletedProcess:
    """Run a script to its end, with forked processes; arguments as those of `start_script`."""
    return completed(start_script(*flags, forked=True, **options))


def completed(process: subprocess.Popen | Forked) -> subprocess.CompletedProcess:
    stdout, stderr = process.communicate(timeout=1200)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
