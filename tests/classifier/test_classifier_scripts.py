"""The classifier scripts as their users run them: real images, real weights files, real processes, really killed.

Numbers are compared with a direct computation that keeps all activations of all images, in float64.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from guided_diffusion.classifier.networks import open_classifier
from guided_diffusion.classifier.results import read_series
from guided_diffusion.compute.transfer import upload
from guided_diffusion.errors import UserError
from guided_diffusion.images.imagenet import CLASS_INDEX
from guided_diffusion.images.io import read_image

import numpy as np
import pytest
import torch
import torchvision
from conftest import PHOTOGRAPHS, as_flags, environment, load_script, run_script, start_script
from PIL import Image

NAME = "regnet_x_400mf"  # the quickest of the families
SIZE = 64
TIMES = (5, 10)
NUM_STEPS = 20
SIMILARITIES = ("cosine", "L2", "L2_normalized")


@pytest.fixture(autouse=True, scope="module")
def threads():
    """`main` sets the number of threads of the tests' process; others shall not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights, with which one class wins mostly and another is among the first five."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(NAME)
    with torch.no_grad():
        model.fc.weight *= 10
        model.fc.bias[CLASS_INDEX["n02123045"]] = 50
        model.fc.bias[CLASS_INDEX["n04008634"]] = 25
    path = tmp_path_factory.mktemp("weights") / "classifier.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> Path:
    """Twelve starting images in four classes."""
    folder = tmp_path_factory.mktemp("datasets") / "ILSVRC2012" / "validation"
    for path in sorted(PHOTOGRAPHS.glob("*/*.JPEG")):
        wnid = path.parent.name
        (folder / wnid).mkdir(parents=True)
        with Image.open(path) as image:
            for i in range(3):
                image.resize((80 + 10 * i, 120), box=(20 * i, 0, 200 + 20 * i, 200)).save(folder / wnid / f"{i}.JPEG")
    return folder


def names_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def make_samples(starts: Path, folder: Path, times=TIMES) -> Path:
    """A sample of every starting image but the last, at each time: the image with noise that grows with time."""
    for k in times:
        noise = np.random.default_rng(k)
        for name in names_of(starts)[:-1]:
            pixels = read_image(str(starts / name), SIZE) + noise.normal(0, 10 * k, (SIZE, SIZE, 3))
            stem = Path(name).with_suffix("")
            path = folder / f"t_{k}_{NUM_STEPS}_images" / f"{stem}_t{k * 50:04d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)
    return folder


@pytest.fixture(scope="module")
def samples(starts, tmp_path_factory) -> Path:
    """The samples of both times; not to be changed."""
    return make_samples(starts, tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def common(weights) -> dict:
    return {
        "classifier_name": NAME,
        "classifier_path": weights,
        "image_size": SIZE,
        "num_threads": 1,
    }


@pytest.fixture(scope="module")
def statistics_flags(starts, common) -> dict:
    return {**common, "data_dir": starts, "num_samples": 7, "batch_size": 3}


@pytest.fixture(scope="module")
def flags(starts, samples, common) -> dict:
    series = {"time_series": ",".join(map(str, TIMES)), "timestep_respacing": NUM_STEPS}
    return {**common, "starting_data_dir": starts, "data_dir": samples, "batch_size": 7, **series}


def statistics(flags: dict, output: Path) -> int:
    """Call classifier_statistics.py in this process."""
    return load_script("classifier_statistics.py").main(as_flags({**flags, "output": output}))


def evaluate(flags: dict, output: Path) -> int:
    """Call evaluate_classifier.py in this process."""
    return load_script("evaluate_classifier.py").main(as_flags({**flags, "output": output}))


@pytest.fixture(scope="module")
def measured(statistics_flags, tmp_path_factory) -> Path:
    """The folder of the statistics; not to be changed."""
    output = tmp_path_factory.mktemp("statistics")
    assert statistics(statistics_flags, output) == 0
    return output


@pytest.fixture(scope="module")
def results(measured, flags, tmp_path_factory) -> Path:
    """The folder of statistics and comparisons, of one process without interruption; not to be changed."""
    output = tmp_path_factory.mktemp("results") / "results"
    shutil.copytree(measured, output)
    assert evaluate(flags, output) == 0
    return output


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def copy_statistics(source: Path, target: Path) -> None:
    for path in source.glob("act_stat_*"):
        shutil.copy(path, target)


def archives(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


def assert_close(folder: Path, other: Path, error: float) -> None:
    """All .npz files of two folders hold the same, but for an error in units of the largest value (of a layer)."""
    assert archives(folder).keys() == archives(other).keys() != set()
    for name in archives(folder):
        one, two = arrays(folder / name), arrays(other / name)
        assert one.keys() == two.keys()
        for key, values in one.items():
            if values.dtype.kind == "f":
                largest = np.abs(two[key]).max(axis=0 if key in SIMILARITIES else None)
                assert np.all(np.abs(values - two[key]) <= error * largest), f"{name} {key}"
            else:
                np.testing.assert_array_equal(values, two[key])


# Against a direct computation


class Direct:
    """All activations of all images, float64: layer -> (n, channels, places)."""

    def __init__(self, weights: Path, layers: list[str]):
        self.model = torchvision.models.get_model(NAME).eval()
        self.model.load_state_dict(torch.load(weights))
        self.model.double()
        self.preprocess = open_classifier(NAME, str(weights)).preprocess
        self.layers = layers

    def activations(self, images: list[np.ndarray]) -> dict[str, np.ndarray]:
        kept = {}
        hooks = [
            self.model.get_submodule(layer).register_forward_hook(
                lambda module, inputs, output, layer=layer: kept.update({layer: output.flatten(2 - (output.ndim == 2))})
            )
            for layer in self.layers
        ]
        with torch.no_grad():
            self.model(torch.stack([self.preprocess(image) for image in images]).double())
        for hook in hooks:
            hook.remove()
        # The logits are one channel.
        return {layer: (a[:, None] if a.ndim == 2 else a).numpy() for layer, a in kept.items()}


@pytest.fixture(scope="module")
def direct(weights, measured) -> Direct:
    layers = [str(layer) for layer in arrays(measured / f"act_stat_{NAME}.npz")["layers"]]
    assert layers[-1] == "fc"
    assert len(layers) > 5
    return Direct(weights, layers)


def test_statistics_are_those_of_all_activations(direct, measured, starts):
    """Of images spread evenly over the list: 7 of 12 are those at floor(12 i / 7)."""
    names = [names_of(starts)[i] for i in (0, 1, 3, 5, 6, 8, 10)]
    all_of = direct.activations([read_image(str(starts / name), SIZE) for name in names])
    found = arrays(measured / f"act_stat_{NAME}.npz")
    for layer, a in all_of.items():
        shape = () if layer == "fc" else (a.shape[1],)
        for kind, values in {
            "mean": a.mean(axis=(0, 2)),
            "variance": a.var(axis=(0, 2)),
            "second_moment": (a**2).mean(axis=(0, 2)),
        }.items():
            got = found[f"{kind}/{layer}"]
            assert got.dtype == np.float64
            assert got.size == max(1, *shape, 1)
            np.testing.assert_allclose(got.reshape(-1), values, rtol=1e-5, atol=1e-6 * np.abs(values).max())
        assert found[f"count/{layer}"] == len(names) * a.shape[2]
    logits = all_of["fc"][:, 0]
    own = np.array([CLASS_INDEX[name.split("/")[0]] for name in names])
    better = (logits > logits[range(7), own][:, None]).sum(axis=1)
    assert found["num_images"] == 7
    assert found["top1"] == pytest.approx((better < 1).mean())
    assert found["top5"] == pytest.approx((better < 5).mean())
    assert 0 < found["top1"] < found["top5"] < 1
    record = json.loads((measured / f"act_stat_{NAME}.json").read_text())
    assert record["finished"]
    assert "torch" in record["last_run"]


@pytest.mark.parametrize("normalization", ["std", "rms", "none"])
def test_similarities_are_those_of_all_activations(normalization, direct, results, starts, samples, flags, tmp_path):
    output = results
    if normalization != "std":
        output = tmp_path
        copy_statistics(results, tmp_path)
        assert evaluate({**flags, "time_series": 10, "normalization": normalization}, tmp_path) == 0
    measured = arrays(results / f"act_stat_{NAME}.npz")
    names = names_of(starts)[:-1]
    start = direct.activations([read_image(str(starts / name), SIZE) for name in names])
    for k in TIMES if normalization == "std" else (10,):
        paths = [samples / f"t_{k}_20_images" / f"{Path(name).with_suffix('')}_t{50 * k:04d}.JPEG" for name in names]
        sample = direct.activations([np.asarray(Image.open(path)) for path in paths])
        found, logits = arrays(output / f"act_diff_{NAME}-t_{k}_20.npz"), arrays(output / f"logits_{NAME}-t_{k}_20.npz")
        assert found["names"].tolist() == logits["names"].tolist() == names
        assert found["layers"].tolist() == direct.layers
        assert logits["labels"].tolist() == [CLASS_INDEX[name.split("/")[0]] for name in names]
        for key, a in ("logits_start", start["fc"]), ("logits_sample", sample["fc"]):
            assert logits[key].dtype == np.float32
            np.testing.assert_allclose(logits[key], a[:, 0], rtol=1e-5, atol=1e-5 * np.abs(a).max())
        for column, layer in enumerate(direct.layers):
            mean, scale = 0.0, 1.0
            if normalization == "std":
                mean, scale = measured[f"mean/{layer}"], measured[f"variance/{layer}"] ** 0.5
            if normalization == "rms":
                mean, scale = measured[f"mean/{layer}"], measured[f"second_moment/{layer}"] ** 0.5
            scale = np.where(scale == 0, 1, scale)
            a, b = (
                ((x - np.reshape(mean, (-1, 1))) / np.reshape(scale, (-1, 1))).reshape(len(names), -1)
                for x in (start[layer], sample[layer])
            )
            norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
            distance = np.linalg.norm(a - b, axis=1)
            expected = (a * b).sum(axis=1) / (norms[0] * norms[1]), distance, distance / (norms[0] * norms[1]) ** 0.5
            for key, values in zip(SIMILARITIES, expected, strict=True):
                assert found[key].shape == (len(names), len(direct.layers))
                atol = 1e-5 * np.abs(values).max()  # the classifier's own rounding, in float32
                np.testing.assert_allclose(found[key][:, column], values, rtol=0, atol=atol, err_msg=layer)


def test_a_classifier_of_one_s_own_classes(weights, starts, statistics_flags, tmp_path, capsys):
    """As many logits as the folder has classes: they are its sorted classes. Another number: they are not known."""
    state = torch.load(weights)
    own = {n: (w[:4] if n.startswith("fc.") else w).clone() for n, w in state.items()}
    own["fc.bias"] = torch.tensor([0.0, 0, 1000, 0])  # always the third
    torch.save(own, tmp_path / "own.pth")
    flags = {**statistics_flags, "classifier_path": tmp_path / "own.pth", "num_samples": 100}
    assert statistics(flags, tmp_path / "own") == 0
    found = arrays(tmp_path / f"own/act_stat_{NAME}.npz")
    assert (found["top1"], found["top5"]) == (0.25, 1)
    torch.save({n: w[:3] if n.startswith("fc.") else w for n, w in own.items()}, tmp_path / "other.pth")
    capsys.readouterr()
    assert statistics({**flags, "classifier_path": tmp_path / "other.pth"}, tmp_path / "other") == 0
    assert arrays(tmp_path / f"other/act_stat_{NAME}.npz").keys().isdisjoint({"top1", "top5"})
    said = capsys.readouterr().err
    assert (
        said.count("the images have 4 classes, and the classifier has 3 logits: the labels of the images are unk") == 1
    )
    assert "classes.json next to the weights" in said
    assert "accuracy unknown: the labels of 12 images are unknown" in said


def test_classes_that_are_not_imagenet_s(statistics_flags, starts, tmp_path, capsys):
    """The 1000 logits are taken for those of ImageNet, so nothing is known of the others."""
    for name, source in (("cats", 0), ("dogs", 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(starts / names_of(starts)[source], tmp_path / "data" / name / "1.JPEG")
    assert statistics({**statistics_flags, "data_dir": tmp_path / "data"}, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "the classifier has 1000 logits, taken for ImageNet's classes, and 2 of the 2 classes of the images" in said
    assert "are no wnids, such as cats" in said and "accuracy unknown: the labels of 2 images are unknown" in said


def test_classes_of_numbers_and_the_record_of_a_classifier(weights, starts, statistics_flags, flags, tmp_path, capsys):
    """Four folders 0, 1, 10, 2, and a classifier that always says the last: which one that is, is a matter of order."""
    state = torch.load(weights)
    own = {n: (w[:4] if n.startswith("fc.") else w).clone() for n, w in state.items()}
    own["fc.bias"] = torch.tensor([0.0, 0, 0, 1000])
    (tmp_path / "weights").mkdir()
    torch.save(own, tmp_path / "weights/own.pth")
    for name, folder in zip(("0", "1", "10", "2"), sorted(starts.iterdir()), strict=True):
        shutil.copytree(folder, tmp_path / "data" / name)
    shutil.rmtree(tmp_path / "data/10")
    (tmp_path / "data/10").mkdir()
    shutil.copy(starts / "n02123045/0.JPEG", tmp_path / "data/10/0.JPEG")  # 3 + 3 + 1 + 3 images
    common = {"classifier_path": tmp_path / "weights/own.pth", "data_dir": tmp_path / "data", "num_samples": 100}
    mine = {**statistics_flags, **common}

    def top1(output, **more):
        capsys.readouterr()
        assert statistics({**mine, **more}, tmp_path / output) == 0
        return float(arrays(tmp_path / output / f"act_stat_{NAME}.npz")["top1"]), capsys.readouterr().err

    accuracy, said = top1("text")
    assert accuracy == 0.3 and said.count("are numbers, ordered as text: 0, 1, 10, 2") == 1
    accuracy, said = top1("number", class_order="number")
    assert accuracy == 0.1 and "ordered as text" not in said
    record = tmp_path / "weights/classes.json"
    record.write_text(json.dumps({"order": "number", "classes": {"0": "0", "1": "2", "2": "10", "3": "1"}}))
    accuracy, said = top1("recorded")
    assert accuracy == 0.3 and "ordered as text" not in said
    make_samples(tmp_path / "data", tmp_path / "samples")
    evaluated = {**flags, "classifier_path": common["classifier_path"], "starting_data_dir": tmp_path / "data"}
    assert evaluate({**evaluated, "data_dir": tmp_path / "samples"}, tmp_path / "recorded") == 0
    with np.load(tmp_path / "recorded" / f"logits_{NAME}-t_5_20.npz") as f:
        by_name = dict(zip(f["names"].tolist(), f["labels"].tolist(), strict=True))
    assert (by_name["0/0.JPEG"], by_name["1/0.JPEG"], by_name["10/0.JPEG"], by_name["2/0.JPEG"]) == (0, 3, 2, 1)

    for content, words in (
        ({"0": "0", "1": "1", "2": "2"}, "1 of 4 classes in the folder of images are not among the model's 3: 10"),
        ({"0": "0", "4": "1", "2": "2", "3": "10"}, "has classes up to 4, but the classifier has only 4 logits"),
    ):
        record.write_text(json.dumps({"order": "text", "classes": content}))
        with pytest.raises(UserError, match=words):
            statistics(mine, tmp_path / "other")
    record.write_text(json.dumps({"order": "number", "classes": {"0": "0", "1": "1", "2": "2", "3": "10"}}))
    with pytest.raises(UserError, match="--class_order text contradicts"):
        statistics({**mine, "class_order": "text"}, tmp_path / "other")


def test_images_of_unknown_classes(statistics_flags, starts, flags, tmp_path, capsys):
    """Flat official names, and images beside class folders: everything but the true classes is measured."""
    for name, source in (("a/1.JPEG", 0), ("b/1.JPEG", 1), ("ILSVRC2012_val_00000001.JPEG", 2)):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(starts / names_of(starts)[source], tmp_path / "data" / name)
    make_samples(tmp_path / "data", tmp_path / "samples")
    assert statistics({**statistics_flags, "data_dir": tmp_path / "data"}, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "do not give a class" in said and "accuracy unknown" in said
    both = {"starting_data_dir": tmp_path / "data", "data_dir": tmp_path / "samples"}
    assert evaluate({**flags, **both}, tmp_path / "out") == 0
    assert "their classes are unknown" in capsys.readouterr().err
    with np.load(tmp_path / "out" / f"logits_{NAME}-t_5_20.npz") as f:
        assert f["labels"].tolist() == [-1, -1]  # the last image has no sample


def test_the_series_is_read_in_the_order_of_time(results, tmp_path):
    series = read_series(str(results), NAME)
    assert [(result.step_reverse, result.num_steps) for result in series] == [(5, 20), (10, 20)]
    assert series[0].differences["cosine"].mean() > series[1].differences["cosine"].mean()  # more noise, less alike
    shutil.copytree(results, tmp_path / "damaged")
    path = tmp_path / "damaged" / f"logits_{NAME}-t_5_20.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        read_series(str(tmp_path / "damaged"), NAME)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        read_series(str(tmp_path / "damaged"), NAME)
    with pytest.raises(UserError, match="no results"):
        read_series(str(results), "resnet50")


# Any batch size, any number of processes


@pytest.mark.parametrize("batch_size", [1, 32])
def test_equal_results_for_other_batch_sizes(batch_size, flags, statistics_flags, results, tmp_path):
    """Of 7, 1 and 32 images, that is of 2, 1 and 10 starting images; there are 11."""
    assert statistics({**statistics_flags, "batch_size": batch_size}, tmp_path) == 0
    for key, values in arrays(tmp_path / f"act_stat_{NAME}.npz").items():
        expected = arrays(results / f"act_stat_{NAME}.npz")[key]
        if values.dtype.kind == "f":
            # The classifier's own rounding depends on the size of the batch.
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        else:
            np.testing.assert_array_equal(values, expected)
    copy_statistics(results, tmp_path)
    assert evaluate({**flags, "batch_size": batch_size}, tmp_path) == 0
    assert_close(tmp_path, results, error=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_equal_results_from_several_processes(processes, flags, statistics_flags, results, tmp_path):
    script = tmp_path / "both.py"
    script.write_text(
        "import sys\n"
        "from conftest import load_script\n"
        "words = sys.argv[1:]\n"
        "middle = words.index('--')\n"
        "load_script('classifier_statistics.py').main(words[:middle])\n"
        "load_script('evaluate_classifier.py').main(words[middle + 1:])\n"
    )
    output = tmp_path / "output"
    words = [*as_flags({**statistics_flags, "output": output}), "--", *as_flags({**flags, "output": output})]
    paths = os.pathsep.join([str(PHOTOGRAPHS.parent), environment()["PYTHONPATH"]])
    launch = {"kind": "mpiexec", "processes": processes, "env": environment(PYTHONPATH=paths)}
    done = run_script(*words, script=script, **launch)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("batches to compute") == 1  # one process speaks
    assert json.loads((output / f"act_diff_{NAME}-t_5_20.json").read_text())["last_run"]["processes"] == processes
    assert (output / f"act_stat_{NAME}.npz").read_bytes() == (results / f"act_stat_{NAME}.npz").read_bytes()
    assert_close(output, results, error=1e-9)


def test_images_are_uploaded_as_bytes(flags, statistics_flags, results, tmp_path, monkeypatch):
    """A byte for each pixel and colour of the network's input, not four."""
    copy_statistics(results, tmp_path)
    few = {**statistics_flags, "num_samples": 3, "output": tmp_path / "few"}
    for name, words in (("classifier_statistics.py", few), ("evaluate_classifier.py", {**flags, "output": tmp_path})):
        script, uploaded = load_script(name), []
        monkeypatch.setattr(script, "upload", lambda x, device, into=uploaded: into.append(x) or upload(x, device))
        assert script.main(as_flags(words)) == 0
        assert uploaded and all(x[0].nbytes == 3 * 224 * 224 for x in uploaded)


# Starting again


def test_a_restart_does_only_what_is_missing(flags, measured, results, samples, starts, tmp_path, capsys):
    output = tmp_path / "output"
    shutil.copytree(measured, output)
    assert evaluate({**flags, "time_series": 5}, output) == 0
    assert "11 starting images" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert evaluate({**flags, "time_series": 5}, output) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert evaluate(flags, output) == 0
    said = capsys.readouterr().err
    assert "with samples of k = 10 of" in said
    assert "1 times are done already" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_close(output, results, error=1e-5)
    assert not list(output.glob("*_parts"))

    # Other samples, another normalisation: nothing is mixed, nothing overwritten.
    changed = tmp_path / "samples"
    shutil.copytree(samples, changed)
    sample = next(changed.glob("t_10_20_images/*/*"))
    Image.open(sample).save(sample, quality=50)
    there = archives(output)
    for change, word in ({"data_dir": changed}, "--data_dir"), ({"normalization": "rms"}, "--normalization"):
        with pytest.raises(UserError, match="with other settings") as caught:
            evaluate({**flags, **change}, output)
        assert word in str(caught.value)
    assert archives(output) == there


def test_finished_statistics_are_left_alone(statistics_flags, measured, tmp_path, capsys):
    output = tmp_path / "output"
    shutil.copytree(measured, output)
    before = (output / f"act_stat_{NAME}.npz").stat().st_mtime_ns
    assert statistics(statistics_flags, output) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (output / f"act_stat_{NAME}.npz").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"--num_samples\) was 7 and is now 6.*\n.*another --output"):
        statistics({**statistics_flags, "num_samples": 6}, output)


def test_the_same_after_being_killed(flags, measured, results, tmp_path, capsys):
    """SIGKILL when some batches are there: what is there is kept, and the result is the same to the byte."""
    output = tmp_path / "output"
    shutil.copytree(measured, output)
    words = as_flags({**flags, "output": output})
    process = start_script(
        *words, script="evaluate_classifier.py", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    patience = time.monotonic() + 300
    while len(list(output.glob("*_parts/0*.npz"))) < 2 and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*_parts/0*.npz")}
    assert 2 <= len(kept) < 6
    assert not list(output.glob("act_diff*.npz"))
    assert evaluate(flags, output) == 0
    assert f"{6 - len(kept)} of 6 batches to compute" in capsys.readouterr().err
    assert archives(output) == archives(results)
    assert {path.name for path in output.iterdir()} == {path.name for path in results.iterdir()}  # nothing else is left


def test_killed_between_the_files_of_two_times(flags, measured, results, tmp_path, monkeypatch):
    """The batches of both times are still used, although one time is finished."""
    output = tmp_path / "output"
    shutil.copytree(measured, output)
    script = load_script("evaluate_classifier.py")
    write_time, written = script.write_time, []

    def write_one(*args):
        if written:
            raise KeyboardInterrupt
        written.append(write_time(*args))

    monkeypatch.setattr(script, "write_time", write_one)
    with pytest.raises(KeyboardInterrupt):
        script.main(as_flags({**flags, "output": output}))
    assert len(list(output.glob("act_diff*.npz"))) == 1
    assert len(list(output.glob("*_parts/0*.npz"))) == 6
    monkeypatch.undo()
    monkeypatch.setattr(script, "read_image", None)  # nothing is read again
    assert script.main(as_flags({**flags, "output": output})) == 0
    assert archives(output) == archives(results)


def test_images_that_are_all_unreadable_are_named(flags, statistics_flags, starts, measured, tmp_path, capsys):
    for name in names_of(starts):
        path = tmp_path / "starts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"nothing")
    flags = {**flags, "starting_data_dir": tmp_path / "starts"}
    for call, mine in ((statistics, {**statistics_flags, "data_dir": tmp_path / "starts"}), (evaluate, flags)):
        output = tmp_path / call.__name__
        output.mkdir()
        if call is evaluate:
            copy_statistics(measured, output)
        with pytest.raises(UserError, match="could be read: there is nothing to write") as caught:
            call(mine, output)
        assert caught.value.status == 1
        assert "n07920052/1.JPEG' cannot be read: it is not one of" in capsys.readouterr().err


def test_an_unreadable_image_is_named_and_left_out(flags, statistics_flags, results, starts, samples, tmp_path, capsys):
    starting, sampled, output = tmp_path / "starts", tmp_path / "samples", tmp_path / "output"
    shutil.copytree(starts, starting)
    shutil.copytree(samples, sampled)
    broken = sampled / "t_5_20_images/n02123045/1_t0250.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    (starting / "n04008634/1.JPEG").write_bytes(b"nothing")
    names = names_of(starts)[:-1]
    assert statistics({**statistics_flags, "data_dir": starting, "num_samples": 100}, output) == 1
    said = capsys.readouterr().err
    assert "100 images asked for (--num_samples), 12 found" in said
    assert "n04008634/1.JPEG" in said
    assert "1 of 12 images could not be read" in said
    assert arrays(output / f"act_stat_{NAME}.npz")["num_images"] == 11
    shutil.rmtree(output)
    output.mkdir()
    copy_statistics(results, output)
    flags = {**flags, "starting_data_dir": starting, "data_dir": sampled}
    assert evaluate(flags, output) == 1
    said = capsys.readouterr().err
    assert str(broken) in said
    assert "n04008634/1.JPEG" in said
    assert "2 images could not be read" in said
    for k, lost in (5, {"n02123045/1.JPEG", "n04008634/1.JPEG"}), (10, {"n04008634/1.JPEG"}):
        found, whole = (arrays(folder / f"act_diff_{NAME}-t_{k}_20.npz") for folder in (output, results))
        fine = [name not in lost for name in names]
        assert found["names"].tolist() == [name for name in names if name not in lost]
        np.testing.assert_array_equal(found["cosine"], whole["cosine"][fine])  # the others keep their bytes
    # After the starting image is repaired, the same command computes the incomplete batches only.
    shutil.copy(starts / "n04008634/1.JPEG", starting / "n04008634/1.JPEG")
    assert evaluate(flags, output) == 1
    said = capsys.readouterr().err
    assert "2 of 6 batches to compute" in said
    assert "1 images could not be read" in said
    assert (output / f"act_diff_{NAME}-t_10_20.npz").read_bytes() == (
        results / f"act_diff_{NAME}-t_10_20.npz"
    ).read_bytes()


# Mistakes


def lacks_a_sample(folder: Path) -> None:
    (folder / "t_10_20_images/n02123045/1_t0500.JPEG").unlink()
    (folder / "t_10_20_images/n02123045/2_t0500.JPEG").unlink()


def has_one_too_many(folder: Path) -> None:
    shutil.copy(folder / "t_5_20_images/n02123045/1_t0250.JPEG", folder / "t_5_20_images/n02123045/99_t0250.JPEG")


def is_empty(folder: Path) -> None:
    for path in (folder / "t_10_20_images").rglob("*.JPEG"):
        path.unlink()


def has_another_size(folder: Path) -> None:
    path = folder / "t_10_20_images/n02123045/0_t0500.JPEG"
    Image.open(path).resize((32, 32)).save(path)


MISTAKES = {
    "a sample is missing": (
        lacks_a_sample,
        {},
        ["k = 10 lacks 2 of 11", "'n02123045/1', 'n", "--time_series"],
    ),
    "a sample without start": (has_one_too_many, {}, ["1 of 12 samples", "99_t0250.JPEG", "--starting_data_dir"]),
    "an empty time": (is_empty, {}, ["k = 10 of N = 20", "has no samples", "N = 20: k = 5", "--time_series"]),
    "a time that is not there": (None, {"time_series": "5,15"}, ["t_15_20_images does not exist", "k = 5, 10"]),
    "another respacing": (None, {"timestep_respacing": 250}, ["of N = 250", "N = 20: k = 5, 10", "_respacing"]),
    "no such respacing": (None, {"timestep_respacing": "many"}, ["many"]),
    "a time beyond the end": (None, {"time_series": 21}, ["--time_series 21", "20"]),
    "no time": (None, {"time_series": ","}, ["--time_series", "25 50 125"]),
    "a time that is no number": (None, {"time_series": "five"}, ["--time_series", "five"]),
    "other training steps": (None, {"diffusion_steps": 4000}, ["_t0250.JPEG", "_t1000.JPEG", "--diffusion_steps"]),
    "another size": (has_another_size, {}, ["32x32", "64x64", "--image_size"]),
    "no starting images": (None, {"starting_data_dir": "nowhere"}, ["nowhere", "(--starting_data_dir)"]),
    "no samples": (None, {"data_dir": "nowhere"}, ["nowhere", "Times with samples: none", "--data_dir"]),
    "no such classifier": (None, {"classifier_name": "regnet_x_400m"}, ["regnet_x_400mf"]),
    "weights of another classifier": (None, {"classifier_name": "resnet18"}, ["--classifier_path"]),
    "no such layers": (None, {"layers": "blocks.*"}, ["--layers", "blocks.*"]),
    "statistics of other layers": (None, {"layers": "trunk_output.block1,fc"}, ["act_stat_", "trunk_output.block1"]),
    "random weights": (None, {"classifier_path": "untrained"}, ["act_stat_", "of another classifier", "_path"]),
    "no statistics": (None, {"output": "elsewhere"}, ["act_stat_", "classifier_statistics.py"]),
    "damaged statistics": (
        lambda folder: (folder / "damaged").mkdir(),
        {"output": "damaged"},
        ["act_stat_", "damaged"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_plain_words(mistake, flags, measured, samples, tmp_path, monkeypatch, capsys):
    """Before anything is computed or written."""
    monkeypatch.chdir(tmp_path)
    spoil, changes, words = MISTAKES[mistake]
    output = tmp_path / changes.get("output", "output")
    if changes.get("output") != "elsewhere":
        shutil.copytree(measured, output)
    statistics_there = output / f"act_stat_{NAME}.npz"
    if mistake == "damaged statistics":
        statistics_there.write_bytes(statistics_there.read_bytes()[:-500])
    elif spoil:
        shutil.copytree(samples, tmp_path / "samples")
        spoil(tmp_path / "samples")
        changes = {**changes, "data_dir": tmp_path / "samples"}
    before = archives(output)
    capsys.readouterr()
    with pytest.raises((UserError, SystemExit)) as caught:
        evaluate({**flags, **changes}, output)
    told = capsys.readouterr()
    message = told.err if caught.type is SystemExit else str(caught.value)
    assert len(message.strip().splitlines()) <= 2, message
    for word in words:
        assert word in message
    assert archives(output) == before
    assert not list(output.glob("*_parts"))


# The three commands


def test_the_three_commands_one_after_the_other(tmp_path):
    """As the README has them but for sizes and weights, from a folder of one's own, with the published classifier."""
    validation = tmp_path / "datasets/ILSVRC2012/validation"
    for path in sorted(PHOTOGRAPHS.glob("*/*.JPEG"))[:2]:
        (validation / path.parent.name).mkdir(parents=True)
        shutil.copy(path, validation / path.parent.name)
    torch.manual_seed(0)
    torch.save(torchvision.models.convnext_base().state_dict(), tmp_path / "convnext_base.pth")
    small = {"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "learn_sigma": True}
    commands = {
        "forward_backward_dataset_sample.py": {
            "data_dir": "datasets/ILSVRC2012/validation",
            "model_path": "untrained",
            "timestep_respacing": 4,
            **small,
        },
        "classifier_statistics.py": {
            "data_dir": "datasets/ILSVRC2012/validation",
            "classifier_name": "convnext_base",
            "classifier_path": "convnext_base.pth",
            "image_size": 64,
        },
        "evaluate_classifier.py": {
            "starting_data_dir": "datasets/ILSVRC2012/validation",
            "data_dir": "results/diffused_ILSVRC2012_validation",
            "output": "classifier_statistics/convnext_base",
            "timestep_respacing": 4,
            "batch_size": 16,
            "classifier_name": "convnext_base",
            "classifier_path": "convnext_base.pth",
            "image_size": 64,
        },
    }
    several = {"forward_backward_dataset_sample.py": "--step_reverse", "evaluate_classifier.py": "--time_series"}
    for script, given in commands.items():
        times = [several[script], "0", "4"] if script in several else []
        done = run_script(*as_flags(given), *times, script=script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    series = read_series(str(tmp_path / "classifier_statistics/convnext_base"), "convnext_base")
    assert [result.step_reverse for result in series] == [0, 4]
    for result in series:
        assert result.differences["cosine"].shape == (2, 41)
        assert result.differences["layers"][0] == "features.0"
        assert result.logits["logits_start"].shape == (2, 1000)
    back, noise = (result.differences["cosine"][:, 0] for result in series)
    assert (back > 0.9).all()  # nothing but JPEG's losses
    assert (noise < back).all()
