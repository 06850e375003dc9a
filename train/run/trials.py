"""Training runs as processes of their own, some of them at a time."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

from train.errors import DONE, Diverged, Preempted, UserError
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


class Processes:
    """Processes that are stopped together. Its methods may be called by any thread."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Waits for a new process, and gives what it said.

        It has a session of its own, so that Ctrl-C reaches it by `stop` alone.

        Raises:
          Preempted: if they are stopped.
        """
        pipe = subprocess.PIPE
        with self._lock:
            if self.stopped:
                raise Preempted("no process is begun any more")
            process = subprocess.Popen(
                command, stdout=pipe, stderr=pipe, text=True, start_new_session=True
            )
            self._running.add(process)
        try:
            out, err = process.communicate()
        finally:
            with self._lock:
                self._running.remove(process)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def stop(self) -> None:
        """Asks them to save and stop, and lets no other begin."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()

    def kill(self) -> None:
        """Ends them, and lets no other begin."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.kill()


def run_trial(
    out: Path, command: Sequence[str], processes: Processes
) -> dict[str, Any]:
    """The summary of a run; one that is finished already is not run again.

    Args:
      out: The run's folder.
      command: As `command_line` makes it.
      processes: Among which it runs.

    Raises:
      Preempted: if the run, or all of them, were stopped.
      UserError: if the run failed; its own last words are passed on. One that diverged
        did not fail: its summary says so.
    """
    summary = RunFolder(out).summary
    if not summary.exists():
        result = processes.run(command)
        if result.returncode not in (DONE, Diverged.exit_code):
            said = result.stderr.strip() or "failed without a word"
            stopped = result.returncode == Preempted.exit_code
            kind = Preempted if stopped else UserError
            raise kind(f"trial {out.name}: {said.splitlines()[-1]}")
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
