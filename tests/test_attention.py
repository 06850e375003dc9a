"""Attention in chunks: the same numbers as all at once, and nothing of T^2 kept."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.attention import attention
from oasis_jax.chunks import chunks
from oasis_jax.compat import has_cudnn_attention, reuse_forward
from oasis_jax.planning.memory import compiled_bytes, saved_activations
from oasis_jax.residuals import ATTENTION


class Case(NamedTuple):
    tokens: int = 24
    chunk: int = 8
    heads: int = 4
    kv_heads: int = 2
    causal: bool = True
    packed: bool = False
    dtype: type = jnp.float32
    implementation: str | None = "blockwise"


CASES = {
    "causal": Case(),
    "both ways": Case(causal=False, kv_heads=4),
    "one key": Case(kv_heads=1),
    "packed": Case(packed=True),
    "packed, both ways": Case(tokens=16, causal=False, packed=True),
    "the chunk does not divide": Case(tokens=29, chunk=8, packed=True),
    "a prime below the chunk": Case(tokens=7, chunk=8),
    "a chunk of one": Case(tokens=5, chunk=1),
    "bfloat16": Case(packed=True, dtype=jnp.bfloat16),
    "left to the lowering": Case(packed=True, dtype=jnp.bfloat16, implementation=None),
    "left to the lowering, float32": Case(implementation=None),
    "all at once": Case(packed=True, implementation="xla"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
BATCH, SIZE = 2, 8


def make(case, seed=0):
    """q, k, v, dy and segments."""
    rng = np.random.default_rng(seed)

    def draw(heads):
        shape = (BATCH, case.tokens, heads, SIZE)
        return jnp.asarray(rng.normal(size=shape), case.dtype)

    q, k, v, dy = map(draw, (case.heads, case.kv_heads, case.kv_heads, case.heads))
    segments = None
    if case.packed:
        starts = rng.random((BATCH, case.tokens)) < 0.25
        segments = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
    return q, k, v, dy, segments


def call(case, q, k, v, segments):
    return attention(
        q,
        k,
        v,
        segments,
        causal=case.causal,
        chunk=case.chunk,
        implementation=case.implementation,
    )


def by_hand(case, q, k, v, dy, segments):
    """Value and gradients in float64, with every score."""
    q, k, v, dy = (np.asarray(a, np.float64) for a in (q, k, v, dy))
    groups = case.heads // case.kv_heads
    k_all, v_all = (np.repeat(a, groups, axis=2) for a in (k, v))
    seen = np.ones((BATCH, 1, case.tokens, case.tokens), bool)
    if case.causal:
        seen &= np.tri(case.tokens, dtype=bool)
    if segments is not None:
        seen &= (segments[:, :, None] == segments[:, None, :])[:, None]
    scores = np.einsum("bqhe,bthe->bhqt", q, k_all) / np.sqrt(SIZE)
    p = np.exp(scores) * seen
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bqhe,bthe->bhqt", dy, v_all)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(SIZE)

    def per_key(a):
        return a.reshape(*a.shape[:2], case.kv_heads, groups, SIZE).sum(3)

    return (
        np.einsum("bhqt,bthe->bqhe", p, v_all),
        np.einsum("bhqt,bthe->bqhe", ds, k_all),
        per_key(np.einsum("bhqt,bqhe->bthe", ds, q)),
        per_key(np.einsum("bhqt,bqhe->bthe", p, dy)),
    )


# --- Values ---------------------------------------------------------------------------


@each_case
def test_values_and_gradients(case):
    q, k, v, dy, segments = make(case)

    @jax.jit
    def both(q, k, v, dy):
        out, vjp = jax.vjp(lambda *a: call(case, *a, segments), q, k, v)
        return out, *vjp(dy)

    got = both(q, k, v, dy)
    tolerance = 3e-6 if case.dtype == jnp.float32 else 0.02
    expected = by_hand(case, q, k, v, dy, segments)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == case.dtype
        error = np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
        assert error < tolerance


def test_large_scores():
    """Nothing overflows where the exponential of a score would."""
    case = CASES["causal"]
    q, k, v, dy, _ = make(case)
    got, vjp = jax.vjp(lambda *a: call(case, *a, None), 100 * q, k, v)
    expected = by_hand(case, 100 * q, k, v, dy, None)
    for a, b in zip((got, *vjp(dy)), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


LEAKS = ["packed, both ways", "the chunk does not divide"]


@pytest.mark.parametrize("case", [CASES[k] for k in LEAKS], ids=LEAKS)
def test_nothing_leaks(case):
    """A query's output has a gradient exactly where it may look, and nowhere else."""
    q, k, v, _, segments = make(case)
    allowed = np.ones((BATCH, case.tokens, case.tokens), bool)
    if case.causal:
        allowed &= np.tri(case.tokens, dtype=bool)
    if segments is not None:
        allowed &= np.asarray(segments[:, :, None] == segments[:, None, :])

    @jax.jit
    def seen(query):
        def at(k, v):
            return jnp.sum(jnp.sin(call(case, q, k, v, segments)[:, query]))

        dk, dv = jax.grad(at, (0, 1))(k, v)
        return jnp.any(dk != 0, axis=(2, 3)), jnp.any(dv != 0, axis=(2, 3))

    for query in range(0, case.tokens, 3):
        by_keys, by_values = seen(query)
        np.testing.assert_array_equal(by_values, allowed[:, query])
        # Of a single key the weight is one, whatever the key.
        single = allowed[:, query].sum(1) == 1
        np.testing.assert_array_equal(by_keys[~single], allowed[~single, query])
        assert not by_keys[~allowed[:, query]].any()


def test_vmap():
    case = CASES["packed"]
    q, k, v, _, segments = make(case)
    stacked = [jnp.stack([a, 2 * a]) for a in (q, k, v)]

    @jax.jit
    def gradient(q, k, v):
        return jax.grad(lambda *a: jnp.sum(call(case, *a, segments) ** 2), (0, 1, 2))(
            q, k, v
        )

    got = jax.vmap(gradient)(*stacked)
    for i in range(2):
        expected = gradient(*(a[i] for a in stacked))
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)


# --- Memory ---------------------------------------------------------------------------


def loss(q, k, v, *, wrap=lambda f: f, **options):
    return jnp.sum(jnp.sin(wrap(partial(attention, **options))(q, k, v)))


def shapes(tokens, dtype=jnp.float32):
    q = jax.ShapeDtypeStruct((1, tokens, 4, SIZE), dtype)
    k = jax.ShapeDtypeStruct((1, tokens, 2, SIZE), dtype)
    return q, k, k


@pytest.mark.parametrize("implementation", ["blockwise", None])
def test_what_is_kept(implementation):
    """The output and one number per query and head; sin keeps its own input's cosine."""
    q, k, v = shapes(256, jnp.bfloat16)
    options = dict(implementation=implementation, chunk=32)
    kept = [
        (a.shape, a.dtype) for a in saved_activations(partial(loss, **options), q, k, v)
    ]
    assert sorted(kept) == [
        ((1, 4, 256), jnp.float32),
        (q.shape, jnp.bfloat16),
        (q.shape, jnp.bfloat16),
    ]


def test_a_policy_can_keep_it():
    """Inside a recomputed part: the scores are not computed a third time."""
    policy = jax.checkpoint_policies.save_only_these_names(ATTENTION)

    def wrap(function):
        def scaled(q, k, v):
            return function(jnp.sin(q), k, v)

        return jax.checkpoint(scaled, policy=policy)

    q, k, v = shapes(64)
    function = partial(loss, implementation="blockwise", wrap=wrap)
    kept = saved_activations(function, q, k, v)
    assert (1, 4, 64) in [a.shape for a in kept]
    text = str(jax.make_jaxpr(jax.grad(function, (0, 1, 2)))(q, k, v))
    assert text.count("scan[") == 2


def temporaries(tokens, **options):
    gradient = jax.jit(jax.grad(partial(loss, **options), (0, 1, 2)))
    return compiled_bytes(gradient.lower(*shapes(tokens)).compile())


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    small, large = (temporaries(t, chunk=16) for t in (512, 1024))
    assert large < 2.1 * small
    assert large < 0.2 * temporaries(1024, implementation="xla")


# --- cuDNN ----------------------------------------------------------------------------


def kernel_with_its_own_gradient(calls):
    """A stand-in for cuDNN's: out and lse are residuals of a hidden custom_vjp."""

    @jax.custom_vjp
    def kernel(x):
        return forward(x)[0]

    def forward(x):
        calls.append("forward")
        # A product, to be found in the program.
        y = x @ x
        return y, (x, y, jnp.sum(y, axis=0))

    def backward(residuals, dy):
        x, y, total = residuals
        return (dy + x + y + total,)

    kernel.defvjp(forward, backward)
    return kernel


def test_a_forward_kernel_is_not_run_again():
    x = jnp.arange(9.0).reshape(3, 3)
    kernel = kernel_with_its_own_gradient([])
    y, vjp = jax.vjp(kernel, x)
    (expected,) = vjp(x)

    def later(x, y, total):
        fresh, vjp = jax.vjp(kernel, x)
        pairs = [(lambda a: a is fresh, y), (lambda a: a.shape == (3,), total)]
        return reuse_forward(vjp, pairs)(x)[0]

    np.testing.assert_array_equal(later(x, y, jnp.sum(y, axis=0)), expected)
    compiled = jax.jit(later).lower(x, y, y[0]).compile().as_text()
    assert "dot" not in compiled
    # What is not found is computed.
    again = jax.jit(lambda x: reuse_forward(jax.vjp(kernel, x)[1], [])(x)[0])
    assert "dot" in again.lower(x).compile().as_text()


@pytest.mark.skipif(not has_cudnn_attention(), reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize("implementation", ["cudnn", None])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_runs_forward_once_and_backward_once(implementation, packed):
    q, k, v = shapes(256, jnp.bfloat16)
    segments = jnp.zeros((1, 256), jnp.int32) if packed else None

    def function(q, k, v):
        return loss(q, k, v, segments=segments, implementation=implementation)

    jaxpr = jax.make_jaxpr(jax.grad(function, (0, 1, 2)))(q, k, v)
    dead, _ = jax.interpreters.partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * 3)
    for half in ("fwd", "bwd"):
        assert str(dead).count(f"dot_product_attention_{half}_wrapper[") == 1


# --- Errors ---------------------------------------------------------------------------

Q, K = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 6, 2, 8))
HALF = jnp.ones((2, 6, 4, 8), jnp.bfloat16)
ODD, WIDE, UNEVEN = (
    jnp.ones(shape, jnp.bfloat16)
    for shape in ((2, 6, 4, 12), (2, 6, 4, 136), (1, 5, 1, 8))
)
ERRORS = {
    "implementation": (
        (Q, K, K, None, dict(implementation="flash")),
        "implementation is 'flash', expected one of",
    ),
    "chunk": ((Q, K, K, None, dict(chunk=0)), "chunk is 0, expected at least 1"),
    "axes": ((Q[0], K, K, None, {}), r"q has shape \(6, 4, 8\), expected \(batch"),
    "key": (
        (Q, K[:, :5], K, None, {}),
        r"k has shape \(2, 5, 2, 8\), expected \(2, 6, 2, 8\) for q of shape",
    ),
    "value": ((Q, K, Q, None, {}), r"v has shape .* expected \(2, 6, 2, 8\) for q"),
    "dtype": ((HALF, K, K, None, {}), "k is float32, expected bfloat16 as q is"),
    "groups": (
        (Q, Q[:, :, :3], Q[:, :, :3], None, {}),
        "4 query heads do not divide into 3 key heads",
    ),
    "segments": (
        (Q, K, K, jnp.zeros((2, 5), jnp.int32), {}),
        r"segments have shape \(2, 5\), expected \(2, 6\)",
    ),
    "cudnn, dtype": (
        (Q, K, K, None, dict(implementation="cudnn")),
        "bfloat16 and float16 only, and q is float32; leave implementation out",
    ),
    "cudnn, not of eight": (
        (ODD, ODD, ODD, None, dict(implementation="cudnn")),
        "up to 128 that divide by 8, and q's is 12; leave",
    ),
    "cudnn, too large": (
        (WIDE, WIDE, WIDE, None, dict(implementation="cudnn")),
        "up to 128 that divide by 8, and q's is 136; leave",
    ),
    "cudnn, an odd pack": (
        (UNEVEN, UNEVEN, UNEVEN, jnp.zeros((1, 5), int), dict(implementation="cudnn")),
        "segments of an even number of tokens only, and q has 5; leave",
    ),
}


@pytest.mark.parametrize("arguments, message", ERRORS.values(), ids=ERRORS)
def test_errors(arguments, message):
    *arrays, options = arguments
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        attention(*arrays, **options)


# --- Pieces of an axis ----------------------------------------------------------------


@pytest.mark.parametrize("total, limit", [(1, 1), (7, 8), (29, 8), (64, 16), (9, 3)])
def test_chunks_cover_everything_once(total, limit):
    split = chunks(total, limit)
    assert split.size <= min(total, limit)
    pieces = [
        np.asarray(split.positions(i))[np.asarray(split.fresh(i))]
        for i in range(split.pieces)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), np.arange(total))
