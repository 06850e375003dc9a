"""`oasis_adam(in_place=True)` against the full-size updates it avoids."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax import OasisTrainState, Rule, oasis_adam
from oasis_jax.decay import decay_weights
from oasis_jax.methods import LINEAR
from oasis_jax.models.llama import Llama, LlamaConfig
from oasis_jax.paths import map_with_paths

MODEL = Llama(LlamaConfig(32, 16, 40, 2, 4, 2))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 12)))


def drawn(shapes):
    """Any numbers do, and nothing has to be compiled for them."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), shapes
    )


VARIABLES = drawn(jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS))


def matrices(params):
    """The usual mask: by the number of axes."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def named(params):
    return map_with_paths(lambda path, p: "down_proj" in path, params)


def create(in_place, mask=None, clip=None):
    tx = oasis_adam(1e-2, weight_decay=0.1, in_place=in_place, mask=mask)
    return OasisTrainState.create(
        apply_fn=MODEL.apply,
        **VARIABLES,
        tx=optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx,
        rules=[Rule(LINEAR, 0.5)],
    )


def loss_fn(variables):
    logits = MODEL.apply(variables, TOKENS)
    targets = jnp.roll(TOKENS, -1, axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


GRADS = drawn(jax.eval_shape(lambda: create(False).value_and_grad(loss_fn)()[1]))
apply = jax.jit(lambda s, g: s.apply_gradients(g))


def scaled(factor):
    return GRADS._replace(params=jax.tree.map(lambda g: factor * g, GRADS.params))


@pytest.mark.parametrize(
    "options", [dict(clip=0.5), dict(mask=matrices)], ids=["clip", "mask"]
)
def test_in_place_is_the_same_step(options):
    """With scanned kernels and weight decay."""
    ours, full = create(True, **options), create(False, **options)
    structure = jax.tree.structure(full.opt_state)
    assert jax.tree.structure(ours.opt_state) == structure
    for factor in (1.0, -2.0, 0.5):
        ours, full = (apply(s, scaled(factor)) for s in (ours, full))
    assert jax.tree.structure(ours.opt_state) == structure
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    if "clip" in options:
        bad = apply(ours, scaled(jnp.nan))
        for tree in ("params", "subspace", "opt_state"):
            before, after = (
                [np.asarray(a).tobytes() for a in jax.tree.leaves(getattr(s, tree))]
                for s in (ours, bad)
            )
            assert before == after
        assert int(bad.diagnostics.skipped) == 1


@pytest.mark.parametrize(
    "mask",
    [None, matrices, named, jax.tree.map(lambda p: p.ndim > 2, VARIABLES["params"])],
    ids=["all", "by axes", "by name", "tree"],
)
def test_every_mask_is_accepted(mask):
    jax.eval_shape(lambda: create(True, mask))


@pytest.mark.parametrize("mask", [None, matrices, {"w": False, "b": True}])
def test_decay_is_that_of_optax(mask):
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.array([1.0, -2.0])}
    updates = jax.tree.map(jnp.ones_like, params)
    ours, theirs = (
        make(0.3, mask) for make in (decay_weights, optax.add_decayed_weights)
    )
    got, state = ours.update(updates, ours.init(params), params)
    expected, other = theirs.update(updates, theirs.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.tree.structure(state) == jax.tree.structure(other)
