"""Text to tokens: Hugging Face's `tokenizer.json`, or bytes."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers

from train.errors import DataError

PIECE = 1 << 20  # characters given to the tokenizer at once
SEPARATORS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
_OVERLAP = 4096  # characters on either side of a border between pieces
_AGREED = 8  # tokens on either side that both pieces must have alike
# Noncharacters of Unicode, which no text has, around a number: names of special tokens.
_OPEN, _CLOSE = "\ufdd4", "\ufdd5"
_DIGITS = [chr(0xFDE0 + digit) for digit in range(10)]


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
    def offsets(self) -> Sequence[tuple[int, int]]: ...


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
        stop = border + _OVERLAP
        one = encode(text[begun:stop])
        if stop >= len(text):
            yield one.ids[first:], len(text) - done
            return
        # What follows is encoded from here on with the next piece, too.
        after = border - _OVERLAP
        joint = _joint(one, encode(text[after : border + 2 * _OVERLAP]), after - begun)
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
    middle = shift + _OVERLAP
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


class _Bytes(NamedTuple):
    """A text's bytes, as `Encoded`; it is never taken apart."""

    ids: np.ndarray
    offsets: Sequence[tuple[int, int]] = ()


def _bytes(text: str) -> _Bytes:
    if "\0" in text:
        at = text.index("\0")
        raise DataError(
            f"a document has the character NUL at {at:,}, after"
            f" {text[max(0, at - 20) : at]!r}: the byte that ends documents"
            " where no --tokenizer is given; give one, or remove it"
        )
    return _Bytes(np.frombuffer(text.encode(), np.uint8))


def coder_of(path: str | None) -> Coder:
    """Bytes for None, else the tokenizer of a `tokenizer.json`.

    Raises:
      DataError: if the file cannot be read as one.
    """
    if path is None:
        return Coder(_bytes, 256, 0, "")
    tokenizer, content = open_tokenizer(path)
    size = vocabulary_size(tokenizer)
    known = map(tokenizer.token_to_id, SEPARATORS)
    separator = next((token for token in known if token is not None), size)
    plain = Spelling.of(tokenizer).plain
    return Coder(
        lambda text: plain.encode(text, add_special_tokens=False),
        max(size, separator + 1),
        separator,
        content,
    )


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A tokenizer to which a text that spells a special token is text like any other.

    It is the same tokenizer with other names for its special tokens, which no text has.

    Attributes:
      plain: That tokenizer.
      names: Its names of special tokens.

    Example:
      >>> made = byte_tokenizer()
      >>> _ = made.add_special_tokens(["</s>"])
      >>> spelling = Spelling.of(made)
      >>> spelling.encode(["a</s></s>"], [[(1, 5)]])[0].ids == [97, *b"</s>", 256]
      True
    """

    plain: tokenizers.Tokenizer
    names: dict[str, str]

    @classmethod
    def of(
        cls, tokenizer: tokenizers.Tokenizer, named: Iterable[str] = ()
    ) -> "Spelling":
        """Of a tokenizer.

        Args:
          named: Tokens that are special besides those that it calls so, and those that
            end a text.

        Raises:
          DataError: if the tokenizer cannot be read anew.
        """
        stored = json.loads(tokenizer.to_str())
        added = stored["added_tokens"]
        special = {token["content"] for token in added if token["special"]}
        wanted = (*named, *SEPARATORS)
        special |= {t for t in wanted if tokenizer.token_to_id(t) is not None}
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        ids = {token: vocabulary[token] for token in special}
        names = {token: _name(number) for token, number in ids.items()}
        there = {token["content"] for token in added}
        for token in special - there:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            added.append({"id": ids[token], "content": token, **flags})
        for token in added:
            if token["content"] in special:
                token |= {
                    "content": names[token["content"]],
                    "normalized": False,
                    "special": True,
                }
        added.sort(key=lambda token: token["id"])
        _rename(stored["model"], names)
        try:
            plain = tokenizers.Tokenizer.from_str(json.dumps(stored))
        except Exception as error:  # as in `open_tokenizer`
            raise DataError(f"the tokenizer cannot be read anew: {error}") from error
        wrong = [t for t in special if plain.token_to_id(names[t]) != ids[t]]
        if wrong:
            raise DataError(
                f"the tokenizer's special token {min(wrong)!r} has the number"
                f" {ids[min(wrong)]}, which leaves a gap; number them without one"
            )
        return cls(plain, names)

    def encode(
        self, texts: Sequence[str], spelled: Sequence[Sequence[tuple[int, int]]]
    ) -> list["Tokens"]:
        """The tokens of texts that have special ones.

        Args:
          spelled: Of each text, where it spells a special token and means the text.
        """
        found = [
            self._named(text, spans) for text, spans in zip(texts, spelled, strict=True)
        ]
        encoded = self.plain.encode_batch(
            [text for text, _ in found], add_special_tokens=False
        )
        return [
            Tokens(one.ids, one.offsets, moved)
            for one, (_, moved) in zip(encoded, found, strict=True)
        ]

    def _named(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text with our names, and by how much each moves what comes after it."""
        moved: list[tuple[int, int]] = []
        parts, at, shift = [], 0, 0
        for match in self._pattern.finditer(text):
            start, stop = match.span()
            if any(start < b and a < stop for a, b in spans):
                continue
            name = self.names[match[0]]
            parts += [text[at:start], name]
            at, shift = stop, shift + len(name) - (stop - start)
            moved.append((stop, shift))
        return "".join([*parts, text[at:]]), moved

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        longest = sorted(self.names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest)) or "(?!)")


class Tokens(NamedTuple):
    """A text's tokens, and where each stands in the text as it was encoded."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    moved: list[tuple[int, int]]

    def place(self, character: int) -> int:
        """Where a character of the text is in what was encoded."""
        before = (shift for stop, shift in reversed(self.moved) if stop <= character)
        return character + next(before, 0)


def _name(number: int) -> str:
    return _OPEN + "".join(_DIGITS[int(digit)] for digit in str(number)) + _CLOSE


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Gives tokens of a tokenizer's model, as JSON has it, other names."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(t, t): number for t, number in vocabulary.items()}
    else:  # a list of pairs, as Unigram has it
        model["vocab"] = [[names.get(t, t), score] for t, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if merges := model.get("merges"):
        # No merge makes one of them, as where they were in the text that it learnt from.
        pairs = (m.split(" ") if isinstance(m, str) else m for m in merges)
        model["merges"] = [
            [a, b] for a, b in pairs if names.keys().isdisjoint((a, b, a + b))
        ]


def open_tokenizer(path: str | Path) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer of a `tokenizer.json`, and the file's content.

    It neither truncates nor pads: the file may carry the limits of the model that it
    was trained for.

    Raises:
      DataError: if the file cannot be read as one.
    """
    try:
        content = Path(path).expanduser().read_text("utf-8")
        tokenizer = tokenizers.Tokenizer.from_str(content)
    # The tokenizers library raises bare Exception for a malformed file.
    except Exception as error:
        raise DataError(
            f"tokenizer {str(path)!r} cannot be read as a tokenizer.json: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, content


def byte_tokenizer() -> tokenizers.Tokenizer:
    """What `coder_of(None)` does, as a tokenizer: a token is a byte.

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
        size = vocabulary_size(tokenizer)
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
