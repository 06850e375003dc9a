"""Tables of labelled text: files and TFDS datasets, read as examples."""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.data.batches import normal, split_off
from train.data.compression import ending
from train.data.tasks import Columns
from train.data.text import OBJECTS, json_objects, read_text
from train.data.tfds import open_prepared, random_access
from train.errors import DataError

TABLES = (*OBJECTS, ".csv", ".tsv")
"""Endings of files of labelled text."""

# A cell of a CSV and what ends it.
_CELL = re.compile(r'(?:"(?:[^"]|"")*+"|[^",\r\n][^,\r\n]*|)(?:,|\r\n|\n|\r|$)')


class Example(NamedTuple):
    """A line of a table: one text or a pair, as tokenizers take them, and its label."""

    text: str | tuple[str, ...]
    label: str
    place: str  # for messages: "file:line"


def read_table(path: Path, columns: Columns) -> list[Example]:
    """Reads a `.jsonl`, `.json`, `.parquet`, `.csv` (cells may be quoted) or `.tsv`.

    Of a `.tsv` cells are not quoted; any of them may be compressed.

    Raises:
      DataError: if there is no example, or one that cannot be read; with its line.
    """
    kind = ending(path)
    if kind in OBJECTS:
        rows = json_objects(path, columns=(*columns.text, columns.label))
        examples = [_example(place, record, columns) for place, record in rows]
    elif kind in (".csv", ".tsv"):
        lines = _unquoted(path) if kind == ".tsv" else _quoted(path)
        examples = [*_delimited(path, lines, columns)]
    else:
        raise DataError(
            f"data {str(path)!r} is no {', '.join(TABLES[:-1])} or {TABLES[-1]} file"
        )
    if not examples:
        raise DataError(f"data {str(path)!r} is empty: there is no example in it")
    return examples


def read_prepared(
    name: str, columns: Columns, data_dir: str | None
) -> dict[str, list[Example]]:
    """Reads the splits `train` and, if there is one, `validation` of a TFDS dataset.

    Raises:
      DataError: if the dataset, a split or a column is missing.
    """
    builder, where = open_prepared(name, data_dir)
    place = f"tfds:{name} in {where}"
    features = builder.info.features
    _require(place, sorted(features), columns)
    labels = getattr(features[columns.label], "names", None)
    sizes = {key: split.num_examples for key, split in builder.info.splits.items()}
    if not sizes.get("train"):
        raise DataError(f"{place}: no split 'train' among {sizes}")

    def example(split: str, index: int, record: dict[str, Any]) -> Example:
        cells = {
            key: cell.decode() if isinstance(cell := record[key], bytes) else cell
            for key in (*columns.text, columns.label)
        }
        number: Any = cells[columns.label]
        if labels and number >= 0:  # -1 is no label
            cells[columns.label] = labels[number]
        return _example(f"{place}, {split} {index}", cells, columns)

    names = [split for split in ("train", "validation") if sizes.get(split)]
    sources = random_access(builder, where, **{split: split for split in names})
    return {
        split: [example(split, index, source[index]) for index in range(len(source))]
        for split, source in sources.items()
    }


def hold_out(
    examples: list[Example], data: str, seed: int
) -> tuple[dict[str, list[Example]], str]:
    """Holds out a tenth, by chance: the splits `train` and `validation`.

    Returns:
      Both, and what is to be said of duplicates, if there are any.

    Raises:
      DataError: if there is but one example, or all are of the same text.
    """
    size, draw = max(1, len(examples) // 10), np.random.default_rng(seed)
    train, validation, note = split_off(examples, size, draw, content, data)
    return {"train": train, "validation": validation}, note


def content(example: Example) -> tuple[str, ...]:
    """What is equal in examples of the same text, whatever their labels."""
    texts = (example.text,) if isinstance(example.text, str) else example.text
    return tuple(map(normal, texts))


def found_labels(examples: list[Example], data: str) -> tuple[str, ...]:
    """The labels of examples, sorted; as numbers if they all are.

    Raises:
      DataError: if there is but one label.
    """
    found = {example.label for example in examples}
    if len(found) == 1:
        raise DataError(f"data {data!r} has the one label {found.pop()!r} only")
    by_number = all(re.fullmatch("-?[0-9]+", label) for label in found)
    return tuple(sorted(found, key=int if by_number else str))


def _delimited(
    path: Path, lines: Iterator[tuple[int, list[str]]], columns: Columns
) -> Iterator[Example]:
    header = columns.header or tuple(next(lines, (1, []))[1])
    if header:
        _require(f"{path}:1", header, columns)
    for number, cells in lines:
        if len(cells) != len(header):
            raise DataError(
                f"{path}:{number}: {len(cells)} columns, where {len(header)} are"
                f" expected ({', '.join(header)})"
            )
        record = dict(zip(header, cells, strict=True))
        yield _example(f"{path}:{number}", record, columns)


def _unquoted(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines of a TSV, where a quotation mark is one character like any other."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line := line.removesuffix("\r"):
            yield number, line.split("\t")


def _quoted(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV, and the lines in which they begin."""
    text = read_text(path)
    # The module refuses longer cells than 131,072 characters, unless it is told.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        # The reader notices at the next quotation mark, or at the end of the file.
        position = 0
        while position < len(text) and (cell := _CELL.match(text, position)):
            position = cell.end()
        if position < len(text):
            number = 1 + len(re.findall("\r\n|\n|\r", text[:position]))
        raise DataError(
            f"{path}:{number}: a quotation mark opens a cell here that does not end"
            f" with one ({error})"
        ) from error


def _require(place: str, there: Iterable[str], columns: Columns) -> None:
    for column in (*columns.text, columns.label):
        if column not in there:
            raise DataError(f"{place}: no column {column!r} among {[*there]}")


def _example(place: str, cells: dict[str, Any], columns: Columns) -> Example:
    _require(place, cells, columns)
    text = tuple(cells[column] for column in columns.text)
    for column, cell in zip(columns.text, text, strict=True):
        if not isinstance(cell, str):
            raise DataError(f"{place}: {column!r} is no text but {cell!r}")
    label = str(cells[columns.label]).strip()
    if cells[columns.label] is None or not label:
        raise DataError(f"{place}: there is no label in {columns.label!r}")
    return Example(text[0] if len(text) == 1 else text, label, place)
