"""Rows to conversations: keys, errors, and a template that goes its own ways."""

import datetime
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.data import conversations
from train.data.chat import Chat, read_chat
from train.data.conversations import Writer, conversation_of, said_unread
from train.data.rendering import Template, TemplateError
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


# --- From strangers -------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from("role content tools name tool_calls".split()), inner
        )
    ),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "tool"))},
    optional={"content": VALUES, "tool_calls": VALUES, "reasoning": VALUES},
)
ROW = st.dictionaries(
    st.sampled_from(
        "prompt completion tools documents id chat_template_kwargs".split()
    ),
    VALUES,
).flatmap(
    lambda row: st.lists(TURN, max_size=4).map(lambda turns: row | {"messages": turns})
)
# What templates are made of; most of what comes out is none.
PIECES = st.lists(
    st.sampled_from(
        """{% for m in messages %}
        {% endfor %}
        {% if m.content %}
        {% endif %}
        {{ m.content }}
        {{ m.content | trim }}
        {{ m | tojson }}
        {{ messages[::-1] }}
        {{ m.tool_calls[0].name }}
        {% generation %}
        {% endgeneration %}
        {{ loop.previtem }}
        {{ m.__class__ }}
        {{ 1 / 0 }}
        {% set ns = namespace(a=1) %}
        {{ x.y.z }}
        {{
        </s>""".split("\n        ")
    ),
    max_size=8,
)
FEW = settings(
    deadline=None,
    max_examples=80,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FEW
@given(ROW | st.dictionaries(st.text(max_size=9), VALUES))
def test_any_row_is_a_conversation_or_a_sentence(row):
    try:
        (one,) = writer(None).write(rows(row))
        assert one.answers
    except DataError as error:
        assert "\n" not in str(error) and str(error).startswith("d.jsonl:1: ")


@FEW
@given(ROW, PIECES)
def test_any_template_is_followed_or_refused(row, pieces):
    special = ["</s>"]
    try:
        row = conversation_of("d.jsonl:1", row)
    except DataError:
        return
    try:
        template = Template("".join(pieces), {"eos_token": "</s>"}, special, NOW)
        written = template.write(row)
    except TemplateError:
        return
    for start, stop in (*written.answers, *written.spelled):
        assert 0 <= start <= stop <= len(written.text)


@FEW
@given(
    name=st.sampled_from(
        ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    ),
    value=st.dictionaries(
        st.sampled_from(("eos_token", "chat_template", "eos_token_id", "bos_token")),
        VALUES,
    )
    | VALUES,
)
def test_any_file_of_a_model_is_read_or_named(name, value, tmp_path):
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / name).write_text(json.dumps(value))
    try:
        read_chat(tmp_path)
    except DataError as error:
        assert name in str(error)
