"""GaLore, OSD and LDAdam: stacks, oracles at full rank and by hand, Optax's conventions.

Their numbers are held to the reference implementations in test_fixtures.py.
"""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from oasis_jax.gradient.rules import OnlinePca, PowerIteration, Svd, projection_error
from oasis_jax.gradient.side import galore, ldadam, osd, project_gradients
from oasis_jax.leaves import unstacked

METHODS = {
    "galore": functools.partial(galore, rank=2, interval=2),
    "osd": functools.partial(osd, rank=2, interval=2),
    "ldadam": functools.partial(ldadam, rank=2),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)

WIDE, TALL = (6, 10), (10, 6)


def normal(seed, shape):
    """In numpy, for which nothing is compiled."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights(dtype=jnp.float32):
    shapes = {"up": {"kernel": WIDE}, "down": {"kernel": TALL, "bias": (6,)}}
    return jax.tree.map(
        lambda shape: normal(len(shape) + shape[-1], shape).astype(dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def gradients(like, steps=4):
    """One gradient a step, stacked on a leading axis."""
    return jax.tree.map(
        lambda w: normal(w.size, (steps, *w.shape)).astype(w.dtype), like
    )


def runner(tx):
    """A jitted function of weights and gradients: all updates, last weights and state."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    @jax.jit
    def run(params, grads):
        (params, state), updates = jax.lax.scan(step, (params, tx.init(params)), grads)
        return updates, params, state

    return run


def run(tx, params, grads):
    return runner(tx)(params, grads)


@functools.cache
def plain(make):
    """The runner of a method at rate 0.01, compiled once for all tests."""
    return runner(make(1e-2))


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def layer(tree, index, axis=0):
    return jax.tree.map(lambda leaf: np.asarray(leaf).take(index, axis), tree)


# ---- Stacked layers ----


@pytest.mark.parametrize(
    "tx",
    [
        galore(1e-2, 2, interval=3),
        galore(1e-2, 2, interval=3, base="lion", b2=0.99),
        galore(1e-2, 2, interval=3, base="adafactor"),
        osd(1e-2, 2, interval=3, base="lion", b2=0.99),
        ldadam(1e-2, 2, weight_decay=0.1),
    ],
    ids=["galore", "galore lion", "galore adafactor", "osd lion", "ldadam"],
)
def test_a_stack_equals_its_layers(tx):
    params = {"up": {"kernel": normal(0, (3, *WIDE))}}
    params["down"] = {"kernel": normal(1, (3, *TALL))}
    grads = gradients(params, steps=5)
    _, together, _ = run(tx, params, grads)
    alone = runner(tx)
    for i in range(3):
        _, one, _ = alone(layer(params, i), layer(grads, i, axis=1))
        close(layer(together, i), one, atol=2e-6)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6)(nn.relu(nn.Dense(12)(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return blocks(name="blocks")(x, None)[0]


def train(tx, steps=20):
    """Losses of a plain Flax model with scanned `nn.Dense` layers."""
    model, x, y = Stack(), normal(0, (16, 6)), normal(1, (16, 6))
    params = model.init(jax.random.key(2), x)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(
            lambda p: jnp.mean(jnp.square(model.apply(p, x) - y))
        )(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def losses(params):
        return jax.lax.scan(step, (params, tx.init(params)), None, steps)[1]

    return losses(params)


@every_method
def test_a_plain_flax_model_trains_as_it_is(make):
    losses = train(make(3e-2))
    assert losses[-1] < 0.7 * losses[0]


def test_optax_galore_needs_its_layers_unstacked():
    """Alone it projects no stacked kernel, and cannot be asked to."""
    params = {"kernel": normal(0, (3, *WIDE))}
    theirs = functools.partial(optax.contrib.galore, 3e-2, rank=2, update_proj_gap=5)

    def moments(tx):
        return jax.tree.map(jnp.shape, tx.init(params)[0].base_optimizer_state.mu)

    assert moments(theirs()) == {"kernel": (3, *WIDE)}
    axes = optax.contrib.GaLoreDimensionNumbers(reduction_axis=1, output_axis=2)
    with pytest.raises(ValueError, match="All axes must be specified"):
        moments(theirs(weight_dimension_numbers=axes))

    assert moments(unstacked(theirs())) == {"kernel": [(6, 2)] * 3}
    losses = train(unstacked(theirs()))
    assert losses[-1] < 0.7 * losses[0]


def test_unstacked_gives_back_the_shapes_it_got():
    params = {"a": normal(0, (2, 3, *WIDE)), "b": normal(1, (5,)), "c": jnp.ones(())}
    tx = unstacked(optax.scale(2.0))
    updates, _ = tx.update(params, tx.init(params), params)
    close(updates, jax.tree.map(lambda w: 2 * w, params))


# ---- Against other optimizers, and by hand ----


@pytest.mark.parametrize("side", ["in", "out"])
def test_full_rank_without_normalisation_is_momentum(side):
    """A full basis that stands still turns coordinates, and nothing else."""
    ours = galore(1e-2, rank=1.0, scale=1.0, side=side, base=optax.trace(0.9))
    theirs = optax.sgd(1e-2, momentum=0.9)
    params = weights()
    grads = gradients(params)
    close(run(ours, params, grads)[1], run(theirs, params, grads)[1], atol=2e-6)


def test_full_rank_ldadam_leaves_no_error_and_turns_the_moment():
    params = {"kernel": normal(0, WIDE)}
    grads = gradients(params, steps=6)
    _, _, (state, *_) = run(ldadam(1e-2, rank=1.0), params, grads)
    _, _, (adam, *_) = run(optax.adam(1e-2, b1=0.908), params, grads)
    np.testing.assert_allclose(state.memory["kernel"], 0, atol=2e-5)
    mean = state.basis["kernel"] @ state.inner.mu["kernel"]
    np.testing.assert_allclose(mean, adam.mu["kernel"], atol=2e-6)


def test_power_iteration_settles_on_the_top_singular_vectors():
    u, s, vt = np.linalg.svd(normal(0, WIDE), full_matrices=False)
    s = s * np.array([4, 3, 1, 1, 1, 1])
    params = {"kernel": np.zeros(WIDE)}
    first = normal(1, WIDE)
    grads = {"kernel": np.stack([first, *[(u * s) @ vt] * 80])}
    tx = ldadam(1e-2, rank=2, error_feedback=False)
    _, _, (state, *_) = run(tx, params, grads)
    overlap = np.abs(u[:, :2].T @ state.basis["kernel"])
    np.testing.assert_allclose(overlap, np.eye(2), atol=1e-3)


def test_lion_by_hand():
    params = {"kernel": normal(0, WIDE)}
    grads = gradients(params, steps=1)
    tx = galore(1e-2, 2, b2=0.99, scale=0.5, base="lion")
    updates, *_ = run(tx, params, grads)
    g = grads["kernel"][0]
    p = np.linalg.svd(g)[0][:, :2]
    lion = optax.scale_by_lion(0.9, 0.99)
    direction, _ = lion.update(p.T @ g, lion.init(p.T @ g))
    expected = -1e-2 * 0.5 * p @ direction
    np.testing.assert_allclose(updates["kernel"][0], expected, atol=1e-6)


def test_adafactor_factors_the_coordinates():
    params = {"kernel": normal(0, (3, *WIDE))}
    (state, _) = galore(1e-2, 2, base="adafactor").init(params)
    factored, _, mean = state.inner
    row, column = factored.v_row["kernel"], factored.v_col["kernel"]
    assert {v.shape for v in [*row, *column]} == {(2,), (10,)}
    assert [m.shape for m in mean.ema["kernel"]] == [(2, 10)] * 3


@pytest.mark.parametrize(
    "make, adam",
    [
        (functools.partial(galore, eps=0.0), optax.adam(1e-2, eps=0)),
        (functools.partial(osd, eps=0.0), optax.adam(1e-2, eps=0)),
        (
            functools.partial(ldadam, weight_decay=0.1),
            optax.adamw(1e-2, 0.908, 0.99, weight_decay=0.1),
        ),
    ],
    ids=METHODS,
)
def test_other_leaves_get_adam_unscaled(make, adam):
    params = weights()
    grads = gradients(params)
    _, ours, _ = run(make(1e-2, rank=2, pattern="up/kernel$"), params, grads)
    _, theirs, _ = run(adam, params, grads)
    close(ours["down"], theirs["down"], atol=1e-6)
    assert not np.allclose(ours["up"]["kernel"], theirs["up"]["kernel"], atol=1e-3)


@every_method
def test_weight_decay(make):
    """The directions do not depend on the weights, so one run tells another's."""
    schedule = optax.linear_schedule(0.1, 0.0, 8)
    params = weights()
    grads = gradients(params)
    undecayed, *_ = plain(make)(params, grads)
    _, decayed, _ = run(make(schedule, weight_decay=0.3), params, grads)
    after = make.func is not ldadam

    def expected(w, steps):
        w = np.asarray(w, np.float64)
        for t, step in enumerate(np.asarray(steps, np.float64)):
            rate = 0.1 * (1 - t / 8)
            kept, step = 1 - rate * 0.3, step / 1e-2 * rate
            w = kept * (w + step) if after else kept * w + step
        return w

    close(decayed, jax.tree.map(expected, params, undecayed), atol=3e-6)


# ---- Bases ----


def test_galore_takes_an_svd_when_it_is_due_and_only_then():
    tx = project_gradients(optax.identity(), Svd(3), rank=2)
    params = {"kernel": normal(0, WIDE)}
    grads = gradients(params, steps=7)["kernel"]
    state, bases = tx.init(params), []
    update = jax.jit(tx.update)
    for grad in grads:
        _, state = update({"kernel": grad}, state)
        bases.append(np.asarray(state.basis["kernel"]))
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(bases)]
    assert same == [True, True, False, True, True, False]
    top = np.linalg.svd(grads[3])[0][:, :2]
    np.testing.assert_allclose(np.abs(np.sum(top * bases[3], axis=0)), 1, atol=1e-5)

    def outside(jaxpr):
        """Names of the primitives that are not in a branch."""
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            if equation.primitive.name != "cond":
                for value in equation.params.values():
                    if hasattr(value, "jaxpr"):
                        yield from outside(value.jaxpr)

    traced = jax.make_jaxpr(tx.update)({"kernel": grads[0]}, state)
    assert "svd" in str(traced)
    assert "svd" not in set(outside(traced.jaxpr))


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_the_slope_of_osd(penalty):
    """Of an orthonormal P it is Oja's; the penalty pulls at the rest."""
    p = np.linalg.qr(normal(0, (6, 2)).astype(np.float64))[0]
    g = normal(1, WIDE).astype(np.float64)
    unit = g / np.linalg.norm(g)
    down = jax.jit(jax.grad(projection_error))
    oja = -2 * (np.eye(6) - p @ p.T) @ unit @ unit.T @ p
    np.testing.assert_allclose(down(p, 7 * g, penalty), oja, atol=1e-6)

    p = p * [1.5, 0.5]
    error = p @ (p.T @ unit) - unit
    slope = 2 * (error @ (unit.T @ p) + unit @ (error.T @ p))
    slope += 4 * penalty * p @ (p.T @ p - np.eye(2))
    np.testing.assert_allclose(down(p, g, penalty), slope, atol=1e-6)


def test_osd_with_another_optimizer_and_the_penalty():
    params = {"kernel": normal(0, WIDE)}
    grads = gradients(params, steps=4)["kernel"]
    tx = osd(1e-2, 2, basis_optimizer=optax.sgd(0.1), penalty=0.5)
    _, _, (state, _) = run(tx, params, {"kernel": grads})
    p = jnp.linalg.svd(grads[0], full_matrices=False)[0][:, :2]
    for grad in grads[1:]:
        p = p - 0.1 * jax.grad(projection_error)(p, grad, 0.5)
    np.testing.assert_allclose(state.basis["kernel"], p, atol=1e-5)


@every_method
def test_zero_and_rank_one_gradients(make):
    params = weights()
    one = jax.tree.map(np.ones_like, params)
    zero = jax.tree.map(np.zeros_like, params)
    grads = jax.tree.map(lambda *g: np.stack(g), zero, one, zero, one)
    updates, after, state = plain(make)(params, grads)
    assert finite((after, state))
    close(layer(updates, 0), zero, atol=0)
    assert all(np.any(layer(updates, 1)[name]["kernel"] != 0) for name in params)
    if make.func is not osd:
        for p in state[0].basis.values():
            np.testing.assert_allclose(p.mT @ p, np.eye(p.shape[-1]), atol=1e-5)


@every_method
def test_a_gradient_that_is_not_finite_leaves_the_bases(make):
    params = weights()
    grads = gradients(params)
    grads["up"]["kernel"][2] = np.nan
    assert finite(plain(make)(params, grads)[2][0].basis)


# ---- State, dtypes, Optax's conventions ----


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize(
    "make, basis_moments, error",
    [
        (galore, 0, 0),
        (osd, 2, 0),
        (ldadam, 0, 1),
        (functools.partial(ldadam, error_feedback=False), 0, 0),
    ],
    ids=["galore", "osd", "ldadam", "ldadam, no feedback"],
)
def test_bytes_of_state(make, basis_moments, error, shape):
    n, m, r = 6, 10, 3
    state = jax.eval_shape(make(1e-2, rank=r).init, {"kernel": np.zeros(shape)})
    elements = 2 * r * m + n * r + basis_moments * n * r + error * n * m
    counters = size([leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0])
    assert size(state) == 4 * elements + counters
    assert counters <= 5 * 4


@pytest.mark.parametrize(
    "rank, shape, basis",
    [
        (3, WIDE, (6, 3)),
        (3, TALL, (6, 3)),
        (0.5, (2, *WIDE), (2, 6, 3)),
        (0.01, WIDE, (6, 1)),
    ],
)
def test_rank_and_smaller_side(rank, shape, basis):
    for make in METHODS.values():
        state, *_ = make(1e-2, rank=rank).init({"kernel": np.zeros(shape)})
        assert state.basis["kernel"].shape == basis


@every_method
def test_square_kernels_take_the_side_that_each_paper_takes(make):
    params = {"kernel": normal(0, (6, 6))}
    grads = gradients(params, steps=1)
    _, _, (state, *_) = run(make(1e-2), params, grads)
    left, _, right = np.linalg.svd(grads["kernel"][0])
    top = right.T if make.func is ldadam else left
    overlap = np.abs(top[:, :2].T @ state.basis["kernel"])
    np.testing.assert_allclose(overlap, np.eye(2), atol=1e-5)


@every_method
def test_bfloat16(make):
    params = weights(jnp.bfloat16)
    grads = gradients(params)
    updates, after, state = run(make(1e-2), params, grads)
    assert {w.dtype for w in jax.tree.leaves((updates, after))} == {
        jnp.dtype(jnp.bfloat16)
    }
    held = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert held == {jnp.dtype(jnp.float32)}
    exact, *_ = plain(make)(*jax.tree.map(np.float32, (params, grads)))
    close(layer(updates, 0), layer(exact, 0), rtol=1e-2, atol=1e-5)


@every_method
def test_optax_conventions(make):
    """Compiles once, ignores extras, follows a clip, and a schedule may be constant."""
    traces = []
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), make(optax.constant_schedule(1e-2))
    )

    @jax.jit
    def update(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params, value=1.0, unknown="ignored")

    params = weights()
    grads = gradients(params)
    state = tx.init(params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(
        jnp.shape, jax.eval_shape(tx.init, params)
    )
    stepped = params
    for i in range(3):
        updates, state = update(layer(grads, i), state, stepped)
        stepped = optax.apply_updates(stepped, updates)
    assert len(traces) == 1

    constant = optax.chain(optax.clip_by_global_norm(1.0), make(1e-2))
    first_three = jax.tree.map(lambda g: g[:3], grads)
    close(run(constant, params, first_three)[1], stepped, atol=1e-6)


# ---- Errors ----


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: galore(1e-2, rank=0), "rank is 0, expected a whole number"),
        (lambda: osd(1e-2, rank=1.5), "rank is 1.5, expected a whole number"),
        (lambda: ldadam(1e-2, rank=True), "rank is True, expected a whole number"),
        (lambda: galore(1e-2, interval=0), "interval is 0, expected at least 1"),
        (lambda: osd(1e-2, interval=0), "interval is 0, expected at least 1"),
        (lambda: ldadam(1e-2, side="left"), "side is 'left', expected one of"),
        (lambda: galore(1e-2, base="sgd"), "base is 'sgd', expected one of 'adam'"),
        (
            lambda: galore(1e-2, rank=7).init(weights()),
            "down/kernel: rank is 7, but side 'out' of a kernel of shape (10, 6) has"
            " only 6 features",
        ),
        (
            lambda: ldadam(1e-2, rank=2, pattern="kernels").init(weights()),
            "pattern 'kernels' matches no leaf that is a matrix; the nearest are",
        ),
        (
            lambda: ldadam(1e-2, rank=2, pattern="bias").init(weights()),
            "pattern 'bias' matches no leaf that is a matrix; the nearest are",
        ),
        (
            lambda: osd(1e-2, rank=1).init({"bias": np.zeros(3)}),
            "pattern 'kernel$': no leaf is a matrix",
        ),
        (
            lambda: galore(1e-2, rank=2).update(
                weights(), galore(1e-2, rank=3).init(weights()), weights()
            ),
            "kernel: the state has",
        ),
        (
            lambda: galore(1e-2, rank=2).update(
                weights(), galore(1e-2, rank=2).init(weights())
            ),
            "update needs params",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_power_iteration_says_what_it_needs_inside():
    tx = project_gradients(optax.identity(), PowerIteration(), rank=2)
    with pytest.raises(TypeError, match="adam_in_coordinates"):
        tx.update(weights(), tx.init(weights()))


def test_rules_are_equal_when_their_settings_are():
    assert Svd(3) == Svd(3) != Svd(4)
    sgd = optax.sgd(0.1)
    assert OnlinePca(sgd) == OnlinePca(sgd) != OnlinePca(sgd, penalty=0.1)
