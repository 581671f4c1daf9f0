"""Other people's training scripts: what they import, call and override, written as they write it.

They know the interface of guided-diffusion and nothing of ours.
"""

import csv
import inspect
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion import dist_util, logger


@pytest.fixture(autouse=True)
def _tidy(monkeypatch, tmp_path):
    """A process that has logged nothing yet, whose temporary folder is empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for variable in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "DIFFUSION_BLOB_LOGDIR"):
        monkeypatch.delenv(variable, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logger.reset()
    yield
    logger.reset()
    logger.set_level(logger.INFO)
    torch.set_num_threads(threads)


def read_csv(folder):
    with open(Path(folder) / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


# The logger


def test_a_script_that_names_no_folder_gets_a_new_one(tmp_path, capfd):
    logger.configure()
    logger.log("sampling...")
    path = os.path.join(logger.get_dir(), "samples_2x8x8x3.npz")
    np.savez(path, np.zeros((2, 8, 8, 3), np.uint8))
    logger.logkv("loss", 0.5)
    logger.dumpkvs()
    folder = Path(path).parent
    assert folder.parent == tmp_path / "tmp" and f"logging to {folder}" in capfd.readouterr().err
    assert {f.name for f in folder.iterdir()} >= {"samples_2x8x8x3.npz", "log.txt", "progress.csv"}
    assert read_csv(folder) == [{"loss": "0.5"}]
    assert "sampling...\n" in (folder / "log.txt").read_text()
    logger.configure()
    assert logger.get_dir() != str(folder)


def test_a_script_that_never_configures_gets_a_folder_too(tmp_path):
    logger.info("hello")
    assert not list((tmp_path / "tmp").iterdir())
    assert Path(logger.get_dir()).parent == tmp_path / "tmp"


@pytest.mark.parametrize("by_environment", [False, True])
def test_the_log_in_the_formats_of_the_original(tmp_path, monkeypatch, by_environment, capfd):
    if by_environment:
        monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,log,csv")
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "log"))
        logger.configure()
    else:
        logger.configure(dir=str(tmp_path / "log"), format_strs=["stdout", "log", "csv"])
    logger.warn("careful")
    logger.debug("hidden")
    logger.logkv_mean("loss", 1.0)
    logger.logkv_mean("loss", 2.0)
    logger.logkv("step", 10)
    logger.dumpkvs()
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["log.txt", "progress.csv"]
    text = (tmp_path / "log/log.txt").read_text()
    assert text == "warning: careful\nloss  1.5\nstep  10\n\n"
    assert capfd.readouterr().err == "warning: careful\nloss 1.5  step 10\n"


def test_loggers_within_loggers(tmp_path):
    logger.configure(dir=str(tmp_path / "outer"), format_strs=["csv"])
    logger.logkv("a", 1)
    with logger.scoped_configure(dir=str(tmp_path / "inner"), format_strs=["csv", "log"]):
        assert logger.get_dir() == str(tmp_path / "inner")
        logger.logkv("b", 2)
        with logger.profile_kv("sleep"):
            pass
        logger.profile("call")(lambda: logger.info("called"))()
        logger.dumpkvs()
    logger.dumpkvs()
    assert read_csv(tmp_path / "outer") == [{"a": "1"}]
    (row,) = read_csv(tmp_path / "inner")
    assert list(row) == ["b", "wait_sleep", "wait_call"] and 0 <= float(row["wait_sleep"]) < 60
    assert (tmp_path / "inner/log.txt").read_text().startswith("called\n")

    class Squares(logger.KVWriter):
        seen = ()

        def writekvs(self, kvs):
            self.seen = {key: value**2 for key, value in kvs.items()}

    squares = Squares()
    own = logger.Logger(dir=str(tmp_path), output_formats=[squares, logger.HumanOutputFormat(str(tmp_path / "own.txt"))])
    own.logkv("x", 3)
    own.log("mine", 1)
    own.set_level(logger.ERROR)
    own.log("hidden")
    assert own.dumpkvs() == {"x": 3} and squares.seen == {"x": 9} and own.get_dir() == str(tmp_path)
    own.close()
    assert (tmp_path / "own.txt").read_text() == "mine 1\nx  3\n\n"
    assert logger.get_current().get_dir() == str(tmp_path / "outer")
    writer = logger.make_output_format("json", str(tmp_path / "new"), "_x")
    writer.writekvs({"loss": torch.tensor(0.5)})
    writer.close()
    assert (tmp_path / "new/progress_x.json").read_text() == '{"loss": 0.5}\n'


def test_means_over_the_ranks_of_a_communicator(tmp_path):
    """Of a client that hands one over; its other rank has logged a loss of 4 three times."""

    class Communicator:
        rank = 0

        def gather(self, mine):
            return [mine, {"loss": (4.0, 3), "note": ("n", 1)}]

    logger.configure(dir=str(tmp_path), format_strs=["csv"], comm=Communicator())
    logger.logkv_mean("loss", 8.0)
    assert logger.dumpkvs() == {"loss": 5.0} and read_csv(tmp_path) == [{"loss": "5.0"}]
