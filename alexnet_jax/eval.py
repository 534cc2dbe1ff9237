"""The evaluation command: eval.py, or `python -m alexnet_jax.eval`."""

from collections.abc import Sequence

from alexnet_jax.config import cli


def main(args: Sequence[str]) -> None:
    """Classifies image files or extracts their features, compares runs or evaluates one, as the flags say."""
    config = cli.parse_eval(args)
    # After parsing, because importing JAX and Flax takes longer than printing --help should.
    from alexnet_jax.inspection import classify, compare, evaluate, extract

    if config.features:
        extract.extract_features(config)
    elif config.images:
        classify.classify_images(config)
    elif config.others:
        compare.compare(config)
    else:
        evaluate.evaluate(config)


if __name__ == "__main__":
    cli.run(main)
