"""One contract for every row of the table of methods; joining it is being a row."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax import OasisTrainState
from oasis_jax.linen import OasisDense
from oasis_jax.memory import tree_bytes
from oasis_jax.methods import METHODS, method
from oasis_jax.subspace import bases

MODEL = nn.Sequential([OasisDense(24), nn.gelu, OasisDense(12)])
X = jax.random.normal(jax.random.key(1), (64, 16)) * jnp.linspace(0.2, 3, 16)
Y = jnp.sin(X[:, :12])


def loss_fn(variables, x, y):
    return jnp.mean((MODEL.apply(variables, x) - y) ** 2)


def create(name: str, rank: float = 0.5) -> OasisTrainState:
    row = method(name)
    return OasisTrainState.create(
        apply_fn=MODEL.apply,
        **MODEL.init(jax.random.key(0), X),
        tx=row.optimizer(3e-3),
        rules=row.rules(".*", rank),
    )


@pytest.mark.parametrize("name", METHODS)
def test_trains_and_compiles_once(name):
    """The loss falls, the step compiles once, bases stay orthonormal."""

    @jax.jit
    def step(state, x, y):
        loss, grads = state.value_and_grad(loss_fn)(x, y)
        return state.apply_gradients(grads), loss

    state = create(name)
    if method(name).projected:
        state = jax.jit(lambda s: s.warm_start(loss_fn, X, Y))(state)
    losses = []
    for _ in range(60):
        state, loss = step(state, X, Y)
        losses.append(float(loss))
    assert step._cache_size() == 1
    assert losses[-1] < 0.75 * losses[0] and np.isfinite(losses).all()
    for basis in bases(state.subspace).values():
        assert jnp.abs(basis.T @ basis - jnp.eye(basis.shape[-1])).max() < 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_bytes_of_the_moments(name):
    """Two float32 moments per coordinate of a gradient, and a few counters."""
    state = create(name)
    _, grads = jax.eval_shape(state.value_and_grad(loss_fn), X, Y)
    expected = 2 * tree_bytes(grads.params)
    assert expected <= tree_bytes(state.opt_state) <= expected + 64


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["zero gradient", "zero input", "rank one"])
def test_degenerate_batches_stay_finite(name, kind):
    x, y = {
        "zero gradient": (X, MODEL.apply(MODEL.init(jax.random.key(0), X), X)),
        "zero input": (jnp.zeros_like(X), Y),
        "rank one": (jnp.ones_like(X), Y),
    }[kind]
    step = jax.jit(lambda s: s.apply_gradients(s.value_and_grad(loss_fn)(x, y)[1]))
    state = create(name)
    for _ in range(3):
        state = step(state)
    assert int(state.diagnostics.skipped) == 0
    leaves = jax.tree.leaves((state.params, state.subspace, state.opt_state))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_names_are_checked():
    with pytest.raises(ValueError, match="method is 'nosuch', expected one of adamw"):
        method("nosuch")
