"""The log survives a kill, and files are replaced whole."""

import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from train.report.log import (
    MetricsLog,
    read_json,
    read_metrics,
    scalars,
    write_json,
)


def trained(step, **extra):
    return {"step": step, "loss": 5.0 / step, **extra}


def test_log_reads_back_what_was_written_and_flushes(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log({"step": 1, "loss": jnp.float32(0.5), "motion": {"a": np.array([1.0, 2])}})
        # Read before it is closed: a kill loses nothing that was logged.
        expected = {"step": 1, "loss": 0.5, "motion": {"a": [1.0, 2.0]}}
        assert log.records == read_metrics(path) == [expected]
        log({"step": 1, "val_loss": math.nan, "val_tokens": 64})
    assert read_metrics(path)[0] == expected
    odd = {"step": 1, "val_loss": None, "val_tokens": 64, "not_finite": ["val_loss"]}
    assert read_metrics(path)[1] == odd


@pytest.mark.parametrize(
    ("resumed_step", "kept"), [(None, [1, 2, 2, 3]), (2, [1, 2, 2]), (0, [])]
)
@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 4}'])
def test_resuming_forgets_later_steps_and_torn_lines(
    tmp_path, resumed_step, kept, torn
):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for record in (trained(1), trained(2), {"step": 2, "val_loss": 1}, trained(3)):
            log(record)
    path.write_text(path.read_text() + torn)
    with MetricsLog(path, resumed_step=resumed_step) as log:
        assert [record["step"] for record in log.records] == kept
        log(trained(9))
    assert [record["step"] for record in read_metrics(path)] == [*kept, 9]
    assert list(tmp_path.iterdir()) == [path]


def test_scalars_are_flat():
    record = {"step": 3, "loss": 1, "energy": {"mlp/down": [0.5, 0.25], "out": 0.75}}
    assert dict(scalars(record)) == {
        "loss": 1.0,
        "energy/mlp/down/0": 0.5,
        "energy/mlp/down/1": 0.25,
        "energy/out": 0.75,
    }


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    import tensorboardX

    seen = []
    monkeypatch.setattr(
        tensorboardX.SummaryWriter, "add_scalar", lambda _, *scalar: seen.append(scalar)
    )
    with MetricsLog(tmp_path / "m.jsonl", tensorboard=tmp_path / "events") as log:
        log(trained(5, motion={"a": [0.5]}))
    assert seen == [("loss", 1.0, 5), ("motion/a/0", 0.5, 5)]
    assert list((tmp_path / "events").iterdir())


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'oasis_jax\[tensorboard\]'"):
        MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path)
    MetricsLog(tmp_path / "metrics.jsonl").close()


def test_write_json_replaces_whole_files(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"loss": 1.5})
    before = path.read_text()
    with pytest.raises(ValueError, match="Circular"):
        endless: dict = {}
        endless["self"] = endless
        write_json(path, endless)
    assert path.read_text() == before
    write_json(path, {"loss": np.float32(0.5), "bytes": [1, 2]})
    assert json.loads(path.read_text()) == {"loss": 0.5, "bytes": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


def refused(word):
    raise ValueError(f"{word} is no JSON")


ODD = {
    "nan": ({"step": 1, "loss": float("nan")}, ["loss"]),
    "infinite, of numpy": ({"step": 1, "loss": np.float32("inf")}, ["loss"]),
    "nested": ({"step": 1, "motion": {"mlp": [0.5, float("nan")]}}, ["motion/mlp/1"]),
    "an array": ({"step": 1, "energy": np.array([1.0, -np.inf])}, ["energy/1"]),
}


@pytest.mark.parametrize("record, places", ODD.values(), ids=ODD)
def test_what_is_written_is_strict_json(record, places, tmp_path):
    """Null where a number is not finite, and a word of where; the step stays."""
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log(record)
        assert log.records[0]["not_finite"] == places
    write_json(tmp_path / "summary.json", record)
    for name in ("metrics.jsonl", "summary.json"):
        text = (tmp_path / name).read_text()
        kept = json.loads(text, parse_constant=refused)
        assert kept["not_finite"] == places and kept["step"] == 1
    assert read_json(tmp_path / "summary.json") == log.records[0]


def test_what_is_finite_has_no_such_word(tmp_path):
    write_json(tmp_path / "a.json", {"loss": np.float32(0.5), "path": None, "n": [1]})
    assert read_json(tmp_path / "a.json") == {"loss": 0.5, "path": None, "n": [1]}
