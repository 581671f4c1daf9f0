"""Numbers that are not finite are never reported or recorded, in any script: one line, and status 1."""

from __future__ import annotations

from pathlib import Path

from guided_diffusion.classifier.figures import new_figure, render
from guided_diffusion.classifier.results import logits_file
from guided_diffusion.errors import ResultError, UserError
from guided_diffusion.system.files import write_json

import numpy as np
import pytest
import torch
import torchvision
from conftest import SMALL_MODEL, as_flags, load_script, run_script
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")

MAIN = "forward_backward_dataset_sample.py"


def call(script: str, **flags) -> int:
    return load_script(script).main(as_flags(flags))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images of two ImageNet classes."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for wnid in ("n01440764", "n01443537"):
        for i in range(2):
            path = folder / wnid / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory) -> dict[str, Path]:
    """Weights of a classifier, whole; so large that activations overflow; and with NaN in the middle."""
    folder = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    for name, value in (("good", None), ("nan", float("nan")), ("huge", 3e38)):
        changed = {key: w.clone() for key, w in state.items()}
        if value is not None:
            changed["layer3.0.conv1.weight"].fill_(value)
        torch.save(changed, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in ("good", "nan", "huge")}


@pytest.fixture(scope="module")
def broken_model(small_checkpoint, tmp_path_factory) -> Path:
    state = torch.load(small_checkpoint)
    state["middle_block.0.in_layers.2.weight"].fill_(3e38)  # activations overflow
    path = tmp_path_factory.mktemp("models") / "broken.pt"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def samples(data, small_checkpoint, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("samples")
    model = {**SMALL_MODEL, "model_path": small_checkpoint, "timestep_respacing": 4, "num_threads": 1}
    assert call(MAIN, **model, data_dir=data, step_reverse=2, output=output) == 0
    return output


CLASSIFYING = {"classifier_name": "resnet18", "image_size": 32, "num_threads": 1, "num_workers": 0}


def test_statistics(classifiers, data, tmp_path):
    flags = {**CLASSIFYING, "classifier_path": classifiers["huge"], "data_dir": data, "output": tmp_path}
    with pytest.raises(ResultError, match="is NaN or infinite: nothing is recorded") as caught:
        call("classifier_statistics.py", **flags)
    assert caught.value.status == 1 and len(str(caught.value).splitlines()) <= 2
    assert not list(tmp_path.rglob("*.npz"))
    assert call("classifier_statistics.py", **flags | {"classifier_path": classifiers["good"]}) == 0


def test_weights_that_are_not_finite(classifiers, data, tmp_path):
    flags = {**CLASSIFYING, "classifier_path": classifiers["nan"], "data_dir": data, "output": tmp_path}
    with pytest.raises(UserError, match=r"--classifier_path .*nan\.pth is damaged: layer3\.0\.conv1\.weight"):
        call("classifier_statistics.py", **flags)


def test_evaluation(classifiers, data, samples, tmp_path):
    flags = {**CLASSIFYING, "starting_data_dir": data, "data_dir": samples, "output": tmp_path, "time_series": 2}
    flags |= {"normalization": "none", "timestep_respacing": 4}
    with pytest.raises(ResultError, match="the classifier gave NaN or infinity: nothing is recorded"):
        call("evaluate_classifier.py", **flags, classifier_path=classifiers["huge"])
    assert not list(tmp_path.rglob("*.npz"))
    assert call("evaluate_classifier.py", **flags, classifier_path=classifiers["good"]) == 0


def test_the_exit_status_is_1_and_the_message_is_said_once(classifiers, data, tmp_path):
    flags = as_flags({**CLASSIFYING, "classifier_path": classifiers["huge"], "data_dir": data, "output": tmp_path})
    done = run_script(*flags, script="classifier_statistics.py")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1 and "error: a logit of resnet18 is NaN or infinite" in done.stderr


def test_figures_of_logits_that_are_not_finite(classifiers, data, samples, tmp_path):
    """Results of an earlier version, which recorded them."""
    flags = {**CLASSIFYING, "starting_data_dir": data, "data_dir": samples, "output": tmp_path, "time_series": 2}
    flags |= {"normalization": "none", "timestep_respacing": 4, "classifier_path": classifiers["good"]}
    assert call("evaluate_classifier.py", **flags) == 0
    drawing = {"classifier_name": "resnet18", "results": tmp_path, "timestep_respacing": 4}
    assert call("scripts/plot_figures.py", **drawing, output=tmp_path / "figures") == 0
    path = logits_file(str(tmp_path), "resnet18", 2, 4)
    with np.load(path) as f:
        arrays = dict(f)
    arrays["logits_sample"][:] = np.nan
    np.savez(path, **arrays)
    with pytest.raises(ResultError, match=r"logits_resnet18-t_2_4.npz contains NaN or infinity"):
        call("scripts/plot_figures.py", **drawing, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bits_per_dimension(broken_model, small_checkpoint, data, tmp_path, capsys):
    flags = {**SMALL_MODEL, "data_dir": data, "timestep_respacing": 2, "output": tmp_path, "num_threads": 1}
    with pytest.raises(ResultError, match=r"of the images is NaN or infinite: nothing is recorded"):
        call("scripts/image_nll.py", **flags, model_path=broken_model)
    assert not list(tmp_path.rglob("*.npz"))
    assert call("scripts/image_nll.py", **flags, model_path=small_checkpoint) == 0
    # A result of an earlier version is not reported again.
    with np.load(tmp_path / "image_nll.npz") as f:
        arrays = dict(f)
    np.savez(tmp_path / "image_nll.npz", **{**arrays, "total_bpd": arrays["total_bpd"] * np.nan})
    with pytest.raises(ResultError, match=r"total_bpd of .*image_nll\.npz is NaN"):
        call("scripts/image_nll.py", **flags, model_path=small_checkpoint)
    assert "nan" not in capsys.readouterr().err


@pytest.mark.parametrize("script", [MAIN, "scripts/image_sample.py"])
def test_samples(script, broken_model, data, tmp_path):
    flags = {**SMALL_MODEL, "model_path": broken_model, "timestep_respacing": 4, "num_threads": 1, "output": tmp_path}
    flags |= {"data_dir": data, "step_reverse": 2} if script == MAIN else {"num_samples": 2}
    with pytest.raises(ResultError, match="the model gave NaN or infinity") as caught:
        call(script, **flags)
    assert caught.value.status == 1
    assert not list(tmp_path.rglob("*.JPEG")) + list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("nan")])
def test_records_and_tables(value, tmp_path):
    with pytest.raises(ResultError, match=r"a\.json is not written: it would contain NaN or infinity"):
        write_json(str(tmp_path / "a.json"), {"seconds": float(value)})
    with pytest.raises(ResultError, match=r"kept is (nan|inf) in the figure x \(k 3\)"):
        render("x", new_figure(2, 2)[0], [{"k": 3, "kept": value}])
    assert not list(tmp_path.iterdir())
    assert UserError.status == 2
