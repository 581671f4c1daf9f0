"""Reading the reference numbers in tests/golden; see README.md there for how they were made."""

import gzip
import json
import zlib
from pathlib import Path
from types import SimpleNamespace

from guided_diffusion import script_util

import numpy as np
import torch

HERE = Path(__file__).parent


def seeded(shape, seed):
    """Standard normal float32 numbers of the given shape, the same on every machine."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def fill_weights(model):
    """Give every state-dict entry of `model` the reference weights, which depend on its name and shape alone."""
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            w = seeded(parameter.shape, zlib.crc32(name.encode()))
            if name.endswith("bias"):
                w = 0.1 * w
            elif w.ndim == 1:
                w = 1 + 0.1 * w
            elif "positional_embedding" in name:
                w = 0.1 * w
            else:
                w = w / w[0].numel() ** 0.5
            parameter.copy_(w)
    return model.eval()


def golden(name):
    """The arrays of tests/golden/`name`.npz as attributes, with `meta` a namespace too."""
    with np.load(HERE / "golden" / f"{name}.npz") as z:
        arrays = {key: z[key] for key in z.files}
    meta = json.loads(str(arrays.pop("meta")))
    return SimpleNamespace(meta=SimpleNamespace(**meta), **arrays)


def reference_model(name, **changes):
    """The network of a golden file, with the reference weights."""
    meta = golden(name).meta
    return fill_weights(getattr(script_util, meta.factory)(**meta.kwargs | changes))


def reference_inputs(name):
    """The images, and the rest of the arguments, of a golden file."""
    g = golden(name)
    side = g.meta.kwargs.get("image_size") or g.meta.kwargs["large_size"]
    rest = {"timesteps": torch.from_numpy(g.t)}
    if hasattr(g, "y"):
        rest["y"] = torch.from_numpy(g.y)
    if hasattr(g.meta, "seed_low_res"):
        small = g.meta.kwargs["small_size"]
        rest["low_res"] = seeded((g.meta.n, 3, small, small), g.meta.seed_low_res)
    return seeded((g.meta.n, 3, side, side), g.meta.seed), rest


def published_checkpoints():
    """Name -> {kind, flags, n_params, shapes} of every published checkpoint."""
    with gzip.open(HERE / "checkpoints.json.gz", "rt") as f:
        return json.load(f)


def relative_error(a, b):
    """Largest absolute difference, in units of the largest absolute value of `b`."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float(((a - b).abs().max() / b.abs().max()).detach())
