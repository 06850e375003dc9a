"""`python -m train plan`: the step that pretrain runs, and what fits into a budget."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import jax
import pytest

from oasis_jax.models.blocks import REMAT
from oasis_jax.planning.memory import compiled_bytes, tree_bytes
from train.__main__ import main
from train.config import Plan, Pretrain, UserError
from train.loop import train_step
from train.plan import (
    PARTS,
    Candidate,
    Planned,
    as_flags,
    batches,
    configuration,
    search,
    variants,
)
from train.pretrain import set_up

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
    setup = set_up(config)  # real weights, as a run has them
    step = jax.jit(train_step(setup, config), donate_argnums=0)
    compiled = step.lower(setup.state, setup.batch).compile()
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
        setup = set_up(config, abstract=True)
        state = setup.state
        assert {str(p.dtype) for p in jax.tree.leaves(state.params)} == {"bfloat16"}
        moments = {str(m.dtype) for m in jax.tree.leaves(state.opt_state)}
        assert moments == {"float32", "int32"}
        after, _ = jax.eval_shape(train_step(setup, config), state, setup.batch)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
            lambda a: (a.shape, a.dtype), state
        )


def test_abstract_set_up_has_the_shapes_of_a_real_one():
    config = Pretrain(seq=16, batch=2)
    shapes, state = (set_up(config, 256, abstract=a).state for a in (True, False))
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
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


# --- A search -----------------------------------------------------------------------


def test_variants_join_by_being_in_the_table():
    found = variants(Plan(methods="adamw,oasis", preset="llama-1b"))
    assert {v.remat for v in found} == set(REMAT)
    assert [v.rank for v in found if v.method == "adamw"] == [None] * len(REMAT)
    assert {v.rank for v in found if v.method == "oasis"} >= {"256", "512", "0.125"}
    given = variants(Plan(methods="oasis", rank="64"))
    assert {v.rank for v in given} == {"64"}


def test_options_go_to_the_methods_that_have_them():
    adamw, velora = (
        v
        for v in variants(Plan(methods="adamw,velora", groups=16, rank="4"))
        if v.remat == "block"
    )
    assert adamw.groups is None
    assert velora.groups == 16


def test_batches_are_powers_of_two():
    assert batches(Plan(batch=8)) == [1, 2, 4, 8]
    assert batches(Plan(batch=12, accumulate=3)) == [3, 6, 12]


def candidate(size: int, speed: float, method: str = "oasis", rank: str | None = "64"):
    return Candidate(Plan(method=method, rank=rank, batch=1, seq=size), size, speed)


def compiler(factor: float, seen: list):
    """Says that everything needs `factor` times what was estimated."""

    def confirm(c: Candidate) -> Planned:
        seen.append(c.bytes)
        seconds = c.config.batch * c.config.seq / c.tokens_per_second
        return Planned(c.config, round(factor * c.bytes), {}, seconds, True)

    return confirm


def test_search_takes_the_fastest_that_fits():
    seen: list[int] = []
    pool = [candidate(size, speed) for size, speed in [(10, 1), (20, 2), (30, 3)]]
    (plan,) = search(pool, 25, 3, compiler(1.0, seen))
    assert plan.peak_bytes == 20
    assert seen == [20]  # what cannot fit is not compiled


def test_search_believes_the_compiler():
    seen: list[int] = []
    pool = [candidate(size, size) for size in (10, 17, 18, 20)]
    (plan,) = search(pool, 25, 3, compiler(2.0, seen))
    assert plan.peak_bytes == 20
    assert seen == [20, 10]  # learnt from the first what 18 and 17 would need


def test_search_gives_one_plan_of_a_kind_fastest_first():
    pool = [
        candidate(10, 1, rank="64"),
        candidate(10, 3, rank="32"),
        candidate(10, 2, rank="32"),
        candidate(10, 4, method="adamw", rank=None),
    ]
    plans = search(pool, 25, 2, compiler(1.0, []))
    assert [p.tokens_per_second for p in plans] == [4, 3]
    assert search(pool, 5, 2, compiler(1.0, [])) == []


def test_search_goes_on_after_what_does_not_compile():
    pool = [candidate(10, 2), candidate(9, 1)]
    good = compiler(1.0, [])
    (plan,) = search(pool, 25, 1, lambda c: None if c.bytes == 10 else good(c))
    assert plan.peak_bytes == 9


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
    from train import plan

    def compile_plan(config):
        return Planned(config, 5 * GIB, {}, 1.0, True)

    monkeypatch.setattr(plan, "compile_plan", compile_plan)
    status, out, err = run(*SMALL, "--methods", "oasis", "--budget-gib", "0.001")
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: no plan fits --budget-gib 0.001: the smallest")
    assert "--remat block" in last
    assert last.endswith("needs 5.00 GiB")


def test_plan_refuses_nonsense_when_made():
    with pytest.raises(UserError, match="--budget-gib is nan"):
        replace(Plan(), budget_gib=float("nan"))
