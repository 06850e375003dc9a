"""Training runs as processes of their own, some of them at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

from train import report
from train.config import METHOD_OPTIONS, UserError

T = TypeVar("T")
R = TypeVar("R")


def command_line(command: str, options: Mapping[str, Any]) -> list[str]:
    """What a person would type to run it.

    >>> command_line("pretrain", {"lr": 1e-3, "resume": False, "rank": None})[2:]
    ['train', 'pretrain', '--lr=0.001', '--no-resume']
    """
    words = [sys.executable, "-m", "train", command]
    for option, value in options.items():
        flag = option.replace("_", "-")
        if isinstance(value, bool) and option not in METHOD_OPTIONS:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words.append(f"--{flag}={value}")
    return words


def run_trial(
    out: Path, command: Sequence[str], diverged: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The summary of a run; one that is finished already is not run again.

    Args:
      out: The run's folder.
      command: As `command_line` makes it.
      diverged: The summary of a run whose updates were not finite.

    Raises:
      UserError: if the run failed; its own last words are passed on.
    """
    summary = out / "summary.json"
    if not summary.exists():
        result = subprocess.run(command, capture_output=True, text=True)
        finite = "updates in a row were not finite" not in result.stderr
        if result.returncode and finite:
            said = result.stderr.strip() or "failed without a word"
            raise UserError(f"trial {out.name}: {said.splitlines()[-1]}")
        if result.returncode:
            report.write_json(summary, diverged())
    return json.loads(summary.read_text())


def side_by_side(run: Callable[[T], R], trials: Sequence[T], jobs: int) -> dict[T, R]:
    """Runs trials `jobs` at a time, each with an equal share of the cores."""
    shares: Queue[set[int] | None] = Queue()
    for share in _core_shares(jobs):
        shares.put(share)

    def one(trial: T) -> R:
        share = shares.get()
        try:
            if share:
                os.sched_setaffinity(0, share)  # this thread's, and its trial's
            return run(trial)
        finally:
            shares.put(share)

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(trials, pool.map(one, trials), strict=True))


def _core_shares(jobs: int) -> list[set[int] | None]:
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::jobs]) or set(cores) for i in range(jobs)]
