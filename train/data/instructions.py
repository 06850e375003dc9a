"""Instruction tuning: questions and answers in, packed batches out.

The loss is on answers alone. Examples are tokenised and packed when they are loaded,
and kept in memory; rows are then read at random, so that a batch depends on nothing
but (fingerprint, batch, seed, position).
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import grain
import numpy as np
import tokenizers

from train.data.batches import Batch, fill, normal, shared, shuffled, split_off
from train.data.chat import Chat, Messages, read_chat
from train.data.packing import Answered, PackedRows, pack_examples
from train.data.tasks import TASKS
from train.data.text import existing_file, json_objects
from train.data.tokenizer import Limits, open_tokenizer
from train.errors import DataError
from train.report.progress import progress_bar

# Part of every fingerprint: raise it whenever the rows would differ.
_PREPARATION = 2
_CHUNK = 1024  # examples given to the tokenizer at once
_HELD_OUT = 512  # examples, at most
_PAIRS = (("prompt", "completion"), ("question", "answer"))
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Tokenised examples with a training and a held-out split; made by `load_instructions`.

    A batch has `tokens` and `segments` as those of text, int32
    (batch, seq + 1), with an example as a document, and `weights`, float32
    (batch, seq), of the targets `tokens[:, 1:]`: 1 for a token of an answer or the end
    token after it, 0 for prompts and padding.

    Attributes:
      end: The token that ends an answer.
      metrics: What answers are judged by; see `Task`.
      train_size, validation_size: Numbers of examples.
      train_rows: Number of rows that the examples for training are packed into.
      fingerprint, description: As of every `Dataset`.
    """

    labels: ClassVar[tuple[str, ...]] = ()  # it has none
    end: int
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

        Args:
          count: How many of the held-out examples, from the first; None is all.
        """
        chosen = self.rows["validation"].examples[:count]
        return [(example.prompt.tolist(), example.answer) for example in chosen]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, up to the end token."""
        ids = [*itertools.takewhile(lambda token: token != self.end, map(int, ids))]
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
    progress: bool = True,
) -> Instructions:
    """Reads, tokenises and packs questions and answers.

    Args:
      name: A key of `TASKS`.
      data: A `.jsonl` file. A line has `prompt` and `completion`, `question` and
        `answer`, or `messages`: a list of {"role", "content"}, the assistant's last.
      model_folder: Where the model's `tokenizer.json` lies. If there is a chat template
        it writes the conversation; else a newline goes between prompt and answer.
      limits: `seq` counts predicted tokens; a row holds one more. Longer examples are
        cut, or dropped if nothing of the answer would be left.
      eval_data: A file to hold out, in place of a part of `data`.
      share: The part to hold out, at most 512 examples.
      seed: Of the order in which examples are packed, and of what is held out.
      progress: Shows a bar while tokenising, if standard error is a terminal.

    Raises:
      DataError: if the data cannot be used, or does not fit the model.
    """
    folder = Path(model_folder).expanduser()
    tokenizer, content = open_tokenizer(folder / "tokenizer.json")
    limits.check(tokenizer)
    seq = limits.seq
    chat = read_chat(folder)
    end = chat.end(tokenizer)
    files = [existing_file(file) for file in (data, eval_data) if file]
    turns = [[*_conversations(file, chat)] for file in files]
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
    total = sum(map(len, turns))
    with progress_bar(total, "Tokenising", shown=progress) as bar:
        for split, part in zip(("train", "validation"), turns, strict=True):
            whole = [*_encode(tokenizer, part, chat, end, bar.advance)]
            kept = [example for example in whole if example.start <= seq]
            if not kept:
                kind = {"train": "training", "validation": "held-out"}[split]
                file = files[0 if split == "train" else -1]
                raise DataError(
                    f"data {str(file)!r} has no {kind} examples"
                    + (f" whose prompts are shorter than seq {seq}" if whole else "")
                )
            dropped += len(whole) - len(kept)
            cut += sum(len(example.tokens) > seq + 1 for example in kept)
            rows[split] = pack_examples(kept, seq, draw)
    state = (_PREPARATION, seq, seed, share, content, chat)
    digest = hashlib.sha256(repr(state).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    train, held_out = rows["train"], rows["validation"]
    used = sum(min(len(example.tokens), seq + 1) for example in train.examples)
    return Instructions(
        end,
        TASKS[name].metrics,
        len(train.examples),
        len(held_out.examples),
        len(train),
        digest.hexdigest()[:16],
        f"{data}: {len(train.examples):,} training examples in {len(train):,} rows of"
        f" {seq} tokens ({used / len(train) / (seq + 1):.0%} full) and"
        f" {len(held_out.examples):,} held-out ones{held}; {cut:,} truncated, {dropped:,}"
        f" dropped for their long prompts{note}",
        tokenizer,
        rows,
    )


class _Conversation(NamedTuple):
    text: str
    boundary: int  # where the answer begins in `text`
    prompt: str  # what a model is given to be continued
    answer: str


def _conversations(path: Path, chat: Chat) -> Iterator[_Conversation]:
    for place, record in json_objects(path):
        messages = _messages(place, record)
        *before, last = messages
        if chat.source is None:
            if len(before) != 1:
                raise DataError(
                    f"{place}: {len(messages)} messages need a chat template, and the"
                    " model's folder has none"
                )
            text = (prompt := before[0]["content"] + "\n") + last["content"]
        else:
            text = chat.render(messages, place, answer=False)
            prompt = chat.render(before, place, answer=True)
        boundary = len(prompt)
        if not text.startswith(prompt):
            # A template may open an answer in words that it leaves out once that is
            # given (a thought, say), but must repeat the turns before it.
            same = (one == other for one, other in zip(text, prompt, strict=False))
            boundary = sum(itertools.takewhile(bool, same))
            if boundary < len(chat.render(before, place, answer=False)):
                raise DataError(
                    f"{place}: the model's chat template writes the turns before an"
                    f" answer differently once it is there: {text[boundary:][:40]!r}"
                )
        yield _Conversation(text, boundary, prompt, last["content"])


def _messages(place: str, record: dict[str, Any]) -> Messages:
    """The conversation of a line."""
    for fields in _PAIRS:
        if all(field in record for field in fields):
            texts = [record[field] for field in fields]
            for field, text in zip(fields, texts, strict=True):
                if not isinstance(text, str):
                    raise DataError(f"{place}: {field!r} is no text but {text!r}")
            return [
                {"role": "user", "content": texts[0]},
                {"role": "assistant", "content": texts[1]},
            ]
    if "messages" not in record:
        raise DataError(
            f"{place}: expected prompt and completion, question and answer, or messages,"
            f" found {[*record]}"
        )
    messages = record["messages"]
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(
                f'{place}: expected messages with a "role" and a "content" of text,'
                f" found {message!r}"
            )
        if message.get("role") not in _ROLES:
            raise DataError(
                f"{place}: role {message.get('role')!r} is none of {', '.join(_ROLES)}"
            )
    roles = [message["role"] for message in messages]
    if len(roles) < 2 or roles[-1] != "assistant":
        raise DataError(
            f"{place}: the last of several messages must be the assistant's, found"
            f" roles {roles}"
        )
    return messages


def _encode(
    tokenizer: tokenizers.Tokenizer,
    conversations: list[_Conversation],
    chat: Chat,
    end: int,
    advance: Callable[[int], object],
) -> Iterator[Answered]:
    # A template writes all special tokens itself.
    special = chat.source is None
    for first in range(0, len(conversations), _CHUNK):
        part = conversations[first : first + _CHUNK]
        encoded = [
            tokenizer.encode_batch(texts, add_special_tokens=special)
            for texts in ([one.text for one in part], [one.prompt for one in part])
        ]
        for conversation, whole, asked in zip(part, *encoded, strict=True):
            ids, prompt = whole.ids, asked.ids
            if special and prompt[-1:] == [end]:  # put after any text
                prompt = prompt[:-1]
            if ids[: len(prompt)] == prompt:
                start = len(prompt)
            else:
                # A token across the boundary has to be predicted: it is the answer's.
                ends = (stop > conversation.boundary for _, stop in whole.offsets)
                start = next(itertools.compress(itertools.count(), ends), len(ids))
            if end in ids[start:]:  # templates may go on, with a newline
                ids = ids[: len(ids) - ids[::-1].index(end)]
            else:
                ids = [*ids, end]
            tokens = np.array(ids, np.int32)
            given = tokens[:start] if prompt == ids[:start] else np.array(prompt)
            yield Answered(tokens, start, given, conversation.answer)
        advance(len(part))
