"""Device, precision, memory and compilation."""
