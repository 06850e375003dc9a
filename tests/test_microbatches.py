"""A batch in parts: what counts in them, and what is cut of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax import OasisTrainState, Oja, Rule, oasis_adam
from oasis_jax.linen import OasisDense
from oasis_jax.microbatches import Part, accumulate, as_mean
from oasis_jax.planning.memory import step_parts
from oasis_jax.trackers import Svd

MODEL = OasisDense(3)
X = jax.random.normal(jax.random.key(1), (8, 6, 4)) * jnp.linspace(0.5, 2, 4)
VARIABLES = MODEL.init(jax.random.key(0), X)


def create(tracker, **rule) -> OasisTrainState:
    rules = [Rule("kernel", 2, tracker, **rule)]
    tx = oasis_adam(1e-3)
    return OasisTrainState.create(apply_fn=MODEL.apply, **VARIABLES, tx=tx, rules=rules)


STATE = create(Oja())
COUNTS = {
    "uneven": (6, 6, 6, 6, 1, 1, 1, 1),
    "a part without any": (3, 6, 2, 1, 0, 0, 0, 0),
    "alike": (4,) * 8,
    "none": (0,) * 8,
}


def masked(counts):
    return {"x": X, "mask": jnp.asarray(np.arange(6) < np.array(counts)[:, None])}


def total_and_count(variables, batch):
    wrong = jnp.mean((MODEL.apply(variables, batch["x"]) - 1) ** 2, axis=-1)
    return jnp.sum(wrong * batch["mask"]), jnp.sum(batch["mask"])


def masked_mean(variables, batch):
    total, count = total_and_count(variables, batch)
    return total / jnp.maximum(count, 1)


def close(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_weighted_parts_are_the_whole_batch(counts, parts):
    batch = masked(counts)
    wanted = STATE.value_and_grad(masked_mean)(batch)
    found = STATE.value_and_grad(total_and_count, accumulate=parts, weighted=True)
    close(found(batch), wanted)


def test_a_mean_of_means_is_another_loss():
    batch = masked(COUNTS["uneven"])
    loss, _ = STATE.value_and_grad(masked_mean)(batch)
    other, _ = STATE.value_and_grad(masked_mean, accumulate=2)(batch)
    assert abs(other - loss) > 0.01 * loss


def test_nothing_counted_is_zero_even_where_it_is_not_finite():
    def poisoned(variables, batch):
        total, count = total_and_count(variables, batch)
        return total + 0 * jnp.log(0 * jnp.sum(variables["params"]["bias"])), count

    for parts in (1, 2):
        grad_fn = STATE.value_and_grad(poisoned, accumulate=parts, weighted=True)
        loss, grads = grad_fn(masked(COUNTS["none"]))
        assert loss == 0
        for leaf in jax.tree.leaves(grads.params):
            np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))


def test_weights_are_constants_and_aux_is_stacked():
    def loss_fn(variables, batch):
        size = jnp.sum(variables["params"]["kernel"] ** 2)
        total, count = total_and_count(variables, batch)
        return (total, count + 0 * size + size), {"count": count}

    def constant(variables, batch):
        weight = jnp.sum(VARIABLES["params"]["kernel"] ** 2)
        total, count = total_and_count(variables, batch)
        return total / (count + weight)

    batch = masked(COUNTS["uneven"])
    grad_fn = STATE.value_and_grad(loss_fn, has_aux=True, weighted=True)
    (loss, aux), grads = grad_fn(batch)
    close((loss, grads), STATE.value_and_grad(constant)(batch))
    assert aux["count"] == 28
    grad_fn = STATE.value_and_grad(loss_fn, has_aux=True, weighted=True, accumulate=2)
    assert grad_fn(batch)[0][1]["count"].tolist() == [24, 4]


@pytest.mark.parametrize("tracker", [Svd(5), Oja(axes="gradient")], ids=str)
def test_bases_come_of_the_same_loss(tracker):
    """Renewed from a weighted loss, in parts or not, as from its mean."""
    batch, state = masked(COUNTS["uneven"]), create(tracker)
    for parts in (1, 2):
        how = dict(accumulate=parts, weighted=True)
        for found, wanted in (
            (
                state.refresh(total_and_count, batch, **how),
                state.refresh(masked_mean, batch),
            ),
            (
                state.warm_start(total_and_count, batch, **how),
                state.warm_start(masked_mean, batch),
            ),
        ):
            for a, b in zip(
                jax.tree.leaves(found.bases), jax.tree.leaves(wanted.bases), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


AMISS = {
    "no pair": (
        lambda v, b: masked_mean(v, b),
        r"returned \(\) \(shapes\), expected a",
    ),
    "three": (lambda v, b: (*total_and_count(v, b), 0), "expected a pair"),
    "not summed": (
        lambda v, b: (total_and_count(v, b)[0], b["mask"]),
        r"the total has shape \(\) and the weight \(\d, 6\), expected two scalars",
    ),
}


@pytest.mark.parametrize("loss_fn, said", AMISS.values(), ids=AMISS)
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_no_total_and_weight(loss_fn, said, parts):
    with pytest.raises(ValueError, match=said):
        grad_fn = STATE.value_and_grad(loss_fn, accumulate=parts, weighted=True)
        grad_fn(masked(COUNTS["alike"]))


# --- What is cut ----------------------------------------------------------------------


def scaled(variables, batch):
    outputs = MODEL.apply(variables, batch["x"])
    return batch.get("factor", 1.0) * jnp.mean(outputs**2)


WHOLE = {
    "a number": {"factor": 3.0},
    "a scalar": {"factor": jnp.float32(3)},
    "NumPy's scalar": {"factor": np.float32(3)},
    "nothing": {"mask": None},
    "a word": {"mode": "train"},
    "a function": {"penalty": jnp.sum},
    "a key": {"key": jax.random.key(3)},
    "keys of rows": {"keys": jax.random.split(jax.random.key(3), 8)},
}


@pytest.mark.parametrize("extra", WHOLE.values(), ids=WHOLE)
def test_what_has_no_axis_goes_to_every_part(extra):
    batch = {"x": X} | extra
    wanted = STATE.value_and_grad(scaled)(batch)
    close(STATE.value_and_grad(scaled, accumulate=4)(batch), wanted)
    close(STATE.refresh(scaled, batch, accumulate=4), STATE)
    micro = step_parts(STATE, scaled, batch, accumulate=4)
    assert micro == step_parts(STATE, scaled, {**batch, "x": X[:2], "keys": None})


def test_a_key_is_folded_with_the_parts_number():
    key = jax.random.key(7)

    def draw(key, x):
        return Part(jnp.mean(x), aux=jax.random.key_data(key))

    whole = accumulate(draw, (key, X), 1)
    np.testing.assert_array_equal(whole.aux, jax.random.key_data(key))
    parts = accumulate(draw, (key, X), 2)
    folded = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(2)]
    np.testing.assert_array_equal(parts.aux, folded)


def test_arrays_that_disagree_are_named():
    batch = {"x": X, "table": jnp.ones((5, 2))}
    close(STATE.value_and_grad(scaled)(batch), STATE.value_and_grad(scaled)({"x": X}))
    said = (
        "argument 0/table has a batch of 5, and 0/x one of 8; all arrays are cut into 2"
        " microbatches, so let loss_fn close over what has no batch axis"
    )
    with pytest.raises(ValueError, match=said):
        STATE.value_and_grad(scaled, accumulate=2)(batch)


def test_a_pair_is_told_from_an_aux():
    pair = (jnp.float32(6), 3)
    assert as_mean((pair, "aux"), weighted=True)[0] == 2
    assert as_mean((pair[0], "aux"))[0] == 6
    assert as_mean(pair[0])[1:] == (None, None)
