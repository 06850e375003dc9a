"""What spells a special token in a text is text."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers

from train.data.marks import numbered
from train.data.tokenizer import SEPARATORS
from train.errors import DataError


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A tokenizer to which a text that spells a special token is text like any other.

    It is the same tokenizer with other names for its special tokens, which no text has.

    Attributes:
      plain: That tokenizer.
      names: Its names of special tokens.

    Example:
      >>> from train.data.tokenizer import byte_tokenizer
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
        names = {token: numbered(number) for token, number in ids.items()}
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
