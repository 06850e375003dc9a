"""Corpora and tokenizers that several modules' tests read."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

from tests.train.data.corpora import VOCABULARY, document
from train.data import corpus, prepared


@pytest.fixture
def folder(tmp_path):
    """Forty documents in a directory."""
    root = tmp_path / "corpus"
    root.mkdir()
    for seed in range(40):
        (root / f"{seed:02d}.txt").write_text(document(seed), "utf-8")
    return root


@pytest.fixture
def load_text(tmp_path, monkeypatch):
    """Loads with small blocks, so that tiny corpora have windows that cross several."""
    monkeypatch.setattr(prepared, "BLOCK", 16)

    def call(source, tokenizer=None, **options):
        source = None if source is None else str(source)
        options = {"seq": 8, "cache": tmp_path / "cache"} | options
        return corpus.load(source, tokenizer, **options)

    return call


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A WordPiece tokenizer as BERT's, whose file asks for truncation and padding."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator([*VOCABULARY, "0123456789"], trainer)
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
