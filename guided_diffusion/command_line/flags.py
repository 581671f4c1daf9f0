"""The flags of all scripts in one table, and the types of their values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from ..gaussian_diffusion import SAMPLERS

# Types of values


def str2bool(v: str | bool) -> bool:
    """Parse a truth value. Raises argparse.ArgumentTypeError."""
    if (text := str(v).lower()) in ("true", "t", "yes", "y", "1"):
        return True
    if text in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {v!r}")


def bool_or_auto(text: str) -> bool | str:
    """Parse True, False or auto. Raises argparse.ArgumentTypeError."""
    try:
        return text if text == "auto" else str2bool(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected True, False or auto, not {text!r}") from None


LARGEST = 2**31 - 1  # of whole numbers without a maximum of their own; larger ones are mistakes


def whole_number(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """The type of an integer flag with a minimum and a maximum."""

    def parse(text: str) -> int:
        expected = f"a whole number >= {low}" if high == LARGEST else f"a whole number from {low} to {high}"
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text[:40]!r}") from None
        if number > high == LARGEST:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, not {number}")
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected {expected}, not {number}")
        return number

    return parse


def finite_number(text: str) -> float:
    """Parse a number that is neither NaN nor infinite. Raises argparse.ArgumentTypeError."""
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a finite number, not {text!r}")


def folder(text: str) -> str:
    """Parse the path of a folder, local or on remote storage. Raises argparse.ArgumentTypeError."""
    url = urlsplit(text)
    remote = url.scheme in ("gs", "az") or (url.scheme, url.netloc[-22:]) == ("https", ".blob.core.windows.net")
    if url.scheme and not url.netloc and not remote:
        raise argparse.ArgumentTypeError(
            f"{text!r} looks like the address of a remote folder; for a local one, ./{text}"
        )
    if url.netloc and not remote:
        raise argparse.ArgumentTypeError(
            f"expected a local folder, gs://, az:// or https://ACCOUNT.blob.core.windows.net/, not {text!r}"
        )
    return text


def time_list(text: str) -> list[int]:
    """Parse one or more times, separated by commas; see `Flattened`. Raises argparse.ArgumentTypeError."""
    times = [whole_number(0)(word) for word in text.replace(",", " ").split()]
    if not times:
        raise argparse.ArgumentTypeError(f"expected times such as 25 50 125, not {text!r}")
    return times


class Flattened(argparse.Action):
    """Concatenate the lists that a flag's words were parsed to."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [item for items in values for item in items])


# A type, and its placeholder in --help.
FILE, NAME, TEXT = ((str, metavar) for metavar in ("FILE", "NAME", "TEXT"))
FOLDER, FLOAT = (folder, "FOLDER"), (finite_number, "FLOAT")
INT, NATURAL, POSITIVE = ((whole_number(low), "INT") for low in (-1, 0, 1))
SEED, ANY_SEED = ((whole_number(low, 2**64 - 1), "INT") for low in (0, -(2**63)))  # what PyTorch takes
THREADS = (whole_number(0, 1024), "INT")
REPEATS = (whole_number(1, 100_000), "INT")
BOOL, AUTO, TIMES = (str2bool, "True|False"), (bool_or_auto, "True|False|auto"), (time_list, "K")
REQUIRED = object()  # in place of a default


@dataclass(frozen=True)
class Flag:
    """A command-line flag.

    Attributes:
        kind: type of the value, and its placeholder in --help.
        help: description, without the default.
        default: default value, or REQUIRED.
        empty: meaning of an empty default.
        choices, nargs, action: see `argparse.ArgumentParser.add_argument`.
    """

    kind: tuple[Callable[[str], Any], str]
    help: str
    default: Any = ""
    empty: str = ""
    choices: Sequence[str] | None = None
    nargs: str | None = None
    action: Any = "store"

    def add_to(self, group: argparse._ActionsContainer, name: str) -> None:
        """Add the flag to a parser, or to a group of its flags."""
        options = {"required": True} if self.default is REQUIRED else {"default": self.default}
        if self.nargs:
            options["nargs"] = self.nargs
        kind, metavar = self.kind
        options |= {"choices": self.choices} if self.choices else {}
        options |= {"metavar": metavar} if self.nargs or not self.choices else {}
        group.add_argument(f"--{name}", type=kind, action=self.action, help=self._text(), **options)

    def _text(self) -> str:
        if self.default is REQUIRED or self.default in ("", None, []):
            shown = self.empty
        else:
            shown = " ".join(map(str, self.default)) if isinstance(self.default, list) else str(self.default)
        return f"{self.help} (default: {shown})" if shown else self.help


FLAGS = {
    # The model
    "image_size": Flag(POSITIVE, "side of the square images, in pixels"),
    "large_size": Flag(POSITIVE, "side of the upsampler's output, in pixels"),
    "small_size": Flag(INT, "side of the upsampler's input, in pixels"),
    "num_channels": Flag(POSITIVE, "channels of the U-Net's first level, before channel_mult"),
    "num_res_blocks": Flag(POSITIVE, "residual blocks per resolution level"),
    "num_heads": Flag(INT, "attention heads; ignored if num_head_channels is given"),
    "num_heads_upsample": Flag(INT, "attention heads in the decoder; -1: num_heads"),
    "num_head_channels": Flag(INT, "channels per attention head; -1: given by num_heads"),
    "attention_resolutions": Flag(TEXT, "image sizes with attention, in pixels, separated by commas", empty="none"),
    "channel_mult": Flag(
        TEXT, "channel multiplier of each resolution level, separated by commas", empty="given by the image size"
    ),
    "dropout": Flag(FLOAT, "dropout probability in the residual blocks; no effect when sampling"),
    "class_cond": Flag(BOOL, "class-conditional model"),
    "use_checkpoint": Flag(BOOL, "recompute activations in the backward pass, to save memory"),
    "use_scale_shift_norm": Flag(BOOL, "time embedding scales and shifts activations, instead of being added"),
    "resblock_updown": Flag(BOOL, "residual blocks change the resolution, instead of plain convolutions"),
    "use_fp16": Flag(BOOL, "half precision in the U-Net: float16 on a GPU, bfloat16 on a CPU that supports it"),
    "use_new_attention_order": Flag(BOOL, "channels of q, k and v ordered by q, k, v first, then by head"),
    "model_path": Flag(FILE, "checkpoint of the model; untrained: random weights, for a trial"),
    # The diffusion
    "learn_sigma": Flag(BOOL, "model also predicts the variance: 6 output channels instead of 3"),
    "diffusion_steps": Flag(POSITIVE, "number of diffusion steps in training", 1000),
    "noise_schedule": Flag(TEXT, "noise schedule: linear or cosine"),
    "timestep_respacing": Flag(
        TEXT, "number of steps N after respacing; also ddimN, or steps per equal section: 10,15,20", empty="all steps"
    ),
    "use_kl": Flag(BOOL, "train on the variational bound instead of the mean squared error"),
    "predict_xstart": Flag(BOOL, "model predicts the image instead of the noise"),
    "rescale_timesteps": Flag(BOOL, "scale the model's timesteps to 0..1000"),
    "rescale_learned_sigmas": Flag(BOOL, "rescale the variational term when training with learned variances"),
    # The classifier of noisy images
    "classifier_use_fp16": Flag(BOOL, "half precision in the classifier", False),
    "classifier_width": Flag(POSITIVE, "channels of the classifier's first level"),
    "classifier_depth": Flag(POSITIVE, "residual blocks per resolution level of the classifier"),
    "classifier_attention_resolutions": Flag(
        TEXT, "image sizes with attention in the classifier, in pixels, separated by commas", empty="none"
    ),
    "classifier_use_scale_shift_norm": Flag(BOOL, "time embedding scales and shifts the classifier's activations"),
    "classifier_resblock_updown": Flag(BOOL, "the classifier's residual blocks change the resolution"),
    "classifier_channel_mult": Flag(
        TEXT, "channel multiplier of each level of the classifier, separated by commas", empty="given by image_size"
    ),
    "classifier_pool": Flag(TEXT, "pooling of the classifier: adaptive, attention, spatial or spatial_v2"),
    "classifier_path": Flag(FILE, "checkpoint of the classifier; untrained: random weights, for a trial"),
    "classifier_scale": Flag(FLOAT, "factor of the classifier's gradient", 1.0),
    # The classifier of images
    "classifier_name": Flag(
        NAME,
        "torchvision's name of the classifier; or package.module:function of your own, returning (network, preprocess)",
        "convnext_base",
    ),
    "layers": Flag(
        (str, "PATTERNS"),
        "layers to measure, separated by commas: names or patterns such as features.1.*",
        empty="stem, residual or transformer blocks, layers between stages, logits",
    ),
    "normalization": Flag(
        TEXT,
        "std: activations minus mean, divided by the standard deviation, as in the paper; rms: divided by the root of "
        "the second moment, as in the released code; none: raw activations",
        "std",
        choices=("std", "rms", "none"),
    ),
    # Images and classes
    "data_dir": Flag(FOLDER, "images, including those in subfolders"),
    "starting_data_dir": Flag(FOLDER, "starting images, including those in subfolders"),
    "labels_file": Flag(
        FILE,
        "classes of images whose names do not give them: LOC_val_solution.csv; lines of file name and wnid or class "
        "index (0..999); or one wnid or ILSVRC2012_ID per line",
    ),
    "class_order": Flag(
        TEXT,
        "order of classes other than ImageNet's: names sorted as text (0, 1, 10, 2), or as numbers (0, 1, 2, 10)",
        empty="as recorded with the checkpoint, else text",
        choices=("text", "number"),
    ),
    "classes": Flag(
        (str, "CLASS"),
        "classes to sample, uniformly: names or indices, separated by spaces or commas; wnids for ImageNet",
        [],
        empty="all training classes recorded with the checkpoint, else 0..999",
        nargs="+",
    ),
    "num_classes": Flag(POSITIVE, "number of classes to take, in index order; ignored if classes are unknown", 10),
    "num_per_class": Flag(POSITIVE, "images per class, sorted by name; ignored if classes are unknown", 10),
    "num_samples": Flag(POSITIVE, "number of images", 10000, "no limit"),
    "base_samples": Flag(FILE, "small images: .npz with arr_0, uint8 (N, H, W, 3), and classes arr_1 for class_cond"),
    # The forward-backward experiment
    "step_reverse": Flag(
        TIMES,
        "steps k to noise and denoise, 0..N; one or more, separated by spaces or commas",
        REQUIRED,
        nargs="+",
        action=Flattened,
    ),
    "time_series": Flag(
        TIMES,
        "values of step_reverse, separated by spaces or commas",
        REQUIRED,
        nargs="+",
        action=Flattened,
    ),
    "num_trajectories": Flag(
        REPEATS, "samples of each image at each time, with independent noise; a later run may ask for more", 1
    ),
    "share_noise": Flag(
        TEXT,
        "start: all samples of an image at a time start from the same x_k, and differ only in the noise of the "
        "denoising steps",
        empty="independent noise",
        choices=("start",),
    ),
    "num_turns": Flag(
        REPEATS,
        "consecutive U-turns, each starting from the sample that the previous one saved; a later run may ask for more",
        1,
    ),
    "clip_denoised": Flag(BOOL, "clip the predicted image to the pixel range at every step", True),
    "sampler": Flag(
        TEXT,
        "ddpm; ddim, which adds no noise; or sde-dpmsolver++, of second order, for 40 to 60 steps",
        empty="ddpm",
        choices=tuple(SAMPLERS),
    ),
    "use_ddim": Flag(BOOL, "the same as --sampler ddim", False),
    "image_format": Flag(TEXT, "file format of the samples", "jpeg", choices=("jpeg", "png")),
    "jpeg_quality": Flag((whole_number(1, 100), "INT"), "JPEG quality of the samples, 1..100", 95),
    # Training
    "val_data_dir": Flag(FOLDER, "validation images", empty="none"),
    "schedule_sampler": Flag(TEXT, "sampling of timesteps: uniform or loss-second-moment", "uniform"),
    "lr": Flag(FLOAT, "learning rate of AdamW", 1e-4),
    "weight_decay": Flag(FLOAT, "weight decay of AdamW", 0.0),
    "lr_anneal_steps": Flag(NATURAL, "steps over which lr decays linearly to 0, ending training; 0: constant lr", 0),
    "anneal_lr": Flag(BOOL, "decay lr linearly to 0 over the iterations", False),
    "iterations": Flag(NATURAL, "number of training steps; 0: no limit", 0),
    "microbatch": Flag(INT, "images per forward and backward pass, to save memory; -1: batch_size", -1),
    "ema_rate": Flag(TEXT, "decay rates of moving averages of the weights, separated by commas", "0.9999", "none"),
    "log_interval": Flag(POSITIVE, "steps averaged in each line of progress.csv", 10),
    "save_interval": Flag(POSITIVE, "steps between checkpoints", 10000),
    "eval_interval": Flag(POSITIVE, "steps between validation batches", 5),
    "resume_checkpoint": Flag(
        FILE, "modelNNNNNN.pt, with the files beside it, to start a new run from; an interrupted run needs no flag"
    ),
    "fp16_scale_growth": Flag(FLOAT, "growth per step of log2 of float16's loss scale", 1e-3),
    "half_precision": Flag(
        TEXT,
        "dtype of half precision in training; auto: float16 on a GPU, bfloat16 on a CPU that supports it",
        "auto",
        choices=("auto", "float16", "bfloat16"),
    ),
    "random_crop": Flag(BOOL, "random instead of center crops", False),
    "random_flip": Flag(BOOL, "flip half of the images horizontally", True),
    "noised": Flag(BOOL, "train the classifier on noised images", True),
    "sample_grid": Flag(NATURAL, "samples drawn with every checkpoint; 0: none", 16),
    "sample_steps": Flag(POSITIVE, "DDIM steps of these samples", 50),
    # The run
    "output": Flag(FOLDER, "folder for results", empty="$OPENAI_LOGDIR, else a folder in results/"),
    "seed": Flag(SEED, "seed of all random numbers", 0),
    "batch_size": Flag(POSITIVE, "images per batch, on each process", 16),
    "num_workers": Flag(THREADS, "workers that read images ahead, for each process; 0: none", 4),
    "num_threads": Flag(THREADS, "CPU threads per process; 0: an equal share of the cores", 0),
    "device": Flag(TEXT, "where to compute; auto: GPU if there is one", "auto", choices=("auto", "cpu", "cuda")),
    "compile": Flag(AUTO, "compile the network; auto: in long runs on a GPU", "auto"),
    "shard": Flag((whole_number(0), "I"), "index of this job, 0..num_shards-1, such as $SLURM_ARRAY_TASK_ID", 0),
    "num_shards": Flag((whole_number(1), "N"), "number of jobs that divide the work, with otherwise equal flags", 1),
}


# What several scripts have in common.
SAMPLING = (
    *("model_path", "num_samples", "batch_size", "clip_denoised", "sampler", "use_ddim"),
    *("output", "seed", "num_threads"),
)
TRAINING_IMAGES = ("data_dir", "labels_file", "class_order", "random_crop", "random_flip", "num_workers")
TRAINING = (
    *("lr", "weight_decay", "batch_size", "microbatch", "iterations", "log_interval", "save_interval"),
    *("resume_checkpoint", "half_precision", "fp16_scale_growth", "compile", "output", "seed", "num_threads"),
)
TRAINING_DIFFUSION = ("schedule_sampler", "lr_anneal_steps", "ema_rate", "sample_grid", "sample_steps")
CLASSIFYING = ("classifier_name", "classifier_path", "layers", "classifier_use_fp16")
SAMPLES_DIR = Flag(FOLDER, "samples: --output of forward_backward_dataset_sample.py")  # as --data_dir
CONVENTION = Flag(  # of scripts that compute chi
    TEXT,
    "pairs of tokens in chi: all; or half, i <= j, as in the authors' notebook, which gives (1 + chi) / 2",
    "all",
    choices=("all", "half"),
)
RUN = ("output", "batch_size", "num_workers", "num_threads", "shard", "num_shards")


def flag(name: str, **changes: Any) -> Flag:
    """A flag of the table with other attributes, for `add_flags`."""
    return replace(FLAGS[name], **changes)


def add_flags(group: argparse._ActionsContainer, names: Iterable[str] | Mapping[str, Any], **defaults: Any) -> None:
    """Add flags to a parser, or to a group of its flags.

    Args:
        group: parser or group.
        names: names of flags, possibly with their defaults.
        defaults: defaults of this script, by name; or a `Flag` in place of that of the table. Names that are not in
            `names` follow them.
    """
    defaults = {**(names if isinstance(names, Mapping) else {}), **defaults}
    for name in dict.fromkeys([*names, *defaults]):
        value = defaults.get(name, FLAGS.get(name))
        (value if isinstance(value, Flag) else flag(name, default=value)).add_to(group, name)
