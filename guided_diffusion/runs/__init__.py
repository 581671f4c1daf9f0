"""Resumable runs on any number of processes."""
