"""The projection of one input: its basis, the kernels that share it, how it moves.

A model *declares* where it applies kernels to an input (`Projection(kernels=...)` in
the Flax collection `subspace`, without arrays); `select` decides which of these places get
a basis; the train state keeps the bases; and for a differentiated call it fills in the
zeros whose cotangents carry the projected gradients. One type serves all four, and
without a basis or without slots it applies its kernels plainly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from oasis_jax.dense import dense, projected_dense
from oasis_jax.paths import flatten_paths, map_with_paths, path_hash
from oasis_jax.trackers import motion

COLLECTION = "subspace"
"""The Flax collection; list it in `variable_axes` when scanning over layers."""


def _static(default: Any = None) -> Any:
    return field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Projection:
    """One input, the kernels applied to it, and the basis that they share.

    Attributes:
      kernels: Paths of the kernels, relative to the module that declares this.
      tracker: A `Tracker`: how the basis moves.
      stride: Token stride of what the tracker sees.
      basis: P, (..., n_in, r) float32; of an observation, the energy gradient S.
      slots: One (..., r, n_out) float32 per kernel, only in a differentiated call; of
        an observation, the coordinates C of the kernels' gradients.
      energy: Zero, (...); of an observation, |x|^2 / N.
      gram: Running mean of C C^T, (..., r, r), where the tracker's axes need it.
    """

    kernels: tuple[str, ...] = _static(())
    tracker: Any = _static()
    stride: int = _static(1)
    # Any, for each is an array in some roles and None in others.
    basis: Any = None
    slots: Any = None
    energy: Any = None
    gram: Any = None

    def __call__(
        self, x: Array, kernels: Mapping[str, Array], precision=None
    ) -> tuple[Array, ...]:
        """Applies `kernels` (by relative path) to `x`; projects those it can."""
        if self.basis is None or self.slots is None:
            return tuple(dense(x, kernel, precision) for kernel in kernels.values())
        projected = projected_dense(
            x,
            [kernels[name] for name in self.kernels],
            self.slots,
            self.basis,
            self.energy,
            stride=self.stride,
            precision=precision,
        )
        outputs = dict(zip(self.kernels, projected, strict=True))
        return tuple(
            outputs[name] if name in outputs else dense(x, kernel, precision)
            for name, kernel in kernels.items()
        )


def is_projection(node: Any) -> bool:
    return isinstance(node, Projection)


def projections(subspace: Any) -> dict[str, Projection]:
    """Every place of the tree that has a basis, keyed by its path."""
    places = flatten_paths(subspace, is_leaf=is_projection)
    return {path: p for path, p in places.items() if p.basis is not None}


def map_projections(function: Callable, subspace: Any, *rest: Any) -> Any:
    """Maps `function(path, projection, *others)` over the places that have a basis."""
    return map_with_paths(
        lambda path, p, *others: p if p.basis is None else function(path, p, *others),
        subspace,
        *rest,
        is_leaf=is_projection,
    )


def kernel_paths(path: str, projection: Projection) -> tuple[str, ...]:
    """Full paths of a projection's kernels: its own path's folder, then their names."""
    folder = path.rpartition("/")[0]
    return tuple(f"{folder}/{k}" if folder else k for k in projection.kernels)


def by_kernel(subspace: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values keyed by projection path, keyed by kernel path instead."""
    return {
        kernel: values[path]
        for path, projection in projections(subspace).items()
        for kernel in kernel_paths(path, projection)
    }


def bases(subspace: Any) -> dict[str, Array]:
    """The basis of every projected kernel, keyed by the kernel's path."""
    return by_kernel(subspace, {k: p.basis for k, p in projections(subspace).items()})


def probe(subspace: Any, params: Any) -> Any:
    """The subspace with the zeros in place whose cotangents will be the observations."""
    shapes = {path: leaf.shape for path, leaf in flatten_paths(params).items()}

    def fill(path: str, p: Projection) -> Projection:
        *batch, _, rank = p.basis.shape
        slots = tuple(
            jnp.zeros((*batch, rank, shapes[kernel][-1]), jnp.float32)
            for kernel in kernel_paths(path, p)
        )
        return replace(p, slots=slots, energy=jnp.zeros(batch, jnp.float32), gram=None)

    return map_projections(fill, subspace)


def advance(
    subspace: Any, observations: Any, step: Array | int, key: Array
) -> tuple[Any, dict[str, Array]]:
    """Moves every basis once.

    Args:
      subspace: The tree of projections.
      observations: The cotangent of its `probe`.
      step: Optimizer steps taken so far, or `trackers.WARM_START`.
      key: A PRNG key for this step; every basis folds its own path into it.

    Returns:
      The new subspace, and the motions R = P_new^T P by projection path.
    """
    motions = {}

    def move(path: str, p: Projection, seen: Projection) -> Projection:
        own_key = jax.random.fold_in(key, path_hash(path))
        new = p.tracker.update(p.basis, seen.basis, step, own_key)
        gram = p.gram
        if gram is not None:
            new, gram = _align(p, new, seen.slots)
        motions[path] = motion(new, p.basis)
        return replace(p, basis=new, gram=gram)

    return map_projections(move, subspace, observations), motions


def _align(p: Projection, new: Array, coordinates) -> tuple[Array, Array]:
    """Turns a moved basis towards the axes of the gradient's second moment."""
    fresh = sum(c @ c.mT for c in coordinates)
    gram = p.tracker.decay * p.gram + (1 - p.tracker.decay) * fresh
    moved = motion(new, p.basis)
    gram = moved @ gram @ moved.mT
    rotation = p.tracker.align(new, gram)
    # An eigenvector has no sign; each column takes that of the old one in its place.
    backwards = jnp.sum((new @ rotation) * p.basis, axis=-2, keepdims=True) < 0
    rotation = jnp.where(backwards, -rotation, rotation)
    return (new @ rotation).astype(new.dtype), rotation.mT @ gram @ rotation


def captured_energy(subspace: Any, observations: Any) -> dict[str, Array]:
    """|XP|^2 / |X|^2 of each projection, (...), from what the step observed anyway."""

    seen = projections(observations)

    def share(path: str, p: Projection) -> Array:
        captured = jnp.sum(p.basis * seen[path].basis, axis=(-2, -1))
        total = seen[path].energy
        return jnp.where(total > 0, captured / jnp.where(total > 0, total, 1), 0)

    return {path: share(path, p) for path, p in projections(subspace).items()}


def moved_share(motions: Mapping[str, Array]) -> dict[str, Array]:
    """1 - |R|_F^2 / r, (...): 0 for a basis that spans what it spanned, 1 for a new one."""
    return {
        path: 1 - jnp.sum(jnp.square(r), axis=(-2, -1)) / r.shape[-1]
        for path, r in motions.items()
    }
