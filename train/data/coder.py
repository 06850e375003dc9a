"""Documents to tokens, in pieces."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from train.data.spelling import Spelling
from train.data.tokenizer import MOST_GAPS, SEPARATORS, open_tokenizer, vocabulary_size
from train.errors import DataError

PIECE = 1 << 20  # characters given to the tokenizer at once
OVERLAP = 4096  # characters on either side of a border between pieces
_AGREED = 8  # tokens on either side that both pieces must have alike


@dataclasses.dataclass(frozen=True)
class Coder:
    """Text to tokens, and the token that ends a document.

    A text never has that token, nor any other special one, whatever it spells.
    """

    encode: Callable[[str], "Encoded"]
    vocab_size: int
    separator: int
    identity: str  # goes into the fingerprint

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

    def document(
        self, text: str, advance: Callable[[int], object] = lambda characters: None
    ) -> Iterator[np.ndarray]:
        """Yields the tokens of one document in pieces, then its separator.

        Together they are the tokens that the whole text has at once.
        """
        for tokens, characters in _pieces(self.encode, text):
            yield np.asarray(tokens, self.dtype)
            advance(characters)
        yield np.array([self.separator], self.dtype)


class Encoded(Protocol):
    """What `tokenizers.Encoding` is, too.

    Attributes:
      ids: Tokens.
      offsets: Of each, its characters' first and the one after the last.
    """

    @property
    def ids(self) -> Any: ...

    @property
    def offsets(self) -> Any: ...


def _pieces(
    encode: Callable[[str], Encoded], text: str
) -> Iterator[tuple[Sequence[int], int]]:
    """Tokens of parts of a text, and how many characters that is.

    A tokenizer keeps some 100 bytes per token while it works, so a book of a gigabyte
    goes through it in pieces. What a tokenizer does at the beginning of a text (a space in
    front), and merges across a border, would differ there: so pieces overlap, and are
    joined in the middle of what both have alike.
    """
    first = begun = done = 0  # the first token to be taken; where this piece begins
    while True:
        border = begun + PIECE
        border = text.find("\n", border, border + PIECE) + 1 or border
        stop = border + OVERLAP
        one = encode(text[begun:stop])
        if stop >= len(text):
            yield one.ids[first:], len(text) - done
            return
        # What follows is encoded from here on with the next piece, too.
        after = border - OVERLAP
        joint = _joint(one, encode(text[after : border + 2 * OVERLAP]), after - begun)
        if joint is None:  # merges without end: only the whole can tell
            yield (
                encode(text).ids[_tokens_before(encode, text, done) :],
                len(text) - done,
            )
            return
        last, start, character = joint
        yield one.ids[first:last], after + character - done
        begun, done, first = after, after + character, start


def _joint(one: Encoded, other: Encoded, shift: int) -> tuple[int, int, int] | None:
    """A token of each with which the rest begins, in the middle of what is alike.

    Args:
      one, other: Of a text, and of its end from `shift` on, and beyond.

    Returns:
      Both tokens, and where they begin in the text of `other`; None if there are none.
    """
    # Each is made anew whenever it is asked for.
    mine, theirs = (np.asarray(e.offsets)[:, 0] for e in (one, other))
    ids, others = np.asarray(one.ids), np.asarray(other.ids)
    starts = {start: j for j, start in reversed([*enumerate(theirs.tolist())])}
    # From the middle of the overlap outwards.
    middle = shift + OVERLAP
    near = np.flatnonzero(mine >= shift)
    for i in near[np.argsort(np.abs(mine[near] - middle), kind="stable")].tolist():
        start = int(mine[i])
        j = starts.get(start - shift, 0)
        # Not in the middle of a character, and as far as both can be compared.
        if j < _AGREED or i + _AGREED > len(ids) or mine[i - 1] == start:
            continue
        if np.array_equal(
            ids[i - _AGREED : i + _AGREED], others[j - _AGREED : j + _AGREED]
        ):
            return i, j, start - shift
    return None


def _tokens_before(encode: Callable[[str], Encoded], text: str, done: int) -> int:
    """How many tokens of the whole text come before a character."""
    return sum(start < done for start, _ in encode(text).offsets)


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """A text's bytes, as `Encoded`."""

    text: str

    @property
    def ids(self) -> np.ndarray:
        return np.frombuffer(self.text.encode(), np.uint8)

    @property
    def offsets(self) -> Any:
        points = np.frombuffer(self.text.encode("utf-32-le"), "<u4")
        bounds = np.array([0x80, 0x800, 0x10000])
        sizes = 1 + np.searchsorted(bounds, points, side="right")
        starts = np.repeat(np.arange(len(points)), sizes)
        return np.stack([starts, starts + 1], axis=1)


def _bytes(text: str) -> _Bytes:
    if "\0" in text:
        at = text.index("\0")
        raise DataError(
            f"a document has the character NUL at {at:,}, after"
            f" {text[max(0, at - 20) : at]!r}: the byte that ends documents"
            " where no --tokenizer is given; give one, or remove it"
        )
    return _Bytes(text)


def coder_of(path: str | None) -> Coder:
    """Bytes for None, else the tokenizer of a `tokenizer.json`.

    Raises:
      DataError: if the file cannot be read as one, or leaves out so many numbers of
        tokens that a model's embedding would be out of all proportion.
    """
    if path is None:
        return Coder(_bytes, 256, 0, "")
    tokenizer, content = open_tokenizer(path)
    size = vocabulary_size(tokenizer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if size - len(set(vocabulary.values())) > MOST_GAPS:
        raise DataError(
            f"tokenizer {path!r} has {len(vocabulary):,} tokens and numbers them up to"
            f" {size - 1:,}, where at most {MOST_GAPS:,} numbers may be left out"
        )
    found = [vocabulary[token] for token in SEPARATORS if token in vocabulary]
    separator = found[0] if found else size
    plain = Spelling.of(tokenizer).plain
    return Coder(
        lambda text: plain.encode(text, add_special_tokens=False),
        max(size, separator + 1),
        separator,
        content,
    )
