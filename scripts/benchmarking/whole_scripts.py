"""The scripts as users run them: speed from images to results."""

from __future__ import annotations

import heapq
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guided_diffusion.classifier.networks import open_classifier
from guided_diffusion.forward_backward import SampleFolder, cut_units
from guided_diffusion.images.folder import LabelledImage
from guided_diffusion.images.io import read_image
from guided_diffusion.system.other_scripts import as_flags, find_mpiexec, load_script

import torch
from torchvision.models.feature_extraction import create_feature_extractor

from .bench import Bench, N
from .timing import Clock, Row, ratio, run_and_measure, run_quietly

TIMES = [25 * i for i in range(1, 11)]  # k of the classifier's time series


def loop(bench: Bench) -> list[Row]:
    """forward_backward_dataset_sample.py: reading, noising, denoising, encoding and writing"""
    batch = bench.args.batch_size
    steps = bench.args.steps or (125 if bench.device.type == "cuda" else 2)
    images = 2 * batch + -(-batch // 2)  # two batches and a smaller one
    script = load_script("forward_backward_dataset_sample.py")
    clock = Clock(bench.device)
    script.sample = clock.around(script.sample)
    flags = {"num_classes": 1, "num_per_class": images, "step_reverse": steps, "num_threads": bench.threads}
    flags = sampling_flags(bench, images, "loop") | flags | {"compile": bench.compiles}
    run_quietly(script, as_flags(flags))
    return [
        {
            "images": images,
            "batch": batch,
            "steps": steps,
            "seconds": clock.total,
            "images/s": images / clock.total,
            "denoising steps of an image/s": images * steps / clock.total,
            "share of the time that the network waits": 1 - clock.in_network / clock.total,
        }
    ]


def processes(bench: Bench) -> list[Row]:
    """the same script in several processes: one per GPU, or two of one thread each, against one; then simulated ones"""
    return several_against_one(bench) + simulate_processes()


def several_against_one(bench: Bench) -> list[Row]:
    """Seconds of one process and of several, in turns."""
    on_gpu = bench.device.type == "cuda"
    count = torch.cuda.device_count() if on_gpu else 2
    mpiexec = find_mpiexec()
    if count < 2 or (not on_gpu and len(os.sched_getaffinity(0)) < 2):
        return [{"processes": "not measured: this machine has one GPU or one core"}]
    if mpiexec is None:
        return [{"processes": "not measured: mpiexec is not installed (pip install -e .[mpi])"}]
    images = 2 * count * bench.args.batch_size
    steps = bench.args.steps or (125 if on_gpu else 4)  # enough to amortize the first pass, which is slow
    flags = sampling_flags(bench, images, "processes")
    flags |= {
        "num_classes": 1,
        "num_per_class": images,
        "step_reverse": steps,
        "num_threads": 1,
        "compile": bench.compiles,
    }
    seconds: dict[int, list[float]] = {1: [], count: []}
    for turn in range(bench.args.repeats):
        for number, each in seconds.items():
            output = f"{bench.folder}/processes_{number}_{turn}"
            launch = [mpiexec, "--oversubscribe", "-n", str(number)] if number > 1 else []
            run = run_and_measure("forward_backward_dataset_sample.py", flags | {"output": output}, launch)
            each.append(run.record["seconds"])
    rows = []
    for number, each in seconds.items():
        median = statistics.median(each)
        row = {"processes": number, "images": images, "seconds": median, "images/s": images / median}
        rows.append(row | {"times one process": ratio(seconds[1], each)})
    return rows


def simulate_processes() -> list[Row]:
    """Speedup of several processes if limited by the assignment of batches alone: simulated, not timed.

    For the 10,000 images of the README's command in batches of 32, at k = 125 of 250, and at ten times; with equal
    GPUs, and if one of them is 20% slower. The ideal is all of the work at the sum of the speeds.
    """
    images, rows = [LabelledImage(f"{i}.JPEG", None, "") for i in range(10_000)], []
    for times in ([125], TIMES):
        steps = [unit.step_reverse for k in times for unit in cut_units(images, 32, k)]
        for processes in (2, 8, 64):
            for slowest in (1, 0.8):
                speeds = [1.0] * (processes - 1) + [slowest]
                seconds, ideal = makespan(steps, speeds), sum(steps) / sum(speeds)
                name = f"{processes}, simulated, {len(times)} time{'s' if len(times) > 1 else ''}"
                name += ", one 20% slower" if slowest < 1 else ""
                row = {"processes": name, "images": len(images), "times one process": sum(steps) / seconds}
                rows.append(row | {"share of the time above the ideal": 1 - ideal / seconds})
    return rows


def makespan(amounts: Sequence[float], speeds: Sequence[float], ahead: int = 1) -> float:
    """Seconds until all units are done, if ranks take them as in `runs.resumable.Run.read`.

    Args:
        amounts: work in each unit.
        speeds: work per second of each rank.
        ahead: units that a rank takes when it starts one, in order to read them: 1, or 0 without --num_workers.
    """
    left = deque(sorted(amounts, reverse=True))
    taken: list[deque[float]] = [deque() for _ in speeds]
    idle = [(0.0, rank) for rank in range(len(speeds))]  # since when
    while idle:
        now, rank = heapq.heappop(idle)
        while left and len(taken[rank]) < 1 + ahead:
            taken[rank].append(left.popleft())
        if taken[rank]:
            heapq.heappush(idle, (now + taken[rank].popleft() / speeds[rank], rank))
    return now


def startup(bench: Bench) -> list[Row]:
    """from the command to the first denoising step, with the checkpoint in the file system's cache"""
    batch = bench.args.batch_size
    flags = sampling_flags(bench, batch, "startup")
    flags |= {"num_classes": 1, "num_per_class": batch, "step_reverse": 1, "num_threads": bench.threads}
    runs = [
        run_and_measure("forward_backward_dataset_sample.py", flags | {"output": f"{bench.folder}/startup_{turn}"})
        for turn in range(bench.args.repeats + 1)
    ][1:]
    seconds = [run.seconds - run.record["seconds"] for run in runs]
    return [
        {
            "checkpoint, GB": os.path.getsize(bench.checkpoint()) / 1e9,
            "seconds, least and most": [statistics.median(seconds), min(seconds), max(seconds)],
            "peak memory of the process, GiB": max(run.memory for run in runs) / 2**30,
        }
    ]


def classifier(bench: Bench) -> list[Row]:
    """convnext_base with random weights, on starting images and their samples at ten times k"""
    starts = 64 if bench.device.type == "cuda" else 4
    size = bench.args.image_size
    folder, samples = bench.pictures(starts), bench.folder / "samples"
    pairs = copy_as_samples(folder, samples)
    script = load_script("evaluate_classifier.py")
    clock = Clock(bench.device)
    script.compare = clock.around(script.compare)
    flags = {"classifier_name": "convnext_base", "classifier_path": "untrained", "normalization": "none"}
    flags |= {"starting_data_dir": folder, "data_dir": samples, "timestep_respacing": N, "image_size": size}
    flags |= {"batch_size": 128 if bench.device.type == "cuda" else 22, "num_threads": bench.threads}
    flags["device"] = bench.args.device
    one_by_one = open_classifier("convnext_base", "untrained", image_size=size)
    one_by_one.model.to(bench.device)
    ways = {"one pair after the other, float32": None, "this project, float32": False, "this project, half": True}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(bench.args.repeats + 1):
        for way, use_fp16 in ways.items():
            if use_fp16 is None:
                start = time.perf_counter()
                with torch.inference_mode():
                    compare_pair_by_pair(one_by_one, pairs, size, flags["batch_size"], bench.device)
                seconds[way].append(time.perf_counter() - start)
            else:
                output = f"{bench.folder}/classifier_{turn}_{use_fp16}"
                chosen = flags | {"output": output, "classifier_use_fp16": use_fp16}
                run_quietly(script, [*as_flags(chosen), "--time_series", *map(str, TIMES)])
                seconds[way].append(clock.total)
    first, *_ = seconds = {way: each[1:] for way, each in seconds.items()}
    rows = []
    for way, each in seconds.items():
        median = statistics.median(each)
        row = {"way": way, "starting images": starts, "times": len(TIMES), "seconds": median}
        rows.append(row | {"pairs/s": starts * len(TIMES) / median, "times the first": ratio(seconds[first], each)})
    return rows


def compare_pair_by_pair(classifier, pairs: dict[int, list[tuple[str, str]]], size: int, batch: int, device) -> list:
    """The simplest program: read both images, apply the classifier to both, keep all activations, compare them."""
    activations = create_feature_extractor(classifier.model, [layer.name for layer in classifier.layers])
    results = []
    for both in pairs.values():
        for first in range(0, len(both), batch // 2):
            outputs = []
            for paths in zip(*both[first : first + batch // 2], strict=True):
                x = torch.stack([classifier.preprocess(read_image(path, size)) for path in paths])
                outputs.append(activations(x.to(device)))
            for name in outputs[0]:
                a, b = (output[name].flatten(1).float() for output in outputs)
                cosine = torch.cosine_similarity(a, b)
                distance = (a - b).norm(dim=1)
                normalized = distance / (a.norm(dim=1) * b.norm(dim=1)).sqrt()
                results.append([measure.cpu() for measure in (cosine, distance, normalized)])
    return results


def sampling_flags(bench: Bench, images: int, output: str) -> dict[str, Any]:
    """Flags of forward_backward_dataset_sample.py."""
    flags = bench.flags | {"model_path": bench.checkpoint(), "data_dir": bench.pictures(images)}
    flags["device"] = bench.args.device
    return flags | {"output": bench.folder / output, "timestep_respacing": N, "batch_size": bench.args.batch_size}


def copy_as_samples(folder: str, output: Path) -> dict[int, list[tuple[str, str]]]:
    """Copy every picture of a folder as its own "sample" at each k. Returns pairs of paths by k."""
    pairs: dict[int, list[tuple[str, str]]] = {}
    for k in TIMES:
        samples = SampleFolder(str(output), k, N, 1000)
        for path in sorted(Path(folder).rglob("*.JPEG")):
            sample = Path(samples.path) / samples.sample(str(path.relative_to(folder)))
            sample.parent.mkdir(parents=True, exist_ok=True)
            sample.write_bytes(path.read_bytes())
            pairs.setdefault(k, []).append((str(path), str(sample)))
    return pairs
