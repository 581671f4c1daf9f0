"""Parts of results that are computed unit by unit: a file per unit, kept until the results are put together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import blobfile as bf
import numpy as np

from .. import dist_util, logger
from ..errors import ResultError, UserError
from ..system.files import SCRATCH, remove_scratch, walk, whole_file, write_json
from .inputs import Entries, as_entries, read_entries
from .locks import Locks
from .records import Record, plain_write_errors, read_record
from .settings import differences, machine_changes
from .shards import WHOLE, Shard, check_num_shards

NOTES = "notes"  # name of the array of a part that contains text


class Parts:
    """A folder of the parts that are done, and the settings that they were computed with.

    All ranks make it together, while rank 0 holds the lock of the result. What killed processes had begun to write is
    removed.

    Args:
        folder: folder of the parts, and of nothing else.
        settings: what decides the results, by the names that the user knows; JSON values.
        machine: what decides their last digits: a change is a warning.
        shard: this job's part of the work, if other jobs do the rest.
        locks: locks of this job, needed if other jobs do the rest.

    Raises:
        UserError: the folder was begun with other settings, or cannot be written.
    """

    def __init__(
        self,
        folder: str,
        settings: Mapping[str, Any],
        machine: Mapping[str, Any],
        shard: Shard = WHOLE,
        locks: Locks | None = None,
    ):
        self.folder = folder
        self.shard = shard
        dist_util.on_main(self._open, settings, machine, locks)

    def _open(self, settings: Mapping[str, Any], machine: Mapping[str, Any], locks: Locks | None) -> None:
        with self.update(), plain_write_errors():
            path = f"{self.folder}/settings.json"
            record = read_record(path, {"settings": dict, "begun_with": dict}, self.folder)
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
                write_json(path, {"settings": settings, "begun_with": machine, **shards})
        if record:
            check_num_shards(record.get("num_shards"), self.shard, self.folder)
            if changes := machine_changes(record["begun_with"], machine):
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

    def is_complete(self, index: int) -> bool:
        """Whether all files of a part could be read. Raises ResultError as `read` does."""
        with self._opened(index) as part:
            all_readable = "readable" not in part.files or bool(part["readable"].all())
            return all_readable and not any(_notes_in(part).get("unreadable", {}).values())

    def notes(self, index: int) -> dict[str, Any]:
        """The notes of a part; none in the parts of an earlier version. Raises ResultError as `read` does."""
        with self._opened(index) as part:
            return _notes_in(part)

    def entries(self, index: int) -> dict[str, Entries]:
        """Sizes and digests of a part's files, by kind; an earlier version recorded none."""
        return as_entries(self.notes(index).get("inputs", {}))

    def known_files(self, path: str) -> dict[str, Entries] | None:
        """What is known of the files that parts were computed from, by kind: from their list `path`, and from notes.

        None if there are parts of an earlier version, which did not record the contents of files.
        """
        if self.shard.count == 1 and not self.present():
            return {}  # nothing was computed
        listed = read_entries(path)
        known, indices = listed or {}, sorted(self.present())
        notes = [self.notes(index) for index in indices]
        if listed is None and not all("inputs" in of_part for of_part in notes):
            return None
        for of_part in notes:
            for kind, entries in as_entries(of_part.get("inputs", {})).items():
                known[kind] = {**known.get(kind, {}), **entries}
            for kind, unreadable in of_part.get("unreadable", {}).items():
                for file in unreadable:  # it may have been repaired since
                    known.get(kind, {}).pop(file, None)
        return known

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


def _notes_in(part: np.lib.npyio.NpzFile) -> dict[str, Any]:
    return json.loads(str(part[NOTES])) if NOTES in part.files else {}


def recorded_settings(folder: str) -> Record:
    """The settings that parts in a folder were computed with; none if there is no record, or a damaged one."""
    try:
        record = read_record(f"{folder}/settings.json", {"settings": dict}, folder)
    except UserError:
        return {}  # `Parts` says so
    return record["settings"] if record else {}


def remove_parts(folder: str) -> None:
    """Remove a folder of parts, if there is one."""
    if bf.isdir(folder):
        bf.rmtree(folder)
