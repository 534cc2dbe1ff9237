"""Train an AlexNet: `python train.py [PRESET] [flags]`; `--help` explains."""

from collections.abc import Sequence

from alexnet_jax import cli


def main(args: Sequence[str]) -> None:
    """Parses the flags, loads the data, trains."""
    config = cli.parse_train(args)
    # After parsing, because importing JAX and Flax takes longer than printing --help should.
    from alexnet_jax import datasets, loop, processes

    with processes.joined(config.run):
        loop.train_and_evaluate(config, datasets.load(config.data))


if __name__ == "__main__":
    cli.run(main)
