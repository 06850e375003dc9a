"""How bases move: after every step, and when they are renewed from a whole batch.

Bases, and what was observed, are dictionaries keyed by the path of their site.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.bases import motion
from oasis_jax.paths import path_hash
from oasis_jax.subspace import COORDINATES, Observation, Projection
from oasis_jax.trackers import WARM_START

Bases = Mapping[str, Projection]
Observations = Mapping[str, Observation]
# By site, one per kernel.
PerKernel = Mapping[str, tuple[Array, ...]]


def advance(
    bases: Bases,
    observations: Observations,
    coordinates: PerKernel,
    step: Any,
    key: Array,
) -> tuple[dict[str, Projection], dict[str, tuple[Array, ...]]]:
    """Moves every basis once.

    Args:
      bases: P, and the running means that turn it.
      observations: What was observed with them.
      coordinates: C of each kernel; needed where a basis has a `gram`.
      step: Optimizer steps taken so far, or `trackers.WARM_START`.
      key: A PRNG key for this step; every basis folds its own path into it.

    Returns:
      The new bases, and by site the motions R = P_new^T P, one per kernel, where moments
      are in coordinates.
    """
    moved = {}
    for path, p in bases.items():
        basis_key = jax.random.fold_in(key, path_hash(path))
        seen = observations[path].energy_gradient
        tracker: Any = p.place.tracker
        new, gram = tracker.update(p.basis, seen, step, basis_key), p.gram
        if gram is not None:
            new, gram = _align(p, new, coordinates[path])
        moved[path] = replace(p, basis=new, gram=gram)
    motions = {
        path: _motions(moved[path], p)
        for path, p in bases.items()
        if p.place.gradient == COORDINATES
    }
    return moved, motions


def _motions(new: Projection, old: Projection) -> tuple[Array, ...]:
    """R of each kernel; of a shared basis it is computed once."""
    tracker, kernels = old.place.tracker, len(old.place.kernels)
    if tracker is None or tracker.shared:
        return (motion(new.basis, old.basis),) * kernels
    return tuple(motion(new.basis_of(i), old.basis_of(i)) for i in range(kernels))


def _align(p: Projection, new: Array, coordinates) -> tuple[Array, Array]:
    """Turns a moved basis towards the axes of the gradient's second moment."""
    tracker: Any = p.place.tracker
    fresh = sum(c @ c.mT for c in coordinates)
    gram = tracker.decay * p.gram + (1 - tracker.decay) * fresh
    moved = motion(new, p.basis)
    gram = moved @ gram @ moved.mT
    rotation = tracker.align(new, gram)
    # An eigenvector has no sign; each column takes that of the old one in its place.
    backwards = jnp.sum((new @ rotation) * p.basis, axis=-2, keepdims=True) < 0
    rotation = jnp.where(backwards, -rotation, rotation)
    return (new @ rotation).astype(new.dtype), rotation.mT @ gram @ rotation


def due(bases: Bases, step: Array) -> dict[str, Array]:
    """Which bases want to be renewed from the batch of this step, bool (), by site."""
    return {path: p.tracker.due(step) for path, p in bases.items() if p.tracker.passes}


def renew(
    bases: Bases,
    observations: Observations,
    coordinates: PerKernel,
    key: Array,
    which: Mapping[str, Array],
) -> dict[str, Projection]:
    """One pass of a renewal: moves the bases in `which`, where it says so."""
    new, _ = advance(bases, observations, coordinates, WARM_START, key)
    return {
        path: jax.tree.map(lambda a, b, w=which[path]: jnp.where(w, a, b), new[path], p)
        if path in which
        else p
        for path, p in bases.items()
    }
