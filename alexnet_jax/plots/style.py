"""Sizes, colours and axis style shared by all figures."""

from matplotlib.axes import Axes

DPI, MAX_PIXELS = 200, 1600  # sharp on a dense screen; wider figures get fewer dots, which keeps the files small
WIDTH = 7.5  # inches
TITLE, LABEL, SMALL = 10, 9, 8  # font sizes in points
TRAIN, VALIDATION, INK = "#0072B2", "#D55E00", "#444444"  # blue and vermilion of Okabe and Ito's colour-blind safe set
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # the same set


def style(ax: Axes) -> None:
    """Axes of a diagram: no frame above and to the right, a pale grid behind the data, small tick labels."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=SMALL)
