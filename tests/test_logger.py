"""Messages and metrics. That only rank 0 speaks is tested with real ranks in test_dist_util.py."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from guided_diffusion import logger
from guided_diffusion.errors import UserError
from guided_diffusion.system.other_scripts import REPOSITORY

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A logger without folder and metrics, before and after."""
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    monkeypatch.delenv("OPENAI_LOG_FORMAT", raising=False)
    logger.reset()
    yield
    logger.reset()
    logger.set_level(logger.INFO)


def rows(folder, name="progress.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def test_messages(capsys):
    logger.debug("hidden")
    logger.log("a", 1, None)
    logger.info("100%", "of {x}")
    logger.warn("careful")
    logger.error("broken")
    logger.set_level(logger.ERROR)
    logger.warn("hidden")
    logger.set_level(logger.DISABLED)
    logger.error("hidden")
    logger.set_level(logger.DEBUG)
    logger.debug("seen")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["a 1 None", "100% of {x}", "warning: careful", "error: broken", "seen"]
    assert captured.out == ""


class Breaking(io.StringIO):
    """A stream that fails after `left` writes."""

    left = 0

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)

    def flush(self):
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("left", [None, -1, 0, 1, 2, 3, 5])
def test_a_progress_bar_goes_on_without_stderr(left, monkeypatch):
    stream = None if left is None else Breaking()
    if stream:
        stream.left = left
    monkeypatch.setattr(sys, "stderr", stream)
    with logger.progress_bar(3, "working", "step") as bar:
        bar.mininterval = 0
        for _ in range(3):
            time.sleep(0.01)
            bar.update()
            bar.set_postfix(images=1)
            logger.info("said")


def test_messages_do_not_break_a_progress_bar(capsys):
    with logger.progress_bar(2, "", "step") as bar:
        bar.mininterval, bar.ncols = 0, 40
        bar.update(1)
        time.sleep(0.01)
        logger.info("said")
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert "said" in lines  # on a line of its own


def test_metrics(tmp_path, capsys):
    logger.configure(dir=tmp_path / "a" / "b")
    assert logger.get_dir() == str(tmp_path / "a" / "b")
    logger.logkv("step", 1)
    logger.logkv("step", 2)
    for loss in torch.tensor(1.0), np.float32(2.0), 6:
        logger.logkv_mean("loss", loss)
    logger.logkvs({"lr": 0.5, "note": "x, y"})
    expected = {"step": 2, "loss": 3.0, "lr": 0.5, "note": "x, y"}
    assert logger.getkvs() == expected
    assert logger.dumpkvs() == expected
    assert logger.getkvs() == {} and logger.dumpkvs() == {}
    logger.logkv_mean("loss", 10)  # the mean starts anew
    logger.logkv("step", 3)
    logger.dumpkvs()
    assert rows(tmp_path / "a" / "b") == [
        {"step": "2", "loss": "3.0", "lr": "0.5", "note": "x, y"},
        {"step": "3", "loss": "10.0", "lr": "", "note": ""},
    ]
    lines = (tmp_path / "a" / "b" / "progress.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [expected, {"loss": 10.0, "step": 3}]
    assert capsys.readouterr().err.splitlines()[0] == "step 2  loss 3  lr 0.5  note x, y"


def test_columns_that_come_later_and_a_second_run(tmp_path):
    for values in {"a": 1}, {"a": 2, "b": 3}, {"c": "line\nbreak", "a": 4}, {"b": 5}:
        logger.configure(dir=tmp_path)  # as a run that is started again does
        logger.logkvs(values)
        logger.dumpkvs()
    assert rows(tmp_path) == [
        {"a": "1", "b": "", "c": ""},
        {"a": "2", "b": "3", "c": ""},
        {"a": "4", "b": "", "c": "line\nbreak"},
        {"a": "", "b": "5", "c": ""},
    ]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["log.txt", "progress.csv", "progress.json"]


def test_numbers_that_json_lacks(tmp_path):
    logger.configure(dir=tmp_path, format_strs=["json"], log_suffix="_x")
    logger.logkvs({"loss": float("nan"), "grad": torch.tensor(float("inf")), "where": Path("a")})
    logger.dumpkvs()
    assert [f.name for f in tmp_path.iterdir()] == ["progress_x.json"]
    assert json.loads((tmp_path / "progress_x.json").read_text()) == {"loss": None, "grad": None, "where": "a"}


def test_folder_and_formats_from_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv")
    logger.configure()
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert rows(tmp_path) == [{"a": "1"}] and capsys.readouterr().err == ""


def test_nothing_to_write_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    logger.info("hello")
    assert logger.dumpkvs() == {} and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"cannot create a temporary log folder: No such file or directory\. Set"):
        logger.configure()


def log_steps(folder, steps):
    """The lines of some steps of a training; one column comes late, and one is a text."""
    logger.configure(dir=folder, format_strs=["csv", "json"])
    for step in steps:
        logger.logkvs({"step": step, "loss": 1 / (step + 1), "note": f'"{step}",\nquoted'})
        if step >= 30:
            logger.logkv("later", step)
        logger.dumpkvs()


def progress(folder):
    return {name: (folder / name).read_bytes() for name in ("progress.csv", "progress.json")}


@pytest.mark.parametrize("killed_at", [20, 40])
def test_rewound_and_written_again_is_as_if_never_killed(tmp_path, killed_at):
    """Killed at any byte that it wrote after the checkpoint of step 10."""
    log_steps(tmp_path / "whole", range(0, 50, 10))
    log_steps(tmp_path / "killed", range(0, killed_at + 1, 10))
    killed = progress(tmp_path / "killed")
    # How much of each file was there at the checkpoint. Where the late column came, the header and the rows are longer.
    log_steps(tmp_path / "safe", [0, 10])
    safe = {name: len(data) for name, data in progress(tmp_path / "safe").items()}
    if killed_at >= 30:
        safe["progress.csv"] += len(",later") + 2 * len(",")
    cuts = range(max(len(killed[name]) - safe[name] for name in killed) + 1)
    for cut in cuts[:: 1 if killed_at == 20 else 5]:
        for name, data in killed.items():
            (tmp_path / "killed" / name).write_bytes(data[: safe[name] + cut])
        logger.configure(dir=tmp_path / "killed")
        logger.rewind("step", 10)
        assert [row["step"] for row in rows(tmp_path / "killed")] == ["0", "10"]
        if cut % 10 == 0:
            log_steps(tmp_path / "killed", range(20, 50, 10))
            assert progress(tmp_path / "killed") == progress(tmp_path / "whole")
    assert sorted(f.name for f in (tmp_path / "killed").iterdir()) == ["progress.csv", "progress.json"]


def test_rewind_to_the_start_and_to_the_end(tmp_path):
    log_steps(tmp_path, range(0, 50, 10))
    before = progress(tmp_path)
    inodes = [f.stat().st_ino for f in sorted(tmp_path.iterdir())]
    logger.rewind("step", 40)
    logger.rewind("epoch", 0)  # no such column
    assert progress(tmp_path) == before and [f.stat().st_ino for f in sorted(tmp_path.iterdir())] == inodes
    logger.rewind("step", -1)
    assert progress(tmp_path) == {"progress.csv": b"step,loss,note,later\r\n", "progress.json": b""}
    log_steps(tmp_path, range(0, 50, 10))
    assert progress(tmp_path) == before


def test_rewind_leaves_lines_without_the_key(tmp_path):
    csv_lines = b"a,step\r\n\xff,9\r\n2,\r\n3\r\n4,1e1\r\n5,nan\r\n6,n/a\r\n\r\n7,10.5\r\n"
    json_lines = b'{"step": 9.5}\n{"a": 11}\nnot json\n[11]\n{"step": null}\n{"step": 11}\n{"step": 9}\n{"step": 1'
    (tmp_path / "progress.csv").write_bytes(csv_lines)
    (tmp_path / "progress.json").write_bytes(json_lines)
    logger.configure(dir=tmp_path)
    logger.rewind("step", 9.5)
    assert progress(tmp_path) == {
        "progress.csv": b"a,step\r\n\xff,9\r\n2,\r\n3\r\n5,nan\r\n6,n/a\r\n\r\n",
        "progress.json": b'{"step": 9.5}\n{"a": 11}\nnot json\n[11]\n{"step": null}\n{"step": 9}\n',
    }


def test_rewind_without_a_folder_a_file_or_the_first_rank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger.rewind("step", 0)
    logger.configure(dir=tmp_path, log_suffix="_x")
    logger.rewind("step", 0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "progress.csv").write_bytes(b"step\r\n1\r\n")
    (tmp_path / "progress_x.csv").write_bytes(b"step\r\n1\r\n")
    monkeypatch.setattr(logger, "_rank", lambda: 1)
    logger.rewind("step", 0)
    assert (tmp_path / "progress_x.csv").read_bytes() == b"step\r\n1\r\n"
    monkeypatch.setattr(logger, "_rank", lambda: 0)
    logger.rewind("step", 0)
    assert (tmp_path / "progress_x.csv").read_bytes() == b"step\r\n"
    assert (tmp_path / "progress.csv").read_bytes() == b"step\r\n1\r\n"


def test_rewind_on_a_full_disk_leaves_the_file_whole(tmp_path, monkeypatch):
    log_steps(tmp_path, range(0, 50, 10))
    before = progress(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*progress\.csv"):
        logger.rewind("step", 10)
    assert progress(tmp_path) == before and len(list(tmp_path.iterdir())) == 2


def test_set_aside_files(tmp_path, monkeypatch):
    logger.set_aside_files()  # there is no folder
    for suffix in "", "_x":
        logger.configure(tmp_path, ("csv", "json"), log_suffix=suffix)
        logger.set_aside_files()  # there is no file
        for n in range(3):
            logger.logkv("n", n)
            logger.dumpkvs()
            logger.set_aside_files()  # the files are this process's own
            assert (tmp_path / f"progress{suffix}.csv").exists()
            logger.configure(tmp_path, ("csv", "json"), log_suffix=suffix)  # as the next process does
            if n == 1:  # a number that is free for one of the two is not taken
                (tmp_path / f"progress{suffix}.2.json").write_text("another's")
            monkeypatch.setattr(logger, "_rank", lambda: 1)
            logger.configure(tmp_path, ("csv", "json"), log_suffix=suffix)
            logger.set_aside_files()
            monkeypatch.setattr(logger, "_rank", lambda: 0)
            logger.configure(tmp_path, ("csv", "json"), log_suffix=suffix)
            logger.set_aside_files()
    numbers = {"csv": (1, 3, 4), "json": (1, 2, 3, 4)}
    names = {f"progress{suffix}.{n}.{kind}" for suffix in ("", "_x") for kind in numbers for n in numbers[kind]}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert [rows(tmp_path, f"progress_x.{n}.csv") for n in (1, 3, 4)] == [[{"n": str(n)}] for n in range(3)]
    assert (tmp_path / "progress.2.json").read_text() == "another's"


def test_a_continued_log_is_not_set_aside_later(tmp_path):
    """By another run of the same process, which starts from scratch."""
    for _ in range(2):
        logger.configure(tmp_path, ("csv",))
        logger.logkv("step", 1)
        logger.dumpkvs()
    logger.rewind("step", 1)
    logger.set_aside_files()
    assert [row["step"] for row in rows(tmp_path)] == ["1", "1"]


def test_the_curves_of_tensorboard_go_on_after_resuming(tmp_path, monkeypatch):
    """By the metric "step"; lines without it are counted."""
    points = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path / "tb")

        def add_scalar(self, key, value, step):
            points.append((key, value, step))

        flush = close = lambda self: None

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    for steps in (torch.tensor(10), 20), (np.int64(20), 30):
        logger.configure(tmp_path, ("tensorboard",))
        for step in steps:
            logger.logkvs({"loss": 0.5, "step": step, "note": "x"})
            logger.dumpkvs()
    logger.logkv("loss", 0.25)
    logger.dumpkvs()
    assert [step for key, _, step in points if key == "loss"] == [10, 20, 20, 30, 31]
    assert ("step", 20, 20) in points and ("loss", 0.25, 31) in points


def test_mistakes(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot create the log folder .*file/sub: Not a directory"):
        logger.configure(dir=tmp_path / "file" / "sub")
    with pytest.raises(UserError, match="unknown log format xml: expected some of stdout, log, csv, json, tensorboard"):
        logger.configure(format_strs=["csv", "xml"])


def test_logging_needs_no_torch():
    code = "import sys; from guided_diffusion import logger; logger.info('hello'); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr == "hello\n"
