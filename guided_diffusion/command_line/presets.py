"""Flags of guided-diffusion's published checkpoints, for --preset NAME."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from .flags import Flag


class Preset(NamedTuple):
    """Kind and command-line flags of a checkpoint's network."""

    kind: str  # "diffusion model", "classifier" or "upsampler"
    flags: str


# The flags that all diffusion models and upsamplers have in common.
COMMON = "--diffusion_steps 1000 --learn_sigma True --resblock_updown True --use_scale_shift_norm True"
LEVELS = "--attention_resolutions 32,16,8"
HEADS = "--num_head_channels 64"


def _model(flags: str) -> Preset:
    return Preset("diffusion model", f"{COMMON} {LEVELS} {flags}")


PRESETS = {
    "64x64_classifier": Preset("classifier", "--image_size 64 --classifier_depth 4"),
    "64x64_diffusion": _model(
        f"--image_size 64 --class_cond True --num_channels 192 --num_res_blocks 3 {HEADS} --dropout 0.1 "
        "--noise_schedule cosine --use_new_attention_order True --use_fp16 True"
    ),
    "128x128_classifier": Preset("classifier", "--image_size 128"),
    "128x128_diffusion": _model("--image_size 128 --class_cond True --num_channels 256 --num_heads 4 --use_fp16 True"),
    "256x256_classifier": Preset("classifier", "--image_size 256"),
    "256x256_diffusion": _model(f"--image_size 256 --class_cond True --num_channels 256 {HEADS} --use_fp16 True"),
    "256x256_diffusion_uncond": _model(f"--image_size 256 --num_channels 256 {HEADS} --use_fp16 True"),
    "512x512_classifier": Preset("classifier", "--image_size 512"),
    "512x512_diffusion": _model(f"--image_size 512 --class_cond True --num_channels 256 {HEADS}"),
    "64_256_upsampler": Preset(
        "upsampler",
        f"{COMMON} {LEVELS} --large_size 256 --small_size 64 --class_cond True --num_channels 192 --num_heads 4 "
        "--use_fp16 True",
    ),
    "128_512_upsampler": Preset(
        "upsampler",
        f"{COMMON} --attention_resolutions 32,16 --large_size 512 --small_size 128 --class_cond True "
        f"--num_channels 192 {HEADS} --use_fp16 True",
    ),
    "lsun_bedroom": _model(f"--image_size 256 --num_channels 256 {HEADS} --dropout 0.1 --use_fp16 True"),
}


def preset_flag(*kinds: str) -> Flag:
    """The flag --preset of a script that builds networks of these kinds. `ArgumentParser` expands it."""
    names = ", ".join(name for name, preset in PRESETS.items() if preset.kind in kinds)
    several = "; one of each kind, separated by commas" if len(kinds) > 1 else ""
    text = f"flags of a published checkpoint, which other flags override{several}: {names}"
    return Flag((_preset_names(kinds), "NAME"), text, None)


def _preset_names(kinds: Sequence[str]) -> Callable[[str], str]:
    """The type of the flag: presets of these kinds, separated by commas."""

    def parse(text: str) -> str:
        for name in text.split(","):
            if name not in PRESETS:
                close = difflib.get_close_matches(name, PRESETS, n=1)
                advice = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(PRESETS)}"
                raise argparse.ArgumentTypeError(f"there is no preset {name!r}: {advice}")
            if (kind := PRESETS[name].kind) not in kinds:
                raise argparse.ArgumentTypeError(f"{name} is a preset for {kind}s, not for {'s or '.join(kinds)}s")
        return text

    return parse


def preset_words(words: Sequence[str]) -> list[str]:
    """The flags of the presets named on a command line, to be put before its other flags."""
    values = [value for flag, value in pairwise(words) if flag == "--preset"]
    values += [word.partition("=")[2] for word in words if word.startswith("--preset=")]
    names = values[-1].split(",") if values else []
    return [word for name in names if name in PRESETS for word in PRESETS[name].flags.split()]
