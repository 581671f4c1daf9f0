"""The classes of a data set and of a model: how they are numbered, and the record of them beside a checkpoint.

A training with classes writes classes.json into its folder, and the same into the optimizer's file:

  {"order": "text", "classes": {"0": "cat", "1": "dog", "2": "owl"}}

The names are those of folders or files; for ImageNet they are wnids, at ImageNet's indices. `order` is how they were
put in order: "text", "number" or "ImageNet".
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
from ..errors import UserError
from ..script_util import NUM_CLASSES
from ..system.checkpoint_files import read_saved
from ..system.files import is_remote, read_json, write_json
from .imagenet import CLASS_INDEX, WNIDS

ORDERS = ("text", "number")
IMAGENET = "ImageNet"


# Numbering


def number_classes(names: Collection[str], class_order: str, where: str) -> dict[str, int]:
    """Number classes 0, 1, 2, ... in the order of their names: "text", which is the default, or "number".

    Warns where no order is given and it matters. Raises UserError where names that are to be numbers are not. `where`
    serves the messages.
    """
    in_order = sort_names(names, class_order or "text", where)
    if not class_order and all(map(_is_number, names)) and in_order != sort_names(names, "number", where):
        logger.warn(
            f"the classes in {where} are numbers, ordered as text: {_some(in_order)}. --class_order number orders them "
            "as numbers, --class_order text accepts this order"
        )
    return {name: index for index, name in enumerate(in_order)}


def sort_names(names: Collection[str], class_order: str, where: str) -> list[str]:
    """The names in order. Raises UserError where `class_order` is "number" and a name is none."""
    if class_order == "text":
        return sorted(names)
    if others := sorted(name for name in names if not _is_number(name)):
        raise UserError(f"--class_order number: {others[0]!r}, a class in {where}, is not a whole number")
    return sorted(names, key=lambda name: (int(name), name))


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[0-9]+", name) is not None


# The record


class OtherClasses(UserError):
    """Images are of classes that a model was not trained with."""


@dataclass(frozen=True)
class Classes:
    """The classes that a model was trained with.

    Attributes:
        names: class index -> name.
        order: "text", "number" or "ImageNet".
        source: where they were found, for messages.
    """

    names: Mapping[int, str]
    order: str
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", dict(sorted(self.names.items())))

    def as_json(self) -> dict[str, Any]:
        """The record: plain containers of text."""
        return {"order": self.order, "classes": {str(index): name for index, name in self.names.items()}}

    @classmethod
    def from_json(cls, record: Any, source: str) -> Classes:
        """Raises UserError where `record` is something else."""
        try:
            names = {int(index): name for index, name in record["classes"].items()}
            classes = cls(names, record["order"], source)
            indices, values = list(classes.names), list(classes.names.values())
            whole = names and indices[0] >= 0 and indices[-1] < NUM_CLASSES and len({*values}) == len(values)
            whole = whole and classes.order in (*ORDERS, IMAGENET) and all(isinstance(name, str) for name in values)
        except (AttributeError, KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise UserError(
                f'{source} is damaged: expected {{"order": "text", "classes": {{"0": "cat", "1": "dog"}}}}, with '
                f"indices below {NUM_CLASSES}.\nRemove it, or restore it from a copy"
            )
        return classes

    def indices(self, names: Collection[str], where: str) -> dict[str, int]:
        """The index of each of these names. Raises OtherClasses where the model knows no such class."""
        index = {name: index for index, name in self.names.items()}
        if missing := sorted(name for name in names if name not in index):
            raise OtherClasses(
                f"{len(missing)} of {len(names)} classes in {where} are not among the model's {len(index)}: "
                f"{_some(missing)}.\nThose are {_some(list(index))} ({self.source})"
            )
        return {name: index[name] for name in names}

    def check_order(self, class_order: str) -> None:
        """Raise UserError where a --class_order was given that is not that of the record."""
        names = list(self.names.values())
        if class_order and self.order != IMAGENET and sort_names(names, class_order, self.source) != names:
            raise UserError(
                f"--class_order {class_order} contradicts {self.source}, where the order is {_some(names)}.\n"
                "Leave the flag out"
            )

    def describe(self) -> str:
        """The classes in a few words."""
        return _some([f"{index}: {name}" for index, name in self.names.items()])


def classes_path(folder: str) -> str:
    """The record of the classes of the checkpoints in a folder."""
    return os.path.join(folder, "classes.json")


def write_classes(folder: str, classes: Classes) -> None:
    """Write the record, unless it is there already. Raises UserError where it cannot be written."""
    path = classes_path(folder)
    if _read(path) == classes.as_json():
        return
    try:
        write_json(path, classes.as_json())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error} (--output)") from error


def read_classes(checkpoint: str) -> Classes | None:
    """The classes that a checkpoint was trained with: those of classes.json beside it, else of the optimizer's file.

    None where neither tells. Raises UserError where classes.json is damaged.
    """
    if not checkpoint or checkpoint == "untrained":
        return None
    folder, name = os.path.split(checkpoint)
    path = classes_path(folder)
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
    return None  # or a server that offers checkpoints and nothing else


def _read(path: str) -> Any:
    """The content of a JSON file; None where there is none, or something else."""
    try:
        return read_json(path)
    except ValueError:
        return None


def _in_optimizer_file(path: str) -> Classes | None:

    try:
        record = read_saved(path, "", map_location="cpu", weights_only=True)["training"]["classes"]
    except (UserError, KeyError, TypeError):  # another project's file, or one from before there were records
        return None
    return Classes.from_json(record, path)


# Classes to sample from


def classes_to_sample(words: Sequence[str], checkpoints: Sequence[str]) -> tuple[list[int], Classes | None]:
    """The class indices to sample from: those that `words` name, else all that the checkpoints were trained with.

    Args:
        words: names or indices; see `choose_classes`. None: all.
        checkpoints: of the networks that are given the classes; none: there are no classes.

    Returns:
        the indices, in their order, and the checkpoints' record; without a record, all indices are classes.

    Raises UserError where two checkpoints were trained with different classes, or for a class that there is not.
    """
    if not checkpoints:
        if words:
            raise UserError("--classes is for a class-conditional model: give --class_cond True, or leave it out")
        return [], None
    records = {checkpoint: read_classes(checkpoint) for checkpoint in checkpoints}
    found = [record for record in records.values() if record]
    if len(found) == 2 and found[0].names != found[1].names:
        raise UserError(
            f"model and classifier were trained with different classes: {found[0].describe()} ({found[0].source}),\n"
            f"and {found[1].describe()} ({found[1].source})"
        )
    record = found[0] if found else None
    unknown = [checkpoint for checkpoint, own in records.items() if own is None and checkpoint != "untrained"]
    if record:
        for checkpoint in unknown:
            logger.warn(f"{checkpoint} has no record of its classes: assuming those of {record.source}")
    if words:
        chosen = choose_classes(words, record)
    elif record:
        chosen = list(record.names)
    else:
        chosen = list(range(NUM_CLASSES))
        for checkpoint in unknown[:1]:
            logger.warn(
                f"{checkpoint} has no record of its classes (classes.json): sampling from all of 0..{NUM_CLASSES - 1}; "
                "choose with --classes"
            )
    if record:
        names = Classes({index: record.names[index] for index in chosen}, record.order)
        logger.info(
            f"sampling from {len(chosen)} of {len(record.names)} classes of {record.source}: {names.describe()}"
        )
    return chosen, record


def choose_classes(words: Iterable[str], record: Classes | None) -> list[int]:
    """The indices of classes that are named, in order.

    Args:
        words: each a name, or several names or indices separated by commas or spaces. A name comes before an index.
        record: the classes that there are; None: those of ImageNet.

    Raises UserError for a class that there is not.
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
    if record is None:
        expected = f"a wnid of ImageNet, or an index 0..{NUM_CLASSES - 1}"
    else:
        expected = f"a name or an index of {record.describe()} ({record.source})"
    close = [] if _is_number(word) else difflib.get_close_matches(word, index, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"expected {expected}"
    raise UserError(f"--classes {word}: there is no such class; {hint}")


def sampled_classes_setting(chosen: Sequence[int]) -> dict[str, str]:
    """What of the classes decides the samples. Without classes, or for all of 0..999, nothing, as in older records."""
    if not chosen or chosen == list(range(NUM_CLASSES)):
        return {}
    return {"classes_sampled": ",".join(map(str, chosen))}


def _some(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:6]) + (f", ... {names[-1]}" if len(names) > 6 else "")
