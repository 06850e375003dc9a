"""Where text comes from: files, folders, and the Python standard library's own source."""

import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from train.errors import DataError

_ENDINGS = {".txt", ".md", ".rst", ".tex", ".html", ".jsonl", ".py", ".c", ".h", ".cc"}
_ENDINGS |= {".cpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".jl", ".sh", ".toml"}
_ACCEPTED = (
    "a .txt, .jsonl or other text file, a directory of such files, tfds:NAME, or"
    " nothing at all for the Python standard library"
)


def standard_library() -> list[Path]:
    """The source files of this Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    files = sorted(root.rglob("*.py"))
    return [file for file in files if skipped.isdisjoint(file.relative_to(root).parts)]


def text_files(data: str) -> list[Path]:
    """The file, or the text files below the directory, in order.

    Raises:
      DataError: if there is none.
    """
    path = Path(data).expanduser()
    files = [
        file
        for file in (path.rglob("*") if path.is_dir() else [path])
        if file.is_file()
        and file.suffix.lower() in _ENDINGS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not data or not path.exists():
        raise DataError(f"data {data!r} does not exist; accepted are {_ACCEPTED}")
    if not files:
        raise DataError(
            f"data {data!r} is no text file, or a directory without any;"
            f" accepted are {_ACCEPTED}"
        )
    return sorted(files)


def read_documents(files: Iterable[Path], skip_undecodable: bool) -> Iterator[str]:
    """Yields the documents that are not blank."""
    for path in files:
        try:
            is_json = path.suffix.lower() == ".jsonl"
            texts = _json_lines(path) if is_json else [_decode(path, path.read_bytes())]
        except DataError:
            if not skip_undecodable:
                raise
            continue
        yield from (text for text in texts if text and not text.isspace())


def _json_lines(path: Path) -> Iterator[str]:
    expected = 'one JSON object per line with a string field "text"'
    for place, record in json_objects(path, expected):
        if not isinstance(text := record.get("text"), str):
            found = json.dumps(record, ensure_ascii=False)[:60]
            raise DataError(f"{place}: expected {expected}, found {found!r}")
        yield text


def json_objects(
    path: Path, expected: str = "one JSON object per line"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every object of a `.jsonl` file, and where it is: "file:line".

    Raises:
      DataError: if a line is not UTF-8, or not what is `expected`.
    """
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(path, raw, offset).strip("\ufeff \t\r\n")
            offset += len(raw)
            if not line:
                continue
            try:
                record = json.loads(line)
                if "\\u" in line:
                    # JSON can spell half a surrogate pair; UTF-8 cannot.
                    json.dumps(record, ensure_ascii=False).encode()
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}:{number}: expected {expected}, found {line[:60]!r}"
                )
            yield f"{path}:{number}", record


def existing_file(name: str) -> Path:
    """The path of a file.

    Raises:
      DataError: if there is none.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"data {name!r} is no file")
    return path


def read_text(path: Path) -> str:
    """All of a file, without the mark that some editors put in front.

    Raises:
      DataError: if it is not UTF-8.
    """
    return _decode(path, path.read_bytes()).removeprefix("\ufeff")


def _decode(path: Path, raw: bytes, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte 0x{raw[error.start]:02x} at offset {offset + error.start} is"
            " not UTF-8; convert the file (for instance with iconv) or leave it out"
        ) from error
