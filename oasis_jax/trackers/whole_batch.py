"""Trackers that ask for a whole batch every so often, before a step uses it."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from oasis_jax.bases import Blocks, draw, orthonormalise
from oasis_jax.compat import batched_linalg
from oasis_jax.trackers.base import Tracker, every, renews
from oasis_jax.trackers.every_step import Oja


@dataclass(frozen=True)
class Svd(Tracker):
    """The leading right singular vectors of the activations, renewed every `interval`.

    A renewal is `passes` block power iterations with a Rayleigh-Ritz rotation each, on
    the batch of that step. Each costs a forward pass and converges by the ratio of the
    squared singular values on either side of the rank.

    Attributes:
      interval: Optimizer steps between renewals.

    Source: PRAC (arXiv 2602.23111), which takes the SVD of the input itself.
    """

    interval: int = 500
    name: ClassVar[str] = "svd"
    passes: ClassVar[int] = 8

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError(f"svd: interval is {self.interval}, expected at least 1")

    def init(self, key: Array, shape: tuple[int, ...]) -> Array:
        return draw(key, shape)

    def update(
        self, basis: Array, observation: Array, step: Array, key: Array
    ) -> Array:
        del key
        return _power_iteration(basis, observation) if renews(step) else basis

    def due(self, step: Array) -> Array:
        return step % self.interval == 0


# What is left of the old basis in a power iteration: it keeps columns apart where the
# activations have no energy, and costs a hundredth of the convergence.
_MEMORY = 0.01


def _power_iteration(basis: Array, observation: Array) -> Array:
    """One block power iteration, its columns in order of the energy they capture.

    In the Ritz basis P^T S is diagonal, so no column of S holds a multiple of another's
    direction, and each can be brought to unit length however little it captures.
    """
    p, s = basis.astype(jnp.float32), observation.astype(jnp.float32)
    overlap = p.mT @ s
    _, vectors = batched_linalg(jnp.linalg.eigh, (overlap + overlap.mT) / 2)
    # Strongest first; an eigenvector has no sign, so its largest entry gets the plus.
    largest = jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True)
    signs = jnp.sign(jnp.take_along_axis(vectors, largest, axis=-2))
    rotation = (signs * vectors)[..., ::-1]
    p, s = p @ rotation, s @ rotation
    lengths = jnp.linalg.norm(s, axis=-2, keepdims=True)
    unit = jnp.where(lengths > 0, s / jnp.where(lengths > 0, lengths, 1), 0)
    return orthonormalise(_MEMORY * p + unit).astype(basis.dtype)


@dataclass(frozen=True)
class Complement(Tracker):
    """A tracked principal part, and random directions of what it leaves out.

    P = [Q1, c Q2]: Q1, (n_in, r1), moves as `principal` says; Q2, (n_in, r2), is uniform
    among the bases of subspaces orthogonal to Q1. With `unbiased`, c^2 = k =
    (n_in - r1) / r2, and then the mean of X P P^T over Q2 is X; else c = 1.

    Attributes:
      principal: Tracker of Q1.
      share: r1 / r.
      interval: Optimizer steps between two Q2; it is drawn anew with a renewed Q1 too,
        and turned just enough to stay orthogonal to one that moves.
      unbiased: Whether Q2 is scaled.

    Source: PRAC (arXiv 2602.23111), equations of the compression and theorem 6; that Q1
    may move at every step is ours.
    """

    principal: Tracker = Oja()
    share: float = 0.5
    interval: int = 20
    unbiased: bool = False
    name: ClassVar[str] = "complement"

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(
                f"complement: share is {self.share}, expected between 0 and 1"
            )
        if self.interval < 1:
            raise ValueError(
                f"complement: interval is {self.interval}, expected at least 1"
            )

    @property
    def passes(self) -> int:  # type: ignore[override]
        return self.principal.passes

    def due(self, step: Array) -> Array:
        return self.principal.due(step)

    def check(self, n_in: int, rank: int) -> None:
        super().check(n_in, rank)
        if not 0 < self._split(rank) < rank:
            raise ValueError(
                f"rank {rank}, which leaves no column for a part at share {self.share}"
            )

    def _split(self, rank: int) -> int:
        return round(self.share * rank)

    def _lengths(self, n_in: int, rank: int) -> Array:
        r1 = self._split(rank)
        c = np.sqrt((n_in - r1) / (rank - r1)) if self.unbiased else 1.0
        return jnp.concatenate([jnp.ones(r1), jnp.full(rank - r1, c, jnp.float32)])

    def init(self, key: Array, shape: tuple[int, ...]) -> Array:
        return draw(key, shape) * self._lengths(*shape[-2:])

    def update(
        self, basis: Array, observation: Array, step: Array, key: Array
    ) -> Array:
        *_, n_in, rank = basis.shape
        r1, lengths = self._split(rank), self._lengths(n_in, rank)
        # S = X^T X P / N, so its columns have P's lengths.
        p, s = basis / lengths, observation / lengths
        ours, theirs = jax.random.split(key)
        if renews(step):
            # The random columns serve as the iteration's oversampling.
            q1 = self.principal.update(p, s, step, theirs)[..., :r1]
            due = jnp.asarray(True)
        else:
            q1 = self.principal.update(p[..., :r1], s[..., :r1], step, theirs)
            due = every(self.interval, step)

        def rest() -> Array:
            fresh = jax.random.normal(ours, (*p.shape[:-1], rank - r1), p.dtype)
            q2 = jnp.where(due, fresh / np.sqrt(n_in), p[..., r1:])
            q2 -= q1 @ (q1.mT @ q2)
            q = orthonormalise(jnp.concatenate([q1, q2], axis=-1))
            # Twice, since where P is nearly square little of a random Q2 is left.
            return orthonormalise(q) * lengths

        moved = due | jnp.any(q1 != p[..., :r1])
        return jax.lax.cond(moved, rest, lambda: basis).astype(basis.dtype)


@dataclass(frozen=True)
class BlockMean(Tracker):
    """The mean sub-token, of unit length, shared by all blocks; rank is their number.

    Attributes:
      average: Of which batch: 'once', the first one; 'batch', each one; or a number a
        in (0, 1), the running mean normalise(a v + (1 - a) mean).
      scale: Multiplies the gradients of its kernels.

    Source: VeLoRA (arXiv 2405.17991).
    """

    average: float | Literal["once", "batch"] = "once"
    scale: float = 1.0
    name: ClassVar[str] = "block_mean"
    passes: ClassVar[int] = 1

    def __post_init__(self):
        if self.average not in ("once", "batch") and not (
            isinstance(self.average, float) and 0 < self.average < 1
        ):
            raise ValueError(
                f"block_mean: average is {self.average!r}, expected 'once', 'batch' or"
                " a number between 0 and 1"
            )

    def check(self, n_in: int, rank: int) -> None:
        if n_in % rank:
            raise ValueError(
                f"{rank} groups, which do not divide its {n_in} input features"
            )

    def init(self, key: Array, shape: tuple[int, ...]) -> Blocks:
        del key
        *batch, n_in, groups = shape
        return Blocks(jnp.zeros((*batch, n_in // groups)), groups, self.scale)

    def update(
        self, basis: Blocks, observation: Blocks, step: Array, key: Array
    ) -> Blocks:
        del key
        old, mean = basis.vector, observation.vector
        if not isinstance(self.average, str):
            mean = self.average * old + (1 - self.average) * mean
        length = jnp.linalg.norm(mean, axis=-1, keepdims=True)
        known = jnp.any(old != 0, axis=-1, keepdims=True)
        # Only from a whole batch, or, if nobody asked for a renewal, at once.
        wanted = (renews(step) | ~known) & (length > 0)
        new = jnp.where(wanted, mean / jnp.where(length > 0, length, 1), old)
        return replace(basis, vector=new)

    def due(self, step: Array) -> Array:
        return step == 0 if self.average == "once" else jnp.asarray(True)
