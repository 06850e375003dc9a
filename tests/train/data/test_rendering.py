"""Chat templates: what they write, which of it is answers, and what they may not do."""

import datetime
import itertools
import json
from pathlib import Path

import pytest

from train.data.rendering import LONGEST, Template, TemplateError, answers

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"
ROWS = json.loads((TEMPLATES / "rows.json").read_text())
# What transformers wrote and marked: benchmarks/templates.py records it.
RENDERED = json.loads((TEMPLATES / "rendered.json").read_text())
NOW = datetime.datetime(2026, 2, 3, 4, 5, 6)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
END = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # DeepSeek's
SPECIAL = ["</s>", "<|im_end|>"]


def made(source, special=()):
    return Template(source, TOKENS, special, NOW)


def shape(name):
    return made((TEMPLATES / f"{name}.jinja").read_text())


def chat(*texts, **more):
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return {"messages": turns, **more}


@pytest.mark.parametrize("name", RENDERED)
def test_templates_write_what_they_do_in_transformers(name):
    template = shape(name)
    for case, (want, marks) in RENDERED[name].items():
        row, _, prompt = case.rpartition(", ")
        row, prompt = ROWS[row], prompt == "True"
        try:
            got = template.text(row, row["messages"], prompt=prompt)
        except TemplateError:
            got = None
        assert got == want, case
        if marks:
            written = template.write(row)
            assert written.marked
            assert [list(span) for span in written.answers] == marks, case


@pytest.mark.parametrize(
    ("name", "row", "want"),
    [
        ("chatml", "one turn", [" hello\n<|im_end|>\n"]),
        ("chatml", "system and turns", ["b<|im_end|>\n", "d<|im_end|>\n"]),
        ("llama3", "one turn", ["hello<|eot_id|>"]),
        ("gemma", "turns", ["<b>ü & €</b><end_of_turn>\n", "d<end_of_turn>\n"]),
        # The system's words go to the last question, which is another before the end.
        ("mistral", "system and turns", ["b</s>", "d</s>"]),
        ("mistral", "tools of two turns", [" b</s>", " dry</s>"]),
        # Thoughts are kept of the last turn only; an empty one is written there.
        (
            "qwen3",
            "thoughts",
            ["b<|im_end|>\n", "<think>\nthree\n</think>\n\nd<|im_end|>\n"],
        ),
        (
            "qwen3",
            "tools",
            [
                '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich",'
                ' "days": 2}}\n</tool_call><|im_end|>\n',
                "<think>\n\n</think>\n\nIt is dry.<|im_end|>\n",
            ],
        ),
        # The question opens a thought, which no answer has.
        ("deepseek", "one turn", [f" hello\n{END}"]),
        (
            "deepseek",
            "turns",
            [f"{t}{END}" for t in ("<b>ü & €</b>", "d")],
        ),
        ("deepseek", "thoughts in the content", [f"\n\nb{END}"]),
        (
            "smollm3",
            "thoughts",
            [
                "<think>\none\ntwo\n</think>\nb<|im_end|>",
                "<think>\nthree\n</think>\nd<|im_end|>",
            ],
        ),
    ],
)
def test_every_turn_of_the_assistant_is_an_answer(name, row, want):
    written = shape(name).write(ROWS[row])
    assert [written.text[a:b] for a, b in written.answers] == want
    assert written.marked == (name == "smollm3")


def test_what_spells_a_special_token_is_known():
    source = "{% for m in messages %}{{ m.content | trim }}</s>{% endfor %}{{ note }}"
    row = chat("a</s>b", "<|im_end|>", note="</s>")
    written = made(source, SPECIAL).write(row)
    assert written.text == "a</s>b</s><|im_end|></s></s>"
    assert written.spelled == [(1, 5), (10, 20), (24, 28)]
    # A template that looks into such a text is taken by its word.
    counts = "{% for m in messages %}{{ m.content | length }} {% endfor %}"
    source = "{% for m in messages %}{{ m.content }}{% endfor %}" + counts
    assert made(source, SPECIAL).write(chat("a</s>b", "c")).spelled == []


def test_a_key_is_read_if_it_makes_a_difference():
    template = made(
        "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.name }}{% endfor %}{{ a }}"
    )
    row = chat("x", "y", a="1", b="2")
    row["messages"][0] |= {"name": "n", "id": 3}
    assert template.reads(row, None, "a")
    assert not template.reads(row, None, "b")
    assert template.reads(row, "user", "name")
    assert not template.reads(row, "user", "id")


def test_the_date_is_the_runs():
    template = made("{% for m in messages %}{{ m.content }}{% endfor %}")
    template.write(chat("a", "b"))
    assert not template.dated
    template = made(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert template.write(chat("a", "b")).text == "03 Feb 2026ab"
    assert template.dated


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no!') }}", "^no!$"),
        ("{{ messages + 1 }}", "list"),
        ("{{ messages.append(1) }}", "unsafe|not callable|safely"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% set n = namespace(__init__=1) %}", "no '__init__'"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "(?i)range"),
        ("{% for i in range(99999) %}" + "a" * 999 + "{% endfor %}", f"{LONGEST:,}"),
        ("{{ messages | length }}", "writes message 2 differently"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_a_template_may_not_do(source, message):
    with pytest.raises(TemplateError, match=message):
        made(source).write(chat("a", "b", "c", "d"))


def test_the_other_end_answers_a_line_a_line():
    tools = [{"name": "f"}]
    about = {
        "sources": {
            "default": "{% for m in messages %}{{ m.content }}{% endfor %}",
            "tool_use": "{% for m in messages %}{{ m.content }}{{ tools }}{% endfor %}",
        },
        "tokens": {},
        "special": [],
        "now": NOW.isoformat(),
    }
    rows = [chat("a", "b"), chat("a", "b", tools=tools), chat("a")]
    lines = [about, *({"row": row, "keys": []} for row in rows)]
    ready, plain, tooled, short = answers(iter(map(json.dumps, lines)))
    assert ready == {}
    assert (plain["text"], plain["answers"]) == ("ab", [(1, 2)])
    assert tooled["text"] == "a[{'name': 'f'}]b[{'name': 'f'}]"
    assert short["answers"] == []
    (broken,) = answers(iter([json.dumps(about | {"sources": {"default": "{% if"}})]))
    assert broken["error"].startswith("is malformed")
