"""Classes of data sets and models: their numbering, and their record next to a checkpoint.

Class-conditional training writes classes.json into its folder, and the same record into the optimizer's file:

  {"order": "text", "classes": {"0": "cat", "1": "dog", "2": "owl"}}

The names come from folders or files; for ImageNet they are wnids, at ImageNet's indices. `order` is the order in which
they were numbered: "text", "number" or "ImageNet".
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import blobfile as bf

from .. import logger
from ..errors import UserError, named_write_errors
from ..script_util import NUM_CLASSES
from ..system.checkpoint_files import read_saved
from ..system.files import is_remote, read_json, write_json
from .imagenet import CLASS_INDEX, WNIDS

ORDERS = ("text", "number")
IMAGENET = "ImageNet"
RECORD = "classes.json"  # next to checkpoints


# Numbering


def number_classes(names: Collection[str], class_order: str, where: str) -> dict[str, int]:
    """Number classes 0, 1, 2, ... in the order of their names, as text (the default) or as numbers.

    Warns if no order is given and the two differ. Raises UserError if `class_order` is "number" and a name is not a
    number. `where` is used in messages.
    """
    in_order = sort_names(names, class_order or "text", where)
    if not class_order and all(map(_is_number, names)) and in_order != sort_names(names, "number", where):
        logger.warn(
            f"the classes in {where} are numbers, ordered as text: {_abridged(in_order)}. Use --class_order number "
            "to order them as numbers, --class_order text to accept this order"
        )
    return {name: index for index, name in enumerate(in_order)}


def sort_names(names: Collection[str], class_order: str, where: str) -> list[str]:
    """The names in order. Raises UserError if `class_order` is "number" and a name is not a number."""
    if class_order == "text":
        return sorted(names)
    if others := sorted(name for name in names if not _is_number(name)):
        raise UserError(f"--class_order number: {others[0]!r}, a class in {where}, is not a whole number")
    return sorted(names, key=lambda name: (int(name), name))


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[0-9]+", name) is not None


# The record


class OtherClasses(UserError):
    """Images have classes that the model was not trained with."""


@dataclass(frozen=True)
class Classes:
    """The classes that a model was trained with.

    Attributes:
        names: class index -> name.
        order: "text", "number" or "ImageNet".
        source: file or folder that they come from, for messages.
    """

    names: Mapping[int, str]
    order: str
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", dict(sorted(self.names.items())))

    def as_json(self) -> dict[str, Any]:
        """The record, for a JSON file."""
        return {"order": self.order, "classes": {str(index): name for index, name in self.names.items()}}

    @classmethod
    def from_json(cls, record: Any, source: str) -> Classes:
        """Classes from their record. Raises UserError if it is invalid."""
        try:
            classes = cls({int(index): name for index, name in record["classes"].items()}, record["order"], source)
            indices, names = list(classes.names), list(classes.names.values())
            valid = names and indices[0] >= 0 and indices[-1] < NUM_CLASSES and len({*names}) == len(names)
            valid = valid and classes.order in (*ORDERS, IMAGENET) and all(isinstance(name, str) for name in names)
        except (AttributeError, KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise UserError(
                f'{source} is damaged: expected {{"order": "text", "classes": {{"0": "cat", "1": "dog"}}}}, with '
                f"indices below {NUM_CLASSES}.\nRemove it, or restore it from a copy"
            )
        return classes

    def indices(self, names: Collection[str], where: str) -> dict[str, int]:
        """The index of each of these names. Raises OtherClasses if the model was not trained with one."""
        index = {name: index for index, name in self.names.items()}
        if missing := sorted(name for name in names if name not in index):
            raise OtherClasses(
                f"{len(missing)} of {len(names)} classes in {where} are not among the model's {len(index)}: "
                f"{_abridged(missing)}.\nThe model's are {_abridged(list(index))} ({self.source})"
            )
        return {name: index[name] for name in names}

    def check_order(self, class_order: str) -> None:
        """Raise UserError if --class_order was given and differs from the recorded order."""
        names = list(self.names.values())
        if class_order and self.order != IMAGENET and sort_names(names, class_order, self.source) != names:
            raise UserError(
                f"--class_order {class_order} contradicts {self.source}, where the order is {_abridged(names)}.\n"
                "Omit the flag"
            )

    def describe(self) -> str:
        """The classes, abridged, for a message."""
        return _abridged([f"{index}: {name}" for index, name in self.names.items()])


def write_classes(folder: str, classes: Classes) -> None:
    """Write the record unless it exists already. Raises UserError if it cannot be written."""
    path = os.path.join(folder, RECORD)
    if _read(path) == classes.as_json():
        return
    with named_write_errors(path):
        write_json(path, classes.as_json())


def read_classes(checkpoint: str) -> Classes | None:
    """The classes that a checkpoint was trained with: from classes.json next to it, or else the optimizer's file.

    None if neither exists. Raises UserError if classes.json is damaged.
    """
    if not checkpoint or checkpoint == "untrained":
        return None
    folder, name = os.path.split(checkpoint)
    path = os.path.join(folder, RECORD)
    step = re.fullmatch(r"(?:model|ema_.+_)(\d{6,})\.pt", name)
    optimizer = os.path.join(folder, f"opt{step[1]}.pt") if step else ""
    try:
        if bf.exists(path):
            return Classes.from_json(_read(path), path)
        if optimizer and bf.exists(optimizer):
            return _in_optimizer_file(optimizer)
    except (OSError, bf.Error) as error:
        if not is_remote(path):
            raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return None  # neither exists, or a server does not answer for files other than checkpoints


def _read(path: str) -> Any:
    """The content of a JSON file; None if it does not exist or is not JSON."""
    try:
        return read_json(path)
    except ValueError:
        return None


def _in_optimizer_file(path: str) -> Classes | None:
    try:
        record = read_saved(path, "", map_location="cpu", weights_only=True)["training"]["classes"]
    except (UserError, KeyError, TypeError):  # a file of another project, or of a version without records
        return None
    return Classes.from_json(record, path)


# Classes to sample from


def classes_to_sample(words: Sequence[str], checkpoints: Sequence[str]) -> tuple[list[int], Classes | None]:
    """The classes to sample from: the given ones, or else all that the checkpoints were trained with.

    Args:
        words: names or indices, see `choose_classes`; empty for all.
        checkpoints: checkpoints of the class-conditional networks, if any.

    Returns:
        the sorted indices, and the checkpoints' record if there is one.

    Raises UserError if two checkpoints were trained with different classes, or a class does not exist.
    """
    if not checkpoints:
        if words:
            raise UserError("--classes is for a class-conditional model: give --class_cond True, or omit it")
        return [], None
    records = {checkpoint: read_classes(checkpoint) for checkpoint in checkpoints}
    record, *others = [known for known in records.values() if known] or [None]
    for other in others:
        if other.names != record.names:
            raise UserError(
                f"model and classifier were trained with different classes: {record.describe()} ({record.source}),\n"
                f"and {other.describe()} ({other.source})"
            )
    unknown = [checkpoint for checkpoint, own in records.items() if own is None and checkpoint != "untrained"]
    if record:
        for checkpoint in unknown:
            logger.warn(f"{checkpoint} has no record of its classes: assuming those of {record.source}")
        chosen = choose_classes(words, record) if words else list(record.names)
        names = Classes({index: record.names[index] for index in chosen}, record.order)
        logger.info(
            f"sampling from {len(chosen)} of {len(record.names)} classes of {record.source}: {names.describe()}"
        )
        return chosen, record
    if words:
        return choose_classes(words, None), None
    if unknown:
        logger.warn(
            f"{unknown[0]} has no record of its classes (classes.json): sampling from all of 0..{NUM_CLASSES - 1}; "
            "choose with --classes"
        )
    return list(range(NUM_CLASSES)), None


def choose_classes(words: Iterable[str], record: Classes | None) -> list[int]:
    """The sorted indices of the given classes.

    Args:
        words: names or indices, or several of them separated by commas or spaces. Names take precedence over indices.
        record: the classes to choose from; None for ImageNet's.

    Raises UserError if a class does not exist.
    """
    names = record.names if record else dict(enumerate(WNIDS))
    index = {name: number for number, name in names.items()} if record else CLASS_INDEX
    chosen: set[int] = set()
    for word in words:
        for name in [word] if word in index else re.split(r"\s*,\s*", word.strip()):
            for part in [name] if name in index else name.split():
                chosen.add(_choose(part, names, index, record))
    if not chosen:
        raise UserError(f"--classes {' '.join(words)!r} names no class")
    return sorted(chosen)


def _choose(word: str, names: Mapping[int, str], index: Mapping[str, int], record: Classes | None) -> int:
    if word in index:
        return index[word]
    if _is_number(word) and int(word) in names:
        return int(word)
    known = f"{record.describe()} ({record.source})" if record else f"ImageNet: a wnid or 0..{NUM_CLASSES - 1}"
    close = [] if _is_number(word) else difflib.get_close_matches(word, index, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"expected a name or an index of {known}"
    raise UserError(f"--classes {word}: no such class; {hint}")


def sampled_classes_setting(chosen: Sequence[int]) -> dict[str, str]:
    """The setting for the classes to sample from; none without classes or for all of 0..999, as in older records."""
    if not chosen or chosen == list(range(NUM_CLASSES)):
        return {}
    return {"classes_sampled": ",".join(map(str, chosen))}


def _abridged(names: Sequence[str]) -> str:
    """The first names and the last, for a message."""
    return ", ".join(names[:6]) + (f", ... {names[-1]}" if len(names) > 6 else "")
