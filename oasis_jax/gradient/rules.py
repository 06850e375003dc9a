"""Where the basis of a projected gradient comes from: its SVD, online PCA, power iteration.

A rule sees the gradients of all projected kernels at once, keyed by path, at full size,
in float32 and with the projected side first: (..., n, m). Leading axes are batch axes.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from oasis_jax.bases import motion
from oasis_jax.compat import batched_linalg
from oasis_jax.optimizer import ScaleByOasisAdamState
from oasis_jax.paths import flatten_paths

ByPath = dict[str, Array]

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Move(NamedTuple):
    """A rule's answer for one step, keyed by kernel path."""

    basis: ByPath  # P of this step, (..., n, r) float32
    observed: ByPath  # A, what P projects, (..., n, m) float32
    after: ByPath  # P from which the next step starts
    memory: Any


class BasisRule(Protocol):
    """Where a basis comes from; all its arrays are on the input side and float32."""

    def init(self, basis: ByPath, kernels: ByPath) -> Any:
        """What the rule has to remember, before the first step."""
        ...

    def move(
        self, step: Array, basis: ByPath, grads: ByPath, memory: Any, inner: Any
    ) -> Move:
        """One step of it; `inner` is the state of the transformation inside."""
        ...


@dataclass(frozen=True)
class Svd:
    """The top singular vectors of the gradient, anew every `interval` steps.

    Counted from 0, so the first step finds the first basis. A kernel whose gradient is
    zero there keeps what it has, at first the leading coordinate axes.

    Source: GaLore (arXiv 2403.03507).
    """

    interval: int = 200

    def __post_init__(self):
        check_interval(self.interval)

    def init(self, basis: ByPath, kernels: ByPath) -> Any:
        return ()

    def move(
        self, step: Array, basis: ByPath, grads: ByPath, memory: Any, inner: Any
    ) -> Move:
        due = step % self.interval == 0
        basis = jax.lax.cond(due, _leading, lambda kept, _: kept, basis, grads)
        return Move(basis, grads, basis, memory)


@dataclass(frozen=True)
class OnlinePca:
    """The first gradient's singular vectors, then one step of descent a step.

    From step 1 on, after its use, P takes one step of its own optimizer down
    `projection_error`. For an orthonormal P that is Oja's rule on the gradient.

    Attributes:
      optimizer: Of the bases, a dict by kernel path; its count is 0 at step 1.
      penalty: Weight of ||P^T P - I||^2, which keeps P near the orthonormal set. The
        paper prints it, its code has none.

    Source: Online Subspace Descent (arXiv 2408.12857).
    """

    optimizer: optax.GradientTransformation
    penalty: float = 0.0

    def init(self, basis: ByPath, kernels: ByPath) -> Any:
        return self.optimizer.init(basis)

    def move(
        self, step: Array, basis: ByPath, grads: ByPath, memory: Any, inner: Any
    ) -> Move:
        def start():
            first = _leading(basis, grads)
            return first, first, memory

        def follow():
            down = jax.grad(projection_error)
            slopes = {p: down(basis[p], grads[p], self.penalty) for p in basis}
            updates, remembered = self.optimizer.update(slopes, memory, basis)
            moved = optax.apply_updates(basis, updates)
            return basis, jax.tree.map(_sound, moved, basis, grads), remembered

        basis, after, memory = jax.lax.cond(step == 0, start, follow)
        return Move(basis, grads, after, memory)


@dataclass(frozen=True)
class PowerIteration:
    """One warm block power iteration a step, before the gradient is projected.

        A = G + E
        B = rho P M / (1 - b1^t) + (1 - rho) A
        P <- Q of QR(B B^T P), with a positive diagonal; at t = 0 the SVD of A
        E <- A - P P^T A + b1 / (1 - b1) (P_old M - P R M)        R = P^T P_old

    M is the first moment in the old coordinates, so the transformation inside must be
    `adam_in_coordinates` with the same b1.

    Attributes:
      rho: Weight of the mean against the newest gradient.
      b1: Decay rate of M.
      error_feedback: Adds what earlier steps left out, E, to the gradient. It is
        float32 and as large as the kernel; without it E = 0 takes no memory.

    Source: LDAdam (arXiv 2410.16103).
    """

    rho: float = 0.908
    b1: float = 0.908
    error_feedback: bool = True

    def init(self, basis: ByPath, kernels: ByPath) -> Any:
        return jax.tree.map(jnp.zeros_like, kernels) if self.error_feedback else ()

    def move(
        self, step: Array, basis: ByPath, grads: ByPath, memory: Any, inner: Any
    ) -> Move:
        if not isinstance(inner, ScaleByOasisAdamState):
            raise TypeError(
                "PowerIteration reads the first moment of adam_in_coordinates, but the"
                f" state inside is {type(inner).__name__}"
            )
        moments = flatten_paths(inner.mu)
        means = {path: moments[path].astype(jnp.float32) for path in basis}
        mass = 1 - self.b1 ** jnp.maximum(step, 1)
        observed = grads
        if self.error_feedback:
            observed = jax.tree.map(jnp.add, grads, memory)

        def power(old, a, mean):
            blend = self.rho * _dot(old, mean / mass) + (1 - self.rho) * a
            return _sound(_positive_q(_dot(blend, _dot(blend.mT, old))), old, a)

        def error(new, old, a, mean):
            lag = _dot(old, mean) - _dot(new, _dot(motion(new, old), mean))
            return a - _dot(new, _dot(new.mT, a)) + self.b1 / (1 - self.b1) * lag

        moved = jax.lax.cond(
            step == 0,
            lambda: _leading(basis, observed),
            lambda: jax.tree.map(power, basis, observed, means),
        )
        if self.error_feedback:
            memory = jax.tree.map(error, moved, basis, observed, means)
        return Move(moved, observed, moved, memory)


def projection_error(basis: Array, grad: Array, penalty: float = 0.0) -> Array:
    """||P P^T Gn - Gn||^2 + penalty ||P^T P - I||^2, with Gn = G / ||G||.

    Args:
      basis: P, (..., n, r) float32.
      grad: G, (..., n, m) float32; each matrix is divided by its own Frobenius norm.
      penalty: See `OnlinePca`.

    Returns:
      Its sum over the leading axes, a scalar.

    Source: Online Subspace Descent (arXiv 2408.12857), with the norm of its code.
    """
    norm = jnp.linalg.norm(grad, axis=(-2, -1), keepdims=True)
    unit = grad / jnp.where(norm > 0, norm, 1)
    error = jnp.sum(jnp.square(_dot(basis, _dot(basis.mT, unit)) - unit))
    skew = _dot(basis.mT, basis) - jnp.eye(basis.shape[-1])
    return error + penalty * jnp.sum(jnp.square(skew))


def _leading(basis: ByPath, grads: ByPath) -> ByPath:
    """The top left singular vectors, as many as each basis has columns."""

    def leaf(old, grad):
        rank, m = old.shape[-1], grad.shape[-1]
        # The thin factor has m columns at most; only a forced side can ask for more.
        svd = functools.partial(jnp.linalg.svd, full_matrices=rank > m)
        vectors = batched_linalg(lambda a: svd(a)[0], grad)
        return _sound(vectors[..., :rank], old, grad)

    return jax.tree.map(leaf, basis, grads)


def _positive_q(a: Array) -> Array:
    """Q of a QR with positive diagonal.

    Householder's, not `orthonormalise`: B B^T P squares the singular values, and whole
    columns of it vanish where the gradient has lost rank.
    """
    q, r = batched_linalg(jnp.linalg.qr, a)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    return q * jnp.where(diagonal < 0, -1, 1)[..., None, :]


def _sound(new: Array, old: Array, observed: Array) -> Array:
    """`new`, or `old` for the layers where nothing was seen or `new` is not finite."""
    seen = jnp.any(observed != 0, axis=(-2, -1), keepdims=True)
    finite = jnp.all(jnp.isfinite(new), axis=(-2, -1), keepdims=True)
    return jnp.where(seen & finite, new, old)


def check_interval(interval: int) -> None:
    """Refuses an interval below one step."""
    if interval < 1:
        raise ValueError(f"interval is {interval}, expected at least 1")
