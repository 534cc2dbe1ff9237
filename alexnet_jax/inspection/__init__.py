"""Finished runs: opening, evaluating, comparing, classifying, reporting."""
