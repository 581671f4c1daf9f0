"""The samples of each start, and the units of work: starts with all of their samples."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import blobfile as bf

from .. import logger
from ..classifier.pairs import SAMPLES, STARTS, check_complete, find_samples, is_sample
from ..errors import UserError
from ..forward_backward import SampleFolder
from ..images.folder import check_stems, list_images, list_some, without_extension
from ..runs.settings import digest_of
from ..runs.shards import cut
from ..system.files import walk

FIRST_TURN = r"(?:_s(\d{3,}))?"  # after the time, in names of samples; later turns end in _u02
LATER_TURN = r"(?:_s\d{3,})?_u\d{2,}"


def trajectories_of(folder: SampleFolder) -> dict[str, dict[int, str]]:
    """The samples in a folder: path of the start without extension -> trajectory, from 1 -> path, relative to it.

    Samples of later turns (_u02, ...) are left out. Raises UserError if there are no samples, or other images.
    """
    time = re.escape(without_extension(folder.sample("")))  # _t0500
    pattern = re.compile(rf"(.*){time}{FIRST_TURN}")
    later = re.compile(rf".*{time}{LATER_TURN}")
    paths = sorted(path for path in walk(folder.path) if is_sample(path))
    if not paths:
        find_samples(folder)  # raises an error that lists the times with samples
    found: dict[str, dict[int, str]] = defaultdict(dict)
    odd = []
    for path in paths:
        name = without_extension(path)
        if match := pattern.fullmatch(name):
            others = found[match[1]]
            if (other := others.setdefault(int(match[2] or 1), path)) != path:
                raise UserError(
                    f"{folder.path} has two files of a sample, {other} and {path}: move one away (--data_dir)"
                )
        elif not later.fullmatch(name):
            odd.append(path)
    if odd:
        raise UserError(
            f"{len(odd)} image(s) in {folder.path} are not named like samples of that time: {list_some(odd)};\n"
            f"expected names ending in {without_extension(folder.sample(''))}, or _s002, _s003, ... after it "
            "(--diffusion_steps, --timestep_respacing)"
        )
    return dict(found)


def find_starts(
    starting_data_dir: str, folders: Mapping[int, SampleFolder]
) -> tuple[list[str], dict[int, list[list[str]]]]:
    """The starting images and their samples.

    Args:
        starting_data_dir: folder of the starting images; those without any sample are skipped.
        folders: folders of samples by k.

    Returns:
        starts: paths of the starting images that have samples, sorted.
        samples: by k, for each start the paths of its samples, in the order of trajectories, relative to the folder of
            all times.

    Raises UserError if a sample has no starting image, a start has fewer than two samples, or samples are missing.
    """
    flag = "--starting_data_dir"
    images = list_images(starting_data_dir, flag)
    found = {k: trajectories_of(folder) for k, folder in folders.items()}
    firsts = {k: {stem: next(iter(paths.values())) for stem, paths in of_time.items()} for k, of_time in found.items()}
    check_complete(firsts, {without_extension(path) for path in images}, folders, starting_data_dir)
    stems = set().union(*found.values())
    starts = [path for path in images if without_extension(path) in stems]
    check_stems(starts, flag)
    if without := len(images) - len(starts):
        logger.info(f"{without} of {len(images)} images in {starting_data_dir} have no sample: they are left out")
    for k, of_time in found.items():
        check_trajectories(of_time, folders[k])
    samples: dict[int, list[list[str]]] = {}
    for k, of_time in found.items():
        name = folders[k].path.rpartition("/")[2]
        of_starts = (of_time[without_extension(path)] for path in starts)
        samples[k] = [[f"{name}/{path}" for _, path in sorted(paths.items())] for paths in of_starts]
    return starts, samples


def check_trajectories(found: Mapping[str, Mapping[int, str]], folder: SampleFolder) -> None:
    """Raise UserError unless all starts have the same trajectories, two or more.

    `found` has the results of `trajectories_of` for the folder of a time.
    """
    expected = set().union(*found.values())
    remedy = "Compute them with forward_backward_dataset_sample.py --num_trajectories, or leave the time out"
    if len(expected) < 2:
        raise UserError(
            f"{folder.path} has one sample of each start: fluctuations need two or more.\n{remedy} (--time_series)"
        )
    missing = {stem: expected - paths.keys() for stem, paths in found.items() if len(paths) < len(expected)}
    if missing:
        stem, lacking = min(missing.items())
        count = sum(map(len, missing.values()))
        raise UserError(
            f"{folder.path} lacks {count} of {len(found) * len(expected)} samples: some starts have {len(expected)}, "
            f"but {stem!r} lacks {', '.join(map(str, sorted(lacking)[:3]))}{', ...' if len(lacking) > 3 else ''}.\n"
            f"{remedy} (--time_series)"
        )


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
