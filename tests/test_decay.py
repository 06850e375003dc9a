"""Weight decay by one rule: every method, every kind of leaf, masked or not."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax import OasisTrainState, oasis_adam
from oasis_jax.decay import with_decay
from oasis_jax.gradient import side
from oasis_jax.leaves import matching
from oasis_jax.linen import OasisDense
from oasis_jax.methods import METHODS, method
from oasis_jax.paths import flatten_paths
from oasis_jax.subspace import COLLECTION

WIDTH, LAYERS, RATE, DECAY = 8, 2, 0.25, 0.5
TOKENS = jnp.arange(6)[None]
OF_SO_SMALL_A_MODEL = {"velora": dict(groups=4), "prac": dict(nonlinear=0.0)}
KERNELS = matching(r"(^|/)kernel(/|$)")


class Layer(nn.Module):
    """Every name that the rows' own patterns match, with biases and a norm."""

    @nn.compact
    def __call__(self, x, _):
        x += OasisDense(WIDTH, name="attn/v_proj")(nn.LayerNorm(name="norm")(x))
        x += OasisDense(WIDTH, name="attn/o_proj")(x)
        return x + OasisDense(WIDTH, name="mlp/down_proj")(x), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(6, WIDTH, name="embed")(tokens)
        axes = {"params": 0, COLLECTION: 0}
        scan = nn.scan(
            Layer, variable_axes=axes, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = scan(name="blocks")(x, None)
        return nn.Dense(6, name="head")(x)


MODEL = Model()
SHAPES = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)
VARIABLES = jax.tree.map(
    lambda a: jnp.asarray(
        np.random.default_rng(a.size).uniform(1, 2, a.shape), a.dtype
    ),
    SHAPES,
)


def loss_fn(variables, tokens):
    return jnp.mean(MODEL.apply(variables, tokens) ** 2)


def without_gradient(name: str, mask, rate=RATE):
    """What the optimizer moves, by path, before and after a step without a gradient."""
    recipe = method(name, **OF_SO_SMALL_A_MODEL.get(name, {}))
    tx = recipe.optimizer(rate, peak=RATE, weight_decay=DECAY, mask=mask)
    create = partial(
        OasisTrainState.create, apply_fn=MODEL.apply, tx=tx, rules=recipe.rules
    )

    @jax.jit
    def step():
        state = create(**VARIABLES)
        grads = jax.eval_shape(lambda s: s.value_and_grad(loss_fn)(TOKENS)[1], state)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), grads)
        return state.trained, state.apply_gradients(zeros).trained

    return [flatten_paths(tree) for tree in jax.device_get(step())]


@pytest.mark.parametrize("name", METHODS)
def test_kernels_decay_by_the_rate_and_nothing_else_does(name):
    before, after = without_gradient(name, KERNELS)
    kernels = {path for path in before if "kernel" in path.split("/")}
    kinds = {path.rpartition("/")[2] for path in before}
    assert kinds >= {"scale", "bias", "embedding"} and len(kernels) >= 4
    for path, weight in before.items():
        if path in kernels:
            wanted = weight * (1 - RATE * DECAY)
            np.testing.assert_allclose(after[path], wanted, rtol=1e-5, err_msg=path)
        else:
            np.testing.assert_array_equal(after[path], weight, err_msg=path)


@pytest.mark.parametrize("name", [n for n, row in METHODS.items() if not row.ablation])
def test_without_a_mask_all_decay_alike(name):
    """By a schedule here: its first value."""
    before, after = without_gradient(name, None, lambda count: RATE / (1 + count))
    for path, weight in before.items():
        wanted = weight * (1 - RATE * DECAY)
        np.testing.assert_allclose(after[path], wanted, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("make", [side.galore, side.osd, side.ldadam])
@pytest.mark.parametrize(
    "mask", [KERNELS, {"up": {"kernel": True, "bias": False}, "norm": False}]
)
def test_methods_of_the_gradient_take_any_mask(make, mask):
    """A function or a tree, whose leaves may stand for parts of the parameters."""
    params = {
        "up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
        "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    }
    tx = make(RATE, 2, weight_decay=DECAY, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    for path, update in flatten_paths(updates).items():
        wanted = -RATE * DECAY if path == "up/kernel" else 0.0
        np.testing.assert_array_equal(update, jnp.full_like(update, wanted), path)


def test_the_librarys_default_is_that_of_optax():
    params = {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(3)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    ours, theirs = (
        tx.update(zeros, tx.init(params), params)[0]
        for tx in (oasis_adam(0.1), optax.adamw(0.1))
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert (ours["scale"] < 0).all()


def test_decay_on_top_follows_the_schedule():
    rates = [0.5, 0.25, 0.0]
    tx = with_decay(optax.sgd(0.0), lambda count: jnp.array(rates)[count], 0.5)
    params = {"w": jnp.full(2, 8.0)}
    state = tx.init(params)
    for rate in rates:
        updates, state = tx.update({"w": jnp.zeros(2)}, state, params)
        np.testing.assert_allclose(updates["w"], -rate * 0.5 * params["w"])
    with pytest.raises(ValueError, match="weight_decay is -1, expected"):
        with_decay(optax.sgd(0.1), 0.1, -1)
