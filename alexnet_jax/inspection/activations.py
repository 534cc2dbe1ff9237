"""Inside a trained network: activations, selective kernels, occlusion, gradients, nearest neighbours.

The functions take an opened `Run` or arrays and return arrays; `plots` draws them, notebooks/explore_params.ipynb shows
how to use them. Each compiles once for a network and a shape of images.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.inspection.inputs import in_parts, to_grey_levels
from alexnet_jax.inspection.run import Run
from alexnet_jax.network.layer_outputs import compiled_layer_outputs, layer_outputs


def activations(run: Run, images: np.ndarray, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Outputs of every layer, and of every operation after it, in the order of the computation.

    For AlexNetSmall "conv1", "conv1 activation", "conv1 LRN", "conv1 pool", "conv2" ... "fc2 activation", "logits".
    There is no dropout; of images that are larger than the network's input, the centre is used.

    Args:
      run: from `open_run`.
      images: as for `Run.predict`, a few hundred at most: the first layers of more would take gigabytes.
      names: names of the layers and operations to return; None: all.

    Returns:
      float32 [N, H, W, C] for maps and [N, C] for dense layers, by name.

    Raises:
      ValueError: the images have another shape, dtype or range.
      KeyError: the network has no layer or operation with one of the names.
    """
    inputs = run.preprocessing.evaluation(to_grey_levels(images, run.dataset.image_shape))
    chosen = None if names is None else tuple(names)
    return dict(jax.device_get(compiled_layer_outputs(run.model, run.params, inputs, chosen)))


def hidden_features(run: Run, images: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """Outputs of the last hidden layer, from which the logits are computed: float32 [N, F].

    `images` are as for `Run.predict`, any number; `batch_size` of them are computed at once.
    """

    def compute(grey: np.ndarray) -> jax.Array:
        return _hidden_features(run.model, run.params, run.preprocessing.evaluation(grey))

    return in_parts(compute, to_grey_levels(images, run.dataset.image_shape), batch_size)


@functools.partial(jax.jit, static_argnames="model")
def _hidden_features(model: nn.Module, params: Mapping[str, Any], inputs: jax.Array) -> jax.Array:
    *_, last = (x for name, x in layer_outputs(model, params, inputs).items() if name != "logits")
    return last.reshape(len(inputs), -1).astype(jnp.float32)


def nearest(queries: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """The `count` candidates [N, F] with the smallest Euclidean distance from each query [Q, F], nearest first.

    As in the paper's section 6.1 and figure 4. Returns rows of `candidates`, int [Q, count].
    """
    squares = (candidates.astype(np.float64) ** 2).sum(axis=1)
    # The query's square is omitted: the order is the same.
    distances = squares - 2 * queries.astype(np.float64) @ candidates.T
    return np.argsort(distances, axis=1, kind="stable")[:, :count]


@dataclasses.dataclass(frozen=True, eq=False)
class Selectivity:
    """Selectivity of N first-layer kernels, float [N] each.

    Attributes:
      colour: share of a kernel's energy that is colour, in [0, 1]: 0 where R, G and B have the same weights.
      orientation: coherence of its gradient, in [0, 1]: 1 where it changes along one direction only.
      angle: the direction along its edges or stripes in degrees, 0 to 180, counter-clockwise from horizontal.
      strength: Euclidean norm.
    """

    colour: np.ndarray
    orientation: np.ndarray
    angle: np.ndarray
    strength: np.ndarray


def selectivity(kernel: np.ndarray) -> Selectivity:
    """Measures how selective the kernels of a first layer are for orientation and for colour (paper, section 6.1).

    With w the kernel and g its mean over R, G and B:

        colour = sum (w - g)^2 / sum w^2
        orientation = sqrt((Jxx - Jyy)^2 + 4 Jxy^2) / (Jxx + Jyy),  J = sum over pixels and channels of grad w grad w^T

    J is the structure tensor (Bigun and Granlund, 1987); gradients are taken between pixels, over cells of 2 x 2.
    Compare both with those of noise kernels (`selectivity_of_noise`): these have two thirds of their energy in colour,
    because the mean accounts for one of three channels, and a small noise kernel always has some direction. `kernel` is
    float [KH, KW, 3, N], KH and KW at least 2.

    Raises:
      ValueError: the kernel is not [KH, KW, 3, N].
    """
    w = np.asarray(kernel, np.float64)
    if w.ndim != 4 or w.shape[2] != 3 or min(w.shape[:2]) < 2:
        raise ValueError(f"kernel must be [KH, KW, 3, N], not {list(w.shape)}")
    energy = (w**2).sum(axis=(0, 1, 2))
    colour = ((w - w.mean(axis=2, keepdims=True)) ** 2).sum(axis=(0, 1, 2))
    across, down = np.diff(w, axis=1), np.diff(w, axis=0)
    dx, dy = (across[1:] + across[:-1]) / 2, (down[:, 1:] + down[:, :-1]) / 2
    xx, yy, xy = ((a * b).sum(axis=(0, 1, 2)) for a, b in ((dx, dx), (dy, dy), (dx, dy)))
    total = xx + yy
    tiny = np.finfo(float).tiny  # a constant kernel has neither
    steepest = np.arctan2(-2 * xy, xx - yy) / 2  # rows count downwards
    return Selectivity(
        colour=colour / np.maximum(energy, tiny),
        orientation=np.hypot(xx - yy, 2 * xy) / np.maximum(total, tiny),
        angle=(np.degrees(steepest) + 90) % 180,
        strength=np.sqrt(energy),
    )


def selectivity_of_noise(side: int, percentile: float = 99.0, count: int = 4096) -> tuple[float, float]:
    """A percentile of (colour, orientation) over `count` kernels of Gaussian noise with KH = KW = `side`.

    They are drawn with a fixed seed.
    """
    noise = selectivity(np.random.default_rng(0).normal(size=(side, side, 3, count)))
    return float(np.percentile(noise.colour, percentile)), float(np.percentile(noise.orientation, percentile))


def _check_label(run: Run, label: int) -> None:
    if not 0 <= label < len(run.class_names):
        raise ValueError(f"label must be from 0 to {len(run.class_names) - 1}, not {label}")


def occlusion_map(run: Run, image: np.ndarray, label: int, window: int, stride: int) -> np.ndarray:
    """Probability of a class while a square of the image is covered with the data set's mean colour.

    Where it drops, the network depends on that part (Zeiler and Fergus, 2014, figure 7).

    Args:
      run: from `open_run`.
      image: one image, [H, W, 3], as for `Run.predict`.
      label: the class.
      window: side of the square in pixels; at the edges, part of it is outside the image.
      stride: pixels between its centres.

    Returns:
      float32 [ceil(H / stride), ceil(W / stride)]; the centre of entry i, j is pixel (i * stride, j * stride).

    Raises:
      ValueError: the image has another shape, dtype or range, or the label is not a class.
    """
    _check_label(run, label)
    grey = to_grey_levels(image[None], run.dataset.image_shape)[0]
    height, width = grey.shape[:2]
    covered = []
    for row in range(0, height, stride):
        for column in range(0, width, stride):
            top, left = row - window // 2, column - window // 2
            copy = grey.copy()
            copy[max(top, 0) : top + window, max(left, 0) : left + window] = np.round(run.statistics.basis.mean)
            covered.append(copy)
    images = np.stack(covered)
    probabilities = run.predict(images if images.dtype == np.uint8 else images / 255)
    return probabilities[:, label].reshape(-(-height // stride), -1)


def input_gradient(run: Run, image: np.ndarray, label: int) -> np.ndarray:
    """Gradient of a class's logit with respect to the image's pixels (Simonyan, Vedaldi and Zisserman, 2014).

    `image` is one image, [H, W, 3], as for `Run.predict`. Returns float32 [H, W, 3], the change of the logit for each
    grey level (0..255).

    Raises:
      ValueError: the image has another shape, dtype or range, or the label is not a class.
    """
    _check_label(run, label)
    grey = jnp.asarray(to_grey_levels(image[None], run.dataset.image_shape), jnp.float32)
    inputs, pull_back = jax.vjp(run.preprocessing.evaluation, grey)
    (gradient,) = pull_back(_input_gradient(run.model, run.params, inputs, label))
    return np.asarray(gradient)[0]


@functools.partial(jax.jit, static_argnames="model")
def _input_gradient(model: nn.Module, params: Mapping[str, Any], inputs: jax.Array, label: jax.Array) -> jax.Array:
    def logit(inputs: jax.Array) -> jax.Array:
        logits: jax.Array = model.apply({"params": params}, inputs)  # type: ignore[assignment]
        return logits[0, label]

    return jax.grad(logit)(inputs)


def confident_mistakes(confidence: np.ndarray, correct: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` wrongly classified examples, the most confident first: int [<= count].

    `confidence` is the largest probability of each example, float [N], `correct` is bool [N].
    """
    wrong = np.flatnonzero(~correct)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
