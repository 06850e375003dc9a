"""Activations and norms that keep `x @ basis` for their backward pass instead of `x`.

The forward pass is exact. What the backward pass would read of the input `X` it reads
of `X~ = Z P^T`, rebuilt from the coefficients `Z = X P`; statistics of a token, being
one number each, are kept exact. The columns of the basis `P` are orthogonal but need
not have unit length: PRAC's `[Q1, sqrt(k) Q2]`, with a random Q2 orthogonal to Q1,
makes X~ an unbiased estimate of X.

As in `oasis_jax.dense`, the gradient is the messenger: the cotangent of the basis is
`S = X^T Z / N`, that of the scalar `energy` is `|X|^2 / N`, both additive.

All that is kept has a name, `residuals.COEFFICIENTS` or `OBSERVED`, so that inside
`jax.checkpoint` `residuals.policy` keeps this alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from oasis_jax.dense import observe, project
from oasis_jax.residuals import COEFFICIENTS, OBSERVED, keep


def compressed(
    function: Callable[[Array], Array],
    x: Array,
    basis: Array,
    energy: Array | None = None,
    *,
    stride: int = 1,
) -> Array:
    """Applies an elementwise function and saves only the coefficients of its input.

    Forward, `y = f(x)`, exact. Saved: `Z = x P` in the dtype of `x`, and the energy
    gradient `S`. Backward, with `X~ = Z P^T` in the dtype of `x`,

        x      <- f'(X~) dy         (..., n)  exact where x lies in the basis's span and
                                              its columns have unit length
        basis  <- S = x^T Z / N     (n, r)    gradient of |x P|^2 / 2N
        energy <- |x|^2 / N         ()

    Args:
      function: Keeps the shape of its argument, such as `jax.nn.silu`. Static: hashable,
        and free of traced values.
      x: Input, (..., n); its leading axes are the N tokens.
      basis: Orthogonal columns, (n, r), float32 or bfloat16.
      energy: A float32 zero whose cotangent is `|x|^2 / N`; optional.
      stride: Look at every stride-th position of the last token axis for `S` and
        `energy` (and count only those in N); 1 looks at all.

    Returns:
      `function(x)`.

    Raises:
      ValueError: if shapes do not fit together; the message names both.

    Example:
      >>> x = jnp.array([[1.0, -2.0, 0.0]])
      >>> function = lambda x: compressed(jax.nn.relu, x, jnp.eye(3, 2)).sum()
      >>> function(x), jax.grad(function)(x)
      (Array(1., dtype=float32), Array([[1., 0., 0.]], dtype=float32))

    Source: PRAC (arXiv 2602.23111). Its theory of unbiased gradients does not reach
    non-linear layers: this is the derivative at an unbiased estimate of the input, not
    an unbiased estimate of the derivative.
    """
    _check("compressed", "x", x, "basis", basis, stride)
    y = _pointwise(function, stride, (x,), (basis,), (_zero(energy),))
    if jnp.shape(y) != x.shape:
        raise ValueError(
            f"compressed: function returned shape {jnp.shape(y)}, expected that of x,"
            f" {x.shape}"
        )
    return y


def compressed_swiglu(
    gate: Array,
    up: Array,
    gate_basis: Array,
    up_basis: Array,
    gate_energy: Array | None = None,
    up_energy: Array | None = None,
    *,
    stride: int = 1,
) -> Array:
    """`silu(gate) * up`, saving only the coefficients of both.

    Forward exact. Saved: `Zg = gate Pg`, `Zu = up Pu` in their dtype, and both energy
    gradients. Backward, with `G~ = Zg Pg^T` and `U~ = Zu Pu^T`,

        gate <- silu'(G~) U~ dy     (..., n)  linear in U~
        up   <- silu(G~) dy         (..., n)

    and for each basis and energy what `compressed` gives.

    Args:
      gate, up: Inputs, (..., n) each; their leading axes are the N tokens.
      gate_basis, up_basis: Orthogonal columns, (n, r) each; the ranks may differ.
      gate_energy, up_energy: As `energy` of `compressed`.
      stride: As in `compressed`.

    Returns:
      (..., n).

    Raises:
      ValueError: if shapes do not fit together; the message names both.

    Example:
      >>> gate, up = jnp.ones((2, 3, 8)), jnp.ones((2, 3, 8))
      >>> compressed_swiglu(gate, up, jnp.eye(8, 4), jnp.eye(8, 2)).shape
      (2, 3, 8)

    Source: PRAC (arXiv 2602.23111), which lists SiLU among its layers; to compress the
    other factor along with it is ours. Not unbiased, as `compressed` is not.
    """
    if gate.shape != up.shape:
        raise ValueError(
            f"compressed_swiglu: up has shape {up.shape}, expected that of gate,"
            f" {gate.shape}"
        )
    _check("compressed_swiglu", "gate", gate, "gate_basis", gate_basis, stride)
    _check("compressed_swiglu", "up", up, "up_basis", up_basis, stride)
    bases, energies = (gate_basis, up_basis), (_zero(gate_energy), _zero(up_energy))
    return _pointwise(_swiglu, stride, (gate, up), bases, energies)


def compressed_rms_norm(
    x: Array,
    scale: Array,
    basis: Array,
    energy: Array | None = None,
    *,
    eps: float = 1e-6,
    stride: int = 1,
) -> Array:
    """Root-mean-square norm in float32, saving only the coefficients of its input.

    Forward, `y = x i scale` with `i = (mean(x^2) + eps)^(-1/2)`, exact. Saved: `Z = x P`
    in the dtype of `x`, `i`, and the energy gradient. Backward, with `h = Z P^T i` and
    `g = dy scale`,

        x     <- i (g - h mean(g h))        (..., n)
        scale <- sum over tokens of dy h    (n,)

    and for `basis` and `energy` what `compressed` gives. `i` is that of the true input.

    Args:
      x: Input, (..., n); its leading axes are the N tokens.
      scale: (n,), any float dtype.
      basis, energy, stride: As in `compressed`.
      eps: Added to the mean square.

    Returns:
      (..., n), in the dtype of `x`.

    Raises:
      ValueError: if shapes do not fit together; the message names both.

    Example:
      >>> x, scale = jnp.array([[3.0, -3.0]]), jnp.ones(2)
      >>> compressed_rms_norm(x, scale, jnp.eye(2, 1)).round(3)
      Array([[ 1., -1.]], dtype=float32)

    Source: PRAC (arXiv 2602.23111), norms. With an unbiased X~, `dscale` is unbiased;
    `dx`, quadratic in X~, is not, and the paper's theory does not cover it.
    """
    options = _NormOptions(centred=False, eps=eps, stride=stride)
    return _checked_norm(
        "compressed_rms_norm", options, x, scale, None, basis, _zero(energy)
    )


def compressed_layer_norm(
    x: Array,
    scale: Array,
    bias: Array | None,
    basis: Array,
    energy: Array | None = None,
    *,
    eps: float = 1e-6,
    stride: int = 1,
) -> Array:
    """Layer norm in float32, saving only the coefficients of its input.

    Forward, `y = (x - m) i scale + bias` with `m = mean(x)`, `i = (var(x) + eps)^(-1/2)`,
    computed as `flax.linen.LayerNorm` does. Saved: `Z = x P` in the dtype of `x`, `m`,
    `i`, and the energy gradient. Backward, with `h = (Z P^T - m) i` and `g = dy scale`,

        x     <- i (g - mean(g) - h mean(g h))    (..., n)
        scale <- sum over tokens of dy h          (n,)
        bias  <- sum over tokens of dy            (n,)  exact

    and for `basis` and `energy` what `compressed` gives. `m` and `i` are those of the
    true input, so `h` is centred only as far as the basis holds the mean.

    Args:
      x: Input, (..., n); its leading axes are the N tokens.
      scale: (n,), any float dtype.
      bias: The same, or None.
      basis, energy, stride: As in `compressed`.
      eps: Added to the variance.

    Returns:
      (..., n), in the dtype of `x`.

    Raises:
      ValueError: if shapes do not fit together; the message names both.

    Example:
      >>> x, scale = jnp.array([[3.0, 1.0]]), jnp.ones(2)
      >>> compressed_layer_norm(x, scale, None, jnp.eye(2, 1)).round(3)
      Array([[ 1., -1.]], dtype=float32)

    Source: PRAC (arXiv 2602.23111), norms. With an unbiased X~, `dscale` is unbiased;
    `dx`, quadratic in X~, is not, and the paper's theory does not cover it.
    """
    options = _NormOptions(centred=True, eps=eps, stride=stride)
    return _checked_norm(
        "compressed_layer_norm", options, x, scale, bias, basis, _zero(energy)
    )


# --- Shared ---------------------------------------------------------------------------


class _Observed(NamedTuple):
    """What is kept of one input."""

    coefficients: Array
    energy_gradient: Array
    energy: Array


def _zero(energy: Array | None) -> Array:
    return jnp.zeros((), jnp.float32) if energy is None else energy


def _check(
    caller: str, x_name: str, x: Array, basis_name: str, basis: Array, stride: int
) -> None:
    if basis.ndim != 2 or x.shape[-1:] != basis.shape[:1]:
        width = x.shape[-1] if x.ndim else "n"
        raise ValueError(
            f"{caller}: {basis_name} has shape {basis.shape}, expected ({width}, rank)"
            f" for {x_name} of shape {x.shape}"
        )
    if basis.shape[1] > basis.shape[0]:
        raise ValueError(
            f"{caller}: rank {basis.shape[1]} of {basis_name} is larger than the"
            f" {basis.shape[0]} features of {x_name}"
        )
    if stride < 1:
        raise ValueError(f"{caller}: stride is {stride}, expected at least 1")


def _observe(x: Array, basis: Array, stride: int) -> _Observed:
    coefficients = project(x, basis)
    seen = observe(x, coefficients, basis, stride)
    return _Observed(keep(coefficients, COEFFICIENTS), *keep(seen, OBSERVED))


def _rebuild(coefficients: Array, basis: Array, dtype: Any) -> Array:
    """X~ = Z P^T, with the basis rounded as it was for Z."""
    return lax.dot_general(
        coefficients,
        basis.astype(coefficients.dtype),
        (((coefficients.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=dtype,
    )


# --- Functions of each element --------------------------------------------------------


def _swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pointwise(function, stride, inputs, bases, energies):
    del stride, bases, energies  # they exist for the backward pass
    return function(*inputs)


def _pointwise_forward(function, stride, inputs, bases, energies):
    del energies
    observed = tuple(
        _observe(x, basis, stride) for x, basis in zip(inputs, bases, strict=True)
    )
    return function(*inputs), (observed, bases)


def _pointwise_backward(function, stride, residuals, dy):
    del stride
    observed, bases = residuals
    # The coefficients have the inputs' dtype, and the function sees what it saw.
    rebuilt = (
        _rebuild(o.coefficients, basis, o.coefficients.dtype)
        for o, basis in zip(observed, bases, strict=True)
    )
    _, vjp = jax.vjp(function, *rebuilt)
    energy_gradients = tuple(o.energy_gradient for o in observed)
    return vjp(dy), energy_gradients, tuple(o.energy for o in observed)


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


# --- Norms ----------------------------------------------------------------------------


class _NormOptions(NamedTuple):
    """What is static about one call."""

    centred: bool
    eps: float
    stride: int


def _checked_norm(
    caller: str,
    options: _NormOptions,
    x: Array,
    scale: Array,
    bias: Array | None,
    basis: Array,
    energy: Array,
) -> Array:
    _check(caller, "x", x, "basis", basis, options.stride)
    for name, weight in {"scale": scale, "bias": bias}.items():
        if weight is not None and weight.shape != x.shape[-1:]:
            raise ValueError(
                f"{caller}: {name} has shape {weight.shape}, expected {x.shape[-1:]}"
                f" for x of shape {x.shape}"
            )
    return _norm(options, x, scale, bias, basis, energy)


def _statistics(options: _NormOptions, x: Array) -> tuple[Array | None, Array]:
    """Mean (None if not centred) and inverse deviation, (..., 1) float32."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    if not options.centred:
        return None, lax.rsqrt(square + options.eps)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    # Flax's formula; rounding can make the difference negative.
    variance = jnp.maximum(0.0, square - jnp.square(mean))
    return mean, lax.rsqrt(variance + options.eps)


def _apply_norm(x, scale, bias, mean, inverse):
    # The order of the products is that of models/llama.py and of Flax: it shows in the
    # last bit.
    wide = x.astype(jnp.float32)
    if mean is None:
        return (wide * inverse * scale).astype(x.dtype)
    y = (wide - mean) * (inverse * scale)
    return (y if bias is None else y + bias).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(options, x, scale, bias, basis, energy):
    del basis, energy  # they exist for the backward pass
    return _apply_norm(x, scale, bias, *_statistics(options, x))


def _norm_forward(options, x, scale, bias, basis, energy):
    del energy
    statistics = keep(_statistics(options, x), OBSERVED)
    y = _apply_norm(x, scale, bias, *statistics)
    observed = _observe(x, basis, options.stride)
    return y, (observed, statistics, scale, bias, basis)


def _norm_backward(options, residuals, dy):
    observed, (mean, inverse), scale, bias, basis = residuals
    rebuilt = _rebuild(observed.coefficients, basis, jnp.float32)
    normal = (rebuilt if mean is None else rebuilt - mean) * inverse
    wide = dy.astype(jnp.float32)
    weighted = wide * scale
    dx = weighted - normal * jnp.mean(weighted * normal, axis=-1, keepdims=True)
    if options.centred:
        dx = dx - jnp.mean(weighted, axis=-1, keepdims=True)
    tokens = tuple(range(dy.ndim - 1))
    dscale = jnp.sum(wide * normal, axis=tokens).astype(scale.dtype)
    dbias = None
    if bias is not None:
        dbias = jnp.sum(wide, axis=tokens).astype(bias.dtype)
    dx = (dx * inverse).astype(dy.dtype)
    return dx, dscale, dbias, observed.energy_gradient, observed.energy


_norm.defvjp(_norm_forward, _norm_backward)
