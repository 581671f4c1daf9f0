"""The Random Hierarchy Model: data with an exactly known hierarchy, and exact inference for it."""

from .belief_propagation import image_posterior, read_symbols
from .denoiser import ExactDenoiser, posterior_mean
from .grammar import Grammar
from .images import TreeImages

__all__ = ["ExactDenoiser", "Grammar", "TreeImages", "image_posterior", "posterior_mean", "read_symbols"]
