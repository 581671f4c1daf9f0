"""Finding, labelling, choosing and reading images.

A path of an image is relative to `data_dir`, with "/" between its parts on every machine. The module imports no
torch: a mistake in a folder is reported at once.
"""

from __future__ import annotations

import io
import math
import os
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import blobfile as bf
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError
from .files import LFS_POINTER, is_remote
from .imagenet_classes import CLASS_INDEX, DEVKIT_IDS, WNIDS

if TYPE_CHECKING:
    from .training_data import ImageDataset as ImageDataset
    from .training_data import load_data as load_data

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # what the bytes may be, whichever extension the name has

# What Pillow finds odd in a file that it can read is nothing that its owner must act on. A filter for the process,
# because `warnings.catch_warnings` is not safe where several threads read.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImage(UserError):
    """An image file that is missing, truncated, or no image. The message gives its path and the reason."""


@dataclass(frozen=True)
class LabelledImage:
    """An image and its class.

    `path` is relative to `data_dir`. `label` is the class index: 0..999 for ImageNet, else the place of `class_name`
    among the sorted classes of the folder; None, with an empty `class_name`, where nothing names a class.
    """

    path: str
    label: int | None
    class_name: str


# Finding


def list_images(data_dir: str) -> list[str]:
    """The images below a folder, local or remote: paths relative to it, sorted by code point.

    Links are followed; files and folders whose names begin with a dot are left out.

    Raises UserError where there is no such folder, or no image in it.
    """
    if not data_dir:
        raise UserError("no folder of images was given: --data_dir")
    try:
        if not bf.isdir(data_dir):
            found = "is a file, not a folder" if bf.exists(data_dir) else "does not exist"
            raise UserError(f"the folder of images {data_dir!r} {found} (--data_dir)")
        files = list(_list_files(data_dir))
    except (OSError, bf.Error) as error:
        raise UserError(f"the folder of images cannot be listed (--data_dir): {error}") from error
    images = sorted(path for path in files if path.lower().endswith(EXTENSIONS))
    if not images:
        raise UserError(
            f"no images in {data_dir!r} (--data_dir): found {_describe_files(files)}; "
            f"expected files that end in {', '.join(EXTENSIONS)}"
        )
    return images


def _list_files(folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """The files below `folder`, in any order, each with `prefix` before it."""
    if not is_remote(folder):
        # A link to a folder above would be followed for ever.
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
        # A broken link counts as a file, which is named when it cannot be read; a pipe, say, is left out.
        return [(e.name, e.is_dir()) for e in entries if e.is_dir() or e.is_file() or e.is_symlink()]


def _describe_files(files: Sequence[str]) -> str:
    if not files:
        return "no files at all"
    kinds = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in files)
    commonest = sorted(kinds, key=lambda kind: (-kinds[kind], kind))[:5]
    return f"{_count(len(files), 'file')}, none of them an image: {', '.join(commonest)}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}{'es' if thing.endswith('s') else 's'}"


# Labelling


def label_images(data_dir: str, paths: Sequence[str], labels_file: str | None = None) -> list[LabelledImage]:
    """Give each of `paths` its class.

    Where there is a `labels_file` it decides; see `read_labels_file`. Else the ImageNet class that a folder (the
    innermost first) or a part of the file name between "_" names by its wnid. Else, for a folder that is not ImageNet,
    the sorted names of its top-level folders; for a flat one, what stands before the first "_" of each file name, and
    no class where some name has no "_".

    Raises UserError where some images have a class and others have none, and for the official ILSVRC2012_val_ files
    without a `labels_file`. `data_dir` serves the messages alone.
    """
    if labels_file:
        return _label_from_file(data_dir, paths, labels_file)
    wnids = [_wnid_in(path) for path in paths]
    if any(wnids):
        without = [path for path, wnid in zip(paths, wnids, strict=True) if wnid is None]
        if without:
            raise UserError(
                f"{len(without)} of {_count(len(paths), 'image')} in {data_dir!r} (--data_dir) name no ImageNet class: "
                f"{_some(without)}.\nThe others do, by a wnid. Move these away, or give --labels_file."
            )
        return [LabelledImage(path, CLASS_INDEX[w], w) for path, w in zip(paths, wnids, strict=True) if w]
    official = [path for path in paths if re.search(r"ILSVRC2012_(val|test)_\d{8}", path)]
    if official:
        raise UserError(
            f"the names of ImageNet's validation files carry no class: {_some(official)} in {data_dir!r}.\n"
            f"Give --labels_file: {LABELS_FILE_FORMS}."
        )
    return _label_by_name(data_dir, paths)


def _wnid_in(path: str) -> str | None:
    *folders, name = _without_extension(path).split("/")
    return next((part for part in [*reversed(folders), *name.split("_")] if part in CLASS_INDEX), None)


def _label_by_name(data_dir: str, paths: Sequence[str]) -> list[LabelledImage]:
    flat = [path for path in paths if "/" not in path]
    if flat and len(flat) < len(paths):
        raise UserError(
            f"{len(flat)} of {_count(len(paths), 'image')} in {data_dir!r} (--data_dir) lie outside of its class "
            f"folders: {_some(flat)}.\nMove them into one of the folders, or away."
        )
    if flat and not all("_" in path for path in flat):
        return [LabelledImage(path, None, "") for path in paths]
    names = [path.split("_" if flat else "/", 1)[0] for path in paths]
    label = {name: index for index, name in enumerate(sorted(set(names)))}
    return [LabelledImage(path, label[name], name) for path, name in zip(paths, names, strict=True)]


def _label_from_file(data_dir: str, paths: Sequence[str], labels_file: str) -> list[LabelledImage]:
    classes = read_labels_file(labels_file)
    labels = [_find_entry(classes, path) for path in paths]
    without = [path for path, label in zip(paths, labels, strict=True) if label is None]
    if without:
        raise UserError(
            f"--labels_file {labels_file!r} has no entry for {len(without)} of {_count(len(paths), 'image')} in "
            f"{data_dir!r}: {_some(without)}.\nIt has {len(classes)}, the first for {next(iter(classes))!r}."
        )
    return [LabelledImage(p, label, WNIDS[label]) for p, label in zip(paths, labels, strict=True) if label is not None]


def _find_entry(classes: dict[str, int], path: str) -> int | None:
    """The entry of `path`, or of the same path with fewer folders before it."""
    parts = _without_extension(path).split("/")
    names = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((classes[name] for name in names if name in classes), None)


def _without_extension(path: str) -> str:
    stem, extension = os.path.splitext(path)
    return stem if extension.lower() in EXTENSIONS else path


def _some(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (", ..." if len(paths) > 3 else "")


LABELS_FILE_FORMS = (
    'Kaggle\'s LOC_val_solution.csv, or lines "filename wnid" or "filename,wnid", or for each validation image in '
    "order a line with its wnid, or with its ILSVRC2012_ID (1..1000)"
)

_WNID_LINE = re.compile(r"(?P<wnid>n\d{8})")
_ID_LINE = re.compile(r"(?P<id>\d+)")
# Kaggle's lines go on with boxes: wnid, four numbers, wnid, ...
_NAMED_LINE = re.compile(r"(?P<name>.+?)(?:\s*,\s*|\s+)(?P<wnid>n\d{8})(?:\s+(?:n\d{8}|-?\d+))*")


def read_labels_file(path: str) -> dict[str, int]:
    """The class index of each image that a file of ImageNet labels names: file name without extension -> 0..999.

    The form is known by the first line: `LABELS_FILE_FORMS`, with a header or not where lines name files. Line i of a
    form that names none is image ILSVRC2012_val_i.

    Raises UserError for any other form, and for a line that is not of the file's form, with its number.
    """
    lines = _read_lines(path)
    header = len(lines) > 1 and not re.search(r"\d", lines[0]) and _NAMED_LINE.fullmatch(lines[1])
    start = 1 if header else 0
    form = next((f for f in (_WNID_LINE, _ID_LINE, _NAMED_LINE) if f.fullmatch(lines[start])), None)
    if form is not _NAMED_LINE and len(lines) == len(set(lines)) == len(WNIDS):
        raise UserError(f"--labels_file {path!r} lists the 1000 classes, not images; expected {LABELS_FILE_FORMS}")

    classes: dict[str, int] = {}
    for number, line in enumerate(lines[start:], start + 1):
        if not line and form is _NAMED_LINE:
            continue
        match = form.fullmatch(line) if form else None
        if match is None:
            raise UserError(f"--labels_file {path!r}, line {number}: found {line[:80]!r}; expected {LABELS_FILE_FORMS}")
        found = match.groupdict()
        label = _DEVKIT_INDEX.get(int(found["id"])) if "id" in found else CLASS_INDEX.get(found["wnid"])
        if label is None:
            given = f"{found['id']} is not an ILSVRC2012_ID (1..1000)" if "id" in found else f"unknown {found['wnid']}"
            raise UserError(f"--labels_file {path!r}, line {number}: {given}; expected a class of ImageNet-1k")
        name = _without_extension(found["name"].removeprefix("./")) if "name" in found else _VALIDATION_NAME % number
        if classes.setdefault(name, label) != label:
            raise UserError(f"--labels_file {path!r}, line {number}: {name!r} had another class further up")
    return classes


_DEVKIT_INDEX = {devkit_id: index for index, devkit_id in enumerate(DEVKIT_IDS)}
_VALIDATION_NAME = "ILSVRC2012_val_%08d"


def _read_lines(path: str) -> list[str]:
    try:
        # Decoded as the names of files are, so that any name can be an entry.
        text = _read_bytes(path).decode("utf-8-sig", errors="surrogateescape")
    except (OSError, bf.Error) as error:
        raise UserError(f"--labels_file {path!r} cannot be read: {_reason(error)}") from error
    if not text.strip():
        raise UserError(f"--labels_file {path!r} is empty; expected {LABELS_FILE_FORMS}")
    return [line.strip().replace('"', "") for line in text.rstrip().split("\n")]


# Choosing


def choose_images(
    images: Sequence[LabelledImage], num_classes: int, num_per_class: int, num_samples: int | None = None
) -> list[LabelledImage]:
    """Of the first `num_classes` classes found, in the order of their labels, the first `num_per_class` images by path.

    The result goes class by class, and ends after `num_samples` images. Images without a label are one class.

    Raises UserError where a number is less than 1.
    """
    for flag, number in {
        "num_classes": num_classes,
        "num_per_class": num_per_class,
        "num_samples": num_samples,
    }.items():
        if number is not None and number < 1:
            raise UserError(f"--{flag} is {number}; expected 1 or more")
    by_label: dict[int, list[LabelledImage]] = defaultdict(list)
    for image in images:
        by_label[-1 if image.label is None else image.label].append(image)
    chosen = []
    for label in sorted(by_label)[:num_classes]:
        chosen += sorted(by_label[label], key=lambda image: image.path)[:num_per_class]
    return chosen[:num_samples]


def shortage(
    chosen: Sequence[LabelledImage], num_classes: int, num_per_class: int, num_samples: int | None = None
) -> str | None:
    """What to warn of where `choose_images` found fewer images than it was asked for; None where it found all."""
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


# Reading


def read_image(path: str, image_size: int) -> np.ndarray:
    """Read an image file, local or remote, as its middle square: uint8 of shape (image_size, image_size, 3), RGB.

    Raises UnreadableImage.
    """
    return center_crop_arr(open_image(path), image_size)


def open_image(path: str) -> Image.Image:
    """Read an image file, local or remote, as an upright RGB image; what is transparent becomes white.

    Raises UnreadableImage.
    """
    try:
        data = _read_bytes(path)
        if data.startswith(LFS_POINTER):
            raise ValueError("it is a Git LFS pointer, not the image itself: fetch that by git lfs pull")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return _to_rgb(_upright(image))
    except Exception as error:  # Pillow's decoders raise nearly any kind
        raise UnreadableImage(f"image {path!r} cannot be read: {_reason(error)}") from error


def _read_bytes(path: str) -> bytes:
    if is_remote(path):
        return bf.read_bytes(path)
    with open(path, "rb") as f:
        return f.read()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is not one of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    """Turn as the EXIF orientation says, if it can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey, which Pillow would clip.
        image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """The middle square of an image, resized to (image_size, image_size, channels), as ADM was trained on
    (Dhariwal and Nichol, arXiv:2105.05233).
    """
    pil_image = _resize_short_side(pil_image, image_size)
    left, top = ((side - image_size) // 2 for side in pil_image.size)
    return np.array(pil_image.crop((left, top, left + image_size, top + image_size)))


def random_crop_arr(
    pil_image: Image.Image,
    image_size: int,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    rng: random.Random | ModuleType = random,
) -> np.ndarray:
    """A random square of an image, resized to (image_size, image_size, channels).

    The side of the square is between `min_crop_frac` and `max_crop_frac` of the image's short side.
    """
    short_side = rng.randint(math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac))
    pil_image = _resize_short_side(pil_image, short_side)
    left, top = (rng.randint(0, side - image_size) for side in pil_image.size)
    return np.array(pil_image.crop((left, top, left + image_size, top + image_size)))


def _resize_short_side(pil_image: Image.Image, short_side: int) -> Image.Image:
    # Halving with a box filter first is quick, and averages over every pixel.
    while min(pil_image.size) >= 2 * short_side:
        pil_image = pil_image.resize(tuple(side // 2 for side in pil_image.size), Image.Resampling.BOX)
    scale = short_side / min(pil_image.size)
    return pil_image.resize(tuple(round(side * scale) for side in pil_image.size), Image.Resampling.BICUBIC)


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 in 0..255 to float32 in [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1


# Training


def __getattr__(name: str) -> Any:
    """`ImageDataset` and `load_data`, by which name people know them; their module imports torch."""
    if name in ("ImageDataset", "load_data"):
        from . import training_data

        return getattr(training_data, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
