"""Training: the loop that turns batches of images into steps of an optimiser, checkpoints and a log.

Whatever is random in a step, the images, their time steps, their noise and dropout, depends on the seed and the number
of the step alone: a run that was killed and started again follows the one that was not. And it belongs to a row of the
global batch, not to a process: two processes with half of the batch each follow one with all of it, to rounding (but
for dropout).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import blobfile as bf
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from . import dist_util, logger
from .command_line import Stopped, StopRequest
from .dist_util import get_rank, get_world_size
from .errors import UserError
from .fp16_util import MixedPrecisionTrainer
from .gaussian_diffusion import GaussianDiffusion
from .nn import update_ema
from .noise import NoiseStreams
from .resample import LossAwareSampler, ScheduleSampler, UniformSampler
from .run_record import differences
from .training_checkpoints import (
    ema_path,
    find_ema_checkpoint,
    find_resume_checkpoint,
    model_path,
    opt_path,
    parse_resume_step_from_filename,
    read_optimizer,
    remove_unfinished,
    write_checkpoint,
)

Cond = dict[str, Tensor]  # what the model is given besides the images, each (B, ...)


class TrainLoop:
    """Trains a diffusion model on the batches of `data`, on all processes together.

    Every `log_interval` steps a line is added to progress.csv and progress.json: the means since the last line of the
    losses, over all images and over those of each quartile of t (q0: the least noise), and of the norms of gradient
    and weights. Every `save_interval` steps, and at the end, the files of `training_checkpoints` are written.

    Args:
        model: the network, in float32, on its device, the same on all processes.
        diffusion: gives the losses.
        data: batches (images (B, C, H, W) in [-1, 1], cond), of `batch_size` each; an object with `seek` and `position`
            such as `load_data` returns, or any iterator, whose position is then its owner's business.
        batch_size: images per process and step.
        microbatch: images per forward and backward pass; -1: all.
        lr: learning rate of AdamW.
        ema_rate: decays of the moving averages, a number or text with commas; empty: no averages.
        log_interval, save_interval: numbers of steps.
        resume_checkpoint: a modelNNNNNN.pt to go on from, with the files beside it. Where `output` has checkpoints,
            the newest whole one is gone on from without being named.
        use_fp16, fp16_scale_growth: see `MixedPrecisionTrainer`.
        schedule_sampler: chooses time steps; uniformly if None.
        weight_decay: of AdamW.
        lr_anneal_steps: the learning rate falls linearly to 0 in so many steps, and training ends; 0: it is constant.
        iterations: number of steps after which training ends; 0: no end.
        seed: of time steps, noise and dropout.
        output: folder of the checkpoints; that of the logger if None.
        settings: what makes this run another one than one with other values, by the names of the flags. A folder with
            checkpoints of other settings is not gone on in.
        on_save: called on rank 0 after a checkpoint with (model, step), where the model has the weights of the first
            moving average, if there is one.
        more_state: further entries of "training" in the optimizer's file.

    Raises:
        UserError: checkpoints that do not fit or cannot be read; a number out of range; no folder for the results.
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
        on_save: Callable[[Callable[..., Tensor], int], None] | None = None,
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
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps
        self.last_step = min(filter(None, (lr_anneal_steps, iterations)), default=None)
        self.seed = seed
        self.settings = dict(settings or {})
        self.on_save = on_save
        self.more_state = dict(more_state or {})
        folder = output or logger.get_dir()
        if not folder:
            raise UserError("no folder for the checkpoints: give --output, or set OPENAI_LOGDIR")
        self.output: str = folder
        self.device = next(model.parameters()).device

        self.step = self.resume_step = 0
        self.meter = LossMeter(self.device)
        self.mp_trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth)
        self.opt = torch.optim.AdamW(
            self.mp_trainer.master_params, lr=lr, weight_decay=weight_decay, fused=self.device.type in ("cpu", "cuda")
        )
        self.ema_params: list[list[Tensor]] = []
        self._resume(resume_checkpoint)
        self.ddp_model = self._distributed(model)

    def run_loop(self) -> None:
        """Train until the last step, or until the process is asked to end, which saves a checkpoint first.

        Raises:
            UserError: the loss is no number any more; checkpoints cannot be written.
            Stopped: a signal came.
        """
        self.model.train()
        bar = logger.progress_bar(self.last_step, "training", "step", initial=self.step)
        with bar, StopRequest() as request:
            while self.last_step is None or self.step < self.last_step:
                agreed = _maximum(request)
                self.run_step(*next(self.data))
                bar.update()
                if self.step % self.log_interval == 0:
                    bar.set_postfix(loss=f"{self.log()[f'{self.prefix}loss']:.4g}")
                signum = agreed()
                if self.step % self.save_interval == 0 or self.step == self.last_step or signum:
                    self.save()
                if signum:
                    raise Stopped(signum)

    def run_step(self, batch: Tensor, cond: Cond) -> None:
        """One step of the optimiser on this process's part (B, C, H, W) of the global batch."""
        self.forward_backward(batch, cond)
        self._anneal_lr()
        grad_norm, param_norm = self.mp_trainer.optimize(self.opt)
        self.meter.add_norms(grad_norm=grad_norm, param_norm=param_norm)
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema(params, self.mp_trainer.master_params, rate=rate)
        self.step += 1

    def forward_backward(self, batch: Tensor, cond: Cond) -> None:
        """Compute the gradients of the global batch's mean loss, microbatch by microbatch."""
        batch = batch.to(self.device, non_blocking=True)
        cond = {name: value.to(self.device, non_blocking=True) for name, value in cond.items()}
        self._check_batch(batch)
        t, weights = self.time_steps(self.seed)  # (B,), (B,)
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
        weighted = {f"{self.prefix}{name}": value * weights for name, value in joined.items()}
        self.meter.add(weighted, t, self.diffusion.num_timesteps)

    def compute_losses(self, x: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> dict[str, Tensor]:
        """Terms of the loss, each (B,), among them "loss", of images x (B, C, H, W) at the indices t (B,)."""
        return self.diffusion.training_losses(self.ddp_model, x, t, model_kwargs=cond, noise=noise)

    def log(self) -> dict[str, Any]:
        """Write a line of the log: the means since the last, over all processes. Returns it.

        Raises UserError where the loss is no number any more.
        """
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.global_batch)
        if self.mp_trainer.scaler.is_enabled():
            logger.logkv("lg_loss_scale", float(np.log2(self.mp_trainer.scaler.get_scale())))
        logger.logkvs(self.meter.means())
        line = logger.dumpkvs()
        if not np.isfinite(line[f"{self.prefix}loss"]) and not self.mp_trainer.scaler.is_enabled():
            dist_util.on_every_rank(self._diverged)
        return line

    def save(self) -> None:
        """Write the checkpoint of this step, on rank 0; all processes call this.

        Raises UserError where it cannot be written, or where weights are no numbers any more.
        """
        counted = self.meter.over_all_ranks()
        dist_util.on_main(self._write_checkpoint, counted)
        if self.on_save is not None and dist_util.is_main():
            self.model.eval()
            self.on_save(self._averaged_model, self.step)
            self.model.train()

    # A step's randomness

    def _rows(self) -> range:
        """This process's rows of the global batch."""
        return range(get_rank() * self.batch_size, (get_rank() + 1) * self.batch_size)

    def time_steps(self, seed: int) -> tuple[Tensor, Tensor]:
        """Indices t and weights of the losses, (B,) each: this process's rows of what is drawn for the global batch."""
        generator = np.random.default_rng(step_seed(seed, self.step))
        t, weights = self.schedule_sampler.sample(self.global_batch, torch.device("cpu"), generator)
        rows = slice(self._rows().start, self._rows().stop)
        return t[rows].to(self.device), weights[rows].to(self.device)

    def noise(self, shape: Sequence[int], seed: int) -> Tensor:
        """Standard normal noise (B, ...) for this process's rows."""
        streams = NoiseStreams(seed, [f"row {row}" for row in self._rows()], self.step, self.device)
        return streams.randn(shape, device=self.device)

    def _anneal_lr(self) -> None:
        """Set the learning rate of this step: a straight line from `lr` at step 0 to 0 after `lr_anneal_steps`."""
        left = 1 - self.step / self.lr_anneal_steps if self.lr_anneal_steps else 1.0
        for group in self.opt.param_groups:
            group["lr"] = self.lr * left

    # Checkpoints

    def _resume(self, named: str) -> None:
        """Take up the newest checkpoint in the output folder, else the `named` one, else begin."""
        dist_util.on_main(remove_unfinished, self.output)
        path, ours = dist_util.on_main(choose_checkpoint, named, self.output, self.ema_rate)
        if path is None:
            self.ema_params = [_copies(self.mp_trainer.master_params) for _ in self.ema_rate]
            dist_util.sync_params(self.model.parameters())
            return
        self.step = self.resume_step = parse_resume_step_from_filename(path)
        self._load_weights(path)
        self.ema_params = [self._load_average(path, rate) for rate in self.ema_rate]
        state = dist_util.on_every_rank(read_optimizer, path, self.step)
        if state is None:
            logger.warn(f"no {opt_path('', self.step)} beside {path}: the optimiser starts anew")
        else:
            self._load_optimizer(path, state, ours)
        logger.info(f"going on from {path}, after {self.step} steps")
        if ours:
            logger.rewind("step", self.step)

    def _load_weights(self, path: str) -> None:
        weights = dist_util.load_state_dict(path, flag="--resume_checkpoint")
        _check_same_network(path, weights, self.model.state_dict())
        self.model.load_state_dict(weights)

    def _load_average(self, path: str, rate: float) -> list[Tensor]:
        average = dist_util.on_main(find_ema_checkpoint, path, self.step, rate)
        if average is None:
            logger.warn(f"no average of decay {rate} beside {path}: it starts from the model's weights")
            return _copies(self.mp_trainer.master_params)
        weights = dist_util.load_state_dict(average, flag="--resume_checkpoint")
        _check_same_network(average, weights, self.model.state_dict())
        return _copies(value.to(self.device) for value in self.mp_trainer.state_dict_to_master_params(weights))

    def _load_optimizer(self, path: str, state: dict[str, Any], ours: bool) -> None:
        training = state.pop("training", {})
        changes = differences(training.get("settings", self.settings), self.settings)
        if changes and ours:
            raise UserError(
                f"{self.output} holds the checkpoints of a run with other settings: {'; '.join(changes)}.\n"
                "Go on with those, choose another --output, or begin a new run from one of them by --resume_checkpoint"
            )
        if changes:
            logger.info(f"other settings than those of {path}: {'; '.join(changes)}")
        try:
            self.opt.load_state_dict(state)
        except ValueError as error:
            raise UserError(
                f"--resume_checkpoint {path}: the optimiser's state beside it is another network's"
            ) from error
        for group in self.opt.param_groups:
            group["weight_decay"] = self.weight_decay
        if scaler := training.get("scaler"):
            self.mp_trainer.scaler.load_state_dict(scaler)
        if isinstance(self.schedule_sampler, LossAwareSampler) and "schedule_sampler" in training:
            self.schedule_sampler.load_state_dict(training["schedule_sampler"])
        if ours:
            self.meter.load(training["meter"], keep=dist_util.is_main())
        if hasattr(self.data, "seek"):
            self.data.seek(training.get("position", self.step * self.global_batch))

    def _write_checkpoint(self, meter: dict[str, Any]) -> None:
        params = self.mp_trainer.master_params
        if not torch.stack([param.detach().isfinite().all() for param in params]).all():
            self._diverged()
        training = {
            "position": getattr(self.data, "position", self.step * self.global_batch),
            "settings": self.settings,
            "meter": meter,
            "scaler": self.mp_trainer.scaler.state_dict(),
            **self.more_state,
        }
        if isinstance(self.schedule_sampler, LossAwareSampler):
            training["schedule_sampler"] = self.schedule_sampler.state_dict()
        for rate, average in zip(self.ema_rate, self.ema_params, strict=True):
            state = self.mp_trainer.master_params_to_state_dict(average)
            write_checkpoint(ema_path(self.output, rate, self.step), state)
        write_checkpoint(opt_path(self.output, self.step), {**self.opt.state_dict(), "training": training})
        write_checkpoint(model_path(self.output, self.step), self.model.state_dict())

    def _averaged_model(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the model with the weights of the first moving average."""
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
            broadcast_buffers=False,
            bucket_cap_mb=128,
            gradient_as_bucket_view=True,
        )

    def _check_batch(self, batch: Tensor) -> None:
        if len(batch) != self.batch_size:
            raise UserError(f"the data gave a batch of {len(batch)} images, expected {self.batch_size} (--batch_size)")

    def _diverged(self) -> None:
        raise UserError(
            f"training has diverged: at step {self.step} the loss or the weights are no numbers any more. Lower --lr.\n"
            f"The checkpoints in {self.output} are older and whole"
        )


class LossMeter:
    """Means of what happens between two lines of the log. Sums stay on the device, so that no step waits for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}  # name -> (5,): over all images, and over each quartile of t
        self.counts: dict[str, Tensor] = {}  # name -> (5,): of how many

    def add(self, terms: Mapping[str, Tensor], t: Tensor, num_timesteps: int) -> None:
        """Count in the terms (B,) of the losses of images at the indices t (B,) of `num_timesteps`."""
        quartile = nn.functional.one_hot(4 * t // num_timesteps, 4).double()  # (B, 4)
        groups = torch.cat([torch.ones_like(quartile[:, :1]), quartile], dim=1)  # (B, 5)
        for name, values in terms.items():
            self._count(name, values.double() @ groups, groups.sum(dim=0))

    def add_norms(self, **norms: Tensor) -> None:
        """Count in numbers (0-d) that the processes have in common; those that are no numbers are left out."""
        for name, norm in norms.items():
            finite = norm.isfinite()
            only = torch.zeros(5, dtype=torch.float64, device=self.device)
            only[0] = 1.0
            self._count(name, only * torch.where(finite, norm, 0), only * finite)

    def _count(self, name: str, sums: Tensor, counts: Tensor) -> None:
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
        means = {}
        for name, sums in totals["sums"].items():
            for i, (value, count) in enumerate(zip(sums.tolist(), totals["counts"][name].tolist(), strict=True)):
                if count:
                    means[f"{name}_q{i - 1}" if i else name] = value / count
        return means

    def load(self, totals: Mapping[str, Mapping[str, Tensor]], keep: bool) -> None:
        """Go on with the sums and counts of a checkpoint; a process that does not `keep` them starts from 0."""
        factor = float(keep)
        self.sums = {name: factor * value.to(self.device) for name, value in totals["sums"].items()}
        self.counts = {name: factor * value.to(self.device) for name, value in totals["counts"].items()}


def choose_checkpoint(named: str, output: str, ema_rates: Sequence[float]) -> tuple[str | None, bool]:
    """The model's file to go on from, None to begin, and whether it is one of the output folder's own.

    The newest whole checkpoint in `output` comes before a `named` one elsewhere, from which that run was begun.
    Raises UserError where a named one is not the newest of its folder, and going on would write over later ones.
    """
    newest = find_resume_checkpoint(output, ema_rates)
    if not named:
        return newest, newest is not None
    if bf.dirname(named).rstrip("/") != output.rstrip("/"):
        return (newest, True) if newest else (named, False)
    if newest and parse_resume_step_from_filename(newest) > parse_resume_step_from_filename(named):
        raise UserError(
            f"--resume_checkpoint {named}: the folder holds later checkpoints, up to {newest}, which would be written "
            "over.\nChoose another --output, or move them away"
        )
    return named, True


def parse_rates(ema_rate: float | str) -> list[float]:
    """The decays in "0.9999,0.99", or in a number. Raises UserError."""
    try:
        rates = [float(rate) for rate in str(ema_rate).split(",") if rate.strip()]
    except ValueError:
        rates = [-1.0]
    if not all(0 <= rate <= 1 for rate in rates):
        raise UserError(f"--ema_rate {ema_rate}: expected numbers from 0 to 1, separated by commas")
    return rates


def _check_same_network(path: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    theirs = {name: tuple(value.shape) for name, value in found.items()}
    yours = {name: tuple(value.shape) for name, value in expected.items()}
    if different := [name for name in {**yours, **theirs} if theirs.get(name) != yours.get(name)]:
        name = different[0]
        raise UserError(
            f"--resume_checkpoint {path} is of another network than your flags describe: {name} is "
            f"{theirs.get(name, 'missing')} there and {yours.get(name, 'missing')} here ({len(different)} such)"
        )


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
