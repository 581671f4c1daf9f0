"""Training: loops, data, checkpoints."""
