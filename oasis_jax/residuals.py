"""What is kept between the passes: by which name, and in how many bits.

A model runs each block under `jax.checkpoint` with `policy(names)`: whatever has one of
the names is kept, the rest is recomputed. The names:

    coefficients  Z: what projected layers and compressed norms keep of a token
    observed      what they tell of all tokens together: energy gradients; and statistics
    qkv           queries, keys and values, before the rotation
    attention     attention's output and the logarithms of its denominators
    middle        the residual stream between attention and MLP
    gate_up       both inputs of SwiGLU

and `narrow` keeps what is left in eight bits.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

COEFFICIENTS, OBSERVED, QKV, ATTENTION, MIDDLE, GATE_UP = NAMES = (
    "coefficients",
    "observed",
    "qkv",
    "attention",
    "middle",
    "gate_up",
)

WIDTHS = ("whole", "fp8", "int8")
"""As they are, or 8 bits with a scale per token."""


def keep(tree: Any, name: str) -> Any:
    """The same arrays, with a name for `policy`."""
    return jax.tree.map(lambda a: checkpoint_name(a, name), tree)


def policy(names: Collection[str]) -> Callable[..., bool]:
    """For `jax.checkpoint`: keeps what has one of these names, recomputes the rest."""
    if not names:
        return jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint_policies.save_only_these_names(*names)


# ---- Eight bits ----


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Narrow:
    """An array in 8 bits.

    Attributes:
      values: (..., n) int8 or float8_e4m3fn.
      scale: (..., 1) float32; `values * scale` is the array.
      dtype: Of the array.
    """

    values: Array
    scale: Array
    dtype: Any = field(metadata={"static": True})

    def widened(self) -> Array:
        """The array, (..., n), rounded."""
        return (self.values.astype(jnp.float32) * self.scale).astype(self.dtype)


def narrowed(x: Array, width: str) -> Narrow:
    """In 8 bits, with the largest entry of each last axis at the end of the range.

    Args:
      x: (..., n), floating.
      width: 'int8': an error of at most 1/254 of the largest entry, everywhere.
        'fp8': of at most 1/16 of each entry, but for the very small ones.

    Example:
      >>> narrowed(jnp.array([[1.0, -127.0, 0.4]]), "int8").widened()
      Array([[   1., -127.,    0.]], dtype=float32)
    """
    dtype, top = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}[width]
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    # Never zero, nor so small that it counts as zero; and a NaN stays one.
    scale = jnp.maximum(largest / top, jnp.finfo(jnp.float32).tiny)
    values = wide / scale
    if width == "int8":
        values = jnp.round(values)
    return Narrow(values.astype(dtype), scale, x.dtype)


def narrow(function: Callable, width: str) -> Callable:
    """The function, with what its backward pass keeps of every token in 8 bits.

    The value is exact. Of what autodiff keeps between the passes, arrays with an entry
    per token, shaped like `x` but for the axes behind the first two, are kept in 8 bits
    each, also `x` itself; weights, bases and statistics are kept as they are.

    Args:
      function: `function(variables, x, *rest) -> y`; `variables` is a pytree, and so is
        each of `rest`, for which there is no gradient.
      width: One of `WIDTHS`; 'whole' returns the function as it is.

    Raises:
      ValueError: if there is no such width.

    Source: ours; that activations bear it, ActNN and COAT (see docs/methods.md).
    """
    if width not in WIDTHS:
        raise ValueError(f"residuals is {width!r}, expected one of {WIDTHS}")
    if width == "whole":
        return function

    @jax.custom_vjp
    def call(variables, x, *rest):
        return function(variables, x, *rest)

    def forward(variables, x, *rest):
        y, pullback = jax.vjp(lambda v, x: function(v, x, *rest), variables, x)

        def encode(leaf):
            tokens = leaf.ndim > 2 and leaf.shape[:2] == x.shape[:2]
            if tokens and jnp.issubdtype(leaf.dtype, jnp.floating):
                return narrowed(leaf, width)
            return leaf

        # The pullback is a pytree, whose leaves are what it keeps.
        return y, (jax.tree.map(encode, pullback), len(rest) * (None,))

    def backward(kept, dy):
        encoded, nothing = kept
        pullback = jax.tree.map(_widen, encoded, is_leaf=_is_narrow)
        return *pullback(dy), *nothing

    call.defvjp(forward, backward)
    return call


def _is_narrow(node: Any) -> bool:
    return isinstance(node, Narrow)


def _widen(node: Any) -> Any:
    return node.widened() if _is_narrow(node) else node
