"""Averages over microbatches: what a batch gives, a part of it at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from oasis_jax.paths import flatten_paths


def accumulate(once: Callable, args: tuple, count: int, has_aux: bool = False) -> Any:
    """Averages `once` over microbatches cut from the leading axis of `args`.

    Args:
      once: `once(*args)` returns `(loss, tree)`, or with `has_aux` `((loss, aux), tree)`.
      args: Trees of arrays, (batch, ...).
      count: Number of microbatches; 1 calls `once` as it is.
      has_aux: Whether there is an `aux`.

    Returns:
      As `once` does, with `loss` and `tree` averaged in float32 and brought back to
      their dtypes; every `aux` is stacked.

    Raises:
      ValueError: if a batch does not divide into the microbatches.

    Example:
      >>> half = lambda x: (jnp.mean(x), {'x': x})
      >>> accumulate(half, (jnp.arange(4.0),), 2)
      (Array(1.5, dtype=float32), {'x': Array([1., 2.], dtype=float32)})
    """
    if count == 1:
        return once(*args)
    for path, leaf in flatten_paths(args).items():
        if leaf.shape[0] % count:
            raise ValueError(
                f"argument {path} has a batch of {leaf.shape[0]}, which does not divide"
                f" into {count} microbatches"
            )
    cut = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), args)
    shapes = jax.eval_shape(once, *jax.tree.map(lambda a: a[0], cut))
    (loss_shape, grad_shapes) = shapes
    loss_shape = loss_shape[0] if has_aux else loss_shape

    def wide(leaf):
        return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))

    def body(total, micro):
        value, grads = once(*micro)
        loss, aux = value if has_aux else (value, None)
        return jax.tree.map(lambda t, g: t + g / count, total, (loss, grads)), aux

    total, aux = jax.lax.scan(body, jax.tree.map(wide, (loss_shape, grad_shapes)), cut)
    loss, grads = jax.tree.map(
        lambda t, like: t.astype(like.dtype), total, (loss_shape, grad_shapes)
    )
    return ((loss, aux) if has_aux else loss), grads
