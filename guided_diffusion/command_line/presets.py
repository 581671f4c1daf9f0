"""The published checkpoints of guided-diffusion and their flags, for --preset NAME."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple


class Preset(NamedTuple):
    """What a checkpoint contains, and its flags, as on a command line."""

    kind: str  # "diffusion model", "classifier" or "upsampler"
    flags: str


PRESETS = {
    "64x64_classifier": Preset(
        "classifier",
        "--image_size 64 --classifier_depth 4",
    ),
    "64x64_diffusion": Preset(
        "diffusion model",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 "
        "--image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 192 "
        "--num_head_channels 64 --num_res_blocks 3 --resblock_updown True --use_new_attention_order True "
        "--use_fp16 True --use_scale_shift_norm True",
    ),
    "128x128_classifier": Preset(
        "classifier",
        "--image_size 128",
    ),
    "128x128_diffusion": Preset(
        "diffusion model",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 "
        "--learn_sigma True --noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 "
        "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    ),
    "256x256_classifier": Preset(
        "classifier",
        "--image_size 256",
    ),
    "256x256_diffusion": Preset(
        "diffusion model",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 256 "
        "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 "
        "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    ),
    "256x256_diffusion_uncond": Preset(
        "diffusion model",
        "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --image_size 256 "
        "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 "
        "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    ),
    "512x512_classifier": Preset(
        "classifier",
        "--image_size 512",
    ),
    "512x512_diffusion": Preset(
        "diffusion model",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 512 "
        "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 "
        "--num_res_blocks 2 --resblock_updown True --use_fp16 False --use_scale_shift_norm True",
    ),
    "64_256_upsampler": Preset(
        "upsampler",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --large_size 256 "
        "--small_size 64 --learn_sigma True --noise_schedule linear --num_channels 192 --num_heads 4 "
        "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    ),
    "128_512_upsampler": Preset(
        "upsampler",
        "--attention_resolutions 32,16 --class_cond True --diffusion_steps 1000 --large_size 512 "
        "--small_size 128 --learn_sigma True --noise_schedule linear --num_channels 192 "
        "--num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_fp16 True "
        "--use_scale_shift_norm True",
    ),
    "lsun_bedroom": Preset(
        "diffusion model",
        "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --dropout 0.1 "
        "--image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256 "
        "--num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_fp16 True "
        "--use_scale_shift_norm True",
    ),
}


def add_preset(parser: argparse._ActionsContainer, *kinds: str) -> None:
    """Add the flag --preset of a script that builds networks of these kinds; `ArgumentParser` puts the flags in."""
    names = ", ".join(name for name, preset in PRESETS.items() if preset.kind in kinds)
    several = "; one of each kind, separated by commas" if len(kinds) > 1 else ""
    parser.add_argument(
        "--preset",
        type=_names_of(kinds),
        metavar="NAME",
        help=f"take the flags of a published checkpoint{several}: {names}. Other flags override them, in any order",
    )


def _names_of(kinds: Sequence[str]) -> Callable[[str], str]:
    """The type of the flag: names of presets of these kinds."""

    def read(text: str) -> str:
        for name in text.split(","):
            if name not in PRESETS:
                close = difflib.get_close_matches(name, PRESETS, n=1)
                advice = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(PRESETS)}"
                raise argparse.ArgumentTypeError(f"there is no preset {name!r}: {advice}")
            if PRESETS[name].kind not in kinds:
                kind, expected = PRESETS[name].kind, " or ".join(kinds)
                raise argparse.ArgumentTypeError(
                    f"{name} is the preset of a kind that is not built here, {kind}; expected {expected}"
                )
        return text

    return read


def preset_words(words: Sequence[str]) -> list[str]:
    """The flags of the presets that a command line names, for the beginning of that command line."""
    values = [value for flag, value in pairwise(words) if flag == "--preset"]
    values += [word.partition("=")[2] for word in words if word.startswith("--preset=")]
    names = values[-1].split(",") if values else []
    return [word for name in names if name in PRESETS for word in PRESETS[name].flags.split()]
