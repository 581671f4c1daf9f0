"""Training resumed from checkpoints of the original guided-diffusion, in their folder or in a new one.

Its files are made here from a run of this project, in the original's layouts: the optimizer's state has no entry of
ours; in float16 training it has two entries, and in some versions of PyTorch its steps are plain numbers.
"""

import shutil

from guided_diffusion.errors import UserError
from guided_diffusion.training.optimizer_state import by_parameter, steps_taken

import pytest
import torch
from test_train_util import Images, contents, make_loop, read_csv, same, tiny_model

GROUP = {"lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
MOMENTS = ("exp_avg", "exp_avg_sq")


def flattened(state, model):
    """Entries of float16 training: vectors and scalars, then tensors of two or more dimensions, as one row."""
    numbers = [[i for i, p in enumerate(model.parameters()) if (p.ndim > 1) == matrices] for matrices in (False, True)]
    entries = [{m: torch.cat([state[i][m].flatten() for i in of_kind]) for m in MOMENTS} for of_kind in numbers]
    entries[1] = {moment: value[None] for moment, value in entries[1].items()}
    return {index: {"step": state[0]["step"], **entry} for index, entry in enumerate(entries)}


def write_original(run, folder, step, layout="float32"):
    """Write a run's state after `step` steps as files of the original, which are numbered one lower."""
    folder.mkdir()
    state = torch.load(run / f"opt{step:06d}.pt")["state"]
    state = flattened(state, tiny_model(learn_sigma=True)) if layout == "float16" else state
    if layout == "plain steps":
        state = {index: {**entry, "step": int(entry["step"])} for index, entry in state.items()}
    opt = {"state": state, "param_groups": [{**GROUP, "params": list(state)}]}
    torch.save(opt, folder / f"opt{step - 1:06d}.pt", _use_new_zipfile_serialization=layout != "plain steps")
    for kind in ("model", "ema_0.9_"):
        shutil.copy(run / f"{kind}{step:06d}.pt", folder / f"{kind}{step - 1:06d}.pt")
    (folder / "progress.csv").write_text("step,loss\n0,1.0\n1,0.9\n2,0.8\n3,0.7\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps with a checkpoint after the third. Do not modify it."""
    folder = tmp_path_factory.mktemp("run")
    make_loop(folder, iterations=6, save_interval=3).run_loop()
    return folder


@pytest.mark.parametrize("layout", ["float32", "plain steps", "float16"])
@pytest.mark.parametrize("in_place", [True, False])
def test_it_follows_the_course_of_a_run_that_was_never_the_original_s(run, tmp_path, capfd, layout, in_place):
    original = write_original(run, tmp_path / "original", 3, layout)
    before = contents(original)
    output = original if in_place else tmp_path / "new"
    named = {} if in_place else {"resume_checkpoint": str(original / "model000002.pt")}
    loop = make_loop(output, iterations=6, settings={"--lr": 1e-3}, **named)
    assert loop.step == 3
    said = capfd.readouterr().err
    assert "after 3 optimizer steps: the next step is number 4" in said
    assert ("without its settings" in said) == in_place
    loop.run_loop()
    for kind in ("model", "ema_0.9_"):
        assert contents(output)[f"{kind}000006.pt"] == contents(run)[f"{kind}000006.pt"]
    continued = ["0", "1", "2"] if in_place else []  # line 3 came after the checkpoint
    assert [line["step"] for line in read_csv(output)] == [*continued, "4", "5", "6"]
    after = contents(original)
    assert all(after[name] == digest for name, digest in before.items() if name != "progress.csv")
    assert "progress.1.csv" not in after and (in_place or after["progress.csv"] == before["progress.csv"])
    again = make_loop(output, iterations=7, settings={"--lr": 1e-3}, **named)  # now with a checkpoint of our own
    assert again.step == 6 and "not known" not in capfd.readouterr().err
    with pytest.raises(UserError, match=r"--lr was 0\.001 and is now 0\.1"):
        make_loop(output, settings={"--lr": 0.1}, **named)


def test_no_step_is_lost_that_the_optimizer_has_taken(run, tmp_path):
    """The original takes an additional step each time it is resumed, and its last file is not numbered one lower."""
    original = write_original(run, tmp_path / "original", 6)
    for number, step in ((4, 6), (6, 6), (8, 8)):  # 8: float16 skipped two
        for kind in ("model", "ema_0.9_", "opt"):
            next(original.glob(f"{kind}0*.pt")).rename(original / f"{kind}{number:06d}.pt")
        assert make_loop(original).step == step


def test_other_moving_averages_than_those_beside_it(run, tmp_path):
    original = write_original(run, tmp_path / "original", 3)
    with pytest.raises(UserError, match=r"--ema_rate was 0\.9 and is now 0\.9,0\.99"):
        make_loop(original, ema_rate="0.9,0.99")
    (original / "opt000002.pt").unlink()
    with pytest.raises(UserError, match=r"opt000002\.pt is missing\.\n.*--resume_checkpoint .* with another --output$"):
        make_loop(original)


def spoil(original, change):
    path = original / "opt000002.pt"
    saved = torch.load(path)
    change(saved)
    torch.save(saved, path)


def without_moments(saved):
    for entry in saved["state"].values():
        entry["momentum_buffer"] = entry.pop("exp_avg")


def of_fewer_parameters(saved):
    saved["param_groups"][0]["params"].pop()


def of_other_shapes(saved):
    for moment in MOMENTS:
        saved["state"][0][moment] = torch.zeros(7)


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("float32", without_moments, "'momentum_buffer', expected those of AdamW: 'step', 'exp_avg'"),
        ("float32", of_fewer_parameters, r"it has \d+ parameters, the network \d+"),
        ("float32", of_other_shapes, r"time_embed\.0\.weight has shape \[7\], expected \["),
        ("float16", of_other_shapes, r"its vectors have 7 elements, the network's \d+"),
        ("float32", lambda saved: saved.pop("param_groups"), "is not the state of an optimizer"),
    ],
)
def test_a_state_that_is_another_s(run, tmp_path, layout, change, words):
    original = write_original(run, tmp_path / "original", 3, layout)
    spoil(original, change)
    before = contents(original)
    with pytest.raises(UserError, match=words) as error:
        make_loop(original)
    assert "opt000002.pt" in str(error.value) and len(str(error.value).splitlines()) <= 2
    assert contents(original) == before


def test_the_order_of_the_file_decides(tmp_path):
    """The current order of the modules does not matter."""
    loop = make_loop(tmp_path)
    loop.run_step(*next(Images(8)))
    saved = loop.opt.state_dict()
    shapes = {name: tuple(p.shape) for name, p in loop.model.named_parameters()}
    names = list(shapes)[::-1]
    numbers = {len(names) - 1 - index: entry for index, entry in saved["state"].items()}
    states = by_parameter({**saved, "state": numbers}, {name: shapes[name] for name in names})
    assert steps_taken(states) == 1
    for moment in MOMENTS:
        own = [loop.opt.state[p][moment] for p in loop.model.parameters()]
        assert same([states[name][moment] for name in shapes], own)


def test_the_state_of_an_optimizer_that_has_taken_no_step():
    assert by_parameter({"state": {}, "param_groups": [{"params": [0]}]}, {"weight": (3,)}) == {}
    assert steps_taken({}) == 0
