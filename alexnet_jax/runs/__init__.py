"""A run's folder: description, checkpoints, metrics."""
