"""Long tests of what the program promises: each is a command that writes `results/stress-NAME.json`."""
