"""Writers of metrics and messages: text, CSV, JSON, TensorBoard.

Existing files are appended to. Text, CSV and JSON files are open only during a write, so they may be renamed any time.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError
from .files import write_whole

FORMATS = ("stdout", "log", "csv", "json", "tensorboard")


class KVWriter:
    """Writer of metrics."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write a value for each name."""
        raise NotImplementedError

    def close(self) -> None:
        """Close whatever the writer has opened; by default, nothing."""


class SeqWriter:
    """Writer of messages."""

    def writeseq(self, seq: Iterable[Any]) -> None:
        """Write a message: the items of `seq`, separated by spaces."""
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """Messages as lines and metrics as a table, in a file given by its path or as an open text file."""

    def __init__(self, filename_or_file: str | os.PathLike | TextIO):
        self.target = filename_or_file

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        width = max(map(len, kvs), default=0)
        self._write("".join(f"{key:<{width}}  {as_text(val)}\n" for key, val in kvs.items()) + "\n")

    def writeseq(self, seq: Iterable[Any]) -> None:
        self._write(" ".join(map(str, seq)) + "\n")

    def _write(self, text: str) -> None:
        if isinstance(self.target, str | os.PathLike):
            with open(self.target, "a") as file:
                file.write(text)
        else:
            self.target.write(text)
            self.target.flush()


class JSONOutputFormat(KVWriter):
    """One JSON object per line."""

    def __init__(self, filename: str | os.PathLike):
        self.path = Path(filename)

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({key: _json_value(plain(val)) for key, val in kvs.items()}) + "\n")


class CSVOutputFormat(KVWriter):
    """One row per call. If a row has new columns, the file is rewritten atomically."""

    def __init__(self, filename: str | os.PathLike):
        self.path = Path(filename)

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        row = {key: plain(val) for key, val in kvs.items()}
        header, old_rows = [], []
        if self.path.exists():
            with open(self.path, newline="") as file:
                header = next(csv.reader(file), [])
        columns = header + [key for key in row if key not in header]
        if columns == header:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, columns).writerow(row)
            return
        if header:
            with open(self.path, newline="") as file:
                old_rows = list(csv.DictReader(file))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows([*old_rows, row])
        write_whole(str(self.path), text.getvalue().encode())


class TensorBoardOutputFormat(KVWriter):
    """Numeric metrics for TensorBoard in the folder `dir`, at the step that the metric "step" gives.

    Without that metric, each call is one step later than the previous one. Raises UserError without the package.
    """

    def __init__(self, dir: str | os.PathLike):
        try:
            from torch.utils.tensorboard import SummaryWriter  # the logger works without torch
        except ImportError as error:
            raise UserError("log format tensorboard needs another package: pip install tensorboard") from error
        self.writer = SummaryWriter(str(dir))
        self.step = 1

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        # Not the number of calls: a resumed run's first line is not step 1.
        step = plain(kvs.get("step"))
        if isinstance(step, int | float) and math.isfinite(step):
            self.step = int(step)
        for key, val in kvs.items():
            if isinstance(val := plain(val), int | float):
                self.writer.add_scalar(key, val, self.step)
        self.writer.flush()
        self.step += 1

    def close(self) -> None:
        self.writer.close()


def check_formats(names: Iterable[str]) -> None:
    """Raise UserError if a format is unknown."""
    if unknown := sorted(set(names) - set(FORMATS)):
        raise UserError(f"unknown log format {', '.join(unknown)}: expected some of {', '.join(FORMATS)}")


def make_output_format(format: str, ev_dir: str | os.PathLike, log_suffix: str = "") -> KVWriter:
    """Writer to stdout, or to log.txt, progress.csv, progress.json or tb/ in the folder `ev_dir`, which is created.

    `log_suffix` is appended to the stems of the file names. Raises UserError if the format is unknown.
    """
    check_formats([format])
    os.makedirs(ev_dir, exist_ok=True)
    if format == "stdout":
        return HumanOutputFormat(sys.stdout)
    if format == "log":
        return HumanOutputFormat(os.path.join(ev_dir, f"log{log_suffix}.txt"))
    if format == "tensorboard":
        return TensorBoardOutputFormat(os.path.join(ev_dir, f"tb{log_suffix}"))
    writer = CSVOutputFormat if format == "csv" else JSONOutputFormat
    return writer(os.path.join(ev_dir, f"progress{log_suffix}.{format}"))


def as_text(value: Any) -> str:
    """A metric for display: floats with five digits, anything else unchanged."""
    value = plain(value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """A Python number from a tensor or array of one number, or a NumPy scalar; anything else unchanged."""
    return value.item() if hasattr(value, "item") and math.prod(value.shape) == 1 else value


def _json_value(value: Any) -> Any:
    """A value that JSON can represent: null for NaN and infinity, text for objects."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)
