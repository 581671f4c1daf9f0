"""Forward-backward diffusion: noise an image up to a chosen time, denoise it back, measure what survived."""

import importlib.util
import os
import shlex
import sys
from pathlib import Path

# Otherwise PyTorch warns about every connection from a node without a reverse DNS entry. Read when it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

_needed = {"numpy": "numpy", "PIL": "pillow", "torch": "torch", "blobfile": "blobfile", "tqdm": "tqdm"}
_missing = [package for module, package in _needed.items() if importlib.util.find_spec(module) is None]
if _missing:
    _clone = Path(__file__).resolve().parents[1]
    _source = f"-e {shlex.quote(str(_clone))}" if (_clone / "setup.py").exists() else " ".join(_missing)
    _words = (
        f"{sys.executable} has no {', '.join(_missing)}: activate the environment in which this project is installed, "
        f"or install it: pip install {_source}"
    )
    _script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
    if _clone in _script.parents:  # a script of this clone; other programs get an exception
        sys.stderr.write(f"error: {_words}\n")
        sys.exit(2)
    raise ImportError(_words)
