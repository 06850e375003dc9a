"""Methods side by side: their table, and pictures of loss, time and memory."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from train.report.log import Record
from train.report.style import COLORS, drawn_axes, labelled_points, save
from train.report.tables import markdown_table


def compare_markdown(
    rows: Sequence[Record], baseline: str = "adamw", *, losses_only: bool = False
) -> str:
    """Two Markdown tables: the methods at their best, and every learning rate's loss.

    Args:
      rows: One per method: method, val_loss, val_tokens, tokens_per_s, step_ms_median,
        saved_activation_bytes, gradient_bytes, optimizer_state_bytes, peak_bytes, lr,
        basis_bytes, rank, and `all`, a list of {lr, seed, val_loss, nominal_lr}, where
        the last, by default lr, heads the columns of the second table. Anything else is
        ignored; None is shown as 'n/a', and a loss that is None, NaN or infinite as
        'diverged'.
      baseline: The method that differences in loss refer to.
      losses_only: Leave out times and bytes.
    """
    rows = sorted(rows, key=lambda row: (not _converged(row["val_loss"]), _loss(row)))
    base = next((_loss(row) for row in rows if row["method"] == baseline), math.nan)

    def difference(row: Record) -> str:
        if row["method"] == baseline:
            return "baseline"
        percent = 100 * (_loss(row) / base - 1)
        return f"{percent:+.2f} %" if math.isfinite(percent) else "n/a"

    tokens = sorted({row["val_tokens"] for row in rows} - {None})
    columns = {
        "method": [row["method"] for row in rows],
        "val loss": _column(rows, "val_loss", "{:.4f}".format, min),
        f"vs {baseline}": [difference(row) for row in rows],
        "tokens/s": _column(rows, "tokens_per_s", "{:,.0f}".format, max),
        "step (ms)": _column(rows, "step_ms_median", "{:.1f}".format, min),
        "activations": _column(rows, "saved_activation_bytes", _mebibytes, min),
        "gradients": _column(rows, "gradient_bytes", _mebibytes, min),
        "optimizer": _column(rows, "optimizer_state_bytes", _mebibytes, min),
        "bases": _column(rows, "basis_bytes", _mebibytes),
        "peak": _column(rows, "peak_bytes", _mebibytes, min),
        "lr": _column(rows, "lr", "{:g}".format),
        "rank": _column(rows, "rank", "{:g}".format),
    }
    if losses_only:
        kept = ("method", "val loss", f"vs {baseline}", "lr", "rank")
        columns = {name: columns[name] for name in kept}
    elif not any(row.get("basis_bytes") for row in rows):
        del columns["bases"]
    rates = sorted({_nominal(trial) for row in rows for trial in row["all"]})
    return "\n".join(
        [
            *markdown_table(list(columns), list(zip(*columns.values(), strict=True))),
            "",
            f"Validation tokens: {', '.join(f'{count:,}' for count in tokens)}.",
            "",
            *markdown_table(
                ["val loss at lr", *(f"{rate:g}" for rate in rates)],
                [[row["method"], *_losses_at(rates, row["all"])] for row in rows],
            ),
            "",
        ]
    )


def compare_plot(rows: Sequence[Record], path: Path) -> None:
    """Draws loss over steps for each method, and loss against peak memory.

    Args:
      rows: As for `compare_markdown`, with `curve`, a list of [step, val_loss].
      path: The PNG to write. Diverged methods end where their loss does and have no
        point; methods without `peak_bytes` have no point either.
    """
    crowded = len(rows) > 10
    figure = Figure(figsize=(12 if crowded else 10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn_axes(left, xlabel="step", ylabel="validation loss")
    drawn_axes(right, xlabel="peak memory (MiB)", ylabel="validation loss")
    right.xaxis.set_major_formatter("{x:,.0f}")
    points = []
    for index, row in enumerate(rows):
        color, name = COLORS[index % len(COLORS)], row["method"]
        line, marker = (("-", "o"), ("--", "s"), (":", "^"))[index // len(COLORS) % 3]
        curve = np.array(row["curve"], dtype=np.float64).reshape(-1, 2)
        converged = _converged(row["val_loss"])
        label = name if converged else f"{name} (diverged)"
        left.plot(
            *curve.T,
            line,
            color=color,
            linewidth=1.6,
            label=label,
            marker=marker if crowded else None,
            markevery=[-1],
        )
        if converged and row["peak_bytes"]:
            x, y = row["peak_bytes"] / 2**20, row["val_loss"]
            if crowded:
                right.plot(x, y, marker, color=color, markersize=7)
            points.append((x, y, name, color))
    # Neither the fall of the first fifth, much the same for every method, nor a curve
    # on its way to infinity should flatten the rest.
    curves = [row["curve"] for row in rows if _converged(row["val_loss"])]
    last = max((step for curve in curves for step, _ in curve), default=0)
    late = [
        loss
        for curve in curves
        for step, loss in curve
        if step >= last / 5 and _converged(loss)
    ]
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.1
        left.set_ylim(min(late) - margin, max(late) + margin)
    if crowded:
        # Names beside so many points would cover each other; listed as the lines end.
        handles, names = left.get_legend_handles_labels()
        order = np.argsort([-_loss(row) for row in rows])  # what diverged comes last
        figure.legend(
            [handles[i] for i in order],
            [names[i] for i in order],
            loc="outside right center",
            frameon=False,
            fontsize=9,
        )
    else:
        left.legend(frameon=False, fontsize=9)
        labelled_points(right, points)
    save(figure, path)


def frontier_plot(rows: Sequence[Record], path: Path) -> None:
    """Draws step time against peak memory, with a line for each method's levels.

    Args:
      rows: One per configuration: configuration (its name), method, rank, residuals,
        compiled_peak_bytes, peak_bytes (None where the device does not tell), and ratio,
        whose median is the time in units of the first row's. Rows without a ratio
        failed, and have no point; rows with a rank or residuals of their own are not on
        the line.
      path: The PNG to write.
    """
    rows = [row for row in rows if "ratio" in row]
    told = all(row["peak_bytes"] is not None for row in rows)
    key = "peak_bytes" if told else "compiled_peak_bytes"
    large = max(row[key] for row in rows) >= 2**33
    size, unit = (2**30, "GiB") if large else (2**20, "MiB")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = drawn_axes(
        figure.subplots(),
        xlabel=f"peak memory ({unit}), as the"
        f" {'device' if told else 'compiler'} reports it",
        ylabel=f"step time / that of {rows[0]['configuration']}",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    points = []
    for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        color = COLORS[index % len(COLORS)]
        line = []
        for row in (row for row in rows if row["method"] == method):
            x, y = row[key] / size, row["ratio"]["median"]
            points.append((x, y, row["configuration"], color))
            if not row["rank"] and row["residuals"] == "whole":
                line.append((x, y))
        # The more is recomputed, the less memory.
        axes.plot(*np.reshape(sorted(line), (-1, 2)).T, color=color, linewidth=1.2)
    labelled_points(axes, points)
    save(figure, path)


def _converged(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _loss(row: Record) -> float:
    return row["val_loss"] if _converged(row["val_loss"]) else math.nan


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _column(
    rows: Sequence[Record],
    key: str,
    text: Callable[[Any], str],
    best: Callable[[list], Any] | None = None,
) -> list[str]:
    """The cells of a column, those equal to the best in bold unless all are."""
    values = [row.get(key) for row in rows]
    finite = [value for value in values if _converged(value)]
    absent = "diverged" if key == "val_loss" else "n/a"
    cells = [text(value) if _converged(value) else absent for value in values]
    if best is None or not finite or len(set(cells)) == 1:
        return cells
    winner = text(best(finite))
    return [f"**{cell}**" if cell == winner else cell for cell in cells]


def _losses_at(rates: Sequence[float], trials: Sequence[Record]) -> list[str]:
    """One cell per rate: the mean over seeds with its standard deviation."""
    means, cells = [], []
    for rate in rates:
        losses = [trial["val_loss"] for trial in trials if _nominal(trial) == rate]
        good = [loss for loss in losses if _converged(loss)]
        failed = len(losses) - len(good)
        means.append(float(np.mean(good)) if good and not failed else math.inf)
        if failed:
            cells.append("diverged" if not good else f"diverged {failed}/{len(losses)}")
        elif len(good) > 1:
            cells.append(f"{np.mean(good):.4f} ± {np.std(good, ddof=1):.4f}")
        else:
            cells.append(f"{good[0]:.4f}" if good else "n/a")
    best = min(means, default=math.inf)
    return [
        f"**{cell}**" if mean == best < math.inf else cell
        for cell, mean in zip(cells, means, strict=True)
    ]


def _nominal(trial: Record) -> float:
    return trial.get("nominal_lr", trial["lr"])
