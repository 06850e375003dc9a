"""Files of bytes, decompressed as they are read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from train.errors import DataError

FLOOR = 1 << 26
"""Bytes that a compressed file may always hold at once."""
FACTOR = 50
"""So many times its own size it may hold beyond that; text is packed to a fifth or so."""

_CHUNK = 1 << 20


def _zstandard(path: Path) -> IO[bytes]:
    import pyarrow as pa  # half a second, for the few who need it

    stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return cast(IO[bytes], io.BufferedReader(stream, _CHUNK))


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
"""Endings of compressed files, and what opens them."""


def ending(path: Path) -> str:
    """What is in a file, by its name: the ending in lower case, behind a compressor's.

    >>> ending(Path("Shard-00.JSONL.gz"))
    '.jsonl'
    """
    inner = path.stem if path.suffix.lower() in OPENERS else path.name
    return Path(inner).suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed if its ending says so.

    Raises:
      DataError: if it cannot be opened or, inside, not be read: it is damaged or cut short.
    """
    kind = path.suffix.lower()
    try:
        with OPENERS.get(kind, lambda path: path.open("rb"))(path) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DataError(f"{path}: {_reason(error, kind)}") from error


def limit_of(path: Path) -> int | None:
    """The most bytes that may be held of a file at once; None for a plain one.

    A compressed file of a few kilobytes can hold gigabytes of the same letter: whoever
    reads what must be held as a whole (a document, a line, a table) stops here.
    """
    packed = path.suffix.lower() in {*OPENERS, ".parquet"}
    return max(FLOOR, FACTOR * path.stat().st_size) if packed else None


def read_whole(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
      DataError: as `opened`, or if they are more than `limit_of` the file.
    """
    with opened(path) as file:
        if (limit := limit_of(path)) is None:
            return file.read()
        held = io.BytesIO()
        while chunk := file.read(_CHUNK):
            held.write(chunk)
            if held.tell() > limit:
                raise too_large(path)
        return held.getvalue()


def lines(path: Path, whole: bool) -> Iterator[bytes]:
    """The lines of a file, with their ends.

    Args:
      whole: All of them are going to be held, not one at a time.

    Raises:
      DataError: as `opened`, or if what is held is more than `limit_of` the file.
    """
    with opened(path) as file:
        limit, held = limit_of(path), 0
        while line := file.readline(-1 if limit is None else limit + 1):
            held = len(line) + held * whole
            if limit is not None and held > limit:
                raise too_large(path)
            yield line


def too_large(path: Path) -> DataError:
    """What is said of a file whose content is out of proportion."""
    return DataError(
        f"{path}: holds more than {limit_of(path):,} bytes in one document or table, out"
        f" of proportion to its {path.stat().st_size:,}; it may be damaged, or made to"
        " fill the memory; decompress it first if it is right"
    )


def _reason(error: Exception, kind: str) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    said = " ".join(str(error).split()) or type(error).__name__
    return f"is no whole {kind} file: {said}"
