"""The command eval.py."""

from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.errors import UsageError
from alexnet_jax.inspection.classify import predict_pictures
from alexnet_jax.inspection.compare import compare
from alexnet_jax.inspection.evaluate import evaluate


def main(config: EvalConfig) -> None:
    """Does what the flags of eval.py ask for.

    Raises:
      UsageError: flags contradict each other.
      AlexNetError: a run, its data or a picture can't be read, or nothing can be written.
    """
    if config.images == ():
        raise UsageError("--images needs pictures, or folders of them")
    if config.images and (config.others or config.report or config.split or config.data_dir):
        raise UsageError("--images goes with one run, and not with --report, --split or --data-dir")
    if config.others and config.report:
        raise UsageError("--report is about one run; to compare several, leave it out")
    if config.images:
        predict_pictures(config)
    elif config.others:
        compare(config)
    else:
        evaluate(config)
