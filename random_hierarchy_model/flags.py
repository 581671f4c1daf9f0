"""The flags of a grammar, for scripts that generate its data."""

from __future__ import annotations

from dataclasses import replace

from guided_diffusion.command_line.flags import POSITIVE, Flag, whole_number

FLAGS = {
    "num_symbols": Flag(POSITIVE, "number of symbols v per level, and of classes"),
    "num_synonyms": Flag(POSITIVE, "number of production rules m per symbol"),
    "branching": Flag(POSITIVE, "number of symbols s in a rule"),
    "depth": Flag(POSITIVE, "number of levels of rules L"),
    "patch_size": Flag(POSITIVE, "side of a patch, in pixels; an image has 2^L x 2^L patches"),
    "grammar_seed": Flag((whole_number(0, 2**63 - 1), "INT"), "seed of the rules and the patches"),
}


def grammar_flags(**defaults: int | Flag) -> dict[str, Flag]:
    """Flags with these defaults, for `add_flags`; a `Flag` in place of a default replaces that of the table."""
    return {
        name: default if isinstance(default, Flag) else replace(FLAGS[name], default=default)
        for name, default in defaults.items()
    }
