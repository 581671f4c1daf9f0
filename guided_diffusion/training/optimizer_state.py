"""State of AdamW in a checkpoint: of this project, or of the original guided-diffusion in either of its layouts.

Both number the parameters of the network in the order of the entries of the model's file. In float16 training the
original's optimizer has two parameters instead: all vectors and scalars of the network, flattened and concatenated, and
likewise all tensors of two and more dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")

Shapes = Mapping[str, Sequence[int]]


def by_parameter(saved: Mapping[str, Any], shapes: Shapes) -> dict[str, dict[str, Tensor]]:
    """State of each parameter, by its name: "step", a 0-d float32 tensor, and the moments, of the parameter's shape.

    Args:
        saved: state dict of an AdamW, as it was saved.
        shapes: shape of each parameter by its name, in the order of the model's file that was saved with it.

    Raises:
        ValueError: the state is not of an AdamW, or not of these parameters. The message says how.
    """
    count = sum(len(group["params"]) for group in saved["param_groups"])
    states = saved["state"]
    if wrong := next((entry for entry in states.values() if not {"step", *MOMENTS} <= set(entry)), None):
        raise ValueError(f"it has entries {', '.join(map(repr, wrong))}, and those of AdamW are 'step', 'exp_avg', ...")
    names = list(shapes)
    if count == 2 != len(names):
        states = _unflattened(states, shapes)
    elif count != len(names):
        raise ValueError(f"it has {count} parameters, the network {len(names)}")
    result = {}
    for index, entry in states.items():
        name = names[index]
        if any(entry[moment].shape != torch.Size(shapes[name]) for moment in MOMENTS):
            raise ValueError(f"{name} has shape {list(entry['exp_avg'].shape)} there and {list(shapes[name])} here")
        step = torch.tensor(float(entry["step"]), dtype=torch.float32)
        result[name] = {"step": step, **{moment: entry[moment] for moment in MOMENTS}}
    return result


def steps_taken(states: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Number of steps that the optimizer has taken, of what `by_parameter` returns."""
    return max((int(entry["step"]) for entry in states.values()), default=0)


def _unflattened(states: Mapping[int, Mapping[str, Any]], shapes: Shapes) -> dict[int, dict[str, Any]]:
    """By the number of each parameter, what the original saves of float16 training."""
    result: dict[int, dict[str, Any]] = {}
    for index, entry in states.items():
        members = [i for i, shape in enumerate(shapes.values()) if (len(shape) > 1) == (index == 1)]
        own = [list(shapes.values())[i] for i in members]
        sizes = [prod(shape) for shape in own]
        if entry["exp_avg"].numel() != sum(sizes):
            kind = "matrices" if index == 1 else "vectors"
            raise ValueError(f"its {kind} have {entry['exp_avg'].numel()} numbers, those of the network {sum(sizes)}")
        pieces = {moment: entry[moment].flatten().split(sizes) for moment in MOMENTS}
        for place, i in enumerate(members):
            moments = {moment: pieces[moment][place].view(tuple(own[place])).clone() for moment in MOMENTS}
            result[i] = {"step": entry["step"], **moments}
    return result
