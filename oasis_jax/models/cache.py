"""Keys and values of the tokens so far, for a model that goes on from them.

A row's tokens stand at 0, 1, ...; what advances by T tokens writes them at start to
start + T - 1, and each sees what is at its own position and before. So a batch of prompts
of different lengths is padded on the right: what padding wrote is never seen before the
row's own next token has replaced it.

Shape suffixes: B batch, T new tokens, S places, H query heads, K key/value heads, E head
size; G = H / K heads share a key.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Cache(NamedTuple):
    """Of one layer (B, S, K, E), of a model (layers, B, S, K, E); in its dtype.

    Attributes:
      keys: After the rotary embedding.
      values: As they are.
    """

    keys: Array
    values: Array


Past = tuple[Cache, Array]
"""What a layer goes on from: its cache, and the position of each row's next token."""


def empty_cache(config: Any, batch: int, size: int) -> Cache:
    """For `batch` rows of at most `size` tokens of a model of this configuration.

    Example:
      >>> from oasis_jax.models.llama import preset
      >>> empty_cache(preset("llama-tiny"), batch=2, size=9).keys.shape
      (4, 2, 9, 4, 32)
    """
    c = config
    shape = (c.layers, batch, size, c.kv_heads, c.head_size)
    return Cache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))


def cached_attention(
    q_BTHE: Array, k_BTKE: Array, v_BTKE: Array, cache: Cache, start_B: Array
) -> tuple[Array, Cache]:
    """Attention of T new tokens to themselves and to what the cache holds before them.

    `attention` of the last T queries, if every row had all its tokens here. The scores
    exist whole, B H T S float32: not for training.

    Args:
      q_BTHE, k_BTKE, v_BTKE: Of the new tokens, rotated by their absolute positions.
      cache: Of this layer.
      start_B: (B,) int32, the position of the first of them, at most S - T.

    Returns:
      (B, T, H, E) in the dtype of q, and the cache with the new tokens.

    Example:
      >>> q, k = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 2, 2, 8))
      >>> old = Cache(jnp.zeros((1, 6, 2, 8)), jnp.zeros((1, 6, 2, 8)))
      >>> out, new = cached_attention(q, k, k, old, jnp.array([3]))
      >>> new.keys[0, :, 0, 0].tolist()
      [0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    """
    put = jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
    keys, values = (
        put(old, new.astype(old.dtype), start_B, 0)
        for old, new in zip(cache, (k_BTKE, v_BTKE), strict=True)
    )
    batch, tokens, _, size = q_BTHE.shape
    places, kv_heads = keys.shape[1:3]
    q_BTKGE = q_BTHE.reshape(batch, tokens, kv_heads, -1, size)
    scores = jnp.einsum(
        "btkge,bske->bkgts", q_BTKGE, keys, preferred_element_type=jnp.float32
    )
    position_BT = start_B[:, None] + jnp.arange(tokens)
    seen_BTS = jnp.arange(places) <= position_BT[:, :, None]
    scores = jnp.where(seen_BTS[:, None, None], scores * size**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out_BTKGE = jnp.einsum("bkgts,bske->btkge", weights, values)
    return out_BTKGE.reshape(q_BTHE.shape).astype(q_BTHE.dtype), Cache(keys, values)
