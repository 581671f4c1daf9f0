"""Resumable runs: what decides a result, what is done, this process's share of the rest, and the record.

A run works unit by unit; a unit is a batch of fixed composition. What a unit gives is written at once, so that a run
that is stopped loses at most a unit per process, and the same command does the rest. Files appear whole or not at all.

The samples of the forward-backward experiment are such files already, see `sample_folders`. Other results (NAME.npz)
are put together from parts, a file per unit in NAME_parts, once all are there. Beside a result, NAME.json records the
settings that decided its bytes, and NAME_inputs.json lists the files that it was computed from.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import blobfile as bf
import numpy as np
from tqdm import tqdm

from .. import dist_util, logger
from ..images.folder import LabelledImage
from ..images.io import Check, UnreadableImage
from ..system.files import remove_scratch_of
from .inputs import Entries, Inputs, as_entries, compare_with_list, inputs_of, read_entries, write_list
from .locks import Locks, hold
from .parts import Parts, remove_parts
from .pipeline import read_ahead
from .records import Record, finished_record, now, record_of, report_unreadable
from .shards import WHOLE, Shard, cut

IMAGES = "images"  # kind of files


class Unit(Protocol):
    """A batch of fixed composition.

    Attributes:
        index: its number in the list of all units.
        files: paths of the files that it reads, by kind, in the order in which they are read.
    """

    index: int
    files: Mapping[str, Sequence[str]]


U = TypeVar("U", bound=Unit)


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images, number `index` of the list."""

    index: int
    images: Sequence[LabelledImage]

    @property
    def files(self) -> dict[str, list[str]]:
        """Paths of the images."""
        return {IMAGES: [image.path for image in self.images]}


def image_batches(images: Sequence[LabelledImage], batch_size: int) -> list[ImageBatch]:
    """Cut a list of images, in order, every `batch_size`."""
    return [ImageBatch(index, batch) for index, batch in enumerate(cut(images, batch_size))]


class Pictures(NamedTuple):
    """What was read of the files of a unit, in their order.

    Attributes:
        values: what the readers returned. A blank takes the place of each file that cannot be read: the others keep
            their places in the batch, and so their bytes.
        readable: bool (n,).
        unreadable: by kind, path -> why.
    """

    values: list[Any]
    readable: np.ndarray
    unreadable: dict[str, dict[str, str]]


class Run:
    """One run, on all ranks: locks its output, and reads this rank's share of the units ahead.

    Args:
        outputs: path of each lock file -> what it protects.
        settings: what decides the results.
        machine: what decides their last digits, of `inference.prepare`.
        inputs: the folders of files that are read, by kind.
        args: the script's flags.
        shard: part of the work that this run does.
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
        self._stack = ExitStack()
        self._started, self._clock = now(), time.monotonic()
        self.locks: Locks
        self.bar: tqdm

    def __enter__(self):
        self.locks = self._stack.enter_context(hold(self._outputs, about=self.settings))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def read(
        self,
        units: Sequence[U],
        readers: Mapping[str, Callable[[str, Check], Any]],
        blank: Any,
        amount: Callable[[U], int],
        described: str = "denoising",
        unit_of_amount: str = "step",
    ) -> Iterator[tuple[U, Pictures]]:
        """This rank's share of the units, one after the other, with their files, which threads read ahead.

        Args:
            units: what all ranks have to do.
            readers: by kind, reads a file; called with its path, and a check that is to be called with the open file.
            blank: stands for a file that cannot be read.
            amount: work of a unit, for the progress bar `bar`, which the caller moves.
            described, unit_of_amount: words for the progress bar.
        """
        mine, processes = dist_util.share_of(units), dist_util.get_world_size()
        words = described if processes == 1 else f"{described} (process 1 of {processes})"
        self.bar = logger.progress_bar(sum(map(amount, mine)), words, unit_of_amount)
        self._started, self._clock = now(), time.monotonic()
        reading = self._read(mine, readers, blank)
        self._stack.callback(reading.close)
        return reading

    def _read(
        self, mine: Sequence[U], readers: Mapping[str, Callable[[str, Check], Any]], blank: Any
    ) -> Iterator[tuple[U, Pictures]]:
        def read(kind: str, path: str) -> Any:
            inputs = self.inputs[kind]
            try:
                return readers[kind](f"{inputs.folder}/{path}", inputs.note(path))
            except UnreadableImage as error:
                inputs.forget(path)
                return error

        def calls(unit: U) -> list[Callable[[], Any]]:
            return [partial(read, kind, path) for kind, paths in unit.files.items() for path in paths]

        with self.bar:
            for unit, found in read_ahead(mine, calls, vars(self.args).get("num_workers", 0)):
                self.locks.check()
                yield unit, _as_pictures(unit, found, blank)

    def entries(self, unit: Unit, pictures: Pictures) -> dict[str, Entries]:
        """Sizes and digests of the files of a unit that could be read, by kind."""
        return {
            kind: self.inputs[kind].entries(path for path in paths if path not in pictures.unreadable[kind])
            for kind, paths in unit.files.items()
        }

    def facts(self) -> dict[str, Any]:
        """What the record says of this run."""
        spent = {"started": self._started, "ended": now(), "seconds": round(time.monotonic() - self._clock, 3)}
        return {**spent, "processes": dist_util.get_world_size(), **self.machine, "arguments": vars(self.args)}

    def log_machine(self, more: str = "") -> None:
        """Say what computes."""
        machine = self.machine
        logger.info(
            f"{dist_util.get_world_size()} process(es) of {machine['threads']} thread(s), {machine['hardware']}, "
            f"{machine['precision']}{more}"
        )


def _as_pictures(unit: Unit, found: Sequence[Any], blank: Any) -> Pictures:
    errors = [isinstance(picture, UnreadableImage) for picture in found]
    unreadable: dict[str, dict[str, str]] = {kind: {} for kind in unit.files}
    files = ((kind, path) for kind, paths in unit.files.items() for path in paths)
    for (kind, path), picture, is_error in zip(files, found, errors, strict=True):
        if is_error:
            unreadable[kind][path] = str(picture)
    values = [blank if is_error else picture for picture, is_error in zip(found, errors, strict=True)]
    return Pictures(values, ~np.array(errors, bool), unreadable)


# Results that are put together from parts


@dataclass(frozen=True)
class Result:
    """A result of a run.

    Attributes:
        path: an .npz file, the last to be written: where it is, all is.
        settings: what decides its bytes.
        files: paths of the files that it is computed from, by kind.
        companions: other files of the same result.
    """

    path: str
    settings: Mapping[str, Any]
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    companions: Sequence[str] = ()

    @property
    def all_paths(self) -> list[str]:
        """Paths of everything that is written."""
        return [*self.companions, inputs_of(self.path), record_of(self.path), self.path]

    def is_finished(self, shard: Shard) -> bool:
        """Whether everything is there and complete. Raises UserError if it was made with other settings."""
        return finished_record(self.path, self.settings, shard) is not None and all(map(bf.exists, self.companions))


class ResultRun(Run):
    """A run whose results are put together from parts. Otherwise as `Run`.

    Args:
        results: what the run makes.
        folder: folder of the parts, and of nothing else.

    Attributes:
        unfinished: the results that are to be made.
        unreadable: files that could not be read, path -> why; known on rank 0 when results are put together.
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

    def __enter__(self):
        """Raises UserError if a result was made with other settings, or of other files than those there are now."""
        super().__enter__()
        try:
            self.unfinished = dist_util.on_main(self._find_unfinished)
        except BaseException:
            self._stack.close()
            raise
        return self

    def _find_unfinished(self) -> list[Result]:
        unfinished = [result for result in self.results if not result.is_finished(self.shard)]
        for result in self.results:
            if result not in unfinished:
                listed = inputs_of(result.path)
                compare_with_list(self.inputs, result.files, read_entries(listed), result.path, listed)
            elif self.shard.count == 1:
                for path in result.all_paths:
                    remove_scratch_of(path)
        if not unfinished:
            remove_parts(self._folder)  # of a run that was killed just before
        return unfinished

    def begin(self, units: Sequence[U], **together: Any) -> list[U]:
        """Open the folder of parts. All ranks must call this.

        Args:
            units: all units of the unfinished results, in order.
            together: settings of the parts that those of the run do not tell.

        Returns:
            this shard's units that are to be done: their parts are missing, or lack files that could not be read.

        Raises:
            UserError: parts were computed with other settings, or from other files.
        """
        self.parts = Parts(self._folder, {**self.settings, **together}, self.machine, self.shard, self.locks)
        dist_util.on_main(self._compare_with_parts)
        self.inputs = dist_util.broadcast_object(self.inputs)
        left = dist_util.on_main(self._left, len(units))
        return [units[index] for index in left]

    def _compare_with_parts(self) -> None:
        files = {k: list(dict.fromkeys(p for r in self.unfinished for p in r.files[k])) for k in self.inputs}
        with self.parts.update():
            path = f"{self.parts.folder}/inputs.json"
            compare_with_list(self.inputs, files, self.parts.known_files(path), self.parts.folder, path)
            if self.inputs:
                write_list(path, self.inputs, files)

    def _left(self, count: int) -> list[int]:
        done = self.parts.present()
        return [i for i in self.shard.units(range(count)) if i not in done or not self.parts.is_complete(i)]

    def write(self, unit: Unit, pictures: Pictures, **arrays: np.ndarray) -> None:
        """Write the part of a unit."""
        notes = {"inputs": self.entries(unit, pictures), "unreadable": pictures.unreadable}
        self.parts.write(unit.index, notes, readable=pictures.readable, **arrays)

    def write_lists(self, result: Result) -> None:
        """List the files that a result was computed from. For rank 0, when it is put together."""
        write_list(inputs_of(result.path), self.inputs, result.files)

    def finish(self, num_units: int, put_together: Callable[[Record], int]) -> int:
        """Once all parts are there, write the results. All ranks must call this.

        Args:
            num_units: number of parts.
            put_together: writes the results, given what the record should say of this run; called on rank 0. Returns
                the exit status; parts stay if it is not 0, for the next run.

        Returns:
            the exit status.
        """
        dist_util.barrier()
        return dist_util.on_main(self._finish, num_units, put_together, self.facts())

    def _finish(self, num_units: int, put_together: Callable[[Record], int], facts: Record) -> int:
        self.locks.check()
        with self.parts.update():
            if self.shard.count > 1 and all(result.is_finished(self.shard) for result in self.unfinished):
                return 0  # another shard has just done this
            if missing := self.parts.missing(num_units):
                if any(index % self.shard.count == self.shard.index for index in missing):
                    self.parts.read(missing[0])  # says that it has disappeared
                logger.info(f"{self.shard} is done; {len(missing)} of {num_units} parts are for the other shards")
            self._read_notes()
            if missing:
                return report_unreadable(self.unreadable, "the results will be without them")
            status = put_together(facts)
            if status == 0:
                self.parts.remove()
            return status

    def _read_notes(self) -> None:
        """Learn from the parts which files were read, and which could not be."""
        for index in sorted(self.parts.present()):
            notes = self.parts.notes(index)
            for kind, entries in as_entries(notes.get("inputs", {})).items():
                self.inputs[kind].known |= entries
            for why in notes.get("unreadable", {}).values():
                self.unreadable |= why
