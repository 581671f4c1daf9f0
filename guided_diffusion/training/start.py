"""Where a training begins: at the newest checkpoint of its folder, at one that the user names, or from scratch.

A folder that has a checkpoint is never begun again, and its run is resumed only with its own settings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    find_resume_checkpoint,
    first_broken,
    newest_model,
    parse_rates,
    parse_resume_step_from_filename,
    read_optimizer,
)

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from.

    Attributes:
        path: the model's file.
        resumed: whether it belongs to the output folder, whose run is then resumed; otherwise it starts a new run.
        begun_from: identity of the checkpoint elsewhere that the folder's run was begun with; None: from scratch.
    """

    path: str
    resumed: bool
    begun_from: dict[str, str] | None

    @property
    def number(self) -> int:
        """The number in the file's name."""
        return parse_resume_step_from_filename(self.path)


def choose_start(named: str, output: str, settings: Settings, ema_rates: Sequence[float]) -> Start | None:
    """The checkpoint that a training in the folder `output` starts from; None: from scratch. Writes nothing.

    Args:
        named: file of a model that the user names; "" if none.
        output: folder of the run.
        settings: what makes the run what it is, by the names of the flags.
        ema_rates: decays of the moving averages.

    Raises:
        UserError: the named file does not exist, or the folder's run cannot be resumed from it; the newest
            checkpoint of the folder is incomplete; the folder's run has other settings.
    """
    if named and not is_remote(named):
        if not os.path.isfile(named):
            raise UserError(f"--resume_checkpoint {named} cannot be read: No such file")
        if not parse_resume_step_from_filename(named) and os.path.islink(named):  # which may have any name
            named = os.path.realpath(named)
    newest = _newest_checkpoint(output)
    if newest is None:
        return Start(named, False, _identity(named)) if named else None
    state = read_optimizer(newest, parse_resume_step_from_filename(newest)) or {}
    begun_from = state.get("training", {}).get("begun_from")
    if named and _is_of(named, output):
        if parse_resume_step_from_filename(named) != parse_resume_step_from_filename(newest):
            raise UserError(
                f"--resume_checkpoint {named}: the folder has later checkpoints, up to {newest}, which would be "
                "overwritten.\nChoose another --output, or move them away"
            )
    elif named and not _same_checkpoint(named, begun_from):
        raise UserError(
            f"--resume_checkpoint {named}: {output} has checkpoints of a run that was not begun with it, up to "
            f"{os.path.basename(newest)}. Choose another --output, or leave out --resume_checkpoint to resume that run"
        )
    if changes := _changes(newest, state, settings, ema_rates):
        raise UserError(
            f"{output} has checkpoints of a run with other settings: {'; '.join(changes)}.\n"
            f"Use those settings, or begin a new run with another --output (from here: --resume_checkpoint {newest})"
        )
    _warn_of_unknown(newest, state, settings)
    return Start(newest, True, begun_from)


def describe_newest(output: str, named: str = "") -> str:
    """For a run that was stopped: which step is saved, and how to resume; `named` as in `choose_start`."""
    newest = newest_model(output)
    if newest is None:
        again = "" if checkpoint_files(output) else " yet. Run the same command again to begin anew"
        return f"there is no complete checkpoint in {output}{again}"
    without = " without --resume_checkpoint" if named and _is_of(named, output) else ""
    step = parse_resume_step_from_filename(newest)
    return f"step {step} is saved in {newest}. Run the same command again{without} to resume"


def changes_of(recorded: Settings, settings: Settings) -> list[str]:
    """A phrase for each setting that differs from the recorded ones; one that either lacks is not known to differ."""
    both = [name for name in recorded if name in settings]
    return differences(*({name: values[name] for name in both} for values in (recorded, settings)))


def _newest_checkpoint(output: str) -> str | None:
    """The model's file of the folder's newest checkpoint; None if it has none. Raises UserError if it is incomplete."""
    files = checkpoint_files(output)
    if not files:
        return None
    newest = newest_model(output)
    if newest is None:
        names = ", ".join(name for of_step in files.values() for name in of_step)
        raise UserError(
            f"{output} has files of checkpoints without a model*.pt, which was not written or was removed: {names}.\n"
            "Move them away to begin from scratch, or choose another --output"
        )
    step = parse_resume_step_from_filename(newest)
    rates: Sequence[str] = ema_rates_beside(output, step)
    broken = first_broken(output, step, rates)
    if not broken:
        rates = _recorded_rates(newest, read_optimizer(newest, step) or {})
        broken = first_broken(output, step, rates)
    if broken:
        what = "is incomplete" if bf.exists(broken) else "is missing"
        older = find_resume_checkpoint(output, rates)
        back = f", or move the files of step {step} away to resume from {os.path.basename(older)}" if older else ""
        raise UserError(
            f"the newest checkpoint in {output} cannot be resumed: {os.path.basename(broken)} {what}.\n"
            f"Start a new run from its weights, --resume_checkpoint {newest} with another --output{back}"
        )
    return newest


def _recorded_rates(path: str, state: Mapping[str, Any]) -> list[str]:
    """Decays of the moving averages of a checkpoint, as text."""
    training = state.get("training", {})
    if "ema_rates" in training:
        return [str(rate) for rate in training["ema_rates"]]
    if "--ema_rate" in training.get("settings", {}):
        return [str(rate) for rate in parse_rates(training["settings"]["--ema_rate"])]
    return ema_rates_beside(bf.dirname(path), parse_resume_step_from_filename(path))


def _changes(path: str, state: Mapping[str, Any], settings: Settings, ema_rates: Sequence[float]) -> list[str]:
    """What differs from the run that wrote a checkpoint, a phrase each."""
    recorded = state.get("training", {}).get("settings", {})
    then, now = _recorded_rates(path, state), [str(rate) for rate in ema_rates]
    if sorted(then) == sorted(now):
        then = now
    rates = ({"--ema_rate": ",".join(each)} for each in (then, now))
    return changes_of(*({**values, **of_rates} for values, of_rates in zip((recorded, settings), rates, strict=True)))


def _warn_of_unknown(path: str, state: Mapping[str, Any], settings: Settings) -> None:
    """Warn of the settings that a checkpoint does not tell."""
    if "training" not in state:
        logger.warn(f"{path} was written by another program, and its settings are not known: they are not compared")
    elif unknown := [name for name in settings if name not in state["training"].get("settings", {})]:
        logger.warn(f"{path} does not record {', '.join(unknown)}: assumed to be unchanged")


def _is_of(named: str, output: str) -> bool:
    """Whether a file is one of a folder's checkpoints."""
    if not re.fullmatch(r"model\d{6,}\.pt", bf.basename(named)):
        return False
    folder = bf.dirname(named) or "."
    if is_remote(named) or is_remote(output):
        return folder.rstrip("/") == output.rstrip("/")
    return os.path.isdir(output) and os.path.isdir(folder) and os.path.samefile(folder, output)


def _identity(path: str) -> dict[str, str]:
    return {"path": path, "sha256": "" if is_remote(path) else file_digest(path)}


def _same_checkpoint(named: str, recorded: Mapping[str, str] | None) -> bool:
    """Whether a run was begun with this file: the same content, or on remote storage the same path."""
    if recorded is None:
        return False
    if is_remote(named):
        return named == recorded["path"]
    return bool(recorded["sha256"]) and file_digest(named) == recorded["sha256"]
