"""Transports: what happens to Adam's moments when the basis under them moves.

All have the signature `(mu, nu, motion, count, b1, b2) -> (mu, nu)` and are pure
functions of arrays whose leading axes are batch axes.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

Transport = Callable[..., tuple[Array, Array]]


def carry(
    mu: Array,
    nu: Array,
    motion: Array,
    count: Array,
    b1: float,
    b2: float,
    *,
    clip: str = "variance",
) -> tuple[Array, Array]:
    """Moves Adam's moments from one orthonormal basis to another.

    A gradient inside the old span has new coordinates `R c`. Treating coordinates as
    uncorrelated, the mean moves with R and the variance with R∘R; with bias-corrected
    `m = mu / (1 - b1^t)` and `v = nu / (1 - b2^t)`,

        mu' = R mu
        nu' = (1 - b2^t) [ (R∘R) max(v - m∘m, 0) + (R m)∘(R m) ]

    Args:
      mu: First moment, (..., r, n_out), coordinates of the old basis.
      nu: Second moment, same shape, non-negative.
      motion: R = P_new^T P_old, (..., r, r) float32.
      count: Number t of Adam updates already contained in `mu` and `nu` (not the step
        about to be taken). At 0, and where R is exactly I, the moments are returned
        as they are.
      b1, b2: Adam's decay rates.
      clip: "variance" as above, so that no entry of the second moment falls below the
        squared mean; "abs" takes the absolute value of the whole bracket instead, as
        LDAdam's published code does. They agree wherever v >= m∘m.

    Returns:
      The moments in the new basis, float32.

    Raises:
      ValueError: if trailing shapes disagree or `clip` is unknown.

    Source: LDAdam (arXiv 2410.16103), projection-aware update; the variance clip is ours.
    """
    if mu.shape != nu.shape or motion.shape[-1] != mu.shape[-2]:
        raise ValueError(
            f"carry: moments {mu.shape} and {nu.shape} do not fit motion {motion.shape}"
        )
    if clip not in ("variance", "abs"):
        raise ValueError(f"carry: clip is {clip!r}, expected 'variance' or 'abs'")
    t = jnp.asarray(count)
    # At t = 0 there is nothing to carry; 1 merely keeps the division finite.
    power = jnp.maximum(t, 1)
    mean_mass, mass = 1 - b1**power, 1 - b2**power
    mu, nu = mu.astype(jnp.float32), nu.astype(jnp.float32)
    mean, second = mu / mean_mass, nu / mass
    moved = motion @ mu
    variance = second - jnp.square(mean)
    if clip == "variance":
        variance = jnp.maximum(variance, 0)
    bracket = jnp.square(motion) @ variance + jnp.square(moved / mean_mass)
    moves = (t > 0) & ~stood_still(motion)[..., None, None]
    return jnp.where(moves, moved, mu), jnp.where(moves, mass * jnp.abs(bracket), nu)


def keep(mu, nu, motion, count, b1, b2) -> tuple[Array, Array]:
    """Leaves the moments as they are: old coordinates are read as new ones (GaLore)."""
    del motion, count, b1, b2
    return mu, nu


def reset(mu, nu, motion, count, b1, b2) -> tuple[Array, Array]:
    """Forgets the moments wherever the basis moved (RSO, FRUGAL).

    `scale_by_oasis_adam` restarts the bias correction there as well.
    """
    del count, b1, b2
    stood = stood_still(motion)[..., None, None]
    return jnp.where(stood, mu, 0), jnp.where(stood, nu, 0)


def stood_still(motion: Array) -> Array:
    """Where the motion (..., r, r) is exactly the identity, (...) bool."""
    return jnp.all(motion == jnp.eye(motion.shape[-1]), axis=(-2, -1))


TRANSPORTS: dict[str, Transport] = {"carry": carry, "keep": keep, "reset": reset}
