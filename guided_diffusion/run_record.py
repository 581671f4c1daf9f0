"""What decides the bytes of a run's samples: its settings, and the hardware and versions that it runs on."""

from __future__ import annotations

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import torch

from . import dist_util, logger

if TYPE_CHECKING:
    import argparse

    from .image_datasets import LabelledImage

# The flags that decide, with the weights, the images and the precision, what is written.
DECISIVE_FLAGS = ("seed", "batch_size", "clip_denoised", "use_ddim", "image_format", "jpeg_quality")
# Model flags that change how the numbers are computed in training alone.
WITHOUT_EFFECT = ("use_checkpoint", "dropout")
# Variables of the environment by which NVIDIA's libraries and PyTorch compute differently.
DECISIVE_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_TUNABLEOP_ENABLED",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def settings_of(
    args: argparse.Namespace,
    flags: Mapping[str, Any],
    images: Sequence[LabelledImage],
    weights: str,
    precision: str,
    compiled: bool,
) -> dict[str, Any]:
    """What decides the bytes that a run writes, by the names that the user knows.

    Args:
        args: the script's flags.
        flags: those of them that describe model and diffusion.
        images: the chosen images.
        weights: digest of the model's weights.
        precision: number format of the U-Net's torso.
        compiled: whether the U-Net is compiled.
    """
    settings = {f"--{name}": getattr(args, name) for name in DECISIVE_FLAGS}
    settings |= {f"--{name}": value for name, value in flags.items() if name not in WITHOUT_EFFECT}
    labels = args.class_cond  # they reach the network of a class-conditional model alone
    listed = "\n".join(f"{image.path}\t{image.label if labels else ''}" for image in images)
    settings["the number of images (--num_classes, --num_per_class, --num_samples)"] = len(images)
    settings["the list of images (--data_dir)"] = hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()
    settings["the checkpoint (--model_path)"] = weights
    settings["the precision (--use_fp16)"] = precision
    settings |= {"--compile": True} if compiled else {}  # a record without this entry is of one that was not
    return settings


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights: names, shapes and values, whatever file they came in."""
    digest = hashlib.sha256()
    for name, w in sorted(model.state_dict().items()):
        digest.update(f"{name} {w.dtype} {list(w.shape)}\n".encode())
        digest.update(w.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Say, a phrase each, which entries differ from those on record."""
    return [
        f"{name} was {_short(recorded.get(name, 'not set'))} and is now {_short(current.get(name, 'not set'))}"
        for name in dict.fromkeys([*recorded, *current])
        # A flag that an older version did not have is as one that is not given.
        if recorded.get(name, "") != current.get(name, "")
    ]


def circumstances_changed(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """As `differences`, for circumstances; of those on record, since older versions recorded fewer."""
    return differences(recorded, {name: value for name, value in current.items() if name in recorded})


@cache
def surroundings(device: torch.device) -> dict[str, str]:
    """What decides the last digits besides the settings: hardware and environment of all processes, and versions.

    All ranks must call this. If processes differ, there is a warning.
    """
    variables = " ".join(f"{name}={os.environ[name]}" for name in DECISIVE_VARIABLES if name in os.environ)
    ranks = dist_util.gather_objects((hardware(device), variables))
    of_all = {}
    for name, found in zip(("hardware", "environment"), zip(*ranks, strict=True), strict=True):
        counts = Counter(found)
        of_all[name] = found[0]
        if len(counts) > 1:
            of_all[name] = ", ".join(f"{count} x {what or 'nothing set'}" for what, count in sorted(counts.items()))
            logger.warn(
                f"the {name} is not the same for all processes ({of_all[name]}): which process computes an image "
                "decides its last digits"
            )
    return {**of_all, **versions(device)}


def versions(device: torch.device | None = None) -> dict[str, str]:
    """Versions of Python and of what else decides the bytes that are computed on a device; None: this rank's."""
    device = device or dist_util.dev()
    packages = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    if device.type == "cuda":
        packages |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"python": platform.python_version(), **packages}


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's kind of instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def now() -> str:
    """The time, in ISO 8601 with the time zone."""
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


def _short(value: Any) -> str:
    """A value for a message: a digest is recognised by its beginning."""
    text = "empty" if value == "" else str(value)
    return text[:12] + "..." if len(text) == 64 else text
