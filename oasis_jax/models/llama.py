"""LLaMA in Flax linen: scanned blocks, grouped queries, RoPE, RMSNorm, SwiGLU.

Built of projectable layers, with one projection for q/k/v and one for gate/up. The
parameters are those of the same model built with `nn.Dense`.

Recomputation (`remat`) never changes the parameters:

    none          keep everything that autodiff wants to keep
    elementwise   recompute norms, SwiGLU, rotary embedding and the attention weights
    block         keep each block's input only

Shape suffixes: B batch, T tokens, D width, H query heads, K key/value heads, E head size.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from oasis_jax.linen import OasisDense, input_projection, shared_dense
from oasis_jax.nonlinear import compressed_rms_norm, compressed_swiglu
from oasis_jax.subspace import COLLECTION

REMAT = ("none", "elementwise", "block")


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and dtypes of a LLaMA.

    Attributes:
      width, hidden: Of the residual stream and of the MLP.
      layers, heads, kv_heads: Counts; `heads` must divide by `kv_heads`.
      tied: Whether the output head is the embedding, transposed.
      head_size: `width // heads` if 0.
      dtype, param_dtype: Of the computation and of the parameters.
      remat: One of `REMAT`.
    """

    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False
    head_size: int = 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "elementwise"

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}, expected one of {REMAT}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads do not divide into {self.kv_heads} kv heads"
            )
        if not self.head_size:
            if self.width % self.heads:
                raise ValueError(
                    f"width {self.width} does not divide into {self.heads} heads"
                )
            object.__setattr__(self, "head_size", self.width // self.heads)


def _c4(width: int, hidden: int, layers: int, heads: int) -> LlamaConfig:
    """A shape of the C4 benchmark that GaLore and its successors share."""
    return LlamaConfig(32_000, width, hidden, layers, heads, heads)


PRESETS = {
    "llama-tiny": LlamaConfig(256, 128, 344, 4, 4, 4),
    "llama-60m": _c4(512, 1376, 8, 8),
    "llama-130m": _c4(768, 2048, 12, 12),
    "llama-350m": _c4(1024, 2736, 24, 16),
    "llama-1b": _c4(2048, 5461, 24, 32),
    "llama-7b": _c4(4096, 11008, 32, 32),
    "llama-3.2-1b": LlamaConfig(
        128_256, 2048, 8192, 16, 32, 8, tied=True, rope_theta=5e5, norm_eps=1e-5
    ),
    "llama-3-8b": LlamaConfig(
        128_256, 4096, 14336, 32, 32, 8, rope_theta=5e5, norm_eps=1e-5
    ),
}


def preset(name: str, **changes: Any) -> LlamaConfig:
    """A preset, with some fields changed.

    Raises:
      ValueError: if there is no such preset; lists those that are.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale, computed in float32."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        scale = self.param(
            "scale", nn.initializers.ones, x_BTD.shape[-1:], self.config.param_dtype
        )
        place = input_projection(self, "input", x_BTD.shape[-1])
        if place.active:
            return compressed_rms_norm(
                x_BTD,
                scale,
                place.basis,
                place.energy,
                eps=self.config.norm_eps,
                stride=place.stride,
            )
        return _maybe_recompute(_rms_norm, self.config)(
            x_BTD, scale, eps=self.config.norm_eps
        )


class Attention(nn.Module):
    """Causal grouped-query attention within each packed document."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD: Array, segments_BT: Array | None) -> Array:
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
            **options,
        )
        heads = [a.reshape(*a.shape[:-1], -1, c.head_size) for a in (q, k, v)]
        out_BTHE = _maybe_recompute(_attend, c)(*heads, segments_BT, theta=c.rope_theta)
        out = out_BTHE.reshape(*x_BTD.shape[:-1], -1)
        return OasisDense(c.width, name="o_proj", **options)(out)


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
        places = [
            input_projection(self, site, c.hidden)
            for site in ("swiglu_gate", "swiglu_up")
        ]
        if all(place.active for place in places):
            hidden = compressed_swiglu(
                gate,
                up,
                *(place.basis for place in places),
                *(place.energy for place in places),
                stride=places[0].stride,
            )
        else:
            hidden = _maybe_recompute(_swiglu, c)(gate, up)
        return OasisDense(c.width, name="down_proj", **_dense_options(c))(hidden)


class Block(nn.Module):
    """One layer; returns `(x, None)` so that it can be scanned."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BTD: Array, segments_BT: Array | None) -> tuple[Array, None]:
        c = self.config
        x_BTD += Attention(c, name="attn")(
            RMSNorm(c, name="attn_norm")(x_BTD), segments_BT
        )
        x_BTD += MLP(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x_BTD))
        return x_BTD, None


class Llama(nn.Module):
    """Tokens (B, T) int32 to logits (B, T, vocabulary) float32.

    Args of the call:
      tokens: (B, T) int32.
      segments: (B, T) int32, the number of the packed document that each token belongs
        to; tokens attend within their document only. None means one document.

    Example:
      >>> model = Llama(preset("llama-tiny"))
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
      >>> model.apply({'params': variables['params']}, jnp.zeros((1, 8), jnp.int32)).shape
      (1, 8, 256)
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: Array, segments: Array | None = None) -> Array:
        c = self.config
        embed = nn.Embed(
            c.vocab_size,
            c.width,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
            name="embed",
        )
        block = Block
        if c.remat == "block":
            block = nn.remat(Block, prevent_cse=False)
        x_BTD, _ = nn.scan(
            block,
            # A collection that is not listed here is silently absent inside.
            variable_axes={"params": 0, COLLECTION: 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.layers,
        )(c, name="blocks")(embed(tokens), segments)
        x_BTD = RMSNorm(c, name="norm")(x_BTD)
        if c.tied:
            logits = embed.attend(x_BTD)
        else:
            logits = OasisDense(c.vocab_size, name="lm_head", **_dense_options(c))(
                x_BTD
            )
        return logits.astype(jnp.float32)


def token_losses(logits: Array, targets: Array) -> Array:
    """Cross-entropy of each token in nats, (B, T) float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def _dense_options(c: LlamaConfig) -> dict[str, Any]:
    return dict(
        use_bias=False,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
    )


def _maybe_recompute(function, c: LlamaConfig):
    if c.remat == "none":
        return function

    def call(*arrays, **static):
        # Inside a scan there is nothing to eliminate, and the barrier costs time.
        return jax.checkpoint(partial(function, **static), prevent_cse=False)(*arrays)

    return call


def _rms_norm(x: Array, scale: Array, *, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + eps) * scale).astype(x.dtype)


def _swiglu(gate: Array, up: Array) -> Array:
    return nn.silu(gate) * up


def _rotate(x_BTHE: Array, theta: float) -> Array:
    """Rotary embedding, halves paired as in Hugging Face's LLaMA."""
    tokens, size = x_BTHE.shape[-3], x_BTHE.shape[-1]
    rates = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(tokens, dtype=jnp.float32)[:, None] * rates
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x_BTHE.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHE.dtype)


def _attend(
    q_BTHE: Array, k_BTKE: Array, v_BTKE: Array, segments: Array | None, *, theta: float
) -> Array:
    mask = None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        _rotate(q_BTHE, theta),
        _rotate(k_BTKE, theta),
        v_BTKE,
        mask=mask,
        is_causal=True,
    )
