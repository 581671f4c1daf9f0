"""Resumable runs: locks, settings, the units of work that this process takes, and the record.

A run computes units of work, which are batches of fixed composition, and writes the output of each immediately. So a
stopped run loses at most one unit per process, and rerunning the same command resumes it. With several processes,
each takes the longest remaining unit whenever it is free. In the forward-backward experiment, the output is
samples, see `sample_folders`. Other results (NAME.npz) are combined from parts, a file per unit in NAME_parts, once all
parts exist.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import blobfile as bf
import numpy as np

from .. import dist_util, logger
from ..errors import NothingReadable
from ..images.folder import LabelledImage
from ..images.io import Check, UnreadableImage
from ..system.files import remove_scratch_of
from .inputs import Entries, Inputs, as_entries, compare_with_list, inputs_of, read_entries, write_list
from .locks import Locks, locked_by_main
from .parts import Parts, recorded_settings, remove_parts
from .pipeline import read_ahead
from .progress import SharedBar
from .records import Record, check_whole, finished_record, now, record_of, report_unreadable
from .shards import WHOLE, Shard, cut

IMAGES = "images"  # kind of files


class Unit(Protocol):
    """A batch of fixed composition.

    Attributes:
        index: number in the list of all units.
        files: paths of the files to read, by kind, in order.
    """

    index: int
    files: Mapping[str, Sequence[str]]


U = TypeVar("U", bound=Unit)
Readers = Mapping[str, Callable[[str, Check], Any]]  # by kind: function of a path and a check of the open file


@dataclass(frozen=True)
class ImageBatch:
    """Batch number `index` of a list of images."""

    index: int
    images: Sequence[LabelledImage]

    @property
    def files(self) -> dict[str, list[str]]:
        """Paths of the images."""
        return {IMAGES: [image.path for image in self.images]}


def image_batches(images: Sequence[LabelledImage], batch_size: int) -> list[ImageBatch]:
    """The images in batches of `batch_size`, in order."""
    return [ImageBatch(index, batch) for index, batch in enumerate(cut(images, batch_size))]


class Pictures(NamedTuple):
    """Contents of a unit's files, in order.

    Attributes:
        values: return values of the readers. Unreadable files are replaced by a blank, so that the others keep their
            places in the batch, on which the last digits of their results may depend.
        readable: bool (n,).
        unreadable: by kind, path -> why.
    """

    values: list[Any]
    readable: np.ndarray
    unreadable: dict[str, dict[str, str]]


class Run:
    """A run on all ranks. As a context manager, it locks its outputs.

    Args:
        outputs: path of each lock file -> name of the output.
        settings: settings that determine the results.
        machine: properties of the machine that affect the last digits, from `inference.prepare_network`.
        inputs: folders of files to read, by kind.
        args: flags of the script.
        shard: this job's share of the work.
    """

    def __init__(
        self,
        outputs: Mapping[str, str],
        settings: Mapping[str, Any],
        machine: Mapping[str, Any],
        inputs: Mapping[str, Inputs],
        args: argparse.Namespace,
        shard: Shard = WHOLE,
    ):
        self.settings, self.machine, self.inputs, self.args, self.shard = settings, machine, dict(inputs), args, shard
        self._outputs = outputs
        self._started, self._clock = now(), time.monotonic()
        self.locks: Locks
        self.bar: SharedBar

    def __enter__(self):
        """Raises UserError if another run is writing the outputs, and whatever `_open` raises."""
        with ExitStack() as stack:  # unlocks if the outputs cannot be opened
            self.locks = stack.enter_context(locked_by_main(self._outputs, about=self.settings))
            self._open()
            self._stack = stack.pop_all()
        return self

    def _open(self) -> None:
        """Compare the locked outputs with this run. All ranks call this."""
        raise NotImplementedError

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def read(
        self,
        units: Sequence[U],
        readers: Readers,
        blank: Any,
        amount: Callable[[U], int],
        described: str = "denoising",
        unit_of_amount: str = "step",
        pieces: Callable[[U], Iterable[Any]] | None = None,
    ) -> Iterator[tuple[Any, Pictures]]:
        """The units that this rank takes, with their files, which threads read ahead. All ranks must call this.

        A single process takes them in order. Several take them one by one, the longest first, so that all end at about
        the same time; with --num_workers, a rank takes its next unit when it starts one, to read it in the meantime.

        Args:
            units: units of all ranks.
            readers: functions that read a file, by kind.
            blank: replacement for unreadable files.
            amount: work in a unit, for their order and for the progress bar `bar`, which the caller advances.
            described, unit_of_amount: labels of the progress bar.
            pieces: cuts a unit that is too large to be read at once into pieces with files of their own, which are
                yielded in place of the unit.
        """
        processes = dist_util.get_world_size()
        label = described if processes == 1 else f"{described} ({processes} processes)"
        # Other ranks report their progress only every few seconds, so only the mean rate is steady.
        bar = SharedBar if processes == 1 else partial(SharedBar, smoothing=0)
        self.bar = logger.progress_bar(sum(map(amount, units)), label, unit_of_amount, kind=bar)
        self._stack.callback(self.bar.close)
        self._started, self._clock = now(), time.monotonic()
        mine = dist_util.claimed(units if processes == 1 else sorted(units, key=amount, reverse=True))
        parts = mine if pieces is None else (piece for unit in mine for piece in pieces(unit))
        reading = self._read(parts, readers, blank)
        self._stack.callback(reading.close)
        return reading

    def _read(self, mine: Iterable[U], readers: Readers, blank: Any) -> Iterator[tuple[U, Pictures]]:
        def read(kind: str, path: str) -> Any:
            inputs = self.inputs[kind]
            try:
                return readers[kind](f"{inputs.folder}/{path}", inputs.digest_check(path))
            except UnreadableImage as error:
                inputs.forget(path)
                return error

        def calls(unit: U) -> list[Callable[[], Any]]:
            return [partial(read, kind, path) for kind, paths in unit.files.items() for path in paths]

        for unit, results in read_ahead(mine, calls, vars(self.args).get("num_workers", 0)):
            self.locks.check()
            yield unit, _as_pictures(unit, results, blank)

    def entries(self, unit: Unit, pictures: Pictures) -> dict[str, Entries]:
        """Sizes and digests of a unit's readable files, by kind."""
        return {
            kind: self.inputs[kind].entries(path for path in paths if path not in pictures.unreadable[kind])
            for kind, paths in unit.files.items()
        }

    def facts(self) -> dict[str, Any]:
        """Properties of this run for the record: times, processes, machine and flags."""
        spent = {"started": self._started, "ended": now(), "seconds": round(time.monotonic() - self._clock, 3)}
        return {**spent, "processes": dist_util.get_world_size(), **self.machine, "arguments": vars(self.args)}

    def log_machine(self, more: str = "") -> None:
        """Log the number of processes, the hardware and the precision."""
        machine = self.machine
        logger.info(
            f"{dist_util.get_world_size()} process(es) of {machine['threads']} thread(s), {machine['hardware']}, "
            f"{machine['precision']}{more}"
        )


def _as_pictures(unit: Unit, results: Sequence[Any], blank: Any) -> Pictures:
    readable = np.array([not isinstance(result, UnreadableImage) for result in results], bool)
    unreadable: dict[str, dict[str, str]] = {kind: {} for kind in unit.files}
    files = ((kind, path) for kind, paths in unit.files.items() for path in paths)
    for (kind, path), result, is_readable in zip(files, results, readable, strict=True):
        if not is_readable:
            unreadable[kind][path] = str(result)
    values = [result if is_readable else blank for result, is_readable in zip(results, readable, strict=True)]
    return Pictures(values, readable, unreadable)


# Results combined from parts


@dataclass(frozen=True)
class Result:
    """A result of a run.

    Attributes:
        path: an .npz file, written last: if it exists, everything does.
        settings: settings that determine its bytes.
        files: paths of the files that it is computed from, by kind.
        companions: other .npz files of the same result.
    """

    path: str
    settings: Mapping[str, Any]
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    companions: Sequence[str] = ()

    def is_finished(self, shard: Shard) -> bool:
        """Whether all files exist and are complete. Raises UserError if they have other settings, or are truncated."""
        if finished_record(self.path, self.settings, shard) is None or not all(map(bf.exists, self.companions)):
            return False
        for path in (self.path, *self.companions):
            check_whole(path)
        return True


class ResultRun(Run):
    """A run whose results are combined from parts; arguments as for `Run`, except:

    Args:
        results: results of the run.
        folder: folder of the parts, and of nothing else.

    Attributes:
        unfinished: the results to compute.
        unreadable: unreadable files, path -> why; complete on rank 0 when results are combined.
    """

    def __init__(
        self,
        results: Sequence[Result],
        folder: str,
        settings: Mapping[str, Any],
        machine: Mapping[str, Any],
        inputs: Mapping[str, Inputs],
        args: argparse.Namespace,
        shard: Shard = WHOLE,
    ):
        locks = {shard.lock(os.path.splitext(result.path)[0]): result.path for result in results}
        super().__init__(locks, settings, machine, inputs, args, shard)
        self.results, self._folder = results, folder
        self.unfinished: list[Result] = []
        self.unreadable: dict[str, str] = {}
        self.parts: Parts

    def _open(self) -> None:
        """Raises UserError if a result has other settings, or was computed from other files."""
        self.unfinished = dist_util.on_main(self._find_unfinished)

    def _find_unfinished(self) -> list[Result]:
        unfinished = [result for result in self.results if not result.is_finished(self.shard)]
        for result in self.results:
            listed = inputs_of(result.path)
            if result not in unfinished:
                compare_with_list(self.inputs, result.files, read_entries(listed), result.path, listed)
            elif self.shard.count == 1:
                for path in (*result.companions, listed, record_of(result.path), result.path):
                    remove_scratch_of(path)
        if not unfinished:
            remove_parts(self._folder)  # left by a run that was killed at its very end
        return unfinished

    def remaining_units(self, units: Sequence[U], **settings: Any) -> list[U]:
        """This shard's units whose parts are missing, or had unreadable files. All ranks must call this.

        Args:
            units: all units of the unfinished results, in order.
            settings: settings of the parts that are not settings of the run.

        Raises UserError if existing parts have other settings, or were computed from other files.
        """
        self.parts = Parts(self._folder, {**self.settings, **settings}, self.machine, self.shard, self.locks)
        self.inputs, remaining = dist_util.on_main(self._compare_with_parts, len(units))
        return [units[index] for index in remaining]

    def _compare_with_parts(self, count: int) -> tuple[dict[str, Inputs], list[int]]:
        files = {k: list(dict.fromkeys(p for r in self.unfinished for p in r.files[k])) for k in self.inputs}
        with self.parts.update():
            path = f"{self.parts.folder}/inputs.json"
            compare_with_list(self.inputs, files, self.parts.known_files(path), self.parts.folder, path)
            if self.inputs:
                write_list(path, self.inputs, files)
        present, mine = self.parts.present(), self.shard.units(range(count))
        return self.inputs, [i for i in mine if i not in present or not self.parts.is_complete(i)]

    def write(self, unit: Unit, pictures: Pictures, **arrays: np.ndarray) -> None:
        """Write the part of a unit."""
        notes = {"inputs": self.entries(unit, pictures), "unreadable": pictures.unreadable}
        self.parts.write(unit.index, notes, readable=pictures.readable, **arrays)

    def write_lists(self, result: Result) -> None:
        """Write the list of files that a result was computed from. For rank 0, when results are combined."""
        write_list(inputs_of(result.path), self.inputs, result.files)

    def finish(self, num_units: int, write_results: Callable[[Record], int]) -> int:
        """Write the results if all parts exist, and return the exit status. All ranks must call this.

        Args:
            num_units: number of parts.
            write_results: combines the parts on rank 0, given `facts()`, and returns the exit status; if it is not 0,
                the parts are kept for the next run.
        """
        self.bar.finish()
        return dist_util.on_main(self._finish, num_units, write_results, self.facts())

    def _finish(self, num_units: int, write_results: Callable[[Record], int], facts: Record) -> int:
        self.locks.check()
        with self.parts.update():
            if self.shard.count > 1 and all(result.is_finished(self.shard) for result in self.unfinished):
                return 0  # another shard has just combined them
            present = self.parts.present()
            missing = [index for index in range(num_units) if index not in present]
            if missing:
                if any(index % self.shard.count == self.shard.index for index in missing):
                    self.parts.read(missing[0])  # raises an error
                logger.info(f"{self.shard} is done; {len(missing)} of {num_units} parts belong to other shards")
            for index in sorted(present):
                notes = self.parts.notes(index)
                for kind, entries in as_entries(notes.get("inputs", {})).items():
                    self.inputs[kind].known |= entries
                for unreadable in notes.get("unreadable", {}).values():
                    self.unreadable |= unreadable
            if missing:
                return report_unreadable(self.unreadable, "the results will exclude them")
            try:
                status = write_results(facts)
            except NothingReadable:
                for why in self.unreadable.values():
                    logger.warn(why)
                raise
            if status == 0:
                remove_parts(self._folder)
            return status


def times_to_do(run: ResultRun, results: Mapping[int, Result], folder: str) -> list[int]:
    """The times to compute together: the unfinished ones, or those that an interrupted run was computing.

    Args:
        run: run of the results.
        results: results by time k.
        folder: folder of the parts, whose settings include the times.
    """
    undone = [k for k, result in results.items() if result in run.unfinished]
    times = recorded_settings(folder).get("times", undone)
    return times if set(undone) <= set(times) <= results.keys() else undone


def describe_batches(left: Sequence[Any], units: Sequence[Any], shard: Shard, done: int) -> str:
    """How much of the work is left, in words; `done` is the number of times that are finished."""
    words = f"{len(left)} of {len(shard.units(units))} batches to compute"
    words += f" by {shard}" if shard.count > 1 else ""
    return words + (f"; {done} times are done already" if done else "")
