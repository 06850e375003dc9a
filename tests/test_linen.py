"""The linen layer is `nn.Dense`, and trains in a loop as Flax's documentation writes it."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training import train_state

from oasis_jax import Lora, OasisTrainState, Rule, oasis_adam
from oasis_jax.linen import DenseWeights, OasisDense, shared_dense
from oasis_jax.losses import chunked_cross_entropy

OPTIONS = {
    "plain": {},
    "no bias": dict(use_bias=False),
    "bfloat16": dict(dtype=jnp.bfloat16),
    "bfloat16 parameters": dict(param_dtype=jnp.bfloat16),
    "precision": dict(precision="highest"),
    "init": dict(kernel_init=nn.initializers.ones, bias_init=nn.initializers.ones),
}
X = jax.random.normal(jax.random.key(1), (2, 3, 8))


class Shared(nn.Module):
    """Two layers on one input, ours or Flax's."""

    plain: bool
    options: dict

    @nn.compact
    def __call__(self, x):
        if self.plain:
            return tuple(
                nn.Dense(n, name=m, **self.options)(x) for m, n in FEATURES.items()
            )
        return shared_dense(self, "ab", x, FEATURES, **self.options)


FEATURES = {"a": 5, "b": 4}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", ["single", "shared"])
def test_same_as_dense(options, projected, kind):
    if kind == "single":
        plain, ours = nn.Dense(5, **options), OasisDense(5, **options)
    else:
        plain, ours = Shared(True, options), Shared(False, options)
    expected = plain.init(jax.random.key(0), X)
    variables = ours.init(jax.random.key(0), X)
    chex.assert_trees_all_equal(variables["params"], expected["params"])
    state = OasisTrainState.create(
        apply_fn=ours.apply, **variables, tx=oasis_adam(1e-2), rules=[Rule(".*", 2)]
    )
    got = ours.apply({"params": state.params}, X)
    if projected:

        def loss_fn(variables):
            outputs = ours.apply(variables, X)
            return sum(jnp.sum(a) for a in jax.tree.leaves(outputs)), outputs

        (_, got), _ = state.value_and_grad(loss_fn, has_aux=True)()
    reference = plain.apply(expected, X)
    chex.assert_trees_all_equal_dtypes(got, reference)
    chex.assert_trees_all_equal(got, reference)


class Head(nn.Module):
    """A loss of the logits, or of what would make them."""

    chunked: bool

    @nn.compact
    def __call__(self, x, targets):
        if self.chunked:
            kernel, place = DenseWeights(5, name="head")(x.shape[-1])
            ones = jnp.ones(targets.shape)
            return chunked_cross_entropy(
                x, kernel, targets, ones, projection=place, chunk=2
            )
        logits = OasisDense(5, use_bias=False, name="head")(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum()


@pytest.mark.parametrize(
    "rules", [[], [Rule(".*", 2)], [Rule(".*", 2, tracker=Lora())]]
)
def test_weights_without_the_product(rules):
    """The same variables, and with any rule the same gradients and observations."""
    targets = jnp.arange(6).reshape(2, 3) % 5

    def train(head):
        variables = head.init(jax.random.key(0), X, targets)
        state = OasisTrainState.create(
            apply_fn=head.apply, **variables, tx=oasis_adam(1e-2), rules=rules
        )
        return variables, state.value_and_grad(lambda v: head.apply(v, X, targets))()

    expected, expected_gradients = train(Head(chunked=False))
    got, gradients = train(Head(chunked=True))
    chex.assert_trees_all_equal(got, expected)
    chex.assert_trees_all_close(gradients, expected_gradients, atol=1e-6, rtol=1e-5)


class CNN(nn.Module):
    """The shape of Flax's quickstart, small: convolution, then dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(features=4, kernel_size=(3, 3))(x))
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(OasisDense(features=32)(x))
        return OasisDense(features=3)(x)


def images():
    """Three kinds of stripes, with noise."""
    label = jnp.arange(48) % 3
    grid = jnp.arange(8)
    stripes = jnp.stack(
        [
            jnp.sin(grid)[:, None] + 0 * grid,
            jnp.sin(grid)[None] + 0 * grid[:, None],
            jnp.sin(grid[:, None] + grid),
        ]
    )
    noise = jax.random.normal(jax.random.key(0), (48, 8, 8))
    return (stripes[label] + 0.5 * noise)[..., None], label


def test_trains_as_the_documentation_writes_it():
    image, label = images()
    cnn = CNN()
    state = OasisTrainState.create(
        apply_fn=cnn.apply,
        **cnn.init(jax.random.key(0), image),
        tx=optax.chain(optax.clip_by_global_norm(1.0), oasis_adam(1e-2)),
    )

    @jax.jit
    def train_step(state, image, label):
        def loss_fn(variables):
            logits = state.apply_fn(variables, image)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
            return loss, logits

        (loss, logits), grads = state.value_and_grad(loss_fn, has_aux=True)()
        state = state.apply_gradients(grads)
        return state, loss, jnp.mean(jnp.argmax(logits, -1) == label)

    history = []
    for _ in range(80):
        state, loss, accuracy = train_step(state, image, label)
        history.append(float(loss))
    assert history[-1] < 0.3 * history[0] and accuracy > 0.9
    assert set(state.diagnostics.captured_energy) == {
        "OasisDense_0/projection",
        "OasisDense_1/projection",
    }


def test_in_flax_s_own_train_state_it_is_adamw():
    """Without bases `oasis_adam` is an ordinary Optax optimizer."""
    image, label = images()
    cnn = CNN()
    params = cnn.init(jax.random.key(0), image)["params"]

    def run(tx):
        state = train_state.TrainState.create(
            apply_fn=cnn.apply, params=params, tx=optax.chain(optax.clip(1.0), tx)
        )

        @jax.jit
        def train_step(state):
            def loss_fn(params):
                logits = state.apply_fn({"params": params}, image)
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits, label
                ).mean()

            return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))

        for _ in range(5):
            state = train_step(state)
        return state.params

    chex.assert_trees_all_close(
        run(oasis_adam(1e-3)), run(optax.adamw(1e-3)), atol=1e-5
    )
