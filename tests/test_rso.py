"""RSO: an inner loop is Adam on B in Y = X W0 + (X P) B; each loop starts anew."""

from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax import OasisTrainState
from oasis_jax.linen import OasisDense
from oasis_jax.methods import method
from oasis_jax.proximal import ProximalState, proximal

MODEL = nn.Sequential(
    [OasisDense(14, use_bias=False), nn.tanh, OasisDense(5, use_bias=False)]
)
X = jax.random.normal(jax.random.key(1), (32, 10))
Y = jnp.sin(X[:, :5])
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X)
APPLY = jax.jit(MODEL.apply)
NAMES = [f"layers_{i}" for i in (0, 2)]
RATE, B1, B2, K, LOOPS = 1e-2, 0.8, 0.95, 8, 3


def loss_fn(variables, x, y):
    return jnp.mean((MODEL.apply(variables, x) - y) ** 2)


def kernels(state):
    return {name: state.params[name]["kernel"] for name in NAMES}


def held(state):
    bases = state.layout.bases(state.bases)
    return {name: bases[f"{name}/kernel"] for name in NAMES}


def restricted(kernels, bases, b, x):
    """Both layers as X W0 + (X P) B."""

    def layer(name, x):
        return x @ kernels[name] + (x @ bases[name]) @ b[name]

    return layer(NAMES[1], jnp.tanh(layer(NAMES[0], x)))


@pytest.fixture(scope="module")
def runs():
    """Lazily, by `kind` and `proximal`: the states of a run, the first one included."""
    made = {}

    def run(kind, strength):
        if (kind, strength) not in made:
            recipe = method(
                "rso", pattern=".", rank=4, interval=K, kind=kind, proximal=strength
            )
            create = partial(
                OasisTrainState.create,
                apply_fn=MODEL.apply,
                tx=recipe.optimizer(RATE, b1=B1, b2=B2, weight_decay=0.0),
                rules=recipe.rules,
            )
            state = jax.jit(lambda v: create(**v))(VARIABLES)

            @jax.jit
            def step(state):
                _, grads = state.value_and_grad(loss_fn)(X, Y)
                return state.apply_gradients(grads)

            states = [state]
            for _ in range(LOOPS * K):
                states.append(step(states[-1]))
            assert step._cache_size() == 1
            made[kind, strength] = states
        return made[kind, strength]

    return run


CASES = pytest.mark.parametrize(
    "kind, strength",
    [
        ("gaussian", None),
        ("haar", None),
        ("gaussian", 0.5),
        ("haar", 0.05),
    ],
)


@CASES
def test_an_inner_loop_is_adam_on_b(kind, strength, runs):
    """Every step of every loop, to 1e-5; the proximal term is part of the loss."""
    states = runs(kind, strength)
    adam = optax.adam(RATE, B1, B2)

    def objective(b, start, p):
        loss = jnp.mean((restricted(start, p, b, X) - Y) ** 2)
        if strength is None:
            return loss
        return loss + sum(jnp.sum(a**2) for a in b.values()) / (2 * strength)

    @jax.jit
    def step(b, moments, start, p):
        updates, moments = adam.update(jax.grad(objective)(b, start, p), moments)
        return optax.apply_updates(b, updates), moments

    for loop in range(LOOPS):
        first = states[loop * K]
        start, p = kernels(first), held(first)
        b = {name: jnp.zeros((4, start[name].shape[-1])) for name in NAMES}
        moments = adam.init(b)
        for k in range(1, K + 1):
            b, moments = step(b, moments, start, p)
            got = kernels(states[loop * K + k])
            for name in NAMES:
                expected = start[name] + p[name] @ b[name]
                np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-5)
        # Far enough that the tolerance means something.
        assert max(jnp.abs(a).max() for a in b.values()) > 5e-3
        # The merged weights are the same function.
        np.testing.assert_allclose(
            APPLY({"params": states[(loop + 1) * K].params}, X),
            restricted(start, p, b, X),
            atol=2e-5,
        )


@CASES
def test_a_new_basis_after_every_loop(kind, strength, runs):
    """Bit-equal before, of the asked kind, and unrelated to the old one after."""
    states = runs(kind, strength)
    for step, (before, after) in enumerate(pairwise(states)):
        for name in NAMES:
            old, new = held(before)[name], held(after)[name]
            if (step + 1) % K:
                np.testing.assert_array_equal(old, new)
            else:
                assert jnp.abs(old - new).max() > 0.1
            assert after.diagnostics.motion[f"{name}/projection"] == pytest.approx(
                0, abs=0 if (step + 1) % K else np.inf
            )
    gram = held(states[K])["layers_0"].T @ held(states[K])["layers_0"]
    orthonormal = bool(jnp.abs(gram - jnp.eye(4)).max() < 1e-5)
    assert orthonormal == (kind == "haar")


@CASES
def test_each_loop_starts_from_zero(kind, strength, runs):
    """Moments, B and the ages that correct their bias; none of them in between."""
    for step, state in enumerate(runs(kind, strength)):
        fresh = step % K == 0
        inner = state.opt_state[0]
        shifts = []
        if strength is not None:
            assert isinstance(inner, ProximalState)
            shifts, inner = list(inner.shift.values()), inner.inner
        ages = jax.tree.leaves(inner.age)
        assert [int(age) for age in ages] == [step % K] * 2
        moments = jax.tree.leaves((inner.mu, inner.nu))
        assert len(shifts) == (0 if strength is None else 2)
        for leaf in [*moments, *shifts]:
            assert bool(leaf.any()) != fresh


def test_b_is_what_the_weights_moved_by(runs):
    """W = W0 + P B at every step, with B as the proximal term has it."""
    states = runs("gaussian", 0.5)
    for step in range(1, K):
        state = states[step]
        for name in NAMES:
            b = state.opt_state[0].shift[f"{name}/kernel"]
            moved = kernels(state)[name] - kernels(states[0])[name]
            np.testing.assert_allclose(held(states[0])[name] @ b, moved, atol=1e-6)


def test_a_strong_term_stays_near(runs):
    """The smaller eta, the less the weights move in a loop."""

    def moved(strength):
        states = runs("haar", strength)
        changes = [kernels(states[K])[n] - kernels(states[0])[n] for n in NAMES]
        return sum(jnp.sum(a**2) for a in changes)

    assert moved(0.05) < 0.7 * moved(None)


def test_trains(runs):
    states = runs("gaussian", None)
    losses = [
        float(jnp.mean((APPLY({"params": s.params}, X) - Y) ** 2)) for s in states[::K]
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]


def test_a_schedule_multiplies_b_too():
    """B follows the rate of its step; leaves without a basis get no B."""
    rates = lambda count: jnp.array([1.0, 0.5])[count]  # noqa: E731
    tx = proximal(optax.with_extra_args_support(optax.identity()), rates, 2.0)
    gradients = {"w": jnp.full((2, 3), 4.0), "bias": jnp.ones(3)}
    basis = {"w": jnp.eye(5, 2)}
    state = tx.init(gradients)
    first, state = tx.update(gradients, state, basis=basis)
    second, state = tx.update(gradients, state, basis=basis)
    # B is 0, then -4; the second gradient is 4 - 4 / 2.
    assert (first["w"] == 4).all() and (second["w"] == 2).all()
    assert (state.shift["w"] == -5).all()
    assert (second["bias"] == 1).all() and not state.shift["bias"].any()


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_bad_strength(strength):
    with pytest.raises(ValueError, match=r"strength is .*, expected a positive number"):
        proximal(optax.identity(), 1e-3, strength)
