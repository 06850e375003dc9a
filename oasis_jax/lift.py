"""From coordinates back to weights: as a full-size update, or into the weights in place."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.bases import Basis, Held


def lift(basis: Basis, coordinates: Array, dtype=None) -> Array:
    """P D: an update in the subspace as an update of the kernel.

    Args:
      basis: P, (..., n_in, r), an array or otherwise held.
      coordinates: D, (..., r, n_out) float32.
      dtype: Of the result; the coordinates' own if None. The product is accumulated in
        float32 either way.

    Returns:
      (..., n_in, n_out).

    Raises:
      ValueError: if the ranks differ; the message names both shapes.

    Example:
      >>> lift(jnp.eye(4, 2), jnp.ones((2, 3))).shape
      (4, 3)
    """
    if basis.shape[-1] != coordinates.shape[-2]:
        raise ValueError(
            f"lift: basis has shape {basis.shape}, coordinates {coordinates.shape};"
            f" rank {basis.shape[-1]} is not {coordinates.shape[-2]}"
        )
    if isinstance(basis, Held):
        product = basis.lift(coordinates)
    else:
        product = jnp.matmul(
            basis.astype(coordinates.dtype),
            coordinates,
            preferred_element_type=jnp.float32,
        )
    return product.astype(dtype or coordinates.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """The update of a projected kernel before its lift: P D + d W.

    It is linear in its leaves, so that whatever scales an Optax update scales this one.

    Attributes:
      coordinates: D, (..., r, n_out) float32.
      decay: d, () float32.
    """

    coordinates: Array
    decay: Array

    def applied(self, kernel: Array, basis: Basis, when: Array | bool = True) -> Array:
        """W + P D + d W, made one matrix at a time inside the kernel's own buffer.

        A stack of layers has one product P D alive at a time, where the full-size update
        would be as large as all weights together.

        Args:
          kernel: W, (..., n_in, n_out).
          basis: P, (..., n_in, r), an array or otherwise held.
          when: Where False, bool (), the kernel comes back bit for bit.

        Returns:
          Like `kernel`; the sum is rounded once, from float32.

        Example:
          >>> step = Step(jnp.ones((2, 3)), jnp.float32(-0.5))
          >>> step.applied(jnp.ones((4, 3)), jnp.eye(4, 2))[:, 0]
          Array([1.5, 1.5, 0.5, 0.5], dtype=float32)
        """

        def one(w: Array, p: Any, d: Array) -> Array:
            wide = w.astype(jnp.float32)
            new = wide + lift(p, d) + self.decay * wide
            return jnp.where(when, new.astype(w.dtype), w)

        if kernel.ndim == 2:
            return one(kernel, basis, self.coordinates)
        flat, axes = kernel.reshape(-1, *kernel.shape[-2:]), kernel.ndim - 2
        layers = jax.tree.map(
            lambda a: a.reshape(-1, *a.shape[axes:]), (basis, self.coordinates)
        )

        def body(i: Array, flat: Array) -> Array:
            p, d = jax.tree.map(lambda a: a[i], layers)
            return flat.at[i].set(one(flat[i], p, d))

        return jax.lax.fori_loop(0, len(flat), body, flat).reshape(kernel.shape)


def is_step(node: Any) -> bool:
    """Whether an update is a `Step`."""
    return isinstance(node, Step)
