"""Local text: windows, batches, resuming, and the cache."""

import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.train.data.corpora import (
    assert_same,
    check_resume,
    stream,
    take,
    texts,
    windows,
)
from train.data.coder import Coder
from train.errors import DataError

# Windows


@pytest.mark.parametrize("seq", [1, 5, 16, 50])
def test_windows_and_segments(folder, load_text, seq):
    data = load_text(folder, seq=seq)
    tokens = stream(data, "train")
    rows = list(data.rows("train", lambda d: d))
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


def test_a_last_block_may_be_empty(tmp_path, load_text):
    text = "x" * (10 * 16 - 1)  # and a separator: 144 tokens to train on, 9 blocks
    (tmp_path / "a.txt").write_text(text)
    data = load_text(tmp_path / "a.txt")
    assert (len(stream(data, "train")), len(stream(data, "validation"))) == (144, 16)


@pytest.mark.parametrize("seq", [10, 90, 100])
def test_too_short_for_seq(tmp_path, load_text, seq):
    (tmp_path / "a.txt").write_text("x" * 99)
    message = f"seq {seq} needs at least {seq + 1}.* 90 training and 10 held-out tokens"
    with pytest.raises(DataError, match=message):
        load_text(tmp_path / "a.txt", seq=seq)
    assert len(list(load_text(tmp_path / "a.txt", seq=9).validation(1))) == 1


# Training batches


def test_seed_decides_the_order(folder, load_text):
    data = load_text(folder, seq=16)
    first = take(data.train(4, 0), 5)
    assert first[0]["tokens"].shape == first[0]["segments"].shape == (4, 17)
    assert_same(first, take(data.train(4, 0), 5))
    other = take(data.train(4, 1), 5)
    assert not np.array_equal(first[0]["tokens"], other[0]["tokens"])


def test_each_epoch_is_a_new_order_of_all_windows(folder, load_text):
    data = load_text(folder, seq=16)
    total = len(windows(data, "train", 16))
    rows = [batch["tokens"].tobytes() for batch in take(data.train(1, 0), 2 * total)]
    assert sorted(rows[:total]) == sorted(rows[total:])
    assert rows[:total] != rows[total:]


def test_fewer_windows_than_a_batch(folder, load_text):
    batch = next(load_text(folder, seq=32).train(500, 0))
    assert batch["tokens"].shape == (500, 33)


@pytest.mark.parametrize("consumed", [0, 1, 7, 60])
def test_local_text_resumes(folder, load_text, consumed):
    check_resume(load_text(folder, seq=16), consumed)


# Validation


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_validation_covers_every_window_once(folder, load_text, batch):
    data = load_text(folder, seq=8)
    rows = windows(data, "validation", 8)
    batches = list(data.validation(batch))
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


def test_validation_stops_early(folder, load_text):
    whole, part = load_text(folder), load_text(folder, held_batches=2)
    assert_same(list(part.validation(2)), take(whole.validation(2), 2))
    assert len(list(whole.validation(2))) > 2


# The cache


def when_written(folder):
    """When something in a folder changed, at any depth."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_second_load_does_not_prepare_again(folder, load_text, tmp_path, monkeypatch):
    first = load_text(folder)
    before = when_written(tmp_path / "cache")
    monkeypatch.setattr(Coder, "document", lambda *args: pytest.fail("tokenised again"))
    second = load_text(folder)
    assert when_written(tmp_path / "cache") == before
    assert (second.fingerprint, second.description) == (
        first.fingerprint,
        first.description,
    )
    assert_same(take(first.train(2, 0), 2), take(second.train(2, 0), 2))


def test_changed_text_changes_the_fingerprint(folder, load_text):
    first = load_text(folder)
    (folder / "00.txt").write_text("something else")
    assert load_text(folder).fingerprint != first.fingerprint


def test_interrupted_preparation_is_redone(folder, load_text, tmp_path, monkeypatch):
    def killed(self, text, advance):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Coder, "document", killed)
        with pytest.raises(KeyboardInterrupt):
            load_text(folder)
    assert not list((tmp_path / "cache").iterdir())
    assert len(texts(load_text(folder), "train")) > 30


def test_nothing_is_left_in_the_temporary_folder(
    folder, load_text, tmp_path, monkeypatch
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    data = load_text(folder)
    assert not [*(tmp_path / "temporary").iterdir()]
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [data.fingerprint]


def test_tfds_can_read_the_cache(folder, load_text, tmp_path):
    data = load_text(folder)
    where = tmp_path / "cache" / data.fingerprint
    source = tfds.data_source("packed_text:1.0.0", split="train", data_dir=where)
    np.testing.assert_array_equal(source[0]["tokens"], stream(data, "train")[:16])
