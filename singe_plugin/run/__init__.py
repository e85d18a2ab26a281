"""A whole run: data, checks, measurements, checkpoints, and the result with its files."""
