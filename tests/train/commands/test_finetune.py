"""Fine-tuning end to end: what a run writes, resuming, export, plans, bad input."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from oasis_jax import hf
from oasis_jax.checkpoints import Checkpoints
from oasis_jax.leaves import matching
from oasis_jax.models.bert import Bert, BertConfig
from oasis_jax.models.llama import Llama, LlamaConfig
from oasis_jax.paths import flatten_paths
from train.__main__ import main
from train.commands import export, finetune
from train.commands.pretrain import run as pretrain
from train.data.coder import coder_of
from train.data.labelled import load_labelled
from train.data.tokenizer import Limits, byte_tokenizer
from train.options import Export, Finetune, Pretrain
from train.run import build
from train.run.setup import train_step
from train.run.trials import command_line

WORDS = "[PAD] [UNK] [CLS] [SEP] good fine bad poor film plot a the is was".split()
ENCODER = BertConfig(16, 16, 24, layers=2, heads=2, positions=16)
ROBERTA = dataclasses.replace(ENCODER, position_offset=2, pad=1, types=1)
DECODER = LlamaConfig(260, 16, 24, 2, 2, 1, tied=True, positions=64)


def saved(folder: Path, config, tokenizer) -> Path:
    """A model's folder, with random weights; an encoder's tell words apart."""
    encoder = isinstance(config, BertConfig)
    model = (Bert if encoder else Llama)(config)
    init = jax.jit(model.init)
    params = init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    scale = 10 if encoder else 1
    params = jax.tree.map(lambda a: a if jnp.all(a == 1) else scale * a, params)
    hf.save(folder, config, params)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def words():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, words):
    return saved(tmp_path_factory.mktemp("models") / "bert", ENCODER, words)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """With a tokenizer of bytes."""
    made = byte_tokenizer()
    made.add_special_tokens(["<|endoftext|>"])
    folder = saved(tmp_path_factory.mktemp("models") / "llama", DECODER, made)
    about = {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """SST-2's layout; what is said of a film can be read off one word."""
    folder = tmp_path_factory.mktemp("sst2")
    rng = np.random.default_rng(0)
    for split, count in {"train": 48, "dev": 12}.items():
        lines = ["sentence\tlabel"]
        for i in range(count):
            word = rng.choice(WORDS[4:6] if i % 2 else WORDS[6:8])
            lines.append(f"{rng.choice(['a', 'the'])} film {word}\t{i % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    lines = (
        {"question": f"{i}+{j}?", "answer": f"#### {i + j}"}
        for i in range(5)
        for j in range(5)
    )
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


OPTIONS = dict(checkpoint_every=3, rank="8", lr=1e-2, log_every=1)


@pytest.fixture
def classify(encoder, reviews, tmp_path) -> Finetune:
    where = dict(model=str(encoder), data=str(reviews), out=tmp_path / "run")
    size = dict(batch=8, seq=8, steps=12, eval_every=6)
    return Finetune(task="sst2", **where, **size, **OPTIONS)


@pytest.fixture
def instruct(decoder, sums, tmp_path) -> Finetune:
    where = dict(model=str(decoder), data=str(sums), out=tmp_path / "run")
    size = dict(batch=4, seq=32, steps=8, eval_every=4, generate=3, new_tokens=6)
    return Finetune(task="sft", **where, **size, **OPTIONS)


def flags(config: Finetune) -> list[str]:
    return command_line("finetune", dataclasses.asdict(config))[3:]


def lines(out: Path) -> list[dict]:
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


def kept(folder: Path):
    """The configuration, the step and the weights of the newest checkpoint."""
    with Checkpoints(folder) as checkpoints:
        about = checkpoints.config()
        setup, _, _ = build.saved(about)
        step, state = checkpoints.restore(setup.state)
    return about, step, state


@pytest.mark.parametrize(
    "changes",
    [
        {"pack": True, "seq": 16, "batch": 4},
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_classification_learns_and_keeps_the_best(changes, classify):
    assert main(flags(dataclasses.replace(classify, **changes))) == 0
    summary = json.loads((classify.out / "summary.json").read_text())
    evaluations = [r for r in lines(classify.out) if "score" in r]
    assert [r["step"] for r in evaluations] == [6, 12]
    best = max(evaluations, key=lambda r: r["score"])
    assert summary["best"] == best and best["accuracy"] == best["score"] == 1.0
    assert best["val_examples"] == 12
    _, step, state = kept(classify.out / "best")
    assert step == best["step"] == int(state.step)


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        ("instruct", {"method": "lora", "accumulate": 2}),
        pytest.param("classify", {"pack": True}, marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_equal(which, changes, request, killed_at):
    config = dataclasses.replace(request.getfixturevalue(which), **changes)
    finetune.run(config)
    broken = dataclasses.replace(config, out=config.out.with_name("broken"))
    killed_at(5, lambda: finetune.run(broken))
    finetune.run(dataclasses.replace(broken, resume=True))

    for folder in ("checkpoints", "best"):
        (_, step, resumed), (_, expected, whole) = (
            kept(c.out / folder) for c in (broken, config)
        )
        assert step == expected
        for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    seen = ("step", "loss", "val_loss", "score", "exact_match")
    assert [[r.get(k) for k in seen] for r in lines(broken.out)] == [
        [r.get(k) for k in seen] for r in lines(config.out)
    ]


def test_adamw_is_the_plain_optax_loop(classify, tmp_path, words, reviews):
    """Step for step, on a model of RoBERTa's shape, with decay, clipping and schedule."""
    folder = saved(tmp_path / "roberta", ROBERTA, words)
    config = dataclasses.replace(
        classify,
        model=str(folder),
        method="adamw",
        rank=None,
        weight_decay=0.1,
        clip=0.5,
        seed=3,
    )
    finetune.run(config)

    loaded = hf.load(folder, labels=2, seed=3)
    model, params = Bert(loaded.config), loaded.params
    schedule = optax.join_schedules(
        [optax.linear_schedule(0, 1e-2, 1), optax.linear_schedule(1e-2, 0, 11)], [1]
    )
    tx = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            schedule, b1=0.9, b2=0.999, weight_decay=0.1, mask=matching("kernel$")
        ),
    )

    @jax.jit
    def step(params, moments, batch):
        def loss_fn(params):
            inputs = (batch[name] for name in ("tokens", "segments", "types"))
            logits = model.apply({"params": params}, *inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(logits, batch["labels"][:, 0]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    data = load_labelled("sst2", str(reviews), folder / "tokenizer.json", Limits(8, 16))
    batches, moments = data.train(8, seed=3), tx.init(params)
    losses = []
    for _ in range(config.steps):
        params, moments, loss = step(params, moments, next(batches))
        losses.append(float(loss))
    got = [r["loss"] for r in lines(config.out) if "loss" in r]
    np.testing.assert_allclose(got, losses, rtol=1e-4, atol=1e-6)
    _, _, state = kept(config.out / "checkpoints")
    expected = flatten_paths(params)
    for path, leaf in flatten_paths(state.params).items():
        # A bias of keys has no gradient but rounding, of which Adam makes full steps.
        if path != "blocks/attn/k_proj/bias":
            np.testing.assert_allclose(leaf, expected[path], atol=1e-4, err_msg=path)


def test_instructions_are_learnt_answered_and_exported(instruct, tmp_path):
    config = dataclasses.replace(instruct, steps=30, eval_every=15)
    assert main(flags(config)) == 0
    evaluations = [r for r in lines(config.out) if "val_loss" in r]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] < np.log(260)
    assert {r["asked"] for r in evaluations} == {1}  # a twentieth of 25 is held out
    assert all(0 <= r["exact_match"] <= 1 for r in evaluations)
    answers = [json.loads(x) for x in (config.out / "answers.jsonl").open()]
    assert [set(a) for a in answers] == [{"prompt", "answer", "reference"}]

    out = tmp_path / "exported"
    assert main(["export", f"--checkpoint={config.out}", f"--out={out}"]) == 0
    about, step, state = kept(config.out / "best")
    loaded = hf.load(out)
    assert loaded.config.tied and not loaded.fresh
    for path, leaf in flatten_paths(state.params).items():
        assert np.array_equal(flatten_paths(loaded.params)[path], leaf), path
    assert (out / "tokenizer.json").read_bytes() == (
        Path(config.model) / "tokenizer.json"
    ).read_bytes()
    end = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).token_to_id
    for name in ("config.json", "generation_config.json"):
        about = json.loads((out / name).read_text())
        assert about["eos_token_id"] == end("<|endoftext|>"), name
    about, _, _ = kept(config.out / "best")
    card = (out / "README.md").read_text()
    assert "method `oasis`" in card and f"{step:,} steps of 4 x 32" in card
    assert about["data"] in card and "val_loss" in card


def test_adapters_are_merged_in_an_export(classify, tmp_path):
    config = dataclasses.replace(classify, method="lora", steps=2, eval_every=2)
    finetune.run(config)
    out = export.run(Export(config.out, tmp_path / "exported"))
    _, _, state = kept(config.out / "best")
    merged, began = flatten_paths(state.merged_params()), flatten_paths(state.params)
    loaded = hf.load(out)
    for path, leaf in flatten_paths(loaded.params).items():
        assert np.array_equal(leaf, merged[path]), path
    kernel = "blocks/attn/q_proj/kernel"
    assert not np.array_equal(merged[kernel], began[kernel])
    about = json.loads((out / "config.json").read_text())
    assert about["id2label"] == {"0": "negative", "1": "positive"}
    assert about["problem_type"] == "single_label_classification"
    # Tuned again, on a head whose labels are in another order, it has the same scores.
    swapped = tmp_path / "swapped"
    head = loaded.params["classifier"]
    head = {"kernel": head["kernel"][:, ::-1], "bias": head["bias"][::-1]}
    names = ("Positive", "Negative")
    params = loaded.params | {"classifier": head}
    hf.save(swapped, loaded.config, params, source=out, label_names=names)
    again = dataclasses.replace(
        config, model=str(swapped), out=tmp_path / "again", lr=1e-12, steps=1
    )
    before = lines(config.out)[-1]
    assert finetune.run(again)["best"]["accuracy"] == before["accuracy"]
    assert kept(again.out / "best")[0]["labels"] == [*names]


def test_a_pretrained_model_is_exported_too(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a model learns to write, " * 100)
    run = Pretrain(
        data=str(text), cache=tmp_path / "cache", out=tmp_path / "run", seq=16, batch=2
    )
    pretrain(dataclasses.replace(run, steps=1, eval_batches=1))
    out = export.run(Export(run.out, tmp_path / "exported"))
    loaded = hf.load(out)
    assert loaded.config.vocab_size == 256
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    every = "".join(map(chr, range(0x110))) + "𝄞"
    assert tokenizer.encode(every).ids == [*every.encode()]
    assert tokenizer.decode([*every.encode()]) == every
    assert (
        tokenizer.token_to_id(
            json.loads((out / "tokenizer_config.json").read_text())["eos_token"]
        )
        == coder_of(None).separator
        == json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    )
    _, _, state = kept(run.out / "checkpoints")
    kernel = "blocks/mlp/up_proj/kernel"
    assert np.array_equal(
        flatten_paths(loaded.params)[kernel], flatten_paths(state.params)[kernel]
    )


@pytest.mark.parametrize("which", ["instruct", "classify"])
def test_microbatches_weigh_alike(which, request):
    """A batch cut in two gives the gradient of the whole, though counts differ."""
    config = request.getfixturevalue(which)
    config = dataclasses.replace(config, method="adamw", rank=None, warmup=0)
    rng = np.random.default_rng(0)
    if which == "instruct":
        tokens = rng.integers(0, 256, (4, 33)).astype(np.int32)
        share = [[0.1], [0.9], [0.5], [0.3]]
        weights = (rng.uniform(size=(4, 32)) < share).astype("f4")
        batch = {"tokens": tokens, "segments": np.ones_like(tokens), "weights": weights}
    else:  # rows of two examples, of one and of none
        config = dataclasses.replace(config, pack=True, batch=4, seq=16)
        tokens = rng.integers(4, 14, (4, 16)).astype(np.int32)
        weights = (np.arange(2) < [[2], [2], [1], [0]]).astype("f4")
        batch = {
            "tokens": tokens,
            "segments": np.repeat(np.array([[1, 2]] * 4, np.int32), 8, axis=1),
            "types": np.zeros_like(tokens),
            "firsts": np.array([[0, 8]] * 4, np.int32),
            "labels": rng.integers(0, 2, (4, 2)).astype(np.int32),
            "weights": weights,
        }
    loaded = hf.load(config.model, **{"labels": 2} if which == "classify" else {})
    states = []
    for accumulate in (1, 2):
        own = dataclasses.replace(config, accumulate=accumulate)
        setup = build.tuning(own, loaded.config, params=loaded.params)
        states.append(jax.jit(train_step(setup, accumulate))(setup.state, batch))
    (one, loss), (two, other) = states
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(one.opt_state), jax.tree.leaves(two.opt_state), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("which", ["classify", "instruct"])
def test_a_plan_needs_neither_weights_nor_data(which, request, tmp_path, capsys):
    config = request.getfixturevalue(which)
    folder = tmp_path / "shape"
    folder.mkdir()
    text = (Path(config.model) / "config.json").read_text()
    (folder / "config.json").write_text(text)
    own = dataclasses.replace(
        config, model=str(folder), data="nowhere", target="cpu", json=True
    )
    assert main(flags(own)) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["peak_bytes"] > planned["parts"]["weights"] > 0
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("which", "changes", "message"),
    [
        ("classify", {"task": "qqp"}, "--task is 'qqp', expected one of cola, mrpc"),
        ("classify", {"task": "sft"}, "--task sft needs a model of llama"),
        ("instruct", {"task": "rte"}, "--task rte needs a model of bert, roberta, and"),
        ("classify", {"seq": 17}, "seq 17 .* 16 positions"),
        ("classify", {"epochs": 0.0}, "--epochs is 0.0, expected a positive number"),
        ("classify", {"model": "/nowhere/at all"}, "/nowhere/at all: there is no such"),
        ("classify", {"data": "/nowhere"}, "/nowhere"),
        ("classify", {"rank": "17"}, "17"),
        ("classify", {"label": "stars", "task": "classification"}, "sst2"),
    ],
)
def test_bad_input_is_one_sentence(which, changes, message, request, capsys):
    config = request.getfixturevalue(which)
    words = flags(config)
    for name, value in changes.items():
        words = [w for w in words if not w.startswith(f"--{name.replace('_', '-')}=")]
        words.append(f"--{name.replace('_', '-')}={value}")
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert re.search(message, said), said
    assert not config.out.exists()


def test_export_writes_over_nothing(classify, tmp_path, capsys):
    command = ["export", f"--checkpoint={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert main(command) == 2
    assert "there is no checkpoint in it" in capsys.readouterr().err
    finetune.run(dataclasses.replace(classify, steps=1, eval_every=1))
    out = tmp_path / "taken"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert main(["export", f"--checkpoint={classify.out}", f"--out={out}"]) == 2
    assert "is there and not empty" in capsys.readouterr().err
    assert [f.name for f in out.iterdir()] == ["thesis.txt"]
