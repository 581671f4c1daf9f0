"""Files, launchers and messages; knows nothing of diffusion."""
