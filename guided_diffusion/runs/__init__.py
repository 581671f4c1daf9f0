"""Runs that can be stopped, resumed and shared by any number of processes."""
