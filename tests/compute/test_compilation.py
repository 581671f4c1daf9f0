"""When a network is compiled, what happens if that fails, and that a resumed run follows its record."""

from __future__ import annotations

import json
import math
from pathlib import Path

from guided_diffusion.checkpoints import load_model
from guided_diffusion.compute import compilation
from guided_diffusion.compute.compilation import break_even_steps, should_compile
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import model_defaults

import pytest
from conftest import MAIN_SCRIPT, SMALL_MODEL, as_flags, environment, load_script, run_script

# A machine on which --compile auto is in favour, but rank 1 of which has no compiler.
AS_ON_A_GPU = """
import os, sys
from guided_diffusion.compute import compilation
from guided_diffusion.command_line.stopping import run
from guided_diffusion.system.other_scripts import load_script

compilation.break_even_steps, compilation.on_gpu = lambda *_: 1, lambda: True
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    os.environ |= {"PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": sys.argv.pop()}
else:
    sys.argv.pop()
run(load_script("forward_backward_dataset_sample.py").main)
"""


@pytest.fixture(scope="module")
def flags(small_checkpoint, photographs):
    model = [*as_flags(SMALL_MODEL), "--model_path", str(small_checkpoint), "--timestep_respacing", "20"]
    return [*model, "--data_dir", str(photographs), "--batch_size", "3", "--num_threads", "1", "--step_reverse"]


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU that can compile; what was tried is noted."""
    tried = []
    monkeypatch.setattr(compilation, "on_gpu", lambda: True)
    monkeypatch.setattr(compilation, "compilation_problem", lambda: tried.append(1) or "")
    return tried


def samples(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.JPEG")}


def run_here(*flags) -> int:
    return load_script(MAIN_SCRIPT).main([str(flag) for flag in flags])


def test_without_a_compiler_true_ends_before_a_folder_is_touched(flags, tmp_path):
    without = environment(PATH="/nowhere", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    for name in ("CC", "CXX"):
        without.pop(name, None)
    done = run_script(*flags, 2, "--compile", True, "--output", tmp_path / "out", env=without)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert message[0].startswith("error: the network cannot be compiled: ") and "compiler" in message[0]
    assert message[1:] == ["Fix this, or use --compile False"]
    assert not (tmp_path / "out").exists()


def test_without_a_compiler_on_one_rank_auto_compiles_on_none(flags, tmp_path):
    assert run_here(*flags, 2, "--output", tmp_path / "plain") == 0
    script = tmp_path / "as_on_a_gpu.py"
    script.write_text(AS_ON_A_GPU)
    options = {"script": script, "kind": "mpiexec", "processes": 2}
    done = run_script(*flags, 2, "--output", tmp_path / "auto", tmp_path / "cache", **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be compiled on rank 1: ") == 1
    assert "compiling the network" not in done.stderr
    assert samples(tmp_path / "auto") == samples(tmp_path / "plain")
    assert "--compile" not in json.loads((tmp_path / "auto/t_2_20_run.json").read_text())["settings"]


@pytest.fixture(scope="module")
def network(small_checkpoint):
    return load_model(str(small_checkpoint), {**model_defaults(), **SMALL_MODEL})


def test_auto_is_for_many_steps_on_a_gpu(network, gpu, monkeypatch):
    steps = math.ceil(break_even_steps(network, 32))
    assert should_compile("auto", network, 32, steps)
    assert not should_compile("auto", network, 32, steps - 1)
    assert not should_compile("auto", network, 16, steps)  # smaller batches gain less per step
    monkeypatch.setattr(compilation.dist_util, "get_world_size", lambda: 2)
    monkeypatch.setattr(compilation.dist_util, "on_main", lambda function: function())
    monkeypatch.setattr(compilation.dist_util, "gather_objects", lambda value: [value] * 2)
    assert not should_compile("auto", network, 32, steps)
    assert should_compile("auto", network, 32, 2 * steps)
    assert len(gpu) == 2
    monkeypatch.setattr(compilation, "on_gpu", lambda: False)
    assert not should_compile("auto", network, 32, 100 * steps)
    assert not should_compile(False, network, 32, 100 * steps)
    assert len(gpu) == 2
    assert should_compile(True, network, 1, 1)


def test_a_resumed_run_does_as_its_record_says(flags, gpu, tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(compilation, "compile_network", lambda model, *_: compiled.append(1) or model)
    record, plain = tmp_path / "out/t_2_20_run.json", tmp_path / "plain"

    # Begun uncompiled, since it is short. Then auto would compile.
    assert run_here(*flags, 2, "--output", plain) == 0
    monkeypatch.setattr(compilation, "break_even_steps", lambda *_: 1)
    next(plain.rglob("*.JPEG")).unlink()
    assert run_here(*flags, 2, "--output", plain) == 0
    assert run_here(*flags, 2, 3, "--output", plain) == 0  # and a new time is treated as the others
    assert not gpu and not compiled

    # Begun compiled. Then auto would not compile.
    assert run_here(*flags, 2, "--output", tmp_path / "out") == 0
    assert json.loads(record.read_text())["settings"]["compile"] is True
    assert len(gpu) == len(compiled) == 1
    monkeypatch.setattr(compilation, "break_even_steps", lambda *_: 10**9)
    next((tmp_path / "out").rglob("*.JPEG")).unlink()
    assert run_here(*flags, 2, "--output", tmp_path / "out") == 0
    assert len(gpu) == len(compiled) == 2

    # A machine that cannot.
    next((tmp_path / "out").rglob("*.JPEG")).unlink()
    before = record.read_bytes()
    monkeypatch.setattr(compilation, "compilation_problem", lambda: "there is no compiler")
    for more in ((), (3,), ("--compile", True)):
        with pytest.raises(UserError, match=r"^the network cannot be compiled: there is no compiler\.\n.*on record"):
            run_here(*flags, 2, *more, "--output", tmp_path / "out")
    assert record.read_bytes() == before and not (tmp_path / "out/t_3_20_run.json").exists()

    # Times that were computed in different ways.
    record.replace(plain / record.name)
    with pytest.raises(
        UserError, match=r"t_2_20_run.json is of a compiled run and \S*t_3_20_run.json is not"
    ) as caught:
        run_here(*flags, 2, 3, "--output", plain)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1",
            "InvalidCxxCompiler: N",
        ),
        (
            "backend='inductor' raised:\nRuntimeError: Failed to find C compiler.\n\nSet TORCH_LOGS",
            "RuntimeError: F",
        ),
        ("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found", "InvalidCxxCompiler: No"),
        ("In a subprocess:\n\nTraceback:\n  File x\nsubprocess.CalledProcessError: gcc\n", "subprocess.CalledProcess"),
    ],
)
def test_the_reason_is_the_line_that_tells_it(message, reason):
    assert compilation.failure_line(RuntimeError(message)).startswith(reason)


def test_missing_headers_are_named(monkeypatch, tmp_path):
    error = RuntimeError("Command '['/usr/bin/gcc', '/tmp/x/main.c']' returned non-zero exit status 1.")
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert compilation.failure_line(error).startswith(f"{tmp_path}/Python.h is missing")
    (tmp_path / "Python.h").touch()
    assert compilation.failure_line(error) == "/usr/bin/gcc failed, its message is above"
