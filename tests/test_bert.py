"""The encoder: parameters, padding, positions, levels; its numbers are in test_hf.py."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax import OasisTrainState
from oasis_jax.methods import METHODS, method
from oasis_jax.models.bert import Bert, BertConfig
from oasis_jax.paths import flatten_paths

SMALL = BertConfig(32, 16, 24, layers=2, heads=2, positions=12, labels=3)
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 1, 32)
LABELS = jnp.array([0, 2])
PADDED = jnp.pad(TOKENS, ((0, 0), (0, 5)))
SEGMENTS = (PADDED > 0).astype(jnp.int32)


def started(name="oasis", config=SMALL):
    recipe = method(name, rank=None if name == "velora" else 0.5)
    model, tx = Bert(config), recipe.optimizer(1e-2)

    @jax.jit  # many small operations, compiled once
    def made():
        return OasisTrainState.create(
            apply_fn=model.apply,
            **model.init(jax.random.key(0), TOKENS),
            tx=tx,
            rules=recipe.rules,
        )

    return made()


def loss_of(config=SMALL, tokens=TOKENS, segments=None):
    def loss(variables):
        logits = Bert(config).apply(variables, tokens, segments)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(2), LABELS])

    return loss


def gradients(state, loss):
    return jax.jit(lambda s: s.value_and_grad(loss)())(state)


def test_parameters_are_those_of_plain_layers():
    shapes = {p: a.shape for p, a in flatten_paths(started().params).items()}
    linear = {"q_proj": (16, 16), "k_proj": (16, 16), "v_proj": (16, 16)}
    linear = {f"attn/{k}": v for k, v in (linear | {"o_proj": (16, 16)}).items()}
    linear |= {"mlp/up_proj": (16, 24), "mlp/down_proj": (24, 16)}
    norms = {
        f"{name}/{part}": shape
        for name, shape in {
            "embed/norm": (16,),
            "blocks/attn_norm": (2, 16),
            "blocks/mlp_norm": (2, 16),
        }.items()
        for part in ("scale", "bias")
    }
    assert shapes == {
        "embed/word/embedding": (32, 16),
        "embed/position/embedding": (12, 16),
        "embed/type/embedding": (2, 16),
        **{f"blocks/{name}/kernel": (2, *shape) for name, shape in linear.items()},
        **{f"blocks/{name}/bias": (2, shape[1]) for name, shape in linear.items()},
        **norms,
        "pooler/kernel": (16, 16),
        "pooler/bias": (16,),
        "classifier/kernel": (16, 3),
        "classifier/bias": (3,),
    }


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, labels=0)])
def test_padding_changes_nothing(config):
    apply, params = jax.jit(Bert(config).apply), started().params
    alone = apply({"params": params}, TOKENS)
    padded = apply({"params": params}, PADDED, SEGMENTS)
    if not config.labels:
        padded = padded[:, :7]
    np.testing.assert_allclose(padded, alone, atol=1e-5)


def test_no_basis_follows_padding():
    """Coordinates and observations of a padded batch are those of its text alone."""
    state = started()
    _, alone = gradients(state, loss_of())
    _, padded = gradients(state, loss_of(tokens=PADDED, segments=SEGMENTS))
    share = 12 / 7  # observations are means over all tokens
    scaled = jax.tree.map(lambda a: a * share, padded.observations)
    chex.assert_trees_all_close(padded.params, alone.params, rtol=1e-3, atol=1e-5)
    for path, place in flatten_paths(alone.observations).items():
        if path.endswith("energy_gradient"):
            np.testing.assert_allclose(
                flatten_paths(scaled)[path], place, rtol=1e-3, atol=1e-5, err_msg=path
            )


@pytest.mark.parametrize("offset", [0, 2])
def test_packed_texts_are_texts_alone(offset):
    """Logits and gradients of two texts in a row are those of a row each."""
    config = dataclasses.replace(SMALL, position_offset=offset)
    state = started("adamw", config)
    params = jax.tree.map(lambda a: 5 * a, state.params)  # attention that is felt
    first, second = TOKENS[0, :4], TOKENS[1, :6]

    def loss(packed):
        def logits(params):
            apply = lambda *inputs: Bert(config).apply({"params": params}, *inputs)  # noqa: E731
            if not packed:
                return jnp.concatenate([apply(first[None]), apply(second[None])])
            row = jnp.concatenate([first, second, jnp.zeros(2, jnp.int32)])
            segments = jnp.array(np.repeat([1, 2, 0], [4, 6, 2]))
            return apply(row[None], segments[None], None, jnp.array([[0, 4]]))[0]

        return lambda params: (jnp.sum(jnp.sin(logits(params))), logits(params))

    (_, one), wanted = jax.jit(jax.value_and_grad(loss(False), has_aux=True))(params)
    (_, other), got = jax.jit(jax.value_and_grad(loss(True), has_aux=True))(params)
    assert jnp.abs(one[0] - one[1]).max() > 1e-2
    np.testing.assert_allclose(other, one, atol=1e-4)
    chex.assert_trees_all_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_types_and_positions_tell_tokens_apart():
    params = jax.tree.map(lambda a: 20 * a, started().params)  # far from uniform
    apply = jax.jit(lambda *inputs: Bert(SMALL).apply({"params": params}, *inputs))
    plain = apply(TOKENS)
    assert jnp.abs(apply(TOKENS, None, jnp.ones_like(TOKENS)) - plain).max() > 1e-4
    swapped = TOKENS[:, jnp.array([0, 2, 1, 3, 4, 5, 6])]
    assert jnp.abs(apply(swapped) - plain).max() > 1e-4


def test_roberta_counts_positions_of_text():
    """Padding in front shifts nothing: positions count what is not padding."""
    config = dataclasses.replace(SMALL, position_offset=2, pad=1)
    tokens = jnp.where(TOKENS == 1, 2, TOKENS)
    params = started(config=config).params
    assert params["embed"]["position"]["embedding"].shape == (14, 16)
    embedded = {
        side: jax.jit(Bert(dataclasses.replace(config, labels=0)).apply)(
            {"params": params}, padded, (padded != 1).astype(jnp.int32)
        )
        for side, padded in {
            "left": jnp.pad(tokens, ((0, 0), (5, 0)), constant_values=1),
            "right": jnp.pad(tokens, ((0, 0), (0, 5)), constant_values=1),
        }.items()
    }
    np.testing.assert_allclose(
        embedded["left"][:, 5:], embedded["right"][:, :7], atol=1e-5
    )


@pytest.mark.parametrize("name", ["galore", "osd", "ldadam", "muon", "optax-galore"])
def test_stacked_biases_are_no_matrices(name):
    """Biases of scanned layers are trained as those of layers one by one."""
    recipe = method(name, rank=2)
    names = ("attn/q_proj", "mlp/up_proj")
    draw = np.random.default_rng(0).normal
    stack = {
        f"{n}/{leaf}": jnp.array(draw(size=shape), jnp.float32)
        for n in names
        for leaf, shape in {"kernel": (4, 8, 6), "bias": (4, 6)}.items()
    }
    single = {
        f"{path}/{i}" if path.endswith("kernel") else f"{i}/{path}": leaf[i]
        for path, leaf in stack.items()
        for i in range(4)
    }
    updates = []
    for params in (stack, single):
        tx = recipe.optimizer(1e-2)
        got, _ = jax.jit(tx.update)(params, tx.init(params), params)
        updates.append(got)
    together, alone = updates
    for path in names:
        for i in range(4):
            np.testing.assert_allclose(
                together[f"{path}/bias"][i], alone[f"{i}/{path}/bias"], rtol=1e-5
            )


@pytest.mark.parametrize("remat", ["none", "mlp"])
def test_levels_change_no_gradient(remat):
    state = started()
    expected = gradients(state, loss_of())
    got = gradients(state, loss_of(dataclasses.replace(SMALL, remat=remat)))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)


# VeLoRA stands for PRAC, too, which renews bases as it does and compiles for a minute.
QUICK = ("adamw", "oasis", "velora", "lora")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in METHODS
    ],
)
def test_every_method_trains_it(name):
    state, loss = started(name), loss_of(tokens=PADDED, segments=SEGMENTS)

    @jax.jit
    def step(state):
        state = state.refresh(loss)
        value, grads = state.value_and_grad(loss)()
        return state.apply_gradients(grads), value

    losses = []
    for _ in range(8):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < losses[0] and int(state.diagnostics.skipped) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: dataclasses.replace(SMALL, heads=3),
            "width 16 does not divide into 3 heads",
        ),
        (
            lambda: dataclasses.replace(SMALL, remat="some"),
            "remat is 'some', expected one of",
        ),
        (
            lambda: Bert(SMALL).init(jax.random.key(0), jnp.zeros((1, 13), jnp.int32)),
            "a sequence has 13 tokens, and the model only 12 positions",
        ),
    ],
)
def test_clear_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
