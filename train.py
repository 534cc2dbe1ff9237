"""Train an AlexNet: `python train.py [PRESET] [FLAGS]`; see `--help`."""

from alexnet_jax.config import cli
from alexnet_jax.train import main

if __name__ == "__main__":
    cli.run(main)
