"""The run folder: description, checkpoints, metrics."""
