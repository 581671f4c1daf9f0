"""Forward-backward diffusion: noise an image up to a chosen time, denoise it back, measure what survived."""

import os

# PyTorch would warn of every connection from a node whose address has no name in DNS. It reads this at its import.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
