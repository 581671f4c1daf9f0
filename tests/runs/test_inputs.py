"""The identity of files by content."""

from __future__ import annotations

import hashlib
import io
import itertools
import os

from guided_diffusion.errors import UserError
from guided_diffusion.runs import inputs
from guided_diffusion.runs.inputs import Entry, Inputs, compare_with_record, evenly_spaced, read_entries, write_entries

import pytest


@pytest.fixture
def data(tmp_path):
    """Ten files of 100 bytes."""
    for i in range(10):
        (tmp_path / "data" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"c{i % 2}" / f"{i}.png").write_bytes(bytes([i]) * 100)
    return tmp_path / "data"


def paths_of(data):
    return sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))


def known(data, paths=None):
    """Inputs that have read files."""
    found = Inputs(str(data), "--data_dir")
    for path in paths_of(data) if paths is None else paths:
        found.digest_check(path)(io.BytesIO((data / path).read_bytes()))
    return found


def test_unchanged_files_compare_equal(data):
    found = known(data)
    found.compare(paths_of(data), "out")
    digest = hashlib.sha256((data / "c0/4.png").read_bytes()).hexdigest()
    assert found.entries(["c0/4.png", "missing"]) == {"c0/4.png": (100, digest)}


def test_sizes_of_files_that_were_never_read_are_known(data):
    found = Inputs(str(data), "--data_dir")
    found.compare(paths_of(data), "out")
    assert set(found.known.values()) == {(100, None)}
    (data / "c1/3.png").write_bytes(b"other")
    words = r"out was computed from other files: .*/c1/3.png differs, it had 100 bytes and has 5.\n.*\(--data_dir\)"
    with pytest.raises(UserError, match=words):
        found.compare(paths_of(data), "out")


def test_other_content_of_the_same_size(data):
    found = known(data)
    for name in ("c1/3.png", "c1/9.png"):
        (data / name).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"c1/3.png differs, its content has changed \(2 such files\)"):
        found.compare(paths_of(data), "out")


def test_a_file_that_has_gone(data):
    found = known(data)
    os.unlink(data / "c0/0.png")
    with pytest.raises(UserError, match=r"c0/0.png differs, it had 100 bytes and is missing"):
        found.compare(["c0/0.png"], "out")


def test_large_data_are_sampled_with_the_first_and_the_last(data, monkeypatch):
    monkeypatch.setattr(inputs, "HASH_ALL", 500)
    monkeypatch.setattr(inputs, "SPREAD", 3)
    paths = paths_of(data)
    read = paths[1:8]
    hashed = []
    digest = inputs.file_digest
    monkeypatch.setattr(inputs, "file_digest", lambda path: hashed.append(path) or digest(path))
    known(data, read).compare(paths, "out")
    assert sorted(hashed) == [f"{data}/{path}" for path in (read[0], read[3], read[6])]
    for place, noticed in ((0, True), (1, False), (6, True)):
        found = known(data, read)
        before = (data / read[place]).read_bytes()
        (data / read[place]).write_bytes(b"y" * 100)
        if noticed:
            with pytest.raises(UserError, match="its content has changed"):
                found.compare(paths, "out")
        else:
            found.compare(paths, "out")
        (data / read[place]).write_bytes(before)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, 50_000])
def test_an_even_spread(count):
    chosen = evenly_spaced([str(i) for i in range(count)], 64)
    assert len(chosen) == min(count, 64) == len(set(chosen))
    if count:
        assert (chosen[0], chosen[-1]) == ("0", str(count - 1))
    gaps = {int(b) - int(a) for a, b in itertools.pairwise(chosen)}
    assert len(gaps) <= 2 and (not gaps or max(gaps) - min(gaps) <= 1)


def test_a_file_that_changes_while_it_is_in_use(data):
    found = known(data)
    with pytest.raises(UserError, match=r"c0/2.png has changed since this run .*\(--data_dir\)"):
        found.digest_check("c0/2.png")(io.BytesIO(b"x" * 100))
    found = Inputs(str(data), "--data_dir")
    found.compare(paths_of(data), "out")
    with pytest.raises(UserError, match="has changed"):
        found.digest_check("c0/2.png")(io.BytesIO(b"x" * 99))
    found.digest_check("c0/2.png")(io.BytesIO(b"x" * 100))
    found.forget("c0/2.png")
    found.digest_check("c0/2.png")(io.BytesIO(b"repaired"))


def test_entries_are_written_and_read(tmp_path):
    path = str(tmp_path / "inputs.json")
    assert read_entries(path) is None
    odd = os.fsdecode(b"caf\xe9 \xff\"'\n.png")
    entries = {"images": {odd: Entry(7, "ab" * 32), "b.png": Entry(8, None)}, "samples": {}}
    write_entries(path, entries)
    assert read_entries(path) == entries


@pytest.mark.parametrize(
    "text", ["", "null?", "[]", '{"images": null}', '{"images": {"a": 3}}', '{"images": {"a": ["x", 1]}}']
)
def test_a_damaged_list(tmp_path, text):
    (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(UserError, match=r"inputs\.json is corrupted"):
        read_entries(str(tmp_path / "inputs.json"))


def test_a_data_set_is_recorded_then_compared(data, tmp_path):
    record = str(tmp_path / "data.json")
    arguments = (str(data), paths_of(data), "--data_dir", record, "out")
    assert not compare_with_record(*arguments)
    assert compare_with_record(*arguments)
    (data / "c0/2.png").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"c0/2\.png differs"):
        compare_with_record(*arguments)


def test_remote_sizes_come_from_listings(monkeypatch):
    class Stat:
        def __init__(self, size):
            self.size = size

    class Item:
        def __init__(self, name, size=None):
            self.name, self.is_dir, self.stat = name, size is None, None if size is None else Stat(size)

    listings = {"gs://b/data": [Item("a.png", 3), Item("c")], "gs://b/data/c": [Item("d.png", 4)]}
    monkeypatch.setattr(inputs.bf, "scandir", lambda folder: listings[folder])
    assert inputs.file_sizes("gs://b/data/", ["c/d.png", "a.png", "e.png"]) == {"c/d.png": 4, "a.png": 3}
