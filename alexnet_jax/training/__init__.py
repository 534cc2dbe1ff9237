"""Training: the step, the loop, prediction."""
