"""What is in files: text, and rows as objects."""

import glob
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from train.data.compression import (
    OPENERS,
    ending,
    limit_of,
    lines,
    opened,
    read_whole,
    too_large,
)
from train.errors import DataError

_BATCH = 64  # rows of a Parquet file decoded at once
_MARKS = {
    "UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"),
    "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
}
_SPLIT = re.compile("(train|valid(?:ation)?|val|dev|test|eval)(?=[^a-z]|$)")

OBJECTS = (".jsonl", ".json", ".parquet")
"""Endings of files whose rows are objects."""


def json_objects(
    path: Path,
    expected: str = "one JSON object per line",
    *,
    columns: Collection[str] = (),
    whole: bool = True,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a file, and where each is: "file:line", or "file, row 3".

    Args:
      path: A `.jsonl`, a `.json` (lines as well, or one list) or a `.parquet`, compressed
        or not.
      expected: What a row should be, for messages.
      columns: What is read of a `.parquet` that has them; all if empty.
      whole: All rows are going to be held, not one at a time; see `compression.limit_of`.

    Raises:
      DataError: if the file is damaged, not UTF-8, out of proportion, or a row is not
        what is `expected`.
    """
    kind = ending(path)
    if kind == ".parquet":
        return _parquet_rows(path, columns, whole)
    if kind == ".json" and _is_list(path):
        return _list_items(path, expected)
    return _json_lines(path, expected, whole)


def row_files(name: str, endings: Collection[str]) -> list[Path]:
    """The file; or those of a directory, or a pattern such as `rows-*.jsonl`, in order.

    Args:
      endings: Of what is taken from a directory or a pattern.

    Raises:
      DataError: if there is none, or a directory has several splits.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    found = [file for file in matching(name) if ending(file) in endings]
    if not found:
        if path.is_dir():
            raise DataError(f"data {name!r} has no {', '.join(endings)} files")
        raise DataError(f"data {name!r} is no file")
    if path.is_dir():
        words = (_SPLIT.match(file.name.lower()) for file in found)
        splits = {word.group() for word in words if word}
        if len(splits) > 1:
            raise DataError(
                f"data {name!r} has files of several splits ({', '.join(sorted(splits))});"
                f" name those to be read, as with '{path / 'train*'}'"
            )
    return found


def matching(name: str) -> list[Path]:
    """The file, the files below a directory, or those of a pattern, in order.

    Hidden ones are left out, unless they are named.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        inside = ((file, file.relative_to(path).parts) for file in path.rglob("*"))
        found = [f for f, parts in inside if not any(p[0] == "." for p in parts)]
    elif path.exists() or not glob.has_magic(name):
        found = [path]
    else:
        found = [Path(file) for file in glob.glob(str(path), recursive=True)]
    return sorted(file for file in found if file.is_file())


def read_text(path: Path) -> str:
    """All of a file, without the mark that some editors put in front.

    Raises:
      DataError: if it is damaged, not UTF-8, or out of proportion.
    """
    return _decode(path, read_whole(path)).removeprefix("\ufeff")


def is_compressed(path: Path) -> bool:
    """Whether its ending says so."""
    return path.suffix.lower() in OPENERS


def _json_lines(
    path: Path, expected: str, whole: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    offset = 0
    for number, raw in enumerate(lines(path, whole), start=1):
        line = _decode(path, raw, offset).strip("\ufeff \t\r\n")
        offset += len(raw)
        if line:
            place = f"{path}:{number}"
            yield place, _object(place, _parsed(line), expected, line)


def _is_list(path: Path) -> bool:
    with opened(path) as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def _list_items(path: Path, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_text(path)
    items = _parsed(text)
    if not isinstance(items, list):
        raise DataError(f"{path}: expected a list of objects, found no JSON")
    for number, item in enumerate(items, start=1):
        place = f"{path}, row {number}"
        expected = expected.replace(" per line", "s in a list")
        yield place, _object(place, item, expected, repr(item))


def _parsed(text: str) -> Any:
    """What JSON says; None if it is no JSON, or none that could be written again."""
    try:
        parsed = json.loads(text)
        if "\\u" in text:
            # JSON can spell half a surrogate pair; UTF-8 cannot.
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return parsed


def _object(place: str, found: Any, expected: str, text: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise DataError(f"{place}: expected {expected}, found {text[:60]!r}")
    return found


def _parquet_rows(
    path: Path, columns: Collection[str], whole: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa  # half a second, for those who need it
    import pyarrow.parquet as pq

    limit = limit_of(path) or 0
    source = pa.BufferReader(read_whole(path)) if is_compressed(path) else str(path)
    number = held = 0
    try:
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            about, names = file.metadata, file.schema_arrow.names
            groups = (about.row_group(i) for i in range(about.num_row_groups))
            if any(group.total_byte_size > limit for group in groups):
                raise too_large(path)
            wanted = [*columns] if {*columns} <= {*names} else []
            for batch in file.iter_batches(_BATCH, columns=wanted or None):
                held = batch.nbytes + held * whole
                if held > limit:
                    raise too_large(path)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    # Arrow raises its own, which are of any kind, and Python's where text is no UTF-8.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise DataError(
            f"{path}: cannot be read as Parquet after row {number}: {said[:200]}"
        ) from error


def _decode(path: Path, raw: bytes, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        for name, marks in _MARKS.items():
            if not offset and raw.startswith(marks):
                raise DataError(
                    f"{path}: is {name}, not UTF-8; convert it, as with"
                    f" iconv -f {name} -t UTF-8"
                ) from error
        raise DataError(
            f"{path}: byte 0x{raw[error.start]:02x} at offset {offset + error.start} is"
            " not UTF-8; convert the file (for instance with iconv) or leave it out"
        ) from error
