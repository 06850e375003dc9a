"""The configuration of a LLaMA, and the shapes under which some are known.

`oasis_jax.models.llama` has all of it too, beside the model.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from oasis_jax.models.blocks import check_kept


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary rates are slowed for longer texts than were first trained on.

    Attributes:
      factor: By which slow rates are divided.
      original: Most tokens of a sequence before; with it the type is 'llama3', without
        'linear', where all rates are slowed.
      low, high: Rates that turn fewer than `low` times in `original` tokens are slowed,
        more than `high` times kept, and in between mixed.
    """

    factor: float
    original: int | None = None
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self):
        if self.factor <= 0 or self.low >= self.high:
            raise ValueError(
                f"factor is {self.factor}, low {self.low} and high {self.high}, "
                "expected factor > 0 and low < high"
            )

    def __call__(self, rates: Array) -> Array:
        """Rates in radians per token, slowed."""
        if self.original is None:
            return rates / self.factor
        turns = self.original * rates / (2 * jnp.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return kept * rates + (1 - kept) * rates / self.factor


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and dtypes of a LLaMA.

    Attributes:
      width, hidden: Of the residual stream and of the MLP.
      layers, heads, kv_heads: Counts; `heads` must divide by `kv_heads`.
      tied: Whether the output head is the embedding, transposed.
      head_size: `width // heads` if 0.
      rope_scaling: None leaves the rotary rates as they are.
      positions: Most tokens that a sequence may have; None is no bound.
      qkv_bias: Whether q, k and v have biases (Qwen 2).
      qk_norm: Whether each head of q and k passes an RMSNorm (Qwen 3).
      dtype, param_dtype: Of the computation and of the parameters.
      remat: One of `blocks.REMAT`.
      residuals: What is kept of a block: 'whole', or 'fp8' or 'int8' with a scale per
        token (`oasis_jax.residuals`).
      loss_chunk: Tokens whose logits exist at once where the loss is asked for.
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
    rope_scaling: RopeScaling | None = None
    positions: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "elementwise"
    residuals: str = "whole"
    loss_chunk: int = 2048

    def __post_init__(self):
        check_kept(self.remat, self.residuals)
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
        128_256,
        2048,
        8192,
        16,
        32,
        8,
        tied=True,
        rope_theta=5e5,
        norm_eps=1e-5,
        rope_scaling=RopeScaling(32.0, 8192),
        positions=131_072,
    ),
    "llama-3-8b": LlamaConfig(
        128_256, 4096, 14336, 32, 32, 8, rope_theta=5e5, norm_eps=1e-5
    ),
    "qwen-2.5-0.5b": LlamaConfig(
        151_936,
        896,
        4864,
        24,
        14,
        2,
        tied=True,
        rope_theta=1e6,
        positions=32_768,
        qkv_bias=True,
    ),
    "qwen-3-0.6b": LlamaConfig(
        151_936,
        1024,
        3072,
        28,
        16,
        8,
        tied=True,
        head_size=128,
        rope_theta=1e6,
        positions=40_960,
        qk_norm=True,
    ),
    # Version 0.3, which has no sliding window.
    "mistral-7b": LlamaConfig(
        32_768,
        4096,
        14336,
        32,
        32,
        8,
        rope_theta=1e6,
        norm_eps=1e-5,
        positions=32_768,
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
