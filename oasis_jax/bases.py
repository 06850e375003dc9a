"""How a basis is held: as an array, as a seed, or as one vector for all blocks.

A basis is an array (..., n_in, r), or one of the nodes below, which hold less and act
like it. Either way `x @ P`, what the tracker wants to know of `x`, and the lift are the
same three verbs, and leading axes (scanned layers) are batch axes. Their leaves are
float32, so that a basis can sit in a tree that is differentiated.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.compat import batched_linalg

_EXACT = jax.lax.Precision.HIGHEST

Draw = Literal["gaussian", "haar"]


class Held:
    """A basis that is not held as an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., n_in, r), as of the array it stands for."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def array(self) -> Array:
        """P, (..., n_in, r) float32."""
        raise NotImplementedError

    def project(self, x: Array, precision=None) -> Array:
        """Z = x P, (..., r) in the dtype of x."""
        return jnp.matmul(x, self.array().astype(x.dtype), precision=precision)

    def observe(self, x: Array) -> Any:
        """What its tracker wants to know of the tokens x, (..., n_in); shaped like self.

        It must be additive, as all cotangents are.
        """
        del x
        return jax.tree.map(jnp.zeros_like, self)

    def lift(self, coordinates: Array) -> Array:
        """P C, (..., n_in, n_out) float32."""
        return jnp.matmul(self.array(), coordinates)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seeded(Held):
    """A random basis of which only the seed is kept; it is drawn wherever it is used.

    Attributes:
      seed: (...) float32, whole numbers; one more is another basis.
      n_in, rank: Of the basis.
      kind: See `draw`.
      salt: Tells the bases of kernels apart that share a seed.

    Source: CompAct (arXiv 2410.15352).
    """

    seed: Array
    n_in: int = field(metadata={"static": True})
    rank: int = field(metadata={"static": True})
    kind: Draw = field(default="gaussian", metadata={"static": True})
    salt: int = field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.seed.shape, self.n_in, self.rank)

    def array(self) -> Array:
        def one(seed: Array) -> Array:
            key = jax.random.key(seed.astype(jnp.uint32))
            return _normal(jax.random.fold_in(key, self.salt), (self.n_in, self.rank))

        seeds = jax.lax.stop_gradient(self.seed)
        drawn = jax.vmap(one)(seeds.reshape(-1)).reshape(self.shape)
        return _finish(drawn, self.kind)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks(Held):
    """kron(I_groups, v): each token is cut into groups, each projected on the same v.

    Attributes:
      vector: v, (..., n_in / groups) float32, of unit length (zero while unknown).
      groups: Sub-tokens per token, the basis's rank.
      scale: Multiplies what is lifted.

    Source: VeLoRA (arXiv 2405.17991), whose rank-1 projection of sub-tokens this is.
    """

    vector: Array
    groups: int = field(metadata={"static": True})
    scale: float = field(default=1.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        *batch, size = self.vector.shape
        return (*batch, size * self.groups, self.groups)

    def array(self) -> Array:
        blocks = jnp.einsum("gh,...d->...gdh", jnp.eye(self.groups), self.vector)
        return blocks.reshape(self.shape)

    def project(self, x: Array, precision=None) -> Array:
        pieces = x.reshape(*x.shape[:-1], self.groups, -1)
        return jnp.matmul(pieces, self.vector.astype(x.dtype), precision=precision)

    def observe(self, x: Array) -> "Blocks":
        """The mean sub-token, in place of v."""
        pieces = x.astype(jnp.float32).reshape(-1, self.vector.shape[-1])
        return Blocks(jnp.mean(pieces, axis=0), self.groups, self.scale)

    def lift(self, coordinates: Array) -> Array:
        outer = self.vector[..., None, :, None] * coordinates[..., :, None, :]
        *batch, groups, size, n_out = outer.shape
        return self.scale * outer.reshape(*batch, groups * size, n_out)


Basis = Array | Held


def as_array(basis: Basis) -> Array:
    """P itself, (..., n_in, r), however it is held."""
    return basis.array() if isinstance(basis, Held) else basis


def draw(key: Array, shape: tuple[int, ...], kind: Draw = "haar") -> Array:
    """A random basis per leading index.

    Args:
      key: PRNG key.
      shape: (..., n_in, r).
      kind: 'haar': orthonormal columns, uniform among all such. 'gaussian':
        independent entries of variance 1/r, so that the mean of P P^T is I.
    """
    return _finish(_normal(key, shape), kind)


def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape, jnp.float32)


def _finish(normal: Array, kind: Draw) -> Array:
    if kind == "haar":
        return orthonormalise(normal)
    return normal / jnp.sqrt(normal.shape[-1])


def orthonormalise(a: Array) -> Array:
    """The Q of a QR factorisation with positive diagonal, by CholeskyQR applied twice.

    Matrix products and an r x r Cholesky factor only, batched over leading axes: the
    same Q as Householder's to rounding, so the columns keep their order and alignment,
    but quick to compile and to run on GPU and TPU.

    Args:
      a: (..., n, r) float32 with r <= n and condition number below about 1e3.

    Returns:
      (..., n, r) float32 with orthonormal columns.

    Example:
      >>> q = orthonormalise(jnp.ones((3, 2)) + jnp.eye(3, 2))
      >>> bool(jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-6))
      True

    Source: Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm".
    """
    for _ in range(2):
        gram = jnp.matmul(a.mT, a, precision=_EXACT)
        inverse = batched_linalg(_inverse_cholesky, gram)
        a = jnp.matmul(a, inverse.mT, precision=_EXACT)
    return a


def _inverse_cholesky(gram: Array) -> Array:
    """L^-1 for gram = L L^T, (..., r, r)."""
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    # Keeps the factor real where columns are nearly dependent; as small as the rounding
    # of the Gram matrix, and the second pass removes what it leaves.
    shift = jnp.finfo(gram.dtype).eps * jnp.trace(gram, axis1=-2, axis2=-1)
    lower = jnp.linalg.cholesky(gram + shift[..., None, None] * eye)
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)


def polar(a: Array) -> Array:
    """The orthonormal basis nearest to `a`, (..., n, r): `a (a^T a)^(-1/2)`.

    It keeps every column as close as it can to where it was, and so aligns with nothing.
    """
    gram = jnp.matmul(a.mT, a, precision=_EXACT)
    values, vectors = batched_linalg(jnp.linalg.eigh, gram)
    root = (vectors / jnp.sqrt(values)[..., None, :]) @ vectors.mT
    return jnp.matmul(a, root, precision=_EXACT)


def motion(new: Basis, old: Basis) -> Array:
    """How coordinates change when the basis moves, (..., r, r) float32.

    R = P_new^T P_old N^-1, where N holds the squared lengths of P_old's columns (I where
    they are orthonormal); exactly I where the basis stood still.
    """
    same = [
        jnp.all(a == b, axis=tuple(range(len(old.shape) - 2, a.ndim)))
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    ]
    stood = jnp.all(jnp.stack(same), axis=0)[..., None, None]
    rank = new.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(rank), (*stood.shape[:-2], rank, rank))

    def overlap() -> Array:
        p_new, p_old = (as_array(b).astype(jnp.float32) for b in (new, old))
        lengths = jnp.sum(jnp.square(p_old), axis=-2, keepdims=True)
        unit = p_old / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)
        return jnp.where(stood, eye, jnp.matmul(p_new.mT, unit, precision=_EXACT))

    # A basis held as a seed is drawn here only when it has changed.
    return jax.lax.cond(jnp.all(stood), lambda: eye, overlap)
