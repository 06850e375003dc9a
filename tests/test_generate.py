"""Greedy generation: the oracle is the whole forward pass for every token."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oasis_jax.models import generate as module
from oasis_jax.models.cache import empty_cache
from oasis_jax.models.generate import generate, pad
from oasis_jax.models.llama import Llama, LlamaConfig

SMALL = LlamaConfig(32, 16, 24, 2, 4, 2)
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7], [6]]
NEW = 5


@cache
def build(**changes):
    model = Llama(dataclasses.replace(SMALL, **changes))
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    # At initialisation the residual stream is little but the last token.
    params["embed"]["embedding"] *= 10
    return model, params


def forward(model):
    return jax.jit(
        lambda params, *args, **options: model.apply(
            {"params": params}, *args, **options
        )
    )


def oracle(model, params):
    """Each prompt alone, without cache: all tokens again for each new one."""
    whole = forward(model)
    rows = []
    for prompt in PROMPTS:
        # At one width; what comes later is not seen.
        tokens = np.zeros((1, len(PROMPTS[0]) + NEW), np.int32)
        tokens[0, : len(prompt)] = prompt
        for i in range(len(prompt), len(prompt) + NEW):
            tokens[0, i] = jnp.argmax(whole(params, tokens)[0, i - 1])
        rows.append(tokens[0, len(prompt) : len(prompt) + NEW].tolist())
    return rows


@pytest.mark.parametrize(
    "changes", [dict(), dict(kv_heads=4, head_size=6, tied=True)], ids=str
)
def test_is_the_whole_forward_pass_token_by_token(changes):
    """In one batch of prompts of different lengths, padded with a real token."""
    model, params = build(**changes)
    prompts, lengths = pad(PROMPTS, multiple=8)
    prompts = jnp.where(jnp.arange(8) < lengths[:, None], prompts, 31)
    got = generate(model, params, prompts, lengths, new_tokens=NEW)
    assert got.dtype == jnp.int32
    expected = oracle(model, params)
    assert got.tolist() == expected
    assert len({tuple(row) for row in expected}) == 3  # the prompts do matter


def test_in_pieces_logits_are_those_of_the_whole():
    """Rows that start at different positions, several tokens at a time."""
    model, params = build()
    apply = forward(model)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 32)
    whole = apply(params, tokens)
    old = empty_cache(model.config, 2, 8)
    first, old = apply(params, tokens[:, :5], cache=old)
    np.testing.assert_allclose(first, whole[:, :5], atol=1e-5)
    start = jnp.array([2, 5])
    window = start[:, None] + jnp.arange(3)
    later = jnp.take_along_axis(tokens, window, axis=1)
    # What is still there of tokens that come later is not seen.
    second, _ = apply(params, later, cache=old, start=start)
    expected = jnp.take_along_axis(whole, window[..., None], axis=1)
    np.testing.assert_allclose(second, expected, atol=1e-5)
    read = jnp.array([0, 2])
    one, _ = apply(params, later, cache=old, start=start, read=read)
    np.testing.assert_allclose(one[:, 0], second[jnp.arange(2), read], atol=1e-6)


def test_end():
    """A row is filled after its end, and others go on."""
    model, params = build()
    prompts, lengths = pad(PROMPTS, multiple=8)
    free = generate(model, params, prompts, lengths, new_tokens=NEW).tolist()
    for end in {token for row in free for token in row}:
        got = generate(model, params, prompts, lengths, new_tokens=NEW, end=end)
        for row, whole in zip(got.tolist(), free, strict=True):
            cut = whole.index(end) if end in whole else NEW
            assert row == whole[:cut] + [end] * (NEW - cut)


def test_one_compilation():
    model, params = build()
    prompts, lengths = pad(PROMPTS, multiple=8)
    before = module._generate._cache_size()
    for change, end in ((0, 7), (1, 8), (2, 9)):
        changed = jnp.minimum(lengths + change, 8)
        generate(model, params, prompts, changed, new_tokens=3, end=end)
    assert module._generate._cache_size() == before + 1


def test_bfloat16():
    """What is chosen is nearly the best of the same model in float32."""
    model, params = build(dtype=jnp.bfloat16)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert {a.dtype for a in empty_cache(model.config, 1, 4)} == {jnp.bfloat16.dtype}
    prompts, lengths = pad(PROMPTS[:1], multiple=2)
    got = generate(model, params, prompts, lengths, new_tokens=NEW)
    tokens = jnp.concatenate([prompts, got], axis=1)
    logits = forward(Llama(SMALL))(params, tokens)[0, len(PROMPTS[0]) - 1 : -1]
    chosen = jnp.take_along_axis(logits, got[0][:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, logits.max(axis=1), atol=0.05)


def test_pad():
    tokens, lengths = pad(PROMPTS)
    assert tokens.shape == (3, 64) and tokens.dtype == lengths.dtype == jnp.int32
    assert lengths.tolist() == [6, 2, 1]
    assert pad([[1] * 64])[0].shape == (1, 64)


@dataclasses.dataclass(frozen=True)
class Positions(LlamaConfig):
    positions: int = 8


@pytest.mark.parametrize(
    "prompts, lengths, new_tokens, sentence",
    [
        ([[1, 2], [0, 0]], [2, 0], 1, "prompt 1 is empty"),
        ([[1, 2], [3, 4]], [2, 3], 1, "prompt 1 has length 3, but the prompts are 2"),
        (
            [[1, 2]],
            [2],
            7,
            "prompt 0 has 2 tokens, and with 7 new ones more than the 8",
        ),
        ([[1, 32]], [1], 1, "prompt 0 has token 32, but the vocabulary .* ends at 31"),
        ([[1, 2]], [2], 0, "new_tokens is 0, expected at least 1"),
        ([[1, 2]], [2, 2], 1, r"shape \(1, 2\) and lengths \(2,\), expected"),
    ],
)
def test_errors_before_compilation(prompts, lengths, new_tokens, sentence):
    model = Llama(Positions(32, 16, 24, 2, 4, 2))
    arrays = (jnp.array(a, jnp.int32) for a in (prompts, lengths))
    with pytest.raises(ValueError, match=sentence):
        generate(model, {}, *arrays, new_tokens=new_tokens)


def test_inside_another_transformation():
    """Where lengths have no values, nothing is asked of them."""
    model, params = build()
    made = jax.eval_shape(
        lambda *args: generate(model, *args, new_tokens=NEW), params, *pad(PROMPTS)
    )
    assert made.shape == (3, NEW)
