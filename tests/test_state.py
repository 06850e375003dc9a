"""The train state: one step, many microbatches, nothing that is not finite."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax import Fixed, OasisTrainState, Oja, Random, Rule, oasis_adam
from oasis_jax.linen import OasisDense


class MLP(nn.Module):
    layer: type = OasisDense

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(self.layer(24, name="up")(x))
        return self.layer(4, name="down")(x)


MODEL = MLP()
X = jax.random.normal(jax.random.key(1), (8, 3, 16)) * jnp.linspace(0.2, 3, 16)
Y = jnp.sin(X[..., :4])
VARIABLES = MODEL.init(jax.random.key(0), X)


def loss_fn(variables, x, y):
    return jnp.mean((MODEL.apply(variables, x) - y) ** 2)


HALF = (Rule(".*", 0.5),)


def bases(state):
    """By kernel path."""
    return state.layout.bases(state.bases)


def create(rules=HALF, tx=None, **kw):
    return OasisTrainState.create(
        apply_fn=MODEL.apply,
        # A step may donate them.
        **jax.tree.map(jnp.copy, VARIABLES),
        tx=tx or optax.chain(optax.clip_by_global_norm(1.0), oasis_adam(1e-2)),
        rules=rules,
        **kw,
    )


@jax.jit
def step(state, x, y):
    loss, grads = state.value_and_grad(loss_fn)(x, y)
    return state.apply_gradients(grads), loss


def test_trains_and_compiles_once():
    counted = jax.jit(step.__wrapped__, donate_argnums=0)
    state, losses = create(), []
    first = jax.tree.map(jnp.copy, bases(state))
    for _ in range(40):
        state, loss = counted(state, X, Y)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert counted._cache_size() == 1
    for path, basis in bases(state).items():
        assert not np.allclose(basis, first[path], atol=1e-3)  # it moved meanwhile
    assert int(state.step) == 40 and int(state.diagnostics.skipped) == 0


def test_params_are_those_of_the_plain_model():
    plain = MLP(nn.Dense).init(jax.random.key(0), X)
    assert set(plain) == {"params"}
    chex.assert_trees_all_equal(plain["params"], create().params)
    state, _ = step(create(), X, Y)
    chex.assert_trees_all_equal_shapes_and_dtypes(plain["params"], state.params)
    chex.assert_trees_all_equal(
        MLP(nn.Dense).apply({"params": state.params}, X),
        MODEL.apply({"params": state.params}, X),
    )


def test_gradients_are_those_of_the_plain_model_projected():
    state = create()
    loss, grads = state.value_and_grad(loss_fn)(X, Y)
    expected, plain = jax.value_and_grad(
        lambda p: jnp.mean((MLP(nn.Dense).apply({"params": p}, X) - Y) ** 2)
    )(state.params)
    np.testing.assert_array_equal(loss, expected)
    for name in ("up", "down"):
        basis = bases(state)[f"{name}/kernel"]
        np.testing.assert_allclose(
            grads.params[name]["kernel"], basis.T @ plain[name]["kernel"], atol=1e-6
        )
        np.testing.assert_allclose(
            grads.params[name]["bias"], plain[name]["bias"], atol=1e-6
        )


def test_full_rank_equals_adamw():
    """P = I, standing still: twenty steps are optax.adamw's to 1e-5."""
    state = create([Rule(".*", 1.0, Fixed())], oasis_adam(1e-3, weight_decay=0.1))
    identity = {
        path: dataclasses.replace(p, basis=jnp.eye(p.basis.shape[0]))
        for path, p in state.bases.items()
    }
    state = dataclasses.replace(state, bases=identity)
    reference = create((), optax.adamw(1e-3, weight_decay=0.1))
    for _ in range(20):
        state, _ = step(state, X, Y)
        reference, _ = step(reference, X, Y)
    chex.assert_trees_all_close(state.params, reference.params, atol=1e-5)


@pytest.mark.parametrize("tracker", [Oja(), Oja(axes="gradient"), Random(1)], ids=str)
def test_four_microbatches_equal_the_batch(tracker):
    # Not "down": C C^T of its four outputs has degenerate axes.
    state = create([Rule("up", 0.5, tracker)])
    state, _ = step(state, X, Y)
    loss, whole = state.value_and_grad(loss_fn)(X, Y)
    split_loss, split = state.value_and_grad(loss_fn, accumulate=4)(X, Y)
    np.testing.assert_allclose(split_loss, loss, rtol=1e-6)
    chex.assert_trees_all_close(split, whole, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(split, whole)
    chex.assert_trees_all_close(
        state.apply_gradients(split).subspace,
        state.apply_gradients(whole).subspace,
        atol=1e-5,
    )


def test_aux_and_accumulation():
    def with_aux(variables, x, y):
        return loss_fn(variables, x, y), {"mean": jnp.mean(x)}

    (loss, aux), _ = create().value_and_grad(with_aux, has_aux=True)(X, Y)
    np.testing.assert_array_equal(loss, loss_fn(VARIABLES, X, Y))
    assert aux["mean"] == jnp.mean(X)
    grad_fn = create().value_and_grad(with_aux, has_aux=True, accumulate=2)
    (_, aux), _ = grad_fn(X, Y)
    np.testing.assert_allclose(
        aux["mean"], [jnp.mean(X[:4]), jnp.mean(X[4:])], rtol=1e-5
    )


@pytest.mark.parametrize("where", ["gradient", "observation"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_changes_nothing(where, value):
    state, _ = step(create(), X, Y)
    _, good = state.value_and_grad(loss_fn)(X, Y)
    if where == "gradient":
        params = jax.tree.map(lambda a: a, good.params)
        params["up"]["bias"] = params["up"]["bias"].at[0].set(value)
        bad = good._replace(params=params)
    else:
        bad = good._replace(
            observations=jax.tree.map(
                lambda a: jnp.full_like(a, value), good.observations
            )
        )
    apply = jax.jit(OasisTrainState.apply_gradients)
    after = state
    for count in (1, 2):
        after = apply(after, bad)
        assert int(after.diagnostics.skipped) == count
        assert int(after.diagnostics.skipped_in_a_row) == count
    for name in ("params", "subspace", "opt_state"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(state, name))
    assert int(after.step) == int(state.step) + 2
    healed = apply(after, good)
    assert int(healed.diagnostics.skipped) == 2
    assert int(healed.diagnostics.skipped_in_a_row) == 0
    chex.assert_trees_all_equal(healed.params, apply(state, good).params)


def test_diagnostics_are_the_dense_formulas():
    state = create()
    _, grads = state.value_and_grad(loss_fn)(X, Y)
    after = state.apply_gradients(grads)
    seen = after.diagnostics
    x = X.reshape(-1, 16)
    basis = state.subspace["up"]["projection"].basis
    share = jnp.sum((x @ basis) ** 2) / jnp.sum(x**2)
    np.testing.assert_allclose(seen.captured_energy["up/projection"], share, rtol=1e-5)
    r = after.subspace["up"]["projection"].basis.T @ basis
    np.testing.assert_allclose(
        seen.motion["up/projection"], 1 - jnp.sum(r**2) / 8, atol=1e-5
    )
    np.testing.assert_allclose(seen.gradient_norm, optax.tree.norm(grads.params))


def test_warm_start_finds_the_principal_subspace():
    """Near the best that any basis of that rank can capture; nothing else moves."""
    state = create([Rule("up", 4)])
    warm = jax.jit(lambda s: s.warm_start(loss_fn, X, Y, iterations=8))(state)
    x = np.asarray(X.reshape(-1, 16), np.float64)
    values = np.linalg.eigvalsh(x.T @ x)
    best = values[-4:].sum() / values.sum()
    captured = [
        np.sum((x @ s.subspace["up"]["projection"].basis) ** 2) / values.sum()
        for s in (state, warm)
    ]
    assert captured[0] < 0.6 * best and captured[1] > 0.99 * best
    chex.assert_trees_all_equal(warm.params, state.params)
    chex.assert_trees_all_equal(warm.opt_state, state.opt_state)


def test_warm_start_ignores_what_is_not_finite():
    state = create()
    poisoned = X.at[0, 0, 0].set(jnp.nan)
    warm = state.warm_start(loss_fn, poisoned, Y)
    chex.assert_trees_all_equal(warm.subspace, state.subspace)


def test_evaluation_needs_no_flag():
    """With bases but without slots, as in `state.subspace`, layers are plain."""
    state = create()
    variables = {"params": state.params, "subspace": state.subspace}
    np.testing.assert_array_equal(
        MODEL.apply(variables, X), MODEL.apply({"params": state.params}, X)
    )


def test_no_rules_is_plain_adamw():
    state = create((), optax.adamw(1e-2))
    assert state.bases == {}
    params = jax.tree.map(jnp.copy, VARIABLES["params"])
    tx = optax.adamw(1e-2)
    opt_state = tx.init(params)
    for _ in range(3):
        grads = jax.grad(lambda p: loss_fn({"params": p}, X, Y))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, _ = step(state, X, Y)
    chex.assert_trees_all_close(state.params, params, atol=1e-6)


def test_moments_have_the_gradients_shapes():
    state = create()
    mu = state.opt_state[1][0].mu
    assert mu["up"]["kernel"].shape == (8, 24)
    assert mu["down"]["kernel"].shape == (12, 4)
    assert mu["up"]["bias"].shape == (24,)


@pytest.mark.parametrize("tx", [optax.adam(1e-2), optax.adamw(1e-2), optax.sgd(0.1)])
def test_an_optimizer_that_does_not_lift(tx):
    with pytest.raises(ValueError, match=r"(up|down)/kernel: the optimizer leaves its"):
        create(tx=tx)


def test_a_model_without_declarations():
    plain = MLP(nn.Dense)
    with pytest.raises(ValueError, match="declares no projectable layer"):
        OasisTrainState.create(
            apply_fn=plain.apply,
            **plain.init(jax.random.key(0), X),
            tx=oasis_adam(1e-2),
        )


def test_gradients_of_jax_grad_are_refused():
    state = create()
    grads = jax.grad(lambda p: loss_fn({"params": p}, X, Y))(state.params)
    with pytest.raises(TypeError, match="own value_and_grad, not dict"):
        state.apply_gradients(grads)


def test_microbatches_must_divide():
    with pytest.raises(
        ValueError, match="has a batch of 8, which does not divide into 3"
    ):
        create().value_and_grad(loss_fn, accumulate=3)(X, Y)
    with pytest.raises(ValueError, match="accumulate is 0"):
        create().value_and_grad(loss_fn, accumulate=0)


def test_seeds():
    same = [jax.tree.leaves(create(seed=s).subspace)[0] for s in (0, 0, 1)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.allclose(same[0], same[2])


def test_eight_devices_equal_one():
    """Data-parallel over virtual devices: the same step, bases included."""
    import os
    import subprocess
    import sys

    code = """
import jax, jax.numpy as jnp, sys
sys.path.insert(0, "tests")
import test_state as t
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
put = lambda a: jax.device_put(a, jax.NamedSharding(mesh, jax.P("data")))
alone, _ = t.step(t.create(), t.X, t.Y)
shared, _ = t.step(t.create(), put(t.X), put(t.Y))
t.chex.assert_trees_all_close(shared.params, alone.params, atol=1e-5)
t.chex.assert_trees_all_close(shared.subspace, alone.subspace, atol=1e-5)
print("equal on", jax.device_count())
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "equal on 8" in result.stdout, result.stderr[-2000:]
