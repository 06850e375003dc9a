"""What a step saw, from what it observed anyway."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.bases import Held
from oasis_jax.subspace import COORDINATES, Observation, Projection

Bases = Mapping[str, Projection]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagnostics:
    """What the last step saw, at the price of no extra pass.

    Attributes:
      captured_energy: |XP|^2 / |X|^2 by projection, (...) float32 each.
      motion: 1 - |R|_F^2 / r by projection, (...) float32 each.
      gradient_norm: Global norm of the gradients, projected ones in coordinates.
      skipped: Updates skipped so far because something was not finite, int32.
      skipped_in_a_row: How many of them just now, int32.
    """

    captured_energy: dict[str, Array]
    motion: dict[str, Array]
    gradient_norm: Array
    skipped: Array
    skipped_in_a_row: Array

    @classmethod
    def first(cls, bases: Bases) -> "Diagnostics":
        """Before any step."""
        moments = {p: b for p, b in bases.items() if b.place.gradient == COORDINATES}
        # Not the same arrays: all are donated.
        return cls(
            captured_energy=_zeros(_watched(bases)),
            motion=_zeros(moments),
            gradient_norm=jnp.zeros(()),
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
        )

    def after(
        self,
        finite: Array,
        *,
        captured_energy: dict[str, Array],
        motion: dict[str, Array],
        gradient_norm: Array,
    ) -> "Diagnostics":
        """After one more step, which was skipped where it was not finite."""
        return Diagnostics(
            captured_energy,
            motion,
            gradient_norm,
            skipped=self.skipped + jnp.where(finite, 0, 1),
            skipped_in_a_row=jnp.where(finite, 0, self.skipped_in_a_row + 1),
        )


def captured_energy(
    bases: Bases, observations: Mapping[str, Observation]
) -> dict[str, Array]:
    """|XQ|^2 / |X|^2 by site, (...).

    Q is P with its columns at unit length. Bases that are no arrays observe something
    else, and are left out.
    """
    return {path: _share(p, observations[path]) for path, p in _watched(bases).items()}


def moved_share(motions: Mapping[str, tuple[Array, ...]]) -> dict[str, Array]:
    """1 - |R|_F^2 / r by site, (...): 0 for a basis that spans what it spanned, 1 for a
    new one."""
    return {
        path: 1 - jnp.sum(jnp.square(r), axis=(-2, -1)) / r.shape[-1]
        for path, (r, *_) in motions.items()
    }


def _watched(bases: Bases) -> Bases:
    """The bases whose captured energy is known."""
    return {path: p for path, p in bases.items() if not isinstance(p.basis, Held)}


def _share(p: Projection, seen: Observation) -> Array:
    lengths = jnp.sum(jnp.square(p.basis), axis=-2)
    captured = jnp.sum(p.basis * seen.energy_gradient, axis=-2)
    captured = jnp.sum(captured / jnp.maximum(lengths, 1e-30), axis=-1)
    total = seen.energy
    return jnp.where(total > 0, captured / jnp.where(total > 0, total, 1), 0)


def _zeros(bases: Bases) -> dict[str, Array]:
    return {path: jnp.zeros(p.basis.shape[:-2]) for path, p in bases.items()}
