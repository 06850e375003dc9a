"""Files that are whole or not there, and folders that have one owner at a time."""

import contextlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import UserError

LOCK = ".lock"
"""The file in a folder that says, while it is locked, who is at work there."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an error of the system say which file it was about, which a write does not.

    Raises:
      OSError: as it came, with `path` for its file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under, beside `path`, which it replaces once it is whole.

    Whoever reads `path` sees the old file or the new one, never a part; where writing
    fails, the old one stays and nothing is left beside it.

    Example:
      >>> file = Path(tempfile.mkdtemp()) / "words.txt"
      >>> with replacing(file) as temporary:
      ...     written = temporary.write_text("whole")
      >>> file.read_text(), [f.name for f in file.parent.iterdir()]
      ('whole', ['words.txt'])
    """
    path = Path(path)
    # The ending stays, for libraries that go by it.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def owned(folder: Path, name: str) -> Iterator[None]:
    """Keeps a folder, made if it is absent, to this process, until it ends.

    The system frees the lock of a process that is gone, however it went. Where a file
    system has no locks, nobody is kept out.

    Args:
      folder: Left as it was found, but for what was put there meanwhile.
      name: What it is called in the message, such as "--out runs/first".

    Raises:
      UserError: if another process has it; says which, and where.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    held = _locked(file)
    if held is None:
        raise UserError(f"{name} is in use{_owner(file)}; wait for it, or stop it")
    try:
        about = {"host": socket.gethostname(), "process": os.getpid()}
        with contextlib.suppress(OSError):  # it only tells others who it is
            os.ftruncate(held, 0)
            os.write(held, json.dumps(about).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
            if made:
                folder.rmdir()  # fails, as it should, if there is something in it
        os.close(held)


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder below `parent`, for what is not finished, gone at the end.

    What processes that were killed left under the same prefix goes first; a folder whose
    process is alive, here or on another host that shares the disk, is left alone.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{prefix}*"):
        if left.is_dir() and not is_owned(left):
            shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        while True:
            folder = parent / f"{prefix}{secrets.token_hex(4)}"
            # Another process may take it for a left one before it is locked.
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(owned(folder, str(folder)))
                break
        try:
            yield folder
        finally:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != LOCK:
                    path.unlink()


def is_owned(folder: Path) -> bool:
    """Whether a process that is alive has the folder."""
    file = folder / LOCK
    if not file.exists():
        return False
    held = _locked(file)
    if held is not None:
        os.close(held)
    return held is None


def _locked(file: Path) -> int | None:
    """The open file, locked; None if another process has it."""
    try:
        import fcntl
    except ImportError:  # no Unix: there are no such locks
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    while True:
        held = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            return None
        except OSError:  # a file system without locks
            return held
        # Whoever had it may have removed it between our opening and our locking.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(held).st_ino == file.stat().st_ino:
                return held
        os.close(held)


def _owner(file: Path) -> str:
    try:
        about = json.loads(file.read_text())
        return f" by process {about['process']} on {about['host']}"
    except (OSError, ValueError, KeyError):
        return ""
