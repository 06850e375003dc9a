"""Which text is found, what is held out of it, and what is said of what is not text."""

import json
import os
import re
import sysconfig

import numpy as np
import pytest

from tests.train.data.corpora import document, stream, texts
from train.data.documents import standard_library
from train.errors import DataError


def test_directory_round_trips_with_whole_documents_held_out(folder, load_text):
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.md").write_bytes(b"crlf\r\nstays " * 4)
    (folder / "image.png").write_bytes(b"\xff\xfe")
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "blank.txt").write_text(" \n")
    data = load_text(folder)
    files = [
        path for path in sorted(folder.rglob("*")) if path.suffix in (".txt", ".md")
    ]
    want = [path.read_bytes().decode() for path in files]
    want = [text for text in want if text.strip() and text != "hidden"]
    train, held = texts(data, "train")[:-1], texts(data, "validation")[:-1]
    assert sorted(train + held) == sorted(want)
    assert train == [text for text in want if text in train]  # order is kept
    share = sum(map(len, held)) / sum(map(len, want))
    assert 0.05 <= share <= 0.1
    assert "41 documents" in data.description


def test_one_text_file_holds_out_its_tail(tmp_path, load_text):
    text = "".join(map(document, range(5)))
    (tmp_path / "book.txt").write_text(text, "utf-8")
    data = load_text(tmp_path / "book.txt")
    train, held = stream(data, "train"), stream(data, "validation")
    assert bytes(np.concatenate([train, held]).astype(np.uint8)).decode() == text + "\0"
    assert len(held) == (len(train) + len(held)) // 10


def test_few_large_documents_fall_back_to_the_tail(tmp_path, load_text):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 100)
    assert texts(load_text(tmp_path), "validation") == ["b" * 19, ""]


def test_json_lines_equal_files(folder, tmp_path, load_text):
    lines = [
        json.dumps({"text": p.read_text("utf-8")}) for p in sorted(folder.iterdir())
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n\n")
    data = load_text(tmp_path / "corpus.jsonl")
    assert data.fingerprint == load_text(folder).fingerprint
    assert "40 documents" in data.description


def test_equal_documents_stay_on_one_side(tmp_path, load_text):
    lines = [json.dumps({"text": document(seed % 30)}) for seed in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    data = load_text(tmp_path / "corpus.jsonl")
    train, held = texts(data, "train")[:-1], texts(data, "validation")[:-1]
    assert held
    assert not set(train) & set(held)


def test_standard_library_by_default(tmp_path, load_text, monkeypatch):
    for name in ("os.py", "site-packages/x.py", "test/y.py", "json/tests/z.py"):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name * 20)
    (tmp_path / "lib" / "latin.py").write_bytes(b"caf\xe9" * 20)
    paths = {"stdlib": str(tmp_path / "lib")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    data = load_text(None)
    assert "standard library: 1 document," in data.description
    assert texts(data, "train")[0].startswith("os.py")


def test_the_real_standard_library_is_found():
    files = standard_library()
    assert len(files) > 100
    assert not [path for path in files if "site-packages" in path.parts]


def test_nothing_is_printed_without_a_terminal(folder, load_text, capfd):
    load_text(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "gone.txt", "gone.txt' does not exist; accepted are"),
        ({}, "", "data '' does not exist"),
        ({"a.bin": b"x"}, "a.bin", "a.bin' is no text file"),
        ({"d/a.bin": b"x"}, "d", "d' is no text file, or a directory without any"),
        ({"a.txt": b""}, "a.txt", "a.txt' is empty"),
        ({"a.txt": b"ok \xe9t"}, "a.txt", "a.txt: byte 0xe9 at offset 3 is not UTF-8"),
        (
            {"a.jsonl": b'{"text": "ok"}\n\xff'},
            "a.jsonl",
            "a.jsonl: byte 0xff at offset 15",
        ),
        (
            {"a.jsonl": b'{"text": "ok"}\n{oops'},
            "a.jsonl",
            "a.jsonl:2: expected one JSON object per line with a string field",
        ),
        ({"a.jsonl": b"{oops"}, "a.jsonl", """ "text", found '{oops'"""),
        ({"a.jsonl": b'\n{"txt": "x"}'}, "a.jsonl", "a.jsonl:2: expected"),
        ({"a.jsonl": b'{"text": 3}'}, "a.jsonl", "a.jsonl:1: expected"),
        ({"a.jsonl": b'{"text": "\\ud800"}'}, "a.jsonl", "a.jsonl:1: expected"),
        ({"a.jsonl": b"[1]"}, "a.jsonl", "a.jsonl:1: expected"),
    ],
)
def test_source_errors(tmp_path, load_text, files, source, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        load_text(os.path.join(tmp_path, source) if source else "")
