"""Parts of results: a file per unit of work, kept until the results are complete."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import blobfile as bf
import numpy as np

from .. import dist_util, logger
from ..errors import ResultError, UserError, first_line, named_write_errors
from ..system.files import SCRATCH, remove_scratch, walk, whole_file, write_json
from .inputs import Entries, as_entries, read_entries
from .locks import Locks
from .records import Record, read_record
from .settings import differences, machine_changes
from .shards import WHOLE, Shard, check_num_shards

NOTES = "notes"  # name of a part's array of JSON text


class DamagedPart(ResultError):
    """A part that cannot be read, such as a truncated one. args: (reason,)."""

    def __str__(self) -> str:
        return f"{self.args[0]}.\nRemove it, and rerun the same command to compute it again"


class Parts:
    """A folder of parts and of the settings that they were computed with.

    All ranks must create it together, while rank 0 holds the lock of the result. Unfinished files of killed processes
    are removed.

    Args:
        folder: folder of the parts, and of nothing else.
        settings: settings that determine the results; JSON values.
        machine: properties of the machine that affect the last digits: a change causes a warning.
        shard: this job's share of the work.
        locks: locks of this job, required if there are other shards.

    Raises UserError if the folder was started with other settings, or cannot be written to.
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
        with self.update(), named_write_errors():
            path = f"{self.folder}/settings.json"
            record = read_record(path, {"settings": dict, "begun_with": dict}, self.folder)
            if record and (changes := differences(record["settings"], settings)):
                if self.present() or (locks and locks.conflicting_shards()):
                    raise UserError(
                        f"{self.folder} was started with other settings: {'; '.join(changes)}.\n"
                        "Resume with the original settings, choose another --output, or remove the folder"
                    )
                remove_parts(self.folder)  # nothing was computed with those settings
                record = None
            if locks is None or not locks.other_shards():  # which may be writing
                remove_scratch(self.folder)
            if record is None:
                if any(not name.endswith(SCRATCH) for name in walk(self.folder)):
                    raise UserError(
                        f"{self.folder} contains files, but {path} is missing, so their settings are unknown.\n"
                        "Choose another --output, or remove the folder"
                    )
                write_json(path, {"settings": settings, "begun_with": machine, "num_shards": self.shard.count})
        if record:
            check_num_shards(record.get("num_shards"), self.shard, self.folder)
            if changes := machine_changes(record["begun_with"], machine):
                logger.warn(f"{self.folder}: {'; '.join(changes)}. Results will agree to rounding, not to the byte")

    def update(self) -> Locks:
        """Lock for steps that only one shard may take at a time: opening the folder, and combining the parts."""
        return Locks({f"{self.folder}.lock": self.folder} if self.shard.count > 1 else {}, wait=3600.0)

    def present(self) -> set[int]:
        """Numbers of the existing parts. For rank 0."""
        return {int(name[:-4]) for name in walk(self.folder) if re.fullmatch(r"\d+\.npz", name)}

    def write(self, index: int, notes: Mapping[str, Any] | None = None, **arrays: np.ndarray) -> None:
        """Write part number `index` atomically, with `notes` as JSON. Raises UserError."""
        if notes is not None:
            arrays[NOTES] = np.array(json.dumps(notes))
        with named_write_errors(), whole_file(self._path(index)) as f:
            np.savez(f, **arrays)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Arrays of a part. Raises ResultError if the part has disappeared or is damaged."""
        with self._opened(index) as part:
            return {name: part[name] for name in part.files if name != NOTES}

    def is_complete(self, index: int) -> bool:
        """Whether all files of a part were readable. Raises ResultError if the part has disappeared or is damaged."""
        with self._opened(index) as part:
            all_readable = "readable" not in part.files or bool(part["readable"].all())
            return all_readable and not any(_notes_in(part).get("unreadable", {}).values())

    def notes(self, index: int) -> dict[str, Any]:
        """Notes of a part; empty for parts of an earlier version.

        Raises ResultError if the part has disappeared or is damaged.
        """
        with self._opened(index) as part:
            return _notes_in(part)

    def entries(self, index: int) -> dict[str, Entries]:
        """Sizes and digests of a part's files, by kind; empty for parts of an earlier version."""
        return as_entries(self.notes(index).get("inputs", {}))

    def known_files(self, path: str) -> dict[str, Entries] | None:
        """Entries of the files that parts were computed from, by kind, from the list `path` and the parts' notes.

        None if there are parts of an earlier version, which did not record the contents of files. Damaged parts are
        removed, with a warning, to be computed again.
        """
        if self.shard.count == 1 and not self.present():
            return {}
        known, notes = read_entries(path), []
        for index in sorted(self.present()):
            try:
                notes.append(self.notes(index))
            except DamagedPart as error:
                logger.warn(f"{error.args[0]}: it is computed again")
                bf.remove(self._path(index))
        if all("inputs" in note for note in notes):  # files that were never read may have been repaired or replaced
            known = {kind: {f: e for f, e in files.items() if e.sha256} for kind, files in (known or {}).items()}
        if known is None:
            return None
        for note in notes:
            for kind, entries in as_entries(note.get("inputs", {})).items():
                known.setdefault(kind, {}).update(entries)
        return known

    @contextmanager
    def _opened(self, index: int) -> Iterator[Any]:
        try:
            with bf.BlobFile(self._path(index), "rb") as f, np.load(f, allow_pickle=False) as part:
                yield part
        except FileNotFoundError as error:
            raise ResultError(
                f"{self._path(index)} has disappeared: was the output removed during the run? Rerun the same command"
            ) from error
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise DamagedPart(f"{self._path(index)} is damaged ({first_line(error)})") from error

    def _path(self, index: int) -> str:
        return f"{self.folder}/{index:06d}.npz"


def _notes_in(part: np.lib.npyio.NpzFile) -> dict[str, Any]:
    return json.loads(str(part[NOTES])) if NOTES in part.files else {}


def recorded_settings(folder: str) -> Record:
    """Settings of the parts in a folder; empty if there is no record, or a corrupted one, which `Parts` reports."""
    try:
        record = read_record(f"{folder}/settings.json", {"settings": dict}, folder)
    except UserError:
        return {}
    return record["settings"] if record else {}


def remove_parts(folder: str) -> None:
    """Remove a folder of parts if it exists."""
    if bf.isdir(folder):
        bf.rmtree(folder)
