"""Folders of samples that can be resumed: what they were computed from, what is done, and when they are finished.

Beside the folder t_K_N_images lies t_K_N_run.json, the record: the settings, so that a later run with other settings
stops instead of mixing two experiments; and what was done, where and how fast. t_K_N_inputs.json lists the starting
images with their sizes and digests. While units of work are under way, their starting images are listed in
t_K_N_inputs_parts, a file per unit, which is written before the unit's samples.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import blobfile as bf
import numpy as np

from . import dist_util, logger
from .errors import ResultError, UserError, named_write_errors
from .forward_backward import Pixels, SampleFolder, Unit, cut_units
from .images.folder import LabelledImage
from .images.io import Check
from .runs.inputs import Entries, Inputs, read_entries, write_entries
from .runs.locks import Locks
from .runs.pipeline import ImageWriter
from .runs.records import Record, read_record, report_unreadable
from .runs.resumable import IMAGES, Pictures, Run
from .runs.settings import differences, machine_changes
from .runs.shards import Shard, check_num_shards
from .system.files import SCRATCH, remove_scratch, remove_scratch_of, walk, write_json

LONGEST_NAME = 255  # bytes of a file name, on nearly every file system
UPDATE = 600.0  # seconds to wait for other shards to update a record


@dataclass
class _State:
    """What a folder contains when a run begins.

    Attributes:
        record: its record, None if there is nothing to resume.
        files: paths of the files in it.
        entries: the starting images that are known; None for a folder of an earlier version, which did not list them.
    """

    record: Record | None
    files: set[str]
    entries: Entries | None


class SampleRun(Run):
    """A run that writes samples into folders, one for each time. Otherwise as `runs.Run`.

    Args:
        folders: folders by k.
        images: the chosen images.
    """

    def __init__(
        self,
        folders: Mapping[int, SampleFolder],
        images: Sequence[LabelledImage],
        settings: Mapping[str, Any],
        machine: Mapping[str, Any],
        args: argparse.Namespace,
        shard: Shard,
    ):
        locks = {shard.lock(folder.unit): folder.path for folder in folders.values()}
        super().__init__(locks, settings, machine, {}, args, shard)
        self.folders, self.images = folders, images
        self.units: list[Unit] = []
        self.written: Counter[int] = Counter()  # number of samples by k
        self.unreadable: dict[int, dict[str, str]] = {k: {} for k in folders}  # by k: path -> why

    def __enter__(self):
        """Raises UserError if a folder contains another experiment, or the starting images have changed."""
        super().__enter__()
        try:
            self.units, inputs = dist_util.on_main(
                open_folders,
                self.folders,
                self.images,
                self.args.batch_size,
                self.settings,
                self.machine,
                self.args.data_dir,
                self.shard,
                self.locks,
            )
        except BaseException:
            self._stack.close()
            raise
        self.inputs = {IMAGES: inputs}
        return self

    def read(self, read: Callable[[str, Check], np.ndarray], blank: np.ndarray) -> Iterator[tuple[Unit, Pictures]]:
        """This rank's units and their starting images. Those without any image that can be read are left out."""
        units = super().read(self.units, {IMAGES: read}, blank, lambda unit: unit.step_reverse)
        writing = self._write_while(units)
        self._stack.callback(writing.close)
        return writing

    def _write_while(self, units: Iterator[tuple[Unit, Pictures]]) -> Iterator[tuple[Unit, Pictures]]:
        to_do = sum(len(unit.todo) for unit in dist_util.share_of(self.units))
        with ImageWriter(self.args.image_format, self.args.jpeg_quality) as self._writer:
            for unit, pictures in units:
                unreadable = pictures.unreadable[IMAGES]
                self.unreadable[unit.step_reverse] |= {p: why for p, why in unreadable.items() if p in unit.todo}
                if unit.todo <= unreadable.keys():
                    self.bar.total -= unit.step_reverse
                    continue
                yield unit, pictures
                self.bar.set_postfix(images=f"{self.written.total()}/{to_do}")
        self.bar.set_postfix(images=f"{self.written.total()}/{to_do}")

    def write(self, unit: Unit, pictures: Pictures, samples: Pixels) -> None:
        """Write the samples of a unit that are missing, in a thread."""
        folder = self.folders[unit.step_reverse]
        list_inputs = partial(
            write_entries, f"{folder.inputs_parts}/{unit.index:06d}.json", self.entries(unit, pictures)
        )
        self._writer.call(list_inputs)
        for i, image in enumerate(unit.images):
            if image.path in unit.todo - pictures.unreadable[IMAGES].keys():
                path = f"{folder.path}/{folder.sample(image.path)}"
                self._writer.submit(path, partial(samples.image, i), partial(self.written.update, [unit.step_reverse]))

    def finish(self) -> int:
        """Record what all ranks did. Returns the exit status; raises ResultError if samples have disappeared."""
        facts = self.facts()
        return dist_util.on_main(self._finish, dist_util.gather_objects((self.written, self.unreadable)), facts)

    def _finish(
        self, reports: Sequence[tuple[Counter[int], dict[int, dict[str, str]]]], facts: Mapping[str, Any]
    ) -> int:
        self.locks.check()
        runs = {k: {"samples_written": sum(written[k] for written, _ in reports), **facts} for k in self.folders}
        unreadable = {k: {p: why for _, bad in reports for p, why in bad[k].items()} for k in self.folders}
        close_folders(self.folders, self.images, self.args.batch_size, self.shard, runs, unreadable)
        of_all_times = {path: why for of_time in unreadable.values() for path, why in of_time.items()}
        return report_unreadable(of_all_times, "they have no sample", len(self.images))


def check_names(folders: Mapping[int, SampleFolder], images: Iterable[LabelledImage]) -> None:
    """Raise UserError if the name of a sample would be too long for a file."""
    for folder in folders.values():
        for image in images:
            for part in folder.sample(image.path).split("/"):
                if (length := len(os.fsencode(part))) > LONGEST_NAME:
                    raise UserError(
                        f"the sample of {image.path} would have a name of {length} bytes, {part}: expected at most "
                        f"{LONGEST_NAME}.\nShorten the image's name (--data_dir)"
                    )


def open_folders(
    folders: Mapping[int, SampleFolder],
    images: Sequence[LabelledImage],
    batch_size: int,
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
    data_dir: str,
    shard: Shard,
    locks: Locks,
) -> tuple[list[Unit], Inputs]:
    """Begin or resume folders of samples. For rank 0, which holds the `locks` of this shard.

    Args:
        folders: folders by k.
        images: the chosen images.
        batch_size: images per unit of work.
        settings: what decides the samples.
        machine: hardware, threads and versions, which decide the last digits: a difference is a warning.
        data_dir: folder of the images.
        shard: part of the work that this run does.
        locks: this shard's locks.

    Returns:
        this shard's units of work that are not done, and the starting images as far as they are known.

    Raises:
        UserError: a folder contains another experiment, the starting images have changed, or a file cannot be written.
    """
    with _update(folders):
        states = {k: _look(folder, settings, images, batch_size, shard, locks) for k, folder in folders.items()}
        done = {k: {i.path for i in images if folders[k].sample(i.path) in state.files} for k, state in states.items()}
        inputs = Inputs(data_dir, "--data_dir")
        for k, state in states.items():
            inputs.merge(state.entries or {}, folders[k].path)
        paths = [image.path for image in images]
        inputs.compare(paths, next(iter(folders.values())).output)
        if unlisted := sorted({path for k, state in states.items() if state.entries is None for path in done[k]}):
            logger.warn(
                f"{next(iter(folders.values())).output} was begun by a version that did not record the contents of the "
                "images: those of now are taken to be the same"
            )
            inputs.read_all(unlisted)
        for k, folder in folders.items():
            _begin(folder, states[k], settings, machine, shard)
            known = done[k] if states[k].entries is None else states[k].entries.keys()
            entries = {p: e if p in known else e._replace(sha256=None) for p, e in inputs.entries(paths).items()}
            _write(write_entries, folder.inputs, {"images": entries})
            _remove(_listed_parts(folder).values())

    everything = [unit for k in folders for unit in cut_units(images, batch_size, k, done[k])]
    units = [unit for unit in shard.units(everything) if unit.todo]
    for k, state in states.items():
        begun_with = state.record["begun_with"] if state.record else machine
        if any(unit.step_reverse == k for unit in units) and (changes := machine_changes(begun_with, machine)):
            logger.warn(f"{folders[k].path}: {'; '.join(changes)}. Samples will agree to rounding, not to the byte")
    return units, inputs


def close_folders(
    folders: Mapping[int, SampleFolder],
    images: Sequence[LabelledImage],
    batch_size: int,
    shard: Shard,
    runs: Mapping[int, Mapping[str, Any]],
    unreadable: Mapping[int, Mapping[str, str]],
) -> None:
    """Record the end of a run, after looking at what is in the folders. For rank 0.

    Args:
        folders: folders by k.
        images: the chosen images.
        batch_size: images per unit of work.
        shard: part of the work that this run did.
        runs: by k, what the record should say of this run; a run that had nothing to do leaves no trace.
        unreadable: by k, path of each image that could not be read, and why.

    Raises:
        ResultError: samples of this run are not there.
        UserError: a record cannot be written.
    """
    everything = [unit for k in folders for unit in cut_units(images, batch_size, k)]
    mine = {k: {i.path for u in shard.units(everything) if u.step_reverse == k for i in u.images} for k in folders}
    lost: dict[int, list[str]] = {}
    with _update(folders):
        for k, folder in folders.items():
            record = _read_record(folder)
            if record is None:
                raise ResultError(f"{folder.record} has disappeared: was the output removed during the run?")
            files = set(walk(folder.path))
            missing = [image.path for image in images if folder.sample(image.path) not in files]
            known = {**_earlier_unreadable(record), **unreadable[k]}
            bad = {path: known[path] for path in missing if path in known}
            lost[k] = [path for path in missing if path in mine[k] and path not in bad]
            _join_inputs(folder, finished=not missing)
            run = [runs[k]] if runs[k]["samples_written"] or not record["runs"] else []
            counts = {"chosen": len(images), "with_sample": len(images) - len(missing), "unreadable": bad}
            changes = {"finished": not missing, "images": counts, "runs": [*record["runs"], *run]}
            _write(write_json, folder.record, {**record, **changes})
            words = f"k = {k}: {len(images) - len(missing)} of {len(images)} samples are in {folder.path}"
            if others := len(missing) - len(bad) - len(lost[k]):
                words += f"; {others} are for the other shards"
            logger.info(words)
    if gone := [f"{folders[k].path}/{folders[k].sample(path)}" for k, paths in lost.items() for path in paths]:
        raise ResultError(
            f"{len(gone)} sample(s) that were written are missing, such as {gone[0]}:\n"
            "was the folder changed during the run? Rerun the same command to make them again"
        )


def recorded_compilation(folders: Iterable[SampleFolder]) -> bool | None:
    """Whether the run on record in these folders compiled its network; None if there is no record.

    Raises UserError if some did and others did not.
    """
    compiled = {}
    for folder in folders:
        with suppress(UserError):  # a damaged record is reported by `open_folders`
            if record := _read_record(folder):
                compiled[folder.record] = bool(record["settings"].get("compile"))
    if len(set(compiled.values())) > 1:
        yes, no = (next(path for path, was in compiled.items() if was is which) for which in (True, False))
        raise UserError(
            f"{yes} is of a compiled run and {no} is not: resume these times in separate commands (--step_reverse)"
        )
    return next(iter(compiled.values()), None)


def recorded_inputs(folder: SampleFolder) -> Entries | None:
    """The starting images of a folder's samples, finished or not; None if nothing lists them. Raises UserError."""
    listed = read_entries(folder.inputs)
    if listed is None:
        return None
    parts = [read_entries(path) or {} for path in _listed_parts(folder).values()]
    return {path: entry for group in (listed, *parts) for path, entry in group.get("images", {}).items()}


# What is there


def _look(
    folder: SampleFolder,
    settings: Mapping[str, Any],
    images: Sequence[LabelledImage],
    batch_size: int,
    shard: Shard,
    locks: Locks,
) -> _State:
    """Look at a folder. Raises UserError if it contains something else than samples of these settings."""
    others = locks.others()
    if not others:
        for path in (folder.path, folder.inputs_parts):
            remove_scratch(path)
        for path in (folder.record, folder.inputs):
            remove_scratch_of(path)
    files = {path for path in walk(folder.path) if not path.endswith(SCRATCH)}
    if not files and not others:  # nothing was computed, or the folder was moved away: no experiment to mix with
        return _State(None, files, {})
    record = _read_record(folder)
    if record is None and files:
        raise UserError(
            f"{folder.path} contains files, but {folder.record} is missing: their settings are not known.\n"
            "Choose another --output, or move the folder away"
        )
    if record is None or (not files and differences(record["settings"], settings) and not locks.rivals()):
        return _State(None, files, {})
    if changes := differences(record["settings"], settings):
        raise UserError(
            f"{folder.path} was begun with other settings: {'; '.join(changes)}.\n"
            "Resume with the settings on record, choose another --output, or move the folder away"
        )
    check_num_shards(record.get("num_shards"), shard, folder.path)
    listed = read_entries(folder.inputs)
    if listed is None:
        return _State(record, files, None)
    entries = dict(listed.get("images", {}))
    units = cut_units(images, batch_size, folder.step_reverse)
    for index, path in _listed_parts(folder).items():
        of_unit = (read_entries(path) or {}).get("images", {})
        entries |= of_unit
        for image in units[index].images if index < len(units) else ():
            if image.path not in of_unit:
                entries.pop(image.path, None)  # it could not be read, and may have been repaired since
    for path in _earlier_unreadable(record):
        entries.pop(path, None)
    return _State(record, files, entries)


def _read_record(folder: SampleFolder) -> Record | None:
    """A folder's record, None if there is none. Raises UserError if it is damaged."""
    return read_record(folder.record, {"settings": dict, "begun_with": dict, "runs": list}, folder.path)


def _earlier_unreadable(record: Record) -> dict[str, str]:
    """The images that earlier runs, and other shards, could not read: path -> why."""
    counts = record.get("images")
    found = counts.get("unreadable") if isinstance(counts, dict) else None
    return found if isinstance(found, dict) else {}


def _listed_parts(folder: SampleFolder) -> dict[int, str]:
    """The lists of starting images of single units: number of the unit -> path."""
    names = (re.fullmatch(r"(\d+)\.json", name) for name in walk(folder.inputs_parts))
    return {int(name[1]): f"{folder.inputs_parts}/{name[0]}" for name in names if name}


# Writing


def _begin(
    folder: SampleFolder,
    state: _State,
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
    shard: Shard,
) -> None:
    """Write the record of a folder that is not resumed."""
    if state.record is None:
        record = {"finished": False, "num_shards": shard.count}
        record |= {"settings": dict(settings), "begun_with": dict(machine), "runs": []}
        _write(write_json, folder.record, record)


def _join_inputs(folder: SampleFolder, finished: bool) -> None:
    """Join the lists of single units with the folder's."""
    parts = _listed_parts(folder)
    if parts:
        _write(write_entries, folder.inputs, {"images": recorded_inputs(folder) or {}})
        _remove(parts.values())
    if finished and bf.isdir(folder.inputs_parts):
        bf.rmtree(folder.inputs_parts)


def _update(folders: Mapping[int, SampleFolder]) -> Locks:
    """Locks for reading and writing the records of folders, while other shards may do so."""
    return Locks({f"{folder.record}.lock": folder.record for folder in folders.values()}, wait=UPDATE)


def _write(write, path: str, content: Any) -> None:
    with named_write_errors(path):
        write(path, content)


def _remove(paths) -> None:
    for path in paths:
        bf.remove(path)
