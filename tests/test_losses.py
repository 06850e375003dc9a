"""The loss without its logits: the same numbers as with them, in less memory."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend.core import Jaxpr

from oasis_jax import Declaration, Lora, Oja, Place, Probe, Projection
from oasis_jax.bases import Blocks, Seeded
from oasis_jax.lora import Adapter
from oasis_jax.losses import chunked_cross_entropy
from oasis_jax.planning.memory import compiled_bytes, saved_activations, tree_bytes
from oasis_jax.trackers import Random

WIDTH, VOCABULARY, RANK = 16, 24, 4
PATH = "kernel"


def array_basis(rng):
    return jnp.float32(np.linalg.qr(rng.normal(size=(WIDTH, RANK)))[0])


def blocks(rng):
    vector = rng.normal(size=WIDTH // RANK)
    return Blocks(jnp.float32(vector / np.linalg.norm(vector)), RANK)


BASES = {
    "plain": None,
    "array": array_basis,
    "seeded": lambda rng: Seeded(jnp.float32(7), WIDTH, RANK),
    "blocks": blocks,
}


class Case(NamedTuple):
    leading: tuple[int, ...] = (4, 6)
    chunk: int = 8
    basis: str = "plain"
    stride: int = 1
    transposed: bool = False
    tracker: object = Oja()
    dtype: type = jnp.float32
    param_dtype: type = jnp.float32


CASES = {
    "plain": Case(),
    "projected": Case(basis="array"),
    "a seed for each kernel": Case(
        basis="seeded", tracker=Random(stored=False, shared=False)
    ),
    "blocks": Case(basis="blocks"),
    "one chunk": Case(chunk=1000),
    "one token at a time": Case((5,), 1),
    "the chunk does not divide": Case((3, 7), 9, "array"),
    "nor fits a row": Case((1, 17), 5, "array"),
    "more rows than a chunk": Case((9, 3), 4, "array", stride=2),
    "no rows": Case((13,), 4, "array"),
    "a token alone": Case((), 4, "array"),
    "many axes": Case((2, 2, 5), 8, "array", stride=2),
    "tied": Case((3, 7), 9, transposed=True),
    "tied, projected": Case((3, 7), 9, "array", transposed=True),
    "bfloat16 products": Case((3, 7), 9, "array", dtype=jnp.bfloat16),
    "bfloat16": Case((3, 7), 9, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    "bfloat16, tied": Case(
        (3, 7), 9, transposed=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
KINDS = ["the chunk does not divide", "tied", "blocks"]
each_kind = pytest.mark.parametrize("case", [CASES[k] for k in KINDS], ids=KINDS)


class Arguments(NamedTuple):
    """What is differentiated, and what is not."""

    differentiated: tuple  # x, kernel or None, projection or None
    kernel: jax.Array
    targets: jax.Array
    weights: jax.Array


def make(case, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(*case.leading, WIDTH)), case.dtype)
    kernel = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), case.param_dtype)
    kernel = kernel.T if case.transposed else kernel
    targets = jnp.asarray(rng.integers(VOCABULARY, size=case.leading), jnp.int32)
    weights = jnp.float32(rng.random(case.leading) * (rng.random(case.leading) < 0.8))
    place = None
    if case.basis != "plain":
        slots = (jnp.zeros((RANK, VOCABULARY)),)
        basis = BASES[case.basis](rng)
        place = Place((PATH,), case.tracker, case.stride)
        place = Probe(place, basis, slots, jnp.zeros(()))
    # A projected kernel is not differentiated.
    differentiated = (x, kernel if place is None else None, place)
    return Arguments(differentiated, kernel, targets, weights)


def ours(case, differentiated, a, scale=1.0):
    x, kernel, place = differentiated
    kernel = a.kernel if kernel is None else kernel
    options = dict(projection=place, chunk=case.chunk, transposed=case.transposed)
    return scale * chunked_cross_entropy(x, kernel, a.targets, a.weights, **options)


def with_logits(case, differentiated, a, scale=1.0):
    """The oracle: a projected layer, then Optax's loss."""
    x, kernel, place = differentiated
    kernel = a.kernel if kernel is None else kernel
    kernel = kernel.T if case.transposed else kernel
    (logits,) = (place or Declaration())(x, {PATH: kernel})
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, a.targets)
    return scale * jnp.sum(a.weights * losses)


def both(function, case, a, **options):
    function = partial(function, case, **options)
    return jax.jit(jax.value_and_grad(function))(a.differentiated, a)


def against_the_oracle(case, a, **options):
    """Ours and the expected, of one program: it is their compilation that takes time."""

    @jax.jit
    def run(a):
        return [
            jax.value_and_grad(partial(function, case, **options))(a.differentiated, a)
            for function in (ours, with_logits)
        ]

    return run(a)


def close(got, expected, tolerance):
    """Within a tolerance relative to each array's largest element, and of its dtype."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# --- Values ---------------------------------------------------------------------------


@each_case
def test_same_as_with_logits(case):
    # In bfloat16 the oracle's logits are rounded, and ours are not.
    tolerance = 1e-6 if case.dtype == jnp.float32 else 0.03
    close(*against_the_oracle(case, make(case)), tolerance)


@each_kind
def test_the_value_alone(case):
    a = make(case)
    got = jax.jit(partial(ours, case))(a.differentiated, a)
    np.testing.assert_allclose(got, both(ours, case, a)[0], rtol=1e-6)


@each_kind
def test_the_cotangent_scales_gradients_and_not_observations(case):
    close(*against_the_oracle(case, make(case), scale=3.0), 1e-6)


def test_logits_are_float32_whatever_x_is():
    """Against float64, better than from logits rounded to bfloat16."""
    case = CASES["bfloat16"]
    a = make(case)
    x, kernel = (np.asarray(b, np.float64) for b in (a.differentiated[0], a.kernel))
    logits = x @ kernel
    own = np.take_along_axis(logits, np.asarray(a.targets)[..., None], -1)[..., 0]
    exact = np.sum(a.weights * (np.log(np.exp(logits).sum(-1)) - own))
    np.testing.assert_allclose(ours(case, a.differentiated, a), exact, rtol=1e-6)


def test_targets_without_weight_may_be_anything():
    case = CASES["plain"]
    a = make(case)

    @jax.jit
    def run(targets):
        function = partial(ours, case, a=a._replace(targets=targets))
        return jax.value_and_grad(function)(a.differentiated)

    for nowhere in (-100, VOCABULARY, 10**6):
        targets = jnp.where(a.weights == 0, nowhere, a.targets)
        close(run(targets), run(a.targets), 0)


def test_large_logits():
    case = CASES["plain"]
    a = make(case)
    x, *rest = a.differentiated
    a = a._replace(differentiated=(1000 * x, *rest))
    close(*against_the_oracle(case, a), 1e-6)


def test_weights_and_projected_kernels_get_no_gradient():
    case = CASES["projected"]
    a = make(case)
    x, _, place = a.differentiated

    def loss(kernel, weights):
        return ours(case, (x, kernel, place), a._replace(weights=weights))

    gradients = jax.grad(loss, (0, 1))(a.kernel, a.weights)
    assert not any(jnp.any(g) for g in gradients)


def test_a_place_without_slots_is_plain():
    case = CASES["projected"]
    a = make(case)
    x, _, place = a.differentiated
    plain = a._replace(differentiated=(x, a.kernel, None))
    for inactive in (Projection(place.place, place.basis), Declaration()):
        got = jax.grad(lambda xk: ours(case, (*xk, inactive), a))((x, a.kernel))  # noqa: B023
        close(got, both(ours, case, plain)[1][:2], 1e-6)


@pytest.mark.parametrize("case", [CASES[k] for k in ("plain", "tied")])
def test_an_adapter_is_applied(case):
    a = make(case)
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(WIDTH, 2)), rng.normal(size=(2, VOCABULARY))
    place = Place((PATH,), Lora(alpha=1.0))
    adapter = Adapter(place, (jnp.float32(left),), (jnp.float32(right),))
    a = a._replace(differentiated=(a.differentiated[0], a.kernel, adapter))
    close(*against_the_oracle(case, a), 2e-6)


# --- Transformations ------------------------------------------------------------------


@each_kind
def test_inside_checkpoint(case):
    a = make(case)

    def recomputed(case, differentiated, a):
        return jax.checkpoint(partial(ours, case))(differentiated, a)

    close(both(recomputed, case, a), both(ours, case, a), 1e-6)


@each_kind
def test_microbatches(case):
    """Summed over halves, gradients are those of the whole; so are observations' means.

    (The observations of a part are its own means, which the train state averages.)
    """
    case = case._replace(leading=(4, 7))
    a = make(case)
    x, kernel, place = a.differentiated
    halves = jax.tree.map(
        lambda b: b.reshape(2, 2, *b.shape[1:]), (x, a.targets, a.weights)
    )

    @jax.jit
    def accumulated():
        def body(total, half):
            x, targets, weights = half
            part = a._replace(targets=targets, weights=weights)
            result = jax.value_and_grad(partial(ours, case))((x, kernel, place), part)
            dx = result[1][0]
            return jax.tree.map(jnp.add, total, (result[0], result[1][1:])), dx

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), (kernel, place)))
        (total, rest), dx = lax.scan(body, zeros, halves)
        return total, (dx.reshape(x.shape), *rest)

    total, (dx, dkernel, seen) = accumulated()
    if seen is not None:
        basis = jax.tree.map(lambda b: b / 2, seen.basis)
        seen = replace(seen, basis=basis, energy=seen.energy / 2)
    close((total, (dx, dkernel, seen)), both(ours, case, a), 2e-6)


# --- Memory ---------------------------------------------------------------------------

LARGE = Case((4, 64), 16, "array")


def large(case, vocabulary=512):
    tokens, n = case.leading, WIDTH
    kernel = jax.ShapeDtypeStruct((n, vocabulary), jnp.float32)
    place = None
    if case.basis == "array":
        place = Probe(
            Place((PATH,), case.tracker),
            basis=jax.ShapeDtypeStruct((n, RANK), jnp.float32),
            slots=(jax.ShapeDtypeStruct((RANK, vocabulary), jnp.float32),),
            energy=jax.ShapeDtypeStruct((), jnp.float32),
        )
    x = jax.ShapeDtypeStruct((*tokens, n), case.dtype)
    differentiated = (x, kernel if place is None else None, place)
    return Arguments(
        differentiated,
        kernel,
        jax.ShapeDtypeStruct(tokens, jnp.int32),
        jax.ShapeDtypeStruct(tokens, jnp.float32),
    )


def all_shapes(jaxpr):
    """Of everything that is computed, at any depth."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if isinstance(inner, Jaxpr):
                yield from all_shapes(inner)


@pytest.mark.parametrize("basis", ["plain", "array"])
def test_logits_never_exist(basis):
    case, vocabulary = LARGE._replace(basis=basis), 512
    a = large(case, vocabulary)

    def largest(function):
        gradient = jax.value_and_grad(partial(function, case))
        shapes = all_shapes(jax.make_jaxpr(gradient)(a.differentiated, a).jaxpr)
        wide = [s for s in shapes if s and s[-1] == vocabulary]
        return max(np.prod(s[:-1]) for s in wide)

    assert largest(with_logits) == np.prod(case.leading)
    # The kernel's rows, or a chunk's tokens.
    assert largest(ours) == case.chunk


@pytest.mark.parametrize("basis", ["plain", "array"])
def test_what_is_kept(basis):
    case = LARGE._replace(basis=basis)
    a = large(case)
    fixed = a._replace(differentiated=None)

    def loss(differentiated, kernel, targets, weights):
        rest = fixed._replace(kernel=kernel, targets=targets, weights=weights)
        return ours(case, differentiated, rest)

    kept = saved_activations(loss, a.differentiated, *a[1:])
    x, kernel, place = a.differentiated
    expected = [x, kernel] if place is None else [x, place.basis, *place.slots]
    assert tree_bytes(kept) <= tree_bytes(expected) + 8


def compiled(function, case, a, differentiate=True):
    function = partial(function, case)
    function = jax.value_and_grad(function) if differentiate else function
    return jax.jit(function).lower(a.differentiated, a).compile()


@pytest.mark.parametrize("basis", ["plain", "array"])
def test_memory_and_work(basis):
    case = LARGE._replace(basis=basis)
    a = large(case)
    logits = 4 * np.prod(case.leading) * 512
    mine, theirs = (compiled(f, case, a) for f in (ours, with_logits))
    assert compiled_bytes(mine) < compiled_bytes(theirs) - logits
    value = compiled(ours, case, a, differentiate=False)
    assert compiled_bytes(value) < compiled_bytes(mine)
    # XLA counts one pass of a loop: logits here, and two or three products there.
    flops = [c.cost_analysis()["flops"] for c in (value, mine)]
    assert flops[0] < 0.75 * flops[1]


# --- Errors ---------------------------------------------------------------------------

A = make(CASES["projected"])
X, _, PLACE = A.differentiated
TWO = replace(PLACE, place=Place(("a", "b")), slots=PLACE.slots * 2)
NARROW = replace(PLACE, slots=(jnp.zeros((RANK, 5)),))
SMALL = replace(PLACE, basis=jnp.zeros((9, RANK)))
HALF = replace(PLACE, slots=(jnp.zeros((RANK, VOCABULARY), jnp.bfloat16),))
ERRORS = {
    "chunk": (dict(chunk=0), "chunk is 0, expected at least 1 token"),
    "kernel": (
        dict(kernel=A.kernel.T),
        r"kernel has shape \(24, 16\), expected \(16, vocabulary\) for x of shape",
    ),
    "tied": (dict(transposed=True), r"kernel has .* expected \(vocabulary, 16\)"),
    "targets": (
        dict(targets=A.targets[:, :2]),
        r"targets have shape \(4, 2\), expected \(4, 6\) for x of shape",
    ),
    "weights": (dict(weights=A.weights[0]), r"weights have shape \(6,\), expected"),
    "two kernels": (dict(projection=TWO), "projection is that of 2 kernels, expected"),
    "basis": (dict(projection=SMALL), r"basis has shape \(9, 4\), expected \(16, rank"),
    "slot": (dict(projection=NARROW), r"slot has shape \(4, 5\), expected \(4, 24\)"),
    "slot's dtype": (dict(projection=HALF), "slot is bfloat16, not float32"),
}


@pytest.mark.parametrize("changes, message", ERRORS.values(), ids=ERRORS)
def test_errors(changes, message):
    arguments = dict(x=X, kernel=A.kernel, targets=A.targets, weights=A.weights)
    with pytest.raises((ValueError, TypeError), match=f"cross_entropy: .*{message}"):
        chunked_cross_entropy(**(arguments | changes))
