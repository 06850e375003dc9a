"""What asks this process to stop, or to save, from outside.

SIGTERM, SIGINT and SIGHUP ask it to stop, SIGUSR1 to save and go on. Python runs a
handler only between two of its own instructions, and a step, a compilation or a wait for
a disk may take minutes. So a thread reads the signals too, and ends the process itself
where the main thread does not answer.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from train.errors import INTERRUPTED


def _present(*names: str) -> tuple[signal.Signals, ...]:
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


STOP = _present("SIGTERM", "SIGINT", "SIGHUP")
SAVE = _present("SIGUSR1")
PATIENCE = 4.0
"""Seconds in which a process that has nothing to save has to be gone."""
TOGETHER = 0.1
"""Seconds within which signals are one: `timeout` and terminals send some twice."""

_ours = False


def own_process() -> None:
    """Says that this process is a command's alone, which a signal may end."""
    global _ours
    _ours = True


class Signals:
    """What was asked of this process while it was `listening`.

    Attributes:
      stop: It shall stop.
      save: It shall save, and go on. Who does so sets it back.
    """

    def __init__(self) -> None:
        self.stop = self.save = False
        self._deferred = self._raises = False
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def defer(self) -> None:
        """From now on there is something to save: a first stop signal is only noted."""
        self._deferred = True

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Work that a stop signal interrupts, deferred or not.

        Raises:
          KeyboardInterrupt: when the signal comes, or if it has come already.
        """
        self._raises = True
        try:
            if self.stop:
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """What a handler does, in the main thread."""
        if number in SAVE:
            self.save = True
            return
        self._leave_terminal()
        first, self.stop = not self.stop, True
        if first and self._deferred and not self._raises:
            return
        if not _ours or (first and self._raises):
            raise KeyboardInterrupt
        if first:
            # Whatever runs now, an import say, may turn an exception into one of its own.
            _end("stopped")
        # The thread ends it after a second one.

    @property
    def patience(self) -> float | None:
        """Seconds to wait for the main thread after a stop signal; None is for ever."""
        return None if self._deferred else PATIENCE

    def _leave_terminal(self) -> None:
        """Words to a terminal that was closed would be errors, in the midst of saving."""
        for fd in self._terminals:
            if not os.isatty(fd):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, fd)
                os.close(nowhere)


@contextmanager
def listening(
    *,
    first: Callable[[], None] | None = None,
    last: Callable[[], None] | None = None,
) -> Iterator[Signals]:
    """Takes signals while it is entered; may be entered inside itself.

    Until `Signals.defer`, a stop signal ends the process, with exit code 130: by a thread
    where the main one does not hear it. After it, the first is noted, and a second one
    ends the process. In a process that is not ours (`own_process`), such as a notebook's,
    it raises KeyboardInterrupt instead.

    Outside the main thread no signal is taken: whoever runs us handles them.

    Args:
      first: Is called at the first stop signal, by a thread.
      last: Is called by it before it ends the process.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    # nohup has SIGHUP ignored, and wants it so.
    deaf = {s for s in STOP if s.name == "SIGHUP" and _handler(s) is signal.SIG_IGN}
    heard = [number for number in (*STOP, *SAVE) if number not in deaf]
    inbox, outbox = socket.socketpair()
    outbox.setblocking(False)
    before = {number: _handler(number) for number in heard}
    outer = signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(
        target=_watch, args=(signals, inbox, first, last), daemon=True
    )
    watcher.start()
    hook = sys.unraisablehook
    try:
        for number in heard:
            signal.signal(number, signals.note)
        # Raised in a collection of garbage it is lost; `stop` is not.
        sys.unraisablehook = lambda lost: (
            None if lost.exc_type is KeyboardInterrupt else hook(lost)
        )
        yield signals
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer)
        outbox.send(b"\0")
        watcher.join()
        inbox.close()
        outbox.close()


def _handler(number: signal.Signals) -> Callable | int | signal.Handlers:
    found = signal.getsignal(number)
    return signal.SIG_DFL if found is None else found  # None: not one of Python's


def _watch(
    signals: Signals,
    inbox: socket.socket,
    first: Callable[[], None] | None,
    last: Callable[[], None] | None,
) -> None:
    """Reads the numbers of signals until a zero."""
    asked: float | None = None
    while True:
        wait = signals.patience if asked is not None else None
        if not select.select([inbox], [], [], wait if _ours else None)[0]:
            _end("stopped", last)
        for number in inbox.recv(64):
            if number == 0:
                return
            if number not in STOP:
                continue
            if asked is None:
                asked = time.monotonic()
                if first is not None:
                    first()
            elif _ours and time.monotonic() - asked > TOGETHER:
                _end("stopped at once, by a second signal", last)


def _end(words: str, last: Callable[[], None] | None = None) -> None:
    """Ends the process, whatever its other threads do."""
    with contextlib.suppress(Exception):
        if last is not None:
            last()
    with contextlib.suppress(OSError):
        # A progress bar has hidden the cursor.
        cursor = "\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{cursor}{words}\n".encode())
    os._exit(INTERRUPTED)
