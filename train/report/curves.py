"""Pictures of one run: its loss, and what its bases capture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from train.report.log import Record
from train.report.style import COLORS, FAINT, INK, drawn_axes, save


def loss_plot(records: Sequence[Record], path: Path) -> bool:
    """Draws training loss, thin and smoothed, and validation loss over steps.

    Returns:
      Whether there was anything to draw; if not, no file is written.
    """
    train, val = _series(records, "loss"), _series(records, "val_loss")
    if not len(train) and not len(val):
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn_axes(figure.subplots(), xlabel="step", ylabel="loss (nats per token)")
    if len(train):
        axes.plot(*train.T, color=FAINT, linewidth=0.7, label="training")
        smooth = _smooth(train[:, 1])
        axes.plot(train[:, 0], smooth, color=COLORS[0], label="training, smoothed")
    if len(val):
        axes.plot(*val.T, "o", color=COLORS[1], markersize=4.5, label="validation")
    axes.legend(frameon=False)
    save(figure, path)
    return True


def energy_plot(records: Sequence[Record], path: Path) -> bool:
    """Draws the captured energy over steps: a panel per path, a line per layer.

    Returns:
      Whether any record has a captured energy; if not, no file is written.
    """
    energies: dict[str, list[tuple[int, Any]]] = {}
    for record in records:
        for name, value in record.get("captured_energy", {}).items():
            energies.setdefault(name, []).append((record["step"], np.atleast_1d(value)))
    if not energies:
        return False
    columns = min(len(energies), 2 if len(energies) <= 4 else 3)
    rows = math.ceil(len(energies) / columns)
    figure = Figure(
        figsize=(1.2 + 3.2 * columns, 0.6 + 2.2 * rows), layout="constrained"
    )
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    depth = max(len(series[0][1]) for series in energies.values())
    # Viridis without its last, nearly white, fifth; one shade per layer.
    shades = ListedColormap(colormaps["viridis"](np.linspace(0, 0.8, depth)))
    for axes, (name, series) in zip(grid.flat, energies.items(), strict=False):
        drawn_axes(axes, title=name)
        steps = [step for step, _ in series]
        for layer, line in enumerate(np.stack([value for _, value in series]).T):
            axes.plot(steps, line, color=shades(layer), linewidth=1.2)
    for spare in range(len(energies), grid.size):
        grid.flat[spare].set_axis_off()
        grid.flat[spare - columns].tick_params(labelbottom=True)
    grid[0, 0].set_ylim(0, 1)
    figure.supxlabel("step", fontsize=10, color=INK)
    figure.supylabel("captured energy", fontsize=10, color=INK)
    if depth > 1:
        norm = BoundaryNorm(np.arange(depth + 1) - 0.5, depth)
        bar = figure.colorbar(
            ScalarMappable(norm, shades), ax=grid, shrink=0.6, aspect=18
        )
        bar.set_label("layer", color=INK)
        bar.set_ticks(list(range(0, depth, math.ceil(depth / 6))))
        bar.minorticks_off()
        bar.ax.tick_params(length=0, colors=INK, labelsize=9)
        bar.outline.set_visible(False)
    save(figure, path)
    return True


def _series(records: Sequence[Record], key: str) -> np.ndarray:
    """(n, 2) float64, step and value, without what is not finite."""
    pairs = [(record["step"], record[key]) for record in records if key in record]
    series = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return series[np.isfinite(series[:, 1])]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred mean over a fiftieth of the run, which unlike a trailing one lags not.

    The weights are a Hann window, renormalised where it overhangs an end.
    """
    half = len(values) // 50
    window = np.hanning(2 * half + 3)[1:-1]  # its ends are zero
    total, mass = (np.convolve(v, window) for v in (values, np.ones_like(values)))
    return (total / mass)[half : half + len(values)]
