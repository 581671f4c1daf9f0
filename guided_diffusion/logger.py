"""What a run says and records: messages on stderr by `logging`, metrics in progress.csv and progress.json.

Rank 0 speaks; the other ranks only report errors. Messages do not break a tqdm progress bar.
"""

import csv
import io
import json
import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import UserError
from .files import set_aside, write_whole

DEBUG, INFO, WARN, ERROR, DISABLED = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, 50
FORMATS = ("stdout", "csv", "json")

_dir: Path | None = None
_formats: tuple[str, ...] = FORMATS
_suffix = ""
_values: dict[str, Any] = {}
_counts: dict[str, int] = defaultdict(int)


class _Handler(logging.Handler):
    """Writes to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < ERROR and _rank() != 0:
            return
        prefix = "error: " if record.levelno >= ERROR else "warning: " if record.levelno >= WARN else ""
        try:
            # The line and its end in one piece: other ranks write to the same stream.
            tqdm.write(f"{prefix}{self.format(record)}\n", file=sys.stderr, end="")
        except Exception:
            self.handleError(record)


def _rank() -> int:
    """This process's rank, without importing torch where nothing else has."""
    dist_util = sys.modules.get(f"{__package__}.dist_util")
    return dist_util.get_rank() if dist_util else 0


_logger = logging.getLogger("guided_diffusion")
_logger.setLevel(INFO)
_logger.propagate = False
if not _logger.handlers:
    _logger.addHandler(_Handler())


def configure(
    dir: str | os.PathLike | None = None,
    format_strs: Iterable[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
) -> None:
    """Choose where metrics go: the folder `dir`, else the one that OPENAI_LOGDIR names, else no files.

    `format_strs` are some of "stdout" (a line of metrics among the messages), "csv" and "json"; by default, or if the
    environment's OPENAI_LOG_FORMAT (comma-separated) names none, all. `log_suffix` ends the files' names. `comm` is
    accepted for the sake of old callers and not used. Files that exist are continued. Call `setup_dist()` before.
    Raises UserError for an unknown format, or a folder that cannot be made.
    """
    global _dir, _formats, _suffix
    wanted = format_strs or [name for name in os.environ.get("OPENAI_LOG_FORMAT", "").split(",") if name] or FORMATS
    unknown = sorted(set(wanted) - set(FORMATS))
    if unknown:
        raise UserError(f"unknown log format {', '.join(unknown)}: expected some of {', '.join(FORMATS)}")
    folder = dir or os.environ.get("OPENAI_LOGDIR")
    _dir, _formats, _suffix = (Path(folder).expanduser() if folder else None), tuple(wanted), log_suffix
    if _dir and _rank() == 0:
        try:
            _dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"log folder {_dir} cannot be made: {error.strerror}") from error
        if not os.access(_dir, os.W_OK):
            raise UserError(f"log folder {_dir} cannot be written to")


def choose_dir(output: str, otherwise: str) -> str:
    """The folder of a run's results: `output`, else the one that OPENAI_LOGDIR names, else `otherwise`."""
    return output or os.environ.get("OPENAI_LOGDIR") or otherwise


def get_dir() -> str | None:
    """The folder of the metrics, None where there is none."""
    return None if _dir is None else str(_dir)


def set_level(level: int) -> None:
    """Say only messages of this level (DEBUG, INFO, WARN, ERROR) and above; DISABLED: none."""
    _logger.setLevel(level)


def log(*args: Any, level: int = INFO) -> None:
    """Say `args`, separated by spaces."""
    _logger.log(level, "%s", " ".join(map(str, args)))


def debug(*args: Any) -> None:
    """Say something that only a developer wants to know."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """Say what is going on."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """Say what may not be as intended; the line begins with "warning: "."""
    log(*args, level=WARN)


@cache
def warn_once(text: str) -> None:
    """`warn`, the first time that this process has something to warn of."""
    warn(text)


def error(*args: Any) -> None:
    """Say what went wrong, on whatever rank; the line begins with "error: "."""
    log(*args, level=ERROR)


def logkv(key: str, val: Any) -> None:
    """Record one metric for the next `dumpkvs`; the last value counts."""
    _values[key] = _plain(val)
    _counts.pop(key, None)


def logkv_mean(key: str, val: float) -> None:
    """Record one metric for the next `dumpkvs`; the mean of the values since the last one counts."""
    _counts[key] += 1
    old = _values.get(key, 0.0) if _counts[key] > 1 else 0.0
    _values[key] = old + (_plain(val) - old) / _counts[key]


def logkvs(d: Mapping[str, Any]) -> None:
    """`logkv` for each entry."""
    for key, val in d.items():
        logkv(key, val)


def getkvs() -> dict[str, Any]:
    """The metrics recorded since the last `dumpkvs`."""
    return dict(_values)


def dumpkvs() -> dict[str, Any]:
    """Write the metrics recorded so far, as rank 0, and forget them; returns them."""
    values = getkvs()
    _values.clear()
    _counts.clear()
    if values and _rank() == 0:
        if "stdout" in _formats:
            info(
                "  ".join(
                    f"{key} {val:.5g}" if isinstance(val, float) else f"{key} {val}" for key, val in values.items()
                )
            )
        if _dir and "csv" in _formats:
            _append_csv(_dir / f"progress{_suffix}.csv", values)
        if _dir and "json" in _formats:
            with open(_dir / f"progress{_suffix}.json", "a") as file:
                file.write(json.dumps({key: _json_value(val) for key, val in values.items()}) + "\n")
    return values


def set_aside_files() -> None:
    """Rename progress.csv and progress.json, if they exist, to progress.1.csv and so on, so that new ones are begun.

    A run that begins must not continue the log of another one, such as one that was killed before its first
    checkpoint. Only rank 0 does something. Raises OSError.
    """
    if not _dir or _rank() != 0:
        return
    renamed = set_aside(*(str(_dir / f"progress{_suffix}.{kind}") for kind in ("csv", "json")))
    if renamed:
        names = ", ".join(map(os.path.basename, renamed.values()))
        info(f"the log in {_dir} belongs to an earlier run: renamed to {names}")


def rewind(key: str, last: float) -> None:
    """Drop from progress.csv and progress.json what a run wrote after its checkpoint: the lines with `key` > `last`.

    A run that goes on from the checkpoint writes them again, so that the files end as those of a run that was never
    killed. A last line that the kill cut off is dropped too; lines without the key stay. Only rank 0 does something.
    Each file is rewritten whole or not at all. Raises OSError where it cannot be.
    """
    if not _dir or _rank() != 0:
        return
    for name, values_of in (f"progress{_suffix}.csv", _csv_values), (f"progress{_suffix}.json", _json_values):
        path = _dir / name
        if not path.exists():
            continue
        data = path.read_bytes()
        lines = [line + b"\n" for line in data.split(b"\n")[:-1]]  # what follows the last line's end was cut off
        kept = b"".join(line for line, value in values_of(lines, key) if not _is_above(value, last))
        if kept != data:
            write_whole(str(path), kept)


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


def _plain(value: Any) -> Any:
    """A Python number out of a 0-d tensor or a NumPy scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _json_value(value: Any) -> Any:
    """JSON knows neither NaN nor infinity, nor objects."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _append_csv(path: Path, row: Mapping[str, Any]) -> None:
    """Add `row`; where it brings new columns, the whole file is written anew beside the old one, then renamed."""
    header, old_rows = [], []
    if path.exists():
        with open(path, newline="") as file:
            header = next(csv.reader(file), [])
    columns = header + [key for key in row if key not in header]
    if columns == header:
        with open(path, "a", newline="") as file:
            csv.DictWriter(file, columns).writerow(row)
        return
    if header:
        with open(path, newline="") as file:
            old_rows = list(csv.DictReader(file))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows([*old_rows, row])
    write_whole(str(path), text.getvalue().encode())


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
