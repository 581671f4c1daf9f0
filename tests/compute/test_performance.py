"""Every way in which the network may be computed gives the same numbers, and the benchmark measures them.

Speed is not tested: scripts/benchmark.py measures it.
"""

from __future__ import annotations

import copy
import io
import json
import re
import sys
from functools import partial
from types import SimpleNamespace

from guided_diffusion.checkpoints import load_model, load_noisy_classifier
from guided_diffusion.compute import compilation, inference
from guided_diffusion.compute.compilation import compile_network
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import (
    classifier_defaults,
    create_gaussian_diffusion,
    model_and_diffusion_defaults,
    model_defaults,
)

import numpy as np
import pytest
import torch
from benchmarking import timing
from benchmarking.other_networks import float64_network, plain
from benchmarking.whole_scripts import makespan, simulate_processes
from conftest import MAIN_SCRIPT, SMALL_MODEL, as_flags, load_script, run_python, run_script, save_checkpoint
from PIL import Image
from reference import golden, reference_inputs, reference_model, relative_error
from torch import nn

UNETS = ["unet_readme_like", "unet_conv_resample_heads", "unet_new_attention_order"]
COMPILED = UNETS[0]  # in several tests, which share its kernels: they take a minute


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def reference(name):
    """The network of a golden file, what it is given, and what it is to make of that."""
    x, rest = reference_inputs(name)
    return reference_model(name).requires_grad_(False), partial(_call, x=x, **rest), golden(name).out


def _call(network, **given):
    with torch.no_grad():
        return network(**given)


def distance(a, b):
    """Relative, of all entries."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def half(model, channels_last=False):
    model = copy.deepcopy(model)
    model.convert_to_fp16(torch.bfloat16)
    return model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("name", UNETS)
def test_the_networks_to_compare_with_are_the_same_network(name):
    model, call, expected = reference(name)
    assert relative_error(call(plain(model)), expected) < 1e-4
    right = call(float64_network(model))
    assert right.dtype == torch.float32
    assert distance(call(model), right) < 3e-6
    assert relative_error(right, expected) < 1e-4
    assert all(a is b for a, b in zip(plain(model).parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", UNETS)
def test_half_precision_is_no_worse_than_a_plain_network_in_it(name, channels_last):
    model, call, _ = reference(name)
    right = call(float64_network(model))
    assert distance(call(half(model, channels_last)), right) < 1.1 * distance(call(plain(half(model))), right)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_network_gives_the_reference_numbers(precision):
    model, call, expected = reference(COMPILED)
    right = call(float64_network(model))
    diffusion = create_gaussian_diffusion(rescale_timesteps=True)  # timesteps may be fractions, as here
    kind = copy.deepcopy(model) if precision == "float32" else half(model, channels_last=True)
    inference.compute_exactly()
    kind.requires_grad_()  # both as in the scripts: the compiler's cache distinguishes them
    batch = len(expected) + 1  # one more than there are images: it is padded
    compiled = compile_network(kind, diffusion, batch, 32)
    found = call(compiled)
    assert found.shape == expected.shape
    if precision == "float32":
        assert relative_error(found, expected) < 1e-4
    else:
        assert distance(found, right) < 1.1 * distance(call(plain(half(model))), right)


def flags_of_a_run(settings, steps, photographs, tmp_path):
    """Flags of a run of seven images, the last batch of which has one."""
    weights = save_checkpoint(tmp_path / "weights.pt", settings)
    flags = [*as_flags(settings), "--model_path", weights, "--data_dir", photographs, "--batch_size", "3"]
    return [*map(str, flags), "--timestep_respacing", "20", "--step_reverse", str(steps), "--num_threads", "1"]


def test_a_compiled_run_gives_the_same_to_rounding(photographs, tmp_path, monkeypatch, capsys, in_this_process):
    """The last batch has one image of three; nothing is compiled for it again. Another run of it has the same bytes."""
    settings = golden(COMPILED).meta.kwargs
    known = {name: settings[name] for name in model_and_diffusion_defaults() if name in settings}
    known["rescale_timesteps"] = True  # as in the test above, whose code this one finds in the compiler's cache
    flags = flags_of_a_run(known, 3, photographs, tmp_path)

    def run(output: str, compile: bool) -> dict[str, bytes]:
        script = load_script(MAIN_SCRIPT)
        assert script.main([*flags, "--compile", str(compile), "--output", str(tmp_path / output)]) == 0
        return {path.name: path.read_bytes() for path in (tmp_path / output).rglob("*.JPEG")}

    uncompiled = run("uncompiled", False)
    capsys.readouterr()
    torch._dynamo.reset()  # the tests before have compiled this network
    torch._dynamo.utils.counters.clear()
    found = run("first", True)
    assert "compiling the network" in capsys.readouterr().err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the trial's, and the network's
    assert len(found) == 7 and found.keys() == uncompiled.keys()
    for name, data in uncompiled.items():
        pixels = [np.asarray(Image.open(io.BytesIO(d)), np.int16) for d in (data, found[name])]
        assert np.abs(pixels[0] - pixels[1]).max() <= 8  # of JPEG's rounding
        assert np.abs(pixels[0] - pixels[1]).mean() < 0.1

    monkeypatch.setattr(compilation, "compilation_problem", lambda: "")  # which takes seconds
    for path in list((tmp_path / "first").rglob("*.JPEG"))[2:]:
        path.unlink()
    assert run("first", True) == found
    assert run("second", True) == found
    with pytest.raises(UserError, match="--compile was True and is now not set"):
        run("first", False)


def test_a_network_that_cannot_be_compiled_is_plain_words(monkeypatch):
    class Strange(nn.Module):
        num_classes = None

        def forward(self, x, timesteps):
            print("this cannot be part of a graph", torch.randn(3).tolist())
            return x

    with pytest.raises(UserError, match=r"(?s)cannot be compiled: .*--compile False"):
        compile_network(Strange(), create_gaussian_diffusion(), 1, 8)


def test_layout_and_precision_go_on_record(monkeypatch):
    monkeypatch.setattr(inference, "half_precision_dtype", lambda _: torch.bfloat16)
    for channels, use_fp16, layout in ((64, True, "last"), (64, False, "first"), (32, True, "first")):
        flags = {**model_defaults(), **SMALL_MODEL, "num_channels": channels, "use_fp16": use_fp16}
        model = load_model("untrained", flags)
        found = inference.prepare_network(model, use_fp16, 1)
        assert found["layout"] == f"channels {layout}"
        assert found["precision"] == ("bfloat16" if use_fp16 else "float32")
        weight = model.middle_block[0].in_layers[2].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (layout == "last")


def test_the_network_that_computes_in_another_precision_is_named(monkeypatch, capsys):
    monkeypatch.setattr(inference, "half_precision_dtype", lambda _: torch.bfloat16)
    networks = {
        "--use_fp16 True: float16 is slow here, so the U-Net": load_model(
            "untrained", {**model_defaults(), **SMALL_MODEL}
        ),
        "--classifier_use_fp16 True: float16 is slow here, so the classifier": load_noisy_classifier(
            "untrained", {**classifier_defaults(), "classifier_width": 64, "image_size": 64}
        ),
    }
    for message, network in networks.items():
        inference.prepare_network(network, True, 1)
        assert f"{message} computes in bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_same_bytes_with_channels_last(compiled, photographs, tmp_path):
    """A network wide enough for the fast layout: one process and a run resumed by two write the same."""
    wide = {**SMALL_MODEL, "num_channels": 64, "num_head_channels": 32}
    if compiled:  # at one resolution: a compiler needs seconds for each kind of layer
        wide |= {"channel_mult": "1", "attention_resolutions": "32"}
    flags = [*flags_of_a_run(wide, 4, photographs, tmp_path), "--use_fp16", "True", "--compile", str(compiled)]

    def run(**launch) -> dict[str, bytes]:
        done = run_script(*flags, "--output", tmp_path / "out", **launch)
        assert done.returncode == 0, done.stderr
        assert ("compiling the network" in done.stderr) == compiled
        return {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.JPEG")}

    files = run()
    assert len(files) == 7
    for path in sorted((tmp_path / "out").rglob("*.JPEG"))[::2]:  # some of every batch
        path.unlink()
    assert run(kind="mpiexec", processes=2) == files


def test_benchmark(tmp_path, monkeypatch, capsys):
    """On a network of no size; the parts that take minutes are left out. Single processes are forked."""

    def run(command, env, **_):
        assert command[0] == sys.executable
        return run_python(*command[1:], env=env)

    monkeypatch.setattr(timing, "subprocess", SimpleNamespace(run=run))
    script, output = load_script("scripts/benchmark.py"), tmp_path / "benchmark.json"
    flags = as_flags({**SMALL_MODEL, "repeats": 1, "seconds": 0.2, "num_threads": 1, "output": output})
    assert script.main([*flags, "--parts", "network,loop,processes,startup"]) == 0
    report = json.loads(output.read_text())
    rows = {(row["network"], row["precision"]): row for row in report["network"] if "share of peak" in row}
    assert {name for name, _ in rows} >= {"plain", "this project"}
    for row in rows.values():
        assert row["share of peak"] > 0
        assert row["images/s"] == pytest.approx(1 / row["seconds"])
    assert rows["plain", "float32"]["times plain float32"] == [1, 1, 1]
    (loop,) = report["loop"]
    assert (loop["images"], loop["steps"]) == (3, 2)
    assert 0 < loop["share of the time that the network waits"] < 1
    several = {row["processes"]: row.get("times one process") for row in report["processes"]}
    timed = [number for number in several if "simulated" not in str(number)]
    assert timed == [1, 2] or timed[0].startswith("not measured: ")
    assert several["8, simulated, 1 time"] == pytest.approx(313 / 40)  # batches, and those of the process with most
    assert 64 > several["64, simulated, 10 times"] > 63.9
    assert 0 < report["startup"][0]["seconds, least and most"][0] < 300
    assert "| this project | float32 |" in capsys.readouterr().out

    with pytest.raises(UserError, match="--parts speed: expected some of network,"):
        script.main([*flags, "--parts", "speed"])
    with pytest.raises(UserError, match="--seconds -1: expected a positive number"):
        script.main([*flags, "--seconds", "-1"])
    blocked = str(output / "benchmark.json")  # a file is in the way
    with pytest.raises(UserError, match=f"cannot write {re.escape(blocked)}: "):
        script.main([*flags, "--parts", "network", "--output", blocked])


@pytest.mark.parametrize(
    ("amounts", "speeds", "ahead", "seconds"),
    [
        ([3, 1, 2], [1], 1, 6),
        ([3, 1, 2], [1, 1], 0, 3),  # 3; 2 and 1
        ([3, 1, 2], [1, 1], 1, 5),  # 3 and 2; 1
        ([4, 4, 4, 4], [1, 0.5], 0, 12),  # three of them; one of them
        ([2, 2, 2, 2], [1, 0.25], 1, 16),  # two of them; two of them, although the first rank could do one
        ([1], [1, 1, 1], 1, 1),
    ],
)
def test_processes_simulated_by_hand(amounts, speeds, ahead, seconds):
    assert makespan(amounts, speeds, ahead) == seconds


def test_a_slow_gpu_does_not_delay_the_end():
    rows = {row["processes"]: row for row in simulate_processes()}
    row = rows["8, simulated, 10 times, one 20% slower"]
    assert 7.8 > row["times one process"] > 7.8 / 1.001
    assert all(0 <= row["share of the time above the ideal"] < 0.03 for row in rows.values())
