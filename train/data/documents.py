"""Documents to pretrain on: of files, folders, and the standard library's own source."""

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from train.data.batches import counted
from train.data.compression import ending
from train.data.text import OBJECTS, json_objects, matching, read_text
from train.errors import DataError

_ENDINGS = {".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cc", ".cpp"}
_ENDINGS |= {".cu", ".rs", ".go", ".java", ".js", ".ts", ".jl", ".sh", ".toml"}
_ENDINGS |= {*OBJECTS}
_ACCEPTED = (
    "a .txt, .jsonl, .parquet or other text file, compressed (.gz, .bz2, .xz, .zst) or"
    " not, a directory or a pattern of such files, tfds:NAME, or nothing at all for the"
    " Python standard library"
)
_NAMED = 3  # files of those that are not read
_EXPECTED = 'one JSON object per line with a string field "text"'


def standard_library() -> list[Path]:
    """The source files of this Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    files = sorted(root.rglob("*.py"))
    return [file for file in files if skipped.isdisjoint(file.relative_to(root).parts)]


def text_files(data: str) -> tuple[list[Path], str]:
    """The file, or the text files of a directory or a pattern, in order.

    Returns:
      The files, and what is to be said of those that are there but not read, if any.

    Raises:
      DataError: if there is none.
    """
    path = Path(data).expanduser()
    there = matching(data) if data else []
    if not there and not (data and path.exists()):
        raise DataError(f"data {data!r} does not exist; accepted are {_ACCEPTED}")
    files = [file for file in there if ending(file) in _ENDINGS]
    if there == [path]:
        found, empty, others = files, [], []
    else:
        empty = [file for file in files if not file.stat().st_size]
        found = [file for file in files if file not in {*empty} and _has_text(file)]
        others = [file for file in there if file not in {*found, *empty}]
    if not files:
        raise DataError(
            f"data {data!r} is no text file, or a directory without any;"
            f" accepted are {_ACCEPTED}"
        )
    note = f"; {counted(len(empty), 'empty file')}" if empty else ""
    if others:
        names = [str(f.relative_to(path)) if path.is_dir() else f.name for f in others]
        names = names[:_NAMED]
        more = ", ..." if len(others) > _NAMED else ""
        note += (
            f"; {counted(len(others), 'file')} not read ({', '.join(names)}{more}),"
            " being no text by their endings"
        )
    return found, note


def _has_text(path: Path) -> bool:
    """False for a .json that is about something else, as there are in many folders."""
    if ending(path) != ".json":
        return True
    try:
        _, first = next(json_objects(path, whole=False), ("", {}))
    except DataError:
        return False
    return isinstance(first.get("text"), str)


def read_documents(files: Iterable[Path], skip_undecodable: bool) -> Iterator[str]:
    """Yields the documents that are not blank.

    A line, or a row, of `.jsonl`, `.json` and `.parquet` is a document; of others the
    file is, with its line ends as they are. Of a compressed file a document may have
    `compression.limit_of` bytes.

    Raises:
      DataError: if a file is damaged, not UTF-8, or a row has no text.
    """
    for path in files:
        try:
            rows = ending(path) in OBJECTS
            texts = _texts(path) if rows else [read_text(path)]
        except DataError:
            if not skip_undecodable:
                raise
            continue
        yield from (text for text in texts if text and not text.isspace())


def _texts(path: Path) -> Iterator[str]:
    rows = json_objects(path, _EXPECTED, columns=("text",), whole=False)
    for place, record in rows:
        if not isinstance(text := record.get("text"), str):
            found = str(record)[:60]
            raise DataError(f"{place}: expected {_EXPECTED}, found {found!r}")
        yield text
