"""The program and state of a training run: network, optimizer, compiled steps, progress."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.augment.preprocess import Preprocessing, input_shape
from alexnet_jax.config.checks import frozen_layers
from alexnet_jax.config.settings import TrainConfig
from alexnet_jax.data.batches import steps_per_epoch
from alexnet_jax.data.dataset import Dataset, Placement
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.distributed import processes
from alexnet_jax.distributed.devices import AXIS, replicate
from alexnet_jax.errors import AlexNetError
from alexnet_jax.network import build
from alexnet_jax.training import gradients, health, optimizer
from alexnet_jax.training.features import Features, Head, Unchanged, stay_the_same
from alexnet_jax.training.initial import Pretrained
from alexnet_jax.training.predict import cross_entropies, make_predict_step, predict_split
from alexnet_jax.training.state import REPLICATED, SPLIT_DENSE, StepMetrics, TrainState, create_state
from alexnet_jax.training.step import Step, compile_train_step, train_step

SAMPLE = 512  # training images for plots and measurements


def build_step(
    config: TrainConfig,
    model: Any,
    update_rule: Any,
    preprocessing: Preprocessing,
    devices: Sequence[jax.Device],
    frozen: Collection[str] = (),
) -> Step:
    """The train step of a configuration, not compiled."""
    sum_gradients: Any = gradients.at_once
    if config.run.deterministic:
        sum_gradients = gradients.in_fixed_order
    elif config.schedule.accumulate > 1:
        unroll = devices[0].platform == "cpu"
        sum_gradients = functools.partial(gradients.in_parts, number=config.schedule.accumulate, unroll=unroll)
    if is_split(config, devices):
        model = model.clone(dense_axis=AXIS)
        sum_gradients = functools.partial(sum_gradients, add_up=gradients.add_up_copied)
    return functools.partial(
        train_step,
        model=model,
        optimizer=update_rule,
        preprocess=preprocessing,
        label_smoothing=config.optimizer.label_smoothing,
        sum_gradients=sum_gradients,
        frozen=frozen,
    )


def parameter_shapes(config: TrainConfig, dataset: Dataset) -> Any:
    """Shapes and dtypes of a training run's parameters."""
    model = build.from_config(config.network, len(dataset.class_names))
    images = jax.ShapeDtypeStruct((1, *input_shape(config.augmentation, dataset.image_shape)), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def is_split(config: TrainConfig, devices: Sequence[jax.Device]) -> bool:
    """Whether the dense layers are divided over the devices."""
    return config.run.parallelism == "hybrid" and len(devices) > 1


class Trainer:
    """The program of a training run and its state.

    Attributes:
      config: every setting.
      dataset: the data.
      devices: the devices of all processes, over which each batch is divided.
      steps_per_epoch: updates in an epoch.
      model: the network.
      preprocessing: from stored images to its input.
      frozen: names of the layers that are not trained.
      shapes: a `TrainState` of shapes and dtypes, into whose tree checkpoints are restored.
      step: updates made.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        devices: Sequence[jax.Device],
        statistics: Statistics | None = None,
        pretrained: Pretrained | None = None,
    ) -> None:
        """Draws the initial state.

        Args:
          config: validated.
          dataset: the data.
          devices: of all processes.
          statistics: of the training images; None: measured.
          pretrained: weights to begin with, which fit; None: all are drawn.
        """
        self.config, self.dataset, self.devices = config, dataset, devices
        self.steps_per_epoch = steps_per_epoch(dataset.counts["train"], config.schedule.batch_size)
        statistics = statistics or dataset.statistics()
        self.preprocessing = Preprocessing(config.augmentation, statistics, self.steps_per_epoch)
        self.model = build.from_config(config.network, len(dataset.class_names))
        self.frozen = frozen_layers(config.optimizer.freeze, build.layers(config.network))
        self._update_rule, self._schedule = optimizer.from_config(
            config.optimizer, self.steps_per_epoch, config.schedule.epochs
        )
        self._layout = SPLIT_DENSE if is_split(config, devices) else REPLICATED
        self._compile(dataset, self.model, self.preprocessing)
        initial_key, run_key = jax.random.split(jax.random.key(config.schedule.seed))  # all randomness of the run
        self._key = replicate(run_key, devices)
        shape = self.preprocessing.input_shape(dataset.image_shape)

        def begin(params: Any) -> Any:
            return params if pretrained is None else pretrained.into(params, dataset.class_names)

        state = create_state(self.model, self._update_rule, shape, initial_key, begin, self.frozen)
        self.shapes = jax.eval_shape(lambda: state)
        self.restore(state)

    def _compile(self, dataset: Dataset | Features, model: Any, preprocessing: Any) -> None:
        """Builds the steps, which are compiled when they are first called, for these images."""
        self._fed = dataset
        step = build_step(self.config, model, self._update_rule, preprocessing, self.devices, self.frozen)
        self._train_step = compile_train_step(
            step, self.devices, dataset.fetch, self._layout, self.config.network.dtype
        )
        self._predict_step = make_predict_step(model, preprocessing, processes.local(self.devices))
        self._resident = replicate(dataset.resident(), self.devices)

    def keep_features(self) -> bool:
        """Computes the last layer's inputs once, if only it is trained and they stay the same; whether they do."""
        params = self.params()
        # Their bits depend on the number of devices.
        if self.config.run.deterministic or is_split(self.config, self.devices):
            return False
        if not stay_the_same(self.config, self.frozen, params, self.dataset):
            return False
        features = Features.of(self.dataset, self.model, self.preprocessing, params, self.devices)
        network = self.config.network
        head = Head(len(self.dataset.class_names), jnp.dtype(network.dtype), network.matmul_precision)
        self._compile(features, head, Unchanged())
        return True

    def calls(self, epoch: int, placement: Placement, first: int, length: Callable[[int], int]) -> Iterator[Any]:
        """What `call` takes, for the remaining steps of an epoch; see `Dataset.calls`."""
        schedule = self.config.schedule
        return self._fed.calls(schedule.seed, epoch, schedule.batch_size, placement, first, length)

    def restore(self, state: TrainState) -> None:
        """Continues from a complete state."""
        self.step = int(state.step)
        self._state = self._layout.put(state, self.devices)

    def call(self, call: Any) -> StepMetrics:
        """Takes the steps of a data set's call; returns without waiting for them."""
        self._state, metrics = self._train_step(self._state, self._resident, call, self._key)
        self.step += call.mask.shape[1]
        return metrics

    def gather(self) -> TrainState:
        """The complete state, as stored in checkpoints; with several processes, all must call it."""
        return self._layout.gather(self._state, self.shapes)

    def params(self) -> Any:
        """The parameters as NumPy arrays; with several processes, all must call it."""
        return jax.tree.map(np.array, self.gather().params)

    def require_finite(self) -> None:
        """Raises AlexNetError if a parameter is Inf or NaN; with several processes, all must call it."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params()):
            if not np.isfinite(leaf).all():
                name = "/".join(str(key.key) for key in path)
                raise AlexNetError(
                    f"{name} contains Inf or NaN after step {self.step:,}, which is not saved. Try a lower "
                    "--learning-rate"
                )

    def learning_rate(self) -> float:
        """The schedule's rate of the last update."""
        return float(self._schedule(self.step - 1))

    def validate(self) -> dict[str, float]:
        """Loss (mean cross entropy, nats), accuracy and count on the validation images.

        Raises:
          AlexNetError: a parameter is Inf or NaN.
        """
        self.require_finite()
        state = self.gather()
        params = replicate(optimizer.averaged(state.opt_state, state.params), self.devices)
        logits, labels = predict_split(
            self._predict_step, params, self._fed, "validation", self.config.run.eval_batch_size, self.devices
        )
        return {
            "loss": float(cross_entropies(logits, labels).mean()),
            "accuracy": float(np.mean(logits.argmax(axis=1) == labels)),
            "count": len(labels),
        }

    def lower_rate_on_plateau(self, plateau: optimizer.Plateau, accuracy: float) -> optimizer.Plateau:
        """Records an epoch's accuracy; lowers the rate if the last --plateau-patience epochs were no better."""
        config = self.config.optimizer
        after = plateau.after(accuracy, config.plateau_patience or 0, config.drop_factor)
        if after.scale != plateau.scale:
            state = self.gather()
            self.restore(state.replace(opt_state=optimizer.with_plateau_scale(state.opt_state, after.scale)))
        return after

    def dead_shares(self, params: Any) -> dict[str, float]:
        """Each layer's share of dead units, on a sample of the training images."""
        images = self.preprocessing.evaluation(self.dataset.sample(SAMPLE).images)
        return health.dead_shares(self.model, params, jax.device_put(images, processes.local(self.devices)[0]))
