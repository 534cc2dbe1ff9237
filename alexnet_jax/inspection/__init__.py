"""Finished runs: opened, evaluated, compared, looked into."""
