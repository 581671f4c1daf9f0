"""Run the whole experiment in minutes on the random hierarchy model, whose hierarchy is known exactly.

Generates images from a small grammar and runs the same scripts as for ImageNet, with a small U-Net and ConvNeXt:

  forward_backward_dataset_sample.py, classifier_statistics.py, evaluate_classifier.py, scripts/plot_figures.py

The optimal denoiser of these images is known, and with it the exact probability that each symbol survives, from the
class down to the leaves. It is plotted with the networks' results. See random_hierarchy_model/README.md.

  python scripts/demo.py

With several samples of each image, it also plots which leaves change together, in the U-Net's and in exact samples:

  python scripts/demo.py --num_trajectories 6
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion import dist_util, logger
from guided_diffusion.changes.figures import Curves, figures_of
from guided_diffusion.changes.statistics import TimeChanges, changes_at, measure_chi
from guided_diffusion.classifier.figures import Rows, check_packages, write_figures
from guided_diffusion.classifier.pairs import read_sample
from guided_diffusion.classifier.results import logits_file, name_in_files, read_arrays
from guided_diffusion.command_line.flags import POSITIVE, Flag, add_flags, flag, whole_number
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.stopping import run
from guided_diffusion.correlations import TablePairs
from guided_diffusion.errors import UserError
from guided_diffusion.forward_backward import (
    NoiseStreams,
    SampleFolder,
    check_times,
    from_pixels,
    noise_seed,
    noised_image,
    to_pixels,
)
from guided_diffusion.images.folder import choose_images, label_images, list_images
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.runs.pipeline import encode
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.system.files import write_whole
from guided_diffusion.system.other_scripts import REPOSITORY, as_flags, find_mpiexec, load_script
from random_hierarchy_model import ExactDenoiser, TreeImages
from random_hierarchy_model.changes import changes, sample_leaves, tree_distance
from random_hierarchy_model.curves import fraction_kept, probability_kept
from random_hierarchy_model.demo import CLASSIFIER, CLASSIFIER_FILE, GRAMMAR_FLAGS, MODEL_FLAGS, UNET_FILE
from random_hierarchy_model.demo_figures import CONVNEXT, EXACT, LOOP, UNET, draw
from random_hierarchy_model.training import images_from_flags

import numpy as np
import torch

TIMES = [50, 75, 88, 100, 113, 125, 138, 150, 200]  # for N = 250
TIMES_OF_CHANGES = [88, 100, 113, 125, 138]  # around the largest susceptibility
STATISTICS_IMAGES = 512  # images for the classifier's statistics, including those that are noised


def main(argv: list[str] | None = None) -> int:
    """Run the experiment. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    check_packages()
    launch = launcher(args.processes)
    if args.num_images % (classes := GRAMMAR_FLAGS["num_symbols"]):
        raise UserError(f"--num_images {args.num_images}: expected a multiple of the {classes} classes")

    dist_util.use_device(args.device)  # stops if it does not exist, before images are written
    diffusion = create_gaussian_diffusion(timestep_respacing=args.timestep_respacing)
    n, usual = diffusion.num_timesteps, TIMES if args.num_trajectories == 1 else TIMES_OF_CHANGES
    args.time_series = check_times(args.time_series or [round(k * n / 250) for k in usual], n, "--time_series")
    logger.make_dir()
    images = images_from_flags(GRAMMAR_FLAGS)
    folders = {name: f"{args.output}/{name}" for name in ("images", "samples", "classifier", "figures")}
    count = max(equal_classes(STATISTICS_IMAGES), args.num_images)
    paths = write_images(images, folders["images"], count, args.seed)
    labelled = label_images(folders["images"], list_images(folders["images"]))
    chosen = [image.path for image in choose_images(labelled, classes, args.num_images // classes)]

    run_scripts(args, folders, len(paths), launch)

    rows = measure(images, diffusion, chosen, folders, args)
    figures = {"retention": lambda: draw(rows)}
    tables = table(rows)
    if args.num_trajectories > 1:
        curves = measure_changes(images, diffusion, chosen, folders["samples"], args)
        figures |= figures_of(curves)
        tables += table_of_changes(curves)
    write_figures(folders["figures"], figures)
    sys.stdout.write(tables)
    logger.info(
        f"figures are in {folders['figures']}: retention (symbols that survive at each level, with the exact answer),\n"
        "similarity_against_time (of the classifier's activations), class_retention, distributions,\n"
        "class_transitions, gallery"
        + ("; class_agreement, class_entropy, change_correlations, susceptibility" if args.num_trajectories > 1 else "")
    )
    return 0


# The images


def equal_classes(count: int) -> int:
    """The largest number of images up to `count` that is a multiple of the classes, at least one of each."""
    classes = GRAMMAR_FLAGS["num_symbols"]
    return max(1, count // classes) * classes


def write_images(images: TreeImages, folder: str, count: int, seed: int) -> list[str]:
    """Write images of the grammar, one folder per class, with equally many images. Returns their sorted paths.

    Existing files are kept: the path contains the seed and the number, which determine the pixels.
    """
    classes, symbols = derivations(images, count, seed)
    pixels = to_pixels(images.render(symbols[0]))
    paths = [f"class_{c:02d}/seed{seed}_{i:05d}.png" for i, c in enumerate(classes)]
    for path, picture in zip(paths, pixels, strict=True):
        if not os.path.exists(f"{folder}/{path}"):
            write_whole(f"{folder}/{path}", encode(picture, "png", 0))
    return sorted(paths)


def derivations(images: TreeImages, count: int, seed: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The classes of images 0 to count - 1, in turn, and their symbols at every level, starting with level 0."""
    classes = np.arange(count) % images.grammar.num_symbols
    return classes, images.grammar.sample(count, seed, classes=classes)


def symbols_of(images: TreeImages, paths: Sequence[str], seed: int) -> list[torch.Tensor]:
    """The symbols of the images that `write_images` wrote to these paths, at every level, starting with level 0."""
    numbers = [int(path.rpartition("_")[2].removesuffix(".png")) for path in paths]
    symbols = derivations(images, max(numbers) + 1, seed)[1]
    return [torch.from_numpy(level[numbers]) for level in symbols]


# The scripts


def run_scripts(args: argparse.Namespace, folders: dict[str, str], total: int, launch: list[str]) -> None:
    """Run the four scripts on a folder of `total` images. Raises UserError if one fails."""
    times = [str(k) for k in args.time_series]
    steps = {"timestep_respacing": args.timestep_respacing}
    classifier = {"classifier_name": CLASSIFIER, "classifier_path": str(CLASSIFIER_FILE)}
    size, threads = {"image_size": MODEL_FLAGS["image_size"]}, {"num_threads": args.num_threads, "device": args.device}
    classes = GRAMMAR_FLAGS["num_symbols"]
    sampling = {"model_path": UNET_FILE, "data_dir": folders["images"], "output": folders["samples"], **MODEL_FLAGS}
    choice = {"num_classes": classes, "num_per_class": args.num_images // classes, "seed": args.seed}
    choice["num_trajectories"] = args.num_trajectories
    choice |= {"batch_size": 64, "image_format": "png", "use_fp16": True}
    results = {"output": folders["classifier"], **classifier, **size, **threads}
    both = {"starting_data_dir": folders["images"], "data_dir": folders["samples"]}
    drawing = {"results": folders["classifier"], "output": folders["figures"], "classifier_name": CLASSIFIER}
    for script, flags, more in (
        ("forward_backward_dataset_sample.py", {**sampling, **choice, **steps, **threads}, ["--step_reverse", *times]),
        ("classifier_statistics.py", {**results, "data_dir": folders["images"], "num_samples": total}, []),
        ("evaluate_classifier.py", {**results, **both, **steps}, ["--time_series", *times]),
        ("scripts/plot_figures.py", {**drawing, **both, **steps}, []),
    ):
        logger.info(f"\n{script}")
        run_script(script, [*as_flags(flags), *more], launch if script != "scripts/plot_figures.py" else [])


def launcher(processes: int) -> list[str]:
    """The command that launches a script in several processes; empty for one. Raises UserError."""
    if processes == 1:
        return []
    if (mpiexec := find_mpiexec()) is None:
        raise UserError(f'--processes {processes} needs mpiexec, which is not installed: pip install -e ".[mpi]"')
    return [mpiexec, "-n", str(processes), sys.executable]


def run_script(script: str, flags: list[str], launch: list[str]) -> None:
    """Run a script in this process, or in new ones with a launcher. Raises UserError if it fails."""
    if launch:
        status = subprocess.run([*launch, str(REPOSITORY / script), *flags], check=False).returncode
    else:
        status = load_script(script).main(flags)
    if status:
        raise UserError(f"{script} failed with status {status}: see its message above")


# The results


def measure(
    images: TreeImages,
    diffusion: SpacedDiffusion,
    paths: Sequence[str],
    folders: dict[str, str],
    args: argparse.Namespace,
) -> Rows:
    """The fraction of symbols that survive at each level and time: the exact probability, and measured in samples."""
    depth = images.grammar.depth
    levels = ["class", *(f"level {level}" for level in range(depth - 1, 0, -1)), "leaves"]
    true = symbols_of(images, paths, args.seed)
    x_start = images.render(true[0])
    exact = ExactDenoiser(images, create_gaussian_diffusion().alphas_cumprod)
    chance = probability_kept(images, x_start, 0.0, true).mean(0)
    size, n = images.image_size, diffusion.num_timesteps

    rows: Rows = []
    bar = logger.progress_bar(sum(args.time_series), "exact denoiser", "step")
    with bar:
        for k in args.time_series:
            noise = NoiseStreams(args.seed, paths, k, "cpu")  # as for the U-Net's samples
            x = noised_image(diffusion, x_start, k, noise.randn(x_start.shape))
            signal = signal_at(diffusion, k)
            back = diffusion.p_sample_loop_forw_back(exact, x.shape, k, noise=x, generator=noise)
            folder = SampleFolder(folders["samples"], k, n, diffusion.original_num_steps, "png")
            samples = read_samples(folder, paths, size)
            name = name_in_files(CLASSIFIER)
            results = read_arrays(
                logits_file(folders["classifier"], name, k, n), ("labels", "logits_sample"), ("trajectories",)
            )
            kept = results["logits_sample"].argmax(axis=1) == results["labels"]
            kept = kept[results.get("trajectories", np.ones(len(kept))) == 1]
            curves = {
                EXACT: probability_kept(images, x, signal, true),
                LOOP: fraction_kept(images, back, true),
                UNET: fraction_kept(images, samples, true),
                CONVNEXT: torch.from_numpy(kept).double()[:, None],
            }
            for curve, kept in curves.items():
                means, errors = kept.mean(0).tolist(), (kept.std(0) / len(kept) ** 0.5).tolist()
                row = {"k": k, "N": n, "k/N": k / n, "curve": curve, "images": len(kept)}
                for level, mean, error, by_chance in zip(levels, means, errors, chance.tolist(), strict=False):
                    rows.append({**row, "level": level, "kept": mean, "error": error, "chance": by_chance})
            bar.update(k)
    return rows


def read_samples(folder: SampleFolder, paths: Sequence[str], size: int, trajectory: int = 1) -> torch.Tensor:
    """The samples of these images, float32 (B, 3, size, size) in [-1, 1]."""
    samples = [read_sample(f"{folder.path}/{folder.sample(path, trajectory)}", size) for path in paths]
    return from_pixels(np.stack(samples))


def measure_changes(
    images: TreeImages,
    diffusion: SpacedDiffusion,
    paths: Sequence[str],
    samples_dir: str,
    args: argparse.Namespace,
) -> Curves:
    """The changes of leaves in the U-Net's samples, and in exact samples from the same noised images."""
    true = symbols_of(images, paths, args.seed)[0]
    x_start, n = images.render(true), diffusion.num_timesteps
    pairs = TablePairs(tree_distance(images.grammar))
    found: dict[str, list[TimeChanges]] = {UNET: [], EXACT: []}
    for k in args.time_series:
        signal = signal_at(diffusion, k)
        folder = SampleFolder(samples_dir, k, n, diffusion.original_num_steps, "png")
        leaves: dict[str, list[torch.Tensor]] = {UNET: [], EXACT: []}
        for j in range(1, args.num_trajectories + 1):
            leaves[UNET].append(images.read_leaves(read_samples(folder, paths, images.image_size, j)))
            noise = NoiseStreams(args.seed, paths, k, "cpu", [j] * len(paths))
            x = noised_image(diffusion, x_start, k, noise.randn(x_start.shape))
            generator = torch.Generator().manual_seed(noise_seed(args.seed, "exact samples", k, j))
            leaves[EXACT].append(sample_leaves(images, x, signal, true, generator))
        for curve, of_curve in leaves.items():
            found[curve].append(changes_at(k, n, changes(torch.stack(of_curve, dim=1), true).numpy(), pairs))
    return found


def signal_at(diffusion: SpacedDiffusion, k: int) -> float:
    """abar of x_k: 1 at k = 0, and 0 at k = N, which is pure noise."""
    return 1.0 if k == 0 else 0.0 if k == diffusion.num_timesteps else float(diffusion.alphas_cumprod[k - 1])


def table_of_changes(curves: Curves) -> str:
    """chi at each time, with 95% intervals; "-" for a number that is undefined, because too little changes."""
    lines = ["  k/N  " + "".join(f"{f'chi, {curve}':>32}" for curve in curves)]
    for of_time in zip(*curves.values(), strict=True):
        found = [[f"{value:.2f}" if np.isfinite(value) else "-" for value in measure_chi(time)] for time in of_time]
        cells = ["{} ({} to {})".format(*chi) if chi[0] != "-" else "-" for chi in found]
        lines.append(f"{of_time[0].time:5.3f}  " + "".join(f"{cell:>32}" for cell in cells))
    return "\n" + "\n".join(lines) + "\n"


def table(rows: Rows) -> str:
    """The fractions that survive, with a line per time and a column per level and curve."""
    short = {EXACT: "exact", LOOP: "loop", UNET: "U-Net", CONVNEXT: "ConvNeXt"}
    kept = {(row["k/N"], row["level"], row["curve"]): row["kept"] for row in rows}
    levels = dict.fromkeys(level for _, level, _ in kept)
    columns = {level: [c for c in short if (rows[0]["k/N"], level, c) in kept] for level in levels}
    groups = {level: "".join(f"  {short[curve]:>5}" for curve in curves) for level, curves in columns.items()}
    lines = [
        "what survives (exact: exact answer; loop: exact denoiser in the loop; ConvNeXt: class of the U-Net's samples)",
        "",
        "     " + "".join(f"  {level:<{len(group) - 2}}" for level, group in groups.items()).rstrip(),
        "  k/N" + "".join(groups.values()),
    ]
    for time in dict.fromkeys(time for time, _, _ in kept):
        numbers = ((kept[time, level, c], max(5, len(short[c]))) for level in levels for c in columns[level])
        lines.append(f"{time:>5.3g}" + "".join(f"  {value:>{width}.2f}" for value, width in numbers))
    return "\n" + "\n".join(lines) + "\n\n"


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s [flags]", description=__doc__)
    classes = GRAMMAR_FLAGS["num_symbols"]
    add_flags(
        parser,
        [
            "output",
            "num_images",
            "num_trajectories",
            "time_series",
            "timestep_respacing",
            "seed",
            "processes",
            "num_threads",
        ],
        output="results/demo",
        num_images=Flag(
            (whole_number(classes), "INT"), f"number of images, a multiple of the {classes} classes", equal_classes(64)
        ),
        time_series=flag(
            "time_series",
            default=[],
            empty=f"{' '.join(map(str, TIMES))}, or {' '.join(map(str, TIMES_OF_CHANGES))} with several trajectories, "
            "scaled by N / 250",
        ),
        timestep_respacing="250",
        processes=Flag(POSITIVE, "number of processes, started with mpiexec", 1),
    )
    return parser


if __name__ == "__main__":
    run(main)
