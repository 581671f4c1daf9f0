"""Finding, labelling and choosing the images of a folder.

Paths of images are relative to `data_dir`, with "/" as the separator.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

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

    Attributes:
        path: path relative to `data_dir`.
        label: class index, see `label_images`; None if the class is unknown.
        class_name: name of the class, "" if unknown.
    """

    path: str
    label: int | None
    class_name: str


# Finding


def list_images(data_dir: str, flag: str = "--data_dir") -> list[str]:
    """The images below a folder, local or remote: paths relative to it, sorted by code point.

    Links are followed unless they point to a folder above. Hidden files and folders are skipped. So are files with
    other extensions, with one warning per folder.

    Raises UserError, naming `flag`, if the folder does not exist or has no images.
    """
    if not data_dir:
        raise UserError(f"no folder of images was given: {flag}")
    try:
        if not bf.isdir(data_dir):
            problem = "is a file, not a folder" if bf.exists(data_dir) else "does not exist"
            raise UserError(f"the folder of images {data_dir!r} {problem} ({flag})")
        files = list(_list_files(data_dir))
    except (OSError, bf.Error) as error:
        raise UserError(f"the folder of images cannot be listed ({flag}): {error}") from error
    images = sorted(path for path in files if path.lower().endswith(EXTENSIONS))
    if not images:
        found = f"{len(files)} file(s): {_extensions(files)}" if files else "no files at all"
        raise UserError(f"no images in {data_dir!r} ({flag}), found {found}; expected {', '.join(EXTENSIONS)}")
    if len(images) < len(files):
        skipped = sorted({*files} - {*images})
        logger.warn_once(f"{len(skipped)} file(s) skipped: {_extensions(skipped)} (in {data_dir!r})")
    return images


def _list_files(folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """The files below `folder`, in any order, with `prefix` before each path; `above` has the folders above."""
    if not is_remote(folder):
        stat = os.stat(folder)
        this = (stat.st_dev, stat.st_ino)
        if this in above:  # a link that would be followed forever
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
    """(name, whether it is a folder) for every file and folder directly in `folder`."""
    if is_remote(folder):
        return [(entry.name, entry.is_dir) for entry in bf.scandir(folder)]
    with os.scandir(folder) as entries:
        # A broken link counts as a file, to be reported as unreadable; pipes, sockets and links to them are skipped.
        kinds = [(e, _is(e.is_dir), _is(e.is_file)) for e in entries]
        return [(e.name, is_dir) for e, is_dir, is_file in kinds if is_dir or is_file or _is_broken_link(e)]


def _is_broken_link(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _is(kind: Callable[[], bool]) -> bool:
    """Call `is_dir` or `is_file` of an entry; circular links are neither."""
    try:
        return kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _extensions(files: Sequence[str]) -> str:
    """The most common extensions of files, for a message."""
    kinds = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in files)
    commonest = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    return ", ".join(commonest[:5]) + (", ..." if len(commonest) > 5 else "")


def check_outside(
    outputs: Iterable[str], data_dir: str, images: Sequence[str], flag: str = "--data_dir", what: str = "the samples"
) -> None:
    """Raise UserError if images in the folders `outputs`, which need not exist, would be found below `data_dir`.

    `images` are the images that were found, in case they are in linked folders; `flag` and `what` are for the message.
    """
    within = {os.path.dirname(path) for path in images}
    within = {"/".join(parts[:i]) for parts in (path.split("/") for path in within) for i in range(len(parts) + 1)}
    searched = {_identity(os.path.join(data_dir, path)) for path in {"", *within}} - {None}
    if output := next((output for output in outputs if _is_below(output, searched)), None):
        raise UserError(
            f"{what} would be written to {output!r} (--output), which is inside {data_dir!r} ({flag}): the next run "
            f"would take them for its images.\nChoose an --output outside of {flag}"
        )


def _is_below(folder: str, searched: Collection[Any]) -> bool:
    """Whether a folder is found if those with these identities are searched."""
    path = folder.rstrip("/") if is_remote(folder) else os.path.realpath(folder)
    while path and _identity(path) not in searched:
        parent, name = os.path.split(path)
        if name.startswith(".") or parent == path:  # hidden folders are not searched
            return False
        path = parent
    return bool(path)


def _identity(folder: str) -> Any:
    """What tells a folder from others, whatever the links to it; None if it does not exist."""
    if is_remote(folder):
        return folder.rstrip("/")
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


# Samples of another run as images


class SampleName(NamedTuple):
    """What the name of a sample says.

    Attributes:
        start: the starting image, without its extension.
        time: t0500, the time as in the name.
        trajectory, turn: 1, 2, ...
    """

    start: str
    time: str
    trajectory: int
    turn: int


def parse_sample(stem: str) -> SampleName | None:
    """The meaning of a sample's name without its extension; None if it is not the name of a sample."""
    match = re.fullmatch(r"(.*)_(t\d{4,})(?:_s(\d{3,}))?(?:_u(\d{2,}))?", stem, re.DOTALL)
    return match and SampleName(match[1], match[2], int(match[3] or 1), int(match[4] or 1))


def is_folder_of_samples(data_dir: str) -> bool:
    """Whether a folder has the name of one that forward_backward_dataset_sample.py writes, such as t_125_250_images."""
    name = os.path.basename(data_dir.rstrip("/") if is_remote(data_dir) else os.path.abspath(data_dir))
    return re.fullmatch(r"t_\d+_\d+_images", name) is not None


def path_of_start(path: str) -> str:
    """The path of a sample's starting image, with the sample's extension; other paths as they are."""
    stem, extension = os.path.splitext(path)
    name = parse_sample(stem)
    return name.start + extension if name else path


# Labelling


class UnknownClasses(UserError):
    """Some images have no class, or have ImageNet's official names, which contain none. args: (reason, remedy)."""

    def __str__(self) -> str:
        return ".\n".join(self.args)


def label_images(
    data_dir: str,
    paths: Sequence[str],
    labels_file: str | None = None,
    class_order: str = "",
    recorded: Classes | None = None,
    flag: str = "--data_dir",
) -> list[LabelledImage]:
    """Label images by the first of these rules that applies:

    - the entries of `labels_file`, see `read_labels_file`;
    - a wnid of ImageNet that is the name of a folder (the innermost first) or a part of the file name between "_";
    - the top-level folder, or in a flat folder the part of the file name before the first "_". If any name has no "_",
      the images have no class.

    In a folder of samples, t_K_N_images, samples have the classes of the images that they started from.

    Indices are ImageNet's, or else count the names in the order `class_order` (see `number_classes`). If the classes
    of a model are `recorded`, their indices are used. `flag` names `data_dir` in messages.

    Raises UnknownClasses if only some images have a class, and for the official ILSVRC2012_val_ files without a
    `labels_file`; UserError for a class that is not `recorded`, or a `class_order` that contradicts it.
    """
    where = f"{data_dir!r} ({flag})"
    named = [path_of_start(path) for path in paths] if is_folder_of_samples(data_dir) else paths
    images = _label(where, named, labels_file, "text" if recorded else class_order)
    images = [replace(image, path=path) for image, path in zip(images, paths, strict=True)]
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
    """Like `label_images`, but if some classes are unknown, no image has a label, and the reason is returned too."""
    try:
        images = label_images(data_dir, paths, labels_file, class_order, flag=flag)
    except UnknownClasses as error:
        return [LabelledImage(path, None, "") for path in paths], error.args[0]
    known = all(image.label is not None for image in images)
    return images, None if known else f"the names in {data_dir!r} ({flag}) do not give the classes of the images"


def classes_of(images: Sequence[LabelledImage], class_order: str = "", source: str = "") -> Classes | None:
    """The classes of images labelled by `label_images` in this order; None if they have none."""
    names = {image.label: image.class_name for image in images if image.label is not None}
    of_imagenet = all(CLASS_INDEX.get(name) == label for label, name in names.items())
    return Classes(names, IMAGENET if of_imagenet else class_order or "text", source) if names else None


def _label(where: str, paths: Sequence[str], labels_file: str | None, class_order: str) -> list[LabelledImage]:
    if labels_file:
        return _label_from_file(where, paths, labels_file)
    wnids = [_wnid_in(path) for path in paths]
    if any(wnids):
        if unknown := [path for path, wnid in zip(paths, wnids, strict=True) if wnid is None]:
            raise UnknownClasses(
                f"{len(unknown)} of {len(paths)} images in {where} name no ImageNet class: {list_some(unknown)}",
                "The others do, by a wnid. Move these away, or give --labels_file.",
            )
        return [LabelledImage(path, CLASS_INDEX[w], w) for path, w in zip(paths, wnids, strict=True) if w]
    if official := [path for path in paths if re.search(r"ILSVRC2012_(val|test)_\d{8}", path)]:
        raise UnknownClasses(
            f"the names of ImageNet's validation files do not give a class: {list_some(official)} in {where}",
            f"Give --labels_file: {LABELS_FILE_FORMS}.",
        )
    return _label_by_name(where, paths, class_order)


def _wnid_in(path: str) -> str | None:
    *folders, name = without_extension(path).split("/")
    return next((part for part in [*reversed(folders), *name.split("_")] if part in CLASS_INDEX), None)


def _label_by_name(where: str, paths: Sequence[str], class_order: str) -> list[LabelledImage]:
    flat = [path for path in paths if "/" not in path]
    if flat and len(flat) < len(paths):
        raise UnknownClasses(
            f"{len(flat)} of {len(paths)} images in {where} are outside the class folders: {list_some(flat)}",
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
    if unknown := [path for path, label in zip(paths, labels, strict=True) if label is None]:
        raise UserError(
            f"--labels_file {labels_file!r} has no entry for {len(unknown)} of {len(paths)} images in {where}: "
            f"{list_some(unknown)}.\nIt has {len(classes)}, the first for {next(iter(classes))!r}."
        )
    return [LabelledImage(p, label, WNIDS[label]) for p, label in zip(paths, labels, strict=True) if label is not None]


def find_entry(entries: Mapping[str, T], path: str) -> T | None:
    """The entry of `path`, or of the longest end of it that has one; entries have no extensions."""
    parts = without_extension(path).split("/")
    names = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((entries[name] for name in names if name in entries), None)


def without_extension(path: str) -> str:
    """A path without the extension of an image."""
    stem, extension = os.path.splitext(path)
    return stem if extension.lower() in EXTENSIONS else path


def list_some(paths: Sequence[str]) -> str:
    """Up to three paths, for a message."""
    return ", ".join(map(repr, paths[:3])) + (", ..." if len(paths) > 3 else "")


LABELS_FILE_FORMS = (
    'Kaggle\'s LOC_val_solution.csv, or lines "filename wnid" or "filename,wnid", or lines "filename index" (0..999), '
    "or a line per validation image, in order, with its wnid or its ILSVRC2012_ID (1..1000)"
)

_WNID_LINE = re.compile(r"(?P<wnid>n\d{8})")
_ID_LINE = re.compile(r"(?P<id>\d+)")
# In Kaggle's file, bounding boxes follow: wnid, four numbers, wnid, ...
_NAMED_LINE = re.compile(r"(?P<name>.+?)(?:\s*,\s*|\s+)(?P<wnid>n\d{8})(?:\s+(?:n\d{8}|-?\d+))*")
_INDEX_LINE = re.compile(r"(?P<name>.+?)(?:\s*,\s*|\s+)(?P<index>\d+)")
_NAMING = (_NAMED_LINE, _INDEX_LINE)


def read_labels_file(path: str) -> dict[str, int]:
    """Read ImageNet labels: file name without extension -> class index, 0..999.

    The first line determines which of `LABELS_FILE_FORMS` the file has. Forms with file names may have a header. In the
    others, line i is for image ILSVRC2012_val_i.

    Raises UserError for any other form, and with the number of a line of another form than the first.
    """
    lines = _read_lines(path)
    header = len(lines) > 1 and not re.search(r"\d", lines[0]) and any(form.fullmatch(lines[1]) for form in _NAMING)
    start = 1 if header else 0
    form = next((f for f in (_WNID_LINE, _ID_LINE, *_NAMING) if f.fullmatch(lines[start])), None)
    if form not in _NAMING and len(lines) == len(set(lines)) == len(WNIDS):
        raise UserError(f"--labels_file {path!r} lists the classes, not images; expected {LABELS_FILE_FORMS}")

    classes: dict[str, int] = {}
    for number, line in enumerate(lines[start:], start + 1):
        if not line and form in _NAMING:
            continue
        match = form.fullmatch(line) if form else None
        if match is None:
            raise UserError(f"--labels_file {path!r}, line {number}: found {line[:80]!r}; expected {LABELS_FILE_FORMS}")
        found = match.groupdict()
        label, problem = _label_in(found)
        if label is None:
            raise UserError(f"--labels_file {path!r}, line {number}: {problem}; expected a class of ImageNet-1k")
        name = without_extension(found.get("name", f"ILSVRC2012_val_{number:08d}").removeprefix("./"))
        if classes.setdefault(name, label) != label:
            raise UserError(f"--labels_file {path!r}, line {number}: {name!r} had another class on an earlier line")
    return classes


def _label_in(found: dict[str, str]) -> tuple[int | None, str]:
    """The class index on a line, None if it is invalid, and the message in that case."""
    if "id" in found:
        return _DEVKIT_INDEX.get(int(found["id"])), f"{found['id']} is not an ILSVRC2012_ID (1..1000)"
    if "index" in found:
        index = int(found["index"])
        return index if index < len(WNIDS) else None, f"{index} is not a class index (0..999)"
    return CLASS_INDEX.get(found["wnid"]), f"unknown {found['wnid']}"


_DEVKIT_INDEX = {devkit_id: index for index, devkit_id in enumerate(DEVKIT_IDS)}


def _read_lines(path: str) -> list[str]:
    try:
        text = read_bytes(path).decode("utf-8-sig", errors="surrogateescape")  # as file names are decoded
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
    if warning := shortage(found, images, args.num_classes, args.num_per_class, args.num_samples):
        logger.warn(warning)
    check_stems([image.path for image in images])
    return images


def check_stems(paths: Sequence[str], flag: str = "--data_dir") -> None:
    """Raise UserError, which names `flag`, if two images differ only in their extension: they would share a sample."""
    known: dict[str, str] = {}
    for path in paths:
        if (other := known.setdefault(without_extension(path), path)) != path:
            raise UserError(f"{other} and {path} would have samples of the same name: rename one of them ({flag})")


def choose_images(
    images: Sequence[LabelledImage], num_classes: int, num_per_class: int, num_samples: int | None = None
) -> list[LabelledImage]:
    """The first `num_per_class` images of each of the first `num_classes` classes, at most `num_samples` in all.

    Images are ordered by label, then path. If the classes are unknown, the first two limits do not apply.

    Raises UserError if a number is less than 1.
    """
    limits = {"num_classes": num_classes, "num_per_class": num_per_class, "num_samples": num_samples}
    for flag, number in limits.items():
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
    """Raise UserError, naming `flag`, unless the images have classes, at most as many as a model can have."""
    if not _have_classes(images):
        raise UserError(f"the model needs the classes of the images, which are unknown in {data_dir!r} ({flag})")
    if (most := max(image.label for image in images)) >= NUM_CLASSES:
        raise UserError(f"{most + 1} classes in {data_dir!r} ({flag}); expected at most {NUM_CLASSES}")


def _have_classes(images: Sequence[LabelledImage]) -> bool:
    return all(image.label is not None for image in images)


def shortage(
    found: Sequence[LabelledImage],
    chosen: Sequence[LabelledImage],
    num_classes: int,
    num_per_class: int,
    num_samples: int | None = None,
) -> str | None:
    """A warning if `choose_images` has chosen fewer images, of those found, than asked for; else None."""
    if not _have_classes(chosen):
        missing = num_samples is not None and len(chosen) < num_samples
        return f"{num_samples} images asked for (--num_samples), {len(chosen)} found" if missing else None
    asked = num_classes * num_per_class
    if num_samples is not None:
        asked = min(asked, num_samples)
    if len(chosen) >= asked:
        return None
    limits = f"--num_classes {num_classes}, --num_per_class {num_per_class}"
    limits += "" if num_samples is None else f", --num_samples {num_samples}"
    classes = len({image.label for image in found})
    return f"{len(chosen)} of {len(found)} images in {classes} classes are taken, {asked} were asked for ({limits})"
