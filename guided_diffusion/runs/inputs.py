"""Identity of the files that a run reads, by content, so that results of different data are never mixed.

A run records the name and size of every file that it selects, and the SHA-256 of each file that it reads. A rerun
compares the sizes of all files that were read, and their digests, or 64 evenly spaced ones if the files total 1 GB or
more. For ImageNet's 50,000 files, this takes seconds. A file that was never read, such as a damaged one, may change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, TypeVar

import blobfile as bf
import numpy as np

from .. import logger
from ..errors import UserError, named_write_errors
from ..system.files import is_remote, read_json, write_whole
from .shards import cut

HASH_ALL = 10**9  # bytes: total size below which a rerun compares the digests of all files
SPREAD = 64  # number of digests to compare otherwise
THREADS = 16  # threads that wait for the file system

T = TypeVar("T")


class Entry(NamedTuple):
    """Size of a file in bytes, and SHA-256 of its content; None if it has not been read."""

    size: int
    sha256: str | None


Entries = dict[str, Entry]  # by path relative to the folder


class Inputs:
    """Files of one folder that a run reads, with the entries known from earlier runs and from this one.

    Args:
        folder: local or remote folder.
        flag: flag that names the folder, for messages.
        known: entries that earlier runs recorded.
    """

    def __init__(self, folder: str, flag: str, known: Mapping[str, Entry] | None = None):
        self.folder, self.flag = folder, flag
        self.known: Entries = dict(known or {})

    def compare(self, paths: Sequence[str], owner: str, remedy: str = "choose another --output") -> None:
        """Compare the files with the known entries, and record the sizes of all files.

        Args:
            paths: files that the run selects.
            owner: output that was computed from the known files, for the message.
            remedy: alternative to restoring the files, for the message.

        Raises UserError if a file differs or is missing.
        """
        sizes = file_sizes(self.folder, paths)
        known = self.entries(paths)
        differing = [path for path, entry in known.items() if entry.size != sizes.get(path)]
        if not differing:
            digests = self._digests([path for path, entry in known.items() if entry.sha256], sizes)
            differing = [path for path, digest in digests.items() if digest != known[path].sha256]
        if differing:
            path = differing[0]
            before, now = known[path].size, sizes.get(path)
            change = "its content has changed"
            if now != before:
                change = f"it had {before:,} bytes and " + ("is missing" if now is None else f"has {now:,}")
            more = f" ({len(differing)} such files)" if len(differing) > 1 else ""
            raise UserError(
                f"{owner} was computed from other files: {self.folder}/{path} differs, {change}{more}.\n"
                f"Use the original files ({self.flag}), or {remedy}"
            )
        self.known |= {path: Entry(size, known[path].sha256 if path in known else None) for path, size in sizes.items()}

    def merge(self, entries: Mapping[str, Entry], owner: str) -> None:
        """Add entries that another output, `owner`, recorded. Raises UserError if they contradict the known ones."""
        for path, entry in entries.items():
            known = self.known.get(path)
            if known and (known.size != entry.size or (None not in (known.sha256, entry.sha256) and known != entry)):
                raise UserError(
                    f"{owner} was computed from another version of {path} ({self.flag}).\n"
                    "Choose another --output, or restore the file"
                )
            if known is None or entry.sha256:
                self.known[path] = entry

    def read_all(self, paths: Sequence[str]) -> None:
        """Record the digests of files that an earlier version read; only 64 of them if they total 1 GB or more."""
        sizes = file_sizes(self.folder, paths)
        digests = self._digests([path for path in paths if path in sizes], sizes)
        self.known |= {path: Entry(sizes[path], digest) for path, digest in digests.items()}

    def digest_check(self, path: str) -> Callable[[BinaryIO], None]:
        """Function that records the entry of an open file. It raises UserError if the content has changed."""

        def check(file: BinaryIO) -> None:
            entry, known = entry_of(file), self.known.get(path)
            if known and known != (entry.size, known.sha256 and entry.sha256):
                raise UserError(
                    f"{self.folder}/{path} has changed since this run or an earlier one with the same output read it "
                    f"({self.flag}).\nRestore the file, or start over with another --output"
                )
            self.known[path] = entry

        return check

    def forget(self, path: str) -> None:
        """Drop the entry of an unreadable file, which may be replaced."""
        self.known.pop(path, None)

    def entries(self, paths: Iterable[str]) -> Entries:
        """Known entries of these files."""
        return {path: self.known[path] for path in paths if path in self.known}

    def _digests(self, paths: Sequence[str], sizes: Mapping[str, int]) -> dict[str, str]:
        """SHA-256 of the files, or of `SPREAD` of them if `sizes` total too much."""
        if sum(sizes.values()) >= HASH_ALL:
            paths = evenly_spaced(paths, SPREAD)
        return dict(zip(paths, _in_threads(lambda path: file_digest(f"{self.folder}/{path}"), paths), strict=True))


def evenly_spaced(paths: Sequence[str], most: int) -> Sequence[str]:
    """At most `most` evenly spaced items of the list, including the first and the last."""
    if len(paths) <= most:
        return paths
    return [paths[i] for i in np.linspace(0, len(paths) - 1, most).round().astype(int)]


def file_sizes(folder: str, paths: Sequence[str]) -> dict[str, int]:
    """Sizes in bytes of the files that exist."""
    if is_remote(folder):
        sizes = dict(_remote_sizes(folder.rstrip("/"), ""))
        return {path: sizes[path] for path in paths if path in sizes}

    def size(path: str) -> int | None:
        try:
            return os.stat(f"{folder}/{path}").st_size
        except OSError:
            return None  # for example a broken link, which fails again on reading

    sizes = zip(paths, _in_threads(size, paths), strict=True)
    return {path: size for path, size in sizes if size is not None}


def _remote_sizes(folder: str, prefix: str) -> Iterable[tuple[str, int]]:
    """Path and size of every file below a remote folder, from listings: a request per file would take minutes."""
    for entry in bf.scandir(folder):
        if entry.is_dir:
            yield from _remote_sizes(bf.join(folder, entry.name), f"{prefix}{entry.name}/")
        elif entry.stat is not None:
            yield prefix + entry.name, entry.stat.size


def file_digest(path: str) -> str:
    """SHA-256 of a local or remote file; "" if it cannot be read."""
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
    """Results of a function that waits for the file system, in the order of the paths."""
    size = max(1, min(256, len(paths) // THREADS))
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(lambda piece: list(map(function, piece)), cut(paths, size))
        return [result for piece in results for result in piece]


# The file NAME_inputs.json


def inputs_of(result: str) -> str:
    """Path of the list of a result's input files: NAME_inputs.json for NAME.npz."""
    return f"{os.path.splitext(result)[0]}_inputs.json"


def write_entries(path: str, entries: Mapping[str, Mapping[str, Entry]]) -> None:
    """Write entries by kind, such as "images", with a line per file. Raises OSError."""
    groups = []
    for kind, files in entries.items():
        lines = ",\n".join(f"{json.dumps(file)}: {json.dumps(entry)}" for file, entry in files.items())
        groups.append(f"{json.dumps(kind)}: {{\n{lines}\n}}")
    write_whole(path, ("{\n" + ",\n".join(groups) + "\n}\n").encode())


def read_entries(path: str) -> dict[str, Entries] | None:
    """Entries by kind, from `write_entries`; None if the file does not exist. Raises UserError if it is corrupted."""
    try:
        groups = read_json(path)
        return None if groups is None else as_entries(groups)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is corrupted: it should list the files that were read. Remove it to have it recreated"
        ) from error


def as_entries(groups: Mapping[str, Mapping[str, Iterable]]) -> dict[str, Entries]:
    """Entries by kind, from JSON's lists [size, SHA-256]."""
    return {
        kind: {file: Entry(int(size), digest and str(digest)) for file, (size, digest) in files.items()}
        for kind, files in groups.items()
    }


def write_list(path: str, groups: Mapping[str, Inputs], paths: Mapping[str, Sequence[str]]) -> None:
    """Write the list of a result's input files, by kind. Raises UserError."""
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
        groups: inputs by kind, to which the known entries are added.
        paths: paths of the files, by kind.
        known: recorded entries, by kind; None if an earlier version, which recorded none, made the output. Then the
            current files are assumed to be the same, with a warning, and listed.
        owner: the output, for messages.
        path: path of the list.

    Raises UserError if a file differs or is missing, or the list cannot be written.
    """
    for kind, inputs in groups.items():
        inputs.merge((known or {}).get(kind, {}), owner)
        inputs.compare(paths[kind], owner)
    if groups and known is None:
        logger.warn_once(
            f"{os.path.dirname(owner)} contains results of a version that did not record the contents of the files: "
            "the current files are assumed to be the same"
        )
        for kind, inputs in groups.items():
            inputs.read_all(paths[kind])
        write_list(path, groups, paths)


def compare_with_record(folder: str, paths: Sequence[str], flag: str, record: str, owner: str) -> bool:
    """Compare a data set with the record of it, or create the record; for runs that read their files repeatedly.

    Args:
        folder: folder of the data set.
        paths: its files, relative to the folder.
        flag: flag that names the folder, for messages.
        record: path of the record, in the format of `write_entries`.
        owner: output that was computed from the data set, for messages.

    Returns whether there was a record. Raises UserError if the data set differs, or the record cannot be read or
    written.
    """
    recorded = read_entries(record)
    inputs = Inputs(folder, flag, (recorded or {}).get("images"))
    inputs.compare(paths, owner)
    if recorded is None:
        inputs.read_all(paths)
        write_list(record, {"images": inputs}, {"images": paths})
    return recorded is not None
