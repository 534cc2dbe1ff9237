"""The tables at the end of networks.md: `python docs/tables.py` prints them."""

from alexnet_jax.network.alexnet import LAYERS, VARIANTS
from alexnet_jax.network.layer_counts import count_layers


def tables() -> str:
    """The variants side by side and layer by layer, in Markdown."""
    columns = [describe(name) for name in VARIANTS]
    side_by_side = [[row, *(column[row] for column in columns)] for row in columns[0]]
    parts = ["## The variants side by side", markdown(["", *VARIANTS], side_by_side), "## Layer by layer"]
    for name in VARIANTS:
        rows = [
            [layer, by(count.kernel), by(count.output), f"{count.parameters:,}", f"{count.multiply_accumulates:,}"]
            for layer, count in count_layers(name).items()
        ]
        heading = ["layer", "kernel", "output", "parameters", "multiply-accumulates"]
        parts += [f"### {name}", markdown(heading, rows)]
    return "\n\n".join(parts) + "\n"


def describe(variant: str) -> dict[str, str]:
    """The column of a variant in the table of all."""
    network, counts = VARIANTS[variant], count_layers(variant).values()
    operations = [", ".join(names).replace("activation", "ReLU") for names in network.operations]
    normalizes = any("LRN" in names for names in network.operations)
    gaussian = network.deviations is not None
    return {
        "source": network.source,
        "input": by((network.input_size, network.input_size)),
        "zeros around it, before / after": " / ".join(map(str, network.conv1_padding)),
        "channels": "-".join(map(str, network.features)),
        "groups": "-".join(map(str, network.groups)),
        **{f"after {layer}": names for layer, names in zip(LAYERS, operations, strict=False)},
        "LRN: a": ("2e-5 = alpha / 5" if network.lrn_divide_by_size else "1e-4 = alpha") if normalizes else "none",
        "LRN: k": f"{network.lrn_k:g}" if normalizes else "none",
        "LRN: groups of channels": str(network.lrn_groups) if normalizes else "none",
        "initial weights": ", ".join(f"{d:g}" for d in network.deviations or ()) or "uniform, 1 / sqrt(fan-in)",
        "initial biases": ", ".join(f"{b:g}" for b in network.biases) if gaussian else "uniform, 1 / sqrt(fan-in)",
        "dropout on the inputs of": ", ".join(network.dropped),
        "parameters": f"{sum(count.parameters for count in counts):,}",
        "multiply-accumulates": f"{sum(count.multiply_accumulates for count in counts):,}",
    }


def by(shape: tuple[int, ...]) -> str:
    """A shape as "3 x 3 x 64"."""
    return " x ".join(map(str, shape))


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heading, ["---"] * len(heading), *rows])


if __name__ == "__main__":
    print(tables(), end="")
