"""Augmentation: crops, flips, cutout and PCA colour noise, applied in a fixed order.

Every function takes one key per example, so that an example's draws do not depend on its position in the batch or on
the number of devices. Images are [B, H, W, 3] in grey levels, 0..255 (not 0..1); noise is in grey levels, too.
"""
