"""Measure how fast this project is here, beside what else one could use, and how exact.

Parts, each of which may be asked for alone (--parts):

  network     a forward pass: this network, a plain one of the same weights, and diffusers' of the same architecture;
              as a share of what the device does in matrix products, measured in the same minutes
  small       the demo's U-Net, where the calls of the operations may cost more than they do
  precision   the error of a forward pass, and of a whole trajectory with the same noise, against float64
  loop        forward_backward_dataset_sample.py from images to samples, and the share of its time outside the network
  processes   two processes of one thread each, beside one
  startup     from the command to the first denoising step
  classifier  evaluate_classifier.py for ten times at once, beside one pair of images after the other

The network has the published model's flags unless others are given, and random weights. Contenders take turns, A B A B,
so that whatever else the machine does meets all of them; ratios are of the same round, with their spread.

  python scripts/benchmark.py --output benchmark.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, before any other
from guided_diffusion.command_line import ArgumentParser, run, whole_number

# isort: split
import numpy as np

from guided_diffusion import logger
from guided_diffusion.errors import ResultError, UserError
from guided_diffusion.files import write_whole
from guided_diffusion.other_scripts import find_mpiexec, load_script, words
from guided_diffusion.script_util import add_dict_to_argparser, args_to_dict, bool_or_auto, model_defaults
from guided_diffusion.timing import (
    Clock,
    Contender,
    Row,
    launched,
    quietly,
    ratio,
    run_script,
    table,
    take_turns,
    time_alone,
)

if TYPE_CHECKING:
    import torch

    from guided_diffusion.unet import UNetModel

FLAGS = {  # of the network: the published model's
    **model_defaults(),
    "image_size": 256,
    "num_channels": 256,
    "num_res_blocks": 2,
    "attention_resolutions": "32,16,8",
    "num_head_channels": 64,
    "learn_sigma": True,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "use_fp16": True,
}
N = 250  # denoising steps after respacing
TIMES = [25 * i for i in range(1, 11)]  # of the classifier's series


def main(argv: list[str] | None = None) -> int:
    """Measure. Returns 0; raises UserError."""
    args = create_argparser().parse_args(argv)
    known = {part.__name__: part for part in (network, small, precision, loop, processes, startup, classifier)}
    parts = args.parts.split(",") if args.parts else list(known)
    if strange := [part for part in parts if part not in known]:
        raise UserError(f"--parts {strange[0]}: expected some of {','.join(known)}")

    import torch

    from guided_diffusion import dist_util
    from guided_diffusion.inference import compute_reproducibly
    from guided_diffusion.run_record import surroundings

    logger.make_dir()
    threads = compute_reproducibly(args.num_threads)
    device = dist_util.use_device(args.device)
    args.batch_size = args.batch_size or (32 if device.type == "cuda" else 1)
    if args.contender:
        sys.stdout.write(json.dumps(contend(args, device, threads)))
        return 0
    circumstances = {"threads": threads, **surroundings(device)}
    report: dict[str, Any] = {"circumstances": circumstances, "arguments": vars(args)}
    write_report(report, args.output)  # a mistake shows at once, not after minutes
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, device, threads, Path(folder))
        for part in parts:
            logger.info(f"{part} ...")
            report[part] = known[part](bench)
            sys.stdout.write(f"\n{part}: {known[part].__doc__}\n\n{table(report[part])}")
            sys.stdout.flush()
            write_report(report, args.output)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    sys.stdout.write(f"\n{circumstances}\n")
    logger.info(f"all figures are in {args.output}")
    return 0


def write_report(report: dict[str, Any], path: str) -> None:
    """Write the JSON. Raises UserError if it cannot be written, ResultError if a figure is NaN or infinite."""
    try:
        text = json.dumps(report, indent=1, default=str, allow_nan=False)
    except ValueError as error:
        raise ResultError(f"a figure is NaN or infinite: it is not written to --output {path}") from error
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror or error}") from error


class Bench:
    """What the parts have in common; `folder` is for files that are not kept."""

    def __init__(self, args: argparse.Namespace, device: torch.device, threads: int, folder: Path):
        self.args, self.device, self.threads, self.folder = args, device, threads, folder

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the network."""
        return args_to_dict(self.args, FLAGS)

    def checkpoint(self) -> str:
        """A file of random weights, none of which are 0 as in a freshly initialised network."""
        import torch

        path = self.folder / "model.pt"
        if not path.exists():
            model = loaded("untrained", self.flags)
            generator = torch.Generator().manual_seed(0)
            for w in model.parameters():
                if not w.any():
                    w.normal_(0, 0.02, generator=generator)
            torch.save(model.state_dict(), path)
        return str(path)

    def pictures(self, count: int) -> str:
        """A folder of JPEG images of the network's size: clouds, since noise would be slow to decode."""
        from PIL import Image

        folder, size = self.folder / f"pictures_{count}" / "class_0", self.args.image_size
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        for i in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.JPEG", quality=90)
        return str(folder.parent)


# The networks


def loaded(path: str, flags: dict[str, Any]) -> UNetModel:
    """The network of a checkpoint, in float32 on the CPU."""
    from guided_diffusion.checkpoints import load_model

    model = load_model(path, flags).eval().requires_grad_(False)
    model.convert_to_fp32()
    return model


def demo_unet() -> UNetModel:
    """The demo's, which is trained."""
    from random_hierarchy_model.demo import MODEL_FLAGS, UNET_FILE

    return loaded(str(UNET_FILE), {**model_defaults(), "learn_sigma": False, **MODEL_FLAGS})


def half(model: UNetModel, dtype: torch.dtype) -> UNetModel:
    """A copy whose torso is in half precision."""
    model = copy.deepcopy(model)
    model.convert_to_fp16(dtype)
    return model


def prepared(model: UNetModel, use_fp16: bool, threads: int, compiled: bool = False) -> UNetModel:
    """A copy as the scripts use it."""
    from guided_diffusion.inference import prepare

    model = copy.deepcopy(model)
    prepare(model, use_fp16, threads, compiled)
    return model


# The parts


def network(bench: Bench) -> list[Row]:
    """a forward pass; every contender in processes of its own, since one that handles memory well helps the others"""
    from guided_diffusion.fp16_util import half_precision_dtype

    half_name = str(half_precision_dtype(bench.device)).removeprefix("torch.")
    compiled = bench.args.compile is True or (bench.args.compile == "auto" and bench.device.type == "cuda")
    ways = ["plain", "this project", *(["this project, compiled"] if compiled else []), "diffusers", "matrix product"]
    contenders = [(way, precision) for precision in dict.fromkeys(["float32", half_name]) for way in ways]
    contenders = [c for c in contenders if c != ("this project, compiled", "float32")]
    found: dict[tuple[str, str], list[Row]] = {contender: [] for contender in contenders}
    flags = bench.flags | {"batch_size": bench.args.batch_size, "num_threads": bench.threads}
    flags["device"] = bench.args.device
    rows: list[Row] = []
    for _ in range(bench.args.repeats):
        for contender in list(found):
            try:
                asked = f"{bench.checkpoint()}:{':'.join(contender)}"
                found[contender].append(json.loads(run_script(__file__, flags | {"contender": asked})))
            except UserError as error:
                if contender[0] != "diffusers":
                    raise
                del found[contender]
                rows.append({"network": "diffusers", "precision": contender[1], "seconds": f"not measured: {error}"})

    seconds = {contender: [run["seconds"] for run in runs] for contender, runs in found.items()}
    flops = count_flops(bench) * bench.args.batch_size
    peak = {p: 2 * side(bench.device) ** 3 / min(all_) for (way, p), all_ in seconds.items() if way == "matrix product"}
    measured: list[Row] = []
    for (way, precision), runs in found.items():
        if way == "matrix product":
            continue
        median = statistics.median(seconds[way, precision])
        row = {"network": way, "precision": precision, "seconds": median, "images/s": bench.args.batch_size / median}
        row |= {"TFLOP/s": flops / median / 1e12, "share of peak": flops / median / peak[precision]}
        for against in dict.fromkeys(["float32", half_name]):
            row[f"times plain {against}"] = ratio(seconds["plain", against], seconds[way, precision])
        memory = {"peak memory, GiB": max(run["memory"] for run in runs) / 2**30} if "memory" in runs[0] else {}
        measured.append(row | memory)
    rows = measured + rows
    return rows + [{"network": "matrix product", "precision": p, "TFLOP/s": rate / 1e12} for p, rate in peak.items()]


def contend(args: argparse.Namespace, device: torch.device, threads: int) -> dict[str, float]:
    """What a process of `network` measures: args.contender is FILE:WAY:PRECISION. Raises UserError."""
    import torch

    from guided_diffusion.compilation import compile_network
    from guided_diffusion.other_networks import diffusers_unet, plain
    from guided_diffusion.script_util import create_gaussian_diffusion

    path, way, precision = args.contender.rsplit(":", 2)
    dtype, batch, size = getattr(torch, precision), args.batch_size, args.image_size
    if way == "matrix product":
        m = torch.randn(side(device), side(device), device=device).to(dtype)
        return time_alone(partial(torch.mm, m, m, out=torch.empty_like(m)), device)
    model = loaded(path, args_to_dict(args, FLAGS)).to(device)
    x = torch.randn(batch, 3, size, size, device=device)
    t = torch.full((batch,), 500, device=device)
    use_fp16 = dtype != torch.float32
    if way == "plain":
        network = plain(half(model, dtype) if use_fp16 else model)
    elif way == "diffusers":
        network, x = diffusers_unet(model).to(device, dtype), x.to(dtype)
    else:
        compiled = way == "this project, compiled"
        network = prepared(model, use_fp16, threads, compiled)
        if compiled:
            network = compile_network(network, create_gaussian_diffusion(timestep_respacing=str(N)), batch, size)
    del model
    return time_alone(partial(network, x, t), device)


def side(device: torch.device) -> int:
    """Of the matrices whose product is timed."""
    return 8192 if device.type == "cuda" else 4096


def count_flops(bench: Bench) -> int:
    """Floating-point operations of a forward pass of one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, size = loaded(bench.checkpoint(), bench.flags), bench.args.image_size
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size), torch.zeros(1))
    return counter.get_total_flops()


def small(bench: Bench) -> list[Row]:
    """the demo's U-Net: a batch of 64, and of one, which shows what the calls alone cost at most"""
    import torch

    model, device, contenders = demo_unet(), bench.device, []
    size = model.image_size
    for batch in (64, 1):
        x, t = torch.randn(batch, 3, size, size, device=device), torch.full((batch,), 500, device=device)
        for use_fp16 in (False, True):
            network = prepared(model, use_fp16, bench.threads)
            precision = str(network.dtype).removeprefix("torch.")
            contenders.append(Contender(f"batch {batch}", partial(network, x, t), precision, batch))
    take_turns(contenders, 10 * bench.args.repeats, device)
    return [
        {
            "network": f"demo's U-Net, {c.name}",
            "precision": c.precision,
            "milliseconds": 1000 * statistics.median(c.seconds),
            "images/s": c.images / statistics.median(c.seconds),
        }
        for c in contenders
    ]


def precision(bench: Bench) -> list[Row]:
    """relative error against float64, of a forward pass and of a trajectory of all 250 steps with the same noise"""
    import torch

    from guided_diffusion.fp16_util import half_precision_dtype
    from guided_diffusion.other_networks import exact, plain
    from guided_diffusion.script_util import create_gaussian_diffusion

    device, dtype = bench.device, half_precision_dtype(bench.device)
    big, little = loaded(bench.checkpoint(), bench.flags).to(device), demo_unet().to(device)
    diffusion = create_gaussian_diffusion(timestep_respacing=str(N), predict_xstart=True)

    def networks(model: UNetModel) -> dict[str, UNetModel]:
        channels_last = partial(torch.nn.Module.to, memory_format=torch.channels_last)
        made = {"plain, float32": plain(model), "plain, float16": plain(half(model, torch.float16))}
        if dtype not in (torch.float16, torch.float32):
            made[f"plain, {dtype}"] = plain(half(model, dtype))
        made["this project, float32"] = prepared(model, False, bench.threads)
        if dtype != torch.float32:
            made[f"this project, {dtype}"] = half(model, dtype)
            made[f"this project, {dtype}, channels last"] = channels_last(half(model, dtype))
        return {name.replace("torch.", ""): network for name, network in made.items()}

    side = min(64, bench.args.image_size)
    x, t = torch.randn(2, 3, side, side, device=device), torch.tensor([900, 100], device=device)

    def one_pass(model: Callable) -> torch.Tensor:
        with torch.inference_mode():
            return model(x, t)

    start = torch.randn(16, 3, little.image_size, little.image_size, device=device)

    def trajectory(model: Callable) -> torch.Tensor:
        noise = torch.Generator(device).manual_seed(0)
        return diffusion.p_sample_loop(model, tuple(start.shape), noise=start, device=device, generator=noise)

    def errors(model: UNetModel, act: Callable[[Callable], torch.Tensor]) -> dict[str, float]:
        right = act(exact(model)).double()
        found = {name: act(network).double() for name, network in networks(model).items()}
        return {name: ((y - right).norm() / right.norm()).item() for name, y in found.items()}

    passes, drifts = errors(big, one_pass), errors(little, trajectory)
    return [
        {
            "network": name,
            f"error of a forward pass, these flags, {side} pixels": passes[name],
            "error of a trajectory, the demo's trained U-Net": drifts[name],
        }
        for name in passes
    ]


def loop(bench: Bench) -> list[Row]:
    """forward_backward_dataset_sample.py: reading, noising, denoising, encoding and writing"""
    batch = bench.args.batch_size
    steps = bench.args.steps or (125 if bench.device.type == "cuda" else 2)
    images = 2 * batch + -(-batch // 2)  # two batches, and a smaller one
    script = load_script("forward_backward_dataset_sample.py")
    clock = Clock(bench.device)
    script.sample = clock.around(script.sample)
    flags = {"num_classes": 1, "num_per_class": images, "step_reverse": steps, "num_threads": bench.threads}
    flags = sampling_flags(bench, images, "loop") | flags | {"compile": bench.args.compile}
    quietly(script, words(flags))
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
    """the same script in several processes: one per GPU, or two of one thread each, beside one; then counted"""
    return side_by_side(bench) + dealt_out()


def side_by_side(bench: Bench) -> list[Row]:
    """One process and several, in turns."""
    import torch

    on_gpu = bench.device.type == "cuda"
    count = torch.cuda.device_count() if on_gpu else 2
    mpiexec = find_mpiexec()
    if count < 2 or (not on_gpu and len(os.sched_getaffinity(0)) < 2):
        return [{"processes": "not measured: this machine has one GPU or one core"}]
    if mpiexec is None:
        return [{"processes": "not measured: mpiexec is not installed (pip install -e .[mpi])"}]
    images = 2 * count * bench.args.batch_size
    steps = bench.args.steps or (125 if on_gpu else 4)  # enough that the first pass, which prepares, counts little
    flags = sampling_flags(bench, images, "processes")
    flags |= {"num_classes": 1, "num_per_class": images, "step_reverse": steps, "num_threads": 1, "compile": False}
    seconds: dict[int, list[float]] = {1: [], count: []}
    for turn in range(bench.args.repeats):
        for number, found in seconds.items():
            output = f"{bench.folder}/processes_{number}_{turn}"
            launch = [mpiexec, "--oversubscribe", "-n", str(number)] if number > 1 else []
            finished = launched(launch, "forward_backward_dataset_sample.py", flags | {"output": output})
            found.append(finished.record["seconds"])
    return [
        {
            "processes": number,
            "images": images,
            "seconds": statistics.median(found),
            "images/s": images / statistics.median(found),
            "times one process": ratio(seconds[1], found),
        }
        for number, found in seconds.items()
    ]


def dealt_out() -> list[Row]:
    """How many times the images of one process several make, if the one with most steps decides: counted, not timed.

    Of the README's 10,000 images in batches of 32, at the time 125 of 250 and at ten times.
    """
    from guided_diffusion.dist_util import share_of
    from guided_diffusion.forward_backward import cut_units
    from guided_diffusion.image_datasets import LabelledImage

    images, rows = [LabelledImage(f"{i}.JPEG", None, "") for i in range(10_000)], []
    for times in ([125], TIMES):
        units = [unit for k in times for unit in cut_units(images, 32, k)]
        for processes in (2, 8, 64):
            steps = [sum(unit.step_reverse for unit in share_of(units, r, processes)) for r in range(processes)]
            name = f"{processes}, counted, {len(times)} time{'s' if len(times) > 1 else ''}"
            rows.append({"processes": name, "images": len(images), "times one process": sum(steps) / max(steps)})
    return rows


def startup(bench: Bench) -> list[Row]:
    """from the command to the first denoising step, with the checkpoint's file in the system's cache"""
    batch = bench.args.batch_size
    flags = sampling_flags(bench, batch, "startup")
    flags |= {"num_classes": 1, "num_per_class": batch, "step_reverse": 1, "num_threads": bench.threads}
    runs = [
        launched([], "forward_backward_dataset_sample.py", flags | {"output": f"{bench.folder}/startup_{turn}"})
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
    """convnext_base with random weights, starting images and their samples of ten times"""
    from guided_diffusion.torch_classifiers import load_classifier

    starts = 64 if bench.device.type == "cuda" else 4
    size = bench.args.image_size
    folder, samples = bench.pictures(starts), bench.folder / "samples"
    pairs = lay_out_samples(folder, samples)
    script = load_script("evaluate_classifier.py")
    clock = Clock(bench.device)
    script.compare = clock.around(script.compare)
    flags = {"classifier_name": "convnext_base", "classifier_path": "untrained", "normalization": "none"}
    flags |= {"starting_data_dir": folder, "data_dir": samples, "timestep_respacing": N, "image_size": size}
    flags |= {"batch_size": 128 if bench.device.type == "cuda" else 22, "num_threads": bench.threads}
    flags["device"] = bench.args.device
    one_by_one = load_classifier("convnext_base", "untrained", image_size=size)
    one_by_one.model.to(bench.device)
    kinds = {"one pair after the other, float32": None, "this project, float32": False, "this project, half": True}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(bench.args.repeats + 1):
        for kind, use_fp16 in kinds.items():
            if use_fp16 is None:
                start = time.perf_counter()
                straightforward(one_by_one, pairs, size, flags["batch_size"], bench.device)
                seconds[kind].append(time.perf_counter() - start)
            else:
                output = f"{bench.folder}/classifier_{turn}_{use_fp16}"
                chosen = flags | {"output": output, "classifier_use_fp16": use_fp16}
                quietly(script, [*words(chosen), "--time_series", *map(str, TIMES)])
                seconds[kind].append(clock.total)
    first, *_ = seconds = {kind: found[1:] for kind, found in seconds.items()}
    return [
        {
            "way": kind,
            "starting images": starts,
            "times": len(TIMES),
            "seconds": statistics.median(found),
            "pairs/s": starts * len(TIMES) / statistics.median(found),
            "times the first": ratio(seconds[first], found),
        }
        for kind, found in seconds.items()
    ]


def straightforward(classifier, pairs: dict[int, list[tuple[str, str]]], size: int, batch: int, device) -> list:
    """Compare pair by pair: read both images, apply the classifier to both, keep all activations, compare them."""
    import torch

    from guided_diffusion.image_datasets import read_image

    kept, found = {}, []

    def keep(name: str, _module: Any, _args: Any, output: torch.Tensor) -> None:
        kept[name] = output

    modules = dict(classifier.model.named_modules())
    hooks = [modules[layer.name].register_forward_hook(partial(keep, layer.name)) for layer in classifier.layers]
    with torch.inference_mode():
        for both in pairs.values():
            for first in range(0, len(both), batch // 2):
                activations = []
                for paths in zip(*both[first : first + batch // 2], strict=True):
                    x = torch.stack([classifier.preprocess(read_image(path, size)) for path in paths])
                    classifier.model(x.to(device))
                    activations.append(dict(kept))
                for name in kept:
                    a, b = (of[name].flatten(1).float() for of in activations)
                    cosine = torch.cosine_similarity(a, b)
                    distance = (a - b).norm(dim=1)
                    found.append(
                        (cosine.cpu(), distance.cpu(), (distance / (a.norm(dim=1) * b.norm(dim=1)).sqrt()).cpu())
                    )
    for hook in hooks:
        hook.remove()
    return found


def sampling_flags(bench: Bench, images: int, output: str) -> dict[str, Any]:
    """Flags of the sampling script."""
    flags = bench.flags | {"model_path": bench.checkpoint(), "data_dir": bench.pictures(images)}
    flags["device"] = bench.args.device
    return flags | {"output": bench.folder / output, "timestep_respacing": N, "batch_size": bench.args.batch_size}


def lay_out_samples(folder: str, output: Path) -> dict[int, list[tuple[str, str]]]:
    """Give every picture of a folder a "sample" of each time. Returns by time the pairs of paths."""
    from guided_diffusion.forward_backward import SampleFolder

    pairs: dict[int, list[tuple[str, str]]] = {}
    for k in TIMES:
        samples = SampleFolder(str(output), k, N, 1000)
        for path in sorted(Path(folder).rglob("*.JPEG")):
            sample = Path(samples.path) / samples.sample(str(path.relative_to(folder)))
            sample.parent.mkdir(parents=True, exist_ok=True)
            sample.write_bytes(path.read_bytes())
            pairs.setdefault(k, []).append((str(path), str(sample)))
    return pairs


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s [flags]", description=__doc__)
    add = parser.add_argument_group("what is measured").add_argument
    add("--parts", default="", metavar="NAMES", help="separated by commas (default: all)")
    add(
        "--output",
        default="benchmark.json",
        metavar="FILE",
        help="all figures, written anew after each part (default: %(default)s)",
    )
    add(
        "--batch_size",
        default=0,
        type=whole_number(0),
        metavar="INT",
        help="images per forward pass; 0: 32 on a GPU, 1 on a CPU (default: 0)",
    )
    add("--repeats", default=3, type=whole_number(1), metavar="INT", help="rounds (default: %(default)s)")
    add(
        "--steps",
        default=0,
        type=whole_number(0),
        metavar="INT",
        help="denoising steps of the loop; 0: 125 on a GPU, 2 or 4 on a CPU (default: 0)",
    )
    add("--contender", default="", help=argparse.SUPPRESS)  # of a process that `network` starts
    add(
        "--compile",
        default="auto",
        type=bool_or_auto,
        metavar="True|False|auto",
        help="measure the compiled network too; auto: on a GPU (default: %(default)s)",
    )
    add(
        "--num_threads",
        default=0,
        type=whole_number(0),
        metavar="INT",
        help="CPU threads that compute; 0: the cores (default: 0)",
    )
    add_dict_to_argparser(parser.add_argument_group("the network"), FLAGS)
    return parser


if __name__ == "__main__":
    run(main)
