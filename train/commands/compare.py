"""Several methods on the same data, seeds and schedule, one process a trial."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from oasis_jax.methods import METHODS, row
from train.errors import Preempted, UserError
from train.files import owned, replacing
from train.options import Compare, Pretrain
from train.options.commands import shared
from train.options.fields import Role, differences, flag, of_role
from train.options.method import METHOD_OPTIONS, only_of
from train.report.comparison import compare_markdown, compare_plot
from train.report.log import console as standard_error
from train.report.log import write_json
from train.run.folder import RunFolder, holds_something
from train.run.signals import listening
from train.run.trials import Processes, command_line, run_trial, side_by_side


@dataclass(frozen=True)
class Trial:
    """One method at one learning rate with one seed."""

    label: str  # as given: 'oasis', 'oasis:0.5' or 'oasis:0.5:int8'
    lr: float  # as given
    seed: int

    @property
    def rate(self) -> float:
        """The learning rate it trains with: as given, times its method's factor."""
        return self.lr * row(_parts(self.label)[0]).lr_factor

    @property
    def name(self) -> str:
        name, rank, residuals = _parts(self.label)
        rank, residuals = rank and f"-r{rank}", residuals and f"-{residuals}"
        return f"{name}{rank}{residuals}-lr{self.rate:g}-seed{self.seed}"


def run(config: Compare, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Runs the trials that are not yet there; returns and writes the table.

    Raises:
      UserError: if an option makes no sense, `out` holds something else or is in use, or
        a trial failed (its own sentence is passed on).
      Preempted: if it was asked to stop.
    """
    console = console or standard_error()
    labels = _split(config.methods)
    check_methods(config, labels)
    rates, seeds = _numbers(config, "lrs", float), _numbers(config, "seeds", int)
    if config.out.is_file():
        raise UserError(f"--out {config.out} is a file, expected a folder")
    processes = Processes()
    with (
        owned(config.out, f"--out {config.out}"),
        listening(first=processes.stop, last=processes.kill) as signals,
    ):
        _claim(config)
        signals.defer()  # the trials have something to save
        try:
            return _compare(config, labels, rates, seeds, processes, console)
        except UserError:
            if not processes.stopped:
                raise
            raise Preempted(
                "stopped, and every trial that had begun; the same command goes on, with"
                f" those that are finished kept in {config.out}"
            ) from None


def _compare(
    config: Compare,
    labels: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    processes: Processes,
    console: Console,
) -> list[dict[str, Any]]:
    """Runs what is not yet there; returns and writes the table."""
    sweep = [Trial(label, lr, seeds[0]) for label in labels for lr in rates]
    results = _run_all(config, sweep, processes, console)
    best = {
        label: min(rates, key=lambda lr: _order(results[Trial(label, lr, seeds[0])]))
        for label in labels
    }
    repeats = [
        Trial(label, best[label], seed) for label in labels for seed in seeds[1:]
    ]
    results |= _run_all(config, repeats, processes, console)
    rows = [
        _row(label, best[label], {t: s for t, s in results.items() if t.label == label})
        for label in labels
    ]
    write_json(config.out / "compare.json", rows)
    table = compare_markdown(rows, baseline=labels[0])
    with replacing(config.out / "compare.md") as temporary:
        temporary.write_text(table)
    compare_plot(rows, config.out / "compare.png")
    return rows


def check_methods(config: Compare, labels: Sequence[str]) -> None:
    """Refuses what would make a trial fail before it begins."""
    known = set()
    for label in labels:
        name = _parts(label)[0]
        try:
            known |= set(row(name).published)
        except ValueError as error:
            raise UserError(f"--methods: {error}") from None
        config.trial(**settings(config, label)).recipe()
    for option in METHOD_OPTIONS:
        if getattr(config, option) is not None and option not in known:
            whose = [n for n, m in METHODS.items() if option in m.published]
            raise UserError(
                f"{flag(option)} is an option of {', '.join(whose)}, and"
                f" --methods {config.methods} has none of them"
            )


def settings(config: Compare, label: str) -> dict[str, Any]:
    """What of a trial's options depends on its label."""
    name, rank, residuals = _parts(label)
    return only_of(name, config) | dict(
        method=name,
        rank=rank or config.rank,
        residuals=residuals or config.residuals,
    )


def _parts(label: str) -> tuple[str, str, str]:
    """Method, rank and width of residuals; '' where a label leaves them out."""
    name, _, rest = label.partition(":")
    rank, _, residuals = rest.partition(":")
    return name, rank, residuals


def _split(text: str) -> list[str]:
    if text.strip() == "all":
        return [name for name, method in METHODS.items() if not method.ablation]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if len(set(names)) != len(names) or not names:
        raise UserError(f"--methods is {text!r}, expected distinct names")
    return names


def _numbers(config: Compare, option: str, kind: type) -> list[Any]:
    text = getattr(config, option)
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--{option} is {text!r}, expected numbers separated by commas"
        ) from None
    if len(set(numbers)) != len(numbers):
        raise UserError(f"--{option} is {text!r}: a number stands there twice")
    return numbers


def _claim(config: Compare) -> None:
    """An `out` that is not empty must hold trials of this very comparison."""
    if not holds_something(config.out):
        return
    marker = config.out / "compare_config.json"
    if not marker.exists():
        raise UserError(f"--out {config.out} holds something that is not a comparison")
    changed = differences(json.loads(marker.read_text()), _common(config))
    if changed:
        raise UserError(
            f"--out {config.out} holds a comparison with other options: {changed};"
            " choose another --out"
        )


def _common(config: Compare) -> dict[str, Any]:
    """The options on which the numbers of all trials depend."""
    decisive = of_role(config, Role.STEP, Role.METHOD, Role.RUN)
    return {name: config.as_dict()[name] for name in decisive}


def _run_all(
    config: Compare,
    trials: Sequence[Trial],
    processes: Processes,
    console: Console,
) -> dict[Trial, dict[str, Any]]:
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "compare_config.json", _common(config))

    def run(trial: Trial) -> dict[str, Any]:
        out = config.out / "trials" / trial.name
        summary = run_trial(out, command(config, trial, out), processes)
        loss = summary["val_loss"]
        outcome = "diverged" if loss is None else f"validation loss {loss:.4f}"
        console.print(f"{trial.label}  lr {trial.rate:g}  seed {trial.seed}  {outcome}")
        return summary

    return side_by_side(run, trials, config.jobs)


def command(config: Compare, trial: Trial, out: Path) -> list[str]:
    """The command line of a trial, as a person would type it."""
    values = shared(config, Pretrain) | settings(config, trial.label)
    values |= dict(lr=trial.rate, seed=trial.seed, out=out)
    return command_line(
        "pretrain", values | dict(resume=RunFolder(out).checkpoints.is_dir())
    )


def _order(summary: dict[str, Any]) -> float:
    loss = summary["val_loss"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _row(
    label: str, best: float, results: dict[Trial, dict[str, Any]]
) -> dict[str, Any]:
    """The method at its best learning rate, averaged over seeds."""
    chosen = [summary for trial, summary in results.items() if trial.lr == best]
    first, losses = chosen[0], [summary["val_loss"] for summary in chosen]
    copied = "val_tokens tokens_per_s step_ms_median saved_activation_bytes"
    copied += " gradient_bytes optimizer_state_bytes basis_bytes peak_bytes rank curve"
    return {
        "method": label,
        "val_loss": None if None in losses else statistics.fmean(losses),
        "lr": first["lr"],
        **{key: first.get(key) for key in copied.split()},
        "seeds": [s["seed"] for s in chosen],
        "all": [
            {k: summary[k] for k in ("lr", "seed", "val_loss", "curve")}
            | {"nominal_lr": trial.lr}
            for trial, summary in results.items()
        ],
        "config": first.get("config"),
        "machine": first.get("machine"),
    }


def main(config: Compare) -> None:
    run(config)
    print((config.out / "compare.md").read_text())
