"""Layouts, batches, metrics and error messages of train/tasks.py and train/tables.py."""

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
from tokenizers import models, pre_tokenizers, processors, trainers

from train.tasks import TASKS, load_task, metrics
from train.text import DataError

GLUE = Path(
    os.environ.get("OASIS_GLUE") or Path(__file__).parents[2] / "../shared/data/glue"
).resolve()
WORDS = "a cat sat on the mat and dogs ran far away from it".split()
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]

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


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A WordPiece tokenizer as BERT's, whose file asks for truncation and padding."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator([*WORDS, "0123456789"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def load(tokenizer_file):
    def call(name, data, **options):
        options = {"seq": 16, "vocab_size": 1000, "progress": False} | options
        return load_task(name, str(data), tokenizer_file, **options)

    return call


def words(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


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
    assert (data.train_size, data.dev_size) == (1, 2)
    assert data.labels == TASKS[name].labels
    batch = next(data.train(2, 0))
    each = {"firsts": [0], "labels": [label], "weights": [1]}
    want = expected(tokenizer_file, texts, 16) | each
    for key, value in want.items():
        np.testing.assert_array_equal(batch[key], np.stack([value] * 2), key)
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
        text_pair="pair",
        seq=9,
    )
    assert "2 truncated to 9 tokens" in data.description  # in either split
    rows = {batch["labels"].item(): batch for batch in data.dev(1)}
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
    got = [batch["labels"].item() for batch in data.dev(1)]
    assert sorted(got) == ([0, 1] if ending == "jsonl" else [0, 1, 1])


def test_a_tenth_is_held_out(labelled, load):
    data = load("classification", labelled)
    assert (data.train_size, data.dev_size) == (36, 4)
    assert (
        "36 training and 4 held-out examples (a tenth, by seed 0)" in data.description
    )
    train = {row.tobytes() for row in next(data.train(36, 0))["tokens"]}
    held = {row.tobytes() for batch in wide(data.dev(4), 16) for row in batch["tokens"]}
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
    assert data.labels == ()
    assert next(data.dev(2))["labels"].tolist() == [[1], [-2.5]]


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
    assert (data.train_size, data.dev_size) == (3, 2)
    rows = {b["segments"].sum(): b["labels"].item() for b in data.dev(1)}
    assert rows == {5: 0, 6: 1}
    options |= {"text": "sentence1", "text_pair": "sentence2"}
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
    assert data.dev_size == dev


# Batches


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_dev_has_every_example_once(batch, labelled, load):
    data = load("classification", labelled, eval_data=labelled, seq=22)
    batches = list(data.dev(batch))
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
    assert len(want) == data.train_size == data.dev_size == 40
    assert data.train_rows < 40 / (seq // 16) and single.train_rows == 40
    assert examples([next(data.train(data.train_rows, 0))]) == want
    assert examples(data.dev(3)) == want
    (batch,) = data.dev(40)
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
    prints = {
        load("classification", labelled).fingerprint,
        load("classification", labelled, seq=17).fingerprint,
        load("classification", labelled, text="label", label="text").fingerprint,
    }
    Path(labelled).write_text(Path(labelled).read_text().replace("yes", "on"))
    assert len(prints | {load("classification", labelled).fingerprint}) == 4


# Metrics


@pytest.mark.parametrize("seed", range(3))
def test_metrics_by_hand(seed):
    draw = np.random.default_rng(seed)
    labels, given = draw.integers(0, 2, (2, 50))
    tp, tn = np.sum(given & labels), np.sum((1 - given) & (1 - labels))
    fp, fn = np.sum(given & (1 - labels)), np.sum((1 - given) & labels)
    root = np.sqrt(float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    want = {"f1": 2 * tp / (2 * tp + fp + fn), "accuracy": (tp + tn) / 50}
    assert metrics("mrpc", given, labels) == pytest.approx(want)
    assert metrics("cola", given, labels) == pytest.approx(
        {"matthews": (tp * tn - fp * fn) / root}
    )
    values, scores = draw.normal(size=(2, 50))

    def pearson(x, y):
        x, y = x - x.mean(), y - y.mean()
        return x @ y / np.sqrt((x @ x) * (y @ y))

    ranks = [v.argsort().argsort().astype(float) for v in (values, scores)]
    want = {"pearson": pearson(values, scores), "spearman": pearson(*ranks)}
    assert metrics("stsb", values, scores) == pytest.approx(want)
    assert metrics("classification", values, scores) == pytest.approx(want)
    assert metrics("classification", [0, 2, 1], [0, 2, 2]) == {"accuracy": 2 / 3}


@pytest.mark.parametrize("name", [name for name in TASKS if name != "rte"])
@pytest.mark.parametrize("value", [0, 1])
def test_constant_predictions(name, value):
    kind = float if name == "stsb" else int
    for labels in ([0, 1, 1], [0, 0, 0], [1]):
        got = metrics(name, [kind(value)] * len(labels), np.array(labels, kind))
        assert [*got] == [*TASKS[name].metrics]
        assert all(np.isfinite(score) for score in got.values())
        if name in ("cola", "stsb") or (name == "mrpc" and not value):
            assert next(iter(got.values())) == 0
    assert metrics("stsb", [np.nan, 1.0], [1.0, 2.0]) == {"pearson": 0, "spearman": 0}


# Errors


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a,b\n", {}, r"data.csv:1: no column 'text' among \['a', 'b'\]"),
        ("text,label\n", {}, "data.csv' is empty"),
        ("", {}, "data.csv' is empty"),
        ("text,label\na,x\nb\n", {}, r"csv:3: 1 columns, where 2 .*\(text, label\)"),
        ('text,label\na,x\n"b,y\nc,x\n', {}, "csv:3: a quotation mark opens"),
        ('text,label\n"a\nb","x\nc,y\n"d",y', {}, "csv:3: a quotation mark opens"),
        ('"text,label\na,x', {}, "csv:1: a quotation mark opens"),
        ("text,label\na,x\nb,\n", {}, "csv:3: there is no label in 'label'"),
        ("text,label\na,x\n", {}, "has the one label 'x' only"),
        (b"text,label\na,x\ncaf\xe9,y", {}, "byte 0xe9 at offset 18 is not UTF-8"),
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
def test_errors_of_a_csv(content, options, message, tmp_path, load):
    path = tmp_path / "data.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load("classification", path, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", "a", "d.txt' is no .csv, .tsv or .jsonl file"),
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
def test_errors_of_other_files(name, content, message, tmp_path, load):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load("classification", tmp_path / name)


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
        load_task("cola", "x", tmp_path / "tokenizer.json", seq=8, vocab_size=9)
