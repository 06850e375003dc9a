"""An Optax transformation in a subspace of the gradient, moved by a rule."""

import difflib
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from oasis_jax.bases import motion
from oasis_jax.bounds import POSITIVE, check
from oasis_jax.gradient.rules import BasisRule, ByPath
from oasis_jax.leaves import is_matrix
from oasis_jax.lift import lift
from oasis_jax.paths import flatten_paths, map_with_paths

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class ProjectGradientsState(NamedTuple):
    """State of `project_gradients`; the dicts are keyed by kernel path."""

    count: Array  # type: ignore[assignment]  # int32 (), updates taken
    basis: ByPath  # (..., n, r) float32
    memory: Any  # the rule's: its optimizer's state (OnlinePca), E (PowerIteration)
    inner: Any  # over coordinates: (..., r, m) where projected


class _Place(NamedTuple):
    transposed: bool  # projected on the output side
    shape: tuple[int, ...]  # of the basis


def project_gradients(
    inner: optax.GradientTransformation,
    rule: BasisRule,
    rank: int | float,
    *,
    scale: float = 1.0,
    side: str = "smaller",
    tie: str = "in",
    pattern: str = "kernel$",
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on the coordinates of gradients in a subspace of them.

    `update` hands `inner` the coordinates, those of the weights as its `params`, and
    `moved`, by how much each basis has moved since the last step (see
    `adam_in_coordinates`, whose `transport` decides what this does). Leaves that are
    not projected pass through `inner` as they are, in float32, and are not scaled.

    Args:
      inner: Any Optax transformation whose states have the shapes of its gradients.
      rule: `Svd`, `OnlinePca`, `PowerIteration` or another `BasisRule`.
      rank: A number of columns, or a fraction in (0, 1] of the projected side (rounded,
        at least 1).
      scale: Multiplies the updates of projected leaves only.
      side: 'smaller', 'in' or 'out'.
      tie: The side of square kernels where `side` is 'smaller', 'in' or 'out'.
      pattern: Regular expression, searched for in the paths of leaves (as in
        'block/mlp/up/kernel'). Matches with two axes or more are projected, but not
        stacked biases and scales; axes before the last two are batch axes, so leave out
        3-D kernels that are one matrix.

    Returns:
      An Optax transformation. Updates have the parameters' dtype; the state is float32.

    Raises:
      ValueError: at once if an option makes no sense; in `init` if `pattern` matches
        nothing that can be projected or the rank exceeds a kernel's side; in `update`
        if the state is of another rank. The message names the path and both values.

    Example:
      >>> from oasis_jax.gradient.rules import Svd
      >>> tx = project_gradients(optax.scale_by_lion(), Svd(interval=10), rank=2)
      >>> params = {'up': {'kernel': jnp.ones((3, 8, 16))}}        # three layers
      >>> state = tx.init(params)
      >>> state.basis['up/kernel'].shape, state.inner.mu['up']['kernel'].shape
      ((3, 8, 2), (3, 2, 16))
    """
    _check_rank(rank)
    check("scale", scale, POSITIVE)
    check_choice("side", side, ("smaller", "in", "out"))
    check_choice("tie", tie, ("in", "out"))
    inner = optax.with_extra_args_support(inner)

    def find(tree) -> dict[str, _Place]:
        return {
            path: _place(path, leaf.shape, rank, side, tie)
            for path, leaf in flatten_paths(tree).items()
            if is_matrix(path, leaf.shape) and re.search(pattern, path)
        }

    def oriented(tree, places) -> ByPath:
        leaves = flatten_paths(tree)
        return {path: _turn(leaves[path], place) for path, place in places.items()}

    def coordinates(tree, basis, matrices):
        def leaf(path, full):
            if path in basis:
                return _dot(basis[path].mT, matrices[path])
            return full.astype(jnp.float32)

        return map_with_paths(leaf, tree)

    def init(params):
        places = find(params)
        if not places:
            raise ValueError(_nothing(pattern, params))
        basis = {
            path: jnp.broadcast_to(jnp.eye(n, columns), (*batch, n, columns))
            for path, (_, (*batch, n, columns)) in places.items()
        }
        kernels = oriented(params, places)
        return ProjectGradientsState(
            count=jnp.zeros((), jnp.int32),
            basis=basis,
            memory=rule.init(basis, kernels),
            inner=inner.init(coordinates(params, basis, kernels)),
        )

    def update(updates, state, params=None, **extra_args):
        places = find(updates)
        _check_state(state.basis, places)
        grads = oriented(updates, places)
        move = rule.move(state.count, state.basis, grads, state.memory, state.inner)
        weights = None
        if params is not None:
            weights = coordinates(params, move.basis, oriented(params, places))
        directions, inner_state = inner.update(
            coordinates(updates, move.basis, move.observed),
            state.inner,
            weights,
            **extra_args
            | {"moved": {p: motion(move.basis[p], state.basis[p]) for p in places}},
        )

        def lifted(path, direction, like):
            if path not in places:
                return direction.astype(like.dtype)
            full = lift(move.basis[path], scale * direction, like.dtype)
            return full.mT if places[path].transposed else full

        count = optax.safe_increment(state.count)
        return (
            map_with_paths(lifted, directions, updates if params is None else params),
            ProjectGradientsState(count, move.after, move.memory, inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


# ---- Which leaves, and what may be wrong with them ----


def _place(
    path: str, shape: tuple[int, ...], rank: int | float, side: str, tie: str
) -> _Place:
    *batch, n_in, n_out = shape
    if side == "smaller":
        side = tie if n_in == n_out else "in" if n_in < n_out else "out"
    n = n_in if side == "in" else n_out
    columns = max(1, round(rank * n)) if isinstance(rank, float) else rank
    if columns > n:
        raise ValueError(
            f"{path}: rank is {columns}, but side '{side}' of a kernel of shape {shape}"
            f" has only {n} features"
        )
    return _Place(side == "out", (*batch, n, columns))


def _turn(matrix: Array, place: _Place) -> Array:
    """In float32, with the projected side first."""
    matrix = matrix.astype(jnp.float32)
    return matrix.mT if place.transposed else matrix


def _check_state(basis: ByPath, places: dict[str, _Place]) -> None:
    for path in basis.keys() | places.keys():
        have = basis[path].shape if path in basis else "no basis"
        want = places[path].shape if path in places else "none"
        if have != want:
            raise ValueError(
                f"{path}: the state has {have} for its basis, its gradient asks for"
                f" {want}; was the optimizer initialised (or the checkpoint written)"
                " with another rank, side or pattern?"
            )


def _nothing(pattern: str, params: Any) -> str:
    leaves = flatten_paths(params).items()
    paths = [path for path, leaf in leaves if is_matrix(path, leaf.shape)]
    if not paths:
        return f"pattern {pattern!r}: no leaf is a matrix, so none can be projected"
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    return (
        f"pattern {pattern!r} matches no leaf that is a matrix; the nearest are"
        f" {', '.join(near)}"
    )


def _check_rank(rank: Any) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not (whole or (isinstance(rank, float) and 0 < rank <= 1)):
        raise ValueError(
            f"rank is {rank!r}, expected a whole number from 1 or a fraction of the"
            " projected side in (0, 1]"
        )


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raises ValueError if the value of an option is none of those known."""
    if value not in known:
        raise ValueError(
            f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}"
        )
