"""Measure the mean and the variance of a classifier's activations over images, layer by layer, and its accuracy.

They are what evaluate_classifier.py standardises activations with: per channel for feature maps and tokens, one number
for the logits. The images are spread evenly over the sorted list of the folder. The result does not depend on
--batch_size nor on the number of processes, which share the images out under mpiexec, torchrun or srun.

  python classifier_statistics.py --data_dir datasets/ILSVRC2012/validation --classifier_name convnext_base

writes classifier_statistics/convnext_base/act_stat_convnext_base.npz.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from guided_diffusion.command_line import ArgumentParser, run, whole_number

# isort: split
import blobfile as bf
import numpy as np

from guided_diffusion.classes import add_class_order, read_classes
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import HELP
from guided_diffusion.shards import Shard, add_shard_flags, shard_of

if TYPE_CHECKING:
    import torch

    from guided_diffusion.activations import Moments
    from guided_diffusion.image_datasets import LabelledImage
    from guided_diffusion.inputs import Entries, Inputs
    from guided_diffusion.locks import Locks
    from guided_diffusion.parts import Parts
    from guided_diffusion.torch_classifiers import Classifier


def main(argv: list[str] | None = None) -> int:
    """Measure. Returns 0, or 1 where images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)

    # Imported here and not above, so that --help and misspelt flags are answered without waiting for torch.
    from guided_diffusion import dist_util, logger
    from guided_diffusion.classifier_results import (
        classifier_settings,
        default_folder,
        images_digest,
        set_up,
        statistics_file,
        with_labels_of,
    )
    from guided_diffusion.inputs import Inputs
    from guided_diffusion.locks import hold
    from guided_diffusion.parts import Parts, compare_with_parts, lock_of
    from guided_diffusion.run_record import now

    dist_util.setup_dist(args.device)
    logger.make_dir()
    shard = dist_util.on_every_rank(shard_of, args)
    images, class_names = dist_util.on_main(find_images, args)
    classifier, autocast, circumstances = set_up(args)
    recorded = dist_util.on_main(read_classes, args.classifier_path)
    images = dist_util.on_every_rank(with_labels_of, classifier, images, class_names, args.class_order, recorded)
    settings = classifier_settings(args, classifier, circumstances["precision"])
    settings["the number of images (--num_samples)"] = len(images)
    settings["the list of images (--data_dir, --labels_file)"] = images_digest(images)
    result = statistics_file(args.output or default_folder(classifier.name), classifier.name)
    inputs, chosen = Inputs(args.data_dir, "--data_dir"), len(images)
    with hold({lock_of(result, shard): result}, about=settings) as locks:
        if dist_util.on_main(is_finished, result, settings, shard, inputs, images):
            logger.info(f"{result} is there already, made with the same settings: nothing to do")
            return 0
        parts = None
        if shard.count > 1:  # each shard leaves what it has measured, and the last one puts it together
            parts = Parts(f"{result.removesuffix('.npz')}_parts", settings, circumstances, shard, locks)
            dist_util.on_main(compare_with_parts, {"images": inputs}, {"images": paths_of(images)}, parts)
            if dist_util.on_main(shard_is_done, parts):
                logger.info(f"{shard} is done already, with the same settings")
                images = []
        inputs = dist_util.broadcast_object(inputs)
        processes = dist_util.get_world_size()
        logger.info(f"{chosen} images from {args.data_dir}, {len(classifier.layers)} layers of {classifier.name}")
        logger.info(
            f"{processes} process(es) of {circumstances['threads']} thread(s), {circumstances['hardware']}, "
            f"{circumstances['precision']}; the result will be {result}"
        )

        started, clock = now(), time.monotonic()
        batches = [images[start : start + args.batch_size] for start in range(0, len(images), args.batch_size)]
        measured = measure(classifier, autocast, dist_util.share_of(shard.units(batches)), inputs, args)
        facts = {"started": started, "ended": now(), "seconds": round(time.monotonic() - clock, 3)}
        facts |= {"processes": processes, **circumstances, "arguments": vars(args)}
        record = {"settings": settings, "images": {"chosen": chosen}, "last_run": facts}
        return dist_util.on_main(
            finish, result, classifier, inputs, dist_util.gather_objects(tuple(measured)), record, parts, locks
        )


def is_finished(
    result: str, settings: dict[str, Any], shard: Shard, inputs: Inputs, images: list[LabelledImage]
) -> bool:
    """Whether the result is there, of the same settings and images. Raises UserError if it is of others."""
    from guided_diffusion.files import remove_scratch_of
    from guided_diffusion.parts import compare_with_result, finished_record

    if finished_record(result, settings, shard):
        compare_with_result({"images": inputs}, {"images": paths_of(images)}, result)
        return True
    if shard.count == 1:
        remove_scratch_of(result)
    return False


def paths_of(images: list[LabelledImage]) -> list[str]:
    """Paths of the images, relative to the folder."""
    return [image.path for image in images]


def find_images(args: argparse.Namespace) -> tuple[list[LabelledImage], list[str]]:
    """The images that the flags choose, and the classes of all that are there. Raises UserError."""
    from guided_diffusion import logger
    from guided_diffusion.classifier_results import class_names_of
    from guided_diffusion.image_datasets import label_where_known, list_images

    images, why_unknown = label_where_known(args.data_dir, list_images(args.data_dir), args.labels_file, "text")
    if why_unknown:
        logger.warn(f"{why_unknown}: the accuracy will not be known (--labels_file)")
    if len(images) < args.num_samples:
        logger.warn(f"{args.num_samples} images asked for (--num_samples), {len(images)} found in {args.data_dir}")
    return spread(images, args.num_samples), class_names_of(images)


def spread(images: list[LabelledImage], num_samples: int) -> list[LabelledImage]:
    """`num_samples` images spread evenly over the list, so that all classes have a share; all where there are fewer."""
    n, m = len(images), min(len(images), num_samples)
    return [images[i * n // m] for i in range(m)]


class Measured(NamedTuple):
    """What a process, or a shard, found out about its images.

    Attributes:
        moments: moments of every layer, by name.
        ranks: per image that could be read, the number of classes with a larger logit than its own; -1 if its class is
            not known.
        unreadable: images that could not be read: path -> why.
        entries: sizes and digests of the others.
    """

    moments: dict[str, Moments]
    ranks: np.ndarray
    unreadable: dict[str, str]
    entries: Entries


def measure(
    classifier: Classifier,
    autocast: AbstractContextManager,
    batches: Sequence[list[LabelledImage]],
    inputs: Inputs,
    args: argparse.Namespace,
) -> Measured:
    """Pass batches through the classifier. Raises ResultError if it gives NaN or infinity."""
    import torch

    from guided_diffusion import dist_util, logger
    from guided_diffusion.activations import ActivationMoments
    from guided_diffusion.classifier_results import labels_of
    from guided_diffusion.memory import enough_memory
    from guided_diffusion.parts import check_finite
    from guided_diffusion.pipeline import read_ahead
    from guided_diffusion.transfer import download, upload

    found, unreadable, read = [], {}, []
    processes, count = dist_util.get_world_size(), sum(map(len, batches))
    described = "measuring" if processes == 1 else f"measuring (process 1 of {processes})"
    bar = logger.progress_bar(count, described, "image")
    with torch.inference_mode(), ActivationMoments(classifier) as watch, bar:
        for batch, pictures in read_ahead(
            batches, lambda batch: readers(classifier, batch, inputs, args), args.num_workers
        ):
            both = list(zip(batch, pictures, strict=True))
            unreadable |= {image.path: str(picture) for image, picture in both if isinstance(picture, Exception)}
            fine = [(image, picture) for image, picture in both if not isinstance(picture, Exception)]
            if fine:
                x = upload(torch.stack([picture for _, picture in fine]), dist_util.dev())  # (B, 3, S, S)
                with autocast, enough_memory(len(x)):
                    logits = classifier.model(x)  # (B, classes)
                found.append((download(logits.float()), labels_of(image for image, _ in fine)))
                read += [image.path for image, _ in fine]
            bar.update(len(batch))
            dist_util.check_peers()
    ranks = [np.empty(0, np.int64)]
    for wait, labels in found:
        (logits,) = wait()
        check_finite({"a logit": logits}, classifier.name)
        ranks.append(ranks_of(logits, labels))
    for layer, moments in watch.moments.items():
        check_finite({f"the {name}": values for name, values in moments.as_arrays().items()}, f"layer {layer}")
    return Measured(watch.moments, np.concatenate(ranks), unreadable, inputs.entries(read))


def ranks_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The place of each image's class in the order of its logits, from 0: (B,) of (B, classes); -1 for label -1."""
    from guided_diffusion.retention import class_ranks

    return np.where(labels >= 0, class_ranks(logits, labels.clip(min=0)), -1)


def finish(
    result: str,
    classifier: Classifier,
    inputs: Inputs,
    reports: list[tuple],
    record: dict[str, Any],
    parts: Parts | None,
    locks: Locks,
) -> int:
    """Write the result of all processes; of all shards once the last one is done. Returns the exit status."""
    from guided_diffusion import logger

    locks.check()
    total = merged([Measured(*report) for report in reports])
    if parts:
        if len(total.ranks) or total.unreadable:
            write_shard(parts, total)
        with parts.update():
            if not parts.present() and bf.exists(result):
                return 0  # another shard has just put everything together
            if missing := parts.missing(parts.shard.count):
                logger.info(f"{parts.shard} is done; shards that are missing: {', '.join(map(str, missing))}")
                return report_unreadable(total.unreadable, record["images"]["chosen"])
            total = merged([read_shard(parts, index) for index in range(parts.shard.count)])
            return write(result, classifier, inputs, total, {**record, "num_shards": parts.shard.count}, parts)
    return write(result, classifier, inputs, total, record, None)


def write(
    result: str,
    classifier: Classifier,
    inputs: Inputs,
    total: Measured,
    record: dict[str, Any],
    parts: Parts | None,
) -> int:
    """Write the result, and say what it is. Returns the exit status."""
    from guided_diffusion import logger
    from guided_diffusion.classifier_results import write_result
    from guided_diffusion.inputs import inputs_of
    from guided_diffusion.parts import write_inputs

    arrays = as_arrays(classifier, total)
    record = {**record, "finished": not total.unreadable}
    record["images"] = {**record["images"], "unreadable": total.unreadable}
    inputs.known |= total.entries
    write_inputs(inputs_of(result), {"images": inputs}, {"images": list(total.entries)})
    write_result(result, arrays, record)
    if parts and not total.unreadable:
        parts.remove()
    known = "its accuracy is not known: the images do not name its classes"
    if "top1" in arrays:
        known = f"accuracy {arrays['top1']:.2%} (top 1), {arrays['top5']:.2%} (top 5)"
    logger.info(f"{classifier.name} on {arrays['num_images']} images: {known}. Statistics are in {result}")
    return report_unreadable(total.unreadable, record["images"]["chosen"])


def report_unreadable(unreadable: dict[str, str], chosen: int) -> int:
    """Name the images, of those chosen, that could not be read. Returns the exit status."""
    from guided_diffusion import logger

    for why in unreadable.values():
        logger.warn(why)
    if unreadable:
        logger.error(f"{len(unreadable)} of {chosen} images could not be read: the statistics are without them")
    return 1 if unreadable else 0


def shard_is_done(parts: Parts) -> bool:
    """Whether this shard has measured all of its images."""
    index = parts.shard.index
    return index in parts.present() and not parts.notes(index)["unreadable"]["images"]


def merged(reports: list[Measured]) -> Measured:
    """What several processes, or shards, found out together."""
    moments: dict[str, Moments] = {}
    for report in reports:
        for layer, of_layer in report.moments.items():
            if layer in moments:
                moments[layer].merge(of_layer)
            else:
                moments[layer] = of_layer
    unreadable, entries = ({key: value for r in reports for key, value in r[i].items()} for i in (2, 3))
    return Measured(moments, np.concatenate([report.ranks for report in reports]), unreadable, entries)


def write_shard(parts: Parts, measured: Measured) -> None:
    """Leave what a shard found out for the shard that puts everything together."""
    states = {f"{name}/{layer}": array for layer, m in measured.moments.items() for name, array in m.state().items()}
    notes = {"inputs": {"images": measured.entries}, "unreadable": {"images": measured.unreadable}}
    parts.write(parts.shard.index, notes, ranks=measured.ranks, **states)


def read_shard(parts: Parts, index: int) -> Measured:
    """What `write_shard` wrote."""
    from guided_diffusion.activations import Moments
    from guided_diffusion.inputs import as_entries

    arrays, notes = parts.read(index), parts.notes(index)
    ranks = arrays.pop("ranks")
    states: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, array in arrays.items():
        name, _, layer = key.partition("/")
        states[layer][name] = array
    moments = {layer: Moments.from_state(state) for layer, state in states.items()}
    return Measured(moments, ranks, notes["unreadable"]["images"], as_entries(notes["inputs"])["images"])


def as_arrays(classifier: Classifier, measured: Measured) -> dict[str, Any]:
    """The arrays of the file; top1 and top5 only if the classes of all images are known.

    Raises UserError if no image could be read.
    """
    ranks = measured.ranks
    if not len(ranks):
        raise UserError("none of the images could be read: there is nothing to write (--data_dir)")
    arrays: dict[str, Any] = {"layers": np.array([layer.name for layer in classifier.layers])}
    for layer in classifier.layers:
        moments = measured.moments[layer.name].as_arrays()
        arrays |= {f"{moment}/{layer.name}": values for moment, values in moments.items()}
    arrays["num_images"] = np.int64(len(ranks))
    if (ranks >= 0).all():
        arrays["top1"], arrays["top5"] = [np.float64((ranks < n).mean()) for n in (1, 5)]
    return arrays


def readers(
    classifier: Classifier, images: list[LabelledImage], inputs: Inputs, args: argparse.Namespace
) -> list[partial]:
    """The calls that read images for the classifier, one each; they return the exception for an unreadable one."""
    from guided_diffusion.classifier_results import readable_or_error
    from guided_diffusion.image_datasets import read_image

    def read(path: str) -> torch.Tensor:
        return classifier.preprocess(read_image(f"{args.data_dir}/{path}", args.image_size, inputs.note(path)))

    return [partial(readable_or_error, read, image.path) for image in images]


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    from guided_diffusion.classifier_results import add_flags

    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER [flags]", description=__doc__)
    images = parser.add_argument_group("the images")
    add = images.add_argument
    add("--data_dir", required=True, metavar="FOLDER", help="the images; subfolders are looked through")
    add(
        "--num_samples",
        default=10000,
        type=whole_number(1),
        metavar="INT",
        help="images to take, spread evenly over the sorted list (default: %(default)s)",
    )
    add(
        "--labels_file",
        metavar="FILE",
        help=HELP["labels_file"],
    )
    add_class_order(images)
    add(
        "--image_size",
        default=256,
        type=whole_number(1),
        metavar="INT",
        help="side in pixels to which images are cut before the classifier's own preprocessing (default: %(default)s)",
    )
    add_shard_flags(add_flags(parser, output="results", batch_size=""))
    return parser


if __name__ == "__main__":
    run(main)
