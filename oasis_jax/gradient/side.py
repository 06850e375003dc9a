"""GaLore, Online Subspace Descent and LDAdam: a subspace of the full gradient.

The gradient of a kernel is formed whole and then projected, so any model works as it is;
what shrinks is the optimizer's state. The three are one transformation with different
rules for the basis and different optimizers inside:

    P, A <- rule(P, G)     the basis of this step, and what it projects (G, but for LDAdam)
    C = P^T A              (r, m), from here on as if that were the gradient
    D <- inner(C)          Adam, Lion, Adafactor: any Optax transformation
    update = scale * P D   (n, m)

n is the side of the kernel that is projected, by default the shorter, and m the other. On
the output side all of this happens to the transposed gradient. Leading axes of a leaf
(scanned layers) are batch axes.
"""

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array

from oasis_jax.bases import motion
from oasis_jax.gradient.rules import (
    BasisRule,
    ByPath,
    OnlinePca,
    PowerIteration,
    Svd,
    check_interval,
)
from oasis_jax.leaves import is_matrix, unstacked
from oasis_jax.lift import lift
from oasis_jax.optimizer import adam_in_coordinates
from oasis_jax.paths import flatten_paths, map_with_paths
from oasis_jax.transport import carry

Base: TypeAlias = str | optax.GradientTransformation

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


# ---- The transformation ----


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
      >>> tx = project_gradients(optax.scale_by_lion(), Svd(interval=10), rank=2)
      >>> params = {'up': {'kernel': jnp.ones((3, 8, 16))}}        # three layers
      >>> state = tx.init(params)
      >>> state.basis['up/kernel'].shape, state.inner.mu['up']['kernel'].shape
      ((3, 8, 2), (3, 2, 16))
    """
    _check_rank(rank)
    _check_choice("side", side, ("smaller", "in", "out"))
    _check_choice("tie", tie, ("in", "out"))
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


# ---- The three methods ----


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float = 128,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    scale: float = 0.25,
    interval: int = 200,
    side: str = "smaller",
    base: Base = "adam",
    pattern: str = "kernel$",
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam in the top singular vectors of a recent gradient.

        P = top-r left singular vectors of G, every `interval` steps     C = P^T G
        M <- b1 M + (1 - b1) C        V <- b2 V + (1 - b2) C∘C        t <- t + 1
        U = scale sqrt(1 - b2^t) / (1 - b1^t) P [ M / (sqrt(V) + eps) ]
        W <- (1 - lr wd) (W - lr U)

    The moments stay as they are when P changes. Its state is 2 r m + n r elements a
    kernel, n being the projected side; the full gradient is formed. Leaves that do not
    match `pattern` get the same with P = I and scale 1.

    Args:
      learning_rate: A number or a schedule. The paper's is .01 with scale .25.
      rank: A number of columns, or a fraction in (0, 1] of the projected side.
      b1, b2: Decay rates; for 'lion' its two betas. 'adafactor' uses b1 only.
      eps: Added before the bias correction, unlike in Optax; for 'adam' only.
      weight_decay: Of all leaves, decoupled, *after* the step.
      scale: Multiplies the steps of projected kernels (the paper's alpha).
      interval: Steps between two SVDs.
      side: 'smaller' (the input side if square), 'in' or 'out'.
      base: 'adam', 'lion', 'adafactor' (factored, with first moment and clipping by
        RMS), or an Optax transformation that gives directions for coordinates, with
        the sign of the gradient.
      pattern: See `project_gradients`; the paper projects attention and MLP kernels.

    Returns:
      An Optax transformation whose `update` needs `params`.

    Raises:
      ValueError: see `project_gradients`; for unknown bases and intervals below 1.

    Example:
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), galore(1e-2, rank=4))
      >>> state = tx.init({'up': {'kernel': jnp.ones((8, 16))}})
      >>> state[1][0].inner.mu['up']['kernel'].shape
      (4, 16)

    Source: GaLore (arXiv 2403.03507) and its code. We depart from it in keeping P and
    the moments in float32 whatever the gradients are in, and in leaving the basis alone
    where the gradient is zero or its SVD fails.
    """
    projected = project_gradients(
        _base(base, b1, b2, eps),
        Svd(interval),
        rank,
        scale=scale,
        side=side,
        pattern=pattern,
    )
    return optax.chain(projected, _step_then_decay(learning_rate, weight_decay))


def osd(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float = 128,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    scale: float = 0.25,
    interval: int = 200,
    side: str = "smaller",
    base: Base = "adam",
    basis_optimizer: optax.GradientTransformation | None = None,
    peak_learning_rate: float | None = None,
    penalty: float = 0.0,
    pattern: str = "kernel$",
) -> optax.GradientTransformationExtraArgs:
    """Online Subspace Descent: GaLore whose basis descends instead of jumping.

        P_0 = top-r left singular vectors of the first G          C = P^T G
        W as in `galore`, with the P of this step; then, from t = 1 on,
        P <- P - OptP(dL/dP)       L = || P P^T Gn - Gn ||^2,  Gn = G / ||G||

    OptP is AdamW (.9, .999, 1e-8, decay .01) at rate `lr_t / lr_peak / interval`. Its
    moments are 2 n r elements a kernel on top of GaLore's state.

    Args:
      learning_rate, rank, b1, b2, eps, weight_decay, scale, side, base, pattern: See
        `galore`.
      interval: Sets the basis's learning rate, 1 / interval; nothing happens at
        intervals.
      basis_optimizer: OptP, with its own learning rate, in place of AdamW. It works on
        a dict of bases, (..., n, r) by path; its count is 0 at step 1.
      peak_learning_rate: lr_peak. If None it is the learning rate itself where that is
        a number; where it is a schedule, the basis then learns at 1 / interval always.
      penalty: Weight of ||P^T P - I||^2 in L; in the paper, not in its code, where P
        slowly ceases to be orthonormal.

    Returns:
      An Optax transformation whose `update` needs `params`.

    Raises:
      ValueError: as `galore` does.

    Example:
      >>> schedule = optax.cosine_decay_schedule(1e-2, 1000)
      >>> tx = osd(schedule, rank=0.5, peak_learning_rate=1e-2, penalty=0.1)
      >>> state = tx.init({'up': {'kernel': jnp.ones((8, 16))}})
      >>> state[0].basis['up/kernel'].shape
      (8, 4)

    Source: Online Subspace Descent (arXiv 2408.12857) and its code. We depart from it
    in keeping P and the moments in float32, and in leaving P alone where the gradient is
    zero.
    """
    check_interval(interval)
    if basis_optimizer is None:
        rate = _basis_rate(learning_rate, peak_learning_rate, interval)
        basis_optimizer = optax.adamw(rate, weight_decay=0.01)
    projected = project_gradients(
        _base(base, b1, b2, eps),
        OnlinePca(basis_optimizer, penalty),
        rank,
        scale=scale,
        side=side,
        pattern=pattern,
    )
    return optax.chain(projected, _step_then_decay(learning_rate, weight_decay))


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float = 16,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rho: float = 0.908,
    error_feedback: bool = True,
    side: str = "smaller",
    pattern: str = "kernel$",
) -> optax.GradientTransformationExtraArgs:
    """LDAdam: Adam in a basis that moves every step, and its moments with it.

        A, P, E as in `PowerIteration`        C = P^T A
        M, V <- carry(M, V, R, t)             R = P^T P_old
        M <- b1 M + (1 - b1) C        V <- b2 V + (1 - b2) C∘C        t <- t + 1
        W <- (1 - lr wd) W - lr P [ M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps) ]

    Its state is 2 r m + n r elements a kernel, and n m more with error feedback. Leaves
    that do not match `pattern` get `optax.adamw`.

    Args:
      learning_rate: A number or a schedule.
      rank: A number of columns, or a fraction in (0, 1] of the projected side. The
        paper's code uses 8 with error feedback and 256 without.
      b1, b2, eps, weight_decay: As in `optax.adamw`.
      rho, error_feedback: See `PowerIteration`.
      side: 'smaller' (the *output* side if square), 'in' or 'out'.
      pattern: See `project_gradients`.

    Returns:
      An Optax transformation whose `update` needs `params`. A clip before it bounds G;
      the error is added after.

    Raises:
      ValueError: see `project_gradients`.

    Example:
      >>> tx = ldadam(1e-3, rank=4)
      >>> state = tx.init({'up': {'kernel': jnp.ones((8, 16))}})
      >>> state[0].memory['up/kernel'].shape                  # the error
      (8, 16)

    Source: LDAdam (arXiv 2410.16103) and its code, second moments clipped by `abs` as
    there. We depart from it in float32 for all state, in an error and a step count that
    are part of it, so that a resumed run goes on, and in leaving the basis alone where A
    is zero.
    """
    return optax.chain(
        project_gradients(
            adam_in_coordinates(
                b1, b2, eps, transport=functools.partial(carry, clip="abs")
            ),
            PowerIteration(rho, b1, error_feedback),
            rank,
            side=side,
            tie="out",
            pattern=pattern,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _base(base: Base, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    if isinstance(base, optax.GradientTransformation):
        return base
    _check_choice("base", base, ("adam", "lion", "adafactor"))
    if base == "adam":
        return adam_in_coordinates(b1, b2, eps, transport="keep", eps_before=True)
    if base == "lion":
        return optax.scale_by_lion(b1, b2)
    return unstacked(
        optax.chain(
            # The few rows of a projected gradient are worth factoring too.
            optax.scale_by_factored_rms(min_dim_size_to_factor=1),
            optax.clip_by_block_rms(1.0),
            optax.ema(b1, debias=False),
        )
    )


def _basis_rate(
    learning_rate: optax.ScalarOrSchedule, peak: float | None, interval: int
) -> optax.ScalarOrSchedule:
    if not callable(learning_rate):
        return learning_rate / (learning_rate if peak is None else peak) / interval
    if peak is None:
        return 1 / interval
    schedule: Callable = learning_rate
    # The basis takes its first step, number 0, at step 1.
    return lambda count: schedule(count + 1) / peak / interval


def _step_then_decay(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float
) -> optax.GradientTransformation:
    """W <- (1 - lr wd) (W - lr U): the decay sees the updated weights."""

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("update needs params: their dtype, and to decay them")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def leaf(u, w):
            step = (1 - rate * weight_decay) * u.astype(jnp.float32) + weight_decay * w
            return (-rate * step).astype(u.dtype)

        count = optax.safe_increment(state.count)
        return jax.tree.map(leaf, updates, params), optax.ScaleByScheduleState(count)

    return optax.GradientTransformation(init, update)


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


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(
            f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}"
        )
