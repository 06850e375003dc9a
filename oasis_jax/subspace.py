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

from oasis_jax.bases import Held, motion
from oasis_jax.dense import dense, projected_dense
from oasis_jax.lora import Adapter
from oasis_jax.paths import flatten_paths, map_with_paths, path_hash
from oasis_jax.trackers import WARM_START

COLLECTION = "subspace"
"""The Flax collection; list it in `variable_axes` when scanning over layers."""

COORDINATES, FULL_SIZE = "coordinates", "full"
"""What an optimizer gets to see of a projected kernel's gradient: C, or P C."""


def _static(default: Any = None) -> Any:
    return field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Projection:
    """One input, the kernels applied to it, and the basis that they share.

    Attributes:
      kernels: Paths of the kernels, relative to the module that declares this; none
        where the input is that of a norm or an activation function.
      tracker: A `Tracker`: how the basis moves.
      stride: Token stride of what the tracker sees.
      basis: P, (..., n_in, r) float32; of an observation, the energy gradient S.
      slots: One (..., r, n_out) float32 per kernel, only in a differentiated call; of
        an observation, the coordinates C of the kernels' gradients.
      energy: Zero, (...); of an observation, |x|^2 / N. A place without kernels declares
        it, so that its leading axes are known.
      gram: Running mean of C C^T, (..., r, r), where the tracker's axes need it.
      gradient: `COORDINATES` or `FULL_SIZE`.
      features: n_in of a place without kernels.
    """

    kernels: tuple[str, ...] = _static(())
    tracker: Any = _static()
    stride: int = _static(1)
    # Any, for each is an array in some roles and None in others.
    basis: Any = None
    slots: Any = None
    energy: Any = None
    gram: Any = None
    gradient: str = _static(COORDINATES)
    features: int = _static(0)

    @property
    def active(self) -> bool:
        """Whether this is a differentiated call of a place with a basis."""
        return self.basis is not None and self.slots is not None

    def __call__(
        self, x: Array, kernels: Mapping[str, Array], precision=None
    ) -> tuple[Array, ...]:
        """Applies `kernels` (by relative path) to `x`; projects those it can."""
        if not self.active:
            return tuple(dense(x, kernel, precision) for kernel in kernels.values())

        def projected(names, slots, basis):
            inputs = [kernels[name] for name in names]
            options: Any = dict(stride=self.stride, precision=precision)
            return projected_dense(x, inputs, slots, basis, self.energy, **options)

        if self.tracker is None or self.tracker.shared:
            outputs = projected(self.kernels, self.slots, self.basis)
        else:
            pairs = enumerate(zip(self.kernels, self.slots, strict=True))
            outputs = tuple(
                projected([name], [slot], self.basis_of(i))[0]
                for i, (name, slot) in pairs
            )
        by_name = dict(zip(self.kernels, outputs, strict=True))
        return tuple(
            by_name[name] if name in by_name else dense(x, kernel, precision)
            for name, kernel in kernels.items()
        )

    def basis_of(self, index: int) -> Any:
        """The basis of one of the kernels: that of the place, or its own."""
        if self.tracker is None or self.tracker.shared:
            return self.basis
        return replace(self.basis, salt=index)


def is_projection(node: Any) -> bool:
    """Whether it is a place of the tree: a `Projection`, or an `Adapter` in its stead."""
    return isinstance(node, Projection | Adapter)


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


def adapters(subspace: Any) -> dict[str, Adapter]:
    """Every adapter of the tree, keyed by its path."""
    places = flatten_paths(subspace, is_leaf=is_projection)
    return {path: a for path, a in places.items() if isinstance(a, Adapter)}


def only_adapters(subspace: Any) -> Any:
    """The tree without its bases."""
    return map_projections(lambda _, p: replace(p, basis=None), subspace)


def kernel_paths(path: str, place: Projection | Adapter) -> tuple[str, ...]:
    """Full paths of a place's kernels: its own path's folder, then their names."""
    folder = path.rpartition("/")[0]
    return tuple(f"{folder}/{k}" if folder else k for k in place.kernels)


def bases(subspace: Any, gradient: str | None = None) -> dict[str, Any]:
    """The basis of every projected kernel, keyed by the kernel's path.

    With `gradient`, of those only whose gradient the optimizer sees in that form.
    """
    return {
        kernel: p.basis_of(i)
        for path, p in projections(subspace).items()
        if gradient in (None, p.gradient)
        for i, kernel in enumerate(kernel_paths(path, p))
    }


def gradient_leaves(subspace: Any) -> dict[str, Any]:
    """What an observation, or a probe, holds of every kernel, keyed by its path.

    The slot of a projected kernel, and `{"a": A, "b": B}` of an adapted one.
    """
    leaves: dict[str, Any] = {}
    for path, p in projections(subspace).items():
        leaves |= zip(kernel_paths(path, p), p.slots, strict=True)
    for path, adapter in adapters(subspace).items():
        pairs = zip(adapter.a, adapter.b, strict=True)
        named = [{"a": a, "b": b} for a, b in pairs]
        leaves |= zip(kernel_paths(path, adapter), named, strict=True)
    return leaves


def put_adapters(subspace: Any, leaves: Mapping[str, Any]) -> Any:
    """The subspace with its adapters' arrays taken from `leaves`, as above."""

    def fill(path: str, place: Any) -> Any:
        if not isinstance(place, Adapter):
            return place
        own = [leaves[kernel] for kernel in kernel_paths(path, place)]
        a, b = (tuple(leaf[k] for leaf in own) for k in ("a", "b"))
        return replace(place, a=a, b=b)

    return map_with_paths(fill, subspace, is_leaf=is_projection)


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
) -> tuple[Any, dict[str, tuple[Array, ...]]]:
    """Moves every basis once.

    Args:
      subspace: The tree of projections.
      observations: The cotangent of its `probe`.
      step: Optimizer steps taken so far, or `trackers.WARM_START`.
      key: A PRNG key for this step; every basis folds its own path into it.

    Returns:
      The new subspace, and by projection path the motions R = P_new^T P, one per kernel,
      where moments are in coordinates.
    """
    motions: dict[str, tuple[Array, ...]] = {}

    def move(path: str, p: Projection, seen: Projection) -> Projection:
        own_key = jax.random.fold_in(key, path_hash(path))
        new = p.tracker.update(p.basis, seen.basis, step, own_key)
        gram = p.gram
        if gram is not None:
            new, gram = _align(p, new, seen.slots)
        moved = replace(p, basis=new, gram=gram)
        if p.gradient == COORDINATES:
            kernels = kernel_paths(path, p)
            own = range(1 if p.tracker.shared else len(kernels))
            moves = [motion(moved.basis_of(i), p.basis_of(i)) for i in own]
            motions[path] = tuple(moves * (len(kernels) // len(moves)))
        return moved

    return map_projections(move, subspace, observations), motions


def by_kernel(subspace: Any, values: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Values keyed by projection path, one per kernel, keyed by kernel path instead."""
    places = projections(subspace)
    return {
        kernel: value
        for path, own in values.items()
        for kernel, value in zip(kernel_paths(path, places[path]), own, strict=True)
    }


def forward_observations(subspace: Any, observations: Any) -> Any:
    """Without the gradients' coordinates, where no basis is turned towards them.

    What is left comes of the forward pass alone, so the compiler drops the backward.
    """
    return map_projections(
        lambda _, p, seen: replace(seen, slots=None) if p.gram is None else seen,
        subspace,
        observations,
    )


def due(subspace: Any, step: Array) -> dict[str, Array]:
    """Which places want to be renewed from the batch of this step, bool (), by path."""
    return {
        path: p.tracker.due(step)
        for path, p in projections(subspace).items()
        if p.tracker.passes
    }


def renew(
    subspace: Any, observations: Any, key: Array, which: Mapping[str, Array]
) -> Any:
    """One pass of a renewal: moves the bases in `which`, where it says so."""
    new, _ = advance(subspace, observations, WARM_START, key)

    def choose(path: str, old: Projection, new: Projection) -> Projection:
        if path not in which:
            return old
        return jax.tree.map(lambda a, b: jnp.where(which[path], a, b), new, old)

    return map_projections(choose, subspace, new)


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
    """|XQ|^2 / |X|^2 of each projection, (...), from what the step observed anyway.

    Q is P with its columns at unit length. Bases that are no arrays observe something
    else, and are left out.
    """
    seen = projections(observations)

    def share(p: Projection, observed: Projection) -> Array:
        lengths = jnp.sum(jnp.square(p.basis), axis=-2)
        captured = jnp.sum(p.basis * observed.basis, axis=-2)
        captured = jnp.sum(captured / jnp.maximum(lengths, 1e-30), axis=-1)
        total = observed.energy
        return jnp.where(total > 0, captured / jnp.where(total > 0, total, 1), 0)

    return {path: share(p, seen[path]) for path, p in watched(subspace).items()}


def watched(subspace: Any) -> dict[str, Projection]:
    """The places whose captured energy is known."""
    places = projections(subspace).items()
    return {path: p for path, p in places if not isinstance(p.basis, Held)}


def moved_share(motions: Mapping[str, tuple[Array, ...]]) -> dict[str, Array]:
    """1 - |R|_F^2 / r, (...): 0 for a basis that spans what it spanned, 1 for a new one."""
    return {
        path: 1 - jnp.sum(jnp.square(r), axis=(-2, -1)) / r.shape[-1]
        for path, (r, *_) in motions.items()
    }
