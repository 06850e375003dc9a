"""Conversations written by a model's template, in a process of its own.

A template is a program that came with a model from somewhere. It runs in Jinja's immutable
sandbox and in a process that may be ended: `python -m train.data.rendering` reads JSON, a
line a request, and answers each with a line; `conversations.py` is its other end. Nothing
here imports more than Jinja, so that the process starts fast and has nothing to take.

What a template finds is what `apply_chat_template` of transformers gives it.
"""

import contextlib
import datetime
import itertools
import json
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from train.data.marks import CLOSE, END, NUMBERED, OPEN, number_of, numbered
from train.data.sandbox import sandbox

MEMORY = 2**31  # bytes that the process may have
ALONE = 60  # seconds for a conversation, where nobody has ended it before
LONGEST = 2**24  # characters of a conversation, once it is written

Span = tuple[int, int]
"""Characters of a text, from the first to the one after the last."""
Messages = list[dict[str, Any]]

_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateError(Exception):
    """The template refuses a conversation, or cannot be followed; says why."""


class Written(NamedTuple):
    """A conversation as the template writes it.

    Attributes:
      text: All of it.
      answers: What of it the assistant says, in order.
      marked: Whether the template says so itself, by {% generation %}; else these are its
        turns, each with what ends it.
      spelled: Where the row's own text spells a special token.
    """

    text: str
    answers: list[Span]
    marked: bool
    spelled: list[Span]


class Template:
    """A chat template with all that it may ask for.

    Args:
      source: In Jinja's language.
      tokens: Special tokens by the names that templates know: `eos_token` and so on.
      special: The special tokens of the tokenizer.
      now: What `strftime_now` tells.

    Attributes:
      dated: Whether it has asked for the date.

    Raises:
      TemplateError: if it is malformed.
    """

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str],
        special: Sequence[str],
        now: datetime.datetime,
    ):
        self.dated = False
        self._tokens, self._special = dict(tokens), list(special)
        longest = sorted(self._special, key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, longest)) or "(?!)")

        def strftime_now(form: str) -> str:
            self.dated = True
            return now.strftime(form)

        try:
            self._template = sandbox(strftime_now).from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"is malformed: {error}") from error

    def write(self, row: Mapping[str, Any]) -> Written:
        """Writes a row's conversation, and finds in it what the assistant says.

        Args:
          row: `messages`, each with a `role`; `tools` and `documents`, if any; every
            other key is a variable of the template.

        Raises:
          TemplateError: if the template refuses the conversation, writes a turn of the
            assistant otherwise once it is followed by others, or writes too much.
        """
        raw = self._render(row, row["messages"], prompt=False)
        text, marks = _marks(raw)
        spelled = self._spelled(row, text)
        if marks:
            return Written(text, marks, True, spelled)
        return Written(text, self._turns(row, text), False, spelled)

    def text(self, row: Mapping[str, Any], messages: Messages, *, prompt: bool) -> str:
        """Some of a row's messages as they are written.

        Args:
          prompt: With the words that ask for an answer.

        Raises:
          TemplateError: as `write` does.
        """
        # Some templates refuse to write nothing.
        return _marks(self._render(row, messages, prompt))[0] if messages else ""

    def reads(self, row: Mapping[str, Any], role: str | None, key: str) -> bool:
        """Whether the text would be another without a key of the row, or, with a role, of
        the messages of that role."""
        if role is None:
            without = {name: value for name, value in row.items() if name != key}
        else:
            messages = [
                {n: v for n, v in message.items() if n != key}
                if message["role"] == role
                else message
                for message in row["messages"]
            ]
            without = {**row, "messages": messages}
        try:
            other = self._render(without, without["messages"], prompt=False)
        except TemplateError:
            return True
        return other != self._render(row, row["messages"], prompt=False)

    # --- Parts ------------------------------------------------------------------------

    def _render(self, row: Mapping[str, Any], messages: Messages, prompt: bool) -> str:
        given = {key: value for key, value in row.items() if key != "messages"}
        more = given.pop("chat_template_kwargs", None) or {}
        about = {"tools": None, "documents": None, **self._tokens, **given, **more}
        about |= {"messages": _plain(messages), "add_generation_prompt": prompt}
        pieces, size = [], 0
        try:
            for piece in self._template.generate(about):
                pieces.append(piece)
                size += len(piece)
                if size > LONGEST:
                    raise TemplateError(f"writes more than {LONGEST:,} characters")
        except TemplateError:
            raise
        except MemoryError:
            raise TemplateError("needs too much memory") from None
        except Exception as error:  # a template is a program, of someone else
            raise TemplateError(str(error) or type(error).__name__) from error
        return "".join(pieces)

    def _turns(self, row: Mapping[str, Any], text: str) -> list[Span]:
        """The turns of the assistant, without the words that ask for them."""
        found: list[Span] = []
        for number, message in enumerate(row["messages"]):
            if message["role"] != "assistant":
                continue
            after = found[-1][1] if found else 0
            span = self._turn(row, number, text, after)
            if span is None or span[0] < after:
                raise TemplateError(
                    f"writes message {number + 1} differently once it is followed by"
                    " others, or not at all"
                )
            found.append(span)
        return found

    def _turn(
        self, row: Mapping[str, Any], number: int, text: str, after: int
    ) -> Span | None:
        """A turn of the text, if it is written there as at an end."""
        messages = row["messages"]
        before = messages[:number]
        prompt = self.text(row, before, prompt=True)
        turn = self.text(row, [*before, messages[number]], prompt=False)
        if text.startswith(turn) and turn.startswith(prompt):
            return len(prompt), len(turn)
        content = messages[number].get("content")
        if not isinstance(content, str) or not content.strip():
            return _tail(text, prompt, turn, after)
        # Templates may write the turns before it otherwise, leave out what came before its
        # content, a thought say, or ask for it in words that they do not repeat. The
        # content is found by a mark at its end.
        said = content.rstrip()
        marked = {**messages[number], "content": said + END + content[len(said) :]}
        whole = [*before, marked, *messages[number + 1 :]]
        end = self.text(row, whole, prompt=False).find(END)
        alone = self.text(row, [*before, marked], prompt=False)
        last = alone.find(END)
        if end < 0 or last < 0:
            return None
        size = _same(text[:end][::-1], said[::-1])
        opening = alone[len(prompt) : last - size] if alone.startswith(prompt) else ""
        start = end - size
        if size < len(said):  # a part of it is written: not what is alike by chance
            start = max(start, _same(text, prompt))
        if text[:start].endswith(opening):
            start -= len(opening)
        return start, end + _same(text[end:], alone[last + 1 :])

    def _spelled(self, row: Mapping[str, Any], text: str) -> list[Span]:
        """Where the row's own text spells special tokens, in what is written of it.

        It is written once more with a number in the place of each. A template that looks
        into such a text writes something else then, and all is taken for its own.
        """
        hidden = self._hidden(row)
        if hidden == row:
            return []
        other = self.text(hidden, hidden["messages"], prompt=False)
        spans, parts, size = [], [], 0
        for number, part in enumerate(re.split(f"({NUMBERED})", other)):
            if number % 2:
                part = self._special[number_of(part)]
                spans.append((size, size + len(part)))
            parts.append(part)
            size += len(part)
        return spans if "".join(parts) == text else []

    def _hidden(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._spelling.sub(self._number, value)
        if isinstance(value, dict):
            return {
                name: item if name == "role" else self._hidden(item)
                for name, item in value.items()
            }
        return [*map(self._hidden, value)] if isinstance(value, list) else value

    def _number(self, match: re.Match) -> str:
        return numbered(self._special.index(match[0]))


def _plain(messages: Messages) -> Messages:
    """Messages as templates are given them: no key is None, thoughts have one name."""
    plain = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        thought = next((message[key] for key in _REASONING if key in message), None)
        if thought is not None:
            message = {"thinking": thought, **message, "reasoning_content": thought}
        plain.append(message)
    return plain


def _marks(raw: str) -> tuple[str, list[Span]]:
    """The text without marks, and what is between them."""
    if OPEN not in raw:
        return raw, []
    spans: list[Span] = []
    parts, size, opened = [], 0, 0
    for part in re.split(f"([{OPEN}{CLOSE}])", raw):
        if part == OPEN:
            opened = size
        elif part == CLOSE:
            if size > opened:
                spans.append((opened, size))
        else:
            parts.append(part)
            size += len(part)
    return "".join(parts), spans


def _tail(text: str, prompt: str, turn: str, after: int) -> Span | None:
    """Where as much as possible of a turn without a content is in the text."""
    if not turn.startswith(prompt):
        return None
    answer = turn[len(prompt) :]
    lines = (i + 1 for i, character in enumerate(answer) if character == "\n")
    for at in (0, *lines):
        rest = answer[at:]
        begins = rest[:1].strip() or not at
        if begins and rest.strip() and (start := text.find(rest, after)) >= 0:
            return start, start + len(rest)
    return None


def _same(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


# --- The process ----------------------------------------------------------------------


def answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """What is answered: of the first line, about the template, that it can be read; of
    every other, about a row, what `write` gives and which of some keys are read."""
    about = json.loads(next(lines))
    now = datetime.datetime.fromisoformat(about["now"])
    templates: dict[str, Template] = {}
    try:
        for name, source in about["sources"].items():
            templates[name] = Template(source, about["tokens"], about["special"], now)
    except TemplateError as error:
        yield {"error": str(error)}
        return
    yield {}
    for line in lines:
        asked = json.loads(line)
        row = asked["row"]
        tooled = row.get("tools") is not None and "tool_use" in templates
        template = templates["tool_use" if tooled else "default"]
        try:
            written = template.write(row)._asdict()
            keys = [key for key in asked["keys"] if template.reads(row, *key)]
            yield written | {"reads": keys, "dated": template.dated}
        except TemplateError as error:
            yield {"error": str(error)}


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for answer in answers(_in_time(sys.stdin)):
        print(json.dumps(answer), flush=True)


def _in_time(lines: Iterable[str]) -> Iterator[str]:
    """Ends the process where a line takes too long, whoever may have asked for it."""
    for line in lines:
        if hasattr(signal, "alarm"):
            signal.alarm(ALONE)
        yield line
        if hasattr(signal, "alarm"):
            signal.alarm(0)


if __name__ == "__main__":
    main()
