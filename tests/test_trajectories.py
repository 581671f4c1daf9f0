"""Several samples per image (trajectories) and consecutive U-turns of the main script, with real processes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

from guided_diffusion.errors import UserError

import pytest
from conftest import (
    MAIN_SCRIPT,
    SMALL_MODEL,
    as_flags,
    environment,
    load_script,
    run_script,
    save_checkpoint,
    start_script,
)
from PIL import Image

pytestmark = pytest.mark.usefixtures("in_this_process")
TIMES = ("2", "3")
NAMES = ("a_2", "a_3", "b_1", "b_10")  # whose samples sort in another order: b_10_t0500 is before b_1_t0500


@pytest.fixture(scope="module")
def starts(photographs, tmp_path_factory) -> Path:
    """Four images in two classes; a network sees them in batches of three."""
    folder = tmp_path_factory.mktemp("starts")
    for name, path in zip(NAMES, sorted(photographs.rglob("*_1.*")), strict=True):
        Image.open(path).convert("RGB").save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def flags(starts, tmp_path_factory) -> list[str]:
    """A network so small that a run takes seconds."""
    network = {**SMALL_MODEL, "image_size": 16, "channel_mult": "1", "attention_resolutions": ""}
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.pt", network)
    model = [*as_flags(network), "--model_path", checkpoint, "--timestep_respacing", "4"]
    run = ["--batch_size", "3", "--num_threads", "1", "--num_workers", "2", "--image_format", "png"]
    return [str(word) for word in (*model, "--data_dir", starts, *run, "--step_reverse", *TIMES)]


def run_here(*words) -> int:
    return load_script(MAIN_SCRIPT).main([str(word) for word in words])


def samples(output: Path) -> dict[str, bytes]:
    """The files in the folders of samples, hidden ones too."""
    files = (path for path in output.glob("t_*_images/**/*") if path.is_file())
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def expected_names(num_trajectories: int, num_turns: int = 1, ending="png") -> set[str]:
    names = set()
    for k, name, j, u in itertools.product(TIMES, NAMES, range(1, num_trajectories + 1), range(1, num_turns + 1)):
        which = (f"_s{j:03d}" if j > 1 else "") + (f"_u{u:02d}" if u > 1 else "")
        names.add(f"t_{k}_4_images/{name}_t{int(k) * 250:04d}{which}.{ending}")
    return names


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("one")
    assert run_script(*flags, "--output", output).returncode == 0
    return samples(output)


@pytest.fixture(scope="module")
def eight(flags, tmp_path_factory) -> dict[str, bytes]:
    """Eight trajectories of two turns each, in one uninterrupted run."""
    output = tmp_path_factory.mktemp("eight")
    done = run_script(*flags, "--num_trajectories", 8, "--num_turns", 2, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "8 trajectories, 2 turns: 128 samples to make, 0 exist already" in done.stderr
    assert "64 of 64 samples are in" in done.stderr
    return samples(output)


def test_samples_are_named_by_trajectory_and_turn_and_all_differ(eight, one):
    assert one.keys() == expected_names(1)
    assert eight.keys() == expected_names(8, 2)
    assert len(set(eight.values())) == len(eight)
    assert one.items() <= eight.items()


def test_a_folder_is_extended_without_recomputing_anything(flags, eight, one, tmp_path, capsys):
    """1, then 3, then 8 trajectories, then a second turn: each run makes only what is new."""
    record = tmp_path / "t_3_4_run.json"
    before: dict[str, int] = {}
    for trajectories, turns, words in (
        (1, 1, "8 samples to make, 0 exist already"),
        (3, 1, "16 samples to make, 8 exist already"),
        (8, 1, "40 samples to make, 24 exist already"),
        (8, 2, "64 samples to make, 64 exist already"),
        (2, 1, "0 samples to make, 16 exist already"),
    ):
        more = ["--num_trajectories", trajectories, "--num_turns", turns]
        assert run_here(*flags, *more, "--output", tmp_path) == 0
        assert words in capsys.readouterr().err
        found = samples(tmp_path)
        assert found.keys() == expected_names(trajectories, turns) | before.keys()
        assert found.items() <= eight.items()
        changed = {name: (tmp_path / name).stat().st_mtime_ns for name in found}
        assert before.items() <= changed.items()
        before = changed
        assert json.loads(record.read_text())["finished"]
    assert samples(tmp_path) == eight
    about = json.loads(record.read_text())
    assert about["settings"].keys().isdisjoint({"num_trajectories", "num_turns"})
    assert [run["samples_written"] for run in about["runs"]] == [4, 8, 20, 32]
    assert about["images"] == {"chosen": 4, "with_sample": 4, "unreadable": {}}
    assert not list(tmp_path.glob("*parts"))


def test_an_extension_that_is_killed_is_not_called_finished_and_several_processes_complete_it(flags, eight, tmp_path):
    more = [*flags, "--num_trajectories", 8, "--num_turns", 2, "--output", tmp_path]
    assert run_here(*flags, "--output", tmp_path) == 0
    for attempt in range(2):
        process, there = start_script(*more), len(samples(tmp_path))
        while process.poll() is None and len(list(tmp_path.glob("t_*_images/*.png"))) < there + 5:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        found = {name: data for name, data in samples(tmp_path).items() if not Path(name).name.startswith(".")}
        assert found.items() < eight.items()
        assert not json.loads((tmp_path / "t_3_4_run.json").read_text())["finished"], attempt
    done = run_script(*more, kind="mpiexec", processes=2)
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path) == eight


SLOW_RANK = """
import sys, time
from pathlib import Path
from conftest import MAIN_SCRIPT, load_script
from guided_diffusion import dist_util
from guided_diffusion.command_line.stopping import run

script, folder = load_script(MAIN_SCRIPT), Path(sys.argv.pop(1))
forward_backward, patience = script.forward_backward, time.monotonic() + 300

def lines(rank):
    path = folder / f"rank{rank}"
    return path.read_text().splitlines() if path.exists() else []

def noting_and_waiting(network, diffusion, unit, *rest):
    rank = dist_util.get_rank()
    with open(folder / f"rank{rank}", "a") as f:
        f.write(f"{unit.step_reverse} {unit.index} {unit.turn}\\n")
    while len(lines(1 - rank)) < (16 if rank else 1):
        time.sleep(0.01)
        dist_util.check_peers()
        assert time.monotonic() < patience, lines(1 - rank)
    return forward_backward(network, diffusion, unit, *rest)

script.forward_backward = noting_and_waiting
run(script.main)
"""


def test_a_slow_process_takes_fewer_units(flags, eight, tmp_path):
    """Ten units of two turns. One process stays in its first until the other has begun all but the two that it took."""
    script, output = tmp_path / "slow.py", tmp_path / "output"
    script.write_text(SLOW_RANK)
    words = [tmp_path, *flags, "--num_trajectories", 3, "--num_turns", 2, "--output", output]
    paths = os.pathsep.join([str(Path(__file__).parent), environment()["PYTHONPATH"]])
    done = run_script(*words, script=script, kind="mpiexec", processes=2, env=environment(PYTHONPATH=paths))
    assert done.returncode == 0, done.stderr
    assert samples(output) == {name: eight[name] for name in expected_names(3, 2)}
    fast, slow = ([line.split() for line in (tmp_path / f"rank{rank}").read_text().splitlines()] for rank in range(2))
    assert (len(fast), len(slow)) == (16, 4)
    assert len({tuple(unit) for unit in fast + slow}) == 20  # each is computed once
    for units in (fast, slow):
        assert [k for k, *_ in units] == sorted((k for k, *_ in units), reverse=True)  # the longest first
        assert [turn for *_, turn in units] == ["1", "2"] * (len(units) // 2)
    assert "denoising (2 processes): 100%" in done.stderr and " 50/50 " in done.stderr


def test_shards(flags, eight, tmp_path):
    more = [*flags, "--num_trajectories", 3, "--num_turns", 2, "--num_shards", 2, "--output", tmp_path]
    for shard in range(2):
        assert run_here(*more, "--shard", shard) == 0
    assert samples(tmp_path) == {name: eight[name] for name in expected_names(3, 2)}


def test_lost_samples_of_any_turn_come_back(flags, eight, tmp_path, capsys):
    more = [*flags, "--num_trajectories", 8, "--num_turns", 2, "--output", tmp_path]
    assert run_here(*more) == 0
    lost = ["t_3_4_images/b_10_t0750.png", "t_3_4_images/b_10_t0750_s002_u02.png", "t_2_4_images/a_3_t0500_s008.png"]
    for name in lost:
        (tmp_path / name).unlink()
    capsys.readouterr()
    assert run_here(*more) == 0
    assert "3 samples to make, 125 exist already" in capsys.readouterr().err
    assert samples(tmp_path) == eight


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_two_turns_are_two_runs_chained_through_folders(image_format, flags, eight, tmp_path, monkeypatch, capsys):
    """To the byte, and in the same batches, although the samples' names sort in another order than those of images."""
    script = load_script(MAIN_SCRIPT)
    compute, batches = script.forward_backward, []

    def watch(network, diffusion, unit, *more):
        batches.append((unit.step_reverse, unit.turn, unit.starts))
        return compute(network, diffusion, unit, *more)

    monkeypatch.setattr(script, "forward_backward", watch)

    def run_here(*words) -> int:
        batches.clear()
        return script.main([str(word) for word in words])

    mine = [*flags, "--image_format", image_format]
    assert run_here(*mine, "--num_turns", 2, "--output", tmp_path / "both") == 0
    second_turns = [(k, starts) for k, turn, starts in batches if turn == 2]
    assert ("each turn starts from the JPEG file" in capsys.readouterr().err) == (image_format == "jpeg")
    assert run_here(*mine, "--output", tmp_path / "first") == 0
    for k, time_ in (("2", "t0500"), ("3", "t0750")):
        chained = ["--data_dir", tmp_path / f"first/t_{k}_4_images", "--step_reverse", k]
        assert run_here(*mine, *chained, "--output", tmp_path / f"second_{k}") == 0
        assert [(int(k), starts) for _, _, starts in batches] == [turn for turn in second_turns if turn[0] == int(k)]
        second = samples(tmp_path / f"second_{k}")
        assert len(second) == len(NAMES)
        for name, data in second.items():
            as_turn = name.replace(f"_{time_}_{time_}", f"_{time_}_u02")
            assert (tmp_path / "both" / as_turn).read_bytes() == data
    if image_format == "png":
        assert samples(tmp_path / "both").items() <= eight.items()


def test_clones_share_x_k_and_nothing_else(flags, one, tmp_path, monkeypatch):
    script = load_script(MAIN_SCRIPT)
    noised = script.noised_image
    noised_images: dict[str, list] = {}

    def watch(diffusion, x_start, k, noise):
        x = noised(diffusion, x_start, k, noise)
        for row in x:
            noised_images.setdefault(mode, []).append((k, row.numpy().tobytes()))
        return x

    monkeypatch.setattr(script, "noised_image", watch)
    for mode in ("start", "independent"):
        share = ["--share_noise", "start"] if mode == "start" else []
        words = [*flags, "--num_trajectories", "3", *share, "--output", tmp_path / mode]
        assert script.main([str(word) for word in words]) == 0
    shared, independent = samples(tmp_path / "start"), samples(tmp_path / "independent")
    assert shared.keys() == independent.keys() == expected_names(3)
    assert one.items() <= shared.items() and one.items() <= independent.items()
    assert {name for name in shared if shared[name] != independent[name]} == shared.keys() - one.keys()
    assert len(set(shared.values())) == len(shared)
    assert len(set(noised_images["start"])) == len(TIMES) * len(NAMES)
    assert len(set(noised_images["independent"])) == len(noised_images["independent"]) > 2 * len(independent) / 3
    assert set(noised_images["start"]) < set(noised_images["independent"])


def test_an_unreadable_image_costs_all_of_its_samples_and_no_others(flags, starts, eight, tmp_path, capsys):
    shutil.copytree(starts, tmp_path / "data")
    (tmp_path / "data/b_10.png").write_bytes((starts / "b_10.png").read_bytes()[:1000])
    more = [*flags, "--data_dir", tmp_path / "data", "--num_trajectories", 3, "--num_turns", 2]
    more += ["--output", tmp_path / "out"]
    assert run_here(*more) == 1
    said = capsys.readouterr().err
    assert "1 of 4 images could not be read" in said and "18 of 24 samples are in" in said
    assert samples(tmp_path / "out") == {name: eight[name] for name in expected_names(3, 2) if "b_10" not in name}
    record = json.loads((tmp_path / "out/t_3_4_run.json").read_text())
    assert not record["finished"] and record["images"]["with_sample"] == 3
    assert list(record["images"]["unreadable"]) == ["b_10.png"]
    assert "b_10.png" in record["images"]["unreadable"]["b_10.png"]
    shutil.copy(starts / "b_10.png", tmp_path / "data")
    assert run_here(*more) == 0
    assert samples(tmp_path / "out") == {name: eight[name] for name in expected_names(3, 2)}


def test_an_unreadable_sample_keeps_its_starting_image_on_record(flags, starts, tmp_path, capsys):
    """A turn cannot start from a damaged sample, but another image in the place of the start is not accepted."""
    shutil.copytree(starts, tmp_path / "data")
    more = [*flags, "--step_reverse", 2, "--data_dir", tmp_path / "data", "--output", tmp_path / "out"]
    assert run_here(*more) == 0
    sample = tmp_path / "out/t_2_4_images/a_2_t0500.png"
    whole = sample.read_bytes()
    sample.write_bytes(whole[:100])
    capsys.readouterr()
    assert run_here(*more, "--num_turns", 2) == 1
    said = capsys.readouterr().err
    assert "error: 1 samples could not be read: no turn can start from them" in said
    assert "a_2_t0500.png" in said and "they have no sample" not in said
    images = json.loads((tmp_path / "out/t_2_4_run.json").read_text())["images"]
    assert images["unreadable"] == {} and list(images["unreadable_samples"]) == ["a_2.png"]
    start = tmp_path / "data/a_2.png"
    original = start.read_bytes()
    start.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(UserError, match=r"a_2\.png differs, its content has changed"):
        run_here(*more, "--num_trajectories", 2)
    start.write_bytes(original)
    sample.write_bytes(whole)
    assert run_here(*more, "--num_turns", 2) == 0
    assert "unreadable_samples" not in json.loads((tmp_path / "out/t_2_4_run.json").read_text())["images"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--num_trajectories", "0"], ["--num_trajectories", "expected a whole number from 1 to 100000, not 0"]),
        (["--num_trajectories", "-3"], ["--num_trajectories", "a whole number from 1 to 100000, not -3"]),
        (["--num_turns", "0"], ["--num_turns", "expected a whole number from 1 to 100000, not 0"]),
        (["--num_turns", "two"], ["--num_turns", "'two'"]),
        (["--share_noise", "all"], ["--share_noise", "start"]),
        (["--share_noise", "start", "--use_ddim", "True"], ["--share_noise start", "--sampler ddim", "equal"]),
        (["--share_noise", "start"], ["--share_noise was empty and is now start"]),
        (["--seed", "1", "--num_trajectories", "2"], ["--seed was 0 and is now 1"]),
        (["--data_dir", "LONG", "--num_trajectories", "2"], ["a name of 259 bytes", "_t0500_s002.png", "at most 255"]),
        (["--data_dir", "LONG", "--num_turns", "2"], ["a name of 258 bytes", "_t0500_u02.png", "at most 255"]),
    ],
)
def test_mistakes(more, words, flags, starts, tmp_path, capsys):
    long = tmp_path / "long"
    long.mkdir()
    shutil.copy(starts / "b_1.png", long / f"{'a' * 244}.png")
    output = tmp_path / "out"
    mine = [*flags, "--step_reverse", "2", "--output", output]
    assert run_here(*mine, *(["--data_dir", long] if "LONG" in more else [])) == 0
    before = samples(output)
    capsys.readouterr()
    with pytest.raises((UserError, SystemExit)) as caught:
        run_here(*mine, *(long if word == "LONG" else word for word in more))
    message = capsys.readouterr().err if caught.type is SystemExit else str(caught.value)
    assert len(message.strip().splitlines()) <= 2, message
    for word in words:
        assert word in message
    assert samples(output) == before
