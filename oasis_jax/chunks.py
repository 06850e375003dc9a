"""Walking over an axis in pieces of one size, without padding it.

Where the pieces do not fit, the last one starts early enough to end with the axis, and
sees again some of what the one before it saw. `fresh` tells what it has not.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Chunks(NamedTuple):
    """Pieces of an axis.

    Attributes:
      total: Length of the axis.
      size: Of every piece; no more than `total`.
      pieces: How many.
    """

    total: int
    size: int
    pieces: int

    def start(self, index: Array) -> Array:
        """Where piece `index` begins."""
        return jnp.minimum(index * self.size, self.total - self.size)

    def positions(self, index: Array) -> Array:
        """(size,) int32: the places that piece `index` covers."""
        return self.start(index) + jnp.arange(self.size)

    def fresh(self, index: Array) -> Array:
        """(size,) bool: which of them no piece before has covered."""
        return self.positions(index) >= index * self.size

    def take(self, a: Array, index: Array, axis: int = 1) -> Array:
        """Piece `index` of an array."""
        return lax.dynamic_slice_in_dim(a, self.start(index), self.size, axis)

    def put(self, a: Array, piece: Array, index: Array, axis: int = 1) -> Array:
        """The array with piece `index` replaced."""
        return lax.dynamic_update_slice_in_dim(a, piece, self.start(index), axis)

    def add(self, a: Array, piece: Array, index: Array, axis: int = 1) -> Array:
        """The array with something added to piece `index`."""
        return self.put(a, self.take(a, index, axis) + piece, index, axis)


def chunks(total: int, limit: int) -> Chunks:
    """As few pieces of at most `limit` as there can be, and hardly larger than needed.

    Example:
      >>> chunks(4097, 2048)
      Chunks(total=4097, size=1368, pieces=3)
      >>> chunks(100, 2048)
      Chunks(total=100, size=100, pieces=1)
    """
    pieces = max(1, -(-total // limit))
    size = -(-total // pieces)
    # Matrix units like multiples of eight.
    size = min(-(-size // 8) * 8, limit, total)
    return Chunks(total, size, pieces)
