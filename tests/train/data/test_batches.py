"""Epochs are exact, and what is equal stays on one side."""

import collections
import itertools
import json

import numpy as np
import pytest

from train.data.batches import normal, shared, shuffled, split_off
from train.errors import DataError


class Numbered:
    """Rows that know which they are, from 1 on."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"row": np.int32(index + 1), "weights": np.ones(2, np.float32)}


@pytest.mark.parametrize(("rows", "batch"), [(1, 4), (3, 4), (4, 4), (9, 4), (10, 1)])
@pytest.mark.parametrize("resumed", [None, 1, 3])
def test_an_epoch_has_each_row_once(rows, batch, resumed):
    epoch, epochs = -(-rows // batch), 4
    iterator, batches = shuffled(Numbered(rows), batch, 0), []
    for step in range(epochs * epoch):
        if step == resumed:
            state = json.loads(json.dumps(iterator.get_state()))
            iterator = shuffled(Numbered(rows), batch, 0)
            iterator.set_state(state)
        batches.append(next(iterator))
    orders = []
    for first in range(0, len(batches), epoch):
        part = batches[first : first + epoch]
        assert {len(one["row"]) for one in part} == {batch}
        seen = np.concatenate([one["row"] for one in part])
        weights = np.concatenate([one["weights"] for one in part])
        np.testing.assert_array_equal(weights, np.stack([seen > 0] * 2, 1))
        orders.append(seen[seen > 0].tolist())
        assert collections.Counter(orders[-1]) == dict.fromkeys(range(1, rows + 1), 1)
    assert rows < 3 or len({*map(tuple, orders)}) > 1  # each in an order of its own


def split(texts, size=2, seed=0):
    return split_off(texts, size, np.random.default_rng(seed), normal, "rows.jsonl")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("copies", [1, 2, 4, 30])
def test_equal_items_stay_on_one_side(copies, seed):
    spaces = (" ", "  ", "\r\n", "\t")
    texts = [f"a{spaces[t % 4]}{i}" for t in range(copies) for i in range(9)]
    stays, held, note = split(texts, seed=seed)
    assert sorted(stays + held) == sorted(texts)
    assert stays and held
    assert not {*map(normal, stays)} & {*map(normal, held)}
    assert shared(stays, held, normal) == ""
    said = f"; {len(texts) - 9} duplicate rows, kept on one side"
    assert note == ("" if copies == 1 else said)


def test_without_duplicates_the_size_is_met():
    texts = [str(i) for i in range(40)]
    stays, held, note = split(texts, size=7)
    assert (len(stays), len(held), note) == (33, 7, "")
    chosen = np.random.default_rng(0).permutation(40)[:7]
    assert held == [str(i) for i in sorted(chosen)]


def test_of_equal_items_some_are_held_out_all_the_same():
    stays, held, note = split(["a b", "a\tb", " a b"], size=1)
    assert (len(stays), len(held)) == (2, 1)
    assert note == "; all 3 rows are equal, those held out among them"
    with pytest.raises(DataError, match=r"'rows.jsonl' is too small .* part of it$"):
        split(["a"])


def test_what_is_shared_is_counted():
    assert shared(["a b", "c"], ["a  b"], normal) == (
        "; 1 held-out row is among the training rows"
    )
    twice = itertools.repeat("c", 2)
    assert shared(["c"], [*twice, "d"], normal).startswith("; 2 held-out rows are")
