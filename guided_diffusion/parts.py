"""Results of a long computation, batch by batch, on disk until all are there: a killed run loses at most a batch.

Beside a finished result lies its record: NAME.json for NAME.npz, with the settings that decided its bytes. If it was
computed from files, NAME_inputs.json lists them with their sizes and digests.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import blobfile as bf
import numpy as np

from . import dist_util, logger
from .errors import ResultError, UserError
from .files import SCRATCH, read_json, remove_scratch, walk, whole_file, write_json
from .inputs import Inputs, as_entries, inputs_of, read_entries, write_entries
from .locks import Locks
from .run_record import WITHOUT_EFFECT, circumstances_changed, differences
from .shards import WHOLE, Shard, check_num_shards

if TYPE_CHECKING:
    import argparse

    from .inputs import Entries

# Flags that do not decide what is computed, or do so by what they choose (a script adds the classes of its samples, and
# the labels of its images, to the settings); and those that name files: these are known by their contents.
NOT_DECISIVE = (
    *WITHOUT_EFFECT,
    "output",
    "num_threads",
    "num_workers",
    "device",
    "shard",
    "num_shards",
    "classes",
    "class_order",
)
NAMING_FILES = ("model_path", "classifier_path", "base_samples", "data_dir", "labels_file")
NOTES = "notes"  # name of the array of a part that contains text


class Parts:
    """A folder of the parts that are done, and the settings that they were computed with.

    All ranks make it together, while rank 0 holds the lock of the result. What killed processes had begun to write is
    removed.

    Args:
        folder: folder of the parts, and of nothing else.
        settings: what decides the results, by the names that the user knows; JSON values.
        circumstances: what decides their last digits: a change is a warning.
        shard: this job's part of the work, if other jobs do the rest.
        locks: locks of this job, needed if other jobs do the rest.

    Raises:
        UserError: the folder was begun with other settings, or cannot be written.
    """

    def __init__(
        self,
        folder: str,
        settings: Mapping[str, Any],
        circumstances: Mapping[str, Any],
        shard: Shard = WHOLE,
        locks: Locks | None = None,
    ):
        self.folder = folder
        self.shard = shard
        dist_util.on_main(self._open, settings, circumstances, locks)

    def _open(self, settings: Mapping[str, Any], circumstances: Mapping[str, Any], locks: Locks | None) -> None:
        with self.update(), plain_write_errors():
            path = f"{self.folder}/settings.json"
            record = _read_record(path, {"settings": dict, "begun_with": dict}, self.folder)
            if record and (changes := differences(record["settings"], settings)):
                if self.present() or (locks and locks.rivals()):
                    raise UserError(
                        f"{self.folder} was begun with other settings: {'; '.join(changes)}.\n"
                        "Resume with the settings on record, choose another --output, or remove the folder"
                    )
                remove_parts(self.folder)  # nothing was computed with them
                record = None
            if locks is None or not locks.others():  # whose scratch files may be in use
                remove_scratch(self.folder)
            if record is None:
                if any(not name.endswith(SCRATCH) for name in walk(self.folder)):
                    raise UserError(
                        f"{self.folder} contains files, but {path} is missing: their settings are not known.\n"
                        "Choose another --output, or remove the folder"
                    )
                shards = {"num_shards": self.shard.count}
                write_json(path, {"settings": settings, "begun_with": circumstances, **shards})
        if record:
            check_num_shards(record.get("num_shards"), self.shard, self.folder)
            if changes := circumstances_changed(record["begun_with"], circumstances):
                logger.warn(f"{self.folder}: {'; '.join(changes)}. Results will agree to rounding, not to the byte")

    def update(self) -> Locks:
        """Lock for what one of several shards does at a time: opening the folder, and putting the parts together."""
        return Locks({f"{self.folder}.lock": self.folder} if self.shard.count > 1 else {}, wait=3600.0)

    def done(self) -> set[int]:
        """Numbers of the parts that are there, as rank 0 sees them. All ranks must call this."""
        return dist_util.on_main(self.present)

    def present(self) -> set[int]:
        """Numbers of the parts that are there. For rank 0."""
        return {int(name[:-4]) for name in walk(self.folder) if re.fullmatch(r"\d+\.npz", name)}

    def missing(self, count: int) -> list[int]:
        """Numbers below `count` of the parts that are not there. For rank 0."""
        return sorted(set(range(count)) - self.present())

    def write(self, index: int, notes: Mapping[str, Any] | None = None, **arrays: np.ndarray) -> None:
        """Write a part; it appears whole or not at all.

        Args:
            index: number of the part.
            notes: JSON values, for `notes`.
            arrays: arrays, for `read`.

        Raises UserError if it cannot be written.
        """
        if notes is not None:
            arrays[NOTES] = np.array(json.dumps(notes))
        with plain_write_errors(), whole_file(self._path(index)) as f:
            np.savez(f, **arrays)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of a part. Raises ResultError if the part has disappeared."""
        with self._opened(index) as part:
            return {name: part[name] for name in part.files if name != NOTES}

    def notes(self, index: int) -> dict[str, Any]:
        """The notes of a part; none in the parts of an earlier version. Raises ResultError as `read` does."""
        with self._opened(index) as part:
            return json.loads(str(part[NOTES])) if NOTES in part.files else {}

    @contextmanager
    def _opened(self, index: int) -> Iterator[Any]:
        try:
            with bf.BlobFile(self._path(index), "rb") as f, np.load(f, allow_pickle=False) as part:
                yield part
        except FileNotFoundError as error:
            raise ResultError(
                f"{self._path(index)} has disappeared: was the output removed during the run? Start the run again"
            ) from error

    def remove(self) -> None:
        """Remove the folder; for rank 0, when the result is there."""
        remove_parts(self.folder)

    def _path(self, index: int) -> str:
        return f"{self.folder}/{index:06d}.npz"


def check_finite(arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Raise ResultError if one of the arrays, results of `what`, contains NaN or infinity."""
    for name, values in arrays.items():
        values = np.asarray(values)
        if values.dtype.kind in "fc" and not np.isfinite(values).all():
            raise ResultError(
                f"{name} of {what} is NaN or infinite: nothing is recorded.\n"
                "The weights may be damaged, or too large for half precision"
            )


def remove_parts(folder: str) -> None:
    """Remove a folder of parts, if there is one."""
    if bf.isdir(folder):
        bf.rmtree(folder)


def settings_of(args: argparse.Namespace, **known_by_content: str) -> dict[str, Any]:
    """What decides the bytes that a script writes: its flags, and digests of the files that they name.

    Args:
        args: all flags of the script.
        known_by_content: digest of the file or folder of each of `NAMING_FILES` that the script reads.
    """
    flags = {name: value for name, value in vars(args).items() if name not in NOT_DECISIVE + NAMING_FILES}
    return {f"--{name}": value for name, value in {**flags, **known_by_content}.items()}


def finished_record(result: str, settings: Mapping[str, Any], shard: Shard = WHOLE) -> dict[str, Any] | None:
    """The record of a result that is there and complete; None if it is still to be made. For rank 0.

    Raises UserError if `result`, an .npz file, was made with other settings, or nothing tells with which.
    """
    if not bf.exists(result):
        return None
    path = record_of(result)
    record = _read_record(path, {"settings": dict, "finished": bool}, result)
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


def record_of(result: str) -> str:
    """The record of a result: NAME.json for NAME.npz."""
    return f"{os.path.splitext(result)[0]}.json"


def lock_of(result: str, shard: Shard = WHOLE) -> str:
    """The lock of a result: NAME.lock for NAME.npz."""
    return shard.lock(os.path.splitext(result)[0])


@contextmanager
def plain_write_errors() -> Iterator[None]:
    """Within the block, what the operating system says of a file that cannot be written is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'a result'}: {error.strerror or error}. Choose another --output,\n"
            "or rerun the same command to resume once that is fixed"
        ) from error


# The files that a result was computed from


def compare_with_result(groups: Mapping[str, Inputs], paths: Mapping[str, Sequence[str]], result: str) -> None:
    """Compare files with those that a finished result was computed from. For rank 0.

    Args:
        groups: files by what they are, such as "images"; takes note of what is known of them.
        paths: paths of the files of each group.
        result: the result.

    Raises:
        UserError: a file has changed, or the list of files is damaged.
    """
    listed = read_entries(inputs_of(result))
    _compare(groups, paths, listed or {}, result, inputs_of(result), listed is None)


def compare_with_parts(groups: Mapping[str, Inputs], paths: Mapping[str, Sequence[str]], parts: Parts) -> None:
    """Compare files with those that the parts of a result were computed from. Otherwise as `compare_with_result`."""
    path = f"{parts.folder}/inputs.json"
    with parts.update():
        listed = read_entries(path)
        known = listed or {}
        notes = [parts.notes(index) for index in sorted(parts.present())]
        for of_part in notes:
            for name, entries in as_entries(of_part.get("inputs", {})).items():
                known[name] = {**known.get(name, {}), **entries}
            for name, unreadable in of_part.get("unreadable", {}).items():
                for file in unreadable:  # it may have been repaired since
                    known.get(name, {}).pop(file, None)
        unlisted = listed is None and not all("inputs" in of_part for of_part in notes)
        _compare(groups, paths, known, parts.folder, path, unlisted)
        if not unlisted:
            write_inputs(path, groups, paths)


def write_inputs(path: str, groups: Mapping[str, Inputs], paths: Mapping[str, Sequence[str]]) -> None:
    """List the files that a result was computed from. Raises UserError if the list cannot be written."""
    with plain_write_errors():
        write_entries(path, {name: inputs.entries(paths[name]) for name, inputs in groups.items()})


def _compare(
    groups: Mapping[str, Inputs],
    paths: Mapping[str, Sequence[str]],
    known: Mapping[str, Entries],
    owner: str,
    path: str,
    unlisted: bool,
) -> None:
    for name, inputs in groups.items():
        inputs.merge(known.get(name, {}), owner)
        inputs.compare(paths[name], owner)
    if unlisted:
        logger.warn_once(
            f"{os.path.dirname(owner)} contains results of a version that did not record the contents of the files: "
            "those of now are taken to be the same"
        )
        for name, inputs in groups.items():
            inputs.read_all(paths[name])
        write_inputs(path, groups, paths)


def _read_record(path: str, entries: Mapping[str, type], owner: str) -> dict[str, Any] | None:
    """A record with these entries of these kinds; None if there is none. Raises UserError if it is damaged."""
    try:
        record = read_json(path)
    except ValueError:
        record = "damaged"
    if record is not None and not (
        isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in entries.items())
    ):
        raise UserError(f"{path} is damaged: it is not a record. Choose another --output, or remove it and {owner}")
    return record
