"""Where a training run starts: the newest checkpoint in its folder, else a checkpoint named by the user, else scratch.

A folder with a checkpoint is never restarted, and its run is only resumed with its own settings.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import blobfile as bf

from .. import logger
from ..errors import UserError
from ..runs.inputs import file_digest
from ..runs.settings import differences
from ..system.files import is_remote
from .checkpoints import (
    checkpoint_files,
    ema_rates_beside,
    first_incomplete_file,
    newest_complete_model,
    newest_model,
    parse_rates,
    parse_resume_step_from_filename,
    read_optimizer,
)

Settings = Mapping[str, Any]

# Settings that are only recorded if they have another value. Earlier versions lacked them.
UNRECORDED = {"--compile": False, "--half_precision": "auto"}


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from.

    Attributes:
        path: model file.
        resumed: whether it belongs to the output folder, whose run is then resumed; if not, it starts a new run.
        origin: path and digest of the checkpoint elsewhere from which the folder's run started; None: from scratch.
        settings: recorded settings of a resumed run.
    """

    path: str
    resumed: bool
    origin: dict[str, str] | None
    settings: Settings = field(default_factory=dict)

    @property
    def number(self) -> int:
        """The number in the file name."""
        return parse_resume_step_from_filename(self.path)


def choose_start(named: str, output: str, settings: Settings, ema_rates: Sequence[float]) -> Start | None:
    """The checkpoint from which to start a training run in the folder `output`; None: from scratch. Writes nothing.

    Args:
        named: model file named by the user, or "".
        output: output folder of the run.
        settings: settings that must not change when the run is resumed, by flag. "--compile": "auto" is that of the
            record.
        ema_rates: decays of the moving averages.

    Raises:
        UserError: the named file does not exist, or is not a start of the folder's run; the newest checkpoint is
            incomplete; the folder's run has other settings.
    """
    if named and not is_remote(named):
        if not os.path.isfile(named):
            raise UserError(f"--resume_checkpoint {named} cannot be read: No such file")
        if not parse_resume_step_from_filename(named) and os.path.islink(named):
            named = os.path.realpath(named)
    newest = _newest_checkpoint(output)
    if newest is None:
        digest = file_digest(named) if named and not is_remote(named) else ""
        return Start(named, False, {"path": named, "sha256": digest}) if named else None
    state = read_optimizer(newest, parse_resume_step_from_filename(newest)) or {}
    origin = state.get("training", {}).get("begun_from")
    if named and _is_checkpoint_in(output, named):
        if parse_resume_step_from_filename(named) != parse_resume_step_from_filename(newest):
            raise UserError(
                f"--resume_checkpoint {named}: the folder has later checkpoints, up to {newest}, which would be "
                "overwritten.\nChoose another --output, or move them away"
            )
    elif named and not _same_checkpoint(named, origin):
        raise UserError(
            f"--resume_checkpoint {named}: {output} has checkpoints of a run that did not start from it, up to "
            f"{os.path.basename(newest)}. Choose another --output, or omit --resume_checkpoint to resume that run"
        )
    if changes := _changes_since(newest, state, settings, ema_rates):
        raise UserError(
            f"{output} has checkpoints of a run with other settings: {'; '.join(changes)}.\n"
            f"Use those settings, or start a new run with another --output (from here: --resume_checkpoint {newest})"
        )
    if "training" not in state:
        logger.warn(f"{newest} was written by another program without its settings: they are not compared")
    elif unrecorded := [name for name in settings if name not in UNRECORDED | state["training"].get("settings", {})]:
        logger.warn(f"{newest} does not record {', '.join(unrecorded)}: assumed to be unchanged")
    return Start(newest, True, origin, UNRECORDED | state.get("training", {}).get("settings", {}))


def describe_newest(output: str, named: str = "") -> str:
    """For a stopped run: which step is saved, and how to resume; `named` as in `choose_start`."""
    newest = newest_model(output)
    if newest is None:
        hint = "" if checkpoint_files(output) else " yet. Rerun the same command to start again"
        return f"there is no complete checkpoint in {output}{hint}"
    without = " without --resume_checkpoint" if named and _is_checkpoint_in(output, named) else ""
    step = parse_resume_step_from_filename(newest)
    return f"step {step} is saved in {newest}. Rerun the same command{without} to resume"


def changed_settings(recorded: Settings, settings: Settings) -> list[str]:
    """A phrase for each setting that differs from the recorded one; settings that only one of them has are ignored."""
    shared = [name for name in recorded if name in settings]
    return differences(*({name: values[name] for name in shared} for values in (recorded, settings)))


def _newest_checkpoint(output: str) -> str | None:
    """Model file of the folder's newest checkpoint; None if it has none. Raises UserError if it is incomplete."""
    files = checkpoint_files(output)
    if not files:
        return None
    newest = newest_model(output)
    if newest is None:
        names = ", ".join(itertools.chain.from_iterable(files.values()))
        raise UserError(
            f"{output} has checkpoint files without a model*.pt, which was not written or was removed: {names}.\n"
            "Move them away to start from scratch, or choose another --output"
        )
    step = parse_resume_step_from_filename(newest)
    rates: Sequence[str] = ema_rates_beside(output, step)
    incomplete = first_incomplete_file(output, step, rates)
    if not incomplete:
        rates = _recorded_rates(newest, read_optimizer(newest, step) or {})
        incomplete = first_incomplete_file(output, step, rates)
    if incomplete:
        fault = "is incomplete" if bf.exists(incomplete) else "is missing"
        older = newest_complete_model(output, rates)
        resume = f", or move the files of step {step} away to resume from {os.path.basename(older)}" if older else ""
        raise UserError(
            f"the newest checkpoint in {output} cannot be resumed: {os.path.basename(incomplete)} {fault}.\n"
            f"Start a new run from its weights, --resume_checkpoint {newest} with another --output{resume}"
        )
    return newest


def _recorded_rates(path: str, state: Mapping[str, Any]) -> list[str]:
    """Decays, as text, of a checkpoint's moving averages."""
    training = state.get("training", {})
    if "ema_rates" in training:
        return [str(rate) for rate in training["ema_rates"]]
    if "--ema_rate" in training.get("settings", {}):
        return [str(rate) for rate in parse_rates(training["settings"]["--ema_rate"])]
    return ema_rates_beside(bf.dirname(path), parse_resume_step_from_filename(path))


def _changes_since(path: str, state: Mapping[str, Any], settings: Settings, ema_rates: Sequence[float]) -> list[str]:
    """A phrase for each difference from the run that wrote a checkpoint; the order of the decays does not matter."""
    recorded = UNRECORDED | state.get("training", {}).get("settings", {})
    settings = UNRECORDED | dict(settings)
    if settings["--compile"] == "auto":
        settings["--compile"] = recorded["--compile"]
    then, now = _recorded_rates(path, state), [str(rate) for rate in ema_rates]
    if sorted(then) == sorted(now):
        then = now
    return changed_settings({**recorded, "--ema_rate": ",".join(then)}, {**settings, "--ema_rate": ",".join(now)})


def _is_checkpoint_in(output: str, path: str) -> bool:
    """Whether a file is one of a folder's checkpoints."""
    if not re.fullmatch(r"model\d{6,}\.pt", bf.basename(path)):
        return False
    folder = bf.dirname(path) or "."
    if is_remote(path) or is_remote(output):
        return folder.rstrip("/") == output.rstrip("/")
    return os.path.isdir(output) and os.path.isdir(folder) and os.path.samefile(folder, output)


def _same_checkpoint(path: str, recorded: Mapping[str, str] | None) -> bool:
    """Whether a file has the recorded content, or on remote storage the recorded path."""
    if recorded is None or is_remote(path):
        return recorded is not None and path == recorded["path"]
    return bool(recorded["sha256"]) and file_digest(path) == recorded["sha256"]
