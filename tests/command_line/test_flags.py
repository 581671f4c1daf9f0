"""The flags of networks: what a message advises is a flag of that very script, and following it works."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import nullcontext

from guided_diffusion.checkpoints import CLASSIFIER, DIFFUSION_MODEL, UPSAMPLER, build
from guided_diffusion.command_line.flags import FLAGS, FLOAT, add_flags
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import SAMPLERS
from guided_diffusion.runs.settings import differences
from guided_diffusion.script_util import (
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

import blobfile
import pytest
import torch
from conftest import REPOSITORY, load_script

SCRIPTS = [  # every script that makes a network of flags, and the network
    ("forward_backward_dataset_sample.py", DIFFUSION_MODEL),
    ("scripts/image_train.py", DIFFUSION_MODEL),
    ("scripts/image_sample.py", DIFFUSION_MODEL),
    ("scripts/image_nll.py", DIFFUSION_MODEL),
    ("scripts/classifier_sample.py", DIFFUSION_MODEL),
    ("scripts/classifier_sample.py", CLASSIFIER),
    ("scripts/classifier_train.py", CLASSIFIER),
    ("scripts/super_res_train.py", UPSAMPLER),
    ("scripts/super_res_sample.py", UPSAMPLER),
]
REQUIRED = {"forward_backward_dataset_sample.py": ["--data_dir", "x", "--model_path", "x", "--step_reverse", "1"]}
MESSAGES = [  # a mistake, and what puts it right: what the message advises, else a value that fits what it expects
    (["--{size}", "32"], r"Give (--\w+), for instance ([\d,]+)$", None),
    (["--{size}", "50"], r"Give (--\w+), for instance ([\d,]+)$", None),
    (["--{size}", "27"], r"Give (--\w+), for instance ([\d,]+)$", None),
    (
        ["--{size}", "32", "--{mult}", "1,x"],
        r"^(--\w+) 1,x: expected numbers separated by commas, such as ([\d,]+)$",
        None,
    ),
    (["--{size}", "32", "--{mult}", "1,0"], r"^(--\w+) 1,0: .* above 0, separated by commas, such as ([\d,]+)$", None),
    (["--{size}", "30", "--{mult}", "1,2,2"], r"^(--\w+) 30 is not a multiple of (4)", "32"),
    (["--{width}", "80"], r"^(--\w+) 80 times the multiplier 1 is not a multiple of (32)", "128"),
    (["--{attention}", "a"], r"^(--\w+) a: expected numbers separated by commas, such as ([\d,]+)$", None),
]


def names_of(network):
    names = {"size": network.size_flag, "mult": "channel_mult", "width": "num_channels"}
    return {name: network.flag(flag) for name, flag in {**names, "attention": "attention_resolutions"}.items()}


def make(script, network, words):
    """The network that the script makes of a command line, without memory for its weights."""
    args = load_script(script).create_argparser().parse_args([*REQUIRED.get(script, []), *words])
    with torch.device("meta"):
        return build(network, vars(args))


@pytest.mark.parametrize(("script", "network"), SCRIPTS)
def test_what_a_message_advises_works_in_that_script(script, network):
    small = ["--small_size", "8"] if network is UPSAMPLER else []
    for mistake, message, right in MESSAGES:
        words = [*small, *(word.format(**names_of(network)) for word in mistake)]
        with pytest.raises(UserError, match=message) as caught:
            make(script, network, words)
        assert len(str(caught.value).splitlines()) == 1
        flag, value = re.search(message, str(caught.value)).groups()
        make(script, network, [*words, flag, right or value])


@pytest.mark.parametrize("script", ["classifier_train", "classifier_sample"])
def test_a_classifier_whose_heads_do_not_divide_its_channels(script):
    words = ["--classifier_width", "32", "--image_size", "32", "--classifier_channel_mult", "1,2"]
    message = r"^--classifier_width 32 times the multiplier 1 is not a multiple of 64, as attention at 32 pixels needs"
    with pytest.raises(UserError, match=message):
        make(f"scripts/{script}.py", CLASSIFIER, words)
    make(f"scripts/{script}.py", CLASSIFIER, [*words, "--classifier_attention_resolutions", "16"])
    with pytest.raises(UserError, match=r"multiplier 1 .* attention at 16 pixels .*the last level always has"):
        make(f"scripts/{script}.py", CLASSIFIER, [*words, "--classifier_channel_mult", "2,1"])
    make(f"scripts/{script}.py", CLASSIFIER, [*words, "--classifier_width", "64"])


def test_the_classifier_s_multipliers_have_a_name_of_their_own_where_the_model_has_some_too():
    both = ["--image_size", "32", "--channel_mult", "1,2", "--classifier_channel_mult", "1,2,2"]
    assert make("scripts/classifier_sample.py", DIFFUSION_MODEL, both).channel_mult == (1, 2)
    assert make("scripts/classifier_sample.py", CLASSIFIER, both).channel_mult == (1, 2, 2)
    for flag in ("--channel_mult", "--classifier_channel_mult"):
        assert make("scripts/classifier_train.py", CLASSIFIER, ["--image_size", "32", flag, "1,3"]).channel_mult == (
            1,
            3,
        )
    large = ["--large_size", "512", "--small_size", "128"]
    assert len(make("scripts/super_res_train.py", UPSAMPLER, large).channel_mult) == 6
    assert make("scripts/super_res_train.py", UPSAMPLER, [*large, "--channel_mult", "1,2"]).channel_mult == (1, 2)


def test_callers_of_the_factories_need_not_know_new_flags():
    for create, flags, new in (
        (create_classifier_and_diffusion, classifier_and_diffusion_defaults(), "classifier_channel_mult"),
        (sr_create_model_and_diffusion, sr_model_and_diffusion_defaults(), "channel_mult"),
    ):
        del flags[new]
        with torch.device("meta"):
            create(**flags)


def test_a_record_from_before_a_flag_existed_agrees_with_its_default():
    assert differences({"--lr": 1.0}, {"--lr": 1.0, "--channel_mult": ""}) == []
    assert differences({"--lr": 1.0}, {"--channel_mult": "1,2", "--lr": 1.0}) == [
        "--channel_mult was not set and is now 1,2"
    ]


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("image_train", "--dropout 2", "--dropout 2.0: expected a probability, from 0 to 1"),
        ("super_res_train", "--dropout -1", "--dropout -1.0: expected a probability, from 0 to 1"),
        ("image_train", "--fp16_scale_growth 0", r"--fp16_scale_growth 0.0: expected a number above 0"),
        ("image_train", "--num_heads_upsample 5", r"5 attention heads \(--num_heads, --num_heads_upsample\)"),
    ],
)
def test_numbers_out_of_range(script, words, message, photographs, tmp_path):
    data = ["--data_dir", str(photographs), "--output", str(tmp_path), "--num_workers", "0"]
    with pytest.raises(UserError, match=message):
        load_script(f"scripts/{script}.py").main([*data, *words.split()])


@pytest.mark.parametrize("flag", ["image_size", "num_channels", "num_res_blocks"])
def test_whole_numbers_out_of_range(flag, capsys):
    with pytest.raises(SystemExit):
        load_script("scripts/image_train.py").main([f"--{flag}", "0"])
    assert f"--{flag}: expected a whole number >= 1, not 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, entry in FLAGS.items() if entry.kind is FLOAT])
@pytest.mark.parametrize("text", ["nan", "-inf", "1e999", "one"])
def test_numbers_are_finite(name, text, capsys):
    parser = ArgumentParser()
    add_flags(parser, [name])
    with pytest.raises(SystemExit):
        parser.parse_args([f"--{name}={text}"])
    assert f"--{name}: expected a finite number, not {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "number", "highest"),
    [
        ("seed", 2**64, 2**64 - 1),
        ("num_threads", 100_000, 1024),
        ("num_workers", 100_000, 1024),
        ("num_trajectories", 10**11, 10**5),
        ("num_turns", 10**11, 10**5),
        ("batch_size", 10**11, 2**31 - 1),
        ("num_heads", 2**31, 2**31 - 1),
        ("step_reverse", 10**11, 2**31 - 1),
    ],
)
def test_numbers_have_upper_limits(name, number, highest, capsys):
    parser = ArgumentParser()
    add_flags(parser, [name, "step_reverse"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--step_reverse", "1", f"--{name}", str(number)])
    said = capsys.readouterr().err
    assert f"--{name}: expected a whole number from " in said and f" to {highest}, not {number}" in said
    found = getattr(parser.parse_args(["--step_reverse", "1", f"--{name}", str(highest)]), name)
    assert found in (highest, [highest])


@pytest.mark.parametrize(
    ("path", "is_fine"),
    {
        **dict.fromkeys(["", ".", "out", "/a/b", "./out:/", "a b/c", "gs://b/c", "az://a/c/d"], True),
        "https://account.blob.core.windows.net/c/d": True,
        **dict.fromkeys(["s3://b/c", "out:/", "a:b/c", "//a/b", "https://example.com/a", "file:///a"], False),
    }.items(),
)
def test_folders_are_those_that_blobfile_knows(path, is_fine, capsys):
    parser = ArgumentParser()
    add_flags(parser, ["output"])
    if is_fine:
        assert parser.parse_args(["--output", path]).output == path
    else:
        with pytest.raises(SystemExit):
            parser.parse_args(["--output", path])
        assert f"--output: {'' if '//' in path else repr(path)}" in capsys.readouterr().err
    if not is_fine or "://" not in path:
        with nullcontext() if is_fine else pytest.raises(blobfile.Error):
            blobfile.exists(path)


# The table of flags


def test_every_help_text_exists_once():
    texts = [flag.help for flag in FLAGS.values()]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(
    "script",
    [
        *("forward_backward_dataset_sample.py", "classifier_statistics.py", "evaluate_classifier.py"),
        *sorted(f"scripts/{path.name}" for path in REPOSITORY.glob("scripts/*.py")),
    ],
)
def test_help_shows_every_default(script):
    text = load_script(script).create_argparser().format_help()
    assert "(default: )" not in text and "default: None" not in text and "object at" not in text


# Flags that a shell passes on


@pytest.mark.parametrize(
    "words",
    [
        ["--attention_resolutions 32,16,8 --class_cond False --image_size 64"],
        ["--model_path", "x", "--image_size=64 --seed=3"],
        ["--class_cond True"],
        ["--learn_sigma\tTrue\n--image_size 64"],
    ],
)
def test_several_words_that_came_as_one_are_recognised(words, capsys):
    with pytest.raises(SystemExit) as caught:
        load_script("scripts/image_sample.py").create_argparser().parse_args(words)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and len(message.splitlines()) == 1
    assert message.startswith("error: several flags in one word, '--") and "${=MODEL_FLAGS}" in message


def test_values_may_have_spaces_in_them():
    parser = load_script("scripts/image_sample.py").create_argparser()
    args = parser.parse_args(["--output=my folder", "--model_path", "a --b c"])
    assert (args.output, args.model_path) == ("my folder", "a --b c")


COMMANDS = """
python() { for word in "$@"; do printf '%s\\n' "$word"; done; }
"""


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_readme_s_commands_work_in_both_shells(shell):
    """The shell says which words a script is given, and the script's parser takes them."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    blocks = [block for block in blocks if "MODEL_FLAGS" in block]
    assert len(blocks) == 2
    scripts = []
    for block in blocks:
        definition, *commands = block.strip().split("\n\n")
        for command in commands:
            program = f"{COMMANDS}\n{definition}\n{command}"
            done = subprocess.run([shell, "-c", program], capture_output=True, text=True, check=True)
            script, *words = done.stdout.splitlines()
            args = load_script(script).create_argparser().parse_args(words)
            assert args.learn_sigma is True and args.image_size in (64, 256) and args.num_channels in (128, 256)
            scripts.append(script)
    assert len(scripts) == 5


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_the_advice_for_zsh_works_in_zsh():
    for variable, works in (("$MODEL_FLAGS", False), ("${=MODEL_FLAGS}", True)):
        program = f'{COMMANDS}\nMODEL_FLAGS="--image_size 64 --class_cond True"\npython {variable}'
        words = subprocess.run(["zsh", "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
        parser = load_script("scripts/image_sample.py").create_argparser()
        if works:
            assert parser.parse_args(words).class_cond is True
        else:
            with pytest.raises(SystemExit):
                parser.parse_args(words)


def test_no_example_leaves_the_splitting_to_the_shell():
    scripts = [path for path in REPOSITORY.glob("scripts/**/*") if path.suffix in (".py", ".md")]
    assert scripts
    for path in [REPOSITORY / "README.md", *REPOSITORY.glob("*.py"), *scripts]:
        assert not re.search(r"\s\$\w+_FLAGS", path.read_text()), path


SAMPLING = [
    "forward_backward_dataset_sample.py",
    *(f"scripts/{n}_sample.py" for n in ("image", "classifier", "super_res")),
]


@pytest.mark.parametrize("script", SAMPLING)
def test_samplers_and_their_older_flag(script, capsys):
    def sampler(*words):
        return load_script(script).create_argparser().parse_args([*REQUIRED.get(script, []), *words]).sampler

    assert sampler() == sampler("--use_ddim", "False") == "ddpm"
    assert sampler("--use_ddim", "True") == sampler("--use_ddim", "True", "--sampler", "ddim") == "ddim"
    for name in SAMPLERS:
        assert sampler("--sampler", name) == sampler("--sampler", name, "--use_ddim", "False") == name
    for name in ("ddpm", "sde-dpmsolver++"):
        with pytest.raises(SystemExit):
            sampler("--sampler", name, "--use_ddim", "True")
        assert f"--use_ddim True is --sampler ddim, but --sampler is {name}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sampler("--sampler", "dpm")
    assert "argument --sampler: invalid choice: 'dpm'" in capsys.readouterr().err
