"""Settings: dataclasses, presets, checks, config.json, the command line."""
