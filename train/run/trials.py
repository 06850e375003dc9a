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

from train.errors import DONE, Diverged, UserError
from train.options import COMMANDS
from train.options.flags import as_words
from train.run.folder import RunFolder

T = TypeVar("T")
R = TypeVar("R")


def command_line(command: str, values: Mapping[str, Any]) -> list[str]:
    """What a person would type to run it.

    >>> command_line("pretrain", {"lr": 1e-3, "resume": False, "rank": None})[2:]
    ['train', 'pretrain', '--lr=0.001', '--no-resume']
    """
    words = as_words(COMMANDS[command], values)
    return [sys.executable, "-m", "train", command, *words]


def run_trial(out: Path, command: Sequence[str]) -> dict[str, Any]:
    """The summary of a run; one that is finished already is not run again.

    Args:
      out: The run's folder.
      command: As `command_line` makes it.

    Raises:
      UserError: if the run failed; its own last words are passed on. One that diverged
        did not fail: its summary says so.
    """
    summary = RunFolder(out).summary
    if not summary.exists():
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode not in (DONE, Diverged.exit_code):
            said = result.stderr.strip() or "failed without a word"
            raise UserError(f"trial {out.name}: {said.splitlines()[-1]}")
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
