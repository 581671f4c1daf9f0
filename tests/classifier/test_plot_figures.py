"""The figures, from synthetic results with a known transition."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from pathlib import Path

from guided_diffusion.classifier.figures import shortened, style, text_width, wrapped
from guided_diffusion.classifier.results import differences_file, logits_file
from guided_diffusion.classifier.ridgeline import PEAK
from guided_diffusion.errors import UserError

import numpy as np
import pytest
from conftest import REPOSITORY, load_script, run_python
from figure_texts import check_texts
from PIL import Image

script = load_script("scripts/plot_figures.py")
FIGURES = ("similarity_against_time", "class_retention", "distributions", "gallery", "class_transitions")
SEVERAL = ("class_agreement", "class_entropy")  # of several samples of each image


def write_results(folder: Path, times, num_images=400, num_layers=41, labels=True, num_samples=1) -> Path:
    """Results of which the class is lost at k/N = 0.55, in the documented format."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.repeat([f"n{i % 10:08d}/image_{i:04d}.JPEG" for i in range(num_images)], num_samples)
    pairs = {"names": names}
    if num_samples > 1:
        pairs["trajectories"] = np.arange(len(names)) % num_samples + 1
    layers = np.array([*(f"features.{i}" for i in range(num_layers - 1)), "classifier"])
    true = np.repeat(np.arange(num_images) % 20, num_samples)
    num_images *= num_samples
    depth, start = np.linspace(0, 1, num_layers), 8 * np.eye(20, dtype=np.float32)[true]
    for k in times:
        rng, kept_part = np.random.default_rng(k), 1 / (1 + np.exp((k / 250 - 0.55) / 0.05))
        cosine = (
            (1 - depth) * (1 - 0.7 * k / 250) + depth * kept_part + 0.03 * rng.normal(size=(num_images, num_layers))
        )
        cosine = np.clip(cosine, -1, 1)
        predicted = np.where(rng.random(num_images) < kept_part, true, (true + 7) % 20)
        about = {**pairs, "layers": layers, "cosine": cosine, "L2": cosine, "L2_normalized": cosine}
        np.savez(differences_file(str(folder), "convnext_base", k, 250), **about)
        logits = 8 * np.eye(20, dtype=np.float32)[predicted]
        known = true if labels else np.full(num_images, -1)
        arrays = {**pairs, "labels": known, "logits_start": start, "logits_sample": logits}
        np.savez(logits_file(str(folder), "convnext_base", k, 250), **arrays)
    return folder


def write_several(folder: Path, times, alike=False) -> Path:
    """Results of 30 images with four samples of each; `alike` repeats the first sample of each."""
    write_results(folder, times, 30, num_layers=3, num_samples=4)
    for path in folder.glob("*.npz") if alike else ():
        arrays = dict(np.load(path))
        for name in arrays.keys() - {"trajectories", "layers"}:
            arrays[name] = np.repeat(arrays[name][::4], 4, axis=0)
        np.savez(path, **arrays)
    return folder


def write_images(folder: Path, times, count=8) -> list[str]:
    """The first starting images and their samples, as the main script writes them; returns the flags."""
    for i, k in itertools.product(range(count), [None, *times]):
        name = f"n{i % 10:08d}/image_{i:04d}"
        path = folder / ("start" if k is None else f"out/t_{k}_250_images")
        path = path / (f"{name}.JPEG" if k is None else f"{name}_t{k * 4:04d}.JPEG")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i, k or 0, 90)).save(path)
    return ["--starting_data_dir", str(folder / "start"), "--data_dir", str(folder / "out")]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


TIMES = range(25, 251, 25)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder of results, flags, folder of figures)."""
    folder = tmp_path_factory.mktemp("figures")
    results = write_results(folder / "results", TIMES)
    flags = ["--results", str(results), *write_images(folder, TIMES), "--gallery", "image_0003", "image_0001.JPEG"]
    assert script.main([*flags, "--output", str(folder / "figures")]) == 0
    return results, flags, folder / "figures"


def test_files_and_sizes(drawn):
    figures = drawn[2]
    expected = {f"{name}.{ending}" for name in FIGURES for ending in ("png", "pdf", "csv")} | {"transition.json"}
    assert {path.name for path in figures.iterdir()} == expected
    for name, width in zip(FIGURES, (3.4, 3.4, 7.0, 7.0, 7.0), strict=True):
        with Image.open(figures / f"{name}.png") as image:
            assert image.width == round(300 * width) and image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert (figures / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_same_again(drawn, tmp_path):
    script.main([*drawn[1], "--output", str(tmp_path)])
    for path in drawn[2].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_transition_is_found(drawn):
    found = json.loads((drawn[2] / "transition.json").read_text())
    assert found["low"] <= 0.55 <= found["high"] and found["high"] - found["low"] < 0.04
    assert found["images"] == 400


@pytest.mark.parametrize(
    ("resolved", "on_fall", "words"),
    [
        (True, 3, "over a width of 0.0100"),
        (False, 0, "The whole fall is between two times: add times there to resolve it"),
        (False, 1, "A single time lies on the fall: add times there to resolve it"),
        (False, 2, "The fall is steep for the distance between times: add times there to resolve it"),
    ],
)
def test_what_is_said_of_the_transition(resolved, on_fall, words):
    transition = script.Transition(0.5, 0.1, 0.4, 0.6, 0.01, 1.0, 0.1, resolved, on_fall)
    assert script.describe(transition, 5).endswith(words)


def test_points_are_those_of_the_results(drawn):
    results, _, figures = drawn
    rows = read_csv(figures / "similarity_against_time.csv")
    assert len(rows) == 41 * len(TIMES)
    for row in rows[::37]:
        cosine = np.load(differences_file(str(results), "convnext_base", int(row["k"]), 250))["cosine"]
        values = cosine[:, int(row["depth"])]
        first, middle, third = np.percentile(values, [25, 50, 75])
        columns = ("mean", "median", "quartile_1", "quartile_3", "k/N")
        expected = (values.mean(), middle, first, third, int(row["k"]) / 250)
        assert [float(row[column]) for column in columns] == pytest.approx(expected, abs=1e-12)
        assert first - 0.01 < float(row["mode"]) < third + 0.01
    for row in read_csv(figures / "class_retention.csv"):
        arrays = np.load(logits_file(str(results), "convnext_base", int(row["k"]), 250))
        order = np.argsort(-arrays["logits_sample"], axis=1, kind="stable")
        if row["measure"] == "predicted class kept":
            expected, chance = order[:, 0] == arrays["logits_start"].argmax(1), 1 / 20
        elif row["measure"].endswith("top 1"):
            expected, chance = order[:, 0] == arrays["labels"], 1 / 20
        else:
            continue  # logits of equal size have no order
        assert (float(row["fraction"]), float(row["chance"])) == pytest.approx((expected.mean(), chance))
        assert float(row["low"]) <= expected.mean() <= float(row["high"]) + 1e-12
    counts = {}
    for row in read_csv(figures / "distributions.csv"):
        counts[row["layer"], row["k"]] = counts.get((row["layer"], row["k"]), 0) + int(row["images"])
    assert len(counts) == 3 * len(TIMES) and set(counts.values()) == {400}
    names = [row["name"] for row in read_csv(figures / "gallery.csv")]
    assert names == ["n00000003/image_0003.JPEG"] * 11 + ["n00000001/image_0001.JPEG"] * 11


@pytest.mark.parametrize("times", [(125,), (75, 140, 225), range(50, 251, 50), TIMES, range(0, 251, 10)], ids=len)
def test_no_text_overlaps_or_leaves_the_figure(tmp_path, times):
    flags = write_images(tmp_path, times)
    series = script.find_series(str(write_results(tmp_path, times, num_images=40)), "convnext_base", 250)
    names = series[0].differences["names"].tolist()[:3]
    several = script.find_series(str(write_several(tmp_path / "several", times)), "convnext_base", 250)
    with style():
        drawn = [
            script.draw_similarity(series, "mean"),
            script.draw_retention(*script.measure_retention(series), series),
            script.draw_distributions(script.evenly_spaced(series, 25), 40),
            script.draw_gallery(script.evenly_spaced(series, 10), names, flags[1], flags[3]),
            script.draw_class_transitions(script.evenly_spaced(series, 10)),
            *(draw(several) for draw in (script.draw_agreement, script.draw_entropy)),
        ]
        for figure, _ in drawn:
            check_texts(figure)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_long_names_of_layers_fit(tmp_path, num_layers):
    folder = write_results(tmp_path, (75, 140), num_images=40, num_layers=num_layers)
    long = [f"backbone_feature_extractor.stage{i}_residual_block_with_squeeze_excitation" for i in range(num_layers)]
    for path in folder.glob("act_diff*.npz"):
        np.savez(path, **{**np.load(path), "layers": np.array(long)})
    series = script.find_series(str(folder), "convnext_base", 250)
    with style():
        for figure, _ in (script.draw_similarity(series, "mean"), script.draw_distributions(series, 40)):
            check_texts(figure)


def test_names_that_do_not_fit_are_wrapped_or_shortened():
    with style():
        assert wrapped("features.1.0", 2) == shortened("features.1.0", 2) == "features.1.0"
        assert wrapped("features.1.0", 0.5) == "features.\n1.0"
        short = shortened("encoder.layers.encoder_layer_11.self_attention", 1)
        assert short.startswith("encoder") and "…" in short and short.endswith("tion") and text_width(short) <= 1
        assert all(text_width(line) <= 1 for line in wrapped("a" * 40 + ".b", 1).split("\n"))


def test_one_time_fills_the_page(tmp_path):
    series = script.find_series(str(write_results(tmp_path, (125,), num_images=40)), "convnext_base", 250)
    with style():
        figure, _ = script.draw_class_transitions(series)
        check_texts(figure)
    panel = figure.axes[0].get_window_extent()
    assert panel.width == pytest.approx(panel.height) and panel.width > 0.5 * figure.bbox.width
    assert panel.x0 < 0.25 * figure.bbox.width


def test_several_samples_of_one_or_two_images(tmp_path):
    for count in (1, 2):
        results = write_results(tmp_path / str(count), (50, 100, 150, 200), count, num_layers=3, num_samples=6)
        assert script.main(["--results", str(results), "--output", str(results / "figures")]) == 0
        for row in read_csv(results / "figures/class_entropy.csv"):
            assert 0 <= float(row["low"]) <= float(row["entropy"]) <= float(row["high"])
        for row in read_csv(results / "figures/similarity_against_time.csv") if count == 1 else ():
            assert row["mode_low"] == row["mode"] == row["mode_high"]


def test_distributions_have_a_row_for_each_time(tmp_path):
    """Early times on top, a histogram of the images in each row, with equal peaks that reach into the row above."""
    from matplotlib.patches import StepPatch

    series = script.find_series(str(write_results(tmp_path, TIMES, num_images=40)), "convnext_base", 250)
    with style():
        figure, rows = script.draw_distributions(series, 20)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    assert layers == ["features.0", "features.20", "classifier"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"{k / 250:.3g}" for k in TIMES]
    for layer, axes in zip(layers, figure.axes, strict=True):
        filled = [patch.get_data() for patch in axes.findobj(StepPatch) if patch.get_fill()]
        assert [patch.baseline for patch in filled] == axes.get_yticks().tolist() == [-i for i in range(10)]
        for k, patch in zip(TIMES, filled, strict=True):
            counts = np.array([row["images"] for row in rows if (row["layer"], row["k"]) == (layer, k)])
            assert patch.values - patch.baseline == pytest.approx(PEAK * counts / counts.max())
    assert 1 < PEAK < 2


def test_the_top_five_of_five_classes_are_not_plotted(tmp_path):
    series = script.find_series(str(write_results(tmp_path, TIMES, num_images=40)), "convnext_base", 250)
    for classes, measures in ((6, 3), (5, 2)):
        for result in series:
            for name in ("logits_start", "logits_sample"):
                result.logits[name] = result.logits[name][:, :classes]
        assert len({row["measure"] for row in script.measure_retention(series)[0]}) == measures


def test_of_many_times_some_are_shown(tmp_path, capsys):
    times = range(0, 251, 10)
    flags = ["--results", str(write_results(tmp_path, times, num_images=20, num_layers=3))]
    flags += [*write_images(tmp_path, times), "--gallery", "image_0002", "--output", str(tmp_path / "out")]
    assert script.main(flags) == 0
    shown = [str(k) for k in (0, 30, 60, 80, 110, 140, 170, 190, 220, 250)]
    assert [row["k"] for row in read_csv(tmp_path / "out/gallery.csv")] == ["", *shown]
    assert len({row["k"] for row in read_csv(tmp_path / "out/distributions.csv")}) == 25
    assert len({row["k"] for row in read_csv(tmp_path / "out/similarity_against_time.csv")}) == 26
    said = capsys.readouterr().err
    assert "gallery: 10 of the 26 times are shown" in said and "distributions: 25 of the 26 times are shown" in said


def test_unknown_labels_a_layer_without_values_and_no_gallery(tmp_path, capsys):
    results = write_results(tmp_path / "results", (50, 200), num_images=20, num_layers=3, labels=False)
    path = differences_file(str(results), "convnext_base", 50, 250)
    arrays = dict(np.load(path))
    arrays["cosine"][:, 1] = np.nan
    np.savez(path, **arrays)
    for statistic in ("max", "mean", "median"):
        script.main(["--results", str(results), "--output", str(tmp_path / "out"), "--statistic", statistic])
    said = capsys.readouterr().err
    assert "no gallery" in said and "no transition: the fit needs at least 3 times, and there are 2" in said
    assert {row["measure"] for row in read_csv(tmp_path / "out/class_retention.csv")} == {"predicted class kept"}
    rows = read_csv(tmp_path / "out/similarity_against_time.csv")
    assert (rows[1]["images"], rows[1]["mode"]) == ("0", "") and rows[0]["images"] == "20"
    assert json.loads((tmp_path / "out/transition.json").read_text()) is None
    assert not (tmp_path / "out/gallery.png").exists()


def other_images(folder):
    write_results(folder, [200], num_images=19)


def other_layers(folder):
    write_results(folder, [200], num_images=20, num_layers=4)


def damage(folder):
    Path(differences_file(str(folder), "convnext_base", 200, 250)).write_bytes(b"PK\x03\x04 no archive")


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (None, ["--results", "nowhere"], r"nowhere does not exist; expected files .* \(--results\)"),
        (None, ["--classifier_name", "resnet50"], "no results of resnet50"),
        (None, ["--timestep_respacing", "100"], r"no results for N = 100, only for N = 250 \(--timestep_respacing\)"),
        (None, ["--timestep_respacing", ""], r"no results for N = 1000, only for N = 250 \(--timestep"),
        (None, ["--timestep_respacing", "soon"], "--timestep_respacing soon: expected a whole number of steps"),
        (damage, [], "damaged"),
        (other_images, [], r"different images \(20 and 19\)"),
        (other_layers, [], r"different layers \(3 and 4\)"),
        (None, ["--output", "results/file"], "^--output results/file: results/file is a file, expected a folder$"),
        (
            None,
            ["--output", "results/file/figures"],
            "^--output results/file/figures: results/file is a file, expected",
        ),
        (None, ["--data_dir", "x"], "needs both --starting_data_dir and --data_dir"),
        (
            None,
            ["--starting_data_dir", "start", "--data_dir", "x", "--gallery", "image_003"],
            "--gallery image_003: none",
        ),
        (None, ["--starting_data_dir", "start", "--data_dir", "x"], "does not exist"),
        (
            None,
            ["--starting_data_dir", ".", "--data_dir", "x"],
            r"the figures would be written to 'figures' \(--output\), which is inside '\.' \(--starting_data_dir\)",
        ),
    ],
)
def test_mistakes(tmp_path, monkeypatch, change, flags, words):
    """They are told in words, and the figures that are there stay as they are."""
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path / "results", (50, 200), num_images=20, num_layers=3)
    (tmp_path / "results/file").touch()
    if change:
        change(tmp_path / "results")
    with pytest.raises(UserError, match=words):
        script.main(["--results", "results", *flags])
    assert not (tmp_path / "figures").exists()


def write_records(folder, times, **entries):
    for k in times:
        path = Path(differences_file(str(folder), "convnext_base", k, 250)).with_suffix(".json")
        path.write_text(json.dumps({"settings": {"normalization": "std"}, "finished": True, **entries}))


def test_times_of_other_settings_are_not_joined(tmp_path):
    folder = write_results(tmp_path / "results", (50, 100, 200), num_images=20, num_layers=3)
    settings = {"classifier_digest": "0" * 64, "normalization": "std"}
    write_records(folder, (50,), settings={**settings, "samples_digest": "1" * 64})
    write_records(folder, (200,), settings={**settings, "samples_digest": "2" * 64})
    assert len(script.find_series(str(folder), "convnext_base", 250)) == 3
    for change, words in (
        ({"normalization": "none"}, "from k = 50 of N = 250 to k = 200 of N = 250, --normalization was std and is now"),
        (
            {"classifier_digest": "3" * 64},
            r"the classifier's weights \(--classifier_path\) was 000000000000... and is n",
        ),
    ):
        write_records(folder, (200,), settings={**settings, **change})
        with pytest.raises(UserError, match=words) as error:
            script.find_series(str(folder), "convnext_base", 250)
        assert str(error.value).count("\n") == 1


def test_an_image_that_one_time_lacks_is_named(tmp_path):
    """With the way to repair it, if its files were unreadable."""
    folder = write_results(tmp_path / "results", (50, 100), num_images=20, num_layers=3)
    write_results(folder, (200,), num_images=19, num_layers=3)
    with pytest.raises(UserError, match=r"different images \(20 and 19\)"):
        script.find_series(str(folder), "convnext_base", 250)
    write_records(folder, (200,), images={"chosen": 20, "unreadable": {"n00000009/image_0019.JPEG": "broken"}})
    with pytest.raises(UserError, match=r"act_diff_convnext_base-t_200_250.npz lacks samples of 1 images.*image_0019"):
        script.find_series(str(folder), "convnext_base", 250)


@pytest.mark.parametrize("last", ["classifier", "projection"])
def test_which_layer_is_the_logits_is_on_record(tmp_path, last):
    """A hidden layer may be called classifier.0, and the last one by any name."""
    folder = write_results(tmp_path / "results", (50, 200), num_images=20, num_layers=3)

    def labels():
        with style():
            figure, _ = script.draw_similarity(script.find_series(str(folder), "convnext_base", 250), "mean")
        return figure.axes[0].get_legend_handles_labels()[1], len(figure.axes)

    for path in folder.glob("act_diff*.npz"):
        arrays = dict(np.load(path))
        arrays["layers"] = np.array(["features.0", "features.1", last])
        np.savez(path, **arrays)
    assert labels() == ((["logits"] if last == "classifier" else []), 2)  # a guess
    write_records(folder, (50, 200), logits_layers=["projection"])
    assert labels() == ((["logits"] if last == "projection" else []), 2)
    for path in folder.glob("act_diff*.npz"):
        arrays = dict(np.load(path))
        np.savez(path, **{n: a[..., -1:] if n not in ("names", "trajectories") else a for n, a in arrays.items()})
    assert labels() == (["logits" if last == "projection" else last], 1)  # one layer needs no bar of colours


@pytest.mark.parametrize(
    ("respacing", "steps"),
    [("250", 1000), ("ddim250", 1000), ("", 250), ("100,150", 1000)],
)
def test_steps_are_given_as_to_the_main_script(tmp_path, respacing, steps):
    write_results(tmp_path / "results", (50, 200), num_images=20, num_layers=3)
    flags = ["--results", str(tmp_path / "results"), "--output", str(tmp_path / "figures")]
    flags += ["--timestep_respacing", respacing, "--diffusion_steps", str(steps)]
    assert script.main(flags) == 0
    assert (tmp_path / "figures/class_retention.csv").exists()


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_without_a_package(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    with pytest.raises(UserError, match=rf'^figures need {package}: pip install -e "\.\[figures\]"$'):
        script.main([])


def test_the_help_needs_neither_package():
    code = "import runpy, sys; sys.modules |= dict.fromkeys(['matplotlib', 'scipy']); sys.argv[1:] = ['--help']; "
    code += "runpy.run_path('scripts/plot_figures.py', run_name='__main__')"
    done = run_python("-c", code, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "") and "--gallery_count" in done.stdout


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """(results, figures): of 4 samples of each of 30 images, and of the same sample four times."""
    folder = tmp_path_factory.mktemp("several")
    for name in ("apart", "alike"):
        results = write_several(folder / name / "results", TIMES, alike=name == "alike")
        assert script.main(["--results", str(results), "--output", str(folder / name / "figures")]) == 0
    first = folder / "once/results"
    first.mkdir(parents=True)
    for path in (folder / "alike/results").glob("*.npz"):
        arrays = dict(np.load(path))
        del arrays["trajectories"]
        np.savez(first / path.name, **{n: a if n == "layers" else a[::4] for n, a in arrays.items()})
    assert script.main(["--results", str(first), "--output", str(folder / "once/figures")]) == 0
    return folder


def test_figures_of_several_samples(several):
    expected = {f"{n}.{e}" for n in (*FIGURES[:3], FIGURES[4], *SEVERAL) for e in ("png", "pdf", "csv")}
    assert {path.name for path in (several / "apart/figures").iterdir()} == expected | {"transition.json"}
    assert {path.name for path in (several / "once/figures").iterdir()} == {
        name for name in expected if not name.startswith(SEVERAL)
    } | {"transition.json"}


def test_copies_of_a_sample_make_nothing_more_certain(several):
    """With four equal samples of each image, all values and errors are those of one."""
    for name in ("similarity_against_time", "class_retention"):
        alike, once = (read_csv(several / run / f"figures/{name}.csv") for run in ("alike", "once"))
        for row, expected in zip(alike, once, strict=True):
            assert row["images"] == expected["images"] and int(row.pop("samples")) == 4 * int(row["images"])
            if name == "class_retention":
                assert int(row.pop("count")) == 4 * int(expected.pop("count"))
            for column in expected.keys() & {"mean", "mean_low", "mean_high", "median", "fraction", "low", "high"}:
                assert float(row[column]) == pytest.approx(float(expected[column]), abs=1e-12), column
            for column in expected.keys() & {"mode_low", "mode_high", "median_low", "median_high"}:
                assert float(row[column]) == pytest.approx(float(expected[column]), abs=0.05), column
    alike, once = (json.loads((several / run / "figures/transition.json").read_text()) for run in ("alike", "once"))
    assert alike == pytest.approx(once) and alike["images"] == 30


def test_the_classes_of_samples(several):
    results = several / "apart/results"
    agreements, entropies = (read_csv(several / f"apart/figures/{name}.csv") for name in SEVERAL)
    transitions = read_csv(several / "apart/figures/class_transitions.csv")
    for k, agreement, entropy in zip(TIMES, agreements, entropies, strict=True):
        arrays = np.load(logits_file(str(results), "convnext_base", k, 250))
        starts, samples = arrays["logits_start"][::4].argmax(1), arrays["logits_sample"].argmax(1).reshape(30, 4)
        same = [np.mean([a == b for a, b in itertools.combinations(own, 2)]) for own in samples.tolist()]
        assert float(agreement["same_class"]) == pytest.approx(np.mean(same))
        others = [a == b for one, two in itertools.combinations(samples.tolist(), 2) for a in one for b in two]
        assert float(agreement["same_class_of_two_images"]) == pytest.approx(np.mean(others))
        assert float(agreement["low"]) <= np.mean(same) <= float(agreement["high"])
        plain, corrected = [], []
        for own in samples.tolist():
            f = np.array([own.count(c) / 4 for c in set(own)])
            plain.append(-(f * np.log(f)).sum())
            corrected.append(plain[-1] + (len(f) - 1) / 8)
        assert float(entropy["uncorrected"]) == pytest.approx(np.mean(plain))
        assert float(entropy["entropy"]) == pytest.approx(np.mean(corrected))
        assert float(entropy["largest"]) == pytest.approx(np.log(4) + 3 / 8)
        matrix = np.zeros((20, 20))
        np.add.at(matrix, (np.repeat(starts, 4), samples.ravel()), 1)
        found = np.zeros((20, 20))
        for row in transitions:
            if int(row["k"]) == k:
                found[int(row["class_start"]), int(row["class_sample"])] = float(row["samples"])
                assert float(row["fraction"]) == found[int(row["class_start"]), int(row["class_sample"])] / (
                    matrix[int(row["class_start"])].sum()
                )
        assert (found == matrix).all()


def test_times_may_differ_in_their_number_of_samples(tmp_path, capsys):
    """Some times extended: class_agreement has these only."""
    results = write_several(tmp_path / "results", (100, 150))
    write_results(results, (50, 200), num_images=30, num_layers=3)
    assert script.main(["--results", str(results), "--output", str(tmp_path / "figures")]) == 0
    assert "30 images at k = 50, 100, 150, 200" in capsys.readouterr().err
    kept = read_csv(tmp_path / "figures/class_retention.csv")
    assert [row["samples"] for row in kept if row["measure"] == "predicted class kept"] == ["30", "120", "120", "30"]
    assert [row["k"] for row in read_csv(tmp_path / "figures/class_agreement.csv")] == ["100", "150"]
    path = logits_file(str(results), "convnext_base", 100, 250)
    for file in (path, differences_file(str(results), "convnext_base", 100, 250)):
        arrays = dict(np.load(file))
        np.savez(file, **{name: array if name == "layers" else array[1:] for name, array in arrays.items()})
    with pytest.raises(UserError, match=r"lacks samples of 1 images, .* read: 'n00000000/image_0000.JPEG'.\nRerun"):
        script.main(["--results", str(results), "--output", str(tmp_path / "figures")])


def test_a_thousand_classes_are_shown_in_blocks():
    from guided_diffusion.classifier.class_figures import block_matrix

    starts, samples = np.array([0, 9, 999]), np.array([[3, 999], [9, 500], [999, 999]])
    matrix = block_matrix(starts, samples, 1000)
    assert matrix.shape == (100, 100)
    assert (matrix[0, 0], matrix[0, 99], matrix[0, 50], matrix[99, 99]) == (0.5, 0.25, 0.25, 1)
    assert np.isnan(matrix[1:99]).all() and matrix[0].sum() == 1
    assert block_matrix(np.array([2]), np.array([[0]]), 3).tolist()[2] == [1, 0, 0]
