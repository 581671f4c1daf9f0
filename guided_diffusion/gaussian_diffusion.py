"""Gaussian diffusion: noise schedules, the noising process q, the denoising process p, samplers and losses.

Sources: DDPM is Ho, Jain and Abbeel 2020 (arXiv:2006.11239); IDDPM is Nichol and Dhariwal 2021 (arXiv:2102.09672); DDIM
is Song, Meng and Ermon 2021 (arXiv:2010.02502); ADM is Dhariwal and Nichol 2021 (arXiv:2105.05233); DPM-Solver++ is Lu
et al. 2022 (arXiv:2211.01095).

Notation: x is a batch of images (B, C, ...), in [-1, 1] if clean; t is a tensor (B,) of indices 0..N - 1; and
x_t = sqrt(abar[t]) x_0 + sqrt(1 - abar[t]) noise, where abar is `alphas_cumprod`. So x_{t-1} at t = 0 is the clean
image. In the forward-backward experiment, k counts steps: its x_k is x_t at index t = k - 1.
"""

from __future__ import annotations

import enum
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial, wraps
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
Noise = torch.Generator | NormalStream | None  # source of noise; None is PyTorch's global generator
Output = dict[str, torch.Tensor]

# Samplers by name (--sampler), and the start of the names of their methods.
SAMPLERS = {"ddpm": "p_sample", "ddim": "ddim_sample", "sde-dpmsolver++": "sde_dpmsolver_sample"}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Noise variances beta of a schedule, float64 (N,).

    "linear" is that of DDPM, rescaled so that the final noise level does not depend on N; "cosine" is that of IDDPM
    (equation 17).

    Raises:
        UserError: the schedule is unknown, or N is too small for it.
    """
    if num_diffusion_timesteps < 1:
        raise UserError(f"--diffusion_steps {num_diffusion_timesteps}: expected at least 1")
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        if 0.02 * scale >= 1:
            raise UserError(
                f"--diffusion_steps {num_diffusion_timesteps}: expected at least 21 for the linear schedule"
            )
        return np.linspace(0.0001 * scale, 0.02 * scale, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(
            num_diffusion_timesteps, lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        )
    raise UserError(f"--noise_schedule {schedule_name}: expected linear or cosine")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Noise variances, float64 (N,), for the signal level `alpha_bar(time)` at times 1/N, 2/N, ... 1.

    They are clipped to `max_beta`, so that the last step does not remove all of the signal.
    """
    signal = np.array([alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)])
    return np.minimum(1 - signal[1:] / signal[:-1], max_beta)


def betas_from_alphas_cumprod(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Noise variances, float64 (N,), for given signal levels."""
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


class ModelMeanType(enum.Enum):
    """Quantity predicted by the model."""

    PREVIOUS_X = enum.auto()  # the mean of x one step earlier
    START_X = enum.auto()  # the clean image
    EPSILON = enum.auto()  # the noise


class ModelVarType(enum.Enum):
    """Variance of a denoising step."""

    LEARNED = enum.auto()  # the model predicts its logarithm
    FIXED_SMALL = enum.auto()  # variance of q(x_{t-1} | x_t, x_0)
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # the model interpolates between these two (IDDPM, equation 15)


class LossType(enum.Enum):
    """Training loss."""

    MSE = enum.auto()  # squared error, plus the variational bound if the variance is learned
    RESCALED_MSE = enum.auto()  # likewise, with the bound multiplied by N / 1000
    KL = enum.auto()  # term of the variational bound
    RESCALED_KL = enum.auto()  # likewise, multiplied by N

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound only."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class DeviceTables:
    """Copies of arrays on devices, updated when an array changes."""

    def __init__(self) -> None:
        self._copies: dict[tuple[torch.device, str], tuple[bytes, torch.Tensor]] = {}

    def on(self, device: torch.device, name: str, array: np.ndarray) -> torch.Tensor:
        """The array `name` on `device`, with float64 converted to float32."""
        content = array.tobytes()
        copied, table = self._copies.get((device, name), (None, None))
        if copied != content:
            table = torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array).to(device)
            self._copies[device, name] = content, table
        return table


def _with_parameters_of(loop: Callable[..., Any], leave_out: str = "") -> Callable[..., Any]:
    """Decorate a method that takes **options, so that it has the parameters and defaults of `loop`.

    All options are passed by name, except for a `generator` of None; see `_if_given`.
    """
    parameters = [p for p in inspect.signature(loop).parameters.values() if p.name != leave_out]
    signature = inspect.Signature(parameters)

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            options = given.arguments
            options |= _if_given(options.pop("generator"))
            return method(**options)

        call.__signature__ = signature.replace(return_annotation=inspect.signature(method).return_annotation)
        return call

    return decorate


# Arrays of a diffusion that are used at the timesteps of a batch
SCHEDULE = (
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


MOST_EXTRAPOLATION = 0.5  # that of equal steps


def extrapolation(diffusion: GaussianDiffusion) -> np.ndarray:
    """h[t] / (2 h[t+1]), where h[t] is the increase of log(sqrt(abar) / sqrt(1 - abar)) in step t; 0 at both ends.

    At most `MOST_EXTRAPOLATION`: with timesteps uniform in t, the last steps are much longer than the ones before, but
    the prediction has converged by then, and a line through it would add variance. See
    `GaussianDiffusion.sde_dpmsolver_sample`.
    """
    abar = diffusion.alphas_cumprod
    steps = -np.diff(np.log(abar) - np.log(1 - abar)) / 2  # h[1], ..., h[N-1]
    inner = np.minimum(steps[:-1] / steps[1:] / 2, MOST_EXTRAPOLATION)
    return np.concatenate([[0.0], inner, [0.0]])[: len(abar)]


# Arrays derived from them. They are not stored, since subclasses and scripts may modify the schedule, and computed in
# float64: in float32, 1 - abar would lose most of its digits at the first steps.
DERIVED: dict[str, Callable[[GaussianDiffusion], np.ndarray]] = {
    "one_minus_alphas_cumprod_prev": lambda d: 1 - d.alphas_cumprod_prev,
    "one_minus_alphas_cumprod_next": lambda d: 1 - d.alphas_cumprod_next,
    "log_betas": lambda d: np.log(d.betas),
    "fixed_large_log_variance": lambda d: np.append(d.posterior_log_variance_clipped[0], np.log(d.betas[1:])),
    "extrapolation": extrapolation,
}


class GaussianDiffusion:
    """A noise schedule of N steps, with the noising and denoising processes, samplers and losses.

    Attributes:
        num_timesteps: N.
        betas, alphas_cumprod, posterior_variance, ...: the schedule, float64 arrays (N,).

    Args:
        betas: noise variance of each step, N numbers in (0, 1].
        model_mean_type, model_var_type: meaning of the model's output.
        loss_type: loss computed by `training_losses`.
        rescale_timesteps: rescale the timesteps passed to the model from 0..N to 0..1000.

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
            raise UserError("betas: expected a non-empty list of numbers in (0, 1]")
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
        # The variance at t = 0 is 0: take the logarithm of the next step's, or of beta if N = 1.
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))

    @cached_property
    def _tables(self) -> DeviceTables:
        return DeviceTables()

    def _array(self, name: str) -> np.ndarray:
        """The array (N,) with this name: of the schedule, or derived from it."""
        return DERIVED[name](self) if name in DERIVED else getattr(self, name)

    def _at(self, name: str, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Values of the array `name` at indices t (B,), as (B, 1, ...), to broadcast against x (B, ...)."""
        return _broadcast(self._tables.on(t.device, name, self._array(name))[t], x.ndim)

    def _copy_schedule_to(self, device: torch.device) -> None:
        """Copy all arrays that a step needs to a device in advance, so that a loop never waits for the device."""
        for name in (*SCHEDULE, *DERIVED):
            self._tables.on(device, name, self._array(name))

    def scale_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) that the model receives at indices t (B,)."""
        return self._scale_timesteps(t)

    def _scale_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) that the methods below pass to the model, or its wrapper, at indices t (B,).

        Subclasses may override this. The wrapper of `SpacedDiffusion` converts them to the original timesteps.
        """
        return t.float() * (1000 / self.num_timesteps) if self.rescale_timesteps else t

    # The noising process

    def q_mean_variance(
        self, x_start: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), each shaped as `x_start` (DDPM, equation 4)."""
        deviation = self._at("sqrt_one_minus_alphas_cumprod", t, x_start)
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start)
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        return mean, (deviation**2).expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Draw x_t = sqrt(abar[t]) x_0 + sqrt(1 - abar[t]) noise (DDPM, equation 4).

        `noise` is standard normal, shaped as `x_start`; drawn from PyTorch's global generator if None.
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
        """Apply the model to obtain the Gaussian p(x_{t-1} | x_t) and the predicted clean image.

        Args:
            model: called as model(x, timesteps, **model_kwargs); returns (B, C, ...), or (B, 2C, ...) if the variance
                is learned.
            x: x_t, (B, C, ...).
            t: indices, (B,).
            clip_denoised: clip the predicted clean image to [-1, 1].
            denoised_fn: function applied to the predicted clean image before clipping.
            model_kwargs: further arguments of the model.

        Returns:
            "mean", "variance", "log_variance" and "pred_xstart", each shaped as x.

        Raises:
            UserError: the shape of the model's output does not match `model_var_type`.
        """
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return self._read_output(output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)

    def _read_output(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = False,
        denoised_fn: ImageFn | None = None,
    ) -> Output:
        """`p_mean_variance`, given the output of the model."""
        prediction, variance_values = self._split_output(output, x)
        if self.model_mean_type is ModelMeanType.START_X:
            pred_xstart = prediction
        elif self.model_mean_type is ModelMeanType.EPSILON:
            pred_xstart = self._predict_xstart_from_eps(x_t=x, t=t, eps=prediction)
        elif self.model_mean_type is ModelMeanType.PREVIOUS_X:
            pred_xstart = self._predict_xstart_from_xprev(x_t=x, t=t, xprev=prediction)
        else:
            raise NotImplementedError(self.model_mean_type)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)

        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            mean = prediction
        else:
            mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
        variance, log_variance = self._step_variance(variance_values, x, t)
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
        """Split the model's output into its prediction and the values for the variance, if learned."""
        batch, channels, *size = x.shape
        expected = (batch, channels * (2 if self._learns_variance else 1), *size)
        if output.shape != expected:
            raise UserError(
                f"the model returned shape {tuple(output.shape)}, expected {expected} with --learn_sigma "
                f"{self._learns_variance}"
            )
        return output.split(channels, dim=1) if self._learns_variance else (output, None)

    def _step_variance(
        self, values: torch.Tensor | None, x: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Variance and log-variance of p(x_{t-1} | x_t), given the model's `values`, shaped as x, if learned."""
        small = self._at("posterior_log_variance_clipped", t, x)
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            return self._at("posterior_variance", t, x), small
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            log_variance = self._at("fixed_large_log_variance", t, x)
        elif self.model_var_type is ModelVarType.LEARNED:
            log_variance = values
        elif self.model_var_type is not ModelVarType.LEARNED_RANGE:
            raise NotImplementedError(self.model_var_type)
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
        coef1, coef2 = (self._at(f"posterior_mean_coef{i}", t, x_t) for i in (1, 2))
        return (xprev - coef2 * x_t) / coef1

    def condition_mean(
        self,
        cond_fn: Guide,
        p_mean_var: Output,
        x: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Mean of a guided DDPM step, shifted by variance * gradient of log p(y | x) (ADM, algorithm 1)."""
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
        """`p_mean_var` with the score shifted by the gradient of log p(y | x) (ADM, algorithm 2)."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
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
        """Draw x_{t-1} from p(x_{t-1} | x_t), a DDPM step (algorithm 2). At t = 0, the sample is the mean.

        Args:
            model, x, t, clip_denoised, denoised_fn, model_kwargs: see `p_mean_variance`.
            cond_fn: guidance, see `condition_mean`.
            generator: source of the noise.

        Returns:
            "sample" and "pred_xstart", each shaped as x.
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        noise = randn_like(x, generator)  # before the guide, which may draw random numbers of its own
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        deviation = _unless_first(t, x) * torch.exp(0.5 * out["log_variance"])
        return {"sample": mean + deviation * noise, "pred_xstart": out["pred_xstart"]}

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
        """Draw x_{t-1} by a DDIM step (equations 12 and 16). At t = 0, no noise is added.

        Args:
            model, x, t, clip_denoised, denoised_fn, model_kwargs: see `p_mean_variance`.
            cond_fn: guidance, see `condition_score`.
            eta: noise level, from 0 (deterministic) to 1 (that of DDPM with the small variance); a number, or a tensor
                that broadcasts against x.
            generator: source of the noise.

        Returns:
            "sample" and "pred_xstart", each shaped as x.

        Raises:
            UserError: eta is a number, but not in [0, 1].
        """
        is_number = not isinstance(eta, torch.Tensor)
        if is_number and not 0 <= eta <= 1:
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
        if not is_number or eta != 0:
            sample = sample + torch.sqrt(variance) * randn_like(x, generator)
        elif generator is None:
            torch.randn_like(x)  # advances the global generator as guided-diffusion does, for seeded scripts
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def sde_dpmsolver_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: ImageFn | None = None,
        cond_fn: Guide | None = None,
        model_kwargs: dict[str, Any] | None = None,
        previous_xstart: torch.Tensor | None = None,
        generator: Noise = None,
    ) -> Output:
        """Draw x_{t-1} by a step of SDE-DPM-Solver++(2M), the multistep solver of the reverse SDE (DPM-Solver++).

        For a constant prediction x_0, the SDE has the solution

            x_{t-1} = sigma'/sigma e^(-h) x_t + alpha' (1 - e^(-2h)) x_0 + sigma' sqrt(1 - e^(-2h)) z,

        with alpha = sqrt(abar), sigma = sqrt(1 - abar), primes for t - 1, and h the increase of log(alpha / sigma). It
        is a draw from q(x_{t-1} | x_t, x_0), the step of DDPM. At second order, x_0 is extrapolated linearly from
        the last two predictions to the middle of the step: x_0(t) + h[t] / (2 h[t+1]) (x_0(t) - x_0(t+1)), with the
        factor limited by `extrapolation`. At t = 0, the sample is the prediction. Learned variances have no effect.

        Args:
            model, x, t, clip_denoised, denoised_fn, model_kwargs: see `p_mean_variance`.
            cond_fn: guidance, see `condition_score`.
            previous_xstart: "pred_xstart" of the previous step, at t + 1; None for a first-order step.
            generator: source of the noise.

        Returns:
            "sample" and "pred_xstart", each shaped as x.
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        x_start = pred_xstart = out["pred_xstart"]
        if previous_xstart is not None:
            x_start = pred_xstart + self._at("extrapolation", t, x) * (pred_xstart - previous_xstart)
        mean, variance, _ = self.q_posterior_mean_variance(x_start=x_start, x_t=x, t=t)  # variance 0 at t = 0
        return {"sample": mean + torch.sqrt(variance) * randn_like(x, generator), "pred_xstart": pred_xstart}

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
        """Step to x_{t+1} along DDIM's ordinary differential equation (equation 14); see `ddim_sample`.

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

    # Denoising loops. They differ in the kind of step (`SAMPLERS`), the number of steps (k or all N), and the result
    # (every step or the last sample).

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
        """Denoise x_k by k DDPM steps, at indices k - 1 .. 0, yielding the result of each `p_sample`.

        Args:
            shape: (B, C, ...).
            step_reverse: k, 0..N; k = 0 yields nothing.
            noise: x_k, of that shape; standard normal noise if None.
            device: device to work on; by default that of the model's parameters, else that of `noise`.
            progress: show a progress bar.
            generator: source of all noise.
            model, clip_denoised, denoised_fn, cond_fn, model_kwargs: see `p_sample`.

        Raises:
            UserError: `step_reverse` is not an integer from 0 to N, or `noise` does not have the given shape.
        """
        options = {"noise": noise, "device": device, "progress": progress, "generator": generator}
        options |= {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
        return self._go_back(self.p_sample, model, shape, step_reverse, model_kwargs=model_kwargs, **options)

    @_with_parameters_of(p_sample_loop_forw_back_progressive)
    def p_sample_loop_forw_back(self, model: Model, shape: Sequence[int], **options: Any) -> torch.Tensor:
        r"""Denoise x_k = `noise` by k = `step_reverse` DDPM steps to the sample \hat x_0(k), or return it if k = 0."""
        options["noise"] = x = _starting_point(model, shape, **options)
        return _last(self.p_sample_loop_forw_back_progressive(model, shape, **options), start=x)

    @_with_parameters_of(p_sample_loop_forw_back_progressive, leave_out="step_reverse")
    def p_sample_loop_progressive(self, model: Model, shape: Sequence[int], **options: Any) -> Iterator[Output]:
        """Denoise by all N DDPM steps: `p_sample_loop_forw_back_progressive` with k = N."""
        return self.p_sample_loop_forw_back_progressive(model, shape, self.num_timesteps, **options)

    @_with_parameters_of(p_sample_loop_forw_back_progressive, leave_out="step_reverse")
    def p_sample_loop(self, model: Model, shape: Sequence[int], **options: Any) -> torch.Tensor:
        """Draw samples by all N DDPM steps: the last sample of `p_sample_loop_progressive`."""
        return _last(self.p_sample_loop_progressive(model, shape, **options))

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
        """Denoise x_k by k DDIM steps; see `p_sample_loop_forw_back_progressive`, and `ddim_sample` for `eta`."""
        options = {"noise": noise, "device": device, "progress": progress, "generator": generator}
        options |= {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn, "eta": eta}
        return self._go_back(self.ddim_sample, model, shape, step_reverse, model_kwargs=model_kwargs, **options)

    @_with_parameters_of(ddim_sample_loop_forw_back_progressive)
    def ddim_sample_loop_forw_back(self, model: Model, shape: Sequence[int], **options: Any) -> torch.Tensor:
        r"""Denoise x_k = `noise` by k = `step_reverse` DDIM steps to the sample \hat x_0(k), or return it if k = 0."""
        options["noise"] = x = _starting_point(model, shape, **options)
        return _last(self.ddim_sample_loop_forw_back_progressive(model, shape, **options), start=x)

    @_with_parameters_of(ddim_sample_loop_forw_back_progressive, leave_out="step_reverse")
    def ddim_sample_loop_progressive(self, model: Model, shape: Sequence[int], **options: Any) -> Iterator[Output]:
        """Denoise by all N DDIM steps: `ddim_sample_loop_forw_back_progressive` with k = N."""
        return self.ddim_sample_loop_forw_back_progressive(model, shape, self.num_timesteps, **options)

    @_with_parameters_of(ddim_sample_loop_forw_back_progressive, leave_out="step_reverse")
    def ddim_sample_loop(self, model: Model, shape: Sequence[int], **options: Any) -> torch.Tensor:
        """Draw samples by all N DDIM steps: the last sample of `ddim_sample_loop_progressive`."""
        return _last(self.ddim_sample_loop_progressive(model, shape, **options))

    @_with_parameters_of(p_sample_loop_forw_back_progressive)
    def sde_dpmsolver_sample_loop_forw_back_progressive(
        self, model: Model, shape: Sequence[int], step_reverse: int, **options: Any
    ) -> Iterator[Output]:
        """Denoise x_k by k steps of SDE-DPM-Solver++(2M), the first of which is of first order.

        See `p_sample_loop_forw_back_progressive`, and `sde_dpmsolver_sample` for a step.
        """
        return self._go_back(self.sde_dpmsolver_sample, model, shape, step_reverse, multistep=True, **options)

    @_with_parameters_of(sde_dpmsolver_sample_loop_forw_back_progressive)
    def sde_dpmsolver_sample_loop_forw_back(self, model: Model, shape: Sequence[int], **options: Any) -> torch.Tensor:
        r"""Denoise x_k = `noise` by k = `step_reverse` steps to the sample \hat x_0(k), or return it if k = 0."""
        options["noise"] = x = _starting_point(model, shape, **options)
        return _last(self.sde_dpmsolver_sample_loop_forw_back_progressive(model, shape, **options), start=x)

    @_with_parameters_of(sde_dpmsolver_sample_loop_forw_back_progressive, leave_out="step_reverse")
    def sde_dpmsolver_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], **options: Any
    ) -> Iterator[Output]:
        """Denoise by all N steps: `sde_dpmsolver_sample_loop_forw_back_progressive` with k = N."""
        return self.sde_dpmsolver_sample_loop_forw_back_progressive(model, shape, self.num_timesteps, **options)

    @_with_parameters_of(sde_dpmsolver_sample_loop_forw_back_progressive, leave_out="step_reverse")
    def sde_dpmsolver_sample_loop(self, model: Model, shape: Sequence[int], **options: Any) -> torch.Tensor:
        """Draw samples by all N steps: the last sample of `sde_dpmsolver_sample_loop_progressive`."""
        return _last(self.sde_dpmsolver_sample_loop_progressive(model, shape, **options))

    def loop_of(self, sampler: str) -> Callable[..., Iterator[Output]]:
        """The forward-backward loop of a sampler, which yields every step. Raises UserError if `sampler` is unknown."""
        if sampler not in SAMPLERS:
            raise UserError(f"sampler {sampler}: expected {', '.join(SAMPLERS)}")
        return getattr(self, f"{SAMPLERS[sampler]}_loop_forw_back_progressive")

    def _go_back(
        self,
        sample: Callable[..., Output],
        model: Model,
        shape: Sequence[int],
        step_reverse: int,
        *,
        noise: torch.Tensor | None,
        device: torch.device | str | None,
        progress: bool,
        generator: Noise = None,
        multistep: bool = False,
        **options: Any,
    ) -> Iterator[Output]:
        """Denoise x_k by k steps of `sample`, with `options`. Checks its arguments now, unlike a generator."""
        step = partial(sample, model, **options, **_if_given(generator))
        k = check_step_reverse(step_reverse, self.num_timesteps)
        _check_batch(noise, shape)
        start = partial(_starting_point, model, shape, noise=noise, device=device, generator=generator)
        return self._take_steps(step, start, k, progress=progress, multistep=multistep)

    def _take_steps(
        self,
        step: Callable[..., Output],
        start: Callable[[], torch.Tensor],
        k: int,
        progress: bool,
        multistep: bool = False,
    ) -> Iterator[Output]:
        """Apply `step` at indices k - 1 .. 0 to x_k = `start()`, then each time to the sample of the previous step.

        A `multistep` sampler also receives the clean image that the previous step predicted.
        """
        x = start()
        self._copy_schedule_to(x.device)
        indices = torch.arange(k - 1, -1, -1, device=x.device)[:, None].repeat(1, len(x))
        previous: Output = {}
        for t in tqdm(indices.unbind(), disable=not progress):
            with torch.no_grad():
                out = step(x, t, **previous)
            yield out
            x = out["sample"]
            if multistep:
                previous = {"previous_xstart": out["pred_xstart"]}

    # Name in the released code of the experiment
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
        """Training losses of a batch of images at indices t.

        Args:
            model, model_kwargs: see `p_mean_variance`.
            x_start: clean images (B, C, ...), 8-bit values scaled to [-1, 1].
            t: indices, (B,).
            noise: standard normal, shaped as `x_start`; drawn from PyTorch's global generator if None.

        Returns:
            "loss", (B,); for squared losses also its parts "mse" and, if the variance is learned, "vb" in bits per
            dimension.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        bound = partial(self._vb_terms_bpd, x_start=x_start, x_t=x_t, t=t, clip_denoised=False)

        if self.loss_type in (LossType.KL, LossType.RESCALED_KL):
            vb = bound(model=model, model_kwargs=model_kwargs)["output"]
            return {"loss": vb * self.num_timesteps if self.loss_type is LossType.RESCALED_KL else vb}
        if self.loss_type not in (LossType.MSE, LossType.RESCALED_MSE):
            raise NotImplementedError(self.loss_type)

        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        prediction, variance_values = self._split_output(output, x_t)
        terms = {"mse": mean_flat((self._regression_target(x_start, x_t, t, noise=noise) - prediction) ** 2)}
        if variance_values is None:
            return {**terms, "loss": terms["mse"]}
        # The bound trains only the variance, the squared error only the mean (IDDPM, section 3.1).
        frozen = torch.cat([prediction.detach(), variance_values], dim=1)
        terms["vb"] = bound(model=lambda *_, **__: frozen)["output"]
        if self.loss_type is LossType.RESCALED_MSE:
            terms["vb"] = terms["vb"] * (self.num_timesteps / 1000)
        return {**terms, "loss": terms["mse"] + terms["vb"]}

    def _regression_target(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Target of the model's prediction."""
        if self.model_mean_type is ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type is ModelMeanType.START_X:
            return x_start
        if self.model_mean_type is not ModelMeanType.PREVIOUS_X:
            raise NotImplementedError(self.model_mean_type)
        mean, _, _ = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        return mean

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Output:
        """The term of the variational bound at t in bits per dimension, "output" (B,), and "pred_xstart".

        This is L_{t-1} (DDPM, equation 5): a divergence between Gaussians or, at t = 0, the negative log-likelihood of
        8-bit pixels.
        """
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        mean, log_variance = out["mean"], out["log_variance"]
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        divergence = normal_kl(true_mean, true_log_variance, mean2=mean, logvar2=log_variance)
        pixels = -discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
        term = torch.where(t == 0, mean_flat(pixels), mean_flat(divergence)) / math.log(2)
        return {"output": term, "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start: torch.Tensor) -> torch.Tensor:
        """The model-independent term of the bound, L_T = KL(q(x_T | x_0) || N(0, 1)): bits per dimension, (B,)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, mean2=0.0, logvar2=0.0)) / math.log(2)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: torch.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        generator: Noise = None,
    ) -> Output:
        """The full variational bound of a batch of images, and the errors at each index.

        Args:
            x_start: clean images (B, C, ...), 8-bit values scaled to [-1, 1].
            generator: source of the noise.
            model, clip_denoised, model_kwargs: see `p_mean_variance`.

        Returns:
            "total_bpd" and its part "prior_bpd", bits per dimension, (B,); its terms "vb" and the mean squared errors
            of the clean image, "xstart_mse", and of the noise, "mse", each (B, N), from index N - 1 to 0.
        """
        columns: dict[str, list[torch.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        indices = torch.arange(self.num_timesteps - 1, -1, -1, device=x_start.device)[:, None].repeat(1, len(x_start))
        for t in indices.unbind():
            noise = randn_like(x_start, generator)
            x_t = self.q_sample(x_start, t, noise=noise)
            with torch.no_grad():
                out = self._vb_terms_bpd(
                    model, x_start=x_start, x_t=x_t, t=t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
                )
                eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
                columns["vb"].append(out["output"])
                columns["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
                columns["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {name: torch.stack(column, dim=1) for name, column in columns.items()}
        prior_bpd = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **terms}


def _extract_into_tensor(arr: np.ndarray, timesteps: torch.Tensor, broadcast_shape: Sequence[int]) -> torch.Tensor:
    """Values of an array (N,) at `timesteps` (B,), float32, expanded to `broadcast_shape` (B, ...).

    Used only by subclasses in clients' scripts.
    """
    values = torch.as_tensor(np.asarray(arr), device=timesteps.device)[timesteps].float()
    return _broadcast(values, len(broadcast_shape)).expand(*broadcast_shape)


def _broadcast(values: torch.Tensor, ndim: int) -> torch.Tensor:
    """Values (B,), or of more dimensions, with dimensions of size 1 at the end, `ndim` in all."""
    return values.reshape(*values.shape, *[1] * (ndim - values.ndim))


def check_step_reverse(step_reverse: int, num_steps: int, flag: str = "--step_reverse") -> int:
    """`step_reverse` as an int. Raises UserError, naming `flag`, unless it is an integer in 0..`num_steps`."""
    try:
        k = operator.index(step_reverse)
    except TypeError:
        k = -1
    if not 0 <= k <= num_steps:
        raise UserError(
            f"{flag} {step_reverse} is out of range: expected a whole number from 0 to {num_steps}, the number of "
            "steps set by --timestep_respacing or --diffusion_steps"
        )
    return k


def _starting_point(
    model: Model,
    shape: Sequence[int],
    noise: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    generator: Noise = None,
    **_: Any,
) -> torch.Tensor:
    """The initial x of a loop, given its arguments: `noise` on the device of the loop, drawn if None."""
    if device is None:
        parameters = model.parameters() if hasattr(model, "parameters") else ()
        first = next(iter(parameters), noise)
        device = None if first is None else first.device
    if noise is None:
        return randn(tuple(shape), generator=generator, device=device)
    _check_batch(noise, shape)
    return noise.to(device)


def _check_batch(noise: torch.Tensor | None, shape: Sequence[int]) -> None:
    if noise is not None and (noise.ndim != len(shape) or len(noise) != shape[0]):
        raise UserError(f"noise has shape {tuple(noise.shape)}, expected {tuple(shape)}")


def _unless_first(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """0 if t = 0, else 1, for each image of a batch x (B, ...), as (B, 1, ...)."""
    return _broadcast((t != 0).to(x.dtype), x.ndim)


def _if_given(generator: Noise) -> dict[str, Noise]:
    """The generator as an argument, omitted if None, since overriding methods of clients may not accept it."""
    return {} if generator is None else {"generator": generator}


def _last(steps: Iterator[Output], start: torch.Tensor | None = None) -> torch.Tensor:
    """The last sample, or `start` if there are no steps."""
    x = start
    for out in steps:
        x = out["sample"]
    return x
