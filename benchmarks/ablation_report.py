"""From finished runs to means, intervals, paired differences, Markdown tables and a plot."""

import pathlib
import re
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from report import markdown
from studies import Study, Variant

from alexnet_jax import plots

Row = dict[str, Any]
MINUS = "\N{MINUS SIGN}"
FAR = 0.15  # a difference reported in words
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito's colour-blind safe set
LINES = ("-", "--", ":")  # when the colours are used up


class Estimate(NamedTuple):
    """A mean over runs with its 95% confidence interval, mean - half to mean + half.

    Attributes:
      mean: mean of the values.
      half: half the interval's width, from Student's t with n - 1 degrees of freedom; None for a single value.
      runs: number of values n.
    """

    mean: float
    half: float | None
    runs: int

    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0; False for a single value."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval of at least one value."""
    runs, half = len(values), None
    if runs > 1:
        half = float(scipy.stats.t.ppf(0.975, runs - 1)) * statistics.stdev(values) / runs**0.5
    return Estimate(statistics.mean(values), half, runs)


def by_seed(rows: Sequence[Row], variant: Variant, views: int) -> dict[int, float]:
    """Test accuracy of each of a row's runs that was tested with so many views."""
    tests = {row["seed"]: row["test"] for row in rows if row["variant"] == variant.name}
    return {seed: test[str(views)]["accuracy"] for seed, test in tests.items() if str(views) in test}


def paired_difference(rows: Sequence[Row], variant: Variant, base: Variant, views: int) -> Estimate | None:
    """Test accuracy minus that of the base, seed by seed; None if they have no seed in common."""
    own, other = by_seed(rows, variant, views), by_seed(rows, base, views)
    shared = sorted(own.keys() & other.keys())
    return estimate([own[seed] - other[seed] for seed in shared]) if shared else None


def epochs_until(row: Row, key: str, target: float) -> tuple[int, float] | None:
    """Epochs and seconds of training until an epoch's `key` first reaches `target`; None if it never does."""
    seconds = 0.0
    for number, epoch in enumerate(row["curve"], start=1):
        seconds += epoch["seconds"]
        if epoch[key] is not None and epoch[key] >= target:
            return number, seconds
    return None


def tables(study: Study, rows: Sequence[Row]) -> str:
    """Everything as Markdown, for the terminal and for docs/results.md."""
    variants = present(study, rows)
    parts = [heading(study, rows), accuracy_table(study, variants, rows)]
    parts += [until_table(study, variants, rows)] if study.until else []
    several = len(variants) > 1
    added = ", and the flags that each row adds to it" if several else ""
    parts.append(f"The command for seed 0{added}:\n\n```\n{command(study, variants, rows)}\n```")
    parts += [flags_table(variants)] if several else []
    if study.published:
        parts.append(f"Published: {study.published}.")
    return "\n\n".join(parts)


def present(study: Study, rows: Sequence[Row]) -> list[Variant]:
    """The study's rows that have a finished run."""
    names = {row["variant"] for row in rows}
    return [variant for variant in study.variants if variant.name in names]


def question(study: Study, rows: Sequence[Row]) -> str:
    """The study's question, and the number of epochs if it is the same for all rows."""
    epochs = {row["settings"].get("epochs") for row in rows}
    return study.question + (f" ({epochs.pop()} epochs)" if len(epochs) == 1 else "")


def heading(study: Study, rows: Sequence[Row]) -> str:
    """The question, machines, versions, data, and how to read the intervals."""
    devices = {_device(row) for row in rows}
    versions = {f"Python {row['versions']['python']}, JAX {row['versions']['jax']}" for row in rows}
    data = {f"{row['data']['source']} ({row['data']['fingerprint']})" for row in rows}
    counts = {row["test"][str(study.views[0])]["count"] for row in rows}
    images = ", ".join(f"{count:,}" for count in sorted(counts))
    where = "; ".join(", ".join(sorted(found)) for found in (devices, versions, data))
    return (
        f"{question(study, rows)} Measured on {where}, {images} test images. Means with 95% intervals "
        "(Student's t over seeds)."
    )


def _device(row: Row) -> str:
    device, beside = row["device"], row["side_by_side"]
    cores = f", {device['cores']} core{'s' * (device['cores'] > 1)}" if device["platform"] == "cpu" else ""
    return f"{device['name']}{cores}" + (f", {beside} runs side by side" if beside > 1 else "")


def accuracy_table(study: Study, variants: Sequence[Variant], rows: Sequence[Row]) -> str:
    """Test accuracies, and differences from the first row."""
    base = study.variants[0]
    several = len(variants) > 1
    head = ["row", *(f"test accuracy, {n} view{'s' * (n > 1)}" for n in study.views)]
    of_views = "" if len(study.views) == 1 else f", {study.views[-1]} views"
    head += [f"against {base.name}, seed by seed{of_views}"] if several else []
    lines = []
    for variant in variants:
        accuracies = [list(by_seed(rows, variant, views).values()) for views in study.views]
        cells = [variant.name, *(share(estimate(values)) if values else "" for values in accuracies)]
        if several:
            difference = None if variant is base else paired_difference(rows, variant, base, study.views[-1])
            cells.append("" if difference is None else verdict(difference))
        lines.append([*cells, str(len(accuracies[0]))])
    return markdown([*head, "seeds"], lines)


def until_table(study: Study, variants: Sequence[Variant], rows: Sequence[Row]) -> str:
    """Epochs and seconds to the study's targets."""
    assert study.until
    key, targets = study.until
    named = {"accuracy": "training accuracy", "validation_accuracy": "validation accuracy"}[key]
    lines = []
    for variant in variants:
        runs = [row for row in rows if row["variant"] == variant.name]
        for target in targets:
            reached = [found for row in runs if (found := epochs_until(row, key, target))]
            cells = [variant.name, f"{target:.2%}", f"{len(reached)} of {len(runs)}"]
            epochs = sorted(count for count, _ in reached)
            seconds = sorted(duration for _, duration in reached)
            if reached:
                cells.append(f"{statistics.median(epochs):g} ({epochs[0]} to {epochs[-1]})")
                cells.append(f"{statistics.median(seconds):.0f} ({seconds[0]:.0f} to {seconds[-1]:.0f})")
            lines.append([*cells, "", ""][:5])
    return markdown(["row", named, "runs that reach it", "epochs, median (range)", "seconds"], lines)


def share(estimate: Estimate) -> str:
    """An accuracy in percent."""
    half = "" if estimate.half is None else f" ± {100 * estimate.half:.2f}"
    return f"{100 * estimate.mean:.2f}%{half}"


def verdict(difference: Estimate) -> str:
    """A difference in percentage points, and whether it is more than noise."""
    sign = MINUS if difference.mean < 0 else "+"
    text = f"{sign}{abs(100 * difference.mean):.2f}"
    if difference.half is None:
        return f"{text} (one pair)"
    return f"{text} ± {100 * difference.half:.2f}" + ("" if difference.excludes_zero() else ", inside the noise")


def command(study: Study, variants: Sequence[Variant], rows: Sequence[Row]) -> str:
    """Shell command of a run of the first row; with several rows, without the flags of that row alone."""
    first = variants[0]
    run = min((row for row in rows if row["variant"] == first.name), key=lambda row: row["seed"])
    train = run["command"]
    if len(variants) > 1 and first.flags:
        train = train.replace(" " + " ".join(first.flags), "", 1)
    folder = "runs/" + re.sub(r"[^a-z0-9]+", "-", first.name.lower())
    views = "" if study.views[-1] == 1 else f" --views {study.views[-1]}"
    words = re.sub(r"(--\S+) (?!--)", "\\1\0", f"{train} --workdir {folder}")  # a flag and its value stay on one line
    lines = textwrap.wrap(words, 84, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join([*lines, f"&& python eval.py {folder}{views}"]).replace("\0", " ")


def flags_table(variants: Sequence[Variant]) -> str:
    """The flags that each row adds to the command."""
    return markdown(["row", "flags"], [[v.name, f"`{' '.join(v.flags)}`" if v.flags else "none"] for v in variants])


def draw(study: Study, rows: Sequence[Row], path: pathlib.Path) -> bool:
    """Draws the differences from the first row or the runs' curves, as the study requires; False if there are none."""
    variants = present(study, rows)
    if not study.curves and (len(variants) < 2 or variants[0] is not study.variants[0]):
        return False
    figure = Figure(
        figsize=(plots.WIDTH, 1.3 + 0.32 * len(variants) if not study.curves else 4.0), layout="constrained"
    )
    axes = figure.subplots()
    if study.curves:
        _draw_curves(axes, study, variants, rows)
    else:
        _draw_differences(axes, study, variants, rows)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=plots.SMALL)
    axes.set_title(question(study, rows), fontsize=plots.TITLE, loc="left")
    plots.save(figure, path)
    return True


def _draw_differences(axes: Axes, study: Study, variants: Sequence[Variant], rows: Sequence[Row]) -> None:
    base, views = study.variants[0], study.views[-1]
    found = [(v, d) for v in variants if v is not base and (d := paired_difference(rows, v, base, views))]
    found.sort(key=lambda item: item[1].mean)
    for place, (variant, difference) in enumerate(found):
        if abs(difference.mean) > FAR:  # drawn, it would compress all the others
            words = f" {verdict(difference)}: off the scale"
            axes.text(0, place, words, transform=axes.get_yaxis_transform(), va="center", fontsize=plots.SMALL)
            continue
        color = plots.TRAIN if difference.excludes_zero() else "0.55"
        own, other = by_seed(rows, variant, views), by_seed(rows, base, views)
        points = [100 * (own[seed] - other[seed]) for seed in sorted(own.keys() & other.keys())]
        axes.plot(points, [place] * len(points), "|", color=color, markersize=9, alpha=0.7)
        half = None if difference.half is None else 100 * difference.half
        axes.errorbar(100 * difference.mean, place, xerr=half, color=color, marker="o", markersize=5, capsize=3)
    axes.axvline(0, color=plots.INK, linewidth=0.8)
    axes.set_ylim(-0.5, len(found) - 0.5)
    axes.set_yticks(range(len(found)), [variant.name for variant, _ in found])
    reference = share(estimate(list(by_seed(rows, base, views).values())))
    axes.set_xlabel(
        f"Test accuracy minus that of \N{LEFT DOUBLE QUOTATION MARK}{base.name}\N{RIGHT DOUBLE QUOTATION MARK} "
        f"({reference}),\nin percentage points: mean, 95% interval and each seed\n(grey: inside the noise)",
        fontsize=plots.LABEL,
    )
    axes.grid(axis="x", color="0.9", linewidth=0.6)


def _draw_curves(axes: Axes, study: Study, variants: Sequence[Variant], rows: Sequence[Row]) -> None:
    assert study.curves
    key, label = study.curves, {"accuracy": "Training error", "validation_accuracy": "Validation error"}[study.curves]
    for i, variant in enumerate(variants):
        color, line = COLORS[i % len(COLORS)], LINES[i // len(COLORS) % len(LINES)]
        runs = [row for row in rows if row["variant"] == variant.name]
        for number, row in enumerate(runs):
            values = [np.nan if epoch[key] is None else 1 - epoch[key] for epoch in row["curve"]]
            name = f"{variant.name} ({len(runs)} seed{'s' * (len(runs) > 1)})" if number == 0 else None
            (drawn,) = axes.plot(range(1, len(values) + 1), values, label=name, color=color, linestyle=line)
            drawn.set(linewidth=1.1, marker="o", markersize=2)
    if study.until and study.until[0] == key:
        for target in study.until[1]:
            axes.axhline(1 - target, color=plots.INK, linewidth=0.8, linestyle="--")
    axes.set_xlabel("Epoch", fontsize=plots.LABEL)
    axes.set_ylabel(label, fontsize=plots.LABEL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if study.until:
        axes.set_ylim(bottom=0)
    axes.grid(color="0.9", linewidth=0.6)
    axes.legend(fontsize=plots.SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
