"""The training scripts as people run them: real images, real processes, killed and resumed."""

import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from guided_diffusion import logger
from guided_diffusion.errors import UserError

import numpy as np
import pytest
import torch
from conftest import as_flags, environment, load_script, run_script, start_script
from fork_server import start
from PIL import Image

MODEL = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "",
    "learn_sigma": True,
    "diffusion_steps": 100,
}
TRAINING = {"batch_size": 4, "lr": "1e-3", "ema_rate": "0.9", "log_interval": 2, "num_threads": 1, "num_workers": 0}
CLASSIFIER = {
    "image_size": 64,  # the smallest that has default channel multipliers
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "8",
    "classifier_pool": "attention",
    "diffusion_steps": 100,
}
UPSAMPLER = {**MODEL, "large_size": 64, "small_size": 16}
del UPSAMPLER["image_size"], UPSAMPLER["channel_mult"]


@pytest.fixture(autouse=True)
def _tidy(in_this_process):
    yield
    logger.reset()


@pytest.fixture
def started():
    """Processes that are killed if the test fails before they end."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Twelve small pictures of two classes: warm colours and cold ones."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(12):
        kind = ("cold", "warm")[i % 2]
        pixels = rng.integers(0, 90, (40 + i, 64, 3), dtype=np.uint8)
        pixels[..., 2 if kind == "cold" else 0] += 150
        (folder / kind).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"{i}.png")
    return folder


def main_of(script: str):
    module = load_script(f"scripts/{script}.py")
    return lambda *flags: module.main([str(flag) for flag in flags])


def flags_of(pictures, output, **changes):
    return as_flags({"data_dir": pictures, "output": output, **TRAINING, "sample_grid": 0, **MODEL, **changes})


def lines_of(folder):
    with open(Path(folder) / "progress.csv", newline="") as f:
        return list(csv.DictReader(f))


def weights_of(path):
    return torch.load(path, weights_only=True)


def names_in(folder):
    return {path.name for path in Path(folder).iterdir()}


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory) -> Path:
    """The results of 16 steps of image_train.py, in one process that nobody disturbed."""
    output = tmp_path_factory.mktemp("trained")
    flags = flags_of(pictures, output, iterations=16, save_interval=4, random_crop=True, num_workers=2)
    done = run_script(*flags, script="scripts/image_train.py")
    assert done.returncode == 0, done.stderr
    assert "training: 100%" in done.stderr and "16/16" in done.stderr
    return output


def test_what_training_writes(trained):
    kinds = ("model", "opt", "ema_0.9_")
    checkpoints = {f"{kind}{step:06d}.pt" for kind in kinds for step in (4, 8, 12, 16)}
    assert names_in(trained) == checkpoints | {"progress.csv", "progress.json", "data_inputs.json"}
    lines = lines_of(trained)
    assert [line["step"] for line in lines] == [str(step) for step in range(2, 17, 2)]
    assert lines[-1]["samples"] == "64"
    assert {"loss", "mse", "vb", "grad_norm", "param_norm"} <= lines[0].keys()
    assert any(f"loss_q{i}" in lines[0] for i in range(4))
    assert [json.loads(line)["step"] for line in (trained / "progress.json").read_text().splitlines()][-1] == 16
    model, average = (weights_of(trained / f"{kind}000016.pt") for kind in ("model", "ema_0.9_"))
    assert model.keys() == average.keys()
    assert any(not torch.equal(model[name], average[name]) for name in model)


def test_killed_ten_times_it_follows_the_same_course(pictures, trained, tmp_path):
    """SIGKILL at random moments, most of them after training has begun; then the same files, byte for byte."""
    flags = flags_of(pictures, tmp_path, iterations=16, save_interval=1, random_crop=True, num_workers=2)
    rng = random.Random(0)
    kills = 0
    while kills < 10:
        before = len(list(tmp_path.glob("model*.pt")))
        process = start_script(*flags, script="scripts/image_train.py")
        deadline = time.monotonic() + 300
        while process.poll() is None and len(list(tmp_path.glob("model*.pt"))) == before:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert process.poll() is None
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()  # until its workers, which it did not end, have ended too
        kills += 1
        for path in tmp_path.glob("*.pt"):
            weights_of(path)  # whole
    unfinished = ".ema_0.9_000002.pt.0123456789abcdef.part"  # of which some kill or other leaves one
    (tmp_path / unfinished).write_bytes(b"PK")
    finished = run_script(*flags, script="scripts/image_train.py")
    assert finished.returncode == 0 and "resuming from" in finished.stderr, finished.stderr
    for kind in ("model", "ema_0.9_"):
        ours, theirs = weights_of(tmp_path / f"{kind}000016.pt"), weights_of(trained / f"{kind}000016.pt")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "progress.csv").read_bytes() == (trained / "progress.csv").read_bytes()
    assert (tmp_path / "progress.json").read_bytes() == (trained / "progress.json").read_bytes()
    assert not [name for name in names_in(tmp_path) if name.endswith(".part")]


@pytest.mark.parametrize("kind", ["mpiexec", "torchrun"])
def test_two_processes_follow_one(pictures, trained, tmp_path, kind):
    """Half of the batch each, and in two microbatches: the same losses to rounding."""
    changes = {"iterations": 16, "save_interval": 100, "random_crop": True, "batch_size": 2, "microbatch": 1}
    flags = flags_of(pictures, tmp_path, **changes)
    done = run_script(*flags, script="scripts/image_train.py", kind=kind, processes=2)
    assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr
    for ours, theirs in zip(lines_of(tmp_path), lines_of(trained), strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert (ours[name] == "") == (theirs[name] == "")
            if ours[name]:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-6), name
    ours, theirs = weights_of(tmp_path / "model000016.pt"), weights_of(trained / "model000016.pt")
    moved = sum(float((theirs[name] - weights_of(trained / "model000004.pt")[name]).norm()) for name in theirs)
    apart = sum(float((theirs[name] - ours[name]).norm()) for name in theirs)
    assert apart < 0.05 * moved


@pytest.mark.parametrize(
    ("kind", "signum", "to_one_rank"),
    [("mpiexec", signal.SIGUSR1, False), ("mpiexec", signal.SIGTERM, True), ("torchrun", signal.SIGTERM, False)],
)
def test_a_signal_saves_a_checkpoint(kind, signum, to_one_rank, pictures, tmp_path):
    """SIGUSR1 to mpiexec: half a second after a SIGTERM it kills, whether or not a checkpoint is written by then."""
    flags = flags_of(pictures, tmp_path, save_interval=1000, log_interval=1)
    process = start_script(*flags, script="scripts/image_train.py", kind=kind, processes=2)
    deadline = time.monotonic() + 300
    while not (tmp_path / "progress.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if to_one_rank:  # both stop
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(found.stdout.split()[-1]), signum)
    else:
        process.send_signal(signum)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    steps = [int(path.stem.removeprefix("model")) for path in tmp_path.glob("model*.pt")]
    assert len(steps) == 1 and steps[0] >= 1
    assert {f"opt{steps[0]:06d}.pt", f"ema_0.9_{steps[0]:06d}.pt"} <= names_in(tmp_path)
    assert said.count(f"step {steps[0]} is saved in {tmp_path}/model{steps[0]:06d}.pt") == 1


def start_training(started, pictures, output, **changes):
    """Start image_train.py, and wait until it has taken a step, or as many as asked for."""
    steps = changes.pop("steps", 1)
    flags = flags_of(pictures, output, save_interval=1000, log_interval=1, **changes)
    process = start_script(*flags, script="scripts/image_train.py")
    started.append(process)
    deadline = time.monotonic() + 300
    while not (output / "progress.csv").exists() or len(lines_of(output)) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("signums", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGUSR1)])
def test_signals_in_quick_succession_save_a_checkpoint(pictures, tmp_path, started, signums):
    """As at Slurm's time limit, where a process and those that read for it get two within four milliseconds."""
    process = start_training(started, pictures, tmp_path, num_workers=2)
    for signum in signums:
        os.killpg(process.pid, signum)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + signums[0]
    (model,) = tmp_path.glob("model*.pt")
    step = int(model.stem.removeprefix("model"))
    name = signums[0].name
    last = f"stopped by {name}: step {step} is saved in {model}. Rerun the same command to resume"
    assert said.splitlines()[-1] == last
    assert {f"opt{step:06d}.pt", f"ema_0.9_{step:06d}.pt"} <= names_in(tmp_path)
    assert "training.lock" not in names_in(tmp_path)


SLOW_DISK = """
import sys, time
from guided_diffusion.command_line import stopping
from guided_diffusion.training import checkpoints as training_checkpoints
from guided_diffusion.system.other_scripts import load_script

save, saved = training_checkpoints._save, []

class Slow:
    def __init__(self, file):
        self.file = file

    def write(self, data):
        if len(saved) > 4:  # from the second file of the second checkpoint on
            print("writing", flush=True)
            time.sleep(1e6)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

def slowly(state, file):
    saved.append(None)
    save(state, Slow(file))

training_checkpoints._save = slowly
stopping.INSISTENCE = 0.0  # as if the second Ctrl-C came a while after the first
stopping.run(load_script("scripts/image_train.py").main)
"""


def test_ctrl_c_again_interrupts_a_save_that_takes_long(pictures, tmp_path, started):
    (tmp_path / "script.py").write_text(SLOW_DISK)
    flags = flags_of(pictures, tmp_path / "run", save_interval=2, log_interval=1)
    command = [sys.executable, tmp_path / "script.py", *flags]
    process = start(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.append(process)
    assert process.stdout.readline() == "writing\n"
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process.send_signal(signum)
        time.sleep(0.2)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    newest = tmp_path / "run/model000002.pt"
    last = f"stopped by SIGINT: step 2 is saved in {newest}. Rerun the same command to resume"
    assert process.returncode == 128 + signal.SIGINT and said.splitlines()[-1] == last, said
    assert "Traceback" not in said
    assert not [name for name in names_in(tmp_path / "run") if "000004" in name or name.endswith((".part", ".lock"))]


def test_killed_before_the_first_checkpoint(pictures, tmp_path, started):
    """What it left does not stand in the way of another command, with another rate or other images."""
    process = start_training(started, pictures, tmp_path, steps=3)
    process.kill()
    process.communicate()
    assert {"training.lock", "progress.csv", "data_inputs.json"} <= names_in(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(pictures / "warm", other)
    assert main_of("image_train")(*flags_of(other, tmp_path, lr=1e-4, iterations=2, log_interval=1)) == 0
    assert [line["step"] for line in lines_of(tmp_path)] == ["1", "2"]
    assert (tmp_path / "progress.1.csv").read_text().splitlines()[3].startswith("3,")
    assert (tmp_path / "progress.1.json").exists()


def test_one_run_at_a_time(pictures, tmp_path, started):
    process = start_training(started, pictures, tmp_path)
    in_use = rf"the training folder {tmp_path} is in use by another run: process {process.pid} "
    with pytest.raises(UserError, match=in_use):
        main_of("image_train")(*flags_of(pictures, tmp_path))
    process.kill()
    process.communicate()
    assert main_of("image_train")(*flags_of(pictures, tmp_path, iterations=1)) == 0  # at once


def test_a_run_that_has_lost_its_folder_saves_nothing(pictures, tmp_path, started):
    process = start_training(started, pictures, tmp_path)
    (tmp_path / "training.lock").unlink()
    process.terminate()
    said = process.communicate(timeout=300)[1]
    assert (
        process.returncode == 2 and f"error: {tmp_path}/training.lock has disappeared: was the training folder" in said
    )
    assert not list(tmp_path.glob("*.pt"))


def bitmaps(folder, seed):
    """Three images whose files have the same names and sizes whatever the seed."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.bmp")
    return folder


def test_other_images_of_the_same_names_and_sizes(tmp_path, capfd):
    first, second = (bitmaps(tmp_path / name, seed) for seed, name in enumerate(("first", "second")))
    train = main_of("image_train")
    flags = {"iterations": 2, "save_interval": 1}
    assert train(*flags_of(first, tmp_path / "run", **flags)) == 0
    flags["iterations"] = 3
    before = sorted((tmp_path / "run").iterdir())
    with pytest.raises(UserError, match=r"the training in .*run was computed from other files: .*/0\.bmp differs"):
        train(*flags_of(second, tmp_path / "run", **flags))
    assert sorted((tmp_path / "run").iterdir()) == before
    (tmp_path / "run/data_inputs.json").unlink()  # as in a folder of an earlier version
    capfd.readouterr()
    assert train(*flags_of(first, tmp_path / "run", **flags)) == 0
    assert "no record of the content of the images (--data_dir)" in capfd.readouterr().err
    flags["iterations"] = 4
    with pytest.raises(UserError, match="computed from other files"):
        train(*flags_of(second, tmp_path / "run", **flags))


def test_a_trained_model_loads_into_the_main_script(pictures, trained, tmp_path):
    flags = as_flags({"timestep_respacing": 10, **MODEL})
    chosen = ["--data_dir", str(pictures), "--step_reverse", "5", "--num_samples", "3", "--output", str(tmp_path)]
    main = load_script("forward_backward_dataset_sample.py").main
    for name in ("model000016.pt", "ema_0.9_000016.pt"):
        folder = str(tmp_path / name)
        assert main([*chosen, *flags, "--model_path", str(trained / name), "--output", folder]) == 0
        assert len(list((tmp_path / name / "t_5_10_images").rglob("*.JPEG"))) == 3


def test_class_conditional_training_draws_a_grid_of_samples(pictures, tmp_path):
    changes = {"class_cond": True, "iterations": 2, "save_interval": 2, "sample_grid": 6, "sample_steps": 3}
    assert main_of("image_train")(*flags_of(pictures, tmp_path, **changes)) == 0
    with Image.open(tmp_path / "samples_000002.png") as grid:
        assert grid.size == (2 + 3 * 66, 2 + 2 * 66)  # magnified four times
    assert weights_of(tmp_path / "model000002.pt")["label_emb.weight"].shape[0] == 1000

    picture = (tmp_path / "samples_000002.png").read_bytes()
    (tmp_path / "samples_000002.png").unlink()  # as if killed before it was drawn
    for iterations in (2, 3):
        assert main_of("image_train")(*flags_of(pictures, tmp_path, **{**changes, "iterations": iterations})) == 0
        assert (tmp_path / "samples_000002.png").read_bytes() == picture
    assert {path.name for path in tmp_path.glob("samples_*")} == {"samples_000002.png", "samples_000003.png"}


def numbers(folder: Path, names) -> Path:
    """A class folder of each of these names, with a picture in it."""
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (20 * i,) * 3).save(folder / name / "1.png")
    return folder


def classes_in(folder) -> dict:
    return json.loads((folder / "classes.json").read_text())


def test_classes_are_recorded_and_sampled(pictures, tmp_path, capfd):
    """Beside the checkpoints and in the optimizer's file; a copied checkpoint without either has no record."""
    changes = {"class_cond": True, "iterations": 2, "save_interval": 2}
    assert main_of("image_train")(*flags_of(pictures, tmp_path / "out", **changes)) == 0
    expected = {"order": "text", "classes": {"0": "cold", "1": "warm"}}
    assert classes_in(tmp_path / "out") == expected
    assert weights_of(tmp_path / "out/opt000002.pt")["training"]["classes"] == expected
    assert all(torch.is_tensor(value) for value in weights_of(tmp_path / "out/model000002.pt").values())

    def sample(checkpoint, output, *more):
        flags = {**MODEL, "class_cond": True, "timestep_respacing": 2, "num_samples": 40, "num_threads": 1}
        flags |= {"model_path": checkpoint, "output": tmp_path / output}
        capfd.readouterr()
        assert main_of("image_sample")(*as_flags(flags), *more) == 0
        record = json.loads((tmp_path / output / "samples_40x16x16x3.json").read_text())
        with np.load(tmp_path / output / "samples_40x16x16x3.npz") as f:
            return set(f["arr_1"].tolist()), record, capfd.readouterr().err

    both, record, said = sample(tmp_path / "out/ema_0.9_000002.pt", "both")
    assert both == {0, 1} and record["classes"] == {"0": "cold", "1": "warm"}
    assert "warning" not in said and "2 of 2 classes" in said
    one, record, _ = sample(tmp_path / "out/model000002.pt", "one", "--classes", "warm")
    assert one == {1} and record["settings"]["classes_sampled"] == "1"
    (tmp_path / "out/classes.json").unlink()
    assert sample(tmp_path / "out/model000002.pt", "opt")[0] == {0, 1}
    (tmp_path / "copy").mkdir()
    (tmp_path / "out/model000002.pt").rename(tmp_path / "copy/model.pt")
    unknown, record, said = sample(tmp_path / "copy/model.pt", "copied")
    assert len(unknown) > 20 and "classes_sampled" not in record["settings"] and "classes" not in record
    assert said.count("warning: ") == 1 and "copy/model.pt has no record of its classes" in said


def test_classes_of_imagenet_keep_their_indices(photographs, tmp_path):
    changes = {"class_cond": True, "iterations": 1, "save_interval": 1}
    assert main_of("image_train")(*flags_of(photographs, tmp_path / "out", **changes)) == 0
    wnids = {"281": "n02123045", "744": "n04008634", "872": "n04485082", "967": "n07920052"}
    assert classes_in(tmp_path / "out") == {"order": "ImageNet", "classes": wnids}


def test_a_run_that_is_resumed_keeps_the_order_of_its_classes(tmp_path, capfd):
    folder = numbers(tmp_path / "data", [str(i) for i in range(11)])
    changes = {"class_cond": True, "save_interval": 1}
    train = lambda output, *more, **other: main_of("image_train")(  # noqa: E731
        *flags_of(folder, tmp_path / output, **changes, **other), *more
    )
    assert train("number", "--class_order", "number", iterations=1) == 0
    by_number = classes_in(tmp_path / "number")
    assert by_number == {"order": "number", "classes": {str(i): str(i) for i in range(11)}}
    assert train("number", iterations=2) == 0
    assert "ordered as text" not in capfd.readouterr().err
    (tmp_path / "number/classes.json").unlink()  # the optimizer's file has it too
    assert train("number", iterations=3) == 0
    assert classes_in(tmp_path / "number") == by_number
    with pytest.raises(
        UserError, match=r"--class_order text contradicts .*classes\.json, where the order is 0, 1, 2, 3"
    ):
        train("number", "--class_order", "text", iterations=4)

    assert train("text", iterations=1) == 0
    assert capfd.readouterr().err.count("are numbers, ordered as text: 0, 1, 10, 2") == 1
    by_text = classes_in(tmp_path / "text")
    assert by_text["order"] == "text" and by_text["classes"]["2"] == "10"
    with pytest.raises(UserError, match="--class_order number contradicts"):
        train("text", "--class_order", "number", iterations=2)

    # Another folder, begun from this checkpoint, goes by its record too.
    begun = {"resume_checkpoint": tmp_path / "number/model000001.pt", "iterations": 2}
    assert train("begun", **begun) == 0
    assert classes_in(tmp_path / "begun") == by_number


def test_a_run_from_a_checkpoint_of_other_classes(pictures, tmp_path, capfd):
    folder = numbers(tmp_path / "data", ["a", "b"])
    assert main_of("image_train")(*flags_of(folder, tmp_path / "first", class_cond=True, iterations=1)) == 0
    changes = {"class_cond": True, "iterations": 2, "resume_checkpoint": tmp_path / "first/model000001.pt"}
    flags = flags_of(pictures, tmp_path / "second", **changes)
    with pytest.raises(UserError, match=r"not among the model's 2: cold, warm\.\nThe model's are a, b .*--class_ord"):
        main_of("image_train")(*flags)
    assert not (tmp_path / "second/classes.json").exists()
    assert main_of("image_train")(*flags, "--class_order", "text") == 0
    assert "cold, warm: renumbered" in capfd.readouterr().err
    assert classes_in(tmp_path / "second")["classes"] == {"0": "cold", "1": "warm"}


def test_a_part_of_the_classes_is_validated_by_name(pictures, tmp_path):
    val = tmp_path / "val"
    (val / "warm").mkdir(parents=True)
    (val / "warm/1.png").write_bytes((pictures / "warm/1.png").read_bytes())
    flags = {"data_dir": pictures, "val_data_dir": val, "output": tmp_path / "out", **TRAINING, **CLASSIFIER}
    del flags["ema_rate"]
    seen = []
    module = load_script("scripts/classifier_train.py")
    from guided_diffusion.training.classifier import ClassifierTrainLoop

    class Loop(ClassifierTrainLoop):
        def evaluate(self, batch, cond):
            seen.extend(cond["y"].tolist())
            super().evaluate(batch, cond)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ClassifierTrainLoop", Loop)
        assert module.main([str(f) for f in as_flags({**flags, "iterations": 1, "eval_interval": 1})]) == 0
    assert seen == [1] * 4


def test_a_classifier_is_trained_and_guides(pictures, tmp_path):
    flags = {"data_dir": pictures, "val_data_dir": pictures, "output": tmp_path, **TRAINING, **CLASSIFIER}
    del flags["ema_rate"]
    changes = {"iterations": 14, "anneal_lr": True, "eval_interval": 7, "log_interval": 7, "save_interval": 100}
    assert main_of("classifier_train")(*as_flags({**flags, **changes, "batch_size": 6})) == 0
    others = {"data_inputs.json", "val_data_inputs.json", "classes.json", "progress.csv", "progress.json"}
    assert names_in(tmp_path) == {"model000014.pt", "opt000014.pt"} | others
    first, last = lines_of(tmp_path)
    assert {"train_loss", "train_acc@1", "train_acc@5", "val_loss", "val_acc@1", "val_acc@5"} <= last.keys()
    assert 3 < float(first["train_loss"]) < 7.5  # the logarithm of 1000 is 6.9
    assert float(last["train_acc@5"]) == 1.0 and float(last["train_loss"]) < float(first["train_loss"]) - 1

    guided = {
        "num_samples": 2,
        "batch_size": 2,
        "timestep_respacing": 3,
        "classifier_path": tmp_path / "model000014.pt",
    }
    model = {**MODEL, "image_size": 64, "num_channels": 32, "channel_mult": "1,1"}
    sampled = as_flags({**guided, **CLASSIFIER, **model, "model_path": "untrained", "output": tmp_path / "samples"})
    assert main_of("classifier_sample")(*sampled) == 0
    with np.load(tmp_path / "samples/samples_2x64x64x3.npz") as f:
        assert f["arr_0"].shape == (2, 64, 64, 3) and f["arr_1"].shape == (2,)
        assert set(f["arr_1"].tolist()) <= {0, 1}  # cold and warm


def test_an_upsampler_is_trained_and_upsamples(pictures, tmp_path):
    flags = {"data_dir": pictures, "output": tmp_path, **TRAINING, **UPSAMPLER, "batch_size": 2, "microbatch": 1}
    changes = {"iterations": 2, "save_interval": 2, "sample_grid": 2, "sample_steps": 2}
    assert main_of("super_res_train")(*as_flags({**flags, **changes})) == 0
    with Image.open(tmp_path / "samples_000002.png") as grid:
        assert grid.size == (2 + 2 * 130, 2 + 66)  # each small image beside what was made of it
        left, top = 2, 2
        block = np.asarray(grid)[top : top + 4, left : left + 4]
        assert (block == block[0, 0]).all()  # a pixel of the small image
    assert {"model000002.pt", "ema_0.9_000002.pt", "opt000002.pt"} <= names_in(tmp_path)

    small = np.zeros((1, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "small.npz", small)
    sampled = {"model_path": tmp_path / "ema_0.9_000002.pt", "base_samples": tmp_path / "small.npz", **UPSAMPLER}
    options = {"num_samples": 2, "batch_size": 2, "timestep_respacing": 2, "output": tmp_path / "large"}
    assert main_of("super_res_sample")(*as_flags({**sampled, **options})) == 0
    with np.load(tmp_path / "large/samples_2x64x64x3.npz") as f:
        assert f["arr_0"].shape == (2, 64, 64, 3)


def test_an_unreadable_image_is_named_and_the_rest_goes_on(pictures, tmp_path, capfd):
    (tmp_path / "data").mkdir()
    for path in (pictures / "warm").iterdir():
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "5.png").write_bytes(b"no image")
    flags = flags_of(tmp_path / "data", tmp_path / "out", iterations=3)
    assert main_of("image_train")(*flags) == 1
    assert "1 images could not be read and were replaced by others: 5.png" in capfd.readouterr().err
    assert (tmp_path / "out/model000003.pt").exists()


SCRIPTS = {
    "image_train": {**TRAINING, **MODEL, "data_dir": "DATA", "use_fp16": False},
    "super_res_train": {**TRAINING, **UPSAMPLER, "data_dir": "DATA"},
    "classifier_train": {**TRAINING, **CLASSIFIER, "data_dir": "DATA", "anneal_lr": True},
    "demo_unet_train": {**TRAINING, "depth": 1, "image_size": 4, "channel_mult": "1,1", "lr_anneal_steps": 9},
    "demo_classifier_train": {**TRAINING, "lr_anneal_steps": 9},
}
for name in ("demo_unet_train", "demo_classifier_train"):
    del SCRIPTS[name]["num_workers"]
del SCRIPTS["classifier_train"]["ema_rate"]
COMMON = {"batch_size": 2, "lr": "2e-3", "weight_decay": 0.1, "seed": 1}
WITH_IMAGES = {"random_crop": "turned", "random_flip": "turned", "schedule_sampler": "loss-second-moment"}
OF_UNET = {"num_channels": 64, "learn_sigma": "turned", "diffusion_steps": 50, "dropout": 0.1, "use_fp16": True}
DECISIVE = {
    "image_train": {
        **COMMON,
        **WITH_IMAGES,
        **OF_UNET,
        "ema_rate": "0.9,0.99",
        "lr_anneal_steps": 9,
        "class_cond": True,
    },
    "super_res_train": {**COMMON, **WITH_IMAGES, **OF_UNET, "ema_rate": "0.99", "lr_anneal_steps": 9, "small_size": 8},
    "classifier_train": {
        **{**COMMON, **WITH_IMAGES, "iterations": 7, "anneal_lr": False, "noised": False, "classifier_use_fp16": True},
        **{"classifier_width": 64, "classifier_pool": "adaptive", "diffusion_steps": 50},
    },
    "demo_unet_train": {
        **COMMON,
        "ema_rate": "",
        "lr_anneal_steps": 8,
        "num_symbols": 6,
        "grammar_seed": 1,
        "dropout": 0.1,
    },
    "demo_classifier_train": {**COMMON, "ema_rate": "0.5", "lr_anneal_steps": 8, "use_fp16": True},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_fixed_in_a_run_and_what_is_not(pictures, tmp_path, script, capfd):
    given = {name: pictures if value == "DATA" else value for name, value in SCRIPTS[script].items()}
    given |= {"output": tmp_path / "run", "save_interval": 1, "log_interval": 1}
    parser = load_script(f"scripts/{script}.py").create_argparser()
    defaults = vars(parser.parse_args(as_flags(given)))
    if defaults.get("sample_grid"):
        given["sample_grid"] = 0
    # Where the rate falls with the iterations, they are a setting, too, and nothing is left to do in the end.
    annealed = "anneal_lr" in given
    given["iterations"] = 2 if annealed else 1
    assert main_of(script)(*as_flags(given)) == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    for flag, value in DECISIVE[script].items():
        value = not defaults[flag] if value == "turned" else value
        with pytest.raises(UserError) as error:
            main_of(script)(*as_flags({**given, flag: value}))
        words = "images per step (--batch_size" if flag == "batch_size" else f"--{flag} was "
        assert "has checkpoints of a run with other settings: " in str(error.value) and words in str(error.value), flag
        assert str(error.value).count(" and is now ") == (2 if flag == "class_cond" else 1), str(error.value)
        assert len(str(error.value).splitlines()) == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    free = {"microbatch": 1, "log_interval": 3, "save_interval": 2, "num_threads": 2}
    capfd.readouterr()
    assert main_of(script)(*as_flags({**given, **free, "iterations": 2})) == 0
    said = capfd.readouterr().err
    assert "not record" not in said and ("resuming from" in said) == (not annealed)


@pytest.mark.parametrize(
    ("script", "change", "words"),
    [
        ("image_train", {"resblock_updown": True, "num_res_blocks": 2}, "--num_res_blocks 1 --resblock_updown False"),
        ("super_res_train", {"num_channels": 64, "learn_sigma": False}, "--num_channels 32 --learn_sigma True"),
        ("classifier_train", {"classifier_width": 64}, "--classifier_width 32"),
        ("demo_unet_train", {"channel_mult": "1,2"}, "--channel_mult 1,1"),
    ],
)
def test_another_network_is_told_by_the_flags(pictures, tmp_path, script, change, words):
    given = {name: pictures if value == "DATA" else value for name, value in SCRIPTS[script].items()}
    if script != "classifier_train":
        given["sample_grid"] = 0
    run = tmp_path / "run"
    assert main_of(script)(*as_flags({**given, "output": run, "iterations": 1})) == 0
    path = run / "model000001.pt"
    with pytest.raises(UserError) as error:
        main_of(script)(*as_flags({**given, **change, "output": tmp_path / "new", "resume_checkpoint": path}))
    assert f"the checkpoint {path} (--resume_checkpoint) does not fit your flags: " in str(error.value)
    assert str(error.value).endswith(f"\nChange your flags to: {words}")
    assert not list((tmp_path / "new").iterdir())


def test_the_wrong_kind_of_network(pictures, tmp_path, trained):
    given = {**TRAINING, **CLASSIFIER, "data_dir": pictures, "output": tmp_path}
    del given["ema_rate"]
    with pytest.raises(UserError, match=r"^--resume_checkpoint .*model000016\.pt contains a diffusion model's U-Net"):
        main_of("classifier_train")(*as_flags({**given, "resume_checkpoint": trained / "model000016.pt"}))


def test_float32_is_float32(pictures, tmp_path):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert main_of("image_train")(*flags_of(pictures, tmp_path, iterations=1)) == 0
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("kind", ["python", "mpiexec"])
def test_training_that_diverges_saves_nothing_of_it(pictures, tmp_path, kind):
    flags = flags_of(pictures, tmp_path, lr="1e38", iterations=9, save_interval=9)
    done = run_script(*flags, script="scripts/image_train.py", kind=kind, processes=1 if kind == "python" else 2)
    assert done.returncode == 1, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.match(r"error: training has diverged: at step \d \w+ is (nan|inf)\. This step is not saved\. ", line)
    assert not list(tmp_path.glob("*.pt"))
    assert not any("nan" in path.read_text() for path in tmp_path.glob("progress.csv"))


LEAVES_EARLY = """
import os, signal
from guided_diffusion import dist_util
from guided_diffusion.command_line.stopping import run
from guided_diffusion.system.other_scripts import load_script
from guided_diffusion.train_util import TrainLoop

run_loop, take_steps = TrainLoop.run_loop, TrainLoop._take_steps

def signalled(self):
    if dist_util.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    run_loop(self)

def signalled_later(self, bar):
    os.kill(os.getpid(), signal.SIGTERM)
    take_steps(self, bar)

TrainLoop.run_loop, TrainLoop._take_steps = signalled, signalled_later
run(load_script("scripts/image_train.py").main)
"""


def test_a_signal_that_finds_one_rank_in_the_loop_and_another_before_it(pictures, tmp_path, started):
    """The first cannot save without the second, and says so; no launcher interferes here."""
    (tmp_path / "script.py").write_text(LEAVES_EARLY)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    for rank in "01":
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, tmp_path / "script.py", *flags_of(pictures, tmp_path / "run")]
        started.append(start(command, env=environment(**place), stderr=subprocess.PIPE))
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [143, 143], said
    nothing = f"there is no complete checkpoint in {tmp_path / 'run'} yet. Rerun the same command to start again"
    assert said[0].splitlines()[-1] == f"stopped by SIGTERM: {nothing}" and "Traceback" not in "".join(said)


ONE_RANK = """
import sys
from guided_diffusion import dist_util
from guided_diffusion.command_line.stopping import run
from guided_diffusion.training.classifier import ClassifierTrainLoop
from guided_diffusion.system.other_scripts import load_script

evaluate = ClassifierTrainLoop.evaluate

def with_nan_on_rank_1(self, batch, cond):
    evaluate(self, batch * (float("nan") if dist_util.get_rank() == 1 else 1), cond)

ClassifierTrainLoop.evaluate = with_nan_on_rank_1
run(load_script("scripts/classifier_train.py").main)
"""


def test_a_validation_loss_that_is_not_finite_on_one_rank(pictures, tmp_path):
    (tmp_path / "script.py").write_text(ONE_RANK)
    given = {**TRAINING, **CLASSIFIER, "data_dir": pictures, "val_data_dir": pictures, "output": tmp_path / "run"}
    del given["ema_rate"]
    given |= {"eval_interval": 1, "iterations": 5, "batch_size": 2, "log_interval": 100, "save_interval": 1}
    done = run_script(*as_flags(given), script=tmp_path / "script.py", kind="torchrun", processes=2)
    assert done.returncode == 1
    assert done.stderr.count("error: training has diverged: at step 1 val_loss is nan. This step is not saved") == 1
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("image_train", {"data_dir": ""}, r"no folder of images was given: --data_dir"),
        ("image_train", {"data_dir": "missing"}, r"'missing' does not exist \(--data_dir\)"),
        ("image_train", {"schedule_sampler": "unifrom"}, "--schedule_sampler unifrom: expected uniform or"),
        ("image_train", {"lr": 0}, r"--lr 0"),
        ("image_train", {"microbatch": 0}, r"--microbatch 0"),
        ("image_train", {"half_precision": "bfloat16"}, r"--half_precision bfloat16: expected .* \(--use_fp16 True\)"),
        ("image_train", {"ema_rate": "2"}, r"--ema_rate 2"),
        ("image_train", {"image_size": 15}, r"--image_size 15 is not a multiple of 2"),
        ("image_train", {"num_channels": 33}, r"--num_channels 33"),
        ("image_train", {"noise_schedule": "linaer"}, r"--noise_schedule linaer"),
        ("image_train", {"resume_checkpoint": "missing/model000010.pt"}, r"--resume_checkpoint missing/model000010.pt"),
        ("image_train", {"labels_file": "missing.csv", "class_cond": True}, r"--labels_file 'missing.csv' cannot"),
        ("image_train", {"labels_file": "x.csv"}, r"--labels_file is for a class-conditional model: give --"),
        ("super_res_train", {"class_order": "text"}, r"--class_order is for a class-conditional model"),
        (
            "image_train",
            {"data_dir": ".", "sample_grid": 4},
            r"the sample grids would be written to '.*out' \(--output\), which is inside '\.' \(--data_dir\)",
        ),
        ("super_res_train", {"small_size": 0}, r"--small_size 0"),
        ("super_res_train", {"large_size": 48}, r"--large_size 48"),
        ("classifier_train", {"val_data_dir": "missing"}, r"'missing' does not exist \(--val_data_dir\)"),
        (
            "classifier_train",
            {"val_data_dir": "val"},
            r"1 of 1 classes in 'val' \(--val_data_dir\) are not among the model's 2: hot\.\nThe model's are cold, wa",
        ),
        ("classifier_train", {"classifier_pool": "max"}, r"--classifier_pool max"),
        ("classifier_train", {"half_precision": "bfloat16"}, r"half precision as well \(--classifier_use_fp16 True\)"),
        (
            "classifier_train",
            {"anneal_lr": True, "iterations": 0},
            r"--anneal_lr True --iterations 0: expected the number of steps .*,\nor --anneal_lr False$",
        ),
    ],
)
def test_plain_mistakes_get_plain_words(pictures, tmp_path, monkeypatch, script, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "val/hot").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "val/hot/1.png")
    model = {"image_train": MODEL, "super_res_train": UPSAMPLER, "classifier_train": CLASSIFIER}[script]
    given = {"data_dir": pictures, "output": tmp_path / "out", "batch_size": 2, "iterations": 1, **model, **flags}
    with pytest.raises(UserError) as error:
        main_of(script)(*as_flags(given))
    assert re.search(words, str(error.value)), str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert not list(tmp_path.rglob("*.pt"))


def test_mistakes_are_answered_by_the_process_itself(pictures, tmp_path):
    done = run_script("--data_dirr", "x", script="scripts/image_train.py")
    assert done.returncode == 2 and done.stderr == (
        "error: there is no flag --data_dirr: did you mean --data_dir? See --help.\n"
    )
    done = run_script(*flags_of("missing", tmp_path, batch_size=0), script="scripts/image_train.py")
    assert done.returncode == 2 and "--batch_size: expected a whole number >= 1, not 0" in done.stderr
    done = run_script(*flags_of("missing", tmp_path), script="scripts/image_train.py")
    assert done.returncode == 2 and done.stderr.startswith("error: the folder of images 'missing' does not exist")
    assert len(done.stderr.splitlines()) == 1
