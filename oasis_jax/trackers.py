"""Trackers: where a basis starts and how it follows what it observes.

A tracker is a pair of pure functions, `init(key, shape) -> basis` and
`update(basis, observation, step, key) -> basis`, written as a small frozen dataclass so
that two trackers with the same settings are equal (JAX compares static values). The
observation is the energy gradient `S = X^T X P / N` that `projected_dense` returns as the
basis's cotangent. Leading axes of a basis (scanned layers) are batch axes throughout.

A basis that stands still must come back bit for bit: that is how the train state knows
that nothing moved.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from oasis_jax.bases import (
    Basis,
    Blocks,
    Draw,
    Seeded,
    draw,
    orthonormalise,
    polar,
)
from oasis_jax.compat import batched_linalg

# The `step` of the updates that renew a basis from a whole batch: before the first
# optimizer step, and whenever a tracker's `due` says so.
WARM_START = -1


class Tracker:
    """What all trackers have; a subclass is a frozen dataclass with a `name`."""

    name: ClassVar[str]
    # How many passes over a batch a renewal takes; 0 for a tracker that never asks.
    passes: ClassVar[int] = 0
    # Whether kernels that share an input share its basis too.
    shared: bool = True

    def init(self, key: Array, shape: tuple[int, ...]) -> Basis:
        """A first basis of that shape, (..., n_in, r), float32."""
        raise NotImplementedError

    def update(self, basis: Any, observation: Any, step: Array, key: Array) -> Any:
        """The basis for the next step, like the one given.

        Args:
          basis: (..., n_in, r), columns orthogonal.
          observation: The energy gradient S, (..., n_in, r); of a basis that is no
            array, what it observes.
          step: int32 scalar, optimizer steps taken so far; or `WARM_START`, which is
            never a traced value.
          key: A PRNG key for this basis and step.
        """
        raise NotImplementedError

    def due(self, step: Array) -> Array:
        """Whether the basis wants `passes` renewals from the batch of this step."""
        del step
        return jnp.asarray(False)

    def check(self, n_in: int, rank: int) -> None:
        """Raises ValueError if there is no such basis: 'rank 17, but ...'."""
        if rank > n_in:
            raise ValueError(f"rank {rank}, but it has only {n_in} input features")


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
        due = _every(self.interval, step)
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
        if not _renews(step):
            return basis
        return Oja(first=self.first).update(basis, observation, step, key)


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
        return _power_iteration(basis, observation) if _renews(step) else basis

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
        if _renews(step):
            # The random columns serve as the iteration's oversampling.
            q1 = self.principal.update(p, s, step, theirs)[..., :r1]
            due = jnp.asarray(True)
        else:
            q1 = self.principal.update(p[..., :r1], s[..., :r1], step, theirs)
            due = _every(self.interval, step)

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
        wanted = (_renews(step) | ~known) & (length > 0)
        new = jnp.where(wanted, mean / jnp.where(length > 0, length, 1), old)
        return replace(basis, vector=new)

    def due(self, step: Array) -> Array:
        return step == 0 if self.average == "once" else jnp.asarray(True)


def _renews(step: Array | int) -> bool:
    """Whether an update is part of a renewal."""
    return not isinstance(step, jax.core.Tracer) and int(step) == WARM_START


def _every(interval: int, step: Array | int) -> Array:
    """Whether the step after this one begins a new interval."""
    step = jnp.asarray(step)
    return (step >= 0) & ((step + 1) % interval == 0)


TRACKERS: dict[str, type[Any]] = {
    t.name: t for t in (Oja, Random, Fixed, Svd, Complement, BlockMean)
}
