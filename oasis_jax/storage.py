"""The folders of a run's steps: each whole under its name, or not there.

Orbax writes a folder in the background and renames it once it is complete; here its files
get their digests before that, what cannot be written is told in one sentence, and what is
left of it is removed.
"""

import contextlib
import itertools
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from oasis_jax import digests
from oasis_jax.errors import first_line

UNFINISHED = ".orbax-checkpoint-tmp"
"""What follows the step in the name of a folder that is still being written."""
MARKERS = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax writes last, when the rest has its digests."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, does not fit the target, or cannot be written."""


class Storage:
    """A directory with a folder for every step that was kept.

    Args:
      directory: Created if absent.
      keep: How many of the newest steps survive.

    Raises:
      CheckpointError: if the directory cannot be made.
    """

    def __init__(self, directory: Path, *, keep: int):
        self.directory = directory
        # The step that is being written, or is not yet known to be whole.
        self._writing: int | None = None
        self._saved_before = self._failed = False
        # What was found of a step's files, and how they looked then.
        self._checked: dict[int, tuple[Any, digests.Damaged | None]] = {}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        _quieten()
        try:
            self._manager = ocp.CheckpointManager(directory, options=options)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise CheckpointError(f"{directory} cannot be used: {reason}") from error

    def folder(self, step: int) -> Path:
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Oldest first; some may be damaged."""
        return sorted(self._manager.all_steps())

    def reached_preemption(self, step: int) -> bool:
        return self._manager.reached_preemption(step)

    def save(self, step: int, items: Any, *, stale: Iterable[int]) -> None:
        """Begins to write a step, once the one before it is whole.

        Args:
          items: Of Orbax.
          stale: Steps to move aside before.

        Raises:
          CheckpointError: if it, or the one before, cannot be written.
        """
        self.settle()
        with self._told_if_not_written(step):
            if not self._saved_before:
                self._remove_unfinished()  # of a process that was killed
                self._saved_before = True
            self._set_aside(list(stale))
            self._writing = step
            self._manager.save(step, args=items, force=True)

    def restore(self, step: int, items: Any) -> Any:
        return self._manager.restore(step, args=items)

    def settle(self) -> None:
        """Waits until what is being written is whole.

        Raises:
          CheckpointError: if it will not be; says why, and which is the newest that is.
        """
        if self._writing is None:
            return
        step = self._writing
        with self._told_if_not_written(step, whatever=True):
            self._manager.wait_until_finished()
        self._writing = None
        if jax.process_index() == 0:
            # All that tells of the state has its digest already.
            with contextlib.suppress(OSError, digests.Damaged):
                digests.complete(self.folder(step))

    def close(self) -> None:
        """As `settle`; and ends Orbax's threads, which may have words of their own."""
        try:
            self.settle()
        except CheckpointError:
            with contextlib.suppress(Exception):
                self._manager.close()
            raise
        else:
            self._close_manager()
        finally:
            if self._failed:
                self._remove_late()

    def _close_manager(self) -> None:
        try:
            self._manager.close()
        except Exception as error:
            reason = _of_the_system(error)
            if reason is None:
                raise
            raise CheckpointError(
                f"{self.directory} cannot be closed: {reason}"
            ) from error

    def check(self, step: int) -> None:
        """Reads all files of a step that has digests; once, while nobody writes to them.

        Raises:
          Damaged: if they are not those that were written.
        """
        # What is still being written must not pass for half-written.
        self.settle()
        folder = self.folder(step)
        try:
            looks = digests.signature(folder)
        except OSError:  # it has no digests
            return
        if step not in self._checked or self._checked[step][0] != looks:
            found = None
            try:
                digests.check(folder)
            except digests.Damaged as damaged:
                found = damaged
            self._checked[step] = looks, found
        damage = self._checked[step][1]
        if damage is not None:
            raise damage

    def _seal(self) -> None:
        """Called by Orbax, in its thread and one process, before it renames the folder."""
        unfinished = self.directory / f"{self._writing}{UNFINISHED}"
        # A store that cannot rename has it under its own name from the start.
        folder = unfinished if unfinished.exists() else unfinished.with_suffix("")
        digests.seal(folder, later=MARKERS)

    @contextmanager
    def _told_if_not_written(
        self, step: int, *, whatever: bool = False
    ) -> Iterator[None]:
        """Turns what writing runs into to one sentence, and cleans up after it.

        Args:
          whatever: Any error is one of writing, not only one that the system gave.
        """
        try:
            yield
        except Exception as error:
            reason = _of_the_system(error)
            if reason is None and not whatever:
                raise
            self._writing, self._failed = None, True
            self._remove_unfinished()
            self._manager.reload()
            whole = self.steps()
            newest = f"the newest whole one is step {whole[-1]}" if whole else "none is"
            raise CheckpointError(
                f"{self.directory}: the checkpoint of step {step} cannot be written:"
                f" {reason or first_line(error)}; of those there, {newest}"
            ) from error

    def _remove_unfinished(self) -> None:
        if jax.process_index() == 0:
            for folder in self._unfinished():
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_late(self) -> None:
        """What was asked of the disk before a write failed may still arrive, and make its
        folder anew: removes it until none has come for a while."""
        quiet = 0
        for _ in range(40):
            quiet = 0 if self._unfinished() else quiet + 1
            if quiet == 3:
                return
            self._remove_unfinished()
            time.sleep(0.05)

    def _unfinished(self) -> list[Path]:
        return [*self.directory.glob(f"*{UNFINISHED}*")]

    def _set_aside(self, stale: list[int]) -> None:
        if not stale:
            return
        if jax.process_index() == 0:
            aside = self.directory / "superseded"
            aside.mkdir(exist_ok=True)
            for other in stale:
                names = (aside / f"{other}.{count}" for count in itertools.count())
                free = next(name for name in names if not name.exists())
                self.folder(other).rename(free)
        multihost_utils.sync_global_devices("oasis_jax.checkpoints: set aside")
        self._manager.reload()


def _of_the_system(error: BaseException) -> str | None:
    """What the system said, in its words; None if it was not the system."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        number = re.search(r"os_error_code='(\d+)'", str(seen))  # TensorStore's
        if number:
            return os.strerror(int(number[1]))
        seen = seen.__cause__ or seen.__context__
    return None


_hooks: list[Any] = []


def _quieten() -> None:
    """What Orbax raises here it also logs, with its traceback; one sentence is enough.

    When one of several reads or writes fails, it also closes its event loop on the
    others, whose complaints then come from TensorStore's threads and help nobody.
    """
    logging.getLogger("absl").addFilter(_is_no_error_of_orbax)
    logging.getLogger("asyncio").addFilter(_is_no_task_of_orbax)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited")
    if sys.unraisablehook is not _unraisable:
        _hooks.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable


def _is_no_error_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _is_no_task_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.getMessage()


def _unraisable(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        _hooks[-1](unraisable)
