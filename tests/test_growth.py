"""A new thing is a row of a table and at most one new part; done once for each table.

Each case is what a person would add, in a process of its own, before the command runs:
no other module is told of it. `FILES` says where it would be written.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = "a row is enough where a table says all that there is to say of a thing " * 60

FILES = {
    "task": ["train/data/tasks.py"],
    "tracker": ["oasis_jax/trackers/every_step.py", "oasis_jax/trackers/__init__.py"],
    "method": ["oasis_jax/recipes.py", "oasis_jax/methods.py"],
    "target": ["oasis_jax/planning/targets.py"],
}

TASK = """
from train.data.tasks import TASKS, Columns, Task
TASKS["qnli"] = Task(
    Columns(("question", "sentence"), "label"),
    labels=("entailment", "not_entailment"),
)
"""
METHOD = """
from dataclasses import dataclass
import optax
from oasis_jax import methods, recipes
from oasis_jax.recipes import Recipe

@dataclass(frozen=True)
class SignOptions:
    gain: float = recipes.option(1.0, "Multiplies all updates.")

def sign(where, options):
    return Recipe((), lambda lr, peak=None, **adam: optax.chain(
        optax.scale_by_sign(), optax.scale(options.gain),
        optax.scale_by_learning_rate(lr)))

methods.METHODS["sign"] = methods.Method(
    about="signs", paper="ours", saves="X", basis="-", moved="-", moments="-",
    gradient="full", rank=None, build=sign, options=SignOptions,
    optimizer_numbers=lambda i, o, r: 0,
)
"""
TRACKER = """
from dataclasses import dataclass
from typing import ClassVar
from oasis_jax.trackers import TRACKERS, Oja

@dataclass(frozen=True)
class Slow(Oja):
    rate: float = 0.1
    name: ClassVar[str] = "slow"

TRACKERS["slow"] = Slow
"""
TARGET = """
from oasis_jax.planning.targets import TARGETS, Target
TARGETS["desk"] = Target("desk", "cpu", 8 * 2**30, 1e12, 1e11)
"""
MAIN = """
import sys
from train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
# The same options for another method, then the help; one process for both.
AND_AFTER = """
import sys
from train.__main__ import main
code = main(sys.argv[1:])
other = main([w.replace("method=sign", "method=oasis") for w in sys.argv[1:]])
print("codes", code, other)
main(["pretrain", "--help"])
"""


def python(code: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )


@pytest.fixture
def small(tmp_path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    places = [f"--data={text}", f"--cache={tmp_path}/cache", f"--out={tmp_path}/run"]
    return [*places, *"--steps=2 --batch=2 --seq=16 --eval-batches=1".split()]


def test_files_that_a_person_would_touch():
    root = Path(__file__).parent.parent
    for files in FILES.values():
        assert len(files) <= 2
        assert all((root / file).is_file() for file in files)


def test_a_method_with_an_option_of_its_own(small, tmp_path):
    words = ["pretrain", "--method=sign", "--gain=0.5", *small]
    run = python(METHOD + AND_AFTER, *words)
    assert "codes 0 2" in run.stdout, run.stderr
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["method"], saved["gain"]) == ("sign", 0.5)
    assert "--gain is no option of oasis" in run.stderr
    assert "options of sign" in run.stdout and "--gain" in run.stdout


def test_a_task(tmp_path):
    """Its columns are read, and a run that lacks them says so."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    words = [f"--model={folder}", f"--data={tmp_path}", f"--out={tmp_path / 'run'}"]
    known = python(TASK + MAIN, "finetune", "--task=qnli", *words)
    # It came as far as asking whether the model is of the kind that the task needs.
    assert known.returncode == 2
    assert "--task is 'qnli'" not in known.stderr
    unknown = python(MAIN, "finetune", "--task=qnli", *words)
    assert "--task is 'qnli', expected one of cola" in unknown.stderr


def test_a_tracker():
    code = """
from oasis_jax import Rule, select
from oasis_jax.subspace import Declaration, Place
import jax.numpy as jnp
params = {"up": {"kernel": jnp.zeros((8, 4))}}
declared = {"up": {"x": Declaration(Place(("kernel",)))}}
print(select(params, declared, [Rule("up", 2, "slow")]))
"""
    run = python(TRACKER + code)
    assert "rank 2, slow" in run.stdout, run.stderr


def test_a_target():
    small = "--preset llama-tiny --seq 16 --batch 1 --json".split()
    run = python(TARGET + MAIN, "plan", "--target=desk", *small)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["configuration"]["target"] == "desk"
