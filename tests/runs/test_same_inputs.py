"""Results are known by the contents of the files that they were computed from, in every script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from guided_diffusion.errors import UserError
from guided_diffusion.runs.inputs import read_entries
from guided_diffusion.runs.resumable import ResultRun

import numpy as np
import pytest
from conftest import SMALL_MODEL, as_flags, load_script
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")


def call(script: str, **flags) -> int:
    return load_script(script).main(as_flags(flags))


@pytest.fixture
def data(tmp_path) -> tuple[Path, Path]:
    """Two folders of the same relative names and sizes, and other contents."""
    rng = np.random.default_rng(0)
    for folder in ("x1", "x2"):
        for i in range(5):
            path = tmp_path / folder / "val" / f"c{i % 2}" / f"{i}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return tmp_path / "x1" / "val", tmp_path / "x2" / "val"


@pytest.fixture
def sampling(small_checkpoint, tmp_path) -> dict:
    model = {**SMALL_MODEL, "num_threads": 1, "num_workers": 0}
    flags = {"model_path": small_checkpoint, "timestep_respacing": 4, "batch_size": 2}
    return {**model, **flags, "output": tmp_path / "out"}


@pytest.fixture
def classifier(resnet18) -> dict:
    return {**resnet18, "batch_size": 6}


MAIN = "forward_backward_dataset_sample.py"
OTHER = r"differs, its content has changed \(5 such files\)\.\n.*\(--data_dir\)"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replace(path: Path) -> None:
    """Other contents of the same size."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_samples_of_other_images_of_the_same_names(data, sampling):
    assert call(MAIN, data_dir=data[0], step_reverse=2, **sampling) == 0
    before = contents(sampling["output"])
    with pytest.raises(UserError, match=OTHER):
        call(MAIN, data_dir=data[1], step_reverse=2, **sampling)
    assert contents(sampling["output"]) == before
    listed = read_entries(str(sampling["output"] / "t_2_4_inputs.json"))["images"]
    assert sorted(listed) == sorted(path.relative_to(data[0]).as_posix() for path in data[0].rglob("*.bmp"))
    assert all(len(entry.sha256) == 64 for entry in listed.values())


def test_images_replaced_halfway_give_no_mixture(data, sampling, monkeypatch):
    """A run that was killed after its first unit: its image is replaced. One that was not read yet may change."""
    main = load_script(MAIN)
    units = []
    original = main.forward_backward

    def killed(*args):
        if units:
            raise KeyboardInterrupt
        units.append(args)
        return original(*args)

    monkeypatch.setattr(main, "forward_backward", killed)
    with pytest.raises(KeyboardInterrupt):
        main.main(as_flags({"data_dir": data[0], "step_reverse": 2, **sampling}))
    assert len(list(sampling["output"].rglob("*.JPEG"))) == 2
    first, last = data[0] / "c0/0.bmp", data[0] / "c1/3.bmp"
    whole = first.read_bytes()
    replace(first)
    with pytest.raises(UserError, match=r"c0/0.bmp differs, its content has changed"):
        call(MAIN, data_dir=data[0], step_reverse=2, **sampling)
    first.write_bytes(whole + b"more")
    with pytest.raises(UserError, match=r"c0/0.bmp differs, it had 5,814 bytes and has 5,818"):
        call(MAIN, data_dir=data[0], step_reverse=2, **sampling)
    first.write_bytes(whole)
    last.write_bytes(last.read_bytes() + b"more")
    assert call(MAIN, data_dir=data[0], step_reverse=2, **sampling) == 0
    assert len(list(sampling["output"].rglob("*.JPEG"))) == 5
    assert read_entries(str(sampling["output"] / "t_2_4_inputs.json"))["images"]["c1/3.bmp"].size == 5818


def test_an_image_replaced_between_two_times_of_one_run(data, sampling, monkeypatch):
    main = load_script(MAIN)
    original = main.forward_backward

    def replacing(network, diffusion, unit, *args):
        if unit.step_reverse == 2 and unit.index == 2:
            replace(data[0] / "c0/0.bmp")
        return original(network, diffusion, unit, *args)

    monkeypatch.setattr(main, "forward_backward", replacing)
    with pytest.raises(UserError, match=r"c0/0.bmp has changed since this run"):
        main.main([*as_flags({"data_dir": data[0], **sampling}), "--step_reverse", "2", "3"])
    assert not list(sampling["output"].glob("t_3_4_images/c0/0_*"))


def test_times_of_different_images_are_not_put_beside_each_other(data, sampling):
    assert call(MAIN, data_dir=data[0], step_reverse=2, **sampling) == 0
    assert call(MAIN, data_dir=data[1], step_reverse=3, **sampling) == 0  # a time of its own
    with pytest.raises(UserError, match="was computed from another version"):
        load_script(MAIN).main([*as_flags({"data_dir": data[1], **sampling}), "--step_reverse", "2", "3"])


def test_a_folder_of_an_earlier_version_is_accepted_once(data, sampling, capsys):
    """One without a list of its images: a warning, then they are listed."""
    assert call(MAIN, data_dir=data[0], step_reverse=2, **sampling) == 0
    listed = sampling["output"] / "t_2_4_inputs.json"
    expected = listed.read_bytes()
    listed.unlink()
    record = json.loads((sampling["output"] / "t_2_4_run.json").read_text())
    del record["num_shards"]
    (sampling["output"] / "t_2_4_run.json").write_text(json.dumps(record))
    capsys.readouterr()
    for warnings in (1, 0):
        assert call(MAIN, data_dir=data[0], step_reverse=2, **sampling) == 0
        said = capsys.readouterr().err
        assert said.count("did not record the contents of the images") == warnings
        assert listed.read_bytes() == expected
    with pytest.raises(UserError, match=OTHER):
        call(MAIN, data_dir=data[1], step_reverse=2, **sampling)


def test_bits_of_other_images_of_the_same_names(data, sampling, monkeypatch):
    flags = {**sampling, "timestep_respacing": 2}
    script = "scripts/image_nll.py"
    assert call(script, data_dir=data[0], **flags) == 0
    before = contents(flags["output"])
    with pytest.raises(UserError, match=rf"image_nll.npz was computed from other files: .*{OTHER}"):
        call(script, data_dir=data[1], **flags)
    assert contents(flags["output"]) == before
    assert call(script, data_dir=data[0], **flags) == 0
    # Parts of a killed run, too.
    main = load_script(script)
    monkeypatch.setattr(ResultRun, "finish", lambda *_: 0)
    flags["output"] = flags["output"] / "killed"
    assert main.main(as_flags({"data_dir": data[0], **flags})) == 0
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"image_nll_parts was computed from other files: .*{OTHER}"):
        call(script, data_dir=data[1], **flags)
    assert call(script, data_dir=data[0], **flags) == 0
    assert contents(flags["output"]).keys() == {Path(name).name for name in before}


def test_statistics_of_other_images_in_the_default_folder(data, classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("classifier_statistics.py", data_dir=data[0], num_samples=5, **classifier) == 0
    before = contents(tmp_path / "classifier_statistics")
    with pytest.raises(UserError, match=rf"act_stat_resnet18.npz was computed from other files: .*{OTHER}"):
        call("classifier_statistics.py", data_dir=data[1], num_samples=5, **classifier)
    assert contents(tmp_path / "classifier_statistics") == before
    assert call("classifier_statistics.py", data_dir=data[0], num_samples=5, **classifier) == 0


@pytest.fixture
def evaluated(data, sampling, classifier, tmp_path) -> dict:
    """The flags of an evaluation that is finished."""
    main = load_script(MAIN)
    output = tmp_path / "samples"
    assert main.main([*as_flags({**sampling, "data_dir": data[0], "output": output}), "--step_reverse", "2", "3"]) == 0
    flags = {"starting_data_dir": data[0], "data_dir": output, "output": tmp_path / "results", **classifier}
    flags |= {"timestep_respacing": 4, "time_series": "2,3", "normalization": "none"}
    assert call("evaluate_classifier.py", **flags) == 0
    return flags


def test_starting_images_that_the_samples_were_not_made_from(data, evaluated, tmp_path):
    words = r"samples was computed from other files: .*x2/val/.* differs, .*\n.*\(--starting_data_dir\), or make the"
    for output in (evaluated["output"], tmp_path / "new"):
        with pytest.raises(UserError, match=words):
            call("evaluate_classifier.py", **{**evaluated, "starting_data_dir": data[1], "output": output})
    assert call("evaluate_classifier.py", **evaluated) == 0
    evaluated |= {"statistic": "mean", "results": evaluated["output"]}
    names = ("results", "starting_data_dir", "data_dir", "timestep_respacing", "classifier_name")
    drawing = {**{name: evaluated[name] for name in names}, "output": tmp_path / "figures"}
    assert call("scripts/plot_figures.py", **drawing) == 0
    with pytest.raises(UserError, match=r"has changed since .*\(--starting_data_dir\)"):
        call("scripts/plot_figures.py", **{**drawing, "starting_data_dir": data[1]})


def test_samples_that_were_replaced(evaluated, tmp_path, monkeypatch):
    sample = next(evaluated["data_dir"].glob("t_3_4_images/*/*.JPEG"))
    whole = sample.read_bytes()
    replace(sample)
    with pytest.raises(UserError, match=rf"act_diff_resnet18-t_3_4.npz was .*{sample.name} differs, its content"):
        call("evaluate_classifier.py", **evaluated)
    # While it is compared: the parts know the contents.
    sample.write_bytes(whole)
    script = load_script("evaluate_classifier.py")
    monkeypatch.setattr(ResultRun, "finish", lambda *_: 0)
    flags = {**evaluated, "output": tmp_path / "killed", "batch_size": 3}
    assert script.main(as_flags(flags)) == 0
    replace(sample)
    with pytest.raises(UserError, match=rf"_parts was computed from other files: .*{sample.name} differs"):
        call("evaluate_classifier.py", **flags)
    sample.write_bytes(whole)
    assert call("evaluate_classifier.py", **flags) == 0


def test_results_of_an_earlier_version_are_accepted_once(evaluated, capsys):
    for path in evaluated["output"].glob("*_inputs.json"):
        path.unlink()
    shutil.rmtree(evaluated["output"] / "none", ignore_errors=True)
    capsys.readouterr()
    for warnings in (1, 0):
        assert call("evaluate_classifier.py", **evaluated) == 0
        assert capsys.readouterr().err.count("did not record the contents") == warnings
    sample = next(evaluated["data_dir"].glob("t_2_4_images/*/*.JPEG"))
    replace(sample)
    with pytest.raises(UserError, match="its content has changed"):
        call("evaluate_classifier.py", **evaluated)
