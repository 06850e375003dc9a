"""Tables in files: what is read of them, and what is said of those that are broken."""

import pytest

from train.data.tables import read_table
from train.data.tasks import Columns
from train.errors import DataError

COLUMNS = Columns(("text",), "label")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "a,b\n", r"d.csv:1: no column 'text' among \['a', 'b'\]"),
        ("d.csv", "text,label\n", "d.csv' is empty"),
        ("d.csv", "", "d.csv' is empty"),
        (
            "d.csv",
            "text,label\na,x\nb\n",
            r"csv:3: 1 columns, where 2 .*\(text, label\)",
        ),
        ("d.csv", 'text,label\na,x\n"b,y\nc,x\n', "csv:3: a quotation mark opens"),
        ("d.csv", 'text,label\n"a\nb","x\nc,y\n"d",y', "csv:3: a quotation mark opens"),
        ("d.csv", '"text,label\na,x', "csv:1: a quotation mark opens"),
        ("d.csv", "text,label\na,x\nb,\n", "csv:3: there is no label in 'label'"),
        (
            "d.csv",
            b"text,label\na,x\ncaf\xe9,y",
            "byte 0xe9 at offset 18 is not UTF-8",
        ),
        ("d.txt", "a", "d.txt' is no .jsonl, .json, .parquet, .csv or .tsv file"),
        ("d.jsonl", '{"text": "a"}', r"jsonl:1: no column 'label' among \['text'\]"),
        ("d.jsonl", '\n{"text": 5, "label": 1}', "jsonl:2: 'text' is no text but 5"),
        ("d.jsonl", '{"text": "a", "label": null}', "jsonl:1: there is no label"),
        (
            "d.jsonl",
            "[1]",
            r"jsonl:1: expected one JSON object per line, found '\[1\]'",
        ),
        ("d.jsonl", '{"text": "\\ud800", "label": 1}', "jsonl:1: expected one JSON"),
    ],
)
def test_errors_of_tables(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_table(path, COLUMNS)


@pytest.mark.parametrize(
    ("ending", "content", "want"),
    {
        "quoted": (
            "csv",
            'label,note,text\nb,"x, ""y"",\nz",cat\n\na,-,"dogs"\n',
            [("cat", "b", 2), ("dogs", "a", 5)],
        ),
        "not quoted": (
            "tsv",
            'text\tlabel\ncat\tb\r\n"dogs"\ta"',
            [("cat", "b", 2), ('"dogs"', 'a"', 3)],
        ),
        "objects": (
            "jsonl",
            '{"text": "cat", "label": 10, "x": null}\n\n{"text": "é", "label": "9"}',
            [("cat", "10", 1), ("é", "9", 3)],
        ),
    }.values(),
)
def test_examples_know_their_line(ending, content, want, tmp_path):
    path = tmp_path / f"data.{ending}"
    path.write_bytes(content.encode())
    got = read_table(path, COLUMNS)
    assert got == [(text, label, f"{path}:{line}") for text, label, line in want]
