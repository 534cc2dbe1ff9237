"""Finished runs: opened, evaluated, compared, inspected."""
