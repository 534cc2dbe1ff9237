"""Settings: the dataclasses that generate the command line, the recipes, and what is refused."""
