"""Measure how well a diffusion model predicts images: the variational bound of their likelihood, in bits per dimension.

Writes vb_terms.npz, the terms of the bound, mse_terms.npz and xstart_mse_terms.npz, the squared errors of the predicted
noise and of the predicted image: each an array arr_0, the means over the images, from the last time step to the first.
And image_nll.npz, with the names of the images and, for each, total_bpd and its part prior_bpd, which no model changes.

The images are the first of the folder, by name. The noise of an image depends on the seed and its path alone. A run
that was ended goes on where it was when it is started again with the same flags. Under mpiexec, torchrun or srun, the
processes share the images out; the result is the same for any number of them (on CPUs, with the same --num_threads).

  python scripts/image_nll.py --data_dir datasets/ILSVRC2012/validation --num_samples 1000 --batch_size 16 \\
      --model_path models/64x64_diffusion.pt "${MODEL_FLAGS[@]}"
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion.command_line import ArgumentParser, run, whole_number

# isort: split
import numpy as np

from guided_diffusion.classes import add_class_order, read_classes
from guided_diffusion.errors import UserError
from guided_diffusion.files import folder_name
from guided_diffusion.script_util import (
    NUM_CLASSES,
    add_flags,
    args_to_dict,
    diffusion_defaults,
    diffusion_from_flags,
    model_and_diffusion_defaults,
    model_defaults,
)

if TYPE_CHECKING:
    from tqdm import tqdm

    from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Model
    from guided_diffusion.image_datasets import LabelledImage, UnreadableImage
    from guided_diffusion.inputs import Inputs
    from guided_diffusion.locks import Locks
    from guided_diffusion.parts import Parts

TERMS = ("vb", "mse", "xstart_mse")


def main(argv: list[str] | None = None) -> int:
    """Measure. Returns 0, or 1 where images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)

    # Imported here and not above, so that --help and misspelt flags are answered without waiting for torch.
    from guided_diffusion import dist_util, logger
    from guided_diffusion.checkpoints import load_model
    from guided_diffusion.inference import prepare
    from guided_diffusion.inputs import Inputs
    from guided_diffusion.locks import hold
    from guided_diffusion.parts import (
        Parts,
        compare_with_parts,
        compare_with_result,
        finished_record,
        lock_of,
        remove_parts,
        settings_of,
    )
    from guided_diffusion.run_record import now, weights_digest

    dist_util.setup_dist(args.device)
    logger.make_dir()
    flags = args_to_dict(args, model_and_diffusion_defaults())
    diffusion = dist_util.on_every_rank(diffusion_from_flags, flags)
    images = dist_util.on_main(find_images, args)
    model = dist_util.on_every_rank(load_model, args.model_path, flags, args.seed)
    listed = "\n".join(f"{image.path}\t{image.label if args.class_cond else ''}" for image in images)
    settings = settings_of(
        args,
        model_path=dist_util.on_main(weights_digest, model),
        data_dir=hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest(),
    )
    circumstances = prepare(model, args.use_fp16, args.num_threads, batch_size=min(args.batch_size, len(images)))

    output = logger.choose_dir(args.output, f"results/image_nll_{folder_name(args.data_dir)}")
    result, folder = f"{output}/image_nll.npz", f"{output}/image_nll_parts"
    inputs = {"images": Inputs(args.data_dir, "--data_dir")}
    paths = {"images": [image.path for image in images]}
    with hold({lock_of(result): result}) as locks:
        if dist_util.on_main(finished_record, result, settings):
            dist_util.on_main(compare_with_result, inputs, paths, result)
            dist_util.on_main(remove_parts, folder)  # of a run that was killed just before
            logger.info(f"{result} is there already, made with the same settings: nothing to do")
            dist_util.on_main(report, result)
            return 0
        parts = Parts(folder, settings, circumstances)
        dist_util.on_main(compare_with_parts, inputs, paths, parts)
        batches = [images[start : start + args.batch_size] for start in range(0, len(images), args.batch_size)]
        to_do = dist_util.on_main(unfinished, parts, parts.done(), len(batches))
        processes = dist_util.get_world_size()
        logger.info(
            f"{len(images)} images from {args.data_dir}: {len(to_do)} of {len(batches)} batches are to be measured"
        )
        logger.info(
            f"{processes} process(es) of {circumstances['threads']} thread(s), {circumstances['hardware']}, "
            f"{circumstances['precision']}; results in {output}"
        )

        started, clock = now(), time.monotonic()
        mine = {index: batches[index] for index in dist_util.share_of(to_do)}
        measure(model, diffusion, mine, parts, dist_util.broadcast_object(inputs["images"]), locks, args)
        dist_util.barrier()
        facts = {"started": started, "ended": now(), "seconds": round(time.monotonic() - clock, 3)}
        facts |= {"processes": processes, **circumstances, "arguments": vars(args)}
        return dist_util.on_main(finish, output, parts, batches, settings, facts, inputs, paths, locks)


def find_images(args: argparse.Namespace) -> list[LabelledImage]:
    """The first images of the folder, with their classes where the model wants them. Raises UserError."""
    from guided_diffusion import logger
    from guided_diffusion.image_datasets import LabelledImage, label_images, list_images

    paths = list_images(args.data_dir)
    if len(paths) < args.num_samples:
        logger.warn(f"{args.num_samples} images asked for (--num_samples), {len(paths)} found in {args.data_dir}")
    if not args.class_cond:
        return [LabelledImage(path, None, "") for path in paths[: args.num_samples]]
    recorded = read_classes(args.model_path)
    images = label_images(args.data_dir, paths, args.labels_file, args.class_order, recorded)
    if any(image.label is None for image in images):
        raise UserError(f"--class_cond True needs the classes of the images, and nothing in {args.data_dir} tells them")
    if (most := max(image.label for image in images)) >= NUM_CLASSES:
        raise UserError(
            f"--class_cond True is for {NUM_CLASSES} classes, and {args.data_dir} has {most + 1} (--data_dir)"
        )
    return images[: args.num_samples]


def unfinished(parts: Parts, done: set[int], count: int) -> list[int]:
    """The batches of which no part is there, or one in which images are missing since they could not be read."""
    return [index for index in range(count) if index not in done or not parts.read(index)["readable"].all()]


def measure(
    model: Model,
    diffusion: GaussianDiffusion,
    batches: Mapping[int, list[LabelledImage]],
    parts: Parts,
    inputs: Inputs,
    locks: Locks,
    args: argparse.Namespace,
) -> None:
    """Measure batches and write their parts, which note the images that could not be read."""
    from guided_diffusion import dist_util, logger
    from guided_diffusion.image_datasets import UnreadableImage
    from guided_diffusion.parts import check_finite
    from guided_diffusion.pipeline import read_ahead

    processes = dist_util.get_world_size()
    described = "measuring" if processes == 1 else f"measuring (process 1 of {processes})"
    blank = np.zeros((args.image_size, args.image_size, 3), np.uint8)
    with logger.progress_bar(len(batches) * diffusion.num_timesteps, described, "step") as bar:
        for index, pictures in read_ahead(
            batches, lambda index: readers(batches[index], inputs, args), args.num_workers
        ):
            locks.check()
            images = batches[index]
            # An unreadable picture is left blank in its place: the others keep theirs, and so their numbers.
            readable = np.array([not isinstance(picture, UnreadableImage) for picture in pictures])
            pixels = np.stack([p if fine else blank for p, fine in zip(pictures, readable, strict=True)])
            measured = bits(model, diffusion, images, pixels, args, bar)
            check_finite(measured, "the images")
            both = list(zip(images, pictures, readable, strict=True))
            notes = {
                "inputs": {"images": inputs.entries(image.path for image, _, fine in both if fine)},
                "unreadable": {"images": {image.path: str(picture) for image, picture, fine in both if not fine}},
            }
            parts.write(index, notes, readable=readable, **measured)


def bits(
    model: Model,
    diffusion: GaussianDiffusion,
    images: list[LabelledImage],
    pixels: np.ndarray,
    args: argparse.Namespace,
    bar: tqdm,
) -> dict[str, np.ndarray]:
    """What `calc_bpd_loop` gives for a batch of images, by name; `pixels` is (B, H, W, 3) of uint8.

    Raises UserError where the GPU's memory does not suffice.
    """
    import torch

    from guided_diffusion import dist_util
    from guided_diffusion.forward_backward import from_pixels
    from guided_diffusion.memory import enough_memory
    from guided_diffusion.noise import NoiseStreams

    device = dist_util.dev()

    def counted(*inputs: Any, **labels: Any) -> torch.Tensor:
        answer = model(*inputs, **labels)
        bar.update()
        dist_util.check_peers()
        return answer

    labels = {"y": torch.tensor([image.label for image in images], device=device)} if args.class_cond else {}
    with enough_memory(len(images)):
        out = diffusion.calc_bpd_loop(
            counted,
            from_pixels(pixels).to(device),
            clip_denoised=args.clip_denoised,
            model_kwargs=labels,
            generator=NoiseStreams(args.seed, [image.path for image in images], 0, device),
        )
    return {name: values.cpu().numpy() for name, values in out.items()}


def readers(
    images: list[LabelledImage], inputs: Inputs, args: argparse.Namespace
) -> list[Callable[[], np.ndarray | UnreadableImage]]:
    """The calls that read images, one each; they return the exception for one that cannot be read."""
    from guided_diffusion.image_datasets import UnreadableImage, read_image

    def read(path: str) -> np.ndarray | UnreadableImage:
        try:
            return read_image(f"{args.data_dir}/{path}", args.image_size, inputs.note(path))
        except UnreadableImage as error:
            inputs.forget(path)
            return error

    return [partial(read, image.path) for image in images]


def finish(
    output: str,
    parts: Parts,
    batches: list[list[LabelledImage]],
    settings: dict[str, Any],
    facts: dict[str, Any],
    inputs: dict[str, Inputs],
    paths: dict[str, list[str]],
    locks: Locks,
) -> int:
    """Put the parts together. image_nll.npz comes last: where it is, all is. Parts stay if an image is missing.

    Returns the exit status.
    """
    from guided_diffusion import logger
    from guided_diffusion.files import whole_file, write_json
    from guided_diffusion.inputs import as_entries, inputs_of
    from guided_diffusion.parts import plain_write_errors, record_of, write_inputs

    names: list[str] = []
    unreadable: dict[str, str] = {}
    bits_of_images: dict[str, list[np.ndarray]] = {"total_bpd": [], "prior_bpd": []}
    sums = dict.fromkeys(TERMS, 0.0)
    for index, batch in enumerate(batches):
        part, notes = parts.read(index), parts.notes(index)
        inputs["images"].known |= as_entries(notes.get("inputs", {})).get("images", {})
        unreadable |= notes.get("unreadable", {}).get("images", {})
        readable = part["readable"]
        names += [image.path for image, fine in zip(batch, readable, strict=True) if fine]
        for name, pieces in bits_of_images.items():
            pieces.append(part[name][readable])
        for name in TERMS:
            sums[name] = sums[name] + part[name][readable].sum(axis=0, dtype=np.float64)  # (N,)
    if not names:
        raise UserError("none of the images could be read: there is nothing to write (--data_dir)")
    record = {
        "finished": not unreadable,
        "settings": settings,
        "images": {"chosen": sum(map(len, batches)), "unreadable": unreadable},
        "last_run": facts,
    }
    result = f"{output}/image_nll.npz"
    locks.check()
    write_inputs(inputs_of(result), inputs, paths)
    with plain_write_errors():
        for name in TERMS:
            with whole_file(f"{output}/{name}_terms.npz") as f:
                np.savez(f, sums[name] / len(names))
        write_json(record_of(result), record)
        with whole_file(result) as f:
            per_image = {name: np.concatenate(pieces) for name, pieces in bits_of_images.items()}
            np.savez(f, names=np.array(names), **per_image)
        if record["finished"]:
            parts.remove()
    report(result)
    for why in unreadable.values():
        logger.warn(why)
    if unreadable:
        logger.error(
            f"{len(unreadable)} of {record['images']['chosen']} images could not be read: the numbers are without them"
        )
    return 1 if unreadable else 0


def report(result: str) -> None:
    """Say what image_nll.npz holds."""
    import blobfile as bf

    from guided_diffusion import logger
    from guided_diffusion.parts import check_finite

    with bf.BlobFile(result, "rb") as f, np.load(f, allow_pickle=False) as measured:
        bits_per_dimension = {name: measured[name].astype(np.float64) for name in ("total_bpd", "prior_bpd")}
    check_finite(bits_per_dimension, result)
    total, prior = bits_per_dimension.values()
    error = f" +- {total.std(ddof=1) / len(total) ** 0.5:.4f} (standard error)" if len(total) > 1 else ""
    logger.info(
        f"{total.mean():.4f}{error} bits per dimension over {len(total)} image(s), "
        f"{prior.mean():.2g} of them of the prior"
    )


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER --model_path FILE [flags]", description=__doc__)
    measuring = parser.add_argument_group("measuring")
    add_flags(
        measuring,
        {
            "data_dir": "",
            "model_path": "",
            "clip_denoised": True,
            "num_samples": 1000,
            "batch_size": 1,
            "labels_file": "",
            "output": "",
            "seed": 0,
            "num_threads": 0,
        },
    )
    add_class_order(measuring)
    measuring.add_argument(
        "--num_workers",
        default=4,
        type=whole_number(0),
        metavar="INT",
        help="threads per process that read images ahead (default: %(default)s)",
    )
    add_flags(parser.add_argument_group("the model, as it was trained"), model_defaults())
    add_flags(parser.add_argument_group("the diffusion"), diffusion_defaults())
    return parser


if __name__ == "__main__":
    run(main)
