"""Training runs end to end: results, resumption, skipped updates, bad input."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.checkpoints import Checkpoints
from oasis_jax.paths import flatten_paths
from train.__main__ import main
from train.commands import pretrain
from train.errors import Diverged, Preempted
from train.options import Pretrain
from train.run import build, evaluation, loop
from train.run.setup import train_step
from train.run.trials import command_line

WORDS = (
    "the basis follows the activations a little every step and the moments go along "
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(WORDS * 200)
    return path


@pytest.fixture
def small(corpus, tmp_path) -> Pretrain:
    return Pretrain(
        data=str(corpus),
        cache=tmp_path / "cache",
        out=tmp_path / "run",
        steps=8,
        batch=4,
        seq=16,
        eval_every=4,
        eval_batches=2,
        checkpoint_every=2,
        log_every=1,
    )


@pytest.fixture
def plain(small) -> Pretrain:
    """Of a step that is compiled sooner, where the method does not matter."""
    return dataclasses.replace(small, method="adamw")


def flags(config: Pretrain) -> list[str]:
    """The command line that gives this configuration."""
    return command_line("pretrain", dataclasses.asdict(config))[3:]


def lines(out: Path) -> list[dict]:
    return [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def checkpointed(out: Path, config: Pretrain):
    """The state in the newest checkpoint of a run, as a list of arrays."""
    with Checkpoints(out / "checkpoints") as checkpoints:
        step, state = checkpoints.restore(build.pretraining(config, 256).state)
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("method", ["oasis", "adamw"])
def test_run_writes_what_it_promises(small, method):
    config = dataclasses.replace(small, method=method, tensorboard=True)
    summary = pretrain.run(config)
    assert json.loads((config.out / "summary.json").read_text()) == summary
    assert summary["val_loss"] < np.log(256)
    assert summary["curve"][-1] == [8, summary["val_loss"]]
    training = [r for r in lines(config.out) if "loss" in r]
    assert [r["step"] for r in training] == list(range(1, 9))
    assert training[-1]["loss"] < training[0]["loss"]
    energies = training[-1]["captured_energy"]
    if method == "oasis":
        assert set(energies) == {
            "blocks/attn/qkv",
            "blocks/attn/o_proj",
            "blocks/mlp/gate_up",
            "blocks/mlp/down_proj",
        }
        assert all(len(layers) == 4 for layers in energies.values())
        assert all(0 < e <= 1.0001 for layers in energies.values() for e in layers)
    else:
        assert energies == {}
    assert (config.out / "loss.png").stat().st_size > 5_000
    assert (config.out / "energy.png").exists() == (method == "oasis")
    assert list((config.out / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("remat", "parts"),
    [
        # Quick ones of the same kind are in tests/planning/test_memory.py.
        pytest.param(
            "none",
            ("saved_activation", "gradient", "optimizer_state", "peak"),
            marks=pytest.mark.slow,
        ),
        # Here AdamW recomputes its dense layers' inputs, too, and keeps no coefficients.
        pytest.param(
            "elementwise",
            ("gradient", "optimizer_state", "peak"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_oasis_needs_less_than_adamw(small, remat, parts):
    config = dataclasses.replace(small, rank="0.125", remat=remat, steps=1)
    oasis = pretrain.run(config)
    out = small.out.with_name("adamw")
    adamw = pretrain.run(
        dataclasses.replace(config, method="adamw", rank=None, out=out)
    )
    for part in parts:
        assert oasis[f"{part}_bytes"] < adamw[f"{part}_bytes"], part
    assert oasis["weight_bytes"] == adamw["weight_bytes"]


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in ({}, {"method": "oasis-random"}, {"method": "adamw"})
        ),
    ],
    ids=["accumulate", "oasis", "random", "adamw"],
)
def test_resume_is_bit_equal(small, changes, killed_at):
    config = dataclasses.replace(small, **changes)
    pretrain.run(config)
    whole = checkpointed(config.out, config)

    broken = dataclasses.replace(config, out=config.out.with_name("broken"))
    killed_at(5, lambda: pretrain.run(broken))
    pretrain.run(dataclasses.replace(broken, resume=True))
    resumed = checkpointed(broken.out, config)

    assert resumed[0] == whole[0] == 8
    assert len(resumed[1]) == len(whole[1])
    for a, b in zip(resumed[1], whole[1], strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    strip = ("step", "loss", "val_loss", "captured_energy")
    assert [[r.get(k) for k in strip] for r in lines(broken.out)] == [
        [r.get(k) for k in strip] for r in lines(config.out)
    ]


def test_resume_before_the_first_checkpoint_starts_again(plain, killed_at):
    config = dataclasses.replace(plain, checkpoint_every=100)
    killed_at(1, lambda: pretrain.run(config))
    summary = pretrain.run(dataclasses.replace(config, resume=True))
    assert summary["curve"][-1][0] == 8 and len(lines(config.out)) == 8 + 2


def test_sigterm_saves_and_says_how_to_go_on(small, tmp_path):
    config = dataclasses.replace(small, steps=100_000, checkpoint_every=100_000)
    said = tmp_path / "stderr.txt"
    with said.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "train", *flags(config)], stderr=stderr
        )
        metrics = config.out / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None, said.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == Preempted.exit_code
    assert "which is saved; continue with --resume" in said.read_text()
    step, _ = checkpointed(config.out, config)
    assert step == [r for r in lines(config.out) if "loss" in r][-1]["step"]


def test_damaged_newest_checkpoint_falls_back(plain):
    pretrain.run(plain)
    newest = max((plain.out / "checkpoints").iterdir(), key=lambda p: int(p.name))
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.warns(RuntimeWarning, match=rf"{newest}.*falling back"):
        summary = pretrain.run(dataclasses.replace(plain, resume=True))
    assert summary["curve"][-1][0] == 8
    assert newest.exists() or (newest.parent / "superseded").exists()


def test_not_finite_updates_are_skipped_counted_and_stop(small, monkeypatch, capsys):
    config = dataclasses.replace(small, max_skips=3, steps=20, checkpoint_every=1)
    real = build.pretraining

    def poisoned(config, vocab_size):
        setup = real(config, vocab_size)

        def loss_fn(variables, batch):
            total, weight = setup.objective.loss_fn(variables, batch)
            bad = jnp.sum(batch["tokens"]) % 2 == 0
            return jnp.where(bad, jnp.nan * total, total), weight

        objective = dataclasses.replace(setup.objective, loss_fn=loss_fn)
        return dataclasses.replace(setup, objective=objective)

    monkeypatch.setattr(build, "pretraining", poisoned)
    with pytest.raises(Diverged, match="3 updates in a row were not finite"):
        pretrain.run(config)
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["diverged"] and summary["val_loss"] is None
    said = capsys.readouterr().err
    assert "update skipped (1 in a row, 1 in all)" in said
    assert "update skipped (3 in a row" in said
    monkeypatch.undo()
    with Checkpoints(config.out / "checkpoints") as checkpoints:
        _, state = checkpoints.restore(build.pretraining(config, 256).state)
    clean = jax.tree.leaves((state.params, state.subspace, state.opt_state))
    assert all(np.isfinite(leaf).all() for leaf in clean)


def test_a_finished_run_can_be_extended(plain, capsys):
    config = dataclasses.replace(plain, steps=4)
    pretrain.run(config)
    more = dataclasses.replace(config, steps=6, resume=True)
    summary = pretrain.run(more)
    assert "extended   from 4 to 6 steps" in capsys.readouterr().err
    assert summary["steps"] == 6 and summary["config"]["steps"] == 6
    assert json.loads((plain.out / "config.json").read_text())["steps"] == 6
    records = [r for r in lines(plain.out) if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, 7))
    schedule = build.pretraining(more, 256).schedule
    rates = [float(schedule(step)) for step in (4, 5)]
    assert [r["learning_rate"] for r in records[4:]] == pytest.approx(rates)
    # It has six steps now.
    assert main(flags(dataclasses.replace(more, steps=4))) == 2
    assert "--steps was 6 and is 4" in capsys.readouterr().err


def test_an_unfinished_run_is_not_extended(plain, killed_at, capsys):
    killed_at(5, lambda: pretrain.run(plain))
    assert main(flags(dataclasses.replace(plain, steps=9, resume=True))) == 2
    assert "--steps was 8 and is 9" in capsys.readouterr().err


def test_killed_in_the_last_evaluation_only_that_is_left(plain, monkeypatch):
    """All is saved before; a stop signal in it is no other kill."""
    real = evaluation.held_out_loss

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    config = dataclasses.replace(plain, eval_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "held_out_loss", stopped)
        with pytest.raises(Preempted, match="stopped after step 8, which is saved"):
            pretrain.run(config)
    before = lines(config.out)
    assert [r["step"] for r in before] == list(range(1, 9))
    summary = pretrain.run(dataclasses.replace(config, resume=True))
    after = lines(config.out)
    assert after[:-1] == before
    assert after[-1]["val_loss"] == summary["val_loss"]


def test_nothing_is_compiled_after_the_first_evaluation(plain, monkeypatch):
    """One program trains and one evaluates, however often."""
    judged, compiled = [], []

    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(len(judged))

    real = evaluation.held_out_loss

    def counted(*args):
        result = real(*args)
        judged.append(result)
        return result

    monkeypatch.setattr(evaluation, "held_out_loss", counted)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        pretrain.run(dataclasses.replace(plain, eval_every=1))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert len(judged) == 8
    assert 0 in compiled and not [after for after in compiled if 0 < after < 8]


@pytest.fixture
def rising(monkeypatch):
    """Losses that are huge at some calls of the step, as after a ruined update."""

    def among(steps):
        real, count = loop.compiled_step, itertools.count(1)

        def compiled(*args):
            step = real(*args)

            def risen(state, batch):
                state, loss = step(state, batch)
                return state, loss * (100.0 if next(count) in steps else 1.0)

            risen.memory_analysis = step.memory_analysis
            return risen

        monkeypatch.setattr(loop, "compiled_step", compiled)

    return among


@pytest.fixture
def long(plain) -> Pretrain:
    """Of more steps than it takes to see that it has diverged."""
    return dataclasses.replace(plain, steps=60, checkpoint_every=5, eval_every=60)


def test_a_loss_that_rises_stops_the_run(long, rising, capsys):
    rising(range(35, 1000))
    config = long
    with pytest.raises(
        Diverged, match=r"stopped at step 45: the median loss .*"
    ) as stop:
        pretrain.run(config)
    newest = config.out / "checkpoints" / "25"
    assert f"the newest checkpoint from before is {newest}" in str(stop.value)
    with Checkpoints(config.out / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [20, 25, 30]
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["diverged"] is True and summary["rollbacks"] == 0


def test_a_run_that_diverged_goes_back(long, rising, capsys):
    rising(range(35, 46))
    config = dataclasses.replace(long, on_divergence="rollback")
    summary = pretrain.run(config)
    said = capsys.readouterr().err
    assert "back to step 25, with other batches (1 of at most 3 rollbacks)" in said
    assert summary["rollbacks"] == 1 and not summary["diverged"]
    assert [r["step"] for r in lines(config.out) if "loss" in r] == list(range(1, 61))
    with Checkpoints(config.out / "checkpoints") as checkpoints:
        data = checkpoints.config()["losses"]
    assert data["rollbacks"] == 1


def test_a_run_goes_back_three_times_at_most(long, rising, capsys):
    rising(range(35, 1000))
    config = dataclasses.replace(long, on_divergence="rollback")
    with pytest.raises(Diverged, match="after 3 rollbacks"):
        pretrain.run(config)
    assert capsys.readouterr().err.count("with other batches") == 3
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["diverged"] and summary["rollbacks"] == 3


BAD = {
    "rank above n_in": (dict(rank="4096"), "has only 128 input features"),
    "rank zero": (dict(rank="0"), "rank is 0"),
    "rank above one": (dict(rank="1.5"), "rank is 1.5"),
    "rank no number": (dict(rank="half"), "--rank is 'half'"),
    "rule without match": (dict(pattern="mpl/"), "rule 'mpl/' matches no kernel"),
    "method": (dict(method="osais"), "method is 'osais', expected one of adamw, oasis"),
    "preset": (
        dict(preset="llama-2"),
        "preset is 'llama-2', expected one of llama-tiny",
    ),
    "remat": (dict(remat="all"), "remat is 'all'"),
    "residuals": (
        dict(residuals="int4"),
        "--residuals is 'int4', expected one of whole",
    ),
    "loss chunk": (dict(loss_chunk=0), "--loss-chunk is 0, expected at least 1"),
    "lr": (dict(lr=-1.0), "--lr is -1.0"),
    "lr nan": (dict(lr=float("nan")), "--lr is nan"),
    "steps": (dict(steps=0), "--steps is 0, expected at least 1"),
    "accumulate": (dict(accumulate=3), "--batch 4 does not divide into --accumulate 3"),
    "dtype": (dict(dtype="float8"), "--dtype is 'float8'"),
    "missing data": (dict(data="nowhere.txt"), "nowhere.txt"),
    "too short": (dict(seq=100_000), "seq 100000 needs at least 100001 training"),
}


@pytest.mark.parametrize("changes, sentence", BAD.values(), ids=BAD)
def test_bad_options(small, changes, sentence, capsys):
    words = flags(small)
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}="
        words = [*(w for w in words if not w.startswith(flag)), f"{flag}{value}"]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and sentence in said
    assert not small.out.exists()


def test_refuses_to_write_over_another_run(small, capsys):
    small.out.mkdir()
    (small.out / "thesis.txt").write_text("ten years of work")
    assert main(flags(small)) == 2
    assert f"--out {small.out} already holds something" in capsys.readouterr().err
    assert [p.name for p in small.out.iterdir()] == ["thesis.txt"]


def test_resume_without_a_run(small, capsys):
    assert main(flags(dataclasses.replace(small, resume=True))) == 2
    assert "there is no run in --out" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Pretrain:
    """A run of two steps, which tests copy."""
    folder = tmp_path_factory.mktemp("finished")
    text = folder / "mine.txt"
    text.write_text(corpus.read_text())
    where = dict(data=str(text), cache=folder / "cache", out=folder / "run")
    config = Pretrain(steps=2, batch=4, seq=16, eval_batches=1, **where)
    pretrain.run(config)
    return config


@pytest.fixture
def copied(finished, tmp_path) -> Pretrain:
    shutil.copytree(finished.out, tmp_path / "run")
    return dataclasses.replace(finished, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"method": "adamw"}, "--method was oasis and is adamw"),
        ({"preset": "llama-60m"}, "--preset was llama-tiny and is llama-60m"),
        ({"rank": "0.5"}, "--rank was not given and is 0.5"),
    ],
)
def test_resume_with_other_options(copied, changes, sentence, capsys):
    before = {p: p.read_bytes() for p in copied.out.rglob("*") if p.is_file()}
    assert main(flags(dataclasses.replace(copied, **changes))) == 2
    assert sentence in capsys.readouterr().err
    after = {p: p.read_bytes() for p in copied.out.rglob("*") if p.is_file()}
    assert before == after


def test_a_finished_run_is_left_as_it_is(copied, capsys):
    files = ("summary.json", "metrics.jsonl", "config.json", "loss.png")
    before = {name: (copied.out / name).read_bytes() for name in files}
    assert main(flags(copied)) == 0
    out, err = capsys.readouterr()
    assert "has all of its 2 steps" in err and "validation loss" in out
    assert before == {name: (copied.out / name).read_bytes() for name in files}


def test_a_finished_run_without_a_loss_is_judged_again(copied, capsys):
    """As one that diverged at its last step leaves it."""
    file = copied.out / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps(summary | {"val_loss": None, "diverged": True}))
    assert main(flags(copied)) == 0
    assert "validation loss" in capsys.readouterr().out
    assert json.loads(file.read_text())["val_loss"] == summary["val_loss"]


def test_resume_with_other_text(copied, capsys):
    """The options are those of the run, but behind the file's name is other text."""
    text = Path(copied.data)
    before = text.read_text()
    try:
        text.write_text(before[::-1])
        assert main(flags(copied)) == 2
    finally:
        text.write_text(before)
    assert "the text or its tokenizer changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method, how",
    [
        pytest.param(method, how, marks=() if quick else pytest.mark.slow)
        for method, how, quick in [
            ("oasis", "frozen", True),
            ("oasis", "adafactor", True),
            ("lora", "frozen", False),
            ("lora", "adafactor", False),
            ("galore", "frozen", False),
            ("adamw", "adafactor", False),
        ]
    ],
)
def test_embeddings_have_an_optimizer_of_their_own(small, method, how):
    """As a run's first step: what moves, and what the optimizer keeps."""
    plain = build.pretraining(dataclasses.replace(small, method=method))
    config = dataclasses.replace(small, method=method, embeddings=how)
    setup = build.pretraining(config)
    first = flatten_paths(setup.state.params)

    def kept(setup):
        return sum(leaf.size for leaf in jax.tree.leaves(setup.state.opt_state))

    moments = 2 * (first["embed/embedding"].size + first["lm_head/kernel"].size)
    # Adafactor keeps a row and a column of each, and placeholders.
    rest = 0 if how == "frozen" else 2 * (256 + 128) + 16
    assert abs(kept(plain) - kept(setup) - moments) <= rest

    tokens = np.arange(4 * 17, dtype=np.int32).reshape(4, 17)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens)}
    step = jax.jit(train_step(setup, 1))
    state = setup.state
    for _ in range(2):  # the schedule starts at zero
        state, _ = step(state, batch)
    last = flatten_paths(state.params)
    moved = {path for path in first if not np.array_equal(first[path], last[path])}
    assert ("embed/embedding" in moved) == (how == "adafactor")
    assert ("lm_head/kernel" in moved) == (how == "adafactor")
    assert "norm/scale" in moved


def test_unknown_way_with_embeddings(capsys):
    assert main(["pretrain", "--embeddings", "sgd"]) == 2
    assert capsys.readouterr().err == (
        "error: --embeddings is 'sgd', expected one of adamw, adafactor, frozen\n"
    )
