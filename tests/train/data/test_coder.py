"""Documents to tokens: pieces, separators, and texts that spell special tokens."""

import numpy as np
import pytest
import tokenizers

from tests.train.data.corpora import document, save_tokenizer, stream
from train.data import coder as coding
from train.data.spelling import Spelling
from train.errors import DataError


def test_long_documents_are_encoded_in_pieces(tmp_path, load_text, monkeypatch):
    monkeypatch.setattr(coding, "PIECE", 7)
    text = "".join(map(document, range(3))) + "no newline at the end"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    data = load_text(tmp_path / "a.txt")
    both = np.concatenate([stream(data, "train"), stream(data, "validation")])
    assert bytes(both.astype(np.uint8)).decode() == text + "\0"


WORDS = "the cat saw a dog under one old tree </s> by <s> day fix [SEP] éè".split()


def words(count, seed=0):
    draw = np.random.default_rng(seed)
    between = draw.choice([" ", " ", "  ", "\n", "\n\n"], count)
    chosen = draw.choice(WORDS, count)
    return "".join(a + b for a, b in zip(chosen, between, strict=True))


def trained(model, trainer, **parts):
    made = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator([words(900, seed) for seed in range(3)], trainer)
    return made


@pytest.fixture(scope="module")
def kinds():
    """A tokenizer of each kind: they treat the beginning of a text, and words, each in a
    way of its own."""
    models, normalizers = tokenizers.models, tokenizers.normalizers
    pre, trainers = tokenizers.pre_tokenizers, tokenizers.trainers
    special = {"special_tokens": ["<unk>", "</s>", "<s>"], "show_progress": False}
    spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    first = pre.Metaspace(prepend_scheme="first")
    bert = {"special_tokens": ["[UNK]", "[SEP]"], "show_progress": False}
    return {
        "bytes": trained(
            models.BPE(),
            trainers.BpeTrainer(vocab_size=330, **special),
            pre_tokenizer=pre.ByteLevel(add_prefix_space=True),
        ),
        # As Llama 2's: the whole text is one word, and merges make "</s>" of letters.
        "merges": trained(
            models.BPE(unk_token="<unk>"),
            trainers.BpeTrainer(vocab_size=120, **special),
            normalizer=normalizers.Sequence(spaces),
            pre_tokenizer=pre.Split("\n", "isolated"),
        ),
        "unigram": trained(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", **special),
            normalizer=normalizers.NFKC(),
            pre_tokenizer=first,
        ),
        "wordpiece": trained(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=90, **bert),
            normalizer=normalizers.BertNormalizer(),
            pre_tokenizer=pre.BertPreTokenizer(),
        ),
    }


KINDS = ("bytes", "merges", "unigram", "wordpiece")


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_tokens_of_the_whole(kind, kinds, tmp_path, monkeypatch):
    monkeypatch.setattr(coding, "PIECE", 2000)
    monkeypatch.setattr(coding, "OVERLAP", 200)
    kinds[kind].save(str(tmp_path / "tokenizer.json"))
    coder = coding.coder_of(str(tmp_path / "tokenizer.json"))
    for text in (words(3000), words(3000).replace("\n", " "), words(30), ""):
        told = []
        *pieces, end = coder.document(text, told.append)
        assert end.tolist() == [coder.separator]
        assert len(pieces) > 3 or len(text) < 2500
        assert np.concatenate(pieces).tolist() == list(coder.encode(text).ids)
        assert sum(told) == len(text)


def test_pieces_of_bytes_are_the_bytes_of_the_whole(monkeypatch):
    monkeypatch.setattr(coding, "PIECE", 2000)
    monkeypatch.setattr(coding, "OVERLAP", 200)
    coder = coding.coder_of(None)
    for text in (words(3000), "\u20ac\U0001f600 a\n" * 3000, "a" * 9001):
        told = []
        *pieces, end = coder.document(text, told.append)
        assert end.tolist() == [0] and len(pieces) > 3
        assert np.concatenate(pieces).astype(np.uint8).tobytes() == text.encode()
        assert sum(told) == len(text)


def test_merges_without_end_are_left_to_the_whole(tmp_path, monkeypatch):
    """Where two pieces agree nowhere, as in a text whose tokens depend on its beginning."""
    monkeypatch.setattr(coding, "PIECE", 2000)
    monkeypatch.setattr(coding, "OVERLAP", 200)
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "aa": 1, "aaa": 2, "b": 3}, [("a", "a")])
    )
    made.save(str(tmp_path / "tokenizer.json"))
    coder = coding.coder_of(str(tmp_path / "tokenizer.json"))
    for length in (9001, 9002):
        *pieces, _ = coder.document("a" * length)
        want = coder.encode("a" * length).ids
        assert np.concatenate(pieces).tolist() == list(want)


@pytest.mark.parametrize("kind", KINDS)
def test_what_spells_a_special_token_is_text(kind, kinds, tmp_path):
    made = kinds[kind]
    spelling = Spelling.of(made)
    special = {made.token_to_id(token) for token in spelling.names}
    unknown = made.token_to_id("[UNK]" if kind == "wordpiece" else "<unk>")
    text = "a</s> <s>cat [SEP]<unk>"
    plain = spelling.plain.encode(text, add_special_tokens=False)
    assert special & set(plain.ids) <= {unknown}  # of characters that it lacks
    # Those that are meant are the tokens that they are.
    (meant,) = spelling.encode([text], [[]])
    assert meant.ids == made.encode(text, add_special_tokens=False).ids
    (both,) = spelling.encode(["x</s>y</s>"], [[(1, 5)]])
    if "</s>" in spelling.names:
        assert both.ids.count(made.token_to_id("</s>")) == 1
        assert both.offsets[-1][0] == both.place(6)
    # A text that spells none has the tokens that it always had.
    usual = words(500).replace("</s>", "").replace("<s>", "").replace("[SEP]", "")
    assert spelling.plain.encode(usual).ids == made.encode(usual).ids


def test_text_does_not_end_a_document(tmp_path, load_text):
    """Nor is a text that spells the separator counted as one."""
    path = save_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    (tmp_path / "a.txt").write_text("the cat </s> sat </s> on the mat " * 40)
    data = load_text(tmp_path / "a.txt", path, seq=8)
    tokens = np.concatenate([stream(data, "train"), stream(data, "validation")])
    separator = tokenizers.Tokenizer.from_file(path).token_to_id("</s>")
    assert np.flatnonzero(tokens == separator).tolist() == [len(tokens) - 1]


def test_a_byte_that_would_end_a_document_is_refused(tmp_path, load_text):
    (tmp_path / "a.txt").write_text("the cat\0sat " * 40)
    with pytest.raises(
        DataError, match="NUL at 7, after 'the cat': the byte that ends"
    ):
        load_text(tmp_path / "a.txt")
