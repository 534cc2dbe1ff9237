"""Tests of each module; `tests.stress` has the long forms."""
