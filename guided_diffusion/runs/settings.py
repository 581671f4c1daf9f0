"""Settings that determine the bytes of a result. The key of a flag is its name.

They are recorded, so that a later run with other settings stops instead of mixing two experiments.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..gaussian_diffusion import MOST_EXTRAPOLATION

# Flags that do not affect results, or only through another setting.
WITHOUT_EFFECT = (
    *("preset", "output", "num_threads", "num_workers", "device", "shard", "num_shards"),
    *("class_order", "classes", "use_checkpoint", "dropout", "use_ddim"),
)
# Flags that name files, which are recorded as digests instead.
FILE_FLAGS = ("model_path", "classifier_path", "base_samples", "data_dir", "labels_file")
# Settings that are not flags, as messages name them.
DESCRIPTIONS = {
    "base_samples_digest": "the file of small images (--base_samples)",
    "classes_sampled": "the classes (--classes)",
    "classifier_digest": "the classifier's weights (--classifier_path)",
    "classifier_precision": "the precision (--classifier_use_fp16)",
    "extrapolation": "the largest factor of extrapolation (--sampler sde-dpmsolver++)",
    "images_digest": "the list of images (--data_dir, --labels_file)",
    "layers_digest": "the list of layers (--layers)",
    "model_digest": "the checkpoint (--model_path)",
    "num_images": "the number of images (--num_classes, --num_per_class, --num_samples)",
    "num_layers": "the number of layers (--layers)",
    "num_starts": "the number of starting images",
    "precision": "the precision (--use_fp16)",
    "samples_digest": "the samples (--data_dir)",
    "starts_digest": "the list of starting images (--starting_data_dir, --labels_file)",
    "starts_per_batch": "the number of starting images per batch (--batch_size)",
    "statistics_digest": "the statistics (classifier_statistics.py)",
    "times": "the times computed together (--time_series)",
    "tokens_digest": "the weights of the tokens (--tokens, --classifier_path, --clip_weights)",
    "trajectories_per_batch": "the number of samples of an image per batch (--batch_size)",
}
# Keys in old records.
OLD_KEYS = {
    "--base_samples": "base_samples_digest",
    "--classifier_path": "classifier_digest",
    "--data_dir": "images_digest",
    "--model_path": "model_digest",
    "the checkpoint (--model_path)": "model_digest",
    "the classes (--classes)": "classes_sampled",
    "the classifier's weights (--classifier_path)": "classifier_digest",
    "the list of images (--data_dir)": "images_digest",
    "the list of images (--data_dir, --labels_file)": "images_digest",
    "the list of layers (--layers)": "layers_digest",
    "the list of starting images (--starting_data_dir, --labels_file)": "starts_digest",
    "the number of images (--num_classes, --num_per_class, --num_samples)": "num_images",
    "the number of images (--num_samples)": "num_images",
    "the number of layers (--layers)": "num_layers",
    "the number of starting images": "num_starts",
    "the number of starting images per batch (--batch_size)": "starts_per_batch",
    "the precision (--classifier_use_fp16)": "classifier_precision",
    "the precision (--use_fp16)": "precision",
    "the samples (--data_dir)": "samples_digest",
    "the statistics (classifier_statistics.py)": "statistics_digest",
    "the times that are computed together (--time_series)": "times",
}


def settings_of(args: argparse.Namespace, without: Iterable[str] = (), **others: Any) -> dict[str, Any]:
    """Settings of a run: the flags that affect results, and digests of the files they name.

    Args:
        args: all flags of the script.
        without: flags without effect, in addition to `WITHOUT_EFFECT`.
        others: settings that are not flags, by the keys of `DESCRIPTIONS`.
    """
    left_out = {*WITHOUT_EFFECT, *FILE_FLAGS, *without}
    if vars(args).get("sampler") == "sde-dpmsolver++":  # not limited in the first version of this sampler
        others["extrapolation"] = MOST_EXTRAPOLATION
    return {**{name: value for name, value in vars(args).items() if name not in left_out}, **others}


def digest_of(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights (names, shapes and values), independent of the file format."""
    digest = hashlib.sha256()
    for name, w in sorted(model.state_dict().items()):
        digest.update(f"{name} {w.dtype} {list(w.shape)}\n".encode())
        digest.update(w.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """A phrase for each setting that differs from the record, which may have old keys."""
    recorded, current = with_current_keys(recorded), with_current_keys(current)
    return [
        f"{_describe(key)} {_change(recorded, current, key)}"
        for key in dict.fromkeys([*recorded, *current])
        # A flag that an older version did not have counts as empty.
        if recorded.get(key, "") != current.get(key, "")
    ]


def machine_changes(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """A phrase for each recorded property of the machine that differs; older versions recorded fewer."""
    recorded = {"arithmetic": 1, **recorded}
    return [f"{k} {_change(recorded, current, k)}" for k in current if k in recorded and recorded[k] != current[k]]


def _describe(key: str) -> str:
    """A setting in a message. Training uses words as keys for settings that are not flags."""
    return DESCRIPTIONS.get(key) or (key if " " in key else f"--{key}")


def with_current_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with old keys replaced by current ones."""
    current = {OLD_KEYS.get(key, key.removeprefix("--")): value for key, value in settings.items()}
    if "use_ddim" in current:  # before there was --sampler
        current["sampler"] = "ddim" if current.pop("use_ddim") else "ddpm"
    return current


def _change(recorded: Mapping[str, Any], current: Mapping[str, Any], key: str) -> str:
    return f"was {_short(recorded.get(key, 'not set'))} and is now {_short(current.get(key, 'not set'))}"


def _short(value: Any) -> str:
    """A value for a message; digests are abbreviated."""
    text = "empty" if value == "" else str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
