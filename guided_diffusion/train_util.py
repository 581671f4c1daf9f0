"""Training: the loop that turns batches of images into steps of an optimiser, checkpoints and a log.

Whatever is random in a step, the images, their time steps, their noise and dropout, depends on the seed and the number
of the step alone: a run that was killed and started again follows the one that was not. And it belongs to a row of the
global batch, not to a process: two processes with half of the batch each follow one with all of it, to rounding (but
for dropout).
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from enum import Enum
from functools import partial
from typing import Any

import blobfile as bf
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import dist_util, logger
from .command_line.stopping import Stopped, StopRequest, when_stopped
from .dist_util import get_rank, get_world_size
from .errors import ResultError, UserError
from .forward_backward import NoiseStreams
from .fp16_util import MixedPrecisionTrainer
from .gaussian_diffusion import GaussianDiffusion
from .nn import update_ema
from .resample import LossAwareSampler, LossSecondMomentResampler, ScheduleSampler, UniformSampler
from .system.checkpoint_files import Shapes, difference, shapes_of
from .training.checkpoints import find_ema_checkpoint as find_ema_checkpoint
from .training.checkpoints import find_resume_checkpoint as newest_checkpoint
from .training.checkpoints import opt_path, read_optimizer, remove_unfinished, write_checkpoint
from .training.checkpoints import parse_rates as parse_rates
from .training.checkpoints import parse_resume_step_from_filename as parse_resume_step_from_filename
from .training.optimizer_state import by_parameter, steps_taken
from .training.start import Start, changes_of, choose_start, describe_newest

Cond = dict[str, Tensor]  # what the model is given besides the images, each (B, ...)

SKIPPED = "skipped_steps"  # in the log: those that float16's loss scaling has left out since the last line
SAMPLER_NAMES = {UniformSampler: "uniform", LossSecondMomentResampler: "loss-second-moment"}
# PyTorch 2.13 renamed the option of whether buffers are sent around before each forward pass.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class TrainLoop:
    """Trains a diffusion model on the batches of `data`, on all processes together.

    Every `log_interval` steps a line is added to progress.csv and progress.json: the means since the last line of the
    losses, over all images and over those of each quartile of t (q0: the least noise), and of the norms of gradient
    and weights. Every `save_interval` steps, and at the end, the files of `training_checkpoints` are written.

    Args:
        model: the network, in float32, on its device, the same on all processes.
        diffusion: gives the losses.
        data: batches (images (B, C, H, W) in [-1, 1], cond), B being `batch_size` or another number; an object with
            `seek` and `position` such as `load_data` returns, or any iterator, whose position is then its owner's
            business.
        batch_size: images per process and step.
        microbatch: images per forward and backward pass; -1: all.
        lr: learning rate of AdamW.
        ema_rate: decays of the moving averages, a number or text with commas; empty: no averages.
        log_interval, save_interval: numbers of steps.
        resume_checkpoint: a modelNNNNNN.pt to begin from, with the files beside it. If `output` has checkpoints, the
            run resumes from the newest one, and this may only name that or the one that the run was begun with.
        use_fp16, fp16_scale_growth: see `MixedPrecisionTrainer`.
        schedule_sampler: chooses time steps; uniformly if None.
        weight_decay: of AdamW.
        lr_anneal_steps: the learning rate falls linearly to 0 in so many steps, and training ends; 0: it is constant.
        iterations: number of steps after which training ends; 0: no end.
        seed: of time steps, noise and dropout.
        output: folder of the checkpoints; `get_blob_logdir()` if None.
        settings: what makes this run another one than one with other values, by the names of the flags. A run is not
            resumed with other settings. None: what this class knows by itself, see `known_settings`.
        on_start: called on rank 0 with whether the run is resumed, when all of the checkpoint has been read and before
            anything is written.
        before_save: called on rank 0 before a checkpoint is written.
        on_save: called on rank 0 after a checkpoint with (model, step), where the model has the weights of the first
            moving average, if there is one.
        check_fit: called with (path, shapes of a checkpoint, shapes of the model) if these differ; it raises a
            UserError that says which flags to change.
        more_state: further entries of "training" in the optimizer's file.

    Raises:
        UserError: checkpoints that do not fit or cannot be read, or are those of a run with other settings; a number
            out of range.

    Attributes:
        step: number of steps that have been taken, in earlier processes too.
        resume_step: 0. Subclasses written for guided-diffusion, whose `step` starts at 0 when a run is resumed, add it.
    """

    prefix = ""  # of the names of losses in the log

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        data: Iterable[tuple[Tensor, Cond]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str = "",
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        iterations: int = 0,
        seed: int = 0,
        output: str | None = None,
        settings: Mapping[str, Any] | None = None,
        on_start: Callable[[bool], None] | None = None,
        before_save: Callable[[], None] | None = None,
        on_save: Callable[[Callable[..., Tensor], int], None] | None = None,
        check_fit: Callable[[str, Shapes, Shapes], None] | None = None,
        more_state: Mapping[str, Any] | None = None,
    ):
        self.model = model
        self.diffusion = diffusion
        self.data = iter(data)
        self.batch_size = batch_size
        self.global_batch = batch_size * get_world_size()
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.ema_rate = parse_rates(ema_rate)
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.resume_checkpoint = resume_checkpoint
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps
        self.last_step = min(filter(None, (lr_anneal_steps, iterations)), default=None)
        self.seed = seed
        self.settings = self.known_settings() if settings is None else dict(settings)
        self.on_start, self.before_save, self.on_save = on_start, before_save, on_save
        self.check_fit = check_fit
        self.more_state = dict(more_state or {})
        self.output: str = output or dist_util.on_main(get_blob_logdir)
        self.device = next(model.parameters()).device
        self.sync_cuda = torch.cuda.is_available()

        self.step = self.resume_step = 0
        self.saved_step: int | None = None  # of the last checkpoint that this object has read or written
        self.begun_from: dict[str, str] | None = None
        self.meter = LossMeter(self.device)
        self.mp_trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth)
        self.opt = torch.optim.AdamW(
            self.mp_trainer.master_params, lr=lr, weight_decay=weight_decay, fused=self.device.type in ("cpu", "cuda")
        )
        self.ema_params: list[list[Tensor]] = []
        self._continues_log = False
        self._request = StopRequest()
        self._stopping = 0  # the signal by which all processes have agreed to stop
        self._resume()
        self._counted = self.step
        self.ddp_model = self._distributed(model)
        self.use_ddp = self.ddp_model is not model

    def known_settings(self) -> dict[str, Any]:
        """What decides the course of a run, as far as this class knows it, by the names that its user knows."""
        sampler = type(self.schedule_sampler)
        settings = {
            "--lr": float(self.lr),
            "--weight_decay": float(self.weight_decay),
            "--lr_anneal_steps": self.lr_anneal_steps,
            "--use_fp16": self.use_fp16,
            "--schedule_sampler": SAMPLER_NAMES.get(sampler, sampler.__name__),
            "--seed": self.seed,
            "images per step (--batch_size times processes)": self.global_batch,
            "diffusion steps": self.diffusion.num_timesteps,
        }
        if self.use_fp16:
            settings["--fp16_scale_growth"] = self.fp16_scale_growth
        if hasattr(self.diffusion, "betas"):
            settings["noise schedule"] = "betas from {:.4g} to {:.4g}".format(*self.diffusion.betas[[0, -1]])
        for what in ("model_mean_type", "model_var_type", "loss_type"):
            if isinstance(value := getattr(self.diffusion, what, None), Enum):
                settings[what.replace("_", " ")] = value.name
        return settings

    def run_loop(self) -> None:
        """Train until the last step, or until the process is asked to end, which saves a checkpoint first.

        Raises:
            UserError: checkpoints cannot be written.
            ResultError: a loss, a norm or a weight is NaN or infinite; nothing of it is saved.
            Stopped: a signal came.
        """
        if self.done:
            logger.info(f"already at step {self.step}: nothing is left to do")
            return
        when_stopped(partial(describe_newest, self.output, self.resume_checkpoint))
        self.model.train()
        bar = logger.progress_bar(self.last_step, "training", "step", initial=self.step)
        with bar, StopRequest() as self._request:
            try:
                self._take_steps(bar)
            except RuntimeError as error:
                # Where the signal came at the start, another rank may have left already, and cannot be talked to.
                if self._request.signum and get_world_size() > 1:
                    raise Stopped(self._request.signum) from error
                raise

    def _take_steps(self, bar: tqdm) -> None:
        while not self.done:
            dist_util.check_peers()
            agreed = _maximum(self._request)
            step = self.step
            self.run_step(*next(self.data))
            if self.step == step:  # a subclass's own leaves the count to the loop, as that of guided-diffusion does
                self.step = self._counted = step + 1
            bar.update()
            if self.step % self.log_interval == 0:
                line = self.log()
                if (name := f"{self.prefix}loss") in line:
                    bar.set_postfix(loss=f"{line[name]:.4g}")
            signum = self._stopping = agreed()
            if self.step % self.save_interval == 0 or self.done or signum:
                self.save()
            if signum:
                raise Stopped(signum)

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.last_step is not None and self.step >= self.last_step

    def run_step(self, batch: Tensor, cond: Cond) -> None:
        """One step of the optimiser on this process's part (B, C, H, W) of the global batch."""
        self._check_count()
        losses_and_t = self.forward_backward(batch, cond)
        self._anneal_lr()
        grad_norm, param_norm = self.mp_trainer.step(self.opt)
        # In float16 the scaler skips a step whose gradients have overflowed: that is counted, and its losses are not.
        taken = grad_norm.isfinite() if self.mp_trainer.scaler.is_enabled() else None
        if losses_and_t is not None:  # a subclass's own may log its losses itself
            self.meter.add(*losses_and_t, self.diffusion.num_timesteps, taken)
        self.meter.add_norms(taken, grad_norm=grad_norm)
        self.meter.add_norms(param_norm=param_norm)
        if taken is not None:
            self.meter.add_total(**{SKIPPED: (~taken).double() * dist_util.is_main()})
        self._update_ema()
        self.step += 1
        self._counted = self.step
        self.log_step()

    def _update_ema(self) -> None:
        """Move the moving averages towards the weights."""
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema(params, self.mp_trainer.master_params, rate=rate)

    def log_step(self) -> None:
        """Record the number of the step; called after each. Subclasses add what they want to see in the log."""
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.global_batch)

    def forward_backward(self, batch: Tensor, cond: Cond) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the gradients of the global batch's mean loss, microbatch by microbatch.

        Returns the weighted terms of the loss by their names in the log, each (B,), and the indices t, (B,).
        """
        batch = batch.to(self.device, non_blocking=True)
        cond = {name: value.to(self.device, non_blocking=True) for name, value in cond.items()}
        t, weights = self.time_steps(self.seed, len(batch))  # (B,), (B,)
        noise = self.noise(batch.shape, self.seed)
        torch.manual_seed(step_seed(self.seed, self.step, get_rank()))  # for dropout

        self.mp_trainer.zero_grad()
        terms: list[dict[str, Tensor]] = []
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            last = start + self.microbatch >= len(batch)
            # Gradients of the processes are averaged once, in the last backward pass.
            with nullcontext() if last or self.ddp_model is self.model else self.ddp_model.no_sync():
                with self.mp_trainer.autocast():
                    losses = self.compute_losses(
                        batch[part], t[part], noise[part], {name: value[part] for name, value in cond.items()}
                    )
                self.mp_trainer.backward((losses["loss"] * weights[part]).sum() / len(batch))
            terms.append({name: value.detach() for name, value in losses.items()})

        joined = {name: torch.cat([losses[name] for losses in terms]) for name in terms[0]}  # each (B,)
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, joined["loss"])
        return {f"{self.prefix}{name}": value * weights for name, value in joined.items()}, t

    def compute_losses(self, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Terms of the loss, each (B,), among them "loss", of images x (B, C, H, W) at the indices t (B,)."""
        return self.diffusion.training_losses(self.ddp_model, x, t, model_kwargs=cond, noise=noise)

    def log(self) -> dict[str, Any]:
        """Write a line of the log: the means since the last, over all processes. Returns it.

        Raises ResultError, on all processes, and writes nothing, if a number is NaN or infinite.
        """
        means, scaling = self.meter.means(), {}
        self._check_finite(means)
        if self.mp_trainer.scaler.is_enabled():
            scale = self.mp_trainer.scaler.get_scale()
            if SKIPPED in means and f"{self.prefix}loss" not in means and scale < 1:
                self._not_finite(f"every step since the last line overflowed, although the loss scale is {scale}")
            scaling["lg_loss_scale"] = float(np.log2(scale))
        TrainLoop.log_step(self)  # whatever a subclass calls step, a resumed run cuts the log by this count
        logger.logkvs(scaling | means)
        return logger.dumpkvs()

    def save(self) -> None:
        """Write the checkpoint of this step, on rank 0; all processes call this.

        Raises UserError if it cannot be written, and ResultError if there are numbers in it that are NaN or infinite.
        """
        if self.step == self.saved_step:
            return
        counted = self.meter.over_all_ranks()
        self._check_finite(self.meter.means_of(counted))
        dist_util.on_main(self._write_checkpoint, counted)
        self.saved_step = self.step
        if self.on_save is not None and dist_util.is_main() and not self._stopping:
            self.model.eval()
            self.on_save(self._averaged_model, self.step)
            self.model.train()

    # A step's randomness

    def _rows(self, count: int) -> list[int]:
        """The rows of the global batch of this process's `count` images; those beyond `batch_size` follow it."""
        rank, processes = get_rank(), get_world_size()
        own = range(rank * self.batch_size, (rank + 1) * self.batch_size)
        more = range(self.global_batch + rank, self.global_batch + rank + processes * count, processes)
        return [*own, *more][:count]

    def time_steps(self, seed: int, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Indices t and weights of the losses, (count,) each: this process's rows of what is drawn for all.

        `count` is the number of images, `batch_size` by default.
        """
        generator = np.random.default_rng(step_seed(seed, self.step))
        rows = self._rows(self.batch_size if count is None else count)
        drawn = max(self.global_batch, rows[-1] + 1)
        t, weights = self.schedule_sampler.sample(drawn, torch.device("cpu"), generator)
        return t[rows].to(self.device), weights[rows].to(self.device)

    def noise(self, shape: Sequence[int], seed: int) -> Tensor:
        """Standard normal noise (B, ...) for this process's rows."""
        streams = NoiseStreams(seed, [f"row {row}" for row in self._rows(shape[0])], self.step, self.device)
        return streams.randn(shape, device=self.device)

    def _anneal_lr(self) -> None:
        """Set the learning rate of this step: a straight line from `lr` at step 0 to 0 after `lr_anneal_steps`."""
        left = 1 - self.step / self.lr_anneal_steps if self.lr_anneal_steps else 1.0
        for group in self.opt.param_groups:
            group["lr"] = self.lr * left

    # Checkpoints

    def _resume(self) -> None:
        """Take up the newest checkpoint in the output folder, else `resume_checkpoint`, else begin."""
        args = self.resume_checkpoint, self.output, self.settings, self.ema_rate
        self._start = start = dist_util.on_main(choose_start, *args)
        self._order: list[str] | None = None
        self.begun_from = None if start is None else start.begun_from
        self._load_and_sync_parameters()
        overridden = type(self)._load_and_sync_parameters is not TrainLoop._load_and_sync_parameters
        if start is not None and start.resumed and overridden:
            self._load_weights()  # a subclass loads what its run begins with, and this one has its own checkpoint
        # Weights loaded by a subclass start a new run, unless it sets `resume_step`: then they resume one.
        if start is not None and (self._order is not None or self.resume_step):
            self.step = start.number if start.resumed else self.resume_step or start.number
            self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
            self._load_optimizer_state()
        else:
            self.step = self.resume_step
            self.ema_params = [_copies(self.mp_trainer.master_params) for _ in self.ema_rate]
        self.resume_step = 0
        if not self.done:
            dist_util.on_main(self._open_folder, start)
        if start is not None and start.resumed:
            self.saved_step = self.step

    def _load_and_sync_parameters(self) -> None:
        """Give the model the weights to begin with, the same on all processes. Subclasses may load others."""
        if self._start is None:
            dist_util.sync_params(self.model.parameters())
        else:
            self._load_weights()

    def _open_folder(self, start: Start | None) -> None:
        """The first changes in the output folder, when nothing speaks against this run there."""
        resumed = start is not None and start.resumed
        if self.on_start is not None:
            self.on_start(resumed)
        remove_unfinished(self.output)
        if start is not None:
            verb = "resuming" if resumed else "beginning"
            logger.info(f"{verb} from {start.path}, after {self.step} steps")
        if self._continues_log:
            logger.rewind("step", self.step)
        else:
            logger.set_aside_files()

    def _load_weights(self) -> None:
        """Load the weights to start from, and note the names of the parameters in the order of the file."""
        weights = self._read_weights(self._start.path, self._start)
        self.model.load_state_dict(weights)
        parameters = dict(self.model.named_parameters())
        self._order = [name for name in weights if name in parameters]

    def _load_ema_parameters(self, rate: float) -> list[Tensor]:
        """The moving average beside the weights to start from; if there is none, a copy of the model's weights."""
        start = self._start
        average = dist_util.on_main(find_ema_checkpoint, start.path, start.number, rate)
        if average is None:
            logger.warn(f"no moving average of decay {rate} beside {start.path}: it begins with the model's weights")
            return _copies(self.mp_trainer.master_params)
        weights = self._read_weights(average, start)
        return _copies(value.to(self.device) for value in self.mp_trainer.state_dict_to_master_params(weights))

    def _load_optimizer_state(self) -> None:
        """Restore the optimizer and the other state saved beside the initial weights, if there is any."""
        start = self._start
        state = dist_util.on_every_rank(read_optimizer, start.path, start.number)
        if state is None:
            logger.warn(f"no {opt_path('', start.number)} beside {start.path}: the optimizer starts anew")
            return
        order = self._order or [name for name, _ in self.model.named_parameters()]
        self._load_optimizer(start, state, order)

    def _read_weights(self, path: str, start: Start) -> dict[str, Tensor]:
        """Raises UserError, on all processes, if a file has the weights of another network than the model."""
        expected = shapes_of(self.model.state_dict())
        weights = dist_util.load_weights(path, flag=_flag(start), expected=expected)
        if shapes_of(weights) != expected:
            dist_util.on_every_rank(self._refuse, path, shapes_of(weights), expected)
        return weights

    def _refuse(self, path: str, found: Shapes, expected: Shapes) -> None:
        if self.check_fit is not None:
            self.check_fit(path, found, expected)
        raise UserError(f"--resume_checkpoint {path} does not fit your flags: {difference(found, expected)}")

    def _load_optimizer(self, start: Start, state: dict[str, Any], order: list[str]) -> None:
        training = state.get("training", {})
        if not start.resumed and (changes := changes_of(training.get("settings", {}), self.settings)):
            logger.info(f"other settings than those of {start.path}: {'; '.join(changes)}")
        parameters = dict(self.model.named_parameters())
        states = dist_util.on_every_rank(self._states_by_parameter, start, state, order)
        numbered = {index: states[name] for index, name in enumerate(parameters) if name in states}
        # Its own groups, since learning rate and weight decay may be others now.
        self.opt.load_state_dict({"state": numbered, "param_groups": self.opt.state_dict()["param_groups"]})
        if "training" not in state:
            self._take_up_original(start, steps_taken(states))
        if scaler := training.get("scaler"):
            self.mp_trainer.scaler.load_state_dict(scaler)
        if isinstance(self.schedule_sampler, LossAwareSampler) and "schedule_sampler" in training:
            self.schedule_sampler.load_state_dict(training["schedule_sampler"])
        if start.resumed and "meter" in training:
            self.meter.load(training["meter"], keep=dist_util.is_main())
            self._continues_log = True
        if hasattr(self.data, "seek"):
            self.data.seek(training.get("position", self.step * self.global_batch))

    def _states_by_parameter(self, start: Start, state: dict[str, Any], order: list[str]) -> dict[str, Any]:
        parameters = dict(self.model.named_parameters())
        try:
            return by_parameter(state, {name: tuple(parameters[name].shape) for name in order})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            path = opt_path(bf.dirname(start.path), start.number)
            raise UserError(f"{path} is not the optimizer's state of {start.path}: {error}") from error

    def _take_up_original(self, start: Start, taken: int) -> None:
        """Count on from the steps that the original's optimizer has taken: its files are numbered a step lower."""
        self.step = max(start.number, taken)
        logger.info(
            f"{start.path} is of another program, whose optimizer has taken {taken} steps: the next step is number "
            f"{self.step + 1} here"
        )

    def _write_checkpoint(self, meter: dict[str, Any]) -> None:
        if self.before_save is not None:
            self.before_save()
        params, optimizer = self.mp_trainer.master_params, self.opt.state_dict()
        states = [value for state in optimizer["state"].values() for value in state.values()]
        averages = dict(zip(self.ema_rate, self.ema_params, strict=True))
        for what, tensors in [
            ("a weight", params),
            ("a number of the optimizer", states),
            *((f"a weight of the moving average of decay {rate}", average) for rate, average in averages.items()),
        ]:
            if not _are_finite(tensors):
                raise ResultError(self._divergence(f"{what} is NaN or infinite"))
        training = {
            "position": getattr(self.data, "position", self.step * self.global_batch),
            "settings": self.settings,
            "ema_rates": self.ema_rate,
            "begun_from": self.begun_from,
            "meter": meter,
            "scaler": self.mp_trainer.scaler.state_dict(),
            **self.more_state,
        }
        if isinstance(self.schedule_sampler, LossAwareSampler):
            training["schedule_sampler"] = self.schedule_sampler.state_dict()
        write_checkpoint(
            self.output,
            self.step,
            self.model.state_dict(),
            {**optimizer, "training": training},
            {rate: self.mp_trainer.master_params_to_state_dict(average) for rate, average in averages.items()},
        )

    def _averaged_model(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the model with the weights of the first moving average."""
        if self._request.signum:  # the checkpoint is written: a picture of samples is not worth the time that is left
            raise UserError("the run is being stopped")
        with torch.no_grad(), self.mp_trainer.autocast():
            if not self.ema_params:
                return self.model(*args, **kwargs)
            weights = self.mp_trainer.master_params_to_state_dict(self.ema_params[0])
            return functional_call(self.model, weights, args, kwargs)

    # The rest

    def _distributed(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients are averaged over the processes."""
        if get_world_size() == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **{SYNC_BUFFERS: False},
            bucket_cap_mb=128,
            gradient_as_bucket_view=True,
        )

    def _check_count(self) -> None:
        """Steps are counted once. Raises UserError if a loop of another kind counts them too."""
        if self.step != self._counted:
            raise UserError(
                f"step is {self.step}, expected {self._counted}: run_step counts the steps, so the loop that calls it "
                "must not"
            )

    def _check_finite(self, numbers: Mapping[str, float]) -> None:
        """Raise ResultError, on all processes, which have the same numbers, if one is NaN or infinite."""
        if wrong := [name for name, value in numbers.items() if not np.isfinite(value)]:
            self._not_finite(f"{wrong[0]} is {numbers[wrong[0]]}")

    def _not_finite(self, what: str) -> None:
        error = ResultError(self._divergence(what))
        error.on_all_ranks = True
        raise error

    def _divergence(self, what: str) -> str:
        return (
            f"training has diverged: at step {self.step} {what}. This step is not saved. Lower --lr and start again "
            "with another --output, from scratch or from an earlier checkpoint (--resume_checkpoint)"
        )


# For scripts of guided-diffusion


def get_blob_logdir() -> str:
    """The folder of the checkpoints: the one that DIFFUSION_BLOB_LOGDIR names, else the logger's."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_resume_checkpoint(folder: str | None = None, ema_rates: Sequence[float | str] = ()) -> str | None:
    """The model's file of the newest step in `folder`, by default `get_blob_logdir()`, of which all files are whole.

    None without any.
    """
    return newest_checkpoint(folder or get_blob_logdir(), ema_rates)


def log_loss_dict(diffusion: GaussianDiffusion, ts: Tensor, losses: Mapping[str, Tensor]) -> None:
    """Log the means of losses, (B,) each, at the indices ts (B,): of all as NAME, by quartile of t as NAME_q0 to q3."""
    quartiles = (4 * ts // diffusion.num_timesteps).tolist()
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for quartile, value in zip(quartiles, values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{quartile}", value)


class LossMeter:
    """Means of what happens between two lines of the log. Sums stay on the device, so that no step waits for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}  # name -> (5,): over all images, and over each quartile of t
        self.counts: dict[str, Tensor] = {}  # name -> (5,): of how many

    def add(self, terms: Mapping[str, Tensor], t: Tensor, num_timesteps: int, taken: Tensor | None = None) -> None:
        """Count in the terms (B,) of the losses of images at the indices t (B,) of `num_timesteps`.

        `taken` (0-d) tells whether their step was taken: the losses of one that was not do not count. None: it was.
        """
        quartile = nn.functional.one_hot(4 * t // num_timesteps, 4).double()  # (B, 4)
        groups = torch.cat([torch.ones_like(quartile[:, :1]), quartile], dim=1)  # (B, 5)
        for name, values in terms.items():
            self._count(name, values.double() @ groups, groups.sum(dim=0), taken)

    def add_norms(self, taken: Tensor | None = None, **norms: Tensor) -> None:
        """Log numbers (0-d) of one step that are the same on all processes; `taken` as in `add`."""
        for name, norm in norms.items():
            self._count(name, self._only(norm), self._only(1.0), taken)

    def add_total(self, **numbers: Tensor) -> None:
        """Log numbers (0-d) of this process, summed rather than averaged."""
        for name, number in numbers.items():
            self._count(name, self._only(number), self._only(0.0))

    def _only(self, number: Tensor | float) -> Tensor:
        """(5,): a number that belongs to no quartile."""
        values = torch.zeros(5, dtype=torch.float64, device=self.device)
        values[0] = number
        return values

    def _count(self, name: str, sums: Tensor, counts: Tensor, taken: Tensor | None = None) -> None:
        if taken is not None:
            sums, counts = (torch.where(taken, value, 0.0) for value in (sums, counts))
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self.counts[name] = self.counts[name] + counts if name in self.counts else counts

    def over_all_ranks(self) -> dict[str, dict[str, Tensor]]:
        """Sums and counts of all processes together, on the CPU."""
        if not self.sums:
            return {"sums": {}, "counts": {}}
        both = torch.stack([torch.stack([self.sums[name], self.counts[name]]) for name in self.sums]).cpu()
        if get_world_size() > 1:
            dist.all_reduce(both)
        sums, counts = both.unbind(dim=1)
        return {
            "sums": dict(zip(self.sums, sums.unbind(), strict=True)),
            "counts": dict(zip(self.sums, counts.unbind(), strict=True)),
        }

    def means(self) -> dict[str, float]:
        """The means over all processes, by name, those of quartiles as NAME_q0 .. NAME_q3; and begin anew."""
        totals = self.over_all_ranks()
        self.sums, self.counts = {}, {}
        return self.means_of(totals)

    @staticmethod
    def means_of(totals: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """The means, by name, of sums and counts that `over_all_ranks` returned; of `SKIPPED` the sum."""
        means = {}
        for name, sums in totals["sums"].items():
            if name == SKIPPED:
                means[name] = round(float(sums[0]))
                continue
            for i, (value, count) in enumerate(zip(sums.tolist(), totals["counts"][name].tolist(), strict=True)):
                if count:
                    means[f"{name}_q{i - 1}" if i else name] = value / count
        return means

    def load(self, totals: Mapping[str, Mapping[str, Tensor]], keep: bool) -> None:
        """Go on with the sums and counts of a checkpoint; a process that does not `keep` them starts from 0."""
        factor = float(keep)
        self.sums = {name: factor * value.to(self.device) for name, value in totals["sums"].items()}
        self.counts = {name: factor * value.to(self.device) for name, value in totals["counts"].items()}


def _flag(start: Start) -> str:
    """What a message about the file begins with."""
    return "the checkpoint" if start.resumed else "--resume_checkpoint"


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.detach().isfinite().all()) for tensor in tensors)


def _copies(params: Iterable[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def step_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _maximum(request: StopRequest) -> Callable[[], int]:
    """Begin to ask all processes whether a signal came; the answer, the same on all, is there when it is called for."""
    if get_world_size() == 1:
        return lambda: request.signum
    signum = torch.tensor([request.signum])
    work = dist.all_reduce(signum, op=dist.ReduceOp.MAX, async_op=True)

    def answer() -> int:
        work.wait()
        return int(signum)

    return answer
