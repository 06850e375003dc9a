"""Instruction tuning: conversations in, packed batches out.

The loss is on answers alone. Examples are tokenised and packed when they are loaded,
and kept in memory; rows are then read at random, so that a batch depends on nothing
but (fingerprint, batch, seed, position).
"""

import dataclasses
import datetime
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import grain
import numpy as np
import tokenizers

from train.data.batches import Batch, fill, normal, shared, shuffled, split_off
from train.data.chat import read_chat
from train.data.conversations import Conversation, Writer, said_unread
from train.data.packing import Answered, PackedRows, pack_examples
from train.data.spelling import Spelling, Tokens
from train.data.tasks import TASKS
from train.data.text import OBJECTS, json_objects, row_files
from train.data.tokenizer import Limits, open_tokenizer
from train.errors import DataError
from train.report.progress import progress_bar

# Part of every fingerprint: raise it whenever the rows would differ.
_PREPARATION = 2
_CHUNK = 1024  # examples given to the tokenizer at once
_HELD_OUT = 512  # examples, at most


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Tokenised examples with a training and a held-out split; made by `load_instructions`.

    A batch has `tokens` and `segments` as those of text, int32
    (batch, seq + 1), with an example as a document, and `weights`, float32
    (batch, seq), of the targets `tokens[:, 1:]`: 1 for a token of an answer, of any turn,
    or the end token after it, 0 for prompts and padding.

    Attributes:
      ends: The tokens that end an answer: all that do in the data or in the model's
        generation_config.json.
      metrics: What answers are judged by; see `Task`.
      train_size, validation_size: Numbers of examples.
      train_rows: Number of rows that the examples for training are packed into.
      fingerprint, description: As of every `Dataset`.
    """

    labels: ClassVar[tuple[str, ...]] = ()  # it has none
    ends: tuple[int, ...]
    metrics: tuple[str, ...]
    train_size: int
    validation_size: int
    train_rows: int
    fingerprint: str
    description: str
    tokenizer: tokenizers.Tokenizer = dataclasses.field(repr=False)
    rows: dict[str, PackedRows] = dataclasses.field(repr=False)

    def train(self, batch: int, seed: int) -> grain.DatasetIterator[Batch]:
        """Returns endless batches, shuffled by `seed` and anew in each epoch."""
        return shuffled(self.rows["train"], batch, seed)

    def validation(self, batch: int) -> Iterator[Batch]:
        """Returns the held-out split once; rows of zeros fill up the last batch."""
        rows = self.rows["validation"]
        for start in range(0, len(rows), batch):
            part = [rows[i] for i in range(start, min(start + batch, len(rows)))]
            joined = {key: np.stack([row[key] for row in part]) for key in part[0]}
            yield fill(joined, batch)

    def prompts(self, count: int | None = None) -> list[tuple[list[int], str]]:
        """Returns tokens to be continued, and the right answers' text.

        They are what is trained on, cut in two where the last answer begins; the answer is
        read as a generated one is, so that a model that says it is right.

        Args:
          count: How many of the held-out examples, from the first; None is all.
        """
        chosen = self.rows["validation"].examples[:count]
        parts = ((one.tokens.tolist(), one.start) for one in chosen)
        return [(ids[:start], self.decode(ids[start:])) for ids, start in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, up to the first that ends it."""
        ids = [*itertools.takewhile(lambda t: t not in self.ends, map(int, ids))]
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_instructions(
    name: str,
    data: str,
    model_folder: str | Path,
    limits: Limits,
    *,
    eval_data: str | None = None,
    share: float = 0.05,
    seed: int = 0,
    now: datetime.datetime | None = None,
    progress: bool = True,
) -> Instructions:
    """Reads, tokenises and packs conversations.

    Args:
      name: A key of `TASKS`.
      data: A `.jsonl`, `.json` or `.parquet` file, maybe compressed, or a directory or
        pattern of such. A row has `prompt` and `completion`, `question` and
        `answer`, or `messages`: a list of {"role", "content"}, the assistant's last;
        every turn of the assistant is learnt. `tools`, `documents` and all other keys are
        for the chat template, as `apply_chat_template` of transformers has it.
      model_folder: Where the model's `tokenizer.json` lies. If there is a chat template
        it writes the conversation; else a newline goes between prompt and answer.
      limits: `seq` counts predicted tokens; a row holds one more. Longer examples are
        cut, or dropped if nothing of an answer would be left.
      eval_data: A file to hold out, in place of a part of `data`.
      share: The part to hold out, at most 512 examples.
      seed: Of the order in which examples are packed, and of what is held out.
      now: What a template is told that asks for the date; by default the present.
      progress: Shows a bar while tokenising, if standard error is a terminal.

    Raises:
      DataError: if the data cannot be used, or does not fit the model.
    """
    folder = Path(model_folder).expanduser()
    tokenizer, content = open_tokenizer(folder / "tokenizer.json")
    limits.check(tokenizer)
    seq = limits.seq
    chat = read_chat(folder)
    end, now = chat.end(tokenizer), now or datetime.datetime.now()
    spelling = Spelling.of(tokenizer, chat.tokens.values())
    writer = Writer(chat, [*spelling.names], now)
    files = [row_files(name, OBJECTS) for name in (data, eval_data) if name]
    turns = [
        [*writer.write(itertools.chain.from_iterable(map(json_objects, part)))]
        for part in files
    ]
    draw = np.random.default_rng(seed)
    held, note = "", ""
    if eval_data:
        note = shared(turns[0], turns[1], lambda turn: normal(turn.text))
    else:
        size = min(_HELD_OUT, max(1, int(share * len(turns[0]))))
        *turns, note = split_off(
            turns[0], size, draw, lambda turn: normal(turn.text), data
        )
        held = f" (by seed {seed})"
    rows, cut, dropped = {}, 0, 0
    reader = _Reader(tokenizer, spelling, end, bool(chat.sources))
    total = sum(map(len, turns))
    with progress_bar(total, "Tokenising", shown=progress) as bar:
        for split, part in zip(("train", "validation"), turns, strict=True):
            whole = [*reader.read(part, bar.advance)]
            kept = [example for example in whole if example.learnt[: seq + 1].any()]
            if not kept:
                kind = {"train": "training", "validation": "held-out"}[split]
                file = (data, eval_data or data)[split == "validation"]
                raise DataError(
                    f"data {file!r} has no {kind} examples"
                    + (f" whose prompts are shorter than seq {seq}" if whole else "")
                )
            dropped += len(whole) - len(kept)
            cut += sum(len(example.tokens) > seq + 1 for example in kept)
            rows[split] = pack_examples(kept, seq, draw)
    state = (_PREPARATION, seq, seed, share, content, chat)
    day = now.isoformat() if writer.dated else ""
    digest = hashlib.sha256(repr((state, day)).encode())
    for path in itertools.chain.from_iterable(files):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    train, held_out = rows["train"], rows["validation"]
    used = sum(min(len(example.tokens), seq + 1) for example in train.examples)
    unread = said_unread(writer.unread)
    return Instructions(
        tuple(sorted({*reader.ends, *chat.stops})),
        TASKS[name].metrics,
        len(train.examples),
        len(held_out.examples),
        len(train),
        digest.hexdigest()[:16],
        f"{data}: {len(train.examples):,} training examples in {len(train):,} rows of"
        f" {seq} tokens ({used / len(train) / (seq + 1):.0%} full) and"
        f" {len(held_out.examples):,} held-out ones{held}; {cut:,} truncated, {dropped:,}"
        f" dropped for their long prompts{note}{unread and f'; {unread}'}",
        tokenizer,
        rows,
    )


class _Reader:
    """Conversations to tokens, and which of them are learnt.

    Args:
      end: The token that ends an answer where the conversation has none that does.
      templated: Whether a template has written all special tokens; else the tokenizer
        puts its own around a text.

    Attributes:
      ends: The tokens that have ended a turn, so far, and `end`.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        spelling: Spelling,
        end: int,
        templated: bool,
    ):
        self.ends = {end}
        self._end, self._spelling, self._templated = end, spelling, templated
        self._special = {tokenizer.token_to_id(token) for token in spelling.names}

    def read(
        self, conversations: list[Conversation], advance: Callable[[int], object]
    ) -> Iterator[Answered]:
        for first in range(0, len(conversations), _CHUNK):
            part = conversations[first : first + _CHUNK]
            for one, tokens in zip(part, self._encoded(part), strict=True):
                yield self._answered(one, tokens)
            advance(len(part))

    def _encoded(self, part: list[Conversation]) -> list[Tokens]:
        texts = [one.text for one in part]
        if self._templated:
            return self._spelling.encode(texts, [one.spelled for one in part])
        encoded = self._spelling.plain.encode_batch(texts)
        return [Tokens(one.ids, one.offsets, []) for one in encoded]

    def _answered(self, one: Conversation, tokens: Tokens) -> Answered:
        ids, learnt, start = [*tokens.ids], np.zeros(len(tokens.ids) + 1, bool), 0
        offsets = np.array(tokens.offsets, int).reshape(-1, 2)
        stop = 0
        for span in one.answers:
            low, high = map(tokens.place, span)
            # A token across the border has to be predicted: it is the answer's.
            (inside,) = np.nonzero((offsets[:, 1] > low) & (offsets[:, 0] < high))
            after = int(np.searchsorted(offsets[:, 1], low, side="right"))
            start = int(inside[0]) if len(inside) else after
            stop = int(inside[-1]) + 1 if len(inside) else start
            over = self._ended(ids, start, stop)
            if not one.marked:
                stop = over
            learnt[start:stop] = True
        if not one.marked and (not ids[:stop] or ids[stop - 1] not in self.ends):
            ids = [*ids[:stop], self._end]
            learnt[stop] = True
            stop += 1
        ids, learnt = ids[:stop], learnt[:stop]
        learnt[:1] = False  # nothing of its own predicts it
        if not learnt.any():
            raise DataError(
                f"{one.place}: there is nothing to learn in this conversation"
            )
        return Answered(np.array(ids, np.int32), learnt, start)

    def _ended(self, ids: list[int], start: int, stop: int) -> int:
        """Where a turn is over: a template may go on after its end, with a newline."""
        turn = ids[start:stop]
        if self._end in turn:
            return stop - turn[::-1].index(self._end)
        for i in reversed(range(start, stop)):
            if ids[i] in self._special:
                self.ends.add(ids[i])
                return i + 1
            if self._spelling.plain.decode([ids[i]]).strip():
                break
        return stop
