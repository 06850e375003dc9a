"""Text to tokens: Hugging Face's `tokenizer.json`, or bytes."""

import dataclasses
from pathlib import Path

import tokenizers

from train.errors import DataError

MOST_BYTES = 1 << 28  # of a tokenizer.json; those of the largest models have 2^25
MOST_GAPS = 1 << 20  # tokens that a vocabulary may leave out below its largest
SEPARATORS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")


def open_tokenizer(path: str | Path) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer of a `tokenizer.json`, and the file's content.

    It neither truncates nor pads: the file may carry the limits of the model that it
    was trained for.

    Raises:
      DataError: if the file cannot be read as one.
    """
    file = Path(path).expanduser()
    try:
        if not file.is_file():
            raise DataError(_unreadable(path, "there is no such file"))
        if (size := file.stat().st_size) > MOST_BYTES:
            about = f"has {size:,} bytes, and at most {MOST_BYTES:,} are read"
            raise DataError(_unreadable(path, about))
        content = file.read_text("utf-8")
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    # The tokenizers library raises bare Exception for a malformed file, and where it
    # panics something that is not even that.
    except BaseException as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(_unreadable(path, said)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, content


def _unreadable(path: str | Path, reason: str) -> str:
    return f"tokenizer {str(path)!r} cannot be read as a tokenizer.json: {reason}"


def byte_tokenizer() -> tokenizers.Tokenizer:
    """What `coder.coder_of(None)` does, as a tokenizer: a token is a byte.

    >>> byte_tokenizer().encode("né").ids, byte_tokenizer().decode([110, 195, 169])
    ([110, 195, 169], 'né')
    """
    # As GPT-2 spells bytes: those that can be seen as they are, the others from 256 on.
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    spelled = {chr(byte): byte for byte in seen}
    spelled |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(spelled, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def vocabulary_size(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the largest token; there may be gaps below it."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _around_texts(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the largest token around texts, whatever the vocabulary says."""
    try:
        found = (*tokenizer.encode("").ids, *tokenizer.encode("", "").ids)
    except Exception as error:  # all that the library raises
        raise DataError(f"the tokenizer fails at an empty text: {error}") from error
    return 1 + max(found, default=-1)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What rows must fit into.

    Attributes:
      seq: Tokens per row.
      vocab_size: Tokens that the model's embedding has.
      positions: Positions that the model has; None if it has no limit.
    """

    seq: int
    vocab_size: int
    positions: int | None = None

    def check(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Holds rows, and the tokens of a tokenizer, to what the model has.

        Raises:
          DataError: if the embedding is too small, or there are too few positions.
        """
        size = max(vocabulary_size(tokenizer), _around_texts(tokenizer))
        if size > self.vocab_size:
            raise DataError(
                f"the tokenizer has {size:,} tokens, but the model's embedding has only"
                f" {self.vocab_size:,}; take the tokenizer that belongs to the model"
            )
        if self.positions is not None and self.seq > self.positions:
            raise DataError(
                f"seq {self.seq:,} exceeds the model's {self.positions:,} positions;"
                " shorten seq"
            )
