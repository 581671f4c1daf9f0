"""The network on its own: speed and precision."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from guided_diffusion.compute.compilation import compile_network
from guided_diffusion.compute.inference import dtype_name
from guided_diffusion.errors import UserError
from guided_diffusion.fp16_util import half_precision_dtype
from guided_diffusion.script_util import args_to_dict, create_gaussian_diffusion, model_defaults
from guided_diffusion.unet import UNetModel
from random_hierarchy_model.demo import MODEL_FLAGS, UNET_FILE

import torch
from torch.utils.benchmark import timer as synchronized_seconds
from torch.utils.flop_counter import FlopCounterMode

from .bench import FLAGS, Bench, N, half_copy, load_network, optimized_copy
from .other_networks import diffusers_unet, float64_network, plain
from .timing import Row, interleaved_seconds, ratio, run_script, time_and_memory


def network(bench: Bench) -> list[Row]:
    """a forward pass; each contender in its own processes, so that they do not share memory"""
    precisions = list(dict.fromkeys(["float32", dtype_name(half_precision_dtype(bench.device))]))
    ways = ["plain", "this project", "diffusers", "matrix product"]
    contenders = [(way, precision) for precision in precisions for way in ways]
    if bench.compiles:
        contenders += [("this project, compiled", precision) for precision in precisions[1:]]
    runs: dict[tuple[str, str], list[Row]] = {contender: [] for contender in contenders}
    flags = bench.flags | {"batch_size": bench.args.batch_size, "num_threads": bench.threads}
    flags |= {"device": bench.args.device, "seconds": bench.args.seconds}
    failed: list[Row] = []
    for _ in range(bench.args.repeats):
        for way, precision in list(runs):
            contender = {"contender": f"{bench.checkpoint()}:{way}:{precision}"}
            try:
                runs[way, precision].append(json.loads(run_script("scripts/benchmark.py", flags | contender)))
            except UserError as error:
                if way != "diffusers":
                    raise
                del runs[way, precision]
                failed.append({"network": way, "precision": precision, "seconds": f"not measured: {error}"})

    seconds = {contender: [run["seconds"] for run in each] for contender, each in runs.items()}
    flops = count_flops(bench) * bench.args.batch_size
    product_flops = 2 * matrix_side(bench.device) ** 3
    peak = {precision: product_flops / min(seconds["matrix product", precision]) for precision in precisions}
    rows: list[Row] = []
    for (way, precision), each in runs.items():
        if way == "matrix product":
            continue
        median = statistics.median(seconds[way, precision])
        row = {"network": way, "precision": precision, "seconds": median, "images/s": bench.args.batch_size / median}
        row |= {"TFLOP/s": flops / median / 1e12, "share of peak": flops / median / peak[precision]}
        for other in precisions:
            row[f"times plain {other}"] = ratio(seconds["plain", other], seconds[way, precision])
        if "compilation" in each[0]:
            row["compilation, s"] = [f([run["compilation"] for run in each]) for f in (statistics.median, min, max)]
        if "memory" in each[0]:
            row["peak memory, GiB"] = max(run["memory"] for run in each) / 2**30
        rows.append(row)
    products = [{"network": "matrix product", "precision": p, "TFLOP/s": rate / 1e12} for p, rate in peak.items()]
    return rows + failed + products


def measure_contender(args: argparse.Namespace, device: torch.device, threads: int) -> dict[str, float]:
    """The measurement of one process of `network`: args.contender is FILE:WAY:PRECISION. Raises UserError."""
    path, way, precision = args.contender.rsplit(":", 2)
    dtype, batch, size = getattr(torch, precision), args.batch_size, args.image_size
    if way == "matrix product":
        m = torch.randn(matrix_side(device), matrix_side(device), device=device).to(dtype)
        return time_and_memory(partial(torch.mm, m, m, out=torch.empty_like(m)), device, args.seconds)
    model = load_network(path, args_to_dict(args, FLAGS)).to(device)
    x = torch.randn(batch, 3, size, size, device=device)
    t = torch.full((batch,), 500, device=device)
    use_fp16 = dtype != torch.float32
    facts: dict[str, float] = {}
    if way == "plain":
        network = plain(half_copy(model, dtype) if use_fp16 else model)
    elif way == "diffusers":
        network, x = diffusers_unet(model).to(device, dtype), x.to(dtype)
    else:
        compiled = way == "this project, compiled"
        network = optimized_copy(model, use_fp16, threads, compiled)
        if compiled:
            start = synchronized_seconds()
            network = compile_network(network, create_gaussian_diffusion(timestep_respacing=str(N)), batch, size)
            facts["compilation"] = synchronized_seconds() - start
    del model
    return time_and_memory(partial(network, x, t), device, args.seconds) | facts


def matrix_side(device: torch.device) -> int:
    """Side of the square matrices whose product is timed."""
    return 8192 if device.type == "cuda" else 4096


def count_flops(bench: Bench) -> int:
    """Floating-point operations of a forward pass of one image."""
    model, size = load_network(bench.checkpoint(), bench.flags), bench.args.image_size
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size), torch.zeros(1))
    return counter.get_total_flops()


def small(bench: Bench) -> list[Row]:
    """the demo's U-Net: a batch of 64, and a single image, whose time is an upper bound on the overhead of the calls"""
    model, device = demo_unet(), bench.device
    size = model.image_size
    calls: dict[tuple[int, str], Callable[[], Any]] = {}
    for batch in (64, 1):
        x, t = torch.randn(batch, 3, size, size, device=device), torch.full((batch,), 500, device=device)
        for use_fp16 in (False, True):
            network = optimized_copy(model, use_fp16, bench.threads)
            calls[batch, dtype_name(network.dtype)] = partial(network, x, t)
    rows = []
    for (batch, precision), all_seconds in interleaved_seconds(calls, bench.args.repeats).items():
        seconds = statistics.median(all_seconds)
        row = {"network": f"demo's U-Net, batch {batch}", "precision": precision, "milliseconds": 1000 * seconds}
        rows.append(row | {"images/s": batch / seconds})
    return rows


def precision(bench: Bench) -> list[Row]:
    """relative error against float64, of a forward pass and of a trajectory of all 250 steps with the same noise"""
    device, dtype = bench.device, half_precision_dtype(bench.device)
    large, little = load_network(bench.checkpoint(), bench.flags).to(device), demo_unet().to(device)
    diffusion = create_gaussian_diffusion(timestep_respacing=str(N), predict_xstart=True)

    def networks(model: UNetModel) -> dict[str, UNetModel]:
        variants = {"plain, float32": plain(model), "plain, float16": plain(half_copy(model, torch.float16))}
        if dtype not in (torch.float16, torch.float32):
            variants[f"plain, {dtype_name(dtype)}"] = plain(half_copy(model, dtype))
        variants["this project, float32"] = optimized_copy(model, False, bench.threads)
        if dtype != torch.float32:
            ours = f"this project, {dtype_name(dtype)}"
            variants[ours] = half_copy(model, dtype)
            variants[f"{ours}, channels last"] = half_copy(model, dtype).to(memory_format=torch.channels_last)
        return variants

    side = min(64, bench.args.image_size)
    x, t = torch.randn(2, 3, side, side, device=device), torch.tensor([900, 100], device=device)
    start = torch.randn(16, 3, little.image_size, little.image_size, device=device)

    def forward_pass(model: Callable) -> torch.Tensor:
        with torch.inference_mode():
            return model(x, t)

    def trajectory(model: Callable) -> torch.Tensor:
        noise = torch.Generator(device).manual_seed(0)
        return diffusion.p_sample_loop(model, tuple(start.shape), noise=start, device=device, generator=noise)

    def errors(model: UNetModel, compute: Callable[[Callable], torch.Tensor]) -> dict[str, float]:
        exact = compute(float64_network(model)).double()
        outputs = {name: compute(network).double() for name, network in networks(model).items()}
        return {name: ((y - exact).norm() / exact.norm()).item() for name, y in outputs.items()}

    of_passes, of_trajectories = errors(large, forward_pass), errors(little, trajectory)
    return [
        {
            "network": name,
            f"error of a forward pass, these flags, {side} pixels": of_passes[name],
            "error of a trajectory, the demo's trained U-Net": of_trajectories[name],
        }
        for name in of_passes
    ]


def demo_unet() -> UNetModel:
    """The demo's trained U-Net."""
    return load_network(str(UNET_FILE), {**model_defaults(), "learn_sigma": False, **MODEL_FLAGS})
