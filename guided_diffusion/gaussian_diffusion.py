"""Gaussian diffusion: noise schedules, the noising process q, the denoising process p, samplers and losses.

Sources: DDPM is Ho, Jain and Abbeel 2020 (arXiv:2006.11239); IDDPM is Nichol and Dhariwal 2021 (arXiv:2102.09672); DDIM
is Song, Meng and Ermon 2021 (arXiv:2010.02502); ADM is Dhariwal and Nichol 2021 (arXiv:2105.05233).

Throughout, x is a batch of images (B, C, ...), scaled to [-1, 1] where it is clean; t is a tensor (B,) of indices
0..N - 1, and x_t is the image at the noise level of index t: sqrt(abar[t]) x_0 + sqrt(1 - abar[t]) noise, where abar is
`alphas_cumprod`. So x_{t-1} at t = 0 is the clean image, and the x_k of the forward-backward experiment, whose k counts
steps, is the x_t of index t = k - 1.
"""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .errors import UserError
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import NormalStream, mean_flat, randn, randn_like

Model = Callable[..., torch.Tensor]  # model(x, timesteps, **model_kwargs)
Guide = Callable[..., torch.Tensor]  # cond_fn(x, timesteps, **model_kwargs) = gradient of log p(y | x), shaped as x
ImageFn = Callable[[torch.Tensor], torch.Tensor]
Noise = torch.Generator | NormalStream | None  # where noise comes from; None is PyTorch's global generator
Output = dict[str, torch.Tensor]


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Noise variances beta of a schedule's steps, float64 (N,).

    "linear" is DDPM's, stretched so that any N reaches the same noise; "cosine" is IDDPM's (equation 17).

    Raises:
        UserError: no such schedule, or too few steps for it.
    """
    if num_diffusion_timesteps < 1:
        raise UserError(f"--diffusion_steps {num_diffusion_timesteps}: expected at least 1")
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        if 0.02 * scale >= 1:
            raise UserError(f"--diffusion_steps {num_diffusion_timesteps}: the linear schedule needs 21 or more")
        return np.linspace(0.0001 * scale, 0.02 * scale, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(
            num_diffusion_timesteps, lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        )
    raise UserError(f"--noise_schedule {schedule_name}: expected linear or cosine")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Noise variances, float64 (N,), that leave the signal `alpha_bar(time)` at the times 1/N, 2/N, ... 1.

    None exceeds `max_beta`, which keeps the last step from wiping out everything.
    """
    signal = np.array([alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)])
    return np.minimum(1 - signal[1:] / signal[:-1], max_beta)


def betas_from_alphas_cumprod(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Noise variances, float64 (N,), of the diffusion with the given signal levels."""
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x one step earlier
    START_X = enum.auto()  # the clean image
    EPSILON = enum.auto()  # the noise


class ModelVarType(enum.Enum):
    """The variance of a denoising step."""

    LEARNED = enum.auto()  # the model gives its logarithm
    FIXED_SMALL = enum.auto()  # that of q(x_{t-1} | x_t, x_0)
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # the model gives where it lies between the two (IDDPM, equation 15)


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()  # squared error, and the variational bound where the variance is learned
    RESCALED_MSE = enum.auto()  # the same, with the bound estimating the sum over 1000 steps
    KL = enum.auto()  # variational bound
    RESCALED_KL = enum.auto()  # the same, estimating the sum over all steps

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class DeviceTables:
    """Arrays on the devices where they are looked up: copied there once, and again if they have changed."""

    def __init__(self) -> None:
        self._copies: dict[tuple[torch.device, str], tuple[bytes, torch.Tensor]] = {}

    def on(self, device: torch.device, name: str, array: np.ndarray) -> torch.Tensor:
        """The array `name` on `device`, real numbers in float32."""
        content = array.tobytes()
        copied, table = self._copies.get((device, name), (None, None))
        if copied != content:
            table = torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array).to(device)
            self._copies[device, name] = content, table
        return table


class GaussianDiffusion:
    """A noise schedule of N steps, and what can be done with it and a model.

    Attributes:
        num_timesteps: N.
        betas, alphas_cumprod, posterior_variance, ...: the schedule, float64 arrays (N,).

    Args:
        betas: noise variance of each step, N numbers in (0, 1].
        model_mean_type, model_var_type: how the model's output is read.
        loss_type: what `training_losses` computes.
        rescale_timesteps: hand the model time steps in 0..1000, whatever N.

    Raises:
        UserError: `betas` is empty or out of range.
    """

    def __init__(
        self,
        *,
        betas: Sequence[float] | np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ):
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps

        self.betas = betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas <= 1)).all():
            raise UserError("betas: expected a non-empty list of numbers above 0 and not above 1")
        self.num_timesteps = len(betas)

        self.alphas_cumprod = abar = np.cumprod(1 - betas)
        self.alphas_cumprod_prev = abar_prev = np.append(1.0, abar[:-1])
        self.alphas_cumprod_next = np.append(abar[1:], 0.0)

        # q(x_t | x_0), and x_0 from x_t and the noise
        self.sqrt_alphas_cumprod = np.sqrt(abar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - abar)
        self.log_one_minus_alphas_cumprod = np.log(1 - abar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / abar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / abar - 1)

        # q(x_{t-1} | x_t, x_0): DDPM, equation 7
        self.posterior_variance = betas * (1 - abar_prev) / (1 - abar)
        self.posterior_mean_coef1 = betas * np.sqrt(abar_prev) / (1 - abar)
        self.posterior_mean_coef2 = (1 - abar_prev) * np.sqrt(1 - betas) / (1 - abar)
        # The variance at t = 0 is 0: its logarithm is taken from the next step, or from beta where there is none.
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))

        self._tables = DeviceTables()

    # Subclasses and scripts may change the arrays above at any time: what follows from them is worked out when it is
    # needed. It is float64, because 1 - abar would lose most of its digits in float32 at the first steps.

    @property
    def one_minus_alphas_cumprod_prev(self) -> np.ndarray:
        return 1 - self.alphas_cumprod_prev

    @property
    def one_minus_alphas_cumprod_next(self) -> np.ndarray:
        return 1 - self.alphas_cumprod_next

    @property
    def log_betas(self) -> np.ndarray:
        return np.log(self.betas)

    @property
    def fixed_large_log_variance(self) -> np.ndarray:
        first = self.posterior_variance[1] if len(self.betas) > 1 else self.betas[0]
        return np.log(np.append(first, self.betas[1:]))

    def _schedule(self) -> dict[str, np.ndarray]:
        """Every array (N,) that is looked up by timestep."""
        derived = ("one_minus_alphas_cumprod_prev", "one_minus_alphas_cumprod_next")
        derived += ("log_betas", "fixed_large_log_variance")
        stored = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return stored | {name: getattr(self, name) for name in derived}

    def _at(self, name: str, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Numbers of the schedule `name` at the time steps t (B,), as (B, 1, ...), to broadcast against x (B, ...)."""
        return self._tables.on(t.device, name, getattr(self, name))[t].view(-1, *[1] * (x.ndim - 1))

    def scale_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """The timesteps (B,) that the model itself receives for the indices t (B,)."""
        return self._scale_timesteps(t)

    def _scale_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """The timesteps (B,) that the methods below give the model for the indices t (B,); subclasses may override it.

        `SpacedDiffusion` wraps the model, and the wrapper turns them into those that the model itself receives.
        """
        return t.float() * (1000 / self.num_timesteps) if self.rescale_timesteps else t

    # The noising process

    def q_mean_variance(
        self, x_start: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), each of the shape of `x_start` (DDPM, equation 4)."""
        deviation = self._at("sqrt_one_minus_alphas_cumprod", t, x_start)
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start)
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        return mean, (deviation**2).expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Draw x_t = sqrt(abar[t]) x_0 + sqrt(1 - abar[t]) noise, of the shape of `x_start` (DDPM, equation 4).

        `noise` is standard normal, of the shape of `x_start`; drawn from PyTorch's global generator if None.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        signal = self._at("sqrt_alphas_cumprod", t, x_start)
        return signal * x_start + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean_variance(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), shaped as x_t (DDPM, equation 7)."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        variance = self._at("posterior_variance", t, x_t)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t)
        return mean, variance.expand_as(x_t), log_variance.expand_as(x_t)

    # The denoising process

    def p_mean_variance(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Output:
        """Apply the model: the Gaussian p(x_{t-1} | x_t), and the clean image that the model sees in x_t.

        Args:
            model: called as model(x, timesteps, **model_kwargs); returns (B, C, ...), or (B, 2C, ...) where the
                variance is learned.
            x: x_t, (B, C, ...).
            t: indices, (B,).
            clip_denoised: clip the predicted clean image to [-1, 1].
            denoised_fn: applied to the predicted clean image, before clipping.
            model_kwargs: further arguments of the model.

        Returns:
            "mean", "variance", "log_variance" and "pred_xstart", each of the shape of x.

        Raises:
            UserError: the model's output does not have the shape that `model_var_type` asks for.
        """
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return self._read_output(output, x, t, clip_denoised, denoised_fn)

    def _read_output(
        self, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor, clip_denoised: bool, denoised_fn: ImageFn | None
    ) -> Output:
        """`p_mean_variance` for a model that has answered `output`."""
        prediction, variance_values = self._split_output(output, x)
        if self.model_mean_type is ModelMeanType.START_X:
            pred_xstart = prediction
        elif self.model_mean_type is ModelMeanType.EPSILON:
            pred_xstart = self._predict_xstart_from_eps(x, t, prediction)
        else:
            pred_xstart = self._predict_xstart_from_xprev(x, t, prediction)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)

        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            mean = prediction
        else:
            mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        variance, log_variance = self._variance(variance_values, x, t)
        return {
            "mean": mean,
            "variance": variance.expand_as(x),
            "log_variance": log_variance.expand_as(x),
            "pred_xstart": pred_xstart,
        }

    @property
    def _learns_variance(self) -> bool:
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _split_output(self, output: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Split the model's output into its prediction and its values for the variance, if it has any."""
        batch, channels, *size = x.shape
        expected = (batch, channels * (2 if self._learns_variance else 1), *size)
        if output.shape != expected:
            raise UserError(
                f"the model returned shape {tuple(output.shape)}, expected {expected} with --learn_sigma "
                f"{self._learns_variance}"
            )
        return output.split(channels, dim=1) if self._learns_variance else (output, None)

    def _variance(
        self, values: torch.Tensor | None, x: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Variance and log-variance of p(x_{t-1} | x_t), to broadcast against x; `values` are the model's, as x."""
        small = self._at("posterior_log_variance_clipped", t, x)
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            return self._at("posterior_variance", t, x), small
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            log_variance = self._at("fixed_large_log_variance", t, x)
        elif self.model_var_type is ModelVarType.LEARNED:
            log_variance = values
        else:
            fraction = (values + 1) / 2  # the model's values are in [-1, 1]
            log_variance = fraction * self._at("log_betas", t, x) + (1 - fraction) * small
        return torch.exp(log_variance), log_variance

    def _predict_xstart_from_eps(self, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        scale = self._at("sqrt_recip_alphas_cumprod", t, x_t)
        noise_scale = self._at("sqrt_recipm1_alphas_cumprod", t, x_t)
        return scale * x_t - noise_scale * eps

    def _predict_eps_from_xstart(self, x_t: torch.Tensor, t: torch.Tensor, pred_xstart: torch.Tensor) -> torch.Tensor:
        scale = self._at("sqrt_recip_alphas_cumprod", t, x_t)
        noise_scale = self._at("sqrt_recipm1_alphas_cumprod", t, x_t)
        return (scale * x_t - pred_xstart) / noise_scale

    def _predict_xstart_from_xprev(self, x_t: torch.Tensor, t: torch.Tensor, xprev: torch.Tensor) -> torch.Tensor:
        of_x_t = self._at("posterior_mean_coef2", t, x_t)
        return (xprev - of_x_t * x_t) / self._at("posterior_mean_coef1", t, x_t)

    def condition_mean(
        self,
        cond_fn: Guide,
        p_mean_var: Output,
        x: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Mean of a DDPM step guided by `cond_fn`: moved by variance * gradient of log p(y | x) (ADM, algorithm 1)."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(
        self,
        cond_fn: Guide,
        p_mean_var: Output,
        x: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Output:
        """`p_mean_var` as it is once the score has been moved by the gradient of log p(y | x) (ADM, algorithm 2)."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    # One step

    def p_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        generator: Noise = None,
    ) -> Output:
        """Draw x_{t-1} from p(x_{t-1} | x_t): a step of DDPM (algorithm 2). At t = 0 it is the mean, without noise.

        Args:
            model, x, t, clip_denoised, denoised_fn, model_kwargs: see `p_mean_variance`.
            cond_fn: guidance, see `condition_mean`.
            generator: where the noise comes from.

        Returns:
            "sample" and "pred_xstart", each of the shape of x.
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        deviation = _unless_first(t, x) * torch.exp(0.5 * out["log_variance"])
        return {"sample": mean + deviation * randn_like(x, generator), "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
        generator: Noise = None,
    ) -> Output:
        """Draw x_{t-1} by a step of DDIM (equations 12 and 16). At t = 0 it adds no noise.

        Args:
            model, x, t, clip_denoised, denoised_fn, model_kwargs: see `p_mean_variance`.
            cond_fn: guidance, see `condition_score`.
            eta: from 0, deterministic, to 1, as much noise as DDPM with the small variance.
            generator: where the noise comes from.

        Returns:
            "sample" and "pred_xstart", each of the shape of x.

        Raises:
            UserError: eta is not between 0 and 1.
        """
        if not 0 <= eta <= 1:
            raise UserError(f"eta is {eta}, expected a number from 0 to 1")
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        variance = eta**2 * self._at("posterior_variance", t, x)  # 0 at t = 0
        direction = torch.sqrt(self._at("one_minus_alphas_cumprod_prev", t, x) - variance)
        sample = torch.sqrt(self._at("alphas_cumprod_prev", t, x)) * out["pred_xstart"] + direction * eps
        if eta > 0:
            sample = sample + torch.sqrt(variance) * randn_like(x, generator)
        elif generator is None:
            torch.randn_like(x)  # so that seeded scripts draw the same numbers afterwards as with guided-diffusion
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> Output:
        """Take a deterministic step the other way, to x_{t+1}: DDIM's ordinary differential equation (equation 14).

        Arguments and result as those of `ddim_sample`.

        Raises:
            UserError: eta is not 0.
        """
        if eta != 0:
            raise UserError(f"eta is {eta}, expected 0: only deterministic steps can be reversed")
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        signal = torch.sqrt(self._at("alphas_cumprod_next", t, x))
        noise_scale = torch.sqrt(self._at("one_minus_alphas_cumprod_next", t, x))
        return {"sample": signal * out["pred_xstart"] + noise_scale * eps, "pred_xstart": out["pred_xstart"]}

    # Denoising loops: the full ones are the forward-backward ones with k = N

    def p_sample_loop_forw_back_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        step_reverse: int,
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: Noise = None,
    ) -> Iterator[Output]:
        """Denoise x_k by k steps of DDPM, the indices k - 1 .. 0, yielding what `p_sample` gives at each.

        Args:
            shape: (B, C, ...).
            step_reverse: k, 0..N; there is nothing to yield for k = 0.
            noise: x_k, of that shape; standard normal noise if None.
            device: where to work; that of the model's parameters, else that of `noise`, if None.
            progress: show a progress bar.
            generator: where all noise comes from.
            model, clip_denoised, denoised_fn, cond_fn, model_kwargs: see `p_sample`.

        Raises:
            UserError: `step_reverse` is not a whole number from 0 to N, or `noise` not of the given shape.
        """
        step = partial(
            self.p_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            **_if_given(generator),
        )
        k = check_step_reverse(step_reverse, self.num_timesteps)
        return self._denoise(step, _starting_point(model, shape, noise, device, generator), k, progress)

    def p_sample_loop_forw_back(
        self,
        model: Model,
        shape: Sequence[int],
        step_reverse: int,
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: Noise = None,
    ) -> torch.Tensor:
        r"""Denoise x_k = `noise` by k = `step_reverse` steps of DDPM: the sample \hat x_0(k), `noise` itself for k = 0.

        Arguments and errors are those of `p_sample_loop_forw_back_progressive`.
        """
        x = _starting_point(model, shape, noise, device, generator)
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, generator)
        return _last(self.p_sample_loop_forw_back_progressive(model, shape, step_reverse, x, *options), x)

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: Noise = None,
    ) -> Iterator[Output]:
        """Denoise by all N steps of DDPM: `p_sample_loop_forw_back_progressive` with k = N."""
        options = (noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, generator)
        return self.p_sample_loop_forw_back_progressive(model, shape, self.num_timesteps, *options)

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: Noise = None,
    ) -> torch.Tensor:
        """Sample by all N steps of DDPM: the last sample of `p_sample_loop_progressive`."""
        steps = self.p_sample_loop_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
            **_if_given(generator),
        )
        return _last(steps)

    def ddim_sample_loop_forw_back_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        step_reverse: int,
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        generator: Noise = None,
    ) -> Iterator[Output]:
        """Denoise x_k by k steps of DDIM; as `p_sample_loop_forw_back_progressive`, with `eta` as in `ddim_sample`."""
        step = partial(
            self.ddim_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
            **_if_given(generator),
        )
        k = check_step_reverse(step_reverse, self.num_timesteps)
        return self._denoise(step, _starting_point(model, shape, noise, device, generator), k, progress)

    def ddim_sample_loop_forw_back(
        self,
        model: Model,
        shape: Sequence[int],
        step_reverse: int,
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        generator: Noise = None,
    ) -> torch.Tensor:
        """Denoise x_k by k steps of DDIM; as `p_sample_loop_forw_back`, with `eta` as in `ddim_sample`."""
        x = _starting_point(model, shape, noise, device, generator)
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta, generator)
        return _last(self.ddim_sample_loop_forw_back_progressive(model, shape, step_reverse, x, *options), x)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        generator: Noise = None,
    ) -> Iterator[Output]:
        """Denoise by all N steps of DDIM: `ddim_sample_loop_forw_back_progressive` with k = N."""
        options = (noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta, generator)
        return self.ddim_sample_loop_forw_back_progressive(model, shape, self.num_timesteps, *options)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: torch.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        generator: Noise = None,
    ) -> torch.Tensor:
        """Sample by all N steps of DDIM: the last sample of `ddim_sample_loop_progressive`."""
        steps = self.ddim_sample_loop_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
            eta=eta,
            **_if_given(generator),
        )
        return _last(steps)

    def _denoise(
        self, step: Callable[[torch.Tensor, torch.Tensor], Output], x: torch.Tensor, k: int, progress: bool
    ) -> Iterator[Output]:
        """The loop: `step` at the indices k - 1 .. 0, each on the sample of the one before.

        Whatever it needs of the schedule is on the device before it starts: nothing in it waits for the device.
        """
        for name, array in self._schedule().items():
            self._tables.on(x.device, name, array)
        indices = torch.arange(k - 1, -1, -1, device=x.device)[:, None].repeat(1, len(x))
        for t in tqdm(indices.unbind(), disable=not progress):
            with torch.no_grad():
                out = step(x, t)
            yield out
            x = out["sample"]

    # The name of this loop in the released experiment
    p_sample_loop_progressive_forw_back = p_sample_loop_forw_back_progressive

    # Losses and likelihoods

    def training_losses(
        self,
        model: Model,
        x_start: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: torch.Tensor | None = None,
    ) -> Output:
        """Losses of a batch of training images at the time steps t.

        Args:
            model, model_kwargs: see `p_mean_variance`.
            x_start: clean images (B, C, ...), 8-bit values scaled to [-1, 1].
            t: indices, (B,).
            noise: standard normal, of the shape of `x_start`; drawn from PyTorch's global generator if None.

        Returns:
            "loss", which training minimises; and for the squared losses its parts, "mse" and, where the variance is
            learned, "vb", in bits per dimension. Each is (B,).
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))

        if self.loss_type.is_vb():
            vb = self._bound_term(self._read_output(output, x_t, t, False, None), x_start, x_t, t)
            return {"loss": vb * self.num_timesteps if self.loss_type is LossType.RESCALED_KL else vb}

        prediction, variance_values = self._split_output(output, x_t)
        terms = {"mse": mean_flat((self._target(x_start, x_t, t, noise) - prediction) ** 2)}
        if variance_values is None:
            return {**terms, "loss": terms["mse"]}
        # The bound trains the variance alone: the mean is the squared error's business (IDDPM, section 3.1).
        frozen = torch.cat([prediction.detach(), variance_values], dim=1)
        terms["vb"] = self._bound_term(self._read_output(frozen, x_t, t, False, None), x_start, x_t, t)
        if self.loss_type is LossType.RESCALED_MSE:
            terms["vb"] = terms["vb"] * (self.num_timesteps / 1000)
        return {**terms, "loss": terms["mse"] + terms["vb"]}

    def _target(self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the model should have predicted."""
        if self.model_mean_type is ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type is ModelMeanType.START_X:
            return x_start
        mean, _, _ = self.q_posterior_mean_variance(x_start, x_t, t)
        return mean

    def _bound_term(
        self, p_mean_var: Output, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The term of the variational bound of each image's time step, bits per dimension, (B,) (DDPM, equation 5).

        It is L_{t-1}, a divergence between Gaussians; at t = 0 the likelihood of the 8-bit pixels.
        """
        mean, log_variance = p_mean_var["mean"], p_mean_var["log_variance"]
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
        pixels = -discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
        return torch.where(t == 0, mean_flat(pixels), mean_flat(divergence)) / math.log(2)

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Output:
        """`_bound_term` of a model, as "output", and "pred_xstart": what other people's `training_losses` call."""
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        return {"output": self._bound_term(out, x_start, x_t, t), "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start: torch.Tensor) -> torch.Tensor:
        """The bound's term L_T, KL(q(x_T | x_0) || N(0, 1)), which no model changes: bits per dimension, (B,)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: torch.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        generator: Noise = None,
    ) -> Output:
        """The whole variational bound of a batch of images, and the errors at every time step.

        Args:
            x_start: clean images (B, C, ...), 8-bit values scaled to [-1, 1].
            generator: where the noise comes from.
            model, clip_denoised, model_kwargs: see `p_mean_variance`.

        Returns:
            "total_bpd" and its part "prior_bpd", bits per dimension, (B,); its terms "vb" (B, N), and the mean squared
            errors "xstart_mse" of the clean image and "mse" of the noise, (B, N), from the last index to index 0.
        """
        columns: dict[str, list[torch.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        indices = torch.arange(self.num_timesteps - 1, -1, -1, device=x_start.device)[:, None].repeat(1, len(x_start))
        for t in indices.unbind():
            noise = randn_like(x_start, generator)
            x_t = self.q_sample(x_start, t, noise=noise)
            with torch.no_grad():
                out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
                eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
                columns["vb"].append(self._bound_term(out, x_start, x_t, t))
                columns["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
                columns["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {name: torch.stack(column, dim=1) for name, column in columns.items()}
        prior_bpd = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **terms}


def _extract_into_tensor(arr: np.ndarray, timesteps: torch.Tensor, broadcast_shape: Sequence[int]) -> torch.Tensor:
    """The numbers of an array (N,) at the timesteps (B,), float32 of shape `broadcast_shape` (B, ...).

    Unused here: subclasses in other people's scripts look their schedules up by it.
    """
    values = torch.as_tensor(np.asarray(arr), device=timesteps.device)[timesteps].float()
    return values.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(*broadcast_shape)


def check_step_reverse(step_reverse: int, num_steps: int, flag: str = "--step_reverse") -> int:
    """k = `step_reverse`. Raises UserError, which names `flag`, unless it is a whole number in 0..N = `num_steps`."""
    try:
        k = operator.index(step_reverse)
    except TypeError:
        k = -1
    if not 0 <= k <= num_steps:
        raise UserError(
            f"{flag} {step_reverse} is out of range: expected a whole number from 0 to {num_steps}, the number "
            "of steps that --timestep_respacing (or, without it, --diffusion_steps) gives"
        )
    return k


def _starting_point(
    model: Model, shape: Sequence[int], noise: torch.Tensor | None, device: torch.device | str | None, generator: Noise
) -> torch.Tensor:
    """The x that a loop starts from: `noise` on the device where the loop works, drawn if None."""
    if device is None:
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
        first = next(parameters, noise)
        device = None if first is None else first.device
    if noise is None:
        return randn(tuple(shape), generator=generator, device=device)
    if noise.shape != tuple(shape):
        raise UserError(f"noise has the shape {tuple(noise.shape)}, expected {tuple(shape)}")
    return noise.to(device)


def _unless_first(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """0 for the images of a batch x (B, ...) that are at t = 0, else 1, as (B, 1, ...)."""
    return (t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _if_given(generator: Noise) -> dict[str, Noise]:
    """The generator as an argument; none without one, for overriding methods that do not know it."""
    return {} if generator is None else {"generator": generator}


def _last(steps: Iterator[Output], start: torch.Tensor | None = None) -> torch.Tensor:
    """The last of the samples, or the starting point if there is none."""
    x = start
    for out in steps:
        x = out["sample"]
    return x
