"""The stream of training images, against its definition: which image, crop and flip stands at which position."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from guided_diffusion import dist_util
from guided_diffusion.command_line.stopping import STOP_SIGNALS
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import ImageDataset
from guided_diffusion.images import io as image_io
from guided_diffusion.training.data import training_stream

import numpy as np
import pytest
import torch
from conftest import environment, run_python, run_script
from fork_server import start
from PIL import Image
from torch.utils.data import DataLoader

SIZE = 8


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Ten pictures of noise in two class folders; not to be changed."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(10):
        below = folder / ("even" if i % 2 == 0 else "odd")
        below.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(below / f"{i}.png")
    return folder


@pytest.fixture
def greys(tmp_path):
    """A function that makes a folder of `n` images; image i is filled with the grey 10 i."""

    def make(n):
        for i in range(n):
            Image.new("RGB", (20, 16), (10 * i,) * 3).save(tmp_path / f"{i:02}.png")
        return tmp_path

    return make


def stream_of(folder, **options):
    return training_stream(
        **{"data_dir": str(folder), "batch_size": 4, "image_size": SIZE, "num_workers": 0, **options}
    )


def take(stream, batches):
    """The next batches in one: images, labels or None."""
    images, extras = zip(*(next(stream) for _ in range(batches)), strict=True)
    return torch.cat(images), torch.cat([extra["y"] for extra in extras]) if extras[0] else None


def order(n, seed, count):
    """The images at positions 0 .. count - 1."""
    epochs = range(-(-count // n))
    shuffled = [np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, e]))).permutation(n) for e in epochs]
    return np.concatenate(shuffled)[:count].tolist()


def numbers(images):
    """Which of the `greys` these are."""
    return ((images[:, 0, 0, 0] + 1) * 127.5 / 10).round().int().tolist()


def of_rank(monkeypatch, rank, ranks):
    monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: ranks)


# The stream


@pytest.mark.parametrize("crop", [True, False])
def test_stream_is_its_definition(pictures, crop):
    stream = stream_of(pictures, seed=5, class_cond=True, random_crop=crop)
    images, labels = take(stream, 8)
    assert images.shape == (32, 3, SIZE, SIZE) and images.dtype == torch.float32 and images.is_contiguous()
    assert labels.dtype == torch.int64
    assert stream.position == 32 and stream.unreadable == {}
    assert sorted(stream.classes.names) == [0, 1]

    paths = sorted(pictures.glob("*/*.png"))
    flips = 0
    for p, index in enumerate(order(10, 5, 32)):
        rng = random.Random(f"5 {p}")
        picture = Image.open(paths[index])
        if crop:
            expected = image_io.random_crop_arr(picture, SIZE, rng=rng)
        else:
            expected = image_io.center_crop_arr(picture, SIZE)
        flip = rng.random() < 0.5
        flips += flip
        expected = (expected[:, ::-1] if flip else expected).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        np.testing.assert_array_equal(images[p], expected)
        assert labels[p] == int(paths[index].parent.name == "odd")
    assert 8 < flips < 24


def test_each_epoch_has_every_image_once_in_another_order(greys):
    images, _ = take(stream_of(greys(10), batch_size=5), 6)
    epochs = np.array(numbers(images)).reshape(3, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert numbers(images) == order(10, 0, 30)
    other, _ = take(stream_of(greys(10), batch_size=5, seed=1), 2)
    assert numbers(other) != numbers(images)[:10]


def test_deterministic_is_the_order_of_the_paths(greys):
    images, labels = take(stream_of(greys(5), deterministic=True), 3)
    assert numbers(images) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1] and labels is None


def test_two_ranks_have_the_rows_of_one(pictures, monkeypatch):
    options = {"seed": 3, "class_cond": True, "random_crop": True}
    whole, labels = take(stream_of(pictures, batch_size=6, **options), 7)
    for rank in 0, 1:
        of_rank(monkeypatch, rank, 2)
        stream = stream_of(pictures, batch_size=3, **options)
        mine, my_labels = take(stream, 7)
        rows = [p for p in range(42) if p % 6 // 3 == rank]
        assert torch.equal(mine, whole[rows]) and torch.equal(my_labels, labels[rows])
        assert stream.position == 42
        stream.seek(6)
        assert torch.equal(next(stream)[0], mine[3:6]) and stream.position == 12


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_seek_gives_what_running_through_gives(pictures, num_workers):
    images, _ = take(stream_of(pictures, random_crop=True), 9)
    stream = stream_of(pictures, random_crop=True, num_workers=num_workers)
    for position in 0, 16, 3, 30:  # 30: the batch after next begins the fourth epoch
        stream.seek(position)
        assert stream.position == position
        again, _ = take(stream, 1)
        assert torch.equal(again, images[position : position + 4]) and stream.position == position + 4
    again, _ = take(stream_of(pictures, random_crop=True, num_workers=num_workers), 9)
    assert torch.equal(again, images)


def test_fewer_images_than_a_batch(greys, monkeypatch):
    of_rank(monkeypatch, 1, 2)
    images, _ = take(stream_of(greys(3), batch_size=8), 2)
    expected = order(3, 0, 32)
    assert numbers(images) == expected[8:16] + expected[24:32]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_random_numbers_of_others_are_left_alone(greys, num_workers):
    stream = stream_of(greys(3), num_workers=num_workers, random_crop=True)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002, the numbers that others may draw
    expected = torch.rand(()), random.random(), np.random.random()  # noqa: NPY002
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    next(stream)
    assert (torch.rand(()), random.random(), np.random.random()) == expected  # noqa: NPY002


def workers_of(stream):
    """The worker processes of a stream that has given as many batches as it has workers."""
    before = set(multiprocessing.active_children())
    take(stream, 2)
    return set(multiprocessing.active_children()) - before


def test_workers_end_with_the_stream_and_not_by_signals(greys):
    folder = greys(3)
    expected, _ = take(stream_of(folder), 8)
    stream = stream_of(folder, num_workers=2)
    workers = workers_of(stream)
    assert len(workers) == 2
    for worker in workers:
        for signum in STOP_SIGNALS:
            os.kill(worker.pid, signum)
    assert torch.equal(take(stream, 6)[0], expected[8:])
    assert all(worker.is_alive() for worker in workers)
    others = workers
    stream.seek(8)
    workers = workers_of(stream)
    assert not any(worker.is_alive() for worker in others) and len(workers) == 2
    del stream
    assert not any(worker.is_alive() for worker in workers)


# From the third batch on, images cannot be read in a time that anybody waits for.
STUCK = """
import sys, time
import torch.utils.data
from guided_diffusion.training import data as training_data

read = training_data.BatchDataset.__getitem__

def stuck(self, positions):
    if positions.start >= 8:
        time.sleep(1e6)
    return read(self, positions)

training_data.BatchDataset.__getitem__ = stuck
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # seconds until torch loses patience with a worker
stream = training_data.training_stream(data_dir=sys.argv[1], batch_size=4, image_size=8, num_workers=2)
for _ in range(2):
    next(stream)
"""


@pytest.mark.parametrize("end", ["del stream", "pass"], ids=["by torch", "by Python"])
def test_workers_that_do_not_end_by_themselves_are_killed(greys, end):
    command = [sys.executable, "-c", STUCK + end, str(greys(3))]
    if end == "pass":  # a subject of its own: how Python ends
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    else:
        done = run_python(*command[1:])
    assert done.returncode == 0, done.stderr  # and nobody has its pipes any more


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


READER = """
import multiprocessing, sys, time
from guided_diffusion.training.data import training_stream
stream = training_stream(data_dir=sys.argv[1], batch_size=4, image_size=8, num_workers=2)
for _ in range(2):
    next(stream)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_process_that_is_killed(greys, signum):
    pipe = subprocess.PIPE
    process = start([sys.executable, "-c", READER, greys(3)], env=environment(), stdin=pipe, stdout=pipe)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2 and all(map(is_running, workers))
    process.send_signal(signum)
    process.communicate()
    deadline = time.monotonic() + 300
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_that_is_killed_is_said_to_be(greys):
    stream = stream_of(greys(3), num_workers=2)
    workers = workers_of(stream)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()  # no exception here, where a training step may be under way
    with pytest.raises(
        UserError, match=r"^a process that reads images of .* \(--data_dir\) was killed\.\n.*num_workers"
    ):
        take(stream, 8)


def test_real_processes_share_a_batch(pictures, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from guided_diffusion import dist_util\n"
        "from guided_diffusion.training.data import training_stream\n"
        "dist_util.setup_dist()\n"
        "stream = training_stream(data_dir=sys.argv[1], batch_size=2, image_size=8, class_cond=True, num_workers=1)\n"
        "torch.save([next(stream) for _ in range(3)], f'{sys.argv[2]}/rank{dist_util.get_rank()}')\n"
        "dist_util.barrier()\n"
    )
    done = run_script(pictures, tmp_path, script=script, kind="mpiexec", processes=2)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in (0, 1)]
    whole = stream_of(pictures, class_cond=True)
    for first, second in zip(*ranks, strict=True):
        images, extra = next(whole)
        assert torch.equal(torch.cat([first[0], second[0]]), images)
        assert torch.equal(torch.cat([first[1]["y"], second[1]["y"]]), extra["y"])


# Images that cannot be read


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_image_takes_the_place_of_one_that_cannot_be_read(greys, capsys, num_workers):
    folder = greys(10)
    bad = {order(10, 0, 10)[i] for i in (3, 4, 9, 0)}  # neighbours, of which two are the last and first of the epoch
    for i in bad:
        (folder / f"{i:02}.png").write_bytes(b"no image")
    stream = stream_of(folder, num_workers=num_workers)
    images, _ = take(stream, 5)

    expected = []
    for epoch in order(10, 0, 10), order(10, 0, 20)[10:]:
        expected += [next(i for i in epoch[k:] + epoch[:k] if i not in bad) for k in range(10)]
    assert numbers(images) == expected
    assert sorted(stream.unreadable) == sorted(f"{i:02}.png" for i in bad)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and sorted(lines) == [
        f"warning: image '{folder}/{i:02}.png' cannot be read: it is not one of {', '.join(image_io.FORMATS)}; "
        "replaced by the next image"
        for i in sorted(bad)
    ]


def test_a_replacement_brings_its_own_class_and_is_cropped_as_the_one_that_is_not_there(pictures, tmp_path):
    good = Image.open(pictures / "odd" / "1.png")
    for name in "a", "b":
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "x.png").touch()
    good.save(tmp_path / "b" / "x.png")
    stream = stream_of(tmp_path, batch_size=1, class_cond=True, deterministic=True, random_crop=True)
    stream.seek(6)
    images, extra = next(stream)
    rng = random.Random("0 6")
    expected = image_io.random_crop_arr(good, SIZE, rng=rng)
    expected = image_io.to_float(expected[:, ::-1] if rng.random() < 0.5 else expected)
    assert extra["y"].tolist() == [1]
    np.testing.assert_array_equal(images[0], expected.transpose(2, 0, 1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_image_can_be_read(tmp_path, capsys, num_workers):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").symlink_to(tmp_path / "missing")
    stream = stream_of(tmp_path, num_workers=num_workers, deterministic=True, flag="--val_data_dir")
    with pytest.raises(UserError) as error:
        next(stream)
    assert str(error.value) == (
        f"none of the images in {str(tmp_path)!r} (--val_data_dir) can be read; "
        f"the first: image '{tmp_path}/a.png' cannot be read: it is not one of {', '.join(image_io.FORMATS)}"
    )
    del error  # its traceback would keep the stream's workers
    assert list(stream.unreadable) == ["a.png", "b.png"] and capsys.readouterr().err == ""
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    assert stream.position == 0 and numbers(next(stream)[0]) == [0, 0, 0, 0] and stream.position == 4


# The data set


def test_digest_tells_data_sets_apart(pictures, greys, tmp_path):
    labels = tmp_path / "labels"
    labels.write_text("".join(f"{i} n01440764\n" for i in range(10)))
    paths = sorted(str(path.relative_to(pictures)) for path in pictures.glob("*/*.png"))
    plain = stream_of(pictures)
    assert plain.digest == hashlib.sha256(json.dumps([paths, None]).encode()).hexdigest() and plain.classes is None
    assert stream_of(f"{pictures}/", batch_size=1, seed=1).digest == plain.digest
    others = [stream_of(pictures, class_cond=True), stream_of(pictures, class_cond=True, labels_file=str(labels))]
    others += [stream_of(greys(2)), stream_of(greys(3))]
    assert len({stream.digest for stream in [plain, *others]}) == 5


def test_classes_by_a_labels_file(greys, tmp_path):
    (tmp_path / "labels").write_text("00 n01443537\n01 n01440764\n02 n15075141\n")
    stream = stream_of(
        greys(3), batch_size=3, deterministic=True, class_cond=True, labels_file=str(tmp_path / "labels")
    )
    assert next(stream)[1]["y"].tolist() == [1, 0, 999] and len(stream.classes.names) == 3


def test_mistakes(greys, tmp_path):
    with pytest.raises(UserError, match=r"missing' does not exist \(--val_data_dir\)$"):
        stream_of(tmp_path / "missing", flag="--val_data_dir")
    for flag in ("--data_dir", "--val_data_dir"):
        with pytest.raises(UserError, match=rf"^the model needs the classes .* unknown in .* \({flag}\)"):
            stream_of(greys(2), class_cond=True, flag=flag)
    with pytest.raises(UserError, match=r"^--seed is -1; expected 0 or more$"):
        stream_of(greys(2), seed=-1)
    with pytest.raises(UserError, match=r"^--labels_file .* cannot be read: No such file"):
        stream_of(greys(2), class_cond=True, labels_file=str(tmp_path / "missing"))


def test_more_classes_than_a_model_knows(tmp_path):
    for i in range(1001):
        (tmp_path / f"{i}_0.png").touch()
    with pytest.raises(UserError, match=r"^1001 classes in .* \(--data_dir\); expected at most 1000"):
        stream_of(tmp_path, class_cond=True)
    (tmp_path / "1000_0.png").unlink()
    assert stream_of(tmp_path, class_cond=True).classes.names.keys() == set(range(1000))


# The map-style data set


def test_shards_are_disjoint_and_complete():
    paths, classes = [f"{i}.jpg" for i in range(10)], list(range(10))
    shards = [ImageDataset(8, paths, classes, shard=i, num_shards=3) for i in range(3)]
    assert [len(shard) for shard in shards] == [4, 3, 3]
    assert sorted(path for shard in shards for path in shard.local_images) == paths
    assert sorted(label for shard in shards for label in shard.local_classes) == classes
    for shard in shards:
        assert [f"{label}.jpg" for label in shard.local_classes] == shard.local_images


def test_flip_mirrors_about_half_of_the_time(tmp_path):
    Image.fromarray(np.repeat(np.array([[[0], [255]]], dtype=np.uint8), 3, axis=-1)).resize((16, 16)).save(
        tmp_path / "x.png"
    )
    random.seed(0)
    flipping = ImageDataset(8, [str(tmp_path / "x.png")], random_flip=True)
    straight = ImageDataset(8, [str(tmp_path / "x.png")], random_flip=False)
    upright = straight[0][0]
    assert upright.shape == (3, 8, 8) and upright.dtype == np.float32 and straight[0][1] == {}
    seen = [flipping[0][0] for _ in range(100)]
    flips = sum(np.array_equal(image, upright[:, :, ::-1]) for image in seen)
    assert 30 < flips < 70
    assert flips + sum(np.array_equal(image, upright) for image in seen) == 100
    batch, _ = next(iter(DataLoader(flipping, batch_size=1)))
    assert batch.shape == (1, 3, 8, 8)
