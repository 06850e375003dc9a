"""Trackers that move, or draw anew, from what a step itself observes; one stays."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.bases import Basis, Draw, Seeded, draw, orthonormalise, polar
from oasis_jax.compat import batched_linalg
from oasis_jax.trackers.base import Tracker, every, renews

# A column that captures less than this share of the mean moves as if it captured so much.
_FLOOR = 0.01


def _scale_free(basis: Array, observation: Array) -> Array:
    """S with each column in units of what its own column of P captures, diag(P^T S)."""
    captured = jnp.sum(basis * observation, axis=-2, keepdims=True)
    mean = jnp.mean(captured, axis=-1, keepdims=True)
    unit = jnp.maximum(captured, _FLOOR * mean)
    return jnp.where(mean > 0, observation / jnp.where(mean > 0, unit, 1), 0)


@dataclass(frozen=True)
class Oja(Tracker):
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
        return draw(key, shape)

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
class Random(Tracker):
    """A new random basis every `interval` steps; it observes nothing.

    Attributes:
      interval: Optimizer steps between two bases.
      kind: Distribution, as in `oasis_jax.bases.draw`.
      stored: Keep the basis; else only its seed, and draw it wherever it is used.
      shared: One basis for all kernels of an input, so that its coefficients are saved
        once; else one each (which takes a seed: `stored=False`).

    Source: RSO (arXiv 2502.07222) and CompAct (arXiv 2410.15352).
    """

    interval: int = 50
    kind: Draw = "haar"
    stored: bool = True
    shared: bool = True
    name: ClassVar[str] = "random"

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError(
                f"random: interval is {self.interval}, expected at least 1"
            )
        if self.kind not in ("haar", "gaussian"):
            raise ValueError(
                f"random: kind is {self.kind!r}, expected 'haar' or 'gaussian'"
            )
        if self.stored and not self.shared:
            raise ValueError("random: a basis of its own per kernel needs stored=False")

    def init(self, key: Array, shape: tuple[int, ...]) -> Basis:
        if self.stored:
            return draw(key, shape, self.kind)
        *batch, n_in, rank = shape
        # float32 counts exactly to 2^24, which leaves room for 2^23 renewals.
        seeds = jax.random.randint(key, batch, 0, 2**23).astype(jnp.float32)
        return Seeded(seeds, n_in, rank, self.kind)

    def update(self, basis: Any, observation: Any, step: Array, key: Array) -> Any:
        del observation
        due = every(self.interval, step)
        if isinstance(basis, Seeded):
            return replace(basis, seed=basis.seed + due)
        return jax.lax.cond(
            due,
            lambda: draw(key, basis.shape, self.kind).astype(basis.dtype),
            lambda: basis,
        )


@dataclass(frozen=True)
class Fixed(Tracker):
    """The first batch's principal subspace, if there is a warm start; then it stays.

    Without a warm start it is a random subspace that never moves.
    """

    first: float = Oja.first
    name: ClassVar[str] = "fixed"

    def init(self, key: Array, shape: tuple[int, ...]) -> Array:
        return draw(key, shape)

    def update(
        self, basis: Array, observation: Array, step: Array, key: Array
    ) -> Array:
        if not renews(step):
            return basis
        return Oja(first=self.first).update(basis, observation, step, key)
