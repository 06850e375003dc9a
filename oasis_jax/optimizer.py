"""Adam in the coordinates of a moving basis, as an Optax transformation.

The gradient of a projected kernel arrives as its coordinates `C = P^T G`, (r, n_out); it
leaves as a full-size update. Which leaves are projected, and with which basis, comes with
each call (`basis=`, keyed by the kernel's path), so nothing here knows about ranks, rules
or models, and a tree without projected leaves gets ordinary AdamW.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from oasis_jax.bounds import DECAY, NOT_NEGATIVE, POSITIVE, check
from oasis_jax.decay import Mask, decay_weights
from oasis_jax.lift import Step, lift
from oasis_jax.paths import path_string
from oasis_jax.transport import TRANSPORTS, Transport, reset, stood_still


class ScaleByOasisAdamState(NamedTuple):
    """State of `scale_by_oasis_adam`; leaves have the shapes of the gradients."""

    count: Array  # type: ignore[assignment]  # int32 (), updates taken
    mu: optax.Updates  # first moment: (..., r, n_out) where projected
    nu: optax.Updates  # second moment, float32, same shapes
    age: Any  # updates since the last reset, int32 () a leaf; () unless resetting


def adam_in_coordinates(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    transport: str | Transport = "carry",
    mu_dtype: Any = None,
    eps_before: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam on coordinates as they come, its moments carried when their basis moves.

    `optax.scale_by_adam` whose `update` takes two keyword arguments more, both keyed by
    the leaf's path: `moved`, the R by which the basis has moved since the last update
    (LDAdam's order: the moments follow before this gradient is added), and `motion`, the
    R by which it moves after this one (OASIS's order). Nothing is lifted.

    Args:
      b1, b2, eps, transport, mu_dtype: See `scale_by_oasis_adam`.
      eps_before: Add eps to the root of the second moment before the bias correction,
        as GaLore and Online Subspace Descent do, instead of after it.

    Raises:
      ValueError: if a number makes no sense, or there is no such transport.
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        check(name, decay, DECAY)
    check("eps", eps, NOT_NEGATIVE)
    move = _resolve(transport)
    resets = move is reset

    def init(params):
        return ScaleByOasisAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(
                lambda p: jnp.zeros_like(p, dtype=mu_dtype or jnp.float32), params
            ),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params),
            age=jax.tree.map(lambda p: jnp.zeros((), jnp.int32), params)
            if resets
            else (),
        )

    def update(updates, state, params=None, *, motion=None, moved=None, **extra_args):
        del params, extra_args
        motion, moved = motion or {}, moved or {}

        def carried(mu, nu, age, r):
            if r is None:
                return mu, nu, age
            mu, nu = move(mu, nu, r, age, b1, b2)
            # A stack of layers has one age, so it moves, or stands still, as one.
            return mu, nu, jnp.where(jnp.all(stood_still(r)), age, 0) if resets else age

        def leaf(path, grad, mu, nu, age):
            name = path_string(path)
            grad, mu = grad.astype(jnp.float32), mu.astype(jnp.float32)
            mu, nu, age = carried(mu, nu, age, moved.get(name))
            age = optax.safe_increment(age)
            mu = b1 * mu + (1 - b1) * grad
            nu = b2 * nu + (1 - b2) * jnp.square(grad)
            mass, root_mass = 1 - b1**age, jnp.sqrt(1 - b2**age)
            if eps_before:
                direction = (root_mass / mass) * mu / (jnp.sqrt(nu) + eps)
            else:
                direction = (mu / mass) / (jnp.sqrt(nu / (1 - b2**age)) + eps)
            return direction, *carried(mu, nu, age, motion.get(name))

        treedef: Any
        paths_grads, treedef = jax.tree_util.tree_flatten_with_path(updates)
        size = len(paths_grads)
        leaves = [
            leaf(path, grad, mu, nu, age)
            for (path, grad), mu, nu, age in zip(
                paths_grads,
                treedef.flatten_up_to(state.mu),
                treedef.flatten_up_to(state.nu),
                treedef.flatten_up_to(state.age) if resets else [state.count] * size,
                strict=True,
            )
        ]
        new, mu, nu, ages = (
            treedef.unflatten(column)
            for column in (zip(*leaves, strict=True) if leaves else [()] * 4)
        )
        count = optax.safe_increment(state.count)
        mu = optax.tree.cast(mu, mu_dtype)
        return new, ScaleByOasisAdamState(count, mu, nu, ages if resets else ())

    return optax.GradientTransformationExtraArgs(init, update)


def lift_updates(
    scale: float = 1.0, *, in_place: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Lifts coordinates to weights where `update` is given a basis, times `scale`.

    `update` takes `basis`, keyed by path; other leaves pass as they are. With `in_place`
    it makes a `Step` of each instead, which `OasisTrainState` lifts into the weights.

    Raises:
      ValueError: if the scale makes no sense.
    """
    check("scale", scale, POSITIVE)

    def update(updates, state, params=None, *, basis=None, **extra_args):
        del extra_args
        basis = basis or {}

        def leaf(path, update, param=None):
            name = path_string(path)
            p, dtype = basis.get(name), _dtype(param, update)
            if p is None:
                return update.astype(dtype)
            if in_place:
                return Step(scale * update, jnp.zeros(()))
            return lift(p, scale * update, dtype)

        rest = () if params is None else (params,)
        return jax.tree_util.tree_map_with_path(leaf, updates, *rest), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def scale_by_oasis_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    scale: float = 1.0,
    transport: str | Transport = "carry",
    mu_dtype: Any = None,
    in_place: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rescales by Adam, in the subspace where there is one, and lifts the result.

    For a leaf with basis P, with `C` its incoming (r, n_out) gradient:

        M <- b1 M + (1 - b1) C        V <- b2 V + (1 - b2) C∘C        t <- t + 1
        update = scale * P [ M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps) ]
        M, V <- transport(M, V, R, t)             R = P_new^T P, once P has moved

    and for every other leaf Optax's `scale_by_adam`.

    `init` takes a tree of the *gradients'* shapes: `OasisTrainState.create` passes the
    parameters with every projected kernel replaced by its (r, n_out) slot. `update`
    takes two keyword arguments more, both optional and both keyed by kernel path:
    `basis`, the P in which the gradient's coordinates are, (..., n_in, r), and
    `motion`, the R by which the basis moves after this step, (..., r, r). It ignores
    keywords that it does not know.

    Args:
      b1, b2: Decay rates of the moments.
      eps: Added after the bias correction, as in Optax.
      scale: Multiplies the updates of projected leaves only (GaLore's alpha).
      transport: 'carry', 'keep', 'reset', or a function as in `oasis_jax.transport`.
      mu_dtype: Of the first moment; float32 if None. The second moment is float32: in
        bfloat16 it would lose increments of 1 - b2.
      in_place: Return a `Step` for each projected leaf instead of an array as large as
        its weights; only `OasisTrainState` can apply it.

    Raises:
      ValueError: if `transport` is unknown; in `update`, if a gradient's shape is
        neither its parameter's nor that of its basis's coordinates (names the path).

    Example:
      >>> tx = scale_by_oasis_adam()
      >>> state = tx.init({'w': jnp.zeros((2, 3))})            # rank 2
      >>> updates, state = tx.update(
      ...     {'w': jnp.ones((2, 3))}, state, {'w': jnp.ones((8, 3))},
      ...     basis={'w': jnp.eye(8, 2)})
      >>> updates['w'].shape
      (8, 3)

    Source: OASIS (arXiv 2604.09406); the transport is LDAdam's (arXiv 2410.16103).
    """
    adam = adam_in_coordinates(b1, b2, eps, transport=transport, mu_dtype=mu_dtype)
    lifted = lift_updates(scale, in_place=in_place)

    def update(updates, state, params=None, *, basis=None, motion=None, **extra_args):
        del extra_args
        _check_leaves(updates, state.mu, params, basis or {})
        updates, state = adam.update(updates, state, motion=motion)
        updates, _ = lifted.update(updates, optax.EmptyState(), params, basis=basis)
        return updates, state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def oasis_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    *,
    scale: float = 1.0,
    transport: str | Transport = "carry",
    mu_dtype: Any = None,
    in_place: bool = False,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW in a learned subspace; `optax.adamw` where nothing is projected.

    Use it with `OasisTrainState`, which hands it the bases:

        tx = optax.chain(optax.clip_by_global_norm(1.0), oasis_adam(3e-3))

    A clip before it sees the projected gradients, whose norm is at most that of the
    full ones. Weight decay acts on the whole kernel, after the lift.

    Args:
      learning_rate: A number or a schedule.
      b1, b2, eps, scale, transport, mu_dtype, in_place: See `scale_by_oasis_adam`.
      weight_decay: Decoupled, as in `optax.adamw`, and with its default.
      mask: Which leaves decay, as in `optax.add_decayed_weights`; all if None, norms and
        biases too, as in Optax. `leaves.matching` makes one of a pattern.

    Returns:
      An Optax transformation whose `update` needs `params` and takes `basis` and
      `motion` (see `scale_by_oasis_adam`).

    Raises:
      ValueError: if a number makes no sense: names it, its value and what is expected.

    Source: OASIS (arXiv 2604.09406), optimizer step.
    """
    check("learning_rate", learning_rate, NOT_NEGATIVE)
    return optax.chain(
        scale_by_oasis_adam(
            b1,
            b2,
            eps,
            scale=scale,
            transport=transport,
            mu_dtype=mu_dtype,
            in_place=in_place,
        ),
        decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _resolve(transport: str | Transport) -> Transport:
    if callable(transport):
        return transport
    if transport not in TRANSPORTS:
        raise ValueError(
            f"transport is {transport!r}, expected one of {sorted(TRANSPORTS)} or a"
            " function"
        )
    return TRANSPORTS[transport]


def _dtype(param: Array | None, grad: Array):
    return grad.dtype if param is None else param.dtype


def _check_leaves(updates, mu, params, basis) -> None:
    treedef: Any
    paths_grads, treedef = jax.tree_util.tree_flatten_with_path(updates)
    moments = treedef.flatten_up_to(mu)
    weights = [None] * len(moments) if params is None else treedef.flatten_up_to(params)
    for (path, grad), mean, param in zip(paths_grads, moments, weights, strict=True):
        name = path_string(path)
        _check_leaf(name, grad, mean, param, basis.get(name))


def _check_leaf(name: str, grad, mu, param, basis) -> None:
    """One clear sentence before a shape error of XLA's, naming the parameter."""
    if grad.shape != mu.shape:
        raise ValueError(
            f"{name}: gradient has shape {grad.shape}, its moments {mu.shape}; was the"
            " optimizer initialised (or the checkpoint written) with another rank?"
        )
    if param is None:
        return
    expected = param.shape
    if basis is not None:
        expected = (*param.shape[:-2], basis.shape[-1], param.shape[-1])
    if grad.shape != expected:
        hint = "" if basis is not None else "; no basis was given for it"
        raise ValueError(
            f"{name}: gradient has shape {grad.shape}, expected {expected} for a"
            f" parameter of shape {param.shape}{hint}"
        )
