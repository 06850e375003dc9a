"""What people look at: the metrics log, the pictures and the tables of a run.

Everything here turns plain records (dicts, as found in `metrics.jsonl`) into files or
text and knows nothing of models or devices. A training record is

    {"step", "loss", "learning_rate", "tokens_per_s", "gradient_norm",
     "captured_energy": {path: [one number per layer] or number}, "motion": likewise}

and an evaluation record is {"step", "val_loss", "val_tokens"}.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

Record = Mapping[str, Any]

INK, FAINT = "#333333", "#b8c4d0"
# Okabe and Ito's palette, which survives colour blindness, without its yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")


def console() -> Console:
    """Where progress is told: standard error, one line a line, whatever its width."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


# --- Records ------------------------------------------------------------------------


class MetricsLog:
    """Appends records to a JSON-lines file and, if asked, to TensorBoard.

    Example:
      >>> with MetricsLog(Path(tempfile.mkdtemp()) / "metrics.jsonl") as log:
      ...     log({"step": 201, "loss": 3.5, "captured_energy": {"mlp/down": [0.9]}})
      ...     log.read()[0]["loss"]
      3.5

    Args:
      path: The file; its folder is created if absent.
      resumed_step: Records of later steps are removed first, for they will be written
        again. None keeps all. A line that a kill cut short is removed in either case.
      tensorboard: Folder for TensorBoard's events. Nested records become scalars named
        'captured_energy/mlp/down/0'.

    Raises:
      ImportError: if `tensorboard` is given and tensorboardX is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        resumed_step: int | None = None,
        tensorboard: Path | None = None,
    ):
        self.path = Path(path)
        self._writer = None
        if tensorboard is not None:
            self._writer = _summary_writer(tensorboard, resumed_step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            last = math.inf if resumed_step is None else resumed_step
            kept = [record for record in self.read() if record["step"] <= last]
            _replace(self.path, "".join(map(_line, kept)))
        self._file = self.path.open("a")

    def __call__(self, record: Record) -> None:
        """Writes one record; numpy and JAX numbers are welcome."""
        self._file.write(_line(record))
        # Whoever watches the file, or reads it after a kill, sees every finished step.
        self._file.flush()
        if self._writer is not None:
            for name, value in scalars(record):
                self._writer.add_scalar(name, value, record["step"])

    def read(self) -> list[dict[str, Any]]:
        """All records so far, oldest first."""
        return read_metrics(self.path)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without a last line that was cut short.

    Raises:
      json.JSONDecodeError: if any other line is not JSON.
    """
    *lines, tail = Path(path).read_text().split("\n")
    del tail  # empty unless the writer was killed in the middle of a line
    return [json.loads(line) for line in lines]


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record but for its step, under slash-separated names.

    >>> dict(scalars({"step": 1, "motion": {"mlp/down": [0.5, 0.25]}}))
    {'motion/mlp/down/0': 0.5, 'motion/mlp/down/1': 0.25}
    """

    def walk(name: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            items = [(str(key), item) for key, item in value.items()]
        elif np.ndim(value):
            items = [(str(index), item) for index, item in enumerate(value)]
        else:
            yield name, float(value)
            return
        for key, item in items:
            yield from walk(f"{name}/{key}", item)

    for key, value in record.items():
        if key != "step":
            yield from walk(key, value)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    _replace(Path(path), json.dumps(value, indent=2, default=_plain) + "\n")


def _summary_writer(directory: Path, resumed_step: int | None):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "logging to TensorBoard needs tensorboardX: "
            "pip install 'oasis_jax[tensorboard]'"
        ) from error
    purge = None if resumed_step is None else resumed_step + 1
    return SummaryWriter(str(directory), purge_step=purge)


def _line(record: Record) -> str:
    return json.dumps(record, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist()


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# --- Pictures of a run --------------------------------------------------------------


def loss_plot(records: Sequence[Record], path: Path) -> bool:
    """Draws training loss, thin and smoothed, and validation loss over steps.

    Returns:
      Whether there was anything to draw; if not, no file is written.
    """
    train, val = _series(records, "loss"), _series(records, "val_loss")
    if not len(train) and not len(val):
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = _axes(figure.subplots(), xlabel="step", ylabel="loss (nats per token)")
    if len(train):
        axes.plot(*train.T, color=FAINT, linewidth=0.7, label="training")
        smooth = _smooth(train[:, 1])
        axes.plot(train[:, 0], smooth, color=COLORS[0], label="training, smoothed")
    if len(val):
        axes.plot(*val.T, "o", color=COLORS[1], markersize=4.5, label="validation")
    axes.legend(frameon=False)
    _save(figure, path)
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
        _axes(axes, title=name)
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
    _save(figure, path)
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


def _axes(axes: Axes, *, title: str = "", xlabel: str = "", ylabel: str = "") -> Axes:
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


def _save(figure: Figure, path: Path) -> None:
    # A Figure without pyplot draws with Agg and leaves the global backend alone.
    figure.savefig(path, dpi=150)


# --- Comparisons of methods ---------------------------------------------------------


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
            *_markdown_table(list(columns), list(zip(*columns.values(), strict=True))),
            "",
            f"Validation tokens: {', '.join(f'{count:,}' for count in tokens)}.",
            "",
            *_markdown_table(
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
    _axes(left, xlabel="step", ylabel="validation loss")
    _axes(right, xlabel="peak memory (MiB)", ylabel="validation loss")
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
        _labelled_points(right, points)
    _save(figure, path)


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
    axes = _axes(
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
    _labelled_points(axes, points)
    _save(figure, path)


def _labelled_points(
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


def _markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    # Numbers align right; the first column holds names.
    rule = [":---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *body)]


# --- Memory -------------------------------------------------------------------------


def human_bytes(count: float) -> str:
    """'1.50 GiB': three significant digits or more, in powers of 1024."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    digits = 0 if unit == "B" else 2 if abs(size) < 10 else 1
    return f"{size:,.{digits}f} {unit}"


def memory_table(parts: Mapping[str, int], total: int, title: str) -> Table:
    """A table of sizes in bytes, with the total, given, in the last row.

    >>> memory_table({"weights": 4 * 2**20}, 2**23, "What a step needs").row_count
    2
    """
    table = Table(title=title, title_style="bold", box=SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in parts.items():
        table.add_row(name.replace("_", " "), human_bytes(count))
    table.add_section()
    table.add_row("total", human_bytes(total), style="bold")
    return table
