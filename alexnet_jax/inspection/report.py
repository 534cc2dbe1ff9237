"""`eval.py --report`: an evaluation as one HTML page that works offline.

Jinja2 fills the template, because it escapes every name and setting; plotly draws the curves, because its zoom works
with a mouse and on touch screens. Plotly's script has 4.8 MB; the page contains it as 2 MB of compressed text, which
the browser decompresses. (No Python package contains Plotly's basic bundle, 1.2 MB.)
"""

import base64
import gzip
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jinja2
import matplotlib
import numpy as np
import PIL.Image
import plotly.graph_objects as go
import plotly.offline

from alexnet_jax import plots
from alexnet_jax.config.flags import flag, flat_items
from alexnet_jax.inspection import activations
from alexnet_jax.inspection.scores import accuracy_interval, calibration
from alexnet_jax.inspection.task import Evaluation
from alexnet_jax.training.predict import softmax

LARGEST_TABLE = 30  # classes; for more, the most frequent confusions are listed instead of a matrix
MOST_LISTED = 100  # confusions in that list
MOST_IN_CELL = 24  # images of a cell of the matrix
MOST_TILES = 2_400  # images of all cells
MISTAKES = 24  # images under "Most confident mistakes"
MOST_WITH_MAPS = 10  # images with feature maps; fewer for large networks
MOST_MAP_PIXELS = 4_000_000  # of all feature maps
LARGEST_TILE = 64  # pixels; larger images are scaled down
BLUE, ORANGE, GREY = plots.TRAIN, plots.VALIDATION, "#888888"


def page(evaluation: Evaluation, records: Sequence[Mapping[str, Any]]) -> str:
    """The report, as HTML, on an evaluation and the lines of its run's metrics.jsonl."""
    run, results = evaluation.task.run, evaluation.results
    probabilities = softmax(evaluation.logits)
    layers, inside = feature_maps(evaluation)
    shown = confusions(evaluation, probabilities)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alexnet_jax.inspection", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda value, digits=2: "-" if value is None else f"{100 * value:.{digits}f}%"
    return environment.get_template("report.html.jinja").render(
        plotly=base64.b64encode(gzip.compress(plotly.offline.get_plotlyjs().encode(), mtime=0)).decode(),
        name=run.folder.path.absolute().name,
        results=results,
        interval=accuracy_interval(results["correct"], results["count"]),
        epochs=run.step / run.steps_per_epoch,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        network=type(run.model).__name__,
        figures={"curves": _curves(records), "calibration": _calibration(evaluation, probabilities)},
        classes=_classes(results),
        confusions=shown,
        shown={key: value for key, value in shown.items() if key not in ("matrix", "totals", "pairs", "in_cell")},
        all_classes=len(results["per_class"]),
        kernels=_kernels(run.params["conv1"]["kernel"]),
        layers=layers,
        inside=inside,
        maps=[{"label": example["label"], "maps": example["maps"]} for example in inside],
        settings=[(flag(key), value) for key, value in flat_items(run.config).items()],
        dataset=run.dataset,
    )


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Loss, accuracy, learning rate and speed, in four diagrams with one axis of steps."""
    lines = plots.by_split(records)
    figure = go.Figure()
    rows = ("loss", "accuracy", "learning_rate", "images_per_second")
    for split, color, label in (("train", BLUE, "training, dropout on"), ("validation", ORANGE, "validation")):
        ordered = lines[split]
        for row, key in enumerate(rows, start=1):
            values = [record.get(key) for record in ordered]
            if not any(isinstance(value, int | float) for value in values):
                continue
            epochs = [f"epoch {record['epoch'] + 1}" if "epoch" in record else "" for record in ordered]
            figure.add_scatter(
                x=[record["step"] for record in ordered],
                y=[value if value is not None and math.isfinite(value) else None for value in values],
                text=epochs,
                hovertemplate="step %{x:,} %{text}: %{y:.4g}",
                name=label,
                legendgroup=split,
                showlegend=row == 1,
                mode="lines+markers" if len(values) <= 100 else "lines",
                line={"color": color if row <= 2 else GREY, "width": 1.5},
                marker={"size": 4},
                yaxis=f"y{row}" if row > 1 else "y",
            )
    titles = ("cross entropy (nats)", "accuracy", "learning rate", "images/s")
    domains = ((0.68, 1.0), (0.34, 0.64), (0.18, 0.30), (0.0, 0.13))
    for row, (title, domain) in enumerate(zip(titles, domains, strict=True), start=1):
        axis: dict[str, Any] = {"title": {"text": title}, "domain": domain, "rangemode": "tozero", "automargin": True}
        if row == 2:
            axis |= {"tickformat": ".0%"}
        elif row > 2:
            axis |= {"nticks": 4}
        figure.update_layout({f"yaxis{row}" if row > 1 else "yaxis": axis})
    figure.update_layout(
        xaxis={"title": {"text": "step"}, "anchor": "y4", "rangemode": "tozero"},
        height=760,
        hovermode="x",
        legend={"orientation": "h", "y": 1.06, "x": 0},
        margin={"l": 60, "r": 16, "t": 40, "b": 48},
    )
    return _as_json(figure)


def _calibration(evaluation: Evaluation, probabilities: np.ndarray) -> dict[str, Any]:
    """Reliability diagram: accuracy against the largest probability, above a histogram of the latter."""
    found = calibration(probabilities.max(axis=1), evaluation.logits.argmax(axis=1) == evaluation.labels)
    bins = len(found.count)
    centres = (np.arange(bins) + 0.5) / bins
    some = found.count > 0
    figure = go.Figure()
    figure.add_bar(
        x=centres[some].tolist(),
        y=found.accuracy[some].tolist(),
        width=1 / bins,
        name="accuracy",
        marker={"color": BLUE, "line": {"width": 1, "color": "rgba(128,128,128,0.5)"}},
        customdata=found.count[some].tolist(),
        hovertemplate="%{customdata:,} images, %{y:.1%} correct",
    )
    figure.add_scatter(
        x=found.confidence[some].tolist(),
        y=found.accuracy[some].tolist(),
        mode="markers",
        name="mean probability",
        marker={"color": ORANGE, "size": 8},
        hovertemplate="probability %{x:.1%}, %{y:.1%} correct",
    )
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="calibrated", line={"dash": "dash", "color": GREY}, hoverinfo="skip"
    )
    figure.add_bar(
        x=centres[some].tolist(),
        y=(found.count[some] / found.count.sum()).tolist(),
        width=1 / bins,
        name="images",
        marker={"color": GREY},
        yaxis="y2",
        showlegend=False,
        hovertemplate="%{y:.1%} of the images",
    )
    figure.update_layout(
        xaxis={"title": {"text": "largest probability"}, "range": [0, 1], "tickformat": ".0%", "anchor": "y2"},
        yaxis={"title": {"text": "accuracy"}, "range": [0, 1], "tickformat": ".0%", "domain": [0.32, 1]},
        yaxis2={"title": {"text": "images"}, "tickformat": ".0%", "domain": [0, 0.22], "nticks": 3},
        height=460,
        barmode="overlay",
        legend={"orientation": "h", "y": 1.1, "x": 0},
        margin={"l": 60, "r": 16, "t": 40, "b": 48},
    )
    return _as_json(figure)


def _as_json(figure: go.Figure) -> dict[str, Any]:
    """Data and layout without plotly's own theme, because the page has a light and a dark one."""
    figure.update_layout(
        template={}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 12}, dragmode="zoom"
    )
    figure.update_xaxes(title_font_size=13)
    figure.update_yaxes(title_font_size=13)
    content: dict[str, Any] = json.loads(figure.to_json())
    return content


def _classes(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Scores of the classes, highest F1 first; of more than `LARGEST_TABLE` classes, only the best and the worst."""
    rows = sorted((row for row in results["per_class"] if row["count"]), key=lambda row: -row["f1"])
    return rows if len(rows) <= LARGEST_TABLE else rows[: LARGEST_TABLE // 2] + rows[-LARGEST_TABLE // 2 :]


def confusions(evaluation: Evaluation, probabilities: np.ndarray) -> dict[str, Any]:
    """Counts of the confusions, and the images behind them.

    Returns:
      `names`: of the classes; `matrix`: the counts, or None if there are too many classes; `pairs`: [true, predicted,
      count] of every confusion that has images here, the most frequent first; `in_cell`: the largest number of them;
      `mistakes`: places of the most confident ones in `tiles`; `tiles`: [index, true, predicted, probability] of
      each image shown; by "true,predicted" `cells`, places in `tiles`, and `counts`, the number of images;
      `sheet`, `side`, `columns`: the images as one JPEG, whose tiles are in that order.
    """
    labels, predicted = evaluation.labels, evaluation.logits.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    matrix = np.array(evaluation.results["confusion"])
    classes = len(matrix)
    listed = classes > LARGEST_TABLE
    ranked = matrix - np.diag(matrix.diagonal()) if listed else matrix
    order = np.argsort(-ranked, axis=None, kind="stable")[: MOST_LISTED if listed else None]
    pairs = [(int(i // classes), int(i % classes)) for i in order if ranked.flat[i]]
    in_cell = max(1, min(MOST_IN_CELL, MOST_TILES // max(len(pairs), 1)))
    places: dict[int, int] = {}  # of an image in the sheet, by its index in the split
    cells: dict[str, list[int]] = {}
    for true, guess in pairs:
        members = np.flatnonzero((labels == true) & (predicted == guess))
        most_confident = members[np.argsort(-confidence[members], kind="stable")][:in_cell]
        cells[f"{true},{guess}"] = [places.setdefault(int(index), len(places)) for index in most_confident]
    most_confident = activations.confident_mistakes(confidence, predicted == labels, MISTAKES)
    mistakes = [places.setdefault(int(index), len(places)) for index in most_confident]
    sheet, side, columns = _sheet(evaluation, list(places))
    return {
        "names": list(evaluation.task.run.class_names),
        "matrix": None if listed else matrix.tolist(),
        "totals": matrix.sum(axis=1).tolist(),
        "pairs": [(true, guess, int(matrix[true, guess])) for true, guess in pairs],
        "mistakes": mistakes,
        "in_cell": in_cell,
        "tiles": [(i, int(labels[i]), int(predicted[i]), round(float(confidence[i]), 4)) for i in places],
        "cells": cells,
        "counts": {f"{true},{guess}": int(matrix[true, guess]) for true, guess in pairs},
        "sheet": sheet,
        "side": side,
        "columns": columns,
    }


def _sheet(evaluation: Evaluation, indices: Sequence[int]) -> tuple[str, int, int]:
    """Images of the split as the tiles of one JPEG: its data URI, their side in pixels, and the number in a row."""
    side = min(evaluation.task.run.dataset.image_shape[0], LARGEST_TILE)
    columns = max(1, math.ceil(math.sqrt(len(indices))))
    sheet = PIL.Image.new("RGB", (columns * side, max(1, -(-len(indices) // columns)) * side))
    task = evaluation.task
    for first in range(0, len(indices), 100):  # large images don't all fit into memory
        part = np.array(indices[first : first + 100])
        for place, pixels in enumerate(task.dataset.examples(task.split, part).images, start=first):
            tile = PIL.Image.fromarray(pixels)
            row, column = divmod(place, columns)
            sheet.paste(tile if tile.width == side else tile.resize((side, side)), (column * side, row * side))
    return data_uri(sheet, "JPEG", quality=90, subsampling=0), side, columns


def _kernels(kernel: np.ndarray) -> dict[str, Any]:
    """The first layer's kernels as an image, and how many are selective."""
    measured = activations.selectivity(kernel)
    colour, orientation = activations.selectivity_of_noise(kernel.shape[0])
    tiles, _ = plots.kernel_tiles(kernel)
    opaque = np.ones_like(tiles[..., :1])
    image = np.nan_to_num(plots.mosaic(np.concatenate([tiles, opaque], axis=-1)))  # transparent between the tiles
    return {
        "image": data_uri(PIL.Image.fromarray(np.round(255 * image).astype(np.uint8))),
        "count": len(measured.colour),
        "size": "x".join(map(str, kernel.shape[:2])),
        "colour": int((measured.colour > colour).sum()),
        "oriented": int((measured.orientation > orientation).sum()),
    }


def feature_maps(evaluation: Evaluation) -> tuple[list[str], list[dict[str, Any]]]:
    """The feature maps in every layer for the first image of each of up to ten classes.

    Returns:
      The layers' names; for each image `image`, `label`, `predicted` and `maps`, one of `map_image` for each layer.
    """
    run, dataset, split = evaluation.task.run, evaluation.task.dataset, evaluation.task.split
    _, first = np.unique(evaluation.labels, return_index=True)
    chosen = np.sort(first[:MOST_WITH_MAPS])
    one = activations.activations(run, dataset.examples(split, chosen[:1]).images)
    layers = [name for name, values in one.items() if values.ndim == 4]
    chosen = chosen[: max(1, MOST_MAP_PIXELS // sum(one[name].size for name in layers))]
    examples = dataset.examples(split, chosen)
    found = activations.activations(run, examples.images, layers)
    logits = evaluation.logits[chosen]
    return layers, [
        {
            "image": data_uri(PIL.Image.fromarray(examples.images[i])),
            "label": run.class_names[examples.labels[i]],
            "predicted": run.class_names[logits[i].argmax()],
            "maps": [map_image(found[name][i]) for name in layers],
        }
        for i in range(len(chosen))
    ]


def map_image(maps: np.ndarray) -> dict[str, Any]:
    """Maps [H, W, C] of one image as a PNG with a palette, dark to yellow from the least to the 99.5th percentile."""
    low, percentile, largest = float(maps.min()), float(np.percentile(maps, 99.5)), float(maps.max())
    high = percentile if percentile > low else largest  # almost all units have the smallest value
    scaled = np.clip((maps - low) / max(high - low, 1e-12), 0, 1)
    grid = plots.mosaic(np.moveaxis(scaled, -1, 0)[..., None])[..., 0]
    image = PIL.Image.fromarray(np.round(np.nan_to_num(254 * grid, nan=255)).astype(np.uint8))
    colours = (255 * matplotlib.colormaps["viridis"](np.linspace(0, 1, 255))[:, :3]).astype(np.uint8)
    image.putpalette([*colours.ravel().tolist(), 0, 0, 0])  # the last colour is transparent
    return {
        "image": data_uri(image, transparency=255),
        "size": f"{maps.shape[2]} of {maps.shape[0]}x{maps.shape[1]}",
        "range": f"{low:.3g} to {largest:.3g}",
    }


def data_uri(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> str:
    """An image as a data URI; `options` are those of Pillow's format."""
    data = io.BytesIO()
    # Pillow optimizes a JPEG in a buffer of one byte per pixel, which is too small for images of noise.
    image.save(data, kind, optimize=kind == "PNG", **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
