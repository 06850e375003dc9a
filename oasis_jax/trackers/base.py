"""What all trackers have, and how they tell one step from another."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.bases import Basis

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


def renews(step: Array | int) -> bool:
    """Whether an update is part of a renewal."""
    return not isinstance(step, jax.core.Tracer) and int(step) == WARM_START


def every(interval: int, step: Array | int) -> Array:
    """Whether the step after this one begins a new interval."""
    step = jnp.asarray(step)
    return (step >= 0) & ((step + 1) % interval == 0)
