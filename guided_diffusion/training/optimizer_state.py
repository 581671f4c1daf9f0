"""AdamW states in checkpoints of this project, and of the original guided-diffusion in both of its layouts.

Parameters are numbered in the order of the entries of the model's file. In float16 training, the original has only two
parameters: all vectors and scalars of the network, flattened and concatenated, and all other tensors likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..system.checkpoint_files import difference, shapes_of

MOMENTS = ("exp_avg", "exp_avg_sq")

Shapes = Mapping[str, Sequence[int]]


def by_parameter(saved: Mapping[str, Any], shapes: Shapes) -> dict[str, dict[str, Tensor]]:
    """State of each parameter, by name: "step", a 0-d float32 tensor, and the moments, shaped as the parameter.

    Args:
        saved: state dict of AdamW.
        shapes: shape of each parameter by name, in the order of the model's file saved with it.

    Raises:
        ValueError: the state is not that of AdamW, or of other parameters.
    """
    count = sum(len(group["params"]) for group in saved["param_groups"])
    states = saved["state"]
    if wrong := next((entry for entry in states.values() if not {"step", *MOMENTS} <= set(entry)), None):
        raise ValueError(f"it has entries {', '.join(map(repr, wrong))}, expected those of AdamW: 'step', 'exp_avg'...")
    names = list(shapes)
    if count == 2 != len(names):
        states = _unflattened(states, shapes)
    elif count != len(names):
        raise ValueError(f"it has {count} parameters, the network {len(names)}")
    by_name = {names[index]: entry for index, entry in states.items()}
    for moment in MOMENTS:
        found = shapes_of({name: entry[moment] for name, entry in by_name.items()})
        if problem := difference(found, {name: tuple(shapes[name]) for name in by_name}):
            raise ValueError(problem)
    return {
        name: {"step": torch.tensor(float(entry["step"])), **{moment: entry[moment] for moment in MOMENTS}}
        for name, entry in by_name.items()
    }


def in_row_major(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict for a file: with the strides of contiguous tensors, whatever the memory layout.

    The same object if nothing has to change. Otherwise a dict of the same type and attributes.
    """
    changed = {
        name: torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.stride() != torch.empty(value.shape, device="meta").stride()
    }
    if not changed:
        return state
    copied = copy(state)
    copied.update(changed)
    return copied


def laid_out_as(param: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` on the device and in the memory layout of a parameter of the same shape."""
    return torch.empty_like(param, requires_grad=False, dtype=value.dtype).copy_(value)


def steps_taken(states: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Number of steps taken by the optimizer, given the result of `by_parameter`."""
    return max((int(entry["step"]) for entry in states.values()), default=0)


def _unflattened(states: Mapping[int, Mapping[str, Any]], shapes: Shapes) -> dict[int, dict[str, Any]]:
    """State of each parameter, by number, given the state saved by the original in float16 training."""
    result: dict[int, dict[str, Any]] = {}
    for index, entry in states.items():
        members = [i for i, shape in enumerate(shapes.values()) if (len(shape) > 1) == (index == 1)]
        own = [list(shapes.values())[i] for i in members]
        sizes = [prod(shape) for shape in own]
        if entry["exp_avg"].numel() != sum(sizes):
            kind = "matrices" if index == 1 else "vectors"
            raise ValueError(f"its {kind} have {entry['exp_avg'].numel()} elements, the network's {sum(sizes)}")
        pieces = {moment: entry[moment].flatten().split(sizes) for moment in MOMENTS}
        for place, i in enumerate(members):
            moments = {moment: pieces[moment][place].view(tuple(own[place])).clone() for moment in MOMENTS}
            result[i] = {"step": entry["step"], **moments}
    return result
