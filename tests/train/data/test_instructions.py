"""Instruction tuning: templates, masks, packing and error messages."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.data.instructions import load_instructions
from train.data.tokenizer import Limits
from train.errors import DataError
from train.objectives.metrics import exact_match

GSM8K = Path(
    os.environ.get("OASIS_GSM8K")
    or Path(__file__).parents[3] / "../shared/data/gsm8k_train.jsonl"
).resolve()

END, START = "<|im_end|>", "<|im_start|>"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Opens the answer with a thought, and leaves it out of a given answer.
THINKING = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")

PAIRS = [{"prompt": f"What is {i}?", "completion": f"It is {i * i}."} for i in range(9)]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer that merges across word boundaries."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["What is it? It is\n", "?\nI", "?\nI"], trainer)
    made.enable_truncation(3)
    return made


@pytest.fixture
def load(tmp_path, tokenizer):
    """Writes a model's folder and a data file, and loads them."""

    def call(
        records,
        template=None,
        config=None,
        jinja=None,
        made=None,
        seq=64,
        vocab_size=999,
        positions=None,
        **options,
    ):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (made or tokenizer).save(str(folder / "tokenizer.json"))
        config = {"eos_token": END, "chat_template": template} | (config or {})
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if jinja is not None:
            (folder / "chat_template.jinja").write_text(jinja)
        lines = records
        if not isinstance(records, str | bytes):
            lines = "\n".join(map(json.dumps, records))
        data = tmp_path / "data.jsonl"
        data.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        limits = Limits(seq, vocab_size, positions)
        options = {"eval_data": str(data), "progress": False} | options
        return load_instructions("sft", str(data), folder, limits, **options)

    return call


def rows(batches):
    """(tokens, segments, weights) of every row."""
    for batch in batches:
        yield from zip(
            batch["tokens"], batch["segments"], batch["weights"], strict=True
        )


def documents(data):
    """The held-out documents: (tokens, which of them are targets that count)."""
    for tokens, segments, weights in rows(data.validation(4)):
        counted = np.concatenate([[0], weights])
        assert not counted[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            assert not counted[where][0]  # nothing of its own document predicts it
            yield tokens[where].tolist(), counted[where].tolist()


def texts(data, tokenizer):
    """The held-out documents as (all before, the last answer), by what counts."""
    for tokens, counted in documents(data):
        start = len(counted) - counted[::-1].index(0) if 0 in counted else 0
        assert counted[start:]
        yield tuple(
            tokenizer.decode(part, skip_special_tokens=False)
            for part in (tokens[:start], tokens[start:])
        )


# What is learnt


def chatml(turns) -> str:
    return "".join(f"{START}{role}\n{text}{END}\n" for role, text in turns)


TALK = [("system", "Be."), ("user", "A?"), ("assistant", "B"), ("user", "C?")]

MESSAGES = {
    "messages": [
        {"role": role, "content": text}
        for role, text in [*TALK, ("assistant", "It is D.")]
    ]
}

TURN = f"{START}assistant\n"


@pytest.mark.parametrize(
    ("record", "options", "want"),
    {
        "no template": (
            {"prompt": "a b", "completion": "c"},
            {},
            ("a b\n", f"c{END}"),
        ),
        "question and answer": (
            {"question": "é?", "answer": "ü €", "more": 1},
            {},
            ("é?\n", f"ü €{END}"),
        ),
        "template of a pair": (
            {"prompt": "a b", "completion": "c"},
            {"template": CHATML},
            (chatml([("user", "a b")]) + TURN, f"c{END}"),
        ),
        "the last turn only": (
            MESSAGES,
            {"template": CHATML},
            (chatml(TALK) + TURN, f"It is D.{END}"),
        ),
        "a file's template goes first": (
            MESSAGES,
            {"template": "no", "jinja": CHATML},
            (chatml(TALK) + TURN, f"It is D.{END}"),
        ),
        "named templates": (
            MESSAGES,
            {"template": [{"name": n, "template": CHATML} for n in ("x", "default")]},
            (chatml(TALK) + TURN, f"It is D.{END}"),
        ),
        "a thought that is left out": (
            MESSAGES,
            {"template": THINKING},
            (chatml(TALK) + TURN, f"It is D.{END}"),
        ),
        "another end": (
            {"prompt": "a", "completion": "c"},
            {"template": CHATML, "config": {"eos_token": {"content": "<|endoftext|>"}}},
            (chatml([("user", "a")]) + TURN, f"c{END}"),
        ),
        "no end is named": (
            {"prompt": "a", "completion": "c"},
            {"config": {"eos_token": None}},
            ("a\n", "c<|endoftext|>"),
        ),
        "an empty answer": (
            {"prompt": "a", "completion": ""},
            {"template": CHATML},
            (chatml([("user", "a")]) + TURN, END),
        ),
        "a template as they are": (
            {"prompt": "<a>", "completion": "c"},
            {
                "template": "{%- if not messages %}{{ raise_exception('none') }}"
                "{% endif %}\n{{- bos_token }}{{ strftime_now('') }}\n"
                "{% for m in messages %}\n    {% if loop.first %}{{ m.content | tojson }}"
                "{% continue %}{% endif %}{% generation %}{{ m.content }}{% endgeneration"
                " %}{{ eos_token }}{% endfor %}",
                "config": {"bos_token": START, "add_bos_token": True},
            },
            (f'{START}\n"<a>"', "c"),
        ),
    }.values(),
)
def test_what_counts(record, options, want, load, tokenizer):
    data = load([record], **options)
    assert list(texts(data, tokenizer)) == [want]
    assert data.train_size == data.validation_size == data.train_rows == 1


@pytest.mark.parametrize(
    "turn",
    [
        "{{ m.content }}<|im_end|>\n",
        "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}",
    ],
)
def test_what_ends_turns_ends_an_answer(turn, load, tokenizer):
    """Be it the tokenizer's eos_token or not, and what generation_config.json says."""
    template = "{% for m in messages %}<|im_start|>" + turn + "{% endfor %}"
    data = load(
        [MESSAGES],
        template=template,
        config={"eos_token": "<|endoftext|>"},
    )
    assert tokenizer.token_to_id(END) in data.ends
    assert tokenizer.token_to_id("<|endoftext|>") in data.ends
    ((_, answer),) = data.prompts()
    assert answer == "It is D."


def test_tokens_across_the_boundary_are_the_answers(load, tokenizer):
    record = {"prompt": "What is it?", "completion": "It is"}
    text = "What is it?\nIt is"
    tokenizer.no_truncation()
    whole = tokenizer.encode(text)
    crossing = [text[a:b] for a, b in whole.offsets if a < 12 < b]
    assert crossing == ["?\nI"]  # else the case is none
    data = load([record])
    ((tokens, counted),) = documents(data)
    assert tokens[:-1] == whole.ids
    want = [float(stop > 12) for _, stop in whole.offsets] + [1]
    assert counted == want
    ((prompt, answer),) = data.prompts()
    # It is asked for, and judged, as it is learnt.
    assert prompt == whole.ids[: want.index(1)]
    assert answer == "?\nIt is"


def test_special_tokens_around_texts(load, tokenizer):
    """Without a template the tokenizer's own stay, and the end comes once."""
    changed = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    changed.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 1), (END, 2)]
    )
    data = load([{"prompt": "a", "completion": "c"}], made=changed)
    assert list(texts(data, tokenizer)) == [(f"{START}a\n", f"c{END}")]
    assert data.decode(data.prompts()[0][0]) == "a\n"


# Rows


def test_long_examples_are_cut_or_dropped(load, tokenizer, tmp_path):
    tokenizer.no_truncation()
    records = [
        {"prompt": "x", "completion": "y"},
        {"prompt": "x", "completion": "y" * 30},
        {"prompt": "x" * 30, "completion": "y"},
        {"prompt": "x" * 7, "completion": "yz"},  # one token of the answer is left
    ]
    data = load(records, seq=8)
    assert "4 truncated, 2 dropped" in data.description  # in either split
    assert (data.train_size, data.validation_size) == (3, 3)
    got = {x: (a, b) for (a, b), x in zip(texts(data, tokenizer), "abc", strict=True)}
    want = [("x\n", f"y{END}"), ("x\n", "y" * 7), ("x" * 7 + "\n", "y")]
    assert sorted(got.values()) == sorted(want)
    with pytest.raises(DataError, match="training examples whose prompts are shorter"):
        load(records[2:3], seq=8)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl' has no held-out examples$"):
        load(records, eval_data=str(tmp_path / "empty.jsonl"))


def test_batches(load):
    data = load(PAIRS, seq=40)
    batches = list(data.validation(2))
    assert len(batches) == -(-data.train_rows // 2)  # both splits are the same
    for batch in [*batches, next(data.train(2, 0)), next(data.train(50, 0))]:
        rows = 50 if len(batch["tokens"]) == 50 else 2
        shapes = {key: (val.shape, val.dtype) for key, val in batch.items()}
        assert shapes == {
            "tokens": ((rows, 41), np.int32),
            "segments": ((rows, 41), np.int32),
            "weights": ((rows, 40), np.float32),
        }
    assert len([*documents(data)]) == len(PAIRS)


def test_a_part_is_held_out(load, tokenizer):
    records = [{"prompt": f"{i}", "completion": "c"} for i in range(60)]
    data, same, other = (load(records, eval_data=None, seed=s) for s in (0, 0, 1))
    assert (data.train_size, data.validation_size) == (57, 3)
    assert "3 held-out ones (by seed 0)" in data.description
    held = [data.decode(ids) for ids, _ in data.prompts()]
    assert held == [same.decode(ids) for ids, _ in same.prompts()]
    assert held != [other.decode(ids) for ids, _ in other.prompts()]
    assert len(data.prompts(2)) == 2
    assert load(records, eval_data=None, share=0.5).validation_size == 30
    numbered = [{"prompt": f"{i}", "completion": "c"} for i in range(1200)]
    many = load(numbered, eval_data=None, share=0.5, seq=8)
    assert many.validation_size == 512
    packed = np.concatenate(
        [b["tokens"] for b in itertools.islice(data.train(1, 0), 9)]
    )
    seen = tokenizer.decode(packed.ravel().tolist()).split("c")
    assert not {text.strip() for text in seen} & {text.strip() for text in held}


@pytest.mark.parametrize("consumed", [0, 1, 7])
def test_training_resumes(consumed, load):
    iterator = load(PAIRS, seq=24).train(2, 3)
    for _ in range(consumed):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = load(PAIRS, seq=24).train(2, 3)
    next(fresh)
    fresh.set_state(state)
    for want, got in itertools.islice(zip(iterator, fresh, strict=False), 4):
        for key in want:
            np.testing.assert_array_equal(want[key], got[key])


def test_fingerprint_follows_what_is_read(load):
    prints = [
        load(PAIRS).fingerprint,
        load(PAIRS, seq=63).fingerprint,
        load(PAIRS, seed=1).fingerprint,
        load(PAIRS, CHATML).fingerprint,
        load(PAIRS, eval_data=None).fingerprint,
        load(PAIRS[1:]).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert load(PAIRS).fingerprint == prints[0]


def test_gsm8k(load):
    if not GSM8K.is_file():
        pytest.skip(f"no {GSM8K}; set OASIS_GSM8K to where it is")
    with GSM8K.open() as file:
        records = [json.loads(line) for line in itertools.islice(file, 40)]
    data = load(records, seq=1024)
    answers = [answer for _, answer in data.prompts()]
    right = [record["answer"] for record in records]
    assert all(a.endswith(b) for a, b in zip(answers, right, strict=True))
    assert exact_match(right, answers) == 1
    assert exact_match(answers, answers) == 1
    assert exact_match(answers[:-1], answers[1:]) < 0.2


def test_decoding_stops_at_the_end(load, tokenizer):
    data = load(PAIRS)
    tokenizer.no_truncation()
    ids = tokenizer.encode(f"{START}It is é{END}\nWhat").ids
    assert data.decode(np.array(ids)) == "It is é"
    assert data.decode([]) == ""


# Errors

OK = PAIRS[:1]

TURNS = ["system", "user"]


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ("{}\n{", {}, r"jsonl:1: expected prompt and completion, .* found \[\]"),
        ('{"prompt": "a", "completion": "b"}\n{', {}, "jsonl:2: expected one JSON obj"),
        (b'{"prompt": "\xff"}', {}, "byte 0xff at offset 12 is not UTF-8"),
        ([{"prompt": "a", "answer": "b"}], {}, r"found \['prompt', 'answer'\]"),
        (
            [{"prompt": "a", "completion": 1}],
            {},
            "jsonl:1: 'completion' is no text but",
        ),
        ([{"messages": "a"}], {}, 'jsonl:1: expected messages with a "role"'),
        ([{"messages": [{"role": "user"}]}], {}, "found {'role': 'user'}"),
        ([{"messages": []}], {}, r"assistant's, found roles \[\]"),
        (
            [{"messages": [{"role": r, "content": ""} for r in TURNS]}],
            {},
            r"roles \['system', 'user'\]",
        ),
        (
            [{"messages": [{"role": "human", "content": ""}]}],
            {},
            "role 'human' is none of system, developer, user, assistant, tool, func",
        ),
        ([MESSAGES], {}, "jsonl:1: 5 messages need a chat template"),
        (OK, {"template": "{{ raise_exception('no!') }}"}, "jsonl:1: .*: no!"),
        (
            OK,
            {"template": "{{ messages + 1 }}"},
            "jsonl:1: the model's chat template re",
        ),
        (OK, {"template": "{% if %}"}, "json: the chat template is malformed"),
        (OK, {"jinja": "{% if %}"}, "jinja: the chat template is malformed"),
        (OK, {"template": "{{ messages | length }}"}, "jsonl:1: .* differently once"),
        (
            OK,
            {"template": [{"name": "x", "template": ""}]},
            "templates have no 'default'",
        ),
        (OK, {"config": {"eos_token": "<no>"}}, "eos_token '<no>' is not in its voc"),
        ("", {}, "has no training examples"),
        (OK, {"eval_data": None}, "too small to hold out a part of it$"),
        (OK, {"eval_data": "no.jsonl"}, "'no.jsonl' is no file"),
        (OK, {"positions": 32}, "seq 64 exceeds the model's 32 positions"),
        (OK, {"vocab_size": 99}, r"tokenizer has \d+ tokens, .* only 99;"),
    ],
)
def test_errors(records, options, message, load):
    with pytest.raises(DataError, match=message):
        load(records, **options)


def test_no_end_token(load):
    bare = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(DataError, match="no token that ends an answer: none of </s"):
        load(OK, config={"eos_token": None}, made=bare)


def test_unreadable_model(load, tmp_path):
    load(OK)
    data = str(tmp_path / "data.jsonl")
    config = tmp_path / "model" / "tokenizer_config.json"
    for content, message in (
        ("[1]", r"config\.json is no JSON object"),
        ('{"chat_template": [1]}', r"config\.json: the chat template is malformed"),
    ):
        config.write_text(content)
        with pytest.raises(DataError, match=message):
            load_instructions("sft", data, tmp_path / "model", Limits(8, 999))
    with pytest.raises(DataError, match=r"cannot be read as a tokenizer\.json"):
        load_instructions("sft", data, tmp_path, Limits(8, 999))
