"""The programs that are compared, which a worker can build, and the data that all of them get.

Each of `programs_jax`, `programs_torch` and `programs_tensorflow` has the same interface:

    device_peak() -> int | None               peak memory of the device in bytes; None on a CPU
    train(spec) -> Program                    a training program
    predict(spec) -> Program                  predictions of torchvision's AlexNet; not in programs_tensorflow
    product(spec) -> Program                  a product of square matrices; only in programs_jax
    operations(spec) -> dict[str, Program]    the operations of `OPERATIONS`

and the peers also have:

    platform() -> str                         where they compute, "cpu" or "gpu"
    logits(params, images) -> np.ndarray      their network's output in evaluation with our parameters
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]

BATCHES, IMAGENET_BATCHES = 16, 2  # different batches, kept in memory; a program cycles through them
IMAGENET_IMAGE, IMAGENET_CLASSES = (224, 224, 3), 1000
PRODUCT_SIDES = {"cpu": 2048, "gpu": 8192}

# Operation -> description, and the shape [H, W, C] of each of `OPERATION_BATCH` inputs.
OPERATIONS = {
    "LRN 16x16x48": ("lrn", (16, 16, 48)),
    "LRN 8x8x128": ("lrn", (8, 8, 128)),
    "max pooling 16x16x48": ("max_pool", (16, 16, 48)),
    "max pooling 8x8x128": ("max_pool", (8, 8, 128)),
    "PCA noise 32x32x3": ("pca_noise", (32, 32, 3)),
}
OPERATION_BATCH = 128
PCA_STD = 0.1
PCA_SCALES = np.array([121.8, 37.1, 19.7])  # grey levels, the 2012 program's
PCA_EIGENVECTORS = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a worker builds.

    Attributes:
      framework: "jax", "torch" or "tensorflow".
      platform: "cpu" or "gpu", where JAX computes; a peer that computes elsewhere is refused.
      task: "train", "predict", "operations" or "product".
      variant: how it is compiled, such as "eager"; each module says which it knows.
      network: "small" (AlexNetSmall, Adam), or "torchvision" (torchvision's AlexNet for ImageNet, SGD with momentum).
      dtype: of the computation, "float32" or "bfloat16"; parameters are float32.
      batch_size: images per step.
      devices: devices that share a batch; peers have 1.
      frozen: for "torchvision", whether the convolutions are not trained.
      data: .npz with `images`, uint8 [N, 32, 32, 3], and `labels`, int32 [N], for "small"; the other's are drawn.
    """

    framework: str
    platform: str
    task: str = "train"
    variant: str = ""
    network: str = "small"
    dtype: str = "float32"
    batch_size: int = 128
    devices: int = 1
    frozen: bool = False
    data: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
    """Something that can be timed.

    Attributes:
      run: takes the given number of steps (or calls) and returns when the last one is computed.
      parameters: number of trained parameters.
    """

    run: Callable[[int], None]
    parameters: int = 0


def examples(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Batches of images and labels, one after the other: `BATCHES`, or `IMAGENET_BATCHES` of noise."""
    if spec.network != "small":
        rng, count = np.random.default_rng(0), IMAGENET_BATCHES * spec.batch_size
        images = rng.integers(0, 256, (count, *IMAGENET_IMAGE), np.uint8)
        return images, rng.integers(0, IMAGENET_CLASSES, count, np.int32)
    with np.load(pathlib.Path(spec.data)) as data:
        order = np.arange(BATCHES * spec.batch_size) % len(data["images"])
        return data["images"][order], data["labels"][order]


def float_batches(spec: Spec) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same in the form that the peers need, batch by batch: float32 [B, 32, 32, 3] in [0, 1] and int64 [B]."""
    images, labels = (np.split(array, BATCHES) for array in examples(spec))
    return [(x.astype(np.float32) / 255, y.astype(np.int64)) for x, y in zip(images, labels, strict=True)]


def operation_input(shape: Shape) -> np.ndarray:
    """Input of an operation as after a ReLU: float32 [B, *shape], not negative, half of it 0."""
    normal = np.random.default_rng(1).standard_normal((OPERATION_BATCH, *shape), np.float32)
    return np.maximum(normal, 0)


def cotangent(shape: Shape) -> np.ndarray:
    """A fixed gradient with respect to an operation's output of this shape, float32."""
    return np.random.default_rng(2).standard_normal(shape, np.float32)
