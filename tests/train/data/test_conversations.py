"""Rows to conversations: keys, errors, and a template that goes its own ways."""

import datetime
import os

import pytest

from train.data import conversations
from train.data.chat import Chat
from train.data.conversations import Writer, conversation_of, said_unread
from train.errors import DataError

NOW = datetime.datetime(2026, 2, 3)
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"


def writer(source=PLAIN, special=("</s>",)):
    sources = {} if source is None else {"default": source}
    return Writer(Chat(sources, {"eos_token": "</s>"}, (), "t.json"), [*special], NOW)


def rows(*given):
    return [(f"d.jsonl:{i}", row) for i, row in enumerate(given, start=1)]


PAIR = {"prompt": "a", "completion": "b"}


def test_rows_are_written_by_the_template():
    (one,) = writer().write(rows({"question": "a</s>", "answer": "b"}))
    assert one.text == "user:a</s></s>assistant:b</s>"
    assert [one.text[a:b] for a, b in one.spelled] == ["</s>"]
    # No words ask for an answer here, so its role is a part of it.
    assert [one.text[a:b] for a, b in one.answers] == ["assistant:b</s>"]
    assert not one.marked
    assert one.place == "d.jsonl:1"


def test_without_a_template_a_newline_is_between():
    (one,) = writer(None).write(rows(PAIR))
    assert one.text == "a\nb"
    assert one.answers == [(2, 3)]
    assert one.spelled == [(0, 3)]


def test_keys_that_nothing_reads_are_counted():
    asked = writer(PLAIN + "{{ a }}")
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "c", "name": None},
    ]
    list(asked.write(rows({"messages": turns, "id": 1}, PAIR | {"a": 1, "id": 2})))
    assert asked.unread == {(None, "id"): 2, ("assistant", "reasoning_content"): 1}
    assert said_unread(asked.unread) == (
        "nothing reads 'id' of 2 rows, 'reasoning_content' of assistant turns in 1 rows"
    )
    asked = writer(None)
    list(asked.write(rows(PAIR | {"id": 2})))
    assert asked.unread == {(None, "id"): 1}


def test_a_row_as_the_template_gets_it():
    call = [{"function": {"name": "f"}}]
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": call},
        ],
        "tools": '[{"name": "f"}]',
        "documents": None,
        "chat_template_kwargs": {"thinking": True},
        "add_generation_prompt": True,
    }
    got = conversation_of("d:1", row)
    assert got["tools"] == [{"name": "f"}]
    assert got["messages"] == row["messages"]
    assert sorted(got) == ["chat_template_kwargs", "messages", "tools"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIR | {"tools": "f"}, "tools to be a list of objects, found 'f'"),
        (
            PAIR | {"documents": ["f"]},
            r"documents to be a list of objects, found \['f'\]",
        ),
        (PAIR | {"chat_template_kwargs": 1}, "kwargs to be an object, found 1"),
        ({"prompt": "a"}, r"found \['prompt'\]"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]},
            "found {'role': 'assistant'}",
        ),
    ],
)
def test_errors(row, message):
    with pytest.raises(DataError, match=f"^d.jsonl:1: .*{message}"):
        list(writer().write(rows(row)))


@pytest.mark.parametrize(
    "source",
    [
        # Too long, and more than there is memory for.
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
    ],
)
def test_a_template_has_limits(source, monkeypatch):
    monkeypatch.setattr(conversations, "SECONDS", 1.0)
    with pytest.raises(DataError, match="jsonl:1: the model's chat template"):
        list(writer(source).write(rows(PAIR)))


def test_a_broken_template_is_named():
    with pytest.raises(DataError, match="json: the chat template is malformed"):
        list(writer("{% if").write(rows(PAIR)))


def test_no_process_stays(monkeypatch):
    asked = writer("{{ raise_exception('no') }}")
    with pytest.raises(DataError, match="refuses this conversation: no"):
        list(asked.write(rows(PAIR)))
    with pytest.raises(ChildProcessError):  # there is none to wait for
        os.waitpid(-1, os.WNOHANG)
