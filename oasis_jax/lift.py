"""From coordinates back to weights."""

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
