"""Setting up a classifier, labelling its images, and the files of results."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import blobfile as bf
import numpy as np
import torch
import torchvision

from .. import dist_util, logger
from ..compute.inference import choose_dtype, compute_reproducibly, describe_machine, dtype_name, keep_freed_memory
from ..compute.memory import to_device
from ..errors import ResultError, UserError, first_line
from ..images.classes import Classes, number_classes
from ..images.folder import LabelledImage, list_some
from ..images.imagenet import CLASS_INDEX
from ..runs.inputs import file_digest
from ..runs.records import Record, read_record, record_of
from ..runs.settings import differences as changed_settings
from ..runs.settings import digest_of
from .networks import Classifier, check_before_download, open_classifier

SIMILARITIES = ("cosine", "L2", "L2_normalized")
DIFFERENCES_ARRAYS = ("names", "layers", *SIMILARITIES)
LOGITS_ARRAYS = ("names", "labels", "logits_start", "logits_sample")
TRAJECTORIES = ("trajectories",)  # in both, if images have several samples


# File names


def name_in_files(classifier_name: str) -> str:
    """The classifier's name in file names: without its module."""
    return classifier_name.rpartition(":")[2]


def default_folder(name: str) -> str:
    """The default folder for the results of a classifier."""
    return f"classifier_statistics/{name}"


def statistics_file(folder: str, name: str) -> str:
    """The statistics of a classifier's layers."""
    return f"{folder}/act_stat_{name}.npz"


def differences_file(folder: str, name: str, step_reverse: int, num_steps: int) -> str:
    """The similarities of starting images and samples at time k of N."""
    return f"{folder}/act_diff_{name}-t_{step_reverse}_{num_steps}.npz"


def logits_file(folder: str, name: str, step_reverse: int, num_steps: int) -> str:
    """The logits of starting images and samples at time k of N."""
    return f"{folder}/logits_{name}-t_{step_reverse}_{num_steps}.npz"


def parts_folder(folder: str, name: str, times: Sequence[int], num_steps: int) -> str:
    """The folder for finished batches of a series of times, until all are done."""
    series = digest_of(map(str, times))[:8]
    return f"{folder}/act_diff_{name}-t_{times[0]}..{times[-1]}_{num_steps}_{series}_parts"


# Reading


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
    """The results of one time k of N; n pairs of a starting image and a sample, L layers.

    Pairs are in the order of their images, then of the trajectories 1..M. `trajectories` is in both files if M > 1.

    Attributes:
        step_reverse: k.
        num_steps: N.
        differences: names (n,), trajectories (n,), layers (L,), and cosine, L2, L2_normalized, each float64 (n, L).
        logits: names (n,), trajectories (n,), labels int64 (n,), logits_start and logits_sample float32 (n, classes).
        record: the record of the result, if there is one.
    """

    step_reverse: int
    num_steps: int
    differences: dict[str, np.ndarray]
    logits: dict[str, np.ndarray]
    record: Record | None = None

    @property
    def time_columns(self) -> dict[str, float]:
        """The columns of the time in a CSV file."""
        return {"k": self.step_reverse, "N": self.num_steps, "k/N": self.step_reverse / self.num_steps}

    @property
    def num_trajectories(self) -> int:
        """M, samples of each starting image."""
        return int(self.differences.get("trajectories", np.ones(1)).max(initial=1))

    def by_start(self, values: np.ndarray) -> np.ndarray:
        """Values of the pairs (n, ...) as (n / M, M, ...): by starting image and trajectory."""
        return values.reshape(-1, self.num_trajectories, *values.shape[1:])

    @property
    def starts(self) -> np.ndarray:
        """Names of the starting images (n / M,)."""
        return self.by_start(self.differences["names"])[:, 0]


def read_series(folder: str, name: str) -> list[TimeResult]:
    """The results of all times in a folder, in the order of k/N.

    Raises UserError if there are none, a file is damaged or missing, or images lack samples; ResultError if logits
    contain NaN or infinity.
    """
    pattern = re.compile(rf"(act_diff|logits)_{re.escape(name)}-t_(\d+)_(\d+)\.npz")
    matches = [pattern.fullmatch(entry) for entry in (bf.listdir(folder) if bf.isdir(folder) else ())]
    times = {(int(match[2]), int(match[3])) for match in matches if match}
    if not times:
        found = f"has no results of {name}" if bf.isdir(folder) else "does not exist"
        raise UserError(f"the folder {folder} {found}; expected files act_diff_{name}-t_K_N.npz (--results)")
    results = []
    for k, n in sorted(times, key=lambda time: (time[0] / time[1], time)):
        differences_path, logits_path = differences_file(folder, name, k, n), logits_file(folder, name, k, n)
        differences = read_arrays(differences_path, DIFFERENCES_ARRAYS, TRAJECTORIES)
        logits = read_arrays(logits_path, LOGITS_ARRAYS, TRAJECTORIES)
        if not all(np.isfinite(logits[array]).all() for array in ("logits_start", "logits_sample")):
            raise ResultError(
                f"{logits_path} contains NaN or infinity: the classifier's weights were damaged,\n"
                "or too large for half precision. Remove the file and rerun evaluate_classifier.py"
            )
        if not np.array_equal(differences["names"], logits["names"]):
            raise UserError(
                f"{differences_path} and {logits_path} are of different images.\n"
                "Remove both and rerun evaluate_classifier.py"
            )
        record = find_record(differences_path, "evaluate_classifier.py")
        results.append(TimeResult(k, n, differences, logits, record))
        check_trajectories(results[-1], differences_path)
    return results


def check_trajectories(result: TimeResult, path: str) -> None:
    """Raise UserError, which names the file, unless every starting image has all trajectories 1..M, in order."""
    names, count = result.differences["names"], result.num_trajectories
    if count > 1:
        numbers = np.arange(len(names)) % count + 1
        whole = len(names) % count == 0 and np.array_equal(result.differences["trajectories"], numbers)
        if not whole or not (result.by_start(names) == result.starts[:, None]).all():
            found, samples = np.unique(names, return_counts=True)
            raise incomplete(path, {*found[samples < count].tolist(), *unreadable_in(result)})


def unreadable_in(result: TimeResult) -> set[str]:
    """The starting images that a result lacks, or lacks samples of, because files were unreadable."""
    return {*(result.record or {}).get("images", {}).get("unreadable", {})}


def incomplete(path: str, lacking: Iterable[str]) -> UserError:
    """The error that a result lacks pairs of the images `lacking`, and how to repair it."""
    images = sorted(lacking)
    return UserError(
        f"{path} lacks samples of {len(images)} images, which could not be read: {list_some(images)}.\nRerun "
        "evaluate_classifier.py to see which; remove them, make them again (forward_backward_dataset_sample.py), and "
        "rerun it once more"
    )


def read_arrays(
    path: str, names: Sequence[str], optional: Sequence[str] = (), script: str = "evaluate_classifier.py"
) -> dict[str, np.ndarray]:
    """The arrays with these names in an .npz file that `script` wrote, and those with `optional` names that it has.

    Raises UserError if the file or an array is missing or damaged.
    """
    if not bf.exists(path):
        raise UserError(f"{path}, a file of {script}, is missing")
    try:
        with bf.BlobFile(path, "rb") as f, np.load(f, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in (*names, *(name for name in optional if name in arrays))}
    except Exception as error:  # depends on the damage
        raise UserError(
            f"{path} is damaged, or not a file of {script}: {first_line(error)}.\nRemove it and rerun that script"
        ) from error


def find_record(path: str, script: str) -> Record | None:
    """The record of a result that `script` wrote, if there is one. Raises UserError if it is corrupted."""
    try:
        return read_record(record_of(path), {"settings": dict}, path)
    except UserError as error:
        raise UserError(
            f"{record_of(path)}, the record of {path}, is corrupted.\nRemove both files and rerun {script}"
        ) from error


def check_settings(
    records: Mapping[tuple[int, int], Record | None],
    folder: str,
    script: str,
    may_differ: Sequence[str] = ("samples_digest",),
) -> None:
    """Raise UserError unless the results in a folder that have records were made with the same settings.

    Args:
        records: records of the results by (k, N).
        folder: their folder, for the message.
        script: the script that wrote them, for the message.
        may_differ: settings that may differ from time to time.
    """
    known = {time: record["settings"] for time, record in records.items() if record}
    for time, settings in known.items():
        first = next(iter(known))
        before, after = ({k: own[k] for k in own if k not in may_differ} for own in (known[first], settings))
        if changes := changed_settings(before, after):
            one, other = (f"k = {k} of N = {n}" for k, n in (first, time))
            raise UserError(
                f"{folder} has results of different settings: from {one} to {other}, {'; '.join(changes)}.\n"
                f"Move the results of one kind away; {script} can make them again with the settings of the others"
            )


# The classifier and its images


def set_up(args: argparse.Namespace) -> tuple[Classifier, AbstractContextManager, dict[str, Any]]:
    """Load the classifier of the flags onto this rank's device. All ranks must call this.

    Args:
        args: flags classifier_name, classifier_path, layers, image_size, classifier_use_fp16 and num_threads.

    Returns:
        the classifier, the context in which to call its model, and the hardware, precision, threads and versions, which
        determine the last digits.
    """
    patterns = [pattern.strip() for pattern in args.layers.split(",") if pattern.strip()]
    if not args.classifier_path and dist_util.get_world_size() > 1:
        dist_util.on_main(check_before_download, args.classifier_name, patterns)
        dist_util.on_main(lambda: bool(open_classifier(args.classifier_name)))  # only one rank downloads the weights
    classifier = dist_util.on_every_rank(
        open_classifier, args.classifier_name, args.classifier_path, patterns, args.image_size
    )

    return classifier, *prepare(classifier.model, args)


def prepare(model: torch.nn.Module, args: argparse.Namespace) -> tuple[AbstractContextManager, dict[str, Any]]:
    """Move a network to this rank's device. All ranks must call this. Returns the last two results of `set_up`.

    `args` has the flags classifier_use_fp16 and num_threads.
    """
    device = dist_util.dev()
    threads = compute_reproducibly(args.num_threads)
    keep_freed_memory()
    to_device(model)
    dtype = choose_dtype(args.classifier_use_fp16, "--classifier_use_fp16", "classifier")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    machine = {"precision": dtype_name(dtype), "threads": threads, **describe_machine(device)}
    return autocast, {**machine, "torchvision": torchvision.__version__}


def classifier_settings(args: argparse.Namespace, classifier: Classifier, precision: str) -> dict[str, Any]:
    """The settings of the classifier that determine the results."""
    return {
        "classifier_name": args.classifier_name,
        "classifier_digest": classifier.digest,
        "num_layers": len(classifier.layers),
        "layers_digest": digest_of(layer.name for layer in classifier.layers),
        "image_size": args.image_size,
        "classifier_precision": precision,
    }


def class_names_of(images: Iterable[LabelledImage]) -> list[str]:
    """The sorted names of the images' classes."""
    return sorted({image.class_name for image in images if image.class_name})


def with_labels_of(
    classifier: Classifier,
    images: Iterable[LabelledImage],
    class_names: Sequence[str],
    class_order: str = "",
    recorded: Classes | None = None,
) -> list[LabelledImage]:
    """The images, each labelled with the index of its logit, or None if that is not known.

    The classes recorded with the classifier apply, if any. Otherwise 1000 logits are ImageNet's classes, identified by
    wnid; another number of logits are the classes of the folder in order, if the numbers agree. A warning says if the
    folder has classes, and which logits are theirs is not known.

    Args:
        classifier: the classifier.
        images: images with class names.
        class_names: all classes of the images' folder.
        class_order: order of classes other than ImageNet's; see `number_classes`. If given, and the folder has 1000
            classes but no wnids, 1000 logits are these classes.
        recorded: classes recorded with the classifier's weights.

    Raises UserError for a class that is not among the recorded ones, or an order that contradicts them.
    """
    number: Mapping[str, int] = {}
    of_imagenet = not class_order or not CLASS_INDEX.keys().isdisjoint(class_names)
    if recorded:
        if max(recorded.names) >= classifier.num_classes:
            raise UserError(
                f"{recorded.source} has classes up to {max(recorded.names)}, but the classifier has only "
                f"{classifier.num_classes} logits (--classifier_path)"
            )
        number = recorded.indices(class_names, "the folder of images")
        recorded.check_order(class_order)
    elif classifier.num_classes == len(CLASS_INDEX) and of_imagenet:
        number = CLASS_INDEX
    elif classifier.num_classes == len(class_names):
        number = number_classes(class_names, class_order, "the folder of images")
    if unknown := [name for name in class_names if name not in number]:
        count, logits = len(class_names), f"the classifier has {classifier.num_classes} logits"
        problem = f"the images have {count} classes, and {logits}: the labels of the images are unknown"
        if number:
            problem = (
                f"{logits}, taken for ImageNet's classes, and {len(unknown)} of the {count} classes of the images "
            )
            problem += f"are no wnids, such as {unknown[0]}: their labels are unknown"
        logger.warn(
            f"{problem}.\nExpected a folder with all of the classifier's classes, or their list in classes.json next "
            "to the weights (--classifier_path)"
        )
    return [replace(image, label=number.get(image.class_name)) for image in images]


def labels_of(images: Iterable[LabelledImage]) -> np.ndarray:
    """The labels (n,), int64; -1 for unknown classes."""
    return np.array([-1 if image.label is None else image.label for image in images], np.int64)


def class_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rank (n,) of each label (n,) among its logits (n, classes), 0 for the largest; ties are in class order."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    equal_before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])  # as argmax breaks ties
    return ((logits > own) | equal_before).sum(axis=1)


def images_digest(images: Sequence[LabelledImage]) -> str:
    """SHA-256 of the images' paths and classes, in order."""
    return digest_of(f"{image.path}\t{label}" for image, label in zip(images, labels_of(images), strict=True))
