"""The projected layer: exact forward and dx, projected gradient, saved residuals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from oasis_jax.bases import orthonormalise
from oasis_jax.compat import saved_residuals
from oasis_jax.dense import projected_dense

SHAPES = {
    # leading axes, n_in, n_outs, rank
    "one kernel": ((4, 6), 16, (12,), 5),
    "two kernels": ((4, 6), 16, (12, 7), 5),
    "three kernels": ((24,), 16, (12, 7, 9), 4),
    "no leading axis": ((), 8, (5,), 3),
    "four axes": ((2, 2, 3), 8, (5, 5), 8),
    "rank one": ((10,), 8, (3,), 1),
}
DTYPES = [jnp.float32, jnp.bfloat16]


def plain(x, kernels):
    """What `nn.Dense` computes, for each kernel."""
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return tuple(lax.dot_general(x, k.astype(x.dtype), contract) for k in kernels)


def make(leading, n_in, n_outs, rank, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2 + 2 * len(n_outs))
    x = jax.random.normal(keys[0], (*leading, n_in)).astype(dtype)
    basis = jax.jit(orthonormalise)(jax.random.normal(keys[1], (n_in, rank)))
    kernels = tuple(
        jax.random.normal(k, (n_in, n)) for k, n in zip(keys[2:], n_outs, strict=False)
    )
    dys = tuple(
        jax.random.normal(k, (*leading, n)).astype(dtype)
        for k, n in zip(keys[2 + len(n_outs) :], n_outs, strict=True)
    )
    slots = tuple(jnp.zeros((rank, n)) for n in n_outs)
    return x, kernels, slots, basis, dys


def projected_vjp(x, kernels, slots, basis, dys, **options):
    def call(x, slots, basis, energy):
        return projected_dense(x, kernels, slots, basis, energy, **options)

    outputs, vjp = jax.vjp(call, x, slots, basis, jnp.zeros(()))
    return outputs, vjp(dys)


def gradient64(x, dy):
    """G = X^T dY over all leading axes, in float64."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


class TestAgainstPlain(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_outputs_and_dx_bit_equal(self):
        for dtype in DTYPES:
            for name, shape in SHAPES.items():
                x, kernels, slots, basis, dys = make(*shape, dtype)

                def reference(x, kernels=kernels, dys=dys):
                    outputs, vjp = jax.vjp(lambda x: plain(x, kernels), x)
                    return outputs, vjp(dys)[0]

                def ours(x, kernels=kernels, slots=slots, basis=basis, dys=dys):
                    outputs, cotangents = projected_vjp(x, kernels, slots, basis, dys)
                    return outputs, cotangents[0]

                expected = self.variant(reference)(x)
                got = self.variant(ours)(x)
                chex.assert_trees_all_equal_dtypes(got, expected)
                chex.assert_trees_all_equal(got, expected, custom_message=name)

    @chex.variants(with_jit=True, without_jit=True)
    def test_cotangents(self):
        for shape in SHAPES.values():
            args = make(*shape)
            x, _, _, basis, dys = args
            _, (_, slots, s, energy) = self.variant(projected_vjp)(*args)
            p = np.asarray(basis, np.float64)
            for slot, dy in zip(slots, dys, strict=True):
                exact = p.T @ gradient64(x, dy)
                scale = np.abs(exact).max()
                np.testing.assert_allclose(slot, exact, atol=1e-5 * scale)

            def captured(basis, x=x):
                tokens = max(1, x.size // x.shape[-1])
                return 0.5 * jnp.sum(jnp.square(x @ basis)) / tokens

            np.testing.assert_allclose(
                s, jax.grad(captured)(basis), rtol=1e-4, atol=1e-5
            )
            tokens = max(1, x.size // x.shape[-1])
            np.testing.assert_allclose(energy, jnp.sum(x**2) / tokens, rtol=1e-5)


@settings(max_examples=8, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    n_in=st.integers(1, 9),
    n_outs=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    share=st.floats(0.01, 1.0),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_properties(leading, n_in, n_outs, share, dtype, seed):
    rank = max(1, round(share * n_in))
    args = make(tuple(leading), n_in, tuple(n_outs), rank, dtype, seed)
    x, kernels, _, basis, dys = args
    outputs, (dx, slots, s, _) = jax.jit(projected_vjp)(*args)

    @jax.jit  # else every operation is compiled for itself, for every example
    def dense(x, kernels, dys):
        expected, vjp = jax.vjp(lambda x: plain(x, kernels), x)
        return expected, vjp(dys)[0]

    expected, expected_dx = dense(x, kernels, dys)
    chex.assert_trees_all_equal(outputs, expected)
    chex.assert_trees_all_equal(dx, expected_dx)
    assert dx.dtype == x.dtype and s.dtype == basis.dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    for slot, dy in zip(slots, dys, strict=True):
        assert slot.dtype == jnp.float32
        exact = np.asarray(basis, np.float64).T @ gradient64(x, dy)
        scale = np.abs(gradient64(np.abs(x), np.abs(dy))).max()
        np.testing.assert_allclose(slot, exact, atol=tolerance * scale)


def test_slots_accumulate_in_float32():
    """Many bfloat16 tokens: a bfloat16 sum of ones would stop at 256."""
    x = jnp.ones((4096, 2), jnp.bfloat16)
    dys = (jnp.ones((4096, 1), jnp.bfloat16),)
    args = (x, (jnp.ones((2, 1)),), (jnp.zeros((1, 1)),), jnp.eye(2, 1), dys)
    _, (_, (slot,), s, _) = projected_vjp(*args)
    assert slot[0, 0] == 4096
    np.testing.assert_array_equal(s, jnp.ones((2, 1)))


def test_stride_looks_at_a_subset():
    x, kernels, slots, basis, dys = make((3, 10), 8, (5,), 4)
    _, (dx, _, s, energy) = projected_vjp(x, kernels, slots, basis, dys, stride=3)
    seen = np.asarray(x[:, ::3], np.float64).reshape(-1, 8)
    np.testing.assert_allclose(s, seen.T @ seen @ basis / len(seen), atol=1e-5)
    np.testing.assert_allclose(energy, (seen**2).sum() / len(seen), rtol=1e-5)
    _, (whole_dx, *_) = projected_vjp(x, kernels, slots, basis, dys)
    np.testing.assert_array_equal(dx, whole_dx)


def test_observations_add_up():
    """The mean over two halves of the batch is that of the whole."""
    x, kernels, slots, basis, dys = make((4, 6), 8, (5,), 3)
    _, whole = projected_vjp(x, kernels, slots, basis, dys)
    halves = [
        projected_vjp(x[i : i + 2], kernels, slots, basis, (dys[0][i : i + 2],))[1]
        for i in (0, 2)
    ]
    for got, first, second in zip(whole[2:], halves[0][2:], halves[1][2:], strict=True):
        np.testing.assert_allclose(got, (first + second) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        whole[1][0], halves[0][1][0] + halves[1][1][0], rtol=1e-4, atol=1e-5
    )


def test_vmap():
    x, kernels, slots, basis, dys = make((3, 6), 8, (5, 4), 3)
    one = [
        projected_vjp(x[i], kernels, slots, basis, tuple(dy[i] for dy in dys))
        for i in range(3)
    ]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *one)
    batched = jax.vmap(lambda x, dys: projected_vjp(x, kernels, slots, basis, dys))(
        x, dys
    )
    chex.assert_trees_all_close(batched, stacked, rtol=1e-5, atol=1e-5)


# --- What is saved --------------------------------------------------------------------

TOKENS, N_IN, N_OUT, RANK, LAYERS = (4, 6), 16, 16, 3, 2


def projected_layer(x, kernel, slot, basis):
    return jnp.sin(projected_dense(x, (kernel,), (slot,), basis)[0])


def plain_layer(x, kernel, slot, basis):
    return jnp.sin(plain(x, (kernel,))[0])


def unrolled(layer):
    def loss(x, kernels, slots, bases):
        for parameters in zip(kernels, slots, bases, strict=True):
            x = layer(x, *parameters)
        return jnp.sum(x)

    return loss


def scanned(layer, wrap=lambda f: f):
    def loss(x, *stacked):
        def body(x, parameters):
            return wrap(layer)(x, *parameters), None

        return jnp.sum(lax.scan(body, x, stacked)[0])

    return loss


def recomputed(layer):
    """Keeps what a remat policy by name would: the sine is computed again."""
    policy = jax.checkpoint_policies.dots_saveable
    return scanned(layer, lambda f: jax.checkpoint(f, policy=policy, prevent_cse=False))


def created(loss):
    arguments = (
        jnp.ones((*TOKENS, N_IN)),
        jnp.ones((LAYERS, N_IN, N_OUT)),
        jnp.zeros((LAYERS, RANK, N_OUT)),
        jnp.tile(jnp.eye(N_IN, RANK), (LAYERS, 1, 1)),
    )
    return [
        aval.shape
        for aval, where in saved_residuals(loss, *arguments)
        if "from the argument" not in where
    ]


@pytest.mark.parametrize("form", [unrolled, scanned, recomputed])
def test_saves_no_input(form):
    """Only the sine's own input is as wide as the layer's; the plain layer keeps more.

    Under the policy not even that: matrix products alone are saved, and with them Z.
    """

    def wide(layer):
        return sum(np.prod(s) for s in created(form(layer)) if s[-1:] == (N_IN,))

    def kernels(layer):
        return [s for s in created(form(layer)) if s[-2:] == (N_IN, N_OUT)]

    shapes = created(form(projected_layer))
    one = np.prod(TOKENS) * N_IN
    assert any(
        s[-1:] == (RANK,) and np.prod(s) >= np.prod(TOKENS) * RANK for s in shapes
    )
    assert wide(projected_layer) <= wide(plain_layer) - one
    if form is not unrolled:  # which slices its kernels out of the stack
        assert kernels(projected_layer) == []


def identity_chain(layer):
    """Linear layers alone: nothing but the layers wants to keep anything."""

    def loss(x, kernels, slots, bases):
        def body(x, parameters):
            return layer(x, *parameters), None

        return jnp.sum(lax.scan(body, x, (kernels, slots, bases))[0])

    return loss


def test_a_chain_of_layers_saves_no_wide_array():
    def linear(x, kernel, slot, basis):
        return projected_dense(x, (kernel,), (slot,), basis)[0]

    shapes = created(identity_chain(linear))
    assert (LAYERS, *TOKENS, RANK) in shapes
    assert (LAYERS, *TOKENS, N_IN) not in shapes
    shapes = created(identity_chain(lambda x, kernel, *_: plain(x, (kernel,))[0]))
    assert (LAYERS, *TOKENS, N_IN) in shapes


# --- Bad input ------------------------------------------------------------------------

X, W = jnp.ones((2, 8)), jnp.ones((8, 5))
SLOT, P = jnp.zeros((3, 5)), jnp.eye(8, 3)
BAD = {
    "basis of another input": (
        (X, (W,), (SLOT,), jnp.eye(9, 3)),
        "basis has shape (9, 3)",
    ),
    "rank above n_in": (
        (X, (W,), (jnp.zeros((9, 5)),), jnp.ones((8, 9))),
        "rank 9 is larger than the input's 8 features",
    ),
    "kernel of another input": (
        (X, (jnp.ones((7, 5)),), (SLOT,), P),
        "kernel 0 has shape (7, 5), expected (8, n_out)",
    ),
    "slot of another rank": (
        (X, (W,), (jnp.zeros((2, 5)),), P),
        "slot 0 has shape (2, 5), expected (3, 5)",
    ),
    "slot missing": ((X, (W, W), (SLOT,), P), "2 kernels but 1 slots"),
}


@pytest.mark.parametrize("arguments, sentence", BAD.values(), ids=BAD)
def test_bad_shapes(arguments, sentence):
    with pytest.raises(ValueError) as error:
        projected_dense(*arguments)
    assert sentence in str(error.value)


def test_bad_stride():
    with pytest.raises(ValueError, match="stride is 0, expected at least 1"):
        projected_dense(X, (W,), (SLOT,), P, stride=0)


def test_bad_slot_dtype():
    with pytest.raises(TypeError, match="slot 0 is bfloat16, not float32"):
        projected_dense(X, (W,), (SLOT.astype(jnp.bfloat16),), P)
