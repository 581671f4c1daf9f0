"""What the classifier scripts share: the classifier, ready for use, and the files of their results."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import blobfile as bf
import numpy as np
import torch
import torchvision

from .. import dist_util, logger
from ..compute.inference import compute_reproducibly, keep_memory, shared_half_precision, surroundings
from ..compute.memory import to_device
from ..errors import ResultError, UserError, first_line
from ..images.classes import Classes, number_classes
from ..images.folder import LabelledImage
from ..images.imagenet import CLASS_INDEX
from ..images.io import UnreadableImage
from ..runs.inputs import file_digest
from ..runs.records import read_record, record_of
from ..runs.settings import digest_of
from .networks import Classifier, open_classifier

SIMILARITIES = ("cosine", "L2", "L2_normalized")
DIFFERENCES_ARRAYS = ("names", "layers", *SIMILARITIES)
LOGITS_ARRAYS = ("names", "labels", "logits_start", "logits_sample")


# The names of the files


def name_in_files(classifier_name: str) -> str:
    """The classifier's name in those of its files: without the module that it is from."""
    return classifier_name.rpartition(":")[2]


def default_folder(name: str) -> str:
    """Where the results of a classifier are unless --output says otherwise."""
    return f"classifier_statistics/{name}"


def statistics_file(folder: str, name: str) -> str:
    """The statistics of a classifier's layers."""
    return f"{folder}/act_stat_{name}.npz"


def differences_file(folder: str, name: str, step_reverse: int, num_steps: int) -> str:
    """The similarities of starting images and their samples of time k of N."""
    return f"{folder}/act_diff_{name}-t_{step_reverse}_{num_steps}.npz"


def logits_file(folder: str, name: str, step_reverse: int, num_steps: int) -> str:
    """The logits of starting images and of their samples of time k of N."""
    return f"{folder}/logits_{name}-t_{step_reverse}_{num_steps}.npz"


def parts_folder(folder: str, name: str, times: Sequence[int], num_steps: int) -> str:
    """Where the batches of a series of times wait until all are there; every series has its own."""
    series = digest_of(map(str, times))[:8]
    return f"{folder}/act_diff_{name}-t_{times[0]}..{times[-1]}_{num_steps}_{series}_parts"


# Reading them


def statistics_digest(path: str, weights: str) -> str:
    """SHA-256 of a file of statistics. Raises UserError if they are not on record as those of these weights.

    Args:
        path: file of statistics.
        weights: digest of the classifier's weights.
    """
    record = read_record(record_of(path), {"settings": dict}, path)
    recorded = record["settings"].get("classifier_digest") if record else None
    if recorded is None:
        raise UserError(
            f"{record_of(path)}, the record of {path}, is missing or corrupted.\n"
            "Remove both files and rerun classifier_statistics.py"
        )
    if recorded != weights:
        raise UserError(
            f"{path} is of another classifier, with weights {recorded[:12]}... instead of {weights[:12]}... "
            "(--classifier_path).\nRun classifier_statistics.py with these weights and another --output"
        )
    return file_digest(path)


class TimeResult(NamedTuple):
    """The results of one time k of N; n images, L layers.

    Attributes:
        step_reverse: k.
        num_steps: N.
        differences: names (n,), layers (L,), and cosine, L2, L2_normalized, each float64 (n, L).
        logits: names (n,), labels int64 (n,), logits_start and logits_sample float32 (n, classes).
    """

    step_reverse: int
    num_steps: int
    differences: dict[str, np.ndarray]
    logits: dict[str, np.ndarray]


def read_series(folder: str, name: str) -> list[TimeResult]:
    """Every time in a folder of results, in the order of k/N.

    Raises UserError where there is none, a file is damaged, or a time lacks one of its two files; ResultError if logits
    are NaN or infinite.
    """
    pattern = re.compile(rf"(act_diff|logits)_{re.escape(name)}-t_(\d+)_(\d+)\.npz")
    matches = [pattern.fullmatch(entry) for entry in (bf.listdir(folder) if bf.isdir(folder) else ())]
    times = {(int(match[2]), int(match[3])) for match in matches if match}
    if not times:
        found = "holds no" if bf.isdir(folder) else "does not exist: there are no"
        raise UserError(f"the folder {folder} {found} results of {name}, act_diff_{name}-t_K_N.npz; see --output")
    results = []
    for k, n in sorted(times, key=lambda time: (time[0] / time[1], time)):
        differences = read_arrays(differences_file(folder, name, k, n), DIFFERENCES_ARRAYS)
        logits = read_arrays(logits_file(folder, name, k, n), LOGITS_ARRAYS)
        if not all(np.isfinite(logits[name]).all() for name in ("logits_start", "logits_sample")):
            raise ResultError(
                f"{logits_file(folder, name, k, n)} contains NaN or infinity: the classifier's weights were damaged,\n"
                "or too large for half precision. Remove the file, and run evaluate_classifier.py again"
            )
        if not np.array_equal(differences["names"], logits["names"]):
            raise UserError(
                f"{differences_file(folder, name, k, n)} and {logits_file(folder, name, k, n)} are of different "
                "images: remove both,\nand start evaluate_classifier.py again"
            )
        results.append(TimeResult(k, n, differences, logits))
    return results


def read_arrays(path: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of these names in an .npz file. Raises UserError where it is missing, damaged or lacks one."""
    if not bf.exists(path):
        raise UserError(f"{path} is missing: evaluate_classifier.py writes it")
    try:
        with bf.BlobFile(path, "rb") as f, np.load(f, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in names}
    except Exception as error:  # what damaged bytes raise is of nearly any kind
        raise UserError(
            f"{path} is damaged, or no file of evaluate_classifier.py: {first_line(error)}.\n"
            "Remove it, and start that script again"
        ) from error
    return found


# The classifier and its images


def set_up(args: argparse.Namespace) -> tuple[Classifier, AbstractContextManager, dict[str, Any]]:
    """Load the classifier that the flags name, and make it ready on this rank's device. All ranks must call this.

    Args:
        args: flags classifier_name, classifier_path, layers, image_size, classifier_use_fp16 and num_threads.

    Returns:
        the classifier, the context in which its model is to be called, and what decides the last digits: hardware,
        precision, threads and versions, by name.
    """
    patterns = [pattern.strip() for pattern in args.layers.split(",") if pattern.strip()]
    chosen = args.classifier_name, args.classifier_path, patterns, args.image_size
    if not args.classifier_path and dist_util.get_world_size() > 1:
        dist_util.on_main(lambda: bool(open_classifier(*chosen[:2])))  # one rank downloads, the others find the file
    classifier = dist_util.on_every_rank(open_classifier, *chosen)

    device = dist_util.dev()
    threads = compute_reproducibly(args.num_threads)
    keep_memory()
    to_device(classifier.model)
    dtype = shared_half_precision(device) if args.classifier_use_fp16 else torch.float32
    precision = str(dtype).removeprefix("torch.")
    if args.classifier_use_fp16 and dtype != torch.float16:
        logger.info(
            f"--classifier_use_fp16 True: there is no fast float16 here, the classifier computes in {precision}"
        )
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    machine = {"precision": precision, "threads": threads, **surroundings(device)}
    return classifier, autocast, {**machine, "torchvision": torchvision.__version__}


def classifier_settings(args: argparse.Namespace, classifier: Classifier, precision: str) -> dict[str, Any]:
    """What of the classifier decides the results."""
    return {
        "classifier_name": args.classifier_name,
        "classifier_digest": classifier.digest,
        "num_layers": len(classifier.layers),
        "layers_digest": digest_of(layer.name for layer in classifier.layers),
        "image_size": args.image_size,
        "classifier_precision": precision,
    }


def class_names_of(images: Iterable[LabelledImage]) -> list[str]:
    """The classes of a folder, sorted; empty where nothing names any."""
    return sorted({image.class_name for image in images if image.class_name})


def with_labels_of(
    classifier: Classifier,
    images: Iterable[LabelledImage],
    class_names: Sequence[str],
    class_order: str = "",
    recorded: Classes | None = None,
) -> list[LabelledImage]:
    """The images, each labelled with the number of its logit; None where that is not known.

    The record of the classifier's classes decides, if there is one. Else 1000 logits are those of ImageNet's classes,
    which their wnids name. Another number of logits, of a classifier that was trained on the user's own folders, stands
    for the classes of the folder in order, if it has as many.

    Args:
        classifier: whose logits.
        images: with the names of their classes.
        class_names: all classes of the folder that the images are from.
        class_order: the order of the classes of one's own folders; see `number_classes`. If it is given, and the folder
            has 1000 classes but no wnids, these are the classes of 1000 logits.
        recorded: the classes that the classifier was trained with, by the file of its weights.

    Raises UserError for a class that is not among the recorded ones, and an order that contradicts them.
    """
    number: Mapping[str, int] = {}
    of_imagenet = not class_order or not CLASS_INDEX.keys().isdisjoint(class_names)
    if recorded:
        if max(recorded.names) >= classifier.num_classes:
            raise UserError(
                f"{recorded.source} has classes up to {max(recorded.names)}, but the classifier has "
                f"{classifier.num_classes} logits: it is another network's (--classifier_path)"
            )
        number = recorded.indices(class_names, "the folder of images")
        recorded.check_order(class_order)
    elif classifier.num_classes == len(CLASS_INDEX) and of_imagenet:
        number = CLASS_INDEX
    elif classifier.num_classes == len(class_names):
        number = number_classes(class_names, class_order, "the folder of images")
    return [replace(image, label=number.get(image.class_name)) for image in images]


def labels_of(images: Iterable[LabelledImage]) -> np.ndarray:
    """(n,) of int64; -1 where the class is not known."""
    return np.array([-1 if image.label is None else image.label for image in images], np.int64)


def class_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rank of the true class among the logits, 0 for the largest: (n,). Ties are in the order of the classes.

    Args:
        logits: (n, classes).
        labels: (n,), each from 0 to classes - 1.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    equal_before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])  # breaks ties like argmax
    return ((logits > own) | equal_before).sum(axis=1)


def readable_or_error(read: Callable[..., Any], *args: Any) -> Any:
    """What `read(*args)` returns, or the UnreadableImage that it raises."""
    try:
        return read(*args)
    except UnreadableImage as error:
        return error


def images_digest(images: Sequence[LabelledImage]) -> str:
    """SHA-256 of the paths and classes of images, in their order."""
    return digest_of(f"{image.path}\t{label}" for image, label in zip(images, labels_of(images), strict=True))
