"""Messages on stderr, and metrics in progress.csv and progress.json.

Only rank 0 writes; the other ranks report errors. Messages do not break a tqdm progress bar.
"""

import csv
import functools
import io
import json
import logging
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import UserError
from .system.files import set_aside, write_whole
from .system.log_formats import CSVOutputFormat as CSVOutputFormat
from .system.log_formats import HumanOutputFormat as HumanOutputFormat
from .system.log_formats import JSONOutputFormat as JSONOutputFormat
from .system.log_formats import KVWriter, SeqWriter, as_text, check_formats, make_output_format, plain
from .system.log_formats import TensorBoardOutputFormat as TensorBoardOutputFormat

DEBUG, INFO, WARN, ERROR, DISABLED = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, 50
DEFAULT_FORMATS = ("stdout", "log", "csv", "json")


def _prefix(level: int) -> str:
    return "error: " if level >= ERROR else "warning: " if level >= WARN else ""


def _rank() -> int:
    """Rank of this process. Does not import torch."""
    dist_util = sys.modules.get(f"{__package__}.dist_util")
    return dist_util.get_rank() if dist_util else 0


class _Screen(KVWriter):
    """Messages on stderr, above a progress bar if there is one, and a line of metrics if `metrics` is True."""

    def __init__(self, metrics: bool = True):
        self.metrics = metrics

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        if self.metrics:
            self.write("  ".join(f"{key} {as_text(val)}" for key, val in kvs.items()), INFO)

    def write(self, text: str, level: int) -> None:
        if level >= ERROR or _rank() == 0:
            with suppress(OSError, ValueError):  # stderr may be closed
                # In a single write, because other ranks write to the same stream.
                tqdm.write(f"{_prefix(level)}{text}\n", file=sys.stderr, end="")


class Logger:
    """Metrics waiting to be written, and the writers of metrics and messages. `configure` creates the current one.

    Args:
        dir: folder of the files; None: no files.
        output_formats: writers of metrics and messages.
        comm: MPI communicator over which `dumpkvs` averages; None: rank 0 writes its own values.

    Attributes:
        CURRENT: current logger, if any.
        DEFAULT: logger that `get_current` created because the script had not called `configure`, if any.
        name2val: metrics for the next `dumpkvs`; a missing one counts as 0.
        earlier_files: progress.csv and progress.json of an earlier run, which existed before `configure`.
    """

    CURRENT: "Logger | None" = None
    DEFAULT: "Logger | None" = None

    def __init__(self, dir: str | None, output_formats: Iterable[KVWriter | SeqWriter], comm: Any = None):
        self.name2val: dict[str, Any] = defaultdict(float)
        self.name2cnt: dict[str, int] = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = list(output_formats)
        self.comm = comm
        self.log_suffix = ""
        self.earlier_files: list[Path] = []

    def logkv(self, key: str, val: Any) -> None:
        """Record a metric for the next `dumpkvs`; the last value counts."""
        self.name2val[key] = plain(val)
        self.name2cnt.pop(key, None)

    def logkv_mean(self, key: str, val: float) -> None:
        """Record a metric for the next `dumpkvs`, which writes the mean of all values."""
        self.name2cnt[key] += 1
        old = self.name2val.get(key, 0.0) if self.name2cnt[key] > 1 else 0.0
        self.name2val[key] = old + (plain(val) - old) / self.name2cnt[key]

    def dumpkvs(self) -> dict[str, Any]:
        """Write the recorded metrics on rank 0, clear them and return them."""
        values = dict(self.name2val)
        if self.comm is not None:
            counts = {name: (value, self.name2cnt.get(name, 1)) for name, value in values.items()}
            values = mpi_weighted_mean(self.comm, counts)
        self.name2val.clear()
        self.name2cnt.clear()
        if values and _rank() == 0:
            for writer in self.output_formats:
                if isinstance(writer, KVWriter):
                    writer.writekvs(values)
        return values

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write a message: `args`, separated by spaces."""
        if level < self.level:
            return
        text = " ".join(map(str, args))
        for writer in self.output_formats:
            if isinstance(writer, _Screen):
                writer.write(text, level)
            elif isinstance(writer, SeqWriter) and _rank() == 0:
                writer.writeseq([f"{_prefix(level)}{text}"])

    def set_level(self, level: int) -> None:
        """Drop messages below this level."""
        self.level = level

    def set_comm(self, comm: Any) -> None:
        """Average over another MPI communicator from now on."""
        self.comm = comm

    def get_dir(self) -> str | None:
        """Folder of the files."""
        return self.dir

    def close(self) -> None:
        """Close the files."""
        for writer in self.output_formats:
            if hasattr(writer, "close"):
                writer.close()


_before_configure = Logger(None, [_Screen()])


def get_current() -> Logger:
    """The current logger; calls `configure` if there is none."""
    if Logger.CURRENT is None:
        configure()
        Logger.DEFAULT = Logger.CURRENT
    return Logger.CURRENT


def configure(
    dir: str | os.PathLike | None = None,
    format_strs: Iterable[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
) -> None:
    """Create the current logger. Call `setup_dist()` first. Existing files are appended to.

    Args:
        dir: folder of the metrics; by default OPENAI_LOGDIR, else a new temporary folder.
        format_strs: any of "stdout" (metrics as a line on stderr), "log" (messages and metrics in log.txt), "csv",
            "json" and "tensorboard"; by default OPENAI_LOG_FORMAT (comma-separated), else the first four.
        comm: see `Logger`.
        log_suffix: appended to the stems of the file names.

    Raises UserError if a format is unknown or the folder cannot be created.
    """
    formats = list(filter(None, format_strs or os.environ.get("OPENAI_LOG_FORMAT", "").split(","))) or DEFAULT_FORMATS
    check_formats(formats)
    named = dir or os.environ.get("OPENAI_LOGDIR")
    if named:
        folder = Path(named).expanduser()
        _make_dir(folder)
    else:
        try:
            folder = Path(tempfile.mkdtemp(prefix=datetime.now().strftime("guided_diffusion-%Y-%m-%d-%H-%M-%S-")))
        except OSError as error:
            raise UserError(f"cannot create a temporary log folder: {error.strerror}. Set OPENAI_LOGDIR") from error
    writers: list[KVWriter] = [_Screen("stdout" in formats)]
    if _rank() == 0:
        writers += [make_output_format(name, folder, log_suffix) for name in formats if name != "stdout"]
    current = Logger(str(folder), writers, comm)
    current.log_suffix, current.level = log_suffix, (Logger.CURRENT or _before_configure).level
    Logger.CURRENT = current
    current.earlier_files = [path for path in _progress_files() if path.exists()]
    if not named:
        info(f"logging to {folder}")


def _make_dir(folder: Path) -> None:
    if _rank() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the log folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to the log folder {folder}")


def make_dir() -> None:
    """Create the folder OPENAI_LOGDIR, if it is set; for scripts that record no metrics.

    Raises UserError if it cannot be created or written to.
    """
    if folder := os.environ.get("OPENAI_LOGDIR"):
        _make_dir(Path(folder).expanduser())


def reset() -> None:
    """Close the files and remove the current logger. The one before `configure`, `Logger.DEFAULT`, takes its place."""
    if Logger.CURRENT is not None:
        Logger.CURRENT.close()
    if Logger.CURRENT is Logger.DEFAULT:
        Logger.DEFAULT = None
    Logger.CURRENT = Logger.DEFAULT


@contextmanager
def scoped_configure(
    dir: str | os.PathLike | None = None, format_strs: Iterable[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """Use another logger, created by `configure`, within a `with` block."""
    before = Logger.CURRENT
    configure(dir, format_strs, comm)
    try:
        yield
    finally:
        reset()
        Logger.CURRENT = before


def choose_dir(output: str, default: str) -> str:
    """Folder of a run's results: `output`, else OPENAI_LOGDIR, else `default`."""
    return output or os.environ.get("OPENAI_LOGDIR") or default


def get_dir() -> str:
    """Folder of the metrics."""
    return get_current().get_dir()


def set_level(level: int) -> None:
    """Drop messages below this level (DEBUG, INFO, WARN, ERROR), or all of them (DISABLED)."""
    for each in filter(None, (Logger.CURRENT, _before_configure)):
        each.set_level(level)


def set_comm(comm: Any) -> None:
    """See `Logger.set_comm`."""
    get_current().set_comm(comm)


def log(*args: Any, level: int = INFO) -> None:
    """Write a message: `args`, separated by spaces."""
    (Logger.CURRENT or _before_configure).log(*args, level=level)


def debug(*args: Any) -> None:
    """Write a message for developers."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """Write a message."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """Write a warning, prefixed with "warning: "."""
    log(*args, level=WARN)


@functools.cache
def warn_once(text: str) -> None:
    """Write a warning, once per process."""
    warn(text)


def error(*args: Any) -> None:
    """Write an error, prefixed with "error: ", on any rank."""
    log(*args, level=ERROR)


def logkv(key: str, val: Any) -> None:
    """See `Logger.logkv`."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: float) -> None:
    """See `Logger.logkv_mean`."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """`logkv` for each entry."""
    for key, val in d.items():
        logkv(key, val)


def getkvs() -> dict[str, Any]:
    """The metrics recorded since the last `dumpkvs`, which the caller may change; a missing one counts as 0."""
    return get_current().name2val


def dumpkvs() -> dict[str, Any]:
    """See `Logger.dumpkvs`."""
    return Logger.CURRENT.dumpkvs() if Logger.CURRENT else {}


record_tabular = logkv
dump_tabular = dumpkvs


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the duration of a `with` block, in seconds, to the metric "wait_SCOPENAME"."""
    start = time.time()
    try:
        yield
    finally:
        key, values = f"wait_{scopename}", get_current().name2val
        values[key] = values.get(key, 0.0) + time.time() - start


def profile(n: str) -> Callable[[Callable], Callable]:
    """Decorator that adds the duration of each call, in seconds, to the metric "wait_N"."""
    return profile_kv(n)


def get_rank_without_mpi_import() -> int:
    """Rank of this process; before `setup_dist`, from the environment variables of MPI launchers."""
    names = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
    return _rank() or next((int(os.environ[name]) for name in names if name in os.environ), 0)


def mpi_weighted_mean(comm: Any, local_name2valcount: Mapping[str, tuple[Any, float]]) -> dict[str, float]:
    """Weighted means over the ranks of an MPI communicator, on its rank 0; empty on the others.

    Args:
        comm: mpi4py communicator.
        local_name2valcount: name -> (value, weight) on this rank. Non-numeric values are skipped.
    """
    gathered = comm.gather(dict(local_name2valcount))
    if comm.rank != 0:
        return {}
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for name, (value, weight) in (item for of_rank in gathered for item in of_rank.items()):
        try:
            sums[name] += weight * float(value)
            weights[name] += weight
        except (TypeError, ValueError):
            warn(f"{name} is {value!r}, not a number: left out of the mean over the ranks")
    return {name: sums[name] / weights[name] for name in sums if weights[name]}


def set_aside_files() -> None:
    """Rename the `earlier_files`, progress.csv and progress.json, to progress.1.csv and so on. Raises OSError.

    A new run must not append to the log of another one, such as one that was killed before its first checkpoint. What
    this process has written belongs to the new run.
    """
    if renamed := set_aside(*map(str, _take_earlier_files())):
        names = ", ".join(map(os.path.basename, renamed.values()))
        info(f"the log in {get_dir()} belongs to an earlier run: renamed to {names}")


def rewind(key: str, last: float) -> None:
    """Drop the lines with `key` > `last` from progress.csv and progress.json, on rank 0. Raises OSError.

    A run resumed from a checkpoint logs those steps again, so the files end up as if the run had never been killed. A
    truncated last line is dropped too; lines without the key stay. Each file is rewritten atomically.
    """
    _take_earlier_files()  # they are this run's
    for path in _progress_files():
        values_of = _csv_values if path.suffix == ".csv" else _json_values
        if not path.exists():
            continue
        data = path.read_bytes()
        lines = [line + b"\n" for line in data.split(b"\n")[:-1]]  # without a truncated last line
        kept = b"".join(line for line, value in values_of(lines, key) if not _is_above(value, last))
        if kept != data:
            write_whole(str(path), kept)


def _take_earlier_files() -> list[Path]:
    """The current logger's `earlier_files`, which it forgets."""
    current = Logger.CURRENT
    if current is None:
        return []
    files, current.earlier_files = current.earlier_files, []
    return files


def _progress_files() -> list[Path]:
    """Paths of the current logger's progress.csv and progress.json on rank 0; none without a folder."""
    current = Logger.CURRENT
    if current is None or not current.dir or _rank() != 0:
        return []
    return [Path(current.dir) / f"progress{current.log_suffix}.{kind}" for kind in ("csv", "json")]


class _Tolerant:
    """stderr for a progress bar, which must not end a run if the terminal is gone, or the disk of a log file full."""

    def __init__(self, stream: Any):
        self._wrapped = stream  # a name by which tqdm compares streams

    def works(self) -> bool:
        """Whether there is a stream, and everything written to it so far has arrived."""
        try:
            self._wrapped.flush()
        except (OSError, ValueError, AttributeError):
            return False
        return True

    def write(self, text: str) -> None:
        """Write as far as possible."""
        with suppress(OSError, ValueError):
            self._wrapped.write(text)

    def flush(self) -> None:
        """Flush as far as possible."""
        with suppress(OSError, ValueError):
            self._wrapped.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __eq__(self, other: object) -> bool:
        return self._wrapped == getattr(other, "_wrapped", other)

    def __hash__(self) -> int:
        return hash(self._wrapped)


def progress_bar(total: int | None, desc: str, unit: str, initial: int = 0, kind: Callable[..., tqdm] = tqdm) -> tqdm:
    """Progress bar on rank 0, hidden if nothing is left to do. In a log file, it prints a line per minute.

    `kind` is the class of the bar.
    """
    stream = _Tolerant(sys.stderr)
    works = stream.works()
    return kind(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        file=stream,
        disable=_rank() != 0 or total == initial or not works,
        mininterval=0.2 if works and sys.stderr.isatty() else 60,
        dynamic_ncols=True,
    )


def _csv_values(lines: Iterable[bytes], key: str) -> Iterator[tuple[bytes, str | None]]:
    """Each row, including the header, and its value of `key`, or None."""
    header, row = None, b""
    for line in lines:
        row += line
        if row.count(b'"') % 2:  # the line ends inside quotes
            continue
        cells = next(csv.reader(io.StringIO(row.decode(errors="replace"), newline="")))
        header = header or cells
        yield row, dict(zip(header, cells, strict=False)).get(key)
        row = b""


def _json_values(lines: Iterable[bytes], key: str) -> Iterator[tuple[bytes, Any]]:
    """Each line and its value of `key`, or None."""
    for line in lines:
        try:
            yield line, json.loads(line).get(key)
        except (ValueError, AttributeError):  # not written by this logger
            yield line, None


def _is_above(value: Any, last: float) -> bool:
    try:
        return float(value) > last
    except (TypeError, ValueError):
        return False
