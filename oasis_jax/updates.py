"""Between the optimizer and the weights: what it sees, and what its updates do."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from oasis_jax.layout import Layout
from oasis_jax.lift import is_step, lift
from oasis_jax.paths import flatten_paths
from oasis_jax.subspace import COORDINATES, FULL_SIZE, Projection

Bases = Mapping[str, Projection]


def as_seen(layout: Layout, trained: Any, bases: Bases) -> Any:
    """What the optimizer sees of the tree that it moves.

    Where it sees a gradient's coordinates, zeros like them, (..., r, n_out) float32, in
    the kernel's place; else what is there.
    """
    weights = layout.params.split(trained)
    probes = layout.probes(bases, weights)
    slots = layout.by_kernel({path: probe.slots for path, probe in probes.items()})
    seen = {kernel.path: slots[kernel.path] for kernel in layout.of_form(COORDINATES)}
    return layout.params.join(weights | seen)


def check_lifted(
    layout: Layout,
    tx: optax.GradientTransformationExtraArgs,
    seen: Any,
    opt_state: Any,
    trained: Any,
    bases: Bases,
) -> None:
    """Finds an optimizer that does not lift now, not at the first step.

    Raises:
      ValueError: names the first parameter whose update has another shape.
    """
    wanted = {path: leaf.shape for path, leaf in flatten_paths(trained).items()}
    try:
        updates, _ = jax.eval_shape(
            lambda g, s, p, b: tx.update(g, s, p, basis=b),
            seen,
            opt_state,
            trained,
            layout.bases(bases, COORDINATES),
        )
    except TypeError:  # it added, say, a decayed weight to a projected gradient
        updates = seen
    for path, update in flatten_paths(updates, is_leaf=is_step).items():
        if not is_step(update) and update.shape != wanted[path]:
            raise ValueError(
                f"{path}: the optimizer leaves its projected gradient of shape"
                f" {update.shape} unlifted, for a parameter of shape {wanted[path]};"
                " use oasis_adam, or a rule with gradient='full', or pass rules=()"
                " to project nothing"
            )


def at_full_size(layout: Layout, grads: Any, bases: Bases) -> Any:
    """The gradients with P C where the optimizer wants them at full size."""
    lifts = layout.bases(bases, FULL_SIZE)

    def leaf(path: str, grad: Any) -> Any:
        return lift(lifts[path], grad) if path in lifts else grad

    return layout.params.map(leaf, grads)


def applied(
    layout: Layout, trained: Any, updates: Any, lifts: Mapping[str, Any], when: Array
) -> Any:
    """The tree after its updates, or, where `when` is False, bit for bit as it was.

    Args:
      lifts: The bases that lift the `Step`s among the updates, by kernel.
    """

    def leaf(path: str, update: Any, weight: Any) -> Any:
        if is_step(update):
            return update.applied(weight, lifts[path], when)
        new = optax.apply_updates(weight, update)
        return jax.tree.map(lambda a, b: jnp.where(when, a, b), new, weight)

    return layout.params.map(leaf, updates, trained)
