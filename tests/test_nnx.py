"""The NNX layer is `nnx.Linear`, and its optimizer trains like `nnx.Optimizer`."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from oasis_jax import Fixed, Place, Probe, Rule, method, oasis_adam
from oasis_jax.nnx import OasisLinear, OasisOptimizer, Subspace

OPTIONS = {
    "plain": {},
    "no bias": dict(use_bias=False),
    "bfloat16": dict(dtype=jnp.bfloat16),
    "bfloat16 parameters": dict(param_dtype=jnp.bfloat16),
    "precision": dict(precision="highest"),
    "init": dict(kernel_init=nnx.initializers.ones, bias_init=nnx.initializers.ones),
}


class Net(nnx.Module):
    """Two projectable layers, a statistic, a plain layer."""

    def __init__(self, linear, rngs: nnx.Rngs):
        self.layers = nnx.List([linear(8, 16, rngs=rngs), linear(16, 16, rngs=rngs)])
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.gelu(layer(x))
        return self.out(self.norm(x))


def data():
    x = jax.random.normal(jax.random.key(0), (64, 8))
    return x, jnp.sin(x.sum(axis=-1, keepdims=True))


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def with_slots(layer: OasisLinear, rank: int) -> OasisLinear:
    """The layer as it is within a differentiated call."""
    n_in, n_out = layer.in_features, layer.out_features
    layer.projection.set_value(
        Probe(
            Place(("kernel",)),
            basis=jnp.eye(n_in, rank),
            slots=(jnp.zeros((rank, n_out)),),
            energy=jnp.zeros(()),
        )
    )
    return layer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("projected", [False, True])
def test_same_as_linear(options, projected):
    plain = nnx.Linear(8, 5, rngs=nnx.Rngs(3), **options)
    ours = OasisLinear(8, 5, rngs=nnx.Rngs(3), **options)
    if projected:
        with_slots(ours, 2)
    x = jax.random.normal(jax.random.key(1), (2, 3, 8))
    chex.assert_trees_all_equal(
        *(nnx.to_pure_dict(nnx.state(layer, nnx.Param)) for layer in (ours, plain))
    )
    expected, got = plain(x), ours(x)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def test_trains_as_the_documentation_writes_it():
    x, y = data()
    model = Net(OasisLinear, nnx.Rngs(0))
    optimizer = OasisOptimizer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), oasis_adam(1e-2)),
        rules=[Rule("layers", rank=0.5)],
    )
    traces = []

    @nnx.jit
    def train_step(model, optimizer, x, y):
        traces.append(None)
        loss, grads = optimizer.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads)
        return loss

    before = model.layers[0].projection.basis
    losses = [train_step(model, optimizer, x, y) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    assert len(traces) == 1  # compiled once, though the bases moved
    assert not np.array_equal(before, model.layers[0].projection.basis)
    assert model.norm.mean[...].any()  # what the loss changed in the model is kept
    energies = optimizer.diagnostics.captured_energy
    assert set(energies) == {"layers/0/projection", "layers/1/projection"}
    assert all(0 < e <= 1.0001 for e in energies.values())
    # Only a differentiated call projects; the trained model is a plain one.
    assert not model.layers[0].projection.get_value().active


@nnx.jit
def theirs(model, optimizer, x, y):
    """A step with Flax's own optimizer."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


def test_full_rank_equals_adamw():
    """With P = I the optimizer is `nnx.Optimizer(model, optax.adamw(...))`."""
    x, y = data()
    plain = Net(nnx.Linear, nnx.Rngs(0))
    reference = nnx.Optimizer(plain, optax.adamw(1e-3), wrt=nnx.Param)
    model = Net(OasisLinear, nnx.Rngs(0))
    rules = [Rule("layers", rank=1.0, tracker=Fixed())]
    optimizer = OasisOptimizer(model, oasis_adam(1e-3), rules=rules)
    for layer in model.layers:
        identity = jnp.eye(layer.in_features)
        projection = dataclasses.replace(layer.projection.get_value(), basis=identity)
        layer.projection.set_value(projection)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = optimizer.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads)
        return loss

    for _ in range(20):
        expected, loss = theirs(plain, reference, x, y), step(model, optimizer)
        np.testing.assert_allclose(loss, expected, atol=1e-5)
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        trained,
        nnx.to_pure_dict(nnx.state(plain, nnx.Param)),
    )


def test_aux():
    x, y = data()
    model = Net(OasisLinear, nnx.Rngs(0))
    optimizer = OasisOptimizer(model, oasis_adam(1e-2))
    grad_fn = optimizer.value_and_grad(
        lambda m, x, y: (loss_fn(m, x, y), "aux"), has_aux=True
    )
    (loss, aux), _ = grad_fn(model, x, y)
    assert aux == "aux" and loss.shape == ()


def test_gradients_of_another_kind_are_refused():
    x, y = data()
    model = Net(OasisLinear, nnx.Rngs(0))
    optimizer = OasisOptimizer(model, oasis_adam(1e-2))
    with pytest.raises(TypeError, match="own value_and_grad, not State"):
        optimizer.update(model, nnx.grad(loss_fn)(model, x, y))


def test_a_layer_with_its_own_product_is_not_projected():
    custom = OasisLinear(
        8, 5, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=nnx.Rngs(0)
    )
    assert custom.projection.kernels == ()
    with pytest.raises(ValueError, match="declares no projectable layer"):
        OasisOptimizer(custom, oasis_adam(1e-2))


def test_optimizer_must_lift():
    model = Net(OasisLinear, nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layers/0/kernel: the optimizer leaves"):
        OasisOptimizer(model, optax.adamw(1e-2))


def test_subspace_is_a_variable_of_its_own():
    model = Net(OasisLinear, nnx.Rngs(0))
    assert set(nnx.to_pure_dict(nnx.state(model, Subspace))) == {"layers"}


@pytest.mark.parametrize("name", ["prac", "velora", "compact", "rso", "lora"])
def test_other_methods_train(name):
    """Bases renewed from a batch, held as a seed or a vector, and adapters."""
    options = {"prac": dict(nonlinear=0.0), "velora": dict(groups=4)}
    recipe = method(name, pattern="layers", **options.get(name, {}))
    model = Net(OasisLinear, nnx.Rngs(0))
    optimizer = OasisOptimizer(model, recipe.optimizer(1e-2), rules=recipe.rules)
    start = jax.device_get(model.layers[1].projection.get_value())

    @nnx.jit
    def step(model, optimizer, x, y):
        optimizer.refresh(model, loss_fn, x, y)
        loss, grads = optimizer.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, *data())) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert model.norm.mean[...].any()  # what the loss changes in the model is kept
    if name in ("prac", "velora"):
        now = model.layers[1].projection.get_value()
        moved = jax.tree.map(lambda a, b: (a != b).any(), start.basis, now.basis)
        assert all(jax.tree.leaves(moved))


def test_an_adapter_is_applied_and_moved():
    """The layer is that of W + A B; W stays, A and B move."""
    x, y = data()
    model = Net(OasisLinear, nnx.Rngs(0))
    recipe = method("lora", pattern="layers", rank=3)
    optimizer = OasisOptimizer(model, recipe.optimizer(1e-2), rules=recipe.rules)
    layer = model.layers[0]
    kernel, first = jnp.copy(layer.kernel[...]), layer.projection.get_value()
    for _ in range(2):  # A moves once B is not zero
        _, grads = optimizer.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads)
    adapter = layer.projection.get_value()
    np.testing.assert_array_equal(layer.kernel[...], kernel)
    for before, after in ((first.a, adapter.a), (first.b, adapter.b)):
        assert not np.allclose(before[0], after[0], atol=1e-4)
    expected = x @ (kernel + adapter.a[0] @ adapter.b[0]) + layer.bias[...]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - x @ kernel - layer.bias[...]).max() > 1e-3


@pytest.mark.parametrize("name", ["galore", "osd", "ldadam"])
def test_gradient_side_methods_need_no_layer_of_ours(name):
    """Under `nnx.Optimizer`, the same losses as in a plain loop over a dictionary."""
    x, y = data()
    tx = method(name, rank=4, pattern="kernel$").optimizer(1e-2)
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    params = {"kernel": model.kernel[...], "bias": model.bias[...]}
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = tx.init(params)

    @jax.jit
    def ours(params, state):
        def loss(params):
            return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    for _ in range(4):
        expected, params, state = ours(params, state)
        np.testing.assert_allclose(theirs(model, optimizer, x, y), expected, rtol=1e-5)
