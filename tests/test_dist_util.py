"""Ranks, rendezvous and checkpoints, with real processes: plain, mpiexec, torchrun, and the environment of srun."""

import contextlib
import datetime
import functools
import http.server
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError
from guided_diffusion.system import gpus, launchers

import fork_server
import pytest
import torch

HERE = Path(__file__).parent
PYTHON = [sys.executable, str(HERE / "dist_worker.py")]
MPIEXEC = [str(Path(sys.executable).with_name("mpiexec")), "--oversubscribe", "-n"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--no-python"]
TORCHRUN += ["--nproc_per_node"]
LAUNCHERS = ("OMPI_", "PMI", "PRTE_", "MPI_", "MV2_", "SLURM_", "TORCHELASTIC_", "GROUP_", "LOCAL_", "ROLE_", "MASTER_")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """The environment as a shell has it, whatever started pytest."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS) or name in ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def forked():
    """The words that start dist_worker.py in tests that are not about launching: forked, see fork_server.py."""
    return [*(fork_server.rank_command(os.environ) or PYTHON[:1]), PYTHON[1]]


def start(command, **environment):
    """Start a launcher, or a rank without one, which is forked: see fork_server.py."""
    pipe = subprocess.PIPE
    return fork_server.start(command, stdout=pipe, stderr=pipe, env={**os.environ, **environment})


def finish(process, status=0):
    """stderr of a process that must end with `status` ("bad": any but 0) before long."""
    try:
        _, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        process.kill()
    good = process.returncode != 0 if status == "bad" else process.returncode == status
    assert good, f"status {process.returncode}\n{stderr}"
    return stderr


def results(folder, ranks):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def assert_told(folder, ranks, *, launcher_is_mpi=False, torch_works=True):
    for rank, told in enumerate(result["tell"] for result in results(folder, ranks)):
        assert told["torch"] == ([rank, ranks] if torch_works else None)
        assert told["place"] == [rank, ranks, rank, ranks]
        assert told["is_main"] == (rank == 0)
        assert told["gloo_interface"] is None  # processes that this one starts would inherit it
        assert told["device"] == "cpu"
        assert told["broadcast"] == {"from": 0}
        assert told["gather"] == [10 * r for r in range(ranks)]
        assert told["on_main"] == "by 0"
        assert told["first_on_each_node"] == "compiled"
        assert told["params"] == [1.0, 0.0, 0, 0.5, 2.0]
        assert told["missing"] == ["FileNotFoundError", True, rank == 0 or ranks == 1]
        assert told["mpi_imported"] == launcher_is_mpi


def fake_mpi4py(folder, code):
    """An mpi4py that does `code` when imported; returns the environment in which it is found first."""
    (folder / "mpi4py").mkdir()
    (folder / "mpi4py" / "__init__.py").write_text(code)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"}


def test_one_rank_of_a_node_compiles_for_training_first(tmp_path):
    finish(start([*MPIEXEC, "3", *forked(), "compile_for_training", tmp_path]))
    times = [result["compile_for_training"] for result in results(tmp_path, 3)]
    assert all(times[0][1] <= start for start, _ in times[1:])


# ------------------------------------------------------------------------------------------------ launchers


def test_one_process(tmp_path):
    finish(start([*PYTHON, "tell", tmp_path]))
    assert_told(tmp_path, 1, launcher_is_mpi=True)


def test_one_process_without_an_mpi_library(tmp_path):
    problem = "raise RuntimeError('cannot load MPI library')"
    finish(start([*PYTHON, "tell", tmp_path], **fake_mpi4py(tmp_path, problem)))
    assert_told(tmp_path, 1)


def in_namespace(*commands):
    """A shell line that runs `commands` where the host name resolves to nothing and there is no network."""
    unshare = ["unshare", "--uts", "--net"]
    if os.geteuid() != 0:
        unshare += ["--user", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let us make network namespaces")
    return [*unshare, "sh", "-c", " && ".join(["hostname nowhere.invalid", *commands]), "sh"]


def test_one_process_without_any_network(tmp_path):
    finish(start([*in_namespace('exec "$@"'), *PYTHON, "tell", tmp_path]))
    assert_told(tmp_path, 1, launcher_is_mpi=True, torch_works=False)


@pytest.mark.parametrize("launcher", [[], [*MPIEXEC, "2"]], ids=["plain", "mpiexec"])
def test_host_name_that_does_not_resolve(tmp_path, launcher):
    finish(start([*in_namespace("ip link set lo up", 'exec "$@"'), *launcher, *PYTHON, "tell", tmp_path]))
    assert_told(tmp_path, 2 if launcher else 1, launcher_is_mpi=True)


def test_mpiexec(tmp_path):
    finish(start([*MPIEXEC, "3", *PYTHON, "tell,speak,fail_on_last", tmp_path]))
    assert_told(tmp_path, 3, launcher_is_mpi=True)
    for rank, result in enumerate(results(tmp_path, 3)):
        assert result["speak"] == {"rank": rank}
        assert result["fail_on_last"] == "rank 2: the node has no such file"
    assert [f.read_text() for f in (tmp_path / "log").glob("*.json")] == ['{"rank": 0}\n']


def test_mpi_ranks_on_several_nodes_try_the_addresses_of_rank_0(tmp_path):
    finish(start([*MPIEXEC, "2", *PYTHON, "other_nodes,tell", tmp_path]))
    assert_told(tmp_path, 2, launcher_is_mpi=True)


def test_only_rank_0_speaks(tmp_path):
    stderr = finish(start([*TORCHRUN, "2", *PYTHON, "tell,speak", tmp_path]))
    assert_told(tmp_path, 2)
    said = sorted(line for line in stderr.splitlines() if " of " in line)
    assert said == ["error: error of 0", "error: error of 1", "information of 0", "warning: warning of 0"]


def listens(pid):
    """Whether a process has a socket that waits for connections, besides those of every process."""
    sockets = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(fd))
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(f"socket:[{fields[9]}]" in sockets for fields in table if fields[3] == "0A")


def srun(count, command, **environment):
    """`count` processes with the variables that srun gives to the tasks of a step on one node."""
    common = {
        "SLURM_JOB_ID": str(random.randrange(10**6)),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NODELIST": "nowhere",
        **environment,
    }
    return [start(command, **common, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(count)]


def test_srun_does_without_mpi(tmp_path):
    environment = fake_mpi4py(tmp_path, "import os; os._exit(77)")  # as a library built without Slurm support may
    for process in srun(2, [*PYTHON, "tell", tmp_path], PMI_SIZE="2", PMIX_RANK="0", **environment):
        finish(process)
    assert_told(tmp_path, 2)


def test_a_rank_that_does_not_come_is_missed(tmp_path):
    (first,) = srun(1, [*PYTHON, "tell", tmp_path], SLURM_STEP_NUM_TASKS="2", GUIDED_DIFFUSION_MEETING_TIMEOUT="3")
    stderr = finish(first, 2)
    assert "rank(s) 1 of 2 did not arrive within 3 s (srun; rank 0 is on" in stderr
    assert len(stderr.splitlines()) == 1


def test_mpiexec_of_another_mpi(monkeypatch):
    """The main script's tests start a process so."""
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError) as caught:
        launchers.find_world()
    assert "started 2 ranks (PMI_SIZE=2), but mpi4py's MPI counts 1: the launcher belongs" in str(caught.value)
    where = r"the mpiexec of mpi4py's library \(.+\), or torchrun --nproc_per_node 2$"
    assert re.search(where, str(caught.value)), caught.value


def test_every_rank_of_another_mpi_ends_and_the_first_tells_why(tmp_path):
    ranks = [start([*PYTHON, "tell", tmp_path], PMI_SIZE="2", PMI_RANK=str(rank)) for rank in range(2)]
    first, second = (finish(rank, 2) for rank in ranks)
    assert "the launcher belongs to another MPI library" in first
    assert "error:" not in second


def test_the_launcher_before_torchrun_is_answered_once(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node", "2"]
    stderr = finish(start([*launcher, str(HERE.parent / "scripts" / "image_sample.py")]), "bad")
    assert stderr.count("error: python -m torch.distributed.launch adds --local-rank") == 1
    assert stderr.count("torchrun --nproc_per_node N SCRIPT") == 1


def test_torchrun_that_starts_the_ranks_again(tmp_path):
    """The ranks of the second attempt are not taken for those of the first, whose store is still there."""
    command = [*TORCHRUN[:-1], "--max_restarts", "1", "--nproc_per_node", "2", *PYTHON, "die_first,tell", tmp_path]
    finish(start(command))
    assert_told(tmp_path, 2)


def test_ranks_started_by_hand(tmp_path):
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    for process in [start([*PYTHON, "tell", tmp_path], RANK=r, LOCAL_RANK=r, **common) for r in "01"]:
        finish(process)
    assert_told(tmp_path, 2)


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (first,) = srun(1, [*PYTHON, "tell", tmp_path], SLURM_STEP_NUM_TASKS="2", MASTER_PORT=str(port))
        assert f"port {port} is taken on {socket.gethostname()}. Set MASTER_PORT" in finish(first, 2)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_mpiexec_without_mpi4py(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # an import of it fails
    words = r"started 2 ranks \(OMPI_COMM_WORLD_SIZE=2\), but mpi4py cannot be imported \(import of mpi4py halted"
    with pytest.raises(UserError, match=words):
        launchers.find_world()


def test_mpiexec_and_torchrun_disagree(tmp_path):
    """As under `mpiexec -n 2 torchrun ...`: one of the two torchruns, which would each start a run of their own."""
    stderr = finish(start([*TORCHRUN, "1", *PYTHON, "tell", tmp_path], OMPI_COMM_WORLD_SIZE="2"), "bad")
    assert "two launchers disagree: torchrun's environment has 1 rank(s) in total (GROUP_WORLD_SIZE=1)" in stderr
    assert "another launcher's has 2 (OMPI_COMM_WORLD_SIZE=2)" in stderr


TORCHRUN_2 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
STEP_2 = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (TORCHRUN_2, (1, 2, 1, "torchrun")),
        ({**TORCHRUN_2, "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2, 1, "torchrun")),  # a script that translates
        ({**TORCHRUN_2, "GROUP_WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"}, (1, 2, 1, "torchrun")),
        ({**TORCHRUN_2, **STEP_2, "GROUP_WORLD_SIZE": "2"}, (1, 2, 1, "torchrun")),  # srun starts one per node
        (STEP_2, (1, 2, 0, "srun")),
        ({**STEP_2, "PMI_SIZE": "2", "PMIX_RANK": "1"}, (1, 2, 0, "srun")),
        ({**STEP_2, "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0, "srun")),
        ({"SLURM_STEP_ID": "3", "SLURM_NTASKS": "1"}, (0, 1, 0, "srun")),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1, 0, "one process")),  # batch script
    ],
)
def test_place(monkeypatch, environment, place):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    world = launchers.find_world()
    assert (world.rank, world.size, world.local_rank, world.launcher) == place


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({**TORCHRUN_2, "PMI_SIZE": "3"}, r"torchrun's environment has 2 rank.*has 3 \(PMI_SIZE=3\)"),
        ({**TORCHRUN_2, **STEP_2, "GROUP_WORLD_SIZE": "1"}, "disagree.*SLURM_STEP_NUM_TASKS=2"),
        ({"WORLD_SIZE": "4", "RANK": "1"}, "WORLD_SIZE is 4.* LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**STEP_2, "PMI_SIZE": "4"}, r"started 4 ranks \(PMI_SIZE=4\)"),  # a mpiexec within a step
        ({"PMIX_RANK": "1"}, r"started 2 ranks \(PMIX_RANK=1\), but mpi4py's MPI counts 1"),
        ({**STEP_2, "OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE should be a whole number, but is 'two'"),
        ({"SLURM_STEP_ID": "0"}, "SLURM_NTASKS should be a whole number, but is None"),
    ],
)
def test_place_in_doubt(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        launchers.find_world()


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("", ""),
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("gpu[03-05,9],x", "gpu03 gpu04 gpu05 gpu9 x"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("r[1-2]n[01,04]-ib,x[1-2]", "r1n01-ib r1n04-ib r2n01-ib r2n04-ib x1 x2"),
        ("a[1[0-2],7]b", "a10b a11b a12b a7b"),
        ("a[b[1-2]c[3-4],d]", "ab1c3 ab1c4 ab2c3 ab2c4 ad"),
    ],
)
def test_hosts_of_a_slurm_node_list(nodes, hosts):
    assert launchers.expand_node_list(nodes) == hosts.split()


def test_node_list_that_is_cut_off():
    with pytest.raises(UserError, match=r"unbalanced brackets: gpu\[1-"):
        launchers.expand_node_list("x,gpu[1-")


def test_each_rank_has_its_own_gpu():
    node = [("a", i, 4, "GPU-0 0,1,2,3") for i in range(4)]
    assert [gpus.gpu_of(i, node) for i in range(4)] == [0, 1, 2, 3]
    two_nodes = [(host, i, 2, f"GPU-{host}") for host in "ab" for i in range(2)]
    assert [gpus.gpu_of(i, two_nodes) for i in range(4)] == [0, 1, 0, 1]
    one_each = [("a", i, 1, f"GPU-{i} 0") for i in range(4)]
    assert [gpus.gpu_of(i, one_each) for i in range(4)] == [0, 0, 0, 0]
    assert gpus.gpu_of(1, [("a", i, 0, None) for i in range(2)]) is None
    with pytest.raises(UserError, match=r"3 rank\(s\) on node a, but 2 GPU\(s\)"):
        gpus.gpu_of(0, [("a", i, 2, "GPU-0") for i in range(3)])
    with pytest.raises(UserError, match=r"1 rank\(s\) on node b, but 0 GPU\(s\)"):
        gpus.gpu_of(0, [("a", 0, 1, "GPU-0"), ("b", 0, 0, None)])


def test_all_but_its_own_gpu_are_hidden_from_a_rank():
    def own(*ranks, visible="0,1,2,3", count=4, can_hide=True):
        views = [gpus.View(host, local, visible, count, can_hide) for host, local in ranks]
        return [gpus.only_own(rank, views) for rank in range(len(views))]

    two_nodes = [(host, local) for host in "ab" for local in range(2)]
    assert own(*two_nodes) == ["0", "1", "0", "1"]
    assert own(*two_nodes, visible=None) == ["0", "1", "0", "1"]
    assert own(*two_nodes, visible="GPU-8a, GPU-03", count=2) == ["GPU-8a", "GPU-03"] * 2
    assert own(*two_nodes, visible="6,5,4", count=3) == ["6", "5", "6", "5"]
    assert own(("a", 1), ("a", 0), visible="6,5,4", count=3) == ["5", "6"]
    nobody = [None] * 4
    assert own(*two_nodes, count=1, visible="0") == nobody, "each rank has a GPU 0 of its own, or there are too few"
    assert own(*two_nodes, count=0, visible=None) == nobody
    assert own(*two_nodes, can_hide=False) == nobody
    assert own(("a", 0), ("a", 0), ("b", 0), ("b", 1)) == nobody, "ranks of two launchers"
    other_numbers = [gpus.View("a", i, visible, 2, True) for i, visible in enumerate(["0,1", "1,0"])]
    assert [gpus.only_own(rank, other_numbers) for rank in range(2)] == [None, None]
    one_late = [gpus.View("a", 0, None, 2, True), gpus.View("a", 1, None, 2, False)]
    assert [gpus.only_own(rank, one_late) for rank in range(2)] == [None, None]


@pytest.mark.parametrize("launcher", [MPIEXEC, TORCHRUN], ids=["mpiexec", "torchrun"])
@pytest.mark.parametrize("visible", [None, "7,5,3,1"])
def test_ranks_hide_the_gpus_of_others_before_they_use_theirs(tmp_path, monkeypatch, launcher, visible):
    rank = forked()  # before its environment differs from the server's
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    finish(start([*launcher, "2", *rank, "tell,four_gpus", tmp_path], **chosen))
    expected = ["0", "1"] if visible is None else ["7", "5"]
    assert [result["tell"]["visible_gpus"] for result in results(tmp_path, 2)] == expected


def test_ranks_do_not_hide_gpus_from_a_cuda_that_has_started(tmp_path):
    finish(start([*MPIEXEC, "2", *forked(), "tell,four_gpus,too_late", tmp_path], CUDA_VISIBLE_DEVICES="2,1"))
    assert [result["tell"]["visible_gpus"] for result in results(tmp_path, 2)] == ["2,1", "2,1"]


@pytest.mark.gpu
def test_cuda_notices_that_gpus_are_hidden():
    code = """if True:
        import os
        from guided_diffusion.system.gpus import cuda_is_initialized
        import torch
        assert torch.cuda.device_count() and not cuda_is_initialized()
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_a_cuda_that_has_started_is_noticed():
    code = """if True:
        from guided_diffusion.system.gpus import cuda_is_initialized
        import torch
        assert torch.cuda.is_available() and cuda_is_initialized()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_on_rank_0_ends_all_and_is_said_once(tmp_path):
    stderr = finish(start([*MPIEXEC, "2", *PYTHON, "fail_together", tmp_path]), 2)
    assert stderr.count("no such flag: --speed") == 1 and "Traceback" not in stderr


def test_a_rank_that_dies_alone_leaves_no_one_waiting(tmp_path):
    assert "a bug" in finish(start([*MPIEXEC, "2", *PYTHON, "fail_alone", tmp_path]), "bad")


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def state():
    weights = {f"block.{i}.weight": torch.randn(50, 40, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    return {**weights, "half": torch.ones(3, dtype=torch.float16), "scalar": torch.tensor(7), "none": torch.empty(0)}


@pytest.fixture
def checkpoint(tmp_path, state):
    torch.save(state, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def url(tmp_path):
    """Address at which the files of `tmp_path` are served."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

        def send_header(self, keyword, value):
            if keyword == "Content-Length" and "cut" in self.path:
                value = str(int(value) + 1000)
            super().send_header(keyword, value)

    requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # looks often for its shutdown
    server.requests = requests
    yield server
    server.shutdown()
    server.server_close()


def address(server, name):
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


def assert_same(loaded, state):
    assert list(loaded) == list(state)
    for name, w in state.items():
        assert loaded[name].dtype == w.dtype and loaded[name].device.type == "cpu" and torch.equal(loaded[name], w)


def mapped_files():
    return Path("/proc/self/maps").read_text()


def test_local_checkpoint_is_mapped(checkpoint, state):
    loaded = dist_util.load_weights(checkpoint)
    assert_same(loaded, state)
    assert str(checkpoint) in mapped_files()


def test_legacy_format_is_read(tmp_path, state):
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(dist_util.load_weights(str(tmp_path / "old.pt")), state)
    assert "old.pt" not in mapped_files()


def test_remote_checkpoint(checkpoint, state, url):
    assert_same(dist_util.load_weights(address(url, "model.pt")), state)


def test_ranks_load_together_or_fail_together(tmp_path, checkpoint, state, url):
    paths = [address(url, "model.pt"), checkpoint, address(url, "gone.pt"), tmp_path / "gone.pt"]
    finish(start([*MPIEXEC, "2", *forked(), "load", tmp_path, "1000", *paths]))
    expected = {name: [str(w.dtype), list(w.shape), w.double().sum().item()] for name, w in state.items()}
    for result in results(tmp_path, 2):
        assert result["load"][:2] == [expected, expected]
        for path, error in zip(paths[2:], result["load"][2:], strict=True):
            assert error.startswith(f"--model_path {path} cannot be read: ")
    assert url.requests.count("/model.pt") == 1  # by rank 0 alone


def test_ranks_load_anything_together(tmp_path, checkpoint, url):
    anything = {"state_dict": {"w": torch.arange(3)}, "epoch": 1}
    torch.save(anything, checkpoint.with_name("anything.pt"))
    checkpoint.with_name("empty.pt").touch()
    paths = [address(url, "anything.pt"), checkpoint.with_name("anything.pt"), address(url, "empty.pt")]
    finish(start([*MPIEXEC, "2", *forked(), "load_anything", tmp_path, *paths]))
    for result in results(tmp_path, 2):
        assert result["load_anything"][:2] == [repr(anything)] * 2
        assert result["load_anything"][2] == f"the checkpoint {paths[2]} (0 bytes) is empty: not a checkpoint"
    assert url.requests.count("/anything.pt") == 1  # by rank 0 alone


def test_connection_that_closes_early(tmp_path, checkpoint, url):
    checkpoint.rename(tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"cut.pt cannot be read: the connection was closed 1000 bytes early"):
        dist_util.load_weights(address(url, "cut.pt"))


def test_unknown_kind_of_remote_path():
    with pytest.raises(UserError, match=r"--model_path ftp://host/model.pt cannot be read: Unrecognized path"):
        dist_util.load_weights("ftp://host/model.pt")


def write_bad(path, kind, good):
    """A file that is no checkpoint, of the given kind."""
    legacy = path.with_name("legacy")
    torch.save(torch.load(good), legacy, _use_new_zipfile_serialization=False)
    match kind:
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "web page":
            path.write_text("\n<!DOCTYPE html><title>Sign in</title>")
        case "text":
            path.write_text("see the release page for the weights\n")
        case "pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\n")
        case "archive":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("readme.txt", "nothing here")
        case "half":
            path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
        case "last byte missing":
            path.write_bytes(good.read_bytes()[:-1])
        case "end never written":
            path.write_bytes(good.read_bytes()[:-5000] + bytes(5000))
        case "legacy half":
            path.write_bytes(legacy.read_bytes()[: legacy.stat().st_size // 2])
        case "legacy start":
            path.write_bytes(legacy.read_bytes()[:40])
        case "other pickle":
            path.write_bytes(pickle.dumps({"a": 1}))
        case "objects":
            torch.save({"begun": datetime.date(2025, 1, 1)}, path)
        case "trainer":
            torch.save({"model": torch.load(good), "step": 3, "lr": 0.1, "epoch": 2}, path)
        case "list":
            torch.save([torch.zeros(1)], path)
        case "no tensors":
            torch.save({}, path)


BAD = {
    "missing": "cannot be read: No such file",
    "folder": "cannot be read: Is a directory",
    "empty": r"\(0 bytes\) is empty",
    "web page": r"\(38 bytes\) is a web page, not a checkpoint: the download failed. It begins with '\\n<!DOCTYPE html",
    "text": "was not written by torch.save: it begins with 'see the release page'$",
    "pointer": r"\(43 bytes\) is a Git LFS pointer, not the checkpoint itself",
    "archive": "was not written by torch.save: it begins with ['\"]PK",
    "half": "is truncated",
    "last byte missing": "is truncated",
    "end never written": "is truncated",
    "legacy half": "is truncated",
    "legacy start": r"\(40 bytes\) is truncated",
    "other pickle": "was not written by torch.save",
    "objects": r"contains a Python object other than tensors \(datetime.date\)",
    "trainer": r"contains entries other than tensors \('model': dict, 'step': int, 'lr': float, 'epoch': int\)",
    "list": "contains a list; expected a dict of tensors",
    "no tensors": "contains an empty dict; expected a dict of tensors",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoint(tmp_path, checkpoint, kind):
    path = tmp_path / "bad.pt"
    write_bad(path, kind, checkpoint)
    with pytest.raises(UserError, match=BAD[kind]) as caught:
        dist_util.load_weights(path)
    message = str(caught.value)
    assert message.startswith(f"--model_path {path} ") and len(message.splitlines()) <= 2


@pytest.mark.parametrize("kind", ["half", "web page", "objects"])
def test_bad_remote_checkpoint(tmp_path, checkpoint, url, kind):
    write_bad(tmp_path / "bad.pt", kind, checkpoint)
    with pytest.raises(UserError, match=BAD[kind]):
        dist_util.load_weights(address(url, "bad.pt"))


def test_nobody_answers():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(UserError, match="Connection refused"):
            dist_util.load_weights(f"http://127.0.0.1:{port}/model.pt")


# ---------------------------------------------------------------------------------------------- lost peers


def wait_until(condition, what):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def start_working(ranks, task, folder, **environment):
    """Start ranks, and wait until they have come to the point that their task marks."""
    processes = srun(ranks, [*PYTHON, task, folder], GUIDED_DIFFUSION_PEER_TIMEOUT="3", **environment)
    wait_until(lambda: len(list(folder.glob("working*"))) == ranks, "the ranks to work")
    return processes


def ended(rank):
    return (
        f"error: rank {rank} on {socket.gethostname()} died or cannot be reached; see its output. "
        "Rerun the same command to resume\n"
    )


@pytest.mark.parametrize(("task", "count"), [("until_told", 3), ("train", 2)])
def test_a_rank_that_is_killed_is_named_once_by_the_others(tmp_path, task, count):
    ranks = start_working(count, task, tmp_path)
    ranks.pop(1).kill()
    assert "".join(finish(rank, 3) for rank in ranks) == ended(1)


def test_rank_0_that_is_killed_is_named_by_the_others(tmp_path):
    first, second = start_working(2, "train", tmp_path)
    first.kill()
    assert finish(second, 3) == ended(0)


def test_a_rank_that_does_not_move_is_named_even_if_the_others_wait_inside_pytorch(tmp_path):
    first, second = start_working(2, "train", tmp_path)
    second.send_signal(signal.SIGSTOP)
    try:
        assert finish(first, 3) == ended(1)
    finally:
        second.kill()
        second.communicate()


def test_a_job_that_is_suspended_as_a_whole_goes_on(tmp_path):
    ranks = start_working(2, "until_told", tmp_path)
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            rank.send_signal(signum)
        time.sleep(5)  # longer than a single rank may be silent
    (tmp_path / "go").touch()
    for rank in ranks:
        finish(rank)


def test_ranks_wait_for_a_picture_longer_than_for_a_collective(tmp_path):
    for rank in srun(2, [*PYTHON, "draw_slowly", tmp_path], GUIDED_DIFFUSION_COLLECTIVE_TIMEOUT="2"):
        finish(rank)
    assert [of_rank["draw_slowly"] for of_rank in results(tmp_path, 2)] == [2, 2]


def test_a_rank_tells_the_others_why_it_ends(tmp_path):
    first, second = srun(2, [*PYTHON, "fail_alone", tmp_path])
    assert f"rank 1 on {socket.gethostname()} failed: RuntimeError: a bug; see its output" in finish(first, 3)
    assert "Traceback" in finish(second, 1)  # the bug's


def test_a_signal_ends_ranks_that_wait_for_each_other(tmp_path):
    ranks = start_working(3, "until_told", tmp_path)
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    assert "stopped by SIGUSR1" in "".join(finish(rank, 128 + signal.SIGUSR1) for rank in ranks)


def test_a_signal_ends_a_rank_that_waits_for_others_to_come(tmp_path):
    (first,) = srun(1, [*PYTHON, "tell", tmp_path], SLURM_STEP_NUM_TASKS="2")
    wait_until(lambda: listens(first.pid), "rank 0 to listen")
    first.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in finish(first, 143)
