"""Several runs with one output: one at a time, or as shards of one run; and what a failed run leaves behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from guided_diffusion.errors import ResultError, UserError
from guided_diffusion.runs import locks
from guided_diffusion.runs.inputs import Inputs, write_entries
from guided_diffusion.sample_folders import SampleRun

import numpy as np
import pytest
from conftest import SMALL_MODEL, as_flags, load_script, run_script, start_script
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")

MAIN = "forward_backward_dataset_sample.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "val"
    rng = np.random.default_rng(0)
    for i in range(7):
        path = folder / f"c{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def flags(small_checkpoint, data) -> dict:
    model = {**SMALL_MODEL, "num_threads": 1, "num_workers": 0}
    return {**model, "model_path": small_checkpoint, "data_dir": data, "timestep_respacing": 4, "batch_size": 2}


def call(script: str, *words, **flags) -> int:
    return load_script(script).main([*as_flags(flags), *map(str, words)])


def samples(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.glob("t_*_images/*/*.JPEG")}


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """What one run writes at two times."""
    output = tmp_path_factory.mktemp("whole")
    assert call(MAIN, "--step_reverse", 2, 3, **flags, output=output) == 0
    assert len(samples(output)) == 14
    return output


# One run at a time


def wait_for(condition, process=None) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_second_run_stops_and_a_killed_one_is_replaced_at_once(flags, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "EXPIRY", 1000)
    output = tmp_path / "out"
    slow = {**flags, "timestep_respacing": "1000", "output": output}
    process = start_script(*as_flags(slow), "--step_reverse", "700", stdout=subprocess.DEVNULL)
    wait_for(lambda: (output / "t_700_1000_run.json").exists(), process)
    words = rf"t_700_1000_images is in use by another run: process {process.pid} on .*another --output"
    with pytest.raises(UserError, match=re.compile(words, re.DOTALL)):
        call(MAIN, "--step_reverse", 700, **slow)
    assert process.poll() is None
    assert call(MAIN, "--step_reverse", 2, **{**flags, "output": output}) == 0  # another time of the same output
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (output / "t_700_1000.lock").exists()
    assert call(MAIN, "--step_reverse", 2, **{**flags, "output": output}) == 0
    with pytest.raises(KeyboardInterrupt):  # the lock is taken over: the run gets to work
        interrupted(MAIN, "forward_backward", "--step_reverse", 700, **slow)
    assert not list(output.glob("*.lock"))


def interrupted(script: str, name: str, *words, **flags) -> None:
    """Call a script whose function `name` is interrupted."""
    module = load_script(script)

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    setattr(module, name, interrupt)
    module.main([*as_flags(flags), *map(str, words)])


def test_every_script_locks_its_results(flags, data, resnet18, whole, tmp_path):
    owner = {**locks._identity(), "since": "now", "token": "0"}  # a process that exists
    sampling = {name: flags[name] for name in (*SMALL_MODEL, "model_path", "batch_size", "num_threads")}
    pairs = {"starting_data_dir": data, "data_dir": whole, "time_series": 2, "timestep_respacing": 4}
    runs = {
        "act_stat_resnet18": ("classifier_statistics.py", {"data_dir": data, **resnet18}),
        "act_diff_resnet18-t_2_4": ("evaluate_classifier.py", {"normalization": "none", **pairs, **resnet18}),
        "image_nll": ("scripts/image_nll.py", {"data_dir": data, "num_workers": 0, **sampling}),
        "samples_2x32x32x3": ("scripts/image_sample.py", {"num_samples": 2, **sampling}),
    }
    for name, (script, given) in runs.items():
        (tmp_path / f"{name}.lock").write_text(json.dumps(owner))
        with pytest.raises(UserError, match=rf"{name}\.npz is in use by another run: process {os.getpid()} on "):
            call(script, **given, output=tmp_path)
    assert names(tmp_path) == {f"{name}.lock" for name in runs}


# Shards


def test_shards_write_what_one_run_writes(flags, whole, tmp_path):
    """Processes at the same time, of which one is started late and one is several processes itself."""
    common = [*as_flags({**flags, "output": tmp_path, "num_shards": 3}), "--step_reverse", "2", "3"]
    first = [start_script(*common, "--shard", str(shard)) for shard in (2, 0)]
    for process in first:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert "belong to other shards" in stderr
    record = json.loads((tmp_path / "t_2_4_run.json").read_text())
    assert not record["finished"] and record["num_shards"] == 3
    done = run_script(*common, "--shard", "1", kind="mpiexec", processes=2)
    assert done.returncode == 0 and "other shards" not in done.stderr, done.stderr
    assert samples(tmp_path) == samples(whole)
    assert names(tmp_path) == names(whole)
    for k in (2, 3):
        record = json.loads((tmp_path / f"t_{k}_4_run.json").read_text())
        assert record["finished"] and record["images"]["with_sample"] == 7
        assert sum(run["samples_written"] for run in record["runs"]) == 7
        inputs = [(folder / f"t_{k}_4_inputs.json").read_text() for folder in (tmp_path, whole)]
        assert inputs[0] == inputs[1]


def test_a_shard_that_starts_keeps_what_another_writes_meanwhile(flags, whole, tmp_path, monkeypatch):
    """The list of a unit's starting images may appear after the lists have been read."""
    common = {**flags, "output": tmp_path, "num_shards": 2, "step_reverse": 2}
    assert call(MAIN, **common, shard=0) == 0
    theirs = {"images": {"c9/9.png": [1, "f" * 64]}}
    part = tmp_path / "t_2_4_inputs_parts/000001.json"
    compare = Inputs.compare

    def and_another_shard_writes(self, *args, **options):
        compare(self, *args, **options)
        write_entries(str(part), theirs)

    monkeypatch.setattr(Inputs, "compare", and_another_shard_writes)
    with monkeypatch.context() as patch:
        patch.setattr(SampleRun, "_write_while", lambda *_: (unit for unit in ()))  # only starts
        with pytest.raises(ResultError, match="are missing"):
            call(MAIN, **common, shard=1)
    listed = json.loads((tmp_path / "t_2_4_inputs.json").read_text())["images"]
    assert listed["c9/9.png"] == theirs["images"]["c9/9.png"]


def test_the_number_of_shards_is_on_record(flags, whole, tmp_path):
    output = tmp_path / "out"
    assert call(MAIN, "--step_reverse", 2, **flags, output=output, shard=1, num_shards=2) == 0
    for change in ({}, {"shard": 0, "num_shards": 3}):
        now = change.get("num_shards", 1)
        with pytest.raises(UserError, match=rf"started with --num_shards 2, and now it is {now}"):
            call(MAIN, "--step_reverse", 2, **flags, output=output, **change)
    with pytest.raises(UserError, match="--seed was 0 and is now 1"):
        call(MAIN, "--step_reverse", 2, **flags, output=output, shard=0, num_shards=2, seed=1)
    shutil.copytree(whole, tmp_path / "whole")
    with pytest.raises(UserError, match="started with --num_shards 1, and now it is 2"):
        call(MAIN, "--step_reverse", 2, **flags, output=tmp_path / "whole", num_shards=2)


@pytest.mark.parametrize("script", [MAIN, "classifier_statistics.py", "evaluate_classifier.py"])
def test_a_shard_that_there_is_not(script, flags, data, monkeypatch):
    required = {
        MAIN: [*as_flags(flags), "--step_reverse", "2"],
        "classifier_statistics.py": ["--data_dir", str(data)],
        "evaluate_classifier.py": ["--starting_data_dir", str(data), "--time_series", "2"],
    }
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "8")
    with pytest.raises(UserError, match=r"--shard 8 --num_shards 8: expected a shard from 0 to 7.*--array=0-7"):
        load_script(script).main([*required[script], "--shard", "8", "--num_shards", "8"])


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return dict(found)


def test_shards_of_statistics_and_of_an_evaluation(resnet18, data, whole, tmp_path):
    statistics = {**resnet18, "data_dir": data, "num_samples": 7, "batch_size": 2}
    evaluation = {**resnet18, "starting_data_dir": data, "data_dir": whole, "time_series": "2,3"}
    evaluation |= {"timestep_respacing": 4, "batch_size": 6}
    for script, flags in (("classifier_statistics.py", statistics), ("evaluate_classifier.py", evaluation)):
        assert call(script, **flags, output=tmp_path / "one") == 0
        for shard in (2, 0, 1):
            before = set() if shard == 2 and script == "classifier_statistics.py" else names(tmp_path / "three")
            assert call(script, **flags, output=tmp_path / "three", shard=shard, num_shards=3) == 0
            assert call(script, **flags, output=tmp_path / "three", shard=shard, num_shards=3) == 0  # nothing to do
            if shard != 1:
                parts = names(tmp_path / "three") - before
                assert all(name.endswith("_parts") for name in parts), parts
    assert names(tmp_path / "one") == names(tmp_path / "three")
    for path in (tmp_path / "one").glob("*.npz"):
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes(), path.name
    for path in (tmp_path / "one").glob("act_diff*_inputs.json"):
        assert path.read_text() == (tmp_path / "three" / path.name).read_text()


def test_an_image_that_one_shard_cannot_read(flags, data, tmp_path, capsys):
    folder = tmp_path / "val"
    shutil.copytree(data, folder)
    victim = folder / "c0/0.png"
    good = victim.read_bytes()
    victim.write_bytes(b"nothing")
    mine = {**flags, "data_dir": folder, "output": tmp_path / "out", "num_shards": 2}
    assert call(MAIN, "--step_reverse", 2, **mine, shard=0) == 1
    assert call(MAIN, "--step_reverse", 2, **mine, shard=1) == 0
    record = json.loads((tmp_path / "out/t_2_4_run.json").read_text())
    assert not record["finished"] and list(record["images"]["unreadable"]) == ["c0/0.png"]
    victim.write_bytes(good)
    assert call(MAIN, "--step_reverse", 2, **mine, shard=1) == 0
    assert call(MAIN, "--step_reverse", 2, **mine, shard=0) == 0
    record = json.loads((tmp_path / "out/t_2_4_run.json").read_text())
    assert record["finished"] and record["images"] == {"chosen": 7, "with_sample": 7, "unreadable": {}}


# Output that is removed, and runs that failed


def test_output_that_is_removed_during_a_run_is_not_finished(flags, tmp_path, monkeypatch):
    main = load_script(MAIN)
    original, output = main.forward_backward, tmp_path / "out"

    def removing(what):
        def forward_backward(network, diffusion, unit, *args):
            if unit.index == 2:
                wait_for(lambda: len(samples(output)) == 4)
                shutil.rmtree(what)
            return original(network, diffusion, unit, *args)

        return forward_backward

    words = [*as_flags({**flags, "output": output}), "--step_reverse", "2"]
    monkeypatch.setattr(main, "forward_backward", removing(output / "t_2_4_images"))
    with pytest.raises(ResultError, match=r"4 sample\(s\) that were written are missing, such as .*/c0/0_t0500.JPEG"):
        main.main(words)
    record = json.loads((output / "t_2_4_run.json").read_text())
    assert not record["finished"] and record["images"]["with_sample"] == 3
    monkeypatch.setattr(main, "forward_backward", original)
    assert main.main(words) == 0
    record = json.loads((output / "t_2_4_run.json").read_text())
    assert record["finished"] and [run["samples_written"] for run in record["runs"]] == [7, 4]

    shutil.rmtree(output)
    monkeypatch.setattr(main, "forward_backward", removing(output))
    with pytest.raises(UserError, match=r"t_2_4.lock has disappeared: was .*t_2_4_images removed or moved during"):
        main.main(words)
    assert not (output / "t_2_4_run.json").exists()


def test_an_error_in_the_writer_s_thread_ends_the_run(flags, tmp_path, monkeypatch):
    from guided_diffusion.runs import pipeline

    written = []

    def encode(*args):
        if len(written) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        written.append(args)
        return b"image"

    monkeypatch.setattr(pipeline, "encode", encode)
    with pytest.raises(RuntimeError, match="CUDA error"):
        call(MAIN, "--step_reverse", 2, **flags, output=tmp_path)
    assert len(samples(tmp_path)) == 3
    assert not json.loads((tmp_path / "t_2_4_run.json").read_text())["finished"]


def test_a_run_that_failed_before_its_first_sample_does_not_block_the_corrected_command(flags, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(MAIN, "forward_backward", "--step_reverse", 2, **flags, output=tmp_path, seed=1)
    assert (tmp_path / "t_2_4_run.json").exists()
    assert call(MAIN, "--step_reverse", 2, **flags, output=tmp_path) == 0
    assert json.loads((tmp_path / "t_2_4_run.json").read_text())["settings"]["seed"] == 0
    with pytest.raises(UserError, match="--seed was 0 and is now 1"):
        call(MAIN, "--step_reverse", 2, **flags, output=tmp_path, seed=1)


def test_a_folder_that_was_moved_away_does_not_block_the_next_run(flags, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    with pytest.raises(UserError, match=r"move the folder away$"):
        call(MAIN, "--step_reverse", 2, **flags, output=output, seed=1)
    (output / "t_2_4_images").rename(tmp_path / "away")
    assert call(MAIN, "--step_reverse", 2, **flags, output=output, seed=1) == 0
    record = json.loads((output / "t_2_4_run.json").read_text())
    assert record["settings"]["seed"] == 1 and len(record["runs"]) == 1 and record["finished"]


def test_failed_runs_of_the_other_scripts_do_not_block_corrected_commands(flags, data, resnet18, whole, tmp_path):
    sampling = {name: flags[name] for name in (*SMALL_MODEL, "model_path", "batch_size", "num_threads")}
    evaluation = {**resnet18, "starting_data_dir": data, "data_dir": whole, "time_series": "2,3"}
    evaluation |= {"timestep_respacing": 4, "normalization": "none"}
    runs = {
        "scripts/image_nll.py": (
            {"data_dir": data, "num_workers": 0, "timestep_respacing": 2, **sampling},
            {"seed": 1},
            "bits_per_dimension",
        ),
        "evaluate_classifier.py": (evaluation, {"batch_size": 3}, "compare"),
    }
    for script, (given, change, function) in runs.items():
        with pytest.raises(KeyboardInterrupt):
            interrupted(script, function, **{**given, **change}, output=tmp_path)
        assert call(script, **given, output=tmp_path) == 0


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: "{",
        lambda record: "[]",
        lambda record: '"text"',
        lambda record: json.dumps({**record, "settings": None}),
        lambda record: json.dumps({**record, "begun_with": ["x86_64"]}),
        lambda record: json.dumps({**record, "runs": None}),
    ],
)
def test_a_record_that_was_edited_by_hand(edit, flags, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    path = output / "t_2_4_run.json"
    path.write_text(edit(json.loads(path.read_text())))
    with pytest.raises(UserError, match=r"t_2_4_run\.json is corrupted: it is not the record of a run") as caught:
        call(MAIN, "--step_reverse", 2, **flags, output=output)
    assert len(str(caught.value).splitlines()) <= 2
    path.write_text("null")
    with pytest.raises(UserError, match=r"t_2_4_run\.json is missing: their settings are not known"):
        call(MAIN, "--step_reverse", 2, **flags, output=output)
    assert samples(output) == samples(whole)
