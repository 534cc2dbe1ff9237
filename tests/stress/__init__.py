"""Long tests of the program's guarantees: each is a command that writes `results/stress-NAME.json`."""
