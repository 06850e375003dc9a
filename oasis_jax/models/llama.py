"""LLaMA in Flax linen: scanned blocks, grouped queries, RoPE, RMSNorm, SwiGLU.

Built of projectable layers, with one projection for q/k/v and one for gate/up. The
parameters are those of the same model built with `nn.Dense`, at every level of
recomputation (`models/blocks.py`).

Shape suffixes: B batch, T tokens, D width, H query heads, K key/value heads, E head size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from oasis_jax.attention import attention
from oasis_jax.linen import DenseWeights, OasisDense, input_projection, shared_dense
from oasis_jax.losses import chunked_cross_entropy
from oasis_jax.models.blocks import advance_blocks, blocks, check_length
from oasis_jax.models.cache import Cache, Past, cached_attention
from oasis_jax.models.presets import PRESETS as PRESETS
from oasis_jax.models.presets import LlamaConfig as LlamaConfig
from oasis_jax.models.presets import RopeScaling as RopeScaling
from oasis_jax.models.presets import preset as preset
from oasis_jax.nonlinear import compressed_rms_norm, compressed_swiglu
from oasis_jax.residuals import GATE_UP, MIDDLE, QKV, keep


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale, computed in float32."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        scale = self.param(
            "scale", nn.initializers.ones, x_BTD.shape[-1:], self.config.param_dtype
        )
        probe = input_projection(self, "input", x_BTD.shape[-1])
        if probe is not None:
            return compressed_rms_norm(
                x_BTD,
                scale,
                probe.basis,
                probe.energy,
                eps=self.config.norm_eps,
                stride=probe.stride,
            )
        return _rms_norm(x_BTD, scale, eps=self.config.norm_eps)


class HeadNorm(nn.Module):
    """RMSNorm of each head, (..., E). Too small to be worth a place for a projection."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTHE: Array) -> Array:
        scale = self.param(
            "scale", nn.initializers.ones, x_BTHE.shape[-1:], self.config.param_dtype
        )
        return _rms_norm(x_BTHE, scale, eps=self.config.norm_eps)


class Attention(nn.Module):
    """Causal grouped-query attention within each packed document, or after a cache."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        segments_BT: Array | None,
        past: Past | None = None,
    ) -> tuple[Array, Cache | None]:
        c = self.config
        options = _dense_options(c)
        q, k, v = shared_dense(
            self,
            "qkv",
            x_BTD,
            {
                "q_proj": c.heads * c.head_size,
                "k_proj": c.kv_heads * c.head_size,
                "v_proj": c.kv_heads * c.head_size,
            },
            **options | {"use_bias": c.qkv_bias},
        )
        heads = [a.reshape(*a.shape[:-1], -1, c.head_size) for a in (q, k, v)]
        q, k, v = keep(heads, QKV)
        if c.qk_norm:
            q, k = HeadNorm(c, name="q_norm")(q), HeadNorm(c, name="k_norm")(k)
        positions_BT = jnp.arange(x_BTD.shape[1])
        if past is not None:
            positions_BT += past[1][:, None]
        q, k = (
            _rotate(a, positions_BT, theta=c.rope_theta, scaling=c.rope_scaling)
            for a in (q, k)
        )
        cache = None
        if past is None:
            out_BTHE = attention(q, k, v, segments_BT)
        else:
            out_BTHE, cache = cached_attention(q, k, v, *past)
        out = out_BTHE.reshape(*x_BTD.shape[:-1], -1)
        return OasisDense(c.width, name="o_proj", **options)(out), cache


class MLP(nn.Module):
    """SwiGLU."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c = self.config
        gate, up = shared_dense(
            self,
            "gate_up",
            x_BTD,
            {"gate_proj": c.hidden, "up_proj": c.hidden},
            **_dense_options(c),
        )
        gate, up = keep((gate, up), GATE_UP)
        of_gate = input_projection(self, "swiglu_gate", c.hidden)
        of_up = input_projection(self, "swiglu_up", c.hidden)
        if of_gate is not None and of_up is not None:
            hidden = compressed_swiglu(
                gate,
                up,
                of_gate.basis,
                of_up.basis,
                of_gate.energy,
                of_up.energy,
                stride=of_gate.stride,
            )
        else:
            hidden = _swiglu(gate, up)
        return OasisDense(c.width, name="down_proj", **_dense_options(c))(hidden)


class Block(nn.Module):
    """One layer; returns `(x, cache)`, without a cache `(x, None)`, to be scanned."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        segments_BT: Array | None,
        past: Past | None = None,
    ) -> tuple[Array, Cache | None]:
        c = self.config
        out_BTD, cache = Attention(c, name="attn")(
            RMSNorm(c, name="attn_norm")(x_BTD), segments_BT, past
        )
        x_BTD = keep(x_BTD + out_BTD, MIDDLE)
        x_BTD += MLP(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x_BTD))
        return x_BTD, cache


class Llama(nn.Module):
    """Tokens (B, T) int32 to logits (B, T, vocabulary) float32.

    Args of the call:
      tokens: (B, T) int32.
      segments: (B, T) int32, the number of the packed document that each token belongs
        to; tokens attend within their document only. None means one document.
      targets, weights: (B, T) int32 and float32. With them the result is not the logits,
        which then never exist whole, but `sum(weights * cross-entropy)`, () float32.
      cache, start: With a cache (`empty_cache`) the tokens are those at `start`, (B,)
        int32 or None for 0, and after it, and see those before, which the cache has. The
        result is then `(logits, cache)`. Without segments, and not for training.
      read: (B,) int32, the one token of each row whose logits are wanted: the result is
        (B, 1, vocabulary), and the other logits never exist.

    Example:
      >>> model = Llama(preset("llama-tiny"))
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
      >>> model.apply({'params': variables['params']}, jnp.zeros((1, 8), jnp.int32)).shape
      (1, 8, 256)

    Raises:
      ValueError: if there are more tokens than `positions`.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        segments: Array | None = None,
        targets: Array | None = None,
        weights: Array | None = None,
        *,
        cache: Cache | None = None,
        start: Array | None = None,
        read: Array | None = None,
    ) -> Array | tuple[Array, Cache]:
        c = self.config
        check_length(tokens, c.positions)
        embed = nn.Embed(
            c.vocab_size,
            c.width,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
            name="embed",
        )
        if cache is None:
            x_BTD = blocks(self, Block, embed(tokens), segments)
        else:
            if start is None:
                start = jnp.zeros(tokens.shape[:1], jnp.int32)
            x_BTD, cache = advance_blocks(self, Block, embed(tokens), (cache, start))
        if read is not None:
            x_BTD = jnp.take_along_axis(x_BTD, read[:, None, None], axis=1)
        x_BTD = RMSNorm(c, name="norm")(x_BTD)
        place = None
        if c.tied:
            kernel = embed.embedding
        else:
            kernel, place = DenseWeights(
                c.vocab_size, c.param_dtype, _kernel_init, name="lm_head"
            )(c.width)
        if targets is not None:
            if weights is None:
                weights = jnp.ones(targets.shape, jnp.float32)
            return chunked_cross_entropy(
                x_BTD,
                kernel,
                targets,
                weights,
                projection=place,
                chunk=c.loss_chunk,
                transposed=c.tied,
            )
        if place is None:
            logits = embed.attend(x_BTD)
        else:
            (logits,) = place(x_BTD, {"kernel": kernel})
        logits = logits.astype(jnp.float32)
        return logits if cache is None else (logits, cache)


def token_losses(logits: Array, targets: Array) -> Array:
    """Cross-entropy of each token in nats, (B, T) float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def _dense_options(c: LlamaConfig) -> dict[str, Any]:
    return dict(
        use_bias=False,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        kernel_init=_kernel_init,
    )


def _rms_norm(x: Array, scale: Array, *, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    # Not jnp.square, of which autodiff would keep another array, 2 x.
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + eps) * scale).astype(x.dtype)


def _swiglu(gate: Array, up: Array) -> Array:
    return nn.silu(gate) * up


def _rotate(
    x_BTHE: Array,
    positions: Array,
    *,
    theta: float,
    scaling: RopeScaling | None = None,
) -> Array:
    """Rotary embedding, halves paired as in Hugging Face's LLaMA.

    Positions are (T,), or (B, T) where rows begin anywhere.
    """
    size = x_BTHE.shape[-1]
    rates = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling is not None:
        rates = scaling(rates)
    angles = positions[..., None].astype(jnp.float32) * rates
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x_BTHE.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHE.dtype)
