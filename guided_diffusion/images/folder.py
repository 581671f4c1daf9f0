"""Finding, labelling and choosing the images of a folder.

A path of an image is relative to `data_dir`, with "/" between its parts on every machine.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import blobfile as bf

from .. import logger
from ..errors import UserError
from ..script_util import NUM_CLASSES
from ..system.files import is_remote
from .classes import IMAGENET, Classes, number_classes, read_classes
from .imagenet import CLASS_INDEX, DEVKIT_IDS, WNIDS
from .io import EXTENSIONS, read_bytes, reason_of

T = TypeVar("T")


@dataclass(frozen=True)
class LabelledImage:
    """An image and its class.

    `path` is relative to `data_dir`. `label` is the class index: 0..999 for ImageNet, else as `label_images` numbers
    them; None, with an empty `class_name`, where nothing names a class.
    """

    path: str
    label: int | None
    class_name: str


# Finding


def list_images(data_dir: str, flag: str = "--data_dir") -> list[str]:
    """The images below a folder, local or remote: paths relative to it, sorted by code point.

    Links are followed, except one to a folder that contains it. Files and folders whose names begin with a dot are left
    out. Files with other extensions are left out too, and reported once.

    Raises UserError, which names `flag`, if there is no such folder, or no image in it.
    """
    if not data_dir:
        raise UserError(f"no folder of images was given: {flag}")
    try:
        if not bf.isdir(data_dir):
            found = "is a file, not a folder" if bf.exists(data_dir) else "does not exist"
            raise UserError(f"the folder of images {data_dir!r} {found} ({flag})")
        files = list(_list_files(data_dir))
    except (OSError, bf.Error) as error:
        raise UserError(f"the folder of images cannot be listed ({flag}): {error}") from error
    images = sorted(path for path in files if path.lower().endswith(EXTENSIONS))
    if not images:
        raise UserError(
            f"no images in {data_dir!r} ({flag}): found {_describe_files(files)}; "
            f"expected files that end in {', '.join(EXTENSIONS)}"
        )
    if len(images) < len(files) and data_dir not in _reported:
        _reported.add(data_dir)
        skipped = sorted({*files} - {*images})
        logger.warn(f"{_count(len(skipped), 'file')} skipped: {_extensions(skipped)} (in {data_dir!r})")
    return images


_reported: set[str] = set()  # folders whose skipped files have been reported


def _list_files(folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """The files below `folder`, in any order, each with `prefix` before it."""
    if not is_remote(folder):
        # A link to a folder above would be followed for ever. Two folders that link to each other are each listed once
        # below the other.
        stat = os.stat(folder)
        this = (stat.st_dev, stat.st_ino)
        if this in above:
            return
        above = above | {this}
    for name, is_folder in _scan(folder):
        if name.startswith("."):
            continue
        if is_folder:
            yield from _list_files(os.path.join(folder, name), f"{prefix}{name}/", above)
        else:
            yield prefix + name


def _scan(folder: str) -> list[tuple[str, bool]]:
    """Name and whether it is a folder, of each file and folder directly in `folder`."""
    if is_remote(folder):
        return [(entry.name, entry.is_dir) for entry in bf.scandir(folder)]
    with os.scandir(folder) as entries:
        # A link that leads nowhere counts as a file, which is named when it cannot be read; a pipe, say, is left out.
        return [(e.name, _is(e.is_dir)) for e in entries if _is(e.is_dir) or _is(e.is_file) or e.is_symlink()]


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry is a file or a folder; links that lead to each other are neither."""
    try:
        return kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _describe_files(files: Sequence[str]) -> str:
    if not files:
        return "no files at all"
    return f"{_count(len(files), 'file')}, none of them an image: {_extensions(files)}"


def _extensions(files: Sequence[str]) -> str:
    """The commonest extensions of files, for a message."""
    kinds = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in files)
    commonest = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    return ", ".join(commonest[:5]) + (", ..." if len(commonest) > 5 else "")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}{'es' if thing.endswith('s') else 's'}"


# Labelling


class UnknownClasses(UserError):
    """Some images have a class and others have none, or no name gives a class. `why` says so without advice."""

    why: str

    @classmethod
    def because(cls, why: str, advice: str) -> UnknownClasses:
        error = cls(f"{why}.\n{advice}")
        error.why = why
        return error


def label_images(
    data_dir: str,
    paths: Sequence[str],
    labels_file: str | None = None,
    class_order: str = "",
    recorded: Classes | None = None,
    flag: str = "--data_dir",
) -> list[LabelledImage]:
    """Give each of `paths` its class.

    Where there is a `labels_file` it decides; see `read_labels_file`. Else the ImageNet class that a folder (the
    innermost first) or a part of the file name between "_" names by its wnid. Else, for a folder that is not ImageNet,
    the name of its top-level folder; for a flat one, what stands before the first "_" of each file name, and no class
    where some name has no "_".

    The indices are those of ImageNet, or the places of the names in the order `class_order` (see `number_classes`).
    Where the classes of a model are `recorded`, the same names have the indices that they have there.

    Raises UnknownClasses where some images have a class and others have none, and for the official ILSVRC2012_val_
    files without a `labels_file`; UserError for a class that `recorded` lacks, or a `class_order` that contradicts it.
    `data_dir` and `flag`, its flag, are for messages.
    """
    where = f"{data_dir!r} ({flag})"
    images = _label(where, paths, labels_file, "text" if recorded else class_order)
    if recorded is None:
        return images
    index = recorded.indices({image.class_name for image in images if image.class_name}, where)
    recorded.check_order(class_order)
    return [replace(image, label=index.get(image.class_name)) for image in images]


def label_where_known(
    data_dir: str,
    paths: Sequence[str],
    labels_file: str | None = None,
    class_order: str = "",
    flag: str = "--data_dir",
) -> tuple[list[LabelledImage], str | None]:
    """As `label_images`, for callers that can do without labels: either every image has a class, or none has.

    Returns the images, and, if none has a class, why.
    """
    try:
        images = label_images(data_dir, paths, labels_file, class_order, flag=flag)
    except UnknownClasses as error:
        return [LabelledImage(path, None, "") for path in paths], error.why
    known = all(image.label is not None for image in images)
    return images, None if known else f"the names in {data_dir!r} ({flag}) do not give the classes of the images"


def classes_of(images: Sequence[LabelledImage], class_order: str = "", source: str = "") -> Classes | None:
    """The classes of images that `label_images` labelled in this order; None where they have none."""
    names = {image.label: image.class_name for image in images if image.label is not None}
    of_imagenet = all(CLASS_INDEX.get(name) == label for label, name in names.items())
    return Classes(names, IMAGENET if of_imagenet else class_order or "text", source) if names else None


def _label(where: str, paths: Sequence[str], labels_file: str | None, class_order: str) -> list[LabelledImage]:
    if labels_file:
        return _label_from_file(where, paths, labels_file)
    wnids = [_wnid_in(path) for path in paths]
    if any(wnids):
        without = [path for path, wnid in zip(paths, wnids, strict=True) if wnid is None]
        if without:
            raise UnknownClasses.because(
                f"{len(without)} of {_count(len(paths), 'image')} in {where} name no ImageNet class: {_some(without)}",
                "The others do, by a wnid. Move these away, or give --labels_file.",
            )
        return [LabelledImage(path, CLASS_INDEX[w], w) for path, w in zip(paths, wnids, strict=True) if w]
    official = [path for path in paths if re.search(r"ILSVRC2012_(val|test)_\d{8}", path)]
    if official:
        raise UnknownClasses.because(
            f"the names of ImageNet's validation files carry no class: {_some(official)} in {where}",
            f"Give --labels_file: {LABELS_FILE_FORMS}.",
        )
    return _label_by_name(where, paths, class_order)


def _wnid_in(path: str) -> str | None:
    *folders, name = without_extension(path).split("/")
    return next((part for part in [*reversed(folders), *name.split("_")] if part in CLASS_INDEX), None)


def _label_by_name(where: str, paths: Sequence[str], class_order: str) -> list[LabelledImage]:
    flat = [path for path in paths if "/" not in path]
    if flat and len(flat) < len(paths):
        raise UnknownClasses.because(
            f"{len(flat)} of {_count(len(paths), 'image')} in {where} lie outside of its class folders: {_some(flat)}",
            "Move them into one of the folders, or away.",
        )
    if flat and not all("_" in path for path in flat):
        return [LabelledImage(path, None, "") for path in paths]
    names = [path.split("_" if flat else "/", 1)[0] for path in paths]
    label = number_classes({*names}, class_order, where)
    return [LabelledImage(path, label[name], name) for path, name in zip(paths, names, strict=True)]


def _label_from_file(where: str, paths: Sequence[str], labels_file: str) -> list[LabelledImage]:
    classes = read_labels_file(labels_file)
    labels = [find_entry(classes, path) for path in paths]
    without = [path for path, label in zip(paths, labels, strict=True) if label is None]
    if without:
        raise UserError(
            f"--labels_file {labels_file!r} has no entry for {len(without)} of {_count(len(paths), 'image')} in "
            f"{where}: {_some(without)}.\nIt has {len(classes)}, the first for {next(iter(classes))!r}."
        )
    return [LabelledImage(p, label, WNIDS[label]) for p, label in zip(paths, labels, strict=True) if label is not None]


def find_entry(entries: Mapping[str, T], path: str) -> T | None:
    """The entry of `path`, or of the same path with fewer folders before it."""
    parts = without_extension(path).split("/")
    names = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((entries[name] for name in names if name in entries), None)


def without_extension(path: str) -> str:
    stem, extension = os.path.splitext(path)
    return stem if extension.lower() in EXTENSIONS else path


def _some(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (", ..." if len(paths) > 3 else "")


LABELS_FILE_FORMS = (
    'Kaggle\'s LOC_val_solution.csv, or lines "filename wnid" or "filename,wnid", or lines "filename index" (0..999), '
    "or for each validation image in order a line with its wnid, or with its ILSVRC2012_ID (1..1000)"
)

_WNID_LINE = re.compile(r"(?P<wnid>n\d{8})")
_ID_LINE = re.compile(r"(?P<id>\d+)")
# In Kaggle's file, bounding boxes follow on the same line: wnid, four numbers, wnid, ...
_NAMED_LINE = re.compile(r"(?P<name>.+?)(?:\s*,\s*|\s+)(?P<wnid>n\d{8})(?:\s+(?:n\d{8}|-?\d+))*")
_INDEX_LINE = re.compile(r"(?P<name>.+?)(?:\s*,\s*|\s+)(?P<index>\d+)")
_NAMING = (_NAMED_LINE, _INDEX_LINE)


def read_labels_file(path: str) -> dict[str, int]:
    """The class index of each image that a file of ImageNet labels names: file name without extension -> 0..999.

    The form is known by the first line: `LABELS_FILE_FORMS`, with a header or not where lines name files. Line i of a
    form that names none is image ILSVRC2012_val_i.

    Raises UserError for any other form, and for a line that is not of the file's form, with its number.
    """
    lines = _read_lines(path)
    header = len(lines) > 1 and not re.search(r"\d", lines[0]) and any(form.fullmatch(lines[1]) for form in _NAMING)
    start = 1 if header else 0
    form = next((f for f in (_WNID_LINE, _ID_LINE, *_NAMING) if f.fullmatch(lines[start])), None)
    if form not in _NAMING and len(lines) == len(set(lines)) == len(WNIDS):
        raise UserError(f"--labels_file {path!r} lists the 1000 classes, not images; expected {LABELS_FILE_FORMS}")

    classes: dict[str, int] = {}
    for number, line in enumerate(lines[start:], start + 1):
        if not line and form in _NAMING:
            continue
        match = form.fullmatch(line) if form else None
        if match is None:
            raise UserError(f"--labels_file {path!r}, line {number}: found {line[:80]!r}; expected {LABELS_FILE_FORMS}")
        found = match.groupdict()
        label, given = _class_in(found)
        if label is None:
            raise UserError(f"--labels_file {path!r}, line {number}: {given}; expected a class of ImageNet-1k")
        name = without_extension(found["name"].removeprefix("./")) if "name" in found else _VALIDATION_NAME % number
        if classes.setdefault(name, label) != label:
            raise UserError(f"--labels_file {path!r}, line {number}: {name!r} had another class further up")
    return classes


def _class_in(found: dict[str, str]) -> tuple[int | None, str]:
    """The class index on a line, None where it is no class, and what to say then."""
    if "id" in found:
        return _DEVKIT_INDEX.get(int(found["id"])), f"{found['id']} is not an ILSVRC2012_ID (1..1000)"
    if "index" in found:
        index = int(found["index"])
        return index if index < len(WNIDS) else None, f"{index} is not a class index (0..999)"
    return CLASS_INDEX.get(found["wnid"]), f"unknown {found['wnid']}"


_DEVKIT_INDEX = {devkit_id: index for index, devkit_id in enumerate(DEVKIT_IDS)}
_VALIDATION_NAME = "ILSVRC2012_val_%08d"


def _read_lines(path: str) -> list[str]:
    try:
        # Decoded as the names of files are, so that any name can be an entry.
        text = read_bytes(path).decode("utf-8-sig", errors="surrogateescape")
    except (OSError, bf.Error) as error:
        raise UserError(f"--labels_file {path!r} cannot be read: {reason_of(error)}") from error
    if not text.strip():
        raise UserError(f"--labels_file {path!r} is empty; expected {LABELS_FILE_FORMS}")
    return [line.strip().replace('"', "") for line in text.rstrip().split("\n")]


# Choosing


def find_images(args: argparse.Namespace) -> list[LabelledImage]:
    """The images chosen by the flags, with warnings about what is missing.

    Args:
        args: flags data_dir, model_path, labels_file, class_order, class_cond, num_classes, num_per_class and
            num_samples.

    Raises UserError if there are none, if classes are needed and unknown, or if two images would share a sample.
    """
    paths, why_unknown = list_images(args.data_dir), None
    if args.class_cond:
        recorded = read_classes(args.model_path)
        found = label_images(args.data_dir, paths, args.labels_file, args.class_order, recorded)
    else:
        found, why_unknown = label_where_known(args.data_dir, paths, args.labels_file, args.class_order)
    images = choose_images(found, args.num_classes, args.num_per_class, args.num_samples)
    if args.class_cond:
        check_labels(images, args.data_dir)
    if why_unknown:
        logger.warn(
            f"{why_unknown}: --num_classes and --num_per_class do not apply, "
            f"{len(images)} of {len(found)} images are taken (--num_samples)"
        )
    if (classes := len({image.label for image in found})) > args.num_classes:
        logger.info(f"{args.num_classes} of {classes} classes are taken (--num_classes)")
    if warning := shortage(images, args.num_classes, args.num_per_class, args.num_samples):
        logger.warn(warning)
    check_stems([image.path for image in images])
    return images


def check_stems(paths: Sequence[str], flag: str = "--data_dir") -> None:
    """Raise UserError, which names `flag`, if two images differ only in their extension: they would share a sample."""
    known: dict[str, str] = {}
    for path in paths:
        if (other := known.setdefault(os.path.splitext(path)[0], path)) != path:
            raise UserError(f"{other} and {path} would have samples of the same name: rename one of them ({flag})")


def choose_images(
    images: Sequence[LabelledImage], num_classes: int, num_per_class: int, num_samples: int | None = None
) -> list[LabelledImage]:
    """Of the first `num_classes` classes found, in the order of their labels, the first `num_per_class` images by path.

    The result goes class by class, and ends after `num_samples` images. Images without labels are all taken, by path.

    Raises UserError where a number is less than 1.
    """
    for flag, number in {
        "num_classes": num_classes,
        "num_per_class": num_per_class,
        "num_samples": num_samples,
    }.items():
        if number is not None and number < 1:
            raise UserError(f"--{flag} is {number}; expected 1 or more")
    if not _have_classes(images):
        return sorted(images, key=lambda image: image.path)[:num_samples]
    by_label: dict[int, list[LabelledImage]] = defaultdict(list)
    for image in images:
        by_label[image.label].append(image)
    chosen = []
    for label in sorted(by_label)[:num_classes]:
        chosen += sorted(by_label[label], key=lambda image: image.path)[:num_per_class]
    return chosen[:num_samples]


def check_labels(images: Sequence[LabelledImage], data_dir: str, flag: str = "--data_dir") -> None:
    """Raise UserError, which names `flag`, unless the images have classes that a class-conditional model can take."""
    if any(image.label is None for image in images):
        raise UserError(f"the model needs the classes of the images, which nothing in {data_dir!r} ({flag}) gives")
    if (most := max(image.label for image in images)) >= NUM_CLASSES:
        raise UserError(f"{most + 1} classes in {data_dir!r} ({flag}); expected at most {NUM_CLASSES}")


def _have_classes(images: Sequence[LabelledImage]) -> bool:
    return all(image.label is not None for image in images)


def shortage(
    chosen: Sequence[LabelledImage], num_classes: int, num_per_class: int, num_samples: int | None = None
) -> str | None:
    """What to warn of where `choose_images` found fewer images than it was asked for; None where it found all."""
    if not _have_classes(chosen):
        missing = num_samples is not None and len(chosen) < num_samples
        return f"{_count(num_samples, 'image')} asked for (--num_samples), {len(chosen)} found" if missing else None
    asked = num_classes * num_per_class
    if num_samples is not None:
        asked = min(asked, num_samples)
    if len(chosen) >= asked:
        return None
    sizes = Counter(image.label for image in chosen)
    text = (
        f"{_count(asked, 'image')} asked for, {len(chosen)} found: "
        f"{_count(len(sizes), 'class')} of {num_classes} (--num_classes)"
    )
    few = sum(size < num_per_class for size in sizes.values())
    return f"{text}, {few} of them with fewer than {_count(num_per_class, 'image')} (--num_per_class)" if few else text
