"""Evaluate trained networks: `python eval.py RUN [RUN ...] [FLAGS]`; see `--help`."""

from alexnet_jax.config import cli
from alexnet_jax.eval import main

if __name__ == "__main__":
    cli.run(main)
