"""Trackers: where a basis starts and how it follows what it observes.

A tracker is a pair of pure functions, `init(key, shape) -> basis` and
`update(basis, observation, step, key) -> basis`, written as a small frozen dataclass so
that two trackers with the same settings are equal (JAX compares static values). The
observation is the energy gradient `S = X^T X P / N` that `projected_dense` returns as the
basis's cotangent. Leading axes of a basis (scanned layers) are batch axes throughout.

A basis that stands still must come back bit for bit: that is how the train state knows
that nothing moved.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.compat import batched_linalg

# The `step` of the updates that happen before the first optimizer step, on the first
# batch, whose only purpose is to make the basis useful from the start.
WARM_START = -1

_EXACT = jax.lax.Precision.HIGHEST


class Tracker(Protocol):
    """An `init`/`update` pair; see the module's docstring."""

    name: ClassVar[str]

    def init(self, key: Array, shape: tuple[int, ...]) -> Array:
        """A first orthonormal basis, (..., n_in, r) float32."""
        ...

    def update(
        self, basis: Array, observation: Array, step: Array, key: Array
    ) -> Array:
        """The basis for the next step; same shape and dtype, orthonormal columns.

        Args:
          basis: (..., n_in, r), orthonormal columns.
          observation: The energy gradient S, (..., n_in, r).
          step: int32 scalar, optimizer steps taken so far, or `WARM_START`.
          key: A PRNG key for this basis and step.
        """
        ...


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


def motion(new: Array, old: Array) -> Array:
    """R = P_new^T P_old, (..., r, r) float32; exactly I where the basis stood still."""
    overlap = jnp.matmul(
        new.astype(jnp.float32).mT, old.astype(jnp.float32), precision=_EXACT
    )
    stood = jnp.all(new == old, axis=(-2, -1), keepdims=True)
    return jnp.where(stood, jnp.eye(new.shape[-1], dtype=jnp.float32), overlap)


def _random_basis(key: Array, shape: tuple[int, ...]) -> Array:
    """A Haar-distributed basis per leading index."""
    return orthonormalise(jax.random.normal(key, shape, jnp.float32))


# A column that captures less than this share of the mean moves as if it captured so much.
_FLOOR = 0.01


def _scale_free(basis: Array, observation: Array) -> Array:
    """S with each column in units of what its own column of P captures, diag(P^T S)."""
    captured = jnp.sum(basis * observation, axis=-2, keepdims=True)
    mean = jnp.mean(captured, axis=-1, keepdims=True)
    unit = jnp.maximum(captured, _FLOOR * mean)
    return jnp.where(mean > 0, observation / jnp.where(mean > 0, unit, 1), 0)


@dataclass(frozen=True)
class Oja:
    """Follows the principal subspace of the activations, a little every step.

    One step of orthogonal iteration, relaxed by the old basis:

        P <- Q of QR(P + h S D^-1),   D = diag(P^T S),

    with `h = max(rate, first / (1 + step))`. D holds what each column captures, so
    every column moves at its own scale: multiplying the activations by a constant
    changes nothing, and strong columns do not swamp weak ones.

    Attributes:
      rate: h in the long run. Large values follow the last batch, small ones average.
      first: h at the first step, and at each iteration of the warm start.
      axes: Which coordinates the columns are aligned with inside their span.
        `activations`: the principal axes, in order, as QR leaves them. `gradient`:
        the eigenvectors of a running mean of C C^T. `none`: a polar retraction, which
        turns nothing that need not turn.
      decay: Of the running mean of C C^T, for `axes="gradient"`.

    Source: OASIS (arXiv 2604.09406) names an online Oja update followed by
    re-orthogonalisation; normalisation, schedule and alignment are our reconstruction.
    """

    rate: float = 2.0
    first: float = 8.0
    axes: Literal["activations", "gradient", "none"] = "activations"
    decay: float = 0.95
    name: ClassVar[str] = "oja"

    def __post_init__(self):
        if self.axes not in ("activations", "gradient", "none"):
            raise ValueError(
                f"oja: axes is {self.axes!r}, expected 'activations', 'gradient' or"
                " 'none'"
            )
        if not (self.rate > 0 and self.first > 0):
            raise ValueError(
                f"oja: rate {self.rate} and first {self.first} must be positive"
            )

    def init(self, key: Array, shape: tuple[int, ...]) -> Array:
        return _random_basis(key, shape)

    def update(
        self, basis: Array, observation: Array, step: Array, key: Array
    ) -> Array:
        del key
        p = basis.astype(jnp.float32)
        s = _scale_free(p, observation.astype(jnp.float32))
        step = jnp.maximum(step, 0)
        h = jnp.maximum(self.rate, self.first / (1 + step))
        retract = polar if self.axes == "none" else orthonormalise
        return retract(p + h * s).astype(basis.dtype)

    def align(self, basis: Array, gram: Array) -> Array:
        """The rotation that turns the columns to the eigenvectors of `gram`.

        Args:
          basis: (..., n_in, r).
          gram: Running mean of C C^T in the coordinates of `basis`, (..., r, r).

        Returns:
          (..., r, r); the aligned basis is `basis @ rotation`, strongest column first.
        """
        _, vectors = batched_linalg(jnp.linalg.eigh, gram)
        return vectors[..., ::-1]


@dataclass(frozen=True)
class Random:
    """A new random basis every `interval` steps; it observes nothing.

    Source: RSO (arXiv 2502.07222) and CompAct (arXiv 2410.15352) draw Gaussian ones;
    these are orthonormal.
    """

    interval: int = 50
    name: ClassVar[str] = "random"

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError(
                f"random: interval is {self.interval}, expected at least 1"
            )

    def init(self, key: Array, shape: tuple[int, ...]) -> Array:
        return _random_basis(key, shape)

    def update(
        self, basis: Array, observation: Array, step: Array, key: Array
    ) -> Array:
        del observation
        step = jnp.asarray(step)
        due = (step >= 0) & ((step + 1) % self.interval == 0)
        return jax.lax.cond(
            due,
            lambda: _random_basis(key, basis.shape).astype(basis.dtype),
            lambda: basis,
        )


@dataclass(frozen=True)
class Fixed:
    """The first batch's principal subspace, if there is a warm start; then it stays.

    Without a warm start it is a random subspace that never moves.
    """

    first: float = Oja.first
    name: ClassVar[str] = "fixed"

    def init(self, key: Array, shape: tuple[int, ...]) -> Array:
        return _random_basis(key, shape)

    def update(
        self, basis: Array, observation: Array, step: Array, key: Array
    ) -> Array:
        return jax.lax.cond(
            jnp.asarray(step) == WARM_START,
            lambda: Oja(first=self.first).update(basis, observation, step, key),
            lambda: basis,
        )


TRACKERS: dict[str, type] = {t.name: t for t in (Oja, Random, Fixed)}
