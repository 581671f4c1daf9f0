"""Several samples of each image: what evaluate_classifier.py pairs, and how results are laid out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from guided_diffusion.classifier.pairs import batch_shape
from guided_diffusion.classifier.results import read_series
from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import SampleFolder
from guided_diffusion.runs.settings import digest_of

import numpy as np
import pytest
import torch
from conftest import as_flags, load_script, run_script, start_script
from PIL import Image
from torch import nn

pytestmark = pytest.mark.usefixtures("in_this_process")
STARTS = ("n02123045/a.png", "n02123045/b.png", "n04008634/c.png")
COUNTS = {5: 1, 10: 3}  # samples of each image, by k


def write_sample(folder: Path, k: int, start: str, trajectory: int = 1, turn: int = 1) -> Path:
    samples = SampleFolder(str(folder), k, 20, 1000, "png")
    path = Path(samples.path) / samples.sample(start, trajectory, turn)
    rng = np.random.default_rng([k, STARTS.index(start), trajectory, turn])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def flags(resnet18, tmp_path) -> dict:
    """Three images, with one sample each at k = 5 and three each at k = 10, and samples of a second turn."""
    for i, start in enumerate(STARTS):
        path = tmp_path / "starts" / start
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (80 * i, 40, 90)).save(path)
        for k, count in COUNTS.items():
            for j in range(1, count + 1):
                write_sample(tmp_path / "samples", k, start, j)
    write_sample(tmp_path / "samples", 10, STARTS[0], turn=2)
    write_sample(tmp_path / "samples", 10, STARTS[0], trajectory=2, turn=2)
    folders = {"starting_data_dir": tmp_path / "starts", "data_dir": tmp_path / "samples"}
    series = {"time_series": "5,10", "timestep_respacing": 20, "normalization": "none"}
    return {**resnet18, **folders, **series}


def evaluate(flags: dict, output: Path) -> int:
    return load_script("evaluate_classifier.py").main(as_flags({**flags, "output": output}))


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_every_pair_has_a_row(flags, tmp_path, capsys):
    """Of all samples of the first turn, image by image; a time with one sample has the layout of old files."""
    assert evaluate(flags, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "k = 10: 2 samples of later turns are left out" in said and ", 1 or 3 of each image" in said
    assert "k = 10: 9 of 9 pairs are in" in said
    one, three = (arrays(tmp_path / f"out/act_diff_resnet18-t_{k}_20.npz") for k in COUNTS)
    assert list(one) == ["names", "layers", "cosine", "L2", "L2_normalized"]
    assert one["names"].tolist() == list(STARTS)
    assert three["names"].tolist() == [start for start in STARTS for _ in range(3)]
    assert three["trajectories"].tolist() == [1, 2, 3] * 3 and three["cosine"].shape[0] == 9
    assert json.loads((tmp_path / "out/act_diff_resnet18-t_10_20.json").read_text())["logits_layers"] == ["fc"]
    logits = arrays(tmp_path / "out/logits_resnet18-t_10_20.npz")
    assert list(logits) == ["names", "trajectories", "labels", "logits_start", "logits_sample"]
    assert (logits["logits_start"].reshape(3, 3, -1) == logits["logits_start"][::3, None]).all()
    assert len(np.unique(logits["logits_sample"], axis=0)) == 9
    for result in read_series(str(tmp_path / "out"), "resnet18"):
        assert result.num_trajectories == COUNTS[result.step_reverse] and result.starts.tolist() == list(STARTS)
    # The third trajectory alone, under the name of the first.
    for start in STARTS:
        write_sample(tmp_path / "alone", 10, start, 3).rename(
            tmp_path / "alone/t_10_20_images" / SampleFolder("", 10, 20, 1000, "png").sample(start)
        )
    assert evaluate({**flags, "data_dir": tmp_path / "alone", "time_series": 10}, tmp_path / "third") == 0
    third = arrays(tmp_path / "third/logits_resnet18-t_10_20.npz")["logits_sample"]
    np.testing.assert_allclose(logits["logits_sample"][2::3], third, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_of_any_size_give_the_same(batch_size, flags, tmp_path):
    """Smaller ones than an image has samples, too."""
    assert evaluate(flags, tmp_path / "out") == 0
    assert evaluate({**flags, "batch_size": batch_size}, tmp_path / "other") == 0
    for path in (tmp_path / "out").glob("*.npz"):
        expected, found = arrays(path), arrays(tmp_path / "other" / path.name)
        for name, values in expected.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)
            else:
                assert (found[name] == values).all()


@pytest.mark.parametrize(
    ("counts", "batch_size", "shape"),
    [
        ([1], 128, (64, 1)),
        ([1] * 5, 128, (21, 1)),
        ([1, 1], 1, (1, 1)),
        ([8], 128, (14, 8)),
        ([128] * 10, 128, (1, 12)),
    ],
)
def test_the_shape_of_batches(counts, batch_size, shape):
    assert batch_shape(counts, batch_size) == shape


def test_killed_and_completed_by_two_processes(flags, tmp_path):
    assert evaluate({**flags, "batch_size": 2}, tmp_path / "out") == 0
    mine = as_flags({**flags, "batch_size": 2, "output": tmp_path / "killed"})
    process = start_script(*mine, script="evaluate_classifier.py")
    while process.poll() is None and not list((tmp_path / "killed").glob("*_parts/*.npz")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = run_script(*mine, script="evaluate_classifier.py", kind="mpiexec", processes=2)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").glob("*.npz")} == {
        path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.npz")
    }


def test_an_unreadable_sample_is_left_out(flags, tmp_path):
    broken = tmp_path / "samples/t_10_20_images/n02123045/b_t0500_s002.png"
    broken.write_bytes(broken.read_bytes()[:500])
    assert evaluate(flags, tmp_path / "out") == 1
    found = arrays(tmp_path / "out/act_diff_resnet18-t_10_20.npz")
    assert found["names"].tolist().count("n02123045/b.png") == 2
    assert found["trajectories"].tolist() == [1, 2, 3, 1, 3, 1, 2, 3]
    record = json.loads((tmp_path / "out/act_diff_resnet18-t_10_20.json").read_text())
    assert not record["finished"] and "b_t0500_s002.png" in record["images"]["unreadable"]["n02123045/b.png"]
    with pytest.raises(
        UserError, match=r"lacks samples of 1 images, which could not be read: 'n02123045/b.png'"
    ) as error:
        read_series(str(tmp_path / "out"), "resnet18")
    assert str(error.value).count("\n") == 1


def saved(folder: Path) -> dict[str, bytes]:
    """The results, their lists of files, and their settings."""
    settings = {path.name: json.loads(path.read_text()).get("settings") for path in folder.glob("*.json")}
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")} | settings


@pytest.mark.parametrize("parts_are_kept", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_a_repaired_sample_completes_the_results(parts_are_kept, several, flags, tmp_path, capsys):
    """Whether an image has several samples or one."""
    # Without its parts, a time is computed alone, in other batches than with the finished one.
    flags = {**flags, "batch_size": 4, "time_series": ("5,10" if parts_are_kept else 10) if several else 5}
    assert evaluate(flags, tmp_path / "whole") == 0
    name = "t_10_20_images/n02123045/b_t0500_s002.png" if several else "t_5_20_images/n02123045/b_t0250.png"
    broken = tmp_path / "samples" / name
    content = broken.read_bytes()
    broken.write_bytes(content[:500])
    assert evaluate(flags, tmp_path / "out") == 1
    broken.write_bytes(content[:400])  # no repair
    assert evaluate(flags, tmp_path / "out") == 1
    broken.write_bytes(content)
    if not parts_are_kept:
        (parts,) = (tmp_path / "out").glob("*_parts")
        shutil.rmtree(parts)
    capsys.readouterr()
    assert evaluate(flags, tmp_path / "out") == 0
    if parts_are_kept:
        said = capsys.readouterr().err
        assert ("1 of 9 batches to compute" if several else "1 of 2 batches to compute") in said
    assert saved(tmp_path / "out") == saved(tmp_path / "whole")
    assert evaluate(flags, tmp_path / "out") == 0 and "nothing to do" in capsys.readouterr().err


def another_changed(folder: Path) -> None:
    Image.new("RGB", (32, 32)).save(folder / "t_10_20_images/n04008634/c_t0500_s002.png")


def the_image_s_other_sample_changed(folder: Path) -> None:
    Image.new("RGB", (32, 32)).save(folder / "t_10_20_images/n02123045/b_t0500_s003.png")


def one_more_of_each(folder: Path) -> None:
    for start in STARTS:
        write_sample(folder, 10, start, 4)


def one_fewer_of_each(folder: Path) -> None:
    for path in folder.rglob("*_s003.png"):
        path.unlink()


@pytest.mark.parametrize("parts_are_kept", [True, False])
@pytest.mark.parametrize(
    "change", [another_changed, the_image_s_other_sample_changed, one_more_of_each, one_fewer_of_each]
)
def test_a_repair_that_changes_more_is_refused(change, parts_are_kept, flags, tmp_path):
    flags = {**flags, "time_series": 10}
    broken = tmp_path / "samples/t_10_20_images/n02123045/b_t0500_s002.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:500])
    assert evaluate(flags, tmp_path / "out") == 1
    broken.write_bytes(content)
    change(tmp_path / "samples")
    if not parts_are_kept:
        (parts,) = (tmp_path / "out").glob("*_parts")
        shutil.rmtree(parts)
    before = saved(tmp_path / "out")
    with pytest.raises(UserError, match=r"made with other settings: the samples \(--data_dir\)"):
        evaluate(flags, tmp_path / "out")
    assert saved(tmp_path / "out") == before


def test_parts_of_a_version_that_recorded_the_sizes_of_samples(flags, tmp_path, monkeypatch, capsys):
    """They are resumed."""
    script = load_script("evaluate_classifier.py")
    monkeypatch.setattr(
        script, "digest_for_parts", lambda _folder, digests, _results, times: digest_of(digests[k] for k in times)
    )
    monkeypatch.setattr(script, "write_time", None)  # stopped before the end
    flags = as_flags({**flags, "batch_size": 4, "output": tmp_path / "out"})
    with pytest.raises(TypeError):
        script.main(flags)
    monkeypatch.undo()
    capsys.readouterr()
    assert script.main(flags) == 0 and "0 of 9 batches to compute" in capsys.readouterr().err


def test_an_unreadable_sample_if_preprocessing_is_undefined_for_one_colour(flags, tmp_path, monkeypatch):
    def network():
        return nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(), nn.Linear(4 * 256, 5)), standardised

    def standardised(image):
        x = torch.from_numpy(image.copy()).permute(2, 0, 1).float()
        return (x - x.mean()) / x.std()  # NaN for a black image

    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(network=network))
    known = {**flags, "classifier_name": "own:network", "classifier_path": ""}
    assert evaluate(known, tmp_path / "whole") == 0
    broken = tmp_path / "samples/t_10_20_images/n02123045/b_t0500_s002.png"
    broken.write_bytes(broken.read_bytes()[:500])
    assert evaluate(known, tmp_path / "out") == 1
    for name in ("act_diff_network-t_10_20.npz", "logits_network-t_10_20.npz"):
        found, whole = arrays(tmp_path / "out" / name), arrays(tmp_path / "whole" / name)
        for array, values in whole.items():
            np.testing.assert_array_equal(found[array], values if array == "layers" else np.delete(values, 4, axis=0))


def one_is_missing(folder: Path) -> None:
    (folder / "n02123045/b_t0500_s002.png").unlink()


def the_first_are_missing(folder: Path) -> None:
    for path in folder.rglob("*_t0500.png"):
        path.unlink()


def only_turns_are_left(folder: Path) -> None:
    for path in {*folder.rglob("*.png")} - {*folder.rglob("*_u02.png")}:
        path.unlink()


def one_has_no_start(folder: Path) -> None:
    (folder / "x_t0500_s002.png").write_bytes(b"")


def one_is_of_another_time(folder: Path) -> None:
    (folder / "n02123045/b_t0400_s002.png").write_bytes(b"")


def one_is_there_twice(folder: Path) -> None:
    (folder / "n02123045/b_t0500_s002.JPEG").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_is_missing, "1 of 3 images lack some of their 3 samples .* --num_trajectories 3"),
        (the_first_are_missing, "3 of 3 images lack some of their 3 samples"),
        (only_turns_are_left, "has no samples"),
        (one_has_no_start, "1 of 10 samples .* no starting image"),
        (one_is_of_another_time, r"1 image\(s\) .* not named like"),
        (one_is_there_twice, "two files of a sample"),
    ],
)
def test_mistakes(change, words, flags, tmp_path):
    change(tmp_path / "samples/t_10_20_images")
    with pytest.raises(UserError, match=f"(?s){words}") as caught:
        evaluate(flags, tmp_path / "out")
    assert len(str(caught.value).splitlines()) <= 2
    assert not (tmp_path / "out").exists()
