"""Training: the place where its parts are wired together."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tqdm

from alexnet_jax import plots, runtime
from alexnet_jax.augment import preprocess
from alexnet_jax.config.flags import flag, flat_items
from alexnet_jax.config.saved import OWN
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.data.batches import Batches, batches, epoch_order, steps_per_epoch
from alexnet_jax.data.dataset import Dataset
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.data.streamed import ImageNet
from alexnet_jax.distributed import processes
from alexnet_jax.distributed.devices import MICRO_BATCHES, default_steps_per_call, replicate, select_devices
from alexnet_jax.errors import AlexNetError, StoppedError, UsageError, warn
from alexnet_jax.network import build
from alexnet_jax.runs.checkpoint import Checkpoints
from alexnet_jax.runs.folder import DatasetInfo, RunFolder, versions
from alexnet_jax.runs.log import JsonlWriter, TensorBoardWriter, Writer, Writers, read_jsonl
from alexnet_jax.signals import StopSignals
from alexnet_jax.training import health, optimizer, predict
from alexnet_jax.training import state as state_module
from alexnet_jax.training.predict import cross_entropies, predict_split
from alexnet_jax.training.state import Examples, StepMetrics, Totals, TrainState, create_state, whole
from alexnet_jax.training.step import make_train_step

SAMPLE = 512  # training images to draw and to measure on


class Stopwatch:
    """Wall-clock seconds, less what is spent in `paused()`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Sets it to 0."""
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the restart, pauses left out."""
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what is done inside."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - begin


def describe(dataset: Dataset | ImageNet) -> DatasetInfo:
    """What a run remembers of its data set."""
    return DatasetInfo(
        name=dataset.name,
        source=dataset.source,
        class_names=dataset.class_names,
        image_shape=dataset.image_shape,
        counts={name: len(split) for name, split in dataset.splits.items()},
        fingerprint=dataset.fingerprint(),
    )


def noise_levels(preprocessing: preprocess.Preprocessing, images: np.ndarray) -> np.ndarray:
    """Standard deviation of the PCA colour noise in R, G and B, grey levels [3], measured on some 2,000 draws."""
    keys = jax.random.split(jax.random.key(0), (-(-2000 // len(images)), len(images)))
    draws = jax.jit(
        lambda keys, x: jax.lax.map(lambda k: preprocessing.noise(k, x, preprocessing.config.pca_std), keys)
    )
    return np.asarray(draws(keys, images)).std(axis=(0, 1))


def train_and_evaluate(config: TrainConfig, dataset: Dataset | ImageNet) -> None:
    """Trains by `config` on `dataset`, validates, saves; goes on with the run that lies in `config.workdir`, if any.

    Raises:
      UsageError: the batch size and the number of devices don't go together, or the run there has other settings.
      AlexNetError: the folder can't be written or another process trains there, or loss or gradient is not finite.
      StoppedError: a signal came; the state was saved.
    """
    with contextlib.closing(Trainer(config, dataset)) as trainer:
        trainer.train()


class Trainer:
    """A training run: the state, where it stands, and where its results go."""

    def __init__(self, config: TrainConfig, dataset: Dataset | ImageNet) -> None:
        runtime.cache_compilations(config.run.compilation_cache)
        devices = select_devices(config.run.num_devices, config.run.deterministic)
        batch_size = config.schedule.batch_size
        if batch_size % len(devices):
            raise UsageError(f"--batch-size {batch_size} can't be divided among {len(devices)} devices")
        if config.run.deterministic and batch_size % MICRO_BATCHES:
            raise UsageError(f"--deterministic: --batch-size {batch_size} can't be divided by {MICRO_BATCHES}")
        share, parts = batch_size // len(devices), config.schedule.accumulate
        if share % parts:
            raise UsageError(f"--accumulate {parts} can't divide the {share} images of a device")
        check_sizes(config, dataset.image_shape)
        if config.optimizer.plateau_patience and "validation" not in dataset.splits:
            raise UsageError(f"--plateau-patience needs validation images; {dataset.source} has none")
        self.config, self.dataset, self.devices = config, dataset, devices
        self._splits = config.run.parallelism == "hybrid" and len(devices) > 1
        self.folder = RunFolder(config.workdir)
        info, statistics = describe(dataset), dataset.statistics()
        self._resources = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            self._claim(info, statistics, opened)
            self._set_up(info, statistics, opened)
            self._resources = opened.pop_all()

    def _claim(self, info: DatasetInfo, statistics: Statistics, opened: contextlib.ExitStack) -> None:
        """Locks the folder and describes the run there; of several processes the first does it for all."""
        settings = {flag(name): value for name, value in flat_items(self.config).items() if name not in OWN}
        processes.agree(settings | {"data set": info.fingerprint, "versions of Python or packages": versions()})

        def claim() -> None:
            opened.enter_context(self.folder.claim())
            self.folder.prepare(self.config, info, statistics)

        processes.on_main(claim)

    def _set_up(self, info: DatasetInfo, statistics: Statistics, opened: contextlib.ExitStack) -> None:
        config, dataset, devices = self.config, self.dataset, self.devices
        self.steps_per_epoch = steps_per_epoch(len(dataset["train"]), config.schedule.batch_size)
        preprocessing = preprocess.Preprocessing(config.augmentation, statistics, self.steps_per_epoch)
        self.preprocessing = preprocessing
        self.model = model = build.from_config(config.network, len(dataset.class_names))
        update_rule, self.learning_rate = optimizer.from_config(
            config.optimizer, self.steps_per_epoch, config.schedule.epochs
        )
        self.train_step = make_train_step(
            model,
            update_rule,
            preprocessing,
            devices,
            deterministic=config.run.deterministic,
            accumulate=config.schedule.accumulate,
            streams=isinstance(dataset, ImageNet),
            label_smoothing=config.optimizer.label_smoothing,
            split_dense=self._splits,
        )
        self.predict_step = predict.make_predict_step(model, preprocessing, processes.local(devices))
        initial_key, run_key = jax.random.split(jax.random.key(config.schedule.seed))
        self.key = replicate(run_key, devices)
        if isinstance(dataset, Dataset):
            train = dataset["train"]
            self.examples = replicate(Examples(train.images, train.labels), devices)

        input_shape = preprocessing.input_shape(info.image_shape)
        state = create_state(model, update_rule, input_shape, initial_key)
        self.shapes = jax.eval_shape(lambda: state)
        self.checkpoints = opened.enter_context(
            contextlib.closing(Checkpoints(self.folder.checkpoints, read_only=not processes.is_main()))
        )
        self.totals, self.plateau = Totals(), optimizer.Plateau()
        found: list[tuple[dict[str, Any], dict[str, Any]]] = []
        intact = processes.on_main(lambda: self._newest_intact(found))
        if intact is not None:
            tree, memory = found[0] if found else self.checkpoints.restore_tree(intact)
            state = self.checkpoints.to_state(tree, state)
            self.totals, self.plateau = Totals(**memory["totals"]), optimizer.Plateau(**memory["plateau"])
        self.step = int(state.step)
        self._place(state)

        writers: list[Writer] = []
        if processes.is_main():
            writers.append(JsonlWriter(self.folder.metrics, self.step))
            if config.run.tensorboard:
                writers.append(TensorBoardWriter(self.folder.path / "tensorboard", self.step))
        self.writer = opened.enter_context(contextlib.closing(Writers(writers)))
        self.accuracy, self.best_accuracy = processes.on_main(self._past_accuracies)
        self.watch, self.timed_images = Stopwatch(), 0
        self.stall_warned = False
        self.pending: StepMetrics | None = None
        self.stalled_at: int | None = None
        self.last_step = self.steps_per_epoch * config.schedule.epochs
        self._announce(model, info, preprocessing)

    def _newest_intact(self, found: list[tuple[dict[str, Any], dict[str, Any]]]) -> int | None:
        """The step to resume from, and in `found` what was saved there; newer ones, damaged, are set aside."""
        newest = self.checkpoints.restore_newest()
        if newest is None:
            # The first validation is the best so far, and so is saved before the next step.
            records = read_jsonl(self.folder.metrics)
            validated = [record["step"] for record in records if record["split"] == "validation"]
            if validated and any(record["step"] > validated[0] for record in records):
                raise AlexNetError(
                    f"{self.folder.path}: its metrics reach step {records[-1]['step']:,}, but there is no checkpoint: "
                    "copy one back, or train anew in another --workdir"
                )
            return None
        found.append(newest)
        return int(newest[0]["step"])

    def _past_accuracies(self) -> tuple[float | None, float]:
        """The last and the best validation accuracy so far."""
        past = [record["accuracy"] for record in read_jsonl(self.folder.metrics) if record["split"] == "validation"]
        return (past[-1] if past else None), max(past, default=-1.0)

    def _place(self, state: TrainState) -> None:
        """Puts a state where the train step wants it."""
        self.state = (state_module.split if self._splits else replicate)(state, self.devices)

    def whole_state(self) -> TrainState:
        """The state as checkpoints hold it, however it lies on the devices; of several processes all must call it."""
        return whole(self.state, self.shapes)

    def train(self) -> None:
        """Runs the epochs that are left, then draws the curves.

        Raises:
          AlexNetError: loss or gradient is not finite, or nothing can be written.
          StoppedError: SIGINT, SIGTERM or SIGHUP came; the state was saved.
        """
        schedule, train = self.config.schedule, self.dataset["train"]
        first_epoch, first_batch = divmod(self.step, self.steps_per_epoch)
        bar = tqdm.tqdm(
            total=schedule.epochs * len(train),
            initial=first_epoch * len(train) + first_batch * schedule.batch_size,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=None if processes.is_main() else True,  # no bar where the output is no terminal
        )
        poll = processes.Poll()
        with bar, StopSignals() as signals:
            self.watch.restart()
            for epoch in range(first_epoch, schedule.epochs):
                with contextlib.closing(self._batches(epoch)) as calls:
                    for examples, layout in calls:
                        self._take_steps(examples, layout, epoch, bar)
                        if received := poll(signals.received or 0):  # all stop after the same step
                            bar.close()
                            self._save(accuracy=None)
                            raise StoppedError(
                                received, f"saved step {self.step:,}; the same command resumes from there"
                            )
        self._save(accuracy=None)
        if processes.is_main():
            plots.save(plots.training_curves(read_jsonl(self.folder.metrics)), self.folder.plots / "curves.png")
            print(f"Trained: {self.step:,} updates. Next: python eval.py {self.folder.path}")

    def close(self) -> None:
        """Closes the files and gives the folder free."""
        self._resources.close()

    def _batches(self, epoch: int) -> Generator[tuple[Examples, Batches], None, None]:
        """What is left of an epoch, call by call."""
        schedule, dataset = self.config.schedule, self.dataset
        first = self.step - epoch * self.steps_per_epoch
        if isinstance(dataset, ImageNet):
            workers, count = self.config.data.loader_workers, len(processes.local(self.devices))
            share = (jax.process_index(), jax.process_count())
            stream = dataset.stream("train", schedule.seed, epoch, schedule.batch_size, count, first, share, workers)
            for part in stream:
                places = np.broadcast_to(np.arange(part.mask.shape[1], dtype=np.int32), part.mask.shape)
                yield Examples(part.images, part.labels), Batches(places[:, None], part.mask[:, None])
            return
        order = epoch_order(schedule.seed, epoch, len(dataset["train"]))
        layout = batches(order, schedule.batch_size, len(self.devices))
        while (batch := self.step - epoch * self.steps_per_epoch) < self.steps_per_epoch:
            yield self.examples, layout.part(batch, self._next_call()).of_devices(processes.local_rows(self.devices))

    def _next_call(self) -> int:
        """Steps of the next call: as many as wanted, or one where something is due before they would be done."""
        run = self.config.run
        periods = [period for period in (self.steps_per_epoch, run.log_every, run.eval_every) if period]
        wanted = min(run.steps_per_call or default_steps_per_call(self.devices), *periods)
        return wanted if all(wanted <= period - self.step % period for period in periods) else 1

    def _take_steps(self, examples: Examples, layout: Batches, epoch: int, bar: tqdm.tqdm) -> None:
        processes.advance()
        self.state, metrics = self.train_step(self.state, examples, layout, self.key)
        # Only now, with the next steps under way, wait for the last ones' sums: the devices never wait for the host.
        self._collect()
        self.pending = metrics
        self.step += layout.indices.shape[1]
        done = (self.step - 1) % self.steps_per_epoch + 1  # batches of this epoch
        size, total = self.config.schedule.batch_size, len(self.dataset["train"])
        count = min(done * size, total) - (done - layout.indices.shape[1]) * size  # in all processes
        self.timed_images += count
        bar.update(count)

        run = self.config.run
        ends_epoch = self.step % self.steps_per_epoch == 0
        logs = ends_epoch or self.step % run.log_every == 0
        validates = "validation" in self.dataset.splits and (
            ends_epoch or (run.eval_every > 0 and self.step % run.eval_every == 0)
        )
        if logs:
            loss = self._log(epoch)
        with self.watch.paused():
            is_best = validates and self._validate(epoch)
            if validates and ends_epoch:
                self._watch_for_plateau()
            if logs:
                line = f"mean cross entropy: {loss:.3f}"
                if self.accuracy is not None:
                    line += f" | validation accuracy: {self.accuracy:.3f}"
                if processes.is_main():
                    bar.write(f"epoch {epoch + 1}/{self.config.schedule.epochs} step {self.step:,} | {line}")
                bar.set_postfix_str(line.replace("mean cross entropy", "loss").replace(" accuracy", ""), refresh=False)
            done = (epoch + 1) % run.checkpoint_every == 0 or epoch + 1 == self.config.schedule.epochs
            if is_best or (ends_epoch and done):
                self._save(self.accuracy if validates else None)

    def _collect(self) -> None:
        """Adds the sums of the call before to the interval's."""
        if self.pending is None:
            return
        metrics, self.pending = jax.device_get(self.pending), None
        first = self.step - len(metrics.loss) + 1
        for step, loss, correct, count, finite in zip(
            range(first, self.step + 1), metrics.loss, metrics.correct, metrics.count, metrics.finite, strict=True
        ):
            if not finite:
                epoch, batch = divmod(step - 1, self.steps_per_epoch)
                what = "the gradient or the update holds Inf or NaN" if math.isfinite(loss) else f"the loss is {loss}"
                raise AlexNetError(
                    f"{what} at step {step:,} (epoch {epoch + 1}, batch {batch + 1} of {self.steps_per_epoch:,}): its "
                    "update was not taken. Try a lower --learning-rate; "
                    f"checkpoints there are: {self.checkpoints.all_steps() or 'none'}"
                )
            self.totals.add(float(loss), int(correct), int(count))

    def _log(self, epoch: int) -> float:
        """Writes the interval's means; returns its mean cross entropy."""
        self._collect()
        seconds, totals = self.watch.seconds(), self.totals
        loss = totals.loss / totals.count
        self.writer.write(
            {
                "step": self.step,
                "epoch": epoch,
                "split": "train",
                "loss": loss,
                "accuracy": totals.correct / totals.count,
                "learning_rate": float(self.learning_rate(self.step - 1)) * self.plateau.scale,
                "images_per_second": round(self.timed_images / seconds, 1),
            }
        )
        self.totals, self.timed_images = Totals(), 0
        self._watch_for_stall(loss)
        self.watch.restart()
        return loss

    def _watch_for_stall(self, loss: float) -> None:
        """Warns once if the mean loss of two intervals after `stall_steps` is that of guessing, ln(classes)."""
        guessing = math.log(len(self.dataset.class_names))
        wanted = self.config.run.stall_steps
        if not wanted or self.step < wanted or self.stall_warned or abs(loss / guessing - 1) > 0.01:
            self.stalled_at = None
            return
        if self.stalled_at is None:
            self.stalled_at, self.stalled_params = self.step, jax.tree.map(np.array, self.whole_state().params)
            return
        self.stall_warned = True
        params = jax.device_get(self.whole_state().params)
        if not processes.is_main():
            return
        images = jax.device_put(
            self.preprocessing.evaluation(self.dataset.sample(SAMPLE).images), processes.local(self.devices)[0]
        )
        dead = health.dead_shares(self.model, params, images)
        taken = self.step - self.stalled_at
        ratios = {name: r / taken for name, r in health.update_ratios(self.stalled_params, params).items()}
        del self.stalled_params
        warn(f"after {self.step:,} steps the loss is {loss:.3f}, that of guessing: {health.diagnosis(dead, ratios)}")

    def _watch_for_plateau(self) -> None:
        """At an epoch's end: lowers the rate if validation stalls."""
        config, before = self.config.optimizer, self.plateau
        if config.plateau_patience is None or self.accuracy is None:
            return
        self.plateau = before.after(self.accuracy, config.plateau_patience, config.drop_factor)
        if self.plateau.scale != before.scale:
            state = self.whole_state()
            opt_state = optimizer.with_plateau_scale(state.opt_state, self.plateau.scale)
            self._place(state.replace(opt_state=opt_state))

    def _validate(self, epoch: int) -> bool:
        """Writes the validation record; returns whether the accuracy is the best so far."""
        self._collect()
        state = self.whole_state()
        logits, labels = predict_split(
            self.predict_step,
            replicate(optimizer.averaged(state.opt_state, state.params), self.devices),
            self.dataset,
            "validation",
            self.config.run.eval_batch_size,
            len(processes.local(self.devices)),
            self.config.data.loader_workers,
        )
        self.accuracy = float(np.mean(logits.argmax(axis=1) == labels))
        self.writer.write(
            {
                "step": self.step,
                "epoch": epoch,
                "split": "validation",
                "loss": float(cross_entropies(logits, labels).mean()),
                "accuracy": self.accuracy,
                "count": len(labels),
            }
        )
        is_best = self.accuracy > self.best_accuracy
        self.best_accuracy = max(self.accuracy, self.best_accuracy)
        return is_best

    def _save(self, accuracy: float | None) -> None:
        self._collect()
        self.writer.flush()
        memory = {"totals": dataclasses.asdict(self.totals), "plateau": dataclasses.asdict(self.plateau)}
        self.checkpoints.save(self.whole_state(), memory, accuracy)

    def _announce(self, model: nn.Module, info: DatasetInfo, preprocessing: preprocess.Preprocessing) -> None:
        """Says what is about to be done, and draws what the data looks like."""
        if not processes.is_main():
            return
        devices = self.devices
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.shapes.params))
        counts = ", ".join(f"{count:,} {name}" for name, count in info.counts.items())
        print(f"data     {info.name}: {counts} images, {'x'.join(map(str, info.image_shape))}, {info.source}")
        print(
            f"network  {type(model).__name__}, {parameters:,} parameters, {self.config.network.dtype}, "
            f"on {len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}"
        )
        if preprocessing.config.pca != "none":
            red, green, blue = noise_levels(preprocessing, self.dataset.sample(SAMPLE).images)
            print(
                f"noise    PCA {preprocessing.config.pca}, coefficients' std {preprocessing.config.pca_std:g}: "
                f"shifts R, G, B by {red:.2g}, {green:.2g}, {blue:.2g} grey levels (standard deviation)"
            )
        state = f"resumes after step {self.step:,}" if self.step else "new"
        print(f"run      {self.folder.path}, {state}, {self.last_step:,} steps in all", flush=True)
        if not self.step:
            draw_data(self.dataset, preprocessing, self.folder)


def check_sizes(config: TrainConfig, image_shape: Sequence[int]) -> None:
    """Raises UsageError unless images of `image_shape` can be cut as wanted and become what the network takes."""
    augmentation, smallest = config.augmentation, min(image_shape[:2])
    stored = "x".join(map(str, image_shape[:2]))
    if (augmentation.crop_size or 0) > smallest:
        raise UsageError(f"--crop-size {augmentation.crop_size}: the images are {stored}")
    if augmentation.crop_padding >= smallest:
        raise UsageError(f"--crop-padding {augmentation.crop_padding}: the images are {stored}")
    wanted, side = build.input_size(config.network), augmentation.enlarge_to or augmentation.crop_size
    given = f"{side}x{side}" if side else stored
    if wanted is not None and given != f"{wanted}x{wanted}":
        flag = "--crop-size" if smallest > wanted else "--enlarge-to"
        raise UsageError(
            f"--network {config.network.network} takes images of {wanted}x{wanted}, not {given}: set {flag} {wanted}"
        )


def draw_data(dataset: Dataset | ImageNet, preprocessing: preprocess.Preprocessing, folder: RunFolder) -> None:
    """Draws random training images with their labels, and ten PCA perturbations of one image."""
    train = dataset.sample(SAMPLE)
    chosen = np.random.default_rng(0).choice(len(train), min(20, len(train)), replace=False)
    titles = [dataset.class_names[label] for label in train.labels[chosen]]
    plots.save(plots.portraits(train.images[chosen], titles), folder.plots / "portraits.png")

    image = train.images[min(4, len(train) - 1)]  # the seed's choice
    perturbed, noise = preprocess.visible_noise(preprocessing, image)
    plots.save(plots.pca_strip(perturbed, noise, image), folder.plots / "pca_noise.png")
