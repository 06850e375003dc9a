"""LLaMA: scan, recomputation, attention and presets."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oasis_jax import OasisTrainState, Rule, oasis_adam
from oasis_jax.attention import attention
from oasis_jax.methods import LINEAR
from oasis_jax.models import llama
from oasis_jax.models.llama import (
    Block,
    Llama,
    LlamaConfig,
    RMSNorm,
    RopeScaling,
    token_losses,
)
from oasis_jax.paths import flatten_paths

SMALL = LlamaConfig(32, 16, 40, 3, 4, 2)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)
SEGMENTS = jnp.array([[1] * 7 + [2] * 5, [1] * 12])


def build(config=SMALL):
    model = Llama(config)
    return model, model.init(jax.random.key(0), TOKENS)


def loss_of(model):
    def loss(variables):
        logits = model.apply(variables, TOKENS, SEGMENTS)
        return jnp.mean(token_losses(logits, jnp.roll(TOKENS, -1, axis=1)))

    return loss


def projected(config=SMALL):
    model, variables = build(config)
    return model, OasisTrainState.create(
        apply_fn=model.apply,
        **variables,
        tx=optax.chain(oasis_adam(1e-2)),
        rules=[Rule(LINEAR, 0.5)],
    )


def test_parameters_are_those_of_plain_layers():
    _, variables = build()
    shapes = {p: a.shape for p, a in flatten_paths(variables["params"]).items()}
    assert shapes == {
        "embed/embedding": (32, 16),
        "blocks/attn_norm/scale": (3, 16),
        "blocks/attn/q_proj/kernel": (3, 16, 16),
        "blocks/attn/k_proj/kernel": (3, 16, 8),
        "blocks/attn/v_proj/kernel": (3, 16, 8),
        "blocks/attn/o_proj/kernel": (3, 16, 16),
        "blocks/mlp_norm/scale": (3, 16),
        "blocks/mlp/gate_proj/kernel": (3, 16, 40),
        "blocks/mlp/up_proj/kernel": (3, 16, 40),
        "blocks/mlp/down_proj/kernel": (3, 40, 16),
        "norm/scale": (16,),
        "lm_head/kernel": (16, 32),
    }


@pytest.mark.parametrize("remat", ["none", "block"])
def test_recomputation_changes_nothing_but_memory(remat):
    model, state = projected()
    other, other_state = projected(dataclasses.replace(SMALL, remat=remat))
    chex.assert_trees_all_equal(state.params, other_state.params)
    results = [
        s.value_and_grad(loss_of(m))()
        for m, s in ((model, state), (other, other_state))
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


def test_scan_equals_unrolled():
    """Loss, projected gradients and observations of a Python loop over layers."""
    model, state = projected()
    zeros = state.probed
    blocks = {"params": state.params["blocks"], "subspace": zeros["blocks"]}

    def unrolled(stacked):
        params = state.params
        embed = nn.Embed(SMALL.vocab_size, SMALL.width)
        x = embed.apply({"params": params["embed"]}, TOKENS)
        for i in range(SMALL.layers):
            layer = {
                "params": jax.tree.map(lambda a, i=i: a[i], blocks["params"]),
                "subspace": jax.tree.map(lambda a, i=i: a[i], stacked),
            }
            x, _ = Block(SMALL).apply(layer, x, SEGMENTS)
        x = RMSNorm(SMALL).apply({"params": params["norm"]}, x)
        logits = x @ params["lm_head"]["kernel"]
        return jnp.mean(token_losses(logits, jnp.roll(TOKENS, -1, axis=1)))

    def scanned(stacked):
        subspace = {**zeros, "blocks": stacked}
        return loss_of(model)({"params": state.params, "subspace": subspace})

    chex.assert_trees_all_close(
        jax.jit(jax.value_and_grad(scanned))(blocks["subspace"]),
        jax.jit(jax.value_and_grad(unrolled))(blocks["subspace"]),
        rtol=1e-4,
        atol=1e-6,
    )


def test_causal():
    """No logit depends on a later token: from gradients, so no value is special."""
    model, variables = build()
    params = variables["params"]

    def logits(embedded):
        replaced = {**params, "embed": {"embedding": embedded}}
        return model.apply({"params": replaced}, jnp.arange(12)[None])

    jacobian = jax.jacrev(lambda e: logits(e)[0].sum(axis=-1))(
        params["embed"]["embedding"]
    )
    reach = jnp.abs(jacobian[:, :12]).sum(axis=-1) > 0  # of output t on token s
    np.testing.assert_array_equal(reach, np.tril(np.ones((12, 12), bool)))


def test_packed_documents_do_not_see_each_other():
    model, variables = build()
    changed = TOKENS.at[0, :7].set((TOKENS[0, :7] + 1) % 32)
    first = model.apply({"params": variables["params"]}, TOKENS, SEGMENTS)
    second = model.apply({"params": variables["params"]}, changed, SEGMENTS)
    np.testing.assert_array_equal(first[0, 7:], second[0, 7:])
    assert not np.allclose(first[0, :7], second[0, :7])
    whole = model.apply({"params": variables["params"]}, TOKENS)
    assert not np.allclose(first[0, 7:], whole[0, 7:])


def test_biases_and_norms_of_heads():
    """Beside projected kernels, they have the gradients of plain autodiff."""
    model = Llama(dataclasses.replace(SMALL, layers=1, qkv_bias=True, qk_norm=True))
    state = OasisTrainState.create(
        apply_fn=model.apply,
        **jax.jit(model.init)(jax.random.key(0), TOKENS),
        tx=oasis_adam(1e-2),
        rules=[Rule(LINEAR, 0.5)],
    )

    @jax.jit
    def gradients(state):
        _, grads = state.value_and_grad(loss_of(model))()
        return grads.params, jax.grad(loss_of(model))({"params": state.params})[
            "params"
        ]

    grads, exact = map(flatten_paths, gradients(state))
    for name, shape in {
        "q_proj/bias": (1, 16),
        "k_proj/bias": (1, 8),
        "v_proj/bias": (1, 8),
        "q_norm/scale": (1, 4),
        "k_norm/scale": (1, 4),
    }.items():
        got = grads[f"blocks/attn/{name}"]
        assert got.shape == shape
        np.testing.assert_allclose(
            got, exact[f"blocks/attn/{name}"], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "scaling, expected",
    [
        # 100 tokens hold 100 / 2 pi turns of a rate of one a token.
        (RopeScaling(8.0), [1 / 8, 0.5 / 8, 0.1 / 8, 0.01 / 8]),
        (
            RopeScaling(8.0, 100, low=1.0, high=4.0),
            [1, 0.5, 0.1 * (0.197 + 0.803 / 8), 0.01 / 8],
        ),
    ],
)
def test_rope_scaling(scaling, expected):
    """Rates that turn often are kept, those that do not are divided by the factor."""
    np.testing.assert_allclose(
        scaling(jnp.array([1, 0.5, 0.1, 0.01])), expected, rtol=1e-3
    )


def test_rope_scaling_of_nothing():
    with pytest.raises(ValueError, match=r"low 4\.0 and high 1\.0, expected"):
        RopeScaling(8.0, 100, low=4.0, high=1.0)


def test_too_many_tokens():
    bounded = Llama(dataclasses.replace(SMALL, positions=11))
    with pytest.raises(ValueError, match="12 tokens, and the model only 11 positions"):
        jax.eval_shape(bounded.init, jax.random.key(0), TOKENS)


def naive_attention(q, k, v, segments, theta):
    """Softmax written out in float64, one head at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, length, heads, size = q.shape
    positions = np.arange(length)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * positions)

    def rotate(x):
        z = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn[:, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    out = np.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            shared = h // (heads // k.shape[2])
            scores = rotate(q[b])[:, h] @ rotate(k[b])[:, shared].T / np.sqrt(size)
            seen = np.tril(np.ones((length, length), bool))
            seen &= np.equal.outer(np.asarray(segments[b]), np.asarray(segments[b]))
            weights = np.where(seen, np.exp(scores), 0)
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, shared]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_the_naive_one(kv_heads):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, 12, heads, 8))
        for key, heads in zip(keys, (4, kv_heads, kv_heads), strict=True)
    )
    q_rotated, k_rotated = (
        llama._rotate(a, jnp.arange(12), theta=100.0) for a in (q, k)
    )
    got = attention(q_rotated, k_rotated, v, SEGMENTS)
    expected = naive_attention(q, k, v, SEGMENTS, 100.0)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_tied_embeddings():
    _, variables = build(dataclasses.replace(SMALL, tied=True))
    assert "lm_head" not in variables["params"]


def test_bfloat16():
    model, state = projected(dataclasses.replace(SMALL, dtype=jnp.bfloat16))
    loss, grads = state.value_and_grad(loss_of(model))()
    exact_model, exact_state = projected()
    exact, _ = exact_state.value_and_grad(loss_of(exact_model))()
    np.testing.assert_allclose(loss, exact, rtol=0.02)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


# width, hidden, layers, heads, kv heads, vocabulary; parameters in millions
PUBLISHED = {
    "llama-60m": (512, 1376, 8, 8, 8, 32_000, 58),
    "llama-130m": (768, 2048, 12, 12, 12, 32_000, 134),
    "llama-350m": (1024, 2736, 24, 16, 16, 32_000, 368),
    "llama-1b": (2048, 5461, 24, 32, 32, 32_000, 1339),
    "llama-7b": (4096, 11008, 32, 32, 32, 32_000, 6738),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128_256, 1236),
    "qwen-2.5-0.5b": (896, 4864, 24, 14, 2, 151_936, 494),
    "qwen-3-0.6b": (1024, 3072, 28, 16, 8, 151_936, 596),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32_768, 7248),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128_256, 8030),
    "llama-tiny": (128, 344, 4, 4, 4, 256, 0.857),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(name):
    *shape, millions = PUBLISHED[name]
    c = llama.preset(name)
    assert [c.width, c.hidden, c.layers, c.heads, c.kv_heads, c.vocab_size] == shape
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(Llama(c).init, jax.random.key(0), tokens)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    np.testing.assert_allclose(count / 1e6, millions, rtol=0.005)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(remat="some"), "remat is 'some', expected one of"),
        (dict(kv_heads=3), "4 heads do not divide into 3 kv heads"),
        (dict(width=18), "width 18 does not divide into 4 heads"),
    ],
)
def test_bad_configurations(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(SMALL, head_size=0, **changes)


def test_unknown_preset():
    with pytest.raises(
        ValueError, match="preset is 'llama-9b', expected one of llama-t"
    ):
        llama.preset("llama-9b")
