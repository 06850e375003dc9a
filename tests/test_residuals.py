"""What is kept between the passes: rounding, gradients, and what is not kept at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from oasis_jax import residuals
from oasis_jax.planning.memory import saved_activations
from oasis_jax.residuals import keep, narrow, narrowed, policy

EIGHT_BITS = ("int8", "fp8")
B, T, N, M = 2, 3, 8, 5


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


X, DY = normal(0, B, T, N), normal(1, B, T, M)
WEIGHTS = {"w": normal(2, N, M), "u": normal(3, N, M)}


# ---- Eight bits ----


def most(x, width):
    """The largest error that `narrowed` promises, entry by entry, in float64."""
    x = np.abs(np.asarray(x, np.float64))
    largest = x.max(axis=-1, keepdims=True)
    # What is not a normal number counts as zero.
    tiny = float(jnp.finfo(jnp.float32).tiny)
    if width == "int8":
        return 1.0001 * largest / 254 + tiny + 0 * x
    # Three bits behind the leading one; evenly spaced below 2^-6 of 448.
    return 1.01 * np.maximum(x / 16, largest / 448 * 2**-10) + tiny


def error(x, width):
    back = narrowed(x, width).widened()
    assert back.dtype == x.dtype and back.shape == x.shape
    return np.abs(np.asarray(back, np.float64) - np.asarray(x, np.float64))


@pytest.mark.parametrize("width", EIGHT_BITS)
@pytest.mark.parametrize(
    "x",
    [
        normal(0, 4, 64),
        -jnp.abs(normal(1, 4, 64)),
        1e30 * normal(2, 2, 3, 16),
        normal(3, 1, 1),
        normal(4, 4, 64) ** 9,  # over many magnitudes
        jnp.array([[1e-37, -3e-38, 0.0], [1e-36, 2e-37, 1e-38]]),
    ],
    ids=["normal", "negative", "large", "one", "wide range", "near the smallest"],
)
def test_error_of_rounding(x, width):
    assert (error(x, width) <= most(x, width)).all()


FLOATS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@pytest.mark.parametrize("width", EIGHT_BITS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(x=hnp.arrays(np.float32, (3, 4), elements=FLOATS))
def test_error_of_rounding_anything(width, x):
    assert (error(jnp.asarray(x), width) <= most(x, width)).all()


@pytest.mark.parametrize("width", EIGHT_BITS)
def test_bfloat16(width):
    x = normal(0, 4, 64, dtype=jnp.bfloat16)
    # Twice rounded: to eight bits, then to bfloat16.
    assert (error(x, width) <= most(x, width) + np.abs(x.astype(float)) / 128).all()
    assert narrowed(x, width).scale.dtype == jnp.float32


@pytest.mark.parametrize("width", EIGHT_BITS)
def test_zero_rows_stay_zero(width):
    x = normal(0, 4, 6).at[1].set(0)
    kept = narrowed(x, width)
    assert np.isfinite(kept.scale).all()
    np.testing.assert_array_equal(kept.widened()[1], 0)


@pytest.mark.parametrize("width", EIGHT_BITS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_shows(width, bad):
    """The train state skips such a step: nothing may hide it."""
    back = narrowed(jnp.array([[1.0, bad, 2.0], [1.0, 2.0, 3.0]]), width).widened()
    assert not np.isfinite(back[0]).all()
    assert np.isfinite(back[1]).all()


@pytest.mark.parametrize("width", EIGHT_BITS)
def test_the_largest_is_exact(width):
    x = jnp.array([[-127.0, 3.0], [2.0, 64.0]])
    back = narrowed(x, width).widened()
    np.testing.assert_allclose(back[[0, 1], [0, 1]], [-127, 64], rtol=1e-6)


# ---- Functions ----


def product(v, x):
    """Of its residuals the gradient needs x and both factors."""
    return (x @ v["w"]) * (x @ v["u"])


def product_gradient(v, x, dy, rounded):
    x_, left, right = rounded(x), rounded(x @ v["w"]), rounded(x @ v["u"])
    dleft, dright = dy * right, dy * left
    dv = {
        "w": jnp.einsum("btn,btm->nm", x_, dleft),
        "u": jnp.einsum("btn,btm->nm", x_, dright),
    }
    return dv, dleft @ v["w"].T + dright @ v["u"].T


def sine(v, x):
    return jnp.sin(x @ v["w"])


def sine_gradient(v, x, dy, rounded):
    dh = dy * rounded(jnp.cos(x @ v["w"]))
    dw = jnp.einsum("btn,btm->nm", rounded(x), dh)
    return {"w": dw, "u": jnp.zeros_like(v["u"])}, dh @ v["w"].T


def linear(v, x):
    return x @ v["w"]


def linear_gradient(v, x, dy, rounded):
    dw = jnp.einsum("btn,btm->nm", rounded(x), dy)
    return {"w": dw, "u": jnp.zeros_like(v["u"])}, dy @ v["w"].T


ORACLES = [
    pytest.param(product, product_gradient, id="product"),
    pytest.param(sine, sine_gradient, id="sine"),
    pytest.param(linear, linear_gradient, id="linear"),
]


def pull(function, *args, dy=DY):
    y, pullback = jax.vjp(function, *args)
    return y, pullback(dy.astype(y.dtype))


def close(got, expected, tolerance=1e-5):
    """Relative to the largest entry of each leaf."""

    def leaf(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())

    jax.tree.map(leaf, got, expected)


@pytest.mark.parametrize("width", EIGHT_BITS)
@pytest.mark.parametrize("function, gradient", ORACLES)
def test_value_is_exact_and_gradient_that_of_rounded_residuals(
    function, gradient, width
):
    def by_hand(rounded):
        return jax.jit(lambda v, x: gradient(v, x, DY, rounded))(WEIGHTS, X)

    y, got = jax.jit(lambda v, x: pull(narrow(function, width), v, x))(WEIGHTS, X)
    plain, exact = jax.jit(lambda v, x: pull(function, v, x))(WEIGHTS, X)
    np.testing.assert_array_equal(y, plain)
    close(got, by_hand(lambda a: narrowed(a, width).widened()))
    # And the oracle is autodiff's where nothing is rounded.
    close(by_hand(lambda a: a), exact)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    )


def test_whole_is_the_function_itself():
    assert narrow(product, "whole") is product


def test_unknown_width():
    with pytest.raises(ValueError, match=r"residuals is 'int4', expected one of \('wh"):
        narrow(product, "int4")


@pytest.mark.parametrize("width", EIGHT_BITS)
def test_further_arguments_get_no_gradient(width):
    """Integers, a tree of them, and None, as a model hands over its segments."""
    segments, tree = jnp.arange(B * T).reshape(B, T), {"a": jnp.int32(2), "b": None}

    def function(v, x, segments, tree, nothing):
        assert nothing is None
        return sine(v, x * (segments % tree["a"])[..., None])

    def loss(call):
        def value(v, x):
            return jnp.vdot(DY, call(v, x, segments, tree, None))

        return jax.grad(value, argnums=(0, 1))(WEIGHTS, X)

    close(loss(narrow(function, width)), loss(function), tolerance=0.2)


def statistic(v, x):
    """A product with what all tokens tell together, (N, N), and a basis, (N, r)."""
    second = jnp.einsum("btn,btm->nm", x, x)
    return (x @ jnp.sin(second)) @ v["w"]


@pytest.mark.parametrize("width, kind", [("int8", "int8"), ("fp8", "float8_e4m3fn")])
@pytest.mark.parametrize("function", [product, sine, statistic])
def test_what_is_kept_of_a_token(function, width, kind):
    def kept(call):
        return saved_activations(lambda v, x: jnp.vdot(DY, call(v, x)), WEIGHTS, X)

    seen = kept(narrow(function, width))
    tokens = [a for a in seen if a.shape[:2] == (B, T)]
    wide = [a for a in tokens if a.shape[2:] != (1,)]
    scales = [a for a in tokens if a.shape[2:] == (1,)]
    assert {str(a.dtype) for a in wide} == {kind}
    assert {str(a.dtype) for a in scales} == {"float32"}
    assert len(scales) == len(wide) > 0
    # What has no entry per token is kept as it was.
    others = sorted(a.shape for a in seen if a.shape[:2] != (B, T))
    plain = sorted(a.shape for a in kept(function) if a.shape[:2] != (B, T))
    assert others == plain
    if function is statistic:
        assert (N, N) in others
    assert all(a.dtype == jnp.float32 for a in seen if a.shape[:2] != (B, T))


@pytest.mark.parametrize("width", EIGHT_BITS)
def test_scan_equals_a_loop(width):
    stacked = normal(5, 3, N, N) / 2
    layer = narrow(lambda w, x: x + jnp.sin(x @ w), width)

    def scanned(stacked, x):
        return jax.lax.scan(lambda x, w: (layer(w, x), None), x, stacked)[0]

    def looped(stacked, x):
        for w in stacked:
            x = layer(w, x)
        return x

    dy = normal(6, B, T, N)
    got, expected = (
        jax.jit(lambda s, x, f=f: pull(f, s, x, dy=dy))(stacked, X)
        for f in (scanned, looped)
    )
    close(got, expected)


@pytest.mark.parametrize("width", EIGHT_BITS)
def test_gradients_in_bfloat16(width):
    v, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (WEIGHTS, X))
    y, (dv, dx) = jax.jit(lambda v, x: pull(narrow(product, width), v, x))(v, x)
    plain, exact = jax.jit(lambda v, x: pull(product, v, x))(v, x)
    np.testing.assert_array_equal(y, plain)
    assert {a.dtype for a in jax.tree.leaves((dv, dx))} == {jnp.dtype("bfloat16")}
    close((dv, dx), exact, tolerance=0.15)


@pytest.mark.parametrize("width", EIGHT_BITS)
@pytest.mark.parametrize("x, dy", [(0 * X, DY), (X, 0 * DY), (0 * X, 0 * DY)])
def test_zeros(x, dy, width):
    y, grads = pull(narrow(product, width), WEIGHTS, x, dy=dy)
    assert all((np.asarray(a) == 0).all() for a in jax.tree.leaves(grads))
    assert np.isfinite(y).all()


# ---- Names ----


def named(x):
    """Two names and an intermediate result with none."""
    first = keep(jnp.sin(x), residuals.QKV)
    second = keep({"a": jnp.cos(first)}, residuals.MIDDLE)["a"]
    return jnp.sum(jnp.sin(second) ** 2)


@pytest.mark.parametrize(
    "names, count",
    [
        ((), 0),
        ((residuals.QKV,), 1),
        ((residuals.QKV, residuals.MIDDLE), 2),
        ((residuals.GATE_UP,), 0),
    ],
)
def test_policy_keeps_these_names_only(names, count):
    function = jax.checkpoint(named, policy=policy(names))
    assert [a.shape for a in saved_activations(function, X)] == count * [X.shape]
    close(jax.grad(function)(X), jax.grad(named)(X))


def test_a_name_changes_nothing():
    tree = {"a": X, "b": (DY, jnp.arange(3))}
    jax.tree.map(np.testing.assert_array_equal, keep(tree, residuals.QKV), tree)
