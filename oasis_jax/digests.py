"""Digests of a folder's files, kept in the folder, so that it can say whether it is whole.

`digests.json` lists every file with its size and a checksum for each piece of it:

    {"files": {"state/d/0a1b": {"bytes": 31, "sums": ["9ae0daaf"]}, ...},
     "later": [names of files that were yet to come], "crc32": of all of the above}

A checksum tells damage, not malice, and must cost little beside the writing, of which
SHA-256 would take a fifth and CRC-32 a tenth. So a piece's blocks of 32,768 words are
added up word by word, each turned a little further than the one before, and the CRC-32 of
the sums is kept. A word that changes changes a sum, and so does a block that moves. Pieces
are summed in parallel.
"""

import json
import mmap
import os
import zlib
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

NAME = "digests.json"
PIECE = 1 << 24
"""Bytes that have a checksum of their own; a multiple of every system's page."""
BLOCK = 1 << 18
"""Bytes that are added up at once; a processor keeps them near."""
TURN = 509
"""Words by which a block is turned further than the one before it."""
_UNFINISHED = f"{NAME}.new"


class Damaged(Exception):
    """A folder's files are not those that were sealed; says which, and how."""


def seal(folder: Path, *, later: Collection[str] = ()) -> None:
    """Writes the digests of all files of a folder.

    Example:
      >>> folder = Path(tempfile.mkdtemp())
      >>> _ = (folder / "words").write_text("some")
      >>> seal(folder), check(folder)
      (None, None)
      >>> _ = (folder / "words").write_text("sane")
      >>> check(folder)
      Traceback (most recent call last):
      oasis_jax.digests.Damaged: words was changed in bytes 0 to 3

    Args:
      later: Names of files that come, or become final, after this; `complete` adds them.

    Raises:
      OSError: if a file cannot be read or written.
    """
    files = sorted(_names(folder) - set(later))
    _write(folder, _digests(folder, files, _mapped), later)


def complete(folder: Path) -> None:
    """Adds the digests of the files that `seal` was told of, which are there now.

    A folder that has no digests is left as it is.
    """
    if not (folder / NAME).exists():
        return
    files, later = _read(folder)
    present = [name for name in later if (folder / name).is_file()]
    _write(folder, files | _digests(folder, present, _mapped), ())


def check(folder: Path) -> None:
    """Reads every file of a folder that has digests.

    Raises:
      Damaged: if a file was changed, cut, added or removed, or cannot be read.
    """
    if not (folder / NAME).exists():
        return
    files, later = _read(folder)
    present = _names(folder)
    for name in sorted(files.keys() - present):
        raise Damaged(f"{name} is missing")
    for name in sorted(present - files.keys() - set(later)):
        raise Damaged(f"{name} was not there when it was written")
    try:
        # Sizes first: they cost nothing.
        for name, digest in files.items():
            size, wanted = (folder / name).stat().st_size, digest["bytes"]
            if size != wanted:
                raise Damaged(f"{name} has {size:,} bytes instead of {wanted:,}")
        found = _digests(folder, files, _streamed)
    except OSError as error:
        raise Damaged(f"{error.filename or folder}: {error.strerror}") from error
    for name, digest in files.items():
        pairs = zip(digest["sums"], found[name]["sums"], strict=True)
        for piece, (one, other) in enumerate(pairs):
            if one != other:
                start, end = piece * PIECE, min((piece + 1) * PIECE, digest["bytes"])
                raise Damaged(f"{name} was changed in bytes {start:,} to {end - 1:,}")


def signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Sizes and times of all files; where it is the same, no program wrote to them."""
    stats = {name: (folder / name).stat() for name in sorted(_names(folder) | {NAME})}
    return tuple((name, s.st_size, s.st_mtime_ns) for name, s in stats.items())


def _names(folder: Path) -> set[str]:
    """Of all files below a folder, but for the digests themselves."""
    paths = (
        Path(parent, name) for parent, _, names in os.walk(folder) for name in names
    )
    names = {path.relative_to(folder).as_posix() for path in paths}
    return names - {NAME, _UNFINISHED}


def _read(folder: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        text = (folder / NAME).read_text()
        said = json.loads(text)
        if text != _text(said["files"], said["later"]):
            raise Damaged(f"{NAME} was changed")
        return said["files"], said["later"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{NAME} cannot be read") from error


def _write(folder: Path, files: dict[str, Any], later: Collection[str]) -> None:
    unfinished = folder / _UNFINISHED
    unfinished.write_text(_text(files, later))
    os.replace(unfinished, folder / NAME)


def _text(files: dict[str, Any], later: Collection[str]) -> str:
    said = {"files": files, "later": sorted(later)}
    crc = zlib.crc32(json.dumps(said).encode())
    return json.dumps(said | {"crc32": f"{crc:08x}"}, indent=1) + "\n"


def _digests(
    folder: Path, names: Iterable[str], total: Callable[[Path, int, int], int]
) -> dict[str, Any]:
    sizes = {name: (folder / name).stat().st_size for name in names}
    pieces = [
        (name, start, min(start + PIECE, size))
        for name, size in sizes.items()
        for start in range(0, size, PIECE)
    ]
    digests: dict[str, Any] = {n: {"bytes": s, "sums": []} for n, s in sizes.items()}
    # NumPy and zlib let other threads run.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        values = threads.map(lambda piece: total(folder / piece[0], *piece[1:]), pieces)
        for (name, *_), value in zip(pieces, values, strict=True):
            digests[name]["sums"].append(f"{value:08x}")
    return digests


def _mapped(path: Path, start: int, stop: int) -> int:
    """Of what was just written, and so is in memory: it is not copied."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(
                file.fileno(), stop - start, access=mmap.ACCESS_READ, offset=start
            ) as mapped,
            memoryview(mapped) as view,
        ):
            return _sum(view[at : at + BLOCK] for at in range(0, stop - start, BLOCK))
    except (OSError, ValueError):  # a file system that maps no files
        return _streamed(path, start, stop)


def _streamed(path: Path, start: int, stop: int) -> int:
    """Of what may not be readable, which ends a process that has mapped it."""
    with path.open("rb") as file:
        file.seek(start)
        return _sum(
            file.read(min(BLOCK, stop - at)) for at in range(start, stop, BLOCK)
        )


def _sum(blocks: Iterable[bytes | memoryview]) -> int:
    """Of blocks, of which the last may be shorter."""
    sums = np.zeros(BLOCK // 8, "<u8")
    value, turn = 0, 0
    for block in blocks:
        if len(block) < BLOCK:
            value = zlib.crc32(block)
            continue
        words = np.frombuffer(block, "<u8")
        for to, part in (
            (sums[turn:], words[: len(sums) - turn]),
            (sums[:turn], words[len(sums) - turn :]),
        ):
            np.add(to, part, out=to)
        turn = (turn + TURN) % len(sums)
    # Of a short file this is its CRC-32.
    return zlib.crc32(sums.tobytes(), value) if sums.any() else value
