"""Transformations that treat leaves by path and shape, against doing it by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from oasis_jax.leaves import per_leaf, scale_matching, unstacked
from oasis_jax.paths import flatten_paths

SHAPES = {
    "blocks/up": (2, 8, 16),
    "blocks/norm": (2, 8),
    "experts/up": (2, 1, 8, 16),
    "head": (16, 8),
    "bias": (5,),
    "gain": (),
}


def tree(seed: int):
    """A nested tree with a leaf of every rank."""
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    leaves = {
        path: jax.random.normal(key, shape)
        for key, (path, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    nested = {k: v for k, v in leaves.items() if "/" not in k}
    for folder in ("blocks", "experts"):
        own = [path for path in leaves if path.startswith(folder)]
        nested[folder] = {path.split("/")[1]: leaves[path] for path in own}
    return nested


PARAMS = tree(0)
GRADS = [tree(seed) for seed in (1, 2, 3)]


def steps(tx, params, grads, **extra):
    """Updates of several steps, by a compiled update whose state never changes form."""

    @jax.jit
    def update(grads, state, params):
        return tx.update(grads, state, params, **extra)

    state, updates = tx.init(params), []
    for gradient in grads:
        before = jax.tree.map(lambda a: (a.shape, a.dtype), state)
        new, state = update(gradient, state, params)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == before
        updates.append(new)
    assert update._cache_size() == 1
    return updates


def assert_equal(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        actual,
        expected,
    )


# --- unstacked ----------------------------------------------------------------------

OPTIMIZERS = {
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "trust ratio": optax.scale_by_trust_ratio(),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_unstacked_is_one_layer_at_a_time(tx):
    """Each matrix of a stack moves as if it were alone; other leaves as they would."""

    def cut(tree):
        """Every matrix of every stack, by path and number."""
        return {
            f"{path} {layer}": matrix
            for path, leaf in flatten_paths(tree).items()
            for layer, matrix in enumerate(
                leaf.reshape(-1, *leaf.shape[-2:]) if leaf.ndim > 2 else [leaf]
            )
        }

    got = steps(unstacked(tx), PARAMS, GRADS)
    expected = steps(tx, cut(PARAMS), [cut(grads) for grads in GRADS])
    for updates, alone in zip(got, expected, strict=True):
        shapes = {path: leaf.shape for path, leaf in flatten_paths(updates).items()}
        assert shapes == SHAPES
        assert_equal(cut(updates), alone)


def test_unstacked_makes_a_difference():
    """Adafactor left alone with a stack factors other axes, or shares statistics."""
    tx = OPTIMIZERS["adafactor"]
    stack, grads = {"w": PARAMS["blocks"]["up"]}, [{"w": GRADS[0]["blocks"]["up"]}]
    got, plain = (steps(t, stack, grads)[0]["w"] for t in (unstacked(tx), tx))
    assert not np.allclose(got, plain, rtol=1e-3)


def test_unstacked_state_is_over_lists_of_matrices():
    state = unstacked(contrib.scale_by_galore(2)).init({"up": jnp.ones((3, 8, 16))})
    assert [p.shape for p in state.projector["up"]] == [(16, 2)] * 3


def test_unstacked_without_parameters_and_with_arguments():
    """`params` may be absent, and what `update` is given besides comes through."""

    def update(updates, state, params=None, *, factor, **_):
        assert params is None
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    got, _ = unstacked(inner).update(GRADS[0], optax.EmptyState(), factor=3.0)
    assert_equal(got, jax.tree.map(lambda g: 3 * g, GRADS[0]))


def test_unstacked_keeps_dtypes():
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADS[0])
    tx = unstacked(optax.scale(0.5))
    got, _ = tx.update(grads, tx.init(grads))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


# --- per_leaf -----------------------------------------------------------------------


def choose(path: str, shape: tuple[int, ...]):
    """By path, by shape, or neither."""
    if path == "head":
        return optax.adamw(1e-2, weight_decay=0.1)
    if len(shape) > 1:
        return optax.chain(optax.scale(float(shape[-1])), optax.trace(0.9))
    return optax.identity()


def test_per_leaf_is_each_by_itself():
    got = steps(per_leaf(choose), PARAMS, GRADS)
    own = {path: choose(path, shape) for path, shape in SHAPES.items()}
    params = flatten_paths(PARAMS)
    states = {path: tx.init(params[path]) for path, tx in own.items()}

    @jax.jit
    def one_by_one(grads, states):
        return {
            path: tx.update(grads[path], states[path], params[path])
            for path, tx in own.items()
        }

    for updates, grads in zip(got, GRADS, strict=True):
        done = one_by_one(flatten_paths(grads), states)
        states = {path: state for path, (_, state) in done.items()}
        assert_equal(flatten_paths(updates), {path: u for path, (u, _) in done.items()})


def test_per_leaf_asks_with_paths_and_shapes_and_keeps_states_by_path():
    asked = []

    def note(path, shape):
        asked.append((path, shape))
        return optax.trace(0.9)

    state = per_leaf(note).init(PARAMS)
    assert dict(asked) == SHAPES and len(asked) == len(SHAPES)
    assert {path: own.trace.shape for path, own in state.items()} == SHAPES


def test_per_leaf_without_parameters_and_with_arguments():
    """Every transformation gets the arguments, those that take none too."""

    def update(updates, state, params=None, *, factor, **_):
        assert params is None
        return factor * updates, state

    takes = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = per_leaf(lambda path, _: takes if path == "head" else optax.scale(2.0))
    got, _ = tx.update(GRADS[0], tx.init(GRADS[0]), factor=3.0)
    expected = jax.tree.map(lambda g: 2 * g, GRADS[0])
    assert_equal(got, expected | {"head": 3 * GRADS[0]["head"]})


def test_per_leaf_inside_unstacked():
    """As Optax's GaLore is used: each layer by itself, its rank a share of its side."""

    tx = unstacked(per_leaf(lambda _, shape: contrib.scale_by_galore(shape[0] // 4)))
    params, *grads = ({"w": t["blocks"]["up"]} for t in (PARAMS, *GRADS[:2]))
    got = steps(tx, params, grads)
    for layer in range(2):
        alone, *its_grads = ({"w": t["w"][layer]} for t in (params, *grads))
        expected = steps(contrib.scale_by_galore(2), alone, its_grads)
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(
                mine["w"][layer], theirs["w"], rtol=1e-4, atol=1e-5
            )


# --- scale_matching -----------------------------------------------------------------

PATTERNS = {
    "one": ("head", {"head"}),
    "a folder": ("^blocks/", {"blocks/up", "blocks/norm"}),
    "anywhere": ("up", {"blocks/up", "experts/up"}),
    "either": ("bias|gain$", {"bias", "gain"}),
    "everything": (".", set(SHAPES)),
    "nothing": ("nosuch", set()),
}


@pytest.mark.parametrize("pattern, matched", PATTERNS.values(), ids=PATTERNS)
def test_scale_matching(pattern, matched):
    got = steps(scale_matching(pattern, 0.25), PARAMS, GRADS)
    for updates, grads in zip(got, GRADS, strict=True):
        for path, grad in flatten_paths(grads).items():
            factor = 0.25 if path in matched else 1.0
            np.testing.assert_array_equal(flatten_paths(updates)[path], factor * grad)


def test_scale_matching_after_an_optimizer_scales_its_updates():
    """In a chain, with the arguments of other links, whose state it leaves alone."""
    adam = optax.adam(1e-2)
    got = steps(optax.chain(adam, scale_matching("up", 0.5)), PARAMS, GRADS, basis={})
    expected = steps(adam, PARAMS, GRADS)
    for mine, theirs in zip(got, expected, strict=True):
        factors = {path: 0.5 if "up" in path else 1.0 for path in SHAPES}
        by_path = flatten_paths(theirs)
        assert_equal(flatten_paths(mine), {p: factors[p] * by_path[p] for p in SHAPES})


def test_scale_matching_keeps_dtypes():
    tx = scale_matching(".", 0.5)
    grads = {"w": jnp.ones(3, jnp.bfloat16)}
    assert tx.update(grads, tx.init(grads))[0]["w"].dtype == jnp.bfloat16
