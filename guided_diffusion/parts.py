"""Results of a long computation, batch by batch, on disk until all are there: a killed run loses at most a batch.

Beside a finished result lies its record: NAME.json for NAME.npz, with the settings that decided its bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import blobfile as bf
import numpy as np

from . import dist_util, logger
from .errors import UserError
from .files import read_json, remove_scratch, walk, whole_file, write_json
from .run_record import WITHOUT_EFFECT, differences

if TYPE_CHECKING:
    import argparse

# Flags that do not decide what is computed, and those that name files: these are known by their contents.
NOT_DECISIVE = (*WITHOUT_EFFECT, "output", "num_threads", "num_workers", "device")
NAMING_FILES = ("model_path", "classifier_path", "base_samples", "data_dir", "labels_file")


class Parts:
    """A folder of the parts that are done, and the settings that they were computed with.

    All ranks make it together. What processes that were killed had begun to write is removed.

    Args:
        folder: of nothing but the parts.
        settings: what decides the results, by the names that the user knows; JSON values.
        circumstances: what decides their last digits: a change is warned of.

    Raises:
        UserError: the folder was begun with other settings, or cannot be written.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any], circumstances: Mapping[str, Any]):
        self.folder = folder
        dist_util.on_main(self._open, settings, circumstances)

    def _open(self, settings: Mapping[str, Any], circumstances: Mapping[str, Any]) -> None:
        path = f"{self.folder}/settings.json"
        record = _read_record(path, ("settings", "begun_with"), self.folder)
        if record and (changes := differences(record["settings"], settings)):
            raise UserError(
                f"{self.folder} was begun with other settings: {'; '.join(changes)}.\n"
                "Go on with the settings on record, choose another --output, or remove the folder"
            )
        with plain_write_errors():
            remove_scratch(self.folder)
            if record is None:
                if next(walk(self.folder), None) is not None:
                    raise UserError(
                        f"{self.folder} holds files, but {path} is missing: their settings are not known.\n"
                        "Choose another --output, or remove the folder"
                    )
                write_json(path, {"settings": settings, "begun_with": circumstances})
        if record and (changes := differences(record["begun_with"], circumstances)):
            logger.warn(f"{self.folder}: {'; '.join(changes)}. Results will agree to rounding, not to the byte")

    def done(self) -> set[int]:
        """Numbers of the parts that are there, as rank 0 sees them. All ranks must call this."""
        return dist_util.on_main(self._list)

    def _list(self) -> set[int]:
        return {int(name[:-4]) for name in walk(self.folder) if re.fullmatch(r"\d+\.npz", name)}

    def write(self, index: int, **arrays: np.ndarray) -> None:
        """Write a part; it appears whole or not at all. Raises UserError where it cannot be written."""
        with plain_write_errors(), whole_file(self._path(index)) as f:
            np.savez(f, **arrays)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of a part."""
        with bf.BlobFile(self._path(index), "rb") as f, np.load(f, allow_pickle=False) as part:
            return {name: part[name] for name in part.files}

    def remove(self) -> None:
        """Remove the folder; for rank 0, when the result is there."""
        remove_parts(self.folder)

    def _path(self, index: int) -> str:
        return f"{self.folder}/{index:06d}.npz"


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


def finished_record(result: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a result that is there and complete; None where it is still to be made. For rank 0.

    Raises UserError where `result`, an .npz file, was made with other settings, or nothing tells with which.
    """
    if not bf.exists(result):
        return None
    path = record_of(result)
    record = _read_record(path, ("settings", "finished"), result)
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
    return record if record["finished"] else None


def record_of(result: str) -> str:
    """The record of a result: NAME.json for NAME.npz."""
    return f"{os.path.splitext(result)[0]}.json"


@contextmanager
def plain_write_errors() -> Iterator[None]:
    """Within the block, what the operating system says of a file that cannot be written is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'a result'}: {error.strerror or error}. Choose another --output,\n"
            "or start again when that is mended: the same command goes on from what is there"
        ) from error


def _read_record(path: str, entries: tuple[str, ...], owner: str) -> dict[str, Any] | None:
    """A record with these entries; None where there is none. Raises UserError where it is damaged."""
    try:
        record = read_json(path)
    except ValueError:
        record = "damaged"
    if record is not None and (not isinstance(record, dict) or not record.keys() >= set(entries)):
        raise UserError(f"{path} is damaged: it is no record. Choose another --output, or remove it and {owner}")
    return record
