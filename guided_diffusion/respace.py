"""Diffusion with fewer steps than the model was trained with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from . import logger
from .errors import UserError
from .gaussian_diffusion import DeviceTables, GaussianDiffusion, Guide, Model, Output, betas_from_alphas_cumprod


def space_timesteps(num_timesteps: int, section_counts: int | str | Sequence[int]) -> set[int]:
    """Choose the original timesteps to keep.

    Args:
        num_timesteps: number of original timesteps.
        section_counts: number of timesteps to keep in each of equally long sections: a count, a list of counts, or
            either as text ("250", "10,15,20"). Those kept in a section are evenly spaced, from its first to its last.
            Alternatively "ddimN": N timesteps 0, s, 2s, ... as in DDIM (Song, Meng and Ermon 2021).

    Returns:
        The timesteps to keep, each in 0..num_timesteps - 1.

    Raises:
        UserError: the counts are invalid or exceed the number of timesteps.
    """
    if num_timesteps < 1:
        raise UserError(f"--diffusion_steps {num_timesteps}: expected at least 1")
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _whole_strides(num_timesteps, section_counts)
    counts = _read_counts(section_counts)
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))
        if not 1 <= count <= size:
            raise UserError(
                f"--timestep_respacing {_as_text(section_counts)}: found {count} for a section of {size} of the "
                f"{num_timesteps} diffusion steps, expected 1 to {size}"
            )
        kept += [start + step for step in _evenly_spaced(size, count)]
        start += size
    return set(kept)


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion restricted to some timesteps of another, with the same noise levels.

    Models and guides are wrapped, so that they receive the original timesteps.

    Attributes:
        use_timesteps: set of the original timesteps to keep.
        timestep_map: original timestep of each of the `num_timesteps` steps.
        original_num_steps: number of original timesteps.

    Args:
        use_timesteps: original timesteps to keep; others than 0..N-1 are ignored, with a warning.
        kwargs: arguments of `GaussianDiffusion` for the original diffusion.

    Raises:
        UserError: `use_timesteps` contains none of the original timesteps.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any):
        betas = np.asarray(kwargs.pop("betas"), dtype=np.float64)
        self.original_num_steps = len(betas)
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = [t for t in range(len(betas)) if t in self.use_timesteps]
        if unknown := sorted(self.use_timesteps.difference(self.timestep_map)):
            found = f"{unknown[0]}..{unknown[-1]}" if len(unknown) > 1 else unknown[0]
            logger.warn(f"use_timesteps: ignoring {found}; expected some of 0..{len(betas) - 1}")
        if not self.timestep_map:
            raise UserError(f"use_timesteps: found none of 0..{len(betas) - 1}")
        alphas_cumprod = np.cumprod(1 - betas)[self.timestep_map]
        super().__init__(betas=betas_from_alphas_cumprod(alphas_cumprod), **kwargs)

    def p_mean_variance(self, model: Model, *args: Any, **kwargs: Any) -> Output:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Model, *args: Any, **kwargs: Any) -> Output:
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Guide, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: Guide, *args: Any, **kwargs: Any) -> Output:
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _copy_schedule_to(self, device: torch.device) -> None:
        super()._copy_schedule_to(device)
        self._tables.on(device, "timestep_map", np.array(self.timestep_map))

    def scale_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        return self._wrap_model(None).original_timesteps(self._scale_timesteps(t))

    def _scale_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        return t  # converted by the wrapper

    def _wrap_model(self, model: Model) -> _WrappedModel:
        """`model`, called with the original timesteps."""
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(
            model,
            timestep_map=self.timestep_map,
            rescale_timesteps=self.rescale_timesteps,
            original_num_steps=self.original_num_steps,
            tables=self._tables,
        )


class _WrappedModel:
    """A model or guide that takes the indices of a `SpacedDiffusion`.

    Args:
        model: called as model(x, timesteps, **kwargs), with the original timesteps.
        timestep_map: original timestep of each index.
        rescale_timesteps: rescale the original timesteps to 0..1000.
        original_num_steps: number of original timesteps.
        tables: cache of the map on devices.
    """

    def __init__(
        self,
        model: Model,
        timestep_map: Sequence[int],
        rescale_timesteps: bool,
        original_num_steps: int,
        tables: DeviceTables | None = None,
    ):
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps
        self._tables = tables or DeviceTables()

    def __call__(self, x: torch.Tensor, ts: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.model(x, self.original_timesteps(ts), **kwargs)

    def original_timesteps(self, ts: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) that the model receives at indices `ts` (B,)."""
        original = self._tables.on(ts.device, "timestep_map", np.array(self.timestep_map))[ts].to(ts.dtype)
        return original.float() * (1000 / self.original_num_steps) if self.rescale_timesteps else original


def _whole_strides(num_timesteps: int, spec: str) -> set[int]:
    """The timesteps 0, s, 2s, ... for "ddimN", with the smallest stride s that keeps N of them."""
    number = spec.removeprefix("ddim")
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if str(len(kept)) == number:
            return set(kept)
    raise UserError(
        f"--timestep_respacing {spec}: no integer stride keeps {number or 'no'} of {num_timesteps} diffusion steps, "
        "expected ddimN with N such as the number of steps divided by 2, 4, 5 or 10"
    )


def _read_counts(section_counts: int | str | Sequence[int]) -> list[int]:
    items = section_counts.split(",") if isinstance(section_counts, str) else np.atleast_1d(section_counts).tolist()
    try:
        counts = [int(item) for item in items]
    except (TypeError, ValueError):
        counts = []
    if not counts or any(float(item) != count for item, count in zip(items, counts, strict=True)):
        raise UserError(
            f"--timestep_respacing {_as_text(section_counts)}: expected a whole number of steps such as 250, "
            "a list such as 10,15,20, or ddimN such as ddim25"
        )
    return counts


def _evenly_spaced(size: int, count: int) -> list[int]:
    """Choose `count` integers from 0 to size - 1."""
    stride = (size - 1) / max(count - 1, 1)
    kept, position = [], 0.0
    for _ in range(count):
        kept.append(round(position))
        position += stride  # accumulated rather than multiplied, to round ties as the published models require
    return kept


def _as_text(section_counts: int | str | Sequence[int]) -> str:
    return ",".join(map(str, section_counts)) if isinstance(section_counts, (list, tuple)) else str(section_counts)
