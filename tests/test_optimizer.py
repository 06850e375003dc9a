"""Adam in coordinates: against `optax.adamw`, against float64, and Optax's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax import oasis_adam, scale_by_oasis_adam
from oasis_jax.bases import motion, orthonormalise

W, B = (8, 5), (5,)


def params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return {
        "dense": {"kernel": jax.random.normal(keys[0], W).astype(dtype)},
        "bias": jax.random.normal(keys[1], B).astype(dtype),
    }


def slots(rank=3):
    """The tree of the gradients' shapes, as the train state hands it to `init`."""
    return {"dense": {"kernel": jnp.zeros((rank, 5))}, "bias": jnp.zeros(B)}


def grads(i, rank=3):
    keys = jax.random.split(jax.random.key(i))
    return {
        "dense": {"kernel": jax.random.normal(keys[0], (rank, 5))},
        "bias": jax.random.normal(keys[1], B),
    }


def basis(i=0, rank=3):
    return orthonormalise(jax.random.normal(jax.random.key(100 + i), (8, rank)))


NAME = "dense/kernel"


def close(a, b, **kw):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


@pytest.mark.parametrize("projected", [False, True], ids=["full", "P = I"])
def test_twenty_steps_equal_adamw(projected):
    ours = oasis_adam(1e-2, weight_decay=0.1)
    theirs = optax.adamw(1e-2, weight_decay=0.1)
    p, q = params(), params()
    state, reference = ours.init(p), theirs.init(q)
    extra = {"basis": {NAME: jnp.eye(8)}, "motion": {NAME: jnp.eye(8)}}
    for i in range(20):
        g = grads(i, rank=8)
        updates, state = ours.update(g, state, p, **(extra if projected else {}))
        p = optax.apply_updates(p, updates)
        updates, reference = theirs.update(g, reference, q)
        q = optax.apply_updates(q, updates)
    close(p, q, atol=1e-5)


@pytest.mark.parametrize("transport", ["carry", "keep", "reset"])
def test_moving_basis_in_float64(transport):
    """A transcription with explicit loops over what happens to one projected leaf."""
    b1, b2, eps, lr, decay, scale = 0.8, 0.95, 1e-6, 0.1, 0.02, 0.5
    tx = oasis_adam(lr, b1, b2, eps, decay, scale=scale, transport=transport)
    p, state = params(), tx.init(slots())
    w = np.asarray(p["dense"]["kernel"], np.float64)
    m, v, t = np.zeros((3, 5)), np.zeros((3, 5)), 0
    for i in range(6):
        moves = i != 2  # once, the basis stands still
        old, new = basis(i), basis(i + 1) if moves else basis(i)
        c = np.asarray(grads(i)["dense"]["kernel"], np.float64)
        updates, state = tx.update(
            grads(i), state, p, basis={NAME: old}, motion={NAME: motion(new, old)}
        )
        p = optax.apply_updates(p, updates)

        old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
        m, v, t = b1 * m + (1 - b1) * c, b2 * v + (1 - b2) * c**2, t + 1
        mh, vh = m / (1 - b1**t), v / (1 - b2**t)
        w = w - lr * (scale * old @ (mh / (np.sqrt(vh) + eps)) + decay * w)
        if moves and transport == "carry":
            r = new.T @ old
            v = (1 - b2**t) * ((r * r) @ np.maximum(vh - mh**2, 0) + (r @ mh) ** 2)
            m = r @ m
        elif moves and transport == "reset":
            m, v, t = 0 * m, 0 * v, 0
        np.testing.assert_allclose(p["dense"]["kernel"], w, atol=2e-5)


def test_stacked_layers_equal_a_loop():
    tx = scale_by_oasis_adam()
    pairs = [({"w": jnp.ones(W)}, {"w": grads(i)["dense"]["kernel"]}) for i in range(3)]
    motions = [motion(basis(i + 1), basis(i)) for i in range(3)]

    def stack(*trees):
        return jax.tree.map(lambda *a: jnp.stack(a), *trees)

    p, g = (stack(*column) for column in zip(*pairs, strict=True))
    state = tx.init(g)
    alone = [tx.init(pair[1]) for pair in pairs]
    for _ in range(3):
        extra = {
            "basis": {"w": jnp.stack([basis(i) for i in range(3)])},
            "motion": {"w": jnp.stack(motions)},
        }
        updates, state = tx.update(g, state, p, **extra)
        for i in range(3):
            one = {"basis": {"w": basis(i)}, "motion": {"w": motions[i]}}
            expected, alone[i] = tx.update(pairs[i][1], alone[i], pairs[i][0], **one)
            close(updates["w"][i], expected["w"], atol=1e-6)


def one_update(tx, **extra):
    state = tx.init(slots())
    return tx.update(grads(0), state, params(), basis={NAME: basis()}, **extra)


def test_unknown_extras_are_ignored():
    close(one_update(oasis_adam(1e-2), loss=1.0)[0], one_update(oasis_adam(1e-2))[0])


def test_schedule_equals_constant():
    constant = one_update(oasis_adam(1e-2))[0]
    close(one_update(oasis_adam(lambda count: 1e-2))[0], constant)


def test_chain_with_clipping():
    """The clip sees the projected norm."""
    norm = optax.tree.norm(grads(0))
    tx = optax.chain(optax.clip_by_global_norm(float(norm) / 4), oasis_adam(1e-2))
    _, state = one_update(tx)
    expected = jax.tree.map(lambda g: 0.1 * g / 4, grads(0))
    close(state[1][0].mu, expected, rtol=1e-5)


def test_inject_hyperparams():
    tx = optax.inject_hyperparams(oasis_adam)(learning_rate=1e-2, weight_decay=0.1)
    expected, _ = one_update(oasis_adam(1e-2, weight_decay=0.1))
    updates, state = one_update(tx)
    close(updates, expected, rtol=1e-4)  # 1 - b1 is formed in float32 there
    assert state.hyperparams["learning_rate"] == np.float32(1e-2)


def test_partition():
    tx = optax.partition(
        {"ours": oasis_adam(1e-2), "theirs": optax.sgd(1.0)},
        {"dense": {"kernel": "ours"}, "bias": "theirs"},
    )
    updates, _ = one_update(tx)
    close(updates["dense"], one_update(oasis_adam(1e-2))[0]["dense"])
    close(updates["bias"], -grads(0)["bias"])


def test_masked_decay():
    mask = {"dense": {"kernel": True}, "bias": False}
    updates, _ = one_update(oasis_adam(1.0, weight_decay=1.0, mask=mask))
    plain, _ = one_update(oasis_adam(1.0, weight_decay=0.0))
    close(updates["bias"], plain["bias"])
    change = updates["dense"]["kernel"] - plain["dense"]["kernel"]
    close(change, -params()["dense"]["kernel"], atol=1e-6)


@pytest.mark.parametrize("transport", ["carry", "reset"])
def test_map_params(transport):
    tx = optax.chain(optax.clip(1.0), oasis_adam(1e-2, transport=transport))
    state = tx.init(slots())
    marked = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert marked[1][0].count == 0
    close(marked[1][0].mu, jax.tree.map(jnp.ones_like, slots()))


def test_dtypes():
    tx = oasis_adam(1e-2, mu_dtype=jnp.bfloat16)
    state = tx.init(slots())
    p = params(jnp.bfloat16)
    updates, state = tx.update(grads(0), state, p, basis={NAME: basis()})
    assert {a.dtype for a in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in jax.tree.leaves(state[0].mu)} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in jax.tree.leaves(state[0].nu)} == {jnp.dtype("float32")}


def test_second_call_does_not_recompile():
    tx = oasis_adam(1e-2)
    update = jax.jit(tx.update)
    state, p = tx.init(slots()), params()
    for i in range(3):
        r = motion(basis(i + 1), basis(i))
        _, state = update(grads(i), state, p, basis={NAME: basis(i)}, motion={NAME: r})
    assert update._cache_size() == 1


def test_stable_under_cond():
    tx = oasis_adam(1e-2)
    state, p = tx.init(slots()), params()

    def update(state):
        return tx.update(grads(0), state, p, basis={NAME: basis()})[1]

    state = jax.lax.cond(True, update, lambda s: s, state)
    assert state[0].count == 1


def test_zero_gradients_stay_finite():
    tx = oasis_adam(1e-2)
    zero = jax.tree.map(jnp.zeros_like, slots())
    updates, _ = tx.update(
        zero,
        tx.init(slots()),
        params(),
        basis={NAME: basis()},
        motion={NAME: jnp.eye(3)},
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "gradient, extra, sentence",
    [
        (
            (4, 5),
            {},
            r"dense/kernel: gradient has shape \(4, 5\), its moments \(3, 5\)",
        ),
        ((3, 5), {}, r"expected \(8, 5\) .*no basis was given"),
        ((3, 5), {"basis": {NAME: jnp.eye(8, 4)}}, r"expected \(4, 5\)"),
    ],
    ids=["other rank", "no basis", "other basis"],
)
def test_shape_errors_name_the_parameter(gradient, extra, sentence):
    tx = oasis_adam(1e-2)
    g = {"dense": {"kernel": jnp.ones(gradient)}, "bias": jnp.ones(B)}
    with pytest.raises(ValueError, match=sentence):
        tx.update(g, tx.init(slots()), params(), **extra)


def test_unknown_transport():
    with pytest.raises(ValueError, match=r"transport is 'teleport', expected one of"):
        oasis_adam(1e-2, transport="teleport")
