"""Compressed activations and norms: exact forward, backward at the rebuilt input."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from oasis_jax.compat import saved_residuals
from oasis_jax.models.llama import _rms_norm, _swiglu
from oasis_jax.nonlinear import (
    compressed,
    compressed_layer_norm,
    compressed_rms_norm,
    compressed_swiglu,
)
from oasis_jax.planning.memory import saved_activations, tree_bytes
from oasis_jax.residuals import COEFFICIENTS, OBSERVED, policy

LEADING, WIDTH, PRINCIPAL, RANDOM = (4, 6), 16, 3, 2
RANK = PRINCIPAL + RANDOM
EPS = 1e-3  # large enough to be seen if it is forgotten
DTYPES = [jnp.float32, jnp.bfloat16]


class Case(NamedTuple):
    """A function of some inputs (each with a basis) and some weights."""

    inputs: int
    weights: int
    ours: Callable  # (inputs, weights, bases, energies, stride) -> y
    plain: Callable  # (inputs, weights) -> y
    by_hand: Callable  # (inputs, estimates, weights, dy) -> gradients, in float64


# --- Oracles --------------------------------------------------------------------------


def differences(function):
    """Central differences of an elementwise numpy function, at the estimates."""

    def gradients(inputs, estimates, weights, dy):
        step, result = 1e-5, []
        for i in range(len(estimates)):
            above, below = list(estimates), list(estimates)
            above[i], below[i] = above[i] + step, below[i] - step
            result.append(dy * (function(*above) - function(*below)) / (2 * step))
        return tuple(result), ()

    return gradients


def silu64(x):
    return x / (1 + np.exp(-x))


def gelu64(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm_jacobian(centred):
    """With the dense (n, n) Jacobian of each token's norm, at the true statistics."""

    def gradients(inputs, estimates, weights, dy):
        (x,), (estimate,), (scale, *bias) = inputs, estimates, weights
        n = x.shape[-1]
        mean = x.mean(-1, keepdims=True) if centred else 0.0
        inverse = 1 / np.sqrt(np.square(x - mean).mean(-1, keepdims=True) + EPS)
        h = (estimate - mean) * inverse
        jacobian = np.eye(n) - h[..., :, None] * h[..., None, :] / n
        if centred:
            jacobian = jacobian - np.ones((n, n)) / n
        jacobian = jacobian * scale[:, None] * inverse[..., None]
        dx = np.einsum("...a,...ab->...b", dy, jacobian)
        tokens = tuple(range(dy.ndim - 1))
        dscale = np.sum(dy * h, axis=tokens)
        dbias = tuple(np.sum(dy, axis=tokens) for _ in bias)
        return (dx,), (dscale, *dbias)

    return gradients


def elementwise(function, oracle):
    def ours(inputs, weights, bases, energies, stride):
        return compressed(function, *inputs, *bases, *energies, stride=stride)

    return Case(1, 0, ours, lambda inputs, _: function(*inputs), differences(oracle))


def rms_norm(inputs, weights, bases, energies, stride):
    return compressed_rms_norm(
        *inputs, *weights, *bases, *energies, eps=EPS, stride=stride
    )


def layer_norm(inputs, weights, bases, energies, stride):
    scale, bias = (*weights, None)[:2]
    return compressed_layer_norm(
        *inputs, scale, bias, *bases, *energies, eps=EPS, stride=stride
    )


def flax_layer_norm(inputs, weights):
    (x,), names = inputs, ("scale", "bias")
    layer = nn.LayerNorm(EPS, dtype=x.dtype, use_bias=len(weights) == 2)
    return layer.apply({"params": dict(zip(names, weights, strict=False))}, x)


def swiglu(inputs, weights, bases, energies, stride):
    return compressed_swiglu(*inputs, *bases, *energies, stride=stride)


CASES = {
    "silu": elementwise(jax.nn.silu, silu64),
    "gelu": elementwise(partial(jax.nn.gelu, approximate=True), gelu64),
    "swiglu": Case(
        2,
        0,
        swiglu,
        lambda inputs, _: _swiglu(*inputs),
        differences(lambda gate, up: silu64(gate) * up),
    ),
    "rms norm": Case(
        1,
        1,
        rms_norm,
        lambda inputs, weights: _rms_norm(*inputs, *weights, eps=EPS),
        norm_jacobian(False),
    ),
    "layer norm": Case(1, 2, layer_norm, flax_layer_norm, norm_jacobian(True)),
    "layer norm, no bias": Case(1, 1, layer_norm, flax_layer_norm, norm_jacobian(True)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
KINDS = ["silu", "swiglu", "layer norm"]  # the others share their code
each_kind = pytest.mark.parametrize("case", [CASES[k] for k in KINDS], ids=KINDS)


def orthonormal(rng, columns):
    return np.linalg.qr(rng.normal(size=(WIDTH, columns)))[0]


def prac_basis(rng):
    """[Q1, sqrt(k) Q2]: orthogonal columns, the last ones not of unit length."""
    stretch = np.sqrt((WIDTH - PRINCIPAL) / RANDOM)
    return orthonormal(rng, RANK) * np.where(np.arange(RANK) < PRINCIPAL, 1, stretch)


def make(case, leading=LEADING, dtype=jnp.float32, seed=0):
    """Inputs, weights, bases, energies and dy."""
    rng, shape = np.random.default_rng(seed), (*leading, WIDTH)

    def several(count, draw, dtype=jnp.float32):
        return tuple(jnp.asarray(draw(), dtype) for _ in range(count))

    # Not centred, so that a mean matters.
    inputs = several(case.inputs, lambda: 0.4 + rng.normal(size=shape), dtype)
    weights = several(case.weights, lambda: 1 + 0.3 * rng.normal(size=WIDTH))
    bases = several(case.inputs, lambda: prac_basis(rng))
    energies = several(case.inputs, lambda: np.zeros(()))
    (dy,) = several(1, lambda: rng.normal(size=shape), dtype)
    return inputs, weights, bases, energies, dy


def eager_vjp(case, inputs, weights, bases, energies, dy, stride=1):
    """y, and the cotangents of inputs, weights, bases and energies."""
    call = partial(case.ours, stride=stride)
    y, vjp = jax.vjp(call, inputs, weights, bases, energies)
    return y, vjp(dy)


our_vjp = partial(jax.jit, static_argnames=("case", "stride"))(eager_vjp)


@partial(jax.jit, static_argnums=0)
def plain_vjp(case, inputs, weights, dy):
    return jax.vjp(case.plain, inputs, weights)[1](dy)


def close(got, expected, tolerance=1e-5):
    """Within a tolerance relative to the largest element."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def wide(arrays):
    return tuple(np.asarray(a, np.float64) for a in arrays)


# --- Values ---------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_bit_equal(case, dtype):
    """Alone, and as the forward half of a gradient."""
    inputs, weights, bases, energies, dy = make(case, dtype=dtype)
    expected = jax.jit(case.plain)(inputs, weights)
    alone = jax.jit(partial(case.ours, stride=1))(inputs, weights, bases, energies)
    halved = our_vjp(case, inputs, weights, bases, energies, dy)[0]
    for got in (alone, halved):
        chex.assert_trees_all_equal_dtypes(got, expected)
        np.testing.assert_array_equal(got, expected)


@each_case
def test_a_full_basis_is_plain_autodiff(case, leading=(24,)):
    inputs, weights, _, energies, dy = make(case, leading)
    bases = (jnp.eye(WIDTH),) * case.inputs
    _, got = our_vjp(case, inputs, weights, bases, energies, dy)
    plain = plain_vjp(case, inputs, weights, dy)
    for ours, expected in zip(got[:2], plain, strict=True):
        close(ours, expected)


@each_kind
def test_a_token_alone(case):
    test_a_full_basis_is_plain_autodiff(case, leading=())


@pytest.mark.parametrize("name", ["silu", "swiglu"])
def test_a_full_basis_is_plain_autodiff_to_the_bit_in_bfloat16(name):
    case = CASES[name]
    inputs, weights, _, energies, dy = make(case, dtype=jnp.bfloat16)
    bases = (jnp.eye(WIDTH),) * case.inputs
    _, got = eager_vjp(case, inputs, weights, bases, energies, dy)
    _, vjp = jax.vjp(case.plain, inputs, weights)
    chex.assert_trees_all_equal(got[0], vjp(dy)[0])


@each_case
@pytest.mark.parametrize(
    "dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)]
)
def test_backward_is_taken_at_the_rebuilt_input(case, dtype, tolerance):
    inputs, weights, bases, energies, dy = make(case, dtype=dtype)
    _, got = our_vjp(case, inputs, weights, bases, energies, dy)
    chex.assert_trees_all_equal_dtypes(got[0], inputs)
    chex.assert_trees_all_equal_dtypes(got[1], weights)
    estimates = tuple(
        x @ p @ p.T for x, p in zip(wide(inputs), wide(bases), strict=True)
    )
    expected = case.by_hand(wide(inputs), estimates, wide(weights), *wide([dy]))
    for ours, by_hand in zip(got[:2], expected, strict=True):
        close(ours, by_hand, tolerance)


def test_weights_in_bfloat16():
    case = CASES["layer norm"]
    inputs, weights, bases, energies, dy = make(case)
    rounded = tuple(w.astype(jnp.bfloat16) for w in weights)
    _, (_, got, *_) = our_vjp(case, inputs, rounded, bases, energies, dy)
    _, (_, expected, *_) = our_vjp(case, inputs, weights, bases, energies, dy)
    chex.assert_trees_all_equal_dtypes(got, rounded)
    close(got, expected, 0.01)


# --- Exact statistics -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["rms norm", "layer norm"])
def test_norms_are_exact_for_inputs_in_the_span(name):
    case = CASES[name]
    inputs, weights, _, energies, dy = make(case)
    basis = jnp.float32(orthonormal(np.random.default_rng(5), RANK))
    inputs = (inputs[0] @ basis @ basis.T,)
    _, got = our_vjp(case, inputs, weights, (basis,), energies, dy)
    plain = plain_vjp(case, inputs, weights, dy)
    for ours, expected in zip(got[:2], plain, strict=True):
        close(ours, expected, 3e-5)


def test_the_inverse_deviation_is_that_of_the_true_input():
    """Of an input orthogonal to the basis nothing is left to rebuild but its size."""
    case = CASES["rms norm"]
    (x,), (scale,), (basis,), energies, dy = make(case)
    unit = basis / jnp.linalg.norm(basis, axis=0)
    x = x - x @ unit @ unit.T
    _, ((dx,), (dscale,), *_) = our_vjp(case, (x,), (scale,), (basis,), energies, dy)
    inverse = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + EPS)
    close([dx], [inverse * dy * scale])
    np.testing.assert_allclose(dscale, 0, atol=1e-4)


@pytest.mark.parametrize("name", ["rms norm", "layer norm"])
def test_gradients_of_weights_are_unbiased(name):
    """The mean over directions that together fill the complement is the gradient."""
    case = CASES[name]
    inputs, weights, _, energies, dy = make(case)
    principal, *parts = np.split(
        orthonormal(np.random.default_rng(5), WIDTH), [4, 7, 10, 13], 1
    )
    bases = jnp.float32([np.hstack([principal, 2.0 * part]) for part in parts])

    def of_weights(basis):
        return our_vjp(case, inputs, weights, (basis,), energies, dy)[1][1]

    got = [jnp.mean(a, axis=0) for a in jax.vmap(of_weights)(bases)]
    close(got, plain_vjp(case, inputs, weights, dy)[1])


# --- Observations ---------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("stride", [1, 4])
def test_observations(case, stride):
    inputs, weights, bases, energies, dy = make(case)
    _, (dx, _, s, energy) = our_vjp(case, inputs, weights, bases, energies, dy, stride)
    for i, x in enumerate(wide(inputs)):
        seen = x[:, ::stride].reshape(-1, WIDTH)
        close([s[i]], [seen.T @ seen @ np.asarray(bases[i]) / len(seen)])
        close([energy[i]], [np.square(seen).sum() / len(seen)])
    _, (whole_dx, *_) = our_vjp(case, inputs, weights, bases, energies, dy)
    chex.assert_trees_all_equal(dx, whole_dx)


def test_observations_have_the_dtype_of_the_basis():
    inputs, weights, (basis,), energies, dy = make(CASES["silu"], dtype=jnp.bfloat16)
    for dtype in DTYPES:
        bases = (basis.astype(dtype),)
        _, got = our_vjp(CASES["silu"], inputs, weights, bases, energies, dy)
        assert got[2][0].dtype == dtype and got[3][0].dtype == jnp.float32


@each_case
def test_observations_add_up(case):
    """The mean over two halves of the batch is that of the whole; weights add."""
    inputs, weights, bases, energies, dy = make(case)

    def part(rows):
        some = tuple(x[rows] for x in inputs)
        return our_vjp(case, some, weights, bases, energies, dy[rows])[1]

    whole, first, second = part(slice(4)), part(slice(2)), part(slice(2, 4))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first[2:], second[2:])
    close(jax.tree.leaves(whole[2:]), jax.tree.leaves(mean))
    close(whole[1], [a + b for a, b in zip(first[1], second[1], strict=True)])


ONES, SCALE, P = jnp.ones((3, 8)), jnp.ones(8), jnp.eye(8, 3)
WITHOUT_ENERGY = {
    "one input": (lambda p: compressed(jax.nn.silu, ONES, p), 1),
    "a shared basis": (lambda p: compressed_swiglu(ONES, ONES, p, p), 2),
    "rms norm": (lambda p: compressed_rms_norm(ONES, SCALE, p), 1),
    "layer norm": (lambda p: compressed_layer_norm(ONES, SCALE, None, p), 1),
}


@pytest.mark.parametrize("call, uses", WITHOUT_ENERGY.values(), ids=WITHOUT_ENERGY)
def test_energy_is_optional(call, uses):
    """A basis gets the sum over all that uses it."""
    np.testing.assert_allclose(jax.grad(lambda p: call(p).sum())(P), uses)


# --- Transformations ------------------------------------------------------------------


@each_kind
def test_vmap(case):
    inputs, weights, bases, energies, dy = make(case)

    def call(inputs, dy):
        return our_vjp(case, inputs, weights, bases, energies, dy)

    one_by_one = [call(tuple(x[i] for x in inputs), dy[i]) for i in range(len(dy))]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *one_by_one)
    chex.assert_trees_all_close(jax.vmap(call)(inputs, dy), stacked, atol=1e-5)


LAYERS = 2


def by_names(function):
    kept = policy([COEFFICIENTS, OBSERVED])
    return jax.checkpoint(function, policy=kept, prevent_cse=False)


def chain(case, wrap=lambda f: f, scan=True):
    """Loss of a chain of one layer, whose every input is the layer's last output."""

    def layer(x, weights, bases, energies):
        return case.ours((x,) * case.inputs, weights, bases, energies, 1)

    def loss(x, *stacked):
        def body(x, parameters):
            return wrap(layer)(x, *parameters), None

        if scan:
            x, _ = lax.scan(body, x, stacked)
        else:
            for i in range(LAYERS):
                x, _ = body(x, jax.tree.map(itemgetter(i), stacked))
        return jnp.sum(x)

    return loss


def chained(case):
    inputs, weights, bases, energies, _ = make(case)
    return inputs[0], *jax.tree.map(
        lambda a: jnp.stack([(1 + 0.1 * i) * a for i in range(LAYERS)]),
        (weights, bases, energies),
    )


@each_kind
def test_scan_equals_unrolled(case):
    arguments = chained(case)
    expected = jax.jit(jax.grad(chain(case, scan=False), range(4)))(*arguments)
    for wrap in (lambda f: f, by_names):
        got = jax.jit(jax.grad(chain(case, wrap), range(4)))(*arguments)
        chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


# --- What is saved --------------------------------------------------------------------


def kept_by_name(case):
    """Per layer: coefficients, energy gradient and energy per input; statistics."""
    statistics = {"rms norm": 1, "layer norm": 2, "layer norm, no bias": 2}
    name = next(name for name in CASES if CASES[name] is case)
    per_input = [(*LEADING, RANK), (WIDTH, RANK), ()]
    return per_input * case.inputs + [(*LEADING, 1)] * statistics.get(name, 0)


@each_case
@pytest.mark.parametrize("wrap", [lambda f: f, by_names], ids=["none", "checkpoint"])
def test_saves_no_input(case, wrap):
    """Scanned, with and without recomputation: all that is kept, and nothing wider."""
    kept = saved_activations(chain(case, wrap), *chained(case))
    expected = [(LAYERS, *shape) for shape in kept_by_name(case)]
    assert sorted(a.shape for a in kept) == sorted(expected)


@each_case
def test_saves_no_input_unrolled(case):
    shapes = [
        aval.shape
        for aval, where in saved_residuals(chain(case, scan=False), *chained(case))
        if "argument" not in where
    ]
    assert (*LEADING, RANK) in shapes and (*LEADING, WIDTH) not in shapes


@each_case
def test_autodiff_saves_more(case):
    """So that the tests above can fail."""

    def loss(inputs, weights):
        doubled = tuple(2 * x for x in inputs)
        return jnp.sum(case.plain(doubled, weights))

    inputs, weights, *_ = make(case)
    shapes = [a.shape for a in saved_activations(loss, inputs, weights)]
    assert (*LEADING, WIDTH) in shapes


def test_coefficients_are_kept_in_the_dtype_of_the_input():
    case = CASES["rms norm"]
    inputs, weights, bases, energies, _ = make(case, dtype=jnp.bfloat16)

    def loss(*arguments):
        return jnp.sum(case.ours(*arguments, stride=1).astype(jnp.float32))

    kept = saved_activations(loss, inputs, weights, bases, energies)
    found = {a.shape: a.dtype for a in kept}
    assert found[*LEADING, RANK] == jnp.bfloat16
    assert found[*LEADING, 1] == jnp.float32
    tokens = np.prod(LEADING)
    assert tree_bytes(kept) == tokens * (2 * RANK + 4) + 4 * WIDTH * RANK + 4


# --- Bad input ------------------------------------------------------------------------

X = ONES[:2]
BAD = {
    "basis of another input": (
        lambda: compressed(jax.nn.silu, X, jnp.eye(9, 3)),
        "compressed: basis has shape (9, 3), expected (8, rank) for x of shape (2, 8)",
    ),
    "no axis": (
        lambda: compressed(jax.nn.silu, jnp.ones(()), P),
        "compressed: basis has shape (8, 3), expected (n, rank) for x of shape ()",
    ),
    "rank above n": (
        lambda: compressed(jax.nn.silu, X, jnp.ones((8, 9))),
        "compressed: rank 9 of basis is larger than the 8 features of x",
    ),
    "stride": (
        lambda: compressed(jax.nn.silu, X, P, stride=0),
        "compressed: stride is 0, expected at least 1",
    ),
    "function of another shape": (
        lambda: compressed(jnp.sum, X, P),
        "compressed: function returned shape (), expected that of x, (2, 8)",
    ),
    "gate and up": (
        lambda: compressed_swiglu(X, X[:1], P, P),
        "compressed_swiglu: up has shape (1, 8), expected that of gate, (2, 8)",
    ),
    "up's basis": (
        lambda: compressed_swiglu(X, X, P, P[:7]),
        "compressed_swiglu: up_basis has shape (7, 3), expected (8, rank) for up of"
        " shape (2, 8)",
    ),
    "scale": (
        lambda: compressed_rms_norm(X, SCALE[:7], P),
        "compressed_rms_norm: scale has shape (7,), expected (8,) for x of shape (2, 8)",
    ),
    "bias": (
        lambda: compressed_layer_norm(X, SCALE, SCALE[None], P),
        "compressed_layer_norm: bias has shape (1, 8), expected (8,) for x of shape"
        " (2, 8)",
    ),
    "a norm's basis": (
        lambda: compressed_layer_norm(X, SCALE, None, P[0]),
        "compressed_layer_norm: basis has shape (3,), expected (8, rank) for x of shape"
        " (2, 8)",
    ),
}


@pytest.mark.parametrize("call, sentence", BAD.values(), ids=BAD)
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == sentence
