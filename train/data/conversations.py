"""Rows of instruction data to conversations: text, and what of it is an answer."""

import collections
import datetime
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from train.data.chat import Chat
from train.data.rendering import Span
from train.errors import DataError

SECONDS = 10.0
"""That a template may take for a conversation."""
LOOKS = 3
"""Rows in which it is tried whether a key makes a difference."""

_PAIRS = (("prompt", "completion"), ("question", "answer"))
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_ARGUMENTS = ("add_generation_prompt", "chat_template", "continue_final_message")

Row = dict[str, Any]
Key = tuple[str | None, str]
"""A role, or None for the row itself, and the name of a key."""


class Conversation(NamedTuple):
    """A row as the model shall see it.

    Attributes:
      text: All of it.
      answers: What of it is learnt, in order.
      marked: Whether that is all, as the model's template marks it; else what ends a turn
        may follow, and is to be found.
      spelled: Where the row's own text spells special tokens.
      place: For messages: "file:line".
    """

    text: str
    answers: list[Span]
    marked: bool
    spelled: list[Span]
    place: str


class Writer:
    """Writes rows as a model's template has them, or with a newline between two texts.

    Args:
      chat: How the model wants conversations written.
      special: The special tokens of its tokenizer.
      now: What a template is told that asks for the date.

    Attributes:
      dated: Whether the template has asked for it.
      unread: How often there was a key that made no difference to the text.
    """

    def __init__(self, chat: Chat, special: list[str], now: datetime.datetime):
        self.dated = False
        self._chat, self._special, self._now = chat, special, now
        self._seen: collections.Counter[Key] = collections.Counter()
        self._read: set[Key] = set()

    @property
    def unread(self) -> dict[Key, int]:
        return {key: n for key, n in self._seen.items() if key not in self._read}

    def write(self, rows: Iterable[tuple[str, Row]]) -> Iterator[Conversation]:
        """The conversations of rows, each with its place.

        Raises:
          DataError: if a row is no conversation, the template refuses one, or takes more
            than `SECONDS`; it names the row.
        """
        if not self._chat.sources:
            for place, row in rows:
                yield self._pair(place, row)
            return
        with _process(self._chat, self._special, self._now) as ask:
            for place, row in rows:
                yield self._written(place, conversation_of(place, row), ask)

    def _pair(self, place: str, row: Row) -> Conversation:
        given = conversation_of(place, row)
        messages = given.pop("messages")
        self._seen.update((None, key) for key in given)
        if len(messages) != 2:
            raise DataError(
                f"{place}: {len(messages)} messages need a chat template, and the model's"
                " folder has none"
            )
        texts = [message.get("content") for message in messages]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{place}: without a chat template a content is text, found {texts!r}"
            )
        prompt = f"{texts[0]}\n"
        text = prompt + texts[1]
        answer = (len(prompt), len(text))
        return Conversation(text, [answer], False, [(0, len(text))], place)

    def _written(self, place: str, row: Row, ask: Any) -> Conversation:
        keys = [key for key in _keys(row) if key not in self._read]
        tried = [key for key in keys if self._seen[key] < LOOKS]
        self._seen.update(keys)
        answer = ask(place, {"row": row, "keys": tried})
        self._read |= {(role, key) for role, key in answer["reads"]}
        self.dated = self.dated or answer["dated"]
        spans = ([(a, b) for a, b in answer[key]] for key in ("answers", "spelled"))
        answers, spelled = spans
        return Conversation(answer["text"], answers, answer["marked"], spelled, place)


def conversation_of(place: str, row: Row) -> Row:
    """A row with `messages`, whatever it had, the last of them the assistant's; `tools`
    and `documents` are lists, or absent.

    Raises:
      DataError: if there are none, or not as they should be.
    """
    row = {key: value for key, value in row.items() if value is not None}
    for fields in _PAIRS:
        if all(field in row for field in fields):
            texts = [row.pop(field) for field in fields]
            for field, text in zip(fields, texts, strict=True):
                if not isinstance(text, str):
                    raise DataError(f"{place}: {field!r} is no text but {text!r}")
            row["messages"] = [
                {"role": "user", "content": texts[0]},
                {"role": "assistant", "content": texts[1]},
            ]
            break
    if "messages" not in row:
        raise DataError(
            f"{place}: expected prompt and completion, question and answer, or messages,"
            f" found {[*row]}"
        )
    _check_messages(place, row["messages"])
    for name in ("tools", "documents"):
        if name in row:
            row[name] = _objects(place, name, row[name])
    if not isinstance(row.get("chat_template_kwargs", {}), dict):
        raise DataError(
            f"{place}: expected chat_template_kwargs to be an object, found"
            f" {row['chat_template_kwargs']!r}"
        )
    return {key: value for key, value in row.items() if key not in _ARGUMENTS}


def said_unread(unread: dict[Key, int]) -> str:
    """In words, which keys made no difference; "" if there is none.

    Example:
      >>> said_unread({(None, "id"): 3, ("assistant", "reasoning_content"): 2})
      "nothing reads 'id' of 3 rows, 'reasoning_content' of assistant turns in 2 rows"
    """
    parts = [
        f"{key!r} of {n:,} rows"
        if role is None
        else f"{key!r} of {role} turns in {n:,} rows"
        for (role, key), n in unread.items()
    ]
    return f"nothing reads {', '.join(parts)}" if parts else ""


def _check_messages(place: str, messages: Any) -> None:
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, dict) or not _said(message):
            raise DataError(
                f'{place}: expected messages with a "role" and a "content" of text, found'
                f" {message!r}"
            )
        if message.get("role") not in _ROLES:
            raise DataError(
                f"{place}: role {message.get('role')!r} is none of {', '.join(_ROLES)}"
            )
    roles = [message["role"] for message in messages]
    if len(roles) < 2 or roles[-1] != "assistant":
        raise DataError(
            f"{place}: the last of several messages must be the assistant's, found roles"
            f" {roles}"
        )


def _said(message: Row) -> bool:
    """Whether it has a text, parts of one, or calls tools instead."""
    content = message.get("content")
    if content is None:
        return bool(message.get("tool_calls"))
    parts = isinstance(content, list) and all(isinstance(p, dict) for p in content)
    return isinstance(content, str) or parts


def _objects(place: str, name: str, value: Any) -> list[Row]:
    """A list of objects, which tables keep as a text of JSON."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError(
            f"{place}: expected {name} to be a list of objects, found {value!r}"
        )
    return found


def _keys(row: Row) -> list[Key]:
    """All that is not as every row has it, each once."""
    keys: dict[Key, None] = {(None, key): None for key in row if key != "messages"}
    for message in row["messages"]:
        for key, value in message.items():
            if key not in ("role", "content") and value is not None:
                keys[message["role"], key] = None
    return [*keys]


@contextmanager
def _process(chat: Chat, special: list[str], now: datetime.datetime) -> Iterator[Any]:
    """A function that asks the process of `rendering`, for as long as it is wanted."""
    root = str(Path(__file__).parents[2])
    paths = filter(None, (root, os.environ.get("PYTHONPATH")))
    process = subprocess.Popen(
        [sys.executable, "-m", "train.data.rendering"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # a Ctrl-C is not for it
    )

    def exchange(request: Row) -> Row | None:
        """None if there was no answer in time."""
        assert process.stdin and process.stdout
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def ask(place: str, request: Row) -> Row:
        answer = exchange(request)
        if answer is None:
            raise DataError(
                f"{place}: the model's chat template does not come to an end with this"
                f" conversation, within {SECONDS:g} s and the memory it may have"
            )
        if "error" in answer:
            raise DataError(
                f"{place}: the model's chat template refuses this conversation:"
                f" {answer['error']}"
            )
        return answer

    try:
        first = exchange(
            {
                "sources": chat.sources,
                "tokens": chat.tokens,
                "special": special,
                "now": now.isoformat(),
            }
        )
        if first is None or "error" in first:
            reason = "cannot be compiled" if first is None else first["error"]
            raise DataError(f"{chat.place}: the chat template {reason}")
        yield ask
    finally:
        process.kill()
        process.communicate()
