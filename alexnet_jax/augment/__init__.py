"""Augmentation: crops, flips and PCA colour noise, and the order in which they are applied."""
