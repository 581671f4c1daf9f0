"""Presets: the flags of the published checkpoints by name."""

from __future__ import annotations

import json

from guided_diffusion.command_line.presets import PRESETS
from guided_diffusion.runs.settings import settings_of
from guided_diffusion.script_util import (
    args_to_dict,
    classifier_defaults,
    create_classifier,
    model_defaults,
    model_from_flags,
    sr_create_model,
    sr_model_and_diffusion_defaults,
)
from guided_diffusion.system.other_scripts import load_script

import pytest
import torch
from conftest import as_flags, lay_out_photographs, run_script
from reference import published_checkpoints

CHECKPOINTS = {name.removesuffix(".pt"): entry for name, entry in published_checkpoints().items()}
SCRIPTS = {
    "diffusion model": [
        "forward_backward_dataset_sample.py",
        "scripts/image_sample.py",
        "scripts/image_nll.py",
        "scripts/image_train.py",
    ],
    "classifier": ["scripts/classifier_train.py"],
    "upsampler": ["scripts/super_res_sample.py", "scripts/super_res_train.py"],
}
CASES = [(script, name) for name, preset in PRESETS.items() for script in SCRIPTS[preset.kind]]
REQUIRED = {"forward_backward_dataset_sample.py": ["--data_dir", "a", "--model_path", "b", "--step_reverse", "1"]}


def parse(script: str, *words: str):
    return load_script(script).create_argparser().parse_args([*REQUIRED.get(script, ()), *words])


def test_every_published_checkpoint_has_a_preset():
    assert PRESETS.keys() == CHECKPOINTS.keys()


@pytest.mark.parametrize(("script", "name"), CASES)
def test_a_preset_is_its_flags(script, name):
    by_name, by_flags = parse(script, "--preset", name), parse(script, *CHECKPOINTS[name]["flags"].split())
    assert settings_of(by_name) == settings_of(by_flags)


@pytest.mark.parametrize("name", PRESETS)
def test_the_network_has_the_published_shapes(name):
    kind = PRESETS[name].kind
    args = parse(SCRIPTS[kind][-1], "--preset", name)
    with torch.device("meta"):
        if kind == "classifier":
            network = create_classifier(**args_to_dict(args, classifier_defaults()))
        elif kind == "upsampler":
            of_model = sr_model_and_diffusion_defaults().keys() & sr_create_model.__code__.co_varnames
            network = sr_create_model(**args_to_dict(args, of_model))
        else:
            network = model_from_flags(args_to_dict(args, [*model_defaults(), "learn_sigma"]))
    published = {key: tuple(shape) for key, shape in CHECKPOINTS[name]["shapes"].items()}
    assert {key: tuple(w.shape) for key, w in network.state_dict().items()} == published


def test_flags_override_a_preset_wherever_they_are():
    script = "forward_backward_dataset_sample.py"
    for words in (
        ["--use_fp16", "False", "--preset", "64x64_diffusion"],
        ["--preset=64x64_diffusion", "--use_fp16", "False"],
    ):
        args = parse(script, *words)
        assert not args.use_fp16 and args.num_channels == 192


def test_a_guided_model_takes_two_presets():
    args = parse("scripts/classifier_sample.py", "--preset", "64x64_diffusion,64x64_classifier")
    assert args.num_channels == 192 and args.classifier_depth == 4 and args.image_size == 64


@pytest.mark.parametrize(
    ("script", "name", "words"),
    [
        ("scripts/image_sample.py", "64x64_difusion", "there is no preset '64x64_difusion': did you mean"),
        ("scripts/image_sample.py", "64_256_upsampler", "is a preset for upsamplers, not for diffusion models"),
    ],
)
def test_a_mistake(script, name, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(script, "--preset", name)
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_run_begun_with_flags_is_resumed_with_the_preset(tmp_path):
    data = lay_out_photographs(tmp_path / "data")
    small = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_head_channels": 16}
    run = {"data_dir": data, "model_path": "untrained", "timestep_respacing": 2, "step_reverse": 1, "num_samples": 2}
    run |= {"output": tmp_path / "out", "num_threads": 1, **small}
    first = run_script(*CHECKPOINTS["64x64_diffusion"]["flags"].split(), *as_flags({**run, "class_cond": False}))
    assert first.returncode == 0, first.stderr
    again = run_script("--preset", "64x64_diffusion", *as_flags({**run, "class_cond": False}))
    assert again.returncode == 0 and "0 samples to make, 2 exist already" in again.stderr, again.stderr
    (record,) = (tmp_path / "out").glob("*_run.json")
    settings = json.loads(record.read_text())["settings"]
    assert settings["use_new_attention_order"] is True and "preset" not in settings
