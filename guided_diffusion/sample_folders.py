"""Resumable folders of samples, one per time.

Next to the folder t_K_N_images, t_K_N_run.json records the settings, so that a run with other settings stops instead of
mixing two experiments, and what each run did, on which hardware and how fast. t_K_N_inputs.json lists the starting
images with their sizes and digests. During a run, t_K_N_inputs_parts has one such list per unit, written before the
unit's samples. The numbers of trajectories and of turns are not settings: a later run may ask for more.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import blobfile as bf
import numpy as np

from . import dist_util, logger
from .errors import ResultError, UserError, named_write_errors
from .forward_backward import SAMPLES, Chain, Pixels, SampleFolder, Unit, cut_units, unfinished_turns
from .images.folder import LabelledImage
from .images.io import Check, UnreadableImage
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

KEYS = {IMAGES: "unreadable", SAMPLES: "unreadable_samples"}  # in the record, by kind

Unreadable = dict[str, str]  # path of an image -> why it, or a sample of it, cannot be read
UnreadableFiles = dict[int, dict[str, Unreadable]]  # by k and by kind: starting images, and samples that a turn needs
ReadImage = Callable[[str, Check | None], np.ndarray]  # see `images.io.read_image`


class _Contents(NamedTuple):
    """The contents of a folder when a run starts.

    Attributes:
        record: the record, None if there is nothing to resume.
        files: paths of the files.
        entries: starting images on record; None for a folder written by a version that did not list them.
        parts: paths of the lists of single units that are merged into `entries`; other shards may write more of them.
    """

    record: Record | None
    files: set[str]
    entries: Entries | None
    parts: Collection[str]


class SampleRun(Run):
    """A run that writes samples into one folder per time.

    Args:
        folders: folders by k.
        images: the chosen images.
        settings, machine, args, shard: see `Run`.

    Attributes:
        chains: this shard's unfinished units.
        to_do: number of samples that they lack.
        total: number of samples of all shards.
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
        locks = {shard.lock(folder.prefix): folder.path for folder in folders.values()}
        super().__init__(locks, settings, machine, {}, args, shard)
        self.folders, self.images = folders, images
        self.total = len(folders) * len(images) * args.num_trajectories * args.num_turns
        self.to_do, self.chains = 0, list[Chain]()
        self.written: Counter[int] = Counter()  # number of samples by k
        self.unreadable: UnreadableFiles = {k: {kind: {} for kind in KEYS} for k in folders}

    def _open(self) -> None:
        """Raises UserError if a folder contains another experiment, or the starting images have changed."""
        self.chains, inputs = dist_util.on_main(self._open_folders)
        self.to_do = _samples_of(self.chains)
        self.inputs = {IMAGES: inputs, SAMPLES: Inputs(next(iter(self.folders.values())).output, "--output")}

    def read(self, read: ReadImage, blank: np.ndarray) -> Iterator[tuple[Unit, Pictures]]:
        """Yield the units that this rank takes, turn by turn, and their starting images. All ranks must call this.

        Units without a readable image are left out. The next turn of a unit is read from the samples of the last one,
        which the caller must `write` first.
        """
        chains = super().read(self.chains, {IMAGES: read, SAMPLES: read}, blank, lambda chain: chain.steps)
        writing = self._write_while(chains, read, blank)
        self._stack.callback(writing.close)
        return writing

    def _write_while(
        self, chains: Iterator[tuple[Chain, Pictures]], read: ReadImage, blank: np.ndarray
    ) -> Iterator[tuple[Unit, Pictures]]:
        with ImageWriter(self.args.image_format, self.args.jpeg_quality) as self._writer:
            for chain, pictures in chains:
                for unit in chain.turns:
                    if unit is not chain.turns[0]:
                        self._writer.wait()
                        pictures = _read_samples(chain.at(unit), read, blank)
                    if self._note_unreadable(chain.at(unit), pictures):
                        yield unit, pictures
                    else:
                        self.bar.update(unit.step_reverse)
                    self._show_written()
        self._show_written()

    def _show_written(self) -> None:
        if dist_util.get_world_size() == 1:  # rank 0 does not know how many images the others have written
            self.bar.set_postfix(images=f"{self.written.total()}/{self.to_do}")

    def _note_unreadable(self, chain: Chain, pictures: Pictures) -> bool:
        """Note the images whose samples cannot be made. Returns whether other samples are to be made."""
        unit = chain.turns[0]
        ((kind, paths),) = chain.files.items()
        unreadable = [row for row in sorted(unit.todo) if not pictures.readable[row]]
        noted = self.unreadable[unit.step_reverse]
        for row in unreadable:
            path = unit.images[row].path
            if path not in noted[IMAGES]:  # of which there is no sample to read
                noted[kind].setdefault(path, pictures.unreadable[kind][paths[row]])
        return len(unreadable) < len(unit.todo)

    def write(self, unit: Unit, pictures: Pictures, samples: Pixels) -> None:
        """Write a unit's missing samples in a thread."""
        folder = self.folders[unit.step_reverse]
        if unit.turn == 1:
            part = f"{folder.inputs_parts}/{unit.index:06d}.json"
            self._writer.call(partial(write_entries, part, self.entries(Chain([unit], folder), pictures)))
        for row in sorted(unit.todo):
            if pictures.readable[row]:
                path, count = f"{folder.path}/{unit.samples[row]}", partial(self.written.update, [unit.step_reverse])
                self._writer.submit(path, partial(samples.image, row), count)

    def finish(self) -> int:
        """Record the work of all ranks. Returns the exit status; raises ResultError if samples have disappeared."""
        self.bar.finish()
        facts = self.facts()
        return dist_util.on_main(self._close_folders, dist_util.gather_objects((self.written, self.unreadable)), facts)

    # On rank 0

    def _open_folders(self) -> tuple[list[Chain], Inputs]:
        """Start or resume the folders. Returns this shard's unfinished units and the starting images on record.

        Raises:
            UserError: a folder contains another experiment, the starting images have changed, or a file cannot be
                written.
        """
        paths = [image.path for image in self.images]
        inputs = Inputs(self.args.data_dir, "--data_dir")
        with self._locked_records():
            contents = {k: self._contents_of(folder) for k, folder in self.folders.items()}
            present = {k: found.files for k, found in contents.items()}
            there = {  # for each image, whether each of its samples is
                k: {path: [name in found.files for name in self._samples_of_image(k, path)] for path in paths}
                for k, found in contents.items()
            }
            done = {k: {path for path, samples in of_images.items() if any(samples)} for k, of_images in there.items()}
            for k, found in contents.items():
                inputs.merge(found.entries or {}, self.folders[k].path)
            output = next(iter(self.folders.values())).output
            inputs.compare(paths, output)
            if unlisted := sorted({p for k, found in contents.items() if found.entries is None for p in done[k]}):
                logger.warn(
                    f"{output} was started by a version that did not record the contents of the images: assuming that "
                    "they have not changed"
                )
                inputs.read_all(unlisted)
            for k, folder in self.folders.items():
                begun = {"settings": dict(self.settings), "begun_with": dict(self.machine)}
                record = contents[k].record or {"num_shards": self.shard.count, **begun, "runs": []}
                lacking = not all(map(all, there[k].values()))
                if lacking and record.get("finished", True):
                    with named_write_errors(folder.record):
                        write_json(folder.record, {**record, "finished": False})
                used = done[k] if contents[k].entries is None else contents[k].entries.keys()
                entries = {p: e if p in used else e._replace(sha256=None) for p, e in inputs.entries(paths).items()}
                with named_write_errors(folder.inputs):
                    write_entries(folder.inputs, {"images": entries})
                for path in contents[k].parts:
                    bf.remove(path)

        chains = [chain for chain in self._chains_of_shard(present) if chain.turns]
        for k, found in contents.items():
            changes = machine_changes(found.record["begun_with"], self.machine) if found.record else []
            if changes and any(chain.folder.step_reverse == k for chain in chains):
                path = self.folders[k].path
                logger.warn(f"{path}: {'; '.join(changes)}. Samples will agree to rounding, not to the byte")
        return chains, inputs

    def _contents_of(self, folder: SampleFolder) -> _Contents:
        """The contents of a folder. Raises UserError unless they are samples with these settings."""
        others = self.locks.other_shards()
        if not others:
            for path in (folder.path, folder.inputs_parts):
                remove_scratch(path)
            for path in (folder.record, folder.inputs):
                remove_scratch_of(path)
        files = {path for path in walk(folder.path) if not path.endswith(SCRATCH)}
        parts = _parts_of_inputs(folder)
        if not files and not others:  # nothing was computed, or the folder was moved away: no experiment to mix with
            return _Contents(None, files, {}, parts.values())
        record = _read_record(folder)
        if record is None and files:
            raise UserError(
                f"{folder.path} contains files, but {folder.record} is missing: their settings are not known.\n"
                "Choose another --output, or move the folder away"
            )
        changes = differences(record["settings"], self.settings) if record else []
        if record is None or (not files and changes and not self.locks.conflicting_shards()):
            return _Contents(None, files, {}, parts.values())
        if changes:
            raise UserError(
                f"{folder.path} was started with other settings: {'; '.join(changes)}.\n"
                "Resume with the recorded settings, choose another --output, or move the folder away"
            )
        check_num_shards(record.get("num_shards"), self.shard, folder.path)
        listed = read_entries(folder.inputs)
        if listed is None:
            return _Contents(record, files, None, parts.values())
        entries = dict(listed.get("images", {}))
        for path in parts.values():
            entries |= (read_entries(path) or {}).get("images", {})
        for image in self.images:  # one that was never read may have been repaired or replaced since
            entry = entries.get(image.path)
            if entry and not entry.sha256 and files.isdisjoint(self._samples_of_image(folder.step_reverse, image.path)):
                del entries[image.path]
        return _Contents(record, files, entries, parts.values())

    def _close_folders(self, reports: Sequence[tuple[Counter[int], UnreadableFiles]], facts: Record) -> int:
        """Check the folders and record the run. Returns the exit status.

        Args:
            reports: for each rank, `written` and `unreadable`.
            facts: see `Run.facts`.

        Raises:
            ResultError: samples of this run are not there.
            UserError: a record cannot be written.
        """
        self.locks.check()
        mine = {
            (chain.folder.step_reverse, unit.samples[row])
            for chain in self._chains_of_shard({})
            for unit in chain.turns
            for row in unit.todo
        }
        all_unreadable: dict[str, Unreadable] = {kind: {} for kind in KEYS}
        disappeared: list[str] = []
        with self._locked_records():
            for k, folder in self.folders.items():
                record = _read_record(folder)
                if record is None:
                    raise ResultError(f"{folder.record} has disappeared: was the output removed during the run?")
                files = set(walk(folder.path))
                lacking = {
                    image.path: names
                    for image in self.images
                    if (names := [name for name in self._samples_of_image(k, image.path) if name not in files])
                }
                unreadable = {}
                for kind in KEYS:
                    noted = {path: why for _, of_rank in reports for path, why in of_rank[k][kind].items()}
                    all_unreadable[kind] |= noted
                    known = {**_recorded_unreadable(record, kind), **noted}
                    unreadable[kind] = {path: known[path] for path in lacking if path in known}
                explained = {*unreadable[IMAGES], *unreadable[SAMPLES]}
                missing = [name for path, names in lacking.items() if path not in explained for name in names]
                lost = [name for name in missing if (k, name) in mine]
                disappeared += [f"{folder.path}/{name}" for name in lost]
                if parts := _parts_of_inputs(folder):
                    with named_write_errors(folder.inputs):
                        write_entries(folder.inputs, {"images": recorded_inputs(folder) or {}})
                    for path in parts.values():
                        bf.remove(path)
                if not lacking and bf.isdir(folder.inputs_parts):
                    bf.rmtree(folder.inputs_parts)

                with_sample = len(self.images) - len(lacking)
                record["finished"] = not lacking
                record["images"] = {"chosen": len(self.images), "with_sample": with_sample}
                record["images"] |= {KEYS[kind]: found for kind, found in unreadable.items() if found or kind == IMAGES}
                samples_written = sum(written[k] for written, _ in reports)
                if samples_written or not record["runs"]:  # a run with nothing to do leaves no trace
                    record["runs"] = [*record["runs"], {"samples_written": samples_written, **facts}]
                with named_write_errors(folder.record):
                    write_json(folder.record, record)
                total, others = self.total // len(self.folders), len(missing) - len(lost)
                logger.info(
                    f"k = {k}: {total - sum(map(len, lacking.values()))} of {total} samples are in {folder.path}"
                    + (f"; {others} belong to other shards" if others else "")
                )
        if disappeared:
            raise ResultError(
                f"{len(disappeared)} sample(s) that were written are missing, such as {disappeared[0]}:\n"
                "was the folder changed during the run? Rerun the same command to compute them again"
            )
        return max(
            report_unreadable(all_unreadable[IMAGES], "they have no sample", len(self.images)),
            report_unreadable(all_unreadable[SAMPLES], "no turn can start from them", things="samples"),
        )

    def _chains_of_shard(self, present: Mapping[int, set[str]]) -> Sequence[Chain]:
        """This shard's units of all times; `present` has the samples in their folders, by k. Some may have no turns."""
        args = self.args
        chains = [
            unfinished_turns(unit, folder, args.num_turns, present.get(k, ()))
            for k, folder in self.folders.items()
            for unit in cut_units(self.images, args.batch_size, k, args.num_trajectories)
        ]
        return self.shard.units(chains)

    def _samples_of_image(self, k: int, path: str) -> list[str]:
        """The samples of an image at time k that this run asks for."""
        turns, trajectories = range(1, self.args.num_turns + 1), range(1, self.args.num_trajectories + 1)
        return [self.folders[k].sample(path, j, turn) for turn in turns for j in trajectories]

    def _locked_records(self) -> Locks:
        """Locks for updating the records of the folders, which several shards share."""
        return Locks({f"{folder.record}.lock": folder.record for folder in self.folders.values()}, wait=UPDATE)


def _samples_of(chains: Iterable[Chain]) -> int:
    """The number of samples that these units lack."""
    return sum(len(unit.todo) for chain in chains for unit in chain.turns)


def _read_samples(chain: Chain, read: ReadImage, blank: np.ndarray) -> Pictures:
    """The samples that a turn starts from. Those that do not exist are replaced by a blank, like unreadable images."""
    values, reasons, paths = [], {}, chain.files[SAMPLES]
    for path in paths:
        try:
            values.append(read(f"{chain.folder.output}/{path}", None))
        except UnreadableImage as error:
            values.append(blank)
            reasons[path] = str(error)
    return Pictures(values, np.array([path not in reasons for path in paths], bool), {SAMPLES: reasons})


def check_names(
    folders: Mapping[int, SampleFolder], images: Iterable[LabelledImage], num_trajectories: int = 1, num_turns: int = 1
) -> None:
    """Raise UserError if the name of a sample would be too long for a file."""
    for folder in folders.values():
        for image in images:
            for part in folder.sample(image.path, num_trajectories, num_turns).split("/"):
                if (length := len(os.fsencode(part))) > LONGEST_NAME:
                    raise UserError(
                        f"the sample of {image.path} would have a name of {length} bytes, {part}: expected at most "
                        f"{LONGEST_NAME}.\nShorten the image's name (--data_dir)"
                    )


def recorded_compilation(folders: Iterable[SampleFolder]) -> bool | None:
    """Whether the recorded runs in these folders compiled their network; None without a record.

    Raises UserError if some did and others did not.
    """
    compiled: dict[bool, str] = {}
    for folder in folders:
        with suppress(UserError):  # `SampleRun` reports a damaged record
            if record := _read_record(folder):
                compiled.setdefault(bool(record["settings"].get("compile")), folder.record)
    if len(compiled) == 2:
        raise UserError(
            f"{compiled[True]} is of a compiled run and {compiled[False]} is not: resume these times in separate "
            "commands (--step_reverse)"
        )
    return next(iter(compiled), None)


def recorded_inputs(folder: SampleFolder) -> Entries | None:
    """The starting images of a folder's samples, finished or not; None if they are not recorded. Raises UserError."""
    listed = read_entries(folder.inputs)
    if listed is None:
        return None
    parts = [read_entries(path) or {} for path in _parts_of_inputs(folder).values()]
    return {path: entry for group in (listed, *parts) for path, entry in group.get("images", {}).items()}


def _read_record(folder: SampleFolder) -> Record | None:
    """A folder's record, None if there is none. Raises UserError if it is damaged."""
    return read_record(folder.record, {"settings": dict, "begun_with": dict, "runs": list}, folder.path)


def _recorded_unreadable(record: Record, kind: str) -> Unreadable:
    """The images that earlier runs and other shards could not read, or whose samples they could not read."""
    counts = record.get("images")
    found = counts.get(KEYS[kind]) if isinstance(counts, dict) else None
    return found if isinstance(found, dict) else {}


def _parts_of_inputs(folder: SampleFolder) -> dict[int, str]:
    """The lists of single units' starting images: number of the unit -> path."""
    names = (re.fullmatch(r"(\d+)\.json", name) for name in walk(folder.inputs_parts))
    return {int(name[1]): f"{folder.inputs_parts}/{name[0]}" for name in names if name}
