"""Tasks with labels: layouts, batches, packing and error messages."""

import itertools
import json
import os
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers

from tests.train.data.corpora import VOCABULARY
from train.data.labelled import load_labelled
from train.data.tasks import CORRELATIONS, TASKS, Columns
from train.data.tokenizer import Limits
from train.errors import DataError

GLUE = Path(
    os.environ.get("OASIS_GLUE") or Path(__file__).parents[3] / "../shared/data/glue"
).resolve()

# A training line each, and what it holds: the texts, and the label's number.
TSV = {
    "cola": ("", 'gj04\t1\t\tthe "cat sat', ['the "cat sat'], 1),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '0\t7\t8\tthe cat " sat\ta dogs',
        ['the cat " sat', "a dogs"],
        0,
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        "0\ta cat sat\ta cat\tnot_entailment",
        ["a cat sat", "a cat"],
        1,
    ),
    "sst2": ("sentence\tlabel", "far away \t0", ["far away "], 0),
    "stsb": (
        "index\tgenre\tsentence1\tsentence2\tscore",
        "0\tnews\ta cat\tit ran\t3.800",
        ["a cat", "it ran"],
        np.float32(3.8),
    ),
}


@pytest.fixture
def load(tokenizer_file):
    def call(name, data, *, seq=16, vocab_size=1000, positions=None, **options):
        limits = Limits(seq, vocab_size, positions)
        options = {"progress": False} | options
        return load_labelled(name, str(data), tokenizer_file, limits, **options)

    return call


def words(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(VOCABULARY, count))


def jsonl(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def labelled(tmp_path):
    """Forty texts of one to twenty words, each told apart by its first token."""
    return jsonl(
        tmp_path / "data.jsonl",
        [
            {"text": f"{i} {words(i % 20, i)}", "label": ["no", "yes"][i % 3 == 0]}
            for i in range(40)
        ],
    )


# Layouts


@pytest.mark.parametrize("name", TSV)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_glue_layouts(name, end, tmp_path, load, tokenizer_file):
    header, line, texts, label = TSV[name]
    lines = [*filter(None, [header]), line]
    for split, copies in (("train", 1), ("dev", 2)):
        content = end.join([*lines, *lines[-1:] * (copies - 1)])  # no end of line
        (tmp_path / f"{split}.tsv").write_bytes(content.encode())
    data = load(name, tmp_path)
    assert (data.train_size, data.validation_size) == (1, 2)
    assert data.labels == TASKS[name].labels
    batch = next(data.train(1, 0))
    each = {"firsts": [0], "labels": [label], "weights": [1]}
    want = expected(tokenizer_file, texts, 16) | each
    for key, value in want.items():
        np.testing.assert_array_equal(batch[key], np.stack([value]), key)
    kind = np.float32 if name == "stsb" else np.int32
    assert batch["labels"].dtype == kind
    assert batch["weights"].dtype == np.float32
    assert {batch[key].dtype for key in ("tokens", "segments", "types", "firsts")} == {
        np.dtype(np.int32)
    }


def expected(tokenizer_file, texts, seq) -> dict[str, np.ndarray]:
    """The row of one or two texts that fit, put together from their words."""
    vocabulary = tokenizers.Tokenizer.from_file(str(tokenizer_file)).get_vocab()
    tokens, types = [vocabulary["[CLS]"]], [0]
    for kind, text in enumerate(texts):
        pieces = re.findall(r"\w+|[^\w\s]+", text)
        ids = [vocabulary.get(piece, vocabulary["[UNK]"]) for piece in pieces]
        tokens += [*ids, vocabulary["[SEP]"]]
        types += [kind] * (len(ids) + 1)
    rows = {"tokens": tokens, "segments": [1] * len(tokens), "types": types}
    return {key: np.pad(row, (0, seq - len(tokens))) for key, row in rows.items()}


def test_the_longer_text_is_cut_first(tmp_path, load, tokenizer_file):
    lines = [
        {"text": "a cat sat on the mat and ran", "pair": "it ran", "label": 1},
        {"text": "a cat", "pair": "dogs", "label": 2},
    ]
    data = load(
        "classification",
        jsonl(tmp_path / "a.jsonl", lines),
        eval_data=jsonl(tmp_path / "b.jsonl", lines),
        columns=Columns(("text", "pair"), "label"),
        seq=9,
    )
    assert "2 truncated to 9 tokens" in data.description  # in either split
    rows = {batch["labels"].item(): batch for batch in data.validation(1)}
    want = expected(tokenizer_file, ["a cat sat on", "it ran"], 9)
    for key, value in want.items():
        np.testing.assert_array_equal(rows[0][key][0], value)


@pytest.mark.parametrize(
    ("ending", "lines"),
    [
        ("csv", ["label,note,text", 'b,"x, ""y"",\nz",cat', "", "a,-,dogs", "b,-,mat"]),
        ("tsv", ["text\tlabel", "cat\tb", 'dogs\ta"', "mat\tb"]),
        (
            "jsonl",
            ['{"text": "cat", "label": 10, "x": null}', '{"text":"a","label":9}'],
        ),
    ],
)
def test_formats(ending, lines, tmp_path, load):
    path = tmp_path / f"data.{ending}"
    path.write_text("\n".join(lines))
    data = load("classification", path, eval_data=str(path))
    want = {"csv": ("a", "b"), "tsv": ('a"', "b"), "jsonl": ("9", "10")}[ending]
    assert data.labels == want
    got = [batch["labels"].item() for batch in data.validation(1)]
    assert sorted(got) == ([0, 1] if ending == "jsonl" else [0, 1, 1])


def test_a_tenth_is_held_out(labelled, load):
    data = load("classification", labelled)
    assert (data.train_size, data.validation_size) == (36, 4)
    assert (
        "36 training and 4 held-out examples (a tenth, by seed 0)" in data.description
    )
    train = {row.tobytes() for row in next(data.train(36, 0))["tokens"]}
    held = {
        row.tobytes()
        for batch in wide(data.validation(4), 16)
        for row in batch["tokens"]
    }
    assert len(train) == 36
    assert len(train | held) == 40
    again, other = (load("classification", labelled, seed=seed) for seed in (0, 1))
    assert data.fingerprint == again.fingerprint != other.fingerprint


def wide(batches, seq):
    """Batches as wide as those for training."""
    for batch in batches:
        rest = ((0, 0), (0, seq - batch["tokens"].shape[1]))
        rows = {
            key: np.pad(batch[key], rest) for key in ("tokens", "segments", "types")
        }
        yield batch | rows


def test_regression_of_any_file(labelled, tmp_path, load):
    path = jsonl(tmp_path / "r.jsonl", [{"text": "a", "label": v} for v in (1, -2.5)])
    data = load("classification", path, regression=True, eval_data=path, labels=1)
    assert (data.labels, data.metrics) == ((), CORRELATIONS)
    assert next(data.validation(2))["labels"].tolist() == [[1], [-2.5]]


class TinyGlue(tfds.core.GeneratorBasedBuilder):
    """Sentence pairs as TFDS would prepare them."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="rte")]

    def _info(self):
        names = ["entailment", "not_entailment"]
        features = {
            "sentence1": tfds.features.Text(),
            "sentence2": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=names),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        sizes = {"train": 3, "validation": 2}
        return {key: self._generate_examples(size) for key, size in sizes.items()}

    def _generate_examples(self, size):
        for i in range(size):
            yield i, {"sentence1": "a cat", "sentence2": "it " * i, "label": i % 2}


def test_tfds(tmp_path, load):
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder = TinyGlue(data_dir=tmp_path, config="rte", file_format="array_record")
    builder.download_and_prepare(download_config=config)
    options = {"data_dir": str(tmp_path)}
    data = load("rte", "tfds:tiny_glue/rte", **options)
    assert (data.train_size, data.validation_size) == (3, 2)
    rows = {b["segments"].sum(): b["labels"].item() for b in data.validation(1)}
    assert rows == {5: 0, 6: 1}
    options["columns"] = Columns(("sentence1", "sentence2"), "label")
    own = load("classification", "tfds:tiny_glue/rte", **options)
    assert own.labels == data.labels
    with pytest.raises(DataError, match=r"no column 'sentence' among \['label', 'sen"):
        load("cola", "tfds:tiny_glue/rte", **options)
    with pytest.raises(DataError, match="tfds:nothing/rte is not prepared in"):
        load("rte", "tfds:nothing/rte", **options)


@pytest.mark.parametrize(
    ("name", "folder", "train", "dev"),
    [
        ("cola", "CoLA", 8551, 1043),
        ("mrpc", "MRPC", (3667, 3668), 408),  # one of the copies about lacks a line
        ("rte", "RTE", 2490, 277),
        ("sst2", "SST-2", 67349, 872),
    ],
)
def test_files_of_glue(name, folder, train, dev, load):
    if not (GLUE / folder).is_dir():
        pytest.skip(f"no {folder} in {GLUE}; set OASIS_GLUE to where it is")
    data = load(name, GLUE / folder, seq=64)
    assert data.train_size in np.atleast_1d(train)
    assert data.validation_size == dev


# Batches


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_validation_has_every_example_once(batch, labelled, load):
    data = load("classification", labelled, eval_data=labelled, seq=22)
    batches = list(data.validation(batch))
    assert {len(b[key]) for b in batches for key in b} == {batch}
    assert {b["tokens"].shape[1] for b in batches} <= {5, 11, 22}
    assert batches[0]["tokens"].shape[1] == (22 if batch == 40 else 5)
    joined = [*wide(batches, 22)]
    joined = {key: np.concatenate([b[key] for b in joined]) for key in joined[0]}
    real = joined["weights"][:, 0] == 1
    assert real.sum() == 40
    assert not any(joined[key][~real].any() for key in joined)
    whole = next(
        load("classification", labelled, eval_data=labelled, seq=22).train(40, 0)
    )

    def rows(table):
        return sorted(
            (row.tobytes(), label.item())
            for row, label in zip(table["tokens"], table["labels"], strict=True)
        )

    assert rows({key: joined[key][real] for key in joined}) == rows(whole)


@pytest.mark.parametrize("seq", [16, 40, 64])
def test_packed_rows_hold_every_example_once(seq, labelled, load):
    def examples(batches):
        """Tokens, types and label of each example, wherever it is."""
        found = []
        for batch in batches:
            for row in range(len(batch["tokens"])):
                here = {key: value[row] for key, value in batch.items()}
                real = here["weights"] == 1
                for number, first in enumerate(here["firsts"][real], start=1):
                    (own,) = np.nonzero(here["segments"] == number)
                    assert own[0] == first and own[-1] - first == len(own) - 1
                    parts = (here["tokens"][own], here["types"][own])
                    label = here["labels"][number - 1].item()
                    found.append((*(part.tobytes() for part in parts), label))
                assert set(here["segments"]) <= {*range(real.sum() + 1)}
                assert not here["labels"][~real].any()
        return sorted(found)

    options = dict(eval_data=labelled, seq=seq)
    single = load("classification", labelled, **options)
    data = load("classification", labelled, packed=True, **options)
    want = examples([next(single.train(40, 0))])
    assert len(want) == data.train_size == data.validation_size == 40
    assert data.train_rows < 40 / (seq // 16) and single.train_rows == 40
    assert examples([next(data.train(data.train_rows, 0))]) == want
    assert examples(data.validation(3)) == want
    (batch,) = data.validation(40)
    assert batch["firsts"].shape == (40, seq // 8)
    prints = {
        load("classification", labelled, packed=True, seed=seed, **options).fingerprint
        for seed in (0, 1)
    }
    assert len(prints | {single.fingerprint}) == 3


def test_epochs_and_seeds(labelled, load):
    data = load("classification", labelled, eval_data=labelled)

    def epochs(seed):
        batches = itertools.islice(data.train(8, seed), 10)
        rows = [row.tobytes() for batch in batches for row in batch["tokens"]]
        return rows[:40], rows[40:]

    first, second = epochs(0)
    assert sorted(first) == sorted(second)
    assert first != second
    assert epochs(0) == (first, second) != epochs(1)


@pytest.mark.parametrize("consumed", [0, 3, 12])
def test_training_resumes(consumed, labelled, load):
    data = load("classification", labelled)
    iterator = data.train(8, 3)
    for _ in range(consumed):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = load("classification", labelled).train(8, 3)
    next(fresh)
    fresh.set_state(state)
    for want, got in itertools.islice(zip(iterator, fresh, strict=False), 3):
        for key in want:
            np.testing.assert_array_equal(want[key], got[key])


def test_fingerprint_follows_what_is_read(labelled, tmp_path, load):
    swapped = Columns(("label",), "text")
    prints = {
        load("classification", labelled).fingerprint,
        load("classification", labelled, seq=17).fingerprint,
        load("classification", labelled, columns=swapped).fingerprint,
    }
    Path(labelled).write_text(Path(labelled).read_text().replace("yes", "on"))
    assert len(prints | {load("classification", labelled).fingerprint}) == 4


# Errors


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text,label\na,x\n", {}, "has the one label 'x' only"),
        ("text,label\na,x\nb,y\n", {"labels": 3}, r"head has 3 .* needs 2 \(x, y\)"),
        ("text,label\na,1\nb,y\n", {"regression": True}, "csv:3: label 'y' is no num"),
        ("text,label\na,1\nb,inf\n", {"regression": True}, "label 'inf' is no number"),
        ("text,label\na,1\n", {"regression": True}, "too small to hold out"),
        (
            "text,label\na,x\nb,y",
            {"seq": 99, "positions": 64},
            "seq 99 .* 64 positions",
        ),
        (
            "text,label\na,x\nb,y",
            {"seq": 2},
            "no room for text beside 2 special tokens",
        ),
        ("text,label\na,x\nb,y", {"vocab_size": 5}, r"tokenizer has \d+ .* only 5;"),
        ("text,label\na,x\nb,y", {"eval_data": "no.csv"}, "'no.csv' is no file"),
    ],
)
def test_errors(content, options, message, tmp_path, load):
    path = tmp_path / "data.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load("classification", path, **options)


def test_errors_of_glue(tmp_path, load):
    good = "sentence\tlabel\na cat\t1\n"
    (tmp_path / "train.tsv").write_text(good)
    with pytest.raises(DataError, match=r"dev.tsv' is no file"):
        load("sst2", tmp_path)
    for bad, message in (
        ("a cat\t2", r"dev.tsv:3: label '2' is none of negative, positive, 0, 1"),
        ("a\tcat\t2", "dev.tsv:3: 3 columns, where 2 are expected"),
    ):
        (tmp_path / "dev.tsv").write_text(good + bad)
        with pytest.raises(DataError, match=message):
            load("sst2", tmp_path)
    with pytest.raises(DataError, match="cannot be combined with the file x"):
        load("sst2", "tfds:glue/sst2", eval_data="x")


def test_unreadable_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read as a tokenizer\.json"):
        load_labelled("cola", "x", tmp_path / "tokenizer.json", Limits(8, 9))
