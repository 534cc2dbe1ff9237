"""Taking a trained network apart: activations, selective kernels, occlusion, gradients, nearest neighbours.

Every function takes an opened `Run` or arrays and returns arrays; `plots` draws them, notebooks/explore_params.ipynb
shows them at work.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.inspection.run import Run, to_grey_levels


def activations(run: Run, images: np.ndarray, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """What every layer makes of images, and every operation after it, in the order of the computation.

    For AlexNetSmall "conv1", "conv1 activation", "conv1 LRN", "conv1 pool", "conv2" ... "fc2 activation", "logits".
    Without dropout, from the centre of an image that is larger than the network's input.

    Args:
      run: from `open_run`.
      images: as for `Run.predict`; some hundred at once, or the first layers take gigabytes.
      names: those wanted; None for all.

    Returns:
      float32 [N, H, W, C] for maps and [N, C] for dense layers, by name.

    Raises:
      ValueError: for images of another shape, dtype or range.
      KeyError: the network has no layer or operation of a name.
    """
    grey = to_grey_levels(images, run.dataset.image_shape)
    found: list[str] = []

    def forward(params: Mapping[str, Any], grey: jax.Array) -> list[jax.Array]:
        outputs = _outputs(run, params, grey)
        found[:] = outputs if names is None else names
        return [outputs[name].astype(jnp.float32) for name in found]

    values = jax.device_get(jax.jit(forward)(run.params, grey))
    return dict(zip(found, values, strict=True))


def _outputs(run: Run, params: Mapping[str, Any], grey: jax.Array) -> dict[str, jax.Array]:
    """Layers and operations by name, in order, for tracing."""
    is_layer = lambda module, method: len(module.path) == 1 and method == "__call__"  # noqa: E731
    images = run.preprocessing.evaluation(grey)
    _, state = run.model.apply({"params": params}, images, capture_intermediates=is_layer, mutable=["intermediates"])
    kept = state["intermediates"]
    return {name: value["__call__"][0] if name in run.params else value[0] for name, value in kept.items()}


def hidden_features(run: Run, images: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """What the logits are computed from, the network's last hidden layer: float32 [N, F].

    Args:
      run: from `open_run`.
      images: as for `Run.predict`, any number.
      batch_size: images at once.
    """
    grey = to_grey_levels(images, run.dataset.image_shape)

    @jax.jit
    def forward(params: Mapping[str, Any], grey: jax.Array) -> jax.Array:
        outputs = _outputs(run, params, grey)
        hidden = [x for name, x in outputs.items() if name != "logits"]
        return hidden[-1].reshape(len(grey), -1).astype(jnp.float32)

    starts = range(0, len(grey), batch_size)
    return np.concatenate([np.asarray(forward(run.params, grey[start : start + batch_size])) for start in starts])


def nearest(queries: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """The candidates at the smallest Euclidean distance from each query, nearest first (paper, section 6.1, figure 4).

    Args:
      queries: float [Q, F].
      candidates: float [N, F].
      count: how many, at most N.

    Returns:
      int [Q, count], rows of `candidates`.
    """
    squares = (candidates.astype(np.float64) ** 2).sum(axis=1)
    distances = squares - 2 * queries.astype(np.float64) @ candidates.T  # the query's own square moves none
    return np.argsort(distances, axis=1, kind="stable")[:, :count]


@dataclasses.dataclass(frozen=True, eq=False)
class Selectivity:
    """What N kernels of the first layer look for.

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
    What is much must be measured on kernels of noise (`selectivity_of_noise`): they have two thirds of their energy in
    colour, as one channel of three is the mean, and a small kernel of noise always has some direction.

    Args:
      kernel: float [KH, KW, 3, N], KH and KW at least 2.

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
    tiny = np.finfo(float).tiny  # a kernel of zeros, or of one value, looks for nothing
    steepest = np.arctan2(-2 * xy, xx - yy) / 2  # rows run downwards
    return Selectivity(
        colour=colour / np.maximum(energy, tiny),
        orientation=np.hypot(xx - yy, 2 * xy) / np.maximum(total, tiny),
        angle=(np.degrees(steepest) + 90) % 180,
        strength=np.sqrt(energy),
    )


def selectivity_of_noise(side: int, percentile: float = 99.0, count: int = 4096) -> tuple[float, float]:
    """What that share of kernels of Gaussian noise stays below: (colour, orientation).

    Args:
      side: KH = KW of the kernels to compare with.
      percentile: of the noise.
      count: kernels drawn, from a fixed seed.
    """
    noise = selectivity(np.random.default_rng(0).normal(size=(side, side, 3, count)))
    return float(np.percentile(noise.colour, percentile)), float(np.percentile(noise.orientation, percentile))


def occlusion_map(run: Run, image: np.ndarray, label: int, window: int, stride: int) -> np.ndarray:
    """Probability of a class while a square of the image is covered with the data set's mean colour.

    Where it drops, the network needs what is there (Zeiler and Fergus, 2014, figure 7).

    Args:
      run: from `open_run`.
      image: one image, [H, W, 3], as for `Run.predict`.
      label: the class.
      window: side of the square in pixels; at the edges it hangs over.
      stride: pixels between its centres.

    Returns:
      float32 [ceil(H / stride), ceil(W / stride)]; the centre of entry i, j is pixel (i * stride, j * stride).
    """
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
    """Gradient of a class's logit by the image's pixels (Simonyan, Vedaldi and Zisserman, 2014).

    Args:
      run: from `open_run`.
      image: one image, [H, W, 3], as for `Run.predict`.
      label: the class.

    Returns:
      float32 [H, W, 3], change of the logit for each grey level (of 255).
    """
    grey = jnp.asarray(to_grey_levels(image[None], run.dataset.image_shape), jnp.float32)

    def logit(grey: jax.Array) -> jax.Array:
        logits: jax.Array = run.model.apply({"params": run.params}, run.preprocessing.evaluation(grey))  # type: ignore[assignment]
        return logits[0, label]

    return np.asarray(jax.jit(jax.grad(logit))(grey))[0]


def confident_mistakes(confidence: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    """Rows of the wrongly classified examples, the surest first: int [<= count].

    Args:
      confidence: float [N], the largest probability of each.
      right: bool [N].
      count: how many at most.
    """
    wrong = np.flatnonzero(~right)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
