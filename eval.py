"""Evaluate a trained network: `python eval.py RUN [flags]`; `--help` explains."""

from collections.abc import Sequence

from alexnet_jax import cli


def main(args: Sequence[str]) -> None:
    """Parses the flags, opens the run, evaluates."""
    config = cli.parse_eval(args)
    from alexnet_jax import loop

    loop.evaluate(config)


if __name__ == "__main__":
    cli.run(main)
