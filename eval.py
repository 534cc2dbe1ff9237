"""Evaluate trained networks: `python eval.py RUN [RUN ...] [FLAGS]`; `--help` explains."""

from collections.abc import Sequence

from alexnet_jax.config import cli


def main(args: Sequence[str]) -> None:
    """Parses the flags, opens the runs, evaluates."""
    config = cli.parse_eval(args)
    from alexnet_jax.inspection import main

    main.main(config)


if __name__ == "__main__":
    cli.run(main)
