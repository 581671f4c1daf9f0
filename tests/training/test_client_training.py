# ruff: noqa: NPY002, these scripts use NumPy's global generator
"""Other people's training scripts: what they import, call and override, written as they write it.

They know the interface of guided-diffusion and nothing of ours.
"""

import csv
import importlib.util
import os
import tempfile
from pathlib import Path

from guided_diffusion import dist_util, fp16_util, logger, nn, train_util, unet
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.resample import ScheduleSampler, create_named_schedule_sampler
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.train_util import TrainLoop, log_loss_dict

import numpy as np
import pytest
import torch
from torch.optim import AdamW


@pytest.fixture(autouse=True)
def _tidy(monkeypatch, tmp_path):
    """A process that has logged nothing yet, whose temporary folder is empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for variable in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "DIFFUSION_BLOB_LOGDIR"):
        monkeypatch.delenv(variable, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logger.reset()
    yield
    logger.reset()
    logger.set_level(logger.INFO)
    torch.set_num_threads(threads)


def read_csv(folder):
    with open(Path(folder) / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


# The logger


def test_a_script_that_names_no_folder_gets_a_new_one(tmp_path, capfd):
    logger.configure()
    logger.log("sampling...")
    path = os.path.join(logger.get_dir(), "samples_2x8x8x3.npz")
    np.savez(path, np.zeros((2, 8, 8, 3), np.uint8))
    logger.logkv("loss", 0.5)
    logger.dumpkvs()
    folder = Path(path).parent
    assert folder.parent == tmp_path / "tmp" and f"logging to {folder}" in capfd.readouterr().err
    assert {f.name for f in folder.iterdir()} >= {"samples_2x8x8x3.npz", "log.txt", "progress.csv"}
    assert read_csv(folder) == [{"loss": "0.5"}]
    assert "sampling...\n" in (folder / "log.txt").read_text()
    logger.configure()
    assert logger.get_dir() != str(folder)


def test_a_script_that_never_configures_gets_a_folder_too(tmp_path):
    logger.info("hello")
    assert not list((tmp_path / "tmp").iterdir())
    assert Path(logger.get_dir()).parent == tmp_path / "tmp"


@pytest.mark.parametrize("by_environment", [False, True])
def test_the_log_in_the_formats_of_the_original(tmp_path, monkeypatch, by_environment, capfd):
    if by_environment:
        monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,log,csv")
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "log"))
        logger.configure()
    else:
        logger.configure(dir=str(tmp_path / "log"), format_strs=["stdout", "log", "csv"])
    logger.warn("careful")
    logger.debug("hidden")
    logger.logkv_mean("loss", 1.0)
    logger.logkv_mean("loss", 2.0)
    logger.logkv("step", 10)
    logger.dumpkvs()
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["log.txt", "progress.csv"]
    text = (tmp_path / "log/log.txt").read_text()
    assert text == "warning: careful\nloss  1.5\nstep  10\n\n"
    assert capfd.readouterr().err == "warning: careful\nloss 1.5  step 10\n"


def test_loggers_within_loggers(tmp_path):
    logger.configure(dir=str(tmp_path / "outer"), format_strs=["csv"])
    logger.logkv("a", 1)
    with logger.scoped_configure(dir=str(tmp_path / "inner"), format_strs=["csv", "log"]):
        assert logger.get_dir() == str(tmp_path / "inner")
        logger.logkv("b", 2)
        with logger.profile_kv("sleep"):
            pass
        logger.profile("call")(lambda: logger.info("called"))()
        logger.dumpkvs()
    logger.dumpkvs()
    assert read_csv(tmp_path / "outer") == [{"a": "1"}]
    (row,) = read_csv(tmp_path / "inner")
    assert list(row) == ["b", "wait_sleep", "wait_call"] and 0 <= float(row["wait_sleep"]) < 60
    assert (tmp_path / "inner/log.txt").read_text().startswith("called\n")

    class Squares(logger.KVWriter):
        seen = ()

        def writekvs(self, kvs):
            self.seen = {key: value**2 for key, value in kvs.items()}

    squares = Squares()
    own = logger.Logger(
        dir=str(tmp_path), output_formats=[squares, logger.HumanOutputFormat(str(tmp_path / "own.txt"))]
    )
    own.logkv("x", 3)
    own.log("mine", 1)
    own.set_level(logger.ERROR)
    own.log("hidden")
    assert own.dumpkvs() == {"x": 3} and squares.seen == {"x": 9} and own.get_dir() == str(tmp_path)
    own.close()
    assert (tmp_path / "own.txt").read_text() == "mine 1\nx  3\n\n"
    assert logger.get_current().get_dir() == str(tmp_path / "outer")
    writer = logger.make_output_format("json", str(tmp_path / "new"), "_x")
    writer.writekvs({"loss": torch.tensor(0.5)})
    writer.close()
    assert (tmp_path / "new/progress_x.json").read_text() == '{"loss": 0.5}\n'
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ValueError, match="log format tensorboard needs another package: pip install tensorboard"):
            logger.make_output_format("tensorboard", str(tmp_path / "new"))
    else:
        writer = logger.make_output_format("tensorboard", str(tmp_path / "new"))
        writer.writekvs({"loss": 0.5, "note": "x"})
        writer.close()
        assert list((tmp_path / "new/tb").iterdir())


def test_metrics_are_changed_in_place(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["csv"])
    logger.get_current().name2val["images"] += 4.0
    values = logger.getkvs()
    values["images"] += 4
    assert values["loss"] == 0
    logger.record_tabular("step", 7)
    logger.logkv("shape", np.arange(3))
    assert logger.dump_tabular()["images"] == 8 and values == {}
    assert read_csv(tmp_path) == [{"images": "8.0", "loss": "0.0", "step": "7", "shape": "[0 1 2]"}]


def test_the_default_logger_comes_back_after_another(tmp_path):
    default = logger.get_current()
    assert logger.Logger.DEFAULT is logger.Logger.CURRENT is default
    logger.configure(dir=str(tmp_path / "other"), format_strs=["csv"])
    assert logger.Logger.CURRENT is not logger.Logger.DEFAULT is default
    logger.reset()
    assert logger.get_current() is default
    logger.reset()
    assert logger.Logger.DEFAULT is logger.Logger.CURRENT is None


def test_means_over_the_ranks_of_a_communicator(tmp_path):
    """Of a client that hands one over; its other rank has logged a loss of 4 three times."""

    class Communicator:
        rank = 0

        def gather(self, mine):
            return [mine, {"loss": (4.0, 3), "note": ("n", 1)}]

    logger.configure(dir=str(tmp_path), format_strs=["csv"], comm=Communicator())
    logger.logkv_mean("loss", 8.0)
    assert logger.dumpkvs() == {"loss": 5.0} and read_csv(tmp_path) == [{"loss": "5.0"}]


# Checkpoints


def test_any_file_of_tensors_is_loaded(tmp_path):
    model = torch.nn.Linear(2, 2)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    torch.save(opt.state_dict(), tmp_path / "opt000000.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "checkpoint.pt")
    again = torch.optim.AdamW(model.parameters(), lr=0.5)
    again.load_state_dict(dist_util.load_state_dict(str(tmp_path / "opt000000.pt"), map_location=dist_util.dev()))
    assert again.param_groups[0]["lr"] == 0.1
    saved = dist_util.load_state_dict(str(tmp_path / "checkpoint.pt"), map_location="cpu")
    assert saved["epoch"] == 1
    model.load_state_dict(saved["state_dict"])
    saved["epoch"] = 2
    torch.save(saved, tmp_path / "checkpoint.pt")  # what was loaded stands in memory, not in the file
    assert dist_util.load_state_dict(str(tmp_path / "checkpoint.pt"))["epoch"] == 2

    torch.save({"begun": Path("x")}, tmp_path / "unsafe.pt")
    with pytest.raises(ValueError, match="contains a Python object other than tensors"):
        dist_util.load_state_dict(str(tmp_path / "unsafe.pt"))


# Half precision


def make_model(**flags):
    defaults = model_and_diffusion_defaults()
    tiny = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "num_heads": 1}
    tiny |= {"attention_resolutions": "", "diffusion_steps": 100}
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**{**defaults, **tiny, **flags})
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():  # the last convolution starts at zero, whose gradients say little
        param.data.add_(torch.randn(param.shape, generator=generator) * 0.02)
    return model, diffusion


def batches(size=4):
    generator = torch.Generator().manual_seed(2)
    while True:
        yield torch.rand(size, 3, 8, 8, generator=generator) * 2 - 1, {}


HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float32], ids=["bfloat16", "none"])


@HALF
def test_mixed_precision_trains_in_a_plain_loop(tmp_path, monkeypatch, half):
    """On CPUs with half precision, here emulated, and without it."""
    monkeypatch.setattr(fp16_util, "half_precision_dtype", lambda device: half)
    monkeypatch.setattr(unet, "half_precision_dtype", lambda device: half)
    logger.configure(str(tmp_path), ["csv"])
    courses = []
    for use_fp16 in (False, True):
        model, diffusion = make_model(use_fp16=use_fp16)
        seen = set()
        model.input_blocks[0].register_forward_hook(lambda module, inputs, output, seen=seen: seen.add(output.dtype))
        mp_trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, initial_lg_loss_scale=16.0)
        opt = AdamW(mp_trainer.master_params, lr=1e-3)
        data, courses = batches(), [*courses, []]
        before = [param.detach().clone() for param in model.parameters()]
        for step in range(3):
            batch, _ = next(data)
            mp_trainer.zero_grad()
            for i in range(0, len(batch), 2):
                t = torch.tensor([10 + step, 60])
                noise = torch.ones_like(batch[i : i + 2])
                losses = diffusion.training_losses(model, batch[i : i + 2], t, noise=noise)
                log_loss_dict(diffusion, t, {name: value.detach() for name, value in losses.items()})
                mp_trainer.backward(losses["loss"].mean() / 2)
            assert mp_trainer.optimize(opt) is True
            courses[-1].append(logger.dumpkvs())
        assert seen == {half if use_fp16 else torch.float32}
        assert {param.dtype for param in model.parameters()} == {torch.float32}
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        names = mp_trainer.master_params_to_state_dict(mp_trainer.master_params)
        model.load_state_dict(names)
    plain, mixed = courses
    assert (
        plain[0].keys()
        == mixed[0].keys()
        == {"loss", "mse", "loss_q0", "mse_q0", "loss_q2", "mse_q2"}
        | {
            "grad_norm",
            "param_norm",
        }
    )
    for a, b in zip(plain, mixed, strict=True):
        assert a == pytest.approx(b, rel=0.03)


def test_an_overflow_is_told_by_optimize(tmp_path):
    """The loss scale, which needs no GPU to be tested."""
    logger.configure(str(tmp_path), ["csv"])
    weight = torch.nn.Linear(1, 1, bias=False)
    mp_trainer = MixedPrecisionTrainer(model=weight)
    mp_trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    opt = AdamW(mp_trainer.master_params, lr=0.1)
    for x, took_step in (1e38, False), (1.0, True):
        before = weight.weight.item()
        mp_trainer.zero_grad()
        mp_trainer.backward(weight(torch.tensor([[x]])).sum())
        assert mp_trainer.optimize(opt) is took_step and (weight.weight.item() != before) is took_step
    assert mp_trainer.lg_loss_scale == 9
    assert logger.dumpkvs()["grad_norm"] == pytest.approx(1)


def test_flat_float32_copies_of_the_weights():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).half()
    groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    masters = fp16_util.make_master_params(groups)
    assert [tuple(master.shape) for master in masters] == [(6,), (1, 6)]
    assert all(master.dtype == torch.float32 and master.requires_grad for master in masters)
    model[0].weight.grad = torch.full((2, 3), 2.0, dtype=torch.float16)
    fp16_util.model_grads_to_master_grads(groups, masters)
    assert masters[0].grad.tolist() == [0] * 6 and masters[1].grad.tolist() == [[2.0] * 6]
    torch.optim.SGD(masters, lr=0.5).step()
    expected = model[0].weight.detach() - 1
    fp16_util.master_params_to_model_params(groups, masters)
    torch.testing.assert_close(model[0].weight.detach(), expected)
    state = fp16_util.master_params_to_state_dict(model, groups, masters, True)
    assert state.keys() == model.state_dict().keys() and state["0.weight"].dtype == torch.float32
    again = fp16_util.state_dict_to_master_params(model, state, True)
    assert all(torch.equal(a, b) for a, b in zip(again, masters, strict=True))
    each = fp16_util.state_dict_to_master_params(model, state, False)
    assert torch.equal(fp16_util.master_params_to_state_dict(model, None, each, False)["1.bias"], state["1.bias"])
    fp16_util.zero_grad(model.parameters())
    fp16_util.zero_master_grads(masters)
    assert not model[0].weight.grad.any() and masters[0].grad is None
    assert fp16_util.check_overflow(float("nan")) and not fp16_util.check_overflow(1.0)


class Wrapper(torch.nn.Module):
    """A client's module around the network."""

    def __init__(self, model):
        super().__init__()
        self.model = model


def torso_and_rest(model):
    """The types of the weights of the torso's convolutions, and of all others."""
    torso, rest = set(), set()
    for name, module in model.named_modules():
        if weights := {param.dtype for param in module.parameters(recurse=False)}:
            half = isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d) and not name.startswith("out.")
            (torso if half else rest).update(weights)
    return torso, rest


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper], ids=["itself", "wrapped"])
@pytest.mark.parametrize("ran_before", [False, True])
def test_converted_before_it_is_moved_is_float16_there(monkeypatch, wrap, ran_before):
    """The meta device stands in for a GPU."""
    monkeypatch.setattr(unet, "half_precision_dtype", lambda device: torch.bfloat16)
    model, _ = make_model(use_fp16=True)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    x, t = torch.ones(2, 3, 8, 8), torch.tensor([1, 7])
    with torch.no_grad():
        exact = make_model()[0](x, t)
    model.convert_to_fp16()
    assert model.dtype == torch.float16
    if ran_before:
        with torch.no_grad():
            error = (model(x, t) - exact).norm() / exact.norm()
        assert 1e-5 < error < 0.03
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())  # nothing is lost yet
    wrap(model).to("meta")
    assert torso_and_rest(model) == ({torch.float16}, {torch.float32}) and model.dtype == torch.float16
    model.convert_to_fp32()
    assert torso_and_rest(model) == ({torch.float32}, {torch.float32})

    trained, _ = make_model(use_fp16=True)
    MixedPrecisionTrainer(model=trained, use_fp16=True)
    trained.to("meta")
    assert torso_and_rest(trained) == ({torch.float32}, {torch.float32})


# The rest of nn and unet


def test_checkpointing_as_a_function_of_autograd():
    scale = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    calls = []

    def function(x):
        calls.append(torch.is_grad_enabled())
        return scale * x**2

    y = nn.CheckpointFunction.apply(function, 1, x, scale)
    assert y.tolist() == [3, 12] and calls == [False]
    y.sum().backward()
    assert x.grad.tolist() == [6, 12] and scale.grad == 5 and calls == [False, True]
    assert nn.SiLU()(torch.tensor(0.0)) == 0 and nn.mean_flat(tensor=torch.ones(2, 3, 4)).tolist() == [1, 1]


def test_operations_of_attention_are_counted():
    attention = unet.QKVAttentionLegacy(2)
    attention.total_ops = torch.zeros(1, dtype=torch.float64)
    attention.register_forward_hook(lambda module, inputs, output: module.count_flops(module, inputs, output))
    attention(torch.zeros(3, 3 * 8, 5))
    # Two products, each of B x heads times (T, C) with (C, T), which are T * T * C multiplications.
    assert attention.total_ops.item() == 2 * 3 * 2 * (5 * 5 * 4)


# TrainLoop


def loop_of(loop_class=TrainLoop, data=None, model=None, diffusion=None, **options):
    net, usual = make_model()
    arguments = {"batch_size": 4, "microbatch": -1, "lr": 1e-3, "ema_rate": "0.9", "log_interval": 1}
    arguments |= {"save_interval": 2, "resume_checkpoint": "", "lr_anneal_steps": 4}
    arguments |= {"model": model or net, "diffusion": diffusion or usual, "data": data or batches()}
    return loop_class(**{**arguments, **options})


@HALF
def test_a_loop_in_mixed_precision(tmp_path, monkeypatch, half):
    monkeypatch.setattr(fp16_util, "half_precision_dtype", lambda device: half)
    monkeypatch.setattr(unet, "half_precision_dtype", lambda device: half)
    logger.configure(str(tmp_path), ["csv"])
    loop = loop_of(model=make_model(use_fp16=True)[0], use_fp16=True)
    loop.run_loop()
    assert {value.dtype for value in torch.load(tmp_path / "model000004.pt").values()} == {torch.float32}
    assert len(read_csv(tmp_path)) == 4


def test_the_losses_of_a_classifier_s_loop_by_quartile(tmp_path):
    logger.configure(str(tmp_path), ["csv"])
    _, diffusion = make_model()
    for _ in range(2):
        losses = {"train_loss": torch.tensor([1.0, 2.0, 6.0]), "train_acc@1": torch.tensor([0.0, 1.0, 1.0])}
        train_util.log_loss_dict(diffusion, torch.tensor([0, 24, 99]), losses)
    assert logger.dumpkvs() == {
        "train_loss": 3.0,
        "train_loss_q0": 1.5,
        "train_loss_q3": 6.0,
        "train_acc@1": pytest.approx(2 / 3),
        "train_acc@1_q0": 0.5,
        "train_acc@1_q3": 1.0,
    }


def test_what_subclasses_override_is_called(tmp_path):
    pretrained = {name: value + 1 for name, value in make_model()[0].state_dict().items()}
    torch.save({"out.2.bias": pretrained["out.2.bias"]}, tmp_path / "part.pt")
    calls = []

    class Loop(TrainLoop):
        def _load_and_sync_parameters(self):
            assert self.resume_checkpoint == ""
            part = dist_util.load_state_dict(str(tmp_path / "part.pt"), map_location=dist_util.dev())
            self.model.load_state_dict(part, strict=False)
            dist_util.sync_params(self.model.parameters())
            calls.append("load")

        def _update_ema(self):
            super()._update_ema()
            calls.append("ema")

        def log_step(self):
            super().log_step()
            logger.logkv("lr", self.opt.param_groups[0]["lr"])
            logger.logkv("taken", self.step + self.resume_step)

        def save(self):
            super().save()
            calls.append("save")

    logger.configure(str(tmp_path / "run"), ["csv"])
    loop = loop_of(Loop)
    assert torch.equal(loop.model.out[2].bias, pretrained["out.2.bias"])
    assert torch.equal(loop.ema_params[0][-1], pretrained["out.2.bias"])
    loop.run_loop()
    assert calls == ["load", "ema", "ema", "save", "ema", "ema", "save"]
    rows = read_csv(tmp_path / "run")
    assert [row["step"] for row in rows] == [row["taken"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["lr"]) for row in rows] == [1e-3, 7.5e-4, 5e-4, 2.5e-4]

    for path in (tmp_path / "run").glob("*4.pt"):
        path.unlink()
    resumed = loop_of(Loop)  # by its own checkpoint, not by the weights that it began with
    assert resumed.step == 2 and resumed.resume_step == 0
    state = torch.load(tmp_path / "run/model000002.pt")
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())
    resumed.run_loop()
    assert [row["taken"] for row in read_csv(tmp_path / "run")] == ["1", "2", "3", "4"]


def test_the_log_of_a_loop_that_saves_by_itself_is_continued(tmp_path):
    class Loop(TrainLoop):
        def save(self):
            torch.save(self.model.state_dict(), tmp_path / f"model{self.step:06d}.pt")
            average = self.mp_trainer.master_params_to_state_dict(self.ema_params[0])
            torch.save(average, tmp_path / f"ema_0.9_{self.step:06d}.pt")
            torch.save(self.opt.state_dict(), tmp_path / f"opt{self.step:06d}.pt")

    for steps in (2, 4):
        logger.configure(str(tmp_path), ["csv"])
        loop_of(Loop, lr_anneal_steps=steps).run_loop()
    assert [row["step"] for row in read_csv(tmp_path)] == ["1", "2", "3", "4"]
    assert not (tmp_path / "progress.1.csv").exists()


def test_loops_of_one_process_share_its_log(tmp_path):
    for _ in range(2):  # an earlier run, with other folders
        logger.configure(str(tmp_path / "log"), ["csv"])
        for name in "ab":
            loop_of(output=str(tmp_path / name), iterations=1).run_loop()
            (tmp_path / name / "model000001.pt").rename(tmp_path / name / "kept.pt")
            for path in (tmp_path / name).glob("*000001.pt"):
                path.unlink()
    assert [row["step"] for row in read_csv(tmp_path / "log")] == ["1", "1"]
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["progress.1.csv", "progress.csv"]


def test_a_step_of_the_client_s_own(tmp_path):
    """Its losses, its log, and the step's number left to the loop."""

    class Loop(TrainLoop):
        def run_step(self, batch, cond):
            self.forward_backward(batch, cond)
            if self.mp_trainer.optimize(self.opt):
                self._update_ema()
            self._anneal_lr()
            self.log_step()

        def forward_backward(self, batch, cond):
            self.mp_trainer.zero_grad()
            for i in range(0, batch.shape[0], self.microbatch):
                micro = batch[i : i + self.microbatch].to(dist_util.dev())
                t, weights = self.schedule_sampler.sample(micro.shape[0], dist_util.dev())
                losses = self.diffusion.training_losses(self.ddp_model, micro, t, model_kwargs=cond)
                log_loss_dict(self.diffusion, t, {name: value * weights for name, value in losses.items()})
                self.mp_trainer.backward((losses["loss"] * weights).mean())

    class Mixed(Loop):
        run_step = TrainLoop.run_step

    for number, loop_class in enumerate((Loop, Mixed)):
        folder = tmp_path / str(number)
        logger.configure(str(folder), ["csv"])
        np.random.seed(number)
        loop = loop_of(loop_class, microbatch=3)
        before = [param.detach().clone() for param in loop.ema_params[0]]
        loop.run_loop()
        rows = read_csv(folder)
        assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
        assert all(float(row["loss"]) > 0 and float(row["grad_norm"]) > 0 for row in rows)
        assert (folder / "model000004.pt").exists() and not loop.use_ddp
        assert any(not torch.equal(a, b) for a, b in zip(before, loop.ema_params[0], strict=True))


def test_overrides_that_know_only_the_original_s_arguments(tmp_path):
    """A sampler without our generator, a diffusion without noise, and terms that are one number for all images."""
    _, plain = make_model()

    class Late(ScheduleSampler):
        def weights(self):
            return [1] * 50 + [3] * 50

        def sample(self, batch_size, device):
            return super().sample(batch_size, device)

    class Regularised(type(plain)):
        def training_losses(self, model, x_start, t, model_kwargs=None):
            terms = super().training_losses(model, x_start, t, model_kwargs=model_kwargs)
            penalty = sum(param.square().sum() for param in model.parameters())
            return {**terms, "loss": terms["loss"] + 0.1 * penalty, "penalty": penalty, "rate": 0.1}

    logger.configure(str(tmp_path), ["csv"])
    plain.__class__ = Regularised
    np.random.seed(0)
    loop = loop_of(diffusion=plain, schedule_sampler=Late(), microbatch=3)
    loop.run_loop()
    for row in read_csv(tmp_path):
        assert float(row["rate"]) == pytest.approx(0.1) and float(row["penalty"]) > 1
        assert float(row["loss"]) == pytest.approx(float(row["mse"]) + 0.1 * float(row["penalty"]), rel=1e-4)
    t, weights = loop.draw_timesteps(0)
    assert weights.tolist() == [2 if step < 50 else pytest.approx(2 / 3) for step in t.tolist()]


def test_names_of_the_original_s_trainer_and_sampler():
    assert train_util.INITIAL_LOG_LOSS_SCALE == fp16_util.INITIAL_LOG_LOSS_SCALE == 20.0
    model, diffusion = make_model()
    trainer = MixedPrecisionTrainer(model=model)
    assert all(a is b for a, b in zip(trainer.model_params, model.parameters(), strict=True))
    for use_fp16 in (False, True):
        doubled = [2 * param.detach() for param in trainer.model_params]
        groups = trainer.param_groups_and_shapes
        state = fp16_util.master_params_to_state_dict(model, groups, doubled, use_fp16)
        assert all(torch.equal(state[name], 2 * param) for name, param in model.named_parameters())

    sampler = create_named_schedule_sampler("loss-second-moment", diffusion)
    assert not sampler._warmed_up()
    sampler.update_with_all_losses(list(range(100)) * 10, [float(i) for i in range(1000)])
    assert sampler._warmed_up() and sampler._loss_history[3].tolist() == [3 + 100 * i for i in range(10)]
    assert (sampler._loss_counts == 10).all()


def test_a_loop_that_counts_the_steps_too_is_told(tmp_path):
    class Loop(TrainLoop):
        def run_loop(self):
            for _ in range(3):
                self.run_step(*next(self.data))
                self.step += 1

    logger.configure(str(tmp_path), ["csv"])
    with pytest.raises(ValueError, match="step is 2, expected 1: run_step counts the steps"):
        loop_of(Loop).run_loop()


def test_batches_of_any_size(tmp_path):
    """The last one of a folder is smaller, and a stream may give more than was said."""
    sizes = iter([4, 1, 7, 4])
    generator = torch.Generator().manual_seed(0)
    data = ((torch.rand(size, 3, 8, 8, generator=generator), {}) for size in sizes)
    logger.configure(str(tmp_path), ["csv"])
    loop = loop_of(data=data, microbatch=3)
    loop.run_loop()
    assert loop.step == 4 and len(read_csv(tmp_path)) == 4
    noise = loop.draw_noise((7, 3, 8, 8), 0)
    assert torch.equal(noise[:4], loop.draw_noise((4, 3, 8, 8), 0)) and len(noise.flatten(1).unique(dim=0)) == 7


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"lr": 1e-4}, r"--lr was 0\.001 and is now 0\.0001"),
        ({"batch_size": 2}, r"images per step \(--batch_size times processes\) was 4 and is now 2"),
        ({"weight_decay": 0.1}, r"--weight_decay was 0\.0 and is now 0\.1"),
        ({"lr_anneal_steps": 8}, "--lr_anneal_steps was 4 and is now 8"),
        ({"use_fp16": True}, "--use_fp16 was False and is now True"),
    ],
)
def test_a_script_is_not_restarted_with_other_settings(tmp_path, option, words):
    logger.configure(str(tmp_path), ["csv"])
    loop_of().run_loop()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"checkpoints of a run with other settings: {words}\\."):
        loop_of(**{"data": batches(option.get("batch_size", 4)), **option})
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert loop_of(microbatch=2, log_interval=5, save_interval=7).step == 4


def test_a_script_is_not_restarted_with_another_diffusion(tmp_path):
    def loop_with(**flags):
        model, diffusion = make_model(**flags)
        options = {"batch_size": 4, "microbatch": -1, "lr": 1e-3, "ema_rate": 0.9, "lr_anneal_steps": 2}
        options |= {"log_interval": 1, "save_interval": 9, "resume_checkpoint": ""}
        sampler = create_named_schedule_sampler("uniform", diffusion)
        return TrainLoop(model=model, diffusion=diffusion, data=batches(), schedule_sampler=sampler, **options)

    logger.configure(str(tmp_path), ["csv"])
    loop_with().run_loop()
    with pytest.raises(ValueError, match=r"noise schedule was betas from 0\.001 to 0\.2 and is now betas from 0\.00"):
        loop_with(noise_schedule="cosine")
    with pytest.raises(ValueError, match="model mean type was EPSILON and is now START_X"):
        loop_with(predict_xstart=True)


def test_checkpoints_go_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "blobs"))
    logger.configure(str(tmp_path / "log"), ["csv"])
    assert train_util.get_blob_logdir() == str(tmp_path / "blobs") and train_util.find_resume_checkpoint() is None
    loop_of().run_loop()
    assert train_util.find_resume_checkpoint() == str(tmp_path / "blobs/model000004.pt")
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["progress.csv"]


def test_the_numbers_of_numpy_s_generator_are_the_timesteps():
    _, diffusion = make_model()
    sampler = create_named_schedule_sampler("uniform", diffusion)
    draws = []
    for _ in range(2):
        np.random.seed(5)
        draws.append(sampler.sample(8, "cpu")[0].tolist())
    np.random.seed(5)
    assert draws[0] == draws[1] == np.random.choice(100, size=(8,), p=np.full(100, 0.01)).tolist()


# Folders of the original's runs


@pytest.fixture(params=["float32", "float16"])
def original_run(request, tmp_path):
    """A folder as the original leaves it after three steps, saved at the last: its own files and numbers.

    In float16 its optimizer has two parameters, made by the functions of fp16_util.
    """
    model, diffusion = make_model()
    groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    half = request.param == "float16"
    masters = fp16_util.make_master_params(groups) if half else list(model.parameters())
    opt = AdamW(masters, lr=1e-3)
    data = batches()
    for _ in range(3):
        fp16_util.zero_grad(model.parameters())
        t = torch.tensor([3, 40, 70, 99])
        diffusion.training_losses(model, next(data)[0], t)["loss"].mean().backward()
        if half:
            fp16_util.model_grads_to_master_grads(groups, masters)
        opt.step()
        if half:
            fp16_util.master_params_to_model_params(groups, masters)
    folder = tmp_path / "original"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model000002.pt")
    torch.save(model.state_dict(), folder / "ema_0.9_000002.pt")
    torch.save(opt.state_dict(), folder / "opt000002.pt")
    (folder / "log.txt").write_text("Logging to original\n")
    (folder / "progress.csv").write_text("loss,samples,step\n0.5,12,2\n")
    return folder, 3, opt, groups if half else None, dict(model.named_parameters())


@pytest.mark.parametrize("named", [False, True], ids=["same command", "newest named"])
def test_the_folder_of_an_original_run_is_resumed(original_run, named):
    folder, taken, opt, groups, weights = original_run
    logger.configure(str(folder))
    named = {"resume_checkpoint": str(folder / "model000002.pt")} if named else {}
    loop = loop_of(lr_anneal_steps=0, iterations=6, **named)
    assert loop.step == taken
    for name, param in loop.model.named_parameters():
        assert torch.equal(param, weights[name])
    expected = opt.state_dict()["state"]
    if groups is not None:  # two flat ones
        flat = {m: {} for m in ("exp_avg", "exp_avg_sq")}
        for index, (group, _) in enumerate(groups):
            for moment, pieces in flat.items():
                values = fp16_util.unflatten_master_params(group, expected[index][moment])
                pieces.update(zip((name for name, _ in group), values, strict=True))
    for index, (name, param) in enumerate(loop.model.named_parameters()):
        for moment in ("exp_avg", "exp_avg_sq"):
            right = expected[index][moment] if groups is None else flat[moment][name]
            assert torch.equal(loop.opt.state[param][moment], right)
    loop.run_loop()
    assert (folder / "model000006.pt").exists() and (folder / "opt000002.pt").exists()
    assert [row["step"] for row in read_csv(folder)] == ["2", "4", "5", "6"]  # the log is continued
    assert loop_of(lr_anneal_steps=0, iterations=7).step == 6  # and once more, from our own
