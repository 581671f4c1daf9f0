"""The published defaults of networks and diffusions, and factories that build them from flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from . import gaussian_diffusion as gd
from .command_line.flags import str2bool
from .errors import UserError
from .respace import SpacedDiffusion, space_timesteps
from .unet import EncoderUNetModel, SuperResModel, UNetModel

NUM_CLASSES = 1000

# Channel multipliers of the published models, one per resolution level, by image size.
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}


def diffusion_defaults() -> dict[str, Any]:
    """Flags of a diffusion, with the published defaults."""
    return {
        "learn_sigma": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
    }


def model_defaults() -> dict[str, Any]:
    """Flags of a U-Net, with the published defaults."""
    return {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
    }


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of an image diffusion model."""
    return {**model_defaults(), **diffusion_defaults()}


def classifier_defaults() -> dict[str, Any]:
    """Flags of a classifier of noisy images."""
    return {
        "image_size": 64,
        "classifier_use_fp16": False,
        "classifier_width": 128,
        "classifier_depth": 2,
        "classifier_attention_resolutions": "32,16,8",
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
        "classifier_channel_mult": "",
    }


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of a classifier of noisy images and of the diffusion."""
    return {**classifier_defaults(), **diffusion_defaults()}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of an upsampler: those of a diffusion model, with two image sizes instead of one."""
    absent = ("image_size", "use_new_attention_order")
    flags = {name: value for name, value in model_and_diffusion_defaults().items() if name not in absent}
    return {"large_size": 256, "small_size": 64, **flags}


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    use_new_attention_order: bool,
) -> tuple[UNetModel, SpacedDiffusion]:
    """Build a model and a diffusion from the flags of `model_and_diffusion_defaults`. Raises UserError."""
    flags = locals()
    return model_from_flags(flags), diffusion_from_flags(flags)


def sr_create_model_and_diffusion(
    large_size: int,
    small_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    channel_mult: str = "",
) -> tuple[SuperResModel, SpacedDiffusion]:
    """Build an upsampler and a diffusion from the flags of `sr_model_and_diffusion_defaults`. Raises UserError."""
    flags = locals()
    of_model = sr_model_and_diffusion_defaults().keys() - diffusion_defaults().keys() | {"learn_sigma"}
    return sr_create_model(**{name: flags[name] for name in of_model}), diffusion_from_flags(flags)


def create_classifier_and_diffusion(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    learn_sigma: bool,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    classifier_channel_mult: str = "",
) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """Build a classifier and a diffusion from the flags of `classifier_and_diffusion_defaults`. Raises UserError."""
    flags = locals()
    return create_classifier(**{name: flags[name] for name in classifier_defaults()}), diffusion_from_flags(flags)


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
) -> UNetModel:
    """Build the U-Net of a diffusion model. Raises UserError."""
    multipliers = channel_multipliers(channel_mult, image_size, num_channels)
    check_dropout(dropout)
    return UNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=downsampling_factors(image_size, attention_resolutions),
        dropout=dropout,
        channel_mult=multipliers,
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    resblock_updown: bool,
    use_fp16: bool,
    channel_mult: str = "",
) -> SuperResModel:
    """Build an upsampler from images of `small_size` to images of `large_size`. Raises UserError."""
    if not 1 <= small_size <= large_size:
        raise UserError(f"--small_size {small_size}: expected 1 to {large_size} (--large_size)")
    if large_size == 512 and not channel_mult:  # the published 512-pixel upsampler has the multipliers of 256 pixels
        channel_mult = ",".join(map(str, CHANNEL_MULT[256]))
    multipliers = channel_multipliers(channel_mult, large_size, num_channels, {"image_size": "large_size"})
    check_dropout(dropout)
    return SuperResModel(
        image_size=large_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=downsampling_factors(large_size, attention_resolutions),
        dropout=dropout,
        channel_mult=multipliers,
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
    )


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    classifier_channel_mult: str = "",
) -> EncoderUNetModel:
    """Build a classifier of noisy images: the encoder of the U-Net, pooled to 1000 logits. Raises UserError."""
    names = {"num_channels": "classifier_width", "channel_mult": "classifier_channel_mult"}
    multipliers = channel_multipliers(classifier_channel_mult, image_size, classifier_width, names)
    factors = downsampling_factors(image_size, classifier_attention_resolutions, "classifier_attention_resolutions")
    for level, multiplier in enumerate(multipliers):
        attention = 2**level in factors or level == len(multipliers) - 1
        if attention and int(multiplier * classifier_width) % 64:
            raise UserError(
                f"--classifier_width {classifier_width} times the multiplier {multiplier} is not a multiple of 64, as "
                f"attention at {image_size // 2**level} pixels needs (--classifier_attention_resolutions; the last "
                "level always has attention)"
            )
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=classifier_width,
        out_channels=NUM_CLASSES,
        num_res_blocks=classifier_depth,
        attention_resolutions=factors,
        channel_mult=multipliers,
        use_fp16=classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def model_from_flags(flags: Mapping[str, Any]) -> UNetModel:
    """Build a U-Net from the flags of `model_defaults` and learn_sigma. Raises UserError."""
    return create_model(**{name: flags[name] for name in [*model_defaults(), "learn_sigma"]})


def diffusion_from_flags(flags: Mapping[str, Any]) -> SpacedDiffusion:
    """Build a diffusion from the flags of `diffusion_defaults`. Raises UserError."""
    chosen = {name: flags[name] for name in diffusion_defaults()}
    return create_gaussian_diffusion(steps=chosen.pop("diffusion_steps"), **chosen)


def number_of_steps(diffusion_steps: int, timestep_respacing: str) -> int:
    """N, the number of steps after respacing. Raises UserError."""
    return len(space_timesteps(diffusion_steps, timestep_respacing or [diffusion_steps]))


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str = "",
) -> SpacedDiffusion:
    """Build a diffusion of `steps` steps, respaced unless `timestep_respacing` is empty.

    Raises UserError for an unknown schedule or an invalid respacing.
    """
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = gd.LossType.RESCALED_MSE
    else:
        loss_type = gd.LossType.MSE

    if learn_sigma:
        variance = gd.ModelVarType.LEARNED_RANGE
    elif sigma_small:
        variance = gd.ModelVarType.FIXED_SMALL
    else:
        variance = gd.ModelVarType.FIXED_LARGE

    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=variance,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def channel_multipliers(
    given: str, image_size: int, num_channels: int, names: Mapping[str, str] | None = None
) -> tuple[float, ...]:
    """The channel multiplier of each resolution level.

    Args:
        given: value of --channel_mult, numbers separated by commas; empty: the published ones for this size.
        image_size: side of the images, in pixels; halved at every level but the last.
        num_channels: channels before multiplication.
        names: this network's names of the flags image_size, num_channels and channel_mult, if different.

    Raises UserError if this size has no default, or does not fit the multipliers, or the channels do not.
    """
    size, width, flag = ((names or {}).get(name, name) for name in ("image_size", "num_channels", "channel_mult"))
    if not given and image_size not in CHANNEL_MULT:
        halvings = next(n for n in (2, 1, 0) if image_size % 2**n == 0)
        raise UserError(
            f"--{size} {image_size} has no default channel multipliers, unlike "
            f"{', '.join(map(str, sorted(CHANNEL_MULT)))}. Give --{flag}, for instance {'1,2,2'[: 1 + 2 * halvings]}"
        )
    multipliers = numbers(given, flag, "1,2,2") if given else CHANNEL_MULT[image_size]
    if not multipliers or min(multipliers) <= 0:
        raise UserError(f"--{flag} {given}: expected numbers above 0, separated by commas, such as 1,2,2")
    halved = 2 ** (len(multipliers) - 1)
    if image_size % halved:
        raise UserError(
            f"--{size} {image_size} is not a multiple of {halved}, as the {len(multipliers)} levels of --{flag} "
            f"{','.join(map(str, multipliers))} need"
        )
    for multiplier in multipliers:
        if int(multiplier * num_channels) % 32 or int(multiplier * num_channels) <= 0:
            raise UserError(
                f"--{width} {num_channels} times the multiplier {multiplier} is not a multiple of 32, as group "
                f"normalisation needs (--{flag})"
            )
    return multipliers


def check_dropout(dropout: float) -> None:
    """Raise UserError unless `dropout` is a probability."""
    if not 0 <= dropout <= 1:
        raise UserError(f"--dropout {dropout}: expected a probability, from 0 to 1")


def downsampling_factors(image_size: int, resolutions: str, flag: str = "attention_resolutions") -> tuple[int, ...]:
    """Downsampling factors at which there is attention, for image sizes such as "32,16,8", the value of `flag`."""
    sides = numbers(resolutions, flag)
    return tuple(int(image_size // side) for side in sides if side > 0)


def numbers(text: str, flag: str, example: str = "32,16,8") -> tuple[float, ...]:
    """Parse numbers separated by commas, the value of `flag`. Raises UserError."""
    try:
        return tuple(float(n) if "." in n else int(n) for n in str(text).split(",") if n.strip())
    except ValueError:
        raise UserError(f"--{flag} {text}: expected numbers separated by commas, such as {example}") from None


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """Add a flag for every entry, of the type of its default; None stands for text.

    For other people's scripts. Our own take their flags from `command_line.flags`.
    """
    for name, default in default_dict.items():
        kind = str2bool if isinstance(default, bool) else str if default is None else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys) -> dict[str, Any]:
    """The given attributes of `args` as a dictionary."""
    return {key: getattr(args, key) for key in keys}
