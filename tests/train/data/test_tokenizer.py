"""Text to tokens: pieces, separators, sizes and error messages."""

import json
import re

import numpy as np
import pytest
import tokenizers

from tests.train.data.corpora import save_tokenizer, stream
from train.data import tokenizer
from train.data.coder import coder_of
from train.errors import DataError


@pytest.mark.parametrize("specials", [["</s>"], ["<pad>", "<|endoftext|>"], []])
def test_tokenizer_file(folder, load_text, tmp_path, specials):
    path = save_tokenizer(tmp_path / "tokenizer.json", specials)
    data = load_text(folder, path, seq=28)
    vocabulary = tokenizers.Tokenizer.from_file(path).get_vocab()
    separator = vocabulary[specials[-1]] if specials else len(vocabulary)
    assert data.vocab_size == len(vocabulary) + (not specials)
    tokens = stream(data, "train")
    lengths = np.diff(np.flatnonzero(tokens == separator))
    assert set(lengths.tolist()) == {14}  # twelve words, one unknown, the separator
    assert data.fingerprint != load_text(folder).fingerprint
    row = next(data.train(1, 0))
    assert row["segments"].max() >= 2


def test_large_vocabularies_need_more_than_16_bits(tmp_path, folder, load_text):
    model = tokenizers.models.WordLevel({"the": 0, "[UNK]": 70_000}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = load_text(folder, str(tmp_path / "tokenizer.json"))
    assert data.vocab_size == 70_002
    assert {0, 70_000, 70_001} == set(stream(data, "train").tolist())


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_tokenizer_errors(folder, load_text, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    message = re.escape(f"tokenizer {str(path)!r} cannot be read")
    with pytest.raises(DataError, match=message):
        load_text(folder, str(path))


def test_a_tokenizer_out_of_proportion(tmp_path):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # with a hole in it
    with pytest.raises(DataError, match="has 1,099,511,627,776 bytes, and at most"):
        tokenizer.open_tokenizer(path)
    for token, message in (
        (10**12, "cannot be read as a tokenizer"),
        (10**9, "has 2 tokens and numbers them up to 1,000,000,000, where at most"),
    ):
        model = {"type": "WordLevel", "vocab": {"a": 0, "b": token}, "unk_token": "a"}
        path.write_text(json.dumps({"model": model, "added_tokens": []}))
        with pytest.raises(DataError, match=message):
            coder_of(str(path))


def test_tokens_around_texts_are_the_models_too(tmp_path):
    """A template may put any number there, which no embedding has."""
    made = tokenizer.byte_tokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 5000)]
    )
    tokenizer.Limits(8, 5001).check(made)
    with pytest.raises(
        DataError, match="has 5,001 tokens, but the model's embedding has only 256"
    ):
        tokenizer.Limits(8, 256).check(made)
