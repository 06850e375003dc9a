"""`python -m train plan`: the step that pretrain runs, and what fits into a budget."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import jax
import pytest

from oasis_jax.planning.memory import compiled_bytes, tree_bytes
from train.__main__ import main
from train.errors import UserError
from train.options import Plan, Pretrain
from train.run import search as searching
from train.run.build import pretraining
from train.run.planning import PARTS, Planned, as_flags, configuration
from train.run.setup import train_step

GIB = 2**30
SMALL = ("--preset", "llama-tiny", "--seq", "32", "--batch", "2")


def run(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(["plan", *words])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def as_json() -> dict:
    status, out, _ = run(*SMALL, "--json")
    assert status == 0
    return json.loads(out)


# --- One plan -----------------------------------------------------------------------


def test_is_what_pretrain_compiles(as_json):
    config = Plan(preset="llama-tiny", seq=32, batch=2)
    setup = pretraining(config.training())  # real weights, as a run has them
    step = jax.jit(train_step(setup, 1), donate_argnums=0)
    compiled = step.lower(setup.state, setup.objective.batch).compile()
    assert as_json["peak_bytes"] == compiled_bytes(compiled)
    assert as_json["parts"]["weights"] == tree_bytes(setup.state.params)


def test_json(as_json):
    assert set(as_json["parts"]) == {*PARTS, "workspace"}
    assert sum(as_json["parts"].values()) >= as_json["peak_bytes"]
    assert as_json["configuration"]["rank"] == 0.25  # the method's own
    assert as_json["configuration"]["target"] == "cpu"
    assert as_json["estimated_tokens_per_second"] > 0
    assert {"jax", "jaxlib", "flax", "optax", "libtpu", "oasis_jax", "python"} <= set(
        as_json["versions"]
    )


def test_table():
    status, out, _ = run(*SMALL)
    assert status == 0
    for words in ("optimizer state", "saved activations", "workspace", "total"):
        assert words in out
    assert "fits cpu" in out


def test_weights_in_bfloat16_and_moments_in_float32():
    """Of both methods, so that they compare; and a state goes in as it comes out."""
    for name in ("adamw", "oasis"):
        config = Plan(method=name, preset="llama-tiny", seq=32, batch=2)
        setup = pretraining(config.training(), abstract=True)
        state = setup.state
        assert {str(p.dtype) for p in jax.tree.leaves(state.params)} == {"bfloat16"}
        moments = {str(m.dtype) for m in jax.tree.leaves(state.opt_state)}
        assert moments == {"float32", "int32"}
        after, _ = jax.eval_shape(train_step(setup, 1), state, setup.objective.batch)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
            lambda a: (a.shape, a.dtype), state
        )


def test_abstract_set_up_has_the_shapes_of_a_real_one():
    config = Pretrain(seq=16, batch=2)
    shapes, state = (pretraining(config, 256, abstract=a).state for a in (True, False))
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(shapes)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(state)
    ]


def test_flags_give_the_configuration_again():
    config = Plan(method="velora", groups=16, remat="block", accumulate=2)
    words = as_flags(config)
    assert "--groups 16" in words
    assert "--remat block" in words
    assert "--accumulate 2" in words
    assert "--dtype" not in words  # as by default
    assert configuration(config)["groups"] == 16
    assert "rho" not in configuration(config)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--target", "h300"], "target is 'h300', expected one of h200, h100"),
        (["--preset", "llama-9b"], "preset is 'llama-9b', expected one of"),
        (["--method", "adam"], "method is 'adam', expected one of"),
        (["--remat", "most"], "remat is 'most', expected one of"),
        (["--param-dtype", "fp8"], "--param-dtype is 'fp8', expected float32 or"),
        (["--budget-gib", "-1"], "--budget-gib is -1.0, expected a positive number"),
        (["--budget-gib", "900"], "--budget-gib is 900, but cpu has 64.0 GiB"),
        (["--budget-gib", "1", "--methods", "a"], "--methods: method is 'a'"),
        (["--plans", "0"], "--plans is 0, expected at least 1"),
    ],
)
def test_errors_are_one_sentence(words, sentence):
    status, out, err = run(*SMALL, *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


# --- A search ------------------------------------------------------------------


def test_budget():
    status, out, err = run(
        *SMALL, "--methods", "oasis", "--rank", "16", "--budget-gib", "0.5", "--json"
    )
    assert status == 0
    found = json.loads(out)
    (plan,) = found["plans"]
    assert plan["peak_bytes"] <= found["budget_bytes"] == GIB // 2
    assert plan["configuration"]["rank"] == "16"
    assert plan["configuration"]["batch"] == 2
    assert found["adamw_block"]["configuration"]["method"] == "adamw"
    assert found["adamw_block"]["configuration"]["batch"] == 1
    assert "compile" in err


def test_impossible_budget(monkeypatch):
    def compile_plan(config):
        return Planned(config, 5 * GIB, {}, 1.0, True)

    monkeypatch.setattr(searching, "compile_plan", compile_plan)
    status, out, err = run(*SMALL, "--methods", "oasis", "--budget-gib", "0.001")
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: no plan fits --budget-gib 0.001: the smallest")
    assert "--remat block" in last
    assert last.endswith("needs 5.00 GiB")


def test_plan_refuses_nonsense_when_made():
    with pytest.raises(UserError, match="--budget-gib is nan"):
        replace(Plan(), budget_gib=float("nan"))
