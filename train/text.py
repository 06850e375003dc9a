"""Where text comes from, and how it becomes tokens."""

import dataclasses
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
import tokenizers

_PIECE = 1 << 20  # characters given to the tokenizer at once
_ENDINGS = {".txt", ".md", ".rst", ".tex", ".html", ".jsonl", ".py", ".c", ".h", ".cc"}
_ENDINGS |= {".cpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".jl", ".sh", ".toml"}
SEPARATORS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
_ACCEPTED = (
    "a .txt, .jsonl or other text file, a directory of such files, tfds:NAME, or"
    " nothing at all for the Python standard library"
)


class DataError(ValueError):
    """The data cannot be used; the message is one sentence meant for the user."""


@dataclasses.dataclass(frozen=True)
class Coder:
    """Text to tokens, and the token that ends a document."""

    encode: Callable[[str], Sequence[int] | np.ndarray]
    vocab_size: int
    separator: int
    identity: str  # goes into the fingerprint

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

    def document(
        self, text: str, advance: Callable[[int], object] = lambda characters: None
    ) -> Iterator[np.ndarray]:
        """Yields the tokens of one document in pieces, then its separator."""
        # A tokenizer keeps some 100 bytes per token while it works, so a book of a
        # gigabyte goes through it in pieces. They are cut at line ends, where
        # tokenizers split words anyway.
        start = 0
        while start < len(text):
            stop = text.find("\n", start + _PIECE) + 1 or len(text)
            yield np.asarray(self.encode(text[start:stop]), self.dtype)
            advance(stop - start)
            start = stop
        yield np.array([self.separator], self.dtype)


def coder_of(path: str | None) -> Coder:
    """Bytes for None, else the tokenizer of a `tokenizer.json`.

    Raises:
      DataError: if the file cannot be read as one.
    """
    if path is None:
        return Coder(lambda text: np.frombuffer(text.encode(), np.uint8), 256, 0, "")
    tokenizer, content = open_tokenizer(path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    size = vocabulary_size(tokenizer)
    found = [vocabulary[token] for token in SEPARATORS if token in vocabulary]
    separator = found[0] if found else size
    return Coder(
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        max(size, separator + 1),
        separator,
        content,
    )


def open_tokenizer(path: str | Path) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer of a `tokenizer.json`, and the file's content.

    It neither truncates nor pads: the file may carry the limits of the model that it
    was trained for.

    Raises:
      DataError: if the file cannot be read as one.
    """
    try:
        content = Path(path).expanduser().read_text("utf-8")
        tokenizer = tokenizers.Tokenizer.from_str(content)
    # The tokenizers library raises bare Exception for a malformed file.
    except Exception as error:
        raise DataError(
            f"tokenizer {str(path)!r} cannot be read as a tokenizer.json: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, content


def byte_tokenizer() -> tokenizers.Tokenizer:
    """What `coder_of(None)` does, as a tokenizer: a token is a byte.

    >>> byte_tokenizer().encode("né").ids, byte_tokenizer().decode([110, 195, 169])
    ([110, 195, 169], 'né')
    """
    # As GPT-2 spells bytes: those that can be seen as they are, the others from 256 on.
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    spelled = {chr(byte): byte for byte in seen}
    spelled |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(spelled, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def vocabulary_size(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the largest token; there may be gaps below it."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def check_fits(size: int, vocab_size: int, seq: int, positions: int | None) -> None:
    """Holds a tokenizer of `size` tokens and rows of `seq` to the model's limits.

    Raises:
      DataError: if the embedding is too small, or there are too few positions.
    """
    if size > vocab_size:
        raise DataError(
            f"the tokenizer has {size:,} tokens, but the model's embedding has only"
            f" {vocab_size:,}; take the tokenizer that belongs to the model"
        )
    if positions is not None and seq > positions:
        raise DataError(
            f"seq {seq:,} exceeds the model's {positions:,} positions; shorten seq"
        )


def progress_bar(shown: bool) -> rich.progress.Progress:
    """A bar on standard error, if that is a terminal and the bar is to be `shown`."""
    return rich.progress.Progress(
        console=rich.console.Console(stderr=True),
        disable=not (shown and sys.stderr.isatty()),
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
