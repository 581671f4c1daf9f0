"""The bundled example: its grammar, its networks, their training flags and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# For `training.images_from_flags`. More synonyms than the four children of a symbol, so that there is a transition.
GRAMMAR_FLAGS: dict[str, int] = {
    "num_symbols": 4,
    "num_synonyms": 5,
    "depth": 3,
    "patch_size": 2,
    "grammar_seed": 0,
}

# Changes to `model_and_diffusion_defaults`. The levels of the U-Net have sides 16 (pixels) and 8 to 1, as those of the
# tree. With so few distinct patches, x_0 is learned faster than the noise.
MODEL_FLAGS: dict[str, Any] = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2,3,3,3",
    "attention_resolutions": "",
    "predict_xstart": True,
}

# Changes to the default training flags, for the U-Net and for the classifier.
_COMMON = {"batch_size": 64, "lr": 1e-3, "ema_rate": "0.999", "log_interval": 100, "save_interval": 1000}
TRAINING_FLAGS: dict[str, Any] = {**_COMMON, "lr_anneal_steps": 9000, "sample_grid": 0}
CLASSIFIER_TRAINING_FLAGS: dict[str, Any] = {**_COMMON, "lr_anneal_steps": 3000, "weight_decay": 0.05}

# The weights; see README.md.
UNET_FILE = Path(__file__).with_name("unet.pt")
CLASSIFIER_FILE = Path(__file__).with_name("convnext.pt")
CLASSIFIER = "random_hierarchy_model.classifier:small_convnext"  # as --classifier_name
