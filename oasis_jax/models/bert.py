"""BERT and RoBERTa in Flax linen: post-norm encoders with learned positions.

Built as `models/llama.py` is: projectable layers, one projection for q/k/v, scanned
blocks with the levels of recomputation of `models/blocks.py`. There is no dropout.

Shape suffixes: B batch, T tokens, D width, H heads, E head size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.attention import attention
from oasis_jax.linen import OasisDense, input_projection, shared_dense
from oasis_jax.models.blocks import blocks, check_kept, check_length
from oasis_jax.nonlinear import compressed, compressed_layer_norm
from oasis_jax.residuals import GATE_UP, MIDDLE, QKV, keep


@dataclass(frozen=True)
class BertConfig:
    """Shapes and dtypes of an encoder.

    Attributes:
      width, hidden: Of the residual stream and of the MLP.
      layers, heads: Counts; `width` must divide by `heads`.
      positions: The most tokens of a sequence.
      types: Kinds of segments, such as first and second sentence.
      labels: Outputs of the classifier; 0 gives hidden states instead.
      position_offset: 0, or where RoBERTa's positions start, which counts tokens other
        than padding and has a position of its own, one less, for that.
      pad: The token of padding; it matters with a `position_offset` only.
      dtype, param_dtype: Of the computation and of the parameters.
      remat: One of `blocks.REMAT`.
      residuals: As in `LlamaConfig`.
    """

    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    positions: int
    types: int = 2
    labels: int = 0
    norm_eps: float = 1e-12
    position_offset: int = 0
    pad: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "elementwise"
    residuals: str = "whole"

    def __post_init__(self):
        check_kept(self.remat, self.residuals)
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} does not divide into {self.heads} heads"
            )


class LayerNorm(nn.Module):
    """Layer norm with scale and bias, computed in float32."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c, size = self.config, x_BTD.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, size, c.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, size, c.param_dtype)
        probe = input_projection(self, "input", *size)
        if probe is not None:
            return compressed_layer_norm(
                x_BTD,
                scale,
                bias,
                probe.basis,
                probe.energy,
                eps=c.norm_eps,
                stride=probe.stride,
            )
        return _layer_norm(x_BTD, scale, bias, eps=c.norm_eps)


class Attention(nn.Module):
    """Attention of every token to all of its segment."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BTD: Array, segments_BT: Array | None) -> Array:
        c = self.config
        names = ("q_proj", "k_proj", "v_proj")
        options = _dense_options(c)
        mask = _mask(segments_BT)
        features = dict.fromkeys(names, c.width)
        qkv = shared_dense(self, "qkv", x_BTD, features, mask=mask, **options)
        heads = [a.reshape(*a.shape[:-1], c.heads, -1) for a in qkv]
        q, k, v = keep(heads, QKV)
        out_BTHE = attention(q, k, v, segments_BT, causal=False)
        out_BTD = out_BTHE.reshape(x_BTD.shape)
        return OasisDense(c.width, name="o_proj", **options)(out_BTD, mask)


class MLP(nn.Module):
    """Two layers with an exact GELU between them."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BTD: Array, segments_BT: Array | None) -> Array:
        c = self.config
        options, mask = _dense_options(c), _mask(segments_BT)
        up = OasisDense(c.hidden, name="up_proj", **options)(x_BTD, mask)
        up = keep(up, GATE_UP)
        probe = input_projection(self, "gelu", c.hidden)
        if probe is not None:
            hidden = compressed(
                _gelu, up, probe.basis, probe.energy, stride=probe.stride
            )
        else:
            hidden = _gelu(up)
        return OasisDense(c.width, name="down_proj", **options)(hidden, mask)


class Block(nn.Module):
    """One layer, normalised after each sum; returns `(x, None)`."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BTD: Array, segments_BT: Array | None) -> tuple[Array, None]:
        c = self.config
        x_BTD = keep(x_BTD + Attention(c, name="attn")(x_BTD, segments_BT), MIDDLE)
        x_BTD = LayerNorm(c, name="attn_norm")(x_BTD)
        x_BTD += MLP(c, name="mlp")(x_BTD, segments_BT)
        return LayerNorm(c, name="mlp_norm")(x_BTD), None


class Embeddings(nn.Module):
    """Sum of a token's, a position's and a type's vector, normalised."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, tokens_BT: Array, segments_BT: Array | None, types_BT: Array
    ) -> Array:
        c = self.config
        table = partial(
            nn.Embed,
            features=c.width,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            embedding_init=_init,
        )
        word = table(c.vocab_size, name="word")(tokens_BT)
        rows = c.positions + c.position_offset
        positions = _positions(c, tokens_BT, segments_BT)
        position = table(rows, name="position")(positions)
        kind = table(c.types, name="type")(types_BT)
        return LayerNorm(c, name="norm")(word + position + kind)


class Bert(nn.Module):
    """Tokens (B, T) int32 to logits (B, labels) float32, or to hidden states.

    The logits are those of a linear classifier on a tanh layer on the first token;
    without labels, that layer's parameters are there and unused.

    Args of the call:
      tokens: (B, T) int32.
      segments: (B, T) int32; tokens attend to those with the same number, and positions
        count from where it begins. So 1 for text, or several numbers for several texts,
        and 0 for padding, which no basis follows. None means that there is no padding.
      types: (B, T) int32, as `BertConfig.types`; None means 0.
      firsts: (B, K) int32, where texts begin, if a row holds several: the logits are
        (B, K, labels) then. None is one text from the first token on.

    Raises:
      ValueError: if there are more tokens than positions.

    Example:
      >>> model = Bert(BertConfig(64, 16, 32, layers=2, heads=2, positions=8, labels=3))
      >>> tokens = jnp.zeros((1, 8), jnp.int32)
      >>> params = model.init(jax.random.key(0), tokens)['params']
      >>> model.apply({'params': params}, tokens).shape
      (1, 3)

    Source: BERT (arXiv 1810.04805), RoBERTa (arXiv 1907.11692).
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        segments: Array | None = None,
        types: Array | None = None,
        firsts: Array | None = None,
    ) -> Array:
        c = self.config
        check_length(tokens, c.positions)
        types = jnp.zeros_like(tokens) if types is None else types
        embedded = Embeddings(c, name="embed")(tokens, segments, types)
        x_BTD = blocks(self, Block, embedded, segments)
        if firsts is None:
            first = x_BTD[:, 0]
        else:
            first = jnp.take_along_axis(x_BTD, firsts[..., None], axis=1)
        options = _dense_options(c)
        pooled = jnp.tanh(nn.Dense(c.width, name="pooler", **options)(first))
        if not c.labels:
            return x_BTD
        logits = nn.Dense(c.labels, name="classifier", **options)(pooled)
        return logits.astype(jnp.float32)


_init = nn.initializers.normal(0.02)
_gelu = partial(jax.nn.gelu, approximate=False)


def _dense_options(c: BertConfig) -> dict[str, Any]:
    return dict(dtype=c.dtype, param_dtype=c.param_dtype, kernel_init=_init)


def _mask(segments: Array | None) -> Array | None:
    return None if segments is None else segments > 0


def _layer_norm(x: Array, scale: Array, bias: Array, *, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)


def _positions(c: BertConfig, tokens_BT: Array, segments_BT: Array | None) -> Array:
    """Counted from 0 in each segment; with an offset, text alone is counted."""
    counted_BT = jnp.ones_like(tokens_BT)
    if c.position_offset:
        counted_BT = (tokens_BT != c.pad).astype(jnp.int32)
    count_BT = jnp.cumsum(counted_BT, axis=-1)
    if segments_BT is not None:
        begins_BT = jnp.diff(segments_BT, prepend=-1) != 0
        before_BT = jnp.where(begins_BT, count_BT - counted_BT, 0)
        count_BT -= jax.lax.cummax(before_BT, axis=1)
    return count_BT * counted_BT + c.position_offset - 1
