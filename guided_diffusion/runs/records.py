"""Records of runs: what a result was computed with, and whether it is finished.

Beside a result NAME.npz, NAME.json records the settings that decided its bytes, and NAME_inputs.json lists the files
that it was computed from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import blobfile as bf
import numpy as np

from .. import logger
from ..errors import ResultError, UserError
from ..system.files import read_json, whole_file, write_json
from .settings import differences, with_short_keys
from .shards import WHOLE, Shard, check_num_shards

Record = dict[str, Any]


def now() -> str:
    """The time, in ISO 8601 with the time zone."""
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


def read_record(path: str, entries: Mapping[str, type], owner: str) -> Record | None:
    """A record with these entries of these types, None if there is none; its settings have short keys.

    Raises UserError if it is damaged; `owner` is what it belongs to.
    """
    try:
        record = read_json(path)
    except ValueError:
        record = "damaged"
    if record is None:
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in entries.items()):
        raise UserError(
            f"{path} is damaged: it is not the record of a run. Choose another --output, or move it and\n{owner} away"
        )
    return {**record, "settings": with_short_keys(record["settings"])}


def record_of(result: str) -> str:
    """The record of a result: NAME.json for NAME.npz."""
    return f"{os.path.splitext(result)[0]}.json"


def finished_record(result: str, settings: Mapping[str, Any], shard: Shard = WHOLE) -> Record | None:
    """The record of a result that is complete; None if it is still to be made. For rank 0.

    Raises UserError if `result`, an .npz file, was made with other settings, or nothing tells with which.
    """
    if not bf.exists(result):
        return None
    path = record_of(result)
    record = read_record(path, {"settings": dict, "finished": bool}, result)
    if record is None:
        raise UserError(
            f"{result} is there already, but {path} is missing: its settings are not known.\n"
            "Choose another --output, or move the file away"
        )
    if changes := differences(record["settings"], settings):
        raise UserError(
            f"{result} is there already, made with other settings: {'; '.join(changes)}.\n"
            "Choose another --output, or move the file away"
        )
    check_num_shards(record.get("num_shards"), shard, result)
    return record if record["finished"] else None


def write_result(path: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Write a result and its record. It counts as finished only when all of it is there. Raises UserError."""
    with plain_write_errors():
        write_json(record_of(path), {**record, "finished": False})
        with whole_file(path) as f:
            np.savez(f, **arrays)
        write_json(record_of(path), record)


def check_finite(arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Raise ResultError if one of the arrays, results of `what`, contains NaN or infinity."""
    for name, values in arrays.items():
        values = np.asarray(values)
        if values.dtype.kind in "fc" and not np.isfinite(values).all():
            raise ResultError(
                f"{name} of {what} is NaN or infinite: nothing is recorded.\n"
                "The weights may be damaged, or too large for half precision"
            )


@contextmanager
def plain_write_errors() -> Iterator[None]:
    """Within the block, an error of the operating system about a file that is written is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'a result'}: {error.strerror or error}. Choose another --output,\n"
            "or rerun the same command to resume once that is fixed"
        ) from error


def report_unreadable(unreadable: Mapping[str, str], consequence: str, chosen: int | None = None) -> int:
    """Name the images that could not be read: path -> why. Returns the exit status.

    Args:
        unreadable: path of each image, and why it could not be read.
        consequence: what the results lack.
        chosen: number of all images.
    """
    for why in unreadable.values():
        logger.warn(why)
    if unreadable:
        count = len(unreadable) if chosen is None else f"{len(unreadable)} of {chosen}"
        logger.error(f"{count} images could not be read: {consequence}")
    return 1 if unreadable else 0
