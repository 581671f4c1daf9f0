"""Machine properties that affect the last digits: fixed, recorded for all processes, and compared with a record."""

from __future__ import annotations

import json

from guided_diffusion import dist_util
from guided_diffusion.compute import inference
from guided_diffusion.compute.inference import DECISIVE_VARIABLES, describe_machine
from guided_diffusion.runs.settings import machine_changes

import pytest
import torch
from conftest import MAIN_SCRIPT, SMALL_MODEL, as_flags, environment, load_script, run_script

CPU = torch.device("cpu")
NEW = ("environment", "cuda", "cudnn")  # which older versions did not record


@pytest.fixture(autouse=True)
def _anew(monkeypatch):
    for name in DECISIVE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    describe_machine.cache_clear()
    yield
    describe_machine.cache_clear()


@pytest.fixture
def exact(monkeypatch):
    """The switches of PyTorch, as they are at its start and after the test."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = [(cudnn, "allow_tf32"), (matmul, "allow_tf32")]
    switches += [(matmul, f"allow_{kind}_reduced_precision_reduction") for kind in ("fp16", "bf16")]
    before = [getattr(*switch) for switch in switches]
    for owner, name in switches:
        setattr(owner, name, True)
    yield lambda: [getattr(*switch) for switch in switches]
    for (owner, name), value in zip(switches, before, strict=True):
        setattr(owner, name, value)


@pytest.fixture
def flags(small_checkpoint, photographs):
    model = [*as_flags(SMALL_MODEL), "--timestep_respacing", "20", "--num_threads", "1", "--batch_size", "3"]
    return [*model, "--model_path", str(small_checkpoint), "--data_dir", str(photographs)]


def run_here(script, *flags) -> int:
    return load_script(script).main([str(flag) for flag in flags])


def test_float32_is_float32_in_sampling_and_in_training(exact, flags, tmp_path):
    assert exact() == [True] * 4
    threads = torch.get_num_threads()
    inference.compute_reproducibly(threads)
    assert exact() == [False] * 4
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    training = ["--iterations", 1, "--num_workers", 0, "--sample_grid", 0]
    run_here(
        "scripts/image_train.py", *flags[: flags.index("--model_path")], *training, *flags[-2:], "--output", tmp_path
    )
    assert exact() == [False] * 4
    torch.set_num_threads(threads)


def test_all_cards_are_recorded(monkeypatch, capsys):
    monkeypatch.setattr(inference, "hardware", lambda device: "NVIDIA A100")
    monkeypatch.setattr(dist_util, "gather_objects", lambda value: [value] * 8)
    assert describe_machine(CPU)["hardware"] == "NVIDIA A100"  # as older versions recorded it
    assert capsys.readouterr().err == ""

    describe_machine.cache_clear()
    others = [("NVIDIA H100", ""), ("NVIDIA A100", "")]
    monkeypatch.setattr(dist_util, "gather_objects", lambda value: [value, *others])
    for _ in range(2):  # a script may have two networks
        assert describe_machine(CPU)["hardware"] == "2 x NVIDIA A100, 1 x NVIDIA H100"
    assert capsys.readouterr().err == (
        "warning: the hardware differs between processes (2 x NVIDIA A100, 1 x NVIDIA H100): the last digits of an "
        "image depend on the process that computes it\n"
    )


def test_versions_of_the_gpu_s_libraries_are_recorded(monkeypatch):
    monkeypatch.setattr(inference, "hardware", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    on_gpu = describe_machine(torch.device("cuda", 0))
    assert on_gpu["cuda"] == str(torch.version.cuda) and on_gpu["cudnn"] == "91900"
    assert "cuda" not in describe_machine(CPU) and "cudnn" not in describe_machine(CPU)


def test_one_precision_for_all_processes(monkeypatch):
    monkeypatch.setattr(inference, "half_precision_dtype", lambda device: torch.bfloat16)
    for other, shared in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ):
        monkeypatch.setattr(dist_util, "gather_objects", lambda value, other=other: [value, other])
        assert inference.shared_half_precision(CPU) == shared


def test_variables_of_one_process_are_recorded_and_told(flags, tmp_path):
    """mpiexec does not hand every variable to other nodes."""
    script = tmp_path / "one_variable.py"
    script.write_text(
        "import os\n"
        "from guided_diffusion.command_line.stopping import run\n"
        "from guided_diffusion.system.other_scripts import load_script\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    os.environ['NVIDIA_TF32_OVERRIDE'] = '1'\n"
        f"run(load_script({MAIN_SCRIPT!r}).main)\n"
    )
    options = {"script": script, "kind": "mpiexec", "processes": 2, "env": environment()}
    done = run_script(*flags, "--step_reverse", 1, "--output", tmp_path / "out", **options)
    assert done.returncode == 0, done.stderr
    both = "1 x nothing set, 1 x NVIDIA_TF32_OVERRIDE=1"
    assert done.stderr.count(f"the environment differs between processes ({both})") == 1
    record = json.loads((tmp_path / "out/t_1_20_run.json").read_text())
    assert record["begun_with"]["environment"] == both
    assert record["begun_with"]["hardware"] == inference.hardware(CPU)


def test_a_resumed_run_is_warned_of_other_variables_but_not_of_what_was_never_recorded(
    flags, tmp_path, monkeypatch, capsys
):
    record = tmp_path / "t_1_20_run.json"

    def told() -> str:
        next(tmp_path.rglob("*.JPEG")).unlink()
        describe_machine.cache_clear()
        capsys.readouterr()
        assert run_here(MAIN_SCRIPT, *flags, "--step_reverse", 1, "--output", tmp_path) == 0
        return "\n".join(line for line in capsys.readouterr().err.splitlines() if "to rounding" in line)

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert run_here(MAIN_SCRIPT, *flags, "--step_reverse", 1, "--output", tmp_path) == 0
    assert json.loads(record.read_text())["begun_with"]["environment"] == "CUBLAS_WORKSPACE_CONFIG=:4096:8"
    assert told() == ""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    changed = "environment was CUBLAS_WORKSPACE_CONFIG=:4096:8 and is now NVIDIA_TF32_OVERRIDE=1"
    assert told() == (f"warning: {tmp_path}/t_1_20_images: {changed}. Samples will agree to rounding, not to the byte")

    old = json.loads(record.read_text())
    old["begun_with"] = {name: value for name, value in old["begun_with"].items() if name not in NEW}
    record.write_text(json.dumps(old))
    assert told() == ""
    old["begun_with"]["hardware"] = "NVIDIA A100"
    record.write_text(json.dumps(old))
    assert "hardware was NVIDIA A100 and is now" in told()


def test_parts_of_an_older_version_are_resumed_without_a_warning(tmp_path, capsys, monkeypatch):
    from guided_diffusion.runs.parts import Parts

    before = {"hardware": "a CPU", "torch": "2.6"}
    Parts(str(tmp_path / "parts"), {}, before)
    Parts(str(tmp_path / "parts"), {}, {**before, "environment": "NVIDIA_TF32_OVERRIDE=1"})
    assert capsys.readouterr().err == ""
    Parts(str(tmp_path / "parts"), {}, {**before, "environment": "", "torch": "2.7"})
    assert "torch was 2.6 and is now 2.7. Results will agree to rounding" in capsys.readouterr().err


def test_a_record_without_the_number_of_the_arithmetic_is_of_the_first():
    assert machine_changes({"threads": 2}, {"threads": 2, "arithmetic": 1}) == []
    assert machine_changes({"threads": 2}, {"threads": 2, "arithmetic": 2}) == ["arithmetic was 1 and is now 2"]
    assert machine_changes({"arithmetic": 2}, {"arithmetic": 2}) == []
    assert machine_changes({"arithmetic": 2}, {}) == []  # a script that applies no such network
