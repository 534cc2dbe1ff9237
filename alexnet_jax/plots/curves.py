"""Training and validation curves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter, StrMethodFormatter

from alexnet_jax.plots.arrays import nan_unless_finite
from alexnet_jax.plots.style import INK, LABEL, RUNS, SMALL, TRAIN, VALIDATION, WIDTH, style
from alexnet_jax.plots.text import escaped, shortened

Record = Mapping[str, Any]


def by_split(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The lines of `metrics.jsonl` of "train" and of "validation", sorted by step.

    If a split has two lines for a step, as after a resume, the later one counts.
    """
    found: dict[str, dict[int, Record]] = {"train": {}, "validation": {}}
    for record in records:
        found[record["split"]][record["step"]] = record
    return {split: [of_step[step] for step in sorted(of_step)] for split, of_step in found.items()}


def training_curves(records: Iterable[Record]) -> Figure:
    """Draws loss, accuracy and, if recorded, the learning rate against the training step.

    Values that are not finite are gaps, and the legend counts them. The loss axis is logarithmic if the largest value,
    such as the first one, would otherwise flatten the rest. A second axis counts completed epochs, if there are at
    least two.

    Args:
      records: the lines of `metrics.jsonl`: mappings with `step` (updates made), `epoch` (index from 0 of the epoch
        that the last update belongs to), `split` ("train" or "validation"), `loss` (mean cross entropy in nats),
        `accuracy` (in [0, 1]) and, for "train", `learning_rate`.
    """
    train, validation = by_split(records).values()
    rates = _values(train, "learning_rate")
    has_rate = bool(np.isfinite(rates).any())

    figure = Figure(figsize=(6.5, 6.5 if has_rate else 5.5), layout="constrained")
    axes = figure.subplots(2 + has_rate, sharex=True, height_ratios=[3, 3, 1.2][: 2 + has_rate])
    loss, accuracy = axes[:2]
    for ax, key in ((loss, "loss"), (accuracy, "accuracy")):
        _curve(ax, train, key, "Train (dropout on)", TRAIN)
        _curve(ax, validation, key, "Validation", VALIDATION)
    _mark_best(accuracy, validation)

    losses = _values([*train, *validation], "loss")
    losses = losses[np.isfinite(losses)]
    if losses.size and losses.max() > 10 * np.median(losses) > 0:
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        loss.minorticks_off()
    else:
        loss.set_ylim(bottom=0)
    loss.set_ylabel("Cross entropy (nats)", fontsize=LABEL)
    accuracy.set_ylabel("Accuracy", fontsize=LABEL)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    if has_rate:
        _curve(axes[2], train, "learning_rate", "", INK)
        axes[2].set_ylabel("Learning rate", fontsize=LABEL)
        if np.nanmin(rates) > 0:
            axes[2].set_yscale("log")
            axes[2].set_ylim(np.nanmin(rates) / 10**0.5, np.nanmax(rates) * 10**0.5)  # contains a power of ten to label
            axes[2].minorticks_off()

    for ax in axes:
        style(ax)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=SMALL, frameon=False)
    figure.align_ylabels(axes)
    axes[-1].set_xlabel("Step", fontsize=LABEL)
    axes[-1].set_xlim(left=0)
    axes[-1].xaxis.set_major_locator(_whole_numbers())
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _epochs_above(loss, [*train, *validation])
    return figure


def compared_curves(records: Mapping[str, Iterable[Record]], steps_per_epoch: Mapping[str, int]) -> Figure:
    """Draws loss and accuracy of several runs against the epoch: validation in solid lines, training in dashed ones.

    Both arguments are dicts by the run's name: the lines of its `metrics.jsonl`, and its steps per epoch, which differ
    if batch sizes differ.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    legend: list[tuple[Line2D, str]] = []
    for number, (name, lines) in enumerate(records.items()):
        color, marker = RUNS[number % len(RUNS)], "os^vDPX"[number // len(RUNS) % 7]
        for split, ordered in by_split(lines).items():
            epochs = [record["step"] / steps_per_epoch[name] for record in ordered]
            dashes = "--" if split == "train" else "-"
            width, dot = (0.8, "") if split == "train" else (1.6, marker)
            for ax, key in zip(axes, ("loss", "accuracy"), strict=True):
                ax.plot(epochs, _values(ordered, key), dashes, color=color, linewidth=width, marker=dot, markersize=2.5)
        legend.append((Line2D([], [], color=color, marker=marker, markersize=4), escaped(shortened(name))))
    legend.append((Line2D([], [], color=INK, linewidth=1.6), "validation"))
    legend.append((Line2D([], [], color=INK, linewidth=0.8, linestyle="--"), "training, dropout on"))
    for ax, label in zip(axes, ("Cross entropy (nats)", "Accuracy"), strict=True):
        style(ax)
        ax.set_xlabel("Epoch", fontsize=LABEL)
        ax.set_ylabel(label, fontsize=LABEL)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(_whole_numbers())
    axes[0].set_ylim(bottom=0)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, labels = zip(*legend, strict=True)
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=SMALL, frameon=False)
    return figure


def _values(records: Sequence[Record], key: str) -> np.ndarray:
    """The values of one key, float [N], with NaN where a record lacks it or has none (JSON's null)."""
    return nan_unless_finite([record.get(key) for record in records])


def _curve(ax: Axes, records: Sequence[Record], key: str, label: str, color: str) -> None:
    """Draws one key of one split against the step."""
    if not records:
        return
    values = _values(records, key)
    not_finite = int(np.isnan(values).sum())
    if not_finite and label:
        label += f", {not_finite} of {len(values)} not finite"
    few = len(values) <= 100  # without markers, an isolated point would be invisible
    x = [record["step"] for record in records]
    ax.plot(x, values, color=color, label=label, linewidth=1.2, marker="o" if few else "", markersize=2.5)


def _mark_best(ax: Axes, validation: Sequence[Record]) -> None:
    """Marks the best validation accuracy (the first of equals) with a star; its label is in the legend."""
    accuracies = _values(validation, "accuracy")
    if np.isnan(accuracies).all():
        return
    best = validation[int(np.nanargmax(accuracies))]
    label = f"Best validation: {best['accuracy']:.1%}, step {best['step']:,}"
    ax.plot(best["step"], best["accuracy"], "*", color=VALIDATION, markeredgecolor="black", markersize=10, label=label)


def _epochs_above(ax: Axes, records: Sequence[Record]) -> None:
    """Adds an axis of completed epochs above, if the records reach the second epoch."""
    records = [record for record in records if "epoch" in record]
    if not any(record["epoch"] for record in records):
        return
    # No record is beyond the end of its epoch, and the training loop writes one at the end: there the bound is exact.
    steps_per_epoch = max(record["step"] / (record["epoch"] + 1) for record in records)
    above = ax.secondary_xaxis("top", functions=(lambda x: x / steps_per_epoch, lambda x: x * steps_per_epoch))
    above.set_xlabel("Epoch", fontsize=LABEL)
    above.xaxis.set_major_locator(_whole_numbers())
    above.tick_params(labelsize=SMALL)


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])
