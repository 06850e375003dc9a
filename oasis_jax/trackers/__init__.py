"""Trackers: where a basis starts and how it follows what it observes.

A tracker is a pair of pure functions, `init(key, shape) -> basis` and
`update(basis, observation, step, key) -> basis`, written as a small frozen dataclass so
that two trackers with the same settings are equal (JAX compares static values). The
observation is the energy gradient `S = X^T X P / N` that `projected_dense` returns as the
basis's cotangent. Leading axes of a basis (scanned layers) are batch axes throughout.

A basis that stands still must come back bit for bit: that is how the train state knows
that nothing moved.
"""

from typing import Any

from oasis_jax.trackers.base import WARM_START as WARM_START
from oasis_jax.trackers.base import Tracker as Tracker
from oasis_jax.trackers.every_step import Fixed, Oja, Random
from oasis_jax.trackers.whole_batch import BlockMean, Complement, Svd

TRACKERS: dict[str, type[Any]] = {
    t.name: t for t in (Oja, Random, Fixed, Svd, Complement, BlockMean)
}
