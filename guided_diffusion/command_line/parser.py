"""The argument parser of all scripts, which reports a mistake in one line."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time

from .flags import add_flags
from .presets import preset_words


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser with one-line errors that suggest the closest flag.

    Args:
        computes: whether to add --device, for scripts that run networks.
    """

    def __init__(self, computes: bool = True, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        if computes:
            add_flags(self, ["device"])

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        # Checked first because a misspelled flag may be why a required one is missing.
        for word in words:
            flag = word.split("=")[0]
            if flag in ("--local-rank", "--local_rank"):
                self._reject_old_launcher()
            if word.startswith("--") and self._contains_several(word):
                self.error(
                    f"several flags in one word, {word[:40]!r}...: zsh does not split $MODEL_FLAGS. Write "
                    "${=MODEL_FLAGS}; in bash, remove the quotes"
                )
            if word.startswith("--") and flag not in self._option_string_actions:
                close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                self.error(f"there is no flag {flag}" + (f": did you mean {close[0]}?" if close else ""))
        if "--preset" in self._option_string_actions:
            words = [*preset_words(words), *words]  # the last value of a flag counts
        args = super().parse_args(words, namespace)
        if "--sampler" in self._option_string_actions:
            self._choose_sampler(args)
        return args

    def _choose_sampler(self, args):
        """Fill in --sampler, which --use_ddim may set instead."""
        if args.use_ddim and args.sampler not in ("", "ddim"):
            self.error(f"--use_ddim True is --sampler ddim, but --sampler is {args.sampler}: leave out one of them")
        args.sampler = args.sampler or ("ddim" if args.use_ddim else "ddpm")

    def _reject_old_launcher(self):
        """`python -m torch.distributed.launch` adds --local-rank in every process: only rank 0 prints an error."""
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # the launcher kills all processes as soon as one exits
            self.exit(2)
        self.exit(
            2,
            "error: python -m torch.distributed.launch adds --local-rank, which is not a flag of this script. Use "
            "torchrun with the same flags: torchrun --nproc_per_node N SCRIPT ...\n",
        )

    def error(self, message):
        self.exit(2, f"error: {message}{'' if message.endswith('?') else '.'} See --help.\n")

    def _contains_several(self, word: str) -> bool:
        """Whether a word contains spaces between flags, or between a flag and its value."""
        first, *others = word.split()
        flags = {part.split("=")[0] for part in others}.intersection(self._option_string_actions)
        return bool(flags or (others and first in self._option_string_actions))
