"""Parts of a long computation: complete or absent, from one experiment, removed once the result exists."""

from __future__ import annotations

import argparse
import json

from guided_diffusion.errors import ResultError, UserError
from guided_diffusion.runs.inputs import Entry, write_entries
from guided_diffusion.runs.parts import Parts, remove_parts
from guided_diffusion.runs.records import finished_record, record_of
from guided_diffusion.runs.settings import differences, settings_of

import numpy as np
import pytest

SETTINGS = {"seed": 0, "sampler": "ddpm", "model_digest": "ab" * 32}
THREADS = {"threads": 1}


def test_parts_are_kept_until_they_are_removed(tmp_path):
    folder = tmp_path / "results" / "parts"
    parts = Parts(str(folder), SETTINGS, THREADS)
    assert parts.present() == set()
    parts.write(3, a=np.arange(4, dtype=np.uint8), b=np.zeros((2, 0)))
    parts.write(1234567, a=np.ones(1))
    (folder / ".000007.npz.0123456789abcdef.part").write_bytes(b"PK")  # a process was killed here
    again = Parts(str(folder), json.loads(json.dumps(SETTINGS)), THREADS)
    assert again.present() == {3, 1234567}
    assert not list(folder.glob(".*"))
    part = again.read(3)
    assert part.keys() == {"a", "b"}
    assert part["a"].dtype == np.uint8 and part["a"].tolist() == [0, 1, 2, 3]
    assert part["b"].shape == (2, 0)
    remove_parts(str(folder))
    assert not folder.exists()
    remove_parts(str(folder))  # nothing is there: nothing to do


def test_nothing_is_unpickled(tmp_path):
    parts = Parts(str(tmp_path / "parts"), SETTINGS, THREADS)
    parts.write(0, a=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        parts.read(0)


def test_a_file_that_one_part_could_not_read_is_known_from_another(tmp_path):
    """It was read for part 1, so that it must not change; the other was never read, so that it may be repaired."""
    parts = Parts(str(tmp_path / "parts"), SETTINGS, THREADS)
    listed, entry = str(tmp_path / "parts/inputs.json"), Entry(7, "ab" * 32)
    write_entries(listed, {"images": {"a.png": Entry(7, None), "b.png": Entry(8, None)}})
    parts.write(0, {"inputs": {"images": {}}, "unreadable": {"images": {"a.png": "?", "b.png": "?"}}})
    parts.write(1, {"inputs": {"images": {"a.png": entry}}, "unreadable": {"images": {}}})
    parts.write(2, {"inputs": {"images": {}}, "unreadable": {"images": {"a.png": "?"}}})
    assert parts.known_files(listed) == {"images": {"a.png": entry}}


@pytest.mark.parametrize("kept", [0, 100, -30])
def test_a_damaged_part_is_computed_again(kept, tmp_path, capsys):
    parts = Parts(str(tmp_path / "parts"), SETTINGS, THREADS)
    for index in range(2):
        parts.write(index, {"inputs": {}}, a=np.arange(100))
    damaged = tmp_path / "parts/000000.npz"
    damaged.write_bytes(damaged.read_bytes()[:kept])
    with pytest.raises(ResultError, match=r"000000\.npz is damaged \(.+\)\.\nRemove it, and rerun the same command"):
        parts.read(0)
    assert parts.known_files(str(tmp_path / "parts/inputs.json")) == {}
    assert parts.present() == {1}
    assert "warning: " in (said := capsys.readouterr().err) and "000000.npz is damaged" in said


def test_a_part_with_a_wrong_checksum_is_named(tmp_path):
    parts = Parts(str(tmp_path / "parts"), SETTINGS, THREADS)
    parts.write(0, a=np.arange(100))
    data = bytearray((tmp_path / "parts/000000.npz").read_bytes())
    data[400] ^= 1
    (tmp_path / "parts/000000.npz").write_bytes(data)
    with pytest.raises(ResultError, match=r"000000\.npz is damaged \(Bad CRC-32"):
        parts.read(0)


def test_a_folder_belongs_to_one_experiment(tmp_path):
    folder = tmp_path / "parts"
    Parts(str(folder), SETTINGS, THREADS).write(0, a=np.zeros(1))
    scratch = folder / ".000001.npz.0123456789abcdef.part"
    scratch.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"--seed was 0 and is now 1\.\n.*another --output, or remove the folder"):
        Parts(str(folder), {**SETTINGS, "seed": 1}, THREADS)
    with pytest.raises(UserError, match=r"--model_path\) was abababababab\.\.\. and is now cdcd"):
        Parts(str(folder), {**SETTINGS, "model_digest": "cd" * 32}, THREADS)
    assert scratch.exists()  # it may be another run's, which is under way
    (folder / "settings.json").write_text("[]")
    with pytest.raises(UserError, match="corrupted"):
        Parts(str(folder), SETTINGS, THREADS)
    (folder / "settings.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        Parts(str(folder), SETTINGS, THREADS)


def test_what_decides_the_last_digits_is_warned_of(tmp_path, capsys):
    folder = str(tmp_path / "parts")
    Parts(folder, SETTINGS, THREADS)
    Parts(folder, SETTINGS, THREADS)
    assert capsys.readouterr().err == ""
    Parts(folder, SETTINGS, {"threads": 2})
    assert "threads was 1 and is now 2. Results will agree to rounding" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory.*--output"):
        Parts(str(tmp_path / "file" / "parts"), SETTINGS, THREADS)


def test_a_result_that_is_there(tmp_path):
    result = str(tmp_path / "samples_1x2x2x3.npz")
    assert record_of(result) == str(tmp_path / "samples_1x2x2x3.json")
    record = {"finished": True, "settings": SETTINGS}
    (tmp_path / "samples_1x2x2x3.json").write_text(json.dumps(record))
    assert finished_record(result, SETTINGS) is None  # the record is written first
    (tmp_path / "samples_1x2x2x3.npz").write_bytes(b"")
    assert finished_record(result, SETTINGS) == record
    with pytest.raises(UserError, match=r"samples_1x2x2x3\.npz already exists.*--sampler was ddpm and is now ddim"):
        finished_record(result, {**SETTINGS, "sampler": "ddim"})
    (tmp_path / "samples_1x2x2x3.json").write_text(json.dumps({**record, "finished": False}))
    assert finished_record(result, SETTINGS) is None
    (tmp_path / "samples_1x2x2x3.json").unlink()
    with pytest.raises(UserError, match=r"samples_1x2x2x3\.json is missing"):
        finished_record(result, SETTINGS)


def test_settings_are_the_flags_that_decide_and_the_contents_of_files():
    args = argparse.Namespace(
        seed=1, output="a", num_threads=2, num_workers=3, dropout=0.1, use_checkpoint=True, model_path="b", image_size=8
    )
    assert settings_of(args, model_digest="digest") == {"seed": 1, "image_size": 8, "model_digest": "digest"}


def test_a_record_with_the_names_of_earlier_versions(tmp_path):
    result = tmp_path / "samples.npz"
    result.write_bytes(b"")
    old = {"--seed": 0, "--use_ddim": False, "--model_path": "ab" * 32}
    (tmp_path / "samples.json").write_text(json.dumps({"finished": True, "settings": old}))
    assert finished_record(str(result), SETTINGS)["settings"] == SETTINGS
    old = {"--seed": 0, "--use_ddim": False, "the checkpoint (--model_path)": "ab" * 32}
    assert not differences(old, SETTINGS)
    assert not differences({**old, "--use_ddim": True}, {**SETTINGS, "sampler": "ddim"})
    assert differences(old, {**SETTINGS, "sampler": "ddim"}) == ["--sampler was ddpm and is now ddim"]
    assert differences(old, {**SETTINGS, "seed": 1}) == ["--seed was 0 and is now 1"]
