"""The benchmarks' scripts, as they are called, at sizes that say nothing."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

ROOT = Path(__file__).parent.parent
TINY = "--preset llama-tiny --layers 1 --vocab-size 64 --batch 2 --seq 16 --rounds 2"


def run(script: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *TINY.split(), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_step(tmp_path):
    out = tmp_path / "step.json"
    result = run("step.py", "--out", str(out))
    assert result.returncode == 0, result.stderr
    step = json.loads(out.read_text())
    names = {"oasis:elementwise", "adamw:elementwise"}
    assert set(step["ratio_median"]) == {"oasis:elementwise/adamw:elementwise"}
    for key in ("step_ms_median", "memory", "tokens_per_s", "model_flop_utilisation"):
        assert set(step[key]) == names
    assert all(len(times) == 2 for times in step["step_ms"].values())
    assert step["machine"]["jax"] == step["versions"]["jax"]
    # A CPU tells neither its peak nor what it held.
    assert set(step["model_flop_utilisation"].values()) == {None}
    assert set(step["peak_bytes"].values()) == {None}


@pytest.fixture(scope="module")
def frontier(tmp_path_factory):
    out = tmp_path_factory.mktemp("frontier") / "frontier.json"
    words = "adamw:none nosuch:none oasis:mlp:8:int8".split()
    result = run(
        "frontier.py", "--alone", "--configurations", *words, "--out", str(out)
    )
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.slow  # three processes
def test_frontier(frontier):
    result = json.loads(frontier.read_text())
    assert result["processes"] == "one each"
    first, unknown, other = result["rows"]
    assert first["ratio"]["median"] == pytest.approx(1, rel=1e-6)
    assert "nosuch" in unknown["failed"]
    assert (other["rank"], other["residuals"]) == ("8", "int8")
    assert other["ratio"]["low"] <= other["ratio"]["median"] <= other["ratio"]["high"]
    assert len(other["step_seconds"]) == 2
    assert other["compiled_peak_bytes"] == other["memory"]["peak"] > 0


@pytest.mark.slow
def test_frontier_picture(frontier):
    assert imread(frontier.with_suffix(".png")).ndim == 3


def test_a_wrong_configuration_is_one_line():
    result = run("step.py", "--configurations", "oasis")
    assert result.returncode == 1
    assert result.stderr.startswith("error: configuration is 'oasis', expected method:")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def glue(monkeypatch, tmp_path):
    """The script as a module, its trials a formula of learning rate and seed."""
    spec = importlib.util.spec_from_file_location("glue", ROOT / "benchmarks/glue.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "glue", module)
    spec.loader.exec_module(module)
    module.ran = []

    def trial(out, command):
        out.mkdir(parents=True)
        options = dict(word[2:].split("=") for word in command[4:] if "=" in word)
        module.ran.append(options)
        lr, seed = float(options["lr"]), int(options["seed"])
        return {
            "diverged": lr > 0.5,
            "best": {"score": 0.5 + lr + 0.01 * seed},
            "step_ms_median": 5.0,
            "peak_bytes": 7,
        }

    monkeypatch.setattr(module, "run_trial", trial)
    # What it sets for its trials stays here.
    monkeypatch.setattr(module.os, "environ", dict(module.os.environ))
    return module


def test_glue_sweeps_repeats_and_goes_on(glue, tmp_path, capsys):
    config = glue.Config(
        model=Path("encoder"),
        data=Path("glue"),
        methods=("adamw", "galore"),
        tasks=("cola", "rte"),
        lrs=(0.1, 0.2, 0.4),
        beyond=(0.05, 0.45),
        out=tmp_path / "runs",
        results=tmp_path / "glue.json",
    )
    rows = {row["method"]: row for row in glue.run(config)}
    assert len(glue.ran) == 2 * 2 * (3 + 1 + 2)
    # GaLore takes learning rates times four, and diverges at all but the smallest two.
    best = {name: row["tasks"]["rte"]["lr"] for name, row in rows.items()}
    assert best == {"adamw": 0.45, "galore": pytest.approx(0.4)}
    cell = rows["adamw"]["tasks"]["cola"]
    assert cell["mean"] == pytest.approx(96) and cell["seeds"] == 3
    assert cell["deviation"] == pytest.approx(1) and cell["bytes"] == {"peak_bytes": 7}
    assert rows["adamw"]["deviation"] == pytest.approx(2**0.5 / 2)
    ranks = {options["method"]: options.get("rank") for options in glue.ran}
    assert ranks == {"adamw": None, "galore": "32"}

    # Tasks begin at different rates, so that few compile the same step at a time.
    begins = {o["task"]: float(o["lr"]) for o in reversed(glue.ran) if "rank" not in o}
    assert begins == {"cola": 0.1, "rte": 0.2}

    glue.ran.clear()
    more = dataclasses.replace(config, methods=("adamw", "galore", "oasis"))
    assert len(glue.run(more)) == 3
    assert {options["method"] for options in glue.ran} == {"oasis"}
    for change in ({"rank": "8"}, {"size": (7, 8, 9)}):
        assert glue.main(dataclasses.replace(config, **change)) == 1
        assert "choose another file" in capsys.readouterr().err
    sized = dataclasses.replace(config, size=(7, 8, 9), results=tmp_path / "sized.json")
    glue.ran.clear()
    glue.run(sized)
    sizes = {(o["steps"], o["batch"], o["seq"]) for o in glue.ran}
    assert sizes == {("7", "8", "9")}
