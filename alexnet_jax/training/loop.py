"""The training loop, written in the order of events."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import tqdm

from alexnet_jax import runtime
from alexnet_jax.config import checks
from alexnet_jax.config.flags import shared_settings
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.data.dataset import Dataset, Placement
from alexnet_jax.distributed import processes
from alexnet_jax.distributed.devices import default_steps_per_call, select_devices, sent_ahead
from alexnet_jax.errors import AlexNetError, StoppedError, command
from alexnet_jax.network import build
from alexnet_jax.runs.checkpoint import Checkpoints
from alexnet_jax.runs.folder import RunFolder, describe, versions
from alexnet_jax.runs.log import JsonlWriter, TensorBoardWriter, read_jsonl
from alexnet_jax.signals import StopSignals
from alexnet_jax.training.announce import announce
from alexnet_jax.training.initial import Pretrained
from alexnet_jax.training.monitor import Call, Meter, StallWatch, Totals, refused_update
from alexnet_jax.training.optimizer import Plateau
from alexnet_jax.training.pictures import draw_curves, draw_data
from alexnet_jax.training.trainer import Trainer, parameter_shapes


def train_and_evaluate(config: TrainConfig, dataset: Dataset, pretrained: Pretrained | None = None) -> None:
    """Trains as `config` says on `dataset`, validates, saves; resumes the run in `config.workdir` if there is one.

    A new run begins with the `pretrained` weights of `--init-from`, if they are given.

    Raises:
      UsageError: settings contradict each other, the data, the devices or the run in the folder.
      AlexNetError: the folder can't be written, another process is training there, or the loss or gradient is not
        finite.
      StoppedError: SIGINT, SIGTERM or SIGHUP was received; the state was saved.
    """
    for _ in training(config, dataset, pretrained):
        pass


def training(config: TrainConfig, dataset: Dataset, pretrained: Pretrained | None = None) -> Iterator[Call]:
    """`train_and_evaluate` as a generator: it yields after each call of the train step, once all that is due is done.

    Leaving the generator ends the training without saving, as a killed process does.
    """
    runtime.cache_compilations(config.run.compilation_cache)
    devices = select_devices(config.run.num_devices, config.run.deterministic)
    checks.check_training(
        config,
        image_shape=dataset.image_shape,
        has_validation="validation" in dataset.counts,
        source=dataset.source,
        num_devices=len(devices),
        network_input=build.input_size(config.network),
        layers=build.layers(config.network),
    )
    if pretrained is not None:
        pretrained.check(config, parameter_shapes(config, dataset), dataset.class_names)
    folder = RunFolder(config.workdir)
    with contextlib.ExitStack() as resources:
        claim(folder, config, dataset, pretrained, resources)
        trainer = Trainer(config, dataset, devices, folder.read_statistics(), pretrained)
        checkpoints = resources.enter_context(
            contextlib.closing(Checkpoints(folder.checkpoints, read_only=not processes.is_main()))
        )
        totals, plateau = resume(trainer, checkpoints, folder)
        writers = open_writers(folder, trainer.step, config.run.tensorboard, resources)
        accuracy, best = processes.on_main(lambda: past_accuracies(folder))  # of the records that remain
        announce(trainer, folder, pretrained)
        kept = trainer.keep_features()  # in every process
        if kept and processes.is_main():
            print("         every image's input of the last layer was computed once, and is kept", flush=True)

        meter = Meter(
            totals,
            lambda step, loss: refused_update(step, loss, trainer.steps_per_epoch, checkpoints.all_steps()),
        )
        stalls = StallWatch(config.run.stall_steps, len(dataset.class_names))

        def write(call: Call, split: str, numbers: dict[str, float]) -> None:
            for writer in writers:
                writer.write({"step": call.step, "epoch": call.epoch, "split": split} | numbers)

        def save(accuracy: float | None) -> None:
            meter.fetch()
            for writer in writers:
                writer.flush()
            trainer.require_finite()
            memory = {"totals": dataclasses.asdict(meter.totals), "plateau": dataclasses.asdict(plateau)}
            checkpoints.save(trainer.gather(), memory, accuracy)
            processes.on_main(folder.mark_as_saved)

        dead_shares = trainer.dead_shares if processes.is_main() else None
        undrawn = processes.is_main() and not trainer.step
        stop, bar = processes.Poll(), progress_bar(trainer)
        with bar, StopSignals() as signals:
            meter.watch.restart()
            for call in take_steps(trainer):
                meter.add(call)
                bar.update(call.images)
                due = due_after(call, config, dataset)
                if due.report:
                    means = meter.report()
                    write(call, "train", means | {"learning_rate": trainer.learning_rate() * plateau.scale})
                    stalls.check(call.step, means["loss"], trainer.params, dead_shares)
                    meter.watch.restart()
                with meter.watch.paused():
                    is_best = False
                    if due.validate:
                        meter.fetch()
                        scores = trainer.validate()
                        write(call, "validation", scores)
                        accuracy = scores["accuracy"]
                        is_best, best = accuracy > best, max(accuracy, best)
                        if call.ends_epoch and config.optimizer.plateau_patience:
                            plateau = trainer.lower_rate_on_plateau(plateau, accuracy)
                    if due.report:
                        show(bar, trainer, call, means["loss"], accuracy)
                    if is_best or due.save:
                        save(accuracy if due.validate else None)
                    if undrawn:
                        draw_data(dataset, trainer.preprocessing, folder)
                        undrawn = False
                yield call
                if received := stop(signals.received or 0):  # in all processes after the same step
                    bar.close()
                    save(accuracy=None)
                    raise StoppedError(received, f"saved step {trainer.step:,}; the same command resumes from there")
        save(accuracy=None)
        if processes.is_main():
            draw_curves(folder)
            print(f"Trained: {trainer.step:,} updates. Next: {command('eval')} {folder.path}")


def take_steps(trainer: Trainer) -> Iterator[Call]:
    """Takes the steps that remain; yields after each call of the compiled train step, without waiting for it."""
    schedule, per_epoch = trainer.config.schedule, trainer.steps_per_epoch
    placement = Placement(len(trainer.devices), processes.local_rows(trainer.devices))
    examples = trainer.dataset.counts["train"]
    first_epoch, first_batch = divmod(trainer.step, per_epoch)
    for epoch in range(first_epoch, schedule.epochs):
        calls = trainer.calls(epoch, placement, first_batch, functools.partial(steps_in_call, trainer))
        for call in sent_ahead(calls, trainer.devices):
            processes.advance()
            metrics = trainer.call(call)
            before, done = first_batch, first_batch + call.mask.shape[1]
            images = min(done * schedule.batch_size, examples) - before * schedule.batch_size
            first_batch = done
            yield Call(trainer.step, epoch, done, done == per_epoch, images, metrics)
        first_batch = 0


def steps_in_call(trainer: Trainer, batch: int) -> int:
    """Steps of the call that begins with this batch of the epoch: as many as configured, or until something is due.

    What is due is counted from the beginning of each epoch, so every epoch has calls of the same few lengths. Each
    length is a program to compile.
    """
    run, per_epoch = trainer.config.run, trainer.steps_per_epoch
    wanted = run.steps_per_call or default_steps_per_call(trainer.devices)
    periods = (period for period in (run.log_every, run.eval_every) if period)
    return min(wanted, per_epoch - batch, *(period - batch % period for period in periods))


class Due(NamedTuple):
    """The tasks that are due after a call."""

    report: bool
    validate: bool
    save: bool


def due_after(call: Call, config: TrainConfig, dataset: Dataset) -> Due:
    """Reports and validates every so many steps of an epoch and at its end, saves every so many epochs."""
    run, epochs = config.run, config.schedule.epochs
    ends = call.ends_epoch
    return Due(
        report=ends or call.batches % run.log_every == 0,
        validate="validation" in dataset.counts
        and (ends or (run.eval_every > 0 and call.batches % run.eval_every == 0)),
        save=ends and ((call.epoch + 1) % run.checkpoint_every == 0 or call.epoch + 1 == epochs),
    )


def claim(
    folder: RunFolder,
    config: TrainConfig,
    dataset: Dataset,
    pretrained: Pretrained | None,
    resources: contextlib.ExitStack,
) -> None:
    """Locks the folder and describes the run in it; with several processes, the first does so for all."""
    info, statistics = describe(dataset), dataset.statistics()
    if pretrained is not None:
        statistics = pretrained.statistics(statistics)
    facts = {"data set": info.fingerprint, "versions of Python or packages": versions()}
    processes.agree(shared_settings(config) | facts | {"weights of --init-from": pretrained and pretrained.digest()})

    def lock_and_describe() -> None:
        resources.enter_context(folder.claim())
        folder.prepare(config, info, statistics)

    processes.on_main(lock_and_describe)


def resume(trainer: Trainer, checkpoints: Checkpoints, folder: RunFolder) -> tuple[Totals, Plateau]:
    """Restores the newest intact checkpoint, if there is one; returns the loop's memory.

    The first process moves damaged checkpoints aside and determines the newest step; each process reads that
    checkpoint.

    Raises:
      AlexNetError: there is none, although one was saved.
    """

    def newest_step() -> int | None:
        newest = checkpoints.restore_newest()
        if newest is None and folder.saved.exists():
            raise AlexNetError(
                f"{folder.checkpoints}: the run's checkpoints are missing: copy one back, or train from scratch in "
                "another --workdir"
            )
        if newest is None:
            return None
        folder.mark_as_saved()  # a process that was killed right after its first save did not
        return int(newest[0]["step"])

    step = processes.on_main(newest_step)
    if step is None:
        return Totals(), Plateau()
    tree, memory = checkpoints.restore_tree(step)
    trainer.restore(checkpoints.to_state(tree, trainer.shapes))
    return Totals(**memory["totals"]), Plateau(**memory["plateau"])


def past_accuracies(folder: RunFolder) -> tuple[float | None, float]:
    """The last validation accuracy, and the best one or -1."""
    past = [record["accuracy"] for record in read_jsonl(folder.metrics) if record["split"] == "validation"]
    return (past[-1] if past else None), max(past, default=-1.0)


def open_writers(
    folder: RunFolder, step: int, tensorboard: bool, resources: contextlib.ExitStack
) -> list[JsonlWriter | TensorBoardWriter]:
    """Writers of metrics, which drop records after `step`; with several processes, only the first has any."""
    writers: list[JsonlWriter | TensorBoardWriter] = []
    if processes.is_main():
        writers.append(JsonlWriter(folder.metrics, step))
        if tensorboard:
            writers.append(TensorBoardWriter(folder.path / "tensorboard", step))
    for writer in writers:
        resources.enter_context(contextlib.closing(writer))
    return writers


def progress_bar(trainer: Trainer) -> tqdm.tqdm:
    """A progress bar that counts images, only in the first process and on a terminal."""
    schedule, examples = trainer.config.schedule, trainer.dataset.counts["train"]
    epoch, batch = divmod(trainer.step, trainer.steps_per_epoch)
    return tqdm.tqdm(
        total=schedule.epochs * examples,
        initial=epoch * examples + batch * schedule.batch_size,
        unit=" images",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None if processes.is_main() else True,
    )


def show(bar: tqdm.tqdm, trainer: Trainer, call: Call, loss: float, accuracy: float | None) -> None:
    """Prints a line of the log."""
    line, postfix = f"mean cross entropy: {loss:.3f}", f"loss: {loss:.3f}"
    if accuracy is not None:
        line += f" | validation accuracy: {accuracy:.3f}"
        postfix += f" | validation: {accuracy:.3f}"
    if processes.is_main():
        bar.write(f"epoch {call.epoch + 1}/{trainer.config.schedule.epochs} step {call.step:,} | {line}")
    bar.set_postfix_str(postfix, refresh=False)
