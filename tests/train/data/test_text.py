"""Files of any kind: read, or named in one sentence."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.data.documents import read_documents, text_files
from train.data.tables import read_table
from train.data.tasks import Columns
from train.data.text import json_objects, row_files
from train.errors import DataError

COLUMNS = Columns(("text",), "label")
ROWS = [{"text": "a\u2028b", "label": "x"}, {"text": "c" * 200_000, "label": "y"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
TABLE = "text{0}label\r\n" + "".join(f"{r['text']}{{0}}{r['label']}\r\n" for r in ROWS)


def parquet(rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    ".jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    ".json": json.dumps(ROWS).encode(),
    ".csv": TABLE.format(",").encode(),
    ".tsv": TABLE.format("\t").encode(),
    ".parquet": parquet(ROWS),
}
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pa.compress(raw, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_tables_of_every_kind(kind, packed, tmp_path):
    path = tmp_path / f"A{kind.upper()}{packed.upper()}"
    path.write_bytes(PACKERS[packed](CONTENTS[kind]))
    got = read_table(path, COLUMNS)
    assert [(one.text, one.label) for one in got] == [(*row.values(),) for row in ROWS]


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_and_out_of_proportion(packed, tmp_path):
    path = tmp_path / f"a.txt{packed}"
    whole = PACKERS[packed](b"text " * 9000)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"a.txt{packed}: is no whole {packed} file"):
        [*read_documents([path], False)]
    path.write_bytes(PACKERS[packed](bytes(100 << 20)))
    with pytest.raises(DataError, match="out of proportion"):
        [*read_documents([path], False)]


def test_files_of_a_folder_are_read_or_named(tmp_path):
    for name, content in {
        "a.TXT": b"\xef\xbb\xbfone\r\n",
        "b.txt.gz": gzip.compress(b"two"),
        "c.parquet": CONTENTS[".parquet"],
        "d.json": b'{"a": 1}',
        "e.bin": b"\xff",
        "f.txt": b"",
        ".g.txt": b"hidden",
    }.items():
        (tmp_path / name).write_bytes(content)
    files, note = text_files(str(tmp_path))
    texts = [row["text"] for row in ROWS]
    assert [*read_documents(files, False)] == ["one\r\n", "two", *texts]
    assert note.startswith("; 1 empty file; 2 files not read (d.json, e.bin)")
    assert text_files(str(tmp_path / "*.gz"))[0] == [tmp_path / "b.txt.gz"]
    (tmp_path / "u.txt").write_bytes("x".encode("utf-16"))
    with pytest.raises(DataError, match=r"u\.txt: is UTF-16, not UTF-8"):
        [*read_documents([tmp_path / "u.txt"], False)]


def test_shards_of_a_folder(tmp_path):
    for name in ("train-1.jsonl", "train-0.csv.gz"):
        (tmp_path / name).write_bytes(b"")
    files = row_files(str(tmp_path), (".jsonl", ".csv"))
    assert [file.name for file in files] == ["train-0.csv.gz", "train-1.jsonl"]
    (tmp_path / "test-0.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        row_files(str(tmp_path), (".jsonl", ".csv"))


def mutated(tmp_path, examples):
    kinds = [(kind, packed) for kind in (*CONTENTS, ".txt") for packed in ("", ".gz")]

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(
        st.sampled_from(kinds),
        st.booleans(),
        st.lists(st.tuples(st.floats(0, 0.999), st.binary(max_size=6)), max_size=4),
        st.binary(max_size=80),
    )
    def check(kind, outside, edits, junk):
        ending, packed = kind
        small = [{"text": "a b", "label": "x"}, {"text": 'c"', "label": "y"}]
        lines = "\n".join(map(json.dumps, small)).encode()
        raw = {
            ".jsonl": lines,
            ".json": json.dumps(small).encode(),
            ".parquet": parquet(small),
            ".txt": junk,
        }.get(ending, b"text,label\na,b\n")
        raw = PACKERS[packed](raw) if outside else raw
        for where, piece in edits:
            at = int(where * len(raw))
            raw = raw[:at] + piece + raw[at + len(piece) :]
        raw = raw if outside else PACKERS[packed](raw)
        path = tmp_path / f"a{ending}{packed}"
        path.write_bytes(raw)
        for read in (
            lambda: read_table(path, COLUMNS),
            lambda: [*read_documents([path], False)],
            lambda: [*json_objects(path)],
        ):
            try:
                read()
            except DataError as error:
                assert "\n" not in str(error)

    check()


def test_any_bytes_are_read_or_named(tmp_path):
    mutated(tmp_path, 150)


@pytest.mark.slow
def test_any_bytes_are_read_or_named_often(tmp_path):
    mutated(tmp_path, 5000)
