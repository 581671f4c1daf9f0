"""The network on its own: speed and precision."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from guided_diffusion.compute.compilation import compile_network
from guided_diffusion.errors import UserError
from guided_diffusion.fp16_util import half_precision_dtype
from guided_diffusion.script_util import args_to_dict, create_gaussian_diffusion, model_defaults
from guided_diffusion.unet import UNetModel
from random_hierarchy_model.demo import MODEL_FLAGS, UNET_FILE

import torch
from torch.utils.flop_counter import FlopCounterMode

from .bench import FLAGS, Bench, N, half, load_network, prepared
from .other_networks import diffusers_unet, exact, plain
from .timing import Row, ratio, run_script, take_turns, time_and_memory


def network(bench: Bench) -> list[Row]:
    """a forward pass; each contender in its own processes, since one that uses memory well would help the others"""
    half_name = name_of(half_precision_dtype(bench.device))
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
                own = {"contender": f"{bench.checkpoint()}:{':'.join(contender)}"}
                found[contender].append(json.loads(run_script("scripts/benchmark.py", flags | own)))
            except UserError as error:
                if contender[0] != "diffusers":
                    raise
                del found[contender]
                rows.append({"network": "diffusers", "precision": contender[1], "seconds": f"not measured: {error}"})

    seconds = {contender: [run["seconds"] for run in runs] for contender, runs in found.items()}
    flops = count_flops(bench) * bench.args.batch_size
    product = 2 * matrix_side(bench.device) ** 3  # floating-point operations
    peak = {p: product / min(all_) for (way, p), all_ in seconds.items() if way == "matrix product"}
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
    """The measurement of one process of `network`: args.contender is FILE:WAY:PRECISION. Raises UserError."""
    path, way, precision = args.contender.rsplit(":", 2)
    dtype, batch, size = getattr(torch, precision), args.batch_size, args.image_size
    if way == "matrix product":
        m = torch.randn(matrix_side(device), matrix_side(device), device=device).to(dtype)
        return time_and_memory(partial(torch.mm, m, m, out=torch.empty_like(m)), device)
    model = load_network(path, args_to_dict(args, FLAGS)).to(device)
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
    return time_and_memory(partial(network, x, t), device)


def matrix_side(device: torch.device) -> int:
    """Rows, and columns, of the matrices whose product is timed."""
    return 8192 if device.type == "cuda" else 4096


def count_flops(bench: Bench) -> int:
    """Floating-point operations of a forward pass of one image."""
    model, size = load_network(bench.checkpoint(), bench.flags), bench.args.image_size
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size), torch.zeros(1))
    return counter.get_total_flops()


def small(bench: Bench) -> list[Row]:
    """the demo's U-Net: a batch of 64, and a single image, which bounds the cost of the calls alone"""
    model, device = demo_unet(), bench.device
    size = model.image_size
    calls: dict[tuple[int, str], Callable[[], Any]] = {}
    for batch in (64, 1):
        x, t = torch.randn(batch, 3, size, size, device=device), torch.full((batch,), 500, device=device)
        for use_fp16 in (False, True):
            network = prepared(model, use_fp16, bench.threads)
            calls[batch, name_of(network.dtype)] = partial(network, x, t)
    medians = {of: statistics.median(seconds) for of, seconds in take_turns(calls, bench.args.repeats).items()}
    return [
        {
            "network": f"demo's U-Net, batch {batch}",
            "precision": precision,
            "milliseconds": 1000 * seconds,
            "images/s": batch / seconds,
        }
        for (batch, precision), seconds in medians.items()
    ]


def precision(bench: Bench) -> list[Row]:
    """relative error against float64, of a forward pass and of a trajectory of all 250 steps with the same noise"""
    device, dtype = bench.device, half_precision_dtype(bench.device)
    big, little = load_network(bench.checkpoint(), bench.flags).to(device), demo_unet().to(device)
    diffusion = create_gaussian_diffusion(timestep_respacing=str(N), predict_xstart=True)

    def networks(model: UNetModel) -> dict[str, UNetModel]:
        channels_last = partial(torch.nn.Module.to, memory_format=torch.channels_last)
        made = {"plain, float32": plain(model), "plain, float16": plain(half(model, torch.float16))}
        if dtype not in (torch.float16, torch.float32):
            made[f"plain, {name_of(dtype)}"] = plain(half(model, dtype))
        made["this project, float32"] = prepared(model, False, bench.threads)
        if dtype != torch.float32:
            made[f"this project, {name_of(dtype)}"] = half(model, dtype)
            made[f"this project, {name_of(dtype)}, channels last"] = channels_last(half(model, dtype))
        return made

    side = min(64, bench.args.image_size)
    x, t = torch.randn(2, 3, side, side, device=device), torch.tensor([900, 100], device=device)

    def one_pass(model: Callable) -> torch.Tensor:
        with torch.inference_mode():
            return model(x, t)

    start = torch.randn(16, 3, little.image_size, little.image_size, device=device)

    def trajectory(model: Callable) -> torch.Tensor:
        noise = torch.Generator(device).manual_seed(0)
        return diffusion.p_sample_loop(model, tuple(start.shape), noise=start, device=device, generator=noise)

    def errors(model: UNetModel, compute: Callable[[Callable], torch.Tensor]) -> dict[str, float]:
        right = compute(exact(model)).double()
        found = {name: compute(network).double() for name, network in networks(model).items()}
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


def demo_unet() -> UNetModel:
    """The demo's trained U-Net."""
    return load_network(str(UNET_FILE), {**model_defaults(), "learn_sigma": False, **MODEL_FLAGS})


def name_of(dtype: torch.dtype) -> str:
    """The name of a precision: float32."""
    return str(dtype).removeprefix("torch.")
