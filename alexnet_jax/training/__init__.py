"""Training: the step, the loop around it, the optimizer, prediction."""
