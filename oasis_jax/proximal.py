"""RSO's proximal term: stay near the weights with which the subspace was entered."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from oasis_jax.paths import flatten_paths, map_with_paths
from oasis_jax.transport import stood_still


class ProximalState(NamedTuple):
    """State of `proximal`."""

    count: jax.Array  # type: ignore[assignment]  # int32 (), updates taken
    shift: dict[str, jax.Array]  # B by path, (..., r, n_out) float32: W = W_k + P B
    inner: Any


def proximal(
    inner: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    strength: float,
    *,
    pattern: str = ".",
) -> optax.GradientTransformationExtraArgs:
    """Adds |B|^2 / (2 eta) to the loss of every subspace: B / eta to its gradient.

    B, what the weights have moved by since the basis last changed, in coordinates,
    follows the updates of `inner` times the learning rate and is zero again when `motion`
    says that the basis moves.

    Args:
      inner: A transformation of coordinates, such as `adam_in_coordinates`.
      learning_rate: That by which its result will be multiplied.
      strength: eta, positive; the smaller, the nearer the weights stay.
      pattern: Regular expression of the paths to which it applies, where they are
        projected; the others get no B.

    Raises:
      ValueError: if `strength` is not positive.

    Source: RSO (arXiv 2502.07222), the inner problem; eta_k is a constant here.
    """
    if not strength > 0:
        raise ValueError(
            f"proximal: strength is {strength}, expected a positive number"
        )

    def init(params):
        shift = {
            path: jnp.zeros(leaf.shape, jnp.float32)
            for path, leaf in flatten_paths(params).items()
            if re.search(pattern, path)
        }
        return ProximalState(jnp.zeros((), jnp.int32), shift, inner.init(params))

    def update(
        updates, state, params=None, *, basis=None, motion=None, **extra_args: Any
    ):
        basis, motion = basis or {}, motion or {}
        shift = {path: b for path, b in state.shift.items() if path in basis}
        updates = map_with_paths(
            lambda path, g: g + shift[path] / strength if path in shift else g, updates
        )
        updates, inner_state = inner.update(
            updates, state.inner, params, basis=basis, motion=motion, **extra_args
        )
        rate: Any = learning_rate
        rate = rate(state.count) if callable(rate) else rate
        steps = flatten_paths(updates)

        def moved(path: str, b: jax.Array) -> jax.Array:
            b = b - rate * steps[path]
            r = motion.get(path)
            return b if r is None else jnp.where(stood_still(r)[..., None, None], b, 0)

        new = {path: moved(path, b) for path, b in shift.items()}
        count = optax.safe_increment(state.count)
        return updates, ProximalState(count, state.shift | new, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
