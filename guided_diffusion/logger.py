"""What a run says and records: messages on stderr, metrics in progress.csv and progress.json.

Rank 0 speaks; the other ranks only report errors. Messages do not break a tqdm progress bar.
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
from contextlib import contextmanager
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


class _Handler(logging.Handler):
    """Writes to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < ERROR and _rank() != 0:
            return
        try:
            # The line and its end in one piece: other ranks write to the same stream.
            tqdm.write(f"{_prefix(record.levelno)}{self.format(record)}\n", file=sys.stderr, end="")
        except Exception:
            self.handleError(record)


def _prefix(level: int) -> str:
    return "error: " if level >= ERROR else "warning: " if level >= WARN else ""


def _rank() -> int:
    """This process's rank, without importing torch where nothing else has."""
    dist_util = sys.modules.get(f"{__package__}.dist_util")
    return dist_util.get_rank() if dist_util else 0


_logger = logging.getLogger("guided_diffusion")
_logger.setLevel(DEBUG)  # `Logger.level` decides
_logger.propagate = False
if not _logger.handlers:
    _logger.addHandler(_Handler())


class _Screen(KVWriter):
    """Messages on stderr, and a line for the metrics among them if `metrics` says so."""

    def __init__(self, metrics: bool = True):
        self.metrics = metrics

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        if self.metrics:
            self.say("  ".join(f"{key} {as_text(val)}" for key, val in kvs.items()), INFO)

    def say(self, text: str, level: int) -> None:
        _logger.log(level, "%s", text)


class Logger:
    """Metrics that wait to be written, and where they and the messages go. `configure` makes the current one.

    Args:
        dir: folder of the files; None: no files.
        output_formats: writers of metrics and messages.
        comm: an MPI communicator, over whose ranks `dumpkvs` takes the means; None: rank 0 writes its own values.
    """

    CURRENT: "Logger | None" = None

    def __init__(self, dir: str | None, output_formats: Iterable[KVWriter | SeqWriter], comm: Any = None):
        self.name2val: dict[str, Any] = {}
        self.name2cnt: dict[str, int] = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = list(output_formats)
        self.comm = comm
        self.log_suffix = ""

    def logkv(self, key: str, val: Any) -> None:
        """Record one metric for the next `dumpkvs`; the last value counts."""
        self.name2val[key] = plain(val)
        self.name2cnt.pop(key, None)

    def logkv_mean(self, key: str, val: float) -> None:
        """Record one metric for the next `dumpkvs`; the mean of the values since the last one counts."""
        self.name2cnt[key] += 1
        old = self.name2val.get(key, 0.0) if self.name2cnt[key] > 1 else 0.0
        self.name2val[key] = old + (plain(val) - old) / self.name2cnt[key]

    def dumpkvs(self) -> dict[str, Any]:
        """Write the metrics recorded so far, as rank 0, and forget them; returns them."""
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
        """Say `args`, separated by spaces."""
        if level < self.level:
            return
        text = " ".join(map(str, args))
        for writer in self.output_formats:
            if isinstance(writer, _Screen):
                writer.say(text, level)
            elif isinstance(writer, SeqWriter) and _rank() == 0:
                writer.writeseq([f"{_prefix(level)}{text}"])

    def set_level(self, level: int) -> None:
        """Say only messages of this level and above."""
        self.level = level

    def set_comm(self, comm: Any) -> None:
        """Take means over the ranks of another MPI communicator from now on."""
        self.comm = comm

    def get_dir(self) -> str | None:
        """The folder of the files."""
        return self.dir

    def close(self) -> None:
        """Close the files."""
        for writer in self.output_formats:
            if hasattr(writer, "close"):
                writer.close()


_before_configure = Logger(None, [_Screen()])


def get_current() -> Logger:
    """The logger that `configure` made last; it is called first if it was not."""
    if Logger.CURRENT is None:
        configure()
    return Logger.CURRENT


def configure(
    dir: str | os.PathLike | None = None,
    format_strs: Iterable[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
) -> None:
    """Choose where metrics go: the folder `dir`, else the one that OPENAI_LOGDIR names, else a new temporary one.

    `format_strs` are some of "stdout" (a line of metrics among the messages), "log" (messages and metrics in log.txt),
    "csv", "json" and "tensorboard"; by default, those that the environment's OPENAI_LOG_FORMAT (comma-separated) names,
    else the first four. `log_suffix` ends the files' names; of `comm` see `Logger`. Files that exist are continued.
    Call `setup_dist()` before. Raises UserError for an unknown format, or a folder that cannot be made.
    """
    wanted = list(filter(None, format_strs or os.environ.get("OPENAI_LOG_FORMAT", "").split(","))) or DEFAULT_FORMATS
    check_formats(wanted)
    named = dir or os.environ.get("OPENAI_LOGDIR")
    if named:
        folder = Path(named).expanduser()
        _make_dir(folder)
    else:
        try:
            folder = Path(tempfile.mkdtemp(prefix=datetime.now().strftime("guided_diffusion-%Y-%m-%d-%H-%M-%S-")))
        except OSError as error:
            raise UserError(f"no temporary folder for the log: {error.strerror}. Set OPENAI_LOGDIR") from error
    writers: list[KVWriter] = [_Screen("stdout" in wanted)]
    if _rank() == 0:
        writers += [make_output_format(name, folder, log_suffix) for name in wanted if name != "stdout"]
    current = Logger(str(folder), writers, comm)
    current.log_suffix, current.level = log_suffix, (Logger.CURRENT or _before_configure).level
    Logger.CURRENT = current
    if not named:
        info(f"logging to {folder}")


def _make_dir(folder: Path) -> None:
    if _rank() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"log folder {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"log folder {folder} cannot be written to")


def make_dir() -> None:
    """Make the folder that OPENAI_LOGDIR names, if it names one: for scripts that record no metrics.

    Raises UserError if it cannot be made or written to.
    """
    if folder := os.environ.get("OPENAI_LOGDIR"):
        _make_dir(Path(folder).expanduser())


def reset() -> None:
    """Close the files and forget the folder and what was recorded, as if `configure` had never been called."""
    if Logger.CURRENT is not None:
        Logger.CURRENT.close()
        Logger.CURRENT = None


@contextmanager
def scoped_configure(
    dir: str | os.PathLike | None = None, format_strs: Iterable[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """`configure` for the length of a `with` block."""
    before = Logger.CURRENT
    configure(dir, format_strs, comm)
    try:
        yield
    finally:
        reset()
        Logger.CURRENT = before


def choose_dir(output: str, otherwise: str) -> str:
    """The folder of a run's results: `output`, else the one that OPENAI_LOGDIR names, else `otherwise`."""
    return output or os.environ.get("OPENAI_LOGDIR") or otherwise


def get_dir() -> str:
    """The folder of the metrics."""
    return get_current().get_dir()


def set_level(level: int) -> None:
    """Say only messages of this level (DEBUG, INFO, WARN, ERROR) and above; DISABLED: none."""
    for each in filter(None, (Logger.CURRENT, _before_configure)):
        each.set_level(level)


def set_comm(comm: Any) -> None:
    """See `Logger.set_comm`."""
    get_current().set_comm(comm)


def log(*args: Any, level: int = INFO) -> None:
    """Say `args`, separated by spaces."""
    (Logger.CURRENT or _before_configure).log(*args, level=level)


def debug(*args: Any) -> None:
    """Say something that only a developer wants to know."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """Say what is going on."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """Say what may not be as intended; the line begins with "warning: "."""
    log(*args, level=WARN)


@functools.cache
def warn_once(text: str) -> None:
    """`warn`, the first time that this process has something to warn of."""
    warn(text)


def error(*args: Any) -> None:
    """Say what went wrong, on whatever rank; the line begins with "error: "."""
    log(*args, level=ERROR)


def logkv(key: str, val: Any) -> None:
    """Record one metric for the next `dumpkvs`; the last value counts."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: float) -> None:
    """Record one metric for the next `dumpkvs`; the mean of the values since the last one counts."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """`logkv` for each entry."""
    for key, val in d.items():
        logkv(key, val)


def getkvs() -> dict[str, Any]:
    """The metrics recorded since the last `dumpkvs`."""
    return dict(Logger.CURRENT.name2val) if Logger.CURRENT else {}


def dumpkvs() -> dict[str, Any]:
    """Write the metrics recorded so far, as rank 0, and forget them; returns them."""
    return Logger.CURRENT.dumpkvs() if Logger.CURRENT else {}


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds that a `with` block takes to the metric "wait_SCOPENAME"."""
    begin = time.time()
    try:
        yield
    finally:
        key, values = f"wait_{scopename}", get_current().name2val
        values[key] = values.get(key, 0.0) + time.time() - begin


def profile(n: str) -> Callable[[Callable], Callable]:
    """A decorator that adds the seconds of each call to the metric "wait_N"."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate


def get_rank_without_mpi_import() -> int:
    """This process's rank; before `setup_dist`, what MPI's launcher left in the environment."""
    names = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
    return _rank() or next((int(os.environ[name]) for name in names if name in os.environ), 0)


def mpi_weighted_mean(comm: Any, local_name2valcount: Mapping[str, tuple[Any, float]]) -> dict[str, float]:
    """Means over the ranks of an MPI communicator, on its rank 0; nothing on the others.

    Args:
        comm: the communicator, as of mpi4py.
        local_name2valcount: name -> (value, weight) of this rank. Non-numeric values are skipped.
    """
    gathered = comm.gather(dict(local_name2valcount))
    if comm.rank != 0:
        return {}
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for of_rank in gathered:
        for name, (value, weight) in of_rank.items():
            try:
                sums[name] += weight * float(value)
                weights[name] += weight
            except (TypeError, ValueError):
                warn(f"{name} is {value!r}, not a number: left out of the means over the ranks")
    return {name: sums[name] / weights[name] for name in sums if weights[name]}


def set_aside_files() -> None:
    """Rename progress.csv and progress.json, if they exist, to progress.1.csv and so on, so that new ones are begun.

    A run that begins must not continue the log of another one, such as one that was killed before its first
    checkpoint. Only rank 0 does something. Raises OSError.
    """
    renamed = set_aside(*map(str, _progress_files()))
    if renamed:
        names = ", ".join(map(os.path.basename, renamed.values()))
        info(f"the log in {get_dir()} belongs to an earlier run: renamed to {names}")


def rewind(key: str, last: float) -> None:
    """Drop from progress.csv and progress.json what a run wrote after its checkpoint: the lines with `key` > `last`.

    A run that goes on from the checkpoint writes them again, so that the files end as those of a run that was never
    killed. A last line that the kill cut off is dropped too; lines without the key stay. Only rank 0 does something.
    Each file is rewritten whole or not at all. Raises OSError where it cannot be.
    """
    for path in _progress_files():
        values_of = _csv_values if path.suffix == ".csv" else _json_values
        if not path.exists():
            continue
        data = path.read_bytes()
        lines = [line + b"\n" for line in data.split(b"\n")[:-1]]  # what follows the last line's end was cut off
        kept = b"".join(line for line, value in values_of(lines, key) if not _is_above(value, last))
        if kept != data:
            write_whole(str(path), kept)


def _progress_files() -> list[Path]:
    """The current logger's progress.csv and progress.json, for rank 0; none if there is no folder."""
    current = Logger.CURRENT
    if current is None or not current.dir or _rank() != 0:
        return []
    return [Path(current.dir) / f"progress{current.log_suffix}.{kind}" for kind in ("csv", "json")]


def progress_bar(total: int | None, desc: str, unit: str, initial: int = 0) -> tqdm:
    """A bar on rank 0, above which messages are written; in a log file, a line a minute. No bar if nothing is left."""
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        disable=_rank() != 0 or total == initial,
        mininterval=0.2 if sys.stderr.isatty() else 60,
        dynamic_ncols=True,
    )


def _csv_values(lines: Iterable[bytes], key: str) -> Iterator[tuple[bytes, str | None]]:
    """Each row, header included, and its value of `key`, which is None where it has none."""
    header, row = None, b""
    for line in lines:
        row += line
        if row.count(b'"') % 2:  # the line ends inside of quotes: the row goes on
            continue
        cells = next(csv.reader(io.StringIO(row.decode(errors="replace"), newline="")))
        header = header or cells
        yield row, dict(zip(header, cells, strict=False)).get(key)
        row = b""


def _json_values(lines: Iterable[bytes], key: str) -> Iterator[tuple[bytes, Any]]:
    """Each line and its value of `key`, which is None where it has none."""
    for line in lines:
        try:
            yield line, json.loads(line).get(key)
        except (ValueError, AttributeError):  # another's line
            yield line, None


def _is_above(value: Any, last: float) -> bool:
    try:
        return float(value) > last
    except (TypeError, ValueError):
        return False
