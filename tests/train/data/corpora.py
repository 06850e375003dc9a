"""Small corpora for tests, and how their tokens are read back."""

import dataclasses
import itertools
import json

import numpy as np
import tokenizers

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "away"]
VOCABULARY = "a cat sat on the mat and dogs ran far away from it".split()
"""The words of the tokenizer in `tokenizer_file`."""


def document(seed: int, words: int = 12) -> str:
    """Random words; no two seeds have the same."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words)) + f" é{seed}\n"


def windows(data, split: str, seq: int) -> list[dict[str, np.ndarray]]:
    """The rows of a split in order, of another length than the data was loaded for."""
    return list(dataclasses.replace(data, seq=seq).rows(split, lambda d: d))


def stream(data, split: str) -> np.ndarray:
    """All tokens of a split of local text, read through its windows."""
    rows = [row["tokens"] for row in windows(data, split, 1)]
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


def check_resume(data, consumed: int):
    """A new iterator goes on where another one was, by the state that it had."""
    iterator = data.train(4, 3)
    take(iterator, consumed)
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint stores it
    want = take(iterator, 3)
    fresh = data.train(4, 3)
    next(fresh)
    fresh.set_state(state)
    assert_same(want, take(fresh, 3))


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
