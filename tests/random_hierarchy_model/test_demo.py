"""The embedded example: the demo as its users run it, and the weights that come with it."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from guided_diffusion import forward_backward
from guided_diffusion.checkpoints import load_model
from guided_diffusion.classifier.figures import style
from guided_diffusion.classifier.networks import open_classifier
from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import noised_image
from guided_diffusion.script_util import diffusion_from_flags, model_and_diffusion_defaults, model_from_flags
from random_hierarchy_model import posterior_mean
from random_hierarchy_model.classifier import enlarge, small_convnext
from random_hierarchy_model.curves import fraction_kept, probability_kept
from random_hierarchy_model.demo import CLASSIFIER, CLASSIFIER_FILE, GRAMMAR_FLAGS, MODEL_FLAGS, UNET_FILE
from random_hierarchy_model.training import images_from_flags

import numpy as np
import pytest
import torch
from conftest import environment, launcher, load_script, run_script
from figure_texts import check_texts
from fork_server import rank_command
from PIL import Image
from torchvision.models.convnext import CNBlock

FLAGS = {**model_and_diffusion_defaults(), **MODEL_FLAGS, "timestep_respacing": "250"}
IMAGES = images_from_flags(GRAMMAR_FLAGS)


# The demo

CLASSES = GRAMMAR_FLAGS["num_symbols"]
COUNT = 16 // CLASSES * CLASSES
TIMES = ["--time_series", "0,4", "10", "20"]
SMALL = ["--num_images", str(COUNT), "--timestep_respacing", "ddim20", "--num_threads", "1", *TIMES]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a small run."""
    output = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    assert load_script("scripts/demo.py").main([*SMALL, "--output", str(output)]) == 0
    torch.set_num_threads(threads)
    return output


def curves(folder: Path) -> dict[tuple[str, int], list[float]]:
    """(curve, k) -> what survives, from the class to the leaves."""
    found: dict[tuple[str, int], list[float]] = {}
    with open(folder / "figures/retention.csv", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["curve"], int(row["k"])), []).append(float(row["kept"]))
    return found


def test_what_the_demo_finds(demo):
    found = curves(demo)
    loops = "exact posterior", "loop, exact denoiser", "loop, U-Net"
    levels = IMAGES.grammar.depth + 1
    for curve in loops:
        assert found[curve, 0] == [1] * levels  # nothing is lost where nothing is noised
        assert len(found[curve, 10]) == levels
        assert found[curve, 4][0] > found[curve, 20][0]  # most is lost where all is noise
        assert found[curve, 4][-1] > found[curve, 10][-1] > found[curve, 20][-1]
    assert found["U-Net, seen by ConvNeXt", 0] == [1]
    # With half of the noise, the two loops meet the same noise: what they make differs little.
    assert np.abs(np.subtract(found[loops[1], 10], found[loops[2], 10])).max() < 0.3
    with open(demo / "figures/retention.csv", newline="") as file:
        chance = [float(row["chance"]) for row in csv.DictReader(file) if (row["curve"], row["k"]) == (loops[0], "20")]
    assert found[loops[0], 20] == pytest.approx(chance)  # pure noise tells nothing
    assert chance[0] == pytest.approx(1 / CLASSES)


def test_what_the_demo_leaves(demo):
    names = "retention", "similarity_against_time", "class_retention", "distributions", "class_transitions", "gallery"
    expected = {f"{name}.{ending}" for name in names for ending in ("png", "pdf", "csv")} | {"transition.json"}
    assert {path.name for path in (demo / "figures").iterdir()} == expected
    samples = sorted((demo / "samples/t_10_20_images").glob("class_*/*.png"))
    assert len(samples) == COUNT
    with Image.open(samples[0]) as image:
        assert image.size == (IMAGES.image_size, IMAGES.image_size)
    with np.load(demo / "classifier/act_stat_small_convnext.npz") as statistics:
        assert (statistics["num_images"], statistics["top1"]) == (512 // CLASSES * CLASSES, 1)


def test_which_leaves_change_together(tmp_path, capsys):
    """In several samples of each image: the U-Net's, and exact ones from the same noised images."""
    flags = [*SMALL, "--time_series", "10", "14", "--num_trajectories", "3", "--output", str(tmp_path)]
    assert load_script("scripts/demo.py").main(flags) == 0
    assert "chi, exact posterior" in capsys.readouterr().out
    with open(tmp_path / "figures/susceptibility.csv", newline="") as file:
        chi = {
            (row["tokens"], row["k"]): [float(row[f"chi{end}"]) for end in ("", "_low", "_high")]
            for row in csv.DictReader(file)
        }
    assert chi.keys() == {(curve, k) for curve in ("loop, U-Net", "exact posterior") for k in ("10", "14")}
    for k in ("10", "14"):
        ours, exact = chi["loop, U-Net", k], chi["exact posterior", k]
        assert ours[1] < exact[2] and exact[1] < ours[2]
    assert chi["exact posterior", "10"][0] > chi["exact posterior", "14"][0] > 1
    with open(tmp_path / "figures/change_correlations.csv", newline="") as file:
        assert {row["r"] for row in csv.DictReader(file)} == {"0", "3", "15", "63"}


def test_correlations_that_are_undefined_are_dashes():
    """Without noise nothing changes; and if one image alone changes, it is in too few resamples for an upper end."""
    script = load_script("scripts/demo.py")
    pairs, none = script.TablePairs(np.array([[0, 3], [3, 0]])), -np.ones((4, 2, 2))
    some = none.copy()
    some[:, 0] = 1
    one = none.copy()
    one[0, 0] = 1
    times = [script.changes_at(k, 20, changes, pairs) for k, changes in ((0, none), (10, some), (5, one))]
    lines = script.table_of_changes({"loop, U-Net": times, "exact posterior": times}).split("\n")
    assert lines[2].split() == ["0.000", "-", "-"] and lines[3].split()[:2] == ["0.500", "2.00"]
    assert lines[4].split() == ["0.250", *2 * ["2.00", "(2.00", "to", "-)"]]
    assert len({len(line) for line in lines[1:5]}) == 1


@pytest.mark.parametrize(("respacing", "last"), [("250", 200), ("50", 40), ("ddim4", 3)])
def test_the_usual_times_follow_the_number_of_steps(monkeypatch, tmp_path, respacing, last):
    script, seen = load_script("scripts/demo.py"), []

    def check_times(*arguments):
        seen.extend(forward_backward.check_times(*arguments))
        raise InterruptedError

    monkeypatch.setattr(script, "check_times", check_times)
    with pytest.raises(InterruptedError):
        script.main(["--timestep_respacing", respacing, "--output", str(tmp_path)])
    assert seen[-1] == last and (respacing != "250" or seen == script.TIMES)


def test_again_and_in_two_processes(demo, tmp_path, monkeypatch, capfd):
    """The same table and the same curves; what is there is not made again."""
    first = run_script(*SMALL, "--output", demo, script="scripts/demo.py")
    assert first.returncode == 0, first.stderr
    assert "  k/N  exact   loop  U-Net  ConvNeXt  exact" in first.stdout
    assert f"0 samples to make, {4 * COUNT} exist already" in first.stderr and "nothing to do" in first.stderr

    script = load_script("scripts/demo.py")
    _, *options, python = script.launcher(2)
    assert (*options, python) == ("-n", "2", sys.executable)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    forked = launcher("mpiexec", 2, rank_command(environment()))
    monkeypatch.setattr(script, "launcher", lambda _: forked)
    assert script.main([*SMALL, "--output", str(tmp_path), "--processes", "2"]) == 0
    second = capfd.readouterr()
    assert second.out.endswith(first.stdout)
    assert "2 process(es) of 1 thread(s)" in second.err
    assert (tmp_path / "figures/retention.csv").read_bytes() == (demo / "figures/retention.csv").read_bytes()


def test_mistakes_of_the_demo(demo, tmp_path, monkeypatch, capsys):
    script = load_script("scripts/demo.py")
    with pytest.raises(UserError, match=rf"^--num_images {COUNT + 1}: expected a multiple of the {CLASSES} classes$"):
        script.main(["--num_images", str(COUNT + 1), "--output", str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"^--time_series 21 is out of range: expected a whole number from 0 to 20"):
        script.main([*SMALL, "--time_series", "21", "--output", str(tmp_path / "none")])
    with pytest.raises(UserError, match="started with other settings"):  # another seed, in a folder with results
        script.main([*SMALL, "--seed", "1", "--output", str(demo)])
    monkeypatch.setattr(script.sys, "executable", "/nowhere/python")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        UserError, match=r'^--processes 2 needs mpiexec, which is not installed: pip install -e "\.\[mpi\]"$'
    ):
        script.main(["--processes", "2", "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


OTHERS = {  # leaves of one pixel, a number of classes that does not divide 64, other depths
    "four levels": {"num_symbols": 6, "num_synonyms": 2, "depth": 4, "patch_size": 1},
    "two levels": {"num_symbols": 4, "num_synonyms": 5, "depth": 2, "patch_size": 1},
}


@pytest.fixture(params=OTHERS)
def other_images(request, monkeypatch):
    """Images of another grammar, with which the example's flags are replaced."""
    for name, value in OTHERS[request.param].items():
        monkeypatch.setitem(GRAMMAR_FLAGS, name, value)
    images = images_from_flags(GRAMMAR_FLAGS)
    for name, value in {"image_size": images.image_size, "channel_mult": "1,1"}.items():
        monkeypatch.setitem(MODEL_FLAGS, name, value)
    return images


def test_the_classifier_has_a_stage_per_level(other_images):
    network, size = small_convnext()[0].eval(), other_images.image_size
    seen = []
    for stage in network.features:
        if isinstance(stage[0], CNBlock):
            stage.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[-1]))
    assert network(enlarge(torch.zeros(1, 3, size, size))).shape == (1, other_images.grammar.num_symbols)
    assert seen == [2**level for level in range(other_images.grammar.depth, -1, -1)]  # leaves first


def test_another_grammar(other_images, tmp_path, monkeypatch, in_this_process):
    """The demo needs no change; the networks have random weights."""
    script = load_script("scripts/demo.py")
    unet = model_from_flags({**model_and_diffusion_defaults(), **MODEL_FLAGS})
    for name, network in (("UNET_FILE", unet), ("CLASSIFIER_FILE", small_convnext()[0])):
        torch.save(network.state_dict(), tmp_path / name)
        monkeypatch.setattr(script, name, tmp_path / name)
    monkeypatch.setattr(script, "STATISTICS_IMAGES", 16)
    levels, classes = other_images.grammar.depth + 1, other_images.grammar.num_symbols
    flags = ["--num_images", str(classes), "--timestep_respacing", "ddim4", "--num_threads", "1", "--time_series"]
    assert script.main([*flags, "0", "2", "--output", str(tmp_path)]) == 0
    found = curves(tmp_path)
    assert found["exact posterior", 0] == found["loop, U-Net", 0] == found["loop, exact denoiser", 0] == [1] * levels
    assert len(found["exact posterior", 2]) == levels
    assert len(list((tmp_path / "images").glob("class_*/*.png"))) == 16 // classes * classes
    assert script.create_argparser().parse_args([]).num_images == 64 // classes * classes


@pytest.mark.parametrize("levels", [3, 4, 5, 6])
def test_the_figure_of_all_levels(levels):
    """The exact posterior as a line and the U-Net as markers, a colour per level; and a panel for each level."""
    script = load_script("scripts/demo.py")
    names = ["class", *(f"level {level}" for level in range(levels - 2, 0, -1)), "leaves"]
    rows = [
        {"k/N": k / 4, "curve": curve, "level": name, "kept": 1 - k / (5 + i), "error": 0.01, "chance": 0.1}
        for k in range(5)
        for curve in (script.EXACT, script.LOOP, script.UNET)
        for i, name in enumerate(names)
    ]
    with style():
        figure, _ = script.draw(rows)
        check_texts(figure)
    together = figure.axes[0]
    assert [axes.get_title() for axes in figure.axes] == ["all levels", *names]
    assert [text.get_text() for text in together.get_legend().get_texts()] == names
    exact = [line for line in together.lines if len(line.get_xdata()) == 5 and line.get_linestyle() == "-"]
    samples = [bars.lines[0] for bars in together.containers]
    for i, (line, markers) in enumerate(zip(exact, samples, strict=True)):
        expected = [1 - k / (5 + i) for k in range(5)]
        assert list(line.get_ydata()) == list(markers.get_ydata()) == expected
        assert line.get_color() == markers.get_color()
        assert not markers.get_clip_on()  # whole at the ends of the time axis
    assert len({str(line.get_color()) for line in exact}) == levels


# The weights


@pytest.fixture(scope="module")
def unet():
    return load_model(str(UNET_FILE), FLAGS).eval()


def some_images(count: int):
    """Images that training did not see, and their symbols."""
    classes = np.arange(count) % IMAGES.grammar.num_symbols
    symbols = [torch.from_numpy(s) for s in IMAGES.grammar.sample(count, 2**40, classes=classes)]
    return IMAGES.render(symbols[0]), symbols


def test_the_weights_are_small():
    assert UNET_FILE.stat().st_size + CLASSIFIER_FILE.stat().st_size < 12e6


def test_the_classifier_reads_the_class():
    classifier = open_classifier(CLASSIFIER, str(CLASSIFIER_FILE), image_size=IMAGES.image_size)
    x, symbols = some_images(1000)
    pixels = ((x + 1) * 127.5).permute(0, 2, 3, 1).round().byte().numpy()
    with torch.inference_mode():
        logits = torch.cat(
            [classifier.model(torch.stack([*map(classifier.preprocess, p)])) for p in (pixels[:500], pixels[500:])]
        )
    assert (logits.argmax(1) == symbols[-1][:, 0]).double().mean() > 0.99


@pytest.mark.parametrize(
    ("t", "bound"),
    [(100, 0.0005), (300, 0.0015), (400, 0.015), (450, 0.02), (500, 0.014), (600, 0.002), (900, 0.0001)],
)
def test_the_u_net_is_near_the_best_denoiser(unet, t, bound):
    """The mean squared error towards the exact posterior mean, whose own square is 1 without noise."""
    diffusion = diffusion_from_flags({**FLAGS, "timestep_respacing": ""})
    x, _ = some_images(128)
    at = torch.full((128,), t)
    x_t = diffusion.q_sample(x, at, torch.randn(x.shape, generator=torch.Generator().manual_seed(t)))
    with torch.inference_mode():
        error = (unet(x_t, at) - posterior_mean(IMAGES, x_t, float(diffusion.alphas_cumprod[t]))).square().mean()
    assert error < bound


def test_the_u_net_loses_what_is_lost_in_truth(unet):
    """Half of the time back, at the transition: 64 images against the exact posterior at the same noised images."""
    diffusion = diffusion_from_flags(FLAGS)
    x, symbols = some_images(64)
    k, generator = 125, torch.Generator().manual_seed(0)
    x_k = noised_image(diffusion, x, k, torch.randn(x.shape, generator=generator))
    with torch.inference_mode():
        back = diffusion.p_sample_loop_forw_back(unet, x.shape, k, noise=x_k, generator=generator)
    exact = probability_kept(IMAGES, x_k, float(diffusion.alphas_cumprod[k - 1]), symbols)
    difference = fraction_kept(IMAGES, back, symbols) - exact  # (B, L + 1), the class first
    error = difference.std(0) / 8
    assert abs(difference[:, 0].mean()) < 0.10 + 2 * error[0]
    assert abs(difference[:, -1].mean()) < 0.05 + 2 * error[-1]
