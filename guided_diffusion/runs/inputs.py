"""The identity of the files that a run reads, by content: results of different data are never mixed.

A run records the name and the size of every file that it selects, and the SHA-256 of each file as it is read. A rerun
compares all sizes, and the contents of all files if they total less than 1 GB, else of 64 files spread evenly over
those that were read, the first and the last among them. So ImageNet's 50,000 files cost seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO, NamedTuple, TypeVar

import blobfile as bf
import numpy as np

from .. import logger
from ..errors import UserError, named_write_errors
from ..system.files import is_remote, read_json, write_whole
from .shards import cut

HASH_ALL = 10**9  # bytes: the total size below which a rerun compares the contents of all files
SPREAD = 64  # files whose contents a rerun compares if they total more
THREADS = 16  # threads that wait for the file system

T = TypeVar("T")


class Entry(NamedTuple):
    """What is known of a file: its size in bytes, and the SHA-256 of its content, None if it has not been read."""

    size: int
    sha256: str | None


Entries = dict[str, Entry]  # by path relative to the folder


class Inputs:
    """The files of one folder that a run reads, and what is known of them from earlier runs and from reading them.

    Args:
        folder: local or remote folder.
        flag: flag that names the folder, for messages.
        known: entries that earlier runs recorded.
    """

    def __init__(self, folder: str, flag: str, known: Mapping[str, Entry] | None = None):
        self.folder, self.flag = folder, flag
        self.known: Entries = dict(known or {})

    def compare(self, paths: Sequence[str], owner: str, remedy: str = "choose another --output") -> None:
        """Compare the files as they are now with what is known of them, and take note of the sizes of all.

        Args:
            paths: files that the run selects.
            owner: output that was computed from the known files, for the message.
            remedy: what else to do than to restore the files, for the message.

        Raises:
            UserError: a file differs, or is missing.
        """
        sizes = file_sizes(self.folder, paths)
        known = {path: self.known[path] for path in paths if path in self.known}
        differing = [path for path, entry in known.items() if entry.size != sizes.get(path)]
        if not differing:
            read = [path for path, entry in known.items() if entry.sha256]
            digests = self._digests(read, sizes)
            differing = [path for path, digest in digests.items() if digest != known[path].sha256]
        if differing:
            path = differing[0]
            then, now = known[path].size, sizes.get(path)
            change = "its content has changed" if then == now else f"it had {then:,} bytes"
            if now != then:
                change += f" and has {now:,}" if now is not None else " and is missing"
            more = f" ({len(differing)} such files)" if len(differing) > 1 else ""
            raise UserError(
                f"{owner} was computed from other files: {self.folder}/{path} differs, {change}{more}.\n"
                f"Give the files that it was computed from ({self.flag}), or {remedy}"
            )
        self.known |= {path: Entry(size, known[path].sha256 if path in known else None) for path, size in sizes.items()}

    def merge(self, entries: Mapping[str, Entry], owner: str) -> None:
        """Add what is known from elsewhere, such as the entries of another output.

        Raises UserError if it contradicts what is known: `owner`, named in the message, was computed from other files.
        """
        for path, entry in entries.items():
            known = self.known.get(path)
            if known and (known.size != entry.size or (None not in (known.sha256, entry.sha256) and known != entry)):
                raise UserError(
                    f"{owner} was computed from another file {path} than what it is used with ({self.flag}).\n"
                    "Choose another --output, or restore the file"
                )
            if known is None or entry.sha256:
                self.known[path] = entry

    def read_all(self, paths: Sequence[str]) -> None:
        """Take note of the contents of files that an earlier version has read; of 64 if they total 1 GB or more."""
        sizes = file_sizes(self.folder, paths)
        digests = self._digests([path for path in paths if path in sizes], sizes)
        self.known |= {path: Entry(sizes[path], digest) for path, digest in digests.items()}

    def note(self, path: str) -> Callable[[BinaryIO], None]:
        """What to call with a file that is opened to be read. It raises UserError if the content is not that known."""
        return partial(self._note, path)

    def _note(self, path: str, file: BinaryIO) -> None:
        entry, known = entry_of(file), self.known.get(path)
        if known and known != (entry.size, known.sha256 and entry.sha256):
            raise UserError(
                f"{self.folder}/{path} has changed since this run, or an earlier one with the same output, looked at "
                f"it ({self.flag}).\nRestore the file, or start again with another --output"
            )
        self.known[path] = entry

    def forget(self, path: str) -> None:
        """Forget an unreadable file: it may be replaced by a good one."""
        self.known.pop(path, None)

    def entries(self, paths: Iterable[str]) -> Entries:
        """What is known of these files."""
        return {path: self.known[path] for path in paths if path in self.known}

    def _digests(self, paths: Sequence[str], sizes: Mapping[str, int]) -> dict[str, str]:
        """SHA-256 of the files, or of `SPREAD` of them if all files of `sizes` total too much."""
        if sum(sizes.values()) >= HASH_ALL:
            paths = spread(paths, SPREAD)
        return dict(zip(paths, _in_threads(lambda path: file_digest(f"{self.folder}/{path}"), paths), strict=True))


def spread(paths: Sequence[str], most: int) -> Sequence[str]:
    """At most `most` of the paths, spread evenly over the list, the first and the last among them."""
    if len(paths) <= most:
        return paths
    return [paths[i] for i in np.linspace(0, len(paths) - 1, most).round().astype(int)]


def file_sizes(folder: str, paths: Sequence[str]) -> dict[str, int]:
    """Size in bytes of each of the files that are there."""
    if is_remote(folder):
        sizes = dict(_remote_sizes(folder.rstrip("/"), ""))
        return {path: sizes[path] for path in paths if path in sizes}

    def size(path: str) -> int | None:
        try:
            return os.stat(f"{folder}/{path}").st_size
        except OSError:
            return None  # a broken link, for instance: reading it says so

    found = zip(paths, _in_threads(size, paths), strict=True)
    return {path: size for path, size in found if size is not None}


def _remote_sizes(folder: str, prefix: str) -> Iterable[tuple[str, int]]:
    """Path and size of every file below a remote folder: a listing has both, a request per file would take minutes."""
    for entry in bf.scandir(folder):
        if entry.is_dir:
            yield from _remote_sizes(bf.join(folder, entry.name), f"{prefix}{entry.name}/")
        elif entry.stat is not None:
            yield prefix + entry.name, entry.stat.size


def file_digest(path: str) -> str:
    """SHA-256 of a file, local or remote; "" if it cannot be read."""
    try:
        with bf.BlobFile(path, "rb") if is_remote(path) else open(path, "rb") as f:
            return entry_of(f).sha256 or ""
    except (OSError, bf.Error):
        return ""


def entry_of(file: BinaryIO) -> Entry:
    """Size and SHA-256 of an open file, which is read to its end."""
    size, digest = 0, hashlib.sha256()
    while piece := file.read(2**24):
        size += len(piece)
        digest.update(piece)
    return Entry(size, digest.hexdigest())


def _in_threads(function: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    """The results of a function that waits for the file system, in the order of the paths."""
    size = max(1, min(256, len(paths) // THREADS))
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(lambda piece: list(map(function, piece)), cut(paths, size))
        return [result for of_piece in results for result in of_piece]


# The file NAME_inputs.json


def inputs_of(result: str) -> str:
    """The list of the files that a result was computed from: NAME_inputs.json for NAME.npz."""
    return f"{os.path.splitext(result)[0]}_inputs.json"


def write_entries(path: str, entries: Mapping[str, Mapping[str, Entry]]) -> None:
    """Write entries by what the files are, such as "images": a line per file. Raises OSError."""
    groups = []
    for name, of_group in entries.items():
        lines = ",\n".join(f"{json.dumps(file)}: {json.dumps(entry)}" for file, entry in of_group.items())
        groups.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
    write_whole(path, ("{\n" + ",\n".join(groups) + "\n}\n").encode())


def read_entries(path: str) -> dict[str, Entries] | None:
    """What `write_entries` wrote; None if there is no such file. Raises UserError if the file is damaged."""
    try:
        groups = read_json(path)
        if groups is None:
            return None
        return as_entries(groups)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: it should list the files that were read. Remove it, to have it made again"
        ) from error


def as_entries(groups: Mapping[str, Mapping[str, Iterable]]) -> dict[str, Entries]:
    """Entries by what the files are, from lists [size, SHA-256] as JSON has them."""
    return {
        name: {file: Entry(int(size), digest and str(digest)) for file, (size, digest) in group.items()}
        for name, group in groups.items()
    }


def write_list(path: str, groups: Mapping[str, Inputs], paths: Mapping[str, Sequence[str]]) -> None:
    """List the files that a result was computed from, by kind. Raises UserError if the list cannot be written."""
    with named_write_errors(path):
        write_entries(path, {kind: inputs.entries(paths[kind]) for kind, inputs in groups.items()})


def compare_with_list(
    groups: Mapping[str, Inputs],
    paths: Mapping[str, Sequence[str]],
    known: Mapping[str, Entries] | None,
    owner: str,
    path: str,
) -> None:
    """Compare files with those that an output was computed from.

    Args:
        groups: files by kind; takes note of what is known of them.
        paths: paths of the files of each kind.
        known: entries on record, by kind; None if an earlier version made the output, which recorded none. Then the
            files of now are taken to be the same, with a warning.
        owner: the output, for messages.
        path: the list to be written if there is none.

    Raises:
        UserError: a file differs or is missing, or the list cannot be written.
    """
    for kind, inputs in groups.items():
        inputs.merge((known or {}).get(kind, {}), owner)
        inputs.compare(paths[kind], owner)
    if groups and known is None:
        logger.warn_once(
            f"{os.path.dirname(owner)} contains results of a version that did not record the contents of the files: "
            "those of now are taken to be the same"
        )
        for kind, inputs in groups.items():
            inputs.read_all(paths[kind])
        write_list(path, groups, paths)


def compare_with_record(folder: str, paths: Sequence[str], flag: str, record: str, owner: str) -> bool:
    """Compare a data set with a record of it, or record it: for a run that reads its files again and again.

    Args:
        folder: folder of the data set.
        paths: its files, relative to the folder.
        flag: flag that names the folder, for messages.
        record: path of the record, a file as `write_entries` writes it.
        owner: output that was computed from the data set, for messages.

    Returns:
        whether there was a record.

    Raises:
        UserError: the data set differs, or the record cannot be read or written.
    """
    recorded = read_entries(record)
    if recorded is not None:
        Inputs(folder, flag, recorded.get("images")).compare(paths, owner)
        return True
    inputs = Inputs(folder, flag)
    inputs.compare(paths, owner)
    inputs.read_all(paths)
    write_list(record, {"images": inputs}, {"images": paths})
    return False
