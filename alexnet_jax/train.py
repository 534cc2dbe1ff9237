"""The training command: train.py, or `python -m alexnet_jax.train`."""

from collections.abc import Sequence

from alexnet_jax.config import cli
from alexnet_jax.config.flags import replace


def main(args: Sequence[str]) -> None:
    """Parses the flags, a second time with the settings of weights to begin with; loads the data, trains."""
    config = cli.parse_train(args)
    # Imported after parsing, because importing JAX and Flax takes longer than printing --help should.
    from alexnet_jax import data
    from alexnet_jax.distributed import devices, processes
    from alexnet_jax.runs.folder import RunFolder
    from alexnet_jax.training import loop

    with processes.joined(config.run):
        # Before the data: jax.distributed gives up after two minutes if a process has not registered its devices.
        devices.select_devices(config.run.num_devices, config.run.deterministic)
        weights = None
        if config.network.init_from:
            from alexnet_jax.exchange import pretrained

            settings = pretrained.settings_of_resumed_run(config.workdir)
            if settings is None:
                weights = pretrained.load(config.network.init_from)
                settings = weights.settings_for(config.data.dataset)
            init_from = pretrained.absolute_unless_shipped(config.network.init_from)
            config = replace(cli.parse_train(args, settings), init_from=init_from)
        processes.on_main(lambda: RunFolder(config.workdir).check_settings(config))  # data may take long to load
        loop.train_and_evaluate(config, data.load(config.data), weights)


if __name__ == "__main__":
    cli.run(main)
