"""The samples of each start, and the units of work: starts with all of their samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import blobfile as bf

from ..classifier.pairs import SAMPLES, STARTS, check_complete, find_samples, samples_of_starts, starts_with_samples
from ..errors import UserError
from ..forward_backward import SampleFolder
from ..images.folder import list_images, without_extension
from ..runs.settings import digest_of
from ..runs.shards import cut


def find_starts(
    starting_data_dir: str, folders: Mapping[int, SampleFolder]
) -> tuple[list[str], dict[int, list[list[str]]]]:
    """The starting images and their samples of the first turn.

    Args:
        starting_data_dir: folder of the starting images; those without any sample are skipped.
        folders: folders of samples by k.

    Returns:
        starts: paths of the starting images that have samples, sorted.
        samples: by k, for each start the paths of its samples, in the order of trajectories, relative to the folder of
            all times.

    Raises UserError if a sample has no starting image, a start has fewer than two samples, or samples are missing.
    """
    images = list_images(starting_data_dir, "--starting_data_dir")
    found = {k: find_samples(folder) for k, folder in folders.items()}
    check_complete(found, {without_extension(path) for path in images}, folders, starting_data_dir)
    starts = starts_with_samples(images, found, starting_data_dir)
    samples = {}
    for k, of_starts in samples_of_starts(starts, found).items():
        if len(of_starts[0]) < 2:
            raise UserError(
                f"{folders[k].path} has one sample of each start: fluctuations need two or more.\nCompute them with "
                "forward_backward_dataset_sample.py --num_trajectories, or leave the time out (--time_series)"
            )
        samples[k] = [[folders[k].within_output(path) for path in paths] for paths in of_starts]
    return starts, samples


def samples_digest(data_dir: str, samples: Sequence[Sequence[str]]) -> str:
    """SHA-256 of the names and sizes of the samples of all starts at one time."""
    return digest_of(f"{path}\t{bf.stat(f'{data_dir}/{path}').size}" for paths in samples for path in paths)


@dataclass(frozen=True)
class Piece:
    """Files of a unit that are read and pass through the network together.

    Attributes:
        unit: the unit.
        starts: numbers of the starts in this piece.
        samples: (number of the start, number of the time, path) for each sample in it.
        is_last: whether it is the last piece of the unit.
    """

    unit: StartBatch
    starts: Sequence[int]
    samples: Sequence[tuple[int, int, str]]
    is_last: bool

    @property
    def files(self) -> dict[str, list[str]]:
        """Paths of the starting images and the samples."""
        return {STARTS: [self.unit.starts[i] for i in self.starts], SAMPLES: [path for *_, path in self.samples]}


@dataclass(frozen=True)
class StartBatch:
    """Starts and all of their samples.

    Attributes:
        index: number of the batch.
        starts: paths of the starting images.
        samples: for each time and start, the paths of its samples.
    """

    index: int
    starts: Sequence[str]
    samples: Sequence[Sequence[Sequence[str]]]

    @property
    def files(self) -> dict[str, list[str]]:
        """Paths of the starting images and the samples."""
        samples = [path for _, _, path in self._in_order() if path]
        return {STARTS: list(self.starts), SAMPLES: samples}

    @property
    def images(self) -> int:
        """Number of files."""
        return len(self.starts) + sum(len(paths) for of_time in self.samples for paths in of_time)

    def pieces(self, size: int) -> Iterator[Piece]:
        """The files in order, each start before its samples, in pieces of at most `size`."""
        cuts = cut(list(self._in_order()), size)
        for number, files in enumerate(cuts, 1):
            starts = [start for start, _, path in files if not path]
            yield Piece(self, starts, [entry for entry in files if entry[2]], number == len(cuts))

    def _in_order(self) -> Iterator[tuple[int, int, str]]:
        """(start, time, path of the sample) for every file; the path of a start itself is ""."""
        for start in range(len(self.starts)):
            yield start, -1, ""
            for time, of_time in enumerate(self.samples):
                for path in of_time[start]:
                    yield start, time, path


def start_batches(starts: Sequence[str], samples: Sequence[Sequence[Sequence[str]]], size: int) -> list[StartBatch]:
    """Cut the list of starts, in order, every `size`; `samples` has the samples of all starts for each time."""
    of_times = zip(*(cut(of_time, size) for of_time in samples), strict=True)
    return [StartBatch(i, *batch) for i, batch in enumerate(zip(cut(starts, size), of_times, strict=True))]
