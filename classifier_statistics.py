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
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from guided_diffusion.command_line import ArgumentParser, run, whole_number
from guided_diffusion.errors import UserError

if TYPE_CHECKING:
    import torch

    from guided_diffusion.activations import Moments
    from guided_diffusion.image_datasets import LabelledImage
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
        write_result,
    )
    from guided_diffusion.files import remove_scratch_of
    from guided_diffusion.parts import finished_record
    from guided_diffusion.run_record import now

    dist_util.setup_dist(args.device)
    logger.configure()
    images, class_names = dist_util.on_main(find_images, args)
    classifier, autocast, circumstances = set_up(args)
    images = with_labels_of(classifier, images, class_names)
    settings = classifier_settings(args, classifier, circumstances["precision"])
    settings["the number of images (--num_samples)"] = len(images)
    settings["the list of images (--data_dir, --labels_file)"] = images_digest(images)
    result = statistics_file(args.output or default_folder(classifier.name), classifier.name)
    if dist_util.on_main(finished_record, result, settings):
        logger.info(f"{result} is there already, made with the same settings: nothing to do")
        return 0
    dist_util.on_main(remove_scratch_of, result)
    processes = dist_util.get_world_size()
    logger.info(f"{len(images)} images from {args.data_dir}, {len(classifier.layers)} layers of {classifier.name}")
    logger.info(
        f"{processes} process(es) of {circumstances['threads']} thread(s), {circumstances['hardware']}, "
        f"{circumstances['precision']}; the result will be {result}"
    )

    started, clock = now(), time.monotonic()
    batches = [images[start : start + args.batch_size] for start in range(0, len(images), args.batch_size)]
    measured = measure(classifier, autocast, dist_util.share_of(batches), args)
    reports = dist_util.gather_objects(measured)
    unreadable = {path: why for _, _, bad in reports for path, why in bad.items()}
    facts = {"started": started, "ended": now(), "seconds": round(time.monotonic() - clock, 3), "processes": processes}
    record = {
        "finished": not unreadable,
        "settings": settings,
        "images": {"chosen": len(images), "unreadable": unreadable},
        "last_run": {**facts, **circumstances, "arguments": vars(args)},
    }
    arrays = dist_util.on_main(put_together, classifier, [(moments, ranks) for moments, ranks, _ in reports])
    dist_util.on_main(write_result, result, arrays, record)
    known = "its accuracy is not known: the images do not name its classes"
    if not np.isnan(arrays["top1"]):
        known = f"accuracy {arrays['top1']:.2%} (top 1), {arrays['top5']:.2%} (top 5)"
    logger.info(f"{classifier.name} on {arrays['num_images']} images: {known}. Statistics are in {result}")
    for why in unreadable.values():
        logger.warn(why)
    if unreadable and dist_util.is_main():
        logger.error(f"{len(unreadable)} of {len(images)} images could not be read: the statistics are without them")
    return 1 if unreadable else 0


def find_images(args: argparse.Namespace) -> tuple[list[LabelledImage], list[str]]:
    """The images that the flags choose, and the classes of all that are there. Raises UserError."""
    from guided_diffusion import logger
    from guided_diffusion.classifier_results import class_names_of
    from guided_diffusion.image_datasets import label_images, list_images

    images = label_images(args.data_dir, list_images(args.data_dir), args.labels_file)
    if len(images) < args.num_samples:
        logger.warn(f"{args.num_samples} images asked for (--num_samples), {len(images)} found in {args.data_dir}")
    return spread(images, args.num_samples), class_names_of(images)


def spread(images: list[LabelledImage], num_samples: int) -> list[LabelledImage]:
    """`num_samples` images spread evenly over the list, so that all classes have a share; all where there are fewer."""
    n, m = len(images), min(len(images), num_samples)
    return [images[i * n // m] for i in range(m)]


def measure(
    classifier: Classifier,
    autocast: AbstractContextManager,
    batches: list[list[LabelledImage]],
    args: argparse.Namespace,
) -> tuple[dict[str, Moments], np.ndarray, dict[str, str]]:
    """Pass batches through the classifier.

    Returns:
        moments: of every layer, by name.
        ranks: per image that could be read, the number of classes with a larger logit than its own; -1 where its class
            is not known.
        unreadable: the images that could not be read: path -> why.
    """
    import torch

    from guided_diffusion import dist_util, logger
    from guided_diffusion.activations import ActivationMoments
    from guided_diffusion.classifier_results import labels_of
    from guided_diffusion.inference import enough_memory
    from guided_diffusion.pipeline import read_ahead
    from guided_diffusion.transfer import download, upload

    found, unreadable = [], {}
    processes, count = dist_util.get_world_size(), sum(map(len, batches))
    described = "measuring" if processes == 1 else f"measuring (process 1 of {processes})"
    bar = logger.progress_bar(count, described, "image")
    with torch.inference_mode(), ActivationMoments(classifier) as watch, bar:
        for batch, pictures in read_ahead(batches, lambda batch: readers(classifier, batch, args), args.num_workers):
            both = list(zip(batch, pictures, strict=True))
            unreadable |= {image.path: str(picture) for image, picture in both if isinstance(picture, Exception)}
            fine = [(image, picture) for image, picture in both if not isinstance(picture, Exception)]
            if fine:
                x = upload(torch.stack([picture for _, picture in fine]), dist_util.dev())  # (B, 3, S, S)
                with autocast, enough_memory(len(x)):
                    logits = classifier.model(x)  # (B, classes)
                found.append((download(logits.float()), labels_of(image for image, _ in fine)))
            bar.update(len(batch))
            dist_util.check_peers()
    ranks = [np.empty(0, np.int64), *(ranks_of(*wait(), labels) for wait, labels in found)]
    return watch.moments, np.concatenate(ranks), unreadable


def ranks_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The place of each image's class in the order of its logits, from 0: (B,) of (B, classes); -1 for label -1."""
    from guided_diffusion.retention import class_ranks

    return np.where(labels >= 0, class_ranks(logits, labels.clip(min=0)), -1)


def put_together(classifier: Classifier, reports: list[tuple[dict[str, Moments], np.ndarray]]) -> dict[str, Any]:
    """The arrays of the file, from what every process measured. Raises UserError where no image could be read."""
    ranks = np.concatenate([ranks for _, ranks in reports])
    if not len(ranks):
        raise UserError("none of the images could be read: there is nothing to write (--data_dir)")
    known = (ranks >= 0).all()
    arrays: dict[str, Any] = {"layers": np.array([layer.name for layer in classifier.layers])}
    for layer in classifier.layers:
        total, *others = [moments[layer.name] for moments, _ in reports if layer.name in moments]
        for other in others:
            total.merge(other)
        arrays |= {f"{moment}/{layer.name}": values for moment, values in total.as_arrays().items()}
    arrays["num_images"] = np.int64(len(ranks))
    arrays["top1"], arrays["top5"] = [np.float64((ranks < n).mean() if known else np.nan) for n in (1, 5)]
    return arrays


def readers(classifier: Classifier, images: list[LabelledImage], args: argparse.Namespace) -> list[partial]:
    """The calls that read images for the classifier, one each; they return the exception for an unreadable one."""
    from guided_diffusion.classifier_results import readable_or_error
    from guided_diffusion.image_datasets import read_image

    def read(path: str) -> torch.Tensor:
        return classifier.preprocess(read_image(f"{args.data_dir}/{path}", args.image_size))

    return [partial(readable_or_error, read, image.path) for image in images]


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    from guided_diffusion.classifier_results import add_flags

    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER [flags]", description=__doc__)
    add = parser.add_argument_group("the images").add_argument
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
        help="classes of the images where names do not tell: LOC_val_solution.csv, a wnid per line, or an "
        "ILSVRC2012_ID per line",
    )
    add(
        "--image_size",
        default=256,
        type=whole_number(1),
        metavar="INT",
        help="side in pixels to which images are cut before the classifier's own preprocessing (default: %(default)s)",
    )
    add_flags(parser, output="results", batch_size="")
    return parser


if __name__ == "__main__":
    run(main)
