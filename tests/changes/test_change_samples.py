"""The samples of each start, found by their names, and units cut into pieces."""

from pathlib import Path

from guided_diffusion.changes.samples import find_starts, start_batches
from guided_diffusion.classifier.pairs import find_samples
from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import SampleFolder

import pytest
from PIL import Image

FOLDER = "t_5_20_images"


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return folder


def folder_of(output: Path, k: int = 5) -> SampleFolder:
    return SampleFolder(str(output), k, 20, 1000)


def test_trajectories_and_turns_by_name(tmp_path):
    names = ["a/x_t0250.JPEG", "a/x_t0250_s002.JPEG", "a/x_t0250_s1000.png", "y_t0250.png", "y_t0250_s002.png"]
    put(tmp_path / FOLDER, *names, "y_t0250_u02.png", "y_t0250_s002_u11.png", "t_t0250_s003_t0250.png")
    (tmp_path / FOLDER / "notes.txt").write_text("")
    assert find_samples(folder_of(tmp_path)) == {
        "a/x": {1: "a/x_t0250.JPEG", 2: "a/x_t0250_s002.JPEG", 1000: "a/x_t0250_s1000.png"},
        "y": {1: "y_t0250.png", 2: "y_t0250_s002.png"},
        "t_t0250_s003": {1: "t_t0250_s003_t0250.png"},
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x_t0500.png", "1 image(s) in {} are not named like samples of that time: 'x_t0500.png'"),
        (
            "x_t0250_s02.png",
            "are not named like samples of that time: 'x_t0250_s02.png';\nexpected names ending in _t0250",
        ),
        ("x_t0250.png", "has two files of a sample, x_t0250.JPEG and x_t0250.png"),
        ("x_t0250_s002.png", "has two files of a sample, x_t0250_s002.JPEG and x_t0250_s002.png"),
    ],
)
def test_other_names(tmp_path, name, message):
    folder = put(tmp_path / FOLDER, "x_t0250.JPEG", "x_t0250_s002.JPEG", name)
    with pytest.raises(UserError) as error:
        find_samples(folder_of(tmp_path))
    assert message.format(folder) in str(error.value) and str(error.value).count("\n") <= 1


def test_starts_and_their_samples_in_order(tmp_path):
    starts = put(tmp_path / "starts", "b/2.png", "b/1.JPEG", "c.png", "unused.png")
    for k in (5, 10):
        stems = [f"{stem}_t{50 * k:04d}" for stem in ("b/1", "b/2", "c")]
        names = [f"{stem}{number}.png" for stem in stems for number in ("", "_s003", "_s002")]
        put(tmp_path / f"t_{k}_20_images", *names)
    found, samples = find_starts(str(starts), {k: folder_of(tmp_path, k) for k in (5, 10)})
    assert found == ["b/1.JPEG", "b/2.png", "c.png"]
    assert samples[10][1] == [f"t_10_20_images/b/2_t0500{number}.png" for number in ("", "_s002", "_s003")]
    units = start_batches(found, [samples[5], samples[10]], 2)
    assert [len(unit.starts) for unit in units] == [2, 1] and [unit.images for unit in units] == [14, 7]
    pieces = list(units[0].pieces(5))
    assert [sum(map(len, piece.files.values())) for piece in pieces] == [5, 5, 4]
    assert [piece.is_last for piece in pieces] == [False, False, True]
    assert [piece.starts for piece in pieces] == [[0], [1], []]
    read = [path for piece in pieces for _, _, path in piece.samples]
    assert (
        read == [path for start in range(2) for k in (5, 10) for path in samples[k][start]] == units[0].files["samples"]
    )
    assert [piece.samples[-1][:2] for piece in pieces] == [(0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["b_t0250_s002.png"], "1 of 2 images lack some of their 2 samples in {}: 'b'"),
        (["a_t0250.png"], "1 of 2 images lack some of their 2 samples in {}: 'a'"),
        (["a_t0250_s002.png", "b_t0250_s002.png"], "has one sample of each start: fluctuations need two or more."),
        (["b_t0250.png", "b_t0250_s002.png"], "lack samples: k = 5 lacks 1 of 2 ('b')"),
    ],
)
def test_missing_samples(tmp_path, removed, message):
    starts = put(tmp_path / "starts", "a.png", "b.png")
    for k in (5, 10):
        names = (f"{stem}_t{50 * k:04d}{number}.png" for stem in "ab" for number in ("", "_s002"))
        put(tmp_path / f"t_{k}_20_images", *(name for name in names if name not in removed))
    with pytest.raises(UserError) as error:
        find_starts(str(starts), {k: folder_of(tmp_path, k) for k in (5, 10)})
    assert message.format(tmp_path / FOLDER) in str(error.value) and str(error.value).count("\n") == 1


def test_samples_of_other_starts_and_no_samples(tmp_path):
    starts = put(tmp_path / "starts", "a.png")
    with pytest.raises(UserError, match="no samples for k = 5 of N = 20"):
        find_starts(str(starts), {5: folder_of(tmp_path)})
    put(tmp_path / FOLDER, "a_t0250.png", "a_t0250_s002.png", "b_t0250.png", "b_t0250_s002.png")
    with pytest.raises(UserError, match=r"2 of 4 samples in .* have no starting image"):
        find_starts(str(starts), {5: folder_of(tmp_path)})
