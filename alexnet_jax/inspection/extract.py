"""Features of the user's own image files: the outputs of a layer, for a classifier or a search of one's own."""

import json

import numpy as np
import tqdm

from alexnet_jax import runtime
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.distributed.devices import select_devices
from alexnet_jax.errors import AlexNetError, UsageError
from alexnet_jax.files import npz_bytes, write_atomically
from alexnet_jax.inspection.classify import find_images, read_images, refuse_broken
from alexnet_jax.inspection.run import Run, open_run
from alexnet_jax.network.layer_outputs import layer_names
from alexnet_jax.runs.folder import versions


def extract_features(config: EvalConfig) -> None:
    """Writes a layer's outputs for image files to `config.features`.

    The file has `files`, their paths [N]; `features`, float32 [N, ...]; `layer`; `run` and `step`; `versions`, JSON.

    Raises:
      UsageError: the file exists already, or the network has no such layer.
      AlexNetError: no image could be read, or the file can't be written; also if some images could not be read, after
        the file with the others has been written.
    """
    assert config.features is not None
    if config.features.exists():
        raise UsageError(f"--features {config.features} exists already: choose another file")
    runtime.cache_compilations(config.compilation_cache)
    select_devices(config.num_devices)
    run = open_run(config.run, config.checkpoint)
    layer = chosen_layer(run, config.layer)
    paths, broken = find_images(config.images or ())
    files, parts, pixels = [], [], []
    with tqdm.tqdm(total=len(paths), unit=" images", leave=False, disable=None) as bar:
        for path, image in read_images(paths, run.dataset.image_shape[0], broken, run.config.data.scaling):
            files.append(str(path))
            pixels.append(image)
            if len(pixels) == config.batch_size:
                parts.append(run.features(np.stack(pixels), layer))
                pixels = []
            bar.update()
    if pixels:
        parts.append(run.features(np.stack(pixels), layer))
    if not parts:
        raise AlexNetError("no image could be read, so there are no features")
    features = np.concatenate(parts)
    described = {"layer": layer, "run": str(run.folder.path), "step": run.step, "versions": json.dumps(versions())}
    write_atomically(
        config.features,
        npz_bytes(files=np.array(files), features=features, **{key: np.array(x) for key, x in described.items()}),
    )
    print(f"{layer!r}, {' x '.join(map(str, features.shape[1:]))}, of {len(files):,} images in {config.features}")
    refuse_broken(broken, len(files))


def chosen_layer(run: Run, layer: str | None) -> str:
    """The layer or operation of that name; None: the one whose outputs are the last layer's inputs.

    Raises:
      UsageError: the network has none of that name.
    """
    names = layer_names(run.model, run.params, run.preprocessing.input_shape(run.dataset.image_shape))
    if layer is None:
        return names[-2]
    if layer not in names:
        raise UsageError(f"--layer {layer}: the layers and operations are {', '.join(names)}")
    return layer
