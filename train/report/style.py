"""What all pictures have in common."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from train.files import replacing

INK, FAINT = "#333333", "#b8c4d0"
# Okabe and Ito's palette, which survives colour blindness, without its yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")


def drawn_axes(
    axes: Axes, *, title: str = "", xlabel: str = "", ylabel: str = ""
) -> Axes:
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, color=FAINT, labelsize=9)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return axes


def save(figure: Figure, path: Path) -> None:
    # A Figure without pyplot draws with Agg and leaves the global backend alone.
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def labelled_points(
    axes: Axes, points: Sequence[tuple[float, float, str, str]]
) -> None:
    for x, y, _, color in points:
        axes.plot(x, y, "o", color=color, markersize=7)
    axes.margins(x=0.25, y=0.15)
    width, height = np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())
    placed: list[tuple[float, float]] = []
    for x, y, name, color in sorted(points, key=lambda point: point[1]):
        # Going upwards, a label that would touch one below it moves just above it.
        near = [other for px, other in placed if abs(x - px) < 0.3 * width]
        level = max([y, *(other + 0.05 * height for other in near)])
        placed.append((x, level))
        axes.annotate(
            name,
            (x, level),
            xytext=(8, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=9,
            color=color,
        )
