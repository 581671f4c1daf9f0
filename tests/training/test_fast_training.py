"""Training made fast: compiled, in channels-last memory, without copies that wait."""

from __future__ import annotations

from contextlib import nullcontext

from guided_diffusion import logger, train_util
from guided_diffusion.compute import compilation
from guided_diffusion.errors import UserError
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training import compiled, setup
from guided_diffusion.training.compiled import CompiledForTraining, batch_sizes, choose_compilation
from guided_diffusion.training.optimizer_state import in_row_major

import pytest
import test_train_util
import torch
from test_train_util import Images, make_loop, same, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _tidy(one_thread):
    yield
    logger.reset()


class Network(nn.Module):
    """The smallest network that has dropout and a convolution, and takes a time."""

    model_channels = 64

    def __init__(self, dropout=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(8, 6, 1))

    def forward(self, x, timesteps):
        return self.layers(x * (1 + timesteps.view(-1, 1, 1, 1) / 100))


def train(folder, iterations, **options):
    logger.reset()
    options = {"model": Network(), "batch_size": 4, "save_interval": 100, **options}
    loop = make_loop(folder, iterations=iterations, **options)
    loop.run_loop()
    return loop


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pt", ".csv")}


@pytest.fixture
def traced(monkeypatch):
    """The compiler traces the network, but generates no code, which takes long. The batch sizes compiled are noted."""
    sizes = []

    class Noted(CompiledForTraining):
        def _compile_for(self, x, *args, **kwargs):
            sizes.append(len(x))
            super()._compile_for(x, *args, **kwargs)

    def trace(function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(compiled, "compile_function", trace)
    monkeypatch.setattr(compilation, "compilation_problem", lambda: "")
    monkeypatch.setattr(train_util, "CompiledForTraining", Noted)
    return sizes


# Compiled


def test_a_compiled_run_that_is_resumed_is_the_uninterrupted_one(tmp_path, monkeypatch, capfd):
    """With PyTorch's compiler as it is; the dropout is that of the step."""
    monkeypatch.setattr(compilation, "compilation_problem", lambda: "")  # which takes seconds
    whole = train(tmp_path / "whole", 4, compile=True)
    assert capfd.readouterr().err.count("compiling the network for batches of 4") == 1
    train(tmp_path / "parts", 2, compile=True)
    train(tmp_path / "parts", 4, compile="auto")  # as the record says
    resumed = files(tmp_path / "parts")
    assert {name: resumed[name] for name in files(tmp_path / "whole")} == files(tmp_path / "whole")
    assert capfd.readouterr().err.count("compiling the network for batches of 4") == 2
    assert whole.model.state_dict().keys() == Network().state_dict().keys()
    assert torch.load(tmp_path / "whole/opt000004.pt")["training"]["settings"]["--compile"] is True
    with pytest.raises(UserError, match="--compile was True and is now False"):
        train(tmp_path / "parts", 5, compile=False)


def test_a_compiled_step_is_that_of_the_network(tmp_path, traced):
    """A U-Net whose activations are recomputed, in microbatches."""
    batch, cond = next(Images(8))
    loops = []
    for choice in (False, True):
        model = tiny_model(learn_sigma=True, use_checkpoint=True)
        loops.append(make_loop(tmp_path / str(choice), model=model, microbatch=4, compile=choice))
    losses = [loop.forward_backward(batch, cond)[0] for loop in loops]
    assert traced == [4]
    for name, value in losses[0].items():
        assert torch.allclose(value, losses[1][name], rtol=1e-4)
    for a, b in zip(*(loop.model.parameters() for loop in loops), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_what_is_compiled_and_what_is_not(tmp_path, traced):
    assert batch_sizes(8, 3) == {3, 2} and batch_sizes(8, 8) == batch_sizes(8, 20) == {8} and batch_sizes(8, 4) == {4}
    loop = make_loop(tmp_path, model=Network(), batch_size=4, microbatch=3, compile=True)
    loop.run_step(*next(Images(4)))
    assert traced == [3, 1]
    loop.run_step(*next(Images(2)))  # of another size
    with torch.no_grad():
        loop.ddp_model(torch.zeros(2, 3, 8, 8), torch.zeros(2))
    seen = []
    hook = loop.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    loop.run_step(*next(Images(4)))  # with a hook that was added later, and cannot be compiled
    assert seen == [1, 1]
    hook.remove()
    loop.run_step(*next(Images(4)))
    assert seen == [1, 1] and traced == [3, 1]


def test_compiling_leaves_no_trace():
    """Neither gradients nor used random numbers."""
    network, x, t = Network(), torch.ones(2, 3, 8, 8), torch.ones(2)
    wrapped = CompiledForTraining(network, {2})
    wrapped._compiled = network.__call__  # a compiler without an effect
    torch.manual_seed(1)
    expected = network(x, t)
    torch.manual_seed(1)
    assert torch.equal(wrapped(x, t), expected)
    assert all(weight.grad is None for weight in network.parameters())


def test_auto_is_for_long_runs_on_a_gpu(monkeypatch, traced, capfd):
    monkeypatch.setattr(compilation, "on_gpu", lambda: False)
    assert not choose_compilation("auto", None, None) and not choose_compilation("auto", False, 10**6)
    assert choose_compilation(True, None, 1) and choose_compilation("auto", True, 1)
    monkeypatch.setattr(compilation, "on_gpu", lambda: True)
    many = compiled.MANY_STEPS
    assert choose_compilation("auto", None, None) and choose_compilation("auto", None, many)
    assert not choose_compilation("auto", None, many - 1) and not choose_compilation("auto", False, many)
    assert not choose_compilation(False, None, many)

    monkeypatch.setattr(compilation, "compilation_problem", lambda: "there is no compiler")
    assert not choose_compilation("auto", None, many)
    assert "cannot be compiled: there is no compiler.\nThis run continues uncompiled" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"there is no compiler\.\nFix this, or use --compile False"):
        choose_compilation(True, None, many)
    with pytest.raises(UserError, match=r"there is no compiler\.\nThe run on record was compiled"):
        choose_compilation("auto", True, many)


def test_a_run_begun_uncompiled_stays_so(tmp_path, monkeypatch, traced, capfd):
    train(tmp_path, 1)  # an earlier version recorded the same
    monkeypatch.setattr(compilation, "on_gpu", lambda: True)
    capfd.readouterr()
    loop = train(tmp_path, 2, compile="auto")
    assert not loop.compiled and not traced and "record" not in capfd.readouterr().err
    settings = torch.load(tmp_path / "opt000002.pt")["training"]["settings"]
    assert not {"--compile", "--half_precision"} & settings.keys()
    before = files(tmp_path)
    for options, words in (
        ({"compile": True}, "--compile was False and is now True"),
        ({"half_precision": "bfloat16"}, "--half_precision was auto and is now bfloat16"),
    ):
        with pytest.raises(UserError, match=words):
            train(tmp_path, 3, **options)
    assert files(tmp_path) == before


def test_another_machine_is_a_warning(tmp_path, monkeypatch, traced, capfd):
    train(tmp_path, 1, compile=True)
    train(tmp_path, 2, compile=True)
    assert "to rounding" not in capfd.readouterr().err
    monkeypatch.setattr(train_util, "hardware", lambda _: "another GPU")
    train(tmp_path, 3, compile=True)
    assert "is now another GPU. The resumed run agrees to rounding, not to the byte" in capfd.readouterr().err


def test_a_network_that_cannot_be_compiled_is_one_clear_line(tmp_path, traced):
    class Strange(Network):
        def forward(self, x, timesteps):
            return super().forward(x, timesteps) * torch.randn(3).tolist()[0]

    with pytest.raises(UserError, match=r"^the network cannot be compiled: .*\nUse --compile False; if the folder has"):
        train(tmp_path, 1, model=Strange(), compile=True)


# In channels-last memory


def test_files_do_not_depend_on_the_memory_layout(tmp_path, monkeypatch):
    model = Network(0)
    train(tmp_path / "first", 1, model=model)
    monkeypatch.setattr(TrainLoop, "_prefers_channels_last", lambda self: True)
    monkeypatch.setattr(torch.optim.AdamW, "step", _checked(torch.optim.AdamW.step))
    whole = train(tmp_path / "whole", 3)
    train(tmp_path / "parts", 2)
    resumed = train(tmp_path / "parts", 3)
    assert same(whole.model.parameters(), resumed.model.parameters())
    assert same(whole.ema_params[0], resumed.ema_params[0])
    kept = {k: v for k, v in files(tmp_path / "parts").items() if "2.pt" not in k}
    assert kept.keys() == {"model000003.pt", "opt000003.pt", "ema_0.9_000003.pt", "progress.csv"}
    assert files(tmp_path / "whole") == kept
    state = torch.load(tmp_path / "whole/opt000003.pt")["state"]
    weights = [torch.load(tmp_path / f"whole/{name}000003.pt").values() for name in ("model", "ema_0.9_")]
    saved = [value for values in (*weights, *(entry.values() for entry in state.values())) for value in values]
    assert all(value.stride() == torch.empty(value.shape).stride() for value in saved)
    one = torch.load(tmp_path / "first/model000001.pt")
    assert one._metadata == torch.load(tmp_path / "whole/model000003.pt")._metadata


def _checked(step):
    def checked(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        params = [param for group in self.param_groups for param in group["params"]]
        assert any(p.ndim == 4 and p.stride() != torch.empty(p.shape).stride() for p in params)
        for param in params:
            assert {param.stride()} == {param.grad.stride(), self.state[param]["exp_avg"].stride()}
        return result

    return checked


def test_a_state_that_is_in_row_major_order_is_saved_as_it_is():
    state = Network().state_dict()
    assert in_row_major(state) is state
    turned = Network().to(memory_format=torch.channels_last).state_dict()
    assert not turned["layers.0.weight"].is_contiguous() and turned["layers.3.weight"].stride() != (8, 1, 1, 1)
    ordered = in_row_major(turned)
    assert type(ordered) is type(state) and list(ordered) == list(state) and ordered._metadata == state._metadata
    assert same(ordered.values(), state.values())
    assert all(a.stride() == b.stride() for a, b in zip(ordered.values(), state.values(), strict=True))


# Half precision


def test_bfloat16_needs_no_loss_scale(tmp_path):
    trainer = MixedPrecisionTrainer(model=Network(), use_fp16=True, half=torch.bfloat16)
    assert trainer.dtype == torch.bfloat16 and trainer.use_fp16 and not trainer.scaler.is_enabled()
    assert MixedPrecisionTrainer(model=Network(), half=torch.bfloat16).dtype == torch.float32
    loop = train(tmp_path, 1, use_fp16=True, half_precision="bfloat16")
    assert loop.mp_trainer.dtype == torch.bfloat16
    assert torch.load(tmp_path / "opt000001.pt")["training"]["settings"]["--half_precision"] == "bfloat16"
    with pytest.raises(UserError, match="--half_precision was bfloat16 and is now auto"):
        train(tmp_path, 2, use_fp16=True)


def test_the_dtype_that_auto_would_choose_is_auto(monkeypatch):
    class Flags:
        half_precision = "bfloat16"

    monkeypatch.setattr(setup.dist_util, "dev", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert setup.half_precision_setting(Flags) == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(UserError, match="this GPU does not support it"):
        setup.half_precision_setting(Flags)
    Flags.half_precision = "float16"
    assert setup.half_precision_setting(Flags) == "auto"
    monkeypatch.setattr(setup.dist_util, "dev", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match="--half_precision float16: expected a GPU"):
        setup.half_precision_setting(Flags)


# Copies and waits


class Transfers(TorchDispatchMode):
    """Notes operations between devices, but not those of `upload`; on the meta device, reading a number back raises."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen, self.paused, self.uploads = [], False, 0
        monkeypatch.setattr(train_util, "upload", self._unnoted(train_util.upload))

    def _unnoted(self, upload):
        def unnoted(*args):
            self.paused = True
            self.uploads += 1
            try:
                return upload(*args)
            finally:
                self.paused = False

        return unnoted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1 and not self.paused:
            self.seen.append(func.name())
        return out


def transfers_of_a_step(device, folder, monkeypatch, **methods):
    """Operations between devices in a step, and the number of uploads."""
    kind = type("Loop", (TrainLoop,), methods)
    monkeypatch.setattr(test_train_util, "TrainLoop", kind)
    on_gpu = device == "cuda"
    loop = make_loop(folder, model=Network().to(device), batch_size=4, microbatch=3, log_interval=100, use_fp16=on_gpu)
    if not on_gpu:  # which the meta device does not have: noise, autocast and a fused optimizer
        loop.draw_noise = lambda shape, seed: torch.zeros(shape, device=device)
        loop.mp_trainer.autocast = nullcontext
        monkeypatch.setattr(loop.opt, "step", lambda: None)
    loop.run_step(*next(Images(4)))  # which copies the tables of the diffusion
    batch, _ = next(Images(4))
    with Transfers(monkeypatch) as transfers:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            loop.run_step(batch, {})
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    return transfers.seen, transfers.uploads


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_neither_waits_nor_copies_pageable_memory(device, tmp_path, monkeypatch):
    assert transfers_of_a_step(device, tmp_path, monkeypatch) == ([], 3)  # images, timesteps, their weights


@pytest.mark.parametrize("device", DEVICES)
def test_the_check_sees_copies_and_waits(device, tmp_path, monkeypatch):
    compute = TrainLoop.compute_losses

    def waits(self, *args):
        terms = compute(self, *args)
        return terms if terms["loss"].sum().item() > 0 else {}

    def copies(self, x, t, noise, cond):
        return compute(self, x, t + torch.zeros(len(t), dtype=torch.long).to(self.device), noise, cond)

    with pytest.raises(RuntimeError):
        transfers_of_a_step(device, tmp_path, monkeypatch, compute_losses=waits)
    logger.reset()
    if device == "meta":
        assert transfers_of_a_step(device, tmp_path, monkeypatch, compute_losses=copies)[0]
