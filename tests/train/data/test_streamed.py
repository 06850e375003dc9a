"""Text datasets of TFDS: splits, packing, resuming and error messages."""

from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.train.data.corpora import assert_same, check_resume, save_tokenizer, take
from train.errors import DataError


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
            # Past forty they come again, as some data sets have it.
            yield index, {self.feature: f"{split} {index % 40} é " * 4}


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
def test_tfds_splits(load_text, tfds_dir, sizes, held, train_documents):
    data = load_text("tfds:tiny_text/en", data_dir=tfds_dir(**sizes), seq=20)
    assert f"{train_documents} training" in data.description
    batches = list(data.validation(3))
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


def test_tfds_training(load_text, tfds_dir):
    where = tfds_dir(train=30, validation=3)
    data = load_text("tfds:tiny_text/en:1.2.0", data_dir=where, seq=16)
    assert data.vocab_size == 256
    first = take(data.train(4, 0), 20)
    assert_same(first, take(data.train(4, 0), 20))
    other = take(data.train(4, 1), 1)
    assert not np.array_equal(first[0]["tokens"], other[0]["tokens"])
    for batch in first:
        assert batch["tokens"].shape == (4, 17)
        ends = batch["tokens"][:, :-1] == 0
        np.testing.assert_array_equal(np.diff(batch["segments"]), ends)


@pytest.mark.parametrize("consumed", [0, 1, 7, 60])
def test_tfds_resumes(load_text, tfds_dir, consumed):
    where = tfds_dir(train=30, validation=3)
    data = load_text("tfds:tiny_text/en", data_dir=where, seq=16)
    check_resume(data, consumed)


def test_tfds_fingerprint_depends_on_the_tokenizer(load_text, tfds_dir, tmp_path):
    where = tfds_dir(train=30, validation=3)
    path = save_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    one = load_text("tfds:tiny_text/en", data_dir=where)
    two = load_text("tfds:tiny_text/en", path, data_dir=where)
    assert one.fingerprint == load_text("tfds:tiny_text/en", data_dir=where).fingerprint
    assert one.fingerprint != two.fingerprint
    assert next(two.train(2, 0))["tokens"].max() < two.vocab_size


def test_copies_of_what_is_held_out_are_not_trained_on(load_text, tfds_dir):
    where = tfds_dir(train=200)  # every document five times, and two held out
    data = load_text("tfds:tiny_text/en", data_dir=where, seq=300)
    held, seen = (
        {
            text
            for rows in batches
            for row in rows["tokens"]
            for text in bytes(row.astype(np.uint8)).split(b"\0")[:-1]
            if text.startswith(b"train") and text.count(b"train") == 4
        }
        for batches in (data.validation(2), take(data.train(4, 0), 200))
    )
    assert held and seen
    assert not held & seen
    check_resume(data, 9)


@pytest.mark.parametrize("name", ["tiny_text/fr", "c4/en", "no such/name!"])
def test_tfds_not_prepared(load_text, tfds_dir, name):
    where = tfds_dir(train=3)
    with pytest.raises(DataError) as error:
        load_text(f"tfds:{name}", data_dir=where)
    for part in (f"tfds:{name} is not prepared in {where}", "tfds build", "Beam"):
        assert part in str(error.value)


def test_tfds_without_text(load_text, tfds_dir):
    where = tfds_dir(feature="body", train=3)
    with pytest.raises(DataError, match=r"no feature 'text' among \['body'\]"):
        load_text("tfds:tiny_text/en", data_dir=where)


def test_tfds_too_small(load_text, tfds_dir):
    where = tfds_dir(train=1)
    with pytest.raises(DataError, match=r"too few documents.*\{'train': 1\}"):
        load_text("tfds:tiny_text/en", data_dir=where)


def test_tfds_without_random_access(load_text, tfds_dir, tmp_path):
    where = tmp_path / tfds_dir(train=3)
    for path in where.glob("tiny_text/en/1.2.0/*"):
        if path.name == "dataset_info.json":
            path.write_text(path.read_text().replace("array_record", "tfrecord"))
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    with pytest.raises(DataError, match=r"stored as tfrecord.*array_record"):
        load_text("tfds:tiny_text/en", data_dir=str(where))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "features",
            "text_feature.Text",
            "x.Evil",
            r"features.json: the feature class",
        ),
        ("features", '"pythonClassName": ', "", "features.json cannot be read"),
        ("features", '"text"', '"../text"', "features.json: .* a slash in it"),
        (
            "dataset_info",
            '"3"',
            '"9999999999999"',
            "a shard of '9999999999999' examples",
        ),
        (
            "dataset_info",
            '"train"',
            '"../train"',
            "'../train' is no name of a dataset",
        ),
        ("dataset_info", "{SPLIT}", "/x/{SPLIT}", "filepathTemplate .* is no name"),
        ("dataset_info", "{", "[", "dataset_info.json cannot be read"),
    ],
)
def test_what_strangers_may_write(
    file, old, new, message, load_text, tfds_dir, tmp_path
):
    where = tfds_dir(train=3)
    (path,) = (tmp_path / "tfds").rglob(f"{file}.json")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load_text("tfds:tiny_text/en", data_dir=where)
