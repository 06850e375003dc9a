"""PRAC: unbiased, with the variance it states, and its basis where the SVD has it."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax import OasisTrainState, Rule
from oasis_jax.bases import draw
from oasis_jax.dense import projected_dense
from oasis_jax.lift import lift
from oasis_jax.linen import shared_dense
from oasis_jax.methods import method
from oasis_jax.models import llama
from oasis_jax.planning.memory import saved_activations
from oasis_jax.subspace import COLLECTION
from oasis_jax.trackers import WARM_START, Complement, Svd

DRAWS = 2_000
SPLITS = {
    # tokens, n_in, rank, r1
    "half and half": (7, 12, 6, 3),
    "mostly principal": (9, 12, 8, 6),
    "mostly random, few tokens": (4, 16, 8, 2),
    "nothing left out": (5, 8, 8, 3),
}


def activations(tokens, n, values=None, seed=0):
    """X = U diag(values) V^T with a given spectrum, 0.7^i by default."""
    rng = np.random.default_rng(seed)
    size = min(tokens, n)
    u, v = (np.linalg.qr(rng.normal(size=(k, size)))[0] for k in (tokens, n))
    values = 0.7 ** np.arange(size) if values is None else np.asarray(values)
    return np.float32(3 * u * values[:size] @ v.T)


def svd(x, rank):
    """The leading right singular vectors, in float64."""
    return np.linalg.svd(np.float64(x), full_matrices=False)[2][:rank].T


def angle(a, b):
    """The largest principal angle between two spans."""
    a, b = (np.linalg.qr(np.float64(q))[0] for q in (a, b))
    return np.arcsin(min(1, np.linalg.norm(a - b @ (b.T @ a), 2)))


def prac(share, **kw):
    return Complement(Svd(10), share, 5, **{"unbiased": True} | kw)


def drawn(x, rank, r1, draws=DRAWS):
    """Q1 of the data, and many P, each with a Q2 that the tracker has drawn anew."""
    tracker, q1 = prac(r1 / rank), np.float32(svd(x, r1))
    keys = jax.random.split(jax.random.key(3), draws)
    old = jnp.pad(q1, ((0, 0), (0, rank - r1)))
    seen = x.T @ (x @ old) / len(x)
    redrawn = jax.jit(jax.vmap(lambda key: tracker.update(old, seen, 4, key)))
    p = np.asarray(redrawn(keys))
    assert np.abs(p[..., :r1] - q1).max() < 1e-6
    return q1, p


def unbiased(samples, expected):
    """Whether the mean is within 4 standard errors of what is expected."""
    samples = np.float64(samples)
    error = samples.std(0) / np.sqrt(len(samples))
    scale = 1e-5 * np.abs(expected).max()  # of rounding
    return (np.abs(samples.mean(0) - expected) <= 4 * error + scale).all()


@pytest.fixture(scope="module")
def draws():
    made = {}

    def get(name):
        if name not in made:
            tokens, n, rank, r1 = SPLITS[name]
            x = activations(tokens, n)
            made[name] = (x, *drawn(x, rank, r1))
        return made[name]

    return get


@pytest.mark.parametrize("name", SPLITS)
def test_reconstruction_is_unbiased(name, draws):
    """The mean of X P P^T is X, and its variance ((n - r1) / r2 - 1) |X - X Q1 Q1^T|^2."""
    x, q1, p = draws(name)
    _, n, rank, r1 = SPLITS[name]
    rebuilt = (x @ p) @ p.swapaxes(-1, -2)
    assert unbiased(rebuilt, x)
    variance = np.mean(np.sum(np.float64(rebuilt - x) ** 2, axis=(-2, -1)))
    left_out = np.sum(np.float64(x - x @ q1 @ q1.T) ** 2)
    bound = ((n - r1) / (rank - r1) - 1) * left_out
    np.testing.assert_allclose(variance, bound, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("name", SPLITS)
def test_every_draw_is_orthogonal(name, draws):
    """P^T P is diag(1, c^2) each time, also where little is left to draw from."""
    _, n, rank, r1 = SPLITS[name]
    _, _, p = draws(name)
    c = np.sqrt((n - r1) / (rank - r1))
    lengths = np.r_[np.ones(r1), np.full(rank - r1, c)]
    gram = p.swapaxes(-1, -2) @ p
    assert np.abs(gram - np.diag(lengths**2)).max() < 1e-4 * c**2


@pytest.mark.parametrize("name", SPLITS)
def test_weight_gradients_are_unbiased(name, draws):
    """The mean of P C over Q2 is X^T dY as plain autodiff has it, for two kernels."""
    x, _, p = draws(name)
    rng = np.random.default_rng(1)
    kernels = [np.float32(rng.normal(size=(x.shape[1], m))) for m in (3, 2)]
    dys = [np.float32(rng.normal(size=(len(x), m))) for m in (3, 2)]

    def loss(outputs):
        return sum(jnp.vdot(y, dy) for y, dy in zip(outputs, dys, strict=True))

    @jax.jit
    @jax.vmap
    def lifted(p):
        slots = tuple(jnp.zeros((p.shape[-1], k.shape[-1])) for k in kernels)
        c = jax.grad(lambda s: loss(projected_dense(x, kernels, s, p)))(slots)
        return [lift(p, one) for one in c]

    expected = jax.grad(lambda ks: loss([x @ k for k in ks]))(kernels)
    for samples, gradient in zip(lifted(p), expected, strict=True):
        assert unbiased(samples, gradient)


def test_principal_only_is_biased_and_random_only_noisier(draws):
    """At equal rank, on activations with a spectrum."""
    x, _, p = draws("half and half")
    n, rank = p.shape[-2:]
    keys = jax.random.split(jax.random.key(5), DRAWS)
    random = jax.vmap(lambda key: draw(key, (n, rank)))(keys) * np.sqrt(n / rank)

    def errors(p):
        rebuilt = (x @ p) @ np.swapaxes(p, -1, -2)
        squares = np.sum(np.float64(rebuilt - x) ** 2, axis=(-2, -1))
        return unbiased(rebuilt, x), squares.mean()

    s = jax.jit(lambda p: Svd().update(p, x.T @ (x @ p), WARM_START, None))
    principal = draw(jax.random.key(0), (n, rank))
    for _ in range(Svd.passes):
        principal = s(principal)
    assert not errors(np.asarray(principal)[None])[0]
    centred, noise = errors(np.asarray(random))
    ours_centred, ours = errors(p)
    assert centred and ours_centred
    assert ours < 0.5 * noise


SPECTRA = {
    # tokens, n_in, rank, singular values
    "geometric": (64, 24, 6, 0.6 ** np.arange(24)),
    "a gap after the rank": (64, 24, 6, np.r_[np.ones(6), 0.2 * np.ones(18)]),
    "one outlier": (64, 24, 6, np.r_[100, np.ones(5), 0.1 * np.ones(18)]),
    "fewer tokens than features": (12, 40, 5, 0.5 ** np.arange(12)),
    # A column with a millionth of the leading energy is refined like any other.
    "steep": (64, 24, 6, 0.3 ** np.arange(24)),
    "one massive outlier": (64, 24, 6, np.r_[1000, np.ones(5), 0.1 * np.ones(18)]),
}


class Layer(nn.Module):
    """Two kernels on one input."""

    @nn.compact
    def __call__(self, x):
        return shared_dense(self, "kv", x, {"k": 5, "v": 3}, use_bias=False)


LAYER, SGD = Layer(), optax.sgd(1e-2)
APPLY = LAYER.apply  # equal to itself only


def layer_loss(variables, x):
    k, v = LAYER.apply(variables, x)
    return jnp.mean(k**2) + jnp.mean(jnp.sin(v))


# One compilation for equal shapes.
refreshed = jax.jit(lambda state, x: state.refresh(layer_loss, x))


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def create(apply_fn, variables, tracker, rank, tx=SGD):
    rules = [Rule(".", rank, tracker, gradient="full")]
    return OasisTrainState.create(apply_fn=apply_fn, **variables, tx=tx, rules=rules)


def layer_state(x, tracker, rank):
    variables = jax.jit(LAYER.init)(jax.random.key(0), x)
    return create(APPLY, variables, tracker, rank)


def bases(state):
    """By kernel path."""
    return state.layout.bases(state.bases)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("tracker", ["svd", "complement"])
def test_refresh_finds_what_the_svd_finds(name, tracker):
    """Principal angles below 1e-2, from a train state's refresh and its passes."""
    tokens, n, rank, values = SPECTRA[name]
    x = activations(tokens, n, values)
    whole = rank if tracker == "svd" else 2 * rank
    state = layer_state(x, Svd() if tracker == "svd" else prac(0.5), whole)
    state = refreshed(state, x)
    q1 = bases(state)["k/kernel"][:, :rank]
    assert angle(q1, svd(x, rank)) < 1e-2


def test_columns_are_in_order():
    """Within the span they are the singular vectors themselves, up to a sign."""
    x = activations(64, 24, 0.6 ** np.arange(24))
    state = refreshed(layer_state(x, Svd(), 6), x)
    overlap = np.abs(bases(state)["k/kernel"].T @ svd(x, 6))
    np.testing.assert_allclose(overlap, np.eye(6), atol=1e-2)


@pytest.mark.parametrize("interval, random_interval", [(6, 4), (4, 100)])
def test_intervals(interval, random_interval):
    """Q1 moves with the batch of a multiple of `interval` only, Q2 also after every
    `random_interval` steps, and is orthogonal to Q1 at all times."""
    tracker = Complement(Svd(interval), 0.5, random_interval, unbiased=True)
    batches = [activations(32, 16, 0.5 ** np.arange(16), seed=i) for i in range(9)]
    state = layer_state(batches[0], tracker, 6)

    @jax.jit
    def step(state, x):
        renewed = state.refresh(layer_loss, x)
        _, grads = renewed.value_and_grad(layer_loss)(x)
        return renewed, renewed.apply_gradients(grads)

    def basis(state):
        p = np.asarray(bases(state)["k/kernel"])
        gram = p.T @ p
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-4
        return p[:, :3], p[:, 3:]

    for i, x in enumerate(batches):
        before = basis(state)
        renewed, state = step(state, x)
        used, after = basis(renewed), basis(state)
        if i % interval == 0:
            assert angle(used[0], svd(x, 3)) < 1e-2 < angle(used[0], before[0])
            assert angle(used[1], before[1]) > 1e-2
        else:
            np.testing.assert_array_equal(used, before)
        if (i + 1) % random_interval == 0:
            np.testing.assert_allclose(used[0], after[0], atol=1e-6)
            assert angle(used[1], after[1]) > 1e-2
        else:
            np.testing.assert_array_equal(used, after)


def test_refresh_in_microbatches_is_that_of_the_whole():
    x = activations(64, 24, 0.5 ** np.arange(24))
    state = layer_state(x, prac(0.5), 12)
    halved = jax.jit(lambda s, x: s.refresh(layer_loss, x, accumulate=2))
    p, halves = (bases(renew(state, x))["k/kernel"] for renew in (refreshed, halved))
    np.testing.assert_allclose(p, halves, atol=1e-4)


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(1e-2), optax.sgd(0.1), optax.adafactor(0.1)],
    ids=["adamw", "sgd", "adafactor"],
)
def test_any_optimizer(tx):
    """What the optimizer sees is P C at full size, and what it says is done."""
    x = activations(64, 16)
    variables = jax.jit(LAYER.init)(jax.random.key(0), x)
    state = create(APPLY, variables, prac(0.5), 10, tx)
    plain, opt_state = state.params, jax.jit(tx.init)(state.params)

    @jax.jit
    def step(state, plain, opt_state):
        state = state.refresh(layer_loss, x)
        loss, grads = state.value_and_grad(layer_loss)(x)
        p = bases(state)
        full = {
            name: {"kernel": p[f"{name}/kernel"] @ leaf["kernel"]}
            for name, leaf in grads.params.items()
        }
        updates, opt_state = tx.update(full, opt_state, plain)
        plain = optax.apply_updates(plain, updates)
        return state.apply_gradients(grads), plain, opt_state, loss

    losses = []
    for i in range(30):
        state, plain, opt_state, loss = step(state, plain, opt_state)
        losses.append(float(loss))
        if i < 3:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                (state.params, state.opt_state),
                (plain, opt_state),
            )
    assert losses[-1] < 0.8 * losses[0] or losses[-1] < losses[0] - 0.01


def test_kernels_on_one_input_save_one_z():
    x = activations(32, 16)
    state = layer_state(x, prac(0.5), 6)
    assert len(state.bases) == 1

    def loss(params, zeros, x):
        return layer_loss({"params": params, COLLECTION: zeros}, x)

    kept = [a.shape for a in saved_activations(loss, state.params, state.probed, x)]
    assert kept.count((32, 6)) == 1 and (32, 16) not in kept


@pytest.mark.parametrize("remat", ["none", "elementwise"])
def test_compressed_norms_and_activations_save_no_width(remat):
    """Under method('prac') a LLaMA keeps fewer (tokens, width) arrays per layer."""
    config = llama.LlamaConfig(50, 32, 48, 2, 2, 1, head_size=10, remat=remat)
    model = llama.Llama(config)
    tokens = jnp.zeros((3, 11), jnp.int32)

    def loss_fn(variables):
        return jnp.mean(llama.token_losses(model.apply(variables, tokens), tokens))

    def counts(nonlinear):
        recipe = method("prac", rank=6, nonlinear=nonlinear)

        def make():
            return OasisTrainState.create(
                apply_fn=model.apply,
                **model.init(jax.random.key(0), tokens),
                tx=recipe.optimizer(1e-3),
                rules=recipe.rules,
            )

        state = jax.eval_shape(make)
        kept = saved_activations(
            lambda params, zeros: loss_fn({"params": params, COLLECTION: zeros}),
            state.params,
            jax.eval_shape(lambda state: state.probed, state),
        )
        shapes = [a.shape for a in kept]
        return [shapes.count((2, 3, 11, n)) for n in (config.width, config.hidden)]

    width, hidden = counts(0)
    assert width > 0 and hidden > 0
    assert counts(4) == [0, 0]


def test_options_reach_the_trackers():
    recipe = method("prac", interval=7, random_interval=3, share=0.25, nonlinear=0.1)
    kernels, inputs = recipe.rules
    expected = Complement(Svd(7), 0.25, 3, unbiased=True)
    assert kernels.tracker == inputs.tracker == expected
    assert (kernels.gradient, inputs.inputs, inputs.rank) == ("full", True, 0.1)
    assert len(method("prac", nonlinear=0).rules) == 1
