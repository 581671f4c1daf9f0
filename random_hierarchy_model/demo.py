"""The example that comes with small weights: which grammar it is, how its images look, which network learns them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The flags of `training.images_from_flags`: leaves are pixels, of the eight colours that three channels make.
GRAMMAR_FLAGS: dict[str, int] = {
    "num_symbols": 8,
    "num_synonyms": 2,
    "depth": 4,
    "patch_size": 1,
    "grammar_seed": 0,
}

# What differs from the defaults of `guided_diffusion.script_util.model_and_diffusion_defaults`. The sides of the
# U-Net's levels, 16 to 1, are those of the tree's. A prediction of the image, each of whose pixels is one of a few
# colours, is learned faster than one of the noise.
MODEL_FLAGS: dict[str, Any] = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2,3,3,3",
    "attention_resolutions": "",
    "predict_xstart": True,
}

# Training flags that differ from the defaults of `guided_diffusion.command_line.flags`.
TRAINING_FLAGS: dict[str, Any] = {
    "batch_size": 64,
    "lr": 1e-3,
    "lr_anneal_steps": 12000,
    "ema_rate": "0.999",
    "log_interval": 100,
    "save_interval": 1000,
    "sample_grid": 0,
}

# The same for the classifier.
CLASSIFIER_TRAINING_FLAGS: dict[str, Any] = {
    "batch_size": 64,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "lr_anneal_steps": 3000,
    "ema_rate": "0.999",
    "log_interval": 100,
    "save_interval": 1000,
}

# The weights that come with it; see the README.md beside them.
UNET_FILE = Path(__file__).with_name("unet.pt")
CLASSIFIER_FILE = Path(__file__).with_name("convnext.pt")
CLASSIFIER = "random_hierarchy_model.classifier:small_convnext"  # as --classifier_name
