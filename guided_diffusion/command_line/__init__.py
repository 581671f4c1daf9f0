"""Flags, presets, and how a script ends."""
