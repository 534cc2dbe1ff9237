"""Figures of the pages about ideas: `python docs/pictures.py` draws them into docs/images/.

They are computed by the package itself, from drawn shapes, so no data set is needed.
"""

import io
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image, PngImagePlugin

from alexnet_jax import plots
from alexnet_jax.augment.pca import dataset_noise
from alexnet_jax.augment.preprocess import Preprocessing
from alexnet_jax.config.settings import AugmentationConfig
from alexnet_jax.data import shapes
from alexnet_jax.data.batches import batches
from alexnet_jax.data.statistics import PcaBasis, Statistics, pca_basis
from alexnet_jax.files import write_atomically
from alexnet_jax.network.layers import max_pool
from alexnet_jax.network.lrn import local_response_norm

IMAGES = pathlib.Path(__file__).parent / "images"
BLUE, VERMILION, INK = plots.TRAIN, plots.VALIDATION, plots.INK
GREEN, PURPLE, PALE = "#009E73", "#CC79A7", "0.85"  # the first two of Okabe and Ito's set, too


def lrn() -> Figure:
    """What local response normalization does to a loud channel, to one channel, and to a scale."""
    figure = Figure(figsize=(plots.WIDTH, 2.7), layout="constrained")
    loud, own, scale = figure.subplots(1, 3)

    channels = np.full(11, 60.0, np.float32)
    channels[5] = 300
    places = np.arange(len(channels))
    loud.bar(places, channels, color=PALE, width=0.8, label="before")
    loud.bar(places, np.asarray(local_response_norm(jnp.asarray(channels))), color=BLUE, width=0.5, label="after")
    loud.set_title("One loud channel", fontsize=plots.TITLE)
    loud.set_xlabel("Channel", fontsize=plots.LABEL)
    loud.set_ylabel("Activation", fontsize=plots.LABEL)
    loud.set_xticks([0, 5, 10])

    activation = np.linspace(0, 600, 301, dtype=np.float32)
    for neighbours, colour in ((0, BLUE), (100, GREEN), (200, VERMILION), (400, INK)):
        window = np.full((len(activation), 5), neighbours, np.float32)
        window[:, 2] = activation
        response = local_response_norm(jnp.asarray(window))[:, 2]
        own.plot(activation, response, color=colour, linewidth=1.2, label=f"neighbours {neighbours}")
    own.set_title("Response of one channel", fontsize=plots.TITLE)
    own.set_xlabel("Its activation before", fontsize=plots.LABEL)
    own.set_ylabel("Its activation after", fontsize=plots.LABEL)
    own.set_ylim(0, 95)

    size = np.logspace(-2, 3, 201, dtype=np.float32)
    all_alike = jnp.asarray(np.repeat(size[:, None], 5, axis=1))
    for label, k, divide, colour in (
        ("$a=\\alpha$, $k=2$", 2.0, False, BLUE),
        ("$a=\\alpha/n$, $k=2$", 2.0, True, VERMILION),
        ("$a=\\alpha/n$, $k=1$", 1.0, True, GREEN),
    ):
        multiplier = local_response_norm(all_alike, k=k, divide_by_size=divide)[:, 2] / size
        scale.semilogx(size, multiplier, color=colour, linewidth=1.2, label=label)
    scale.axvspan(size[0], 1, color="0.92", linewidth=0)
    scale.text(0.1, 1.05, "images in\n[0, 1]", fontsize=plots.SMALL, color=INK, ha="center")
    scale.text(35, 1.05, "grey levels\n0 to 255", fontsize=plots.SMALL, color=INK, ha="center")
    scale.set_xlim(size[0], size[-1])
    scale.set_title("Multiplier, five alike", fontsize=plots.TITLE)
    scale.set_xlabel("Activation before", fontsize=plots.LABEL)
    scale.set_ylabel("After / before", fontsize=plots.LABEL)
    scale.set_ylim(0, 1.3)
    for ax, place in ((loud, "upper left"), (own, "upper right"), (scale, "lower left")):
        plots.style(ax)
        ax.legend(fontsize=plots.SMALL, frameon=False, loc=place, handlelength=1.2)
    return figure


def pca_noise() -> Figure:
    """The cloud of a data set's colours, and one image with each kind of colour noise."""
    images = shapes.load(train=500, validation=0, test=0)["train"].images
    basis, image, std, draws = _signed(pca_basis(images)), images[0], 0.1, 3
    statistics = Statistics(basis, images.mean(axis=0, dtype=np.float32))
    batch = np.repeat(image[np.newaxis], draws, axis=0)
    keys = jax.random.split(jax.random.key(7), (draws, 6))
    noise_keys = keys[:, 2]  # as in `Preprocessing.training`
    rows: list[tuple[str, np.ndarray, np.ndarray]] = []
    for kind in ("per-image", "dataset-eigenvalue", "dataset-std"):
        config = AugmentationConfig(pca=kind, pca_std=std)
        preprocessing = Preprocessing(config, statistics, steps_per_epoch=1)
        shifts = np.asarray(preprocessing.noise(noise_keys, batch, std))
        rows.append((kind, shifts, np.asarray(preprocessing.training(keys, batch, jnp.int32(0)))))
    shifts = np.asarray(dataset_noise(noise_keys, basis.eigenvalues, basis.eigenvectors, std))
    rows.append(("text on 0..255", shifts, (batch + shifts[:, None, None]) / 255))

    width, height = plots.WIDTH, 4.5
    figure = Figure(figsize=(width, height))
    cloud = figure.add_axes((0.55 / width, 0.85 / height, 2.2 / width, 2.2 / height))
    pixels = images.reshape(-1, 3)
    cloud.hist2d(pixels[:, 0], pixels[:, 1], bins=64, range=((0, 255), (0, 255)), cmap="Greys", norm="log")
    deviations = np.sqrt(basis.eigenvalues)
    for i, colour in enumerate((BLUE, VERMILION, GREEN)):
        end = basis.mean + deviations[i] * basis.eigenvectors[:, i]
        arrow = {"arrowstyle": "->", "color": colour, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
        cloud.annotate("", (end[0], end[1]), (basis.mean[0], basis.mean[1]), arrowprops=arrow)
        cloud.plot([], color=colour, linewidth=2, label=f"component {i + 1}: {deviations[i]:.0f} levels")
    cloud.set_title("Colours of 500 drawn images", fontsize=plots.TITLE)
    cloud.set_xlabel("Red, grey levels", fontsize=plots.LABEL)
    cloud.set_ylabel("Green, grey levels", fontsize=plots.LABEL)
    cloud.set_xticks([0, 100, 200])
    cloud.set_yticks([0, 100, 200])
    cloud.tick_params(labelsize=plots.SMALL)
    cloud.legend(fontsize=plots.SMALL, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.1), borderpad=0)

    side, pitch, left, top = 0.8, 1.04, 3.15, 4.2  # inches
    for row, (kind, shifts, noisy) in enumerate(rows):
        for column in range(draws + 1):
            x, y = left + column * pitch + 0.1 * (column > 0), top - (row + 1) * side - row * 0.26
            ax = figure.add_axes((x / width, y / height, side / width, side / height), xticks=[], yticks=[])
            ax.imshow(image if column == 0 else np.clip(noisy[column - 1], 0, 1), interpolation="nearest")
            ax.spines[:].set(color=PALE, linewidth=0.6)
            text = kind if column == 0 else _levels(shifts[column - 1])
            ax.set_xlabel(text, fontsize=plots.SMALL if column == 0 else 7, labelpad=2)
            if row == 0:
                ax.set_title("original" if column == 0 else f"draw {column}", fontsize=plots.SMALL, pad=3)
    return figure


def _signed(basis: PcaBasis) -> PcaBasis:
    """The basis with the largest entry of each eigenvector positive: which sign they have, depends on the machine."""
    vectors = basis.eigenvectors
    largest = np.take_along_axis(vectors, abs(vectors).argmax(axis=0, keepdims=True), axis=0)
    return PcaBasis(basis.mean, basis.eigenvalues, vectors * np.sign(largest))


def pooling() -> Figure:
    """Which windows see a pixel, overlapping or not, and what either makes of a map."""
    figure = Figure(figsize=(plots.WIDTH, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=[1.35, 1])
    for column, (window, name) in enumerate(
        ((3, "3 x 3 windows, 2 apart: overlapping"), (2, "2 x 2 windows, 2 apart"))
    ):
        ax = figure.add_subplot(grid[0, 3 * column : 3 * column + 3])
        seen = _windows_that_see(8, window)
        ax.imshow(seen, cmap="Greys", vmin=0, vmax=12)
        for row, line in enumerate(seen):
            for place, count in enumerate(line):
                ax.text(place, row, f"{count:g}", ha="center", va="center", fontsize=plots.SMALL, color=INK)
        for place, colour in ((2, BLUE), (4, VERMILION)):
            corner = (place - 0.5, 1.5)
            ax.add_patch(Rectangle(corner, window, window, facecolor=colour, alpha=0.25, linewidth=0))
            ax.add_patch(Rectangle(corner, window, window, fill=False, edgecolor=colour, linewidth=1.8))
        if window == 3:  # the last windows hang over the edge
            ax.add_patch(Rectangle((5.5, 5.5), 3, 3, fill=False, edgecolor=INK, linewidth=1.2, linestyle="--"))
        ax.set(xlim=(-0.7, 8.7), ylim=(8.7, -0.7), xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_title(name, fontsize=plots.TITLE)

    image = shapes.load(train=100, validation=0, test=0)["train"].images[0].mean(axis=-1)
    edges = np.hypot(*np.gradient(image)).astype(np.float32)
    maps = [("A map of edges, 32 x 32", edges)]
    for window in (3, 2):
        pooled = max_pool(jnp.asarray(edges)[None, :, :, None], window)[0, :, :, 0]
        height, width = pooled.shape
        maps.append((f"{window} x {window} / 2: {height} x {width}", np.asarray(pooled)))
    for column, (name, values) in enumerate(maps):
        ax = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
        ax.imshow(values, cmap="viridis", vmin=0, vmax=edges.max(), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_title(name, fontsize=plots.TITLE)
    return figure


def _windows_that_see(size: int, window: int) -> np.ndarray:
    """How many pooling windows contain each pixel, [size, size]: pools maps with one bright pixel each."""
    one_bright = jnp.eye(size * size).reshape(-1, size, size, 1)
    return np.asarray(max_pool(one_bright, window).sum(axis=(1, 2, 3)).reshape(size, size))


def data_parallelism() -> Figure:
    """One training step on four devices, from the batch to equal parameters."""
    devices, batch_size = 4, 8
    split = shapes.load(train=100, validation=0, test=0)["train"]
    layout = batches(np.arange(batch_size), batch_size, devices)
    colours = (BLUE, VERMILION, GREEN, PURPLE)
    width, height = plots.WIDTH, 4.7
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    left, pitch, box = 1.15, 1.6, 1.5  # inches: of the first device, between two, a device's width

    for y, label in (
        (4.05, "one batch,\nsplit by place"),
        (2.83, "each device\nalone"),
        (1.55, "all together"),
        (0.6, "each device,\nthe same"),
    ):
        ax.text(0.08, y, label, fontsize=plots.LABEL, color=INK, va="center")
    for device, colour in enumerate(colours):
        x = left + device * pitch
        places = np.arange(batch_size).reshape(devices, -1)[device]
        for i, index in enumerate(layout.indices[device, 0]):
            corner = (x + 0.1 + 0.7 * i, 3.75)
            tile = figure.add_axes((corner[0] / width, corner[1] / height, 0.6 / width, 0.6 / height))
            tile.imshow(split.images[index], interpolation="nearest")
            tile.set(xticks=[], yticks=[])
            tile.spines[:].set(color=colour, linewidth=2)
            ax.text(corner[0] + 0.3, 4.45, f"place {places[i]}", fontsize=plots.SMALL, color=INK, ha="center")
        _arrow(ax, (x + box / 2, 3.7), (x + box / 2, 3.5), colour)
        _box(ax, (x, 2.15), box, 1.35, colour)
        lines = ["state, data: copies", "keys of its places", "crops, noise, dropout", "forward, backward"]
        ax.text(x + box / 2, 3.4, f"device {device}", fontsize=plots.LABEL, ha="center", va="top", color=colour)
        text = "\n".join(lines)
        ax.text(x + box / 2, 3.19, text, fontsize=plots.SMALL, ha="center", va="top", color=INK, linespacing=1.4)
        ax.text(x + box / 2, 2.25, f"gradient $g_{device}$", fontsize=plots.LABEL, ha="center", color=INK)
        _arrow(ax, (x + box / 2, 2.15), (x + box / 2, 1.82), colour)
        _arrow(ax, (x + box / 2, 1.28), (x + box / 2, 0.95), INK)
        _box(ax, (x, 0.25), box, 0.7, colour)
        text = "same gradient,\nsame update,\nsame parameters"
        ax.text(x + box / 2, 0.6, text, fontsize=plots.SMALL, ha="center", va="center", color=INK)
    _box(ax, (left, 1.28), (devices - 1) * pitch + box, 0.54, INK)
    middle = left + ((devices - 1) * pitch + box) / 2
    total = " + ".join(f"$g_{device}$" for device in range(devices))
    text = f"psum: $g$ = {total}   (and the sums of losses, of right answers, of examples)"
    ax.text(middle, 1.55, text, fontsize=plots.LABEL, ha="center", va="center", color=INK)
    return figure


def augmentation() -> Figure:
    """One drawn image as eight epochs show it, with random flips, alternating flips and cutout."""
    split = shapes.load(train=500, validation=0, test=0)["train"]
    image, statistics = split.images[:1], Statistics.of(split.images)
    rows = {
        "random": AugmentationConfig(flip=True),
        "alternating": AugmentationConfig(flip=True, flip_schedule="alternating"),
        "with cutout": AugmentationConfig(flip=True, flip_schedule="alternating", cutout=8),
    }
    epochs = 8
    figure = Figure(figsize=(plots.WIDTH, 2.9), layout="constrained")
    axes = figure.subplots(len(rows), epochs)
    for line, (name, config) in zip(axes, rows.items(), strict=True):
        preprocessing = Preprocessing(config, statistics, steps_per_epoch=1)
        for epoch, ax in enumerate(line):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(2), epoch), (1, 6))
            ax.imshow(np.asarray(preprocessing.training(keys, image, jnp.int32(epoch)))[0], interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if line is axes[0]:
                ax.set_title(f"epoch {epoch + 1}", fontsize=plots.LABEL)
        line[0].set_ylabel(name, fontsize=plots.SMALL)
    return figure


def _levels(shift: np.ndarray) -> str:
    """The RGB shift [3] in grey levels, with as many digits after the point as its size asks for."""
    largest = float(np.abs(shift).max())
    digits = 2 if largest < 1 else 1 if largest < 10 else 0
    text = " ".join(f"{level:+.{digits}f}" for level in shift)
    return text.replace("-", "\N{MINUS SIGN}")


def _box(ax: Axes, corner: tuple[float, float], width: float, height: float, colour: str) -> None:
    ax.add_patch(Rectangle(corner, width, height, facecolor="white", edgecolor=colour, linewidth=1.5))


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=colour, shrinkA=0, shrinkB=0))


PICTURES: dict[str, Callable[[], Figure]] = {
    "lrn.png": lrn,
    "pca_noise.png": pca_noise,
    "pooling.png": pooling,
    "data_parallelism.png": data_parallelism,
    "augmentation.png": augmentation,
}


def main(folder: pathlib.Path = IMAGES) -> None:
    """Draws every figure into the folder."""
    for name, draw in PICTURES.items():
        save(draw(), folder / name)


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a PNG of 256 colours: a third of the bytes of `plots.save`, and to the eye the same."""
    png, small = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=plots.DPI)
    full = Image.open(png)
    versions = PngImagePlugin.PngInfo()
    versions.add_text("Software", full.info["Software"])  # matplotlib's version, on which letters and lines depend
    indexed = full.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    colours = indexed.getpalette() or []
    white = 3 * int(np.asarray(indexed)[0, 0])
    colours[white : white + 3] = [255] * 3  # the choice of colours makes the paper a little grey
    indexed.putpalette(colours)
    indexed.save(small, format="PNG", optimize=True, pnginfo=versions)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, small.getvalue())


if __name__ == "__main__":
    main()
