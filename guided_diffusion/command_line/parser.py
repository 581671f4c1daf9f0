"""The parser of flags, which answers mistakes in one line, and types of flags."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable

from .presets import preset_words


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that answers a mistake in one line, and proposes the flag that was meant.

    Args:
        computes: the script runs networks: it has the flag --device.
    """

    def __init__(self, computes: bool = True, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        if computes:
            self.add_argument(
                "--device",
                default="auto",
                choices=["auto", "cpu", "cuda"],
                help="where to compute; auto: on the GPU if the machine has one (default: %(default)s)",
            )

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        # Looked for first: a misspelt flag is the reason where a required one is missing.
        for word in words:
            if word.split("=")[0] in ("--local-rank", "--local_rank"):
                self._answer_old_launcher()
            if word.startswith("--") and self._has_several(word):
                self.error(
                    f"several words came as one, {word[:40]!r}...: zsh does that with $MODEL_FLAGS and the like. Write "
                    "${=MODEL_FLAGS}; in bash, leave out the quotes"
                )
            if word.startswith("--") and word.split("=")[0] not in self._option_string_actions:
                self.error(self._explain(word))
        if "--preset" in self._option_string_actions:
            words = [*preset_words(words), *words]  # the last value of a flag counts
        return super().parse_args(words, namespace)

    def _answer_old_launcher(self):
        """`python -m torch.distributed.launch` gives a flag to every process: one answers, the others wait for it."""
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # the launcher ends all processes as soon as one ends
            self.exit(2)
        self.exit(
            2,
            "error: python -m torch.distributed.launch adds the flag --local-rank, which the scripts do not take. Use "
            "torchrun instead, with the same flags: torchrun --nproc_per_node N SCRIPT ...\n",
        )

    def error(self, message):
        self.exit(2, f"error: {message}{'' if message.endswith('?') else '.'} See --help.\n")

    def _has_several(self, word: str) -> bool:
        """Whether a word holds flags with their values, or a flag and its value, between spaces."""
        first, *others = word.split()
        flags = {part.split("=")[0] for part in others}.intersection(self._option_string_actions)
        return bool(flags or (others and first in self._option_string_actions))

    def _explain(self, word: str) -> str:
        flag = word.split("=")[0]
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"there is no flag {flag}" + (f": did you mean {close[0]}?" if close else "")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of a flag that is a whole number in a range."""

    def read(text: str) -> int:
        expected = f"a whole number from {low}" + (" on" if high is None else f" to {high}")
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}") from None
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"expected {expected}, not {number}")
        return number

    return read


def time_list(text: str) -> list[int]:
    """The type of a flag that is one time or several, separated by commas; see `Flattened`."""
    times = [whole_number(0)(word) for word in text.replace(",", " ").split()]
    if not times:
        raise argparse.ArgumentTypeError(f"expected times such as 25 50 125, not {text!r}")
    return times


class Flattened(argparse.Action):
    """Joins the lists that the words of a flag are into one."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [item for items in values for item in items])
