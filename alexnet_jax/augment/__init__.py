"""Augmentation: crops, flips and PCA colour noise, applied in a fixed order.

Every function takes one key per example, so that an example's draws are the same wherever in a batch and on however
many devices it is processed. Images are [B, H, W, 3] in grey levels, 0..255 (not 0..1), noise too.
"""
