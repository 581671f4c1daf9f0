"""Files, launchers and messages, independent of diffusion."""
