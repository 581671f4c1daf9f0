"""scripts/change_correlations.py and its figures as users run them: real images, real processes, really killed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from guided_diffusion.changes.figures import draw_correlations, figures_of
from guided_diffusion.changes.results import changes_file, read_changes
from guided_diffusion.changes.statistics import changes_at
from guided_diffusion.classifier.figures import style
from guided_diffusion.correlations import TablePairs, correlation_function, covariances, susceptibility
from guided_diffusion.errors import UserError
from random_hierarchy_model import Grammar

import numpy as np
import pytest
import torch
from conftest import as_flags, load_script, run_script, start_script
from figure_texts import check_texts
from PIL import Image
from torch import nn

script = load_script("scripts/change_correlations.py")
plot = load_script("scripts/plot_figures.py")
pytestmark = pytest.mark.usefixtures("in_this_process")

SIZE, NUM_STEPS, TIMES, SAMPLES = 8, 20, (5, 10), 4
NAMES = ["a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png"]


def pixels(rng, size=SIZE):
    return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)


def blurred(start, strength, rng):
    """A sample: the start with correlated noise."""
    noise = rng.normal(size=(*start.shape[:2], 3))
    noise += np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + rng.normal()
    return (start + strength * noise).clip(0, 255).astype(np.uint8)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """starts/ and out/, with four samples of each start at two times; one start never changes. Not to be changed."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in NAMES:
        start = pixels(rng)
        write(folder / "starts" / name, start)
        for k in TIMES:
            for j in range(1, SAMPLES + 1):
                sample = start if name == "b/2.png" else blurred(start, k, rng)
                write(folder / "out" / sample_name(name, k, j), sample)
        write(folder / "out" / f"t_5_20_images/{name[:-4]}_t0250_u02.png", pixels(rng))  # a second turn
    write(folder / "starts" / "unused.png", pixels(rng))
    return folder


def sample_name(name: str, k: int, j: int) -> str:
    return f"t_{k}_20_images/{name[:-4]}_t{50 * k:04d}{'' if j == 1 else f'_s{j:03d}'}.png"


def flags(data: Path, **changes) -> dict:
    folders = {"starting_data_dir": data / "starts", "data_dir": data / "out", "time_series": "5,10"}
    steps = {"timestep_respacing": NUM_STEPS, "image_size": SIZE}
    return {**folders, **steps, "num_threads": 1, "num_workers": 0, **changes}


def run(data: Path, output: Path, *words: str, **changes) -> int:
    return script.main([*as_flags(flags(data, output=output, **changes)), *words])


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory) -> Path:
    """The results of one process; not to be changed."""
    output = tmp_path_factory.mktemp("results") / "pixels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guided_diffusion.dist_util.setup_dist", lambda _: None)
        assert run(data, output, "--spectra") == 0
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """Results without what records a run."""
    ends = (".npz", "_inputs.json", ".csv")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.endswith(ends)}


def arrays(folder: Path, name="pixels", k=5) -> dict[str, np.ndarray]:
    with np.load(changes_file(str(folder), name, k, NUM_STEPS)) as file:
        return dict(file)


def direct_changes(data: Path, k: int) -> np.ndarray:
    """Changes of pixels (starts, samples, 8, 8)."""
    read = lambda path: np.asarray(Image.open(path)) / 127.5 - 1  # noqa: E731
    starts = np.stack([read(data / "starts" / name) for name in NAMES])
    samples = [[read(data / "out" / sample_name(name, k, j)) for j in range(1, SAMPLES + 1)] for name in NAMES]
    return np.linalg.norm(np.array(samples) - starts[:, None], axis=-1)


@pytest.mark.parametrize("k", TIMES)
def test_pixels_against_a_direct_computation(data, measured, k):
    found, changes = arrays(measured, k=k), direct_changes(data, k)
    flat = changes.reshape(len(NAMES), SAMPLES, -1)
    y, x = np.divmod(np.arange(SIZE**2), SIZE)
    squared, c = correlation_function(covariances(flat), (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2)
    assert found["names"].tolist() == NAMES and found["samples"].tolist() == [SAMPLES] * 5
    assert found["distance"] == pytest.approx(np.sqrt(squared))
    assert found["correlation"] == pytest.approx(c, abs=1e-6) and found["change"] == pytest.approx(flat.mean((1, 2)))
    assert found["change_map"] == pytest.approx(changes.mean(1), abs=1e-6)
    assert found["chi_numerator"][3] == found["chi_denominator"][3] == 0
    (row,) = (row for row in rows_of(measured / "susceptibility_pixels.csv") if row["k"] == str(k))
    assert float(row["chi"]) == pytest.approx(susceptibility(flat), rel=1e-5)
    assert float(row["chi_low"]) < float(row["chi"]) < float(row["chi_high"])


def test_spectra_against_a_direct_computation(data, measured):
    found = arrays(measured)
    assert (found["spectrum_change"] * found["modes"]).sum(1) / SIZE**2 == pytest.approx(
        (direct_changes(data, 5) ** 2).mean((1, 2, 3)) / 3, abs=1e-6
    )
    start = np.asarray(Image.open(data / "starts" / NAMES[0])) / 127.5 - 1
    power = (np.abs(np.fft.fft2(start, axes=(0, 1))) ** 2).mean(-1) / SIZE**2
    assert found["spectrum_start"][0, 0] == pytest.approx(power[0, 0], rel=1e-5)
    at_1 = [power[0, 1], power[1, 0], power[0, -1], power[-1, 0]]
    assert found["spectrum_start"][0, 1] == pytest.approx(np.mean(at_1), rel=1e-5)
    assert found["wavenumber"][1] == 1 and found["modes"][1] == 4


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_half_of_the_pairs_by_name(data, measured, tmp_path):
    output = shutil.copytree(measured, tmp_path / "results")
    assert run(data, output, "--spectra", convention="half") == 0
    whole, half = rows_of(measured / "susceptibility_pixels.csv"), rows_of(output / "susceptibility_pixels.csv")
    for a, b in zip(whole, half, strict=True):
        assert (a["convention"], b["convention"]) == ("all", "half")
        for end in ("", "_low", "_high"):
            assert float(b[f"chi{end}"]) == pytest.approx((1 + float(a[f"chi{end}"])) / 2)
    assert arrays(output)["chi_numerator"].tolist() == arrays(measured)["chi_numerator"].tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 20, 1000])
def test_pixels_do_not_depend_on_the_batches(data, measured, tmp_path, batch_size):
    """Units of one start in pieces, of which some have no start, and units of several starts."""
    run(data, tmp_path, "--spectra", batch_size=batch_size)
    for k in TIMES:
        found, expected = arrays(tmp_path, k=k), arrays(measured, k=k)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            if values.dtype.kind == "f":
                assert found[name] == pytest.approx(values, rel=1e-6, abs=1e-9), name
            else:
                assert np.array_equal(found[name], values)


def test_a_layer_of_a_classifier(data, resnet18, tmp_path):
    known = {**resnet18, "tokens": "layer1", "image_size": SIZE}
    assert run(data, tmp_path, **known, time_series=5, batch_size=7) == 0
    found = arrays(tmp_path, "resnet18-layer1")
    assert found["change_map"].shape == (5, 28, 28) and found["chi_numerator"][3] == 0  # of 56 x 56
    assert (found["change"][[0, 1, 2, 4]] > 0).all() and len(found["distance"]) == 79  # bins one wide


def test_tokens_of_one_s_own(data, tmp_path, monkeypatch):
    """The mean of each row of the image, at distances of a tree."""
    rows = nn.Sequential(nn.AvgPool2d((1, SIZE)), nn.Flatten(2))  # (B, 3, 8)

    class Rows(nn.Module):
        def forward(self, x):
            return rows(x).mT

    table = np.array([[float(2 ** int(i ^ j).bit_length() - 1) for j in range(SIZE)] for i in range(SIZE)])
    preprocess = lambda image: torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1  # noqa: E731
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(rows=lambda: (Rows(), preprocess, table)))
    assert run(data, tmp_path, tokens="own:rows") == 0
    found = arrays(tmp_path, "rows")
    read = lambda path: (np.asarray(Image.open(path)) / 127.5 - 1).mean(1)  # noqa: E731
    changes = np.array(
        [
            [read(data / "out" / sample_name(n, 5, j)) - read(data / "starts" / n) for j in range(1, SAMPLES + 1)]
            for n in NAMES
        ]
    )
    r, c = correlation_function(covariances(np.linalg.norm(changes, axis=-1) / 3**0.5), table)
    assert r.tolist() == found["distance"].tolist() == [0, 1, 3, 7]
    assert found["correlation"] == pytest.approx(c, abs=1e-6)
    with pytest.raises(UserError, match="--spectra needs tokens on a grid"):
        run(data, tmp_path / "other", "--spectra", tokens="own:rows")


# Resuming


def test_equal_results_from_three_processes(data, measured, tmp_path):
    words = [*as_flags(flags(data, output=tmp_path / "pixels")), "--spectra"]
    done = run_script(*words, script="scripts/change_correlations.py", kind="mpiexec", processes=3)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "pixels") == contents(measured)


def test_equal_results_from_shards(data, measured, tmp_path):
    for shard in (1, 0):
        assert run(data, tmp_path, "--spectra", batch_size=20, shard=shard, num_shards=2) == 0
        assert (tmp_path / "susceptibility_pixels.csv").exists() == (shard == 0)
    run(data, tmp_path / "whole", "--spectra", batch_size=20)
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_the_same_after_being_killed(data, tmp_path):
    run(data, tmp_path / "whole", batch_size=8)
    known = as_flags(flags(data, output=tmp_path / "killed", batch_size=8))
    process = start_script(*known, script="scripts/change_correlations.py")
    parts = lambda: list((tmp_path / "killed").glob("*_parts/0*.npz"))  # noqa: E731
    while process.poll() is None and not parts():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run(data, tmp_path / "killed", batch_size=8) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and not parts()


def test_a_restart_computes_only_what_is_missing(data, measured, tmp_path, monkeypatch, capsys):
    output = shutil.copytree(measured, tmp_path / "results")
    for path in output.glob("changes_pixels-t_5_20*"):
        path.unlink()
    before = os.stat(changes_file(str(output), "pixels", 10, 20)).st_mtime_ns
    read = []
    monkeypatch.setattr(script, "read_sample", lambda path, *more: read.append(path) or read_sample(path, *more))
    assert run(data, output, "--spectra") == 0
    assert contents(output) == contents(measured)
    assert len(read) == 2 + 5 * SAMPLES  # one of each time, to check its size
    assert os.stat(changes_file(str(output), "pixels", 10, 20)).st_mtime_ns == before
    assert run(data, output, "--spectra") == 0
    assert "all 2 times are done already" in capsys.readouterr().err and len(read) == 2 + 5 * SAMPLES + 2


read_sample = script.read_sample


def test_each_image_is_read_once(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "read_image", lambda path, *more: seen.append(path) or read_image(path, *more))
    run(data, tmp_path, batch_size=3)
    assert sorted(seen) == [str(data / "starts" / name) for name in NAMES]


read_image = script.read_image


# Mistakes


@pytest.fixture
def copied(data, tmp_path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


def test_unreadable_images_are_named_and_left_out(copied, measured, tmp_path, capsys):
    (copied / "out" / sample_name("a/1.png", 5, 3)).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (copied / "starts" / "b/3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for j in (1, 2, 3):
        (copied / "out" / sample_name("a/2.png", 10, j)).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert run(copied, tmp_path / "results", batch_size=3) == 1
    assert "5 images could not be read" in capsys.readouterr().err
    early, late = (arrays(tmp_path / "results", k=k) for k in TIMES)
    assert early["names"].tolist() == NAMES[:4] and early["samples"].tolist() == [3, 4, 4, 4]
    assert late["names"].tolist() == ["a/1.png", "b/1.png", "b/2.png"]
    assert early["correlation"][1:] == pytest.approx(arrays(measured)["correlation"][1:4])
    flat = direct_changes_of_three(copied)
    assert early["chi_numerator"][0] == pytest.approx(flat.sum(1).var(ddof=1), rel=1e-5)
    record = json.loads((tmp_path / "results" / "changes_pixels-t_5_20.json").read_text())
    assert record["finished"] is False and "b/3.png" in record["images"]["unreadable"]


def test_repaired_samples_complete_the_results(copied, measured, tmp_path, capsys):
    output, content = tmp_path / "results", {}
    for path in [copied / "out" / sample_name("a/1.png", 5, 3), *(copied / "out").glob("t_10*/a/2_*.png")]:
        content[path] = path.read_bytes()
        path.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert run(copied, output, "--spectra", batch_size=3) == 1
    for path, whole in content.items():
        path.write_bytes(whole)
    other = copied / "out" / sample_name("b/1.png", 10, 2)
    kept = other.read_bytes()
    write(other, np.zeros((SIZE, SIZE, 3), np.uint8))
    with pytest.raises(UserError, match="made with other settings: the samples"):
        run(copied, output, "--spectra", batch_size=3)
    other.write_bytes(kept)
    capsys.readouterr()
    assert run(copied, output, "--spectra", batch_size=3) == 0
    assert "2 of 5 batches to compute" in capsys.readouterr().err
    found, expected = contents(output), contents(measured)
    assert found.keys() == expected.keys()
    for k in TIMES:
        for name, values in arrays(measured, k=k).items():
            if values.dtype.kind == "f":
                assert arrays(output, k=k)[name] == pytest.approx(values, rel=1e-6, abs=1e-9), name
        one, two = (json.loads((folder / f"changes_pixels-t_{k}_20.json").read_text()) for folder in (output, measured))
        assert one["settings"] == two["settings"] and one["finished"]


def direct_changes_of_three(data: Path) -> np.ndarray:
    read = lambda path: np.asarray(Image.open(path)) / 127.5 - 1  # noqa: E731
    start = read(data / "starts" / "a/1.png")
    samples = np.array([read(data / "out" / sample_name("a/1.png", 5, j)) for j in (1, 2, 4)])
    return np.linalg.norm(samples - start, axis=-1).reshape(3, -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 16}, "has 8x8 pixels, expected 16x16 (--image_size)"),
        ({"time_series": "15"}, "no samples for k = 15 of N = 20"),
        ({"time_series": "25"}, "--time_series"),
        ({"tokens": "clip", "clip_weights": "none"}, "clip"),
    ],
)
def test_mistakes(data, tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        run(data, tmp_path / "results", **changes)
    assert message in str(error.value) and str(error.value).count("\n") <= 1
    assert not (tmp_path / "results").exists()


def test_missing_samples_and_replaced_ones(copied, tmp_path):
    run(copied, tmp_path / "results")
    write(copied / "out" / sample_name("a/1.png", 5, 2), pixels(np.random.default_rng(1)))
    with pytest.raises(UserError, match=r"made with other settings: the samples|was computed from other files"):
        run(copied, tmp_path / "results")
    (copied / "out" / sample_name("a/1.png", 5, 2)).unlink()
    with pytest.raises(UserError, match=r"1 of 5 images lack some of their 4 samples in .*: 'a/1'"):
        run(copied, tmp_path / "results")


def test_settings_are_not_mixed(data, measured, tmp_path):
    output = shutil.copytree(measured, tmp_path / "results")
    with pytest.raises(UserError, match="made with other settings: --spectra was True and is now False"):
        run(data, output)


def test_times_of_other_settings_are_not_joined(data, measured, tmp_path):
    output = shutil.copytree(measured, tmp_path / "results")
    for path in output.glob("changes_pixels-t_10_20*"):
        path.unlink()
    fewer = shutil.copytree(data, tmp_path / "fewer")
    shutil.rmtree(fewer / "starts/a")
    for k in TIMES:
        shutil.rmtree(fewer / f"out/t_{k}_20_images/a")
    there = contents(output)
    message = (
        r"from k = 5 of N = 20 to k = 10 of N = 20, the number of starting images was 5 and is now 3; the list of st"
    )
    with pytest.raises(UserError, match=message) as error:
        run(fewer, output, "--spectra", time_series=10)
    assert contents(output) == there and str(error.value).count("\n") == 1
    assert run(data, output, time_series=10) == 0  # spectra are for some times only
    record = output / "changes_pixels-t_10_20.json"
    changed = json.loads(record.read_text())
    changed["settings"]["tokens_digest"] = "0" * 64
    record.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"the weights of the tokens .* was pixels and is now 000000000000"):
        read_changes(str(output), "pixels")
    record.unlink()
    assert len(read_changes(str(output), "pixels")) == 2  # as in the files of old versions
    record.write_text("{")
    with pytest.raises(UserError, match=r"is corrupted.\nRemove both files and rerun change_correlations.py"):
        read_changes(str(output), "pixels")


def test_results_of_a_layer_that_was_overwritten_do_not_count_as_done(data, tmp_path, monkeypatch):
    """Earlier versions measured what the next layer had made of the output."""
    network = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 16, 5))
    preprocess = lambda image: torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1  # noqa: E731
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(network=lambda: (network, preprocess)))
    for layer in "01":
        known = {"tokens": layer, "classifier_name": "own:network", "classifier_path": "", "time_series": 5}
        assert run(data, tmp_path, **known) == 0
        record = tmp_path / f"changes_network-{layer}-t_5_20.json"
        before = json.loads(record.read_text())
        before["settings"].pop("the output of the layer", None)
        record.write_text(json.dumps(before))
        if layer == "1":
            assert run(data, tmp_path, **known) == 0
        else:
            with pytest.raises(UserError, match="the output of the layer was not set and is now copied before the"):
                run(data, tmp_path, **known)
            with pytest.raises(UserError, match="from k = 5 of N = 20 to k = 10 of N = 20, the output of the layer"):
                run(data, tmp_path, **{**known, "time_series": 10})


# Figures


def test_figures_and_their_points(measured, tmp_path):
    known = ["--timestep_respacing", "20", "--output", str(tmp_path / "figures")]
    assert plot.main(["--changes", str(measured), *known]) == 0
    names = ("change_correlations", "susceptibility", "change_spectra")
    expected = {f"{name}.{ending}" for name in names for ending in ("png", "pdf", "csv")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == expected
    table, plotted = (
        rows_of(measured / "susceptibility_pixels.csv"),
        rows_of(tmp_path / "figures" / "susceptibility.csv"),
    )
    assert [{"tokens": "pixels", **row} for row in table] == plotted
    points = rows_of(tmp_path / "figures" / "change_correlations.csv")
    found = arrays(measured, k=10)
    own = [row for row in points if row["k"] == "10"]
    assert [float(row["r"]) for row in own] == pytest.approx(found["distance"])
    c = found["correlation"].mean(0)
    assert [float(row["covariance"]) for row in own] == pytest.approx(c)
    assert [float(row["relative"]) for row in own] == pytest.approx(c / c[0])
    assert all(float(row["relative_low"]) <= float(row["relative"]) <= float(row["relative_high"]) for row in own)
    powers = [row for row in rows_of(tmp_path / "figures" / "change_spectra.csv") if row["k"] == "10"]
    assert [float(row["power_of_change"]) for row in powers] == pytest.approx(found["spectrum_change"].mean(0))


def test_two_kinds_of_tokens_in_a_figure_and_undefined_numbers(measured, tmp_path):
    """Starts that never change have neither chi nor a length: their cells are empty."""
    still = tmp_path / "still"
    for k in TIMES:
        found = arrays(measured, k=k)
        rows = {
            n: v[[3, 3]] if len(v) == 5 else v for n, v in found.items() if not n.startswith(("spec", "wave", "modes"))
        }
        still.mkdir(exist_ok=True)
        np.savez(changes_file(str(still), "still", k, 20), **rows)
    curves = {name: read_changes(str(folder), name) for name, folder in (("pixels", measured), ("still", still))}
    with style():
        (_, points), (figure, rows), (_, powers) = (draw() for draw in figures_of(curves, "half").values())
        figure.draw_without_rendering()
    assert [row["tokens"] for row in rows] == ["pixels", "pixels", "still", "still"]
    assert {row["convention"] for row in rows} == {"half"}
    for row in rows[2:]:
        assert row["chi"] == row["chi_low"] == row["correlation_length"] == "" and row["change"] == 0
    assert {row["relative"] for row in points if row["tokens"] == "still"} == {""}
    assert {row["tokens"] for row in powers} == {"pixels"}


def test_long_names_of_tokens_fit(measured, tmp_path):
    names = [f"vit_b_16-encoder.layers.encoder_layer_{i}" for i in (0, 3, 7, 11)]
    curves = dict.fromkeys(names, read_changes(str(measured), "pixels"))
    with style():
        for draw in figures_of(curves).values():
            figure, _ = draw()
            check_texts(figure)


def test_curves_and_figures_without_data_are_left_out(data, measured, tmp_path, capsys):
    """Samples of k = 0 are their starts, and other tokens may have no spectra."""
    times = read_changes(str(measured), "pixels")
    plain = [replace(time, wavenumber=None, spectrum_start=None, spectrum_change=None) for time in times]
    still = [
        replace(
            time,
            step_reverse=0,
            **{name: 0 * getattr(time, name) for name in ("chi_denominator", "correlation", "spectrum_change")},
        )
        for time in times
    ]
    no_power = [replace(time, spectrum_change=0 * time.spectrum_change) for time in times]
    with style():
        figures = figures_of({"pixels": times, "plain": plain, "still": still})
        panels = [[axes.get_title() for axes in draw()[0].axes] for draw in figures.values()]
        assert "change_spectra" not in figures_of({"pixels": no_power})
    assert panels[0][:2] == ["pixels", "plain"] and "still" not in panels[0]
    assert panels[2] == ["pixels", ""]  # one panel, and the bar of colours
    assert "no change_spectra: no start differs from its samples by more than a constant" in capsys.readouterr().err
    for path in [f"t_0_20_images/{name[:-4]}_t0000{end}.png" for name in NAMES for end in ("", "_s002")]:
        name = f"{path.split('/', 1)[1].partition('_t0')[0]}.png"
        write(tmp_path / "out" / path, np.asarray(Image.open(data / "starts" / name)))
    assert run(data, tmp_path / "results", "--spectra", time_series=0, data_dir=tmp_path / "out") == 0
    words = [
        "--changes",
        str(tmp_path / "results"),
        "--timestep_respacing",
        "20",
        "--output",
        str(tmp_path / "figures"),
    ]
    with pytest.raises(UserError, match=r"nothing to plot: the samples of every start change alike, at k = 0"):
        plot.main(words)
    assert not (tmp_path / "figures").exists()


GRID = np.stack(np.divmod(np.arange(49), 7), axis=1)
DISTANCES = {  # of all pairs of tokens, and the numbers on the axis
    "3 15 63": TablePairs(4.0 ** Grammar(4, 4, 3, 5).ancestor_levels() - 1),
    "1 2 5": TablePairs(np.linalg.norm(GRID[:, None] - GRID, axis=2)),
}


@pytest.mark.parametrize("numbers", DISTANCES)
def test_the_distances_can_be_read(numbers):
    """Those of a tree themselves, and some of those in a grid, in two panels next to each other."""
    pairs, rng = DISTANCES[numbers], np.random.default_rng(0)
    times = [changes_at(k, 20, rng.choice([-1.0, 1.0], (8, 5, pairs.tokens)), pairs) for k in (5, 10)]
    with style():
        figure, _ = draw_correlations({"one": times, "other": times})
        check_texts(figure)
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == numbers.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "--changes: the folder nowhere does not exist; expected files changes_NAME-t_K_N.npz"),
        (["{}", "--timestep_respacing", "250"], "has no changes of pixels for N = 250, only for N = 20"),
        (["{}", "{}"], "--changes has changes of pixels, pixels: expected at most 4 different tokens"),
    ],
)
def test_mistakes_in_figures(measured, tmp_path, words, message):
    words = [word.format(measured) for word in words]
    with pytest.raises(UserError) as error:
        plot.main(["--changes", *words, "--output", str(tmp_path)])
    assert message in str(error.value)


def test_times_with_different_grids(measured, tmp_path):
    output = shutil.copytree(measured, tmp_path / "results")
    found = arrays(output, k=10)
    found["distance"], found["correlation"] = found["distance"][:9], found["correlation"][:, :9]
    np.savez(changes_file(str(output), "pixels", 10, 20), **found)
    with pytest.raises(UserError, match=r"k = 5 and k = 10 in .* have different grids of tokens, with 34 and 9"):
        read_changes(str(output), "pixels")
    (output / "changes_pixels-t_10_20.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"is damaged, or not a file of change_correlations\.py"):
        read_changes(str(output), "pixels")
