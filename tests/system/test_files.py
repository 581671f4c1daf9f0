"""Files that are whole or absent; reading and writing beside the computation."""

from __future__ import annotations

import io
import os
import signal
import threading
import time

from guided_diffusion.errors import UserError
from guided_diffusion.runs.pipeline import ImageWriter, encode, read_ahead
from guided_diffusion.system.files import read_json, remove_scratch, remove_scratch_of, walk, write_json, write_whole

import numpy as np
import pytest
from PIL import Image


def test_write_whole_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for data in (b"first", b"second"):
        write_whole(str(path), data)
        assert path.read_bytes() == data
        assert os.listdir(path.parent) == ["file"]


def test_a_reader_never_sees_a_part(tmp_path):
    """While one thread writes long files again and again, another only ever sees whole ones."""
    path, versions = str(tmp_path / "file"), [bytes([i]) * 300_000 for i in range(4)]
    write_whole(path, versions[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for data in versions:
                write_whole(path, data)

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    until = time.monotonic() + 1
    while time.monotonic() < until or len(seen) < 2:
        with open(path, "rb") as f:
            seen.add(f.read())
    stop.set()
    writer.join()
    assert seen <= set(versions)


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="Is a directory") as error:
        write_whole(str(tmp_path / "folder"), b"data")
    assert error.value.filename == str(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_json_and_folders(tmp_path):
    assert read_json(str(tmp_path / "none.json")) is None
    write_json(str(tmp_path / "a.json"), {"ä": [1, None]})
    assert read_json(str(tmp_path / "a.json")) == {"ä": [1, None]}
    assert list(walk(str(tmp_path / "nowhere"))) == []
    write_whole(str(tmp_path / "x" / "y" / "1.png"), b"")
    write_whole(str(tmp_path / "x" / "2.png"), b"")
    assert sorted(walk(str(tmp_path))) == ["a.json", "x/2.png", "x/y/1.png"]
    (tmp_path / "x" / ".0123456789abcdef.part").touch()
    (tmp_path / "x" / "mine.part").touch()
    remove_scratch(str(tmp_path))
    assert sorted(walk(str(tmp_path))) == ["a.json", "x/2.png", "x/mine.part", "x/y/1.png"]


def test_the_scratch_of_one_file_is_removed_alone(tmp_path):
    """A process killed while it wrote a file leaves its scratch; a neighbour's scratch may be in use."""
    target, neighbour = tmp_path / ("a" * 250), tmp_path / "b.json"
    for path in (target, neighbour):
        child = os.fork()
        if child == 0:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            write_whole(str(path), b"data")
        os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 2
    remove_scratch_of(str(target))
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".b.json.")
    remove_scratch_of(str(tmp_path / "nowhere" / "file"))


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_read_ahead_keeps_the_order(num_workers):
    units = [[3, 1, 2], [], [5, 4]]
    calls = lambda unit: [lambda n=n: (time.sleep(n / 1000), n)[1] for n in unit]  # noqa: E731
    assert list(read_ahead(units, calls, num_workers)) == [(unit, unit) for unit in units]


def test_the_next_unit_is_read_while_one_is_worked_on():
    read = threading.Event()
    calls = {"a": [lambda: "a"], "b": [lambda: read.set() or "b"]}
    for unit, _ in read_ahead("ab", calls.__getitem__, 1):
        if unit == "a":
            assert read.wait(10)


def test_image_writer_writes_all_before_it_ends(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    written = []
    with ImageWriter("png", 95, ahead=3) as writer:
        for i, image in enumerate(pixels):
            writer.submit(
                str(tmp_path / f"{i}.png"), image, lambda i=i: written.append((tmp_path / f"{i}.png").exists())
            )
    assert written == [True] * 20
    for i, image in enumerate(pixels):
        assert (np.asarray(Image.open(tmp_path / f"{i}.png")) == image).all()


def test_image_writer_waits_for_images_that_are_on_their_way(tmp_path):
    arrived = threading.Event()
    pixels = np.full((8, 8, 3), 77, np.uint8)
    with ImageWriter("png", 95) as writer:
        writer.submit(str(tmp_path / "0.png"), lambda: arrived.wait(10) and pixels)
        assert not (tmp_path / "0.png").exists()  # `submit` has come back all the same
        arrived.set()
    assert (np.asarray(Image.open(tmp_path / "0.png")) == pixels).all()

    def damaged():
        raise UserError("the model gave NaN")

    with pytest.raises(UserError, match="the model gave NaN"), ImageWriter("png", 95) as writer:
        writer.submit(str(tmp_path / "1.png"), damaged)
    assert not (tmp_path / "1.png").exists()


def test_image_writer_reports_the_first_failure(tmp_path):
    (tmp_path / "0.png").mkdir()

    def write_two():
        with ImageWriter("png", 95) as writer:
            for i in range(2):
                writer.submit(str(tmp_path / f"{i}.png"), np.zeros((8, 8, 3), np.uint8))
                time.sleep(0.2)

    with pytest.raises(UserError, match=r"cannot write .*0\.png: Is a directory"):
        write_two()
    assert not (tmp_path / "1.png").exists()


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), MemoryError(), SystemExit(3)])
def test_any_exception_in_the_writer_s_thread_surfaces(tmp_path, error):
    def fail():
        raise error

    def write_two():
        with ImageWriter("png", 95) as writer:
            writer.submit(str(tmp_path / "0.png"), fail)
            writer.submit(str(tmp_path / "1.png"), np.zeros((8, 8, 3), np.uint8))

    with pytest.raises(type(error)) as caught:
        write_two()
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_jpegs_keep_their_colours():
    """Colours at full resolution: a fine pattern of red and blue survives."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, ::2, 0] = pixels[:, 1::2, 2] = 200
    decoded = np.asarray(Image.open(io.BytesIO(encode(pixels, "jpeg", 95)))).astype(int)
    assert abs(decoded - pixels).mean() < 8
    assert encode(pixels, "jpeg", 95) == encode(pixels, "jpeg", 95)
