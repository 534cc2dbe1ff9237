"""Settings: their dataclasses, presets and checks, config.json, and the command line."""
