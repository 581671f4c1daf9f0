"""The main script as its users run it: real photographs, real checkpoints, real processes, really killed.

Where a process is not the point, the script's `main` is called in the tests' own: a process needs seconds to start.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from guided_diffusion.compute import compilation
from guided_diffusion.errors import UserError
from guided_diffusion.images.io import read_image
from guided_diffusion.script_util import model_and_diffusion_defaults, model_from_flags

import numpy as np
import pytest
import torch
from conftest import (
    MAIN_SCRIPT,
    REPOSITORY,
    SMALL_MODEL,
    as_flags,
    environment,
    lay_out_photographs,
    load_script,
    run_script,
    save_checkpoint,
    start_script,
)
from PIL import Image

TIMES = ["3", "10", "20"]


@pytest.fixture(scope="module")
def flags(small_checkpoint, photographs):
    """A run of three units of work at each of three times, the last of which is pure noise."""
    model = [*as_flags(SMALL_MODEL), "--model_path", str(small_checkpoint), "--timestep_respacing", "20"]
    return [*model, "--data_dir", str(photographs), "--batch_size", "3", "--num_threads", "1", "--step_reverse", *TIMES]


@pytest.fixture(scope="module")
def reference_run(flags, tmp_path_factory):
    """What one process writes without interruption: name -> bytes."""
    output = tmp_path_factory.mktemp("reference")
    done = run_script(*flags, "--output", output)
    assert done.returncode == 0, done.stderr
    kinds = ("images", "inputs.json", "run.json")
    assert sorted(path.name for path in output.iterdir()) == sorted(f"t_{k}_20_{kind}" for k in TIMES for kind in kinds)
    return samples(output)


@pytest.fixture(autouse=True, scope="module")
def threads():
    """`main` sets the number of threads of the tests' process; others shall not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_here(*flags) -> int:
    """Call the script's `main` in this process."""
    return load_script(MAIN_SCRIPT).main([str(flag) for flag in flags])


def samples(output: Path) -> dict[str, bytes]:
    """Every file but the records, the locks and the lists of inputs, hidden ones too."""
    apart = re.compile(r"/t_\d+_\d+(_run\.json|_inputs\.json|_inputs_parts/.*|[^/]*\.lock)$")
    files = (path for path in output.rglob("*") if path.is_file() and not apart.search(str(path)))
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def count(output: Path) -> int:
    """How many samples there are, while a run may be writing more: no file is opened, since scratch files vanish."""
    return sum(1 for _ in output.rglob("*.JPEG"))


def scratch_files(output: Path) -> list[Path]:
    return [path for path in output.rglob(".*") if path.is_file()]


def assert_plain_words(done: subprocess.CompletedProcess, *words: str, status: int = 2) -> None:
    """The run ended with `status` and at most three short lines, in which all of `words` stand."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    message = done.stderr[done.stderr.index("error: ") :]
    assert len(message.strip().splitlines()) <= 2, message
    for word in words:
        assert word in message


def assert_refused(capsys, flags: list, *words: str) -> None:
    """In this process: `main` ends with a mistake, told in at most two short lines in which all of `words` stand."""
    capsys.readouterr()
    with pytest.raises((UserError, SystemExit)) as caught:
        run_here(*flags)
    told = capsys.readouterr()
    if caught.type is SystemExit:
        assert caught.value.code == 2
    message = told.err if caught.type is SystemExit else str(caught.value)
    assert told.out == ""
    assert len(message.strip().splitlines()) <= 2, message
    for word in words:
        assert word in message


def test_every_image_gets_its_sample_under_its_own_name(reference_run, photographs):
    names = [path.relative_to(photographs).with_suffix("") for path in photographs.rglob("*.*")]
    assert len(names) == 7
    expected = {f"t_{k}_20_images/{name}_t{int(k) * 50:04d}.JPEG" for k in TIMES for name in names}
    assert reference_run.keys() == expected
    for data in reference_run.values():
        image = Image.open(io.BytesIO(data))
        image.load()
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
    assert len(set(reference_run.values())) == len(expected)  # no two images are alike


@pytest.mark.parametrize(("kind", "processes"), [("mpiexec", 2), ("mpiexec", 3), ("torchrun", 2)])
def test_same_bytes_from_several_processes(kind, processes, flags, reference_run, tmp_path):
    done = run_script(*flags, "--output", tmp_path, kind=kind, processes=processes)
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path) == reference_run
    record = json.loads((tmp_path / "t_10_20_run.json").read_text())
    assert record["runs"][0]["processes"] == processes
    assert record["runs"][0]["samples_written"] == 7
    assert done.stderr.count("samples to make") == 1  # one process speaks


def test_same_bytes_after_being_killed_again_and_again(flags, reference_run, tmp_path):
    """SIGKILL at random moments: some before the work, some in it; the last run is left to finish."""
    chance = random.Random(time.time_ns())
    halfway, kills = 0, 6
    for attempt in range(kills + 1):
        process = start_script(*flags, "--output", tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = count(tmp_path)
        patience = time.monotonic() + 120
        if attempt == kills:
            process.wait(timeout=600)
        elif attempt % 4:  # wait until this run has got further, then strike
            while process.poll() is None and count(tmp_path) <= before and time.monotonic() < patience:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.3))
        else:
            time.sleep(chance.uniform(0.2, 3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == 0:
            break
        shown = {name: data for name, data in samples(tmp_path).items() if not Path(name).name.startswith(".")}
        assert shown.items() <= reference_run.items()  # what is there is whole, and right
        halfway += 0 < len(shown) < len(reference_run)
    assert process.returncode == 0
    assert halfway >= 2
    assert samples(tmp_path) == reference_run  # nothing else is left either
    assert json.loads((tmp_path / "t_3_20_run.json").read_text())["finished"]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_leaves_a_tidy_state(signum, status, flags, reference_run, tmp_path):
    process = start_script(*flags, "--output", tmp_path)
    while not count(tmp_path) and process.poll() is None:
        time.sleep(0.01)
    for _ in range(2):  # as Slurm does at a time limit
        process.send_signal(signum)
    _, stderr = process.communicate()
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr
    assert "all files written so far are complete. Rerun the same command to resume" in stderr
    assert not scratch_files(tmp_path)
    there = samples(tmp_path)
    assert 0 < len(there) < len(reference_run)
    assert there.items() <= reference_run.items()
    assert run_here(*flags, "--output", tmp_path) == 0
    assert samples(tmp_path) == reference_run


def test_a_restart_does_only_what_is_missing(flags, reference_run, tmp_path, capsys):
    assert run_here(*flags, "--output", tmp_path) == 0
    assert samples(tmp_path) == reference_run
    lost = tmp_path / "t_10_20_images/n02123045/n02123045_2_t0500.JPEG"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.JPEG") if path != lost}
    lost.unlink()
    capsys.readouterr()
    assert run_here(*flags, "--output", tmp_path) == 0
    assert "1 samples to make, 20 exist already" in capsys.readouterr().err
    assert samples(tmp_path) == reference_run
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert run_here(*flags, "--output", tmp_path) == 0
    assert "0 samples to make" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "t_10_20_run.json").read_text())["runs"]) == 2


def test_noise_depends_on_seed_name_and_time_alone(flags, reference_run, photographs, tmp_path):
    """Fewer images in other batches: to float rounding the same samples (bytes may differ); another seed: others."""
    few = [*flags, "--num_classes", "2", "--batch_size", "2", "--image_format", "png"]
    run_here(*few, "--output", tmp_path / "a")
    run_here(*flags, "--image_format", "png", "--output", tmp_path / "b")
    run_here(*few, "--seed", "1", "--output", tmp_path / "c")
    a, b, c = (samples(tmp_path / run) for run in "abc")
    assert len(a) == 12 and a.keys() < b.keys() and a.keys() == c.keys()
    pixels = [{name: np.asarray(Image.open(io.BytesIO(run[name]))).astype(int) for name in a} for run in (a, b, c)]
    assert max(abs(pixels[0][name] - pixels[1][name]).max() for name in a) <= 1
    assert all((pixels[0][name] != pixels[2][name]).mean() > 0.5 for name in a)


def test_at_time_zero_the_image_comes_back(small_checkpoint, photographs, tmp_path):
    model = [*as_flags(SMALL_MODEL), "--model_path", small_checkpoint]
    run_here(*model, "--data_dir", photographs, "--step_reverse", 0, "--image_format", "png", "--output", tmp_path)
    starts = sorted(path for path in photographs.rglob("*") if path.is_file())
    ends = sorted((tmp_path / "t_0_1000_images").rglob("*.png"))
    assert len(starts) == len(ends) == 7
    for start, end in zip(starts, ends, strict=True):
        assert (np.asarray(Image.open(end)) == read_image(str(start), 32)).all()


def test_default_output_and_ddim(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_here(*flags, "--step_reverse", 4, "--use_ddim", "True", "--timestep_respacing", "ddim20") == 0
    output = tmp_path / "results" / "diffused_ILSVRC2012_validation"
    assert len(list(output.glob("t_4_20_images/*/*_t0200.JPEG"))) == 7


def settings_in(output: Path, times: list[str] = TIMES, **changes) -> list[dict]:
    """The recorded settings at each time, after these changes to the records; a setting of None is removed."""
    found = []
    for k in times:
        path = output / f"t_{k}_20_run.json"
        record = json.loads(path.read_text())
        settings = {name: value for name, value in {**record["settings"], **changes}.items() if value is not None}
        path.write_text(json.dumps({**record, "settings": settings}))
        found.append(settings)
    return found


def test_the_multistep_solver_is_reproducible(flags, reference_run, tmp_path, capsys):
    """The same bytes from two processes, resumed, and in another order of times."""
    flags = [*flags, "--sampler", "sde-dpmsolver++"]
    assert run_here(*flags, "--output", tmp_path / "one") == 0
    reference = samples(tmp_path / "one")
    assert reference.keys() == reference_run.keys()
    assert not set(reference.values()) & set(reference_run.values())
    assert all(s["sampler"] == "sde-dpmsolver++" and "use_ddim" not in s for s in settings_in(tmp_path / "one"))

    done = run_script(*flags, "--output", tmp_path / "two", kind="mpiexec", processes=2)
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path / "two") == reference

    for name in ("t_10_20_images/n02123045/n02123045_2_t0500.JPEG", *(n for n in reference if n.startswith("t_3_"))):
        (tmp_path / "one" / name).unlink()
    assert run_here(*flags, "--step_reverse", 20, 10, 3, "--output", tmp_path / "one") == 0
    assert samples(tmp_path / "one") == reference
    assert_refused(
        capsys,
        [*flags, "--sampler", "ddpm", "--output", tmp_path / "one"],
        "--sampler was sde-dpmsolver++ and is now ddpm",
    )
    settings_in(tmp_path / "one", extrapolation=None)  # as in the first version of the solver, without a limit
    words = "the largest factor of extrapolation (--sampler sde-dpmsolver++) was not set and is now 0.5"
    assert_refused(capsys, [*flags, "--output", tmp_path / "one"], words)


@pytest.mark.parametrize(("sampler", "use_ddim"), [("ddpm", False), ("ddim", True)])
def test_a_record_without_the_sampler_is_resumed(sampler, use_ddim, flags, tmp_path, capsys):
    """Records used to have --use_ddim alone."""
    run = [*flags, "--step_reverse", 3, "--output", tmp_path]
    assert run_here(*run, "--sampler", sampler) == 0
    before = samples(tmp_path)
    settings_in(tmp_path, ["3"], sampler=None, use_ddim=use_ddim)
    (tmp_path / next(iter(before))).unlink()
    assert_refused(
        capsys, [*run, "--sampler", "sde-dpmsolver++"], f"--sampler was {sampler} and is now sde-dpmsolver++"
    )
    assert run_here(*run, "--use_ddim", use_ddim) == 0
    assert samples(tmp_path) == before


def test_labels_reach_a_class_conditional_model(photographs, tmp_path, capsys):
    model = {**SMALL_MODEL, "class_cond": True}
    checkpoint = save_checkpoint(tmp_path / "cond.pt", model)
    flat = tmp_path / "validation"
    flat.mkdir()
    for i in range(1, 4):
        shutil.copy(photographs / "n02123045/n02123045_1.JPEG", flat / f"ILSVRC2012_val_{i:08d}.JPEG")
    labels = tmp_path / "labels.txt"
    flags = [*as_flags(model), "--model_path", checkpoint, "--data_dir", flat, "--timestep_respacing", 4]
    flags += ["--step_reverse", 4, "--labels_file", labels, "--batch_size", 3]
    seen = []
    for wnids in (["n01440764", "n02123045", "n07920052"], ["n01440764", "n02123159", "n07920052"]):
        labels.write_text("\n".join(wnids) + "\n")
        output = tmp_path / f"out{len(seen)}"
        assert run_here(*flags, "--output", output) == 0
        seen.append(samples(output))
    first, second = seen
    assert [first[name] == second[name] for name in sorted(first)] == [True, False, True]
    record = json.loads((output / "t_4_4_run.json").read_text())
    assert record["settings"]["class_cond"] is True
    assert_refused(capsys, [*flags[:-4], "--batch_size", 3, "--output", output], "--labels_file")


def test_the_classes_of_a_model_go_by_name(photographs, tmp_path, capsys):
    """A part of the folders that the model was trained on: their indices are those of its record."""
    model = {**SMALL_MODEL, "class_cond": True}
    checkpoint = save_checkpoint(tmp_path / "model000002.pt", model)
    for i, name in enumerate(("10", "2")):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(sorted(photographs.glob("n0[47]*/*.JPEG"))[i], tmp_path / "data" / name / "1.JPEG")
    flags = [*as_flags(model), "--model_path", checkpoint, "--data_dir", tmp_path / "data", "--timestep_respacing", 4]
    flags += ["--step_reverse", 4, "--num_threads", 1]

    def digest(output, *more):
        assert run_here(*flags, "--output", tmp_path / output, *more) == 0
        return json.loads((tmp_path / output / "t_4_4_run.json").read_text())["settings"]

    by_text = digest("text")
    assert "are numbers, ordered as text: 10, 2" in capsys.readouterr().err
    assert digest("text", "--class_order", "text") == by_text
    assert capsys.readouterr().err.count("ordered as text") == 0
    by_number = digest("number", "--class_order", "number")
    assert by_number != by_text
    record = {"order": "number", "classes": {str(i): str(i) for i in range(12)}}
    (tmp_path / "classes.json").write_text(json.dumps(record))
    recorded = digest("recorded")
    key = "images_digest"
    assert len({by_text[key], by_number[key], recorded[key]}) == 3
    assert {**by_text, key: recorded[key]} == recorded
    two, ten = (
        (tmp_path / "recorded/t_4_4_images" / name).read_bytes() for name in ("2/1_t1000.JPEG", "10/1_t1000.JPEG")
    )
    assert two != (tmp_path / "number/t_4_4_images/2/1_t1000.JPEG").read_bytes() and two != ten  # 2 was 0, is 2
    assert_refused(capsys, [*flags, "--output", tmp_path / "x", "--class_order", "text"], "contradicts", "classes.json")
    (tmp_path / "data/2").rename(tmp_path / "data/13")
    assert_refused(capsys, [*flags, "--output", tmp_path / "x"], "1 of 2 classes", "not among the model's 12: 13")
    assert not (tmp_path / "x").exists()


FOLDERS = {
    "official names": ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"],
    "one class": ["1.JPEG", "2.JPEG"],
    "root and subfolders": ["cat/1.JPEG", "dog/1.JPEG", "1.JPEG"],
    "some of ImageNet": ["n02123045/1.JPEG", "samples/1.JPEG"],
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_classes_need_not_be_known(flags, photographs, tmp_path, capsys, kind):
    for name in FOLDERS[kind]:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photographs / "n02123045/n02123045_1.JPEG", tmp_path / "data" / name)
    count = len(FOLDERS[kind])
    mine = [*flags, "--data_dir", tmp_path / "data", "--step_reverse", "2,1", "0", "--output", tmp_path / "out"]
    assert run_here(*mine, "--num_per_class", 1, "--num_classes", 1) == 0
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert f"--num_classes and --num_per_class do not apply, {count} of {count} images are taken" in said
    assert len(samples(tmp_path / "out")) == 3 * count
    assert_refused(capsys, [*mine, "--num_samples", 1], "the number of images", f"was {count} and is now 1")
    if kind != "one class":  # whose names could be anything
        assert_refused(capsys, [*mine, "--class_cond", "True"], str(tmp_path / "data"))


def test_a_name_that_leaves_no_room_for_the_time_is_refused_at_once(flags, photographs, tmp_path, capsys):
    """255 bytes is the longest name that file systems have, and a letter may take several."""
    for letters, suffix, fits in (
        ("é" * 122, ".JPEG", True),
        ("é" * 122 + "a", ".JPEG", False),
        ("a" * 245, ".png", False),
    ):
        data = tmp_path / f"data{len(letters)}{suffix}"
        data.mkdir()
        shutil.copy(photographs / "n02123045/n02123045_1.JPEG", data / (letters + suffix))
        output = tmp_path / f"out{len(letters)}{suffix}"
        mine = [*flags, "--data_dir", data, "--step_reverse", 1, "--output", output]
        if fits:
            assert run_here(*mine) == 0
            (name,) = samples(output)
            assert len(os.fsencode(name.rpartition("/")[2])) == 255
        else:
            assert_refused(
                capsys, [*mine, "--model_path", "missing.pt"], "would have a name of 256 bytes", "at most 255"
            )
            assert not output.exists()


def test_an_unreadable_image_costs_only_itself(flags, reference_run, tmp_path, capsys):
    data = lay_out_photographs(tmp_path / "data" / "ILSVRC2012" / "validation")
    victim = data / "n02123045/n02123045_2.JPEG"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:1000])
    mine = [*flags, "--data_dir", data, "--output", tmp_path / "out"]
    done = run_script(*mine, kind="mpiexec", processes=2)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "n02123045_2.JPEG" in done.stderr
    assert "1 of 7 images could not be read" in done.stderr
    expected = {name: data for name, data in reference_run.items() if "n02123045_2_" not in name}
    assert samples(tmp_path / "out") == expected
    record = json.loads((tmp_path / "out/t_3_20_run.json").read_text())
    assert not record["finished"]
    assert list(record["images"]["unreadable"]) == ["n02123045/n02123045_2.JPEG"]
    assert run_here(*mine) == 1
    assert "n02123045_2.JPEG" in capsys.readouterr().err
    victim.write_bytes(whole)
    assert run_here(*mine) == 0
    assert samples(tmp_path / "out") == reference_run


def test_a_folder_belongs_to_one_experiment(flags, photographs, small_checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    mine = [*flags, "--step_reverse", "3", "--output", output]
    assert run_here(*mine) == 0
    before = samples(output), (output / "t_3_20_run.json").read_bytes()
    other = tmp_path / "other.pt"
    weights = torch.load(small_checkpoint)
    weights["out.2.bias"] += 1
    torch.save(weights, other)
    for change, words in (
        (["--seed", 1], ["--seed was 0 and is now 1"]),
        (["--batch_size", 4], ["--batch_size was 3 and is now 4"]),
        (["--model_path", other], ["--model_path"]),
        (["--num_head_channels", 8], ["--num_head_channels was 16 and is now 8"]),
        (["--num_per_class", 1], ["--num_per_class"]),
        (["--image_format", "png", "--seed", 2], ["--image_format was jpeg", "--seed was 0"]),
    ):
        assert_refused(capsys, [*mine, *change], *words)
        assert (samples(output), (output / "t_3_20_run.json").read_bytes()) == before
    (output / "t_3_20_run.json").unlink()
    assert_refused(capsys, mine, "t_3_20_run.json is missing")
    (output / "t_3_20_run.json").write_text("{")
    assert_refused(capsys, mine, "corrupted")
    assert samples(output) == before[0]


def test_plain_mistakes_get_plain_words(flags, small_checkpoint, tmp_path, capsys):
    output, data = tmp_path / "out", tmp_path / "data"
    (tmp_path / "empty").mkdir()
    data.mkdir()
    Image.new("RGB", (32, 32)).save(data / "a.png")
    (data / "linked").symlink_to(data)
    (tmp_path / "text.pt").write_text("not a checkpoint\n" * 100)
    (tmp_path / "half.pt").write_bytes(small_checkpoint.read_bytes()[:500_000])
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "file").write_text("")
    mistakes = [
        (["--step_revers", 3], ["--step_revers", "did you mean --step_reverse?"]),
        (["--step_reverse", "21"], ["--step_reverse 21", "0 to 20"]),
        (["--step_reverse", "-1"], ["--step_reverse", "-1"]),
        (["--step_reverse", "soon"], ["--step_reverse", "soon", "whole number"]),
        (["--batch_size", "0"], ["--batch_size", "0"]),
        (["--clip_denoised", "maybe"], ["--clip_denoised", "True or False", "maybe"]),
        (["--noise_schedule", "sigmoid"], ["--noise_schedule", "linear", "cosine"]),
        (["--timestep_respacing", "2000"], ["--timestep_respacing", "2000"]),
        (["--model_path", tmp_path / "none.pt"], ["--model_path", "none.pt"]),
        (["--model_path", tmp_path / "text.pt"], ["text.pt", "not a checkpoint"]),
        (["--model_path", tmp_path / "half.pt"], ["half.pt", "truncated"]),
        (["--num_channels", "64"], ["num_channels is 32 in the checkpoint, 64 in your flags", "--num_channels 32"]),
        (["--learn_sigma", "False"], ["6 output channels", "--learn_sigma True"]),
        (["--class_cond", "True"], ["--class_cond False"]),
        (["--num_channels", "33"], ["--num_channels 33", "32"]),
        (["--num_head_channels", "7"], ["--num_head_channels 7"]),
        (["--data_dir", tmp_path / "nowhere"], ["--data_dir", "nowhere"]),
        (["--data_dir", tmp_path / "empty"], ["--data_dir", "no files"]),
        (["--labels_file", tmp_path / "labels.txt"], ["--labels_file", "cat"]),
        (["--output", tmp_path / "file" / "out"], ["--output", "Not a directory"]),
        (
            ["--data_dir", data, "--output", data / "out"],
            ["t_3_20_images' (--output)", "inside", f"{data}' (--data_dir)"],
        ),
        (["--data_dir", data, "--output", data / "linked"], ["(--output)", "the next run would take them"]),
    ]
    for change, words in mistakes:
        assert_refused(capsys, [*flags, "--output", output, *change], *words)
        assert not output.exists() or not samples(output), change


def test_a_mistake_ends_the_process_without_a_traceback(flags, tmp_path):
    done = run_script(*flags, "--output", tmp_path, "--model_path", tmp_path / "none.pt")
    assert_plain_words(done, "--model_path", "none.pt")


def test_a_mistake_is_told_once_under_mpiexec(flags, tmp_path):
    done = run_script(*flags, "--num_channels", 64, "--output", tmp_path, kind="mpiexec", processes=2)
    assert done.returncode == 2
    assert done.stderr.count("num_channels is 32 in the checkpoint") == 1
    assert "Traceback" not in done.stderr


def test_two_launchers_that_disagree(flags, tmp_path):
    """An mpiexec of another MPI: it counts two processes, mpi4py's MPI one."""
    done = run_script(*flags, "--output", tmp_path, env=environment(PMI_SIZE="2", PMI_RANK="0"))
    assert_plain_words(done, "PMI_SIZE=2")
    assert not samples(tmp_path)


def test_disk_full(flags, tmp_path):
    """No file can grow beyond a limit, as on a full disk: nothing half-written is left, and a restart goes on."""
    mine = [*flags, "--image_format", "png", "--output", tmp_path / "out"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2600, resource.RLIM_INFINITY))

    done = run_script(*mine, preexec_fn=limit)
    assert_plain_words(done, "cannot write", "t_3_20_images", "File too large", "--output", status=1)
    assert not scratch_files(tmp_path)
    there = samples(tmp_path / "out")
    assert all(len(data) <= 2600 for data in there.values())
    assert run_here(*mine) == 0
    complete = samples(tmp_path / "out")
    assert len(complete) == 21
    assert there.items() <= complete.items()


def test_a_folder_that_cannot_be_written(flags, tmp_path):
    if os.geteuid() == 0:  # root may write anywhere but where there is no place for files
        target = Path("/proc/nowhere")
    else:
        target = tmp_path / "locked"
        target.mkdir(mode=0o500)
    assert_plain_words(run_script(*flags, "--output", target), "--output", str(target), status=1)


@pytest.mark.parametrize("kind", ["full", "closed pipe"])
def test_messages_that_cannot_be_written_do_not_end_a_run(kind, flags, tmp_path):
    if kind == "full":
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, stderr = os.pipe()
        os.close(reading)
    try:
        mine = [*flags, "--step_reverse", 3, "--num_samples", 2]
        assert run_script(*mine, "--output", tmp_path / "out", stderr=stderr).returncode == 0
        assert run_script(*mine, "--step_reverse", 99, "--output", tmp_path / "none", stderr=stderr).returncode == 2
    finally:
        os.close(stderr)
    assert len(samples(tmp_path / "out")) == 2


def test_a_misspelt_flag_is_told_before_a_missing_one(capsys):
    assert_plain_words(run_script("--step_revers", 3), "there is no flag --step_revers: did you mean --step_reverse?")
    assert_refused(capsys, ["--step_reverse", 3], "--data_dir", "--model_path")
    assert_refused(capsys, ["--step_reverse", 3, "stray", "--data_dir", "x", "--model_path", "y"], "stray")


def test_the_help_names_the_flags():
    done = run_script("--help", cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    for flag in ("--data_dir", "--step_reverse", "--num_threads", "--attention_resolutions", "--timestep_respacing"):
        assert flag in done.stdout


def test_readme_command_at_full_size(tmp_path):
    """The README's command, verbatim, with the published model's 552,814,086 parameters: one image, one step.

    The weights are zeros: what the network computes is the subject of other tests.
    """
    readme = (REPOSITORY / "README.md").read_text().partition("## The experiment")[2].partition("\n## ")[0]
    lines = [line for line in readme.splitlines() if line.startswith(("MODEL_FLAGS=", "python forward_backward_"))]
    assert len(lines) == 2
    lay_out_photographs(tmp_path / "datasets/ILSVRC2012/validation")
    for path in (tmp_path / "datasets").rglob("*.*"):
        if path.name != "n04008634_2.JPEG":
            path.unlink()
    (tmp_path / "models").mkdir()
    with torch.device("meta"):
        model = model_from_flags({**model_and_diffusion_defaults(), **PUBLISHED_MODEL})
    weights = {name: torch.zeros(entry.shape) for name, entry in model.state_dict().items()}
    torch.save(weights, tmp_path / "models/256x256_diffusion_uncond.pt")
    del weights  # the run needs the memory
    shutil.copy(REPOSITORY / "forward_backward_dataset_sample.py", tmp_path)
    python = f'export PATH="{Path(sys.executable).parent}:$PATH"'
    done = subprocess.run(
        ["bash", "-c", "\n".join([python, lines[0], f"{lines[1]} --timestep_respacing 4 --step_reverse 1"])],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    (written,) = (tmp_path / "results/diffused_ILSVRC2012_validation/t_1_4_images").rglob("*.JPEG")
    assert written.name == "n04008634_2_t0250.JPEG"
    assert Image.open(written).size == (256, 256)


PUBLISHED_MODEL = {
    "image_size": 256,
    "num_channels": 256,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "resblock_updown": True,
    "learn_sigma": True,
}


def test_whether_to_compile(capsys, flags):
    assert not compilation.should_compile("auto", torch.nn.Identity(), 1, 10**9)  # on a CPU
    assert_refused(capsys, [*flags, "--compile", "maybe"], "--compile", "expected True, False or auto, not 'maybe'")


def test_the_published_run_is_compiled_on_a_gpu_and_a_try_is_not(monkeypatch):
    for initialize in ("kaiming_uniform_", "uniform_"):  # slow, and not needed
        monkeypatch.setattr(torch.nn.init, initialize, lambda w, *_, **__: w)
    args = (
        load_script(MAIN_SCRIPT)
        .create_argparser()
        .parse_args(
            ["--preset", "256x256_diffusion_uncond", "--model_path", "x", "--data_dir", "y", "--step_reverse", "125"]
        )
    )
    network = model_from_flags(vars(args))
    monkeypatch.setattr(compilation.dist_util, "dev", lambda: torch.device("cuda"))
    monkeypatch.setattr(compilation, "compilation_problem", lambda: "")  # there is none to try it on
    assert compilation.should_compile("auto", network, 32, 10_000 // 32 * 125)
    assert not compilation.should_compile("auto", network, 32, 250)
    assert not compilation.should_compile(False, network, 32, 10**6)
