"""From raw block times to medians, ratios, Markdown tables and a plot."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alexnet_jax import plots
from alexnet_jax.network import layer_counts

Record = Mapping[str, Any]
OURS = "alexnet_jax"
PEER_COLORS = {"torch": "#D55E00", "tensorflow": "#E69F00"}  # of Okabe and Ito's colour-blind safe set
MIB = 2**20


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(ours: Record, peer: Record) -> dict[str, float]:
    """The peer's seconds divided by ours, round by round: above 1 if we are faster. Blocks have the same work."""
    return spread(b / a for a, b in zip(ours["seconds"], peer["seconds"], strict=True))


def summarize(results: Record) -> dict[str, Any]:
    """Summary of the raw results; the keys are the sections that were measured."""
    summaries: dict[str, Callable[[Any], Any]] = {
        "train": _training,
        "operations": _operations,
        "start": lambda pairs: {state: spread(pair[state] for pair in pairs) for state in ("empty", "filled")},
        "epoch": _epoch,
        "scaling": lambda programs: [_speed(program) for program in programs],
        "imagenet": _imagenet,
        "forward": _imagenet,
        "tuning": _imagenet,
    }
    found = {section: summary(results[section]) for section, summary in summaries.items() if results.get(section)}
    return {section: summary for section, summary in found.items() if summary}


def _speed(program: Record) -> dict[str, Any]:
    images = program["steps"] * program["batch_size"]
    return {
        **{key: program[key] for key in ("program", "framework", "dtype", "batch_size", "devices")},
        "images_per_second": spread(images / seconds for seconds in program["seconds"]),
        "step_ms": spread(1000 * seconds / program["steps"] for seconds in program["seconds"]),
    }


def _ours(programs: Sequence[Record], dtype: str = "float32") -> Record | None:
    return next((p for p in programs if p["framework"] == "jax" and p["dtype"] == dtype), None)


def _training(programs: Sequence[Record]) -> dict[str, Any]:
    rows = []
    for program in programs:
        ours = _ours(programs, program["dtype"])
        on_device = program["device_peak_bytes"]
        rows.append(
            _speed(program)
            | {
                "ours_by_this": ratios(ours, program) if ours else None,
                "build_seconds": program["build_seconds"],
                "memory_mib": (on_device or program["peak_bytes"] - program["imported_bytes"]) / MIB,
                "memory_of": "device" if on_device else "host, above import",
            }
        )
    rivals: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["framework"], row["dtype"])
        best = rivals.get(key, row)
        if row["framework"] != "jax" and row["images_per_second"]["median"] >= best["images_per_second"]["median"]:
            rivals[key] = row
    return {"programs": rows, "best_peers": list(rivals.values())}


def _operations(operations: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    rows = []
    for operation, programs in operations.items():
        ours = _ours(programs)
        rows += [
            {
                **{key: program[key] for key in ("program", "framework")},
                "operation": operation,
                "ms": spread(1000 * seconds / program["steps"] for seconds in program["seconds"]),
                "this_by_ours": ratios(ours, program) if ours else None,
            }
            for program in programs
        ]
    return rows


def _epoch(pairs: Sequence[Record]) -> dict[str, Any]:
    bare = [_speed(pair["bare"])["images_per_second"]["median"] for pair in pairs]
    loop = [statistics.median(pair["loop"]) for pair in pairs]
    return {
        "bare": spread(bare),
        "loop": spread(loop),
        "loop_by_bare": spread(b / a for a, b in zip(bare, loop, strict=True)),
    }


def _imagenet(measured: Record) -> list[dict[str, Any]]:
    operations = 2 * measured["product_side"] ** 3
    peaks = {
        product["dtype"]: operations * product["steps"] / min(product["seconds"]) for product in measured["products"]
    }
    # A multiplication and an addition each, forward and for both gradients of the layers that are trained; the input of
    # the first of these needs none.
    counts = [layer.multiply_accumulates for layer in layer_counts.count_layers("torchvision").values()]
    trained = counts[5:] if measured.get("frozen") else counts
    gradients = 0 if measured.get("task") == "predict" else 2 * sum(trained) - trained[0]
    per_image = 2 * (sum(counts) + gradients)
    rows = []
    for program in measured["programs"]:
        same = [other for other in measured["programs"] if other["batch_size"] == program["batch_size"]]
        ours, speed = _ours(same, program["dtype"]), _speed(program)
        rows.append(
            speed
            | {
                "ours_by_this": ratios(ours, program) if ours else None,
                "of_peak": speed["images_per_second"]["median"] * per_image / peaks[program["dtype"]],
                "parameters": program["parameters"],
                "steps": program["steps"],
            }
        )
    return rows


def caption(results: Record) -> str:
    """Device and versions, in one line."""
    device, versions = results["device"], dict(results["versions"])
    where = f"{device['name']}, {device['cores']} cores" if device["platform"] == "cpu" else device["name"]
    names = {"python": "Python", "jax": "JAX", "flax": "Flax", "torch": "PyTorch", "tensorflow": "TensorFlow"}
    found = ", ".join(f"{name} {versions[key]}" for key, name in names.items() if key in versions)
    return f"{where}; {found}; {results['date'][:10]}"


def tables(results: Record) -> str:
    """All tables in Markdown, from the contents of the JSON file."""
    settings, summary = results["settings"], results["summary"]
    parts = [
        f"{caption(results)}. Median (smallest to largest) of {settings['rounds']} rounds of {settings['steps']} "
        f"steps; data: {settings['data']}."
    ]
    render: dict[str, Callable[[Any], str]] = {
        "train": _training_tables,
        "operations": _operations_table,
        "start": _start_table,
        "epoch": _epoch_table,
        "scaling": _scaling_table,
        "imagenet": _imagenet_table,
        "forward": _imagenet_table,
        "tuning": _imagenet_table,
    }
    parts += [table(summary[section]) for section, table in render.items() if section in summary]
    parts += ["Left out:\n\n" + "\n".join(f"- {line}" for line in results["left_out"])] if results["left_out"] else []
    return "\n\n".join(parts)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _range(values: Mapping[str, float] | None, digits: str) -> str:
    if values is None:
        return ""
    return f"{values['median']:{digits}} ({values['min']:{digits}} to {values['max']:{digits}})"


def _training_tables(summary: Record) -> str:
    batch_size = summary["programs"][0]["batch_size"]
    memory = f"peak memory ({summary['programs'][0]['memory_of']})"
    programs = markdown(
        ["training step", "dtype", f"images/s, batch {batch_size}", "ours / this", memory, "ready after"],
        (
            (
                row["program"],
                row["dtype"],
                _range(row["images_per_second"], ",.0f"),
                _range(row["ours_by_this"], ".2f"),
                f"{row['memory_mib']:,.0f} MiB",
                f"{row['build_seconds']:.1f} s",
            )
            for row in summary["programs"]
        ),
    )
    if not summary["best_peers"]:
        return programs
    best = markdown(
        ["fastest peer", "dtype", "ours / this"],
        ((row["program"], row["dtype"], _range(row["ours_by_this"], ".2f")) for row in summary["best_peers"]),
    )
    return f"{programs}\n\n{best}"


def _operations_table(rows: Sequence[Record]) -> str:
    return markdown(
        ["operation", "program", "ms", "this / ours"],
        (
            (row["operation"], row["program"], _range(row["ms"], ".2f"), _range(row["this_by_ours"], ".2f"))
            for row in rows
        ),
    )


def _start_table(summary: Record) -> str:
    rows = [(f"quickstart's first step, {state} cache", _range(values, ".1f")) for state, values in summary.items()]
    return markdown(["start", "s"], rows)


def _epoch_table(summary: Record) -> str:
    return markdown(
        ["bare step, images/s", "whole loop, images/s", "loop / bare"],
        [(_range(summary["bare"], ",.0f"), _range(summary["loop"], ",.0f"), _range(summary["loop_by_bare"], ".3f"))],
    )


def _scaling_table(rows: Sequence[Record]) -> str:
    return markdown(
        ["batch size", "devices", "images/s", "ms a step"],
        (
            (
                str(row["batch_size"]),
                str(row["devices"]),
                _range(row["images_per_second"], ",.0f"),
                _range(row["step_ms"], ".1f"),
            )
            for row in rows
        ),
    )


def _imagenet_table(rows: Sequence[Record]) -> str:
    return f"Blocks of {rows[0]['steps']} steps:\n\n" + markdown(
        [
            "torchvision's AlexNet, 224x224",
            "dtype",
            "batch size",
            "images/s",
            "ours / this",
            "of matrix products' speed",
        ],
        (
            (
                row["program"],
                row["dtype"],
                str(row["batch_size"]),
                _range(row["images_per_second"], ",.1f"),
                _range(row["ours_by_this"], ".2f"),
                f"{row['of_peak']:.0%}",
            )
            for row in rows
        ),
    )


def figure(results: Record) -> Figure | None:
    """Training, operations and scaling, those that were measured, side by side; None if none was."""
    summary = results["summary"]
    panels = [(section, panel) for section, panel in PANELS.items() if section in summary]
    if not panels:
        return None
    drawn = Figure(figsize=(1 + 5 * len(panels), 4.8), layout="constrained")
    drawn.suptitle("AlexNetSmall: this project and its peers", fontsize=plots.TITLE + 2)
    drawn.supxlabel(caption(results).replace("; ", "\n", 1), fontsize=plots.SMALL, color=plots.INK)
    for axes, (section, panel) in zip(np.atleast_1d(drawn.subplots(1, len(panels))), panels, strict=True):
        panel(axes, summary[section])
        axes.tick_params(labelsize=plots.SMALL)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return drawn


def _color(row: Record) -> str:
    return PEER_COLORS.get(row["framework"], plots.TRAIN)


def _whiskers(rows: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Distances from the median to the smallest and largest, [2, N], in the form of matplotlib's error bars."""
    return np.array([[row["median"] - row["min"], row["max"] - row["median"]] for row in rows]).T


def _draw_training(axes: Axes, summary: Record) -> None:
    rows = sorted(summary["programs"], key=lambda row: row["images_per_second"]["median"])
    speeds = [row["images_per_second"] for row in rows]
    names = [row["program"] + (", bfloat16" if row["dtype"] == "bfloat16" else "") for row in rows]
    medians = [speed["median"] for speed in speeds]
    colors = [_color(row) for row in rows]
    axes.barh(names, medians, xerr=_whiskers(speeds), color=colors, error_kw={"ecolor": plots.INK, "capsize": 2})
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["program"] == OURS else "normal")
    axes.set_xlabel("Images/s", fontsize=plots.LABEL)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_title(f"Training step, batch {rows[0]['batch_size']}", fontsize=plots.TITLE)


def _draw_operations(axes: Axes, rows: Sequence[Record]) -> None:
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    programs = list(dict.fromkeys(row["program"] for row in rows))
    height = 0.8 / len(programs)
    for i, program in enumerate(programs):
        mine = [row for row in rows if row["program"] == program]
        places = [operations.index(row["operation"]) + (i - (len(programs) - 1) / 2) * height for row in mine]
        times = [row["ms"] for row in mine]
        axes.barh(
            places,
            [time["median"] for time in times],
            height,
            xerr=_whiskers(times),
            color=_color(mine[0]),
            alpha=1.0 if program == programs[0] else 0.45 + 0.45 * (i % 2),
            label=program,
            error_kw={"ecolor": plots.INK, "elinewidth": 0.8},
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(operations)), ["\n".join(operation.rsplit(" ", 1)) for operation in operations])
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_xlabel("ms a call (logarithmic)", fontsize=plots.LABEL)
    axes.legend(fontsize=plots.SMALL, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    axes.set_title("Operations: value and gradient, batch 128", fontsize=plots.TITLE)


def _draw_scaling(axes: Axes, rows: Sequence[Record]) -> None:
    rows = [row for row in rows if row["devices"] == 1]
    sizes, speeds = [row["batch_size"] for row in rows], [row["images_per_second"] for row in rows]
    medians = [speed["median"] for speed in speeds]
    axes.errorbar(sizes, medians, _whiskers(speeds), color=plots.TRAIN, marker="o", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_xlabel("Batch size", fontsize=plots.LABEL)
    axes.set_ylabel("Images/s", fontsize=plots.LABEL)
    axes.set_title("This project by batch size, one device", fontsize=plots.TITLE)


PANELS: dict[str, Callable[[Axes, Any], None]] = {
    "train": _draw_training,
    "operations": _draw_operations,
    "scaling": _draw_scaling,
}
