"""Training: the loop that turns batches of images into optimizer steps, checkpoints and a log.

All randomness of a step (images, timesteps, noise, dropout) depends only on the seed and the step number, so a run that
was killed and resumed is identical to an uninterrupted one. Random numbers belong to rows of the global batch, not to
processes: two processes with half of the batch each match one with all of it, up to rounding (and dropout).
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from .command_line.stopping import Stopped, StopRequest, hand_over, when_stopped
from .compute.inference import hardware, versions, wide_enough_for_channels_last
from .compute.transfer import upload
from .dist_util import get_rank, get_world_size
from .errors import ResultError, UserError
from .forward_backward import NoiseStreams
from .fp16_util import INITIAL_LOG_LOSS_SCALE as INITIAL_LOG_LOSS_SCALE
from .fp16_util import MixedPrecisionTrainer
from .gaussian_diffusion import GaussianDiffusion
from .nn import update_ema
from .resample import LossAwareSampler, LossSecondMomentResampler, ScheduleSampler, UniformSampler
from .runs.settings import machine_changes
from .system.checkpoint_files import Shapes, difference, shapes_of
from .training.checkpoints import find_ema_checkpoint as find_ema_checkpoint
from .training.checkpoints import newest_complete_model, opt_path, read_optimizer, remove_unfinished, write_checkpoint
from .training.checkpoints import parse_rates as parse_rates
from .training.checkpoints import parse_resume_step_from_filename as parse_resume_step_from_filename
from .training.compiled import CompiledForTraining, batch_sizes, choose_compilation
from .training.optimizer_state import MOMENTS, by_parameter, in_row_major, laid_out_as, steps_taken
from .training.start import changed_settings, choose_start, describe_newest

Cond = dict[str, Tensor]  # other inputs of the model, each (B, ...)

SKIPPED = "skipped_steps"  # log column: steps skipped by float16 loss scaling since the last line
SAMPLER_NAMES = {UniformSampler: "uniform", LossSecondMomentResampler: "loss-second-moment"}


class TrainLoop:
    """Trains a diffusion model on the batches of `data`, with data parallelism.

    Every `log_interval` steps, progress.csv and progress.json get a line of means since the previous line: the losses,
    overall and by quartile of t (q0: the least noise), and the norms of gradient and weights. A checkpoint is written
    every `save_interval` steps and at the end, see `training.checkpoints`.

    Args:
        model: network in float32, on its device, identical on all processes.
        diffusion: diffusion, which computes the losses.
        data: batches (images (B, C, H, W) in [-1, 1], cond). Its `position`, if any, is saved and restored by `seek`.
        batch_size: images per process and step; a batch may have another number of them.
        microbatch: images per forward and backward pass; -1: all.
        lr: learning rate of AdamW.
        ema_rate: decays of the weights' moving averages, a number or comma-separated text.
        log_interval, save_interval: numbers of steps.
        resume_checkpoint: a modelNNNNNN.pt to start from, together with the files beside it. If `output` has
            checkpoints, the run resumes from the newest one; this must then name it, or the one the run started from.
        use_fp16, fp16_scale_growth: see `MixedPrecisionTrainer`. Compiled on a GPU, the convolutions of wide networks
            are then channels-last. Files do not depend on this.
        half_precision: dtype of half precision: "float16", "bfloat16" or "auto", see `half_precision_dtype`.
        compile: compile the network, see `choose_compilation`.
        schedule_sampler: sampler of timesteps; None: uniform.
        weight_decay: weight decay of AdamW.
        lr_anneal_steps: last step, by which the learning rate falls linearly to 0; 0: no limit and a constant rate.
        iterations: last step; 0: no limit.
        seed: seed of timesteps, noise and dropout; None: the one in `settings`, else that of the run if it is resumed,
            else rank 0's `torch.initial_seed()`, which `torch.manual_seed` sets.
        output: checkpoint folder; None: `get_blob_logdir()`.
        settings: settings that must not change when the run is resumed, by flag; None: `default_settings`.
        on_start: called on rank 0 with whether the run is resumed, before anything is written.
        before_save: called on rank 0 before a checkpoint is written.
        on_save: called on rank 0 after a checkpoint with (model, step); the model has the weights of the first moving
            average, if any. The other ranks wait.
        on_resume: called as `on_save` with the checkpoint that a run is resumed from, since the run may have been
            killed before `on_save`.
        check_fit: called with (path, shapes in the checkpoint, shapes in the model) if these differ; raises UserError.
        extra_state: more entries for "training" in the optimizer's file.

    Raises:
        UserError: a checkpoint is unreadable, does not fit, or is of other settings; a number is out of range.

    Attributes:
        step: number of steps taken, including those of earlier processes.
        resume_step: 0. Subclasses written for guided-diffusion, whose `step` restarts at 0, add it to `step`.
    """

    prefix = ""  # of the losses' names in the log

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
        half_precision: str = "auto",
        fp16_scale_growth: float = 1e-3,
        compile: bool | str = False,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        iterations: int = 0,
        seed: int | None = None,
        output: str | None = None,
        settings: Mapping[str, Any] | None = None,
        on_start: Callable[[bool], None] | None = None,
        before_save: Callable[[], None] | None = None,
        on_save: Callable[[Callable[..., Tensor], int], None] | None = None,
        on_resume: Callable[[Callable[..., Tensor], int], None] | None = None,
        check_fit: Callable[[str, Shapes, Shapes], None] | None = None,
        extra_state: Mapping[str, Any] | None = None,
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
        self.half_precision = half_precision
        self.fp16_scale_growth = fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps
        self.last_step = min(filter(None, (lr_anneal_steps, iterations)), default=None)
        self.seed = seed
        self.settings = self.default_settings() if settings is None else dict(settings)
        self.compile_choice, self.compiled = compile, False
        self.on_start, self.before_save = on_start, before_save
        self.on_save, self.on_resume = on_save, on_resume
        self.check_fit = check_fit
        self.extra_state = dict(extra_state or {})
        self.output: str = output or dist_util.on_main(get_blob_logdir)
        self.device = next(model.parameters()).device
        self.sync_cuda = torch.cuda.is_available()

        self.step = self.resume_step = 0
        self.saved_step: int | None = None  # step of the last checkpoint read or written
        self.origin: dict[str, str] | None = None  # see `Start`
        self._begun_with: dict[str, str] = {}  # the `_machine` on which a compiled run was started
        self.meter = LossMeter(self.device)
        half = None if half_precision == "auto" else getattr(torch, half_precision)
        self.mp_trainer = MixedPrecisionTrainer(
            model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth, half=half
        )
        self.opt = torch.optim.AdamW(
            self.mp_trainer.master_params, lr=lr, weight_decay=weight_decay, fused=self.device.type in ("cpu", "cuda")
        )
        self.ema_params: list[list[Tensor]] = []
        self._request = StopRequest()
        self._stop_signal = 0  # signal that all processes have agreed to obey
        self._load_start()
        if self._prefers_channels_last():
            self._use_channels_last()
        self._expected_step = self.step
        self.ddp_model = self._distributed(model)
        self.use_ddp = get_world_size() > 1

    def default_settings(self) -> dict[str, Any]:
        """Settings that determine the course of a run, as far as this class knows them, by flag."""
        sampler = type(self.schedule_sampler)
        settings = {
            "--lr": float(self.lr),
            "--weight_decay": float(self.weight_decay),
            "--lr_anneal_steps": self.lr_anneal_steps,
            "--use_fp16": self.use_fp16,
            "--schedule_sampler": SAMPLER_NAMES.get(sampler, sampler.__name__),
            "images per step (--batch_size times processes)": self.global_batch,
            "diffusion steps": self.diffusion.num_timesteps,
        }
        if self.seed is not None:
            settings["--seed"] = self.seed
        if self.use_fp16:
            settings["--fp16_scale_growth"] = self.fp16_scale_growth
        if self.half_precision != "auto":
            settings["--half_precision"] = self.half_precision
        if hasattr(self.diffusion, "betas"):
            settings["noise schedule"] = "betas from {:.4g} to {:.4g}".format(*self.diffusion.betas[[0, -1]])
        for kind in ("model_mean_type", "model_var_type", "loss_type"):
            if isinstance(value := getattr(self.diffusion, kind, None), Enum):
                settings[kind.replace("_", " ")] = value.name
        return settings

    def run_loop(self) -> None:
        """Train until the last step, or until a stop signal arrives, which saves a checkpoint first.

        Outside `stopping.run`, the program's own handler then receives the signal; training continues if it returns.

        Raises:
            UserError: a checkpoint cannot be written.
            ResultError: a loss, a norm or a weight is NaN or infinite; that step is not saved.
            Stopped: a signal arrived.
        """
        if self._start is not None and self._start.resumed:
            self._call_on_main(self.on_resume)
        if self.done:
            logger.info(f"already at step {self.step}: nothing left to do")
            return
        when_stopped(partial(describe_newest, self.output, self.resume_checkpoint))
        self.model.train()
        while not self.done:
            stopped = None
            bar = logger.progress_bar(self.last_step, "training", "step", initial=self.step)
            try:
                with bar, StopRequest() as self._request:
                    self._take_steps_together(bar)
            except Stopped as reason:
                stopped = reason
            if stopped is not None:
                hand_over(stopped)
                if not self._stop_signal:  # in the middle of a step
                    raise KeyboardInterrupt
                self._stop_signal = 0

    def _take_steps_together(self, bar: tqdm) -> None:
        try:
            self._take_steps(bar)
        except RuntimeError as error:
            # If the signal arrived before the loop, another rank may already have left and no longer answers.
            if self._request.signum and get_world_size() > 1:
                raise Stopped(self._request.signum) from error
            raise

    def _take_steps(self, bar: tqdm) -> None:
        while not self.done:
            dist_util.check_peers()
            agreed_signal = _signal_of_any_rank(self._request)
            step = self.step
            self.run_step(*next(self.data))
            if self.step == step:  # a run_step written for guided-diffusion leaves counting to the loop
                self.step = self._expected_step = step + 1
            bar.update()
            if self.step % self.log_interval == 0:
                line = self.log()
                if (name := f"{self.prefix}loss") in line:
                    bar.set_postfix(loss=f"{line[name]:.4g}")
            signum = self._stop_signal = agreed_signal()
            if self.step % self.save_interval == 0 or self.done or signum:
                self.save()
            if signum:
                raise Stopped(signum)

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.last_step is not None and self.step >= self.last_step

    def run_step(self, batch: Tensor, cond: Cond) -> None:
        """Take an optimizer step on this process's part (B, C, H, W) of the global batch."""
        if self.step != self._expected_step:
            raise UserError(
                f"step is {self.step}, expected {self._expected_step}: run_step counts the steps, so the loop that "
                "calls it must not"
            )
        losses = self.forward_backward(batch, cond)
        self._anneal_lr()
        grad_norm, param_norm = self.mp_trainer.step(self.opt)
        # In float16, a step with overflowing gradients is skipped: it is counted, but its losses are not averaged.
        taken = grad_norm.isfinite() if self.mp_trainer.scaler.is_enabled() else None
        if losses is not None:  # a subclass may log its losses itself
            terms, t, weights = losses
            self.meter.add(terms, t, self.diffusion.num_timesteps, taken, weights)
        self.meter.add_number("grad_norm", grad_norm, taken)
        self.meter.add_number("param_norm", param_norm)
        if taken is not None:
            self.meter.add_number(SKIPPED, (~taken).double() * dist_util.is_main())
        self._update_ema()
        self.step += 1
        self._expected_step = self.step
        self.log_step()

    def _update_ema(self) -> None:
        """Move the moving averages towards the weights. Integers, which are not trained, have no average."""
        weights = [param for param in self.mp_trainer.master_params if param.is_floating_point()]
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema([param for param in params if param.is_floating_point()], weights, rate=rate)

    def log_step(self) -> None:
        """Log the step number, after each step. Subclasses may log more."""
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.global_batch)

    def forward_backward(self, batch: Tensor, cond: Cond) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Compute the gradients of the global batch's mean weighted loss, microbatch by microbatch.

        Returns the loss terms by their names in the log, the timesteps t, and the weights: (B,) each.
        """
        batch = upload(batch, self.device)
        cond = {name: upload(value, self.device) for name, value in cond.items()}
        t, weights = self.draw_timesteps(self.seed, len(batch))  # (B,), (B,)
        noise = self.draw_noise(batch.shape, self.seed)

        self.mp_trainer.zero_grad()
        terms: list[dict[str, Tensor]] = []
        with self._step_randomness():
            for start in range(0, len(batch), self.microbatch):
                part = slice(start, start + self.microbatch)
                last = start + self.microbatch >= len(batch)
                # Gradients are averaged over the processes once, in the last backward pass.
                with nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():
                    with self.mp_trainer.autocast():
                        losses = self.compute_losses(
                            batch[part], t[part], noise[part], {name: value[part] for name, value in cond.items()}
                        )
                    self.mp_trainer.backward((losses["loss"] * weights[part]).sum() / len(batch))
                terms.append(self._for_each_image(losses, len(t[part])))

        joined = {name: torch.cat([losses[name] for losses in terms]) for name in terms[0]}  # each (B,)
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, joined["loss"])
        return {f"{self.prefix}{name}": value for name, value in joined.items()}, t, weights

    @contextmanager
    def _step_randomness(self) -> Iterator[None]:
        """A block whose random numbers, such as those of dropout, depend on seed, step and rank alone.

        The state of the global generators, from which the caller may draw its data, is restored after the block.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(step_seed(self.seed, self.step, get_rank()))
            yield

    def _for_each_image(self, losses: Mapping[str, Tensor | float], count: int) -> dict[str, Tensor]:
        """Loss terms, (count,) each, without gradients. A subclass may also give one number for all images."""
        return {
            name: torch.as_tensor(value, device=self.device).detach().expand(count) for name, value in losses.items()
        }

    def compute_losses(self, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Loss terms, (B,) each, including "loss", of images x (B, C, H, W) at timesteps t (B,)."""
        losses = self.diffusion.training_losses
        known = {"noise": noise} if _accepts(losses, "noise") else {}  # not in every client's override
        return losses(self.ddp_model, x, t, model_kwargs=cond, **known)

    def log(self) -> dict[str, Any]:
        """Write and return a line of the log: means since the previous line, over all processes.

        Raises ResultError, on all processes and before writing, if a number is NaN or infinite.
        """
        means, scaling = self.meter.means(), {}
        self._check_finite(means)
        if self.mp_trainer.scaler.is_enabled():
            scale = self.mp_trainer.scaler.get_scale()
            if SKIPPED in means and f"{self.prefix}loss" not in means and scale < 1:
                self._raise_divergence(f"every step since the last line overflowed, although the loss scale is {scale}")
            scaling["lg_loss_scale"] = float(np.log2(scale))
        TrainLoop.log_step(self)  # resuming cuts the log by this count, whatever a subclass logs as "step"
        logger.logkvs(scaling | means)
        return logger.dumpkvs()

    def save(self) -> None:
        """Write the checkpoint of this step, on rank 0; all processes must call this.

        Raises UserError if it cannot be written, ResultError if it would contain NaN or infinity.
        """
        if self.step == self.saved_step:
            return
        totals = self.meter.over_all_ranks()
        self._check_finite(self.meter.means_of(totals))
        dist_util.on_main(self._write_checkpoint, totals)
        self.saved_step = self.step
        if not self._stop_signal:
            self._call_on_main(self.on_save)

    def _call_on_main(self, function: Callable[[Callable[..., Tensor], int], None] | None) -> None:
        """Call `function`, if any, on rank 0 with the averaged model and the step; the others wait as long as it takes.

        Not in a collective of torch.distributed, which would time out.
        """

        def call() -> None:
            if function is not None:
                training = self.model.training
                self.model.eval()
                function(self._averaged_model, self.step)
                self.model.train(training)

        dist_util.on_main(call)

    # Randomness of a step

    def _global_rows(self, count: int) -> list[int]:
        """Rows of the global batch for this process's `count` images; any beyond `batch_size` come after all others."""
        rank, processes = get_rank(), get_world_size()
        own = range(rank * self.batch_size, (rank + 1) * self.batch_size)
        more = range(self.global_batch + rank, self.global_batch + rank + processes * count, processes)
        return [*own, *more][:count]

    def draw_timesteps(self, seed: int, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Timesteps t and loss weights, (count,) each: this process's rows of the global draw.

        `count` is the number of images, by default `batch_size`.
        """
        generator = np.random.default_rng(step_seed(seed, self.step))
        rows = self._global_rows(self.batch_size if count is None else count)
        drawn = max(self.global_batch, rows[-1] + 1)
        sample = self.schedule_sampler.sample
        known = {"generator": generator} if _accepts(sample, "generator") else {}  # not in every client's override
        t, weights = sample(drawn, torch.device("cpu"), **known)
        return upload(t[rows], self.device), upload(weights[rows], self.device)

    def draw_noise(self, shape: Sequence[int], seed: int) -> Tensor:
        """Standard normal noise (B, ...) for this process's rows."""
        streams = NoiseStreams(seed, [f"row {row}" for row in self._global_rows(shape[0])], self.step, self.device)
        return streams.randn(shape, device=self.device)

    def _anneal_lr(self) -> None:
        """Set the learning rate of this step: linear from `lr` at step 0 to 0 at `lr_anneal_steps`."""
        left = 1 - self.step / self.lr_anneal_steps if self.lr_anneal_steps else 1.0
        for group in self.opt.param_groups:
            group["lr"] = self.lr * left

    # Checkpoints

    def _load_start(self) -> None:
        """Resume from the newest checkpoint in the output folder, else start from `resume_checkpoint` or scratch."""
        args = self.resume_checkpoint, self.output, self.settings | {"--compile": self.compile_choice}, self.ema_rate
        self._start = start = dist_util.on_main(choose_start, *args)
        self._file_order: list[str] | None = None
        self.origin = None if start is None else start.origin
        self._choose_seed()
        self._load_and_sync_parameters()
        overridden = type(self)._load_and_sync_parameters is not TrainLoop._load_and_sync_parameters
        if start is not None and start.resumed and overridden:
            self._load_weights()  # the subclass loads the weights of a new run, but this run has its own checkpoint
        # Weights loaded by a subclass start a new run, unless it sets `resume_step`.
        if start is not None and (self._file_order is not None or self.resume_step):
            self.step = start.number if start.resumed else self.resume_step or start.number
            self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
            self._load_optimizer_state()
        else:
            self.step = self.resume_step
            self.ema_params = [_copies(self.mp_trainer.master_params) for _ in self.ema_rate]
        self.resume_step = 0
        if not self.done:
            self._choose_compilation()
            dist_util.on_main(self._start_in_folder)
        if start is not None and start.resumed:
            self.saved_step = self.step

    def _choose_seed(self) -> None:
        """Choose the seed if the caller left it open, and record it."""
        if self.seed is not None:
            return
        recorded = self._start.settings if self._start is not None else {}  # none unless the run is resumed
        self.seed = self.settings.get("--seed", recorded.get("--seed"))
        if self.seed is None:
            self.seed = dist_util.on_main(torch.initial_seed)
        self.settings["--seed"] = self.seed

    def _load_and_sync_parameters(self) -> None:
        """Load the initial weights, identical on all processes. Subclasses may load others."""
        if self._start is None:
            dist_util.sync_params(self.model.parameters())
        else:
            self._load_weights()

    def _choose_compilation(self) -> None:
        """Decide whether to compile, and record it. Warns if a run compiled on another machine is resumed."""
        start = self._start
        recorded = start.settings["--compile"] if start is not None and start.resumed else None
        steps = None if self.last_step is None else self.last_step - self.step
        self.compiled = choose_compilation(self.compile_choice, recorded, steps)
        if self.compiled:
            self.settings["--compile"] = True
            if changes := machine_changes(self._begun_with, self._machine()):
                logger.warn(f"{'; '.join(changes)}. The resumed run agrees to rounding, not to the byte")

    def _machine(self) -> dict[str, str]:
        """Properties of this machine that affect the last digits of a compiled network, by name."""
        machine = {"hardware": hardware(self.device), **versions(self.device)}
        return {name: str(value) for name, value in machine.items()}  # torch.__version__ is of a type of its own

    def _start_in_folder(self) -> None:
        """The first changes to the output folder, after all checks have passed."""
        start = self._start
        resumed = start is not None and start.resumed
        if self.on_start is not None:
            self.on_start(resumed)
        remove_unfinished(self.output)
        if start is not None:
            verb = "resuming" if resumed else "starting"
            logger.info(f"{verb} from {start.path}, after {self.step} steps")
        if resumed:
            logger.rewind("step", start.number)  # not `self.step`: guided-diffusion's lines are numbered like its files
        else:
            logger.set_aside_files()

    def _load_weights(self) -> None:
        """Load the initial weights, and note the order of the parameters in their file."""
        weights = self._read_weights(self._start.path)
        self.model.load_state_dict(weights)
        parameters = dict(self.model.named_parameters())
        self._file_order = [name for name in weights if name in parameters]

    def _load_ema_parameters(self, rate: float) -> list[Tensor]:
        """The moving average beside the initial weights, else a copy of the weights."""
        start = self._start
        average = dist_util.on_main(find_ema_checkpoint, start.path, start.number, rate)
        if average is None:
            logger.warn(f"no moving average of decay {rate} beside {start.path}: it starts from the model's weights")
            return _copies(self.mp_trainer.master_params)
        weights = self._read_weights(average)
        values = self.mp_trainer.state_dict_to_master_params(weights)
        return [laid_out_as(param, value) for param, value in zip(self.mp_trainer.master_params, values, strict=True)]

    def _read_weights(self, path: str) -> dict[str, Tensor]:
        """Weights of this network. Raises UserError, on all processes, if the file is of another network."""
        flag = "the checkpoint" if self._start.resumed else "--resume_checkpoint"
        expected = shapes_of(self.model.state_dict())
        weights = dist_util.load_weights(path, flag=flag, expected=expected)
        if shapes_of(weights) != expected:
            dist_util.on_every_rank(self._raise_misfit, path, shapes_of(weights), expected)
        return weights

    def _raise_misfit(self, path: str, found: Shapes, expected: Shapes) -> None:
        if self.check_fit is not None:
            self.check_fit(path, found, expected)
        raise UserError(f"--resume_checkpoint {path} does not fit your flags: {difference(found, expected)}")

    def _load_optimizer_state(self) -> None:
        """Restore the optimizer and the rest of the state saved beside the initial weights, if any."""
        start = self._start
        state = dist_util.on_every_rank(read_optimizer, start.path, start.number)
        if state is None:
            logger.warn(f"no {opt_path('', start.number)} beside {start.path}: the optimizer starts afresh")
            return
        training = state.get("training", {})
        if not start.resumed and (changes := changed_settings(training.get("settings", {}), self.settings)):
            logger.info(f"settings differ from those of {start.path}: {'; '.join(changes)}")
        states = dist_util.on_every_rank(self._optimizer_state_by_parameter, state)
        names = [name for name, _ in self.model.named_parameters()]
        numbered = {index: states[name] for index, name in enumerate(names) if name in states}
        # With the current param_groups, since learning rate and weight decay may have changed.
        self.opt.load_state_dict({"state": numbered, "param_groups": self.opt.state_dict()["param_groups"]})
        self._lay_out_moments()
        if "training" not in state:  # guided-diffusion numbers its files one step lower
            taken = steps_taken(states)
            self.step = max(start.number, taken)
            logger.info(
                f"{start.path} was written by another program after {taken} optimizer steps: the next step is number "
                f"{self.step + 1}"
            )
        self._begun_with = training.get("begun_with", {}) if start.resumed else {}
        if scaler := training.get("scaler"):
            self.mp_trainer.scaler.load_state_dict(scaler)
        if isinstance(self.schedule_sampler, LossAwareSampler) and "schedule_sampler" in training:
            self.schedule_sampler.load_state_dict(training["schedule_sampler"])
        if start.resumed and "meter" in training:
            self.meter.load(training["meter"], keep=dist_util.is_main())
        if hasattr(self.data, "seek"):
            self.data.seek(training.get("position", self.step * self.global_batch))

    def _optimizer_state_by_parameter(self, state: Mapping[str, Any]) -> dict[str, Any]:
        parameters = dict(self.model.named_parameters())
        try:
            return by_parameter(state, {name: tuple(parameters[name].shape) for name in self._file_order or parameters})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            path = opt_path(bf.dirname(self._start.path), self._start.number)
            raise UserError(f"{path} is not the optimizer state of {self._start.path}: {error}") from error

    def _write_checkpoint(self, meter: dict[str, Any]) -> None:
        if self.before_save is not None:
            self.before_save()
        optimizer = self.opt.state_dict()
        states = optimizer["state"]
        averages = dict(zip(self.ema_rate, self.ema_params, strict=True))
        checked = {
            "a weight": self.mp_trainer.master_params,
            "a number of the optimizer": [value for state in states.values() for value in state.values()],
            **{f"a weight of the moving average of decay {rate}": average for rate, average in averages.items()},
        }
        for kind, tensors in checked.items():
            if not all(tensor.detach().isfinite().all() for tensor in tensors):
                self._raise_divergence(f"{kind} is NaN or infinite")
        training = {
            "position": getattr(self.data, "position", self.step * self.global_batch),
            "settings": self.settings,
            "ema_rates": self.ema_rate,
            "begun_from": self.origin,
            "meter": meter,
            "scaler": self.mp_trainer.scaler.state_dict(),
            **self.extra_state,
        }
        if self.compiled:
            training["begun_with"] = self._begun_with or self._machine()
        if isinstance(self.schedule_sampler, LossAwareSampler):
            training["schedule_sampler"] = self.schedule_sampler.state_dict()
        write_checkpoint(
            self.output,
            self.step,
            in_row_major(self.model.state_dict()),
            {**optimizer, "state": {i: in_row_major(entry) for i, entry in states.items()}, "training": training},
            {
                rate: in_row_major(self.mp_trainer.master_params_to_state_dict(average))
                for rate, average in averages.items()
            },
        )

    def _averaged_model(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the model with the weights of the first moving average."""
        if self._request.signum:  # the checkpoint is written; drawing samples would only delay the exit
            raise UserError("the run is being stopped")
        with torch.no_grad(), self.mp_trainer.autocast():
            if not self.ema_params:
                return self.model(*args, **kwargs)
            weights = self.mp_trainer.master_params_to_state_dict(self.ema_params[0])
            return functional_call(self.model, weights, args, kwargs)

    def _prefers_channels_last(self) -> bool:
        """Whether convolutions are faster in channels-last memory: compiled, on a GPU in half precision.

        Uncompiled, normalisation would convert to the usual layout and back: measured on an H200, half as fast.
        """
        half_on_gpu = self.device.type == "cuda" and self.mp_trainer.use_fp16
        return half_on_gpu and self.compiled and wide_enough_for_channels_last(self.model)

    def _use_channels_last(self) -> None:
        """Convert the weights, their averages and the optimizer's moments."""
        self.model.to(memory_format=torch.channels_last)
        params = self.mp_trainer.master_params
        self.ema_params = [list(map(laid_out_as, params, average)) for average in self.ema_params]
        self._lay_out_moments()

    def _lay_out_moments(self) -> None:
        """Give the optimizer's moments the memory layout of the weights, which fused steps require."""
        for param, entry in self.opt.state.items():
            entry |= {moment: laid_out_as(param, entry[moment]) for moment in MOMENTS}

    def _distributed(self, model: nn.Module) -> nn.Module:
        """The model, compiled if chosen, and wrapped to average its gradients over the processes."""
        if self.compiled:
            model = CompiledForTraining(model, batch_sizes(self.batch_size, self.microbatch))
        if get_world_size() == 1:
            return model
        # PyTorch 2.13 renamed the option to broadcast buffers before each forward pass.
        known = inspect.signature(DistributedDataParallel).parameters
        sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **{sync_buffers: False},
            bucket_cap_mb=128,
            gradient_as_bucket_view=True,
        )

    # Divergence

    def _check_finite(self, numbers: Mapping[str, float]) -> None:
        """Raise ResultError if one of these numbers, which are equal on all processes, is NaN or infinite."""
        if infinite := [name for name, value in numbers.items() if not np.isfinite(value)]:
            self._raise_divergence(f"{infinite[0]} is {numbers[infinite[0]]}")

    def _raise_divergence(self, reason: str) -> None:
        message = (
            f"training has diverged: at step {self.step} {reason}. This step is not saved. Lower --lr and start again "
            "with another --output, from scratch or from an earlier checkpoint (--resume_checkpoint)"
        )
        dist_util.raise_together(ResultError(message))


# Published names


def get_blob_logdir() -> str:
    """The checkpoint folder: DIFFUSION_BLOB_LOGDIR if set, else the logger's folder."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_resume_checkpoint(folder: str | None = None, ema_rates: Sequence[float | str] = ()) -> str | None:
    """Model file of the newest complete checkpoint in `folder`, by default `get_blob_logdir()`; None without any."""
    return newest_complete_model(folder or get_blob_logdir(), ema_rates)


def log_loss_dict(diffusion: GaussianDiffusion, ts: Tensor, losses: Mapping[str, Tensor]) -> None:
    """Log means of losses, (B,) each, at timesteps ts (B,): overall as NAME, by quartile of t as NAME_q0 to NAME_q3."""
    quartiles = (4 * ts // diffusion.num_timesteps).tolist()
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for quartile, value in zip(quartiles, values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{quartile}", value)


class LossMeter:
    """Means over the steps between two lines of the log. Sums stay on the device, so that no step waits for them."""

    def __init__(self, device: torch.device):
        self.device = device
        # name -> (2, 5): sum and weight, over all images and over each quartile of t
        self.totals: dict[str, Tensor] = {}

    def add(
        self,
        terms: Mapping[str, Tensor],
        t: Tensor,
        num_timesteps: int,
        taken: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Add loss terms (B,) of images at timesteps t (B,) of `num_timesteps`.

        Args:
            terms, t, num_timesteps: see above.
            taken: 0-d, whether the optimizer took the step; losses of skipped steps do not count. None: it did.
            weights: (B,), importance of each image in the means, which are over uniform timesteps; None: 1.
        """
        quartile = nn.functional.one_hot(4 * t // num_timesteps, 4).double()  # (B, 4)
        groups = torch.cat([torch.ones_like(quartile[:, :1]), quartile], dim=1)  # (B, 5)
        if weights is not None:
            groups = groups * weights.double()[:, None]
        for name, values in terms.items():
            self._add(name, torch.stack([values.double() @ groups, groups.sum(dim=0)]), taken)

    def add_number(self, name: str, number: Tensor, taken: Tensor | None = None) -> None:
        """Add a number (0-d) of the whole step, equal on all processes (`SKIPPED`: summed); `taken` as in `add`."""
        number = number.double()
        count = torch.full_like(number, float(name != SKIPPED))  # assigning a number to a GPU's element would wait
        self._add(name, nn.functional.pad(torch.stack([number, count])[:, None], (0, 4)), taken)

    def _add(self, name: str, total: Tensor, taken: Tensor | None) -> None:
        if taken is not None:
            total = torch.where(taken, total, 0.0)
        self.totals[name] = self.totals[name] + total if name in self.totals else total

    def over_all_ranks(self) -> dict[str, dict[str, Tensor]]:
        """{"sums": ..., "counts": ...}: (5,) by name, summed over all processes, on the CPU."""
        if not self.totals:
            return {"sums": {}, "counts": {}}
        both = torch.stack(list(self.totals.values())).cpu()  # (names, 2, 5)
        if get_world_size() > 1:
            dist.all_reduce(both)
        return {
            kind: dict(zip(self.totals, values.unbind(), strict=True))
            for kind, values in zip(("sums", "counts"), both.unbind(dim=1), strict=True)
        }

    def means(self) -> dict[str, float]:
        """The means over all processes, see `means_of`; resets the meter."""
        totals = self.over_all_ranks()
        self.totals = {}
        return self.means_of(totals)

    @staticmethod
    def means_of(totals: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Means by name, and by quartile as NAME_q0 to NAME_q3, from `over_all_ranks`; for `SKIPPED` the sum."""
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
        """Load what `over_all_ranks` returned; processes that do not `keep` it start from 0."""
        self.totals = {
            name: float(keep) * torch.stack([sums, totals["counts"][name]]).to(self.device)
            for name, sums in totals["sums"].items()
        }


def _copies(params: Iterable[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def step_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name, or takes any."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _signal_of_any_rank(request: StopRequest) -> Callable[[], int]:
    """Start asking all processes for a stop signal; the returned function waits for the answer, equal on all."""
    if get_world_size() == 1:
        return lambda: request.signum
    signum = torch.tensor([request.signum])
    work = dist.all_reduce(signum, op=dist.ReduceOp.MAX, async_op=True)

    def answer() -> int:
        work.wait()
        return int(signum)

    return answer
