"""A dense layer that keeps `x @ basis` for its backward pass instead of `x`.

The gradient is the messenger (see docs/architecture.md): JAX wants every cotangent to
have its primal's shape, so the layer takes a zero *slot* `(r, n_out)` per kernel, which
the forward pass ignores and whose cotangent is the projected gradient. The basis's own
cotangent is the gradient of the captured energy, and that of the scalar `energy` is the
energy there was to capture. All three are additive, so shared inputs, scanned layers,
microbatches and data-parallel replicas add them up by themselves.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from oasis_jax.bases import Basis, Held
from oasis_jax.residuals import COEFFICIENTS, OBSERVED, keep


class _Options(NamedTuple):
    """What is static about one call."""

    stride: int
    precision: lax.PrecisionLike


def projected_dense(
    x: Array,
    kernels: Sequence[Array],
    slots: Sequence[Array],
    basis: Basis,
    energy: Array | None = None,
    *,
    stride: int = 1,
    precision: lax.PrecisionLike = None,
) -> tuple[Array, ...]:
    """Applies several kernels to one input and saves only its coefficients.

    Forward, `y_i = x W_i`, exact. Saved: `Z = x P` in the dtype of `x`, the kernels
    (not copied) and the energy gradient `S`. Backward, `dx = sum_i dy_i W_i^T`, exact,
    and as cotangents

        slot_i <- Z^T dy_i          (r, n_out_i)   P^T times the gradient of W_i
        basis  <- S = x^T Z / N     (n_in, r)      gradient of |x P|^2 / 2N
        energy <- |x|^2 / N         ()             so tr(P^T S) / energy is captured

    The kernels get no gradient of their own: differentiate with respect to the slots.

    Args:
      x: Input, (..., n_in); its leading axes are the N tokens. Its dtype is the dtype
        of the computation.
      kernels: Weights, each (n_in, n_out_i), any float dtype; cast to that of `x`.
      slots: Zeros, each (r, n_out_i) float32.
      basis: P, (n_in, r), float32 or bfloat16; or one that is not held as an array
        (`oasis_jax.bases`), whose cotangent is then what its `observe` says.
      energy: A float32 zero whose cotangent is `|x|^2 / N`; optional.
      stride: Look at every stride-th position of the last token axis for `S` and
        `energy` (and count only those in N); 1 looks at all.
      precision: As in `jax.lax.dot_general`.

    Returns:
      One output per kernel, each (..., n_out_i), in the dtype of `x`.

    Raises:
      ValueError: if shapes do not fit together; the message names both.
      TypeError: if a slot is not float32 (its cotangent would silently be rounded).

    Example:
      >>> x, w = jnp.ones((2, 3, 8)), jnp.ones((8, 5))
      >>> (y,) = projected_dense(x, (w,), (jnp.zeros((4, 5)),), jnp.eye(8, 4))
      >>> y.shape
      (2, 3, 5)

    Source: OASIS (arXiv 2604.09406); the slots are ours.
    """
    kernels, slots = tuple(kernels), tuple(slots)
    _check(x, kernels, slots, basis, stride)
    if energy is None:
        energy = jnp.zeros((), jnp.float32)
    return _projected_dense(
        _Options(stride, precision), x, kernels, slots, basis, energy
    )


def _check(x: Array, kernels, slots, basis: Basis, stride: int) -> None:
    if basis.ndim != 2 or x.shape[-1:] != basis.shape[:1]:
        raise ValueError(
            f"projected_dense: basis has shape {basis.shape}, expected"
            f" ({x.shape[-1]}, rank) for an input of shape {x.shape}"
        )
    if basis.shape[1] > basis.shape[0]:
        raise ValueError(
            f"projected_dense: rank {basis.shape[1]} is larger than the input's"
            f" {basis.shape[0]} features"
        )
    if len(kernels) != len(slots):
        raise ValueError(
            f"projected_dense: {len(kernels)} kernels but {len(slots)} slots"
        )
    if stride < 1:
        raise ValueError(f"projected_dense: stride is {stride}, expected at least 1")
    for i, (kernel, slot) in enumerate(zip(kernels, slots, strict=True)):
        if kernel.ndim != 2 or kernel.shape[0] != x.shape[-1]:
            raise ValueError(
                f"projected_dense: kernel {i} has shape {kernel.shape}, expected"
                f" ({x.shape[-1]}, n_out) for an input of shape {x.shape}"
            )
        expected = (basis.shape[1], kernel.shape[1])
        if slot.shape != expected:
            raise ValueError(
                f"projected_dense: slot {i} has shape {slot.shape}, expected"
                f" {expected} for rank {basis.shape[1]} and kernel {kernel.shape}"
            )
        if slot.dtype != jnp.float32:
            raise TypeError(f"projected_dense: slot {i} is {slot.dtype}, not float32")


def dense(x: Array, kernel: Array, precision: lax.PrecisionLike = None) -> Array:
    """x @ kernel in the dtype of x, exactly as `flax.linen.Dense` writes it."""
    return lax.dot_general(
        x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), precision
    )


def _over_tokens(a: Array, b: Array, precision) -> Array:
    """a^T b summed over all leading axes, accumulated in float32."""
    tokens = tuple(range(a.ndim - 1))
    return lax.dot_general(
        a,
        b,
        ((tokens, tokens), ((), ())),
        precision,
        # Without it a bfloat16 cotangent would pass for a float32 slot, silently.
        preferred_element_type=jnp.float32,
    )


def project(x: Array, basis: Basis, precision: lax.PrecisionLike = None) -> Array:
    """Z = x P, (..., r) in the dtype of x."""
    if isinstance(basis, Held):
        return basis.project(x, precision)
    return dense(x, basis, precision)


def observe(
    x: Array,
    coefficients: Array,
    basis: Basis,
    stride: int = 1,
    precision: lax.PrecisionLike = None,
) -> tuple[Any, Array]:
    """What is told of x, (..., n_in), as cotangents of a basis and of its energy.

    Returns:
      The energy gradient S = x^T Z / N (or what a basis that is no array observes), and
      |x|^2 / N, over every stride-th position of the last token axis.
    """
    if x.ndim > 1:
        x, coefficients = (a[..., ::stride, :] for a in (x, coefficients))
    tokens = max(1, x.size // x.shape[-1])
    # A product, not a sum of squares: under a checkpoint policy that saves products the
    # latter would keep x in order to be recomputed.
    energy = jnp.vdot(x, x, preferred_element_type=jnp.float32) / tokens
    if isinstance(basis, Held):
        return basis.observe(x), energy
    gradient = _over_tokens(x, coefficients, precision) / tokens
    return gradient.astype(basis.dtype), energy


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _projected_dense(options, x, kernels, slots, basis, energy):
    del slots, basis, energy  # they exist for their cotangents
    return tuple(dense(x, kernel, options.precision) for kernel in kernels)


def _forward(options, x, kernels, slots, basis, energy):
    outputs = _projected_dense(options, x, kernels, slots, basis, energy)
    coefficients = project(x, basis, options.precision)
    # x is at hand only here, so whatever is to be known of it is made here.
    seen = observe(x, coefficients, basis, options.stride, options.precision)
    kept = keep(coefficients, COEFFICIENTS), *keep(seen, OBSERVED)
    return outputs, (kept, kernels)


def _backward(options, residuals, cotangents):
    (coefficients, observation, energy), kernels = residuals
    dx = None
    # Last first: autodiff adds the cotangents of a shared input in this order, and
    # in bfloat16 the order shows.
    for kernel, dy in reversed(tuple(zip(kernels, cotangents, strict=True))):
        part = lax.dot_general(
            dy,
            kernel.astype(dy.dtype),
            (((dy.ndim - 1,), (1,)), ((), ())),
            options.precision,
        )
        dx = part if dx is None else dx + part
    slots = tuple(
        _over_tokens(coefficients, dy, options.precision) for dy in cotangents
    )
    no_gradient = (None,) * len(kernels)
    return dx, no_gradient, slots, observation, energy


_projected_dense.defvjp(_forward, _backward)
