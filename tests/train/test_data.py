"""Sources, packing, resuming and error messages of train/data.py."""

import itertools
import json
import os
import re
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers

from train import data as data_lib
from train import text as text_lib

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "away"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small blocks, so that tiny corpora have windows that cross several."""
    monkeypatch.setattr(data_lib, "_BLOCK", 16)


def document(seed: int, words: int = 12) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words)) + f" é{seed}\n"


@pytest.fixture
def folder(tmp_path):
    """Forty documents in a directory."""
    root = tmp_path / "corpus"
    root.mkdir()
    for seed in range(40):
        (root / f"{seed:02d}.txt").write_text(document(seed), "utf-8")
    return root


@pytest.fixture
def load(tmp_path):
    def call(source, tokenizer=None, **kwargs):
        source = None if source is None else str(source)
        return data_lib.load(source, tokenizer, cache=tmp_path / "cache", **kwargs)

    return call


def stream(data, split: str) -> np.ndarray:
    """All tokens of a split of local text, read through its windows."""
    rows = [row["tokens"] for row in data._rows(split, 1, lambda d: d)]
    return np.concatenate([rows[0][:1], *(row[1:] for row in rows)])


def texts(data, split: str) -> list[str]:
    return bytes(stream(data, split).astype(np.uint8)).decode().split("\0")


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(iterator, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


# Sources


def test_directory_round_trips_with_whole_documents_held_out(folder, load):
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.md").write_bytes(b"crlf\r\nstays " * 4)
    (folder / "image.png").write_bytes(b"\xff\xfe")
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "blank.txt").write_text(" \n")
    data = load(folder)
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


def test_one_text_file_holds_out_its_tail(tmp_path, load):
    text = "".join(map(document, range(5)))
    (tmp_path / "book.txt").write_text(text, "utf-8")
    data = load(tmp_path / "book.txt")
    train, held = stream(data, "train"), stream(data, "validation")
    assert bytes(np.concatenate([train, held]).astype(np.uint8)).decode() == text + "\0"
    assert len(held) == (len(train) + len(held)) // 10


def test_few_large_documents_fall_back_to_the_tail(tmp_path, load):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 100)
    assert texts(load(tmp_path), "validation") == ["b" * 19, ""]


def test_json_lines_equal_files(folder, tmp_path, load):
    lines = [
        json.dumps({"text": p.read_text("utf-8")}) for p in sorted(folder.iterdir())
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n\n")
    data = load(tmp_path / "corpus.jsonl")
    assert data.fingerprint == load(folder).fingerprint
    assert "40 documents" in data.description


def test_equal_documents_stay_on_one_side(tmp_path, load):
    lines = [json.dumps({"text": document(seed % 30)}) for seed in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    data = load(tmp_path / "corpus.jsonl")
    train, held = texts(data, "train")[:-1], texts(data, "validation")[:-1]
    assert held
    assert not set(train) & set(held)


def test_standard_library_by_default(tmp_path, load, monkeypatch):
    for name in ("os.py", "site-packages/x.py", "test/y.py", "json/tests/z.py"):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name * 20)
    (tmp_path / "lib" / "latin.py").write_bytes(b"caf\xe9" * 20)
    paths = {"stdlib": str(tmp_path / "lib")}
    monkeypatch.setattr(text_lib.sysconfig, "get_paths", lambda: paths)
    data = load(None)
    assert "standard library: 1 document," in data.description
    assert texts(data, "train")[0].startswith("os.py")


def test_the_real_standard_library_is_found():
    files = text_lib.standard_library()
    assert len(files) > 100
    assert not [path for path in files if "site-packages" in path.parts]


# Windows


@pytest.mark.parametrize("seq", [1, 5, 16, 50])
def test_windows_and_segments(folder, load, seq):
    data = load(folder)
    tokens = stream(data, "train")
    rows = list(data._rows("train", seq, lambda d: d))
    assert len(rows) == (len(tokens) - 1) // seq
    for index, row in enumerate(rows):
        want = tokens[index * seq : index * seq + seq + 1]
        np.testing.assert_array_equal(row["tokens"], want)
        segment, segments = 1, []
        for token in want:
            segments.append(segment)
            segment += token == 0
        assert row["segments"].tolist() == segments
        assert row["tokens"].dtype == row["segments"].dtype == np.int32


def test_a_last_block_may_be_empty(tmp_path, load):
    text = "x" * (10 * 16 - 1)  # and a separator: 144 tokens to train on, 9 blocks
    (tmp_path / "a.txt").write_text(text)
    data = load(tmp_path / "a.txt")
    assert (len(stream(data, "train")), len(stream(data, "validation"))) == (144, 16)


def test_long_documents_are_encoded_in_pieces(tmp_path, load, monkeypatch):
    monkeypatch.setattr(text_lib, "_PIECE", 7)
    text = "".join(map(document, range(3))) + "no newline at the end"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    data = load(tmp_path / "a.txt")
    both = np.concatenate([stream(data, "train"), stream(data, "validation")])
    assert bytes(both.astype(np.uint8)).decode() == text + "\0"


# Training batches


def test_seed_decides_the_order(folder, load):
    data = load(folder)
    first = take(data.train(4, 16, 0), 5)
    assert first[0]["tokens"].shape == first[0]["segments"].shape == (4, 17)
    assert_same(first, take(data.train(4, 16, 0), 5))
    other = take(data.train(4, 16, 1), 5)
    assert not np.array_equal(first[0]["tokens"], other[0]["tokens"])


def test_each_epoch_is_a_new_order_of_all_windows(folder, load):
    data = load(folder)
    total = len(list(data._rows("train", 16, lambda d: d)))
    rows = [
        batch["tokens"].tobytes() for batch in take(data.train(1, 16, 0), 2 * total)
    ]
    assert sorted(rows[:total]) == sorted(rows[total:])
    assert rows[:total] != rows[total:]


def test_fewer_windows_than_a_batch(folder, load):
    batch = next(load(folder).train(500, 32, 0))
    assert batch["tokens"].shape == (500, 33)


@pytest.mark.parametrize("consumed", [0, 1, 7, 60])
def test_local_text_resumes(folder, load, consumed):
    check_resume(load(folder), consumed)


def check_resume(data, consumed: int):
    iterator = data.train(4, 16, 3)
    take(iterator, consumed)
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint stores it
    want = take(iterator, 3)
    fresh = data.train(4, 16, 3)
    next(fresh)
    fresh.set_state(state)
    assert_same(want, take(fresh, 3))


# Validation


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_validation_covers_every_window_once(folder, load, batch):
    data = load(folder)
    rows = list(data._rows("validation", 8, lambda d: d))
    batches = list(data.validation(batch, 8))
    assert {len(element["tokens"]) for element in batches} == {batch}
    joined = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    weights = joined.pop("weights")
    assert weights.dtype == np.float32
    assert weights.shape == (len(batches) * batch, 8)
    assert (weights[: len(rows)] == 1).all()
    assert (weights[len(rows) :] == 0).all()
    assert (joined["segments"][len(rows) :] == 0).all()
    for key, value in joined.items():
        np.testing.assert_array_equal(value[: len(rows)], [row[key] for row in rows])


def test_validation_stops_early(folder, load):
    data = load(folder)
    assert_same(
        list(data.validation(2, 8, max_batches=2)), take(data.validation(2, 8), 2)
    )


# The cache


def test_second_load_does_not_prepare_again(folder, load, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(data_lib, "_write", lambda *args: pytest.fail("prepared again"))
    second = load(folder)
    assert (second.fingerprint, second.description) == (
        first.fingerprint,
        first.description,
    )
    assert_same(take(first.train(2, 8, 0), 2), take(second.train(2, 8, 0), 2))


def test_changed_text_changes_the_fingerprint(folder, load):
    first = load(folder)
    (folder / "00.txt").write_text("something else")
    assert load(folder).fingerprint != first.fingerprint


def test_interrupted_preparation_is_redone(folder, load, tmp_path, monkeypatch):
    def killed(self, text, advance):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text_lib.Coder, "document", killed)
        with pytest.raises(KeyboardInterrupt):
            load(folder)
    assert not list((tmp_path / "cache").iterdir())
    assert len(texts(load(folder), "train")) > 30


def test_tfds_can_read_the_cache(folder, load, tmp_path):
    data = load(folder)
    where = tmp_path / "cache" / data.fingerprint
    source = tfds.data_source("packed_text:1.0.0", split="train", data_dir=where)
    np.testing.assert_array_equal(source[0]["tokens"], stream(data, "train")[:16])


def test_nothing_is_printed_without_a_terminal(folder, load, capfd):
    load(folder)
    assert capfd.readouterr() == ("", "")


# Tokenizers


def save_tokenizer(path, specials: list[str]) -> str:
    """A word-level tokenizer whose file asks for truncation and padding."""
    vocabulary = {token: index for index, token in enumerate(["[UNK]", *set(WORDS)])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("specials", [["</s>"], ["<pad>", "<|endoftext|>"], []])
def test_tokenizer_file(folder, load, tmp_path, specials):
    path = save_tokenizer(tmp_path / "tokenizer.json", specials)
    data = load(folder, path)
    vocabulary = tokenizers.Tokenizer.from_file(path).get_vocab()
    separator = vocabulary[specials[-1]] if specials else len(vocabulary)
    assert data.vocab_size == len(vocabulary) + (not specials)
    tokens = stream(data, "train")
    lengths = np.diff(np.flatnonzero(tokens == separator))
    assert set(lengths.tolist()) == {14}  # twelve words, one unknown, the separator
    assert data.fingerprint != load(folder).fingerprint
    row = next(data.train(1, 28, 0))
    assert row["segments"].max() >= 2


def test_large_vocabularies_need_more_than_16_bits(tmp_path, folder, load):
    model = tokenizers.models.WordLevel({"the": 0, "[UNK]": 70_000}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = load(folder, str(tmp_path / "tokenizer.json"))
    assert data.vocab_size == 70_002
    assert {0, 70_000, 70_001} == set(stream(data, "train").tolist())


# Datasets of TFDS


class TinyText(tfds.core.GeneratorBasedBuilder):
    """A text dataset as TFDS would prepare it."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="en")]

    def __init__(self, sizes, feature="text", **kwargs):
        self.sizes, self.feature = sizes, feature
        super().__init__(config="en", file_format="array_record", **kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict({self.feature: tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples(split, size)
            for split, size in self.sizes.items()
        }

    def _generate_examples(self, split, size):
        for index in range(size):
            yield index, {self.feature: f"{split} {index} é " * 4}


@pytest.fixture
def tfds_dir(tmp_path):
    def prepare(feature="text", **sizes):
        tfds.disable_progress_bar()
        where = tmp_path / "tfds"
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        TinyText(sizes, feature, data_dir=where).download_and_prepare(
            download_config=config
        )
        return str(where)

    return prepare


@pytest.mark.parametrize(
    ("sizes", "held", "train_documents"),
    [
        ({"train": 30, "validation": 4}, [f"validation {i}" for i in range(4)], 30),
        ({"train": 30, "test": 4}, [f"test {i}" for i in range(4)], 30),
        ({"train": 30}, None, 29),
    ],
    ids=["validation", "test", "hold out"],
)
def test_tfds_splits(load, tfds_dir, sizes, held, train_documents):
    data = load("tfds:tiny_text/en", data_dir=tfds_dir(**sizes))
    assert f"{train_documents} training" in data.description
    batches = list(data.validation(3, 20))
    rows = np.concatenate([batch["tokens"] for batch in batches])
    weights = np.concatenate([batch["weights"] for batch in batches])
    segments = np.concatenate([batch["segments"] for batch in batches])
    text = bytes(rows[segments > 0].astype(np.uint8)).decode()
    documents = text.split("\0")[:-1]
    if held is None:
        assert len(documents) == 1
        assert documents[0].startswith("train")
    else:
        assert sorted(documents) == sorted(f"{name} é " * 4 for name in held)
    np.testing.assert_array_equal(weights, segments[:, 1:] > 0)


def test_tfds_training(load, tfds_dir):
    data = load("tfds:tiny_text/en:1.2.0", data_dir=tfds_dir(train=30, validation=3))
    assert data.vocab_size == 256
    first = take(data.train(4, 16, 0), 20)
    assert_same(first, take(data.train(4, 16, 0), 20))
    other = take(data.train(4, 16, 1), 1)
    assert not np.array_equal(first[0]["tokens"], other[0]["tokens"])
    for batch in first:
        assert batch["tokens"].shape == (4, 17)
        ends = batch["tokens"][:, :-1] == 0
        np.testing.assert_array_equal(np.diff(batch["segments"]), ends)


@pytest.mark.parametrize("consumed", [0, 1, 7, 60])
def test_tfds_resumes(load, tfds_dir, consumed):
    data = load("tfds:tiny_text/en", data_dir=tfds_dir(train=30, validation=3))
    check_resume(data, consumed)


def test_tfds_fingerprint_depends_on_the_tokenizer(load, tfds_dir, tmp_path):
    where = tfds_dir(train=30, validation=3)
    path = save_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    one = load("tfds:tiny_text/en", data_dir=where)
    two = load("tfds:tiny_text/en", path, data_dir=where)
    assert one.fingerprint == load("tfds:tiny_text/en", data_dir=where).fingerprint
    assert one.fingerprint != two.fingerprint
    assert next(two.train(2, 8, 0))["tokens"].max() < two.vocab_size


# Errors


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
def test_source_errors(tmp_path, load, files, source, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(data_lib.DataError, match=re.escape(message)):
        load(os.path.join(tmp_path, source) if source else "")


@pytest.mark.parametrize("seq", [10, 90, 100])
def test_too_short_for_seq(tmp_path, load, seq):
    (tmp_path / "a.txt").write_text("x" * 99)
    data = load(tmp_path / "a.txt")
    message = f"seq {seq} needs at least {seq + 1}.* 90 training and 10 held-out tokens"
    with pytest.raises(data_lib.DataError, match=message):
        data.train(1, seq, 0)
    with pytest.raises(data_lib.DataError, match=message):
        data.validation(1, seq)  # at once, not with the first batch
    assert len(list(data.validation(1, 9))) == 1


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_tokenizer_errors(folder, load, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    message = re.escape(f"tokenizer {str(path)!r} cannot be read")
    with pytest.raises(data_lib.DataError, match=message):
        load(folder, str(path))


@pytest.mark.parametrize("name", ["tiny_text/fr", "c4/en", "no such/name!"])
def test_tfds_not_prepared(load, tfds_dir, name):
    where = tfds_dir(train=3)
    with pytest.raises(data_lib.DataError) as error:
        load(f"tfds:{name}", data_dir=where)
    for part in (f"tfds:{name} is not prepared in {where}", "tfds build", "Beam"):
        assert part in str(error.value)


def test_tfds_without_text(load, tfds_dir):
    where = tfds_dir(feature="body", train=3)
    with pytest.raises(data_lib.DataError, match=r"no feature 'text' among \['body'\]"):
        load("tfds:tiny_text/en", data_dir=where)


def test_tfds_too_small(load, tfds_dir):
    where = tfds_dir(train=1)
    with pytest.raises(data_lib.DataError, match=r"too few documents.*\{'train': 1\}"):
        load("tfds:tiny_text/en", data_dir=where)


def test_tfds_without_random_access(load, tfds_dir, tmp_path):
    where = tmp_path / tfds_dir(train=3)
    for path in where.glob("tiny_text/en/1.2.0/*"):
        if path.name == "dataset_info.json":
            path.write_text(path.read_text().replace("array_record", "tfrecord"))
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    with pytest.raises(data_lib.DataError, match=r"stored as tfrecord.*array_record"):
        load("tfds:tiny_text/en", data_dir=str(where))
