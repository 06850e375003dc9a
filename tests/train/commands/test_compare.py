"""The comparison: equal terms, best learning rate, one table; and its bad input."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from train.__main__ import main
from train.commands import compare
from train.errors import Diverged, UserError
from train.options import Compare
from train.run import trials


@pytest.fixture
def small(tmp_path) -> Compare:
    text = tmp_path / "text.txt"
    text.write_text(
        "a comparison on equal terms is worth more than a fast number " * 200
    )
    return Compare(
        methods="adamw,oasis:0.5",
        lrs="1e-3,1e-2",
        seeds="0,1",
        data=str(text),
        cache=tmp_path / "cache",
        out=tmp_path / "compare",
        steps=3,
        batch=2,
        seq=16,
        eval_batches=2,
    )


def fake(losses: dict[str, float], calls: list[list[str]]):
    """Stands in for the trials' processes: writes the summary they would write."""

    def run(_, command):
        calls.append(command)
        option = dict(w[2:].split("=", 1) for w in command if "=" in w)
        out = Path(option["out"])
        out.mkdir(parents=True)
        loss = losses[f"{option['method']}@{float(option['lr']):g}"]
        diverged = loss != loss
        loss = None if diverged else loss + 0.5 * int(option["seed"])
        summary = dict(method=option["method"], lr=float(option["lr"]), val_loss=loss)
        summary |= dict(diverged=diverged)
        summary |= dict(seed=int(option["seed"]), val_tokens=64, tokens_per_s=10.0)
        summary |= dict(step_ms_median=5.0, saved_activation_bytes=1, gradient_bytes=1)
        summary |= dict(optimizer_state_bytes=1, peak_bytes=2**20, rank=None)
        summary |= dict(curve=[] if diverged else [[3, loss]])
        (out / "summary.json").write_text(json.dumps(summary))
        code = Diverged.exit_code if diverged else 0
        return subprocess.CompletedProcess(command, code, "", "")

    return run


NAN = float("nan")


def test_keeps_the_best_rate_and_repeats_it_with_every_seed(small, monkeypatch):
    calls: list[list[str]] = []
    losses = {
        "adamw@0.001": 2.0,
        "adamw@0.01": 3.0,
        "oasis@0.001": NAN,
        "oasis@0.01": 1.0,
    }
    monkeypatch.setattr(trials.Processes, "run", fake(losses, calls))
    adamw, oasis = compare.run(small)
    assert (adamw["lr"], adamw["val_loss"]) == (1e-3, 2.25)  # seeds 0 and 1
    assert (oasis["lr"], oasis["val_loss"]) == (1e-2, 1.25)
    assert len(calls) == 6  # two methods, two rates, and the best of each once more
    assert all("--rank=0.5" in c for c in calls if "--method=oasis" in c)
    assert len(oasis["all"]) == 3 and adamw["seeds"] == [0, 1]
    table = (small.out / "compare.md").read_text()
    assert "diverged" in table and "-44.44 %" in table
    compare.run(small)
    assert len(calls) == 6  # finished trials are kept


def test_trials_share_all_options_but_their_own(small, monkeypatch):
    calls: list[list[str]] = []
    losses = dict.fromkeys(
        ["adamw@0.001", "adamw@0.01", "oasis@0.001", "oasis@0.01"], 1.0
    )
    monkeypatch.setattr(trials.Processes, "run", fake(losses, calls))
    compare.run(small)
    own = ("--method=", "--lr=", "--seed=", "--out=", "--rank=")
    shared = {tuple(w for w in c if not w.startswith(own)) for c in calls}
    assert len(shared) == 1


def test_end_to_end(small):
    """Two real trials, as processes."""
    config = dataclasses.replace(small, lrs="3e-3", seeds="0", jobs=2)
    rows = compare.run(config)
    expected = "method val_loss val_tokens tokens_per_s step_ms_median"
    expected += " saved_activation_bytes gradient_bytes optimizer_state_bytes"
    expected += " peak_bytes lr rank"
    written = json.loads((config.out / "compare.json").read_text())
    assert written == rows
    for row in rows:
        assert set(expected.split()) <= set(row)
        assert row["val_loss"] < 5.6
    assert rows[0]["optimizer_state_bytes"] > rows[1]["optimizer_state_bytes"]
    assert (config.out / "compare.png").stat().st_size > 5_000
    assert "| oasis:0.5 |" in (config.out / "compare.md").read_text().replace("**", "")


BAD = {
    "method": ("--methods=adamw,nosuch", "--methods: method is 'nosuch'"),
    "residuals": ("--methods=oasis:0.5:int4", "--residuals is 'int4', expected one of"),
    "method twice": ("--methods=adamw,adamw", "expected distinct names"),
    "rates": ("--lrs=1e-3,fast", "--lrs is '1e-3,fast'"),
    "rate twice": ("--lrs=1e-3,0.001", "a number stands there twice"),
    "seeds": ("--seeds=0.5", "--seeds is '0.5'"),
    "rank": ("--methods=oasis:much", "--rank is 'much'"),
}


@pytest.mark.parametrize("flag, sentence", BAD.values(), ids=BAD)
def test_bad_options(small, flag, sentence, capsys):
    assert main(["compare", f"--out={small.out}", flag]) == 2
    assert sentence in capsys.readouterr().err
    assert not small.out.exists()


def test_refuses_what_is_not_its_own(small):
    small.out.mkdir()
    (small.out / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="not a comparison"):
        compare.run(small)


def test_refuses_other_options(small, monkeypatch):
    losses = dict.fromkeys(
        ["adamw@0.001", "adamw@0.01", "oasis@0.001", "oasis@0.01"], 1.0
    )
    monkeypatch.setattr(trials.Processes, "run", fake(losses, []))
    compare.run(small)
    with pytest.raises(UserError, match="--steps was 3 and is 4"):
        compare.run(dataclasses.replace(small, steps=4))


def test_a_failed_trial_says_why(small):
    config = dataclasses.replace(small, data="nowhere.txt")
    with pytest.raises(UserError, match=r"trial adamw-lr0.001-seed0: error: .*nowhere"):
        compare.run(config)


@pytest.mark.parametrize(
    ("label", "settings", "name"),
    [
        ("oasis", ("oasis", None, "whole"), "oasis-lr0.001-seed0"),
        ("oasis:0.5", ("oasis", "0.5", "whole"), "oasis-r0.5-lr0.001-seed0"),
        ("oasis:64:int8", ("oasis", "64", "int8"), "oasis-r64-int8-lr0.001-seed0"),
        ("galore::fp8", ("galore", None, "fp8"), "galore-fp8-lr0.004-seed0"),
    ],
)
def test_labels(label, settings, name):
    """What a label says of a trial, and the folder of its own that the trial gets."""
    said = compare.settings(Compare(), label)
    assert (said["method"], said["rank"], said["residuals"]) == settings
    assert compare.Trial(label, 1e-3, 0).name == name
