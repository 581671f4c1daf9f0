"""Command-line flags, and the factories that turn them into models and diffusions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from . import gaussian_diffusion as gd
from .command_line.parser import whole_number
from .errors import UserError
from .respace import SpacedDiffusion, space_timesteps
from .unet import EncoderUNetModel, SuperResModel, UNetModel

NUM_CLASSES = 1000

# Channel multipliers, one per resolution level, of the published models.
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}

HELP = {
    "image_size": "side of the square images, in pixels",
    "large_size": "side of the images that the upsampler makes, in pixels",
    "small_size": "side of the images that the upsampler is given, in pixels",
    "num_channels": "channels of the U-Net at its first level, before channel_mult",
    "num_res_blocks": "residual blocks per resolution level",
    "num_heads": "attention heads; not used where num_head_channels is given",
    "num_heads_upsample": "attention heads in the decoder; -1: as num_heads",
    "num_head_channels": "channels per attention head; -1: num_heads decides",
    "attention_resolutions": "image sides in pixels at which the U-Net has attention, separated by commas",
    "channel_mult": "channel multiplier of each resolution level, separated by commas; empty: chosen by the image size",
    "dropout": "probability of dropout in the residual blocks; no effect when sampling",
    "class_cond": "whether the model is conditioned on the class of the image",
    "use_checkpoint": "recompute activations in the backward pass, to save memory in training",
    "use_scale_shift_norm": "whether the time embedding scales and shifts the activations (else it is added)",
    "resblock_updown": "whether residual blocks change the resolution (else plain convolutions do)",
    "use_fp16": "half precision inside the U-Net: float16 on a GPU, bfloat16 on a CPU that has instructions for it",
    "use_new_attention_order": "whether attention weights are stored as q, k, v first and heads second",
    "learn_sigma": "whether the model predicts the variance too (6 output channels instead of 3)",
    "diffusion_steps": "number of diffusion steps that the model was trained with",
    "noise_schedule": "schedule of the noise variances: linear or cosine",
    "timestep_respacing": "number of steps N that replace diffusion_steps; also ddimN, or a list such as 10,15,20 of "
    "steps in equal sections; empty: all steps",
    "use_kl": "train on the variational bound instead of the mean squared error",
    "predict_xstart": "whether the model predicts the image instead of the noise",
    "rescale_timesteps": "whether the model is given time steps scaled to 0..1000",
    "rescale_learned_sigmas": "scale the variational term when training with learned variances",
    "classifier_use_fp16": "half precision inside the classifier",
    "classifier_width": "channels of the classifier at its first level",
    "classifier_depth": "residual blocks per resolution level of the classifier",
    "classifier_attention_resolutions": "image sides in pixels at which the classifier has attention",
    "classifier_use_scale_shift_norm": "whether the time embedding scales and shifts the classifier's activations",
    "classifier_resblock_updown": "whether the classifier's residual blocks change the resolution",
    "classifier_channel_mult": "channel multiplier of each of the classifier's resolution levels, separated by commas; "
    "empty: chosen by image_size",
    "classifier_pool": "how the classifier pools its features: adaptive, attention, spatial or spatial_v2",
    "data_dir": "folder of images; its subfolders are looked through",
    "labels_file": "classes of the images if their names do not give them: LOC_val_solution.csv; lines of a file name "
    "and a wnid or a class index (0..999); or a wnid or an ILSVRC2012_ID per line",
    "output": "folder of results; empty: the one that OPENAI_LOGDIR names, else a folder in results/",
    "seed": "seed of all random numbers",
    "num_workers": "worker processes, for each process, that read images ahead; 0: none",
    "num_threads": "CPU threads per process that compute; 0: the cores, divided among the processes",
    "batch_size": "images per process and step",
    "microbatch": "images per forward and backward pass, to save memory; -1: all of batch_size",
    "schedule_sampler": "how training chooses time steps: uniform or loss-second-moment",
    "lr": "learning rate of AdamW",
    "weight_decay": "weight decay of AdamW",
    "lr_anneal_steps": "steps in which the learning rate falls linearly to 0, where training ends; 0: constant",
    "anneal_lr": "whether the learning rate falls linearly to 0 over the iterations",
    "iterations": "number of steps after which training ends; 0: no end",
    "ema_rate": "decay of the moving averages of the weights, one number or several separated by commas",
    "log_interval": "steps between two lines of progress.csv, of which each is the mean since the last",
    "save_interval": "steps between two checkpoints",
    "resume_checkpoint": "modelNNNNNN.pt to begin a new run with, and the files beside it; a run in output is resumed "
    "without this flag",
    "fp16_scale_growth": "growth of the binary logarithm of float16's loss scale per step",
    "random_crop": "whether training sees random squares of the images (else the middle square)",
    "random_flip": "whether training sees half of the images mirrored",
    "sample_grid": "number of images in the sample grid that is drawn with every checkpoint; 0: none",
    "sample_steps": "DDIM steps of the sample grid's images",
    "clip_denoised": "keep the predicted image within the range of pixels at every step",
    "num_samples": "number of images",
    "use_ddim": "sample with DDIM, without noise on the way",
    "model_path": "the model's checkpoint; the word untrained gives a network with random weights, to try things out",
    "classifier_path": "the classifier's checkpoint",
    "classifier_scale": "factor of the classifier's gradient",
    "base_samples": "the small images, as .npz: arr_0 (N, H, W, 3) of uint8, and arr_1, the classes, for class_cond",
    "val_data_dir": "folder of validation images; empty: none",
    "noised": "whether the classifier is trained on noised images",
    "eval_interval": "steps between two batches of validation",
}

# The least value of a flag, where there is one.
LEAST = {
    "batch_size": 1,
    "classifier_depth": 1,
    "classifier_width": 1,
    "diffusion_steps": 1,
    "eval_interval": 1,
    "image_size": 1,
    "iterations": 0,
    "large_size": 1,
    "log_interval": 1,
    "lr_anneal_steps": 0,
    "num_channels": 1,
    "num_res_blocks": 1,
    "num_samples": 1,
    "num_threads": 0,
    "num_workers": 0,
    "sample_grid": 0,
    "sample_steps": 1,
    "save_interval": 1,
    "seed": 0,
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


def training_defaults() -> dict[str, Any]:
    """Flags of training a diffusion model: the published ones with their defaults, then our own."""
    return {
        "data_dir": "",
        "schedule_sampler": "uniform",
        "lr": 1e-4,
        "weight_decay": 0.0,
        "lr_anneal_steps": 0,
        "batch_size": 1,
        "microbatch": -1,
        "ema_rate": "0.9999",
        "log_interval": 10,
        "save_interval": 10000,
        "resume_checkpoint": "",
        "fp16_scale_growth": 1e-3,
        "iterations": 0,
        "output": "",
        "seed": 0,
        "labels_file": "",
        "random_crop": False,
        "random_flip": True,
        "num_workers": 2,
        "num_threads": 0,
        "sample_grid": 16,
        "sample_steps": 50,
    }


def sampling_defaults() -> dict[str, Any]:
    """Flags of sampling from a diffusion model: the published ones with their defaults, then our own."""
    return {
        "model_path": "",
        "num_samples": 10000,
        "batch_size": 16,
        "clip_denoised": True,
        "use_ddim": False,
        "output": "",
        "seed": 0,
        "num_threads": 0,
    }


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
    """Flags of a classifier and of the diffusion whose images it reads."""
    return {**classifier_defaults(), **diffusion_defaults()}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of an upsampler: those of a diffusion model, with two image sizes instead of one."""
    flags = model_and_diffusion_defaults()
    for absent in ("image_size", "use_new_attention_order"):
        del flags[absent]
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
    """Build the model and the diffusion that `model_and_diffusion_defaults` describes; see `HELP` for the flags.

    Raises UserError where the flags describe no network or no diffusion.
    """
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
    """Build the upsampler and the diffusion that `sr_model_and_diffusion_defaults` describes; see `HELP` for the flags.

    Raises UserError where the flags describe no network or no diffusion.
    """
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
    """Build the classifier and the diffusion that `classifier_and_diffusion_defaults` describes; see `HELP`.

    Raises UserError where the flags describe no network or no diffusion.
    """
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
    """Build the U-Net of a diffusion model; see `HELP` for the flags.

    Raises UserError where the flags describe no network.
    """

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
    """Build an upsampler from `small_size` to `large_size`; the former is the size of the images that it is given.

    Raises UserError where the flags describe no network.
    """

    if not 1 <= small_size <= large_size:
        raise UserError(f"--small_size {small_size}: expected a side from 1 to --large_size, {large_size}")
    names = {"image_size": "large_size"}
    if large_size == 512 and not channel_mult:  # the published upsamplers to 512 pixels have the levels of those to 256
        channel_mult = ",".join(map(str, CHANNEL_MULT[256]))
    multipliers = channel_multipliers(channel_mult, large_size, num_channels, names)
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
    """Build a classifier of noisy images: the encoder half of the U-Net, with a pooled output of 1000 logits.

    Raises UserError where the flags describe no network.
    """

    names = {"num_channels": "classifier_width", "channel_mult": "classifier_channel_mult"}
    multipliers = channel_multipliers(classifier_channel_mult, image_size, classifier_width, names)
    factors = downsampling_factors(image_size, classifier_attention_resolutions, "classifier_attention_resolutions")
    for level, multiplier in enumerate(multipliers):
        attention = 2**level in factors or level == len(multipliers) - 1
        if attention and int(multiplier * classifier_width) % 64:
            raise UserError(
                f"--classifier_width {classifier_width} times the multiplier {multiplier} is not a multiple of 64, as "
                f"attention at {image_size // 2**level} pixels needs (--classifier_attention_resolutions; the last "
                "level always has it)"
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
    """Build the U-Net that the flags of `model_defaults`, and learn_sigma, describe."""
    return create_model(**{name: flags[name] for name in [*model_defaults(), "learn_sigma"]})


def diffusion_from_flags(flags: Mapping[str, Any]) -> SpacedDiffusion:
    """Build the diffusion that the flags of `diffusion_defaults` describe."""
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
    """Build a diffusion of `steps` steps, respaced to fewer where `timestep_respacing` is not empty.

    Raises UserError for a schedule or a respacing that there is not.
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
        given: the flag's value, numbers separated by commas; empty: those of the published models of this size.
        image_size: side of the images, in pixels; it is halved at every level but the last.
        num_channels: channels before multiplication; group normalisation splits them into 32.
        names: what this network calls its flags image_size, num_channels and channel_mult, where it differs.

    Raises UserError if there are none for this size, or if they do not fit the size or the channels.
    """
    size, width, flag = ((names or {}).get(name, name) for name in ("image_size", "num_channels", "channel_mult"))
    if not given and image_size not in CHANNEL_MULT:
        halvings = next(n for n in (2, 1, 0) if image_size % 2**n == 0)
        raise UserError(
            f"--{size} {image_size} has no default channel multipliers (those that have: "
            f"{', '.join(map(str, sorted(CHANNEL_MULT)))}). Give --{flag}, for instance {'1,2,2'[: 1 + 2 * halvings]}"
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
    """Raise UserError unless this is a probability."""
    if not 0 <= dropout <= 1:
        raise UserError(f"--dropout {dropout}: expected a probability, from 0 to 1")


def downsampling_factors(image_size: int, resolutions: str, flag: str = "attention_resolutions") -> tuple[int, ...]:
    """Turn image sides at which there is attention ("32,16,8", the value of `flag`) into factors of downsampling."""
    sides = numbers(resolutions, flag)
    return tuple(int(image_size // side) for side in sides if side > 0)


def numbers(text: str, flag: str, example: str = "32,16,8") -> tuple[float, ...]:
    """Read numbers separated by commas; an empty text has none. Raises UserError."""
    try:
        return tuple(float(n) if "." in n else int(n) for n in str(text).split(",") if n.strip())
    except ValueError:
        raise UserError(f"--{flag} {text}: expected numbers separated by commas, such as {example}") from None


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """Add a flag for every entry, with its default's type; for None it is text. For other people's scripts: `add_flags`
    restricts and explains our own flags.
    """
    for name, default in default_dict.items():
        parser.add_argument(f"--{name}", default=default, type=_type_of(default))


def add_flags(parser: argparse._ActionsContainer, default_dict: Mapping[str, Any]) -> None:
    """Add a flag of our scripts for every entry, with its default's type or its least value, and its explanation."""
    for name, default in default_dict.items():
        kind = _type_of(default)
        shown = "%(default)s" if str(default) else "empty"
        parser.add_argument(
            f"--{name}",
            default=default,
            type=whole_number(LEAST[name]) if name in LEAST else kind,
            metavar="True|False" if kind is str2bool else kind.__name__.upper().replace("STR", "TEXT"),
            help=f"{HELP.get(name, '')} (default: {shown})".strip(),
        )


def _type_of(default: Any) -> Callable[[str], Any]:
    """What reads the value of a flag with this default."""
    return str2bool if isinstance(default, bool) else str if default is None else type(default)


def args_to_dict(args: argparse.Namespace, keys) -> dict[str, Any]:
    """The given attributes of `args` as a dictionary."""
    return {key: getattr(args, key) for key in keys}


def str2bool(v: str | bool) -> bool:
    """Read a truth value. Raises argparse.ArgumentTypeError."""
    known = {"true": True, "t": True, "yes": True, "y": True, "1": True}
    known |= {"false": False, "f": False, "no": False, "n": False, "0": False}
    try:
        return known[str(v).lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected True or False, not {v!r}") from None


def bool_or_auto(text: str) -> bool | str:
    """The type of a flag that is True, False or auto. Raises argparse.ArgumentTypeError."""
    try:
        return text if text == "auto" else str2bool(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected True, False or auto, not {text!r}") from None
