"""The files of changes: one per time, with statistics of each start, and a table of all times."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import blobfile as bf
import numpy as np

from .. import logger
from ..classifier.figures import to_csv
from ..classifier.results import check_settings, find_record, read_arrays
from ..correlations import Pairs
from ..errors import UserError, named_write_errors
from ..runs.parts import Parts
from ..runs.records import Record
from ..runs.settings import digest_of
from ..system.files import write_whole
from .samples import StartBatch
from .statistics import Spectrum, TimeChanges, summary

PER_START = ("samples", "chi_numerator", "chi_denominator", "correlation", "change", "change_map")
SPECTRA = ("spectrum_start", "spectrum_change")
ARRAYS = ("names", "distance", "pairs", *PER_START)
LOGGED = {"change": "mean change", "chi": "chi", "correlation_length": "correlation length"}  # columns of the table
SPECTRA_ARRAYS = ("wavenumber", "modes", *SPECTRA)
SCRIPT = "change_correlations.py"


def default_folder(name: str) -> str:
    """The default folder for the changes of tokens."""
    return f"change_correlations/{name}"


def changes_file(folder: str, name: str, step_reverse: int, num_steps: int) -> str:
    """The changes of tokens at time k of N."""
    return f"{folder}/changes_{name}-t_{step_reverse}_{num_steps}.npz"


def summary_file(folder: str, name: str) -> str:
    """The table of all times."""
    return f"{folder}/susceptibility_{name}.csv"


def parts_folder(folder: str, name: str, times: Sequence[int], num_steps: int) -> str:
    """The folder for finished units of a series of times, until all are done."""
    series = digest_of(map(str, times))[:8]
    return f"{folder}/changes_{name}-t_{times[0]}..{times[-1]}_{num_steps}_{series}_parts"


# Writing


class Joined(NamedTuple):
    """The parts of all units at one time.

    Attributes:
        names: paths of the S starts with two readable samples or more.
        left_out: other starts: path -> why.
        arrays: arrays (S, ...) by name.
    """

    names: list[str]
    left_out: dict[str, str]
    arrays: dict[str, np.ndarray]


def join_parts(parts: Parts, units: Sequence[StartBatch], t: int, unreadable: Mapping[str, str]) -> Joined:
    """Join the parts of all units at the t-th time; `unreadable` has the unreadable files, path -> why."""
    names: list[str] = []
    left_out: dict[str, str] = {}
    pieces: dict[str, list[np.ndarray]] = {}
    for unit in units:
        part = parts.read(unit.index)
        kept = part["samples"][t] >= 2
        for start, path in enumerate(unit.starts):
            if kept[start]:
                names.append(path)
            else:
                why = (unreadable.get(file) for file in (path, *unit.samples[t][start]))
                left_out[path] = next((reason for reason in why if reason), "fewer than two samples")
        for name in (*PER_START, *SPECTRA):
            if name in part:
                pieces.setdefault(name, []).append(part[name][t, kept])
    return Joined(names, left_out, {name: np.concatenate(values) for name, values in pieces.items()})


def result_arrays(joined: Joined, pairs: Pairs, spectrum: Spectrum | None) -> dict[str, np.ndarray]:
    """All arrays of a result, in the order of its file."""
    arrays = {"names": np.array(joined.names), "distance": pairs.distance, "pairs": pairs.count}
    arrays |= {name: joined.arrays[name] for name in PER_START}
    if spectrum:
        arrays |= {"wavenumber": spectrum.wavenumber, "modes": spectrum.modes}
        arrays |= {name: joined.arrays[name] for name in SPECTRA}
    return arrays


def write_summary(folder: str, name: str, convention: str) -> None:
    """Write and log the table of all times in the folder."""
    times = read_changes(folder, name)
    rows = summary(times, convention)
    path = summary_file(folder, name)
    with named_write_errors(path):
        write_whole(path, to_csv(rows))
    for row in rows:
        numbers = [f"{what} {_with_interval(row, column)}" for column, what in LOGGED.items()]
        logger.info(f"k = {row['k']} of {row['N']}: {', '.join(numbers)}")
    logger.info(f"the table of all times is {path}")


def _with_interval(row: Mapping[str, object], name: str) -> str:
    if row[name] == "":
        return "undefined"
    ends = [row[f"{name}{end}"] for end in ("_low", "_high")]
    return f"{row[name]:.4g}" + ("" if "" in ends else f" ({ends[0]:.4g} to {ends[1]:.4g})")


# Reading


def names_in(folder: str) -> list[str]:
    """The names of the tokens whose changes are in a folder. Raises UserError if there are none."""
    entries = bf.listdir(folder) if bf.isdir(folder) else ()
    matches = (re.fullmatch(r"changes_(.+)-t_\d+_\d+\.npz", entry) for entry in entries)
    names = sorted({match[1] for match in matches if match})
    if not names:
        found = "has no changes" if bf.isdir(folder) else "does not exist"
        raise UserError(
            f"--changes: the folder {folder} {found}; expected files changes_NAME-t_K_N.npz of change_correlations.py"
        )
    return names


def times_in(folder: str, name: str) -> set[tuple[int, int]]:
    """The times (k, N) whose changes are in a folder."""
    pattern = re.compile(rf"changes_{re.escape(name)}-t_(\d+)_(\d+)\.npz")
    matches = [pattern.fullmatch(entry) for entry in (bf.listdir(folder) if bf.isdir(folder) else ())]
    return {(int(match[1]), int(match[2])) for match in matches if match}


def check_same_settings(
    folder: str, name: str, times: Iterable[tuple[int, int]], new: Mapping[tuple[int, int], Record] | None = None
) -> None:
    """Raise UserError unless the changes at these times (k, N), and those with the `new` records, have equal settings.

    Without the samples, which differ from time to time, and --spectra, which some times may have.
    """
    records = {(k, n): find_record(changes_file(folder, name, k, n), SCRIPT) for k, n in times}
    check_settings({**records, **(new or {})}, folder, SCRIPT, ("samples_digest", "spectra"))


def read_changes(folder: str, name: str, num_steps: int | None = None) -> list[TimeChanges]:
    """The changes at all times in a folder, in the order of k/N.

    Args:
        folder: folder of the results.
        name: name of the tokens.
        num_steps: N; None: all.

    Raises UserError if there are none, or a file is damaged, or of other tokens or settings than the first.
    """
    times = times_in(folder, name)
    chosen = sorted((k, n) for k, n in times if num_steps in (None, n))
    if not chosen:
        others = ", ".join(str(n) for n in sorted({n for _, n in times}))
        found = f"only for N = {others} (--timestep_respacing)" if others else "nor for another N"
        raise UserError(f"{folder} has no changes of {name} for N = {num_steps}, {found}")
    chosen = sorted(chosen, key=lambda time: (time[0] / time[1], time))
    check_same_settings(folder, name, chosen)
    series = [read_time(folder, name, k, n) for k, n in chosen]
    for time in series:
        if not np.array_equal(time.distance, series[0].distance):
            raise UserError(
                f"k = {series[0].step_reverse} and k = {time.step_reverse} in {folder} have different grids of tokens, "
                f"with {len(series[0].distance)} and {len(time.distance)} distances.\n"
                "Measure all times together: change_correlations.py --time_series"
            )
    return series


def read_time(folder: str, name: str, step_reverse: int, num_steps: int) -> TimeChanges:
    """The changes at one time. Raises UserError if the file is missing or damaged."""
    path = changes_file(folder, name, step_reverse, num_steps)
    arrays = read_arrays(path, ARRAYS, ("wavenumber",), SCRIPT)
    spectra = read_arrays(path, SPECTRA_ARRAYS, script=SCRIPT) if "wavenumber" in arrays else {}
    spectra.pop("modes", None)
    per_start = {array: arrays[array] for array in PER_START}
    return TimeChanges(step_reverse, num_steps, arrays["distance"], **per_start, **spectra)
