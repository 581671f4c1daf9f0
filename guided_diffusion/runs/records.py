"""Records of results.

Next to a result NAME.npz, NAME.json records the settings that determine its bytes and whether it is finished, and
NAME_inputs.json lists the files that it was computed from.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import blobfile as bf
import numpy as np

from .. import logger
from ..errors import ResultError, UserError, named_write_errors
from ..system.files import read_json, whole_file, write_json
from .settings import differences, with_current_keys
from .shards import WHOLE, Shard, check_num_shards

Record = dict[str, Any]


def now() -> str:
    """Current time in ISO 8601 with the time zone."""
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


def read_record(path: str, entries: Mapping[str, type], owner: str) -> Record | None:
    """The record of the output `owner` at `path`, with short keys of settings; None if there is none.

    `entries` are the names and types of required entries. Raises UserError if the record is corrupted.
    """
    try:
        record = read_json(path)
    except ValueError:
        record = "corrupted"
    if record is None:
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in entries.items()):
        raise UserError(
            f"{path} is corrupted: it is not the record of a run.\nChoose another --output, or move it and {owner} away"
        )
    return {**record, "settings": with_current_keys(record["settings"])}


def record_of(result: str) -> str:
    """Path of a result's record: NAME.json for NAME.npz."""
    return f"{os.path.splitext(result)[0]}.json"


def finished_record(result: str, settings: Mapping[str, Any], shard: Shard = WHOLE) -> Record | None:
    """The record of a result if it is finished, else None. For rank 0.

    Raises UserError if `result`, an .npz file, has other settings or no record.
    """
    if not bf.exists(result):
        return None
    path = record_of(result)
    record = read_record(path, {"settings": dict, "finished": bool}, result)
    problem = ""
    if record is None:
        problem = f"but {path} is missing, so its settings are unknown"
    elif changes := differences(record["settings"], settings):
        problem = f"made with other settings: {'; '.join(changes)}"
    if problem:
        raise UserError(f"{result} already exists, {problem}.\nChoose another --output, or move the file away")
    check_num_shards(record.get("num_shards"), shard, result)
    return record if record["finished"] else None


def check_whole(path: str) -> None:
    """Raise UserError if an .npz file is truncated, by the list of contents at its end."""
    with bf.BlobFile(path, "rb") as f:
        if not zipfile.is_zipfile(f):
            raise UserError(
                f"{path} is damaged: its end is missing.\nMove it away to compute it again, or choose another --output"
            )


def write_result(path: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Write a result and its record, which is marked as finished only once both are complete. Raises UserError."""
    with named_write_errors():
        write_json(record_of(path), {**record, "finished": False})
        with whole_file(path) as f:
            np.savez(f, **arrays)
        write_json(record_of(path), record)


def check_finite(arrays: Mapping[str, np.ndarray], source: str) -> None:
    """Raise ResultError if an array contains NaN or infinity; `source` is their origin, for the message."""
    for name, values in arrays.items():
        values = np.asarray(values)
        if values.dtype.kind in "fc" and not np.isfinite(values).all():
            raise ResultError(
                f"{name} of {source} is NaN or infinite: nothing is recorded.\n"
                "The weights may be corrupted, or too large for half precision"
            )


def report_unreadable(
    unreadable: Mapping[str, str], consequence: str, chosen: int | None = None, things: str = "images"
) -> int:
    """Log the images that could not be read (path -> why), and return the exit status.

    `consequence` completes the message; `chosen` is the total number of images; `things` is what they are.
    """
    for why in unreadable.values():
        logger.warn(why)
    if unreadable:
        count = len(unreadable) if chosen is None else f"{len(unreadable)} of {chosen}"
        logger.error(f"{count} {things} could not be read: {consequence}")
    return 1 if unreadable else 0
